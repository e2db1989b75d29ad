"""The classic entry points: the same loads under the names that split learning code knows."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from splitlearn_core.errors import ConfigurationError
from splitlearn_core.plugins.registry import registry
from splitlearn_core.quickstart import SplitModel, load_split_model
from splitlearn_core.types import Component

if TYPE_CHECKING:
    from splitlearn_core.build.component import ComponentModel


class ModelFactory:
    """Makes split models."""

    @staticmethod
    def create_split_models(
        model_type: str,
        model_name_or_path: str | os.PathLike[str] | None,
        split_point_1: int,
        split_point_2: int,
        device: str = "cpu",
        **options: Any,
    ) -> SplitModel:
        """Load bottom, trunk and top; ``options`` and errors are those of :func:`load_split_model`."""
        points = (split_point_1, split_point_2)
        return load_split_model(model_type, points, model_name_or_path, device=device, **options)


class ModelRegistry:
    """Knows the classes of the installed families' components."""

    @staticmethod
    def is_model_registered(model_type: str) -> bool:
        """Say whether an installed plugin offers the model type; imports none."""
        return model_type in registry().model_types()

    @staticmethod
    def get_model_class(model_type: str, component: str) -> type[ComponentModel]:
        """Return the class of a family's component.

        Args:
            model_type: An installed family's.
            component: ``bottom``, ``trunk`` or ``top``.

        Raises:
            UnknownModelTypeError: No plugin provides the model type (a KeyError).
            ConfigurationError: There is no such component.
        """
        family = registry().family(model_type)
        if component not in set(Component):
            raise ConfigurationError(f"there is no component {component!r}", hint=f"choose from {', '.join(Component)}")
        from splitlearn_core.build.component import component_class

        return component_class(family, Component(component))
