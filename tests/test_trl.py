"""TRL's trainers on a split model: losses and parameters of the unsplit one, bit for bit."""

from __future__ import annotations

import copy
import importlib.resources
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from splitlearn_core import SplitCausalLM, connect, load_split_model
from splitlearn_core.hosts.sessions import SessionTable
from support.hosts import MemoryEndpoint, remote
from support.long import cases
from support.training import served_trunk
from support.warm import WarmInterpreter

trl = pytest.importorskip("trl", reason="trl is not installed")
peft = pytest.importorskip("peft", reason="the extra peft is not installed")
from datasets import Dataset  # noqa: E402  # comes with trl

pytestmark = [
    # trl asks for a newer accelerate than the oldest that core admits.
    pytest.mark.libs,
    pytest.mark.newest,
    # Of TRL's, PEFT's and datasets' own making, on the unsplit model too.
    pytest.mark.filterwarnings("ignore"),
]

TEXTS = ["My fellow citizens of the union", "We the people of the states", "The union is strong", "Be it so"] * 2
PREFERENCES = {
    "prompt": ["We the", "My fellow"] * 2,
    "chosen": [" people of", " citizens"] * 2,
    "rejected": [" union", " states of the"] * 2,
}
MEASURED = ("runtime", "per_second", "flos")


def lora() -> Any:
    return peft.LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True, lora_dropout=0.1, task_type="CAUSAL_LM")


@pytest.fixture(autouse=True)
def own_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Put back what trainers leave behind; tell data sets apart without pickling what makes them."""
    from accelerate.state import AcceleratorState
    from datasets.fingerprint import Hasher

    numbers = iter(range(10**6))
    # Some releases of dill, which it pickles with, do not know what pyarrow holds.
    monkeypatch.setattr(Hasher, "hash", classmethod(lambda cls, value: f"{next(numbers):016x}"))
    environment, verbosity = dict(os.environ), logging.get_verbosity()
    yield
    os.environ.clear()
    os.environ.update(environment)
    logging.set_verbosity(verbosity)
    AcceleratorState._reset_state(reset_partial_state=True)


def elsewhere(place: str) -> Any:
    """Return the bundled model split, with its trunk at a host."""
    parts = load_split_model("gpt2", (1, 5), place, dtype="float32")
    return SplitCausalLM(parts.bottom, remote(MemoryEndpoint(lambda: SessionTable(parts.trunk))), parts.top)


def here(place: str) -> Any:
    return SplitCausalLM(*load_split_model("gpt2", (1, 5), place, dtype="float32"))


def train(
    kind: Any,
    settings: Any,
    data: dict[str, list[str]],
    options: dict[str, Any],
    out: Path,
    split: Callable[[str], Any] = here,
) -> list[Any]:
    """Train the bundled model unsplit and split; return what was logged and learned of each."""
    place = str(importlib.resources.files("splitlearn_gpt2") / "bundled")
    tokenizer = AutoTokenizer.from_pretrained(place)
    tokenizer.pad_token = tokenizer.eos_token
    results = []
    for model in (
        AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32),
        split(place),
    ):
        own = dict(options)
        config = copy.deepcopy(own.pop("peft_config", None))
        arguments = settings(
            output_dir=str(out),
            **{
                "max_steps": 2, "per_device_train_batch_size": 2, "save_strategy": "no", "report_to": [],
                "logging_steps": 1, "use_cpu": True, "bf16": False, "disable_tqdm": True, "max_length": 16,
                "gradient_checkpointing": False,
                **own,
            },
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            trainer = kind(
                model,
                args=arguments,
                train_dataset=Dataset.from_dict(data),
                processing_class=tokenizer,
                peft_config=config,
            )
            trainer.train()
        logged = [
            {name: value for name, value in entry.items() if not any(word in name for word in MEASURED)}
            for entry in trainer.state.log_history
        ]
        own_weights = {
            name: each.detach().clone()
            for name, each in trainer.model.named_parameters()
            if split is here or each.requires_grad
        }
        results.append((logged, own_weights))
    return results


def compare(results: list[Any]) -> None:
    (expected_log, expected), (logged, learned) = results
    assert logged == expected_log
    assert any("loss" in entry for entry in logged)
    assert list(learned) == list(expected)
    assert all(torch.equal(each, expected[name]) for name, each in learned.items())


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "nll", "packing": True},
        {"loss_type": "dft"},
        {"loss_type": "chunked_nll"},
        {"loss_type": "chunked_nll", "peft_config": lora(), "gradient_checkpointing": True},
        {"padding_free": True, "max_length": None},
    ],
    ids=lambda options: "-".join(str(options.get(name, name)) if name == "loss_type" else name for name in options),
)
def test_sft_gives_the_unsplit_losses(options: dict[str, Any], tmp_path: Path) -> None:
    compare(train(trl.SFTTrainer, trl.SFTConfig, {"text": TEXTS}, options, tmp_path))


@pytest.mark.parametrize(
    "options", [{}, {"peft_config": lora()}, {"precompute_ref_log_probs": True}], ids=["full", "lora", "precomputed"]
)
def test_dpo_gives_the_unsplit_losses(options: dict[str, Any], tmp_path: Path) -> None:
    compare(train(trl.DPOTrainer, trl.DPOConfig, PREFERENCES, options, tmp_path))


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "nll", "packing": True, "max_steps": cases(30, 5), "bf16": True},
        {"loss_type": "chunked_nll", "gradient_checkpointing": True, "gradient_accumulation_steps": 2},
        {"padding_free": True, "max_length": None, "max_grad_norm": 0.1},
    ],
    ids=["packing", "chunked", "padding free"],
)
def test_sft_with_the_trunk_elsewhere_gives_the_unsplit_losses(options: dict[str, Any], tmp_path: Path) -> None:
    """Adapters everywhere, in the trunk too."""
    options = {**options, "peft_config": lora()}
    compare(train(trl.SFTTrainer, trl.SFTConfig, {"text": TEXTS}, options, tmp_path, elsewhere))


def test_thirty_steps_of_sft_through_a_server(warm: WarmInterpreter, tmp_path: Path) -> None:
    """The trunk is in a process of ``splitlearn serve``, and the learning rate, clipping and accumulation TRL's own."""
    place = str(importlib.resources.files("splitlearn_gpt2") / "bundled")
    options = {
        "peft_config": lora(), "max_steps": 30, "gradient_accumulation_steps": 2, "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine", "warmup_steps": 5, "max_grad_norm": 0.5,
    }  # fmt: skip
    with served_trunk(warm.path, place, 1, 5) as url:
        trunk = connect(url)

        def served(place: str) -> Any:
            ends = load_split_model("gpt2", (1, 5), place, parts=("bottom", "top"), dtype="float32")
            return SplitCausalLM(ends.bottom, trunk, ends.top)

        results = train(trl.SFTTrainer, trl.SFTConfig, {"text": TEXTS}, options, tmp_path, served)
        trunk.close()
    compare(results)
    assert sum("loss" in entry for entry in results[1][0]) == 30
    assert any(".2.attn" in name for name in results[1][1])


@pytest.mark.parametrize("options", [{}, {"precompute_ref_log_probs": True}], ids=["reference", "precomputed"])
def test_dpo_with_the_trunk_elsewhere_gives_the_unsplit_losses(options: dict[str, Any], tmp_path: Path) -> None:
    """The reference is the model without its adapters, or with other ones."""
    options = {**options, "peft_config": lora(), "max_steps": 4}
    compare(train(trl.DPOTrainer, trl.DPOConfig, PREFERENCES, options, tmp_path, elsewhere))
