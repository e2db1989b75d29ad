"""What the cross-package tests share: checkpoints, a Hub on loopback, and processes that cannot leave the machine."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

from splitlearn_core.testing.worlds import tiny_model, write_checkpoint
from support.hub import LoopbackHub
from support.warm import WarmInterpreter

#: Nothing listens on the discard port: whoever tries to reach the world through it is refused.
DEAD_PROXY = "http://127.0.0.1:9"
#: Bytes of a shard: about one layer of the tiny models.
SHARD_BYTES = 40_000


@pytest.fixture(scope="session", autouse=True)
def quiet_progress_bars() -> None:
    """Saving a model draws bars that the tests of output must not see."""
    from transformers.utils import logging

    logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def own_world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Give each test a home of its own, and no variable of the user's that would change its outcome."""
    for name in list(os.environ):
        foreign = ("HF_", "HUGGING", "TRANSFORMERS_", "SPLITLEARN_", "PIP_", "FORCE_COLOR", "NO_COLOR", "PYTHONPATH")
        if name.lower().endswith("_proxy") or name.startswith(foreign):
            monkeypatch.delenv(name)
    home = tmp_path / "home"
    for name in ("HF_HOME", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.setenv(name, str(home))
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, DEAD_PROXY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))


@pytest.fixture(scope="session")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A qwen2 of six layers in six shards; three cuts put different shards into each component."""
    model = tiny_model("qwen2", tie_word_embeddings=False)
    # A setting that changes what `generate` does: nothing else in the test says how many tokens to add.
    model.generation_config.max_length = None
    model.generation_config.max_new_tokens = 7
    folder = write_checkpoint(tmp_path_factory.mktemp("sharded"), model, max_shard_size=SHARD_BYTES)
    assert len(list(folder.glob("*.safetensors"))) >= 5
    return folder


@pytest.fixture(scope="session")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model in one file, longer than what the Hub's client fetches to read a header."""
    folder = write_checkpoint(
        tmp_path_factory.mktemp("single"), tiny_model("qwen2", tie_word_embeddings=False, num_hidden_layers=8)
    )
    assert (folder / "model.safetensors").stat().st_size > 200_000
    return folder


@pytest.fixture(scope="session")
def talking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded checkpoint with a tokenizer that gives each byte a token."""
    folder = tmp_path_factory.mktemp("talking")
    model = tiny_model("qwen2", vocab_size=257, max_position_embeddings=256)
    write_checkpoint(folder, model, max_shard_size=SHARD_BYTES)
    save_byte_tokenizer(folder)
    return folder


def save_byte_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)


@pytest.fixture
def point_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Make this process use an endpoint, as ``HF_ENDPOINT`` does at start-up; other processes get the variable.

    The client reads both constants from its module at every call, so setting them is what the
    variable would have done.
    """

    def point_at(endpoint: str) -> None:
        huggingface_hub.close_session()
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)

    return point_at


@pytest.fixture
def hub(point_at: Callable[[str], None]) -> Iterator[LoopbackHub]:
    """An empty Hub on loopback, which is the Hub for this process and for all that it starts."""
    with LoopbackHub() as hub:
        point_at(hub.endpoint)
        yield hub
        huggingface_hub.close_session()


@pytest.fixture
def process() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a Python process with this interpreter; keyword arguments are environment variables."""

    return _running(sys.executable)


@pytest.fixture
def warm_process(warm: WarmInterpreter) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run an interpreter that has imported torch and transformers: where the start of a process is not the subject."""
    return _running(warm.path)


def _running(interpreter: object) -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [str(part) for part in (interpreter, *arguments)]
        env = {**os.environ, **environment}
        return subprocess.run(
            command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=False
        )

    return run


@pytest.fixture
def cli(warm_process: Callable[..., Any]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the console script of this interpreter's environment, in a warm interpreter."""

    def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        return warm_process(Path(sys.executable).with_name("splitlearn"), *arguments, **environment)

    return run


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    """Run the command line in this process: for what a command answers, where the process itself is not in question.

    It spares the imports of torch and transformers, which are most of what a short process does.
    """
    from splitlearn_core.cli.main import main
    from splitlearn_core.plugins.registry import reset_registry

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        # As a process has them: text over bytes, and neither is a terminal.
        out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
        reset_registry()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["splitlearn", *map(str, arguments)])
            patch.setattr(sys, "stdout", out)
            patch.setattr(sys, "stderr", err)
            with pytest.raises(SystemExit) as end:
                main()
        texts = [stream.buffer.getvalue().decode() for stream in (out, err)]
        return subprocess.CompletedProcess(sys.argv, int(end.value.code or 0), *texts)

    yield run
    reset_registry()
