"""Loading a ``.pt`` or ``.pth`` file: a state dict for a given class, or a whole pickled module.

A pickle can run any code when it is opened. So only tensors and plain values are read from the file,
unless the configuration sets ``allow_pickle``.
"""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from splitlearn_core.arguments import user_path
from splitlearn_core.checkpoint.prefetch import read_in
from splitlearn_core.checkpoint.torch_file import is_mappable, open_torch_file
from splitlearn_core.errors import (
    ConfigurationError,
    InvalidCheckpointError,
    MissingFileError,
    TensorMismatchError,
    translate,
)
from splitlearn_core.loading.options import check_device
from splitlearn_core.manager.config import ModelConfig
from splitlearn_core.manager.loaders.loadable import (
    HOST,
    MAPPED,
    LoadPlan,
    ReportProgress,
    Version,
    refuse_changes,
    system_error,
    versions,
)
from splitlearn_core.manager.resources import ledger_of
from splitlearn_core.quoting import SENTENCE, listed, said
from splitlearn_core.types import DTYPE_BYTES, FLOAT_DTYPES, Progress

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

#: Keys under which training scripts save the state dict.
_STATE_DICT_KEYS = ("state_dict", "model_state_dict", "model")
#: Bytes of the smallest floating dtype that a converted tensor may have been stored in.
_SMALLEST_FLOAT = 2


@dataclass(frozen=True, slots=True)
class _Details:
    path: Path
    files: Mapping[Path, Version]
    size: int
    mappable: bool
    #: Whether the whole file is read at once, rather than page by page on first use.
    reads: bool


def plan(config: ModelConfig, report: ReportProgress) -> LoadPlan:
    """Find the file, and compute the memory that loading takes."""
    report(Progress("resolving"))
    if config.warmup:
        raise ConfigurationError(
            f"{config.model_id} cannot be warmed up: the inputs of a PyTorch module are unknown",
            hint="leave warmup out, and call the model once yourself",
        )
    path = _find(config)
    mappable = is_mappable(path)
    report(Progress("importing"))
    check_device(config.device)
    if config.architecture is not None:
        _architecture(config.architecture)
    report(Progress("planning"))
    files = versions([path])
    size = path.stat().st_size
    needs, keeps = _memory(config, size, mappable)
    reads = not mappable or config.dtype != "auto" or config.device != "cpu"
    return LoadPlan(needs, keeps, str(path), config.dtype, config.device, _Details(path, files, size, mappable, reads))


def load(config: ModelConfig, plan: LoadPlan, report: ReportProgress) -> torch.nn.Module:
    """Read the file and fill the module, completely or not at all."""
    details: _Details = plan.details
    refuse_changes(details.files)
    if details.reads:
        read_in([details.path], report)
    saved = _read(config, details)
    report(Progress("building"))
    module = _module(config, saved, report)
    del saved
    report(Progress("verifying", None, details.size, details.size, details.path.name))
    empty = [name for name, tensor in (*module.named_parameters(), *module.named_buffers()) if tensor.is_meta]
    if empty:
        raise InvalidCheckpointError(
            f"{config.model_path} leaves tensors of {config.architecture} without values: {listed(empty)}",
            hint="register them as persistent, or compute them in the class without torch.empty",
        )
    refuse_changes(details.files)
    return module.to(config.device).eval()


def _find(config: ModelConfig) -> Path:
    if config.model_path is None:
        raise ConfigurationError(f"{config.model_id} has no model_path", hint="give the path of the .pt or .pth file")
    path = user_path(config.model_path)
    if path.is_dir():
        inside = ", ".join(sorted(p.name for p in path.iterdir() if p.suffix in (".pt", ".pth"))[:8])
        raise MissingFileError(f"{path} is a folder", hint=f"give a file{f', one of {inside}' if inside else ''}")
    if not path.exists():
        raise MissingFileError(f"there is no file {path}", hint="check model_path")
    if not path.is_file():
        raise InvalidCheckpointError(f"{path} is not a regular file", hint="give the path of the .pt or .pth file")
    return path


def _memory(config: ModelConfig, size: int, mappable: bool) -> tuple[dict[str, int], dict[str, int]]:
    """Return the bytes at the peak of loading, and those kept afterwards, by ledger, estimated by the file's size."""
    loaded = size
    if config.dtype != "auto":
        loaded = size * max(1, DTYPE_BYTES[FLOAT_DTYPES[config.dtype]] // _SMALLEST_FLOAT)
    if config.device == "cpu" and config.dtype == "auto":
        needs = {HOST: 0, MAPPED: size} if mappable else {HOST: size, MAPPED: 0}
        return needs, needs
    # Read, then converted or moved tensor by tensor.
    read, ledger = 0 if mappable else size, ledger_of(config.device)
    needs = {HOST: read, MAPPED: 0}
    return {**needs, ledger: needs.get(ledger, 0) + loaded}, {HOST: 0, MAPPED: 0, ledger: loaded}


def _read(config: ModelConfig, details: _Details) -> Any:
    """Return the object in the file."""
    if config.allow_pickle:
        warning = f"{details.path} is unpickled whole, which can run any code (allow_pickle=True)"
        log.warning(warning)
        warnings.warn(warning, UserWarning, stacklevel=2)
    with translate(partial(system_error, str(details.path))):
        # Allowed by the configuration alone; the warning is above.
        return open_torch_file(
            details.path,
            allow_pickle=config.allow_pickle,
            hint="save module.state_dict() instead; or, for a file that you wrote yourself, set allow_pickle=True",
        )


def _module(config: ModelConfig, saved: Any, report: ReportProgress) -> torch.nn.Module:
    import torch

    if isinstance(saved, torch.nn.Module):
        return saved if config.dtype == "auto" else saved.to(getattr(torch, config.dtype))
    state = _state_dict(config, saved)
    if config.architecture is None:
        raise ConfigurationError(
            f"{config.model_path} holds a state dict, but no module to fill is configured",
            hint="name the class: architecture='package.module:Class'",
        )
    from splitlearn_core.build.torch_state import skeleton

    make = _architecture(config.architecture)
    try:
        # Buffers that the file lacks are computed; parameters take no memory.
        with skeleton(torch.get_default_dtype()):
            module: torch.nn.Module = make()
    # The user's own class may raise anything.
    except Exception as error:
        raise ConfigurationError(
            f"{config.architecture} cannot be called without arguments: {said(error)}",
            hint="name a class, or a function, that needs none",
        ) from error
    _check_tensors(config, module, state)
    module.load_state_dict(_placed(config, state, report), strict=True, assign=True)
    return module


def _architecture(name: str) -> Any:
    """Import the class, or the function that returns a module."""
    module, _, path = name.partition(":")
    try:
        attribute: Any = importlib.import_module(module)
        for part in path.split("."):
            attribute = getattr(attribute, part)
    # The user's own module may raise anything.
    except Exception as error:
        raise ConfigurationError(
            f"the architecture {name} cannot be imported: {said(error)}",
            hint="write it as package.module:Class, of a package that this Python can import",
        ) from error
    if not callable(attribute):
        raise ConfigurationError(
            f"the architecture {name} is {type(attribute).__name__}, not a class", hint="name a class"
        )
    return attribute


def _state_dict(config: ModelConfig, saved: Any) -> dict[str, Any]:
    """Return the state dict, which may be nested in a training checkpoint."""
    import torch

    state = saved
    if isinstance(saved, Mapping) and not any(isinstance(value, torch.Tensor) for value in saved.values()):
        state = next((saved[name] for name in _STATE_DICT_KEYS if isinstance(saved.get(name), Mapping)), saved)
    if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
        raise InvalidCheckpointError(
            f"{config.model_path} holds a {type(state).__name__}, not a state dict", hint="save module.state_dict()"
        )
    return dict(state)


def _check_tensors(config: ModelConfig, module: Any, state: Mapping[str, Any]) -> None:
    if not hasattr(module, "state_dict"):
        raise ConfigurationError(
            f"{config.architecture} returns a {type(module).__name__}, not a torch.nn.Module",
            hint="name a module's class",
        )
    expected = module.state_dict()
    problems = [f"missing: {name}" for name in expected if name not in state]
    problems += [f"unexpected: {name}" for name in state if name not in expected]
    for name in expected.keys() & state.keys():
        shape, stored = getattr(expected[name], "shape", None), getattr(state[name], "shape", None)
        if shape != stored:
            problems.append(f"mis-shaped: {name} is {_shown(stored)} in the file, {_shown(shape)} in the class")
    if problems:
        raise TensorMismatchError(
            f"the tensors of {config.model_path} are not those of {config.architecture}; "
            f"{len(problems)} are wrong:\n  " + listed(sorted(problems), "\n  ", most=20, limit=SENTENCE),
            hint="is it the class that was saved, with the same sizes?",
        )


def _shown(shape: Any) -> str:
    return str(list(shape)) if shape is not None else "no tensor"


def _placed(config: ModelConfig, state: dict[str, Any], report: ReportProgress) -> dict[str, Any]:
    """Convert and move tensors one by one, freeing each in turn; tensors that share memory still do."""
    import torch

    target = None if config.dtype == "auto" else getattr(torch, config.dtype)
    total = sum(value.nbytes for value in state.values() if isinstance(value, torch.Tensor))
    placed: dict[str, Any] = {}
    shared: dict[tuple[object, ...], Any] = {}
    done = 0
    for name in list(state):
        value = state.pop(name)
        placed[name] = value
        if not isinstance(value, torch.Tensor):
            continue
        key = (value.untyped_storage().data_ptr(), value.storage_offset(), value.shape, value.stride(), value.dtype)
        if key not in shared:
            dtype = target if target is not None and value.is_floating_point() else value.dtype
            shared[key] = value.detach().to(device=config.device, dtype=dtype)
        placed[name] = shared[key]
        done += value.nbytes
        report(Progress("building", None, done, total))
    return placed
