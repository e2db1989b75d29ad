"""The manager over HTTP: a real server on loopback, a real manager, and models that go as far as the test says."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from serving import ScriptedLoader, StatusServer
from splitlearn_core import errors
from splitlearn_core.manager.config import ModelConfig
from splitlearn_core.manager.status import ModelStatus
from splitlearn_core.types import Progress
from splitlearn_serve.answers import error_answer
from splitlearn_serve.guard import HostRule
from splitlearn_serve.page import status_page

pytestmark = pytest.mark.libs

Serve = Callable[..., StatusServer]
JSON = {"Content-Type": "application/json"}
#: A folder in which requests may name models; the scripted loader never looks into it.
MODELS = Path(__file__).parent


def configuration(model_id: str = "trunk", **values: Any) -> dict[str, Any]:
    return {
        "model_id": model_id, "model_type": "llama", "model_path": str(MODELS), "component": "trunk",
        "split_points": [2, 4], **values,
    }  # fmt: skip


def config(model_id: str = "trunk", **values: Any) -> ModelConfig:
    return ModelConfig.from_dict(configuration(model_id, **values))


@pytest.fixture
def loader() -> ScriptedLoader:
    return ScriptedLoader()


@pytest.fixture
def serve(llama: Any, loader: ScriptedLoader) -> Iterator[Serve]:
    """Return a function that starts a server for as long as the test runs."""
    with ExitStack() as stack:
        usual = {"loader": loader, "min_residency": 0, "http": {"model_roots": [str(MODELS)]}}

        def serve(*configs: ModelConfig, **options: Any) -> StatusServer:
            return stack.enter_context(StatusServer(configs, **{**usual, **options}))

        yield serve


def is_ready(*model_ids: str) -> Callable[[Any], bool]:
    return lambda manager: set(model_ids) <= {info.model_id for info in manager.list_models() if info.ready}


def error_of(answer: Any) -> dict[str, str]:
    body = answer.json
    assert set(body) == {"error"}
    assert set(body["error"]) == {"type", "message", "hint"}
    assert "Traceback" not in answer.body.decode()
    error: dict[str, str] = body["error"]
    return error


class TestAsking:
    def test_models(self, serve: Serve) -> None:
        """One document says everything: models, what is configured but not there, memory and health."""
        server = serve(config("trunk", required=True), config("other", model_type="nonsense"))
        server.wait_until(is_ready("trunk"))

        overview = server.get("/api/models")

        assert [model["model_id"] for model in overview["models"]] == ["trunk"]
        assert overview["models"][0] == server.get("/api/models/trunk")
        assert overview["models"][0]["status"] == "ready"
        (other,) = overview["not_loaded"]
        assert (other["model_id"], other["error"]["type"]) == ("other", "UnknownModelTypeError")
        assert overview["health"]["ready"] is True
        assert {"host", "mapped"} <= set(overview["statistics"]["ledgers"])
        assert overview["now"] > overview["models"][0]["ready_at"]

    def test_statistics_and_story(self, serve: Serve) -> None:
        """Counts, and the last changes of one model in their order."""
        server = serve(config())
        server.wait_until(is_ready("trunk"))

        assert server.get("/api/statistics")["loads_succeeded"] == 1
        events = server.get("/api/models/trunk/events")["events"]
        after = [event["after"] for event in events]
        assert after[:2] + after[-2:] == ["queued", "planning", "loading", "ready"]
        assert [event["sequence"] for event in events] == sorted({event["sequence"] for event in events})

    def test_health(self, serve: Serve, loader: ScriptedLoader) -> None:
        """Live at once and whatever happens; ready when the required models are."""
        loader.hold("trunk")
        server = serve(config(required=True), config("extra"))

        assert server.request("GET", "/health/live").status == 200
        waiting = server.request("GET", "/health/ready")
        assert (waiting.status, list(waiting.json["missing"])) == (503, ["trunk"])
        loader.finish("trunk")
        server.wait_until(is_ready("trunk"))
        assert server.request("GET", "/health/ready").status == 200

    def test_a_required_model_that_cannot_begin_is_missed(self, serve: Serve) -> None:
        """No plugin, no load, no readiness: and the reason is shown."""
        server = serve(config("lost", model_type="nonsense", required=True), required=["lost"])

        answer = server.request("GET", "/health/ready")

        assert answer.status == 503
        assert list(answer.json["missing"]) == ["lost"]

    def test_metrics(self, serve: Serve) -> None:
        """What Prometheus scrapes parses, and knows the model."""
        from prometheus_client.parser import text_string_to_metric_families

        server = serve(config())
        server.wait_until(is_ready("trunk"))

        answer = server.request("GET", "/metrics")

        samples = [
            sample for family in text_string_to_metric_families(answer.body.decode()) for sample in family.samples
        ]
        assert answer.headers["content-type"].startswith("text/plain")
        ready = [sample for sample in samples if sample.name == "splitlearn_model_ready"]
        assert [(sample.labels, sample.value) for sample in ready] == [({"model_id": "trunk"}, 1.0)]

    @pytest.mark.parametrize(
        ("method", "path", "status"),
        [
            ("GET", "/api/models/none", 404),
            ("GET", "/api/models/none/events", 404),
            ("POST", "/api/models/none/load", 404),
            ("POST", "/api/models/none/reload", 404),
            ("POST", "/api/models/none/cancel", 404),
            ("DELETE", "/api/models/none", 404),
            ("GET", "/nothing", 404),
            ("GET", "/api/models/../../etc/passwd", 404),
            ("GET", "/api/models/%2e%2e%2fetc", 404),
            ("PUT", "/api/models", 405),
            ("POST", "/api/events", 405),
            ("DELETE", "/metrics", 405),
        ],
    )
    def test_what_is_not_there(self, serve: Serve, method: str, path: str, status: int) -> None:
        """Unknown ids and paths are errors with a type and a message, in JSON."""
        server = serve()

        answer = server.request(method, path)

        assert answer.status == status
        assert error_of(answer)["message"]


class TestDoing:
    def test_load_answers_at_once(self, serve: Serve, loader: ScriptedLoader) -> None:
        """202 with the model on its way; it is there when its load is over."""
        loader.hold("trunk")
        server = serve()

        answer = server.request("POST", "/api/models", configuration())

        assert answer.status == 202
        assert answer.json["status"] in ("queued", "planning", "loading")
        loader.finish("trunk")
        server.wait_until(is_ready("trunk"))
        assert server.get("/api/models/trunk")["status"] == "ready"

    def test_load_can_be_waited_for(self, serve: Serve) -> None:
        """200 with the ready model."""
        server = serve()

        answer = server.request("POST", "/api/models?wait=true", configuration())

        assert (answer.status, answer.json["status"]) == (200, "ready")

    def test_a_failure_that_is_waited_for(self, serve: Serve, loader: ScriptedLoader) -> None:
        """The error of the load itself, and it stays to be seen; another try by its id alone may do better."""
        loader.hold("trunk")
        loader.fail("trunk", errors.InvalidCheckpointError("the shard is cut", hint="fetch it anew"))
        server = serve()

        answer = server.request("POST", "/api/models?wait=true", configuration())

        assert answer.status == 422
        assert error_of(answer) == {
            "type": "InvalidCheckpointError", "message": "the shard is cut", "hint": "fetch it anew"
        }  # fmt: skip
        info = server.get("/api/models/trunk")
        assert (info["status"], info["error"]["message"]) == ("failed", "the shard is cut")
        assert "traceback" not in info["error"]
        loader.finish("trunk")
        again = server.request("POST", "/api/models/trunk/load?wait=true")
        assert (again.status, again.json["error"]) == (200, None)

    def test_twice(self, serve: Serve) -> None:
        """An id that is loaded is a conflict, and nothing has changed."""
        server = serve(config())
        server.wait_until(is_ready("trunk"))
        before = server.get("/api/models/trunk")

        for answer in (
            server.request("POST", "/api/models", configuration()),
            server.request("POST", "/api/models/trunk/load"),
        ):
            assert answer.status == 409
            assert error_of(answer)["type"] == "DuplicateModelError"
        assert server.get("/api/models/trunk") == before

    def test_unload_and_load_again(self, serve: Serve) -> None:
        """The released memory is reported; the id is enough to load it again, whether it is in the file or not."""
        server = serve(config("filed"))
        server.request("POST", "/api/models?wait=true", configuration("posted"))
        server.wait_until(is_ready("filed"))

        for model_id in ("filed", "posted"):
            report = server.request("DELETE", f"/api/models/{model_id}")
            assert (report.status, report.json["released"]["mapped"]) == (200, 1000)
            assert server.request("GET", f"/api/models/{model_id}").status == 404
        assert {model["model_id"] for model in server.get("/api/models")["not_loaded"]} == {"filed", "posted"}
        for model_id in ("filed", "posted"):
            assert server.request("POST", f"/api/models/{model_id}/load?wait=true").status == 200

    def test_forget(self, serve: Serve, loader: ScriptedLoader) -> None:
        """A posted model that failed, or is gone, can be forgotten; one of the file stays to be loaded."""
        loader.hold("bad")
        loader.fail("bad", errors.InvalidCheckpointError("no"))
        server = serve(config("filed"))
        assert server.request("POST", "/api/models?wait=true", configuration("bad")).status == 422
        assert server.request("POST", "/api/models?wait=true", configuration("good")).status == 200

        assert server.request("DELETE", "/api/models/bad").status == 200
        assert server.request("DELETE", "/api/models/good").status == 200
        assert server.request("DELETE", "/api/models/good").status == 200
        assert server.request("DELETE", "/api/models/good").status == 404

        overview = server.get("/api/models")
        assert {model["model_id"] for model in overview["models"] + overview["not_loaded"]} == {"filed"}

    def test_reload(self, serve: Serve) -> None:
        """A new generation replaces the old one, as before or as the body says."""
        server = serve(config())
        server.wait_until(is_ready("trunk"))

        same = server.request("POST", "/api/models/trunk/reload?wait=true")
        other = server.request("POST", "/api/models/trunk/reload?wait=true", configuration(dtype="float16"))

        assert (same.status, same.json["generation"], same.json["dtype"]) == (200, 2, "bfloat16")
        assert (other.status, other.json["generation"], other.json["dtype"]) == (200, 3, "float16")
        wrong = server.request("POST", "/api/models/trunk/reload", configuration("another"))
        assert wrong.status == 422
        assert "another" in error_of(wrong)["message"]

    def test_cancel(self, serve: Serve, loader: ScriptedLoader) -> None:
        """A load stops; a ready model has none to stop."""
        loader.hold("held")
        server = serve(config("ready"), config("held"))
        server.wait_until(is_ready("ready"))

        assert server.request("POST", "/api/models/held/cancel").status == 200
        answer = server.request("POST", "/api/models/ready/cancel")
        assert (answer.status, error_of(answer)["type"]) == (409, "ModelNotReadyError")
        assert server.get("/api/statistics")["loads_cancelled"] == 1

    def test_unload_waits_for_leases(self, serve: Serve) -> None:
        """A holder keeps the model for as long as the request says; force does not wait."""
        server = serve(config())
        server.wait_until(is_ready("trunk"))

        async def borrow(manager: Any) -> Any:
            lease = manager.lease("trunk")
            await lease.__aenter__()
            return lease

        lease = server.run(borrow)
        kept = server.request("DELETE", "/api/models/trunk?timeout=0")
        assert (kept.status, error_of(kept)["type"]) == (409, "DrainTimeoutError")
        assert server.get("/api/models/trunk")["leases"] == 1
        forced = server.request("DELETE", "/api/models/trunk?force=true")
        assert (forced.status, forced.json["broken_leases"]) == (200, 1)
        server.run(lambda manager: lease.__aexit__(None, None, None))

    def test_too_large_is_said_with_the_numbers(self, serve: Serve) -> None:
        """More than the limit can never be had: 503 without a promise that waiting helps."""
        server = serve(max_memory_mb=0.0001)

        answer = server.request("POST", "/api/models?wait=true", configuration())

        assert answer.status == 503
        assert error_of(answer)["type"] == "InsufficientMemoryError"
        assert "retry-after" not in answer.headers

    def test_real_components(self, serve: Serve, single: Path) -> None:
        """The server loads what the manager's own loader loads, and what fails says why."""
        server = serve(loader=None, http={"model_roots": [str(single.parent)]})

        good = server.request("POST", "/api/models?wait=true", configuration(model_path=str(single)))
        nowhere = configuration("x", model_path=str(single.parent / "nowhere"))
        missing = server.request("POST", "/api/models?wait=true", nowhere)
        split = server.request(
            "POST", "/api/models?wait=true", configuration("y", model_path=str(single), split_points=[2, 40])
        )

        assert (good.status, good.json["location"]) == (200, str(single))
        assert (missing.status, error_of(missing)["type"]) == (422, "MissingFileError")
        assert (split.status, error_of(split)["type"]) == (422, "InvalidSplitError")


class TestBadRequests:
    def test_every_problem_of_a_configuration_is_listed(self, serve: Serve) -> None:
        """Five mistakes, five lines, one answer; nothing is loaded."""
        server = serve()
        bad = configuration(component="middle", split_points=[4, 2], device=7, max_memory_mb=-1, colour="red")

        answer = server.request("POST", "/api/models", bad)

        assert answer.status == 422
        message = error_of(answer)["message"]
        assert all(field in message for field in ("component", "split_points", "device", "max_memory_mb", "colour"))
        assert server.get("/api/models")["models"] == []

    @pytest.mark.parametrize(
        ("values", "said"),
        [
            ({"model_type": "pytorch", "allow_pickle": True}, "allow_pickle"),
            ({"token": "hf_secret"}, "token"),
            ({"cache_dir": "/tmp/elsewhere"}, "cache_dir"),
            ({"architecture": "antigravity:Class"}, "architecture"),
            ({"architecture": ["antigravity:Class"]}, "architecture"),
        ],
    )
    def test_what_is_not_done_over_http(self, serve: Serve, values: dict[str, Any], said: str) -> None:
        """Running code, others' rights and other folders are for the configuration file; secrets are not repeated."""
        server = serve()

        answer = server.request("POST", "/api/models", configuration(**values))

        assert answer.status == 422
        assert said in error_of(answer)["message"]
        assert "hf_secret" not in answer.body.decode()

    def test_an_architecture_of_the_file_is_known(self, serve: Serve) -> None:
        """Values that the file names may be posted, too: its author trusts them."""
        filed = ModelConfig(
            model_id="own", model_type="pytorch", model_path="/nowhere.pt", architecture="torch.nn:Identity"
        )
        server = serve(filed)

        answer = server.request(
            "POST",
            "/api/models?wait=true",
            {**filed.to_dict(), "model_id": "b", "model_path": str(MODELS / "x.pt")},
        )

        assert answer.status == 200

    @pytest.mark.parametrize(
        ("body", "status"),
        [
            (b"", 422),
            (b"[]", 422),
            (b"7", 422),
            (b"{", 400),
            (b'{"model_id": NaN}', 422),
            (b"\xff\xfe", 400),
            (b"[" * 50_000, 400),
            (b" " * 70_000, 413),
        ],
        ids=["nothing", "list", "number", "cut", "nan", "bytes", "deep", "large"],
    )
    def test_bodies(self, serve: Serve, body: bytes, status: int) -> None:
        """What is no configuration is refused as what it is."""
        server = serve()

        answer = server.request("POST", "/api/models", body)

        assert answer.status == status
        assert error_of(answer)["message"]
        assert server.request("GET", "/health/live").status == 200

    @pytest.mark.parametrize("path", ["/api/models?wait=perhaps", "/api/models/trunk/load?wait=2"])
    def test_flags(self, serve: Serve, path: str) -> None:
        """A misspelt flag is not taken for no."""
        server = serve(config())

        assert server.request("POST", path, configuration()).status == 400

    @pytest.mark.parametrize("timeout", ["soon", "-1", "nan", "inf"])
    def test_timeouts(self, serve: Serve, timeout: str) -> None:
        """Seconds are a number from 0."""
        assert serve(config()).request("DELETE", f"/api/models/trunk?timeout={timeout}").status == 400

    def test_a_body_where_none_belongs(self, serve: Serve) -> None:
        """It would have been meant to do something."""
        server = serve(config())

        assert server.request("POST", "/api/models/trunk/cancel", {"force": True}).status == 400
        assert server.request("POST", "/api/models/trunk/load", {"dtype": "float16"}).status == 400

    def test_a_mistake_of_ours(self, serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
        """An unforeseen exception is a 500 without details, and is logged."""
        server = serve()

        def boom(model_id: str) -> None:
            raise ZeroDivisionError("the secret of the server")

        server.control.manager.story = boom  # type: ignore[method-assign,assignment]
        answer = server.request("GET", "/api/models/trunk/events")

        assert answer.status == 500
        assert "secret" not in answer.body.decode()
        assert error_of(answer)["hint"]
        server.end()  # it is logged after it was answered
        assert "ZeroDivisionError" in caplog.text


class TestStrangers:
    @pytest.mark.parametrize(
        "host", ["evil.example", "localhost.evil.example", "192.0.2.7", "", "a@localhost", "[::2]"]
    )
    def test_other_hosts(self, serve: Serve, host: str) -> None:
        """A name that points at loopback is not this server: neither read nor changed through it."""
        server = serve(config())

        for method, path in (("GET", "/"), ("GET", "/api/models"), ("POST", "/api/models"), ("GET", "/api/events")):
            answer = server.request(method, path, headers={"Host": host})
            assert answer.status == 421
            assert "allow-host" in error_of(answer)["hint"]

    @pytest.mark.parametrize(
        "host", ["localhost", "LOCALHOST.", "127.0.0.1", "127.1.2.3:99", "[::1]:8710", "localhost:1"]
    )
    def test_names_of_loopback(self, serve: Serve, host: str) -> None:
        """Whatever port a tunnel has."""
        assert serve().request("GET", "/api/models", headers={"Host": host}).status == 200

    def test_old_probes(self, serve: Serve) -> None:
        """A probe that speaks HTTP/1.0 names no host, and is no browser."""
        server = serve()
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.sendall(b"GET /health/live HTTP/1.0\r\n\r\n")
            assert client.recv(100).startswith(b"HTTP/1.1 200")

    def test_named_hosts(self, serve: Serve) -> None:
        """An allowed name is accepted; any address is accepted if remote access is allowed."""
        server = serve(hosts=HostRule.of(["Models.Internal"], any_address=True))

        for host, status in (
            ("models.internal:8710", 200), ("192.0.2.7:8710", 200), ("[2001:db8::1]", 200), ("evil.example", 421)
        ):  # fmt: skip
            assert server.request("GET", "/api/models", headers={"Host": host}).status == status

    @pytest.mark.parametrize(
        "headers",
        [
            {"Origin": "https://evil.example"},
            {"Origin": "null"},
            {"Origin": "http://127.0.0.1:9"},
            {"Sec-Fetch-Site": "cross-site"},
            {"Sec-Fetch-Site": "same-site"},
        ],
        ids=str,
    )
    def test_pages_of_others(self, serve: Serve, headers: dict[str, str]) -> None:
        """A page of another origin, another port of this machine included, changes nothing."""
        server = serve(config())
        server.wait_until(is_ready("trunk"))

        for method, path in (
            ("POST", "/api/models"), ("POST", "/api/models/trunk/reload"), ("DELETE", "/api/models/trunk")
        ):  # fmt: skip
            answer = server.request(method, path, headers=headers)
            assert answer.status == 403
            assert error_of(answer)["type"] == "RequestError"
        assert server.get("/api/models/trunk")["generation"] == 1

    def test_our_own_page(self, serve: Serve) -> None:
        """The same origin may, as the browser says it."""
        server = serve(config())
        server.wait_until(is_ready("trunk"))
        own = {"Origin": server.url, "Sec-Fetch-Site": "same-origin"}

        assert server.request("POST", "/api/models/trunk/reload?wait=true", headers=own).status == 200

    @pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
    def test_simple_requests(self, serve: Serve, kind: str) -> None:
        """What a form can send changes nothing, even without a body."""
        server = serve(config())

        for path in ("/api/models", "/api/models/trunk/load", "/api/models/trunk/reload", "/api/models/trunk/cancel"):
            assert server.request("POST", path, b"{}", headers={"Content-Type": kind}).status == 415

    def test_no_preflight_is_answered(self, serve: Serve) -> None:
        """A CORS preflight of another origin is refused."""
        server = serve()
        asking = {"Origin": "https://evil.example", "Access-Control-Request-Method": "DELETE"}

        answer = server.request("OPTIONS", "/api/models/trunk", headers=asking)

        assert answer.status == 403
        assert not any(name.startswith("access-control") for name in answer.headers)

    @pytest.mark.parametrize("path", ["/", "/api/models", "/metrics", "/health/live", "/nothing"])
    def test_headers(self, serve: Serve, path: str) -> None:
        """Headers forbid sniffing, framing, caching and referrers, and do not name the server."""
        headers = serve().request("GET", path).headers

        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
        assert headers["cache-control"] == "no-store"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert "server" not in headers


class TestPage:
    def test_it_is_one_file(self, serve: Serve) -> None:
        """Nothing is fetched from anywhere, and only what is in it may run."""
        answer = serve().request("GET", "/")
        text = answer.body.decode()

        assert answer.headers["content-type"] == "text/html; charset=utf-8"
        assert text.count("<script>") == text.count("<style>") == 1
        assert "//" not in text.replace("http://www.w3.org/2000/svg", "").split("<script>")[0]
        policy = answer.headers["content-security-policy"]
        assert policy == status_page().policy
        assert policy.count("'sha256-") == 2

    def test_foreign_text_stays_text(self) -> None:
        """No way to make elements of text is in the page at all."""
        text = status_page().body.decode()

        for way in (
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "document.write",
            "eval(",
            "new Function",
            "onclick=",
        ):
            assert way not in text


class Stream:
    """Server-sent events, read one by one."""

    def __init__(self, response: Any) -> None:
        self._response = response

    def next(self, kind: str) -> Any:
        while True:
            event = self._frame()
            if event.get("event") == kind:
                return json.loads(event["data"])

    def _frame(self) -> dict[str, str]:
        fields: dict[str, str] = {}
        while line := self._response.readline().decode().rstrip("\n"):
            name, _, value = line.partition(": ")
            fields[name] = value
        if not fields:
            raise EOFError
        return fields


class TestEvents:
    def test_changes_and_pictures(self, serve: Serve, loader: ScriptedLoader) -> None:
        """The state comes first; then each change with its number; progress comes without one."""
        loader.hold("trunk")
        server = serve(config())
        with server.connection() as connection:
            connection.request("GET", "/api/events")
            response = connection.getresponse()
            assert response.getheader("Content-Type") == "text/event-stream; charset=utf-8"
            stream = Stream(response)
            assert [model["model_id"] for model in stream.next("snapshot")["models"]] == ["trunk"]

            loader.advance("trunk", Progress("reading", None, 25, 100, "model.safetensors"))
            while not (model := stream.next("snapshot")["models"][0])["bytes_done"]:
                pass
            assert (model["stage"], model["bytes_done"], model["file"]) == ("reading", 25, "model.safetensors")
            loader.finish("trunk")
            while (change := stream.next("change"))["after"] != "ready":
                pass
            assert (change["model_id"], change["before"]) == ("trunk", "loading")
            assert stream.next("snapshot")["models"][0]["status"] == "ready"

    def test_it_ends_with_the_server(self, serve: Serve) -> None:
        """The last change is sent, and then the stream ends cleanly."""
        server = serve(config())
        server.wait_until(is_ready("trunk"))
        with server.connection() as connection:
            connection.request("GET", "/api/events")
            stream = Stream(connection.getresponse())
            stream.next("snapshot")

            server.end()

            assert stream.next("change")["after"] == "unloading"
            with pytest.raises(EOFError):
                stream.next("nothing")

    def test_it_ends_with_the_client(self, serve: Serve) -> None:
        """Clients that leave are forgotten: more may come and go than may watch at the same time."""
        server = serve()
        for _ in range(80):
            with server.connection() as connection:
                connection.request("GET", "/api/events")
                response = connection.getresponse()
                if response.status == 503:  # the last ones are still leaving
                    assert response.getheader("Retry-After")
                    continue
                Stream(response).next("snapshot")
        server.wait_until(lambda manager: True)
        assert server.request("GET", "/api/models").status == 200

    def test_only_so_many_watch(self, serve: Serve) -> None:
        """One too many is sent to the other way of knowing."""
        server = serve()
        with ExitStack() as stack:
            for _ in range(64):
                connection = stack.enter_context(server.connection())
                connection.request("GET", "/api/events")
                assert connection.getresponse().status == 200
            answer = server.request("GET", "/api/events")
            assert answer.status == 503
            assert "/api/models" in error_of(answer)["hint"]


class TestEnd:
    def test_loads_are_cancelled(self, serve: Serve, loader: ScriptedLoader) -> None:
        """A load that hangs does not keep the server from closing, and a waiting client gets an answer."""
        loader.hold("trunk")
        server = serve()
        body = json.dumps(configuration()).encode()
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            head = f"POST /api/models?wait=true HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
            client.sendall(head.encode() + b"Content-Type: application/json\r\nConnection: close\r\n\r\n" + body)
            server.wait_until(lambda manager: any(info.status is ModelStatus.LOADING for info in manager.list_models()))

            server.end()

            answer = b"".join(iter(lambda: client.recv(65536), b""))
        assert answer.startswith((b"HTTP/1.1 409", b"HTTP/1.1 503"))


@pytest.mark.parametrize(
    ("error", "status", "retry"),
    [
        (errors.UnknownModelError("x"), 404, False),
        (errors.DuplicateModelError("x"), 409, False),
        (errors.ModelNotReadyError("x"), 409, False),
        (errors.ModelGoneError("x"), 409, False),
        (errors.LoadCancelledError("x"), 409, False),
        (errors.DrainTimeoutError("x"), 409, False),
        (errors.BusyError("x"), 429, True),
        (errors.ManagerClosedError("x"), 503, False),
        (errors.WaitTimeoutError("x"), 503, True),
        (errors.InsufficientMemoryError("x"), 503, True),
        (errors.InsufficientDiskError("x"), 503, True),
        (errors.LoadStalledError("x"), 504, False),
        (errors.ConfigurationError("x"), 422, False),
        (errors.UnknownModelTypeError("x"), 422, False),
        (errors.MissingFileError("x"), 422, False),
        (errors.LoadFailedError("x"), 500, False),
        (errors.InternalError("x"), 500, False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value),
)
def test_status_codes(error: errors.SplitLearnError, status: int, retry: bool) -> None:
    """Each kind of error has the status that says whose move comes next, and whether waiting helps."""
    answer = error_answer(error)

    assert answer.status_code == status
    assert ("retry-after" in answer.headers) is retry
