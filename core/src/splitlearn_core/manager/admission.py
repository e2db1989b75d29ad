"""Who may load now, and who must go for it: pure arithmetic over values.

A verdict is an opinion: nothing is changed by asking. Victims are named only where they suffice, so
that a refused load has cost nobody anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from splitlearn_core.manager.loaders.loadable import MAPPED
from splitlearn_core.manager.messages import Key
from splitlearn_core.types import human_bytes

#: The ledger of the manager's own limit over everything it loads.
BUDGET = "budget"
#: Holders that a reason names.
NAMED = 3


@dataclass(frozen=True, slots=True)
class Tenant:
    """A generation that memory is promised to, or that has it."""

    key: Key
    held: Mapping[str, int]
    #: Nobody has it, it is not pinned, and it has been there long enough.
    evictable: bool
    #: Its memory is on the way back already.
    leaving: bool
    last_used: float
    leases: int = 0
    pinned: bool = False
    loading: bool = False
    #: It serves until a newer generation of it is ready.
    reloading: bool = False
    #: Nobody knows when its memory comes back.
    stuck: bool = False


@dataclass(frozen=True, slots=True)
class Room:
    """What there is: ledger -> bytes that could ever be had, and bytes nobody has or is promised."""

    total: Mapping[str, int]
    available: Mapping[str, int]
    #: Models that may still be loaded; None for no limit.
    places: int | None = None


@dataclass(frozen=True, slots=True)
class Admit:
    """There is room."""


@dataclass(frozen=True, slots=True)
class Evict:
    """There is room once these are gone."""

    victims: tuple[Key, ...]


@dataclass(frozen=True, slots=True)
class Wait:
    """There will be room when somebody gives a model back."""

    reason: str
    #: What is on its way back suffices, and nobody needs to do anything.
    soon: bool = False


@dataclass(frozen=True, slots=True)
class Refuse:
    """It cannot fit, whoever goes."""

    reason: str


Verdict = Admit | Evict | Wait | Refuse


def decide(needs: Mapping[str, int], room: Room, tenants: Sequence[Tenant], *, allow_paging: bool = False) -> Verdict:
    """Say whether a load may start.

    Args:
        needs: Ledger -> bytes at the peak of the load.
        room: What there is.
        tenants: Who has it. Those who can neither go nor are on their way matter to the reason alone.
        allow_paging: Mapped weights may exceed what can be resident.
    """
    wanted = {name: count for name, count in needs.items() if count and not (allow_paging and name == MAPPED)}
    beyond = {name: count for name, count in wanted.items() if count > room.total.get(name, 0)}
    if beyond:
        return Refuse("; ".join(_never(name, count, room) for name, count in beyond.items()))
    short = {name: lack for name, count in wanted.items() if (lack := count - room.available.get(name, 0)) > 0}
    places = 0 if room.places is None else max(0, 1 - room.places)
    if not short and not places:
        return Admit()
    # What is on its way back already needs no further victim.
    leaving = [tenant for tenant in tenants if tenant.leaving]
    still_short = _lacking(short, leaving)
    still_places = max(0, places - len(leaving))
    if not still_short and not still_places:
        return Wait(_reason(short, places, needs, room, leaving), soon=True)
    victims = _victims(still_short, still_places, tenants)
    if victims is not None:
        return Evict(tuple(tenant.key for tenant in victims))
    return Wait(_reason(short, places, needs, room, tenants))


def lacks_even_without(
    needs: Mapping[str, int], total: Mapping[str, int], staying: Iterable[Mapping[str, int]], *, allow_paging: bool
) -> frozenset[str]:
    """Return the ledgers in which a load does not fit beside what stays, whatever else goes."""
    held = list(staying)
    return frozenset(
        name
        for name, count in needs.items()
        if count and not (allow_paging and name == MAPPED)
        if count > total.get(name, 0) - sum(each.get(name, 0) for each in held)
    )


def _victims(short: Mapping[str, int], places: int, tenants: Iterable[Tenant]) -> list[Tenant] | None:
    """Choose whom to evict, least recently used first; None where all of them do not suffice."""
    candidates = [tenant for tenant in tenants if tenant.evictable]
    # What is to be reloaded serves as long as the others suffice.
    candidates.sort(key=lambda tenant: (tenant.reloading, tenant.last_used, tenant.key))
    chosen: list[Tenant] = []
    left = dict(short)
    for tenant in candidates:
        if not left and len(chosen) >= places:
            break
        if places > len(chosen) or any(tenant.held.get(name) for name in left):
            chosen.append(tenant)
            left = _lacking(left, (tenant,))
    if not _suffice(chosen, short, places):
        return None
    # A large model that came last may make an earlier choice needless.
    for tenant in tuple(chosen):
        rest = [other for other in chosen if other is not tenant]
        if _suffice(rest, short, places):
            chosen = rest
    return chosen


def _suffice(chosen: Sequence[Tenant], short: Mapping[str, int], places: int) -> bool:
    return not _lacking(short, chosen) and len(chosen) >= places


def _lacking(short: Mapping[str, int], gone: Iterable[Tenant]) -> dict[str, int]:
    back = list(gone)
    lacks = {name: lack - sum(tenant.held.get(name, 0) for tenant in back) for name, lack in short.items()}
    return {name: lack for name, lack in lacks.items() if lack > 0}


def _never(name: str, count: int, room: Room) -> str:
    whole = room.total.get(name)
    if whole is None:
        return f"needs {human_bytes(count)} of {_ledger(name)}, which this machine does not have"
    return f"needs {human_bytes(count)} of {_ledger(name)}; {human_bytes(whole)} is all that can be had"


def _reason(
    short: Mapping[str, int], places: int, needs: Mapping[str, int], room: Room, tenants: Iterable[Tenant]
) -> str:
    parts = [
        f"needs {human_bytes(needs[name])} of {_ledger(name)}, {human_bytes(max(0, room.available.get(name, 0)))} free"
        for name in short
    ]
    if places:
        parts.append("all places for models are taken")
    holders = [_holder(tenant) for tenant in tenants if places or any(tenant.held.get(name) for name in short)]
    if holders:
        parts.append(f"waiting for {', '.join(holders[:NAMED])}{' and others' if len(holders) > NAMED else ''}")
    else:
        parts.append("waiting for memory that others have taken")
    return ", ".join(parts)


def _holder(tenant: Tenant) -> str:
    name = tenant.key[0]
    if tenant.leaving:
        return f"{name} to be freed"
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
