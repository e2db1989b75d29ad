"""Components in order, and how the arguments of a forward pass through them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from itertools import groupby, pairwise
from typing import Any, cast

import torch
from transformers import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from splitlearn_core.build.component import ComponentModel
from splitlearn_core.build.forward_arguments import RECORDINGS, crosses_in_float32, is_paged, named_cache
from splitlearn_core.build.kv_cache import CACHE_FIELD, own_cache_class
from splitlearn_core.cuts.crossings import Crossings, crossing
from splitlearn_core.errors import ConfigurationError
from splitlearn_core.family import STATES
from splitlearn_core.hosts.chains import announced
from splitlearn_core.hosts.mirrored_layers import restored
from splitlearn_core.hosts.remote import RemoteComponent
from splitlearn_core.types import Component

#: A component that runs here, or elsewhere.
AnyComponent = ComponentModel | RemoteComponent


class ComponentChain:
    """The forward of components in order.

    Args:
        parts: The components by name, in order.
        mixed_dtypes: Whether hidden states are cast at a cut.
        crossings: The treatment of what crosses the cuts; None for none.
    """

    def __init__(self, parts: dict[str, AnyComponent], mixed_dtypes: bool, crossings: Crossings | None = None) -> None:
        self.parts = parts
        self.mixed_dtypes = mixed_dtypes
        self.crossings = crossings
        self.config = parts[Component.TOP].config
        # The object itself: a Trainer turns the cache off in it.
        self._decoder_config = cast("ComponentModel", parts[Component.TOP]).decoder_config
        bottom = cast("ComponentModel", parts[Component.BOTTOM])
        self.routing = bottom.routing
        #: The names of what crosses besides hidden states.
        self._crossing = tuple(name for name in bottom.crossing if name != STATES)
        self._crosses_in_float32 = crosses_in_float32(bottom.family, self._decoder_config)
        #: The class of cache that the model insists on, which keeps running states; None for none.
        self.own_cache = own_cache_class(bottom.base_model.forward)
        self._is_apart = any(isinstance(part, RemoteComponent) for part in parts.values())
        #: The number of each remote component that is followed by others -> it and them.
        self._rows: dict[int, list[Any]] = {}
        for is_remote, row in groupby(enumerate(parts.values()), lambda item: isinstance(item[1], RemoteComponent)):
            numbers, components = zip(*row, strict=True)
            if is_remote and len(components) > 1:
                self._rows[numbers[0]] = list(components)
        refusal = "" if crossings is None else "what crosses the cuts is treated here"
        refusal = f"{', '.join(self._crossing)} cross besides hidden states" if self._crossing else refusal
        for followed in self._rows.values():
            for before, after in pairwise(followed):
                before.link_to(after, refusal)
        if refusal:
            self._rows.clear()
        # A parameter of each, for its device and dtype without walking the module at every token. A component that runs
        # elsewhere has none: it takes hidden states on any device.
        self._probes = [
            None if isinstance(part, RemoteComponent) else _first_parameter(part) for part in parts.values()
        ]

    def run(self, owner: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, head: bool) -> Any:
        """Run the components one after the other.

        Args:
            owner: The module whose forward this is.
            args, kwargs: The arguments of that forward, as the family's class takes them.
            head: Whether to go on to logits and loss, or to end with the final norm.

        Raises:
            ConfigurationError: An argument that components cannot honour.
            TypeError: A name that the family's forward does not know.
        """
        # None counts as not given.
        passed = {name: value for name, value in _by_name(owner, args, kwargs).items() if value is not None}
        return_dict = passed.pop("return_dict", self.config.return_dict)
        recordings = {name: passed.pop(name, getattr(self.config, name, False)) for name in RECORDINGS}
        caches = getattr(self._decoder_config, "use_cache", False)
        use_cache = passed.pop("use_cache", caches) and not self._is_recomputed(owner)
        cache = self._whole_cache(named_cache(passed, passed.pop("past_key_values", None)), use_cache)
        # generate passes on what it needs for stop_strings; the family's forward ignores it.
        passed.pop("tokenizer", None)
        self.routing.refuse_others(passed)
        tokens = passed.pop("input_ids", None)
        first = {name: passed.pop(name) for name in ("inputs_embeds", *self.routing.bottom) if name in passed}
        # The family's base model ignores what is meant for the head.
        last = {name: passed.pop(name) for name in self.routing.top if name in passed}
        if not is_paged(cache):
            self._refuse_unknown(owner, passed)
        passed.update({name: True for name, is_requested in recordings.items() if is_requested})

        parts = list(self.parts.values())
        rows = tokens if tokens is not None else first.get("inputs_embeds")
        over_cuts = crossing(self.crossings, parts, rows, cache, is_training=owner.training)
        with restored(cache) if self._is_apart else nullcontext(), over_cuts as cross, ExitStack() as announcements:
            # All before the first runs: a component of running states alone takes the number of tokens from the others.
            caches = [_share(cache, part) for part in parts]
            output: Any = parts[0](tokens, **first, **passed, past_key_values=caches[0])
            outputs = [output]
            for number, part in enumerate(parts[1:], start=1):
                is_last = part is parts[-1]
                passed = _move({**passed, **last} if is_last and head else passed, self.device(number))
                run = cast("Any", part).without_head if is_last and not head else part
                states = output if isinstance(output, torch.Tensor) else output.last_hidden_state
                hidden = cross(number - 1, self._enter(number, states))
                others = {name: self._enter(number, output[name]) for name in self._crossing}
                row = self._rows.get(number)
                if row is not None:
                    announcements.enter_context(announced(row, hidden, passed, caches[number : number + len(row)]))
                output = run(hidden, **others, **passed, past_key_values=caches[number])
                outputs.append(output)
        result = _whole_output(outputs, recordings, cache if use_cache else None)
        return result if return_dict else result.to_tuple()

    def device(self, number: int) -> torch.device:
        """Return the device of a component, by its number in the order; for a remote one, that of its predecessor."""
        probe = self._probes[number]
        return self.device(number - 1) if probe is None else cast("torch.device", getattr(*probe).device)

    def _enter(self, number: int, hidden: torch.Tensor) -> torch.Tensor:
        """Take hidden states across a cut: to the next component's device, and to its dtype if dtypes may differ."""
        if not self.mixed_dtypes or self._crosses_in_float32:
            return hidden.to(self.device(number))
        probe = self._probes[number]
        # Read from the parameters: .to(dtype) may have changed the dtype since.
        dtype = list(self.parts.values())[number].dtype if probe is None else getattr(*probe).dtype
        return hidden.to(self.device(number), dtype)

    def _is_recomputed(self, owner: Any) -> bool:
        """Return whether layers run twice and would cache their keys twice; transformers then turns the cache off."""
        checkpointing = getattr(self.parts[Component.BOTTOM].base_model, "gradient_checkpointing", False)
        return bool(checkpointing and owner.training and torch.is_grad_enabled())

    def _whole_cache(self, cache: Any, use_cache: bool) -> Any:
        """Return the cache of the whole model, of which each component uses its own layers."""
        if cache is None:
            if not use_cache:
                return None
            return DynamicCache(config=self.config) if self.own_cache is None else self.own_cache()
        refusal = "" if is_paged(cache) else _cache_refusal(cache)
        if refusal:
            raise ConfigurationError(
                f"a split model cannot use {refusal}",
                hint="use DynamicCache(config=model.config), or leave past_key_values and cache_implementation out",
            )
        return cache

    def _refuse_unknown(self, owner: Any, passed: Mapping[str, Any]) -> None:
        for name in passed:
            if name not in self.routing.everywhere:
                raise TypeError(f"{type(owner).__name__}.forward() got an unexpected keyword argument {name!r}")


def _by_name(owner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Name the positional arguments of a forward."""
    if not args:
        return kwargs
    names = owner.places
    positional = dict(zip(names, args, strict=False))
    twice = sorted(positional.keys() & kwargs.keys())
    if twice or len(args) > len(names):
        what = f"multiple values for argument {twice[0]!r}" if twice else f"{len(args)} positional arguments"
        raise TypeError(f"{type(owner).__name__}.forward() got {what}")
    return {**positional, **kwargs}


def _first_parameter(part: Any) -> tuple[Any, str]:
    path, _, name = next(part.named_parameters())[0].rpartition(".")
    return part.get_submodule(path), name


def _share(cache: Any, part: AnyComponent) -> Any:
    """Return a component's own layers in a cache of the whole model."""
    return cache if cache is None or is_paged(cache) else part.cache_view(cache)


def _whole_output(outputs: list[Any], recordings: Mapping[str, Any], cache: Any) -> Any:
    """Combine the output of the last component with what each recorded of its own layers."""
    last = outputs[-1]
    recorded: dict[str, Any] = {CACHE_FIELD: cache}
    requested = recordings["output_hidden_states"]
    if requested:
        # The last state of a component is the first of the next.
        states = [state for output in outputs[:-1] for state in output.hidden_states[:-1]]
        recorded["hidden_states"] = _selected((*states, *last.hidden_states), requested)
    # The output of a model of state spaces alone has no such field, whatever is requested.
    if recordings["output_attentions"] and all(hasattr(output, "attentions") for output in outputs):
        recorded["attentions"] = tuple(item for output in outputs for item in output.attentions or ())
    if isinstance(last, torch.Tensor):
        return BaseModelOutputWithPast(last_hidden_state=last, **recorded)
    if isinstance(last, CausalLMOutputWithPast):
        result = CausalLMOutputWithPast(loss=last.loss, logits=last.logits, **recorded)
    else:
        result = BaseModelOutputWithPast(last_hidden_state=last.last_hidden_state, **recorded)
    for name, value in last.items():
        if name not in result and name not in {CACHE_FIELD, *RECORDINGS.values()}:
            of_all = isinstance(value, tuple)
            result[name] = tuple(item for output in outputs for item in output.get(name) or ()) if of_all else value
    return result


def _selected(states: tuple[Any, ...], requested: Any) -> tuple[Any, ...]:
    """Keep only the states whose numbers were requested, which newer transformers allows."""
    if isinstance(requested, bool):
        return states
    count = len(states)
    kept = {
        number % count
        for number in ([requested] if isinstance(requested, int) else requested)
        if -count <= number < count
    }
    return tuple(state if number in kept else None for number, state in enumerate(states))


def _cache_refusal(cache: Any) -> str:
    if not isinstance(cache, Cache):
        return f"a {type(cache).__name__} as a cache"
    return "an offloaded cache" if cache.offloading else ""


def _move(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    return {name: _move(item, device) for name, item in value.items()} if isinstance(value, dict) else value
