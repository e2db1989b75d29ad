"""The table of all model types: it is that of the installed transformers, and what it says is found again."""

from __future__ import annotations

import sys
from pathlib import Path
from random import Random

import pytest
import transformers

from splitlearn_core.plugins.known import PACKAGES, REFUSED, WRITTEN
from support.long import cases

pytestmark = pytest.mark.libs

DOCS = Path(__file__).parent.parent / "docs"
sys.path.append(str(DOCS))

import model_types  # noqa: E402  # a script, and no module of a package

PAGE = model_types.PAGE.read_text(encoding="utf-8")
ANSWERS = model_types.columns(PAGE).get(transformers.__version__, {})
#: Of types of several models that are no causal types.
SEVERAL = model_types.columns(PAGE.partition(model_types.SEVERAL)[2]).get(transformers.__version__, {})


def version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2])


def test_the_table_has_every_type_of_the_installed_transformers() -> None:
    """Or the installed one is older than the newest of the table, and has no column."""
    versions = sorted(map(version, model_types.columns(PAGE)))
    assert sorted(ANSWERS) == model_types.causal_types() or (
        not ANSWERS and version(transformers.__version__) < versions[-1]
    )


@pytest.mark.parametrize(
    "model_type",
    sorted(
        name
        for answers in (ANSWERS, SEVERAL)
        for name in Random(5).sample(
            sorted(answers), min(len(answers), cases(len(answers), 4 if answers is ANSWERS else 1))
        )
    ),
)
def test_rows_are_found_again(model_type: str) -> None:
    """A few of them, and all in the long tests."""
    assert model_types.examined(model_type) == {**SEVERAL, **ANSWERS}[model_type]


def test_answers_go_to_their_tables() -> None:
    """The first is written once it has every causal type; rows that were not examined again stay."""
    page = f"Text.\n\n| type |\n|---|\n\n{model_types.SEVERAL}\n\nMore.\n\n| type |\n|---|\n"
    answers = {"a": "yes", "seeing": "yes"}
    assert "| `a`" not in model_types.with_answers(page, "5.24.0", answers, ["a", "b"])
    page = model_types.with_answers(page, "5.24.0", {**answers, "b": "no: it is none"}, ["a", "b"])
    assert page == (
        "Text.\n\n| type | 5.24.0 (1 of 2) |\n| --- | --- |\n| `a` | yes |\n| `b` | no: it is none |\n\n"
        f"{model_types.SEVERAL}\n\nMore.\n\n| type | 5.24.0 (1 of 1) |\n| --- | --- |\n| `seeing` | yes |\n"
    )
    page = model_types.with_answers(page, "5.24.0", {"b": "yes", "hearing": "no: it is none"}, ["a", "b"])
    assert model_types.columns(page) == {"5.24.0": {"a": "yes", "b": "yes"}}
    assert model_types.columns(page.partition(model_types.SEVERAL)[2]) == {
        "5.24.0": {"hearing": "no: it is none", "seeing": "yes"}
    }


def test_a_column_is_written_beside_the_others() -> None:
    page = model_types.with_column("Text.\n\n| type |\n|---|\n", "5.4.0", {"b": "yes", "a": "no: it is | no <decoder>"})
    page = model_types.with_column(page, "5.24.0", {"b": "yes, in float32", "c": "yes"})
    assert page == (
        "Text.\n\n"
        "| type | 5.24.0 (2 of 2) | 5.4.0 (1 of 2) |\n"
        "| --- | --- | --- |\n"
        "| `a` | - | no: it is / no &lt;decoder> |\n"
        "| `b` | yes, in float32 | yes |\n"
        "| `c` | yes | - |\n"
    )
    assert model_types.columns(page)["5.24.0"] == {"b": "yes, in float32", "c": "yes"}


def test_the_types_that_are_used_most_are_counted() -> None:
    used = model_types.most_used(PAGE)
    assert len(used) == len(set(used)) == 60
    assert set(used) <= next(iter(model_types.columns(PAGE).values())).keys()
    assert model_types.with_count(PAGE) == PAGE


def test_what_errors_say_of_types_is_what_the_table_says() -> None:
    """In the newest column: older versions do not have every type."""
    tables = (model_types.columns(text) for text in (PAGE, PAGE.partition(model_types.SEVERAL)[2]))
    answers = {name: answer for table in tables for name, answer in next(iter(table.values())).items()}
    split = {name for name, answer in answers.items() if model_types.splits(answer)}
    assert split == {*WRITTEN, *PACKAGES} & answers.keys()
    assert answers.keys() - split == REFUSED & answers.keys()


def test_a_run_continues_with_the_rows_of_the_last(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    assert model_types.kept_answers(rows) == {}
    rows.write_text(
        '{"type": "a", "answer": "no: slow"}\n{"type": "b", "answer": "yes"}\n{"type": "a", "answer": "yes"}\n'
    )
    assert model_types.kept_answers(rows) == {"a": "yes", "b": "yes"}
