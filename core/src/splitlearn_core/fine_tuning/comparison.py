"""One adapter, trained with the trunk elsewhere and on the unsplit model, compared to the last bit."""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from splitlearn_core.adapters.peft_models import import_peft
from splitlearn_core.assembly import load_all
from splitlearn_core.build.torch_state import own_state
from splitlearn_core.fine_tuning.sonnets import sonnets
from splitlearn_core.generation import Sampling, generate_text, load_tokenizer
from splitlearn_core.hosts.remote import RemoteComponent
from splitlearn_core.line_plot import Axis, Line, line_plot
from splitlearn_core.loading.opening import OpenModel
from splitlearn_core.loading.options import LoadOptions
from splitlearn_core.verification import load_unsplit

#: The dtype of all components: the steps of an optimizer are too small for half precision.
TUNING_DTYPE = "float32"
_HELD_OUT_WINDOWS = 16
#: Warnings of PEFT about its own use of transformers, and about a base model without a folder.
_OF_PEFT = ("`is_gradient_checkpointing` is deprecated", "Could not find a config file")


@dataclass(frozen=True, slots=True)
class TuningRecipe:
    """How the adapter is trained, and the text that is then generated."""

    steps: int = 40
    #: Windows per step, and tokens per window.
    batch: int = 8
    length: int = 64
    learning_rate: float = 5e-3
    rank: int = 16
    #: Dropout of the adapter's input, so that random numbers are drawn in the trunk, too.
    dropout: float = 0.05
    #: Largest norm of all gradients together.
    clip: float = 1.0
    seed: int = 0
    prompt: str = "The people of the United States"
    max_new_tokens: int = 60


@dataclass(frozen=True, slots=True)
class FineTuning:
    """A fine-tuning with the trunk elsewhere, and the unsplit one."""

    model: str
    split_points: tuple[int, ...]
    recipe: TuningRecipe
    #: Number of trained parameters: of all components, and of the remote ones.
    parameters: int
    parameters_elsewhere: int
    #: The loss of each step, per token.
    losses: tuple[float, ...]
    unsplit_losses: tuple[float, ...]
    #: Loss on held-out poems, before the first step and after the last.
    held_out_loss_before: float
    held_out_loss_after: float
    text_before: str
    text_after: str
    #: Traffic of one step, to and from the components that run elsewhere.
    bytes_sent_per_step: float
    bytes_received_per_step: float
    seconds: float
    unsplit_seconds: float
    #: Comparison -> whether it is equal to the last bit.
    checks: Mapping[str, bool] = field(default_factory=dict)

    @property
    def equal(self) -> bool:
        return all(self.checks.values())

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        return {"equal": self.equal, **asdict(self)}


@dataclass(slots=True)
class _Run:
    """The results of training one model."""

    losses: list[torch.Tensor]
    held_out: list[torch.Tensor]
    texts: list[str]
    adapter: dict[str, torch.Tensor]
    seconds: float
    peft_model: Any


def compare_fine_tuning(
    model: OpenModel,
    split_points: Sequence[int],
    remote: Mapping[str, RemoteComponent],
    recipe: TuningRecipe = TuningRecipe(),
    on_step: Callable[[int, float, float | None], None] = lambda number, unsplit, split: None,
) -> FineTuning:
    """Train an adapter on all layers of the unsplit model, and again with remote components.

    Args:
        model: The checkpoint.
        split_points: Where it is cut.
        remote: The components that run elsewhere, by name, in :data:`TUNING_DTYPE`.
        recipe: How the adapter is trained.
        on_step: Called after each step with its number and its losses: first of the unsplit training, with None for
            the split one, and then of the split training.

    Raises:
        ConfigurationError: PEFT is not installed.
        SplitLearnError: A component cannot be loaded, or its host does not let it be trained.
    """
    import_peft()
    tokenizer = load_tokenizer(model)
    with warnings.catch_warnings(), own_state(gradients=True):
        for message in _OF_PEFT:
            warnings.filterwarnings("ignore", message)
        unsplit = _unsplit(model)
        whole = _learn(unsplit, tokenizer, recipe, lambda number, loss: on_step(number, loss, None))
        split = load_all(model, split_points, TUNING_DTYPE, LoadOptions(), lambda _: None, remote)
        links = [part.host for part in remote.values()]
        traffic: list[tuple[int, int]] = []

        def count(number: int, loss: float) -> None:
            traffic.append((sum(link.bytes_sent for link in links), sum(link.bytes_received for link in links)))
            on_step(number, whole.losses[number - 1].item(), loss)

        apart = _learn(split, tokenizer, recipe, count)
        checks = _compare(model, whole, apart)
    steps = max(1, len(traffic) - 1)
    # From the end of the first step to the end of the last one: without evaluation and the first connection.
    sent, received = ((traffic[-1][way] - traffic[0][way]) / steps for way in (0, 1))
    elsewhere = {f".{n}." for part in remote.values() for n in range(part.start_layer, part.end_layer)}
    sizes = {name: tensor.numel() for name, tensor in apart.adapter.items()}
    return FineTuning(
        model.name,
        tuple(split_points),
        recipe,
        sum(sizes.values()),
        sum(size for name, size in sizes.items() if any(number in name for number in elsewhere)),
        tuple(loss.item() for loss in apart.losses),
        tuple(loss.item() for loss in whole.losses),
        apart.held_out[0].item(),
        apart.held_out[1].item(),
        apart.texts[0],
        apart.texts[1],
        sent,
        received,
        apart.seconds,
        whole.seconds,
        checks,
    )


def loss_plot(result: FineTuning) -> str:
    """Return an SVG with the losses of both trainings over the steps: the unsplit one wide, the split one in it."""
    series = {
        "unsplit": (result.unsplit_losses, "#f0b429", 7, ""),
        "trunk elsewhere": (result.losses, "#1b6ca8", 1.5, "6 3"),
    }
    lines = [
        Line(name, list(enumerate(losses, 1)), colour, width, dashes)
        for name, (losses, colour, width, dashes) in series.items()
    ]
    every = [*result.losses, *result.unsplit_losses]
    low, high, steps = min(every), max(every), len(result.losses)
    words = "equal to the last bit" if result.losses == result.unsplit_losses else "NOT equal"
    cuts = ", ".join(map(str, result.split_points))
    return line_plot(
        lines,
        Axis("step", 1, max(steps, 2), (1, steps), ".0f"),
        Axis("loss per token", low, high, (low, (low + high) / 2, high)),
        f"{result.model}, cut at {cuts}: losses of {steps} steps, {words}",
    )


def _unsplit(model: OpenModel) -> Any:
    whole = load_unsplit(model, TUNING_DTYPE, LoadOptions())
    # The default of transformers, which warns if the name of the class does not imply a loss.
    whole.loss_type = whole.loss_type or "ForCausalLM"
    return whole


def _learn(model: Any, tokenizer: Any, recipe: TuningRecipe, on_step: Callable[[int, float], None]) -> _Run:
    """Add an adapter to a model, and train it: nothing in here knows whether the model is split."""
    peft = import_peft()
    windows, held_out = (_windows(tokenizer, poems, recipe.length) for poems in sonnets())
    held_out = held_out[:_HELD_OUT_WINDOWS]
    before = _evaluated(model, tokenizer, held_out, recipe)
    torch.manual_seed(recipe.seed)
    adapted = peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=recipe.rank,
            lora_alpha=2 * recipe.rank,
            lora_dropout=recipe.dropout,
            target_modules="all-linear",
            fan_in_fan_out=_has_transposed_weights(model),
        ),
    )
    learning = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=recipe.learning_rate)
    draw = torch.Generator().manual_seed(recipe.seed)
    losses = []
    started = time.perf_counter()
    adapted.train()
    for number in range(1, recipe.steps + 1):
        ids = windows[torch.randint(len(windows), (recipe.batch,), generator=draw)]
        loss = adapted(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learning, recipe.clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        on_step(number, loss.item())
    seconds = time.perf_counter() - started
    adapted.eval()
    after = _evaluated(model, tokenizer, held_out, recipe)
    adapter = {name: value.detach() for name, value in adapted.named_parameters() if value.requires_grad}
    return _Run(losses, [before[0], after[0]], [before[1], after[1]], adapter, seconds, adapted)


def _evaluated(model: Any, tokenizer: Any, windows: torch.Tensor, recipe: TuningRecipe) -> tuple[torch.Tensor, str]:
    """Return the loss on windows, and the generated text."""
    sampling = Sampling(temperature=0.8, top_k=40, seed=recipe.seed)
    text = generate_text(model, tokenizer, recipe.prompt, recipe.max_new_tokens, sampling).text
    with torch.no_grad():
        return model(input_ids=windows, labels=windows, use_cache=False).loss, text


def _windows(tokenizer: Any, poems: Sequence[str], length: int) -> torch.Tensor:
    """Return the poems one after the other, cut into windows: ``[windows, length]``."""
    ids: list[int] = []
    for poem in poems:
        ids.append(tokenizer.eos_token_id)
        # By line: tokenizers warn of texts that are longer than the model's positions.
        for line in poem.splitlines(keepends=True):
            ids += tokenizer(line)["input_ids"]
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


def _has_transposed_weights(model: Any) -> bool:
    """Return whether linear layers keep their weights transposed, as GPT-2's do, which PEFT has to know."""
    from transformers.pytorch_utils import Conv1D

    return any(isinstance(module, Conv1D) for module in model.modules())


def _compare(model: OpenModel, whole: _Run, apart: _Run) -> dict[str, bool]:
    """Compare two trainings; and the unsplit model, given the adapter of the split one by PEFT, with the split one."""
    peft = import_peft()
    ids = torch.arange(32)[None]
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        apart.peft_model.save_pretrained(folder)
        loaded = peft.PeftModel.from_pretrained(_unsplit(model), folder).eval()
        expected = loaded(input_ids=ids, use_cache=False).logits
        actual = apart.peft_model(input_ids=ids, use_cache=False).logits
    names = list(whole.adapter) == list(apart.adapter)
    return {
        "losses": _all_equal(whole.losses, apart.losses),
        "adapters": names and _all_equal(whole.adapter.values(), apart.adapter.values()),
        "held-out losses": _all_equal(whole.held_out, apart.held_out),
        "texts": whole.texts == apart.texts,
        "logits of the unsplit model with the saved adapter": torch.equal(expected, actual),
    }


def _all_equal(left: Any, right: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))
