"""The strategy that copies: how it cuts, reads and converts, and what is left when it is stopped."""

from __future__ import annotations

import io
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from splitlearn_core import InvalidCheckpointError, LoadCancelledError, MissingFileError
from splitlearn_core.checkpoint.safetensors_header import read_header
from splitlearn_core.loading_strategy import LoadingStrategy, ReadPlan
from splitlearn_core.plan.splitplan import PlannedTensor
from splitlearn_core.readers import copied
from splitlearn_core.readers.copied import MAX_SPANS, CopiedStrategy, cut
from splitlearn_core.readers.mapped import IncrementalStrategy, MappedStrategy
from splitlearn_core.readers.views import ALIGNMENT, HUGE, fresh_memory
from splitlearn_core.types import FLOAT_DTYPES

pytestmark = pytest.mark.libs

FILE = "model.safetensors"
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool]


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    """Return tensors of many dtypes and shapes: empty, of one element, odd, and larger than a huge page."""
    torch.manual_seed(0)
    made = {f"{i}": (torch.rand(7, i + 1) * 100).to(dtype) for i, dtype in enumerate(DTYPES)}
    large = torch.rand(HUGE // 4 + 1001)
    return {**made, "empty": torch.zeros(0, 3), "scalar": torch.tensor(1.5), "large": large}


def plan_of(folder: Path, tensors: dict[str, torch.Tensor], dtype: str = "float32", **options: Any) -> ReadPlan:
    """Write tensors into a file, and plan to read all but one, so that there is a gap."""
    save_file({**tensors, "1 gap": torch.zeros(33, dtype=torch.uint8)}, folder / FILE)
    infos = read_header(folder / FILE)
    planned = tuple(PlannedTensor(f"module.{key}", infos[key]) for key in tensors)
    return ReadPlan(planned, {FILE: folder / FILE}, "cpu", dtype, **options)


def expected(tensor: torch.Tensor, dtype: str) -> torch.Tensor:
    return tensor.to(getattr(torch, dtype)) if tensor.is_floating_point() else tensor


@pytest.mark.parametrize("dtype", list(FLOAT_DTYPES))
@pytest.mark.parametrize("size", [1, 64, 1000, 2**20])
@pytest.mark.parametrize("strategy", [CopiedStrategy(), IncrementalStrategy(), MappedStrategy()], ids=lambda s: s.name)
def test_every_dtype_and_shape_is_read_to_the_bit(
    tmp_path: Path,
    tensors: dict[str, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
    size: int,
    strategy: LoadingStrategy,
) -> None:
    """Converted as torch converts, whatever the size of a piece."""
    monkeypatch.setattr(copied, "CHUNK_BYTES", size)
    monkeypatch.setattr(copied, "STAGED_BYTES", size)
    if size < 1000:
        del tensors["large"]

    read = dict(strategy.read(plan_of(tmp_path, tensors, dtype)))

    assert len(read) == len(tensors)
    for planned, tensor in read.items():
        wanted = expected(tensors[planned.info.key], dtype)
        assert tensor.dtype == wanted.dtype
        assert torch.equal(tensor, wanted)


@pytest.mark.parametrize("size", [1, 8, 100, 4096])
def test_pieces_cover_the_planned_bytes_once(tmp_path: Path, tensors: dict[str, torch.Tensor], size: int) -> None:
    """In the order of the file, of whole elements, none larger than it may be, and not one byte of the gap."""
    del tensors["large"]
    plan = plan_of(tmp_path, tensors)

    pieces = cut(plan.tensors, size)

    spans = [span for piece in pieces for span in piece.spans]
    assert [piece.begin for piece in pieces] == sorted(piece.begin for piece in pieces)
    assert sum(piece.nbytes for piece in pieces) == plan.nbytes
    for planned in plan.tensors:
        own = [(span.start, span.start + span.nbytes) for span in spans if span.planned is planned]
        assert [start for start, _ in own[1:]] == [end for _, end in own[:-1]]
        item = load_file(tmp_path / FILE)[planned.info.key].element_size()
        assert all(start % item == 0 for start, _ in own)
        assert all(piece.nbytes <= max(size, item) for piece in pieces if piece.spans[0].planned is planned)
    gap = read_header(tmp_path / FILE)["1 gap"]
    assert not any(piece.begin < gap.end and gap.begin < piece.begin + piece.nbytes for piece in pieces)


def test_neighbours_are_read_together(tmp_path: Path) -> None:
    """As many small tensors as the system takes at once."""
    plan = plan_of(tmp_path, {f"{i}": torch.zeros(1) for i in range(2 * MAX_SPANS)})

    assert len(cut(plan.tensors, 2**20)) == 2
    assert len(dict(CopiedStrategy().read(plan))) == 2 * MAX_SPANS


@pytest.mark.parametrize("converted", [False, True])
def test_tensors_begin_where_from_pretrained_lets_them(
    tmp_path: Path, tensors: dict[str, torch.Tensor], converted: bool
) -> None:
    """In a cache line as in the file, or, converted, at its beginning; the large one has a block of its own."""
    plan = plan_of(tmp_path, tensors, "float64" if converted else "float32")
    header, read = read_header(tmp_path / FILE), {}
    for planned, tensor in CopiedStrategy().read(plan):
        read[planned.info.key] = tensor
        begin = header[planned.info.key].begin % ALIGNMENT
        as_in_the_file = not plan.needs_conversion(planned) and begin % tensor.itemsize == 0
        assert tensor.data_ptr() % ALIGNMENT == (begin if as_in_the_file and tensor.numel() else 0)
    assert read["large"].untyped_storage().data_ptr() != read["0"].untyped_storage().data_ptr()


def test_memory_of_one_tensor_is_given_back_alone() -> None:
    """A tensor that is replaced does not live on in the block of its neighbours."""
    from splitlearn_core.system_memory import anonymous_memory

    first, second = fresh_memory([32 * HUGE, 32 * HUGE])
    first.fill_(1)
    second.fill_(1)
    before = anonymous_memory()

    del first

    assert before - anonymous_memory() > 30 * HUGE
    assert int(second[-1]) == 1


class Stop:
    """Records how much was read, and stops a load."""

    def __init__(self, after: int) -> None:
        self.after = after
        self.reported: list[int] = []

    def __call__(self, nbytes: int) -> None:
        self.reported.append(nbytes)
        if len(self.reported) > self.after:
            raise LoadCancelledError("stop")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("after", [0, 1, 50])
def test_a_stopped_read_leaves_no_thread(
    tmp_path: Path, tensors: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch, dtype: str, after: int
) -> None:
    """Between any two chunks, whether they go through buffers or not."""
    monkeypatch.setattr(copied, "CHUNK_BYTES", 4096)
    monkeypatch.setattr(copied, "STAGED_BYTES", 4096)
    stop = Stop(after)
    plan = plan_of(tmp_path, tensors, dtype, on_bytes=stop)

    with pytest.raises(LoadCancelledError):
        list(CopiedStrategy().read(plan))

    assert len(stop.reported) == after + 1
    assert not [thread for thread in threading.enumerate() if thread.name == "splitlearn-reader"]


def test_an_abandoned_read_leaves_no_thread(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """The consumer takes two tensors, and closes the generator."""
    reading: Any = CopiedStrategy().read(plan_of(tmp_path, tensors, "float16"))
    next(reading)
    next(reading)

    reading.close()

    assert not [thread for thread in threading.enumerate() if thread.name == "splitlearn-reader"]


@pytest.mark.parametrize("strategy", [CopiedStrategy(), IncrementalStrategy(), MappedStrategy()], ids=lambda s: s.name)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_file_that_is_cut_between_planning_and_reading_is_refused(
    tmp_path: Path, tensors: dict[str, torch.Tensor], strategy: LoadingStrategy, dtype: str
) -> None:
    """Wherever it is cut, the file is named."""
    plan = plan_of(tmp_path, tensors, dtype)
    content = (tmp_path / FILE).read_bytes()

    for size in (0, 7, 100, len(content) // 2, len(content) - 1):
        (tmp_path / FILE).write_bytes(content[:size])
        with pytest.raises(InvalidCheckpointError, match=FILE) as caught:
            list(strategy.read(plan))
        assert caught.value.hint


@pytest.mark.parametrize("strategy", [CopiedStrategy(), IncrementalStrategy(), MappedStrategy()], ids=lambda s: s.name)
def test_a_file_that_is_replaced_between_planning_and_reading_is_refused(
    tmp_path: Path, tensors: dict[str, torch.Tensor], strategy: LoadingStrategy
) -> None:
    """A valid file of the same size with other tensors in it."""
    plan = plan_of(tmp_path, tensors)
    save_file(
        {**tensors, "0": tensors["0"].view(torch.int32), "1 gap": torch.zeros(33, dtype=torch.uint8)}, tmp_path / FILE
    )

    with pytest.raises(InvalidCheckpointError, match="was changed while it was being loaded"):
        list(strategy.read(plan))


def test_a_file_that_is_cut_while_it_is_read_is_refused(
    tmp_path: Path, tensors: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tensor, and where the file ends, are named; no thread is left."""
    plan = plan_of(tmp_path, tensors)
    monkeypatch.setattr(copied, "CHUNK_BYTES", 4096)
    reported: list[int] = []

    def truncate(nbytes: int) -> None:
        if not reported:
            with (tmp_path / FILE).open("r+b") as file:
                file.truncate(10_000)
        reported.append(nbytes)

    plan = plan_of(tmp_path, tensors, on_bytes=truncate)
    with pytest.raises(InvalidCheckpointError, match=r"ends (at|before)|needs") as caught:
        list(CopiedStrategy().read(plan))

    assert FILE in caught.value.message
    assert not [thread for thread in threading.enumerate() if thread.name == "splitlearn-reader"]


def test_a_file_that_goes_away_is_named(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Between planning and reading."""
    plan = plan_of(tmp_path, tensors)
    (tmp_path / FILE).unlink()

    with pytest.raises(MissingFileError, match=FILE):
        list(CopiedStrategy().read(plan))


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_it_reads_in_every_mode(tmp_path: Path, tensors: dict[str, torch.Tensor], mode: Any, dtype: str) -> None:
    """The reader threads have modes of their own."""
    with mode():
        read = dict(CopiedStrategy().read(plan_of(tmp_path, tensors, dtype)))

    for planned, tensor in read.items():
        assert torch.equal(tensor, expected(tensors[planned.info.key], dtype))
        assert tensor.is_inference() == (mode is torch.inference_mode)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("strategy", [CopiedStrategy(), IncrementalStrategy(), MappedStrategy()], ids=lambda s: s.name)
def test_every_tensor_is_saved_at_its_own_size(
    tmp_path: Path, tensors: dict[str, torch.Tensor], dtype: str, strategy: LoadingStrategy
) -> None:
    """torch.save writes the whole storage of a tensor, and accelerate takes tensors of one storage for tied."""
    for planned, tensor in strategy.read(plan_of(tmp_path, tensors, dtype)):
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, planned.info.key
        buffer = io.BytesIO()
        torch.save(tensor, buffer)
        assert buffer.getbuffer().nbytes < tensor.nbytes + 4096
        buffer.seek(0)
        assert torch.equal(torch.load(buffer), tensor)
