"""Cache layers whose content is at a host: stand-ins that know lengths, and hand changes on to the session."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, cast

import torch
from transformers import cache_utils

from splitlearn_core.build.kv_cache import (
    counts_tokens,
    empty_states,
    holds_state,
    preserved,
    refuse_crop,
)
from splitlearn_core.errors import ConfigurationError
from splitlearn_core.hosts.facts import CACHE_KINDS, INPUTS, Facts
from splitlearn_core.hosts.journals import RemoteSession


@contextmanager
def restored(whole: Any) -> Iterator[None]:
    """Restore the cache of a whole model if a component fails, so that the call can be repeated.

    Args:
        whole: A cache with local layers and layers at a host; or None.

    Raises:
        ConfigurationError: The layers have different lengths: an earlier failure could not be undone.
    """
    layers = [] if whole is None else list(whole.layers)
    lengths = {layer.get_seq_length() for layer in layers if hasattr(layer, "get_seq_length")}
    if len(lengths) > 1:
        raise ConfigurationError(
            f"the layers of this cache have {' and '.join(map(str, sorted(lengths)))} tokens: a step failed half-way, "
            "or two threads use it",
            hint="start again with an empty cache, one for each thread",
        )
    length = max(lengths, default=0)
    # Where tokens cannot be removed from the cache at a host, its session forgets the step, and is rebuilt.
    states = {layer.session: layer.session.steps for layer in layers if _is_uncountable(layer)}
    before = [
        (layer, preserved(layer)) for layer in layers if not isinstance(layer, MirroredLayer) or layer.session in states
    ]
    # Some classes of cache keep running states in a list of their own.
    listed = list(getattr(whole, "linear_cache", ()))
    try:
        yield
    except BaseException:
        if hasattr(whole, "linear_cache"):
            whole.linear_cache[:] = listed
        for layer, state in before:
            vars(layer).clear()
            vars(layer).update(state)
        for session, steps in states.items():
            if session.steps > steps:
                session.undo()
        opened = [] if whole is None else whole.layers
        uncountable = {layer.session for layer in opened if _is_uncountable(layer)}
        for layer in opened:
            if isinstance(layer, MirroredLayer):
                if isinstance(layer, _Following) or layer.session in states:
                    continue
                if layer.session in uncountable:
                    layer.reset()
                    continue
                # A sliding window that has moved on cannot be restored: the next call is refused.
                with contextlib.suppress(RuntimeError, ValueError):
                    cast("Any", layer).crop(length - cast("Any", layer).get_seq_length())
            elif not isinstance(layer, MirroredLayer) and layer not in layers:
                cast("Any", layer).reset()
        raise


def _is_uncountable(layer: Any) -> bool:
    """Return whether a layer is one at a host that has more than keys and values, or nothing."""
    return isinstance(layer, MirroredLayer) and (holds_state(layer) or not counts_tokens(layer))


class MirroredLayer:
    """A cache layer whose keys and values are at a host; it only knows its length and number of rows.

    Changes of the cache (beam search reorders it, speculative decoding crops it) are applied to small stand-ins by
    transformers' own code, and go to the host with the next step.
    """

    session: RemoteSession
    #: Whether this layer records changes for the session.
    _records = False
    keys: torch.Tensor | None
    values: torch.Tensor | None

    def advance(self, rows: int, tokens: int) -> None:
        """Grow by an executed step."""
        stand_in = torch.empty(rows, 1, tokens, 1, dtype=torch.uint8)
        super().update(stand_in, stand_in)  # type: ignore[misc]  # of the layer that it is mixed into

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """Raise: keys and values are not in this process."""
        raise ConfigurationError(
            f"this cache belongs to a component at {self.session.host.url}, and was passed to one that runs here",
            hint="give each component a cache from its own new_cache()",
        )

    def offload(self) -> None:
        """Do nothing: there is nothing to move."""

    def prefetch(self) -> None:
        """Do nothing: there is nothing to move."""

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        super().reorder_cache(beam_idx.cpu())  # type: ignore[misc]  # of the layer that it is mixed into
        self._record("reorder", beam_idx.tolist)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices.cpu())  # type: ignore[misc]  # of the layer that it is mixed into
        rows = indices.nonzero().reshape(-1) if indices.dtype == torch.bool else indices
        self._record("select", rows.tolist)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]  # of the layer that it is mixed into
        self._record("repeat", lambda: repeats)

    def crop(self, *args: Any) -> None:
        before = cast("Any", self).get_seq_length()
        super().crop(*args)  # type: ignore[misc]  # of the layer that it is mixed into
        self._record("remove", lambda: before - cast("Any", self).get_seq_length())

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]  # of the layer that it is mixed into
        if self._records:
            # Earlier pending changes are void.
            self.session.changes = [("reset", None)]

    def activate_past_recording(self) -> None:
        activate = getattr(super(), "activate_past_recording", None)
        if activate is not None:
            activate()
        if self._records:
            self.session.changes.append(("record", None))

    def _record(self, name: str, value: Callable[[], Any]) -> None:
        if self._records and cast("Any", self).keys is not None:
            self.session.changes.append((name, value()))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        other = object.__new__(type(self))
        memo[id(self)] = other
        # Stand-ins are replaced, never written to, so copies may share them.
        vars(other).update(vars(self))
        # All layers of the copy share one copied session.
        other.session = copy.deepcopy(self.session, memo)
        return other


class _Stateful(MirroredLayer):
    """The same for layers with a running state, with or without keys and values."""

    #: Whether the state is one from which tokens can be removed.
    removable: bool

    def advance(self, rows: int, tokens: int) -> None:
        if counts_tokens(self):
            super().advance(rows, tokens)
        layer: Any = self
        layer.device = torch.device("cpu")
        # Not written to: copies share them.
        layer.conv_states = {0: torch.empty(rows, 1, 1, dtype=torch.uint8)}
        layer.is_conv_states_initialized = {0: True}
        layer.recurrent_states = {0: None if self.removable else layer.conv_states[0]}
        layer.is_recurrent_states_initialized = {0: not self.removable}
        layer.has_previous_state = dict.fromkeys(layer.has_previous_state, True)
        layer.number_of_states = 1

    def crop(self, tokens: int) -> None:
        """Remove the last tokens, given as a negative number.

        Raises:
            ConfigurationError: The state cannot go back.
        """
        if tokens:
            refuse_crop([self], "start again with an empty cache")
        self._record("remove", lambda: -tokens)

    def reset(self) -> None:
        # Not written to: copies share them.
        vars(self).update(preserved(self))
        empty_states(self)
        super().reset()

    def _record(self, name: str, value: Callable[[], Any]) -> None:
        if self._records and any(cast("Any", self).has_previous_state.values()):
            self.session.changes.append((name, value()))


class _Empty(MirroredLayer):
    """The same for a layer that caches nothing."""

    def advance(self, rows: int, tokens: int) -> None:
        """Do nothing: it stays empty."""

    def crop(self, tokens: int) -> None:
        """Do nothing but let the host count, where there are no other layers."""
        if self._records:
            self.session.changes.append(("remove", -tokens))


class _Following:
    """A layer that shares the state of a leading layer of its kind, which is changed once for all of them."""

    #: The leading layer. Not in the shared state: it would refer to itself, and its session would end only when
    #: the garbage collector finds the cycle.
    __slots__ = ("leader",)
    leader: Any

    def advance(self, rows: int, tokens: int) -> None:
        """Do nothing: the leader grows."""

    reorder_cache = batch_select_indices = batch_repeat_interleave = crop = reset = activate_past_recording = (
        lambda self, *args: None
    )

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        other = _follower(copy.deepcopy(self.leader, memo))
        memo[id(self)] = other
        return other


_NOTHING = CACHE_KINDS["DummyLayer"]
_STATE = CACHE_KINDS["LinearAttentionLayer"]


@cache
def _class_of(kind: str, *first: type[Any]) -> type[Any]:
    """Return the class of stand-ins for layers of a kind: transformers' own, with ours before it."""
    name = next((name for name, own in CACHE_KINDS.items() if own == kind), "LinearAttentionLayer")
    mirrored = _Empty if kind == _NOTHING else _Stateful if kind.startswith(_STATE) or kind == INPUTS else MirroredLayer
    own = getattr(cache_utils, name, None)
    if own is None:
        raise ConfigurationError(
            f"the layers at this host cache what this version of transformers has no class for: {kind}",
            hint="install the version of transformers that the host has",
        )
    return type(f"Mirrored{name}", (*first, mirrored, own), {})


def _leader(kind: str, window: int, session: RemoteSession) -> Any:
    layer: Any = _class_of(kind)(**({"sliding_window": window} if window else {}))
    layer.session, layer.kind, layer.removable = session, kind, kind == INPUTS
    return layer


def _follower(leader: Any) -> Any:
    layer: Any = object.__new__(_class_of(leader.kind, _Following))
    # One shared state: otherwise each step would change a stand-in for every layer.
    layer.__dict__ = leader.__dict__
    layer.leader = leader
    return layer


def mirrored_layers(facts: Facts, session: RemoteSession) -> list[Any]:
    """Return stand-ins for the cache layers of a session; those that cache alike share one state."""
    leaders: dict[tuple[str, int], Any] = {}
    layers: list[Any] = []
    for kind in zip(facts.caches, facts.windows, strict=True):
        if kind in leaders:
            layers.append(_follower(leaders[kind]))
        else:
            leaders[kind] = _leader(*kind, session)
            layers.append(leaders[kind])
    # Of the leaders that hold something, the first.
    recording = next((leader for (kind, _), leader in leaders.items() if kind != _NOTHING), layers[0])
    recording._records = True  # noqa: SLF001  # its own class
    return layers
