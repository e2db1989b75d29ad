"""Loads side by side: hundreds in threads, of two dtypes and two kinds, and nothing of one shows in another."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
import torch
from torch import nn

from splitlearn_core.manager.config import ModelConfig
from splitlearn_core.manager.loaders.loader import ModelLoader
from splitlearn_core.manager.workers import run_in_thread
from support.long import cases

LOADS = cases(400, 50)
WORKERS = 6
DTYPES = {"float32": torch.float32, "float16": torch.float16}


def process_state() -> tuple[object, ...]:
    """Return all that transformers, torch and we ourselves put aside while a model is built."""
    return (
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_num_threads(),
        nn.Module.register_parameter,
        nn.Module.register_buffer,
        nn.Module.__setattr__,
        nn.Linear.reset_parameters,
        nn.init.normal_,
        nn.init.kaiming_uniform_,
        nn.init.uniform_,
        torch.empty,
        torch.zeros,
    )


def job(folder: Path, number: int) -> tuple[ModelConfig, torch.dtype]:
    """Return one of the kinds of loads in turn; every seventh is a whole model, which has to be alone."""
    name = list(DTYPES)[number % 2]
    common: dict[str, Any] = {"model_id": f"m{number}", "model_path": str(folder), "dtype": name}
    if number % 7 == 0:
        return ModelConfig(model_type="huggingface", **common), DTYPES[name]
    component = ("bottom", "trunk", "top")[number % 3]
    strategy = ("auto", "copied")[number // 2 % 2]
    config = ModelConfig(
        model_type="llama",
        component=component,
        split_points=(2, 4),
        strategy=strategy,
        warmup=number % 5 == 0,
        **common,
    )
    return config, DTYPES[name]


def test_loads_side_by_side_leave_no_trace(
    llama: Any, checkpoint: Callable[[str], Path], whole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each model is bit-equal to the reference; afterwards, and in threads that begin later, torch is as before."""
    folders = [checkpoint("single"), checkpoint("sharded")]
    monkeypatch.setattr("splitlearn_core.readers.views.CHUNK_BYTES", 1024)
    reference = {name: {k: v.to(dtype) for k, v in whole.state_dict().items()} for name, dtype in DTYPES.items()}
    before = process_state()
    numbers = itertools.count()
    problems: list[str] = []
    done: SimpleQueue[object] = SimpleQueue()
    ready = threading.Barrier(WORKERS, timeout=60)

    def work() -> None:
        ready.wait()
        for number in numbers:
            if number >= LOADS:
                return
            config, dtype = job(folders[number % 2], number)
            module = ModelLoader.load_from_config(config)
            for key, tensor in module.state_dict().items():
                if tensor.dtype != dtype or not torch.equal(tensor, reference[config.dtype][key]):
                    problems.append(f"{config.model_type} {config.component} {config.dtype}: {key} is {tensor.dtype}")
            if not module.get_submodule("model").rotary_emb.inv_freq.isfinite().all():
                problems.append(f"{config.model_type} {config.component} {config.dtype}: inv_freq")

    for number in range(WORKERS):
        run_in_thread(f"load-{number}", work, done.put, torch_threads=1 + number % 2)
    outcomes = [done.get(timeout=120) for _ in range(WORKERS)]

    assert outcomes == [None] * WORKERS
    assert problems == []
    assert process_state() == before
    later: SimpleQueue[Any] = SimpleQueue()
    run_in_thread("later", process_state, later.put)
    assert later.get(timeout=60) == before
