"""Findings: what a check found and what fixes it; a check that fails is a finding as well."""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from splitlearn_core.environment_errors import cause_of, is_halted
from splitlearn_core.errors import SplitLearnError
from splitlearn_core.quoting import said


class Level(StrEnum):
    """How much a finding matters."""

    OK = "ok"
    #: Worth knowing; nothing fails by it.
    NOTE = "note"
    #: Something that is wanted does not work.
    WRONG = "wrong"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that a check found."""

    #: The check that found it: ``packages``, ``plugins``, ``devices``, ...
    check: str
    level: Level
    what: str
    #: The file, folder or variable that it is about; empty where there is none.
    where: str = ""
    #: What to do about it: a command where there is one.
    mend: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, said: Mapping[str, Any]) -> Finding:
        """Read back what :meth:`to_dict` gave to another process."""
        return cls(**{**said, "level": Level(said["level"])})


@dataclass(frozen=True, slots=True)
class Report:
    """What all checks found, in the order in which they were made."""

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


def failed(name: str, error: BaseException, subject: str, mend: str, where: str = "") -> Finding:
    """Return the finding of a check that raised whatever it raised.

    Args:
        name: The check.
        error: What it raised.
        subject: What it was doing.
        mend: What to do where the error does not say it.
        where: What it looked at.
    """
    cause = cause_of(error)
    if cause is not None and is_halted(cause.library):
        # Its own check has said what is wrong with it: here it only stands in the way.
        return left_out(name, cause.library)
    if isinstance(error, SplitLearnError) and not (cause and cause.library):
        return Finding(name, Level.WRONG, error.message, where, error.hint)
    if cause is not None:
        return Finding(name, Level.WRONG, cause.message, where, cause.hint)
    last = traceback.extract_tb(error.__traceback__)[-1]
    what = f"{subject or 'the check'} failed: {said(error)}"
    return Finding(name, Level.WRONG, what, f"{last.filename}:{last.lineno}", mend or "report it")


def left_out(name: str, library: str, subject: str = "") -> Finding:
    """Return the note on what was not examined for want of a library."""
    return Finding(name, Level.NOTE, f"{subject and subject + ' '}left out: {library} cannot be imported")


@dataclass(frozen=True, slots=True)
class Check:
    """A check that can be made anywhere."""

    #: What its findings are listed under.
    name: str
    #: The function that makes it, ``module:function``; it is imported when the check is made.
    function: str
    arguments: tuple[str | bool, ...] = ()
    #: What it does, for messages: ``importing torch``, ``looking at ...``.
    subject: str = ""
    #: What to do where it fails and does not say it.
    mend: str = ""
    #: The library that it tries to import; where that cannot be, the checks after it go without.
    library: str = ""


@dataclass(frozen=True, slots=True)
class Made:
    """A check that was made, and what it found."""

    check: Check
    findings: tuple[Finding, ...]
    #: Whether it ended its process, or did not come to an end.
    is_lost: bool = False


def make(check: Check) -> Made:
    """Make a check in this process; what it raises is its finding."""
    module, _, name = check.function.partition(":")
    try:
        function: Callable[..., list[Finding]] = getattr(importlib.import_module(module), name)
        found = function(*check.arguments)
    # A doctor who faints is of no use: what was examined may be broken in any way.
    except (Exception, SystemExit) as error:  # noqa: BLE001
        found = [failed(check.name, error, check.subject, check.mend)]
    return Made(check, tuple(found))


def findings_of(every: Iterable[Made]) -> list[Finding]:
    """Return what all checks found."""
    return [finding for made in every for finding in made.findings]


def unusable(every: Iterable[Made]) -> tuple[str, ...]:
    """Return the libraries that their checks found to be so."""
    wrong = [made for made in every if any(finding.level is Level.WRONG for finding in made.findings)]
    return tuple(made.check.library for made in wrong if made.check.library)
