"""Files of model configurations: YAML, TOML and JSON, by suffix.

::

    manager:                # what the manager is made with; optional
      max_models: 4
    http:                   # what `splitlearn serve` lets requests load; optional
      model_roots: [/srv/models]
    models:
      - model_id: trunk
        model_type: qwen2
        component: trunk
        split_points: [4, 20]
        keep_alive: 30m

In TOML the same is ``[manager]`` and ``[[models]]``. Relative paths are relative to the working directory.
"""

from __future__ import annotations

import functools
import json
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from splitlearn_core.errors import ConfigurationError, MissingFileError
from splitlearn_core.manager.config import FIELDS, ModelConfig, complaint, examine, near, show, unknown_name
from splitlearn_core.paths import user_path
from splitlearn_core.quoting import reason

_TOP_LEVEL = ("manager", "http", "models")

#: Says what is wrong with a table of settings.
Check = Callable[[Mapping[str, Any]], list[str]]


def _unchecked(settings: Mapping[str, Any]) -> list[str]:
    return []


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """What a file says."""

    models: tuple[ModelConfig, ...]
    #: The table ``manager`` as it stands there; empty where there is none. Not checked here.
    manager: Mapping[str, Any]
    #: Likewise the table ``http``.
    http: Mapping[str, Any] = field(default_factory=dict)


def read_config_file(
    path: str | os.PathLike[str], check_manager: Check = _unchecked, check_http: Check = _unchecked
) -> ConfigFile:
    """Read all models of a file, and what it says of the manager.

    Args:
        path: A file in YAML, TOML or JSON, by its suffix.
        check_manager: Says what is wrong with the table ``manager``, so that it is reported together
            with what is wrong with the models.
        check_http: Likewise for the table ``http``.

    Raises:
        MissingFileError: There is no such file.
        ConfigurationError: It cannot be read as its format (with line and column), or some of what
            it says cannot be carried out: all problems of all models are listed, as
            ``models[2].component: ...``.
    """
    return _interpret(path, _read(user_path(path)), {"manager": check_manager, "http": check_http})


def _interpret(
    path: str | os.PathLike[str],
    table: Mapping[str, Any],
    checks: Mapping[str, Check] = MappingProxyType({"manager": _unchecked, "http": _unchecked}),
) -> ConfigFile:
    problems = []
    for name in table:
        if name not in _TOP_LEVEL:
            place = "; it belongs into an entry of models" if name in FIELDS else ""
            problems.append(unknown_name(name, _TOP_LEVEL, "key at the top level") + place)
    settings = {name: table.get(name, {}) for name in checks}
    for name, values in settings.items():
        if not isinstance(values, Mapping):
            problems.append(f"{name}: {show(values)} is no table of settings")
        else:
            problems += [f"{name}.{problem}" for problem in checks[name](values)]
    models, found = _examine_all(table)
    if problems or found:
        raise complaint(str(path), problems + found)
    tables = {name: MappingProxyType(dict(values)) for name, values in settings.items()}
    return ConfigFile(tuple(ModelConfig(**values) for values in models), **tables)


def load_configs(path: str | os.PathLike[str]) -> tuple[ModelConfig, ...]:
    """Read all models of a file; raises like :func:`read_config_file`."""
    return read_config_file(path).models


def read_model(path: str | os.PathLike[str]) -> ModelConfig:
    """Read a file of one model; see :meth:`ModelConfig.from_file`."""
    table = _read(user_path(path))
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


def dump_yaml(table: Mapping[str, Any]) -> str:
    """Write plain values as YAML, in their order."""
    import yaml

    # PyYAML loses these line breaks of Unicode where it writes them as they are.
    readable = not any(isinstance(value, str) and set("\x85\u2028\u2029") & set(value) for value in table.values())
    text: str = yaml.safe_dump(dict(table), sort_keys=False, allow_unicode=readable)
    return text


def dump_toml(table: Mapping[str, Any]) -> str:
    """Write a flat table of truth values, numbers, texts and lists of them as TOML."""
    return "".join(f"{name} = {_toml_value(value)}\n" for name, value in table.items())


def _toml_value(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_toml_value, value))}]"
    # JSON escapes what TOML does, but for one character; its escapes of others would be wrong in TOML.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _examine_all(table: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[str]]:
    if "models" not in table:
        return [], ["models: missing; list the models there, or give an empty list"]
    entries = table["models"]
    if not isinstance(entries, list):
        return [], [f"models: {show(entries)} is no list; each model is one entry of it"]
    models: list[dict[str, Any]] = []
    problems: list[str] = []
    seen: dict[str, int] = {}
    for number, entry in enumerate(entries):
        place = f"models[{number}]"
        if not isinstance(entry, Mapping):
            problems.append(f"{place}: {show(entry)} is no table of a model's fields")
            continue
        values, found = examine(entry)
        models.append(values)
        problems += [f"{place}.{problem}" for problem in found]
        name = values.get("model_id")
        if name is not None and seen.setdefault(name, number) != number:
            problems.append(f"{place}.model_id: {name!r} is the id of models[{seen[name]}] too; give it another")
    return models, problems


def _read(path: Path) -> Mapping[str, Any]:
    """Return the table that a file holds at its top level."""
    parse = _PARSERS.get(path.suffix.lower())
    data = _bytes(path, readable=parse is not None)
    if parse is None:
        meant = near(path.suffix, _PARSERS)
        raise ConfigurationError(
            f"{path} has the suffix {path.suffix!r}, which is none of {', '.join(_PARSERS)}{meant}",
            hint="the suffix says how the file is read",
        )
    try:
        table = parse(_decode(data))
    except _SyntaxProblemError as error:
        raise ConfigurationError(
            f"{path}{error.place}: {reason(error)}",
            hint=f"mend the file, which has to be {_FORMATS[path.suffix.lower()]}",
        ) from None
    except RecursionError:
        raise ConfigurationError(
            f"{path} is nested too deeply to be read", hint="a configuration is a list of flat tables"
        ) from None
    if not isinstance(table, Mapping):
        held = "nothing" if table is None else show(table)
        raise ConfigurationError(f"{path} holds {held}, not a table", hint="begin with models: and list them below")
    return table


class _SyntaxProblemError(Exception):
    """A file contradicts its format; line and column count from 1, and are 0 where nothing tells them."""

    def __init__(self, why: str, line: int = 0, column: int = 0) -> None:
        super().__init__(why)
        self.place = f", line {line}, column {column}" if line else ""


def _bytes(path: Path, *, readable: bool) -> bytes:
    """Return what a file holds; nothing of one that is not ours to read, if only it is there."""
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
        # Editors on Windows put a mark before the text.
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = data[: error.start]
        line, column = before.count(b"\n") + 1, error.start - before.rfind(b"\n")
        raise _SyntaxProblemError(f"byte {data[error.start]:#04x} is no UTF-8", line, column) from None


def _parse_toml(text: str) -> Any:
    try:
        return tomllib.loads(text)
    # Integers of thousands of digits are a plain ValueError.
    except ValueError as error:
        why, found = str(error), re.search(r" \(at (?:line (\d+), column (\d+)|end of document)\)$", str(error))
        if found is None:
            raise _SyntaxProblemError(why) from None
        end = _position(text, len(text))
        line, column = (int(found[1]), int(found[2])) if found[1] else end
        raise _SyntaxProblemError(why[: found.start()], line, column) from None


def _parse_json(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        raise _SyntaxProblemError(error.msg, error.lineno, error.colno) from None
    except ValueError as error:
        raise _SyntaxProblemError(str(error)) from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise _SyntaxProblemError(f"the key {show(key)} stands twice in one object")
        values[key] = value
    return values


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
        raise _SyntaxProblemError(f"character U+{error.character:04X} cannot stand in YAML", *place) from None


def _position(text: str, offset: int) -> tuple[int, int]:
    """Return line and column, both counted from 1, of a character."""
    return text.count("\n", 0, offset) + 1, offset - text.rfind("\n", 0, offset)


@functools.cache
def _strict_loader() -> Any:
    """Return a safe loader that takes no key twice and says where a value cannot be read."""
    import yaml

    class StrictLoader(yaml.SafeLoader):
        def compose_mapping_node(self, anchor: Any) -> Any:
            # Before merge keys are resolved: those may repeat a key on purpose.
            node = super().compose_mapping_node(anchor)
            seen = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and (key.tag, key.value) in seen:
                    why = f"the key {show(key.value)} stands twice in one mapping"
                    raise yaml.composer.ComposerError(None, None, why, key.start_mark)
                seen.add((key.tag, key.value) if isinstance(key, yaml.ScalarNode) else id(key))
            return node

        def construct_object(self, node: Any, deep: bool = False) -> Any:
            try:
                return super().construct_object(node, deep)
            # What looks like a date or a number, or is tagged as one, and is none.
            except (ValueError, OverflowError, LookupError, AttributeError) as error:
                why = f"{show(node.value)} cannot be read as {node.tag.rpartition(':')[2]}"
                raise yaml.constructor.ConstructorError(None, None, why, node.start_mark) from error

    return StrictLoader


_PARSERS = {".yaml": _parse_yaml, ".yml": _parse_yaml, ".toml": _parse_toml, ".json": _parse_json}
_FORMATS = {".yaml": "YAML", ".yml": "YAML", ".toml": "TOML", ".json": "JSON"}
