"""The plan: which tensors, which bytes, which shards, for which component."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Container, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from splitlearn_core.errors import ConfigurationError, TensorMismatchError
from splitlearn_core.family import STATES, ModelFamily
from splitlearn_core.plan.conversions import Place, WeightConversion, places_of
from splitlearn_core.plan.crossing import crossing_tensors
from splitlearn_core.plan.keys import KeyTable
from splitlearn_core.plan.quantised import MXFP4, QuantisedTensor, resolved
from splitlearn_core.quoting import SENTENCE, listed, quote
from splitlearn_core.types import (
    ALL_PARTS,
    DTYPE_BYTES,
    DTYPE_FIELDS,
    FLOAT_DTYPES,
    STATED_DTYPES,
    THREE,
    LayerRange,
    TensorInfo,
    component_names,
)

#: The dtype of a plan whose components have different ones.
MIXED = "mixed"
#: The dtype in which transformers keeps some tensors of models in narrower ones.
_WIDE = "float32"
_FLOATS = frozenset(FLOAT_DTYPES.values())


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """A tensor to be read, and its name in the module."""

    #: Of a tensor that only goes into others: a name that no tensor of the module has.
    module_key: str
    info: TensorInfo
    #: Where its parts lie in the tensors that are made of it; empty if it is a tensor of the module itself.
    places: tuple[Place, ...] = ()
    #: The dtype that it is loaded in whatever that of the component is, by torch's name; empty for none.
    kept_dtype: str = ""
    #: The quantised tensor whose numbers or scales this is, None for a plain one; ``places`` are where its values go.
    quantised: QuantisedTensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape once it is loaded: for numbers, that of the dequantised tensor; scales are not kept."""
        if self.quantised is None:
            return self.info.shape
        return self.quantised.shape if self.info.key == self.quantised.numbers else (0,)

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def as_plain(self) -> PlannedTensor | None:
        """The tensor of plain weights in its place; None if there is none, or if it is made of several."""
        if self.quantised is None:
            return self
        if self.info.key != self.quantised.numbers or self.quantised.method == MXFP4:
            return None
        return replace(self, info=replace(self.info, key=self.quantised.key), quantised=None)


@dataclass(frozen=True, slots=True)
class CacheSize:
    """Bytes that the cache of one layer takes for one sequence."""

    per_token: int
    #: Of a running state, whatever the number of tokens.
    fixed: int = 0


@dataclass(frozen=True, slots=True)
class ComponentPlan:
    """The tensors of one component, and what they cost."""

    component: str
    layers: LayerRange
    tensors: tuple[PlannedTensor, ...]
    #: Bytes that the component's key-value cache grows by for each token of each sequence.
    kv_bytes_per_token: int
    #: The dtype its weights will have once loaded, by torch's name.
    dtype: str
    #: Module key -> a tensor that is made of others, as a file would hold it.
    made: Mapping[str, TensorInfo] = field(default_factory=dict, hash=False)
    #: Bytes of the running states of its layers for each sequence, whatever the number of tokens.
    state_bytes_per_sequence: int = 0

    @property
    def results(self) -> dict[str, TensorInfo]:
        """The tensors of the module by their names: read as they are, or made."""
        return {**{tensor.module_key: tensor.info for tensor in self.tensors if not tensor.places}, **self.made}

    @property
    def parameters(self) -> int:
        return sum(tensor.elements for tensor in self.tensors)

    @property
    def nbytes(self) -> int:
        """Bytes to be read, in the dtype they are stored in."""
        return sum(tensor.info.nbytes for tensor in self.tensors)

    @property
    def shards(self) -> tuple[str, ...]:
        return tuple(sorted({tensor.info.shard for tensor in self.tensors if tensor.info.shard}))

    def loaded_bytes(self, dtype: str) -> int:
        """Bytes in memory once loaded as ``dtype`` (torch's name)."""
        return sum(loaded_nbytes(tensor, dtype) for tensor in self.tensors)

    def to_dict(self) -> dict[str, Any]:
        return {
            "component": str(self.component),
            "layers": [self.layers.start, self.layers.end],
            "tensors": len(self.tensors),
            "parameters": self.parameters,
            "bytes": self.nbytes,
            "kv_bytes_per_token": self.kv_bytes_per_token,
            "state_bytes_per_sequence": self.state_bytes_per_sequence,
            "dtype": self.dtype,
            "shards": list(self.shards),
        }


@dataclass(frozen=True, slots=True)
class MemoryNeeds:
    """The memory of this machine that a load takes, in bytes."""

    #: Anonymous memory at the peak, while it reads.
    peak: int
    #: Anonymous memory that stays in use.
    kept: int
    #: Pages of mapped files.
    mapped: int


@dataclass(frozen=True, slots=True)
class SplitPlan:
    """How a model is cut, and what each component costs; a description of work not yet done."""

    model: str
    #: The commit that a Hub revision was resolved to; None for a directory.
    commit: str | None
    model_type: str
    split_points: tuple[int, ...]
    num_layers: int
    #: The dtype the weights will have once loaded, by torch's name; ``mixed`` if components differ.
    dtype: str
    #: ``headers`` of the weight files, or ``config`` if there are no weights.
    source: str
    components: tuple[ComponentPlan, ...]
    #: Checkpoint keys of tensors that two components hold.
    tied: tuple[str, ...]
    #: Bytes that cross a cut for each token, in the planned dtype (the widest of several). Where cuts differ, those of
    #: the first.
    cut_bytes_per_token: int
    #: The memory that loading all of it on the CPU takes, for each of core's strategies that can read it.
    memory: Mapping[str, MemoryNeeds] = field(default_factory=dict, compare=False)
    #: What may be wrong with the files: a layer that lacks what all others have.
    warnings: tuple[str, ...] = field(default=(), compare=False)
    #: Checkpoint keys that a model of the type has no place for; they are not read.
    unexpected: tuple[str, ...] = field(default=(), compare=False)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all components into which the model is cut, planned or not, in order."""
        return component_names(len(self.split_points) + 1)

    @property
    def is_whole(self) -> bool:
        """Whether all components are planned."""
        return len(self.components) == len(self.names)

    def component(self, name: str) -> ComponentPlan:
        """Return the plan of one component; raises KeyError if it was not requested."""
        for component in self.components:
            if component.component == name:
                return component
        raise KeyError(str(name))

    @property
    def nbytes(self) -> int:
        """Bytes of all planned tensors, a tied one counted once."""
        return sum(info.nbytes for info in self.infos)

    @property
    def parameters(self) -> int:
        """Parameters of all planned tensors, a tied one counted once."""
        return sum({each.info.key: each.elements for part in self.components for each in part.tensors}.values())

    @property
    def shards(self) -> tuple[str, ...]:
        return tuple(sorted({shard for component in self.components for shard in component.shards}))

    @property
    def infos(self) -> tuple[TensorInfo, ...]:
        """All planned tensors as stored in the files, a tied one once."""
        return tuple({tensor.info.key: tensor.info for part in self.components for tensor in part.tensors}.values())

    def to_dict(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "commit": self.commit,
            "model_type": self.model_type,
            "split_points": list(self.split_points),
            "num_layers": self.num_layers,
            "dtype": self.dtype,
            "source": self.source,
            "parameters": self.parameters,
            "bytes": self.nbytes,
            "shards": list(self.shards),
            "tied": list(self.tied),
            "cut_bytes_per_token": self.cut_bytes_per_token,
            "components": [component.to_dict() for component in self.components],
            "warnings": list(self.warnings),
            "unexpected": list(self.unexpected),
            "memory": {strategy: asdict(needs) for strategy, needs in self.memory.items()},
        }


def plan_components(
    family: ModelFamily,
    config: Mapping[str, Any],
    table: KeyTable,
    ranges: Mapping[str, LayerRange],
    tensors: Mapping[str, TensorInfo],
    dtypes: Mapping[str, str],
    in_float32: Callable[[str, Collection[str]], Container[str]] = lambda dtype, names: (),
    cache_sizes: Callable[[str], Sequence[CacheSize]] | None = None,
) -> tuple[ComponentPlan, ...]:
    """Plan the components that have a dtype, each with its tensors in the order of the files.

    Args:
        family, config: The model.
        table: Where its tensors go.
        ranges: Component -> its layers.
        tensors: Checkpoint key -> the tensor.
        dtypes: Component -> the dtype that it is loaded in.
        in_float32: Of a dtype, and of module keys, returns those that are loaded in float32 instead.
        cache_sizes: Of a dtype, returns the size of each layer's cache; by default, keys and values of every layer.

    Raises:
        TensorMismatchError: Tensors cannot be made of those that there are.
    """
    plans = []
    for component, dtype in dtypes.items():
        owned = ranges[component]
        if cache_sizes is None:
            sizes: Sequence[CacheSize] = [CacheSize(kv_bytes_per_layer(family, config, dtype))] * len(owned)
        else:
            sizes = cache_sizes(dtype)[owned.start : owned.end]
        per_token, fixed = total_cache_size(sizes)
        places, made, unchanged, quantised = _made(table, component, tensors, dtype)
        kept = in_float32(dtype, {*table.sources[component], *made})
        planned = [
            PlannedTensor(
                name,
                tensors[key],
                into,
                _WIDE if (into[0].target if into else name) in kept else "",
                quantised.get(key),
            )
            for own_name, key in table.sources[component].items()
            for into in (tuple(places.get(key, ())),)
            for name in (unchanged.get(key, own_name),)
        ]
        planned.sort(key=lambda tensor: (tensor.info.shard, tensor.info.begin, tensor.module_key))
        plans.append(ComponentPlan(component, owned, tuple(planned), per_token, dtype, made, fixed))
    return tuple(plans)


def total_cache_size(layers: Iterable[CacheSize]) -> tuple[int, int]:
    """Return the bytes that the caches of layers take together: for each token of a sequence, and for each sequence."""
    sizes = list(layers)
    return sum(size.per_token for size in sizes), sum(size.fixed for size in sizes)


def _made(
    table: KeyTable, component: str, tensors: Mapping[str, TensorInfo], dtype: str
) -> tuple[dict[str, list[Place]], dict[str, TensorInfo], dict[str, str], dict[str, QuantisedTensor]]:
    """Return how tensors of a component are made of others.

    Returns:
        Where each source of a conversion goes, the tensors that are made, the names of sources that stay as they are,
        and, of numbers and scales, the tensor that is dequantised.
    """
    places: dict[str, list[Place]] = {}
    made: dict[str, TensorInfo] = {}
    unchanged: dict[str, str] = {}
    quantised: dict[str, QuantisedTensor] = {}
    conversions = table.conversions.get(component, ())
    problems = _without_scales(table.sources[component].values(), conversions, tensors)
    for conversion in conversions:
        try:
            dequantised = {tensor.key: resolved(tensor, tensors) for tensor in conversion.quantised}
            plain = {key: tensors[key].shape for key in conversion.source_keys if key not in dequantised}
            shapes, parts = places_of(conversion, plain | {key: tensor.shape for key, tensor in dequantised.items()})
        except ValueError as error:
            problems.append(f"{conversion.targets[0]} cannot be made: {error}")
            continue
        first = tensors[conversion.keys[0]]
        if not dequantised and any(operation.unless == first.shape for operation in conversion.operations):
            # Read like any other, as transformers does: some kernels depend on where it lies in memory.
            unchanged[first.key] = conversion.targets[0]
            continue
        for source, into in parts.items():
            stored = dequantised.get(source)
            places |= dict.fromkeys((source,) if stored is None else stored.keys, into)
            quantised |= {} if stored is None else dict.fromkeys(stored.keys, stored)
        made |= _made_infos(conversion, shapes, tensors, FLOAT_DTYPES[dtype] if dequantised else first.dtype)
    if problems:
        raise TensorMismatchError(
            f"{len(problems)} tensors are made of others, which do not fit together:\n  "
            + listed(problems, "\n  ", most=20, limit=SENTENCE),
            hint="is the checkpoint complete, does config.json belong to it, and is one expert like the others?",
        )
    return places, made, unchanged, quantised


def _made_infos(
    conversion: WeightConversion, shapes: Mapping[str, tuple[int, ...]], tensors: Mapping[str, TensorInfo], dtype: str
) -> dict[str, TensorInfo]:
    """Describe the tensors that a conversion makes; their bytes are those of the sources."""
    first, nbytes = tensors[conversion.keys[0]], sum(tensors[key].nbytes for key in conversion.keys)
    total = sum(map(math.prod, shapes.values())) or 1
    return {
        name: TensorInfo(name, dtype, shape, first.shard, 0, nbytes * math.prod(shape) // total, first.format)
        for name, shape in shapes.items()
    }


def _without_scales(
    keys: Iterable[str], conversions: Sequence[WeightConversion], tensors: Mapping[str, TensorInfo]
) -> list[str]:
    """Describe 8-bit floats without scales, in a component that has others with them."""
    scaled = {key for conversion in conversions for key in conversion.keys if conversion.quantised}
    alone = sorted(key for key in keys if tensors[key].dtype.startswith("F8") and key not in scaled)
    return [f"{key} is {tensors[key].dtype}, and has no scales" for key in alone] if scaled else []


def layers_without_tensors(family: ModelFamily, parts: Sequence[ComponentPlan]) -> tuple[int, ...]:
    """Return the planned layers of which the checkpoint has no tensor."""
    prefix = f"{family.base}.{family.layers}."
    names = (tensor.module_key for part in parts for tensor in part.tensors)
    present = {name[len(prefix) :].partition(".")[0] for name in names if name.startswith(prefix)}
    counted = (layer for part in parts for layer in range(part.layers.start, part.layers.end))
    return tuple(layer for layer in counted if str(layer) not in present)


def resolve_dtype(requested: str, config: Mapping[str, Any], tensors: Iterable[TensorInfo]) -> str:
    """Decide the dtype of the loaded weights, by the rule of ``from_pretrained``.

    ``auto`` is the dtype that ``config.json`` states, or else the first floating dtype of the tensors.

    Raises:
        ConfigurationError: No floating dtype of that name.
    """
    if requested == "auto":
        stated = _stated_dtype(config)
        if stated is None:
            stored = {stored: name for name, stored in FLOAT_DTYPES.items()}
            return next((stored[info.dtype] for info in tensors if info.dtype in stored), "float32")
        requested = stated
    name = STATED_DTYPES.get(requested.removeprefix("torch."), requested)
    if name not in FLOAT_DTYPES:
        raise ConfigurationError(
            f"dtype {quote(requested)} is none of {', '.join(FLOAT_DTYPES)}",
            hint='leave dtype="auto" for the stored one',
        )
    return name


def states_dtype(config: Mapping[str, Any]) -> bool:
    """Return whether ``config.json`` states the dtype of the weights."""
    return _stated_dtype(config) is not None


def _stated_dtype(config: Mapping[str, Any]) -> str | None:
    return next((str(config[name]) for name in DTYPE_FIELDS if config.get(name)), None)


def loaded_nbytes(tensor: PlannedTensor, dtype: str) -> int:
    """Bytes of one tensor once loaded: floating tensors are converted to the dtype, others keep theirs."""
    stored = tensor.info.dtype
    floating = stored in _FLOATS or tensor.quantised is not None
    return tensor.elements * DTYPE_BYTES[FLOAT_DTYPES[tensor.kept_dtype or dtype] if floating else stored]


def cut_bytes(
    family: ModelFamily, config: Mapping[str, Any], dtypes: Iterable[str], ranges: Iterable[LayerRange]
) -> int:
    """Bytes of what crosses a cut for each token, its hidden state above all, in the widest of the dtypes.

    Where it depends on the number of layers after the cut, those of the first cut.
    """
    width = max(DTYPE_BYTES[FLOAT_DTYPES[dtype]] for dtype in dtypes)
    wide = DTYPE_BYTES[FLOAT_DTYPES[_WIDE]] if family.config_value(config, "residual_in_fp32") else width
    crossing = crossing_tensors(family, config) if family.crossing else {}
    if not crossing:
        return _number(family, config, "hidden_size") * wide
    left = max(owned.total - owned.start for owned in ranges if not owned.is_first)
    return sum(tensor.elements(left) * (wide if name == STATES else width) for name, tensor in crossing.items())


def common_dtype(dtypes: Iterable[str]) -> str:
    """Return the one dtype of several components, or ``mixed``."""
    names = set(dtypes)
    return names.pop() if len(names) == 1 else MIXED


def parse_parts(parts: Sequence[str] | str, there: Sequence[str] = THREE) -> tuple[str, ...]:
    """Return the requested components in the order of the model.

    Args:
        parts: Their names; :data:`ALL_PARTS` itself for all.
        there: The names of the components that there are.

    Raises:
        ConfigurationError: A name is not that of a component, or there are no names.
    """
    if parts is ALL_PARTS:
        return tuple(there)
    names = [parts] if isinstance(parts, str) or not isinstance(parts, Iterable) else list(parts)
    wrong = sorted({str(name) for name in names} - set(there))
    if wrong or not names:
        raise ConfigurationError(
            f"parts names {', '.join(map(repr, wrong)) or 'no component'}",
            hint=f"choose from {listed(there)}",
        )
    return tuple(component for component in there if component in names)


def kv_bytes_per_layer(family: ModelFamily, config: Mapping[str, Any], dtype: str) -> int:
    """Bytes that the key-value cache of one layer grows by for each token of each sequence."""
    if family.cached_values:
        values = sum(_number(family, config, name) for name in family.cached_values)
        return values * DTYPE_BYTES[FLOAT_DTYPES[dtype]]
    heads = _number(family, config, "num_attention_heads")
    kv_heads = _number(family, config, "num_key_value_heads", heads)
    head_dim = _number(family, config, "head_dim", _number(family, config, "hidden_size") // heads)
    return 2 * kv_heads * head_dim * DTYPE_BYTES[FLOAT_DTYPES[dtype]]


def _number(family: ModelFamily, config: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = family.config_value(config, name)
    if value is None and default is not None:
        return default
    if type(value) is not int or value < 1:
        own = family.config_names.get(name, name)
        raise ConfigurationError(
            f"config.json says {own} = {value!r}; a whole number from 1 is needed",
            hint="use the config.json that the checkpoint was saved with",
        )
    return value
