"""How a check fails: what is wrong, and which field of the family to look at."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Suspect:
    """Where the cause of a failure may lie."""

    #: A field of ``ModelFamily``, a hook, or another place of the plugin, in its author's words.
    field: str
    #: What points there, and what to write instead where that is known.
    why: str


class ConformanceError(AssertionError):
    """A check of the kit does not hold."""

    def __init__(self, message: str, suspects: Iterable[Suspect] = ()) -> None:
        self.message = message
        self.suspects = tuple(dict.fromkeys(suspects))
        super().__init__("\n".join([message, *(f"look at {one.field}: {one.why}" for one in self.suspects)]))


def expect(met: object, message: str, *suspects: Suspect) -> None:
    """Fail a check unless something is so; an assertion that no switch of the interpreter turns off.

    Raises:
        ConformanceError: It is not so.
    """
    __tracebackhide__ = True
    if not met:
        raise ConformanceError(message, suspects)
