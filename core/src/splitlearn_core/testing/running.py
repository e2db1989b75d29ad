"""Run the conformance kit on an installed plugin that brings no test file."""

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
    """Run the checks on installed families, each as if its plugin were alone.

    Nothing is written outside a temporary folder, and neither pytest's configuration nor its plugins
    that happen to be around are used.

    Args:
        entries: The families.
        quick: One dtype, one attention implementation and one cut.
        expressions: As pytest's ``-k``; a check that one of them selects is run. All by default.
        on_case: Called with each case as it ends.

    Raises:
        ConfigurationError: The kit cannot be imported for the libraries there are; pytest does not
            understand an expression, or they select no check.
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
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            code = pytest.main([*arguments, *(["-k", selected] if selected else [])], plugins=[recorder])
    _check_end(int(code), selected, said.getvalue(), recorder)
    return tuple(
        FamilyReport(entry.name, entry.distribution, entry.version, grouped(recorder.cases_of(number)))
        for number, entry in enumerate(entries)
    )


def _write(folder: Path, entries: Sequence[PluginEntry], *, quick: bool) -> Path:
    """Write the test file that the plugins do not have."""
    classes = [
        _CLASS.format(number=number, model_type=entry.name, distribution=entry.distribution, quick=quick)
        for number, entry in enumerate(entries)
    ]
    module = folder / _MODULE
    module.write_text("from splitlearn_core.testing import FamilyConformance\n" + "".join(classes))
    (folder / "pytest.ini").write_text("[pytest]\n")
    return module


def _import_kit() -> None:
    """Import what the test file imports, so that what fails there is told as what it is.

    Raises:
        ConfigurationError: A library is missing or broken.
    """
    try:
        # One by one: transformers says of a broken torch only that there are classes which it cannot import.
        for name in ("torch", "transformers", "splitlearn_core.testing.conformance"):
            importlib.import_module(name)
    # torch and transformers raise what they like where they are broken.
    except Exception as error:
        raise ConfigurationError(
            f"the conformance kit cannot be imported: {type(error).__name__}: {error}",
            hint="splitlearn doctor says what is wrong with the libraries that it needs",
        ) from error


def _check_end(code: int, selected: str, said: str, recorder: _Recorder) -> None:
    # First, because a failed collection interrupts the run, as a user may do.
    if recorder.problems or code == pytest.ExitCode.INTERNAL_ERROR:
        raise InternalError("\n".join(["the kit itself failed", *recorder.problems, said]), hint="please report this")
    if code == pytest.ExitCode.INTERRUPTED:
        raise KeyboardInterrupt
    if code == pytest.ExitCode.USAGE_ERROR:
        raise ConfigurationError(f"pytest does not understand -k {selected!r}: {said.strip()}")
    if code == pytest.ExitCode.NO_TESTS_COLLECTED:
        raise ConfigurationError(f"-k {selected!r} selects no check", hint="words of a check's name: -k logits")


class _Recorder:
    """A pytest plugin that notes how every case ended."""

    def __init__(self, on_case: Callable[[Case], None]) -> None:
        self._on_case = on_case
        self._cases: dict[str, list[Case]] = {}
        #: Errors that are no check's.
        self.problems: list[str] = []

    def cases_of(self, number: int) -> list[Case]:
        """Return the cases of a family, by its place in the test file."""
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
    # Not imported above: it brings torch, and an unknown name or a missing pytest is told without.
    from splitlearn_core.testing.conformance.findings import ConformanceError

    error = call.excinfo.value if call.excinfo is not None else None
    look_at = tuple((one.field, one.why) for one in error.suspects) if isinstance(error, ConformanceError) else ()
    outcome, message = report.outcome, ""
    if hasattr(report, "wasxfail"):
        outcome, message = (EXPECTED if report.skipped else FAILED), f"expected to fail: {report.wasxfail}"
    elif report.skipped:
        outcome, message = SKIPPED, str(error)
    elif report.failed:
        outcome, message = FAILED, _words(error, report)
    parameters = item.callspec.id if hasattr(item, "callspec") else ""
    return Case(
        item.cls.model_type, item.originalname, parameters, outcome, call.duration, message, look_at if message else ()
    )


def _words(error: BaseException | None, report: Any) -> str:
    from splitlearn_core.testing.conformance.findings import ConformanceError

    if isinstance(error, ConformanceError):
        return error.message
    # No error where a check passed that was expected to fail.
    return f"{type(error).__name__}: {error}" if error is not None else str(report.longrepr)
