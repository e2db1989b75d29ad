"""Memory by ledger: that of this machine, and of each CUDA device."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from splitlearn_core.errors import ConfigurationError
from splitlearn_core.manager.loaders.loadable import HOST, MAPPED
from splitlearn_core.system_memory import read_memory, return_free_memory
from splitlearn_core.types import MEGABYTE, human_bytes

#: Bytes of this machine's memory that are left to other programs.
HEADROOM = 512 * MEGABYTE


@dataclass(frozen=True, slots=True)
class MemorySample:
    """The ledgers at one moment."""

    #: Ledger -> capacity in bytes.
    total: Mapping[str, int]
    #: Ledger -> bytes available now. ``mapped`` is counted without the weights that are mapped:
    #: the system reclaims their pages on demand, so they never count as taken.
    free: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class ResourceReport:
    """Whether something fits, with the numbers."""

    fits: bool
    #: The ledger of the requested device.
    ledger: str
    #: Bytes.
    needed: int
    free: int
    #: Capacity in bytes.
    limit: int
    #: A sentence: why it does not fit, or how much would be left.
    why: str

    def __bool__(self) -> bool:
        return self.fits


class ResourceManager:
    """Measures memory. That takes under a millisecond, but reads files: do it off the event loop."""

    def __init__(self, *, headroom: int = HEADROOM, max_memory: int | None = None) -> None:
        """Set the limits.

        Args:
            headroom: Bytes of this machine's memory that are never available.
            max_memory: Bytes of this machine's memory that may be used in all; None for no limit.
        """
        self._headroom = headroom
        self._max_memory = max_memory

    def sample(self) -> MemorySample:
        """Read all ledgers; those of CUDA devices only if this process already uses CUDA."""
        reading = read_memory()
        total = max(0, reading.total - self._headroom)
        if self._max_memory is not None:
            total = min(total, self._max_memory)
        free = min(total, max(0, reading.free - self._headroom))
        # Mapped weights share the machine's memory with anonymous memory.
        totals, frees = {HOST: total, MAPPED: total}, {HOST: free, MAPPED: free}
        cuda = _used_cuda()
        for number in range(cuda.device_count()) if cuda is not None else ():
            device_free, device_total = cuda.mem_get_info(number)
            # Memory that torch's allocator caches is available to this process.
            cached = cuda.memory_reserved(number) - cuda.memory_allocated(number)
            frees[f"cuda:{number}"], totals[f"cuda:{number}"] = int(device_free + cached), int(device_total)
        return MemorySample(totals, frees)

    def check_available_resources(self, memory_mb: float | None = None, device: str = "cpu") -> ResourceReport:
        """Return whether memory is available at this moment.

        Args:
            memory_mb: How much, in units of 2**20 bytes; None for the numbers alone.
            device: Where: ``cpu``, ``cuda``, ``cuda:1``, ...

        Raises:
            ConfigurationError: The amount is invalid, or there is no such device.
        """
        if memory_mb is not None and not 0 <= memory_mb < float("inf"):
            raise ConfigurationError(f"memory_mb is {memory_mb}", hint="give a number from 0, in units of 2**20 bytes")
        ledger = ledger_of(device)
        if ledger.startswith("cuda"):
            _initialize_cuda(device)
        sample = self.sample()
        if ledger not in sample.total:
            raise ConfigurationError(
                f"the memory of {device!r} is unknown", hint=f"known are: {', '.join(sample.total)}"
            )
        needed, free, limit = round((memory_mb or 0) * MEGABYTE), sample.free[ledger], sample.total[ledger]
        fits = needed <= free
        if fits:
            why = f"{human_bytes(free - needed)} of {human_bytes(limit)} would be left"
        elif needed > limit:
            why = f"{human_bytes(needed)} are more than all of {ledger}: {human_bytes(limit)}"
        else:
            why = f"{human_bytes(needed)} are needed, {human_bytes(free)} of {human_bytes(limit)} are free"
        return ResourceReport(fits, ledger, needed, free, limit, why)

    def release_unused(self) -> None:
        """Return memory that allocators cache to the system; this is slow, so do it off the event loop."""
        return_free_memory()
        cuda = _used_cuda()
        if cuda is not None:
            cuda.empty_cache()


def ledger_of(device: str) -> str:
    """Return the ledger of a device's memory."""
    kind, _, number = device.partition(":")
    # Apple's GPU shares the machine's memory.
    if kind in ("cpu", "mps"):
        return HOST
    if kind == "cuda":
        cuda = _used_cuda()
        return f"cuda:{number or (cuda.current_device() if cuda is not None else 0)}"
    return device


def _used_cuda() -> Any:
    """Return ``torch.cuda`` if this process already uses it, else None.

    Reading a device's memory creates a context there, which takes hundreds of megabytes: a process that
    computes on the CPU must not pay for that.
    """
    module = sys.modules.get("torch.cuda")
    # The module is incomplete while another thread imports it.
    is_initialized = getattr(module, "is_initialized", None)
    return module if is_initialized is not None and is_initialized() else None


def _initialize_cuda(device: str) -> None:
    import torch

    try:
        torch.cuda.mem_get_info(device if ":" in device else None)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ConfigurationError(
            f"there is no device {device!r}: {str(error).splitlines()[0]}",
            hint=f"this machine has {torch.cuda.device_count()} CUDA devices",
        ) from error
