"""The exception hierarchy, grouped by who has to act; and the translation of foreign errors.

::

    SplitLearnError                      .hint: what to do
    ├── PluginError                      the plugin's author, or the user who installed it
    │   ├── BrokenPluginError            cannot be imported, or violates the hook specifications
    │   ├── PluginConflictError          two distributions claim one model type
    │   ├── IncompatiblePluginError      made for another plugin API or another core
    │   └── UnknownModelTypeError        (KeyError) no installed plugin provides the model type
    ├── CheckpointError                  the author of the checkpoint, or the user who named it
    │   ├── MissingFileError             (FileNotFoundError) no such model, file or shard
    │   ├── InvalidCheckpointError       (ValueError) a file contradicts its format or its index
    │   └── TensorMismatchError          (ValueError) missing, unexpected or mis-shaped tensors
    ├── ConfigurationError               (ValueError) the caller's arguments
    │   ├── InvalidSplitError            split points that do not cut this model
    │   └── UnexpectedArgumentError      (TypeError) arguments that a function does not take
    ├── CapacityError                    the machine
    │   ├── InsufficientMemoryError      (RuntimeError)
    │   └── InsufficientDiskError        (OSError)
    ├── ManagerError                     the caller of a manager, or the state of its models
    │   ├── UnknownModelError            (KeyError) no model of this id
    │   ├── DuplicateModelError          (ValueError) the id is taken, or taken by another configuration
    │   ├── ModelNotReadyError           the state of the model does not allow this
    │   ├── ModelGoneError               the model was unloaded by force during a lease
    │   ├── BusyError                    too many calls are waiting
    │   ├── LoadFailedError              a load failed with a foreign error
    │   ├── LoadCancelledError           the load was cancelled
    │   ├── LoadStalledError             (TimeoutError) a load made no progress for too long
    │   ├── WaitTimeoutError             (TimeoutError) no worker or no memory was free in time
    │   ├── DrainTimeoutError            (TimeoutError) leases were not released in time
    │   └── ManagerClosedError           (RuntimeError) the manager accepts no more work
    ├── RemoteError                      (RuntimeError) the owner of a host, or of a remote component; has a .code
    │   ├── ProtocolError                a frame that violates the protocol, or its limits
    │   ├── ConnectionLostError          (ConnectionError) the host cannot be reached, or was not for too long
    │   ├── HostDiedError                the process of a component has ended
    │   ├── SessionLostError             the host no longer has a session, and it cannot be rebuilt
    │   ├── RemoteBusyError              the host has no room now; .retry_after says when to try again
    │   ├── AccessRefusedError           (PermissionError) the token is missing or wrong
    │   └── RemoteStepError              the host refused a step, or the component failed in it
    └── InternalError                    the authors of splitlearn
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

#: Most characters of a message, of one of its lines, and of a hint.
_MAX_MESSAGE, _MAX_LINE, _MAX_HINT = 2_700, 1_000, 1_200
#: Control characters and surrogates; a line break is allowed.
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def shortened(text: str, limit: int) -> str:
    """Return a text; if it is longer than a limit, without its middle and with the number of its characters."""
    if len(text) <= limit:
        return text
    gap = f"...({len(text):,} characters)..."
    kept = max(limit - len(gap), 2)
    return f"{text[: kept - kept // 3]}{gap}{text[len(text) - kept // 3 :]}"


def printable(text: str) -> str:
    """Escape control characters and lone surrogates."""
    return _UNPRINTABLE.sub(lambda match: ascii(match[0])[1:-1], text)


def _bounded(text: str, limit: int) -> str:
    """Cut a text to a size, at a line break if possible."""
    if len(text) <= limit and len(text) <= _MAX_LINE and text.isprintable():
        return text
    # Shortened before it is split: it may be of any size.
    lines = shortened(text, 50 * limit).split("\n")
    kept: list[str] = []
    room = limit
    for line in (shortened(printable(line), min(_MAX_LINE, limit)) for line in lines):
        if len(line) > room:
            kept.append(f"... and {len(lines) - len(kept):,} more lines")
            break
        kept.append(line)
        room -= len(line) + 1
    return "\n".join(kept)


class SplitLearnError(Exception):
    """Base of all errors of splitlearn: a message, and a hint on what to do.

    Both are cut to a readable size. Text quoted from files is already shortened to a line (see ``quoting``).
    """

    def __init__(self, message: str, *, hint: str = "") -> None:
        message, hint = _bounded(message, _MAX_MESSAGE), _bounded(hint, _MAX_HINT)
        super().__init__(message)
        self.message = message
        #: What to do, in one or two sentences; empty if the message is enough.
        self.hint = hint

    def __str__(self) -> str:
        # Spelled out because KeyError would show the repr of its argument.
        return f"{self.message}\n{self.hint}" if self.hint else self.message


@contextmanager
def translate(
    to: Callable[[BaseException], SplitLearnError | None],
    kinds: type[BaseException] | tuple[type[BaseException], ...] = Exception,
    *,
    unchanged: tuple[type[BaseException], ...] = (SplitLearnError,),
) -> Iterator[None]:
    """Raise the errors of foreign code as errors of splitlearn, each with the original as its cause.

    Args:
        to: Makes the new error from the original; None lets the original pass.
        kinds: The classes of errors that are translated.
        unchanged: Of those, the classes that pass as they are.
    """
    try:
        yield
    except kinds as error:
        if isinstance(error, unchanged):
            raise
        translated = to(error)
        if translated is None:
            raise
        try:
            raise translated from error
        finally:
            # Its traceback refers to this frame, a reference cycle that would keep tensors alive until the next GC.
            del translated


class PluginError(SplitLearnError):
    """A plugin cannot be used."""


class BrokenPluginError(PluginError):
    """A plugin cannot be imported, or violates the hook specifications."""


class PluginConflictError(PluginError):
    """Two distributions claim the same model type."""


class IncompatiblePluginError(PluginError):
    """A plugin was made for another plugin API, or for another version of core."""


class UnknownModelTypeError(PluginError, KeyError):
    """No usable plugin provides the model type."""


class CheckpointError(SplitLearnError):
    """The files of a model are invalid."""


class MissingFileError(CheckpointError, FileNotFoundError):
    """A model, one of its files, or a shard is missing."""


class InvalidCheckpointError(CheckpointError, ValueError):
    """A file of the checkpoint contradicts its format, its index or its size."""


class TensorMismatchError(CheckpointError, ValueError):
    """The tensors of the checkpoint do not match the model."""


class ConfigurationError(SplitLearnError, ValueError):
    """The arguments of the caller are invalid."""


class InvalidSplitError(ConfigurationError):
    """The split points do not cut this model."""


class UnexpectedArgumentError(ConfigurationError, TypeError):
    """A function was given arguments that it does not take."""


class CapacityError(SplitLearnError):
    """The machine is too small for the request."""


class InsufficientMemoryError(CapacityError, RuntimeError):
    """The planned bytes do not fit into memory."""


class InsufficientDiskError(CapacityError, OSError):
    """The planned download does not fit on the disk."""


class ManagerError(SplitLearnError):
    """A manager cannot carry out a request, or failed to."""


class UnknownModelError(ManagerError, KeyError):
    """The manager has no model with this id."""


class DuplicateModelError(ManagerError, ValueError):
    """The id is already loaded or loading, or belongs to another configuration."""


class ModelNotReadyError(ManagerError):
    """The model is in a state in which this cannot be done."""


class ModelGoneError(ManagerError):
    """The model was unloaded by force, or its lease has ended."""


class BusyError(ManagerError):
    """The queue of calls to the model is full."""


class LoadFailedError(ManagerError):
    """A load failed with a foreign error, whose type and text are in the message."""


class LoadCancelledError(ManagerError):
    """The load was cancelled before it was done."""


class LoadStalledError(ManagerError, TimeoutError):
    """The load made no progress for too long."""


class WaitTimeoutError(ManagerError, TimeoutError):
    """No worker or no memory was free within the time allowed."""


class DrainTimeoutError(ManagerError, TimeoutError):
    """Leases were not released within the time allowed; the model stays loaded."""


class ManagerClosedError(ManagerError, RuntimeError):
    """The manager is closed or closing, and accepts no more work."""


class RemoteError(SplitLearnError, RuntimeError):
    """A component that runs elsewhere cannot be used.

    Args:
        code: A word for programs; the table is in ``splitlearn_core.hosts.sessions``.
        retry_after: Seconds after which the same request may succeed; None if it never will.
    """

    def __init__(self, message: str, *, hint: str = "", code: str = "", retry_after: float | None = None) -> None:
        super().__init__(message, hint=hint)
        self.code = code
        self.retry_after = retry_after


class ProtocolError(RemoteError):
    """A frame violates the protocol, or exceeds its limits."""


class ConnectionLostError(RemoteError, ConnectionError):
    """A host cannot be reached, or did not come back in time."""


class HostDiedError(RemoteError):
    """The process of a component has ended; the message says how."""


class SessionLostError(RemoteError):
    """A host no longer has a session, and its journal cannot rebuild it."""


class RemoteBusyError(RemoteError):
    """A host has no room for another session or step at present."""


class AccessRefusedError(RemoteError, PermissionError):
    """A host refuses the token, or asks for one."""


class RemoteStepError(RemoteError):
    """A host refused a step, or the component failed in it; the session is unchanged."""


class InternalError(SplitLearnError):
    """A bug in splitlearn: please report it."""


# A FutureWarning, which Python shows to all users: they can upgrade the plugin.
class SplitLearnDeprecationWarning(FutureWarning):
    """A plugin uses a deprecated feature: the message names it, its replacement, and the release that removes it."""
