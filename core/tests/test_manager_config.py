"""Configurations of models: what is taken, what is refused and how, and that files give back what they got."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
import tomllib
from collections.abc import Callable
from enum import StrEnum
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from splitlearn_core import Component, ConfigurationError, MissingFileError, SplitLearnError, UnknownModelTypeError
from splitlearn_core.manager.config import FIELDS, ConfigFile, ModelConfig, load_configs, read_config_file
from splitlearn_core.manager.config_checks import MAX_MEMORY_MB

pytestmark = pytest.mark.light

FAMILY: dict[str, Any] = {"model_id": "t", "model_type": "llama", "component": "trunk", "split_points": (2, 4)}
WHOLE: dict[str, Any] = {"model_id": "w", "model_type": "huggingface", "model_path": "org/model"}
PYTORCH: dict[str, Any] = {
    "model_id": "p",
    "model_type": "pytorch",
    "model_path": "weights.pt",
    "architecture": "package.module:Net",
}

#: More digits than Python writes out, so it needs a name of its own.
HUGE = pytest.param(10**6000, id="huge")


def problems(error: ConfigurationError) -> dict[str, str]:
    """Return the listed problems by their place; the last of several at one place."""
    return dict(line.strip().split(": ", 1) for line in error.message.splitlines()[1:])


def refusal(base: dict[str, Any] = FAMILY, **changes: Any) -> dict[str, str]:
    """Return the problems of a changed configuration, and check that ``from_dict`` reports the same."""
    with pytest.raises(ConfigurationError) as caught:
        ModelConfig(**{**base, **changes})
    with pytest.raises(ConfigurationError) as again:
        ModelConfig.from_dict({**base, **changes})
    assert str(again.value) == str(caught.value)
    assert caught.value.hint
    return problems(caught.value)


# Constructing


def test_defaults_are_what_the_documentation_says() -> None:
    """A family's component, a whole model and a file of PyTorch need no more than this."""
    config = ModelConfig(**FAMILY)

    assert (config.model_path, config.device, config.dtype, config.strategy) == (None, "cpu", "auto", "auto")
    assert (config.keep_alive, config.max_memory_mb, config.load_threads) == (None, None, None)
    assert not any((config.warmup, config.pinned, config.required, config.allow_paging, config.allow_pickle))
    assert config.is_family
    assert not ModelConfig(**WHOLE).is_family
    assert not ModelConfig(**PYTORCH).is_family


def test_fields_are_given_by_name_and_never_change() -> None:
    """No positional arguments, no assignment, no further attributes."""
    with pytest.raises(TypeError):
        ModelConfig("t", "llama")  # type: ignore[misc]
    config = ModelConfig(**FAMILY)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.device = "cuda"  # type: ignore[misc]
    assert not hasattr(config, "__dict__")
    assert hash(config) == hash(ModelConfig(**FAMILY))


def test_a_replaced_field_is_checked_too() -> None:
    """``dataclasses.replace`` makes a configuration like any other."""
    assert dataclasses.replace(ModelConfig(**FAMILY), device="cuda:1").device == "cuda:1"
    with pytest.raises(ConfigurationError, match="component"):
        dataclasses.replace(ModelConfig(**FAMILY), component="middle")


def test_five_mistakes_are_five_lines() -> None:
    """All problems are reported at once: each field with its value and a valid one."""
    reported = refusal(
        model_id="../models/gpt2", component="trunkk", split_points=[4, 2], device="CUDA0", max_memory_mb=-1
    )

    assert reported == {
        "model_id": "'../models/gpt2' is a path, not a name; 'gpt2' would do, and model_path takes paths",
        "component": "'trunkk' is none of bottom, trunk, top; did you mean 'trunk'?",
        "split_points": "[4, 2] does not satisfy 0 < a < b < 10000; the nearest valid value is (2, 4)",
        "device": "'CUDA0' is not a device; did you mean 'cuda:0'?",
        "max_memory_mb": f"-1 is not above 0 and at most {MAX_MEMORY_MB}; leave it out for no limit",
    }


def test_the_count_of_problems_is_stated() -> None:
    """The first line names the model and counts."""
    with pytest.raises(ConfigurationError, match=r"the configuration of model 't' has 2 problems:\n"):
        ModelConfig(**{**FAMILY, "device": "", "dtype": ""})
    with pytest.raises(ConfigurationError, match=r"has 1 problem:\n"):
        ModelConfig(**{**FAMILY, "device": ""})


def test_the_error_is_one_of_ours_and_a_value_error() -> None:
    """Callers may catch either."""
    with pytest.raises(ValueError, match="dtype") as caught:
        ModelConfig(**{**FAMILY, "dtype": "int8"})
    assert isinstance(caught.value, SplitLearnError)


# Field by field


@pytest.mark.parametrize("model_id", ["a", "Qwen2 0.5B", "bundled:gpt2", "...", "größe-模型", "x" * 128, "a@b#c=d"])
def test_any_printable_name_is_an_id(model_id: str) -> None:
    """Spaces within, dots and all scripts included."""
    assert ModelConfig(**{**FAMILY, "model_id": model_id}).model_id == model_id


@pytest.mark.parametrize(
    ("model_id", "suggested"),
    [
        ("org/model", "model"),
        ("/srv/models/gpt2/", "gpt2"),
        ("C:\\models\\gpt2", "gpt2"),
        ("../..", "my-model"),
        ("..", "my-model"),
        (".", "my-model"),
        ("/", "my-model"),
        ("a/\x00", "a"),
        (" gpt2", "gpt2"),
        ("gpt\n2", "gpt2"),
        ("gpt2\u202e", "gpt2"),
        ("a/" + "x" * 500, "x" * 128),
    ],
)
def test_an_id_that_is_a_path_or_cannot_be_printed_is_refused(model_id: str, suggested: str) -> None:
    """The refusal suggests a name, which is itself taken."""
    text = refusal(model_id=model_id)["model_id"]

    assert f"{suggested!r} would do" in text
    assert ModelConfig(**{**FAMILY, "model_id": suggested}).model_id == suggested


@pytest.mark.parametrize("value", ["", " ", "\n", "x" * 129, 5, None, True, ["a"], b"a", 1.5, "\ud800", "a\0"])
@pytest.mark.parametrize("name", ["model_id", "model_type"])
def test_invalid_names_are_refused(name: str, value: object) -> None:
    """Empty, too long, or not a string; no other field is reported."""
    assert set(refusal(**{name: value})) == {name}


def test_the_refusal_of_a_number_for_a_string_says_to_quote_it() -> None:
    """As happens to the id 7 in YAML."""
    assert refusal(model_id=7)["model_id"] == "7 is not a string; put it in quotes"


@pytest.mark.parametrize("value", ["HuggingFace", "PyTorch", "PYTORCH"])
def test_the_reserved_model_types_are_lower_case(value: str) -> None:
    """Another case is no family by accident."""
    assert refusal(WHOLE, model_type=value)["model_type"] == f"{value!r} is spelt {value.lower()!r}"


@pytest.mark.parametrize(("value", "meant"), [("hugginface", "huggingface"), ("torch", "pytorch")])
def test_a_misspelt_reserved_model_type_is_guessed(value: str, meant: str) -> None:
    """It would be the type of a family, whose component is missing: the guess is part of that problem."""
    reported = refusal(WHOLE, model_type=value)

    assert set(reported) == {"component", "split_points"}
    assert f"did you mean {meant!r}?" in reported["component"]


@pytest.mark.parametrize("component", list(Component))
def test_components_are_kept_as_plain_texts(component: Component) -> None:
    """The enumeration's members and their names are the same."""
    config = ModelConfig(**{**FAMILY, "component": component})

    assert type(config.component) is str
    assert config == ModelConfig(**{**FAMILY, "component": str(component)})


@pytest.mark.parametrize("value", ["Trunk", "middle", "", 1, ("trunk",), True])
def test_other_components_are_refused(value: object) -> None:
    """Each with the three that exist, unless it is not a string."""
    text = refusal(component=value)["component"]
    assert "bottom, trunk, top" in text or "is not a string" in text or "empty" in text


@pytest.mark.parametrize("value", [(2, 4), [2, 4], (np.int64(2), np.int32(4)), range(2, 6, 2)])
def test_split_points_become_a_tuple_of_integers(value: Any) -> None:
    """Whatever sequence of integers they came as."""
    points = ModelConfig(**{**FAMILY, "split_points": value}).split_points

    assert points == (2, 4)
    assert [type(point) for point in points or ()] == [int, int]


@pytest.mark.sample(16)
@pytest.mark.parametrize("pair", list(itertools.product((-2, 0, 1, 2, 5, 9_999, 10_000, 10**9), repeat=2)))
def test_every_other_pair_is_refused_with_a_pair_that_would_do(pair: tuple[int, int]) -> None:
    """``0 < a < b < 10000`` is taken, and so is what is suggested for anything else."""
    if 0 < pair[0] < pair[1] < 10_000:
        assert ModelConfig(**{**FAMILY, "split_points": pair}).split_points == pair
        return
    found = re.search(r"is \((\d+), (\d+)\)$", refusal(split_points=pair)["split_points"])
    assert found
    suggested = (int(found[1]), int(found[2]))
    assert ModelConfig(**{**FAMILY, "split_points": suggested}).split_points == suggested


@pytest.mark.parametrize(
    "value",
    ["24", 2, (0,), (1, 3, 3), (), (1,) * 10_000, (True, 4), (2.0, 4.0), ("2", "4"), {2: 4}, b"24", (2, None), 2.5],
)
def test_what_is_no_sequence_of_layers_is_refused(value: object) -> None:
    """Truth values and floats are no layer numbers."""
    assert set(refusal(split_points=value)) == {"split_points"}


@pytest.mark.parametrize(
    ("points", "names"),
    [
        ((3,), ["bottom", "top"]),
        ((1, 2, 5), ["bottom", "trunk1", "trunk2", "top"]),
        ((2, 4), ["bottom", "trunk", "top"]),
    ],
)
def test_components_are_those_of_the_split_points(points: tuple[int, ...], names: list[str]) -> None:
    """Each name that the split points make is taken; of any other, those that there are are listed."""
    for name in ("bottom", "trunk", "trunk1", "trunk2", "trunk3", "top"):
        fields = {"split_points": points, "component": name}
        if name in names:
            config = ModelConfig(**{**FAMILY, **fields})
            assert (config.component, config.split_points) == (name, points)
            assert ModelConfig.from_dict(config.to_dict()) == config
        else:
            assert refusal(**fields) == {
                "component": f"{name!r} is none of {', '.join(names)}, the components that {points} make"
            }


@pytest.mark.parametrize("value", ["cpu", "cuda", "cuda:0", "cuda:15", "mps", "xpu:1"])
def test_only_the_syntax_of_a_device_is_checked(value: str) -> None:
    """Whether the device exists is checked when it is needed."""
    assert ModelConfig(**{**FAMILY, "device": value}).device == value


@pytest.mark.parametrize(
    ("value", "meant"),
    [("CPU", "cpu"), ("cuda0", "cuda:0"), ("cuda 1", "cuda:1"), ("CUDA:0", "cuda:0"), (" cpu", "cpu"), (0, "cuda:0")],
)
def test_a_device_of_another_shape_is_guessed(value: object, meant: str) -> None:
    """The guess is in the refusal."""
    assert repr(meant) in refusal(device=value)["device"]


@pytest.mark.parametrize("value", ["", "cuda:", "cuda:-1", "cuda:01", "cuda:0:1", "cpu;", None, True, 1.0, ["cpu"]])
def test_what_is_no_device_is_refused(value: object) -> None:
    """None too: the field has a default, and leaving it out is how one gets it."""
    assert set(refusal(device=value)) == {"device"}


@pytest.mark.parametrize("name", ["auto", "float32", "float16", "bfloat16", "float64"])
def test_dtypes_lose_the_prefix_of_torch(name: str) -> None:
    """``torch.float16`` and ``float16`` are one configuration."""
    assert ModelConfig(**{**FAMILY, "dtype": name}).dtype == name
    assert ModelConfig(**{**FAMILY, "dtype": f"torch.{name}"}).dtype == name


@pytest.mark.heavy
def test_objects_of_torch_are_taken_for_their_names() -> None:
    """Dtypes and devices, as Hugging Face takes them."""
    import torch

    config = ModelConfig(**{**FAMILY, "dtype": torch.bfloat16, "device": torch.device("cuda", 1)})

    assert (config.dtype, config.device) == ("bfloat16", "cuda:1")
    assert "torch.int8 is none of auto, float32, " in refusal(dtype=torch.int8)["dtype"]


@pytest.mark.parametrize(
    ("value", "meant"),
    [
        ("fp16", "float16"),
        ("half", "float16"),
        ("bf16", "bfloat16"),
        ("Float32", "float32"),
        ("torch.float", "float32"),
    ],
)
def test_other_names_of_dtypes_are_taken(value: str, meant: str) -> None:
    """Common short names and cases."""
    assert ModelConfig(**{**FAMILY, "dtype": value}).dtype == meant


@pytest.mark.parametrize(("value", "meant"), [("flaot64", "float64"), ("bf61", "bfloat16")])
def test_slips_in_names_of_dtypes_are_guessed(value: str, meant: str) -> None:
    """A name that is none has the nearest that is one."""
    assert f"did you mean {meant!r}?" in refusal(dtype=value)["dtype"]


@pytest.mark.parametrize("value", [1, 0.5, 2**43, Fraction(1, 2), np.float32(1.5), np.int64(3)])
def test_memory_is_any_positive_number(value: Any) -> None:
    """Up to 2**63 bytes; it is kept as a plain number."""
    kept = ModelConfig(**{**FAMILY, "max_memory_mb": value}).max_memory_mb
    assert kept == float(value)
    assert type(kept) in (int, float)


@pytest.mark.parametrize(
    "value",
    [0, -1, -0.5, math.nan, math.inf, -math.inf, 2**43 + 1, 1e300, HUGE, Fraction(10**400), True, "1500", [], 1j],
)
def test_memory_that_is_absurd_is_refused(value: object) -> None:
    """Nothing, negative, no number, or more than any machine has."""
    assert set(refusal(max_memory_mb=value)) == {"max_memory_mb"}


@pytest.mark.parametrize("value", [0, -1, 4097, 1.0, True, "2", math.nan, HUGE])
def test_threads_are_a_sane_integer(value: object) -> None:
    """From 1 to 4096."""
    assert set(refusal(load_threads=value)) == {"load_threads"}
    assert ModelConfig(**{**FAMILY, "load_threads": np.int64(2)}).load_threads == 2


@pytest.mark.parametrize("value", ["yes", "true", 1, 0, None, "", [True], np.bool_(True)])
@pytest.mark.parametrize("name", ["warmup", "pinned", "required", "allow_paging", "strict", "local_files_only"])
def test_flags_are_true_or_false(name: str, value: object) -> None:
    """A text such as "yes" would be true whatever it says."""
    text = refusal(**{name: value})[name]
    assert text.endswith("is neither true nor false")


@pytest.mark.parametrize("name", ["model_path", "cache_dir"])
def test_paths_may_be_path_objects(name: str) -> None:
    """They are kept as texts."""
    config = ModelConfig(**{**FAMILY, name: Path("some") / "where"})
    assert getattr(config, name) == str(Path("some") / "where")


@pytest.mark.parametrize("value", ["", b"x", 5, "a\0b", "\ud800", ["a"], True])
@pytest.mark.parametrize("name", ["model_path", "cache_dir", "revision", "strategy", "attn_implementation"])
def test_texts_are_texts(name: str, value: object) -> None:
    """Empty ones, numbers and what no file can hold are refused."""
    assert set(refusal(**{name: value})) == {name}


@pytest.mark.parametrize("name", [name for name, default in FIELDS.items() if default is None])
def test_none_leaves_an_optional_field_out(name: str) -> None:
    """None is the default of these, and may be given."""
    base = WHOLE if name in FAMILY else PYTORCH | {"allow_pickle": True} if name == "architecture" else FAMILY
    assert getattr(ModelConfig(**{**base, name: None}), name) is None


def test_texts_are_kept_as_plain_texts() -> None:
    """A subclass of str would be foreign to a writer of YAML."""

    class Name(StrEnum):
        ID = "some id"

    assert type(ModelConfig(**{**FAMILY, "model_id": Name.ID, "revision": np.str_("main")}).model_id) is str
    assert type(ModelConfig(**{**FAMILY, "revision": np.str_("main")}).revision) is str


# keep_alive


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None), (0, 0.0), (-0.0, 0.0), (300, 300.0), (0.5, 0.5), ("0", 0.0), ("90", 90.0), ("1.5", 1.5),
        ("30s", 30.0), ("5m", 300.0), ("1h30m", 5400.0), ("1.5h", 5400.0), ("250ms", 0.25), ("1d", 86400.0),
        (" 5M ", 300.0), ("2m0.5s", 120.5), (np.float32(2.5), 2.5),
        (-1, math.inf), (-0.001, math.inf), (math.inf, math.inf), (-math.inf, math.inf), ("-1", math.inf),
        ("-1m", math.inf), ("inf", math.inf), ("Forever", math.inf), (-(10**400), math.inf),
    ],
)  # fmt: skip
def test_keep_alive_becomes_seconds(value: Any, seconds: float | None) -> None:
    """Numbers and durations; negative is for ever."""
    kept = ModelConfig(**{**FAMILY, "keep_alive": value}).keep_alive
    assert kept == seconds
    if kept is not None:
        assert type(kept) is float
        assert math.copysign(1, kept) == 1


@pytest.mark.parametrize(
    "value",
    [
        "", "5 m", "m", "5x", "1h30", "--1", "1e3", "nan", "\u0665m", "never", "9" * 400, "9" * 400 + "h", "1.m", ".5h",
        math.nan, 1e11, 10**400, True, False, [5], b"5m", 1j,
    ],
)  # fmt: skip
def test_what_is_no_length_of_time_is_refused(value: object) -> None:
    """Also three centuries and more: for ever is written -1."""
    text = refusal(keep_alive=value)["keep_alive"]
    assert "-1 never" in text or "is not a number" in text


# Fields that belong together


def test_a_family_needs_a_component_and_split_points() -> None:
    """Both are missed at once."""
    reported = refusal({"model_id": "t", "model_type": "llama"})

    assert set(reported) == {"component", "split_points"}
    assert "bottom, trunk, top" in reported["component"]
    assert "(2, 10)" in reported["split_points"]


@pytest.mark.parametrize(
    ("base", "name", "value"),
    [
        (FAMILY, "architecture", "a.b:C"),
        (FAMILY, "allow_pickle", True),
        *((base, "component", "trunk") for base in (WHOLE, PYTORCH)),
        *((base, "split_points", (2, 4)) for base in (WHOLE, PYTORCH)),
        *((base, "strategy", "mapped") for base in (WHOLE, PYTORCH)),
        (WHOLE, "architecture", "a.b:C"),
        (WHOLE, "allow_pickle", True),
        (PYTORCH, "attn_implementation", "eager"),
        (PYTORCH, "revision", "main"),
    ],
)
def test_fields_of_other_kinds_of_models_are_refused(base: dict[str, Any], name: str, value: object) -> None:
    """What would change nothing is not taken in silence."""
    text = refusal(base, **{name: value})[name]
    assert f"is not for model type {base['model_type']!r}" in text
    assert "leave it out" in text


def test_a_wrong_value_of_a_field_that_does_not_belong_says_both() -> None:
    """Mending the value alone would not help."""
    with pytest.raises(ConfigurationError) as caught:
        ModelConfig(**{**WHOLE, "component": "trunkk"})
    assert [line.partition(":")[0].strip() for line in caught.value.message.splitlines()[1:]] == ["component"] * 2


@pytest.mark.parametrize("base", [WHOLE, PYTORCH])
def test_whole_models_need_a_path(base: dict[str, Any]) -> None:
    """They have no default."""
    assert set(refusal(base, model_path=None)) == {"model_path"}


def test_pytorch_needs_a_class_or_leave_to_run_code() -> None:
    """One or the other, or both."""
    without = {name: value for name, value in PYTORCH.items() if name != "architecture"}

    assert "package.module:Class" in refusal(without)["architecture"]
    assert ModelConfig(**without, allow_pickle=True).architecture is None
    assert ModelConfig(**PYTORCH, allow_pickle=True).architecture == "package.module:Net"
    assert set(refusal(without, allow_pickle="yes")) == {"allow_pickle"}


@pytest.mark.parametrize("value", ["torchvision", "a.b", "a:", ":C", "a b:C", "a:B:C", "a..b:C", "../x:C", 5, ""])
def test_an_architecture_names_module_and_class(value: object) -> None:
    """``package.module:Class``, nested classes too."""
    assert set(refusal(PYTORCH, architecture=value)) == {"architecture"}
    assert ModelConfig(**{**PYTORCH, "architecture": "a.b:C.D"}).architecture == "a.b:C.D"


def test_a_class_named_with_a_dot_is_guessed() -> None:
    """As Python itself writes it."""
    assert "did you mean 'a.b:Net'?" in refusal(PYTORCH, architecture="a.b.Net")["architecture"]


# Installed families


def test_whether_the_family_is_installed_is_checked_separately(llama: Any) -> None:
    """Constructing needs no plugin; the question is answered by the registry's own error."""
    ModelConfig(**FAMILY).check_installed()
    ModelConfig(**WHOLE).check_installed()
    ModelConfig(**PYTORCH).check_installed()
    with pytest.raises(UnknownModelTypeError, match="no installed plugin provides model type 'lama'") as caught:
        ModelConfig(**{**FAMILY, "model_type": "lama"}).check_installed()
    assert "did you mean 'llama'?" in caught.value.hint


def test_a_blocked_family_is_not_installed(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the variable that blocks it is named."""
    monkeypatch.setenv("SPLITLEARN_DISABLE_PLUGINS", "llama")
    with pytest.raises(UnknownModelTypeError, match="SPLITLEARN_DISABLE_PLUGINS"):
        ModelConfig(**FAMILY).check_installed()


def test_a_misspelt_reserved_type_is_guessed_among_families_too(llama: Any) -> None:
    """The registry knows families alone."""
    with pytest.raises(UnknownModelTypeError) as caught:
        ModelConfig(**{**FAMILY, "model_type": "hugginface"}).check_installed()
    assert caught.value.hint.startswith("did you mean 'huggingface'? ")


def test_asking_imports_no_plugin(world: Any) -> None:
    """Installed metadata says it."""
    world.install("llama", world.marking("llama") + world.source("llama"))
    ModelConfig(**FAMILY).check_installed()
    with pytest.raises(UnknownModelTypeError):
        ModelConfig(**{**FAMILY, "model_type": "lama"}).check_installed()
    assert not world.marker("llama").exists()


def test_nothing_heavy_is_imported(llama: Any, tmp_path: Path) -> None:
    """Importing, making, asking, writing, reading and refusing need no torch, and YAML is imported when it is met."""
    code = (
        "import sys\n"
        "from splitlearn_core.manager.config import ModelConfig\n"
        "from splitlearn_core.manager.config import load_configs\n"
        "assert 'yaml' not in sys.modules\n"
        "config = ModelConfig(model_id='t', model_type='llama', component='trunk', split_points=(2, 4))\n"
        "config.check_installed()\n"
        "path = __import__('pathlib').Path(sys.argv[1])\n"
        "path.write_text(config.to_yaml())\n"
        "assert ModelConfig.from_file(path) == config\n"
        "try:\n    ModelConfig.from_dict({'model_id': '', 'dtype': 5})\n"
        "except ValueError:\n    pass\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'safetensors', 'huggingface_hub'} & set(sys.modules)))"
    )
    done = llama.python("-W", "error", "-c", code, str(tmp_path / "model.yaml"))
    assert done.stdout.splitlines() == ["[]"], done.stderr or done.stdout


# The token


def test_the_token_is_shown_nowhere() -> None:
    """Not in the repr, not in what is written, not in a refusal."""
    config = ModelConfig(**FAMILY, token="hf_secret")

    assert config.token == "hf_secret"
    written = [repr(config), str(config), str(config.to_dict()), config.to_yaml(), config.to_toml()]
    assert not any("secret" in text for text in written)
    assert "hf_secret" not in str(config.fingerprint)


@pytest.mark.parametrize("value", [["hf_secret"], "hf_secret\n", "", 5, {"hf_secret": 1}, "hf_secret\u00e9"])
def test_a_refused_token_is_not_shown(value: object) -> None:
    """Only what is wrong with it."""
    assert "secret" not in str(refusal(token=value))


def test_the_value_of_an_unknown_field_is_not_shown() -> None:
    """It may be a token under a misspelt name."""
    with pytest.raises(ConfigurationError) as caught:
        ModelConfig.from_dict({**FAMILY, "tokn": "hf_secret"})
    assert "secret" not in str(caught.value)
    assert problems(caught.value) == {"tokn": "unknown field; did you mean 'token'?"}


# Mappings


@pytest.mark.parametrize(
    ("given", "meant"), [("componet", "component"), ("keepalive", "keep_alive"), ("Device", "device")]
)
def test_unknown_fields_are_guessed(given: str, meant: str) -> None:
    """And listed with the other problems."""
    with pytest.raises(ConfigurationError) as caught:
        ModelConfig.from_dict({**FAMILY, given: "x", "dtype": "int4"})
    assert problems(caught.value)[given] == f"unknown field; did you mean {meant!r}?"
    assert "dtype" in problems(caught.value)


@pytest.mark.parametrize("key", ["zzzzzz", 5, None, "a\nb", ("a",), "x" * 500])
def test_an_unknown_field_like_no_other_lists_all(key: object) -> None:
    """On one line, whatever the key is."""
    with pytest.raises(ConfigurationError) as caught:
        ModelConfig.from_dict({**FAMILY, key: 1})
    (line,) = caught.value.message.splitlines()[1:]
    assert "there are model_id, model_type, " in line
    assert len(line) < 600


def test_missing_names_are_missed() -> None:
    """An empty mapping lacks both."""
    with pytest.raises(ConfigurationError) as caught:
        ModelConfig.from_dict({})
    assert set(problems(caught.value)) == {"model_id", "model_type"}
    assert "'huggingface' or 'pytorch'" in problems(caught.value)["model_type"]


@pytest.mark.parametrize("value", [None, [], "model_id: a", 5])
def test_what_is_no_mapping_is_refused(value: Any) -> None:
    """With a configuration error, not an attribute error."""
    with pytest.raises(ConfigurationError, match="not a mapping"):
        ModelConfig.from_dict(value)


def test_values_of_any_size_and_depth_are_shown_on_a_line() -> None:
    """What a file may hold does not flood the log, nor break the message."""
    bomb: Any = "x"
    for _ in range(40):
        bomb = [bomb] * 9
    loop: list[Any] = []
    loop.append(loop)
    for value in (bomb, loop, "y" * 10**6, 10**6000, {n: n for n in range(10**4)}, [10**6000]):
        for name in ("model_id", "component", "split_points", "device", "keep_alive", "warmup", "load_threads"):
            text = refusal(**{name: value})[name]
            assert len(text) < 500


def test_a_dict_holds_what_is_not_the_default() -> None:
    """In plain values, and the two names always."""
    config = ModelConfig(**FAMILY, keep_alive=-1, device="cpu", warmup=True, token="x")

    assert config.to_dict() == {
        "model_id": "t",
        "model_type": "llama",
        "component": "trunk",
        "split_points": [2, 4],
        "warmup": True,
        "keep_alive": -1,
    }
    assert json.loads(json.dumps(config.to_dict(), allow_nan=False)) == config.to_dict()


# Round trips

NASTY = [
    "plain", "yes", "null", "~", "1.5", "0x1F", "2024-01-01", "=", "<<", "a: b", "- a", "# a", "'", '"', "\\", "{a}",
    "a # b", "%x", "@x", "`x", "&x *x", "!!int 5", " lead", "trail ", "tab\there", "line\nbreak", "cr\rlf\r\n",
    "bell\x07", "del\x7f", "nel\x85", "ls\u2028", "bom\ufeff", "größe", "模型", "😀", "\U0001d54f", "x" * 300,
    "word " * 60, "\\u0041", "on", "-", "?", "1:30",
]  # fmt: skip

CONFIGS = [
    ModelConfig(**FAMILY),
    ModelConfig(**WHOLE),
    ModelConfig(**PYTORCH),
    ModelConfig(
        **{**FAMILY, "component": Component.TOP},
        model_path="org/model", device="cuda:3", dtype="torch.bfloat16", max_memory_mb=1500.5, warmup=True,
        keep_alive="1h30m", pinned=True, required=True, allow_paging=True, strategy="copied", strict=True,
        attn_implementation="eager", revision="main", cache_dir="/cache", local_files_only=True, load_threads=3,
    ),
    ModelConfig(**FAMILY, host="process", restart_limit=0),
    ModelConfig(**{**PYTORCH, "architecture": None}, allow_pickle=True),
    *(ModelConfig(**FAMILY, keep_alive=value) for value in (0, -1, math.inf, 1e-07, 1e10, 300, 0.1, 123456789.125)),
    *(ModelConfig(**FAMILY, max_memory_mb=value) for value in (2**43, 1e-300, 0.1, 1, 2.0**43)),
    *(ModelConfig(**FAMILY, model_path=text, revision=text) for text in NASTY),
    *(ModelConfig(**{**FAMILY, "model_id": text}) for text in NASTY if text.isprintable() and text == text.strip()
      and len(text) <= 128 and not {"/", "\\"} & set(text)),
]  # fmt: skip

WRITERS: dict[str, Callable[[ModelConfig], str]] = {
    ".yaml": ModelConfig.to_yaml,
    ".yml": ModelConfig.to_yaml,
    ".toml": ModelConfig.to_toml,
    ".json": lambda config: json.dumps(config.to_dict(), allow_nan=False),
}


@pytest.mark.parametrize("suffix", WRITERS)
def test_files_give_back_what_was_written(suffix: str, tmp_path: Path) -> None:
    """Every field, every awkward text, for ever too: equal, and of the same types."""
    path = tmp_path / f"model{suffix}"
    for config in CONFIGS:
        path.write_bytes(WRITERS[suffix](config).encode())
        back = ModelConfig.from_file(path)
        assert back == config, path.read_text()
        for name in FIELDS:
            assert type(getattr(back, name)) is type(getattr(config, name)), (name, path.read_text())


def test_dicts_give_back_what_was_written() -> None:
    """Without any file."""
    for config in CONFIGS:
        assert ModelConfig.from_dict(config.to_dict()) == config


def test_the_round_trips_cover_every_field() -> None:
    """All but the token, which is never written."""
    written = {name for config in CONFIGS for name in config.to_dict()}
    # Options need a host of a plugin: test_plugins_hosts.
    assert written == set(FIELDS) - {"token", "host_options"}


def test_toml_is_read_by_others_too() -> None:
    """What is written is TOML as the standard library reads it."""
    for config in CONFIGS:
        assert tomllib.loads(config.to_toml()) == config.to_dict()


@pytest.mark.parametrize(
    ("suffix", "text"),
    [(".yaml", "keep_alive: .inf"), (".toml", "keep_alive = inf"), (".json", '"keep_alive": Infinity')],
)
def test_each_format_may_say_infinity_its_own_way(suffix: str, text: str, tmp_path: Path) -> None:
    """As well as -1 and "inf"."""
    path = tmp_path / f"model{suffix}"
    written = WRITERS[suffix](ModelConfig(**FAMILY))
    path.write_text(f"{written[:-1]}, {text}}}" if suffix == ".json" else f"{written}{text}\n")
    assert ModelConfig.from_file(path).keep_alive == math.inf


# The fingerprint


@pytest.mark.parametrize(
    "name", [name for name in FIELDS if name not in ("architecture", "allow_pickle", "host_options")]
)
def test_the_fingerprint_distinguishes_loads(name: str) -> None:
    """It is the same but for what does not change the load."""
    other: dict[str, Any] = {
        "model_id": "u", "model_type": "gpt2", "model_path": "x", "component": "top", "split_points": (2, 5),
        "device": "cuda", "dtype": "float16", "max_memory_mb": 5, "keep_alive": 5, "strategy": "mapped",
        "attn_implementation": "eager", "revision": "main", "cache_dir": "c", "token": "t", "load_threads": 1,
        "host": "process", "restart_limit": 5,
    }  # fmt: skip
    config = ModelConfig(**FAMILY, **({"host": "process"} if name == "restart_limit" else {}))
    changed = dataclasses.replace(config, **{name: other.get(name, True)})

    assert changed != config
    same = changed.fingerprint == config.fingerprint
    assert same == (name in {"keep_alive", "pinned", "required", "restart_limit", "token"})
    assert (hash(changed.fingerprint) == hash(config.fingerprint)) == same


# Files of several models

SEVERAL = {
    ".yaml": """
manager:
  max_models: 2
models:
  - &trunk
    model_id: a
    model_type: llama
    component: trunk
    split_points: [2, 4]
    keep_alive: 5m
  - <<: *trunk
    model_id: b
    component: top
""",
    ".toml": """
[manager]
max_models = 2
[[models]]
model_id = "a"
model_type = "llama"
component = "trunk"
split_points = [2, 4]
keep_alive = "5m"
[[models]]
model_id = "b"
model_type = "llama"
component = "top"
split_points = [2, 4]
keep_alive = 300
""",
    ".json": """
{"manager": {"max_models": 2}, "models": [
  {"model_id": "a", "model_type": "llama", "component": "trunk", "split_points": [2, 4], "keep_alive": "5m"},
  {"model_id": "b", "model_type": "llama", "component": "top", "split_points": [2, 4], "keep_alive": 300}
]}
""",
}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a file of a suffix."""

    def write(suffix: str, content: str | bytes) -> Path:
        path = tmp_path / f"models{suffix}"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


def failure(path: Path, read: Callable[[Path], Any] = read_config_file) -> ConfigurationError:
    with pytest.raises(ConfigurationError) as caught:
        read(path)
    assert caught.value.hint
    return caught.value


@pytest.mark.parametrize("suffix", SEVERAL)
def test_a_file_of_models_is_the_same_in_each_format(suffix: str, write: Callable[..., Path]) -> None:
    """The models in their order, and what it says of the manager, apart."""
    path = write(suffix, SEVERAL[suffix])

    expected = tuple(
        ModelConfig(model_id=name, model_type="llama", component=component, split_points=(2, 4), keep_alive=300)
        for name, component in (("a", "trunk"), ("b", "top"))
    )
    assert read_config_file(path) == ConfigFile(expected, {"max_models": 2})
    assert load_configs(path) == expected
    assert load_configs(str(path)) == expected


def test_what_is_said_of_the_manager_cannot_be_changed(write: Callable[..., Path]) -> None:
    """And it is empty if nothing is given."""
    with pytest.raises(TypeError):
        read_config_file(write(".yaml", SEVERAL[".yaml"])).manager["x"] = 1  # type: ignore[index]
    assert read_config_file(write(".yaml", "models: []")) == ConfigFile((), {})


def test_all_problems_of_all_models_are_listed_with_their_places(write: Callable[..., Path]) -> None:
    """Unknown keys, ids given twice and entries that are none among them."""
    path = write(
        ".yaml",
        """
modles: 1
device: cpu
manager: [1]
models:
  - {model_id: a, model_type: llama, component: trunk, split_points: [2, 4]}
  - just a text
  - {model_id: a, model_type: llama, component: middel, split_point: [2, 4]}
  - {model_id: 7, model_type: pytorch, allow_pickle: "yes"}
""",
    )

    error = failure(path)

    assert error.message.startswith(f"{path} has 11 problems:\n")
    reported = problems(error)
    assert reported == {
        "modles": "unknown key at the top level; did you mean 'models'?",
        "device": "unknown key at the top level; there are manager, http, sessions, models; it belongs in an entry of "
        "models",
        "manager": "[1] is not a table of settings",
        "models[1]": "'just a text' is not a table of a model's fields",
        "models[2].split_point": "unknown field; did you mean 'split_points'?",
        "models[2].component": "'middel' is none of bottom, trunk, top",
        "models[2].split_points": "missing; a family's model is cut into components, so layer numbers such as (2, 10) "
        "are needed",
        "models[2].model_id": "'a' is also the id of models[0]; give it another",
        "models[3].model_id": "7 is not a string; put it in quotes",
        "models[3].allow_pickle": "'yes' is neither true nor false",
        "models[3].model_path": "missing; give the path of the .pt or .pth file",
    }


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("manager: {}", "models: missing"),
        ("models:", "models: None is not a list"),
        ("models: {a: {model_type: llama}}", "is not a list; each model is one entry"),
        ("models: a", "models: 'a' is not a list"),
        ("", "contains nothing, not a table"),
        ("- a", "contains ['a'], not a table"),
        ("just a text", "contains 'just a text', not a table"),
    ],
)
def test_a_file_without_models_is_refused(text: str, words: str, write: Callable[..., Path]) -> None:
    """Whatever it holds instead."""
    assert words in failure(write(".yaml", text)).message


def test_one_model_may_stand_in_a_list(write: Callable[..., Path]) -> None:
    """``from_file`` takes a file of fields, or a list of one, and says what it does with more."""
    one = "models:\n- {model_id: t, model_type: llama, component: trunk, split_points: [2, 4]}\n"
    assert ModelConfig.from_file(write(".yaml", one)) == ModelConfig(**FAMILY)

    error = failure(write(".yaml", SEVERAL[".yaml"]), ModelConfig.from_file)
    assert "describes 2 models, not one" in error.message
    assert "load_configs" in error.hint


def test_problems_of_a_single_model_name_the_file(write: Callable[..., Path]) -> None:
    """With places that need no index."""
    path = write(".toml", 'model_id = "a"\nmodel_type = "llama"\ncomponent = "tip"\n')
    error = failure(path, ModelConfig.from_file)
    assert error.message.startswith(f"{path} has 2 problems:")
    assert set(problems(error)) == {"component", "split_points"}


@pytest.mark.parametrize(
    "name", ["models.yaml", "models.toml", "models.json", "models", "models.txt", "file.yaml/models.yaml"]
)
@pytest.mark.parametrize("read", [ModelConfig.from_file, load_configs, read_config_file])
def test_a_missing_file_is_missing(name: str, read: Callable[[Path], Any], tmp_path: Path) -> None:
    """Whatever its suffix; the folder that was looked in is named."""
    (tmp_path / "file.yaml").touch()
    with pytest.raises(MissingFileError, match="looked in") as caught:
        read(tmp_path / name)
    assert isinstance(caught.value, FileNotFoundError)
    assert caught.value.hint


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    """It is there, and cannot be read."""
    (tmp_path / "models.yaml").mkdir()
    assert "cannot be read" in failure(tmp_path / "models.yaml").message


def test_other_suffixes_are_refused(write: Callable[..., Path]) -> None:
    """The nearest is guessed."""
    assert "did you mean '.yaml'?" in failure(write(".yaaml", "models: []")).message
    assert ".yaml, .yml, .toml, .json" in failure(write("", "models: []")).message
    assert load_configs(write(".YAML", "models: []")) == ()


@pytest.mark.parametrize(
    ("suffix", "content", "place", "why"),
    [
        (".yaml", "models:\n  - a: [1,\n", "line 3, column 1", ""),
        (".yaml", "models: []\n  x: 1\n", "line 2, column 3", ""),
        (".yaml", "models: []\nmodels: []\n", "line 2, column 1", "'models' occurs twice"),
        (".yaml", "models:\n- {model_id: a, model_id: b}\n", "line 2, column 17", "'model_id' occurs twice"),
        (".yaml", "a: !!python/object/apply:os.getcwd []\n", "line 1, column 4", "not determine a constructor"),
        (".yaml", "models: [2024-13-45]\n", "line 1, column 10", "'2024-13-45' cannot be read as timestamp"),
        (".yaml", "a: !!bool maybe\n", "line 1, column 4", "'maybe' cannot be read as bool"),
        (".yaml", "a: 1\n---\nb: 1\n", "line 2, column 1", "single document"),
        (".yaml", "a: 1\nb: *nowhere\n", "line 2, column 4", "undefined alias"),
        (".yaml", "a: 1\nb: \x07\n", "line 2, column 4", "U+0007"),
        (".yaml", "{[a]: 1}\n", "line 1, column 2", "unhashable"),
        (".toml", 'a = 1\nb = "x\n', "line 2, column 7", "Illegal character"),
        (".toml", "a = 1\na = 2\n", "line 2, column 6", "overwrite"),
        (".toml", "a = 1\nb = [1,", "line 2, column 8", ""),
        (".json", '{"a": 1,\n "b" 2}', "line 2, column 6", "delimiter"),
        (".json", "", "line 1, column 1", "Expecting value"),
        (".yaml", b"a: 1\nb: \xff\n", "line 2, column 4", "0xff is not UTF-8"),
        (".toml", b"a: 1\nb: \xff\n", "line 2, column 4", "0xff is not UTF-8"),
    ],
)  # fmt: skip
def test_contradicting_the_format_is_placed(
    suffix: str, content: str | bytes, place: str, why: str, write: Callable[..., Path]
) -> None:
    """Line and column count from one, as editors do."""
    path = write(suffix, content)
    error = failure(path)
    assert error.message.startswith(f"{path}, {place}: "), error.message
    assert why in error.message
    assert len(error.message.splitlines()) == 1


def test_a_syntax_error_shows_no_line_of_the_file(write: Callable[..., Path]) -> None:
    """A token may stand in it."""
    for suffix, content in (
        (".yaml", "token: [hf_secret"),
        (".toml", 'token = "hf_secret'),
        (".json", '{"token": "hf_secret}'),
    ):
        assert "secret" not in str(failure(write(suffix, content)))


def test_a_key_twice_in_json_is_refused(write: Callable[..., Path]) -> None:
    """The standard reader would take the last."""
    assert "'models' occurs twice" in failure(write(".json", '{"models": [], "models": []}')).message


@pytest.mark.parametrize(
    ("suffix", "content"),
    [
        (".json", '{"models": ' + "[" * 100_000),
        (".yaml", "models: " + "[" * 5_000),
        (".toml", "models = " + "[" * 5_000),
        (".json", '{"models": ' + "9" * 5_000 + "}"),
        (".yaml", "models: " + "9" * 5_000),
        (".toml", "models = " + "9" * 5_000),
        (".yaml", "models: 0x" + "f" * 5_000),
    ],
)
def test_hostile_files_are_refused_like_others(suffix: str, content: str, write: Callable[..., Path]) -> None:
    """Depth and numbers beyond what Python reads end in our error."""
    assert len(failure(write(suffix, content)).message) < 6_000


def test_a_small_file_of_many_aliases_is_refused_at_once(write: Callable[..., Path]) -> None:
    """It stands for 9**9 values, and is never written out."""
    lines = ["x0: &x0 [a]"] + [f"x{n}: &x{n} [{', '.join([f'*x{n - 1}'] * 9)}]" for n in range(1, 10)]
    assert len(failure(write(".yaml", "\n".join([*lines, "models: *x9"]))).message) < 5_000


def test_a_mark_before_the_text_is_overlooked(write: Callable[..., Path]) -> None:
    """Editors on Windows put it there, and end lines their way."""
    for suffix, text in SEVERAL.items():
        path = write(suffix, b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
        assert len(load_configs(path)) == 2


def test_merged_mappings_may_repeat_keys(write: Callable[..., Path]) -> None:
    """Merging is how YAML overrides; a key written twice is still refused, in whatever order they are read."""
    text = """
models:
- &b
  <<: &a {model_id: x, model_type: llama, component: trunk, split_points: [2, 4]}
  model_id: b
- <<: *b
  model_id: c
- <<: *a
"""
    assert [config.model_id for config in load_configs(write(".yaml", text))] == ["b", "c", "x"]
