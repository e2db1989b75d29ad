"""Checks of the fields of a model's configuration and of the manager's limits. Pure."""

from __future__ import annotations

import difflib
import math
import numbers
import operator
import os
import re
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from splitlearn_core.errors import ConfigurationError
from splitlearn_core.plan.split_points import MAX_LAYERS, names_of_parts, nearest_points, point_names
from splitlearn_core.plugins.registry import registry
from splitlearn_core.quoting import listed
from splitlearn_core.types import (
    AUTO_DTYPE,
    FLOAT_DTYPES,
    MEGABYTE,
    Component,
    dtype_name,
    is_component_name,
    kind_of,
    nearest_dtype,
)

#: Writes values on one line, shortened.
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 2, 100, 100

#: Settings that are a whole number from 1; those of the second line may be None, for no limit.
_COUNTS = frozenset({"max_workers", "call_workers", "calls_per_model", "max_failed"})
_COUNTS_OR_NONE = frozenset({"max_models", "load_threads", "call_threads"})

#: Settings that are a number from 0.
_AMOUNTS = frozenset({"headroom_mb", "call_queue", "stall_after", "cancel_grace", "close_timeout", "min_residency"})
_AMOUNTS_OR_NONE = frozenset({"max_memory_mb", "wait_timeout", "stall_timeout", "drain_timeout", "keep_alive"})

#: Upper bound of all settings: more MiB than any machine has, more seconds than any process runs.
_MOST = 2.0**43


def near(value: object, choices: Iterable[str]) -> str:
    """Return a suggestion that continues a sentence; empty if no choice is near."""
    close = difflib.get_close_matches(value.strip().lower(), choices, n=1) if isinstance(value, str) else []
    return f"; did you mean {close[0]!r}?" if close else ""


def show(value: object) -> str:
    """Return a value's repr on one line, shortened if the value is large or deep."""
    try:
        return _SHORT.repr(value)
    except ValueError:
        # Python refuses to write out integers of thousands of digits.
        return f"a huge {type(value).__name__}"


def limit_problems(settings: Mapping[str, Any]) -> list[str]:
    """Return the problems of the given settings, each with the values that are valid."""
    problems = []
    for name, value in settings.items():
        optional = name in _COUNTS_OR_NONE | _AMOUNTS_OR_NONE
        none = " (or none, for no limit)" if optional else ""
        if value is None and optional:
            continue
        if name in _COUNTS | _COUNTS_OR_NONE and (type(value) is not int or not 1 <= value < _MOST):
            problems.append(f"{name} is {show(value)}; a whole number from 1 is needed{none}")
        elif name in _AMOUNTS | _AMOUNTS_OR_NONE and not is_amount(value):
            problems.append(f"{name} is {show(value)}; a number from 0 to {_MOST:g} is needed{none}")
        elif name == "when_full" and value not in ("wait", "refuse"):
            problems.append(f"when_full is {show(value)}; it may be 'wait' or 'refuse'")
        elif name == "required" and isinstance(value, str):
            problems.append(f"required is the string {show(value)}; a list of model ids is needed")
    return problems


def is_amount(value: Any) -> bool:
    """Return whether a value is a number from 0 to the upper bound of settings."""
    # Compared rather than converted: an integer may be larger than any float.
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < _MOST


#: The two model types that no plugin provides: a whole model, and a file of PyTorch's own.
HUGGINGFACE, PYTORCH = "huggingface", "pytorch"

#: Where a model runs: in this process, or in its own.
INLINE, PROCESS = "inline", "process"
MAX_RESTARTS = 1000

#: 2**63 bytes; more is a typing error.
MAX_MEMORY_MB = 2**63 // MEGABYTE

#: Three centuries in seconds.
MAX_SECONDS = 10**10
MAX_THREADS = 4096
MAX_NAME = 128
#: Tables within tables in the options of a host.
MAX_DEPTH = 3
FIELDS_HINT = "each field is documented in splitlearn_core.ModelConfig"
NOT_FAMILIES = (HUGGINGFACE, PYTORCH)
SECRET_FIELDS = frozenset({"token"})


def check_fields(values: Mapping[Any, object], defaults: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Check fields one by one and together.

    Args:
        values: Field -> the given value.
        defaults: Every known field -> its default.

    Returns:
        The plain values of the valid fields, and the problems, each beginning with its field.
    """
    # The value of an unknown field is not shown: it may be a token under a misspelt name.
    problems = [unknown_name(name, defaults, "field") for name in values if name not in defaults]
    plain: dict[str, Any] = {}
    invalid: set[str] = set()
    for name, check in _CHECKS.items():
        if name not in values:
            continue
        value = values[name]
        try:
            plain[name] = None if value is None and defaults[name] is None else check(value)
        except _RefusedError as error:
            invalid.add(name)
            problems.append(f"{name}: {'what was given' if name in SECRET_FIELDS else show(value)} {error}")
    problems += [
        f"{name}: missing; {_MEANING[name]}"
        for name in ("model_id", "model_type")
        if name not in plain.keys() | invalid
    ]
    return plain, problems + list(_combination_problems(plain, invalid, defaults))


def complaint(what: str, problems: Sequence[str]) -> ConfigurationError:
    """Return the error that lists all problems."""
    count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
    return ConfigurationError(f"{what} has {count}:\n  " + "\n  ".join(problems), hint=FIELDS_HINT)


def unknown_name(name: object, known: Iterable[str], kind: str) -> str:
    """Return the problem that there is no such name, with the nearest one as a suggestion."""
    known = tuple(known)
    return f"{name if _is_plain(name) else show(name)}: unknown {kind}" + (
        near(name, known) or f"; there are {', '.join(known)}"
    )


def _is_plain(name: object) -> bool:
    return isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9_-]{1,60}", name) is not None


class _RefusedError(Exception):
    """A field refuses a value; the message continues a sentence that begins with the value."""


# One function for each kind of field, from the given value to the plain one.


def _text(value: object) -> str:
    if not isinstance(value, str):
        quotes = "; put it in quotes" if isinstance(value, int | float) else ""
        raise _RefusedError(f"is not a string{quotes}")
    if not value:
        raise _RefusedError("is empty; leave the field out, or give a value")
    if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
        raise _RefusedError("contains a character that no text file can hold; leave it out")
    # The plain class: PyYAML represents no subclass of it.
    return str.__str__(value)


def _path(value: object) -> str:
    return _text(os.fspath(value) if isinstance(value, os.PathLike) else value)


def _name(value: object) -> str:
    name = _text(value)
    if len(name) > MAX_NAME:
        raise _RefusedError(f"is {len(name)} characters long; {MAX_NAME} at most")
    if not name.isprintable():
        cleaned = "".join(filter(str.isprintable, name)).strip()
        raise _RefusedError(
            "contains characters that cannot be printed" + (f"; {cleaned!r} would do" if cleaned else "")
        )
    if name != name.strip():
        meant = f"; {name.strip()!r} would do" if name.strip() else ""
        raise _RefusedError(f"begins or ends with a space{meant}")
    return name


def _model_id(value: object) -> str:
    if isinstance(value, str) and ("/" in value or "\\" in value or value in {".", ".."}):
        segments = [part for part in re.split(r"[/\\]", value) if part.strip(". ") and part.isprintable()]
        last = segments[-1][:MAX_NAME].strip() if segments else "my-model"
        raise _RefusedError(f"is a path, not a name; {last!r} would do, and model_path takes paths")
    return _name(value)


def _model_type(value: object) -> str:
    name = _name(value)
    if name.lower() in NOT_FAMILIES and name not in NOT_FAMILIES:
        raise _RefusedError(f"is spelt {name.lower()!r}")
    return name


def _component(value: object) -> str:
    name = _text(value)
    if not is_component_name(name):
        raise _RefusedError(f"is none of {', '.join(_COMPONENTS)}{near(name, _COMPONENTS)}")
    return name


def _split_points(value: object) -> tuple[int, ...]:
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        raise _RefusedError("is not a sequence of layer numbers, such as (2, 10)")
    if not 0 < len(value) < MAX_LAYERS:
        raise _RefusedError(f"has {len(value)} numbers; one or more are needed to cut a model into components")
    try:
        points = tuple(_integer(point) for point in value)
    except TypeError:
        raise _RefusedError("contains values that are not integers; layer numbers such as (2, 10) are needed") from None
    if any(before >= after for before, after in pairwise((0, *points, MAX_LAYERS))):
        names = " < ".join(("0", *point_names(len(points)), str(MAX_LAYERS)))
        nearest = nearest_points(points, MAX_LAYERS)
        raise _RefusedError(f"does not satisfy {names}; the nearest valid value is {nearest}")
    return points


def _integer(value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError("a boolean is not a number")
    return operator.index(value)


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        quoted = "; write plain digits without quotes, such as 1500" if isinstance(value, str) else ""
        raise _RefusedError(f"is not a number{quoted}")
    try:
        return int(value) if isinstance(value, numbers.Integral) else float(value)
    except OverflowError:
        raise _RefusedError("is too large") from None


def _memory(value: object) -> float:
    number = _number(value)
    # Written so that nan is refused: every comparison with it is false.
    if not 0 < number <= MAX_MEMORY_MB:
        raise _RefusedError(f"is not above 0 and at most {MAX_MEMORY_MB}; leave it out for no limit")
    return number


def _threads(value: object) -> int:
    try:
        number = _integer(value)
    except TypeError:
        raise _RefusedError(f"is not an integer; 1 to {MAX_THREADS} is possible") from None
    if not 1 <= number <= MAX_THREADS:
        raise _RefusedError(f"is not between 1 and {MAX_THREADS}; leave it out for the manager's choice")
    return number


def _restarts(value: object) -> int:
    try:
        number = _integer(value)
    except TypeError:
        raise _RefusedError(f"is not an integer; 0 to {MAX_RESTARTS} is possible") from None
    if not 0 <= number <= MAX_RESTARTS:
        raise _RefusedError(f"is not between 0, for never, and {MAX_RESTARTS}")
    return number


def _host(value: object) -> str:
    name = _text(value)
    problem = registry().host_problem(name)
    if problem:
        raise _RefusedError(problem)
    return name


def _options(value: object) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise _RefusedError("is not a table of names and values")
    return {_option_name(name): _plain_option(item, MAX_DEPTH) for name, item in value.items()}


def _option_name(name: object) -> str:
    if not _is_plain(name):
        raise _RefusedError(f"has the name {show(name)}; letters, digits, - and _ are possible")
    return str(name)


def _plain_option(value: object, depth: int) -> Any:
    """Return a value as a file could hold it: the same object must not change later."""
    if isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, int | float) and -MAX_MEMORY_MB <= value <= MAX_MEMORY_MB:
        return value
    if depth and isinstance(value, Mapping) and all(isinstance(name, str) for name in value):
        return {_text(name): _plain_option(item, depth - 1) for name, item in value.items()}
    if depth and isinstance(value, list | tuple):
        return [_plain_option(item, depth - 1) for item in value]
    raise _RefusedError(
        f"contains {show(value)}; strings, numbers, booleans, and lists and tables of them are possible"
    )


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise _RefusedError("is neither true nor false")
    return value


_DURATION = re.compile(r"(?:[0-9]+(?:\.[0-9]+)?(?:ms|[dhms]))+")
_DURATION_PART = re.compile(r"([0-9]+(?:\.[0-9]+)?)(ms|[dhms])")
_SECONDS = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}
_KEEP_ALIVE = "give seconds, or a string such as '5m' or '1h30m'; 0 unloads at once, -1 never"


def _keep_alive(value: object) -> float:
    if isinstance(value, str):
        text = value.strip().lower()
        size = text.removeprefix("-")
        if text in {"inf", "forever"}:
            return math.inf
        if re.fullmatch(r"[0-9]+(\.[0-9]+)?", size):
            seconds = float(size)
        elif _DURATION.fullmatch(size):
            seconds = sum(float(count) * _SECONDS[unit] for count, unit in _DURATION_PART.findall(size))
        else:
            raise _RefusedError(f"is not a length of time; {_KEEP_ALIVE}")
        seconds = -seconds if text.startswith("-") else seconds
    else:
        seconds = _number(value)
    if seconds < 0 or value == math.inf:
        return math.inf
    if not seconds <= MAX_SECONDS:
        raise _RefusedError(f"is not at most {MAX_SECONDS} seconds; {_KEEP_ALIVE}")
    # The sum makes 0.0 of -0.0.
    return float(seconds) + 0.0


_DEVICE = re.compile(r"[a-z]{1,32}(?::(?:0|[1-9][0-9]{0,3}))?")


def _device(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        raise _RefusedError("is not a device; write 'cpu', or 'cuda:0' for the first GPU")
    name = _text(_of_torch(value, "device"))
    if not _DEVICE.fullmatch(name):
        guess = re.sub(r"(?<=[a-z])[\s:_-]*(?=[0-9]+$)", ":", name[:MAX_NAME].strip().lower())
        meant = f"; did you mean {guess!r}?" if _DEVICE.fullmatch(guess) else "; write cpu, cuda, cuda:0 or mps"
        raise _RefusedError(f"is not a device{meant}")
    return name


_DTYPES = (AUTO_DTYPE, *FLOAT_DTYPES)


def _dtype(value: object) -> str:
    name = dtype_name(_text(_of_torch(value, "dtype")))
    if name not in _DTYPES:
        raise _RefusedError(f"is none of {', '.join(_DTYPES)}; did you mean {nearest_dtype(name)!r}?")
    return name


def _of_torch(value: object, kind: str) -> object:
    """Return an object of torch as a string, recognised by its class's name, so that torch is not imported."""
    return str(value) if (type(value).__module__, type(value).__name__) == ("torch", kind) else value


def _architecture(value: object) -> str:
    name = _text(value)
    module, colon, attribute = name.partition(":")
    if not (_is_dotted(module) and _is_dotted(attribute)):
        module, _, attribute = name.rpartition(".")
        valid = not colon and _is_dotted(module) and _is_dotted(attribute)
        meant = f"; did you mean '{module}:{attribute}'?" if valid else ""
        raise _RefusedError(f"does not name a class as 'package.module:Class' does{meant}")
    return name


def _is_dotted(name: str) -> bool:
    return all(part.isidentifier() for part in name.split("."))


def _token(value: object) -> str | bool:
    if isinstance(value, bool):
        return value
    if not isinstance(value, str) or not value:
        raise _RefusedError("is neither a string nor true; leave it out to use the token of the environment")
    if not (value.isascii() and value.isprintable()) or value != value.strip():
        raise _RefusedError("has spaces at its ends, a line break or another character that no token has")
    return str.__str__(value)


_COMPONENTS = tuple(str(component) for component in Component)
_CHECKS: Mapping[str, Callable[[object], Any]] = {
    "model_id": _model_id,
    "model_type": _model_type,
    "model_path": _path,
    "component": _component,
    "split_points": _split_points,
    "device": _device,
    "dtype": _dtype,
    "max_memory_mb": _memory,
    "warmup": _flag,
    "keep_alive": _keep_alive,
    "pinned": _flag,
    "required": _flag,
    "allow_paging": _flag,
    "strategy": _text,
    "strict": _flag,
    "attn_implementation": _text,
    "revision": _text,
    "cache_dir": _path,
    "token": _token,
    "local_files_only": _flag,
    "architecture": _architecture,
    "allow_pickle": _flag,
    "load_threads": _threads,
    "host": _host,
    "host_options": _options,
    "restart_limit": _restarts,
}

#: Shown if the field is missing.
_MEANING = {
    "model_id": "give the model a name",
    "model_type": f"name an installed family, {HUGGINGFACE!r} or {PYTORCH!r}",
    "component": f"a family's model is loaded in components, so one of {', '.join(_COMPONENTS)} is needed",
    "split_points": "a family's model is cut into components, so layer numbers such as (2, 10) are needed",
    "architecture": "name the class that takes the weights, 'package.module:Class' "
    "(allow_pickle=True needs none, and runs code)",
}
_MODEL_PATH = {HUGGINGFACE: "give a directory or a Hub id", PYTORCH: "give the path of the .pt or .pth file"}

#: Fields that would have no effect: ignoring them silently would be misleading.
_REFUSED = {
    HUGGINGFACE: ("component", "split_points", "strategy", "strict", "architecture", "allow_pickle"),
    PYTORCH: ("component", "split_points", "strategy", "strict", "attn_implementation", "revision"),
}
_REFUSED_FOR_FAMILY = ("architecture", "allow_pickle")
_NEEDED = {HUGGINGFACE: ("model_path",), PYTORCH: ("model_path", "architecture")}
_NEEDED_FOR_FAMILY = ("component", "split_points")


def _combination_problems(plain: Mapping[str, Any], invalid: set[str], defaults: Mapping[str, Any]) -> Iterator[str]:
    """Yield the fields that the model type needs or refuses; an invalid field is not reported as missing."""
    kind = plain.get("model_type")
    if kind is None:
        return
    for name in _NEEDED.get(kind, _NEEDED_FOR_FAMILY):
        optional = name == "architecture" and (plain.get("allow_pickle") or "allow_pickle" in invalid)
        if plain.get(name) is None and name not in invalid and not optional:
            meaning = _MODEL_PATH[kind] if name == "model_path" else _MEANING[name]
            guess = near(kind, NOT_FAMILIES) if kind not in NOT_FAMILIES else ""
            yield f"{name}: missing; {meaning}{guess and guess + f' ({kind!r} is taken for a family)'}"
    component, points = plain.get("component"), plain.get("split_points")
    if kind not in NOT_FAMILIES and component and points and not invalid & {"component", "split_points"}:
        names = names_of_parts(points)
        if component not in names:
            yield f"component: {show(component)} is none of {listed(names)}, the components that {points} make"
    if "host" not in invalid:
        yield from _host_problems(plain, defaults)
    for name in _REFUSED.get(kind, _REFUSED_FOR_FAMILY):
        if plain.get(name, defaults[name]) != defaults[name]:
            yield f"{name}: {show(plain[name])} is not for model type {kind!r}, {_WHY[name]}; leave it out"
        elif name in invalid:
            yield f"{name}: not for model type {kind!r}, {_WHY[name]}; leave it out"


def _host_problems(plain: Mapping[str, Any], defaults: Mapping[str, Any]) -> Iterator[str]:
    """Yield the settings that a model on another host cannot have."""
    kind, component, host = plain["model_type"], plain.get("component"), plain.get("host", INLINE)
    limit = plain.get("restart_limit", defaults["restart_limit"])
    if host in (INLINE, PROCESS) and plain.get("host_options") is not None:
        yield f"host_options: host {host!r} has none; leave it out, or name a plugin's host"
    if host == INLINE:
        if limit != defaults["restart_limit"]:
            yield f"restart_limit: {limit} is for models with a process of their own; add host={PROCESS!r}"
    elif kind in NOT_FAMILIES:
        yield (
            f"host: {host!r} is for trunks of families, and model type {kind!r} is loaded whole; leave it out, or name "
            "a family, split_points and component='trunk'"
        )
    elif component is not None and kind_of(component) is not Component.TRUNK:
        yield (
            f"host: {host!r} is for trunks, and a {component} holds what the data owner keeps: token ids enter it or "
            "logits leave it; leave it out for this component"
        )


_OF_FAMILIES = "only for models of families"
_WHY = {
    "component": f"{_OF_FAMILIES}; this one is loaded whole",
    "split_points": f"{_OF_FAMILIES}; this one is loaded whole",
    "strategy": _OF_FAMILIES,
    "strict": _OF_FAMILIES,
    "attn_implementation": "only for models of transformers",
    "revision": "only for models of the Hub",
    "architecture": f"only for {PYTORCH!r}",
    "allow_pickle": f"only for {PYTORCH!r}",
}
