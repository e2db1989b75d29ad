"""Neutral modules that stand in for the modules of other components, and the names by which a family finds those."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from splitlearn_core.build.configuration import decoder_config
from splitlearn_core.errors import BrokenPluginError
from splitlearn_core.family import LAYERS, SEQUENCE, STATES, ModelFamily
from splitlearn_core.plan.crossing import crossing_tensors
from splitlearn_core.types import LayerRange

#: Hidden states, and what else a layer was called with.
Left = tuple[torch.Tensor, dict[str, Any]]
#: What enters the forward that runs in this thread or task, where that is at the layers.
_ENTERING: ContextVar[Entering | None] = ContextVar("splitlearn_entering")
#: What left it at its layers.
_LEFT: ContextVar[list[Left]] = ContextVar("splitlearn_left")
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


@dataclass(frozen=True, slots=True)
class Entering:
    """What enters a component at its layers, as those take it."""

    hidden: torch.Tensor
    #: What the layer before has computed for the next one, in order.
    results: tuple[torch.Tensor, ...] = ()
    #: What each layer takes besides, by the names of its arguments.
    shared: Mapping[str, torch.Tensor] = field(default_factory=dict)
    #: What each layer takes a slice of: one for each layer, from the component's first on.
    slices: Mapping[str, Sequence[torch.Tensor]] = field(default_factory=dict)


class EnteringLayer(nn.Module):
    """Replaces the last layer before the component's, and returns the hidden states that the component was given.

    What the model did to them before, as it does to embeddings, is discarded.

    Args:
        neutral: The neutral layer that wraps a result as the family's layers do.
    """

    def __init__(self, neutral: PassLayer) -> None:
        super().__init__()
        self._neutral = neutral

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        entered = _ENTERING.get(None)
        if entered is None:
            return self._neutral(hidden_states)
        return (entered.hidden, *entered.results) if entered.results else self._neutral(entered.hidden)


class TakingLayer:
    """Mixed into the class of a component's own layers, which take what entered it instead of what the model made.

    Before the call, not by a hook: a layer that is computed again for its gradient gets its arguments again.
    """

    #: The place of the layer among those of its component.
    place: int
    #: The arguments of its forward.
    argument_names: tuple[str, ...]
    #: The place of the sequence among the dimensions of what it may take.
    sequence_places: Mapping[str, int]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        entered = _ENTERING.get(None)
        if entered is not None:
            taken = {**entered.shared, **{name: slices[self.place] for name, slices in entered.slices.items()}}
            given = dict(zip(self.argument_names, args, strict=False))
            taken = {name: self._of_kept_tokens(name, value, {**given, **kwargs}) for name, value in taken.items()}
            args = tuple(taken.get(name, value) for name, value in given.items())
            kwargs = {**kwargs, **{name: value for name, value in taken.items() if name not in given}}
        return super().__call__(*args, **kwargs)  # type: ignore[misc]  # of the layer that it is mixed into

    def _of_kept_tokens(self, name: str, taken: torch.Tensor, given: Mapping[str, Any]) -> torch.Tensor:
        """Leave out the tokens that the model leaves out: all but the last ones, where their logits are not kept."""
        place, own = self.sequence_places[name], given.get(name)
        kept = own.shape[place] if isinstance(own, torch.Tensor) and own.dim() == taken.dim() else taken.shape[place]
        return taken.narrow(place, taken.shape[place] - kept, kept) if kept < taken.shape[place] else taken


class LeavingLayer(nn.Module):
    """Replaces a layer after the component's, and keeps what it is called with, which leaves the component.

    What the model does to hidden states afterwards, as it does before its head, is discarded.

    Args:
        neutral: The neutral layer that wraps a result as the family's layers do.
        names: The arguments to keep besides hidden states.
        layer: The layer that it replaces.
    """

    def __init__(self, neutral: PassLayer, names: Collection[str] = (), layer: nn.Module | None = None) -> None:
        super().__init__()
        self._neutral = neutral
        # Of all arguments after the first, which is hidden states.
        self._kept = [(number, name) for number, name in enumerate(_argument_names(layer)[1:]) if name in names]

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        kept = {name: args[number] if number < len(args) else kwargs.get(name) for number, name in self._kept}
        _LEFT.get([]).append((hidden_states, kept))
        return self._neutral(hidden_states)


def _argument_names(layer: nn.Module | None) -> tuple[str, ...]:
    return () if layer is None else tuple(inspect.signature(type(layer).forward).parameters)[1:]


@contextmanager
def leaving() -> Iterator[list[Left]]:
    """Yield a list of what leaves at the layers, of a component whose family says so: hidden states and arguments."""
    left: list[Left] = []
    token = _LEFT.set(left)
    try:
        yield left
    finally:
        _LEFT.reset(token)


@contextmanager
def entering(entered: Entering) -> Iterator[None]:
    """Let hidden states, and what crossed with them, reach the layers unchanged."""
    token = _ENTERING.set(entered)
    try:
        yield
    finally:
        _ENTERING.reset(token)


class Wide(nn.Module):
    """Stands in for a projection to another width, whose result models reshape but do not use.

    Args:
        width: The width of that result.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self._width = width

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states.new_zeros(*hidden_states.shape[:-1], self._width)


class Zero(nn.Module):
    """Returns a zero, which changes nothing when it is added."""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        given = (value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
        # Without dimensions: it broadcasts, and it does not promote a half-precision sum.
        return torch.zeros((), device=next((tensor.device for tensor in given), None))


class ZeroRows(nn.Module):
    """Stands in for an embedding that a model joins with others, and whose result it does not use.

    Args:
        width: The width of that result.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self._width = width

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.zeros(*ids.shape, self._width, dtype=torch.get_default_dtype(), device=ids.device)


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
    if enters_at_layers(family) and not owned.is_first:
        slots[owned.start - 1] = EnteringLayer(elsewhere)
        _let_take(layers, family)
    if leaves_at_layers(family) and not owned.is_last:
        # The first after the component's; all of them where each is called with a slice of its own.
        has_slices = any(LAYERS in dimensions for dimensions in family.crossing.values())
        for number in range(owned.end, owned.total if has_slices else owned.end + 1):
            stands_for = built[number if number < len(built) else 0]
            slots[number] = LeavingLayer(elsewhere, family.crossing, stands_for)
    # Of layers of one class, only the first is built.
    for number, layer in enumerate(built):
        if number not in owned:
            slots[number] = _of_kind(slots[number], layer, with_modules=number == 0)
    _replace(base, {family.layers: nn.ModuleList(slots)})
    if not owned.is_first:
        _replace(base, {name: _neutral_inlet(base, family, name) for name in family.inlets})
    if not owned.is_last:
        # What has no parameters may be called before the layers, too.
        kept = {name for name in family.outlets if family.leave_at_layers and _is_plain(base, name)}
        _replace(base, {name: _neutral_outlet(base, name) for name in family.outlets if name not in kept})
        _replace(model, {name: PassLayer() for name in (*family.before_head, family.head)})
        around, _, bias = family.head_bias.rpartition(".")
        if bias:
            model.get_submodule(around).register_parameter(bias, None)
    # A tied head is assigned by the plan: within one component no two parameters are tied.
    model.all_tied_weights_keys = {}


def enters_at_layers(family: ModelFamily) -> bool:
    """Return whether hidden states from outside skip what the model does before its layers."""
    return family.enter_at_layers or bool(family.crossing)


def leaves_at_layers(family: ModelFamily) -> bool:
    """Return whether hidden states skip what the model does after its layers."""
    return family.leave_at_layers or bool(family.crossing)


def _let_take(layers: Sequence[nn.Module], family: ModelFamily) -> None:
    """Let a component's layers take what crosses a cut, and was not computed by the layer before."""
    if not family.crossing.keys() - {STATES, *family.layer_results}:
        return
    places = {
        name: [dimension for dimension in dimensions if dimension != LAYERS].index(SEQUENCE)
        for name, dimensions in family.crossing.items()
    }
    for place, layer in enumerate(layers):
        taking: Any = layer
        taking.place, taking.argument_names, taking.sequence_places = place, _argument_names(layer), places
        taking.__class__ = _taking_class(cast("Any", type(layer)))


@cache
def _taking_class(layer_class: Any) -> type[nn.Module]:
    # By its own name, by which transformers recognises layers.
    return type(layer_class.__name__, (TakingLayer, layer_class), {"__module__": layer_class.__module__})


def _neutral_inlet(base: nn.Module, family: ModelFamily, name: str) -> nn.Module:
    # Where hidden states enter at the layers, a model may do more with its embeddings than adding them.
    module = dict(base.named_modules()).get(name) if enters_at_layers(family) else None
    if name in family.zero_outside_bottom:
        # Not of a class of the model's own, which may take anything.
        return ZeroRows(module.embedding_dim) if type(module) is nn.Embedding else Zero()
    if isinstance(module, nn.Linear) and module.in_features != module.out_features:
        return Wide(module.out_features)
    return PassLayer()


def _neutral_outlet(base: nn.Module, name: str) -> nn.Module:
    neutral, weight = PassLayer(), dict(base.named_parameters()).get(f"{name}.weight")
    if weight is not None:
        # Some models read the dtype of their norm.
        neutral.weight = torch.zeros((), dtype=weight.dtype, device="cpu")
    return neutral


def _of_kind(neutral: nn.Module, layer: nn.Module, *, with_modules: bool) -> nn.Module:
    """Return a neutral layer with the string attributes of the layer that it replaces: models read its kind there.

    Some models (X-MOD) also look into the modules of their first layer. The neutral layer has them, on the meta device,
    as plain attributes and not as modules of its own.
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
        elif name in owner._parameters:  # noqa: SLF001  # the same
            # The model computes something with it, which is discarded: hidden states enter at the layers.
            delattr(owner, name)
            setattr(owner, name, torch.zeros((), device="cpu"))


def leave_out_others(model: nn.Module, family: ModelFamily) -> None:
    """Remove the modules and parameters of a composite model that are not its decoder's."""
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

    In a composite model, it is the decoder's. Some classes (Llama 4's) name a base module that they do not have.
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
    # An end may be a parameter of the base module itself.
    modules: dict[str, Any] = {**dict(model.named_parameters()), **dict(model.named_modules())}
    optional = {f"{family.base}.{name}" for name in (*family.inlets[1:], *family.outlets)}
    # A model in which some of it does not cross lacks the modules that make it.
    may_lack = bool(family.crossing.keys() - _crossing(model, family).keys())
    missing = [
        path
        for path in paths
        if path not in modules and not (path in optional and (may_lack or _is_none(modules, path)))
    ]
    around, _, bias = family.head_bias.rpartition(".")
    if bias and not (around in modules and isinstance(getattr(modules[around], bias, None), nn.Parameter)):
        missing.append(family.head_bias)
    if missing:
        shallow = sorted(
            name for name, _ in model.named_modules() if name and name.count(".") <= family.base.count(".") + 1
        )
        raise BrokenPluginError(
            f"the family {family.model_type!r} names {', '.join(missing)}, "
            f"and {type(model).__name__} has no such modules",
            hint=f"it has: {', '.join(shallow)}",
        )


def _crossing(model: Any, family: ModelFamily) -> Mapping[str, Any]:
    return crossing_tensors(family, model.config.to_dict()) if family.crossing else {}


def _is_none(modules: Mapping[str, Any], path: str) -> bool:
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
        with entering(Entering(hidden)), leaving() as left:
            # A copy, because a model may change its embeddings in place.
            actual: torch.Tensor = part.base_model(inputs_embeds=hidden.clone()).last_hidden_state
    return (left[0][0], hidden) if left else (actual, expected)
