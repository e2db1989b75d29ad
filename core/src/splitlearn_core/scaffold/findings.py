"""What looking at a model may come to, besides an answer."""

from __future__ import annotations

from dataclasses import dataclass

from splitlearn_core.errors import ConfigurationError


class CannotSplit(ConfigurationError):
    """The model is none that can be cut, with the reason."""


@dataclass(frozen=True, slots=True)
class Question:
    """What could not be derived: a field, what is asked, and what was seen."""

    field: str
    text: str
    seen: str
