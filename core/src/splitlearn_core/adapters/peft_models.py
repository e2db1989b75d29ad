"""PEFT adapters of a whole model on its components: loaded by layer, saved as one adapter, merged."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from splitlearn_core.adapters.adapter_files import (
    PREFIX,
    AdapterFiles,
    AdapterSlice,
    adapted_modules,
    adapts_ends,
    check_adapter_target,
    config_problems,
    key_problems,
    open_adapter,
    rank_problems,
    slice_keys,
    write_adapter,
)
from splitlearn_core.checkpoint.files import ADAPTER_CONFIG, open_regular, path_of
from splitlearn_core.errors import ConfigurationError, InvalidCheckpointError, SplitLearnError, TensorMismatchError
from splitlearn_core.quoting import SENTENCE, listed, reason, said
from splitlearn_core.types import stored_dtype

if TYPE_CHECKING:
    import torch

    from splitlearn_core.build.component import ComponentModel
    from splitlearn_core.pipeline import SplitCausalLM

    Parts: TypeAlias = ComponentModel | SplitCausalLM | Iterable[ComponentModel | None]

_NAME = "default"
#: PEFT's name of an adapter that adapts nothing, and only replaces modules.
_NOTHING = "dummy-target-modules"
#: Attribute of a component with its adapter; not a submodule, so that its tensors count once.
_ATTRIBUTE = "splitlearn_adapter"


@dataclass(frozen=True, slots=True)
class _Loaded:
    """An adapter on a component."""

    adapter: AdapterFiles
    slice: AdapterSlice
    is_trainable: bool
    #: PEFT's wrapper, whose base model is the component; None if no tensor of the adapter belongs to it.
    peft: Any = field(compare=False)
    #: PEFT's modules as they were loaded, by name: what PEFT adds or replaces later is not part of this adapter.
    modules: dict[str, Any] = field(compare=False, default_factory=dict)


def load_adapter(
    parts: Parts,
    adapter: str | os.PathLike[str],
    *,
    is_trainable: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> None:
    """Load an adapter of the whole model onto components; each holds its own tensors and no others.

    The components are changed in place and keep their class: they are called as before, and form
    a :class:`SplitCausalLM` as before. Needs ``pip install "splitlearn-core[peft]"``.

    Args:
        parts: A component, several, what ``load_split_model`` returned, or a ``SplitCausalLM``.
        adapter: The folder that PEFT's ``save_pretrained`` wrote, or a repository on the Hub.
        is_trainable: Whether the adapter is trained; the component's own weights never are.
        cache_dir, revision, token, local_files_only: As in ``huggingface_hub``.

    Raises:
        ConfigurationError: The adapter cannot be cut by layers, a component has one already, or PEFT is
            not installed.
        TensorMismatchError: Its tensors do not match the components; all mismatches are listed, and the
            components are unchanged.
        CheckpointError: Its files are missing or not valid.
    """
    components = _components(parts)
    import_peft()
    hub = {"cache_dir": cache_dir, "revision": revision, "token": token, "local_files_only": local_files_only}
    apply_adapter(components, open_adapter(adapter, hub), is_trainable=is_trainable)


def apply_adapter(
    components: Sequence[ComponentModel], files: AdapterFiles, *, is_trainable: bool = False, widen: bool = True
) -> None:
    """Load an adapter whose files are local onto components; all or nothing. Raises like :func:`load_adapter`.

    Args:
        components: The components.
        files: The adapter.
        is_trainable: Whether to train it.
        widen: Convert half-precision adapters to float32, as PEFT does; ``from_pretrained`` with adapters does not.
    """
    import_peft()
    _refuse_others(components)
    taken = [str(component.component) for component in components if _loaded(component) is not None]
    if taken:
        raise ConfigurationError(
            f"there is an adapter on {', '.join(taken)} already", hint="call merge_and_unload or unload_adapter first"
        )
    problems = config_problems(files.config)
    if problems:
        raise ConfigurationError(
            f"{files.name} cannot be cut into slices for components: {'; '.join(problems)}",
            hint="merge it into the whole model with PEFT, save that, and split the result",
        )
    problems = rank_problems(files.config, files.tensors.values())
    if problems:
        raise _mismatch(files, problems)
    first = components[0]
    problems = key_problems(files.tensors, files.config, first.family, first.layer_range)
    if problems:
        raise _mismatch(files, problems)
    problems = _target_problems(components, files)
    if problems:
        raise _mismatch(files, problems)
    loads: list[tuple[ComponentModel, _Loaded]] = []
    try:
        for component in components:
            loads.append((component, _inject(component, files, is_trainable, widen)))  # noqa: PERF401  # undone if the next fails
        problems = [problem for component, loaded in loads for problem in _tensor_problems(component, loaded)]
        if problems:
            raise _mismatch(files, problems)
        for _, loaded in loads:
            _read(loaded)
    except BaseException:
        for component, loaded in loads:
            _take_off(component, loaded)
        raise
    for component, loaded in loads:
        object.__setattr__(component, _ATTRIBUTE, loaded)


def save_adapter(parts: Parts, directory: str | os.PathLike[str]) -> Path:
    """Join the slices of an adapter and save them as PEFT does, for the whole model.

    Tensors that were loaded and not trained are written unchanged, and so is ``adapter_config.json``.

    Args:
        parts: All components that the adapter has tensors for.
        directory: Where to write: a new or empty folder, or one that holds an adapter, which is replaced.

    Returns:
        The directory, from which PEFT loads the adapter onto the whole model.

    Raises:
        ConfigurationError: Components without an adapter, with different ones, or too few of them; or the
            directory is not a folder, or holds something else.
    """
    target = check_adapter_target(directory)
    components = _components(parts)
    _refuse_others(components)
    loads = _all_loaded(components)
    adapter = loads[0].adapter
    for problem in _differences(loads):
        raise ConfigurationError(problem, hint="load one adapter onto all components")
    tensors: dict[str, torch.Tensor] = {}
    for component, loaded in zip(components, loads, strict=True):
        tensors.update(_slice_tensors(component, loaded))
    missing = sorted(adapter.tensors.keys() - tensors.keys())
    if missing:
        names = ", ".join(str(component.component) for component in components)
        raise ConfigurationError(
            f"{names} hold {len(tensors)} of the adapter's {len(adapter.tensors)} tensors; missing: {_some(missing)}",
            hint="give all components",
        )
    return write_adapter(target, adapter.text, tensors)


def merge_and_unload(parts: Parts, *, safe_merge: bool = False) -> None:
    """Add the adapter to the weights of components, which are plain components afterwards.

    Mapped weights are copied where they change; the file does not. Each layer is merged twice, into a copy
    first: what PEFT refuses, it refuses before any weight has changed.

    Args:
        parts: As in :func:`load_adapter`.
        safe_merge: Refuse merged weights that are not finite, as PEFT does by this name.

    Raises:
        ConfigurationError: A component has no adapter, or PEFT cannot merge it; or the adapter adapts an
            embedding that is also the head, which another component may hold. The components are unchanged.
    """
    components = _components(parts)
    _refuse_others(components)
    loads = _all_loaded(components)
    adapter, family = loads[0].adapter, components[0].family
    if components[0].config.tie_word_embeddings and adapts_ends(adapter.tensors, adapter.config, family):
        raise ConfigurationError(
            f"{adapter.name} adapts the embedding or the head, and these are one tensor in this model: "
            "merging into one component would leave the other's as it was",
            hint="use the adapter unmerged",
        )
    for component, loaded in zip(components, loads, strict=True):
        _try_merge(component, loaded, safe_merge)
    for component, loaded in zip(components, loads, strict=True):
        if loaded.peft is not None:
            loaded.peft.base_model.merge_and_unload(safe_merge=safe_merge)
        _forget(component)


def unload_adapter(parts: Parts) -> None:
    """Remove the adapter from components, whose weights are then as before it was loaded.

    Raises:
        ConfigurationError: A component has no adapter; or the adapter has changed the model's own biases.
    """
    components = _components(parts)
    _refuse_others(components)
    loads = _all_loaded(components)
    if any(loaded.adapter.config.get("bias", "none") != "none" for loaded in loads):
        raise ConfigurationError(
            f"{loads[0].adapter.name} has changed the model's own biases", hint="load the components again"
        )
    for component, loaded in zip(components, loads, strict=True):
        _take_off(component, loaded)
        _forget(component)


def adapter_mismatches(components: Iterable[ComponentModel]) -> list[str]:
    """Return why components are not one model with an adapter; empty if they are."""
    parts = list(components)
    loads = [loaded for loaded in map(_loaded, parts) if loaded is not None]
    if not loads:
        return []
    adapter = loads[0].adapter
    problems = _differences(loads)
    bare = [
        str(part.component)
        for part in parts
        if _loaded(part) is None
        and slice_keys(adapter.tensors, adapter.config, part.family, part.component, part.layer_range).keys
    ]
    if bare:
        problems.append(f"{adapter.name} is not loaded on {', '.join(bare)}, and has tensors for it")
    return problems


def _differences(loads: list[_Loaded]) -> list[str]:
    if len({loaded.adapter.digest for loaded in loads}) == 1:
        return []
    names = ", ".join(f"{loaded.adapter.name} on {loaded.slice.component}" for loaded in loads)
    return [f"these are different adapters: {names}"]


def _components(parts: Parts) -> list[ComponentModel]:
    from splitlearn_core.build.component import ComponentModel

    # A SplitCausalLM, which imports this module. Looked up on the class: a PeftModel around one has its attributes.
    if hasattr(type(parts), "components"):
        parts = cast("Any", parts).components
    components: list[Any] = [parts] if not isinstance(parts, Iterable) else [part for part in parts if part is not None]
    wrong = sorted({type(part).__name__ for part in components if not isinstance(part, ComponentModel)})
    if wrong or not components:
        own = any(name.startswith("Peft") for name in wrong)
        raise ConfigurationError(
            f"{', '.join(wrong) or 'nothing'} is not a component",
            hint="a PeftModel saves, merges and removes its adapters itself: save_pretrained, merge_and_unload, unload"
            if own
            else "pass the result of load_split_model, or some of its parts",
        )
    models = {(part.family.model_type, part.layer_range.total) for part in components}
    if len(models) > 1 or len({(part.kind, part.start_layer, part.component) for part in components}) < len(components):
        described = ", ".join(f"{part.family.model_type} {part.component} {part.layer_range}" for part in components)
        raise ConfigurationError(
            f"these are not components of one model: {described}", hint="pass components of one split"
        )
    return components


def _all_loaded(components: list[ComponentModel]) -> list[_Loaded]:
    loads = [_loaded(component) for component in components]
    bare = [str(part.component) for part, loaded in zip(components, loads, strict=True) if loaded is None]
    if bare:
        raise ConfigurationError(f"there is no adapter on {', '.join(bare)}", hint="call load_adapter first")
    return [loaded for loaded in loads if loaded is not None]


def refuse_adapters(components: Iterable[ComponentModel]) -> None:
    """Refuse components with an adapter, however it was applied; raises ConfigurationError."""
    adapted = [str(component.component) for component in components if _peft_modules(component)]
    if adapted:
        raise ConfigurationError(
            f"there is an adapter on {', '.join(adapted)}, which a checkpoint of the whole model cannot hold",
            hint="save the adapter (save_adapter, or save_pretrained of the PeftModel), or merge it first",
        )


def _refuse_others(components: Sequence[ComponentModel]) -> None:
    """Refuse an adapter that was applied with PEFT directly: its settings are not known."""
    for component in components:
        loaded, there = _loaded(component), _peft_modules(component)
        known = {} if loaded is None else loaded.modules
        if there.keys() == known.keys() and all(there[name] is module for name, module in known.items()):
            continue
        if loaded is None:
            raise ConfigurationError(
                f"the adapter on {component.component} was applied with PEFT itself, not with load_adapter",
                hint="save, merge or remove it with the PeftModel: save_pretrained, merge_and_unload, unload",
            )
        raise ConfigurationError(
            f"PEFT itself has changed the adapter {loaded.adapter.name} on {component.component}, "
            "which load_adapter applied",
            hint="load the components again, and use load_adapter or PEFT's own means, not both",
        )


def _peft_modules(component: ComponentModel) -> dict[str, Any]:
    """Return PEFT's modules in a component, and the modules in them, by name."""
    return {
        f"{name}.{inner}": each
        for name, module in component.named_modules()
        if any(base.__module__.partition(".")[0] == "peft" for base in type(module).__mro__)
        for inner, each in module.named_modules()
    }


def _try_merge(component: ComponentModel, loaded: _Loaded, safe_merge: bool) -> None:
    """Merge copies of a component's layers, one at a time, so that a refusal leaves the component as it was.

    Raises:
        ConfigurationError: PEFT refuses.
    """
    if loaded.peft is None:
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    name = ""
    try:
        loaded.peft.base_model._check_merge_allowed()  # noqa: SLF001  # what PEFT's merge begins with
        for name, module in component.named_modules():  # noqa: B007  # the error names the last one
            if isinstance(module, BaseTunerLayer):
                copy.deepcopy(module).merge(safe_merge=safe_merge)
    # PEFT raises ValueError, RuntimeError, NotImplementedError, TypeError, by the kind of adapter.
    except Exception as error:
        raise ConfigurationError(
            f"PEFT cannot merge {loaded.adapter.name} into {name or 'the layers'} of {component.component}: "
            f"{type(error).__name__}: {error}",
            hint="use the adapter unmerged; no weight has changed",
        ) from error


def _loaded(component: ComponentModel) -> _Loaded | None:
    loaded: _Loaded | None = component.__dict__.get(_ATTRIBUTE)
    return loaded


def _take_off(component: ComponentModel, loaded: _Loaded) -> None:
    """Restore the modules that PEFT has wrapped, and those that it replaced as a whole."""
    if loaded.peft is None:
        return
    from peft.utils import ModulesToSaveWrapper

    originals = {
        name: module.original_module
        for name, module in component.named_modules()
        if isinstance(module, ModulesToSaveWrapper)
    }
    loaded.peft.base_model.unload()
    for name, module in originals.items():
        holder, _, leaf = name.rpartition(".")
        setattr(component.get_submodule(holder), leaf, module)
    component.__dict__.pop("peft_config", None)


def _forget(component: ComponentModel) -> None:
    object.__delattr__(component, _ATTRIBUTE)
    # PEFT does not remove its settings.
    component.__dict__.pop("peft_config", None)


def import_peft() -> Any:
    """Import PEFT; raises ConfigurationError with the command that installs it."""
    try:
        import peft
    except ImportError as error:
        raise ConfigurationError(
            f"adapters need the package peft: {reason(error)}", hint='pip install "splitlearn-core[peft]"'
        ) from error
    return peft


def _target_problems(components: Sequence[ComponentModel], adapter: AdapterFiles) -> list[str]:
    """Compare ``target_modules`` with the tensors that are present, by PEFT's own rules."""
    from peft.tuners.tuners_utils import check_target_module_exists

    from splitlearn_core.build.pruning import PassLayer, Zero

    target_modules, adapted = adapter.config.get("target_modules"), adapted_modules(adapter.tensors, adapter.config)
    if (
        not target_modules
        or target_modules == _NOTHING
        or (isinstance(target_modules, str) and target_modules.lower() == "all-linear")
    ):
        return []
    if not adapted:
        return [f"missing: every tensor of target_modules, {target_modules!r}"]
    with _blaming(adapter):
        config = import_peft().PeftConfig.from_pretrained(str(adapter.weights.parent))
        problems = [
            f"unexpected: tensors of {name}, which target_modules does not name"
            for name in adapted
            if not check_target_module_exists(config, name)
        ]
        for component in components:
            own = slice_keys(
                adapter.tensors, adapter.config, component.family, component.component, component.layer_range
            )
            problems += [
                f"missing: every tensor of {name}, which target_modules names"
                for name, module in component.named_modules()
                if name
                and name not in own.targets
                and name not in own.modules_to_save
                and not isinstance(module, PassLayer | Zero)
                and check_target_module_exists(config, name)
            ]
    return problems


def _inject(component: ComponentModel, adapter: AdapterFiles, is_trainable: bool, widen: bool) -> _Loaded:
    """Let PEFT insert its modules into a component, without the adapter's tensors."""
    import torch

    peft = import_peft()
    own = slice_keys(adapter.tensors, adapter.config, component.family, component.component, component.layer_range)
    if not own.keys:
        return _Loaded(adapter, own, is_trainable, None)
    with _blaming(adapter), torch.random.fork_rng(devices=[]):
        config = peft.PeftConfig.from_pretrained(str(adapter.weights.parent))
        config.inference_mode = not is_trainable
        _narrow(config, own)
        was_training = component.training
        wrapper = peft.PeftModel(component, config, autocast_adapter_dtype=widen)
        component.train(was_training)
    return _Loaded(adapter, own, is_trainable, wrapper, _peft_modules(component))


def _narrow(config: Any, own: AdapterSlice) -> None:
    """Narrow PEFT's settings to one component: to its own modules, by their full names.

    Patterns of names and layers would match the modules that stand for other components' too, or
    nothing, which PEFT takes for a mistake.
    """
    config.modules_to_save = list(own.modules_to_save) or None
    config.target_modules = list(own.targets) or _NOTHING
    for name in ("exclude_modules", "layers_to_transform", "layers_pattern"):
        setattr(config, name, None)
    for name in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(config, name, None) or {}
        # Matched as PEFT does.
        kept = {p: value for p, value in patterns.items() if any(re.match(rf"(.*\.)?({p})$", t) for t in own.targets)}
        setattr(config, name, kept)


def _tensor_problems(component: ComponentModel, loaded: _Loaded) -> list[str]:
    """Compare the tensors of PEFT's modules with those in the file for this component."""
    planned = loaded.adapter.tensors
    expected = _held(loaded) if loaded.peft is not None else {}
    own = set(loaded.slice.keys) - set(loaded.slice.base_keys)
    problems = [f"missing: {key} {list(expected[key].shape)}" for key in sorted(expected.keys() - own)]
    problems += [f"unexpected: {key} {list(planned[key].shape)}" for key in sorted(own - expected.keys())]
    expected.update({key: component.get_parameter(_base_name(key)) for key in loaded.slice.base_keys})
    return problems + [
        f"mis-shaped: {key} is {list(planned[key].shape)} in the file, {list(expected[key].shape)} in the model"
        for key in sorted(expected.keys() & set(loaded.slice.keys))
        if planned[key].shape != tuple(expected[key].shape)
    ]


def _read(loaded: _Loaded) -> None:
    """Read a component's tensors, and load them into PEFT's modules."""
    import torch
    from safetensors import SafetensorError, safe_open

    if loaded.peft is None:
        return
    peft = import_peft()
    try:
        with (
            open_regular(loaded.adapter.weights) as regular,
            safe_open(path_of(regular, loaded.adapter.weights), framework="pt", device="cpu") as file,
        ):
            tensors = {key: file.get_tensor(key) for key in loaded.slice.keys}
    except SafetensorError as error:
        raise InvalidCheckpointError(
            f"{loaded.adapter.weights} has changed while it was read: {reason(error)}", hint="load the adapter again"
        ) from error
    component = loaded.peft.get_base_model()
    for key in loaded.slice.base_keys:
        # The model's own needs no loading; another one would have to replace a tied head too.
        base = component.get_parameter(_base_name(key))
        if not torch.equal(tensors.pop(key).to(base), base):
            raise ConfigurationError(
                f"{loaded.adapter.name} brings an embedding of its own along: {key}",
                hint="merge it into the whole model with PEFT, save that, and split the result",
            )
    with _blaming(loaded.adapter):
        peft.set_peft_model_state_dict(loaded.peft, tensors, _NAME)


def _held(loaded: _Loaded) -> dict[str, torch.Tensor]:
    """Return the tensors that PEFT holds for a component, by the keys of an adapter's file."""
    return dict(import_peft().get_peft_model_state_dict(loaded.peft, adapter_name=_NAME, save_embedding_layers=False))


def _slice_tensors(component: ComponentModel, loaded: _Loaded) -> dict[str, torch.Tensor]:
    """Return a component's tensors as stored in the file."""
    if loaded.peft is None:
        return {}
    tensors = _held(loaded)
    tensors.update({key: component.get_parameter(_base_name(key)) for key in loaded.slice.base_keys})
    if not loaded.is_trainable:
        # PEFT computes in float32. Converting untrained values back loses nothing.
        tensors = {key: tensor.to(stored_dtype(loaded.adapter.tensors[key].dtype)) for key, tensor in tensors.items()}
    return {key: tensor.detach().cpu() for key, tensor in tensors.items()}


def _base_name(key: str) -> str:
    return key.removeprefix(PREFIX)


@contextmanager
def _blaming(adapter: AdapterFiles) -> Iterator[None]:
    """Name the adapter if PEFT refuses its settings or tensors."""
    try:
        yield
    except SplitLearnError:
        raise
    # A wrong value may cause any error in PEFT: TypeError, ValueError, KeyError, re.error and others.
    except Exception as error:
        raise InvalidCheckpointError(
            f"PEFT cannot load {adapter.name}: {said(error)}",
            hint=f"check {ADAPTER_CONFIG}, and whether the adapter was made for this model",
        ) from error


def _mismatch(adapter: AdapterFiles, problems: list[str]) -> TensorMismatchError:
    return TensorMismatchError(
        f"the adapter {adapter.name} does not fit these components; {len(problems)} tensors are wrong:\n  "
        + listed(problems, "\n  ", limit=SENTENCE),
        hint="was it made for this model, and saved by PEFT for the whole of it?",
    )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")  # noqa: PLR2004  # a readable line
