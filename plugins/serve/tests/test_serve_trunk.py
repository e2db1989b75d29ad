"""A trunk served by a process of its own, and the commands around it; files of tokens, and certificates."""

from __future__ import annotations

import gc
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from shutil import which
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from serving import Process
from splitlearn_core import ConfigurationError, MissingFileError, SplitCausalLM, connect, load_split_model
from splitlearn_serve.session_settings import session_limits, session_problems
from splitlearn_serve.tls import server_context
from splitlearn_serve.tokens import client_token, read_tokens

TOKEN = "0123456789abcdef" * 2


def splitlearn(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "splitlearn_core", *map(str, arguments)]
    environ = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environ)


@pytest.fixture
def serve(
    single: Path, llama: None, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[Callable[..., Process]]:
    """Return a function that serves the trunk of the checkpoint."""
    running = []
    try:
        interpreter = str(request.getfixturevalue("warm").path)
    except pytest.FixtureLookupError:
        # This package is tested alone, without what the tests of the repository share.
        interpreter = sys.executable

    def serve(*arguments: object, port: int = 0) -> Process:
        path = os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")])
        command = (single, "--split", 2, 4, "--port", port, *arguments)
        process = Process(interpreter, *command, PYTHONPATH=path, OMP_NUM_THREADS="1")
        running.append(process)
        return process

    yield serve
    for process in running:
        if process.process.poll() is None:
            process.kill()


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    path = tmp_path / "tokens"
    path.write_text(f"# of this test\nme: {TOKEN}  max_sessions=8  # enough\n")
    path.chmod(0o600)
    return path


@pytest.mark.filterwarnings("ignore:.*past_key_values.*:FutureWarning")
def test_killed_and_restarted(serve: Callable[..., Process], single: Path, tokens: Path) -> None:
    """The text continues to the last bit, in another process; with a token from a file at both ends."""
    whole = AutoModelForCausalLM.from_pretrained(single).eval()
    parts = load_split_model(None, (2, 4), str(single), parts=("bottom", "top"))
    ids = torch.randint(3, whole.config.vocab_size, (2, 6))
    options: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0, "num_beams": 2}
    first = serve("--token-file", tokens)
    remote = connect(first.url, token=client_token(tokens))
    model = SplitCausalLM(parts.bottom, remote, parts.top)
    calls = 0

    def kill(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 5:
            first.kill()
            serve("--token-file", tokens, port=int(first.address.rpartition(":")[2]))

    model.register_forward_pre_hook(kill)

    assert torch.equal(whole.generate(ids, **options), model.generate(ids, **options))
    assert calls > 5
    gc.collect()
    remote.close()


def test_load_and_unload(serve: Callable[..., Process], tokens: Path) -> None:
    """With the token, `load` and `unload` change what `ps` shows."""
    server = serve("--token-file", tokens)
    at = ("--url", server.address)

    refused = splitlearn("unload", "trunk", *at)
    assert refused.returncode == 1
    assert "requires a token" in refused.stderr
    loaded = splitlearn("load", "trunk", *at, "--token-file", tokens)
    assert (loaded.returncode, loaded.stdout.split(":")[0].split(" is ")[0]) == (0, "trunk")
    unloaded = splitlearn("unload", "trunk", *at, "--token-file", tokens)
    assert (unloaded.returncode, unloaded.stdout.startswith("trunk is unloaded: ")) == (0, True)
    again = splitlearn("load", "trunk", "--json", *at, SPLITLEARN_TOKEN=TOKEN)
    assert again.returncode == 0
    assert '"status": "ready"' in again.stdout
    assert again.stderr.startswith("trunk: ")
    assert re.search(r"^trunk +ready", splitlearn("ps", *at, SPLITLEARN_TOKEN=TOKEN).stdout, re.MULTILINE)
    unknown = splitlearn("load", "tronk", *at, SPLITLEARN_TOKEN=TOKEN)
    assert (unknown.returncode, unknown.stdout) == (1, "")
    assert "no model 'tronk' is configured" in unknown.stderr
    assert TOKEN not in server.log


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ((), 2, "give either MODEL --split A B, or --config FILE"),
        (("MODEL",), 2, "MODEL needs --split A B"),
        (("MODEL", "--split", 2, 4, "--part", "top"), 2, "a top is not served: it has the data owner's"),
        (("MODEL", "--split", 2, "--port", 0), 1, "--split 2 gives no trunk: it gives a bottom and a top alone"),
        (("MODEL", "--split", 1, 2, 4), 1, "--split 1 2 4 gives no trunk: it gives trunk1 and trunk2"),
        (("MODEL", "--split", 2, 40), 1, "40"),
        (("--config", "x.yaml", "--split", 2, 4), 2, "--split: with --config, the file says this"),
        (("MODEL", "--split", 2, 4, "--host", "0.0.0.0"), 2, "say --allow-remote"),
        (("MODEL", "--split", 2, 4, "--host", "0.0.0.0", "--allow-remote", "--port", 0), 1, "no token is needed"),
        (("MODEL", "--split", 2, 4, "--tls-cert", "x.pem"), 1, "TLS needs two files"),
        (("MODEL", "--split", 2, 4, "--session-timeout", "soon"), 1, "session_timeout: 'soon' is not a number"),
        (("MODEL", "--split", 2, 4, "--next-token-file", "x"), 2, "--next-token-file: there is no --next URL"),
        (("MODEL", "--split", 2, 4, "--max-sessions", "0"), 2, "0 is not in the range"),
    ],
)
def test_bad_command_lines(
    arguments: tuple[object, ...], code: int, said: str, single: Path, llama: None, tmp_path: Path
) -> None:
    """Each is refused at once, with the way out."""
    given = [single if argument == "MODEL" else argument for argument in arguments]
    result = splitlearn("serve", *given, PYTHONPATH=str(tmp_path / "site"), SPLITLEARN_TOKEN="")

    assert (result.returncode, result.stdout) == (code, ""), result.stderr
    assert said in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr


class TestTokens:
    @pytest.fixture(autouse=True)
    def no_token(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("SPLITLEARN_TOKEN", raising=False)

    def test_a_file(self, tokens: Path) -> None:
        """Names, limits and comments are read; the client takes the first token."""
        owner = read_tokens(tokens).owner_of(f"Bearer {TOKEN}")
        assert (owner.name, owner.max_sessions, owner.max_tokens) == ("me", 8, None)
        assert client_token(tokens) == TOKEN

    def test_training(self, tmp_path: Path) -> None:
        """A word of its own allows it, and limits of its own may follow; without it, a token is for inference."""
        file = tmp_path / "tokens"
        file.write_text(f"a: {TOKEN} training training_steps=5 adapter_memory=2\nb: {'x' * 32} max_tokens=9\n")
        a, b = (read_tokens(file).owner_of(f"Bearer {token}") for token in (TOKEN, "x" * 32))
        limits = a.limits(session_limits({"training_tokens": 100, "training_steps": 8}))
        assert (limits.training, limits.training_steps, limits.training_tokens) == (True, 5, 100)
        assert limits.adapter_bytes == 2 * 2**20
        assert not b.limits(session_limits({})).training
        assert not a.limits(session_limits({"training": False})).training

    def test_the_variable(self, tokens: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where there is a file, it counts."""
        assert len(read_tokens(None)) == 0
        monkeypatch.setenv("SPLITLEARN_TOKEN", "of the variable".replace(" ", "-"))
        assert read_tokens(None).owner_of("Bearer of-the-variable").name == "token"
        with pytest.raises(Exception, match="not one of"):
            read_tokens(tokens).owner_of("Bearer of-the-variable")
        monkeypatch.setenv("SPLITLEARN_TOKEN", "two words")
        with pytest.raises(ConfigurationError, match="a header cannot hold"):
            read_tokens(None)

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("# nothing\n", "there is none"),
            (f"{TOKEN} max_session=3", "did you mean 'max_sessions'"),
            (f"{TOKEN} max_tokens=many", "line 1: what follows the token is neither NAME=NUMBER nor"),
            (f"a: {TOKEN}\nb: {TOKEN}", "line 2 repeats"),
            ("a:", "line 1 is not a token"),
        ],
    )
    def test_bad_files(self, tmp_path: Path, text: str, said: str) -> None:
        """All problems are listed, and no token is."""
        (tmp_path / "tokens").write_text(text)
        (tmp_path / "tokens").chmod(0o600)
        with pytest.raises(ConfigurationError, match=said) as error:
            read_tokens(tmp_path / "tokens")
        assert TOKEN not in str(error.value)

    def test_no_file(self, tmp_path: Path) -> None:
        """The way to make one is shown."""
        with pytest.raises(MissingFileError, match="no token file"):
            read_tokens(tmp_path / "tokens")

    def test_a_file_that_others_can_read(self, tokens: Path, caplog: pytest.LogCaptureFixture) -> None:
        """It is used, with a warning."""
        tokens.chmod(0o644)
        with caplog.at_level(logging.WARNING):
            read_tokens(tokens)
        assert "chmod o-r" in caplog.text


class TestCertificates:
    def test_bad_files(self, tmp_path: Path) -> None:
        """Each says what is wrong before anything is loaded."""
        if which("openssl") is None:
            pytest.skip("openssl is not there to make a certificate")
        for name, options in (("a", ("-nodes",)), ("b", ("-nodes",)), ("c", ("-passout", "pass:secret"))):
            command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-subj", "/CN=x", *options]
            command += ["-keyout", f"{tmp_path}/{name}-key.pem", "-out", f"{tmp_path}/{name}.pem"]
            subprocess.run(command, check=True, capture_output=True)
        (tmp_path / "no.pem").write_text("no PEM")

        server_context(tmp_path / "a.pem", tmp_path / "a-key.pem")
        for certificate, key, said in (
            ("a.pem", "b-key.pem", "the key is another certificate's"),
            ("no.pem", "a-key.pem", "is not a PEM file"),
            ("a.pem", "no.pem", "is not a PEM file"),
            ("c.pem", "c-key.pem", "password"),
        ):
            with pytest.raises(ConfigurationError, match=said):
                server_context(tmp_path / certificate, tmp_path / key)
        with pytest.raises(MissingFileError, match=r"there is no file .*x\.pem"):
            server_context(tmp_path / "x.pem", tmp_path / "a-key.pem")


def test_settings() -> None:
    """The table `sessions` gives limits; every problem of it is listed."""
    limits = session_limits({"max_sessions": 4, "session_timeout": "5m", "cache_memory": 1.5})
    assert (limits.max_sessions, limits.max_sessions_per_owner, limits.idle_timeout) == (4, 4, 300.0)
    assert limits.cache_bytes == 3 * 2**19
    problems = session_problems(
        {"max_sesions": 1, "max_tokens": True, "session_timeout": -1, "cache_memory": "much", "training": 1}
    )
    assert [problem.partition(":")[0] for problem in problems] == [
        "max_sesions", "max_tokens", "session_timeout", "cache_memory", "training",
    ]  # fmt: skip
