"""The former name of :mod:`splitlearn_core.api`."""

from splitlearn_core.api import load_split_model, plan_fetch, plan_split
from splitlearn_core.split_model import SplitModel

__all__ = ["SplitModel", "load_split_model", "plan_fetch", "plan_split"]
