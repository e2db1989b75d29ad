"""Parameters that are one under several names, and what ``load_state_dict(assign=True)`` would make of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from splitlearn_core.errors import ConfigurationError

#: Parameters that another component of the same load holds, too.
_SHARED: Any = WeakIdKeyDictionary()


def note_shared(parameter: nn.Parameter) -> None:
    """Remember that a parameter is held by more than one component."""
    _SHARED[parameter] = True


def refuse_parting(component: str, module: nn.Module, names: Iterable[str]) -> None:
    """Refuse to put other parameters in the place of those that another component holds, too.

    Args:
        component: What the module is.
        module: The component.
        names: The parameters that would be replaced.

    Raises:
        ConfigurationError: One of them is shared; the other component would keep the old values.
    """
    parameters = dict(module.named_parameters(remove_duplicate=False))
    shared = sorted(name for name in names if name in parameters and parameters[name] in _SHARED)
    if shared:
        raise ConfigurationError(
            f"load_state_dict(assign=True) would replace {', '.join(shared)} of this {component} alone, "
            "which is one parameter with that of another component",
            hint="leave assign out, to have the values copied into it; or call it on SplitCausalLM(bottom, ..., top)",
        )


@contextmanager
def keeping_ties(module: nn.Module) -> Iterator[None]:
    """Let parameters that were one be one again, after some of their names were given new ones.

    The last of the new ones counts, as where values are copied name by name.
    """
    before: dict[int, tuple[nn.Parameter, list[str]]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        before.setdefault(id(parameter), (parameter, []))[1].append(name)
    yield
    modules = dict(module.named_modules())
    for old, names in before.values():
        if len(names) > 1:
            _unite(modules, old, names)


def _unite(modules: Mapping[str, nn.Module], old: nn.Parameter, names: list[str]) -> None:
    places = [(modules[path], leaf) for path, _, leaf in (name.rpartition(".") for name in names)]
    replaced = [new for owner, leaf in places if (new := getattr(owner, leaf)) is not old]
    for owner, leaf in places if replaced else ():
        setattr(owner, leaf, replaced[-1])
    if replaced:
        note_shared(replaced[-1])
