"""A host's description of its component, and comparisons with the other components."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any

from splitlearn_core.checkpoint.origin import Origin
from splitlearn_core.errors import ProtocolError
from splitlearn_core.family import STATES
from splitlearn_core.plan.crossing import CrossingTensor, Source
from splitlearn_core.types import FLOAT_DTYPES, LayerRange, is_component_name, kind_of
from splitlearn_core.wire_formats import WIRES

_MAX_TEXT, _MAX_ITEMS, _MAX_NUMBER = 4_096, 10_000, 2**53
#: Class of a cache layer in transformers -> what it caches.
CACHE_KINDS = {
    "DynamicLayer": "keys",
    "DynamicSlidingWindowLayer": "window",
    "LinearAttentionLayer": "state",
    "LinearAttentionAndFullAttentionLayer": "state and keys",
    "LinearAttentionAndSlidingWindowAttentionLayer": "state and window",
    "DummyLayer": "nothing",
}
#: A running state of nothing but the last inputs of a convolution; tokens can be removed from it.
INPUTS = "inputs"
#: How a session runs: alone, bit-equal to the unsplit model; or in one forward with others, close to it.
SOLO, PACKED = MODES = ("solo", "packed")
#: Fields of an origin that are not sent: they are long, and only needed for saving components.
_LOCAL = ("ties", "keys", "config")


@dataclass(frozen=True, slots=True)
class Facts:
    """A component as its host describes it."""

    #: The name of the component, ``trunk`` or ``trunk2``.
    component: str
    #: First layer, one past the last, and the number of layers of the model.
    layers: tuple[int, int, int]
    model_type: str
    hidden_size: int
    vocab_size: int
    #: torch's name of the dtype of its parameters.
    dtype: str
    #: Whether hidden states cross its cuts in float32, whatever that dtype is.
    crosses_in_float32: bool
    #: A hash of its weights as they are in memory; see ``description.weights_digest``.
    digest: str
    #: ``eager``, ``sdpa``, ...
    attention: str
    #: Distribution -> version, for the libraries that decide the last bit of a result.
    versions: Mapping[str, str]
    #: The number of threads that torch uses for one forward.
    threads: int
    #: Type of the device, and its name if it has one.
    device: str
    #: The arguments besides hidden states, mask, positions and cache that its forward takes.
    arguments: tuple[str, ...]
    #: For each of its layers, the sliding window of its cache; 0 if it keeps everything.
    windows: tuple[int, ...]
    #: For each of its layers, what it caches: one of :data:`CACHE_KINDS`, or :data:`INPUTS`.
    caches: tuple[str, ...]
    #: Whether training mode would change its results.
    has_dropout: bool
    #: Bytes by which the cache of its layers grows for each token of each sequence.
    cache_bytes_per_token: int
    #: Bytes of running states of its layers for each sequence, whatever the number of tokens.
    cache_bytes_per_sequence: int
    #: The maximum number of tokens in a session, and of bytes in a message.
    max_tokens: int
    max_payload: int
    #: A value that changes whenever the host is started.
    epoch: str
    #: How hidden states and gradients may be sent.
    wires: tuple[str, ...] = WIRES
    #: How sessions may run: ``solo``, each alone; ``packed``, several in one forward.
    modes: tuple[str, ...] = (SOLO,)
    #: Whether it may send its output on to another host, and whether it takes the output of another one.
    sends_on: bool = False
    takes_over: bool = False
    #: The type of each layer of the model, if there are several types.
    layer_types: tuple[str, ...] | None = None
    #: What crosses its cuts, where that is more than hidden states ``[batch, sequence, hidden_size]``: name -> where it
    #: comes from, and its sizes; see ``plan.crossing``.
    crossing: Mapping[str, Any] = field(default_factory=dict)
    #: The origin of its weights; None if it was built from a state dict.
    origin: Mapping[str, Any] | None = field(default=None, repr=False)

    @property
    def layer_range(self) -> LayerRange:
        return LayerRange(*self.layers)

    def to_json(self) -> dict[str, Any]:
        """Return the facts as JSON values."""
        return {item.name: _plain(getattr(self, item.name)) for item in fields(self)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Facts:
        """Return the facts that a host sent, after checking them.

        Raises:
            ProtocolError: Fields are missing or invalid; the message lists all of them.
        """
        problems = [f"{item.name} is missing" for item in fields(cls) if item.name not in values]
        if not problems:
            problems = [name for name, is_valid in _CHECKS.items() if not is_valid(values[name])]
        if not problems:
            facts = cls(**{item.name: _frozen(values[item.name]) for item in fields(cls)})
            start, end, total = facts.layers
            consistent = start < end <= total and len(facts.windows) == len(facts.caches) == end - start
            if consistent and len(facts.layer_types or range(total)) == total:
                return facts
            problems = ["layers, windows, caches and layer_types contradict each other"]
        raise ProtocolError(
            f"the host's description of its component is invalid: {'; '.join(problems)}",
            code="malformed",
            hint="install the same version of splitlearn-core on both sides",
        )

    def crossing_tensors(self) -> dict[str, CrossingTensor]:
        """Return what crosses its cuts; nothing if that is hidden states ``[batch, sequence, hidden_size]`` alone."""
        return {name: CrossingTensor(Source(source), tuple(sizes)) for name, (source, *sizes) in self.crossing.items()}

    def origin_value(self) -> Origin | None:
        """Return the origin of the component."""
        if self.origin is None:
            return None
        values = dict(self.origin)
        return Origin(**{**values, "split_points": tuple(values["split_points"]), "layers": tuple(values["layers"])})

    def differences(self, other: Facts) -> list[str]:
        """Return the reasons why another host cannot take over a session of this one; empty if it can."""
        names = ("component", "layers", "model_type", "hidden_size", "dtype", "crossing")
        problems = [
            f"{name}: {getattr(self, name)} before, {getattr(other, name)} now"
            for name in names
            if getattr(self, name) != getattr(other, name)
        ]
        if not problems and (self.digest, self.windows, self.caches) != (other.digest, other.windows, other.caches):
            problems.append(f"other weights: digest {self.digest[:12]} before, {other.digest[:12]} now")
        return problems

    def last_bit_differences(self, here: Mapping[str, Any]) -> list[str]:
        """Describe the differences to another place that can make results differ in the last bit.

        Args:
            here: The values of the other place: ``attention``, ``versions``, ``threads`` and ``device``.
        """
        return [
            f"{name}: {_as_text(getattr(self, name))} there, {_as_text(value)} here"
            for name, value in here.items()
            if getattr(self, name) != value
        ]


def origin_json(origin: Origin | None) -> dict[str, Any] | None:
    """Return an origin as JSON values, without the fields that only saving needs."""
    if origin is None:
        return None
    return {item.name: _plain(getattr(origin, item.name)) for item in fields(Origin) if item.name not in _LOCAL}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _frozen(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(value)
    return MappingProxyType(value) if isinstance(value, dict) else value


def _as_text(value: Any) -> str:
    return ", ".join(f"{name} {item}" for name, item in value.items()) if isinstance(value, Mapping) else str(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= _MAX_TEXT


def _is_number(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _MAX_NUMBER


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= _MAX_ITEMS and all(map(_is_text, value))


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= _MAX_ITEMS and all(map(_is_number, value))


def _is_table(value: Any) -> bool:
    return isinstance(value, dict) and len(value) <= _MAX_ITEMS and all(map(_is_text, (*value, *value.values())))


_ORIGIN_CHECKS = {
    "model": _is_text,
    "commit": lambda value: value is None or _is_text(value),
    "fingerprint": _is_text,
    "model_type": _is_text,
    "plugin": _is_text,
    "plugin_version": _is_text,
    "split_points": _are_numbers,
    "num_layers": _is_number,
    "component": is_component_name,
    "layers": lambda value: _are_numbers(value) and len(value) == 2,  # noqa: PLR2004  # a pair
    "dtype": lambda value: value in FLOAT_DTYPES,
    "samples": _is_table,
}


def _is_origin(value: Any) -> bool:
    return value is None or (
        isinstance(value, dict)
        and value.keys() == _ORIGIN_CHECKS.keys()
        and all(is_valid(value[name]) for name, is_valid in _ORIGIN_CHECKS.items())
    )


def _is_crossing(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and len(value) <= _MAX_ITEMS
        and all(map(_is_text, value))
        and (not value or STATES in value)
        and all(
            isinstance(item, list) and item and item[0] in [*Source] and _are_numbers(item[1:])
            for item in value.values()
        )
    )


_CHECKS = {
    "component": lambda value: is_component_name(value) and kind_of(value),
    "layers": lambda value: _are_numbers(value) and len(value) == 3,  # noqa: PLR2004  # start, end, total
    "model_type": _is_text,
    "hidden_size": lambda value: _is_number(value) and value > 0,
    "vocab_size": _is_number,
    "dtype": lambda value: value in FLOAT_DTYPES,
    "crosses_in_float32": lambda value: isinstance(value, bool),
    "digest": _is_text,
    "attention": _is_text,
    "versions": _is_table,
    "threads": _is_number,
    "device": _is_text,
    "arguments": _are_texts,
    "modes": lambda value: _are_texts(value) and SOLO in value,
    "windows": _are_numbers,
    "caches": lambda value: _are_texts(value) and set(value) <= {*CACHE_KINDS.values(), INPUTS},
    "has_dropout": lambda value: isinstance(value, bool),
    "cache_bytes_per_token": _is_number,
    "cache_bytes_per_sequence": _is_number,
    "max_tokens": _is_number,
    "max_payload": _is_number,
    "epoch": _is_text,
    "wires": _are_texts,
    **dict.fromkeys(("sends_on", "takes_over"), lambda value: isinstance(value, bool)),
    "layer_types": lambda value: value is None or _are_texts(value),
    "crossing": _is_crossing,
    "origin": _is_origin,
}


def layer_caches(layers: Sequence[Any], types: Sequence[str] | None) -> tuple[str, ...] | None:
    """Return what each cache layer caches; None if a layer is of a kind that sessions do not support.

    Args:
        layers: The cache layers.
        types: The types of these layers in the configuration; None if all are of one type.
    """
    kinds = [CACHE_KINDS.get(type(layer).__name__) for layer in layers]
    if types is not None:
        kinds = [INPUTS if type_ == "conv" else kind for kind, type_ in zip(kinds, types, strict=True)]
    return None if None in kinds else tuple(map(str, kinds))


def layer_windows(layers: Sequence[Any]) -> tuple[int, ...]:
    """Return the sliding window of each cache layer, 0 if it has none."""
    return tuple(int(getattr(layer, "sliding_window", None) or 0) for layer in layers)
