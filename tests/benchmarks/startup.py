"""What a command and an import cost before they do anything, above a bare interpreter."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from measuring import MeasurementError, Session, interleave, sample, start
from report import Row

NAME = "startup"
_BARE = ["-c", "pass"]
_CLAIMS = (
    ("import splitlearn_core", ["-c", "import splitlearn_core"], 0.1),
    ("splitlearn plugins", ["-m", "splitlearn_core", "plugins"], 0.25),
)
_TIMES_PER_RUN = 4


def run(session: Session) -> None:
    measures = {"bare": _measurement(_BARE), **{what: _measurement(command) for what, command, _ in _CLAIMS}}
    answers, failures = interleave(session.runs * _TIMES_PER_RUN, measures, discarded=2)
    for what, _, seconds in _CLAIMS:
        if what in failures:
            session.add(Row(NAME, what, note=f"{what}: {failures[what]}"))
            continue
        ours, bare = (sample(answers[name], "seconds", "ms", 1000) for name in (what, "bare"))
        above = ours.median - bare.median
        target = f"within {seconds * 1000:.0f} ms"
        note = f"{above:.0f} ms above a bare interpreter"
        session.add(Row(NAME, what, ours, "bare interpreter", bare, None, target, above <= seconds * 1000, note))


def _measurement(command: list[str]) -> Callable[[], dict[str, Any]]:
    def measure() -> dict[str, Any]:
        begin = time.monotonic()
        process = start(command)
        _, errors = process.communicate()
        seconds = time.monotonic() - begin
        if process.returncode:
            raise MeasurementError(errors.strip().splitlines()[-1])
        return {"seconds": seconds}

    return measure
