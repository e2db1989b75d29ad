"""Sessions on a model with a process of its own: as on any other, and they go on when the process has died."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from serving import StatusServer, until_met
from splitlearn_core import (
    ModelConfig,
    RemoteBusyError,
    RemoteStepError,
    SplitCausalLM,
    connect,
    load_split_model,
)
from splitlearn_core.extension import Frame, Kind, SessionLimits
from splitlearn_core.hosts.carriers import Endpoint
from splitlearn_serve.tokens import Owner, Tokens

pytestmark = [
    pytest.mark.usefixtures("llama"),
    pytest.mark.filterwarnings("ignore:.*past_key_values.*:FutureWarning"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a process is forked, and looked at in /proc"),
]

ALICE, BOB = "a" * 32, "b" * 32
Serve = Callable[..., StatusServer]


@pytest.fixture
def trunk(single: Path) -> ModelConfig:
    return ModelConfig(
        model_id="trunk",
        model_type="llama",
        model_path=str(single),
        component="trunk",
        split_points=(2, 4),
        host="process",
    )


@pytest.fixture
def serve(trunk: ModelConfig) -> Iterator[Serve]:
    """Return a function that starts a server, whose models start again without a pause."""
    with ExitStack() as stack:

        def serve(**options: Any) -> StatusServer:
            server = stack.enter_context(StatusServer([trunk], **options))
            machine = server.control.manager._shell.machine
            machine.limits = dataclasses.replace(machine.limits, restart_backoff=0.0, restart_reset=0.0)
            return server

        yield serve


@pytest.fixture
def use() -> Iterator[Callable[..., Any]]:
    """Return a function that connects to the trunk until the test ends."""
    with ExitStack() as stack:

        def use(server: StatusServer, **options: Any) -> Any:
            remote = connect(f"{server.url}/trunk", **options)
            stack.callback(remote.close)
            return remote

        yield use


@pytest.fixture(scope="module")
def models(single: Path) -> Any:
    whole = AutoModelForCausalLM.from_pretrained(single).eval()
    torch.manual_seed(0)
    return SimpleNamespace(whole=whole, ids=torch.randint(3, whole.config.vocab_size, (2, 6)))


@pytest.fixture
def split(single: Path) -> Callable[[Any], SplitCausalLM]:
    """Return a function that makes a model of the ends here and a remote trunk."""

    def split(remote: Any) -> SplitCausalLM:
        parts = load_split_model("llama", (2, 4), str(single), parts=("bottom", "top"))
        return SplitCausalLM(parts.bottom, remote, parts.top)

    return split


def generated(model: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    torch.manual_seed(1)
    chosen = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 6, **options}
    result: torch.Tensor = model.generate(ids, **chosen)
    return result


def hidden(remote: Any, tokens: int = 3) -> torch.Tensor:
    return torch.randn(1, tokens, remote.facts.hidden_size, generator=torch.Generator().manual_seed(2))


def pid_of(server: StatusServer) -> int:
    pid = server.control.manager.get_model_info("trunk").pid
    assert pid is not None
    return pid


def opened(server: StatusServer) -> dict[str, Any]:
    return server.control.traffic.of("trunk").to_dict()


def settled(server: StatusServer, met: Callable[[], object]) -> None:
    async def wait(_: Any) -> None:
        await until_met(met)

    server.run(wait)


def exchange(server: StatusServer, *frames: Frame, token: str | None = None) -> list[Frame]:
    connection = Endpoint(f"{server.url}/trunk", token).open()
    try:
        return [connection.exchange(frame) for frame in frames]
    finally:
        connection.close()


def test_generation_is_equal(serve: Serve, use: Any, models: Any, split: Any) -> None:
    """As on a trunk in the server's process; and nothing is left when its users are gone."""
    server = serve()
    model = split(use(server))
    for options in ({}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}, {"use_cache": False}):
        assert torch.equal(generated(models.whole, models.ids, **options), generated(model, models.ids, **options))
    assert opened(server)["steps"] > 15
    gc.collect()
    settled(server, lambda: not server.control.manager.get_model_info("trunk").leases)
    assert (opened(server)["open"], opened(server)["cache_bytes"]) == (0, 0)
    assert server.request("DELETE", "/api/models/trunk").status == 200


def test_gradients_are_equal(serve: Serve, use: Any, models: Any, split: Any) -> None:
    """Those of the ends, through the process."""
    model = split(use(serve()))
    for each in (models.whole, model):
        each.zero_grad()
        each(models.ids, labels=models.ids, use_cache=False).loss.backward()
    expected = dict(models.whole.named_parameters())
    here = {name: each for name, each in model.named_parameters() if each.requires_grad}
    assert "lm_head.weight" in here
    assert all(torch.equal(each.grad, expected[name].grad) for name, each in here.items())


def _kill_before(server: StatusServer, answer: Any, number: signal.Signals) -> Any:
    async def wrapped(*arguments: Any) -> Any:
        os.kill(pid_of(server), number)
        return await answer(*arguments)

    return wrapped


def _kill_after(server: StatusServer, answer: Any, number: signal.Signals) -> Any:
    async def wrapped(*arguments: Any) -> Any:
        reply = await answer(*arguments)
        os.kill(pid_of(server), number)
        return reply

    return wrapped


def _kill_within(server: StatusServer, answer: Any, number: signal.Signals) -> Any:
    """The process stands still when the frame comes, and dies with it."""

    async def wrapped(*arguments: Any) -> Any:
        pid = pid_of(server)
        relays = [held.table for held in server.sessions._held["trunk"].values()]
        entered = asyncio.Event()
        loop = asyncio.get_running_loop()
        exchange = relays[0]._host.exchange

        def entering(frame: Frame) -> Frame:
            loop.call_soon_threadsafe(entered.set)
            return exchange(frame)

        os.kill(pid, signal.SIGSTOP)
        relays[0]._host.exchange = entering
        reply = asyncio.ensure_future(answer(*arguments))
        await entered.wait()
        os.kill(pid, number)
        # SIGSEGV waits until it goes on.
        os.kill(pid, signal.SIGCONT)
        relays[0]._host.exchange = exchange
        return await reply

    return wrapped


@pytest.mark.parametrize(
    ("when", "number"),
    [
        pytest.param(_kill_before, signal.SIGKILL, id="before-SIGKILL"),
        pytest.param(_kill_after, signal.SIGKILL, id="after-SIGKILL"),
        pytest.param(_kill_within, signal.SIGKILL, id="within-SIGKILL"),
        pytest.param(_kill_within, signal.SIGSEGV, id="within-SIGSEGV"),
    ],
)
def test_the_text_goes_on_when_the_process_dies(
    serve: Serve, use: Any, models: Any, split: Any, when: Any, number: signal.Signals
) -> None:
    """At several messages of a generation: the first steps, and one in the middle."""
    server = serve()
    remote = use(server)
    model = split(remote)
    answer = server.sessions.answer
    expected = {"num_beams": 2}, generated(models.whole, models.ids, num_beams=2)
    for died, boundary in enumerate((2, 4, 6), start=1):
        count = 0

        async def counting(*arguments: Any, at: int = boundary) -> Any:
            nonlocal count
            count += 1
            chosen = when(server, answer, number) if count == at else answer
            return await chosen(*arguments)

        server.sessions.answer = counting  # type: ignore[method-assign]
        before = pid_of(server)
        assert torch.equal(expected[1], generated(model, models.ids, **expected[0]))
        assert count > boundary
        settled(server, lambda: server.control.manager.get_model_info("trunk").ready)
        assert pid_of(server) != before
        statistics = server.control.manager.get_statistics()
        assert (statistics.hosts_died, statistics.restarts) == (died, died)


def test_others_are_not_disturbed(serve: Serve, use: Any, models: Any, split: Any, single: Path) -> None:
    """A model in another process, and one in the server's, go on while one is away."""
    server = serve()
    other = dataclasses.replace(server._configs[0], model_id="other", host="inline")
    server.run(lambda manager: manager.load_model(other))
    inline = server.control.manager.get_model("other").model  # type: ignore[union-attr]
    remote = use(server)
    cache = remote.new_cache()
    first = remote(hidden(remote), past_key_values=cache)
    os.kill(pid_of(server), signal.SIGKILL)
    assert torch.equal(inline(hidden(remote)), first)
    mine = inline.new_cache()
    inline(hidden(remote), past_key_values=mine)
    assert torch.equal(
        remote(hidden(remote, 1), past_key_values=cache), inline(hidden(remote, 1), past_key_values=mine)
    )


class TestLimits:
    def test_of_the_server(self, serve: Serve, use: Any) -> None:
        """Sessions and their caches are limited as elsewhere."""
        server = serve(limits=SessionLimits(max_sessions=2, cache_bytes=100_000))
        remote = use(server, max_tokens=20)
        per_token = remote.facts.cache_bytes_per_token
        caches = [remote.new_cache() for _ in range(3)]
        for cache in caches[:2]:
            remote(hidden(remote), past_key_values=cache)
        assert (opened(server)["open"], opened(server)["cache_bytes"]) == (2, 2 * 20 * per_token)
        with pytest.raises(RemoteBusyError, match="2 sessions are open") as refusal:
            remote(hidden(remote), past_key_values=caches[2])
        assert refusal.value.retry_after
        with pytest.raises(RemoteBusyError, match="declare fewer tokens"):
            remote(hidden(remote, 100_000 // per_token), past_key_values=caches[0])
        remote(hidden(remote), past_key_values=caches[0])

    def test_of_an_owner(self, serve: Serve, use: Any) -> None:
        """Each token has its own; no token reaches the sessions of another."""
        server = serve(tokens=Tokens({ALICE: Owner("alice", max_sessions=1, max_tokens=50), BOB: Owner("bob")}))
        alice, bob = use(server, token=ALICE), use(server, token=BOB)
        assert (alice.facts.max_tokens, bob.facts.max_tokens) == (50, 32_768)
        cache = alice.new_cache()
        alice(hidden(alice), past_key_values=cache)
        with pytest.raises(RemoteBusyError, match="1 of them yours"):
            alice(hidden(alice), past_key_values=alice.new_cache())
        with pytest.raises(RemoteStepError, match="allows 512 and 50"):
            alice(hidden(alice, 48), past_key_values=cache)
        for _ in range(2):
            bob(hidden(bob), past_key_values=bob.new_cache())

        (mine,) = exchange(server, Frame(Kind.OPEN, meta={"rows": 1, "tokens": 5}), token=BOB)
        secret = {"secret": mine.meta["secret"]}
        # What only the server may say is not believed.
        forged = {**secret, "relay": {"id": "", "owner": "bob", "limits": {}}}
        theirs = exchange(
            server,
            Frame(Kind.STEP, mine.session, 1, secret),
            Frame(Kind.STEP, mine.session, 1, forged),
            Frame(Kind.CLOSE, mine.session, meta=secret),
            token=ALICE,
        )
        assert [reply.meta.get("code") for reply in theirs] == ["unknown_session", "unknown_session", None]
        assert "relay" not in mine.meta
        before = opened(server)["open"]
        (closed,) = exchange(server, Frame(Kind.CLOSE, mine.session, meta=secret), token=BOB)
        assert closed.kind is Kind.CLOSED
        assert opened(server)["open"] == before - 1

    def test_of_time(self, serve: Serve) -> None:
        """A session without a user ends in the process, too, and the lease with it."""
        server = serve(limits=SessionLimits(idle_timeout=0.5))
        (reply,) = exchange(server, Frame(Kind.OPEN, meta={"rows": 1, "tokens": 5}))
        assert reply.kind is Kind.OPENED
        assert opened(server)["open"] == 1
        settled(server, lambda: opened(server)["expired"] == 1)
        settled(server, lambda: not server.control.manager.get_model_info("trunk").leases)


def test_a_process_that_stands_still_keeps_no_others_sessions(
    serve: Serve, use: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Idle sessions of other models end while one process does not answer."""
    from splitlearn_serve import sessions

    monkeypatch.setattr(sessions, "_EXPIRY_MOST", 0.2)
    server = serve(limits=SessionLimits(idle_timeout=0.8))
    remote = use(server)
    remote(hidden(remote), past_key_values=remote.new_cache())
    other = dataclasses.replace(server._configs[0], model_id="other", host="inline")
    server.run(lambda manager: manager.load_model(other))
    pid = pid_of(server)
    os.kill(pid, signal.SIGSTOP)
    try:
        connection = Endpoint(f"{server.url}/other").open()
        connection.exchange(Frame(Kind.OPEN, meta={"rows": 1, "tokens": 5}))
        settled(server, lambda: server.control.traffic.of("other").expired == 1)
    finally:
        os.kill(pid, signal.SIGCONT)
        connection.close()


def test_unloaded_by_force_and_reloaded(serve: Serve, use: Any, models: Any, split: Any) -> None:
    """Sessions move to the next process, as they do within one."""
    server = serve()
    model = split(use(server))
    answer, count = server.sessions.answer, 0
    changes = {3: ("DELETE", "/api/models/trunk?force=true"), 6: ("POST", "/api/models/trunk/reload?wait=true")}

    async def counting(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count in changes:
            assert (await asyncio.to_thread(server.request, *changes[count])).status in (200, 202)
        return await answer(*arguments)

    server.sessions.answer = counting  # type: ignore[method-assign]
    expected = generated(models.whole, models.ids, max_new_tokens=10)
    assert torch.equal(expected, generated(model, models.ids, max_new_tokens=10))
    assert count > 6
    assert server.control.manager.get_model_info("trunk").generation == 3
