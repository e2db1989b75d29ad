"""Locate differences: each component is run alone on the hidden states of the unsplit model."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers.utils import ModelOutput

from splitlearn_core import SplitCausalLM
from splitlearn_core.build.bundles import bundled, leaving_layers
from splitlearn_core.build.pruning import Left, base_of
from splitlearn_core.testing.conformance.batches import no_grad
from splitlearn_core.testing.conformance.diagnosis import READ_FOR_TIES, misnamed, misread, undeclared_inlets
from splitlearn_core.testing.conformance.findings import ConformanceError, Suspect
from splitlearn_core.testing.conformance.subject import Subject


def compare(got: torch.Tensor | None, expected: torch.Tensor | None) -> bool:
    """Whether two results are equal bit by bit; two missing results are equal."""
    if got is None or expected is None:
        return got is expected
    return got.shape == expected.shape and torch.equal(got, expected)


def expect_equal(
    got: torch.Tensor | None,
    expected: torch.Tensor | None,
    what: str,
    subject: Subject,
    whole: Any,
    split: SplitCausalLM,
) -> None:
    """Fail if a result of the split model differs, naming the component and the field that cause it.

    Raises:
        ConformanceError: It differs.
    """
    __tracebackhide__ = True
    if not compare(got, expected):
        message, suspects = locate(subject, whole, split)
        raise ConformanceError(f"{what} of the split model differ; {message}", suspects)


def locate(subject: Subject, whole: Any, split: SplitCausalLM) -> tuple[str, tuple[Suspect, ...]]:
    """Find the components that differ if each is given the inputs of the unsplit model."""
    suspects = [*misnamed(subject.family, whole)]
    ids = _plain_ids()
    with watched_layers(whole, subject) as calls:
        logits = no_grad(whole, input_ids=ids, use_cache=False).logits
    states = [hidden for hidden, _ in calls]
    boundaries = [at_cut(calls, part) for part in split.components[1:]]
    inputs, outputs = (ids, *boundaries), (*boundaries, logits)
    wrong: list[str] = []
    for part, state, expected in zip(split.components, inputs, outputs, strict=True):
        result = no_grad(part, **{"input_ids" if part is split.bottom else "hidden_states": state})
        result = result.logits if part is split.top else result
        if different(result, expected):
            wrong.append(str(part.component))
            suspects += _inside(subject, whole, part, state, states)
    if not wrong:
        field = Suspect("nothing in one forward pass", "each component alone is equal without padding and cache")
        return "not in one plain forward pass", tuple(suspects) or (field,)
    return f"given its own input, the {' and the '.join(wrong)} differ", tuple(suspects)


def at_cut(calls: Sequence[Left], part: Any) -> Any:
    """Return what a component takes: hidden states, or a bundle of all that crosses the cut before it.

    Args:
        calls: What the layers of the unsplit model were given.
        part: The component.
    """
    left = calls[part.start_layer :]
    return bundled(*leaving_layers(part.crossing, left, {}, 0)) if part.crossing else left[0][0]


def different(got: Any, expected: Any) -> list[str]:
    """Return the names of the tensors in which two results of a component differ."""
    if isinstance(expected, torch.Tensor):
        return [] if compare(got, expected) else ["hidden_states"]
    given = got if isinstance(got, ModelOutput) else {}
    return [name for name, tensor in expected.items() if not compare(given.get(name), tensor)]


@contextmanager
def watched_layers(model: Any, subject: Subject) -> Iterator[list[Left]]:
    """Record what each layer of a model is given: hidden states, and its arguments by name."""
    calls: list[Left] = []

    def record(layer: Any, args: Any, kwargs: Any) -> None:
        given = {**dict(zip(inspect.signature(layer.forward).parameters, args, strict=False)), **kwargs}
        calls.append((next(iter(given.values())).detach().clone(), given))

    base = model.get_submodule(subject.family.base)
    layers = base.get_submodule(subject.family.layers)
    handles = [
        layer.register_forward_pre_hook(record, with_kwargs=True)
        for number, layer in enumerate(layers)
        if number in getattr(model, "layer_range", range(len(layers)))
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _inside(subject: Subject, whole: Any, part: Any, state: Any, states: list[torch.Tensor]) -> Iterator[Suspect]:
    """Return where inside a component the values begin to differ, given the right input."""
    with watched_layers(part, subject) as own:
        no_grad(part, **{"input_ids" if part.start_layer == 0 else "hidden_states": state})
    first = part.start_layer
    differing = [
        first + number for number, (hidden, _) in enumerate(own) if not compare(hidden, states[first + number])
    ]
    if differing[:1] == [first]:
        yield from _at_the_inlet(subject, whole, part)
        return
    last = differing[0] - 1 if differing else part.end_layer - 1
    layers = part.get_submodule(subject.family.base).get_submodule(subject.family.layers)
    theirs = whole.get_submodule(subject.family.base).get_submodule(subject.family.layers)
    if type(layers[last]) is not type(theirs[last]):
        yield Suspect(
            "uniform_layers", f"layer {last} is a {type(layers[last]).__name__}, not a {type(theirs[last]).__name__}"
        )
    elif part.component == "top" and not differing:
        yield from _at_the_outlet(subject, whole, part, state)
    else:
        yield Suspect("impossible_cuts", f"layer {last} needs state of another component, or its input differs")
        if subject.family.uniform_layers:
            yield Suspect("uniform_layers", f"layer {last} may be made with other arguments than (config, layer_idx)")


def _at_the_outlet(subject: Subject, whole: Any, part: Any, state: Any) -> Iterator[Suspect]:
    """Distinguish the end of the base from the head, in a top whose layers are right."""
    ends: list[torch.Tensor] = []
    bases = (base_of(whole), part.base_model)
    handles = [base.register_forward_hook(lambda *args: ends.append(args[-1].last_hidden_state)) for base in bases]
    try:
        no_grad(whole, input_ids=_plain_ids(), use_cache=False)
        no_grad(part, hidden_states=state)
    finally:
        for handle in handles:
            handle.remove()
    if compare(*ends):
        yield Suspect("head", "all layers of the top and its base are right, but what follows is not")
        yield from misread(subject.family, whole.config, READ_FOR_TIES)
    else:
        yield Suspect("norm", "all layers of the top are right, but the end of its base is not")


def _plain_ids() -> torch.Tensor:
    return torch.arange(3, 10).reshape(1, -1)


def _at_the_inlet(subject: Subject, whole: Any, part: Any) -> Iterator[Suspect]:
    if part.component == "bottom":
        yield Suspect("embedding", "the input of the bottom's first layer differs from that in the whole model")
        return
    suspects = [*misnamed(subject.family, whole), *undeclared_inlets(subject.family, whole)]
    yield from suspects
    if not suspects and not subject.family.enter_at_layers:
        yield Suspect("enter_at_layers", f"the input of the {part.component} is changed outside any module: set True")
