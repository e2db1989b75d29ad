"""The sessions of a host: steps are numbered, atomic and executed once, and invalid requests harm no other session."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from splitlearn_core import ConfigurationError, load_split_model
from splitlearn_core.errors import ProtocolError
from splitlearn_core.hosts.facts import Facts
from splitlearn_core.hosts.payload import pack, unpack
from splitlearn_core.hosts.protocol import Frame, Kind, TensorSpec
from splitlearn_core.hosts.sessions import SessionLimits, SessionTable
from support.hosts import MemoryEndpoint, remote
from support.long import cases

LIMITS = SessionLimits(max_sessions=3, max_tokens=16, max_rows=4, idle_timeout=10)


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def parts(llama: Any, checkpoint: Callable[[str], Path]) -> Any:
    return load_split_model(None, (2, 4), checkpoint("single"), strategy="copied", progress=False)


@pytest.fixture
def table(parts: Any, clock: Clock) -> SessionTable:
    return SessionTable(parts.trunk, LIMITS, clock)


class Client:
    """Sends frames as a client might, right or wrong."""

    def __init__(self, table: SessionTable, owner: str = "") -> None:
        self.table, self.owner = table, owner
        reply = self.send(Kind.OPEN, meta={"rows": 1, "tokens": 4})
        assert reply.kind is Kind.OPENED, reply.meta
        self.number, self.secret = reply.session, reply.meta["secret"]

    def send(self, kind: Kind, session: int = 0, step: int = 0, **values: Any) -> Frame:
        return self.table.handle(Frame(kind, session, step, **values), self.owner)

    def step(
        self, number: int, hidden: torch.Tensor | None = None, *, nonce: str = "n", secret: str = "", **meta: Any
    ) -> Frame:
        specs, buffers = pack({"hidden_states": states(1, 2) if hidden is None else hidden})
        content = {"secret": secret or self.secret, "nonce": nonce, **meta}
        return self.send(Kind.STEP, self.number, number, meta=content, tensors=specs, buffers=buffers)


def states(rows: int, tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, tokens, 32, generator=torch.Generator().manual_seed(seed))


def output(reply: Frame) -> torch.Tensor:
    assert reply.kind is Kind.RESULT, reply.meta
    return unpack(reply)["output"]


def refused(reply: Frame, code: str, words: str = "") -> None:
    assert reply.kind is Kind.ERROR
    assert reply.meta["code"] == code, reply.meta
    assert words in reply.meta["message"]


def test_a_session_is_the_component_with_a_cache(table: SessionTable, parts: Any) -> None:
    """Two steps, and a forward without cache."""
    client, cache = Client(table), parts.trunk.new_cache()
    with torch.no_grad():
        for number in (1, 2):
            expected = parts.trunk(hidden_states=states(1, 2, number), past_key_values=cache)
            assert torch.equal(output(client.step(number, states(1, 2, number))), expected)
        alone = parts.trunk(hidden_states=states(2, 3))
    specs, buffers = pack({"hidden_states": states(2, 3)})
    assert torch.equal(output(client.send(Kind.STEP, tensors=specs, buffers=buffers)), alone)


def test_what_a_host_says_of_itself_arrives(table: SessionTable, parts: Any) -> None:
    """All of it, and where the component comes from."""
    reply = table.handle(Frame(Kind.HELLO))
    facts = Facts.from_json(reply.meta)
    assert facts == table.facts
    assert facts.layers == (2, 4, 6)
    origin = facts.origin_value()
    assert origin == parts.trunk.origin
    broken = {**reply.meta, "hidden_size": -1, "dtype": "pickle"}
    with pytest.raises(Exception, match="hidden_size; dtype"):
        Facts.from_json(broken)


@pytest.mark.parametrize("source", [[], {}, None, "nowhere"])
def test_what_is_no_source_of_what_crosses_is_refused(table: SessionTable, source: Any) -> None:
    meta = table.handle(Frame(Kind.HELLO)).meta
    with pytest.raises(ProtocolError, match="crossing"):
        Facts.from_json({**meta, "crossing": {"hidden_states": [source, 1]}})


def test_a_step_that_is_sent_twice_is_done_once(table: SessionTable) -> None:
    """The result is sent again; another step of the same number is refused, and so is a step too early or too late."""
    client = Client(table)
    first = output(client.step(1, states(1, 2)))
    assert torch.equal(output(client.step(1, states(1, 2))), first)
    refused(client.step(1, states(1, 2, 5), nonce="other"), "out_of_order")
    refused(client.step(3), "out_of_order", "step 2 is next")
    assert output(client.step(2)).shape == (1, 2, 32)
    refused(client.step(1), "out_of_order")


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ([["reorder", [1]]], "bad_input"),
        ([["remove", 3]], "bad_input"),
        ([["repeat", 5]], "bad_input"),
        ([["remove", 1], ["explode", 1]], "bad_input"),
        ([["remove", 1], ["reorder", "all"]], "bad_input"),
        ("remove", "bad_input"),
        ([["remove", True]], "bad_input"),
        ([[["remove"], 1]], "bad_input"),
    ],
)
def test_a_step_that_fails_leaves_the_session_as_it_was(
    table: SessionTable, parts: Any, changes: Any, code: str
) -> None:
    """Changes that came before the failure too; the same number is still the next."""
    client, cache = Client(table), parts.trunk.new_cache()
    client.step(1, states(1, 2))
    refused(client.step(2, changes=changes), code)
    refused(client.step(2, torch.full((1, 1, 32), torch.nan), changes=[["remove", 1]]), "bad_input", "not finite")
    refused(client.step(2, states(1, 15), changes=[["remove", 0]]), "too_large")
    refused(client.step(2, states(1, 1), changes=[["remove", 1]], arguments={"no_such": 1}), "bad_input", "no_such")
    with torch.no_grad():
        parts.trunk(hidden_states=states(1, 2), past_key_values=cache)
        expected = parts.trunk(hidden_states=states(1, 1), past_key_values=cache)
    assert torch.equal(output(client.step(2, states(1, 1))), expected)


@pytest.mark.parametrize(
    "hidden",
    [
        states(1, 2)[..., :31],
        states(1, 2).to(torch.float64),
        states(1, 2).to(torch.int64),
        states(1, 0),
        states(2, 2)[0],
        states(5, 1),
    ],
    ids=["width", "dtype", "integers", "nothing", "dimensions", "rows"],
)
def test_wrong_hidden_states_are_refused(table: SessionTable, hidden: torch.Tensor) -> None:
    """By shape and dtype, in the first step and later."""
    client = Client(table)
    reply = client.step(1, hidden)
    assert reply.meta["code"] in ("bad_input", "too_large"), reply.meta
    assert output(client.step(1)).shape == (1, 2, 32)


def test_a_mask_is_that_of_the_cache(table: SessionTable) -> None:
    """One of another length could take memory out of proportion."""
    specs, buffers = pack({"hidden_states": states(1, 2), "attention_mask": torch.ones(1, 10_000, dtype=torch.int64)})
    client = Client(table)
    meta = {"secret": client.secret, "nonce": "n"}
    reply = client.send(Kind.STEP, client.number, 1, meta=meta, tensors=specs, buffers=buffers)
    refused(reply, "bad_input", "attention mask")


def test_a_session_is_its_owners(table: SessionTable) -> None:
    """Without its secret it is as if there were none, for steps, copies and its end."""
    client = Client(table)
    for secret in ("", "0" * 32, client.secret[:-1], "\ud800"):
        for kind in (Kind.STEP, Kind.COPY):
            refused(client.send(kind, client.number, 1, meta={"secret": secret}), "unknown_session")
        assert client.send(Kind.CLOSE, client.number, meta={"secret": secret}).kind is Kind.CLOSED
    refused(client.send(Kind.STEP, client.number, 1, meta={}), "unknown_session")
    assert len(table) == 1
    client.send(Kind.CLOSE, client.number, meta={"secret": client.secret})
    assert len(table) == 0


def test_a_copy_goes_its_own_way(table: SessionTable) -> None:
    """It is made after a numbered step, and of no other state."""
    client = Client(table)
    client.step(1, states(1, 3))
    refused(client.send(Kind.COPY, client.number, 7, meta={"secret": client.secret}), "out_of_order")
    reply = client.send(Kind.COPY, client.number, 1, meta={"secret": client.secret})
    other = Client.__new__(Client)
    other.table, other.owner, other.number, other.secret = table, "", reply.session, reply.meta["secret"]
    first = output(client.step(2, states(1, 1, 1)))
    output(client.step(3, states(1, 1, 2)))
    assert torch.equal(output(other.step(2, states(1, 1, 1))), first)


def test_idle_sessions_end(table: SessionTable, clock: Clock) -> None:
    """After the time limit, counted from the last step; they are then unknown, and there is room for others."""
    first, second = Client(table), Client(table)
    clock.now += 8
    first.step(1)
    clock.now += 8
    assert table.expire() == 1
    refused(second.step(1), "unknown_session")
    assert output(first.step(2)).shape == (1, 2, 32)


def test_room_is_limited(table: SessionTable, parts: Any, clock: Clock) -> None:
    """By number, and by the bytes of caches; a refusal says when to try again."""
    clients = [Client(table) for _ in range(3)]
    reply = clients[0].send(Kind.OPEN, meta={"rows": 1, "tokens": 4})
    refused(reply, "full")
    assert reply.meta["retry_after"] > 0
    refused(clients[0].send(Kind.OPEN, meta={"rows": 1, "tokens": 17}), "too_large")
    refused(clients[0].send(Kind.OPEN, meta={"rows": "1", "tokens": 4}), "bad_input")

    per_token = table.facts.cache_bytes_per_token
    narrow = SessionTable(parts.trunk, SessionLimits(max_tokens=16, cache_bytes=9 * per_token), clock)
    one = Client(narrow)
    assert narrow.reserved_bytes == 4 * per_token
    Client(narrow)
    refused(one.send(Kind.OPEN, meta={"rows": 1, "tokens": 4}), "full")
    output(one.step(1, states(1, 4)))
    # One more token than was declared fits, and two do not.
    output(one.step(2, states(1, 1)))
    refused(one.step(3, states(1, 1)), "full")
    assert narrow.reserved_bytes == 9 * per_token

    # A session that can never fit is refused without a time after which to try again.
    never = one.send(Kind.OPEN, meta={"rows": 1, "tokens": 10})
    refused(never, "full", "one session would take")
    assert never.meta["retry_after"] is None


def test_one_owner_does_not_take_all(parts: Any) -> None:
    """Sessions are counted by owner too."""
    table = SessionTable(parts.trunk, SessionLimits(max_sessions_per_owner=1))
    client = Client(table, "a")
    refused(client.send(Kind.OPEN, meta={"rows": 1, "tokens": 4}), "full", "1 of them yours")
    Client(table, "b")


def test_a_cache_has_the_bytes_that_were_announced(table: SessionTable, parts: Any) -> None:
    """Of each token of each sequence, in all layers of the component."""
    cache = parts.trunk.new_cache()
    with torch.no_grad():
        parts.trunk(hidden_states=states(2, 5), past_key_values=cache)
    size = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert size == 2 * 5 * table.facts.cache_bytes_per_token


def test_a_closed_host_says_so(table: SessionTable) -> None:
    """A client then waits for it to come back, and rebuilds its session."""
    client = Client(table)
    table.close()
    refused(client.step(1), "closing")
    refused(client.send(Kind.OPEN, meta={"rows": 1, "tokens": 4}), "closing")


@pytest.mark.parametrize("name", ["bottom", "top"])
def test_only_trunks_are_hosted(parts: Any, name: str) -> None:
    """The ends stay with the data."""
    with pytest.raises(ConfigurationError, match="data owner"):
        SessionTable(getattr(parts, name))


def test_what_runs_elsewhere_is_not_hosted_once_more(table: SessionTable) -> None:
    """A host of a remote component could not undo a step."""
    with pytest.raises(ConfigurationError, match="no layers in this process"):
        SessionTable(cast("Any", remote(MemoryEndpoint(lambda: table))))


@pytest.mark.parametrize("kind", [Kind.STEP, Kind.BACKWARD])
def test_a_component_that_fails_says_little_to_its_caller(
    table: SessionTable, parts: Any, kind: Kind, caplog: pytest.LogCaptureFixture
) -> None:
    """The kind of the error; its text, which may name files of the host, is a line of the log there."""

    def fail(*_: Any) -> None:
        raise OSError("/srv/secret/weights cannot be read")

    parts.trunk.layer_modules[2].register_forward_pre_hook(fail)
    names = ["hidden_states", "gradient"] if kind is Kind.BACKWARD else ["hidden_states"]
    specs, buffers = pack({name: states(1, 2) for name in names})
    with caplog.at_level("DEBUG", "splitlearn_core.hosts"):
        reply = table.handle(Frame(kind, tensors=specs, buffers=buffers))
    refused(reply, "failed", "the component failed: OSError")
    assert "secret" not in str(reply.meta)
    line, where = (record for record in caplog.records if record.name.endswith("hosts.training"))
    assert (line.levelname, line.exc_info) == ("INFO", None)
    assert line.getMessage() == "The component failed: OSError: /srv/secret/weights cannot be read"
    assert where.levelname == "DEBUG"
    assert where.exc_info


def test_a_host_without_memory_says_so(table: SessionTable, parts: Any) -> None:
    """torch's allocator of the processor raises a RuntimeError of its own; the session is as it was."""

    def allocate(*_: Any) -> None:
        torch.empty(2**50, dtype=torch.uint8)

    client = Client(table)
    hook = parts.trunk.layer_modules[2].register_forward_pre_hook(allocate)
    reply = client.step(1, states(1, 2))
    refused(reply, "out_of_memory", "no memory for this step")
    assert "fewer sequences or tokens" in reply.meta["hint"]
    hook.remove()
    output(client.step(1, states(1, 2)))


def test_any_request_has_an_answer(table: SessionTable, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever a client sends: a reply, no accident of the host, and the sessions of others go on."""
    chance = random.Random(3)
    good, bad = Client(table), Client(table)
    values: list[Any] = [None, 0, -1, 1.5, True, "x", [], {}, [["remove", 1]], {"attention_mask": 3}, bad.secret]
    values += [[["repeat", 2]], [["reorder", [0]]], {"attention_mask_of": ["x"]}, {"output_hidden_states": True}, [{}]]
    kinds = [*Kind, *[Kind.STEP] * 10, *[Kind.BACKWARD] * 5]
    names = ["hidden_states", "attention_mask", "attention_mask.x", "position_ids", "y", "gradient", "past_key_values"]
    done, results = 0, 0
    for count in range(cases(20_000, 1_500)):
        meta = {name: chance.choice(values) for name in ("changes", "arguments") if chance.random() < 0.3}
        meta |= {name: chance.choice(values) for name in ("secret", "nonce", "rows", "tokens") if chance.random() < 0.2}
        if chance.random() < 0.8:
            meta["secret"] = bad.secret
        tensors = {chance.choice(names): any_tensor(chance) for _ in range(chance.randrange(3))}
        if chance.random() < 0.7:
            tensors["hidden_states"] = states(1, 1)
        specs, buffers = pack(tensors)
        kind, session = chance.choice(kinds), chance.choice([0, bad.number, bad.number, 5])
        step = chance.choice([0, 1, 2, results])
        reply = table.handle(Frame(kind, 0 if kind is Kind.BACKWARD else session, step, meta, specs, buffers))
        assert isinstance(reply, Frame)
        results += reply.kind is Kind.RESULT and reply.session == bad.number
        if reply.kind is Kind.OPENED:
            table.handle(Frame(Kind.CLOSE, reply.session, meta={"secret": reply.meta["secret"]}))
        if bad.number not in table:
            bad = Client(table)
            values.append(bad.secret)
        if count % 150 == 0 and done < 8:
            done += 1
            assert output(good.step(done)).shape == (1, 2, 32)
    assert done > 4
    assert results > 4
    assert caplog.text == ""


def any_tensor(chance: random.Random) -> torch.Tensor:
    shape = [chance.choice([0, 1, 1, 2, 3, 32]) for _ in range(chance.randrange(4))]
    return torch.zeros(shape, dtype=chance.choice([torch.float32, torch.bool, torch.int64, torch.bfloat16]))


def test_bytes_become_tensors_of_their_own() -> None:
    """All dtypes, none, and no dimension; in new memory."""
    tensors = {
        "half": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3).t(),
        "truth": torch.tensor([True, False]),
        "number": torch.tensor(3.5),
        "nothing": torch.empty(2, 0),
    }
    specs, buffers = pack(tensors)
    assert specs[0] == TensorSpec("half", "BF16", (3, 2))
    received = unpack(Frame(Kind.STEP, tensors=specs, buffers=buffers))
    for name, tensor in tensors.items():
        assert torch.equal(received[name], tensor)
        assert received[name].dtype == tensor.dtype
    received["truth"][0] = False
    assert tensors["truth"][0]


def test_a_pass_is_for_the_plain_steps_of_its_session(table: SessionTable, parts: Any) -> None:
    """Of any owner; it neither collects, copies, closes nor trains, and is not that of another session."""
    client = Client(table, "alice")
    opened = table.handle(Frame(Kind.OPEN, meta={"rows": 1, "tokens": 4}), "alice")
    specs, buffers = pack({"hidden_states": states(1, 2)})

    def sent(kind: Kind, session: int = opened.session, number: int = 1, **meta: Any) -> Frame:
        meta = {"pass": opened.meta["pass"], "nonce": "n", **meta}
        return table.handle(Frame(kind, session, number, meta, specs, buffers), "host")

    refused(sent(Kind.STEP, training=True), "bad_input", "do not train")
    refused(sent(Kind.STEP, **{"pass": "wrong"}), "unknown_session")
    refused(sent(Kind.STEP, **{"pass": opened.meta["secret"]}), "unknown_session")
    refused(sent(Kind.STEP, client.number), "unknown_session")
    with torch.no_grad():
        expected = parts.trunk(hidden_states=states(1, 2), past_key_values=parts.trunk.new_cache())
    assert torch.equal(output(sent(Kind.STEP)), expected)
    for kind in (Kind.COLLECT, Kind.COPY):
        refused(sent(kind), "unknown_session")
    sent(Kind.CLOSE)
    collecting = Frame(Kind.COLLECT, opened.session, 1, {"secret": opened.meta["secret"], "nonce": "n"})
    refused(table.handle(collecting, "host"), "unknown_session")
    assert torch.equal(output(table.handle(collecting, "alice")), expected)
    for other in (collecting._replace(step=2), collecting._replace(meta={**collecting.meta, "nonce": "other"})):
        refused(table.handle(other, "alice"), "not_arrived")
