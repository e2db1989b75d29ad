"""A whole process: load a trunk, run it once, and say when that was done. Imports nothing beside."""

from __future__ import annotations

import sys
import time
from typing import Any


def main() -> None:
    loader, directory, first, second, width, dtype = sys.argv[1:]
    cut = int(first), int(second)
    trunk = _ours(directory, cut) if loader == "ours" else _whole(directory, cut)
    import torch

    with torch.inference_mode():
        trunk(torch.ones(1, 32, int(width), dtype=getattr(torch, dtype)))
    print(f'{{"done": {time.monotonic()}}}')


def _ours(directory: str, cut: tuple[int, int]) -> Any:
    from splitlearn_core import load_split_model

    return load_split_model(None, cut, directory, parts=["trunk"], progress=False).trunk


def _whole(directory: str, cut: tuple[int, int]) -> Any:
    from loaders import Job, load_whole

    return load_whole(Job(directory, cut))


if __name__ == "__main__":
    main()
