"""The classic entry points: the same loads under the names that earlier split learning code uses."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Unpack, overload

from splitlearn_core.api import CommonArguments, load_split_model
from splitlearn_core.arguments import accept_foreign_names, user_path
from splitlearn_core.errors import ConfigurationError, UnknownModelTypeError
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


class _Arguments(CommonArguments, total=False):
    """The optional arguments of ``create_split_models``, except for the parts."""

    low_memory: bool
    storage_path: str | os.PathLike[str] | None
    auto_save: bool
    torch_dtype: DType | Mapping[str, DType] | None


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
        """Load bottom, trunk and top; anything not described here works as in :func:`load_split_model`.

        Args:
            model_type: The model type; None for that of ``config.json``.
            model_name_or_path: A directory or a Hub repository; None for the family's own.
            split_point_1: The first layer of the trunk.
            split_point_2: The first layer of the top.
            device: The device of the components.
            low_memory: Read shard by shard: the strategy ``incremental``.
            storage_path: A directory of saved components. If it holds this split of this source, the components
                are loaded from there without looking at the source; otherwise from the source.
            auto_save: Save there what was loaded from the source, as :func:`save_split` does.
            parts, device_map, max_memory, attn_implementation, strategy, progress: As in :func:`load_split_model`.
            dtype: As in :func:`load_split_model`; ``auto`` by default.
            torch_dtype: ``dtype`` under its earlier name in transformers.
            cache_dir, revision, token, local_files_only: As in ``huggingface_hub``.

        Raises:
            SplitLearnError: As :func:`load_split_model`; contradictory arguments are a ConfigurationError.
        """
        problems = []
        if dtype is not None and torch_dtype is not None and _dtype_names(dtype) != _dtype_names(torch_dtype):
            problems.append(f"dtype is {dtype!r} and torch_dtype, its old name, {torch_dtype!r}")
        if low_memory and strategy not in (AUTO, _LOW_MEMORY):
            problems.append(f"low_memory means strategy {_LOW_MEMORY!r}, and strategy is {strategy!r}")
        if storage_path is not None and not isinstance(storage_path, str | os.PathLike):
            problems.append(f"storage_path is {storage_path!r}, which is not a path")
        if auto_save and storage_path is None:
            problems.append("auto_save is given without a storage_path to save to")
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
        from splitlearn_core.storage.saved_components import create_cached

        return create_cached(
            user_path(storage_path), model_type, model_name_or_path, points, parts, loading, hub, save=auto_save
        )


def _dtype_names(dtype: Any) -> Any:
    """Return dtypes by torch's names: ``torch.float16``, ``float16`` and ``half`` are the same."""
    if isinstance(dtype, Mapping):
        return {str(part): dtype_name(value) for part, value in dtype.items()}
    return dtype_name(dtype)


class ModelRegistry:
    """The classes of the components of installed families."""

    @staticmethod
    def is_model_registered(model_type: str) -> bool:
        """Return whether an installed plugin provides the model type; imports none for types that a plugin names.

        Asking the plugin for any type (``splitlearn-auto``) about one takes seconds, the first time.
        """
        if model_type in registry().model_types():
            return True
        try:
            return registry().may_provide(model_type) and bool(registry().family(model_type))
        except UnknownModelTypeError:
            return False

    @staticmethod
    def list_models() -> tuple[str, ...]:
        """Return the model types that installed plugins name; imports none."""
        return tuple(registry().model_types())

    @staticmethod
    def get_model_class(model_type: str, component: str) -> type[ComponentModel]:
        """Return the class of a family's component.

        Args:
            model_type: The model type of an installed family.
            component: ``bottom``, ``trunk`` or ``top``; all trunks have one class.

        Raises:
            UnknownModelTypeError: No plugin provides the model type (a KeyError).
            ConfigurationError: There is no such component.
        """
        family = registry().family(model_type)
        if component not in THREE:
            raise ConfigurationError(f"there is no component {component!r}", hint=f"choose from {', '.join(Component)}")
        from splitlearn_core.build.construction import component_class

        return component_class(family, Component(component))
