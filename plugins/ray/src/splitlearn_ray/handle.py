"""A load in an actor, as the manager sees it: the actor that it leads to, and the way to the trunk there."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from typing import Any

from splitlearn_core import (
    ConnectionLostError,
    HostDiedError,
    LoadFailedError,
    ModelConfig,
    Progress,
    RemoteComponent,
    RemoteError,
    SplitLearnError,
    errors,
)
from splitlearn_core.extension import (
    Channel,
    Endpoint,
    Frame,
    Host,
    Kind,
    LoadedModel,
    ModelHost,
    Patience,
    default_torch_threads,
    load_arguments,
)
from splitlearn_ray.cluster import Cluster, cluster_of
from splitlearn_ray.options import RayOptions

#: It raises to stop the load.
Report = Callable[[Progress], None]

log = logging.getLogger(__name__)

#: Seconds between two checks whether a load should stop.
_LOOK_EVERY = 0.05
#: Seconds until Ray tells of the end of an actor whose connection has broken, and until a killed one has ended.
_EXIT_TIMEOUT, _KILL_TIMEOUT = 10.0, 60.0
_MEMORY_TIMEOUT = 6.0
_MAX_TOKENS = 2048
_MAX_PAYLOAD = 2**32
#: Variables that choose plugins: the same are used where the trunk is.
_PASSED_ON = ("SPLITLEARN_PLUGINS", "SPLITLEARN_DISABLE_PLUGINS")


def load_in_actor(config: ModelConfig, plan: Any, report: Report, threads: int | None) -> LoadedModel:
    """Load a trunk in an actor; see ``ComponentHost.load``."""
    options = RayOptions.of(config.host_options)
    # Starting it takes seconds, as importing torch does here.
    cluster = cluster_of(options.address, options.namespace)
    place = {
        "model_id": config.model_id,
        "bundle": options.bundle(plan.elsewhere),
        "group": options.group,
        "group_size": options.group_size,
        "group_strategy": options.group_strategy,
        "prepared": options.prepared,
        "wait": options.wait,
        "token": secrets.token_urlsafe(32),
        "request": _request(config, threads or default_torch_threads()),
    }
    after = plan.after if isinstance(plan.after, Actor) else None
    try:
        actor = _loaded(cluster, config, place, report, after)
    except RemoteError as error:
        if error.code != "other_model" or after is None:
            raise
        # The weights have been replaced meanwhile.
        log.warning("The sessions of model %r end: %s", config.model_id, error.message)
        actor = _loaded(cluster, config, place, report, None)
    return LoadedModel(actor.address.component, plan.location, plan.dtype, "cpu", actor)


def _request(config: ModelConfig, threads: int) -> dict[str, Any]:
    import torch

    return {
        "load": load_arguments(config),
        "threads": threads,
        "matmul_precision": torch.get_float32_matmul_precision(),
        "deterministic": torch.get_deterministic_debug_mode(),
        "environment": {name: os.environ[name] for name in _PASSED_ON if name in os.environ},
    }


def _loaded(
    cluster: Cluster, config: ModelConfig, place: Mapping[str, Any], report: Report, after: Actor | None
) -> Actor:
    actor = Actor(config.model_id, after.address if after is not None else Address(config.model_id))
    report(actor.progress)
    actor.start(cluster, place)
    try:
        while not wait((actor.ready,), timeout=_LOOK_EVERY).done:
            report(actor.progress)
        actor.listens = actor.ready.result()
        actor.address.adopt(actor, place["token"])
        report(actor.progress)
    except BaseException:
        actor.end()
        raise
    return actor


class Actor(ModelHost):
    """The actor of one model, with the manager's interface of a host."""

    def __init__(self, model_id: str, address: Address) -> None:
        self.address = address
        self.progress = Progress("importing")
        #: Where it listens, once it is loaded.
        self.ready: Future[dict[str, Any]] = Future()
        self.listens: dict[str, Any] = {}
        self._model_id = model_id
        self._ended: Future[str] = Future()
        for future in (self.ready, self._ended):
            future.set_running_or_notify_cancel()
        self._measured: Future[int] | None = None
        self._measuring = threading.Lock()
        self._cluster: Cluster | None = None
        self._number = 0

    def start(self, cluster: Cluster, place: Mapping[str, Any]) -> None:
        """Ask the cluster for it; called once."""
        self._cluster = cluster
        self._number = cluster.place(place, self)

    def on_message(self, message: Mapping[str, Any]) -> None:
        """Note what the cluster tells; called in its thread."""
        if "progress" in message:
            self.progress = Progress(*message["progress"])
        elif "ready" in message:
            self.ready.set_result(message["ready"])
        elif "memory" in message:
            if self._measured is not None and not self._measured.done():
                self._measured.set_result(message["memory"])
        elif "error" in message:
            self.ready.set_exception(_error_of(self._model_id, message["error"]))
        elif not self._ended.done():
            self._ended.set_result(message["ended"])
            self.address.actor_ended(self)
            if not self.ready.done():
                self.ready.set_exception(self.death())
            if self._measured is not None and not self._measured.done():
                self._measured.set_result(0)

    @property
    def pid(self) -> int | None:
        pid: int | None = self.listens.get("pid")
        return pid

    @property
    def ended(self) -> Future[Any]:
        return self._ended

    @property
    def has_sessions(self) -> bool:
        """Whether caches of it are in use here."""
        return self.address.has_sessions

    def death(self) -> SplitLearnError:
        """Return how it ended."""
        return HostDiedError(
            f"the actor of model {self._model_id!r} {self._ended.result() if self._ended.done() else 'has ended'}",
            code="host_died",
            hint="ray status shows the machines that are there; what the actor wrote is in the logs of its machine",
        )

    def private_memory(self) -> int:
        """Return the bytes that would be freed on its machine if it ended now."""
        with self._measuring:
            if self._cluster is None or self._ended.done():
                return 0
            self._measured = Future()
            self._cluster.tell({"number": self._number, "memory": True})
            try:
                return self._measured.result(_MEMORY_TIMEOUT)
            except TimeoutError:
                return 0

    def end(self) -> None:
        """End it: there is nothing to clean up, since it only reads files.

        Raises:
            HostDiedError: The cluster does not say that it has ended.
        """
        if self._cluster is None or self._ended.done():
            return
        self._cluster.tell({"number": self._number, "end": True})
        if not self._cluster.is_connected:
            # Should the cluster answer later, it reads both messages, one after the other.
            self.on_message({"ended": "was ended before the cluster answered"})
        try:
            self._ended.result(_KILL_TIMEOUT)
        except TimeoutError:
            raise HostDiedError(
                f"the actor of model {self._model_id!r} does not end although it was killed",
                code="host_died",
                hint="its machine may be unreachable: ray status",
            ) from None

    def wait_for_end(self) -> bool:
        """Return whether it has ended, which a broken connection is the first sign of."""
        return bool(wait((self._ended,), timeout=_EXIT_TIMEOUT).done)


class Address:
    """The address of a trunk: its actor, and after the end of that, the successor."""

    def __init__(self, model_id: str) -> None:
        self.url = f"ray:{model_id}"
        self._component: RemoteComponent | None = None
        self._actor: Actor | None = None
        self._last: Actor | None = None
        self._token = ""

    @property
    def component(self) -> RemoteComponent:
        if self._component is None:
            raise self._away()
        return self._component

    @property
    def has_sessions(self) -> bool:
        return self._component is not None and bool(self._component.host.sessions)

    def check(self) -> None:
        """Do nothing: there is no user input to check."""

    def open(self) -> Connection:
        """Connect to the actor.

        Raises:
            HostDiedError: It has ended.
        """
        actor = self._actor
        if actor is None:
            raise self._away()
        listens = actor.listens
        try:
            if "path" in listens:
                return Connection(_LocalConnection(listens["path"]), self, actor)
            endpoint = Endpoint(listens["url"], self._token, max_payload=_MAX_PAYLOAD)
            return Connection(endpoint.open(), self, actor)
        except (OSError, ConnectionLostError) as error:
            raise self.lost(actor) from error

    def adopt(self, actor: Actor, token: str) -> None:
        """Send steps to this actor from now on.

        Raises:
            RemoteError: It runs a different component than its predecessor.
        """
        self._actor, self._token = actor, token
        try:
            if self._component is None:
                self._component = RemoteComponent(Host(self, Patience(wait=0)), _MAX_TOKENS)
            else:
                self._component.host.request(Frame(Kind.PING))
        except BaseException:
            self._actor = None
            raise

    def actor_ended(self, actor: Actor) -> None:
        """Note that an actor has ended; its connections are useless now."""
        if self._actor is actor or self._actor is None:
            self._actor, self._last = None, actor
            if self._component is not None:
                self._component.host.drop_connections()

    def lost(self, actor: Actor) -> RemoteError:
        """Return the error for a broken connection to an actor."""
        if actor.wait_for_end():
            return self._away()
        return ConnectionLostError(f"a connection to {self.url} broke", code="connection")

    def _away(self) -> RemoteError:
        if self._last is None or self._actor is not None:
            return ConnectionLostError(f"{self.url} is being restarted", code="connection")
        death = self._last.death()
        return HostDiedError(death.message, code="host_died", hint=death.hint)


class _LocalConnection:
    """A connection to an actor on this machine: payloads in shared memory."""

    def __init__(self, path: str) -> None:
        stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            stream.connect(path)
        except BaseException:
            stream.close()
            raise
        self._channel = Channel(stream, _MAX_PAYLOAD, makes_arena=True)

    def send(self, request: Frame) -> None:
        self._channel.send(request)

    def receive(self) -> Frame:
        reply = self._channel.receive()
        if reply is None:
            raise ConnectionResetError("the actor ended the connection")
        return reply

    def close(self) -> None:
        self._channel.close()


class Connection:
    """A connection to an actor, whose end is explained by that of the actor."""

    def __init__(self, inner: Any, address: Address, actor: Actor) -> None:
        self._inner, self._address, self._actor = inner, address, actor

    def send(self, request: Frame) -> None:
        """Send a request; raises as :meth:`Address.open`."""
        try:
            self._inner.send(request)
        except (OSError, ConnectionLostError) as error:
            raise self._address.lost(self._actor) from error

    def receive(self) -> Frame:
        """Return its reply; raises as :meth:`Address.open`."""
        try:
            reply: Frame = self._inner.receive()
        except (OSError, ConnectionLostError) as error:
            raise self._address.lost(self._actor) from error
        return reply

    def exchange(self, request: Frame) -> Frame:
        """Send a request and return its reply; raises as both."""
        self.send(request)
        return self.receive()

    def close(self) -> None:
        """End the connection."""
        self._inner.close()


def _error_of(model_id: str, described: Mapping[str, str]) -> SplitLearnError:
    """Return the error that the other process has described."""
    kind = getattr(errors, described["type"], None) if described["type"] else None
    if isinstance(kind, type) and issubclass(kind, SplitLearnError):
        return kind(described["message"], hint=described["hint"])
    return LoadFailedError(f"loading {model_id!r} on the cluster failed: {described['message']}")
