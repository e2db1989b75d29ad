"""Tensors in memory, and in files that only torch reads, as bytes to be saved."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from splitlearn_core.build.component import ComponentModel
from splitlearn_core.build.configuration import hf_config
from splitlearn_core.build.construction import build_component
from splitlearn_core.checkpoint.origin import origin_mismatches
from splitlearn_core.checkpoint.torch_file import read_state_dict
from splitlearn_core.errors import ConfigurationError, InvalidCheckpointError
from splitlearn_core.loading.load import load_components
from splitlearn_core.loading.opening import OpenModel
from splitlearn_core.loading.options import LoadOptions
from splitlearn_core.loading.planning import plan_and_fetch
from splitlearn_core.quoting import SENTENCE, listed
from splitlearn_core.storage.contents import CONFIG, GENERATION, Part, companion_files, config_text
from splitlearn_core.storage.durable_files import CHUNK_BYTES
from splitlearn_core.storage.weight_layout import Tensor
from splitlearn_core.types import DTYPE_BYTES, PYTORCH, Component, ProgressCallback, TensorInfo, place_of

if TYPE_CHECKING:
    from splitlearn_core.pipeline import SplitCausalLM
    from splitlearn_core.split_model import AnySplitModel

_NAMES = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64",
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.int32: "I32", torch.int64: "I64",
}  # fmt: skip

#: How PEFT calls its own tensors, and the modules that it puts around those of the model.
_OF_ADAPTERS = ("lora_", "ia3_", "hada_", "lokr_")
_ADAPTED = {"base_layer", "original_module", "modules_to_save", "lora_A", "lora_B"}


def tensor_pieces(tensor: torch.Tensor) -> Iterator[memoryview]:
    """Yield the bytes of a tensor in chunks; of one on another device, a chunk at a time is copied here."""
    flat = tensor.detach().reshape(-1)
    elements = CHUNK_BYTES // tensor.element_size()
    for start in range(0, flat.numel(), elements):
        piece: Any = flat[start : start + elements].cpu().contiguous().view(torch.uint8).numpy()
        yield memoryview(piece)


def torch_file_pieces(path: Path, info: TensorInfo) -> Callable[[], Iterator[memoryview]]:
    """Return a function that reads one tensor of a ``.bin`` file, which is mapped and not read whole."""
    if info.format != PYTORCH:
        raise ConfigurationError(
            f"{path} is of the format {info.format}, which cannot be copied as it is stored",
            hint="give a dtype: the tensors are then loaded, and saved as that",
        )

    def pieces() -> Iterator[memoryview]:
        tensor = read_state_dict(path).get(info.key)
        if tensor is None or tuple(tensor.shape) != info.shape or tensor.nbytes != info.nbytes:
            raise InvalidCheckpointError(
                f"{path} was changed while it was being saved: {info.key} is not what it was",
                hint="save again once it is written completely",
            )
        yield from tensor_pieces(tensor)

    return pieces


def parts_converted(
    model: OpenModel, split_points: Sequence[int], asked: Sequence[str], dtype: str, report: ProgressCallback
) -> list[Part]:
    """Load components in a dtype, to be saved in it."""
    fetched = plan_and_fetch(model, split_points, asked, dtype, report)
    components = load_components(model, fetched, LoadOptions(), report)
    return [_part(component, companion_files(model, component.kind, report)) for component in components.values()]


def parts_in_memory(
    source: AnySplitModel | SplitCausalLM | ComponentModel | Mapping[str, ComponentModel] | Iterable[ComponentModel],
) -> list[Part]:
    """Take the present values of components.

    Raises:
        ConfigurationError: They are none, or do not belong together, or nobody knows where they come from.
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
    """Refuse to save what is not the module of the checkpoint any more: nobody could load it.

    Raises:
        ConfigurationError: There is an adapter on it, or tensors are missing, added or of other shapes.
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
        # It is left out where the checkpoint has no tensors for it.
        config.add_cross_attention = component.config.add_cross_attention
    plain = build_component(component.family, config, component.component, component.layer_range).state_dict()
    problems = [f"{name} is missing" for name in plain.keys() - names.keys()]
    problems += [f"{name} is not in the checkpoint" for name in names.keys() - plain.keys()]
    problems += [
        f"{name} is {list(names[name].shape)}, and {list(plain[name].shape)} by the checkpoint"
        for name in names.keys() & plain.keys()
        if names[name].shape != plain[name].shape
    ]
    if problems:
        raise ConfigurationError(
            f"the {component.component} has not the tensors it was loaded with: "
            f"{listed(sorted(problems), '; ', limit=SENTENCE)}",
            hint="undo the change of its modules, and save it then; its values may be any",
        )


def _components(source: Any) -> list[ComponentModel]:
    given = source
    if isinstance(source, ComponentModel):
        given = [source]
    # By the class: a PeftModel passes on the attributes of the model that it wraps, and would lose its adapter.
    elif hasattr(type(source), "components"):
        given = source.components
    elif isinstance(source, Mapping):
        given = source.values()
    elif not isinstance(source, Iterable):
        given = [source]
    components = [component for component in given if component is not None]
    wrong = [type(component).__name__ for component in components if not isinstance(component, ComponentModel)]
    names = [component.component for component in components if isinstance(component, ComponentModel)]
    if wrong or not components or len(set(names)) < len(names):
        what = ", ".join(wrong or names) or "nothing"
        raise ConfigurationError(
            f"{what} cannot be saved as a split",
            hint="give a checkpoint, a SplitCausalLM, or components, each once",
        )
    return sorted(components, key=lambda component: place_of(component.component))


def _part(component: ComponentModel, copied: Mapping[str, Path]) -> Part:
    origin = component.origin
    if origin is None:
        raise ConfigurationError("a component of unknown origin cannot be saved", hint="load it from a checkpoint")
    tensors: dict[str, Tensor] = {}
    # A tensor that the checkpoint holds once for two modules is saved once.
    for name, tensor in component.state_dict().items():
        stored = _tensor(origin.keys.get(name, name), tensor)
        tensors.setdefault(stored.key, stored)
    dtype = str(next(component.parameters()).dtype).removeprefix("torch.")
    # What was loaded is plain, whatever the source was.
    stale = ("torch_dtype", "quantization_config")
    config = {name: value for name, value in origin.config.items() if name not in stale} | {"dtype": dtype}
    written = {CONFIG: config_text(config)}
    # A checkpoint need not have any: then a top has none either.
    settings = getattr(component, "generation_config", None)
    if origin.component == Component.TOP and GENERATION not in copied and settings is not None:
        written[GENERATION] = settings.to_json_string()
    return Part(
        origin=replace(origin, dtype=dtype),
        own_values=True,
        tensors=tuple(tensors.values()),
        copied={name: path for name, path in copied.items() if name != CONFIG},
        written=written,
    )


def _tensor(key: str, tensor: torch.Tensor) -> Tensor:
    if tensor.device.type == "meta" or tensor.dtype not in _NAMES:
        raise ConfigurationError(
            f"{key} is a tensor of {tensor.dtype} on {tensor.device}, which cannot be saved",
            hint="save a component of plain tensors",
        )
    name = _NAMES[tensor.dtype]
    nbytes = tensor.numel() * DTYPE_BYTES[name]
    return Tensor(key, name, tuple(tensor.shape), nbytes, lambda: tensor_pieces(tensor))
