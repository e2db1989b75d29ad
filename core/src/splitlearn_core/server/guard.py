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

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from splitlearn_core.server.answers import RequestError, error_answer

_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
_DEFAULT_PORTS = {"http": 80, "https": 443}

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
    """The outermost layer: refuses what must not pass, and puts the security headers on every answer."""

    def __init__(self, app: ASGIApp, hosts: HostRule) -> None:
        self._app = app
        self._hosts = hosts

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

        problem = _problem(self._hosts, scope["method"], Headers(scope=scope))
        answer = self._app if problem is None else error_answer(problem)
        await answer(scope, receive, send_guarded)


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
