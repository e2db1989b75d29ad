"""Many owners on many servers, in virtual time; and on one server, next to what is measured there."""

from __future__ import annotations

import logging
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

from checkpoints import Checkpoint, qwen2
from measuring import MeasurementError, Session, in_fresh_process, read_through, say
from report import Row, Sample, within
from trunk import TORCH_NAMES

from serving import served

NAME = "simulation"
#: Owners on the one server; tokens of their prompts, and after it.
_TOGETHER, _PROMPT, _NEW = 8, 32, 48
#: Tokens of forwards that are timed alone; the last one is that of prompts of all owners, in pieces.
_FORWARDS = (1, _PROMPT, 128)
#: A simulated figure is right within this share of the measured one.
_TOLERANCE = 0.25
#: Seconds between failures of one server of the many, and the share of exchanges whose connection breaks.
_LIFE, _BREAKS = 60.0, 0.005
_MODES = ("solo", "packed")


def run(session: Session) -> None:
    costs: dict[str, Any] = {}
    for checkpoint in session.models((qwen2,)):
        read_through(checkpoint.files)
        for mode in _MODES:
            answer = _one_server(session, checkpoint, mode)
            if answer is not None:
                costs[mode] = answer["costs"]
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
    """Simulate what ``scenario`` says, on a trunk of one small layer."""
    from simulated_servers import Costs, Line, Scenario, simulate

    from splitlearn_core import load_split_model
    from splitlearn_core.testing.worlds import tiny_model, write_checkpoint

    # They tell of each server that is away.
    logging.getLogger("splitlearn_core").setLevel(logging.ERROR)
    logging.getLogger("splitlearn_serve").setLevel(logging.ERROR)
    values = dict(job["scenario"])
    if values.get("costs"):
        values["costs"] = Costs(tuple(map(tuple, values["costs"]["forwards"])))
    values = {
        name: Line(value) if name in ("fast", "slow") else value for name, value in values.items() if value is not None
    }
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(folder, tiny_model("qwen2", num_hidden_layers=3))
        trunk = load_split_model(None, (1, 2), folder, parts=("trunk",), progress=False).trunk
        return simulate(Scenario(**values), trunk)


# --- one server ---------------------------------------------------------------------------------------


def _one_server(session: Session, checkpoint: Checkpoint, mode: str) -> dict[str, Any] | None:
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
        "costs": measured["costs"],
        "fast": measured["carried"] / 2,
        "slow_share": 0,
    }
    simulated = _answer(session, f"{what}, simulated", {"what": "simulated", "scenario": scenario})
    if simulated is None:
        return None
    figures: tuple[tuple[str, str, float, Callable[[dict[str, Any]], float]], ...] = (
        ("all tokens", "tok/s", 1, lambda answer: answer["tokens_per_second"]),
        ("first token, median", "ms", 1000, lambda answer: answer["first"]["p50"]),
        ("a token, median", "ms", 1000, lambda answer: answer["step"]["p50"]),
        ("a token, p95", "ms", 1000, lambda answer: answer["step"]["p95"]),
    )
    forwards = ", ".join(f"{1000 * seconds:.1f} ms for {tokens}" for tokens, seconds in measured["costs"]["forwards"])
    for title, unit, factor, value in figures:
        theirs = Sample.of((factor * value(answer) for answer in measured["rounds"]), unit)
        ours = Sample.of([factor * value(simulated)], unit)
        ratio = ours.median / theirs.median
        target = f"{1 - _TOLERANCE:g} to {1 + _TOLERANCE:g} of it"
        reached = abs(ratio - 1) <= _TOLERANCE
        session.add(Row(NAME, f"{what}: {title}", ours, "measured", theirs, ratio, target, reached))
    session.add(_kept(what, simulated, f"forwards of {forwards} tokens; a request {1000 * measured['carried']:.2f} ms"))
    return measured


def _kept(what: str, answer: dict[str, Any], note: str) -> Row:
    problems = answer["problems"]
    broken = f"; {problems[0]}" if problems else ""
    return within(NAME, f"{what}: broken invariants", Sample.of([len(problems)], ""), 0, note=f"{note}{broken}")


def _measure(job: dict[str, Any]) -> dict[str, Any]:
    """Time forwards, alone and under load, and then let owners generate at once, in rounds."""
    import torch

    from splitlearn_core import connect

    packed = job["mode"] == "packed"
    with served(job, "--dtype", job["dtype"]) as (url, _), torch.no_grad():
        trunk = connect(url, mode=job["mode"])
        seen = _Seen(trunk.host)
        states = {tokens: torch.randn(1, tokens, job["width"]).to(trunk.dtype) for tokens in _FORWARDS}
        prompt, token = states[_PROMPT], states[1]
        forwards: dict[int, float] = {}
        for tokens in (*_FORWARDS, 1):
            seen.clear()
            cache = trunk.new_cache()
            for _ in range(_NEW if tokens == 1 else 3):
                trunk(hidden_states=states[tokens], past_key_values=cache)
            forwards[tokens] = statistics.median(reply["computed"] for reply in seen.replies[1:])
        carried = statistics.median(seconds - reply["computed"] for seconds, reply in seen.timed[1:])
        # What a forward takes while the owners keep the processor busy, too.
        seen.clear()
        _generate(trunk, prompt, token)
        shared = [reply["computed"] for reply in seen.replies if reply.get("pack", 1) == (_TOGETHER if packed else 1)]
        forwards[_TOGETHER if packed else 1] = statistics.median(shared)
        rounds = [_generate(trunk, prompt, token) for _ in range(job["rounds"])]
        trunk.close()
    return {"costs": {"forwards": sorted(forwards.items())}, "carried": carried, "rounds": rounds}


class _Seen:
    """Keeps what a host says of its steps, and how long the requests took."""

    def __init__(self, host: Any) -> None:
        self._send = host.request
        self.clear()
        host.request = self._request

    def clear(self) -> None:
        self.timed: list[tuple[float, dict[str, Any]]] = []

    @property
    def replies(self) -> list[dict[str, Any]]:
        return [reply for _, reply in self.timed]

    def _request(self, frame: Any, *arguments: Any) -> Any:
        begin = time.perf_counter()
        reply = self._send(frame, *arguments)
        if "computed" in reply.meta:
            self.timed.append((time.perf_counter() - begin, dict(reply.meta)))
        return reply


def _generate(trunk: Any, prompt: Any, token: Any) -> dict[str, Any]:
    """Let owners begin at once, each with a prompt and then tokens; return figures like those of a simulation."""
    import torch

    firsts: list[float] = []
    steps: list[float] = []
    ready = threading.Barrier(_TOGETHER + 1)

    def own() -> None:
        with torch.no_grad():
            cache = trunk.new_cache()
            ready.wait()
            begin = time.perf_counter()
            trunk(hidden_states=prompt, past_key_values=cache)
            firsts.append(time.perf_counter() - begin)
            for _ in range(_NEW):
                begin = time.perf_counter()
                trunk(hidden_states=token, past_key_values=cache)
                steps.append(time.perf_counter() - begin)

    threads = [threading.Thread(target=own) for _ in range(_TOGETHER)]
    for thread in threads:
        thread.start()
    ready.wait()
    begin = time.perf_counter()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - begin
    if len(steps) < _TOGETHER * _NEW:
        raise RuntimeError("an owner did not come to its end")
    steps.sort()
    return {
        "tokens_per_second": _TOGETHER * (_PROMPT + _NEW) / seconds,
        "first": {"p50": statistics.median(firsts)},
        "step": {"p50": statistics.median(steps), "p95": steps[int(0.95 * (len(steps) - 1))]},
    }


# --- many servers -------------------------------------------------------------------------------------


def _many_servers(session: Session, mode: str, costs: dict[str, Any] | None) -> None:
    size = {"owners": 60, "servers": 4, "bursts": 3} if session.quick else {}
    scenario = {**size, "mode": mode, "costs": costs, "life": _LIFE, "breaks": _BREAKS}
    what = f"{size.get('owners', 1000)} owners on {size.get('servers', 20)} servers, {mode}"
    answer = _answer(session, what, {"what": "simulated", "scenario": scenario})
    if answer is None:
        return
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
            answer,
            f"caches took at most {100 * answer['fullest']:.0f} % of their memory; "
            f"servers computed {100 * answer['busy']:.0f} % of the time",
        ),
    )
