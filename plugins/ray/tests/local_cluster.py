"""A Ray cluster on this machine, one for all processes of a test run; it ends with the last of them.

``python local_cluster.py FIFO FOLDER`` runs it: the processes that use it hold the FIFO open for writing.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

#: Starting Ray takes seconds, and many of them where every core is busy.
_ATTEMPTS = 3


def requires_ray() -> None:
    """Skip the test where there is no Ray."""
    pytest.importorskip("ray", reason="Ray is not installed: it has no wheel for this Python or system")


@contextmanager
def local_cluster(shared: Path) -> Iterator[dict[str, str]]:
    """Use the cluster; yield the variables for its users.

    Args:
        shared: A folder that all processes of the run have in common.
    """
    shared.mkdir(exist_ok=True)
    fifo, variables = shared / "users", shared / "variables.json"
    with (shared / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not variables.exists():
            os.mkfifo(fifo)
            variables.write_text(json.dumps(_start(fifo)))
        user = os.open(fifo, os.O_WRONLY)
        fcntl.flock(lock, fcntl.LOCK_UN)
    try:
        yield json.loads(variables.read_text())
    finally:
        os.close(user)


def _start(fifo: Path) -> dict[str, str]:
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    settings = {
        "RAY_USAGE_STATS_ENABLED": "0",
        # Otherwise actors give way to everything else on the machine.
        "RAY_worker_niceness": "0",
        "RAY_enable_metrics_collection": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "OMP_NUM_THREADS": "1",
    }
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    for _ in range(_ATTEMPTS):
        # Sockets below it have long names.
        folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
        process = subprocess.Popen(
            [sys.executable, __file__, str(fifo), folder],
            env={**environment, **settings, **token},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        process.stdout.close()
        if address:
            # It ends by itself, after this process if others still use it.
            process.returncode = 0
            return {**token, "RAY_ADDRESS": address}
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)
    raise RuntimeError(f"Ray did not start in {_ATTEMPTS} attempts")


def main() -> None:
    fifo, folder = sys.argv[1:]
    import ray

    try:
        context = ray.init(
            num_cpus=2,
            # What single tests reserve, so that they can run side by side.
            resources={"place": 1000, "single": 1},
            include_dashboard=False,
            object_store_memory=100 * 2**20,
            log_to_driver=False,
            _temp_dir=folder,
        )
        print(context.address_info["address"], flush=True)
        sys.stdout.close()
        with Path(fifo).open() as users:
            users.read()  # until no process has it open
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
