"""Tokenizer and text generation for people at a command line."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from splitlearn_core.errors import CheckpointError, ConfigurationError, MissingFileError, SplitLearnError
from splitlearn_core.loading import OpenModel
from splitlearn_core.quoting import reason, said
from splitlearn_core.tokenization import load_converted
from splitlearn_core.types import ProgressCallback

if TYPE_CHECKING:
    from splitlearn_core.pipeline import SplitCausalLM

_HINT = "save it beside the weights: AutoTokenizer.from_pretrained(...).save_pretrained(DIR)"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_TOKENIZER_NAMES = ("tokenizer", "vocab", "merges", "special_tokens", "added_tokens", "spiece", "chat_template")


@dataclass(frozen=True, slots=True)
class Generation:
    """What was generated, and how fast."""

    prompt: str
    text: str
    prompt_tokens: int
    new_tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.new_tokens / self.seconds if self.seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "tokens_per_second": self.tokens_per_second}


def has_tokenizer(model: OpenModel) -> bool:
    """Say whether the checkpoint carries a tokenizer."""
    return any(name in model.checkpoint.source.files() for name in _TOKENIZER_FILES)


def tokenizer_files(model: OpenModel) -> list[str]:
    """Return the names of the files that a tokenizer may be made of."""
    return [name for name in model.checkpoint.source.files() if name.startswith(_TOKENIZER_NAMES)]


def load_tokenizer(model: OpenModel, progress: ProgressCallback = lambda _: None) -> Any:
    """Load the checkpoint's own tokenizer: one of the files beside the weights, or one in a weight file.

    Args:
        model: The checkpoint.
        progress: Told where the tokenizer has to be made of a weight file first, which takes many seconds.

    Raises:
        MissingFileError: The checkpoint has none.
        CheckpointError: The one it has is of no use.
    """
    inside: Mapping[str, Any] | None = None
    source = model.checkpoint.source
    if has_tokenizer(model):
        for name in tokenizer_files(model):
            source.path(name)
    elif (inside := model.checkpoint.pretrained_arguments()) is None:
        raise MissingFileError(
            f"{model.name} has no tokenizer (none of {', '.join(_TOKENIZER_FILES)})",
            hint=_HINT,
        )
    from transformers import AutoTokenizer

    try:
        if inside is not None:
            return load_converted(source.path(model.checkpoint.weight_files()[0]), dict(inside), progress)
        return AutoTokenizer.from_pretrained(model.checkpoint.folder, local_files_only=True)
    # transformers rebuilds it from what files say, and raises whatever comes of that.
    except Exception as error:
        raise CheckpointError(
            f"{model.name} holds no tokenizer that transformers can use: {said(error)}", hint=_HINT
        ) from error


def generate_text(
    model: SplitCausalLM,
    tokenizer: Any,
    prompt: str,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int = 50,
    top_p: float = 1.0,
    seed: int | None = None,
    on_text: Callable[[str], None] | None = None,
) -> Generation:
    """Continue a prompt, handing the text on as it comes.

    Args:
        model: Bottom, trunk and top.
        tokenizer: The checkpoint's.
        prompt: The text to continue.
        max_new_tokens: How many tokens to add at most.
        temperature: 0 for the likeliest token each time; above, tokens are drawn.
        top_k: Draw from so many likeliest tokens.
        top_p: Draw from the likeliest tokens that make up this probability.
        seed: Makes draws repeatable.
        on_text: Called with each piece of text, the prompt first.

    Raises:
        ConfigurationError: The prompt is empty, the text would not fit the model, or the temperature
            is no number from 0.
        CheckpointError: The model's own code fails, on a value of its configuration most likely.
    """
    import torch

    from splitlearn_core.build.modes import own_state

    if not (math.isfinite(temperature) and temperature >= 0):
        raise ConfigurationError(f"temperature {temperature} is no number from 0", hint="0 takes the likeliest token")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ConfigurationError(
            f"the prompt is no text: {reason(error)}", hint="set a UTF-8 locale, or PYTHONUTF8=1, before you type it"
        ) from error
    with own_state(gradients=False):
        encoded = tokenizer(prompt, return_tensors="pt").to(model.device)
    length = encoded["input_ids"].shape[1]
    _check_length(model, length, max_new_tokens)
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    if seed is not None:
        torch.manual_seed(seed)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    started = time.perf_counter()
    with own_state(gradients=False), _blaming_config():
        output = model.generate(
            input_ids=encoded["input_ids"],
            attention_mask=encoded["attention_mask"],
            max_new_tokens=max_new_tokens,
            pad_token_id=pad,
            streamer=_streamer(tokenizer, on_text) if on_text else None,
            **sampling,
        )
    seconds = time.perf_counter() - started
    text = tokenizer.decode(output[0], skip_special_tokens=True)
    return Generation(prompt, text, length, output.shape[1] - length, seconds)


@contextmanager
def _blaming_config() -> Iterator[None]:
    """Say that the model's own code fails on its configuration; what fails where the text is shown is not meant."""
    try:
        yield
    except (SplitLearnError, OSError):
        raise
    # It meets values that no check of a configuration looks at, and may raise anything.
    except Exception as error:
        raise CheckpointError(
            f"the model fails in transformers: {said(error)}",
            hint="check the values of config.json; splitlearn verify says whether the unsplit model fails likewise",
        ) from error


def _check_length(model: SplitCausalLM, length: int, new_tokens: int) -> None:
    if length == 0:
        raise ConfigurationError("the prompt has no tokens", hint="give at least one word")
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and length + new_tokens > limit:
        raise ConfigurationError(
            f"{length} tokens of prompt and {new_tokens} new ones are more than the {limit} positions of the model",
            hint=f"ask for at most {max(limit - length, 0)} new tokens, or shorten the prompt",
        )


def _streamer(tokenizer: Any, on_text: Callable[[str], None]) -> Any:
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            on_text(text)

    return Streamer(tokenizer, skip_special_tokens=True)
