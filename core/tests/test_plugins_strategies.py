"""Packages that add a loading strategy: found like families, imported only if they are needed."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from splitlearn_core import (
    BrokenPluginError,
    ConfigurationError,
    IncompatiblePluginError,
    PluginConflictError,
    load_split_model,
)
from splitlearn_core.plugins.registry import registry

pytestmark = pytest.mark.light

GROUP = "splitlearn.strategies"
#: Modules that these tests write.
OURS = ("strategy_", "splitlearn_llama", "splitlearn_alpha", "first_", "second_")
HEAD = "from splitlearn_core import hookimpl\nfrom splitlearn_core.readers.copied import CopiedStrategy\n"


def source(*names: str) -> str:
    """Return the text of a valid package with strategies of these names."""
    classes = "".join(f"class S{index}(CopiedStrategy):\n    name = {name!r}\n\n\n" for index, name in enumerate(names))
    answer = ", ".join(f"S{index}()" for index in range(len(names)))
    return f"{HEAD}\n\n{classes}@hookimpl\ndef splitlearn_loading_strategies():\n    return [{answer}]\n"


@pytest.fixture
def install(world: Any) -> Callable[..., None]:
    """Return a function that installs a strategy package which leaves a mark when it is imported."""

    def install(name: str, text: str | None = None, **options: Any) -> None:
        distribution = options.pop("distribution", f"strategy-{name}")
        text = world.marking(distribution) + (source(name) if text is None else text)
        world.install(name, text, distribution=distribution, group=GROUP, **options)

    return install


def names(*arguments: Any) -> list[str]:
    """Return the names of the strategies of this file; others may be installed."""
    return sorted(s.name for s in registry().strategies(*arguments) if type(s).__module__.startswith(OURS))


def test_a_package_is_imported_when_its_strategy_is_requested(world: Any, install: Any) -> None:
    """The other package is not imported."""
    install("one")
    install("two")

    assert names(None, "one") == ["one"]
    assert world.marker("strategy-one").exists()
    assert not world.marker("strategy-two").exists()


@pytest.mark.parametrize("requested", ["auto", "mapped", "copied"])
def test_cores_own_names_import_no_package(world: Any, install: Any, requested: str) -> None:
    """Core reads such a checkpoint itself."""
    install("one")

    assert names(None, requested) == []
    assert not world.marker("strategy-one").exists()


def test_a_package_in_use_is_known_to_the_automatic_choice(world: Any, install: Any) -> None:
    """After it has opened a checkpoint, ``auto`` may choose it."""
    install("one")
    names(None, "one")

    assert names(None, "auto") == ["one"]


@pytest.mark.parametrize("requested", [None, "nobody's"])
def test_all_packages_are_imported_without_a_known_name(world: Any, install: Any, requested: str | None) -> None:
    """Without a name, or with an unknown one, the strategies of all packages are returned."""
    install("one")
    install("two")

    assert names(None, requested) == ["one", "two"]


def test_the_familys_own_are_among_them(world: Any, install: Any) -> None:
    """The strategies of the family and of packages are returned; of two with one name, the family's."""
    families = (
        "from splitlearn_core import ModelFamily\n"
        + source("own", "one")
        + (
            "@hookimpl\ndef splitlearn_model_families():\n"
            "    return [ModelFamily(model_type='llama', architecture='LlamaForCausalLM')]\n"
        )
    )
    world.install("llama", families)
    install("one")
    family = registry().family("llama")

    results = {strategy.name: type(strategy).__module__ for strategy in registry().strategies(family)}

    assert (results["one"], results["own"]) == ("splitlearn_llama", "splitlearn_llama")
    assert names(family, "own") == ["one", "own"]


@pytest.mark.heavy
def test_a_model_loads_by_a_packages_strategy(llama: Any, install: Any, single: Path) -> None:
    """It is chosen by name through the public function; otherwise the package is not imported."""
    install("one")

    load_split_model("llama", (2, 4), single, parts=("trunk",))
    assert not llama.marker("strategy-one").exists()
    trunk = load_split_model("llama", (2, 4), single, parts=("trunk",), strategy="one").trunk

    assert trunk is not None
    assert llama.marker("strategy-one").exists()


BROKEN = {
    "does not import": ("import surely_absent_package\n", BrokenPluginError, "pip install surely_absent_package"),
    "provides another": (source("two"), BrokenPluginError, "provides two"),
    "provides none": (
        f"{HEAD}@hookimpl\ndef splitlearn_loading_strategies():\n    return []\n",
        BrokenPluginError,
        "none",
    ),
    "takes a name of core's": (source("one", "mapped"), BrokenPluginError, "'mapped' is taken"),
    "answers rubbish": (
        f"{HEAD}@hookimpl\ndef splitlearn_loading_strategies():\n    return ['fast']\n",
        BrokenPluginError,
        "'fast'",
    ),
}


@pytest.mark.parametrize(("text", "kind", "named"), BROKEN.values(), ids=list(BROKEN))
def test_a_broken_package_is_named_when_it_is_requested(
    install: Any, text: str, kind: type[Exception], named: str
) -> None:
    """The message names the distribution, the hint says how to leave it out."""
    install("one", text, version="3.1.4")

    with pytest.raises(kind) as caught:
        registry().strategies(None, "one")

    assert "strategy-one 3.1.4" in caught.value.message
    assert "loading strategy 'one'" in caught.value.message
    assert named in str(caught.value)
    assert "SPLITLEARN_DISABLE_PLUGINS=strategy-one" in caught.value.hint


@pytest.mark.parametrize("text", [text for text, _, _ in BROKEN.values()], ids=list(BROKEN))
def test_a_broken_package_does_not_disturb_another(install: Any, caplog: pytest.LogCaptureFixture, text: str) -> None:
    """It is left out when all are imported, with a warning in the log."""
    install("one", text)
    install("two")

    with caplog.at_level(logging.WARNING):
        assert names() == ["two"]
    assert "strategy-one" in caplog.text


def test_an_incompatible_package_is_refused_before_import(world: Any, install: Any) -> None:
    """The version check of families applies to strategies, too."""
    install("one", requires=">=99")

    with pytest.raises(IncompatiblePluginError, match="splitlearn-core>=99"):
        registry().strategies(None, "one")
    assert not world.marker("strategy-one").exists()


def test_two_claims_to_a_name_are_a_conflict(install: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are named; blocking one resolves it."""
    install("one", distribution="first-one")
    install("one", distribution="second-one")

    with pytest.raises(PluginConflictError) as caught:
        registry().strategies(None, "one")
    assert "first-one" in caught.value.message
    assert "second-one" in caught.value.message

    monkeypatch.setenv("SPLITLEARN_DISABLE_PLUGINS", "second-one")
    assert names(None, "one") == ["one"]


@pytest.mark.parametrize(
    ("variable", "value"), [("SPLITLEARN_DISABLE_PLUGINS", "one"), ("SPLITLEARN_PLUGINS", "llama")]
)
def test_a_blocked_package_is_not_imported(
    world: Any, install: Any, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    """If it is requested by name, the error names the variable; otherwise it is ignored."""
    install("one")
    monkeypatch.setenv(variable, value)

    assert names() == []
    with pytest.raises(ConfigurationError, match=variable):
        registry().strategies(None, "one")
    assert [row.status for row in registry().statuses(check=True) if row.entry.name == "one"] == ["blocked"]
    assert not world.marker("strategy-one").exists()


def test_a_strategy_is_no_model_type(install: Any) -> None:
    """The two kinds of names do not mix."""
    install("one")

    assert "one" not in registry().model_types()
    assert registry().unknown_names() == {}


def test_the_list_shows_strategies_without_importing_them(world: Any, install: Any, cli: Any) -> None:
    """A table of their own, and a kind in JSON."""
    world.install("alpha")
    install("one")
    install("two", BROKEN["does not import"][0])

    code, out, _ = cli("plugins")
    rows = {row["name"]: row for row in json.loads(cli("plugins", "--json")[1])}

    assert code == 0
    assert out.index("model type") < out.index("alpha") < out.index("strategy  ") < out.index("strategy-one")
    assert (rows["one"]["kind"], rows["one"]["model_type"], rows["one"]["status"]) == ("strategy", None, "ready")
    assert (rows["alpha"]["kind"], rows["alpha"]["model_type"]) == ("family", "alpha")
    assert rows["one"]["hooks"] == ["splitlearn_loading_strategies"]
    assert not world.marker("strategy-two").exists()
    assert not world.marker("strategy-one").exists()


def test_a_check_imports_them(world: Any, install: Any, cli: Any) -> None:
    """``--check`` finds problems that metadata does not show, and has exit code 1."""
    install("one")
    install("two", source("three"))

    code, out, _ = cli("plugins", "--check")

    assert code == 1
    assert "provides three" in out
    assert world.marker("strategy-one").exists()


def test_one_package_may_provide_both(world: Any) -> None:
    """A module with a family and a strategy that serves all families is imported once."""
    text = world.marking("both").replace(".touch()", ".touch(exist_ok=False)")
    text += (
        "from splitlearn_core import ModelFamily\n"
        + source("one")
        + (
            "@hookimpl\ndef splitlearn_model_families():\n"
            "    return [ModelFamily(model_type='alpha', architecture='LlamaForCausalLM')]\n"
        )
    )
    info = world.install("alpha", text)
    (info / "entry_points.txt").write_text(
        f"[splitlearn.families]\nalpha = splitlearn_alpha\n[{GROUP}]\none = splitlearn_alpha\n"
    )

    assert names(None, "one") == ["one"]
    assert registry().family("alpha").model_type == "alpha"
