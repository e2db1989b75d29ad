"""A proxy on loopback that delays: ``delay.py PORT MS [MBIT]`` prints its own port, and holds each piece for so long.

With a rate, each way carries so many megabits per second, one piece after the other.
"""

from __future__ import annotations

import asyncio
import math
import socket
import sys

#: Small, so that the other side can begin to read soon, as it can on a line.
_PIECE = 2**14


def main() -> None:
    port, milliseconds, *rate = sys.argv[1:]
    bytes_per_second = float(rate[0]) * 1e6 / 8 if rate else math.inf
    asyncio.run(_serve(int(port), float(milliseconds) / 1000, bytes_per_second))


async def _serve(port: int, seconds: float, rate: float) -> None:
    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", port)
        for end in (writer, back):
            end.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await asyncio.gather(_carry(reader, back, seconds, rate), _carry(there, writer, seconds, rate))

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


async def _carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, seconds: float, rate: float) -> None:
    loop = asyncio.get_running_loop()
    sent = 0.0
    while data := await reader.read(2**16 if math.isinf(rate) else _PIECE):
        # When the last of its bits has left, after those of the piece before.
        sent = max(sent, loop.time()) + len(data) / rate
        loop.call_at(sent + seconds, writer.write, data)
    # After the last piece: what is due at the same moment has no order.
    loop.call_at(max(sent, loop.time()) + seconds + 1e-6, writer.close)


if __name__ == "__main__":
    main()
