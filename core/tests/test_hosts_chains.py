"""Routes: what a host makes of a step's output for the next host, and what it refuses to send on."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from splitlearn_core.errors import RemoteError
from splitlearn_core.hosts.chains import onward
from splitlearn_core.hosts.payload import pack, unpack
from splitlearn_core.hosts.protocol import Frame, Kind, decode, encode

ROUTE: dict[str, Any] = {
    "link": "two",
    "session": 7,
    "step": 3,
    "pass": "p",
    "nonce": "n",
    "arguments": {"use": 1},
    "changes": [["remove", 1]],
    "next": {"link": "three"},
}


def step(route: Any, **meta: Any) -> Frame:
    tensors = {"hidden_states": torch.zeros(1, 2, 4), "attention_mask": torch.ones(1, 5, dtype=torch.long)}
    specs, buffers = pack(tensors)
    return Frame(Kind.STEP, 1, 2, {"secret": "s", "arguments": {}, "next": route, **meta}, specs, buffers)


def result(name: str = "output") -> Frame:
    specs, buffers = pack({"hidden_states.0": torch.ones(1, 2, 4), name: torch.full((1, 2, 4), 2.0)})
    return Frame(Kind.RESULT, 1, 2, {}, specs, buffers)


def test_an_output_becomes_the_input_of_the_next_step() -> None:
    """With the other inputs, under the session, number and pass of the route; and nothing else of the request."""
    link, frame = onward(step({**ROUTE, "training": True, "secret": "x"}), result())
    frame = decode(b"".join(encode(frame)))
    assert (link, frame.kind, frame.session, frame.step) == ("two", Kind.STEP, 7, 3)
    assert frame.meta == {name: ROUTE[name] for name in ("pass", "nonce", "arguments", "changes", "next")}
    tensors = unpack(frame)
    assert tensors.keys() == {"hidden_states", "attention_mask"}
    assert torch.equal(tensors["hidden_states"], torch.full((1, 2, 4), 2.0))
    assert torch.equal(tensors["attention_mask"], torch.ones(1, 5, dtype=torch.long))


@pytest.mark.parametrize(
    "change",
    [
        {"session": 0},
        {"session": True},
        {"session": 2**63},
        {"step": -1},
        {"step": "1"},
        {"link": None},
        {"link": ["two"]},
        {"pass": 5},
        {"nonce": None},
        {"arguments": []},
    ],
    ids=str,
)
def test_a_route_that_is_none_is_refused(change: dict[str, Any]) -> None:
    """Before anything is sent: above all, one without a session would run under this host's token."""
    with pytest.raises(RemoteError, match="names no session, step and host") as caught:
        onward(step({**ROUTE, **change}), result())
    assert caught.value.code == "bad_input"


def test_what_cannot_be_sent_on_is_refused() -> None:
    """What is no route, an output that is missing, and one with fewer bits."""
    for request, reply in (
        (step("two"), result()),
        (step(ROUTE), result("gradient")),
        (step(ROUTE, wire="int8"), result()),
    ):
        with pytest.raises(RemoteError, match="names no session"):
            onward(request, reply)
