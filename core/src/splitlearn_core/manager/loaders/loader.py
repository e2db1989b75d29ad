"""Loading one model from its configuration, in the calling thread: plan, load, warm up; and importing what that needs.

Nothing here awaits, and importing it imports no torch.

``import torch`` and ``import transformers`` hold the GIL for hundreds of milliseconds at a time, so in a worker thread
they stall an event loop just the same. A server imports them before it serves::

    preload({config.model_type for config in configs})
    asyncio.run(serve(configs))
"""

from __future__ import annotations

import dataclasses
import gc
import importlib
import logging
import sys
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

from splitlearn_core.component_host import ComponentHost
from splitlearn_core.errors import (
    ConfigurationError,
    InsufficientMemoryError,
    LoadFailedError,
    PluginError,
    SplitLearnError,
    translate,
)
from splitlearn_core.loading.load import import_builders
from splitlearn_core.manager.config import ModelConfig
from splitlearn_core.manager.config_checks import HUGGINGFACE, INLINE, NOT_FAMILIES, PROCESS, PYTORCH
from splitlearn_core.manager.loaders import inline, own_process
from splitlearn_core.manager.loaders.loadable import (
    LoadedModel,
    LoadPlan,
    ReportProgress,
    system_error,
)
from splitlearn_core.plugins.host import BLOCK_VARIABLE, plugin_output
from splitlearn_core.plugins.registry import registry
from splitlearn_core.quoting import said
from splitlearn_core.system_memory import return_large_blocks
from splitlearn_core.types import MEGABYTE, Component, Progress, human_bytes

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

_PROMPT_TOKENS = 8
#: Rounds of a warm-up: in each, a prompt and one more token.
_WARM_UP_ROUNDS = 2

#: Modules that loading any component imports midway.
_BUILDING = (
    "splitlearn_core.build.assemble",
    "splitlearn_core.build.construction",
    "splitlearn_core.build.pruning",
    "splitlearn_core.checkpoint.checkpoint",
    "safetensors.torch",
    "huggingface_hub.file_download",
    "huggingface_hub.hf_api",
)
#: Names that transformers imports lazily.
_OF_TRANSFORMERS = ("GenerationConfig", "PreTrainedModel")
_OF_WHOLE_MODELS = ("AutoConfig", "AutoModelForCausalLM", "GenerationConfig", "PreTrainedModel")

#: Core's own hosts; other names are those of plugins.
_HOSTS: Mapping[str, ComponentHost] = {INLINE: inline, PROCESS: own_process}


class ModelLoader:
    """Loads what a :class:`ModelConfig` describes.

    Every method works in the calling thread, for seconds or minutes, and reports throughout. A
    ``report`` that raises stops the work: its exception passes unchanged, and nothing is kept
    except downloads. Any number of threads may use one loader.

    Args:
        call_threads: The number of torch's threads for calls of a model, in its own process too; None for the
            default of torch.
    """

    _call_threads: int | None = None

    def __init__(self, call_threads: int | None = None) -> None:
        self._call_threads = call_threads

    def plan(self, config: ModelConfig, report: ReportProgress) -> LoadPlan:
        """Find the files, download missing ones, and compute the memory that loading takes.

        Raises:
            SplitLearnError: The model cannot be loaded, because of its files, its configuration or its size.
        """
        with translate(partial(system_error, _name(config))):
            plan = inline.plan(config, report)
        # All ledgers together, mapped pages too.
        needed = sum(plan.needs.values())
        if config.max_memory_mb is not None and needed > config.max_memory_mb * MEGABYTE:
            parts = ", ".join(f"{human_bytes(count)} {ledger}" for ledger, count in plan.needs.items() if count)
            raise InsufficientMemoryError(
                f"{_name(config)} takes {human_bytes(needed)} ({parts}), "
                f"and its max_memory_mb allows {human_bytes(config.max_memory_mb * MEGABYTE)}",
                hint=f"raise max_memory_mb to {-(-needed // MEGABYTE)}, or load fewer layers or a smaller dtype",
            )
        if config.host not in _HOSTS and getattr(registry().host(config.host), "is_elsewhere", False):
            return dataclasses.replace(plan, needs={}, keeps={}, elsewhere=needed)
        return plan

    def load(self, config: ModelConfig, plan: LoadPlan, report: ReportProgress) -> LoadedModel:
        """Build the module and read its weights, as planned.

        Raises:
            SplitLearnError: The files changed since they were planned, or memory ran out.
        """
        host = _HOSTS.get(config.host) or registry().host(config.host)
        with translate(partial(_load_error, config)), plugin_output() if config.host not in _HOSTS else nullcontext():
            loaded = host.load(config, plan, report, self._call_threads)
        if not isinstance(loaded, LoadedModel):
            raise ConfigurationError(
                f"host {config.host!r} returned {type(loaded).__name__}, not LoadedModel",
                hint="ComponentHost.load of splitlearn_core.component_host says what to return",
            )
        return loaded

    def warm_up(self, config: ModelConfig, loaded: LoadedModel, report: ReportProgress) -> None:
        """Run the forward passes of a short prompt and of one more token, so that the first call is not slow.

        Raises:
            ConfigurationError: The module does not run on this device, in this dtype.
            InsufficientMemoryError: Running it takes more memory than there is.
        """
        from splitlearn_core.build.torch_state import own_modes

        def translated(error: BaseException) -> SplitLearnError:
            # With a device or dtype that it does not support, the model's own code may raise anything.
            return system_error(_name(config), error) or ConfigurationError(
                f"{_name(config)} was loaded but does not run: {said(error)}",
                hint="check device, dtype and attn_implementation, or load it without warmup to look into it",
            )

        progress = Progress("warming up", config.component)
        # In the mode of calls: tensors that a model caches in inference_mode could not be trained with.
        with translate(translated), own_modes(gradients=False):
            for _ in range(_WARM_UP_ROUNDS):
                report(progress)
                _one_round(loaded, config.component, lambda: report(progress))

    @classmethod
    def load_from_config(
        cls, config: ModelConfig | Mapping[str, Any], progress: ReportProgress | None = None
    ) -> torch.nn.Module:
        """Load a model at once, in the calling thread.

        Args:
            config: What to load; a mapping holds its fields.
            progress: Called as the load proceeds.

        Raises:
            SplitLearnError: It cannot be loaded.
        """
        if not isinstance(config, ModelConfig):
            config = ModelConfig.from_dict(config)
        report: ReportProgress = progress or (lambda _: None)
        loader = cls()
        loaded = loader.load(config, loader.plan(config, report), report)
        if config.warmup:
            loader.warm_up(config, loaded, report)
        return loaded.module


def _load_error(config: ModelConfig, error: BaseException) -> SplitLearnError | None:
    """Translate an error of a load; of a plugin's host, any error."""
    known = system_error(_name(config), error)
    if known is not None or config.host in _HOSTS:
        return known
    return LoadFailedError(
        f"host {config.host!r} failed to load {_name(config)}: {said(error)}",
        hint=f"is it a fault of its package? {BLOCK_VARIABLE}={config.host} leaves it out",
    )


def _name(config: ModelConfig) -> str:
    return config.model_path or f"the default model of {config.model_type}"


def _one_round(loaded: LoadedModel, component: str | None, between: Any) -> None:
    """Run a prompt, and one token that continues it."""
    import torch

    module: Any = loaded.module
    config = getattr(module, "decoder_config", module.config)
    room = getattr(config, "max_position_embeddings", None) or _PROMPT_TOKENS + 1
    length = max(1, min(_PROMPT_TOKENS, room - 1))
    if component in (None, Component.BOTTOM):
        prompt = torch.zeros(1, length, dtype=torch.long, device=loaded.device)
    else:
        shape = (1, length, config.hidden_size)
        prompt = torch.zeros(shape, dtype=getattr(torch, loaded.dtype), device=loaded.device)
    if component is None:
        output = module(input_ids=prompt, use_cache=True)
        between()
        # The name depends on the version of transformers.
        name = next((name for name in ("cache", "past_key_values") if name in output), None)
        module(input_ids=prompt[:, :1], use_cache=True, **({name: output[name]} if name else {}))
        return
    cache = module.new_cache()
    module(prompt, past_key_values=cache)
    between()
    module(prompt[:, :1], past_key_values=cache)


def preload(model_types: Iterable[str], *, serving: bool = False) -> dict[str, PluginError]:
    """Import torch, transformers and the architectures of some families, in the calling thread.

    Takes seconds the first time, and nothing after that. Call it before the event loop starts; a
    load then imports nothing that takes long.

    The imports create hundreds of thousands of objects, and a garbage collection that visits
    all of them stops every thread for hundreds of milliseconds. One is due soon after the imports, so it
    is run here. Later ones come after every few loads, unless ``serving`` is given.

    Args:
        model_types: The model types that will be loaded: those of families, ``huggingface`` or
            ``pytorch``.
        serving: Set up the whole process for serving as well: ``gc.freeze()``, so that collections no
            longer visit any object that exists at this moment; and on Linux a fixed size above which
            freed blocks of memory go back to the system at once, so that unloading a model that
            was copied into memory gives back all of it.

    Returns:
        Model type -> why its plugin is unusable. The other types are imported nevertheless, and loading
        a model of an unusable type will fail with the same error.
    """
    modules_before = len(sys.modules)
    types = set(model_types)
    failures: dict[str, PluginError] = {}
    for model_type in sorted(types.difference(NOT_FAMILIES)):
        try:
            import_builders(registry().family(model_type))
        except PluginError as error:
            log.warning("Nothing was imported for %s: %s", model_type, error.message)
            failures[model_type] = error
    importlib.import_module("splitlearn_core.build.torch_state")
    if types - {PYTORCH}:
        transformers = importlib.import_module("transformers")
        for name in _OF_WHOLE_MODELS if HUGGINGFACE in types else _OF_TRANSFORMERS:
            getattr(transformers, name)
    for name in _BUILDING if types - {PYTORCH} else ():
        importlib.import_module(name)
    if gc.isenabled() and len(sys.modules) > modules_before:
        gc.collect()
    if serving:
        gc.freeze()
        return_large_blocks()
    return failures
