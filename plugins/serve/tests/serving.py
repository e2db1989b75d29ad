"""Status servers on loopback, in a thread or a process, and a loader whose loads go as far as a test says."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import queue
import re
import ssl
import subprocess
import threading
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from shutil import which
from types import TracebackType
from typing import Any, Self, TypeVar

import pytest

from splitlearn_core.extension import SessionLimits
from splitlearn_core.manager.config import ModelConfig
from splitlearn_core.manager.loaders.loadable import MAPPED, LoadedModel, LoadPlan, ReportProgress
from splitlearn_core.manager.loaders.loader import ModelLoader
from splitlearn_core.manager.manager import AsyncModelManager
from splitlearn_core.types import Progress
from splitlearn_serve.app import build_app
from splitlearn_serve.connections import Pool, Server, uvicorn_config
from splitlearn_serve.control import Control
from splitlearn_serve.guard import HostRule
from splitlearn_serve.hops import Hops
from splitlearn_serve.permissions import RequestRules
from splitlearn_serve.run import Address, listening
from splitlearn_serve.sessions import Sessions
from splitlearn_serve.tokens import Tokens

_T = TypeVar("_T")
#: Seconds after which a test has failed rather than been slow.
_LIMIT = 60.0


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class StatusServer:
    """A manager and its server, running while the context lasts."""

    def __init__(
        self,
        configs: Iterable[ModelConfig] = (),
        *,
        hosts: HostRule | None = None,
        http: Mapping[str, Any] | None = None,
        connections: int | None = None,
        limits: SessionLimits | None = None,
        tokens: Tokens | None = None,
        tls: ssl.SSLContext | None = None,
        port: int = 0,
        hops: Hops | None = None,
        **manager: Any,
    ) -> None:
        """Prepare one.

        Args:
            configs: The models that are loaded as it starts.
            hosts: Which Host headers it answers for; by default loopback's.
            http: What requests may load, as in the table ``http`` of a configuration file.
            connections: How many there may be; by default what the process can bear.
            limits: What sessions may take.
            tokens: Those that may use and change models.
            tls: What connections begin with.
            port: Where it listens; 0 for any free one.
            hops: The servers that outputs may be sent on to.
            manager: What the manager is made with.
        """
        self._configs = tuple(configs)
        self._rules = RequestRules.of(http or {}, self._configs)
        self._connections = connections
        self._hosts = hosts or HostRule()
        self._limits, self._tokens, self._tls = limits, tokens, tls
        self._hops = hops
        self._options = manager
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, name="status server")
        self._failure: BaseException | None = None
        self.port = port

    @property
    def url(self) -> str:
        return f"http{'s' * (self._tls is not None)}://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        self._thread.start()
        self._started.wait(_LIMIT)
        if self._failure is not None:
            raise self._failure
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def end(self) -> None:
        """End it as SIGTERM would, and wait until it has."""
        with contextlib.suppress(RuntimeError):  # the loop has ended already
            self._loop.call_soon_threadsafe(self.control.closing.set)
        self._thread.join(_LIMIT)
        if self._thread.is_alive():
            raise AssertionError("the status server did not end")

    def request(self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None) -> Answer:
        """Send a request; a body that is not bytes goes as JSON, and a POST says so even without one."""
        with self.connection() as connection:
            data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
            sent = {"Content-Type": "application/json"} if method == "POST" else {}
            connection.request(method, path, data, {**sent, **(headers or {})})
            answer = connection.getresponse()
            return Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())

    def get(self, path: str) -> Any:
        """Return what a path answers, as plain values."""
        return self.request("GET", path).json

    @contextlib.contextmanager
    def connection(self) -> Iterator[http.client.HTTPConnection]:
        """Open a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=_LIMIT)
        try:
            yield connection
        finally:
            connection.close()

    @property
    def requests(self) -> Collection[object]:
        """The requests that are being answered."""
        return self._server.server_state.tasks

    def run(self, function: Callable[[AsyncModelManager], Awaitable[_T]]) -> _T:
        """Run an asynchronous function of the manager in its loop."""

        async def call() -> _T:
            return await function(self.control.manager)

        return asyncio.run_coroutine_threadsafe(call(), self._loop).result(_LIMIT)

    def wait_until(self, met: Callable[[AsyncModelManager], bool]) -> None:
        """Wait until a condition is met; it is looked at after each change of a model's status."""

        async def wait(manager: AsyncModelManager) -> None:
            events = manager.events()
            while not met(manager):
                await anext(events)

        self.run(wait)

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:  # noqa: BLE001  # raised where the context is entered
            self._failure = error
            self._started.set()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        with listening(Address(port=self.port)) as listener:
            self.port = listener.getsockname()[1]
            async with AsyncModelManager(**self._options) as manager:
                self.control = Control(manager, self._configs, self._rules)
                self.control.load_configured()
                pool = Pool(self._connections)
                self.sessions = Sessions(self.control, self._limits, self._hops)
                app = build_app(
                    self.control,
                    self._hosts,
                    is_full=lambda: pool.is_full,
                    sessions=self.sessions,
                    tokens=self._tokens,
                )
                config = uvicorn_config(app, self.sessions.limits.max_payload)
                self._server = server = Server(config, pool, self._tls)
                serving = asyncio.create_task(server.serve(sockets=[listener]))
                await server.answering.wait()
                self._started.set()
                await self.control.closing.wait()
                await self.sessions.close()
                await manager.close()
                await self.control.end()
                server.should_exit = True
                await serving


def make_certificate(folder: Path, name: str = "server", address: str = "IP:127.0.0.1") -> tuple[Path, Path]:
    """Make a certificate of its own authority for an address, and its key; skips the test where that cannot be done."""
    if which("openssl") is None:
        pytest.skip("openssl is not there to make a certificate")
    cert, key = folder / f"{name}.pem", folder / f"{name}-key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", f"/CN={name}"]
    command += ["-addext", f"subjectAltName={address}", "-keyout", str(key), "-out", str(cert)]
    subprocess.run(command, check=True, capture_output=True)
    return cert, key


class Process:
    """A running ``splitlearn serve``, in an interpreter."""

    def __init__(self, interpreter: str, *arguments: object, **environment: str) -> None:
        self.process = subprocess.Popen(
            [interpreter, "-m", "splitlearn_core", "serve", *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        self.log = ""
        self.url = self.until(r"trunk\d* at (http\S+/trunk\d*)")[1]
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def until(self, pattern: str) -> re.Match[str]:
        assert self.process.stderr is not None
        while (found := re.search(pattern, self.log)) is None:
            line = self.process.stderr.readline()
            assert line, self.log
            self.log += line
        return found

    @property
    def address(self) -> str:
        return self.url.rpartition("/")[0]

    def kill(self) -> None:
        """End it without any notice."""
        self.process.kill()
        self.process.wait(60)
        self._reader.join(60)
        assert self.process.stderr is not None
        self.process.stderr.close()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log += line


async def until_met(met: Callable[[], object]) -> None:
    """Wait for a condition that no event reports."""
    while not met():
        await asyncio.to_thread(threading.Event().wait, 0.002)


class ScriptedLoader(ModelLoader):
    """A loader without files: models that are held stand still until the test lets them go on."""

    def __init__(self, sizes: Mapping[str, int] | None = None) -> None:
        """Make one; models without a size have 1000 bytes."""
        self._sizes = dict(sizes or {})
        self._held: dict[str, queue.SimpleQueue[Progress | Exception | None]] = {}

    def hold(self, *model_ids: str) -> None:
        """Let these stand still when they load."""
        for model_id in model_ids:
            self._held[model_id] = queue.SimpleQueue()

    def advance(self, model_id: str, progress: Progress) -> None:
        """Let a held model come this far."""
        self._held[model_id].put(progress)

    def finish(self, model_id: str) -> None:
        """Let a held model be loaded."""
        self._held[model_id].put(None)

    def fail(self, model_id: str, error: Exception) -> None:
        """Let a held model fail."""
        self._held[model_id].put(error)

    def plan(self, config: ModelConfig, report: ReportProgress) -> LoadPlan:
        """Plan the size that the test has said."""
        size = self._sizes.get(config.model_id, 1000)
        needs = {MAPPED: size, "host": size // 50}
        dtype = "bfloat16" if config.dtype == "auto" else config.dtype
        return LoadPlan(needs, needs, config.model_path or "", dtype, config.device)

    def load(self, config: ModelConfig, plan: LoadPlan, report: ReportProgress) -> LoadedModel:
        """Go as far as the test says."""
        import torch

        script, latest = self._held.get(config.model_id), Progress("building")
        while script is not None:
            # A load that stands still must still hear that it is to stop.
            report(latest)
            with contextlib.suppress(queue.Empty):
                said = script.get(timeout=0.02)
                if said is None:
                    break
                if isinstance(said, Exception):
                    raise said
                latest = said
        return LoadedModel(torch.nn.Linear(1, 1), plan.location, plan.dtype, plan.device)

    def warm_up(self, config: ModelConfig, loaded: LoadedModel, report: ReportProgress) -> None:
        """Do nothing."""
