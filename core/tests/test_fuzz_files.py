"""Files from anybody: broken headers, indexes and configurations, against the safetensors library.

Over 100,000 of them in the long tests.

What is refused is refused in words, never with an accident; what is accepted means what the
safetensors library reads in it, and lies inside the file.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors

from splitlearn_core import InvalidCheckpointError, SplitLearnError, plan_split
from splitlearn_core.checkpoint.config_json import read_config, read_weight_map
from splitlearn_core.checkpoint.safetensors_header import LENGTH_BYTES, parse_header
from splitlearn_core.testing.worlds import tiny_model, write_checkpoint
from support.long import cases

HEADERS = cases(100_000, 5_000)
OBJECTS = cases(4_000, 400)
CHECKPOINTS = cases(1_500, 150)
#: A message is for people: whatever the file holds, it stays readable.
LONGEST_MESSAGE = 4_000

NUMBERS: list[Any] = [0, 1, 2, 8, 12, -1, 2**31, 2**53, 2**63 - 1, 2**63, 2**64, 10**30, 0.0, 8.0, float("inf"), True]
OTHERS: list[Any] = [None, "8", [], {}, "F32", [[]], "../up", "x" * 500, "\ud800", "a\0b", float("nan")]
DTYPES: list[Any] = ["F32", "F16", "BF16", "I8", "BOOL", "C64", "F8_E4M3", "F4", "f32", "", "F32 ", None, 3]
WIDTHS = {"F32": 4, "F16": 2, "I8": 1, "I64": 8, "BOOL": 1, "F8_E4M3": 1, "C64": 8}


def anything(chance: random.Random) -> Any:
    # A new object each time: JSON has no references.
    return json.loads(json.dumps(chance.choice(NUMBERS + OTHERS)))


def sound_header(chance: random.Random) -> tuple[dict[str, Any], int]:
    """Return a header, and how many bytes of data it describes."""
    header: dict[str, Any] = {}
    position = 0
    for number in range(chance.randrange(5)):
        dtype = chance.choice(list(WIDTHS))
        shape = [chance.randrange(4) for _ in range(chance.randrange(4))]
        nbytes = WIDTHS[dtype]
        for size in shape:
            nbytes *= size
        header[f"t{number}"] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + nbytes]}
        position += nbytes
    if chance.random() < 0.3:
        header["__metadata__"] = {"format": "pt"}
    return header, position


def spoil(chance: random.Random, header: dict[str, Any]) -> None:
    """Change one thing about a header."""
    name = chance.choice([*header, "new"])
    entry = header.get(name)
    kind = chance.randrange(7)
    if kind == 0 or not isinstance(entry, dict) or "dtype" not in entry:
        header[chance.choice([name, "__metadata__"])] = anything(chance)
    elif kind == 1:
        entry["dtype"] = chance.choice(DTYPES)
    elif kind == 2:
        entry[chance.choice(["shape", "data_offsets"])] = [chance.choice(NUMBERS) for _ in range(chance.randrange(4))]
    elif kind == 3:
        entry["data_offsets"] = [offset + chance.choice([-1, 1, 4]) for offset in (0, 4)]
    elif kind == 4:
        entry.pop(chance.choice(list(entry)))
    elif kind == 5:
        entry[chance.choice(["more", "shape", "data_offsets"])] = anything(chance)
    else:
        other = chance.choice(list(header))
        header[name], header[other] = header[other], header[name]


def scramble(chance: random.Random, content: bytes) -> bytes:
    """Change, take out or put in a few bytes, or cut the end off."""
    if chance.random() < 0.4:
        return content[: chance.randrange(len(content) + 1)]
    changed = bytearray(content)
    for _ in range(chance.randrange(1, 4)):
        at = chance.randrange(len(changed) + 1)
        changed[at : at + chance.randrange(5)] = chance.randbytes(chance.randrange(5))
    return bytes(changed)


def safetensors_file(chance: random.Random) -> bytes:
    header, nbytes = sound_header(chance)
    for _ in range(chance.randrange(3)):
        spoil(chance, header)
    text = json.dumps(header, ensure_ascii=chance.random() < 0.9).encode("utf-8", "surrogatepass")
    length = len(text)
    if chance.random() < 0.05:
        length = chance.choice([0, 1, length - 1, length + 1, 2**32, 2**63, 2**64 - 1, 100_000_001])
    data = chance.randbytes(max(0, nbytes + chance.choice([0, 0, 0, 1, -1])))
    content = length.to_bytes(LENGTH_BYTES, "little") + text + data
    return scramble(chance, content) if chance.random() < 0.2 else content


def by_the_library(content: bytes) -> dict[str, Any] | None:
    try:
        return {name: (t["dtype"], t["shape"], bytes(t["data"])) for name, t in safetensors.deserialize(content)}
    except safetensors.SafetensorError:
        return None


def by_us(content: bytes) -> dict[str, Any] | str:
    try:
        infos = parse_header("shard.safetensors", content, len(content))
    except InvalidCheckpointError as error:
        assert len(str(error)) < LONGEST_MESSAGE  # noqa: PT017  # any other error fails the test
        return str(error)
    return {key: (info.dtype, list(info.shape), content[info.begin : info.end]) for key, info in infos.items()}


def test_headers_mean_what_the_library_reads_in_them() -> None:
    chance = random.Random(20261125)
    accepted = refused = 0
    for _ in range(HEADERS):
        content = safetensors_file(chance)
        ours, theirs = by_us(content), by_the_library(content)
        if isinstance(ours, str):
            refused += 1
            # Refused by us alone: dtypes of less than a byte, and sizes past a signed number of 64 bits.
            assert theirs is None or "is unknown" in ours or "must be integers" in ours, (content, ours)
        else:
            accepted += 1
            assert ours == theirs, content
    # The fuzzer has to reach both sides.
    assert accepted > HEADERS / 10
    assert refused > HEADERS / 10


@pytest.mark.parametrize(
    "header",
    [
        pytest.param({"a": {"dtype": "F32", "shape": [2**62] * 200_000, "data_offsets": [0, 8]}}, id="a long product"),
        pytest.param({"a" * 2_000_000: {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, id="a long name"),
        pytest.param({"a": {"dtype": "F" * 2_000_000, "shape": [2], "data_offsets": [0, 8]}}, id="a long dtype"),
        pytest.param({str(n): {} for n in range(100_000)}, id="many problems"),
        pytest.param({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 10**4000]}}, id="a long number"),
    ],
)
def test_a_header_out_of_proportion_is_refused_in_a_few_words(header: dict[str, Any]) -> None:
    text = json.dumps(header).encode()
    content = len(text).to_bytes(LENGTH_BYTES, "little") + text + bytes(8)
    answer = by_us(content)
    assert isinstance(answer, str)


@pytest.mark.parametrize(
    "text", [b"[" * 100_000, b'{"a":' * 100_000, b'{"a": 1' + b"0" * 5_000 + b"}", b"\xff\xfe{\0}\0"]
)
def test_json_that_is_a_trap_is_no_json(text: bytes) -> None:
    assert "not valid JSON" in str(by_us(len(text).to_bytes(LENGTH_BYTES, "little") + text))


def broken_objects(chance: random.Random, sound: dict[str, Any], inner: str) -> Iterator[bytes]:
    """Yield JSON files near a sound one, ``inner`` being what matters in it."""
    for _ in range(OBJECTS):
        changed = json.loads(json.dumps(sound))
        for _ in range(chance.randrange(1, 3)):
            target = changed[inner] if chance.random() < 0.7 and isinstance(changed.get(inner), dict) else changed
            target[chance.choice([*target, "new"])] = anything(chance)
        content = json.dumps(changed).encode()
        yield scramble(chance, content) if chance.random() < 0.2 else content


def test_an_index_names_files_next_to_it_or_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    sound = {"metadata": {"total_size": 12}, "weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}
    accepted = 0
    for content in broken_objects(random.Random(1), sound, "weight_map"):
        path.write_bytes(content)
        try:
            weight_map = read_weight_map(path)
        except InvalidCheckpointError as error:
            assert len(str(error)) < LONGEST_MESSAGE  # noqa: PT017  # any other error fails the test
            continue
        accepted += 1
        for shard in weight_map.values():
            assert (tmp_path / shard).resolve().parent == tmp_path.resolve()
            assert Path(shard).name == shard
    assert accepted > OBJECTS / 100


def test_a_configuration_is_an_object_with_a_model_type_or_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    for content in broken_objects(random.Random(2), {"model_type": "gpt2", "inner": {}}, "inner"):
        path.write_bytes(content)
        try:
            assert isinstance(read_config(path)["model_type"], str)
        except InvalidCheckpointError as error:
            assert len(str(error)) < LONGEST_MESSAGE  # noqa: PT017  # as above


@pytest.fixture
def checkpoint(world: Any, tmp_path: Path) -> Path:
    world.install("llama")
    return write_checkpoint(tmp_path / "checkpoint", tiny_model("llama"), max_shard_size="40KB")


def test_a_broken_checkpoint_is_planned_soundly_or_refused_in_words(checkpoint: Path) -> None:
    """The whole way from the files to a plan."""
    chance = random.Random(3)
    files = [path for path in sorted(checkpoint.iterdir()) if path.suffix in {".json", ".safetensors"}]
    refused = 0
    for _ in range(CHECKPOINTS):
        path = chance.choice(files)
        kept = path.read_bytes()
        path.write_bytes(spoiled_file(chance, path, kept))
        try:
            plan = plan_split(checkpoint, (2, 4))
        except SplitLearnError as error:
            refused += 1
            assert error.hint  # noqa: PT017  # any other error fails the test
        else:
            for part in plan.components:
                for tensor in part.tensors:
                    assert 0 < tensor.info.begin <= tensor.info.end <= (checkpoint / tensor.info.shard).stat().st_size
        finally:
            path.write_bytes(kept)
    assert refused > CHECKPOINTS / 3


def spoiled_file(chance: random.Random, path: Path, content: bytes) -> bytes:
    if chance.random() < 0.3:
        return scramble(chance, content)
    if path.suffix == ".json":
        value = json.loads(content)
        value[chance.choice([*value, "new"])] = anything(chance)
        return json.dumps(value).encode()
    length = int.from_bytes(content[:LENGTH_BYTES], "little")
    header = json.loads(content[LENGTH_BYTES : LENGTH_BYTES + length])
    spoil(chance, header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(LENGTH_BYTES, "little") + text + content[LENGTH_BYTES + length :]
