"""Tensors of the module that are made of others in the file: planned, read, loaded, saved and merged."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, core_model_loading

from splitlearn_core import (
    BrokenPluginError,
    CheckpointError,
    ConfigurationError,
    ModelFamily,
    SplitCausalLM,
    TensorMismatchError,
    WeightConversion,
    WeightOperation,
    load_component,
    load_split_model,
    merge_split,
    plan_split,
    save_split,
)
from splitlearn_core.build import conversion_tables
from splitlearn_core.factory import ModelRegistry
from splitlearn_core.loading_strategy import ReadPlan
from splitlearn_core.plan.conversions import places_of
from splitlearn_core.plan.splitplan import PlannedTensor
from splitlearn_core.readers import copied, made_tensors, views
from splitlearn_core.readers.selection import BUILT_IN, predicted_bytes, read_checked
from splitlearn_core.readers.tensor_parts import make, part_of_source, part_of_target
from splitlearn_core.testing.worlds import tiny_model, write_checkpoint

pytestmark = pytest.mark.libs

CUTS, SINGLE = (2, 4), "model.safetensors"
IDS = torch.tensor([[5, 17, 42, 99, 3], [7, 1, 64, 23, 9]])
STRATEGIES = ("mapped", "copied", "incremental", "whole")
EXPERTS = 4
FAMILY = """
from splitlearn_core import ModelFamily, hookimpl


@hookimpl
def splitlearn_model_families():
    return [ModelFamily(model_type="{0}", architecture="{1}", transformers_tables=True, uniform_layers=False)]
"""
#: Experts of all layers but the first, whose gates transformers keeps in float32.
DEEPSEEK = {
    "num_key_value_heads": 4, "n_routed_experts": EXPERTS, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "moe_intermediate_size": 16, "q_lora_rank": 16, "kv_lora_rank": 16,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "head_dim": 8,
}  # fmt: skip


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("mixtral"), tiny_model("mixtral", num_local_experts=EXPERTS))


@pytest.fixture
def checkpoint(original: Path, tmp_path: Path, world: Any) -> Path:
    """Return a checkpoint with a tensor for each expert, in a world where its family is installed."""
    world.install("mixtral", FAMILY.format("mixtral", "MixtralForCausalLM"))
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for path in original.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(IDS).logits
    return result


def unsplit(folder: Path, dtype: str = "float32") -> torch.Tensor:
    return logits(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval())


def split(folder: Path, **options: Any) -> torch.Tensor:
    return logits(SplitCausalLM(*load_split_model(None, CUTS, folder, **options)))  # type: ignore[arg-type]


def rewrite(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    # A new file: the tensors may be views of the present one.
    (folder / SINGLE).unlink()
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / SINGLE, {"format": "pt"})


def expert(layer: int, number: int, name: str) -> str:
    return f"model.layers.{layer}.block_sparse_moe.experts.{number}.{name}.weight"


def conversion(operations: list[tuple[str, *tuple[int, ...]]], groups: list[int], targets: int = 1) -> WeightConversion:
    """Return a conversion of sources that are named ``GROUP.NUMBER``."""
    return WeightConversion(
        tuple(tuple(f"{group}.{number}" for number in range(count)) for group, count in enumerate(groups)),
        tuple(f"t{number}" for number in range(targets)),
        tuple(WeightOperation(name, dims) for name, *rest in operations for dims in (tuple(rest),)),
    )


# -- where each value lies --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operations", "groups", "shape", "expected"),
    [
        ([("stack", 0)], [3], (2, 5), lambda g: [torch.stack(g[0], 0)]),
        ([("stack", 1)], [3], (2, 5), lambda g: [torch.stack(g[0], 1)]),
        ([("stack", 0), ("concatenate", 1)], [3, 3], (2, 5), lambda g: [torch.cat([torch.stack(x) for x in g], 1)]),
        ([("concatenate", 1)], [1, 1, 1], (2, 5), lambda g: [torch.cat([x[0] for x in g], 1)]),
        ([("transpose", 0, 1)], [1], (2, 5), lambda g: [g[0][0].T]),
        ([("stack", 0), ("transpose", 1, 2)], [3], (2, 5), lambda g: [torch.stack(g[0]).transpose(1, 2)]),
        ([("chunk", 0)], [1], (6, 5), lambda g: list(g[0][0].chunk(3, 0))),
        ([("chunk", 1)], [1], (2, 6), lambda g: list(g[0][0].chunk(3, 1))),
        ([("transpose", 0, 1), ("chunk", 1)], [1], (6, 2), lambda g: list(g[0][0].T.chunk(3, 1))),
        ([("concatenate", 0), ("chunk", 0)], [1, 1], (3, 2), lambda g: list(torch.cat([g[0][0], g[1][0]]).chunk(3))),
    ],
)
def test_places_are_those_of_torch(operations: Any, groups: Any, shape: Any, expected: Any) -> None:
    """Each chain of operations puts every value where torch's own functions do, and back."""
    wanted = {}
    values = [[torch.randn(shape) for _ in range(count)] for count in groups]
    tensors = {f"{g}.{n}": tensor for g, group in enumerate(values) for n, tensor in enumerate(group)}
    results = expected(values)
    said = conversion(operations, groups, len(results))

    wanted = dict(zip(said.targets, results, strict=True))
    made = make(said, tensors)
    shapes, places = places_of(said, {key: tuple(tensor.shape) for key, tensor in tensors.items()})

    assert made.keys() == wanted.keys()
    assert all(torch.equal(made[name], wanted[name]) for name in wanted)
    assert shapes == {name: tuple(tensor.shape) for name, tensor in wanted.items()}
    for key, tensor in tensors.items():
        back = torch.full(shape, math.nan)
        for place in places[key]:
            part_of_source(back, place).copy_(part_of_target(made[place.target], place))
        assert torch.equal(back, tensor)


@pytest.mark.parametrize(
    ("said", "shapes", "reason"),
    [
        (conversion([("stack", 0)], [2]), {"0.0": (2, 3), "0.1": (2, 4)}, r"1 of \[1, 2, 3\], 1 of \[1, 2, 4\] differ"),
        (conversion([("chunk", 0)], [1], 2), {"0.0": (3, 3)}, r"\[3, 3\] cannot be cut into 2 along dimension 0"),
        (conversion([("transpose", 0, 2)], [1]), {"0.0": (3, 3)}, "does not fit"),
        (conversion([("stack", 0)], [1, 1]), {"0.0": (3,), "1.0": (3,)}, "2 tensors come of 2 tensors"),
        (WeightConversion((("a.0", "a.2"),), ("t",), (WeightOperation("stack", (0,)),)), {}, "there is no a.1"),
        (
            WeightConversion((("a.0", f"a.{10**18}"),), ("t",), (WeightOperation("stack", (0,)),)),
            {},
            "there is no a.1$",
        ),
    ],
)
def test_what_does_not_fit_together(said: WeightConversion, shapes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        places_of(said, shapes)


@pytest.mark.parametrize(
    "arguments",
    [
        {"sources": ("a",)},
        {"sources": ()},
        {"sources": ((),)},
        {"targets": "t"},
        {"targets": ()},
        {"operations": ()},
        {"operations": ("stack",)},
    ],
)
def test_a_conversion_is_plain_data(arguments: dict[str, Any]) -> None:
    """Anything else is refused where it is written."""
    sound = {"sources": (("a",),), "targets": ("t",), "operations": (WeightOperation("stack", (0,)),)}
    with pytest.raises(ConfigurationError, match="described wrongly"):
        WeightConversion(**{**sound, **arguments})


@pytest.mark.parametrize(("name", "dims"), [("fold", (0,)), ("stack", (0, 1)), ("stack", (-1,)), ("transpose", [0, 1])])
def test_an_operation_is_a_known_one(name: str, dims: Any) -> None:
    with pytest.raises(ConfigurationError, match="no operation"):
        WeightOperation(name, dims)


# -- by transformers' tables ------------------------------------------------------------------------


def test_a_component_needs_the_bytes_of_its_own_experts(checkpoint: Path) -> None:
    """What belongs to a component is decided by the tensor that is made; the plan counts the file's own tensors."""
    stored = load_file(checkpoint / SINGLE)
    plan = plan_split(checkpoint, CUTS)

    for name, layers in (("bottom", (0, 1)), ("trunk", (2, 3)), ("top", (4, 5))):
        part = plan.component(name)
        keys = {tensor.info.key for tensor in part.tensors}
        own = {key for key in stored if any(f".layers.{layer}." in key for layer in layers)}
        assert {key for key in keys if ".layers." in key} == own
        assert part.nbytes == sum(stored[key].nbytes for key in keys)
        assert part.made.keys() == {
            f"model.layers.{layer}.mlp.experts.{which}_proj" for layer in layers for which in ("gate_up", "down")
        }
    assert plan.unexpected == ()
    assert plan.warnings == ()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_all_strategies_are_bit_equal(checkpoint: Path, strategy: str, dtype: str) -> None:
    assert torch.equal(split(checkpoint, strategy=strategy, dtype=dtype), unsplit(checkpoint, dtype))


@pytest.mark.parametrize("strategy", ["mapped", "copied", "incremental"])
def test_memory_is_what_was_planned(checkpoint: Path, strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a strategy allocates is what it predicts, and each expert is read or copied once, to its place."""
    part = plan_split(checkpoint, CUTS).component("trunk")
    paths = {SINGLE: checkpoint / SINGLE}
    read = ReadPlan(part.tensors, paths, "cpu", "float32", made=part.made)
    taken = []
    for module in (views, copied, made_tensors):
        own = module.fresh_memory

        def counted(sizes: Any, *rest: Any, own: Any = own) -> Any:
            wanted = list(sizes)
            taken.extend(wanted)
            return own(wanted, *rest)

        monkeypatch.setattr(module, "fresh_memory", counted)
    chosen = next(each for each in BUILT_IN if each.name == strategy)
    results = {planned.module_key: tensor for planned, tensor in read_checked(chosen, read)}

    assert results.keys() == part.results.keys()
    own_memory = results if strategy != "mapped" else part.made
    assert sum(taken) == predicted_bytes(chosen, read) == sum(results[name].nbytes for name in own_memory)


def test_what_needs_no_conversion_stays_mapped(checkpoint: Path) -> None:
    """By default, although most bytes are those of experts."""
    plan = plan_split(checkpoint, CUTS)
    made = sum(info.nbytes for part in plan.components for info in part.made.values())
    assert plan.memory["mapped"].kept == plan.memory["mapped"].peak == made
    assert plan.memory["mapped"].mapped == sum(info.nbytes for info in plan.infos) - made
    first, second = (load_split_model(None, CUTS, checkpoint).trunk for _ in range(2))
    attention = "model.layers.2.self_attn.q_proj.weight"
    assert first is not None
    assert second is not None
    assert torch.equal(first.get_parameter(attention), second.get_parameter(attention))


def test_gates_stay_in_float32(tmp_path: Path, world: Any) -> None:
    """As transformers keeps them in a model of bfloat16; planned, loaded, and saved so."""
    world.install("deepseek_v3", FAMILY.format("deepseek_v3", "DeepseekV3ForCausalLM"))
    folder = write_checkpoint(tmp_path / "model", tiny_model("deepseek_v3", torch.bfloat16, **DEEPSEEK))
    whole = AutoModelForCausalLM.from_pretrained(folder).eval()
    wide = {name for name, tensor in whole.state_dict().items() if tensor.dtype == torch.float32}
    assert wide

    for strategy in STRATEGIES:
        parts = load_split_model(None, CUTS, folder, strategy=strategy)
        got = {name: tensor for part in parts for name, tensor in part.state_dict().items()}  # type: ignore[union-attr]
        assert {name for name, tensor in got.items() if tensor.dtype == torch.float32} == wide
        assert torch.equal(logits(SplitCausalLM(*parts)), logits(whole))  # type: ignore[arg-type]
    planned = [tensor for part in plan_split(folder, CUTS).components for tensor in part.tensors]
    assert {tensor.module_key for tensor in planned if tensor.kept_dtype} == wide
    trunk = type(parts.trunk).from_pretrained_split(whole.state_dict(), whole.config, 2, 4)  # type: ignore[union-attr]
    assert {name for name, tensor in trunk.state_dict().items() if tensor.dtype == torch.float32} < wide


@pytest.mark.parametrize("strategy", ["incremental", "whole"])
def test_bin_files(checkpoint: Path, strategy: str) -> None:
    """Files that torch wrote are converted as they are read."""
    expected = unsplit(checkpoint)
    torch.save(load_file(checkpoint / SINGLE), checkpoint / "pytorch_model.bin")
    (checkpoint / SINGLE).unlink()
    assert torch.equal(split(checkpoint, strategy=strategy), expected)


def test_experts_in_several_shards(original: Path, checkpoint: Path, tmp_path: Path) -> None:
    """The experts of a layer may lie in different files, in any order."""
    folder = tmp_path / "sharded"
    write_checkpoint(folder, AutoModelForCausalLM.from_pretrained(original), max_shard_size=40_000)
    assert len(list(folder.glob("*.safetensors"))) > 3
    for strategy in STRATEGIES:
        assert torch.equal(split(folder, strategy=strategy), unsplit(checkpoint))


def test_saved_components_keep_the_tensors_of_the_file(checkpoint: Path, tmp_path: Path) -> None:
    """Bit for bit and by their names, also once they are merged; a saved component loads alone."""
    stored = load_file(checkpoint / SINGLE)
    save_split(checkpoint, tmp_path / "split", CUTS)
    parts = [tmp_path / "split" / name / SINGLE for name in ("bottom", "trunk", "top")]
    saved = {key: tensor for path in parts for key, tensor in load_file(path).items()}
    merged = load_file(merge_split(tmp_path / "split", out=tmp_path / "merged") / SINGLE)

    for tensors in (saved, merged):
        assert tensors.keys() == stored.keys()
        assert all(torch.equal(tensors[key], stored[key]) for key in stored)
    loaded = [load_component(tmp_path / "split", name) for name in ("bottom", "trunk", "top")]
    assert torch.equal(logits(SplitCausalLM(*loaded)), unsplit(checkpoint))


def test_components_in_memory_are_saved_as_the_file_has_them(checkpoint: Path, tmp_path: Path) -> None:
    """Present values, under the names and in the shapes of the tensors that they were made of."""
    parts = load_split_model(None, CUTS, checkpoint)
    with torch.no_grad():
        parts.trunk.get_parameter("model.layers.2.mlp.experts.down_proj").mul_(0.5)  # type: ignore[union-attr]
    changed = logits(SplitCausalLM(*parts))  # type: ignore[arg-type]
    save_split(parts, tmp_path / "split")
    merged = merge_split(tmp_path / "split", out=tmp_path / "merged")
    loaded = [load_component(tmp_path / "split", name) for name in ("bottom", "trunk", "top")]

    stored, saved = load_file(checkpoint / SINGLE), load_file(merged / SINGLE)
    assert saved.keys() == stored.keys()
    differ = {key for key in stored if not torch.equal(saved[key], stored[key])}
    assert differ == {expert(2, number, "w2") for number in range(EXPERTS)}
    assert not torch.equal(changed, unsplit(checkpoint))
    assert torch.equal(logits(SplitCausalLM(*loaded)), changed)
    assert torch.equal(unsplit(merged), changed)
    assert torch.equal(split(merged), changed)


def test_a_state_dict_of_the_file_or_of_the_module(checkpoint: Path) -> None:
    """``from_pretrained_split`` takes tensors by checkpoint key, and by module key."""
    whole = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    trunk = ModelRegistry.get_model_class("mixtral", "trunk")
    one, other = (
        trunk.from_pretrained_split(tensors, whole.config, 2, 4).state_dict()
        for tensors in (load_file(checkpoint / SINGLE), whole.state_dict())
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


# -- bad files --------------------------------------------------------------------------------------


def test_an_expert_is_missing_in_one_layer(checkpoint: Path) -> None:
    """It is named; a last one is not, but the sizes are."""
    stored = load_file(checkpoint / SINGLE)
    rewrite(checkpoint, {k: v for k, v in stored.items() if k != expert(3, 1, "w2")})
    with pytest.raises(
        TensorMismatchError, match=r"layers\.3\.mlp\.experts\.down_proj cannot be made: there is no .*1\.w2"
    ):
        plan_split(checkpoint, CUTS)
    assert plan_split(checkpoint, CUTS, parts=("bottom",)).component("bottom").made

    rewrite(checkpoint, {k: v for k, v in stored.items() if f".3.block_sparse_moe.experts.{EXPERTS - 1}" not in k})
    with pytest.raises(
        TensorMismatchError, match=r"mis-shaped: model\.layers\.3\.mlp\.experts\.down_proj is \[3, 32, 48\]"
    ):
        load_split_model(None, CUTS, checkpoint)
    assert "layer 3 lacks" in " ".join(plan_split(checkpoint, CUTS).warnings)


def test_an_expert_of_another_size(checkpoint: Path) -> None:
    stored = load_file(checkpoint / SINGLE)
    rewrite(checkpoint, {**stored, expert(2, 1, "w1"): torch.zeros(5, 32)})
    with pytest.raises(TensorMismatchError, match=r"gate_up_proj cannot be made: 3 of .*, 1 of .* differ"):
        load_split_model(None, CUTS, checkpoint, parts=("trunk",))


def test_a_file_that_is_half_converted(checkpoint: Path) -> None:
    """A layer with its experts both apart and merged is refused; layers of both kinds are as good as either."""
    stored, whole = load_file(checkpoint / SINGLE), AutoModelForCausalLM.from_pretrained(checkpoint)
    merged = {key: tensor for key, tensor in whole.state_dict().items() if ".layers.2.mlp.experts." in key}
    rewrite(checkpoint, {**stored, **merged})
    with pytest.raises(TensorMismatchError, match=r"twice: model\.layers\.2\.mlp\.experts\.down_proj and .*both make"):
        load_split_model(None, CUTS, checkpoint)

    rewrite(checkpoint, {**{k: v for k, v in stored.items() if ".2.block_sparse_moe.experts" not in k}, **merged})
    assert torch.equal(split(checkpoint), unsplit(checkpoint))


def test_a_file_in_the_layout_of_the_module(checkpoint: Path) -> None:
    """Nothing is left to convert, so that all of it is mapped."""
    whole = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    rewrite(checkpoint, dict(whole.state_dict()))
    assert plan_split(checkpoint, CUTS).memory["mapped"].kept == 0
    assert torch.equal(split(checkpoint), unsplit(checkpoint))


def test_an_operation_that_is_not_known(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table of a newer transformers may do what splitlearn cannot; the error says which, and nothing is loaded."""
    monkeypatch.delitem(conversion_tables._OPERATIONS, "Concatenate")
    conversion_tables._targets.cache_clear()
    with pytest.raises(CheckpointError, match=r"makes model\.layers\.0\.mlp\.experts\.gate_up_proj by .*Concatenate"):
        load_split_model(None, CUTS, checkpoint)
    conversion_tables._targets.cache_clear()


@pytest.mark.parametrize(
    ("old", "new", "often"),
    [
        ("block_sparse_moe.", "mlp.", False),
        (r"experts\.(\d+)\.w1", r"experts.\1.gate", False),
        (r"^model\.layers", "model.decoder.layers", False),
        # It holds for a layer of its own, so that each name is looked at.
        (r"layers\.3\.", "layers.3.first.", True),
    ],
)
def test_layers_that_are_renamed_alike_are_renamed_once(
    old: str, new: str, often: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"experts.{expert}.w{number}.weight" for expert in (0, 3, 11) for number in (1, 2)]
    keys = [f"model.layers.{layer}.block_sparse_moe.{name}" for layer in range(30) for name in (*names, "gate.weight")]
    keys += ["model.norm.weight", "lm_head.weight"]
    renaming = core_model_loading.WeightRenaming(old, new)
    merging = core_model_loading.WeightConverter("experts.*.w2.weight", "experts.down", operations=[None])
    family, entries = ModelFamily(model_type="x", architecture="X"), ([renaming], [merging])
    single, seen = conversion_tables._renamed, list[str]()

    def counted(*arguments: Any) -> Any:
        seen.append(arguments[-1])
        return single(*arguments)

    monkeypatch.setattr(conversion_tables, "_renamed", counted)
    rename = conversion_tables._by_layer(family, *entries)
    assert [rename(key) for key in keys] == [single(family, *entries, key) for key in keys]
    assert len(seen) == len(keys) if often else len(seen) < len(keys) / 10


def test_a_fused_tensor_is_split_by_sizes() -> None:
    """Queries of more heads than keys and values, in one tensor."""
    sizes = (4, 2, 2)
    operation = WeightOperation("split", (0,), sizes=sizes)
    conversion = WeightConversion((("qkv",),), ("q", "k", "v"), (operation,))
    fused = torch.arange(24.0).view(8, 3)
    assert [made.tolist() for made in make(conversion, {"qkv": fused}).values()] == [
        piece.tolist() for piece in fused.split(sizes)
    ]
    with pytest.raises(ValueError, match=r"cannot be cut into \[4, 2, 2\] along dimension 0"):
        make(conversion, {"qkv": fused[:7]})
    with pytest.raises(ConfigurationError, match="there is no operation 'split'"):
        WeightOperation("split", (0,))


def test_numbers_of_the_configuration_that_do_not_fit(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "num_local_experts": EXPERTS + 1}))
    with pytest.raises(TensorMismatchError, match=r"is \[4, 96, 32\] in the file, \[5, 96, 32\] by config.json"):
        load_split_model(None, CUTS, checkpoint)


# -- by a plugin ------------------------------------------------------------------------------------

#: A llama whose queries, keys and values are one tensor in the file.
FUSED = """
import re

from splitlearn_core import ModelFamily, WeightConversion, WeightOperation, hookimpl


@hookimpl
def splitlearn_model_families():
    return [ModelFamily(model_type="llama", architecture="LlamaForCausalLM")]


@hookimpl
def splitlearn_map_weight_keys(checkpoint_keys):
    return {{key: target(key) for key in checkpoint_keys}}


def target(key):
    if not key.endswith(".qkv.weight"):
        return key
    names = tuple(key.replace("qkv", f"{{which}}_proj") for which in "qkv")
    {0}
"""
CHUNK = 'return WeightConversion(((key,),), names, (WeightOperation("chunk", (0,)),))'


@pytest.fixture
def fused(world: Any, tmp_path: Path) -> Path:
    folder = write_checkpoint(tmp_path / "fused", tiny_model("llama", num_key_value_heads=4))
    tensors = load_file(folder / SINGLE)
    for layer in range(6):
        three = [tensors.pop(f"model.layers.{layer}.self_attn.{which}_proj.weight") for which in "qkv"]
        tensors[f"model.layers.{layer}.self_attn.qkv.weight"] = torch.cat(three)
    rewrite(folder, tensors)
    return folder


@pytest.mark.parametrize("strategy", ["mapped", "copied", "incremental"])
def test_a_plugin_says_its_own_conversions(world: Any, fused: Path, tmp_path: Path, strategy: str) -> None:
    """One tensor of the file becomes three; the hook's other answers are as ever."""
    world.install("llama", FUSED.format(CHUNK))
    expected = logits(tiny_model("llama", num_key_value_heads=4))
    assert torch.equal(split(fused, strategy=strategy), expected)
    save_split(fused, tmp_path / "split", CUTS)
    merged = load_file(merge_split(tmp_path / "split", out=tmp_path / "merged") / SINGLE)
    stored = load_file(fused / SINGLE)
    assert merged.keys() == stored.keys()
    assert all(torch.equal(merged[key], stored[key]) for key in stored)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (CHUNK.replace("key,", "key + 'x',"), "that it is no source of"),
        (CHUNK.replace("((key,),)", "((key, 'other'),)"), "'other' is a source .* mapped to something else"),
        (CHUNK.replace("chunk", "cut"), "no operation 'cut'"),
        ("return 7", "not to a name, a conversion or None"),
    ],
)
def test_a_plugin_that_answers_wrongly(world: Any, fused: Path, body: str, reason: str) -> None:
    world.install("llama", FUSED.format(body))
    with pytest.raises(BrokenPluginError, match=reason):
        plan_split(fused, CUTS)


def test_a_strategy_of_a_plugin_needs_to_know_nothing(checkpoint: Path) -> None:
    """One that yields each tensor of the plan in the plan's dtype serves tensors that others are made of."""

    class Plain:
        name = "plain"

        def refusal(self, plan: ReadPlan) -> str:
            return ""

        def anonymous_bytes(self, plan: ReadPlan) -> int:
            return plan.host_bytes

        def read(self, plan: ReadPlan) -> Any:
            stored = load_file(plan.paths[SINGLE])
            for planned in plan.tensors:
                yield PlannedTensor(planned.module_key, planned.info), stored[planned.info.key].to(torch.bfloat16)

    part = plan_split(checkpoint, CUTS).component("trunk")
    read = ReadPlan(part.tensors, {SINGLE: checkpoint / SINGLE}, "cpu", "bfloat16", made=part.made)
    whole = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="bfloat16").state_dict()
    results = {planned.module_key: tensor for planned, tensor in read_checked(Plain(), read)}
    assert results.keys() == part.results.keys()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in results.items())
