"""Checks of tensor names: each key of a checkpoint becomes one tensor of one component."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import cast

import pytest
import torch
from safetensors.torch import save_file

from splitlearn_core import load_split_model
from splitlearn_core.build.configuration import architecture_class
from splitlearn_core.checkpoint.files import SINGLE
from splitlearn_core.errors import TensorMismatchError
from splitlearn_core.plugins.registry import registry
from splitlearn_core.testing.conformance.base import Checks, explained
from splitlearn_core.testing.conformance.diagnosis import misplaced
from splitlearn_core.testing.conformance.findings import ConformanceError, Suspect, expect
from splitlearn_core.testing.conformance.subject import Subject

_LEGACY = Suspect("ignored_suffixes", "the suffixes of the keys of tensors that no module uses")


@explained
class Keys(Checks):
    """Current keys, and those of old checkpoints."""

    def test_every_key_has_its_place(self, subject: Subject) -> None:
        """Each key of the checkpoint becomes one tensor of the model, and each of these is in one component."""
        keys = list(subject.tensors)
        problems = misplaced(subject.family, subject.whole(), keys)
        if problems:
            raise ConformanceError("\n".join(text for text, _ in problems), (suspect for _, suspect in problems))
        holders: dict[str, list[str]] = {}
        for part in subject.split(subject.middle).components:
            for name in part.state_dict():
                holders.setdefault(name, []).append(str(part.component))
        twice = [f"{name} is in {' and '.join(parts)}" for name, parts in holders.items() if len(parts) > 1]
        expect(not twice, "; ".join(twice), Suspect("layers", "a component holds only its own layers"))
        missing = sorted(set(subject.whole().state_dict()) - set(holders))
        expect(
            not missing, f"no component holds {', '.join(missing)}", Suspect("layers, norm, head", "name its module")
        )

    def test_the_mapping_is_repeatable(self, subject: Subject) -> None:
        """Called twice, and with another order of keys, the plugin returns the same mapping."""
        keys = sorted(subject.tensors)
        mappings = [
            registry().map_weight_keys(subject.family, subject.config, order) for order in (keys, keys, keys[::-1])
        ]
        expect(
            mappings[0] == mappings[1] == mappings[2],
            "the same keys are mapped in different ways",
            Suspect("hook splitlearn_map_weight_keys", "its result must depend only on its arguments"),
        )

    @pytest.mark.parametrize("spelling", ["with prefix", "without prefix", "head present", "embedding absent"])
    def test_key_variants(self, subject: Subject, spelling: str, tmp_path: Path) -> None:
        """Checkpoints with and without the base prefix, and with a tied head under either name, load alike."""
        family = subject.family
        if spelling in ("head present", "embedding absent") and not subject.tied:
            pytest.skip("only a tied model may omit one of the two")
        head, module_key = f"{family.head}.weight", f"{family.base}.{family.embedding}.weight"
        # transformers may write it under another name.
        embedding = next((key for key, target in subject.targets.items() if target == module_key), module_key)
        tensors = {**subject.tensors}
        if spelling == "without prefix":
            tensors = {key.removeprefix(subject.prefix): tensor for key, tensor in tensors.items()}
        elif spelling == "head present":
            tensors[head] = tensors[embedding].clone()
        elif spelling == "embedding absent":
            tensors[head] = tensors.pop(embedding)
        _expect_alike(subject, tmp_path, tensors, Suspect("base, embedding, head", "names of the module tree"))

    def test_legacy_tensors(self, subject: Subject, tmp_path: Path) -> None:
        """Tensors of old checkpoints that no module uses are left out, with and without the base prefix."""
        family = subject.family
        derived = {
            f"{family.layers}.0.{suffix.removeprefix('.')}": (4,)
            for suffix in family.ignored_suffixes
            if not any(name.endswith(suffix) for name in self.legacy_tensors)
        }
        legacy = {**derived, **self.legacy_tensors}
        if not legacy:
            pytest.skip("neither ignored_suffixes of the family nor legacy_tensors of the test name any")
        more = {f"{family.base}.{name}": torch.ones(shape) for name, shape in legacy.items()}
        for number, left_out in enumerate((subject.prefix, "")):
            folder = tmp_path / str(number)
            folder.mkdir()
            tensors = {key.removeprefix(left_out): tensor for key, tensor in {**subject.tensors, **more}.items()}
            _expect_alike(subject, folder, tensors, _LEGACY)

    def test_renamed_keys(self, subject: Subject, tmp_path: Path) -> None:
        """A checkpoint with the old names of ``renamed`` loads like one with the new ones."""
        renamed = subject.family.renamed
        if not renamed:
            pytest.skip("the family renames nothing")
        tensors = subject.tensors
        old = {_old_name(key, renamed): tensor for key, tensor in tensors.items()}
        expect(
            len(old) == len(tensors),
            "two keys have the same old name",
            Suspect("renamed", "old names must differ for different tensors"),
        )
        if old.keys() == tensors.keys():
            pytest.skip("no key of this variant has a new name")
        _expect_alike(subject, tmp_path, old, Suspect("renamed", "pairs of (old, new), applied in order"))


def _old_name(key: str, renamed: tuple[tuple[str, str], ...]) -> str:
    for old, new in reversed(renamed):
        key = key.replace(new, old) if new else key
    return key


def _expect_alike(subject: Subject, folder: Path, tensors: Mapping[str, torch.Tensor], suspect: Suspect) -> None:
    """Load a checkpoint with other keys, and compare its components with the usual ones."""
    for file in subject.checkpoint.glob("*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    whole = {key: tensor.contiguous() for key, tensor in tensors.items()}
    save_file(whole, folder / SINGLE, {"format": "pt"})
    try:
        parts = load_split_model(None, subject.middle, folder, strict=True)
    except TensorMismatchError:
        if _unread(subject, folder) and not _unread(subject, subject.checkpoint):
            pytest.skip("transformers renames tensors of this type by names with the prefix, and does not read others")
        raise
    got = {name: tensor for part in parts if part is not None for name, tensor in part.state_dict().items()}
    usual = {
        name: tensor for part in subject.split(subject.middle).components for name, tensor in part.state_dict().items()
    }
    expect(got.keys() == usual.keys(), f"other tensors: {sorted(got.keys() ^ usual.keys())}", suspect)
    differ = [name for name, tensor in got.items() if not torch.equal(tensor, usual[name])]
    expect(not differ, f"other values: {', '.join(differ)}", suspect)


def _unread(subject: Subject, folder: Path) -> Collection[str]:
    """Return the tensors of the whole model that transformers does not find in a checkpoint."""
    _, info = architecture_class(subject.family).from_pretrained(folder, output_loading_info=True)
    return cast("Collection[str]", info["missing_keys"])
