"""A data owner, a server and a Ray cluster: the text goes on to the last bit while an actor is killed."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

from splitlearn_core import SplitCausalLM, connect, load_split_model
from splitlearn_core.manager.config import dump_yaml
from support.warm import WarmInterpreter

pytestmark = pytest.mark.ray

CUT = (2, 6)
KILLED_AT, NEW = 3, 8
CLUSTER = Path(__file__).parent.parent / "plugins" / "ray" / "tests" / "local_cluster.py"


@pytest.fixture
def cluster(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The cluster that the tests of the package use, too."""
    spec = importlib.util.spec_from_file_location("local_cluster", CLUSTER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.requires_ray()
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base
    with module.local_cluster(shared / "ray") as variables:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        yield


@pytest.fixture
def url(cluster: None, single: Path, tmp_path: Path, warm: WarmInterpreter) -> Iterator[str]:
    """A server of a trunk in an actor."""
    model = {
        "model_id": "trunk", "model_type": "qwen2", "model_path": str(single), "component": "trunk",
        "split_points": list(CUT), "host": "ray",
        "host_options": {"num_cpus": 0, "memory_mb": 0, "resources": {"place": 1}, "prepared": False},
    }  # fmt: skip
    config = tmp_path / "models.yaml"
    config.write_text(dump_yaml({"models": [model]}))
    command = [warm.path, Path(sys.executable).with_name("splitlearn"), "serve", "--config", config, "--port", "0"]
    with subprocess.Popen([str(word) for word in command], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        served = next(filter(None, (re.search(r"Serving at (http://\S+)", line) for line in process.stderr)))
        try:
            # The rest is read, so that the server never waits for it.
            with subprocess.Popen(["cat"], stdin=process.stderr, stdout=sys.stderr.fileno()):
                yield served[1]
                process.send_signal(signal.SIGTERM)
                assert process.wait(60) == 0
        finally:
            process.kill()


class Killing(StoppingCriteria):  # type: ignore[misc]
    """Kills the actor after some tokens; stops nothing."""

    def __init__(self, url: str) -> None:
        self._url, self._tokens = url, 0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self._tokens += 1
        if self._tokens == KILLED_AT:
            os.kill(info_of(self._url)["pid"], signal.SIGKILL)
        return torch.zeros(len(input_ids), dtype=torch.bool)


def info_of(url: str) -> Any:
    with urllib.request.urlopen(f"{url}/api/models", timeout=30) as answer:
        return json.loads(answer.read())["models"][0]


def test_the_text_goes_on(url: str, single: Path) -> None:
    """The next actor gets the steps of the owner's journal: the text is that of the unsplit model, to the last bit."""
    whole = AutoModelForCausalLM.from_pretrained(single).eval()
    ids = torch.randint(3, 90, (2, 5), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    parts = load_split_model("qwen2", CUT, str(single), parts=("bottom", "top"))
    remote = connect(f"{url}/trunk", wait=120)
    model = SplitCausalLM(parts.bottom, remote, parts.top)

    before = info_of(url)
    text = model.generate(ids, **options, stopping_criteria=StoppingCriteriaList([Killing(url)]))
    after = info_of(url)
    remote.close()

    assert torch.equal(text, whole.generate(ids, **options))
    assert (before["host"], after["restarts"], after["pid"] != before["pid"]) == ("ray", 1, True)
