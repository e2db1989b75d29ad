"""The process that uses Ray: places actors, watches them and ends them, as messages on its stdin say.

Ray's library ends its process when the head of the cluster is gone for a minute, takes over signals and starts threads:
all that happens here, and not in the manager's process.

A line of JSON is a message. In: ``{"number": N, "place": {...}}``, and ``memory`` and ``end`` of an actor. Out:
``progress``, ``ready``, ``error``, ``memory`` and ``ended`` of one; before, ``connected``, or ``refused``: the cluster
cannot be used at all.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import socket
import sys
import threading
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from splitlearn_core import CapacityError, ConfigurationError, HostDiedError, LoadFailedError, SplitLearnError
from splitlearn_core.extension import human_bytes, reserve_stdout
from splitlearn_ray.actor import TrunkActor, described, versions

#: Seconds between two looks at a placement or a load; the first ones at a placement, which mostly takes milliseconds,
#: follow each other faster.
_LOOK_EVERY, _LOOK_FIRST = 0.1, 0.002
#: Calls of one actor at a time: its load, the watch, and questions.
_CONCURRENCY = 8
_MEMORY_TIMEOUT = 5.0
#: Seconds for a killed process to end.
_EXIT_TIMEOUT = 10.0
#: Seconds for the head of a cluster to accept a connection.
_REACH_TIMEOUT = 10.0
#: Of the state of a placement group.
_PLACED = "CREATED"
_START = "start Ray: ray start --head on one machine, ray start --address=HEAD:6379 on the others"


def run_driver(address: str, namespace: str) -> None:
    """Connect to a cluster and carry out messages until stdin ends."""
    out = Messages(reserve_stdout())
    # The user of splitlearn has not been asked.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        _connect(address, namespace)
    except Exception as error:  # noqa: BLE001  # raised where a model is loaded
        out.send({"refused": described(error)})
        return
    out.send({"connected": True})
    cluster = Cluster()
    actors: dict[int, Placement] = {}
    for line in sys.stdin:
        message = json.loads(line)
        number = message["number"]
        if "place" in message:
            actors[number] = Placement(cluster, number, message["place"], out)
            threading.Thread(target=actors[number].run, name="follow an actor", daemon=True).start()
        elif "memory" in message:
            threading.Thread(target=actors[number].measure, name="measure an actor", daemon=True).start()
        else:
            actors.pop(number).end()
    import ray

    # All actors belong to this process: Ray ends them with it.
    ray.shutdown()


class Messages:
    """Messages to the process that started this one; any thread sends them."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lock = threading.Lock()

    def send(self, message: Mapping[str, Any]) -> None:
        # Once the other end is gone, this process ends, too.
        with self._lock, contextlib.suppress(OSError):
            self._stream.write(json.dumps(message) + "\n")
            self._stream.flush()


def _connect(address: str, namespace: str) -> None:
    try:
        import ray
    except ImportError as error:
        raise ConfigurationError(
            f"Ray cannot be imported: {error}", hint=f"{sys.executable} -m pip install 'ray>=2.60.0'"
        ) from error
    import logging

    head = os.environ.get("RAY_ADDRESS", "auto") if address == "auto" else address
    where = "on this machine" if head == "auto" else f"at {head}"
    try:
        _reach(head)
        ray.init(address=address, namespace=namespace, log_to_driver=False, logging_level=logging.ERROR)
    except OSError as error:
        raise ConfigurationError(f"no Ray cluster answers {where}: {_first_line(error)}", hint=_START) from error
    except RuntimeError as error:
        if "ersion mismatch" not in str(error):
            raise
        raise ConfigurationError(
            f"the Ray cluster {where} is of another version: {' '.join(str(error).split())}",
            hint="install the same Ray, on the same Python, here and on every machine of the cluster",
        ) from error
    except Exception as error:
        raise ConfigurationError(
            f"the Ray cluster {where} cannot be used: {type(error).__name__}: {_first_line(error)}",
            hint=f"is it running, and is RAY_AUTH_TOKEN the same as there? {_START}",
        ) from error


def _reach(head: str) -> None:
    """Raise OSError where nothing listens: Ray would try again for minutes."""
    host, _, port = head.rpartition(":")
    if port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_REACH_TIMEOUT).close()


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


class Cluster:
    """The placement groups of this process, and who is in which place of them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._groups: dict[str, Group] = {}
        #: Node -> an actor that waits there for a trunk.
        self._spares: dict[str, Any] = {}

    def take(self, model_id: str, place: Mapping[str, Any]) -> tuple[Group, int]:
        """Return a group with a free place, and the number of that place.

        Raises:
            ConfigurationError: The group was made for others.
        """
        from ray.util import placement_group

        name = place["group"] or f"{model_id} {uuid.uuid4().hex[:8]}"
        bundle, size, strategy = place["bundle"], place["group_size"], place["group_strategy"]
        with self._lock:
            group = self._groups.get(name)
            if group is None:
                group = Group(name, placement_group([bundle] * size, strategy, name=name), bundle, size, strategy)
                self._groups[name] = group
            if (group.bundle, group.size, group.strategy) != (bundle, size, strategy):
                raise ConfigurationError(
                    f"group {name!r} was reserved with {group.size} places of {amounts(group.bundle)}, "
                    f"{group.strategy}; {model_id!r} asks for {size} of {amounts(bundle)}, {strategy}",
                    hint="give all trunks of a group the same resources, memory_mb too, group_size and group_strategy",
                )
            free = [index for index in range(size) if index not in group.taken]
            if not free:
                raise ConfigurationError(
                    f"all {size} places of group {name!r} are taken, by {', '.join(sorted(group.taken.values()))}",
                    hint="give the group as many places as it has trunks: group_size",
                )
            group.taken[free[0]] = model_id
            return group, free[0]

    def give_back(self, group: Group, index: int) -> None:
        """Free a place, and what Ray has reserved for the group if it was the last one."""
        from ray.util import remove_placement_group

        with self._lock:
            del group.taken[index]
            if not group.taken:
                del self._groups[group.name]
                remove_placement_group(group.handle)

    def spare(self, node_id: str) -> Any:
        """Return an actor on a machine that has imported what a load needs, and is free now; None if there is none."""
        with self._lock:
            return self._spares.pop(node_id, None)

    def prepare(self, model_type: str) -> None:
        """Start a spare actor on each machine that has none: the next load there then imports nothing."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
        with self._lock:
            for node_id in set(nodes) - self._spares.keys():
                # It takes no resources: those of the model that it will run are in a placement group.
                spare = ray.remote(TrunkActor).options(
                    name=f"prepared {uuid.uuid4().hex[:8]}",
                    num_cpus=0,
                    max_restarts=0,
                    max_concurrency=_CONCURRENCY,
                    scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
                )
                self._spares[node_id] = spare.remote()
                self._spares[node_id].prepare.remote(model_type)

    def shortage(self, model_id: str, group: Group, wait: float) -> CapacityError:
        """Return the error for resources that did not become free: what there is, and who holds it."""
        import ray
        from ray.util import list_named_actors, placement_group_table

        nodes = [node for node in ray.nodes() if node["Alive"]]
        total, free = ray.cluster_resources(), ray.available_resources()
        names = list(group.bundle)
        there = "; ".join(
            f"{node['NodeManagerAddress']} has {amounts({name: node['Resources'].get(name, 0) for name in names})}"
            for node in nodes
        )
        left = amounts({name: free.get(name, 0) for name in names})
        holders = [
            f"{table['name']!r} ({' + '.join(amounts(bundle) for bundle in table['bundles'].values())})"
            for table in placement_group_table().values()
            if table["state"] == _PLACED
        ]
        own = [f"actor {actor['name']!r} of {actor['namespace']}" for actor in list_named_actors(all_namespaces=True)]
        held = ", ".join([*holders, *(name for name in own if not holders)]) or "tasks and actors without names"
        fits = all(
            any(node["Resources"].get(name, 0) >= amount for node in nodes) for name, amount in group.bundle.items()
        )
        used = f"; free are {left}, the rest is held by {held}" if fits and total != free else ""
        asked = f"{group.size} places of {amounts(group.bundle)}, {group.strategy}"
        return CapacityError(
            f"the cluster did not place {model_id!r} within {wait:g} s: it asks for "
            f"{amounts(group.bundle) if group.size == 1 else asked}, {there or 'and no machine is there'}{used}",
            hint="ask for less with num_cpus, num_gpus, memory_mb or resources of host_options, unload what holds "
            "them, or add a machine; ray status shows more",
        )


class Group:
    """A placement group: resources that Ray reserves at once, for one trunk in each place."""

    def __init__(self, name: str, handle: Any, bundle: Mapping[str, float], size: int, strategy: str) -> None:
        self.name, self.handle, self.bundle, self.size, self.strategy = name, handle, bundle, size, strategy
        #: Place -> the model in it.
        self.taken: dict[int, str] = {}

    def node_of(self, index: int) -> str | None:
        """Return the id of the node of a place; None until the group is placed."""
        import ray
        from ray.util import placement_group_table

        table = placement_group_table(self.handle)
        if table.get("state") != _PLACED:
            return None
        node_id: str = table["bundles_to_node_id"][index]
        # Ray may notice later for the group than for the actor that a node has died.
        return node_id if any(node["NodeID"] == node_id and node["Alive"] for node in ray.nodes()) else None


class Placement:
    """One actor, from the wait for resources to its end."""

    def __init__(self, cluster: Cluster, number: int, place: Mapping[str, Any], out: Messages) -> None:
        self._cluster, self._number, self._place, self._out = cluster, number, place, out
        self._model_id: str = place["model_id"]
        self._actor: Any = None
        self._ends = threading.Event()
        self._lock = threading.Lock()
        self._folder: Path | None = None

    def run(self) -> None:
        """Place and load the trunk, and wait for its end; runs in a thread."""
        ending = ""
        try:
            group, index = self._cluster.take(self._model_id, self._place)
            try:
                ending = self._live(group, index)
            finally:
                self._kill()
                self._cluster.give_back(group, index)
        except Exception as error:  # noqa: BLE001  # raised where the load was asked for
            self._send({"error": described(error)})
        finally:
            if self._folder is not None:
                shutil.rmtree(self._folder, ignore_errors=True)
            self._send({"ended": ending})

    def end(self) -> None:
        """End the actor; run() then tells of it."""
        self._ends.set()
        self._kill()

    def measure(self) -> None:
        """Tell how much memory the actor has for itself."""
        import ray

        value = 0
        if self._actor is not None:
            with contextlib.suppress(ray.exceptions.RayError):
                value = ray.get(self._actor.memory.remote(), timeout=_MEMORY_TIMEOUT)
        self._send({"memory": value})

    def _live(self, group: Group, index: int) -> str:
        import ray

        node_id = self._wait_for_place(group, index)
        if node_id is None:
            return "was ended before it was placed"
        node: Mapping[str, Any] = next((node for node in ray.nodes() if node["NodeID"] == node_id), {})
        host = node.get("NodeManagerAddress", "a machine that is gone")
        is_here = node_id == ray.get_runtime_context().get_node_id()
        self._start(group, index, node_id)
        # It ends with the actor, with an error that tells how.
        watch = self._actor.watch.remote()
        try:
            about = ray.get(self._actor.about.remote())
            _refuse_other_versions(about["versions"], host)
            network = None if is_here else {"host": host, "token": self._place["token"]}
            answer = self._follow_load(self._actor.load.remote({**self._place["request"], "network": network}))
        except ray.exceptions.RayError as error:
            if self._ends.is_set():
                return "was ended on request"
            raise _start_error(self._model_id, host, error) from error
        if "error" in answer:
            message = f"{answer['error']['message']} (on the machine {host} of the cluster)"
            self._send({"error": {**answer["error"], "message": message}})
            return "has failed to load"
        ready = answer["ready"]
        if "path" in ready:
            self._folder = Path(ready["path"]).parent
        self._send({"ready": {**ready, "pid": about["pid"] if is_here else None, "machine": host}})
        process = _watched(about["pid"]) if is_here else -1
        if self._place["prepared"]:
            self._cluster.prepare(self._place["request"]["load"]["model_type"])
        ending = self._outlive(watch, host)
        if process >= 0:
            # Ray tells of the end before the memory is free.
            select.select([process], [], [], _EXIT_TIMEOUT)
            os.close(process)
        return ending

    def _wait_for_place(self, group: Group, index: int) -> str | None:
        deadline, pause = time.monotonic() + self._place["wait"], _LOOK_FIRST
        self._send({"progress": ["placing", None, 0, 0, ""]})
        while not self._ends.is_set():
            if (node_id := group.node_of(index)) is not None:
                return node_id
            if time.monotonic() > deadline:
                raise self._cluster.shortage(self._model_id, group, self._place["wait"])
            self._ends.wait(pause)
            pause = min(2 * pause, _LOOK_EVERY)
        return None

    def _start(self, group: Group, index: int, node_id: str) -> None:
        import ray

        # Ray chooses the devices that an actor sees when it starts it: one with a GPU cannot wait for its model.
        spare = None if group.bundle.get("GPU") else self._cluster.spare(node_id)
        if spare is not None:
            # A spare that has died meanwhile is of no use, and no failure either.
            with contextlib.suppress(ray.exceptions.RayError):
                ray.get(spare.about.remote())
                with self._lock:
                    self._actor = spare
        if self._actor is None:
            self._start_fresh(group, index)
        if self._ends.is_set():
            self._kill()

    def _start_fresh(self, group: Group, index: int) -> None:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        own = dict(group.bundle)
        actor = ray.remote(TrunkActor).options(
            name=f"{self._model_id} {uuid.uuid4().hex[:8]}",
            num_cpus=own.pop("CPU", 0),
            num_gpus=own.pop("GPU", 0),
            memory=own.pop("memory", None),
            resources=own,
            # Whether and when it is started again is the manager's decision, as for any host.
            max_restarts=0,
            max_concurrency=_CONCURRENCY,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group.handle, index),
        )
        with self._lock:
            self._actor = actor.remote()

    def _follow_load(self, load: Any) -> dict[str, Any]:
        import ray

        while not ray.wait([load], timeout=_LOOK_EVERY)[0]:
            with contextlib.suppress(ray.exceptions.GetTimeoutError):
                self._send({"progress": ray.get(self._actor.progress.remote(), timeout=_MEMORY_TIMEOUT)})
        answer: dict[str, Any] = ray.get(load)
        return answer

    def _outlive(self, watch: Any, host: str) -> str:
        """Wait for the end of the actor, and tell how it ended."""
        import ray

        try:
            ray.get(watch)
        except ray.exceptions.RayError as error:
            if self._ends.is_set():
                return "was ended on request"
            return f"on the machine {host} {_ending_of(error)}"
        return "has ended"

    def _kill(self) -> None:
        import ray

        with self._lock:
            if self._actor is not None:
                ray.kill(self._actor)

    def _send(self, message: Mapping[str, Any]) -> None:
        self._out.send({"number": self._number, **message})


def _watched(pid: int) -> int:
    """Return a descriptor of a process on this machine that is readable once it has ended; -1 where there is none."""
    if not hasattr(os, "pidfd_open"):
        return -1
    try:
        return os.pidfd_open(pid)
    except OSError:  # it has ended already
        return -1


def amounts(bundle: Mapping[str, float]) -> str:
    """Write resources: ``2 CPU, 3.5 GB memory``."""
    return ", ".join(
        f"{human_bytes(int(amount)) if name == 'memory' else f'{amount:g}'} {name}" for name, amount in bundle.items()
    )


def _ending_of(error: Exception) -> str:
    import ray

    if isinstance(error, ray.exceptions.ActorUnavailableError):
        # Its machine may still run; the actor is killed when that is reached again.
        return "cannot be reached any more"
    text = " ".join(str(error).split())
    if "node has died" in text:
        return "has ended with that machine"
    _, _, detail = text.partition("The actor is dead because ")
    return f"has ended: {detail.partition('.')[0] or _first_line(error)}"


def _start_error(model_id: str, host: str, error: Exception) -> SplitLearnError:
    import ray

    text = str(error)
    if "No module named" in text or "failed to import" in text or "ModuleNotFoundError" in text:
        line = next((line for line in text.splitlines() if "No module named" in line), _first_line(error))
        return ConfigurationError(
            f"the machine {host} of the cluster cannot run {model_id!r}: {line.strip()}",
            hint="install splitlearn-ray and the plugin of the family there, in the Python that runs Ray: "
            "pip install splitlearn-ray",
        )
    if isinstance(error, ray.exceptions.RayActorError):
        return HostDiedError(
            f"the actor of {model_id!r} on the machine {host} {_ending_of(error)}",
            code="host_died",
            hint="the logs of that worker are in /tmp/ray/session_latest/logs of its machine",
        )
    return LoadFailedError(f"the actor of {model_id!r} on the machine {host} failed: {_first_line(error)}")


def _refuse_other_versions(there: Mapping[str, str], host: str) -> None:
    here = versions()
    different = [f"{name} {there[name]} there and {here[name]} here" for name in here if there[name] != here[name]]
    if different:
        raise ConfigurationError(
            f"the machine {host} of the cluster has other versions: {', '.join(different)}",
            hint="install the same versions on every machine",
        )
