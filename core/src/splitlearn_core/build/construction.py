"""Build components: the class of a family and kind; an instance without weights, or one made of a state dict."""

from __future__ import annotations

import copy
import importlib
import logging
import operator
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, cast

import torch

from splitlearn_core.build.assemble import assign_tensor, finish, ignored_names, tensor_problems, unexpected_names
from splitlearn_core.build.component import BottomModel, ComponentModel, TopModel, TrunkModel
from splitlearn_core.build.configuration import (
    architecture_class,
    config_class_of,
    config_errors,
    decoder_config,
    hf_config,
    set_depth,
    set_dtype,
)
from splitlearn_core.build.conversion_tables import names_in_float32, targets_by_tables
from splitlearn_core.build.kv_cache import cache_argument
from splitlearn_core.build.pruning import layer_at, prune
from splitlearn_core.build.torch_state import own_modes, skeleton
from splitlearn_core.errors import ConfigurationError, InvalidSplitError, SplitLearnError, TensorMismatchError
from splitlearn_core.family import ModelFamily
from splitlearn_core.plan.keys import KeyTable, map_keys, place_keys
from splitlearn_core.plan.mismatch import alters_weights, unexpected_keys_message, unread_keys_message
from splitlearn_core.plan.split_points import ranges_around
from splitlearn_core.quoting import SENTENCE, listed
from splitlearn_core.readers.tensor_parts import make
from splitlearn_core.types import Component, LayerRange, TensorInfo, dtype_names, kind_of

log = logging.getLogger(__name__)

_MAX_SHOWN = 3

_KINDS: dict[Component, type[ComponentModel]] = {
    Component.BOTTOM: BottomModel,
    Component.TRUNK: TrunkModel,
    Component.TOP: TopModel,
}


@cache
def component_class(family: ModelFamily, component: Component) -> type[ComponentModel]:
    """Return the class of a family's bottom, trunk or top, importing the Hugging Face class."""
    hf_class, kind = architecture_class(family), _KINDS[component]
    attributes = {
        "kind": component,
        "component": component,
        "family": family,
        "_from_state_dict": staticmethod(component_from_state_dict),
        "cache_argument": cache_argument(hf_class.forward),
        # The names of the Hugging Face class: save_pretrained writes them, the loss is chosen by
        # them, and a class of another module would count as remote code.
        "__module__": hf_class.__module__,
        "__qualname__": hf_class.__qualname__,
        # Embedding and head belong to different components.
        "_tied_weights_keys": {},
        "__reduce_ex__": _reduce,
    }
    return cast("type[ComponentModel]", type(hf_class.__name__, (kind, hf_class), attributes))


def installed_class(model_type: str, component: str) -> type[Any]:
    """Return the class of a component of an installed plugin's family; pickles refer to a class by this call."""
    # By the public name: this room does not know the registry.
    registry = importlib.import_module("splitlearn_core").ModelRegistry
    model_class: type[Any] = registry.get_model_class(model_type, component)
    return model_class


class _ClassReference:
    """A class that is made at run time, which pickle could not find by its name."""

    def __init__(self, component_class: type[ComponentModel]) -> None:
        self.component_class = component_class

    def __deepcopy__(self, memo: dict[int, Any]) -> _ClassReference:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the call that returns the class.

        Raises:
            ConfigurationError: In another process, that call would not return this class.
        """
        own = self.component_class
        arguments = own.family.model_type, own.kind.value
        problem = ""
        try:
            if installed_class(*arguments) is not own:
                problem = "the installed plugin has another family of this name"
        except SplitLearnError as error:
            problem = error.message
        if problem:
            raise ConfigurationError(
                f"a {own.__name__} of {' '.join(arguments)} cannot be pickled: {problem}",
                hint="save it as files: save_split(model, DIR), and load those with load_component or "
                "load_split_directory",
            )
        return installed_class, arguments


def _instance(reference: _ClassReference | type[Any]) -> Any:
    """Make an instance without state; unpickled references are the classes themselves."""
    return object.__new__(reference.component_class if isinstance(reference, _ClassReference) else reference)


def _reduce(self: Any, protocol: Any) -> Any:
    """Pickle or copy a component; the ``__reduce_ex__`` of classes that are made at run time."""
    if vars(type(self)).get("__reduce_ex__") is not _reduce:
        return object.__reduce_ex__(self, protocol)  # a subclass, which has a name of its own
    return _instance, (_ClassReference(type(self)),), self.__getstate__()


def build_component(
    family: ModelFamily,
    config: Any,
    component: str,
    layer_range: LayerRange,
    on_layer: Callable[[], None] = lambda: None,
) -> ComponentModel:
    """Build a component whose parameters have shapes but no memory yet.

    Args:
        family: The model's family.
        config: A Hugging Face configuration of the whole model, which becomes the component's own;
            its ``dtype`` is that of the weights to come.
        component: The component's name.
        layer_range: The layers it runs.
        on_layer: Called before each layer is built. If it raises, the build ends, and nothing is kept.
    """
    with skeleton(config.dtype), config_errors(family, config.name_or_path):
        model = component_class(family, kind_of(component))(config, layer_range)
    model.component = component
    layers = []
    for number in range(layer_range.start, layer_range.end):
        # Outside the lock and the mode: it may take long, and use torch.
        on_layer()
        with skeleton(config.dtype), config_errors(family, config.name_or_path):
            layers.append(layer_at(model, family, number))
    prune(model, family, layer_range, layers)
    base = model.base_model
    if getattr(base, "gradient_checkpointing", False):
        # Requested by config.json; layers that were made after the model do not have it yet.
        model._set_gradient_checkpointing(gradient_checkpointing_func=base._gradient_checkpointing_func)  # noqa: SLF001  # transformers' own way
    model.eval()
    return model


@own_modes(gradients=True)
def component_from_state_dict(
    family: ModelFamily,
    component: Component,
    state_dict: Mapping[str, torch.Tensor],
    config: Any,
    start_layer: int | None,
    end_layer: int | None,
) -> ComponentModel:
    """Make a component from the tensors that it needs; see :meth:`ComponentModel.from_pretrained_split`."""
    if not isinstance(state_dict, Mapping) or not all(isinstance(v, torch.Tensor) for v in state_dict.values()):
        raise ConfigurationError(
            "full_state_dict is not a mapping from names to tensors", hint="give model.state_dict() of the whole model"
        )
    config = _config(family, config)
    ranges = _ranges(component, start_layer, end_layer, decoder_config(family, config).num_hidden_layers)
    values = config.to_dict()
    by_table = family.transformers_tables
    targets = targets_by_tables(family, values, list(state_dict)) if by_table else map_keys(family, state_dict)
    table = place_keys(family, values, targets, ranges)
    sources, state_dict = _made(table, component, state_dict)
    wide = _in_float32(family, values, {name: state_dict[key].dtype for name, key in sources.items()})
    tensors = {key: state_dict[key] for name, key in sources.items() if name not in wide}
    _refuse_unusable(tensors)
    first = next((tensor for tensor in tensors.values() if tensor.is_floating_point()), torch.empty(0))
    set_dtype(config, first.dtype)
    built = build_component(family, config, component, ranges[component])
    dtypes = dtype_names()
    infos = {
        name: TensorInfo(key, dtypes.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape), "", 0, tensor.nbytes)
        for name, key in sources.items()
        for tensor in (state_dict[key],)
    }
    names = unexpected_names(built, infos)
    unread, sources = sources, {name: key for name, key in sources.items() if name not in names}
    problems = [*table.problems, *tensor_problems(built, {name: infos[name] for name in sources})]
    reported = sorted(names - ignored_names(built, names))
    surplus = {**table.unexpected, **{unread[name]: name for name in reported}}
    if surplus and not problems and not any(map(alters_weights, surplus)):
        log.warning("%s", unread_keys_message("the state dict", family.model_type, sorted(surplus)))
    elif surplus:
        problems += unexpected_keys_message(surplus)
    if problems:
        raise TensorMismatchError(
            f"the state dict is not that of a {family.model_type} model; {len(problems)} tensors are wrong:\n  "
            + listed(problems, "\n  ", most=20, limit=SENTENCE),
            hint="give model.state_dict() of the whole causal language model, and its own config",
        )
    modules = dict(built.named_modules())
    assigned: dict[str, torch.Tensor] = {}
    for name, key in sources.items():
        tensor = assigned.get(key, state_dict[key].detach())
        # A tensor made in inference mode could never be trained.
        assigned[key] = assign_tensor(modules, name, tensor.clone() if tensor.is_inference() else tensor)
    finish(built, str(first.device))
    return built


def _in_float32(family: ModelFamily, config: Mapping[str, Any], dtypes: Mapping[str, torch.dtype]) -> set[str]:
    """Return the names of float32 tensors that transformers keeps so in a model of the dtype of the others."""
    others = {dtype for dtype in dtypes.values() if dtype.is_floating_point} - {torch.float32}
    if not family.transformers_tables or len(others) != 1:
        return set()
    (dtype,) = others
    names = names_in_float32(family, config, str(dtype).removeprefix("torch."), dtypes)
    return {name for name in names if dtypes[name] == torch.float32}


def _made(
    table: KeyTable, component: Component, state_dict: Mapping[str, torch.Tensor]
) -> tuple[Mapping[str, str], Mapping[str, torch.Tensor]]:
    """Make what a component has of several tensors, and return module key -> key, and the tensors by key."""
    conversions = table.conversions.get(component, ())
    if not conversions:
        return table.sources[component], state_dict
    parts = {key for conversion in conversions for key in conversion.keys}
    made: dict[str, torch.Tensor] = {}
    for conversion in conversions:
        _refuse_unusable({key: state_dict[key] for key in conversion.keys})
        try:
            made |= make(conversion, state_dict)
        except ValueError as error:
            raise TensorMismatchError(
                f"{conversion.targets[0]} cannot be made of the tensors of the state dict: {error}",
                hint="give the state dict of the whole model, and its own config",
            ) from error
    sources = {name: key for name, key in table.sources[component].items() if key not in parts}
    return {**sources, **{name: name for name in made}}, {**state_dict, **made}


def _config(family: ModelFamily, config: Any) -> Any:
    """Return a copy of a configuration, of the family's class; a mapping holds the values of ``config.json``."""
    if isinstance(config, Mapping):
        return hf_config(family, config, "the given config", "float32")
    expected = config_class_of(family)
    if not isinstance(expected, type) or not isinstance(config, expected):
        raise ConfigurationError(
            f"config is a {type(config).__name__}, not the configuration of a {family.model_type} model",
            hint="give model.config of the whole model, or the values of its config.json as a mapping",
        )
    config = copy.deepcopy(config)
    set_depth(family, config)
    return config


def _refuse_unusable(tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse tensors without memory, and tensors of more than one floating dtype: a component has one."""
    empty = [key for key, tensor in tensors.items() if tensor.is_meta]
    if empty:
        raise ConfigurationError(
            f"{len(empty)} tensors of full_state_dict are on the meta device and have no memory: "
            f"{listed(empty, most=_MAX_SHOWN)}",
            hint="load the weights first, and give the state dict of that model",
        )
    dtypes: dict[torch.dtype, list[str]] = {}
    for key, tensor in tensors.items():
        if tensor.is_floating_point():
            dtypes.setdefault(tensor.dtype, []).append(key)
    if len(dtypes) > 1:
        mixed = "; ".join(f"{dtype}: {listed(keys, most=_MAX_SHOWN)}" for dtype, keys in dtypes.items())
        raise ConfigurationError(
            f"the component's tensors are of several dtypes: {mixed}",
            hint="convert them to one: {key: tensor.to(dtype) for key, tensor in state_dict.items()}",
        )


def _ranges(component: Component, start: int | None, end: int | None, total: int) -> dict[str, LayerRange]:
    """Cut the model so that the component has the requested layers."""
    first = 0 if start is None else _layer_number(start)
    last = total if end is None else _layer_number(end)
    fits = {Component.BOTTOM: first == 0, Component.TRUNK: first > 0 and last < total, Component.TOP: last == total}
    if not (0 <= first < last <= total and fits[component]):
        raise InvalidSplitError(
            f"a {component} of layers [{first}, {last}) does not fit a model of {total} layers",
            hint="a bottom begins at layer 0, a top ends with the last layer, a trunk is between them; none is empty",
        )
    return ranges_around(component, LayerRange(first, last, total))


def _layer_number(value: Any) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError("a boolean is not a layer number")
        return operator.index(value)
    except TypeError as error:
        raise InvalidSplitError(f"{value!r} is not a layer number: {error}", hint="give whole numbers") from error
