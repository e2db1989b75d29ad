"""One call of a component that runs elsewhere, forward and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.autograd.function import once_differentiable
from transformers.modeling_outputs import BaseModelOutputWithPast

from splitlearn_core.build.forward_arguments import RECORDINGS
from splitlearn_core.errors import ConfigurationError, RemoteError, RemoteStepError
from splitlearn_core.hosts.client import Host, Step
from splitlearn_core.hosts.payload import pack, unpack
from splitlearn_core.hosts.protocol import MAX_TENSORS, Frame, Kind
from splitlearn_core.hosts.training import RANDOM_CPU, RANDOM_CUDA
from splitlearn_core.hosts.tuning import Tuning, content_hash


class Upload:
    """Adapters as they are now, in pieces that a host keeps by the hashes of their content.

    Args:
        tuning: The adapters; their parameters are copied, since they may change before a piece is sent again.
        max_payload: Bytes of one message.
        earlier: The same adapters as they were before, which the host need not keep any more.
    """

    def __init__(self, tuning: Tuning, max_payload: int, earlier: Upload | None = None) -> None:
        self.description = tuning.description
        self._pieces = [
            {name: tensor.detach().clone() for name, tensor in piece.items()}
            for piece in _pieces(tuning.parameters, max_payload)
        ]
        #: The hashes, of the description first.
        self.names = (
            content_hash(self.description, {}),
            *(content_hash(None, piece) for piece in self._pieces),
        )
        self.replaces = tuple(name for name in (earlier.names if earlier else ()) if name not in self.names)

    def frames(self) -> Iterator[tuple[str, Frame]]:
        """Yield each hash with the request that brings its piece."""
        yield self.names[0], Frame(Kind.PUT, meta={"description": self.description})
        for name, piece in zip(self.names[1:], self._pieces, strict=True):
            specs, buffers = pack(piece)
            yield name, Frame(Kind.PUT, meta={"replaces": list(self.replaces)}, tensors=specs, buffers=buffers)


def _pieces(tensors: Mapping[str, torch.Tensor], most: int) -> list[dict[str, torch.Tensor]]:
    pieces: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if pieces[-1] and (size + tensor.nbytes > most or len(pieces[-1]) == MAX_TENSORS):
            pieces.append({})
            size = 0
        pieces[-1][name] = tensor
        size += tensor.nbytes
    return pieces


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a remote component, with everything that is sent to its host.

    Attributes:
        host: Where it goes.
        component: The component's name.
        arguments, tensors: The arguments of its forward besides hidden states.
        training: Whether it runs in training mode.
        autocast: torch's name of the dtype of autocast; None without.
        upload: The adapters; None without.
        number: How many calls there have been in training mode, for messages.
    """

    host: Host
    component: str
    arguments: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]
    training: bool
    autocast: str | None
    upload: Upload | None
    number: int

    def forward(self, states: torch.Tensor, cache: Any = None) -> tuple[Any, dict[str, torch.Tensor]]:
        """Run the component; return its output, and the states of the generators before it."""
        random = _states_of_generators(states.device) if self.training else {}
        specs, buffers = pack({"hidden_states": states, **self.tensors, **random})
        if cache is None:
            frame = Frame(Kind.STEP, 0, 0, {"arguments": self.arguments, **self._meta()}, specs, buffers)
            reply = self.host.request(frame, self.upload)
        else:
            step = Step.of(self.arguments, specs, buffers, self._meta(), self.upload)
            reply = cast("Any", cache.layers[0]).session.step(step, states.shape[0])
            for layer in cache.layers:
                layer.advance(states.shape[0], states.shape[1])
            cache.advance(states.shape[1])
        tensors = unpack(reply)
        output = self._output(tensors, states)
        if self.training:
            _set_generators(tensors, states.device)
        return output, random

    def gradients(
        self,
        states: torch.Tensor,
        gradient: torch.Tensor,
        random: Mapping[str, torch.Tensor],
        wanted: Mapping[str, torch.Tensor],
        *,
        of_input: bool,
        has_cache: bool,
    ) -> dict[str, torch.Tensor]:
        """Return the gradients of the input, as ``hidden_states``, and of parameters of adapters."""
        self._refuse_infinite(
            {"": gradient}, f"came back from the components after the {self.component}, which are here"
        )
        specs, buffers = pack({"hidden_states": states, "gradient": gradient, **self.tensors, **random})
        meta = {"arguments": self.arguments, "wanted": list(wanted), "of_input": of_input, **self._meta()}
        meta |= {"has_cache": True} if has_cache else {}
        tensors = unpack(self.host.request(Frame(Kind.BACKWARD, 0, 0, meta, specs, buffers), self.upload))
        expected = {**wanted, **({"hidden_states": states} if of_input else {})}
        result = {name: received(tensors, f"gradient.{name}", like, like.dtype) for name, like in expected.items()}
        self._refuse_infinite(result, f"came from the {self.component} at {self.host.url}")
        return result

    def _meta(self) -> dict[str, Any]:
        meta: dict[str, Any] = {"training": True} if self.training else {}
        if self.autocast is not None:
            meta["autocast"] = self.autocast
        if self.upload is not None:
            # Whether modules of adapters drop values is a matter of the mode, too.
            meta |= {"training": self.training, "adapter": list(self.upload.names)}
        return meta

    def _output(self, tensors: Mapping[str, torch.Tensor], states: torch.Tensor) -> Any:
        hidden = received(tensors, "output", states, states.dtype if self.autocast is None else None)
        if self.training:
            self._refuse_infinite({"output": hidden}, f"came from the {self.component} at {self.host.url}")
        recorded = {
            kind: tuple(tensors[name].to(states.device) for name in tensors if name.startswith(f"{kind}."))
            for kind in RECORDINGS.values()
        }
        if not any(self.arguments.get(name) for name in RECORDINGS):
            return hidden
        return BaseModelOutputWithPast(last_hidden_state=cast("Any", hidden), **cast("Any", recorded))

    def _refuse_infinite(self, tensors: Mapping[str, torch.Tensor], source: str) -> None:
        # A gradient scaler looks for infinities and NaNs itself, and skips the step.
        if self.autocast == "float16":
            return
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                what = "hidden states" if name == "output" else f"a gradient{f' of {name}' if name else ''}"
                raise RemoteStepError(
                    f"{what} with values that are not finite {source}, in call {self.number} of this training",
                    code="not_finite",
                    hint="the optimizer has not stepped: look at the loss and the labels of this batch, "
                    "the learning rate, and the dtype; then zero_grad() and go on, or resume from a checkpoint",
                )


class _RemoteForward(torch.autograd.Function):
    """Hidden states through a host, and the gradients back."""

    @staticmethod
    def forward(
        ctx: Any, call: Call, cache: Any, box: list[Any], names: list[str], hidden: torch.Tensor, *parameters: Any
    ) -> Any:
        ctx.call, ctx.names = call, names
        ctx.has_cache, ctx.cached_tokens = cache is not None, cache.get_seq_length() if cache is not None else 0
        # The parameters too, so that autograd notices if they change before backward.
        ctx.save_for_backward(hidden, *parameters)
        output, ctx.random = call.forward(hidden.detach(), cache)
        box.append(output)
        return output if isinstance(output, torch.Tensor) else output.last_hidden_state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        if ctx.cached_tokens:
            raise ConfigurationError(
                f"a gradient cannot go back through a step after {ctx.cached_tokens} cached tokens, which are at "
                f"{ctx.call.host.url}",
                hint="give the whole sequence in one call, without past_key_values",
            )
        hidden, *parameters = ctx.saved_tensors
        of_input, *needed = ctx.needs_input_grad[4:]
        wanted = {
            name: parameter
            for name, parameter, is_needed in zip(ctx.names, parameters, needed, strict=True)
            if is_needed
        }
        # The first step of a session is done again with an empty cache: with none, attention may take another kernel.
        gradients = ctx.call.gradients(
            hidden.detach(), gradient, ctx.random, wanted, of_input=of_input, has_cache=ctx.has_cache
        )
        return (None, None, None, None, gradients.get("hidden_states"), *(gradients.get(name) for name in ctx.names))


def through(call: Call, cache: Any, hidden: torch.Tensor, parameters: Mapping[str, torch.Tensor]) -> Any:
    """Make a call whose output depends on hidden states and parameters for autograd; return the output."""
    box: list[Any] = []
    state = cast("Any", _RemoteForward).apply(call, cache, box, list(parameters), hidden, *parameters.values())
    output = box.pop()
    if isinstance(output, torch.Tensor):
        return state
    output.last_hidden_state = state
    return output


def received(
    tensors: Mapping[str, torch.Tensor], name: str, like: torch.Tensor, dtype: torch.dtype | None
) -> torch.Tensor:
    """Return a tensor of a reply, if it has the shape of another one and, where that is known, the dtype."""
    tensor = tensors.get(name)
    if tensor is None or tensor.shape != like.shape or dtype not in (None, tensor.dtype):
        what = "nothing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
        raise RemoteError(
            f"the host returned {what} as {name}, and {dtype or 'a tensor'} {list(like.shape)} was expected",
            code="malformed",
        )
    return tensor.to(like.device)


def _states_of_generators(device: torch.device) -> dict[str, torch.Tensor]:
    states = {RANDOM_CPU: torch.get_rng_state()}
    if device.type == "cuda":
        states[RANDOM_CUDA] = torch.cuda.get_rng_state(device)
    return states


def _set_generators(tensors: Mapping[str, torch.Tensor], device: torch.device) -> None:
    """Set the generators to the states that they had at the host after the call."""
    try:
        torch.set_rng_state(tensors[RANDOM_CPU])
        if RANDOM_CUDA in tensors and device.type == "cuda":
            torch.cuda.set_rng_state(tensors[RANDOM_CUDA], device)
    except (KeyError, RuntimeError, TypeError) as error:
        raise RemoteError("the host returned no states of generators", code="malformed") from error
