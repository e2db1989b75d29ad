"""Checks in a process of their own, for they run code that is not ours."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from splitlearn_core.causes import halt
from splitlearn_core.doctor.findings import Finding, Level
from splitlearn_core.doctor.running import Check, Made, make, unusable
from splitlearn_core.plugins import tracing
from splitlearn_core.plugins.mending import BLOCK_VARIABLE

#: What the other process runs. It looks for modules where this one does.
_CODE = (
    "import sys; sys.path[:] = {path!r}; sys.dont_write_bytecode = {bytecode!r}; "
    "from splitlearn_core.doctor.apart import answer; answer(sys.stdin.read())"
)
_TAIL = 400
#: Seconds that a check may take before it is told who is waited for.
_PATIENCE = 5.0

#: Told what a check does that takes long.
Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Without:
    """What checks in another process have to do without, for it is known to be broken."""

    libraries: tuple[str, ...] = ()
    #: Names of distributions.
    plugins: tuple[str, ...] = ()


_NOTHING = Without()


def make_apart(
    checks: Sequence[Check], seconds: float, without: Without = _NOTHING, tell: Tell = lambda _: None
) -> list[Made]:
    """Make checks one after the other in another process.

    A check that ends its process, or does not come to an end, is a finding; the rest is made in a new process.

    Args:
        checks: The checks.
        seconds: How long each process may take.
        without: What is broken.
        tell: Told what is waited for, once for each check that takes long.
    """
    every: list[Made] = []
    rest = list(checks)
    while rest:
        done, ended, said = _run(rest, seconds, without, tell)
        every += [Made(check, tuple(found)) for check, found in zip(rest, done, strict=False)]
        if len(done) < len(rest):
            lost = rest[len(done)]
            every.append(Made(lost, (_lost(lost, ended, said),), is_lost=True))
        without = replace(without, libraries=(*without.libraries, *unusable(every)))
        rest = rest[len(done) + 1 :]
    return every


def answer(request: str) -> None:
    """Be the other process: make the checks that were asked for, and write a line for each."""
    # What plugins print goes elsewhere, so that it does not mix with the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    asked = json.loads(request)
    for library in asked["without"]:
        halt(library)
    for said in asked["checks"]:
        made = make(Check(**{**said, "arguments": tuple(said["arguments"])}))
        answers.write(json.dumps([finding.to_dict() for finding in made.findings]) + "\n")
        answers.flush()
        for library in unusable([made]):
            halt(library)
    # Nothing that a plugin leaves for the end of its process keeps this one.
    sys.stderr.flush()
    os._exit(0)


def _run(checks: Sequence[Check], seconds: float, without: Without, tell: Tell) -> tuple[list[list[Finding]], str, str]:
    """Return what checks found as far as they were made, how the process ended, and what it printed."""
    code = _CODE.format(path=sys.path, bytecode=sys.dont_write_bytecode)
    request = {"checks": [asdict(check) for check in checks], "without": without.libraries}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        asking, answers, printed = (Path(name, file) for file in ("asking", "answers", "printed"))
        asking.write_text(json.dumps(request), "utf-8")
        # Files and not pipes: a process that a plugin started may hold a pipe open for ever.
        with asking.open("rb") as stdin, answers.open("wb") as stdout, printed.open("wb") as stderr:
            process = subprocess.Popen(  # noqa: S603  # this interpreter, and code of ours
                [sys.executable, "-c", code],
                stdin=stdin,
                stdout=stdout,
                stderr=None if tracing.listening() else stderr,
                env=_environment(without),
            )
            subjects = [*(check.subject for check in checks), "ending the checks"]
            ended = _wait(process, seconds, lambda: len(_lines(answers)), lambda done: tell(subjects[done]))
        found = [[Finding.from_dict(item) for item in json.loads(line)] for line in _lines(answers)]
        return found, ended, _text(printed)


def _wait(process: subprocess.Popen[Any], seconds: float, count: Callable[[], int], tell: Callable[[int], None]) -> str:
    """Wait for a process, and return how it ended.

    Args:
        process: The process; it is ended when its time is over.
        seconds: How long it may take.
        count: Returns how many checks are made.
        tell: Told of a check, by its number, that has not been made between two looks at it.
    """
    deadline = time.monotonic() + seconds
    seen, told = 0, -1
    while (left := deadline - time.monotonic()) > 0:
        try:
            return _ending(process.wait(min(_PATIENCE, left)))
        except subprocess.TimeoutExpired:
            done = count()
        if done == seen != told:
            tell(done)
            told = done
        seen = done
    process.kill()
    process.wait()
    return f"did not come to an end in {seconds:.0f} seconds"


def _environment(without: Without) -> dict[str, str]:
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8:backslashreplace"}
    if tracing.listening() and environment.get(tracing.VARIABLE, "") in ("", "0"):
        environment[tracing.VARIABLE] = "1"
    if without.plugins:
        environment[BLOCK_VARIABLE] = ",".join((environment.get(BLOCK_VARIABLE, ""), *without.plugins))
    return environment


def _lines(answers: Path) -> list[str]:
    """Return the answers that are there as a whole."""
    return [line for line in _text(answers).split("\n")[:-1] if line]


def _text(path: Path) -> str:
    return path.read_bytes().decode("utf-8", "replace")


def _ending(code: int) -> str:
    if code < 0:
        return f"ended its process by signal {signal.Signals(-code).name}"
    return f"ended its process with exit code {code}"


def _lost(check: Check, ended: str, said: str) -> Finding:
    tail = said.strip()[-_TAIL:]
    last = f"; it printed: {tail}" if tail else ""
    return Finding(check.name, Level.WRONG, f"{check.subject or 'the check'} {ended}{last}", mend=check.mend)
