"""Noise that only the data owner can draw.

It does not come from a torch generator: the state of the default generator crosses the wire in training, a 32-bit seed
can be found by brute force, and a Mersenne twister can be reconstructed from its output wherever the server knows a
text. The bytes are SHAKE-256 of a secret key and the number of the draw.
"""

from __future__ import annotations

import hashlib
import math
import os
import secrets
import threading
from collections import OrderedDict

import torch

#: Remembered draws, for gradient checkpointing: more than one backward pass recomputes.
_REMEMBERED = 4_096
_KEY_BYTES, _NUMBER_BYTES, _WORD = 32, 8, 8


class SecretNoise:
    """A source of random bytes, in numbered draws.

    Args:
        seed: Makes the draws reproducible, in another process too; None for the system's entropy.
        purpose: Sources with the same seed but different purposes have different draws.
    """

    def __init__(self, seed: int | None, purpose: str) -> None:
        self._is_seeded = seed is not None
        start = secrets.token_bytes(_KEY_BYTES) if seed is None else str(seed).encode()
        self._key = hashlib.sha256(purpose.encode() + b"\0" + start).digest()
        self._count = 0
        self._lock = threading.Lock()

    def next_draw(self) -> int:
        """Return the number of a new draw."""
        with self._lock:
            self._count += 1
            return self._count

    def read(self, draw: int, count: int, use: str = "") -> bytes:
        """Return bytes of a draw, different for each use."""
        # A forked process has the same key and counter, but must not draw the same noise.
        process = b"" if self._is_seeded else os.getpid().to_bytes(_NUMBER_BYTES, "little")
        start = self._key + process + draw.to_bytes(_NUMBER_BYTES, "little") + use.encode()
        return hashlib.shake_256(start).digest(count)


def gaussian(data: bytes, shape: torch.Size) -> torch.Tensor:
    """Turn random bytes, 8 for each value and 8 more, into standard normal values of float64 (Box and Muller)."""
    count = shape.numel()
    half = -(-count // 2)
    words = torch.frombuffer(bytearray(data), dtype=torch.int64)[: 2 * half]
    # 53 bits, at the middle of each step: never 0, whose logarithm is infinite.
    uniform = ((words >> 11) & (2**53 - 1)).double().add_(0.5).mul_(2.0**-53)
    radius, angle = uniform[:half].log().mul_(-2).sqrt_(), uniform[half:] * (2 * math.pi)
    return torch.cat((radius * angle.cos(), radius * angle.sin()))[:count].reshape(shape)


def gaussian_bytes(shape: torch.Size) -> int:
    """Return the number of bytes that :func:`gaussian` needs."""
    return (shape.numel() + 1) * _WORD


class Draws:
    """The assignment of draws to messages, so that a recomputed message gets the same draw.

    A message is recomputed by gradient checkpointing, in the backward pass; and when a forward failed, and the caller
    repeats it. Any other message gets a new draw, even for equal values: equal noise would reveal that they are equal.
    """

    def __init__(self, source: SecretNoise) -> None:
        self.source = source
        self._lock = threading.Lock()
        self._made: OrderedDict[bytes, int] = OrderedDict()
        self._failed: dict[tuple[int, bytes], int] = {}
        self._running: dict[int, dict[bytes, int]] = {}

    def of(self, digest: bytes) -> tuple[int, bool]:
        """Return the draw of a message, and whether the message is a repetition."""
        thread, is_backward = threading.get_ident(), in_backward()
        with self._lock:
            again = self._made.get(digest) if is_backward else self._failed.pop((thread, digest), None)
            draw = self.source.next_draw() if again is None else again
            self._made[digest] = draw
            self._made.move_to_end(digest)
            while len(self._made) > _REMEMBERED:
                self._made.popitem(last=False)
            if not is_backward:
                self._running.setdefault(thread, {})[digest] = draw
        return draw, again is not None

    def finish(self, *, failed: bool) -> None:
        """End a forward of this thread; only the next one may repeat messages of a failed one."""
        thread = threading.get_ident()
        with self._lock:
            self._failed = {key: draw for key, draw in self._failed.items() if key[0] != thread}
            for digest, draw in self._running.pop(thread, {}).items():
                if failed:
                    self._failed[thread, digest] = draw


def in_backward() -> bool:
    """Return whether this thread is inside a backward pass, where a forward is a recomputation."""
    return bool(torch._C._current_graph_task_id() != -1)  # noqa: SLF001  # the same check as in torch.utils.checkpoint
