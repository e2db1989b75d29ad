"""Hidden states and gradients with 8 and 4 bits: bounded errors, the same bytes each time, fewer of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from splitlearn_core import ConfigurationError, SplitCausalLM, connect, load_split_model
from splitlearn_core.cuts.quantization import decode, encode, quantized
from splitlearn_core.hosts.facts import Facts
from splitlearn_core.hosts.payload import pack, unpack
from splitlearn_core.hosts.protocol import Frame, Kind, TensorSpec
from splitlearn_core.hosts.sessions import SessionTable
from splitlearn_core.hosts.wires import compressed, expanded
from splitlearn_core.wire_formats import BLOCK, encoded_bytes
from support.hosts import MemoryEndpoint, lost, remote, unix_host

ENCODINGS = ("int8", "int4")
MOST = {"int8": 127, "int4": 7}
IDS = torch.arange(1, 17).reshape(2, 8)


def states(*shape: int, seed: int = 0) -> torch.Tensor:
    """Return values with what real hidden states have: outlier channels, and a first token far larger than the rest."""
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    values[..., 5] *= 60
    values[..., 0, 7] = 3_000
    return values


def blocks(tensor: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(tensor.float(), (0, -tensor.shape[-1] % BLOCK)).reshape(-1, BLOCK)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1, 64), (2, 5, 192), (3, 2, 100), (1, 3, 16)])
def test_errors_are_bounded(encoding: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """By half a step of the block without its largest value, which is exact; and by the rounding of the dtype."""
    values = states(*shape).to(dtype)
    data = encode(values, encoding)
    assert data.dtype == torch.uint8
    assert data.numel() == encoded_bytes(encoding, shape, dtype.itemsize)
    result = decode(data, encoding, shape, dtype)
    assert (result.shape, result.dtype) == (values.shape, dtype)
    before, after = blocks(values), blocks(result)
    second = before.abs().topk(2).values[:, 1:]
    bound = second / MOST[encoding] * (0.5 * (1 + 2**-7)) + second * torch.finfo(dtype).eps
    assert bool(((after - before).abs() <= bound).all())
    places = before.abs().argmax(-1, keepdim=True)
    assert torch.equal(after.gather(-1, places), before.gather(-1, places))
    assert torch.equal(encode(values.clone(), encoding), data)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_position_does_not_depend_on_others(encoding: str) -> None:
    """The first token's size harms no other; a token decodes the same alone."""
    values = states(2, 6, 192)
    whole = quantized(values, encoding)
    assert torch.equal(quantized(values[:, 3:4], encoding), whole[:, 3:4])
    relative = ((whole - values).norm(dim=-1) / values.norm(dim=-1))[:, 1:].max()
    assert float(relative) < {"int8": 0.008, "int4": 0.12}[encoding]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_special_values_keep_their_place(encoding: str) -> None:
    """Zeros, tiny numbers, and what is not finite, which the host then refuses."""
    zeros = torch.zeros(1, 2, 64)
    assert torch.equal(quantized(zeros, encoding), zeros)
    tiny = torch.full((1, 1, 64), 1e-44)
    assert bool((quantized(tiny, encoding) - tiny).abs().max() <= 1e-44)
    for value in (float("nan"), float("inf"), float("-inf")):
        values = states(1, 2, 64)
        values[0, 1, 3] = value
        assert not bool(quantized(values, encoding).isfinite().all())


@pytest.fixture
def parts(llama: Any, checkpoint: Callable[[str], Path]) -> Any:
    return load_split_model(None, (2, 4), checkpoint("single"), strategy="copied", progress=False)


def used(parts: Any, wire: str, endpoint: MemoryEndpoint | None = None) -> tuple[Any, Any]:
    trunk = remote(endpoint or MemoryEndpoint(lambda: SessionTable(parts.trunk)), wire=wire)
    return SplitCausalLM(parts.bottom, trunk, parts.top).eval(), trunk


@pytest.mark.parametrize("wire", ENCODINGS)
def test_forward_and_backward_are_encoded_both_ways(parts: Any, wire: str) -> None:
    """The trunk gets and gives exactly what the encoding keeps, and fewer bytes cross."""
    model, trunk = used(parts, wire)
    raw, raw_trunk = used(parts, "raw")
    loss = model(IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    gradient = parts.bottom.get_input_embeddings().weight.grad.clone()
    model.zero_grad()
    expected = raw(IDS, labels=IDS, use_cache=False).loss
    expected.backward()
    assert abs(float((loss - expected).detach())) < {"int8": 0.01, "int4": 0.1}[wire]
    like = parts.bottom.get_input_embeddings().weight.grad
    assert torch.nn.functional.cosine_similarity(gradient.flatten(), like.flatten(), dim=0) > 0.9
    with torch.no_grad():
        hidden = parts.bottom(input_ids=IDS)
        by_hand = quantized(parts.trunk(hidden_states=quantized(hidden, wire)), wire)
        assert torch.equal(trunk(hidden_states=hidden), by_hand)
    sizes = [host.bytes_sent + host.bytes_received for host in (trunk.host, raw_trunk.host)]
    assert sizes[0] < sizes[1]


@pytest.mark.parametrize("wire", ENCODINGS)
def test_sessions_are_encoded_and_rebuilt(parts: Any, wire: str) -> None:
    """A generation goes on after a restart with the same tokens: the same steps are sent again."""
    endpoint = MemoryEndpoint(lambda: SessionTable(parts.trunk))
    model, _ = used(parts, wire, endpoint)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "num_beams": 2}
    expected = model.generate(IDS, **options)
    count = endpoint.count

    def restart(number: int, frame: Frame) -> None:
        if number == count + 4:
            endpoint.restart()
            raise lost()

    endpoint.before = restart
    assert torch.equal(model.generate(IDS, **options), expected)
    encoded = [frame for frame in endpoint.frames if frame.kind is Kind.STEP]
    assert all(frame.meta["wire"] == wire and "hidden_states" in frame.meta["encoded"] for frame in encoded)


def test_an_encoding_is_negotiated(parts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the host does not know is refused at once, and what no version knows, before a connection."""
    with pytest.raises(ConfigurationError, match="wire='int2'"):
        connect("http://127.0.0.1:1/trunk", wire="int2")
    table = SessionTable(parts.trunk)
    assert Facts.from_json(table.facts.to_json()).wires == ("raw", "int8", "int4")
    with unix_host(table, tmp_path / "trunk.sock") as url:
        used = connect(url, wire="int8")
        with torch.no_grad():
            assert used(hidden_states=states(1, 2, 32)).shape == (1, 2, 32)
        used.close()
    object.__setattr__(table.facts, "wires", ("raw",))
    with unix_host(table, tmp_path / "trunk.sock") as url, pytest.raises(ConfigurationError, match="knows raw"):
        connect(url, wire="int8")


def encoded_step(**meta: Any) -> Frame:
    specs, buffers = pack({"hidden_states": states(1, 2, 32)})
    frame = compressed(Frame(Kind.STEP, tensors=specs, buffers=buffers), "int8")
    return Frame(frame.kind, 0, 0, {**frame.meta, **meta}, frame.tensors, frame.buffers)


@pytest.mark.parametrize(
    "meta",
    [
        {"wire": "int2"},
        {"wire": 3},
        {"wire": "raw"},
        {"wire": "int4"},
        {"encoded": []},
        {"encoded": {"attention_mask": ["F32", [1, 2, 32]]}},
        {"encoded": {"hidden_states": ["F32", [1, 2, 2**50]]}},
        {"encoded": {"hidden_states": ["F32", [1, -2, -32]]}},
        {"encoded": {"hidden_states": ["I64", [1, 2, 32]]}},
        {"encoded": {"hidden_states": ["F32", []]}},
        {"encoded": {"hidden_states": "F32"}},
    ],
)
def test_a_wrong_description_is_refused(parts: Any, meta: dict[str, Any]) -> None:
    """With an error frame, and before anything is allocated for it; a right one is answered."""
    table = SessionTable(parts.trunk)
    assert table.handle(encoded_step()).kind is Kind.RESULT
    reply = table.handle(encoded_step(**meta))
    assert (reply.kind, reply.meta["code"]) == (Kind.ERROR, "bad_input")


def test_what_would_be_too_large_decoded_is_refused() -> None:
    """A small message must not take much memory."""
    frame = encoded_step()
    assert torch.equal(unpack(expanded(frame, 256))["hidden_states"], quantized(states(1, 2, 32), "int8"))
    with pytest.raises(Exception, match="256 bytes were sent with fewer bits, and 255 are allowed"):
        expanded(frame, 255)


def test_damaged_bytes_decode_to_something(parts: Any) -> None:
    """Places that lead out of their block, and any other bytes: wrong values at most."""
    shape = (1, 2, 100)
    for encoding in ENCODINGS:
        size = encoded_bytes(encoding, shape, 4)
        for seed in range(5):
            data = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
            assert decode(data, encoding, shape, torch.float32).shape == shape
    assert TensorSpec("x", "U8", (size,)).nbytes == size
