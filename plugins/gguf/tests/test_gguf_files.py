"""Whatever a file says: it is read rightly, or refused by name before anything is built from it."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from splitlearn_core import (
    CheckpointError,
    ConfigurationError,
    InvalidCheckpointError,
    SplitLearnError,
    TensorMismatchError,
    load_split_model,
    plan_split,
)
from splitlearn_gguf.header import Array, header_length, read_header
from splitlearn_gguf.strategy import GgufStrategy

pytestmark = pytest.mark.libs

Write = Callable[..., Path]


def head(entries: bytes = b"", *, tensors: bytes = b"", counts: tuple[int, int] = (0, 0), version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, counts[1], counts[0]) + entries + tensors


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def entry(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + sizes + struct.pack("<IQ", kind, offset)


ARCHITECTURE = entry("general.architecture", 8, text("llama"))


def test_a_header_is_what_the_library_reads(gguf_file: Write) -> None:
    """Names, shapes, types, places and metadata, held against gguf's own reader."""
    path = gguf_file("gpt2", "Q4_0")
    header, reader = read_header(path), gguf.GGUFReader(path)

    assert len(header.tensors) == len(reader.tensors)
    for known in reader.tensors:
        found = header.tensors[known.name]
        assert found.shape == tuple(reversed(known.shape.tolist()))
        assert (found.type, found.begin, found.nbytes) == (known.tensor_type, known.data_offset, known.n_bytes)
    fields = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert header.metadata.keys() == fields.keys()
    for key, value in header.metadata.items():
        assert value == (Array(len(fields[key])) if isinstance(value, Array) else fields[key]), key


def test_small_arrays_of_numbers_are_kept(tmp_path: Path) -> None:
    """Large ones, and texts, are counted."""
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_array("few", [1, 2, 3])
    writer.add_array("many", list(range(5000)))
    writer.add_array("words", ["a", "bc"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()

    metadata = read_header(tmp_path / "x.gguf").metadata

    assert (metadata["few"], metadata["many"], metadata["words"]) == ([1, 2, 3], Array(5000), Array(2))


HOSTILE = {
    "empty": (b"", "too early"),
    "another format": (b"PK\3\4" + bytes(40), "does not begin like a GGUF file"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "version 1": (head(version=1), "version 1"),
    "version of the future": (head(version=9), "version 9"),
    "countless entries": (head(counts=(2**63, 0)), "metadata entries"),
    "countless tensors": (head(ARCHITECTURE, counts=(1, 2**63)), "tensors"),
    "an endless key": (head(struct.pack("<Q", 2**63) + bytes(20), counts=(1, 0)), "65535"),
    "an endless text": (head(text("k") + struct.pack("<IQ", 8, 2**63), counts=(1, 0)), "metadata 'k'"),
    "an endless array of numbers": (head(text("k") + struct.pack("<IIQ", 9, 0, 2**63), counts=(1, 0)), "numbers in"),
    "an endless array of texts": (head(text("k") + struct.pack("<IIQ", 9, 8, 2**60), counts=(1, 0)), "strings in"),
    "an array of arrays": (head(text("k") + struct.pack("<IIQ", 9, 9, 1) + bytes(20), counts=(1, 0)), "type 9"),
    "an unknown type of value": (head(entry("k", 77, bytes(20)), counts=(1, 0)), "type 77"),
    "no architecture": (head(entry("k", 4, bytes(4)), counts=(1, 0)), "general.architecture"),
    "an architecture that is a number": (head(entry("general.architecture", 4, bytes(4)), counts=(1, 0)), "no general"),
    "a key twice": (head(ARCHITECTURE * 2, counts=(2, 0)), "occurs twice"),
    "a key that is no text": (head(struct.pack("<Q", 2) + b"\xff\xfe" + bytes(20), counts=(1, 0)), "not UTF-8"),
    "alignment 0": (head(ARCHITECTURE + entry("general.alignment", 4, bytes(4)), counts=(2, 0)), "power of two"),
    "alignment 24": (
        head(ARCHITECTURE + entry("general.alignment", 4, struct.pack("<I", 24)), counts=(2, 0)),
        "power of two",
    ),
    "alignment as text": (head(ARCHITECTURE + entry("general.alignment", 8, text("32")), counts=(2, 0)), "power"),
    "a part of a model": (
        head(ARCHITECTURE + entry("split.count", 2, struct.pack("<H", 4)), counts=(2, 0)),
        "llama-gguf-split --merge",
    ),
    "too many dimensions": (head(ARCHITECTURE, tensors=tensor("x", (1,) * 5), counts=(1, 1)), "5 dimensions"),
    "countless dimensions": (
        head(ARCHITECTURE, tensors=text("x") + struct.pack("<I", 2**32 - 1) + bytes(64), counts=(1, 1)),
        "4294967295 dimensions",
    ),
    "no dimensions": (
        head(ARCHITECTURE, tensors=tensor("x", ()) + bytes(64), counts=(1, 1)),
        "its shape [] is invalid",
    ),
    "a size of nothing": (head(ARCHITECTURE, tensors=tensor("x", (0, 4)), counts=(1, 1)), "is invalid"),
    "sizes that overflow": (head(ARCHITECTURE, tensors=tensor("x", (2**33, 2**33)), counts=(1, 1)), "is invalid"),
    "data past the end": (head(ARCHITECTURE, tensors=tensor("x", (4, 4)), counts=(1, 1)), "it ends at byte"),
    "an offset past the end": (
        head(ARCHITECTURE, tensors=tensor("x", (1,), offset=2**63), counts=(1, 1)) + bytes(64),
        "it ends at byte",
    ),
    "an odd offset": (head(ARCHITECTURE, tensors=tensor("x", (1,), offset=1), counts=(1, 1)) + bytes(99), "multiple"),
    "an unknown type": (head(ARCHITECTURE, tensors=tensor("x", (1,), 99), counts=(1, 1)) + bytes(99), "number 99"),
    "a broken row": (head(ARCHITECTURE, tensors=tensor("x", (33,), 8), counts=(1, 1)) + bytes(99), "blocks of 32"),
    "a tensor twice": (
        head(ARCHITECTURE, tensors=tensor("x", (1,)) + tensor("x", (1,), offset=32), counts=(1, 2)) + bytes(99),
        "occurs twice",
    ),
    "tensors that overlap": (
        head(ARCHITECTURE, tensors=tensor("x", (16,)) + tensor("y", (1,), offset=32), counts=(1, 2)) + bytes(99),
        "'x' and 'y' overlap",
    ),
}


@pytest.mark.parametrize(("content", "named"), HOSTILE.values(), ids=list(HOSTILE))
def test_a_hostile_file_is_refused(tmp_path: Path, content: bytes, named: str) -> None:
    """At once, naming the file and what is wrong in it."""
    path = tmp_path / "model.gguf"
    path.write_bytes(content)

    with pytest.raises(InvalidCheckpointError) as caught:
        plan_split(path, (1, 2))

    assert str(path) in caught.value.message
    assert named in str(caught.value)
    assert caught.value.hint


def test_a_text_that_is_longer_than_any_is_refused(tmp_path: Path) -> None:
    """Before it is read, or fetched."""
    path, length = tmp_path / "model.gguf", 2**26 + 1
    with path.open("wb") as file:
        file.write(head(text("k") + struct.pack("<IQ", 8, length), counts=(1, 0)))
        file.truncate(file.tell() + length)
    for act in (read_header, lambda path: header_length(path, 100)):
        with pytest.raises(InvalidCheckpointError, match=f"{length} bytes long; {2**26} is the limit"):
            act(path)


@pytest.mark.parametrize("count", [4096, 4097])
def test_more_experts_than_any_model_has_are_refused(tmp_path: Path, count: int) -> None:
    path, values = tmp_path / "model.gguf", {"model_type": "qwen3_moe"}
    stated = entry("general.architecture", 8, text("qwen3moe"))
    experts = tensor("blk.0.ffn_up_exps.weight", (1, 1, count))
    path.write_bytes(head(stated, tensors=experts, counts=(1, 1)) + bytes(4 * count + 64))
    if count <= 4096:
        assert len(GgufStrategy().tensors(path, values)) == count
        return
    with pytest.raises(InvalidCheckpointError, match=r"ffn_up_exps.* 4097 experts") as caught:
        GgufStrategy().tensors(path, values)
    assert caught.value.hint


def test_every_truncation_is_refused(gguf_file: Write, tmp_path: Path) -> None:
    """Wherever the file ends, in the header or in the weights."""
    source = gguf_file("llama", "Q8_0")
    whole, end = source.read_bytes(), max(found.end for found in read_header(source).tensors.values())
    path = tmp_path / "cut.gguf"

    for length in [*range(0, 400, 7), *range(400, end, 997), end - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(InvalidCheckpointError):
            read_header(path)


def test_random_damage_is_an_error_of_ours_or_none(gguf_file: Write, tmp_path: Path) -> None:
    """Flipped and overwritten bytes of the header: a plan, or one of our errors, and never a hang."""
    path = gguf_file("llama", "Q8_0")
    whole = path.read_bytes()
    length = min(found.begin for found in read_header(path).tensors.values())
    chance = random.Random(4)
    outcomes = []
    for _ in range(600):
        damaged = bytearray(whole)
        for _ in range(chance.randint(1, 3)):
            place = chance.randrange(length - 8)
            value = chance.choice((0, 1, 255, 2**31, 2**63, 2**64 - 1, chance.getrandbits(64)))
            damaged[place : place + chance.choice((1, 4, 8))] = value.to_bytes(8, "little")[: chance.choice((1, 4, 8))]
        path.write_bytes(damaged[: len(whole)])
        try:
            plan_split(path, (1, 3))
        except SplitLearnError as error:
            outcomes.append(type(error))
    assert len(outcomes) > 100
    assert InvalidCheckpointError in outcomes


def rewritten(path: Path, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> Path:
    """Rewrite a file, with its metadata and its float32 tensors changed."""
    header, reader = read_header(path), gguf.GGUFReader(path)
    metadata = {key: value for key, value in header.metadata.items() if not isinstance(value, Array)}
    architecture = metadata.pop("general.architecture")
    tensors = {known.name: np.array(known.data) for known in reader.tensors}
    change(metadata, tensors)
    target = path.with_name("changed.gguf")
    writer = gguf.GGUFWriter(target, architecture)
    for key, value in metadata.items():
        add = writer.add_string if isinstance(value, str) else writer.add_uint32
        (writer.add_float32 if isinstance(value, float) else add)(key, value)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path.unlink()
    return target


def test_an_unknown_architecture_names_the_known(tmp_path: Path) -> None:
    """And the way out."""
    path = tmp_path / "model.gguf"
    path.write_bytes(head(entry("general.architecture", 8, text("rwkv6")), counts=(1, 0)))

    with pytest.raises(CheckpointError, match=r"'rwkv6'.*gpt2, qwen2") as caught:
        plan_split(path, (1, 2))
    assert caught.value.hint


def test_missing_and_foreign_tensors_are_all_named(gguf_file: Write) -> None:
    """As in any checkpoint, before anything is built."""

    def change(_: dict[str, Any], tensors: dict[str, Any]) -> None:
        del tensors["blk.2.attn_q.weight"]
        tensors["blk.1.strange.weight"] = np.zeros((2, 2), np.float32)
        tensors["blk.0.attn_norm.weight"] = np.zeros(3, np.float32)

    path = rewritten(gguf_file("llama"), change)

    with pytest.raises(TensorMismatchError) as caught:
        load_split_model(None, (1, 3), path)
    for name in (
        "model.layers.2.self_attn.q_proj.weight",
        "blk.1.strange.weight",
        "model.layers.0.input_layernorm.weight",
    ):
        assert name in caught.value.message


def test_missing_metadata_is_all_named(gguf_file: Write) -> None:
    """A configuration is not guessed."""

    def change(metadata: dict[str, Any], _: dict[str, Any]) -> None:
        del metadata["llama.block_count"]
        metadata["llama.attention.head_count"] = 0
        metadata["llama.context_length"] = "long"

    path = rewritten(gguf_file("llama"), change)

    with pytest.raises(InvalidCheckpointError) as caught:
        plan_split(path, (1, 3))
    for name in ("block_count is missing", "head_count is 0", "context_length is long"):
        assert name in caught.value.message
    assert "config.json" in caught.value.hint


@pytest.mark.parametrize(
    "metadata",
    [
        {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0},
        {"llama.rope.scaling.factor": 8.0},
        {"llama.rope.scale_linear": 2.0},
    ],
    ids=str,
)
def test_positions_that_are_stretched_are_not_guessed(gguf_file: Write, metadata: dict[str, Any]) -> None:
    """What transformers would read as if they were not; config.json says it in full."""
    path = rewritten(gguf_file("llama"), lambda known, _: known.update(metadata))

    with pytest.raises(CheckpointError, match="rotary positions") as caught:
        plan_split(path, (1, 3))
    assert "config.json" in caught.value.hint


def test_tensors_that_the_library_cannot_dequantise_are_named(gguf_file: Write) -> None:
    """The types are checked with the plan."""

    def change(_: dict[str, Any], tensors: dict[str, Any]) -> None:
        tensors["blk.1.ffn_up.weight"] = np.zeros((96, 64), np.int32)

    path = rewritten(gguf_file("llama"), change)

    with pytest.raises(CheckpointError, match=r"I32 \(blk.1.ffn_up.weight\)"):
        plan_split(path, (1, 3))


def test_a_config_next_to_the_file_is_used(gguf_file: Write, model: Callable[..., Any]) -> None:
    """It says what metadata cannot; one of another architecture is refused."""
    path = gguf_file("llama")
    config = json.loads(model("llama").config.to_json_string())
    (path.parent / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 48}))

    top = load_split_model(None, (1, 3), path, parts=("top",)).top
    assert top is not None
    assert top.config.max_position_embeddings == 48

    (path.parent / "config.json").write_text(json.dumps({**config, "model_type": "qwen2"}))
    with pytest.raises(InvalidCheckpointError, match=r"'llama'.*'qwen2'"):
        plan_split(path, (1, 3))


def test_a_folder_with_one_file_is_a_model(gguf_file: Write) -> None:
    """With two, the one that is meant has to be named."""
    path = gguf_file("llama", "Q8_0")
    alone = plan_split(path.parent, (1, 3))
    gguf_file("llama", "Q4_0", name="other.gguf")

    assert alone.to_dict() == {**plan_split(path, (1, 3)).to_dict(), "model": str(path.parent)}
    with pytest.raises(CheckpointError, match=r"model.gguf, other.gguf"):
        plan_split(path.parent, (1, 3))


def test_other_strategies_refuse_the_file(gguf_file: Write, model: Callable[..., Any], tmp_path: Path) -> None:
    """And this one refuses other files."""
    with pytest.raises(ConfigurationError, match="gguf"):
        load_split_model(None, (1, 3), gguf_file("llama"), strategy="copied")
    model("llama").save_pretrained(tmp_path / "plain")
    with pytest.raises(ConfigurationError, match="it reads gguf files, not safetensors"):
        load_split_model(None, (1, 3), tmp_path / "plain", strategy="gguf")
