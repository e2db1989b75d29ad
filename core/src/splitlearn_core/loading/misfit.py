"""Tensors that do not fit: what is wrong in few lines, and what may be the cause."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from splitlearn_core.plan.evenness import number_ranges

#: The number of a layer in a name (``model.layers.3.mlp.weight``) or in words (``layer 3``).
_NUMBER = re.compile(r"(?<=[. ])\d+(?=\.|$)")


def folded(problems: Sequence[str]) -> list[str]:
    """Make one line of those that differ in nothing but the layer, where the first of them stood."""
    alike: dict[str, list[str]] = {}
    for problem in problems:
        number = _NUMBER.search(problem)
        # The same number may come twice, in a checkpoint's name and in the module's.
        pattern = re.sub(rf"(?<=[. ]){number[0]}(?=\.|$)", "{}", problem) if number else problem
        alike.setdefault(pattern, []).append(number[0] if number else "")
    return [
        pattern.replace("{}", numbers[0] if len(numbers) == 1 else f"{{{number_ranges(sorted(map(int, numbers)))}}}")
        if numbers[0]
        else pattern
        for pattern, numbers in alike.items()
    ]


def likely_cause(problems: Sequence[str], model_type: str) -> str:
    """Say where to look, by the kinds of faults there are.

    Args:
        problems: Each begins with its kind: ``missing:``, ``unexpected:``, ``mis-shaped:``, ``mis-typed:``, ``twice:``.
        model_type: Of the family that names the modules.
    """
    kinds = Counter(problem.partition(":")[0] for problem in problems)
    if kinds["mis-shaped"] * 2 > len(problems):
        return "config.json has other sizes than the weights: is it the one that belongs to them?"
    if kinds["missing"] and kinds["unexpected"]:
        return (
            "the names are others than a model of the type has: config.json is of another model than the weights, "
            f"or the family names its modules wrongly (splitlearn plugins test {model_type} tells)"
        )
    if kinds["missing"] == len(problems):
        return "is the checkpoint complete, and has config.json as many layers as it (num_hidden_layers)?"
    if kinds["unexpected"] == len(problems):
        return (
            'the weights hold more than a model by config.json: is it a causal model (see its "architectures"), '
            "with as many layers as num_hidden_layers says?"
        )
    return 'do config.json and the weights belong together, and is it a causal model (see its "architectures")?'
