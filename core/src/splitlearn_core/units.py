"""Numbers as people read them."""

from __future__ import annotations

_STEP = 1024
#: Bytes of what settings in megabytes count in.
MEGABYTE = 2**20


def human_bytes(count: float) -> str:
    """Write a number of bytes with a binary unit: 1.5 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < _STEP:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= _STEP
    return f"{count:.1f} TiB"
