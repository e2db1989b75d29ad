"""The short path: a plan, or components, from one call. Holds no logic of its own."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, NamedTuple

from splitlearn_core.checkpoint.fetchplan import FetchPlan
from splitlearn_core.fetching import plan_model_fetch
from splitlearn_core.loading import (
    LoadOptions,
    check_options,
    load_components,
    make_plan,
    memory_by_strategy,
    open_model,
    refuse_misfit,
)
from splitlearn_core.plan.placement import parse_device_map, parse_dtypes, parse_max_memory
from splitlearn_core.plan.splitplan import SplitPlan, parse_parts
from splitlearn_core.progress import reporting
from splitlearn_core.types import Component, Progress, ProgressCallback

if TYPE_CHECKING:
    import torch

    from splitlearn_core.build.component import ComponentModel


class SplitModel(NamedTuple):
    """The three components of a model; a part that was not asked for is None."""

    bottom: ComponentModel | None
    trunk: ComponentModel | None
    top: ComponentModel | None


def plan_split(
    model_name_or_path: str | os.PathLike[str],
    split_points: Sequence[int],
    *,
    model_type: str | None = None,
    parts: Sequence[str] = ("bottom", "trunk", "top"),
    dtype: str | torch.dtype | Mapping[str, str | torch.dtype] = "auto",
    cache_dir: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> SplitPlan:
    """Say what cutting a model gives: layers, parameters, bytes and shards of each component.

    Reads ``config.json`` and the headers of the weight files, over the network only these where the
    model is on the Hub. Imports neither torch nor transformers, unless there are no weights: then
    the model is built on the meta device.

    Args:
        model_name_or_path: A directory, a repository on the Hub, or ``bundled:gpt2``.
        split_points: ``(a, b)``: bottom is layers ``[0, a)``, trunk ``[a, b)``, top ``[b, N)``.
        model_type: What the caller expects it to be; by default ``config.json`` says.
        parts: The components to plan.
        dtype: The dtype the weights shall have once loaded; ``auto`` as ``from_pretrained``. A mapping
            gives each component its own, ``{"bottom": "float32", "trunk": "bfloat16"}``.
        cache_dir, revision, token, local_files_only: As in ``huggingface_hub``.

    Raises:
        SplitLearnError: With a hint; invalid split points are a ValueError, a missing file is a
            FileNotFoundError, an unknown model type a KeyError.
    """
    hub = {"cache_dir": cache_dir, "revision": revision, "token": token, "local_files_only": local_files_only}
    asked = parse_parts(parts)
    model = open_model(model_name_or_path, model_type, **hub)
    plan, table = make_plan(model, split_points, asked, parse_dtypes(dtype, asked))
    refuse_misfit(model, plan, table)
    return replace(plan, memory=memory_by_strategy(model, plan)) if model.checkpoint.has_weights else plan


def plan_fetch(
    model_name_or_path: str | os.PathLike[str],
    split_points: Sequence[int],
    *,
    model_type: str | None = None,
    parts: Sequence[str] = ("bottom", "trunk", "top"),
    dtype: str | torch.dtype | Mapping[str, str | torch.dtype] = "auto",
    cache_dir: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> FetchPlan:
    """Say what loading components would fetch: files, bytes that are needed, here, and to be transferred.

    Takes the arguments of :func:`plan_split`, and reads no more than that does. Headers, which it
    reads, are not counted again.

    Returns:
        A frozen value. Of a directory, everything is here.

    Raises:
        SplitLearnError: As :func:`plan_split`; and a FileNotFoundError where there are no weights.
    """
    hub = {"cache_dir": cache_dir, "revision": revision, "token": token, "local_files_only": local_files_only}
    asked = parse_parts(parts)
    model = open_model(model_name_or_path, model_type, **hub)
    return plan_model_fetch(model, split_points, asked, parse_dtypes(dtype, asked))


def load_split_model(
    model_type: str | None = None,
    split_points: Sequence[int] = (),
    model_name_or_path: str | os.PathLike[str] | None = None,
    *,
    parts: Sequence[str] = ("bottom", "trunk", "top"),
    device: str | torch.device = "cpu",
    device_map: str | Mapping[str, str | int | torch.device] | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    dtype: str | torch.dtype | Mapping[str, str | torch.dtype] = "auto",
    cache_dir: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    strategy: str = "auto",
    progress: ProgressCallback | Literal[False] | None = None,
    attn_implementation: str | None = None,
    strict: bool = False,
) -> SplitModel:
    """Load the asked components of a model, and read no byte of the others.

    Args:
        model_type: What the model is; None to take what ``config.json`` says.
        split_points: ``(a, b)`` with ``0 < a < b < number of layers``.
        model_name_or_path: A directory, or a repository on the Hub; by default the family's own.
        parts: The components to load.
        device: Where they go.
        device_map: Where each goes, ``{"bottom": "cpu", "trunk": "cuda:0", "top": "cpu"}``; or ``auto``:
            as much on the GPUs as fits, in order, the rest on the CPU.
        max_memory: What may be used of each device, ``{0: "10GiB", "cpu": "30GiB"}``, as in accelerate.
            By default nine tenths of what is free on each GPU.
        dtype: ``auto`` as ``from_pretrained``: what ``config.json`` says, or else as stored. A mapping
            gives each component its own; ``SplitCausalLM(..., mixed_dtypes=True)`` joins such components.
        cache_dir, revision, token, local_files_only: As in ``huggingface_hub``.
        strategy: ``auto``, the cheapest that can; ``mapped``, ``copied``, ``incremental``, ``whole``, or one
            that a plugin adds.
        progress: Called with each :class:`Progress`; None for a bar where stderr is a terminal,
            False for neither.
        attn_implementation: ``eager``, ``sdpa``, ...; by default what transformers chooses.
        strict: Refuse a checkpoint with tensors that the model has no place for (a value head, MTP layers).
            By default they are not read, and named in a warning, as by ``from_pretrained``.

    Returns:
        A named tuple ``(bottom, trunk, top)``: Hugging Face modules in evaluation mode.

    Raises:
        SplitLearnError: With a hint, before anything is half made; see :func:`plan_split`.
    """
    asked = parse_parts(parts)
    dtypes = parse_dtypes(dtype, asked)
    options = load_options(asked, device, device_map, max_memory, strategy, attn_implementation, strict=strict)
    with reporting(progress) as report:
        report(Progress("resolving"))
        model = open_model(
            model_name_or_path,
            model_type,
            cache_dir=cache_dir,
            revision=revision,
            token=token,
            local_files_only=local_files_only,
        )
        check_options(model, options)
        plan, table = make_plan(model, split_points, asked, dtypes, fetch=report)
        components = load_components(model, plan, table, options, report)
    return SplitModel(*(components.get(component) for component in Component))


def load_options(
    asked: Sequence[Component],
    device: str | torch.device,
    device_map: str | Mapping[str, str | int | torch.device] | None,
    max_memory: Mapping[int | str, int | str] | None,
    strategy: str,
    attn_implementation: str | None,
    *,
    strict: bool = False,
) -> LoadOptions:
    """Check and put together what :func:`load_split_model` was told; raises ConfigurationError."""
    return LoadOptions(
        str(device),
        strategy,
        attn_implementation,
        parse_device_map(device_map, asked),
        parse_max_memory(max_memory),
        strict=strict,
    )
