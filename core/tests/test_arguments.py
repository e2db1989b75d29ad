"""Arguments under the names of other libraries are accepted or explained; paths may begin with ``~``."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from splitlearn_core import (
    ConfigurationError,
    ModelConfig,
    ModelFactory,
    ModelLoader,
    SplitCausalLM,
    SplitLearnError,
    SplitModel,
    UnexpectedArgumentError,
    UnknownModelTypeError,
    load_component,
    load_split_directory,
    load_split_model,
    merge_split,
    plan_fetch,
    plan_split,
    save_split,
)
from splitlearn_core.adapters.adapter_files import check_adapter_target
from splitlearn_core.arguments import FOREIGN, RENAMED, user_path
from splitlearn_core.checkpoint.source import open_source
from splitlearn_core.manager.config import load_configs
from splitlearn_core.storage.directory import verify_saved
from splitlearn_core.types import DTYPE_ALIASES, FLOAT_DTYPES, dtype_name, nearest_dtype

pytestmark = pytest.mark.libs

CUTS = (2, 4)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("fp16", "float16"), ("half", "float16"), ("torch.half", "float16"), (torch.float16, "float16"),
        ("F16", "float16"), ("bf16", "bfloat16"), (torch.bfloat16, "bfloat16"), ("float", "float32"),
        (float, "float32"), ("FP32", "float32"),
        (np.float32, "float32"), (np.dtype("float64"), "float64"), ("double", "float64"), (" float32 ", "float32"),
        ("auto", "auto"), (None, "auto"),
    ],
)  # fmt: skip
def test_a_dtype_has_many_names(given: object, name: str) -> None:
    """Every spelling of a floating dtype becomes the name of torch."""
    assert dtype_name(given) == name


def test_each_alias_agrees_with_torch() -> None:
    """If torch has the short name, it is the same dtype."""
    for alias, name in DTYPE_ALIASES.items():
        assert name in FLOAT_DTYPES
        assert getattr(torch, alias, getattr(torch, name)) is getattr(torch, name)


@pytest.mark.parametrize("given", ["float7", "int8", "", "torch.int64", torch.int8, 16, "fp 16"])
def test_other_dtypes_are_returned_unchanged(given: object) -> None:
    """The refusal quotes them, with the nearest valid name."""
    name = dtype_name(given)
    assert name == str(given)
    assert nearest_dtype(name) in FLOAT_DTYPES


def test_the_dtype_is_loaded(llama: Any, single: Path) -> None:
    """An alias, the old name of the argument, and a dtype for each component are accepted."""
    for how in ({"dtype": "half"}, {"torch_dtype": torch.float16}, {"torch_dtype": "fp16"}):
        parts: Any = load_split_model("llama", CUTS, single, parts=("trunk",), **how)
        assert parts.trunk.dtype is torch.float16
    assert plan_split(single, CUTS, dtype={"trunk": "bf16", "top": "fp32"}).components[1].dtype == "bfloat16"
    with pytest.raises(ConfigurationError) as caught:
        load_split_model("llama", CUTS, single, dtype="float61")
    assert "'float64'" in caught.value.hint


class TestTheModelInTheTypesPlace:
    def test_a_path(self, llama: Any, single: Path) -> None:
        """As text and as path, with the same components as by name."""
        expected = load_split_model(None, CUTS, single)
        for given in (single, str(single)):
            parts = load_split_model(given, CUTS)
            for part, other in zip(parts, expected, strict=True):
                assert all(map(torch.equal, part.state_dict().values(), other.state_dict().values()))
        kept = ModelFactory.create_split_models(single, None, *CUTS)
        assert kept.trunk.layer_range == expected.trunk.layer_range

    def test_by_the_argument_of_transformers(self, llama: Any, single: Path) -> None:
        """``pretrained_model_name_or_path`` is the model."""
        parts: Any = load_split_model(split_points=CUTS, pretrained_model_name_or_path=single, parts=("top",))
        assert parts.top is not None

    @pytest.mark.parametrize("name", ["someone/llama-1b", "bundled:llama", "./llama", "~/llama", "C:\\models\\llama"])
    def test_two_models(self, llama: Any, single: Path, name: str) -> None:
        """What is no model type is not taken for one; both arguments are named."""
        with pytest.raises(ConfigurationError, match="two models are named") as caught:
            load_split_model(name, CUTS, single)
        assert "model_type=" in str(caught.value)
        assert "model_name_or_path=" in str(caught.value)

    def test_a_type_that_is_a_directory_too(self, llama: Any, single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Nothing is guessed: the error has both ways to say what is meant."""
        monkeypatch.chdir(single.parent)
        (single.parent / "llama").symlink_to(single)
        (single.parent / "my-model").symlink_to(single)
        with pytest.raises(ConfigurationError) as caught:
            load_split_model("llama", CUTS)
        assert "model_name_or_path='./llama'" in caught.value.hint
        assert load_split_model("my-model", CUTS, parts=("trunk",)).trunk.layer_range.start == CUTS[0]

    def test_an_existing_path_that_is_not_a_type_is_a_path(
        self, llama: Any, single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Saved components, a file, an empty folder: the answer is that of the same name with ./ before it."""
        monkeypatch.chdir(tmp_path)
        save_split(single, "saved", CUTS)
        (tmp_path / "empty").mkdir()
        (tmp_path / "weights.safetensors").write_bytes((single / "model.safetensors").read_bytes())
        for name in ("saved", "empty", "weights.safetensors"):
            answers = []
            for given in (name, f"./{name}"):
                with pytest.raises(SplitLearnError) as caught:
                    load_split_model(given, CUTS)
                answers.append(str(caught.value).replace("./", ""))
            assert answers[0] == answers[1]
            assert "model_type" not in answers[0]
        (tmp_path / "llama").mkdir()
        save_split(single, "llama", CUTS, overwrite=True)
        with pytest.raises(ConfigurationError, match="'llama' is a model type, and there is a directory"):
            load_split_model("llama", CUTS)

    def test_a_bare_name(self, llama: Any) -> None:
        """It may be a model's or a type's; the error says where each stands."""
        with pytest.raises(UnknownModelTypeError) as caught:
            load_split_model("gpt2-medium", CUTS)
        assert "model_name_or_path='gpt2-medium'" in caught.value.hint

    def test_cuts_as_two_arguments(self) -> None:
        """The pair is proposed."""
        wrong: Any = 5
        with pytest.raises(ConfigurationError) as caught:
            load_split_model("bundled:gpt2", 1, wrong)  # type: ignore[arg-type]
        assert "(1, 5)" in caught.value.hint


def functions() -> list[Callable[..., Any]]:
    return [
        load_split_model, plan_split, plan_fetch, save_split, load_component, load_split_directory,
        ModelFactory.create_split_models,
    ]  # fmt: skip


@pytest.mark.parametrize("function", functions(), ids=lambda function: function.__name__)
class TestForeignArguments:
    def test_each_is_explained(self, function: Callable[..., Any]) -> None:
        """A name of transformers is refused by name with what to do, as a ValueError and as a TypeError."""
        own = inspect.signature(function).parameters
        for name, foreign in FOREIGN.items():
            if name in own:
                continue
            with pytest.raises(UnexpectedArgumentError, match=f"unexpected keyword argument {name!r}") as caught:
                function(**{name: object()})
            assert foreign.hint in caught.value.hint
            assert isinstance(caught.value, TypeError)

    def test_slips_have_the_nearest(self, function: Callable[..., Any]) -> None:
        """All at once, as all errors of arguments."""
        name = list(inspect.signature(function).parameters)[-1]
        with pytest.raises(UnexpectedArgumentError) as caught:
            function(**{f"{name}s": 1, "no_such_thing_at_all": 2})
        assert f"did you mean {name}?" in caught.value.hint
        assert "no_such_thing_at_all" in caught.value.message


def test_arguments_without_effect_are_accepted(llama: Any, single: Path) -> None:
    """Arguments that request the normal behaviour change nothing."""
    parts: Any = load_split_model(
        single,
        CUTS,
        parts=("trunk",),
        low_cpu_mem_usage=True,
        trust_remote_code=False,
        load_in_8bit=False,
        subfolder="",
    )
    assert parts.trunk is not None
    for value in (True, 1):
        with pytest.raises(UnexpectedArgumentError, match="trust_remote_code"):
            load_split_model(single, CUTS, trust_remote_code=value)
    with pytest.raises(UnexpectedArgumentError, match="weights_only"):
        load_split_model(single, CUTS, weights_only=np.zeros(3))


def test_one_argument_by_two_names(llama: Any, single: Path) -> None:
    """Both are named."""
    for arguments in (
        {"split_points": CUTS, "dtype": "auto", "torch_dtype": "half"},
        {"split_points": CUTS, "model_name_or_path": single, "pretrained_model_name_or_path": single},
    ):
        with pytest.raises(UnexpectedArgumentError, match="another name of"):
            load_split_model("llama", **arguments)
    with pytest.raises(UnexpectedArgumentError, match="another name of"):
        plan_split(single, CUTS, pretrained_model_name_or_path=single)


def test_the_tables_do_not_name_arguments_of_ours() -> None:
    """Every renamed argument has a target, and no name is in both tables."""
    ours = {name for function in functions() for name in inspect.signature(function).parameters}
    assert set(RENAMED.values()) <= ours
    assert not RENAMED.keys() & FOREIGN.keys()


class TestSplitModel:
    def test_repr(self, llama: Any, single: Path) -> None:
        """One line; a part that is not there is None."""
        ends = load_split_model("llama", CUTS, single, parts=("bottom", "top"), dtype="bf16")
        assert repr(ends) == (
            "SplitModel(bottom=<llama bottom, layers [0, 2), bfloat16, cpu>, trunk=None, "
            "top=<llama top, layers [4, 6), bfloat16, cpu>)"
        )
        assert "LlamaDecoderLayer" in repr(ends.bottom)

    def test_attributes_of_models_are_explained(self) -> None:
        """It is a tuple; the error says where a model's methods are, and hasattr returns False."""
        parts: Any = SplitModel(None, None, None)
        for name, way in (
            ("to", "load_split_model"),
            ("generate", "SplitCausalLM(*parts)"),
            ("eval", "evaluation mode"),
        ):
            with pytest.raises(AttributeError) as caught:
                getattr(parts, name)
            assert way in str(caught.value)
        assert not hasattr(parts, "no_such_attribute")
        assert parts == (None, None, None)
        assert parts._fields == ("bottom", "trunk", "top")

    def test_joining_missing_components_is_refused(self, llama: Any, single: Path) -> None:
        """The part that was not loaded is named."""
        with pytest.raises(ConfigurationError, match="trunk is None: it was not loaded"):
            SplitCausalLM(*load_split_model("llama", CUTS, single, parts=("bottom", "top")))


@pytest.fixture
def home(llama: Any, single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a home with a model ``m``; the working directory is another folder."""
    folder, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    shutil.copytree(single, folder / "m")
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(elsewhere)
    return folder


def test_functions_expand_the_home(home: Path) -> None:
    assert plan_split("~/m", CUTS).num_layers == 6
    assert load_split_model(None, CUTS, "~/m", parts=("trunk",)).trunk is not None
    save_split("~/m", "~/parts", CUTS)
    assert (home / "parts/trunk/config.json").is_file()
    assert load_split_directory("~/parts").trunk is not None
    assert load_component("~/parts", "trunk").start_layer == CUTS[0]
    assert verify_saved("~/parts").sound
    merge_split("~/parts", out="~/whole")
    assert (home / "whole/config.json").is_file()
    kept: dict[str, Any] = {"storage_path": "~/kept", "auto_save": True}
    ModelFactory.create_split_models("llama", "~/m", *CUTS, **kept)
    ModelFactory.create_split_models("llama", Path("~/m"), *CUTS, **kept)
    assert (home / "kept/trunk").is_dir()
    assert check_adapter_target("~/adapter") == home / "adapter"
    assert not list(Path.cwd().iterdir())


def test_the_manager_expands_the_home(home: Path) -> None:
    config = ModelConfig(model_id="trunk", model_type="llama", model_path="~/m", component="trunk", split_points=CUTS)
    assert ModelLoader.load_from_config(config) is not None
    models = [{"model_id": "trunk", "model_type": "llama", "model_path": "~/m", "component": "trunk"}]
    (home / "models.json").write_text(json.dumps({"models": [{**models[0], "split_points": list(CUTS)}]}))
    assert load_configs("~/models.json")[0].model_path == "~/m"


def test_cache_dir_expands_the_home(home: Path) -> None:
    """huggingface_hub expands only its own variables."""
    repository, commit = home / "cache/models--owner--name", "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(commit)
    shutil.copytree(home / "m", repository / "snapshots" / commit)
    source = open_source("owner/name", cache_dir="~/cache", local_files_only=True)
    assert source.path("config.json") == repository / "snapshots" / commit / "config.json"


@pytest.mark.parametrize(
    "arguments",
    [
        ("plan", "~/m", "--split", "2", "4"),
        ("split", "~/m", "--split", "2", "4", "--out", "~/new"),
        ("split", "~/m", "--split", "2", "4", "--out", "~/new", "--dry-run"),
        ("verify", "~/parts"),
        ("merge", "~/parts", "--out", "~/whole"),
        ("plugins", "new", "mistral", "--from", "~/mistral.json", "--dry-run"),
    ],
    ids=" ".join,
)
def test_the_command_line_expands_the_home(home: Path, cli: Callable[..., Any], arguments: tuple[str, ...]) -> None:
    """A shell does not expand the home in quotation marks, or after an equals sign."""
    if arguments[0] == "plugins":
        pytest.importorskip("splitlearn_auto", reason="the command is one of splitlearn-auto")
    save_split("~/m", "~/parts", CUTS)
    (home / "mistral.json").write_text(json.dumps({"model_type": "mistral"}))
    code, _, error = cli(*arguments)
    assert code == 0, error
    assert not list(Path.cwd().iterdir())


def test_the_home_of_an_unknown_user_is_refused() -> None:
    with pytest.raises(SplitLearnError, match="unknown user"):
        user_path("~nobody-of-this-name/m")
