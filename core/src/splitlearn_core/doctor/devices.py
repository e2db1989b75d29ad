"""What torch can compute with here, and whether transformers has what the families name."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from splitlearn_core.doctor.findings import Finding, Level
from splitlearn_core.errors import BrokenPluginError, PluginError
from splitlearn_core.plugins.registry import registry
from splitlearn_core.types import FLOAT_DTYPES
from splitlearn_core.units import human_bytes

_NAME = "devices"
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
        yield Finding(_NAME, Level.OK, "no GPU of NVIDIA's: everything runs on the CPU")
    elif built_for is None:
        what = "there is a GPU, and this torch is built for the CPU alone"
        yield Finding(_NAME, Level.NOTE, what, mend="install a build of torch for CUDA: torch.version.cuda names it")
    elif visible is not None:
        what = f"CUDA_VISIBLE_DEVICES={visible!r} hides every GPU"
        yield Finding(_NAME, Level.NOTE, what, "CUDA_VISIBLE_DEVICES", "unset CUDA_VISIBLE_DEVICES")
    else:
        what = f"there is a driver, and torch, built for CUDA {built_for}, cannot use it"
        yield Finding(_NAME, Level.NOTE, what, mend="nvidia-smi shows what the driver supports")


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
        _NAME, level, what, device, f"choose another device than {device}, or a dtype that works" if failed else ""
    )


def check_architectures() -> list[Finding]:
    """Import, of transformers, the classes that the usable families name."""
    from splitlearn_core.build.component import architecture_class

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
