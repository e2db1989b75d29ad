"""What a type checker holds a plugin to: one protocol for each hook.

A plugin is a module, or an object that an entry point ``module:object`` names. mypy and pyright check
either against a protocol when it is assigned to a name of that type, in a test file for example::

    import splitlearn_llama
    from splitlearn_core import FamilyPlugin

    plugin: FamilyPlugin = splitlearn_llama

A plugin is held to the protocols of the hooks that it implements: a misspelt hook, an argument that the
hook does not have, or a wrong answer is then an error of the checker, before anything runs.
Arguments may come in any order. At run time a hook may also leave arguments out; the protocols ask for
all of them, because a type checker cannot tell an argument left out from one that is misspelt.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from splitlearn_core.checkpoint.strategy import LoadingStrategy
    from splitlearn_core.family import ModelFamily


class FamilyPlugin(Protocol):
    """A plugin that provides model families: what an entry point in ``splitlearn.families`` names."""

    def splitlearn_model_families(self) -> Iterable[ModelFamily]:
        """See :func:`splitlearn_core.hookspecs.splitlearn_model_families`."""


class KeyMappingPlugin(Protocol):
    """A plugin that maps the keys of its checkpoints itself."""

    def splitlearn_map_weight_keys(
        self, *, family: ModelFamily, config: Mapping[str, Any], checkpoint_keys: Sequence[str]
    ) -> Mapping[str, str | None] | None:
        """See :func:`splitlearn_core.hookspecs.splitlearn_map_weight_keys`."""


class StrategyPlugin(Protocol):
    """A plugin that adds loading strategies: what an entry point in ``splitlearn.strategies`` names."""

    def splitlearn_loading_strategies(self) -> Iterable[LoadingStrategy]:
        """See :func:`splitlearn_core.hookspecs.splitlearn_loading_strategies`."""
