"""What the documentation says of the server is what the server does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from serving import StatusServer
from splitlearn_core import ModelConfig
from splitlearn_core.manager.config import read_config_file
from splitlearn_serve.run import make_manager

DOCS = Path(__file__).parents[3] / "docs"
MANUAL, TRUNKS = DOCS / "operating-the-manager.md", DOCS / "running-a-trunk.md"

pytestmark = pytest.mark.skipif(not MANUAL.exists(), reason="the tests stand apart from the documentation")


def test_the_example_of_the_manual_is_valid(tmp_path: Path) -> None:
    """The configuration file that the documentation shows can be read."""
    (example,) = re.findall(r"<!-- file: models\.yaml -->\n```yaml\n(.*?)```", MANUAL.read_text(), re.DOTALL)
    (tmp_path / "models.yaml").write_text(example)

    configuration = read_config_file(tmp_path / "models.yaml")

    assert all(isinstance(model, ModelConfig) for model in configuration.models)
    make_manager(configuration)


def test_the_manual_names_every_metric_and_route() -> None:
    """The tables of the documentation are those of the program."""
    manual = MANUAL.read_text() + TRUNKS.read_text()
    with StatusServer() as server:
        exported = server.request("GET", "/metrics").body.decode()
        told = set(re.findall(r"`(splitlearn_\w+)`", manual))
        lag = {"splitlearn_event_loop_lag_seconds"}  # measured by the process alone
        assert told - lag == set(re.findall(r"^# TYPE (splitlearn_\w+)", exported, re.MULTILINE))
        routes = re.findall(r"^\| `(GET|POST|DELETE) (/\S*)`", manual, re.MULTILINE)
        assert len(routes) == 15
        for method, path in routes:
            if path not in ("/api/events", "/ID"):  # the one does not end, the other is of models that are there
                answer = server.request(method, path.replace("ID", "none"))
                assert answer.status in (200, 202, 404, 422)
                assert b"there is no GET" not in answer.body
                assert b"there is no POST" not in answer.body
                assert b"there is no DELETE" not in answer.body
