"""A component in its own process: started, watched and ended from here, and used like a local component.

A load that hangs can be killed, a crash or a lack of memory ends only this model, and all of its memory is released.
A child never outlives its parent, however the parent ends.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import weakref
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from splitlearn_core import errors
from splitlearn_core.errors import (
    ConfigurationError,
    ConnectionLostError,
    HostDiedError,
    LoadCancelledError,
    LoadFailedError,
    RemoteError,
    SplitLearnError,
)
from splitlearn_core.hosts.carriers import Connection
from splitlearn_core.hosts.child import process_settings
from splitlearn_core.hosts.client import JOURNAL_BYTES, Host, Patience
from splitlearn_core.hosts.control import receive_message, send_message
from splitlearn_core.hosts.protocol import Frame, Kind
from splitlearn_core.hosts.remote import RemoteComponent
from splitlearn_core.hosts.sessions import SessionLimits
from splitlearn_core.hosts.shared_memory import Channel, pair
from splitlearn_core.hosts.supervisor import Supervised, Supervisor, living_supervisor
from splitlearn_core.types import Progress, ProgressCallback

log = logging.getLogger(__name__)

#: Seconds until the end of a child is known after its connections have broken.
_EXIT_TIMEOUT = 10.0
#: Seconds in which the kernel ends a killed process; after that, it hangs in a driver or on a disk.
_KILL_TIMEOUT = 30.0
_CAN_START = hasattr(socket, "AF_UNIX") and hasattr(os, "posix_spawn")


@dataclass(frozen=True, slots=True)
class ProcessLoad:
    """What a child loads: the arguments of ``load_split_model``, for one component."""

    model_name_or_path: str
    split_points: tuple[int, ...]
    component: str = "trunk"
    model_type: str | None = None
    device: str = "cpu"
    dtype: str = "auto"
    strategy: str = "auto"
    revision: str | None = None
    cache_dir: str | None = None
    token: str | bool | None = field(default=None, repr=False)
    local_files_only: bool = False
    attn_implementation: str | None = None
    strict: bool = False


@dataclass(frozen=True, slots=True)
class ProcessExit:
    """How a child ended."""

    #: The exit code, or the negative number of a signal; None if unknown.
    status: int | None
    #: Whether :meth:`ProcessHandle.kill` was called before.
    was_requested: bool = False
    #: Further details as text.
    detail: str = ""

    @property
    def signal(self) -> str | None:
        """The name of the signal that ended it."""
        if self.status is None or self.status >= 0:
            return None
        try:
            return signal.Signals(-self.status).name
        except ValueError:  # a real-time signal has no name
            return f"SIG{-self.status}"

    @property
    def may_be_out_of_memory(self) -> bool:
        """Whether it was killed from outside, as the kernel does when memory runs out."""
        return self.status == -signal.SIGKILL and not self.was_requested and not self.detail

    def __str__(self) -> str:
        if self.was_requested:
            return "was ended on request"
        if self.detail:
            return self.detail
        if self.may_be_out_of_memory:
            return "was killed by SIGKILL, perhaps because memory ran out"
        return f"was ended by signal {self.signal}" if self.signal else f"ended with exit code {self.status}"


@dataclass(frozen=True, slots=True)
class ProcessMemory:
    """The memory of a process in bytes."""

    #: All mapped pages; the same with each shared page divided by the number of its processes; and
    #: what would be freed if the process ended now.
    rss: int
    pss: int
    private: int


def start_process(
    load: ProcessLoad,
    *,
    limits: SessionLimits | None = None,
    threads: int | None = None,
    progress: ProgressCallback | None = None,
    wait: float = 0.0,
    max_tokens: int = 2048,
    journal_bytes: int = JOURNAL_BYTES,
    after: ProcessHandle | None = None,
) -> ProcessHandle:
    """Start to load a component in a new process; returns immediately.

    Args:
        load: The component to load.
        limits: The limits of its sessions.
        threads: The number of torch's threads; by default as in this process, so that results are bit-equal.
        progress: Called with each :class:`Progress`, in a thread of the handle. An exception in it ends the load.
        wait: Seconds for which a step waits for a successor of an ended child; 0 to fail immediately.
        max_tokens: Tokens of one sequence for which a session reserves memory.
        journal_bytes: Bytes of inputs that each session keeps here, for being rebuilt in a successor.
        after: The handle of an ended child: its component and sessions continue in the new child.

    Raises:
        ConfigurationError: This system does not support it, or the child of ``after`` still runs.
        SplitLearnError: No process could be started.
    """
    if not _CAN_START:
        raise ConfigurationError(
            f"a component cannot run in its own process on {sys.platform}", hint='use host="inline"'
        )
    if after is not None and not after.ended.done():
        raise ConfigurationError("the child of after= still runs", hint="end it: handle.kill()")
    address = after.address if after is not None else ProcessAddress(load, Patience(wait, journal_bytes), max_tokens)
    handle = ProcessHandle(load, address, progress, living_supervisor())
    handle.start(limits or SessionLimits(), threads)
    return handle


class ProcessHandle(Supervised):
    """A child process that loads a component and serves it. See :func:`start_process`.

    Any thread may use it.
    """

    def __init__(
        self, load: ProcessLoad, address: ProcessAddress, progress: ProgressCallback | None, supervisor: Supervisor
    ) -> None:
        self.load = load
        self.address = address
        #: The component once it is loaded, or the error.
        self.ready: Future[RemoteComponent] = Future()
        #: How the child ended, once everything of it is cleaned up here.
        self.ended: Future[ProcessExit] = Future()
        for future in (self.ready, self.ended):
            # Futures only report here: cancelling them must not end the child; kill() does.
            future.set_running_or_notify_cancel()
        #: The process id, and whether it was forked from the zygote or is a fresh interpreter; set once it runs.
        self.pid: int | None = None
        self.start_method = ""
        self._progress = progress
        self._lock = threading.Lock()
        self._pidfd = -1
        #: How the process ended, as soon as that is known.
        self._gone: Future[ProcessExit] = Future()
        self._was_requested = False
        self._supervisor = supervisor
        self._control, self._far = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._follower = threading.Thread(target=self._follow, name="follow a child process", daemon=True)
        _handles.add(self)

    def start(self, limits: SessionLimits, threads: int | None) -> None:
        """Start it; called once."""
        try:
            request = {"process": process_settings(threads), "load": asdict(self.load), "limits": asdict(limits)}
            with self._far:
                self._supervisor.start_child(self, self._far)
        except BaseException:
            self._control.close()
            raise
        # In a thread: a large environment exceeds the socket's buffer, so that the child has to read meanwhile.
        threading.Thread(target=self._request, args=(request,), name="ask for a load", daemon=True).start()
        self._follower.start()

    @property
    def component(self) -> RemoteComponent:
        """The component; waits for the load, and raises its error if it fails."""
        return self.ready.result()

    @property
    def exit(self) -> ProcessExit | None:
        """How the child ended; None while it runs."""
        return self._gone.result() if self._gone.done() else None

    def memory(self) -> ProcessMemory | None:
        """Return the child's current memory; None if it does not run."""
        pid = self.pid
        if pid is None or self._gone.done():
            return None
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
        except OSError:
            return None
        values = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
        return ProcessMemory(values["Rss"], values["Pss"], values["Private_Clean"] + values["Private_Dirty"])

    def kill(self, grace: float = 5.0) -> ProcessExit:
        """End the child, and all processes that it has started.

        Args:
            grace: Seconds in which it may end by itself before it is killed.

        Raises:
            HostDiedError: The kernel does not end it.
        """
        self._was_requested = True
        with contextlib.suppress(OSError):
            # The child ends when it sees that this connection is closed.
            self._control.shutdown(socket.SHUT_WR)
        ending = self._ending(grace)
        if ending is None:
            self._kill_now()
            ending = self._ending(_KILL_TIMEOUT)
        if ending is None:
            raise HostDiedError(
                f"the process of {self.address.url} does not end although it was killed",
                code="host_died",
                hint=f"process {self.pid} may hang in a driver or on a disk",
            )
        if threading.current_thread() is not self._follower:
            with contextlib.suppress(TimeoutError):  # a progress callback that does not return
                self.ended.result(_EXIT_TIMEOUT)
        return ending

    def connect(self, far: socket.socket) -> None:
        """Send the child the other end of a connection.

        Raises:
            OSError: The child has ended.
        """
        with self._lock:
            send_message(self._control, {"connection": 1}, [far.fileno()])

    # --- called by the supervisor, in its thread --------------------------------------------------------

    def on_started(self, pid: int, method: str, pidfd: int) -> None:
        """Note that the process runs."""
        with self._lock:
            self.pid, self.start_method = pid, method
            if not self._gone.done():
                self._pidfd = pidfd
            elif pidfd >= 0:
                # kill() was called before it ran: end it now.
                os.close(pidfd)

    def on_ended(self, status: int | None, detail: str = "", *, was_requested: bool = False) -> None:
        """Note that the process has ended."""
        with self._lock:
            if self._gone.done():
                return
            self._was_requested |= was_requested
            ending = ProcessExit(status, self._was_requested, detail)
            self._gone.set_result(ending)
        if not self._was_requested:
            log.warning("The process of %s %s", self.address.url, ending)
        with contextlib.suppress(OSError):
            # This wakes the follower, if it is waiting for a message.
            self._control.shutdown(socket.SHUT_RDWR)

    @property
    def pidfd(self) -> int:
        """A descriptor of the process; -1 where there is none."""
        return self._pidfd

    def after_fork(self) -> None:
        """Close, in a forked copy of this process, what belongs to the original."""
        for end in (self._control, self._far):
            end.close()
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1

    # --- threads of this handle -------------------------------------------------------------------------

    def _request(self, request: Mapping[str, Any]) -> None:
        # The follower notices if the child has ended.
        with contextlib.suppress(OSError):
            send_message(self._control, dict(request))

    def _follow(self) -> None:
        """Wait for the end of the load, and then for the end of the child."""
        try:
            self._follow_load()
            component = self.address.adopt(self)
        except BaseException as error:  # noqa: BLE001  # raised when the component is requested
            self.kill()
            self._finish()
            self.ready.set_exception(error)
        else:
            self.ready.set_result(component)
            self._finish()

    def _ending(self, timeout: float) -> ProcessExit | None:
        try:
            return self._gone.result(timeout)
        except TimeoutError:
            return None

    def _finish(self) -> None:
        ending = self._gone.result()
        with self._lock:
            self._control.close()
            if self._pidfd >= 0:
                os.close(self._pidfd)
                self._pidfd = -1
        self.address.child_ended(self, ending)
        self.ended.set_result(ending)

    def _follow_load(self) -> None:
        while (message := self._next()) is not None:
            if "progress" in message:
                if self._progress is not None:
                    self._progress(Progress(*message["progress"]))
            elif "error" in message:
                raise _error_of(self.load, message["error"])
            else:
                self._supervisor.import_later(message["ready"]["modules"])
                return
        ending = self._gone.result()
        if self._was_requested:
            raise LoadCancelledError(f"the load of {self.address.url} was cancelled: its process {ending}")
        raise HostDiedError(
            f"the process that loaded {self.address.url} {ending}", code="host_died", hint=_hint(ending)
        )

    def _next(self) -> dict[str, Any] | None:
        try:
            received = receive_message(self._control)
        except OSError:
            return None
        return None if received is None else received[0]

    def _kill_now(self) -> None:
        with self._lock:
            if self._pidfd >= 0:
                # Not by process id: it may have ended, and the id may have been reused.
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
                return
        if self.pid is None:
            # Not started yet: it will end as soon as it is.
            self.on_ended(None, "was never started")
        else:
            self._supervisor.kill_child(self)


class ProcessAddress:
    """The address of a component: its child process, and after the end of that, the successor."""

    def __init__(self, load: ProcessLoad, patience: Patience, max_tokens: int) -> None:
        self.url = f"process:{load.model_name_or_path}/{load.component}"
        self._patience = patience
        self._max_tokens = max_tokens
        self._waits = patience.wait > 0
        self._child: ProcessHandle | None = None
        self._exit: ProcessExit | None = None
        self._component: RemoteComponent | None = None
        self._process = os.getpid()

    def check(self) -> None:
        """Do nothing: there is no user input to check."""

    def open(self) -> ProcessConnection:
        """Connect to the child.

        Raises:
            HostDiedError: The child has ended.
            ConnectionLostError: The child has ended, and may get a successor.
        """
        if self._process != os.getpid():
            raise RemoteError(
                f"{self.url} belongs to the process that this one was forked from",
                code="forked",
                hint="start a process for the component after the fork",
            )
        child = self._child
        if child is None:
            raise self._away()
        near, far = pair(self._max_payload())
        with far:
            try:
                child.connect(far)
            except OSError as error:
                near.close()
                raise self.lost(child) from error
        return ProcessConnection(near, self, child)

    def adopt(self, child: ProcessHandle) -> RemoteComponent:
        """Send steps to this child from now on.

        Raises:
            RemoteError: It runs a different component than its predecessor.
        """
        self._child = child
        try:
            if self._component is None:
                self._component = RemoteComponent(Host(self, self._patience), self._max_tokens)
            else:
                self._component.host.request(Frame(Kind.PING))
        except BaseException:
            self._child = None
            raise
        return self._component

    def child_ended(self, child: ProcessHandle, ending: ProcessExit) -> None:
        """Note that a child has ended; its connections are useless now."""
        if self._child is child or self._child is None:
            self._child, self._exit = None, ending
            if self._component is not None:
                self._component.host.drop_connections()

    def give_up(self) -> None:
        """Let steps fail immediately from now on: there will be no successor."""
        self._waits = False

    def lost(self, child: ProcessHandle) -> RemoteError:
        """Return the error for a broken connection to a child."""
        try:
            child.ended.result(_EXIT_TIMEOUT)
        except TimeoutError:
            return ConnectionLostError(f"a connection to {self.url} broke", code="connection")
        return self._away()

    def _away(self) -> RemoteError:
        if self._exit is None or self._child is not None:
            return ConnectionLostError(f"{self.url} is being restarted", code="connection")
        kind = ConnectionLostError if self._waits else HostDiedError
        return kind(f"the process of {self.url} {self._exit}", code="host_died", hint=_hint(self._exit))

    def _max_payload(self) -> int:
        return 2**32


class ProcessConnection(Connection):
    """A connection to a child."""

    def __init__(self, channel: Channel, address: ProcessAddress, child: ProcessHandle) -> None:
        self._channel, self._address, self._child = channel, address, child

    def send(self, request: Frame) -> None:
        """Send a request; raises as :meth:`ProcessAddress.open`."""
        try:
            self._channel.send(request)
        except OSError as error:
            raise self._address.lost(self._child) from error

    def receive(self) -> Frame:
        """Return its reply; raises as :meth:`ProcessAddress.open`."""
        try:
            reply = self._channel.receive()
        except OSError as error:
            raise self._address.lost(self._child) from error
        if reply is None:
            raise self._address.lost(self._child)
        return reply

    def close(self) -> None:
        """End the connection."""
        self._channel.close()


def _hint(ending: ProcessExit) -> str:
    if ending.was_requested:
        return ""
    if ending.may_be_out_of_memory:
        return "free memory, or load fewer layers; the kernel's log shows which process it killed (dmesg)"
    return "what the process wrote to stderr may say more; start_process(load, after=handle) goes on in another one"


def _error_of(load: ProcessLoad, described: Mapping[str, Any]) -> SplitLearnError:
    """Return the error that a child has described."""
    kind = getattr(errors, described["type"], None) if described["type"] else None
    if isinstance(kind, type) and issubclass(kind, SplitLearnError):
        return kind(described["message"], hint=described["hint"])
    return LoadFailedError(
        f"loading {load.component} of {load.model_name_or_path} in its own process failed: {described['message']}"
    )


_handles: weakref.WeakSet[ProcessHandle] = weakref.WeakSet()


def _after_fork() -> None:
    for handle in list(_handles):
        handle.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
