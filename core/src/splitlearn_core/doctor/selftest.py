"""A model is cut, loaded and compared with itself uncut: the shortest proof that all of it works here."""

from __future__ import annotations

import time

from splitlearn_core.doctor.findings import Finding, Level
from splitlearn_core.errors import PluginError
from splitlearn_core.family import ModelFamily
from splitlearn_core.plugins.registry import registry

_NAME = "self-test"


def check_itself() -> list[Finding]:
    """Split and compare the model that an installed plugin carries."""
    from splitlearn_core.loading import LoadOptions, import_builders, open_model
    from splitlearn_core.loading.opening import BUNDLED
    from splitlearn_core.plan.split import count_layers
    from splitlearn_core.verification import verify_split

    family = _carrier()
    if family is None:
        return [
            Finding(
                _NAME,
                Level.NOTE,
                "left out: no usable plugin carries a model",
                mend="pip install splitlearn-gpt2, which does; or prove your own: splitlearn verify MODEL --split A B",
            )
        ]
    model = open_model(BUNDLED + family.model_type)
    layers = count_layers(family, model.config)
    import_builders(family)
    started = time.perf_counter()
    points = (max(1, layers // 3), max(2, 2 * layers // 3))
    proof = verify_split(model, points, "auto", LoadOptions("cpu", "auto", None), lambda _: None)
    took = time.perf_counter() - started
    if proof.equal:
        what = f"{model.name} cut at {points[0]} and {points[1]} equals the uncut model to the last bit ({took:.1f} s)"
        return [Finding(_NAME, Level.OK, what)]
    unequal = ", ".join(name for name, equal in proof.checks.items() if not equal)
    what = f"{model.name} cut differs from the uncut model by up to {proof.max_difference:.3g} in {unequal}"
    return [Finding(_NAME, Level.WRONG, what, str(model.checkpoint.folder), "report it, with splitlearn doctor --json")]


def _carrier() -> ModelFamily | None:
    """Return a family whose plugin carries a checkpoint; a plugin that is broken has a finding already."""
    for model_type in registry().model_types():
        try:
            family = registry().family(model_type)
        except PluginError:
            continue
        if family.bundled_checkpoint:
            return family
    return None
