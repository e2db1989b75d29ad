"""Neutral modules that stand in for the modules of other components, and the names by which a family finds those."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from splitlearn_core.build.configuration import decoder_config
from splitlearn_core.errors import BrokenPluginError
from splitlearn_core.family import ModelFamily
from splitlearn_core.types import LayerRange

#: The hidden states of the forward that runs in this thread or task, where they enter at the layers.
_ENTERING: ContextVar[torch.Tensor] = ContextVar("splitlearn_entering")
#: Those that left it at its layers.
_LEFT: ContextVar[list[torch.Tensor]] = ContextVar("splitlearn_left")
#: Default of a look-up: the module has no attribute of this name.
_MISSING = object()
#: Probability of every dropout module in a check; a configuration may have 0.
_DROPOUT = 0.5


class PassLayer(nn.Module):
    """Returns the first argument unchanged, whatever else a decoder layer is given."""

    # Called for every layer of the other components at every token: the usual __call__ of nn.Module
    # would slow down decoding measurably.
    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden_states

    forward = __call__


class TupleLayer(PassLayer):
    """The same for a family whose decoder layers return a tuple that begins with the hidden states."""

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return hidden_states, None

    forward = __call__


class EnteringLayer(nn.Module):
    """Replaces the first layer, and returns the hidden states that the component was given.

    What the model did to them before, as it does to embeddings, is discarded.

    Args:
        neutral: The neutral layer that wraps a result as the family's layers do.
    """

    def __init__(self, neutral: PassLayer) -> None:
        super().__init__()
        self._neutral = neutral

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return self._neutral(_ENTERING.get(hidden_states))


class LeavingLayer(nn.Module):
    """Replaces the last layer, and keeps the hidden states that leave the component.

    What the model does to them afterwards, as it does before its head, is discarded.

    Args:
        neutral: The neutral layer that wraps a result as the family's layers do.
    """

    def __init__(self, neutral: PassLayer) -> None:
        super().__init__()
        self._neutral = neutral

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        _LEFT.get([]).append(hidden_states)
        return self._neutral(hidden_states)


@contextmanager
def leaving() -> Iterator[list[torch.Tensor]]:
    """Yield a list of the hidden states that leave at the layers, of a component whose family says so."""
    left: list[torch.Tensor] = []
    token = _LEFT.set(left)
    try:
        yield left
    finally:
        _LEFT.reset(token)


@contextmanager
def entering(hidden_states: torch.Tensor) -> Iterator[None]:
    """Let hidden states reach the layers unchanged."""
    token = _ENTERING.set(hidden_states)
    try:
        yield
    finally:
        _ENTERING.reset(token)


class Zero(nn.Module):
    """Returns a zero, which changes nothing when it is added."""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        given = (value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
        # Without dimensions: it broadcasts, and it does not promote a half-precision sum.
        return torch.zeros((), device=next((tensor.device for tensor in given), None))


class LeftOut(nn.Module):
    """Stands for a model that components do not have; some forwards read its device although it does not run."""

    device = torch.device("meta")


def neutral_layer(family: ModelFamily) -> PassLayer:
    """Return a neutral layer that returns what the family's decoder layers do."""
    return TupleLayer() if family.layers_return_tuple else PassLayer()


def layer_at(model: Any, family: ModelFamily, number: int) -> nn.Module:
    """Return a layer of the model: a new one if all layers are of one class, else the model's own."""
    layers = model.get_submodule(family.base).get_submodule(family.layers)
    layer_class: type[nn.Module] = type(layers[0])
    return (
        layer_class(decoder_config(family, model.config), number)
        if family.uniform_layers
        else cast("nn.Module", layers[number])
    )


def prune(model: Any, family: ModelFamily, owned: LayerRange, layers: Sequence[nn.Module]) -> None:
    """Keep the modules that the component owns, and replace the others with neutral ones."""
    base = model.get_submodule(family.base)
    built = base.get_submodule(family.layers)
    elsewhere = neutral_layer(family)
    slots = [layers[number - owned.start] if number in owned else elsewhere for number in range(owned.total)]
    if family.enter_at_layers and not owned.is_first:
        slots[0] = EnteringLayer(elsewhere)
    # Of layers of one class, only the first is built.
    for number, layer in enumerate(built):
        if number not in owned:
            slots[number] = _of_kind(slots[number], layer, with_modules=number == 0)
    if family.leave_at_layers and not owned.is_last:
        slots[-1] = LeavingLayer(elsewhere)
    _replace(base, {family.layers: nn.ModuleList(slots)})
    if not owned.is_first:
        _replace(base, {name: Zero() if name in family.zero_outside_bottom else PassLayer() for name in family.inlets})
    if not owned.is_last:
        # What has no parameters may be called before the layers, too.
        kept = {name for name in family.outlets if family.leave_at_layers and _is_plain(base, name)}
        _replace(base, {name: PassLayer() for name in family.outlets if name not in kept})
        _replace(model, {name: PassLayer() for name in (*family.before_head, family.head)})
        around, _, bias = family.head_bias.rpartition(".")
        if bias:
            model.get_submodule(around).register_parameter(bias, None)
    # A tied head is assigned by the plan: within one component no two parameters are tied.
    model.all_tied_weights_keys = {}


def _of_kind(neutral: nn.Module, layer: nn.Module, *, with_modules: bool) -> nn.Module:
    """Return a neutral layer with the texts of the layer that it stands in for: models read its kind there.

    Some models (X-MOD) also look into the modules of the first layer. They are on the meta device, and attributes only,
    no modules of the neutral layer.
    """
    kept = (str, nn.Module) if with_modules else str
    values = {name: value for name, value in {**vars(layer), **layer._modules}.items() if isinstance(value, kept)}  # noqa: SLF001  # a register that nn.Module documents
    if values:
        neutral = copy.copy(neutral)
        vars(neutral).update(values)
    return neutral


def _is_plain(base: nn.Module, name: str) -> bool:
    return not any(True for _ in base.get_submodule(name).parameters())


def _replace(parent: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    for path, module in modules.items():
        holder, _, name = path.rpartition(".")
        owner = parent.get_submodule(holder)
        # A model without an optional module has None in its place.
        if owner._modules.get(name) is not None:  # noqa: SLF001  # a register that nn.Module documents
            setattr(owner, name, module)


def leave_out_others(model: nn.Module, family: ModelFamily) -> None:
    """Remove the modules and parameters of a model of several models that are not its decoder's."""
    path = ""
    for name in family.base.split("."):
        holder = model.get_submodule(path)
        registers: tuple[Any, ...] = holder._modules, holder._parameters  # noqa: SLF001  # that nn.Module documents
        for register in registers:
            for other in register:
                full = f"{path}.{other}".lstrip(".")
                if other != name and not f"{family.head}.".startswith(f"{full}."):
                    register[other] = LeftOut() if isinstance(register[other], nn.Module) else None
        path = f"{path}.{name}".lstrip(".")


def base_of(model: Any) -> Any:
    """Return the base module of a causal language model, or the model itself if it has none.

    In a model of several, it is the decoder's. Some classes (Llama 4's) name a base module that they do not have.
    """
    config = model.config.get_text_config(decoder=True)
    inside = (module for module in model.modules() if isinstance(module, PreTrainedModel))
    model = next((module for module in inside if module.config is config), model)
    base = model.base_model
    submodels = [module for module in model.children() if isinstance(module, PreTrainedModel)]
    return submodels[0] if base is model and len(submodels) == 1 else base


def check_names(model: nn.Module, family: ModelFamily) -> None:
    """Compare the module names of a family with the modules of its model, before any is replaced.

    Raises:
        BrokenPluginError: Modules are missing; the message lists them, and those that exist.
    """
    inside = (family.layers, *family.inlets, *family.outlets)
    paths = [family.base, *family.before_head, family.head, *(f"{family.base}.{name}" for name in inside)]
    modules = dict(model.named_modules())
    optional = {f"{family.base}.{name}" for name in (*family.inlets[1:], *family.outlets)}
    missing = [path for path in paths if path not in modules and not (path in optional and _is_none(modules, path))]
    around, _, bias = family.head_bias.rpartition(".")
    if bias and not (around in modules and isinstance(getattr(modules[around], bias, None), nn.Parameter)):
        missing.append(family.head_bias)
    if missing:
        shallow = sorted(name for name in modules if name and name.count(".") <= family.base.count(".") + 1)
        raise BrokenPluginError(
            f"the family {family.model_type!r} names {', '.join(missing)}, "
            f"and {type(model).__name__} has no such modules",
            hint=f"it has: {', '.join(shallow)}",
        )


def _is_none(modules: Mapping[str, nn.Module], path: str) -> bool:
    """Return whether a module has None where others of its class have a module of this name."""
    holder, _, name = path.rpartition(".")
    return holder in modules and getattr(modules[holder], name, _MISSING) is None


def through_no_layers(part: Any, family: ModelFamily) -> tuple[torch.Tensor, torch.Tensor]:
    """Run a trunk or top in training mode with a neutral layer in place of each of its layers.

    Args:
        part: The component. Its layers are replaced, so it cannot be used afterwards.
        family: The family that it was built by.

    Returns:
        What the component makes of random hidden states ``[2, 5, hidden_size]``, and what the family's outlets
        alone make of them: equal unless another module of the model changes hidden states that enter from outside.
    """
    base = part.get_submodule(family.base)
    layers = base.get_submodule(family.layers)
    for number, layer in enumerate(layers):
        # The first of a component that hidden states enter at its layers is neutral already.
        if not isinstance(layer, EnteringLayer | LeavingLayer):
            layers[number] = _of_kind(neutral_layer(family), layer, with_modules=number == 0)
    for module in part.train().modules():
        if isinstance(module, nn.Dropout):
            module.p = _DROPOUT
    drawn = torch.randn(2, 5, part.decoder_config.hidden_size, generator=torch.Generator().manual_seed(0))
    hidden = drawn.to(part.config.dtype)
    with torch.no_grad(), torch.random.fork_rng(devices=()):
        # The same random numbers for both: an outlet may be a dropout.
        torch.manual_seed(0)
        expected = hidden
        for outlet in family.outlets:
            # A model without an optional module has None in its place.
            expected = base.get_submodule(outlet)(expected) if outlet in dict(base.named_modules()) else expected
        torch.manual_seed(0)
        with entering(hidden), leaving() as left:
            # A copy, because a model may change its embeddings in place.
            actual: torch.Tensor = part.base_model(inputs_embeds=hidden.clone()).last_hidden_state
    return (left[-1], hidden) if left else (actual, expected)
