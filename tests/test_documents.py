"""What the documents show is run: every block of Python, each in a process of its own."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = (
    "README.md",
    "docs/from-the-hub.md",
    "docs/loading.md",
    "docs/operating-the-manager.md",
    "docs/saved-components.md",
)
#: PEFT up to 0.21 uses a name that transformers 5.23 has renamed; 0.18 looks for a configuration that no model
#: has which was never saved.
PEFT_SAYS = (
    "-W", "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
    "-W", "ignore:Could not find a config file:UserWarning",
)  # fmt: skip
_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_YAML = re.compile(r"^```yaml\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks() -> Iterator[Any]:
    for name in DOCUMENTS:
        for number, block in enumerate(_BLOCK.findall((ROOT / name).read_text())):
            yield pytest.param(name, block, id=f"{name}-{number}")


@pytest.mark.parametrize(("name", "block"), list(blocks()))
def test_a_block_of_python_runs(
    name: str,
    block: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    process: Callable[..., CompletedProcess[str]],
) -> None:
    """As a reader would paste it into a file, beside the configuration that the same document shows."""
    script = tmp_path / "block.py"
    script.write_text(block)
    for configuration in _YAML.findall((ROOT / name).read_text()):
        (tmp_path / "models.yaml").write_text(configuration)
    monkeypatch.chdir(tmp_path)

    done = process("-W", "error", *PEFT_SAYS, script)

    assert done.returncode == 0, done.stdout + done.stderr


def test_there_are_blocks() -> None:
    """A changed fence would leave nothing to run."""
    assert len(list(blocks())) >= len(DOCUMENTS)
