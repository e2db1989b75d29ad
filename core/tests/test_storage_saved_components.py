"""``storage_path`` and ``auto_save``: a split is kept, and found again without its source."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from splitlearn_core import (
    ConfigurationError,
    InsufficientMemoryError,
    ModelFactory,
    SplitCausalLM,
    load_split_model,
    save_split,
)

pytestmark = [pytest.mark.libs, pytest.mark.usefixtures("llama")]

IDS = torch.tensor([[5, 17, 42, 99, 3, 8, 64]])


def create(source: Path, points: tuple[int, int] = (2, 4), **options: Any) -> Any:
    return ModelFactory.create_split_models("llama", source, *points, **options)


def logits(parts: Any, **options: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = SplitCausalLM(*parts, **options)(IDS, use_cache=False).logits
    return found


@pytest.mark.parametrize("kind", ["single", "sharded", "tied"])
def test_a_split_is_kept_and_found_without_its_source(checkpoint: Any, tmp_path: Path, kind: str) -> None:
    """The second load needs nothing of the source, and says the same; a tied head stays tied."""
    source, kept = checkpoint(kind), tmp_path / "kept"
    first = create(source, storage_path=kept, auto_save=True)
    expected = logits(first)
    assert sorted(path.name for path in kept.iterdir()) == ["bottom", "top", "trunk"]
    for file in source.iterdir():
        file.unlink()

    again = create(source, storage_path=kept, auto_save=True)

    assert torch.equal(logits(again), expected)
    tied = first.top.lm_head.weight is first.bottom.model.embed_tokens.weight
    assert (again.top.lm_head.weight is again.bottom.model.embed_tokens.weight) == tied == (kind == "tied")


def test_what_is_kept_takes_dtypes_and_devices(single: Path, tmp_path: Path) -> None:
    """And limits, as a load from the source does."""
    kept, dtype = tmp_path / "kept", {"trunk": "bfloat16", "top": "float64"}
    create(single, storage_path=kept, auto_save=True)
    expected = logits(load_split_model("llama", (2, 4), single, dtype=dtype), mixed_dtypes=True)

    options = {"dtype": dtype, "device_map": "auto", "max_memory": {"cpu": "1GiB"}, "attn_implementation": "sdpa"}
    parts = create(single, storage_path=kept, **options)

    assert parts.trunk.origin.model == str(single)
    assert torch.equal(logits(parts, mixed_dtypes=True), expected)
    alone = create(single, storage_path=kept, parts=["trunk"])
    assert [part is None for part in alone] == [True, False, True]
    with pytest.raises(InsufficientMemoryError):
        create(single, storage_path=kept, max_memory={"cpu": "1KiB"})


def test_without_auto_save_nothing_is_written(single: Path, tmp_path: Path) -> None:
    """It is loaded from the source."""
    create(single, storage_path=tmp_path / "kept")

    assert not (tmp_path / "kept").exists()


def other_points(source: Path, kept: Path) -> dict[str, Any]:
    return {"source": source, "points": (1, 4)}


def other_source(source: Path, kept: Path) -> dict[str, Any]:
    return {"source": Path(shutil.copytree(source, source.parent / "other"))}


def other_revision(source: Path, kept: Path) -> dict[str, Any]:
    return {"source": source, "revision": "main"}


def fewer_parts(source: Path, kept: Path) -> dict[str, Any]:
    shutil.rmtree(kept / "trunk")
    return {"source": source}


def own_values(source: Path, kept: Path) -> dict[str, Any]:
    shutil.rmtree(kept)
    save_split(load_split_model("llama", (2, 4), source), kept)
    return {"source": source}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (other_points, "cut at (2, 4)"),
        (other_source, "is that of"),
        (other_revision, "is that of"),
        (fewer_parts, "no trunk"),
        (own_values, "values of its own"),
    ],
)
def test_another_split_is_neither_taken_nor_overwritten(
    single: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, change: Any, words: str
) -> None:
    """With auto_save that is an error, before anything is loaded; without, the source is, and the log says why."""
    kept = tmp_path / "kept"
    create(single, storage_path=kept, auto_save=True)
    asked = change(single, kept)
    files = {path: path.read_bytes() for path in kept.rglob("*") if path.is_file()}

    with pytest.raises(ConfigurationError, match="another split") as caught:
        create(**asked, storage_path=kept, auto_save=True)
    with caplog.at_level(logging.WARNING):
        parts = create(**asked, storage_path=kept)

    assert words in caught.value.message
    assert words in caplog.text
    assert parts.trunk.start_layer == asked.get("points", (2, 4))[0]
    assert {path: path.read_bytes() for path in kept.rglob("*") if path.is_file()} == files


def test_a_directory_of_other_things_is_not_written_to(single: Path, tmp_path: Path) -> None:
    """Before anything is loaded."""
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "thesis.txt").write_text("all of it")

    with pytest.raises(ConfigurationError, match="is not overwritten"):
        create(single, storage_path=tmp_path / "kept", auto_save=True)


def test_saving_needs_a_place(single: Path) -> None:
    """auto_save without storage_path would save nothing."""
    with pytest.raises(ConfigurationError, match="without a storage_path"):
        create(single, auto_save=True)
