"""Inputs of the models in the checks."""

from __future__ import annotations

from typing import Any

import torch

#: A batch of one, and a batch of two whose first row is padded on the left.
PADDINGS = (None, 3)
PROMPT_TOKENS = 7
#: Token ids are below this; ids below 3 are special tokens.
_VOCABULARY = 100


def no_grad(model: Any, **arguments: Any) -> Any:
    """Run a model without gradients."""
    with torch.no_grad():
        return model(**arguments)


def token_ids(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Return random token ids ``[rows, columns]``."""
    return torch.randint(3, _VOCABULARY, (rows, columns), generator=torch.Generator().manual_seed(seed))


def batch(padding: int | None) -> dict[str, torch.Tensor]:
    """Return ``input_ids`` and ``attention_mask`` of a prompt."""
    ids = token_ids(1 if padding is None else 2, PROMPT_TOKENS)
    mask = torch.ones_like(ids)
    if padding is not None:
        ids[0, :padding], mask[0, :padding] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def positions(mask: torch.Tensor) -> torch.Tensor:
    """Return the positions of a batch that is padded on the left."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def labels_of(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return labels ``[rows, columns]`` that ignore the padding."""
    return inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
