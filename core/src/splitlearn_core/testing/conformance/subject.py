"""The models under test: a tiny checkpoint of a variant, unsplit and split, each created once."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Mapping
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING

from splitlearn_core import SplitCausalLM, load_split_model
from splitlearn_core.build.configuration import (
    architecture_class,
    config_class_of,
    decoder_config,
    with_decoder_values,
)
from splitlearn_core.build.pruning import leave_out_others
from splitlearn_core.checkpoint.files import CONFIG, SINGLE
from splitlearn_core.family import ModelFamily
from splitlearn_core.loading.planning import key_targets
from splitlearn_core.plan.keys import KeyTarget
from splitlearn_core.plan.split_points import impossible_cuts
from splitlearn_core.plugins.registry import registry
from splitlearn_core.testing.worlds import other_sizes, random_model, tiny_config, write_checkpoint

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
            they are added to the ordinary tiny sizes and the family's ``tiny_config``. In a composite model, they are
            the decoder's; values of another model are a mapping, by the name of its configuration.
        overrides: The values that the variant changes.
    """
    config_class: Any = config_class_of(family) if family.text_config else architecture_class(family).config_class
    name = family.text_config if family.text_config in config_class.sub_configs else ""
    if "model_type" in values:
        return config_class.from_dict(with_decoder_values(values, name, overrides))
    if not name:
        # Also of a class of the decoder alone.
        own = {**family.tiny_config.get(family.text_config, family.tiny_config), **values, **overrides}
        return tiny_config(config_class, **{key: value for key, value in own.items() if key != "model_type"})
    known = config_class()
    usual = {**other_sizes(known, name), name: {}}
    given = with_decoder_values(with_decoder_values(usual, name, family.tiny_config), name, {**values, **overrides})
    stated = given[name].get("model_type")
    decoder_class = CONFIG_MAPPING[stated] if stated in CONFIG_MAPPING else type(getattr(known, name))
    return config_class(**{**given, name: tiny_config(decoder_class, **given[name]).to_dict()})


def possible_points(family: ModelFamily, config: Any) -> list[int]:
    """Return the split points of a model that its family does not declare impossible."""
    refused = impossible_cuts(family, config.to_dict())
    return [point for point in range(1, decoder_config(family, config).num_hidden_layers) if point not in refused]


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
    layers = decoder_config(family, config).num_hidden_layers
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
        folder = write_checkpoint(self._folder, random_model(architecture_class(self.family), self._config))
        path, name = folder / CONFIG, self.family.text_config
        config = json.loads(path.read_text())
        if name and name not in config:
            # Of a class of the decoder alone; files are those of the whole model.
            path.write_text(json.dumps({"model_type": self._model_type, "dtype": config["dtype"], name: config}))
        return folder

    @cached_property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors of the checkpoint, by key; of a composite model, those of the decoder."""
        stored: dict[str, torch.Tensor] = load_file(self.checkpoint / SINGLE)
        if not self.family.text_config:
            return stored
        return {key: tensor for key, tensor in stored.items() if self.targets[key] is not None}

    @cached_property
    def targets(self) -> Mapping[str, KeyTarget]:
        """Where each key of the checkpoint goes."""
        return key_targets(self.family, self.config, sorted(load_file(self.checkpoint / SINGLE)))

    @property
    def prefix(self) -> str:
        """What the keys of some checkpoints lack: the name of the base module, or of the one around several models."""
        base = self.family.base
        return f"{base.partition('.')[0] if self.family.text_config else base}."

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
        return cast("int", decoder_config(self.family, self.whole().config).num_hidden_layers)

    @property
    def tied(self) -> bool:
        """Whether head and embedding of the unsplit model are one tensor."""
        whole = self.whole()
        return whole.get_output_embeddings().weight is whole.get_input_embeddings().weight

    @cached_property
    def middle(self) -> Cut:
        """The cut for checks that need only one."""
        layers = decoder_config(self.family, self._config).num_hidden_layers
        possible, thirds = possible_cuts(self.family, self._config), (layers // 3, 2 * layers // 3)
        return thirds if thirds in possible or not possible else possible[len(possible) // 2]

    def fresh_whole(self, dtype: str = "auto", attention: str | None = None) -> Any:
        """Load the unsplit model; the caller may change it."""
        return self.whole_of(self.checkpoint, dtype, attention)

    def whole_of(self, folder: Path, dtype: str = "auto", attention: str | None = None) -> Any:
        """Load the unsplit model of a checkpoint; of a composite model, what text passes through."""
        hf_class: Any = architecture_class(self.family)
        model = hf_class.from_pretrained(folder, dtype=dtype, attn_implementation=attention).eval()
        if self.family.text_config:
            leave_out_others(model, self.family)
        return model

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
