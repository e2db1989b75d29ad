"""Pickling instances of classes that are made at run time, which no import finds by a name."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from splitlearn_core.errors import ConfigurationError, SplitLearnError


def installed_class(model_type: str, component: str) -> type[Any]:
    """Return the class of a component of an installed plugin's family: how a pickle refers to it.

    Modules know no registry; who opens a pickle asks the one of the process, by the public name for that.
    """
    made: type[Any] = importlib.import_module("splitlearn_core").ModelRegistry.get_model_class(model_type, component)
    return made


class _ClassReference:
    """Stands for a class in a pickle, as the call that makes it."""

    def __init__(self, made: type[Any], make: Callable[..., type[Any]], arguments: tuple[str, ...]) -> None:
        self.made = made
        self._make = make
        self._arguments = arguments

    def __deepcopy__(self, memo: dict[int, Any]) -> _ClassReference:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Refuse a class that the same call does not make in another process.

        Raises:
            ConfigurationError: Its family is none of an installed plugin.
        """
        problem = ""
        try:
            if self._make(*self._arguments) is not self.made:
                problem = "the installed plugin has another family of this name"
        except SplitLearnError as error:
            problem = error.message
        if problem:
            raise ConfigurationError(
                f"a {self.made.__name__} of {' '.join(self._arguments)} cannot be pickled: {problem}",
                hint="save it as files: save_split(model, DIR), and load those with load_component or "
                "load_split_directory",
            )
        return _reference, (self._make, self._arguments)


def _reference(make: Callable[..., type[Any]], arguments: tuple[str, ...]) -> _ClassReference:
    return _ClassReference(make(*arguments), make, arguments)


def _instance(reference: _ClassReference) -> Any:
    return object.__new__(reference.made)


def reduce_by(make: Callable[..., type[Any]], *arguments: str) -> Callable[[Any, Any], Any]:
    """Return a ``__reduce_ex__`` for a class that a call makes, the same one each time.

    The state of an instance is pickled as ever, and what is shared in it stays shared. In another process the call
    is made again, which imports what it imports.

    Args:
        make: A function of a module.
        arguments: What the class is made of.
    """

    def __reduce_ex__(self: Any, protocol: Any) -> Any:  # noqa: N807  # becomes the method of this name
        made = type(self)
        if made.__dict__.get("__reduce_ex__") is not __reduce_ex__:
            return object.__reduce_ex__(self, protocol)  # a subclass, which has a name of its own
        return _instance, (_ClassReference(made, make, arguments),), self.__getstate__()

    return __reduce_ex__
