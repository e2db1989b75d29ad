"""Examine a model type in a process of its own, which neither stalls nor ends the one that needs the answer."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from splitlearn_auto.answers import Answer, UnprovenSetting, answer_from
from splitlearn_auto.findings import CannotSplitError
from splitlearn_core import ConfigurationError
from splitlearn_core.extension import command_for, ending, reserve_stdout

if TYPE_CHECKING:
    from splitlearn_auto.findings import Derived

#: Seconds between two calls of the callback; and after which an examination is given up.
_CALL_EVERY, _LIMIT = 0.1, 900.0
#: Tiny models need one thread, no GPU, and nothing from the Hub.
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
#: Lines of stderr in a message.
_LINES = 3
#: The dtype in which a model may differ although it is equal in float32, and its names in config.json, new and old.
_BFLOAT16, _DTYPE_FIELDS = "bfloat16", ("dtype", "torch_dtype")


class ExaminationError(Exception):
    """An examination ended without an answer."""


def examine_apart(model_type: str, waiting: Callable[[], None]) -> tuple[Answer, bool]:
    """Examine a model type in another process.

    Args:
        model_type: The type.
        waiting: Called several times a second; may raise, which ends the process.

    Returns:
        The answer, and whether it holds for as long as the installed versions stay.

    Raises:
        ExaminationError: The process ended without an answer, or took too long.
    """
    try:
        process = subprocess.Popen(  # noqa: S603  # this interpreter and a function of ours
            command_for(print_answer, model_type),
            env={**os.environ, **_ENVIRONMENT},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
        )
    except OSError as error:
        raise ExaminationError(f"no process could be started: {error}") from error
    with process:
        try:
            output, errors = _outcome(process, waiting)
        except BaseException:
            process.kill()
            raise
    try:
        values = json.loads(output)
        return answer_from(values["answer"], model_type), bool(values["lasts"])
    except (ValueError, KeyError, TypeError) as error:
        said = " / ".join(errors.strip().splitlines()[-_LINES:])
        raise ExaminationError(f"it {ending(process.returncode)}: {said or error}") from error


def _outcome(process: subprocess.Popen[str], waiting: Callable[[], None]) -> tuple[str, str]:
    deadline = time.monotonic() + _LIMIT
    while True:
        waiting()
        try:
            return process.communicate(timeout=_CALL_EVERY)
        except subprocess.TimeoutExpired as error:
            if time.monotonic() > deadline:
                raise ExaminationError(f"it took more than {_LIMIT:.0f} s") from error


def print_answer(model_type: str) -> None:
    """Examine a model type, and print the answer: what the other process runs."""
    results = reserve_stdout()
    answer, lasts = answer_about(model_type)
    results.write(json.dumps({"answer": answer.to_dict(), "lasts": lasts}))
    results.close()


def answer_about(model_type: str) -> tuple[Answer, bool]:
    """Examine a model type in this process; returns what :func:`examine_apart` does."""
    from splitlearn_auto.examining import examine

    try:
        derived = examine(model_type, {})
    except CannotSplitError as error:
        # Too little memory, a full disk, or a package that is missing, is no property of the type.
        lasts = not isinstance(error.__cause__, MemoryError | OSError | ImportError)
        return Answer(refusal=error.message, hint=_hint(error.hint, model_type)), lasts
    except ConfigurationError as error:
        # transformers has no such type. Not kept: the name is whatever a file says.
        return Answer(refusal=error.message, hint=f"{error.hint}; code of a checkpoint is never run"), False
    return _proven(derived, model_type), True


def _proven(derived: Derived, model_type: str) -> Answer:
    """Return the answer for what was derived: a refusal if a question is left, in which case it is not proven."""
    if derived.questions:
        question = derived.questions[0]
        return Answer(
            refusal=f"{question.text} {question.seen}",
            hint=f"splitlearn plugins new {model_type} --out DIR writes a package with that question",
        )
    return Answer(derived.fields, (*derived.unproven, *_unproven_dtypes(derived)), derived.decoders)


def _unproven_dtypes(derived: Derived) -> Iterator[UnprovenSetting]:
    """Yield a setting if a split model differs in bfloat16: other dtypes in config.json than the proven ones."""
    for note in derived.notes if _BFLOAT16 not in derived.dtypes else ():
        if note.startswith(f"in {_BFLOAT16}"):
            names = dict.fromkeys(_DTYPE_FIELDS, _BFLOAT16), dict.fromkeys(_DTYPE_FIELDS, derived.dtypes[0])
            yield UnprovenSetting(*names, note)


def _hint(hint: str, model_type: str) -> str:
    if "--from" in hint:
        return f"splitlearn plugins new {model_type} --from FILE --out DIR examines the model of a config.json"
    return hint or "the manager loads such a model as a whole, with model_type 'huggingface'"
