"""Families that one command writes: each is written again, and the conformance kit is run on it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from random import Random

from support.long import cases
from support.warm import WarmInterpreter

PAGE = Path(__file__).parent.parent / "docs" / "families.md"
#: Model type -> lines of its module, as the page says.
GALLERY = {
    found["type"]: int(found["lines"])
    for found in re.finditer(
        r"^\| `(?P<type>\w+)` \| (?P<lines>\d+) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE
    )
}
#: Those that are written here: each in the long tests.
CHOSEN = sorted(Random(1).sample(sorted(GALLERY), cases(len(GALLERY), 1)))
#: All in one process: most of what a command takes is importing transformers.
WRITE = """
import sys
from splitlearn_core.cli.main import cli
for name in sys.argv[2:]:
    cli.main(["plugins", "new", name, "--out", f"{sys.argv[1]}/{name}"], standalone_mode=False)
"""


def run(python: object, *arguments: object, site: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH", ""))))
    return subprocess.run(
        [str(part) for part in (python, "-m", *arguments)],
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip


def test_every_family_of_the_gallery_is_written_and_holds(warm: WarmInterpreter, tmp_path: Path) -> None:
    """No line of them is by hand, the page says how many there are, and no check of the kit fails.

    One of them, and all in the long tests.
    """
    assert len(GALLERY) >= 8
    site = tmp_path / "site"
    (tmp_path / "write_them.py").write_text(WRITE)
    written = run(warm.path, "write_them", tmp_path, *CHOSEN, site=tmp_path)
    assert written.returncode == 0, written.stderr
    lines = {
        name: len((tmp_path / name / f"src/splitlearn_{name}/__init__.py").read_text().splitlines()) for name in CHOSEN
    }
    assert lines == {name: GALLERY[name] for name in CHOSEN}
    pip = ("pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", site)
    installed = run(sys.executable, *pip, *(tmp_path / name for name in CHOSEN), site=site)
    assert installed.returncode == 0, installed.stderr

    tested = run(warm.path, "splitlearn_core", "plugins", "test", *CHOSEN, "--quick", "--json", site=site)

    reports = {report["model_type"]: report for report in json.loads(tested.stdout)}
    assert sorted(reports) == CHOSEN
    failed = {name: [c for c in report["checks"] if c["failed"]] for name, report in reports.items()}
    assert not any(failed.values()), failed
    assert tested.returncode == 0, tested.stderr
