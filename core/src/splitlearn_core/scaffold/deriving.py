"""From a tiny model to the names of its parts: found by watching it, not by guessing from names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from splitlearn_core.scaffold.findings import CannotSplit, Question
from splitlearn_core.scaffold.observing import (
    COLUMNS,
    ROWS,
    Call,
    Forward,
    passed,
    random_embeddings,
    watch,
    zeroed,
)

_MAX_SHOWN = 6


@dataclass(slots=True)
class Parts:
    """Where the parts of a model are, as the fields of :class:`ModelFamily` have it."""

    base: str
    layers: str = ""
    embedding: str = ""
    norm: str = ""
    head: str = ""
    zero: list[str] = field(default_factory=list)
    skip: list[str] = field(default_factory=list)
    layer_classes: tuple[str, ...] = ()
    questions: list[Question] = field(default_factory=list)


def derive_parts(model: Any) -> Parts:
    """Find the parts of a causal language model by watching a forward of it.

    Args:
        model: A tiny model with random weights, in evaluation mode.

    Raises:
        CannotSplit: The model is no chain of layers that one tensor runs through, with the reason.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    base = _base(model)
    parts = Parts(model.base_model_prefix)
    parts.embedding = _end(base, model.get_input_embeddings(), "get_input_embeddings()")
    parts.head = _end(model, model.get_output_embeddings(), "get_output_embeddings()")
    _check_causal(model)
    width = model.get_input_embeddings().weight.shape[1]
    embeddings = random_embeddings(width)
    parts.layers = _layers(base, model.config, embeddings)
    spine = _ancestors(parts.layers)
    seen = watch(base, embeddings, spine)
    layers = [_only_call(seen, f"{parts.layers}.{number}") for number in range(_depth(model))]
    parts.layer_classes = tuple(dict.fromkeys(type(layer).__name__ for layer in base.get_submodule(parts.layers)))
    _check_chain(layers)
    _before(base, seen, layers[0], spine, parts)
    _after(base, seen, layers[-1], spine, parts)
    return parts


def _base(model: Any) -> Any:
    base = model.base_model
    if base is model:
        raise CannotSplit(
            f"{type(model).__name__} has no base model: its base_model_prefix is {model.base_model_prefix!r}, "
            "and there is no module of that name"
        )
    return base


def _end(root: nn.Module, module: Any, how: str) -> str:
    for path, candidate in root.named_modules():
        if candidate is module and path:
            return path
    raise CannotSplit(f"{type(root).__name__} does not hold what {how} answers with ({type(module).__name__})")


def _depth(model: Any) -> int:
    return int(model.config.num_hidden_layers)


@torch.no_grad()
def _check_causal(model: Any) -> None:
    ids = torch.randint(3, 100, (ROWS, COLUMNS), generator=torch.Generator().manual_seed(0))
    other = ids.clone()
    other[:, -1] = (ids[:, -1] + 1) % 100
    first, second = (model(input_ids=tokens, use_cache=False).logits for tokens in (ids, other))
    if first.shape[:2] != ids.shape:
        raise CannotSplit(f"its logits are {list(first.shape)} for {list(ids.shape)} tokens")
    if not torch.equal(first[:, :-1], second[:, :-1]):
        raise CannotSplit(
            "it is no causal decoder: another last token changes what it says of the tokens before it (an encoder does)"
        )


def _layers(base: Any, config: Any, embeddings: torch.Tensor) -> str:
    """Return the path of the list of layers that a forward runs one after another."""
    depth = config.num_hidden_layers
    lists = {path: module for path, module in base.named_modules() if isinstance(module, nn.ModuleList)}
    lengths = ", ".join(f"{path} ({len(module)})" for path, module in list(lists.items())[:_MAX_SHOWN]) or "none"
    candidates = [path for path, module in lists.items() if len(module) == depth]
    try:
        seen = watch(base, embeddings, ())
    except TypeError as error:
        raise CannotSplit(f"{type(base).__name__}.forward takes no inputs_embeds: {error}") from error
    for path in candidates:
        wanted = [f"{path}.{number}" for number in range(depth)]
        called = [call.path for call in seen.calls if call.path in wanted]
        if called == wanted:
            return path
        if sorted(set(called)) == sorted(wanted):
            raise CannotSplit(
                f"its {depth} layers ({path}) do not run one after another, each once: "
                f"{', '.join(called[: depth + _MAX_SHOWN])}"
            )
    raise CannotSplit(f"it has no list of its {depth} layers that a forward runs; lists of modules: {lengths}")


def _ancestors(path: str) -> list[str]:
    names = path.split(".")
    return [".".join(names[:length]) for length in range(1, len(names))]


def _only_call(seen: Forward, path: str) -> Call:
    calls = seen.of(path)
    if len(calls) != 1:
        raise CannotSplit(f"{path} is called {len(calls)} times in one forward")
    return calls[0]


def _check_chain(layers: Sequence[Call]) -> None:
    """Refuse layers between which more than one tensor passes, or between which something happens."""
    for before, after in zip(layers, layers[1:], strict=False):
        state = next(iter(after.inputs.values()), None)
        if state is None or not before.tensors or not _same(state, before.tensors[0]):
            raise CannotSplit(
                f"{after.path} is not given what {before.path} answered: the model does something between its layers"
            )
    # What every layer is given besides: none of it may be computed from the running state.
    for layer in layers:
        name, *others = layer.inputs
        beside = [other for other in others if layer.inputs[other].requires_grad]
        if beside:
            raise CannotSplit(
                f"{layer.path} is given {', '.join(beside)} besides {name}, computed from the embeddings or from "
                "layers before it; only one tensor crosses a cut"
            )


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one is other or (one.shape == other.shape and torch.equal(one, other))


def _before(base: Any, seen: Forward, first: Call, spine: list[str], parts: Parts) -> None:
    """Sort out the modules that are called before the first layer."""
    embeddings = random_embeddings(base.get_submodule(parts.embedding).weight.shape[1])
    state = next(iter(first.inputs.values()))
    for call in _outermost(seen.calls[: seen.calls.index(first)], parts):
        if not call.tensors:
            continue
        through = call.inputs and any(t.requires_grad for t in call.inputs.values()) and call.tensors[0].requires_grad
        if through:
            parts.skip.append(call.path)
        elif not call.tensors[0].requires_grad:
            entered = _state_of(watch(base, embeddings, spine, {call.path: zeroed}), first.path)
            if not torch.equal(entered, state):
                parts.zero.append(call.path)
    neutral = {**dict.fromkeys(parts.skip, passed), **dict.fromkeys(parts.zero, zeroed)}
    entered = _state_of(watch(base, embeddings, spine, neutral), first.path)
    if not _same(entered, embeddings):
        parts.questions.append(Question("skip_outside_bottom", "what happens to the embeddings before the first layer?", _difference(entered, embeddings)))


def _outermost(calls: Sequence[Call], parts: Parts) -> list[Call]:
    paths = dict.fromkeys(call.path for call in calls if call.outermost and not f"{call.path}.".startswith((f"{parts.embedding}.", f"{parts.layers}.")))
    return [next(call for call in calls if call.path == path) for path in paths]


def _state_of(seen: Forward, path: str) -> torch.Tensor:
    return next(iter(seen.of(path)[0].inputs.values()))


def _after(base: Any, seen: Forward, last: Call, spine: list[str], parts: Parts) -> None:
    """Find the final norm among the modules that are called after the last layer."""
    called = _outermost(seen.calls[seen.calls.index(last) + 1 :], parts)
    through = [call.path for call in called if call.tensors and call.tensors[0].requires_grad]
    embeddings = random_embeddings(base.get_submodule(parts.embedding).weight.shape[1])
    left = watch(base, embeddings, spine, dict.fromkeys(through, passed))
    parts.norm = through[0] if through else ""
    if len(through) != 1:
        parts.questions.append(Question("norm", "which one is the final norm?", f"called after the last layer: {', '.join(through) or 'nothing'}"))
    if not _same(left.hidden, left.of(last.path)[0].tensors[0]):
        parts.questions.append(Question("norm", "what happens after the last layer?", _difference(left.hidden, left.of(last.path)[0].tensors[0])))


def _difference(got: torch.Tensor, expected: torch.Tensor) -> str:
    if got.shape != expected.shape:
        return f"a tensor {list(expected.shape)} becomes {list(got.shape)}"
    ratio = got / expected
    if torch.allclose(ratio, ratio.flatten()[0], rtol=1e-4):
        return f"it is multiplied by {ratio.flatten()[0].item():.6g}"
    return f"it differs by up to {(got - expected).abs().max().item():.3g}"
