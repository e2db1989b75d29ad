"""Arguments as callers give them: under the names of other libraries, and paths that begin with ``~``.

An argument of another library is accepted if it means the same as one of ours, and refused with a hint otherwise.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from splitlearn_core.errors import ConfigurationError, UnexpectedArgumentError, translate

_P = ParamSpec("_P")
_R = TypeVar("_R")

#: Other names of arguments -> ours.
RENAMED: Mapping[str, str] = {
    "torch_dtype": "dtype",
    "pretrained_model_name_or_path": "model_name_or_path",
    "use_auth_token": "token",
}


@dataclass(frozen=True, slots=True)
class ForeignArgument:
    """An argument of another library's function that loads models."""

    #: What to do instead.
    hint: str
    #: Values that request the behaviour of splitlearn anyway; they are accepted.
    harmless: tuple[Any, ...] = (None,)


_PLAIN = (
    "components have plain weights: leave it out; quantised checkpoints are read dequantised, GGUF by splitlearn-gguf"
)
_HUB = "fetch the files first (hf download), and give their folder"
_WHOLE = "it is an argument of transformers' from_pretrained: leave it out"

#: Arguments of ``from_pretrained`` and similar functions without a counterpart here.
FOREIGN: Mapping[str, ForeignArgument] = {
    "low_cpu_mem_usage": ForeignArgument("components are never built twice in memory", (None, True, False)),
    "trust_remote_code": ForeignArgument(
        "no code of a checkpoint is run; a plugin provides the model type (splitlearn plugins new TYPE)", (None, False)
    ),
    "load_in_8bit": ForeignArgument(_PLAIN, (None, False)),
    "load_in_4bit": ForeignArgument(_PLAIN, (None, False)),
    "quantization_config": ForeignArgument(_PLAIN),
    "gguf_file": ForeignArgument(
        "give the path of the GGUF file as model_name_or_path, with splitlearn-gguf installed"
    ),
    "use_safetensors": ForeignArgument(
        "leave it out: safetensors files are preferred, and of .bin files only tensors are read"
    ),
    "weights_only": ForeignArgument("of a .bin file only tensors are read, in any case", (None, True)),
    "use_flash_attention_2": ForeignArgument("give attn_implementation='flash_attention_2'", (None, False)),
    "attn_implementation": ForeignArgument("give attn_implementation to the function that loads the components"),
    "device_map": ForeignArgument("give one device='cuda:0' here, or device_map in load_split_model"),
    "max_memory": ForeignArgument("give limits of memory to the function that loads the components: load_split_model"),
    "low_memory": ForeignArgument("give strategy='incremental'", (None, False)),
    "offload_folder": ForeignArgument("mapped weights are pages of their file already: give strategy='mapped'"),
    "offload_state_dict": ForeignArgument("mapped weights are pages of their file already", (None, False)),
    "offload_buffers": ForeignArgument(_WHOLE, (None, False)),
    "config": ForeignArgument("config.json of the checkpoint is used; change it there"),
    "state_dict": ForeignArgument(
        "a component is made of a state dict by ModelRegistry.get_model_class(TYPE, 'trunk').from_pretrained_split"
    ),
    "num_labels": ForeignArgument("components are those of causal language models; there are no labels"),
    "ignore_mismatched_sizes": ForeignArgument("tensors have to fit the model", (None, False)),
    "subfolder": ForeignArgument(_HUB, (None, "")),
    "variant": ForeignArgument(_HUB),
    "force_download": ForeignArgument("remove the model from the cache: hf cache delete", (None, False)),
    "resume_download": ForeignArgument("downloads are resumed in any case", (None, True)),
    "proxies": ForeignArgument("set HTTPS_PROXY, which the Hub's client uses"),
    "mirror": ForeignArgument("set HF_ENDPOINT"),
    "tp_plan": ForeignArgument("a component is on one device: give device, or device_map"),
    "device_mesh": ForeignArgument("a component is on one device: give device, or device_map"),
    "adapter_kwargs": ForeignArgument("load the adapter afterwards: load_adapter(components, DIR)"),
    "output_loading_info": ForeignArgument("tensors that do not fit are an error; leave it out", (None, False)),
    "use_cache": ForeignArgument(
        "caches are made by component.new_cache(), or by SplitCausalLM.generate", (None, True)
    ),
}


def accept_foreign_names(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Let a function accept arguments under their names in transformers, and explain those that it does not accept.

    Raises:
        UnexpectedArgumentError: The returned function is given an argument that it does not accept.
    """
    parameters = inspect.signature(function).parameters

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if kwargs.keys() <= parameters.keys():
            return function(*args, **kwargs)
        given: Any = translated(function.__name__, kwargs, tuple(parameters), positional=len(args))
        return function(*args, **given)

    return call


def translated(function: str, given: Mapping[str, Any], names: tuple[str, ...], *, positional: int) -> dict[str, Any]:
    """Return arguments under the names of a function's parameters.

    Args:
        function: Its name.
        given: The arguments that were given by name.
        names: The names of its parameters, in order.
        positional: The number of arguments that were given by position.

    Raises:
        UnexpectedArgumentError: It has no such parameters; all are named, each with what to do.
    """
    accepted = {name: value for name, value in given.items() if name in names}
    problems, hints = [], []
    for name, value in given.items():
        if name in names:
            continue
        ours = RENAMED.get(name)
        foreign = FOREIGN.get(name)
        if ours in names:
            if ours in accepted or ours in names[:positional]:
                problems.append(f"{name} is another name of {ours}, which was also given")
                hints.append(f"give only {ours}")
            else:
                accepted[ours] = value
        elif foreign is None:
            problems.append(f"unexpected keyword argument {name!r}")
            close = difflib.get_close_matches(name, names, n=1)
            hints.append(f"did you mean {close[0]}?" if close else f"the arguments are {', '.join(names)}")
        # The types are compared too: 1 is not True here, and the comparison of an array has no truth value.
        elif not any(type(value) is type(each) and value == each for each in foreign.harmless):
            problems.append(f"unexpected keyword argument {name!r}")
            hints.append(f"{name}: {foreign.hint}")
    if problems:
        raise UnexpectedArgumentError(f"{function}(): {'; '.join(problems)}", hint="; ".join(dict.fromkeys(hints)))
    return accepted


def user_path(given: str | os.PathLike[str]) -> Path:
    """Return a path with a leading ``~`` or ``~name`` expanded to the home directory.

    Raises:
        ConfigurationError: There is no such home directory.
    """
    with translate(
        lambda _: ConfigurationError(
            f"{os.fspath(given)!r} is in the home of an unknown user", hint="give the absolute path"
        ),
        RuntimeError,
    ):
        return Path(given).expanduser()
