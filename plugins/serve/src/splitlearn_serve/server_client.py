"""Requests to a running ``splitlearn serve``, for the commands."""

from __future__ import annotations

import json
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

import click

from splitlearn_core import AccessRefusedError, ConfigurationError, SplitLearnError
from splitlearn_core.cli import usage_errors
from splitlearn_core.extension import reason, translate
from splitlearn_serve.tokens import client_token

_TIMEOUT = 10.0
#: Enough for thousands of models.
_ANSWER_LIMIT = 32 * 2**20
_UNAUTHORIZED = 401
#: Requests that hints of the server name -> the commands that send them.
_COMMANDS = {
    "DELETE /api/models/ID?force=true": "`splitlearn unload ID --force`",
    "DELETE /api/models/ID": "`splitlearn unload ID`",
    "POST /api/models/ID/load": "`splitlearn load ID`",
}
_Command = TypeVar("_Command", bound=Callable[..., Any])


class RefusedError(SplitLearnError):
    """The server refuses a request of a command."""

    def __init__(self, message: str, *, hint: str = "", status: int = 0) -> None:
        super().__init__(message, hint=hint)
        self.status = status


def server_options(command: _Command) -> _Command:
    """Add the options that say where the server is, and the token for it."""
    for option in (
        click.option(
            "--ca-file", type=click.Path(path_type=Path), help="Certificates to trust, in place of the system's."
        ),
        click.option(
            "--token-file", type=click.Path(path_type=Path), help="A file with its token; else SPLITLEARN_TOKEN."
        ),
        click.option(
            "--url", default="http://127.0.0.1:8710", show_default=True, callback=_check_url, help="Where it serves."
        ),
    ):
        command = option(command)
    return command


class ServerClient:
    """A running server.

    Args:
        url: Its address.
        token_file: A file whose first token is sent; by default the one in ``SPLITLEARN_TOKEN``, if there is one.
        ca_file: A PEM file of certificates to trust, in place of the system's.

    Raises:
        ConfigurationError: The address is invalid, or the file.
        MissingFileError: There is no such file.
    """

    def __init__(self, url: str, token_file: Path | None = None, ca_file: Path | None = None) -> None:
        self.address = server_address(url)
        self._token = client_token(token_file)
        # No proxy for loopback, which would be the proxy's own. No redirects: the URL is explicit.
        self._opener = urllib.request.OpenerDirector()
        for handler in (
            urllib.request.HTTPHandler(),
            urllib.request.HTTPSHandler(context=_tls(ca_file)),
            urllib.request.HTTPDefaultErrorHandler(),
        ):
            self._opener.add_handler(handler)
        if not _is_loopback(self.address):
            self._opener.add_handler(urllib.request.ProxyHandler())
        self._opener.add_handler(urllib.request.HTTPErrorProcessor())

    def request(self, method: str, path: str, timeout: float = _TIMEOUT) -> dict[str, Any]:
        """Send a request, and return the JSON object that is the answer.

        Raises:
            AccessRefusedError: The token is missing or wrong.
            RefusedError: It refuses for another reason, which is its own message.
            SplitLearnError: Nothing answers there, or not a ``splitlearn serve``.
        """
        headers = {"Accept": "application/json", "Content-Type": "application/json"}
        if self._token is not None:
            headers["Authorization"] = f"Bearer {self._token}"
        data = b"" if method == "POST" else None
        request = urllib.request.Request(self.address + path, data, headers, method=method)  # noqa: S310
        try:
            with self._opener.open(request, timeout=timeout) as answer:
                content = json.loads(answer.read(_ANSWER_LIMIT))
            if not isinstance(content, dict):
                raise TypeError("no object")
        except urllib.error.HTTPError as error:
            raise self._refusal(error) from error
        except (OSError, HTTPException) as error:
            cause = getattr(error, "reason", error)
            if isinstance(cause, ssl.SSLCertVerificationError):
                raise AccessRefusedError(
                    f"the certificate of {self.address} is not valid: {reason(cause)}",
                    code="certificate",
                    hint="name the file of its authority with --ca-file, or renew the certificate",
                ) from error
            raise SplitLearnError(
                f"nothing answers at {self.address}: {cause}",
                hint="is `splitlearn serve` running, and at this --url?",
            ) from error
        except (ValueError, TypeError, RecursionError) as error:
            raise self.foreign("its answer is not a JSON object") from error
        return content

    def overview(self) -> dict[str, Any]:
        """Return the models and statistics; raises as :meth:`request`."""
        try:
            overview = self.request("GET", "/api/models")
        except RefusedError as error:
            raise self.foreign(f"{error.status} {error.message}") from error
        if not isinstance(overview.get("models"), list):
            raise self.foreign("its answer is not a list of models")
        return overview

    def model_path(self, model_id: str) -> str:
        return f"/api/models/{quote(model_id, safe='')}"

    def foreign(self, evidence: str) -> SplitLearnError:
        """Return the error for a server that is not ``splitlearn serve``."""
        return SplitLearnError(
            f"the server at {self.address} is not a `splitlearn serve`: {evidence}",
            hint=f"give its address without a path: --url {parts.scheme}://{parts.netloc}"
            if (parts := urlsplit(self.address)).path
            else "give its address with --url",
        )

    def _refusal(self, error: urllib.error.HTTPError) -> SplitLearnError:
        try:
            content = json.loads(error.read(_ANSWER_LIMIT))["error"]
            message, hint = plain(content["message"])[:1000], plain(content["hint"])[:1000]
        except (ValueError, KeyError, TypeError, OSError, HTTPException):
            message, hint = plain(error.reason)[:300], ""
        for request, command in _COMMANDS.items():
            hint = hint.replace(request, command)
        if error.code == _UNAUTHORIZED:
            return AccessRefusedError(f"{self.address} refuses access: {message}", hint=hint, code="access")
        return RefusedError(message, hint=hint, status=error.code)


def _tls(ca_file: Path | None) -> ssl.SSLContext:
    with translate(
        lambda error: ConfigurationError(f"{ca_file} holds no certificates: {reason(error)}", hint="give a PEM file"),
        (OSError,),
    ):
        return ssl.create_default_context(cafile=ca_file)


def server_address(url: str) -> str:
    """Return a URL without query and fragment.

    Raises:
        ConfigurationError: It is not an http or https URL.
    """
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018  # reading it is what checks it
    except ValueError as error:
        raise ConfigurationError(
            f"{url!r} is not a URL: {reason(error)}", hint="for example http://127.0.0.1:8710"
        ) from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigurationError(f"{url!r} is not an http or https URL", hint="for example http://127.0.0.1:8710")
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"


def plain(text: object) -> str:
    """Escape control characters and line breaks: ids and errors are foreign text."""
    line = " ".join(str(text).split())
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in line)


def _check_url(_: click.Context, __: click.Parameter, value: str) -> str:
    with usage_errors():
        return server_address(value)


def _is_loopback(address: str) -> bool:
    host = urlsplit(address).hostname or ""
    return host in {"localhost", "::1"} or host.startswith("127.")
