"""Trunks used over WebSockets: a real server, a real checkpoint, and real clients."""

from __future__ import annotations

import gc
import socket
import ssl
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

from serving import Answer, StatusServer, make_certificate, until_met
from splitlearn_core import (
    AccessRefusedError,
    ConfigurationError,
    ConnectionLostError,
    ModelConfig,
    RemoteBusyError,
    RemoteError,
    RemoteStepError,
    SplitCausalLM,
    SplitLearnError,
    connect,
    load_split_model,
)
from splitlearn_core.cli.main import cli
from splitlearn_core.extension import SUBPROTOCOL, Frame, Kind, SessionLimits, decode, encode
from splitlearn_core.hosts.carriers import Endpoint
from splitlearn_core.testing.installing import write_plugin
from splitlearn_core.testing.worlds import tiny_model, write_checkpoint
from splitlearn_serve import connections, sockets
from splitlearn_serve.server_client import ServerClient
from splitlearn_serve.tls import server_context
from splitlearn_serve.tokens import Owner, Tokens

pytestmark = [pytest.mark.usefixtures("llama"), pytest.mark.filterwarnings("ignore:.*past_key_values.*:FutureWarning")]

LIMIT = 30
TOKEN, OTHER = "a" * 32, "b" * 32
Serve = Callable[..., StatusServer]


@pytest.fixture
def trunk(single: Path) -> ModelConfig:
    return ModelConfig(
        model_id="trunk", model_type="llama", model_path=str(single), component="trunk", split_points=(2, 4)
    )


@pytest.fixture
def serve(trunk: ModelConfig) -> Iterator[Serve]:
    """Return a function that starts a server for as long as the test runs."""
    with ExitStack() as stack:

        def serve(**options: Any) -> StatusServer:
            configs = options.pop("configs", [trunk])
            return stack.enter_context(StatusServer(configs, **options))

        yield serve


@pytest.fixture
def use() -> Iterator[Callable[..., Any]]:
    """Return a function that connects to a trunk until the test ends."""
    with ExitStack() as stack:

        def use(server: StatusServer, model_id: str = "trunk", **options: Any) -> Any:
            remote = connect(f"{server.url}/{model_id}", **options)
            stack.callback(remote.close)
            return remote

        yield use


@pytest.fixture
def models(single: Path) -> Any:
    """Return the unsplit model, its ends, and some input."""
    whole = AutoModelForCausalLM.from_pretrained(single).eval()
    parts = load_split_model(None, (2, 4), str(single), parts=("bottom", "top"))
    torch.manual_seed(0)
    ids = torch.randint(3, whole.config.vocab_size, (3, 9))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    mask[1, :2] = 0
    return SimpleNamespace(whole=whole, parts=parts, ids=ids, mask=mask)


def split(models: Any, remote: Any) -> SplitCausalLM:
    return SplitCausalLM(models.parts.bottom, remote, models.parts.top)


def both(models: Any, model: Any, ids: torch.Tensor | None = None, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Generate with the unsplit model and with the split one, from the same seed."""
    ids = models.ids if ids is None else ids
    results = []
    for each in (models.whole, model):
        torch.manual_seed(1)
        results.append(each.generate(ids, **{"do_sample": False, "pad_token_id": 0, "max_new_tokens": 12, **options}))
    return results[0], results[1]


def hidden(remote: Any, tokens: int = 3) -> torch.Tensor:
    torch.manual_seed(2)
    return torch.randn(1, tokens, remote.facts.hidden_size)


def exchange(server: StatusServer, *frames: Frame, token: str | None = None, model_id: str = "trunk") -> list[Frame]:
    """Send frames over one connection, and return the replies."""
    connection = Endpoint(f"{server.url}/{model_id}", token).open()
    try:
        return [connection.exchange(frame) for frame in frames]
    finally:
        connection.close()


def sessions_of(server: StatusServer) -> dict[str, Any]:
    return server.control.traffic.of("trunk").to_dict()


def settled(server: StatusServer, met: Callable[[], object]) -> None:
    """Wait until something is so in the server."""

    async def wait(_: Any) -> None:
        await until_met(met)

    server.run(wait)


class TestEqual:
    def test_generation(self, serve: Serve, use: Any, models: Any) -> None:
        """Logits, padding, greedy, beams, samples, prompt look-up and a continued cache are bit-equal."""
        server = serve()
        model = split(models, use(server))

        with torch.no_grad():
            ours = model(models.ids, attention_mask=models.mask).logits
            assert torch.equal(models.whole(models.ids, attention_mask=models.mask).logits, ours)
        for options in (
            {"attention_mask": models.mask},
            {"attention_mask": models.mask, "num_beams": 3, "num_return_sequences": 2},
            {"attention_mask": models.mask, "do_sample": True, "num_return_sequences": 3},
        ):
            assert torch.equal(*both(models, model, **options)), options
        assert torch.equal(*both(models, model, models.ids[2:], prompt_lookup_num_tokens=3))

        traffic = sessions_of(server)
        assert traffic["steps"] > 30
        assert traffic["bytes_received"] > traffic["steps"] * 100
        assert traffic["computing_seconds"] > 0

    def test_gradients(self, serve: Serve, use: Any, models: Any) -> None:
        """Training through the trunk gives the gradients of the unsplit model."""
        model = split(models, use(serve()))

        for each in (models.whole, model):
            each(models.ids, labels=models.ids, use_cache=False).loss.backward()

        expected = dict(models.whole.named_parameters())
        here = {name: each for name, each in model.named_parameters() if each.requires_grad}
        assert here.keys() == {name for name in expected if "layers.2." not in name and "layers.3." not in name}
        assert all(torch.equal(each.grad, expected[name].grad) for name, each in here.items())

    def test_a_session_ends_with_its_user(self, serve: Serve, use: Any, models: Any) -> None:
        """Sessions and the lease end when the cache is no longer referenced."""
        server = serve()
        model = split(models, use(server))
        both(models, model)
        gc.collect()

        settled(server, lambda: not server.control.manager.get_model_info("trunk").leases)
        assert sessions_of(server)["open"] == 0


class TestTLS:
    @pytest.fixture
    def certificate(self, tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
        """Return a function that makes a certificate of its own authority."""
        return partial(make_certificate, tmp_path)

    def test_equal(self, serve: Serve, use: Any, models: Any, certificate: Any) -> None:
        """Over wss:// all is as over ws://."""
        cert, key = certificate()
        remote = use(serve(tls=server_context(cert, key)), ca_file=cert)

        assert remote.url.startswith("https://")
        assert torch.equal(*both(models, split(models, remote), attention_mask=models.mask))

    def test_the_commands(self, serve: Serve, certificate: Any, capsys: pytest.CaptureFixture[str]) -> None:
        """``ps``, ``load`` and ``unload`` trust the file that they are given, and name the option without it."""
        cert, key = certificate()
        server = serve(tls=server_context(cert, key))
        server.wait_until(lambda manager: manager.get_model_info("trunk").ready)
        for command in (["ps"], ["unload", "trunk"], ["load", "trunk"]):
            # Through the console script: a command keeps the names of the first `--help` that it is asked for.
            done = CliRunner().invoke(cli, [*command, "--url", server.url, "--ca-file", str(cert)])
            assert (done.exit_code, "trunk" in done.output) == (0, True), done.output
        with pytest.raises(AccessRefusedError, match="certificate") as refusal:
            ServerClient(server.url).overview()
        assert "--ca-file" in refusal.value.hint
        with pytest.raises(ConfigurationError, match="holds no certificates"):
            ServerClient(server.url, ca_file=key)

    def test_the_end_of_a_server(
        self,
        serve: Serve,
        use: Any,
        certificate: Any,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """It does not wait for clients that are between two steps, and reports no error of its own."""
        monkeypatch.setattr(connections, "TLS_END_TIMEOUT", 0.05)
        cert, key = certificate()
        server = serve(tls=server_context(cert, key))
        remote = use(server, ca_file=cert, wait=0)
        remote(hidden(remote), past_key_values=remote.new_cache())
        server.end()
        assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []

    def test_an_unknown_authority(self, serve: Serve, certificate: Any) -> None:
        """It is refused by the client, which says so."""
        cert, key = certificate()
        other, _ = certificate("other")
        server = serve(tls=server_context(cert, key))
        for options in ({}, {"ca_file": other}):
            with pytest.raises(AccessRefusedError, match="certificate"):
                connect(f"{server.url}/trunk", **options)

    def test_an_expired_certificate(self, serve: Serve) -> None:
        """It was valid on one day in 2020, and is its own authority."""
        expired = Path(__file__).with_name("expired.pem")
        server = serve(tls=server_context(expired, expired))
        with pytest.raises(AccessRefusedError, match="expired") as refusal:
            connect(f"{server.url}/trunk", ca_file=expired)
        assert "renew the certificate" in refusal.value.hint

    def test_no_tls(self, serve: Serve, certificate: Any) -> None:
        """A client without TLS is no reason to stop; neither is one that says nothing."""
        cert, key = certificate()
        server = serve(tls=server_context(cert, key))
        silent = socket.create_connection(("127.0.0.1", server.port))

        with pytest.raises(ConnectionLostError):
            connect(f"http://127.0.0.1:{server.port}/trunk", wait=0)
        context = ssl.create_default_context(cafile=str(cert))
        with context.wrap_socket(socket.create_connection(("127.0.0.1", server.port)), server_hostname="127.0.0.1"):
            silent.close()


class TestAccess:
    @pytest.fixture
    def guarded(self, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> StatusServer:
        monkeypatch.delenv("SPLITLEARN_TOKEN", raising=False)
        return serve(tokens=Tokens({TOKEN: Owner("alice", max_sessions=1, max_tokens=50), OTHER: Owner("bob")}))

    def test_tokens(self, guarded: StatusServer, use: Any, models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """Sessions need one of the tokens; it is refused at once, not waited for."""
        with pytest.raises(AccessRefusedError, match="requires a token"):
            connect(f"{guarded.url}/trunk")
        with pytest.raises(AccessRefusedError, match="not one of"):
            connect(f"{guarded.url}/trunk", token="c" * 32)
        monkeypatch.setenv("SPLITLEARN_TOKEN", OTHER)
        assert torch.equal(*both(models, split(models, use(guarded))))

    def test_changes_need_a_token(self, guarded: StatusServer) -> None:
        """What changes models needs one, and what only shows them does not."""
        assert guarded.request("GET", "/api/models").status == 200
        assert guarded.request("GET", "/metrics").status == 200
        for method, path in (("POST", "/api/models/trunk/reload"), ("DELETE", "/api/models/trunk")):
            answer = guarded.request(method, path)
            assert (answer.status, answer.json["error"]["type"]) == (401, "AccessRefusedError")
            assert answer.headers["www-authenticate"].startswith("Bearer")
        guarded.wait_until(lambda manager: manager.get_model_info("trunk").ready)
        answer = guarded.request("DELETE", "/api/models/trunk", headers={"Authorization": f"Bearer {TOKEN}"})
        assert answer.status == 200, answer

    def test_limits_of_a_token(self, guarded: StatusServer, use: Any) -> None:
        """Each token has its sessions and tokens, whatever others have."""
        alice, bob = use(guarded, token=TOKEN), use(guarded, token=OTHER)
        assert (alice.facts.max_tokens, bob.facts.max_tokens) == (50, 32_768)
        first = alice.new_cache()
        alice(hidden(alice), past_key_values=first)
        with pytest.raises(RemoteBusyError, match="1 of them yours") as refusal:
            alice(hidden(alice), past_key_values=alice.new_cache())
        assert refusal.value.retry_after
        for _ in range(2):
            bob(hidden(bob), past_key_values=bob.new_cache())
        with pytest.raises(RemoteStepError, match="allows 512 and 50"):
            alice(hidden(alice, 48), past_key_values=first)

    def test_the_session_of_another_owner(self, guarded: StatusServer) -> None:
        """Neither its number nor its secret helps somebody with another token."""
        (opened,) = exchange(guarded, Frame(Kind.OPEN, meta={"rows": 1, "tokens": 5}), token=TOKEN)
        taken = Frame(Kind.STEP, opened.session, 1, {"secret": opened.meta["secret"]})
        guessed = Frame(Kind.STEP, opened.session, 1, {"secret": "0" * 32})

        (theirs,) = exchange(guarded, taken, token=OTHER)
        (wrong,) = exchange(guarded, guessed, token=TOKEN)

        assert [reply.meta["code"] for reply in (theirs, wrong)] == ["unknown_session"] * 2
        (closed,) = exchange(guarded, Frame(Kind.CLOSE, opened.session, meta={"secret": "0" * 32}), token=TOKEN)
        assert closed.kind is Kind.CLOSED
        assert sessions_of(guarded)["open"] == 1

    def test_pages_of_other_sites(self, serve: Serve) -> None:
        """The rules for Host and Origin hold for WebSockets."""
        server = serve()
        assert handshake(server, "Origin: http://evil.example").status == 403
        assert handshake(server, host="evil.example").status == 421
        assert handshake(server, f"Origin: {server.url}", host=f"127.0.0.1:{server.port}").status == 101


def handshake(
    server: StatusServer, *headers: str, host: str = "localhost", path: str = "/trunk", protocol: str = SUBPROTOCOL
) -> Answer:
    """Ask for a WebSocket, and return the answer."""
    with server.connection() as connection:
        connection.putrequest("GET", path, skip_host=True)
        for line in (
            f"Host: {host}", "Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13",
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", f"Sec-WebSocket-Protocol: {protocol}", *headers,
        ):  # fmt: skip
            connection.putheader(*line.split(": ", 1))
        connection.endheaders()
        answer = connection.getresponse()
        body = b"" if answer.status == 101 else answer.read()
        return Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, body)


class TestRefused:
    def test_before_the_connection(self, serve: Serve, use: Any, trunk: ModelConfig, single: Path) -> None:
        """Unknown models, other parts, and other versions of the protocol are refused with the reason."""
        bottom = ModelConfig(
            model_id="bottom", model_type="llama", model_path=str(single), component="bottom", split_points=(2, 4)
        )
        server = serve(configs=[trunk, bottom])

        with pytest.raises(RemoteError, match="there is no model 'tronk'") as unknown:
            connect(f"{server.url}/tronk")
        assert unknown.value.code == "unknown_model"
        with pytest.raises(RemoteError, match="is a bottom, and only trunks"):
            connect(f"{server.url}/bottom")
        answer = handshake(server, protocol="splitlearn.v99")
        assert answer.status == 400
        assert f"splitlearn.v99, and this server {SUBPROTOCOL}" in answer.json["error"]["message"]

    def test_a_server_that_is_starting(self) -> None:
        """It listens, and answers nothing yet."""
        with socket.create_server(("127.0.0.1", 0)) as listener:
            endpoint = Endpoint(f"http://127.0.0.1:{listener.getsockname()[1]}/trunk", connect_timeout=0.05)
            with pytest.raises(ConnectionLostError, match="accepted the connection, and did not answer") as caught:
                endpoint.open()
        assert "a server that is starting" in caught.value.hint

    def test_plain_requests(self, serve: Serve) -> None:
        """A browser at the address of a trunk is given the way."""
        server = serve()
        answer = server.request("GET", "/trunk")
        assert (answer.status, answer.headers["upgrade"]) == (426, "websocket")
        assert "connect(URL)" in answer.json["error"]["hint"]
        assert server.request("GET", "/trunks").status == 404
        assert server.request("DELETE", "/trunk").status == 405

    @pytest.mark.parametrize(
        ("data", "code"),
        [
            ("text", "malformed"),
            (b"no frame at all", "malformed"),
            (b"x" * 100, "malformed"),
            (b"SPLF\x63" + b"".join(encode(Frame(Kind.HELLO)))[5:], "version"),
            (b"".join(encode(Frame(Kind.WELCOME))), "malformed"),
            (b"".join(encode(Frame(Kind.OPEN, meta={"rows": 0, "tokens": 10**12}))), "bad_input"),
        ],
        ids=["text", "short", "magic", "version", "a reply", "numbers"],
    )
    def test_messages(self, serve: Serve, data: bytes | str, code: str) -> None:
        """What is no frame is answered, ends its connection where need be, and changes nothing."""
        from websockets.sync.client import connect as open_socket

        server = serve()
        with open_socket(f"ws://127.0.0.1:{server.port}/trunk", subprotocols=[SUBPROTOCOL], compression=None) as client:
            client.send(data)
            reply = client.recv()
            assert isinstance(reply, bytes)
            assert decode(reply).meta["code"] == code
        assert sessions_of(server)["open"] == 0

    def test_a_message_that_is_too_large(self, serve: Serve, use: Any) -> None:
        """It is answered before it has arrived, and the client need not wait for the server to come back."""
        server = serve(limits=SessionLimits(max_payload=2**20))
        remote = use(server)
        with pytest.raises(RemoteStepError) as refusal:
            remote(torch.zeros(1, 2**14, remote.facts.hidden_size))
        assert refusal.value.code == "too_large"

    def test_full(self, serve: Serve, use: Any, models: Any) -> None:
        """Without room for another session or its cache, it says when to try again; and others go on."""
        server = serve(limits=SessionLimits(max_sessions=2, cache_bytes=100_000))
        remote = use(server, max_tokens=20)
        per_token = remote.facts.cache_bytes_per_token
        caches = [remote.new_cache() for _ in range(3)]
        for cache in caches[:2]:
            remote(hidden(remote), past_key_values=cache)
        with pytest.raises(RemoteBusyError, match="2 sessions are open") as refusal:
            remote(hidden(remote), past_key_values=caches[2])
        assert refusal.value.retry_after
        with pytest.raises(RemoteBusyError, match="declare fewer tokens"):
            remote(hidden(remote, 100_000 // per_token), past_key_values=caches[0])
        remote(hidden(remote), past_key_values=caches[0])
        assert sessions_of(server)["refused"] == {"full": 2}
        del cache, caches
        gc.collect()
        settled(server, lambda: sessions_of(server)["open"] == 0)
        assert torch.equal(*both(models, split(models, remote)))

    def test_connections_of_one_owner(self, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
        """Their number is bounded."""
        monkeypatch.setattr(sockets, "CONNECTIONS_PER_OWNER", 1)
        server = serve()
        first = Endpoint(f"{server.url}/trunk").open()
        with pytest.raises(RemoteBusyError, match="1 connections of this owner"):
            Endpoint(f"{server.url}/trunk").open()
        first.close()
        settled(server, lambda: sessions_of(server)["connections"] == 0)
        Endpoint(f"{server.url}/trunk").open().close()


class TestLife:
    """Of servers, models, sessions and clients, in the middle of a generation."""

    class Midway:
        """A generation that calls a function once, after some steps."""

        def __init__(self, model: Any, action: Callable[[], Any], after: int = 5) -> None:
            self._left, self._action = after, action
            model.register_forward_pre_hook(self._count)

        def _count(self, *_: Any) -> None:
            self._left -= 1
            if self._left == 0:
                self._action()

    def test_unloaded_by_force(self, serve: Serve, use: Any, models: Any) -> None:
        """Its users load it again, and rebuild their sessions: the text continues."""
        server = serve()
        model = split(models, use(server))
        before = server.control.manager.get_statistics().unloads

        def unload() -> None:
            answer = server.request("DELETE", "/api/models/trunk?force=true")
            assert (answer.status, answer.json["broken_leases"]) == (200, 0)

        self.Midway(model, unload)
        assert torch.equal(*both(models, model, num_beams=2))
        assert server.control.manager.get_statistics().unloads == before + 1
        assert server.control.manager.get_model_info("trunk").generation == 2

    def test_unloaded_directly(self, serve: Serve, use: Any, models: Any) -> None:
        """Where the manager breaks the lease itself, the next step finds out."""
        server = serve()
        model = split(models, use(server))
        self.Midway(model, lambda: server.run(lambda manager: manager.unload_model("trunk", force=True)))
        assert torch.equal(*both(models, model))

    def test_drained(self, serve: Serve, use: Any, models: Any) -> None:
        """An unload waits for sessions; they go on, and no further one is opened meanwhile."""
        server = serve()
        remote = use(server)
        cache = remote.new_cache()
        remote(hidden(remote), past_key_values=cache)

        answer = server.request("DELETE", "/api/models/trunk?timeout=0")
        assert (answer.status, answer.json["error"]["type"]) == (409, "DrainTimeoutError")

        unload = threading.Thread(target=server.request, args=("DELETE", "/api/models/trunk?timeout=60"))
        unload.start()
        server.wait_until(lambda manager: manager.get_model_info("trunk").status == "draining")
        (refused,) = exchange(server, Frame(Kind.OPEN, meta={"rows": 1, "tokens": 5}))
        assert (refused.meta["code"], refused.meta["retry_after"]) == ("closing", 1.0)
        remote(hidden(remote), past_key_values=cache)
        del cache
        gc.collect()
        unload.join(LIMIT)
        assert not server.run(listed)

    def test_reloaded(self, serve: Serve, use: Any, models: Any) -> None:
        """Sessions move to the new generation, and the old one is freed."""
        server = serve()
        model = split(models, use(server))
        self.Midway(model, lambda: server.request("POST", "/api/models/trunk/reload?wait=true"))
        assert torch.equal(*both(models, model, do_sample=True))
        assert server.control.manager.get_model_info("trunk").generation == 2
        settled(server, lambda: server.control.manager.get_statistics().models.get("draining", 0) == 0)

    def test_reloaded_with_other_weights(self, serve: Serve, use: Any, models: Any, trunk: ModelConfig) -> None:
        """Sessions stay on the old generation until they end; new sessions get the new one."""
        server = serve()
        model = split(models, use(server))
        other = {**trunk.to_dict(), "dtype": "bfloat16"}
        self.Midway(model, lambda: server.request("POST", "/api/models/trunk/reload?wait=true", other))
        assert torch.equal(*both(models, model))
        assert use(server).facts.dtype == "bfloat16"
        gc.collect()
        settled(server, lambda: server.control.manager.get_statistics().models.get("draining", 0) == 0)

    def test_loaded_on_first_use(self, serve: Serve, use: Any, models: Any) -> None:
        """A model that expired between two generations is loaded again by the second."""
        server = serve()
        model = split(models, use(server))
        assert torch.equal(*both(models, model))
        gc.collect()
        settled(server, lambda: not server.control.manager.get_model_info("trunk").leases)
        assert server.request("DELETE", "/api/models/trunk").status == 200
        assert torch.equal(*both(models, model))

    def test_the_server_ends_and_comes_back(self, serve: Serve, use: Any, models: Any) -> None:
        """Another server at the same address takes over."""
        server = serve()
        model = split(models, use(server))

        def restart() -> None:
            server.end()
            serve(port=server.port)

        self.Midway(model, restart)
        assert torch.equal(*both(models, model, attention_mask=models.mask))

    def test_sessions_end_when_idle(self, serve: Serve, use: Any) -> None:
        """A client that is gone costs its session, after the time limit; others are not disturbed."""
        server = serve(limits=SessionLimits(idle_timeout=0.5))
        (opened,) = exchange(server, Frame(Kind.OPEN, meta={"rows": 1, "tokens": 5}))
        assert opened.kind is Kind.OPENED
        # Its connection has ended, and the session is there still.
        assert sessions_of(server)["open"] == 1
        settled(server, lambda: sessions_of(server)["expired"] == 1)
        settled(server, lambda: not server.control.manager.get_model_info("trunk").leases)
        remote = use(server)
        remote(hidden(remote), past_key_values=remote.new_cache())

    def test_a_failed_load(self, serve: Serve, trunk: ModelConfig, tmp_path: Path) -> None:
        """Its reason reaches the client."""
        from dataclasses import replace

        server = serve(configs=[replace(trunk, model_path=str(tmp_path / "nowhere"))])
        with pytest.raises(RemoteError, match="nowhere") as failure:
            connect(f"{server.url}/trunk", wait=0)
        assert failure.value.code == "not_loaded"


async def listed(manager: Any) -> list[str]:
    return [info.model_id for info in manager.list_models()]


class Slow(torch.nn.Module):
    """Stands before a layer, and blocks until it is released."""

    def __init__(self) -> None:
        super().__init__()
        self.entered, self.released = threading.Event(), threading.Event()

    def __call__(self, *_: Any) -> None:
        self.entered.set()
        assert self.released.wait(LIMIT)


class TestFair:
    def test_the_loop_is_free_during_steps(self, serve: Serve, use: Any) -> None:
        """While a step computes, everything else is answered."""
        server = serve()
        remote = use(server)
        slow = Slow()
        layer = hook(server, slow)
        step = threading.Thread(target=lambda: remote(hidden(remote)))
        step.start()
        assert slow.entered.wait(LIMIT)

        assert server.request("GET", "/health/live").status == 200
        assert exchange(server, Frame(Kind.PING), Frame(Kind.HELLO))[1].kind is Kind.WELCOME

        slow.released.set()
        step.join(LIMIT)
        layer.remove()

    def test_one_that_floods(self, serve: Serve, use: Any) -> None:
        """However many requests one session sends, another one waits for one of them at most."""
        server = serve(call_queue=2)
        slow = Slow()
        flooding = exchange(server, Frame(Kind.OPEN, meta={"rows": 1, "tokens": 5}))[0]
        quiet = use(server)
        cache = quiet.new_cache()
        quiet(hidden(quiet), past_key_values=cache)
        layer = hook(server, slow)
        order: list[str] = []

        def flood() -> None:
            frame = Frame(Kind.STEP, flooding.session, 1, {"secret": flooding.meta["secret"]})
            exchange(server, frame)
            order.append("flood")

        def step(states: torch.Tensor) -> None:
            quiet(states, past_key_values=cache)
            order.append("quiet")

        first = threading.Thread(target=step, args=(hidden(quiet),))
        first.start()
        assert slow.entered.wait(LIMIT)
        floods = [threading.Thread(target=flood) for _ in range(8)]
        for thread in floods:
            thread.start()
        settled(server, lambda: sessions_of(server)["connections"] == 9)
        slow.released.set()
        for thread in (first, *floods):
            thread.join(LIMIT)
        layer.remove()
        assert sorted(order) == ["flood"] * 8 + ["quiet"]
        # None of them found the queue of the model full.
        assert server.control.manager.get_statistics().calls_rejected == 0

    def test_prompts_do_not_stall_others(self, serve: Serve, use: Any) -> None:
        """Between two prompts, each session that waits with a token has a turn."""
        server = serve()
        slow = Slow()
        remote = use(server)
        caches = [remote.new_cache() for _ in range(6)]
        for cache in caches:
            remote(hidden(remote), past_key_values=cache)
        order: list[int] = []
        layer = hook(server, slow)
        record = hook(server, lambda _, __, arguments: order.append(arguments["hidden_states"].shape[1]))

        def step(tokens: int, cache: Any) -> None:
            remote(hidden(remote, tokens), past_key_values=cache)

        # All prompts arrive before all tokens.
        threads = [
            threading.Thread(target=step, args=(tokens, cache))
            for tokens, cache in zip((20, 20, 20, 1, 1, 1), caches, strict=True)
        ]
        for number, thread in enumerate(threads, 1):
            thread.start()
            settled(server, lambda number=number: len(answered(server)) == number)
        slow.released.set()
        for thread in threads:
            thread.join(LIMIT)
        layer.remove()
        record.remove()
        assert order == [20, 1, 1, 1, 20, 20]

    def test_messages_that_do_not_arrive(self, serve: Serve, use: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """A message that is begun and not ended ends its connection; silence between messages does not."""
        from websockets.sync.client import connect as open_socket

        monkeypatch.setattr(connections, "MESSAGE_TIMEOUT", 0.2)
        server = serve()
        url = f"ws://127.0.0.1:{server.port}/trunk"
        with (
            open_socket(url, subprotocols=[SUBPROTOCOL], compression=None) as slow,
            open_socket(url, subprotocols=[SUBPROTOCOL], compression=None) as silent,
        ):
            slow.socket.sendall(b"\x82\xfe\x10\x00half")
            settled(server, lambda: sessions_of(server)["connections"] == 1)
            silent.send(b"".join(encode(Frame(Kind.PING))))
            reply = silent.recv()
            assert isinstance(reply, bytes)
            assert decode(reply).kind is Kind.PONG

    def test_replies_that_are_not_read(self, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
        """A client that sends and does not read is closed."""
        monkeypatch.setattr(connections, "READING_TIMEOUT", 0.2)
        monkeypatch.setattr(connections, "SLOWEST", 2**30)
        server = serve()
        client = socket.create_connection(("127.0.0.1", server.port), timeout=LIMIT)
        with client:
            from websockets.client import ClientProtocol
            from websockets.uri import parse_uri

            protocol = ClientProtocol(parse_uri(f"ws://127.0.0.1:{server.port}/trunk"), subprotocols=[SUBPROTOCOL])
            protocol.send_request(protocol.connect())
            client.sendall(b"".join(protocol.data_to_send()))
            data = b""
            while b"\r\n\r\n" not in data:
                data += client.recv(1024)
            protocol.receive_data(data)
            message = b"".join(encode(Frame(Kind.HELLO)))
            with pytest.raises(ConnectionError):  # noqa: PT012  # which message it is, is all the same
                while True:
                    protocol.send_binary(message)
                    client.sendall(b"".join(protocol.data_to_send()))


def answered(server: StatusServer) -> list[int]:
    """Return the sessions whose requests wait or compute."""
    return [key for key in server.sessions._turns if isinstance(key, int)]


def hook(server: StatusServer, action: Callable[..., None]) -> Any:
    """Call a function before each forward of the trunk."""

    async def add(manager: Any) -> Any:
        return manager.get_model("trunk").model.register_forward_pre_hook(action, with_kwargs=True)

    server.wait_until(lambda manager: manager.get_model_info("trunk").ready)
    return server.run(add)


class TestShown:
    def test_counts(self, serve: Serve, use: Any, models: Any) -> None:
        """JSON and metrics have what the sessions did."""
        from splitlearn_serve.ps import fetch_overview, render_overview

        server = serve()
        remote = use(server)
        cache = remote.new_cache()
        remote(hidden(remote), past_key_values=cache)

        (entry,) = server.get("/api/models")["models"]
        assert (entry["sessions"]["open"], entry["sessions"]["steps"]) == (1, 1)
        assert entry["sessions"]["cache_bytes"] == 2048 * remote.facts.cache_bytes_per_token
        assert entry == server.get("/api/models/trunk") | {"sessions": entry["sessions"]}
        shown = render_overview(fetch_overview(server.url))
        assert "1 open, 1 step, 0.1/s" in shown
        assert "trunk: sessions computed for 0.0 s, waited for 0.0 s; " in shown
        metrics = server.request("GET", "/metrics").body.decode()
        for line in (
            'splitlearn_sessions_open{model_id="trunk"} 1.0',
            'splitlearn_sessions_opened_total{model_id="trunk"} 1.0',
            'splitlearn_session_step_seconds_count{model_id="trunk"} 1.0',
        ):
            assert line in metrics

    def test_the_way_out_is_one_of_the_command_line(self, serve: Serve, use: Any) -> None:
        """Commands name commands, where the server's own answer names a request."""
        server = serve()
        remote = use(server)
        cache = remote.new_cache()
        remote(hidden(remote), past_key_values=cache)
        runner, at, raises = CliRunner(), ["--url", server.url], {"standalone_mode": False, "catch_exceptions": False}
        with pytest.raises(SplitLearnError, match="stays loaded: 1 lease left") as left:
            runner.invoke(cli, ["unload", "trunk", "--timeout", "0", *at], **raises)
        assert left.value.hint == "`splitlearn unload ID --force` does not wait for leases to end"
        with pytest.raises(SplitLearnError, match="no model 'tronk'") as unknown:
            runner.invoke(cli, ["load", "tronk", *at], **raises)
        assert unknown.value.hint.startswith("these are: trunk;")
        with pytest.raises(SplitLearnError, match="is not a `splitlearn serve`") as path:
            ServerClient(f"{server.url}/trunk").overview()
        assert path.value.hint.endswith(f"--url {server.url}")


class TestTraining:
    @pytest.fixture
    def learner(self, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> StatusServer:
        monkeypatch.delenv("SPLITLEARN_TOKEN", raising=False)
        owners = {TOKEN: Owner("alice", training=False), OTHER: Owner("bob", training_steps=3)}
        return serve(tokens=Tokens(owners))

    def test_a_permission_of_its_own(self, learner: StatusServer, use: Any, models: Any) -> None:
        """With one token of inference alone, and one for a number of steps, which a reload does not give again."""
        reader = split(models, use(learner, token=TOKEN))
        loss = reader(models.ids, labels=models.ids, use_cache=False).loss
        with pytest.raises(AccessRefusedError, match="permission to train"):
            loss.backward()
        writer = split(models, use(learner, token=OTHER))
        for count in range(3):
            if count == 2:
                learner.request("POST", "/api/models/trunk/reload", headers={"Authorization": f"Bearer {OTHER}"})
                learner.wait_until(lambda manager: manager.get_model_info("trunk").ready)
            writer(models.ids, labels=models.ids, use_cache=False).loss.backward()
        loss = writer(models.ids, labels=models.ids, use_cache=False).loss
        with pytest.raises(AccessRefusedError, match="train 3 steps"):
            loss.backward()

    # Of PEFT's own making, on the unsplit model too.
    @pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
    def test_adapters_are_sent_once_a_step(self, serve: Serve, use: Any, models: Any) -> None:
        """They hold their model as sessions do, and are dropped when it is to go; then they are sent again."""
        peft = pytest.importorskip("peft", reason="peft is not installed")
        server = serve()
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        results = []
        for model in (models.whole, split(models, use(server))):
            torch.manual_seed(0)
            wrapped = peft.get_peft_model(model, config)
            trained = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
            optimizer = torch.optim.AdamW(trained, lr=0.01)
            for step in range(3):
                if model is not models.whole and step == 2:
                    assert server.request("DELETE", "/api/models/trunk").status == 200
                wrapped(models.ids, labels=models.ids, use_cache=False).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            results.append([parameter.detach() for parameter in trained])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        # Forwards and backwards; the rest are adapters: a description, and tensors three times; both again once.
        traffic = sessions_of(server)
        assert traffic["steps"] == 6
        assert traffic["refused"] == {"unknown_adapter": 1}


@pytest.fixture
def zaya(tmp_path: Path) -> Iterator[Path]:
    """Install a family of whose models a router's result crosses, too; yields a small checkpoint."""
    if "zaya" not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no zaya")
    source = """
from splitlearn_core import ModelFamily, hookimpl


@hookimpl
def splitlearn_model_families():
    return [
        ModelFamily(
            model_type="zaya",
            architecture="ZayaForCausalLM",
            skip_outside_bottom=("input_hidden_states_scale", "input_hidden_states_bias"),
            layers_return_tuple=True,
            crossing={"prev_router_hidden_states": ("batch", "sequence", "router_hidden_size")},
            layer_results=("prev_router_hidden_states",),
            transformers_tables=True,
            measured_cache=True,
            uniform_layers=False,
            config_defaults={"residual_in_fp32": True, "tie_word_embeddings": True},
        )
    ]
"""
    write_plugin(tmp_path / "site", "zaya", source)
    model = tiny_model("zaya", num_experts=4, moe_intermediate_size=16, router_hidden_size=16)
    yield write_checkpoint(tmp_path / "zaya", model)
    sys.modules.pop("splitlearn_zaya", None)


@pytest.mark.parametrize("host", ["inline", "process"])
def test_more_than_hidden_states_crosses(zaya: Path, host: str) -> None:
    """The text is equal to the last bit, and so are gradients of the bottom, from a trunk here or in a process."""
    if host == "process" and not sys.platform.startswith("linux"):
        pytest.skip("a process is forked")
    whole = AutoModelForCausalLM.from_pretrained(zaya).eval()
    ends = load_split_model("zaya", (2, 4), str(zaya), parts=("bottom", "top"))
    fields: dict[str, Any] = {"model_type": "zaya", "model_path": str(zaya), "split_points": (2, 4)}
    ids = torch.randint(3, 100, (2, 6), generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    with StatusServer([ModelConfig(model_id="trunk", component="trunk", host=host, **fields)]) as server:
        remote = connect(f"{server.url}/trunk")
        split = SplitCausalLM(ends.bottom, remote, ends.top)
        assert torch.equal(split.generate(ids, **options), whole.generate(ids, **options))
        for model in (whole, split):
            model(ids, labels=ids, use_cache=False).loss.backward()
        remote.close()
    own, expected = (dict(model.named_parameters()) for model in (ends.bottom, whole))
    compared = [name for name in own if ".layers." in name and own[name].grad is not None]
    assert len(compared) > 5
    assert all(torch.equal(own[name].grad, expected[name].grad) for name in compared)
