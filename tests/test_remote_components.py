"""A trunk that runs elsewhere gives the results of the unsplit model to the last bit, over each carrier."""

from __future__ import annotations

import asyncio
import copy
import functools
import gc
import json
import logging
import math
import os
import pickle
import re
import socket
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, StoppingCriteria, StoppingCriteriaList

from splitlearn_core import (
    ConfigurationError,
    ConnectionLostError,
    RemoteError,
    SessionLostError,
    SplitCausalLM,
    connect,
    load_split_model,
    serve_socket,
)
from splitlearn_core.extension import cache_argument
from splitlearn_core.hosts import carriers, client
from splitlearn_core.hosts.protocol import Kind
from splitlearn_core.hosts.sessions import SessionTable
from splitlearn_core.testing.worlds import tiny_model, write_checkpoint
from support.hosts import CARRIERS, MemoryEndpoint, hosting, lost, remote, unix_host, websocket_host
from support.warm import WarmInterpreter

SPLIT = (2, 4)
#: Carriers are tried with one family, and families over one carrier.
CASES = [
    *(("qwen2", "float32", carrier) for carrier in CARRIERS),
    ("qwen2", "bfloat16", "memory"),
    *((family, dtype, "memory") for family in ("gpt2", "gemma3_text") for dtype in ("float32", "bfloat16")),
    ("gemma2", "float32", "memory"),
]


@functools.cache
def models(family: str, dtype: str) -> tuple[Any, Any]:
    """Return a model unsplit, and its components."""
    # A window that the sequences of these tests outgrow.
    values = {"sliding_window": 7} if family.startswith("gemma") and family != "gemma" else {}
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), tiny_model(family, **values))
        whole = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
        parts = load_split_model(None, SPLIT, folder, dtype=dtype, strategy="copied", progress=False)
    # An assistant that adapts its threshold imports scikit-learn, which sets variables of the environment.
    whole.generation_config.assistant_confidence_threshold = 0
    return whole.eval(), parts


@pytest.fixture(params=CASES, ids="-".join)
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[Any, Any]]:
    """A model unsplit, and the same with its trunk elsewhere."""
    family, dtype, carrier = request.param
    whole, parts = models(family, dtype)
    # The models are kept, and a backward pass that failed half-way leaves gradients at the top.
    for module in (whole, *parts):
        module.zero_grad()
    # Paths of Unix sockets are short.
    with tempfile.TemporaryDirectory() as folder, hosting(carrier, parts.trunk, Path(folder)) as trunk:
        yield whole, SplitCausalLM(parts.bottom, trunk, parts.top)


def tokens(rows: int, length: int) -> torch.Tensor:
    return torch.randint(3, 90, (rows, length), generator=torch.Generator().manual_seed(rows * 100 + length))


def padded() -> dict[str, torch.Tensor]:
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[0, :4] = mask[1, :2] = 0
    return {"input_ids": tokens(3, 9), "attention_mask": mask}


def generated(model: Any, inputs: dict[str, Any], **arguments: Any) -> torch.Tensor:
    torch.manual_seed(1)
    settings = {"max_new_tokens": 12, "pad_token_id": 0, "eos_token_id": None, **arguments}
    output: torch.Tensor = model.generate(**inputs, **settings)
    return output


@torch.no_grad()
def test_logits_are_equal(pair: tuple[Any, Any]) -> None:
    """Without a cache, padded on the left; labels too."""
    inputs = padded()
    expected, actual = (model(**inputs, labels=inputs["input_ids"], use_cache=False) for model in pair)
    assert torch.equal(expected.logits, actual.logits)
    assert torch.equal(expected.loss, actual.loss)


@torch.no_grad()
def test_recorded_states_are_equal(pair: tuple[Any, Any]) -> None:
    """Hidden states of all layers, those elsewhere too."""
    expected, actual = (model(tokens(2, 5), output_hidden_states=True).hidden_states for model in pair)
    assert len(expected) == len(actual)
    assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))


@pytest.mark.parametrize(
    "arguments",
    [
        {"do_sample": False},
        {"do_sample": True, "num_return_sequences": 3},
        {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_beams": 2},
    ],
    ids=["greedy", "sampled", "beams", "sampled beams"],
)
def test_generation_is_equal(pair: tuple[Any, Any], arguments: dict[str, Any]) -> None:
    """Prefill and decoding with a cache; beams reorder it."""
    whole, split = pair
    assert torch.equal(generated(whole, padded(), **arguments), generated(split, padded(), **arguments))


@pytest.mark.parametrize("way", ["prompt lookup", "assisted"])
def test_drafted_tokens_are_equal(pair: tuple[Any, Any], way: str) -> None:
    """Tokens that were drafted in vain are taken out of the cache again."""
    whole, _ = pair
    ids = tokens(1, 6).repeat(1, 3)
    arguments = {"prompt_lookup_num_tokens": 3} if way == "prompt lookup" else {"assistant_model": whole}
    expected, actual = (generated(model, {"input_ids": ids}, do_sample=False, **arguments) for model in pair)
    assert torch.equal(expected, actual)


@torch.no_grad()
def test_a_cache_goes_on_is_copied_and_cropped(pair: tuple[Any, Any]) -> None:
    """Over several calls; a copy and its original go different ways."""
    whole, split = pair
    name = cache_argument(whole.forward)

    def run(model: Any) -> list[torch.Tensor]:
        first = DynamicCache(config=whole.config)
        logits = [model(tokens(2, 5), **{name: first}).logits]
        second = copy.deepcopy(first)
        logits.append(model(tokens(2, 3), **{name: first}).logits)
        logits.append(model(tokens(2, 1), **{name: second}).logits)
        second.crop(-2)
        logits.append(model(tokens(2, 2), **{name: second}).logits)
        logits.append(model(tokens(2, 4), **{name: first}).logits)
        assert first.get_seq_length() == 12
        return logits

    for expected, actual in zip(run(whole), run(split), strict=True):
        assert torch.equal(expected, actual)


def test_a_conversation_goes_on(pair: tuple[Any, Any]) -> None:
    """One cache over two calls of generate."""
    whole, split = pair

    def run(model: Any) -> torch.Tensor:
        cache = DynamicCache(config=whole.config)
        name = cache_argument(whole.forward)
        begun = generated(model, {"input_ids": tokens(1, 5)}, do_sample=False, **{name: cache})
        going_on = torch.cat([begun, tokens(1, 3)], dim=1)
        return generated(model, {"input_ids": going_on}, do_sample=False, **{name: cache})

    assert torch.equal(run(whole), run(split))


def test_gradients_are_equal(pair: tuple[Any, Any]) -> None:
    """Of everything that is here, through what is elsewhere."""
    whole, split = pair
    ids = tokens(2, 6)
    base = whole.base_model_prefix
    inside = tuple(f"{base}.{'h' if base == 'transformer' else 'layers'}.{number}." for number in range(*SPLIT))
    losses = [model(ids, labels=ids, use_cache=False).loss for model in pair]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    expected = dict(whole.named_parameters())
    # What is elsewhere has names and shapes here, and neither values nor gradients.
    here = {name: parameter for name, parameter in split.named_parameters() if parameter.requires_grad}
    assert here
    assert {name for name in expected if not name.startswith(inside)} == here.keys()
    assert all(parameter.grad is not None for parameter in here.values())
    different = [name for name, parameter in here.items() if not torch.equal(parameter.grad, expected[name].grad)]
    assert different == []


def test_a_gradient_after_cached_tokens_is_refused(pair: tuple[Any, Any]) -> None:
    """What is cached elsewhere is no part of the graph."""
    _, split = pair
    ids = tokens(2, 6)
    begun = split(ids[:, :4])
    continued = split(ids[:, 4:], past_key_values=begun.past_key_values)
    with pytest.raises(ConfigurationError, match="after 4 cached tokens"):
        continued.logits.sum().backward()


# --- bad luck -------------------------------------------------------------------------------------------


@pytest.fixture
def endpoint() -> MemoryEndpoint:
    """A host whose messages can be made to fail."""
    _, parts = models("qwen2", "float32")
    return MemoryEndpoint(lambda: SessionTable(parts.trunk))


def used(endpoint: MemoryEndpoint, **arguments: Any) -> SplitCausalLM:
    _, parts = models("qwen2", "float32")
    return SplitCausalLM(parts.bottom, remote(endpoint, **arguments), parts.top)


#: Name of a fault -> makes it happen at a message: carried out or not, and with or without a restart of the host.
FAULTS: dict[str, Callable[[MemoryEndpoint, int], None]] = {}


def _fault(name: str, *, is_done: bool, restarts: bool) -> None:
    def arm(endpoint: MemoryEndpoint, boundary: int) -> None:
        def strike(number: int, _: Any) -> None:
            if number == boundary:
                if restarts:
                    endpoint.restart()
                raise lost()

        if is_done:
            endpoint.after = strike
        else:
            endpoint.before = strike

    FAULTS[name] = arm


_fault("request lost", is_done=False, restarts=False)
_fault("reply lost", is_done=True, restarts=False)
_fault("restarted before", is_done=False, restarts=True)
_fault("restarted after", is_done=True, restarts=True)


@pytest.mark.parametrize("arguments", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
@pytest.mark.parametrize("fault", FAULTS)
def test_text_goes_on_after_a_fault_at_any_message(
    endpoint: MemoryEndpoint, fault: str, arguments: dict[str, Any]
) -> None:
    """Each message of a generation is lost, or is the last one of a host that comes back without its sessions."""
    whole, _ = models("qwen2", "float32")
    arguments = {**arguments, "do_sample": False, "max_new_tokens": 5}
    expected = generated(whole, padded(), **arguments)
    assert torch.equal(generated(used(endpoint), padded(), **arguments), expected)
    messages = endpoint.count
    assert messages >= 6
    for boundary in range(1, messages + 1):
        endpoint.count = 0
        FAULTS[fault](endpoint, boundary)
        assert torch.equal(generated(used(endpoint), padded(), **arguments), expected), boundary
        endpoint.before = endpoint.after = lambda number, frame: None


def test_drafted_text_goes_on_after_a_restart(endpoint: MemoryEndpoint) -> None:
    """The journal has what was taken out of the cache."""
    whole, _ = models("qwen2", "float32")
    inputs = {"input_ids": tokens(1, 6).repeat(1, 3)}
    arguments = {"do_sample": False, "prompt_lookup_num_tokens": 3, "max_new_tokens": 8}
    expected = generated(whole, inputs, **arguments)
    generated(used(endpoint), inputs, **arguments)
    for boundary in range(1, endpoint.count + 1):
        endpoint.count = 0
        FAULTS["restarted after"](endpoint, boundary)
        assert torch.equal(generated(used(endpoint), inputs, **arguments), expected), boundary
        endpoint.after = lambda number, frame: None


def test_a_host_of_another_model_does_not_take_over(endpoint: MemoryEndpoint) -> None:
    """Both sides are named."""
    split = used(endpoint)
    _, others = models("qwen2", "bfloat16")

    def replace(number: int, _: Any) -> None:
        if number == 3:
            endpoint.table = SessionTable(others.trunk)
            raise lost()

    endpoint.before = replace
    with pytest.raises(RemoteError, match="dtype: float32 before, bfloat16 now") as caught:
        generated(split, padded(), do_sample=False)
    assert caught.value.code == "other_model"


def test_components_of_another_model_are_refused(endpoint: MemoryEndpoint) -> None:
    """Before the first step, as for components that are here."""
    _, others = models("gpt2", "float32")
    with pytest.raises(ConfigurationError, match="model_type differs"):
        SplitCausalLM(others.bottom, remote(endpoint), others.top)


def test_a_host_that_stays_away_is_named(endpoint: MemoryEndpoint) -> None:
    """After the time that the caller allows."""
    split = used(endpoint, wait=0)

    def refuse(number: int, _: Any) -> None:
        raise lost()

    endpoint.before = refuse
    with pytest.raises(ConnectionLostError, match="did not come back within 0 s"):
        generated(split, padded(), do_sample=False)


@pytest.mark.parametrize("carrier", ["unix", "websocket"])
def test_a_host_that_is_silent_is_reported(carrier: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """While its reply is waited for, and may still come."""
    _, parts = models("qwen2", "float32")
    monkeypatch.setattr(carriers, "_SILENCE", 0.01)
    reported = threading.Event()

    class Note(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "has not answered for" in record.getMessage():
                reported.set()

    note = Note()
    logging.getLogger(carriers.__name__).addHandler(note)
    with tempfile.TemporaryDirectory() as folder, hosting(carrier, parts.trunk, Path(folder)) as trunk:
        reported.clear()
        waiting = parts.trunk.register_forward_pre_hook(lambda *_: None if reported.wait(60) else False)
        try:
            with torch.no_grad():
                assert trunk(hidden_states=torch.zeros(1, 1, 32)).shape == (1, 1, 32)
        finally:
            waiting.remove()
            logging.getLogger(carriers.__name__).removeHandler(note)
    assert reported.is_set()


def test_a_token_is_taken_as_a_file_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A final newline is allowed; characters that a header cannot hold are refused, and not shown."""
    _, parts = models("qwen2", "float32")
    monkeypatch.setenv("SPLITLEARN_TOKEN", "secret\n")
    with websocket_host(SessionTable(parts.trunk)) as url:
        for token in (None, "secret\n"):
            component = connect(url, token=token)
            assert component.host.endpoint.token == "secret"
            component.close()
        with pytest.raises(ConfigurationError, match="a header cannot hold") as caught:
            connect(url, token="sec\nret")
        assert "sec" not in str(caught.value)
        with pytest.raises(ConfigurationError, match="there is no certificate file") as missing:
            connect(url, ca_file="nowhere.pem")
        assert "give the PEM file" in missing.value.hint


def test_a_journal_has_a_limit(endpoint: MemoryEndpoint, caplog: pytest.LogCaptureFixture) -> None:
    """A session that exceeds it continues, but is lost with its host."""
    whole, _ = models("qwen2", "float32")
    expected = generated(whole, padded(), do_sample=False)
    assert torch.equal(generated(used(endpoint, journal_bytes=100), padded(), do_sample=False), expected)
    assert "more than journal_bytes" in caplog.text
    endpoint.count = 0
    FAULTS["restarted before"](endpoint, 6)
    with pytest.raises(SessionLostError, match="journal was larger than allowed"):
        generated(used(endpoint, journal_bytes=100), padded(), do_sample=False)


def test_an_interrupted_step_is_not_taken_for_the_next(endpoint: MemoryEndpoint) -> None:
    """The host has done it, and its owner does not know."""
    whole, _ = models("qwen2", "float32")
    split = used(endpoint)
    name = cache_argument(whole.forward)
    cache, expected_cache = DynamicCache(config=whole.config), DynamicCache(config=whole.config)

    def interrupt(number: int, frame: Any) -> None:
        if number == 3:
            raise KeyboardInterrupt

    with torch.no_grad():
        trunk_cache = split.trunk.cache_view(cache)
        split(tokens(1, 5), **{name: cache})
        whole(tokens(1, 5), **{name: expected_cache})
        hidden = split.bottom(tokens(1, 1))
        endpoint.after = interrupt
        with pytest.raises(KeyboardInterrupt):
            split.trunk(hidden_states=hidden, past_key_values=trunk_cache)
        assert trunk_cache.get_seq_length() == 5
        assert torch.equal(
            split(tokens(1, 2), **{name: cache}).logits, whole(tokens(1, 2), **{name: expected_cache}).logits
        )


def test_a_step_whose_reply_never_came_does_not_stand_in_the_way(endpoint: MemoryEndpoint) -> None:
    """The host has executed it; the next call with the same cache is another step of the same number."""
    whole, _ = models("qwen2", "float32")
    split = used(endpoint, wait=0)
    name = cache_argument(whole.forward)
    cache, expected = DynamicCache(config=whole.config), DynamicCache(config=whole.config)

    def refuse(number: int, _: Any) -> None:
        raise lost()

    with torch.no_grad():
        for model, its in ((whole, expected), (split, cache)):
            model(tokens(2, 5), **{name: its})
        endpoint.after = refuse
        with pytest.raises(ConnectionLostError):
            split(tokens(2, 2), **{name: cache})
        endpoint.after = lambda number, frame: None
        logits = [model(tokens(2, 3), **{name: its}).logits for model, its in ((whole, expected), (split, cache))]
    assert torch.equal(*logits)


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "first"])
def test_a_call_that_failed_can_be_made_again(endpoint: MemoryEndpoint, cached: bool) -> None:
    """What the components before the failure had cached is taken back; what the top could not do, at the trunk too."""
    whole, _ = models("qwen2", "float32")
    split = used(endpoint, wait=0)
    name = cache_argument(whole.forward)
    cache, expected = DynamicCache(config=whole.config), DynamicCache(config=whole.config)

    def refuse(number: int, _: Any) -> None:
        raise lost()

    def fail(*_: Any) -> None:
        raise MemoryError

    with torch.no_grad():
        if cached:
            split(tokens(2, 5), **{name: cache})
            whole(tokens(2, 5), **{name: expected})
        endpoint.before = refuse
        with pytest.raises(ConnectionLostError):
            split(tokens(2, 2), **{name: cache})
        endpoint.before = lambda number, frame: None
        hook = split.top.register_forward_pre_hook(fail)
        with pytest.raises(MemoryError):
            split(tokens(2, 2), **{name: cache})
        hook.remove()
        for ids in (tokens(2, 2), tokens(2, 1)):
            assert torch.equal(split(ids, **{name: cache}).logits, whole(ids, **{name: expected}).logits)


def test_a_remote_component_is_copied_and_not_pickled(endpoint: MemoryEndpoint) -> None:
    """A copy has the same host."""
    split = used(endpoint)
    other = copy.deepcopy(split.trunk)
    with torch.no_grad():
        hidden = split.bottom(tokens(1, 3))
        assert torch.equal(other(hidden_states=hidden), split.trunk(hidden_states=hidden))
    with pytest.raises(ConfigurationError, match="cannot be pickled"):
        pickle.dumps(other)


def test_attentions_are_what_the_unsplit_model_gives(endpoint: MemoryEndpoint) -> None:
    """With an implementation that has none to give, none."""
    whole, _ = models("qwen2", "float32")
    with torch.no_grad():
        expected, actual = (model(tokens(1, 3), output_attentions=True) for model in (whole, used(endpoint)))
    assert len(expected.attentions or ()) == len(actual.attentions or ())
    assert torch.equal(expected.logits, actual.logits)


def test_closing_ends_sessions(endpoint: MemoryEndpoint) -> None:
    """At once, as the command line does when it ends with an error."""
    split = used(endpoint)
    cache = split.trunk.new_cache()
    with torch.no_grad():
        split.trunk(hidden_states=torch.zeros(1, 1, 32), past_key_values=cache)
    assert len(endpoint.table) == 1
    cast("Any", split.trunk).close()
    assert len(endpoint.table) == 0


def test_sessions_end_with_their_caches(endpoint: MemoryEndpoint) -> None:
    """Also where a generation is cancelled."""
    split = used(endpoint)
    ended = threading.Event()

    def note(number: int, frame: Any) -> None:
        if frame.kind is Kind.CLOSE:
            ended.set()

    endpoint.after = note
    gc.disable()
    try:
        generated(split, padded(), do_sample=False)
        # Without a collection of cycles, which may come late.
        assert ended.wait(30)
    finally:
        gc.enable()
    assert len(endpoint.table) == 0
    ended.clear()

    class Cancelled(StoppingCriteria):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generated(split, padded(), do_sample=False, stopping_criteria=StoppingCriteriaList([Cancelled()]))
    gc.collect()
    assert ended.wait(30)
    assert len(endpoint.table) == 0


def test_several_threads_use_one_component(endpoint: MemoryEndpoint) -> None:
    """Each with a session of its own; and without blocking an event loop."""
    whole, _ = models("qwen2", "float32")
    split = used(endpoint)
    expected = generated(whole, padded(), do_sample=False)

    async def run() -> list[torch.Tensor]:
        return await asyncio.gather(
            *(
                asyncio.to_thread(
                    split.generate, **padded(), max_new_tokens=12, pad_token_id=0, eos_token_id=None, do_sample=False
                )
                for _ in range(3)
            )
        )

    assert all(torch.equal(text, expected) for text in asyncio.run(run()))


def _recipe() -> Any:
    """Return the function that the documents show for event loops."""
    page = (Path(__file__).parent.parent / "docs" / "remote-components.md").read_text()
    source = re.search(r"<!-- file: in_a_loop.py -->\n```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert source
    names: dict[str, Any] = {}
    exec(source[1], names)  # what the page shows
    return names["generate"]


def test_an_event_loop_is_not_blocked_and_cancels(endpoint: MemoryEndpoint) -> None:
    """While a step waits for the host, the loop is free; a cancelled task ends its generation and its session."""
    whole, _ = models("qwen2", "float32")
    split, generate = used(endpoint), _recipe()
    options = {"max_new_tokens": 12, "pad_token_id": 0, "eos_token_id": None, "do_sample": False}
    entered, released, closed = threading.Event(), threading.Event(), threading.Event()

    def before(number: int, frame: Any) -> None:
        if number == 4:
            entered.set()
            assert released.wait(30)

    def after(number: int, frame: Any) -> None:
        if frame.kind is Kind.CLOSE:
            closed.set()

    endpoint.before, endpoint.after = before, after

    async def main() -> int:
        task = asyncio.ensure_future(generate(split, tokens(1, 3), **options))
        # The loop turns while the step is with the host.
        assert await asyncio.to_thread(entered.wait, 30)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        released.set()
        assert await asyncio.to_thread(closed.wait, 30)
        return endpoint.count

    # Opened, two steps, the one that waited, and the end; of twelve steps.
    assert asyncio.run(main()) <= 6
    assert len(endpoint.table) == 0
    endpoint.before = endpoint.after = lambda number, frame: None
    expected = whole.generate(tokens(1, 3), **options)
    assert torch.equal(asyncio.run(generate(split, tokens(1, 3), **options)), expected)


def test_the_length_of_a_generation_is_declared(endpoint: MemoryEndpoint) -> None:
    """Room is reserved before the first step; what the host does not allow is refused before it, with both numbers."""
    split = used(endpoint)
    generated(split, padded(), do_sample=False)
    assert _declared(endpoint) == [256]
    split.generate(tokens(1, 3), max_new_tokens=300, eos_token_id=5, pad_token_id=0, do_sample=False)
    assert _declared(endpoint)[-1] == 302
    requests = _requests(endpoint)
    for options in ({}, {"use_cache": False}, {"num_beams": 2}):
        with pytest.raises(ConfigurationError, match="may become 40002 tokens long, and memory://trunk allows 32768"):
            split.generate(tokens(1, 3), max_new_tokens=40_000, pad_token_id=0, **options)
    assert _requests(endpoint) == requests


def _requests(endpoint: MemoryEndpoint) -> int:
    """Count the requests; a session is closed when its cache is collected, at any time."""
    return sum(frame.kind is not Kind.CLOSE for frame in endpoint.frames)


def _declared(endpoint: MemoryEndpoint) -> list[int]:
    return [frame.meta["tokens"] for frame in endpoint.frames if frame.kind is Kind.OPEN]


def test_a_host_that_stands_still_does_not_hold_up_closing(
    endpoint: MemoryEndpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long a reply may take."""
    monkeypatch.setattr(client, "_CLOSE_TIMEOUT", 0.1)
    split = used(endpoint)
    cache = split.trunk.new_cache()
    with torch.no_grad():
        split.trunk(hidden_states=torch.zeros(1, 1, 32), past_key_values=cache)
    entered, released = threading.Event(), threading.Event()

    def before(number: int, frame: Any) -> None:
        entered.set()
        assert released.wait(30)

    endpoint.before = before
    cast("Any", split.trunk).close()
    assert entered.is_set()
    assert len(endpoint.table) == 1
    released.set()


def test_a_cast_that_cannot_reach_the_trunk_is_refused(endpoint: MemoryEndpoint) -> None:
    """And changes nothing; where the cuts cast, it is meant for what is here."""
    parts = copy.deepcopy(models("qwen2", "float32")[1])
    split = SplitCausalLM(parts.bottom, remote(endpoint), parts.top)
    for cast_it in (lambda: split.to(torch.bfloat16), split.half, split.double):
        with pytest.raises(ConfigurationError, match=r"memory://trunk runs in torch\.float32") as error:
            cast_it()
        assert "serve it with --dtype" in error.value.hint
    assert next(split.parameters()).dtype == torch.float32
    split.to(torch.float32).to("cpu")
    mixed = SplitCausalLM(parts.bottom, remote(endpoint), parts.top, mixed_dtypes=True).to(torch.bfloat16)
    with torch.no_grad():
        assert mixed(tokens(1, 3)).logits.dtype == torch.bfloat16


def test_what_a_remote_trunk_cannot_do_is_named(endpoint: MemoryEndpoint, tmp_path: Path) -> None:
    """With the way out."""
    split, (whole, parts) = used(endpoint), models("qwen2", "float32")
    trunk: Any = split.trunk
    split.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "config.json").exists()
    whole.save_pretrained(tmp_path / "whole")
    with pytest.raises(ConfigurationError, match="holds a whole model"):
        split.save_pretrained(tmp_path / "whole")
    with pytest.raises(ConfigurationError, match="kernels of its host"):
        split.set_attn_implementation("eager")
    assert split.bottom.config._attn_implementation == whole.config._attn_implementation
    with pytest.raises(ConfigurationError, match="unexpected keyword argument 'input_ids'"):
        trunk(hidden_states=torch.zeros(1, 1, 32), input_ids=tokens(1, 1))
    with pytest.raises(ConfigurationError, match="cache of another trunk"):
        trunk(hidden_states=torch.zeros(1, 1, 32), past_key_values=parts.trunk.new_cache())
    with pytest.raises(ConfigurationError, match="was passed to one that runs here"), torch.no_grad():
        parts.trunk(hidden_states=torch.zeros(1, 1, 32), past_key_values=trunk.new_cache())
    filled = DynamicCache(config=whole.config)
    whole(tokens(1, 4), **{cache_argument(whole.forward): filled})
    with pytest.raises(ConfigurationError, match="that are filled"):
        split(tokens(1, 1), **{cache_argument(whole.forward): filled})
    with pytest.raises(ConfigurationError, match="runs at memory://trunk"):
        split.model.layers[2](torch.zeros(1, 1, 32))
    assert "memory://trunk" in repr(split)


def test_last_bit_differences_are_reported_once(endpoint: MemoryEndpoint, caplog: pytest.LogCaptureFixture) -> None:
    """Other threads, here; nothing where there is no difference."""
    used(endpoint)
    assert caplog.text == ""
    _, parts = models("qwen2", "float32")
    threads = torch.get_num_threads()
    trunk = remote(endpoint)
    torch.set_num_threads(threads + 1)
    try:
        for _ in range(2):
            SplitCausalLM(parts.bottom, trunk, parts.top)
    finally:
        torch.set_num_threads(threads)
    assert caplog.text.count(f"threads: {threads} there, {threads + 1} here") == 1


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("ftp://host/trunk", "not the address of a host"),
        ("http://host:8710", "names no model"),
        ("http://user:secret@host/trunk", "no user"),
        ("http://host:port/trunk", "not a URL"),
        ("unix:trunk.sock", "not the address"),
        ("", "not the address"),
    ],
)
def test_wrong_addresses_are_refused(url: str, words: str) -> None:
    """Before anything is sent; and secrets in them are not repeated."""
    with pytest.raises(ConfigurationError, match=words) as caught:
        connect(url)
    assert "secret" not in str(caught.value)


def test_wrong_limits_are_refused_at_once() -> None:
    """All of them in one error, before a connection."""
    wrong: dict[str, Any] = {"max_tokens": 0, "wait": "10", "reply_timeout": math.nan, "journal_bytes": True}
    wrong |= {"wire": "int2", "mode": "pack", "chain": "yes"}
    with pytest.raises(ConfigurationError) as caught:
        connect("http://127.0.0.1:1/trunk", **wrong)
    assert all(f"{name}={value!r}" in str(caught.value) for name, value in wrong.items())


def test_a_host_that_does_not_run_is_reported_at_once(tmp_path: Path) -> None:
    """It is more often a wrong address than a restart."""
    with pytest.raises(ConnectionLostError, match="No such file"):
        connect(f"unix://{tmp_path}/trunk.sock")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        with pytest.raises(ConnectionLostError, match="refused"):
            connect(f"http://127.0.0.1:{free.getsockname()[1]}/trunk")


def test_a_trunk_is_served_on_a_socket() -> None:
    """To its user alone, in the place of a socket that is no longer used; nothing is left of it."""
    whole, parts = models("qwen2", "float32")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a trunk.sock"
        with socket.socket(socket.AF_UNIX) as left:
            left.bind(str(path))
        with serve_socket(parts.trunk, path) as url:
            assert path.stat().st_mode & 0o777 == 0o600
            trunk = connect(url, wait=0)
            split = SplitCausalLM(parts.bottom, trunk, parts.top)
            assert torch.equal(generated(split, padded(), do_sample=False), generated(whole, padded(), do_sample=False))
            for component, words in (
                (parts.trunk, "another process serves there"),
                (trunk, "no layers in this process"),
            ):
                with pytest.raises(ConfigurationError, match=words):
                    serve_socket(component, path).__enter__()
            trunk.close()
        assert not path.exists()
        path.write_text("a file")
        with pytest.raises(ConfigurationError, match="no socket can be made") as refusal:
            serve_socket(parts.trunk, path).__enter__()
        assert "where nothing is yet" in refusal.value.hint
        assert path.read_text() == "a file"


def test_a_forked_process_leaves_its_parents_session_alone() -> None:
    """Both go on from the same steps, each for itself."""
    _, parts = models("qwen2", "float32")

    def step(trunk: Any, cache: Any, tokens: int) -> bytes:
        hidden = torch.linspace(-1, 1, tokens * 32).reshape(1, tokens, 32)
        with torch.no_grad():
            output: bytes = trunk(hidden_states=hidden, past_key_values=cache).numpy().tobytes()
        return output

    with tempfile.TemporaryDirectory() as folder, hosting("unix", parts.trunk, Path(folder)) as trunk:
        cache, expected = trunk.new_cache(), parts.trunk.new_cache()
        assert step(trunk, cache, 5) == step(parts.trunk, expected, 5)
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            # It computes nothing itself: OpenMP does not survive a fork.
            try:
                os.write(writer, step(trunk, cache, 2))
            finally:
                os._exit(0)
        os.close(writer)
        with os.fdopen(reader, "rb") as answer:
            received = answer.read()
        os.waitpid(child, 0)
        assert received == step(parts.trunk, copy.deepcopy(expected), 2)
        assert step(trunk, cache, 3) == step(parts.trunk, expected, 3)


def splitlearn(warm: WarmInterpreter, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(warm.path), "-m", "splitlearn_core", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.parametrize("command", ["generate", "verify"])
def test_the_command_line_uses_a_trunk_elsewhere(warm: WarmInterpreter, talking: Path, command: str) -> None:
    """``--at`` loads bottom and top alone; the cuts are those of the host."""
    parts = load_split_model(None, (2, 4), talking, parts=("trunk",), progress=False)
    with tempfile.TemporaryDirectory() as folder, unix_host(SessionTable(parts.trunk), Path(folder) / "s") as url:
        texts = ["--prompt", "abc", "--max-new-tokens", "5"] if command == "generate" else []
        result = splitlearn(warm, command, str(talking), "--at", f"trunk={url}", "--json", *texts)
        assert result.returncode == 0, result.stderr
        answer = json.loads(result.stdout)
        if command == "generate":
            alone = splitlearn(warm, command, str(talking), "--split", "2", "4", "--json", *texts)
            assert answer["text"] == json.loads(alone.stdout)["text"]
        else:
            assert answer["equal"]
            (link,) = answer["links"]
            assert (link["component"], link["url"]) == ("trunk", url)
            # Hidden states of 32 float32 values, both ways, and a mask.
            assert 2 * 32 * 4 <= link["bytes_per_token"] < 2 * 32 * 4 + 500


@pytest.mark.parametrize(
    ("arguments", "words", "code"),
    [
        (["--at", "trunk"], "is not PART=URL", 2),
        (["--at", "bottom=unix:///x"], "stays with the data", 2),
        (["--at", "trunk=unix:///x", "--at", "trunk=unix:///y"], "two addresses", 2),
        (["--token-file", "x"], "need --at", 2),
        (["--at", "trunk=unix:///no/such.sock"], "No such file", 1),
        (["--at", "trunk=http://h", "--split", "2", "4"], "names no model", 2),
    ],
)
def test_wrong_uses_of_at_are_refused(
    warm: WarmInterpreter, talking: Path, arguments: list[str], words: str, code: int
) -> None:
    """With the words and the exit codes of the other options."""
    result = splitlearn(warm, "generate", str(talking), "--prompt", "x", *arguments)
    assert words in " ".join(result.stderr.split())
    assert result.returncode == code


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--split", "1", "4"], "--split 1 4 makes layers [1, 4) the trunk, and URL runs layers [2, 4)"),
        (["--split", "1", "4"], "give the server's: --split 2 4"),
        (["--dtype", "bfloat16"], "would be bfloat16, and URL runs the trunk in float32"),
        (["--dtype", "bfloat16"], "--dtype float32 here, or `splitlearn serve ... --dtype bfloat16` there"),
    ],
)
def test_options_that_do_not_fit_the_host_name_both_sides(
    talking: Path, command: Any, arguments: list[str], words: str
) -> None:
    """Before any weights are read."""
    parts = load_split_model(None, (2, 4), talking, parts=("trunk",), progress=False)
    with tempfile.TemporaryDirectory() as folder, unix_host(SessionTable(parts.trunk), Path(folder) / "s") as url:
        result = command("generate", str(talking), "--prompt", "x", "--at", f"trunk={url}", *arguments)
    assert result.returncode == 1
    assert words.replace("URL", url) in " ".join(result.stderr.split())
