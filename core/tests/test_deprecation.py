"""A change of the plugin API is announced one release before it breaks: an entry in a table is all that it takes."""

from __future__ import annotations

import copy
import inspect
import warnings
from typing import Any

import pytest
from packaging.version import Version

from splitlearn_core import (
    ConfigurationError,
    IncompatiblePluginError,
    ModelFamily,
    SplitLearnDeprecationWarning,
    deprecation,
    hookspecs,
)
from splitlearn_core.deprecation import Deprecation
from splitlearn_core.plugins.contract import HOOKS
from splitlearn_core.plugins.metadata import core_version
from splitlearn_core.plugins.registry import registry, reset_registry

pytestmark = pytest.mark.light

MAP = "splitlearn_map_weight_keys"
HEAD = "from splitlearn_core import ModelFamily, hookimpl\n\n"
FAMILIES = "\n@hookimpl\ndef splitlearn_model_families():\n    return [ModelFamily(model_type='alpha', {})]\n"
SOUND = HEAD + FAMILIES.format("architecture='LlamaForCausalLM'")
#: A plugin that takes an argument of a hook.
TAKES_CONFIG = SOUND + f"\n@hookimpl\ndef {MAP}(checkpoint_keys, config):\n    return None\n"
#: A plugin that describes its family by a name that a field had before.
OLD_FIELD = HEAD + FAMILIES.format("architecture='LlamaForCausalLM', output_head='score'")

CHANGE = Deprecation(instead="take 'family' instead", since="7.1", until="7.2")
RENAMED = Deprecation(instead="write 'head' instead", since="7.1", until="7.2", moved_to="head")
REMOVED = Deprecation(instead="leave it out: it has no effect", since="7.1", until="7.2")
TABLES = ("HOOKS", "ARGUMENTS", "FIELDS", "APIS")


def told(model_type: str = "alpha") -> list[warnings.WarningMessage]:
    """Use a plugin, and return the warnings that this brings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        registry().plugin(model_type)
    assert [entry.category for entry in caught] == [SplitLearnDeprecationWarning] * len(caught)
    return caught


def test_a_sound_plugin_is_told_nothing(world: Any) -> None:
    """Nothing is deprecated that it does not use."""
    world.install("alpha", SOUND)

    assert told() == []


def test_an_argument_warns_once_and_is_still_passed(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The warning names plugin, version, hook and argument, since and until when, what to write, and the line."""
    monkeypatch.setitem(deprecation.ARGUMENTS, (MAP, "config"), CHANGE)
    source = TAKES_CONFIG.replace("return None", "return {key: config['prefix'] + key for key in checkpoint_keys}")
    world.install("alpha", source, version="3.1.4")

    (warning,) = told()

    assert str(warning.message) == (
        f"plugin splitlearn-alpha 3.1.4 (model type 'alpha'): argument 'config' of hook {MAP} is deprecated since "
        "splitlearn-core 7.1 and refused from splitlearn-core 7.2: take 'family' instead"
    )
    assert warning.filename == str(world.folder / "splitlearn_alpha.py")
    assert "hookimpl" in source.splitlines()[warning.lineno - 1]
    assert told() == []
    mapped = registry().map_weight_keys(registry().family("alpha"), {"prefix": "model."}, ["norm"])
    assert mapped == {"norm": "model.norm"}


def test_only_what_is_taken_warns(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An implementation that leaves the argument out has nothing to change."""
    monkeypatch.setitem(deprecation.ARGUMENTS, (MAP, "config"), CHANGE)
    world.install("alpha", TAKES_CONFIG.replace(", config", ""))

    assert told() == []


def test_a_hook_warns(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where an implementation has another name, and says which hook it is."""
    monkeypatch.setitem(deprecation.HOOKS, MAP, REMOVED)
    source = TAKES_CONFIG.replace(f"@hookimpl\ndef {MAP}", f"@hookimpl(specname='{MAP}')\ndef mapped")
    world.install("alpha", source)

    (warning,) = told()

    assert f"hook {MAP} is deprecated since splitlearn-core 7.1" in str(warning.message)


def test_a_renamed_field_warns_and_keeps_its_effect(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The value arrives under the new name."""
    monkeypatch.setitem(deprecation.FIELDS, "output_head", RENAMED)
    world.install("alpha", OLD_FIELD)

    (warning,) = told()

    assert str(warning.message).endswith(
        "field 'output_head' of ModelFamily is deprecated since splitlearn-core 7.1 and refused from "
        "splitlearn-core 7.2: write 'head' instead (family 'alpha')"
    )
    assert "splitlearn-alpha 1.0" in str(warning.message)
    assert warning.filename == str(world.folder / "splitlearn_alpha.py")
    assert registry().family("alpha").head == "score"


def test_a_removed_field_warns_and_is_dropped(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything else of the family counts."""
    monkeypatch.setitem(deprecation.FIELDS, "output_head", REMOVED)
    world.install("alpha", OLD_FIELD)

    (warning,) = told()

    assert "leave it out" in str(warning.message)
    assert registry().family("alpha").head == "lm_head"


def test_a_field_is_read_by_its_old_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plugin that is handed its family finds what it wrote; the warning points at the line that reads."""
    monkeypatch.setitem(deprecation.FIELDS, "output_head", RENAMED)
    family = ModelFamily(model_type="alpha", architecture="X", head="score")

    with pytest.warns(SplitLearnDeprecationWarning, match="output_head") as caught:
        assert family.output_head == "score"  # type: ignore[attr-defined]  # what this is about

    assert caught[0].filename == __file__


def test_two_names_for_one_field_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither of two values is chosen silently."""
    monkeypatch.setitem(deprecation.FIELDS, "output_head", RENAMED)

    with pytest.raises(TypeError, match="'head' twice: 'output_head' is its old name"):
        ModelFamily(model_type="alpha", architecture="X", head="a", output_head="b")  # type: ignore[call-arg]


def test_a_family_without_a_past_is_what_it_was() -> None:
    """Unknown fields, wrong values and missing attributes are refused as before; a copy is a copy."""
    with pytest.raises(TypeError, match="output_head"):
        ModelFamily(model_type="alpha", architecture="X", output_head="b")  # type: ignore[call-arg]
    with pytest.raises(ConfigurationError, match="head must be a name"):
        ModelFamily(model_type="alpha", architecture="X", head="")
    family = ModelFamily(model_type="alpha", architecture="X")
    with pytest.raises(AttributeError, match="output_head"):
        family.output_head  # type: ignore[attr-defined]  # noqa: B018
    assert copy.copy(family).model_type == "alpha"
    assert "_old_names" not in inspect.signature(ModelFamily).parameters


class TestNumber:
    """Plugin APIs 2 and 3, of which the older is still taken."""

    @pytest.fixture(autouse=True)
    def third(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let core have plugin API 3, and take 2 as well."""
        monkeypatch.setattr(hookspecs, "PLUGIN_API", 3)
        monkeypatch.setitem(deprecation.APIS, 2, Deprecation(instead="see its changelog", since="7.1", until="7.2"))

    def test_ours_is_taken(self, world: Any) -> None:
        """Without a word."""
        world.install("alpha", SOUND, plugin_api="3")

        assert told() == []

    def test_the_one_before_is_taken_with_a_warning(self, world: Any) -> None:
        """The list calls it ready, for so it is."""
        world.install("alpha", SOUND, plugin_api="2")

        (warning,) = told()

        assert "plugin API 2 is deprecated since splitlearn-core 7.1" in str(warning.message)
        assert [row.status for row in registry().statuses() if row.entry.name == "alpha"] == ["ready"]

    @pytest.mark.parametrize("number", ["", "1", "4", "03", "2.0", "²", "two"])
    def test_any_other_is_refused_before_import(self, world: Any, number: str) -> None:
        """A plugin that says nothing means 1."""
        world.install("alpha", world.marking("alpha") + SOUND, plugin_api=number)

        with pytest.raises(IncompatiblePluginError, match="takes plugin API 2 or 3") as caught:
            registry().plugin("alpha")

        assert f"was made for plugin API {number or '1'};" in caught.value.message
        assert not world.marker("alpha").exists()


def test_a_warning_that_is_an_error_keeps_the_plugin_out(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each time it is asked for, and no other plugin notices; the next process, without the filter, uses it."""
    monkeypatch.setitem(deprecation.HOOKS, MAP, REMOVED)
    world.install("alpha", TAKES_CONFIG)
    world.install("beta")

    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("error", SplitLearnDeprecationWarning)
            with pytest.raises(SplitLearnDeprecationWarning, match=r"splitlearn-alpha 1\.0"):
                registry().plugin("alpha")
            assert registry().family("beta").model_type == "beta"

    reset_registry()
    assert len(told()) == 1


@pytest.mark.parametrize("table", TABLES)
def test_the_entries_keep_the_promise(table: str) -> None:
    """Each warns for one minor release at least, is not overdue, and is about something that is there."""
    now = Version(core_version())
    for change in getattr(deprecation, table).values():
        since, until = Version(change.since), Version(change.until)
        assert until.release[:2] > since.release[:2]
        assert until > now, "the time is over: remove it, and what it is about"
        assert change.instead


def test_the_entries_are_about_something() -> None:
    """A hook and an argument that are there still; a field that is not; a number below ours."""
    fields = set(inspect.signature(ModelFamily).parameters)
    assert set(deprecation.HOOKS) <= set(HOOKS)
    assert {argument for hook, argument in deprecation.ARGUMENTS if argument not in HOOKS.get(hook, ())} == set()
    assert fields.isdisjoint(deprecation.FIELDS)
    assert {change.moved_to for change in deprecation.FIELDS.values()} <= fields | {""}
    assert all(number < hookspecs.PLUGIN_API for number in deprecation.APIS)
