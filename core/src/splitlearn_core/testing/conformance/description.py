"""Checks of the fields of a family against the Hugging Face model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from splitlearn_core.build.configuration import architecture_class
from splitlearn_core.testing.conformance.base import TIE, TIES, Checks, axes, explained
from splitlearn_core.testing.conformance.diagnosis import (
    READ_FOR_TIES,
    misconfigured,
    misnamed,
    misread,
    wrong_defaults,
)
from splitlearn_core.testing.conformance.findings import ConformanceError, Suspect, expect
from splitlearn_core.testing.conformance.subject import Subject


@explained
class Description(Checks):
    """Names of modules and of values, and defaults of values that the configuration omits."""

    def test_architecture(self, subject: Subject) -> None:
        """The class is the one that transformers makes of such a config.json, if it knows the type."""
        hf_class: Any = architecture_class(subject.family)
        stated = hf_class.config_class.model_type
        if subject.family.text_config:
            # Of the decoder alone, or of the whole model, whose table for text has the decoder's.
            return
        expect(
            stated == self.model_type,
            f"{hf_class.__name__} is made of configurations of model type {stated!r}",
            Suspect("architecture", f"name the class of {self.model_type!r}"),
        )
        usual = AutoModelForCausalLM._model_mapping.get(hf_class.config_class, hf_class)  # noqa: SLF001  # its only table
        expect(
            hf_class is usual,
            f"transformers makes a {usual.__name__} of such a config.json, not a {hf_class.__name__}",
            Suspect("architecture", f"set {usual.__name__!r}"),
        )

    def test_module_names(self, subject: Subject) -> None:
        """Base, layers, embedding, norm, head and inlets are where the family says; layers are built as it says."""
        suspects = tuple(misnamed(subject.family, subject.whole()))
        if suspects:
            raise ConformanceError("the module names of the family are not those of the model", suspects)

    def test_config_names(self, subject: Subject) -> None:
        """Layers, sizes, heads and ties are read from config.json as transformers reads them."""
        for common, own in subject.family.config_names.items():
            field = f"config_names[{common!r}]"
            expect(
                own in subject.family.decoder_values(subject.config),
                f"config.json has no {own!r}",
                Suspect(field, "its name is wrong"),
            )
        suspects = tuple(misconfigured(subject.family, subject.whole()))
        if suspects:
            raise ConformanceError("the family reads config.json differently from transformers", suspects)

    def test_config_defaults(self, subject: Subject) -> None:
        """Values that config.json omits have the defaults of transformers."""
        suspects = tuple(wrong_defaults(subject.family))
        if suspects:
            raise ConformanceError("the family fills in omitted values differently from transformers", suspects)

    def test_tied_and_untied(self, tie: str, subjects: Mapping[str, Subject]) -> None:
        """A tied and an untied model are both among the variants, if the model class has both."""
        without = axes(type(self)).without
        if tie in without:
            pytest.skip(without[tie])
        wanted = TIES[tie][TIE]
        named = [name for name, values in self.all_variants().items() if values.get(TIE) == wanted]
        wrong = [name for name in named if subjects[name].tied != wanted]
        expect(
            named and not wrong,
            f"variants that are to be {tie}: {', '.join(named) or 'none'}; that are not: {', '.join(wrong) or 'none'}",
            Suspect("variants", f"declare {TIE} if the model class supports it"),
        )

    def test_attention_is_there(self, implementation: str, subjects: Mapping[str, Subject]) -> None:
        """Components use the requested attention implementation; one that transformers refuses is skipped."""
        available = axes(type(self))
        if implementation in available.refused:
            pytest.skip(available.refused[implementation])
        subject = subjects[available.variants[0]]
        split = subject.split(subject.middle, attention=implementation)
        used = {part.config._attn_implementation for part in split.components}  # noqa: SLF001  # the name of the chosen implementation
        expect(used == {implementation}, f"{implementation} was requested, and {', '.join(sorted(used))} is used")

    def test_ties(self, subject: Subject) -> None:
        """A tied head is the embedding, one parameter between a bottom and a top of one call; no other head is."""
        family, split = subject.family, subject.split(subject.middle)
        embedding = split.bottom.get_parameter(f"{family.base}.{family.embedding}.weight")
        head = split.top.get_parameter(f"{family.head}.weight")
        tied = subject.tied
        expect(
            (head is embedding) == tied,
            f"head and embedding are {'tied' if tied else 'separate'} in the unsplit model, but not in the split one",
            *misread(family, subject.whole().config, READ_FOR_TIES),
        )
