"""Checks of the family's components in a manager: loading, leasing, cancelling and unloading."""

from __future__ import annotations

import asyncio

import torch

from splitlearn_core import AsyncModelManager, LoadCancelledError, ModelConfig
from splitlearn_core.manager.loaders.loadable import LoadedModel, LoadPlan, ReportProgress
from splitlearn_core.manager.loaders.loader import ModelLoader
from splitlearn_core.testing.conformance.base import Checks, axes, explained
from splitlearn_core.testing.conformance.batches import batch, no_grad
from splitlearn_core.testing.conformance.findings import expect
from splitlearn_core.testing.conformance.numbers import compare
from splitlearn_core.testing.conformance.subject import Subject
from splitlearn_core.testing.managing import Gate, charges, closing, outcome_of, run
from splitlearn_core.types import Component, Progress

#: Seconds; generous, for busy machines.
_LIMIT = 120


@explained
class Managing(Checks):
    """Under ``AsyncModelManager``."""

    def test_managed_components(self, subjects: dict[str, Subject]) -> None:
        """Loaded and leased by the manager, the components compute the logits of the unsplit model."""
        subject = subjects[axes(type(self)).variants[0]]
        logits = run(_logits_of_leases(subject), limit=_LIMIT)
        expected = no_grad(subject.whole(), **batch(None), use_cache=False).logits
        expect(compare(logits, expected), "logits of the leased components differ")

    def test_cancelled_load(self, subjects: dict[str, Subject]) -> None:
        """A load that is cancelled while it reads frees all memory, and the next one succeeds."""
        subject = subjects[axes(type(self)).variants[0]]
        # A family that cannot be loaded fails here, without waiting for a timeout.
        subject.split(subject.middle)
        run(_cancelled(subject), limit=_LIMIT)


def _config(subject: Subject, component: str) -> ModelConfig:
    return ModelConfig(
        model_id=component,
        model_type=subject.family.model_type,
        model_path=str(subject.checkpoint),
        component=component,
        split_points=subject.middle,
    )


async def _logits_of_leases(subject: Subject) -> torch.Tensor:
    inputs = batch(None)
    mask, state = inputs["attention_mask"], inputs["input_ids"]
    async with closing(AsyncModelManager()) as manager:
        for component in Component:
            await manager.load_model(_config(subject, component))
            async with manager.lease(component) as model:
                state = await model(state, attention_mask=mask)
        logits: torch.Tensor = state.logits  # type: ignore[attr-defined]  # the top's output
        return logits


class _GatedLoader(ModelLoader):
    """A real loader, whose loads wait at a gate once they read."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    def load(self, config: ModelConfig, plan: LoadPlan, report: ReportProgress) -> LoadedModel:
        def gated_report(progress: Progress) -> None:
            report(progress)
            if progress.stage == "reading":
                self._gate.enter(report)

        return super().load(config, plan, gated_report)


async def _cancelled(subject: Subject) -> None:
    gate = Gate()
    config = _config(subject, "trunk")
    async with closing(AsyncModelManager(loader=_GatedLoader(gate))) as manager:
        load = outcome_of(manager.load_model(config))
        loading = asyncio.ensure_future(load)
        await gate.arrival()
        await manager.cancel_load(config.model_id)
        outcome = await loading
        expect(isinstance(outcome, LoadCancelledError), f"the cancelled load ended with {outcome!r}")
        expect(not charges(manager), f"memory stays charged: {charges(manager)}")
        gate.open()
        model = await manager.load_model(config)
        expect(not model.is_gone, "the model is gone as soon as it is loaded")
