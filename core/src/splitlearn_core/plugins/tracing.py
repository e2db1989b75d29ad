"""Who was asked what, who answered, and how long it took: one record for each import and each hook call.

Records go to the logger ``splitlearn_core.trace`` at level DEBUG, so that a server can route them as it
routes its other logs; ``record.trace`` is a :class:`Trace`. With ``SPLITLEARN_TRACE=1`` they are lines
on stderr, with ``SPLITLEARN_TRACE=json`` each is a JSON object. Nothing is collected while nobody listens.
"""

from __future__ import annotations

import json
import logging
import os
import reprlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from typing import Any

from splitlearn_core.family import ModelFamily
from splitlearn_core.plugins.metadata import PluginEntry

log = logging.getLogger("splitlearn_core.trace")

#: ``1`` for lines, ``json`` for JSON lines; empty or ``0`` for nothing.
VARIABLE = "SPLITLEARN_TRACE"

#: What happened.
IMPORT, HOOK, SKIPPED = "import", "hook", "skipped"
#: Items of a list or mapping that are shown.
_SHOWN = 2


@dataclass(frozen=True, slots=True)
class Trace:
    """One step of asking plugins."""

    #: ``import`` of a plugin's module, ``hook`` call, or ``skipped``: a plugin that was not asked.
    event: str
    #: The distribution and its version.
    plugin: str
    #: The module of an import, the hook that was called; of what was skipped what it provides.
    what: str
    #: Argument -> its value, shortened.
    arguments: Mapping[str, str] = field(default_factory=dict)
    #: What was answered, shortened; why a plugin was not asked. None where there is no answer.
    answer: str | None = None
    milliseconds: float | None = None
    #: Type and text of what was raised.
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        given = ", ".join(f"{name}={value}" for name, value in self.arguments.items())
        said = f"({given})" if self.event == HOOK else ""
        if self.error is not None:
            outcome = f" raised {self.error}"
        else:
            outcome = {IMPORT: "", HOOK: f" -> {self.answer}", SKIPPED: f": {self.answer}"}[self.event]
        took = "" if self.milliseconds is None else f"  [{self.milliseconds:.1f} ms]"
        return f"{self.event:<7}  {self.plugin}  {self.what}{said}{outcome}{took}"


class _NotImplemented:
    """What a plugin answers that leaves a hook out."""

    def __repr__(self) -> str:
        return "not implemented"


NOT_IMPLEMENTED = _NotImplemented()


@contextmanager
def traced(
    event: str, entry: PluginEntry, what: str, arguments: Mapping[str, object] | None = None
) -> Iterator[Callable[[object], None]]:
    """Time a step, and report it when it is over; yields a function that is told the answer."""
    if not listening():
        yield _unheard
        return
    answers: list[str] = []
    shown = {name: _short(value) for name, value in (arguments or {}).items()}
    error, started = None, time.perf_counter()
    try:
        yield lambda answer: answers.append(_short(answer))
    except BaseException as raised:
        error = f"{type(raised).__name__}: {raised}"
        raise
    finally:
        took = round((time.perf_counter() - started) * 1000, 3)
        _report(Trace(event, entry.label, what, shown, answers[-1] if answers else None, took, error))


def _unheard(_: object) -> None:
    """Take an answer that nobody wants to know."""


def skipped(entry: PluginEntry, why: str) -> None:
    """Report that a plugin was not asked."""
    if listening():
        _report(Trace(SKIPPED, entry.label, entry.what, answer=why))


def listening() -> bool:
    """Say whether anybody wants to know."""
    return log.isEnabledFor(logging.DEBUG)


def trace_to_stderr(*, as_json: bool | None = None) -> None:
    """Print every step to stderr from now on; a second call changes how.

    Args:
        as_json: JSON lines rather than text; None for what ``SPLITLEARN_TRACE`` says.
    """
    if as_json is None:
        as_json = os.environ.get(VARIABLE, "").lower() == "json"
    for handler in [handler for handler in log.handlers if isinstance(handler, _Stderr)]:
        log.removeHandler(handler)
    log.addHandler(_Stderr(as_json=as_json))
    log.setLevel(logging.DEBUG)
    # What is printed here need not be printed by the handlers of the program as well.
    log.propagate = False


def trace_as_environment_says() -> None:
    """Print steps where ``SPLITLEARN_TRACE`` asks for it, and only once."""
    wanted = os.environ.get(VARIABLE, "") not in ("", "0")
    if wanted and not any(isinstance(handler, _Stderr) for handler in log.handlers):
        trace_to_stderr()


class _Stderr(logging.Handler):
    """Prints records to whatever stderr is at that moment."""

    def __init__(self, *, as_json: bool) -> None:
        super().__init__()
        self._as_json = as_json

    def emit(self, record: logging.LogRecord) -> None:
        step: Trace = record.trace  # type: ignore[attr-defined]  # every record of this logger has one
        line = json.dumps(step.to_dict()) if self._as_json else f"trace {step}"
        # A closed stderr is no reason to fail what is traced, and leaves nowhere to say so.
        with suppress(OSError, ValueError):
            sys.stderr.write(line + "\n")


def _report(step: Trace) -> None:
    log.debug("%s", step, extra={"trace": step})


class _Shortening(reprlib.Repr):
    """Shows a family or a strategy by its name, and of long values the beginning."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 60
        self.maxlist = self.maxtuple = self.maxdict = _SHOWN
        self.maxlevel = 3

    def repr_ModelFamily(self, family: ModelFamily, _: int) -> str:  # noqa: N802  # reprlib finds it by the type's name
        return f"ModelFamily({family.model_type!r})"

    def repr_instance(self, value: object, level: int) -> str:
        """Show what has a name by that, as strategies have."""
        name = getattr(value, "name", None)
        return f"{type(value).__name__}({name!r})" if isinstance(name, str) else super().repr_instance(value, level)


_SHORTENING = _Shortening()


def _short(value: object) -> str:
    """Show a value on one line; it may be anybody's, and its ``repr`` may raise."""
    try:
        text = _SHORTENING.repr(value)
    except Exception as error:  # noqa: BLE001  # foreign code that is run only to be shown
        return f"<{type(value).__name__} that cannot be shown: {type(error).__name__}>"
    count = f" ({len(value)})" if isinstance(value, Mapping | list | tuple) and len(value) > _SHOWN else ""
    return " ".join(text.split()) + count
