"""What the documents show is run: each document's blocks, in order, in one folder and one environment of its own.

- `python`: run as a file, warnings are errors.
- `console`: the lines after `$ ` are run, and what they print is compared with what is shown below them: with
  stdout, with stderr, or with both one after the other. A command that ends in ` &` serves until the document ends; it
  is waited for until it has printed each line that is shown, in whatever order, for it does several things at once.
- `sh`: run; each command must succeed.
- `toml`, `yaml`, `json`: parsed. `text` and the directives of the documentation tool are left alone.
- `ini`: a systemd unit; `dockerfile`: a container. Their commands are run by tests of their own.

In what is shown, `...` stands for anything in a line, and for any lines where it stands alone; a date with a time
stands for any; spaces count as one. What a reader need not see stands in a comment above the block:

- `<!-- file: NAME -->`: the block is the content of this file, and is not run by itself.
- `<!-- may differ: ms, KiB -->`: numbers before these units are those of the machine at hand.
- `<!-- fails -->`: the last command of the block fails.
- `<!-- not run: REASON -->`: one of `REASONS`.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import tomllib
import venv
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from splitlearn_core.testing.worlds import tiny_model, write_checkpoint
from support.warm import WarmInterpreter

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("*.md", "core/*.md", "plugins/*/*.md", "docs/**/*.md", "tests/benchmarks/*.md")
    for path in ROOT.glob(pattern)
    if path.name != "CHANGELOG.md"
)
#: What the reader of a document leaves out, of what is installed here.
LACKS = {"docs/tutorial.md": "splitlearn-auto"}
#: Why a block may stay unrun, and how many there are at most.
REASONS = {
    "needs a package index": 16,
    "needs the Hub": 3,
    "needs a file of yours": 2,
    "is what the checks do": 2,
    "needs a Ray cluster": 3,
    "needs two servers": 2,
    "needs a container engine": 1,
    "takes an hour": 1,
    "takes minutes": 2,
    "needs a git checkout of transformers": 1,
}
#: PEFT up to 0.21 uses a name that transformers 5.23 has renamed; 0.18 looks for a configuration that no model
#: has which was never saved.
PEFT_SAYS = (
    "-W", "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
    "-W", "ignore:Could not find a config file:UserWarning",
)  # fmt: skip
#: Where one of these is set, pytest prints whole messages in its summary, and others other lines.
CHANGES_OUTPUT = ("CI", "BUILD_NUMBER", "COLUMNS", "FORCE_COLOR", "PY_COLORS")
#: Variables of a user, which a service has not.
PERSONAL = ("HOME", "HF_", "SPLITLEARN_", "XDG_")
#: The port that documents show; each run takes a free one.
PORT = "8710"
#: Seconds until a command that serves must have printed what is shown.
SERVING = 60

_FENCE = re.compile(r"^(?P<indent> *)(?P<fence>`{3,})(?P<language>[^`\n]*)$")
_NOTE = re.compile(r"^ *<!-- (?P<key>file|may differ|not run|fails)(?:: (?P<value>.+))? -->$")
_TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}"
#: What is not meant literally in shown output, and what it stands for.
_SPECIAL = {"all": r"\A\.\.\.\Z", "lines": r"^\.\.\.\n", "rest": r"\n\.\.\.\Z", "any": r"\.\.\.", "time": _TIME}
_STANDS_FOR = {
    "all": r"(?:.|\n)*", "lines": r"(?:.*\n)*?", "rest": r"(?:\n.*)*", "any": ".*", "time": _TIME, "number": r"[\d.,]+",
}  # fmt: skip


@dataclass(frozen=True)
class Block:
    """A fenced block, and the notes above it."""

    document: str
    line: int
    language: str
    text: str
    notes: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.document}:{self.line} ({self.language})"


def blocks_of(document: str) -> Iterator[Block]:
    lines = (ROOT / document).read_text(encoding="utf-8").splitlines()
    notes: dict[str, str] = {}
    number = 0
    while number < len(lines):
        note, fence = _NOTE.match(lines[number]), _FENCE.match(lines[number])
        if note:
            notes[note["key"]] = note["value"] or ""
        elif fence:
            begin, indent, end = number, len(fence["indent"]), fence["indent"] + fence["fence"]
            while lines[number + 1] != end:
                number += 1
            text = "".join(f"{line[indent:]}\n" for line in lines[begin + 1 : number + 1])
            yield Block(document, begin + 1, fence["language"].strip(), text, notes)
            number += 1
        if not note and lines[number].strip():
            notes = {}
        number += 1


def commands_of(block: Block) -> Iterator[tuple[str, str]]:
    """The commands of a console block, each with the output shown below it."""
    for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
        command, _, shown = part.partition("\n")
        yield command, shown


def plain(text: str) -> str:
    return "\n".join(re.sub(r"[ \t]+", " ", line).rstrip() for line in text.strip().splitlines())


def expectation(shown: str, units: str) -> re.Pattern[str]:
    """Make a pattern of shown output."""
    shown = plain(shown)
    special = dict(_SPECIAL)
    if units:
        special["number"] = rf"[\d.,]+(?= ?(?:{'|'.join(map(re.escape, units.split(', ')))})(?!\w))"
    pattern, end = "", 0
    for found in re.finditer("|".join(f"(?P<{name}>{what})" for name, what in special.items()), shown, re.MULTILINE):
        pattern += re.escape(shown[end : found.start()]) + _STANDS_FOR[found.lastgroup or ""]
        end = found.end()
    return re.compile(pattern + re.escape(shown[end:]))


class Reader:
    """Somebody who goes through one document: a folder, an environment, and what was started."""

    def __init__(self, home: Path, warm: WarmInterpreter, more: Mapping[str, str]) -> None:
        self.folder, environment = home / "reader", home / "environment"
        self.folder.mkdir()
        venv.create(environment, symlinks=True)
        self._bin = environment / ("Scripts" if os.name == "nt" else "bin")
        # It sees all that is installed here. What is installed into it stays in it.
        packages = Path(sysconfig.get_path("purelib", vars={"base": str(environment), "platbase": str(environment)}))
        (packages / "libraries.pth").write_text("".join(f"{path}\n" for path in sys.path if path))
        # Most of what is run imports torch and transformers, and a warm interpreter has done that.
        python = self._bin / "python"
        interpreter = self._bin / f"python{sys.version_info[0]}.{sys.version_info[1]}"
        target = python.resolve()
        for link in (python, interpreter):
            link.unlink()
        interpreter.symlink_to(target)
        warm.write(python, interpreter)
        for name, module in (("splitlearn", "splitlearn_core"), ("pip", "pip"), ("pytest", "pytest")):
            script = self._bin / name
            script.write_text(f'#!/bin/sh\nexec "{self._bin}/python" -m {module} "$@"\n')
            script.chmod(0o755)
        self._environment = {
            **{name: value for name, value in os.environ.items() if name not in CHANGES_OUTPUT},
            "PATH": f"{self._bin}{os.pathsep}{os.environ['PATH']}",
            # Who reads a document has no plugin for random order; of the conformance kit a sample is run here.
            "PYTEST_ADDOPTS": "-p no:randomly -p support.long -p support.process_state",
            # As many as a document shows of one.
            "SHORT_TESTS": "4",
            "LC_ALL": "C.UTF-8",
            "PIP_NO_INDEX": "1",
            "PIP_NO_BUILD_ISOLATION": "0",  # pip reads it so: no isolation
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            **more,
        }
        self._port = free_port()
        self._serving: list[tuple[subprocess.Popen[str], threading.Thread]] = []

    def read(self, block: Block) -> None:
        """Do what the block says, and fail where that is not what it shows."""
        if "not run" in block.notes:
            return
        if "file" in block.notes:
            path = self.folder / block.notes["file"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text, encoding="utf-8")
        elif block.language == "python":
            (self.folder / "block.py").write_text(block.text.replace(PORT, self._port), encoding="utf-8")
            done = self._run([str(self._bin / "python"), "-W", "error", *PEFT_SAYS, "block.py"])
            assert done.returncode == 0, f"{block}\n{done.stdout}{done.stderr}"
        elif block.language == "sh":
            done = self._run(["bash", "-e", "-o", "pipefail", "-c", block.text])
            assert done.returncode == 0, f"{block}\n{done.stdout}{done.stderr}"
        elif block.language == "console":
            self._follow(block)
        elif block.language in ("toml", "yaml", "json"):
            {"toml": tomllib.loads, "yaml": yaml.safe_load, "json": json.loads}[block.language](block.text)

    def _follow(self, block: Block) -> None:
        commands = list(commands_of(block))
        assert commands, f"{block} shows no command"
        for number, (command, shown) in enumerate(commands):
            units = block.notes.get("may differ", "")
            if command.endswith(" &"):
                lines = [expectation(line, units) for line in shown.replace(PORT, self._port).splitlines()]
                self._serve(block, command.removesuffix(" &"), lines)
                continue
            expected = expectation(shown.replace(PORT, self._port), units)
            # How fast this machine is is of no interest: what `bench` measures starts warm, too.
            warm = {"WARM_EXECUTABLE": str(self._bin / "python")} if command.startswith("splitlearn bench") else {}
            done = self._run(["bash", "-o", "pipefail", "-c", command.replace(PORT, self._port)], **warm)
            report = f"{block}\n$ {command}\n{done.stdout}{done.stderr}"
            fails = "fails" in block.notes and number == len(commands) - 1
            assert (done.returncode != 0) == fails, f"exit code {done.returncode} of {report}"
            assert "Traceback" not in done.stderr, report
            printed = (done.stdout, done.stderr, done.stdout + done.stderr)
            assert any(expected.fullmatch(plain(text)) for text in printed), f"another output of {report}"

    def _run(self, command: list[str], **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=self.folder, env={**self._environment, **more}, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=400, check=False,
        )  # fmt: skip

    def _serve(self, block: Block, command: str, expected: list[re.Pattern[str]]) -> None:
        """Start a command that serves, and wait until it has said what is shown."""
        process = subprocess.Popen(
            ["bash", "-c", f"exec {command} --port {self._port}"], cwd=self.folder, env=self._environment,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        printed: list[str] = []
        said = threading.Event()

        def listen() -> None:
            assert process.stdout is not None
            with process.stdout:
                for line in process.stdout:
                    printed.append(plain(line))
                    if all(any(map(pattern.fullmatch, printed)) for pattern in expected):
                        said.set()

        listener = threading.Thread(target=listen, daemon=True)
        listener.start()
        self._serving.append((process, listener))
        assert said.wait(SERVING), f"{block}\n$ {command} &\n" + "\n".join(printed)

    def leave(self) -> list[int]:
        """End what serves, as a service manager does; return how each of it ended."""
        for process, _ in self._serving:
            process.send_signal(signal.SIGTERM)
        codes = [process.wait(60) for process, _ in self._serving]
        for _, listener in self._serving:
            listener.join()
        return codes


def documented(language: str) -> str:
    """Return the one block of a language in the page about running a trunk."""
    (block,) = [block for block in blocks_of("docs/running-a-trunk.md") if block.language == language]
    return block.text


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


# The tutorial runs a whole conformance kit, beside other checks.
@pytest.mark.timeout(600)
@pytest.mark.parametrize("document", DOCUMENTS)
def test_a_document_shows_what_happens(document: str, warm: WarmInterpreter, tmp_path: Path) -> None:
    """As a reader would do it, from an empty folder to the end."""
    reader = Reader(tmp_path, warm, {"SPLITLEARN_DISABLE_PLUGINS": LACKS[document]} if document in LACKS else {})
    try:
        for block in blocks_of(document):
            reader.read(block)
    finally:
        ended = reader.leave()
    assert ended == [0] * len(ended)


def test_the_unit_is_valid(tmp_path: Path) -> None:
    """As systemd reads it, where it is installed."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd is not installed")
    path = tmp_path / "splitlearn.service"
    path.write_text(documented("ini").replace("/opt/splitlearn/bin/splitlearn", "/bin/true"), encoding="utf-8")
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", path], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.parametrize("language", ["ini", "dockerfile"])
def test_a_service_serves(language: str, warm: WarmInterpreter, tmp_path: Path) -> None:
    """The command of the unit and that of the container, in the environment that they give it."""
    text = documented(language).replace("\\\n", " ")
    if language == "ini":
        command = shlex.split(re.findall(r"^ExecStart=(.*)$", text, re.MULTILINE)[0])
        assert {Path(path).name for path in command if path.startswith("%d/")} == {
            name for name, _ in re.findall(r"^LoadCredential=(.*?):(.*)$", text, re.MULTILINE)
        }
        given = dict(pair.split("=") for pair in re.findall(r"^Environment=(.*)$", text, re.MULTILINE)[0].split())
        check = []
    else:
        instructions = dict(re.findall(r"^(HEALTHCHECK|ENTRYPOINT|CMD) [^\[]*(\[.*\])$", text, re.MULTILINE))
        command = json.loads(instructions["ENTRYPOINT"]) + json.loads(instructions["CMD"])
        given, check = {}, json.loads(instructions["HEALTHCHECK"])
    model = write_checkpoint(tmp_path / "model", tiny_model("qwen2", num_hidden_layers=26))
    (tmp_path / "tokens").write_text("a" * 32)
    (tmp_path / "tokens").chmod(0o600)
    for name in ("cert.pem", "key.pem"):
        shutil.copy(ROOT / "plugins/serve/tests/expired.pem", tmp_path / name)
    places = {"/srv/models/qwen2": model, "/model": model, "%d": tmp_path, "/run/secrets": tmp_path}
    for there, here in places.items():
        command = [re.sub(f"^{there}(?=/|$)", str(here), word) for word in command]

    process = subprocess.Popen(
        [str(warm.path), str(Path(sys.executable).with_name("splitlearn")), *command[1:], "--port", "0"],
        # What libraries read once is that of the warm interpreter.
        env={**{name: value for name, value in os.environ.items() if not name.startswith(PERSONAL)}, **given},
        stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    log = ""
    try:
        while not all(word in log for word in ("trunk at http", "-> ready")):
            line = process.stderr.readline()
            assert line, log
            log += line
        if check:
            (port,) = re.findall(r"Serving at http://0.0.0.0:(\d+)", log)
            for word, code in ((port, 0), (free_port(), 1)):
                checked = [str(warm.path), *(part.replace(PORT, word) for part in check[1:])]
                assert subprocess.run(checked, capture_output=True, timeout=60, check=False).returncode == code
        process.send_signal(signal.SIGTERM)
        log += process.communicate(timeout=60)[1]
        assert process.returncode == 0, log
        assert "Traceback" not in log
    finally:
        process.kill()
        process.wait()


#: What type checkers are to know of what a load returns, by the parts that were asked for.
TYPED = """\
from collections.abc import Sequence
from typing import Literal

from splitlearn_core import BottomModel, Component, SplitCausalLM, SplitModel, TopModel, TrunkModel, load_split_model
from torch import Tensor
from typing_extensions import assert_type

bottom, trunk, top = load_split_model("gpt2", (1, 5), "bundled:gpt2", dtype="float32")
assert_type(bottom, BottomModel)
assert_type(trunk, TrunkModel)
assert_type(top, TopModel)
assert_type(load_split_model("gpt2", (1, 5), parts=("trunk",)).trunk, TrunkModel)
assert_type(load_split_model("gpt2", (1, 5), parts=["trunk"]).bottom, None)
assert_type(load_split_model("gpt2", (1, 5), parts=(Component.TOP,)).top, TopModel)
ends = load_split_model("gpt2", (1, 5), parts=("bottom", "top"))
assert_type(ends.bottom, BottomModel)
assert_type(ends.trunk, None)
assert_type(ends.top, TopModel)
assert_type(load_split_model("gpt2", (1, 5), parts=["top", "bottom"]).top, TopModel)
assert_type(load_split_model("gpt2", (1, 5), parts=("bottom", "trunk", "top")).trunk, TrunkModel)
hidden = trunk(hidden_states=bottom(input_ids=Tensor()))
assert_type(hidden, Tensor)
assert_type(top(hidden_states=hidden).logits, Tensor)
top(hidden_states=hidden, labels=Tensor()).loss.backward()
SplitCausalLM(*load_split_model("gpt2", (1, 5))).generate(Tensor(), max_new_tokens=5)
SplitCausalLM(bottom=bottom, trunk=trunk, top=top, mixed_dtypes=True)
first, last = load_split_model("gpt2", (3,), "bundled:gpt2")
assert_type(first, BottomModel)
assert_type(last, TopModel)
assert_type(load_split_model("gpt2", (3,), parts=("top",)).bottom, None)
SplitCausalLM(first, last)
many = load_split_model("gpt2", (1, 3, 5), dtype="float32")
assert_type(many.bottom, BottomModel)
assert_type(many.trunks, tuple[TrunkModel, ...])
assert_type(many.trunk2, TrunkModel)
SplitCausalLM(many.bottom, *many.trunks, many.top)
assert_type(load_split_model("gpt2", (1, 2, 3, 4), parts=("trunk2",)).trunk2, TrunkModel | None)


def load(parts: Sequence[str], some: tuple[Literal["bottom", "trunk", "top"], ...]) -> SplitModel:
    assert_type(load_split_model("gpt2", (1, 5), parts=some).trunk, TrunkModel | None)
    return load_split_model("gpt2", (1, 5), parts=parts)


assert_type(load(("trunk",), ()).trunk, TrunkModel | None)
"""


@pytest.fixture(scope="module")
def typed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the Python of all documents, a file a block, and what checkers are to know besides."""
    folder = tmp_path_factory.mktemp("typed")
    for document in DOCUMENTS:
        for block in blocks_of(document):
            if block.language == "python":
                name = f"{document.removesuffix('.md')}_{block.line}"
                (folder / f"{re.sub('[^a-zA-Z0-9]', '_', name)}.py").write_text(block.text, encoding="utf-8")
    (folder / "typed_usage.py").write_text(TYPED, encoding="utf-8")
    return folder


# A checker reads torch and transformers for a minute before it says anything: `make types` runs the first.
@pytest.mark.sample(0)
@pytest.mark.timeout(900)
@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_python_in_documents_has_no_type_errors(typed: Path, checker: str) -> None:
    """As a reader's own checker sees it, without a configuration."""
    pytest.importorskip(checker)
    call = [sys.executable, "-m", checker]
    environment = {**os.environ, "PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"}
    there = subprocess.run([*call, "--version"], env=environment, capture_output=True, text=True, check=False)
    if there.returncode != 0:
        pytest.skip(
            f"{checker} does not run here (pyright needs Node.js: pip install 'pyright[nodejs]'): {there.stderr}"
        )
    options = {"mypy": ["--config-file=", "--cache-dir=.cache"], "pyright": ["--pythonpath", sys.executable]}[checker]
    done = subprocess.run(
        [*call, *options, "."], cwd=typed, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_little_is_left_out() -> None:
    """Each block that is not run says why, and there are few of each sort; each block names its language."""
    known = {"python", "console", "sh", "toml", "yaml", "json", "ini", "dockerfile", "text"}
    reasons: dict[str, int] = dict.fromkeys(REASONS, 0)
    for document in DOCUMENTS:
        for block in blocks_of(document):
            assert block.language in known or block.language.startswith("{"), str(block)
            if "not run" in block.notes:
                assert block.notes["not run"] in REASONS, str(block)
                reasons[block.notes["not run"]] += 1
    assert all(count <= REASONS[reason] for reason, count in reasons.items()), reasons


def test_there_are_blocks() -> None:
    """A changed fence would leave nothing to run."""
    run = [block for document in DOCUMENTS for block in blocks_of(document) if "not run" not in block.notes]
    for language, least in (("python", 15), ("console", 12)):
        assert len([block for block in run if block.language == language]) >= least


@pytest.mark.parametrize(
    ("shown", "printed", "matches"),
    [
        ("a 1 ms", "a   20 ms", True),
        ("a 1 ms", "a 20 s", False),
        ("a 1 MiB", "a 2 MiB", False),
        ("a\n...\nb", "a\nx\ny\nb", True),
        ("a\n...\nb", "a\nb", True),
        ("a\n...", "a\nx\ny", True),
        ("a\n...", "a", True),
        ("a\n...", "ab", False),
        ("...", "a\nb", True),
        ("a\n...\nb", "a\nx\nc", False),
        ("...\nb", "x\nb", True),
        ("a ... c", "a b b c", True),
        ("a ... c", "a b\nc", False),
        ("2026-11-24 23:00:49,306 INFO", "2027-01-02 03:04:05,678 INFO", True),
        ("a.b", "axb", False),
    ],
)
def test_what_may_differ(shown: str, printed: str, matches: bool) -> None:
    """The notation allows what it says and nothing else."""
    assert bool(expectation(shown, "ms, tokens/s").fullmatch(plain(printed))) is matches
