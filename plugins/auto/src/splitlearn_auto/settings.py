"""The values of ``config.json`` that a plan needs: their names in a model type, and their defaults."""

from __future__ import annotations

from typing import Any

#: The common names of these values.
COMMON = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
_TIED = "tie_word_embeddings"


def config_names(known: Any) -> dict[str, str]:
    """Return the names of a type's ``config.json`` that differ from the common ones, by common name."""
    written = known.to_dict()
    names = {common: known.attribute_map.get(common, common) for common in COMMON}
    return {common: own for common, own in names.items() if own != common and own in written}


def config_defaults(known: Any) -> dict[str, Any]:
    """Return the defaults of the configuration class, by common name.

    A default that depends on another value (as many key heads as heads) is left out.
    """
    defaults = {}
    for name in COMMON:
        value = _read(known, name)
        if type(value) is int and not _follows(known, name, value):
            defaults[name] = value
    return {**defaults, _TIED: bool(_read(known, _TIED))}


def _read(config: Any, name: str) -> Any:
    # Some configurations have different values per layer, and raise an error.
    try:
        return getattr(config, name, None)
    except Exception:  # noqa: BLE001  # classes of transformers raise any exception
        return None


def _follows(known: Any, name: str, value: int) -> bool:
    """Whether a value is computed from others, found by changing those."""
    for other, factor in (("num_attention_heads", 2), ("hidden_size", 2)):
        base = _read(known, other)
        if other == name or type(base) is not int:
            continue
        # A class may refuse sizes that do not fit together; then this one is no evidence.
        try:
            changed = type(known)(**{other: base * factor})
        except Exception:  # noqa: BLE001, S112
            continue
        if _read(changed, name) != value:
            return True
    return False
