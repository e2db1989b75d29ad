"""The attacks: what a server with the public checkpoint, or with query access to the bottom, can do with messages."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

#: Candidates that are computed in one batch.
_BATCH = 512
#: Steps of the solver of :func:`labels_of`.
_SOLVER_STEPS = 60
_WINDOWS_AT_ONCE, _WIDTH = 32, 128

#: Turns messages ``[windows, positions, hidden]`` into token ids ``[windows, positions]``.
Inverter = Callable[[torch.Tensor], torch.Tensor]


class VocabularyMatching:
    """Tries tokens at the public bottom, one position after the other, and takes the one that fits best.

    Args:
        bottom: The bottom of the checkpoint.
        vocabulary: The number of tokens.
        candidates: Tokens that are tried in their context at each position: those that fit best without it.
        is_scaled: Whether messages are scaled by an unknown factor, since they are clipped.
    """

    def __init__(self, bottom: Any, vocabulary: int, candidates: int, *, is_scaled: bool) -> None:
        # Float32 is more precise, and faster on processors without half precision.
        self._bottom = copy.deepcopy(bottom).float()
        self._count = min(candidates, vocabulary)
        self._fit = _fit_of_directions if is_scaled else _fit_of_values
        self._alone: torch.Tensor | None = None
        if self._count < vocabulary:
            # Behind one token, since the states of the first position are often unlike all others.
            first = self._bottom.new_cache()
            self._bottom(input_ids=torch.zeros(1, 1, dtype=torch.long), past_key_values=first)
            self._alone = self._states(torch.arange(vocabulary), first)
        self._vocabulary = vocabulary

    def recover(self, message: torch.Tensor) -> torch.Tensor:
        """Return the tokens of a message ``[positions, hidden]``."""
        cache, tokens = self._bottom.new_cache(), []
        for state in message.float():
            choice = torch.arange(self._vocabulary)
            if self._alone is not None:
                choice = self._fit(state, self._alone).topk(self._count).indices
            fits = self._fit(state, self._states(choice, cache))
            token = choice[fits.argmax()]
            self._bottom(input_ids=token.reshape(1, 1), past_key_values=cache)
            tokens.append(token)
        return torch.stack(tokens)

    def _states(self, tokens: torch.Tensor, cache: Any) -> torch.Tensor:
        """Return the bottom's states for alternative next tokens after a cache."""
        states = []
        for part in torch.split(tokens, _BATCH):
            past = copy.deepcopy(cache)
            if past.get_seq_length():
                past.batch_repeat_interleave(len(part))
            states.append(self._bottom(input_ids=part[:, None], past_key_values=past)[:, 0].float())
        return torch.cat(states)


def trained_inverter(kind: str, messages: torch.Tensor, tokens: torch.Tensor, *, steps: int, seed: int) -> Inverter:
    """Train an inverter on messages whose text is known.

    Args:
        kind: ``linear``, which sees one position, or ``GRU``, which also sees the earlier ones.
        messages: ``[windows, positions, hidden]``.
        tokens: ``[windows, positions]``.
        steps: Training steps.
        seed: The seed of its initial weights, and of the order of the messages.
    """
    vocabulary, classes = torch.unique(tokens, return_inverse=True)
    mean, deviation = messages.mean((0, 1)), messages.std((0, 1)).clamp(min=1e-6)
    order = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _Network(kind, messages.shape[-1], len(vocabulary))
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.01 if kind == "linear" else 0.003)
    inputs = (messages - mean) / deviation
    with torch.enable_grad():
        for _ in range(steps):
            rows = torch.randint(len(inputs), (_WINDOWS_AT_ONCE,), generator=order)
            loss = nn.functional.cross_entropy(network(inputs[rows]).flatten(0, 1), classes[rows].flatten())
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()

    def recover(unknown: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return cast("torch.Tensor", vocabulary[network((unknown - mean) / deviation).argmax(-1)])

    return recover


class _Network(nn.Module):
    def __init__(self, kind: str, width: int, classes: int) -> None:
        super().__init__()
        self.memory = nn.GRU(width, _WIDTH, batch_first=True) if kind == "GRU" else None
        self.head = nn.Linear(width if self.memory is None else width + _WIDTH, classes)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        if self.memory is not None:
            states = torch.cat((states, self.memory(states)[0]), -1)
        return cast("torch.Tensor", self.head(states))


def labels_of(top: Any, states: torch.Tensor, gradient: torch.Tensor, *, noise: float, is_scaled: bool) -> torch.Tensor:
    """Return the labels that the gradient at the last cut was computed for: all tokens of the text but the first.

    The server made ``states``, and computes with the public top what each label would add to the gradient of the
    normed states before the head. That gradient is found by least squares from the one that arrived.

    Args:
        top: The top of the checkpoint.
        states: What the last trunk returned, ``[1, positions, hidden]``.
        gradient: Its gradient, as received.
        noise: The standard deviation of the noise in the gradient.
        is_scaled: Whether the gradient is scaled by an unknown factor.
    """
    top, states, gradient = copy.deepcopy(top).float(), states.float(), gradient.float()
    # The other attention kernels cannot be differentiated twice.
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        states = states.detach().clone().requires_grad_()
        output = top.without_head(states)
        normed = output if isinstance(output, torch.Tensor) else output.last_hidden_state
        norm_gradient = torch.zeros_like(normed, requires_grad=True)
        (back,) = torch.autograd.grad(normed, states, norm_gradient, create_graph=True)
    with torch.no_grad():
        weight = top.get_output_embeddings().weight.detach()
        logits = top(hidden_states=states.detach()).logits.float()
        count = states.shape[1] - 1
        expected = logits.softmax(-1) @ weight
    typical = float((expected[0, :-1, None] - weight[None, :1]).square().mean().sqrt()) / count

    def apply(value: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(normed, states, value.to(normed), retain_graph=True)[0].double()

    def transposed(value: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(back, norm_gradient, value.to(back), retain_graph=True)[0].double()

    solution = _least_squares(apply, transposed, gradient.double(), damping=noise / typical)
    differences = expected[0, :-1] - count * solution[0, :-1].float()
    if not is_scaled:
        return torch.cdist(differences, weight).argmin(-1)
    labels = []
    for position, direction in enumerate(solution[0, :-1].float()):
        labels.append(_fit_of_directions(direction, expected[0, position] - weight).argmax())
    return torch.stack(labels)


def _least_squares(
    apply: Callable[[torch.Tensor], torch.Tensor],
    transposed: Callable[[torch.Tensor], torch.Tensor],
    target: torch.Tensor,
    damping: float,
) -> torch.Tensor:
    """Minimise ``|apply(x) - target|^2 + damping^2 |x|^2`` by conjugate gradients on the normal equations."""
    solution = torch.zeros_like(target)
    residual = target.clone()
    slope = transposed(residual)
    direction, size = slope.clone(), slope.square().sum()
    first = size.clone()
    for _ in range(_SOLVER_STEPS):
        if size <= 1e-20 * first or not size:  # solved to the last bit
            break
        image = apply(direction)
        step = size / (image.square().sum() + damping**2 * direction.square().sum())
        solution += step * direction
        residual -= step * image
        slope = transposed(residual) - damping**2 * solution
        before, size = size, slope.square().sum()
        direction = slope + size / before * direction
    return solution


def _fit_of_values(state: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
    return -(candidates - state).square().sum(-1)


def _fit_of_directions(state: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
    return nn.functional.cosine_similarity(candidates, state[None], dim=-1)
