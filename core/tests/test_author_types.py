"""The errors that a type checker shows to the author of a plugin."""

from __future__ import annotations

import ast
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from splitlearn_core import hookspecs
from splitlearn_core.plugins import contract
from splitlearn_core.plugins.contract import HOOKS

pytestmark = pytest.mark.light

#: Heavy libraries are not needed to check a plugin against a hook.
CONFIGURATION = """
[mypy]
strict = true
[mypy-torch.*,transformers.*,huggingface_hub.*,safetensors.*,psutil.*,tqdm.*,yaml.*,peft.*]
follow_imports = skip
ignore_missing_imports = true
[mypy-splitlearn_core.adapters.peft_models,splitlearn_core.build.*,splitlearn_core.factory,splitlearn_core.manager.*]
follow_imports = skip
[mypy-splitlearn_core.pipeline,splitlearn_core.api,splitlearn_core.storage.*,splitlearn_core.loading.*]
follow_imports = skip
"""

RIGHT = '''
"""A plugin with all hooks, typed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from splitlearn_core import LoadingStrategy, ModelFamily, hookimpl


@hookimpl
def splitlearn_model_families() -> list[ModelFamily]:
    return [ModelFamily(model_type="llama", architecture="LlamaForCausalLM")]


@hookimpl(trylast=True)
def splitlearn_map_weight_keys(
    checkpoint_keys: Sequence[str], family: ModelFamily, config: Mapping[str, Any]
) -> dict[str, str | None]:
    return {key: key for key in checkpoint_keys}


@hookimpl
def splitlearn_loading_strategies() -> Iterator[LoadingStrategy]:
    yield from ()


if TYPE_CHECKING:
    import right
    from splitlearn_core import FamilyPlugin, KeyMappingPlugin, StrategyPlugin

    _family: FamilyPlugin = right
    _keys: KeyMappingPlugin = right
    _strategies: StrategyPlugin = right
'''

#: Plugins as objects and as modules without a type, which are right as well.
OTHERS = """
from splitlearn_core import FamilyPlugin, ModelFamily, hookimpl

import untyped

class Plugin:
    @hookimpl
    def splitlearn_model_families(self) -> tuple[ModelFamily, ...]:
        return ()

an_object: FamilyPlugin = Plugin()
a_module: FamilyPlugin = untyped
"""
UNTYPED = """
# mypy: allow-untyped-defs
from splitlearn_core import ModelFamily, hookimpl

@hookimpl
def splitlearn_model_families():
    return [ModelFamily(model_type="llama", architecture="LlamaForCausalLM")]
"""

#: Wrong plugins: the protocol, the function, and what the checker names.
WRONG = {
    "misspelt": ("FamilyPlugin", "def splitlearn_model_famlies() -> list[ModelFamily]: return []", "FamilyPlugin"),
    "answer": ("FamilyPlugin", "def splitlearn_model_families() -> list[str]: return []", "list[str]"),
    "one_family": (
        "FamilyPlugin",
        "def splitlearn_model_families() -> ModelFamily: raise KeyError",
        "def splitlearn_model_families() -> ModelFamily",
    ),
    "asynchronous": (
        "FamilyPlugin",
        "async def splitlearn_model_families() -> list[ModelFamily]: return []",
        "Coroutine[Any, Any, list[ModelFamily]]",
    ),
    "argument": (
        "KeyMappingPlugin",
        (
            "def splitlearn_map_weight_keys("
            "family: ModelFamily, confg: Mapping[str, Any], checkpoint_keys: Sequence[str]) -> None: ..."
        ),
        "confg: Mapping[str, Any]",
    ),
    "argument_type": (
        "KeyMappingPlugin",
        (
            "def splitlearn_map_weight_keys("
            "family: ModelFamily, config: Mapping[str, Any], checkpoint_keys: set[str]) -> None: ..."
        ),
        "checkpoint_keys: set[str]",
    ),
    "mapping": (
        "KeyMappingPlugin",
        (
            "def splitlearn_map_weight_keys("
            "family: ModelFamily, config: Mapping[str, Any], checkpoint_keys: Sequence[str]"
            ") -> dict[str, int]: return {}"
        ),
        "dict[str, int]",
    ),
    "strategies": ("StrategyPlugin", "def splitlearn_loading_strategies() -> list[str]: return []", "list[str]"),
}
HEAD = """
from collections.abc import Mapping, Sequence
from typing import Any
from splitlearn_core import ModelFamily, hookimpl

@hookimpl
"""

SPECS: dict[str, Callable[..., Any]] = {name: getattr(hookspecs, name) for name in HOOKS}
PROTOCOLS = {name: value for name, value in vars(contract).items() if name.endswith("Plugin")}


@pytest.fixture(scope="module")
def verdict(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Check all plugins at once, and return what mypy says of each file."""
    api = pytest.importorskip("mypy.api")
    folder = tmp_path_factory.mktemp("plugins")
    files = {"right": RIGHT, "others": OTHERS, "untyped": UNTYPED}
    for name, (protocol, function, _) in WRONG.items():
        files[f"wrong_{name}"] = HEAD + function + "\n"
        files[f"use_{name}"] = (
            f"import wrong_{name}\nfrom splitlearn_core import {protocol}\nplugin: {protocol} = wrong_{name}\n"
        )
    for name, source in files.items():
        (folder / f"{name}.py").write_text(source)
    (folder / "mypy.ini").write_text(CONFIGURATION)
    # mypy refuses to be told of the folder of installed packages, where it finds core by itself.
    source_of_core = Path(hookspecs.__file__).parents[1]
    paths = [folder, *([] if source_of_core.name == "site-packages" else [source_of_core])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MYPYPATH", os.pathsep.join(map(str, paths)))
        # mypy sets it, and leaves it.
        patch.setenv("MYPY_CONFIG_FILE_DIR", str(folder))
        patch.chdir(folder)
        output, errors, _ = api.run(
            ["--config-file", "mypy.ini", "--cache-dir", str(folder / "cache"), *(f"{name}.py" for name in files)]
        )
    assert not errors
    said = dict.fromkeys(files, "")
    for line in output.splitlines():
        name, _, rest = line.partition(".py:")
        if name in said:
            said[name] += rest + "\n"
    assert "Found" in output, output
    return said


def test_right_plugins_are_accepted(verdict: dict[str, str]) -> None:
    """A typed module, one that checks itself, an object, and a module without annotations."""
    assert {name: verdict[name] for name in ("right", "others", "untyped")} == {
        "right": "",
        "others": "",
        "untyped": "",
    }


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_plugin_is_an_error_of_the_checker(verdict: dict[str, str], name: str) -> None:
    """Where the module is held to the protocol, and nowhere else; what is wrong with it is shown."""
    said = verdict[f"use_{name}"]

    assert said.count("error:") == 1, said
    assert "3: error: Incompatible types in assignment (expression has type Module, variable has type" in said
    assert WRONG[name][2] in said
    assert verdict[f"wrong_{name}"] == ""


def test_each_hook_has_a_protocol() -> None:
    """With the arguments and types of its specification, arguments by name alone."""
    found = {}
    for protocol in PROTOCOLS.values():
        (name,) = (attribute for attribute in vars(protocol) if attribute in HOOKS)
        signature = inspect.signature(getattr(protocol, name))
        first, *others = signature.parameters.values()
        assert first.name == "self"
        assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in others)
        found[name] = ({p.name: p.annotation for p in others}, signature.return_annotation)
    assert found == {
        name: (
            {p.name: p.annotation for p in inspect.signature(spec).parameters.values()},
            inspect.signature(spec).return_annotation,
        )
        for name, spec in SPECS.items()
    }


def test_the_protocols_are_public_and_light(world: Any) -> None:
    """They come from the package, and neither torch nor transformers is imported for them."""
    names = ", ".join(PROTOCOLS)
    done = world.python("-c", f"from splitlearn_core import {names}; import sys; print('torch' in sys.modules)")

    assert done.stdout == "False\n", done.stderr


def test_the_manual_shows_the_idiom() -> None:
    """The example in the protocols' manual is Python, and assigns a module to a protocol."""
    manual = inspect.getdoc(contract) or ""
    block = "\n".join(line[4:] for line in manual.splitlines() if line.startswith("    "))
    tree = ast.parse(block)

    assert any(isinstance(node, ast.AnnAssign) and ast.unparse(node.annotation) == "FamilyPlugin" for node in tree.body)


MAP, FAMILIES = "splitlearn_map_weight_keys", "splitlearn_model_families"
SPECIFIED = (
    f"\n  specified: def {MAP}(family: ModelFamily, config: Mapping[str, Any], checkpoint_keys: Sequence[str])"
    " -> Mapping[str, str | WeightConversion | None] | None\n"
)

#: Implementations that cannot be called as the hook is: the function below its mark, and what is said of it.
REFUSED = {
    "misspelt argument": (
        f"def {MAP}(family, confg: dict) -> None:",
        f"hook {MAP} has no argument confg (did you mean config?); it may take (family, config, checkpoint_keys)",
    ),
    "by keyword only": (
        f"def {MAP}(family, *, config):",
        f"hook {MAP} takes config by keyword only, but is called by position; remove the '*'",
    ),
    "variadic": (
        f"def {MAP}(*args, **more):",
        f"hook {MAP} takes *args, **more, which is never passed; name the arguments",
    ),
    "defaults": (
        f"def {MAP}(family, config={{}}, *, checkpoint_keys=()):",
        f"hook {MAP} has a default value for config, checkpoint_keys, which would never be passed; remove it",
    ),
    "asynchronous": (
        f"async def {MAP}(family):",
        f"hook {MAP} is asynchronous: hooks return at once, write a plain def",
    ),
}


def refusal(world: Any, source: str) -> str:
    """Return the message of the error when a plugin is used."""
    from splitlearn_core import BrokenPluginError
    from splitlearn_core.plugins.registry import registry

    world.install("alpha", source)
    with pytest.raises(BrokenPluginError) as caught:
        registry().plugin("alpha")
    return caught.value.message


@pytest.mark.parametrize(("function", "problem"), REFUSED.values(), ids=list(REFUSED))
def test_a_wrong_signature_is_shown_with_the_specification(world: Any, function: str, problem: str) -> None:
    """What is wrong, what was specified, what was found and where."""
    source = f"from splitlearn_core import hookimpl\n\n@hookimpl\n{function}\n    return None\n"

    found = f"  found:     {function.rstrip(':')}  ({world.folder / 'splitlearn_alpha.py'}:3)"
    assert problem + SPECIFIED + found in refusal(world, source)


def test_all_that_is_wrong_is_said_at_once(world: Any) -> None:
    """Two functions, one with two problems."""
    source = (
        "from splitlearn_core import hookimpl\n\n"
        f"@hookimpl\nasync def {FAMILIES}(extra): ...\n\n"
        "@hookimpl\ndef splitlearn_loading_strategy(): ...\n"
    )

    message = refusal(world, source)

    assert f"hook {FAMILIES} is asynchronous" in message
    assert "has no argument extra" in message
    assert "there is no hook splitlearn_loading_strategy; did you mean splitlearn_loading_strategies?" in message
    assert message.count("specified:") == message.count("found:") == 2


@pytest.mark.parametrize("option", ["wrapper", "hookwrapper"])
def test_a_wrapper_is_refused(world: Any, option: str) -> None:
    """A plugin's hooks are called alone, so there is nothing to wrap."""
    source = f"from splitlearn_core import hookimpl\n\n@hookimpl({option}=True)\ndef {FAMILIES}():\n    yield\n"

    assert f"hook {FAMILIES} is marked as a wrapper" in refusal(world, source)


def test_a_class_instead_of_an_object_is_reported(world: Any) -> None:
    """An entry point that names a class has functions that still want their ``self``."""
    from splitlearn_core.plugins.registry import registry

    body = f"    @hookimpl\n    def {FAMILIES}(self): return []\n"
    info = world.install("alpha", f"from splitlearn_core import hookimpl\nclass Plugin:\n{body}")
    (info / "entry_points.txt").write_text("[splitlearn.families]\nalpha = splitlearn_alpha:Plugin\n")

    (row,) = [row for row in registry().statuses(check=True) if row.entry.name == "alpha"]

    assert row.status == "broken"
    assert "create an instance" in row.error


def test_a_hook_may_have_another_name_and_come_from_a_later_core(world: Any) -> None:
    """pluggy's ``specname`` and ``optionalhook`` mean what they mean elsewhere."""
    from splitlearn_core.plugins.registry import registry

    source = (
        "from splitlearn_core import ModelFamily, hookimpl\n"
        f"@hookimpl(specname='{FAMILIES}')\ndef families():\n"
        "    return [ModelFamily(model_type='alpha', architecture='X')]\n"
        "@hookimpl(optionalhook=True)\ndef splitlearn_of_tomorrow(anything): ...\n"
    )
    world.install("alpha", source)

    (row,) = [row for row in registry().statuses() if row.entry.name == "alpha"]

    assert (row.status, row.error) == ("ready", "")
    assert registry().family("alpha").architecture == "X"
    assert FAMILIES in row.hooks


def test_an_answer_that_has_to_be_awaited_is_refused(world: Any) -> None:
    """A plain function that returns a coroutine is reported, and the coroutine is closed."""
    from splitlearn_core import BrokenPluginError
    from splitlearn_core.plugins.registry import registry

    source = (
        "from splitlearn_core import hookimpl\nasync def later(): return []\n"
        f"@hookimpl\ndef {FAMILIES}(): return later()\n"
    )
    world.install("alpha", source)

    with pytest.raises(BrokenPluginError, match=f"hook {FAMILIES} returned a coroutine"):
        registry().family("alpha")


def test_an_object_whose_attributes_raise_has_its_hooks_all_the_same(world: Any) -> None:
    """Looking for hooks evaluates no property: one that raises does no harm."""
    from splitlearn_core.plugins.registry import registry

    source = (
        "from splitlearn_core import ModelFamily, hookimpl\n"
        "class Plugin:\n"
        "    @property\n    def anything(self): raise OSError('disk on fire')\n"
        f"    @hookimpl\n    def {FAMILIES}(self):\n"
        "        return [ModelFamily(model_type='alpha', architecture='X')]\n"
        "plugin = Plugin()\n"
    )
    info = world.install("alpha", source)
    (info / "entry_points.txt").write_text("[splitlearn.families]\nalpha = splitlearn_alpha:plugin\n")

    assert registry().family("alpha").architecture == "X"


def test_an_object_that_cannot_be_inspected_is_broken(world: Any) -> None:
    """What its ``__dir__`` raises is the plugin's fault."""
    from splitlearn_core import BrokenPluginError
    from splitlearn_core.plugins.registry import registry

    source = "class Plugin:\n    def __dir__(self): raise OSError('disk on fire')\nplugin = Plugin()\n"
    info = world.install("alpha", source)
    (info / "entry_points.txt").write_text("[splitlearn.families]\nalpha = splitlearn_alpha:plugin\n")

    with pytest.raises(BrokenPluginError, match="disk on fire"):
        registry().family("alpha")
