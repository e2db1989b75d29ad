"""Loading one model from its configuration, in the calling thread: plan, load, warm up.

Nothing here awaits, and importing it imports no torch. Each of the three kinds of models has a module
of its own with a ``plan`` and a ``load``; this one holds what they have in common.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from splitlearn_core.errors import ConfigurationError, InsufficientMemoryError, SplitLearnError
from splitlearn_core.manager.config import ModelConfig
from splitlearn_core.manager.config_checks import HUGGINGFACE, PYTORCH
from splitlearn_core.manager.loaders import family_component, huggingface, pytorch
from splitlearn_core.manager.loaders.loadable import LoadedModel, LoadPlan, ReportProgress, explaining
from splitlearn_core.manager.torch_modes import recording
from splitlearn_core.quoting import said
from splitlearn_core.types import MEGABYTE, Component, Progress, human_bytes

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

_PROMPT_TOKENS = 8
#: Forward passes of a warm-up: a prompt and one more token, so many times.
_WARM_UP_ROUNDS = 2


class Kind(Protocol):
    """A kind of model: one of the modules of this package."""

    def plan(self, config: ModelConfig, report: ReportProgress) -> LoadPlan:
        """Find the files, download missing ones, and compute the memory that loading takes."""

    def load(self, config: ModelConfig, plan: LoadPlan, report: ReportProgress) -> torch.nn.Module:
        """Build the module and read its weights, completely or not at all."""


class ModelLoader:
    """Loads what a :class:`ModelConfig` describes.

    Every method works in the calling thread, for seconds or minutes, and reports throughout. A
    ``report`` that raises stops the work: its exception passes unchanged, and nothing is kept
    except downloads. Any number of threads may use one loader.
    """

    def plan(self, config: ModelConfig, report: ReportProgress) -> LoadPlan:
        """Find the files, download missing ones, and compute the memory that loading takes.

        Raises:
            SplitLearnError: The model cannot be loaded, because of its files, its configuration or its size.
        """
        with explaining(_name(config)):
            plan = _kind(config).plan(config, report)
        # All ledgers together, mapped pages too.
        needed = sum(plan.needs.values())
        if config.max_memory_mb is not None and needed > config.max_memory_mb * MEGABYTE:
            parts = ", ".join(f"{human_bytes(count)} {ledger}" for ledger, count in plan.needs.items() if count)
            raise InsufficientMemoryError(
                f"{_name(config)} takes {human_bytes(needed)} ({parts}), "
                f"and its max_memory_mb allows {human_bytes(config.max_memory_mb * MEGABYTE)}",
                hint=f"raise max_memory_mb to {-(-needed // MEGABYTE)}, or load fewer layers or a smaller dtype",
            )
        return plan

    def load(self, config: ModelConfig, plan: LoadPlan, report: ReportProgress) -> LoadedModel:
        """Carry a plan out.

        Raises:
            SplitLearnError: The files changed since they were planned, or memory ran out.
        """
        with explaining(_name(config)):
            module = _kind(config).load(config, plan, report)
        dtype = plan.dtype
        if dtype == "auto":
            tensors = [*module.parameters(), *module.buffers()]
            dtype = next((str(t.dtype).removeprefix("torch.") for t in tensors if t.is_floating_point()), "auto")
        return LoadedModel(module, plan.location, dtype, plan.device)

    def warm_up(self, config: ModelConfig, loaded: LoadedModel, report: ReportProgress) -> None:
        """Run the forward passes of a short prompt and of one more token, so that the first call is not slow.

        Raises:
            ConfigurationError: The module does not run on this device, in this dtype.
            InsufficientMemoryError: Running it takes more memory than there is.
        """
        component = config.component
        try:
            # In the mode of calls: tensors that a model caches in inference_mode could not be trained with.
            with explaining(_name(config)), recording(gradients=False):
                for _ in range(_WARM_UP_ROUNDS):
                    report(Progress("warming up", component))
                    _one_round(loaded, component, lambda: report(Progress("warming up", component)))
        except SplitLearnError:
            raise
        # With a device or dtype that it does not support, the model's own code raises anything.
        except Exception as error:
            raise ConfigurationError(
                f"{_name(config)} was loaded but does not run: {said(error)}",
                hint="check device, dtype and attn_implementation, or load it without warmup to look into it",
            ) from error

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


def _kind(config: ModelConfig) -> Kind:
    kinds: dict[str, Kind] = {HUGGINGFACE: huggingface, PYTORCH: pytorch}
    return kinds.get(config.model_type, family_component)


def _name(config: ModelConfig) -> str:
    return config.model_path or f"the default model of {config.model_type}"


def _one_round(loaded: LoadedModel, component: str | None, between: Any) -> None:
    """Run a prompt, and one token that continues it."""
    import torch

    module: Any = loaded.module
    room = getattr(module.config, "max_position_embeddings", None) or _PROMPT_TOKENS + 1
    length = max(1, min(_PROMPT_TOKENS, room - 1))
    if component in (None, Component.BOTTOM):
        prompt = torch.zeros(1, length, dtype=torch.long, device=loaded.device)
    else:
        shape = (1, length, module.config.hidden_size)
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
