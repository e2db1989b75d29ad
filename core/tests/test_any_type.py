"""The plugin for any model type: asked last, one type at a time, and like any other once it has answered."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from splitlearn_core import (
    BrokenPluginError,
    ConfigurationError,
    ModelConfig,
    ModelRegistry,
    PluginConflictError,
    Progress,
    UnknownModelTypeError,
)
from splitlearn_core.loading.opening import open_model, type_and_model
from splitlearn_core.plugins.registry import PluginStatus, registry
from splitlearn_core.testing.choosing import choose_families

pytestmark = pytest.mark.light

#: Provides every type whose name begins with "any", and writes down each question.
ANY = """
import pathlib
from splitlearn_core import ModelFamily, Progress, UnknownModelTypeError, hookimpl

ASKED = pathlib.Path(__file__).with_name("asked")


@hookimpl
def splitlearn_family_for(model_type, progress):
    with ASKED.open("a") as file:
        print(model_type, file=file)
    progress(Progress("examining", file=model_type))
    if model_type == "nothing":
        return None
    if not model_type.startswith("any"):
        raise UnknownModelTypeError("its layers run backwards", hint="turn them")
    return ModelFamily(model_type=model_type, architecture="LlamaForCausalLM")
"""


@pytest.fixture
def any_type(world: Any) -> Any:
    """Return a world with a plugin for any type, and one for the type alpha."""
    world.install("*", world.marking("any") + ANY, distribution="splitlearn-any")
    world.install("alpha", world.marking("alpha") + world.source("alpha"))
    return world


def asked(world: Any) -> list[str]:
    path = world.folder / "asked"
    return path.read_text().split() if path.exists() else []


def row() -> PluginStatus:
    return next(status for status in registry().statuses() if status.entry.is_for_any_type)


def test_it_is_asked_last(any_type: Any) -> None:
    """Not for a type that a package provides; once for one that none does."""
    assert registry().family("alpha").model_type == "alpha"
    assert not any_type.marker("any").exists()

    family = registry().family("any_thing")

    assert family.model_type == "any_thing"
    assert registry().family("any_thing") is family
    assert registry().plugin("any_thing").entry.distribution == "splitlearn-any"
    assert registry().map_weight_keys(family, {}, ["a"]) is None
    assert asked(any_type) == ["any_thing"]


def test_a_list_shows_it_and_imports_nothing(any_type: Any) -> None:
    """It comes last, names no model type, and has the hook that its entry point is for."""
    families = [status for status in registry().statuses() if status.entry.kind == "family"]

    assert families[-1].entry.is_for_any_type
    assert (row().status, row().hooks) == ("ready", ("splitlearn_family_for",))
    assert (row().to_dict()["name"], row().to_dict()["model_type"]) == ("*", None)
    assert row().entry.what == "any other model type"
    assert "alpha" in registry().model_types()
    assert not {"*", ""} & {*registry().model_types()}
    assert not any_type.marker("any").exists()


def test_a_check_of_the_list_asks_for_no_type(any_type: Any) -> None:
    """It imports the plugin, and compares its hooks with their specifications."""
    (status,) = (status for status in registry().statuses(check=True) if status.entry.is_for_any_type)

    assert (status.status, status.hooks) == ("ready", ("splitlearn_family_for",))
    assert any_type.marker("any").exists()
    assert asked(any_type) == []


def test_a_refusal_is_given_on(any_type: Any) -> None:
    """The error names type, plugin and reason; a misspelt type is guessed."""
    with pytest.raises(UnknownModelTypeError) as caught:
        registry().family("mamba9")

    assert caught.value.message == (
        "no installed plugin provides model type 'mamba9', and splitlearn-any 1.0 refuses it: its layers run backwards"
    )
    assert caught.value.hint == "turn them"
    with pytest.raises(UnknownModelTypeError) as caught:
        registry().family("alpho")
    assert caught.value.hint == "did you mean 'alpha'? Otherwise turn them"


def test_it_may_have_none(any_type: Any) -> None:
    with pytest.raises(UnknownModelTypeError, match="'nothing', nor does splitlearn-any"):
        registry().family("nothing")


@pytest.mark.parametrize("name", ["*", "", "x; rm -rf ~", "../x", "a\nb", "x" * 65], ids=repr)
def test_a_hostile_type_is_not_passed_on(any_type: Any, name: str) -> None:
    """No more than into a command; ``*`` is the name of no type."""
    with pytest.raises(UnknownModelTypeError):
        registry().family(name)

    assert not registry().may_provide(name)
    assert asked(any_type) == []


def test_progress_is_passed_and_may_stop_it(any_type: Any) -> None:
    """What the callback raises is the caller's own, and the plugin is not broken by it."""
    seen: list[Progress] = []
    registry().family("any_thing", seen.append)
    assert seen == [Progress("examining", file="any_thing")]

    class StoppedError(Exception):
        pass

    def stop(progress: Progress) -> None:
        raise StoppedError

    with pytest.raises(StoppedError):
        registry().family("any_other", stop)
    assert registry().family("any_other").model_type == "any_other"


def test_two_threads_get_one_family(any_type: Any) -> None:
    """A family is compared by identity."""
    together = threading.Barrier(2)
    found: list[Any] = []

    def find() -> None:
        found.append(registry().family("any_thing", lambda _: together.wait() and None))

    threads = [threading.Thread(target=find) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert found[0] is found[1]
    assert asked(any_type) == ["any_thing", "any_thing"]


BROKEN: dict[str, tuple[str, str]] = {
    "it raises": ("def splitlearn_family_for(model_type):\n    raise KeyError('x')", "raised KeyError"),
    "another type": (
        "def splitlearn_family_for():\n    return ModelFamily(model_type='b', architecture='B')",
        "which is no family of model type 'any_thing'",
    ),
    "no family": ("def splitlearn_family_for():\n    return 'llama'", "returned 'llama', which is no family"),
    "another argument": ("def splitlearn_family_for(config):\n    return None", "has no argument config"),
    "another hook": (
        "def splitlearn_model_families():\n    return []",
        "does not implement hook splitlearn_family_for",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_one_is_named(world: Any, name: str) -> None:
    """As a plugin of any type is broken, and with the way to leave it out."""
    source, expected = BROKEN[name]
    source = f"from splitlearn_core import ModelFamily, hookimpl\n\n\n@hookimpl\n{source}\n"
    world.install("*", source, distribution="splitlearn-any")

    with pytest.raises(BrokenPluginError, match=expected) as caught:
        registry().family("any_thing")

    assert "(any other model type)" in caught.value.message
    assert "SPLITLEARN_DISABLE_PLUGINS=splitlearn-any" in caught.value.hint


def test_two_of_them_are_a_conflict(any_type: Any) -> None:
    any_type.install("*", ANY, distribution="splitlearn-other")

    with pytest.raises(PluginConflictError, match="any other model type is claimed by splitlearn-any"):
        registry().family("any_thing")
    assert registry().family("alpha").model_type == "alpha"
    assert row().status == "conflict"


def test_a_blocked_package_is_not_replaced_by_it(any_type: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A type whose package is blocked does not come from another package instead."""
    monkeypatch.setenv("SPLITLEARN_DISABLE_PLUGINS", "splitlearn-alpha")

    with pytest.raises(UnknownModelTypeError, match="is blocked by SPLITLEARN_DISABLE_PLUGINS"):
        registry().family("alpha")
    assert not registry().may_provide("alpha")
    assert asked(any_type) == []


def test_it_can_be_blocked(any_type: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says by what."""
    monkeypatch.setenv("SPLITLEARN_DISABLE_PLUGINS", "splitlearn-any")

    with pytest.raises(UnknownModelTypeError) as caught:
        registry().family("any_thing")

    assert caught.value.hint.startswith(
        "change or unset SPLITLEARN_DISABLE_PLUGINS, which blocks splitlearn-any 1.0, or check"
    )
    assert not registry().may_provide("any_thing")


def test_a_type_alone_does_not_have_it_examined(any_type: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It names no default model and carries none, so that what is missing is said at once."""
    monkeypatch.chdir(tmp_path)
    attempts: dict[str, Callable[[], object]] = {
        "name a model": lambda: type_and_model("any_thing", None),
        "name a model of the type, for which splitlearn-any": lambda: open_model(None, "any_thing"),
        "name a model of": lambda: open_model("bundled:any_thing"),
    }
    for expected, attempt in attempts.items():
        with pytest.raises(UnknownModelTypeError) as caught:
            attempt()
        assert expected in caught.value.hint
    assert asked(any_type) == []


def test_a_configuration_is_checked_without_it(any_type: Any) -> None:
    """On the event loop: whether the type can be split is found out by the load."""
    fields: dict[str, Any] = {"model_id": "m", "model_path": "p", "component": "trunk", "split_points": (1, 2)}
    ModelConfig(model_type="mamba9", **fields).check_installed()

    assert not any_type.marker("any").exists()


def test_whether_a_type_is_registered_is_asked(any_type: Any) -> None:
    assert ModelRegistry.is_model_registered("any_thing")
    assert not ModelRegistry.is_model_registered("mamba9")
    assert not ModelRegistry.is_model_registered("x; y")
    assert asked(any_type) == ["any_thing", "mamba9"]
    assert "any_thing" not in ModelRegistry.list_models()


def test_a_model_is_opened_with_it(any_type: Any, tmp_path: Path) -> None:
    """The progress of a load is that of the examination, too; a second use asks nothing."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "any_thing"}))
    seen: list[Progress] = []

    assert open_model(tmp_path, progress=seen.append).family.model_type == "any_thing"
    assert open_model(tmp_path, "any_thing").family.model_type == "any_thing"

    assert [step.stage for step in seen] == ["examining"]
    assert asked(any_type) == ["any_thing"]
    with pytest.raises(ConfigurationError) as caught:
        open_model(tmp_path, "alpha")
    assert caught.value.hint == "pass model_type='any_thing', or None to take what config.json says"


def test_the_kit_takes_one_type_at_a_time(any_type: Any) -> None:
    (entry,) = choose_families(["any_thing"])
    assert (entry.name, entry.distribution) == ("any_thing", "splitlearn-any")
    with pytest.raises(ConfigurationError, match="the kit tests one at a time"):
        choose_families(["splitlearn-any"])
    with pytest.raises(UnknownModelTypeError, match="its layers run backwards"):
        choose_families(["mamba9"])
