"""Foreign text in error messages is at most a line, whatever the input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from splitlearn_core import ConfigurationError, InvalidCheckpointError, SplitLearnError, load_split_model, plan_split
from splitlearn_core import errors as tree
from splitlearn_core.manager.status import record
from splitlearn_core.plan.bounds import MAX_LEVELS, check_numbers
from splitlearn_core.plugins.known import PACKAGES, REFUSED, WRITTEN, way_out
from splitlearn_core.plugins.registry import PluginRegistry
from splitlearn_core.quoting import LINE, WORD, listed, plain, quote, said

CUTS = (2, 4)
LONG = "x" * 1_000_000
ERRORS = [kind for kind in vars(tree).values() if isinstance(kind, type) and issubclass(kind, SplitLearnError)]


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("text", [LONG, "a\nb" * 500_000, "\x1b[31m\ud800" * 200_000], ids=["line", "lines", "control"])
def test_every_error_is_bounded(kind: type[SplitLearnError], text: str) -> None:
    error = kind(text, hint=text)
    assert len(str(error)) <= 4000
    assert "characters" in error.message or "more lines" in error.message
    assert "\x1b" not in str(error)
    str(error).encode()


def test_an_ordinary_message_is_left_as_it_is() -> None:
    error = SplitLearnError("first\n  second: über", hint="do this")
    assert str(error) == "first\n  second: über\ndo this"


def test_quoting_takes_any_value() -> None:
    values = [LONG, [LONG] * 9, {LONG: LONG}, 10**10_000, b"\0" * 10**6, None, 1.5, True, "\x1b[2J\n", ValueError(LONG)]
    for value in values:
        assert len(quote(value)) <= WORD
        assert quote(value).isprintable()
    for text in (LONG, "\x1b[2J\n" * 500):
        assert len(plain(text)) <= WORD
        assert plain(text).isprintable()
        assert said(ValueError(text)).isprintable()
        assert len(said(ValueError(text))) <= LINE + len("ValueError: ")
    assert listed(range(20_000)) == "0, 1, 2, 3, 4, 5, 6, 7, and 19,992 more"
    assert len(listed([LONG] * 20_000)) <= 9 * (WORD + 2)


def test_a_snapshot_keeps_little_of_the_error_of_a_library() -> None:
    try:
        raise ValueError(LONG)
    except ValueError as error:
        kept = record(error, "building")
    assert len(kept.message) + len(kept.traceback) < 25_000


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("strategy", ["auto", "mapped", "copied", "incremental", "whole"])
def test_another_encoding_is_refused_by_every_strategy(llama: Any, single: Path, encoding: str, strategy: str) -> None:
    path = single / "config.json"
    path.write_bytes(path.read_text().encode(encoding))
    with pytest.raises(InvalidCheckpointError, match="is not in UTF-8 but in utf-") as caught:
        load_split_model(None, CUTS, single, strategy=strategy, progress=False)
    assert caught.value.hint.startswith("write it in UTF-8: python -c ")


@pytest.mark.parametrize("strategy", ["auto", "copied", "incremental", "whole"])
def test_a_byte_order_mark_is_read_by_every_strategy(llama: Any, single: Path, strategy: str) -> None:
    path = single / "config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load_split_model(None, CUTS, single, strategy=strategy, progress=False).trunk is not None


def test_all_numbers_out_of_bounds_are_named_at_once() -> None:
    deep: Any = {}
    for _ in range(MAX_LEVELS + 5):
        deep = {"a": deep}
    values = {"num_labels": 2**53, "text_config": {"vocab_size": 2**40}, "layer_types": ["x"] * 10**6, "deep": deep}
    with pytest.raises(ConfigurationError) as caught:
        check_numbers(values, "config.json")
    for what in (
        "num_labels is 9007199254740992; 200,000",
        "text_config.vocab_size",
        "layer_types has 1,000,000",
        "deep",
    ):
        assert what in caught.value.message


def test_large_models_are_within_the_bounds() -> None:
    """The bounds are larger than any existing model."""
    check_numbers(
        {
            "vocab_size": 2_000_000,
            "hidden_size": 65_536,
            "num_hidden_layers": 2_000,
            "num_labels": 100_000,
            "max_position_embeddings": 100_000_000,
            "sliding_window": 2**31,
            "num_experts": 4096,
            "pad_token_id": -1,
            "rope_scaling": {"factor": float("inf")},
            "n_params": 10**15,
            "model_max_length": 10**18,
        },
        "config.json",
    )
    check_numbers({"model_type": "gpt2", "n_positions": 8192, "n_layer": 48, "n_embd": 1600}, "config.json")


def test_a_long_text_of_a_configuration_is_not_repeated(llama: Any, single: Path, edit_json: Any) -> None:
    for name in ("dtype", "model_type", "hidden_size", "num_hidden_layers"):
        kept = (single / "config.json").read_bytes()
        edit_json(single / "config.json", **{name: LONG})
        with pytest.raises(SplitLearnError) as caught:
            plan_split(single, CUTS)
        assert len(str(caught.value)) < 1500, name
        (single / "config.json").write_bytes(kept)


@pytest.mark.parametrize(
    "model_type", ["evil", "x; rm -rf ~", "$(id)", "-r", "a/../b", "x" * 100_000, "a b", "`id`", "a\nb"]
)
def test_no_command_contains_an_untrusted_type(model_type: str) -> None:
    with pytest.raises(SplitLearnError) as caught:
        PluginRegistry([]).family(model_type)
    assert "pip install" not in caught.value.hint.replace("pip install splitlearn-auto", "")
    assert model_type not in caught.value.hint or model_type == "-r"


def test_the_proposal_for_a_type_matches_the_tables() -> None:
    assert not WRITTEN & REFUSED
    assert not (WRITTEN | REFUSED) & PACKAGES.keys()
    for model_type in ("llama", "mixtral"):
        assert way_out(model_type).startswith("pip install splitlearn-auto, or ")
        assert "\n" not in way_out(model_type)
    assert way_out("brandnew").startswith("pip install splitlearn-auto, which finds out whether")
    assert way_out("brandnew", for_any="do this").startswith("do this, or check")
    assert "pip install" not in way_out("rwkv")
    assert "cannot be split" in way_out("rwkv")
    assert "plugins new" not in way_out("gemma3")
    assert "pip install splitlearn-gemma" in way_out("gemma3")
    assert json.dumps(way_out("gemma2")).startswith('"try: pip install splitlearn-gemma')
