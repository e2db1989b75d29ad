"""What a wheel of core holds."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.light

PACKAGE = Path(__file__).parents[1]


@pytest.mark.skipif(not (PACKAGE / "pyproject.toml").exists(), reason="the tests stand apart from their package")
def test_the_wheel_holds_every_module(tmp_path: Path) -> None:
    """No room of the house is left out by an ignore file, and nothing else comes along."""
    pytest.importorskip("hatchling")

    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=PACKAGE,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    source = PACKAGE / "src"
    assert names == {
        path.relative_to(source).as_posix()
        for path in (source / "splitlearn_core").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
