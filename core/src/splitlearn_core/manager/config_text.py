"""Configuration files as text: YAML, TOML and JSON, by suffix, with line and column of each mistake."""

from __future__ import annotations

import difflib
import functools
import json
import re
import reprlib
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from splitlearn_core.errors import ConfigurationError, MissingFileError
from splitlearn_core.quoting import reason


def near(value: object, choices: Iterable[str]) -> str:
    """Return a suggestion that continues a sentence; empty if no choice is near."""
    close = difflib.get_close_matches(value.strip().lower(), choices, n=1) if isinstance(value, str) else []
    return f"; did you mean {close[0]!r}?" if close else ""


_short = reprlib.Repr()
_short.maxlevel, _short.maxstring, _short.maxother = 2, 100, 100


def show(value: object) -> str:
    """Return a value's repr on one line, shortened if the value is large or deep."""
    try:
        return _short.repr(value)
    except ValueError:
        # Python refuses to write out integers of thousands of digits.
        return f"a huge {type(value).__name__}"


def dump_yaml(table: Mapping[str, Any]) -> str:
    """Write plain values as YAML, in their order."""
    import yaml

    # PyYAML loses these Unicode line breaks unless it escapes them.
    readable = not any(isinstance(value, str) and set("\x85\u2028\u2029") & set(value) for value in table.values())
    text: str = yaml.safe_dump(dict(table), sort_keys=False, allow_unicode=readable)
    return text


def dump_toml(table: Mapping[str, Any]) -> str:
    """Write a flat table of booleans, numbers, strings and lists of them as TOML."""
    return "".join(f"{name} = {_toml_value(value)}\n" for name, value in table.items())


def _toml_value(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_toml_value, value))}]"
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
            hint="the suffix says how the file is read",
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
        raise ConfigurationError(f"{path} holds {content}, not a table", hint="begin with models: and list them below")
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
        raise _SyntaxProblemError(f"byte {data[error.start]:#04x} is no UTF-8", line, column) from None


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
            raise _SyntaxProblemError(f"the key {show(key)} occurs twice in one object")
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
