"""The command line with a GGUF file for a model."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from splitlearn_core.cli.main import main
from splitlearn_core.plugins.registry import registry

Write = Callable[..., Path]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Return a function that runs the command line in this process: exit code, stdout, stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["splitlearn", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        shown = capsys.readouterr()
        return int(end.value.code or 0), shown.out, shown.err

    return run


def test_the_package_is_listed(cli: Callable[..., Any]) -> None:
    """As a strategy that works."""
    rows = {row["name"]: row for row in json.loads(cli("plugins", "--check", "--json")[1])}

    assert (rows["gguf"]["kind"], rows["gguf"]["status"]) == ("strategy", "ready")
    assert rows["gguf"]["distribution"] == "splitlearn-gguf"


def test_a_plan_needs_neither_torch_nor_transformers(gguf_file: Write) -> None:
    """In a fresh process: the header alone."""
    code = (
        "import sys\nfrom splitlearn_core import plan_split\nplan = plan_split(sys.argv[1], (1, 3))\n"
        "print(plan.source, sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, gguf_file("llama", "Q8_0")],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )

    assert done.stdout == "headers []\n", done.stderr


def test_planning_says_what_the_file_holds(gguf_file: Write, cli: Callable[..., Any]) -> None:
    """Bytes as stored; the dtype that they are dequantised to."""
    code, out, _ = cli("plan", gguf_file("gpt2", "Q8_0"), "--split", 1, 3, "--json")
    plan = json.loads(out)

    assert (code, plan["model_type"], plan["dtype"], plan["shards"]) == (0, "gpt2", "float32", ["model.gguf"])
    assert plan["bytes"] < 2 * plan["parameters"]


@pytest.mark.parametrize("model_type", ["gpt2", "qwen2", "gemma3_text"])
def test_verify_compares_with_transformers(gguf_file: Write, cli: Callable[..., Any], model_type: str) -> None:
    """The same file, read by transformers itself."""
    layers = {"num_hidden_layers": 6} if model_type == "gemma3_text" else {}
    code, out, err = cli("verify", gguf_file(model_type, "Q4_0", **layers), "--split", 1, 3)

    assert code == 0, out + err
    assert "equal to the last bit" in out


def test_verify_says_so_where_transformers_cannot(gguf_file: Write, cli: Callable[..., Any]) -> None:
    """Gemma 1: an error of ours, and no traceback."""
    code, out, err = cli("verify", gguf_file("gemma", "Q8_0"), "--split", 1, 3)

    assert (code, out) == (1, "")
    assert "nothing to compare with" in err
    assert "Traceback" not in err


def test_text_by_the_tokenizer_in_the_file(gguf_file: Write, cli: Callable[..., Any]) -> None:
    """No other file is needed to talk to a model."""
    path = gguf_file("qwen2", "Q8_0", vocab_size=257, max_position_embeddings=64)
    arguments = ("generate", path, "--split", 1, 3, "--max-new-tokens", 5, "--prompt", "hello", "--json")
    code, out, err = cli(*arguments)

    if "protobuf" in err:
        pytest.skip("this version of transformers wants protobuf for it")
    assert code == 0, err
    result = json.loads(out)
    assert result["prompt_tokens"] == 5
    assert result["text"].startswith("hello")
    assert result["new_tokens"] >= 1


def test_text_without_a_tokenizer_is_an_error_that_helps(gguf_file: Write, cli: Callable[..., Any]) -> None:
    """A file that holds words but not how they are cut."""
    code, out, err = cli("generate", gguf_file("qwen2"), "--split", 1, 3, "--prompt", "hello")

    assert (code, out) == (1, "")
    assert "holds no tokenizer" in err
    assert "save_pretrained" in err
    assert "Traceback" not in err


def test_a_missing_file_is_an_error_that_helps(tmp_path: Path, cli: Callable[..., Any]) -> None:
    """As for any model."""
    code, _, err = cli("plan", tmp_path / "absent.gguf", "--split", 1, 3)

    assert code == 1
    assert "absent.gguf" in err
    assert "Traceback" not in err


def test_a_family_that_is_not_installed_is_named(
    gguf_file: Write, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The architecture is known, its family is not there."""
    path = gguf_file("llama")
    owner = registry().plugin("llama").entry.distribution
    monkeypatch.setenv("SPLITLEARN_DISABLE_PLUGINS", owner)

    code, _, err = cli("plan", path, "--split", 1, 3)

    assert code == 1
    assert "'llama'" in err
