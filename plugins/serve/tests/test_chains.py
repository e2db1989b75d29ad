"""Chains: servers that send their outputs on, with a copy to the owner; and what becomes of the text if one cannot."""

from __future__ import annotations

import copy
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from proxy import Pieces, Proxy
from serving import Process, StatusServer, until_met
from splitlearn_core import (
    ConfigurationError,
    ConnectionLostError,
    Cut,
    MissingFileError,
    ModelConfig,
    RemoteComponent,
    SplitCausalLM,
    connect,
    load_split_model,
)
from splitlearn_core.extension import Endpoint, Frame, Kind
from splitlearn_core.hosts import carriers, chains
from splitlearn_core.hosts.payload import pack
from splitlearn_core.testing.worlds import tiny_model, write_checkpoint
from splitlearn_serve import hops
from splitlearn_serve.hops import Hops
from splitlearn_serve.session_settings import next_endpoints, session_problems
from splitlearn_serve.tokens import Owner, Tokens

pytestmark = [pytest.mark.usefixtures("llama"), pytest.mark.filterwarnings("ignore:.*past_key_values.*:FutureWarning")]

#: Of two trunks, and of three.
TWO, THREE = (1, 3, 5), (1, 2, 4, 5)
ALICE, HOP = "a" * 32, "h" * 32


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

    def serve(config: ModelConfig, *following: Endpoint | str, **options: Any) -> StatusServer:
        endpoints = [Endpoint(each) if isinstance(each, str) else each for each in following]
        return running.enter_context(StatusServer([config], hops=Hops(endpoints), **options))

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


def test_tokens_are_those_of_each_pair(configured: Any, serve: Any, use: Any, models: Any, split: Any) -> None:
    """The first server has its own for the second, which never sees more than a pass for the owner's session."""
    own = serve(configured("trunk2"), tokens=Tokens({ALICE: Owner("alice"), HOP: Owner("hop", max_sessions=1)}))
    url = f"{own.url}/trunk2"
    one = serve(configured("trunk1"), Endpoint(url, HOP), tokens=Tokens({ALICE: Owner("alice")}))
    first, second = use(f"{one.url}/trunk1", token=ALICE), use(url, token=ALICE)
    assert torch.equal(*both(models(), split(first, second), num_beams=2))
    assert is_chained(second)


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
        "URL refuses access: this server requires a token",
    ),
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

    async def hang(manager: Any) -> Any:
        async with manager.lease(f"trunk{hung + 1}") as leased:
            return await leased.run(
                lambda module: module.register_forward_pre_hook(lambda *_: goes_on.wait(60) and None)
            )

    hook = server.run(hang)
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
    """It has the pass, and the owner of the session the result; who asks for what has not arrived is told so."""
    host = pair[1].host
    opened = host.request(Frame(Kind.OPEN, meta={"rows": 1, "tokens": 4}))
    specs, buffers = pack({"hidden_states": torch.zeros(1, 2, host.facts.hidden_size)})
    collecting = Frame(Kind.COLLECT, opened.session, 1, {"secret": opened.meta["secret"], "nonce": "n", "wait": 0})
    assert host.exchange(collecting).meta["code"] == "not_arrived"
    passing = Frame(Kind.STEP, opened.session, 1, {"pass": opened.meta["pass"], "nonce": "n"}, specs, buffers)
    reply = host.exchange(passing)
    assert (reply.kind, reply.tensors, dict(reply.meta)) == (Kind.RESULT, (), {})
    assert [spec.name for spec in host.exchange(collecting).tensors] == ["output"]


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
