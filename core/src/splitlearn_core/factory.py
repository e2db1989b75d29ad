"""The classic entry points: the same loads under the names that split learning code knows."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack, overload

from splitlearn_core.api import load_split_model
from splitlearn_core.arguments import accept_foreign_names, user_path
from splitlearn_core.errors import ConfigurationError
from splitlearn_core.loading.opening import type_and_model
from splitlearn_core.loading_strategy import AUTO
from splitlearn_core.plugins.registry import registry
from splitlearn_core.split_model import SplitModel
from splitlearn_core.types import THREE, Component, ProgressCallback, dtype_name

if TYPE_CHECKING:
    import torch

    from splitlearn_core.api import DType
    from splitlearn_core.build.component import BottomModel, ComponentModel, TopModel, TrunkModel

#: The strategy that ``low_memory`` selects.
_LOW_MEMORY = "incremental"


class _Arguments(TypedDict, total=False):
    """The arguments of ``create_split_models`` that may be left out, but the parts."""

    low_memory: bool
    storage_path: str | os.PathLike[str] | None
    auto_save: bool
    dtype: DType | Mapping[str, DType] | None
    torch_dtype: DType | Mapping[str, DType] | None
    device_map: str | Mapping[str, str | int | torch.device] | None
    max_memory: Mapping[int | str, int | str] | None
    attn_implementation: str | None
    strategy: str
    cache_dir: str | os.PathLike[str] | None
    revision: str | None
    token: str | bool | None
    local_files_only: bool
    progress: ProgressCallback | Literal[False] | None


class ModelFactory:
    """Makes split models."""

    @overload
    @staticmethod
    def create_split_models(
        model_type: str | os.PathLike[str] | None,
        model_name_or_path: str | os.PathLike[str] | None,
        split_point_1: int,
        split_point_2: int,
        device: str | torch.device = "cpu",
        **arguments: Unpack[_Arguments],
    ) -> SplitModel[BottomModel, TrunkModel, TopModel]: ...
    @overload
    @staticmethod
    def create_split_models(
        model_type: str | os.PathLike[str] | None,
        model_name_or_path: str | os.PathLike[str] | None,
        split_point_1: int,
        split_point_2: int,
        device: str | torch.device = "cpu",
        *,
        parts: Sequence[str],
        **arguments: Unpack[_Arguments],
    ) -> SplitModel: ...
    @staticmethod
    @accept_foreign_names
    def create_split_models(
        model_type: str | os.PathLike[str] | None,
        model_name_or_path: str | os.PathLike[str] | None,
        split_point_1: int,
        split_point_2: int,
        device: str | torch.device = "cpu",
        *,
        low_memory: bool = False,
        storage_path: str | os.PathLike[str] | None = None,
        auto_save: bool = False,
        parts: Sequence[str] = ("bottom", "trunk", "top"),
        dtype: DType | Mapping[str, DType] | None = None,
        torch_dtype: DType | Mapping[str, DType] | None = None,
        device_map: str | Mapping[str, str | int | torch.device] | None = None,
        max_memory: Mapping[int | str, int | str] | None = None,
        attn_implementation: str | None = None,
        strategy: str = "auto",
        cache_dir: str | os.PathLike[str] | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        progress: ProgressCallback | Literal[False] | None = None,
    ) -> SplitModel:
        """Load bottom, trunk and top; what is not described here is as in :func:`load_split_model`.

        Args:
            model_type: What the model is; None to take what ``config.json`` says.
            model_name_or_path: A directory or a Hub repository; None for the family's own.
            split_point_1: Where the trunk begins.
            split_point_2: Where the top begins.
            device: Where the components go.
            low_memory: Read shard by shard: the strategy ``incremental``.
            storage_path: A directory where the components are kept. If it holds this split of this
                source, it is loaded from there and the source is not looked at; if not, from the source.
            auto_save: Keep there what was loaded from the source, as :func:`save_split` saves it.
            parts, device_map, max_memory, attn_implementation, strategy, progress: As there.
            dtype: As there; ``auto`` by default.
            torch_dtype: ``dtype`` by the name that it had in transformers before.
            cache_dir, revision, token, local_files_only: As in ``huggingface_hub``.

        Raises:
            SplitLearnError: As there; arguments that contradict each other are a ConfigurationError.
        """
        problems = []
        if dtype is not None and torch_dtype is not None and _dtype_names(dtype) != _dtype_names(torch_dtype):
            problems.append(f"dtype is {dtype!r} and torch_dtype, its old name, {torch_dtype!r}")
        if low_memory and strategy not in (AUTO, _LOW_MEMORY):
            problems.append(f"low_memory means strategy {_LOW_MEMORY!r}, and strategy is {strategy!r}")
        if storage_path is not None and not isinstance(storage_path, str | os.PathLike):
            problems.append(f"storage_path is {storage_path!r}, no path")
        if auto_save and storage_path is None:
            problems.append("auto_save is given, and no storage_path to save to")
        if problems:
            raise ConfigurationError("; ".join(problems), hint="give arguments that agree")
        model_type, model_name_or_path = type_and_model(model_type, model_name_or_path)
        named = dtype if dtype is not None else torch_dtype
        points = (split_point_1, split_point_2)
        hub: dict[str, Any] = {
            "cache_dir": cache_dir,
            "revision": revision,
            "token": token,
            "local_files_only": local_files_only,
        }
        loading: dict[str, Any] = {
            "device": device,
            "device_map": device_map,
            "max_memory": max_memory,
            "dtype": "auto" if named is None else named,
            "strategy": _LOW_MEMORY if low_memory else strategy,
            "attn_implementation": attn_implementation,
            "progress": progress,
        }
        if storage_path is None:
            return load_split_model(model_type, points, model_name_or_path, parts=parts, **loading, **hub)
        from splitlearn_core.storage.split_cache import create_kept

        return create_kept(
            user_path(storage_path), model_type, model_name_or_path, points, parts, loading, hub, save=auto_save
        )


def _dtype_names(dtype: Any) -> Any:
    """Return dtypes by their names alone: ``torch.float16``, ``float16`` and ``half`` are one."""
    if isinstance(dtype, Mapping):
        return {str(part): dtype_name(each) for part, each in dtype.items()}
    return dtype_name(dtype)


class ModelRegistry:
    """Knows the classes of the installed families' components."""

    @staticmethod
    def is_model_registered(model_type: str) -> bool:
        """Say whether an installed plugin offers the model type; imports none."""
        return model_type in registry().model_types()

    @staticmethod
    def list_models() -> tuple[str, ...]:
        """Return the model types that installed plugins offer; imports none."""
        return tuple(registry().model_types())

    @staticmethod
    def get_model_class(model_type: str, component: str) -> type[ComponentModel]:
        """Return the class of a family's component.

        Args:
            model_type: An installed family's.
            component: ``bottom``, ``trunk`` or ``top``; one class is that of every trunk.

        Raises:
            UnknownModelTypeError: No plugin provides the model type (a KeyError).
            ConfigurationError: There is no such component.
        """
        family = registry().family(model_type)
        if component not in THREE:
            raise ConfigurationError(f"there is no component {component!r}", hint=f"choose from {', '.join(Component)}")
        from splitlearn_core.build.construction import component_class

        return component_class(family, Component(component))
