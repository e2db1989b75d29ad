"""Components as files: saved, loaded, merged, and checked; to the last bit, or refused in words."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from splitlearn_core import (
    ConfigurationError,
    InsufficientDiskError,
    InvalidCheckpointError,
    MissingFileError,
    Progress,
    SplitCausalLM,
    load_component,
    load_split_directory,
    load_split_model,
    merge_split,
    save_split,
    verify_saved,
)
from splitlearn_core.checkpoint.manifest import MANIFEST
from splitlearn_core.storage.durable_files import Buffers, range_pieces
from splitlearn_core.types import DTYPE_BYTES, dtype_names, stored_dtype

pytestmark = [pytest.mark.libs, pytest.mark.usefixtures("llama")]

CUTS = (2, 4)
IDS = torch.tensor([[5, 17, 42, 99, 3, 8, 64]])
NAMES = ("bottom", "trunk", "top")
Make = Callable[[str], Path]


def content(folder: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Return every tensor of a checkpoint as dtype, shape and bytes."""
    found = {}
    for path in folder.glob("*.safetensors"):
        raw = path.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        for key, entry in json.loads(raw[8 : 8 + length]).items():
            if key != "__metadata__":
                begin, end = (8 + length + offset for offset in entry["data_offsets"])
                assert key not in found
                found[key] = (entry["dtype"], entry["shape"], raw[begin:end])
    return found


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def spoil_manifest(folder: Path, **changes: Any) -> None:
    path = folder / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("kind", ["single", "sharded", "tied"])
def test_what_is_saved_loads_as_the_source_does(checkpoint: Make, tmp_path: Path, kind: str) -> None:
    """Each component alone, from its own folder and from the whole directory, equals a load of the source."""
    source, out = checkpoint(kind), tmp_path / "out"
    expected = load_split_model("llama", CUTS, source)

    save_split(source, out, CUTS)

    for name, component in zip(NAMES, expected, strict=True):
        for loaded in (load_component(out, name), load_component(out / name, verify=True)):
            assert loaded.origin == component.origin  # type: ignore[union-attr]
            state = component.state_dict()  # type: ignore[union-attr]
            assert loaded.state_dict().keys() == state.keys()
            for key, tensor in loaded.state_dict().items():
                assert torch.equal(tensor, state[key])
                assert tensor.dtype == state[key].dtype


@pytest.mark.parametrize("kind", ["single", "sharded", "tied"])
@pytest.mark.parametrize("size", ["5GB", "40KB"])
def test_merging_gives_the_source_back(
    checkpoint: Make, whole: Any, tied_whole: Any, tmp_path: Path, kind: str, size: str
) -> None:
    """Every tensor byte for byte, a tied one once; and transformers computes the same from it."""
    from transformers import AutoModelForCausalLM

    source = checkpoint(kind)
    save_split(source, tmp_path / "out", CUTS, max_shard_size=size)

    merged = merge_split(tmp_path / "out", out=tmp_path / "merged", max_shard_size=size)

    assert content(merged) == content(source)
    assert (len(list(merged.glob("*.safetensors"))) > 1) == (size == "40KB")
    assert all(path.stat().st_size < 40_000 + 4_000 for path in merged.glob("model-*.safetensors"))
    for name in ("config.json", "generation_config.json"):
        assert (merged / name).read_bytes() == (source / name).read_bytes()
    model = AutoModelForCausalLM.from_pretrained(merged)
    with torch.inference_mode():
        assert torch.equal(model(IDS).logits, (tied_whole if kind == "tied" else whole)(IDS).logits)


def test_the_folders_are_what_the_library_reads(single: Path, tmp_path: Path) -> None:
    """Original key names, the source's configuration, aligned tensors, and the metadata transformers asks for."""
    save_split(single, tmp_path / "out", CUTS)

    source = load_file(single / "model.safetensors")
    for name in NAMES:
        folder = tmp_path / "out" / name
        assert (folder / "config.json").read_bytes() == (single / "config.json").read_bytes()
        for key, tensor in load_file(folder / "model.safetensors").items():
            assert torch.equal(tensor, source[key])
        with safe_open(folder / "model.safetensors", "pt") as file:
            assert file.metadata() == {"format": "pt"}
    assert not (tmp_path / "out/trunk/generation_config.json").exists()
    assert (tmp_path / "out/top/generation_config.json").exists()


def test_a_split_directory_generates(single: Path, whole: Any, tmp_path: Path) -> None:
    """All three, joined, say what the unsplit model says."""
    save_split(single, tmp_path / "out", CUTS)

    bottom, trunk, top = load_split_directory(tmp_path / "out")
    model = SplitCausalLM(bottom, trunk, top)  # type: ignore[arg-type]

    expected = whole.generate(IDS, max_new_tokens=5, do_sample=False)
    assert torch.equal(model.generate(IDS, max_new_tokens=5, do_sample=False), expected)


def test_a_tied_embedding_is_one_parameter_again(tied: Path, tmp_path: Path) -> None:
    """As when one call loads bottom and top of the source."""
    save_split(tied, tmp_path / "out", CUTS)

    parts: Any = load_split_directory(tmp_path / "out")

    assert parts.top.lm_head.weight is parts.bottom.model.embed_tokens.weight


def test_tensors_that_no_module_wants_come_back(world: Any, single: Path, tmp_path: Path) -> None:
    """Old checkpoints hold masks; splitting and merging loses none, and each lies with its layer."""
    sound = world.source("llama")
    (world.folder / "splitlearn_llama.py").write_text(sound.replace('")]', '", ignored_suffixes=(".mask",))]'))
    state = load_file(single / "model.safetensors")
    state["model.layers.3.self_attn.mask"] = torch.ones(3, dtype=torch.uint8)
    save_file(state, single / "model.safetensors", {"format": "pt"})

    save_split(single, tmp_path / "out", CUTS)

    assert "model.layers.3.self_attn.mask" in content(tmp_path / "out/trunk")
    merged = merge_split(tmp_path / "out", out=tmp_path / "merged")
    assert content(merged) == content(single)
    assert load_component(tmp_path / "out", "trunk").start_layer == 2


def test_trained_components_are_saved_and_merged(single: Path, tmp_path: Path) -> None:
    """Values in memory are merged with untrained components; the source's values are not used."""
    parts: Any = load_split_model("llama", CUTS, single, strategy="copied")
    with torch.no_grad():
        for parameter in parts.trunk.parameters():
            parameter.add_(1)

    save_split(parts, tmp_path / "all")
    save_split([parts.trunk], tmp_path / "trunk")
    save_split(single, tmp_path / "ends", CUTS, parts=["bottom", "top"])

    merged = merge_split(tmp_path / "all", out=tmp_path / "one")
    again = merge_split(tmp_path / "ends", tmp_path / "trunk", out=tmp_path / "two")
    assert content(merged) == content(again) != content(single)
    assert content(merged).keys() == content(single).keys()
    trunk = load_component(tmp_path / "trunk")
    for key, tensor in trunk.state_dict().items():
        assert torch.equal(tensor, parts.trunk.state_dict()[key])
    assert json.loads((tmp_path / "trunk/trunk" / MANIFEST).read_text())["own_values"] is True


def test_the_dtypes_of_safetensors_have_a_dtype_of_torch() -> None:
    """The two tables name the same dtypes, and agree on the bytes of an element."""
    assert {name: dtype.itemsize for dtype, name in dtype_names().items()} == DTYPE_BYTES


@pytest.mark.parametrize("name", DTYPE_BYTES)
def test_a_tensor_in_memory_of_any_dtype_is_saved(single: Path, tmp_path: Path, name: str) -> None:
    """Its bytes are in the file, under the name that safetensors has for its dtype."""
    trunk = load_split_model("llama", CUTS, single, parts=["trunk"]).trunk
    assert trunk is not None
    norm = trunk.get_submodule("model.layers.2.input_layernorm")
    shape = norm.get_parameter("weight").shape
    raw = torch.randint(0, 2 if name == "BOOL" else 256, (shape.numel() * DTYPE_BYTES[name],), dtype=torch.uint8)
    values = raw.view(stored_dtype(name)).view(shape)
    norm.weight = torch.nn.Parameter(values, requires_grad=False)

    save_split(trunk, tmp_path / "out")

    saved = content(tmp_path / "out/trunk")
    assert saved["model.layers.2.input_layernorm.weight"] == (name, list(shape), raw.numpy().tobytes())


def test_another_dtype_is_loaded_and_saved(single: Path, tmp_path: Path) -> None:
    """The components are converted as a load converts them, and the configuration says so."""
    save_split(single, tmp_path / "out", CUTS, dtype="bfloat16")

    loaded: Any = load_split_directory(tmp_path / "out")
    expected = load_split_model("llama", CUTS, single, dtype="bfloat16")
    for one, other in zip(loaded, expected, strict=True):
        for key, tensor in other.state_dict().items():  # type: ignore[union-attr]
            assert torch.equal(one.state_dict()[key], tensor)
    merge_split(tmp_path / "out", out=tmp_path / "merged")
    assert json.loads((tmp_path / "merged/config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("sharded_bin", [False, True])
def test_bin_files_go_through_tensors(single: Path, tmp_path: Path, sharded_bin: bool) -> None:
    """A checkpoint of pickled tensors becomes components in safetensors, in the dtype it has."""
    state = load_file(single / "model.safetensors")
    expected = content(single)
    (single / "model.safetensors").unlink()
    if sharded_bin:
        keys = sorted(state)
        shards = {"pytorch_model-1.bin": keys[:20], "pytorch_model-2.bin": keys[20:]}
        for name, held in shards.items():
            torch.save({key: state[key] for key in held}, single / name)
        weight_map = {key: name for name, held in shards.items() for key in held}
        (single / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    else:
        torch.save(state, single / "pytorch_model.bin")

    save_split(single, tmp_path / "out", CUTS)

    assert content(merge_split(tmp_path / "out", out=tmp_path / "merged")) == expected


def test_parts_are_saved_alone(sharded: Path, tmp_path: Path) -> None:
    """Only the requested components are there, and they are valid."""
    save_split(sharded, tmp_path / "out", CUTS, parts=["trunk"])

    assert [path.name for path in (tmp_path / "out").iterdir()] == ["trunk"]
    result = verify_saved(tmp_path / "out")
    assert (result.problems, result.complete) == ((), False)
    with pytest.raises(ConfigurationError, match="the bottom is missing; the top is missing"):
        merge_split(tmp_path / "out", out=tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_what_is_there_is_not_overwritten(single: Path, tmp_path: Path) -> None:
    """Foreign files are never replaced; an earlier split only on request, and then completely."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(ConfigurationError, match="not overwritten"):
            save_split(single, out, CUTS, overwrite=overwrite)
    (out / "thesis.txt").unlink()
    save_split(single, out, CUTS)
    with pytest.raises(ConfigurationError, match="already"):
        save_split(single, out, CUTS)

    saved = save_split(single, out, (1, 3), overwrite=True)

    assert {each.manifest.origin.split_points for each in saved.components.values()} == {(1, 3)}
    with pytest.raises(ConfigurationError, match="not overwritten"):
        merge_split(out, out=single)


def test_overwriting_a_part_keeps_the_others(single: Path, tied: Path, tmp_path: Path) -> None:
    """Where they belong to it; else nothing is written, and nothing is lost."""
    out = tmp_path / "out"
    save_split(single, out, CUTS)
    before = files_of(out)
    parts: Any = load_split_model("llama", CUTS, single, parts=["trunk"], strategy="copied")
    with torch.no_grad():
        parts.trunk.model.layers[2].mlp.up_proj.weight.add_(1)

    saved = save_split(parts, out, overwrite=True)

    after = files_of(out)
    assert [str(name) for name in saved.components] == list(NAMES)
    assert {name for name in before if before[name] != after.get(name)} >= {"trunk/model.safetensors"}
    assert all(name.startswith("trunk/") for name in before if before[name] != after.get(name))
    assert verify_saved(out).sound
    for source, cuts, dtype in ((single, (1, 3), "auto"), (tied, CUTS, "auto"), (single, CUTS, "bfloat16")):
        with pytest.raises(ConfigurationError, match="holds bottom, top as well"):
            save_split(source, out, cuts, parts=["trunk"], dtype=dtype, overwrite=True)
        assert files_of(out) == after


def test_files_next_to_a_component_are_not_overwritten(single: Path, tmp_path: Path) -> None:
    """An adapter that was saved into its folder, say; and a manifest that cannot be read says nothing."""
    out = tmp_path / "out"
    save_split(single, out, CUTS)
    (out / "trunk/adapter").mkdir()
    with pytest.raises(ConfigurationError, match="trunk/adapter was not saved with it"):
        save_split(single, out, CUTS, overwrite=True)
    (out / "trunk/adapter").rmdir()
    (out / "trunk" / MANIFEST).write_text("{}")
    with pytest.raises(ConfigurationError, match="manifests cannot be read"):
        save_split(single, out, CUTS, overwrite=True)
    assert (out / "trunk/model.safetensors").exists()


def test_quantised_weights_are_not_copied(cli: Any, single: Path, tmp_path: Path, edit_json: Any) -> None:
    """Said before anything is planned, and by a dry run as well."""
    edit_json(single / "config.json", quantization_config={"quant_method": "fp8"})
    with pytest.raises(ConfigurationError, match=r"quantised \(fp8\)") as caught:
        save_split(single, tmp_path / "out", CUTS)
    assert "--dtype" in caught.value.hint
    assert cli("split", single, "--split", "2", "4", "--out", tmp_path / "out", "--dry-run")[0] == 1


def test_a_dry_run_refuses_what_the_run_refuses(cli: Any, single: Path, tmp_path: Path) -> None:
    """A place that is taken, one below a file, a size that is none."""
    (tmp_path / "afile").write_text("")
    for dry in ((), ("--dry-run",)):
        for out in (single, tmp_path / "afile/x"):
            code, _, err = cli("split", single, "--split", "2", "4", "--out", out, *dry)
            assert (code, "hint" in err) == (1, True), err
        code, _, err = cli("split", single, "--split", "2", "4", "--out", "y", "--max-shard-size", "z", *dry)
        assert (code, "'z' is not a size" in err) == (2, True), err


def test_what_is_no_path_is_refused(single: Path, tmp_path: Path) -> None:
    """In words."""
    for wrong in (None, 3):
        for act in (
            lambda: load_component(wrong),  # type: ignore[arg-type]  # noqa: B023
            lambda: merge_split(wrong, out=tmp_path / "out"),  # type: ignore[arg-type]  # noqa: B023
            lambda: merge_split(single, out=wrong),  # type: ignore[arg-type]  # noqa: B023
            lambda: save_split(single, wrong, CUTS),  # type: ignore[arg-type]  # noqa: B023
        ):
            with pytest.raises(ConfigurationError, match=f"is {wrong}"):
                act()


def test_saved_components_are_no_model(cli: Any, single: Path, tmp_path: Path) -> None:
    """If a model is expected, the error says what the folder is, and what to do."""
    out = tmp_path / "out"
    save_split(single, out, CUTS)
    with pytest.raises(MissingFileError, match="a saved split, not a model") as caught:
        load_split_model("llama", CUTS, out)
    assert "load_split_directory" in caught.value.hint
    code, _, err = cli("plan", out, "--split", "2", "4")
    assert (code, "a saved split" in err) == (1, True)
    code, _, err = cli("plan", out / "trunk", "--split", "2", "4")
    assert (code, "is a saved trunk" in err) == (1, True)


def test_verify_says_what_it_does_not_do(cli: Any, single: Path, tmp_path: Path) -> None:
    """No directory, and options that mean nothing for saved components."""
    save_split(single, tmp_path / "out", CUTS)
    code, _, err = cli("verify", tmp_path / "nosuch")
    assert (code, "there is no directory" in err) == (1, True)
    code, _, err = cli("verify", tmp_path / "out", "--device", "cpu")
    assert (code, "--device" in err) == (2, True)


def test_a_raising_callback_stops_and_leaves_nothing(single: Path, tmp_path: Path) -> None:
    """What it raises comes out, and no file stays behind."""

    class StopHereError(Exception):
        pass

    said: list[Progress] = []

    def stop(progress: Progress) -> None:
        said.append(progress)
        if progress.stage == "saving" and progress.component == "top":
            raise StopHereError

    with pytest.raises(StopHereError):
        save_split(single, tmp_path / "out", CUTS, progress=stop)

    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == []
    saving = [progress.bytes_done for progress in said if progress.stage == "saving"]
    assert saving == sorted(saving)
    assert said[-1].bytes_total > saving[-1] > 0


def test_the_disk_space_is_checked_first(single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not fit is not begun."""
    import shutil
    from types import SimpleNamespace

    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(InsufficientDiskError, match="needs"):
        save_split(single, tmp_path / "out", CUTS)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"plugin": {"distribution": "splitlearn-llama", "version": "2.0"}}, "version of the family plugin differs"),
        ({"dtype": "bfloat16"}, "dtype differs: float32 .* bfloat16"),
        ({"source": {"model": "other", "commit": None, "fingerprint": "0" * 64}}, "checkpoint differs"),
        ({"split_points": [2, 3], "layers": [2, 3]}, r"split points differs: \(2, 4\) .* \(2, 3\)"),
        ({"num_layers": 7}, "number of layers differs: 6 .* 7"),
    ],
)
def test_components_that_do_not_belong_together_are_refused(
    single: Path, tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    """On a load of several, on a merge, and by verify; both sides are named."""
    save_split(single, tmp_path / "out", CUTS)
    spoil_manifest(tmp_path / "out/trunk", **changes)

    for act in (load_split_directory, lambda folder: merge_split(folder, out=tmp_path / "merged")):
        with pytest.raises(ConfigurationError, match=reason) as caught:
            act(tmp_path / "out")
        assert "bottom of" in str(caught.value)
        assert "trunk of" in str(caught.value)
    assert any("differs" in problem for problem in verify_saved(tmp_path / "out").problems)


def test_another_commit_is_refused(single: Path, tmp_path: Path) -> None:
    """Where both know one; a directory knows none."""
    save_split(single, tmp_path / "out", CUTS)
    source = json.loads((tmp_path / "out/trunk" / MANIFEST).read_text())["source"]
    spoil_manifest(tmp_path / "out/trunk", source={**source, "commit": "a" * 40})
    load_split_directory(tmp_path / "out")
    spoil_manifest(tmp_path / "out/top", source={**source, "commit": "b" * 40})

    with pytest.raises(ConfigurationError, match=f"commit differs: {'a' * 40} .* {'b' * 40}"):
        merge_split(tmp_path / "out/top", tmp_path / "out/trunk", tmp_path / "out/bottom", out=tmp_path / "merged")


def test_a_pipeline_of_two_sources_is_refused(single: Path, tied: Path) -> None:
    """Shapes fit; the checkpoints are not the same."""
    one: Any = load_split_model("llama", CUTS, single)
    other: Any = load_split_model("llama", CUTS, tied)

    with pytest.raises(ConfigurationError, match="checkpoint differs"):
        SplitCausalLM(one.bottom, other.trunk, one.top)


def test_sources_that_differ_only_in_values_are_distinguished(single: Path, tmp_path: Path) -> None:
    """With equal names, shapes and configuration, samples of values decide: in memory, on a merge and in verify."""
    import shutil

    other = tmp_path / "other"
    shutil.copytree(single, other)
    changed = {key: tensor + 1 for key, tensor in load_file(single / "model.safetensors").items()}
    save_file(changed, other / "model.safetensors", {"format": "pt"})
    save_split(single, tmp_path / "ends", CUTS, parts=["bottom", "top"])
    save_split(other, tmp_path / "trunk", CUTS, parts=["trunk"])
    both = (tmp_path / "ends", tmp_path / "trunk")
    one: Any = load_split_model("llama", CUTS, single)
    two: Any = load_split_model("llama", CUTS, other)

    with pytest.raises(ConfigurationError, match=r"model\.safetensors is not the same file"):
        SplitCausalLM(one.bottom, two.trunk, one.top)
    with pytest.raises(ConfigurationError, match=r"model\.safetensors is not the same file"):
        load_split_directory(*both)
    with pytest.raises(ConfigurationError, match=r"model\.safetensors is not the same file"):
        merge_split(*both, out=tmp_path / "merged")
    assert "model.safetensors is not the same file" in " ".join(verify_saved(*both).problems)

    # What was saved of components in memory knows the sample of its source, and older manifests have none.
    save_split(two.trunk, tmp_path / "trained")
    assert "differ" in " ".join(verify_saved(tmp_path / "ends", tmp_path / "trained").problems)
    path = tmp_path / "trunk/trunk" / MANIFEST
    source = {name: value for name, value in json.loads(path.read_text())["source"].items() if name != "samples"}
    spoil_manifest(path.parent, source=source)
    load_split_directory(*both)


def test_a_damaged_directory_is_described(single: Path, tmp_path: Path) -> None:
    """All faults at once: a changed byte, a short file, a lost component, a strange file."""
    out = tmp_path / "out"
    save_split(single, out, CUTS)
    assert verify_saved(out).sound
    weights = bytearray((out / "bottom/model.safetensors").read_bytes())
    weights[-1] ^= 1
    (out / "bottom/model.safetensors").write_bytes(weights)
    with pytest.raises(InvalidCheckpointError, match="SHA-256"):
        load_component(out, "bottom", verify=True)
    (out / "top/config.json").write_bytes(b"{}")
    (out / "trunk" / MANIFEST).unlink()
    (out / "top/model-extra.safetensors").write_bytes(b"")

    problems = " | ".join(verify_saved(out).problems)

    for reason in ("bottom/model.safetensors is not what was saved", "top/config.json has 2 bytes", "the trunk"):
        assert reason in problems
    assert "model-extra.safetensors is not in the manifest" in problems
    with pytest.raises(InvalidCheckpointError, match=r"config\.json has 2 bytes"):
        load_component(out, "top")


def test_a_changed_byte_does_not_come_into_a_checkpoint(single: Path, tmp_path: Path) -> None:
    """A merge reads every byte anyway, and holds it against the manifest."""
    out = tmp_path / "out"
    save_split(single, out, CUTS)
    weights = bytearray((out / "trunk/model.safetensors").read_bytes())
    weights[-1] ^= 1
    (out / "trunk/model.safetensors").write_bytes(weights)

    with pytest.raises(InvalidCheckpointError, match=r"trunk/model\.safetensors is not what was saved"):
        merge_split(out, out=tmp_path / "merged")

    assert sorted(path.name for path in tmp_path.iterdir() if "merged" in path.name) == []


def test_ends_with_different_values_of_a_tied_tensor_are_refused(tied: Path, tmp_path: Path) -> None:
    """One tensor, two values: nothing says which is meant."""
    ends: Any = load_split_model("llama", CUTS, tied, parts=["bottom"], strategy="copied")
    with torch.no_grad():
        ends.bottom.model.embed_tokens.weight.add_(1)
    save_split(ends.bottom, tmp_path / "bottom")
    save_split(tied, tmp_path / "rest", CUTS, parts=["trunk", "top"])

    with pytest.raises(ConfigurationError, match="different values"):
        merge_split(tmp_path / "bottom", tmp_path / "rest", out=tmp_path / "merged")
    with pytest.raises(ConfigurationError, match="different values"):
        load_split_directory(tmp_path / "bottom", tmp_path / "rest")
    assert "different values" in " ".join(verify_saved(tmp_path / "bottom", tmp_path / "rest").problems)


def test_a_component_with_other_modules_is_not_saved(single: Path, tmp_path: Path) -> None:
    """An adapter, a module too many, one too few, a resized embedding: words, and the good split stays."""
    out = tmp_path / "out"
    save_split(single, out, CUTS)
    before = files_of(out)

    def adapt(parts: Any) -> None:
        layer = parts.trunk.model.layers[2].mlp
        layer.up_proj.base_layer = torch.nn.Linear(4, 4)

    def add(parts: Any) -> None:
        parts.trunk.extra = torch.nn.Linear(4, 4)

    def remove(parts: Any) -> None:
        del parts.top.lm_head

    def resize(parts: Any) -> None:
        weight = parts.bottom.model.embed_tokens.weight
        parts.bottom.model.embed_tokens.weight = torch.nn.Parameter(weight[:-1].clone())

    for change, message in (
        (adapt, "there is an adapter on the trunk"),
        (add, r"extra\.weight is not in the checkpoint"),
        (remove, r"lm_head\.weight is missing"),
        (resize, r"embed_tokens\.weight is \[\d+, \d+\], and \["),
    ):
        parts = load_split_model("llama", CUTS, single, strategy="copied")
        change(parts)
        with pytest.raises(ConfigurationError, match=message):
            save_split(parts, out, overwrite=True)
        assert files_of(out) == before


def test_strided_tensors_of_a_bin_file_are_saved(single: Path, tmp_path: Path) -> None:
    """A view with steps is written as the values that it has."""
    state = load_file(single / "model.safetensors")
    expected = content(single)
    (single / "model.safetensors").unlink()
    strided = {}
    for key, tensor in state.items():
        wide = torch.zeros(*tensor.shape[:-1], tensor.shape[-1] * 2)
        wide[..., ::2] = tensor
        strided[key] = wide[..., ::2]
    torch.save(strided, single / "pytorch_model.bin")

    save_split(single, tmp_path / "out", CUTS)

    assert content(merge_split(tmp_path / "out", out=tmp_path / "merged")) == expected


def test_a_source_without_generation_settings_is_converted(single: Path, tmp_path: Path) -> None:
    """Then the top has none either."""
    (single / "generation_config.json").unlink()

    save_split(single, tmp_path / "out", CUTS, dtype="bfloat16")

    assert verify_saved(tmp_path / "out").sound


def test_components_of_unknown_origin_are_not_saved(whole: Any, tmp_path: Path) -> None:
    """A component from a state dict says nowhere how the model was cut."""
    from splitlearn_core import ModelRegistry

    trunk = ModelRegistry.get_model_class("llama", "trunk").from_pretrained_split(
        whole.state_dict(), whole.config, start_layer=2, end_layer=4
    )
    with pytest.raises(ConfigurationError, match="was not loaded from a checkpoint"):
        save_split([trunk], tmp_path / "out")
    with pytest.raises(ConfigurationError, match="cannot be saved as a split"):
        save_split([1], tmp_path / "out")  # type: ignore[list-item]


def test_asking_for_what_is_not_there(single: Path, tmp_path: Path) -> None:
    """Words, and the way out."""
    with pytest.raises(MissingFileError, match="no saved component"):
        load_component(single)
    save_split(single, tmp_path / "out", CUTS, parts=["bottom", "trunk"])
    with pytest.raises(ConfigurationError, match="holds bottom, trunk"):
        load_component(tmp_path / "out")
    with pytest.raises(MissingFileError, match="no top"):
        load_component(tmp_path / "out", "top")
    with pytest.raises(InvalidCheckpointError, match="holds the trunk of a llama"):
        load_split_model("llama", (1, 4), tmp_path / "out/trunk", parts=["trunk"])
    with pytest.raises(ConfigurationError, match="not a size"):
        save_split(single, tmp_path / "more", CUTS, max_shard_size="large")


def test_saving_and_merging_need_no_torch(llama: Any, single: Path, tmp_path: Path) -> None:
    """Bytes are copied; a fresh process has neither torch nor transformers after it."""
    code = (
        "import sys\nfrom splitlearn_core import merge_split, save_split, verify_saved\n"
        "save_split(sys.argv[1], sys.argv[2] + '/s', (2, 4))\n"
        "merge_split(sys.argv[2] + '/s', out=sys.argv[2] + '/m')\n"
        "assert verify_saved(sys.argv[2] + '/s').sound\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = llama.python("-c", code, str(single), str(tmp_path))

    assert done.returncode == 0, done.stderr
    assert content(tmp_path / "m") == content(single)


@pytest.mark.skipif(sys.platform != "linux", reason="limits and sparse files of Linux")
def test_a_checkpoint_larger_than_memory_is_split(llama: Any, single: Path, tmp_path: Path) -> None:
    """A gigabyte passes through a process that may have 200 MB of data."""
    header = json.loads((single / "config.json").read_text())
    rows = 4_000_000
    (single / "config.json").write_text(json.dumps({**header, "vocab_size": rows}))
    raw = (single / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    entries, position = json.loads(raw[8 : 8 + length]), 0
    for key, entry in sorted(entries.items()):
        if key == "__metadata__":
            continue
        if key in ("model.embed_tokens.weight", "lm_head.weight"):
            entry["shape"][0] = rows
        nbytes = entry["shape"][0] * (entry["shape"][1] if len(entry["shape"]) > 1 else 1) * 4
        entry["data_offsets"], position = [position, position + nbytes], position + nbytes
    text = json.dumps(entries).encode()
    with (single / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + position)
    assert position > 1_000_000_000
    code = (
        "import resource, sys\nresource.setrlimit(resource.RLIMIT_DATA, (200_000_000, 200_000_000))\n"
        "from splitlearn_core import save_split\nsave_split(sys.argv[1], sys.argv[2], (2, 4), parts=['bottom'])"
    )
    done = llama.python("-c", code, str(single), str(tmp_path / "out"))

    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/bottom/model.safetensors").stat().st_size > 500_000_000


def test_the_command_line_splits_verifies_and_merges(cli: Any, single: Path, tmp_path: Path) -> None:
    """Data on stdout; a fault is exit code 1, wrong usage 2."""
    out = tmp_path / "out"
    code, shown, err = cli("split", single, "--split", "2", "4", "--out", out, "--json")
    assert (code, err) == (0, "")
    assert [each["layers"] for each in json.loads(shown)["components"]] == [[0, 2], [2, 4], [4, 6]]
    assert cli("split", single, "--split", "2", "4", "--out", out)[0] == 1
    assert cli("split", single, "--split", "2", "4", "--out", out, "--force")[1].startswith("component")
    code, shown, _ = cli("verify", out, "--json")
    assert (code, json.loads(shown)["problems"]) == (0, [])
    code, shown, _ = cli("merge", out, "--out", tmp_path / "merged", "--json")
    assert (code, "config.json" in json.loads(shown)["files"]) == (0, True)
    assert content(tmp_path / "merged") == content(single)
    (out / "top/model.safetensors").write_bytes(b"")
    code, shown, _ = cli("verify", out)
    assert (code, "1 FAULTS" in shown, "has 0 bytes" in shown) == (1, True, True)
    assert cli("verify", single)[0] == 0
    assert cli("generate", single, "--prompt", "x")[0] == 1
    assert cli("generate", tmp_path / "out/trunk", "--prompt", "x")[0] == 1


def test_ranges_that_share_buffers_are_read_as_if_each_had_its_own(tmp_path: Path) -> None:
    """A piece stays valid until the next but one is requested, also across the end of a range."""
    content = bytes(range(256)) * 5
    (tmp_path / "file").write_bytes(content)
    ranges = [(0, 1), (1, 300), (300, 301), (301, 301), (301, 1280)]
    buffers = Buffers(128)
    kept = b""
    last: memoryview | None = None
    for piece in (p for begin, end in ranges for p in range_pieces(tmp_path / "file", begin, end, buffers)()):
        # Read one piece late, as a writer does that works while the next one is made.
        kept += b"" if last is None else bytes(last)
        last = piece
    assert last is not None
    assert kept + bytes(last) == content
