"""Checks of the test class itself: it overrides no check, and explains expected failures."""

from __future__ import annotations

from splitlearn_core.testing.conformance.base import Checks, explained
from splitlearn_core.testing.conformance.findings import Suspect, expect


@explained
class Guarding(Checks):
    """Overridden, deleted and misspelt checks."""

    def test_no_check_is_overridden(self) -> None:
        """A subclass neither changes nor removes checks; expected_failures names checks that fail."""
        checks = self.checks()
        changed = [name for name, check in checks.items() if getattr(type(self), name, None) is not check]
        expect(
            not changed,
            f"{type(self).__name__} overrides {', '.join(sorted(changed))}",
            Suspect("expected_failures", 'remove the override, and state why the check fails: {"test_name": "reason"}'),
        )

    def test_expected_failures_are_explained(self) -> None:
        """Each entry of expected_failures names a check, and gives a reason."""
        checks = self.checks()
        wrong = [
            f"{entry!r}: {reason!r}"
            for entry, reason in self.expected_failures.items()
            if entry.partition("[")[0] not in checks or not str(reason).strip()
        ]
        names = ", ".join(sorted(checks))
        expect(
            not wrong, f"no check, or no reason: {'; '.join(wrong)}", Suspect("expected_failures", f"checks: {names}")
        )
