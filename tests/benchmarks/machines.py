"""The split that ``splitlearn plan --over`` proposes for given speeds, and what it takes: four servers, one owner.

The servers are processes on this machine, with different numbers of threads for a forward. Their speeds are measured on
one trunk; then the proposed trunks are served, and the owner generates through all of them. One text passes one server
after the other, so that the servers do not compute at once although they share the cores; threads beyond the number of
cores make a server slow, which is how servers get different here. Threads that wait for work do so without a core.

The owner's memory is that of bottom and top around the one trunk: a plan gives as many layers to an owner as fit there.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from typing import Any

from checkpoints import GB, Checkpoint, qwen2
from measuring import MeasurementError, Session, in_fresh_process, read_through, say
from report import Row, Sample

from serving import served

NAME = "machines"
#: Threads of the servers.
_THREADS = (1, 2, 3, 4)
_PROMPT, _NEW, _WARM = 8, 48, 4
_MEMORY = 100 * GB


def run(session: Session) -> None:
    for checkpoint in session.models((qwen2,)):
        read_through(checkpoint.files)
        _compare(session, checkpoint)


def _compare(session: Session, checkpoint: Checkpoint) -> None:
    recipe = checkpoint.recipe
    what = f"{recipe.name} over {len(_THREADS)} servers of {', '.join(map(str, _THREADS))} threads"
    say(f"  {what}")
    job = {"directory": str(checkpoint.directory), "cut": recipe.cut, "vocabulary": recipe.vocabulary}
    try:
        answers = [in_fresh_process(NAME, job) for _ in range(session.runs)]
    except MeasurementError as error:
        session.add(Row(NAME, what, note=str(error)))
        return
    rows = (("a token", "planned", "measured"), ("its slowest trunk", "planned_slowest", "measured_slowest"))
    for title, planned, measured in rows:
        ours, theirs = (Sample.of((1000 * answer[name] for answer in answers), "ms") for name in (planned, measured))
        ratio = Sample.of((answer[planned] / answer[measured] for answer in answers), "").median
        session.add(Row(NAME, f"{what}: {title} as planned", ours, "measured", theirs, ratio, note=_note(answers[-1])))


def _note(answer: dict[str, Any]) -> str:
    speeds = ", ".join(f"{speed / 1e9:.2f}" for speed in answer["speeds"])
    stages = ", ".join(f"{1000 * planned:.1f} / {1000 * measured:.1f}" for planned, measured in answer["stages"])
    return (
        f"cuts {' '.join(map(str, answer['split_points']))}; owner and servers read {speeds} GB/s, and take {stages} "
        "ms, planned / measured; all share the cores of this machine"
    )


def work(job: dict[str, Any]) -> dict[str, Any]:
    """Measure speeds, have the split proposed, and measure it."""
    # For this process and its servers; libgomp reads it when torch is imported.
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    import torch

    from splitlearn_core import SplitCausalLM, connect, load_split_model

    with torch.no_grad():
        bottom, middle, top = _pieces(job)
        owner = bottom.memory + top.memory, (bottom.read + top.read) / _owner_seconds(job), 0.0
        machines = [owner]
        for threads in _THREADS:
            seconds, delay = _server_seconds(job, threads)
            machines.append((_MEMORY, middle.read / seconds, delay))
        proposal = _proposed(job["directory"], machines)
        cuts = proposal["split_points"]
        with ExitStack() as stack:
            parts = [f"trunk{number}" for number in range(1, len(_THREADS) + 1)]
            here = load_split_model(None, cuts, job["directory"], parts=("bottom", "top"), progress=False)
            trunks = []
            for part, threads in zip(parts, _THREADS, strict=True):
                url, _ = stack.enter_context(served({**job, "cut": cuts}, part=part, threads=threads))
                trunks.append(connect(url))
            computed: list[list[float]] = [_computed_by(trunk.host) for trunk in trunks]
            model = SplitCausalLM(here.bottom, *trunks, here.top).eval()
            seconds = _token_seconds(model, job["vocabulary"])
            for trunk in trunks:
                trunk.close()
    each = [statistics.median(times[-_NEW:]) for times in computed]
    planned = [machine["seconds_per_token"] for machine in proposal["machines"]]
    delays = sum(machine["delay_seconds"] for machine in proposal["machines"])
    return {
        "split_points": cuts,
        "speeds": [speed for _, speed, _ in machines],
        "planned": proposal["seconds_per_token"],
        "measured": seconds,
        "planned_slowest": max(planned[1:]),
        "measured_slowest": max(each),
        "stages": [*zip(planned, [seconds - delays - sum(each), *each], strict=True)],
    }


def _pieces(job: dict[str, Any]) -> list[Any]:
    """Return bottom, trunk and top as plans count them, with caches for one token."""
    from splitlearn_core.api import plan_opened
    from splitlearn_core.loading.opening import open_model
    from splitlearn_core.plan.machines import pieces_of

    opened = open_model(job["directory"])
    plan = plan_opened(opened, tuple(job["cut"]), ("bottom", "trunk", "top"), "auto")
    return pieces_of(plan, opened.family, 1)


def _owner_seconds(job: dict[str, Any]) -> float:
    """Return the seconds that bottom and top take here for a token."""
    import torch

    from splitlearn_core import load_split_model

    parts = load_split_model(None, tuple(job["cut"]), job["directory"], parts=("bottom", "top"), progress=False)
    caches = [part.new_cache() for part in (parts.bottom, parts.top)]
    times = []
    for tokens in (_PROMPT, *[1] * _NEW):
        ids = torch.ones(1, tokens, dtype=torch.long)
        begin = time.perf_counter()
        hidden = parts.bottom(input_ids=ids, past_key_values=caches[0])
        parts.top(hidden_states=hidden, past_key_values=caches[1], logits_to_keep=1)
        times.append(time.perf_counter() - begin)
    return statistics.median(times[_WARM:])


def _server_seconds(job: dict[str, Any], threads: int) -> tuple[float, float]:
    """Return the seconds that a server computes for a token, and those of a request besides."""
    import torch

    from splitlearn_core import connect

    with served(job, threads=threads) as (url, _):
        trunk = connect(url)
        computed, cache, times = _computed_by(trunk.host), trunk.new_cache(), []
        for tokens in (_PROMPT, *[1] * _NEW):
            states = torch.randn(1, tokens, trunk.facts.hidden_size).to(trunk.dtype)
            begin = time.perf_counter()
            trunk(hidden_states=states, past_key_values=cache)
            times.append(time.perf_counter() - begin)
        trunk.close()
    delay = statistics.median(whole - own for whole, own in zip(times[_WARM:], computed[_WARM:], strict=True))
    return statistics.median(computed[_WARM:]), delay


def _computed_by(host: Any) -> list[float]:
    """Return a list that gets the seconds of each forward at a host."""
    seconds: list[float] = []
    send = host.request

    def request(frame: Any, *arguments: Any) -> Any:
        reply = send(frame, *arguments)
        if "computed" in reply.meta:
            seconds.append(reply.meta["computed"])
        return reply

    host.request = request
    return seconds


def _proposed(directory: str, machines: list[tuple[int, float, float]]) -> dict[str, Any]:
    names = ("owner", *(f"threads{threads}" for threads in _THREADS))
    command = [sys.executable, "-m", "splitlearn_core", "plan", directory, "--json", "--tokens", "1"]
    for name, (memory, speed, delay) in zip(names, machines, strict=True):
        command += ["--over", f"{name}={memory}:{int(speed)}/s:{1000 * delay:.4f}ms"]
    proposal: dict[str, Any] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return proposal


def _token_seconds(model: Any, vocabulary: int) -> float:
    """Return the seconds of a token that is generated, without the prompt."""
    import torch

    ids = torch.randint(vocabulary - 2, (1, _PROMPT), generator=torch.Generator().manual_seed(0))
    output = model(ids, use_cache=True, logits_to_keep=1)
    times = []
    for _ in range(_NEW):
        token = output.logits[:, -1:].argmax(-1)
        begin = time.perf_counter()
        output = model(token, past_key_values=output.past_key_values, use_cache=True, logits_to_keep=1)
        times.append(time.perf_counter() - begin)
    return statistics.median(times[_WARM:])
