"""The host ``inline``: models in the manager's own process, a component of a family's model or a whole one."""

from __future__ import annotations

from splitlearn_core.manager.config import ModelConfig
from splitlearn_core.manager.config_checks import HUGGINGFACE, PYTORCH
from splitlearn_core.manager.loaders import huggingface, pytorch
from splitlearn_core.manager.loaders.loadable import LoadedModel, LoadPlan, ReportProgress

#: Model type -> the functions that plan and load it; any other type belongs to a family.
_KINDS = {
    HUGGINGFACE: (huggingface.plan_model, huggingface.load_model),
    PYTORCH: (pytorch.plan, pytorch.load),
}
_FAMILY = huggingface.plan_component, huggingface.load_component


def plan(config: ModelConfig, report: ReportProgress) -> LoadPlan:
    """Find the files, download missing ones, and compute the memory that loading takes, wherever it then runs."""
    make_plan, _ = _KINDS.get(config.model_type, _FAMILY)
    return make_plan(config, report)


def load(config: ModelConfig, plan: LoadPlan, report: ReportProgress, threads: int | None) -> LoadedModel:
    """Build the module and read its weights; see :meth:`ComponentHost.load`. Callers set their threads themselves."""
    _, load_module = _KINDS.get(config.model_type, _FAMILY)
    module = load_module(config, plan, report)
    dtype = plan.dtype
    if dtype == "auto":
        tensors = [*module.parameters(), *module.buffers()]
        dtype = next((str(t.dtype).removeprefix("torch.") for t in tensors if t.is_floating_point()), "auto")
    return LoadedModel(module, plan.location, dtype, plan.device)
