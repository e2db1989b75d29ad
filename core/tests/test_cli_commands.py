"""Commands that installed packages add to the command line, through the entry-point group ``splitlearn.commands``."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

from splitlearn_core.cli import CommandGroup
from splitlearn_core.cli.main import cli as group
from splitlearn_core.plugins.known import COMMANDS
from splitlearn_core.testing.installing import write_plugin

pytestmark = pytest.mark.light

Cli = Callable[..., tuple[int, str, str]]
COMMAND = """
import click


@click.command("{name}", short_help="What its code says.")
@click.argument("words", nargs=-1)
@click.option("--loud", is_flag=True)
def command(words, loud):
    \"\"\"Greet somebody.\"\"\"
    text = "{name} " + " ".join(words)
    click.echo(text.upper() if loud else text)
"""


@pytest.fixture
def add(world: Any) -> Callable[..., Path]:
    """Return a function that installs a package with a command, and returns its dist-info folder."""

    def add(
        name: str, *, distribution: str = "", attribute: str = "command", source: str = COMMAND, summary: str = ""
    ) -> Path:
        distribution = distribution or f"splitlearn-x-{name.replace('.', '-')}"
        module = distribution.replace("-", "_")
        write_plugin(world.folder, name, source.format(name=name.rpartition(".")[2]), distribution=distribution)
        info: Path = world.folder / f"{module}-1.0.dist-info"
        (info / "entry_points.txt").write_text(f"[splitlearn.commands]\n{name} = {module}:{attribute}\n")
        if summary:
            metadata = info / "METADATA"
            metadata.write_text(metadata.read_text() + f"Summary: {summary}\n")
        importlib.invalidate_caches()
        return info

    return add


@pytest.fixture
def only_core(monkeypatch: pytest.MonkeyPatch, world: Any) -> None:
    """Hide the packages of this repository that add commands, wherever they are installed."""
    from splitlearn_core.cli import main

    discover = main.discover_commands
    own = {package for package, _ in COMMANDS.values()}
    monkeypatch.setattr(
        main, "discover_commands", lambda: [entry for entry in discover() if entry.distribution not in own]
    )


def test_a_command_of_a_package_runs(add: Callable[..., Path], cli: Cli) -> None:
    """It has its arguments, options and help, and usage errors like those of core."""
    add("hello")

    assert cli("hello", "wide", "world", "--loud") == (0, "HELLO WIDE WORLD\n", "")
    code, out, err = cli("hello", "--help")
    assert (code, err) == (0, "")
    assert out.startswith("Usage: splitlearn hello [OPTIONS] [WORDS]...")
    assert "Greet somebody." in out
    code, out, err = cli("hello", "--quiet")
    assert (code, out) == (2, "")
    assert "No such option" in err


def test_a_nested_command_runs(add: Callable[..., Path], cli: Cli) -> None:
    """A package adds a command to a group of core; and a command of two new words makes a new group."""
    add("plugins.greet")
    add("deep.down")

    assert cli("plugins", "greet", "you") == (0, "greet you\n", "")
    assert cli("deep", "down", "there") == (0, "down there\n", "")
    assert "greet  splitlearn-x-plugins-greet 1.0" in cli("plugins", "--help")[1]
    assert "down  splitlearn-x-deep-down 1.0" in cli("deep", "--help")[1]
    assert cli("greet")[0] == 2


def test_help_lists_commands_without_importing_them(add: Callable[..., Path], cli: Cli, world: Any) -> None:
    """The line of a command comes from the metadata of its package."""
    add("hello", source=world.marking("hello") + COMMAND, summary="Says hello.")

    code, out, err = cli("--help")

    assert (code, err) == (0, "")
    assert "hello     splitlearn-x-hello 1.0: Says hello.\n" in out
    assert cli("plan", "--help")[0] == 0
    assert not world.marker("hello").exists()
    assert cli("hello")[0] == 0
    assert world.marker("hello").exists()


@pytest.mark.parametrize(
    ("source", "attribute", "expected"),
    [
        ("import no_such_library\n", "command", "No module named 'no_such_library'"),
        ("raise ValueError('at import')\n", "command", "at import"),
        ("raise SystemExit(0)\n", "command", "SystemExit"),
        ("command = 5\n", "command", "is of type int, not a click command"),
        (COMMAND, "other", "has no attribute 'other'"),
        ("def broken(:\n", "command", "invalid syntax"),
    ],
)
def test_a_broken_command_breaks_no_other(
    add: Callable[..., Path], cli: Cli, source: str, attribute: str, expected: str
) -> None:
    """It fails only when it is used, and names its package; the list and other commands work."""
    add("hello", source=source, attribute=attribute)
    add("other")

    code, out, err = cli("hello")

    assert (code, out) == (1, "")
    assert "error: the command 'hello' of splitlearn-x-hello 1.0 is broken" in err
    assert expected in err
    assert "pip uninstall splitlearn-x-hello" in err
    assert "Traceback" not in err
    assert cli("other", "goes") == (0, "other goes\n", "")
    assert cli("--help")[0] == 0
    assert cli("plugins", "--json")[0] == 0


def test_damaged_metadata_breaks_no_command(add: Callable[..., Path], cli: Cli) -> None:
    """A package that is half removed does not affect others."""
    (add("half") / "METADATA").unlink()
    (add("wrong") / "entry_points.txt").write_text("[splitlearn.commands\nwrong = = x\n")
    add("other")

    assert cli("--help")[0] == 0
    assert cli("other", "goes") == (0, "other goes\n", "")


@pytest.mark.parametrize("name", ["hello", "plugins.hello"])
def test_two_packages_with_one_command(add: Callable[..., Path], cli: Cli, name: str) -> None:
    """Neither runs; the error and the list name both packages."""
    add(name, distribution="splitlearn-a")
    add(name, distribution="other-b")

    *words, last = name.split(".")
    code, out, err = cli(*words, last)

    assert (code, out) == (1, "")
    assert "is offered by other-b 1.0 and splitlearn-a 1.0" in err
    assert "pip uninstall" in err
    code, out, _ = cli(*words, "--help")
    assert code == 0
    assert "offered by other-b 1.0 and splitlearn-a 1.0" in " ".join(out.split())


def test_a_command_of_core_is_not_replaced(add: Callable[..., Path], cli: Cli, world: Any) -> None:
    """It keeps working, and the help says which package's command is ignored."""
    add("plan", source=world.marking("plan") + COMMAND)
    add("plugins.list")

    assert "Usage: splitlearn plan [OPTIONS] MODEL" in cli("plan", "--help")[1]
    assert not world.marker("plan").exists()
    ignored = "The command 'plan' of splitlearn-x-plan 1.0 is ignored: splitlearn-core has one of that name."
    assert ignored in " ".join(cli("--help")[1].split())
    assert "The command 'plugins list' of splitlearn-x-plugins-list 1.0 is ignored" in " ".join(
        cli("plugins", "--help")[1].split()
    )


@pytest.mark.usefixtures("only_core")
@pytest.mark.parametrize("path", COMMANDS)
def test_a_known_command_without_its_package_says_what_to_install(cli: Cli, path: str) -> None:
    """It is wrong usage, with the pip command; a misspelt name gets no such line."""
    package, _ = COMMANDS[path]

    code, out, err = cli(*path.split("."), "--option", "value")

    assert (code, out) == (2, "")
    assert f"is a command of {package}, which is not installed; try: pip install {package}" in err
    assert f"pip install {package}" not in cli(f"{path}x")[2]


def test_completion_imports_no_command(add: Callable[..., Path], world: Any) -> None:
    """The shell lists a package's command, broken or not."""
    add("hello", source=world.marking("hello") + "raise ValueError\n")

    requested = {"_SPLITLEARN_COMPLETE": "bash_complete", "COMP_WORDS": "splitlearn h", "COMP_CWORD": "1"}
    done = world.python("-m", "splitlearn_core", **requested)

    assert done.stdout.split() == ["plain,hello"], done.stderr
    assert not world.marker("hello").exists()


def test_a_package_may_add_a_group(add: Callable[..., Path], cli: Cli) -> None:
    """Other packages can add to it, because it is of the same class as the groups of core."""
    source = (
        "from splitlearn_core.cli import CommandGroup\n"
        "command = CommandGroup('{name}', prefix='{name}', help='A group of its own.')\n"
    )
    add("tools", source=source)

    assert isinstance(group, CommandGroup)
    assert "A group of its own." in cli("tools", "--help")[1]
    add("tools.hammer")
    assert cli("tools", "hammer", "on") == (0, "hammer on\n", "")


def test_a_light_command_stays_light(add: Callable[..., Path], world: Any) -> None:
    """Neither the list nor a package's command imports torch, transformers or a server."""
    add("hello")
    code = (
        "import sys\nfrom splitlearn_core.cli.main import cli\n"
        "for line in ('--help', 'hello you'):\n    cli.main(line.split(), standalone_mode=False)\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'uvicorn', 'starlette'} & set(sys.modules)))"
    )

    done = world.python("-c", code)

    assert done.stdout.splitlines()[-1:] == ["[]"], done.stderr
    assert isinstance(group, click.Group)
