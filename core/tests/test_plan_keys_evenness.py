"""A plan detects a layer without tensors that its neighbours have, but accepts intended differences."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from splitlearn_core import plan_split
from splitlearn_core.plan.keys import uneven_layers

P = "model.layers."


def keys(depth: int, names: Iterable[str] = ("a.weight", "b.weight"), without: Iterable[str] = ()) -> list[str]:
    lost = {P + key for key in without}
    return [key for n in range(depth) for name in names if (key := f"{P}{n}.{name}") not in lost] + [
        "model.norm.weight"
    ]


@pytest.mark.parametrize(
    ("present", "said"),
    [
        (keys(12), ()),
        (keys(12, without=["7.a.weight"]), ("layer 7 lacks a.weight, which layers 0-6 and 8-11 have",)),
        (keys(6, without=["0.a.weight"]), ("layer 0 lacks a.weight, which layers 1-5 have",)),
        (
            keys(12, without=["3.a.weight", "5.a.weight"]),
            (
                "layer 3 lacks a.weight, which layers 0-2, 4 and 6-11 have",
                "layer 5 lacks a.weight, which layers 0-2, 4 and 6-11 have",
            ),
        ),
        (
            keys(8, "abcdef", without=["7.a", "7.b", "7.c", "7.d", "7.e"]),
            ("layer 7 lacks a, b, c and 2 more, which layers 0-6 have",),
        ),
        # Too few to know what is usual.
        (keys(3, without=["1.a.weight"]), ()),
        # Every other layer is of another kind.
        (keys(12, without=[f"{n}.a.weight" for n in range(0, 12, 2)]), ()),
        # The first layer has a feed-forward where the others have experts.
        ([*keys(12, without=["0.a.weight"]), f"{P}0.dense.weight"], ()),
        ([], ()),
        (["lm_head.weight", f"{P}x.a.weight"], ()),
    ],
    ids=["even", "one", "first", "two", "many", "few layers", "kinds", "own instead", "nothing", "no layers"],
)
def test_what_is_said(present: list[str], said: tuple[str, ...]) -> None:
    """A layer is named with what it lacks and who has it."""
    assert uneven_layers(P, present) == said


def test_a_plan_of_a_file_without_a_tensor(llama: Any, single: Path, cli: Any) -> None:
    """Text and JSON have the warning; the plan is made nevertheless."""
    file = single / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.4.mlp.up_proj.weight"]
    save_file(tensors, file, {"format": "pt"})
    said = "layer 4 lacks mlp.up_proj.weight, which layers 0-3 and 5 have"

    (_, shown, _), (_, data, _) = (cli("plan", single, "--split", "2", "4", *json_) for json_ in ((), ("--json",)))

    assert f"warning: {said}: the file may be incomplete" in shown.splitlines()
    assert json.loads(data)["warnings"] == [said]
    assert plan_split(single, (2, 4), parts=("bottom",)).warnings == (said,)


def test_a_sound_file_and_a_config_alone_give_none(llama: Any, single: Path) -> None:
    """There is nothing to say of either."""
    assert plan_split(single, (2, 4)).warnings == ()
    (single / "model.safetensors").unlink()
    assert plan_split(single, (2, 4)).warnings == ()
