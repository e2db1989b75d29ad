"""Devices, limits and dtypes per component: what is worked out, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from splitlearn_core import Component, ConfigurationError, InsufficientMemoryError, LayerRange
from splitlearn_core.plan.placement import (
    bytes_on,
    check_fit,
    parse_device_map,
    parse_dtypes,
    parse_max_memory,
    place,
)
from splitlearn_core.plan.splitplan import ComponentPlan, PlannedTensor
from splitlearn_core.types import TensorInfo

pytestmark = pytest.mark.light

ALL = tuple(Component)


def part(component: str, *tensors: tuple[str, int], dtype: str = "float32") -> ComponentPlan:
    """Plan a component of float32 tensors of so many bytes each."""
    planned = tuple(PlannedTensor(key, TensorInfo(key, "F32", (size // 4,), "s", 0, size)) for key, size in tensors)
    return ComponentPlan(Component(component), LayerRange(0, 1, 3), planned, 0, dtype)


PARTS = (
    part("bottom", ("embedding", 40), ("b", 60)),
    part("trunk", ("t", 200)),
    part("top", ("embedding", 40), ("o", 60)),
)


@pytest.mark.parametrize(
    ("budgets", "expected"),
    [
        ({"cpu": None}, "cpu cpu cpu"),
        ({"cuda:0": 360, "cpu": None}, "cuda:0 cuda:0 cuda:0"),  # the tied embedding counts once
        ({"cuda:0": 359, "cpu": None}, "cuda:0 cuda:0 cpu"),
        ({"cuda:0": 100, "cuda:1": 200, "cpu": None}, "cuda:0 cuda:1 cpu"),
        ({"cuda:0": 99, "cuda:1": 300, "cpu": 100}, "cuda:1 cuda:1 cpu"),
        # Filling the first device with bottom and trunk would leave the top without a place.
        ({"cuda:0": 300, "cpu": 99, "cuda:1": 300}, "cuda:0 cuda:0 cuda:1"),
    ],
    ids=str,
)
def test_the_first_devices_are_filled_first(budgets: dict[str, int | None], expected: str) -> None:
    """In the order of the model, and never beyond a limit."""
    assert list(place(PARTS, budgets).values()) == expected.split()


def test_a_half_takes_half() -> None:
    """Limits hold for the dtype that is loaded, not the one that is stored; another dtype is another tensor."""
    parts = (part("bottom", ("embedding", 40)), part("top", ("embedding", 40), dtype="bfloat16"))

    assert bytes_on(parts, {Component.BOTTOM: "cpu", Component.TOP: "cpu"}) == {"cpu": 60}


def test_components_that_do_not_fit_are_reported_with_what_would() -> None:
    """The message says what each component needs and what may be used."""
    with pytest.raises(InsufficientMemoryError) as caught:
        place(PARTS, {"cuda:0": 150, "cpu": 150})

    assert "bottom 100 B, trunk 200 B, top 100 B are needed" in caught.value.message
    assert "cuda:0 150 B, cpu 150 B may be used" in caught.value.message
    assert "parts=('bottom', 'top') would fit" in caught.value.hint
    with pytest.raises(InsufficientMemoryError) as caught:
        place(PARTS, {"cpu": 1})
    assert "would fit" not in caught.value.hint


@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
def test_a_chosen_placement_is_held_against_the_limits(name: str) -> None:
    """A device without a limit has none; the hint is the placement that would do."""
    devices = {Component.BOTTOM: name, Component.TRUNK: name, Component.TOP: "cpu"}
    check_fit(PARTS, devices, {})
    check_fit(PARTS, devices, {"cuda:0": 300})

    with pytest.raises(InsufficientMemoryError, match=f"bottom on {name}") as caught:
        check_fit(PARTS, devices, {"cuda:0": 299, "cpu": 300})

    assert "device_map={'bottom': 'cuda:0', 'trunk': 'cpu', 'top': 'cpu'} would fit" in caught.value.hint


@pytest.mark.parametrize(
    ("size", "expected"),
    [("10GiB", 10 * 2**30), ("1.5 MiB", 3 * 2**19), ("2KB", 2000), ("2Kb", 250), ("7", 7), (9, 9), ("1TB", 10**12)],
    ids=str,
)
def test_sizes_are_accelerates(size: Any, expected: int) -> None:
    """Where accelerate is installed, it says the same."""
    assert parse_max_memory({"cpu": size}) == {"cpu": expected}
    modeling = pytest.importorskip("accelerate.utils.modeling", reason="accelerate is not installed")
    if size not in ("7", "1TB"):  # ours alone
        assert modeling.convert_file_size_to_int(size) == expected


def test_the_cpu_is_filled_last() -> None:
    """As accelerate does; GPUs keep the order in which they were named, by number."""
    assert list(parse_max_memory({"cpu": 1, 1: 2, "cuda:0": 3})) == ["cuda:1", "cuda:0", "cpu"]
    assert parse_max_memory(None) == {}


def test_all_invalid_limits_are_reported() -> None:
    """No size, no device, and the disk."""
    wrong: Any = {"cpu": "3 apples", 0: -1, 1.5: "1GiB", True: 1, "disk": "1GiB"}

    with pytest.raises(ConfigurationError) as caught:
        parse_max_memory(wrong)

    for word in ("'3 apples' for 'cpu'", "-1 for 0", "1.5 is not a device", "True is not a device", "'disk' holds"):
        assert word in caught.value.message


def test_dtypes_of_parts() -> None:
    """One for all, or each its own; what is left out is as the checkpoint states."""
    assert parse_dtypes("torch.float16", ALL) == dict.fromkeys(ALL, "float16")
    assert parse_dtypes({"trunk": "bfloat16", "top": "auto"}, ALL) == {
        "bottom": "auto",
        "trunk": "bfloat16",
        "top": "auto",
    }
    # Those that are not asked for may be named.
    assert parse_dtypes({"trunk": "bfloat16", "top": "float32"}, [Component.TRUNK]) == {"trunk": "bfloat16"}

    with pytest.raises(ConfigurationError) as caught:
        parse_dtypes({"head": "float32", "trunk": "int8", "top": 7}, ALL)

    for word in ("'head'", "'int8' of trunk", "'7' of top", "bfloat16"):
        assert word in caught.value.message


def test_maps_of_devices() -> None:
    """By component; a number is that of a CUDA device."""
    assert parse_device_map(None, ALL) is None
    assert parse_device_map("auto", ALL) == "auto"
    assert parse_device_map({"bottom": "cpu", "trunk": 1}, ALL[:2]) == {"bottom": "cpu", "trunk": "cuda:1"}

    with pytest.raises(ConfigurationError) as caught:
        parse_device_map({"head": "cpu", "trunk": "cpu"}, ALL)

    for word in ("'head'", "leaves out bottom", "leaves out top"):
        assert word in caught.value.message
    for wrong in ("balanced", 0, ["cpu"]):
        with pytest.raises(ConfigurationError, match="device_map is"):
            parse_device_map(wrong, ALL)


@pytest.mark.parametrize(("given", "device"), [("cpu", "'cpu'"), ("cuda:1", "'cuda:1'"), (1, "'cuda:1'")])
def test_one_device_as_a_map_names_the_argument_for_it(given: Any, device: str) -> None:
    """Words of accelerate that place single modules are no devices."""
    with pytest.raises(ConfigurationError, match="device_map is") as caught:
        parse_device_map(given, ALL)
    assert f"device={device}" in caught.value.hint

    with pytest.raises(ConfigurationError, match="device_map is 'balanced'") as caught:
        parse_device_map("balanced", ALL)
    assert "device=" not in caught.value.hint


@pytest.mark.parametrize("size", ["9" * 5000, "9" * 400 + "GB"], ids=["bytes", "unit"])
def test_a_size_that_no_number_holds_is_refused(size: str) -> None:
    with pytest.raises(ConfigurationError, match="cpu"):
        parse_max_memory({"cpu": size})
