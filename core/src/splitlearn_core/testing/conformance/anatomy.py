"""The structure of the unsplit model, determined by running it: what a family should declare."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from splitlearn_core.build.pruning import base_of
from splitlearn_core.testing.conformance.batches import no_grad, token_ids

_TOKENS = 5


@dataclass(frozen=True, slots=True)
class Anatomy:
    """Names of modules; those inside the base are relative to it. Empty if there is no such module."""

    base: str
    embedding: str
    head: str
    #: ModuleLists with as many modules as the model has layers.
    layers: tuple[str, ...]
    #: Modules whose output the base returns, the last one first: the final norm.
    norms: tuple[str, ...]
    #: Modules before the first layer whose input is not the hidden states, but whose output has their width.
    added: tuple[str, ...]
    #: Modules before the first layer that take the hidden states.
    passed: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Call:
    name: str
    state_in: bool
    output: Any


def anatomy(model: Any) -> Anatomy:
    """Look at a Hugging Face causal language model, and run it once."""
    base = base_of(model)
    names = {id(module): name for name, module in base.named_modules()}
    depth = model.config.get_text_config(decoder=True).num_hidden_layers
    lists = [name for name, part in base.named_modules() if isinstance(part, nn.ModuleList) and len(part) == depth]
    early, late = _calls(model, base, lists)
    embedding = names.get(id(model.get_input_embeddings()), "")
    width = model.config.get_text_config(decoder=True).hidden_size
    inlets = [call for call in early if call.name != embedding and _has_width(call.output, width)]
    head = model.get_output_embeddings()
    return Anatomy(
        base=next((name for name, module in model.named_modules() if module is base and name), ""),
        embedding=embedding,
        head=next((name for name, module in model.named_modules() if module is head), ""),
        layers=tuple(lists),
        norms=tuple(call.name for call in reversed(late)),
        added=tuple(call.name for call in inlets if not call.state_in),
        passed=tuple(call.name for call in inlets if call.state_in),
    )


def _calls(model: Any, base: Any, lists: list[str]) -> tuple[list[_Call], list[_Call]]:
    """Run the model; return the calls of modules before the first layer, and those that yield the base's output."""
    # Before a projection the embeddings may be narrower than the layers.
    config = model.config.get_text_config(decoder=True)
    widths = (config.hidden_size, getattr(model.get_input_embeddings(), "embedding_dim", 0))
    calls: list[_Call] = []
    started: list[int] = []
    handles = []

    def recorder(name: str) -> Callable[..., None]:
        def record(_: Any, args: Any, kwargs: Any, output: Any) -> None:
            first = next((value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)), None)
            calls.append(_Call(name, any(_has_width(first, width) for width in widths), output))

        return record

    inside = tuple(f"{name}." for name in lists)
    for name, module in base.named_modules():
        if name and not name.startswith(inside) and name not in lists:
            handles.append(module.register_forward_hook(recorder(name), with_kwargs=True))
    for name in lists[:1]:
        first = base.get_submodule(name)[0]
        handles.append(first.register_forward_pre_hook(lambda *_: started.append(len(calls))))
    try:
        output = no_grad(base, input_ids=token_ids(1, _TOKENS), use_cache=False).last_hidden_state
    finally:
        for handle in handles:
            handle.remove()
    early = calls[: started[0]] if started else []
    late = [call for call in calls[len(early) :] if _is_same(call.output, output)]
    return early, late


def _has_width(value: Any, width: int) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.shape[-1:] == (width,)


def _is_same(value: Any, output: torch.Tensor) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and value.numel() == output.numel()
        and torch.equal(value.reshape(output.shape), output)
    )
