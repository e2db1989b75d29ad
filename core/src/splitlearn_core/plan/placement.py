"""The device and the dtype of each component: the caller's arguments, checked, or chosen automatically."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from splitlearn_core.errors import ConfigurationError, InsufficientMemoryError
from splitlearn_core.plan.splitplan import ComponentPlan, loaded_nbytes
from splitlearn_core.quoting import listed, quote
from splitlearn_core.types import FLOAT_DTYPES, THREE, dtype_name, human_bytes, nearest_dtype

#: As much on the GPUs as fits, the rest on the CPU.
AUTO = "auto"
#: Values of accelerate that place single modules.
_ACCELERATE_MAPS = ("balanced", "balanced_low_0", "sequential")

#: Powers of 1024 and of 1000, as accelerate spells them; a small b at the end of the latter counts bits.
_UNITS = {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]i?B)", re.IGNORECASE)
_BITS = 8
#: Characters of a size: more digits may be too many for a number.
_MAX_SIZE = 32
#: Up to so many components, every choice of some of them is tried.
_FEW = 6


def parse_dtypes(dtype: Any, requested: Iterable[str], there: Sequence[str] = THREE) -> dict[str, str]:
    """Return torch's name of the requested dtype of each component, or ``auto``.

    Args:
        dtype: One for all, or a mapping from component to dtype; those left out are ``auto``.
        requested: The components.
        there: The names of all components.

    Raises:
        ConfigurationError: Names of no component, or of no floating dtype; all are listed.
    """
    given = dtype if isinstance(dtype, Mapping) else dict.fromkeys(requested, dtype)
    names = {part: dtype_name(name) for part, name in given.items()}
    problems = _not_components("dtype", given, there)
    problems += [
        f"dtype {name!r}{f' of {part}' if isinstance(dtype, Mapping) else ''} is none of {', '.join(FLOAT_DTYPES)}"
        for part, name in names.items()
        if name not in (AUTO, *FLOAT_DTYPES)
    ]
    if problems:
        wrong = next((name for name in names.values() if name not in (AUTO, *FLOAT_DTYPES)), "")
        meant = f"the nearest is {nearest_dtype(wrong)!r}; or " if wrong else ""
        raise ConfigurationError(
            "; ".join(dict.fromkeys(problems)), hint=f'{meant}leave dtype="auto" for the one that the checkpoint states'
        )
    return {component: names.get(component, AUTO) for component in requested}


def parse_device_map(
    device_map: Any, requested: Iterable[str], there: Sequence[str] = THREE
) -> dict[str, str] | str | None:
    """Return the device of each requested component: ``auto`` to choose it, None if nothing is requested.

    Args:
        device_map: A mapping from component to device, ``auto``, or None.
        requested: The components.
        there: The names of all components.

    Raises:
        ConfigurationError: It is none of these, names an unknown component, or omits one.
    """
    if device_map is None or device_map == AUTO:
        return device_map  # type: ignore[no-any-return]  # one of the two
    if not isinstance(device_map, Mapping):
        names_one = device_map not in _ACCELERATE_MAPS and not isinstance(device_map, list | tuple)
        one = f"for all components on one device give device={quote(_device_name(device_map))}; " if names_one else ""
        raise ConfigurationError(
            f"device_map is {quote(device_map)}, and says where each component goes",
            hint=f'{one}device_map is "auto", or {{"bottom": "cpu", "trunk": "cuda:0", "top": "cpu"}}',
        )
    problems = _not_components("device_map", device_map, there)
    problems += [f"device_map leaves out {component}" for component in requested if component not in device_map]
    if problems:
        raise ConfigurationError("; ".join(problems), hint=f"its keys are {listed(there)}")
    # An integer is a CUDA device's number, as in max_memory.
    return {component: _device_name(device_map[component]) for component in requested}


def parse_max_memory(max_memory: Mapping[int | str, int | str] | None) -> dict[str, int]:
    """Return the bytes that may be used of each device, in the order in which they are filled.

    Args:
        max_memory: As in accelerate: ``{0: "10GiB", "cpu": "30GiB"}``. A device that is not named is not
            used. None for no limits.

    Raises:
        ConfigurationError: Invalid sizes or devices; all are listed.
    """
    budgets: dict[str, int] = {}
    problems = []
    if max_memory is not None and not isinstance(max_memory, Mapping):
        raise ConfigurationError(
            f"max_memory is {max_memory!r}, no mapping from devices to sizes",
            hint='give {0: "10GiB", "cpu": "30GiB"}: numbers of bytes, or texts',
        )
    for device, size in (max_memory or {}).items():
        if device == "disk":
            problems.append("'disk' holds no component: on the CPU, mapped weights are pages of their file already")
        elif isinstance(device, bool) or not isinstance(device, int | str):
            problems.append(f"{device!r} is not a device")
        else:
            budgets[_device_name(device)] = count = parse_size(size)
            problems += [f"{size!r} for {device!r} is not a size"] if count < 0 else []
    if problems:
        raise ConfigurationError(
            f"max_memory: {'; '.join(problems)}", hint='give {0: "10GiB", "cpu": "30GiB"}: numbers of bytes, or texts'
        )
    return dict(sorted(budgets.items(), key=lambda item: item[0] == "cpu"))


def place(parts: Sequence[ComponentPlan], budgets: Mapping[str, int | None]) -> dict[str, str]:
    """Place components on devices: as many as fit on the first, then on the next, in the order of the model.

    Args:
        parts: The components to place.
        budgets: Device -> bytes that may be used of it; None for no limit. In the order of preference.

    Raises:
        InsufficientMemoryError: There is no such placement; names the needed bytes, and what would fit.
    """
    devices = _first_fit(parts, budgets)
    if devices is None:
        raise _does_not_fit(parts, budgets, "on the devices there are")
    return devices


def check_fit(parts: Sequence[ComponentPlan], devices: Mapping[str, str], budgets: Mapping[str, int]) -> None:
    """Refuse a placement of the caller that exceeds the limits of the caller.

    Raises:
        InsufficientMemoryError: Names the needed bytes, and what would fit.
    """
    # "cuda" alone is the first of them, unless another was chosen.
    limits = {**budgets, "cuda": budgets["cuda:0"]} if "cuda:0" in budgets else budgets
    if any(need > limits.get(device, need) for device, need in bytes_on(parts, devices).items()):
        chosen = ", ".join(f"{part.component} on {devices[part.component]}" for part in parts)
        raise _does_not_fit(parts, budgets, f"with {chosen}")


def bytes_on(parts: Iterable[ComponentPlan], devices: Mapping[str, str]) -> dict[str, int]:
    """Return the bytes that the components take on each device; a tied tensor counts once on each device."""
    by_device: dict[str, dict[tuple[str, str], int]] = {}
    for part in parts:
        by_device.setdefault(devices[part.component], {}).update(_tensors(part))
    return {device: sum(tensors.values()) for device, tensors in by_device.items()}


def _tensors(part: ComponentPlan) -> dict[tuple[str, str], int]:
    return {(tensor.info.key, part.dtype): loaded_nbytes(tensor, part.dtype) for tensor in part.tensors}


def _first_fit(parts: Sequence[ComponentPlan], budgets: Mapping[str, int | None]) -> dict[str, str] | None:
    """Place components on devices in order; None if they do not fit."""
    devices = _fill(parts, budgets)
    return devices if len(devices) == len(parts) else None


def _fill(parts: Sequence[ComponentPlan], budgets: Mapping[str, int | None]) -> dict[str, str]:
    """Place as many of the first components as fit.

    Hidden states never go back to an earlier device, so each gets consecutive components. If each device takes as
    many as it can, no other placement fits more.
    """
    devices: dict[str, str] = {}
    rest = list(parts)
    for device, limit in budgets.items():
        placed: dict[tuple[str, str], int] = {}
        while rest:
            placed.update(_tensors(rest[0]))
            if limit is not None and sum(placed.values()) > limit:
                break
            devices[rest.pop(0).component] = device
    return devices


def _does_not_fit(
    parts: Sequence[ComponentPlan], budgets: Mapping[str, int | None], how: str
) -> InsufficientMemoryError:
    needs = ", ".join(f"{part.component} {human_bytes(part.loaded_bytes(part.dtype))}" for part in parts)
    limits = ", ".join(
        f"{device} {'any amount' if limit is None else human_bytes(limit)}" for device, limit in budgets.items()
    )
    fitting = _what_fits(parts, budgets)
    return InsufficientMemoryError(
        f"the components do not fit {how}: {needs} are needed; {limits or 'nothing'} may be used",
        hint=f"{f'{fitting} would fit; or ' if fitting else ''}raise max_memory, or choose a smaller dtype",
    )


def _what_fits(parts: Sequence[ComponentPlan], budgets: Mapping[str, int | None]) -> str:
    """Return the arguments with which most components can be placed; empty if none can."""
    if len(parts) > _FEW:
        # There are too many choices: only consecutive components are tried.
        longest = max((_fill(parts[first:], budgets) for first in range(len(parts))), key=len)
        return f"parts={tuple(map(str, longest))}" if longest else ""
    for count in range(len(parts), 0, -1):
        for some in itertools.combinations(parts, count):
            devices = _first_fit(some, budgets)
            if devices is not None and count == len(parts):
                return f"device_map={ {str(part): device for part, device in devices.items()} }"
            if devices is not None:
                return f"parts={tuple(map(str, devices))}"
    return ""


def _not_components(what: str, given: Mapping[Any, Any], there: Sequence[str]) -> list[str]:
    wrong = [repr(str(name)) for name in given if name not in there]
    return [f"{what} names {', '.join(wrong)}, and there are only {listed(there)}"] if wrong else []


def _device_name(device: Any) -> str:
    return f"cuda:{device}" if isinstance(device, int) else str(device)


def parse_size(size: Any) -> int:
    """Return a number of bytes, or -1 if it is not a size."""
    if isinstance(size, int) and not isinstance(size, bool):
        return size
    text = size.strip() if isinstance(size, str) else ""
    if len(text) > _MAX_SIZE:
        return -1
    if text.isdecimal():
        return int(text)
    match = _SIZE.fullmatch(text)
    if match is None:
        return -1
    count = int(float(match[1]) * _UNITS[match[2].upper()])
    return count // _BITS if match[2].endswith("b") and len(match[2]) == len("KB") else count
