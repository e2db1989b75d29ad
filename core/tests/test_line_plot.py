"""Lines over two axes as SVG."""

from __future__ import annotations

from xml.etree import ElementTree as ET

import pytest

from splitlearn_core.line_plot import Axis, Line, line_plot

pytestmark = pytest.mark.light


def drawn(picture: str, kind: str) -> list[ET.Element]:
    return [element for element in ET.fromstring(picture).iter() if element.tag.endswith(kind)]


def test_lines_are_drawn_to_scale_and_named() -> None:
    """The low end is at the left and below, later lines above earlier ones; text is escaped."""
    lines = [Line("a < b", [(0, 1), (10, 3)], "#111", 7), Line("dotted", [(5, 2)], "#222", dashes="6 3", has_dots=True)]
    picture = line_plot(lines, Axis("x & y", 0, 10, (0, 10), ".0f"), Axis("y", 1, 3, (1, 3)), "a note")

    first, second = drawn(picture, "polyline")
    (left, low), (right, high) = (map(float, pair.split(",")) for pair in first.get("points", "").split())
    assert left < right
    assert low > high
    across, down = map(float, second.get("points", "").split(","))
    assert (across, down) == ((left + right) / 2, (low + high) / 2)
    assert (first.get("stroke-width"), first.get("stroke-dasharray")) == ("7", None)
    assert second.get("stroke-dasharray") == "6 3"
    assert len(drawn(picture, "circle")) == 1
    words = [element.text for element in drawn(picture, "text")]
    assert {"a < b", "dotted", "x & y", "y", "a note", "0", "10", "1.00", "3.00"} <= set(words)


def test_values_that_are_all_equal_are_drawn() -> None:
    """An axis without a length divides by nothing."""
    picture = line_plot([Line("flat", [(1, 2), (1, 2)], "#111")], Axis("x", 1, 1, (1,)), Axis("y", 2, 2, (2,)), "")
    assert len(drawn(picture, "polyline")) == 1
