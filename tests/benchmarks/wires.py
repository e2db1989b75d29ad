"""Bytes, speed and loss of a training whose hidden states and gradients cross with 8 and 4 bits, beside raw."""

from __future__ import annotations

import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from measuring import MeasurementError, Session, in_fresh_process, say
from report import Row, Sample

NAME = "wires"
WIRES = ("raw", "int8", "int4")
SEEDS = (0, 1, 2)
_STEPS, _QUICK_STEPS = 30, 2
_ROWS, _LENGTH = 4, 64


def run(session: Session) -> None:
    """Train the ends of the bundled model over three seeds, with each encoding."""
    steps = _QUICK_STEPS if session.quick else _STEPS
    answers: dict[str, list[dict[str, Any]]] = {wire: [] for wire in WIRES}
    for seed in SEEDS:
        for wire in WIRES:
            try:
                answer = in_fresh_process("wires", {"wire": wire, "seed": seed, "steps": steps})
            except MeasurementError as error:
                session.add(Row(NAME, wire, note=str(error)))
                return
            say(f"  {wire}, seed {seed}: loss {answer['loss']:.4f}, {answer['bytes_per_token']:.0f} B/token")
            answers[wire].append(answer)
    for wire in WIRES[1:]:
        session.add(*_rows(wire, answers[wire], answers["raw"]))


def _rows(wire: str, ours: list[dict[str, Any]], raw: list[dict[str, Any]]) -> Iterator[Row]:
    for what, key, unit in (
        ("bytes per token, both ways, forward and back", "bytes_per_token", "B"),
        ("tokens per second over a Unix socket", "tokens_per_second", "tok/s"),
    ):
        samples = [Sample.of((answer[key] for answer in answers), unit) for answers in (ours, raw)]
        yield Row(NAME, f"{wire}: {what}", samples[0], "raw", samples[1], samples[0].median / samples[1].median)
    losses = [Sample.of((1000 * answer["loss"] for answer in answers), "/1000") for answers in (ours, raw)]
    differences = ", ".join(f"{mine['loss'] - other['loss']:+.4f}" for mine, other in zip(ours, raw, strict=True))
    note = f"difference for each seed: {differences}; before training {raw[0]['loss_before']:.4f}"
    ratio = losses[0].median / losses[1].median
    yield Row(NAME, f"{wire}: loss after training", losses[0], "raw", losses[1], ratio, note=note)


def work(job: dict[str, Any]) -> dict[str, Any]:
    """Train bottom and top for some steps, the trunk behind a Unix socket; measure on other text."""
    import torch

    from splitlearn_core import SplitCausalLM, connect, load_split_model
    from splitlearn_core.generation import load_tokenizer
    from splitlearn_core.leak.texts import letters
    from splitlearn_core.loading.opening import open_model

    torch.manual_seed(job["seed"])
    model_name = "bundled:gpt2"
    parts = load_split_model(None, (1, 5), model_name, dtype="float32", progress=False)
    tokenizer = load_tokenizer(open_model(model_name))

    def windows(seed: int) -> Any:
        ids = tokenizer(letters(seed, 700), verbose=False)["input_ids"]
        return torch.tensor(ids[: len(ids) // _LENGTH * _LENGTH]).reshape(-1, _LENGTH)

    known, others = windows(job["seed"]), windows(100)[:16]
    with _served(parts.trunk) as url:
        trunk = connect(url, wire=job["wire"])
        model = SplitCausalLM(parts.bottom, trunk, parts.top)

        def loss_of_others() -> float:
            with torch.no_grad():
                return float(model.eval()(others, labels=others, use_cache=False).loss)

        before = loss_of_others()
        optimizer = torch.optim.AdamW([*parts.bottom.parameters(), *parts.top.parameters()], lr=1e-3)
        sent = trunk.host.bytes_sent + trunk.host.bytes_received
        begin = time.perf_counter()
        for _ in range(job["steps"]):
            rows = known[torch.randint(len(known), (_ROWS,))]
            model(rows, labels=rows, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        seconds = time.perf_counter() - begin
        tokens = job["steps"] * _ROWS * _LENGTH
        size = trunk.host.bytes_sent + trunk.host.bytes_received - sent
        after = loss_of_others()
        trunk.close()
    return {
        "bytes_per_token": size / tokens,
        "tokens_per_second": tokens / seconds,
        "loss": after,
        "loss_before": before,
    }


@contextmanager
def _served(trunk: Any) -> Iterator[str]:
    from splitlearn_core.hosts.sessions import SessionTable
    from splitlearn_core.hosts.worker import Worker

    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
        path = Path(folder) / "trunk.sock"
        listener.bind(str(path))
        listener.listen()
        worker = Worker(SessionTable(trunk), listener)
        worker.start()
        try:
            yield f"unix://{path}"
        finally:
            worker.close()
