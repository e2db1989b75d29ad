"""The command line from outside: processes, exit codes, and what goes to which stream."""

from __future__ import annotations

import json
import os
import re
import select
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from splitlearn_core import SplitCausalLM, load_split_model, plan_split
from splitlearn_core.testing.installing import write_plugin
from support.warm import WarmInterpreter

SCRIPT = Path(sys.executable).with_name("splitlearn")
ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
SPLIT = ("--split", 2, 4)

PLAN_FIELDS = {
    "model", "commit", "model_type", "split_points", "num_layers", "dtype", "source",
    "parameters", "bytes", "shards", "tied", "cut_bytes_per_token", "components", "memory", "warnings", "unexpected",
}  # fmt: skip
COMPONENT_FIELDS = {
    *("component", "layers", "tensors", "parameters", "bytes", "dtype", "shards"),
    *("kv_bytes_per_token", "state_bytes_per_sequence"),
}
GENERATION_FIELDS = {"prompt", "text", "prompt_tokens", "new_tokens", "seconds", "tokens_per_second"}
VERIFICATION_FIELDS = {
    "links",
    "equal", "model", "split_points", "dtype", "input", "checks", "max_difference", "components",
    "unsplit_load_seconds", "unsplit_forward_seconds",
}  # fmt: skip
PLUGIN_FIELDS = {
    "kind",
    "name",
    "model_type", "distribution", "version", "module", "editable", "origin", "status", "hooks", "error", "hint",
}  # fmt: skip

#: A plugin for qwen2 that confuses two projections of the same shape.
CONFUSED_QWEN2 = """\
from splitlearn_core import ModelFamily, hookimpl

@hookimpl
def splitlearn_model_families():
    return [ModelFamily(model_type="qwen2", architecture="Qwen2ForCausalLM")]

@hookimpl
def splitlearn_map_weight_keys(checkpoint_keys):
    swapped = {"k_proj": "v_proj", "v_proj": "k_proj"}
    return {key: ".".join(swapped.get(part, part) for part in key.split(".")) for key in checkpoint_keys}
"""

#: What must not matter to a command that needs no network.
CUT_OFF = {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9", "NO_PROXY": ""}

Cli = Callable[..., CompletedProcess[str]]


def succeeded(result: CompletedProcess[str]) -> str:
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def terminal(interpreter: object, *arguments: object, stream: str, **variables: str) -> tuple[str, str, int]:
    """Run a command with one of its output streams on a terminal; return what went there, the other, the exit code."""
    master, slave = os.openpty()
    termios.tcsetwinsize(slave, (40, 100))  # a new one has no columns, and a bar would have no room
    try:
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, stream: slave}
        process = subprocess.Popen(
            [str(part) for part in (interpreter, SCRIPT, *arguments)],
            env={**os.environ, "TERM": "xterm-256color", **variables},
            stdin=subprocess.DEVNULL,
            **streams,
        )
    finally:
        os.close(slave)
    other = process.stderr if stream == "stdout" else process.stdout
    assert other is not None
    seen: dict[int, bytes] = {master: b"", other.fileno(): b""}
    open_ends = set(seen)
    with process:
        while open_ends:
            for end in select.select(list(open_ends), [], [], 120)[0]:
                try:
                    block = os.read(end, 65536)
                except OSError:  # how a terminal says that its other side is closed
                    block = b""
                seen[end] += block
                if not block:
                    open_ends.discard(end)
        piped = seen[other.fileno()]
    os.close(master)
    return seen[master].decode(), piped.decode(), process.returncode


def run_into_closed_pipe(interpreter: object, *arguments: object) -> tuple[int, str]:
    """Run a command whose reader goes away before it reads anything; return exit code and stderr."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        result = subprocess.run(
            [str(part) for part in (interpreter, SCRIPT, *arguments)],
            stdin=subprocess.DEVNULL,
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
            check=False,
        )
    finally:
        os.close(writer)
    return result.returncode, result.stderr


class TestEntry:
    def test_version(self, cli: Cli, process: Cli) -> None:
        """Script and module say the same: name and version, on stdout."""
        import importlib_metadata

        expected = f"splitlearn, version {importlib_metadata.version('splitlearn-core')}\n"
        assert succeeded(cli("--version")) == expected
        assert succeeded(process("-m", "splitlearn_core", "--version")) == expected

    def test_module_runs_commands(self, cli: Cli, process: Cli, sharded: Path) -> None:
        """``python -m splitlearn_core`` is the console script under another name."""
        arguments = ("plan", sharded, *SPLIT, "--json")
        assert succeeded(process("-m", "splitlearn_core", *arguments)) == succeeded(cli(*arguments))

    def test_help(self, cli: Cli, command: Cli) -> None:
        """Help goes to stdout, lists every command, and costs no import of torch."""
        text = succeeded(cli("--help"))
        for name in ("demo", "plugins", "plan", "generate", "verify", "serve", "ps"):
            assert re.search(rf"^  {name}\s+\S", text, re.MULTILINE)
            assert succeeded(command(name, "-h")) == succeeded(command(name, "--help"))

    def test_light_commands_import_nothing_heavy(self, process: Cli, sharded: Path) -> None:
        """Help, the list of plugins and a plan import neither torch nor transformers."""
        code = (
            "import sys; from splitlearn_core.cli.main import cli\n"
            "cli.main(sys.argv[1:], standalone_mode=False)\n"
            "print(sorted({'torch', 'transformers'} & set(sys.modules)), file=sys.stderr)"
        )
        for arguments in (("--help",), ("plugins",), ("plan", sharded, *SPLIT)):
            result = process("-c", code, *arguments)
            assert (result.returncode, result.stderr) == (0, "[]\n")

    @pytest.mark.parametrize(
        "arguments",
        [
            ("no-such-command",),
            ("plan",),
            ("plan", "model", "--split"),
            ("plan", "model", "--split", 4, 2),
            ("plan", "model", *SPLIT, "--dtype", "float7"),
            ("plan", "model", "--split", "two", "four"),
            ("plan", "model", *SPLIT, "--no-such-option"),
            ("generate", "model", *SPLIT),
            ("generate", "model", *SPLIT, "--prompt", "x", "--prompt-file", "-"),
            ("generate", "model", *SPLIT, "--prompt", "x", "--system", "y"),
            ("generate", "model", *SPLIT, "--prompt", "x", "--max-new-tokens", 0),
            ("generate", "model", *SPLIT, "--prompt", "x", "--top-p", 2),
            ("plugins", "no-such-command"),
            ("demo", "--max-new-tokens", "many"),
        ],
        ids=lambda arguments: " ".join(map(str, arguments)),
    )
    def test_usage_errors(self, command: Cli, arguments: tuple[object, ...]) -> None:
        """Wrong usage is exit code 2, explained on stderr, with nothing on stdout."""
        result = command(*arguments)
        assert (result.returncode, result.stdout) == (2, "")
        assert re.search(r"^Error: .+", result.stderr, re.MULTILINE)
        assert "Traceback" not in result.stderr

    def test_no_command(self, cli: Cli) -> None:
        """Without a command there is help, and the exit code says that nothing was done."""
        result = cli()
        assert result.returncode == 2
        assert "plan" in result.stdout + result.stderr

    @pytest.mark.parametrize("words", [("plan",), ("generate", "--prompt", "x"), ("verify",)], ids=" ".join)
    @pytest.mark.parametrize(
        ("model", "options", "says"),
        [
            ("./no-such-directory", SPLIT, "no-such-directory"),
            (None, ("--split", 2, 99), "99"),
        ],
        ids=["no directory", "too many layers"],
    )
    def test_failures(
        self,
        command: Cli,
        talking: Path,
        words: tuple[str, ...],
        model: str | None,
        options: tuple[object, ...],
        says: str,
    ) -> None:
        """What fails is exit code 1: one error line and a hint on stderr, nothing on stdout, no traceback."""
        result = command(*words, model or talking, *options)
        assert (result.returncode, result.stdout) == (1, "")
        assert re.search(r"^error: .+", result.stderr, re.MULTILINE)
        assert re.search(r"^hint: .+", result.stderr, re.MULTILINE)
        assert says in result.stderr
        assert "Traceback" not in result.stderr


class TestPlugins:
    def test_list(self, cli: Cli) -> None:
        """Each installed plugin is one row; the JSON has the documented fields, also under ``plugins list``."""
        rows = json.loads(succeeded(cli("plugins", "--json")))
        assert {row["model_type"] for row in rows} >= {"gpt2", "qwen2", "gemma", "gemma2", "gemma3_text"}
        assert all(set(row) == PLUGIN_FIELDS for row in rows)
        assert {row["status"] for row in rows} == {"ready"}
        assert json.loads(succeeded(cli("plugins", "list", "--json"))) == rows
        table = cli("plugins")
        assert table.stderr == ""
        lines = succeeded(table).splitlines()
        assert lines[0].startswith("model type")
        # Strategies and hosts have a table of their own, after an empty line.
        kinds = {row["kind"] for row in rows}
        assert len(lines) == 1 + len(rows) + 2 * (len(kinds) - 1)

    def test_json_before_or_after_the_subcommand(self, cli: Cli) -> None:
        """``plugins --json list`` is not silently a table."""
        result = cli("plugins", "--json", "list")
        if result.returncode == 0:
            assert json.loads(result.stdout)
        else:
            assert result.returncode == 2

    def test_broken_plugin_does_not_hide_the_others(self, cli: Cli, tmp_path: Path) -> None:
        """A plugin that cannot work is a row with its error among the others; `--check` finds it, and exits with 1."""
        folder = write_plugin(tmp_path / "plugins", "llama", "import no_such_module_anywhere\n")
        succeeded(cli("plugins", "--json", PYTHONPATH=str(folder)))
        checked = cli("plugins", "--check", "--json", PYTHONPATH=str(folder))
        assert checked.returncode == 1
        rows = json.loads(checked.stdout)
        by_type = {row["model_type"]: row for row in rows}
        assert by_type["llama"]["status"] == "broken"
        assert "no_such_module_anywhere" in by_type["llama"]["error"]
        assert by_type["llama"]["hint"]
        assert by_type["gpt2"]["status"] == "ready"
        assert "no_such_module_anywhere" in cli("plugins", "--check", PYTHONPATH=str(folder)).stdout


class TestPlan:
    def test_json(self, cli: Cli, sharded: Path) -> None:
        """The JSON is the plan of the Python call, with the documented fields, and stderr stays empty."""
        result = cli("plan", sharded, *SPLIT, "--json")
        plan = json.loads(succeeded(result))
        assert result.stderr == ""
        assert plan == plan_split(sharded, (2, 4)).to_dict()
        assert set(plan) == PLAN_FIELDS
        assert all(set(component) == COMPONENT_FIELDS for component in plan["components"])

    def test_for_people(self, cli: Cli, sharded: Path) -> None:
        """The drawing names model, components and layers, and has no colours in a pipe."""
        result = cli("plan", sharded, *SPLIT)
        text = succeeded(result)
        assert result.stderr == ""
        assert text.startswith(f"{sharded}\n")
        for component, layers in (("bottom", "[0, 2)"), ("trunk", "[2, 4)"), ("top", "[4, 6)")):
            assert re.search(rf"^{component} .*{re.escape(layers)}", text, re.MULTILINE)
        assert not ANSI.search(text)

    def test_colours(self, warm: WarmInterpreter, sharded: Path) -> None:
        """A terminal gets colours; NO_COLOR with any value takes them away and changes nothing else; empty is unset."""
        arguments = (warm.path, "plan", sharded, *SPLIT)
        coloured, errors, code = terminal(*arguments, stream="stdout")
        assert (errors, code) == ("", 0)
        assert ANSI.search(coloured)
        plain, _, code = terminal(*arguments, stream="stdout", NO_COLOR="1")
        assert code == 0
        assert not ANSI.search(plain)
        assert plain == ANSI.sub("", coloured)
        assert terminal(*arguments, stream="stdout", NO_COLOR="")[0] == coloured

    def test_narrow_encoding(self, cli: Cli, sharded: Path) -> None:
        """Where stdout cannot carry the bar's characters, a plan is still printed and not a traceback."""
        result = cli("plan", sharded, *SPLIT, PYTHONIOENCODING="ascii", PYTHONUTF8="0", LC_ALL="C")
        assert "Traceback" not in result.stderr
        assert "trunk" in succeeded(result)


@pytest.mark.libs
class TestGenerate:
    def test_text(self, cli: Cli, process: Cli, talking: Path) -> None:
        """stdout is prompt, continuation and a line end; the speed is on stderr; a process of its own says the same."""
        arguments = ("generate", talking, *SPLIT, "--prompt", "Once upon", "--max-new-tokens", 9)
        result = process(SCRIPT, *arguments)
        assert succeeded(result).startswith("Once upon")
        assert result.stdout.endswith("\n")
        assert re.search(r"^9 tokens in .* tokens/s$", result.stderr, re.MULTILINE)
        assert succeeded(cli(*arguments)) == result.stdout

    def test_json(self, command: Cli, talking: Path) -> None:
        """The JSON has the documented fields, and its text is that of the components put together in Python."""
        from transformers import AutoTokenizer

        result = command("generate", talking, *SPLIT, "--prompt", "Once upon", "--max-new-tokens", 9, "--json")
        answer = json.loads(succeeded(result))
        assert set(answer) == GENERATION_FIELDS
        assert (answer["prompt"], answer["prompt_tokens"], answer["new_tokens"]) == ("Once upon", 9, 9)
        tokenizer = AutoTokenizer.from_pretrained(talking)
        ids = tokenizer("Once upon", return_tensors="pt")["input_ids"]
        model = SplitCausalLM(*load_split_model(None, (2, 4), talking))
        expected = model.generate(ids, do_sample=False, max_new_tokens=9, pad_token_id=0)
        assert answer["text"] == tokenizer.decode(expected[0], skip_special_tokens=True)

    def test_seed(self, command: Cli, talking: Path) -> None:
        """Draws with one seed repeat; with another they differ."""

        def draw(seed: int) -> str:
            sampling = ("--max-new-tokens", 20, "--temperature", 1.5, "--seed", seed)
            return succeeded(command("generate", talking, *SPLIT, "--prompt", "Once", *sampling))

        assert draw(1) == draw(1) != draw(2)

    @pytest.mark.parametrize("ending", ["", "\n", "\r\n"], ids=["none", "line feed", "both"])
    def test_prompt_of_a_file(self, command: Cli, talking: Path, tmp_path: Path, ending: str) -> None:
        """It is the text of the file, but for its last line end, whatever is in it."""
        text = "Once\nupon \u00e4"
        (tmp_path / "prompt").write_text(text + ending, encoding="utf-8", newline="")
        arguments = ("generate", talking, *SPLIT, "--max-new-tokens", 9, "--json")
        answers = [
            json.loads(succeeded(command(*arguments, *prompt)))
            for prompt in (("--prompt", text), ("--prompt-file", tmp_path / "prompt"))
        ]
        assert answers[0]["prompt"] == answers[1]["prompt"] == text
        assert answers[0]["text"] == answers[1]["text"]

    def test_prompt_of_stdin(self, warm: WarmInterpreter, talking: Path) -> None:
        """``--prompt-file -`` reads it to its end."""
        arguments = [
            str(warm.path),
            str(SCRIPT),
            "generate",
            str(talking),
            "--split",
            "2",
            "4",
            "--prompt-file",
            "-",
            "--json",
        ]
        done = subprocess.run(
            [*arguments, "--max-new-tokens", "3"], input="Once\nupon\n", capture_output=True, text=True, check=False
        )
        assert json.loads(succeeded(done))["prompt"] == "Once\nupon"

    @pytest.mark.parametrize(("content", "says"), [(None, "cannot be read"), (b"\xff\xfe", "not UTF-8")])
    def test_prompt_that_cannot_be_read(
        self, command: Cli, talking: Path, tmp_path: Path, content: bytes | None, says: str
    ) -> None:
        """A file that is not there, or holds no text, is an error line and a hint."""
        if content is not None:
            (tmp_path / "prompt").write_bytes(content)
        result = command("generate", talking, *SPLIT, "--prompt-file", tmp_path / "prompt")
        assert (result.returncode, result.stdout) == (1, "")
        assert says in result.stderr
        assert re.search(r"^hint: .+", result.stderr, re.MULTILINE)

    def test_stop(self, command: Cli, talking: Path) -> None:
        """The text ends where one of the stop strings comes, as transformers ends it."""
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(talking)
        model = AutoModelForCausalLM.from_pretrained(talking)
        ids = tokenizer("Once upon", return_tensors="pt")["input_ids"]
        sampling = {"do_sample": True, "temperature": 1.5, "top_k": 50, "top_p": 1.0}

        def generate(**stopping: Any) -> Any:
            torch.manual_seed(3)
            return model.generate(ids, **sampling, max_new_tokens=60, pad_token_id=0, **stopping)[0]

        text = tokenizer.decode(generate()[ids.shape[1] + 1 :])
        stop = next(letter for letter in text if letter.isascii())
        expected = generate(stop_strings=[stop, "never"], tokenizer=tokenizer)
        assert len(expected) < ids.shape[1] + 60
        drawing = ("--temperature", 1.5, "--seed", 3, "--max-new-tokens", 60, "--json")
        result = command(
            "generate", talking, *SPLIT, "--prompt", "Once upon", *drawing, "--stop", stop, "--stop", "never"
        )
        answer = json.loads(succeeded(result))
        assert answer["text"] == tokenizer.decode(expected, skip_special_tokens=True)
        assert answer["new_tokens"] == len(expected) - ids.shape[1]

    def test_too_long(self, command: Cli, talking: Path) -> None:
        """More tokens than the model has positions is refused with the number that would fit."""
        result = command("generate", talking, *SPLIT, "--prompt", "Once", "--max-new-tokens", 1000)
        assert (result.returncode, result.stdout) == (1, "")
        assert "252" in result.stderr

    def test_empty_prompt(self, command: Cli, talking: Path) -> None:
        """A prompt of no tokens is an error, not a crash."""
        result = command("generate", talking, *SPLIT, "--prompt", "", "--max-new-tokens", 4)
        assert (result.returncode, result.stdout) == (1, "")
        assert "Traceback" not in result.stderr


class TestWithoutSplit:
    @pytest.mark.parametrize("words", [("plan",), ("generate", "--prompt", "x"), ("verify",)], ids=" ".join)
    def test_even_thirds_are_taken(self, command: Cli, talking: Path, words: tuple[str, ...]) -> None:
        """Commands that only read use even thirds, and print them on stderr as options to repeat."""
        name, *options = words
        proposed = command(name, talking, *options, "--json")
        said = re.search(r"(--split) (\d+) (\d+)", proposed.stderr)
        assert said
        assert said.groups() == ("--split", "2", "4")
        given = command(name, talking, *options, *said.groups(), "--json")
        assert given.stderr.count("--split") == 0
        timed = ("components", "seconds", "tokens_per_second", "unsplit_load_seconds", "unsplit_forward_seconds")
        one, other = (json.loads(succeeded(result)) for result in (proposed, given))
        untimed = timed if name != "plan" else ()
        assert {key: one[key] for key in one if key not in untimed} == {
            key: other[key] for key in other if key not in untimed
        }

    def test_what_writes_is_not_begun(self, command: Cli, talking: Path, tmp_path: Path) -> None:
        """``split`` is wrong usage without it, and proposes what to write."""
        for more in ((), ("--dry-run",)):
            result = command("split", talking, "--out", tmp_path / "out", *more)
            assert result.returncode == 2
            assert "--split 2 4" in result.stderr
        assert not (tmp_path / "out").exists()


@pytest.mark.libs
class TestVerify:
    def test_says_what_memory_is_counted(self, command: Cli, sharded: Path) -> None:
        """Mapped components take next to nothing of it, which the table explains itself."""
        assert re.search(r"^memory taken: .*mapped", succeeded(command("verify", sharded, *SPLIT)), re.MULTILINE)

    def test_json(self, cli: Cli, sharded: Path) -> None:
        """Equal is exit code 0 and ``"equal": true``, with every comparison named."""
        answer = json.loads(succeeded(cli("verify", sharded, *SPLIT, "--json")))
        assert set(answer) == VERIFICATION_FIELDS
        assert answer["equal"] is True
        assert answer["max_difference"] == 0
        assert answer["checks"] == dict.fromkeys(("logits", "decoding with a cache", "generated tokens"), True)
        assert [component["component"] for component in answer["components"]] == ["bottom", "trunk", "top"]

    def test_for_people(self, command: Cli, sharded: Path) -> None:
        """stdout ends with the verdict; nothing but data is there."""
        lines = succeeded(command("verify", sharded, *SPLIT)).splitlines()
        assert lines[0] == f"{sharded} cut at 2 and 4, float32, random tokens"
        assert lines[-1].startswith("equal to the last bit")

    def test_difference(self, cli: Cli, sharded: Path, tmp_path: Path) -> None:
        """A plugin that loads tensors into the wrong places is found out: exit code 1, and which comparison differs."""
        folder = write_plugin(tmp_path / "plugins", "qwen2", CONFUSED_QWEN2, distribution="confused-qwen2")
        variables = {"PYTHONPATH": str(folder), "SPLITLEARN_DISABLE_PLUGINS": "splitlearn-qwen2"}
        result = cli("verify", sharded, *SPLIT, "--json", **variables)
        assert result.returncode == 1
        assert "Traceback" not in result.stderr
        answer = json.loads(result.stdout)
        assert answer["equal"] is False
        assert answer["checks"]["logits"] is False
        assert answer["max_difference"] > 0
        people = cli("verify", sharded, *SPLIT, **variables)
        assert people.returncode == 1
        assert "DIFFERS" in people.stdout
        assert "NOT equal" in people.stdout

    def test_bar_is_on_a_terminal_and_on_stderr_only(self, warm: WarmInterpreter, sharded: Path) -> None:
        """With stderr on a terminal a bar is drawn there, and stdout is the same JSON document alone."""
        drawn, data, code = terminal(warm.path, "verify", sharded, *SPLIT, "--json", stream="stderr")
        assert code == 0
        assert re.search(r"Loading (bottom|trunk|top)", drawn)
        assert json.loads(data)["equal"] is True


@pytest.mark.parametrize(
    "command",
    [
        ("plugins",),
        ("plan", SPLIT),
        ("plan", (*SPLIT, "--json")),
        ("verify", SPLIT),
        ("generate", (*SPLIT, "--prompt", "x")),
    ],
    ids=["plugins", "plan", "plan --json", "verify", "generate"],
)
def test_reader_that_goes_away(warm: WarmInterpreter, talking: Path, command: tuple[object, ...]) -> None:
    """``splitlearn ... | head -1`` ends quietly: no traceback and no complaint at exit."""
    name, *options = command
    arguments = (talking, *options[0]) if options else ()
    code, errors = run_into_closed_pipe(warm.path, name, *arguments)
    assert "Traceback" not in errors
    assert "BrokenPipe" not in errors
    assert "Exception ignored" not in errors
    assert code in (0, 1)


class TestDemo:
    def test_for_people_and_as_json(self, warm: WarmInterpreter, command: Cli) -> None:
        """Offline, without any network, the demonstration plans, loads, generates text and verifies equal.

        The text comes piece by piece: it is begun on stdout before the process is done. As JSON it is one document:
        the plan, what was generated, and the verification; the seed gives the same story.
        """
        process = subprocess.Popen(
            [str(warm.path), str(SCRIPT), "demo"],
            env={**os.environ, **CUT_OFF},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert process.stdout is not None
        assert process.stderr is not None
        pieces = []
        with process:
            while block := os.read(process.stdout.fileno(), 65536):
                pieces.append(block)
            errors = process.stderr.read().decode()
        assert process.returncode == 0, errors
        assert "Traceback" not in errors
        begun = next(i for i, piece in enumerate(pieces) if b"The people" in piece)
        ended = next(i for i, piece in enumerate(pieces) if b"tokens/s" in piece)
        assert ended - begun > 3
        text = b"".join(pieces).decode()
        assert [line[0] for line in text.splitlines() if re.match(r"\d\. ", line)] == ["1", "2", "3", "4"]
        assert "bundled:gpt2" in text
        output = text.split("3. Generating", 1)[1].split("\n4. ", 1)[0]
        assert "The people of the United States" in output
        assert re.search(r"60 tokens, [\d.]+ tokens/s", output)
        words = re.findall(r"[A-Za-z]{3,}", output.split("The people of the United States", 1)[1])
        assert len(words) > 20
        assert "equal to the last bit; maximum difference 0" in text
        assert "DIFFERS" not in text
        hosting, here = map(int, re.findall(r"process (\d+) has the trunk, (\d+) has bottom and top", text)[0])
        assert hosting != here
        assert not Path(f"/proc/{hosting}").exists()
        assert re.search(r"^trunk at process:.*: \d+ round trips, [\d.]+ B per token", text, re.MULTILINE)

        answer = json.loads(succeeded(command("demo", "--json", "--max-new-tokens", 20, "--seed", 1)))
        assert set(answer) == {"plan", "generation", "verification"}
        assert set(answer["plan"]) == PLAN_FIELDS
        assert set(answer["generation"]) == GENERATION_FIELDS
        assert set(answer["verification"]) == VERIFICATION_FIELDS
        assert answer["verification"]["equal"] is True
        assert answer["generation"]["new_tokens"] == 20
        assert answer["generation"]["text"].startswith("The people of the United States")
        assert answer["generation"]["text"] in output

    def test_bundled_model_is_a_model_like_any_other(self, command: Cli) -> None:
        """``bundled:gpt2`` can be planned, generated with and verified, at any cut."""
        layers = json.loads(succeeded(command("plan", "bundled:gpt2", "--split", 1, 2, "--json")))["num_layers"]
        cut = ("--split", 1, layers - 1)
        generated = command("generate", "bundled:gpt2", *cut, "--prompt", "We hold", "--max-new-tokens", 8)
        assert succeeded(generated).startswith("We hold")
        verified = json.loads(succeeded(command("verify", "bundled:gpt2", *cut, "--json")))
        assert verified["equal"] is True
        assert verified["input"] == "prompt"

    def test_no_plugin_carries_a_model(self, cli: Cli) -> None:
        """Without the plugin that carries it, the error says which package does."""
        result = cli("demo", SPLITLEARN_DISABLE_PLUGINS="gpt2")
        assert (result.returncode, result.stdout) == (1, "")
        assert "pip install splitlearn-gpt2" in result.stderr
        missing = cli("plan", "bundled:qwen2", *SPLIT)
        assert (missing.returncode, missing.stdout) == (1, "")
        assert "carries no model" in missing.stderr
