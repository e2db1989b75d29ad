"""The user's description of a cut."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from splitlearn_core.cut_stage import GRADIENTS, STATES, CutStage
from splitlearn_core.errors import ConfigurationError
from splitlearn_core.plugins.registry import registry
from splitlearn_core.wire_formats import ENCODINGS

#: One value, or one for hidden states and one for gradients.
Bound = float | tuple[float | None, float | None] | None
Format = str | tuple[str | None, str | None] | None


@dataclass(frozen=True, slots=True)
class Stages:
    """The treatment of hidden states, or of gradients, in this order."""

    clip: float | None = None
    noise: float | None = None
    others: tuple[CutStage, ...] = ()
    quantize: str | None = None


@dataclass(frozen=True)
class Cut:
    """The treatment of what leaves the data owner at one cut: clip, add noise, apply other stages, quantise.

    Hidden states leave the owner at a cut before a component of the server, gradients at a cut
    after such a component: at the first cut hidden states, at the last one gradients, at one between two trunks
    both. If there is only one cut, both are treated. Each argument is one value for both, or a pair ``(for hidden
    states, for gradients)``. Without arguments nothing is changed.

    Args:
        clip: The largest Euclidean norm of one sequence, all positions together; anything larger is scaled down.
        noise: The standard deviation of Gaussian noise that is added to every value. The noise of clipped values is
            usually given as a multiple of ``clip``.
        quantize: ``"int8"`` or ``"int4"``: round to what this encoding of ``connect(wire=...)`` can represent.
        stages: Further stages of plugins, by name or as objects, between noise and quantisation.
        seed: For tests: makes the noise reproducible. By default it comes from the system's entropy.

    Raises:
        ConfigurationError: A value is invalid, or no plugin has a stage of that name.
    """

    clip: Bound = None
    noise: Bound = None
    quantize: Format = None
    stages: tuple[str | CutStage, ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        for name in ("clip", "noise"):
            for value in _pair(getattr(self, name), name):
                if value is not None and not _is_positive(value):
                    raise ConfigurationError(
                        f"{name}={value!r} at a cut is not a positive number",
                        hint=f"leave {name} out for none; a pair is (for hidden states, for gradients)",
                    )
        for value in _pair(self.quantize, "quantize"):
            if value is not None and value not in ENCODINGS:
                raise ConfigurationError(
                    f"quantize={value!r} at a cut is unknown", hint=f"it may be {' or '.join(map(repr, ENCODINGS))}"
                )
        if self.seed is not None and type(self.seed) is not int:
            raise ConfigurationError(f"seed={self.seed!r} is not a whole number")
        if isinstance(self.stages, str) or not all(isinstance(stage, str | CutStage) for stage in self.stages):
            raise ConfigurationError(
                f"stages={self.stages!r} are not names or stages",
                hint="give a tuple of them: stages=('NAME',); splitlearn plugins shows what is installed",
            )
        object.__setattr__(self, "stages", tuple(self.stages))
        self.of(STATES)

    def of(self, what: str) -> Stages:
        """Return the stages for hidden states or for gradients."""
        index = (STATES, GRADIENTS).index(what)
        clip, noise, quantize = (_pair(getattr(self, name), name)[index] for name in ("clip", "noise", "quantize"))
        others = tuple(registry().cut_stage(stage) if isinstance(stage, str) else stage for stage in self.stages)
        return Stages(clip, noise, others, quantize)


def _pair(value: Any, name: str) -> tuple[Any, Any]:
    if not isinstance(value, tuple | list):
        return value, value
    if len(value) != 2:  # noqa: PLR2004  # a pair
        raise ConfigurationError(f"{name}={value!r}: a pair is (for hidden states, for gradients)")
    return value[0], value[1]


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0
