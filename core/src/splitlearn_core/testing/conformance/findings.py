"""How a check fails: what is wrong, and which field of the family to look at."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Suspect:
    """A possible cause of a failure."""

    #: A field of ``ModelFamily``, a hook, or another place of the plugin, in its author's words.
    field: str
    #: The evidence, and what to write instead if that is known.
    why: str


class ConformanceError(AssertionError):
    """A check of the kit does not hold."""

    def __init__(self, message: str, suspects: Iterable[Suspect] = ()) -> None:
        self.message = message
        self.suspects = tuple(dict.fromkeys(suspects))
        super().__init__("\n".join([message, *(f"look at {place.field}: {place.why}" for place in self.suspects)]))


def expect(met: object, message: str, *suspects: Suspect) -> None:
    """Fail a check unless a condition holds; unlike ``assert``, ``python -O`` does not disable it.

    Raises:
        ConformanceError: The condition does not hold.
    """
    __tracebackhide__ = True
    if not met:
        raise ConformanceError(message, suspects)
