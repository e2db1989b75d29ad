"""Loading through transformers: one component of a family's model, or a whole model, which needs no family."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from splitlearn_core.checkpoint.checkpoint import Checkpoint
from splitlearn_core.checkpoint.config_json import MAX_CONFIG_BYTES, read_object
from splitlearn_core.checkpoint.files import CONFIG, GENERATION_CONFIG
from splitlearn_core.checkpoint.prefetch import read_in
from splitlearn_core.checkpoint.source import open_source
from splitlearn_core.errors import (
    CheckpointError,
    ConfigurationError,
    InvalidCheckpointError,
    SplitLearnError,
    translate,
)
from splitlearn_core.loading.load import collection_paused, import_builders, load_components
from splitlearn_core.loading.opening import OpenModel, open_model
from splitlearn_core.loading.options import LoadOptions, check_device, check_options, memory_needed
from splitlearn_core.loading.planning import PlannedLoad, default_dtype, fetch, plan_and_fetch
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
from splitlearn_core.plan.bounds import check_against_tensors, check_numbers
from splitlearn_core.plan.split_points import names_of_parts
from splitlearn_core.plan.splitplan import PlannedTensor, loaded_nbytes, parse_parts, resolve_dtype
from splitlearn_core.quoting import quote, reason, said
from splitlearn_core.types import FLOAT_DTYPES, SAFETENSORS, Progress, TensorInfo

if TYPE_CHECKING:
    import torch


# --- a component ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _ComponentDetails:
    model: OpenModel
    planned: PlannedLoad
    options: LoadOptions
    files: Mapping[Path, Version]


def plan_component(config: ModelConfig, report: ReportProgress) -> LoadPlan:
    """Find the files, download missing ones, and compute the memory that loading takes."""
    report(Progress("resolving"))
    if config.component is None or config.split_points is None:
        raise ConfigurationError(
            f"{config.model_id} has no component or no split points", hint="a family's model is loaded in components"
        )
    (component,) = parse_parts(config.component, names_of_parts(config.split_points))
    model = open_model(config.model_path, config.model_type, progress=report, **_hub_options(config))
    options = LoadOptions(config.device, config.strategy, config.attn_implementation, strict=config.strict)
    check_options(model, options)
    fetched = plan_and_fetch(model, config.split_points, (component,), config.dtype, report)
    split = fetched.split
    memory = memory_needed(model, split, options, fetched.paths)
    needs, keeps = {HOST: memory.peak, MAPPED: memory.mapped}, {HOST: memory.kept, MAPPED: memory.mapped}
    if config.device != "cpu":
        ledger, loaded = ledger_of(config.device), split.component(component).loaded_bytes(split.dtype)
        for charge in (needs, keeps):
            charge[ledger] = charge.get(ledger, 0) + loaded
    location = model.checkpoint.folder
    details = _ComponentDetails(model, fetched, options, versions(fetched.paths.values()))
    return LoadPlan(needs, keeps, str(location), split.dtype, config.device, details)


def load_component(config: ModelConfig, plan: LoadPlan, report: ReportProgress) -> torch.nn.Module:
    """Build the component and read its weights, completely or not at all."""
    details: _ComponentDetails = plan.details
    refuse_changes(details.files)

    def report_until_ready(progress: Progress) -> None:
        # It is ready only once it is verified, below.
        if progress.stage != "ready":
            report(progress)

    # Before any bytes are expected, so that importing does not count as stalled reading.
    report(Progress("importing"))
    import_builders(details.model.family)
    (part,) = details.planned.split.components
    options = replace(details.options, on_layer=partial(report, Progress("building", part.component)))
    # A shard may have left the cache since it was planned.
    fetched = fetch(details.model, details.planned, report_until_ready)
    module = load_components(details.model, fetched, options, report_until_ready)[part.component]
    report(Progress("verifying", part.component, part.nbytes, part.nbytes))
    refuse_changes(details.files)
    return module


# --- a whole model ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _ModelDetails:
    directory: Path
    files: Mapping[Path, Version]
    nbytes: int
    #: Format of the weights; transformers, too, runs no code from a pickle.
    format: str
    #: Whether the whole file is read at once, rather than page by page on first use.
    reads: bool


def plan_model(config: ModelConfig, report: ReportProgress) -> LoadPlan:
    """Find the files, download missing ones, and compute the memory that loading takes."""
    report(Progress("resolving"))
    if config.model_path is None:
        raise ConfigurationError(f"{config.model_id} has no model_path", hint="give a directory or a Hub id")
    check_device(config.device)
    checkpoint = Checkpoint(open_source(config.model_path, **_hub_options(config)))
    stated = checkpoint.config
    if checkpoint.quantization:
        raise CheckpointError(
            f"{config.model_path} is quantised ({checkpoint.quantization}), and the memory that it takes is unknown",
            hint="use the original, unquantised checkpoint",
        )
    report(Progress("importing"))
    _check_is_known(config.model_path, stated)
    checkpoint.fetch_headerless_files(report)
    keys = sorted(checkpoint.weight_map)
    paths = checkpoint.fetch(checkpoint.shards(keys), report)
    report(Progress("planning"))
    tensors = checkpoint.tensors(keys)
    check_against_tensors(stated, tensors.values(), config.model_path)
    dtype = resolve_dtype(config.dtype, stated, ()) if config.dtype != "auto" else default_dtype(checkpoint, stated)
    # Small, and needed by from_pretrained, which must not contact the Hub itself.
    generation = checkpoint.optional_file(GENERATION_CONFIG)
    if generation is not None:
        check_numbers(read_object(generation, MAX_CONFIG_BYTES), str(generation))
    needs, keeps = _memory(tensors.values(), dtype, config.device)
    details = _ModelDetails(
        directory=checkpoint.source.path(CONFIG).parent,
        files=versions(paths.values()),
        nbytes=sum(info.nbytes for info in tensors.values()),
        format=checkpoint.format,
        reads=config.device != "cpu" or needs[HOST] > 0,
    )
    return LoadPlan(needs, keeps, str(details.directory), dtype, config.device, details)


def load_model(config: ModelConfig, plan: LoadPlan, report: ReportProgress) -> torch.nn.Module:
    """Build the model and read its weights, completely or not at all."""
    details: _ModelDetails = plan.details
    refuse_changes(details.files)
    report(Progress("importing"))
    with collection_paused():
        from transformers import AutoModelForCausalLM

        from splitlearn_core.build.configuration import refuse_incomplete
        from splitlearn_core.build.torch_state import build_turn

    if details.reads:
        # from_pretrained runs under a lock, so the files are read before it.
        read_in(details.files, report)
    with build_turn(lambda: report(Progress("building"))), translate(partial(_load_error, config.model_path or "")):
        module, info = AutoModelForCausalLM.from_pretrained(
            details.directory,
            dtype=plan.dtype,
            attn_implementation=config.attn_implementation,
            local_files_only=True,
            trust_remote_code=False,
            # None would prefer safetensors too, and look on the Hub for a converted copy.
            use_safetensors=details.format == SAFETENSORS,
            # So that all of them are listed, not only counted; refuse_incomplete refuses the model.
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    report(Progress("verifying", None, details.nbytes, details.nbytes))
    refuse_incomplete(config.model_path or "", module, info)
    refuse_changes(details.files)
    if config.device != "cpu":
        module = module.to(config.device)
    loaded: torch.nn.Module = module
    return loaded


def _check_is_known(model: str, stated: Mapping[str, Any]) -> None:
    """Refuse a model type whose code is not part of transformers."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if stated["model_type"] not in CONFIG_MAPPING:
        raise ConfigurationError(
            f"transformers knows no model type {quote(stated['model_type'])}, which is that of {model}; "
            "code that comes with a checkpoint is not run",
            hint="a newer transformers may have it: pip install --upgrade transformers",
        )


def _memory(tensors: Iterable[TensorInfo], dtype: str, device: str) -> tuple[dict[str, int], dict[str, int]]:
    """Return the bytes at the peak of loading, and those kept afterwards, by ledger."""
    planned = [PlannedTensor(info.key, info) for info in tensors]
    loaded = sum(loaded_nbytes(tensor, dtype) for tensor in planned)
    floating = [tensor for tensor in planned if tensor.info.dtype in FLOAT_DTYPES.values()]
    converted = sum(loaded_nbytes(tensor, dtype) for tensor in floating if tensor.info.dtype != FLOAT_DTYPES[dtype])
    needs = {HOST: converted, MAPPED: loaded - converted}
    if device == "cpu":
        return needs, needs
    # It is made on the CPU and then moved, tensor by tensor.
    ledger = ledger_of(device)
    return {**needs, ledger: needs.get(ledger, 0) + loaded}, {HOST: 0, MAPPED: 0, ledger: loaded}


def _hub_options(config: ModelConfig) -> dict[str, Any]:
    """Return the configuration's arguments for the Hub."""
    return {
        "cache_dir": config.cache_dir,
        "revision": config.revision,
        "token": config.token,
        "local_files_only": config.local_files_only,
    }


def _load_error(model: str, error: BaseException) -> SplitLearnError:
    """Translate an error of ``from_pretrained``, with a hint at the input to check."""
    from safetensors import SafetensorError

    if known := system_error(model, error):
        return known
    if isinstance(error, SafetensorError):
        return InvalidCheckpointError(
            f"a weight file of {model} is not a valid safetensors file: {reason(error)}",
            hint="download or write the file again",
        )
    if isinstance(error, ValueError | ImportError | KeyError):
        return ConfigurationError(
            f"transformers cannot load {model}: {said(error)}",
            hint="check the values of config.json, and attn_implementation where it was given",
        )
    # With tensors that do not fit, the model's own code may raise anything.
    return CheckpointError(
        f"transformers cannot load {model}: {said(error)}", hint="do config.json and the weights belong together?"
    )
