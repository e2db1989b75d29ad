"""Who may ask: requests of other sites' pages are refused before anything looks at them.

The server has no passwords. On loopback, whoever can run programs on this machine may use it, but a
page in a browser on this machine must not, and a browser will gladly send requests to loopback for
any page. So:

- The Host header must name this server. A page whose own name was made to point at loopback (DNS
  rebinding) is known by its name.
- An Origin header must name this server too, and Fetch Metadata must not say that another site asks.
- What changes anything needs a JSON content type, which a page of another origin can only send after
  asking first; and nobody answers that question.
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

_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
_DEFAULT_PORTS = {"http": 80, "https": 443}
#: The status of a request that did not come in time.
_TOO_SLOW = 408
#: Seconds for which a body is read that nobody wants.
_LINGER = 10.0

#: On every answer; the page adds what it needs.
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
    """Which Host headers are this server's."""

    #: Names in lower case, beside the names of loopback.
    names: frozenset[str] = frozenset()
    #: Whether any address will do, not only loopback's. Rebinding needs a name, so an address is never a trick.
    any_address: bool = False

    @classmethod
    def of(cls, names: Iterable[str] = (), *, any_address: bool = False) -> HostRule:
        return cls(frozenset(name.lower().rstrip(".") for name in names), any_address)

    def allows(self, host: str) -> bool:
        """Say whether a Host header names this server."""
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
    """The outermost layer: refuses what must not pass, and puts the security headers on every answer.

    Args:
        app: What answers the rest.
        hosts: Which Host headers are this server's.
        is_full: Says whether there are so many requests that only health checks are answered.
    """

    def __init__(self, app: ASGIApp, hosts: HostRule, is_full: Callable[[], bool] = lambda: False) -> None:
        self._app = app
        self._hosts = hosts
        self._is_full = is_full

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        # With another method it could wait for a body.
        is_probe = scope["path"].startswith("/health/") and scope["method"] in _SAFE_METHODS
        if self._is_full() and not is_probe:
            await error_answer(_full())(scope, receive, send_guarded)
            return
        problem = _problem(self._hosts, scope["method"], Headers(scope=scope))
        answer = self._app if problem is None else error_answer(problem)
        body = _Body(scope, receive, send_guarded)
        await answer(scope, body.receive, body.send)


class _Body:
    """Reads what is left of a request's body before its answer ends.

    A connection that is closed while bytes of the client's lie unread is reset, and the client, which
    is still sending, may lose the answer.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._receive = receive
        self._send = send
        headers = Headers(scope=scope)
        self._is_unread = scope["method"] not in _SAFE_METHODS and (
            headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
        )
        # Such a client sends nothing before it is told to, which the first call of `receive` does.
        self._is_held_back = "expect" in headers

    async def receive(self) -> Message:
        """Return the next part of the body."""
        self._is_held_back = False
        message = await self._receive()
        self._is_unread = self._is_unread and message["type"] == "http.request" and message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        """Send a part of the answer; the end of it once the body has been read, or for long enough."""
        if message["type"] == "http.response.start" and message["status"] == _TOO_SLOW:
            self._is_unread = False
        is_last = message["type"] == "http.response.body" and not message.get("more_body", False)
        if is_last and self._is_unread and not self._is_held_back:
            await self._send({**message, "more_body": True})
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LINGER):
                    while self._is_unread:
                        await self.receive()
            message = {"type": "http.response.body", "body": b"", "more_body": False}
        await self._send(message)


def _full() -> RequestError:
    return RequestError(
        503, "the server has too many requests at once", headers={"Retry-After": "5", "Connection": "close"}
    )


def _problem(hosts: HostRule, method: str, headers: Headers) -> RequestError | None:
    # Probes that still speak HTTP/1.0 name no host; browsers, which are what this is about, always do.
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
    there, here = urlsplit_or_none(origin), _authority(host)
    if there is None or here is None or there.scheme not in _DEFAULT_PORTS:
        return False
    default = _DEFAULT_PORTS[there.scheme]
    return (there.hostname, _port(there, default)) == (here.hostname, _port(here, default))


def _authority(host: str) -> SplitResult | None:
    """Split a Host header; None where it is more, or less, than a name and a port."""
    parts = urlsplit_or_none(f"//{host}")
    if parts is None or parts.path or parts.query or parts.fragment or "@" in host:
        return None
    return parts


def urlsplit_or_none(text: str) -> SplitResult | None:
    """Split a URL; None where that cannot be done."""
    try:
        parts = urlsplit(text)
        parts.port  # noqa: B018  # reading it is what checks it
    except ValueError:
        return None
    return parts


def _port(parts: SplitResult, default: int) -> int:
    return default if parts.port is None else parts.port
