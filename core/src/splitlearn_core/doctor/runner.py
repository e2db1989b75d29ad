"""All checks, in the order in which a reader wants their findings; plugin code runs in a subprocess."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from splitlearn_core.doctor.report import Check, Finding, Level, Made, Report, findings_of, make, unusable
from splitlearn_core.environment_errors import halt
from splitlearn_core.plugins import tracing
from splitlearn_core.plugins.host import BLOCK_VARIABLE, fix_hint
from splitlearn_core.plugins.metadata import PluginEntry, version_of
from splitlearn_core.plugins.registry import registry

_HERE = f"{__package__}."

#: Seconds that plugins, a model (over the network, perhaps), and torch with transformers may take.
_PLUGIN_SECONDS, _MODEL_SECONDS, _TORCH_SECONDS = 60.0, 300.0, 300.0
_QUICK = (
    Check("packages", f"{_HERE}packages:check_packages"),
    Check("variables", f"{_HERE}variables:check_variables"),
)
_MACHINE = (
    Check("versions", f"{_HERE}versions:check_versions"),
    Check("machine", f"{_HERE}machine:check_machine"),
    Check("cache", f"{_HERE}cache:check_cache"),
)

#: In the order in which one needs the other.
_LIBRARIES = ("torch", "transformers")
_TORCH = (
    Check("devices", f"{_HERE}devices:check_devices", (), "computing on each device"),
    Check("transformers", f"{_HERE}devices:check_architectures", (), "importing the classes of the families"),
    Check("self-test", f"{_HERE}selftest:check_itself", (), "splitting the carried model"),
)


def examine(model: str | None = None, *, quick: bool = False, tell: Tell = lambda _: None) -> Report:
    """Make all checks.

    Args:
        model: A model to look at as well: a directory, a repository on the Hub, or ``bundled:MODEL_TYPE``.
        quick: Leave out what imports torch and transformers: devices, architectures, the self-test, and
            loading the model.
        tell: Told what is waited for where a check takes long.

    Returns:
        The findings. What goes wrong in a check is one of them; nothing is raised.
    """
    findings = findings_of(make(check) for check in _QUICK)
    entries = registry().entries
    # What is not installed has its finding among the versions.
    absent = () if quick else tuple(filter(_is_absent, _LIBRARIES))
    plugins = make_apart(_plugins(entries), _PLUGIN_SECONDS, Without(absent), tell)
    without = Without(absent, _lost(plugins))
    torch = [] if quick else make_apart((*_imports(absent), *_TORCH), _TORCH_SECONDS, without, tell)
    if broken := unusable(torch):
        # What is wrong with a library is not to be said of each plugin that imports it.
        plugins = make_apart(_plugins(entries), _PLUGIN_SECONDS, Without((*absent, *broken)), tell)
        without = Without((*absent, *broken), _lost(plugins))
    findings += findings_of((*plugins, *map(make, _MACHINE), *torch))
    if model is not None:
        check = Check("model", f"{_HERE}model:check_model", (model, not quick), f"looking at {model}", "report it")
        made = make_apart((check,), _MODEL_SECONDS, without, tell)
        findings += [_without_blame(finding, without.plugins) for finding in findings_of(made)]
    return Report(tuple(dict.fromkeys(findings)))


def _is_absent(library: str) -> bool:
    return version_of(library) is None and importlib.util.find_spec(library) is None


def _plugins(entries: Sequence[PluginEntry]) -> list[Check]:
    return [
        Check(
            "plugins",
            f"{_HERE}plugin:check_plugin",
            (entry.kind, entry.name, entry.distribution),
            f"looking at {entry.label} ({entry.what})",
            fix_hint(entry),
        )
        for entry in entries
    ]


def _imports(absent: Container[str]) -> list[Check]:
    return [
        Check(
            name,
            f"{_HERE}imports:check_import",
            (name,),
            f"importing {name}",
            f"pip install --force-reinstall {name}",
            library=name,
        )
        for name in _LIBRARIES
        if name not in absent
    ]


def _lost(plugins: Iterable[Made]) -> tuple[str, ...]:
    """Return the packages of plugins that ended their process, or hang: the other checks would fare no better."""
    return tuple(dict.fromkeys(str(made.check.arguments[-1]) for made in plugins if made.is_lost))


def _without_blame(finding: Finding, lost: Iterable[str]) -> Finding:
    """Say of a model whose plugin was lost that it was left out: nobody set the variable but the doctor."""
    culprit = next((name for name in lost if f"({name} " in finding.what and BLOCK_VARIABLE in finding.what), "")
    return Finding(finding.check, Level.NOTE, f"left out: {culprit} cannot be used") if culprit else finding


#: What the other process runs. It looks for modules where this one does.
_CODE = (
    "import sys; sys.path[:] = {path!r}; sys.dont_write_bytecode = {bytecode!r}; "
    "from splitlearn_core.doctor.runner import answer; answer(sys.stdin.read())"
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
            every.append(Made(lost, (_lost_process(lost, ended, said),), is_lost=True))
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


def _lost_process(check: Check, ended: str, said: str) -> Finding:
    tail = said.strip()[-_TAIL:]
    last = f"; it printed: {tail}" if tail else ""
    return Finding(check.name, Level.WRONG, f"{check.subject or 'the check'} {ended}{last}", mend=check.mend)
