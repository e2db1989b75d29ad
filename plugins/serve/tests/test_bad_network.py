"""Trunks used over a bad network: what arrives late, in part, twice or in another order costs a pause, and no token."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from proxy import Pieces, Proxy, offset_of_frame
from serving import StatusServer
from splitlearn_core import ConnectionLostError, ModelConfig, ProtocolError, SplitCausalLM, connect, load_split_model
from splitlearn_core.extension import HEADER_BYTES, Kind, SessionLimits

pytestmark = [pytest.mark.usefixtures("llama"), pytest.mark.filterwarnings("ignore:.*past_key_values.*:FutureWarning")]

LIMIT = 30
#: Messages of a generation of these many tokens: a greeting, one that opens the session, and a step for each.
TOKENS = 6


@pytest.fixture
def server(single: Path) -> Iterator[StatusServer]:
    config = ModelConfig(
        model_id="trunk", model_type="llama", model_path=str(single), component="trunk", split_points=(2, 4)
    )
    with StatusServer([config], limits=SessionLimits(idle_timeout=60)) as server:
        yield server


@pytest.fixture
def proxy(server: StatusServer) -> Iterator[Proxy]:
    with Proxy(server.port) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def whole(single: Path) -> Any:
    """Return the unsplit model, a prompt, and what follows."""
    model = AutoModelForCausalLM.from_pretrained(single).eval()
    torch.manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size, (2, 5))
    return SimpleNamespace(model=model, ids=ids, expected=generated(model, ids))


@pytest.fixture
def use(single: Path) -> Iterator[Callable[..., SplitCausalLM]]:
    """Return a function that makes a model whose trunk is at an address."""
    with ExitStack() as stack:

        def use(url: str, **options: Any) -> SplitCausalLM:
            remote = connect(f"{url}/trunk", **{"wait": 20, **options})
            stack.callback(remote.close)
            parts = load_split_model("llama", (2, 4), str(single), parts=("bottom", "top"))
            return SplitCausalLM(parts.bottom, remote, parts.top)

        yield use


def generated(model: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    result: torch.Tensor = model.generate(
        ids, **{"do_sample": False, "pad_token_id": 0, "max_new_tokens": TOKENS, **options}
    )
    return result


def is_step(message: bytes) -> bool:
    """Whether a reply is that to a step; requests are masked."""
    return message[offset_of_frame(message) + 5] == Kind.RESULT


#: Name -> where a message is cut, from its bytes: each part of it.
CUTS: dict[str, Callable[[bytes], int]] = {
    "before": lambda message: 0,
    "in the WebSocket's header": lambda message: 1,
    "in the header": lambda message: offset_of_frame(message) + 7,
    "in the description": lambda message: offset_of_frame(message) + HEADER_BYTES + 5,
    "in the payload": lambda message: len(message) - 3,
    "after": len,
}


@pytest.mark.parametrize("direction", ["request", "reply"])
@pytest.mark.parametrize("where", CUTS)
def test_a_connection_that_breaks_within_a_message(
    server: StatusServer, proxy: Proxy, whole: Any, use: Any, where: str, direction: str
) -> None:
    """At several messages of a generation; a step is done once, whatever arrived of it."""
    model = use(proxy.url)
    cut_at = {3, 5, 8}

    def fate(way: str, number: int, message: bytes) -> Pieces:
        if way == direction and number in cut_at:
            cut_at.remove(number)
            return [message[: CUTS[where](message)], None]
        return [message]

    proxy.fate = fate
    assert torch.equal(generated(model, whole.ids), whole.expected)
    assert not cut_at
    assert server.control.traffic.of("trunk").to_dict()["open"] <= 2  # and one whose OPENED was lost


@pytest.mark.parametrize(
    ("direction", "again"),
    [("request", "at once"), ("request", "later"), ("reply", "at once"), ("reply", "later")],
)
def test_messages_that_come_twice(proxy: Proxy, whole: Any, use: Any, direction: str, again: str) -> None:
    """At once, or after the next one, and so in another order: only the reply to a request is taken for it."""
    model = use(proxy.url)
    held: list[bytes] = []

    def fate(way: str, number: int, message: bytes) -> Pieces:
        if way != direction:
            return [message]
        if again == "at once":
            return [message, message] if number in (4, 6) else [message]
        before, held[:] = list(held), [message]
        return [*before, message] if number in (5, 7) else [message]

    proxy.fate = fate
    assert torch.equal(generated(model, whole.ids), whole.expected)
    assert torch.equal(generated(model, whole.ids, use_cache=False), whole.expected)
    assert proxy.count[direction] > 7


def test_pieces_of_any_size(proxy: Proxy, whole: Any, use: Any) -> None:
    """A slow line: messages arrive byte by byte, or in small pieces with pauses."""
    model = use(proxy.url)

    def fate(way: str, number: int, message: bytes) -> Pieces:
        size = 1 if len(message) < 600 else 101
        for begin in range(0, len(message), size):
            if size > 1:
                threading.Event().wait(0.001)
            yield message[begin : begin + size]

    proxy.fate = fate
    assert torch.equal(generated(model, whole.ids), whole.expected)


def test_a_reply_that_comes_too_late(server: StatusServer, proxy: Proxy, whole: Any, use: Any) -> None:
    """The step is sent again on another connection, and done once; meanwhile others go on."""
    model, other = use(proxy.url, reply_timeout=0.5), use(server.url)
    arrived, released = threading.Event(), threading.Event()
    late = [6]

    def fate(way: str, number: int, message: bytes) -> Pieces:
        if way == "reply" and number in late:
            late.clear()
            arrived.set()
            assert released.wait(LIMIT)
        return [message]

    proxy.fate = fate
    result: list[torch.Tensor] = []
    user = threading.Thread(target=lambda: result.append(generated(model, whole.ids)))
    user.start()
    assert arrived.wait(LIMIT)
    assert torch.equal(generated(other, whole.ids), whole.expected)
    user.join(LIMIT)
    released.set()
    assert torch.equal(result[0], whole.expected)


def test_a_network_that_stays_away(proxy: Proxy, whole: Any, use: Any) -> None:
    """The error says for how long it was waited, and the same call can be made again."""
    model = use(proxy.url, wait=0.3)
    good = proxy.fate

    def fate(way: str, number: int, message: bytes) -> Pieces:
        return [message[:4], None] if number > 4 else [message]

    proxy.fate = fate
    with pytest.raises(ConnectionLostError, match=r"did not come back within 0\.3 s") as error:
        generated(model, whole.ids)
    assert error.value.hint == "connect(..., wait=SECONDS) waits longer"
    proxy.fate = good
    assert torch.equal(generated(model, whole.ids), whole.expected)


def test_a_damaged_reply(proxy: Proxy, whole: Any, use: Any) -> None:
    """Its description has a checksum: it is an error, after which the same call can be made again."""
    model = use(proxy.url)
    damaged = [5]

    def fate(way: str, number: int, message: bytes) -> Pieces:
        if way == "reply" and number in damaged and is_step(message):
            damaged.clear()
            place = offset_of_frame(message) + HEADER_BYTES + 3
            return [message[:place] + bytes([message[place] ^ 1]) + message[place + 1 :]]
        return [message]

    proxy.fate = fate
    with pytest.raises(ProtocolError, match=rf"{proxy.url}/trunk: .* damaged in transit") as error:
        generated(model, whole.ids)
    assert error.value.code == "malformed"
    assert not damaged
    assert torch.equal(generated(model, whole.ids), whole.expected)
