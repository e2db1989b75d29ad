"""One call of a component that runs elsewhere, forward and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.autograd.function import once_differentiable
from transformers.modeling_outputs import BaseModelOutputWithPast

from splitlearn_core.build.forward_arguments import RECORDINGS
from splitlearn_core.errors import ConfigurationError, RemoteError, RemoteStepError
from splitlearn_core.family import STATES
from splitlearn_core.hosts.client import Host
from splitlearn_core.hosts.journals import Step
from splitlearn_core.hosts.payload import pack, unpack
from splitlearn_core.hosts.protocol import MAX_TENSORS, Frame, Kind
from splitlearn_core.hosts.training import GRADIENT, OUTPUT, RANDOM_CPU, RANDOM_CUDA
from splitlearn_core.hosts.tuning import Tuning, content_hash

#: What to do about values that are not finite, outside of training.
_IN_USE = (
    "is a value out of the range of its dtype, or are the weights there damaged? splitlearn verify --at PART=URL "
    "compares with the unsplit model"
)


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
        computed: The names of what it computes for the next component besides hidden states.
    """

    host: Host
    component: str
    arguments: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]
    training: bool
    autocast: str | None
    upload: Upload | None
    number: int
    computed: Sequence[str] = ()

    def forward(
        self, crossing: Mapping[str, torch.Tensor], cache: Any = None
    ) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Run the component.

        Args:
            crossing: Hidden states, and what crosses with them.
            cache: The session's cache.

        Returns:
            Its output, and what it computed besides, by name; and the states of the generators before it.
        """
        states = crossing[STATES]
        random = _states_of_generators(states.device) if self.training else {}
        specs, buffers = pack({**crossing, **self.tensors, **random})
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
        outputs = self._outputs(tensors, crossing)
        if self.training:
            _set_generators(tensors, states.device)
        return outputs, random

    def gradients(
        self,
        crossing: Mapping[str, torch.Tensor],
        gradients: Mapping[str, torch.Tensor],
        random: Mapping[str, torch.Tensor],
        wanted: Mapping[str, torch.Tensor],
        *,
        of_input: bool,
        has_cache: bool,
    ) -> dict[str, torch.Tensor]:
        """Return the gradients of the input, by the names of what crosses, and of parameters of adapters."""
        named = {GRADIENT if name == OUTPUT else f"{GRADIENT}.{name}": tensor for name, tensor in gradients.items()}
        self._refuse_infinite(
            {f"a gradient of {name}" if name != OUTPUT else "a gradient": value for name, value in gradients.items()},
            f"came back from the components after the {self.component}, which are here",
        )
        specs, buffers = pack({**crossing, **named, **self.tensors, **random})
        meta = {"arguments": self.arguments, "wanted": list(wanted), "of_input": of_input, **self._meta()}
        meta |= {"has_cache": True} if has_cache else {}
        tensors = unpack(self.host.request(Frame(Kind.BACKWARD, 0, 0, meta, specs, buffers), self.upload))
        expected = {**wanted, **(crossing if of_input else {})}
        result = {
            name: received(tensors, f"{GRADIENT}.{name}", like, like.dtype, self.host.url)
            for name, like in expected.items()
        }
        received_gradients = {f"a gradient of {name}": value for name, value in result.items()}
        self._refuse_infinite(received_gradients, f"came from the {self.component} at {self.host.url}")
        return result

    def _meta(self) -> dict[str, Any]:
        meta: dict[str, Any] = {"training": True} if self.training else {}
        if self.autocast is not None:
            meta["autocast"] = self.autocast
        if self.upload is not None:
            # Whether modules of adapters drop values is a matter of the mode, too.
            meta |= {"training": self.training, "adapter": list(self.upload.names)}
        return meta

    def _outputs(self, tensors: Mapping[str, torch.Tensor], crossing: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        states = crossing[STATES]
        results = {
            OUTPUT if name == STATES else name: received(
                tensors,
                OUTPUT if name == STATES else name,
                crossing[name],
                crossing[name].dtype if self.autocast is None else None,
                self.host.url,
            )
            for name in (STATES, *self.computed)
        }
        # The host of the next component would refuse them in its own name, and a top makes a text of anything.
        named = {"hidden states" if name == OUTPUT else name: value for name, value in results.items()}
        self._refuse_infinite(
            named, f"came from the {self.component} at {self.host.url}", "" if self.training else _IN_USE
        )
        recorded = {
            kind: tuple(tensors[name].to(states.device) for name in tensors if name.startswith(f"{kind}."))
            for kind in RECORDINGS.values()
        }
        if any(self.arguments.get(name) for name in RECORDINGS):
            hidden = cast("Any", results[OUTPUT])
            return {**results, OUTPUT: BaseModelOutputWithPast(last_hidden_state=hidden, **cast("Any", recorded))}
        return results

    def _refuse_infinite(self, tensors: Mapping[str, torch.Tensor], source: str, hint: str = "") -> None:
        # A gradient scaler looks for infinities and NaNs itself, and skips the step.
        if self.autocast == "float16":
            return
        when = f", in call {self.number} of this training" if self.training else ""
        for what, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise RemoteStepError(
                    f"{what} with values that are not finite {source}{when}",
                    code="not_finite",
                    hint=hint
                    or "the optimizer has not stepped: look at the loss and the labels of this batch, "
                    "the learning rate, and the dtype; then zero_grad() and go on, or resume from a checkpoint",
                )


class _RemoteForward(torch.autograd.Function):
    """Hidden states, and what crosses with them, through a host, and the gradients back."""

    @staticmethod
    def forward(
        ctx: Any, call: Call, cache: Any, box: list[Any], names: list[str], crossing: int, *tensors: Any
    ) -> Any:
        # The first tensors cross the cut, the others are parameters.
        ctx.call, ctx.names, ctx.crossing = call, names, crossing
        ctx.has_cache, ctx.cached_tokens = cache is not None, cache.get_seq_length() if cache is not None else 0
        # The parameters too, so that autograd notices if they change before backward.
        ctx.save_for_backward(*tensors)
        entered = {name: tensor.detach() for name, tensor in zip(names[:crossing], tensors, strict=False)}
        outputs, ctx.random = call.forward(entered, cache)
        box.append(outputs)
        return tuple(_state_of(output) for output in outputs.values())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        if ctx.cached_tokens:
            raise ConfigurationError(
                f"a gradient cannot go back through a step after {ctx.cached_tokens} cached tokens, which are at "
                f"{ctx.call.host.url}",
                hint="give the whole sequence in one call, without past_key_values",
            )
        tensors = dict(zip(ctx.names, ctx.saved_tensors, strict=True))
        crossing = {name: tensors.pop(name).detach() for name in ctx.names[: ctx.crossing]}
        needed = dict(zip(ctx.names, ctx.needs_input_grad[5:], strict=True))
        wanted = {name: parameter for name, parameter in tensors.items() if needed[name]}
        # The first step of a session is done again with an empty cache: with none, attention may take another kernel.
        found = ctx.call.gradients(
            crossing,
            dict(zip((OUTPUT, *ctx.call.computed), gradients, strict=True)),
            ctx.random,
            wanted,
            of_input=any(needed[name] for name in crossing),
            has_cache=ctx.has_cache,
        )
        return (None, None, None, None, None, *(found.get(name) if needed[name] else None for name in ctx.names))


def through(
    call: Call, cache: Any, crossing: Mapping[str, torch.Tensor], parameters: Mapping[str, torch.Tensor]
) -> dict[str, Any]:
    """Make a call whose outputs depend on what crosses and on parameters for autograd; return the outputs by name."""
    box: list[dict[str, Any]] = []
    tensors = {**crossing, **parameters}
    states = cast("Any", _RemoteForward).apply(call, cache, box, list(tensors), len(crossing), *tensors.values())
    outputs = box.pop()
    results = dict(zip(outputs, states, strict=True))
    if not isinstance(outputs[OUTPUT], torch.Tensor):
        outputs[OUTPUT].last_hidden_state = results[OUTPUT]
        results[OUTPUT] = outputs[OUTPUT]
    return results


def _state_of(output: Any) -> torch.Tensor:
    return cast("torch.Tensor", output if isinstance(output, torch.Tensor) else output.last_hidden_state)


def received(
    tensors: Mapping[str, torch.Tensor], name: str, like: torch.Tensor, dtype: torch.dtype | None, url: str
) -> torch.Tensor:
    """Return a tensor of the reply of a host, if it has the shape of another and, where that is known, the dtype."""
    tensor = tensors.get(name)
    if tensor is None or tensor.shape != like.shape or dtype not in (None, tensor.dtype):
        what = "nothing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
        raise RemoteError(
            f"{url} returned {what} as {name}, and {dtype or 'a tensor'} {list(like.shape)} was expected",
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
