"""Derive the parts of a tiny model, and its tensors' names on disk, by observing it and not by guessing from names."""

from __future__ import annotations

import inspect
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from splitlearn_auto.findings import CannotSplitError, Question
from splitlearn_auto.observing import (
    COLUMNS,
    ROWS,
    Call,
    Forward,
    Replacement,
    nothing,
    passed,
    random_embeddings,
    watch,
    with_noise,
    zeroed,
)
from splitlearn_core.extension import BATCH, LAYERS, SEQUENCE, STATES, base_of, reason

_MAX_SHOWN = 6
#: Relative difference that another order of summation may cause.
_ROUNDING = 1e-4
#: Dimensions of the hidden states.
_STATE = 3
#: Arguments of a forward that models do without.
_USUAL_ARGUMENTS = frozenset(
    {"input_ids", "inputs_embeds", "attention_mask", "position_ids", "token_type_ids", "use_cache", "return_dict"}
    | {"cache", "past_key_values", "cache_position", "output_attentions", "output_hidden_states"}
)
_ROTARY = "rotary_emb.inv_freq"
#: Without numbers: those of a small model's layers are not those of others.
_LITERAL = re.compile(r"(?:[A-Za-z_]\w*)(?:\\?\.[A-Za-z_]\w*)+")
#: Training mode, and words for messages: some functions (dropout) act only in training.
_MODES = ((False, ""), (True, " in training"))


@dataclass(slots=True)
class Parts:
    """The parts of a model, as in the fields of :class:`ModelFamily`."""

    base: str
    layers: str = ""
    embedding: str = ""
    norm: str = ""
    head: str = ""
    zero_outside_bottom: list[str] = field(default_factory=list)
    skip_outside_bottom: list[str] = field(default_factory=list)
    skip_outside_top: list[str] = field(default_factory=list)
    enter_at_layers: bool = False
    leave_at_layers: bool = False
    before_head: list[str] = field(default_factory=list)
    head_bias: str = ""
    layers_return_tuple: bool = False
    #: What crosses a cut, where that is more than hidden states ``[batch, sequence, hidden_size]``: the name of an
    #: argument of the layers -> its dimensions, sizes for those that are neither batch nor sequence.
    crossing: dict[str, tuple[str | int, ...]] = field(default_factory=dict)
    layer_results: tuple[str, ...] = ()
    #: Arguments of the forward that the model computes from token ids -> what layers take of them, by its name.
    zero_arguments: dict[str, str] = field(default_factory=dict)
    #: The name of a module in layers that share it -> the numbers of the layers that share each.
    shared: dict[str, list[list[int]]] = field(default_factory=dict)
    #: Field -> the evidence for it.
    reasons: dict[str, str] = field(default_factory=dict)
    questions: list[Question] = field(default_factory=list)


def derive_parts(model: Any) -> Parts:
    """Find the parts of a causal language model by observing its forward pass.

    Args:
        model: A tiny model with random weights, in evaluation mode.

    Raises:
        CannotSplitError: The model is not a chain of layers connected by one tensor, with the reason.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    base, config = _base(model), model.config.get_text_config(decoder=True)
    parts = Parts(_end(model, base, "base_model"))
    parts.embedding = _end(base, model.get_input_embeddings(), "get_input_embeddings()")
    parts.head = _end(model, model.get_output_embeddings(), "get_output_embeddings()")
    called = check_causal(model)
    parts.before_head = [
        path
        for path in _around_head(model, parts)
        # In a composite model, others are those for images or sound.
        if config is model.config or any(f"{name}.".startswith(f"{path}.") for name in called)
    ]
    parts.head_bias = next((name for name in _biases_around(parts.head) if _is_parameter(model, name)), "")
    embeddings = random_embeddings(model.get_input_embeddings().weight.shape[1])
    zeros = _zero_arguments(base, embeddings)
    try:
        parts.layers = _layers(base, config, embeddings, zeros)
    except CannotSplitError:
        raise
    except Exception:
        # For embeddings without the tokens that they are of, the code of a model may raise anything.
        refuse_tokens_in_layers(model)
        raise
    parts.shared = _shared_modules(base.get_submodule(parts.layers), parts.layers)
    # The modules around layers and embedding take tokens, and are no steps of their own.
    frame = _Frame(base, embeddings, [*_ancestors(parts.layers), *_ancestors(parts.embedding)], zeros)
    seen = frame.watch()
    depth = int(config.num_hidden_layers)
    layers = [_only_call(seen, f"{parts.layers}.{number}") for number in range(depth)]
    parts.layers_return_tuple = not isinstance(layers[0].output, torch.Tensor)
    _chain(frame, seen, layers, parts)
    parts.zero_arguments = {name: _taken_of(frame, layers[0], name, parts) for name in zeros}
    _before(frame, seen, layers[0], parts)
    _after(frame, seen, layers[-1], parts)
    return parts


def _around_head(model: Any, parts: Parts) -> Iterator[str]:
    """Yield the paths of the modules with parameters next to the head, or to a module around it."""
    for around in ("", *_ancestors(parts.head)):
        for name, module in model.get_submodule(around).named_children():
            path = f"{around}.{name}".lstrip(".")
            inside = any(f"{end}.".startswith(f"{path}.") for end in (parts.base, parts.head))
            if not inside and any(True for _ in module.parameters()):
                yield path


def _biases_around(head: str) -> Iterator[str]:
    return (f"{path}.bias" for path in _ancestors(head))


def _is_parameter(model: Any, name: str) -> bool:
    return any(name == other for other, _ in model.named_parameters(remove_duplicate=False))


@dataclass(frozen=True, slots=True)
class _Frame:
    """The constant arguments of all forward passes."""

    base: Any
    embeddings: torch.Tensor
    spine: list[str]
    #: Of what the model computes from token ids, which it is not given.
    zeros: Mapping[str, torch.Tensor]

    def watch(self, replaced: Mapping[str, Replacement] | None = None, training: bool = False) -> Forward:
        return watch(self.base, self.embeddings, self.spine, replaced, training=training, arguments=self.zeros)


def _base(model: Any) -> Any:
    base = base_of(model)
    if base is model:
        raise CannotSplitError(
            f"{type(model).__name__} has no base model: its base_model_prefix is {model.base_model_prefix!r}, "
            "and there is no module of that name"
        )
    return base


def _end(root: nn.Module, module: Any, how: str) -> str:
    for path, candidate in root.named_modules():
        if candidate is module and path:
            return str(path)
    raise CannotSplitError(f"{type(root).__name__} does not contain what {how} returns ({type(module).__name__})")


@torch.no_grad()
def check_causal(model: Any) -> set[str]:
    """Refuse a model in which tokens change what comes before them; returns the names of the modules that ran.

    Raises:
        CannotSplitError: It is such a model.
    """
    called: set[str] = set()
    hooks = [
        module.register_forward_pre_hook(lambda *_, name=name: called.add(name))
        for name, module in model.named_modules()
    ]
    ids = torch.randint(3, 100, (ROWS, COLUMNS), generator=torch.Generator().manual_seed(0))
    other = ids.clone()
    other[:, -1] = (ids[:, -1] + 1) % 100
    try:
        first, second = (model(input_ids=tokens, use_cache=False).logits for tokens in (ids, other))
    finally:
        for hook in hooks:
            hook.remove()
    if first.shape[:2] != ids.shape:
        raise CannotSplitError(f"its logits are {list(first.shape)} for {list(ids.shape)} tokens")
    before, at_last = (float((first[:, span] - second[:, span]).abs().max()) for span in (slice(-1), slice(-1, None)))
    # With a tolerance: the order of summation over experts depends on the tokens. In a composite model (PaliGemma),
    # the tokens of a prompt may see each other.
    if before > _ROUNDING * at_last and model.config.get_text_config(decoder=True) is model.config:
        raise CannotSplitError(
            "it is not a causal decoder: the last token changes the logits of the tokens before it (as in an encoder)"
        )
    return called


def _zero_arguments(base: Any, embeddings: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return a zero for the argument without which a model does not run on embeddings: it computes that from ids."""
    optional = [
        name
        for name, parameter in inspect.signature(base.forward).parameters.items()
        if parameter.default is None and name not in _USUAL_ARGUMENTS
    ]
    for zeros in ({}, *({name: torch.zeros(())} for name in optional)):
        try:
            watch(base, embeddings, (), arguments=zeros)
        except Exception:  # noqa: BLE001, S112  # for embeddings of no token and for zeros, a model may raise anything
            continue
        return zeros
    return {}


def _taken_of(frame: _Frame, first: Call, name: str, parts: Parts) -> str:
    """Return what layers take of an argument of the forward.

    Raises:
        CannotSplitError: It is not one tensor for each token.
    """
    ones = _Frame(frame.base, frame.embeddings, frame.spine, {**frame.zeros, name: torch.ones(())})
    other = _only_call(ones.watch(), first.path).inputs
    taken = [key for key in parts.crossing if key != STATES and not _same(first.inputs[key], other[key])]
    if len(taken) != 1:
        raise CannotSplitError(
            f"it computes {name} from the ids of tokens, of which its layers take {', '.join(taken) or 'nothing'}"
        )
    return taken[0]


def _layers(base: Any, config: Any, embeddings: torch.Tensor, zeros: Mapping[str, torch.Tensor]) -> str:
    """Return the path of the list of layers that a forward pass runs one after another."""
    depth = config.num_hidden_layers
    lists = {path: module for path, module in base.named_modules() if isinstance(module, nn.ModuleList)}
    lengths = ", ".join(f"{path} ({len(module)})" for path, module in list(lists.items())[:_MAX_SHOWN]) or "none"
    candidates = [path for path, module in lists.items() if len(module) == depth]
    try:
        seen = watch(base, embeddings, (), arguments=zeros)
    except TypeError as error:
        raise CannotSplitError(f"{type(base).__name__}.forward takes no inputs_embeds: {reason(error)}") from error
    for path in candidates:
        wanted = [f"{path}.{number}" for number in range(depth)]
        called = [call.path for call in seen.calls if call.path in wanted]
        if called == wanted:
            return str(path)
        if sorted(set(called)) == sorted(wanted):
            raise CannotSplitError(
                f"its {depth} layers ({path}) do not run one after another, each once: "
                f"{', '.join(called[: depth + _MAX_SHOWN])}"
            )
        if called:
            others = ", ".join(str(number) for number, layer in enumerate(wanted) if layer not in called)
            raise CannotSplitError(
                f"text alone passes by layers of its {depth} ({path}: {others}), which are for images or sound"
            )
    for path, module in lists.items():
        wanted = [f"{path}.{number}" for number in range(len(module))]
        if len(wanted) > 1 and [call.path for call in seen.calls if call.path in wanted] == wanted:
            raise CannotSplitError(
                f"its forward runs {len(wanted)} layers ({path}), and its configuration counts {depth} "
                "(num_hidden_layers): a layer is not one place in the cache"
            )
    raise CannotSplitError(f"it has no list of its {depth} layers that a forward runs; lists of modules: {lengths}")


@torch.no_grad()
def refuse_tokens_in_layers(model: Any) -> None:
    """Refuse a model whose layers are given the ids of tokens, by which they look up embeddings or experts.

    Raises:
        CannotSplitError: It is such a model.
    """
    ids = torch.arange(3, 10).reshape(1, -1)
    taken: dict[str, str] = {}

    def look(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for argument, value in (*enumerate(args), *kwargs.items()):
            if isinstance(value, torch.Tensor) and not value.is_floating_point() and torch.equal(value, ids):
                taken.setdefault(name, str(argument))

    depth = model.config.get_text_config(decoder=True).num_hidden_layers
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, args, kwargs, name=f"{path}.{number}": look(name, args, kwargs), with_kwargs=True
        )
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth
        for number, layer in enumerate(module)
    ]
    try:
        model(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    if taken:
        name, argument = next(iter(taken.items()))
        raise CannotSplitError(
            f"its layers are given the ids of tokens ({argument} of {name}), which they look up, and which do not "
            "leave the bottom"
        )


def _shared_modules(layers: nn.Module, path: str) -> dict[str, list[list[int]]]:
    """Find the modules that layers share: a file has their tensors once, for layers in different components, too.

    Raises:
        CannotSplitError: Layers share tensors outside such modules.
    """
    holders: dict[int, list[str]] = {}
    for name, parameter in layers.named_parameters(remove_duplicate=False):
        holders.setdefault(id(parameter), []).append(name)
    shared: dict[str, list[list[int]]] = {}
    for names in holders.values():
        numbers, inside = zip(*(name.split(".", 1) for name in names), strict=True)
        module, group = inside[0].partition(".")[0], [int(number) for number in numbers]
        if len(group) > 1 and ({*inside} != {inside[0]} or not inside[0].startswith(f"{module}.")):
            raise CannotSplitError(f"{path} share a tensor under different names: {', '.join(names)}")
        if (len(group) > 1 or module in shared) and group not in shared.setdefault(module, []):
            shared[module].append(group)
    for module, groups in shared.items():
        having = [*chain.from_iterable(groups)]
        if len(having) > len({*having}):
            raise CannotSplitError(f"{path} share a part of {module}, and another part is each layer's own")
    return shared


def _ancestors(path: str) -> list[str]:
    names = path.split(".")
    return [".".join(names[:length]) for length in range(1, len(names))]


def _only_call(seen: Forward, path: str) -> Call:
    calls = seen.of(path)
    if len(calls) != 1:
        raise CannotSplitError(f"{path} is called {len(calls)} times in one forward")
    return calls[0]


def _chain(frame: _Frame, seen: Forward, layers: Sequence[Call], parts: Parts) -> None:
    """Find what crosses from layer to layer; refuse layers that have operations between them."""
    for before, after in pairwise(layers):
        if not before.tensors or not _same(after.state, before.tensors[0]):
            raise CannotSplitError(
                f"the input of {after.path} is not the output of {before.path}: something is computed between"
            )
    shape = layers[0].state.shape
    dimensions = _dimensions(shape)
    if not dimensions or any(layer.state.shape != shape or layer.tensors[0].shape != shape for layer in layers):
        raise CannotSplitError(
            f"its hidden states are not [batch, sequence, hidden]: they are {list(shape)} for {ROWS} rows of "
            f"{COLUMNS} tokens"
        )
    if len(shape) != _STATE:
        parts.crossing[STATES] = dimensions
    # What is computed from the hidden states besides crosses, too, unless no layer uses it.
    others = dict.fromkeys(
        name for layer in layers for name in list(layer.inputs)[1:] if layer.inputs[name].requires_grad
    )
    paths = [layer.path for layer in layers]
    ignored = {
        argument for argument in dict.fromkeys(map(_argument_of, others)) if _ignore(frame, seen, paths, argument)
    }
    for name in others:
        if _argument_of(name) not in ignored:
            _describe_other(frame, layers, name, parts)


def _dimensions(shape: Sequence[int]) -> tuple[str | int, ...]:
    """Name batch and sequence, which follow one another, among the dimensions; empty if they are not there."""
    for place in range(len(shape) - 1):
        if tuple(shape[place : place + 2]) == (ROWS, COLUMNS):
            return (*shape[:place], BATCH, SEQUENCE, *shape[place + 2 :])
    return ()


def _describe_other(frame: _Frame, layers: Sequence[Call], name: str, parts: Parts) -> None:
    """Describe what layers take besides hidden states: of the layer before, or from before the first layer.

    Raises:
        CannotSplitError: It is computed between the layers, or is no tensor for each token.
    """
    taken = [layer.inputs[name] for layer in layers if name in layer.inputs]
    dimensions = _dimensions(taken[0].shape)
    refusal = CannotSplitError(
        f"{next(layer.path for layer in layers if name in layer.inputs)} takes {name} besides hidden states, which is "
        "neither what the layer before returned, nor computed before the first layer"
    )
    if name.isidentifier() and any(tensor.shape != taken[0].shape for tensor in taken):
        raise CannotSplitError(f"its layers take {name} besides hidden states, whose shape changes between them")
    if not name.isidentifier() or not dimensions:
        raise refusal
    place = len(parts.layer_results) + 1
    results = [layer.tensors[place] for layer in layers[:-1] if len(layer.tensors) > place]
    if len(taken) == len(results) == len(layers) - 1 and all(map(_same, taken, results)):
        parts.layer_results = (*parts.layer_results, name)
        parts.crossing[name] = dimensions
        return
    without = frame.watch({layers[0].path: zeroed})
    unchanged = [call.inputs.get(name) for layer in layers for call in without.of(layer.path) if name in layer.inputs]
    if len(unchanged) != len(taken) or not all(
        other is not None and _same(tensor, other) for tensor, other in zip(taken, unchanged, strict=True)
    ):
        raise refusal
    if all(_same(taken[0], tensor) for tensor in taken):
        parts.crossing[name] = dimensions
    elif dimensions[:2] == (BATCH, SEQUENCE):
        parts.crossing[name] = (*dimensions[:2], LAYERS, *dimensions[2:])
    else:
        raise refusal


def _argument_of(name: str) -> str:
    """Return the argument that a tensor is in."""
    return re.split(r"[.\[]", name, maxsplit=1)[0]


def _ignore(frame: _Frame, seen: Forward, paths: Sequence[str], argument: str) -> bool:
    """Return whether the result is the same with noise in place of what layers take by an argument."""
    try:
        return _same(frame.watch(dict.fromkeys(paths, partial(with_noise, argument))).hidden, seen.hidden)
    # The code of the layers may raise any exception for what it does not find.
    except Exception:  # noqa: BLE001
        return False


def _same(first: torch.Tensor, second: torch.Tensor) -> bool:
    return first is second or (first.shape == second.shape and torch.equal(first, second))


def _before(frame: _Frame, seen: Forward, first: Call, parts: Parts) -> None:
    """Classify the modules that are called before the first layer."""
    state = first.state
    parts.skip_outside_bottom += _uncalled(frame, seen, parts)
    for call in _outermost(seen.calls[: seen.calls.index(first)], parts):
        if not call.tensors or not call.tensors[0].is_floating_point():
            continue
        if not call.tensors[0].requires_grad:
            # Independent of the embeddings: relevant if zeros change the input of the first layer.
            without = frame.watch({call.path: zeroed})
            has_values = any(True for _ in frame.base.get_submodule(call.path).parameters())
            if not torch.equal(without.of(first.path)[0].state, state):
                parts.zero_outside_bottom.append(call.path)
            elif has_values and not _same(without.hidden, seen.hidden):
                raise CannotSplitError(
                    f"its layers take what {call.path} computes, whose values are in the file: every component would "
                    "need it"
                )
        elif any(tensor.requires_grad for tensor in call.inputs.values()):
            parts.skip_outside_bottom.append(call.path)
    _parameters(frame, seen, first, parts)
    own_width = frame.embeddings.shape[-1]
    widths = {seen.of(path)[0].tensors[0].shape[-1] for path in parts.skip_outside_bottom if seen.of(path)}
    if not parts.crossing and state.shape[-1] not in {own_width, *widths}:
        # Several streams of hidden states, next to one another.
        parts.crossing[STATES] = (BATCH, SEQUENCE, state.shape[-1])
    if parts.crossing:
        # Hidden states enter at the layers.
        return
    neutral = {
        **dict.fromkeys(parts.skip_outside_bottom, passed),
        **dict.fromkeys(parts.zero_outside_bottom, nothing),
    }
    # As wide as the hidden states, whose width may differ from that of the embeddings.
    inside = _Frame(frame.base, random_embeddings(state.shape[-1]), frame.spine, frame.zeros)
    for training, when in _MODES:
        try:
            entered = inside.watch(neutral, training).of(first.path)[0].state
        except RuntimeError:
            added = ", ".join(parts.zero_outside_bottom)
            parts.enter_at_layers = True
            parts.reasons["enter_at_layers"] = f"Not just added to the embeddings: {added}."
            return
        if not _same(entered, inside.embeddings):
            parts.enter_at_layers = True
            parts.reasons["enter_at_layers"] = (
                f"Outside any module, before the first layer{when}: {_difference(entered, inside.embeddings)}."
            )
            return


def _parameters(frame: _Frame, seen: Forward, first: Call, parts: Parts) -> None:
    """Find the ends among the parameters of the base module itself: those that hidden states meet before a layer."""
    for name, parameter in frame.base.named_parameters(recurse=False):
        own = parameter.data
        parameter.data = torch.full_like(own, 0.5)
        try:
            changed = frame.watch()
        finally:
            parameter.data = own
        if not torch.equal(changed.of(first.path)[0].state, first.state):
            parts.skip_outside_bottom.append(name)
            parts.enter_at_layers = True
        else:
            parts.skip_outside_top.append(name)
            parts.leave_at_layers = True


def _uncalled(frame: _Frame, seen: Forward, parts: Parts) -> list[str]:
    """Return the modules with parameters that text does not pass through (encoders of images): the bottom has them."""
    called = {call.path for call in seen.calls}
    ends = (parts.embedding, parts.layers)
    uncalled = []
    for around in ("", *frame.spine):
        prefix = f"{around}." if around else ""
        for name, module in frame.base.get_submodule(around).named_children():
            path = f"{prefix}{name}"
            inside = (path, *ends, *called)
            if not any(f"{each}.".startswith(f"{path}.") for each in inside[1:]) and any(
                True for _ in module.parameters()
            ):
                uncalled.append(path)
    return uncalled


def _outermost(calls: Sequence[Call], parts: Parts) -> list[Call]:
    """Return the first outermost call of each module outside embedding and layers."""
    excluded = (f"{parts.embedding}.", f"{parts.layers}.")
    first_calls: dict[str, Call] = {}
    for call in calls:
        if call.outermost and not f"{call.path}.".startswith(excluded):
            first_calls.setdefault(call.path, call)
    return list(first_calls.values())


def _after(frame: _Frame, seen: Forward, last: Call, parts: Parts) -> None:
    """Find the final norm among the modules that are called after the last layer."""
    called = _outermost(seen.calls[seen.calls.index(last) + 1 :], parts)
    through = [call.path for call in called if call.tensors and call.tensors[0].requires_grad]
    # A pooler, say, whose result is none of the hidden states.
    aside = [path for path in through if _same(frame.watch({path: zeroed}).hidden, seen.hidden)]
    parts.skip_outside_bottom += aside
    through = [path for path in through if path not in aside]
    twice = sorted({*through} & {*parts.skip_outside_bottom, *parts.zero_outside_bottom})
    if twice and not any(True for path in twice for _ in frame.base.get_submodule(path).parameters()):
        parts.skip_outside_bottom = [path for path in parts.skip_outside_bottom if path not in twice]
        parts.enter_at_layers = parts.leave_at_layers = True
        parts.reasons["leave_at_layers"] = f"Called before the first layer and after the last: {', '.join(twice)}."
    elif twice:
        raise CannotSplitError(
            f"{', '.join(twice)} is called before the first layer and after the last, so that both ends would need it"
        )
    parts.norm, after = (through[0], through[1:]) if through else ("", [])
    parts.skip_outside_top = [*after, *parts.skip_outside_top]
    if parts.crossing:
        # Hidden states leave at the layers.
        return
    for training, when in _MODES:
        left = frame.watch(dict.fromkeys(through, passed), training)
        answer = left.of(last.path)[0].tensors[0]
        if not _same(left.hidden, answer):
            question = f"what happens after the last layer{when}?"
            parts.questions.append(Question("norm", question, _difference(left.hidden, answer)))
            return


def _difference(got: torch.Tensor, expected: torch.Tensor) -> str:
    if got.shape != expected.shape:
        return f"a tensor {list(expected.shape)} becomes {list(got.shape)}"
    got, expected = got.detach(), expected.detach()
    ratio = got / expected
    if torch.allclose(ratio, ratio.flatten()[0], rtol=1e-4):
        return f"the hidden states are multiplied by {ratio.flatten()[0].item():.6g}"
    return f"the hidden states differ by up to {(got - expected).abs().max().item():.3g}"


@torch.no_grad()
def layers_take(model: Any, parts: Parts) -> torch.dtype:
    """Return the dtype of the hidden states between the layers of a model."""
    dtypes: list[torch.dtype] = []
    layer = model.get_submodule(f"{parts.base}.{parts.layers}.1")
    handle = layer.register_forward_pre_hook(
        lambda _, args, kwargs: dtypes.append(next(iter((*args, *kwargs.values()))).dtype), with_kwargs=True
    )
    with handle:
        model(input_ids=torch.ones(1, 3, dtype=torch.long), use_cache=False)
    return dtypes[0]


def ignored_suffixes(model: Any) -> tuple[str, ...]:
    """Return the suffixes of tensors of old checkpoints that transformers ignores."""
    patterns = [str(pattern) for pattern in sorted(model._keys_to_ignore_on_load_unexpected or ())]  # noqa: SLF001
    literal = [pattern.replace("\\", "") for pattern in patterns if _LITERAL.fullmatch(pattern)]
    if any(name.endswith(_ROTARY) for name, _ in model.named_buffers()):
        literal.append(_ROTARY)
    keys = [f".{key}" for key in model.state_dict()]
    return tuple(f".{suffix}" for suffix in literal if not any(key.endswith(f".{suffix}") for key in keys))


def keeps_float32(model: Any) -> bool:
    """Return whether transformers keeps tensors in float32 in a model of a narrower dtype."""
    return bool(model._keep_in_fp32_modules or model._keep_in_fp32_modules_strict)  # noqa: SLF001


def has_float32(model: Any) -> bool:
    """Return whether tensors of a narrower model are in float32."""
    return any(tensor.dtype == torch.float32 for tensor in model.state_dict().values())


def saved_tensors(model: Any) -> dict[str, torch.Tensor]:
    """Return the tensors of a model as transformers writes them, by their names in the file."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        files = list(Path(folder).glob("*.safetensors"))
        # In memory of their own, like the model's: the last bit of a small product may depend on the alignment.
        return {key: tensor.clone() for file in files for key, tensor in load_file(file).items()}


def renamed_keys(model: Any, saved: Mapping[str, torch.Tensor]) -> tuple[tuple[str, str], ...] | None:
    """Return the parts of names that differ between disk and module, as pairs ``(on disk, in the module)``.

    None if tensors of the module are made of others in the file.
    """
    inside = model.state_dict()
    pairs: dict[tuple[str, str], None] = {}
    for key in sorted(saved.keys() - inside.keys()):
        origin = next((name for name, tensor in inside.items() if _same(tensor, saved[key])), None)
        if origin is not None:
            pairs[_different_parts(key, origin)] = None
    foreign = {_renamed(key, pairs) for key in saved} - inside.keys()
    return None if foreign else tuple(pairs)


def _different_parts(key: str, name: str) -> tuple[str, str]:
    """Return the different parts of two names of a tensor, cut at the dots."""
    on_disk, in_module = key.split("."), name.split(".")
    while len(on_disk) > 1 and len(in_module) > 1 and on_disk[-1] == in_module[-1]:
        on_disk, in_module = on_disk[:-1], in_module[:-1]
    after = "." if on_disk != key.split(".") else ""
    shared = 0
    while shared < min(len(on_disk), len(in_module)) - 1 and on_disk[shared] == in_module[shared]:
        shared += 1
    before = "." if shared else ""
    old, new = (f"{before}{'.'.join(names[shared:])}{after}" for names in (on_disk, in_module))
    return old, new


def _renamed(key: str, pairs: Iterable[tuple[str, str]]) -> str:
    for old, new in pairs:
        key = key.replace(old, new)
    return key
