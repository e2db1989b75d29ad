"""``generate --chat``: the answers equal those of transformers with the checkpoint's own template."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from splitlearn_core import ConfigurationError, SplitCausalLM, load_split_model, save_split
from splitlearn_core.generation import Conversation, Sampling
from support.warm import WarmInterpreter

pytestmark = pytest.mark.libs

SCRIPT = Path(sys.executable).with_name("splitlearn")
SPLIT = ("--split", "2", "4")
NEW_TOKENS = 12
TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role == "tool" -%}{{ raise_exception("there are no tools here") }}{%- endif -%}
<{{ message.role }}>{{ message.content }}<end>
{%- endfor -%}
{%- if add_generation_prompt -%}<assistant>{%- endif -%}"""

Cli = Callable[..., CompletedProcess[str]]


@pytest.fixture(scope="module")
def instructed(talking: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint that has a tokenizer, with a chat template."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("instructed")
    for path in talking.iterdir():
        (folder / path.name).symlink_to(path)
    tokenizer = AutoTokenizer.from_pretrained(talking)
    tokenizer.chat_template = TEMPLATE
    for path in folder.glob("tokenizer*"):
        path.unlink()
    tokenizer.save_pretrained(folder)
    return folder


def expected_answers(folder: Path, messages: list[str], system: str | None = None, **arguments: Any) -> list[str]:
    """What the unsplit model answers to each message, the history before it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    said = [{"role": "system", "content": system}] if system is not None else []
    answers = []
    for message in messages:
        said.append({"role": "user", "content": message})
        encoded = tokenizer.apply_chat_template(said, add_generation_prompt=True, return_dict=True, return_tensors="pt")
        output = model.generate(
            **encoded, max_new_tokens=NEW_TOKENS, pad_token_id=0, **{"do_sample": False, **arguments}
        )
        answers.append(tokenizer.decode(output[0][encoded["input_ids"].shape[1] :], skip_special_tokens=True))
        said.append({"role": "assistant", "content": answers[-1]})
    return answers


def piped(warm: WarmInterpreter, folder: Path, text: str, *options: str) -> CompletedProcess[str]:
    return subprocess.run(
        [warm.path, SCRIPT, "generate", folder, *SPLIT, "--chat", "--max-new-tokens", str(NEW_TOKENS), *options],
        input=text, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip


@pytest.mark.parametrize("system", [None, "be brief"], ids=["no system", "system"])
def test_one_turn(command: Cli, instructed: Path, system: str | None) -> None:
    """``--prompt`` is one message; the text is the answer alone."""
    options = ("--system", system) if system is not None else ()
    arguments = ("generate", instructed, *SPLIT, "--chat", "--max-new-tokens", NEW_TOKENS, *options)
    result = command(*arguments, "--prompt", "hello", "--json")
    answer = json.loads(result.stdout)
    assert result.returncode == 0
    assert set(answer) == {"prompt", "text", "prompt_tokens", "new_tokens", "seconds", "tokens_per_second"}
    assert [answer["text"]] == expected_answers(instructed, ["hello"], system)
    assert answer["prompt"] == "hello"
    shown = command(*arguments, "--prompt", "hello")
    assert shown.stdout == answer["text"] + "\n"


def test_over_pipes(warm: WarmInterpreter, instructed: Path) -> None:
    """Each line is a message, empty ones say nothing; stdout is the answers alone, each ended by a line end."""
    expected = expected_answers(instructed, ["hello", "and you?"])
    text = "hello\n\n  \nand you?"
    result = piped(warm, instructed, text)
    assert (result.returncode, result.stdout, result.stderr) == (0, "".join(f"{each}\n" for each in expected), "")
    data = json.loads(piped(warm, instructed, text, "--json").stdout)
    assert [turn["text"] for turn in data["turns"]] == expected
    assert [message["role"] for message in data["messages"]] == ["user", "assistant"] * 2
    assert [message["content"] for message in data["messages"]] == ["hello", expected[0], "and you?", expected[1]]


def test_nothing_to_say(warm: WarmInterpreter, instructed: Path) -> None:
    """An empty stdin is a conversation of no messages."""
    assert (piped(warm, instructed, "").stdout, piped(warm, instructed, "").returncode) == ("", 0)
    assert json.loads(piped(warm, instructed, "", "--json").stdout) == {"messages": [], "turns": []}


def test_without_a_template(command: Cli, talking: Path) -> None:
    """It is an error before weights are read, and says what is missing."""
    result = command("generate", talking, *SPLIT, "--chat", "--prompt", "x")
    assert (result.returncode, result.stdout) == (1, "")
    assert "has no chat template" in result.stderr
    assert "chat_template.jinja" in result.stderr


def test_saved_components_talk_too(command: Cli, instructed: Path, tmp_path: Path) -> None:
    """The template goes along with the components."""
    save_split(instructed, tmp_path / "parts", (2, 4))
    arguments = ("--chat", "--prompt", "hello", "--max-new-tokens", NEW_TOKENS, "--json")
    answer = json.loads(command("generate", tmp_path / "parts", *arguments).stdout)
    assert [answer["text"]] == expected_answers(instructed, ["hello"])


class TestConversation:
    @pytest.fixture
    def tokenizer(self, instructed: Path) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(instructed)

    @pytest.fixture
    def model(self, instructed: Path) -> SplitCausalLM:
        return SplitCausalLM(*load_split_model(instructed, (2, 4)))

    def test_stop_strings_and_draws(self, model: SplitCausalLM, tokenizer: Any, instructed: Path) -> None:
        """As ``generate`` of transformers with the same arguments, over several turns and with one seed."""
        import torch

        messages = ["hello", "and you?"]
        drawing = {"do_sample": True, "temperature": 1.5, "top_k": 50, "top_p": 0.9}
        torch.manual_seed(3)
        drawn = expected_answers(instructed, messages, **drawing)
        talk = Conversation(model, tokenizer, NEW_TOKENS, Sampling(1.5, 50, 0.9, seed=3))
        assert [talk.answer(message).text for message in messages] == drawn

        stop = next(letter for letter in drawn[0] if letter.isascii())
        torch.manual_seed(3)
        stopped = expected_answers(instructed, messages, **drawing, stop_strings=[stop], tokenizer=tokenizer)
        assert stopped[0].endswith(stop)
        talk = Conversation(model, tokenizer, NEW_TOKENS, Sampling(1.5, 50, 0.9, seed=3, stop=(stop,)))
        assert [talk.answer(message).text for message in messages] == stopped

    def test_stopped(self, model: SplitCausalLM, tokenizer: Any, instructed: Path) -> None:
        """An answer that is stopped is what was said so far, and stays in the history."""
        talk = Conversation(model, tokenizer, NEW_TOKENS)
        asked: list[None] = []
        turn = talk.answer("hello", is_stopped=lambda: asked.append(None) or len(asked) == 3)
        assert turn.new_tokens == 3
        assert talk.messages[-1] == {"role": "assistant", "content": turn.text}

    def test_what_fails_leaves_no_message(self, model: SplitCausalLM, tokenizer: Any) -> None:
        """A refused message is not part of the history."""
        talk = Conversation(model, tokenizer, 1000)
        with pytest.raises(ConfigurationError, match="positions"):
            talk.answer("hello")
        assert talk.messages == []
        with pytest.raises(ConfigurationError, match="not valid text"):
            talk.answer("\udcff")
        talk.messages = [{"role": "tool", "content": "x"}]
        with pytest.raises(ConfigurationError, match="there are no tools here"):
            talk.answer("hello")
        assert len(talk.messages) == 1

    @pytest.mark.parametrize("sampling", [{"temperature": -1.0}, {"temperature": float("nan")}, {"stop": ("",)}])
    def test_sampling_that_is_none(self, sampling: dict[str, Any]) -> None:
        """It is refused when it is made."""
        with pytest.raises(ConfigurationError):
            Sampling(**sampling)


def test_at_a_terminal(instructed: Path, tmp_path: Path) -> None:
    """There is a prompt; Ctrl-C stops an answer and no more, Ctrl-D ends with success."""
    # An answer that is still being given when Ctrl-C comes, however late that is.
    for path in instructed.iterdir():
        (tmp_path / path.name).symlink_to(path)
    config = json.loads((instructed / "config.json").read_text())
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 100_000}))
    process, screen = pty.fork()
    if process == 0:
        # Text is written up to its last space, and the likeliest tokens of random weights may never be one.
        sampling = ("--temperature", "100", "--top-k", "0", "--seed", "1")
        os.execve(  # the child never returns
            SCRIPT,
            [str(SCRIPT), "generate", str(tmp_path), *SPLIT, "--chat", "--max-new-tokens", "50000", *sampling],
            {**os.environ, "TERM": "dumb"},
        )
    seen = b""

    def wait_for(pattern: bytes) -> None:
        nonlocal seen
        while not (found := re.search(pattern, seen, re.DOTALL)):
            assert select.select([screen], [], [], 120)[0], seen
            try:
                seen += os.read(screen, 4096)
            except OSError:  # how a terminal says that its other side is closed
                raise AssertionError(seen) from None
        seen = seen[found.end() :]

    try:
        wait_for(b"> ")
        os.write(screen, b"hello\n")
        wait_for(b"hello\r\n.")  # the first of the answer
        os.write(screen, b"\x03")
        wait_for(b"\\(stopped\\)")
        wait_for(b"> ")
        os.write(screen, b"\x04")
        _, status = os.waitpid(process, 0)
    except BaseException:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        raise
    finally:
        os.close(screen)
    assert os.waitstatus_to_exitcode(status) == 0
