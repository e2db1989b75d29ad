"""A whole model through ``AutoModelForCausalLM``, for what no family is installed or wanted."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from splitlearn_core.checkpoint.checkpoint import Checkpoint
from splitlearn_core.checkpoint.config_json import MAX_CONFIG_BYTES, read_object
from splitlearn_core.checkpoint.names import CONFIG, GENERATION_CONFIG
from splitlearn_core.checkpoint.prefetch import read_in
from splitlearn_core.checkpoint.source import open_source
from splitlearn_core.errors import CheckpointError, ConfigurationError, InvalidCheckpointError, SplitLearnError
from splitlearn_core.loading.load import collection_paused
from splitlearn_core.loading.options import check_device
from splitlearn_core.loading.planning import default_dtype
from splitlearn_core.manager.config import ModelConfig
from splitlearn_core.manager.loaders.family_component import hub_options
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
from splitlearn_core.plan.bounds import check_against_tensors, check_numbers
from splitlearn_core.plan.splitplan import PlannedTensor, loaded_nbytes, resolve_dtype
from splitlearn_core.quoting import quote, reason, said
from splitlearn_core.types import FLOAT_DTYPES, SAFETENSORS, Progress, TensorInfo

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Details:
    directory: Path
    files: Mapping[Path, Version]
    nbytes: int
    #: Of the weights; transformers, too, runs no code of a pickle.
    format: str
    #: Whether every byte is read at once, and not page by page when it is used.
    reads: bool


def plan(config: ModelConfig, report: ReportProgress) -> LoadPlan:
    """Find the files, fetch what is missing, and say what loading takes."""
    report(Progress("resolving"))
    if config.model_path is None:
        raise ConfigurationError(f"{config.model_id} has no model_path", hint="give a directory or a Hub id")
    check_device(config.device)
    checkpoint = Checkpoint(open_source(config.model_path, **hub_options(config)))
    stated = checkpoint.config
    if checkpoint.quantization:
        raise CheckpointError(
            f"{config.model_path} is quantised ({checkpoint.quantization}), and nothing says what memory it takes",
            hint="use the original, unquantised checkpoint",
        )
    report(Progress("importing"))
    _check_is_known(config.model_path, stated)
    checkpoint.fetch_undescribed(report)
    keys = sorted(checkpoint.weight_map)
    paths = checkpoint.fetch(checkpoint.shards(keys), report)
    report(Progress("planning"))
    tensors = checkpoint.tensors(keys)
    check_against_tensors(stated, tensors.values(), config.model_path)
    dtype = resolve_dtype(config.dtype, stated, ()) if config.dtype != "auto" else default_dtype(checkpoint, stated)
    # Small, and looked for by from_pretrained, which is not to ask the Hub itself.
    generation = checkpoint.optional_file(GENERATION_CONFIG)
    if generation is not None:
        check_numbers(read_object(generation, MAX_CONFIG_BYTES), str(generation))
    needs, keeps = _memory(tensors.values(), dtype, config.device)
    details = _Details(
        directory=checkpoint.source.path(CONFIG).parent,
        files=versions(paths.values()),
        nbytes=sum(info.nbytes for info in tensors.values()),
        format=checkpoint.format,
        reads=config.device != "cpu" or needs[HOST] > 0,
    )
    return LoadPlan(needs, keeps, str(details.directory), dtype, config.device, details)


def load(config: ModelConfig, plan: LoadPlan, report: ReportProgress) -> torch.nn.Module:
    """Build the model and read its weights; all of it or nothing."""
    details: _Details = plan.details
    refuse_changes(details.files)
    report(Progress("importing"))
    with collection_paused():
        from transformers import AutoModelForCausalLM

        from splitlearn_core.build.pretrained import alone, refuse_incomplete

    if details.reads:
        # from_pretrained has to be alone while it works, so what can be done before it, is.
        read_in(details.files, report)
    with alone(lambda: report(Progress("building"))), _blaming(config.model_path or ""):
        module, info = AutoModelForCausalLM.from_pretrained(
            details.directory,
            dtype=plan.dtype,
            attn_implementation=config.attn_implementation,
            local_files_only=True,
            trust_remote_code=False,
            # None would prefer safetensors too, and look on the Hub for a converted copy.
            use_safetensors=details.format == SAFETENSORS,
            # So that all of them are listed, and not only counted; the model is refused below.
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
    """Refuse a model whose code would have to come with it."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if stated["model_type"] not in CONFIG_MAPPING:
        raise ConfigurationError(
            f"transformers knows no model type {quote(stated['model_type'])}, which config.json of {model} says; "
            "code that comes with a checkpoint is not run",
            hint="a newer transformers may have it: pip install --upgrade transformers",
        )


def _memory(tensors: Iterable[TensorInfo], dtype: str, device: str) -> tuple[dict[str, int], dict[str, int]]:
    """Return what loading takes at its peak, and what is kept, by ledger."""
    planned = [PlannedTensor(info.key, info) for info in tensors]
    loaded = sum(loaded_nbytes(tensor, dtype) for tensor in planned)
    converted = sum(loaded_nbytes(t, dtype) for t in planned if _is_converted(t.info, dtype))
    needs = {HOST: converted, MAPPED: loaded - converted}
    if device == "cpu":
        return needs, needs
    # It is made on the CPU and then moved, tensor by tensor.
    ledger = ledger_of(device)
    return {**needs, ledger: needs.get(ledger, 0) + loaded}, {HOST: 0, MAPPED: 0, ledger: loaded}


def _is_converted(info: TensorInfo, dtype: str) -> bool:
    return info.dtype in FLOAT_DTYPES.values() and info.dtype != FLOAT_DTYPES[dtype]


@contextmanager
def _blaming(model: str) -> Iterator[None]:
    """Say that it was transformers that could not load it, and which of its inputs to look at."""
    from safetensors import SafetensorError

    try:
        with explaining(model):
            yield
    except SplitLearnError:
        raise
    except SafetensorError as error:
        raise InvalidCheckpointError(
            f"a weight file of {model} is no sound safetensors file: {reason(error)}",
            hint="fetch or write the file anew",
        ) from error
    except (ValueError, ImportError, KeyError) as error:
        raise ConfigurationError(
            f"transformers cannot load {model}: {said(error)}",
            hint="check the values of config.json, and attn_implementation where it was given",
        ) from error
    # The model's own code raises what comes of tensors that do not fit.
    except Exception as error:
        raise CheckpointError(
            f"transformers cannot load {model}: {said(error)}",
            hint="do config.json and the weights belong together?",
        ) from error
