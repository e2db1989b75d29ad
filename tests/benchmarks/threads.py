"""Two loads at once in threads of one process, twelve times: is every model whole?

A model is right when it computes, to the last bit, what one loaded alone computes.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

from checkpoints import Checkpoint, gpt2, qwen2
from loaders import LOADERS, Job, from_pretrained, model_class, split_model
from measuring import MeasurementError, Session, in_fresh_process, read_through
from report import Row, Sample
from trunk import digest

NAME = "threads"
_ROUNDS, _AT_ONCE, _TOKENS = 12, 2, 8


def run(session: Session) -> None:
    for checkpoint in session.models((gpt2, qwen2)):
        read_through(checkpoint.files)
        try:
            expected = _answer(checkpoint, "whole", rounds=1, at_once=1)["digests"][0]
            answers = {name: _answer(checkpoint, name, rounds=_ROUNDS, at_once=_AT_ONCE) for name in ("ours", "whole")}
        except MeasurementError as error:
            session.add(Row(NAME, checkpoint.recipe.name, note=str(error)))
            continue
        session.add(_row(checkpoint, expected, answers))


def _row(checkpoint: Checkpoint, expected: str, answers: dict[str, dict[str, Any]]) -> Row:
    of, title = _ROUNDS * _AT_ONCE, LOADERS["whole"].title
    right = {name: sum(found == expected for found in answer["digests"]) for name, answer in answers.items()}
    faults = [
        f"{LOADERS[name].title}: {count} x {what}"
        for name, answer in answers.items()
        for what, count in Counter(_fault(found) for found in answer["digests"] if found != expected).most_common(3)
    ]
    return Row(
        NAME,
        f"{checkpoint.recipe.name}, models that are right",
        Sample.of([right["ours"]], f"of {of}"),
        title,
        Sample.of([right["whole"]], f"of {of}"),
        target=f"{of} of {of}",
        reached=right["ours"] == of,
        note="; ".join(faults),
    )


def _fault(found: str) -> str:
    return found if ":" in found else "no exception: other numbers"


def _answer(checkpoint: Checkpoint, loader: str, *, rounds: int, at_once: int) -> dict[str, Any]:
    job = {
        "loader": loader,
        "directory": str(checkpoint.directory),
        "cut": checkpoint.recipe.cut,
        "rounds": rounds,
        "at_once": at_once,
    }
    return in_fresh_process("threads", job)


def work(job: dict[str, Any]) -> dict[str, Any]:
    """Load several at once, round after round, and say what each of the models computes."""
    model_class(job["directory"])
    load = {"ours": split_model, "whole": from_pretrained}[job["loader"]]
    target = Job(job["directory"], tuple(job["cut"]))
    digests = []
    for _ in range(job["rounds"]):
        digests += [_computed(found) for found in _at_once(job["at_once"], lambda: load(target))]
    return {"digests": digests}


def _at_once(count: int, load: Callable[[], Any]) -> list[Any]:
    """Call ``load`` in several threads that start together; a failure is an answer too."""
    barrier = threading.Barrier(count)
    found: list[Any] = []

    def one() -> None:
        barrier.wait()
        try:
            found.append(load())
        except Exception as error:  # noqa: BLE001  # whatever it is, the model is not right
            found.append(error)

    threads = [threading.Thread(target=one) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def _computed(model: Any) -> str:
    import torch

    if isinstance(model, Exception):
        return f"load: {type(model).__name__}: {str(model)[:80]}"
    try:
        with torch.inference_mode():
            found = digest(model(torch.arange(_TOKENS)[None], use_cache=False).logits)
        # A forward does not complain of weights without memory; it answers with whatever lies there.
        empty = [name for name, weight in model.named_parameters() if weight.is_meta]
        return f"no exception: {empty[0]} has no memory" if empty else found
    except Exception as error:  # noqa: BLE001  # as above
        return f"forward: {type(error).__name__}: {str(error)[:80]}"
