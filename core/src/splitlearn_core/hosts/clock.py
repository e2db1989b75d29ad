"""The time of a client, which may be another than the machine's."""

from __future__ import annotations

import random
import time


class Clock:
    """Seconds, monotonically, and pauses."""

    def now(self) -> float:
        return time.monotonic()

    def pause(self, seconds: float) -> None:
        time.sleep(seconds)

    def spread(self, seconds: float) -> float:
        """Return from half to all of a pause, so that the clients of one host do not all come back at one moment."""
        return seconds * random.uniform(0.5, 1.0)  # noqa: S311  # no secret


MACHINE_CLOCK = Clock()
