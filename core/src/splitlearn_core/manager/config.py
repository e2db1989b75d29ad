"""The configuration of one model, and the files that hold configurations: YAML, TOML or JSON.

A configuration is valid once it exists: all that can be checked without the model's files, a plugin or a device is
checked when it is made, and all problems are reported at once.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from splitlearn_core.arguments import user_path
from splitlearn_core.errors import ConfigurationError, MissingFileError, UnknownModelTypeError
from splitlearn_core.manager.config_checks import (
    FIELDS_HINT,
    NOT_FAMILIES,
    SECRET_FIELDS,
    check_fields,
    complaint,
    near,
    show,
    unknown_name,
)
from splitlearn_core.plugins.registry import registry
from splitlearn_core.quoting import reason


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """What to load, where to, and how long to keep it.

    The constructor checks every field and their combination. Whether the family is installed,
    the files exist and the device is available is checked when the model is loaded.

    Lists are accepted as tuples, ``pathlib`` paths and ``torch.dtype`` or ``torch.device`` objects
    as strings; the fields hold the plain values.

    Raises:
        ConfigurationError: Fields are invalid; all of them are listed, each with its value and
            with a valid one.
    """

    #: The model's name in the manager: at most 128 printable characters, no path.
    model_id: str
    #: The model type of an installed family, or ``"huggingface"`` (a whole model through
    #: ``AutoModelForCausalLM``), or ``"pytorch"`` (a ``.pt`` or ``.pth`` file).
    model_type: str
    #: A directory or a Hub id; for ``"pytorch"`` the file. None for the family's default model.
    model_path: str | None = None
    #: ``bottom``, ``trunk`` or ``top``, or ``trunk1``, ``trunk2``, ... of several trunks: required for a family,
    #: refused otherwise.
    component: str | None = None
    #: ``(a, b)`` with ``0 < a < b``, or any number of cuts: required for a family, refused otherwise.
    split_points: tuple[int, ...] | None = None
    #: ``cpu``, ``cuda``, ``cuda:1``, ``mps``, ...
    device: str = "cpu"
    #: ``auto`` (as stored), ``float32``, ``float16``, ``bfloat16`` or ``float64``.
    dtype: str = "auto"
    #: Refuse the load if its plan needs more, in units of 2**20 bytes; None for no limit of its own.
    max_memory_mb: float | None = None
    #: Run forward passes before the model is ready.
    warmup: bool = False
    #: Seconds of idleness after which the model is unloaded: a number, or a string such as ``"30s"``,
    #: ``"5m"`` or ``"1h30m"`` (units d, h, m, s, ms). 0: as soon as it is idle. Any negative number,
    #: ``"inf"`` or ``"forever"``: never; the field is then ``math.inf``. None: the manager's setting.
    keep_alive: float | None = None
    #: Never evicted, never expired.
    pinned: bool = False
    #: The manager is ready only while this model is.
    required: bool = False
    #: Load even where mapped weights exceed what memory can hold.
    allow_paging: bool = False
    #: How a component's weights are read; a plugin may add strategies.
    strategy: str = "auto"
    #: Refuse a component's checkpoint with tensors that the model does not have; otherwise they are a warning.
    strict: bool = False
    #: ``eager``, ``sdpa``, ...; None for the choice of transformers.
    attn_implementation: str | None = None
    #: Branch, tag or commit on the Hub.
    revision: str | None = None
    #: The directory of the Hub cache.
    cache_dir: str | None = None
    #: For the Hub; True for the one saved by ``hf auth login``. Never shown, never written.
    token: str | bool | None = field(default=None, repr=False)
    #: Do not contact the Hub.
    local_files_only: bool = False
    #: ``"package.module:Class"`` of the module that takes the weights: required for ``"pytorch"``
    #: unless ``allow_pickle``, refused otherwise.
    architecture: str | None = None
    #: ``"pytorch"`` only: let the file run code. Only for files that you wrote yourself.
    allow_pickle: bool = False
    #: Threads of torch for this load; None for the manager's setting.
    load_threads: int | None = None
    #: ``inline``: in this process. ``process``, for a trunk: in its own process, which can be killed at any time,
    #: and whose end affects no other model.
    host: str = "inline"
    #: The options of a plugin's host, as its package documents them: names and plain values.
    host_options: Mapping[str, Any] | None = field(default=None, hash=False)
    #: How often in a row a model whose process has died is started again, if it is pinned, required or in use.
    restart_limit: int = 3

    def __post_init__(self) -> None:
        """Report all invalid fields at once; store the plain values."""
        values, problems = examine({name: getattr(self, name) for name in FIELDS})
        if problems:
            raise complaint(f"the configuration of model {show(self.model_id)}", problems)
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @property
    def is_family(self) -> bool:
        """Whether a plugin loads it, as one component of a model."""
        return self.model_type not in NOT_FAMILIES

    @property
    def fingerprint(self) -> tuple[object, ...]:
        """Everything that decides what is loaded: equal for two configurations that can share one load.

        How long to keep it, whether to pin or require it, and the token are left out.
        """
        values = {name: getattr(self, name) for name in FIELDS if name not in _NOT_IN_FINGERPRINT}
        # As text it can be hashed; the order of its names has no meaning.
        values["host_options"] = json.dumps(self.host_options, sort_keys=True)
        return tuple(values.values())

    def check_installed(self) -> None:
        """Refuse a model type that no usable plugin can provide. Imports no plugin.

        Whether a plugin for any type provides this one is found out by the load, because it may take seconds.

        Raises:
            UnknownModelTypeError: No plugin offers the type, or an environment variable blocks it.
        """
        plugins = registry()
        if not self.is_family or plugins.may_provide(self.model_type):
            return
        try:
            # No plugin owns the type, so this raises without importing one.
            plugins.family(self.model_type)
        except UnknownModelTypeError as error:
            close = near(self.model_type, NOT_FAMILIES)
            if not close:
                raise
            raise UnknownModelTypeError(error.message, hint=f"{close.removeprefix('; ')} {error.hint}") from None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """Make one from a mapping, as a file holds it.

        Raises:
            ConfigurationError: As the class does; unknown and missing fields are listed too.
        """
        if not isinstance(values, Mapping):
            raise ConfigurationError(f"{show(values)} is not a mapping of a model's fields", hint=FIELDS_HINT)
        plain, problems = examine(values)
        if problems:
            raise complaint(f"the configuration of model {show(values.get('model_id'))}", problems)
        return cls(**plain)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that are not at their defaults, as plain values for JSON.

        The token is never among them. Infinity is written as -1, because JSON has none.
        """
        plain: dict[str, Any] = {}
        for name, default in FIELDS.items():
            value = getattr(self, name)
            if name not in SECRET_FIELDS and value != default:
                plain[name] = -1 if value == math.inf else list(value) if isinstance(value, tuple) else value
        return plain

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> ModelConfig:
        """Read one model from a ``.yaml``, ``.yml``, ``.toml`` or ``.json`` file.

        The file holds the model's fields, or ``models`` with one entry.

        Raises:
            MissingFileError: There is no such file.
            ConfigurationError: It is not valid in its format, or its fields are invalid.
        """
        return read_model(path)

    def to_yaml(self) -> str:
        """Return :meth:`to_dict` as YAML."""
        return dump_yaml(self.to_dict())

    def to_toml(self) -> str:
        """Return :meth:`to_dict` as TOML."""
        return dump_toml(self.to_dict())


#: Field -> its default; ``dataclasses.MISSING`` for the two that have none.
FIELDS: Mapping[str, Any] = {spec.name: spec.default for spec in dataclasses.fields(ModelConfig)}


def examine(values: Mapping[Any, object]) -> tuple[dict[str, Any], list[str]]:
    """Check the fields of a model, one by one and together; see :func:`check_fields`."""
    return check_fields(values, FIELDS)


#: Fields that do not change what is loaded.
_NOT_IN_FINGERPRINT = frozenset({"keep_alive", "pinned", "required", "restart_limit", "token"})

_TOP_LEVEL = ("manager", "http", "sessions", "models")

#: Returns the problems of a table of settings.
Check = Callable[[Mapping[str, Any]], list[str]]


def _unchecked(settings: Mapping[str, Any]) -> list[str]:
    return []


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """The contents of a configuration file."""

    models: tuple[ModelConfig, ...]
    #: The table ``manager``, unchecked; empty if the file has none.
    manager: Mapping[str, Any]
    #: The same for the tables ``http`` and ``sessions``.
    http: Mapping[str, Any] = field(default_factory=dict)
    sessions: Mapping[str, Any] = field(default_factory=dict)


def read_config_file(
    path: str | os.PathLike[str],
    check_manager: Check = _unchecked,
    check_http: Check = _unchecked,
    check_sessions: Check = _unchecked,
) -> ConfigFile:
    """Read all models of a file, and its settings of the manager.

    Args:
        path: A file in YAML, TOML or JSON, by its suffix.
        check_manager: Returns the problems of the table ``manager``, so that they are reported together
            with those of the models.
        check_http, check_sessions: The same for the tables ``http`` and ``sessions``.

    Raises:
        MissingFileError: There is no such file.
        ConfigurationError: It is not valid in its format (with line and column), or some of
            its values are invalid: all problems of all models are listed, as
            ``models[2].component: ...``.
    """
    checks = {"manager": check_manager, "http": check_http, "sessions": check_sessions}
    return _interpret(path, read_table(user_path(path)), checks)


def _interpret(
    path: str | os.PathLike[str],
    table: Mapping[str, Any],
    checks: Mapping[str, Check] = MappingProxyType(dict.fromkeys(("manager", "http", "sessions"), _unchecked)),
) -> ConfigFile:
    problems = []
    for name in table:
        if name not in _TOP_LEVEL:
            place = "; it belongs in an entry of models" if name in FIELDS else ""
            problems.append(unknown_name(name, _TOP_LEVEL, "key at the top level") + place)
    settings = {name: table.get(name, {}) for name in checks}
    for name, values in settings.items():
        if not isinstance(values, Mapping):
            problems.append(f"{name}: {show(values)} is not a table of settings")
        else:
            problems += [f"{name}.{problem}" for problem in checks[name](values)]
    models, model_problems = _examine_all(table)
    if problems or model_problems:
        raise complaint(str(path), problems + model_problems)
    tables = {name: MappingProxyType(dict(values)) for name, values in settings.items()}
    return ConfigFile(tuple(ModelConfig(**values) for values in models), **tables)


def load_configs(path: str | os.PathLike[str]) -> tuple[ModelConfig, ...]:
    """Read all models of a file; raises like :func:`read_config_file`."""
    return read_config_file(path).models


def read_model(path: str | os.PathLike[str]) -> ModelConfig:
    """Read a file of one model; see :meth:`ModelConfig.from_file`."""
    table = read_table(user_path(path))
    if "models" not in table:
        values, problems = examine(table)
        if problems:
            raise complaint(str(path), problems)
        return ModelConfig(**values)
    models = _interpret(path, table).models
    if len(models) != 1:
        raise ConfigurationError(
            f"{path} describes {len(models)} models, not one", hint="load_configs(path) reads all of them"
        )
    return models[0]


def _examine_all(table: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[str]]:
    if "models" not in table:
        return [], ["models: missing; list the models there, or give an empty list"]
    entries = table["models"]
    if not isinstance(entries, list):
        return [], [f"models: {show(entries)} is not a list; each model is one entry of it"]
    models: list[dict[str, Any]] = []
    problems: list[str] = []
    number_of_id: dict[str, int] = {}
    for number, entry in enumerate(entries):
        place = f"models[{number}]"
        if not isinstance(entry, Mapping):
            problems.append(f"{place}: {show(entry)} is not a table of a model's fields")
            continue
        values, field_problems = examine(entry)
        models.append(values)
        problems += [f"{place}.{problem}" for problem in field_problems]
        name = values.get("model_id")
        if name is not None and number_of_id.setdefault(name, number) != number:
            other = f"models[{number_of_id[name]}]"
            problems.append(f"{place}.model_id: {name!r} is also the id of {other}; give it another")
    return models, problems


# The text of files


def dump_yaml(table: Mapping[str, Any]) -> str:
    """Write plain values as YAML, in their order."""
    import yaml

    # PyYAML loses these Unicode line breaks unless it escapes them.
    readable = not any(isinstance(value, str) and set("\x85\u2028\u2029") & set(value) for value in table.values())
    text: str = yaml.safe_dump(dict(table), sort_keys=False, allow_unicode=readable)
    return text


def dump_toml(table: Mapping[str, Any]) -> str:
    """Write a table of booleans, numbers, strings, and lists and tables of them as TOML; the inner ones inline."""
    return "".join(f"{name} = {_toml_value(value)}\n" for name, value in table.items())


def _toml_value(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_toml_value, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_toml_value(name)} = {_toml_value(item)}' for name, item in value.items())}}}"
    # JSON escapes the same characters as TOML, except for one; with ensure_ascii, its escapes would be wrong in TOML.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def read_table(path: Path) -> Mapping[str, Any]:
    """Return the table at the top level of a file."""
    parse = _PARSERS.get(path.suffix.lower())
    data = _bytes(path, readable=parse is not None)
    if parse is None:
        meant = near(path.suffix, _PARSERS)
        raise ConfigurationError(
            f"{path} has the suffix {path.suffix!r}, which is none of {', '.join(_PARSERS)}{meant}",
            hint="the suffix decides how the file is read",
        )
    try:
        table = parse(_decode(data))
    except _SyntaxProblemError as error:
        raise ConfigurationError(
            f"{path}{error.place}: {reason(error)}",
            hint=f"fix the file, which has to be {_FORMATS[path.suffix.lower()]}",
        ) from None
    except RecursionError:
        raise ConfigurationError(
            f"{path} is nested too deeply to be read", hint="a configuration is a list of flat tables"
        ) from None
    if not isinstance(table, Mapping):
        content = "nothing" if table is None else show(table)
        raise ConfigurationError(
            f"{path} contains {content}, not a table", hint="begin with models: and list the models below it"
        )
    return table


class _SyntaxProblemError(Exception):
    """A file is invalid in its format; line and column count from 1, and are 0 if they are unknown."""

    def __init__(self, why: str, line: int = 0, column: int = 0) -> None:
        super().__init__(why)
        self.place = f", line {line}, column {column}" if line else ""


def _bytes(path: Path, *, readable: bool) -> bytes:
    """Return the content of a file; for an unreadable format, only check that it exists."""
    try:
        path.stat()
        return path.read_bytes() if readable else b""
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MissingFileError(
            f"there is no file {path} (looked in {path.absolute().parent})", hint="check the path of the configuration"
        ) from error
    except OSError as error:
        raise ConfigurationError(
            f"{path} cannot be read: {error.strerror}", hint="give a file that this process may read"
        ) from error


def _decode(data: bytes) -> str:
    try:
        # Editors on Windows write a byte order mark.
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = data[: error.start]
        line, column = before.count(b"\n") + 1, error.start - before.rfind(b"\n")
        raise _SyntaxProblemError(f"byte {data[error.start]:#04x} is not UTF-8", line, column) from None


def _parse_toml(text: str) -> Any:
    try:
        return tomllib.loads(text)
    # Integers of thousands of digits are a plain ValueError.
    except ValueError as error:
        why, place = str(error), re.search(r" \(at (?:line (\d+), column (\d+)|end of document)\)$", str(error))
        if place is None:
            raise _SyntaxProblemError(why) from None
        end = _position(text, len(text))
        line, column = (int(place[1]), int(place[2])) if place[1] else end
        raise _SyntaxProblemError(why[: place.start()], line, column) from None


def _parse_json(text: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key, value in pairs:
            if key in values:
                raise _SyntaxProblemError(f"the key {show(key)} occurs twice in one object")
            values[key] = value
        return values

    try:
        return json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise _SyntaxProblemError(error.msg, error.lineno, error.colno) from None
    except ValueError as error:
        raise _SyntaxProblemError(str(error)) from None


def _parse_yaml(text: str) -> Any:
    import yaml

    try:
        # The loader is yaml.SafeLoader, with checks added.
        return yaml.load(text, Loader=_strict_loader())  # noqa: S506
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        why = ", ".join(filter(None, (error.context, error.problem)))
        raise _SyntaxProblemError(why, mark.line + 1, mark.column + 1) from None
    except yaml.reader.ReaderError as error:
        place = _position(text, error.position)
        raise _SyntaxProblemError(f"character U+{error.character:04X} is not allowed in YAML", *place) from None


def _position(text: str, offset: int) -> tuple[int, int]:
    """Return line and column, both counted from 1, of a character."""
    return text.count("\n", 0, offset) + 1, offset - text.rfind("\n", 0, offset)


@functools.cache
def _strict_loader() -> Any:
    """Return a safe loader that refuses duplicate keys and reports where a value cannot be read."""
    import yaml

    class StrictLoader(yaml.SafeLoader):
        def compose_mapping_node(self, anchor: Any) -> Any:
            # Before merge keys are resolved, as those may repeat a key on purpose.
            node = super().compose_mapping_node(anchor)
            keys: set[object] = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and (key.tag, key.value) in keys:
                    why = f"the key {show(key.value)} occurs twice in one mapping"
                    raise yaml.composer.ComposerError(None, None, why, key.start_mark)
                keys.add((key.tag, key.value) if isinstance(key, yaml.ScalarNode) else id(key))
            return node

        def construct_object(self, node: Any, deep: bool = False) -> Any:
            try:
                return super().construct_object(node, deep)
            # A value that looks like a date or a number, or is tagged as one, and is invalid.
            except (ValueError, OverflowError, LookupError, AttributeError) as error:
                why = f"{show(node.value)} cannot be read as {node.tag.rpartition(':')[2]}"
                raise yaml.constructor.ConstructorError(None, None, why, node.start_mark) from error

    return StrictLoader


_PARSERS = {".yaml": _parse_yaml, ".yml": _parse_yaml, ".toml": _parse_toml, ".json": _parse_json}
_FORMATS = {".yaml": "YAML", ".yml": "YAML", ".toml": "TOML", ".json": "JSON"}
