"""The demonstration: every stage on the model that a plugin carries."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from splitlearn_core.errors import MissingFileError, PluginError
from splitlearn_core.loading import BUNDLED, LoadOptions, OpenModel, load_components, make_plan, open_model
from splitlearn_core.plan.split import count_layers
from splitlearn_core.plugins.mending import BLOCK_VARIABLE
from splitlearn_core.plugins.registry import ALLOW_VARIABLE, registry
from splitlearn_core.text import Generation, Sampling, generate_text, load_tokenizer
from splitlearn_core.types import Component, ProgressCallback
from splitlearn_core.verification import Verification, verify_split

log = logging.getLogger(__name__)


class Demo:
    """One bundled model, cut after its first sixth and before its last."""

    def __init__(self, name: str, model: OpenModel) -> None:
        self.name = name
        self._model = model
        layers = count_layers(model.family, model.config)
        edge = max(1, layers // 6)
        self._split_points = (edge, layers - edge)
        self.plan, self._table = make_plan(model, self._split_points, tuple(Component), "auto", fetch=lambda _: None)
        self._parts: dict[Component, Any] = {}

    def load(self, progress: ProgressCallback) -> None:
        """Load all three components."""
        self._parts = load_components(self._model, self.plan, self._table, LoadOptions(), progress)

    def generate(self, prompt: str, max_new_tokens: int, seed: int, on_text: Callable[[str], None]) -> Generation:
        """Continue a prompt; :meth:`load` comes first."""
        from splitlearn_core.pipeline import SplitCausalLM

        split = SplitCausalLM(*(self._parts[component] for component in Component))
        tokenizer = load_tokenizer(self._model)
        sampling = Sampling(temperature=0.8, top_k=40, seed=seed)
        return generate_text(split, tokenizer, prompt, max_new_tokens, sampling, on_text=on_text)

    def verify(self) -> Verification:
        """Compare with the unsplit model."""
        return verify_split(self._model, self._split_points, "auto", LoadOptions(), lambda _: None)


def open_demo() -> Demo:
    """Open the first model that an installed plugin carries.

    Raises:
        MissingFileError: No installed plugin carries one.
    """
    for model_type in registry().model_types():
        try:
            family = registry().family(model_type)
        except PluginError as error:
            log.warning("%s", error)
            continue
        if family.bundled_checkpoint:
            name = f"{BUNDLED}{model_type}"
            return Demo(name, open_model(name))
    raise MissingFileError(
        "no plugin that is installed and not blocked carries a model",
        hint=f"pip install splitlearn-gpt2, or see that {ALLOW_VARIABLE} and {BLOCK_VARIABLE} let it in",
    )
