"""Tokens: who may use models and change which are loaded, and the limits of each owner.

A file holds one token per line. A name before it is shown where sessions are counted, and limits may follow it::

    # name: token       limits
    alice: 3f9c0a...    max_sessions=4 max_tokens=4096
    bob:   77aa01...    training training_steps=10000
    5d1e77...

Without the word ``training``, a token is for inference alone.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from splitlearn_core import ConfigurationError, MissingFileError
from splitlearn_core.extension import TOKEN_VARIABLE, reason, unknown_name

if TYPE_CHECKING:
    # It needs torch, which the commands do not import.
    from splitlearn_core.extension import SessionLimits

log = logging.getLogger(__name__)

_LINE = re.compile(r"(?:(?P<name>[A-Za-z0-9_.@-]{1,64}):\s+)?(?P<token>\S+)(?P<limits>(?:\s+\S+)*)")
_COMMENT = re.compile(r"(^|\s)#.*")
_LIMIT = re.compile(r"(?P<name>\w+)=(?P<value>\d{1,9})")
_LIMITS = ("max_sessions", "max_tokens", "training_steps", "training_tokens", "adapter_memory")
_TRAINING = "training"
_MEGABYTE = 2**20
#: A token is sent in a header.
_TOKEN = re.compile(r"[\x21-\x7e]{1,4096}")
#: A token with fewer characters can be guessed.
_SHORT = 16
_FILE_LIMIT = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Owner:
    """The owner of a token; or anyone, if no token is needed."""

    name: str = ""
    #: Maximum number of sessions of one model, and of tokens of a sequence; None for the server's limits.
    max_sessions: int | None = None
    max_tokens: int | None = None
    #: Whether adapters, training mode and gradients are allowed.
    training: bool = True
    #: Backward passes, tokens in them, and megabytes of stored adapters; None for the server's limits.
    training_steps: int | None = None
    training_tokens: int | None = None
    adapter_memory: int | None = None

    def limits(self, limits: SessionLimits) -> SessionLimits:
        """Return the limits of this owner's sessions."""
        memory = None if self.adapter_memory is None else self.adapter_memory * _MEGABYTE
        return replace(
            limits,
            max_sessions_per_owner=_least(self.max_sessions, limits.max_sessions_per_owner),
            max_tokens=_least(self.max_tokens, limits.max_tokens),
            training=self.training and limits.training,
            training_steps=_least(self.training_steps, limits.training_steps),
            training_tokens=_least(self.training_tokens, limits.training_tokens),
            adapter_bytes=_least(memory, limits.adapter_bytes),
        )


def _least(own: int | None, server: Any) -> Any:
    """Return the smaller one of two limits, either of which may be None for no limit."""
    return min((limit for limit in (own, server) if limit is not None), default=None)


ANYONE = Owner()


class Tokens:
    """The tokens that a server accepts; only their hashes are kept.

    Args:
        owners: Token -> its owner. Without any, no token is needed.
    """

    def __init__(self, owners: Mapping[str, Owner] | None = None) -> None:
        self._owners = tuple((_digest(token), owner) for token, owner in (owners or {}).items())

    def __len__(self) -> int:
        return len(self._owners)

    def owner_of(self, authorization: str | None) -> Owner:
        """Return the owner of the token in a header ``Authorization``.

        Raises:
            RequestError: A token is needed, and it is missing or wrong.
        """
        # It imports the server's libraries, which commands that only read a token do not need.
        from splitlearn_serve.answers import RequestError

        if not self._owners:
            return ANYONE
        scheme, _, token = (authorization or "").partition(" ")
        sent_digest, matching_owner = _digest(token.strip()), None
        # All hashes are compared, so that the time reveals nothing about them.
        for digest, owner in self._owners:
            if hmac.compare_digest(digest, sent_digest):
                matching_owner = owner
        if matching_owner is not None and scheme.lower() == "bearer":
            return matching_owner
        raise RequestError(
            401,
            "the token is not one of this server's" if authorization else "this server requires a token",
            hint=f"give it with token=..., --token-file FILE or in {TOKEN_VARIABLE}",
            headers={"WWW-Authenticate": 'Bearer realm="splitlearn"'},
            kind="AccessRefusedError",
        )


def read_tokens(path: str | os.PathLike[str] | None) -> Tokens:
    """Read the tokens of a server: of a file, or else the one in ``SPLITLEARN_TOKEN``.

    Raises:
        MissingFileError: There is no such file.
        ConfigurationError: It cannot be read, or some of its lines are invalid; all are listed.
    """
    if path is not None:
        return Tokens(_parse(Path(path), _read(Path(path))))
    token = os.environ.get(TOKEN_VARIABLE, "").strip()
    if not token:
        return Tokens()
    if not _TOKEN.fullmatch(token):
        raise ConfigurationError(
            f"the token in {TOKEN_VARIABLE} has spaces or other characters that a header cannot hold",
            hint="make one: openssl rand -hex 32",
        )
    return Tokens({token: Owner("token")})


def client_token(path: str | os.PathLike[str] | None) -> str | None:
    """Return the token of a client: the first one of a file, or that in ``SPLITLEARN_TOKEN``; None without any.

    Raises:
        MissingFileError: There is no such file.
        ConfigurationError: It cannot be read, or its lines are invalid.
    """
    if path is None:
        return os.environ.get(TOKEN_VARIABLE, "").strip() or None
    return next(iter(_parse(Path(path), _read(Path(path)))))


def _read(path: Path) -> str:
    try:
        with path.open(encoding="utf-8") as file:
            if os.fstat(file.fileno()).st_mode & stat.S_IROTH:
                log.warning("The tokens in %s can be read by every user of this machine: chmod o-r", path)
            return file.read(_FILE_LIMIT)
    except FileNotFoundError as error:
        raise MissingFileError(
            f"there is no token file {path}",
            hint="name the file with the tokens of the server; for one that has none yet, make one: "
            "(umask 077; openssl rand -hex 32 > tokens)",
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(
            f"the tokens in {path} cannot be read: {reason(error)}", hint="give a text file, with one token per line"
        ) from error


def _parse(path: Path, text: str) -> dict[str, Owner]:
    owners: dict[str, Owner] = {}
    problems = []
    for number, raw in enumerate(text.splitlines(), start=1):
        line = _COMMENT.sub("", raw).strip()
        if not line:
            continue
        match = _LINE.fullmatch(line)
        if match is None or not _TOKEN.fullmatch(match["token"]) or match["token"].endswith(":"):
            problems.append(f"line {number} is not a token, with or without a name before it and limits after it")
            continue
        token, name = match["token"], match["name"] or f"line {number}"
        limits, faults = _parse_limits(match["limits"].split())
        problems += [f"line {number}: {fault}" for fault in faults]
        if token in owners or any(owner.name == name for owner in owners.values()):
            problems.append(f"line {number} repeats the token or the name of an earlier one")
        if len(token) < _SHORT:
            log.warning("The token in line %d of %s is short enough to be guessed", number, path)
        owners[token] = Owner(name, **limits)
    if problems or not owners:
        # Never the line itself: it holds a secret.
        raise ConfigurationError(
            f"the tokens in {path} cannot be used:\n  " + "\n  ".join(problems or ["there is none"]),
            hint="write lines such as `alice: TOKEN max_sessions=4`; make a token: openssl rand -hex 32",
        )
    return owners


def _parse_limits(words: list[str]) -> tuple[dict[str, Any], list[str]]:
    limits: dict[str, Any] = {_TRAINING: _TRAINING in words}
    faults = []
    for word in words:
        match = _LIMIT.fullmatch(word)
        if word == _TRAINING:
            continue
        if match is None or not int(match["value"]):
            faults.append("what follows the token is neither NAME=NUMBER nor `training`")
        elif match["name"] not in _LIMITS:
            faults.append(unknown_name(match["name"], _LIMITS, "limit"))
        else:
            limits[match["name"]] = int(match["value"])
    return limits, faults


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()
