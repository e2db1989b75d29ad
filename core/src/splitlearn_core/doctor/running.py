"""Make checks, here or in a process of their own; one that fails is a finding, and the others go on."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import IO, Any

from splitlearn_core.doctor.findings import Finding, Level
from splitlearn_core.plugins import tracing

#: What the other process runs. It looks for modules where this one does.
_CODE = (
    "import sys; sys.path[:] = {path!r}; sys.dont_write_bytecode = {bytecode!r}; "
    "from splitlearn_core.doctor.running import make_checks; make_checks(sys.stdin.read())"
)
_TAIL = 400


@dataclass(frozen=True, slots=True)
class Check:
    """A check that can be made anywhere."""

    #: What its findings are listed under.
    name: str
    #: The function that makes it, ``module:function``; it is imported when the check is made.
    function: str
    arguments: tuple[str, ...] = ()
    #: What it looks at, for the message where it takes its process with it.
    subject: str = ""
    #: What to do in that case.
    mend: str = ""


def make(check: Check) -> list[Finding]:
    """Make a check in this process; what it raises is its finding."""
    module, _, name = check.function.partition(":")
    try:
        function: Callable[..., list[Finding]] = getattr(importlib.import_module(module), name)
        return function(*check.arguments)
    # A doctor who faints is of no use: what was examined may be broken in any way.
    except (Exception, SystemExit) as error:  # noqa: BLE001
        last = traceback.extract_tb(error.__traceback__)[-1]
        subject = f" of {check.subject}" if check.subject else ""
        what = f"the check{subject} itself failed: {type(error).__name__}: {error}"
        return [Finding(check.name, Level.WRONG, what, f"{last.filename}:{last.lineno}", check.mend or "report it")]


def make_apart(checks: Sequence[Check], seconds: float) -> list[Finding]:
    """Make checks one after the other in another process, for they run code that is not ours.

    A check that ends its process, or does not come to an end, is a finding; the rest is made in a new process.

    Args:
        checks: The checks.
        seconds: How long each process may take.
    """
    findings: list[Finding] = []
    rest = list(checks)
    while rest:
        done, ended, said = _run(rest, seconds)
        for found in done:
            findings += found
        if len(done) < len(rest):
            findings.append(_lost(rest[len(done)], ended, said))
        rest = rest[len(done) + 1 :]
    return findings


def make_checks(request: str) -> None:
    """Be the other process: make the checks that were asked for, and answer a line for each."""
    # What plugins print goes elsewhere, so that it does not mix with the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for said in json.loads(request):
        check = Check(**{**said, "arguments": tuple(said["arguments"])})
        answers.write(json.dumps([finding.to_dict() for finding in make(check)]) + "\n")
        answers.flush()
    # Nothing that a plugin leaves for the end of its process keeps this one.
    sys.stderr.flush()
    os._exit(0)


def _run(checks: Sequence[Check], seconds: float) -> tuple[list[list[Finding]], str, str]:
    """Return what checks found as far as they were made, how the process ended, and what it printed."""
    code = _CODE.format(path=sys.path, bytecode=sys.dont_write_bytecode)
    traced = tracing.listening()
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8:backslashreplace"}
    if traced and environment.get(tracing.VARIABLE, "") in ("", "0"):
        environment[tracing.VARIABLE] = "1"
    # Files and not pipes: a process that a plugin started may hold a pipe open for ever.
    with tempfile.TemporaryFile() as request, tempfile.TemporaryFile() as answers, tempfile.TemporaryFile() as printed:
        request.write(json.dumps([asdict(check) for check in checks]).encode())
        request.seek(0)
        process = subprocess.Popen(  # noqa: S603  # this interpreter, and code of ours
            [sys.executable, "-c", code],
            stdin=request,
            stdout=answers,
            stderr=None if traced else printed,
            env=environment,
        )
        try:
            ended = _ending(process.wait(seconds))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            ended = f"did not come to an end in {seconds:.0f} seconds"
        lines = [line for line in _content(answers).split("\n")[:-1] if line]
        return [_findings(json.loads(line)) for line in lines], ended, _content(printed)


def _findings(said: list[dict[str, Any]]) -> list[Finding]:
    return [Finding.from_dict(item) for item in said]


def _content(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode("utf-8", "replace")


def _ending(code: int) -> str:
    if code < 0:
        return f"ended its process by signal {signal.Signals(-code).name}"
    return f"ended its process with exit code {code}"


def _lost(check: Check, ended: str, said: str) -> Finding:
    tail = said.strip()[-_TAIL:]
    last = f"; it printed: {tail}" if tail else ""
    return Finding(check.name, Level.WRONG, f"{check.subject or 'the check'} {ended}{last}", mend=check.mend)
