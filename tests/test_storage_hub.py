"""Components saved straight from the Hub: the bytes of the requested parts, and their commit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from splitlearn_core import ConfigurationError, load_component, load_split_model, merge_split, save_split
from splitlearn_core.checkpoint.manifest import read_manifest
from support.hub import LoopbackHub

pytestmark = pytest.mark.libs

REPO, SPLIT = "owner/model", (2, 4)


def test_a_component_is_saved_from_the_hub(hub: LoopbackHub, sharded: Path, tmp_path: Path) -> None:
    """It is what the directory gives, and its manifest names repository and commit."""
    commit = hub.add_repo(REPO, sharded)

    save_split(REPO, tmp_path / "out", SPLIT, parts=["trunk"])

    origin = read_manifest(tmp_path / "out/trunk").origin
    assert (origin.model, origin.commit) == (REPO, commit)
    loaded = load_component(tmp_path / "out", verify=True)
    expected = load_split_model("qwen2", SPLIT, sharded, parts=["trunk"]).trunk
    for key, tensor in expected.state_dict().items():  # type: ignore[union-attr]
        assert torch.equal(loaded.state_dict()[key], tensor)
    others = {path.name for path in sharded.glob("*.safetensors")} - hub.downloaded(REPO)
    assert others


def test_components_of_two_commits_do_not_merge(hub: LoopbackHub, sharded: Path, tmp_path: Path) -> None:
    """The same names and shapes; a push lay between the two saves, and both commits are named."""
    first = hub.add_repo(REPO, sharded)
    save_split(REPO, tmp_path / "ends", SPLIT, parts=["bottom", "top"])
    (sharded_later := tmp_path / "later").mkdir()
    for path in sharded.iterdir():
        (sharded_later / path.name).write_bytes(path.read_bytes())
    (sharded_later / "README.md").write_text("changed")
    second = hub.add_repo(REPO, sharded_later)
    save_split(REPO, tmp_path / "trunk", SPLIT, parts=["trunk"])

    assert first != second
    with pytest.raises(ConfigurationError, match=rf"commit differs: {first} .* {second}"):
        merge_split(tmp_path / "ends", tmp_path / "trunk", out=tmp_path / "merged")
