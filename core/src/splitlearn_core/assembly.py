"""Components that are loaded here, and components that run elsewhere, as one generation model."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from splitlearn_core.errors import ConfigurationError
from splitlearn_core.loading.load import load_components
from splitlearn_core.loading.opening import OpenModel, open_model
from splitlearn_core.loading.options import LoadOptions, check_options
from splitlearn_core.loading.planning import plan_and_fetch
from splitlearn_core.quoting import SENTENCE, listed
from splitlearn_core.storage.directory import SplitDirectory
from splitlearn_core.storage.saved_components import load_split_directory
from splitlearn_core.types import THREE, Component, ProgressCallback, component_names

if TYPE_CHECKING:
    from splitlearn_core.hosts.remote import RemoteComponent
    from splitlearn_core.pipeline import SplitCausalLM


def load_saved(
    directory: str | os.PathLike[str],
    dtype: str | Mapping[str, str],
    options: LoadOptions,
    remote: Mapping[str, RemoteComponent],
) -> tuple[SplitCausalLM, OpenModel]:
    """Load saved components as one generation model, and open the folder that has the tokenizer.

    Args:
        directory: The directory of saved components.
        dtype: One for all of them.
        options: How they are loaded.
        remote: Components that run elsewhere, by name; they need not be in the directory.

    Raises:
        ConfigurationError: Components are missing, or an option is for checkpoints alone.
    """
    from splitlearn_core.pipeline import SplitCausalLM

    split = SplitDirectory.open(directory)
    problems = [f"the {name} is missing" for name in split.missing if name not in remote]
    if not isinstance(dtype, str) or options.device_map is not None or options.max_memory:
        problems.append("saved components take one dtype and one device here")
    if problems:
        raise ConfigurationError(
            f"{directory} cannot be run as one model: {listed(problems, '; ', limit=SENTENCE)}",
            hint=f"give a directory with {' and '.join(split.names)}, or load each with load_component"
            if len(split.names) != len(THREE)
            else "give a directory with bottom, trunk and top, or load each with load_component",
        )
    _refuse_unknown(remote, split.names)
    loaded: Any = load_split_directory(
        directory,
        device=options.device,
        dtype=str(dtype),
        strategy=options.strategy,
        attn_implementation=options.attn_implementation,
    )
    parts: list[Any] = [remote.get(name) or part for name, part in zip(split.names, loaded, strict=True)]
    return SplitCausalLM(*parts), open_model(split.components[Component.BOTTOM].folder)


def load_all(
    model: OpenModel,
    split_points: Sequence[int],
    dtype: str | Mapping[Any, str],
    options: LoadOptions,
    progress: ProgressCallback,
    remote: Mapping[str, RemoteComponent] = {},
) -> SplitCausalLM:
    """Load the components that do not run elsewhere, and join all of them into one generation model.

    Raises:
        ConfigurationError: A remote component is not part of this split.
        SplitLearnError: As :func:`load_components`.
    """
    from splitlearn_core.pipeline import SplitCausalLM

    names = component_names(len(split_points) + 1)
    _refuse_unknown(remote, names)
    check_options(model, options)
    _refuse_other_cuts(remote, split_points)
    here = tuple(name for name in names if name not in remote)
    fetched = plan_and_fetch(model, split_points, here if remote else None, dtype, progress)
    if isinstance(dtype, str):
        _refuse_other_dtype(remote, fetched.split.dtype)
    loaded = load_components(model, fetched, options, progress)
    parts: list[Any] = [remote.get(name) or loaded[name] for name in names]
    return SplitCausalLM(*parts, mixed_dtypes=isinstance(dtype, Mapping))


def _refuse_other_cuts(remote: Mapping[str, RemoteComponent], split_points: Sequence[int]) -> None:
    for number, name in enumerate(component_names(len(split_points) + 1)):
        if name not in remote:
            continue
        component = remote[name]
        layers, total = component.layer_range, component.layer_range.total
        start, end = (0, *split_points, total)[number : number + 2]
        if (start, end) != (layers.start, layers.end):
            origin = component.origin
            cuts = "" if origin is None else f": --split {' '.join(map(str, origin.split_points))}"
            raise ConfigurationError(
                f"--split {' '.join(map(str, split_points))} makes layers [{start}, {end}) the {name}, and "
                f"{component.url} runs layers {layers}",
                hint=f"leave --split out, or give the server's{cuts}",
            )


def _refuse_other_dtype(remote: Mapping[str, RemoteComponent], dtype: str) -> None:
    for name, component in remote.items():
        theirs = component.facts.dtype
        if theirs != dtype:
            raise ConfigurationError(
                f"the components here would be {dtype}, and {component.url} runs the {name} in {theirs}",
                hint=f"--dtype {theirs} here, or `splitlearn serve ... --dtype {dtype}` there",
            )


def _refuse_unknown(remote: Mapping[str, RemoteComponent], names: Sequence[str]) -> None:
    unknown = [name for name in remote if name not in names]
    if unknown:
        raise ConfigurationError(
            f"{', '.join(unknown)} cannot run elsewhere: the components of this model are {', '.join(names)}",
            hint="use one of these in --at NAME=URL",
        )
