"""Cut a causal language model into bottom, trunk and top, and load only the piece you want.

Importing this package imports neither torch nor transformers: names are resolved on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from splitlearn_core.errors import (
    BrokenPluginError,
    CapacityError,
    CheckpointError,
    ConfigurationError,
    IncompatiblePluginError,
    InsufficientDiskError,
    InsufficientMemoryError,
    InternalError,
    InvalidCheckpointError,
    InvalidSplitError,
    MissingFileError,
    PluginConflictError,
    PluginError,
    SplitLearnError,
    TensorMismatchError,
    UnknownModelTypeError,
)
from splitlearn_core.family import ModelFamily
from splitlearn_core.hookspecs import PLUGIN_API, hookimpl, hookspec
from splitlearn_core.types import Component, LayerRange, Progress

if TYPE_CHECKING:
    from splitlearn_core.checkpoint.strategy import LoadingStrategy as LoadingStrategy
    from splitlearn_core.factory import ModelFactory as ModelFactory
    from splitlearn_core.factory import ModelRegistry as ModelRegistry
    from splitlearn_core.pipeline import SplitCausalLM as SplitCausalLM
    from splitlearn_core.plan.splitplan import ComponentPlan as ComponentPlan
    from splitlearn_core.plan.splitplan import SplitPlan as SplitPlan
    from splitlearn_core.quickstart import SplitModel as SplitModel
    from splitlearn_core.quickstart import load_split_model as load_split_model
    from splitlearn_core.quickstart import plan_split as plan_split

#: Names that are imported when they are first used, and where they live.
_LAZY = {
    "ComponentPlan": "plan.splitplan",
    "LoadingStrategy": "checkpoint.strategy",
    "ModelFactory": "factory",
    "ModelRegistry": "factory",
    "SplitCausalLM": "pipeline",
    "SplitModel": "quickstart",
    "SplitPlan": "plan.splitplan",
    "load_split_model": "quickstart",
    "plan_split": "quickstart",
}

__all__ = [  # noqa: PLE0604  # the second half is computed
    "PLUGIN_API",
    "BrokenPluginError",
    "CapacityError",
    "CheckpointError",
    "Component",
    "ConfigurationError",
    "IncompatiblePluginError",
    "InsufficientDiskError",
    "InsufficientMemoryError",
    "InternalError",
    "InvalidCheckpointError",
    "InvalidSplitError",
    "LayerRange",
    "MissingFileError",
    "ModelFamily",
    "PluginConflictError",
    "PluginError",
    "Progress",
    "SplitLearnError",
    "TensorMismatchError",
    "UnknownModelTypeError",
    "hookimpl",
    "hookspec",
    *_LAZY,
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
