"""The former module of the loading strategies: the protocols are in ``splitlearn_core``, core's own in ``readers``."""

from splitlearn_core.loading_strategy import LoadingStrategy, PretrainedReader, ReadPlan, WeightReader
from splitlearn_core.readers.copied import CopiedStrategy
from splitlearn_core.readers.mapped import IncrementalStrategy, MappedStrategy, WholeStrategy

__all__ = [
    "CopiedStrategy",
    "IncrementalStrategy",
    "LoadingStrategy",
    "MappedStrategy",
    "PretrainedReader",
    "ReadPlan",
    "WeightReader",
    "WholeStrategy",
]
