"""Copying to a CUDA device; skipped, visibly, where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from splitlearn_core import LoadCancelledError, load_split_model
from splitlearn_core.checkpoint.safetensors_header import read_header
from splitlearn_core.loading_strategy import ReadPlan
from splitlearn_core.plan.splitplan import PlannedTensor
from splitlearn_core.readers import copied
from splitlearn_core.readers.copied import CopiedStrategy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device: copying to it was NOT tested"),
]

FILE = "model.safetensors"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", [4096, 2**20])
def test_tensors_arrive_to_the_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, size: int) -> None:
    """Many more pieces than there are buffers, converted on the way or not."""
    monkeypatch.setattr(copied, "STAGED_BYTES", size)
    tensors = {str(i): torch.rand(1000, 100 * i + 1) for i in range(8)} | {"ids": torch.arange(999)}
    save_file(tensors, tmp_path / FILE)
    planned = tuple(PlannedTensor(key, info) for key, info in read_header(tmp_path / FILE).items())
    read = dict(CopiedStrategy().read(ReadPlan(planned, {FILE: tmp_path / FILE}, "cuda:0", dtype)))

    for item, tensor in read.items():
        wanted = tensors[item.info.key]
        wanted = wanted.to(getattr(torch, dtype)) if wanted.is_floating_point() else wanted
        assert tensor.device == torch.device("cuda:0")
        assert torch.equal(tensor.cpu(), wanted)


def test_a_stopped_load_gives_the_devices_memory_back(llama: object, single: Path) -> None:
    """All that was allocated for it."""
    before = torch.cuda.memory_allocated()

    def stop(progress: object) -> None:
        if getattr(progress, "stage", "") == "reading":
            raise LoadCancelledError("stop")

    with pytest.raises(LoadCancelledError):
        load_split_model("llama", (2, 4), single, parts=["trunk"], device="cuda:0", progress=stop)

    assert torch.cuda.memory_allocated() == before
