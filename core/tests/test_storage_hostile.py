"""Manifests from anybody: every field spoiled, names that lead elsewhere, links, and files without end."""

from __future__ import annotations

import copy
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from splitlearn_core import InvalidCheckpointError, SplitLearnError, load_component, save_split, verify_saved
from splitlearn_core.checkpoint.manifest import MANIFEST, MAX_MANIFEST_BYTES, parse_manifest, render_manifest
from support.long import cases

SOUND: dict[str, Any] = {
    "format": "splitlearn-split",
    "format_version": 1,
    "source": {"model": "owner/name", "commit": "a" * 40, "fingerprint": "0" * 64},
    "model_type": "llama",
    "plugin": {"distribution": "splitlearn-llama", "version": "1.0"},
    "core_version": "0.1.0",
    "component": "trunk",
    "layers": [2, 4],
    "split_points": [2, 4],
    "num_layers": 6,
    "dtype": "float32",
    "own_values": False,
    "saved_with": ["trunk"],
    "ties": ["model.embed_tokens.weight"],
    "files": {
        "config.json": {"size": 10, "sha256": "1" * 64},
        "model.safetensors": {"size": 2**40, "sha256": "2" * 64},
    },
}
#: Every place in a manifest at which something else can stand.
PLACES = [(name,) for name in SOUND] + [
    (name, inner) for name, value in SOUND.items() if isinstance(value, dict) for inner in value
]
PLACES += [("files", name, field) for name in SOUND["files"] for field in ("size", "sha256")]
PLACES += [(name, place) for name in ("layers", "split_points", "saved_with", "ties") for place in (0,)]
LONGEST_MESSAGE = 6_000

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([-1, 0, 1, 3, 6, 2**31, 2**63, 2**64, 10**30]),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(["trunk", "top", "../up", "/etc/passwd", "a\0b", "\ud800", "x" * 9_000, "C:\\x", ".", "F" * 64]),
)
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4)
)


def outcome(values: Any) -> None:
    """A manifest is refused in words, or it is one that is written and read again as it is."""
    content = values if isinstance(values, bytes) else json.dumps(values).encode()
    try:
        manifest = parse_manifest(content, "split_manifest.json")
    except InvalidCheckpointError as error:
        assert len(str(error)) < LONGEST_MESSAGE  # noqa: PT017  # any other error fails the test
        return
    assert parse_manifest(render_manifest(manifest).encode(), "again") == manifest
    first, last = manifest.origin.layers
    assert 0 <= first < last <= manifest.origin.num_layers
    assert all(Path(name).name == name and ".." not in Path(name).parts for name in manifest.files)


def test_the_sound_one_is_sound() -> None:
    """Otherwise what follows would show nothing."""
    assert parse_manifest(json.dumps(SOUND).encode(), "here").component == "trunk"


@settings(max_examples=cases(700, 100), deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.sampled_from(PLACES), anything), min_size=1, max_size=3))
def test_every_field_may_be_anything(changes: list[tuple[tuple[Any, ...], Any]]) -> None:
    """Up to three fields at a time, each replaced by any JSON value."""
    values = copy.deepcopy(SOUND)
    for place, value in changes:
        holder: Any = values
        for step in place[:-1]:
            holder = holder.get(step) if isinstance(holder, dict) else None
        fits = isinstance(holder, dict) if isinstance(place[-1], str) else isinstance(holder, list) and len(holder) > 0
        # An earlier change may have taken the place away.
        if fits:
            holder[place[-1]] = value
    outcome(values)


@settings(max_examples=cases(800, 200), deadline=None, derandomize=True)
@given(st.binary(max_size=8), st.integers(0, 900), st.integers(0, 8))
def test_every_byte_may_be_anything(put: bytes, at: int, out: int) -> None:
    """Bytes changed, taken out, put in; cut short."""
    content = json.dumps(SOUND).encode()
    outcome(content[:at] + put + content[at + out :])
    outcome(content[:at])


@settings(max_examples=cases(500, 100), deadline=None, derandomize=True)
@given(anything)
def test_any_json_is_no_manifest(values: Any) -> None:
    """Whatever else there is under the name."""
    outcome(values)


@pytest.mark.parametrize("field", sorted(SOUND))
def test_no_field_may_be_missing(field: str) -> None:
    """Each is needed, and named."""
    with pytest.raises(InvalidCheckpointError, match=field.replace("_", "[_ ]")):
        parse_manifest(json.dumps({name: value for name, value in SOUND.items() if name != field}).encode(), "here")


def test_all_problems_are_named_at_once() -> None:
    """One message for all."""
    broken = {**SOUND, "dtype": "int3", "own_values": 1, "num_layers": -4, "layers": [0, 4]}
    with pytest.raises(InvalidCheckpointError, match=r"(?s)cut at .*dtype 'int3'|num_layers") as caught:
        parse_manifest(json.dumps(broken).encode(), "here")
    for name in ("num_layers", "dtype", "own_values"):
        assert name in str(caught.value)


def test_a_newer_format_is_said_to_be_one() -> None:
    """The way out is another version, not another file."""
    with pytest.raises(InvalidCheckpointError, match="format version 2") as caught:
        parse_manifest(json.dumps({**SOUND, "format_version": 2}).encode(), "here")
    assert "install" in caught.value.hint


@pytest.mark.parametrize("nested", ["[" * 100_000, '{"a":' * 100_000, "1" * 100_000])
def test_deep_and_long_values_are_refused(nested: str) -> None:
    """What a parser chokes on is no reason for a traceback."""
    outcome(f'{{"format": "splitlearn-split", "format_version": 1, "files": {nested}'.encode())


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", ".", "", "C:x", "a\\b", "a\nb", MANIFEST]
)
def test_names_lead_nowhere(name: str) -> None:
    """A manifest names files in its own folder."""
    files = {**SOUND["files"], name: {"size": 1, "sha256": "3" * 64}}
    with pytest.raises(InvalidCheckpointError, match="not a file next to the manifest"):
        parse_manifest(json.dumps({**SOUND, "files": files}).encode(), "here")


@pytest.mark.usefixtures("llama")
def test_links_are_not_followed(single: Path, tmp_path: Path) -> None:
    """Neither in the place of a file, nor of the manifest, nor of a component."""
    out = tmp_path / "out"
    save_split(single, out, (2, 4))
    weights = out / "trunk/model.safetensors"
    weights.rename(tmp_path / "elsewhere")
    weights.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InvalidCheckpointError, match="not a regular file"):
        load_component(out, "trunk")
    assert any("not a regular file" in problem for problem in verify_saved(out).problems)

    (out / "top" / MANIFEST).rename(tmp_path / "manifest")
    (out / "top" / MANIFEST).symlink_to(tmp_path / "manifest")
    with pytest.raises(InvalidCheckpointError, match="is not a regular file"):
        load_component(out / "top")

    (out / "bottom").rename(tmp_path / "bottom")
    (out / "bottom").symlink_to(tmp_path / "bottom")
    with pytest.raises(InvalidCheckpointError, match="is a link"):
        verify_saved(out)


@pytest.mark.usefixtures("llama")
def test_a_manifest_of_a_gigabyte_is_not_read(single: Path, tmp_path: Path) -> None:
    """No more of it than the longest that there may be."""
    save_split(single, tmp_path / "out", (2, 4))
    with (tmp_path / "out/trunk" / MANIFEST).open("r+b") as file:
        file.truncate(2**30)
    tracemalloc.start()
    try:
        with pytest.raises(SplitLearnError, match="the limit for a manifest"):
            load_component(tmp_path / "out", "trunk")
        assert tracemalloc.get_traced_memory()[1] < 4 * MAX_MANIFEST_BYTES
    finally:
        tracemalloc.stop()
