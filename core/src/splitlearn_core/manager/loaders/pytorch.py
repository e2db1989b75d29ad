"""A ``.pt`` or ``.pth`` file: a state dict for a class that is named, or a whole module out of a pickle.

A pickle can run any code when it is opened. So only tensors and plain values are taken from the
file, unless the configuration says ``allow_pickle``.
"""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from splitlearn_core.checkpoint.prefetch import read_in
from splitlearn_core.checkpoint.torch_file import is_mappable, open_torch_file
from splitlearn_core.errors import ConfigurationError, InvalidCheckpointError, MissingFileError, TensorMismatchError
from splitlearn_core.loading.options import check_device
from splitlearn_core.manager.config import ModelConfig
from splitlearn_core.manager.loaders.loadable import (
    HOST,
    MAPPED,
    LoadPlan,
    ReportProgress,
    Version,
    explaining,
    refuse_changes,
    versions,
)
from splitlearn_core.manager.resources import ledger_of
from splitlearn_core.quoting import SENTENCE, listed, said
from splitlearn_core.types import DTYPE_BYTES, FLOAT_DTYPES, Progress
from splitlearn_core.user_paths import user_path

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

#: Where training scripts put the state dict among other things.
_NESTED = ("state_dict", "model_state_dict", "model")
#: Bytes of the smallest plain floating dtype: what is converted may have been that small.
_SMALLEST = 2


@dataclass(frozen=True, slots=True)
class _Details:
    path: Path
    files: Mapping[Path, Version]
    size: int
    mappable: bool
    #: Whether every byte is read at once, and not page by page when it is used.
    reads: bool


def plan(config: ModelConfig, report: ReportProgress) -> LoadPlan:
    """Find the file, and say what loading takes."""
    report(Progress("resolving"))
    if config.warmup:
        raise ConfigurationError(
            f"{config.model_id} cannot be warmed up: nothing says what a PyTorch module takes",
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
    """Read the file and fill the module; all of it or nothing."""
    details: _Details = plan.details
    refuse_changes(details.files)
    if details.reads:
        read_in([details.path], report)
    saved = _read(config, details)
    report(Progress("building"))
    module = _module(config, saved, report)
    del saved
    report(Progress("verifying", None, details.size, details.size, details.path.name))
    _check_complete(config, module)
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
        raise InvalidCheckpointError(f"{path} is no ordinary file", hint="give the path of the .pt or .pth file")
    return path


def _memory(config: ModelConfig, size: int, mappable: bool) -> tuple[dict[str, int], dict[str, int]]:
    """Return what loading takes at its peak, and what is kept, by ledger; the file's size stands for its tensors'."""
    loaded = size
    if config.dtype != "auto":
        loaded = size * max(1, DTYPE_BYTES[FLOAT_DTYPES[config.dtype]] // _SMALLEST)
    if config.device == "cpu" and config.dtype == "auto":
        needs = {HOST: 0, MAPPED: size} if mappable else {HOST: size, MAPPED: 0}
        return needs, needs
    # Read, and then converted or moved tensor by tensor.
    read, ledger = 0 if mappable else size, ledger_of(config.device)
    needs = {HOST: read, MAPPED: 0}
    return {**needs, ledger: needs.get(ledger, 0) + loaded}, {HOST: 0, MAPPED: 0, ledger: loaded}


def _read(config: ModelConfig, details: _Details) -> Any:
    """Return what is in the file."""
    if config.allow_pickle:
        warning = f"{details.path} is unpickled whole, which can run any code (allow_pickle=True)"
        log.warning(warning)
        warnings.warn(warning, UserWarning, stacklevel=2)
    with explaining(str(details.path)):
        # The configuration decides, and what it decided was said.
        return open_torch_file(
            details.path,
            allow_pickle=config.allow_pickle,
            hint="save module.state_dict() instead; or, for a file of your own making, set allow_pickle=True",
        )


def _module(config: ModelConfig, saved: Any, report: ReportProgress) -> torch.nn.Module:
    import torch

    if isinstance(saved, torch.nn.Module):
        return saved if config.dtype == "auto" else saved.to(getattr(torch, config.dtype))
    state = _state_dict(config, saved)
    if config.architecture is None:
        raise ConfigurationError(
            f"{config.model_path} holds a state dict, and nothing says what module it fills",
            hint="name the class: architecture='package.module:Class'",
        )
    from splitlearn_core.build.pruning import skeleton

    made = _architecture(config.architecture)
    try:
        # Buffers that the file does not hold are computed; parameters take no memory.
        with skeleton(torch.get_default_dtype()):
            module: torch.nn.Module = made()
    # The class is the user's own: it raises what it likes.
    except Exception as error:
        raise ConfigurationError(
            f"{config.architecture} cannot be made without arguments: {said(error)}",
            hint="name a class, or a function, that takes none",
        ) from error
    _refuse_misfit(config, module, state)
    module.load_state_dict(_placed(config, state, report), strict=True, assign=True)
    return module


def _architecture(name: str) -> Any:
    """Import the class, or the function that makes a module."""
    module, _, path = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
    # Importing runs the user's own module: it raises what it likes.
    except Exception as error:
        raise ConfigurationError(
            f"the architecture {name} cannot be imported: {said(error)}",
            hint="write it as package.module:Class, of a package that this Python can import",
        ) from error
    if not callable(found):
        raise ConfigurationError(f"the architecture {name} is {type(found).__name__}, no class", hint="name a class")
    return found


def _state_dict(config: ModelConfig, saved: Any) -> dict[str, Any]:
    """Find the state dict, alone or among other things that were saved with it."""
    import torch

    found = saved
    if isinstance(found, Mapping) and not any(isinstance(value, torch.Tensor) for value in found.values()):
        found = next((found[name] for name in _NESTED if isinstance(found.get(name), Mapping)), found)
    if not isinstance(found, Mapping) or not all(isinstance(name, str) for name in found):
        raise InvalidCheckpointError(
            f"{config.model_path} holds a {type(found).__name__}, no state dict", hint="save module.state_dict()"
        )
    return dict(found)


def _refuse_misfit(config: ModelConfig, module: Any, state: Mapping[str, Any]) -> None:
    if not hasattr(module, "state_dict"):
        raise ConfigurationError(
            f"{config.architecture} makes a {type(module).__name__}, no torch.nn.Module", hint="name a module's class"
        )
    wanted = module.state_dict()
    problems = [f"missing: {name}" for name in wanted if name not in state]
    problems += [f"unexpected: {name}" for name in state if name not in wanted]
    for name in wanted.keys() & state.keys():
        own, there = getattr(wanted[name], "shape", None), getattr(state[name], "shape", None)
        if own != there:
            problems.append(f"mis-shaped: {name} is {_words(there)} in the file, {_words(own)} in the class")
    if problems:
        raise TensorMismatchError(
            f"the tensors of {config.model_path} are not those of {config.architecture}; "
            f"{len(problems)} are wrong:\n  " + listed(sorted(problems), "\n  ", most=20, limit=SENTENCE),
            hint="is it the class that was saved, with the same sizes?",
        )


def _words(shape: Any) -> str:
    return str(list(shape)) if shape is not None else "no tensor"


def _placed(config: ModelConfig, state: dict[str, Any], report: ReportProgress) -> dict[str, Any]:
    """Convert and move tensors one by one, each let go of in turn; what shared memory, still does."""
    import torch

    wanted = None if config.dtype == "auto" else getattr(torch, config.dtype)
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
            dtype = wanted if wanted is not None and value.is_floating_point() else value.dtype
            shared[key] = value.detach().to(device=config.device, dtype=dtype)
        placed[name] = shared[key]
        done += value.nbytes
        report(Progress("building", None, done, total))
    return placed


def _check_complete(config: ModelConfig, module: torch.nn.Module) -> None:
    empty = [name for name, tensor in (*module.named_parameters(), *module.named_buffers()) if tensor.is_meta]
    if empty:
        raise InvalidCheckpointError(
            f"{config.model_path} leaves tensors of {config.architecture} without values: {listed(empty)}",
            hint="register them as persistent, or compute them in the class without torch.empty",
        )
