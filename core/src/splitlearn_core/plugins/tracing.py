"""Debug log records of plugin use: each import, each hook call, each plugin that was skipped.

The logger is ``splitlearn_core.trace``, the level DEBUG; ``record.trace`` holds the values of the message as a mapping.
``SPLITLEARN_TRACE=1`` prints the records on stderr as lines, ``SPLITLEARN_TRACE=json`` as JSON objects.
"""

from __future__ import annotations

import json
import logging
import os
import reprlib
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from splitlearn_core.plugins.metadata import PluginEntry

log = logging.getLogger("splitlearn_core.trace")

#: ``1`` for lines, ``json`` for JSON lines; empty or ``0`` for neither.
VARIABLE = "SPLITLEARN_TRACE"

IMPORT, HOOK, SKIPPED = "import", "hook", "skipped"

#: Shows the beginning of long values, and survives a ``__repr__`` that raises.
_repr = reprlib.Repr()
_repr.maxlist = _repr.maxtuple = _repr.maxdict = 2
_repr.maxstring = _repr.maxother = 100


@contextmanager
def traced(event: str, entry: PluginEntry, what: str, **arguments: object) -> Iterator[dict[str, Any]]:
    """Time a step, and log it when it ends.

    Args:
        event: :data:`IMPORT` or :data:`HOOK`.
        entry: The plugin's entry point.
        what: The module, or the hook.
        arguments: Those of the hook.

    Yields:
        A mapping in which the caller sets ``answer``, what the hook returned.
    """
    step: dict[str, Any] = {"answer": None}
    error, started = None, time.perf_counter()
    try:
        yield step
    except BaseException as raised:
        error = f"{type(raised).__name__}: {raised}"
        raise
    finally:
        if listening():
            milliseconds = round((time.perf_counter() - started) * 1000, 3)
            shown = {name: _shortened(value) for name, value in arguments.items()}
            answer = None if event == IMPORT else _shortened(step["answer"])
            call = f"{what}({', '.join(f'{name}={value}' for name, value in shown.items())})" if event == HOOK else what
            outcome = f" raised {error}" if error else f" -> {answer}" if event == HOOK else ""
            _log(event, entry, what, f"{call}{outcome}  [{milliseconds:.1f} ms]", shown, answer, milliseconds, error)


def skipped(entry: PluginEntry, reason: str) -> None:
    """Log that a plugin was not used, and why."""
    _log(SKIPPED, entry, entry.what, f"{entry.what}: {reason}", {}, reason)


def _log(
    event: str,
    entry: PluginEntry,
    what: str,
    text: str,
    arguments: dict[str, str],
    answer: str | None,
    milliseconds: float | None = None,
    error: str | None = None,
) -> None:
    step = {
        "event": event,
        "plugin": entry.label,
        "what": what,
        "arguments": arguments,
        "answer": None if error else answer,
        "milliseconds": milliseconds,
        "error": error,
    }
    log.debug("%-7s  %s  %s", event, entry.label, text, extra={"trace": step})


def _shortened(value: object) -> str:
    return " ".join(_repr.repr(value).split())


def listening() -> bool:
    """Return whether the records go anywhere."""
    return log.isEnabledFor(logging.DEBUG)


def trace_to_stderr() -> None:
    """Print every step on stderr from now on, in the form that ``SPLITLEARN_TRACE`` names."""
    if not any(isinstance(handler, _StderrHandler) for handler in log.handlers):
        log.addHandler(_StderrHandler())
    log.setLevel(logging.DEBUG)
    # Handlers of the program would print the same lines a second time.
    log.propagate = False


def trace_if_requested() -> None:
    """Print steps on stderr if ``SPLITLEARN_TRACE`` requests it."""
    if os.environ.get(VARIABLE, "") not in ("", "0"):
        trace_to_stderr()


class _StderrHandler(logging.Handler):
    """Writes to the ``sys.stderr`` of the moment, which tests and notebooks replace."""

    def emit(self, record: logging.LogRecord) -> None:
        as_json = os.environ.get(VARIABLE, "").lower() == "json"
        step: dict[str, Any] = record.trace  # type: ignore[attr-defined]  # every record of this logger has it
        line = json.dumps(step) if as_json else f"trace {record.getMessage()}"
        # A closed stderr must not fail the load that is traced.
        with suppress(OSError, ValueError):
            sys.stderr.write(line + "\n")
