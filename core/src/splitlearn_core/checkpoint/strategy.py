"""Loading strategies: how planned bytes become tensors. The names that plugins and other rooms use."""

from splitlearn_core.checkpoint.strategies.base import (
    CHUNK_BYTES,
    LoadingStrategy,
    PretrainedReader,
    ReadPlan,
    WeightReader,
    WholeModel,
)
from splitlearn_core.checkpoint.strategies.checked import passing_bytes, predicted_bytes, read_checked
from splitlearn_core.checkpoint.strategies.choice import (
    AUTO,
    BUILT_IN,
    check_strategy,
    choose_strategy,
    reserved_names,
)
from splitlearn_core.checkpoint.strategies.copied import CopiedStrategy
from splitlearn_core.checkpoint.strategies.incremental import IncrementalStrategy
from splitlearn_core.checkpoint.strategies.mapped import MappedStrategy
from splitlearn_core.checkpoint.strategies.whole import WholeStrategy

__all__ = [
    "AUTO",
    "BUILT_IN",
    "CHUNK_BYTES",
    "CopiedStrategy",
    "IncrementalStrategy",
    "LoadingStrategy",
    "MappedStrategy",
    "PretrainedReader",
    "ReadPlan",
    "WeightReader",
    "WholeModel",
    "WholeStrategy",
    "check_strategy",
    "choose_strategy",
    "passing_bytes",
    "predicted_bytes",
    "read_checked",
    "reserved_names",
]
