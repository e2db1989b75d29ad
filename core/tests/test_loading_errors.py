"""What a load is refused for: the class of the error, its hint, and nothing half made."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from splitlearn_core import (
    ConfigurationError,
    InsufficientDiskError,
    InsufficientMemoryError,
    InvalidSplitError,
    MissingFileError,
    Progress,
    SplitLearnError,
    UnknownModelTypeError,
    errors,
    load_split_model,
    plan_split,
)

pytestmark = pytest.mark.usefixtures("llama")

CUTS = (2, 4)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"device": "nonsense"}, "nonsense"),
        ({"device": "meta"}, "meta"),
        ({"device": ""}, "''"),
        ({"device": None}, "None"),
        ({"device": "cpu:x"}, "cpu:x"),
        ({"device": "cuda:-1"}, "cuda:-1"),
        ({"dtype": "nonsense"}, "nonsense"),
        ({"dtype": torch.int8}, "int8"),
        ({"strategy": "nonsense"}, "nonsense"),
        ({"strategy": ""}, "''"),
        ({"strategy": None}, "None"),
        ({"parts": ["nonsense"]}, "nonsense"),
        ({"parts": ()}, "no component"),
        ({"attn_implementation": "nonsense"}, "nonsense"),
    ],
    ids=repr,
)
def test_nonsense_arguments_are_refused(single: Path, options: dict[str, Any], named: str) -> None:
    """Each is a ConfigurationError, so a ValueError, which names the value and has a hint."""
    with pytest.raises(ConfigurationError) as caught:
        load_split_model("llama", CUTS, single, **options)

    assert isinstance(caught.value, ValueError)
    assert named in caught.value.message
    assert caught.value.hint


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
@pytest.mark.parametrize("device", ["cuda", "cuda:0", "mps", "xla"])
def test_a_device_that_is_not_here_is_refused(single: Path, device: str) -> None:
    """The message names the device in one line, the hint what this machine has."""
    if device == "mps" and torch.backends.mps.is_available():
        pytest.skip("this machine has it")

    with pytest.raises(ConfigurationError, match=device) as caught:
        load_split_model("llama", CUTS, single, device=device)

    assert "\n" not in caught.value.message
    assert "cpu" in caught.value.hint


@pytest.mark.parametrize(
    "points",
    [(4, 2), (0, 3), (2, 6), (6,), (2, 4, 3), (1, 2, 3, 4, 5, 6), (2.0, 4), ("2", "4"), "24", None, 3],
    ids=repr,
)
def test_bad_split_points_are_refused(single: Path, points: Any) -> None:
    """By the plan and by the load, alike, as a ValueError."""
    with pytest.raises(InvalidSplitError) as planned:
        plan_split(single, points)
    with pytest.raises(InvalidSplitError) as loaded:
        load_split_model("llama", points, single)

    assert isinstance(loaded.value, ValueError)
    assert loaded.value.hint
    assert str(planned.value) == str(loaded.value)


def test_split_points_cannot_be_left_out(single: Path) -> None:
    """The hint names points that cut this model."""
    with pytest.raises(InvalidSplitError, match="0 split points") as caught:
        load_split_model("llama", model_name_or_path=single)

    assert "(2, 4)" in caught.value.hint


def test_a_contradicted_model_type_is_refused(single: Path) -> None:
    """The caller's type and config.json's are both in the message."""
    with pytest.raises(ConfigurationError) as caught:
        load_split_model("falcon9", CUTS, single)

    assert "'falcon9'" in caught.value.message
    assert "'llama'" in caught.value.message
    assert "'llama'" in caught.value.hint


def test_neither_model_nor_type(world: Any) -> None:
    """Nothing to go by is an error, not a guess."""
    with pytest.raises(ConfigurationError) as caught:
        load_split_model(None, CUTS)

    assert caught.value.hint


def test_a_family_without_a_default_model(world: Any) -> None:
    """A type alone is enough only where its family names a model."""
    with pytest.raises(ConfigurationError, match="'llama' names no default model") as caught:
        load_split_model("llama", CUTS)

    assert caught.value.hint


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("bundled:llama", MissingFileError),
        ("bundled:falcon9", UnknownModelTypeError),
        ("bundled:", UnknownModelTypeError),
    ],
)
def test_what_is_not_bundled_is_missing(name: str, expected: type[Exception]) -> None:
    """A plugin that carries no model, and a type without a plugin."""
    with pytest.raises(expected) as caught:
        plan_split(name, CUTS)

    assert caught.value.hint  # type: ignore[attr-defined]


def test_a_bundled_model_is_found_next_to_its_plugin(world: Any, single: Path) -> None:
    """``bundled:TYPE`` is the folder that the plugin names."""
    source = world.source("llama").replace(
        'architecture="LlamaForCausalLM"', 'architecture="LlamaForCausalLM", bundled_checkpoint="carrier:model"'
    )
    world.install("llama", source, distribution="splitlearn-carrier")
    (world.folder / "splitlearn_llama-1.0.dist-info" / "entry_points.txt").unlink()
    carrier = world.folder / "carrier"
    carrier.mkdir()
    (carrier / "__init__.py").touch()
    single.rename(carrier / "model")

    assert plan_split("bundled:llama", CUTS).num_layers == 6


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the machine say that it has no memory left."""
    reading = psutil.virtual_memory()._replace(available=1000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: reading)


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("options", [{"strategy": "copied"}, {"dtype": "float16"}], ids=["copied", "converted"])
def test_too_little_memory_is_said_before_reading(single: Path, options: dict[str, Any]) -> None:
    """A RuntimeError of ours with need and supply, before any tensor is read."""
    stages: list[Progress] = []

    with pytest.raises(InsufficientMemoryError, match=r"copied|mapped") as caught:
        load_split_model("llama", CUTS, single, progress=stages.append, **options)

    assert isinstance(caught.value, RuntimeError)
    assert "GiB" in caught.value.message
    assert caught.value.hint
    assert not {"building", "reading", "ready"} & {progress.stage for progress in stages}


@pytest.mark.usefixtures("little_memory")
def test_a_mapped_file_needs_no_memory(single: Path) -> None:
    """Views of the file fit where no copy would."""
    assert load_split_model("llama", CUTS, single).trunk is not None


def test_an_architecture_that_is_not_there_is_the_plugins_fault(world: Any, single: Path) -> None:
    """A family that names no class of transformers."""
    world.install("llama", world.source("llama").replace("LlamaForCausalLM", "NoSuchModel"), version="2.0")
    (world.folder / "splitlearn_llama-1.0.dist-info" / "entry_points.txt").unlink()

    with pytest.raises(errors.BrokenPluginError, match="NoSuchModel") as caught:
        load_split_model("llama", CUTS, single)

    assert caught.value.hint


def test_a_callback_that_raises_stops_the_load(single: Path) -> None:
    """Its exception comes through as it is, and the next load works."""

    class StopError(Exception):
        pass

    def stop(progress: Progress) -> None:
        if progress.stage == "reading":
            raise StopError

    with pytest.raises(StopError):
        load_split_model("llama", CUTS, single, progress=stop)

    assert load_split_model("llama", CUTS, single).top is not None


def test_a_failed_load_leaves_no_thread_and_no_state(single: Path) -> None:
    """After an error the process is as before, and a good load works."""
    before = (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled())

    for _ in range(3):
        with pytest.raises(ConfigurationError):
            load_split_model("llama", CUTS, single, device="nonsense")
    for thread in threading.enumerate():
        if thread.name == "splitlearn-read-ahead":
            thread.join(10)

    assert (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled()) == before
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("splitlearn")]
    assert load_split_model("llama", CUTS, single).bottom is not None


ALL_ERRORS = [
    value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, SplitLearnError)
]


@pytest.mark.parametrize("kind", ALL_ERRORS, ids=[kind.__name__ for kind in ALL_ERRORS])
def test_every_error_survives_pickling_and_copying(kind: type[SplitLearnError]) -> None:
    """A worker process can hand it to its parent: message, hint and class."""
    error = kind("what happened", hint="what to do")

    for other in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(other) is kind
        assert (other.message, other.hint) == ("what happened", "what to do")
        assert str(other) == "what happened\nwhat to do"
    assert str(kind("what happened")) == "what happened"


@pytest.mark.parametrize(
    ("kind", "built_in"),
    [
        (errors.UnknownModelTypeError, KeyError),
        (errors.MissingFileError, FileNotFoundError),
        (errors.InvalidCheckpointError, ValueError),
        (errors.TensorMismatchError, ValueError),
        (errors.ConfigurationError, ValueError),
        (errors.InvalidSplitError, ValueError),
        (errors.InsufficientMemoryError, RuntimeError),
        (InsufficientDiskError, OSError),
    ],
)
def test_an_error_is_the_built_in_a_caller_expects(kind: type[Exception], built_in: type[Exception]) -> None:
    """Code that knows nothing of splitlearn can catch it."""
    assert issubclass(kind, built_in)


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    """Every class is drawn, with its built-in base in brackets."""
    drawn = errors.__doc__ or ""

    for kind in ALL_ERRORS:
        assert kind.__name__ in drawn
        for base in kind.__bases__:
            if base.__module__ == "builtins" and base is not Exception:
                line = next(line for line in drawn.splitlines() if kind.__name__ in line)
                assert f"({base.__name__})" in line


#: Command-line arguments that fail, ``{}`` being a sound checkpoint, and what the error names.
FAILURES: dict[str, tuple[list[str], str]] = {
    "no such directory": (["plan", "./nowhere", "--split", "2", "4"], "nowhere"),
    "a file": (["plan", "{}/model.safetensors", "--split", "2", "4"], "is a file"),
    "not cached": (
        ["plan", "owner/name", "--split", "2", "4", "--local-files-only", "--cache-dir", "{}"],
        "owner/name",
    ),
    "out of range": (["plan", "{}", "--split", "2", "9"], "(2, 9)"),
    "out of range, as JSON": (["plan", "{}", "--split", "2", "6", "--json"], "(2, 6)"),
    "device": (["verify", "{}", "--split", "2", "4", "--device", "nonsense"], "nonsense"),
    "strategy": (["verify", "{}", "--split", "2", "4", "--strategy", "nonsense"], "nonsense"),
    "attention": (["verify", "{}", "--split", "2", "4", "--attn-implementation", "nonsense"], "nonsense"),
    "no tokenizer": (["generate", "{}", "--split", "2", "4", "--prompt", "x"], "no tokenizer"),
    "not bundled": (["plan", "bundled:llama", "--split", "2", "4"], "llama"),
    "unknown bundle": (["plan", "bundled:falcon9", "--split", "2", "4"], "falcon9"),
}


@pytest.mark.parametrize(("arguments", "named"), FAILURES.values(), ids=list(FAILURES))
def test_the_command_line_fails_in_two_lines(
    cli: Callable[..., Any], single: Path, arguments: list[str], named: str
) -> None:
    """Exit code 1, an error and a hint on stderr, nothing on stdout, no traceback."""
    code, out, err = cli(*(argument.format(single) for argument in arguments))

    assert code == 1
    assert out == ""
    assert err.startswith("error: ")
    assert named in err
    assert "\nhint: " in err
    assert "Traceback" not in err


#: Ways to spoil a checkpoint that a plan has to notice.
SPOILT: dict[str, Callable[[Path], object]] = {
    "no config": lambda folder: (folder / "config.json").unlink(),
    "config is no JSON": lambda folder: (folder / "config.json").write_text("{"),
    "config is a list": lambda folder: (folder / "config.json").write_text("[]"),
    "no model type": lambda folder: (folder / "config.json").write_text("{}"),
    "unknown type": lambda folder: (folder / "config.json").write_text('{"model_type": "falcon9"}'),
    "no layers": lambda folder: (folder / "config.json").write_text('{"model_type": "llama"}'),
    "truncated": lambda folder: (folder / "model.safetensors").write_bytes(b"\x08"),
    "bin only": lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
}


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=list(SPOILT))
def test_the_command_line_refuses_a_spoilt_checkpoint(
    cli: Callable[..., Any], single: Path, spoil: Callable[[Path], object]
) -> None:
    """The same two lines for files as for arguments."""
    spoil(single)

    code, out, err = cli("verify", single, "--split", "2", "4")

    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert "\nhint: " in err
    assert "Traceback" not in err


def test_a_fresh_process_fails_the_same_way(world: Any, single: Path) -> None:
    """``python -m splitlearn_core`` too: nothing but our two lines is on stderr."""
    done = world.python("-m", "splitlearn_core", "plan", str(single), "--split", "2", "6")

    assert done.returncode == 1
    assert done.stdout == ""
    assert [line.split(":")[0] for line in done.stderr.splitlines()] == ["error", "hint"]


def test_a_reader_that_goes_away_is_no_error(world: Any, single: Path) -> None:
    """``| head`` ends the process quietly."""
    with subprocess.Popen(
        [sys.executable, "-m", "splitlearn_core", "plan", str(single), "--split", "2", "4", "--json"],
        env=world.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        complaint = process.stderr.read()

    assert "Traceback" not in complaint
    assert "Exception ignored" not in complaint
