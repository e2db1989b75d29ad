"""Training with the trunk behind ``splitlearn serve``: speed on loopback and over slow links, memory of both sides.

GPT-2 of 124M with random weights. Adapters are LoRA in the attention of all layers; where the memory of the owner is
measured, bottom and top are trained in full besides.
"""

from __future__ import annotations

import secrets
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from checkpoints import Checkpoint, gpt2
from loaders import Job, from_pretrained
from measuring import MeasurementError, Session, anonymous_mb, in_fresh_process, read_through, say
from report import Row, Sample, at_most

from serving import delayed, served

NAME = "training"
_SPEED_SHARE = 0.9
_LINK_SHARE = 0.9
_GROWTH = 1.05
#: Sequences of one micro-batch, and their tokens.
_ROWS, _LENGTH, _QUICK_LENGTH = 2, 128, 16
_ROUNDS_PER_RUN = 3
_DELAYS_MS = (10, 100)
_RATES_MBIT = (20, 100, 1000)
#: What is sent over the slowest of them besides, at the least delay.
_WIRES = ("int8", "int4")
_OWNERS = (1, 8, 32)
_MEMORY_STEPS, _WARM_STEPS = 3, 4
_RANK = 8


def run(session: Session) -> None:
    for checkpoint in session.models((gpt2,)):
        read_through(checkpoint.files)
        job = {
            "directory": str(checkpoint.directory),
            "cut": checkpoint.recipe.cut,
            "vocabulary": checkpoint.recipe.vocabulary,
            "length": _QUICK_LENGTH if session.quick else _LENGTH,
            "rounds": session.runs,
        }
        for measure in (_speed, _links, _owner, _owners):
            say(f"  {checkpoint.recipe.name}: {measure.__name__.strip('_')}")
            try:
                measure(session, checkpoint, job)
            except MeasurementError as error:
                session.add(Row(NAME, f"{checkpoint.recipe.name}, {measure.__name__.strip('_')}", note=str(error)))


def work(job: dict[str, Any]) -> dict[str, Any]:
    measures: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
        "speed": _measure_speed,
        "links": _measure_links,
        "owner": _measure_owner,
        "owners": _measure_owners,
    }
    return measures[job["what"]](job)


# --- rows ---------------------------------------------------------------------------------------------


def _speed(session: Session, checkpoint: Checkpoint, job: dict[str, Any]) -> None:
    answer = in_fresh_process("training", {**job, "what": "speed"})
    split, whole = (Sample.of((1000 * pair[side] for pair in answer["seconds"]), "ms") for side in (0, 1))
    ratio = Sample.of((here / there for there, here in answer["seconds"]), "").median
    note = (
        f"a step; {answer['trips']:g} round trips and {answer['bytes'] / 1e6:.1f} MB of it; carrying, hashing and "
        f"encoding take {1000 * statistics.median(answer['carried']):.0f} ms; threads: {answer['threads']}"
    )
    note += "" if answer["equal"] else "; the losses differ"
    what = f"{checkpoint.recipe.name}, loopback, a step of {_ROWS} x {job['length']} tokens"
    peer = "unsplit, the trunk's layers recomputed"
    target = f">= {_SPEED_SHARE:g} of its speed"
    session.add(Row(NAME, what, split, peer, whole, ratio, target, ratio >= _SPEED_SHARE, note))


def _links(session: Session, checkpoint: Checkpoint, job: dict[str, Any]) -> None:
    answer = in_fresh_process("training", {**job, "what": "links"})
    for link in answer["links"]:
        ours = Sample.of((1000 * far for far, _ in link["seconds"]), "ms")
        fixed = link["trips"] * link["delay"] / 1000 + 8 * link["bytes"] / link["rate"] / 1e6
        ideal = Sample.of((1000 * (near + fixed) for _, near in link["seconds"]), "ms")
        ratio = Sample.of((i / o for i, o in zip(ideal.values, ours.values, strict=True)), "").median
        wire = "" if link["wire"] == "raw" else f", {link['wire']}"
        session.add(
            Row(
                NAME,
                f"{checkpoint.recipe.name}, {link['delay']} ms and {link['rate']} Mbit/s{wire}, a step",
                ours,
                "compute + delays + bytes / rate",
                ideal,
                ratio,
                f">= {_LINK_SHARE:g} of its speed",
                ratio >= _LINK_SHARE,
                f"{link['trips']:g} round trips and {link['bytes'] / 1e6:.2f} MB; without the link "
                f"{1000 * statistics.median(near for _, near in link['seconds']):.0f} ms",
            )
        )


def _owner(session: Session, checkpoint: Checkpoint, job: dict[str, Any]) -> None:
    answers: dict[str, list[dict[str, Any]]] = {"split": [], "ends": []}
    for _ in range(session.runs):
        for way, found in answers.items():
            found.append(in_fresh_process("training", {**job, "what": "owner", "way": way}, watch=True))
    (sizes,) = {tuple(sorted(answer["sizes"].items())) for answer in answers["ends"]}
    ours, ends = (Sample.of((answer["peak_mb"] for answer in found), "MB") for found in answers.values())
    what = f"{checkpoint.recipe.name}, the owner's memory, ends trained in full"
    note = ", ".join(f"{name} {size / 1e6:.0f} MB" for name, size in sizes)
    computed = Sample.of([sum(size for _, size in sizes) / 1e6], "MB")
    # The sum leaves out what comes and goes: gradients of a tied embedding from both its uses.
    session.add(
        at_most(NAME, what, ours, "the ends alone, without a trunk", ends, share=_GROWTH),
        Row(NAME, what, ours, "the sum of what it keeps", computed, ours.median / computed.median, note=note),
    )


def _owners(session: Session, checkpoint: Checkpoint, job: dict[str, Any]) -> None:
    answer = in_fresh_process("training", {**job, "what": "owners"})
    first, *others = (Sample.of([size], "MB") for size in answer["memory_mb"])
    for count, memory in zip(_OWNERS[1:], others, strict=True):
        session.add(
            at_most(
                NAME,
                f"{checkpoint.recipe.name}, the server's memory, {count} owners between steps",
                memory,
                f"{_OWNERS[0]} owner",
                first,
                share=_GROWTH,
                note=f"the adapters of each are {answer['adapter_mb']:.2f} MB; before the first step "
                f"{answer['idle_mb']:.0f} MB, without the trunk's weights, which are mapped",
            )
        )


# --- measurements -------------------------------------------------------------------------------------


class _Trainee:
    """A model that is trained by steps of one micro-batch each."""

    def __init__(self, model: Any, trunk: Any = None, *, ends: bool = False) -> None:
        import torch
        from peft import LoraConfig, get_peft_model

        own = list(model.parameters()) if ends else []
        torch.manual_seed(1)
        config = LoraConfig(r=_RANK, target_modules=["c_attn"], fan_in_fan_out=True, lora_dropout=0.1)
        self.model = get_peft_model(model, config).train()
        self.trunk = trunk
        for parameter in own:
            parameter.requires_grad_(_has_values(parameter))
        self.learned = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(self.learned, lr=1e-4)

    def step(self, ids: Any, seed: int, loss_of: Callable[[Any], Any] | None = None) -> tuple[float, float]:
        """Return the seconds that it took, and the loss."""
        import torch

        torch.manual_seed(seed)
        begin = time.perf_counter()
        loss = self.model(input_ids=ids, labels=ids, use_cache=False).loss if loss_of is None else loss_of(ids)
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return time.perf_counter() - begin, loss.item()

    def traffic(self) -> tuple[int, int]:
        """Return the round trips so far, and the bytes both ways."""
        host = self.trunk.host
        return host.round_trips, host.bytes_sent + host.bytes_received


def _has_values(parameter: Any) -> bool:
    from splitlearn_core.hosts.holes import HoleParameter

    return not isinstance(parameter, HoleParameter)


def _split(
    job: dict[str, Any], url: str, connection: dict[str, Any] | None = None, strategy: str = "auto", **options: Any
) -> _Trainee:
    from splitlearn_core import SplitCausalLM, connect, load_split_model

    ends = load_split_model(
        None, tuple(job["cut"]), job["directory"], parts=("bottom", "top"), strategy=strategy, progress=False
    )
    trunk = connect(url, **(connection or {}))
    return _Trainee(SplitCausalLM(ends.bottom, trunk, ends.top), trunk, **options)


def _whole(job: dict[str, Any]) -> _Trainee:
    """Return the unsplit model, which computes the trunk's layers twice, as a server does."""
    model = from_pretrained(Job(job["directory"], tuple(job["cut"])))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for number, layer in enumerate(model.base_model.h):
        layer.gradient_checkpointing = number in range(*job["cut"])
    return _Trainee(model)


def _batches(job: dict[str, Any], count: int) -> list[Any]:
    import torch

    draw = torch.Generator().manual_seed(0)
    shape = count, _ROWS, job["length"]
    return list(torch.randint(job["vocabulary"] - 2, shape, generator=draw))


def _measure_speed(job: dict[str, Any]) -> dict[str, Any]:
    """Let both ways take the same steps, alternately."""
    import torch

    rounds = job["rounds"] * _ROUNDS_PER_RUN
    with served(job) as (url, _):
        split, whole = _split(job, url), _whole(job)
        seconds, equal = [], True
        carried = _time_requests(split.trunk.host)
        # The first step opens the connection, and has the server make its copy of the trunk with adapters.
        for number, ids in enumerate(_batches(job, rounds + 1)):
            if number == 1:
                before = split.traffic()
                carried.clear()
            pair = [0.0, 0.0]
            losses = [0.0, 0.0]
            for side in (0, 1) if number % 2 else (1, 0):
                pair[side], losses[side] = (split, whole)[side].step(ids, number)
            equal = equal and losses[0] == losses[1]
            if number:
                seconds.append(pair)
        trips, size = (now - then for now, then in zip(split.traffic(), before, strict=True))
        split.trunk.close()
    return {
        "seconds": seconds,
        "equal": equal,
        "trips": trips / rounds,
        "bytes": size / rounds,
        "carried": [sum(carried) / rounds],
        "threads": torch.get_num_threads(),
    }


def _time_requests(host: Any) -> list[float]:
    """Note what requests take besides what the host computes."""
    carried: list[float] = []
    send = host.request

    def request(frame: Any, *arguments: Any) -> Any:
        begin = time.perf_counter()
        reply = send(frame, *arguments)
        carried.append(time.perf_counter() - begin - reply.meta.get("computed", 0.0))
        return reply

    host.request = request
    return carried


def _measure_links(job: dict[str, Any]) -> dict[str, Any]:
    """Take the same steps over each link and on loopback, in turns."""
    links: list[dict[str, Any]] = [
        {"delay": delay, "rate": rate, "wire": "raw", "seconds": []} for delay in _DELAYS_MS for rate in _RATES_MBIT
    ]
    links += [{"delay": _DELAYS_MS[0], "rate": _RATES_MBIT[0], "wire": wire, "seconds": []} for wire in _WIRES]
    with served(job) as (url, _), ExitStack() as stack:
        near = _split(job, url)
        far = [
            _split(job, stack.enter_context(delayed(url, link["delay"], link["rate"])), {"wire": link["wire"]})
            for link in links
        ]
        for number, ids in enumerate(_batches(job, job["rounds"] + 1)):
            for link, there in zip(links, far, strict=True):
                before = there.traffic()
                pair = there.step(ids, number)[0], near.step(ids, number)[0]
                if number:
                    link["seconds"].append(pair)
                    link["trips"], link["bytes"] = (
                        now - then for now, then in zip(there.traffic(), before, strict=True)
                    )
        for trainee in (near, *far):
            trainee.trunk.close()
    return {"links": links}


def _measure_owner(job: dict[str, Any]) -> dict[str, Any]:
    """Take steps with the trunk elsewhere, or with bottom and top alone; and say what the memory consists of."""
    import torch
    from peft import LoraConfig  # noqa: F401  # an import takes memory

    from splitlearn_core import SplitCausalLM  # noqa: F401  # as above

    with served(job) as (url, _):
        before, begin = anonymous_mb(), time.monotonic()
        trainee = _split(job, url, strategy="copied", ends=True)
        batches = _batches(job, _MEMORY_STEPS + 1)
        bottom, *_, top = trainee.model.base_model.model.components

        def without_trunk(ids: Any) -> Any:
            return top(hidden_states=bottom(input_ids=ids), labels=ids).loss

        alone = without_trunk if job["way"] == "ends" else None
        for number, ids in enumerate(batches[:-1]):
            trainee.step(ids, number, alone)
        end, grown = time.monotonic(), anonymous_mb() - before
        saved: dict[int, int] = {}
        known = {parameter.untyped_storage().data_ptr() for parameter in trainee.model.parameters()}

        def note(tensor: Any) -> Any:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            trainee.step(batches[-1], _MEMORY_STEPS, alone)
        trainee.trunk.close()
    weights = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in trainee.model.parameters()}
    learned = sum(parameter.nbytes for parameter in trainee.learned)
    logits = 4 * _ROWS * job["length"] * job["vocabulary"]
    return {
        "before_mb": before,
        "grown_mb": grown,
        "begin": begin,
        "end": end,
        "sizes": {
            "weights": sum(weights.values()),
            "gradients": learned,
            "optimizer": 2 * learned,
            # What autograd keeps of the forward, and gradients of logits and of what they were computed from.
            "micro-batch": sum(saved.values()) + 2 * logits,
        },
    }


def _measure_owners(job: dict[str, Any]) -> dict[str, Any]:
    """Let more and more owners take a step and wait; read the server's memory after each group."""
    tokens = [secrets.token_hex(16) for _ in range(_OWNERS[-1])]
    (ids,) = _batches(job, 1)
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder) / "tokens"
        lines.touch(mode=0o600)
        lines.write_text("".join(f"owner{number}: {token} training\n" for number, token in enumerate(tokens)))
        with served(job, "--token-file", str(lines)) as (url, pid):
            waiting = [_split(job, url, {"token": tokens[0]})]
            idle = anonymous_mb(pid)
            for number in range(_WARM_STEPS):
                waiting[0].step(ids, number)
            memory = []
            for count in _OWNERS:
                while len(waiting) < count:
                    waiting.append(_split(job, url, {"token": tokens[len(waiting)]}))
                    waiting[-1].step(ids, 0)
                memory.append(anonymous_mb(pid))
            (upload,) = waiting[0].trunk._uploads.values()  # what it has sent
            adapter = sum(frame.payload_bytes for _, frame in upload.frames())
            for trainee in waiting:
                trainee.trunk.close()
    return {"memory_mb": memory, "idle_mb": idle, "adapter_mb": adapter / 1e6}
