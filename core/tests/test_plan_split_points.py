"""Split points: how they cut a model into components, and the errors of invalid ones."""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from splitlearn_core import ConfigurationError, InvalidSplitError, ModelFamily, SplitLearnError
from splitlearn_core.plan.split_points import (
    check_split_points,
    count_layers,
    even_thirds,
    names_of_parts,
    split_layers,
)
from splitlearn_core.types import Component, LayerRange, component_names, is_component_name, kind_of, place_of

pytestmark = pytest.mark.light

FAMILY = ModelFamily(model_type="llama", architecture="LlamaForCausalLM")


def named_choice(hint: str) -> tuple[int, int]:
    """Return the pair of layers that a hint names."""
    found = re.search(r"\((-?\d+), (-?\d+)\)", hint)
    assert found, hint
    return int(found[1]), int(found[2])


@pytest.mark.parametrize("total", range(3, 9))
def test_every_valid_pair_is_taken(total: int) -> None:
    """All ``0 < a < b < N`` are valid, and the ranges cover every layer once."""
    for a, b in itertools.combinations(range(1, total), 2):
        ranges = split_layers(FAMILY, {"num_hidden_layers": total}, (a, b))

        assert ranges == {
            Component.BOTTOM: LayerRange(0, a, total),
            Component.TRUNK: LayerRange(a, b, total),
            Component.TOP: LayerRange(b, total, total),
        }
        assert [sum(layer in owned for owned in ranges.values()) for layer in range(total)] == [1] * total
        assert all(len(owned) > 0 for owned in ranges.values())


@pytest.mark.parametrize("total", range(3, 9))
def test_every_other_pair_is_refused_with_a_valid_choice(total: int) -> None:
    """Any other pair is an InvalidSplitError whose hint names a pair that is itself valid."""
    for a, b in itertools.product(range(-3, total + 4), repeat=2):
        if 0 < a < b < total:
            continue
        with pytest.raises(InvalidSplitError) as caught:
            check_split_points((a, b), total)

        error = caught.value
        assert f"({a}, {b})" in error.message
        assert f"0 < a < b < {total}" in error.message
        choice = named_choice(error.hint)
        assert check_split_points(choice, total) == choice


@pytest.mark.parametrize("total", range(3, 7))
def test_the_choice_is_the_nearest(total: int) -> None:
    """No valid pair lies nearer to the given one, in either order, than the one that is named."""
    for given in itertools.product(range(-2, total + 3), repeat=2):
        if 0 < given[0] < given[1] < total:
            continue
        with pytest.raises(InvalidSplitError) as caught:
            check_split_points(given, total)

        def distance(pair: tuple[int, int], given: tuple[int, int] = given) -> int:
            low, high = sorted(given)
            return abs(pair[0] - low) + abs(pair[1] - high)

        best = min(distance(pair) for pair in itertools.combinations(range(1, total), 2))
        assert distance(named_choice(caught.value.hint)) == best, given


@pytest.mark.parametrize(
    ("points", "arithmetic"),
    [
        ((4, 2), "a < b does not hold (4 >= 2)"),
        ((3, 3), "a < b does not hold (3 >= 3)"),
        ((0, 3), "0 < a does not hold (0 >= 0)"),
        ((-1, 3), "0 < a does not hold (0 >= -1)"),
        ((2, 6), "b < 6 layers does not hold (6 >= 6)"),
        ((2, 99), "b < 6 layers does not hold (99 >= 6)"),
    ],
)
def test_the_message_shows_the_arithmetic(points: tuple[int, int], arithmetic: str) -> None:
    """The comparison that fails is in the message, with its numbers."""
    with pytest.raises(InvalidSplitError) as caught:
        check_split_points(points, 6)

    assert arithmetic in caught.value.message


def test_all_broken_comparisons_are_shown() -> None:
    """Points that break two comparisons see both."""
    with pytest.raises(InvalidSplitError) as caught:
        check_split_points((0, 0), 6)

    assert caught.value.message.count("does not hold") == 2


@pytest.mark.parametrize("number", [(), [], range(0)], ids=repr)
def test_no_points_are_refused(number: Any) -> None:
    """One point at least is needed; the hint names a pair that works."""
    with pytest.raises(InvalidSplitError) as caught:
        check_split_points(number, 6)

    assert f"{len(number)} split points" in caught.value.message
    choice = named_choice(caught.value.hint)
    assert check_split_points(choice, 6) == choice


@pytest.mark.parametrize("total", [2, 4, 6])
def test_any_number_of_increasing_points_is_taken(total: int) -> None:
    """The ranges cover every layer once; the names are bottom, trunk or numbered trunks, and top."""
    for count in range(1, total):
        trunks = ["trunk"] if count == 2 else [f"trunk{number}" for number in range(1, count)]
        for points in itertools.combinations(range(1, total), count):
            ranges = split_layers(FAMILY, {"num_hidden_layers": total}, points)
            assert list(ranges) == ["bottom", *trunks, "top"] == list(names_of_parts(points))
            edges = (0, *points, total)
            assert [(owned.start, owned.end) for owned in ranges.values()] == list(itertools.pairwise(edges))


@pytest.mark.parametrize("count", [1, 3, 4])
def test_other_points_are_refused_with_a_valid_choice(count: int) -> None:
    """The message shows the arithmetic, and the hint points that cut the model, as many."""
    letters = ", ".join("abcd"[:count]).replace(", ", " < ")
    for points in itertools.product((-2, 0, 1, 3, 5, 9), repeat=count):
        if list(points) == sorted(set(points)) and points[0] > 0 and points[-1] < 6:
            continue
        with pytest.raises(InvalidSplitError) as caught:
            check_split_points(points, 6)
        assert repr(points) in caught.value.message
        assert f"0 < {letters} < 6 is needed" in caught.value.message
        choice = ast.literal_eval(caught.value.hint.removeprefix("the nearest valid choice is "))
        assert len(choice) == count
        assert check_split_points(choice, 6) == choice


def test_a_component_has_a_layer_at_least() -> None:
    """There are fewer components than the points ask for; the message counts them, the hint layers."""
    with pytest.raises(InvalidSplitError, match="a model of 3 layers cannot be cut into 4 components") as caught:
        check_split_points((1, 2, 3), 3)
    assert "at least 4" in caught.value.hint
    with pytest.raises(InvalidSplitError, match="a model of 1 layers cannot be cut into bottom and top"):
        check_split_points((1,), 1)


def test_more_points_than_any_model_has_layers() -> None:
    """They are counted, and not written out."""
    with pytest.raises(InvalidSplitError, match="1000000 split points") as caught:
        check_split_points(range(1, 1_000_001), 6)
    assert len(str(caught.value)) < 300


def test_one_number_alone_gets_a_tuple() -> None:
    """The slip of who wants one cut: ``split_points=3``."""
    with pytest.raises(InvalidSplitError) as caught:
        check_split_points(3, 6)  # type: ignore[arg-type]
    assert "(3,) for one cut" in caught.value.hint


@pytest.mark.parametrize("count", [2, 3, 4, 12])
def test_names_of_components(count: int) -> None:
    """Each is a component's name, of the right kind, and sorts to its place."""
    names = component_names(count)
    assert len(set(names)) == count
    assert all(map(is_component_name, names))
    assert [str(kind_of(name)) for name in names] == ["bottom", *["trunk"] * (count - 2), "top"]
    assert sorted(set(names), key=place_of) == list(names)


@pytest.mark.parametrize("name", ["trunk0", "trunk01", "trunk-1", "trunk 1", "trunkk", "Trunk", "head", "", 1, None])
def test_what_is_no_name_of_a_component(name: Any) -> None:
    """Numbers of trunks begin with 1, and are written plainly."""
    assert not is_component_name(name)


@pytest.mark.parametrize(
    "points",
    [(2.0, 4), (2, 4.5), (True, 4), (False, True), ("2", "4"), (None, 4), (2, [4]), (2, float("nan")), (1j, 2)],
    ids=repr,
)
def test_points_that_are_no_integers_are_refused(points: Any) -> None:
    """Nothing is rounded or guessed."""
    with pytest.raises(InvalidSplitError) as caught:
        check_split_points(points, 6)

    assert "integers" in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    "points",
    ["24", "2,4", 2, None, {2, 4}, {2: 4}, iter((2, 4))],
    ids=["digits", "text", "number", "None", "set", "dict", "iterator"],
)
def test_what_is_no_sequence_is_refused(points: Any) -> None:
    """A string is no pair, and a set has no order."""
    with pytest.raises(InvalidSplitError) as caught:
        check_split_points(points, 6)

    assert caught.value.hint


@pytest.mark.parametrize("points", [[2, 4], (np.int64(2), np.int32(4)), range(2, 4), (np.uint8(2), 4)], ids=repr)
def test_anything_that_counts_is_an_integer(points: Any) -> None:
    """Lists and numpy's integers will do, and come back as plain integers."""
    got = check_split_points(points, 6)

    assert got == (points[0], points[1])
    assert all(type(point) is int for point in got)


def test_numpy_truth_values_are_no_layers() -> None:
    """``numpy.bool_`` is refused like ``bool``."""
    with pytest.raises(InvalidSplitError):
        check_split_points((np.True_, 4), 6)  # type: ignore[arg-type]


@pytest.mark.parametrize("total", [1, 2])
def test_a_model_too_shallow_is_refused(total: int) -> None:
    """Three components need three layers, whatever the points are."""
    for points in itertools.product(range(4), repeat=2):
        with pytest.raises(InvalidSplitError, match=f"a model of {total} layers cannot be cut") as caught:
            split_layers(FAMILY, {"num_hidden_layers": total}, points)

        assert "3" in caught.value.hint


@pytest.mark.parametrize("layers", [None, 0, -1, 10**9, 6.0, "6", True, [6], {}], ids=repr)
def test_a_rubbish_number_of_layers_is_refused(layers: Any) -> None:
    """The message names the key of config.json and what it says."""
    with pytest.raises(ConfigurationError, match="num_hidden_layers") as caught:
        count_layers(FAMILY, {"num_hidden_layers": layers})

    assert caught.value.hint


def test_a_family_with_names_of_its_own() -> None:
    """The number of layers is read, and complained about, under the family's own name."""
    family = ModelFamily(model_type="x", architecture="X", config_names={"num_hidden_layers": "n_layer"})

    assert count_layers(family, {"n_layer": 5}) == 5
    with pytest.raises(ConfigurationError, match="n_layer"):
        count_layers(family, {})


def test_an_impossible_cut_is_refused_with_its_reason() -> None:
    """A cut that the family rules out shows the reason and the cuts that are left."""

    def shared(config: Mapping[str, Any]) -> Mapping[int, str]:
        return {4: "layers 4 and 5 share keys and values", 5: "as 4"}

    family = ModelFamily(model_type="x", architecture="X", impossible_cuts=shared)
    config = {"num_hidden_layers": 6}

    assert split_layers(family, config, (1, 3))[Component.TOP].start == 3
    with pytest.raises(InvalidSplitError) as caught:
        split_layers(family, config, (1, 4))

    assert "share keys and values" in caught.value.message
    assert "1, 2, 3" in caught.value.hint


@pytest.mark.parametrize("kinds", [5, "shared", {"0": "shared"}])
def test_kinds_of_layers_that_are_no_list_are_refused(kinds: Any) -> None:
    family = ModelFamily(model_type="x", architecture="X", joined_layers={"indexer_types": ("shared",)})
    with pytest.raises(ConfigurationError, match="indexer_types") as caught:
        split_layers(family, {"num_hidden_layers": 6, "indexer_types": kinds}, (1, 3))
    assert caught.value.hint


def test_an_invalid_split_is_three_things() -> None:
    """It can be caught as ours, as bad configuration and as a ValueError."""
    assert issubclass(InvalidSplitError, (ValueError,))
    assert issubclass(InvalidSplitError, ConfigurationError)
    assert issubclass(InvalidSplitError, SplitLearnError)


def test_layer_ranges_say_what_they_hold() -> None:
    """A range counts, contains and prints its layers, numbered as in the whole model."""
    middle = LayerRange(2, 4, 6)

    assert (len(middle), 2 in middle, 4 in middle, str(middle)) == (2, True, False, "[2, 4) of 6")
    assert (middle.is_first, middle.is_last) == (False, False)
    assert LayerRange(0, 2, 6).is_first
    assert LayerRange(4, 6, 6).is_last


@pytest.mark.parametrize(
    ("total", "points"),
    [(3, (1, 2)), (4, (1, 3)), (5, (1, 4)), (6, (2, 4)), (8, (2, 6)), (24, (8, 16)), (32, (10, 22))],
)
def test_even_thirds(total: int, points: tuple[int, int]) -> None:
    """Bottom and top have a third of the layers each, and the trunk the rest."""
    assert even_thirds(FAMILY, {"num_hidden_layers": total}) == points
    assert check_split_points(points, total) == points


@pytest.mark.parametrize(
    ("impossible", "points"), [((2,), (1, 4)), ((4,), (2, 3)), ((2, 3, 4), (1, 5)), ((1, 2, 3), (4, 5))]
)
def test_even_thirds_are_possible(impossible: tuple[int, ...], points: tuple[int, int]) -> None:
    """Where a family bears no such cut, the nearest that it bears."""
    family = ModelFamily(
        model_type="x", architecture="X", impossible_cuts=lambda _: dict.fromkeys(impossible, "layers share a cache")
    )
    assert even_thirds(family, {"num_hidden_layers": 6}) == points


def test_no_thirds_without_two_cuts() -> None:
    """A model that cannot be cut into three is not proposed to be."""
    with pytest.raises(InvalidSplitError, match="cannot be cut into bottom, trunk and top"):
        even_thirds(FAMILY, {"num_hidden_layers": 2})
    family = ModelFamily(model_type="x", architecture="X", impossible_cuts=lambda _: dict.fromkeys((1, 2, 3), "no"))
    with pytest.raises(InvalidSplitError) as caught:
        even_thirds(family, {"num_hidden_layers": 5})
    assert "before layers 4" in caught.value.hint


def test_split_points_left_out() -> None:
    """Who gives none is proposed even thirds."""
    with pytest.raises(InvalidSplitError) as caught:
        check_split_points((), 24)
    assert "(8, 16)" in caught.value.hint
