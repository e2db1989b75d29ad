"""The models that are compared: a tiny checkpoint in one variant, whole and cut, each made once."""

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
from splitlearn_core.checkpoint.names import CONFIG
from splitlearn_core.family import ModelFamily
from splitlearn_core.plugins.registry import registry
from splitlearn_core.testing.worlds import random_model, tiny_config, write_checkpoint

_T = TypeVar("_T")
#: Split points, one or more.
Cut = tuple[int, ...]
#: In how many places a model is cut where other numbers than two are compared; and before every layer.
_COUNTS = (1, 3, 4)


def configure(family: ModelFamily, values: Mapping[str, Any], overrides: Mapping[str, Any]) -> Any:
    """Make the Hugging Face configuration of a tiny model.

    Args:
        family: Its family.
        values: The author's. With a ``model_type`` among them they are a whole ``config.json``;
            without one they are added to the ordinary tiny sizes and the family's ``tiny_config``.
        overrides: What the variant changes.
    """
    config_class: Any = architecture_class(family).config_class
    if "model_type" in values:
        return config_class.from_dict({**values, **overrides})
    return tiny_config(config_class, **{**family.tiny_config, **values, **overrides})


def possible_points(family: ModelFamily, config: Any) -> list[int]:
    """Return the layers before which a model can be cut: those that its family does not declare impossible."""
    refused = family.impossible_cuts(config.to_dict())
    return [point for point in range(1, config.num_hidden_layers) if point not in refused]


def possible_cuts(family: ModelFamily, config: Any) -> list[Cut]:
    """Return all cuts in two places of a model."""
    return list(combinations(possible_points(family, config), 2))


def cuts_by_number(family: ModelFamily, config: Any) -> tuple[Cut, ...]:
    """Return cuts of a model in one place, in three and four, and before every layer, as far as it bears them."""
    points = possible_points(family, config)
    counts = sorted({count for count in (*_COUNTS, len(points)) if count <= len(points)} - {0, 2})
    return tuple(
        tuple(points[(2 * number + 1) * len(points) // (2 * count)] for number in range(count)) for count in counts
    )


def chosen_cuts(family: ModelFamily, config: Any) -> tuple[Cut, ...]:
    """Return the cuts under which everything is compared: the widest trunk, and narrow ones early and late."""
    layers = config.num_hidden_layers
    preferred = [(1, layers - 1), (layers // 3, layers // 3 + 1), (layers // 2, layers - 1)]
    possible = possible_cuts(family, config)
    return tuple(cut for cut in dict.fromkeys(preferred) if cut in possible) or tuple(possible[:3])


class Subject:
    """A tiny model of the family under test, in one variant.

    What is asked of it is made when it is first asked for, and kept: the checks ask for the same
    models and the same results of the unsplit model again and again. Making one makes nothing, so
    that whatever goes wrong is the failure of a check.
    """

    def __init__(self, model_type: str, values: Mapping[str, Any], overrides: Mapping[str, Any], folder: Path) -> None:
        """Make one.

        Args:
            model_type: The family's.
            values: The author's values of the configuration, see :func:`configure`.
            overrides: What the variant changes.
            folder: Where its checkpoint may be written.
        """
        self._model_type = model_type
        self._values = values
        #: What the variant changes of them.
        self.overrides = overrides
        self._folder = folder
        self._kept: dict[Hashable, Any] = {}

    @cached_property
    def family(self) -> ModelFamily:
        """The family under test."""
        return registry().family(self._model_type)

    @cached_property
    def _made_of(self) -> Any:
        return configure(self.family, self._values, self.overrides)

    def once(self, key: Hashable, make: Callable[..., _T], *arguments: Any) -> _T:
        """Return what was made under a key before, or make it of these arguments."""
        if key not in self._kept:
            self._kept[key] = make(*arguments)
        return cast("_T", self._kept[key])

    @cached_property
    def checkpoint(self) -> Path:
        """The folder of the checkpoint, stored in float32."""
        return write_checkpoint(self._folder, random_model(architecture_class(self.family), self._made_of))

    @cached_property
    def config(self) -> dict[str, Any]:
        """``config.json`` of the checkpoint."""
        return cast("dict[str, Any]", json.loads((self.checkpoint / CONFIG).read_text()))

    @property
    def cuts(self) -> list[Cut]:
        """All cuts in two places that the family does not declare impossible."""
        return possible_cuts(self.family, self._made_of)

    @property
    def other_cuts(self) -> tuple[Cut, ...]:
        """Cuts in one place, and in more than two."""
        return cuts_by_number(self.family, self._made_of)

    @property
    def impossible(self) -> Mapping[int, str]:
        """The cuts that it does, each with the reason."""
        return self.family.impossible_cuts(self.config)

    @property
    def layers(self) -> int:
        """The number of layers, as transformers has it."""
        return cast("int", self.whole().config.num_hidden_layers)

    @property
    def tied(self) -> bool:
        """Whether head and embedding of the unsplit model are one tensor."""
        whole = self.whole()
        return whole.get_output_embeddings().weight is whole.get_input_embeddings().weight

    @cached_property
    def middle(self) -> Cut:
        """The cut of the checks that need but one."""
        layers = self._made_of.num_hidden_layers
        possible, thirds = possible_cuts(self.family, self._made_of), (layers // 3, 2 * layers // 3)
        return thirds if thirds in possible or not possible else possible[len(possible) // 2]

    def fresh_whole(self, dtype: str = "auto", attention: str | None = None) -> Any:
        """Load the unsplit model, to be changed."""
        hf_class: Any = architecture_class(self.family)
        return hf_class.from_pretrained(self.checkpoint, dtype=dtype, attn_implementation=attention).eval()

    def whole(self, dtype: str = "auto", attention: str | None = None) -> Any:
        """Return the unsplit model, to be looked at and called."""
        return self.once(("whole", dtype, attention), self.fresh_whole, dtype, attention)

    def split(self, cut: Cut, dtype: str = "auto", attention: str | None = None) -> SplitCausalLM:
        """Return the same model, cut into components."""
        return self.once(("split", cut, dtype, attention), self.fresh_split, cut, dtype, attention)

    def fresh_split(self, cut: Cut, dtype: str = "auto", attention: str | None = None) -> SplitCausalLM:
        """Cut the model into components, to be changed."""
        parts = load_split_model(None, cut, self.checkpoint, dtype=dtype, attn_implementation=attention, strict=True)
        return SplitCausalLM(*parts)

    def weights(self) -> dict[str, torch.Tensor]:
        """Return parameters and buffers of the unsplit model by all their names."""
        whole = self.whole()
        return {**dict(whole.named_parameters(remove_duplicate=False)), **dict(whole.named_buffers())}
