"""The conformance kit can fail: wrong families are found out, and the field to look at is named."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from splitlearn_core import ModelFamily
from splitlearn_core.cli.plugins import _Progress, render_report
from splitlearn_core.errors import InternalError, TensorMismatchError
from splitlearn_core.plugins.metadata import PluginEntry
from splitlearn_core.testing.results import Case, FamilyReport, grouped

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
#: A router's result crosses, too.
ZAYA: dict[str, Any] = {
    "model_type": "zaya",
    "architecture": "ZayaForCausalLM",
    "skip_outside_bottom": ("input_hidden_states_scale", "input_hidden_states_bias"),
    "enter_at_layers": True,
    "layers_return_tuple": True,
    "crossing": {"prev_router_hidden_states": ("batch", "sequence", "router_hidden_size")},
    "layer_results": ("prev_router_hidden_states",),
    "transformers_tables": True,
    "measured_cache": True,
    "uniform_layers": False,
    "config_defaults": {"tie_word_embeddings": True, "residual_in_fp32": True},
    "tiny_config": {"num_experts": 4, "moe_intermediate_size": 16, "router_hidden_size": 16},
}

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

NO_USE = (
    "positions-added-again", "no-such-base", "no-such-layers", "no-such-embedding", "no-such-norm", "no-such-head",
    "common-names", "another-class", "no-such-class",
)  # fmt: skip
#: What keeps a plugin from being used at all -> model type, source, the check that tells, the field and a word of it.
TOLD_ONCE: dict[str, tuple[str, str, str, str, str]] = {
    "no-import": ("llama", "import nonsuch\n", "test_entry_point", "the plugin's module", "line 1: import nonsuch"),
    "no-hook": ("llama", "VALUE = 1\n", "test_entry_point", "the plugin's module", "no_hook.py"),
    "no-class": ("llama", "{no-such-class}", "test_architecture", "architecture", "class of transformers"),
    "no-llama": ("llama", "{another-class}", "test_architecture", "architecture", "'llama'"),
    "no-layers": ("gpt2", "{no-such-layers}", "test_module_names", "layers", "it is 'h'"),
    "no-norm": ("gpt2", "{no-such-norm}", "test_module_names", "norm", "it is 'ln_f'"),
    "no-tokens": ("gpt2", "{no-tokens}", "test_module_names", "embedding", "it is 'wte'"),
    "no-depth": ("gpt2", "{common-names}", "test_config_names", "config_names['num_hidden_layers']", "'n_layer'"),
    "no-place": ("gpt2", "{positions-added-again}", "test_every_key_has_its_place", "zero_outside_bottom", "'wpe'"),
    "no-mapping": (
        "llama",
        "{mapping}",
        "test_every_key_has_its_place",
        "hook splitlearn_map_weight_keys",
        "every key",
    ),
    "no-cuts": ("llama", "{cuts}", "test_impossible_cuts", "impossible_cuts", "with the reason"),
    "no-tiny": ("llama", "{tiny}", "test_architecture", "tiny_config", "small model"),
}
#: What stays true whatever is wrong with a plugin; and what does whatever is wrong with its family.
GUARDING = {"test_no_check_is_overridden", "test_expected_failures_are_explained"}
STANDING = {
    *GUARDING, "test_entry_point", "test_import_budget", "test_registration_has_no_side_effects",
    "test_hooks_answer_alike",
}  # fmt: skip


def install(world: Any, name: str, source: str, model_type: str = "gpt2") -> str:
    """Install a plugin of its own distribution and module."""
    world.install(model_type, source, distribution=f"splitlearn-{name}")
    return f"splitlearn-{name}"


def described(fields: dict[str, Any]) -> str:
    return PLUGIN.format(", ".join(f"{name}={value!r}" for name, value in fields.items()))


def kit(world: Any, *arguments: str) -> tuple[int, list[dict[str, Any]], str]:
    """Run the command in a process and return its exit code, its reports, and what it said."""
    done = world.warm_python("-m", "splitlearn_core", "plugins", "test", *arguments, "--json")
    return done.returncode, json.loads(done.stdout) if done.stdout else [], done.stderr


def sources() -> dict[str, str]:
    """Return plugins by what is wrong with them."""
    return {
        **{name: described(family) for name, (family, _) in WRONG.items()},
        "no-tokens": described({**GPT2, "embedding": "wpe", "zero_outside_bottom": ()}),
        "mapping": described(LLAMA) + "@hookimpl\ndef splitlearn_map_weight_keys(family, config):\n    return {}\n",
        "cuts": PLUGIN.format('model_type="llama", architecture="LlamaForCausalLM", impossible_cuts=lambda _: 1 / 0'),
        "tiny": described({**LLAMA, "tiny_config": {"hidden_size": 31}}),
    }


def failures(report: dict[str, Any]) -> list[dict[str, Any]]:
    return [case for check in report["checks"] for case in check["cases"] if case["outcome"] == "failed"]


def test_a_wrong_family_fails_and_the_field_is_named(world: Any) -> None:
    """Each field declared wrongly, in its own package next to eleven others that claim the same model type.

    Where the check that would tell of a family of no use is not asked for, the first of the others tells, once.
    """
    names = [install(world, name, described(family), family["model_type"]) for name, (family, _) in WRONG.items()]

    code, reports, said = kit(
        world, *names, "--quick", "-k", "module_names or config_defaults or logits or only_layers or gradients"
    )

    assert code == 1, said
    assert [report["distribution"] for report in reports] == names
    for report, (what, (_, field)) in zip(reports, WRONG.items(), strict=True):
        found = failures(report)
        assert found, f"{what} is not found out"
        named = {look["field"] for case in found for look in case["look_at"]}
        assert any(field in name for name in named), f"{what}: {named}"
        assert what not in NO_USE or len(found) == 1, f"{what} is told {len(found)} times"


def test_a_fatal_problem_of_a_family_is_reported_once(world: Any) -> None:
    """One check fails, with the field and the fix; independent checks run, and the others point to it."""
    texts = sources()
    names = [
        install(world, name, texts.get(source.strip("{}"), source), model_type)
        for name, (model_type, source, *_) in TOLD_ONCE.items()
    ]

    code, reports, said = kit(world, *names)

    assert code == 1, said
    for report, (what, (_, _, telling, field, word)) in zip(reports, TOLD_ONCE.items(), strict=True):
        assert [case["check"] for case in failures(report)] == [telling], what
        looks = failures(report)[0]["look_at"]
        assert any(look["field"] == field and word in look["why"] for look in looks), f"{what}: {looks}"
        for check in report["checks"]:
            if check["check"] not in STANDING | {telling}:
                assert {case["message"] for case in check["cases"]} == {f"{telling} says why"}, f"{what}: {check}"
                assert check["passed"] == 0
        passed = {check["check"] for check in report["checks"] if check["outcome"] == "passed"}
        assert passed == (GUARDING if telling == "test_entry_point" else STANDING), what


def test_a_failure_names_what_is_evidence_for_it(world: Any) -> None:
    """Two faults are two failures, each with its own field and no other."""
    defaults = {**GPT2_DEFAULTS, "num_hidden_layers": 13}
    name = install(world, "two-faults", described({**GPT2, "skip_outside_bottom": (), "config_defaults": defaults}))

    _, (report,), said = kit(world, name, "--quick", "-k", "config_defaults or only_layers")

    named = {(case["check"], look["field"]) for case in failures(report) for look in case["look_at"]}
    assert named == {
        ("test_only_layers_outside_bottom", "skip_outside_bottom"),
        ("test_config_defaults", "config_defaults['num_hidden_layers']"),
    }, said


def test_an_exception_is_explained_by_what_has_to_do_with_it(world: Any) -> None:
    """A wrong number of heads makes no tensor astray; a tensor astray is none of the numbers."""
    from splitlearn_core.testing.conformance.diagnosis import explain

    world.install("llama")
    family = ModelFamily(**LLAMA, config_defaults={"num_key_value_heads": 3})
    astray = TensorMismatchError("2 are wrong:\n  unexpected: model.layers.0.old", hint="what of it?")

    assert explain(RuntimeError("shapes differ"), family, {}) == ()
    assert [suspect.field for suspect in explain(astray, family, {})] == ["ignored_suffixes"]


@pytest.mark.parametrize("dimension", ["router_hidden_size", "hidden_size"])
def test_a_family_of_which_more_crosses(world: Any, dimension: str) -> None:
    """What crosses is compared with what the layers of the whole are given; a wrong description is named."""
    if "zaya" not in CONFIG_MAPPING_NAMES:
        pytest.skip("this transformers has no zaya")
    crossing = {"prev_router_hidden_states": ("batch", "sequence", dimension)}
    install(world, "zaya", described({**ZAYA, "crossing": crossing}), "zaya")
    checks = ("test_what_crosses", "test_identity", "test_causality", "test_module_names")
    code, (report,), _ = kit(world, "zaya", "--quick", *(word for check in checks for word in ("-k", check)))
    outcomes = {check["check"]: check["outcome"] for check in report["checks"]}
    if dimension == "router_hidden_size":
        assert (code, outcomes) == (0, dict.fromkeys(checks, "passed")), failures(report)
        return
    assert (code, outcomes["test_what_crosses"]) == (1, "failed")
    assert "crossing" in {look["field"] for case in failures(report) for look in case["look_at"]}


def test_a_correct_family_passes_next_to_a_broken_one(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every check passes, in an empty folder that stays empty; other installed packages change nothing."""
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

    done = world.warm_python(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", str(tmp_path / "pytest.ini"), "-k",
        "check_is_overridden or failures_are or test_logits", str(tmp_path / "test_llama.py"),
    )  # fmt: skip

    failed = {line.split("::", 1)[1].split(" ")[0] for line in done.stdout.splitlines() if line.startswith("FAILED")}
    assert done.returncode == 1, done.stdout
    assert {name.partition("[")[0] for name in failed} == {
        "TestOverridden::test_no_check_is_overridden",
        "TestExplained::test_logits",
        "TestUnexplained::test_expected_failures_are_explained",
    }, done.stdout


@pytest.mark.parametrize(
    ("arguments", "environment", "said"),
    [
        (("lama",), {}, "did you mean 'llama'"),
        (("LLAMA",), {}, "did you mean 'llama'"),
        (("gguf",), {}, "is a loading strategy"),
        (("llama", "-k", "a ("), {}, "does not understand -k"),
        (("llama",), {"SPLITLEARN_PLUGINS": "gguf"}, "(splitlearn-right 1.0) is blocked by SPLITLEARN_PLUGINS"),
        (("splitlearn-right",), {"SPLITLEARN_DISABLE_PLUGINS": "llama"}, "change or unset SPLITLEARN_DISABLE_PLUGINS"),
    ],
    ids=["misspelt", "capitals", "strategy", "no expression", "not allowed", "blocked"],
)
def test_a_mistake_on_the_command_line_is_reported(
    world: Any, arguments: tuple[str, ...], environment: dict[str, str], said: str
) -> None:
    """An error and a way out, no traceback and no report."""
    install(world, "right", described(LLAMA), "llama")
    world.install("gguf", "VALUE = 1\n", distribution="splitlearn-reads", group="splitlearn.strategies")

    done = world.warm_python("-m", "splitlearn_core", "plugins", "test", *arguments, "--json", **environment)

    assert (done.returncode, done.stdout) == (1, "")
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_failing_library_is_reported_as_the_cause(world: Any) -> None:
    """The kit cannot be imported: exit code 1 and the library's own words."""
    install(world, "right", described(LLAMA), "llama")
    (world.folder / "torch.py").write_text("raise RuntimeError('this torch is broken')\n")

    code, reports, said = kit(world, "llama")

    assert (code, reports) == (1, [])
    assert "this torch is broken" in said
    assert "Traceback" not in said


def test_a_failed_collection_is_reported(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no interruption by the user."""
    from splitlearn_core.testing import running

    install(world, "right", described(LLAMA), "llama")
    monkeypatch.setattr(running, "_CLASS", "\nraise ValueError('this class is no class')\n")

    with pytest.raises(InternalError, match="this class is no class"):
        running.run_kit([PluginEntry("llama", "splitlearn_right", "splitlearn-right", "1.0")])


def case(check: str, outcome: str, message: str = "") -> Case:
    return Case("llama", check, "", outcome, 0.0, message)


def test_failures_are_not_lost_among_what_was_skipped() -> None:
    """Each reason stands once, above its checks; in the table is what was run."""
    skipped = [case(name, "skipped", "test_a says why") for name in ("test_b", "test_c")]
    report = FamilyReport("llama", "splitlearn-llama", "1.0", grouped([case("test_a", "failed", "it is so"), *skipped]))

    shown = render_report(report)

    assert "skipped:\n  test_a says why\n    test_b, test_c\n\ntest_a failed\n  it is so\n" in shown
    assert shown.endswith("1 of 3 checks FAILED, 2 were skipped")
    table = shown.partition("skipped:\n")[0]
    assert "test_a" in table
    assert "test_b" not in table


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """The line of progress is taken away in the end."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)

    with _Progress() as progress:
        progress(case("test_logits", "passed"))
        assert terminal.getvalue().endswith("llama: logits")

    assert terminal.getvalue().endswith("llama: logits\r\x1b[K")
