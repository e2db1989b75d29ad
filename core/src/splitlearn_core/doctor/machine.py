"""What the machine leaves to this process: memory, processors, open files, address space."""

from __future__ import annotations

import os
import sys

from splitlearn_core.doctor.findings import Finding, Level
from splitlearn_core.memory import MemoryReading, read_memory
from splitlearn_core.units import human_bytes

_NAME = "machine"
_LITTLE_MEMORY = 2**30
_FEW_FILES = 256


def check_machine() -> list[Finding]:
    """Read memory, processors and limits."""
    return [memory(read_memory()), processors(), *limits()]


def memory(reading: MemoryReading) -> Finding:
    """Judge the free memory; a control group may limit it."""
    by = "" if reading.limited_by == "machine" else ", limited by a control group"
    what = f"{human_bytes(reading.free)} of {human_bytes(reading.total)} memory are free{by}"
    where = reading.limited_by if by else ""
    if reading.free < _LITTLE_MEMORY:
        mend = "end what is not needed" + (", or raise the limit of the control group" if by else "")
        return Finding(_NAME, Level.NOTE, what, where, f"{mend}; mapped weights need little memory of their own")
    return Finding(_NAME, Level.OK, what, where)


def processors() -> Finding:
    """Say how many processors this process may use."""
    every = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if sys.platform == "linux" else every
    return Finding(_NAME, Level.OK, f"{usable} of {every} processors may be used")


def limits() -> list[Finding]:
    """Judge how many files may be open, and how much may be mapped."""
    if sys.platform == "win32":
        return []
    import resource

    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    space, _ = resource.getrlimit(resource.RLIMIT_AS)
    return [*open_files(files), *address_space(None if space == resource.RLIM_INFINITY else space)]


def open_files(most: int) -> list[Finding]:
    """Judge the limit of open files; a checkpoint may have hundreds of shards."""
    if 0 <= most < _FEW_FILES:
        what = f"at most {most} files may be open, and a checkpoint of many shards needs more"
        return [Finding(_NAME, Level.NOTE, what, mend="ulimit -n 4096")]
    return [Finding(_NAME, Level.OK, f"{most if most >= 0 else 'any number of'} files may be open")]


def address_space(most: int | None) -> list[Finding]:
    """Judge the limit of addresses: mapped files count there, read or not."""
    if most is None:
        return []
    what = f"the address space is limited to {human_bytes(most)}, and mapped weights count in full"
    return [Finding(_NAME, Level.NOTE, what, mend="ulimit -v unlimited, or --strategy copied")]
