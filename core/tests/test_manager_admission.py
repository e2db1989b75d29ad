"""Which load is admitted and which models are evicted: tables, and properties over any room and any tenants."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitlearn_core.manager import admission
from splitlearn_core.manager.admission import Admit, Evict, Idle, Refuse, Room, Tenant, Verdict, Wait, has_any
from support.long import cases

pytestmark = pytest.mark.light

LEDGERS = ("host", "mapped", "cuda:0")
SETTINGS = settings(max_examples=cases(400, 100), deadline=None, derandomize=True, database=None)


@dataclasses.dataclass(frozen=True)
class Holder:
    """A tenant, when it was last used, and what can become of it."""

    tenant: Tenant
    evictable: bool
    leaving: bool
    last_used: float

    @property
    def key(self) -> tuple[str, int]:
        return self.tenant.key

    @property
    def held(self) -> Mapping[str, int]:
        return self.tenant.held


def tenant(name: str, host: int = 0, used: float = 0.0, **more) -> Holder:
    """Make an idle tenant; ``more`` holds other ledgers under ``held``, and flags."""
    held = {"host": host, **more.pop("held", {})}
    leaving = more.pop("leaving", False)
    evictable = more.pop("evictable", not (leaving or any(more.get(flag) for flag in ("leases", "pinned", "loading"))))
    return Holder(Tenant((name, 1), held, **more), evictable, leaving, used)


def decide(needs, there: Room, holders: Iterable[Holder], *, allow_paging: bool = False) -> Verdict:
    """Decide as the machine does it: the idle ones by last use, each iterated at most once."""
    idle = sorted((h for h in holders if h.evictable), key=lambda h: (h.last_used, h.key))
    held = {name: sum(h.held.get(name, 0) for h in idle) for name in {name for h in idle for name in h.held}}
    return admission.decide(
        needs,
        there,
        (h.tenant for h in holders if h.leaving),
        Idle((h.tenant for h in idle), len(idle), held),
        lambda short: (h.tenant for h in holders if not h.leaving and has_any(h.held, short)),
        allow_paging=allow_paging,
    )


def room(host: int, free: int, places: int | None = None, **more: tuple[int, int]) -> Room:
    """Make a room; other ledgers are (total, available)."""
    pairs = {"host": (host, free), **{name.replace("_", ":"): pair for name, pair in more.items()}}
    return Room({n: total for n, (total, _) in pairs.items()}, {n: left for n, (_, left) in pairs.items()}, places)


def names(verdict) -> list[str]:
    assert isinstance(verdict, Evict), verdict
    return [key[0] for key in verdict.victims]


@pytest.mark.parametrize(
    ("needs", "there", "kind"),
    [
        ({"host": 4}, room(10, 4), Admit),
        ({"host": 0}, room(10, -3), Admit),
        ({}, room(10, 0), Admit),
        ({"host": 5}, room(10, 4), Wait),
        ({"host": 10}, room(10, 10), Admit),
        ({"host": 11}, room(10, 10), Refuse),
        ({"host": 1, "cuda:0": 1}, room(10, 10), Refuse),
        ({"host": 1, "cuda:0": 0}, room(10, 10), Admit),
        ({"host": 1, "cuda:0": 3}, room(10, 10, cuda_0=(4, 3)), Admit),
        ({"host": 1, "cuda:0": 3}, room(10, 10, cuda_0=(4, 2)), Wait),
        ({"host": 1}, room(10, 10, places=1), Admit),
        ({"host": 1}, room(10, 10, places=0), Wait),
        ({"host": 1, "budget": 7}, room(10, 10, budget=(6, 6)), Refuse),
        ({"host": 1, "budget": 6}, room(10, 10, budget=(6, 5)), Wait),
    ],
)
def test_verdict_over_an_empty_house(needs, there, kind):
    assert type(decide(needs, there, [])) is kind


def test_mapped_weights_may_exceed_memory_only_where_paging_is_allowed():
    there = room(10, 10, mapped=(8, 2))
    assert isinstance(decide({"mapped": 9}, there, []), Refuse)
    assert isinstance(decide({"mapped": 3}, there, []), Wait)
    assert isinstance(decide({"mapped": 9, "host": 2}, there, [], allow_paging=True), Admit)
    assert isinstance(decide({"mapped": 9, "host": 11}, there, [], allow_paging=True), Refuse)


@pytest.mark.parametrize(
    ("needs", "tenants", "victims"),
    [
        # The one that was used longest ago.
        (3, [tenant("new", 3, 9.0), tenant("old", 3, 1.0), tenant("middle", 3, 5.0)], ["old"]),
        # Used at the same moment: by name, so that it is the same each time.
        (3, [tenant("b", 3), tenant("a", 3)], ["a"]),
        # One does not do, two do.
        (5, [tenant("a", 3, 1.0), tenant("b", 3, 2.0), tenant("c", 3, 3.0)], ["a", "b"]),
        # A large one that was used lately makes a small old one needless.
        (5, [tenant("small", 1, 1.0), tenant("large", 8, 2.0)], ["large"]),
        # What has nothing that is wanted stays.
        (3, [tenant("card", 0, 1.0, held={"cuda:0": 9}), tenant("a", 3, 2.0)], ["a"]),
        # Neither lent, pinned nor loading ones go, however old.
        (3, [tenant("l", 9, leases=1), tenant("p", 9, pinned=True), tenant("o", 9, loading=True), tenant("a", 3, 9.0)],
         ["a"]),
        # What is leaving counts, and only the rest has to go.
        (5, [tenant("gone", 3, leaving=True), tenant("a", 2, 1.0), tenant("b", 9, 2.0)], ["a"]),
    ],
)  # fmt: skip
def test_victims(needs, tenants, victims):
    assert names(decide({"host": needs}, room(20, 0), tenants)) == victims


def test_victims_serve_each_ledger_that_is_short():
    tenants = [
        tenant("host only", 4, 1.0),
        tenant("card only", 0, 2.0, held={"cuda:0": 4}),
        tenant("both", 4, 3.0, held={"cuda:0": 4}),
    ]
    assert names(decide({"host": 3, "cuda:0": 3}, room(20, 0, cuda_0=(8, 0)), tenants)) == ["host only", "card only"]
    assert names(decide({"host": 3, "cuda:0": 3}, room(20, 0, cuda_0=(8, 3)), tenants)) == ["host only"]


def test_the_managers_own_limit_is_a_ledger_like_others():
    tenants = [tenant("a", 4, 1.0, held={"budget": 6}), tenant("b", 4, 2.0, held={"budget": 6})]
    there = room(100, 90, budget=(14, 2))
    assert names(decide({"host": 1, "budget": 7}, there, tenants)) == ["a"]
    assert isinstance(decide({"host": 1, "budget": 15}, there, tenants), Refuse)


def test_what_is_to_be_reloaded_serves_while_the_others_suffice():
    tenants = [tenant("r", 3, 1.0, reloading=True), tenant("a", 3, 2.0), tenant("b", 3, 3.0)]
    assert names(decide({"host": 6}, room(20, 0), tenants)) == ["a", "b"]
    assert names(decide({"host": 9}, room(20, 0), tenants)) == ["a", "b", "r"]


def test_no_tenant_is_looked_at_further_than_the_decision_needs():
    looked: list[str] = []

    def tenants(kind: str, count: int) -> Iterator[Tenant]:
        for number in range(count):
            looked.append(f"{kind}{number}")
            yield Tenant((kind, number), {"host": 2})

    def look(needs: int, there: Room) -> Verdict:
        looked.clear()
        idle = Idle(tenants("idle", 9), 9, {"host": 18})
        return admission.decide({"host": needs}, there, tenants("leaving", 1), idle, lambda short: tenants("other", 9))

    assert isinstance(look(4, room(30, 4)), Admit)
    assert looked == []
    assert isinstance(look(31, room(30, 4)), Refuse)
    assert looked == []
    assert isinstance(look(6, room(30, 4)), Wait)
    assert looked == ["leaving0"]
    assert isinstance(look(10, room(30, 4)), Evict)
    assert looked == ["leaving0", "idle0", "idle1"]
    assert isinstance(look(30, room(30, 4)), Wait)
    assert looked == ["leaving0", *(f"other{number}" for number in range(admission.NAMED + 1))]


def test_places_are_freed_too():
    tenants = [tenant("a", 0, 1.0), tenant("b", 0, 2.0)]
    assert names(decide({"host": 1}, room(10, 10, places=0), tenants)) == ["a"]
    assert names(decide({"host": 1}, room(10, 10, places=-1), tenants)) == ["a", "b"]
    assert isinstance(decide({"host": 1}, room(10, 10, places=-2), tenants), Wait)


def test_nothing_is_evicted_if_it_would_not_suffice():
    tenants = [tenant("a", 4), tenant("b", 3, leases=2), tenant("c", 3, pinned=True)]
    verdict = decide({"host": 5}, room(10, 0), tenants)
    assert isinstance(verdict, Wait)
    assert not verdict.soon


def test_memory_being_freed_is_waited_for_without_evictions():
    verdict = decide({"host": 5}, room(10, 0), [tenant("a", 5, leaving=True), tenant("b", 5)])
    assert isinstance(verdict, Wait)
    assert verdict.soon
    assert "waiting for a to be freed" in verdict.reason
    verdict = decide({"host": 5}, room(10, 5, places=0), [tenant("a", 0, leaving=True)])
    assert isinstance(verdict, Wait)
    assert verdict.soon


def test_reasons_name_the_numbers_and_the_holders():
    gib = 2**30
    tenants = [
        tenant("b", gib, leases=2),
        tenant("p", gib, pinned=True),
        tenant("l", gib, loading=True),
        tenant("n", gib, evictable=False),
    ]
    verdict = decide({"host": 3 * gib}, room(8 * gib, gib), tenants)
    assert isinstance(verdict, Wait)
    assert verdict.reason == (
        "needs 3.0 GiB of memory, 1.0 GiB free, waiting for 2 leases on b, p, which is pinned, "
        "l, which is loading and others"
    )
    assert "n, which has just been loaded" in decide({"host": 3 * gib}, room(8 * gib, gib), tenants[3:]).reason
    reloading = tenant("r", gib, evictable=False, reloading=True)
    assert "r, which serves until it is reloaded" in decide({"host": 2 * gib}, room(8 * gib, gib), [reloading]).reason
    stuck = tenant("s", gib, evictable=False, pinned=True, stuck=True)
    assert "s, which is stuck" in decide({"host": 2 * gib}, room(8 * gib, gib), [stuck]).reason
    one = decide({"host": 2 * gib}, room(8 * gib, gib), [tenant("b", gib, leases=1)]).reason
    assert one.endswith("waiting for 1 lease on b")
    reason = decide({"host": 2 * gib}, room(8 * gib, -gib), []).reason
    assert reason == "needs 2.0 GiB of memory, 0 B free, waiting for memory that others have taken"
    never = decide({"host": 9 * gib, "cuda:1": gib}, room(8 * gib, gib), tenants).reason
    assert "8.0 GiB is all that this machine can give" in never
    assert "memory on cuda:1, which this machine does not have" in never


counts = st.dictionaries(st.sampled_from(LEDGERS), st.integers(0, 12))
everybody = st.lists(
    st.builds(
        Holder,
        st.builds(
            Tenant,
            key=st.tuples(st.sampled_from("abcdefgh"), st.integers(1, 3)),
            held=counts,
            leases=st.just(0),
            reloading=st.booleans(),
        ),
        evictable=st.booleans(),
        leaving=st.just(False),
        last_used=st.integers(0, 3).map(float),
    ).flatmap(
        lambda one: st.sampled_from(
            [
                one,
                dataclasses.replace(one, evictable=False, leaving=True),
                dataclasses.replace(one, evictable=False, tenant=one.tenant._replace(leases=1)),
            ]
        )
    ),
    max_size=6,
    unique_by=lambda one: one.key,
)
rooms = st.builds(
    Room,
    total=st.fixed_dictionaries({name: st.integers(0, 24) for name in LEDGERS}),
    available=st.fixed_dictionaries({name: st.integers(-3, 12) for name in LEDGERS}),
    places=st.none() | st.integers(-2, 2),
)


def fits(needs, there: Room, gone, *, allow_paging: bool) -> bool:
    """Say whether a load fits once these are gone: the definition, and no way to find them."""
    enough = all(
        there.available.get(name, 0) + sum(one.held.get(name, 0) for one in gone) >= count
        for name, count in needs.items()
        if count and not (allow_paging and name == "mapped")
    )
    return enough and (there.places is None or there.places + len(gone) >= 1)


@SETTINGS
@given(needs=counts, there=rooms, tenants=everybody, allow_paging=st.booleans())
def test_verdicts_are_what_they_say(needs, there, tenants, allow_paging):
    verdict = decide(needs, there, tenants, allow_paging=allow_paging)
    leaving = [one for one in tenants if one.leaving]
    could = [one for one in tenants if one.evictable]
    never = any(
        count > there.total.get(name, 0)
        for name, count in needs.items()
        if count and not (allow_paging and name == "mapped")
    )
    assert isinstance(verdict, Refuse) == never
    if isinstance(verdict, Refuse):
        assert verdict.reason
    elif isinstance(verdict, Admit):
        assert fits(needs, there, [], allow_paging=allow_paging)
    elif isinstance(verdict, Wait):
        assert verdict.reason
        assert not fits(needs, there, [], allow_paging=allow_paging)
        assert verdict.soon == fits(needs, there, leaving, allow_paging=allow_paging)
        assert verdict.soon or not fits(needs, there, leaving + could, allow_paging=allow_paging)
    else:
        victims = [one for one in tenants if one.key in verdict.victims]
        assert len(victims) == len(verdict.victims) > 0
        assert all(one.evictable and not one.leaving and not one.tenant.leases for one in victims)
        assert fits(needs, there, leaving + victims, allow_paging=allow_paging)
        for one in victims:
            rest = [other for other in victims if other is not one]
            assert not fits(needs, there, leaving + rest, allow_paging=allow_paging), f"{one.key} is needless"


@SETTINGS
@given(needs=counts, there=rooms, tenants=everybody)
def test_asking_changes_nothing_and_the_order_of_tenants_does_not_matter(needs, there, tenants):
    before = repr((needs, there, tenants))
    first = decide(needs, there, tenants)
    assert repr((needs, there, tenants)) == before
    assert decide(needs, there, tenants) == first
    again = decide(needs, there, tenants[::-1])
    assert type(again) is type(first)
    assert not isinstance(first, Evict) or again == first


@SETTINGS
@given(needs=counts, there=rooms, tenants=everybody)
def test_more_room_never_makes_it_worse(needs, there, tenants):
    rank = {Admit: 0, Evict: 1, Wait: 1, Refuse: 2}
    more = dataclasses.replace(there, available={name: count + 3 for name, count in there.available.items()})
    assert rank[type(decide(needs, more, tenants))] <= rank[type(decide(needs, there, tenants))]
