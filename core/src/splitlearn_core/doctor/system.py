"""The machine: memory, processors, devices, environment variables, and the Hub's cache folder."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from splitlearn_core.doctor.report import Finding, Level
from splitlearn_core.errors import BrokenPluginError, PluginError
from splitlearn_core.plugins.host import BLOCK_VARIABLE
from splitlearn_core.plugins.registry import ALLOW_VARIABLE, registry
from splitlearn_core.system_memory import MemoryReading, read_memory
from splitlearn_core.types import FLOAT_DTYPES, human_bytes

_CACHE = "cache"
_LITTLE_ROOM = 5 * 2**30


def check_cache() -> list[Finding]:
    """Look at the folder in which ``huggingface_hub`` keeps models."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return folder(Path(HF_HUB_CACHE).expanduser())


def folder(path: Path) -> list[Finding]:
    """Judge a cache: can files be written, and is there room for them? Nothing is left behind."""
    other = "set HF_HOME to a folder of yours"
    nearest = path
    try:
        # Below a folder that may not be searched, even this question is refused.
        while not nearest.exists():
            nearest = nearest.parent
        if not nearest.is_dir():
            return [
                Finding(_CACHE, Level.WRONG, f"the cache of models cannot be: {nearest} is a file", str(path), other)
            ]
        with tempfile.TemporaryFile(dir=nearest):
            pass
        free = shutil.disk_usage(nearest).free
    except OSError as error:
        what = f"the cache of models cannot be written: {error.strerror or error}"
        return [Finding(_CACHE, Level.WRONG, what, str(path), f"{other}, or: chmod u+rwx {nearest}")]
    state = "is writable" if nearest == path else "is not there yet, and can be made"
    what = f"the cache of models {state}; {human_bytes(free)} of its disk are free"
    if free < _LITTLE_ROOM:
        return [Finding(_CACHE, Level.NOTE, what, str(path), f"hf cache ls shows what it holds; or {other}")]
    return [Finding(_CACHE, Level.OK, what, str(path))]


_DEVICES = "devices"

#: What Linux shows where a driver of NVIDIA's is loaded.
_DRIVER = Path("/proc/driver/nvidia/version")


def check_devices() -> list[Finding]:
    """Import torch and multiply small matrices in every dtype on every device."""
    import torch

    found = [_tried("cpu", f"CPU, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads")]
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(number)
            label = f"{torch.cuda.get_device_name(number)}, {human_bytes(free)} of {human_bytes(total)} free"
            found.append(_tried(f"cuda:{number}", label))
    else:
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        found += without_gpu(torch.version.cuda, driver=_DRIVER.exists(), visible=hidden)
    if torch.backends.mps.is_available():
        found.append(_tried("mps", "the GPU of this Mac"))
    return found


def without_gpu(built_for: str | None, *, driver: bool, visible: str | None) -> Iterator[Finding]:
    """Say why there is no GPU.

    Args:
        built_for: The version of CUDA that torch was built for, or None.
        driver: Whether a driver is loaded.
        visible: ``CUDA_VISIBLE_DEVICES``, or None where it is not set.
    """
    if not driver:
        yield Finding(_DEVICES, Level.OK, "no GPU of NVIDIA's: everything runs on the CPU")
    elif built_for is None:
        what = "there is a GPU, and this torch is built for the CPU alone"
        yield Finding(_DEVICES, Level.NOTE, what, mend="install a build of torch for CUDA: torch.version.cuda names it")
    elif visible is not None:
        what = f"CUDA_VISIBLE_DEVICES={visible!r} hides every GPU"
        yield Finding(_DEVICES, Level.NOTE, what, "CUDA_VISIBLE_DEVICES", "unset CUDA_VISIBLE_DEVICES")
    else:
        what = f"there is a driver, and torch, built for CUDA {built_for}, cannot use it"
        yield Finding(_DEVICES, Level.NOTE, what, mend="nvidia-smi shows what the driver supports")


def _tried(device: str, label: str) -> Finding:
    """Multiply on a device, in each dtype that a model may be loaded in."""
    import torch

    failed: dict[str, str] = {}
    for name in FLOAT_DTYPES:
        try:
            ones: Any = torch.ones(4, 4, dtype=getattr(torch, name), device=device)
            if not bool(((ones @ ones) == len(ones)).all()):
                failed[name] = "computes wrongly"
        except (RuntimeError, TypeError) as error:
            failed[name] = str(error).partition("\n")[0]
    able = [name for name in FLOAT_DTYPES if name not in failed]
    what = f"{label}: {', '.join(able) or 'no dtype'}"
    if failed:
        what += f"; not {', '.join(f'{name} ({why})' for name, why in failed.items())}"
    # A GPU may well lack float64; a model is rarely loaded so.
    level = Level.WRONG if {"float32", "bfloat16"} & failed.keys() else Level.NOTE if failed else Level.OK
    return Finding(
        _DEVICES, level, what, device, f"choose another device than {device}, or a dtype that works" if failed else ""
    )


def check_architectures() -> list[Finding]:
    """Import, of transformers, the classes that the usable families name."""
    from splitlearn_core.build.configuration import architecture_class

    able, found = [], []
    for model_type in registry().model_types():
        try:
            able.append(architecture_class(registry().family(model_type)).__name__)
        except BrokenPluginError as error:
            found.append(Finding("transformers", Level.WRONG, error.message, mend=error.hint))
        except PluginError:
            continue  # the check of the plugin has said what is wrong with it
    if able:
        found.append(Finding("transformers", Level.OK, f"builds {', '.join(able)}"))
    return found


_MACHINE = "machine"
_LITTLE_MEMORY = 2**30
_FEW_FILES = 256


def check_machine() -> list[Finding]:
    """Read memory, processors and limits."""
    return [memory(read_memory()), processors(), *limits()]


def memory(reading: MemoryReading) -> Finding:
    """Judge the free memory; a control group may limit it."""
    by = "" if reading.limited_by == "machine" else ", limited by a control group"
    what = f"{human_bytes(reading.free)} of {human_bytes(reading.total)} memory are free{by}"
    where = reading.limited_by if by else ""
    if reading.free < _LITTLE_MEMORY:
        mend = "end what is not needed" + (", or raise the limit of the control group" if by else "")
        return Finding(_MACHINE, Level.NOTE, what, where, f"{mend}; mapped weights need little memory of their own")
    return Finding(_MACHINE, Level.OK, what, where)


def processors() -> Finding:
    """Say how many processors this process may use."""
    every = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if sys.platform == "linux" else every
    return Finding(_MACHINE, Level.OK, f"{usable} of {every} processors may be used")


def limits() -> list[Finding]:
    """Judge how many files may be open, and how much may be mapped."""
    if sys.platform == "win32":
        return []
    import resource

    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    space, _ = resource.getrlimit(resource.RLIMIT_AS)
    return [*open_files(files), *address_space(None if space == resource.RLIM_INFINITY else space)]


def open_files(most: int) -> list[Finding]:
    """Judge the limit of open files; a checkpoint may have hundreds of shards."""
    if 0 <= most < _FEW_FILES:
        what = f"at most {most} files may be open, and a checkpoint of many shards needs more"
        return [Finding(_MACHINE, Level.NOTE, what, mend="ulimit -n 4096")]
    return [Finding(_MACHINE, Level.OK, f"{most if most >= 0 else 'any number of'} files may be open")]


def address_space(most: int | None) -> list[Finding]:
    """Judge the limit of addresses: mapped files count there, read or not."""
    if most is None:
        return []
    what = f"the address space is limited to {human_bytes(most)}, and mapped weights count in full"
    return [Finding(_MACHINE, Level.NOTE, what, mend="ulimit -v unlimited, or --strategy copied")]


_VARIABLES = "variables"

#: Truth, as the Hub's client reads it.
_TRUE = {"1", "ON", "YES", "TRUE"}
_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
_FOLDERS = ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE")
_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")


def check_variables() -> list[Finding]:
    """Say what is set that changes which plugins and which models are found."""
    found = [*lists(os.environ, registry().unknown_names()), *hub(os.environ)]
    return found or [Finding(_VARIABLES, Level.OK, "none is set that hides plugins or models")]


def lists(environment: Mapping[str, str], unknown: Mapping[str, tuple[str, ...]]) -> Iterator[Finding]:
    """Say which lists of plugins are set, and what they name that is not there."""
    for variable, does in ((ALLOW_VARIABLE, "allows only"), (BLOCK_VARIABLE, "blocks")):
        value = environment.get(variable)
        if value is not None and (value.strip(" ,") or variable == ALLOW_VARIABLE):
            what = f"{variable} {does} {value.strip(' ,') or 'no plugin at all'}"
            yield Finding(_VARIABLES, Level.NOTE, what, variable, f"unset {variable}, if other plugins are wanted")
        if variable in unknown:
            what = f"{variable} names {', '.join(unknown[variable])}: no such plugin is installed"
            mend = "correct the name or take it out: splitlearn plugins lists them, by model type and by package"
            # What is gone cannot be blocked, and that is as it was wanted; what cannot be allowed is missing.
            level = Level.NOTE if variable == BLOCK_VARIABLE else Level.WRONG
            yield Finding(_VARIABLES, level, what, variable, mend)


def hub(environment: Mapping[str, str]) -> Iterator[Finding]:
    """Say what is set for the Hub and the network; no secret is repeated."""
    for variable in _OFFLINE:
        if environment.get(variable, "").upper() in _TRUE:
            what = f"{variable} keeps to the models that are here already"
            yield Finding(_VARIABLES, Level.NOTE, what, variable, f"unset {variable} to download")
    endpoint = environment.get("HF_ENDPOINT")
    if endpoint:
        what = f"models come from {_without_secrets(endpoint)} and not from the Hugging Face Hub"
        yield Finding(_VARIABLES, Level.NOTE, what, "HF_ENDPOINT", "unset HF_ENDPOINT, if that is not wanted")
    for variable in _FOLDERS:
        if environment.get(variable):
            yield Finding(_VARIABLES, Level.NOTE, f"{variable} is {environment[variable]}", variable)
    for variable in (name for upper in _PROXIES for name in (upper, upper.lower())):
        if environment.get(variable):
            what = f"the network is reached through {_without_secrets(environment[variable])}"
            yield Finding(_VARIABLES, Level.NOTE, what, variable, f"unset {variable}, if downloads fail")


def _without_secrets(url: str) -> str:
    """Return a URL without user and password."""
    try:
        parts = urlsplit(url if "//" in url else f"//{url}")
        return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="").geturl().removeprefix("//")
    except ValueError:
        return "what is no URL"
