"""Bottom, trunk and top in one process against the unsplit model: greedy decoding, and the prefill.

Both models map the same file and take turns in one process; each round gives one ratio.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from checkpoints import Checkpoint, gpt2, qwen2
from loaders import Job, from_pretrained, split_model
from measuring import MeasurementError, Session, in_fresh_process, read_through, say
from report import Row, Sample

NAME = "generation"
_SHARE = 0.97
_PROMPT, _NEW, _PREFILL = 32, 64, 512
_ROUNDS_PER_RUN = 3


def run(session: Session) -> None:
    for checkpoint in session.models((gpt2, qwen2)):
        read_through(checkpoint.files)
        say(f"  {checkpoint.recipe.name}")
        prefill = _PREFILL // 8 if session.quick else _PREFILL
        job = {
            "directory": str(checkpoint.directory),
            "cut": checkpoint.recipe.cut,
            "vocabulary": checkpoint.recipe.vocabulary,
            "rounds": session.runs * _ROUNDS_PER_RUN,
            "prefill": prefill,
        }
        try:
            answer = in_fresh_process("generation", job)
        except MeasurementError as error:
            session.add(Row(NAME, checkpoint.recipe.name, note=str(error)))
            continue
        session.add(
            _row(checkpoint, f"{_NEW} tokens after {_PROMPT}", answer["decode"], _NEW),
            _row(checkpoint, f"prefill of {prefill}", answer["prefill"], prefill),
        )


def _row(checkpoint: Checkpoint, what: str, answer: dict[str, Any], tokens: int) -> Row:
    ratios = Sample.of((whole / split for split, whole in answer["seconds"]), "")
    split, whole = (Sample.of((tokens / pair[side] for pair in answer["seconds"]), "tok/s") for side in (0, 1))
    return Row(
        NAME,
        f"{checkpoint.recipe.name}, {what}",
        split,
        "unsplit",
        whole,
        ratios.median,
        f">= {_SHARE:g} of it",
        ratios.median >= _SHARE,
        "" if answer["equal"] else "the outputs differ",
    )


def work(job: dict[str, Any]) -> dict[str, Any]:
    """Let both models do the same, alternately, and compare what they answer."""
    import torch

    target = Job(job["directory"], tuple(job["cut"]))
    models = (split_model(target), from_pretrained(target))
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(job["vocabulary"] - 2, (1, job["prefill"]), generator=generator)
    with torch.inference_mode():
        return {
            "decode": alternate([decoding(model, text[:, :_PROMPT]) for model in models], job["rounds"]),
            "prefill": alternate([prefill(model, text) for model in models], job["rounds"]),
        }


def decoding(model: Any, prompt: Any, new: int = _NEW) -> Callable[[], Any]:
    import torch

    options = {"do_sample": False, "min_new_tokens": new, "max_new_tokens": new, "pad_token_id": 0}
    mask = torch.ones_like(prompt)
    return lambda: model.generate(prompt, attention_mask=mask, **options)


def prefill(model: Any, text: Any) -> Callable[[], Any]:
    return lambda: model(text, use_cache=True, logits_to_keep=1).logits


def alternate(actions: list[Callable[[], Any]], rounds: int) -> dict[str, Any]:
    """Time two actions in turns; which one is first changes from round to round."""
    import torch

    equal = torch.equal(*(action() for action in actions))
    seconds = []
    for number in range(rounds):
        pair = [0.0, 0.0]
        for side in (0, 1) if number % 2 else (1, 0):
            begin = time.perf_counter()
            actions[side]()
            pair[side] = time.perf_counter() - begin
        seconds.append(pair)
    return {"equal": equal, "seconds": seconds}
