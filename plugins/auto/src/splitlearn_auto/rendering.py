"""Render the family module and its test, formatted as by ``ruff format``."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from splitlearn_auto.findings import Derived

#: ruff's own line length.
_WIDTH = 88

_REASONS = {
    "text_config": "Where config.json has the decoder's values; components have nothing of the other models.",
    "bottom_arguments": "Which tokens belong to one image may matter to the masks of all layers.",
    "zero_outside_bottom": "Added to the embeddings, and also to hidden states from outside.",
    "skip_outside_bottom": "The embeddings pass through it; hidden states from outside already did.",
    "skip_outside_top": "The state passes through it after the last layer.",
    "layers_return_tuple": "Its layers return a tuple whose first item is the hidden state.",
    "crossing": "What crosses from layer to layer, where that is more than hidden states.",
    "layer_results": "What a layer computes for the next one besides.",
    "zero_arguments": "What its forward computes from token ids, which only a bottom has: others get a zero.",
    "sharing_layers": "The last layers use keys and values of earlier ones.",
    "shared_modules": "Modules that several of its layers have, and a file once.",
    "ignored_suffixes": "Tensors of old checkpoints that no module has; transformers ignores them, too.",
    "renamed": "Names on disk that transformers changes when it loads.",
    "transformers_tables": "Tensors of the module are made of others in the file, as transformers does it.",
    "packable": "But for attention, its layers treat each token by itself: sessions can be packed.",
    "cached_values": "Its layers cache what keys and values are computed from.",
    "measured_cache": "What its layers cache is not to be read in its config.json.",
    "config_names": "The names in its config.json of the values that a plan needs.",
    "config_defaults": "The defaults of transformers for values that config.json lacks.",
    "uniform_layers": "Its layers are not all made by one class from a configuration and a number.",
    "head_bias": "One tensor with the head's bias, where embedding and head are one.",
    "before_head": "The state passes through it before the head.",
    "joined_layers": "Layers of these kinds use what the layer before has computed.",
    "required_values": "With others, more than the hidden states crosses from layer to layer.",
    "tiny_config": "What a small model for tests needs besides the usual small sizes.",
}


def family_module(derived: Derived, title: str) -> str:
    """Return the text of the module that describes the family."""
    name = _constant(derived.fields["model_type"])
    lines = [
        *_docstring(f"{title} for splitlearn: model type ``{derived.fields['model_type']}``."),
        "",
        "from __future__ import annotations",
        "",
        "from splitlearn_core import ModelFamily, hookimpl",
        "",
        *_open_questions(derived, name),
        f"{name} = ModelFamily(",
    ]
    for field, value in derived.fields.items():
        reason = derived.reasons.get(field) or _REASONS.get(field, "")
        lines += [f"    {line}" for line in _comment(reason)] if reason else []
        lines += [f"    {line}" for line in _argument(field, value)]
    lines += [
        ")",
        "",
        "",
        "@hookimpl",
        "def splitlearn_model_families() -> list[ModelFamily]:",
        f"    return [{name}]",
    ]
    return "\n".join(lines) + "\n"


def _docstring(text: str) -> list[str]:
    # Foreign text must not end the docstring.
    return [f'"""{text}"""' if '"' not in text and "\\" not in text else '"""A family for splitlearn."""']


def _open_questions(derived: Derived, name: str) -> Iterator[str]:
    if not derived.questions:
        return
    yield f"# {name} is not right yet: its tests fail until these questions are answered."
    for question in derived.questions:
        yield from _comment(f"QUESTION ({question.field}): {question.text}")
        yield from _comment(f"seen: {question.seen}", indent="  ")


def _comment(text: str, indent: str = "") -> Iterator[str]:
    for line in text.splitlines():
        for piece in textwrap.wrap(line, _WIDTH - 6 - len(indent)) or [""]:
            yield f"# {indent}{piece}".rstrip()


def _argument(field: str, value: Any) -> list[str]:
    first, *others = _lines(value, _width_of(value, _WIDTH - len(field) - 6))
    lines = [f"{field}={first}", *others]
    return [*lines[:-1], f"{lines[-1]},"]


def _width_of(value: Any, left: int) -> int:
    # A mapping with several items is written on several lines, even if it fits on one.
    return 0 if isinstance(value, Mapping) and len(value) > 1 else left


def _lines(value: Any, width: int) -> list[str]:
    """Format a value as ruff does: on one line if it fits, else each item on its own line."""
    flat = literal(value)
    if len(flat) <= width:
        return [flat]
    if isinstance(value, Mapping):
        items = [_keyed(f"{literal(key)}: ", item) for key, item in value.items()]
        return ["{", *(f"    {line}" for item in items for line in item), "}"]
    if isinstance(value, tuple | list) and value:
        opening, closing = ("(", ")") if isinstance(value, tuple) else ("[", "]")
        items = [_keyed("", item) for item in value]
        return [opening, *(f"    {line}" for item in items for line in item), closing]
    return [flat]


def _keyed(key: str, value: Any) -> list[str]:
    # The deepest position of such an item: two levels of indentation, and a comma.
    first, *others = _lines(value, _WIDTH - 9 - len(key))
    lines = [f"{key}{first}", *others]
    return [*lines[:-1], f"{lines[-1]},"]


def literal(value: Any) -> str:
    """Write a plain value as Python source, with double quotes."""
    if isinstance(value, str):
        # ASCII only, so that foreign text cannot contain lookalike characters.
        return json.dumps(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{literal(key)}: {literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, tuple):
        return "(" + ", ".join(map(literal, value)) + ("," if len(value) == 1 else "") + ")"
    if isinstance(value, list):
        return "[" + ", ".join(map(literal, value)) + "]"
    if isinstance(value, bool | int | float | None):
        return repr(value)
    raise TypeError(f"{value!r} cannot be written into a family module")


def test_module(derived: Derived, title: str) -> str:
    """Return the text of the test file."""
    model_type = derived.fields["model_type"]
    lines = [
        *_docstring(f"{title} against the unsplit model."),
        "",
        "from typing import ClassVar",
        "",
        "from splitlearn_core.testing import FamilyConformance",
        "",
        "",
        f"class Test{class_name(model_type)}(FamilyConformance):",
        f"    model_type = {literal(model_type)}",
        *_assignment("variants: ClassVar", derived.variants),
    ]
    if derived.attention and derived.attention != ("eager", "sdpa"):
        lines += ["    # transformers refuses the others for it.", f"    attention = {literal(derived.attention)}"]
    if len(derived.dtypes) == 1:
        lines += ["    # In others it is not equal; see the README.", f"    dtypes = {literal(derived.dtypes)}"]
    return "\n".join(lines) + "\n"


def _assignment(name: str, value: Any) -> list[str]:
    first, *others = _lines(value, _width_of(value, _WIDTH - len(name) - 7))
    return [f"    {name} = {first}", *(f"    {line}" for line in others)]


def _constant(model_type: str) -> str:
    name = re.sub(r"[^A-Z0-9]+", "_", model_type.upper()).strip("_")
    return name if name[:1].isalpha() else f"FAMILY_{name}"


def class_name(model_type: str) -> str:
    """Return the model type in CamelCase, as a part of a class name."""
    return "".join(part.capitalize() for part in re.split(r"[^A-Za-z0-9]+", model_type))
