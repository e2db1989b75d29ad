"""Which bytes are needed, cached and requested: arithmetic against sets of bytes, and arbitrary records."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitlearn_core.checkpoint.hub import fetch_plan
from splitlearn_core.checkpoint.hub.fetch_plan import (
    Coverage,
    count,
    merged,
    parse_content_range,
    parse_coverage,
    pays,
    pieces,
    to_request,
    without,
)

pytestmark = pytest.mark.light

SPANS = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)).map(sorted).map(tuple), max_size=8)
MEGABYTE = 2**20


def as_set(spans: object) -> set[int]:
    return {byte for begin, end in spans for byte in range(begin, end)}  # type: ignore[attr-defined]


@given(SPANS, SPANS)
def test_spans_are_sets_of_bytes(one: list[fetch_plan.Span], other: list[fetch_plan.Span]) -> None:
    """Merging keeps the bytes, subtracting takes away just those; both give sorted spans that do not touch."""
    for got, expected in ((merged(one), as_set(one)), (without(one, other), as_set(one) - as_set(other))):
        assert as_set(got) == expected
        assert count(got) == len(expected)
        assert list(got) == sorted(got)
    assert all(a[1] < b[0] for a, b in zip(merged(one), merged(one)[1:], strict=False))


@given(SPANS, SPANS, st.integers(0, 20))
def test_what_is_requested(wanted: list[fetch_plan.Span], held: list[fetch_plan.Span], gap: int) -> None:
    """All that is wanted and not held, nothing that is held, and of the rest only gaps between the two ends."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fetch_plan, "GAP_BYTES", gap)
        asked = as_set(to_request(wanted, held))
    missing = as_set(wanted) - as_set(held)
    assert missing <= asked
    assert not asked & as_set(held)
    if missing:
        assert asked <= set(range(min(missing), max(missing) + 1))
    if gap == 0:
        assert asked == missing


@given(SPANS, st.integers(1, 10))
def test_pieces(spans: list[fetch_plan.Span], limit: int) -> None:
    """They are the same bytes in the same order, none longer than the limit."""
    cut = list(pieces(merged(spans), limit))
    assert as_set(cut) == as_set(spans)
    assert all(0 < end - begin <= limit for begin, end in cut)
    assert cut == sorted(cut)


@pytest.mark.parametrize(
    ("needed", "size", "pays_off"),
    [
        (0, 10 * MEGABYTE, True),
        (7 * MEGABYTE, 10 * MEGABYTE, True),
        (8 * MEGABYTE, 10 * MEGABYTE, False),  # a fifth is not worth having half a file
        (10 * MEGABYTE, 10 * MEGABYTE, False),
        (0, MEGABYTE - 1, False),  # and small files never are
        (0, MEGABYTE, True),
    ],
)
def test_when_ranges_pay(needed: int, size: int, pays_off: bool) -> None:
    """Where they spare a megabyte and a quarter of the file."""
    assert pays([(0, needed)], size) is pays_off


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("bytes 0-99/1000", ((0, 100), 1000)),
        ("bytes 999-999/1000", ((999, 1000), 1000)),
        *(
            (text, None)
            for text in (
                None, "", "bytes */1000", "bytes 0-99/*", "bytes 5-4/1000", "bytes 0-1000/1000", "bytes -5-9/10",
                "items 0-99/1000", "bytes 0-99", "bytes 0-٩/1000", "bytes 0-99/1000, 200-300/1000",
                f"bytes 0-9/{'9' * 40}",
            )
        ),
    ],
)  # fmt: skip
def test_content_range(text: str | None, expected: object) -> None:
    """A span inside the file, or nothing."""
    assert parse_content_range(text) == expected


@given(SPANS)
def test_a_record_is_read_as_it_was_written(spans: list[fetch_plan.Span]) -> None:
    """With its spans merged."""
    coverage = Coverage("abc", 60)
    for span in merged(spans):
        coverage = coverage.holding(span)
    coverage = coverage.seen_at("c1").seen_at("c1")
    assert coverage.commits == ("c1",)
    assert parse_coverage(coverage.to_json()) == coverage
    assert coverage.spans == merged(spans)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-5, 70) | st.text(max_size=3),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
        max_leaves=12,
    ),
    st.sampled_from(["format", "etag", "size", "spans", "commits"]),
)
def test_a_record_that_says_something_else_holds_nothing(value: object, field: str) -> None:
    """Whatever one of its fields holds, what is read of it is inside the file, or nothing."""
    record = {**json.loads(Coverage("abc", 60, ((0, 10),), ("c",)).to_json()), field: value}
    read = parse_coverage(json.dumps(record))
    assert read is None or all(0 <= begin < end <= read.size for begin, end in read.spans)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, '{"format": 1}', '{"format": 2}', "\x00"])
def test_a_record_that_is_none(text: str) -> None:
    """It holds nothing, and breaks nothing."""
    assert parse_coverage(text) is None
