"""The script that runs transformers' own suite: its message if there is none, and its counts."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parent / "transformers_suite.py"


@pytest.fixture(scope="module")
def suite() -> Any:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("transformers_suite", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_tree_without_the_suite_is_named(tmp_path: Path) -> None:
    """The files that a tree lacks are listed, with what has them."""
    common = tmp_path / "tests" / "test_modeling_common.py"
    common.parent.mkdir()
    common.touch()
    done = subprocess.run([sys.executable, SCRIPT, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no tests/causal_lm_tester.py" in done.stderr
    assert "no tests/generation/test_utils.py" in done.stderr
    assert "test_modeling_common" not in done.stderr
    assert "git checkout" in done.stderr


def test_only_what_passes_unsplit_counts(suite: Any) -> None:
    """A test that fails on the unsplit class is left out; one that the split class skips is a difference."""

    def outcomes(**words: str) -> dict[str, dict[str, str]]:
        return {name: {"outcome": word, "error": "", "where": ""} for name, word in words.items()}

    ran = {
        "unsplit": outcomes(one="passed", two="failed", three="passed", four="passed", five="passed"),
        "split": outcomes(one="passed", two="failed", three="skipped", four="failed"),
    }
    assert {name: each["outcome"] for name, each in suite._differences(ran).items()} == {
        "three": "skipped",
        "four": "failed",
        "five": "absent",
    }
    assert "1 of 4" in suite._table({"qwen2": ran})


def test_a_failing_subtest_fails_its_test(suite: Any, tmp_path: Path) -> None:
    """The report of a test itself, which passes although a subtest failed, does not hide the failure."""

    class Report:
        nodeid, when, failed, longrepr, longreprtext = (
            "file.py::test_it",
            "call",
            True,
            None,
            "E   AssertionError: wrong",
        )

        def __init__(self, outcome: str) -> None:
            self.outcome, self.failed = outcome, outcome == "failed"

    recorder = suite.Recorder(tmp_path / "report.json")
    for outcome in ("passed", "failed", "passed"):
        recorder.pytest_runtest_logreport(Report(outcome))
    assert recorder.outcomes["test_it"]["outcome"] == "failed"
    assert recorder.outcomes["test_it"]["error"] == "AssertionError: wrong"
