"""The admission rule: which load may start now, and which models are evicted for it.

A decision changes nothing. Victims are returned only if they suffice, so a load that has to wait or is refused
evicts nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

from splitlearn_core.manager.loaders.loadable import MAPPED
from splitlearn_core.manager.messages import Key
from splitlearn_core.types import human_bytes

#: The ledger of the manager's own limit over everything it loads.
BUDGET = "budget"
#: A shortage other than of a ledger's bytes: places for models.
PLACES = "places"
#: Holders that a reason names.
NAMED = 3


class Tenant(NamedTuple):
    """A generation that holds memory or has memory reserved. Cheap, since a decision may look at a thousand."""

    key: Key
    held: Mapping[str, int]
    leases: int = 0
    pinned: bool = False
    loading: bool = False
    #: It stays in service until a newer generation is ready.
    reloading: bool = False
    #: Its worker did not stop, and it is unknown when its memory will be free.
    stuck: bool = False


@dataclass(frozen=True, slots=True)
class Idle:
    """The tenants that may be evicted; a decision iterates no further than it has to."""

    #: Least recently used first.
    tenants: Iterable[Tenant] = ()
    #: Upper bounds, known without iterating: the number of tenants, and ledger -> bytes that they hold together.
    count: int = 0
    held: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Room:
    """Memory per ledger, in bytes: total capacity, and what is neither held nor reserved."""

    total: Mapping[str, int]
    available: Mapping[str, int]
    #: Models that may still be loaded; None for no limit.
    places: int | None = None


@dataclass(frozen=True, slots=True)
class Admit:
    """There is room."""


@dataclass(frozen=True, slots=True)
class Evict:
    """There is room once the victims are gone."""

    victims: tuple[Key, ...]
    #: The ledgers, or PLACES, that are short now.
    short: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Wait:
    """There will be room once others release a model."""

    reason: str
    short: frozenset[str] = frozenset()
    #: What is being freed already suffices.
    soon: bool = False


@dataclass(frozen=True, slots=True)
class Refuse:
    """It does not fit even after evicting everything."""

    reason: str


Verdict = Admit | Evict | Wait | Refuse
#: Returns, lazily, the tenants that have something of a shortage: ledgers, or PLACES.
Holders = Callable[[Collection[str]], Iterable[Tenant]]


def decide(
    needs: Mapping[str, int],
    room: Room,
    leaving: Iterable[Tenant] = (),
    idle: Idle = Idle(),  # frozen, and empty
    holders: Holders = lambda short: (),
    *,
    allow_paging: bool = False,
) -> Verdict:
    """Decide whether a load may start.

    The tenants are iterated only if there is no room now, and no further than the decision needs.

    Args:
        needs: Ledger -> bytes at the peak of the load.
        room: Total and available memory, and places.
        leaving: Tenants whose memory is being freed already.
        idle: Tenants that may be evicted for this load.
        holders: The tenants that the reason of a wait may name; the idle ones may be among them.
        allow_paging: Mapped weights may exceed what can be resident.
    """
    requested = _requested(needs, allow_paging=allow_paging)
    beyond = {name: count for name, count in requested.items() if count > room.total.get(name, 0)}
    if beyond:
        return Refuse("; ".join(_never(name, count, room) for name, count in beyond.items()))
    # Ledger -> bytes that are missing now, and PLACES -> models that are too many.
    short = {name: lack for name, count in requested.items() if (lack := count - room.available.get(name, 0)) > 0}
    if room.places is not None and room.places < 1:
        short[PLACES] = 1 - room.places
    if not short:
        return Admit()
    going = tuple(leaving)
    # Memory that is being freed already needs no victims.
    lacking = _without(short, going)
    names = frozenset(short)
    if not lacking:
        return Wait(_reason(short, needs, room, going, ()), names, soon=True)
    victims = _victims(lacking, idle)
    if victims:
        return Evict(tuple(tenant.key for tenant in victims), names)
    return Wait(_reason(short, needs, room, going, holders(lacking)), names)


def has_any(held: Mapping[str, int], short: Collection[str]) -> bool:
    """Return whether a tenant with this memory has something of a shortage: ledgers, or PLACES."""
    if PLACES in short:
        return True
    # A plain loop, because it is called for a thousand models.
    for name in short:  # noqa: SIM110
        if held.get(name):
            return True
    return False


def lacks_even_without(
    needs: Mapping[str, int], total: Mapping[str, int], staying: Iterable[Mapping[str, int]], *, allow_paging: bool
) -> frozenset[str]:
    """Return the ledgers in which a load does not fit next to the memory that stays, whatever else is freed."""
    stays = list(staying)
    return frozenset(
        name
        for name, count in _requested(needs, allow_paging=allow_paging).items()
        if count > total.get(name, 0) - sum(held.get(name, 0) for held in stays)
    )


def _requested(needs: Mapping[str, int], *, allow_paging: bool) -> dict[str, int]:
    return {name: count for name, count in needs.items() if count and not (allow_paging and name == MAPPED)}


def _frees(tenant: Tenant, name: str) -> int:
    """Return how much of a shortage ends once a tenant is gone."""
    return 1 if name == PLACES else tenant.held.get(name, 0)


def _without(short: Mapping[str, int], gone: Iterable[Tenant]) -> dict[str, int]:
    """Return what is still short once some tenants are gone."""
    lacking = dict(short)
    for tenant in gone:
        lacking = {name: rest for name, lack in lacking.items() if (rest := lack - _frees(tenant, name)) > 0}
    return lacking


def _victims(lacking: Mapping[str, int], idle: Idle) -> list[Tenant]:
    """Choose the victims, least recently used first; none if all idle tenants do not suffice."""
    if any(lack > (idle.count if name == PLACES else idle.held.get(name, 0)) for name, lack in lacking.items()):
        return []
    chosen: list[Tenant] = []
    left = dict(lacking)
    for tenant in _by_preference(idle.tenants):
        if has_any(tenant.held, left):
            chosen.append(tenant)
            left = _without(left, (tenant,))
            if not left:
                return _needed(chosen, lacking)
    return []


def _by_preference(tenants: Iterable[Tenant]) -> Iterator[Tenant]:
    """Keep the order, but put tenants that are being reloaded last."""
    reloading = []
    for tenant in tenants:
        if tenant.reloading:
            reloading.append(tenant)
        else:
            yield tenant
    yield from reloading


def _needed(chosen: Iterable[Tenant], lacking: Mapping[str, int]) -> list[Tenant]:
    """Drop victims that are not needed because a larger one was chosen after them."""
    victims = list(chosen)
    spare = {name: sum(_frees(tenant, name) for tenant in victims) - lack for name, lack in lacking.items()}
    needed = []
    for tenant in victims:
        rest = {name: count - _frees(tenant, name) for name, count in spare.items()}
        if min(rest.values()) < 0:
            needed.append(tenant)
        else:
            spare = rest
    return needed


def _never(name: str, count: int, room: Room) -> str:
    total = room.total.get(name)
    if total is None:
        return f"needs {human_bytes(count)} of {_ledger(name)}, which this machine does not have"
    return f"needs {human_bytes(count)} of {_ledger(name)}; {human_bytes(total)} is all that this machine can give"


def _reason(
    short: Mapping[str, int],
    needs: Mapping[str, int],
    room: Room,
    leaving: Iterable[Tenant],
    holders: Iterable[Tenant],
) -> str:
    parts = [
        f"needs {human_bytes(needs[name])} of {_ledger(name)}, {human_bytes(max(0, room.available.get(name, 0)))} free"
        for name in short
        if name != PLACES
    ]
    if PLACES in short:
        parts.append("all places for models are taken")
    named = [f"{tenant.key[0]} to be freed" for tenant in leaving if has_any(tenant.held, short)]
    named += map(_holder, islice(holders, NAMED + 1))
    if named:
        parts.append(f"waiting for {', '.join(named[:NAMED])}{' and others' if len(named) > NAMED else ''}")
    else:
        parts.append("waiting for memory that others have taken")
    return ", ".join(parts)


def _holder(tenant: Tenant) -> str:
    name = tenant.key[0]
    if tenant.stuck:
        return f"{name}, which is stuck"
    if tenant.leases:
        return f"{tenant.leases} lease{'s' * (tenant.leases != 1)} on {name}"
    if tenant.loading:
        return f"{name}, which is loading"
    if tenant.reloading:
        return f"{name}, which serves until it is reloaded"
    return f"{name}, which is pinned" if tenant.pinned else f"{name}, which has just been loaded"


def _ledger(name: str) -> str:
    words = {"host": "memory", MAPPED: "memory for mapped weights", BUDGET: "the manager's max_memory_mb"}
    return words.get(name, f"memory on {name}")
