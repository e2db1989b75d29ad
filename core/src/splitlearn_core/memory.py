"""How much memory this process may still take."""

from __future__ import annotations

from pathlib import Path

import psutil

_CGROUP = Path("/sys/fs/cgroup")


def available_memory() -> int:
    """Return bytes that can be taken without swapping, by the machine's and the container's limit."""
    free = int(psutil.virtual_memory().available)
    limit = _cgroup_number("memory.max")
    if limit is None:
        return free
    # Page cache counts as used in memory.current but is given back on demand.
    used = (_cgroup_number("memory.current") or 0) - _cgroup_file_pages()
    return max(0, min(free, limit - used))


def _cgroup_number(name: str) -> int | None:
    try:
        text = (_CGROUP / name).read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def _cgroup_file_pages() -> int:
    try:
        lines = (_CGROUP / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    fields = dict(line.split(" ", 1) for line in lines if " " in line)
    return sum(int(fields.get(name, 0)) for name in ("active_file", "inactive_file"))


def anonymous_memory() -> int:
    """Return the bytes of memory of this process that no file stands behind."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        # No such account on this system: everything resident, file pages too.
        return int(psutil.Process().memory_info().rss)
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return int(fields["RssAnon"].split()[0]) * 1024
