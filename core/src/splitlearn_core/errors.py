"""Every error that splitlearn raises on purpose, by whose move comes next.

::

    SplitLearnError                      .hint: the way out
    ├── PluginError                      the plugin's author, or who installed it
    │   ├── BrokenPluginError            does not import, or does not keep to the hook specifications
    │   ├── PluginConflictError          two distributions claim one model type
    │   ├── IncompatiblePluginError      made for another plugin API or another core
    │   └── UnknownModelTypeError        (KeyError) no installed plugin provides the model type
    ├── CheckpointError                  who made or named the checkpoint
    │   ├── MissingFileError             (FileNotFoundError) no such model, file or shard
    │   ├── InvalidCheckpointError       (ValueError) a file contradicts its format or its index
    │   └── TensorMismatchError          (ValueError) missing, unexpected or mis-shaped tensors, all of them
    ├── ConfigurationError               (ValueError) the caller's arguments
    │   ├── InvalidSplitError            split points that do not cut this model
    │   └── UnexpectedArgumentError      (TypeError) arguments that a function does not have
    ├── CapacityError                    the machine
    │   ├── InsufficientMemoryError      (RuntimeError)
    │   └── InsufficientDiskError        (OSError)
    ├── ManagerError                     who asks a manager, or the fate of what it manages
    │   ├── UnknownModelError            (KeyError) no model of this id
    │   ├── DuplicateModelError          (ValueError) the id is taken, or taken by another configuration
    │   ├── ModelNotReadyError           the model is in a state in which this cannot be done
    │   ├── ModelGoneError               the model was unloaded under its holder, by force
    │   ├── BusyError                    too many calls wait already
    │   ├── LoadFailedError              a load failed with an error that is not one of these
    │   ├── LoadCancelledError           somebody cancelled the load
    │   ├── LoadStalledError             (TimeoutError) a load made no progress for too long
    │   ├── WaitTimeoutError             (TimeoutError) there was no worker or no room in time
    │   ├── DrainTimeoutError            (TimeoutError) holders did not give a model back in time
    │   └── ManagerClosedError           (RuntimeError) the manager takes no more work
    └── InternalError                    us
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

#: Characters of a whole message, of one line of it, and of a hint: what people read.
_MESSAGE, _LINE, _HINT = 2_700, 1_000, 1_200
#: What moves a cursor, colours a terminal or cannot be encoded; a line break is none.
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def shortened(text: str, limit: int) -> str:
    """Leave out the middle of a text that is longer than a limit, and say how much."""
    if len(text) <= limit:
        return text
    gap = f"...({len(text):,} characters)..."
    kept = max(limit - len(gap), 2)
    return f"{text[: kept - kept // 3]}{gap}{text[len(text) - kept // 3 :]}"


def printable(text: str) -> str:
    """Escape what is no character that people read: control characters, and halves of characters."""
    return _UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], text)


def _bounded(text: str, limit: int) -> str:
    """Cut a text of several lines to a size, whole lines where there are some."""
    if len(text) <= limit and len(text) <= _LINE and text.isprintable():
        return text
    # Before it is looked through: it may be of any size.
    lines = shortened(text, 50 * limit).split("\n")
    kept: list[str] = []
    room = limit
    for line in (shortened(printable(line), min(_LINE, limit)) for line in lines):
        if len(line) > room:
            kept.append(f"... and {len(lines) - len(kept):,} more lines")
            break
        kept.append(line)
        room -= len(line) + 1
    return "\n".join(kept)


class SplitLearnError(Exception):
    """What all errors of splitlearn have in common: a message, and a hint that says the way out.

    Both are cut to what people read. Who puts text of files into them cuts that to a line before.
    """

    def __init__(self, message: str, *, hint: str = "") -> None:
        message, hint = _bounded(message, _MESSAGE), _bounded(hint, _HINT)
        super().__init__(message)
        self.message = message
        #: What to do about it, in one or two sentences; empty where the message says it all.
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
        raise translated from error


class PluginError(SplitLearnError):
    """A plugin stands in the way."""


class BrokenPluginError(PluginError):
    """A plugin does not import, or does not keep to the hook specifications."""


class PluginConflictError(PluginError):
    """Two distributions claim the same model type."""


class IncompatiblePluginError(PluginError):
    """A plugin was made for another plugin API, or for another version of core."""


class UnknownModelTypeError(PluginError, KeyError):
    """No usable plugin provides the model type."""


class CheckpointError(SplitLearnError):
    """The files of a model are not what they have to be."""


class MissingFileError(CheckpointError, FileNotFoundError):
    """A model, a file of it, or a shard is not there."""


class InvalidCheckpointError(CheckpointError, ValueError):
    """A file of the checkpoint contradicts its format, its index or its size."""


class TensorMismatchError(CheckpointError, ValueError):
    """The checkpoint's tensors are not those that the model needs."""


class ConfigurationError(SplitLearnError, ValueError):
    """The caller's arguments cannot be carried out."""


class InvalidSplitError(ConfigurationError):
    """The split points do not cut this model into three."""


class UnexpectedArgumentError(ConfigurationError, TypeError):
    """A function was given arguments that it does not have."""


class CapacityError(SplitLearnError):
    """The machine is too small for what was asked."""


class InsufficientMemoryError(CapacityError, RuntimeError):
    """The planned bytes do not fit into memory."""


class InsufficientDiskError(CapacityError, OSError):
    """The planned download does not fit on the disk."""


class ManagerError(SplitLearnError):
    """A manager cannot do what it was asked, or what it was to do has failed."""


class UnknownModelError(ManagerError, KeyError):
    """The manager has no model of this id."""


class DuplicateModelError(ManagerError, ValueError):
    """The id is loaded or loading already, or belongs to another configuration."""


class ModelNotReadyError(ManagerError):
    """The model is in a state in which this cannot be done."""


class ModelGoneError(ManagerError):
    """The model was unloaded, by force or because its lease is over."""


class BusyError(ManagerError):
    """More calls wait for the model than its queue takes."""


class LoadFailedError(ManagerError):
    """A load failed with an error of somebody else's: its type and text are in the message."""


class LoadCancelledError(ManagerError):
    """The load was cancelled before it was done."""


class LoadStalledError(ManagerError, TimeoutError):
    """The load made no progress for too long."""


class WaitTimeoutError(ManagerError, TimeoutError):
    """No worker was free, or there was no room, within the time allowed."""


class DrainTimeoutError(ManagerError, TimeoutError):
    """Holders did not give the model back within the time allowed; it serves on."""


class ManagerClosedError(ManagerError, RuntimeError):
    """The manager is closed, or closing, and takes no more work."""


class InternalError(SplitLearnError):
    """splitlearn contradicts itself: please report it."""


# A FutureWarning, which Python shows to everybody: whoever has the plugin installed can ask for a newer one.
class SplitLearnDeprecationWarning(FutureWarning):
    """No error yet: a plugin does what a later release refuses. Says which, what, until when, and what instead."""
