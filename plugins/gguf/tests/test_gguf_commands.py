"""The command line with a GGUF file for a model."""

from __future__ import annotations

import json
import os
import shutil
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
    assert "cannot use the tokenizer" in err
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


@pytest.fixture
def talking(gguf_file: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with a tokenizer that this transformers can make, and a cache of its own."""
    from splitlearn_core import CheckpointError
    from splitlearn_core.generation import load_tokenizer
    from splitlearn_core.loading.opening import open_model

    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    path = gguf_file("qwen2", "Q8_0", vocab_size=257, max_position_embeddings=64)
    try:
        load_tokenizer(open_model(path))
    except CheckpointError as error:
        if "protobuf" in str(error):
            pytest.skip("this version of transformers wants protobuf for it")
        raise
    return path


def tokens(path: Path, stages: list[str]) -> Any:
    from splitlearn_core.generation import load_tokenizer
    from splitlearn_core.loading.opening import open_model

    tokenizer = load_tokenizer(open_model(path), lambda said: stages.append(said.stage))
    ids = tokenizer("hello there, <3> you")["input_ids"]
    return ids, tokenizer.decode(ids), tokenizer.eos_token, tokenizer.bos_token, len(tokenizer), tokenizer.chat_template


def test_a_tokenizer_is_converted_once(talking: Path) -> None:
    """The second time it comes from the disk, and is the same; another file is another tokenizer."""
    from splitlearn_core.tokenization import cache_folder

    (entry,) = cache_folder().iterdir()
    stages: list[str] = []
    kept = tokens(talking, stages)
    assert stages == []

    shutil.rmtree(entry)
    assert tokens(talking, stages) == kept
    assert stages == ["converting"]
    assert [path.name for path in cache_folder().iterdir()] == [entry.name]

    os.utime(talking, ns=(1, 1))
    assert tokens(talking, stages) == kept
    assert stages == ["converting"] * 2


@pytest.mark.parametrize("damage", ["cut short", "gone", "no digests", "other digests"])
def test_a_damaged_tokenizer_is_made_again(talking: Path, damage: str) -> None:
    """Whatever is wrong with the entry, the answer is the file's."""
    from splitlearn_core.tokenization import cache_folder

    (entry,) = cache_folder().iterdir()
    expected = tokens(talking, [])
    if damage == "cut short":
        content = (entry / "tokenizer.json").read_bytes()
        (entry / "tokenizer.json").write_bytes(content[:-50])
    elif damage == "gone":
        (entry / "tokenizer.json").unlink()
    elif damage == "no digests":
        (entry / "digests.json").unlink()
    else:
        (entry / "digests.json").write_text("[")

    stages: list[str] = []
    assert tokens(talking, stages) == expected
    assert stages == ["converting"]
    stages.clear()
    assert tokens(talking, stages) == expected
    assert stages == []


def test_a_cache_that_cannot_be_written_is_no_error(
    talking: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The tokenizer is there all the same, and the log says that it is not cached."""
    expected = tokens(talking, [])
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "file"))

    assert tokens(talking, []) == expected
    assert "not cached" in caplog.text


def test_a_split_keeps_the_tokenizer(talking: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    """What generate has just used goes with bottom and top, and saved components answer as the file does."""
    prompt = ("--max-new-tokens", 5, "--prompt", "hello", "--json")
    code, _, err = cli("split", talking, "--split", 1, 3, "--dtype", "float32", "--out", tmp_path / "split")
    assert code == 0, err

    assert (tmp_path / "split" / "bottom" / "tokenizer.json").is_file()
    assert (tmp_path / "split" / "top" / "tokenizer_config.json").is_file()
    assert not list((tmp_path / "split" / "trunk").glob("tokenizer*"))
    saved = json.loads(cli("generate", tmp_path / "split", *prompt)[1])
    whole = json.loads(cli("generate", talking, "--split", 1, 3, *prompt)[1])
    assert saved["text"] == whole["text"]
