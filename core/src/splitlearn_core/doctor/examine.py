"""All checks, in the order in which a reader wants their findings."""

from __future__ import annotations

import importlib.util
from collections.abc import Container, Iterable, Sequence

from splitlearn_core.doctor.apart import Tell, Without, make_apart
from splitlearn_core.doctor.findings import Finding, Level, Report
from splitlearn_core.doctor.running import Check, Made, findings_of, make, unusable
from splitlearn_core.plugins.mending import BLOCK_VARIABLE, mend_for
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
            mend_for(entry),
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
