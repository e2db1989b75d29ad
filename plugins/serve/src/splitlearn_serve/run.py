"""Run a server: from a configuration file to a process that answers until a signal ends it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import logging
import math
import os
import signal
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from splitlearn_core import AsyncModelManager, ConfigurationError, InternalError, ModelConfig, preload
from splitlearn_core.extension import (
    ConfigFile,
    LoopLag,
    examine,
    limit_problems,
    read_config_file,
    show,
    unknown_name,
)
from splitlearn_serve.app import build_app
from splitlearn_serve.connections import Pool, Server, uvicorn_config
from splitlearn_serve.control import Control
from splitlearn_serve.guard import HostRule
from splitlearn_serve.permissions import RequestRules, request_problems
from splitlearn_serve.signals import ENDING

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Address:
    """The address to serve at, and the names of the server."""

    host: str = "127.0.0.1"
    #: 0 for any free one.
    port: int = 8710
    #: Host headers that name this server, in addition to addresses and the names of loopback.
    names: tuple[str, ...] = ()

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it."""
        return all(ipaddress.ip_address(sockaddr[0]).is_loopback for _, sockaddr in _resolve(self.host, self.port))


def run_server(config_file: str | os.PathLike[str], address: Address, announce: Callable[[str], None]) -> None:
    """Serve the models of a configuration file until SIGINT or SIGTERM; a second one ends at once.

    Everything is validated before the slow steps. torch, transformers and the needed architectures are
    imported before the event loop starts, so that no load blocks it.

    Args:
        config_file: The models, and the settings of the manager.
        address: The address to serve at.
        announce: Called with the URL once the server answers.

    Raises:
        ConfigurationError: The file or the address is invalid.
        MissingFileError: There is no such file.
    """
    configuration = read_config_file(config_file, setting_problems, request_problems)
    manager = make_manager(configuration)
    rules = RequestRules.of(configuration.http, configuration.models)
    with listening(address) as listener:
        preload({config.model_type for config in configuration.models}, serving=True)
        asyncio.run(_serve(manager, configuration.models, rules, address, listener, announce))


@contextlib.contextmanager
def listening(address: Address) -> Iterator[socket.socket]:
    """Listen at an address, so that a second process fails at once.

    Raises:
        ConfigurationError: The address is in use, or not one of this machine.
    """
    family, sockaddr = _resolve(address.host, address.port)[0]
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        # Connections in TIME_WAIT of an ended process do not block the address; a listening process does.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(sockaddr)
            listener.listen(128)
        except OSError as error:
            in_use = error.errno == errno.EADDRINUSE
            raise ConfigurationError(
                f"cannot listen at {_url(address.host, address.port)}: {os.strerror(error.errno or 0)}",
                hint="another process serves there (`splitlearn ps` shows what); end it, or choose another --port"
                if in_use
                else "choose an address of this machine and a port that you may use",
            ) from error
        yield listener
    finally:
        listener.close()


async def _serve(
    manager: AsyncModelManager,
    models: Iterable[ModelConfig],
    rules: RequestRules,
    address: Address,
    listener: socket.socket,
    announce: Callable[[str], None],
) -> None:
    async with manager:
        control, lag, pool = Control(manager, models, rules), LoopLag(), Pool()
        server = Server(uvicorn_config(build_app(control, _hosts(address), lag, lambda: pool.is_full)), pool)
        with _stopping(control.closing):
            # Before the server accepts, so that no probe sees a manager without required models.
            control.load_configured()
            serving = asyncio.create_task(server.serve(sockets=[listener]), name="serve")
            measuring = asyncio.create_task(lag.run(), name="measure the loop's lag")
            try:
                await _until(server.answering, serving)
                announce(_url(address.host, listener.getsockname()[1]))
                await _until(control.closing, serving)
                log.info("Closing: no new work is taken, and what is loading is cancelled")
            finally:
                control.closing.set()
                # Event streams show the models being unloaded before the connections end.
                await manager.close()
                await control.end()
                server.should_exit = True
                measuring.cancel()
                await asyncio.gather(serving, measuring, return_exceptions=True)
    log.info("Closed")


async def _until(event: asyncio.Event, serving: asyncio.Task[None]) -> None:
    """Wait for an event; raises the server's error if it ends first."""
    waiting = asyncio.create_task(event.wait())
    try:
        await asyncio.wait({waiting, serving}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiting.cancel()
    if serving.done():
        serving.result()
        raise InternalError("the server ended by itself")


def _hosts(address: Address) -> HostRule:
    """Return the rule for the Host headers that name this server."""
    if address.is_loopback:
        return HostRule.of([address.host, *address.names])
    names = [address.host, *address.names, socket.gethostname(), socket.getfqdn()]
    return HostRule.of(names, any_address=True)


@contextlib.contextmanager
def _stopping(stop: asyncio.Event) -> Iterator[None]:
    """Set an event at the first SIGINT or SIGTERM; a second one has its usual effect."""
    loop = asyncio.get_running_loop()

    def first(number: signal.Signals) -> None:
        # Before the log line: its reader may send the second signal at once.
        for each in ENDING:
            loop.remove_signal_handler(each)
            signal.signal(each, signal.SIG_DFL)
        log.info("Got %s", number.name)
        stop.set()

    for number in ENDING:
        loop.add_signal_handler(number, first, number)
    try:
        yield
    finally:
        for number in ENDING:
            loop.remove_signal_handler(number)


def setting_problems(settings: Mapping[str, Any]) -> list[str]:
    """Return the problems of the table ``manager`` of a configuration file."""
    known = sorted(_settings())
    problems = [unknown_name(name, known, "setting") for name in settings if name not in known]
    required = settings.get("required") or []
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        problems.append(f"required: {show(required)} is not a list of model ids")
    # Parsed as for a model, so that both accept "30m".
    _, model_problems = examine({"keep_alive": settings.get("keep_alive")})
    problems += [problem for problem in model_problems if problem.startswith("keep_alive:")]
    others = {name: value for name, value in settings.items() if name not in ("keep_alive", "required")}
    return problems + limit_problems(others)


def _settings() -> set[str]:
    """Return the arguments of a manager that a file can hold, without those that take objects."""
    return set(AsyncModelManager.__init__.__kwdefaults__ or {}) - {"loader", "resources", "clock"}


def make_manager(configuration: ConfigFile) -> AsyncModelManager:
    """Create the manager that a file describes; it does nothing before its event loop runs.

    Raises:
        ConfigurationError: Unknown settings or invalid values; all are listed.
    """
    settings = dict(configuration.manager)
    problems = setting_problems(settings)
    if problems:
        raise ConfigurationError(
            "the settings of manager cannot be kept:\n  " + "\n  ".join(problems),
            hint="each is documented in splitlearn_core.AsyncModelManager",
        )
    # Health must also miss a required model whose load is refused before it begins.
    required = (config.model_id for config in configuration.models if config.required)
    settings["required"] = [*(settings.get("required") or []), *required]
    parsed, _ = examine({"keep_alive": settings.get("keep_alive")})
    settings["keep_alive"] = None if parsed["keep_alive"] == math.inf else parsed["keep_alive"]
    return AsyncModelManager(**settings)


def _resolve(host: str, port: int) -> Sequence[tuple[socket.AddressFamily, Any]]:
    try:
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise ConfigurationError(
            f"{host!r} is not an address of this machine: {error}", hint="use 127.0.0.1 for this machine alone"
        ) from error
    return [(family, sockaddr) for family, _, _, _, sockaddr in infos]


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
