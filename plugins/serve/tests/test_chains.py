"""Chains: servers that send their outputs on, with a copy to the owner; and what becomes of the text if one cannot."""

from __future__ import annotations

import asyncio
import copy
import gc
import logging
import os
import re
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from proxy import Pieces, Proxy, offset_of_frame
from serving import Process, StatusServer, make_certificate, until_met
from splitlearn_core import (
    ConfigurationError,
    ConnectionLostError,
    Cut,
    MissingFileError,
    ModelConfig,
    ProtocolError,
    RemoteBusyError,
    RemoteComponent,
    RemoteError,
    RemoteStepError,
    SplitCausalLM,
    connect,
    load_split_model,
)
from splitlearn_core.extension import Endpoint, Frame, Kind, SessionLimits, decode
from splitlearn_core.hosts import carriers, chains
from splitlearn_core.hosts.payload import pack
from splitlearn_core.testing.worlds import tiny_model, write_checkpoint
from splitlearn_serve import hops
from splitlearn_serve.hops import Hops
from splitlearn_serve.packs import Packs
from splitlearn_serve.session_settings import next_endpoints, session_problems
from splitlearn_serve.sessions import Sessions
from splitlearn_serve.tls import server_context
from splitlearn_serve.tokens import Owner, Tokens

pytestmark = [pytest.mark.usefixtures("llama"), pytest.mark.filterwarnings("ignore:.*past_key_values.*:FutureWarning")]

#: Of two trunks, and of three.
TWO, THREE = (1, 3, 5), (1, 2, 4, 5)
ALICE, HOP = "a" * 32, "h" * 32
#: A certificate of its own authority that was valid on one day, and its key.
EXPIRED = Path(__file__).with_name("expired.pem")


@pytest.fixture
def configured(single: Path) -> Callable[..., ModelConfig]:
    """Return a function that makes the configuration of a trunk."""

    def configured(name: str, cuts: tuple[int, ...] = TWO, **values: Any) -> ModelConfig:
        model = str(values.pop("model", single))
        return ModelConfig(
            model_id=name, model_type="llama", model_path=model, component=name, split_points=cuts, **values
        )

    return configured


@pytest.fixture
def running() -> Iterator[ExitStack]:
    """What ends with the test."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def serve(running: ExitStack) -> Callable[..., StatusServer]:
    """Return a function that starts a server, which may send on to some addresses."""

    def serve(config: ModelConfig | list[ModelConfig], *following: Endpoint | str, **options: Any) -> StatusServer:
        endpoints = [Endpoint(each) if isinstance(each, str) else each for each in following]
        configs = config if isinstance(config, list) else [config]
        return running.enter_context(StatusServer(configs, hops=Hops(endpoints), **options))

    return serve


@pytest.fixture
def use(running: ExitStack) -> Callable[..., RemoteComponent]:
    """Return a function that connects to a trunk until the test ends."""

    def use(url: str, **options: Any) -> RemoteComponent:
        remote = connect(url, **options)
        running.callback(remote.close)
        return remote

    return use


@pytest.fixture(scope="module")
def models(single: Path) -> Callable[[str], Any]:
    """Return a function that returns the unsplit model in a dtype, and some input padded on the left."""
    made: dict[str, Any] = {}

    def models(dtype: str = "float32") -> Any:
        if dtype not in made:
            whole = AutoModelForCausalLM.from_pretrained(single, dtype=getattr(torch, dtype)).eval()
            whole.generation_config.assistant_confidence_threshold = 0
            ids = torch.randint(3, whole.config.vocab_size, (3, 9), generator=torch.Generator().manual_seed(0))
            mask = torch.ones_like(ids)
            mask[0, :4] = mask[1, :2] = 0
            made[dtype] = SimpleNamespace(whole=whole, ids=ids, mask=mask)
        return made[dtype]

    return models


@pytest.fixture
def split(single: Path) -> Callable[..., SplitCausalLM]:
    """Return a function that makes a model of the ends here and remote trunks."""

    def split(*trunks: RemoteComponent, dtype: str = "float32", **options: Any) -> SplitCausalLM:
        cuts = (*(trunk.start_layer for trunk in trunks), trunks[-1].end_layer)
        parts = load_split_model("llama", cuts, str(single), parts=("bottom", "top"), dtype=dtype, progress=False)
        return SplitCausalLM(parts[0], *trunks, parts[-1], **options)

    return split


@pytest.fixture
def pair(configured: Any, serve: Any, use: Any) -> tuple[RemoteComponent, RemoteComponent]:
    """Two trunks on two servers, of which the first sends on to the second."""
    url = f"{serve(configured('trunk2')).url}/trunk2"
    return use(f"{serve(configured('trunk1'), url).url}/trunk1"), use(url)


def generated(model: Any, models: Any, **options: Any) -> torch.Tensor:
    torch.manual_seed(1)
    chosen = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 8, "attention_mask": models.mask, **options}
    result: torch.Tensor = model.generate(models.ids, **chosen)
    return result


def both(models: Any, model: SplitCausalLM, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return generated(models.whole, models, **options), generated(model, models, **options)


def is_chained(*following: RemoteComponent) -> bool:
    """Whether everything that these hosts have executed was sent on to them."""
    return all(each.host.bytes_sent == 0 < each.host.bytes_received for each in following)


# --- bit-equal ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_generation_is_equal(configured: Any, serve: Any, use: Any, models: Any, split: Any, dtype: str) -> None:
    """Greedy, sampled, with beams, with drafted tokens, padded on the left; the owner sends to the first host alone."""
    url = f"{serve(configured('trunk2', dtype=dtype)).url}/trunk2"
    first, second = use(f"{serve(configured('trunk1', dtype=dtype), url).url}/trunk1"), use(url)
    model, known = split(first, second, dtype=dtype), models(dtype)
    for options in (
        {},
        {"do_sample": True, "num_return_sequences": 2},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_beams": 2},
    ):
        assert torch.equal(*both(known, model, **options)), options
    drafting = SimpleNamespace(whole=known.whole, ids=known.ids[2:].repeat(1, 3), mask=torch.ones(1, 27, dtype=int))
    assert torch.equal(*both(drafting, model, prompt_lookup_num_tokens=3))
    assert is_chained(second)


@torch.no_grad()
def test_three_hops_and_a_cache_that_goes_on(configured: Any, serve: Any, use: Any, models: Any, split: Any) -> None:
    """Over several calls, copied, and cropped; the middle host takes over, and sends on."""
    urls: list[str] = []
    for name in ("trunk3", "trunk2", "trunk1"):
        urls.insert(0, f"{serve(configured(name, THREE), *urls[:1]).url}/{name}")
    trunks = [use(url) for url in urls]
    model, known = split(*trunks), models()

    def run(each: Any) -> list[torch.Tensor]:
        first = DynamicCache(config=known.whole.config)
        logits = [each(known.ids, attention_mask=known.mask, past_key_values=first).logits]
        second = copy.deepcopy(first)
        for cache, tokens in ((first, known.ids[:, :3]), (second, known.ids[:, :1])):
            mask = torch.cat([known.mask, torch.ones(3, tokens.shape[1], dtype=torch.long)], dim=1)
            logits.append(each(tokens, attention_mask=mask, past_key_values=cache).logits)
        second.crop(-2)
        logits.append(each(known.ids[:, :1], attention_mask=known.mask, past_key_values=second).logits)
        return logits

    assert all(torch.equal(*logits) for logits in zip(run(known.whole), run(model), strict=True))
    assert is_chained(*trunks[1:])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a process is forked")
def test_a_hop_whose_trunk_has_a_process_of_its_own(
    configured: Any, serve: Any, use: Any, models: Any, split: Any
) -> None:
    """Its server relays what is sent on, and asks its process for results."""
    url = f"{serve(configured('trunk2', host='process')).url}/trunk2"
    first, second = use(f"{serve(configured('trunk1'), url).url}/trunk1"), use(url)
    assert torch.equal(*both(models(), split(first, second)))
    assert is_chained(second)


def test_tokens_and_certificates_are_those_of_each_pair(
    configured: Any, serve: Any, use: Any, models: Any, split: Any, tmp_path: Path
) -> None:
    """The first server has its own for the second, which never sees more than a pass for the owner's session."""
    cert, key = make_certificate(tmp_path)
    token = tmp_path / "token"
    token.write_text(HOP)
    token.chmod(0o600)
    tokens = Tokens({ALICE: Owner("alice"), HOP: Owner("hop", max_sessions=1)})
    url = f"{serve(configured('trunk2'), tokens=tokens, tls=server_context(cert, key)).url}/trunk2"
    (following,) = next_endpoints({"next": [url], "next_token_file": str(token), "next_ca_file": cert})
    one = serve(configured("trunk1"), following, tokens=Tokens({ALICE: Owner("alice")}))
    first, second = use(f"{one.url}/trunk1", token=ALICE), use(url, token=ALICE, ca_file=cert)
    assert url.startswith("https:")
    assert torch.equal(*both(models(), split(first, second), num_beams=2))
    assert is_chained(second)


def test_one_server_sends_on_to_itself(configured: Any, serve: Any, use: Any, models: Any, split: Any) -> None:
    """An owner who may use its trunks needs no permission for that; sessions belong to the owner's token."""
    tokens = Tokens({ALICE: Owner("alice"), HOP: Owner("bob")})
    server = serve([configured(f"trunk{number}", THREE) for number in (1, 2, 3)], tokens=tokens)
    for token in (ALICE, HOP):
        trunks = [use(f"{server.url}/trunk{number}", token=token, chain=True) for number in (1, 2)]
        trunks.append(use(f"{server.url}/trunk3", token=token))
        assert torch.equal(*both(models(), split(*trunks), num_beams=2))
        assert is_chained(*trunks[1:])


@pytest.mark.parametrize("modes", [("packed", "packed"), ("packed", "solo"), ("solo", "packed")], ids="-".join)
def test_sessions_that_are_packed(
    serve: Any, use: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, modes: tuple[str, str]
) -> None:
    """At one hop, or at both: several owners' texts are those of the unsplit model, and replies say how they ran."""
    pytest.importorskip("splitlearn_qwen2")
    checkpoint = write_checkpoint(tmp_path / "qwen2", tiny_model("qwen2"))
    whole = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    cuts, users = (1, 3, whole.config.num_hidden_layers - 1), 3
    arrived: dict[Packs, list[Any]] = {}
    everybody: dict[Packs, asyncio.Event] = {}
    run, answer = Packs.run, Sessions.answer
    replies: dict[str, set[tuple[str, int]]] = {}

    async def run_together(self: Packs, step: Any) -> Any:
        arrived.setdefault(self, []).append(step)
        event = everybody.setdefault(self, asyncio.Event())
        if len(arrived[self]) == users:
            event.set()
        await event.wait()
        return await run(self, step)

    async def answered(self: Sessions, model_id: str, data: Any, owner: Any) -> Any:
        reply = await answer(self, model_id, data, owner)
        frame = decode(reply.data)
        if frame.kind is Kind.RESULT and frame.tensors:
            replies.setdefault(model_id, set()).add((frame.meta["mode"], frame.meta.get("pack", 1)))
        return reply

    monkeypatch.setattr(Packs, "run", run_together)
    monkeypatch.setattr(Sessions, "answer", answered)
    config = {"model_type": "qwen2", "model_path": str(checkpoint), "split_points": cuts}
    two = serve(ModelConfig(model_id="trunk2", component="trunk2", **config))
    one = serve(ModelConfig(model_id="trunk1", component="trunk1", **config), f"{two.url}/trunk2")
    ids = torch.randint(3, 90, (users, 6), generator=torch.Generator().manual_seed(0))
    options = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0}
    # Each in a thread: plugins are looked up once, before.
    ends = load_split_model("qwen2", cuts, checkpoint, parts=("bottom", "top"), progress=False)
    rows = [
        (use(f"{one.url}/trunk1", mode=modes[0]), use(f"{two.url}/trunk2", mode=modes[1], wait=0)) for _ in range(users)
    ]
    texts = [SplitCausalLM(ends[0], *row, ends[-1]) for row in rows]
    with ThreadPoolExecutor(users) as pool:
        results = list(pool.map(lambda place: texts[place].generate(ids[place : place + 1], **options), range(users)))
    for place, result in enumerate(results):
        assert torch.equal(result, whole.generate(ids[place : place + 1], **options))
    assert is_chained(*(second for _, second in rows))
    for name, mode in zip(("trunk1", "trunk2"), modes, strict=True):
        assert {kind for kind, _ in replies[name]} == {mode}
        assert (max(size for _, size in replies[name]) == users) is (mode == "packed")


# --- a star where there is no chain -------------------------------------------------------------------


def test_training_and_cuts_go_through_the_owner(
    pair: tuple[RemoteComponent, RemoteComponent], models: Any, split: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Gradients come back the same way, and what is treated at a cut must be here."""
    caplog.set_level(logging.INFO, "splitlearn_core")
    known, model = models(), split(*pair)
    losses = [each(known.ids, labels=known.ids, use_cache=False).loss for each in (known.whole, model)]
    assert torch.equal(*losses)
    treated = split(*pair, cuts=[Cut(), Cut(), Cut()])
    assert "what crosses the cuts is treated here" in caplog.text
    assert torch.equal(*both(known, treated))
    assert not is_chained(pair[1])
    assert "output goes on to" in model.trunks[0].extra_repr()


def _of_another_model(configured: Any, serve: Any, tmp_path: Path) -> list[Endpoint]:
    model = write_checkpoint(tmp_path / "other", tiny_model("llama", seed=7))
    return [Endpoint(f"{serve(configured('trunk2', model=model)).url}/trunk2")]


def _with_certificate(configured: Any, serve: Any, files: tuple[Path, Path], ca_file: Path | None) -> list[Endpoint]:
    server = serve(configured("trunk2"), tls=server_context(*files))
    return [Endpoint(f"{server.url}/trunk2", ca_file=None if ca_file is None else str(ca_file))]


def _with_another_name(configured: Any, serve: Any, tmp_path: Path) -> list[Endpoint]:
    files = make_certificate(tmp_path, address="DNS:elsewhere")
    return _with_certificate(configured, serve, files, files[0])


#: What the first server may send on to -> the words about it.
REFUSALS: dict[str, tuple[Callable[..., list[Endpoint]], str]] = {
    "none": (lambda *_: [], "sends on to no other host"),
    "another model": (_of_another_model, "URL runs the trunk2 of another model"),
    "another part": (
        lambda configured, serve, _: [Endpoint(f"{serve(configured('trunk1')).url}/trunk1")],
        "URL runs trunk1",
    ),
    "another server": (
        lambda configured, serve, _: [Endpoint(f"{serve(configured('trunk2')).url}/trunk2")],
        "URL is another server with this trunk2",
    ),
    "no token": (
        lambda configured, serve, _: [
            Endpoint(f"{serve(configured('trunk2'), tokens=Tokens({ALICE: Owner('alice')})).url}/trunk2")
        ],
        "URL refuses access: this server requires a token (--next-token-file)",
    ),
    "another token": (
        lambda configured, serve, _: [
            Endpoint(f"{serve(configured('trunk2'), tokens=Tokens({ALICE: Owner('alice')})).url}/trunk2", HOP)
        ],
        "URL refuses access: the token is not one of this server's (--next-token-file)",
    ),
    "no authority": (
        lambda configured, serve, _: _with_certificate(configured, serve, (EXPIRED, EXPIRED), None),
        "the certificate of URL is not valid: self",
    ),
    "expired": (
        lambda configured, serve, _: _with_certificate(configured, serve, (EXPIRED, EXPIRED), EXPIRED),
        "the certificate of URL is not valid: certificate has expired (--next-ca-file)",
    ),
    "another name": (_with_another_name, "the certificate of URL is not valid: IP address mismatch"),
    "away": (lambda *_: [Endpoint("http://127.0.0.1:9/trunk2")], "the connection to URL failed: Connection refused"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_who_cannot_send_on_is_named(
    configured: Any,
    serve: Any,
    use: Any,
    models: Any,
    split: Any,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    case: str,
) -> None:
    """Once, with the reason; the text is the same, and ``chain=True`` makes an error of it."""
    caplog.set_level(logging.INFO, "splitlearn_core.hosts")
    make, words = REFUSALS[case]
    following = make(configured, serve, tmp_path)
    words = words.replace("URL", following[0].url if following else "")
    two = f"{serve(configured('trunk2')).url}/trunk2"
    one = f"{serve(configured('trunk1'), *following).url}/trunk1"
    first, second = use(one), use(two)
    model = split(first, second)
    assert torch.equal(*both(models(), model))
    (report,) = [record for record in caplog.records if record.name == chains.__name__]
    assert report.levelno == (logging.WARNING if following else logging.INFO)
    assert words in report.getMessage()
    assert one in report.getMessage()
    assert not is_chained(second)
    assert f"output comes back, not on to {two}" in first.extra_repr()
    with pytest.raises(ConfigurationError, match="cannot go on to trunk2") as caught:
        split(use(one, chain=True), second)
    assert words in caught.value.message
    assert f"--next {two}" in caught.value.hint
    assert "no wire= for either" in caught.value.hint


def test_a_chain_can_be_refused_by_its_user(
    pair: tuple[RemoteComponent, RemoteComponent], use: Any, models: Any, split: Any
) -> None:
    """By ``chain=False``, or by an encoding that the next host would have to know."""
    for options, why in (({"chain": False}, "chain=False"), ({"wire": "int8"}, "as they are")):
        model = split(use(pair[0].url, **options), pair[1])
        assert why in model.trunks[0].link_to(pair[1]).refusal
    assert torch.equal(*both(models(), split(use(pair[0].url, chain=False), pair[1])))
    assert not is_chained(pair[1])


# --- bad luck -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["request", "reply"])
@pytest.mark.parametrize("is_delivered", [False, True], ids=["lost", "delivered"])
def test_a_broken_connection_between_hops(
    configured: Any,
    serve: Any,
    use: Any,
    models: Any,
    split: Any,
    running: ExitStack,
    direction: str,
    is_delivered: bool,
) -> None:
    """At any message between them, the owner sends what has not arrived, and the text goes on."""
    two = serve(configured("trunk2"))
    proxy = running.enter_context(Proxy(two.port))
    one = serve(configured("trunk1"), f"{proxy.url}/trunk2")
    first, second = use(f"{one.url}/trunk1"), use(f"{two.url}/trunk2")
    model, known = split(first, second), models()
    expected = generated(known.whole, known)
    before = proxy.count[direction]
    assert torch.equal(generated(model, known), expected)
    messages = proxy.count[direction] - before
    assert messages >= 8
    for boundary in range(1, messages + 1, 3):
        last = proxy.count[direction] + boundary

        def fate(toward: str, number: int, message: bytes, last: int = last) -> Pieces:
            ends = toward == direction and number == last
            return [*([message] if is_delivered or not ends else []), *([None] if ends else [])]

        proxy.fate = fate
        assert torch.equal(generated(model, known), expected), boundary


def test_a_next_host_that_is_away_for_a_while(
    configured: Any,
    serve: Any,
    use: Any,
    models: Any,
    split: Any,
    running: ExitStack,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """For its neighbour alone: outputs come through the owner, which is reported, until it is tried again."""
    two = serve(configured("trunk2"))
    proxy = running.enter_context(Proxy(two.port))
    first = use(f"{serve(configured('trunk1'), f'{proxy.url}/trunk2').url}/trunk1")
    second = use(f"{two.url}/trunk2")
    model, known = split(first, second), models()
    monkeypatch.setattr(hops.Hops, "_host", _raising("the connection to the next host failed"))
    assert torch.equal(*both(known, model))
    assert "did not send its output on" in caplog.text
    assert caplog.text.count("the connection to the next host failed") == 1
    sent = second.host.bytes_sent
    assert sent > 0
    monkeypatch.undo()
    link = first.link_to(second)
    assert not link.is_open
    monkeypatch.setattr(link, "_resumes_at", 0.0)
    assert torch.equal(*both(known, model))
    assert second.host.bytes_sent == sent


def _raising(message: str) -> Callable[..., Any]:
    def fail(*_: Any) -> Any:
        raise ConnectionLostError(message, code="connection")

    return fail


@pytest.mark.parametrize("hung", [0, 1])
def test_a_hop_that_hangs_is_named(configured: Any, serve: Any, use: Any, models: Any, split: Any, hung: int) -> None:
    """After the time that its owner allows; the other one is not blamed."""
    two = serve(configured("trunk2"))
    one = serve(configured("trunk1"), f"{two.url}/trunk2")
    urls = [f"{one.url}/trunk1", f"{two.url}/trunk2"]
    trunks = [use(url, wait=0) for url in urls]
    model = split(*trunks)
    hanging = trunks[hung].host
    hanging.drop_connections()
    hanging.endpoint = replace(hanging.endpoint, reply_timeout=1.0)
    goes_on = threading.Event()
    server = (one, two)[hung]

    hook = _hooked(
        server,
        f"trunk{hung + 1}",
        lambda module: module.register_forward_pre_hook(lambda *_: goes_on.wait(60) and None),
    )
    try:
        with pytest.raises(ConnectionLostError) as caught:
            generated(model, models())
        assert urls[hung] in caught.value.message
        assert urls[1 - hung] not in caught.value.message
    finally:
        goes_on.set()
        hook.remove()
    assert torch.equal(*both(models(), split(*map(use, urls))))


@torch.no_grad()
def test_a_call_that_failed_after_the_output_was_sent_on(
    configured: Any, serve: Any, use: Any, models: Any, split: Any, running: ExitStack
) -> None:
    """The second host has executed the step, and its owner does not know; the same cache can be used again."""
    two = serve(configured("trunk2"))
    one = serve(configured("trunk1"), f"{two.url}/trunk2")
    proxy = running.enter_context(Proxy(one.port))
    first, second = use(f"{proxy.url}/trunk1", wait=0), use(f"{two.url}/trunk2")
    model, known = split(first, second), models()
    cache, expected = (DynamicCache(config=known.whole.config) for _ in range(2))
    mask = known.mask[2:]
    for each, its in ((known.whole, expected), (model, cache)):
        each(known.ids[2:], attention_mask=mask, past_key_values=its)
    count = proxy.count["reply"]
    proxy.fate = lambda direction, number, message: [None] if direction == "reply" and number > count else [message]
    with pytest.raises(ConnectionLostError, match="trunk1"):
        model(known.ids[2:, :1], past_key_values=cache)
    two.run(_executed(two, 2))
    proxy.fate = lambda direction, number, message: [message]
    logits = [
        each(known.ids[2:, 1:3], past_key_values=its).logits for each, its in ((known.whole, expected), (model, cache))
    ]
    assert torch.equal(*logits)


def _executed(server: StatusServer, steps: int) -> Callable[[Any], Any]:
    async def wait(_: Any) -> None:
        await until_met(lambda: server.control.traffic.of("trunk2").steps >= steps)

    return wait


def test_many_outputs_on_the_way(
    pair: tuple[RemoteComponent, RemoteComponent], models: Any, split: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server whose next host is slow keeps no more than a number of them."""
    monkeypatch.setattr(hops, "MOST_ON_THE_WAY", 0)
    assert torch.equal(*both(models(), split(*pair)))
    assert "0 outputs are on their way" in str(pair[0].link_to(pair[1]).reason)


@torch.no_grad()
def test_who_sends_on_gets_no_result(pair: tuple[RemoteComponent, RemoteComponent]) -> None:
    """It has the pass; the session's owner gets the result, and an error for a step that has not arrived."""
    host = pair[1].host
    opened = host.request(Frame(Kind.OPEN, meta={"rows": 1, "tokens": 4}))
    specs, buffers = pack({"hidden_states": torch.zeros(1, 2, host.facts.hidden_size)})
    collecting = Frame(Kind.COLLECT, opened.session, 1, {"secret": opened.meta["secret"], "nonce": "n", "wait": 0})
    assert host.exchange(collecting).meta["code"] == "not_arrived"
    passing = Frame(Kind.STEP, opened.session, 1, {"pass": opened.meta["pass"], "nonce": "n"}, specs, buffers)
    reply = host.exchange(passing)
    assert (reply.kind, reply.tensors, dict(reply.meta)) == (Kind.RESULT, (), {})
    assert [spec.name for spec in host.exchange(collecting).tensors] == ["output"]


# --- refusals and nonsense ----------------------------------------------------------------------------


class Midway:
    """Calls a function once, before a number of forwards of a model."""

    def __init__(self, model: Any, action: Callable[[], Any], after: int = 4) -> None:
        self.left, self._action = after, action
        model.register_forward_pre_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.left -= 1
        if self.left == 0:
            self._action()


def test_a_hop_without_room_is_named(configured: Any, serve: Any, use: Any, models: Any, split: Any) -> None:
    """For another session; whoever has one goes on, and so does the refused one when there is room."""
    two = serve(configured("trunk2"), limits=SessionLimits(max_sessions=1))
    urls = [f"{serve(configured('trunk1'), f'{two.url}/trunk2').url}/trunk1", f"{two.url}/trunk2"]
    model, other = split(*map(use, urls)), split(*map(use, urls))
    known = models()
    expected = generated(known.whole, known)
    refused: list[str] = []

    def ask() -> None:
        with pytest.raises(RemoteBusyError, match=re.escape(f"{urls[1]}: 1 sessions are open")) as caught:
            generated(other, known)
        # Not the error itself: its traceback keeps the caches.
        refused.append(caught.value.code)

    midway = Midway(model, ask)
    assert torch.equal(generated(model, known), expected)
    assert (midway.left < 0, refused) == (True, ["full"])
    gc.collect()
    two.run(_without_sessions(two))
    assert torch.equal(generated(other, known), expected)


def _without_sessions(server: StatusServer) -> Callable[[Any], Any]:
    async def wait(_: Any) -> None:
        await until_met(lambda: server.control.traffic.of("trunk2").open == 0)

    return wait


@torch.no_grad()
def test_a_hop_whose_memory_is_full_is_named(configured: Any, serve: Any, use: Any, models: Any, split: Any) -> None:
    """In a step that it was to take over; a shorter one on the same cache then goes on."""
    known = models()
    probe = serve(configured("trunk2"))
    per_token = use(f"{probe.url}/trunk2").facts.cache_bytes_per_token
    two = serve(configured("trunk2"), limits=SessionLimits(cache_bytes=12 * per_token))
    urls = [f"{serve(configured('trunk1'), f'{two.url}/trunk2').url}/trunk1", f"{two.url}/trunk2"]
    first, second = (use(url, max_tokens=4) for url in urls)
    model, ids = split(first, second), known.ids[2:]
    cache, expected = (DynamicCache(config=known.whole.config) for _ in range(2))
    for each, its in ((known.whole, expected), (model, cache)):
        each(ids, past_key_values=its)
    with pytest.raises(RemoteBusyError, match="cache of one session would take") as caught:
        model(ids[:, :4], past_key_values=cache)
    assert caught.value.message.startswith(f"{urls[1]}: ")
    logits = [each(ids[:, :2], past_key_values=its).logits for each, its in ((known.whole, expected), (model, cache))]
    assert torch.equal(*logits)


@pytest.mark.parametrize("hop", [0, 1])
def test_a_hop_that_is_unloaded(configured: Any, serve: Any, use: Any, models: Any, split: Any, hop: int) -> None:
    """By force, in the middle of a text: it is loaded again, and its sessions alone are rebuilt."""
    two = serve(configured("trunk2"))
    one = serve(configured("trunk1"), f"{two.url}/trunk2")
    model = split(use(f"{one.url}/trunk1"), use(f"{two.url}/trunk2"))
    server, name = (one, two)[hop], f"trunk{hop + 1}"
    midway = Midway(model, lambda: server.request("DELETE", f"/api/models/{name}?force=true"))
    assert torch.equal(*both(models(), model))
    assert midway.left < 0
    opened = [each.control.traffic.of(f"trunk{place}").opened for place, each in enumerate((one, two), start=1)]
    assert opened == [2 - hop, 1 + hop]


def test_a_hop_that_drains_is_named(configured: Any, serve: Any, use: Any, models: Any, split: Any) -> None:
    """It opens no more sessions; those that are open end as they should."""
    two = serve(configured("trunk2"))
    urls = [f"{serve(configured('trunk1'), f'{two.url}/trunk2').url}/trunk1", f"{two.url}/trunk2"]
    model, other = split(*map(use, urls)), split(use(urls[0], wait=0), use(urls[1], wait=0))
    unload = threading.Thread(target=two.request, args=("DELETE", "/api/models/trunk2?timeout=60"))

    def drain() -> None:
        unload.start()
        two.wait_until(lambda manager: manager.get_model_info("trunk2").status == "draining")
        with pytest.raises(ConnectionLostError, match=re.escape(f"{urls[1]}: model 'trunk2' is being unloaded")):
            generated(other, models())

    midway = Midway(model, drain)
    assert torch.equal(*both(models(), model))
    assert midway.left < 0
    gc.collect()
    unload.join(60)
    assert not unload.is_alive()


@pytest.mark.parametrize("change", ["another model", "another dtype", "no token"])
def test_a_hop_that_comes_back_different(
    configured: Any, serve: Any, use: Any, models: Any, split: Any, tmp_path: Path, change: str
) -> None:
    """At the same address: with other values it is named; without a token for its neighbour, the owner passes on."""
    both_known = Tokens({ALICE: Owner("alice"), HOP: Owner("hop")})
    two = serve(configured("trunk2"), tokens=both_known)
    urls = [f"{serve(configured('trunk1'), Endpoint(f'{two.url}/trunk2', HOP)).url}/trunk1", f"{two.url}/trunk2"]
    first, second = (use(url, token=ALICE, wait=5) for url in urls)
    model, known = split(first, second), models()
    values: dict[str, Any] = {}
    if change == "another model":
        values = {"model": write_checkpoint(tmp_path / "other", tiny_model("llama", seed=7))}
    elif change == "another dtype":
        values = {"dtype": "bfloat16"}
    tokens = Tokens({ALICE: Owner("alice")}) if change == "no token" else both_known

    def restart() -> None:
        two.end()
        serve(configured("trunk2", **values), port=two.port, tokens=tokens)

    Midway(model, restart)
    if change == "no token":
        assert torch.equal(*both(known, model))
        reason = f"{urls[1]} refuses access: the token is not one of this server's"
        assert first.link_to(second).reason.startswith(reason)
        return
    what = {"another model": "other weights: digest", "another dtype": "dtype: float32 before, bfloat16 now"}[change]
    with pytest.raises(RemoteError, match="now runs a different component than before") as caught:
        generated(model, known)
    assert caught.value.code == "other_model"
    assert caught.value.message.startswith(urls[1])
    assert what in caught.value.message
    # The other hop serves others as before, without a chain.
    again = serve(configured("trunk2"))
    assert torch.equal(*both(known, split(use(urls[0], token=ALICE), use(f"{again.url}/trunk2"))))


def test_trunks_of_other_dtypes_are_no_chain(configured: Any, serve: Any, use: Any, split: Any, models: Any) -> None:
    """They are refused unless the cuts cast, which happens at the owner's."""
    url = f"{serve(configured('trunk2', dtype='bfloat16')).url}/trunk2"
    first, second = use(f"{serve(configured('trunk1'), url).url}/trunk1"), use(url)
    with pytest.raises(ConfigurationError, match="bfloat16"):
        split(first, second)
    generated(split(first, second, mixed_dtypes=True), models())
    assert second.host.bytes_sent > 0


@pytest.mark.parametrize("hop", [0, 1])
def test_a_hop_that_computes_nonsense_is_named(
    configured: Any, serve: Any, use: Any, models: Any, split: Any, hop: int
) -> None:
    """Values that are not finite: its neighbour is not blamed, and no text is made of them."""
    two = serve(configured("trunk2"))
    one = serve(configured("trunk1"), f"{two.url}/trunk2")
    urls = [f"{one.url}/trunk1", f"{two.url}/trunk2"]
    first, second = map(use, urls)
    model, known = split(first, second), models()
    spoils = False

    def spoil(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output * torch.nan if spoils else output

    hook = _hooked((one, two)[hop], f"trunk{hop + 1}", lambda module: module.register_forward_hook(spoil))
    assert torch.equal(*both(known, model))
    spoils = True
    with pytest.raises(RemoteStepError, match="hidden states with values that are not finite came from") as caught:
        generated(model, known)
    assert caught.value.code == "not_finite"
    assert f"trunk{hop + 1} at {urls[hop]}" in caught.value.message
    assert urls[1 - hop] not in caught.value.message
    spoils = False
    assert torch.equal(*both(known, model))
    hook.remove()
    assert is_chained(second)


def _hooked(server: StatusServer, name: str, add: Callable[[Any], Any]) -> Any:
    """Have a server add a hook to the module of a trunk, and return its handle."""

    async def hooked(manager: Any) -> Any:
        async with manager.lease(name) as leased:
            return await leased.run(add)

    return server.run(hooked)


def _with_byte(message: bytes, place: int, value: int) -> bytes:
    """Change a byte of the header of the frame in a message that is not masked."""
    at = offset_of_frame(message) + place
    return message[:at] + bytes([value]) + message[at + 1 :]


#: Where they are in the header of a frame.
VERSION_AT, KIND_AT, STEP_AT = 4, 5, 16


@pytest.mark.parametrize("hop", [0, 1])
def test_a_hop_that_answers_another_step(
    configured: Any, serve: Any, use: Any, models: Any, split: Any, running: ExitStack, hop: int
) -> None:
    """Once, it is asked again; one that keeps doing so is named."""
    two = serve(configured("trunk2"))
    ports = [serve(configured("trunk1"), f"{two.url}/trunk2").port, two.port]
    proxy = running.enter_context(Proxy(ports[hop]))
    urls = [f"http://127.0.0.1:{port}/trunk{place}" for place, port in enumerate(ports, start=1)]
    urls[hop] = f"{proxy.url}/trunk{hop + 1}"
    first, second = (use(url, wait=5) for url in urls)
    model, known = split(first, second), models()
    left = 1

    def fate(direction: str, number: int, message: bytes) -> Pieces:
        nonlocal left
        is_result = direction == "reply" and message[offset_of_frame(message) + KIND_AT] == Kind.RESULT
        if not is_result or not left:
            return [message]
        left -= 1
        return [_with_byte(message, STEP_AT, 99)]

    proxy.fate = fate
    assert torch.equal(*both(known, model))
    assert left == 0
    left = -1
    impatient = split(*(use(url, wait=0) for url in urls))
    with pytest.raises(ConnectionLostError, match=re.escape(f"{urls[hop]} answered the wrong request")) as caught:
        generated(impatient, known)
    assert urls[1 - hop] not in caught.value.message
    left = 0
    assert torch.equal(*both(known, impatient))


def test_a_hop_of_another_version(
    configured: Any, serve: Any, use: Any, models: Any, split: Any, running: ExitStack
) -> None:
    """It is named by the server that was to send on to it, and by who connects to it."""
    two = serve(configured("trunk2"))
    proxy = running.enter_context(Proxy(two.port))
    proxy.fate = lambda direction, _, message: [_with_byte(message, VERSION_AT, 2) if direction == "reply" else message]
    other = f"{proxy.url}/trunk2"
    first = use(f"{serve(configured('trunk1'), other).url}/trunk1")
    second = use(f"{two.url}/trunk2")
    model = split(first, second)
    assert f"{other}: a frame of protocol version 2; this side speaks version 1" in first.link_to(second).refusal
    assert torch.equal(*both(models(), model))
    with pytest.raises(ProtocolError, match="of protocol version 2") as caught:
        use(other)
    assert caught.value.message.startswith(f"{other}: ")


def test_a_next_host_that_is_silent(
    configured: Any,
    serve: Any,
    use: Any,
    models: Any,
    split: Any,
    running: ExitStack,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Towards its neighbour alone: the owner sends what does not arrive, and another chain of that is not disturbed."""
    monkeypatch.setattr(chains, "ARRIVAL", 0.4)
    two, three = serve(configured("trunk2")), serve(configured("trunk2"))
    proxy = running.enter_context(Proxy(two.port))
    one = serve(configured("trunk1"), f"{proxy.url}/trunk2", f"{three.url}/trunk2")
    first, second, third = use(f"{one.url}/trunk1"), use(f"{two.url}/trunk2"), use(f"{three.url}/trunk2")
    known, silent, good = models(), split(first, second), split(first, third)
    proxy.fate = lambda direction, *message: [] if direction == "request" else message[1:]
    assert torch.equal(*both(known, silent))
    assert first.link_to(second).reason == "it did not arrive"
    assert torch.equal(*both(known, good))
    assert is_chained(third)


def test_a_server_that_connects_to_a_silent_host_sends_on_to_others(configured: Any, serve: Any) -> None:
    """It was restarted, and connects to each when there is an output for it."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        urls = [f"http://127.0.0.1:{silent.getsockname()[1]}/trunk2", f"{serve(configured('trunk2')).url}/trunk2"]
        hosts = Hops([Endpoint(url) for url in urls])
        waiting, working = hosts._endpoints
        errors: list[ConnectionLostError] = []

        def wait() -> None:
            with pytest.raises(ConnectionLostError) as caught:
                hosts._host(waiting)
            errors.append(caught.value)

        thread = threading.Thread(target=wait)
        thread.start()
        stream, _ = silent.accept()
        assert hosts._host(working).url == urls[1]
        assert thread.is_alive()
        stream.close()
        thread.join(60)
        assert [urls[0] in error.message for error in errors] == [True]
        hosts.close()


# --- kills --------------------------------------------------------------------------------------------


@pytest.mark.sample(2)
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
@pytest.mark.parametrize("boundary", [1, 3, 6, 9, 12])
@pytest.mark.parametrize("is_sent", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("killed", [0, 1], ids=["first", "second"])
def test_killed_and_restarted(
    single: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    running: ExitStack,
    use: Any,
    models: Any,
    split: Any,
    monkeypatch: pytest.MonkeyPatch,
    killed: int,
    is_sent: bool,
    boundary: int,
    options: dict[str, Any],
) -> None:
    """One hop is killed at a message of its owner; its sessions alone are rebuilt, and the text goes on."""
    try:
        interpreter = str(request.getfixturevalue("warm").path)
    except pytest.FixtureLookupError:
        # This package is tested alone, without what the tests of the repository share.
        interpreter = sys.executable
    path = os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")])

    def start(place: int, port: int, *following: str) -> Process:
        part = ("--part", f"trunk{place + 1}", "--port", port, *(("--next", *following) if following else ()))
        command = (single, "--split", *TWO, *part)
        process = Process(interpreter, *command, PYTHONPATH=path, OMP_NUM_THREADS="1")
        running.callback(lambda: process.process.poll() is None and process.kill())
        return process

    second = start(1, 0)
    servers = [start(0, 0, second.url), second]
    following = [[second.url], []]
    trunks = [use(server.url) for server in servers]
    model, known = split(*trunks), models()
    expected = generated(known.whole, known, **options)
    opened: list[str] = []
    count = 0
    pending = True
    send = carriers._WebSocketConnection.send

    def kill() -> None:
        nonlocal pending
        pending = False
        server = servers[killed]
        server.kill()
        servers[killed] = start(killed, int(server.address.rpartition(":")[2]), *following[killed])

    def counted(self: Any, frame: Frame) -> None:
        nonlocal count
        if frame.kind is Kind.OPEN:
            opened.append(self._endpoint.url)
        count += frame.kind is not Kind.HELLO
        strikes = pending and count == boundary
        if strikes and not is_sent:
            kill()
        send(self, frame)
        if strikes and is_sent:
            kill()

    monkeypatch.setattr(carriers._WebSocketConnection, "send", counted)
    assert torch.equal(generated(model, known, **options), expected)
    assert not pending
    # Once, and what was killed once more.
    assert opened.count(trunks[1 - killed].url) == 1
    assert opened.count(trunks[killed].url) <= 2


# --- settings -----------------------------------------------------------------------------------------


def test_settings_of_next_servers(tmp_path: Path) -> None:
    """Addresses, the token for them, and certificates; each mistake is named before anything is served."""
    token = tmp_path / "token"
    token.write_text(HOP)
    token.chmod(0o600)
    (endpoint,) = next_endpoints({"next": ["https://two:8710/trunk2"], "next_token_file": str(token)})
    assert (endpoint.url, endpoint.token) == ("https://two:8710/trunk2", HOP)
    assert next_endpoints({}) == []
    assert session_problems({"next": "http://two/trunk2"}) == ["next: 'http://two/trunk2' is not a list of URLs"]
    assert session_problems({"next_token_file": "x"}) == ["next_token_file: there is no URL in next"]
    assert session_problems({"next": ["http://two/trunk2"], "next_ca_file": 3}) == [
        "next_ca_file: 3 is not the path of a file"
    ]
    with pytest.raises(ConfigurationError, match="names no model"):
        next_endpoints({"next": ["http://two:8710"]})
    with pytest.raises(MissingFileError):
        next_endpoints({"next": ["http://two/trunk2"], "next_token_file": str(tmp_path / "nowhere")})
