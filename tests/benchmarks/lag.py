"""The lag of an event loop that does nothing, until stdin is closed: ``lag.py`` prints its histogram as JSON."""

from __future__ import annotations

import asyncio
import json
import sys

from splitlearn_core.extension import LoopLag


async def _measure() -> None:
    lag = LoopLag()
    measuring = asyncio.create_task(lag.run())
    await asyncio.to_thread(sys.stdin.read)
    measuring.cancel()
    print(json.dumps(lag.buckets()[0]))


if __name__ == "__main__":
    asyncio.run(_measure())
