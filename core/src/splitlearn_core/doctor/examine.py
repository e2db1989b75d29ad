"""All checks, in the order in which a reader wants their findings."""

from __future__ import annotations

from splitlearn_core.doctor.findings import Report
from splitlearn_core.doctor.running import Check, make, make_apart
from splitlearn_core.plugins.mending import mend_for
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
_TORCH = (
    Check("devices", f"{_HERE}devices:check_devices", (), "importing torch", "pip install --force-reinstall torch"),
    Check(
        "transformers",
        f"{_HERE}devices:check_architectures",
        (),
        "importing transformers",
        "pip install --upgrade transformers",
    ),
    Check("self-test", f"{_HERE}selftest:check_itself", (), "splitting the carried model", "report it"),
)


def examine(model: str | None = None, *, quick: bool = False) -> Report:
    """Make all checks.

    Args:
        model: A model to look at as well: a directory, a repository on the Hub, or ``bundled:MODEL_TYPE``.
        quick: Leave out what imports torch and transformers: devices, architectures and the self-test.

    Returns:
        The findings. What goes wrong in a check is one of them; nothing is raised.
    """
    findings = [finding for check in _QUICK for finding in make(check)]
    findings += make_apart(_plugins(), _PLUGIN_SECONDS)
    findings += [finding for check in _MACHINE for finding in make(check)]
    if not quick:
        findings += make_apart(_TORCH, _TORCH_SECONDS)
    if model is not None:
        check = Check("model", f"{_HERE}model:check_model", (model,), f"looking at {model}", "report it")
        findings += make_apart((check,), _MODEL_SECONDS)
    return Report(tuple(dict.fromkeys(findings)))


def _plugins() -> list[Check]:
    return [
        Check(
            "plugins",
            f"{_HERE}plugin:check_plugin",
            (entry.kind, entry.name, entry.distribution),
            f"{entry.label} ({entry.what})",
            mend_for(entry),
        )
        for entry in registry().entries
    ]
