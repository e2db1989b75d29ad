"""Print what the tests with the marker ``light`` need: what core and the tests depend on, but torch and its users."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
#: Torch, what needs it, and tools that check code and do not run it.
LEFT_OUT = ("torch", "transformers", "peft", "mypy", "ruff")


def light_requirements() -> list[str]:
    """Return the requirements, as pip reads them."""
    core = tomllib.loads((ROOT / "core/pyproject.toml").read_text("utf-8"))["project"]["dependencies"]
    lines = (ROOT / "tests/requirements.txt").read_text("utf-8").splitlines()
    tools = [line.partition("#")[0].strip() for line in lines]
    return [line for line in (*core, *tools, "numpy") if line and not line.startswith(LEFT_OUT)]


if __name__ == "__main__":
    print(*light_requirements(), sep="\n")
