"""The HTTP routes: each parses a request, calls the control, and answers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, PlatformCollector, ProcessCollector
from prometheus_client.exposition import generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route, WebSocketRoute
from starlette.types import ASGIApp

from splitlearn_core import SplitLearnError
from splitlearn_core.extension import LoopLag, ManagerCollector
from splitlearn_serve.answers import RequestError, error_answer, json_answer, model_json
from splitlearn_serve.control import Control
from splitlearn_serve.events import WatchRoute, client_left
from splitlearn_serve.guard import Guard, HostRule
from splitlearn_serve.page import status_page
from splitlearn_serve.sessions import Sessions
from splitlearn_serve.sockets import ConnectHint, SessionRoute
from splitlearn_serve.tokens import Tokens
from splitlearn_serve.traffic import TrafficCollector

#: A configuration is a few hundred bytes.
_BODY_LIMIT = 64 * 1024
#: Seconds within which a body must arrive.
_BODY_TIMEOUT = 10.0

_T = TypeVar("_T")
Endpoint = Callable[[Request], Awaitable[Response]]


def build_app(
    control: Control,
    hosts: HostRule | None = None,
    lag: LoopLag | None = None,
    is_full: Callable[[], bool] = lambda: False,
    sessions: Sessions | None = None,
    tokens: Tokens | None = None,
) -> ASGIApp:
    """Create the ASGI application of a manager.

    Args:
        control: The manager with its configurations.
        hosts: Which Host headers name this server; by default those of loopback.
        lag: Measures the lag of the event loop, for ``/metrics``.
        is_full: Whether there are so many requests that only health checks are answered.
        sessions: The sessions on its models; by default, with the default limits.
        tokens: The tokens that may use and change models; without any, none is needed.
    """
    routes = _Routes(control, lag)
    model = "/api/models/{model_id}"
    app = Starlette(
        routes=[
            Route("/", routes.page, methods=["GET"]),
            Route("/api/models", routes.models, methods=["GET"]),
            Route("/api/models", routes.load, methods=["POST"]),
            Route(model, routes.model, methods=["GET"]),
            Route(model, routes.unload, methods=["DELETE"]),
            Route(f"{model}/events", routes.story, methods=["GET"]),
            Route(f"{model}/load", routes.load_known, methods=["POST"]),
            Route(f"{model}/reload", routes.reload, methods=["POST"]),
            Route(f"{model}/cancel", routes.cancel, methods=["POST"]),
            Route("/api/statistics", routes.statistics, methods=["GET"]),
            Route("/api/events", WatchRoute(control), methods=["GET"]),
            Route("/metrics", routes.metrics, methods=["GET"]),
            Route("/health/live", routes.live, methods=["GET"]),
            Route("/health/ready", routes.ready, methods=["GET"]),
            WebSocketRoute("/{model_id:path}", SessionRoute(sessions or Sessions(control))),
        ],
        exception_handlers={
            SplitLearnError: _on_error,
            HTTPException: _on_http_error,
            # A client that has left gets no answer; without this it would be logged as a server error.
            ClientDisconnect: _on_disconnect,
            Exception: _on_internal_error,
        },
    )
    # Not a route, which would hide the answer "not possible" to other methods of the paths above.
    app.router.default = ConnectHint(control)
    return Guard(app, hosts or HostRule(), is_full, tokens)


class _Routes:
    """One method per route."""

    def __init__(self, control: Control, lag: LoopLag | None) -> None:
        self._control = control
        self._registry = CollectorRegistry()
        self._registry.register(ManagerCollector(control.manager, lag))
        self._registry.register(TrafficCollector(control.traffic))
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)

    async def page(self, request: Request) -> Response:
        page = status_page()
        return Response(page.body, 200, {"Content-Security-Policy": page.policy}, "text/html; charset=utf-8")

    async def models(self, request: Request) -> Response:
        return Response(self._control.snapshot(fresh=True).document, 200, media_type="application/json")

    async def model(self, request: Request) -> Response:
        info = self._control.info(_model_id(request))
        return json_answer({**model_json(info), "sessions": self._control.traffic.get(info.model_id)})

    async def story(self, request: Request) -> Response:
        return json_answer({"events": self._control.story(_model_id(request))})

    async def statistics(self, request: Request) -> Response:
        return json_answer(self._control.manager.get_statistics().to_dict())

    async def load(self, request: Request) -> Response:
        body = await _read_json(request)
        wait = _flag(request, "wait")
        info = await _while_connected(request, self._control.load(self._control.parse(body), wait=wait))
        return json_answer(model_json(info), 200 if wait else 202)

    async def load_known(self, request: Request) -> Response:
        await _refuse_body(request)
        wait = _flag(request, "wait")
        info = await _while_connected(request, self._control.load_known(_model_id(request), wait=wait))
        return json_answer(model_json(info), 200 if wait else 202)

    async def reload(self, request: Request) -> Response:
        body = await _read_json(request)
        wait = _flag(request, "wait")
        config = self._control.parse(body) if body else None
        info = await _while_connected(request, self._control.reload(_model_id(request), config, wait=wait))
        return json_answer(model_json(info), 200 if wait else 202)

    async def cancel(self, request: Request) -> Response:
        await _refuse_body(request)
        await self._control.cancel(_model_id(request))
        return json_answer({"cancelled": _model_id(request)})

    async def unload(self, request: Request) -> Response:
        await _refuse_body(request)
        force, patience = _flag(request, "force"), _seconds(request, "timeout")
        work = self._control.unload(_model_id(request), force=force, patience=patience)
        return json_answer(await _while_connected(request, work))

    async def metrics(self, request: Request) -> Response:
        return Response(generate_latest(self._registry), 200, {"Content-Type": CONTENT_TYPE_LATEST})

    async def live(self, request: Request) -> Response:
        health = self._control.health()
        return json_answer({"live": health.live, "reason": health.reason}, 200 if health.live else 503)

    async def ready(self, request: Request) -> Response:
        health = self._control.health()
        return json_answer(health.to_dict(), 200 if health.ready else 503)


async def _while_connected(request: Request, work: Coroutine[Any, Any, _T]) -> _T:
    """Wait for a long operation as long as the client is connected; loads that were started go on without it.

    Raises:
        ClientDisconnect: The client has left.
    """
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(client_left(request.receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


def _model_id(request: Request) -> str:
    model_id: str = request.path_params["model_id"]
    return model_id


def _flag(request: Request, name: str) -> bool:
    value = request.query_params.get(name, "false").lower()
    if value not in ("true", "1", "false", "0", ""):
        raise RequestError(400, f"{name}={value[:50]!r} is neither true nor false")
    return value in ("true", "1")


def _seconds(request: Request, name: str) -> float | None:
    text = request.query_params.get(name)
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise RequestError(400, f"{name}={text[:50]!r} is not a number of seconds")
    return value


async def _refuse_body(request: Request) -> None:
    if await _read_json(request):
        raise RequestError(400, "this request takes no body")


async def _read_json(request: Request) -> Any:
    """Read a JSON body of limited size; None if there is none."""
    if int(request.headers.get("content-length", "0")) > _BODY_LIMIT:
        raise _too_long()
    try:
        async with asyncio.timeout(_BODY_TIMEOUT):
            body = await _read_body(request)
    except TimeoutError as error:
        raise RequestError(
            408, f"the body did not arrive within {_BODY_TIMEOUT:.0f} s", headers={"Connection": "close"}
        ) from error
    if not body:
        return None
    try:
        return json.loads(body, object_pairs_hook=_unique)
    # Deeply nested brackets exhaust the stack.
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"the body is not JSON: {str(error)[:200]}") from error


async def _read_body(request: Request) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > _BODY_LIMIT:
            raise _too_long()
    return bytes(body)


def _too_long() -> RequestError:
    return RequestError(413, f"the body is longer than {_BODY_LIMIT // 1024} KiB", headers={"Connection": "close"})


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse duplicate keys, which parsers read differently."""
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("an object has a duplicate key")
    return values


def _on_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, SplitLearnError):  # registered for these alone
        raise error
    return error_answer(error)


def _on_http_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):  # registered for these alone
        raise error
    route = f"{request.method} {request.url.path[:200]!r}"
    message = {404: f"there is no {route}", 405: f"{route} is not possible"}.get(error.status_code, str(error.detail))
    return error_answer(RequestError(error.status_code, message, headers=error.headers))


def _on_disconnect(request: Request, error: Exception) -> Response:
    return Response(status_code=400)


def _on_internal_error(request: Request, error: Exception) -> Response:
    # The text of the error goes only to the log: it may contain secrets.
    return error_answer(RequestError(500, "the server made a mistake", hint="its log says which; please report it"))
