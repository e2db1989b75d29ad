"""What needs no torch is tested without it, on each Python that is there: see ``make test-light``."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

pytestmark = pytest.mark.light

#: A finder that says of both libraries that they are not there.
WITHOUT_TORCH = """
import sys


class Without:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers"):
            raise ModuleNotFoundError(f"{name} was to be left alone", name=name)


sys.meta_path.insert(0, Without())
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""


@pytest.fixture
def planned(world: Any) -> Path:
    """Return a checkpoint that no torch wrote: a llama of four layers."""
    world.install("llama")
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 4, "vocab_size": 32}
    config = {"model_type": "llama", "num_attention_heads": 2, "tie_word_embeddings": False, "dtype": "float32"}
    square, wide, one = np.zeros((8, 8), "f4"), np.zeros((16, 8), "f4"), np.zeros(8, "f4")
    tensors = {"model.embed_tokens.weight": np.zeros((32, 8), "f4"), "lm_head.weight": np.zeros((32, 8), "f4")}
    tensors["model.norm.weight"] = one
    for layer in range(4):
        own = {f"self_attn.{name}_proj": square for name in "qkvo"}
        own |= {"mlp.gate_proj": wide, "mlp.up_proj": wide, "mlp.down_proj": wide.T.copy()}
        own |= {"input_layernorm": one, "post_attention_layernorm": one}
        tensors |= {f"model.layers.{layer}.{name}.weight": tensor for name, tensor in own.items()}
    folder = Path(world.folder.parent / "planned")
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**sizes, **config}))
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_a_checkpoint_is_planned_without_torch(planned: Path, cli: Callable[..., Any]) -> None:
    """Layers and bytes of each component come from the headers."""
    code, out, err = cli("plan", planned, "--split", "1", "3", "--json")

    assert (code, err) == (0, "")
    parts = json.loads(out)["components"]
    layer = 4 * (4 * 64 + 3 * 128 + 2 * 8)
    ends = 4 * 32 * 8
    assert [part["layers"] for part in parts] == [[0, 1], [1, 3], [3, 4]]
    assert [part["bytes"] for part in parts] == [layer + ends, 2 * layer, layer + ends + 4 * 8]


# Where there is none, that they are run shows it.
@pytest.mark.heavy
def test_light_files_import_no_torch(tmp_path: Path) -> None:
    """They can be collected where there is none, so that no file loses its place by an import."""
    folder = Path(__file__).parent
    files = [path for path in sorted(folder.glob("test_*.py")) if "mark.light" in path.read_text("utf-8")]
    assert len(files) > 20
    arguments = ["--collect-only", "-q", "-p", "no:cacheprovider", "-m", "light and not heavy", *map(str, files)]

    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stdout + done.stderr
