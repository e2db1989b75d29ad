"""For packages that do more than provide a family or a strategy: that examine or serve models, or run them elsewhere.

``splitlearn-auto``, ``splitlearn-serve`` and packages of hosts import these names and the public ones, and nothing
else of core. Unlike the public names, they may change with any minor version of core: a package that uses them pins
it (``splitlearn-core>=0.1,<0.2``).

Importing this module imports nothing: names are resolved on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from splitlearn_core.arguments import user_path as user_path
    from splitlearn_core.build.cache_sizes import layer_cache_sizes as layer_cache_sizes
    from splitlearn_core.build.cache_sizes import sizes_after_one_token as sizes_after_one_token
    from splitlearn_core.build.configuration import hf_config as hf_config
    from splitlearn_core.build.configuration import with_decoder_values as with_decoder_values
    from splitlearn_core.build.construction import component_from_state_dict as component_from_state_dict
    from splitlearn_core.build.conversion_tables import targets_by_tables as targets_by_tables
    from splitlearn_core.build.kv_cache import CACHE_FIELD as CACHE_FIELD
    from splitlearn_core.build.kv_cache import cache_argument as cache_argument
    from splitlearn_core.build.kv_cache import has_states_alone as has_states_alone
    from splitlearn_core.build.packing import PackItem as PackItem
    from splitlearn_core.build.packing import can_pack as can_pack
    from splitlearn_core.build.packing import packed as packed
    from splitlearn_core.build.pruning import base_of as base_of
    from splitlearn_core.build.pruning import through_no_layers as through_no_layers
    from splitlearn_core.build.torch_state import own_state as own_state
    from splitlearn_core.checkpoint.config_json import read_config as read_config
    from splitlearn_core.checkpoint.config_json import read_object as read_object
    from splitlearn_core.checkpoint.files import CONFIG as CONFIG
    from splitlearn_core.checkpoint.source import HUB as HUB
    from splitlearn_core.checkpoint.source import open_source as open_source
    from splitlearn_core.child_process import command_for as command_for
    from splitlearn_core.child_process import ending as ending
    from splitlearn_core.child_process import reserve_stdout as reserve_stdout
    from splitlearn_core.errors import translate as translate
    from splitlearn_core.family import BATCH as BATCH
    from splitlearn_core.family import LAYERS as LAYERS
    from splitlearn_core.family import SEQUENCE as SEQUENCE
    from splitlearn_core.family import STATES as STATES
    from splitlearn_core.hosts.carriers import Endpoint as Endpoint
    from splitlearn_core.hosts.chains import onward as onward
    from splitlearn_core.hosts.client import Host as Host
    from splitlearn_core.hosts.client import Patience as Patience
    from splitlearn_core.hosts.facts import Facts as Facts
    from splitlearn_core.hosts.packs import PendingStep as PendingStep
    from splitlearn_core.hosts.protocol import HEADER_BYTES as HEADER_BYTES
    from splitlearn_core.hosts.protocol import MAX_META_BYTES as MAX_META_BYTES
    from splitlearn_core.hosts.protocol import MAX_PAYLOAD_BYTES as MAX_PAYLOAD_BYTES
    from splitlearn_core.hosts.protocol import SUBPROTOCOL as SUBPROTOCOL
    from splitlearn_core.hosts.protocol import TOKEN_VARIABLE as TOKEN_VARIABLE
    from splitlearn_core.hosts.protocol import Frame as Frame
    from splitlearn_core.hosts.protocol import Kind as Kind
    from splitlearn_core.hosts.protocol import decode as decode
    from splitlearn_core.hosts.protocol import decode_header as decode_header
    from splitlearn_core.hosts.protocol import encode as encode
    from splitlearn_core.hosts.relay import ComponentServer as ComponentServer
    from splitlearn_core.hosts.relay import Sessions as Sessions
    from splitlearn_core.hosts.relay import sessions_on as sessions_on
    from splitlearn_core.hosts.sessions import SessionLimits as SessionLimits
    from splitlearn_core.hosts.sessions import error_frame as error_frame
    from splitlearn_core.hosts.shared_memory import Channel as Channel
    from splitlearn_core.hosts.training import TrainingUsage as TrainingUsage
    from splitlearn_core.hosts.websocket import MessageStream as MessageStream
    from splitlearn_core.hosts.websocket import message_head as message_head
    from splitlearn_core.loading.opening import BUNDLED as BUNDLED
    from splitlearn_core.loading.opening import unbundled as unbundled
    from splitlearn_core.manager.config import ConfigFile as ConfigFile
    from splitlearn_core.manager.config import examine as examine
    from splitlearn_core.manager.config import read_config_file as read_config_file
    from splitlearn_core.manager.config_checks import PYTORCH as PYTORCH
    from splitlearn_core.manager.config_checks import limit_problems as limit_problems
    from splitlearn_core.manager.config_checks import show as show
    from splitlearn_core.manager.config_checks import unknown_name as unknown_name
    from splitlearn_core.manager.loaders.loadable import LoadedModel as LoadedModel
    from splitlearn_core.manager.loaders.loadable import ModelHost as ModelHost
    from splitlearn_core.manager.loaders.own_process import load_arguments as load_arguments
    from splitlearn_core.manager.metrics import LoopLag as LoopLag
    from splitlearn_core.manager.metrics import ManagerCollector as ManagerCollector
    from splitlearn_core.manager.workers import default_torch_threads as default_torch_threads
    from splitlearn_core.plan.keys import map_keys as map_keys
    from splitlearn_core.plan.keys import place_keys as place_keys
    from splitlearn_core.plan.split_points import impossible_cuts as impossible_cuts
    from splitlearn_core.plan.split_points import split_layers as split_layers
    from splitlearn_core.plan.splitplan import plan_components as plan_components
    from splitlearn_core.plan.splitplan import total_cache_size as total_cache_size
    from splitlearn_core.plugins.known import WRITTEN as WRITTEN
    from splitlearn_core.plugins.known import way_out as way_out
    from splitlearn_core.plugins.metadata import core_version as core_version
    from splitlearn_core.plugins.metadata import version_of as version_of
    from splitlearn_core.plugins.registry import registry as registry
    from splitlearn_core.quoting import quote as quote
    from splitlearn_core.quoting import reason as reason
    from splitlearn_core.quoting import said as said
    from splitlearn_core.testing.worlds import DEPTHS as DEPTHS
    from splitlearn_core.testing.worlds import OF_OTHERS as OF_OTHERS
    from splitlearn_core.testing.worlds import TINY as TINY
    from splitlearn_core.testing.worlds import other_sizes as other_sizes
    from splitlearn_core.types import human_bytes as human_bytes

#: Name -> the module of core that it is in.
_HOMES = {
    "BATCH": "family",
    "BUNDLED": "loading.opening",
    "CACHE_FIELD": "build.kv_cache",
    "CONFIG": "checkpoint.files",
    "Channel": "hosts.shared_memory",
    "ComponentServer": "hosts.relay",
    "ConfigFile": "manager.config",
    "DEPTHS": "testing.worlds",
    "Endpoint": "hosts.carriers",
    "Facts": "hosts.facts",
    "Frame": "hosts.protocol",
    "HEADER_BYTES": "hosts.protocol",
    "HUB": "checkpoint.source",
    "Host": "hosts.client",
    "Kind": "hosts.protocol",
    "LAYERS": "family",
    "LoadedModel": "manager.loaders.loadable",
    "LoopLag": "manager.metrics",
    "MAX_META_BYTES": "hosts.protocol",
    "MAX_PAYLOAD_BYTES": "hosts.protocol",
    "ManagerCollector": "manager.metrics",
    "MessageStream": "hosts.websocket",
    "ModelHost": "manager.loaders.loadable",
    "OF_OTHERS": "testing.worlds",
    "PYTORCH": "manager.config_checks",
    "PackItem": "build.packing",
    "Patience": "hosts.client",
    "PendingStep": "hosts.packs",
    "SEQUENCE": "family",
    "STATES": "family",
    "SUBPROTOCOL": "hosts.protocol",
    "SessionLimits": "hosts.sessions",
    "Sessions": "hosts.relay",
    "TINY": "testing.worlds",
    "TOKEN_VARIABLE": "hosts.protocol",
    "TrainingUsage": "hosts.training",
    "WRITTEN": "plugins.known",
    "base_of": "build.pruning",
    "cache_argument": "build.kv_cache",
    "can_pack": "build.packing",
    "command_for": "child_process",
    "component_from_state_dict": "build.construction",
    "core_version": "plugins.metadata",
    "decode": "hosts.protocol",
    "decode_header": "hosts.protocol",
    "default_torch_threads": "manager.workers",
    "encode": "hosts.protocol",
    "ending": "child_process",
    "error_frame": "hosts.sessions",
    "examine": "manager.config",
    "has_states_alone": "build.kv_cache",
    "hf_config": "build.configuration",
    "human_bytes": "types",
    "impossible_cuts": "plan.split_points",
    "layer_cache_sizes": "build.cache_sizes",
    "limit_problems": "manager.config_checks",
    "load_arguments": "manager.loaders.own_process",
    "map_keys": "plan.keys",
    "message_head": "hosts.websocket",
    "onward": "hosts.chains",
    "open_source": "checkpoint.source",
    "other_sizes": "testing.worlds",
    "own_state": "build.torch_state",
    "packed": "build.packing",
    "place_keys": "plan.keys",
    "plan_components": "plan.splitplan",
    "quote": "quoting",
    "read_config": "checkpoint.config_json",
    "read_config_file": "manager.config",
    "read_object": "checkpoint.config_json",
    "reason": "quoting",
    "registry": "plugins.registry",
    "reserve_stdout": "child_process",
    "said": "quoting",
    "sessions_on": "hosts.relay",
    "show": "manager.config_checks",
    "sizes_after_one_token": "build.cache_sizes",
    "split_layers": "plan.split_points",
    "targets_by_tables": "build.conversion_tables",
    "through_no_layers": "build.pruning",
    "total_cache_size": "plan.splitplan",
    "translate": "errors",
    "unbundled": "loading.opening",
    "unknown_name": "manager.config_checks",
    "user_path": "arguments",
    "version_of": "plugins.metadata",
    "way_out": "plugins.known",
    "with_decoder_values": "build.configuration",
}

__all__ = [*_HOMES]  # noqa: PLE0604  # resolved by __getattr__


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"splitlearn_core.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
