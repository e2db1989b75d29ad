"""What looking at a model may come to: an answer, a question, or a refusal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from splitlearn_core import ConfigurationError


class CannotSplitError(ConfigurationError):
    """The model is none that can be cut, with the reason."""


@dataclass(frozen=True, slots=True)
class Question:
    """What could not be derived."""

    #: The field of the family that the answer belongs into.
    field: str
    text: str
    #: The evidence.
    seen: str

    def to_dict(self) -> dict[str, str]:
        return {"field": self.field, "question": self.text, "seen": self.seen}


@dataclass(slots=True)
class Derived:
    """What a family file will say."""

    #: Arguments of :class:`ModelFamily` that are not its defaults.
    fields: dict[str, Any]
    #: Field -> why it is said, for the reader of the file.
    reasons: dict[str, str] = field(default_factory=dict)
    questions: list[Question] = field(default_factory=list)
    #: Values of the configuration for which it does not hold, in words.
    notes: list[str] = field(default_factory=list)
    #: Name of a variant -> values of the configuration, for the test file.
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    #: The version of transformers that was looked at: names of modules differ from one to another.
    transformers: str = ""
    #: Attention implementations that the model bears, and dtypes.
    attention: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
