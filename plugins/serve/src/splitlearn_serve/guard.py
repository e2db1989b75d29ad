"""Refuse requests from the pages of other sites, and those without a token, before any route sees them.

Where there are tokens, every request that uses or changes models needs one. On loopback there may be none: any local
program may then use the server, but a web page in a local browser must not, and browsers send requests to loopback
for any page. So:

- The Host header must name this server. This stops DNS rebinding, where the name of a foreign page is made
  to resolve to loopback.
- An Origin header must name this server too, and Fetch Metadata must not name another site.
- Requests that change anything need a JSON content type, which a page of another origin can only send after
  a CORS preflight; and the server answers none.

The rules for Host and Origin also apply to WebSockets, for which browsers enforce no rules of their own.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from splitlearn_serve.answers import RequestError, error_answer
from splitlearn_serve.tokens import Tokens

_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
#: The key of a request's scope that holds the owner of its token.
OWNER = "splitlearn.owner"
_DEFAULT_PORTS = {"http": 80, "https": 443}
#: The status of a request that did not arrive in time.
_REQUEST_TIMEOUT_STATUS = 408
#: Seconds for which the body of a refused request is read.
_LINGER = 10.0

#: Headers of every answer; the page sets its own policy.
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


@dataclass(frozen=True, slots=True)
class HostRule:
    """Which Host headers name this server."""

    #: Names in lower case, in addition to the names of loopback.
    names: frozenset[str] = frozenset()
    #: Whether any IP address is accepted, not only loopback's: DNS rebinding needs a name.
    any_address: bool = False

    @classmethod
    def of(cls, names: Iterable[str] = (), *, any_address: bool = False) -> HostRule:
        return cls(frozenset(name.lower().rstrip(".") for name in names), any_address)

    def allows(self, host: str) -> bool:
        """Whether a Host header names this server."""
        parts = _authority(host)
        name = parts.hostname if parts else None
        if not name:
            return False
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return name.rstrip(".") in self.names | {"localhost"}
        return address.is_loopback or self.any_address or name in self.names


class Guard:
    """The outermost layer: refuses forbidden requests, and puts the security headers on every answer.

    Args:
        app: The application that answers all other requests.
        hosts: Which Host headers name this server.
        is_full: Whether there are so many requests that only health checks are answered.
        tokens: The tokens that may use and change models; without any, none is needed.
    """

    def __init__(
        self,
        app: ASGIApp,
        hosts: HostRule,
        is_full: Callable[[], bool] = lambda: False,
        tokens: Tokens | None = None,
    ) -> None:
        self._app = app
        self._hosts = hosts
        self._is_full = is_full
        self._tokens = tokens or Tokens()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "websocket":
            await self._serve_socket(scope, receive, send)
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        # Other methods could wait for a body.
        is_probe = scope["path"].startswith("/health/") and scope["method"] in _SAFE_METHODS
        if self._is_full() and not is_probe:
            await error_answer(_too_many())(scope, receive, send_guarded)
            return
        headers = Headers(scope=scope)
        problem = _problem(self._hosts, scope["method"], headers)
        if problem is None and scope["method"] not in _SAFE_METHODS:
            problem = self._admit(scope, headers)
        answer = self._app if problem is None else error_answer(problem)
        body = _Body(scope, receive, send_guarded)
        await answer(scope, body.receive, body.send)

    async def _serve_socket(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        # A handshake changes nothing, so it needs no content type.
        problem = _problem(self._hosts, "GET", headers) or (_too_many() if self._is_full() else None)
        problem = problem or self._admit(scope, headers)
        answer = self._app if problem is None else error_answer(problem)
        await answer(scope, receive, send)

    def _admit(self, scope: Scope, headers: Headers) -> RequestError | None:
        """Record the owner of a request's token; return the error if it is refused."""
        try:
            scope[OWNER] = self._tokens.owner_of(headers.get("authorization"))
        except RequestError as refusal:
            return refusal
        return None


class _Body:
    """Reads the rest of a request's body before its answer ends.

    A connection that is closed with unread bytes is reset, and a client that is still sending may lose
    the answer.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._receive = receive
        self._send = send
        headers = Headers(scope=scope)
        self._is_unread = scope["method"] not in _SAFE_METHODS and (
            headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
        )
        # With `Expect: 100-continue` the client sends nothing before the first call of `receive`.
        self._awaits_continue = "expect" in headers

    async def receive(self) -> Message:
        """Return the next part of the body."""
        self._awaits_continue = False
        message = await self._receive()
        self._is_unread = self._is_unread and message["type"] == "http.request" and message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        """Send a part of the answer; the last one after the body was read, or after a time limit."""
        if message["type"] == "http.response.start" and message["status"] == _REQUEST_TIMEOUT_STATUS:
            self._is_unread = False
        is_last = message["type"] == "http.response.body" and not message.get("more_body", False)
        if is_last and self._is_unread and not self._awaits_continue:
            await self._send({**message, "more_body": True})
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LINGER):
                    while self._is_unread:
                        await self.receive()
            message = {"type": "http.response.body", "body": b"", "more_body": False}
        await self._send(message)


def _too_many() -> RequestError:
    return RequestError(
        503, "the server has too many requests at once", headers={"Retry-After": "5", "Connection": "close"}
    )


def _problem(hosts: HostRule, method: str, headers: Headers) -> RequestError | None:
    # Probes with HTTP/1.0 send no Host header; browsers always do.
    host = headers.get("host", "localhost")
    if not hosts.allows(host):
        return RequestError(
            421,
            f"this server does not answer for the host {host[:100]!r}",
            hint="use its address, or name the host with --allow-host when it is started",
        )
    origin = headers.get("origin")
    if origin is not None and not _same_origin(origin, host):
        return RequestError(403, f"requests from pages of {origin[:100]!r} are refused")
    if method in _SAFE_METHODS:
        return None
    if headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
        return RequestError(403, "requests from pages of other sites are refused")
    media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
    if method == "POST" and media_type != "application/json":
        return RequestError(
            415, "the content type must be application/json", hint="curl -H 'Content-Type: application/json' ..."
        )
    return None


def _same_origin(origin: str, host: str) -> bool:
    page, server = urlsplit_or_none(origin), _authority(host)
    if page is None or server is None or page.scheme not in _DEFAULT_PORTS:
        return False
    default = _DEFAULT_PORTS[page.scheme]
    return (page.hostname, _port(page, default)) == (server.hostname, _port(server, default))


def _authority(host: str) -> SplitResult | None:
    """Split a Host header; None if it is not a name and an optional port."""
    parts = urlsplit_or_none(f"//{host}")
    if parts is None or parts.path or parts.query or parts.fragment or "@" in host:
        return None
    return parts


def urlsplit_or_none(text: str) -> SplitResult | None:
    """Split a URL; None if it is invalid."""
    try:
        parts = urlsplit(text)
        parts.port  # noqa: B018  # reading it is what checks it
    except ValueError:
        return None
    return parts


def _port(parts: SplitResult, default: int) -> int:
    return default if parts.port is None else parts.port
