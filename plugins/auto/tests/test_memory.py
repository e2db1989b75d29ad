"""What is kept about a model type on disk: read back as it was, or not used; never half of it."""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from splitlearn_auto import memory
from splitlearn_auto.answers import Answer, UnprovenSetting, answer_from
from splitlearn_auto.memory import cache_folder, recall, remember
from splitlearn_core import InvalidSplitError, ModelFamily
from splitlearn_core.extension import split_layers

LLAMA = Answer({"model_type": "llama", "architecture": "LlamaForCausalLM"})
REFUSED = Answer(refusal="llama cannot be split", hint="use another")
#: Every kind of value that a family has.
FULL: dict[str, Any] = {
    "model_type": "llama",
    "architecture": "LlamaForCausalLM",
    "norm": "",
    "skip_outside_top": ("decoder.project_out",),
    "bottom_arguments": (),
    "enter_at_layers": True,
    "renamed": (("embed_out.", "lm_head."), (".a", ".b")),
    "config_names": {"hidden_size": "n_embd"},
    "required_values": {"num_kv_shared_layers": 0},
    "joined_layers": {"indexer_types": ("shared",)},
    "config_defaults": {"num_hidden_layers": 12, "head_dim": None, "tie_word_embeddings": True},
    "tiny_config": {"layer_types": ["full", "sliding"], "rope": {"factor": 2.0}},
}


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the empty folder of a cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(memory, "_warned", set())
    return tmp_path / "cache" / "splitlearn" / "families"


def the_file(kept: Path) -> Path:
    (path,) = kept.iterdir()
    return path


def values_of(family: ModelFamily) -> dict[str, Any]:
    return {name: getattr(family, name) for name in FULL}


@pytest.mark.parametrize("fields", [LLAMA.fields, FULL], ids=["plain", "full"])
def test_a_family_comes_back_as_it_was(fields: dict[str, Any]) -> None:
    """Tuples as tuples, lists as lists; the file is JSON."""
    remember("llama", Answer(fields))
    answer = recall("llama")

    assert answer is not None
    assert answer.fields == fields
    assert values_of(answer.family) == values_of(ModelFamily(**fields))
    assert recall("mistral") is None


def test_a_refusal_is_kept_too() -> None:
    remember("llama", REFUSED)
    assert recall("llama") == REFUSED


def test_unproven_settings_allow_no_cut() -> None:
    """With other values than the proven ones; a value that config.json omits, or has as null, is a proven one."""
    setting = UnprovenSetting({"bias": True, "window": 4}, {"bias": False, "window": None}, "with a bias it differs")
    remember("llama", Answer(LLAMA.fields, (setting,)))
    answer = recall("llama")
    assert answer is not None
    assert answer.unproven == (setting,)
    family = answer.family
    proven: tuple[dict[str, Any], ...] = ({}, {"bias": False}, {"window": None})
    for config in proven:
        assert len(split_layers(family, {"num_hidden_layers": 6, **config}, (2, 4))) == 3
    unproven: tuple[dict[str, Any], ...] = ({"bias": True}, {"window": 4096})
    for config in unproven:
        with pytest.raises(InvalidSplitError, match="no cut before layer 2: with a bias it differs"):
            split_layers(family, {"num_hidden_layers": 6, **config}, (2, 4))


def rewritten(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """Return a function that changes the content of a file, and makes its checksum right again."""

    def apply(path: Path) -> None:
        content = json.loads(path.read_text())
        change(content)
        content.pop("sha256", None)
        path.write_text(json.dumps({**content, "sha256": memory._digest(content)}))

    return apply


def replaced_by_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def replaced_by_a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-20]),
    "no JSON": lambda path: path.write_bytes(b"\x80\x04K\x01."),
    "another JSON": lambda path: path.write_text("[1]"),
    "too long": lambda path: path.write_bytes(b" " * 2**19),
    "one letter": lambda path: path.write_text(path.read_text().replace("LlamaForCausalLM", "LlamaForCausalLN")),
    "a folder": replaced_by_a_folder,
    "a pipe": replaced_by_a_pipe,
    "no checksum": lambda path: path.write_text(
        json.dumps({name: value for name, value in json.loads(path.read_text()).items() if name != "sha256"})
    ),
    "the future": rewritten(lambda content: content.update(format=2)),
    "another type": rewritten(lambda content: content["key"].update(model_type="mistral")),
    "other versions": rewritten(lambda content: content["key"].update(torch="1.0")),
    "no answer": rewritten(lambda content: content.pop("answer")),
    "a family of another type": rewritten(lambda content: content["answer"]["family"].update(model_type="mistral")),
    "an unknown field": rewritten(lambda content: content["answer"]["family"].update(colour="red")),
    "a field of another kind": rewritten(lambda content: content["answer"]["family"].update(renamed="a")),
    "a module to import": rewritten(lambda content: content["answer"]["family"].update(architecture="os:system")),
    "a package to read": rewritten(lambda content: content["answer"]["family"].update(bundled_checkpoint="os:.")),
    "both": rewritten(lambda content: content["answer"].update(refusal="it cannot be split")),
    "neither": rewritten(lambda content: content["answer"].update(family={})),
    "a wrong setting": rewritten(lambda content: content["answer"].update(unproven=[{"values": 1}])),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_file_that_is_not_valid_is_not_used(kept: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    """One warning says so; the next answer replaces it."""
    remember("llama", LLAMA)
    DAMAGE[name](the_file(kept))

    with caplog.at_level(logging.WARNING):
        assert recall("llama") is None
        assert recall("llama") is None

    assert [record.message.partition(":")[0] for record in caplog.records] == [
        "what is kept about model type 'llama' is not used, and it is examined again"
    ]
    if name != "a folder":
        remember("llama", LLAMA)
        assert recall("llama") == LLAMA


@pytest.mark.parametrize("library", ["transformers", "torch", "splitlearn-core", "splitlearn-auto"])
def test_other_versions_have_answers_of_their_own(library: str, monkeypatch: pytest.MonkeyPatch, kept: Path) -> None:
    """Two environments that share a cache do not read, nor replace, each other's."""
    installed = memory.version_of
    remember("llama", LLAMA)
    with monkeypatch.context() as patch:
        patch.setattr(memory, "version_of", lambda name: "99.0" if name == library else installed(name))
        assert recall("llama") is None
        remember("llama", REFUSED)
        assert recall("llama") == REFUSED

    assert recall("llama") == LLAMA
    assert len(list(kept.iterdir())) == 2


def test_writers_at_the_same_time_leave_one_whole_file(kept: Path) -> None:
    """As other processes do; a reader sees the one or the other."""
    answers = [Answer({**LLAMA.fields, "tiny_config": {"number": number}}) for number in range(8)]
    together = threading.Barrier(len(answers) + 1)
    seen: list[Answer | None] = []

    def write(answer: Answer) -> None:
        together.wait()
        for _ in range(4):
            remember("llama", answer)

    def read() -> None:
        together.wait()
        seen.extend(recall("llama") for _ in range(20))

    threads = [threading.Thread(target=write, args=(answer,)) for answer in answers]
    threads.append(threading.Thread(target=read))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert all(answer is None or answer in answers for answer in seen)
    assert recall("llama") in answers
    assert the_file(kept).name.startswith("llama-")


def test_a_cache_that_cannot_be_written_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The answer is used all the same."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))

    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            remember("llama", LLAMA)

    (record,) = caplog.records
    assert record.message.startswith("what was found out about model types cannot be kept")


def test_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By the platform's convention, unless XDG_CACHE_HOME says otherwise."""
    assert cache_folder() == tmp_path / "cache" / "splitlearn" / "families"
    monkeypatch.delenv("XDG_CACHE_HOME")
    for name in ("HOME", "USERPROFILE", "LOCALAPPDATA"):
        monkeypatch.setenv(name, str(tmp_path))
    for platform, folder in {"linux": ".cache", "darwin": "Library/Caches", "win32": ""}.items():
        monkeypatch.setattr(memory.sys, "platform", platform)
        assert cache_folder() == tmp_path / folder / "splitlearn" / "families"


def test_an_answer_is_about_one_type() -> None:
    with pytest.raises(ValueError, match="it is about 'llama'"):
        answer_from(LLAMA.to_dict(), "mistral")
