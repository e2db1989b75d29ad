"""What a load would fetch, found out without fetching weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from splitlearn_core.checkpoint.fetchplan import FetchPlan
from splitlearn_core.checkpoint.ranges import Wanted
from splitlearn_core.loading import OpenModel, make_plan, refuse_misfit, wanted_keys
from splitlearn_core.types import Component

#: Small files that a load reads where there are any.
_SETTINGS = ("config.json", "model.safetensors.index.json", "pytorch_model.bin.index.json")
_OF_TOP = "generation_config.json"


def plan_model_fetch(
    model: OpenModel,
    split_points: Sequence[int],
    parts: Sequence[Component],
    dtype: str | Mapping[Any, str] = "auto",
    *,
    whole: bool = False,
    others: Iterable[str] = (),
) -> FetchPlan:
    """Say which files a load of components needs, and how many bytes of each it would fetch.

    Args:
        model: The opened checkpoint.
        split_points: Where to cut.
        parts: The components to load.
        dtype: The dtype that is wanted; refused here where a load would refuse it.
        whole: The unsplit model is loaded, too.
        others: More files that are read: a tokenizer's, say.

    Raises:
        SplitLearnError: As a load would raise before it fetches.
    """
    checkpoint = model.checkpoint
    files = checkpoint.source.files()
    settings = [*_SETTINGS, *([_OF_TOP] if Component.TOP in parts else []), *others]
    small: Wanted = dict.fromkeys(name for name in settings if name in files)
    weights = checkpoint.source.plan_fetch({**small, **_weights(model, split_points, parts, dtype, whole)})
    return FetchPlan(model.name, checkpoint.source.commit, weights)


def _weights(
    model: OpenModel,
    split_points: Sequence[int],
    parts: Sequence[Component],
    dtype: str | Mapping[Any, str],
    whole: bool,
) -> Wanted:
    checkpoint = model.checkpoint
    # Where there are no weights at all, asking for the files says what is missing.
    if whole or checkpoint.quantization or not checkpoint.has_weights:
        return dict.fromkeys(checkpoint.weight_files())
    if checkpoint.opaque_file is not None:
        return {checkpoint.opaque_file: None}
    if not checkpoint.is_describable:
        # Shards without headers that could be had alone: what they hold is known from the index.
        return dict.fromkeys(checkpoint.shards(wanted_keys(model, split_points, parts)))
    plan, table = make_plan(model, split_points, parts, dtype)
    refuse_misfit(model, plan, table)
    return checkpoint.wanted(plan.infos)
