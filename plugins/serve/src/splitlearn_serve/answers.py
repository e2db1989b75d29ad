"""Results and errors as JSON; the only module that maps exceptions to status codes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from splitlearn_core import FailureInfo, ModelInfo, SplitLearnError, errors

#: The first matching class decides.
_CODES: tuple[tuple[type[Exception], int], ...] = (
    (errors.UnknownModelError, 404),
    (errors.DuplicateModelError, 409),
    (errors.ModelNotReadyError, 409),
    (errors.ModelGoneError, 409),
    (errors.LoadCancelledError, 409),
    (errors.DrainTimeoutError, 409),
    (errors.BusyError, 429),
    (errors.ManagerClosedError, 503),
    (errors.WaitTimeoutError, 503),
    (errors.CapacityError, 503),
    (errors.LoadStalledError, 504),
    (errors.ConfigurationError, 422),
    (errors.PluginError, 422),
    (errors.CheckpointError, 422),
)
#: A method of the manager that hints name -> the request that calls it.
_REQUESTS = {
    "load_model": "POST /api/models/ID/load",
    "ensure_model": "POST /api/models/ID/load",
    "reload_model": "POST /api/models/ID/reload",
    "cancel_load": "POST /api/models/ID/cancel",
    "unload_model": "DELETE /api/models/ID",
    "get_model_info": "GET /api/models/ID",
    "get_statistics": "GET /api/statistics",
}
_CALL = re.compile(rf"(?:await )?\b({'|'.join(_REQUESTS)})\([^()]*\)")
#: Seconds after which a retry makes sense.
_RETRY_AFTER: tuple[tuple[type[Exception], int], ...] = (
    (errors.BusyError, 1),
    (errors.WaitTimeoutError, 10),
    (errors.CapacityError, 30),
)


class RequestError(SplitLearnError):
    """A request that the server refuses itself, without calling the manager."""

    def __init__(
        self, status: int, message: str, *, hint: str = "", headers: Mapping[str, str] | None = None, kind: str = ""
    ) -> None:
        super().__init__(message, hint=hint)
        self.status = status
        self.headers = dict(headers or {})
        #: The ``type`` in the answer.
        self.kind = kind or type(self).__name__

    @classmethod
    def for_good(cls, error: SplitLearnError) -> RequestError:
        """Wrap an error of the manager as permanent: without ``Retry-After``."""
        return cls(_status_of(error), error.message, hint=error.hint, kind=type(error).__name__)


def json_answer(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Answer with a value as JSON."""
    return Response(encode(content), status, headers, "application/json")


def encode(content: Any) -> bytes:
    """Encode as strict JSON; raises ValueError on ``NaN``, which not every parser accepts."""
    return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()


def error_answer(error: SplitLearnError) -> Response:
    """Answer with an error and its hint, never with a traceback."""
    return json_answer({"error": error_json(error)}, _status_of(error), _headers_of(error))


def error_json(error: SplitLearnError) -> dict[str, Any]:
    """Return an error as plain values."""
    kind = error.kind if isinstance(error, RequestError) else type(error).__name__
    # The reader has no manager: its methods in the hint become requests.
    hint = _CALL.sub(lambda call: _REQUESTS[call[1]] + ("?force=true" if "force=True" in call[0] else ""), error.hint)
    return {"type": kind, "message": error.message, "hint": hint}


def model_json(info: ModelInfo) -> dict[str, Any]:
    """Return a model as plain values, without the parts of a failure that belong only in the server's log."""
    return {**info.to_dict(), "error": _failure_json(info.error)}


def _failure_json(failure: FailureInfo | None) -> dict[str, Any] | None:
    if failure is None:
        return None
    return {
        "type": failure.type,
        "message": failure.message,
        "hint": failure.hint,
        "stage": failure.stage,
        "retryable": failure.retryable,
        "consecutive": failure.consecutive,
        "at": failure.at,
    }


def _status_of(error: SplitLearnError) -> int:
    if isinstance(error, RequestError):
        return error.status
    return next((code for kind, code in _CODES if isinstance(error, kind)), 500)


def _headers_of(error: SplitLearnError) -> dict[str, str]:
    if isinstance(error, RequestError):
        return error.headers
    return next(({"Retry-After": str(after)} for kind, after in _RETRY_AFTER if isinstance(error, kind)), {})
