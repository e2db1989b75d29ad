"""All checks, in the order of the report; plugins, torch and models are examined in subprocesses."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from splitlearn_core.child_process import command_for, ending, reserve_stdout
from splitlearn_core.doctor.installation import check_import, check_packages, check_versions
from splitlearn_core.doctor.load_checks import check_model, check_plugin, check_self
from splitlearn_core.doctor.report import Check, Finding, Level, Report, block_import
from splitlearn_core.doctor.system import (
    check_architectures,
    check_cache,
    check_devices,
    check_machine,
    check_variables,
)
from splitlearn_core.plugins.host import BLOCK_VARIABLE, TRACE_VARIABLE, fix_hint, is_traced
from splitlearn_core.plugins.metadata import version_of
from splitlearn_core.plugins.registry import registry

#: Time limits in seconds for a plugin, for a model (perhaps over the network), and for torch with transformers.
_PLUGIN_SECONDS, _MODEL_SECONDS, _TORCH_SECONDS = 60.0, 300.0, 300.0
#: Seconds after which a running check is reported; each later one is, too.
_REPORT_AFTER = 5.0
#: Characters of the output of a process that ended early.
_TAIL = 400

#: Each needs the libraries before it.
_LIBRARIES = ("torch", "transformers")
_TORCH = (
    Check("devices", check_devices, subject="computing on each device"),
    Check("transformers", check_architectures, subject="importing the classes of the families"),
    Check("self-test", check_self, subject="splitting the bundled model"),
)

#: Called with the subject of a check that takes long.
ReportWaiting = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Outcome:
    """A check and its findings."""

    check: Check
    findings: tuple[Finding, ...]
    #: Whether it ended its process, or exceeded the time limit.
    is_lost: bool = False


def examine(model: str | None = None, *, quick: bool = False, report: ReportWaiting = lambda _: None) -> Report:
    """Run all checks.

    Args:
        model: A model to examine as well: a directory, a repository on the Hub, or ``bundled:MODEL_TYPE``.
        quick: Skip checks that import torch and transformers: devices, architectures, the self-test, and
            loading the model.
        report: Called with the subject of a check that takes long.

    Returns:
        The findings. An exception in a check is one of them; none is raised.
    """
    findings = [*Check("packages", check_packages).run(), *Check("variables", check_variables).run()]
    # Their findings are among the versions.
    missing = () if quick else tuple(filter(_is_missing, _LIBRARIES))
    plugins = _check_plugins(missing, report)
    torch: list[Outcome] = []
    if not quick:
        imports = [
            Check(name, check_import, (name,), f"importing {name}", f"pip install --force-reinstall {name}", name)
            for name in _LIBRARIES
            if name not in missing
        ]
        torch = run_in_subprocess((*imports, *_TORCH), _TORCH_SECONDS, missing, _lost_plugins(plugins), report)
    if broken := _unusable(torch):
        # So that a broken library is one finding instead of one for each plugin that imports it.
        missing += broken
        plugins = _check_plugins(missing, report)
    findings += (finding for outcome in plugins for finding in outcome.findings)
    for name, function in (("versions", check_versions), ("machine", check_machine), ("cache", check_cache)):
        findings += Check(name, function).run()
    findings += (finding for outcome in torch for finding in outcome.findings)
    if model is not None:
        check = Check("model", check_model, (model, not quick), f"looking at {model}")
        lost = _lost_plugins(plugins)
        (outcome,) = run_in_subprocess([check], _MODEL_SECONDS, missing, lost, report)
        for finding in outcome.findings:
            # If the model's plugin is blocked, it is so only because it was lost above.
            culprit = next((p for p in lost if f"({p} " in finding.what and BLOCK_VARIABLE in finding.what), "")
            left_out = Finding("model", Level.NOTE, f"left out: {culprit} cannot be used")
            findings.append(left_out if culprit else finding)
    return Report(tuple(dict.fromkeys(findings)))


def _is_missing(library: str) -> bool:
    return version_of(library) is None and importlib.util.find_spec(library) is None


def _check_plugins(missing: Sequence[str], report: ReportWaiting) -> list[Outcome]:
    """Examine each plugin in its own process: the imports of one would hide those of the next."""
    outcomes: list[Outcome] = []
    for entry in registry().entries:
        arguments = (entry.kind, entry.name, entry.distribution)
        check = Check("plugins", check_plugin, arguments, f"looking at {entry.label} ({entry.what})", fix_hint(entry))
        outcomes += run_in_subprocess([check], _PLUGIN_SECONDS, missing, report=report)
    return outcomes


def _lost_plugins(plugins: Sequence[Outcome]) -> tuple[str, ...]:
    """Return the packages of plugins that ended their process or hang, as they would in other checks."""
    return tuple(dict.fromkeys(str(outcome.check.arguments[-1]) for outcome in plugins if outcome.is_lost))


def _unusable(outcomes: Sequence[Outcome]) -> tuple[str, ...]:
    """Return the libraries that could not be imported."""
    failed = [outcome for outcome in outcomes if any(finding.level is Level.WRONG for finding in outcome.findings)]
    return tuple(outcome.check.library for outcome in failed if outcome.check.library)


def run_in_subprocess(
    checks: Sequence[Check],
    seconds: float,
    missing: Sequence[str] = (),
    blocked_plugins: Sequence[str] = (),
    report: ReportWaiting = lambda _: None,
) -> list[Outcome]:
    """Run checks one after the other in another process.

    A check that ends its process, or exceeds the time limit, is a finding; the rest runs in a new process.

    Args:
        checks: The checks.
        seconds: How long each process may take.
        missing: Libraries that cannot be imported.
        blocked_plugins: Distributions of plugins that cannot be used.
        report: Called with the subject of a check that takes long.
    """
    outcomes: list[Outcome] = []
    while remaining := checks[len(outcomes) :]:
        libraries = (*missing, *_unusable(outcomes))
        findings, how_it_ended, printed = _run(remaining, seconds, libraries, blocked_plugins, report)
        outcomes += [Outcome(check, tuple(each)) for check, each in zip(remaining, findings, strict=False)]
        if len(findings) < len(remaining):
            lost = remaining[len(findings)]
            tail = printed.strip()[-_TAIL:]
            what = f"{lost.subject} {how_it_ended}{tail and f'; it printed: {tail}'}"
            outcomes.append(Outcome(lost, (Finding(lost.name, Level.WRONG, what, fix=lost.fix),), is_lost=True))
    return outcomes


def _run(
    checks: Sequence[Check],
    seconds: float,
    missing: Sequence[str],
    blocked_plugins: Sequence[str],
    report: ReportWaiting,
) -> tuple[list[list[Finding]], str, str]:
    """Return the findings of the checks that returned, how the process ended, and what it printed."""
    request = [
        [c.function.__module__, c.function.__qualname__, c.name, c.arguments, c.subject, c.fix, c.library]
        for c in checks
    ]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8:backslashreplace"}
    if is_traced() and environment.get(TRACE_VARIABLE, "") in ("", "0"):
        environment[TRACE_VARIABLE] = "1"
    if blocked_plugins:
        environment[BLOCK_VARIABLE] = ",".join((environment.get(BLOCK_VARIABLE, ""), *blocked_plugins))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        answers, printed = Path(folder, "answers"), Path(folder, "printed")
        # Not pipes, which a process that a plugin started may keep open for ever.
        with answers.open("wb") as stdout, printed.open("wb") as stderr:
            process = subprocess.Popen(  # noqa: S603  # this interpreter, and a function of ours
                command_for(run_checks, json.dumps(request), *missing),
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=None if is_traced() else stderr,
                env=environment,
            )
            subjects = [*(check.subject for check in checks), "ending the checks"]
            how_it_ended = _wait(process, seconds, lambda: subjects[answers.read_bytes().count(b"\n")], report)
        lines = answers.read_text("utf-8", "replace").split("\n")[:-1]
        findings = [[Finding(**{**f, "level": Level(f["level"])}) for f in json.loads(line)] for line in lines]
        return findings, how_it_ended, printed.read_text("utf-8", "replace")


def _wait(process: subprocess.Popen[bytes], seconds: float, subject: Callable[[], str], report: ReportWaiting) -> str:
    """Wait for a process, kill it after a time limit, and return how it ended."""
    deadline = time.monotonic() + seconds
    reported = ""
    while (left := deadline - time.monotonic()) > 0:
        try:
            return ending(process.wait(min(_REPORT_AFTER, left)))
        except subprocess.TimeoutExpired:
            if (waiting_for := subject()) != reported:
                report(waiting_for)
                reported = waiting_for
    process.kill()
    process.wait()
    return f"did not finish within {seconds:.0f} seconds"


def run_checks(request: str, *missing: str) -> None:
    """Run checks in this process, and print the findings of each as a line of JSON."""
    answers = reserve_stdout()
    for library in missing:
        block_import(library)
    for module, function, name, arguments, *fields in json.loads(request):
        check = Check(name, getattr(importlib.import_module(module), function), tuple(arguments), *fields)
        findings = check.run()
        answers.write(json.dumps([finding.to_dict() for finding in findings]) + "\n")
        answers.flush()
        for library in _unusable([Outcome(check, tuple(findings))]):
            block_import(library)
    # Without waiting for threads and exit handlers of plugins.
    sys.stderr.flush()
    os._exit(0)
