"""Run the conformance kit on installed plugins, which need no test file for it."""

from __future__ import annotations

import contextlib
import importlib
import io
import tempfile
from collections.abc import Callable, Generator, Iterable, Sequence
from pathlib import Path
from typing import Any

from splitlearn_core.errors import ConfigurationError, InternalError
from splitlearn_core.plugins.metadata import PluginEntry
from splitlearn_core.testing.results import EXPECTED, FAILED, PASSED, SKIPPED, Case, FamilyReport, grouped

try:
    import pytest
except ImportError as error:
    raise ConfigurationError(
        f"the conformance kit needs pytest: {error}",
        hint='pip install "pytest>=9.0" (the extra "testing" of splitlearn-core)',
    ) from error

_MODULE = "test_conformance.py"
_CLASS = """

class TestFamily{number}(FamilyConformance):
    model_type = {model_type!r}
    distribution = {distribution!r}
    quick = {quick!r}
"""


def run_kit(
    entries: Sequence[PluginEntry],
    *,
    quick: bool = False,
    expressions: Iterable[str] = (),
    on_case: Callable[[Case], None] = lambda _: None,
) -> tuple[FamilyReport, ...]:
    """Run the checks on installed families, each as if its plugin were the only one.

    Nothing is written outside a temporary folder, and the pytest configuration and plugins of the
    environment are not used.

    Args:
        entries: The families.
        quick: One dtype, one attention implementation and one cut.
        expressions: As pytest's ``-k``; a check that one of them selects is run. All by default.
        on_case: Called with each case as it ends.

    Raises:
        ConfigurationError: The kit cannot be imported with the installed libraries; an expression is
            invalid, or they select no check.
        InternalError: The tests cannot be collected, or pytest fails.
    """
    _import_kit()
    recorder = _Recorder(on_case)
    with tempfile.TemporaryDirectory(prefix="splitlearn-kit-") as folder, pytest.MonkeyPatch.context() as patch:
        module = _write(Path(folder), entries, quick=quick)
        patch.delenv("PYTEST_ADDOPTS", raising=False)
        patch.delenv("PYTEST_PLUGINS", raising=False)
        patch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
        arguments = [str(module), f"--rootdir={folder}", f"--basetemp={folder}/base", "--import-mode=importlib"]
        arguments += ["-c", f"{folder}/pytest.ini", "-p", "no:cacheprovider", "-p", "no:terminal"]
        selected = " or ".join(f"({expression})" for expression in expressions)
        stderr = io.StringIO()
        with contextlib.redirect_stderr(stderr):
            code = pytest.main([*arguments, *(["-k", selected] if selected else [])], plugins=[recorder])
    _check_exit_code(int(code), selected, stderr.getvalue(), recorder)
    return tuple(
        FamilyReport(entry.name, entry.distribution, entry.version, grouped(recorder.cases_of(number)))
        for number, entry in enumerate(entries)
    )


def _write(folder: Path, entries: Sequence[PluginEntry], *, quick: bool) -> Path:
    """Write a test file with one class per family."""
    classes = [
        _CLASS.format(number=number, model_type=entry.name, distribution=entry.distribution, quick=quick)
        for number, entry in enumerate(entries)
    ]
    module = folder / _MODULE
    module.write_text("from splitlearn_core.testing import FamilyConformance\n" + "".join(classes))
    (folder / "pytest.ini").write_text("[pytest]\n")
    return module


def _import_kit() -> None:
    """Import what the test file imports, for a clear error before pytest runs.

    Raises:
        ConfigurationError: A library is missing or broken.
    """
    try:
        # In this order: with a broken torch, transformers reports only classes that it cannot import.
        for name in ("torch", "transformers", "splitlearn_core.testing.conformance"):
            importlib.import_module(name)
    # Broken installations of torch and transformers raise any exception.
    except Exception as error:
        raise ConfigurationError(
            f"the conformance kit cannot be imported: {type(error).__name__}: {error}",
            hint="splitlearn doctor shows what is wrong with the libraries that it needs",
        ) from error


def _check_exit_code(code: int, selected: str, stderr: str, recorder: _Recorder) -> None:
    # First, because a failed collection also ends with INTERRUPTED.
    if recorder.problems or code == pytest.ExitCode.INTERNAL_ERROR:
        raise InternalError("\n".join(["the kit itself failed", *recorder.problems, stderr]), hint="please report this")
    if code == pytest.ExitCode.INTERRUPTED:
        raise KeyboardInterrupt
    if code == pytest.ExitCode.USAGE_ERROR:
        raise ConfigurationError(f"pytest does not understand -k {selected!r}: {stderr.strip()}")
    if code == pytest.ExitCode.NO_TESTS_COLLECTED:
        raise ConfigurationError(f"-k {selected!r} selects no check", hint="words of a check's name: -k logits")


class _Recorder:
    """A pytest plugin that records the outcome of every case."""

    def __init__(self, on_case: Callable[[Case], None]) -> None:
        self._on_case = on_case
        self._cases: dict[str, list[Case]] = {}
        #: Errors outside the checks.
        self.problems: list[str] = []

    def cases_of(self, number: int) -> list[Case]:
        """Return the cases of a family, by its number in the test file."""
        return self._cases.get(f"TestFamily{number}", [])

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: Any, call: Any) -> Generator[None, Any, Any]:
        report = yield
        if report.when == "call" or report.outcome != PASSED:
            case = _case_of(item, call, report)
            self._cases.setdefault(item.cls.__name__, []).append(case)
            capture = item.config.pluginmanager.getplugin("capturemanager")
            with capture.global_and_fixture_disabled():
                self._on_case(case)
        return report

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.problems.append(str(report.longrepr))

    def pytest_internalerror(self, excrepr: Any) -> None:
        self.problems.append(str(excrepr))


def _case_of(item: Any, call: Any, report: Any) -> Case:
    # Imports torch, which is not needed to report unknown names or a missing pytest.
    from splitlearn_core.testing.conformance.findings import ConformanceError

    error = call.excinfo.value if call.excinfo is not None else None
    look_at = (
        tuple((suspect.field, suspect.why) for suspect in error.suspects) if isinstance(error, ConformanceError) else ()
    )
    outcome, message = report.outcome, ""
    if hasattr(report, "wasxfail"):
        outcome, message = (EXPECTED if report.skipped else FAILED), f"expected to fail: {report.wasxfail}"
    elif report.skipped:
        outcome, message = SKIPPED, str(error)
    elif report.failed:
        # Without an error, a check has passed that was expected to fail.
        plain = f"{type(error).__name__}: {error}" if error is not None else str(report.longrepr)
        outcome, message = FAILED, error.message if isinstance(error, ConformanceError) else plain
    parameters = item.callspec.id if hasattr(item, "callspec") else ""
    return Case(
        item.cls.model_type, item.originalname, parameters, outcome, call.duration, message, look_at if message else ()
    )
