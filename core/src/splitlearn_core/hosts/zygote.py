"""A process that has imported the libraries of components, and forks a child for each component in milliseconds.

It has one thread and never computes: libgomp hangs in a child whose parent ran a parallel region. It hides
CUDA from itself, because a process that has initialised CUDA cannot fork, and it imports no plugins, which may
do anything when imported. Where forking is not safe, it starts a fresh interpreter instead.

As the parent of all children, it kills their process groups when they end, and all of them when its own parent ends.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import selectors
import signal
import socket
import sys
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from splitlearn_core.child_process import command_for
from splitlearn_core.hosts.child import be_child, die_with_parent, run_child
from splitlearn_core.hosts.control import close_all, receive_message, send_message
from splitlearn_core.plugins.registry import registry

#: The imports that every component needs for being loaded and served.
_MODULES = (
    "torch",
    "transformers",
    "transformers.modeling_utils",
    "transformers.generation",
    "safetensors.torch",
    "huggingface_hub.file_download",
    "huggingface_hub.hf_api",
    "splitlearn_core.api",
    "splitlearn_core.build.assemble",
    "splitlearn_core.build.construction",
    "splitlearn_core.build.pruning",
    "splitlearn_core.build.torch_state",
    "splitlearn_core.hosts.sessions",
)
#: Environment variables of a zygote, in addition to its parent's.
ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
#: A thread of jemalloc, which restarts it in a child.
_HARMLESS_THREAD = "jemalloc_bg_thd"
#: Mapped into every process that has initialised CUDA.
_CUDA_DRIVER = "libcuda.so"


def run_zygote(control: str, parent: str) -> None:
    """Start children until the other end of ``control`` is closed.

    Args:
        control: A file descriptor.
        parent: The id of the process that started this one.
    """
    _Zygote(socket.socket(fileno=int(control)), int(parent)).run()


class _Zygote:
    def __init__(self, control: socket.socket, parent: int) -> None:
        self._control = control
        #: The process id of each child -> the parent's number for it.
        self._children: dict[int, int] = {}
        self._can_import = sys.platform == "linux" and hasattr(os, "fork")
        signal.signal(signal.SIGTERM, lambda *_: self._end())
        # Ctrl-C in the terminal is for the parent.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        die_with_parent(parent, signal.SIGTERM)
        os.dup2(2, 1)
        self._wake_up, self._woken = socket.socketpair()
        for end in (self._wake_up, self._woken):
            end.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._woken.fileno(), warn_on_full_buffer=False)

    def run(self) -> NoReturn:
        self._import(_MODULES)
        # Reads the metadata of installed packages once, for all children, without importing any of them.
        _ = registry().entries
        with selectors.DefaultSelector() as selector:
            selector.register(self._control, selectors.EVENT_READ)
            selector.register(self._wake_up, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    if key.fileobj is self._control:
                        self._attend(selector)
                    else:
                        with contextlib.suppress(BlockingIOError):
                            self._wake_up.recv(4096)
                        self._reap()

    def _import(self, modules: Iterable[str]) -> None:
        for name in modules if self._can_import else ():
            try:
                importlib.import_module(name)
            except Exception:  # noqa: BLE001  # a child will import it again, and report the error
                traceback.print_exc()
        gc.collect()
        gc.freeze()

    def _attend(self, selector: selectors.BaseSelector) -> None:
        try:
            received = receive_message(self._control)
        except OSError:
            received = None
        if received is None:
            self._end()
        message, descriptors = received
        if "import" in message:
            self._import(message["import"])
        if "kill" in message:
            self._kill(message["kill"])
        if "start" in message:
            try:
                self._start(message["start"], descriptors[0], selector)
            finally:
                close_all(descriptors)

    def _start(self, number: int, descriptor: int, selector: selectors.BaseSelector) -> None:
        method = "fork" if self._can_import and _may_fork() else "spawn"
        try:
            pid = self._fork(descriptor, selector) if method == "fork" else _spawn(descriptor)
        except OSError as error:
            self._send({"ended": number, "status": None, "reason": os.strerror(error.errno or 0)})
            return
        self._children[pid] = number
        watch = [os.pidfd_open(pid)] if hasattr(os, "pidfd_open") else []
        self._send({"started": number, "pid": pid, "method": method}, watch)
        close_all(watch)

    def _fork(self, descriptor: int, selector: selectors.BaseSelector) -> int:
        zygote = os.getpid()
        pid = os.fork()
        if pid == 0:
            self._become_child(descriptor, zygote, selector)
        return pid

    def _become_child(self, descriptor: int, zygote: int, selector: selectors.BaseSelector) -> NoReturn:
        signal.set_wakeup_fd(-1)
        for name in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
            signal.signal(name, signal.SIG_DFL)
        selector.close()
        for end in (self._control, self._wake_up, self._woken):
            end.close()
        be_child(socket.socket(fileno=descriptor), zygote, is_forked=True)

    def _reap(self) -> None:
        """Report the children that have ended."""
        for pid, number in list(self._children.items()):
            # Its id cannot be reused, by a process or a group, before it is waited for.
            if hasattr(os, "waitid") and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                _kill_group(pid)
            ended, status = os.waitpid(pid, os.WNOHANG)
            if not ended:
                continue
            if not hasattr(os, "waitid"):  # macOS before Python 3.13
                _kill_group(pid)
            del self._children[pid]
            self._send({"ended": number, "status": os.waitstatus_to_exitcode(status)})

    def _kill(self, number: int) -> None:
        for pid, other in self._children.items():
            if other == number:
                os.kill(pid, signal.SIGKILL)

    def _send(self, message: dict[str, Any], descriptors: Sequence[int] = ()) -> None:
        try:
            send_message(self._control, message, descriptors)
        except OSError:
            self._end()

    def _end(self) -> NoReturn:
        for pid in self._children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            _kill_group(pid)
        os._exit(0)


def _kill_group(pid: int) -> None:
    """Kill what a child has started; a child that is still starting has no group yet, and has started nothing."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _may_fork() -> bool:
    """Whether this process has one thread, and has not initialised CUDA."""
    threads = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    has_one = sum(name != _HARMLESS_THREAD for name in threads) == 1
    return has_one and _CUDA_DRIVER not in Path("/proc/self/maps").read_text()


def _spawn(descriptor: int) -> int:
    os.set_inheritable(descriptor, True)
    command = command_for(run_child, str(descriptor), str(os.getpid()))
    return os.posix_spawn(command[0], command, os.environ)
