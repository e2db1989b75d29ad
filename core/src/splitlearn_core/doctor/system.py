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

from splitlearn_core.doctor.report import Finding, Level, note, ok, wrong
from splitlearn_core.errors import BrokenPluginError, PluginError
from splitlearn_core.plugins.host import BLOCK_VARIABLE
from splitlearn_core.plugins.registry import ALLOW_VARIABLE, registry
from splitlearn_core.system_memory import MemoryReading, read_memory
from splitlearn_core.types import FLOAT_DTYPES, human_bytes

#: Less than this is a note: free bytes of disk and of memory, and open files.
_MIN_DISK, _MIN_MEMORY, _MIN_OPEN_FILES = 5 * 2**30, 2**30, 256


def check_cache() -> list[Finding]:
    """Examine the folder in which ``huggingface_hub`` caches models."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return [cache_folder(Path(HF_HUB_CACHE).expanduser())]


def cache_folder(path: Path) -> Finding:
    """Check that files can be written to a cache, and that there is space for them; nothing is left behind."""
    alternative = "set HF_HOME to a folder of your own"
    nearest = path
    try:
        # This raises as well, below a folder without permission to search.
        while not nearest.exists():
            nearest = nearest.parent
        if not nearest.is_dir():
            return wrong(f"the cache of models cannot exist: {nearest} is a file", str(path), alternative)
        with tempfile.TemporaryFile(dir=nearest):
            pass
        free = shutil.disk_usage(nearest).free
    except OSError as error:
        what = f"the cache of models cannot be written: {error.strerror or error}"
        return wrong(what, str(path), f"{alternative}, or: chmod u+rwx {nearest}")
    state = "is writable" if nearest == path else "does not exist yet, and can be made"
    what = f"the cache of models {state}; {human_bytes(free)} of its disk are free"
    if free < _MIN_DISK:
        return note(what, str(path), f"hf cache ls shows what it contains; or {alternative}")
    return ok(what, str(path))


#: The file that exists on Linux if an NVIDIA driver is loaded.
_DRIVER = Path("/proc/driver/nvidia/version")


def check_devices() -> Iterator[Finding]:
    """Import torch and multiply small matrices in every dtype on every device."""
    import torch

    yield _device("cpu", f"CPU, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads")
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(number)
            label = f"{torch.cuda.get_device_name(number)}, {human_bytes(free)} of {human_bytes(total)} free"
            yield _device(f"cuda:{number}", label)
    else:
        yield missing_gpu(torch.version.cuda, driver=_DRIVER.exists(), visible=os.environ.get("CUDA_VISIBLE_DEVICES"))
    if torch.backends.mps.is_available():
        yield _device("mps", "the GPU of this Mac")


def missing_gpu(built_for: str | None, *, driver: bool, visible: str | None) -> Finding:
    """Report why no GPU can be used.

    Args:
        built_for: The version of CUDA that torch was built for, or None.
        driver: Whether a driver is loaded.
        visible: ``CUDA_VISIBLE_DEVICES``, or None if it is not set.
    """
    if not driver:
        return ok("no NVIDIA GPU: everything runs on the CPU")
    if built_for is None:
        what = "there is a GPU, but this torch is built only for the CPU"
        return note(what, fix="install a build of torch for CUDA: torch.version.cuda names it")
    if visible is not None:
        what = f"CUDA_VISIBLE_DEVICES={visible!r} hides every GPU"
        return note(what, "CUDA_VISIBLE_DEVICES", "unset CUDA_VISIBLE_DEVICES")
    what = f"there is a driver, but torch, built for CUDA {built_for}, cannot use it"
    return note(what, fix="nvidia-smi shows what the driver supports")


def _device(device: str, label: str) -> Finding:
    """Multiply matrices on a device, in each dtype that a model can be loaded in."""
    import torch

    problems: dict[str, str] = {}
    for name in FLOAT_DTYPES:
        try:
            ones: Any = torch.ones(4, 4, dtype=getattr(torch, name), device=device)
            if not bool(((ones @ ones) == len(ones)).all()):
                problems[name] = "computes wrongly"
        except (RuntimeError, TypeError) as error:
            problems[name] = str(error).partition("\n")[0]
    what = f"{label}: {', '.join(name for name in FLOAT_DTYPES if name not in problems) or 'no dtype'}"
    if not problems:
        return ok(what, device)
    what += f"; not {', '.join(f'{name} ({why})' for name, why in problems.items())}"
    # Some GPUs have no float64, which models rarely need.
    level = Level.WRONG if {"float32", "bfloat16"} & problems.keys() else Level.NOTE
    return Finding("", level, what, device, f"choose another device than {device}, or a dtype that works")


def check_architectures() -> Iterator[Finding]:
    """Import the classes of transformers that the usable families name."""
    from splitlearn_core.build.configuration import architecture_class

    names: list[str] = []
    for model_type in registry().model_types():
        try:
            names.append(architecture_class(registry().family(model_type)).__name__)
        except BrokenPluginError as error:
            yield wrong(error.message, fix=error.hint)
        except PluginError:
            continue  # the plugin has a finding already
    if names:
        yield ok(f"builds {', '.join(names)}")


def check_machine() -> Iterator[Finding]:
    """Report memory, processors and limits."""
    yield memory(read_memory())
    processors = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if sys.platform == "linux" else processors
    yield ok(f"{usable} of {processors} processors can be used")
    if sys.platform != "win32":
        import resource

        yield open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        space, _ = resource.getrlimit(resource.RLIMIT_AS)
        if space != resource.RLIM_INFINITY:
            # Mapped files count in full, whether they are read or not.
            what = f"the address space is limited to {human_bytes(space)}, and mapped weights count in full"
            yield note(what, fix="ulimit -v unlimited, or --strategy copied")


def memory(reading: MemoryReading) -> Finding:
    """Judge the free memory, which a control group may limit."""
    is_limited = reading.limited_by != "machine"
    what = f"{human_bytes(reading.free)} of {human_bytes(reading.total)} memory are free"
    what += ", limited by a control group" if is_limited else ""
    where = reading.limited_by if is_limited else ""
    if reading.free < _MIN_MEMORY:
        fix = "end other processes" + (", or raise the limit of the control group" if is_limited else "")
        return note(what, where, f"{fix}; mapped weights need little memory of their own")
    return ok(what, where)


def open_files(limit: int) -> Finding:
    """Judge the limit of open files; a checkpoint may have hundreds of shards."""
    if 0 <= limit < _MIN_OPEN_FILES:
        what = f"at most {limit} files can be open, and a checkpoint of many shards needs more"
        return note(what, fix="ulimit -n 4096")
    return ok(f"{limit if limit >= 0 else 'any number of'} files can be open")


#: The values that the Hub's client takes as true.
_TRUE = {"1", "ON", "YES", "TRUE"}
_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
_FOLDERS = ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE")
_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")


def check_variables() -> list[Finding]:
    """Find variables that change which plugins and which models are found."""
    findings = [*plugin_lists(os.environ, registry().unknown_names()), *hub_variables(os.environ)]
    return findings or [ok("none is set that hides plugins or models")]


def plugin_lists(environment: Mapping[str, str], unknown: Mapping[str, tuple[str, ...]]) -> Iterator[Finding]:
    """Report which lists of plugins are set, and which of their names no installed plugin has."""
    for variable in (ALLOW_VARIABLE, BLOCK_VARIABLE):
        names = environment.get(variable, "").strip(" ,")
        if names or (variable == ALLOW_VARIABLE and variable in environment):
            does = "blocks" if variable == BLOCK_VARIABLE else "allows only" if names else "allows no plugin at all"
            yield note(f"{variable} {does} {names}".rstrip(), variable, f"unset {variable} to use other plugins")
        if variable in unknown:
            what = f"{variable} names {', '.join(unknown[variable])}: no such plugin is installed"
            fix = "correct or remove the name: splitlearn plugins lists them, by model type and by package"
            # To block a plugin that is missing has no effect; to allow one means that it is wanted.
            level = Level.NOTE if variable == BLOCK_VARIABLE else Level.WRONG
            yield Finding("", level, what, variable, fix)


def hub_variables(environment: Mapping[str, str]) -> Iterator[Finding]:
    """Report what is set for the Hub and the network, without secrets."""
    for variable in _OFFLINE:
        if environment.get(variable, "").upper() in _TRUE:
            what = f"{variable} restricts models to those on this machine"
            yield note(what, variable, f"unset {variable} to download")
    if endpoint := environment.get("HF_ENDPOINT"):
        what = f"models come from {_without_secrets(endpoint)} and not from the Hugging Face Hub"
        yield note(what, "HF_ENDPOINT", "unset HF_ENDPOINT to use the Hub")
    for variable in _FOLDERS:
        if environment.get(variable):
            yield note(f"{variable} is {environment[variable]}", variable)
    for variable in (name for upper in _PROXIES for name in (upper, upper.lower())):
        if environment.get(variable):
            what = f"the network is reached through {_without_secrets(environment[variable])}"
            yield note(what, variable, f"unset {variable}, if downloads fail")


def _without_secrets(url: str) -> str:
    """Return a URL without user and password."""
    try:
        parts = urlsplit(url if "//" in url else f"//{url}")
        return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="").geturl().removeprefix("//")
    except ValueError:
        return "an invalid URL"
