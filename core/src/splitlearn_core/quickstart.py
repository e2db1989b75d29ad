"""The earlier place of :mod:`splitlearn_core.api`."""

from splitlearn_core.api import SplitModel, load_split_model, plan_fetch, plan_split

__all__ = ["SplitModel", "load_split_model", "plan_fetch", "plan_split"]
