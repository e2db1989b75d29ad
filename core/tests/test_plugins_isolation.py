"""A plugin that is broken says so itself, and no other plugin notices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from splitlearn_core import BrokenPluginError, ModelFamily, SplitLearnError, load_split_model
from splitlearn_core.plugins.registry import PluginRegistry, registry

pytestmark = pytest.mark.light

HEAD = "from splitlearn_core import ModelFamily, hookimpl\n"
SOUND = """
@hookimpl
def splitlearn_model_families():
    return [ModelFamily(model_type="alpha", architecture="LlamaForCausalLM")]
"""
FAMILIES = "splitlearn_model_families"
MAP = "splitlearn_map_weight_keys"
STRATEGIES = "splitlearn_loading_strategies"


def families(body: str) -> str:
    return f"{HEAD}\n@hookimpl\ndef {FAMILIES}():\n    {body}\n"


#: Broken plugins: the source of each, and what the message or the hint has to name.
BROKEN = {
    "raises on import": ("raise RuntimeError('no luck today')", ["splitlearn_alpha", "RuntimeError", "no luck today"]),
    "exits on import": ("import sys\nsys.exit(3)", ["splitlearn_alpha", "SystemExit"]),
    "syntax error": ("def broken(:\n", ["splitlearn_alpha", "SyntaxError"]),
    "lacks a dependency": ("import surely_absent_package", ["pip install surely_absent_package"]),
    "imports a name that is not there": ("from splitlearn_core import Nonsense", ["ImportError", "Nonsense"]),
    "misspells a hook": (
        HEAD + "@hookimpl\ndef splitlearn_model_famlies():\n    return []\n",
        ["splitlearn_model_famlies", f"did you mean {FAMILIES}"],
    ),
    "wrong argument": (
        HEAD + SOUND + f"@hookimpl\ndef {MAP}(family, confg, checkpoint_keys):\n    return None\n",
        [MAP, "confg", "config"],
    ),
    "argument too many": (
        HEAD + f"@hookimpl\ndef {FAMILIES}(extra):\n    return []\n",
        [FAMILIES, "extra", "none"],
    ),
    "takes keyword arguments": (
        HEAD + SOUND + f"@hookimpl\ndef {MAP}(family, **more):\n    return None\n",
        [MAP, "more"],
    ),
    "defaulted argument": (
        HEAD + SOUND + f"@hookimpl\ndef {MAP}(family, config=None, checkpoint_keys=()):\n    return None\n",
        [MAP, "config", "default"],
    ),
    "raises in the hook": (families("raise OSError('disk on fire')"), [FAMILIES, "OSError", "disk on fire"]),
    "exits in the hook": (families("raise SystemExit(3)"), [FAMILIES, "SystemExit"]),
    "raises in the middle of a generator": (
        families("yield ModelFamily(model_type='alpha', architecture='X')\n    raise OSError('disk on fire')"),
        [FAMILIES, "OSError", "disk on fire"],
    ),
    "family that cannot be made": (families("return [ModelFamily('alpha')]"), [FAMILIES, "TypeError"]),
    "answers None": (families("return None"), [FAMILIES, "returned None", "let the hook return the list"]),
    "misspells a field": (
        families("return [ModelFamily(model_type='alpha', architecture='X', nrom='ln_f')]"),
        [FAMILIES, "TypeError: ModelFamily", "'nrom'", "did you mean 'norm'?"],
    ),
    "invents a field": (
        families("return [ModelFamily(model_type='alpha', architecture='X', xyzzy='ln_f')]"),
        ["'xyzzy'", "ModelFamily has the fields model_type, architecture, base"],
    ),
    "answers nothing": (families("return []"), [FAMILIES, "alpha"]),
    "answers a string": (families("return 'alpha'"), [FAMILIES, "'alpha'"]),
    "answers a number": (families("return 7"), [FAMILIES, "7"]),
    "answers a mapping": (families("return {'alpha': 1}"), [FAMILIES, "{'alpha': 1}"]),
    "answers a list of ints": (families("return [1, 2]"), [FAMILIES, "1"]),
    "answers a bare family": (
        families("return ModelFamily(model_type='alpha', architecture='X')"),
        [FAMILIES, "not a list", "let the hook return a list"],
    ),
    "answers families of another type": (
        families("return [ModelFamily(model_type='gamma', architecture='X')]"),
        ["'alpha'", "gamma", "entry point"],
    ),
    "answers a family twice": (
        families("return [ModelFamily(model_type='alpha', architecture='X')] * 2"),
        [FAMILIES, "'alpha' twice"],
    ),
    "implements no hook": ("VALUE = 1\n", ["splitlearn_alpha", "no hook"]),
    "forgets the mark": (
        HEAD + f"def {FAMILIES}():\n    return []\n",
        ["no hook", FAMILIES, "@hookimpl"],
    ),
    "strategies answer rubbish": (
        HEAD + SOUND + f"@hookimpl\ndef {STRATEGIES}():\n    return ['fast']\n",
        [STRATEGIES, "'fast'"],
    ),
    "strategies raise": (
        HEAD + SOUND + f"@hookimpl\ndef {STRATEGIES}():\n    raise OSError('disk on fire')\n",
        [STRATEGIES, "OSError", "disk on fire"],
    ),
    "strategy without a refusal": (
        HEAD
        + SOUND
        + "class Half:\n    name = 'half'\n    def read(self, plan):\n        return iter(())\n"
        + f"@hookimpl\ndef {STRATEGIES}():\n    return [Half()]\n",
        [STRATEGIES, "Half"],
    ),
    "strategy with a name of core's": (
        HEAD
        + SOUND
        + "from splitlearn_core.readers.mapped import MappedStrategy\n"
        + f"@hookimpl\ndef {STRATEGIES}():\n    return [MappedStrategy()]\n",
        [STRATEGIES, "mapped"],
    ),
}


def use(model_type: str = "alpha") -> BrokenPluginError:
    with pytest.raises(BrokenPluginError) as caught:
        registry().plugin(model_type)
    return caught.value


@pytest.mark.parametrize(("source", "named"), BROKEN.values(), ids=list(BROKEN))
def test_a_broken_plugin_is_named_with_its_cause(world: Any, source: str, named: list[str]) -> None:
    """The error has the distribution and version, the hook, what happened and what to do."""
    world.install("alpha", source, version="3.1.4")

    error = use()

    assert "splitlearn-alpha 3.1.4" in error.message
    assert "alpha" in error.message
    for text in named:
        assert text in str(error)
    assert "SPLITLEARN_DISABLE_PLUGINS=splitlearn-alpha" in error.hint


@pytest.mark.parametrize("source", [source for source, _ in BROKEN.values()], ids=list(BROKEN))
def test_a_broken_plugin_does_not_disturb_another(world: Any, source: str) -> None:
    """The next plugin has its own hooks, and its pluggy manager contains nothing of the broken one."""
    world.install("alpha", source)
    world.install("beta")

    use()
    family = registry().family("beta")
    mapping = registry().map_weight_keys(family, {}, ["some.key"])

    assert family.model_type == "beta"
    assert mapping is None
    assert [name for name, _ in registry().plugin("beta").manager.list_name_plugin()] == ["splitlearn_beta"]


@pytest.mark.parametrize("source", [source for source, _ in BROKEN.values()], ids=list(BROKEN))
def test_a_broken_plugin_stays_broken(world: Any, source: str) -> None:
    """A second use gives the same message in an exception of its own."""
    world.install("alpha", source)

    first, second = use(), use()

    assert str(first) == str(second)
    assert first is not second


@pytest.mark.parametrize("source", [source for source, _ in BROKEN.values()], ids=list(BROKEN))
def test_a_check_distinguishes_broken_plugins_from_valid_ones(world: Any, source: str) -> None:
    """``statuses(check=True)`` calls the hooks of all plugins and raises for none."""
    world.install("alpha", source)
    world.install("beta")

    rows = {row.entry.model_type: row for row in registry().statuses(check=True)}

    assert rows["alpha"].status == "broken"
    assert rows["alpha"].error
    assert rows["alpha"].hint
    assert rows["beta"].status == "ready"


def test_the_cause_is_chained(world: Any) -> None:
    """The exception of the plugin is the cause of ours, with its traceback."""
    world.install("alpha", families("raise OSError('disk on fire')"))

    for _ in range(2):
        assert isinstance(use().__cause__, OSError)


def test_an_interrupt_is_not_blamed_on_the_plugin(world: Any) -> None:
    """Ctrl-C while a plugin is imported interrupts."""
    world.install("alpha", "raise KeyboardInterrupt")

    with pytest.raises(KeyboardInterrupt):
        registry().family("alpha")


def test_a_missing_attribute_of_the_module_is_named(world: Any) -> None:
    """An entry point ``module:object`` whose object does not exist is broken."""
    info = world.install("alpha")
    (info / "entry_points.txt").write_text("[splitlearn.families]\nalpha = splitlearn_alpha:absent\n")

    assert "absent" in use().message


def test_an_object_can_be_the_plugin(world: Any) -> None:
    """An entry point ``module:object`` names an object whose methods are the hooks."""
    source = HEAD + (
        "class Plugin:\n"
        "    @hookimpl\n"
        "    def splitlearn_model_families(self):\n"
        "        return [ModelFamily(model_type='alpha', architecture='X')]\n"
        "plugin = Plugin()\n"
    )
    info = world.install("alpha", source)
    (info / "entry_points.txt").write_text("[splitlearn.families]\nalpha = splitlearn_alpha:plugin\n")

    assert registry().family("alpha").model_type == "alpha"


def test_a_hook_may_be_a_generator(world: Any) -> None:
    """A hook may yield its families."""
    world.install("alpha", families("yield ModelFamily(model_type='alpha', architecture='X')"))

    assert registry().family("alpha").architecture == "X"


def test_one_plugin_may_provide_several_types(world: Any) -> None:
    """Two entry points of one module share one import, and each has its own family."""
    source = (
        HEAD
        + world.marking("alpha").replace(".touch()", ".touch(exist_ok=False)")
        + (
            "@hookimpl\ndef splitlearn_model_families():\n"
            "    return [ModelFamily(model_type=t, architecture=t.title()) for t in ('alpha', 'alpha2')]\n"
        )
    )
    info = world.install("alpha", source)
    (info / "entry_points.txt").write_text(
        "[splitlearn.families]\nalpha = splitlearn_alpha\nalpha2 = splitlearn_alpha\n"
    )

    architectures = [registry().family(name).architecture for name in ("alpha", "alpha2")]

    assert architectures == ["Alpha", "Alpha2"]
    assert world.marker("alpha").exists()


KEYS = ["a.weight", "b.weight"]
#: Invalid bodies of the mapping hook, and what the message names.
BAD_MAPPINGS = {
    "raises": ("raise OSError('disk on fire')", ["OSError", "disk on fire"]),
    "exits": ("raise SystemExit(3)", ["SystemExit"]),
    "leaves a key out": ("return {'a.weight': 'x'}", ["b.weight", "1 of 2"]),
    "leaves all out": ("return {}", ["a.weight", "b.weight"]),
    "two keys to one name": ("return dict.fromkeys(checkpoint_keys, 'x')", ["a.weight", "b.weight", "'x'"]),
    "no mapping": ("return list(checkpoint_keys)", ["list"]),
    "a string": ("return 'a.weight'", ["str"]),
    "a number for a name": ("return {'a.weight': 1, 'b.weight': 'x'}", ["a.weight", "1"]),
}


def mapping_plugin(model_type: str, body: str) -> str:
    return HEAD + (
        f"@hookimpl\ndef {FAMILIES}():\n"
        f"    return [ModelFamily(model_type='{model_type}', architecture='LlamaForCausalLM')]\n"
        f"@hookimpl\ndef {MAP}(family, config, checkpoint_keys):\n    {body}\n"
    )


@pytest.mark.parametrize(("body", "named"), BAD_MAPPINGS.values(), ids=list(BAD_MAPPINGS))
def test_an_invalid_key_mapping_is_blamed_on_the_plugin(world: Any, body: str, named: list[str]) -> None:
    """If the hook raises or maps only some keys, the error names the plugin, the hook and the problem."""
    world.install("alpha", mapping_plugin("alpha", body), version="3.1.4")
    family = registry().family("alpha")

    with pytest.raises(BrokenPluginError) as caught:
        registry().map_weight_keys(family, {}, KEYS)

    for text in ("splitlearn-alpha 3.1.4", MAP, *named):
        assert text in str(caught.value)
    assert caught.value.hint


def test_a_good_key_mapping_is_returned(world: Any) -> None:
    """Names and None, one for each key, are returned unchanged."""
    world.install("alpha", mapping_plugin("alpha", "return {'a.weight': 'x', 'b.weight': None}"))
    family = registry().family("alpha")

    assert registry().map_weight_keys(family, {}, KEYS) == {"a.weight": "x", "b.weight": None}


def test_keys_outside_the_checkpoint_are_ignored(world: Any) -> None:
    """A mapping of additional keys adds no tensor that does not exist."""
    body = "return {**{key: key for key in checkpoint_keys}, 'no.such.tensor': 'x'}"
    world.install("alpha", mapping_plugin("alpha", body))
    family = registry().family("alpha")

    mapping = registry().map_weight_keys(family, {}, KEYS)

    assert sorted(mapping or {}) == KEYS


def test_only_the_hook_of_the_owner_maps_keys(world: Any) -> None:
    """Of two loaded plugins with the hook, only that of the family is called."""
    marking = world.marking("beta").replace("\n", ";")
    world.install("alpha", mapping_plugin("alpha", "return {key: 'alpha.' + key for key in checkpoint_keys}"))
    world.install("beta", mapping_plugin("beta", f"{marking} return None"))
    alpha, _ = registry().family("alpha"), registry().family("beta")

    mapping = registry().map_weight_keys(alpha, {}, KEYS)

    assert mapping == {"a.weight": "alpha.a.weight", "b.weight": "alpha.b.weight"}
    assert not world.marker("beta").exists()


def test_hooks_may_take_fewer_arguments(world: Any) -> None:
    """A hook names only the arguments it needs, as pluggy allows."""
    source = HEAD + SOUND + f"@hookimpl\ndef {MAP}(checkpoint_keys):\n    return {{k: k for k in checkpoint_keys}}\n"
    world.install("alpha", source)

    mapping = registry().map_weight_keys(registry().family("alpha"), {}, KEYS)

    assert mapping == {key: key for key in KEYS}


def test_an_additional_hook_may_return_none(world: Any) -> None:
    """The strategy hook of a family plugin may return nothing."""
    world.install("alpha", HEAD + SOUND + f"@hookimpl\ndef {STRATEGIES}():\n    return None\n")

    assert registry().plugin("alpha").strategies == ()


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("architecture", "near"),
    [("LlamaForCasualLM", "'LlamaForCausalLM'"), ("torch.nn:Lineer", "'Linear'")],
)
def test_an_architecture_that_is_misspelt_names_the_nearest(
    world: Any, single: Path, architecture: str, near: str
) -> None:
    """A misspelt class name is distinguished from a transformers that is too old."""
    world.install("llama", world.source("llama").replace("LlamaForCausalLM", architecture))

    with pytest.raises(BrokenPluginError) as caught:
        load_split_model("llama", (2, 4), single)

    assert caught.value.hint.startswith(f"did you mean {near}?")


@pytest.mark.heavy
def test_an_architecture_like_no_other_names_none(world: Any, single: Path) -> None:
    """A class is suggested only if its name is similar."""
    world.install("llama", world.source("llama").replace("LlamaForCausalLM", "Xyzzy9Plugh"))

    with pytest.raises(BrokenPluginError) as caught:
        load_split_model("llama", (2, 4), single)

    assert caught.value.hint.startswith("a newer transformers")


def test_two_registries_share_nothing(world: Any) -> None:
    """A plugin loaded in one registry is not loaded in another."""
    world.install("alpha")
    item, other = PluginRegistry(), PluginRegistry()

    item.family("alpha")

    assert isinstance(item.family("alpha"), ModelFamily)
    assert not other._loaded


#: Wrong arguments of ModelFamily, and what the error names.
WRONG_FAMILIES = {
    "no such base": 'base="transformer"',
    "no such layers": 'layers="h"',
    "no such embedding": 'embedding="wte"',
    "no such norm": 'norm="ln_f"',
    "no such head": 'head="output"',
    "no such module to skip": 'skip_outside_bottom=("drop.deep.down",)',
    "no such module to zero": 'zero_outside_bottom=("wpe.deep.down",)',
    "impossible_cuts raises": "impossible_cuts=lambda config: 1 / 0",
    "impossible_cuts answers None": "impossible_cuts=lambda config: None",
    "impossible_cuts answers a list": "impossible_cuts=lambda config: [2]",
    "renamed is one pair": 'renamed=("model.", "own.")',
    "config_names is None": "config_names=None",
    "architecture of an absent module": 'architecture="surely_absent_package:Model"',
    "architecture that is no model": 'architecture="torch.nn:Linear"',
    "architecture that is no class": 'architecture="torch:float32"',
}


@pytest.mark.heavy
@pytest.mark.parametrize("arguments", WRONG_FAMILIES.values(), ids=list(WRONG_FAMILIES))
def test_a_family_that_describes_another_model_is_an_error_of_ours(world: Any, single: Path, arguments: str) -> None:
    """A mistake in the description of a family is a SplitLearnError with a hint."""
    source = HEAD + (
        "@hookimpl\ndef splitlearn_model_families():\n"
        f"    said = dict(model_type='llama', architecture='LlamaForCausalLM') | dict({arguments})\n"
        "    return [ModelFamily(**said)]\n"
    )
    world.install("llama", source)

    with pytest.raises(SplitLearnError) as caught:
        load_split_model("llama", (2, 4), single)

    assert caught.value.hint


@pytest.mark.parametrize("model_type", ["['alpha']", "None", "7", "''"])
def test_a_model_type_that_is_not_text_is_blamed_on_the_plugin(world: Any, model_type: str) -> None:
    """The model type must be text, and equal to the name of the entry point."""
    world.install("alpha", families(f"return [ModelFamily(model_type={model_type}, architecture='X')]"))

    assert "splitlearn-alpha 1.0" in use().message
