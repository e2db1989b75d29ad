"""How much memory this process may still allocate, by the machine and by the control groups that limit it.

A container, a service or a batch job runs in a control group (cgroup). Each group between it and
the root may have a limit, and a process that exceeds one is killed. The kernel counts file pages as
used but reclaims them on demand; what cannot be reclaimed is

    free = limit - (anonymous memory + shared memory + unreclaimable kernel memory)
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import psutil

_ROOT = Path("/")
_CGROUPS = "sys/fs/cgroup"
_OWN_GROUPS = "proc/self/cgroup"
#: From this value on, a limit of version 1 means that there is none.
_NO_LIMIT = 2**60
#: mallopt's M_MMAP_THRESHOLD, and the size of a block from which on glibc maps it separately.
_M_MMAP_THRESHOLD, _MMAP_THRESHOLD_BYTES = -3, 2**20


@dataclass(frozen=True, slots=True)
class MemoryReading:
    """The memory that this process may use, without swap."""

    #: Bytes: the machine's memory, or the lowest limit of a group.
    total: int
    #: Bytes that can be allocated now.
    free: int
    #: The origin of the total: ``machine``, or the folder of the group.
    limited_by: str = "machine"


@dataclass(frozen=True, slots=True)
class _Group:
    """A group with a limit."""

    folder: str
    limit: int
    used: int


def read_memory(root: Path = _ROOT) -> MemoryReading:
    """Read the machine's memory and the limits of the groups that this process is in.

    Args:
        root: The folder of ``proc`` and ``sys``.
    """
    machine = psutil.virtual_memory()
    reading = MemoryReading(int(machine.total), int(machine.available))
    for group in _groups(root):
        total, limited_by = min((reading.total, reading.limited_by), (group.limit, group.folder))
        reading = MemoryReading(total, max(0, min(reading.free, group.limit - group.used)), limited_by)
    return reading


def available_memory() -> int:
    """Return how many bytes can be allocated without swapping, within all limits."""
    return read_memory().free


def _groups(root: Path) -> Iterator[_Group]:
    """Yield every group with a limit that this process is in, from its own up to the root."""
    try:
        lines = (root / _OWN_GROUPS).read_text().splitlines()
    except OSError:
        return  # no groups on this system
    for line in lines:
        # number:controllers:path; version 2 is the line without controllers.
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            yield from _limits(root / _CGROUPS, path, _version_2)
        elif "memory" in controllers.split(","):
            yield from _limits(root / _CGROUPS / "memory", path, _version_1)


def _limits(mount: Path, path: str, read: Callable[[Path], _Group | None]) -> Iterator[_Group]:
    own = PurePosixPath(path.lstrip("/"))
    # In a container the mount's root is often its own group, whatever the path says, so that folders may not exist.
    for part in (own, *own.parents):
        if ".." not in part.parts and (group := read(mount / part)) is not None:
            yield group


def _version_2(folder: Path) -> _Group | None:
    limit = _number(folder / "memory.max")
    if limit is None:
        return None
    stat = _fields(folder / "memory.stat")
    if "anon" not in stat:
        return _Group(str(folder), limit, _number(folder / "memory.current") or 0)
    if "kernel" in stat:
        kernel = stat["kernel"] - stat.get("slab_reclaimable", 0)
    else:
        # Kernels before 5.18 report the parts.
        kernel = sum(stat.get(name, 0) for name in ("slab_unreclaimable", "kernel_stack", "pagetables", "percpu"))
    return _Group(str(folder), limit, stat["anon"] + stat.get("shmem", 0) + stat.get("sock", 0) + kernel)


def _version_1(folder: Path) -> _Group | None:
    limit = _number(folder / "memory.limit_in_bytes")
    if limit is None or limit >= _NO_LIMIT:
        return None
    stat = _fields(folder / "memory.stat")
    if "total_rss" not in stat:
        return _Group(str(folder), limit, _number(folder / "memory.usage_in_bytes") or 0)
    kernel = _number(folder / "memory.kmem.usage_in_bytes") or 0
    return _Group(str(folder), limit, stat["total_rss"] + stat.get("total_shmem", 0) + kernel)


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None  # "max" is no limit


def _fields(path: Path) -> dict[str, int]:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split() for line in lines)
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdecimal()}  # noqa: PLR2004  # a pair


def return_large_blocks() -> bool:
    """Make glibc return large freed blocks to the system at once, in the whole process.

    By default glibc raises its mmap threshold with each large block that is freed. The memory of
    weights then stays in the heap of the thread that loaded them, up to 64 MiB of it, which
    malloc_trim does not reach. A fixed threshold turns that off.

    Returns:
        Whether this is possible here.
    """
    if sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"):
        return False
    return bool(ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD_BYTES))


def anonymous_memory(pid: int | None = None) -> int:
    """Return how many bytes of memory a process (by default this one) holds that are not pages of files.

    Raises:
        ProcessLookupError: There is no such process, or not any more.
    """
    try:
        lines = Path(f"/proc/{pid or 'self'}/status").read_text().splitlines()
    except OSError:
        # Systems without /proc: everything resident, file pages too.
        try:
            return int(psutil.Process(pid).memory_info().rss)
        except psutil.NoSuchProcess as error:
            raise ProcessLookupError(f"process {pid} has ended") from error
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return int(fields["RssAnon"].split()[0]) * 1024


def return_free_memory() -> None:
    """Return what glibc keeps of freed blocks to the system; this takes milliseconds."""
    # Other allocators return memory by themselves, or not at all.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
