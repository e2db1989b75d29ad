"""Cut a causal language model into bottom, trunk and top, and load only the piece you want.

Importing this package imports neither torch nor transformers: names are resolved on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from splitlearn_core.errors import (
    BrokenPluginError,
    BusyError,
    CapacityError,
    CheckpointError,
    ConfigurationError,
    DrainTimeoutError,
    DuplicateModelError,
    IncompatiblePluginError,
    InsufficientDiskError,
    InsufficientMemoryError,
    InternalError,
    InvalidCheckpointError,
    InvalidSplitError,
    LoadCancelledError,
    LoadFailedError,
    LoadStalledError,
    ManagerClosedError,
    ManagerError,
    MissingFileError,
    ModelGoneError,
    ModelNotReadyError,
    PluginConflictError,
    PluginError,
    SplitLearnDeprecationWarning,
    SplitLearnError,
    TensorMismatchError,
    UnexpectedArgumentError,
    UnknownModelError,
    UnknownModelTypeError,
    WaitTimeoutError,
)
from splitlearn_core.family import ModelFamily
from splitlearn_core.hookspecs import PLUGIN_API, hookimpl, hookspec
from splitlearn_core.types import Component, LayerRange, Progress, TensorInfo

if TYPE_CHECKING:
    from splitlearn_core.adapters import load_adapter as load_adapter
    from splitlearn_core.adapters import merge_and_unload as merge_and_unload
    from splitlearn_core.adapters import save_adapter as save_adapter
    from splitlearn_core.adapters import unload_adapter as unload_adapter
    from splitlearn_core.build.component import BottomModel as BottomModel
    from splitlearn_core.build.component import TopModel as TopModel
    from splitlearn_core.build.component import TrunkModel as TrunkModel
    from splitlearn_core.checkpoint.fetchplan import FetchPlan as FetchPlan
    from splitlearn_core.checkpoint.fetchplan import FileFetch as FileFetch
    from splitlearn_core.checkpoint.regular import open_regular as open_regular
    from splitlearn_core.checkpoint.strategy import LoadingStrategy as LoadingStrategy
    from splitlearn_core.checkpoint.strategy import ReadPlan as ReadPlan
    from splitlearn_core.checkpoint.strategy import WeightReader as WeightReader
    from splitlearn_core.factory import ModelFactory as ModelFactory
    from splitlearn_core.factory import ModelRegistry as ModelRegistry
    from splitlearn_core.manager.config import ModelConfig as ModelConfig
    from splitlearn_core.manager.imports import preload as preload
    from splitlearn_core.manager.lending import AsyncManagedModel as AsyncManagedModel
    from splitlearn_core.manager.lending import LoadingPlaceholder as LoadingPlaceholder
    from splitlearn_core.manager.loader import ModelLoader as ModelLoader
    from splitlearn_core.manager.manager import AsyncModelManager as AsyncModelManager
    from splitlearn_core.manager.resources import ResourceManager as ResourceManager
    from splitlearn_core.manager.status import ManagerEvent as ManagerEvent
    from splitlearn_core.manager.status import ModelInfo as ModelInfo
    from splitlearn_core.manager.status import ModelStatus as ModelStatus
    from splitlearn_core.pipeline import SplitCausalLM as SplitCausalLM
    from splitlearn_core.plan.splitplan import ComponentPlan as ComponentPlan
    from splitlearn_core.plan.splitplan import PlannedTensor as PlannedTensor
    from splitlearn_core.plan.splitplan import SplitPlan as SplitPlan
    from splitlearn_core.plugins.protocols import FamilyPlugin as FamilyPlugin
    from splitlearn_core.plugins.protocols import KeyMappingPlugin as KeyMappingPlugin
    from splitlearn_core.plugins.protocols import StrategyPlugin as StrategyPlugin
    from splitlearn_core.quickstart import SplitModel as SplitModel
    from splitlearn_core.quickstart import load_split_model as load_split_model
    from splitlearn_core.quickstart import plan_fetch as plan_fetch
    from splitlearn_core.quickstart import plan_split as plan_split
    from splitlearn_core.storage.checking import verify_saved as verify_saved
    from splitlearn_core.storage.directory import SplitDirectory as SplitDirectory
    from splitlearn_core.storage.directory import load_component as load_component
    from splitlearn_core.storage.directory import load_split_directory as load_split_directory
    from splitlearn_core.storage.merging import merge_split as merge_split
    from splitlearn_core.storage.saving import save_split as save_split

#: Names that are imported when they are first used, and where they live.
_LAZY = {
    "AsyncManagedModel": "manager.lending",
    "AsyncModelManager": "manager.manager",
    "BottomModel": "build.component",
    "ComponentPlan": "plan.splitplan",
    "FamilyPlugin": "plugins.protocols",
    "FetchPlan": "checkpoint.fetchplan",
    "FileFetch": "checkpoint.fetchplan",
    "KeyMappingPlugin": "plugins.protocols",
    "LoadingPlaceholder": "manager.lending",
    "LoadingStrategy": "checkpoint.strategy",
    "ManagerEvent": "manager.status",
    "ModelConfig": "manager.config",
    "ModelFactory": "factory",
    "ModelInfo": "manager.status",
    "ModelLoader": "manager.loader",
    "ModelRegistry": "factory",
    "ModelStatus": "manager.status",
    "PlannedTensor": "plan.splitplan",
    "ReadPlan": "checkpoint.strategy",
    "ResourceManager": "manager.resources",
    "SplitCausalLM": "pipeline",
    "SplitDirectory": "storage.directory",
    "SplitModel": "quickstart",
    "SplitPlan": "plan.splitplan",
    "StrategyPlugin": "plugins.protocols",
    "TopModel": "build.component",
    "TrunkModel": "build.component",
    "WeightReader": "checkpoint.strategy",
    "load_adapter": "adapters",
    "load_component": "storage.directory",
    "load_split_directory": "storage.directory",
    "load_split_model": "quickstart",
    "merge_and_unload": "adapters",
    "merge_split": "storage.merging",
    "open_regular": "checkpoint.regular",
    "plan_fetch": "quickstart",
    "plan_split": "quickstart",
    "preload": "manager.imports",
    "save_adapter": "adapters",
    "save_split": "storage.saving",
    "unload_adapter": "adapters",
    "verify_saved": "storage.checking",
}

__all__ = [  # noqa: PLE0604  # the second half is computed
    "BrokenPluginError",
    "BusyError",
    "CapacityError",
    "CheckpointError",
    "Component",
    "ConfigurationError",
    "DrainTimeoutError",
    "DuplicateModelError",
    "IncompatiblePluginError",
    "InsufficientDiskError",
    "InsufficientMemoryError",
    "InternalError",
    "InvalidCheckpointError",
    "InvalidSplitError",
    "LayerRange",
    "LoadCancelledError",
    "LoadFailedError",
    "LoadStalledError",
    "ManagerClosedError",
    "ManagerError",
    "MissingFileError",
    "ModelFamily",
    "ModelGoneError",
    "ModelNotReadyError",
    "PLUGIN_API",
    "PluginConflictError",
    "PluginError",
    "Progress",
    "SplitLearnDeprecationWarning",
    "SplitLearnError",
    "TensorInfo",
    "TensorMismatchError",
    "UnexpectedArgumentError",
    "UnknownModelError",
    "UnknownModelTypeError",
    "WaitTimeoutError",
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
