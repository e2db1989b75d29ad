"""Loading, examining and comparing models is independent of the caller's modes: gradients, dtype, device, autocast."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from splitlearn_core import ModelRegistry, SplitCausalLM, load_component, load_split_model, save_split
from splitlearn_core.build.torch_state import own_state
from splitlearn_core.generation import Sampling, generate_text
from splitlearn_core.loading.opening import open_model
from splitlearn_core.loading.options import LoadOptions
from splitlearn_core.testing.worlds import tiny_model
from splitlearn_core.verification import Verification, verify_split
from support.process_state import read_state

pytestmark = [pytest.mark.libs, pytest.mark.usefixtures("llama")]

CUTS = (2, 4)
IDS = torch.tensor([[5, 17, 42, 99, 3, 8, 64], [1, 2, 3, 4, 5, 6, 7]])


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def everything() -> Iterator[None]:
    with torch.inference_mode(), default_dtype(torch.float64), torch.autocast("cpu"), torch.device("meta"):
        yield


MODES: dict[str, Callable[[], Any]] = {
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
    "default dtype": lambda: default_dtype(torch.float64),
    "default device": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "everything": everything,
}
in_each_mode = pytest.mark.parametrize("mode", MODES.values(), ids=list(MODES))


def check_trainable(split: SplitCausalLM, whole: Any) -> None:
    """Loss and gradients are the unsplit model's, to the last bit."""
    # A copy, because the model is the session's.
    same = tiny_model("llama")
    same.load_state_dict(whole.state_dict())
    loss, expected = (model(input_ids=IDS, labels=IDS).loss for model in (split, same))
    assert torch.equal(loss, expected)
    loss.backward()
    expected.backward()
    gradients = {name: parameter.grad for name, parameter in same.named_parameters()}
    parts = (split.bottom, split.trunk, split.top)
    got = {name: parameter.grad for part in parts for name, parameter in part.named_parameters()}
    assert got.keys() == gradients.keys()
    assert all(torch.equal(got[name], gradients[name]) for name in gradients)


@pytest.mark.sample(12)
@in_each_mode
@pytest.mark.parametrize("strategy", ["mapped", "copied", "incremental", "whole"])
def test_what_is_loaded_can_be_trained(single: Path, whole: Any, mode: Callable[[], Any], strategy: str) -> None:
    """Parameters are normal tensors, as from_pretrained makes them in inference mode, and buffers as well."""
    with mode():
        parts = load_split_model("llama", CUTS, single, strategy=strategy)

    tensors = [tensor for part in parts for tensor in (*part.parameters(), *part.buffers())]  # type: ignore[union-attr]
    assert not any(tensor.is_inference() for tensor in tensors)
    assert {(tensor.dtype, tensor.device.type) for tensor in tensors} == {(torch.float32, "cpu")}
    check_trainable(SplitCausalLM(*parts), whole)


@in_each_mode
def test_what_was_saved_can_be_trained(single: Path, whole: Any, mode: Callable[[], Any], tmp_path: Path) -> None:
    """Components that come out of folders of their own."""
    with mode():
        save_split(single, tmp_path / "parts", split_points=CUTS)
        parts = [load_component(tmp_path / "parts", name) for name in ("bottom", "trunk", "top")]

    check_trainable(SplitCausalLM(*parts), whole)


@in_each_mode
def test_what_is_made_of_a_state_dict_can_be_trained(whole: Any, mode: Callable[[], Any]) -> None:
    """Also of one whose tensors were made in inference mode."""
    bounds = {"bottom": (None, 2), "trunk": (2, 4), "top": (4, None)}
    with mode():
        tensors = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
        parts = []
        for name, (start, end) in bounds.items():
            cls = ModelRegistry.get_model_class("llama", name)
            parts.append(cls.from_pretrained_split(tensors, whole.config, start_layer=start, end_layer=end))

    check_trainable(SplitCausalLM(*parts), whole)


def proof(folder: Path) -> Verification:
    return verify_split(open_model(folder), CUTS, "auto", LoadOptions(), lambda _: None)


@pytest.fixture(scope="module")
def proofs() -> dict[str, Verification]:
    """Return a place for the proof without a mode, which is the same for all of them."""
    return {}


@in_each_mode
def test_a_comparison_comes_out_as_without_the_mode(
    single: Path, mode: Callable[[], Any], proofs: dict[str, Verification]
) -> None:
    """The same checks, on the same numbers; and the caller's state is as it was."""
    expected = proofs.get("plain") or proofs.setdefault("plain", proof(single))
    with mode():
        before = read_state()
        got = proof(single)
        assert read_state() == before

    assert expected.equal
    assert (got.checks, got.max_difference, got.dtype) == (expected.checks, expected.max_difference, expected.dtype)


@in_each_mode
def test_text_is_generated_as_without_the_mode(single: Path, mode: Callable[[], Any]) -> None:
    """The tokenizer's tensors are on the model's device, and draws are those of the seed."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(101)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w2")
    split = SplitCausalLM(*load_split_model("llama", CUTS, single))

    def text() -> str:
        return generate_text(split, tokenizer, "w5 w17 w42", 8, Sampling(temperature=0.9, seed=3)).text

    expected = text()
    with mode():
        assert text() == expected


def test_the_kit_passes_in_every_mode(world: Any) -> None:
    """A process that begins with all of them set."""
    code = """
import torch
from splitlearn_core.plugins.registry import registry
from splitlearn_core.testing.running import run_kit
torch.set_default_dtype(torch.float64)
torch.set_default_device("meta")
torch.autocast("cpu").__enter__()
mode = torch.inference_mode()
mode.__enter__()
(report,) = run_kit([entry for entry in registry().entries if entry.name == "llama"], quick=True)
failed = [case for check in report.checks for case in check.cases if case.outcome == "failed"]
print(failed)
assert not failed
"""
    done = world.warm_python("-c", code)

    assert done.returncode == 0, done.stdout + done.stderr


def test_the_callers_state_comes_back_after_an_error() -> None:
    """Whatever ends the block."""
    with everything():
        before = read_state()
        try:
            with own_state(gradients=True):
                assert torch.ones(1, requires_grad=True).mul(2).requires_grad
                assert torch.ones(1).device.type == "cpu"
                raise ZeroDivisionError
        except ZeroDivisionError:
            assert read_state() == before
