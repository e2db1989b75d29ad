"""A trunk that runs elsewhere gives the results of the unsplit model to the last bit, over each carrier."""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

# It imports scikit-learn where that is installed, which sets variables of the environment.
from transformers.generation import candidate_generator  # noqa: F401

from splitlearn_core import SplitCausalLM, load_split_model
from splitlearn_core.extension import cache_argument
from splitlearn_core.hosts.sessions import SessionTable
from splitlearn_core.testing.worlds import tiny_model, write_checkpoint
from support.hosts import CARRIERS, MemoryEndpoint, hosting, lost, remote

SPLIT = (2, 4)
#: Carriers are tried with one family, and families over one carrier.
CASES = [
    *(("qwen2", "float32", carrier) for carrier in CARRIERS),
    ("qwen2", "bfloat16", "memory"),
    *((family, dtype, "memory") for family in ("gpt2", "gemma3_text") for dtype in ("float32", "bfloat16")),
    ("gemma2", "float32", "memory"),
]


@functools.cache
def models(family: str, dtype: str) -> tuple[Any, Any]:
    """Return a model unsplit, and its components."""
    # A window that the sequences of these tests outgrow.
    values = {"sliding_window": 7} if family.startswith("gemma") and family != "gemma" else {}
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), tiny_model(family, **values))
        whole = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
        parts = load_split_model(None, SPLIT, folder, dtype=dtype, strategy="copied", progress=False)
    return whole.eval(), parts


@pytest.fixture(params=CASES, ids="-".join)
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[Any, Any]]:
    """A model unsplit, and the same with its trunk elsewhere."""
    family, dtype, carrier = request.param
    whole, parts = models(family, dtype)
    # Paths of Unix sockets are short.
    with tempfile.TemporaryDirectory() as folder, hosting(carrier, parts.trunk, Path(folder)) as trunk:
        yield whole, SplitCausalLM(parts.bottom, trunk, parts.top)


def tokens(rows: int, length: int) -> torch.Tensor:
    return torch.randint(3, 90, (rows, length), generator=torch.Generator().manual_seed(rows * 100 + length))


def padded() -> dict[str, torch.Tensor]:
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[0, :4] = mask[1, :2] = 0
    return {"input_ids": tokens(3, 9), "attention_mask": mask}


def generated(model: Any, inputs: dict[str, Any], **arguments: Any) -> torch.Tensor:
    torch.manual_seed(1)
    output: torch.Tensor = model.generate(**inputs, max_new_tokens=12, pad_token_id=0, eos_token_id=None, **arguments)
    return output


@torch.no_grad()
def test_logits_are_equal(pair: tuple[Any, Any]) -> None:
    """Without a cache, padded on the left; labels too."""
    inputs = padded()
    expected, actual = (model(**inputs, labels=inputs["input_ids"], use_cache=False) for model in pair)
    assert torch.equal(expected.logits, actual.logits)
    assert torch.equal(expected.loss, actual.loss)


@torch.no_grad()
def test_recorded_states_are_equal(pair: tuple[Any, Any]) -> None:
    """Hidden states of all layers, those elsewhere too."""
    expected, actual = (model(tokens(2, 5), output_hidden_states=True).hidden_states for model in pair)
    assert len(expected) == len(actual)
    assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))


@pytest.mark.parametrize(
    "arguments",
    [
        {"do_sample": False},
        {"do_sample": True, "num_return_sequences": 3},
        {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_beams": 2},
    ],
    ids=["greedy", "sampled", "beams", "sampled beams"],
)
def test_generation_is_equal(pair: tuple[Any, Any], arguments: dict[str, Any]) -> None:
    """Prefill and decoding with a cache; beams reorder it."""
    whole, split = pair
    assert torch.equal(generated(whole, padded(), **arguments), generated(split, padded(), **arguments))


@pytest.mark.parametrize("way", ["prompt lookup", "assisted"])
def test_drafted_tokens_are_equal(pair: tuple[Any, Any], way: str) -> None:
    """Tokens that were drafted in vain are taken out of the cache again."""
    whole, _ = pair
    ids = tokens(1, 6).repeat(1, 3)
    arguments = {"prompt_lookup_num_tokens": 3} if way == "prompt lookup" else {"assistant_model": whole}
    expected, actual = (generated(model, {"input_ids": ids}, do_sample=False, **arguments) for model in pair)
    assert torch.equal(expected, actual)


@torch.no_grad()
def test_a_cache_goes_on_is_copied_and_cropped(pair: tuple[Any, Any]) -> None:
    """Over several calls; a copy and its original go different ways."""
    whole, split = pair
    name = cache_argument(whole.forward)

    def run(model: Any) -> list[torch.Tensor]:
        first = DynamicCache(config=whole.config)
        logits = [model(tokens(2, 5), **{name: first}).logits]
        second = copy.deepcopy(first)
        logits.append(model(tokens(2, 3), **{name: first}).logits)
        logits.append(model(tokens(2, 1), **{name: second}).logits)
        second.crop(-2)
        logits.append(model(tokens(2, 2), **{name: second}).logits)
        logits.append(model(tokens(2, 4), **{name: first}).logits)
        assert first.get_seq_length() == 12
        return logits

    for expected, actual in zip(run(whole), run(split), strict=True):
        assert torch.equal(expected, actual)


def test_a_conversation_goes_on(pair: tuple[Any, Any]) -> None:
    """One cache over two calls of generate."""
    whole, split = pair

    def run(model: Any) -> torch.Tensor:
        cache = DynamicCache(config=whole.config)
        name = cache_argument(whole.forward)
        begun = generated(model, {"input_ids": tokens(1, 5)}, do_sample=False, **{name: cache})
        going_on = torch.cat([begun, tokens(1, 3)], dim=1)
        return generated(model, {"input_ids": going_on}, do_sample=False, **{name: cache})

    assert torch.equal(run(whole), run(split))


def test_gradients_are_equal(pair: tuple[Any, Any]) -> None:
    """Of everything that is here, through what is elsewhere."""
    whole, split = pair
    ids = tokens(2, 6)
    losses = [model(ids, labels=ids, use_cache=False).loss for model in pair]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    expected = dict(whole.named_parameters())
    here = dict(split.named_parameters())
    assert here
    assert all(parameter.grad is not None for parameter in here.values())
    different = [name for name, parameter in here.items() if not torch.equal(parameter.grad, expected[name].grad)]
    whole.zero_grad()
    split.zero_grad()
    assert different == []


# --- bad luck -------------------------------------------------------------------------------------------


@pytest.fixture
def endpoint() -> MemoryEndpoint:
    """A host whose messages can be made to fail."""
    _, parts = models("qwen2", "float32")
    return MemoryEndpoint(lambda: SessionTable(parts.trunk))


def used(endpoint: MemoryEndpoint, **arguments: Any) -> SplitCausalLM:
    _, parts = models("qwen2", "float32")
    return SplitCausalLM(parts.bottom, remote(endpoint, **arguments), parts.top)


#: Name of a fault -> makes it happen at a message: carried out or not, and with or without a restart of the host.
FAULTS: dict[str, Callable[[MemoryEndpoint, int], None]] = {}


def _fault(name: str, *, is_done: bool, restarts: bool) -> None:
    def arm(endpoint: MemoryEndpoint, boundary: int) -> None:
        def strike(number: int, _: Any) -> None:
            if number == boundary:
                if restarts:
                    endpoint.restart()
                raise lost()

        if is_done:
            endpoint.after = strike
        else:
            endpoint.before = strike

    FAULTS[name] = arm


_fault("request lost", is_done=False, restarts=False)
_fault("reply lost", is_done=True, restarts=False)
_fault("restarted before", is_done=False, restarts=True)
_fault("restarted after", is_done=True, restarts=True)


@pytest.mark.parametrize("arguments", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
@pytest.mark.parametrize("fault", FAULTS)
def test_text_goes_on_after_a_fault_at_any_message(
    endpoint: MemoryEndpoint, fault: str, arguments: dict[str, Any]
) -> None:
    """Each message of a generation is lost, or is the last one of a host that comes back without its sessions."""
    whole, _ = models("qwen2", "float32")
    expected = generated(whole, padded(), do_sample=False, **arguments)
    assert torch.equal(generated(used(endpoint), padded(), do_sample=False, **arguments), expected)
    messages = endpoint.count
    assert messages >= 13
    for boundary in range(1, messages + 1):
        endpoint.count = 0
        FAULTS[fault](endpoint, boundary)
        assert torch.equal(generated(used(endpoint), padded(), do_sample=False, **arguments), expected), boundary
        endpoint.before = endpoint.after = lambda number, frame: None


def test_drafted_text_goes_on_after_a_restart(endpoint: MemoryEndpoint) -> None:
    """The journal has what was taken out of the cache."""
    whole, _ = models("qwen2", "float32")
    inputs = {"input_ids": tokens(1, 6).repeat(1, 3)}
    arguments = {"do_sample": False, "prompt_lookup_num_tokens": 3}
    expected = generated(whole, inputs, **arguments)
    generated(used(endpoint), inputs, **arguments)
    for boundary in range(1, endpoint.count + 1):
        endpoint.count = 0
        FAULTS["restarted after"](endpoint, boundary)
        assert torch.equal(generated(used(endpoint), inputs, **arguments), expected), boundary
        endpoint.after = lambda number, frame: None
