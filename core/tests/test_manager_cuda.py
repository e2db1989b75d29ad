"""The manager on a CUDA device; skipped, visibly, where there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from splitlearn_core import AsyncModelManager, InsufficientMemoryError, ModelConfig
from support.managing import charges, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device: its ledger was NOT tested"),
]


def trunk(folder: Path, **options: Any) -> ModelConfig:
    fields = {"model_id": "a", "model_type": "llama", "component": "trunk", "split_points": (2, 4), **options}
    return ModelConfig(model_path=str(folder), device="cuda:0", **fields)


def test_a_model_on_a_device_is_charged_to_that_device(llama: Any, single: Path) -> None:
    """It runs there, its bytes are in the device's own ledger, and all of them come back."""

    async def main() -> None:
        async with AsyncModelManager(min_residency=0) as models:
            await models.load_model(trunk(single))
            async with models.lease("a") as model:
                hidden = await model(hidden_states=torch.zeros(1, 3, 32, device="cuda:0"))
            assert hidden.device == torch.device("cuda:0")
            predicted = models.get_model_info("a").predicted
            assert predicted["cuda:0"] == sum(p.nbytes for p in model.model.parameters())
            assert charges(models)["cuda:0"] == predicted["cuda:0"]
            report = await models.unload_model("a")
            assert report.released["cuda:0"] == predicted["cuda:0"]
            assert "cuda:0" not in charges(models)

    run(main(), limit=120)


def test_a_model_that_a_device_cannot_hold_is_refused(llama: Any, single: Path) -> None:
    """By the limit of its own configuration, with the numbers; nothing is charged."""

    async def main() -> None:
        async with AsyncModelManager(min_residency=0) as models:
            with pytest.raises(InsufficientMemoryError, match="cuda:0"):
                await models.load_model(trunk(single, max_memory_mb=0.001))
            assert charges(models) == {}

    run(main(), limit=120)
