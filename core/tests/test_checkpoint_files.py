"""The files of a checkpoint: config.json, the index and the shards, sound and unsound."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from splitlearn_core import (
    CheckpointError,
    ConfigurationError,
    InvalidCheckpointError,
    MissingFileError,
    SplitLearnError,
    TensorMismatchError,
    UnknownModelTypeError,
    load_split_model,
    plan_split,
)
from splitlearn_core.checkpoint.files import of_one_model

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CUTS = (2, 4)

pytestmark = pytest.mark.usefixtures("llama")


def weight_map(folder: Path) -> dict[str, str]:
    return dict(json.loads((folder / INDEX).read_text())["weight_map"])


def shards_of(folder: Path, *prefixes: str) -> set[str]:
    return {shard for key, shard in weight_map(folder).items() if key.startswith(prefixes)}


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe\x00", "not in UTF-8"),
        (b"[" * 200_000, "not valid JSON"),
        (b"[]", "list"),
        (b'"llama"', "str"),
        (b"null", "NoneType"),
        (b"{}", "model_type"),
        (b'{"model_type": null}', "model_type"),
        (b'{"model_type": 7}', "model_type"),
        (b'{"architectures": ["LlamaForCausalLM"]}', "model_type"),
    ],
    ids=["empty", "cut off", "binary", "deep", "list", "string", "null", "{}", "null type", "number", "no type"],
)
def test_a_bad_config_is_named(single: Path, content: bytes, named: str) -> None:
    """What config.json has to be, and which file it is."""
    (single / "config.json").write_bytes(content)

    with pytest.raises(InvalidCheckpointError) as caught:
        plan_split(single, CUTS)

    assert str(single / "config.json") in caught.value.message
    assert named in caught.value.message
    assert caught.value.hint


def test_a_config_with_a_byte_order_mark_is_read(single: Path) -> None:
    """Some editors write one."""
    path = single / "config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())

    assert plan_split(single, CUTS).model_type == "llama"


def test_a_missing_config_says_what_there_is(single: Path) -> None:
    """A folder without config.json is shown with its files."""
    (single / "config.json").unlink()

    with pytest.raises(MissingFileError, match=r"no config\.json") as caught:
        plan_split(single, CUTS)

    assert isinstance(caught.value, FileNotFoundError)
    assert SINGLE in caught.value.message
    assert caught.value.hint


def test_an_empty_folder_holds_nothing(tmp_path: Path) -> None:
    """The message of an empty folder is readable too."""
    empty = tmp_path / "empty"
    empty.mkdir()

    with pytest.raises(MissingFileError, match="nothing"):
        plan_split(empty, CUTS)


def test_an_unknown_model_type_is_named(single: Path, edit_json: Callable[..., None]) -> None:
    """The type of config.json that no plugin has is a KeyError of ours."""
    edit_json(single / "config.json", model_type="falcon9")

    with pytest.raises(UnknownModelTypeError, match="falcon9"):
        plan_split(single, CUTS)


@pytest.mark.parametrize("value", [None, {}], ids=repr)
def test_an_empty_quantisation_is_none(single: Path, edit_json: Callable[..., None], value: Any) -> None:
    """A null there means plain weights."""
    edit_json(single / "config.json", quantization_config=value)

    assert plan_split(single, CUTS).num_layers == 6


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_hidden_layers", ...),
        ("num_hidden_layers", "six"),
        ("hidden_size", ...),
        ("hidden_size", "wide"),
        ("num_attention_heads", 0),
        ("num_key_value_heads", "two"),
        ("dtype", "nonsense"),
        ("dtype", 16),
    ],
)
def test_a_rubbish_value_in_config_is_ours_to_say(
    single: Path, edit_json: Callable[..., None], name: str, value: Any
) -> None:
    """A plan of a config with a wrong value is an error of ours that is a ValueError."""
    edit_json(single / "config.json", **{name: value})

    with pytest.raises(SplitLearnError) as caught:
        plan_split(single, CUTS)

    assert isinstance(caught.value, ValueError)
    assert name in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hidden_act", "nonsense"),
        ("intermediate_size", "big"),
        ("rms_norm_eps", "small"),
        ("rope_parameters", {"rope_type": "nonsense", "rope_theta": 10000.0}),
        ("rope_parameters", "nonsense"),
        ("vocab_size", -1),
        ("pad_token_id", "zero"),
    ],
)
def test_a_value_that_the_model_class_refuses_is_ours_to_say(
    single: Path, edit_json: Callable[..., None], name: str, value: Any
) -> None:
    """What Hugging Face's classes raise over config.json comes as an error of ours that names the model."""
    edit_json(single / "config.json", **{name: value})

    with pytest.raises(SplitLearnError) as caught:
        load_split_model("llama", CUTS, single)

    assert isinstance(caught.value, ValueError)
    assert str(single) in caught.value.message


def test_a_file_is_no_folder(single: Path) -> None:
    """A path to a file names the folder to give instead."""
    with pytest.raises(MissingFileError, match="is a file") as caught:
        plan_split(single / SINGLE, CUTS)

    assert str(single) in caught.value.hint


@pytest.mark.parametrize("name", ["./nowhere", "../nowhere", "~/surely/absent", "/surely/absent/model"])
def test_an_absent_path_is_not_looked_for_on_the_hub(name: str) -> None:
    """What is plainly a path is a missing directory, at once."""
    with pytest.raises(MissingFileError, match="no directory") as caught:
        plan_split(name, CUTS)

    assert name in caught.value.message
    assert caught.value.hint


def test_an_absent_path_object_is_a_path() -> None:
    """A ``Path`` is never a repository."""
    with pytest.raises(MissingFileError, match="no directory"):
        plan_split(Path("owner/name"), CUTS)


@pytest.mark.parametrize("name", ["a/b/c", "not a name", "owner/na me", "-x-/--", "owner/", "a..b", "x" * 200])
def test_what_no_repository_can_be_called_is_missing(name: str) -> None:
    """Neither a directory nor a name that the Hub allows."""
    with pytest.raises(MissingFileError, match="neither a directory") as caught:
        plan_split(name, CUTS, local_files_only=True)

    assert caught.value.hint


@pytest.mark.parametrize("name", ["https://huggingface.co/owner/name", "hub:https://huggingface.co/owner/name.gguf"])
def test_an_address_is_no_repository_with_a_file(name: str) -> None:
    """Although it has a colon."""
    with pytest.raises(MissingFileError, match="is an address") as caught:
        plan_split(name, CUTS, local_files_only=True)

    assert "owner/name:FILE" in caught.value.hint


def test_the_files_of_a_model_in_many_parts_are_found_without_comparing_each_with_each() -> None:
    class Name(str):
        __slots__ = ()
        compared = 0

        def __eq__(self, other: object) -> bool:
            Name.compared += 1
            return str.__eq__(self, other)

        __hash__ = str.__hash__

    parts = [f"model-{number:05}-of-00300.gguf" for number in range(1, 301)]
    sizes = {Name(name): 1 for name in (*parts, "other.gguf")}
    Name.compared = 0
    found = of_one_model(sizes, parts[0])

    assert [*found] == parts
    assert Name.compared < 3 * len(parts)


def test_a_repository_that_is_not_cached_is_missing(tmp_path: Path) -> None:
    """With the Hub off, the message says so and how to turn it on."""
    with pytest.raises(MissingFileError, match="not in the cache") as caught:
        plan_split("owner/name", CUTS, local_files_only=True, cache_dir=tmp_path)

    assert "local_files_only" in caught.value.hint


def test_an_empty_name_is_refused() -> None:
    """Not the current directory."""
    with pytest.raises(ConfigurationError) as caught:
        plan_split("", CUTS)

    assert caught.value.hint


def test_a_directory_wins_over_a_repository(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative name that is a directory here is that directory."""
    monkeypatch.chdir(single.parent)

    assert plan_split("single", CUTS).commit is None


@pytest.mark.parametrize("as_type", [str, Path, os.fspath], ids=["str", "Path", "fspath"])
def test_a_directory_may_be_a_text_or_a_path(single: Path, as_type: Callable[[Path], Any]) -> None:
    """Both are the same checkpoint."""
    assert plan_split(as_type(single), CUTS).model == str(single)


@pytest.mark.parametrize(
    "shard",
    [
        "../x.safetensors",
        "/etc/x.safetensors",
        "a/b.safetensors",
        "./x.safetensors",
        "..\\x.safetensors",
        "a\\b.safetensors",
        "C:x.safetensors",
        "C:\\x.safetensors",
        "x.bin",
        "x.safetensors\0",
        ".",
        "..",
        "",
        None,
        7,
        ["x.safetensors"],
    ],
    ids=repr,
)
def test_an_index_may_only_name_files_next_to_it(sharded: Path, shard: Any) -> None:
    """An index that leads out of its folder is refused, and the tensor is named."""
    index = {"weight_map": {**weight_map(sharded), "model.norm.weight": shard}}
    (sharded / INDEX).write_text(json.dumps(index))

    with pytest.raises(InvalidCheckpointError, match=r"model\.norm\.weight") as caught:
        plan_split(sharded, CUTS)

    assert caught.value.hint


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"{}", b'{"weight_map": {}}', b'{"weight_map": []}', b'{"weight_map": "x"}'],
    ids=["empty", "cut off", "list", "{}", "no tensors", "map is a list", "map is a text"],
)
def test_a_bad_index_is_named(sharded: Path, content: bytes) -> None:
    """The file is in the message."""
    (sharded / INDEX).write_bytes(content)

    with pytest.raises(InvalidCheckpointError, match=r"model\.safetensors\.index\.json"):
        plan_split(sharded, CUTS)


def test_a_missing_shard_matters_only_where_it_is_needed(sharded: Path) -> None:
    """Trunk loads with all other shards deleted; the bottom names what is missing."""
    trunk = shards_of(sharded, "model.layers.2.", "model.layers.3.")
    deleted = set(weight_map(sharded).values()) - trunk
    assert deleted
    for name in deleted:
        (sharded / name).unlink()

    parts = load_split_model("llama", CUTS, sharded, parts=["trunk"])
    with pytest.raises(MissingFileError) as caught:
        load_split_model("llama", CUTS, sharded, parts=["bottom"])

    assert parts.trunk is not None
    assert isinstance(caught.value, FileNotFoundError)
    assert any(name in caught.value.message for name in deleted)
    assert caught.value.hint


def test_all_missing_shards_are_listed(sharded: Path) -> None:
    """All missing shards are listed at once."""
    needed = sorted(shards_of(sharded, "model.layers.2.", "model.layers.3."))
    assert len(needed) > 1
    for name in needed:
        (sharded / name).unlink()

    with pytest.raises(MissingFileError) as caught:
        plan_split(sharded, CUTS, parts=["trunk"])

    for name in needed:
        assert name in caught.value.message


def test_an_index_may_not_name_a_tensor_that_is_not_there(sharded: Path) -> None:
    """The tensor and the shard it should be in are named."""
    shard = weight_map(sharded)["model.norm.weight"]
    content = load_file(sharded / shard)
    del content["model.norm.weight"]
    save_file(content, sharded / shard)

    with pytest.raises(InvalidCheckpointError) as caught:
        plan_split(sharded, CUTS)

    assert f"model.norm.weight in {shard}" in caught.value.message
    assert caught.value.hint
    assert plan_split(sharded, CUTS, parts=["trunk"]).components


def test_a_tensor_in_the_wrong_shard_is_named(sharded: Path) -> None:
    """An index that sends a tensor to another file is an error, not a search."""
    index = weight_map(sharded)
    other = next(shard for shard in index.values() if shard != index["model.norm.weight"])
    (sharded / INDEX).write_text(json.dumps({"weight_map": {**index, "model.norm.weight": other}}))

    with pytest.raises(InvalidCheckpointError, match=r"model\.norm\.weight"):
        load_split_model("llama", CUTS, sharded)


@pytest.mark.parametrize("left", [0, 4, 100, -1], ids=["empty", "in the length", "in the header", "in the data"])
@pytest.mark.parametrize("call", ["plan", "load"])
def test_a_truncated_shard_is_named(single: Path, left: int, call: str) -> None:
    """A shard cut off anywhere is an error before anything is read from it."""
    path = single / SINGLE
    path.write_bytes(path.read_bytes()[:left])

    with pytest.raises(InvalidCheckpointError, match=r"model\.safetensors") as caught:
        plan_split(single, CUTS) if call == "plan" else load_split_model("llama", CUTS, single)

    assert caught.value.hint


def test_metadata_that_the_library_refuses_is_an_error_of_ours(single: Path) -> None:
    """A header whose ``__metadata__`` is no mapping of texts fails as a checkpoint, not as a stray exception."""
    path = single / SINGLE
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = {**json.loads(content[8 : 8 + length]), "__metadata__": {"format": 7}}
    encoded = json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + content[8 + length :])

    with pytest.raises(InvalidCheckpointError, match=r"model\.safetensors"):
        load_split_model("llama", CUTS, single)


def test_pickled_weights_are_not_opened(single: Path) -> None:
    """A checkpoint with .pt files alone says which files are read, and how to convert it."""
    (single / SINGLE).rename(single / "model.pt")

    with pytest.raises(CheckpointError, match=r"model\.pt") as caught:
        load_split_model("llama", CUTS, single)

    assert "save_pretrained" in caught.value.hint


def test_shards_without_an_index_are_named(sharded: Path) -> None:
    """The index is what is missing, and the message says so."""
    (sharded / INDEX).unlink()

    with pytest.raises(MissingFileError, match=r"index\.json") as caught:
        load_split_model("llama", CUTS, sharded)

    assert "-of-" in caught.value.message
    assert caught.value.hint


def test_a_config_alone_can_be_planned_and_not_loaded(single: Path) -> None:
    """Without weights the plan is the same as with them, from config.json."""
    with_weights = plan_split(single, CUTS)
    (single / SINGLE).unlink()

    plan = plan_split(single, CUTS)
    with pytest.raises(MissingFileError, match="no weights") as caught:
        load_split_model("llama", CUTS, single)

    assert (with_weights.source, plan.source) == ("headers", "config")
    assert [(p.parameters, p.nbytes, p.kv_bytes_per_token) for p in plan.components] == [
        (p.parameters, p.nbytes, p.kv_bytes_per_token) for p in with_weights.components
    ]
    assert plan.shards == ()
    assert caught.value.hint


def test_one_file_wins_over_an_index(checkpoint: Callable[[str], Path], whole: Any) -> None:
    """As in transformers: a leftover index next to model.safetensors is not read."""
    single = checkpoint("single")
    (single / INDEX).write_text("rubbish")

    parts = load_split_model("llama", CUTS, single, parts=["trunk"])

    assert torch.equal(
        parts.trunk.get_parameter("model.layers.2.mlp.up_proj.weight"), whole.model.layers[2].mlp.up_proj.weight
    )  # type: ignore[union-attr]


def spoil(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Rewrite the tensors of a checkpoint of one file."""
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})


def mismatch(folder: Path, **options: Any) -> str:
    with pytest.raises(TensorMismatchError) as caught:
        load_split_model("llama", CUTS, folder, **options)
    assert isinstance(caught.value, ValueError)
    assert caught.value.hint
    return caught.value.message


def test_a_component_lists_all_its_wrong_tensors(single: Path) -> None:
    """Missing, unexpected and mis-shaped tensors of one component come in one message."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.layers.2.mlp.up_proj.weight"]
        del tensors["model.layers.3.input_layernorm.weight"]
        tensors["model.layers.2.mlp.extra.weight"] = torch.zeros(3)
        tensors["model.layers.3.mlp.down_proj.weight"] = torch.zeros(5, 7)

    spoil(single, change)

    message = mismatch(single, parts=["trunk"])

    assert "4 are wrong" in message
    assert "missing: model.layers.2.mlp.up_proj.weight [48, 32]" in message
    assert "missing: model.layers.3.input_layernorm.weight [32]" in message
    assert "unexpected: model.layers.2.mlp.extra.weight [3]" in message
    assert "mis-shaped: model.layers.3.mlp.down_proj.weight is [5, 7]" in message


def test_wrong_tensors_of_all_components_are_listed(single: Path) -> None:
    """A fault in the bottom does not hide one in the top."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.layers.0.mlp.up_proj.weight"]
        tensors["model.norm.weight"] = torch.zeros(5)

    spoil(single, change)

    message = mismatch(single)

    assert "model.layers.0.mlp.up_proj.weight" in message
    assert "model.norm.weight" in message


def test_a_tensor_without_a_place_does_not_hide_the_others(single: Path) -> None:
    """Unexpected, missing and mis-shaped tensors are listed together."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["vision.weight"] = torch.zeros(3)
        del tensors["model.layers.0.mlp.up_proj.weight"]
        tensors["model.norm.weight"] = torch.zeros(5)

    spoil(single, change)

    message = mismatch(single)

    assert "vision.weight" in message
    assert "model.layers.0.mlp.up_proj.weight" in message
    assert "model.norm.weight" in message


def test_wrong_tensors_of_other_components_do_not_matter(single: Path) -> None:
    """A trunk is not refused for what is wrong in the top."""
    spoil(single, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(5)}))

    assert load_split_model("llama", CUTS, single, parts=["trunk"]).trunk is not None
    assert "model.norm.weight" in mismatch(single, parts=["top"])


def test_a_missing_head_is_missing(single: Path) -> None:
    """A config that ties nothing needs a head of its own."""
    spoil(single, lambda tensors: tensors.pop("lm_head.weight"))

    assert "missing: lm_head.weight" in mismatch(single)


def test_a_config_of_another_size_lists_what_does_not_fit(single: Path, edit_json: Callable[..., None]) -> None:
    """A wrong width is a mismatch of tensors, with both shapes."""
    edit_json(single / "config.json", intermediate_size=64)

    assert "is [48, 32] in the file, [64, 32] by config.json" in mismatch(single)


@pytest.mark.parametrize(("layers", "options"), [(5, {"strict": True}), (7, {})])
def test_a_config_of_another_depth_is_a_mismatch(
    single: Path, edit_json: Callable[..., None], layers: int, options: dict[str, Any]
) -> None:
    """Too many layers in config.json: missing tensors; too few: unexpected ones, which a strict load refuses."""
    edit_json(single / "config.json", num_hidden_layers=layers)

    message = mismatch(single, **options)

    assert f"model.layers.{min(layers, 6)}.mlp.up_proj.weight" in message or "model.layers.5." in message


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2], ids=str
)
def test_a_weight_of_another_kind_is_a_mismatch(single: Path, dtype: torch.dtype) -> None:
    """Whole numbers or 8-bit floats in the place of a weight are refused, not loaded as they are."""
    name = "model.layers.2.mlp.up_proj.weight"
    spoil(single, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))

    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")) as caught:
        load_split_model("llama", CUTS, single, parts=["trunk"])

    assert isinstance(caught.value, ValueError)
    assert caught.value.hint


@pytest.mark.parametrize(
    "content",
    [b"{", b"[]", b"\xff", b'{"max_new_tokens": -5}', b'{"temperature": "hot"}'],
    ids=["cut off", "list", "binary", "bad number", "bad type"],
)
def test_bad_generation_settings_are_named(single: Path, content: bytes) -> None:
    """A spoilt generation_config.json is an error of ours that names it, or does not matter."""
    (single / "generation_config.json").write_bytes(content)

    try:
        loaded = load_split_model("llama", CUTS, single).trunk is not None
    except SplitLearnError as error:
        loaded = "generation_config.json" in str(error)

    assert loaded


@pytest.mark.parametrize(
    "name",
    ["x" * 5000, "/" + "x" * 5000, "x/" * 3000, "~surely-no-such-user/model", "a\0b", "/a\0b"],
    ids=["long name", "long path", "deep path", "no such user", "a zero", "a path with a zero"],
)
def test_what_no_system_can_open_is_missing(name: str) -> None:
    """Names that the operating system itself refuses are missing models too."""
    with pytest.raises(MissingFileError) as caught:
        plan_split(name, CUTS, local_files_only=True)

    assert caught.value.hint


def test_a_shard_that_is_a_folder_is_missing(single: Path) -> None:
    """And so is a link that leads nowhere."""
    (single / SINGLE).unlink()
    (single / SINGLE).mkdir()
    with pytest.raises(MissingFileError):
        load_split_model("llama", CUTS, single)

    (single / SINGLE).rmdir()
    (single / SINGLE).symlink_to("gone")
    with pytest.raises(MissingFileError):
        load_split_model("llama", CUTS, single)


def test_a_linked_shard_is_read(single: Path, tmp_path: Path) -> None:
    """The Hub's cache is made of links."""
    (single / SINGLE).rename(tmp_path / "blob")
    (single / SINGLE).symlink_to(tmp_path / "blob")

    assert load_split_model("llama", CUTS, single).trunk is not None


#: Invalid values in config.json, and the message for each.
MEANINGLESS: list[tuple[dict[str, Any], str]] = [
    ({"dtype": "float99"}, "dtype is 'float99'"),
    ({"dtype": ..., "torch_dtype": "float99"}, "torch_dtype is 'float99'"),
    ({"dtype": 7}, "dtype is 7"),
    ({"dtype": ["float32"]}, "dtype is a list"),
    ({"dtype": {"trunk": "float32"}}, "dtype is an object"),
    ({"dtype": "int8"}, "dtype is 'int8'"),
    ({"model_type": 5}, "model_type is 5, not a string"),
    ({"model_type": ["llama"]}, "model_type is a list"),
    ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no', not true or false"),
    ({"layer_types": "full_attention"}, "layer_types is 'full_attention', not a list"),
]


@pytest.mark.parametrize(("changes", "named"), MEANINGLESS, ids=[named for _, named in MEANINGLESS])
def test_a_value_of_the_wrong_type_is_named(
    single: Path, edit_json: Callable[..., None], cli: Callable[..., Any], changes: dict[str, Any], named: str
) -> None:
    """The file and the field, in every command and in Python, before the tokenizer is looked at."""
    (single / "tokenizer.json").write_text("{}")
    edit_json(single / "config.json", **changes)

    with pytest.raises(InvalidCheckpointError) as caught:
        load_split_model(None, CUTS, single)

    assert str(single / "config.json") in caught.value.message
    assert named in caught.value.message
    for command in (
        ["generate", "--prompt", "x"],
        ["generate", "--prompt", "x", "--dtype", "float32"],
        ["plan"],
        ["verify"],
    ):
        code, out, err = cli(command[0], single, "--split", "2", "4", *command[1:])
        assert (code, out) == (1, "")
        assert named in err
        assert "tokenizer" not in err


@pytest.mark.parametrize(
    ("stated", "dtype"), [("half", "float16"), ("torch.bfloat16", "bfloat16"), ("double", "float64")]
)
def test_names_of_torch_are_dtypes(single: Path, edit_json: Callable[..., None], stated: str, dtype: str) -> None:
    """As ``from_pretrained`` takes them."""
    edit_json(single / "config.json", dtype=stated)

    assert plan_split(single, CUTS).dtype == dtype


def test_an_error_in_the_configuration_is_no_error_of_the_tokenizer(
    single: Path, edit_json: Callable[..., None], cli: Callable[..., Any]
) -> None:
    """transformers reads it to choose a tokenizer, and its own classes may refuse any value."""
    (single / "tokenizer.json").write_text("{}")
    edit_json(single / "config.json", hidden_act=5)

    code, _, err = cli("generate", single, "--split", "2", "4", "--prompt", "x")

    assert code == 1
    assert "hidden_act" in err
    assert "config.json" in err
    assert "no tokenizer" not in err
