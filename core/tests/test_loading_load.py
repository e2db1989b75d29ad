"""Loading components: only the requested ones, equal to the last bit."""

from __future__ import annotations

import itertools
import json
import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from splitlearn_core import Progress, SplitCausalLM, TensorMismatchError, load_split_model, plan_split
from support.long import cases

pytestmark = [pytest.mark.libs, pytest.mark.usefixtures("llama")]

CUTS = (2, 4)
IDS = torch.tensor([[5, 17, 42, 99, 3, 8, 64], [1, 2, 3, 4, 5, 6, 7]])
NAMES = ("bottom", "trunk", "top")


def logits_of(parts: Any) -> torch.Tensor:
    with torch.inference_mode():
        hidden = parts.trunk(hidden_states=parts.bottom(input_ids=IDS))
        logits: torch.Tensor = parts.top(hidden_states=hidden).logits
    return logits


def expected(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return logits


@pytest.mark.parametrize("cuts", list(itertools.combinations(range(1, 6), 2)), ids=str)
def test_every_cut_gives_the_whole_models_logits(single: Path, whole: Any, cuts: tuple[int, int]) -> None:
    """Bottom, trunk and top one after the other equal the unsplit model to the last bit."""
    assert torch.equal(logits_of(load_split_model("llama", cuts, single)), expected(whole))


@pytest.mark.parametrize("kind", ["single", "sharded", "tied"])
@pytest.mark.parametrize("strategy", ["auto", "mapped", "copied"])
def test_every_checkpoint_and_strategy_gives_the_same(
    checkpoint: Callable[[str], Path], whole: Any, tied_whole: Any, kind: str, strategy: str
) -> None:
    """One file or shards, tied or not, mapped or copied."""
    parts = load_split_model("llama", CUTS, checkpoint(kind), strategy=strategy)

    assert torch.equal(logits_of(parts), expected(tied_whole if kind == "tied" else whole))


@pytest.mark.parametrize("asked", [c for n in (1, 2, 3) for c in itertools.combinations(NAMES, n)], ids="+".join)
def test_a_part_that_was_not_requested_is_none(single: Path, asked: tuple[str, ...]) -> None:
    """The result names all three; the others are None."""
    parts = load_split_model("llama", CUTS, single, parts=asked)

    assert parts._fields == NAMES
    assert [name for name in NAMES if getattr(parts, name) is not None] == list(asked)
    for name in asked:
        assert (getattr(parts, name).component, getattr(parts, name).training) == (name, False)


@pytest.mark.parametrize("part", NAMES)
@pytest.mark.parametrize("strategy", ["mapped", "copied"])
def test_shards_of_other_parts_are_not_needed(sharded: Path, whole: Any, part: str, strategy: str) -> None:
    """A part loads, and is right, with every shard deleted that its plan does not name."""
    reference = getattr(load_split_model("llama", CUTS, sharded), part)
    state = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    needed = plan_split(sharded, CUTS, parts=[part]).shards
    others = [path for path in sharded.glob("*.safetensors") if path.name not in needed]
    assert others
    for path in others:
        path.unlink()

    loaded = getattr(load_split_model("llama", CUTS, sharded, parts=[part], strategy=strategy), part)

    assert loaded.state_dict().keys() == state.keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, state[name])


def test_bytes_of_other_parts_are_not_used(single: Path, whole: Any) -> None:
    """In a file of one piece, garbage outside the trunk's bytes changes nothing of the trunk."""
    plan = plan_split(single, CUTS)
    content = bytearray((single / "model.safetensors").read_bytes())
    for part in ("bottom", "top"):
        for tensor in plan.component(part).tensors:
            content[tensor.info.begin : tensor.info.end] = b"\xff" * tensor.info.nbytes
    (single / "model.safetensors").write_bytes(content)

    trunk = load_split_model("llama", CUTS, single, parts=["trunk"]).trunk

    for name, tensor in trunk.state_dict().items():  # type: ignore[union-attr]
        assert torch.equal(tensor, whole.state_dict()[name])


@pytest.mark.parametrize("kind", ["single", "tied"])
def test_tensors_keep_their_names(checkpoint: Callable[[str], Path], whole: Any, tied_whole: Any, kind: str) -> None:
    """The parts' state dicts together are the whole model's, layers with their own numbers."""
    parts = load_split_model("llama", CUTS, checkpoint(kind))
    model = tied_whole if kind == "tied" else whole
    together: dict[str, torch.Tensor] = {}

    for part in parts:
        assert not together.keys() & part.state_dict().keys()  # type: ignore[union-attr]
        together.update(part.state_dict())  # type: ignore[union-attr]

    assert together.keys() == model.state_dict().keys()
    for name, tensor in together.items():
        assert torch.equal(tensor, model.state_dict()[name])


@pytest.mark.parametrize("dtype", [torch.float16, "bfloat16", "torch.float64", "auto"], ids=str)
@pytest.mark.parametrize("strategy", ["mapped", "copied"])
def test_weights_take_on_the_dtype(single: Path, dtype: Any, strategy: str) -> None:
    """As ``from_pretrained`` does: parameters are converted, rotary frequencies stay exact."""
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(single, dtype=str(dtype).removeprefix("torch."))

    parts = load_split_model("llama", CUTS, single, dtype=dtype, strategy=strategy)

    assert torch.equal(logits_of(parts), expected(reference))
    assert {p.dtype for part in parts for p in part.parameters()} == {reference.dtype}  # type: ignore[union-attr]
    for part in parts:
        own = dict(part.named_buffers())  # type: ignore[union-attr]
        for name, buffer in reference.named_buffers():
            assert torch.equal(own[name], buffer)
            assert own[name].dtype == buffer.dtype


def test_a_checkpoint_of_halves_is_loaded_as_stored(llama: Any, tmp_path: Path) -> None:
    """``auto`` takes the dtype that config.json says."""
    from transformers import AutoModelForCausalLM

    from splitlearn_core.testing.worlds import tiny_model, write_checkpoint

    folder = write_checkpoint(tmp_path / "halves", tiny_model("llama", torch.bfloat16))

    parts = load_split_model("llama", CUTS, folder)

    assert {p.dtype for part in parts for p in part.parameters()} == {torch.bfloat16}  # type: ignore[union-attr]
    assert torch.equal(logits_of(parts), expected(AutoModelForCausalLM.from_pretrained(folder)))


@pytest.mark.parametrize("strategy", ["mapped", "copied"])
@pytest.mark.parametrize("part", NAMES)
def test_nothing_is_left_without_memory(single: Path, part: str, strategy: str) -> None:
    """No tensor is on the meta device; weights want gradients; the module is in evaluation mode throughout."""
    component = getattr(load_split_model("llama", CUTS, single, parts=[part], strategy=strategy), part)

    tensors = [*component.parameters(), *component.buffers()]
    assert tensors
    assert {tensor.device.type for tensor in tensors} == {"cpu"}
    assert all(isinstance(parameter, torch.nn.Parameter) for parameter in component.parameters())
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in component.parameters())
    assert not any(module.training for module in component.modules())


def test_a_load_leaves_the_process_as_it_was(single: Path) -> None:
    """Random state, default dtype, threads and gradient mode are the caller's."""
    torch.manual_seed(7)
    before = torch.get_rng_state()
    state = (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_device())

    load_split_model("llama", CUTS, single)

    assert torch.equal(torch.get_rng_state(), before)
    assert state == (
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.is_grad_enabled(),
        torch.get_default_device(),
    )


@pytest.mark.parametrize("default", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_the_callers_default_dtype_changes_nothing(single: Path, whole: Any, default: torch.dtype) -> None:
    """What is loaded depends on the checkpoint, not on the process."""
    torch.set_default_dtype(default)
    try:
        parts = load_split_model("llama", CUTS, single)
    finally:
        torch.set_default_dtype(torch.float32)

    assert torch.equal(logits_of(parts), expected(whole))


def test_weights_loaded_without_gradients_can_be_trained(single: Path, whole: Any) -> None:
    """The caller's gradient mode at the time of the load does not stick to the weights."""
    with torch.no_grad():
        parts = load_split_model("llama", CUTS, single)

    logits = parts.top(parts.trunk(parts.bottom(IDS))).logits  # type: ignore[misc]
    logits.sum().backward()

    assert torch.equal(logits.detach(), expected(whole))
    assert all(parameter.grad is not None for part in parts for parameter in part.parameters())  # type: ignore[union-attr]


def test_a_load_in_inference_mode_runs_in_inference_mode(single: Path, whole: Any) -> None:
    """A server that never trains may load and run within one block."""
    with torch.inference_mode():
        assert torch.equal(logits_of(load_split_model("llama", CUTS, single)), expected(whole))


def test_training_a_mapped_part_does_not_touch_the_file(single: Path) -> None:
    """Pages are private: a step of an optimiser changes this process's weights alone."""
    content = (single / "model.safetensors").read_bytes()
    trunk = load_split_model("llama", CUTS, single, parts=["trunk"], strategy="mapped").trunk
    assert trunk is not None
    before = {name: tensor.clone() for name, tensor in trunk.state_dict().items()}

    trunk(torch.randn(1, 3, 32)).sum().backward()
    torch.optim.SGD(trunk.parameters(), lr=0.1).step()

    assert any(not torch.equal(tensor, before[name]) for name, tensor in trunk.state_dict().items())
    assert (single / "model.safetensors").read_bytes() == content


@pytest.mark.parametrize("strategy", ["mapped", "copied"])
def test_a_tied_tensor_is_one_parameter(tied: Path, strategy: str) -> None:
    """Loaded in one call, embedding and head are the same object, so training keeps them tied."""
    parts = load_split_model("llama", CUTS, tied, strategy=strategy)

    assert parts.bottom.model.embed_tokens.weight is parts.top.lm_head.weight  # type: ignore[union-attr]
    assert plan_split(tied, CUTS).tied == ("model.embed_tokens.weight",)


def test_a_tied_head_alone_is_read_from_the_embedding(tied: Path, tied_whole: Any) -> None:
    """A top without its bottom has the tensor for itself."""
    top = load_split_model("llama", CUTS, tied, parts=["top"]).top

    assert torch.equal(top.lm_head.weight, tied_whole.model.embed_tokens.weight)  # type: ignore[union-attr]


def write_head(folder: Path, change: float) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone() + change
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_an_equal_head_in_the_file_is_tied(tied: Path, tied_whole: Any) -> None:
    """A checkpoint that holds the tied tensor twice gives one parameter all the same."""
    write_head(tied, 0.0)

    parts = load_split_model("llama", CUTS, tied)

    assert parts.bottom.model.embed_tokens.weight is parts.top.lm_head.weight  # type: ignore[union-attr]
    assert torch.equal(logits_of(parts), expected(tied_whole))


def test_an_unequal_head_in_the_file_is_kept_with_a_warning(tied: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Config says tied, the file says otherwise: the file's values win, and the log says so."""
    write_head(tied, 1.0)

    with caplog.at_level(logging.WARNING):
        parts = load_split_model("llama", CUTS, tied)

    assert not torch.equal(parts.bottom.model.embed_tokens.weight, parts.top.lm_head.weight)  # type: ignore[union-attr]
    assert "differ" in caplog.text
    alone = load_split_model("llama", CUTS, tied, parts=["top"]).top
    assert torch.equal(alone.lm_head.weight, parts.top.lm_head.weight)  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["single", "sharded", "tied"])
@pytest.mark.parametrize("asked", [NAMES, ("trunk",), ("bottom", "top")], ids="+".join)
def test_progress_counts_to_the_end(checkpoint: Callable[[str], Path], kind: str, asked: tuple[str, ...]) -> None:
    """Stages come in order, bytes only grow, and the last report is complete."""
    reports: list[Progress] = []

    load_split_model("llama", CUTS, checkpoint(kind), parts=asked, progress=reports.append)

    stages = [stage for stage, _ in itertools.groupby(report.stage for report in reports)]
    reading = [report for report in reports if report.stage == "reading"]
    assert stages[0] == "resolving"
    assert stages[-4:] == ["importing", "building", "reading", "ready"]
    assert [report.bytes_done for report in reading] == sorted({report.bytes_done for report in reading})
    assert reading[-1].bytes_done == reading[-1].bytes_total > 0
    assert len({report.bytes_total for report in reading}) == 1
    assert reports[-1].bytes_done == reports[-1].bytes_total > 0
    assert list(dict.fromkeys(report.component for report in reading)) == list(asked)
    assert [report.component for report in reports if report.stage == "building"] == list(asked)


def test_no_progress_is_shown_without_a_terminal(single: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Stdout stays empty, and so does a stderr that is no terminal."""
    load_split_model("llama", CUTS, single)
    load_split_model("llama", CUTS, single, progress=False)

    assert capsys.readouterr() == ("", "")


def test_two_loads_at_once_are_both_right(checkpoint: Callable[[str], Path], whole: Any, tied_whole: Any) -> None:
    """Threads that start together get whole, correct, separate models, round after round."""
    jobs = [("single", "auto", whole), ("tied", "copied", tied_whole), ("sharded", "mapped", whole)]
    folders = {kind: checkpoint(kind) for kind, _, _ in jobs}

    for _ in range(5):
        barrier = threading.Barrier(len(jobs))

        def load(job: tuple[str, str, Any], barrier: threading.Barrier = barrier) -> Any:
            barrier.wait(30)
            return load_split_model("llama", CUTS, folders[job[0]], strategy=job[1])

        with ThreadPoolExecutor(len(jobs)) as pool:
            loaded = list(pool.map(load, jobs))

        for (_, _, model), parts in zip(jobs, loaded, strict=True):
            assert torch.equal(logits_of(parts), expected(model))


def test_loads_of_two_dtypes_at_once_do_not_mix(single: Path) -> None:
    """One thread's dtype is not another's."""
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.float64]

    for _ in range(3):
        barrier = threading.Barrier(len(dtypes))

        def load(dtype: torch.dtype, barrier: threading.Barrier = barrier) -> Any:
            barrier.wait(30)
            return load_split_model("llama", CUTS, single, dtype=dtype).trunk

        with ThreadPoolExecutor(len(dtypes)) as pool:
            trunks = list(pool.map(load, dtypes))

        assert [{p.dtype for p in trunk.parameters()} for trunk in trunks] == [{dtype} for dtype in dtypes]
        assert all(trunk.model.rotary_emb.inv_freq.dtype == torch.float32 for trunk in trunks)


def test_the_first_use_of_a_plugin_by_many_threads(world: Any, single: Path) -> None:
    """A plugin that no thread has imported yet is imported once."""
    world.install("alpha", world.marking("alpha").replace("touch()", "touch(exist_ok=False)") + world.source("alpha"))
    from splitlearn_core.plugins.registry import registry

    barrier = threading.Barrier(8)

    def use(_: int) -> Any:
        barrier.wait(30)
        return registry().family("alpha")

    with ThreadPoolExecutor(8) as pool:
        families = list(pool.map(use, range(8)))

    assert len({id(family) for family in families}) == 1


def test_a_family_of_mixed_layers_is_built_the_long_way(world: Any, single: Path, whole: Any) -> None:
    """``uniform_layers=False`` gives the same components."""
    source = world.source("llama").replace('architecture="', 'uniform_layers=False, architecture="')
    (world.folder / "splitlearn_llama-1.0.dist-info" / "entry_points.txt").unlink()
    world.install("llama", source, distribution="splitlearn-mixed")
    state = torch.get_rng_state()

    parts = load_split_model("llama", CUTS, single)

    assert parts.trunk.family.uniform_layers is False  # type: ignore[union-attr]
    assert torch.equal(logits_of(parts), expected(whole))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_plugins_key_mapping_is_used(world: Any, single: Path, whole: Any) -> None:
    """A checkpoint with names of its own loads through the mapping hook."""
    tensors = load_file(single / "model.safetensors")
    renamed = {"own." + name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file({**renamed, "own.junk": torch.zeros(2)}, single / "model.safetensors", metadata={"format": "pt"})
    source = world.source("llama") + (
        "\n\n@hookimpl\ndef splitlearn_map_weight_keys(family, config, checkpoint_keys):\n"
        "    names = {key: key.replace('own.', 'model.') for key in checkpoint_keys}\n"
        "    return {**names, 'own.lm_head.weight': 'lm_head.weight', 'own.junk': None}\n"
    )
    (world.folder / "splitlearn_llama-1.0.dist-info" / "entry_points.txt").unlink()
    world.install("llama", source, distribution="splitlearn-mapped")

    assert torch.equal(logits_of(load_split_model("llama", CUTS, single)), expected(whole))


def test_generation_settings_come_along(single: Path) -> None:
    """``generation_config.json`` is read as ``from_pretrained`` would."""
    path = single / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "max_new_tokens": 13, "eos_token_id": 77}))

    parts = load_split_model("llama", CUTS, single)

    generation = SplitCausalLM(*parts).generation_config  # type: ignore[arg-type]
    assert (generation.max_new_tokens, generation.eos_token_id) == (13, 77)


def test_the_plan_is_what_is_loaded(single: Path) -> None:
    """Parameters and bytes of every component are those of its plan."""
    plan = plan_split(single, CUTS)
    parts = load_split_model("llama", CUTS, single)

    for name in NAMES:
        tensors = list(getattr(parts, name).parameters())
        assert plan.component(name).parameters == sum(tensor.numel() for tensor in tensors)
        assert plan.component(name).loaded_bytes(plan.dtype) == sum(tensor.nbytes for tensor in tensors)
    with pytest.raises(KeyError):
        plan_split(single, CUTS, parts=["trunk"]).component("top")


def test_splitting_generates_what_the_whole_generates(single: Path, whole: Any) -> None:
    """Greedy text through the three components equals the unsplit model's."""
    split = SplitCausalLM(*load_split_model("llama", CUTS, single))  # type: ignore[arg-type]
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(IDS)}

    assert torch.equal(split.generate(IDS, **options), whole.generate(IDS, **options))


#: Loads from several threads at once in a process that has imported nothing yet.
FIRST_LOADS = """
import sys, threading
from concurrent.futures import ThreadPoolExecutor
from splitlearn_core import load_split_model

barrier = threading.Barrier(4)

def load(number):
    barrier.wait(60)
    return load_split_model("llama", (2, 4), sys.argv[1 + number % 2])

with ThreadPoolExecutor(4) as pool:
    loaded = list(pool.map(load, range(4)))

import torch
ids = torch.tensor([[5, 17, 42]])
with torch.inference_mode():
    logits = [parts.top(parts.trunk(parts.bottom(ids))).logits for parts in loaded]
assert torch.equal(logits[0], logits[2]) and torch.equal(logits[1], logits[3])
assert all(bool(value.isfinite().all()) for value in logits)
print("equal")
"""


@pytest.mark.slow
def test_the_first_loads_of_a_process_may_come_together(
    llama: Any, checkpoint: Callable[[str], Path], whole: Any
) -> None:
    """Four threads that also race for the imports of torch and transformers; no import warns or prints."""
    folders = [str(checkpoint(kind)) for kind in ("single", "tied")]

    for _ in range(cases(2, 1)):
        done = llama.python("-W", "error", "-c", FIRST_LOADS, *folders)

        assert (done.returncode, done.stdout, done.stderr) == (0, "equal\n", "")


def test_logs_and_stdout_stay_separate(llama: Any, single: Path) -> None:
    """A process that loads a model writes nothing to either by itself; that its imports do not, the race shows."""
    code = "import sys; from splitlearn_core import load_split_model; load_split_model('llama', (2, 4), sys.argv[1])"

    done = llama.warm_python("-W", "error", "-c", code, str(single))

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_plan_names_layers_without_tensors(single: Path) -> None:
    """A config.json that counts more layers than the file holds is not planned silently."""
    path = single / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_hidden_layers": 8}))

    with pytest.raises(TensorMismatchError, match=r"every tensor of layer \{6-7\}"):
        plan_split(single, CUTS)
