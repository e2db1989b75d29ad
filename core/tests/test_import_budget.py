"""What an import costs, and which room may import which."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import splitlearn_core

pytestmark = pytest.mark.light

ROOT = Path(splitlearn_core.__file__).parent
MODULES = {
    "splitlearn_core." + ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in sorted(ROOT.rglob("*.py"))
}
HEAVY = ("torch", "transformers")

#: What a process says of itself after the code: the heavy modules that it has imported.
REPORT = (
    "\nimport sys; print(sorted({'torch', 'transformers', 'numpy', 'safetensors', 'tokenizers'} & set(sys.modules)))"
)


def light(world: Any, code: str, *paths: Path) -> None:
    done = world.python("-c", code + REPORT, *map(str, paths))
    assert done.stdout.splitlines()[-1:] == ["[]"], done.stderr or done.stdout


def test_importing_the_package_is_light(world: Any) -> None:
    """A fresh interpreter has neither torch nor transformers after it."""
    light(world, "import splitlearn_core")


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


class _Imports(ast.NodeVisitor):
    """Collects what a module imports anywhere in it, but for type checkers alone."""

    def __init__(self, module: str, is_package: bool) -> None:
        self._package = module if is_package else module.rpartition(".")[0]
        self.names: set[str] = set()

    def visit_If(self, node: ast.If) -> None:
        test = node.test
        if "TYPE_CHECKING" in (getattr(test, "id", ""), getattr(test, "attr", "")):
            for other in node.orelse:
                self.visit(other)
        else:
            self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        self.names |= {alias.name for alias in node.names}

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        base = node.module or ""
        if node.level:
            parents = self._package.split(".")[: len(self._package.split(".")) - node.level + 1]
            base = ".".join([*parents, *filter(None, [base])])
        self.names |= {base} | {f"{base}.{alias.name}" for alias in node.names}


def imports(module: str) -> set[str]:
    path = MODULES[module]
    visitor = _Imports(module.removesuffix(".__init__"), path.name == "__init__.py")
    visitor.visit(ast.parse(path.read_text()))
    return visitor.names


def within(name: str, rooms: tuple[str, ...]) -> bool:
    return any(name == room or name.startswith(f"{room}.") for room in rooms)


def ours(*rooms: str) -> tuple[str, ...]:
    return tuple(f"splitlearn_core.{room}" for room in rooms)


# A path as a value (``PurePosixPath``) touches nothing.
FILES = ("pathlib.Path", "os", "io", "shutil", "tempfile", "mmap")
NETWORK = ("socket", "ssl", "http", "urllib", "httpx", "requests", "huggingface_hub")

#: Room -> what no module of it may import, in any function of it either.
FORBIDDEN = {
    **dict.fromkeys(("errors", "types", "deprecation"), ("splitlearn_core",)),
    **dict.fromkeys(
        ("checkpoint.ranges", "checkpoint.fetchplan"),
        (*FILES, *NETWORK, *HEAVY, *ours("checkpoint.partial", "checkpoint.rangefetch", "checkpoint.transport")),
    ),
    **dict.fromkeys(("checkpoint.partial", "checkpoint.transport"), ours("checkpoint.fetchplan", "plan")),
    "checkpoint.rangefetch": ours("checkpoint.fetchplan", "plan"),
    **dict.fromkeys(("origin", "storage.manifest", "storage.weights"), (*FILES, *NETWORK, *HEAVY)),
    **dict.fromkeys(
        tuple(f"manager.{name}" for name in ("loader", "components", "whole", "pickled", "resources", "threads")),
        ("asyncio", *ours("manager.manager", "manager.shell", "cli", "server")),
    ),
    **dict.fromkeys(("manager.config", "manager.configfile"), HEAVY),
    "family": HEAVY,
    "hookspecs": HEAVY,
    "plugins": (*HEAVY, *ours("build", "loading", "quickstart", "pipeline", "cli")),
    "plan": (*HEAVY, *ours("checkpoint", "build", "plugins", "loading"), "safetensors", "pathlib", "os", "io"),
    "checkpoint": (*ours("family", "build", "plugins", "loading"), "transformers"),
    **dict.fromkeys(
        ("manager.machine", "manager.policy", "manager.generation", "manager.messages", "manager.status"),
        (
            *HEAVY,
            "asyncio",
            "threading",
            "time",
            "pathlib",
            "os",
            "io",
            "logging",
            *ours(
                "build",
                "checkpoint",
                "loading",
                "plugins",
                "plan",
                "cli",
                "server",
                "manager.manager",
                "manager.shell",
                "manager.jobs",
            ),
        ),
    ),
    "manager.manager": (*HEAVY, *ours("build", "checkpoint", "loading", "cli", "server")),
    "manager.shell": (*HEAVY, *ours("build", "checkpoint", "loading", "cli", "server", "manager.manager")),
    "build": (*ours("checkpoint", "plugins", "loading"), "safetensors", "pathlib", "os", "io"),
}


#: Room -> the only ones that may import it, beside itself.
ONLY_FOR = {
    "server": ("cli.serve", "testing"),
    "cli": ("__main__",),
    "manager.manager": ("__init__", "testing", "server"),
    "manager.shell": ("manager.manager", "testing"),
    "storage.memory": ("storage.saving",),
    # The kit is for tests; the command that runs it on an installed plugin is one.
    "testing": ("cli.plugins",),
    "scaffold": ("cli.plugins",),
    "doctor": ("cli.doctor",),
}


def rules() -> Iterator[Any]:
    for room, forbidden in FORBIDDEN.items():
        for module in MODULES:
            if within(module, ours(room)):
                yield pytest.param(module, forbidden, id=module.removeprefix("splitlearn_core."))


@pytest.mark.parametrize(("module", "forbidden"), list(rules()))
def test_a_room_imports_only_what_it_may(module: str, forbidden: tuple[str, ...]) -> None:
    """The table of rooms in the design holds, import by import."""
    assert sorted(name for name in imports(module) if within(name, forbidden)) == []


def test_every_room_is_there() -> None:
    """A rule about a room that was renamed would hold for nothing."""
    for room in (*FORBIDDEN, *ONLY_FOR, *(name for names in ONLY_FOR.values() for name in names)):
        assert any(within(module, ours(room)) for module in MODULES), room


@pytest.mark.parametrize("room", ONLY_FOR)
def test_a_room_is_imported_only_by_whom_it_is_for(room: str) -> None:
    """Nothing else of core leans on it."""
    guilty = [
        module
        for module in MODULES
        if not within(module, ours(room, *ONLY_FOR[room])) and any(within(name, ours(room)) for name in imports(module))
    ]
    assert guilty == []


def test_core_imports_no_plugin() -> None:
    """Not even a family of this repository."""
    guilty = {
        module: names
        for module in MODULES
        if (
            names := {n for n in imports(module) if n.startswith("splitlearn_") and not within(n, ("splitlearn_core",))}
        )
    }
    assert guilty == {}


def test_saved_components_know_torch_in_one_file() -> None:
    """``storage`` plans and writes bytes; ``storage.memory`` alone holds tensors."""
    knowing = [m for m in MODULES if within(m, ours("storage")) and any(within(n, ("torch",)) for n in imports(m))]
    assert knowing == ["splitlearn_core.storage.from_modules"]


def test_only_one_module_reads_installed_metadata() -> None:
    """Which plugins there are is decided in one place."""
    guilty = [
        module
        for module in MODULES
        if not within(module, ours("testing"))
        and any(within(name, ("importlib_metadata", "importlib.metadata", "pkg_resources")) for name in imports(module))
    ]
    assert guilty == ["splitlearn_core.plugins.metadata"]


def test_nothing_heavy_is_imported_at_the_top_of_a_light_module() -> None:
    """Modules that a plan or a list goes through import torch and transformers in functions alone."""
    light_rooms = ours(
        "__init__", "errors", "types", "family", "hookspecs", "plugins", "plan", "checkpoint", "loading", "quickstart",
        "memory", "progress", "cli", "origin", "text", "verification", "demo",
    )  # fmt: skip
    guilty = []
    for module, path in MODULES.items():
        tree = ast.parse(path.read_text())
        top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        visitor = _Imports(module, path.name == "__init__.py")
        visitor.visit(ast.Module(body=list(top), type_ignores=[]))
        if within(module, light_rooms) and any(within(name, HEAVY) for name in visitor.names):
            guilty.append(module)
    assert guilty == []
