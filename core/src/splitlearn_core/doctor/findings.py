"""What a check found, and what mends it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any


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
