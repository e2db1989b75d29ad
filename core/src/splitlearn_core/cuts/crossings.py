"""The cuts of one model in use: they treat outgoing hidden states, and gradients on their way back."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch.autograd.function import once_differentiable

from splitlearn_core.build.kv_cache import cached_tokens
from splitlearn_core.cut_stage import GRADIENTS, STATES, Crossing, CutStage
from splitlearn_core.cuts.cut import Cut, Stages
from splitlearn_core.cuts.ledger import EVALUATION, GENERATION, TRAINING, PrivacyLedger, Release
from splitlearn_core.cuts.quantization import quantized
from splitlearn_core.cuts.secret_noise import Draws, SecretNoise, gaussian, gaussian_bytes, in_backward
from splitlearn_core.errors import ConfigurationError
from splitlearn_core.types import Component

_Cross = Callable[[int, torch.Tensor], torch.Tensor]
#: Whether ``generate`` runs in this context.
_GENERATING: ContextVar[bool] = ContextVar("splitlearn_generating", default=False)

_DIGEST_BYTES = 16


class Crossings:
    """The cuts of a model, their noise, and the ledger of what was released.

    Args:
        cuts: One for each cut.
        count: The number of cuts that the model has.
        ledger: Counts releases; by default a new one.

    Raises:
        ConfigurationError: Their number differs from that of the cuts.
    """

    def __init__(self, cuts: Sequence[Cut], count: int, ledger: PrivacyLedger | None = None) -> None:
        if isinstance(cuts, Cut) or len(cuts) != count or not all(isinstance(cut, Cut) for cut in cuts):
            described = cuts if isinstance(cuts, Cut) else f"{len(cuts)}: {list(cuts)}"
            raise ConfigurationError(
                f"a model with {count} cuts was given cuts={described}",
                hint=f"give one for each: cuts=[{', '.join(['Cut(...)'] * count)}]; Cut() changes nothing"
                + ("" if ledger is None else ", and a ledger counts what they release"),
            )
        if ledger is not None and not isinstance(ledger, PrivacyLedger):
            raise ConfigurationError(
                f"ledger is a {type(ledger).__name__}", hint="give a PrivacyLedger, or leave it out"
            )
        self.cuts = tuple(cuts)
        self.ledger = PrivacyLedger() if ledger is None else ledger
        self._ways: dict[tuple[int, str], _Way] = {}
        for number, cut in enumerate(cuts):
            # Hidden states at the last cut and gradients at the first come from the server, and are not treated.
            if count == 1 or number < count - 1:
                self._ways[number, STATES] = _Way(number, STATES, cut)
            if count == 1 or number > 0:
                self._ways[number, GRADIENTS] = _Way(number, GRADIENTS, cut)

    def __deepcopy__(self, memo: dict[int, Any]) -> Crossings:
        # A copy with the same key would add equal noise to other values, and the difference would cancel it.
        return Crossings(self.cuts, len(self.cuts), self.ledger)

    def __reduce__(self) -> Any:
        return Crossings, (self.cuts, len(self.cuts), self.ledger)

    @contextmanager
    def forward(
        self, parts: Sequence[Any], rows: torch.Tensor | None, cache: Any, *, is_training: bool
    ) -> Iterator[_Cross]:
        """Surround a forward of the whole model; see :func:`crossing`."""
        purpose = TRAINING if is_training else EVALUATION
        if _GENERATING.get() or _is_continued(cache):
            purpose = GENERATION
        # The owner's only parameters in a trunk are adapters, which are computed from the server's replies.
        ends = [part for part in parts if part.kind is not Component.TRUNK]
        is_trained = purpose == TRAINING and any(p.requires_grad for part in ends for p in part.parameters())
        windows = [] if rows is None else [self.ledger.window(_raw_bytes(row)) for row in rows]
        failed = True
        try:
            yield partial(self._cross, forward=_Forward(purpose, windows, is_trained))
            failed = False
        finally:
            for way in self._ways.values():
                way.draws.finish(failed=failed)

    def _cross(self, number: int, hidden: torch.Tensor, *, forward: _Forward) -> torch.Tensor:
        way = self._ways.get((number, STATES))
        if way is not None:
            draw, is_repeated = way.draws.of(_digest(hidden))
            if not (is_repeated or in_backward()):
                self.ledger.count(forward.release(way), forward.windows)
            hidden = way.treated(hidden, draw)
        way = self._ways.get((number, GRADIENTS))
        if way is None or not hidden.requires_grad:
            return hidden
        return cast("torch.Tensor", cast("Any", _Back).apply(hidden, self._on_the_way_back(way, forward)))

    def _on_the_way_back(self, way: _Way, forward: _Forward) -> Callable[[torch.Tensor], torch.Tensor]:
        made: dict[bytes, int] = {}

        def treat(gradient: torch.Tensor) -> torch.Tensor:
            digest = _digest(gradient)
            if digest not in made:
                # Repeating a backward pass on the same graph sends the same bytes.
                made[digest] = way.draws.source.next_draw()
                self.ledger.count(forward.release(way), forward.windows)
            return way.treated(gradient, made[digest])

        return treat


def _is_continued(cache: Any) -> bool:
    """Return whether a cache holds tokens; that of continuous batching has no layers."""
    if cache is None:
        return False
    return bool(cached_tokens(cache) if hasattr(cache, "layers") else cache.get_seq_length())


def crossing(
    crossings: Crossings | None, parts: Sequence[Any], rows: torch.Tensor | None, cache: Any, *, is_training: bool
) -> AbstractContextManager[_Cross]:
    """Surround a forward of a whole model.

    Args:
        crossings: Its cuts; None to treat and count nothing.
        parts: The components.
        rows: Token ids, or their embeddings.
        cache: The cache that the forward continues.
        is_training: The model's mode.

    Returns:
        A context with a function that takes the number of a cut, from 0 on, and passes hidden states across it. Their
        gradient will come back across it.
    """
    if crossings is None:
        return nullcontext(lambda number, hidden: hidden)
    return crossings.forward(parts, rows, cache, is_training=is_training)


@contextmanager
def generating() -> Iterator[None]:
    """Count releases in this context as generation."""
    before = _GENERATING.set(True)
    try:
        yield
    finally:
        _GENERATING.reset(before)


@dataclass(frozen=True, slots=True)
class _Forward:
    """The purpose of a forward of the model, and its text."""

    purpose: str
    windows: list[bytes]
    trained_ends: bool

    def release(self, way: _Way) -> Release:
        stages = way.stages
        return Release(
            self.purpose, way.number, way.what, stages.clip, stages.noise, way.cut.seed is not None, self.trained_ends
        )


class _Way:
    """One direction across one cut."""

    def __init__(self, number: int, what: str, cut: Cut) -> None:
        self.number, self.what, self.cut = number, what, cut
        self.stages: Stages = cut.of(what)
        self.draws = Draws(SecretNoise(cut.seed, f"{what} {number}"))

    def treated(self, values: torch.Tensor, draw: int) -> torch.Tensor:
        """Return the values to send; gradients flow through clipping, and pass the other stages unchanged."""
        stages, dtype = self.stages, values.dtype
        if stages == Stages():
            return values
        # The sum of squares over a whole window would overflow in half precision.
        values = values.to(torch.promote_types(dtype, torch.float32))
        if stages.clip is not None:
            norms = torch.linalg.vector_norm(values, dim=(1, 2), keepdim=True)
            values = values * (stages.clip / norms.clamp(min=stages.clip))
        if stages.noise is not None:
            data = self.draws.source.read(draw, gaussian_bytes(values.shape))
            values = values + gaussian(data, values.shape).mul_(stages.noise).to(values)
        values = values.to(dtype)
        crossing = Crossing(self.number, self.what, lambda count: self.draws.source.read(draw, count, "stages"))
        for stage in stages.others:
            values = _unchanged_back(values, partial(_applied, stage, crossing))
        if stages.quantize is not None:
            encoding = stages.quantize
            values = _unchanged_back(values, lambda x: quantized(x, encoding))
        return values


class _Back(torch.autograd.Function):
    """Passes hidden states unchanged, and treats their gradient."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, treat: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        ctx.treat = treat
        return hidden.view_as(hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return ctx.treat(gradient.detach()), None


class _Straight(torch.autograd.Function):
    """Replaces values, and passes the gradient unchanged."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, replace: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        return replace(values.detach())

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return gradient, None


def _unchanged_back(values: torch.Tensor, replace: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    return cast("torch.Tensor", cast("Any", _Straight).apply(values, replace))


def _applied(stage: CutStage, crossing: Crossing, values: torch.Tensor) -> torch.Tensor:
    result: Any = stage.apply(values.clone(), crossing)
    if not isinstance(result, torch.Tensor) or result.shape != values.shape or result.dtype != values.dtype:
        what = f"{result.dtype} {list(result.shape)}" if isinstance(result, torch.Tensor) else type(result).__name__
        raise ConfigurationError(
            f"the stage {stage.name!r} at cut {crossing.cut} returned {what} instead of {values.dtype} "
            f"{list(values.shape)}",
            hint="a stage keeps shape and dtype; report it to the authors of its package",
        )
    return result


def _raw_bytes(tensor: torch.Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return cast("memoryview", memoryview(cast("Any", flat.numpy())))


def _digest(tensor: torch.Tensor) -> bytes:
    return hashlib.blake2b(_raw_bytes(tensor), digest_size=_DIGEST_BYTES).digest()
