"""GGUF files on the Hub: named alone, fetched by ranges, in several parts, offline, and refused."""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import support.hub
from splitlearn_core import InvalidCheckpointError, MissingFileError, load_split_model, plan_fetch, plan_split
from splitlearn_core.checkpoint.hub import repository
from splitlearn_core.testing.worlds import parts_equal, tiny_model
from support.hub import LoopbackHub

gguf = pytest.importorskip("gguf", reason="gguf is not installed: GGUF files on the Hub were NOT tested")

REPO, SPLIT = "someone/in-gguf", (2, 4)
#: What is read to find a header, which has the vocabulary in it.
HEAD = 2**20


@pytest.fixture(scope="session")
def large() -> Any:
    return tiny_model("qwen2", tie_word_embeddings=False, hidden_size=128, intermediate_size=1024, head_dim=32)


def write(model: PreTrainedModel, path: Path, vocabulary: int = 101, tensors_per_file: int = 0) -> list[Path]:
    """Write a qwen2 in GGUF, in one file or in several; return the files."""
    config: Any = model.config
    writer = gguf.GGUFWriter(path, "qwen2", split_max_tensors=tensors_per_file)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_token_list([f"<{number}>" for number in range(vocabulary)])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config.num_hidden_layers)
    for key, tensor in model.state_dict().items():
        writer.add_tensor(names.get_name(key, try_suffixes=(".weight", ".bias")), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(path.parent.glob("*.gguf"))


def sent(hub: LoopbackHub) -> int:
    """Return the bytes of weight files that were transferred."""
    return sum(record.sent for record in hub.requests if str(record.filename).endswith(".gguf"))


def load(model: str | Path, *parts: str, **options: Any) -> Any:
    return load_split_model(None, SPLIT, model, parts=parts or ("bottom", "trunk", "top"), **options)


def equal(first: Any, second: Any) -> bool:
    return parts_equal(first, second)


def test_of_a_file_the_header_and_the_bytes_of_a_part_are_fetched(hub: LoopbackHub, large: Any, tmp_path: Path) -> None:
    """Without a config.json, and with other files in the repository; a second load asks for no byte."""
    (path,) = write(large, tmp_path / "model-f32.gguf")
    (tmp_path / "model-q0.gguf").write_bytes(b"another model")
    hub.add_repo(REPO, tmp_path)
    planned = plan_fetch(f"{REPO}:{path.name}", SPLIT, parts=("trunk",))
    loaded = load(f"{REPO}:{path.name}", "trunk")
    trunk = plan_split(path, SPLIT, parts=("trunk",)).nbytes

    assert planned.fetched <= trunk < path.stat().st_size / 2
    assert sent(hub) <= 2 * HEAD + trunk  # the plan read the header, too
    assert equal(loaded, load(path, "trunk"))
    before = sent(hub)
    assert equal(load(f"hub:{REPO}:{path.name}", "trunk"), loaded)
    assert equal(load(f"{REPO}:{path.name}", "trunk", local_files_only=True), loaded)
    assert sent(hub) == before
    with pytest.raises(MissingFileError, match=r"lacks .* bytes"):
        load(f"{REPO}:{path.name}", "top", local_files_only=True)


def test_a_header_that_is_longer_than_what_is_read_at_first(hub: LoopbackHub, large: Any, tmp_path: Path) -> None:
    """As those of models with a large vocabulary are."""
    (path,) = write(large, tmp_path / "model.gguf", vocabulary=101)
    padded = tmp_path / "padded"
    padded.mkdir()
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(padded / "long.gguf", "qwen2")
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            kind, *inner = field.types
            writer.add_key_value(key, field.contents(), kind, sub_type=inner[0] if inner else None)
    writer.add_array("tokenizer.ggml.merges", [f"merge {number}" * 8 for number in range(20_000)])
    for stored in reader.tensors:
        writer.add_tensor(stored.name, stored.data, raw_dtype=stored.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    hub.add_repo(REPO, padded)
    loaded = load(f"{REPO}:long.gguf", "bottom")
    assert sent(hub) < (padded / "long.gguf").stat().st_size
    assert equal(loaded, load(path, "bottom"))


@pytest.mark.parametrize("folder", ["", "F32/"])
def test_of_several_files_those_of_a_part_are_fetched(
    hub: LoopbackHub, large: Any, tmp_path: Path, folder: str
) -> None:
    """In a folder of the repository, too; of the others the headers."""
    place = tmp_path / "repo" / folder
    place.mkdir(parents=True)
    paths = write(large, place / "model.gguf", tensors_per_file=30)
    (tmp_path / "repo/config.json").write_text(large.config.to_json_string())
    hub.add_repo(REPO, tmp_path / "repo")
    name = f"{REPO}:{folder}{paths[1].name}"
    loaded = load(name, "top")
    trunk = plan_split(paths[0], SPLIT, parts=("top",))

    assert len(paths) > 2
    assert len(trunk.shards) < len(paths)
    assert sent(hub) <= (HEAD + 10_000) * len(paths) + trunk.nbytes
    assert equal(loaded, load(paths[0], "top"))
    before = sent(hub)
    assert equal(load(name, "top", local_files_only=True), loaded)
    assert sent(hub) == before


def test_what_is_not_there_is_named(hub: LoopbackHub, large: Any, tmp_path: Path) -> None:
    """A file, a part of several, a repository without config.json, and a file that nothing reads."""
    paths = write(large, tmp_path / "model.gguf", tensors_per_file=30)
    paths[1].unlink()
    hub.add_repo(REPO, tmp_path)
    for name, expected in {
        f"{REPO}:other.gguf": "has no other.gguf",
        f"{REPO}:{paths[0].name}": paths[1].name,
        f"{REPO}:model.onnx": "model.onnx of",
        REPO: "has no config.json",
        "someone/else:model.gguf": "neither a directory here nor a repository",
    }.items():
        with pytest.raises(MissingFileError, match=re.escape(expected)) as caught:
            load(name, "top")
        assert caught.value.hint, name
    assert torch.is_grad_enabled()


def test_a_file_whose_size_is_not_listed_is_fetched_whole(
    hub: LoopbackHub, large: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path,) = write(large, tmp_path / "model.gguf")
    listing = support.hub._sibling
    monkeypatch.setattr(support.hub, "_sibling", lambda entry: {**listing(entry), "size": None})
    hub.add_repo(REPO, tmp_path)
    assert equal(load(f"{REPO}:{path.name}", "trunk"), load(path, "trunk"))


def test_a_header_without_end_is_not_fetched(hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The header of any file could say that it is as long as the file."""
    limit, size = 2 * HEAD, 16 * HEAD
    monkeypatch.setattr(repository, "_MAX_HEADER", limit, raising=False)
    stated = struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, 0, size)
    with (tmp_path / "model.gguf").open("wb") as file:
        file.write(b"GGUF" + stated)
        file.truncate(file.tell() + size)
    hub.add_repo(REPO, tmp_path)
    with pytest.raises(InvalidCheckpointError, match="header"):
        plan_split(f"{REPO}:model.gguf", SPLIT)
    assert sent(hub) <= limit + HEAD


def test_a_folder_in_a_name_is_not_taken_for_two_hyphens(hub: LoopbackHub, large: Any, tmp_path: Path) -> None:
    """What is kept of a file in a folder is not used for another file."""
    sizes = {"hidden_size": 128, "intermediate_size": 1024, "head_dim": 32}
    other = tiny_model("qwen2", tie_word_embeddings=False, seed=1, **sizes)
    (tmp_path / "a").mkdir()
    files = [*write(large, tmp_path / "a/b.gguf"), *write(other, tmp_path / "a--b.gguf")]
    hub.add_repo(REPO, tmp_path)
    for options in ({}, {"local_files_only": True}):
        for name, path in zip(("a/b.gguf", "a--b.gguf"), files, strict=True):
            assert equal(load(f"{REPO}:{name}", "trunk", **options), load(path, "trunk")), name


def test_of_many_missing_files_some_are_named(hub: LoopbackHub, tmp_path: Path) -> None:
    (tmp_path / "model-00001-of-99999.gguf").write_bytes(b"GGUF")
    hub.add_repo(REPO, tmp_path)
    with pytest.raises(MissingFileError, match=r"lacks model-00002-of-99999\.gguf, .*more") as caught:
        plan_split(f"{REPO}:model-00001-of-99999.gguf", SPLIT)
    assert len(caught.value.message) < 1000
