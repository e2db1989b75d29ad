"""The conformance kit can fail: wrong families are found out, and the field to look at is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

#: Each starts a process that imports everything; what is asked is the kit, not a library.
pytestmark = pytest.mark.once

HEAD = "from splitlearn_core import ModelFamily, hookimpl\n"
PLUGIN = HEAD + "@hookimpl\ndef splitlearn_model_families():\n    return [ModelFamily({})]\n"
GPT2_DEFAULTS = {
    "num_hidden_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "tie_word_embeddings": True
}  # fmt: skip
GPT2 = {
    "model_type": "gpt2",
    "architecture": "GPT2LMHeadModel",
    "base": "transformer",
    "layers": "h",
    "embedding": "wte",
    "norm": "ln_f",
    "zero_outside_bottom": ("wpe",),
    "skip_outside_bottom": ("drop",),
    "config_names": {"num_hidden_layers": "n_layer", "hidden_size": "n_embd", "num_attention_heads": "n_head"},
    "config_defaults": GPT2_DEFAULTS,
}
LLAMA = {"model_type": "llama", "architecture": "LlamaForCausalLM"}

#: What is wrong -> the family, and the field that has to be named.
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "positions-added-again": ({**GPT2, "zero_outside_bottom": ()}, "zero_outside_bottom"),
    "dropout-again": ({**GPT2, "skip_outside_bottom": ()}, "skip_outside_bottom"),
    "added-for-passed": ({**GPT2, "zero_outside_bottom": ("wpe", "drop"), "skip_outside_bottom": ()}, "zero_outside"),
    "no-such-base": ({**GPT2, "base": "model"}, "base"),
    "no-such-layers": ({**GPT2, "layers": "blocks"}, "layers"),
    "no-such-embedding": ({**GPT2, "embedding": "embed_tokens"}, "embedding"),
    "no-such-norm": ({**GPT2, "norm": "norm"}, "norm"),
    "no-such-head": ({**GPT2, "head": "output"}, "head"),
    "common-names": ({**GPT2, "config_names": {}}, "config_names"),
    "untied-by-default": (
        {**GPT2, "config_defaults": {**GPT2["config_defaults"], "tie_word_embeddings": False}},
        "tie",
    ),
    "another-class": ({**LLAMA, "architecture": "MistralForCausalLM"}, "architecture"),
    "no-such-class": ({**LLAMA, "architecture": "LamaForCausalLM"}, "architecture"),
}


def install(world: Any, name: str, source: str, model_type: str = "gpt2") -> str:
    """Install a plugin of its own distribution and module."""
    world.install(model_type, source, distribution=f"splitlearn-{name}")
    return f"splitlearn-{name}"


def described(fields: dict[str, Any]) -> str:
    return PLUGIN.format(", ".join(f"{name}={value!r}" for name, value in fields.items()))


def kit(world: Any, *arguments: str) -> tuple[int, list[dict[str, Any]], str]:
    """Run the command in a process and return its exit code, its reports, and what it said."""
    done = world.python("-m", "splitlearn_core", "plugins", "test", *arguments, "--json")
    return done.returncode, json.loads(done.stdout) if done.stdout else [], done.stderr


def failures(report: dict[str, Any]) -> list[dict[str, Any]]:
    return [case for check in report["checks"] for case in check["cases"] if case["outcome"] == "failed"]


def test_a_wrong_family_fails_and_the_field_is_named(world: Any) -> None:
    """Each field said wrongly, in a package of its own beside eleven others that claim the same model type."""
    names = [install(world, name, described(family), family["model_type"]) for name, (family, _) in WRONG.items()]

    code, reports, said = kit(
        world, *names, "--quick", "-k", "module_names or config or logits or only_layers or architecture or gradients"
    )

    assert code == 1, said
    assert [report["distribution"] for report in reports] == names
    for report, (what, (_, field)) in zip(reports, WRONG.items(), strict=True):
        found = failures(report)
        assert found, f"{what} is not found out"
        named = {look["field"] for case in found for look in case["look_at"]}
        assert any(field in name for name in named), f"{what}: {named}"


def test_a_right_family_passes_beside_a_broken_one(world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every check holds, in an empty folder in which nothing is left; what is installed beside changes nothing."""
    install(world, "right", described(LLAMA), "llama")
    install(world, "claims-too", described({**LLAMA, "base": "wrong"}), "llama")
    install(world, "broken", "raise RuntimeError('broken')\n", "mistral")
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)

    code, (report,), said = kit(world, "splitlearn-right", "--quick")

    assert code == 0, said
    assert failures(report) == []
    outcomes = {check["check"]: check["outcome"] for check in report["checks"]}
    assert len(outcomes) >= 38
    assert {
        outcomes[name] for name in ("test_logits", "test_gradients", "test_save_load_merge", "test_cancelled_load")
    } == {"passed"}
    assert list(empty.iterdir()) == []


TESTS = """
from splitlearn_core.testing import FamilyConformance

class TestOverridden(FamilyConformance):
    model_type = "llama"
    quick = True
    def test_logits(self):
        pass

class TestExplained(FamilyConformance):
    model_type = "llama"
    quick = True
    expected_failures = {"test_logits[tied]": "said to fail, and does not"}

class TestUnexplained(FamilyConformance):
    model_type = "llama"
    quick = True
    expected_failures = {"test_logits": "", "test_nothing": "no such check"}
"""


def test_a_check_is_neither_overridden_nor_excused_in_silence(world: Any, tmp_path: Path) -> None:
    """An override fails, an expected failure that passes fails, one without a reason or of no check fails."""
    install(world, "right", described(LLAMA), "llama")
    (tmp_path / "test_llama.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")

    done = world.python(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", str(tmp_path / "pytest.ini"), "-k",
        "overridden or explained or logits", str(tmp_path / "test_llama.py"),
    )  # fmt: skip

    failed = {line.split("::", 1)[1].split(" ")[0] for line in done.stdout.splitlines() if line.startswith("FAILED")}
    assert done.returncode == 1, done.stdout
    assert {name.partition("[")[0] for name in failed} == {
        "TestOverridden::test_no_check_is_overridden",
        "TestExplained::test_logits",
        "TestUnexplained::test_expected_failures_are_explained",
    }, done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("lama",), "did you mean 'llama'"),
        (("gguf",), "is a loading strategy"),
        (("llama", "-k", "a ("), "does not understand -k"),
    ],
    ids=["misspelt", "strategy", "no expression"],
)
def test_a_mistake_at_the_command_line_is_told(world: Any, arguments: tuple[str, ...], said: str) -> None:
    """An error and a way out, no traceback and no report."""
    install(world, "right", described(LLAMA), "llama")
    world.install("gguf", "VALUE = 1\n", distribution="splitlearn-reads", group="splitlearn.strategies")

    code, reports, words = kit(world, *arguments)

    assert (code, reports) == (1, [])
    assert said in words
    assert "Traceback" not in words
