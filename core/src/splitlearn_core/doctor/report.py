"""Checks and their findings; a check that fails is a finding as well."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any

from splitlearn_core.environment_errors import cause_of
from splitlearn_core.errors import SplitLearnError
from splitlearn_core.quoting import said


class Level(StrEnum):
    """How much a finding matters."""

    OK = "ok"
    #: Worth knowing; nothing fails because of it.
    NOTE = "note"
    #: Something does not work.
    WRONG = "wrong"


@dataclass(frozen=True, slots=True)
class Finding:
    """One result of a check."""

    #: The check: ``packages``, ``plugins``, ``devices``, ...
    check: str
    level: Level
    what: str
    #: The file, folder or variable that it is about; empty where there is none.
    where: str = ""
    #: What to do about it: a command where there is one.
    fix: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def ok(what: str, where: str = "") -> Finding:
    """Return a finding of something that works; its check sets the name of the check."""
    return Finding("", Level.OK, what, where)


def note(what: str, where: str = "", fix: str = "") -> Finding:
    return Finding("", Level.NOTE, what, where, fix)


def wrong(what: str, where: str = "", fix: str = "") -> Finding:
    return Finding("", Level.WRONG, what, where, fix)


@dataclass(frozen=True, slots=True)
class Report:
    """The findings of all checks, in the order of the checks."""

    findings: tuple[Finding, ...]

    def count(self, level: Level) -> int:
        return sum(finding.level is level for finding in self.findings)

    @property
    def healthy(self) -> bool:
        """Whether nothing is wrong; notes do not count."""
        return self.count(Level.WRONG) == 0

    def to_dict(self) -> dict[str, Any]:
        return {
            "healthy": self.healthy,
            "counts": {str(level): self.count(level) for level in Level},
            "findings": [finding.to_dict() for finding in self.findings],
        }


@dataclass(frozen=True, slots=True)
class Check:
    """A function that examines something, in any process."""

    #: The name its findings are listed under.
    name: str
    #: A function of a module, which another process imports.
    function: Callable[..., Iterable[Finding]]
    arguments: tuple[str | bool, ...] = ()
    #: What it does, in messages: ``importing torch``, ``looking at ...``.
    subject: str = "the check"
    #: What to do if it fails with an error that has no hint.
    fix: str = "report it"
    #: The library that it tries to import; if that fails, later checks run without it.
    library: str = ""

    def run(self) -> list[Finding]:
        """Run the check in this process; an exception becomes a finding."""
        try:
            findings = list(self.function(*self.arguments))
        # What is examined may fail in any way.
        except (Exception, SystemExit) as error:  # noqa: BLE001
            findings = [failure(error, self.subject, self.fix)]
        return [replace(finding, check=self.name) for finding in findings]


def failure(error: BaseException, subject: str, fix: str, where: str = "") -> Finding:
    """Return the finding of a check that raised an exception.

    Args:
        error: The exception.
        subject: What the check was doing.
        fix: What to do if the error has no hint.
        where: What it looked at.
    """
    cause = cause_of(error)
    if cause is not None and is_blocked(cause.library):
        return left_out(cause.library)
    if cause is not None and (cause.library or not isinstance(error, SplitLearnError)):
        return wrong(cause.message, where, cause.hint)
    if isinstance(error, SplitLearnError):
        return wrong(error.message, where, error.hint)
    last = traceback.extract_tb(error.__traceback__)[-1]
    return wrong(f"{subject} failed: {said(error)}", f"{last.filename}:{last.lineno}", fix)


def left_out(library: str, subject: str = "") -> Finding:
    """Return the note that something was not examined because a library is broken, which has its own finding."""
    return note(f"{subject and subject + ' '}left out: {library} cannot be imported")


def block_import(library: str) -> None:
    """Make every further import of a library fail at once, because a broken one may end the process."""
    sys.modules[library] = None  # type: ignore[assignment]  # documented: an import of it raises ModuleNotFoundError


def is_blocked(library: str) -> bool:
    return library in sys.modules and sys.modules[library] is None
