"""Results of a run of the conformance kit; imports neither torch nor pytest."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

PASSED, FAILED, SKIPPED, EXPECTED = "passed", "failed", "skipped", "expected failure"
#: From the worst to the best; the outcome of a check is the worst of its cases.
_ORDER = (FAILED, EXPECTED, PASSED, SKIPPED)


@dataclass(frozen=True, slots=True)
class Case:
    """One check with one set of parameters."""

    model_type: str
    check: str
    #: The parameters, as in a test's name; empty if there are none.
    parameters: str
    #: ``passed``, ``failed``, ``skipped`` or ``expected failure``.
    outcome: str
    seconds: float
    #: Why it failed or was skipped; empty if it passed.
    message: str = ""
    #: Fields of the family to look at, each with the evidence.
    look_at: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Check:
    """One check of one family with all its cases."""

    name: str
    cases: tuple[Case, ...]

    @property
    def outcome(self) -> str:
        """The worst outcome of its cases; skipped cases count only if all were skipped."""
        return next(outcome for outcome in _ORDER if any(case.outcome == outcome for case in self.cases))

    @property
    def seconds(self) -> float:
        return sum(case.seconds for case in self.cases)

    def of(self, outcome: str) -> tuple[Case, ...]:
        """Return the cases with an outcome."""
        return tuple(case for case in self.cases if case.outcome == outcome)


@dataclass(frozen=True, slots=True)
class FamilyReport:
    """The results of one family."""

    model_type: str
    distribution: str
    version: str
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return bool(self.checks) and all(check.outcome != FAILED for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        return {
            "model_type": self.model_type,
            "distribution": self.distribution,
            "version": self.version,
            "passed": self.passed,
            "checks": [_check_to_dict(check) for check in self.checks],
        }


def grouped(cases: list[Case]) -> tuple[Check, ...]:
    """Group cases by check, in the order in which they were run."""
    by_name: dict[str, list[Case]] = {}
    for case in cases:
        by_name.setdefault(case.check, []).append(case)
    return tuple(Check(name, tuple(own)) for name, own in by_name.items())


def _check_to_dict(check: Check) -> dict[str, Any]:
    return {
        "check": check.name,
        "outcome": check.outcome,
        **{outcome.replace(" ", "_"): len(check.of(outcome)) for outcome in _ORDER},
        "seconds": round(check.seconds, 3),
        "cases": [
            {**asdict(case), "look_at": [{"field": field, "why": why} for field, why in case.look_at]}
            for case in check.cases
            if case.outcome != PASSED
        ],
    }
