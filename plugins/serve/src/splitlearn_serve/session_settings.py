"""The limits of sessions, as the configuration file and the command line give them."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from splitlearn_core import ConfigurationError
from splitlearn_core.extension import examine, show, unknown_name
from splitlearn_serve.tokens import client_token

if TYPE_CHECKING:
    from splitlearn_core.extension import Endpoint, SessionLimits

_MEGABYTE = 2**20
_COUNTS = ("max_sessions", "max_sessions_per_owner", "max_tokens", "training_steps", "training_tokens")
_TIMEOUT, _TRAINING = "session_timeout", "training"
#: Settings in megabytes -> the limits in bytes.
_MEMORY = {
    "cache_memory": "cache_bytes",
    "adapter_memory": "adapter_bytes",
    "all_adapter_memory": "all_adapter_bytes",
}
#: The servers that outputs may be sent on to, and files with the token and the certificates for them.
_NEXT, _NEXT_FILES = "next", ("next_token_file", "next_ca_file")
_SETTINGS = (*_COUNTS, _TIMEOUT, *_MEMORY, _TRAINING, _NEXT, *_NEXT_FILES)
_MOST = 10**9
#: Seconds for a connection to a next server: those who wait for it can do without.
_CONNECT_TIMEOUT = 5.0


def session_problems(settings: Mapping[str, Any]) -> list[str]:
    """Return the problems of the table ``sessions`` of a configuration file."""
    problems = [unknown_name(name, _SETTINGS, "setting") for name in settings if name not in _SETTINGS]
    for name in _COUNTS:
        value = settings.get(name, 1)
        if type(value) is not int or not 1 <= value <= _MOST:
            problems.append(f"{name}: {show(value)} is not a whole number from 1")
    timeout = _seconds(settings.get(_TIMEOUT, 1))
    if not 0 < timeout < math.inf:
        problems.append(f"{_TIMEOUT}: {show(settings[_TIMEOUT])} is not a number of seconds or a duration such as 10m")
    for name in _MEMORY:
        memory = settings.get(name, 1)
        if isinstance(memory, bool) or not isinstance(memory, int | float) or not 0 < memory < _MOST:
            problems.append(f"{name}: {show(memory)} is not a number of megabytes")
    if not isinstance(settings.get(_TRAINING, True), bool):
        problems.append(f"{_TRAINING}: {show(settings[_TRAINING])} is neither true nor false")
    urls = settings.get(_NEXT) or []
    if not isinstance(urls, list | tuple) or not all(isinstance(url, str) for url in urls):
        problems.append(f"{_NEXT}: {show(urls)} is not a list of URLs")
    for name in _NEXT_FILES:
        if not isinstance(settings.get(name, ""), str | os.PathLike):
            problems.append(f"{name}: {show(settings[name])} is not the path of a file")
        elif name in settings and not urls:
            problems.append(f"{name}: there is no URL in {_NEXT}")
    return problems


def next_endpoints(settings: Mapping[str, Any]) -> list[Endpoint]:
    """Return the servers that outputs may be sent on to.

    Raises:
        MissingFileError: There is no such token file.
        ConfigurationError: An address, the token file or the certificates cannot be used.
    """
    from splitlearn_core.extension import Endpoint

    urls = settings.get(_NEXT) or []
    token_file, ca_file = (settings.get(name) for name in _NEXT_FILES)
    # The token in SPLITLEARN_TOKEN is for those who use this server.
    token = None if token_file is None else client_token(token_file)
    endpoints = [
        Endpoint(url, token, None if ca_file is None else os.fspath(ca_file), connect_timeout=_CONNECT_TIMEOUT)
        for url in dict.fromkeys(urls)
    ]
    for endpoint in endpoints:
        endpoint.check()
    return endpoints


def session_limits(settings: Mapping[str, Any]) -> SessionLimits:
    """Return the limits that the settings define.

    Raises:
        ConfigurationError: They are not valid; all problems are listed.
    """
    from splitlearn_core.extension import SessionLimits

    problems = session_problems(settings)
    if problems:
        raise ConfigurationError(
            "the limits of sessions are invalid:\n  " + "\n  ".join(problems), hint=f"there are {', '.join(_SETTINGS)}"
        )
    limits: dict[str, Any] = {name: settings[name] for name in _COUNTS if name in settings}
    if "max_sessions" in limits:
        # Without a limit for each owner, one owner may have all sessions.
        limits.setdefault("max_sessions_per_owner", limits["max_sessions"])
    if _TIMEOUT in settings:
        limits["idle_timeout"] = _seconds(settings[_TIMEOUT])
    limits.update({limit: int(settings[name] * _MEGABYTE) for name, limit in _MEMORY.items() if name in settings})
    if _TRAINING in settings:
        limits["training"] = settings[_TRAINING]
    return SessionLimits(**limits)


def _seconds(value: Any) -> float:
    """Parse a duration as in ``keep_alive``; NaN if it is invalid."""
    values, problems = examine({"keep_alive": value})
    faulty = value is None or any(problem.startswith("keep_alive:") for problem in problems)
    return math.nan if faulty else float(values["keep_alive"])
