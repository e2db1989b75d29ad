"""What comes back from a host, before it is used."""

from __future__ import annotations

import re

import pytest
import torch

from splitlearn_core.errors import RemoteError
from splitlearn_core.hosts.calls import received

URL = "http://two:8710/trunk2"


@pytest.mark.parametrize(
    ("tensors", "what"),
    [
        ({}, "nothing"),
        ({"output": torch.zeros(1, 3, 4)}, "torch.float32 [1, 3, 4]"),
        ({"output": torch.zeros(1, 2, 4, dtype=torch.bfloat16)}, "torch.bfloat16 [1, 2, 4]"),
    ],
    ids=["nothing", "another shape", "another dtype"],
)
def test_a_host_that_returns_something_else_is_named(tensors: dict[str, torch.Tensor], what: str) -> None:
    """With what was expected of it: the caller may have several."""
    like = torch.zeros(1, 2, 4)
    said = f"{URL} returned {what} as output, and torch.float32 [1, 2, 4] was expected"
    with pytest.raises(RemoteError, match=re.escape(said)) as caught:
        received(tensors, "output", like, like.dtype, URL)
    assert caught.value.code == "malformed"
    given = torch.ones(1, 2, 4)
    assert received({"output": given}, "output", like, like.dtype, URL) is given
