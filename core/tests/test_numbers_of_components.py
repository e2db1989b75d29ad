"""Models that are cut in one place, and in more than two: everything that works with three components."""

from __future__ import annotations

import asyncio
import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from safetensors.torch import load_file

from splitlearn_core import (
    AsyncModelManager,
    ConfigurationError,
    InvalidCheckpointError,
    InvalidSplitError,
    MissingFileError,
    ModelConfig,
    ModelRegistry,
    SplitCausalLM,
    load_component,
    load_split_directory,
    load_split_model,
    merge_split,
    plan_split,
    save_split,
    verify_saved,
)
from splitlearn_core.checkpoint.manifest import MANIFEST
from splitlearn_core.cli.plan import render_plan
from splitlearn_core.doctor.load_checks import check_model
from splitlearn_core.manager.loaders.loader import ModelLoader
from splitlearn_core.verification import verify_split

pytestmark = pytest.mark.usefixtures("llama")

IDS = torch.tensor([[5, 17, 42, 99, 3, 8, 64]])
NAMES = {
    (3,): ("bottom", "top"),
    (2, 4): ("bottom", "trunk", "top"),
    (1, 2, 5): ("bottom", "trunk1", "trunk2", "top"),
    (1, 2, 3, 4, 5): ("bottom", "trunk1", "trunk2", "trunk3", "trunk4", "top"),
}
NUMBERS = pytest.mark.parametrize("points", NAMES, ids=lambda points: f"{len(points)}")
OTHERS = pytest.mark.parametrize("points", [(3,), (1, 2, 5)], ids=lambda points: f"{len(points)}")
Cli = Callable[..., tuple[int, str, str]]


def logits_of(model: Any, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=IDS, **options).logits
    return logits


@NUMBERS
def test_the_tuple_names_its_parts(single: Path, whole: Any, points: tuple[int, ...]) -> None:
    """It has as many parts as there are components, by name, by place, and as ends and trunks."""
    parts = load_split_model(None, points, single)

    assert len(parts) == len(points) + 1
    assert parts._fields == tuple(parts._asdict()) == NAMES[points]
    assert [part.component for part in parts] == list(NAMES[points])
    assert all(getattr(parts, name) is part for name, part in zip(NAMES[points], parts, strict=True))
    assert (parts.bottom, *parts.trunks, parts.top) == tuple(parts)
    assert all(f"{name}=<llama {name}, layers [" in repr(parts) for name in NAMES[points])
    with pytest.raises(AttributeError, match=f"has no 'trunk9'; it has {', '.join(NAMES[points])}"):
        parts.trunk9  # type: ignore[attr-defined]  # noqa: B018
    with pytest.raises(AttributeError, match="join the components"):
        parts.generate  # type: ignore[attr-defined]  # noqa: B018
    again = pickle.loads(pickle.dumps(parts))
    assert type(again) is type(parts)
    assert again._fields == parts._fields
    assert torch.equal(logits_of(SplitCausalLM(*again)), logits_of(whole))


@OTHERS
def test_one_part_alone(sharded: Path, points: tuple[int, ...]) -> None:
    """The others are None, and of their shards not one is needed."""
    for name in NAMES[points]:
        folder = sharded.with_name(f"{len(points)}-{name}")
        folder.mkdir()
        needed = plan_split(sharded, points, parts=(name,)).shards
        assert len(needed) < len(list(sharded.glob("*.safetensors")))
        for file in sharded.iterdir():
            if file.suffix == ".json" or file.name in needed:
                (folder / file.name).write_bytes(file.read_bytes())
        parts = load_split_model(None, points, folder, parts=(name,))
        assert [part is not None for part in parts] == [other == name for other in NAMES[points]]
        assert getattr(parts, name).component == name


@pytest.mark.parametrize(
    ("points", "wrong"),
    [((3,), "trunk"), ((1, 2, 5), "trunk"), ((1, 2, 5), "trunk3"), ((2, 4), "trunk1")],
    ids=str,
)
def test_a_part_that_is_not_there_is_refused(single: Path, points: tuple[int, ...], wrong: str) -> None:
    """Wherever a component is named, the message says which there are."""
    there = ", ".join(NAMES[points])
    for refused in (
        lambda: load_split_model(None, points, single, parts=("bottom", wrong)),
        lambda: plan_split(single, points, parts=(wrong,)),
        lambda: save_split(single, single.with_name("out"), points, parts=(wrong,), progress=False),
        lambda: load_split_model(None, points, single, dtype={wrong: "bfloat16"}),
        lambda: load_split_model(None, points, single, device_map={wrong: "cpu"}),
        lambda: ModelConfig(
            model_id="x", model_type="llama", model_path=str(single), component=wrong, split_points=points
        ),
    ):
        with pytest.raises(ConfigurationError) as caught:
            refused()
        assert repr(wrong) in str(caught.value)
        assert there in str(caught.value)


def test_points_beyond_the_model(single: Path) -> None:
    """The number of components is counted against the layers."""
    with pytest.raises(InvalidSplitError, match="a model of 6 layers cannot be cut into 7 components"):
        load_split_model(None, (1, 2, 3, 4, 5, 6), single)
    with pytest.raises(InvalidSplitError, match="0 < a < b < c < 6 is needed"):
        plan_split(single, (1, 5, 3))


@OTHERS
def test_dtypes_and_devices_by_name(single: Path, points: tuple[int, ...]) -> None:
    """Each component has its own; they are joined where that is on purpose."""
    narrow = NAMES[points][-2]
    devices = dict.fromkeys(NAMES[points], "cpu")
    parts = load_split_model(None, points, single, dtype={narrow: "bfloat16"}, device_map=devices)

    assert [part.dtype == torch.bfloat16 for part in parts] == [name == narrow for name in NAMES[points]]
    with pytest.raises(ConfigurationError, match="their dtype differs"):
        SplitCausalLM(*parts)
    assert logits_of(SplitCausalLM(*parts, mixed_dtypes=True)).dtype == torch.float32


@NUMBERS
def test_components_of_a_model(single: Path, whole: Any, points: tuple[int, ...]) -> None:
    """Given by place or by name they make up the model; each can be had and replaced by its name."""
    parts = load_split_model(None, points, single)
    names = NAMES[points]
    model = SplitCausalLM(**dict(reversed(parts._asdict().items())))

    assert model.components == tuple(parts)
    assert (model.bottom, *model.trunks, model.top) == tuple(parts)
    assert [getattr(model, name) for name in names] == list(parts)
    assert torch.equal(logits_of(model), logits_of(whole))
    expected = whole(input_ids=IDS, output_hidden_states=True, output_attentions=False)
    got = model(input_ids=IDS, output_hidden_states=True)
    assert all(map(torch.equal, got.hidden_states, expected.hidden_states))
    other = copy.deepcopy(parts[-2])
    with torch.no_grad():
        next(other.parameters()).zero_()
    setattr(model, names[-2], other)
    assert not torch.equal(logits_of(model), logits_of(whole))
    for name in {"trunk", "trunk1", "trunk2"} - set(names):
        with pytest.raises(AttributeError, match=f"has no {name}: its components are {', '.join(names)}"):
            getattr(model, name)
        with pytest.raises(AttributeError, match=f"has no {name}"):
            setattr(model, name, other)
    assert torch.equal(logits_of(copy.deepcopy(model)), logits_of(model))


def test_components_that_make_up_no_model(single: Path) -> None:
    """Out of order, missing, of other cuts, or too few: said by their names."""
    bottom, one, two, top = load_split_model(None, (1, 2, 5), single)
    (end,) = load_split_model(None, (1,), single, parts=("top",))[1:]
    for given, said in (
        ((bottom, two, one, top), "do not follow one another"),
        ((bottom, one, top), "do not follow one another"),
        ((bottom, one, None, top), "trunk2 is None: it was not loaded"),
        ((bottom, one, two), "top is a trunk2"),
        ((bottom, top, one, top), "trunk1 is a top"),
        ((bottom,), "top is None: it was not loaded"),
        ((bottom, end), "split points differs"),
    ):
        with pytest.raises(ConfigurationError, match=said) as caught:
            SplitCausalLM(*given)
        assert caught.value.hint
    with pytest.raises(TypeError, match="unexpected keyword argument 'middle'"):
        SplitCausalLM(bottom, middle=one, top=top)


def test_trunks_of_a_state_dict(whole: Any) -> None:
    """Classes of the registry make any number of trunks; their place in the model gives them their names there."""
    made = [
        ModelRegistry.get_model_class("llama", kind).from_pretrained_split(
            whole.state_dict(), whole.config, start_layer=start, end_layer=end
        )
        for kind, start, end in (("bottom", 0, 1), ("trunk", 1, 3), ("trunk", 3, 5), ("top", 5, 6))
    ]
    model = SplitCausalLM(*made)

    assert model.trunk2 is made[2]
    assert torch.equal(logits_of(model), logits_of(whole))


@NUMBERS
def test_saved_and_merged(checkpoint: Callable[[str], Path], points: tuple[int, ...]) -> None:
    """A folder for each component, from a checkpoint and from memory; verified, loaded, and merged to the source."""
    source, out = checkpoint("tied"), checkpoint("single").with_name("out")
    saved = save_split(source, out, points, progress=False)

    assert tuple(saved.components) == NAMES[points]
    assert sorted(path.name for path in out.iterdir()) == sorted(NAMES[points])
    found = verify_saved(out)
    assert (found.components, found.complete, found.problems) == (NAMES[points], True, ())
    loaded = load_split_directory(out, progress=False)
    assert loaded._fields == NAMES[points]
    assert loaded.top.get_output_embeddings().weight is loaded.bottom.get_input_embeddings().weight
    name = NAMES[points][-2]
    assert load_component(out, name, progress=False).component == name
    assert load_component(out / name, progress=False).layer_range == getattr(loaded, name).layer_range
    model = SplitCausalLM.from_pretrained(out)
    assert torch.equal(logits_of(model), logits_of(SplitCausalLM.from_pretrained(source, split_points=points)))
    merged = merge_split(out, out=out.with_name("merged"), progress=False)
    memory = save_split(loaded, out.with_name("memory"), progress=False)
    again = merge_split(memory.path, out=out.with_name("again"), progress=False)
    expected = load_file(source / "model.safetensors")
    for folder in (merged, again):
        tensors = load_file(folder / "model.safetensors")
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[key]) for key, tensor in tensors.items())


def test_saved_components_that_are_missing(single: Path, cli: Cli) -> None:
    """By their names; and those of another split are not there at all."""
    out = single.with_name("out")
    save_split(single, out, (1, 2, 5), progress=False)
    (out / "trunk2").rename(single.with_name("elsewhere"))

    assert verify_saved(out).problems == ("the trunk2 that was saved with the others is missing",)
    with pytest.raises(ConfigurationError, match="the trunk2 is missing") as caught:
        merge_split(out, out=single.with_name("merged"), progress=False)
    assert "bottom, trunk1, trunk2, top" in caught.value.hint
    with pytest.raises(MissingFileError, match="no trunk2"):
        load_component(out, "trunk2")
    with pytest.raises(ConfigurationError, match="no component 'trunk'") as caught:
        load_component(out, "trunk")
    assert "bottom, trunk1, trunk2, top" in caught.value.hint
    code, _, err = cli("generate", out, "--prompt", "x")
    assert code == 1
    assert "the trunk2 is missing" in err
    merge_split(out, single.with_name("elsewhere"), out=single.with_name("merged"), progress=False)


def test_a_whole_split_takes_the_place_of_any_other(single: Path) -> None:
    """Of the earlier one nothing stays; a part of another split is refused."""
    out = single.with_name("out")
    save_split(single, out, (1, 2, 5), progress=False)
    with pytest.raises(ConfigurationError, match="would not belong"):
        save_split(single, out, (2, 4), parts=("trunk",), overwrite=True, progress=False)
    save_split(single, out, (1, 2, 5), parts=("trunk1",), overwrite=True, progress=False)
    assert verify_saved(out).complete
    save_split(single, out, (3,), overwrite=True, progress=False)

    assert sorted(path.name for path in out.iterdir()) == ["bottom", "top"]
    assert verify_saved(out).complete


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"component": "trunk"}, "has no trunk"),
        ({"component": "trunk3"}, "has no trunk3"),
        ({"component": "trunk01"}, "none of bottom, trunk, top"),
        ({"split_points": []}, "not a list of layer numbers"),
        ({"split_points": [1, 5, 2]}, "do not cut a model"),
        ({"split_points": [1, 2]}, "has no trunk2"),
        ({"layers": [1, 2]}, r"holds \(2, 5\), not \(1, 2\)"),
        ({"saved_with": ["trunk1"]}, "lacks the component itself"),
    ],
    ids=str,
)
def test_manifests_that_contradict_themselves(single: Path, changes: dict[str, Any], said: str) -> None:
    """Names, points and layers are held against each other."""
    saved = save_split(single, single.with_name("out"), (1, 2, 5), parts=("trunk2",), progress=False)
    manifest = saved.path / "trunk2" / MANIFEST
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), **changes}))

    with pytest.raises(InvalidCheckpointError, match=said):
        load_component(saved.path)


@OTHERS
def test_the_command_line(single: Path, cli: Cli, points: tuple[int, ...]) -> None:
    """``--split`` takes one number or more, wherever it stands."""
    cuts = [*map(str, points)]
    out = single.with_name("out")

    code, text, _ = cli("plan", "--split", *cuts, "--json", single)
    assert code == 0
    plan = json.loads(text)
    assert (plan["split_points"], [part["component"] for part in plan["components"]]) == (
        list(points),
        [*NAMES[points]],
    )
    code, text, _ = cli("verify", single, f"--split={cuts[0]}", *cuts[1:])
    assert code == 0
    assert f"cut at {'1, 2 and 5' if len(cuts) == 3 else '3'}, float32" in text
    assert "equal to the last bit" in text
    code, text, _ = cli("split", single, "--split", *cuts, "--out", out, "--parts", f"bottom,{NAMES[points][-2]}")
    assert code == 0
    assert sorted(path.name for path in out.iterdir()) == sorted({"bottom", NAMES[points][-2]})
    code, _, err = cli("split", single, "--split", *cuts, "--out", out, "--force", "--parts", "trunk")
    assert code == 2
    assert ", ".join(NAMES[points]) in err
    code, _, err = cli("generate", single, "--split", *cuts, "--device", "trunk=cpu", "--prompt", "x")
    assert code == 2
    assert ", ".join(NAMES[points]) in err


def test_the_picture_of_a_plan(single: Path) -> None:
    """Adjacent trunks can be distinguished; of very many, only those with enough room show their names."""
    bar, names = click.unstyle(render_plan(plan_split(single, (1, 2, 5)))).splitlines()[3:5]
    assert names.split() == [*NAMES[1, 2, 5]]
    assert [fill for number, fill in enumerate(bar) if fill != bar[number - 1]] == ["▓", "█", "▞", "▒"]
    assert [names.index(name) for name in NAMES[1, 2, 5]] == [bar.index(fill) for fill in "▓█▞▒"]
    config = json.loads((single / "config.json").read_text())
    deep = single.with_name("deep")
    deep.mkdir()
    (deep / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 40}))
    lines = click.unstyle(render_plan(plan_split(deep, range(1, 40)))).splitlines()
    assert len(lines[3]) < 80
    assert len([line for line in lines if line.startswith("trunk")]) == 38


def test_devices_for_many_components(single: Path) -> None:
    """Placing forty components on three devices takes no time to speak of, and says what would fit."""
    from splitlearn_core.errors import InsufficientMemoryError
    from splitlearn_core.plan.placement import place

    config = json.loads((single / "config.json").read_text())
    (single / "model.safetensors").unlink()
    (single / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 40}))
    parts = plan_split(single, range(1, 40)).components
    need = parts[1].loaded_bytes(parts[1].dtype)

    placed = place(parts, {"cuda:0": 20 * need, "cuda:1": 15 * need, "cpu": None})
    devices = list(placed.values())
    assert devices == sorted(devices, key=["cuda:0", "cuda:1", "cpu"].index)
    assert len(set(devices)) == 3
    with pytest.raises(InsufficientMemoryError, match="do not fit") as caught:
        place(parts, {"cuda:0": 3 * need, "cpu": 4 * need})
    assert "trunk" in caught.value.hint


@OTHERS
def test_components_under_the_manager(single: Path, whole: Any, points: tuple[int, ...]) -> None:
    """Loaded, warmed up and leased one by one, they give the logits of the unsplit model."""

    async def lent() -> torch.Tensor:
        state: Any = IDS
        async with AsyncModelManager() as manager:
            for name in NAMES[points]:
                config = ModelConfig(
                    model_id=name,
                    model_type="llama",
                    model_path=str(single),
                    component=name,
                    split_points=points,
                    warmup=True,
                )
                await manager.load_model(config)
                assert manager.get_model_info(name).component == name
                async with manager.lease(name) as model:
                    state = await model(state)
        logits: torch.Tensor = state.logits
        return logits

    assert torch.equal(asyncio.run(lent()), logits_of(whole))
    config = {"model_id": "x", "model_type": "llama", "model_path": str(single), "split_points": list(points)}
    part = ModelLoader.load_from_config({**config, "component": NAMES[points][-2]})
    assert part.component == NAMES[points][-2]


def test_a_model_of_two_layers(single: Path, edit_json: Callable[..., None], cli: Cli) -> None:
    """It can be cut in one place, and doctor says so; thirds of it there are none."""
    edit_json(single / "config.json", num_hidden_layers=2)

    assert any("--split 1" in finding.what for finding in check_model(str(single), load=False))
    code, _, err = cli("plan", single)
    assert code == 1
    assert "one cut makes bottom and top" in err
    code, text, _ = cli("plan", single, "--split", "1", "--json")
    assert code == 0
    assert len(json.loads(text)["components"]) == 2


@OTHERS
def test_bin_files(single: Path, whole: Any, points: tuple[int, ...]) -> None:
    """Components of a ``.bin`` file are those of the safetensors."""
    (single / "model.safetensors").unlink()
    torch.save(whole.state_dict(), single / "pytorch_model.bin")

    assert torch.equal(logits_of(SplitCausalLM(*load_split_model(None, points, single))), logits_of(whole))


def test_verification_is_equal(single: Path) -> None:
    """Each component is loaded and timed alone."""
    from splitlearn_core.loading.opening import open_model
    from splitlearn_core.loading.options import LoadOptions

    found = verify_split(open_model(single), (1, 2, 5), "auto", LoadOptions(), lambda _: None)
    assert found.equal
    assert [str(cost.component) for cost in found.components] == [*NAMES[1, 2, 5]]
