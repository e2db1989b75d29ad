"""The doctor finds what is wrong, names it, and says what mends it; whatever is broken, it goes on."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from splitlearn_core.doctor import installation, runner, system
from splitlearn_core.doctor.load_checks import check_model, check_plugin, memory_needed
from splitlearn_core.doctor.report import Check, Finding, Level, Report
from splitlearn_core.doctor.runner import Outcome, examine, run_in_subprocess
from splitlearn_core.plan.splitplan import MemoryNeeds
from splitlearn_core.plugins.registry import registry, reset_registry
from splitlearn_core.system_memory import MemoryReading
from support.warm import WarmInterpreter

pytestmark = pytest.mark.light

PACKAGE = Path(__file__).parents[1]
HEAD = "from splitlearn_core import ModelFamily, hookimpl\n"
GIVEN = "@hookimpl\ndef splitlearn_model_families():\n    return [{}]\n"
ALPHA = "ModelFamily(model_type='alpha', architecture='LlamaForCausalLM')"


def about(text: str, findings: Any) -> list[Finding]:
    """Return the findings that name something."""
    return [finding for finding in findings if text in finding.what]


def wrong(findings: Any) -> list[Finding]:
    return [finding for finding in findings if finding.level is Level.WRONG]


def plugin_check(name: str, kind: str = "family") -> Check:
    return Check("plugins", check_plugin, (kind, name, f"splitlearn-{name}"), name)


def findings_of(outcomes: list[Outcome]) -> list[Finding]:
    return [finding for outcome in outcomes for finding in outcome.findings]


# --- the whole of it


@pytest.fixture
def warm_processes(warm: WarmInterpreter, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the doctor's processes be warm ones, where they import torch and it is not what is broken."""
    monkeypatch.setattr(sys, "executable", str(warm.path))


def test_a_sound_plugin_is_found_and_named(world: Any) -> None:
    """What the entry point names, the package, the version and the hooks."""
    world.install("alpha", version="3.1")

    report = examine(quick=True)

    (found,) = about("'alpha'", report.findings)
    assert (found.check, found.level) == ("plugins", Level.OK)
    assert found.what == "model type 'alpha': splitlearn-alpha 3.1, with model_families"


def test_the_command_prints_and_its_exit_code_says_it(world: Any, cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """JSON and text hold the same; a broken plugin is exit code 1, with its mend underneath."""
    monkeypatch.setattr(runner, "_REPORT_AFTER", 60.0)
    world.install("alpha", "import surely_absent_package")

    code, out, err = cli("doctor", "--quick", "--json")
    text_code, text, _ = cli("doctor", "--quick")

    said = json.loads(out)
    assert (code, text_code, err) == (1, 1, "")
    assert said["healthy"] is False
    assert said["counts"]["wrong"] == sum(finding["level"] == "wrong" for finding in said["findings"])
    (found,) = [finding for finding in said["findings"] if "surely_absent_package" in finding["what"]]
    assert found.keys() == {"check", "level", "what", "where", "fix"}
    lines = text.splitlines()
    (at,) = [number for number, line in enumerate(lines) if line.startswith("wrong") and "splitlearn-alpha" in line]
    fix = next(line.strip() for line in lines[at:] if line.strip().startswith("fix:"))
    assert fix.startswith("fix: pip install surely_absent_package")
    assert lines[-1] == ", ".join(f"{said['counts'][level]} {level}" for level in ("wrong", "note", "ok"))


def test_notes_do_not_fail() -> None:
    """Only what is wrong makes a report unhealthy."""
    assert Report((Finding("a", Level.OK, "b"), Finding("a", Level.NOTE, "c"))).healthy
    assert not Report((Finding("a", Level.WRONG, "b"),)).healthy


def test_the_doctor_imports_no_plugin_and_no_torch_itself(llama: Any) -> None:
    """Foreign code runs in other processes."""
    code = (
        "import sys\nfrom splitlearn_core.doctor.runner import examine\nexamine(quick=True)\n"
        "print(sorted({'torch', 'transformers', 'splitlearn_llama'} & set(sys.modules)))"
    )

    done = llama.python("-c", code)

    assert done.stdout == "[]\n", done.stderr


@pytest.mark.heavy
@pytest.mark.usefixtures("warm_processes")
def test_everything_is_proven_where_a_plugin_carries_a_model(world: Any, single: Path) -> None:
    """Devices, the class of transformers, and a model that is cut and compared."""
    shutil.copytree(single, world.folder / "carried" / "model")
    (world.folder / "carried" / "__init__.py").write_text("")
    family = "ModelFamily(model_type='llama', architecture='LlamaForCausalLM', bundled_checkpoint='carried:model')"
    # The only one that is looked at: others that are installed here carry models, too.
    world.install("llama", HEAD + GIVEN.format(family))

    report = examine("bundled:llama")

    assert not wrong(finding for finding in report.findings if finding.check in ("devices", "self-test", "model"))
    assert about("float32, float16, bfloat16, float64", report.findings)
    assert about("LlamaForCausalLM", report.findings)
    assert about("equals the unsplit model to the last bit", report.findings)
    assert about("read by mapped (0 B)", report.findings)


def checks_of(findings: Any) -> set[str]:
    """Return the checks that found something; without the self-test, for which a plugin must carry a model."""
    return {finding.check for finding in findings} - {"self-test"}


@pytest.mark.heavy
def test_a_torch_that_cannot_be_imported_is_one_finding(world: Any, llama: Any, single: Path) -> None:
    """The only one: what depends on it is left out, plugins and models too, and the rest is examined as ever."""
    (world.folder / "torch.py").write_text("raise OSError('libtorch is not what it was')\n")
    world.install("alpha")
    world.install("beta", "import torch\n" + world.source("beta"))

    report = examine(str(single))

    (found,) = about("libtorch is not what it was", report.findings)
    assert (found.check, found.level) == ("torch", Level.WRONG)
    assert found.fix == "pip install --force-reinstall torch"
    left = about("left out: torch cannot be imported", report.findings)
    assert checks_of(left) == {"devices", "transformers", "plugins", "model"}
    assert {finding.level for finding in left} == {Level.NOTE}
    assert about("left out: ", [finding for finding in report.findings if finding.check == "self-test"])
    assert about("'beta'", left)
    assert about("'alpha'", report.findings)[0].level is Level.OK
    assert about("read by mapped", report.findings)
    assert [finding for finding in wrong(report.findings) if finding.check != "packages"] == [found]


@pytest.mark.heavy
def test_a_torch_that_is_not_installed_is_one_finding(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the versions; nothing that needs it is tried."""
    monkeypatch.setattr("splitlearn_core.doctor.runner._is_missing", "torch".__eq__)
    world.install("alpha", "import torch\n" + world.source("alpha"))

    report = examine()

    left = about("left out: torch cannot be imported", report.findings)
    assert checks_of(left) == {"devices", "transformers", "plugins"}
    assert not wrong(finding for finding in report.findings if finding.check != "packages")


# --- checks that fail


def test_a_check_that_fails_is_a_finding() -> None:
    """Its type, text and place are named, here and in another process; what comes after it is made."""
    failing = Check("odd", system.open_files, ("many",), "files", "count them")  # type: ignore[arg-type]
    passing = Check("machine", system.check_machine)

    for found in (failing.run(), findings_of(run_in_subprocess([failing, passing], 60))):
        assert (found[0].check, found[0].level, found[0].fix) == ("odd", Level.WRONG, "count them")
        assert "files failed: TypeError: " in found[0].what
        assert re.search(r"system\.py:\d+$", found[0].where)
    assert about("processors", found)


#: Plugins that take their process with them, and what is said.
FATAL = {
    "exits": ("import os; print('so long', flush=True); os._exit(3)", "ended its process with exit code 3"),
    "exits well": ("import os; os._exit(0)", "ended its process with exit code 0"),
    "is killed": ("import os; os.kill(os.getpid(), 9)", "ended its process by signal SIGKILL"),
    "hangs": ("import threading; threading.Event().wait()", "did not finish within 15 seconds"),
}


@pytest.mark.parametrize(("source", "said"), FATAL.values(), ids=list(FATAL))
def test_a_plugin_may_end_its_process(world: Any, monkeypatch: pytest.MonkeyPatch, source: str, said: str) -> None:
    """It is named, and the plugin after it is examined; who is waited for is told meanwhile, and once."""
    world.install("alpha", f"{source}\n{HEAD}{GIVEN.format(ALPHA)}")
    world.install("beta")

    monkeypatch.setattr(runner, "_REPORT_AFTER", 0.2)
    waited: list[str] = []

    # The other process takes seconds to start on a busy machine; a plugin that hangs costs all of them.
    seconds = 15 if "did not finish" in said else 120
    outcomes = run_in_subprocess([plugin_check("alpha"), plugin_check("beta")], seconds, report=waited.append)

    found = findings_of(outcomes)
    assert [outcome.is_lost for outcome in outcomes] == [True, False]
    if "did not finish" in said:
        assert waited.count("alpha") == 1

    assert [finding.level for finding in found] == [Level.WRONG, Level.OK]
    assert found[0].what.startswith(f"alpha {said}")
    assert ("so long" in found[0].what) == ("so long" in source)
    assert "'beta'" in found[1].what


@pytest.mark.heavy
@pytest.mark.usefixtures("warm_processes")
def test_a_plugin_that_ends_its_process_is_left_alone_then(world: Any, single: Path) -> None:
    """One finding: what comes after it neither ends nor waits for it, and says so where it needs it."""
    world.install("llama", f"import os; os._exit(3)\n{HEAD}{GIVEN.format(ALPHA)}")

    report = examine(str(single))

    assert [finding.check for finding in wrong(report.findings)] == ["plugins"]
    assert [finding.what for finding in report.findings if finding.check == "model"] == [
        "left out: splitlearn-llama cannot be used"
    ]


def test_who_is_waited_for_is_told_at_the_command_line(world: Any, cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On stderr, terminal or not; stdout is as ever."""
    monkeypatch.setattr("splitlearn_core.doctor.runner._PLUGIN_SECONDS", 3.0)
    monkeypatch.setattr(runner, "_REPORT_AFTER", 0.2)
    world.install("alpha", "import threading; threading.Event().wait()\n")
    monkeypatch.setenv("SPLITLEARN_PLUGINS", "alpha")

    code, out, err = cli("doctor", "--quick", "--json")

    assert code == 1
    assert json.loads(out)["healthy"] is False
    assert "still looking at splitlearn-alpha 1.0 (model type 'alpha') ..." in err.splitlines()


# --- plugins

ODD = "ModelFamily(model_type='alpha', architecture='X', {})"

#: Plugins that work, or nearly: the source, and the level and words of a finding.
PLUGINS = {
    "exits on import": ("import sys; sys.exit(3)\n" + HEAD + GIVEN.format(ALPHA), Level.WRONG, "SystemExit"),
    "misspelt hook": (HEAD + "@hookimpl\ndef splitlearn_model_famlies(): ...", Level.WRONG, "did you mean"),
    "prints": (
        "print('here I am')\n" + HEAD + GIVEN.format(ALPHA),
        Level.NOTE,
        "prints when its hooks are called: 'here I am'",
    ),
    "imports torch": (
        "import torch\n" + HEAD + GIVEN.format(ALPHA),
        Level.NOTE,
        "imports torch when its hooks are called",
    ),
    "another family": (
        HEAD + GIVEN.format(ALPHA + ", ModelFamily(model_type='omega', architecture='X')"),
        Level.WRONG,
        "provides the family 'omega', but no entry point names it",
    ),
    "prefers nothing": (
        HEAD + GIVEN.format(ODD.format("preferred_strategy='teleport'")),
        Level.WRONG,
        "prefers the loading strategy 'teleport', which no plugin provides",
    ),
    "carries nothing": (
        HEAD + GIVEN.format(ODD.format("bundled_checkpoint='json:no_such_folder'")),
        Level.WRONG,
        "names a bundled checkpoint that does not exist",
    ),
}


@pytest.mark.parametrize(("source", "level", "said"), PLUGINS.values(), ids=list(PLUGINS))
def test_what_is_odd_about_a_plugin_is_said(world: Any, source: str, level: Level, said: str) -> None:
    """Besides whether it works: its manners and its promises, each with what to do."""
    (world.folder / "torch.py").write_text("")  # what counts is that it is imported
    world.install("alpha", source)

    found = findings_of(run_in_subprocess([plugin_check("alpha")], 60))

    (finding,) = about(said, found)
    assert finding.level is level
    assert "alpha" in finding.what
    assert finding.fix


def test_two_claimants_are_one_finding(world: Any) -> None:
    """Both are named, and the line that chooses."""
    for name in ("one-alpha", "two-alpha"):
        world.install("alpha", distribution=name)

    (finding,) = about("is claimed by", examine(quick=True).findings)

    assert "one-alpha 1.0" in finding.what
    assert "two-alpha 1.0" in finding.what
    assert "SPLITLEARN_DISABLE_PLUGINS=" in finding.fix


def test_a_plugin_for_another_core_is_wrong(world: Any) -> None:
    """The range it asks for is shown, by the check of the package and by that of the plugin."""
    world.install("alpha", requires=">=99")

    found = wrong(examine(quick=True).findings)

    assert about("splitlearn-alpha 1.0 requires splitlearn-core>=99, but", found)
    assert about("splitlearn-alpha 1.0 needs splitlearn-core>=99", found)


# --- packages


def metadata_of(world: Any, **changes: str) -> Path:
    """Install a sound plugin, change its metadata files, and return their folder."""
    info: Path = world.install("alpha")
    for name, text in changes.items():
        (info / name.replace("_json", ".json").replace("_txt", ".txt")).write_text(text)
    reset_registry()
    return info


@pytest.mark.parametrize(
    ("group", "meant"),
    [
        ("splitlearn.family", "splitlearn.families"),
        ("splitlearn-families", "splitlearn.families"),
        ("Splitlearn.Families", "splitlearn.families"),
        ("spiltlearn.families", "splitlearn.families"),
        ("splitlearn.strategy", "splitlearn.strategies"),
        ("splitlearn", "splitlearn.families"),
    ],
)
def test_a_group_that_nobody_reads_is_corrected(world: Any, group: str, meant: str) -> None:
    """The group as it is and as it is meant, and no plugin is found."""
    metadata_of(world, entry_points_txt=f"[{group}]\nalpha = splitlearn_alpha\n")

    (finding,) = about(f"in the group {group}, which nothing reads", installation.check_packages())

    assert finding.level is Level.WRONG
    assert f'[project.entry-points."{meant}"]' in finding.fix
    assert "alpha" not in registry().model_types()


def test_groups_of_others_are_theirs(world: Any) -> None:
    """A group that only sounds like a list of plugins is not taken for ours."""
    metadata_of(world, entry_points_txt="[console_scripts]\na = b:c\n[llm.families]\nx = y\n")

    found = list(installation.check_packages())

    assert not about("nothing reads", found)
    assert [f.level for f in about("splitlearn-alpha is named like a plugin, but has no entry point", found)] == [
        Level.NOTE
    ]


def test_a_package_that_is_there_twice_hides_itself(world: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """In two folders of the path: the first is used."""
    world.install("alpha", version="1.0")
    older = type(world)(tmp_path / "older", monkeypatch)
    older.install("alpha", version="0.9")
    monkeypatch.syspath_prepend(str(world.folder))

    (finding,) = about("splitlearn-alpha is installed 2 times", installation.check_packages())

    hidden = older.folder / "splitlearn_alpha-0.9.dist-info"
    assert finding.what.endswith(f"2 times: 1.0 is used and hides 0.9 in {hidden}")
    assert finding.fix.startswith("pip uninstall splitlearn-alpha until pip finds none; then pip install")


@pytest.mark.parametrize("editable", [False, True])
def test_metadata_that_was_left_behind_is_one_finding(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, editable: bool
) -> None:
    """Whichever of two the system lists first: the older is stale, and is to be removed; neither is judged besides."""
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    (checkout / "pyproject.toml").write_text(PROJECT.replace("1.0", "2.0") + 'alpha = "splitlearn_alpha"\n')
    for version in ("1.0", "2.0"):
        info = world.install("alpha", version=version, requires=f"=={version}")
        if editable:
            record = {"url": checkout.as_uri(), "dir_info": {"editable": True}}
            (info / "direct_url.json").write_text(json.dumps(record))
    older, newer = (world.folder / f"splitlearn_alpha-{version}.dist-info" for version in ("1.0", "2.0"))
    kin = [one for one in installation.installed() if one.name == "splitlearn-alpha"]

    for first, said in (
        (older, f"1.0 is used and is stale; 2.0 in {newer} is not used"),
        (newer, "2.0 is used; 1.0 in"),
    ):
        ordered = sorted(kin, key=lambda one, first=first: one.info != first)
        monkeypatch.setattr(installation, "installed", lambda _, ordered=ordered: tuple(ordered))
        (finding,) = about("splitlearn-alpha", wrong(installation.check_packages()))
        assert said in finding.what
        again = f"-e {checkout}" if editable else "--force-reinstall splitlearn-alpha"
        assert finding.fix == f"remove {older}; then pip install {again}"


def test_a_folder_that_is_on_the_path_twice_is_one(world: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """Under another name, as lib64 is lib in some environments."""
    world.install("alpha")
    (tmp_path / "again").symlink_to(world.folder)
    monkeypatch.syspath_prepend(str(tmp_path / "again"))

    assert not about("splitlearn-alpha is installed", installation.check_packages())


def test_damaged_metadata_is_wrong(world: Any) -> None:
    """METADATA that is gone: the package is known by its folder's name."""
    (metadata_of(world) / "METADATA").unlink()

    (finding,) = about("the metadata of splitlearn-alpha is damaged", installation.check_packages())

    assert finding.level is Level.WRONG
    assert "--force-reinstall splitlearn-alpha" in finding.fix


PROJECT = '[project]\nname = "splitlearn-alpha"\nversion = "1.0"\n[project.entry-points."splitlearn.families"]\n'

#: What the project of an editable plugin says now, and what is found; empty where nothing is.
PROJECTS = {
    "unchanged": (PROJECT + 'alpha = "splitlearn_alpha"\n', ""),
    "added": (PROJECT + 'alpha = "splitlearn_alpha"\nalpha2 = "splitlearn_alpha"\n', "alpha2 = splitlearn_alpha"),
    "moved": (PROJECT + 'alpha = "alpha_of_today"\n', "alpha = alpha_of_today [splitlearn.families] was added"),
    "gone": ('[project]\nname = "splitlearn-alpha"\nversion = "1.0"\n', "was removed"),
    "grown": (PROJECT.replace("1.0", "1.1") + 'alpha = "splitlearn_alpha"\n', "its project is now 1.1"),
    "broken": ("[project\n", "cannot be read"),
    "dynamic": ('[project]\nname = "splitlearn-alpha"\nversion = "1.0"\ndynamic = ["entry-points"]\n', ""),
    "another tool": ("[tool.other]\n", ""),
}


@pytest.mark.parametrize(("project", "said"), PROJECTS.values(), ids=list(PROJECTS))
def test_an_editable_package_is_held_against_its_project(world: Any, tmp_path: Path, project: str, said: str) -> None:
    """Entry points are those of the day of its installation; the mend is to install it again."""
    checkout = tmp_path / "my checkout"
    checkout.mkdir()
    (checkout / "pyproject.toml").write_text(project)
    metadata_of(world, direct_url_json=json.dumps({"url": checkout.as_uri(), "dir_info": {"editable": True}}))

    found = [finding for finding in installation.check_packages() if finding.where == str(checkout / "pyproject.toml")]

    assert [said in finding.what for finding in found] == [True] * bool(said)
    assert all(f"pip install -e {checkout}" in finding.fix for finding in found)


def test_a_checkout_that_is_gone_is_wrong(world: Any, tmp_path: Path) -> None:
    """The package points to a folder that was moved."""
    metadata_of(
        world, direct_url_json=json.dumps({"url": (tmp_path / "gone").as_uri(), "dir_info": {"editable": True}})
    )

    (finding,) = about("splitlearn-alpha is an editable checkout whose", installation.check_packages())

    assert finding.level is Level.WRONG


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("packaging>=99", "requires packaging>=99, but"),
        ("surely-absent-package", "requires surely-absent-package, but it is not installed"),
        ("packaging>=1", ""),
        ("packaging>=99; python_version < '3'", ""),
        ("packaging>=99; extra == 'more'", ""),
        ("packaging>>99", "which is invalid"),
    ],
)
def test_requirements_are_held_against_what_is_installed(world: Any, line: str, said: str) -> None:
    """Those that apply here, each with the line that installs it."""
    metadata_of(world, METADATA=f"Metadata-Version: 2.1\nName: splitlearn-alpha\nVersion: 1.0\nRequires-Dist: {line}\n")

    found = about("splitlearn-alpha", wrong(installation.check_packages()))

    assert [said in finding.what for finding in found] == [True] * bool(said)


def test_code_from_elsewhere_is_said(world: Any, tmp_path: Path) -> None:
    """PYTHONPATH that hides the installed core is a note; a core that is not installed at all is wrong."""
    world.install("alpha")
    found = installation.installed()

    (note,) = installation.other_core(tmp_path, found)
    (missing,) = installation.other_core(tmp_path, [one for one in found if one.name != "splitlearn-core"])

    assert (note.level, note.where) == (Level.NOTE, str(tmp_path))
    assert missing.level is Level.WRONG


def test_no_plugin_at_all_is_said() -> None:
    """With a package to begin with."""
    finding = installation.plugins_found(())

    assert finding.level is Level.NOTE
    assert "pip install splitlearn-gpt2" in finding.fix


# --- variables, versions, machine, cache, devices


def test_lists_and_what_they_misspell(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A blocked plugin is a note, and so is a name that is nobody's: what is gone is blocked well enough."""
    world.install("alpha")
    monkeypatch.setenv("SPLITLEARN_DISABLE_PLUGINS", "alpha,alhpa")

    report = examine(quick=True)

    (unknown,) = about("SPLITLEARN_DISABLE_PLUGINS names alhpa: no such plugin is installed", report.findings)
    assert unknown.level is Level.NOTE
    assert about("blocked by SPLITLEARN_DISABLE_PLUGINS", report.findings)[0].level is Level.NOTE


def test_a_name_that_cannot_be_allowed_is_wrong() -> None:
    """Somebody wants it, and it is not there."""
    said = system.plugin_lists({"SPLITLEARN_PLUGINS": "alhpa"}, {"SPLITLEARN_PLUGINS": ("alhpa",)})

    assert [finding.level for finding in said] == [Level.NOTE, Level.WRONG]


def test_an_empty_allow_list_is_told() -> None:
    """Set and empty means none; an empty block-list means nothing."""
    said = system.plugin_lists({"SPLITLEARN_PLUGINS": "", "SPLITLEARN_DISABLE_PLUGINS": ""}, {})

    assert [finding.what for finding in said] == ["SPLITLEARN_PLUGINS allows no plugin at all"]


def test_variables_of_the_network_are_notes_without_secrets() -> None:
    """Offline, another endpoint, proxies; user and password are left out."""
    environment = {
        "HF_HUB_OFFLINE": "yes",
        "HF_ENDPOINT": "http://user:secret@mirror.example/hub?token=secret",
        "https_proxy": "user:secret@proxy.example:3128",
        "HF_HOME": "/data/hf",
        "TRANSFORMERS_OFFLINE": "0",
    }

    found = list(system.hub_variables(environment))

    assert [finding.where for finding in found] == ["HF_HUB_OFFLINE", "HF_ENDPOINT", "HF_HOME", "https_proxy"]
    assert {finding.level for finding in found} == {Level.NOTE}
    assert "secret" not in str(found)
    assert "http://mirror.example/hub" in found[1].what
    assert "proxy.example:3128" in found[3].what


@pytest.mark.parametrize(
    ("version", "level"), [("3.10.14", "wrong"), ("3.11.0", "ok"), ("3.13.9", "ok"), ("3.15.0", "note"), ("x", "note")]
)
def test_versions_are_held_against_what_was_tested(version: str, level: str) -> None:
    """Older is wrong, newer a note, and so is what cannot be compared."""
    finding = installation.PYTHON.judge("Python", version)

    assert finding.level == level
    assert version in finding.what


def test_a_library_that_is_missing_or_old_comes_with_its_line() -> None:
    """All that core needs is judged at once."""
    there: dict[str, str | None] = {name: versions_.lowest for name, versions_ in installation.LIBRARIES.items()}
    there |= {"torch": None, "transformers": "4.57.1", "tqdm": "99"}

    found = {finding.what.split()[0]: finding for finding in installation.libraries(there)}

    assert (found["torch"].level, found["torch"].fix) == (Level.WRONG, "pip install 'torch>=2.13'")
    assert (found["transformers"].level, found["transformers"].fix) == (Level.WRONG, "pip install 'transformers>=5.4'")
    assert found["tqdm"].level is Level.NOTE
    assert found["safetensors"].level is Level.OK


@pytest.mark.skipif(not (PACKAGE / "pyproject.toml").exists(), reason="the tests stand apart from their package")
def test_the_table_of_versions_says_what_is_tested() -> None:
    """Its lowest are core's own lower bounds and those that the oldest environment is held to."""
    project = tomllib.loads((PACKAGE / "pyproject.toml").read_text())["project"]
    more = project["optional-dependencies"]
    bounds = dict(line.split(">=") for line in (*project["dependencies"], *more["peft"]))
    table = {
        **installation.LIBRARIES,
        **{name: r for _, needs in installation.EXTRAS.values() for name, r in needs.items()},
    }

    assert {name: one.lowest for name, one in table.items()} == bounds
    assert project["requires-python"] == f">={installation.PYTHON.lowest}"
    assert f"Programming Language :: Python :: {installation.PYTHON.newest}" in project["classifiers"]
    assert not any(one.is_above(one.lowest) for one in table.values())
    constraints = PACKAGE.parent / "tests" / "oldest-constraints.txt"
    if constraints.exists():
        pins = dict(line.split("==") for line in constraints.read_text().splitlines() if "==" in line)
        # torch is pinned where it is installed.
        assert {n: one.lowest for n, one in table.items() if n != "torch"}.items() <= {
            name: re.sub(r"\.0$", "", pin) if pin not in bounds.values() else pin for name, pin in pins.items()
        }.items()


def test_commands_that_are_not_there_are_notes(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the package that has each."""
    monkeypatch.setattr(installation, "discover_commands", tuple)
    notes = {finding.what: finding for finding in installation.check_versions()}

    for command, package in (
        ("plugins new", "splitlearn-auto"),
        ("ps", "splitlearn-serve"),
        ("serve", "splitlearn-serve"),
    ):
        note = notes[f"there is no command splitlearn {command}"]
        assert (note.level, note.fix) == (Level.NOTE, f"pip install {package}")


def test_little_memory_and_few_files_are_notes() -> None:
    """With who sets the limit."""
    tight = system.memory(MemoryReading(2**30, 2**28, "/sys/fs/cgroup/job"))

    assert (tight.level, tight.where) == (Level.NOTE, "/sys/fs/cgroup/job")
    assert system.memory(MemoryReading(2**36, 2**35)).level is Level.OK
    assert [system.open_files(most).level for most in (64, 1024, -1)] == [Level.NOTE, Level.OK, Level.OK]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limit")
def test_a_limited_address_space_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    for limit, levels in ((resource.RLIM_INFINITY, []), (2**33, [Level.NOTE])):
        monkeypatch.setattr(resource, "getrlimit", lambda _, limit=limit: (limit, limit))
        assert [finding.level for finding in about("address space", system.check_machine())] == levels


def test_a_cache_is_tried(tmp_path: Path) -> None:
    """One that can be made is fine, one under a file is wrong, and nothing is left behind."""
    (tmp_path / "file").write_text("")

    levels = [system.cache_folder(path).level for path in (tmp_path, tmp_path / "a" / "b", tmp_path / "file" / "hub")]

    assert levels[2] is Level.WRONG
    assert Level.WRONG not in levels[:2]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("facts", "level", "said"),
    [
        ({"built_for": None, "driver": False, "visible": None}, Level.OK, "CPU"),
        ({"built_for": None, "driver": True, "visible": None}, Level.NOTE, "built only for the CPU"),
        ({"built_for": "13.0", "driver": True, "visible": ""}, Level.NOTE, "CUDA_VISIBLE_DEVICES"),
        ({"built_for": "13.0", "driver": True, "visible": None}, Level.NOTE, "cannot use it"),
    ],
)
def test_a_gpu_that_is_not_used_has_a_reason(facts: Any, level: Level, said: str) -> None:
    """None there, the wrong build, hidden, or a driver that does not fit."""
    finding = system.missing_gpu(**facts)

    assert finding.level is level
    assert said in finding.what


# --- a model


@pytest.mark.heavy
def test_a_model_that_can_be_loaded_is_described(llama: Any, single: Path) -> None:
    """Whose it is, where it can be cut, who reads it and what that takes."""
    found = check_model(str(single), load=True)

    assert not wrong(found)
    assert about("is of type llama, which splitlearn-llama 1.0 provides; 6 layers", found)
    assert about("--split 2 4", found)
    assert about("read by mapped", found)
    assert about("it has no tokenizer", found)[0].level is Level.NOTE
    assert about("bottom, trunk and top load", found)[0].level is Level.OK


#: A tensor inside a layer, of which no plan sees whether it is as the model needs it.
TENSOR = "model.layers.3.mlp.down_proj.weight"


def spoil(folder: Path, how: str, edit_json: Any) -> None:
    if how == "a missing shard":
        sorted(folder.glob("*.safetensors"))[1].unlink()
    elif how == "a shard cut short":
        shard = sorted(folder.glob("*.safetensors"))[1]
        shard.write_bytes(shard.read_bytes()[:-1])
    elif how == "no weights":
        for path in folder.glob("*.safetensors*"):
            path.unlink()
    elif how in ("a missing tensor", "a tensor of another shape"):
        from safetensors.torch import load_file, save_file

        shard = next(path for path in folder.glob("*.safetensors") if TENSOR in load_file(path))
        tensors = load_file(shard)
        tensor = tensors.pop(TENSOR)
        save_file(tensors if "missing" in how else {**tensors, TENSOR: tensor.mT.contiguous()}, shard)
        index = folder / "model.safetensors.index.json"
        if "missing" in how:
            names = json.loads(index.read_text())["weight_map"]
            edit_json(index, weight_map={name: where for name, where in names.items() if name != TENSOR})
    elif how == "other heads":
        edit_json(folder / "config.json", num_attention_heads=2, num_key_value_heads=1)
    elif how == "one layer":
        edit_json(folder / "config.json", num_hidden_layers=1)
    elif how == "another type":
        edit_json(folder / "config.json", model_type="mamba9")
    else:
        (folder / "config.json").write_text("{")


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("a missing shard", "safetensors"),
        ("a shard cut short", "safetensors"),
        ("no weights", "no weights"),
        ("one layer", "two components need one"),
        ("another type", "mamba9"),
        ("no configuration", "config.json"),
        ("a missing tensor", TENSOR),
        ("a tensor of another shape", TENSOR),
        ("other heads", "self_attn.k_proj.weight"),
    ],
)
def test_a_model_that_cannot_be_loaded_says_why(llama: Any, sharded: Path, edit_json: Any, how: str, said: str) -> None:
    """The error that a load would raise, with its hint as the mend; nothing is raised."""
    spoil(sharded, how, edit_json)

    (finding,) = wrong(check_model(str(sharded), load=True))

    assert said in finding.what
    assert finding.fix


def bar(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nobody read a file: not even root, who may read every other."""
    opened = os.open

    def refused(name: Any, *arguments: Any, **options: Any) -> int:
        if name == path:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(name, *arguments, **options)

    path.chmod(0)
    monkeypatch.setattr(os, "open", refused)


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("how", "said"),
    [("quick", ""), ("pickled", "weights in the format pytorch"), ("quantised", "its weights are quantised")],
)
def test_a_model_that_is_not_loaded_says_why(
    llama: Any, single: Path, edit_json: Any, monkeypatch: pytest.MonkeyPatch, how: str, said: str
) -> None:
    """What was not tried is a note with the command that tries it; nothing is loaded for it."""
    if how == "pickled":
        import torch
        from safetensors.torch import load_file

        torch.save(load_file(single / "model.safetensors"), single / "pytorch_model.bin")
        (single / "model.safetensors").unlink()
    elif how == "quantised":
        edit_json(single / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    monkeypatch.setattr("splitlearn_core.doctor.load_checks.load_components", pytest.fail)

    found = check_model(str(single), load=how != "quick")

    notes = about("loading it was not tried", found)
    assert [said in note.what for note in notes] == [True] * bool(said)
    assert all(note.fix == f"splitlearn verify {single} --split 2 4" for note in notes)
    assert not wrong(found)


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_that_may_not_be_read_is_a_finding(
    llama: Any, single: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """With its path and the line that changes it, and nobody is asked to report it."""
    bar(single / name, monkeypatch)

    (finding,) = wrong(check_model(str(single), load=True))

    assert finding.what == f"Permission denied: {single / name}"
    assert finding.fix == f"chmod u+r {single / name}"


@pytest.mark.heavy
def test_a_model_for_which_there_is_no_memory_is_not_loaded(
    llama: Any, single: Path, edit_json: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors that are converted take memory, mapped or not."""
    edit_json(single / "config.json", dtype="float64")
    monkeypatch.setattr("splitlearn_core.doctor.load_checks.available_memory", lambda: 1)
    monkeypatch.setattr("splitlearn_core.doctor.load_checks.load_components", pytest.fail)

    found = check_model(str(single), load=True)

    assert about("and 1 B are free", about("loading it was not tried: it takes", found))
    assert about("loading all of it takes", wrong(found))


def test_a_model_that_is_nowhere_is_said_at_the_command_line(llama: Any, cli: Any) -> None:
    """As a finding, and with exit code 1."""
    code, out, _ = cli("doctor", "./nowhere", "--quick", "--json")

    (finding,) = [finding for finding in json.loads(out)["findings"] if finding["check"] == "model"]
    assert code == 1
    assert "nowhere" in finding["what"]


def test_a_model_that_does_not_fit_is_wrong() -> None:
    """The strategy that takes least counts."""
    needs = {"copied": MemoryNeeds(900, 900, 0), "mapped": MemoryNeeds(300, 300, 600)}

    assert [finding.level for free in (200, 400) for finding in memory_needed(needs, free)] == [Level.WRONG, Level.OK]


@pytest.mark.heavy
def test_cuts_keep_to_what_the_family_allows(world: Any, single: Path) -> None:
    """The suggested cuts are possible ones."""
    family = "ModelFamily(model_type='llama', architecture='LlamaForCausalLM', impossible_cuts={})"
    world.install("llama", HEAD + GIVEN.format(family.format("lambda config: {2: 'x', 4: 'x'}")))

    (finding,) = about("it can be cut", check_model(str(single), load=True))

    points = [int(word) for word in finding.what.split()[-2:]]
    assert not {2, 4} & set(points)
    assert 0 < points[0] < points[1] < 6
