"""Trunks on several servers that send their outputs on, next to one server with all of their layers.

On one machine the servers share its cores, and the threads of a process keep one for milliseconds after each forward,
while the next server computes. So the time of computing is counted, too, and the note says how much of a miss that is.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from checkpoints import Checkpoint, qwen2
from generation import decoding
from loaders import Job, split_model
from measuring import MeasurementError, Session, in_fresh_process, read_through, say
from report import Row, Sample

from serving import DELAY_MS, PROMPT, delayed, served

NAME = "chains"
_SHARE = 0.95
_HOPS = (2, 4)
#: Few tokens in each turn, so that what is compared is near in time on a machine whose speed changes.
_NEW, _ROUNDS_PER_RUN = 16, 4


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
        "rounds": _ROUNDS_PER_RUN * session.runs,
    }
    try:
        answer = in_fresh_process("chains", job)
    except MeasurementError as error:
        session.add(Row(NAME, what, note=str(error)))
        return
    note = "" if answer["equal"] else "; the outputs differ"
    chain, star, one, *far = list(zip(*answer["seconds"], strict=True))[:-2]
    ours, through, peer = (Sample.of((_NEW / each for each in seconds), "tok/s") for seconds in (chain, star, one))
    # A server more receives a request, and answers it, for each token.
    less = Sample.of((_NEW / (each + (hops - 1) * _NEW * answer["hop"]) for each in one), "tok/s")
    ratio = Sample.of((o / t for o, t in zip(ours.values, less.values, strict=True)), "").median
    bound = f"one server alone: {peer}; a hop takes {1000 * answer['hop']:.2f} ms; {_most(answer, less, hops)}{note}"
    session.add(
        Row(NAME, what, ours, "one trunk, less the hops", less, ratio, f">= {_SHARE:g} of it", ratio >= _SHARE, bound),
        Row(NAME, what, ours, "through the owner", through, ours.median / through.median),
    )
    ours, through = (Sample.of((_NEW / each for each in seconds), "tok/s") for seconds in far)
    what = f"{what}, {DELAY_MS:g} ms away, next to each other"
    session.add(Row(NAME, what, ours, "through the owner", through, ours.median / through.median, note=note[2:]))


def _most(answer: dict[str, Any], less: Sample, hops: int) -> str:
    """Say what of a miss is the machine's: the same trunks compute more slowly in processes that share its cores."""
    *_, inside, cut = zip(*answer["seconds"], strict=True)
    chain, _, one, *_ = zip(*answer["computing"], strict=True)
    apart, alone, together, whole = (1000 / _NEW * statistics.median(each) for each in (chain, one, cut, inside))
    # More cuts cost a little in one process, too.
    slower = max(0.0, apart - alone - max(0.0, together - whole))
    share = 1 / (1 + slower / 1000 * less.median)
    return (
        f"a token is computed in {apart:.1f} ms in the chain and {alone:.1f} with one server, in one process in "
        f"{together:.1f} and {whole:.1f}: {hops + 1} processes on {os.cpu_count()} cores cost {slower:.1f} ms, and "
        f"leave at most {share:.2f}"
    )


def work(job: dict[str, Any]) -> dict[str, Any]:
    """Time the same generation over a chain, a star and one server, here and at a distance from its owner, in turns."""
    import torch

    from splitlearn_core import RemoteComponent, SplitCausalLM, connect

    inline = split_model(Job(job["directory"], tuple(job["cut"])))
    # Components know their cuts, and must agree on them.
    several = split_model(Job(job["directory"], tuple(job["cuts"])))
    ends = several.components
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
        models += [inline, several]
        carried: list[float] = []
        send = one.host.request

        def request(frame: Any, *arguments: Any) -> Any:
            begin = time.perf_counter()
            reply = send(frame, *arguments)
            carried.append(time.perf_counter() - begin - reply.meta.get("computed", 0.0))
            return reply

        computed = 0.0

        def count(seconds: float) -> None:
            nonlocal computed
            computed += seconds

        for model in models[:-2]:
            for part in model.components:
                if isinstance(part, RemoteComponent):
                    _count_replies(part.host, count)
        for part in (model.components[place] for model in (inline, several) for place in (0, -1)):
            _count_forwards(part, count)
        actions = [decoding(model, prompt, _NEW) for model in models]
        expected = decoding(inline, prompt, _NEW)()
        equal = all(torch.equal(action(), expected) for action in actions)
        one.host.request = request
        seconds, computing = [], []
        for number in range(job["rounds"]):
            row, its_own = [0.0] * len(actions), [0.0] * len(actions)
            # Which one is first changes from round to round.
            for place in range(len(actions)):
                turn = (place + number) % len(actions)
                computed, begin = 0.0, time.perf_counter()
                actions[turn]()
                row[turn], its_own[turn] = time.perf_counter() - begin, computed
            seconds.append(row)
            computing.append(its_own)
        hop = sorted(carried)[len(carried) // 2]
        return {"equal": equal, "seconds": seconds, "computing": computing, "hop": hop}


def _count_replies(host: Any, count: Callable[[float], None]) -> None:
    """Count the time that a host says it has computed, of replies that are asked for later, too."""
    receive = host._received

    def received(*arguments: Any) -> Any:
        reply = receive(*arguments)
        count(reply.meta.get("computed", 0.0))
        return reply

    host._received = received


def _count_forwards(part: Any, count: Callable[[float], None]) -> None:
    forward = part.forward

    def timed(*arguments: Any, **named: Any) -> Any:
        begin = time.perf_counter()
        try:
            return forward(*arguments, **named)
        finally:
            count(time.perf_counter() - begin)

    part.forward = timed
