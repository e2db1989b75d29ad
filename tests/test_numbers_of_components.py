"""One cut, and more than two, in training and with adapters: what the unsplit model gives, bit for bit."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PrinterCallback, Trainer, TrainingArguments

from splitlearn_core import SplitCausalLM, load_adapter, load_split_model, merge_and_unload, save_adapter
from splitlearn_core.testing.worlds import tiny_model, write_checkpoint

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore:`(is_gradient_checkpointing|past_key_values)` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]

IDS = torch.tensor([[5, 17, 42, 99, 3, 8, 64], [1, 2, 3, 4, 5, 6, 7]])
NUMBERS = pytest.mark.parametrize("points", [(3,), (1, 2, 5), (1, 2, 3, 4, 5)], ids=lambda points: f"{len(points)}")


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    """Put back what accelerate leaves in the environment."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A qwen2 of six layers whose head is its embedding."""
    return write_checkpoint(tmp_path_factory.mktemp("model"), tiny_model("qwen2", tie_word_embeddings=True))


def unsplit(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=IDS).logits
    return found


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(each, right[name]) for name, each in left.items())


@NUMBERS
def test_the_trainer(folder: Path, tmp_path: Path, points: tuple[int, ...]) -> None:
    """Losses, parameters and the checkpoint that it saves are the unsplit model's."""
    pytest.importorskip("accelerate", minversion="1.3.0", reason="needs accelerate 1.3 or newer")
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    trained = []
    for number, model in enumerate((unsplit(folder), SplitCausalLM.from_pretrained(folder, split_points=points))):
        settings = TrainingArguments(
            output_dir=str(tmp_path / f"{number}"), max_steps=2, learning_rate=0.01, logging_steps=1,
            save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False, seed=1,
        )  # fmt: skip
        trainer = Trainer(model, settings, train_dataset=rows)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        trainer.save_model(str(tmp_path / f"{number}"))
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        trained.append((losses, load_file(tmp_path / f"{number}" / "model.safetensors")))
    (expected_losses, expected), (losses, got) = trained
    assert losses == expected_losses
    assert len(losses) == 2
    assert equal(got, expected)


@NUMBERS
def test_peft(folder: Path, tmp_path: Path, points: tuple[int, ...]) -> None:
    """An adapter that PEFT trains on a split model is the unsplit model's; so it is on components, and merged."""
    peft = pytest.importorskip("peft", reason="the extra peft is not installed")
    trained = []
    for name, model in (("whole", unsplit(folder)), ("split", SplitCausalLM(*load_split_model(None, points, folder)))):
        torch.manual_seed(3)
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, task_type="CAUSAL_LM", target_modules="all-linear"))
        optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.05)
        for _ in range(2):
            adapted.train()(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        adapted.save_pretrained(str(tmp_path / name))
        trained.append((load_file(tmp_path / name / "adapter_model.safetensors"), logits(adapted)))
    (expected, expected_logits), (got, got_logits) = trained
    assert equal(got, expected)
    assert torch.equal(got_logits, expected_logits)

    parts = load_split_model(None, points, folder)
    load_adapter(parts, tmp_path / "whole")
    assert torch.equal(logits(SplitCausalLM(*parts)), expected_logits)
    save_adapter(parts, tmp_path / "again")
    assert equal(load_file(tmp_path / "again" / "adapter_model.safetensors"), expected)
    merge_and_unload(parts)
    whole = peft.PeftModel.from_pretrained(unsplit(folder), tmp_path / "whole").merge_and_unload()
    assert torch.equal(logits(SplitCausalLM(*parts)), logits(whole))
