"""A trunk behind ``splitlearn serve``: at a distance, and with many sessions at once."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from loaders import Job, split_model
from measuring import HERE, anonymous_mb

PROMPT, NEW = 32, 64
#: Of the delay, each way takes a half.
DELAY_MS = 50.0
#: Tokens that prompt lookup proposes.
DRAFT = 8
SESSIONS, ACTIVE = 64, 16
#: Sessions that decode at once, packed or not.
TOGETHER = 8
#: Steps after which an active session is replaced by a new one, so that no cache grows for ever.
_STEPS = 32
_TAKEN_MB_EVERY = 0.5
_LAG = "splitlearn_event_loop_lag_seconds_bucket"


@contextmanager
def served(
    job: dict[str, Any], *options: str, part: str = "trunk", threads: int | None = None
) -> Iterator[tuple[str, int]]:
    """Serve a trunk, with a number of threads for a forward, and return its URL and the number of the process."""
    command = [sys.executable, "-m", "splitlearn_core", "serve", job["directory"], "--port", "0"]
    cut = ["--split", *map(str, job["cut"]), "--part", part]
    environment = os.environ | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)})
    with subprocess.Popen([*command, *cut, *options], stderr=subprocess.PIPE, text=True, env=environment) as server:
        try:
            assert server.stderr is not None
            # It prints more, later: without a reader it would stand still.
            url = next(word for line in server.stderr for word in line.split() if word.endswith(f"/{part}"))
            threading.Thread(target=server.stderr.read, daemon=True).start()
            yield url, server.pid
        finally:
            server.terminate()


@contextmanager
def delayed(url: str, milliseconds: float, megabits: float | None = None) -> Iterator[str]:
    """Return an address by which each request and each reply is held for half of a delay.

    With megabits per second, each way carries no more than these.
    """
    parts = urlsplit(url)
    command = [sys.executable, str(HERE / "delay.py"), str(parts.port), str(milliseconds / 2)]
    command += [] if megabits is None else [str(megabits)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as proxy:
        try:
            assert proxy.stdout is not None
            yield f"http://127.0.0.1:{int(proxy.stdout.readline())}{parts.path}"
        finally:
            proxy.terminate()


def work(job: dict[str, Any]) -> dict[str, Any]:
    return {"distance": _measure_distance, "crowd": _measure_crowd, "packed": _measure_packed}[job["what"]](job)


# --- at a distance ------------------------------------------------------------------------------------


def _measure_distance(job: dict[str, Any]) -> dict[str, Any]:
    """Time the same generation here and at a distance, in turns: seconds, and forwards of the trunk."""
    import torch

    from splitlearn_core import SplitCausalLM, connect
    from splitlearn_core.hosts.protocol import Frame, Kind

    inline = split_model(Job(job["directory"], tuple(job["cut"])))
    with served(job) as (url, _), delayed(url, DELAY_MS) as far, torch.no_grad():
        trunk = connect(far)
        apart = SplitCausalLM(inline.components[0], trunk, inline.components[-1])
        # A text that goes round in circles, as code and lists do, so that there is something to look up.
        prompt = torch.arange(8).repeat(PROMPT // 8)[None] + 100
        answers: dict[str, Any] = {}
        for name, draft in (("plain", None), ("lookup", DRAFT)):
            options: dict[str, Any] = {
                "do_sample": False,
                "min_new_tokens": NEW,
                "max_new_tokens": NEW,
                "pad_token_id": 0,
                "prompt_lookup_num_tokens": draft,
                "attention_mask": torch.ones_like(prompt),
            }
            rounds = []
            equal = torch.equal(apart.generate(prompt, **options), inline.generate(prompt, **options))
            for _ in range(job["rounds"]):
                before = trunk.host.round_trips
                begin = time.perf_counter()
                apart.generate(prompt, **options)
                middle = time.perf_counter()
                inline.generate(prompt, **options)
                # One request opens the session.
                steps = trunk.host.round_trips - before - 1
                rounds.append((middle - begin, time.perf_counter() - middle, steps))
            answers[name] = {"rounds": rounds, "equal": equal}
        pings = []
        for _ in range(10):
            begin = time.perf_counter()
            trunk.host.request(Frame(Kind.PING))
            pings.append(time.perf_counter() - begin)
        return {**answers, "ping": statistics.median(pings)}


# --- many sessions ------------------------------------------------------------------------------------


def _measure_crowd(job: dict[str, Any]) -> dict[str, Any]:
    """Let some of many sessions work for a while, each in a thread of its own; the others stay open."""
    import torch

    from splitlearn_core import connect

    with served(job) as (url, pid), torch.no_grad():
        trunk = connect(url, mode=job["mode"])
        dtype = trunk.dtype
        prompt, token = (torch.randn(1, count, job["width"]).to(dtype) for count in (PROMPT, 1))

        def opened() -> Any:
            cache = trunk.new_cache()
            trunk(hidden_states=prompt, past_key_values=cache)
            return cache

        idle = [opened() for _ in range(SESSIONS - ACTIVE)]
        until = time.monotonic() + 60 * job["minutes"]
        waits: list[list[float]] = [[] for _ in range(ACTIVE)]
        failures: list[BaseException] = []

        def work_in(times: list[float]) -> None:
            try:
                with torch.no_grad():
                    while time.monotonic() < until:
                        cache = opened()
                        for _ in range(_STEPS):
                            begin = time.perf_counter()
                            trunk(hidden_states=token, past_key_values=cache)
                            times.append(time.perf_counter() - begin)
            except BaseException as error:  # noqa: BLE001  # it is raised below
                failures.append(error)

        threads = [threading.Thread(target=work_in, args=(times,)) for times in waits]
        # What the lag of the server is compared with: the machine may be too busy for any loop.
        bare = subprocess.Popen(
            [sys.executable, str(HERE / "lag.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for thread in threads:
            thread.start()
        memory = []
        while any(thread.is_alive() for thread in threads):
            memory.append(anonymous_mb(pid))
            time.sleep(_TAKEN_MB_EVERY)
        bare_lags = json.loads(bare.communicate()[0])
        for failure in failures:
            raise failure
        text = urllib.request.urlopen(f"http://{urlsplit(url).netloc}/metrics").read().decode()  # loopback
        trunk.close()
    quarter = max(1, len(memory) // 4)
    steps = [value for times in waits for value in times]
    return {
        "open": len(idle) + ACTIVE,
        "steps": len(steps),
        "median": statistics.median(steps),
        "longest": max(steps),
        # The first quarter is that of caches, threads and connections that come.
        "before_mb": statistics.median(memory[quarter : 2 * quarter] or memory),
        "after_mb": statistics.median(memory[-quarter:]),
        "lag": _percentile_of(_lags_in(text), 0.99),
        "bare_lag": _percentile_of(bare_lags, 0.99),
    }


def _measure_packed(job: dict[str, Any]) -> dict[str, Any]:
    """Let some sessions decode at once, each alone and then packed, in turns: seconds of each round, and steps."""
    import torch

    from splitlearn_core import connect

    with served(job, "--dtype", job["dtype"]) as (url, _):
        trunks = {mode: connect(url, mode=mode) for mode in ("solo", "packed")}
        dtype = trunks["solo"].dtype
        prompt, token = (torch.randn(1, count, job["width"]).to(dtype) for count in (PROMPT, 1))
        seconds: dict[str, list[float]] = {mode: [] for mode in trunks}
        steps: list[float] = []
        for _ in range(job["rounds"] + 1):
            for mode, trunk in trunks.items():
                ready = threading.Barrier(TOGETHER + 1)
                times: list[list[float]] = [[] for _ in range(TOGETHER)]
                threads = [threading.Thread(target=_decode, args=(trunk, prompt, token, ready, own)) for own in times]
                for thread in threads:
                    thread.start()
                ready.wait()
                begin = time.perf_counter()
                for thread in threads:
                    thread.join()
                seconds[mode].append(time.perf_counter() - begin)
                if any(len(own) < _STEPS for own in times):
                    raise RuntimeError(f"a session in mode {mode} failed")
                steps += [value for own in times for value in own] if mode == "packed" else []
        for trunk in trunks.values():
            trunk.close()
    # The first round brings caches, threads and connections.
    return {
        "seconds": list(zip(seconds["packed"][1:], seconds["solo"][1:], strict=True)),
        "tokens": TOGETHER * _STEPS,
        "median": statistics.median(steps),
        "longest": max(steps),
    }


def _decode(trunk: Any, prompt: Any, token: Any, ready: threading.Barrier, times: list[float]) -> None:
    import torch

    with torch.no_grad():
        cache = trunk.new_cache()
        trunk(hidden_states=prompt, past_key_values=cache)
        ready.wait()
        for _ in range(_STEPS):
            begin = time.perf_counter()
            trunk(hidden_states=token, past_key_values=cache)
            times.append(time.perf_counter() - begin)


def _lags_in(metrics: str) -> list[list[Any]]:
    buckets = [line.split() for line in metrics.splitlines() if line.startswith(_LAG)]
    return [[labels.partition('le="')[2].partition('"')[0], float(count)] for labels, count in buckets]


def _percentile_of(buckets: list[list[Any]], share: float) -> float:
    """Return the bound, in seconds, of the bucket up to which a share of the lags are."""
    total = buckets[-1][1]
    return next(float(bound) for bound, count in buckets if count >= share * total)
