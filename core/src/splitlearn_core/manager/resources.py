"""What memory there is, by ledger: this machine's, and each CUDA device's own."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from splitlearn_core.errors import ConfigurationError
from splitlearn_core.manager.loaders.loadable import HOST, MAPPED
from splitlearn_core.system_memory import read_memory
from splitlearn_core.types import MEGABYTE, human_bytes

#: Bytes of this machine's memory that are left to everything else.
HEADROOM = 512 * 2**20


@dataclass(frozen=True, slots=True)
class MemorySample:
    """The ledgers at one moment."""

    #: Ledger -> bytes that could ever be had.
    total: Mapping[str, int]
    #: Ledger -> bytes that can be had now. ``mapped`` is counted before the weights that are mapped:
    #: their pages are given back on demand, so they are never seen as taken.
    free: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class ResourceReport:
    """Whether something fits, with the numbers."""

    fits: bool
    #: The ledger that was asked.
    ledger: str
    #: Bytes.
    needed: int
    free: int
    #: Bytes that could ever be had.
    limit: int
    #: Why it does not fit, or how much is left if it does: a sentence.
    why: str

    def __bool__(self) -> bool:
        return self.fits


class ResourceManager:
    """Reads what memory there is. Reading takes under a millisecond, but touches files: do it off the loop."""

    def __init__(self, *, headroom: int = HEADROOM, max_memory: int | None = None) -> None:
        """Make a reader.

        Args:
            headroom: Bytes of this machine's memory that nobody shall have.
            max_memory: Bytes of this machine's memory that may ever be had; None for what there is.
        """
        self._headroom = headroom
        self._max_memory = max_memory

    def sample(self) -> MemorySample:
        """Read all ledgers; those of CUDA devices only where this process uses CUDA already."""
        reading = read_memory()
        total = max(0, reading.total - self._headroom)
        if self._max_memory is not None:
            total = min(total, self._max_memory)
        free = min(total, max(0, reading.free - self._headroom))
        # Mapped weights share the machine's memory with what no file stands behind.
        totals, frees = {HOST: total, MAPPED: total}, {HOST: free, MAPPED: free}
        cuda = _used_cuda()
        for number in range(cuda.device_count()) if cuda is not None else ():
            frees[f"cuda:{number}"], totals[f"cuda:{number}"] = _cuda_memory(cuda, number)
        return MemorySample(totals, frees)

    def check_available_resources(self, memory_mb: float | None = None, device: str = "cpu") -> ResourceReport:
        """Say whether memory can be had at this moment.

        Args:
            memory_mb: How much, in units of 2**20 bytes; None to ask for the numbers alone.
            device: Where: ``cpu``, ``cuda``, ``cuda:1``, ...

        Raises:
            ConfigurationError: The amount is no amount, or there is no such device.
        """
        if memory_mb is not None and not 0 <= memory_mb < float("inf"):
            raise ConfigurationError(f"memory_mb is {memory_mb}", hint="give a number from 0, in units of 2**20 bytes")
        ledger = ledger_of(device)
        if ledger.startswith("cuda"):
            _begin_cuda(device)
        sample = self.sample()
        if ledger not in sample.total:
            raise ConfigurationError(
                f"nothing is known of the memory of {device!r}", hint=f"known are: {', '.join(sample.total)}"
            )
        needed, free, limit = round((memory_mb or 0) * MEGABYTE), sample.free[ledger], sample.total[ledger]
        fits = needed <= free
        if fits:
            why = f"{human_bytes(free - needed)} of {human_bytes(limit)} are left then"
        elif needed > limit:
            why = f"{human_bytes(needed)} are more than {ledger} could ever give: {human_bytes(limit)}"
        else:
            why = f"{human_bytes(needed)} are needed, {human_bytes(free)} of {human_bytes(limit)} are free"
        return ResourceReport(fits, ledger, needed, free, limit, why)

    def release_unused(self) -> None:
        """Give memory that allocators keep for later back to the system; takes a while, so off the loop."""
        # glibc has it; others give memory back by themselves, or not at all.
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
        if trim is not None:
            trim(0)
        cuda = _used_cuda()
        if cuda is not None:
            cuda.empty_cache()


def ledger_of(device: str) -> str:
    """Return the ledger that a device's memory is on."""
    kind, _, number = device.partition(":")
    # Apple's GPU has no memory of its own.
    if kind in ("cpu", "mps"):
        return HOST
    if kind == "cuda":
        cuda = _used_cuda()
        return f"cuda:{number or (cuda.current_device() if cuda is not None else 0)}"
    return device


def _used_cuda() -> Any:
    """Return ``torch.cuda`` where this process has begun to use it, and else nothing.

    Asking a device for its memory makes a context there, which takes hundreds of megabytes: nobody
    who computes on the CPU shall pay for that.
    """
    module = sys.modules.get("torch.cuda")
    # A module that another thread is importing at this moment is there, but not whole.
    begun = getattr(module, "is_initialized", None)
    return module if begun is not None and begun() else None


def _begin_cuda(device: str) -> None:
    import torch

    try:
        torch.cuda.mem_get_info(device if ":" in device else None)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ConfigurationError(
            f"there is no device {device!r}: {str(error).splitlines()[0]}",
            hint=f"this machine has {torch.cuda.device_count()} CUDA devices",
        ) from error


def _cuda_memory(cuda: Any, number: int) -> tuple[int, int]:
    """Return free and total bytes; what torch keeps for later is free to this process."""
    free, total = cuda.mem_get_info(number)
    return int(free + cuda.memory_reserved(number) - cuda.memory_allocated(number)), int(total)
