"""Tokenizers and text generation for the command line."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from splitlearn_core.checkpoint.files import TOKENIZER_FILES, TOKENIZER_PREFIXES
from splitlearn_core.errors import CheckpointError, ConfigurationError, MissingFileError, SplitLearnError, translate
from splitlearn_core.loading.opening import OpenModel
from splitlearn_core.quoting import reason, said
from splitlearn_core.tokenization import load_converted
from splitlearn_core.types import ProgressCallback

if TYPE_CHECKING:
    import torch

    from splitlearn_core.pipeline import SplitCausalLM

_HINT = "save it next to the weights: AutoTokenizer.from_pretrained(...).save_pretrained(DIR)"


@dataclass(frozen=True, slots=True)
class Generation:
    """A generated text, and how long it took."""

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
    """Return whether the checkpoint has a tokenizer."""
    return any(name in model.checkpoint.source.files() for name in TOKENIZER_FILES)


def tokenizer_files(model: OpenModel) -> list[str]:
    """Return the names of the files that transformers may read for the tokenizer."""
    return [name for name in model.checkpoint.source.files() if name.startswith(TOKENIZER_PREFIXES)]


def load_tokenizer(model: OpenModel, progress: ProgressCallback = lambda _: None) -> Any:
    """Load the checkpoint's tokenizer, from files next to the weights or from a weight file.

    Args:
        model: The checkpoint.
        progress: Called if the tokenizer must first be converted from a weight file, which takes many seconds.

    Raises:
        MissingFileError: The checkpoint has none.
        CheckpointError: transformers cannot use it.
    """
    inside: Mapping[str, Any] | None = None
    source = model.checkpoint.source
    if has_tokenizer(model):
        for name in tokenizer_files(model):
            source.path(name)
    elif (inside := model.checkpoint.pretrained_arguments()) is None:
        raise MissingFileError(
            f"{model.name} has no tokenizer (none of {', '.join(TOKENIZER_FILES)})",
            hint=_HINT,
        )
    from transformers import AutoTokenizer

    from splitlearn_core.build.configuration import hf_config

    # transformers builds it from untrusted files, and may raise anything.
    with translate(
        lambda error: CheckpointError(
            f"transformers cannot use the tokenizer of {model.name}: {said(error)}", hint=_HINT
        )
    ):
        if inside is not None:
            return load_converted(
                model.checkpoint.path_with_header(model.checkpoint.weight_files()[0]), dict(inside), progress
            )
        # Passed, because transformers would otherwise report an invalid value in config.json as one of the tokenizer.
        config = hf_config(model.family, model.config, source.model, "float32")
        return AutoTokenizer.from_pretrained(model.checkpoint.folder, config=config, local_files_only=True)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen, and which texts stop generation."""

    #: 0 always takes the likeliest token; above 0, tokens are sampled.
    temperature: float = 0.0
    #: Sample from this many likeliest tokens.
    top_k: int = 50
    #: Sample from the likeliest tokens whose probabilities add up to this.
    top_p: float = 1.0
    #: Makes sampling repeatable.
    seed: int | None = None
    #: Texts after which generation stops; they are part of the output.
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ConfigurationError(
                f"temperature {self.temperature} is not a number of 0 or more", hint="0 takes the likeliest token"
            )
        if "" in self.stop:
            raise ConfigurationError("an empty stop text stops nothing", hint="leave --stop out, or give it a text")

    def arguments(self, tokenizer: Any) -> dict[str, Any]:
        """Return this as arguments of ``generate``."""
        stopping = {"stop_strings": list(self.stop), "tokenizer": tokenizer} if self.stop else {}
        if self.temperature == 0:
            return {"do_sample": False, **stopping}
        sampling = {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
        return {"do_sample": True, **sampling, **stopping}


def generate_text(
    model: SplitCausalLM,
    tokenizer: Any,
    prompt: str,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    *,
    on_text: Callable[[str], None] | None = None,
) -> Generation:
    """Continue a prompt, and stream the text.

    Args:
        model: The components, joined.
        tokenizer: The tokenizer of the checkpoint.
        prompt: The text to continue.
        max_new_tokens: The maximum number of tokens to add.
        sampling: How they are chosen.
        on_text: Called with each piece of text, the prompt first.

    Raises:
        ConfigurationError: The prompt is empty, or the text would not fit the model.
        CheckpointError: The model's own code fails, most likely on a value of its configuration.
    """
    from splitlearn_core.build.torch_state import own_state

    _check_text(prompt)
    with own_state(gradients=False):
        encoded = tokenizer(prompt, return_tensors="pt")
    streamer = _streamer(tokenizer, on_text, skip_prompt=False) if on_text else None
    output, seconds = _generate(model, tokenizer, encoded, max_new_tokens, sampling, streamer)
    length = encoded["input_ids"].shape[1]
    text = tokenizer.decode(output, skip_special_tokens=True)
    return Generation(prompt, text, length, len(output) - length, seconds)


class Conversation:
    """Messages of a user and a model, formatted with the checkpoint's chat template.

    Args:
        model: The components, joined.
        tokenizer: The tokenizer of the checkpoint.
        max_new_tokens: The maximum number of tokens of an answer.
        sampling: How they are chosen; the seed is used once, for the first answer.
        system: The system message; None for none.

    Raises:
        ConfigurationError: The tokenizer has no chat template.
    """

    def __init__(
        self,
        model: SplitCausalLM,
        tokenizer: Any,
        max_new_tokens: int,
        sampling: Sampling = Sampling(),
        *,
        system: str | None = None,
    ) -> None:
        check_chat_template(tokenizer)
        self._model, self._tokenizer = model, tokenizer
        self._max_new_tokens, self._sampling = max_new_tokens, sampling
        #: The messages so far.
        self.messages: list[dict[str, str]] = [{"role": "system", "content": system}] if system is not None else []

    def answer(
        self,
        text: str,
        *,
        on_text: Callable[[str], None] | None = None,
        is_stopped: Callable[[], bool] = lambda: False,
    ) -> Generation:
        """Answer a message, and stream the answer.

        Args:
            text: The message.
            on_text: Called with each piece of the answer.
            is_stopped: Called after each token; the answer ends when it returns True.

        Returns:
            Its ``text`` is only the answer, its ``prompt`` the message.

        Raises:
            ConfigurationError: The message is empty, the conversation would not fit the model, or the template
                refuses it. The message is then not added.
            CheckpointError: The model's own code fails.
        """
        _check_text(text)
        messages = [*self.messages, {"role": "user", "content": text}]
        encoded = self._encoded(messages)
        streamer = _streamer(self._tokenizer, on_text, skip_prompt=True) if on_text else None
        output, seconds = _generate(
            self._model, self._tokenizer, encoded, self._max_new_tokens, self._sampling, streamer, is_stopped
        )
        self._sampling = replace(self._sampling, seed=None)
        length = encoded["input_ids"].shape[1]
        answer = self._tokenizer.decode(output[length:], skip_special_tokens=True)
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        return Generation(text, answer, length, len(output) - length, seconds)

    def _encoded(self, messages: list[dict[str, str]]) -> Any:
        from splitlearn_core.build.torch_state import own_state

        # A template is a program: it may raise anything, for example on an unknown role.
        with (
            translate(
                lambda error: ConfigurationError(
                    f"the chat template refuses the conversation: {said(error)}",
                    hint="leave --system out, if the template has no such role; or generate without --chat",
                )
            ),
            own_state(gradients=False),
        ):
            return self._tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
            )


def check_chat_template(tokenizer: Any) -> None:
    """Refuse a tokenizer without a chat template; raises ConfigurationError."""
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigurationError(
            "the tokenizer has no chat template: the model is not for conversations, or its template is missing",
            hint="leave --chat out to continue a text, or put the model's chat_template.jinja next to its tokenizer",
        )


def _check_text(text: str) -> None:
    with translate(
        lambda error: ConfigurationError(
            f"the prompt is not valid text: {reason(error)}", hint="set a UTF-8 locale, or PYTHONUTF8=1, and retype it"
        ),
        UnicodeEncodeError,
    ):
        text.encode()


def _generate(
    model: SplitCausalLM,
    tokenizer: Any,
    encoded: Any,
    max_new_tokens: int,
    sampling: Sampling,
    streamer: Any,
    is_stopped: Callable[[], bool] | None = None,
) -> tuple[torch.Tensor, float]:
    """Return the tokens of prompt and continuation, and the seconds that the generation took."""
    import torch

    from splitlearn_core.build.torch_state import own_state

    _check_length(model, encoded["input_ids"].shape[1], max_new_tokens)
    if sampling.seed is not None:
        torch.manual_seed(sampling.seed)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    started = time.perf_counter()
    with own_state(gradients=False), _model_errors():
        output = model.generate(
            input_ids=encoded["input_ids"].to(model.device),
            attention_mask=encoded["attention_mask"].to(model.device),
            max_new_tokens=max_new_tokens,
            pad_token_id=pad,
            streamer=streamer,
            stopping_criteria=_stopping(is_stopped) if is_stopped else None,
            **sampling.arguments(tokenizer),
        )
    return output[0], time.perf_counter() - started


def _stopping(is_stopped: Callable[[], bool]) -> Any:
    import torch
    from transformers import StoppingCriteria, StoppingCriteriaList

    class Stopped(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            return torch.full((input_ids.shape[0],), is_stopped(), device=input_ids.device)

    return StoppingCriteriaList([Stopped()])


def _model_errors() -> AbstractContextManager[None]:
    """Raise any error of the model's own code as a CheckpointError; errors of writing the text pass."""
    # The code reads values of the configuration that nothing checks.
    return translate(
        lambda error: CheckpointError(
            f"the model fails in transformers: {said(error)}",
            hint="check the values of config.json; splitlearn verify shows whether the unsplit model fails likewise",
        ),
        unchanged=(SplitLearnError, OSError),
    )


def _check_length(model: SplitCausalLM, length: int, new_tokens: int) -> None:
    if length == 0:
        raise ConfigurationError("the prompt has no tokens", hint="give at least one word")
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit is not None and length + new_tokens > limit:
        raise ConfigurationError(
            f"{length} prompt tokens and {new_tokens} new ones are more than the {limit} positions of the model",
            hint=f"request at most {max(limit - length, 0)} new tokens, or shorten the prompt",
        )


def _streamer(tokenizer: Any, on_text: Callable[[str], None], *, skip_prompt: bool) -> Any:
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            on_text(text)

    return Streamer(tokenizer, skip_prompt=skip_prompt, skip_special_tokens=True)
