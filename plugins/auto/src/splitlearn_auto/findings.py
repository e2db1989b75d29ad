"""Results of examining a model: a derived family, open questions, or a refusal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from splitlearn_auto.answers import UnprovenSetting
from splitlearn_core import ConfigurationError


class CannotSplitError(ConfigurationError):
    """The model cannot be split, with the reason."""


@dataclass(frozen=True, slots=True)
class Question:
    """An aspect of the family that could not be derived."""

    #: The field of the family that the answer belongs to.
    field: str
    text: str
    #: The evidence.
    seen: str

    def to_dict(self) -> dict[str, str]:
        return {"field": self.field, "question": self.text, "seen": self.seen}


@dataclass(slots=True)
class Derived:
    """The content of a family file."""

    #: Arguments of :class:`ModelFamily` that are not its defaults.
    fields: dict[str, Any]
    #: Field -> why it has its value, as a comment in the file.
    reasons: dict[str, str] = field(default_factory=dict)
    questions: list[Question] = field(default_factory=list)
    #: Values of the configuration for which it does not hold, in words.
    notes: list[str] = field(default_factory=list)
    #: Those of them that are about values of ``config.json``.
    unproven: list[UnprovenSetting] = field(default_factory=list)
    #: The types of decoder with which it is proven, in a type of several models that has decoders of any type.
    decoders: tuple[str, ...] = ()
    #: Name of a variant -> values of the configuration, for the test file.
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    #: The version of transformers that was used: names of modules differ between versions.
    transformers: str = ""
    #: Attention implementations and dtypes for which the split is equal.
    attention: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
