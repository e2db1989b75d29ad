"""The samples of sweeps: how many cases are run by default, and which."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

MODULE = """
import pytest


@pytest.mark.sample(9)
@pytest.mark.parametrize("letter", "abcdefg")
@pytest.mark.parametrize("number", [1, 2, 3])
def test_product(letter, number):
    pass


@pytest.mark.parametrize("variant", ["tied", "untied"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("cut", ["1-5", "2-3", "3-5"])
class TestFamily:
    def test_generate(self, variant, dtype, attention, cut):
        pass

    def test_logits(self, variant, dtype, attention, cut):
        pass


@pytest.mark.parametrize("variant", ["tied", "untied"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_forward_argument(variant, attention):
    pass


def test_alone():
    pass
"""


@pytest.fixture
def collected(world: Any, tmp_path: Path) -> Callable[..., dict[str, list[set[str]]]]:
    """Return a function that collects the module: test -> the values of each case."""

    def collect(name: str = "", **environment: str) -> dict[str, list[set[str]]]:
        module = tmp_path / "test_made.py"
        module.write_text(MODULE)
        plugins = ("-p", "no:randomly", "-p", "no:xdist", "-p", "no:cacheprovider", "-p", "support.long")
        paths = ("--rootdir", str(tmp_path), "-o", f"pythonpath={Path(__file__).parent}", "-o", "markers=sample(n): n")
        done = world.python(
            "-m", "pytest", "--collect-only", "-q", *plugins, *paths, f"{module}{name}", SHORT_TESTS="", **environment
        )
        assert done.returncode == 0, done.stdout + done.stderr
        cases: dict[str, list[set[str]]] = {}
        for line in done.stdout.splitlines():
            if "::" in line:
                test, _, values = line.rpartition("::")[2].partition("[")
                # A cut has a dash of its own.
                words = values.removesuffix("]").replace("1-5", "15").replace("2-3", "23").replace("3-5", "35")
                cases.setdefault(test, []).append(set(words.split("-")))
        return cases

    return collect


def test_a_sample_has_each_value(collected: Callable[..., dict[str, list[set[str]]]]) -> None:
    """The requested number of cases; of the kit's checks two per variant, one of the longest, and in turn."""
    cases = collected(LONG_TESTS="")

    assert {test: len(values) for test, values in cases.items()} == {
        "test_product": 9, "test_generate": 2, "test_logits": 4, "test_forward_argument": 2, "test_alone": 1,
    }  # fmt: skip
    assert set.union(*cases["test_product"]) == {*"abcdefg", "1", "2", "3"}
    assert set.union(*cases["test_generate"]) >= {"tied", "untied", "float32", "bfloat16", "eager", "sdpa"}
    assert set.union(*cases["test_logits"]) == {
        "tied", "untied", "float32", "bfloat16", "eager", "sdpa", "15", "23", "35",
    }  # fmt: skip
    assert set.union(*cases["test_forward_argument"]) == {"tied", "untied", "eager", "sdpa"}
    for variant in ("tied", "untied"):
        assert set.union(*(values for values in cases["test_logits"] if variant in values)) >= {"float32", "bfloat16"}


def test_the_long_tests_and_named_cases_are_whole(collected: Callable[..., dict[str, list[set[str]]]]) -> None:
    """With the variable, or with the case on the command line."""
    counts = {test: len(values) for test, values in collected(LONG_TESTS="1").items()}

    assert counts == {
        "test_product": 21, "test_generate": 24, "test_logits": 24, "test_forward_argument": 4, "test_alone": 1,
    }  # fmt: skip
    assert collected("::test_product[2-c]", LONG_TESTS="") == {"test_product": [{"2", "c"}]}
