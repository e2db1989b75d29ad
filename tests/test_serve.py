"""``splitlearn serve`` and ``splitlearn ps`` from outside: real processes, their signals, streams and answers."""

from __future__ import annotations

import functools
import http.server
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from splitlearn_core.manager.config import dump_yaml
from support.hub import LoopbackHub
from support.warm import WarmInterpreter

SCRIPT = Path(sys.executable).with_name("splitlearn")
SECRET = "hf_VerySecretToken"

Cli = Callable[..., CompletedProcess[str]]


class Process:
    """A running ``splitlearn serve``, and what it has said on stderr so far.

    Its first argument is the interpreter: that of this environment, or a warm one, which has imported torch already.
    """

    def __init__(self, interpreter: object, *arguments: object, **environment: str) -> None:
        self._process = subprocess.Popen(
            [str(part) for part in (interpreter, SCRIPT, "serve", *arguments)],
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.log = ""

    @functools.cached_property
    def url(self) -> str:
        """Where it serves, once it does."""
        return self.until(r"Serving at (http://\S+)")[1]

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def until(self, pattern: str) -> re.Match[str]:
        """Read on until something was said."""
        assert self._process.stderr is not None
        while (found := re.search(pattern, self.log)) is None:
            line = self._process.stderr.readline()
            assert line, self.log
            self.log += line
        return found

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            return json.loads(answer.read())

    def send(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        request = urllib.request.Request(
            self.url + path, None if body is None else json.dumps(body).encode(), method=method
        )
        request.add_header("Content-Type", "application/json")
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.loads(error.read())

    def end(self, number: signal.Signals = signal.SIGTERM) -> tuple[int, str]:
        """Send a signal, and return the exit code and what was printed."""
        self._process.send_signal(number)
        out, err = self._process.communicate(timeout=60)
        self.log += err
        return self._process.returncode, out

    def kill(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.communicate()


@pytest.fixture
def serve(tmp_path: Path, warm: WarmInterpreter) -> Iterator[Callable[..., Process]]:
    """Return a function that serves some models on a free port, for as long as the test runs at most.

    It does so in a warm interpreter, unless the test asks for a cold one: where the process itself is its subject.
    """
    running: list[Process] = []

    def serve(
        *models: dict[str, Any], cold: bool = False, starting: bool = False, environment: Any = None, **tables: Any
    ) -> Process:
        config = write(tmp_path, *models, **tables)
        interpreter = sys.executable if cold else warm.path
        running.append(Process(interpreter, "--config", config, "--port", 0, **(environment or {})))
        if not starting:
            running[-1].until("Serving at ")
        return running[-1]

    yield serve
    for process in running:
        process.kill()


def write(folder: Path, *models: dict[str, Any], **tables: Any) -> Path:
    path = folder / "models.yaml"
    path.write_text(dump_yaml({**tables, "models": list(models)}))
    return path


def component(model_id: str, path: Path | str, part: str, **values: Any) -> dict[str, Any]:
    return {
        "model_id": model_id, "model_type": "qwen2", "model_path": str(path), "component": part,
        "split_points": [2, 4], **values,
    }  # fmt: skip


def test_a_life(serve: Callable[..., Process], cli: Cli, sharded: Path) -> None:
    """It loads what the file says, shows what fails, unloads and loads over HTTP, and ends with 0."""
    process = serve(
        component("bottom", sharded, "bottom", required=True, warmup=True),
        component("trunk", sharded, "trunk", keep_alive="10m"),
        component("lost", "./nowhere", "top"),
        cold=True,
    )
    for said in ("bottom .*-> ready", "trunk .*-> ready", "lost .*-> failed"):
        process.until(said)

    table = cli("ps", "--url", process.url)
    rows = {line.split()[0]: line for line in table.stdout.splitlines()}
    assert (table.returncode, table.stderr) == (0, "")
    assert list(rows) == ["model", "bottom", "lost", "trunk"]
    assert re.search(r"ready +- +- +[\d.]+ KiB +0 +-", rows["bottom"])
    assert "failed" in rows["lost"]
    assert "there is no directory ./nowhere" in rows["lost"]
    assert re.search(r"in \d+ s", rows["trunk"])
    data = json.loads(cli("ps", "--url", process.url, "--json").stdout)
    assert {model["model_id"]: model["status"] for model in data["models"]} == {
        "bottom": "ready", "trunk": "ready", "lost": "failed"
    }  # fmt: skip

    assert process.get("/health/ready")["ready"] is True
    status, report = process.send("DELETE", "/api/models/trunk")
    assert (status, report["released"]["mapped"] > 0) == (200, True)
    assert "not loaded" in cli("ps", "--url", process.url).stdout
    status, info = process.send("POST", "/api/models/trunk/load?wait=true")
    assert (status, info["status"]) == (200, "ready")
    status, info = process.send("POST", "/api/models?wait=true", component("top", sharded, "top"))
    assert (status, info["status"]) == (200, "ready")

    code, out = process.end()
    assert (code, out) == (0, "")
    assert "Traceback" not in process.log
    assert process.log.rstrip().endswith("Closed")


def test_an_interrupt_ends_it_too(serve: Callable[..., Process]) -> None:
    """Control-C is no failure; without models there is nothing to load."""
    process = serve()

    assert process.get("/api/models")["models"] == []
    assert process.end(signal.SIGINT) == (0, "")
    assert "Traceback" not in process.log


def test_a_load_that_hangs_holds_nothing_up(
    serve: Callable[..., Process], cli: Cli, hub: LoopbackHub, sharded: Path
) -> None:
    """With a download that stands still, everything else is answered, and the end comes within its limit."""
    hub.add_repo("own/slow", sharded)
    shard = sorted(path.name for path in sharded.glob("*.safetensors"))[0]
    with hub.hold(shard, after=100) as held:
        process = serve(
            component("slow", "own/slow", "bottom", required=True),
            component("trunk", sharded, "trunk"),
            manager={"close_timeout": 2, "cancel_grace": 0.5},
        )
        process.until("trunk .*-> ready")
        assert held.reached.wait(60)

        with pytest.raises(urllib.error.HTTPError) as unready:
            process.get("/health/ready")
        with unready.value as error:
            assert (error.code, list(json.loads(error.read())["missing"])) == (503, ["slow"])
        assert process.get("/health/live")["live"] is True
        # What a worker reports is looked at ten times a second; each of these takes a process.
        tables = (cli("ps", "--url", process.url).stdout for _ in range(20))
        assert any(re.search(r"slow +planning +planning", table) for table in tables)

        begun = time.monotonic()
        assert process.end()[0] == 0
        assert time.monotonic() - begun < 8
        assert "%|" not in process.log  # no bar of a download


#: Makes an import stand still that swallows whatever is raised in it, as imports of others do.
STANDING = """
import signal, sys

class Stand:
    def find_spec(self, name, path=None, target=None):
        if name == {name!r}:
            print("importing", name, file=sys.stderr, flush=True)
            while True:
                try:
                    signal.pause()
                except BaseException:
                    pass

sys.meta_path.insert(0, Stand())
"""


class TestSignals:
    @pytest.mark.parametrize(
        ("name", "number"),
        [("uvicorn", signal.SIGTERM), ("torch", signal.SIGINT), ("splitlearn_qwen2", signal.SIGTERM)],
    )
    def test_while_it_imports(
        self, serve: Callable[..., Process], sharded: Path, tmp_path: Path, name: str, number: signal.Signals
    ) -> None:
        """Whatever is being imported, the end is an end, and no failure."""
        (tmp_path / "sitecustomize.py").write_text(STANDING.format(name=name))
        process = serve(
            component("trunk", sharded, "trunk"), cold=True, starting=True, environment={"PYTHONPATH": str(tmp_path)}
        )
        process.until(f"importing {name}")

        assert process.end(number) == (0, "")
        assert "Traceback" not in process.log
        assert f"Ended by {number.name}" in process.log

    def test_while_it_reads_its_file(self, tmp_path: Path) -> None:
        """Before anything of a model is imported."""
        os.mkfifo(tmp_path / "models.yaml")
        process = Process(sys.executable, "--config", tmp_path / "models.yaml", "--port", 0)
        try:
            with (tmp_path / "models.yaml").open("w"):  # which waits until it is opened for reading
                assert process.end() == (0, "")
        finally:
            process.kill()
        assert "Traceback" not in process.log

    def test_while_a_model_loads(self, serve: Callable[..., Process], hub: LoopbackHub, sharded: Path) -> None:
        """As soon as a load has begun, and while a client waits for it and another one watches."""
        hub.add_repo("own/slow", sharded)
        with hub.hold("model.safetensors.index.json", after=10) as held:
            process = serve(component("slow", "own/slow", "bottom"), manager={"close_timeout": 2, "cancel_grace": 0.5})
            assert held.reached.wait(120)
            with (
                socket.create_connection(("127.0.0.1", process.port), timeout=60) as watcher,
                socket.create_connection(("127.0.0.1", process.port), timeout=60) as waiter,
            ):
                watcher.sendall(b"GET /api/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
                assert b"snapshot" in watcher.recv(65536) + watcher.recv(65536)
                waiter.sendall(b"POST /api/models/slow/reload?wait=true HTTP/1.1\r\nHost: localhost\r\n\r\n")

                assert process.end()[0] == 0

        assert "Traceback" not in process.log
        assert process.log.rstrip().endswith("Closed")

    def test_with_clients_of_every_kind(self, serve: Callable[..., Process]) -> None:
        """Silent, half a request, half a body, watching without reading: none of them makes the end a failure."""
        process = serve()
        head = b"POST /api/models HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        with ExitStack() as stack:
            for said in (
                b"",
                b"GET / HTTP/1.1\r\nX: ",
                head + b"Content-Length: 9\r\n\r\n{",
                head + b"Content-Length: 9999999\r\n\r\n{",
                b"GET /api/events HTTP/1.1\r\nHost: localhost\r\n\r\n",
                b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 1000,
            ):
                client = stack.enter_context(socket.create_connection(("127.0.0.1", process.port), timeout=60))
                client.sendall(said)
            assert process.get("/health/live")["live"] is True

            assert process.end() == (0, "")
        assert "Traceback" not in process.log
        assert "ERROR" not in process.log

    def test_twice(self, serve: Callable[..., Process], hub: LoopbackHub, sharded: Path) -> None:
        """The second one does not wait for what the first one waits for, and leaves no traceback either."""
        hub.add_repo("own/slow", sharded)
        with hub.hold("config.json", after=10) as held:
            process = serve(
                component("slow", "own/slow", "bottom"),
                manager={"close_timeout": 600, "cancel_grace": 600},
            )
            assert held.reached.wait(120)
            os.kill(process.pid, signal.SIGTERM)
            process.until("Got SIGTERM")

            code, _ = process.end()

        assert code in (0, -signal.SIGTERM)
        assert "Traceback" not in process.log


def test_more_connections_than_descriptors(serve: Callable[..., Process]) -> None:
    """Health is answered while hundreds of connections say nothing and no descriptor is left; the log stays short."""
    process = serve(cold=True)
    taken = len(list(Path(f"/proc/{process.pid}/fd").iterdir()))
    # Fewer than it has counted on, as if loads had taken the others.
    resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (taken + 20, taken + 20))
    with ExitStack() as stack:
        for _ in range(300):
            client = stack.enter_context(socket.create_connection(("127.0.0.1", process.port), timeout=60))
            client.sendall(b"GET / HTTP/1.1\r\nX: ")

        for _ in range(3):
            assert process.get("/health/live")["live"] is True

    assert process.end() == (0, "")
    assert "Traceback" not in process.log
    assert len(process.log) < 2000
    assert "No connection can be accepted (Too many open files)" in process.log


class TestTokens:
    @pytest.mark.parametrize("kind", ["family", "whole"])
    def test_requests_have_none(
        self, serve: Callable[..., Process], hub: LoopbackHub, sharded: Path, tmp_path: Path, kind: str
    ) -> None:
        """A load over HTTP sends no token of the server's user, from a variable or stored; models of the file do."""
        for name in ("filed", "private"):
            hub.add_repo(f"own/{name}", sharded, private=True, token=SECRET)
        hub.add_repo("own/public", sharded)
        make: Callable[[str, str], dict[str, Any]] = whole
        if kind == "family":
            make = functools.partial(component, part="trunk")
        else:
            (tmp_path / "home").mkdir(exist_ok=True)
            (tmp_path / "home" / "token").write_text(SECRET)
        process = serve(make("filed", "own/filed"), environment={"HF_TOKEN": SECRET} if kind == "family" else {})
        process.until("filed .*-> ready")

        private, refusal = process.send("POST", "/api/models?wait=true", make("private", "own/private"))
        public, _ = process.send("POST", "/api/models?wait=true", make("public", "own/public"))
        assert process.send("DELETE", "/api/models/filed")[0] == 200
        again, _ = process.send("POST", "/api/models/filed/load?wait=true")

        assert (private, public, again) == (422, 200, 200)
        assert SECRET not in json.dumps(refusal)
        asked = [request for request in hub.requests if request.repo in ("own/private", "own/public")]
        assert {request.authorization for request in asked} == {None}
        assert len({request.filename for request in asked}) > 2

    def test_the_file_may_give_them_one(self, serve: Callable[..., Process], hub: LoopbackHub, sharded: Path) -> None:
        """The server's own, say; it is not shown."""
        hub.add_repo("own/private", sharded, private=True, token=SECRET)
        process = serve(http={"token": True}, environment={"HF_TOKEN": SECRET})

        status, info = process.send("POST", "/api/models?wait=true", component("trunk", "own/private", "trunk"))

        assert (status, info["status"]) == (200, "ready")
        shown = json.dumps([info, process.get("/api/models"), process.get("/api/models/trunk/events")])
        process.end()
        assert SECRET not in shown + process.log


def whole(model_id: str, path: str) -> dict[str, Any]:
    return {"model_id": model_id, "model_type": "huggingface", "model_path": path}


def test_a_folder_in_the_working_directory_is_not_the_hubs(
    serve: Callable[..., Process], hub: LoopbackHub, single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name in a request means the Hub's repository, even if the server's working directory has such a folder."""
    (tmp_path / "here" / "own" / "model").mkdir(parents=True)
    (tmp_path / "here" / "own" / "model" / "my-private-file.txt").touch()
    monkeypatch.chdir(tmp_path / "here")
    process = serve()

    status, refusal = process.send("POST", "/api/models?wait=true", component("x", "own/model", "trunk"))
    assert (status, refusal["error"]["type"]) == (422, "MissingFileError")
    assert "my-private-file" not in json.dumps(refusal)
    hub.add_repo("own/model", single)
    assert process.send("POST", "/api/models?wait=true", component("y", "own/model", "trunk"))[0] == 200


def test_five_mistakes(cli: Cli, tmp_path: Path) -> None:
    """All of them are listed at once, with their places, before anything is loaded or served."""
    path = write(
        tmp_path,
        component("same", "x", "trunk"),
        component("same", "x", "middle", split_points=[4, 2], device=7, colour="red"),
    )

    result = cli("serve", "--config", path)

    assert (result.returncode, result.stdout) == (1, "")
    assert "Traceback" not in result.stderr
    for place in ("component", "split_points", "device", "colour", "model_id"):
        assert f"models[1].{place}: " in result.stderr
    assert "hint: " in result.stderr


@pytest.mark.parametrize(
    ("manager", "said"),
    [
        ({"max_modles": 3}, "did you mean 'max_models'?"),
        ({"max_models": 0}, "max_models"),
        ({"required": 7}, "required"),
        ({"keep_alive": "soon"}, "keep_alive"),
        ({"loader": "mine"}, "loader"),
    ],
)
def test_settings_of_the_manager(cli: Cli, tmp_path: Path, manager: dict[str, Any], said: str) -> None:
    """An unknown or invalid setting is reported before anything is imported."""
    result = cli("serve", "--config", write(tmp_path, manager=manager))

    assert (result.returncode, result.stdout) == (1, "")
    assert said in result.stderr
    assert "Traceback" not in result.stderr


def test_no_file(cli: Cli, tmp_path: Path) -> None:
    """A file that is not there is an error, not a traceback."""
    result = cli("serve", "--config", tmp_path / "none.yaml")

    assert (result.returncode, result.stdout) == (1, "")
    assert "none.yaml" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--config",),
        ("--config", "x", "--port", "-1"),
        ("--config", "x", "--port", "99999"),
        ("--config", "x", "--host", "0.0.0.0"),
        ("--config", "x", "--host", "::"),
        ("--config", "x", "--nonsense"),
    ],
    ids=" ".join,
)
def test_usage(cli: Cli, arguments: tuple[str, ...]) -> None:
    """Wrong usage is 2; so is an address that others can reach without --allow-remote."""
    result = cli("serve", *arguments)

    assert (result.returncode, result.stdout) == (2, "")
    assert "--allow-remote" in result.stderr or "--host" not in arguments
    assert "Traceback" not in result.stderr


def test_an_address_that_is_not_ours(cli: Cli, tmp_path: Path) -> None:
    """The address of another machine, and a name that is none."""
    for host in ("192.0.2.1", "no.such.name.invalid"):
        result = cli("serve", "--config", write(tmp_path), "--host", host, "--allow-remote")
        assert (result.returncode, result.stdout) == (1, "")
        assert host in result.stderr
        assert "Traceback" not in result.stderr


def test_a_port_that_is_taken(serve: Callable[..., Process], cli: Cli, tmp_path: Path) -> None:
    """The second one says so at once, and the first one does not notice."""
    process = serve()

    result = cli("serve", "--config", write(tmp_path), "--port", process.url.rpartition(":")[2])

    assert (result.returncode, result.stdout) == (1, "")
    assert "in use" in result.stderr
    assert "--port" in result.stderr
    assert process.get("/health/live")["live"] is True


def test_the_token_is_nowhere(serve: Callable[..., Process], cli: Cli, sharded: Path) -> None:
    """Neither in an answer nor in the log, whether the load fails or not."""
    process = serve(
        component("trunk", sharded, "trunk", token=SECRET),
        component("lost", "nobody/nothing", "trunk", token=SECRET, local_files_only=True),
    )
    process.until("trunk .*-> ready")
    process.until("lost .*-> failed")

    seen = [json.dumps(process.get(path)) for path in ("/api/models", "/api/models/lost", "/api/models/lost/events")]
    seen.append(cli("ps", "--url", process.url, "--json").stdout)
    seen.append(json.dumps(process.send("POST", "/api/models", component("x", "y", "trunk", token=SECRET))))
    process.end()
    assert SECRET not in "".join([*seen, process.log])


def test_help_is_light(process: Cli) -> None:
    """Neither torch nor the server's packages are imported to explain the commands, nor for `ps` itself."""
    code = (
        "import sys; from splitlearn_core.cli.main import cli\n"
        "try:\n    cli.main(sys.argv[1:], standalone_mode=False)\nexcept Exception as error:\n    print(error)\n"
        "heavy = {'torch', 'transformers', 'starlette', 'uvicorn', 'prometheus_client'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    for arguments in (("serve", "--help"), ("ps", "--help"), ("ps", "--url", "http://127.0.0.1:9")):
        result = process("-c", code, *arguments)
        assert (result.returncode, result.stderr) == (0, "[]\n")


def test_nothing_is_imported_once_it_serves(process: Cli, sharded: Path) -> None:
    """After `preload`, loading a component, warming it up included, imports nothing of torch or transformers."""
    code = (
        "import sys\n"
        "from splitlearn_core.manager.config import ModelConfig\n"
        "from splitlearn_core import preload\n"
        "from splitlearn_core.manager.loaders.loader import ModelLoader\n"
        "assert preload({'qwen2'}) == {}\n"
        "before = set(sys.modules)\n"
        "for part in ('bottom', 'trunk', 'top'):\n"
        "    ModelLoader.load_from_config(ModelConfig(model_id=part, model_type='qwen2', model_path=sys.argv[1],\n"
        "        component=part, split_points=(2, 4), warmup=True))\n"
        "print(sorted(name for name in set(sys.modules) - before if name.split('.')[0] in\n"
        "    ('torch', 'transformers', 'splitlearn_core', 'numpy', 'safetensors', 'huggingface_hub')))"
    )
    result = process("-c", code, sharded)

    assert (result.returncode, result.stdout) == (0, "[]\n"), result.stderr


def test_preload_survives_a_broken_plugin(warm_process: Cli, tmp_path: Path) -> None:
    """The other families are imported, and the unusable one is reported."""
    from splitlearn_core.testing.installing import write_plugin

    folder = write_plugin(tmp_path / "plugins", "broken", "raise RuntimeError('no')\n")
    code = (
        "from splitlearn_core import preload\n"
        "failures = preload({'broken', 'nonsense', 'pytorch'})\n"
        "print({name: type(error).__name__ for name, error in sorted(failures.items())})"
    )

    result = warm_process("-c", code, PYTHONPATH=str(folder), SPLITLEARN_DISABLE_PLUGINS="splitlearn-auto")

    assert result.stdout == "{'broken': 'BrokenPluginError', 'nonsense': 'UnknownModelTypeError'}\n", result.stderr


class Stranger(http.server.BaseHTTPRequestHandler):
    """A server that is none of ours; the first part of the path says what it does wrong."""

    def do_GET(self) -> None:
        kind = self.path.split("/")[1]
        if kind == "redirect":
            self.send_response(302)
            self.send_header("Location", "/html/api/models")
            self.end_headers()
            return
        status, body = {
            "html": (200, b"<html>"),
            "list": (200, b"[]"),
            "other": (200, b'{"models": 7}'),
            "lost": (404, b"gone"),
        }.get(kind, (500, b"\x1b[31mred"))
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture(scope="module")
def stranger() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Stranger) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


class TestPs:
    def test_no_server_answers(self, cli: Cli) -> None:
        """The address and the way out, and exit code 1."""
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]

        result = cli("ps", "--url", f"http://127.0.0.1:{port}")

        assert (result.returncode, result.stdout) == (1, "")
        assert f"nothing answers at http://127.0.0.1:{port}" in result.stderr
        assert "splitlearn serve" in result.stderr
        assert "Traceback" not in result.stderr

    @pytest.mark.parametrize(
        "url", ["ftp://127.0.0.1/", "file:///etc/passwd", "127.0.0.1:8710", "http://", "http://[", ""]
    )
    def test_no_url(self, cli: Cli, url: str) -> None:
        """Only http and https, and only valid addresses."""
        result = cli("ps", "--url", url)

        assert (result.returncode, result.stdout) == (2, "")
        assert "'--url'" in result.stderr
        assert "Traceback" not in result.stderr

    @pytest.mark.parametrize("kind", ["html", "list", "other", "lost", "redirect", "broken"])
    def test_somebody_else_answers(self, cli: Cli, stranger: str, kind: str) -> None:
        """What is no server of ours is called that, and it cannot colour the terminal."""
        result = cli("ps", "--url", f"{stranger}/{kind}")

        assert (result.returncode, result.stdout) == (1, "")
        assert "is not a `splitlearn serve`" in result.stderr
        assert "\x1b" not in result.stderr
        assert "Traceback" not in result.stderr

    def test_no_proxy_is_used_for_loopback(self, serve: Callable[..., Process], cli: Cli) -> None:
        """Even where every way out goes through one that is dead."""
        process = serve()

        result = cli("ps", "--url", process.url, NO_PROXY="", http_proxy="http://127.0.0.1:9")

        assert (result.returncode, result.stdout) == (0, "no model is configured or loaded\n")
