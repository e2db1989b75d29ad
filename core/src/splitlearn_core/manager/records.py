"""From an exception to a record of it, and from the record to a fresh exception for each who waits.

The record is text alone: an exception keeps its frames, and they keep the weights they worked on.
"""

from __future__ import annotations

import traceback

from splitlearn_core import errors
from splitlearn_core.errors import LoadFailedError, SplitLearnError, printable, shortened
from splitlearn_core.manager.status import FailureInfo

#: Characters of another library's error, and of its traceback: both are kept in every snapshot.
_MESSAGE, _TRACEBACK = 2_000, 20_000
#: Trying again unchanged cannot help against these.
_PERMANENT = (
    errors.ConfigurationError,
    errors.PluginError,
    errors.InvalidCheckpointError,
    errors.TensorMismatchError,
)


def record(error: BaseException, stage: str) -> FailureInfo:
    """Keep what is to be known of an exception, and let go of what its frames hold."""
    trace = "" if isinstance(error, SplitLearnError) else "".join(traceback.format_exception(error))
    seen: BaseException | None = error
    while seen is not None:
        traceback.clear_frames(seen.__traceback__)
        seen = seen.__cause__ or seen.__context__
    message = error.message if isinstance(error, SplitLearnError) else shortened(printable(str(error)), _MESSAGE)
    return FailureInfo(
        type=type(error).__name__,
        message=message or type(error).__name__,
        hint=error.hint if isinstance(error, SplitLearnError) else "",
        stage=stage,
        retryable=not isinstance(error, _PERMANENT),
        traceback=shortened(printable(trace), _TRACEBACK),
    )


def fresh(failure: FailureInfo) -> SplitLearnError:
    """Make an exception of a record: of the same class where it is one of ours, else LoadFailedError."""
    kind = getattr(errors, failure.type, None)
    if isinstance(kind, type) and issubclass(kind, SplitLearnError):
        return kind(failure.message, hint=failure.hint)
    return LoadFailedError(
        f"loading failed while {failure.stage or 'working'}: {failure.type}: {failure.message}",
        hint=failure.hint or "the traceback is in get_model_info(id).error.traceback",
    )
