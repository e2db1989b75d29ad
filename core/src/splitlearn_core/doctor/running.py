"""Make a check, here; one that fails is a finding, and the others go on."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from splitlearn_core.doctor.explaining import failed
from splitlearn_core.doctor.findings import Finding, Level


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
