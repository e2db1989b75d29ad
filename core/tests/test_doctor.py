"""The doctor finds problems, names them and says how to fix them; it continues whatever is broken."""

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

pytestmark = pytest.mark.light

PACKAGE = Path(__file__).parents[1]
HEAD = "from splitlearn_core import ModelFamily, hookimpl\n"
GIVEN = "@hookimpl\ndef splitlearn_model_families():\n    return [{}]\n"
ALPHA = "ModelFamily(model_type='alpha', architecture='LlamaForCausalLM')"


def about(text: str, findings: Any) -> list[Finding]:
    """Return the findings whose text contains something."""
    return [finding for finding in findings if text in finding.what]


def wrong(findings: Any) -> list[Finding]:
    return [finding for finding in findings if finding.level is Level.WRONG]


def plugin_check(name: str, kind: str = "family") -> Check:
    return Check("plugins", check_plugin, (kind, name, f"splitlearn-{name}"), name)


def findings_of(outcomes: list[Outcome]) -> list[Finding]:
    return [finding for outcome in outcomes for finding in outcome.findings]


# --- the whole of it


def test_a_valid_plugin_is_found_and_named(world: Any) -> None:
    """The finding has the entry point, the package, the version and the hooks."""
    world.install("alpha", version="3.1")

    report = examine(quick=True)

    (finding,) = about("'alpha'", report.findings)
    assert (finding.check, finding.level) == ("plugins", Level.OK)
    assert finding.what == "model type 'alpha': splitlearn-alpha 3.1, with model_families"


@pytest.mark.usefixtures("warm_processes")
def test_the_command_prints_findings_and_has_an_exit_code(
    world: Any, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """JSON and text have the same content; a broken plugin is exit code 1, followed by its fix."""
    monkeypatch.setattr(runner, "_REPORT_AFTER", 60.0)
    world.install("alpha", "import surely_absent_package")

    code, out, err = cli("doctor", "--quick", "--json")
    text_code, text, _ = cli("doctor", "--quick")

    report = json.loads(out)
    assert (code, text_code, err) == (1, 1, "")
    assert report["healthy"] is False
    assert report["counts"]["wrong"] == sum(finding["level"] == "wrong" for finding in report["findings"])
    (finding,) = [finding for finding in report["findings"] if "surely_absent_package" in finding["what"]]
    assert finding.keys() == {"check", "level", "what", "where", "fix"}
    lines = text.splitlines()
    (at,) = [number for number, line in enumerate(lines) if line.startswith("wrong") and "splitlearn-alpha" in line]
    fix = next(line.strip() for line in lines[at:] if line.strip().startswith("fix:"))
    assert fix.startswith("fix: pip install surely_absent_package")
    assert lines[-1] == ", ".join(f"{report['counts'][level]} {level}" for level in ("wrong", "note", "ok"))


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
def test_everything_is_verified_with_a_bundled_model(world: Any, single: Path) -> None:
    """Devices, the class of transformers, and a model that is cut and compared."""
    shutil.copytree(single, world.folder / "carried" / "model")
    (world.folder / "carried" / "__init__.py").write_text("")
    family = "ModelFamily(model_type='llama', architecture='LlamaForCausalLM', bundled_checkpoint='carried:model')"
    # The only usable plugin: other installed ones have bundled models, too.
    world.install("llama", HEAD + GIVEN.format(family))

    report = examine("bundled:llama")

    assert not wrong(finding for finding in report.findings if finding.check in ("devices", "self-test", "model"))
    assert about("float32, float16, bfloat16, float64", report.findings)
    assert about("LlamaForCausalLM", report.findings)
    assert about("equals the unsplit model to the last bit", report.findings)
    assert about("read by mapped (0 B)", report.findings)


def checks_of(findings: Any) -> set[str]:
    """Return the checks with findings; without the self-test, which needs a bundled model."""
    return {finding.check for finding in findings} - {"self-test"}


@pytest.mark.heavy
def test_a_torch_that_cannot_be_imported_is_one_finding(world: Any, llama: Any, single: Path) -> None:
    """It is the only one: what depends on torch is left out, and everything else is examined as usual."""
    (world.folder / "torch.py").write_text("raise OSError('libtorch is not what it was')\n")
    world.install("alpha")
    world.install("beta", "import torch\n" + world.source("beta"))

    report = examine(str(single))

    (finding,) = about("libtorch is not what it was", report.findings)
    assert (finding.check, finding.level) == ("torch", Level.WRONG)
    assert finding.fix == "pip install --force-reinstall torch"
    left = about("left out: torch cannot be imported", report.findings)
    assert checks_of(left) == {"devices", "transformers", "plugins", "model"}
    assert {finding.level for finding in left} == {Level.NOTE}
    assert about("left out: ", [finding for finding in report.findings if finding.check == "self-test"])
    assert about("'beta'", left)
    assert about("'alpha'", report.findings)[0].level is Level.OK
    assert about("read by mapped", report.findings)
    assert [finding for finding in wrong(report.findings) if finding.check != "packages"] == [finding]


@pytest.mark.heavy
def test_a_torch_that_is_not_installed_is_one_finding(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is among the versions; nothing that needs torch is tried."""
    monkeypatch.setattr("splitlearn_core.doctor.runner._is_missing", "torch".__eq__)
    world.install("alpha", "import torch\n" + world.source("alpha"))

    report = examine()

    left = about("left out: torch cannot be imported", report.findings)
    assert checks_of(left) == {"devices", "transformers", "plugins"}
    assert not wrong(finding for finding in report.findings if finding.check != "packages")


# --- checks that fail


def test_a_check_that_fails_is_a_finding() -> None:
    """It has the type, text and place of the error, in this process and in another; later checks still run."""
    failing = Check("odd", system.open_files, ("many",), "files", "count them")  # type: ignore[arg-type]
    passing = Check("machine", system.check_machine)

    for findings in (failing.run(), findings_of(run_in_subprocess([failing, passing], 60))):
        assert (findings[0].check, findings[0].level, findings[0].fix) == ("odd", Level.WRONG, "count them")
        assert "files failed: TypeError: " in findings[0].what
        assert re.search(r"system\.py:\d+$", findings[0].where)
    assert about("processors", findings)


#: Plugins that end their process, and the text of the finding.
FATAL = {
    "exits": ("import os; print('so long', flush=True); os._exit(3)", "ended its process with exit code 3"),
    "exits well": ("import os; os._exit(0)", "ended its process with exit code 0"),
    "is killed": ("import os; os.kill(os.getpid(), 9)", "ended its process by signal SIGKILL"),
    "hangs": ("import threading; threading.Event().wait()", "did not finish within 15 seconds"),
}


@pytest.mark.parametrize(("source", "expected"), FATAL.values(), ids=list(FATAL))
def test_a_plugin_may_end_its_process(world: Any, monkeypatch: pytest.MonkeyPatch, source: str, expected: str) -> None:
    """It is named, and the next plugin is examined; the one that is waited for is reported once."""
    world.install("alpha", f"{source}\n{HEAD}{GIVEN.format(ALPHA)}")
    world.install("beta")

    monkeypatch.setattr(runner, "_REPORT_AFTER", 0.2)
    waited: list[str] = []

    # The other process takes seconds to start on a busy machine; a plugin that hangs costs all of them.
    seconds = 15 if "did not finish" in expected else 120
    outcomes = run_in_subprocess([plugin_check("alpha"), plugin_check("beta")], seconds, report=waited.append)

    findings = findings_of(outcomes)
    assert [outcome.is_lost for outcome in outcomes] == [True, False]
    if "did not finish" in expected:
        assert waited.count("alpha") == 1

    assert [finding.level for finding in findings] == [Level.WRONG, Level.OK]
    assert findings[0].what.startswith(f"alpha {expected}")
    assert ("so long" in findings[0].what) == ("so long" in source)
    assert "'beta'" in findings[1].what


@pytest.mark.heavy
@pytest.mark.usefixtures("warm_processes")
def test_a_plugin_that_ends_its_process_is_not_used_again(world: Any, single: Path) -> None:
    """It is one finding: later checks neither end nor hang, and say so if they need the plugin."""
    world.install("llama", f"import os; os._exit(3)\n{HEAD}{GIVEN.format(ALPHA)}")

    report = examine(str(single))

    assert [finding.check for finding in wrong(report.findings)] == ["plugins"]
    assert [finding.what for finding in report.findings if finding.check == "model"] == [
        "left out: splitlearn-llama cannot be used"
    ]


def test_the_command_reports_the_check_that_it_waits_for(world: Any, cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does so on stderr, terminal or not; stdout is unchanged."""
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

#: Plugins with a flaw: the source, and the level and text of the finding.
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


@pytest.mark.parametrize(("source", "level", "expected"), PLUGINS.values(), ids=list(PLUGINS))
def test_flaws_of_a_plugin_are_reported(world: Any, source: str, level: Level, expected: str) -> None:
    """Side effects of its import, and families that name what does not exist, each with a fix."""
    (world.folder / "torch.py").write_text("")  # what counts is that it is imported
    world.install("alpha", source)

    findings = findings_of(run_in_subprocess([plugin_check("alpha")], 60))

    (finding,) = about(expected, findings)
    assert finding.level is level
    assert "alpha" in finding.what
    assert finding.fix


@pytest.mark.usefixtures("warm_processes")
def test_a_conflict_is_one_finding(world: Any) -> None:
    """It names both packages, and the setting that chooses one."""
    for name in ("one-alpha", "two-alpha"):
        world.install("alpha", distribution=name)

    (finding,) = about("is claimed by", examine(quick=True).findings)

    assert "one-alpha 1.0" in finding.what
    assert "two-alpha 1.0" in finding.what
    assert "SPLITLEARN_DISABLE_PLUGINS=" in finding.fix


@pytest.mark.usefixtures("warm_processes")
def test_a_plugin_for_another_core_is_wrong(world: Any) -> None:
    """The required range is in the finding on the package and in that on the plugin."""
    world.install("alpha", requires=">=99")

    findings = wrong(examine(quick=True).findings)

    assert about("splitlearn-alpha 1.0 requires splitlearn-core>=99, but", findings)
    assert about("splitlearn-alpha 1.0 needs splitlearn-core>=99", findings)


# --- packages


def metadata_of(world: Any, **changes: str) -> Path:
    """Install a valid plugin, change its metadata files, and return their folder."""
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
def test_a_misspelt_group_is_corrected(world: Any, group: str, meant: str) -> None:
    """The finding has the group as written and as meant; no plugin is found."""
    metadata_of(world, entry_points_txt=f"[{group}]\nalpha = splitlearn_alpha\n")

    (finding,) = about(f"in the group {group}, which nothing reads", installation.check_packages())

    assert finding.level is Level.WRONG
    assert f'[project.entry-points."{meant}"]' in finding.fix
    assert "alpha" not in registry().model_types()


def test_groups_of_other_projects_are_ignored(world: Any) -> None:
    """A group with a similar name is not taken for ours."""
    metadata_of(world, entry_points_txt="[console_scripts]\na = b:c\n[llm.families]\nx = y\n")

    findings = list(installation.check_packages())

    assert not about("nothing reads", findings)
    assert [f.level for f in about("splitlearn-alpha is named like a plugin, but has no entry point", findings)] == [
        Level.NOTE
    ]


def test_a_package_in_two_folders_is_one_finding(world: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """The copy in the first folder of the path is used and hides the other."""
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
    """Whichever copy is listed first, the older one is stale and to be removed; neither has another finding."""
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    (checkout / "pyproject.toml").write_text(PROJECT.replace("1.0", "2.0") + 'alpha = "splitlearn_alpha"\n')
    for version in ("1.0", "2.0"):
        info = world.install("alpha", version=version, requires=f"=={version}")
        if editable:
            record = {"url": checkout.as_uri(), "dir_info": {"editable": True}}
            (info / "direct_url.json").write_text(json.dumps(record))
    older, newer = (world.folder / f"splitlearn_alpha-{version}.dist-info" for version in ("1.0", "2.0"))
    copies = [copy for copy in installation.installed() if copy.name == "splitlearn-alpha"]

    for first, expected in (
        (older, f"1.0 is used and is stale; 2.0 in {newer} is not used"),
        (newer, "2.0 is used; 1.0 in"),
    ):
        ordered = sorted(copies, key=lambda copy, first=first: copy.info != first)
        monkeypatch.setattr(installation, "installed", lambda _, ordered=ordered: tuple(ordered))
        (finding,) = about("splitlearn-alpha", wrong(installation.check_packages()))
        assert expected in finding.what
        again = f"-e {checkout}" if editable else "--force-reinstall splitlearn-alpha"
        assert finding.fix == f"remove {older}; then pip install {again}"


def test_a_folder_that_is_on_the_path_twice_counts_once(world: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """Its second name is a symbolic link, as lib64 is to lib in some environments."""
    world.install("alpha")
    (tmp_path / "again").symlink_to(world.folder)
    monkeypatch.syspath_prepend(str(tmp_path / "again"))

    assert not about("splitlearn-alpha is installed", installation.check_packages())


def test_damaged_metadata_is_wrong(world: Any) -> None:
    """Without METADATA, the package is known by the name of its folder."""
    (metadata_of(world) / "METADATA").unlink()

    (finding,) = about("the metadata of splitlearn-alpha is damaged", installation.check_packages())

    assert finding.level is Level.WRONG
    assert "--force-reinstall splitlearn-alpha" in finding.fix


PROJECT = '[project]\nname = "splitlearn-alpha"\nversion = "1.0"\n[project.entry-points."splitlearn.families"]\n'

#: The current pyproject.toml of an editable plugin, and the text of the finding; empty if there is none.
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


@pytest.mark.parametrize(("project", "expected"), PROJECTS.values(), ids=list(PROJECTS))
def test_an_editable_package_is_compared_with_its_project(
    world: Any, tmp_path: Path, project: str, expected: str
) -> None:
    """The entry points are those at the time of installation; the fix is to install it again."""
    checkout = tmp_path / "my checkout"
    checkout.mkdir()
    (checkout / "pyproject.toml").write_text(project)
    metadata_of(world, direct_url_json=json.dumps({"url": checkout.as_uri(), "dir_info": {"editable": True}}))

    findings = [
        finding for finding in installation.check_packages() if finding.where == str(checkout / "pyproject.toml")
    ]

    assert [expected in finding.what for finding in findings] == [True] * bool(expected)
    assert all(f"pip install -e {checkout}" in finding.fix for finding in findings)


def test_a_missing_checkout_is_wrong(world: Any, tmp_path: Path) -> None:
    """The package points to a folder that was moved."""
    metadata_of(
        world, direct_url_json=json.dumps({"url": (tmp_path / "gone").as_uri(), "dir_info": {"editable": True}})
    )

    (finding,) = about("splitlearn-alpha is an editable checkout whose", installation.check_packages())

    assert finding.level is Level.WRONG


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("packaging>=99", "requires packaging>=99, but"),
        ("surely-absent-package", "requires surely-absent-package, but it is not installed"),
        ("packaging>=1", ""),
        ("packaging>=99; python_version < '3'", ""),
        ("packaging>=99; extra == 'more'", ""),
        ("packaging>>99", "which is invalid"),
    ],
)
def test_requirements_are_compared_with_installed_versions(world: Any, line: str, expected: str) -> None:
    """Only those that apply here, each with the command that installs it."""
    metadata_of(world, METADATA=f"Metadata-Version: 2.1\nName: splitlearn-alpha\nVersion: 1.0\nRequires-Dist: {line}\n")

    findings = about("splitlearn-alpha", wrong(installation.check_packages()))

    assert [expected in finding.what for finding in findings] == [True] * bool(expected)


def test_code_from_another_folder_is_reported(world: Any, tmp_path: Path) -> None:
    """PYTHONPATH that hides the installed core is a note; a core that is not installed at all is wrong."""
    world.install("alpha")
    packages = installation.installed()

    (note,) = installation.other_core(tmp_path, packages)
    (missing,) = installation.other_core(
        tmp_path, [package for package in packages if package.name != "splitlearn-core"]
    )

    assert (note.level, note.where) == (Level.NOTE, str(tmp_path))
    assert missing.level is Level.WRONG


def test_the_absence_of_plugins_is_reported() -> None:
    """The finding names a package to install."""
    finding = installation.plugins_found(())

    assert finding.level is Level.NOTE
    assert "pip install splitlearn-gpt2" in finding.fix


# --- variables, versions, machine, cache, devices


@pytest.mark.usefixtures("warm_processes")
def test_misspelt_names_in_lists_are_reported(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A blocked plugin is a note, and so is an unknown name: blocking it has no effect."""
    world.install("alpha")
    monkeypatch.setenv("SPLITLEARN_DISABLE_PLUGINS", "alpha,alhpa")

    report = examine(quick=True)

    (unknown,) = about("SPLITLEARN_DISABLE_PLUGINS names alhpa: no such plugin is installed", report.findings)
    assert unknown.level is Level.NOTE
    assert about("blocked by SPLITLEARN_DISABLE_PLUGINS", report.findings)[0].level is Level.NOTE


def test_an_unknown_name_in_the_allow_list_is_wrong() -> None:
    """A plugin that is allowed explicitly is wanted, and it is missing."""
    findings = system.plugin_lists({"SPLITLEARN_PLUGINS": "alhpa"}, {"SPLITLEARN_PLUGINS": ("alhpa",)})

    assert [finding.level for finding in findings] == [Level.NOTE, Level.WRONG]


def test_an_empty_allow_list_is_reported() -> None:
    """An empty allow-list allows no plugin; an empty block-list has no effect."""
    findings = system.plugin_lists({"SPLITLEARN_PLUGINS": "", "SPLITLEARN_DISABLE_PLUGINS": ""}, {})

    assert [finding.what for finding in findings] == ["SPLITLEARN_PLUGINS allows no plugin at all"]


def test_variables_of_the_network_are_notes_without_secrets() -> None:
    """Offline mode, another endpoint, proxies; user and password are left out."""
    environment = {
        "HF_HUB_OFFLINE": "yes",
        "HF_ENDPOINT": "http://user:secret@mirror.example/hub?token=secret",
        "https_proxy": "user:secret@proxy.example:3128",
        "HF_HOME": "/data/hf",
        "TRANSFORMERS_OFFLINE": "0",
    }

    findings = list(system.hub_variables(environment))

    assert [finding.where for finding in findings] == ["HF_HUB_OFFLINE", "HF_ENDPOINT", "HF_HOME", "https_proxy"]
    assert {finding.level for finding in findings} == {Level.NOTE}
    assert "secret" not in str(findings)
    assert "http://mirror.example/hub" in findings[1].what
    assert "proxy.example:3128" in findings[3].what


@pytest.mark.parametrize(
    ("version", "level"), [("3.10.14", "wrong"), ("3.11.0", "ok"), ("3.13.9", "ok"), ("3.15.0", "note"), ("x", "note")]
)
def test_versions_are_compared_with_the_tested_ones(version: str, level: str) -> None:
    """An older version is wrong; a newer one is a note, and so is one that cannot be compared."""
    finding = installation.PYTHON.judge("Python", version)

    assert finding.level == level
    assert version in finding.what


def test_a_missing_or_old_library_comes_with_its_command() -> None:
    """All dependencies of core are checked at once."""
    there: dict[str, str | None] = {name: versions_.lowest for name, versions_ in installation.LIBRARIES.items()}
    there |= {"torch": None, "transformers": "4.57.1", "tqdm": "99"}

    findings = {finding.what.split()[0]: finding for finding in installation.libraries(there)}

    assert (findings["torch"].level, findings["torch"].fix) == (Level.WRONG, "pip install 'torch>=2.13'")
    assert (findings["transformers"].level, findings["transformers"].fix) == (
        Level.WRONG,
        "pip install 'transformers>=5.4'",
    )
    assert findings["tqdm"].level is Level.NOTE
    assert findings["safetensors"].level is Level.OK


@pytest.mark.skipif(not (PACKAGE / "pyproject.toml").exists(), reason="the tests stand apart from their package")
def test_the_table_of_versions_matches_the_requirements() -> None:
    """Its lowest versions are the lower bounds of core, and the pins of the oldest test environment."""
    project = tomllib.loads((PACKAGE / "pyproject.toml").read_text())["project"]
    more = project["optional-dependencies"]
    bounds = dict(line.split(">=") for line in (*project["dependencies"], *more["peft"]))
    table = {
        **installation.LIBRARIES,
        **{name: r for _, needs in installation.EXTRAS.values() for name, r in needs.items()},
    }

    assert {name: item.lowest for name, item in table.items()} == bounds
    assert project["requires-python"] == f">={installation.PYTHON.lowest}"
    assert f"Programming Language :: Python :: {installation.PYTHON.newest}" in project["classifiers"]
    assert not any(item.is_above(item.lowest) for item in table.values())
    constraints = PACKAGE.parent / "tests" / "oldest-constraints.txt"
    if constraints.exists():
        pins = dict(line.split("==") for line in constraints.read_text().splitlines() if "==" in line)
        # torch is pinned where it is installed.
        assert {n: item.lowest for n, item in table.items() if n != "torch"}.items() <= {
            name: re.sub(r"\.0$", "", pin) if pin not in bounds.values() else pin for name, pin in pins.items()
        }.items()


def test_missing_commands_are_notes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each names the package that provides it."""
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
    """The note on memory names the group that limits it."""
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


def test_the_cache_is_checked_by_writing(tmp_path: Path) -> None:
    """A folder that can be created is fine, one below a file is wrong, and nothing is left behind."""
    (tmp_path / "file").write_text("")

    levels = [system.cache_folder(path).level for path in (tmp_path, tmp_path / "a" / "b", tmp_path / "file" / "hub")]

    assert levels[2] is Level.WRONG
    assert Level.WRONG not in levels[:2]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("facts", "level", "expected"),
    [
        ({"built_for": None, "driver": False, "visible": None}, Level.OK, "CPU"),
        ({"built_for": None, "driver": True, "visible": None}, Level.NOTE, "built only for the CPU"),
        ({"built_for": "13.0", "driver": True, "visible": ""}, Level.NOTE, "CUDA_VISIBLE_DEVICES"),
        ({"built_for": "13.0", "driver": True, "visible": None}, Level.NOTE, "cannot use it"),
    ],
)
def test_the_reason_for_a_missing_gpu_is_given(facts: Any, level: Level, expected: str) -> None:
    """No GPU, the wrong build of torch, a hidden GPU, or a driver that does not fit."""
    finding = system.missing_gpu(**facts)

    assert finding.level is level
    assert expected in finding.what


# --- a model


@pytest.mark.heavy
def test_a_model_that_can_be_loaded_is_described(llama: Any, single: Path) -> None:
    """Its plugin, its cuts, and the strategies that read it with their memory."""
    findings = check_model(str(single), load=True)

    assert not wrong(findings)
    assert about("is of type llama, which splitlearn-llama 1.0 provides; 6 layers", findings)
    assert about("--split 2 4", findings)
    assert about("read by mapped", findings)
    assert about("it has no tokenizer", findings)[0].level is Level.NOTE
    assert about("bottom, trunk and top load", findings)[0].level is Level.OK


#: A tensor inside a layer, whose shape no plan checks.
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
    ("how", "expected"),
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
def test_a_model_that_cannot_be_loaded_says_why(
    llama: Any, sharded: Path, edit_json: Any, how: str, expected: str
) -> None:
    """The finding is the error that a load would raise, with its hint as the fix; nothing is raised."""
    spoil(sharded, how, edit_json)

    (finding,) = wrong(check_model(str(sharded), load=True))

    assert expected in finding.what
    assert finding.fix


def bar(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a file unreadable, even for root."""
    opened = os.open

    def refused(name: Any, *arguments: Any, **options: Any) -> int:
        if name == path:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(name, *arguments, **options)

    path.chmod(0)
    monkeypatch.setattr(os, "open", refused)


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("how", "expected"),
    [("quick", ""), ("pickled", "weights in the format pytorch"), ("quantised", "its weights are quantised")],
)
def test_a_model_that_is_not_loaded_says_why(
    llama: Any, single: Path, edit_json: Any, monkeypatch: pytest.MonkeyPatch, how: str, expected: str
) -> None:
    """A note has the command that tries the load; nothing is loaded for it."""
    if how == "pickled":
        import torch
        from safetensors.torch import load_file

        torch.save(load_file(single / "model.safetensors"), single / "pytorch_model.bin")
        (single / "model.safetensors").unlink()
    elif how == "quantised":
        edit_json(single / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    monkeypatch.setattr("splitlearn_core.doctor.load_checks.load_components", pytest.fail)

    findings = check_model(str(single), load=how != "quick")

    notes = about("loading it was not tried", findings)
    assert [expected in note.what for note in notes] == [True] * bool(expected)
    assert all(note.fix == f"splitlearn verify {single} --split 2 4" for note in notes)
    assert not wrong(findings)


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_that_may_not_be_read_is_a_finding(
    llama: Any, single: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """It has the path and the command that changes it, and is not called a bug."""
    bar(single / name, monkeypatch)

    (finding,) = wrong(check_model(str(single), load=True))

    assert finding.what == f"Permission denied: {single / name}"
    assert finding.fix == f"chmod u+r {single / name}"


@pytest.mark.heavy
def test_a_model_is_not_loaded_without_enough_memory(
    llama: Any, single: Path, edit_json: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Converted tensors take memory, mapped or not."""
    edit_json(single / "config.json", dtype="float64")
    monkeypatch.setattr("splitlearn_core.doctor.load_checks.available_memory", lambda: 1)
    monkeypatch.setattr("splitlearn_core.doctor.load_checks.load_components", pytest.fail)

    findings = check_model(str(single), load=True)

    assert about("and 1 B are free", about("loading it was not tried: it takes", findings))
    assert about("loading all of it takes", wrong(findings))


@pytest.mark.usefixtures("warm_processes")
def test_the_command_reports_a_missing_model(llama: Any, cli: Any) -> None:
    """It is a finding, with exit code 1."""
    code, out, _ = cli("doctor", "./nowhere", "--quick", "--json")

    (finding,) = [finding for finding in json.loads(out)["findings"] if finding["check"] == "model"]
    assert code == 1
    assert "nowhere" in finding["what"]


def test_a_model_that_does_not_fit_is_wrong() -> None:
    """The strategy that needs the least memory decides."""
    needs = {"copied": MemoryNeeds(900, 900, 0), "mapped": MemoryNeeds(300, 300, 600)}

    assert [finding.level for free in (200, 400) for finding in memory_needed(needs, free)] == [Level.WRONG, Level.OK]


@pytest.mark.heavy
def test_suggested_cuts_are_possible(world: Any, single: Path) -> None:
    """They respect the impossible cuts of the family."""
    family = "ModelFamily(model_type='llama', architecture='LlamaForCausalLM', impossible_cuts={})"
    world.install("llama", HEAD + GIVEN.format(family.format("lambda config: {2: 'x', 4: 'x'}")))

    (finding,) = about("it can be cut", check_model(str(single), load=True))

    points = [int(word) for word in finding.what.split()[-2:]]
    assert not {2, 4} & set(points)
    assert 0 < points[0] < points[1] < 6
