"""Trunks on several servers that send their outputs on, next to one server with all of their layers."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import Any

from checkpoints import Checkpoint, qwen2
from generation import decoding
from loaders import Job, split_model
from measuring import MeasurementError, Session, in_fresh_process, read_through, say
from report import Row, Sample

from serving import DELAY_MS, NEW, PROMPT, delayed, served

NAME = "chains"
_SHARE = 0.95
_HOPS = (2, 4)


def run(session: Session) -> None:
    for checkpoint in session.models((qwen2,)):
        read_through(checkpoint.files)
        for hops in _HOPS:
            _chain(session, checkpoint, hops)


def _chain(session: Session, checkpoint: Checkpoint, hops: int) -> None:
    recipe = checkpoint.recipe
    what = f"{recipe.name}, a chain of {hops} trunks"
    say(f"  {what}")
    first, last = recipe.cut
    job = {
        "directory": str(checkpoint.directory),
        "cut": [first, last],
        "cuts": [first + (last - first) * number // hops for number in range(hops)] + [last],
        "vocabulary": recipe.vocabulary,
        "rounds": session.runs,
    }
    try:
        answer = in_fresh_process("chains", job)
    except MeasurementError as error:
        session.add(Row(NAME, what, note=str(error)))
        return
    note = "" if answer["equal"] else "; the outputs differ"
    chain, star, one, *far = zip(*answer["seconds"], strict=True)
    ours, through, peer = (Sample.of((NEW / each for each in seconds), "tok/s") for seconds in (chain, star, one))
    # A server more receives a request, and answers it, for each token.
    less = Sample.of((NEW / (each + (hops - 1) * NEW * answer["hop"]) for each in one), "tok/s")
    ratio = Sample.of((o / t for o, t in zip(ours.values, less.values, strict=True)), "").median
    bound = f"one server alone: {peer}; a hop takes {1000 * answer['hop']:.2f} ms{note}"
    session.add(
        Row(NAME, what, ours, "one trunk, less the hops", less, ratio, f">= {_SHARE:g} of it", ratio >= _SHARE, bound),
        Row(NAME, what, ours, "through the owner", through, ours.median / through.median),
    )
    ours, through = (Sample.of((NEW / each for each in seconds), "tok/s") for seconds in far)
    what = f"{what}, {DELAY_MS:g} ms away, next to each other"
    session.add(Row(NAME, what, ours, "through the owner", through, ours.median / through.median, note=note[2:]))


def work(job: dict[str, Any]) -> dict[str, Any]:
    """Time the same generation over a chain, a star and one server, here and at a distance from its owner, in turns."""
    import torch

    from splitlearn_core import SplitCausalLM, connect

    inline = split_model(Job(job["directory"], tuple(job["cut"])))
    # Components know their cuts, and must agree on them.
    ends = split_model(Job(job["directory"], tuple(job["cuts"]))).components
    hops = len(job["cuts"]) - 1
    prompt = torch.randint(job["vocabulary"] - 2, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    with ExitStack() as stack, torch.no_grad():
        urls: list[str] = []
        for number in range(hops, 0, -1):
            following = ["--next", urls[0]] if urls else []
            urls.insert(
                0, stack.enter_context(served({**job, "cut": job["cuts"]}, *following, part=f"trunk{number}"))[0]
            )
        away = [stack.enter_context(delayed(url, DELAY_MS)) for url in urls]
        one = connect(stack.enter_context(served(job))[0])
        models = [
            SplitCausalLM(ends[0], *(connect(url, chain=chain) for url in places), ends[-1])
            for places, chain in ((urls, True), (urls, False), (away, True), (away, False))
        ]
        models.insert(2, SplitCausalLM(inline.components[0], one, inline.components[-1]))
        carried: list[float] = []
        send = one.host.request

        def request(frame: Any, *arguments: Any) -> Any:
            begin = time.perf_counter()
            reply = send(frame, *arguments)
            carried.append(time.perf_counter() - begin - reply.meta.get("computed", 0.0))
            return reply

        actions = [decoding(model, prompt) for model in models]
        expected = decoding(inline, prompt)()
        equal = all(torch.equal(action(), expected) for action in actions)
        one.host.request = request
        seconds = []
        for number in range(job["rounds"]):
            row = [0.0] * len(actions)
            # Which one is first changes from round to round.
            for place in range(len(actions)):
                turn = (place + number) % len(actions)
                begin = time.perf_counter()
                actions[turn]()
                row[turn] = time.perf_counter() - begin
            seconds.append(row)
        return {"equal": equal, "seconds": seconds, "hop": sorted(carried)[len(carried) // 2]}
