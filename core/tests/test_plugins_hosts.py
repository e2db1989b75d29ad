"""Packages that add a host: found like other plugins, imported when a model is loaded there, faulty on their own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from splitlearn_core import BrokenPluginError, ConfigurationError, ModelConfig, PluginConflictError
from splitlearn_core.plugins.registry import PluginRegistry, registry

pytestmark = pytest.mark.light

GROUP = "splitlearn.hosts"
MODEL = {"model_id": "a", "model_type": "llama", "model_path": "m", "component": "trunk", "split_points": (2, 4)}
LOAD = "def load({arguments}):\n    raise RuntimeError('no luck today')\n"
SOUND = LOAD.format(arguments="config, plan, report, threads")


@pytest.fixture
def install(world: Any) -> Callable[..., None]:
    """Return a function that installs a package with a host, which leaves a mark when it is imported."""

    def install(name: str, text: str = SOUND, **options: Any) -> None:
        distribution = options.pop("distribution", f"host-{name}")
        world.install(name, world.marking(distribution) + text, distribution=distribution, group=GROUP, **options)

    return install


def test_a_configuration_may_name_it(world: Any, install: Any) -> None:
    """It is found by its metadata, and not imported for that; the registry then gives the object itself."""
    install("cloud")
    config = ModelConfig(**MODEL, host="cloud", restart_limit=1)
    assert ModelConfig.from_dict(config.to_dict()) == config
    assert not world.marker("host-cloud").exists()
    assert callable(registry().host("cloud").load)
    assert world.marker("host-cloud").exists()


def test_it_may_have_options(install: Any, tmp_path: Path) -> None:
    """Plain values of its own, in files too; they decide what is loaded, and later changes of them elsewhere do not."""
    install("cloud")
    given = {"zone": "b", "cores": 2, "weights": {"fast": 0.5}, "names": ["x", True]}
    config = ModelConfig(**MODEL, host="cloud", host_options=given)
    given["cores"] = 3
    assert config.host_options == {**given, "cores": 2}
    for suffix, text in ((".yaml", config.to_yaml()), (".toml", config.to_toml())):
        path = tmp_path / f"model{suffix}"
        path.write_text(text)
        assert ModelConfig.from_file(path) == config
    other = ModelConfig(**MODEL, host="cloud", host_options=given)
    assert hash(config.fingerprint) != hash(other.fingerprint)
    assert hash(other) == hash(ModelConfig(**MODEL, host="cloud", host_options=dict(reversed(given.items()))))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["b"], "is not a table of names and values"),
        ({"a zone": 1}, "has the name 'a zone'"),
        ({"zone": None}, "contains None; strings, numbers"),
        ({"zone": float("nan")}, "contains nan"),
        ({"a": {"b": {"c": {"d": {"e": 1}}}}}, "contains {'e': 1}"),
    ],
)
def test_options_are_plain_values(install: Any, options: Any, words: str) -> None:
    """As a file could hold them."""
    install("cloud")
    with pytest.raises(ConfigurationError) as error:
        ModelConfig(**MODEL, host="cloud", host_options=options)
    assert words in error.value.message


@pytest.mark.parametrize("host", ["inline", "process"])
def test_core_s_own_hosts_have_no_options(host: str) -> None:
    """They would have no effect."""
    with pytest.raises(ConfigurationError, match=f"host_options: host '{host}' has none"):
        ModelConfig(**MODEL, host=host, host_options={"zone": "b"})


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("clout", "is not installed (installed: inline, process, cloud); did you mean 'cloud'?"),
        ("Process", "did you mean 'process'?"),
        ("ray", "pip install splitlearn-ray"),
    ],
)
def test_an_unknown_host_is_refused_with_those_that_there_are(install: Any, name: str, words: str) -> None:
    """Where it is configured, before anything is loaded."""
    install("cloud")
    with pytest.raises(ConfigurationError) as error:
        ModelConfig(**MODEL, host=name)
    assert words in error.value.message


@pytest.mark.parametrize(
    ("variable", "value"), [("SPLITLEARN_PLUGINS", "gpt2"), ("SPLITLEARN_DISABLE_PLUGINS", "host-cloud")]
)
def test_variables_choose(install: Any, monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    """The lists hold for hosts as for all plugins, and not for core's own."""
    install("cloud")
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigurationError, match=f"blocked by {variable}"):
        ModelConfig(**MODEL, host="cloud")
    assert ModelConfig(**MODEL, host="process").host == "process"
    (status,) = [status for status in registry().statuses() if status.entry.name == "cloud"]
    assert status.status == "blocked"


def test_it_only_runs_trunks(install: Any) -> None:
    """As a process does: what the data owner has stays in their process."""
    install("cloud")
    with pytest.raises(ConfigurationError, match="is for trunks, and a bottom"):
        ModelConfig(**{**MODEL, "component": "bottom"}, host="cloud")


BROKEN = {
    "raises on import": ("raise RuntimeError('no luck today')", "no luck today"),
    "has no load": ("def lode():\n    pass\n", "is not a host: it needs a method def load"),
    "takes other arguments": (LOAD.format(arguments="config"), r"def load\(config\) cannot be called as def load"),
    "is asynchronous": ("async " + SOUND, "is asynchronous"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_one_is_named_and_harms_no_other(install: Any, case: str) -> None:
    """Without a check nothing is imported; with one its row says what is wrong."""
    text, words = BROKEN[case]
    install("cloud", text)
    install("sound")
    for _ in range(2):
        with pytest.raises(BrokenPluginError, match=words) as error:
            registry().host("cloud")
        assert "host-cloud 1.0 (host 'cloud')" in error.value.message
    assert callable(registry().host("sound").load)
    rows = {status.entry.name: status.status for status in registry().statuses(check=True)}
    assert (rows["cloud"], rows["sound"]) == ("broken", "ready")


def test_a_class_and_a_name_of_cores_are_refused(world: Any, install: Any) -> None:
    """A class is not a host, and no plugin takes the place of core's own."""
    install("cloud", "class Host:\n    def load(self, config, plan, report, threads):\n        pass\n")
    points = world.folder / "host_cloud-1.0.dist-info" / "entry_points.txt"
    points.write_text(f"[{GROUP}]\ncloud = host_cloud:Host\n")
    with pytest.raises(BrokenPluginError, match="not a host") as error:
        PluginRegistry().host("cloud")
    assert "name an instance" in error.value.hint
    points.write_text(f"[{GROUP}]\nprocess = host_cloud\n")
    (status,) = [s for s in PluginRegistry().statuses(check=True) if s.entry.distribution == "host-cloud"]
    assert status.status == "broken"
    assert "core's own" in status.error


def test_two_packages_with_one_name(install: Any) -> None:
    """Neither is chosen."""
    install("cloud", distribution="first-cloud")
    install("cloud", distribution="second-cloud")
    with pytest.raises(PluginConflictError, match="host 'cloud' is claimed by"):
        registry().host("cloud")


def test_the_list_shows_it(install: Any, cli: Callable[..., tuple[int, str, str]]) -> None:
    """In a table of its own, and as JSON."""
    install("cloud")
    code, out, _ = cli("plugins", "list")
    assert code == 0
    assert any(line.split()[:4] == ["cloud", "host-cloud", "1.0", "ready"] for line in out.splitlines())
    _, out, _ = cli("plugins", "--json")
    (row,) = [row for row in json.loads(out) if row["name"] == "cloud"]
    assert (row["kind"], row["model_type"], row["hooks"]) == ("host", None, [])


@pytest.mark.heavy
def test_a_failure_of_a_load_is_the_hosts(llama: Any, install: Any, single: Any) -> None:
    """Whatever it raises or returns, by name; what stops a load passes."""
    from splitlearn_core import LoadCancelledError, LoadFailedError
    from splitlearn_core.manager.loaders.loader import ModelLoader

    install("cloud")
    install("empty", "def load(config, plan, report, threads):\n    report(None)\n")
    loader = ModelLoader()

    def load(host: str, report: Callable[[Any], None] = lambda _: None) -> None:
        config = ModelConfig(**{**MODEL, "model_path": str(single)}, host=host)
        loader.load(config, loader.plan(config, lambda _: None), report)

    with pytest.raises(LoadFailedError, match=r"host 'cloud' failed to load .* no luck today"):
        load("cloud")
    with pytest.raises(ConfigurationError, match="'empty' returned NoneType, not LoadedModel"):
        load("empty")

    def stop(_: Any) -> None:
        raise LoadCancelledError("stopped")

    with pytest.raises(LoadCancelledError, match="stopped"):
        load("empty", stop)
