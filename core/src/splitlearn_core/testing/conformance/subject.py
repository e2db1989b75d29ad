"""The models under test: a tiny checkpoint of a variant, unsplit and split, each created once."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Mapping
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

from splitlearn_core import SplitCausalLM, load_split_model
from splitlearn_core.build.configuration import architecture_class
from splitlearn_core.checkpoint.files import CONFIG
from splitlearn_core.family import ModelFamily
from splitlearn_core.plan.split_points import impossible_cuts
from splitlearn_core.plugins.registry import registry
from splitlearn_core.testing.worlds import random_model, tiny_config, write_checkpoint

_T = TypeVar("_T")
#: Split points, one or more.
Cut = tuple[int, ...]
#: Numbers of split points to compare in addition to two, and to a cut before every layer.
_COUNTS = (1, 3, 4)


def configure(family: ModelFamily, values: Mapping[str, Any], overrides: Mapping[str, Any]) -> Any:
    """Make the Hugging Face configuration of a tiny model.

    Args:
        family: Its family.
        values: The author's values. With a ``model_type`` they are a whole ``config.json``; without one
            they are added to the ordinary tiny sizes and the family's ``tiny_config``.
        overrides: The values that the variant changes.
    """
    config_class: Any = architecture_class(family).config_class
    if "model_type" in values:
        return config_class.from_dict({**values, **overrides})
    return tiny_config(config_class, **{**family.tiny_config, **values, **overrides})


def possible_points(family: ModelFamily, config: Any) -> list[int]:
    """Return the split points of a model that its family does not declare impossible."""
    refused = impossible_cuts(family, config.to_dict())
    return [point for point in range(1, config.num_hidden_layers) if point not in refused]


def possible_cuts(family: ModelFamily, config: Any) -> list[Cut]:
    """Return all possible cuts of a model with two split points."""
    return list(combinations(possible_points(family, config), 2))


def cuts_by_number(family: ModelFamily, config: Any) -> tuple[Cut, ...]:
    """Return cuts with one, three, four and all split points, as far as the model allows them."""
    points = possible_points(family, config)
    counts = sorted({count for count in (*_COUNTS, len(points)) if count <= len(points)} - {0, 2})
    return tuple(
        tuple(points[(2 * number + 1) * len(points) // (2 * count)] for number in range(count)) for count in counts
    )


def chosen_cuts(family: ModelFamily, config: Any) -> tuple[Cut, ...]:
    """Return the cuts for all comparisons: the widest trunk, and narrow ones early and late."""
    layers = config.num_hidden_layers
    preferred = [(1, layers - 1), (layers // 3, layers // 3 + 1), (layers // 2, layers - 1)]
    possible = possible_cuts(family, config)
    return tuple(cut for cut in dict.fromkeys(preferred) if cut in possible) or tuple(possible[:3])


class Subject:
    """A tiny model of the family under test, in one variant.

    Models and results are created on first use and cached, because many checks need the same ones. The
    constructor creates nothing, so that every error is the failure of a check.
    """

    def __init__(self, model_type: str, values: Mapping[str, Any], overrides: Mapping[str, Any], folder: Path) -> None:
        """Describe the model, without creating it.

        Args:
            model_type: The model type of the family.
            values: The author's values of the configuration, see :func:`configure`.
            overrides: The values that the variant changes.
            folder: The folder for its checkpoint.
        """
        self._model_type = model_type
        self._values = values
        #: The values that the variant changes.
        self.overrides = overrides
        self._folder = folder
        self._cached: dict[Hashable, Any] = {}

    @cached_property
    def family(self) -> ModelFamily:
        """The family under test."""
        return registry().family(self._model_type)

    @cached_property
    def _config(self) -> Any:
        return configure(self.family, self._values, self.overrides)

    def once(self, key: Hashable, make: Callable[..., _T], *arguments: Any) -> _T:
        """Return the cached value of a key, or create it with these arguments."""
        if key not in self._cached:
            self._cached[key] = make(*arguments)
        return cast("_T", self._cached[key])

    @cached_property
    def checkpoint(self) -> Path:
        """The folder of the checkpoint, stored in float32."""
        return write_checkpoint(self._folder, random_model(architecture_class(self.family), self._config))

    @cached_property
    def config(self) -> dict[str, Any]:
        """``config.json`` of the checkpoint."""
        return cast("dict[str, Any]", json.loads((self.checkpoint / CONFIG).read_text()))

    @property
    def cuts(self) -> list[Cut]:
        """All cuts with two split points that the family does not declare impossible."""
        return possible_cuts(self.family, self._config)

    @property
    def other_cuts(self) -> tuple[Cut, ...]:
        """Cuts with one split point, and with more than two."""
        return cuts_by_number(self.family, self._config)

    @property
    def impossible(self) -> Mapping[int, str]:
        """The split points that the family declares impossible, each with the reason."""
        return impossible_cuts(self.family, self.config)

    @property
    def layers(self) -> int:
        """The number of layers, according to transformers."""
        return cast("int", self.whole().config.num_hidden_layers)

    @property
    def tied(self) -> bool:
        """Whether head and embedding of the unsplit model are one tensor."""
        whole = self.whole()
        return whole.get_output_embeddings().weight is whole.get_input_embeddings().weight

    @cached_property
    def middle(self) -> Cut:
        """The cut for checks that need only one."""
        layers = self._config.num_hidden_layers
        possible, thirds = possible_cuts(self.family, self._config), (layers // 3, 2 * layers // 3)
        return thirds if thirds in possible or not possible else possible[len(possible) // 2]

    def fresh_whole(self, dtype: str = "auto", attention: str | None = None) -> Any:
        """Load the unsplit model; the caller may change it."""
        hf_class: Any = architecture_class(self.family)
        return hf_class.from_pretrained(self.checkpoint, dtype=dtype, attn_implementation=attention).eval()

    def whole(self, dtype: str = "auto", attention: str | None = None) -> Any:
        """Return the cached unsplit model, which must not be changed."""
        return self.once(("whole", dtype, attention), self.fresh_whole, dtype, attention)

    def split(self, cut: Cut, dtype: str = "auto", attention: str | None = None) -> SplitCausalLM:
        """Return the cached split model, which must not be changed."""
        return self.once(("split", cut, dtype, attention), self.fresh_split, cut, dtype, attention)

    def fresh_split(self, cut: Cut, dtype: str = "auto", attention: str | None = None) -> SplitCausalLM:
        """Load the split model; the caller may change it."""
        parts = load_split_model(None, cut, self.checkpoint, dtype=dtype, attn_implementation=attention, strict=True)
        return SplitCausalLM(*parts)

    def weights(self) -> dict[str, torch.Tensor]:
        """Return the parameters and buffers of the unsplit model, under each of their names."""
        whole = self.whole()
        return {**dict(whole.named_parameters(remove_duplicate=False)), **dict(whole.named_buffers())}
