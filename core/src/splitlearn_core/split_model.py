"""The result of a load: the components of one split, in order and by name, with a type for each number of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, NoReturn, TypeAlias, TypeVar, cast

from splitlearn_core.types import THREE, component_names, dtype_name, is_component_name

if TYPE_CHECKING:
    from splitlearn_core.build.component import BottomModel, ComponentModel, TopModel, TrunkModel


# Until Python 3.13, type parameters in typing have no defaults. A SplitModel without parameters has optional parts.
if TYPE_CHECKING:
    import typing_extensions

    _Bottom_co = typing_extensions.TypeVar(
        "_Bottom_co", bound="BottomModel | None", default="BottomModel | None", covariant=True
    )
    _Trunk_co = typing_extensions.TypeVar(
        "_Trunk_co", bound="TrunkModel | None", default="TrunkModel | None", covariant=True
    )
    _Top_co = typing_extensions.TypeVar("_Top_co", bound="TopModel | None", default="TopModel | None", covariant=True)
else:
    _Bottom_co, _Trunk_co, _Top_co = (TypeVar(name, covariant=True) for name in ("_Bottom_co", "_Trunk_co", "_Top_co"))


class SplitModel(NamedTuple, Generic[_Bottom_co, _Trunk_co, _Top_co]):
    """The components of a model that is cut in two places; a part that was not requested is None.

    Its type says which parts exist, if the call says so: ``parts=("trunk",)`` returns a
    ``SplitModel[None, TrunkModel, None]``.
    """

    bottom: _Bottom_co
    trunk: _Trunk_co
    top: _Top_co

    @property
    def trunks(self) -> tuple[_Trunk_co, ...]:
        """The components between bottom and top, in order."""
        return (self.trunk,)

    def __repr__(self) -> str:
        """Return a line that names the components, without the long repr of the modules."""
        return _shown(self)


class SplitPair(NamedTuple, Generic[_Bottom_co, _Top_co]):
    """The components of a model that is cut in one place; a part that was not requested is None."""

    bottom: _Bottom_co
    top: _Top_co

    @property
    def trunks(self) -> tuple[()]:
        """The components between bottom and top: none."""
        return ()

    def __repr__(self) -> str:
        """Return a line that names the components, without the long repr of the modules."""
        return _shown(self)


class SplitChain(tuple[Any, ...], Generic[_Bottom_co, _Trunk_co, _Top_co]):
    """The components of a model that is cut in three or more places; a part that was not requested is None.

    A named tuple like :class:`SplitModel`, with the names ``bottom``, ``trunk1``, ``trunk2``, ..., ``top``.
    """

    __slots__ = ()

    @property
    def bottom(self) -> _Bottom_co:
        """The component with the embeddings."""
        return cast("_Bottom_co", self[0])

    @property
    def trunks(self) -> tuple[_Trunk_co, ...]:
        """The components between bottom and top, in order."""
        return self[1:-1]

    @property
    def top(self) -> _Top_co:
        """The component with the head."""
        return cast("_Top_co", self[-1])

    @property
    def _fields(self) -> tuple[str, ...]:
        return component_names(len(self))

    def _asdict(self) -> dict[str, Any]:
        return dict(zip(self._fields, self, strict=True))

    def __getattr__(self, name: str) -> _Trunk_co:
        """Return one of the trunks, by its name."""
        if name not in self._fields:
            _refuse_attribute(self, name)
        return cast("_Trunk_co", self[self._fields.index(name)])

    def __repr__(self) -> str:
        """Return a line that names the components, without the long repr of the modules."""
        return _shown(self)


#: The components of a model, one of the three.
AnySplitModel: TypeAlias = SplitModel | SplitPair | SplitChain


def split_model(names: Sequence[str], components: Mapping[str, ComponentModel]) -> AnySplitModel:
    """Return a named tuple of all components of a model; None stands for those that were not loaded."""
    parts = [components.get(name) for name in names]
    if len(names) == len(THREE):
        return SplitModel(*parts)
    return SplitPair(*parts) if len(names) < len(THREE) else SplitChain(parts)


_MOVED = "give {0} to load_split_model, or move each component: for part in parts: part.{1}(...)"
_JOINED = "join the components: SplitCausalLM(*parts).{}(...)"

#: Attributes of one model that users look for in a tuple of components, and what to do instead.
_MODEL_ATTRIBUTES = {
    "to": _MOVED.format("device and dtype", "to"),
    "cuda": _MOVED.format("device='cuda'", "cuda"),
    "cpu": _MOVED.format("device='cpu'", "cpu"),
    "half": _MOVED.format("dtype='float16'", "half"),
    "float": _MOVED.format("dtype='float32'", "float"),
    "bfloat16": _MOVED.format("dtype='bfloat16'", "bfloat16"),
    "device": "each component has one: parts.trunk.device",
    "dtype": "each component has one: parts.trunk.dtype",
    "config": "each component has the whole model's: parts.trunk.config",
    "eval": "components are in evaluation mode once loaded",
    "train": "each component has it: parts.trunk.train()",
    "parameters": "each component has them: parts.trunk.parameters()",
    "state_dict": "each component has one: parts.trunk.state_dict()",
    "forward": _JOINED.format("forward"),
    "generate": _JOINED.format("generate"),
    "save_pretrained": "save_split(parts, DIR) saves the components, each into its own folder",
    "push_to_hub": "save_split(parts, DIR) saves the components, each into its own folder",
}


def _refuse_attribute(parts: Any, name: str) -> NoReturn:
    """Raise an AttributeError that explains what to do instead."""
    hint = _MODEL_ATTRIBUTES.get(name, "")
    if is_component_name(name):
        hint = f"it has {', '.join(parts._fields)}"
    what = f"a {type(parts).__name__}, a tuple of components, has no {name!r}"
    raise AttributeError(f"{what}; {hint}" if hint else what)


if not TYPE_CHECKING:  # type checkers should report unknown attributes
    SplitModel.__getattr__ = SplitPair.__getattr__ = _refuse_attribute


def _shown(parts: Any) -> str:
    described = []
    for name, part in parts._asdict().items():
        text = "None"
        if part is not None:
            layers = f"[{part.layer_range.start}, {part.layer_range.end})"
            kind = f"{part.family.model_type} {part.component}"
            text = f"<{kind}, layers {layers}, {dtype_name(part.dtype)}, {part.device}>"
        described.append(f"{name}={text}")
    return f"{type(parts).__name__}({', '.join(described)})"
