"""What plugins may still do in this release and no more in a later one: a table, and the words of the warning.

A change of the plugin API is an entry here, one release before it breaks. ``docs/plugin-api.md`` has the promise.
The table is ours and not pluggy's (``warn_on_impl``, ``warn_on_impl_args``), because pluggy's warning cannot name the
distribution, knows nothing of families and strategies, and comes each time a plugin is registered.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Deprecation:
    """One thing that plugins are asked to stop doing."""

    #: What to write instead, as the end of a sentence: ``"write 'head' instead"``.
    instead: str
    #: The version of core that was the first to warn.
    since: str
    #: The version of core that is the first to refuse.
    until: str
    #: Of a field of ``ModelFamily`` that was renamed: its new name, which gets the value. Empty: the value is dropped.
    moved_to: str = ""


#: Hook -> why it is no longer to be implemented. It stays in ``hookspecs`` until then.
HOOKS: dict[str, Deprecation] = {}
#: (hook, argument) -> why it is no longer to be taken. It stays in ``hookspecs`` until then.
ARGUMENTS: dict[tuple[str, str], Deprecation] = {}
#: Name that was a field of ``ModelFamily`` -> what became of it. The class has it no more: it is taken and translated.
FIELDS: dict[str, Deprecation] = {}
#: Number of the plugin API that is older than ours and still taken -> until when.
APIS: dict[int, Deprecation] = {}


def deprecated_in_hook(hook: str, arguments: Iterable[str]) -> Iterator[str]:
    """Yield what is to be said of one hook implementation, each a whole sentence.

    Args:
        hook: Its name.
        arguments: The names of the arguments that it takes.
    """
    if hook in HOOKS:
        yield _sentence(f"hook {hook}", HOOKS[hook])
    for name in arguments:
        if (hook, name) in ARGUMENTS:
            yield _sentence(f"argument {name!r} of hook {hook}", ARGUMENTS[hook, name])


def deprecated_field(name: str) -> str:
    """Return what is to be said of a field of ``ModelFamily`` that a plugin still names as it once was."""
    return _sentence(f"field {name!r} of ModelFamily", FIELDS[name])


def deprecated_api(number: int) -> str:
    """Return what is to be said of a plugin that was made for an older plugin API; nothing where it is the newest."""
    return _sentence(f"plugin API {number}", APIS[number]) if number in APIS else ""


def translate_fields(given: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Give fields of ``ModelFamily`` that were renamed their new names.

    Returns:
        The fields by their names of today, and which of the given names are deprecated.

    Raises:
        TypeError: A field is given by its old name and by its new one.
    """
    old = tuple(name for name in given if name in FIELDS)
    fields = {name: value for name, value in given.items() if name not in FIELDS}
    for name in old:
        new = FIELDS[name].moved_to
        if new in fields:
            raise TypeError(f"ModelFamily got {new!r} twice: {name!r} is its old name")
        if new:
            fields[new] = given[name]
    return fields, old


def _sentence(what: str, change: Deprecation) -> str:
    since, until = f"splitlearn-core {change.since}", f"splitlearn-core {change.until}"
    return f"{what} is deprecated since {since} and refused from {until}: {change.instead}"
