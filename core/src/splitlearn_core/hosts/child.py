"""The child process: it loads a component, and serves it on the connections that its parent opens."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import logging
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from splitlearn_core.errors import SplitLearnError
from splitlearn_core.hosts.control import close_all, receive_message, send_message
from splitlearn_core.hosts.shared_memory import Channel
from splitlearn_core.plugins.registry import reset_registry
from splitlearn_core.types import Progress

if TYPE_CHECKING:
    from splitlearn_core.hosts.relay import ComponentServer

log = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1
#: Of 1,000: when memory runs out, the kernel kills a child rather than a process that can start another child.
_OOM_SCORE = 500
#: Packages whose modules a zygote may import for later children. No plugins: their imports may do anything.
_LIBRARIES = ("torch", "transformers", "safetensors", "huggingface_hub", "tokenizers", "numpy", "splitlearn_core")


def run_child(control: str, parent: str) -> None:
    """Run as a child in a fresh interpreter; ``control`` is a file descriptor, ``parent`` a process id."""
    be_child(socket.socket(fileno=int(control)), int(parent), is_forked=False)


def be_child(control: socket.socket, parent: int, *, is_forked: bool) -> NoReturn:
    """Serve a component until the other end of ``control`` is closed; ends the process.

    Args:
        control: The load request and connections arrive on it; progress and errors are sent back.
        parent: The process that started this one.
        is_forked: Whether the libraries have been imported.
    """
    code = 1
    try:
        _separate(parent)
        code = _serve(control, is_forked=is_forked)
    except (BrokenPipeError, ConnectionResetError):
        # The parent has ended, or no longer wants the component.
        code = 0
    except BaseException:  # noqa: BLE001  # the end of the process, whatever it was
        traceback.print_exc()
    # Run neither destructors nor atexit handlers: a fork has inherited those of its zygote.
    os._exit(code)


def die_with_parent(parent: int, number: int) -> None:
    """Let the kernel send this process a signal when its parent ends; does nothing on systems other than Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
        if os.getppid() != parent:
            os._exit(0)


def _separate(parent: int) -> None:
    """Start a new process group, and end with the parent."""
    with contextlib.suppress(PermissionError):  # it already leads a group
        os.setsid()
    die_with_parent(parent, signal.SIGKILL)
    # A container may not allow it.
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(str(_OOM_SCORE))
    # The stdout is the parent's, where its commands print their results.
    os.dup2(2, 1)


def _serve(control: socket.socket, *, is_forked: bool) -> int:
    received = receive_message(control)
    if received is None:
        return 0
    request, before = received[0], set(sys.modules)
    tables: list[ComponentServer] = []
    reader = threading.Thread(target=_read_control, args=(control, tables), name="read control messages", daemon=True)
    reader.start()
    try:
        _adopt(request["process"])
        tables.append(_load(control, request))
    except Exception as error:  # noqa: BLE001  # the parent raises it
        send_message(control, {"error": _described(error)})
        return 1
    names = sorted(name for name in set(sys.modules) - before if name.partition(".")[0] in _LIBRARIES)
    send_message(control, {"ready": {"modules": names if is_forked else []}})
    reader.join()
    return 0


def _adopt(process: Mapping[str, Any]) -> None:
    """Take over the parent's environment, working directory, module path, and numerical settings of torch."""
    os.environ.clear()
    os.environ.update(process["environment"])
    if process["folder"] is not None:
        os.chdir(process["folder"])
    if sys.path != process["path"]:
        sys.path[:] = process["path"]
        importlib.invalidate_caches()
        # A zygote has cached the metadata of packages on its own module path.
        reset_registry()
    import torch

    torch.set_num_threads(process["threads"])
    torch.set_float32_matmul_precision(process["matmul_precision"])
    torch.set_deterministic_debug_mode(process["deterministic"])


def process_settings(threads: int | None) -> dict[str, Any]:
    """Return the settings of this process that :func:`_adopt` takes over."""
    import torch

    try:
        folder = str(Path.cwd())
    except FileNotFoundError:  # it has been removed
        folder = None
    return {
        "environment": dict(os.environ),
        "folder": folder,
        "path": list(sys.path),
        "threads": threads or torch.get_num_threads(),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "deterministic": torch.get_deterministic_debug_mode(),
    }


def _load(control: socket.socket, request: Mapping[str, Any]) -> ComponentServer:
    from splitlearn_core.api import load_split_model
    from splitlearn_core.hosts.relay import ComponentServer
    from splitlearn_core.hosts.sessions import SessionLimits

    def report(step: Progress) -> None:
        values = [step.stage, step.component, step.bytes_done, step.bytes_total, step.file]
        send_message(control, {"progress": values})

    arguments = dict(request["load"])
    component, points = arguments.pop("component"), tuple(arguments.pop("split_points"))
    parts = load_split_model(split_points=points, parts=[component], progress=report, **arguments)
    return ComponentServer(next(part for part in parts if part is not None), SessionLimits(**request["limits"]))


def _described(error: Exception) -> dict[str, str]:
    if isinstance(error, SplitLearnError):
        # The parent may not know a plugin's own class.
        known = next(cls for cls in type(error).__mro__ if cls.__module__ == SplitLearnError.__module__)
        return {"type": known.__name__, "message": error.message, "hint": error.hint}
    text = "".join(traceback.format_exception(error))
    log.error("A load in its own process failed:\n%s", text)
    return {"type": "", "message": f"{type(error).__name__}: {error}", "hint": ""}


def _read_control(control: socket.socket, tables: list[ComponentServer]) -> None:
    """Serve each connection that the parent sends, and end this process when the parent ends."""
    try:
        while (received := receive_message(control)) is not None:
            _, descriptors = received
            if not tables or len(descriptors) != 1:
                close_all(descriptors)
                continue
            channel = Channel(socket.socket(fileno=descriptors[0]), max_payload=tables[0].limits.max_payload)
            threading.Thread(target=tables[0].serve, args=(channel,), name="serve a connection", daemon=True).start()
    except OSError as error:
        log.debug("The control connection broke: %s", error)
    finally:
        # A load or a step may be running, but its result will not be read.
        os._exit(0)
