"""``/MODEL_ID``: a WebSocket on which a client uses a model, a frame in each binary message."""

from __future__ import annotations

import asyncio
from collections import Counter

from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from splitlearn_core import ProtocolError
from splitlearn_core.extension import SUBPROTOCOL
from splitlearn_serve.answers import RequestError, error_answer
from splitlearn_serve.control import Control, is_trunk
from splitlearn_serve.guard import OWNER
from splitlearn_serve.sessions import Sessions, refusal_frame
from splitlearn_serve.tokens import ANYONE, Owner

#: The maximum number of WebSocket connections of one owner.
CONNECTIONS_PER_OWNER = 128
#: WebSocket close codes, and HTTP status codes.
_UNSUPPORTED, _PROTOCOL_ERROR, _GOING_AWAY = 1003, 1002, 1001
_UPGRADE_REQUIRED, _NOT_FOUND, _METHOD_NOT_ALLOWED = 426, 404, 405


class SessionRoute:
    """The ASGI application behind WebSocket requests to ``/MODEL_ID``."""

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions
        self._connections: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        await receive()
        model_id, owner = scope["path_params"]["model_id"], scope.get(OWNER, ANYONE)
        refusal = self._refusal(model_id, owner, scope.get("subprotocols", ()))
        if refusal is not None:
            await error_answer(refusal)(scope, receive, send)
            return
        traffic = self._sessions.control.traffic.of(model_id)
        self._connections[owner.name] += 1
        traffic.connections += 1
        try:
            await send({"type": "websocket.accept", "subprotocol": SUBPROTOCOL})
            await self._serve(model_id, owner, receive, send)
        finally:
            traffic.connections -= 1
            self._connections[owner.name] -= 1

    async def _serve(self, model_id: str, owner: Owner, receive: Receive, send: Send) -> None:
        while True:
            try:
                # Sessions end after this time, and their connections, too.
                async with asyncio.timeout(self._sessions.limits.idle_timeout):
                    message = await receive()
            except TimeoutError:
                await send({"type": "websocket.close", "code": _GOING_AWAY, "reason": "idle for too long"})
                return
            if message["type"] == "websocket.disconnect":
                return
            data = message.get("bytes")
            if data is None:
                error = ProtocolError("a frame is a binary message, but this was text", code="malformed")
                await send({"type": "websocket.send", "bytes": refusal_frame(error)})
                await send({"type": "websocket.close", "code": _UNSUPPORTED, "reason": "text"})
                return
            reply = await self._sessions.answer(model_id, data, owner)
            await send({"type": "websocket.send", "bytes": reply.data})
            if reply.is_last:
                await send({"type": "websocket.close", "code": _PROTOCOL_ERROR, "reason": "not a frame"})
                return
            # They may be megabytes, and the next request may come in an hour.
            del message, data, reply

    def _refusal(self, model_id: str, owner: Owner, subprotocols: list[str]) -> RequestError | None:
        config = self._sessions.control.known(model_id)
        if config is None:
            return RequestError(
                _NOT_FOUND,
                f"there is no model {model_id[:200]!r} here",
                hint="`splitlearn ps --url ...` lists the models of a server",
                kind="UnknownModelError",
            )
        if not is_trunk(config):
            part = config.component or f"whole {config.model_type} model"
            return RequestError(
                422,
                f"model {model_id!r} is a {part}, and only trunks can be used remotely",
                hint="load bottom and top where the data is",
                kind="ConfigurationError",
            )
        if SUBPROTOCOL not in subprotocols:
            offered = ", ".join(subprotocols)[:200] or "none"
            return RequestError(
                400,
                f"the client speaks the protocol {offered}, and this server {SUBPROTOCOL}",
                hint="install the same version of splitlearn-core on both sides",
                kind="ProtocolError",
            )
        if self._connections[owner.name] >= CONNECTIONS_PER_OWNER:
            return RequestError(
                429,
                f"{CONNECTIONS_PER_OWNER} connections of this owner are open, which is the maximum",
                hint="use the open connections: one serves any number of sessions in turn",
                headers={"Retry-After": "5"},
                kind="BusyError",
            )
        return None


class ConnectHint:
    """The ASGI application behind plain HTTP requests to ``/MODEL_ID``, and to all paths without a route."""

    def __init__(self, control: Control) -> None:
        self._control = control

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer with how to connect."""
        model_id = scope["path"].removeprefix("/")
        if self._control.known(model_id) is None:
            raise HTTPException(_NOT_FOUND)
        if scope["method"] not in ("GET", "HEAD"):
            raise HTTPException(_METHOD_NOT_ALLOWED, headers={"Allow": "GET"})
        answer = RequestError(
            _UPGRADE_REQUIRED,
            f"model {model_id!r} is used over a WebSocket of the protocol {SUBPROTOCOL}",
            hint="in Python: splitlearn_core.connect(URL), with this address; on the command line: "
            "splitlearn generate MODEL --split A B --at trunk=URL --prompt TEXT",
            headers={"Upgrade": "websocket", "Connection": "Upgrade"},
            kind="UpgradeRequired",
        )
        await error_answer(answer)(scope, receive, send)
