"""Planned bytes are read into the page cache in the background."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from splitlearn_core.checkpoint import prefetch
from splitlearn_core.checkpoint.prefetch import is_cached, read_ahead
from splitlearn_core.types import TensorInfo

pytestmark = pytest.mark.light

SIZE = 48 * 2**20
BEGIN = 12_345


@pytest.fixture
def cold_file(tmp_path: Path) -> Path:
    """A file that the page cache does not hold."""
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(os.urandom(2**20) * (SIZE // 2**20))
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    # Piece by piece: the kernel may keep some of them, which it reads in large folios.
    if any(is_cached(path, begin, begin + 2**20) for begin in range(0, SIZE, 2**20)):
        pytest.skip("this file system keeps its pages in memory")
    return path


def planned(begin: int, end: int) -> TensorInfo:
    return TensorInfo("a", "U8", (end - begin,), "model.safetensors", begin, end)


def wait_for_readers() -> None:
    for thread in threading.enumerate():
        if thread.name == "splitlearn-read-ahead":
            thread.join()


@pytest.mark.parametrize("can_populate", [True, False])
def test_a_planned_range_is_read(cold_file: Path, can_populate: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not can_populate:
        monkeypatch.setattr(prefetch, "_madvise", lambda mapped, advice: False)
    read_ahead([planned(BEGIN, SIZE)], {"model.safetensors": cold_file})
    wait_for_readers()
    if can_populate:  # the other call asks, and does not wait for the disk
        assert is_cached(cold_file, BEGIN, SIZE)


def test_nothing_but_the_planned_range_is_read(cold_file: Path) -> None:
    read_ahead([planned(BEGIN, SIZE // 4)], {"model.safetensors": cold_file})
    wait_for_readers()
    assert is_cached(cold_file, BEGIN, SIZE // 4)
    assert not is_cached(cold_file, SIZE // 2 + 8 * 2**20, SIZE)


def test_files_that_are_gone_or_shorter_are_left_to_the_reader(cold_file: Path, tmp_path: Path) -> None:
    os.truncate(cold_file, SIZE // 2)
    beyond, absent = planned(BEGIN, SIZE), TensorInfo("b", "U8", (100,), "absent", 0, 100)
    read_ahead([beyond, absent], {"model.safetensors": cold_file, "absent": tmp_path / "absent"})
    wait_for_readers()
    assert is_cached(cold_file, BEGIN, SIZE // 2 - 8 * 2**20)


def test_cached_pages_are_not_requested(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(SIZE))
    if not is_cached(path, 0, SIZE):
        pytest.skip("this file system does not tell what it holds in memory")
    before = set(threading.enumerate())
    read_ahead([planned(BEGIN, SIZE)], {"model.safetensors": path})
    assert set(threading.enumerate()) == before
