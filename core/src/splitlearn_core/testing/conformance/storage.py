"""Checks of saving, loading and merging: the tensors stay the same."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from splitlearn_core import load_split_directory, merge_split, save_split, verify_saved
from splitlearn_core.checkpoint.files import SINGLE
from splitlearn_core.testing.conformance.base import Checks, explained
from splitlearn_core.testing.conformance.findings import Suspect, expect
from splitlearn_core.testing.conformance.subject import Subject

_FIELD = Suspect("renamed", "or the hook splitlearn_map_weight_keys: a tensor may be in the wrong place")


@explained
class Storage(Checks):
    """Round trips of files."""

    def test_save_load_merge(self, subject: Subject, tmp_path: Path) -> None:
        """Saved components load unchanged, and the merged checkpoint has the tensors of the source."""
        # In one place, in two, and before every layer.
        for cut in dict.fromkeys((subject.middle, *subject.other_cuts[:: max(1, len(subject.other_cuts) - 1)])):
            folder = tmp_path / "-".join(map(str, cut))
            save_split(subject.checkpoint, folder / "split", cut, progress=False)
            result = verify_saved(folder / "split")
            expect(result.sound and result.complete, f"saved components have faults: {'; '.join(result.problems)}")
            loaded = load_split_directory(folder / "split", progress=False)
            for part, saved in zip(subject.split(cut).components, loaded, strict=True):
                _expect_same(
                    f"the saved {part.component}", dict(saved.state_dict() if saved else {}), dict(part.state_dict())
                )
            merged = merge_split(folder / "split", out=folder / "merged", progress=False)
            _expect_same("the merged checkpoint", load_file(merged / SINGLE), subject.tensors)

    def test_save_from_memory(self, subject: Subject, tmp_path: Path) -> None:
        """Components in memory are saved with their present values, and merge into the model."""
        split = subject.split(subject.middle)
        save_split(split, tmp_path / "split", progress=False)
        merged = merge_split(tmp_path / "split", out=tmp_path / "merged", progress=False)
        model = subject.whole_of(merged)
        _expect_same("the merged model", dict(model.state_dict()), dict(subject.whole().state_dict()))


def _expect_same(what: str, got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    expect(got.keys() == expected.keys(), f"{what} has other tensors: {sorted(got.keys() ^ expected.keys())}", _FIELD)
    differ = [name for name, tensor in got.items() if not torch.equal(tensor, expected[name])]
    expect(not differ, f"{what} has other values: {', '.join(differ)}", _FIELD)
