"""The measurement that most benchmarks share: one trunk, loaded one way, in a fresh process."""

from __future__ import annotations

import gc
import hashlib
import importlib
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from checkpoints import Checkpoint
from loaders import LOADERS, Job, Loader, model_class
from measuring import anonymous_mb, in_fresh_process, say, touch

if TYPE_CHECKING:
    import torch

TOKENS = 32
TORCH_NAMES = {"F32": "float32", "BF16": "bfloat16"}


def measurement(
    checkpoint: Checkpoint,
    loader: str,
    *,
    dtype: str = "auto",
    strategy: str = "auto",
    forward: bool = True,
    watch: bool = False,
    cut: tuple[int, int] | None = None,
    room: int = 0,
) -> Callable[[], dict[str, Any]]:
    """Describe one measurement, to be called as often as it is wanted.

    Its answer holds ``load``, ``first`` (load and first forward) and ``again`` (a second forward, when
    everything is in place) in seconds, ``grown_mb`` of anonymous memory, and the ``digest`` of what
    the trunk computed. ``room`` is memory that the machine has to provide before the clock starts.
    """
    job = {
        "loader": loader,
        "directory": str(checkpoint.directory),
        "cut": cut or checkpoint.recipe.cut,
        "dtype": dtype,
        "strategy": strategy,
        "forward": forward,
        "room": room,
        "hidden_size": checkpoint.recipe.hidden_size,
        "hidden_dtype": TORCH_NAMES[checkpoint.recipe.dtype] if dtype == "auto" else dtype,
    }

    def measure() -> dict[str, Any]:
        answer = in_fresh_process("trunk", job, watch=watch)
        say(f"  {checkpoint.recipe.name}: {LOADERS[loader].title}: {answer['load'] * 1000:.1f} ms")
        return answer

    return measure


def work(job: dict[str, Any]) -> dict[str, Any]:
    """Load, then run once, each timed; the imports are over when the clock starts."""
    import torch

    loader = LOADERS[job["loader"]]
    _prepare(loader, job["directory"])
    hidden = hidden_states(job["hidden_size"], job["hidden_dtype"])
    with torch.inference_mode():
        return _timed(loader, Job(job["directory"], tuple(job["cut"]), job["dtype"], job["strategy"]), hidden, job)


def hidden_states(width: int, dtype: str) -> torch.Tensor:
    """Make the input that every trunk is given."""
    import torch

    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, TOKENS, width, generator=generator).to(getattr(torch, dtype))


def digest(output: torch.Tensor) -> str:
    """Tell outputs apart to the last bit."""
    import torch

    return hashlib.sha256(output.detach().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def _prepare(loader: Loader, directory: str) -> None:
    for module in loader.imports:
        importlib.import_module(module)
    model_class(directory)


def _timed(loader: Loader, target: Job, hidden: torch.Tensor, job: dict[str, Any]) -> dict[str, Any]:
    touch(job["room"])
    gc.collect()
    before = anonymous_mb()
    begin = time.monotonic()
    trunk = loader.load(target)
    end = time.monotonic()
    grown = anonymous_mb() - before
    answer: dict[str, Any] = {"begin": begin, "end": end, "load": end - begin, "before_mb": before, "grown_mb": grown}
    if job["forward"]:
        begin = time.monotonic()
        output = trunk(hidden)
        answer["first"] = answer["load"] + time.monotonic() - begin
        answer["digest"] = digest(output)
        begin = time.monotonic()
        trunk(hidden)
        answer["again"] = time.monotonic() - begin
    return answer
