"""The command line: data on stdout, everything else on stderr, and exit codes."""

from __future__ import annotations

import errno
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from splitlearn_core import plan_split
from splitlearn_core.cli.plan import render_plan

pytestmark = [pytest.mark.libs, pytest.mark.light]

CUTS = ("--split", "2", "4")
Cli = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nonsense"],
        ["--nonsense"],
        ["plan"],
        ["plan", "x", "--split"],
        ["plan", "x", "--split", "2", "x"],
        ["plan", "x", "--split", "two", "4"],
        ["plan", "x", "--split", "2.0", "4"],
        ["plan", "x", *CUTS, "y"],
        ["plan", "x", *CUTS, "--nonsense"],
        ["generate", "x", *CUTS],
        ["generate", "x", *CUTS, "--prompt", "x", "--max-new-tokens", "0"],
        ["generate", "x", *CUTS, "--prompt", "x", "--temperature", "-1"],
        ["generate", "x", *CUTS, "--prompt", "x", "--top-p", "0"],
        ["plan", "x", "--split", "5", "1"],
        ["plan", "x", "--split", "2", "2"],
        ["generate", "x", "--split", "0", "4", "--prompt", "x"],
        ["verify", "x", "--split", "-1", "4"],
        ["split", "x", "--split", "4", "2", "--out", "y"],
        ["plan", "x", *CUTS, "--dtype", "int8"],
        ["plan", "x", *CUTS, "--dtype", "trunk=int8"],
        ["plan", "x", *CUTS, "--dtype", "head=float32"],
        ["plan", "x", *CUTS, "--dtype", "trunk="],
        ["verify", "x", *CUTS, "--device", "trunk=cpu"],
        ["verify", "x", *CUTS, "--max-memory", "0=much"],
        ["verify", "x", *CUTS, "--max-memory", "disk=1GiB"],
        ["split", "x", *CUTS, "--out", "y", "--parts", "bottom,head"],
        ["split", "x", *CUTS, "--out", "y", "--max-shard-size", "much"],
        ["merge", "x", "--out", "y", "--max-shard-size", "much"],
        ["generate", "x", *CUTS, "--prompt", "x", "--stop", ""],
        ["generate", "x", *CUTS, "--prompt", "x", "--temperature", "inf"],
        ["ps", "--url", "nonsense"],
        ["plugins", "nonsense"],
        ["plugins", "--nonsense"],
        ["demo", "--max-new-tokens", "0"],
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2(cli: Cli, arguments: list[str]) -> None:
    """Usage goes to stderr, nothing to stdout."""
    code, out, err = cli(*arguments)

    assert code == 2
    assert out == ""
    assert "Usage:" in err or err.startswith("Error: ")
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "command", ["", "demo", "plugins", "plugins list", "plan", "generate", "verify", "split", "merge", "doctor"]
)
@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_is_data(cli: Cli, command: str, option: str) -> None:
    """Every command explains itself on stdout."""
    code, out, err = cli(*command.split(), option)

    assert (code, err) == (0, "")
    assert out.startswith("Usage: splitlearn")


def test_the_version_is_that_of_core(cli: Cli) -> None:
    """One version, from the installed metadata."""
    from splitlearn_core.plugins.metadata import core_version

    assert cli("--version") == (0, f"splitlearn, version {core_version()}\n", "")


def test_plugins_are_listed_without_importing_them(world: Any) -> None:
    """A new process prints JSON, and no plugin is imported."""
    world.install("alpha", world.marking("alpha") + world.source("alpha"), version="3.1.4")
    info = world.install("beta", "raise RuntimeError('no')\n")
    (info / "entry_points.txt").write_text("[splitlearn.families]\nbeta = surely_absent_package\n")
    (info / "direct_url.json").write_text('{"url": "file:///some/where", "dir_info": {"editable": true}}')

    done = world.python("-m", "splitlearn_core", "plugins", "--json")

    rows = {row["model_type"]: row for row in json.loads(done.stdout)}
    assert (done.returncode, done.stderr) == (0, "")
    assert rows["alpha"] == {
        "kind": "family",
        "name": "alpha",
        "model_type": "alpha",
        "distribution": "splitlearn-alpha",
        "version": "3.1.4",
        "module": "splitlearn_alpha",
        "editable": False,
        "origin": "",
        "status": "ready",
        "hooks": ["splitlearn_model_families"],
        "error": None,
        "hint": None,
    }
    assert (rows["beta"]["editable"], rows["beta"]["origin"], rows["beta"]["status"]) == (True, "/some/where", "broken")
    assert "module 'surely_absent_package' is not installed" in rows["beta"]["error"]
    assert rows["beta"]["hint"]
    assert not world.marker("alpha").exists()


@pytest.mark.parametrize("command", [["plugins"], ["plugins", "list"], ["plugins", "--check"]], ids=" ".join)
def test_plugins_are_shown_as_text(cli: Cli, world: Any, command: list[str]) -> None:
    """A line for each plugin, then each problem with its hint; a check that finds one has exit code 1."""
    world.install("alpha", version="3.1.4")
    info = world.install("beta")
    (info / "direct_url.json").write_text('{"url": "file:///some/where", "dir_info": {"editable": true}}')
    info = world.install("gamma")
    (info / "entry_points.txt").write_text("[splitlearn.families]\ngamma = surely_absent_package\n")

    code, out, err = cli(*command)

    lines = {line.split()[0]: line for line in out.splitlines() if line[:1].isalpha()}
    assert (code, err) == (int("--check" in command), "")
    for text in ("splitlearn-alpha", "3.1.4", "ready", "index", "model_families"):
        assert text in lines["alpha"]
    assert "editable /some/where" in lines["beta"]
    assert "broken" in next(line for line in out.splitlines() if line.startswith("gamma "))
    assert "surely_absent_package" in lines["gamma:"]
    assert "hint: " in out
    assert "SPLITLEARN_DISABLE_PLUGINS=splitlearn-gamma" in out


def test_every_status_is_listed(cli: Cli, world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ready, broken, conflict, incompatible and blocked, each with its reason."""
    world.install("alpha")
    world.install("beta", "VALUE = 1\n")
    world.install("gamma", plugin_api="2")
    world.install("delta", distribution="one-delta")
    world.install("delta", distribution="two-delta")
    world.install("epsilon")
    monkeypatch.setenv("SPLITLEARN_DISABLE_PLUGINS", "epsilon")

    code, out, _ = cli("plugins", "--check", "--json")

    rows = {row["distribution"]: row for row in json.loads(out)}
    got = {name.split("-")[-1] if "delta" not in name else name: row["status"] for name, row in rows.items()}
    assert code == 1
    assert {
        "alpha": "ready",
        "beta": "broken",
        "gamma": "incompatible",
        "one-delta": "conflict",
        "two-delta": "conflict",
        "epsilon": "blocked",
    }.items() <= got.items()
    for row in rows.values():
        assert bool(row["error"]) == (row["status"] != "ready")
        assert bool(row["hint"]) == (row["status"] != "ready")


def test_no_plugins_is_reported(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """The text says what to install; the JSON is an empty list."""
    from splitlearn_core.plugins import registry as module

    monkeypatch.setattr(module, "_registry", module.PluginRegistry([]))

    assert json.loads(cli("plugins", "--json")[1]) == []
    assert "pip install splitlearn-gpt2" in cli("plugins")[1]


@pytest.mark.heavy
@pytest.mark.parametrize("kind", ["single", "sharded", "tied"])
def test_a_plan_as_json_is_the_plan(cli: Cli, llama: Any, checkpoint: Callable[[str], Path], kind: str) -> None:
    """The same numbers as from Python, and nothing on stderr."""
    folder = checkpoint(kind)

    code, out, err = cli("plan", folder, *CUTS, "--json")

    assert (code, err) == (0, "")
    assert json.loads(out) == plan_split(folder, (2, 4)).to_dict()


@pytest.mark.heavy
def test_a_plan_as_text_names_every_component(cli: Cli, llama: Any, tied: Path) -> None:
    """It has layers, parameters, bytes and tied tensors."""
    code, out, err = cli("plan", tied, *CUTS)

    assert (code, err) == (0, "")
    for text in ("bottom", "trunk", "top", "[0, 2)", "[2, 4)", "[4, 6)", "6 layers", "float32", "tied:"):
        assert text in out
    assert "\x1b" not in out


@pytest.mark.heavy
def test_a_plan_over_machines_is_one_that_fits(cli: Cli, llama: Any, tied: Path) -> None:
    """Its split points are those of a plan whose components fit; other answers are refused in words."""
    over = ("--over", "owner=1GB:20GB/s", "--over", "a=70KB:30GB/s:10ms", "--over", "b=1GB:60GB/s")

    code, out, err = cli("plan", tied, *over, "--tokens", "0", "--json")

    assert (code, err) == (0, "")
    proposal = json.loads(out)
    points = proposal["split_points"]
    plan = plan_split(tied, points, parts=("bottom", "trunk1", "trunk2", "top"))
    stored = {part.component: part.loaded_bytes(part.dtype) for part in plan.components}
    # The tied tensor is in both, and its owner has it once.
    (tied_bytes,) = (item.info.nbytes for item in plan.component("top").tensors if item.info.key in plan.tied)
    assert [machine["bytes"] for machine in proposal["machines"]] == [
        stored["bottom"] + stored["top"] - tied_bytes,
        stored["trunk1"],
        stored["trunk2"],
    ]
    code, out, err = cli("plan", tied, *over, "--tokens", "0")
    assert f"--split {' '.join(map(str, points))}" in out
    assert "10 ms" in out
    assert "leave --split out" in cli("plan", tied, *over, *CUTS)[2]
    for wrong in (("--over", "owner=8GB"), ("--tokens", "5")):
        assert cli("plan", tied, *wrong)[0] == 2
    assert "do not fit" in cli("plan", tied, "--over", "owner=1KB:1GB/s", "--over", "a=1KB:1GB/s")[2]


@pytest.mark.heavy
def test_a_plan_without_weights_fails_as_a_load(cli: Cli, llama: Any, single: Path) -> None:
    """The error names what is missing; in Python the same folder can be planned from its configuration."""
    (single / "model.safetensors").unlink()
    drawn = render_plan(plan_split(single, (2, 4)))

    for options in ((), ("--json",), ("--dtype", "bfloat16")):
        code, out, err = cli("plan", single, *CUTS, *options)
        assert (code, out) == (1, "")
        assert "no weights" in err

    assert "read from config" in drawn
    assert "none yet" in drawn


@pytest.mark.heavy
def test_verify_reports_equality(cli: Cli, llama: Any, single: Path) -> None:
    """A split model is the unsplit one to the last bit; exit code 0, JSON on stdout."""
    code, out, _ = cli("verify", single, *CUTS, "--json")

    result = json.loads(out)
    assert code == 0
    assert result["equal"] is True
    assert result["max_difference"] == 0
    assert set(result["checks"].values()) == {True}
    assert [part["component"] for part in result["components"]] == ["bottom", "trunk", "top"]


@pytest.mark.heavy
def test_verify_as_text(cli: Cli, llama: Any, tied: Path) -> None:
    """The verdict is the last line."""
    code, out, _ = cli("verify", tied, *CUTS, "--dtype", "bfloat16")

    assert code == 0
    assert out.splitlines()[-1] == "equal to the last bit; maximum difference 0"


@pytest.mark.heavy
def test_verify_takes_a_sharded_checkpoint(cli: Cli, llama: Any, sharded: Path) -> None:
    """The unsplit model is loaded through the index."""
    assert cli("verify", sharded, "--split", "1", "5")[0] == 0


#: Ways in which torch or any library may be broken: the text of its module, and of the message.
BROKEN = {
    "ImportError": ("import torch.no_such_part", "torch cannot be imported: ModuleNotFoundError: No module named"),
    "OSError": ("raise OSError('libtorch is gone')", "torch cannot be imported: OSError: libtorch is gone"),
    "RuntimeError": ("raise RuntimeError('other numpy')", "torch cannot be imported: RuntimeError: other numpy"),
}


@pytest.mark.heavy
@pytest.mark.parametrize(("source", "expected"), BROKEN.values(), ids=list(BROKEN))
def test_a_broken_library_is_named(llama: Any, single: Path, source: str, expected: str) -> None:
    """The message has the library, the reason and the command that fixes it, and no traceback."""
    (llama.folder / "torch").mkdir()
    (llama.folder / "torch" / "__init__.py").write_text(source)

    done = llama.warm_python("-m", "splitlearn_core", "verify", str(single), *CUTS)

    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {expected}")
    assert done.stderr.endswith("\nhint: pip install --force-reinstall torch\n")
    assert "Traceback" not in done.stderr


@pytest.mark.heavy
def test_a_broken_transformers_is_not_blamed_on_the_plugin(llama: Any, single: Path) -> None:
    """It fails while it is imported for a class that the family names."""
    (llama.folder / "transformers.py").write_text("raise ValueError('half installed')")

    done = llama.warm_python("-m", "splitlearn_core", "verify", str(single), *CUTS)

    assert done.stderr == (
        "error: transformers cannot be imported: ValueError: half installed\n"
        "hint: pip install --force-reinstall transformers\n"
    )


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        (None, "error: torch is not installed\nhint: pip install torch\n"),
        ("2.13", "error: torch is installed, but its files are missing\nhint: pip install --force-reinstall torch\n"),
    ],
)
def test_a_missing_library_is_named(
    cli: Cli, llama: Any, single: Path, monkeypatch: pytest.MonkeyPatch, metadata: str | None, expected: str
) -> None:
    """It is not installed, or its files are missing."""
    monkeypatch.setattr("splitlearn_core.plugins.metadata.version_of", lambda _: metadata)
    monkeypatch.setitem(sys.modules, "torch", None)
    for name in [name for name in sys.modules if name.startswith(("splitlearn_core.build", "splitlearn_core.pipe"))]:
        monkeypatch.delitem(sys.modules, name)

    assert cli("verify", single, *CUTS) == (1, "", expected)


@pytest.mark.heavy
@pytest.mark.parametrize(
    "bug", [ImportError("cannot import name 'x' from 'torch'", name="torch"), ModuleNotFoundError(name="splitlearn_x")]
)
def test_a_bug_keeps_its_traceback(cli: Cli, single: Path, monkeypatch: pytest.MonkeyPatch, bug: Exception) -> None:
    """A wrong import in splitlearn itself is not something that users can fix."""

    def wrong(*_: object, **__: object) -> None:
        raise bug

    monkeypatch.setattr("splitlearn_core.loading.opening.open_model", wrong)
    with pytest.raises(type(bug)):
        cli("plan", single, *CUTS)


@pytest.mark.heavy
def test_an_unreadable_file_comes_with_the_command_that_changes_it(
    cli: Cli, llama: Any, single: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path is quoted for a shell."""
    barred = single / "not yours"
    barred.mkdir()

    def refused(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(barred))

    monkeypatch.setattr("splitlearn_core.loading.opening.open_model", refused)

    assert cli("plan", single, *CUTS) == (
        1,
        "",
        f"error: Permission denied: {barred}\nhint: chmod u+rwx '{barred}'\n",
    )
