"""What an actor does by itself: it loads a trunk, and serves it on a socket of its machine, or to who has the token."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from splitlearn_core import AccessRefusedError, ConfigurationError, RemoteComponent, load_split_model
from splitlearn_core.extension import Endpoint, Frame, Host, Kind, Patience
from splitlearn_ray.actor import TrunkActor
from splitlearn_ray.driver import _connect, _refuse_other_versions, _start_error, versions
from splitlearn_ray.handle import _LocalConnection

CUT = (2, 4)
TOKEN = "t" * 32


def request_for(path: Path, network: Any = None) -> dict[str, Any]:
    load = {"model_type": "llama", "model_name_or_path": str(path), "split_points": list(CUT), "parts": ["trunk"]}
    return {
        "load": load,
        "threads": torch.get_num_threads(),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "deterministic": torch.get_deterministic_debug_mode(),
        "environment": {},
        "network": network,
    }


def test_from_another_machine_a_token_opens_the_way(single: Path) -> None:
    """Steps are equal to the last bit over a WebSocket; without the token nothing is told."""
    (expected,) = [part for part in load_split_model("llama", CUT, str(single), parts=("trunk",)) if part is not None]
    actor = TrunkActor()
    answer = actor.load(request_for(single, {"host": "127.0.0.1", "token": TOKEN}))
    url = answer["ready"]["url"]
    assert (actor.progress()[0], actor.about()["pid"]) == ("ready", os.getpid())

    remote = RemoteComponent(Host(Endpoint(url, TOKEN), Patience(wait=0)), 64)
    caches = remote.new_cache(), expected.new_cache()
    for tokens in (5, 1):
        states = torch.randn(1, tokens, 32, generator=torch.Generator().manual_seed(tokens))
        mine = remote(hidden_states=states, past_key_values=caches[0])
        assert torch.equal(mine, expected(hidden_states=states, past_key_values=caches[1]))
    remote.close()
    for token in (None, "u" * 32):
        with pytest.raises(AccessRefusedError, match="401"):
            Endpoint(url, token).open()


def test_on_its_machine_only_its_user_gets_in(single: Path) -> None:
    """The socket is in a folder of that user's."""
    path = Path(TrunkActor().load(request_for(single))["ready"]["path"])
    assert (path.parent.stat().st_mode & 0o777, path.stat().st_mode & 0o777) == (0o700, 0o600)
    assert path.is_relative_to(tempfile.gettempdir())
    connection = _LocalConnection(str(path))
    connection.send(Frame(Kind.HELLO))
    assert connection.receive().kind is Kind.WELCOME
    connection.close()
    path.unlink()
    path.parent.rmdir()


def test_an_error_is_described(tmp_path: Path) -> None:
    """With the class that the other end knows, and its hint."""
    answer = TrunkActor().load(request_for(tmp_path / "none"))
    assert (answer["error"]["type"], bool(answer["error"]["hint"])) == ("MissingFileError", True)
    assert "none" in answer["error"]["message"]


def test_other_versions_are_refused() -> None:
    """Frames may differ; both versions are named, and the machine."""
    _refuse_other_versions(versions(), "10.0.0.7")
    with pytest.raises(ConfigurationError, match=r"10\.0\.0\.7 .* splitlearn-core 0\.0\.1 there and "):
        _refuse_other_versions({**versions(), "splitlearn-core": "0.0.1"}, "10.0.0.7")


def test_a_machine_without_the_package_is_named() -> None:
    """What Ray says there is long; the line that matters is kept."""
    text = "The actor failed to import:\n  ...\nModuleNotFoundError: No module named 'splitlearn_ray'\n  ..."
    error = _start_error("trunk", "10.0.0.7", RuntimeError(text))
    assert isinstance(error, ConfigurationError)
    assert error.message.endswith("10.0.0.7 of the cluster cannot run 'trunk': ModuleNotFoundError: No module named "
                                  "'splitlearn_ray'")  # fmt: skip


def test_the_process_that_uses_ray_is_light() -> None:
    """It needs neither torch nor transformers."""
    code = "import sys, splitlearn_ray.driver; print(sorted({'torch', 'transformers'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_without_ray_the_way_out_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package may be there without what it needs."""
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigurationError, match="Ray cannot be imported") as error:
        _connect("auto", "splitlearn")
    assert "-m pip install" in error.value.hint
