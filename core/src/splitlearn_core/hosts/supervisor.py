"""The parent's end of a zygote. A process has one; it is started with the first child, and restarted if it dies."""

from __future__ import annotations

import atexit
import contextlib
import itertools
import logging
import os
import select
import signal
import socket
import subprocess
import threading
from collections.abc import Iterable
from concurrent.futures import Future
from typing import Protocol

from splitlearn_core.child_process import command_for
from splitlearn_core.errors import CapacityError, ConnectionLostError, translate
from splitlearn_core.hosts.control import close_all, receive_message, send_message
from splitlearn_core.hosts.zygote import ENVIRONMENT, run_zygote
from splitlearn_core.quoting import reason

log = logging.getLogger(__name__)

#: Seconds for a child to end after its zygote, and for the zygote to end after this process closes it.
_END_TIMEOUT = 5.0


class Supervised(Protocol):
    """Receives the events of a child. The calls come from the supervisor's thread."""

    #: The process id, once it runs.
    pid: int | None

    @property
    def pidfd(self) -> int: ...

    def on_started(self, pid: int, method: str, pidfd: int) -> None: ...

    def on_ended(self, status: int | None, detail: str = "", *, was_requested: bool = False) -> None: ...


class Supervisor:
    """A zygote, and the children that it has started."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._children: dict[int, Supervised] = {}
        #: Modules that the zygote was asked to import.
        self._modules: set[str] = set()
        self._is_over = self._is_closing = False
        self.control, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.pid = 0
        started: Future[int] = Future()
        # The zygote dies with the thread that started it (PR_SET_PDEATHSIG), so it gets a thread of its own.
        self._thread = threading.Thread(target=self._run, args=(far, started), name="zygote", daemon=True)
        self._thread.start()
        with translate(lambda error: CapacityError(f"no process can be started: {reason(error)}"), OSError):
            self.pid = started.result()

    @property
    def is_over(self) -> bool:
        """Whether the zygote has ended."""
        return self._is_over

    def start_child(self, child: Supervised, control: socket.socket) -> None:
        """Start a child that gets one end of a connection.

        Raises:
            ConnectionLostError: The zygote has just ended.
        """
        number = next(self._numbers)
        with self._lock:
            if not self._is_over:
                self._children[number] = child
                with contextlib.suppress(OSError):  # the thread notices the end of the zygote, and informs the child
                    send_message(self.control, {"start": number}, [control.fileno()])
                return
        raise ConnectionLostError("the zygote process, which starts children, has ended", hint="try again")

    def kill_child(self, child: Supervised) -> None:
        """Kill a child for which there is no pidfd."""
        for number, other in list(self._children.items()):
            if other is child:
                self._tell({"kill": number})

    def import_later(self, modules: Iterable[str]) -> None:
        """Let the zygote import modules when it is idle, so that later children need not."""
        fresh = sorted(set(modules) - self._modules)
        if fresh:
            self._modules.update(fresh)
            self._tell({"import": fresh})

    def close(self) -> None:
        """End the zygote, and with it all children."""
        self._is_closing = True
        with contextlib.suppress(OSError):
            self.control.shutdown(socket.SHUT_RDWR)
        self._thread.join(2 * _END_TIMEOUT)

    def _tell(self, message: dict[str, object]) -> None:
        with self._lock, contextlib.suppress(OSError):
            send_message(self.control, message)

    def _run(self, far: socket.socket, started: Future[int]) -> None:
        command = command_for(run_zygote, str(far.fileno()), str(os.getpid()))
        try:
            process = subprocess.Popen(  # noqa: S603  # this interpreter
                command,
                env={**os.environ, **ENVIRONMENT},
                stdin=subprocess.DEVNULL,
                pass_fds=[far.fileno()],
                start_new_session=True,
            )
        except BaseException as error:  # noqa: BLE001  # raised in the thread that waits
            self._is_over = True
            self.control.close()
            started.set_exception(error)
            return
        finally:
            far.close()
        started.set_result(process.pid)
        with contextlib.suppress(OSError):
            self._read()
        with self._lock:
            self._is_over = True
            left, self._children = list(self._children.values()), {}
        # While it imports, it does not look at its end of the connection, for seconds.
        process.terminate()
        try:
            process.wait(_END_TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for child in left:
            _end_orphan(child, was_requested=self._is_closing)
        self.control.close()

    def _read(self) -> None:
        while (received := receive_message(self.control)) is not None:
            message, descriptors = received
            child = self._children.get(message["started"] if "started" in message else message["ended"])
            if child is None:
                close_all(descriptors)
            elif "started" in message:
                child.on_started(message["pid"], message["method"], descriptors[0] if descriptors else -1)
            else:
                del self._children[message["ended"]]
                detail = message.get("reason", "")
                child.on_ended(message["status"], f"could not be started: {detail}" if detail else "")


def _end_orphan(child: Supervised, *, was_requested: bool) -> None:
    """Clean up a child whose zygote has ended; the kernel ends both together."""
    if child.pid is not None:
        # Its process group first, while the id of the child cannot have been reused.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
    if child.pidfd >= 0:
        poll = select.poll()
        poll.register(child.pidfd, select.POLLIN)
        if not poll.poll(_END_TIMEOUT * 1000):
            signal.pidfd_send_signal(child.pidfd, signal.SIGKILL)
            poll.poll(_END_TIMEOUT * 1000)
    child.on_ended(None, "ended with its zygote process", was_requested=was_requested)


class _Current:
    """The supervisor of this process, if there is one."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.supervisor: Supervisor | None = None


_current = _Current()


def living_supervisor() -> Supervisor:
    """Return the supervisor of this process; starts a zygote where there is none."""
    with _current.lock:
        if _current.supervisor is None or _current.supervisor.is_over:
            _current.supervisor = Supervisor()
        return _current.supervisor


def prepare_processes(model_types: Iterable[str] = ()) -> None:
    """Start the zygote before the first child, with the imports of some model types.

    It imports torch and transformers in the background, which takes seconds; a component that is started later is
    then ready in the time of its load.
    """
    from transformers.models.auto.configuration_auto import model_type_to_module_name

    names = sorted({model_type_to_module_name(model_type) for model_type in model_types})
    living_supervisor().import_later(f"transformers.models.{name}.modeling_{name}" for name in names)


def end_processes() -> None:
    """End the zygote and all children of this process; a later start makes another zygote."""
    with _current.lock:
        supervisor, _current.supervisor = _current.supervisor, None
    if supervisor is not None:
        supervisor.close()


def _after_fork() -> None:
    """In a forked copy of this process, forget what belongs to the original."""
    if _current.supervisor is not None:
        _current.supervisor.control.close()
    # Another thread may have held the lock during the fork.
    _current.lock, _current.supervisor = threading.Lock(), None


atexit.register(end_processes)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
