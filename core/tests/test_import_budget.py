"""What a light start imports: neither torch nor transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import splitlearn_core

pytestmark = pytest.mark.light

#: What a process says of itself after the code: the heavy modules that it has imported.
REPORT = (
    "\nimport sys; print(sorted({'torch', 'transformers', 'numpy', 'safetensors', 'tokenizers'} & set(sys.modules)))"
)


def light(world: Any, code: str, *paths: Path) -> None:
    done = world.python("-c", code + REPORT, *map(str, paths))
    assert done.stdout.splitlines()[-1:] == ["[]"], done.stderr or done.stdout


def test_importing_the_package_is_light(world: Any) -> None:
    """A fresh interpreter has neither torch nor transformers after it."""
    light(world, "import splitlearn_core, splitlearn_core.cli, splitlearn_core.extension")


def test_the_public_light_names_are_light(world: Any) -> None:
    """So are the names that a plugin needs, and the functions themselves."""
    light(world, "from splitlearn_core import LoadingStrategy, ModelFamily, hookimpl, load_split_model, plan_split")


def test_listing_plugins_is_light(llama: Any) -> None:
    """Statuses, checked ones too, and a family."""
    light(
        llama,
        "from splitlearn_core.plugins.registry import registry\n"
        "registry().statuses(); registry().statuses(check=True); registry().family('llama')",
    )


def test_the_command_line_lists_and_helps_lightly(llama: Any) -> None:
    """``splitlearn plugins`` and ``--help`` of every command."""
    light(
        llama,
        "import sys\nfrom splitlearn_core.cli.main import main\n"
        "for line in ('plugins --json', 'plugins --check', '--help', 'plan --help', 'generate --help',"
        " 'verify --help', 'demo --help', '--version'):\n"
        "    sys.argv = ['splitlearn', *line.split()]\n"
        "    try:\n        main()\n    except SystemExit as end:\n        assert not end.code, line",
    )


@pytest.mark.heavy
def test_planning_is_light(llama: Any, single: Path, sharded: Path) -> None:
    """A plan of a checkpoint with weights, of one file or several, in Python and on the command line."""
    light(
        llama,
        "import sys\nfrom splitlearn_core import plan_split\n"
        "for path in sys.argv[1:]:\n    plan_split(path, (2, 4)).to_dict()\n"
        "from splitlearn_core.cli.main import main\n"
        "sys.argv = ['splitlearn', 'plan', sys.argv[1], '--split', '2', '4']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code",
        single,
        sharded,
    )


@pytest.mark.heavy
def test_failing_to_plan_is_light(llama: Any, single: Path) -> None:
    """An error needs no torch either."""
    light(
        llama,
        "import sys\nfrom splitlearn_core import SplitLearnError, plan_split\n"
        "for arguments in ((sys.argv[1], (4, 2)), ('./nowhere', (2, 4))):\n"
        "    try:\n        plan_split(*arguments)\n    except SplitLearnError:\n        pass\n"
        "    else:\n        raise AssertionError",
        single,
    )


@pytest.mark.heavy
def test_every_public_name_is_there() -> None:
    """What ``__all__`` lists can be imported, and ``dir`` shows it."""
    for name in splitlearn_core.__all__:
        assert getattr(splitlearn_core, name) is not None
    assert set(dir(splitlearn_core)) == set(splitlearn_core.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        splitlearn_core.no_such_name  # noqa: B018
