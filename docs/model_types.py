"""Examine every causal model type of the installed transformers, and write the answers into ``model-types.md``.

    python docs/model_types.py

splits a small model of each type by the family that ``splitlearn plugins new`` derives, each in a process of its own
with a time limit. Answers are kept in ``--rows`` as they come, and a run continues there. One column of the table is
written, that of the installed version: run it with the newest and with the oldest that is supported.

    python docs/model_types.py mistral3 llava

examines these alone. Types of several models that are no causal types of transformers have a table of their own, with
those that were examined; rows that were not examined again stay as they are.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

PAGE = Path(__file__).with_name("model-types.md")
PRELOADED = ["torch", "transformers.models.auto.modeling_auto", "splitlearn_auto.examining", "model_types"]
NOT_THERE = "-"
#: The list of the types that are used most, and the line after it, which is written.
_MOST_USED = re.compile(r"(?<=<!-- most used -->\n)(?P<list>[^<]*)<!-- of these -->\n.*$", re.MULTILINE)
_HEADING = re.compile(r"^\| type \|.*$", re.MULTILINE)
#: The heading of the second table.
SEVERAL = "## Models that also see or hear"
#: Figures of a reason that depend on the machine.
_FIGURE = re.compile(r"\bup to [-+.\de]+")
_LONGEST = 300


def main() -> None:
    """Examine what is not in the rows yet, and write the page."""
    import transformers

    version = transformers.__version__
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="only these, and whether they were examined or not")
    parser.add_argument("--rows", type=Path, default=Path(f"build/model-types-{version}.jsonl"))
    parser.add_argument("--again", action="store_true", help="also those that could not be split in an earlier run")
    parser.add_argument("--seconds", type=float, default=600, help="the limit of each type")
    options = parser.parse_args()
    options.rows.parent.mkdir(parents=True, exist_ok=True)
    answers = kept_answers(options.rows)
    every = causal_types()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    done = {name for name, answer in answers.items() if splits(answer) or not options.again}
    for model_type in options.types or [name for name in every if name not in done]:
        answer = examined_apart(context, model_type, options.seconds)
        print(f"{model_type}: {answer}", flush=True)
        with options.rows.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"type": model_type, "answer": answer}) + "\n")
        answers[model_type] = answer
    PAGE.write_text(with_answers(PAGE.read_text(encoding="utf-8"), version, answers, every), encoding="utf-8")


def with_answers(page: str, version: str, answers: Mapping[str, str], causal: Sequence[str]) -> str:
    """Return a page with answers in both of its tables; the first stays as it is while types are missing."""
    parts = list(page.partition(SEVERAL))
    for number, chosen in ((0, answers.keys() & causal), (2, answers.keys() - causal)):
        known = columns(parts[number]).get(version, {}) | {name: answers[name] for name in chosen}
        if known and (number or set(causal) <= known.keys()):
            parts[number] = with_column(parts[number], version, known)
    if parts[1]:
        parts[0] = f"{parts[0].rstrip()}\n\n"
    return with_count("".join(parts))


def kept_answers(rows: Path) -> dict[str, str]:
    """Return the answers of earlier runs; the last one of a type counts."""
    lines = rows.read_text(encoding="utf-8").splitlines() if rows.exists() else []
    return {row["type"]: row["answer"] for row in map(json.loads, lines)}


def causal_types() -> list[str]:
    """Return the model types for which transformers has a causal language model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def examined_apart(context: multiprocessing.context.ForkServerContext, model_type: str, seconds: float) -> str:
    """Return the answer for a type, from a process of its own."""
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_answer, args=(sender, model_type))
    process.start()
    sender.close()
    try:
        if receiver.poll(seconds):
            return str(receiver.recv())
        return f"no: not examined in {seconds:g} seconds"
    except EOFError:
        process.join()
        return f"no: the process that examined it ended with code {process.exitcode}"
    finally:
        process.kill()
        process.join()


def _send_answer(sender: Connection, model_type: str) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    sender.send(examined(model_type))


def examined(model_type: str) -> str:
    """Return whether models of a type can be split, and otherwise why not."""
    from splitlearn_auto.examining import examine
    from splitlearn_core import SplitLearnError
    from splitlearn_core.plugins.known import PACKAGES

    if model_type in PACKAGES:
        return f"yes, by {PACKAGES[model_type]}"
    try:
        derived = examine(model_type, {}, settings=False)
    except SplitLearnError as error:
        return f"no: {_one_line(error.message, model_type)}"
    if derived.questions:
        return f"no: {_one_line(derived.questions[0].seen, model_type)}"
    limits = [f"{name}={value!r}" for name, value in derived.fields.get("required_values", {}).items()]
    limits += [f"in {derived.dtypes[0]}"] if len(derived.dtypes) == 1 else []
    return ", ".join(["yes", *limits])


def _one_line(message: str, model_type: str) -> str:
    text = " ".join(message.removeprefix(f"{model_type} cannot be split: ").split())
    text = _FIGURE.sub("some", text)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def columns(page: str) -> dict[str, dict[str, str]]:
    """Return the answers of the first table of a text: version -> type -> answer."""
    heading = _HEADING.search(page)
    if heading is None:
        raise ValueError("the page has no table of types")
    names = [cell.split()[0] for cell in _cells(heading[0])[1:]]
    found: dict[str, dict[str, str]] = {name: {} for name in names}
    for line in page[heading.end() :].partition("\n## ")[0].splitlines():
        if line.startswith("| `"):
            model_type, *answers = _cells(line)
            for name, answer in zip(names, answers, strict=True):
                if answer != NOT_THERE:
                    found[name][model_type.strip("`")] = answer
    return found


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def with_column(page: str, version: str, answers: Mapping[str, str]) -> str:
    """Return a page with the answers for a version of transformers; others keep their column, the newest first."""
    known = {**columns(page), version: dict(answers)}
    newest_first = sorted(known, key=lambda name: tuple(map(int, name.split("."))), reverse=True)
    heads = [f"{name} ({sum(map(splits, known[name].values()))} of {len(known[name])})" for name in newest_first]
    types = sorted({model_type for answers in known.values() for model_type in answers})
    rows = [[f"`{each}`", *(_cell(known[name].get(each, NOT_THERE)) for name in newest_first)] for each in types]
    lines = [" | ".join(cells) for cells in (["type", *heads], ["---"] * (1 + len(heads)), *rows)]
    heading = _HEADING.search(page)
    before = page[: heading.start()] if heading else page
    return before + "".join(f"| {line} |\n" for line in lines)


def most_used(page: str) -> list[str]:
    """Return the types that a page names as used most."""
    found = _MOST_USED.search(page)
    return re.findall(r"`([^`]+)`", found["list"]) if found else []


def with_count(page: str) -> str:
    """Return a page that says how many of the types that are used most can be split, by its newest column."""
    answers = next(iter(columns(page).values()), {})
    used = most_used(page)
    refused = [f"`{name}`" for name in used if not splits(answers.get(name, NOT_THERE))]
    line = f"All {len(used)} can be split."
    if refused:
        line = f"Of these {len(used)}, {len(used) - len(refused)} can be split; not: {', '.join(refused)}."
    return _MOST_USED.sub(lambda found: f"{found['list']}<!-- of these -->\n{line}", page)


def _cell(answer: str) -> str:
    return answer.replace("|", "/").replace("<", "&lt;")


def splits(answer: str) -> bool:
    """Return whether an answer says that models of the type can be split."""
    return answer.startswith("yes")


if __name__ == "__main__":
    main()
