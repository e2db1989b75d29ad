"""The short path: a plan, a list of downloads, or components from one call."""

# For mypy, the literals of one component may overlap with those of another, in tuples and sequences.
# mypy: disable-error-code="overload-overlap"

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import (
    TYPE_CHECKING,
    Any,
    Literal,
    TypeAlias,
    TypedDict,
    Unpack,
    overload,
)

from splitlearn_core.arguments import accept_foreign_names
from splitlearn_core.checkpoint.files import CONFIG, GENERATION_CONFIG, INDEX, TORCH_INDEX
from splitlearn_core.checkpoint.hub.fetch_plan import FetchPlan, Wanted
from splitlearn_core.errors import InvalidSplitError
from splitlearn_core.loading.load import load_components
from splitlearn_core.loading.opening import OpenModel, open_model, type_and_model
from splitlearn_core.loading.options import LoadOptions, check_options, memory_by_strategy
from splitlearn_core.loading.planning import make_plan, plan_and_fetch, refuse_misfit, wanted_keys
from splitlearn_core.plan.placement import parse_device_map, parse_dtypes, parse_max_memory
from splitlearn_core.plan.split_points import names_of_parts
from splitlearn_core.plan.splitplan import SplitPlan, parse_parts
from splitlearn_core.progress import reporting
from splitlearn_core.split_model import AnySplitModel, SplitChain, SplitModel, SplitPair, split_model
from splitlearn_core.types import (
    ALL_PARTS,
    THREE,
    Component,
    Progress,
    ProgressCallback,
)

if TYPE_CHECKING:
    import torch

    from splitlearn_core.build.component import BottomModel, TopModel, TrunkModel


if TYPE_CHECKING:
    DType: TypeAlias = str | torch.dtype
_BOTTOM: TypeAlias = Literal["bottom", Component.BOTTOM]
_TRUNK: TypeAlias = Literal["trunk", Component.TRUNK]
_TOP: TypeAlias = Literal["top", Component.TOP]


class CommonArguments(TypedDict, total=False):
    """The optional arguments that all functions which load a model have in common."""

    device_map: str | Mapping[str, str | int | torch.device] | None
    max_memory: Mapping[int | str, int | str] | None
    dtype: DType | Mapping[str, DType] | None
    cache_dir: str | os.PathLike[str] | None
    revision: str | None
    token: str | bool | None
    local_files_only: bool
    strategy: str
    progress: ProgressCallback | Literal[False] | None
    attn_implementation: str | None


class LoadArguments(CommonArguments, total=False):
    """The optional arguments of :func:`load_split_model`, except for the parts."""

    device: str | torch.device
    strict: bool


@accept_foreign_names
def plan_split(
    model_name_or_path: str | os.PathLike[str],
    split_points: Sequence[int],
    *,
    model_type: str | None = None,
    parts: Sequence[str] = ALL_PARTS,
    dtype: DType | Mapping[str, DType] | None = "auto",
    cache_dir: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> SplitPlan:
    """Plan the components of a model that is cut: layers, parameters, bytes and shards of each.

    Reads ``config.json`` and the headers of the weight files; of a model on the Hub, only these are downloaded.
    Imports neither torch nor transformers, unless there are no weights: then the model is built on the meta
    device.

    Args:
        model_name_or_path: A directory, a repository on the Hub, or ``bundled:gpt2``.
        split_points: ``(a, b)``: bottom is layers ``[0, a)``, trunk ``[a, b)``, top ``[b, N)``. With one point
            there is no trunk; with more, there are ``trunk1``, ``trunk2``, ...
        model_type: The expected model type; by default that of ``config.json``.
        parts: The components to plan; by default all.
        dtype: The dtype of the weights once they are loaded; ``auto`` as in ``from_pretrained``. A mapping
            gives each component its own, ``{"bottom": "float32", "trunk": "bfloat16"}``.
        cache_dir, revision, token, local_files_only: As in ``huggingface_hub``.

    Raises:
        SplitLearnError: With a hint; invalid split points are a ValueError, a missing file is a
            FileNotFoundError, an unknown model type a KeyError.
    """
    hub: dict[str, Any] = {
        "cache_dir": cache_dir,
        "revision": revision,
        "token": token,
        "local_files_only": local_files_only,
    }
    names = names_of_parts(split_points)
    requested = parse_parts(parts, names)
    return plan_opened(open_model(model_name_or_path, model_type, **hub), split_points, requested, dtype)


def plan_opened(
    model: OpenModel,
    split_points: Sequence[int],
    requested: Sequence[str],
    dtype: DType | Mapping[str, DType] | None,
) -> SplitPlan:
    """Plan components of an opened model; see :func:`plan_split`."""
    planned = make_plan(model, split_points, requested, parse_dtypes(dtype, requested, names_of_parts(split_points)))
    refuse_misfit(model, planned)
    plan = planned.split
    return replace(plan, memory=memory_by_strategy(model, plan)) if model.checkpoint.has_weights else plan


@accept_foreign_names
def plan_fetch(
    model_name_or_path: str | os.PathLike[str],
    split_points: Sequence[int],
    *,
    model_type: str | None = None,
    parts: Sequence[str] = ALL_PARTS,
    dtype: DType | Mapping[str, DType] | None = "auto",
    cache_dir: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> FetchPlan:
    """Plan what loading components would download: the files, and how many bytes are needed, cached and missing.

    Takes the arguments of :func:`plan_split`, and reads no more than that does. The headers that it reads are not
    counted again.

    Returns:
        A frozen value. The files of a directory are all present.

    Raises:
        SplitLearnError: As :func:`plan_split`; and a FileNotFoundError if there are no weights.
    """
    hub: dict[str, Any] = {
        "cache_dir": cache_dir,
        "revision": revision,
        "token": token,
        "local_files_only": local_files_only,
    }
    names = names_of_parts(split_points)
    requested = parse_parts(parts, names)
    model = open_model(model_name_or_path, model_type, **hub)
    return plan_model_fetch(model, split_points, requested, parse_dtypes(dtype, requested, names))


@overload
def load_split_model(
    model_type: str | os.PathLike[str] | None,
    split_points: tuple[int],
    model_name_or_path: str | os.PathLike[str] | None = None,
    *,
    parts: tuple[_BOTTOM, _TOP] = ...,
    **arguments: Unpack[LoadArguments],
) -> SplitPair[BottomModel, TopModel]: ...


@overload
def load_split_model(
    model_type: str | os.PathLike[str] | None,
    split_points: tuple[int],
    model_name_or_path: str | os.PathLike[str] | None = None,
    *,
    parts: Sequence[_BOTTOM],
    **arguments: Unpack[LoadArguments],
) -> SplitPair[BottomModel, None]: ...


@overload
def load_split_model(
    model_type: str | os.PathLike[str] | None,
    split_points: tuple[int],
    model_name_or_path: str | os.PathLike[str] | None = None,
    *,
    parts: Sequence[_TOP],
    **arguments: Unpack[LoadArguments],
) -> SplitPair[None, TopModel]: ...


@overload
def load_split_model(
    model_type: str | os.PathLike[str] | None,
    split_points: tuple[int],
    model_name_or_path: str | os.PathLike[str] | None = None,
    *,
    parts: Sequence[str],
    **arguments: Unpack[LoadArguments],
) -> SplitPair: ...


@overload
def load_split_model(
    model_type: str | os.PathLike[str] | None,
    split_points: tuple[int, int, int, *tuple[int, ...]],
    model_name_or_path: str | os.PathLike[str] | None = None,
    **arguments: Unpack[LoadArguments],
) -> SplitChain[BottomModel, TrunkModel, TopModel]: ...


@overload
def load_split_model(
    model_type: str | os.PathLike[str] | None,
    split_points: tuple[int, int, int, *tuple[int, ...]],
    model_name_or_path: str | os.PathLike[str] | None = None,
    *,
    parts: Sequence[str],
    **arguments: Unpack[LoadArguments],
) -> SplitChain: ...


@overload
def load_split_model(
    model_type: str | os.PathLike[str] | None = None,
    split_points: Sequence[int] = (),
    model_name_or_path: str | os.PathLike[str] | None = None,
    *,
    parts: tuple[_BOTTOM, _TRUNK, _TOP] = ...,
    **arguments: Unpack[LoadArguments],
) -> SplitModel[BottomModel, TrunkModel, TopModel]: ...


@overload
def load_split_model(
    model_type: str | os.PathLike[str] | None = None,
    split_points: Sequence[int] = (),
    model_name_or_path: str | os.PathLike[str] | None = None,
    *,
    parts: Sequence[_BOTTOM],
    **arguments: Unpack[LoadArguments],
) -> SplitModel[BottomModel, None, None]: ...


@overload
def load_split_model(
    model_type: str | os.PathLike[str] | None = None,
    split_points: Sequence[int] = (),
    model_name_or_path: str | os.PathLike[str] | None = None,
    *,
    parts: Sequence[_TRUNK],
    **arguments: Unpack[LoadArguments],
) -> SplitModel[None, TrunkModel, None]: ...


@overload
def load_split_model(
    model_type: str | os.PathLike[str] | None = None,
    split_points: Sequence[int] = (),
    model_name_or_path: str | os.PathLike[str] | None = None,
    *,
    parts: Sequence[_TOP],
    **arguments: Unpack[LoadArguments],
) -> SplitModel[None, None, TopModel]: ...


@overload
def load_split_model(
    model_type: str | os.PathLike[str] | None = None,
    split_points: Sequence[int] = (),
    model_name_or_path: str | os.PathLike[str] | None = None,
    *,
    parts: tuple[_BOTTOM, _TRUNK] | tuple[_TRUNK, _BOTTOM] | list[_BOTTOM | _TRUNK],
    **arguments: Unpack[LoadArguments],
) -> SplitModel[BottomModel, TrunkModel, None]: ...


@overload
def load_split_model(
    model_type: str | os.PathLike[str] | None = None,
    split_points: Sequence[int] = (),
    model_name_or_path: str | os.PathLike[str] | None = None,
    *,
    parts: tuple[_TRUNK, _TOP] | tuple[_TOP, _TRUNK] | list[_TRUNK | _TOP],
    **arguments: Unpack[LoadArguments],
) -> SplitModel[None, TrunkModel, TopModel]: ...


@overload
def load_split_model(
    model_type: str | os.PathLike[str] | None = None,
    split_points: Sequence[int] = (),
    model_name_or_path: str | os.PathLike[str] | None = None,
    *,
    parts: tuple[_BOTTOM, _TOP] | tuple[_TOP, _BOTTOM] | list[_BOTTOM | _TOP],
    **arguments: Unpack[LoadArguments],
) -> SplitModel[BottomModel, None, TopModel]: ...


@overload
def load_split_model(
    model_type: str | os.PathLike[str] | None = None,
    split_points: Sequence[int] = (),
    model_name_or_path: str | os.PathLike[str] | None = None,
    *,
    parts: Sequence[str],
    **arguments: Unpack[LoadArguments],
) -> SplitModel: ...


@accept_foreign_names
def load_split_model(
    model_type: str | os.PathLike[str] | None = None,
    split_points: Sequence[int] = (),
    model_name_or_path: str | os.PathLike[str] | None = None,
    *,
    parts: Sequence[str] = ALL_PARTS,
    device: str | torch.device = "cpu",
    device_map: str | Mapping[str, str | int | torch.device] | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    dtype: DType | Mapping[str, DType] | None = "auto",
    cache_dir: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    strategy: str = "auto",
    progress: ProgressCallback | Literal[False] | None = None,
    attn_implementation: str | None = None,
    strict: bool = False,
) -> AnySplitModel:
    """Load the requested components of a model, and read no byte of the others.

    Args:
        model_type: The model type; None for that of ``config.json``. A path, a Hub repository or ``bundled:gpt2``
            in its place is the model.
        split_points: ``(a, b)`` with ``0 < a < b < number of layers``; or one point, or more, in order.
        model_name_or_path: A directory, or a repository on the Hub; by default the family's own.
        parts: The components to load, by name: ``bottom``, ``trunk`` and ``top``; with one split point ``bottom``
            and ``top``, with more than two ``trunk1``, ``trunk2``, ... for ``trunk``.
            By default all.
        device: The device of all components.
        device_map: The device of each component, ``{"bottom": "cpu", "trunk": "cuda:0", "top": "cpu"}``; or ``auto``:
            as much on the GPUs as fits, in order, the rest on the CPU.
        max_memory: Memory to use of each device, ``{0: "10GiB", "cpu": "30GiB"}``, as in accelerate.
            By default nine tenths of the free memory of each GPU.
        dtype: ``auto`` as in ``from_pretrained``: that of ``config.json``, or else as stored. ``torch.float16``,
            ``"fp16"`` and ``"half"`` are the same; ``torch_dtype`` is another name of the argument. A mapping gives
            each component its own; ``SplitCausalLM(..., mixed_dtypes=True)`` joins such components.
        cache_dir, revision, token, local_files_only: As in ``huggingface_hub``.
        strategy: ``auto``, the cheapest that can read the files; ``mapped``, ``copied``, ``incremental``, ``whole``,
            or one that a plugin adds.
        progress: Called with each :class:`Progress`; None for a bar if stderr is a terminal, False for neither.
        attn_implementation: ``eager``, ``sdpa``, ...; by default that which transformers chooses.
        strict: Refuse a checkpoint with tensors that the model does not have (a value head, MTP layers).
            By default they are not read, and named in a warning, as by ``from_pretrained``.

    Returns:
        A named tuple ``(bottom, trunk, top)``: Hugging Face modules in evaluation mode. It has as many parts as
        there are components, and ``bottom``, ``trunks`` and ``top`` for any number.

    Raises:
        SplitLearnError: With a hint; nothing is left partly loaded. See :func:`plan_split`.
    """
    if isinstance(split_points, int) and isinstance(model_name_or_path, int):
        raise InvalidSplitError(
            f"split_points is {split_points!r}, and model_name_or_path {model_name_or_path!r}",
            hint=f"give the split points as one argument: ({split_points}, {model_name_or_path})",
        )
    model_type, model_name_or_path = type_and_model(model_type, model_name_or_path)
    names = names_of_parts(split_points)
    requested = parse_parts(parts, names)
    dtypes = parse_dtypes(dtype, requested, names)
    options = load_options(
        requested, device, device_map, max_memory, strategy, attn_implementation, names, strict=strict
    )
    with reporting(progress) as report:
        report(Progress("resolving"))
        model = open_model(
            model_name_or_path,
            model_type,
            cache_dir=cache_dir,
            revision=revision,
            token=token,
            local_files_only=local_files_only,
            progress=report,
        )
        check_options(model, options)
        fetched = plan_and_fetch(model, split_points, requested, dtypes, report)
        components = load_components(model, fetched, options, report)
    return split_model(fetched.split.names, components)


def load_options(
    requested: Sequence[str],
    device: str | torch.device,
    device_map: str | Mapping[str, str | int | torch.device] | None,
    max_memory: Mapping[int | str, int | str] | None,
    strategy: str,
    attn_implementation: str | None,
    names: Sequence[str] = THREE,
    *,
    strict: bool = False,
) -> LoadOptions:
    """Check the arguments of :func:`load_split_model`, and return them as a value; raises ConfigurationError."""
    return LoadOptions(
        str(device),
        strategy,
        attn_implementation,
        parse_device_map(device_map, requested, names),
        parse_max_memory(max_memory),
        strict=strict,
    )


#: Small files that a load reads if they exist.
_SETTINGS = (CONFIG, INDEX, TORCH_INDEX)


def plan_model_fetch(
    model: OpenModel,
    split_points: Sequence[int],
    parts: Sequence[str] | None,
    dtype: str | Mapping[Any, str] = "auto",
    *,
    whole: bool = False,
    others: Iterable[str] = (),
) -> FetchPlan:
    """Plan which files a load of components needs, and how many bytes of each it would fetch.

    Args:
        model: The opened checkpoint.
        split_points: Where to cut.
        parts: The components to load; None for all.
        dtype: The dtype that is wanted; refused here if a load would refuse it.
        whole: The unsplit model is loaded, too.
        others: More files that are read, such as those of a tokenizer.

    Raises:
        SplitLearnError: As a load would raise before it fetches.
    """
    checkpoint = model.checkpoint
    files = checkpoint.source.files()
    settings = [*_SETTINGS, *([GENERATION_CONFIG] if parts is None or Component.TOP in parts else []), *others]
    small: Wanted = dict.fromkeys(name for name in settings if name in files)
    # If there are no weights at all, weight_files() raises an error that says what is missing.
    weights: Wanted
    if whole or checkpoint.is_opaque or not checkpoint.has_weights:
        weights = dict.fromkeys(checkpoint.weight_files())
    elif checkpoint.headerless_files:
        weights = dict.fromkeys(checkpoint.headerless_files)
    elif not checkpoint.is_describable:
        # The headers of these shards cannot be fetched alone: their tensors are known from the index.
        weights = dict.fromkeys(checkpoint.shards(wanted_keys(model, split_points, parts)))
    else:
        planned = make_plan(model, split_points, parts, dtype)
        refuse_misfit(model, planned)
        weights = checkpoint.wanted(planned.split.infos)
    return FetchPlan(model.name, checkpoint.source.commit, checkpoint.source.plan_fetch({**small, **weights}))
