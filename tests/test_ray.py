"""A data owner, a server and a Ray cluster: the text goes on to the last bit while an actor is killed."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

from splitlearn_core import ModelConfig, SplitCausalLM, connect, load_split_model
from splitlearn_core.manager.config import dump_yaml
from support.serving import Process

CUT = (2, 6)
KILLED_AFTER, NEW = 3, 8


@pytest.fixture
def cluster(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The cluster that the tests of the package use, too."""
