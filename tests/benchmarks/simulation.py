"""Many owners on many servers, in virtual time; and on one server, next to what is measured there."""

from __future__ import annotations

import logging
import os
import statistics
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from checkpoints import Checkpoint, qwen2
from measuring import MeasurementError, Session, in_fresh_process, read_through, say
from report import Row, Sample, within
from trunk import TORCH_NAMES

from serving import served

NAME = "simulation"
#: Owners on the one server, and those from whom it is found what work takes; tokens of their prompts, and after it.
_TOGETHER, _FEW, _PROMPT, _NEW = 8, 4, 32, 32
#: Tokens of an owner until all of them have begun: no forward has a part of a prompt then.
_BEGINNING = 12
#: Mode -> tokens of forwards that are timed alone. Packed prompts of all owners are one forward.
_FORWARDS = {"solo": (1, _PROMPT), "packed": (1, _FEW, _TOGETHER, _PROMPT, 4 * _PROMPT)}
#: Connections that are timed, and forwards of each size but that of a token.
_CONNECTIONS, _TIMES = 20, 4
_CALLS = "splitlearn_session_step_seconds_sum"
#: A simulated figure is right within this share of the measured one.
_TOLERANCE = 0.25
#: Seconds between failures of one server of the many, and the share of exchanges whose connection breaks.
_LIFE, _BREAKS = 60.0, 0.005
#: Their bursts follow each other so fast that forwards of texts, each alone, would take this share of the time.
_LOAD = 0.6
#: Tokens after a prompt there, on average.
_TEXT = 24
_MODES = ("solo", "packed")


def run(session: Session) -> None:
    costs: dict[str, Any] = {}
    for checkpoint in session.models((qwen2,)):
        read_through(checkpoint.files)
        for mode in _MODES:
            costs[mode] = _one_server(session, checkpoint, mode)
    for mode in _MODES:
        _many_servers(session, mode, costs.get(mode))


def work(job: dict[str, Any]) -> dict[str, Any]:
    return {"measured": _measure, "simulated": _simulate}[job["what"]](job)


def _answer(session: Session, what: str, job: dict[str, Any]) -> dict[str, Any] | None:
    say(f"  {what}")
    try:
        return in_fresh_process(NAME, job)
    except MeasurementError as error:
        session.add(Row(NAME, what, note=str(error)))
        return None


def _simulate(job: dict[str, Any]) -> dict[str, Any]:
    """Simulate each of ``scenarios``, on a trunk of one small layer."""
    from simulated_servers import Costs, Line
    from simulated_world import Scenario, simulate

    from splitlearn_core import load_split_model
    from splitlearn_core.testing.worlds import tiny_model, write_checkpoint

    # They tell of each server that is away.
    logging.getLogger("splitlearn_core").setLevel(logging.ERROR)
    logging.getLogger("splitlearn_serve").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(folder, tiny_model("qwen2", num_hidden_layers=3))
        trunk = load_split_model(None, (1, 2), folder, parts=("trunk",), progress=False).trunk
        answers = []
        for scenario in job["scenarios"]:
            values = {name: value for name, value in scenario.items() if value is not None}
            if "costs" in values:
                values["costs"] = Costs(**{**values["costs"], "forwards": [*map(tuple, values["costs"]["forwards"])]})
            if "fast" in values:
                values["fast"] = Line(values["fast"])
            answers.append(simulate(Scenario(**values), trunk))
        return {"answers": answers}


# --- one server ---------------------------------------------------------------------------------------


def _one_server(session: Session, checkpoint: Checkpoint, mode: str) -> dict[str, Any] | None:
    """Compare both for several pairs of measurements, one after the other; return the costs of the last."""
    recipe = checkpoint.recipe
    what = f"{recipe.name}, {_TOGETHER} owners, {mode}"
    job = {
        "what": "measured",
        "mode": mode,
        "directory": str(checkpoint.directory),
        "cut": recipe.cut,
        "width": recipe.hidden_size,
        "dtype": TORCH_NAMES[recipe.dtype],
        "rounds": session.runs,
    }
    measured = _answer(session, what, job)
    if measured is None:
        return None
    scenario = {
        "owners": _TOGETHER,
        "servers": 1,
        "mode": mode,
        "bursts": 1,
        "burst_every": 0,
        "prompt": _PROMPT,
        "new": _NEW,
        "spread": 0,
        "think": 0,
        "slow_share": 0,
        "is_one_process": True,
    }
    rounds = measured["rounds"]
    scenarios = [{**scenario, "costs": each["costs"], "fast": each["delay"]} for each in rounds]
    simulated = _answer(session, f"{what}, simulated", {"what": "simulated", "scenarios": scenarios})
    if simulated is None:
        return None
    figures: tuple[tuple[str, str, float, Callable[[dict[str, Any]], float]], ...] = (
        ("all tokens", "tok/s", 1, lambda answer: answer["tokens_per_second"]),
        ("first token, median", "ms", 1000, lambda answer: answer["first"]["p50"]),
        ("a token, median", "ms", 1000, lambda answer: answer["step"]["p50"]),
        ("a token, p95", "ms", 1000, lambda answer: answer["step"]["p95"]),
    )
    answers = simulated["answers"]
    for title, unit, factor, value in figures:
        theirs, ours = ([factor * value(answer) for answer in each] for each in (rounds, answers))
        ratio = Sample.of((mine / its for mine, its in zip(ours, theirs, strict=True)), "").median
        target = f"{1 - _TOLERANCE:g} to {1 + _TOLERANCE:g} of it"
        reached = abs(ratio - 1) <= _TOLERANCE
        row = Row(NAME, f"{what}: {title}", Sample.of(ours, unit), "measured", Sample.of(theirs, unit), ratio, target)
        session.add(replace(row, reached=reached))
    costs: dict[str, Any] = rounds[-1]["costs"]
    forwards = ", ".join(f"{1000 * seconds:.1f} ms for {tokens}" for tokens, seconds in costs["forwards"])
    single = ", ".join(f"{name} {1000 * value:.2f}" for name, value in costs.items() if isinstance(value, float))
    least, *_, most = statistics.quantiles(costs["variation"], n=20)
    single += f", delay {1000 * rounds[-1]['delay']:.2f} ms"
    note = f"forwards of {forwards} tokens, times {least:.2f} to {most:.2f} (p5, p95); {single}"
    session.add(_kept(what, answers, note))
    return costs


def _kept(what: str, answers: Sequence[dict[str, Any]], note: str) -> Row:
    problems = [problem for answer in answers for problem in answer["problems"]]
    broken = f"; {problems[0]}" if problems else ""
    return within(NAME, f"{what}: broken invariants", Sample.of([len(problems)], ""), 0, note=f"{note}{broken}")


def _measure(job: dict[str, Any]) -> dict[str, Any]:
    """In each round, find what work takes, with few owners, and then let many generate at once."""
    import torch

    with served(job, "--dtype", job["dtype"]) as (url, pid), torch.no_grad():
        # The first owners bring threads and code.
        _generate(job, url, _FEW)
        rounds = [{**_costs(job, url, pid), **_generate(job, url, _TOGETHER)} for _ in range(job["rounds"])]
    return {"rounds": rounds}


def _costs(job: dict[str, Any], url: str, pid: int) -> dict[str, Any]:
    """Return what work takes, and the delay of a message, from one owner and from a few."""
    import torch
    from simulated_servers import Costs

    from splitlearn_core import connect

    begin, loop = time.thread_time(), _loop_seconds(pid)
    for _ in range(_CONNECTIONS):
        connect(url).close()
    connecting = [(time.thread_time() - begin) / _CONNECTIONS, (_loop_seconds(pid) - loop) / _CONNECTIONS]

    trunk = connect(url)
    seen, forwards, besides = _Seen(trunk.host), {}, 0.0
    calls = _call_seconds(url)
    for tokens in _FORWARDS[job["mode"]]:
        cache, states = trunk.new_cache(), torch.randn(1, tokens, job["width"]).to(trunk.dtype)
        times, first = [], len(seen.packs)
        for _ in range(_NEW if tokens == 1 else _TIMES):
            sent = time.perf_counter()
            trunk(hidden_states=states, past_key_values=cache)
            times.append(time.perf_counter() - sent)
        # Without the first, which is slower.
        computed = [seconds for _, seconds in seen.packs[first:]]
        forwards[tokens] = statistics.median(computed[1:])
        if tokens == 1:
            besides = statistics.median(whole - own for whole, own in zip(times[1:], computed[1:], strict=True))
    call = (_call_seconds(url) - calls - sum(seconds for _, seconds in seen.packs)) / len(seen.packs)
    trunk.close()

    loop = _loop_seconds(pid)
    few = _generate(job, url, _FEW)
    loop = (_loop_seconds(pid) - loop - _FEW * connecting[1]) / few["requests"]
    if job["mode"] == "solo":
        # With others that keep the processor busy.
        of_prompts, of_tokens = ([seconds for _, seconds in few[what]] for what in ("prompts", "packs"))
        forwards = {1: statistics.median(of_tokens), _PROMPT: statistics.median(of_prompts)}
    costs = Costs(tuple(sorted(forwards.items())))
    shares = [(seconds - costs.forward(pack)) / (pack - 1) for pack, seconds in few["packs"] if pack > 1]
    costs = replace(costs, session=max(0.0, statistics.median(shares)) if shares else 0.0)
    costs = replace(
        costs,
        variation=tuple(seconds / costs.forward(pack, pack) for pack, seconds in few["packs"]),
        call=call,
        loop=loop,
        owner=few["owner"],
        # With a connection comes a request.
        connection_owner=max(0.0, connecting[0] - few["owner"]),
        connection_loop=max(0.0, connecting[1] - loop),
    )
    delay = max(0.0, (besides - few["owner"] - loop - call) / 2)
    return {"costs": asdict(costs), "delay": delay}


def _loop_seconds(pid: int) -> float:
    """Return the processor time of a server's event loop, which runs in its main thread."""
    fields = Path(f"/proc/{pid}/task/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _call_seconds(url: str) -> float:
    """Return how long steps have kept a server's threads for calls."""
    text = urllib.request.urlopen(f"http://{urlsplit(url).netloc}/metrics").read().decode()  # loopback
    return float(next(line.split()[-1] for line in text.splitlines() if line.startswith(_CALLS)))


class _Seen:
    """Keeps what a host says of forwards: how many sessions shared each, and its seconds."""

    def __init__(self, host: Any) -> None:
        self._send = host.request
        self.packs: list[tuple[int, float]] = []
        host.request = self._request

    def _request(self, frame: Any, *arguments: Any) -> Any:
        reply = self._send(frame, *arguments)
        if "computed" in reply.meta:
            self.packs.append((reply.meta.get("pack", 1), reply.meta["computed"]))
        return reply


def _generate(job: dict[str, Any], url: str, count: int) -> dict[str, Any]:
    """Let owners begin at once, each with a connection, a prompt and then tokens.

    Returns:
        Figures like those of a simulation; ``prompts`` and ``packs``, what the server says of the forwards of prompts
        and, when all have begun, of tokens; ``owner``, the processor time of an owner for a token; and ``requests``,
        their number.
    """
    import torch
    from simulated_world import percentiles

    from splitlearn_core import connect

    firsts: list[float] = []
    steps: list[float] = []
    prompts: list[tuple[int, float]] = []
    packs: list[tuple[int, float]] = []
    owners: list[float] = []
    requests: list[int] = []
    ready = threading.Barrier(count + 1)

    def own() -> None:
        with torch.no_grad():
            ready.wait()
            begin = time.perf_counter()
            trunk = connect(url, mode=job["mode"], max_tokens=_PROMPT + _NEW)
            seen, cache = _Seen(trunk.host), trunk.new_cache()
            prompt, token = (torch.randn(1, tokens, job["width"]).to(trunk.dtype) for tokens in (_PROMPT, 1))
            trunk(hidden_states=prompt, past_key_values=cache)
            firsts.append(time.perf_counter() - begin)
            worked = time.thread_time()
            for _ in range(_NEW):
                begin = time.perf_counter()
                trunk(hidden_states=token, past_key_values=cache)
                steps.append(time.perf_counter() - begin)
            owners.append((time.thread_time() - worked) / _NEW)
            prompts.append(seen.packs[0])
            packs.extend(seen.packs[1 + _BEGINNING :])
            trunk.close()
            # One comes with the connection.
            requests.append(1 + trunk.host.round_trips)

    threads = [threading.Thread(target=own) for _ in range(count)]
    for thread in threads:
        thread.start()
    ready.wait()
    begin = time.perf_counter()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - begin
    if len(requests) < count:
        raise RuntimeError("an owner did not come to its end")
    return {
        "tokens_per_second": count * (_PROMPT + _NEW) / seconds,
        "first": percentiles(firsts),
        "step": percentiles(steps),
        "prompts": prompts,
        "packs": packs,
        "owner": statistics.median(owners),
        "requests": sum(requests),
    }


# --- many servers -------------------------------------------------------------------------------------


def _many_servers(session: Session, mode: str, costs: dict[str, Any] | None) -> None:
    owners, servers, bursts = (60, 4, 3) if session.quick else (1000, 20, 10)
    scenario = {
        "owners": owners,
        "servers": servers,
        "bursts": bursts,
        "prompt": _PROMPT,
        "mode": mode,
        "life": _LIFE,
        "breaks": _BREAKS,
        "costs": costs,
    }
    if costs is not None:
        seconds = dict(costs["forwards"])
        each = seconds[_PROMPT] + _TEXT * seconds[1]
        scenario |= {"new": _TEXT, "burst_every": owners / bursts / servers * each / _LOAD}
    what = f"{owners} owners on {servers} servers, {mode}"
    answers = _answer(session, what, {"what": "simulated", "scenarios": [scenario]})
    if answers is None:
        return
    answer = answers["answers"][0]
    for name, title in (
        ("first", "arrival to first token"),
        ("step", "a token"),
        ("wait", "of which waiting for others"),
    ):
        later = ", ".join(f"{place} {1000 * answer[name][place]:.0f} ms" for place in ("p95", "p99"))
        session.add(Row(NAME, f"{what}: {title}, median", Sample.of([1000 * answer[name]["p50"]], "ms"), note=later))
    note = f"{answer['failures']} failures of servers, {answer['refusals']} refusals in {answer['seconds']:.0f} s"
    session.add(
        Row(NAME, f"{what}: all tokens", Sample.of([answer["tokens_per_second"]], "tok/s"), note=note),
        Row(NAME, f"{what}: share of work lost", Sample.of([100 * answer["lost"]], "%")),
        Row(
            NAME,
            f"{what}: fairness (Jain's index of tokens per second)",
            Sample.of([100 * answer["fairness"]], "%"),
            note=f"the slowest owner has {answer['slowest']:.2f} times the median pace",
        ),
        _kept(
            what,
            [answer],
            f"caches took at most {100 * answer['fullest']:.0f} % of their memory; "
            f"servers computed {100 * answer['busy']:.0f} % of the time",
        ),
    )
