"""Cut a causal language model into bottom, trunk and top, and load only the piece you want.

Importing this package imports neither torch nor transformers: names are resolved on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from splitlearn_core.errors import (
    AccessRefusedError,
    BrokenPluginError,
    BusyError,
    CapacityError,
    CheckpointError,
    ConfigurationError,
    ConnectionLostError,
    DrainTimeoutError,
    DuplicateModelError,
    HostDiedError,
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
    ProtocolError,
    RemoteBusyError,
    RemoteError,
    RemoteStepError,
    SessionLostError,
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
    from splitlearn_core.adapters.peft_models import load_adapter as load_adapter
    from splitlearn_core.adapters.peft_models import merge_and_unload as merge_and_unload
    from splitlearn_core.adapters.peft_models import save_adapter as save_adapter
    from splitlearn_core.adapters.peft_models import unload_adapter as unload_adapter
    from splitlearn_core.api import load_split_model as load_split_model
    from splitlearn_core.api import plan_fetch as plan_fetch
    from splitlearn_core.api import plan_split as plan_split
    from splitlearn_core.build.component import BottomModel as BottomModel
    from splitlearn_core.build.component import TopModel as TopModel
    from splitlearn_core.build.component import TrunkModel as TrunkModel
    from splitlearn_core.checkpoint.files import open_regular as open_regular
    from splitlearn_core.checkpoint.hub.fetch_plan import FetchPlan as FetchPlan
    from splitlearn_core.checkpoint.hub.fetch_plan import FileFetch as FileFetch
    from splitlearn_core.cut_stage import Crossing as Crossing
    from splitlearn_core.cut_stage import CutStage as CutStage
    from splitlearn_core.cuts.cut import Cut as Cut
    from splitlearn_core.cuts.ledger import PrivacyLedger as PrivacyLedger
    from splitlearn_core.cuts.ledger import PrivacyStatement as PrivacyStatement
    from splitlearn_core.cuts.ledger import Release as Release
    from splitlearn_core.factory import ModelFactory as ModelFactory
    from splitlearn_core.factory import ModelRegistry as ModelRegistry
    from splitlearn_core.hosts.remote import RemoteComponent as RemoteComponent
    from splitlearn_core.hosts.remote import connect as connect
    from splitlearn_core.hosts.worker import serve_socket as serve_socket
    from splitlearn_core.loading_strategy import LoadingStrategy as LoadingStrategy
    from splitlearn_core.loading_strategy import PartsReader as PartsReader
    from splitlearn_core.loading_strategy import RangedReader as RangedReader
    from splitlearn_core.loading_strategy import ReadPlan as ReadPlan
    from splitlearn_core.loading_strategy import WeightReader as WeightReader
    from splitlearn_core.manager.config import ModelConfig as ModelConfig
    from splitlearn_core.manager.handles import AsyncManagedModel as AsyncManagedModel
    from splitlearn_core.manager.handles import LoadingPlaceholder as LoadingPlaceholder
    from splitlearn_core.manager.loaders.loader import ModelLoader as ModelLoader
    from splitlearn_core.manager.loaders.loader import preload as preload
    from splitlearn_core.manager.manager import AsyncModelManager as AsyncModelManager
    from splitlearn_core.manager.resources import ResourceManager as ResourceManager
    from splitlearn_core.manager.status import FailureInfo as FailureInfo
    from splitlearn_core.manager.status import Health as Health
    from splitlearn_core.manager.status import ManagerEvent as ManagerEvent
    from splitlearn_core.manager.status import ModelInfo as ModelInfo
    from splitlearn_core.manager.status import ModelStatus as ModelStatus
    from splitlearn_core.pipeline import SplitCausalLM as SplitCausalLM
    from splitlearn_core.plan.conversions import WeightConversion as WeightConversion
    from splitlearn_core.plan.conversions import WeightOperation as WeightOperation
    from splitlearn_core.plan.splitplan import ComponentPlan as ComponentPlan
    from splitlearn_core.plan.splitplan import PlannedTensor as PlannedTensor
    from splitlearn_core.plan.splitplan import SplitPlan as SplitPlan
    from splitlearn_core.plugins.contract import AnyTypePlugin as AnyTypePlugin
    from splitlearn_core.plugins.contract import FamilyPlugin as FamilyPlugin
    from splitlearn_core.plugins.contract import KeyMappingPlugin as KeyMappingPlugin
    from splitlearn_core.plugins.contract import StrategyPlugin as StrategyPlugin
    from splitlearn_core.split_model import SplitChain as SplitChain
    from splitlearn_core.split_model import SplitModel as SplitModel
    from splitlearn_core.split_model import SplitPair as SplitPair
    from splitlearn_core.storage.directory import SplitDirectory as SplitDirectory
    from splitlearn_core.storage.directory import verify_saved as verify_saved
    from splitlearn_core.storage.merging import merge_split as merge_split
    from splitlearn_core.storage.saved_components import load_component as load_component
    from splitlearn_core.storage.saved_components import load_split_directory as load_split_directory
    from splitlearn_core.storage.saving import save_split as save_split

#: Names that are imported when they are first used, and where they live.
_LAZY = {
    "AnyTypePlugin": "plugins.contract",
    "AsyncManagedModel": "manager.handles",
    "AsyncModelManager": "manager.manager",
    "BottomModel": "build.component",
    "ComponentPlan": "plan.splitplan",
    "Crossing": "cut_stage",
    "Cut": "cuts.cut",
    "CutStage": "cut_stage",
    "FailureInfo": "manager.status",
    "FamilyPlugin": "plugins.contract",
    "FetchPlan": "checkpoint.hub.fetch_plan",
    "FileFetch": "checkpoint.hub.fetch_plan",
    "Health": "manager.status",
    "KeyMappingPlugin": "plugins.contract",
    "LoadingPlaceholder": "manager.handles",
    "LoadingStrategy": "loading_strategy",
    "ManagerEvent": "manager.status",
    "ModelConfig": "manager.config",
    "ModelFactory": "factory",
    "ModelInfo": "manager.status",
    "ModelLoader": "manager.loaders.loader",
    "ModelRegistry": "factory",
    "ModelStatus": "manager.status",
    "PartsReader": "loading_strategy",
    "PlannedTensor": "plan.splitplan",
    "PrivacyLedger": "cuts.ledger",
    "PrivacyStatement": "cuts.ledger",
    "RangedReader": "loading_strategy",
    "ReadPlan": "loading_strategy",
    "Release": "cuts.ledger",
    "RemoteComponent": "hosts.remote",
    "ResourceManager": "manager.resources",
    "SplitCausalLM": "pipeline",
    "SplitChain": "split_model",
    "SplitDirectory": "storage.directory",
    "SplitModel": "split_model",
    "SplitPair": "split_model",
    "SplitPlan": "plan.splitplan",
    "StrategyPlugin": "plugins.contract",
    "TopModel": "build.component",
    "TrunkModel": "build.component",
    "WeightConversion": "plan.conversions",
    "WeightOperation": "plan.conversions",
    "WeightReader": "loading_strategy",
    "connect": "hosts.remote",
    "load_adapter": "adapters.peft_models",
    "load_component": "storage.saved_components",
    "load_split_directory": "storage.saved_components",
    "load_split_model": "api",
    "merge_and_unload": "adapters.peft_models",
    "merge_split": "storage.merging",
    "open_regular": "checkpoint.files",
    "plan_fetch": "api",
    "plan_split": "api",
    "preload": "manager.loaders.loader",
    "save_adapter": "adapters.peft_models",
    "save_split": "storage.saving",
    "serve_socket": "hosts.worker",
    "unload_adapter": "adapters.peft_models",
    "verify_saved": "storage.directory",
}

__all__ = [  # noqa: PLE0604  # the second half is computed
    "AccessRefusedError",
    "BrokenPluginError",
    "BusyError",
    "CapacityError",
    "CheckpointError",
    "Component",
    "ConfigurationError",
    "ConnectionLostError",
    "DrainTimeoutError",
    "DuplicateModelError",
    "HostDiedError",
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
    "ProtocolError",
    "RemoteBusyError",
    "RemoteError",
    "RemoteStepError",
    "SessionLostError",
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
