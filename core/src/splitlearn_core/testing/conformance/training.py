"""Checks of training: losses and gradients are those of the unsplit model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from splitlearn_core.build.pruning import through_no_layers
from splitlearn_core.testing.conformance.base import Checks, explained
from splitlearn_core.testing.conformance.batches import batch, labels_of, no_grad
from splitlearn_core.testing.conformance.diagnosis import undeclared_inlets
from splitlearn_core.testing.conformance.findings import ConformanceError, Suspect, expect
from splitlearn_core.testing.conformance.numbers import compare, expect_equal
from splitlearn_core.testing.conformance.subject import Cut, Subject


@explained
class Training(Checks):
    """Loss, gradients, and what training mode adds."""

    def test_loss(self, subject: Subject, dtype: str, attention: str, cut: Cut) -> None:
        """The loss with labels is equal."""
        whole, split = subject.whole(dtype, attention), subject.split(cut, dtype, attention)
        inputs = batch(3)
        arguments = {**inputs, "labels": labels_of(inputs)}
        expected = subject.once(("loss", dtype, attention), _loss, whole, arguments)
        expect_equal(no_grad(split, **arguments).loss, expected, "loss", subject, whole, split)

    def test_gradients(self, subject: Subject) -> None:
        """Under every cut, each parameter has the gradient of the unsplit model, and the loss is the same."""
        expected_loss, expected = subject.once("gradients", _gradients, subject.whole())
        for cut in (*subject.cuts, *subject.other_cuts)[: 1 if self.quick else None]:
            split = subject.split(cut)
            loss, got = _gradients(split)
            expect_equal(loss, expected_loss, f"loss under cut {cut}", subject, subject.whole(), split)
            expect(got.keys() == expected.keys(), f"cut {cut}: parameters {sorted(got.keys() ^ expected.keys())}")
            differ = [name for name, gradient in got.items() if not compare(gradient, expected[name])]
            if differ:
                words = f"under cut {cut} the gradients of {', '.join(differ[:5])} differ"
                raise ConformanceError(words, undeclared_inlets(subject.family, subject.whole()))

    @pytest.mark.parametrize("component", ["trunk", "top"])
    def test_only_layers_outside_bottom(self, subject: Subject, component: str) -> None:
        """In training, incoming hidden states pass only through layers and the final norm."""
        family = subject.family
        if family.crossing:
            pytest.skip("hidden states enter at the layers, and leave there")
        got, expected = through_no_layers(getattr(subject.fresh_split(subject.middle), component), family)
        if not compare(got, expected):
            changes = f"with no layers, the {component} changes hidden states beyond its end"
            suspects = tuple(undeclared_inlets(family, subject.whole()))
            if not suspects and not family.enter_at_layers:
                by_none = "incoming states are changed, but by no module that could be named: set True"
                suspects = (Suspect("enter_at_layers", by_none),)
            raise ConformanceError(changes, suspects)


def _loss(model: Any, arguments: dict[str, Any]) -> torch.Tensor:
    loss: torch.Tensor = no_grad(model, **arguments).loss
    return loss


def _gradients(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
    """Return the loss, and the gradient of each parameter under each of its names; the model is unchanged."""
    inputs = batch(3)
    loss = model(**inputs, labels=labels_of(inputs)).loss
    named = dict(_parameters(model))
    unique = list({id(parameter): parameter for parameter in named.values()}.values())
    gradients = torch.autograd.grad(loss, unique, allow_unused=True)
    by_parameter = dict(zip(map(id, unique), gradients, strict=True))
    return loss.detach(), {name: by_parameter[id(parameter)] for name, parameter in named.items()}


def _parameters(model: Any) -> list[tuple[str, nn.Parameter]]:
    parts = getattr(model, "components", (model,))
    return [named for part in parts for named in part.named_parameters(remove_duplicate=False)]
