"""Steps of packed sessions that run together: the next tokens of each in one forward of the component."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from splitlearn_core.build.component import ComponentModel
from splitlearn_core.build.kv_cache import PartCache
from splitlearn_core.build.packing import PackItem, can_pack, packed
from splitlearn_core.errors import RemoteError
from splitlearn_core.hosts.protocol import Frame
from splitlearn_core.hosts.training import failures_named

log = logging.getLogger(__name__)

#: Tokens of a prompt in one forward: few where other sessions have one token each, so that these do not wait for long.
_SHARED_CHUNK, _CHUNK = 16, 256
_MASK_DIMENSIONS = 2
#: The arguments that a shared forward can take for each session.
_ARGUMENTS = frozenset({"attention_mask", "position_ids", "past_key_values"})


@dataclass(slots=True, eq=False)
class PendingStep:
    """A step of a packed session. It runs in one or more forwards until it has its reply."""

    frame: Frame
    owner: str
    limits: Any
    #: The reply, in the end; a refusal is one.
    reply: Frame | None = None
    #: Set when the caller has given up: the session is left as it was before.
    is_abandoned: bool = False
    #: What has begun: the state of its session, and the inputs.
    begun: BegunStep | None = None

    def end(self, reply: Frame) -> None:
        """Note the reply, and drop the cache from before: freeing it takes milliseconds, here in a thread for calls."""
        self.reply, self.begun = reply, None


@dataclass(slots=True, eq=False)
class BegunStep:
    """The inputs of a step, the tokens that were run, and how to end it."""

    hidden: torch.Tensor
    #: The session's own.
    cache: PartCache
    attention_mask: torch.Tensor | None
    position_ids: torch.Tensor | None
    requested_at: float
    #: Ends the step: with its result, or with an error and the session as it was.
    succeed: Callable[[BegunStep, Frame], Frame]
    fail: Callable[[RemoteError | None], Frame]
    done: int = 0
    outputs: list[torch.Tensor] = field(default_factory=list)
    began_at: float | None = None
    computed: float = 0.0
    #: The most sessions that shared one of its forwards.
    sessions: int = 1

    @property
    def remaining(self) -> int:
        return self.hidden.shape[1] - self.done

    @property
    def rows(self) -> int:
        return self.hidden.shape[0]


def allows_packs(component: ComponentModel) -> bool:
    """Return whether steps of several sessions can share a forward of a component."""
    return can_pack(component.family, component.decoder_config, component.new_cache().layers)


def fits_a_pack(hidden: torch.Tensor, inputs: dict[str, Any], cached_rows: int) -> bool:
    """Return whether a step has no arguments but those that a shared forward takes.

    Raises:
        RemoteError: It cannot run at all, and would make a shared forward fail for others.
    """
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    rows, tokens = hidden.shape[:2]
    problems = []
    if cached_rows not in (0, rows):
        problems.append(f"the cache has {cached_rows} sequences")
    if isinstance(positions, torch.Tensor) and tuple(positions.shape) not in ((1, tokens), (rows, tokens)):
        problems.append(f"position_ids are {list(positions.shape)}")
    if problems:
        raise RemoteError(
            f"hidden_states are {list(hidden.shape)}, and {' and '.join(problems)}",
            code="bad_input",
            hint="give as many sequences as the cache has, and a position for each new token",
        )
    given = {name for name, value in inputs.items() if value is not None}
    is_plain = mask is None or (isinstance(mask, torch.Tensor) and mask.dim() == _MASK_DIMENSIONS)
    return given <= _ARGUMENTS and is_plain


def advance(
    component: ComponentModel, steps: Sequence[BegunStep], clock: Callable[[], float]
) -> dict[int, RemoteError]:
    """Run the next tokens of each step; return the errors of those that failed, by their place.

    Where a shared forward fails, each step runs alone, so that none suffers from another one.
    """
    before = [step.cache.copy() for step in steps]
    began_at = clock()
    try:
        with failures_named():
            outputs = _forward(component, steps)
    except RemoteError as error:
        for step, saved in zip(steps, before, strict=True):
            for layer, own in zip(step.cache.layers, saved.layers, strict=True):
                vars(layer).update(vars(own))
            step.cache.past = saved.past
        if len(steps) == 1:
            return {0: error}
        log.info("A pack of %d sessions failed; each runs alone: %s", len(steps), error.message)
        failed = ({place: advance(component, [step], clock).get(0)} for place, step in enumerate(steps))
        return {place: error for item in failed for place, error in item.items() if error is not None}
    ended_at = clock()
    for step, output in zip(steps, outputs, strict=True):
        step.outputs.append(output)
        step.done += output.shape[1]
        step.began_at = began_at if step.began_at is None else step.began_at
        step.computed += ended_at - began_at
        step.sessions = max(step.sessions, len(steps))
    return {}


def _forward(component: ComponentModel, steps: Sequence[BegunStep]) -> list[torch.Tensor]:
    """Run one forward; return the hidden states ``[rows, tokens, hidden]`` of each step's next tokens."""
    waits = len(steps) > 1 and any(step.remaining * step.rows <= _SHARED_CHUNK for step in steps)
    most = _SHARED_CHUNK if waits else _CHUNK
    items, states = [], []
    for step in steps:
        tokens = min(step.remaining, max(1, most // step.rows))
        part = slice(step.done, step.done + tokens)
        mask, positions = step.attention_mask, step.position_ids
        if mask is not None:
            mask = mask[:, : mask.shape[1] - step.remaining + tokens]
        items.append(PackItem(step.rows, tokens, step.cache, mask, None if positions is None else positions[:, part]))
        states.append(step.hidden[:, part].reshape(1, -1, step.hidden.shape[-1]))
    flat = torch.cat(states, dim=1)
    with packed(component.decoder_config, items, flat) as (positions, cache):
        output = component(hidden_states=flat, position_ids=positions, past_key_values=cache)
    for step, item in zip(steps, items, strict=True):
        step.cache.advance(item.tokens)
    parts = torch.split(output, [item.rows * item.tokens for item in items], dim=1)
    return [part.reshape(item.rows, item.tokens, -1) for item, part in zip(items, parts, strict=True)]
