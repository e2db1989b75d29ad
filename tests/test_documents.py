"""What the documents show is run: every block of Python, each in a process of its own."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = ("README.md",)
_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks() -> Iterator[Any]:
    for name in DOCUMENTS:
        for number, block in enumerate(_BLOCK.findall((ROOT / name).read_text())):
            yield pytest.param(block, id=f"{name}-{number}")


@pytest.mark.parametrize("block", list(blocks()))
def test_a_block_of_python_runs(block: str, tmp_path: Path, process: Callable[..., CompletedProcess[str]]) -> None:
    """As a reader would paste it into a file."""
    script = tmp_path / "block.py"
    script.write_text(block)

    done = process("-W", "error", script)

    assert done.returncode == 0, done.stdout + done.stderr


def test_there_are_blocks() -> None:
    """A changed fence would leave nothing to run."""
    assert len(list(blocks())) >= len(DOCUMENTS)
