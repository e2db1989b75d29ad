"""A PEFT adapter of a whole model: its files, and which component each of its tensors belongs to. Needs no PEFT."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from splitlearn_core.arguments import user_path
from splitlearn_core.checkpoint.config_json import MAX_CONFIG_BYTES, parse_object
from splitlearn_core.checkpoint.files import ADAPTER_CONFIG, ADAPTER_PICKLE, ADAPTER_WEIGHTS, open_regular
from splitlearn_core.checkpoint.safetensors_header import read_header
from splitlearn_core.checkpoint.source import Source, open_source
from splitlearn_core.errors import ConfigurationError, InvalidCheckpointError, MissingFileError
from splitlearn_core.family import ModelFamily
from splitlearn_core.plan.bounds import check_numbers
from splitlearn_core.plan.keys import in_model, placement
from splitlearn_core.plan.split_points import ranges_around
from splitlearn_core.quoting import plain, quote
from splitlearn_core.types import CHUNK_BYTES, Component, LayerRange, TensorInfo, kind_of

if TYPE_CHECKING:
    import torch


#: The files that PEFT's save_pretrained and save_adapter write.
_OWN_FILES = frozenset({ADAPTER_CONFIG, ADAPTER_WEIGHTS, "README.md"})


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """An adapter as PEFT saves it, read and checked except for its tensors."""

    name: str
    config: Mapping[str, Any]
    #: The content of ``adapter_config.json``, for writing it unchanged.
    text: bytes
    weights: Path
    #: All tensors, from the header.
    tensors: Mapping[str, TensorInfo]
    #: Hash of the configuration and the weights: it distinguishes adapters of the same shapes.
    digest: str


def open_adapter(adapter: str | os.PathLike[str], hub: Mapping[str, Any]) -> AdapterFiles:
    """Find an adapter, fetch it if necessary, and check what can be checked without its tensors.

    Args:
        adapter: The folder that PEFT's ``save_pretrained`` wrote, or a repository on the Hub.
        hub: ``cache_dir``, ``revision``, ``token`` and ``local_files_only``.

    Raises:
        MissingFileError: There is none, or a file of it is missing.
        InvalidCheckpointError: Its files are not valid, or pickles.
    """
    return adapter_in(open_source(adapter, entrance=ADAPTER_CONFIG, **hub))


def adapter_in(source: Source) -> AdapterFiles:
    """Read the adapter among the files of a source; raises like :func:`open_adapter`."""
    name, there = source.model, source.files()
    absent = [file for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS) if file not in there]
    if absent and ADAPTER_PICKLE in there:
        raise InvalidCheckpointError(
            f"{name} has its weights only in {ADAPTER_PICKLE}, a pickle file, which can run code when it is opened",
            hint="convert it once: load it with PEFT where you trust it, and call save_pretrained",
        )
    if absent:
        raise MissingFileError(
            f"{name} lacks {', '.join(absent)}", hint="give the folder that PEFT's save_pretrained wrote"
        )
    path, weights = source.path(ADAPTER_CONFIG), source.path(ADAPTER_WEIGHTS)
    with open_regular(path) as file:
        text = file.read(MAX_CONFIG_BYTES + 1)
    config = parse_object(text, str(path), MAX_CONFIG_BYTES, hint="fetch it again")
    check_numbers(config, str(path))
    return AdapterFiles(name, config, text, weights, read_header(weights), _digest(text, weights))


def _digest(text: bytes, weights: Path) -> str:
    digest = hashlib.sha256(text)
    with open_regular(weights) as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def check_adapter_target(directory: Any) -> Path:
    """Return the folder to write an adapter to: a new or empty one, or the folder of an earlier adapter.

    Raises:
        ConfigurationError: It is not a folder, or holds other files, which would look like part of the adapter.
    """
    hint = "give a new or empty folder, or the folder of an earlier adapter"
    if not isinstance(directory, str | os.PathLike):
        raise ConfigurationError(f"{directory!r} is not a path to save an adapter to", hint=hint)
    target = user_path(directory)
    if not target.exists():
        return target
    if not target.is_dir():
        raise ConfigurationError(f"{target} is not a folder to save an adapter to", hint=hint)
    foreign = sorted(path.name for path in target.iterdir() if path.name not in _OWN_FILES)
    if foreign:
        raise ConfigurationError(f"{target} holds other files than an adapter: {', '.join(foreign[:3])}", hint=hint)
    return target


def write_adapter(directory: Path, config: bytes, tensors: Mapping[str, torch.Tensor]) -> Path:
    """Write both files under temporary names first, and rename them, the weights before the configuration."""
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".adapter-") as work:
        # Tensors that share memory, such as a tied head, are stored separately.
        save_file(
            {key: tensor.clone().contiguous() for key, tensor in tensors.items()},
            Path(work) / ADAPTER_WEIGHTS,
            {"format": "pt"},
        )
        (Path(work) / ADAPTER_CONFIG).write_bytes(config)
        for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG):
            (Path(work) / name).replace(directory / name)
    return directory


#: PEFT's prefix of the names of the modules of the whole model.
PREFIX = "base_model.model."
#: Kinds of adapters whose tensors each belong to one module, and the prefix of these tensors within it.
KINDS = {"IA3": "ia3_", "LOHA": "hada_", "LOKR": "lokr_", "LORA": "lora_"}

#: Initialisations of an adapter that do not change the weights of the model.
HARMLESS_INITIALISATIONS = (None, True, False, "gaussian", "orthogonal")
#: Settings that cannot be divided by layers, each with the reason.
_REFUSED = {
    "alora_invocation_tokens": "it looks at token ids, which only the bottom sees",
    "ensure_weight_tying": "it ties modules of different components",
    "layer_replication": "it renumbers layers",
    "megatron_config": "it is for Megatron's parallel layers",
    "target_parameters": "it adapts parameters, not modules",
    "trainable_token_indices": "it changes single rows of the embedding, which a tied head would have to follow",
}


@dataclass(frozen=True, slots=True)
class AdapterSlice:
    """The part of an adapter that belongs to one component."""

    component: str
    #: Keys of the adapter's file.
    keys: tuple[str, ...]
    #: The keys among them of the model's own embedding or head, which was saved with its adapter.
    base_keys: tuple[str, ...]
    #: Modules of the component that the adapter replaces as a whole, by their full names.
    modules_to_save: tuple[str, ...]
    #: Modules of the component that the adapter adapts, by their full names.
    targets: tuple[str, ...]


def config_problems(config: Mapping[str, Any]) -> list[str]:
    """Return why an adapter of this configuration cannot be cut by layers; empty if it can."""
    problems = []
    kind, task = config.get("peft_type"), config.get("task_type")
    if not isinstance(kind, str) or kind not in KINDS:
        problems.append(f"peft_type is {quote(kind)}, which cannot be divided by module; {', '.join(KINDS)} can")
    if task not in (None, "CAUSAL_LM"):
        problems.append(f"task_type is {quote(task)}, not CAUSAL_LM")
    problems += [f"{name}: {why}" for name, why in _REFUSED.items() if config.get(name)]
    initialisation = config.get("init_lora_weights")
    if initialisation not in HARMLESS_INITIALISATIONS:
        problems.append(f"init_lora_weights is {quote(initialisation)}, which changes the model's own weights too")
    saved = config.get("modules_to_save")
    if saved is not None and not (isinstance(saved, list) and all(isinstance(name, str) and name for name in saved)):
        problems.append(f"modules_to_save is {quote(saved)}, not a list of names")
    return problems


def rank_problems(config: Mapping[str, Any], infos: Iterable[TensorInfo]) -> list[str]:
    """Return the ranks of a LoRA adapter that none of its tensors has: PEFT would allocate matrices of that size."""
    if config.get("peft_type") != "LORA":
        return []
    largest = max((size for info in infos for size in info.shape), default=0)
    pattern = config.get("rank_pattern")
    ranks = {"r": config.get("r"), **(pattern if isinstance(pattern, Mapping) else {})}
    return [
        f"the rank {quote(rank)} of {plain(name)}, and no tensor has a dimension over {largest:,}"
        for name, rank in ranks.items()
        if rank is not None and not (type(rank) is int and rank <= largest)
    ]


def key_problems(keys: Iterable[str], config: Mapping[str, Any], family: ModelFamily, owned: LayerRange) -> list[str]:
    """Return the tensors of an adapter that have no place in a model of this family and depth."""
    component_of = placement(family, ranges_around(Component.TRUNK, owned))
    names = list(keys)
    replaced = {_saved(key, config) for key in names}
    # Those of other models than the decoder have no effect on it; an adapter of nothing else is of another model.
    others = {key for key in names if key.startswith(PREFIX) and in_model(family, key.removeprefix(PREFIX)) is None}
    others = others if len(others) < len(names) else set()
    problems = [
        f"unexpected: {key}"
        for key in names
        if not key.startswith(PREFIX) or (component_of(key.removeprefix(PREFIX)) is None and key not in others)
    ]
    absent = [name for name in config.get("modules_to_save") or () if not any(path.endswith(name) for path in replaced)]
    return problems + [f"missing: every tensor of {module}, of modules_to_save" for module in absent]


def slice_keys(
    keys: Iterable[str], config: Mapping[str, Any], family: ModelFamily, component: str, owned: LayerRange
) -> AdapterSlice:
    """Select the tensors of one component, by the layer numbers of the whole model."""
    component_of = placement(family, ranges_around(component, owned))
    kind = kind_of(component)
    own = sorted(key for key in keys if component_of(key.removeprefix(PREFIX)) == kind)
    saved = dict.fromkeys(filter(None, (_saved(key, config) for key in own)))
    base = tuple(key for key in own if key.endswith(".base_layer.weight"))
    targets = dict.fromkeys(filter(None, (_target(key, config) for key in own)))
    return AdapterSlice(component, tuple(own), base, tuple(saved), tuple(targets))


def adapts_ends(keys: Iterable[str], config: Mapping[str, Any], family: ModelFamily) -> bool:
    """Return whether an adapter adapts, and does not replace, the embedding or the head."""
    ends = (f"{PREFIX}{family.base}.{family.embedding}.", f"{PREFIX}{family.head}.")
    return any(key.startswith(ends) and _target(key, config) for key in keys)


def adapted_modules(keys: Iterable[str], config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the modules of the whole model that an adapter adapts, by their full names."""
    return tuple(dict.fromkeys(filter(None, (_target(key, config) for key in sorted(keys)))))


def _target(key: str, config: Mapping[str, Any]) -> str:
    """Return the module that a tensor adapts; empty if it replaces one, or is a trained bias."""
    module, found, _ = key.removeprefix(PREFIX).partition(f".{KINDS[config['peft_type']]}")
    return module if found else ""


def _saved(key: str, config: Mapping[str, Any]) -> str:
    """Return the module that a tensor belongs to if the adapter replaces that module; else empty.

    PEFT compares the ends of names, also without a dot: ``norm`` matches ``input_layernorm``.
    """
    ends = tuple(config.get("modules_to_save") or ())
    parts = [] if _target(key, config) else key.removeprefix(PREFIX).split(".")[:-1]
    paths = (".".join(parts[:depth]) for depth in range(1, len(parts) + 1))
    return next((path for path in paths if path.endswith(ends)), "")
