"""Run a server: from a configuration file to a process that answers until a signal ends it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import ipaddress
import logging
import math
import os
import signal
import socket
import ssl
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from splitlearn_serve.hops import Hops
from splitlearn_serve.permissions import RequestRules, request_problems
from splitlearn_serve.session_settings import next_endpoints, session_limits, session_problems
from splitlearn_serve.sessions import Sessions
from splitlearn_serve.signals import ENDING
from splitlearn_serve.tls import server_context
from splitlearn_serve.tokens import Tokens, read_tokens

if TYPE_CHECKING:
    from splitlearn_core.extension import SessionLimits

log = logging.getLogger(__name__)

#: Calls of one model that may wait, at least: as many as there are sessions by default.
_CALL_QUEUE = 256


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


@dataclass(frozen=True, slots=True)
class Access:
    """Access to the server: tokens and TLS."""

    #: A file of tokens; by default, the one in ``SPLITLEARN_TOKEN``.
    token_file: Path | None = None
    #: The files of the certificate and its key: both, or none for a server without TLS.
    tls_cert: Path | None = None
    tls_key: Path | None = None

    def tls(self) -> ssl.SSLContext | None:
        """Return the TLS context of the server; None without one.

        Raises:
            ConfigurationError: One of the files is missing, or cannot be used.
        """
        if self.tls_cert is None and self.tls_key is None:
            return None
        if self.tls_cert is None or self.tls_key is None:
            raise ConfigurationError(
                "TLS needs two files, and one was given", hint="give both --tls-cert FILE and --tls-key FILE"
            )
        return server_context(self.tls_cert, self.tls_key)


@dataclass(frozen=True, slots=True)
class _Serving:
    """Everything that a server needs to run."""

    manager: AsyncModelManager
    models: Sequence[ModelConfig]
    rules: RequestRules
    address: Address
    listener: socket.socket
    tokens: Tokens
    tls: ssl.SSLContext | None
    limits: SessionLimits
    hops: Hops
    announce: Callable[[str], None] = field(repr=False)


def read_configuration(path: str | os.PathLike[str]) -> ConfigFile:
    """Read a configuration file with all of its tables.

    Raises:
        ConfigurationError: It is invalid; all problems are listed.
        MissingFileError: There is no such file.
    """
    return read_config_file(path, setting_problems, request_problems, session_problems)


def run_server(
    configuration: ConfigFile,
    address: Address,
    announce: Callable[[str], None],
    access: Access | None = None,
    session_settings: Mapping[str, Any] | None = None,
) -> None:
    """Serve the models of a configuration until SIGINT or SIGTERM; a second one ends at once.

    Everything is validated before the slow steps. torch, transformers and the needed architectures are
    imported before the event loop starts, so that no load blocks it.

    Args:
        configuration: The models, and the settings of the manager and of sessions.
        address: The address to serve at.
        announce: Called with the URL once the server answers.
        access: Tokens and TLS.
        session_settings: Limits of sessions that take precedence over those of the configuration.

    Raises:
        ConfigurationError: The configuration, the address, the tokens or the certificate are invalid.
        MissingFileError: A file does not exist.
    """
    access = access or Access()
    settings = {**configuration.sessions, **(session_settings or {})}
    problems = session_problems(settings)
    if problems:
        raise ConfigurationError("the limits of sessions are invalid:\n  " + "\n  ".join(problems))
    manager = make_manager(dataclasses.replace(configuration, sessions=settings))
    rules = RequestRules.of(configuration.http, configuration.models)
    tokens, tls, hops = read_tokens(access.token_file), access.tls(), Hops(next_endpoints(settings))
    with listening(address) as listener:
        if not len(tokens) and not address.is_loopback:
            raise ConfigurationError(
                f"{address.host} can be reached from other machines, and no token is needed to use and change models",
                hint="make one, (umask 077; openssl rand -hex 32 > tokens), and give it at both ends: "
                "--token-file tokens, or SPLITLEARN_TOKEN",
            )
        if len(tokens) and tls is None and not address.is_loopback:
            log.warning("Tokens and hidden states cross the network unencrypted: give --tls-cert and --tls-key")
        log.info("Importing torch and transformers")
        preload({config.model_type for config in configuration.models}, serving=True)
        models = configuration.models
        limits = session_limits(settings)
        asyncio.run(_serve(_Serving(manager, models, rules, address, listener, tokens, tls, limits, hops, announce)))


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


async def _serve(serving: _Serving) -> None:
    address, manager = serving.address, serving.manager
    async with manager:
        control, lag, pool = Control(manager, serving.models, serving.rules), LoopLag(), Pool()
        sessions = Sessions(control, serving.limits, serving.hops)
        app = build_app(control, _hosts(address), lag, lambda: pool.is_full, sessions, serving.tokens)
        server = Server(uvicorn_config(app, serving.limits.max_payload), pool, serving.tls)
        with _stopping(control.closing):
            # Before the server accepts, so that no probe sees a manager without required models.
            control.load_configured()
            answering = asyncio.create_task(server.serve(sockets=[serving.listener]), name="serve")
            measuring = asyncio.create_task(lag.run(), name="measure the loop's lag")
            try:
                await _until(server.answering, answering)
                port = serving.listener.getsockname()[1]
                serving.announce(_url(address.host, port, "http" if serving.tls is None else "https"))
                await _until(control.closing, answering)
                log.info("Closing: no new work is taken, and what is loading is cancelled")
            finally:
                control.closing.set()
                # Their leases would keep the models for as long as a lease may.
                await sessions.close()
                # Event streams show the models being unloaded before the connections end.
                await manager.close()
                await control.end()
                server.should_exit = True
                measuring.cancel()
                await asyncio.gather(answering, measuring, return_exceptions=True)
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
    # One step of each session may wait for its turn.
    settings.setdefault("call_queue", max(_CALL_QUEUE, configuration.sessions.get("max_sessions", _CALL_QUEUE)))
    return AsyncModelManager(**settings)


def _resolve(host: str, port: int) -> Sequence[tuple[socket.AddressFamily, Any]]:
    try:
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise ConfigurationError(
            f"{host!r} is not an address of this machine: {error}", hint="use 127.0.0.1 for this machine alone"
        ) from error
    return [(family, sockaddr) for family, _, _, _, sockaddr in infos]


def _url(host: str, port: int, scheme: str = "http") -> str:
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
