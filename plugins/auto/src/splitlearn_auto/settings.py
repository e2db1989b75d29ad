"""What a plan needs of ``config.json``: how a type calls it, and what counts where the file is silent."""

from __future__ import annotations

from typing import Any

#: The names that a plan asks for.
COMMON = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
_TIED = "tie_word_embeddings"


def config_names(known: Any) -> dict[str, str]:
    """Return how a type's ``config.json`` calls the common values, where it has other names for them."""
    written = known.to_dict()
    names = {common: known.attribute_map.get(common, common) for common in COMMON}
    return {common: own for common, own in names.items() if own != common and own in written}


def config_defaults(known: Any) -> dict[str, Any]:
    """Return what the configuration class fills in, by common name.

    A default that follows another value (as many key heads as heads) is no constant, and left out.
    """
    found = {}
    for name in COMMON:
        value = _read(known, name)
        if type(value) is int and not _follows(known, name, value):
            found[name] = value
    return {**found, _TIED: bool(_read(known, _TIED))}


def _read(config: Any, name: str) -> Any:
    # Some configurations refuse to name one value for all layers.
    try:
        return getattr(config, name, None)
    except Exception:  # noqa: BLE001  # transformers' own classes, which raise what they like
        return None


def _follows(known: Any, name: str, value: int) -> bool:
    """Say whether a value is computed of others, by asking for other ones."""
    for other, factor in (("num_attention_heads", 2), ("hidden_size", 2)):
        base = _read(known, other)
        if other == name or type(base) is not int:
            continue
        # A class may refuse sizes that do not go together; then this one tells nothing.
        try:
            changed = type(known)(**{other: base * factor})
        except Exception:  # noqa: BLE001, S112
            continue
        if _read(changed, name) != value:
            return True
    return False
