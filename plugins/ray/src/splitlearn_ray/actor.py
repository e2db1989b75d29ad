"""The actor: loads one trunk, and serves it where it is. Runs on a machine of the cluster.

The process that uses Ray imports this module too, so that torch and what needs it are imported inside functions.
"""

from __future__ import annotations

import logging
import os
import threading
import traceback
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from splitlearn_core import Progress, SplitLearnError

if TYPE_CHECKING:
    from splitlearn_core.extension import ComponentServer

log = logging.getLogger(__name__)


class TrunkActor:
    """One trunk. Its methods are called by Ray, each in a thread of its own."""

    def __init__(self) -> None:
        self._progress: list[Any] = ["importing", None, 0, 0, ""]
        self._importing = threading.Lock()

    def about(self) -> dict[str, Any]:
        """Return what is installed here, and the process id."""
        return {"pid": os.getpid(), "versions": versions()}

    def prepare(self, model_type: str) -> None:
        """Import what a load needs; an error of it is the load's."""
        with self._importing:
            from splitlearn_core import load_split_model, preload  # noqa: F401  # imported when they are named
            from splitlearn_ray import serving  # noqa: F401  # with what serves a component

            preload({model_type})
            versions()

    def load(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Load the trunk and listen for connections.

        Returns:
            ``{"ready": {...}}`` with where it listens, or ``{"error": {...}}``.
        """
        try:
            with self._importing:  # a spare may be busy with it
                server = self._loaded(request)
            from splitlearn_ray.serving import on_machine, on_network

            listens = on_network(server, **request["network"]) if request["network"] else on_machine(server)
        except Exception as error:  # noqa: BLE001  # raised where the load was asked for
            return {"error": described(error)}
        return {"ready": listens}

    def progress(self) -> list[Any]:
        """Return how far the load is: the fields of a ``Progress``."""
        return self._progress

    def memory(self) -> int:
        """Return the bytes that would be freed if this process ended now; 0 where that is unknown."""
        try:
            lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
        except OSError:
            return 0
        values = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
        return values["Private_Clean"] + values["Private_Dirty"]

    def watch(self) -> None:
        """Never return: the call ends with the process, and so tells of its end."""
        threading.Event().wait()

    def _loaded(self, request: Mapping[str, Any]) -> ComponentServer:
        os.environ.update(request["environment"])
        import torch

        from splitlearn_core import load_split_model
        from splitlearn_core.extension import ComponentServer

        torch.set_num_threads(request["threads"])
        torch.set_float32_matmul_precision(request["matmul_precision"])
        torch.set_deterministic_debug_mode(request["deterministic"])

        def report(step: Progress) -> None:
            self._progress = [step.stage, step.component, step.bytes_done, step.bytes_total, step.file]

        parts = load_split_model(progress=report, **request["load"])
        return ComponentServer(next(part for part in parts if part is not None))


def versions() -> dict[str, str]:
    """Return the versions of what both ends must have alike."""
    return {name: version(name) for name in ("splitlearn-ray", "splitlearn-core")}


def described(error: Exception) -> dict[str, str]:
    """Return an error as plain values, for another process that may not have its class."""
    if isinstance(error, SplitLearnError):
        known = next(cls for cls in type(error).__mro__ if cls.__module__ == SplitLearnError.__module__)
        return {"type": known.__name__, "message": error.message, "hint": error.hint}
    log.error("An actor failed:\n%s", "".join(traceback.format_exception(error)))
    return {"type": "", "message": f"{type(error).__name__}: {error}", "hint": ""}
