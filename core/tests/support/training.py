"""Training of a model unsplit, and of the same with its trunk elsewhere, step by step."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from splitlearn_core.hosts.holes import HoleParameter

#: Modules of each family that adapters go to: in attention and feed-forward.
TARGETS = {
    "gpt2": ["c_attn", "c_proj"],
    "qwen2": ["q_proj", "v_proj", "down_proj"],
    "gemma": ["q_proj", "o_proj", "up_proj"],
}
DROPOUTS = {
    "gpt2": ("attn_pdrop", "resid_pdrop", "embd_pdrop"),
    "qwen2": ("attention_dropout",),
    "gemma": ("attention_dropout",),
}


@dataclass(frozen=True)
class Recipe:
    """How a model is trained."""

    family: str = "qwen2"
    dropout: float = 0.1
    accumulation: int = 1
    clip: float = 0.0
    tied: bool = True
    #: Gradient checkpointing: not, or in one of torch's two ways.
    checkpointing: str = ""
    batch: str = "padded"
    #: Whether bottom and top are trained in full besides.
    ends: bool = False
    dtype: str = "float32"
    kind: str = "LoraConfig"

    @property
    def name(self) -> str:
        return "-".join(str(value) for value in vars(self).values() if value not in ("", "LoraConfig"))

    @property
    def values(self) -> dict[str, Any]:
        """Values of the model's configuration."""
        return {"tie_word_embeddings": self.tied, **dict.fromkeys(DROPOUTS[self.family], self.dropout)}

    def adapter(self, **settings: Any) -> Any:
        """Return PEFT's configuration of an adapter everywhere."""
        import peft

        lora = self.kind == "LoraConfig"
        usual: dict[str, Any] = {"target_modules": TARGETS[self.family]}
        if lora:
            usual |= {"r": 4, "lora_dropout": self.dropout, "fan_in_fan_out": self.family == "gpt2"}
        elif self.kind == "IA3Config":
            usual |= {"feedforward_modules": TARGETS[self.family][-1:], "fan_in_fan_out": self.family == "gpt2"}
        else:
            usual |= {"r": 4, "rank_dropout": self.dropout}
        return getattr(peft, self.kind)(**usual, **settings)


def pairwise(choices: Mapping[str, Iterable[Any]]) -> list[dict[str, Any]]:
    """Return few combinations among which each pair of values of two choices is, chosen the same way each time."""
    every = [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]

    def pairs(case: Mapping[str, Any]) -> set[Any]:
        return set(itertools.combinations([(name, str(value)) for name, value in case.items()], 2))

    left = set().union(*map(pairs, every))
    chosen = []
    while left:
        best = max(every, key=lambda case: len(pairs(case) & left))
        left -= pairs(best)
        chosen.append(best)
    return chosen


@dataclass
class Learned:
    """What a training did."""

    losses: list[torch.Tensor] = field(default_factory=list)
    #: For each step, the gradients by name.
    gradients: list[dict[str, torch.Tensor]] = field(default_factory=list)
    parameters: dict[str, torch.Tensor] = field(default_factory=dict)


def batches(recipe: Recipe, seed: int = 9) -> Iterator[dict[str, Any]]:
    """Yield batches without end: padded on the left, or several texts in a row."""
    draw = torch.Generator().manual_seed(seed)
    while True:
        ids = torch.randint(3, 90, (2, 12), generator=draw)
        if recipe.batch == "padded":
            mask = torch.ones_like(ids)
            mask[0, :3] = 0
            yield {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
        else:
            positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2]])
            yield {"input_ids": ids[:1], "position_ids": positions, "labels": ids[:1].masked_fill(positions == 0, -100)}


def adapted(model: Any, recipe: Recipe, own: Iterable[str] | None = None) -> Any:
    """Put adapters on a model, and prepare it as the recipe says.

    Args:
        model: A causal language model, unsplit or split.
        recipe: The recipe.
        own: The names of what is trained besides the adapters.
    """
    import peft

    torch.manual_seed(1)
    wrapped = peft.get_peft_model(model, recipe.adapter())
    for name, parameter in wrapped.named_parameters():
        if name in set(own or ()):
            parameter.requires_grad_()
    # Adapters of which one half is zero leave the other half without a gradient.
    draw = torch.Generator().manual_seed(7)
    for name, parameter in sorted(wrapped.named_parameters()):
        if parameter.requires_grad and any(part in name for part in ("lora_", "ia3_", "hada_", "lokr_")):
            parameter.data.add_(torch.empty(parameter.shape).normal_(0, 0.05, generator=draw).to(parameter.dtype))
    if recipe.checkpointing:
        wrapped.enable_input_require_grads()
        wrapped.gradient_checkpointing_enable({"use_reentrant": recipe.checkpointing == "reentrant"})
    return wrapped.train()


def names_of_ends(split: Any) -> list[str]:
    """Return PEFT's names of the parameters of a split model that are here."""
    tuned = set()
    for name, parameter in split.named_parameters():
        if not isinstance(parameter, HoleParameter):
            tuned.add(f"base_model.model.{name}")
            # The name of one that is adapted.
            path, _, leaf = name.rpartition(".")
            tuned.add(f"base_model.model.{path}.base_layer.{leaf}")
    return sorted(tuned)


def clipped(parameters: list[Any], limit: float) -> None:
    torch.nn.utils.clip_grad_norm_(parameters, limit)


def train(
    model: Any,
    recipe: Recipe,
    steps: int = 20,
    *,
    clip: Callable[[list[Any], float], None] = clipped,
    after: Callable[[int], None] = lambda step: None,
) -> Learned:
    """Train a model for some steps of AdamW."""
    learned = Learned()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=3e-3, weight_decay=0.1)
    torch.manual_seed(5)
    data = batches(recipe)
    for step in range(steps):
        for _ in range(recipe.accumulation):
            loss = model(**next(data), use_cache=False).loss
            (loss / recipe.accumulation).backward()
            learned.losses.append(loss.detach())
        if recipe.clip:
            clip(list(trained.values()), recipe.clip)
        learned.gradients.append({name: parameter.grad.clone() for name, parameter in trained.items()})
        optimizer.step()
        optimizer.zero_grad()
        after(step)
    learned.parameters = {name: parameter.detach().clone() for name, parameter in trained.items()}
    return learned


def differences(expected: Learned, actual: Learned) -> list[str]:
    """Say in what two trainings differ in a bit; nothing if in nothing."""
    problems = []
    for number, (a, b) in enumerate(zip(expected.losses, actual.losses, strict=True)):
        if not torch.equal(a, b):
            problems.append(f"loss {number}: {a} {b}")
    for step, (a, b) in enumerate(zip(expected.gradients, actual.gradients, strict=True)):
        if a.keys() != b.keys():
            problems.append(f"names of gradients: {sorted(a.keys() ^ b.keys())[:3]}")
        problems += [
            f"step {step}: gradient of {name}" for name in a if name in b and not torch.equal(a[name], b[name])
        ]
    problems += [
        name
        for name, value in expected.parameters.items()
        if not torch.equal(value, actual.parameters.get(name, value + 1))
    ]
    return problems[:5]


#: Is a host in a process: ``python -c HOST CHECKPOINT SOCKET DTYPE``; says when it listens, and ends with its stdin.
HOST = """
import socket, sys, torch
torch.set_num_threads(1)
from splitlearn_core import load_split_model
from splitlearn_core.hosts.sessions import SessionTable
from splitlearn_core.hosts.worker import Worker

folder, path, dtype = sys.argv[1:]
parts = load_split_model(None, (2, 4), folder, parts=("trunk",), dtype=dtype, progress=False)
listener = socket.socket(socket.AF_UNIX)
listener.bind(path)
listener.listen()
worker = Worker(SessionTable(parts.trunk), listener)
worker.start()
print("ready", flush=True)
sys.stdin.read()
"""


@contextmanager
def host_process(interpreter: object, checkpoint: Path, path: Path, dtype: str = "float32") -> Iterator[str]:
    """Serve the trunk of a checkpoint from another process; yields the URL."""
    import subprocess

    path.unlink(missing_ok=True)
    command = [str(interpreter), "-c", HOST, str(checkpoint), str(path), dtype]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        try:
            yield f"unix://{path}"
        finally:
            child.stdin.close()
            child.kill()


@contextmanager
def served_trunk(interpreter: object, checkpoint: Path | str, *cuts: int, dtype: str = "float32") -> Iterator[str]:
    """Serve the trunk of a checkpoint by ``splitlearn serve``, as another process; yields the URL.

    Meanwhile torch has one thread here, as it has there.
    """
    import subprocess
    import threading

    threads = torch.get_num_threads()

    options = ["--split", *map(str, cuts), "--dtype", dtype, "--port", "0"]
    command = [str(interpreter), "-m", "splitlearn_core", "serve", str(checkpoint), *options]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        lines = iter(server.stderr)
        url = next((line.partition(" at ")[2].strip() for line in lines if line.startswith("trunk at ")), "")
        assert url
        rest = threading.Thread(target=lambda: list(lines))
        rest.start()
        torch.set_num_threads(1)
        try:
            yield url
        finally:
            torch.set_num_threads(threads)
            server.terminate()
            rest.join()
