"""The Hub client's own bars, and what they tell of."""

from __future__ import annotations

from typing import Any

from splitlearn_core.types import Progress, ProgressCallback


def telling_bar(tell: ProgressCallback, name: str, size: int, before: int, total: int) -> type[Any]:
    """Return a class of the Hub client's bars that also tells of the bytes of one file.

    Args:
        tell: Where to tell; if it raises, the client stops, and keeps what it would keep of any
            download that was cut off.
        name: The file.
        size: Its size.
        before: Bytes of the files before it.
        total: Bytes of all of them.
    """
    from huggingface_hub.utils import tqdm

    told = 0

    class TellingBar(tqdm):
        # The thread that redraws bars would be one for each class, and stay.
        monitor_interval = 0

        def __init__(self, *args: Any, **options: Any) -> None:
            # Counted here, because a bar that is not shown does not count.
            self._bytes = int(options.get("initial") or 0)
            super().__init__(*args, **options)

        def update(self, n: float | None = 1) -> bool | None:
            nonlocal told
            drawn: bool | None = super().update(n)
            self._bytes += int(n or 0)
            # Some transfers have two bars, what was received and what was put together from it; and
            # one that begins anew counts back.
            if told < min(self._bytes, size):
                told = min(self._bytes, size)
                tell(Progress("downloading", None, before + told, total, name))
            return drawn

    return TellingBar


def byte_bar(name: str, total: int) -> Any:
    """Return a bar of the Hub client's for a transfer of our own: shown where the client would show its own."""
    from huggingface_hub.utils import tqdm

    class ByteBar(tqdm):
        monitor_interval = 0

    # None: on a terminal alone.
    return ByteBar(total=total, desc=name, unit="B", unit_scale=True, name="huggingface_hub.http_get", disable=None)
