"""Tensors in memory, and in files that only torch can read, as bytes to save."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from splitlearn_core.build.component import ComponentModel
from splitlearn_core.build.configuration import hf_config
from splitlearn_core.build.construction import build_component
from splitlearn_core.checkpoint.files import CONFIG, GENERATION_CONFIG
from splitlearn_core.checkpoint.origin import origin_mismatches
from splitlearn_core.checkpoint.torch_file import read_state_dict
from splitlearn_core.errors import ConfigurationError, InvalidCheckpointError
from splitlearn_core.loading.load import load_components
from splitlearn_core.loading.opening import OpenModel
from splitlearn_core.loading.options import LoadOptions
from splitlearn_core.loading.planning import plan_and_fetch
from splitlearn_core.plan.splitplan import PlannedTensor
from splitlearn_core.quoting import SENTENCE, listed
from splitlearn_core.readers.tensor_parts import source_from
from splitlearn_core.storage.contents import Part, Tensor, companion_files, config_text
from splitlearn_core.types import (
    CHUNK_BYTES,
    DTYPE_BYTES,
    PYTORCH,
    Component,
    ProgressCallback,
    TensorInfo,
    dtype_names,
    place_of,
)

if TYPE_CHECKING:
    from splitlearn_core.pipeline import SplitCausalLM
    from splitlearn_core.split_model import AnySplitModel

#: Names that PEFT gives to its own tensors, and to the modules that it wraps around those of the model.
_OF_ADAPTERS = ("lora_", "ia3_", "hada_", "lokr_")
_ADAPTED = {"base_layer", "original_module", "modules_to_save", "lora_A", "lora_B"}


def tensor_pieces(tensor: torch.Tensor) -> Iterator[memoryview]:
    """Yield the bytes of a tensor in chunks; from another device they are copied chunk by chunk."""
    flat = tensor.detach().reshape(-1)
    elements = CHUNK_BYTES // tensor.element_size()
    for start in range(0, flat.numel(), elements):
        piece: Any = flat[start : start + elements].cpu().contiguous().view(torch.uint8).numpy()
        yield memoryview(piece)


def torch_file_pieces(path: Path, info: TensorInfo) -> Callable[[], Iterator[memoryview]]:
    """Return a function that reads one tensor of a ``.bin`` file, which is memory-mapped."""
    if info.format != PYTORCH:
        raise ConfigurationError(
            f"{path} is of the format {info.format}, which cannot be copied as it is stored",
            hint="give a dtype: the tensors are then loaded, and saved in it",
        )

    def pieces() -> Iterator[memoryview]:
        tensor = read_state_dict(path).get(info.key)
        if tensor is None or tuple(tensor.shape) != info.shape or tensor.nbytes != info.nbytes:
            raise InvalidCheckpointError(
                f"{path} was changed while it was being saved: {info.key} differs",
                hint="save again once it is written completely",
            )
        yield from tensor_pieces(tensor)

    return pieces


def parts_converted(
    model: OpenModel, split_points: Sequence[int], requested: Sequence[str], dtype: str, report: ProgressCallback
) -> list[Part]:
    """Load components in a dtype, to be saved in it."""
    fetched = plan_and_fetch(model, split_points, requested, dtype, report)
    components = load_components(model, fetched, LoadOptions(), report)
    return [_part(component, companion_files(model, component.kind, report)) for component in components.values()]


def parts_in_memory(
    source: AnySplitModel | SplitCausalLM | ComponentModel | Mapping[str, ComponentModel] | Iterable[ComponentModel],
) -> list[Part]:
    """Return components in memory with their present values.

    Raises:
        ConfigurationError: They are not components, do not belong together, or are of unknown origin.
    """
    components = _components(source)
    origins = [component.origin for component in components if component.origin is not None]
    problems = origin_mismatches(origins)
    problems += [
        f"the {component.component} was not loaded from a checkpoint, so nothing says where it was cut"
        for component in components
        if component.origin is None
    ]
    if problems:
        raise ConfigurationError(
            f"these components cannot be saved: {'; '.join(problems)}",
            hint="save components that load_split_model or load_component made, of one checkpoint and one split",
        )
    for component in components:
        _refuse_changed(component)
    return [_part(component, {}) for component in components]


def _refuse_changed(component: ComponentModel) -> None:
    """Refuse to save a component whose modules were changed: it could not be loaded.

    Raises:
        ConfigurationError: It has an adapter, or tensors are missing, added or of other shapes.
    """
    origin = component.origin
    if origin is None:
        return
    names = component.state_dict()
    if any(name.split(".")[-1].startswith(_OF_ADAPTERS) or _ADAPTED & set(name.split(".")) for name in names):
        raise ConfigurationError(
            f"there is an adapter on the {component.component}, and a saved component has none",
            hint="save the adapter with save_adapter, or put it into the weights first: merge_and_unload",
        )
    config = hf_config(component.family, origin.config, origin.model, origin.dtype)
    if getattr(config, "add_cross_attention", False):
        # Cross-attention is left out if the checkpoint has no tensors for it.
        config.add_cross_attention = component.config.add_cross_attention
    expected = build_component(component.family, config, component.component, component.layer_range).state_dict()
    problems = [f"{name} is missing" for name in expected.keys() - names.keys()]
    problems += [f"{name} is not in the checkpoint" for name in names.keys() - expected.keys()]
    problems += [
        f"{name} is {list(names[name].shape)}, and {list(expected[name].shape)} by the checkpoint"
        for name in names.keys() & expected.keys()
        if names[name].shape != expected[name].shape
    ]
    if problems:
        raise ConfigurationError(
            f"the {component.component} does not have the tensors it was loaded with: "
            f"{listed(sorted(problems), '; ', limit=SENTENCE)}",
            hint="undo the change of its modules, then save it; changed values are allowed",
        )


def _components(source: Any) -> list[ComponentModel]:
    parts = source
    if isinstance(source, ComponentModel):
        parts = [source]
    # Looked up on the class: a PeftModel forwards attributes to the wrapped model, and would lose its adapter.
    elif hasattr(type(source), "components"):
        parts = source.components
    elif isinstance(source, Mapping):
        parts = source.values()
    elif not isinstance(source, Iterable):
        parts = [source]
    components = [component for component in parts if component is not None]
    wrong = [type(component).__name__ for component in components if not isinstance(component, ComponentModel)]
    names = [component.component for component in components if isinstance(component, ComponentModel)]
    if wrong or not components or len(set(names)) < len(names):
        rejected = ", ".join(wrong or names) or "nothing"
        raise ConfigurationError(
            f"{rejected} cannot be saved as a split",
            hint="give a checkpoint, a SplitCausalLM, or components, each once",
        )
    return sorted(components, key=lambda component: place_of(component.component))


def _part(component: ComponentModel, copied: Mapping[str, Path]) -> Part:
    origin = component.origin
    if origin is None:
        raise ConfigurationError("a component of unknown origin cannot be saved", hint="load it from a checkpoint")
    tensors: dict[str, Tensor] = {}
    state = component.state_dict()
    for planned in component.parted:
        tensors[planned.info.key] = _parted_tensor(planned, state)
    made = {place.target for planned in component.parted for place in planned.places}
    # A tensor that the checkpoint holds once for two modules is saved once.
    for name, tensor in state.items():
        if name in made:
            continue
        stored = _tensor(origin.keys.get(name, name), tensor)
        tensors.setdefault(stored.key, stored)
    dtype = str(next(component.parameters()).dtype).removeprefix("torch.")
    # Loaded weights are not quantised, whatever the source was.
    stale = ("torch_dtype", "quantization_config")
    config = {name: value for name, value in origin.config.items() if name not in stale} | {"dtype": dtype}
    written = {CONFIG: config_text(config)}
    # None if the checkpoint has no generation_config.json.
    settings = getattr(component, "generation_config", None)
    if origin.component == Component.TOP and GENERATION_CONFIG not in copied and settings is not None:
        written[GENERATION_CONFIG] = settings.to_json_string()
    return Part(
        origin=replace(origin, dtype=dtype),
        own_values=True,
        tensors=tuple(tensors.values()),
        copied={name: path for name, path in copied.items() if name != CONFIG},
        written=written,
    )


def _parted_tensor(planned: PlannedTensor, state: Mapping[str, torch.Tensor]) -> Tensor:
    """Return a tensor as the file has it, of the present values of those that were made of it."""
    # Checked as one that is saved whole.
    like = _tensor(planned.info.key, state[planned.places[0].target])
    nbytes = planned.elements * DTYPE_BYTES[like.dtype]
    return Tensor(like.key, like.dtype, planned.info.shape, nbytes, lambda: tensor_pieces(source_from(planned, state)))


def _tensor(key: str, tensor: torch.Tensor) -> Tensor:
    dtype = dtype_names().get(tensor.dtype)
    if tensor.device.type == "meta" or dtype is None:
        raise ConfigurationError(
            f"{key} is a tensor of {tensor.dtype} on {tensor.device}, which cannot be saved",
            hint="save a component of plain tensors",
        )
    return Tensor(key, dtype, tuple(tensor.shape), tensor.nbytes, lambda: tensor_pieces(tensor))
