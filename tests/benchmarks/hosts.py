"""A trunk in a process of its own, or behind a WebSocket: round trips, decoding next to one that runs here, starts."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from checkpoints import Checkpoint, qwen2
from generation import alternate, decoding, prefill
from loaders import Job, split_model
from measuring import HERE, MeasurementError, Session, in_fresh_process, last_line, read_through, say, start
from report import Row, Sample, at_most, within
from trunk import TORCH_NAMES, hidden_states

from serving import ACTIVE, DELAY_MS, DRAFT, NEW, PROMPT, SESSIONS, TOGETHER, served

NAME = "hosts"
_SMALL, _LARGE = 16 * 1024, 4 * 2**20
_PREFILL = 512
_DECODE_SHARE, _PREFILL_SHARE = 0.97, 0.95
_SERVED_SHARE = 0.95
_DISTANCE_SHARE = 0.95
_PACKED_TIMES = 2.5
_WAIT_TIMES, _LAG_MS, _GROWTH = 3.0, 5.0, 1.05
_WEBSOCKET_TIMES, _BANDWIDTH_TIMES = 6.0, 2.0
_PIPE_TIMES, _COPIES_TIMES = 4.0, 1.5
_WARM_TIMES, _FRESH_SHARE = 1.3, 0.25
#: Round trips in one measurement: the first few find their pages missing.
_REPEATS, _DISCARDED = {_SMALL: 300, _LARGE: 30}, 5


def run(session: Session) -> None:
    _round_trips(session)
    for checkpoint in session.models((qwen2,)):
        read_through(checkpoint.files)
        for where in ("process", "WebSocket"):
            _running(session, checkpoint, where)
        _distance(session, checkpoint)
        for mode in ("solo", "packed"):
            _crowd(session, checkpoint, mode)
        for dtype in ("bfloat16", "float32"):
            _packed(session, checkpoint, dtype)
        _starting(session, checkpoint)


def _answer(session: Session, what: str, job: dict[str, Any], module: str = "hosts") -> dict[str, Any] | None:
    say(f"  {what}")
    try:
        return in_fresh_process(module, job)
    except MeasurementError as error:
        session.add(Row(NAME, what, note=str(error)))
        return None


def work(job: dict[str, Any]) -> dict[str, Any]:
    return {"trips": _measure_trips, "running": _measure_running, "starting": _measure_starting}[job["what"]](job)


# --- round trips --------------------------------------------------------------------------------------


def _round_trips(session: Session) -> None:
    answer = _answer(session, "round trips", {"what": "trips", "rounds": session.runs})
    if answer is None:
        return
    samples = {name: Sample.of((1e6 * value for value in values), "us") for name, values in answer.items()}
    for place in _places():
        what = f"frames of 16 kB and back, {place}"
        ours, theirs = samples[f"channel 16 kB {place}"], samples[f"pipe 16 kB {place}"]
        session.add(at_most(NAME, what, ours, "pipe", theirs, share=_PIPE_TIMES))
        floor = samples[f"channel floor 16 kB {place}"]
        session.add(Row(NAME, what, ours, "Python alone, Unix socket", floor, ours.median / floor.median))
        what = f"{what}, WebSocket"
        ours, theirs = samples[f"websocket 16 kB {place}"], samples[f"loopback 16 kB {place}"]
        session.add(at_most(NAME, what, ours, "raw TCP socket", theirs, share=_WEBSOCKET_TIMES))
        floor = samples[f"websocket floor 16 kB {place}"]
        session.add(Row(NAME, what, ours, "asyncio alone", floor, ours.median / floor.median))
    what = f"frames of 4 MB and back, {place}"
    ours = samples[f"channel 4 MB {place}"]
    copies, stream = samples[f"copies 4 MB {place}"], samples[f"socket 4 MB {place}"]
    note = "each way: into shared memory, and out of it"
    session.add(at_most(NAME, what, ours, "the copies", copies, share=_COPIES_TIMES, note=note))
    session.add(at_most(NAME, what, ours, "raw socket", stream, share=1.0))
    ours, theirs = samples[f"websocket 4 MB {place}"], samples[f"loopback 4 MB {place}"]
    session.add(at_most(NAME, f"{what}, WebSocket", ours, "raw TCP socket", theirs, share=_BANDWIDTH_TIMES))


def _places() -> dict[str, tuple[int, int]]:
    """Where both ends run. The kernel would choose one or the other for each, which is ten times as fast or slow."""
    cores = sorted(os.sched_getaffinity(0))
    return {"on one core": (cores[0], cores[0]), "on a core each": (cores[0], cores[-1])}


def _measure_trips(job: dict[str, Any]) -> dict[str, Any]:
    trips: dict[str, tuple[int, Callable[[], None]]] = {
        "pipe 16 kB": (_SMALL, _pipe(_SMALL)),
        "channel 16 kB": (_SMALL, _channel(_SMALL)),
        "channel floor 16 kB": (_SMALL, _raw_messages(_SMALL)),
        "socket 4 MB": (_LARGE, _raw_socket(_LARGE)),
        "copies 4 MB": (_LARGE, _copies(_LARGE)),
        "channel 4 MB": (_LARGE, _channel(_LARGE)),
        "loopback 16 kB": (_SMALL, _raw_socket(_SMALL, over_tcp=True)),
        "websocket 16 kB": (_SMALL, _websocket(_SMALL)),
        "websocket floor 16 kB": (_SMALL, _asyncio(_SMALL)),
        "loopback 4 MB": (_LARGE, _raw_socket(_LARGE, over_tcp=True)),
        "websocket 4 MB": (_LARGE, _websocket(_LARGE)),
    }
    places = _places()
    answers: dict[str, list[float]] = {f"{name} {place}": [] for place in places for name in trips}
    echoes = [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]
    for _ in range(job["rounds"]):
        for place, (here, there) in places.items():
            os.sched_setaffinity(0, {here})
            for pid in echoes:
                os.sched_setaffinity(pid, {there})
            for name, (size, trip) in trips.items():
                seconds = []
                for _ in range(_REPEATS[size] + _DISCARDED):
                    begin = time.perf_counter()
                    trip()
                    seconds.append(time.perf_counter() - begin)
                answers[f"{name} {place}"].append(Sample.of(seconds[_DISCARDED:], "s").median)
    return answers


def _echo(serve: Callable[[], None]) -> None:
    """Let a forked process answer until it is no longer asked, or this one ends."""
    from splitlearn_core.hosts.child import die_with_parent

    parent = os.getpid()
    if os.fork() == 0:
        try:
            die_with_parent(parent, signal.SIGKILL)
            serve()
        finally:
            os._exit(0)


def _pipe(size: int) -> Callable[[], None]:
    (there, ask), (answer, back) = os.pipe(), os.pipe()
    data = b"x" * size

    def read(descriptor: int) -> None:
        left = size
        while left:
            part = os.read(descriptor, left)
            if not part:
                os._exit(0)
            left -= len(part)

    def serve() -> None:
        os.close(ask)
        while True:
            read(there)
            os.write(back, data)

    _echo(serve)
    os.close(there)

    def trip() -> None:
        os.write(ask, data)
        read(answer)

    return trip


def _tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    for end in (near, far):
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return near, far


def _raw_socket(size: int, *, over_tcp: bool = False) -> Callable[[], None]:
    near, far = _tcp_pair() if over_tcp else socket.socketpair()
    memory = bytearray(size)

    def read(stream: socket.socket) -> None:
        view = memoryview(memory)
        while view:
            count = stream.recv_into(view)
            if not count:
                os._exit(0)
            view = view[count:]

    def serve() -> None:
        near.close()
        while True:
            read(far)
            far.sendall(memory)

    _echo(serve)
    far.close()

    def trip() -> None:
        near.sendall(memory)
        read(near)

    return trip


def _raw_messages(size: int) -> Callable[[], None]:
    """What a channel costs without a protocol: a head and a payload, in one system call each way."""
    near, far = socket.socketpair()
    head, data, memory = b"x" * 128, bytes(size), memoryview(bytearray(size + 128))

    def read(stream: socket.socket) -> None:
        count = stream.recv_into(memory)
        while 0 < count < len(memory):
            count += stream.recv_into(memory[count:])
        if not count:
            os._exit(0)

    def serve() -> None:
        near.close()
        while True:
            read(far)
            far.sendmsg([head, data])

    _echo(serve)
    far.close()

    def trip() -> None:
        near.sendmsg([head, data])
        read(near)

    return trip


def _asyncio(size: int) -> Callable[[], None]:
    """What a server in asyncio costs without a protocol: bytes to a task that waits for them, and back."""
    import asyncio

    listener = socket.create_server(("127.0.0.1", 0))

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            writer.write(await reader.readexactly(size))

    async def run() -> None:
        server = await asyncio.start_server(answer, sock=listener, limit=2 * size)
        await server.serve_forever()

    _echo(lambda: asyncio.run(run()))
    near = socket.create_connection(listener.getsockname())
    listener.close()
    near.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    memory = memoryview(bytearray(size))

    def trip() -> None:
        near.sendall(memory)
        left = memory
        while left:
            left = left[near.recv_into(left) :]

    return trip


def _copies(size: int) -> Callable[[], None]:
    memory = [memoryview(bytearray(size)) for _ in range(3)]

    def trip() -> None:
        for source, target in ((0, 1), (1, 2), (2, 1), (1, 0)):
            memory[target][:] = memory[source]

    return trip


def _channel(size: int) -> Callable[[], None]:
    from splitlearn_core.hosts.protocol import Frame, Kind, TensorSpec
    from splitlearn_core.hosts.shared_memory import Channel, pair

    near, far = pair(2 * size)
    specs = (TensorSpec("hidden_states", "F32", (1, size // 4096, 1024)),)
    memory = memoryview(bytearray(size))

    def serve() -> None:
        near.close()
        end = Channel(far, 2 * size)
        while (frame := end.receive()) is not None:
            # As a step does: inputs are copied out, and results lie elsewhere.
            memory[:] = frame.buffers[0]
            end.send(Frame(Kind.RESULT, 1, 1, {}, specs, (memory,)))

    _echo(serve)
    far.close()

    def trip() -> None:
        near.send(Frame(Kind.STEP, 1, 1, {}, specs, (memory,)))
        reply = near.receive()
        assert reply is not None
        memory[:] = reply.buffers[0]

    return trip


def _websocket(size: int) -> Callable[[], None]:
    """The client of core, and the connections of ``splitlearn serve``."""
    import asyncio

    from splitlearn_core.hosts.carriers import Endpoint
    from splitlearn_core.hosts.protocol import SUBPROTOCOL, Frame, Kind, TensorSpec, decode, encode
    from splitlearn_serve.connections import Pool, Server, uvicorn_config

    specs = (TensorSpec("hidden_states", "F32", (1, size // 4096, 1024)),)
    memory = memoryview(bytearray(size))
    listener = socket.create_server(("127.0.0.1", 0))

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept", "subprotocol": SUBPROTOCOL})
        while (message := await receive())["type"] == "websocket.receive":
            memory[:] = decode(message["bytes"]).buffers[0]
            reply = b"".join(encode(Frame(Kind.RESULT, 1, 1, {}, specs, (memory,))))
            await send({"type": "websocket.send", "bytes": reply})

    def serve() -> None:
        asyncio.run(Server(uvicorn_config(answer), Pool()).serve([listener]))

    _echo(serve)
    connection = Endpoint(f"http://127.0.0.1:{listener.getsockname()[1]}/trunk").open()
    listener.close()

    def trip() -> None:
        memory[:] = connection.exchange(Frame(Kind.STEP, 1, 1, {}, specs, (memory,))).buffers[0]

    return trip


# --- running ------------------------------------------------------------------------------------------


def _running(session: Session, checkpoint: Checkpoint, where: str) -> None:
    tokens = _PREFILL // 8 if session.quick else _PREFILL
    job = {
        "what": "running",
        "where": where,
        "directory": str(checkpoint.directory),
        "cut": checkpoint.recipe.cut,
        "vocabulary": checkpoint.recipe.vocabulary,
        "rounds": session.runs,
        "prefill": tokens,
    }
    answer = _answer(session, f"{checkpoint.recipe.name}, trunk: {where}", job)
    if answer is not None:
        name = f"{checkpoint.recipe.name}, trunk: {where}"
        share = _DECODE_SHARE if where == "process" else _SERVED_SHARE
        session.add(
            _rate(f"{name}, {NEW} tokens after {PROMPT}", answer["decode"], NEW, share),
            _rate(f"{name}, prefill of {tokens}", answer["prefill"], tokens, _PREFILL_SHARE),
        )


def _rate(what: str, answer: dict[str, Any], tokens: int, share: float) -> Row:
    ratio = Sample.of((inline / apart for apart, inline in answer["seconds"]), "").median
    apart, inline = (Sample.of((tokens / pair[side] for pair in answer["seconds"]), "tok/s") for side in (0, 1))
    # What two processes on one machine cost, whatever carries their messages.
    carried = answer["carried"] / (len(answer["seconds"]) + 1)
    bound = Sample.of((inline / (apart - carried) for apart, inline in answer["seconds"]), "").median
    note = (
        f"{1000 * answer['carried'] / answer['requests']:.2f} ms a request besides computing; without them {bound:.3f}"
    )
    note += "" if answer["equal"] else "; the outputs differ"
    return Row(NAME, what, apart, "inline", inline, ratio, f">= {share:g} of it", ratio >= share, note)


def _measure_running(job: dict[str, Any]) -> dict[str, Any]:
    import torch

    from splitlearn_core import SplitCausalLM

    inline = split_model(Job(job["directory"], tuple(job["cut"])))
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(job["vocabulary"] - 2, (1, job["prefill"]), generator=generator)
    with (_in_a_process if job["where"] == "process" else _served)(job) as trunk, torch.no_grad():
        models = (SplitCausalLM(inline.components[0], trunk, inline.components[-1]), inline)
        actions = {
            "decode": [decoding(model, text[:, :PROMPT]) for model in models],
            "prefill": [prefill(model, text) for model in models],
        }
        return {name: _alternate(trunk.host, both, job["rounds"]) for name, both in actions.items()}


def _alternate(host: Any, actions: list[Callable[[], Any]], rounds: int) -> dict[str, Any]:
    """Time two actions in turns, and what the requests of the first one take besides what the host computes."""
    carried: list[float] = []
    send = host.request

    def request(frame: Any, *arguments: Any) -> Any:
        begin = time.perf_counter()
        reply = send(frame, *arguments)
        carried.append(time.perf_counter() - begin - reply.meta.get("computed", 0.0))
        return reply

    host.request = request
    try:
        return {**alternate(actions, rounds), "carried": sum(carried), "requests": len(carried)}
    finally:
        host.request = send


@contextmanager
def _in_a_process(job: dict[str, Any]) -> Iterator[Any]:
    from splitlearn_core.hosts.process import ProcessLoad, start_process

    handle = start_process(ProcessLoad(job["directory"], tuple(job["cut"])))
    try:
        yield handle.component
    finally:
        handle.kill()


@contextmanager
def _served(job: dict[str, Any]) -> Iterator[Any]:
    from splitlearn_core import connect

    with served(job) as (url, _):
        # The first request waits for the model to be loaded.
        yield connect(url)


# --- at a distance, and many sessions -----------------------------------------------------------------


def _distance(session: Session, checkpoint: Checkpoint) -> None:
    recipe = checkpoint.recipe
    what = f"{recipe.name}, {DELAY_MS:g} ms away"
    job = {"what": "distance", "directory": str(checkpoint.directory), "cut": recipe.cut, "rounds": session.runs}
    answer = _answer(session, what, job, "serving")
    if answer is None:
        return
    for name, title in (("plain", f"{NEW} tokens"), ("lookup", f"prompt lookup of {DRAFT}")):
        rounds = answer[name]["rounds"]
        ours = Sample.of((NEW / far for far, _, _ in rounds), "tok/s")
        # As many forwards as there were, each of them as long as here and the delay.
        ideal = Sample.of((NEW / (here + steps * DELAY_MS / 1000) for _, here, steps in rounds), "tok/s")
        ratio = Sample.of((o / i for o, i in zip(ours.values, ideal.values, strict=True)), "").median
        accepted = NEW / Sample.of((steps for *_, steps in rounds), "").median
        note = f"{accepted:.2f} tokens a round trip; a PING takes {1000 * answer['ping']:.1f} ms"
        note += "" if answer[name]["equal"] else "; the outputs differ"
        target = f">= {_DISTANCE_SHARE:g} of it"
        reached = ratio >= _DISTANCE_SHARE
        session.add(
            Row(NAME, f"{what}, {title}", ours, "tokens / (delay + compute)", ideal, ratio, target, reached, note)
        )


def _crowd(session: Session, checkpoint: Checkpoint, mode: str) -> None:
    recipe = checkpoint.recipe
    what = f"{recipe.name}, {SESSIONS} sessions, {ACTIVE} active, {mode}, {session.minutes:g} min"
    job = {
        "what": "crowd",
        "mode": mode,
        "directory": str(checkpoint.directory),
        "cut": recipe.cut,
        "width": recipe.hidden_size,
        "minutes": session.minutes,
    }
    answer = _answer(session, what, job, "serving")
    if answer is None:
        return
    longest, median = (Sample.of([1000 * answer[name]], "ms") for name in ("longest", "median"))
    after, before = (Sample.of([answer[name]], "MB") for name in ("after_mb", "before_mb"))
    lag = Sample.of([1000 * answer["lag"]], "ms")
    bare = f"of one that does nothing: {1000 * answer['bare_lag']:g} ms"
    note = f"{answer['steps']} steps"
    session.add(
        at_most(NAME, f"{what}: longest step", longest, "median step", median, share=_WAIT_TIMES, note=note),
        at_most(NAME, f"{what}: memory in the last quarter", after, "in the second one", before, share=_GROWTH),
        within(NAME, f"{what}: lag of the event loop, p99", lag, _LAG_MS, note=bare),
    )


def _packed(session: Session, checkpoint: Checkpoint, dtype: str) -> None:
    recipe = checkpoint.recipe
    what = f"{recipe.name} in {dtype}, {TOGETHER} sessions decode at once"
    job = {
        "what": "packed",
        "directory": str(checkpoint.directory),
        "cut": recipe.cut,
        "width": recipe.hidden_size,
        "dtype": dtype,
        "rounds": session.runs,
    }
    answer = _answer(session, what, job, "serving")
    if answer is None:
        return
    tokens = answer["tokens"]
    packed, solo = (Sample.of((tokens / pair[side] for pair in answer["seconds"]), "tok/s") for side in (0, 1))
    ratio = Sample.of((solo / packed for packed, solo in answer["seconds"]), "").median
    longest, median = (Sample.of([1000 * answer[name]], "ms") for name in ("longest", "median"))
    target = f">= {_PACKED_TIMES:g} times it"
    session.add(
        Row(NAME, f"{what}: packed", packed, "each alone", solo, ratio, target, ratio >= _PACKED_TIMES, ""),
        at_most(NAME, f"{what}: longest packed step", longest, "median step", median, share=_WAIT_TIMES),
    )


# --- starting -----------------------------------------------------------------------------------------


def _starting(session: Session, checkpoint: Checkpoint) -> None:
    recipe = checkpoint.recipe
    job = {
        "what": "starting",
        "directory": str(checkpoint.directory),
        "cut": recipe.cut,
        "width": recipe.hidden_size,
        "dtype": TORCH_NAMES[recipe.dtype],
        "rounds": session.runs,
    }
    what = f"{recipe.name}, from start to first forward"
    answer = _answer(session, what, job)
    if answer is None:
        return
    forked, warm, fresh = (Sample.of((1000 * value for value in answer[name]), "ms") for name in _STARTS)
    session.add(
        at_most(NAME, what, forked, "load in a warm process", warm, share=_WARM_TIMES),
        at_most(NAME, what, forked, "a fresh process", fresh, share=_FRESH_SHARE),
    )


_STARTS = ("forked", "warm", "fresh")


def _measure_starting(job: dict[str, Any]) -> dict[str, Any]:
    from splitlearn_core import load_split_model
    from splitlearn_core.hosts.process import ProcessLoad, start_process

    cut, hidden = tuple(job["cut"]), hidden_states(job["width"], job["dtype"])

    def forked() -> None:
        handle = start_process(ProcessLoad(job["directory"], cut))
        handle.component(hidden_states=hidden)
        ended.append(handle)

    def warm() -> None:
        trunk = load_split_model(None, cut, job["directory"], parts=["trunk"], progress=False).trunk
        trunk(hidden_states=hidden)

    def fresh() -> None:
        arguments = ["ours", job["directory"], *map(str, cut), str(job["width"]), job["dtype"]]
        last_line(start([str(HERE / "first_forward.py"), *arguments]))

    ended: list[Any] = []
    answers: dict[str, list[float]] = {name: [] for name in _STARTS}
    # The first of each starts the zygote, and imports.
    for number in range(job["rounds"] + 1):
        for name, action in zip(_STARTS, (forked, warm, fresh), strict=True):
            begin = time.monotonic()
            action()
            if number:
                answers[name].append(time.monotonic() - begin)
            for handle in ended:
                handle.kill()
            ended.clear()
    return answers
