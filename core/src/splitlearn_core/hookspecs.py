"""The four hooks a plugin may implement, each a small manual.

A plugin is a module with functions marked :data:`hookimpl`, named as below, and an entry point in
the group ``splitlearn.families`` whose name is the model type and whose value is that module::

    [project.entry-points."splitlearn.families"]
    llama = "splitlearn_llama"

An entry point named ``*`` is for all model types that no other entry point of the group names, and is asked last, one
type at a time: :func:`splitlearn_family_for`. There can be one such package::

    [project.entry-points."splitlearn.families"]
    "*" = "splitlearn_auto.any_type"

A package may also add nothing but a loading strategy, for the checkpoints of every family. Its entry
point is in the group ``splitlearn.strategies``, and is named after the strategy::

    [project.entry-points."splitlearn.strategies"]
    gguf = "splitlearn_gguf"

Such a package is imported when its strategy is requested by name, or when core cannot read a checkpoint:
never for a checkpoint that core reads.

A type checker checks a plugin against the protocols :class:`splitlearn_core.FamilyPlugin`,
:class:`~splitlearn_core.AnyTypePlugin`, :class:`~splitlearn_core.KeyMappingPlugin` and
:class:`~splitlearn_core.StrategyPlugin`, one for each hook::

    import splitlearn_llama

    plugin: FamilyPlugin = splitlearn_llama

Hooks are plain functions: they return at once, read no weights and import neither torch nor
transformers; :func:`splitlearn_family_for` alone may take seconds, and reports progress meanwhile. They
name the arguments that they need, in any order. A hook that does not match its
specification is refused before it is called, and the error shows both. A hook that raises, or returns
something else than specified, marks its own plugin as broken and does not affect others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from splitlearn_core.family import ModelFamily
    from splitlearn_core.loading_strategy import LoadingStrategy
    from splitlearn_core.plan.conversions import WeightConversion
    from splitlearn_core.types import ProgressCallback

#: pluggy's project name.
PROJECT = "splitlearn"

#: The number of the plugin API. It grows when a hook or :class:`ModelFamily` changes so that an
#: older plugin would no longer work. A plugin says which one it was made for with an entry point
#: ``version = "1"`` in the group ``splitlearn.plugin_api``; the default is 1. ``docs/plugin-api.md`` has the
#: promise, and the older numbers that are accepted.
PLUGIN_API = 1

#: Marks a function of a plugin as the implementation of a hook.
hookimpl = pluggy.HookimplMarker(PROJECT)
#: Marks the specification of a hook.
hookspec = pluggy.HookspecMarker(PROJECT)


@hookspec
def splitlearn_model_families() -> Iterable[ModelFamily]:  # type: ignore[empty-body]  # a specification
    """Return the model families that this plugin provides.

    Called once, when a checkpoint of the plugin's model type is used for the first time in a process.

    Returns:
        The families. One of them must have the ``model_type`` that the entry point is named after;
        families that no entry point names cannot be used.

    Example::

        @hookimpl
        def splitlearn_model_families():
            return [ModelFamily(model_type="llama", architecture="LlamaForCausalLM")]
    """


@hookspec
def splitlearn_family_for(model_type: str, progress: ProgressCallback) -> ModelFamily | None:
    """Return the family of a model type that no entry point names.

    Only the plugin whose entry point is named ``*`` is called: in the thread that loads or plans, when a checkpoint of
    the type is used, and never for a list of plugins. An answer is kept for the rest of the process. It is for the
    type and not for one ``config.json``: saved components, other processes and remote components find the family by
    its type alone. Settings that the family does not cover can be refused by its ``impossible_cuts``.

    Args:
        model_type: The model type, which comes from an untrusted ``config.json``: letters, digits, ``_``, ``-`` and
            ``.``, 64 at most.
        progress: Call it at least twice a second during work that takes longer, with
            ``Progress("examining", file=model_type)``. What it raises cancels the load: let it pass.

    Returns:
        A family with this model type; or None if the plugin has none, and no reason to give.

    Raises:
        UnknownModelTypeError: The type is refused. Core adds the names of type and plugin to the reason, and shows
            the hint as it is. Other errors mark the plugin as broken.

    Example::

        @hookimpl
        def splitlearn_family_for(model_type):
            known = json.loads(resources.files(__package__).joinpath("families.json").read_text())
            return ModelFamily(model_type=model_type, **known[model_type]) if model_type in known else None
    """


@hookspec
def splitlearn_map_weight_keys(
    family: ModelFamily, config: Mapping[str, Any], checkpoint_keys: Sequence[str]
) -> Mapping[str, str | WeightConversion | None] | None:
    """Return the name in the Hugging Face module of each tensor of a checkpoint.

    Only the plugin that owns the family is called, once per load, with all keys together. Most plugins
    omit this hook: the family's ``renamed`` and ``ignored_suffixes``, and the base prefix that
    some checkpoints lack, are applied by core.

    Args:
        family: The family that the checkpoint belongs to, as this plugin described it.
        config: ``config.json``, as a mapping.
        checkpoint_keys: The tensor names in the checkpoint, sorted.

    Returns:
        For every key the module key, or None to omit that tensor; no module key twice. A tensor that is made of
        others (all experts of a layer), or cut into several, is a :class:`splitlearn_core.WeightConversion`: each
        key that it is made of gets this one object.
        Or None instead of a mapping: then core maps the keys as if the hook were not implemented.

    Example::

        @hookimpl
        def splitlearn_map_weight_keys(family, config, checkpoint_keys):
            return {key: key.replace("gpt_neox.", "model.") for key in checkpoint_keys}

    One tensor of the file that is three of the module::

        targets = tuple(f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkv")
        three = WeightConversion(
            sources=(("layers.0.qkv.weight",),), targets=targets, operations=(WeightOperation("chunk", (0,)),)
        )
        mapping["layers.0.qkv.weight"] = three
    """


@hookspec
def splitlearn_loading_strategies() -> Iterable[LoadingStrategy]:  # type: ignore[empty-body]  # a specification
    """Return the loading strategies that this plugin adds: ways of turning planned bytes into tensors.

    Called together with the hook for families. A family chooses a strategy other than core's own
    with ``preferred_strategy``, a caller with ``strategy=``. The strategies of a family's plugin serve
    its families; those that an entry point in the group ``splitlearn.strategies`` names serve all.

    Returns:
        The strategies. Names must differ from one another and from core's.

    Example::

        @hookimpl
        def splitlearn_loading_strategies():
            return [MyStrategy()]
    """
