"""Training with the trunk elsewhere: losses, gradients and parameters of the unsplit model, bit for bit."""

from __future__ import annotations

import copy
import functools
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from splitlearn_core import SplitCausalLM, connect, load_split_model
from splitlearn_core.hosts import calls
from splitlearn_core.hosts.protocol import Frame, Kind
from splitlearn_core.hosts.sessions import SessionTable
from splitlearn_core.testing.worlds import tiny_model, write_checkpoint
from support.hosts import MemoryEndpoint, lost, remote
from support.long import LONG
from support.training import (
    Learned,
    Recipe,
    adapted,
    clipped,
    differences,
    host_process,
    names_of_ends,
    pairwise,
    train,
)

peft = pytest.importorskip("peft", reason="the extra peft is not installed")

pytestmark = [
    pytest.mark.libs,
    # Of PEFT's and torch's own making, on the unsplit model too.
    pytest.mark.filterwarnings("ignore"),
]

SPLIT = (2, 4)
CHOICES: dict[str, tuple[Any, ...]] = {
    "family": ("qwen2", "gpt2", "gemma"),
    "dropout": (0.1, 0.0),
    "accumulation": (1, 4),
    "clip": (0.0, 0.05),
    "tied": (True, False),
    "checkpointing": ("", "reentrant", "plain"),
    "batch": ("padded", "packed"),
    "ends": (False, True),
    "dtype": ("float32", "bfloat16"),
}
CASES = [Recipe(**case) for case in pairwise(CHOICES)]
if LONG:
    import itertools

    CASES = [Recipe(*values) for values in itertools.product(*CHOICES.values())]


@functools.cache
def checkpoint(recipe: Recipe) -> tempfile.TemporaryDirectory[str]:
    """Return a folder with the model of a recipe."""
    folder = tempfile.TemporaryDirectory()
    write_checkpoint(Path(folder.name), tiny_model(recipe.family, **recipe.values))
    return folder


def folder_of(recipe: Recipe) -> str:
    model = Recipe(family=recipe.family, dropout=recipe.dropout, tied=recipe.tied)
    return checkpoint(model).name


def whole(recipe: Recipe) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder_of(recipe), dtype=getattr(torch, recipe.dtype))


def loaded(recipe: Recipe, *parts: str) -> Any:
    return load_split_model(
        None, SPLIT, folder_of(recipe), parts=parts, dtype=recipe.dtype, strategy="copied", progress=False
    )


def endpoint_of(recipe: Recipe) -> MemoryEndpoint:
    trunk = loaded(recipe, "trunk").trunk
    return MemoryEndpoint(lambda: SessionTable(trunk))


def split_model(recipe: Recipe, trunk: Any) -> SplitCausalLM:
    ends = loaded(recipe, "bottom", "top")
    return SplitCausalLM(ends.bottom, trunk, ends.top)


def prepared(model: Any, recipe: Recipe, split: Any) -> Any:
    return adapted(model, recipe, names_of_ends(split) if recipe.ends else None)


@functools.cache
def unsplit(recipe: Recipe, steps: int = 20) -> Learned:
    """Train the unsplit model."""
    template = split_model(recipe, loaded(recipe, "trunk").trunk) if recipe.ends else None
    if template is not None:
        # What the components at the ends have, and the layers between them do not.
        inside = tuple(f".{number}." for number in range(*SPLIT))
        names = [name for name in names_of_ends(template) if not any(part in name for part in inside)]
        return train(adapted(whole(recipe), recipe, names), recipe, steps)
    return train(adapted(whole(recipe), recipe), recipe, steps)


def trained(recipe: Recipe, trunk: Any, steps: int = 20, **arguments: Any) -> Learned:
    """Train the same with its trunk elsewhere."""
    split = split_model(recipe, trunk)
    return train(prepared(split, recipe, split), recipe, steps, **arguments)


@pytest.mark.parametrize("recipe", CASES, ids=lambda recipe: recipe.name)
def test_training_is_equal(recipe: Recipe) -> None:
    """Over a balanced sample of what can be combined; with ``LONG_TESTS``, over everything."""
    expected = unsplit(recipe)
    assert differences(expected, trained(recipe, remote(endpoint_of(recipe)))) == []
    if recipe.clip:
        norms = [torch.cat([g.flatten() for g in step.values()]).norm() for step in expected.gradients]
        assert all(norm < 1.01 * recipe.clip for norm in norms)


@pytest.mark.parametrize("kind", ["IA3Config", "LoHaConfig", "LoKrConfig"])
def test_other_kinds_of_adapters_are_equal(kind: str) -> None:
    """Those that need no weights of the model."""
    recipe = Recipe(kind=kind, clip=0.05)
    assert differences(unsplit(recipe), trained(recipe, remote(endpoint_of(recipe)))) == []


def test_settings_of_modules_and_layers_are_equal() -> None:
    """Ranks and scalings by pattern, a scaling that is changed later, and adapters on the trunk alone."""
    recipe = Recipe(family="gpt2")

    def run(model: Any) -> Learned:
        settings = {
            "r": 4,
            "rank_pattern": {"c_attn": 2, r".*\.3\.mlp\.c_proj": 6},
            "alpha_pattern": {"c_attn": 5},
            "use_rslora": True,
            "layers_to_transform": [2, 3],
            "lora_dropout": 0.1,
        }
        torch.manual_seed(1)
        config = peft.LoraConfig(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, **settings)
        wrapped = peft.get_peft_model(model, config)
        for layer in wrapped.modules():
            if isinstance(layer, peft.tuners.lora.LoraLayer):
                layer.scale_layer(1.5)
        return train(wrapped.train(), recipe, 4)

    expected = run(whole(recipe))
    assert len(expected.parameters) == 12
    assert differences(expected, run(split_model(recipe, remote(endpoint_of(recipe))))) == []


def test_two_adapters_are_equal() -> None:
    """Each for itself, both at once, and neither."""
    recipe = Recipe(dropout=0.0)
    batch = {"input_ids": torch.arange(3, 13)[None]}

    def run(model: Any) -> list[torch.Tensor]:
        wrapped = adapted(model, recipe).eval()
        torch.manual_seed(2)
        wrapped.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        logits = [wrapped(**batch).logits]
        wrapped.base_model.set_adapter(["default", "other"])
        logits.append(wrapped(**batch).logits)
        wrapped.set_adapter("other")
        logits.append(wrapped(**batch).logits)
        with wrapped.disable_adapter():
            logits.append(wrapped(**batch).logits)
        return logits

    with torch.no_grad():
        expected = run(whole(recipe))
        actual = run(split_model(recipe, remote(endpoint_of(recipe))))
    assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))
    assert len({tuple(logits.flatten().tolist()) for logits in expected}) == 4


def test_autocast_is_equal() -> None:
    """It is a thread's, and goes along with each call."""
    recipe = Recipe()

    def run(model: Any) -> Learned:
        wrapped = adapted(model, recipe)
        # As accelerate does.
        wrapped.forward = torch.autocast("cpu", torch.bfloat16)(wrapped.forward)
        return train(wrapped, recipe, 4)

    assert differences(run(whole(recipe)), run(split_model(recipe, remote(endpoint_of(recipe))))) == []


@pytest.mark.parametrize("arguments", [{"do_sample": True}, {"num_beams": 2}], ids=["sampled", "beams"])
def test_generation_between_steps_is_equal(arguments: dict[str, Any]) -> None:
    """With a cache at the host, in evaluation mode, with the adapters as they are at that moment."""
    recipe = Recipe()

    def run(model: Any) -> tuple[Learned, list[Any]]:
        wrapped, texts = adapted(model, recipe), []

        def generate(step: int) -> None:
            wrapped.eval()
            ids = torch.arange(3, 9)[None]
            state = torch.get_rng_state()
            texts.append(wrapped.generate(input_ids=ids, max_new_tokens=8, pad_token_id=0, eos_token_id=None, **arguments))
            torch.set_rng_state(state)
            wrapped.train()

        return train(wrapped, recipe, 5, after=generate), texts

    (expected, texts), (actual, others) = run(whole(recipe)), run(split_model(recipe, remote(endpoint_of(recipe))))
    assert differences(expected, actual) == []
    assert all(torch.equal(a, b) for a, b in zip(texts, others, strict=True))


# --- another process --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def elsewhere(warm: Any) -> Iterator[tuple[Recipe, str]]:
    """A recipe, and the URL of a process that serves the trunk of its model."""
    recipe = Recipe(family="gpt2", clip=0.05, accumulation=2)
    with tempfile.TemporaryDirectory() as folder:
        with host_process(warm.path, Path(folder_of(recipe)), Path(folder) / "trunk.sock") as url:
            yield recipe, url


def test_training_over_a_socket_is_equal(elsewhere: tuple[Recipe, str]) -> None:
    """The host is a process, with a generator of its own."""
    recipe, url = elsewhere
    trunk = connect(url)
    try:
        assert differences(unsplit(recipe), trained(recipe, trunk)) == []
    finally:
        trunk.close()


def test_random_numbers_that_stay_here_are_noticed(
    elsewhere: tuple[Recipe, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A control of the comparison: with others at the host, training is not equal."""
    recipe, url = elsewhere
    trunk = connect(url)
    monkeypatch.setattr(
        calls, "_states_of_generators", lambda device: {calls.RANDOM_CPU: torch.Generator().manual_seed(3).get_state()}
    )
    monkeypatch.setattr(calls, "_set_generators", lambda tensors, device: None)
    try:
        found = differences(unsplit(recipe, 3), trained(recipe, trunk, 3))
        assert found
        assert found[0].startswith("loss 0")
    finally:
        trunk.close()


def test_norms_that_are_added_by_part_are_noticed(elsewhere: tuple[Recipe, str]) -> None:
    """A control of the comparison: the norm over all parameters is not that over the norms of parts, in the last bits."""
    recipe, url = elsewhere
    trunk = connect(url)

    def by_part(parameters: list[Any], limit: float) -> None:
        half = len(parameters) // 2
        norms = [torch.nn.utils.get_total_norm([p.grad for p in part]) for part in (parameters[:half], parameters[half:])]
        total = torch.stack([norm**2 for norm in norms]).sum().sqrt()
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, total)

    try:
        assert differences(unsplit(recipe), trained(recipe, trunk, clip=by_part)) != []
    finally:
        trunk.close()


# --- bad luck ---------------------------------------------------------------------------------------------

#: Name of a fault -> whether the request is carried out, whether the host is restarted, and whether the reply is lost.
FAULTS = {
    "request lost": (False, False, True),
    "reply lost": (True, False, True),
    "restarted before": (False, True, True),
    "restarted after": (True, True, True),
    "repeated": (True, False, False),
    "delayed": (False, False, False),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_training_goes_on_after_a_fault_at_any_message(fault: str) -> None:
    """Each message is lost or repeated, comes a second time after the next one, or is the last one of a host."""
    recipe = Recipe(clip=0.05)
    steps = 2
    expected = unsplit(recipe, steps)
    endpoint = endpoint_of(recipe)
    assert differences(expected, trained(recipe, remote(endpoint), steps)) == []
    messages = endpoint.count
    # A description and tensors, a forward and a backward; and the same without the description.
    assert messages == 7
    is_done, restarts, is_lost = FAULTS[fault]
    for boundary in range(1, messages + 1):
        fresh = endpoint_of(recipe)
        earlier: list[Frame] = []

        def strike(number: int, frame: Frame, fresh: Any = fresh, earlier: Any = earlier, at: int = boundary) -> None:
            if fault == "delayed" and number == at + 1 and earlier:
                fresh.answered(earlier[-1])
            earlier.append(frame)
            if number != at:
                return
            if restarts:
                fresh.restart()
            if is_lost:
                raise lost()
            fresh.answered(frame)

        if is_done:
            fresh.after = strike
        else:
            fresh.before = strike
        assert differences(expected, trained(recipe, remote(fresh), steps)) == [], boundary


def test_an_adapter_that_is_not_kept_is_sent_again() -> None:
    """A host keeps as many bytes as it has room for; two users who share that still get their own results."""
    recipe = Recipe()
    expected = unsplit(recipe, 3)
    endpoint = endpoint_of(recipe)

    def forget(number: int, frame: Frame) -> None:
        if frame.kind is Kind.STEP:
            endpoint.table._training.forget()

    endpoint.after = forget
    assert differences(expected, trained(recipe, remote(endpoint), 3)) == []
    kinds = [frame.kind for frame in endpoint.frames]
    # A description and tensors for the first call, tensors for those of the other steps, and both for each way back.
    assert kinds.count(Kind.PUT) == 2 + 1 + 1 + 3 * 2
    assert kinds.count(Kind.BACKWARD) == 3 * 2


def test_owners_train_as_if_alone() -> None:
    """Two on one trunk, step by step in turn: each with its adapters, modes, random numbers and settings."""
    recipes = [Recipe(clip=0.05), Recipe(kind="LoHaConfig", ends=True, accumulation=2)]
    expected = [unsplit(recipe, 6) for recipe in recipes]
    first = endpoint_of(recipes[0])
    table = first.table
    results: list[Learned] = []

    def second(step: int) -> None:
        # A whole training of the other one in the midst of this one, and evaluation besides.
        endpoint = MemoryEndpoint(lambda: table)
        endpoint.owner = "other"
        state = torch.get_rng_state()
        if step == 2:
            results.append(trained(recipes[1], remote(endpoint), 6))
        else:
            with torch.no_grad():
                split_model(recipes[1], remote(endpoint)).train()(torch.arange(3, 9)[None])
        torch.set_rng_state(state)

    assert differences(expected[0], trained(recipes[0], remote(first), 6, after=second)) == []
    assert differences(expected[1], results[0]) == []


def test_a_split_model_is_copied_with_its_adapters() -> None:
    """The copy learns for itself, and its layers elsewhere take no memory either."""
    recipe = Recipe()
    endpoint = endpoint_of(recipe)
    split = split_model(recipe, remote(endpoint))
    wrapped = adapted(split, recipe)
    other = copy.deepcopy(wrapped)
    expected = unsplit(recipe, 2)
    assert differences(expected, train(other, recipe, 2)) == []
    assert differences(expected, train(wrapped, recipe, 2)) == []
    for name, parameter in other.named_parameters():
        if "layers.2." in name and not parameter.requires_grad:
            assert parameter.untyped_storage().nbytes() == parameter.element_size(), name
