"""Training at a host: adapters that were sent, and calls in the mode, and with the random numbers, of their caller.

Nothing is kept that could not be lost: adapters come by the hash of their content, and a request that names one which
is not here any more gets the code ``unknown_adapter``, after which it is sent again.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.func import functional_call

from splitlearn_core.build.component import ComponentModel
from splitlearn_core.errors import ConfigurationError, RemoteError, RemoteStepError
from splitlearn_core.family import STATES
from splitlearn_core.hosts.payload import unpack
from splitlearn_core.hosts.protocol import Frame
from splitlearn_core.hosts.tuning import build_adapted, content_hash, fit_tensors, frozen_copy
from splitlearn_core.plan.crossing import computed
from splitlearn_core.quoting import said
from splitlearn_core.types import human_bytes

log = logging.getLogger(__name__)

#: Tensors of a frame with the state of a generator.
RANDOM_CPU, RANDOM_CUDA = "random.cpu", "random.cuda"
#: Names in a frame: of a component's output (what else leaves it has its own name), and the prefix of gradients.
OUTPUT, GRADIENT = "output", "gradient"
#: Adapted copies of the component that are kept, one for each description of adapters.
_MAX_COPIES = 16
#: Pieces that one adapter is sent in.
_MAX_PIECES = 256
#: In the message of the RuntimeError of an allocation that fails on the processor.
_CPU_ALLOCATOR = "DefaultCPUAllocator"
_AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}
#: One computation draws random numbers at a time: torch's generator of a device is the whole process's.
_DRAWING = threading.Lock()


@dataclass(frozen=True, slots=True)
class TrainingLimits:
    """Limits of what users may train at a host."""

    #: Whether adapters, training mode and gradients are allowed at all.
    training: bool = True
    #: Backward passes of one owner, and tokens in them; None for no limit.
    training_steps: int | None = None
    training_tokens: int | None = None
    #: Bytes of adapters that are kept for one owner.
    adapter_bytes: int = 2**30
    #: Bytes of adapters of all owners together.
    all_adapter_bytes: int = 4 * 2**30


@dataclass(frozen=True, slots=True)
class Mode:
    """The mode of one call: training or evaluation, autocast, and adapters."""

    training: bool | None
    autocast: str | None
    adapter: tuple[str, ...]

    @classmethod
    def of(cls, meta: Mapping[str, Any]) -> Mode:
        """Read the mode from the meta of a frame.

        Raises:
            RemoteStepError: It is not a mode.
        """
        training, autocast = meta.get("training"), meta.get("autocast")
        if training not in (None, True, False) or not (
            autocast is None or (isinstance(autocast, str) and autocast in _AUTOCAST)
        ):
            raise RemoteStepError("training or autocast of a call are of a wrong kind", code="bad_input")
        return cls(training, autocast, _names(meta.get("adapter", [])))

    @property
    def trains(self) -> bool:
        """Whether it needs the permission to train."""
        return bool(self.training or self.adapter)


class TrainingUsage:
    """How much each owner has trained. It may outlive the component that they trained on."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._steps: Counter[str] = Counter()
        self._tokens: Counter[str] = Counter()

    def add(self, owner: str, tokens: int, limits: TrainingLimits) -> None:
        """Count a backward pass of so many tokens.

        Raises:
            RemoteStepError: It would be more than is allowed.
        """
        with self._lock:
            for what, most, after in (
                ("steps", limits.training_steps, self._steps[owner] + 1),
                ("tokens", limits.training_tokens, self._tokens[owner] + tokens),
            ):
                if most is not None and after > most:
                    raise RemoteStepError(
                        f"this host lets you train {most:,} {what} (backward passes count), and that was all",
                        code="no_more_training",
                        hint="ask who runs it for more",
                    )
            self._steps[owner] += 1
            self._tokens[owner] += tokens


def _names(value: Any) -> tuple[str, ...]:
    """Check names of pieces."""
    if not isinstance(value, list) or len(value) > _MAX_PIECES or not all(isinstance(name, str) for name in value):
        raise RemoteStepError("the pieces of an adapter are not a list of names, or too many", code="bad_input")
    return tuple(value)


@dataclass(slots=True)
class _Owner:
    """What one owner has sent."""

    #: Hash -> a description, or tensors; those used last come last.
    pieces: OrderedDict[str, Any] = field(default_factory=OrderedDict)
    bytes_of: Counter[str] = field(default_factory=Counter)
    used_at: float = 0.0


class Training:
    """A component with the adapters of its users. Its methods may be called from several threads.

    Args:
        component: The component, which stays as it is: modes and adapters are those of copies that share its weights.
        clock: Returns seconds, monotonically.
        usage: Counts what is trained.
    """

    def __init__(
        self, component: ComponentModel, clock: Callable[[], float] = time.monotonic, usage: TrainingUsage | None = None
    ) -> None:
        self._component = component
        self._usage = usage or TrainingUsage()
        self._clock = clock
        self._lock = threading.Lock()
        self._owners: dict[str, _Owner] = {}
        #: Description -> a copy of the component with its modules, and their parameters.
        self._copies: OrderedDict[str, tuple[Any, dict[str, torch.Tensor]]] = OrderedDict()

    def __len__(self) -> int:
        """Return the number of pieces that are kept."""
        return sum(len(owner.pieces) for owner in self._owners.values())

    @property
    def kept_bytes(self) -> int:
        return sum(owner.bytes_of.total() for owner in list(self._owners.values()))

    def forget(self, used_before: float | None = None) -> None:
        """Drop the adapters of owners who have not used any since a time; without a time, those of all owners."""
        with self._lock:
            for owner in self._owners.values():
                if used_before is None or owner.used_at < used_before:
                    owner.pieces.clear()
                    owner.bytes_of.clear()
            if not len(self):
                self._copies.clear()

    def put(self, frame: Frame, owner: str, limits: TrainingLimits) -> str:
        """Keep a description or tensors, and return the hash of their content.

        Raises:
            RemoteStepError: Nothing is allowed to be trained, or they are larger than allowed.
        """
        _refuse_training(limits)
        tensors, description = unpack(frame), frame.meta.get("description")
        size = sum(tensor.nbytes for tensor in tensors.values()) + (len(json.dumps(description)) if description else 0)
        most = min(limits.adapter_bytes, limits.all_adapter_bytes)
        if size > most:
            raise RemoteStepError(
                f"an adapter of {human_bytes(size)}; this host keeps {human_bytes(most)}",
                code="too_large",
                hint="train fewer modules, or with a smaller rank",
            )
        name = content_hash(description, tensors)
        with self._lock:
            own = self._owners.setdefault(owner, _Owner())
            own.used_at = self._clock()
            for replaced in _names(frame.meta.get("replaces", [])):
                own.pieces.pop(replaced, None)
                del own.bytes_of[replaced]
            own.pieces[name] = tensors if description is None else description
            own.bytes_of[name] = size
            own.pieces.move_to_end(name)
            while own.bytes_of.total() > most:
                oldest, _ = own.pieces.popitem(last=False)
                del own.bytes_of[oldest]
            # They are sent again when they are needed.
            for other in sorted(self._owners.values(), key=lambda each: each.used_at):
                if other is not own and self.kept_bytes > limits.all_adapter_bytes:
                    other.pieces.clear()
                    other.bytes_of.clear()
        return name

    def admit(self, mode: Mode, owner: str, limits: TrainingLimits, tokens: int = 0) -> None:
        """Count a backward pass of so many tokens, or refuse a call; 0 for a forward.

        Raises:
            RemoteStepError: It is not allowed, or no more of it.
        """
        if mode.trains or tokens:
            _refuse_training(limits)
        if tokens:
            self._usage.add(owner, tokens, limits)

    @contextlib.contextmanager
    def running(self, mode: Mode, owner: str, random: Mapping[str, torch.Tensor]) -> Iterator[Running]:
        """Prepare one call in its mode; the caller ensures that only one runs at a time.

        Args:
            mode: The mode.
            owner: The owner of the adapters.
            random: The states of its generators, by :data:`RANDOM_CPU` and :data:`RANDOM_CUDA`; or none.

        Raises:
            RemoteError: An adapter is missing or does not fit, or a generator state is invalid.
        """
        component, parameters = self._adapted(mode, owner)
        device = next(self._component.parameters()).device
        # For the forward only: backward runs outside autocast, as in one process.
        autocast = torch.autocast(
            device.type, _AUTOCAST.get(mode.autocast or "", torch.bfloat16), enabled=mode.autocast is not None
        )
        with contextlib.ExitStack() as stack:
            states = stack.enter_context(_random_numbers(random, device)) if random else dict
            yield Running(component, parameters, states, autocast)

    def _adapted(self, mode: Mode, owner: str) -> tuple[Any, dict[str, torch.Tensor]]:
        if not mode.adapter and not mode.training:
            return self._component, {}
        with self._lock:
            own = self._owners.get(owner, _Owner())
            own.used_at = self._clock()
            missing = [name for name in mode.adapter if name not in own.pieces]
            if missing:
                raise RemoteError(
                    f"{len(missing)} of {len(mode.adapter)} pieces of the adapter are not here",
                    code="unknown_adapter",
                    hint="send them again",
                )
            for name in mode.adapter:
                own.pieces.move_to_end(name)
            pieces = [own.pieces[name] for name in mode.adapter]
        description = pieces.pop(0) if pieces else None
        component, added = self._copy(mode.adapter[0] if mode.adapter else "", description)
        tensors = {name: tensor for piece in pieces for name, tensor in piece.items()}
        component.train(bool(mode.training))
        return component, fit_tensors(added, tensors, next(self._component.parameters()).device)

    def _copy(self, name: str, description: Any) -> tuple[Any, dict[str, torch.Tensor]]:
        with self._lock:
            made = self._copies.pop(name, None)
        if made is None and description is None:
            made = frozen_copy(self._component), {}
        elif made is None:
            made = build_adapted(self._component, description)
        with self._lock:
            self._copies[name] = made
            if len(self._copies) > _MAX_COPIES:
                self._copies.popitem(last=False)
        return made


@dataclass(frozen=True, slots=True)
class Running:
    """A component with its adapters in place."""

    component: Any
    #: The parameters of the adapters.
    parameters: dict[str, torch.Tensor]
    #: Returns the states of the generators after what was run.
    random: Callable[[], dict[str, torch.Tensor]]
    #: A context for forwards.
    autocast: Any

    def __call__(self, hidden: torch.Tensor, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Run it; return its output by name, and what it recorded.

        Raises:
            RemoteError: It failed.
        """
        arguments = {STATES: hidden, **inputs}
        with failures_named(), self.autocast:
            if not self.parameters:
                output = self.component(**arguments)
            else:
                output = functional_call(self.component, self.parameters, (), arguments)
        return _named_outputs(output, computed(self.component.crossing))

    def gradients(
        self,
        hidden: torch.Tensor,
        inputs: Mapping[str, Any],
        meta: Mapping[str, Any],
        gradients: Mapping[str, torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        """Run it, and return the gradients that a frame asks for, given those of the outputs.

        Raises:
            RemoteError: It failed; or the frame wants what there is not.
        """
        wanted = meta.get("wanted", [])
        if not isinstance(wanted, list) or not all(isinstance(name, str) for name in wanted):
            raise RemoteStepError("the names of the wanted gradients are not a list of names", code="bad_input")
        unknown = [name for name in wanted if name not in self.parameters]
        if unknown:
            raise RemoteStepError(f"a gradient is wanted of {unknown[0][:200]}, which was not sent", code="bad_input")
        learning = {name: self.parameters[name] for name in wanted}
        if meta.get("of_input", True):
            learning[STATES] = hidden
            learning |= {name: inputs[name] for name in inputs.keys() & self.component.crossing.keys()}
        try:
            for tensor in learning.values():
                tensor.requires_grad_()
            outputs = {name: tensor for name, tensor in self(hidden, inputs).items() if name in gradients}
            for name, gradient in gradients.items():
                output = outputs.get(name)
                if output is None or gradient.shape != output.shape or gradient.dtype != output.dtype:
                    was = "nothing" if output is None else f"{output.dtype} {list(output.shape)}"
                    raise RemoteStepError(
                        f"the gradient is {gradient.dtype} {list(gradient.shape)}; the {name} was {was}",
                        code="bad_input",
                    )
            outputs = {name: output for name, output in outputs.items() if output.requires_grad}
            with failures_named():
                found = torch.autograd.grad(
                    list(outputs.values()),
                    list(learning.values()),
                    [gradients[name].to(output.device) for name, output in outputs.items()],
                    materialize_grads=True,
                )
        finally:
            for tensor in learning.values():
                tensor.requires_grad_(False)
        return {f"{GRADIENT}.{name}": tensor for name, tensor in zip(learning, found, strict=True)}


@contextlib.contextmanager
def failures_named() -> Iterator[None]:
    """Raise what goes wrong in a component as an error with a code."""
    try:
        yield
    except ConfigurationError as error:
        raise RemoteError(error.message, hint=error.hint, code="bad_input") from error
    except Exception as error:
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or _CPU_ALLOCATOR in str(error):
            raise RemoteError(
                "the host has no memory for this step",
                code="out_of_memory",
                hint="send fewer sequences or tokens at once: smaller batches, and more of them accumulated",
            ) from error
        # Its text may name files of the host. No warning: a caller makes it fail with wrong shapes at will.
        log.info("The component failed: %s", said(error))
        log.debug("Where it failed", exc_info=True)
        raise RemoteError(
            f"the component failed: {type(error).__name__}",
            code="failed",
            hint="do the shapes and arguments belong together? The log of its host (INFO) says how it failed",
        ) from error


def taken_random(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Take the states of generators out of the tensors of a frame."""
    return {name: tensors.pop(name) for name in (RANDOM_CPU, RANDOM_CUDA) if name in tensors}


def taken_gradients(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Take the gradients of outputs out of the tensors of a frame, by the names of the outputs."""
    names = [name for name in tensors if name == GRADIENT or name.startswith(f"{GRADIENT}.")]
    return {name.removeprefix(GRADIENT).removeprefix(".") or OUTPUT: tensors.pop(name) for name in names}


def _named_outputs(output: Any, others: Iterable[str]) -> dict[str, torch.Tensor]:
    """Return an output by name; ``others`` are the names of what the component computes besides hidden states."""
    if isinstance(output, torch.Tensor):
        return {OUTPUT: output}
    named = {OUTPUT: output.last_hidden_state, **{name: output[name] for name in others}}
    for kind in ("hidden_states", "attentions"):
        named.update({f"{kind}.{number}": tensor for number, tensor in enumerate(output.get(kind) or ())})
    return named


@contextlib.contextmanager
def _random_numbers(
    given: Mapping[str, torch.Tensor], device: torch.device
) -> Iterator[Callable[[], dict[str, torch.Tensor]]]:
    """Draw random numbers from the caller's generator states; yields a function that returns the states afterwards."""
    on_cuda = device.type == "cuda"

    def states() -> dict[str, torch.Tensor]:
        result = {RANDOM_CPU: torch.get_rng_state()}
        if RANDOM_CUDA in given:
            result[RANDOM_CUDA] = torch.cuda.get_rng_state(device) if on_cuda else given[RANDOM_CUDA]
        return result

    with _DRAWING, torch.random.fork_rng([device] if on_cuda else []):
        try:
            torch.set_rng_state(given[RANDOM_CPU])
            if on_cuda and RANDOM_CUDA in given:
                torch.cuda.set_rng_state(given[RANDOM_CUDA], device)
            elif on_cuda:
                # Of the caller's generator, so that the same call draws the same, and the next one others.
                torch.cuda.manual_seed(int(torch.randint(2**62, ())))
        except (KeyError, RuntimeError, TypeError) as error:
            raise RemoteStepError("the state of a generator is none", code="bad_input") from error
        yield states


def _refuse_training(limits: TrainingLimits) -> None:
    if not limits.training:
        raise RemoteStepError(
            "this host lets nothing be trained by you: it takes no adapters, training mode or gradients",
            code="no_training",
            hint="ask who runs it for the permission to train",
        )
