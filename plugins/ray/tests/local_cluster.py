"""A Ray cluster on this machine, one for all processes of a test run; it ends with the last that uses it.

``python local_cluster.py SHARED FOLDER`` runs it: those who use it hold the FIFO ``users`` in SHARED open for writing.
Who comes later starts another one.
"""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import secrets
import select
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
    # Importing it would change this process's path and environment.
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed: it has no wheel for this Python or system")


@contextmanager
def local_cluster(shared: Path) -> Iterator[dict[str, str]]:
    """Use the cluster; yield the variables for its users.

    Args:
        shared: A folder that all processes of the run have in common.
    """
    shared.mkdir(exist_ok=True)
    with _locked(shared):
        variables, user = _join(shared)
    try:
        yield variables
    finally:
        os.close(user)


@contextmanager
def _locked(shared: Path) -> Iterator[None]:
    with (shared / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _join(shared: Path) -> tuple[dict[str, str], int]:
    """Return the variables of the cluster that runs, or of a new one, and what keeps it running."""
    fifo, written = shared / "users", shared / "variables.json"
    if written.exists():
        try:
            return json.loads(written.read_text()), os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:  # no process reads the FIFO: the cluster has crashed
            _forget(shared)
    os.mkfifo(fifo)
    try:
        variables = _start(shared)
    except BaseException:  # a skip, too
        fifo.unlink()
        raise
    written.write_text(json.dumps(variables))
    return variables, os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)


def _forget(shared: Path) -> None:
    for name in ("users", "variables.json"):
        (shared / name).unlink(missing_ok=True)


def _start(shared: Path) -> dict[str, str]:
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
            [sys.executable, __file__, str(shared), folder],
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
    # Its own processes have limits of seconds, which a machine that is too busy does not keep.
    pytest.skip(f"Ray did not start in {_ATTEMPTS} attempts: the host ray was NOT tested")


def main() -> None:
    shared, folder = Path(sys.argv[1]), sys.argv[2]
    import ray

    # Before the address is printed, so that the other end can be opened at once.
    users = os.open(shared / "users", os.O_RDONLY | os.O_NONBLOCK)
    waiting = select.poll()
    waiting.register(users, 0)

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
        is_used = True
        while is_used:
            waiting.poll()  # until no process has it open any more
            with _locked(shared):
                is_used = not waiting.poll(0)
                if not is_used:
                    _forget(shared)
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
