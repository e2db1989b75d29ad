"""A trunk in an actor of a Ray cluster on this machine, next to one in a process of its own: starts and steps."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from checkpoints import Checkpoint, qwen2
from measuring import MeasurementError, Session, in_fresh_process, read_through, say
from report import Row, Sample, at_most
from trunk import TORCH_NAMES, hidden_states

NAME = "actors"
_START_SHARE, _STEP_SHARE = 1.2, 1.05
_STEPS = 50
#: Seconds for the actor that is prepared for the next trunk to import what it needs.
_PREPARATION = 20.0
_HOSTS = ("ray", "process")
_HEAD = """
import sys, ray
context = ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False)
print(context.address_info["address"], flush=True)
sys.stdin.read()
"""


def run(session: Session) -> None:
    if find_spec("ray") is None or find_spec("splitlearn_ray") is None:
        session.add(Row(NAME, "a trunk in an actor", note="skipped: splitlearn-ray is not installed"))
        return
    for checkpoint in session.models((qwen2,)):
        read_through(checkpoint.files)
        _compare(session, checkpoint)


def _compare(session: Session, checkpoint: Checkpoint) -> None:
    recipe = checkpoint.recipe
    job = {
        "directory": str(checkpoint.directory),
        "model_type": "qwen2",
        "cut": recipe.cut,
        "width": recipe.hidden_size,
        "dtype": TORCH_NAMES[recipe.dtype],
        "rounds": session.runs,
    }
    say(f"  {recipe.name}: a Ray cluster")
    try:
        answer = in_fresh_process(NAME, job)
    except MeasurementError as error:
        session.add(Row(NAME, f"{recipe.name}, in an actor", note=str(error)))
        return
    starts, steps = (
        [Sample.of((1000 * value for value in answer[what][host]), "ms") for host in _HOSTS]
        for what in ("starts", "steps")
    )
    name = "in a process of its own"
    note = "with an actor that is prepared, and with processes forked from one that is"
    session.add(
        at_most(NAME, f"{recipe.name}, load to first step", starts[0], name, starts[1], share=_START_SHARE, note=note),
        at_most(NAME, f"{recipe.name}, a step of one token", steps[0], name, steps[1], share=_STEP_SHARE),
    )


def work(job: dict[str, Any]) -> dict[str, Any]:
    with _cluster():
        return asyncio.run(_measure(job))


@contextmanager
def _cluster() -> Iterator[None]:
    """Run a cluster of this machine."""
    os.environ.update(RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0", RAY_worker_niceness="0")
    with subprocess.Popen(
        [sys.executable, "-c", _HEAD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as head:
        assert head.stdout is not None
        os.environ["RAY_ADDRESS"] = head.stdout.readline().strip()
        yield


async def _measure(job: dict[str, Any]) -> dict[str, Any]:
    from splitlearn_core import AsyncModelManager, ModelConfig, preload

    preload({job["model_type"]})
    prompt = hidden_states(job["width"], job["dtype"])
    configs = {
        host: ModelConfig(
            model_id=host,
            model_type=job["model_type"],
            model_path=job["directory"],
            component="trunk",
            split_points=tuple(job["cut"]),
            host=host,
            host_options={"num_cpus": 1} if host == "ray" else None,
        )
        for host in _HOSTS
    }
    starts: dict[str, list[float]] = {host: [] for host in _HOSTS}
    steps: dict[str, list[float]] = {host: [] for host in _HOSTS}
    async with AsyncModelManager(min_residency=0) as models:
        # The first of each imports what the later ones find imported.
        for number in range(job["rounds"] + 1):
            for host in _HOSTS:
                begin = time.monotonic()
                model = await models.load_model(configs[host])
                await model(hidden_states=prompt)
                if number:
                    starts[host].append(time.monotonic() - begin)
                await asyncio.sleep(_PREPARATION)
                if number < job["rounds"]:
                    await models.unload_model(host)
        caches = {}
        for host in _HOSTS:
            async with models.lease(host) as model:
                caches[host] = model.new_cache()
                await model(hidden_states=prompt, past_key_values=caches[host])
        for _ in range(_STEPS):
            for host in _HOSTS:
                async with models.lease(host) as model:
                    begin = time.monotonic()
                    await model(hidden_states=prompt[:, :1], past_key_values=caches[host])
                    steps[host].append(time.monotonic() - begin)
    return {"starts": starts, "steps": steps}
