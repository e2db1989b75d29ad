"""This end of the processes that use Ray, one for each cluster; they start with the first model and end with this."""

from __future__ import annotations

import contextlib
import itertools
import json
import subprocess
import threading
from collections.abc import Mapping
from typing import Any, Protocol

from splitlearn_core import CapacityError
from splitlearn_core.extension import command_for, reason, translate
from splitlearn_ray.driver import run_driver

_END_TIMEOUT = 10.0


class Listener(Protocol):
    """Receives the messages about one actor, in the thread of the cluster."""

    def on_message(self, message: Mapping[str, Any]) -> None: ...


class Cluster:
    """A process that is connected to a cluster."""

    def __init__(self, address: str, namespace: str) -> None:
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._listeners: dict[int, Listener] = {}
        #: Whether the cluster has answered, and whether the process has ended.
        self.is_connected = self.is_over = False
        with translate(lambda error: CapacityError(f"no process can be started: {reason(error)}"), OSError):
            self._process = subprocess.Popen(  # noqa: S603  # this interpreter
                command_for(run_driver, address, namespace),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                encoding="utf-8",
                # Ctrl-C in a terminal is for this process, which then ends that one.
                start_new_session=True,
            )
        self._reader = threading.Thread(target=self._read, name="follow a Ray cluster", daemon=True)
        self._reader.start()

    def place(self, place: Mapping[str, Any], listener: Listener) -> int:
        """Ask for an actor, and return its number; all that happens to it is told to the listener."""
        number = next(self._numbers)
        with self._lock:
            is_over = self.is_over
            if not is_over:
                self._listeners[number] = listener
        if is_over:
            listener.on_message(_GONE)
        else:
            self.tell({"number": number, "place": place})
        return number

    def tell(self, message: Mapping[str, Any]) -> None:
        """Send a message about an actor."""
        # If the process has ended, its listeners hear of it.
        with self._lock, contextlib.suppress(OSError, ValueError):
            if self._process.stdin is not None and not self.is_over:
                self._process.stdin.write(json.dumps(message) + "\n")
                self._process.stdin.flush()

    def close(self) -> None:
        """End the process, and with it all actors."""
        with self._lock, contextlib.suppress(OSError):
            if self._process.stdin is not None:
                self._process.stdin.close()
        self._reader.join(_END_TIMEOUT if self.is_connected else 0)
        if self._reader.is_alive():
            self._process.kill()
            self._reader.join()

    def _read(self) -> None:
        refusal: dict[str, Any] = {}
        with self._process:
            for line in self._process.stdout or ():
                message = json.loads(line)
                if "refused" in message:
                    refusal = {"error": message["refused"]}
                elif "connected" in message:
                    self.is_connected = True
                elif "number" in message:
                    listener = self._listeners.get(message["number"])
                    if "ended" in message:
                        self._listeners.pop(message["number"], None)
                    if listener is not None:
                        listener.on_message(message)
            with self._lock:
                self.is_over = True
                left, self._listeners = list(self._listeners.values()), {}
                with contextlib.suppress(OSError):
                    if self._process.stdin is not None:
                        self._process.stdin.close()
        for listener in left:
            if refusal:
                listener.on_message(refusal)
            listener.on_message(_GONE)


_GONE: Mapping[str, Any] = {"ended": "ended with the connection to the cluster, whose head may be gone"}


class _Clusters:
    """Those of this process, by address and namespace."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.known: dict[tuple[str, str], Cluster] = {}


_clusters = _Clusters()


def cluster_of(address: str, namespace: str) -> Cluster:
    """Return the connection to a cluster; starts it if there is none."""
    with _clusters.lock:
        cluster = _clusters.known.get((address, namespace))
        if cluster is None or cluster.is_over:
            cluster = _clusters.known[address, namespace] = Cluster(address, namespace)
        return cluster


def end_clusters() -> None:
    """End all connections to clusters, and with them their actors; a later load makes new ones."""
    with _clusters.lock:
        clusters, _clusters.known = list(_clusters.known.values()), {}
    for cluster in clusters:
        cluster.close()
