"""What is known about a model type: its family, or why there is none; as JSON, which holds no code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from splitlearn_core import ModelFamily, SplitLearnError

#: Fields of a family that no examination gives: two are names of other packages, and two are the plugin's own choice.
_NOT_EXAMINED = {"impossible_cuts", "bundled_checkpoint", "default_model", "preferred_strategy"}
#: Values of the whole, in a configuration of several models.
_OF_THE_WHOLE = ("tie_word_embeddings", "dtype", "torch_dtype")
_LAYERS = "num_hidden_layers"
_FIELDS = {item.name: item for item in fields(ModelFamily) if item.name not in _NOT_EXAMINED}


@dataclass(frozen=True, slots=True)
class UnprovenSetting:
    """Values of a configuration with which a split model is not proven to be equal."""

    #: Name in ``config.json`` -> the value that was tried.
    values: Mapping[str, Any]
    #: The values of the same names with which it is proven.
    proven: Mapping[str, Any]
    reason: str

    def applies_to(self, config: Mapping[str, Any]) -> bool:
        """Return whether a ``config.json`` has other values than the proven ones."""
        stated = {name: config[name] for name in self.values if config.get(name) is not None}
        return any(value != self.proven.get(name) for name, value in stated.items())

    def to_dict(self) -> dict[str, Any]:
        return {"values": dict(self.values), "proven": dict(self.proven), "reason": self.reason}


@dataclass(frozen=True, slots=True)
class Answer:
    """A family, or a refusal."""

    #: Arguments of :class:`ModelFamily`; empty if the type is refused.
    fields: Mapping[str, Any] = field(default_factory=dict)
    unproven: tuple[UnprovenSetting, ...] = ()
    #: In a type of several models, the types of decoder with which it is proven; empty if there is only one.
    decoders: tuple[str, ...] = ()
    #: Why the type is refused, and what to do; empty if it is not.
    refusal: str = ""
    hint: str = ""

    def to_dict(self) -> dict[str, Any]:
        return {
            "family": dict(self.fields),
            "unproven": [setting.to_dict() for setting in self.unproven],
            "decoders": list(self.decoders),
            "refusal": self.refusal,
            "hint": self.hint,
        }

    @property
    def family(self) -> ModelFamily:
        """The family; of an answer that is no refusal."""
        family = ModelFamily(**self.fields)
        if not self.unproven and not self.decoders:
            return family
        return replace(family, impossible_cuts=_ProvenAlone(family, self.unproven, self.decoders))


@dataclass(frozen=True, slots=True)
class _ProvenAlone:
    """Allows no cut of a model that has an unproven setting, or an unproven type of decoder."""

    family: ModelFamily = field(compare=False)
    unproven: tuple[UnprovenSetting, ...]
    decoders: tuple[str, ...]

    def __call__(self, config: Mapping[str, Any]) -> Mapping[int, str]:
        whole = {name: config[name] for name in _OF_THE_WHOLE if name in config}
        values, layers = {**self.family.decoder_values(config), **whole}, self.family.config_value(config, _LAYERS)
        reason = next((setting.reason for setting in self.unproven if setting.applies_to(values)), "")
        decoder = self.family.decoder_values(config).get("model_type")
        if self.decoders and isinstance(decoder, str) and decoder not in self.decoders:
            reason = f"it is not proven with a decoder of type {decoder!r}, only with {', '.join(self.decoders)}"
        return dict.fromkeys(range(1, layers), reason) if reason and isinstance(layers, int) else {}


def answer_from(values: Mapping[str, Any], model_type: str) -> Answer:
    """Make an answer from :meth:`Answer.to_dict`.

    Raises:
        ValueError: The values are not those of an answer about the model type.
    """
    try:
        refusal, hint = values["refusal"], values["hint"]
        unproven = tuple(_setting(setting) for setting in values["unproven"])
        decoders = tuple(values["decoders"])
        if not all(isinstance(decoder, str) for decoder in decoders):
            raise ValueError("the types of decoder are described wrongly")
        answer = Answer(_arguments(values["family"]), unproven, decoders, refusal, hint)
        if not isinstance(refusal, str) or not isinstance(hint, str) or bool(refusal) == bool(answer.fields):
            raise ValueError("it is neither a family nor a refusal")
        if answer.fields and answer.family.model_type != model_type:
            raise ValueError(f"it is about {answer.family.model_type!r}")
    except (KeyError, TypeError, AttributeError, SplitLearnError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    return answer


def _setting(values: Mapping[str, Any]) -> UnprovenSetting:
    setting = UnprovenSetting(values["values"], values["proven"], values["reason"])
    if not (isinstance(setting.values, dict) and isinstance(setting.proven, dict) and isinstance(setting.reason, str)):
        raise ValueError("an unproven setting is described wrongly")
    return setting


def _arguments(values: Mapping[str, Any]) -> dict[str, Any]:
    unknown = values.keys() - _FIELDS.keys()
    if unknown:
        raise ValueError(f"a family has no {', '.join(sorted(map(repr, unknown)))}")
    # A class of transformers, by its name alone: "module:Class" would import any module.
    if values and not str(values["architecture"]).isidentifier():
        raise ValueError(f"{values['architecture']!r} is no class of transformers")
    return {name: _restored(name, value) for name, value in values.items()}


def _restored(name: str, value: Any) -> Any:
    """Make tuples of the lists of a field that holds tuples, according to its annotation."""
    return _with_tuples(value) if "tuple" in str(_FIELDS[name].type) else value


def _with_tuples(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _with_tuples(item) for name, item in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list | tuple) else value
