"""The process behind :mod:`support.warm`: it has imported the libraries, and forks once for each command.

It has one thread, and never computes anything: a child may use OpenMP only if its parent never did.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import site
import socket
import sys
import sysconfig
import threading
import types
import warnings
import weakref
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

#: What a command that loads a model imports, but for the packages of this repository.
LIBRARIES = (
    "torch", "transformers", "numpy", "safetensors.torch", "huggingface_hub", "tokenizers",
    "click", "importlib_metadata", "packaging.requirements", "packaging.version", "pluggy", "psutil", "tqdm.auto",
    "accelerate", "pytest", "_pytest.pytester", "yaml", "uvicorn", "starlette.applications", "prometheus_client",
    "transformers.modeling_utils", "transformers.generation", "transformers.generation.utils",
    "transformers.generation.streamers", "transformers.models.auto", "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto", "transformers.tokenization_utils_tokenizers",
    "torch.utils.data", "transformers.trainer",
    *(
        f"transformers.models.{name}.modeling_{name}"
        for name in ("gpt2", "llama", "qwen2", "gemma", "gemma2", "gemma3", "mistral", "phi")
    ),
)  # fmt: skip
#: Modules that read the environment as they are imported, and whose users look there or have copied from there.
READERS = ("huggingface_hub.constants",)
USERS = ("huggingface_hub", "transformers", "accelerate", "datasets", "peft")


def serve(path: str) -> None:
    """Run commands until the standard input ends."""
    del sys.path[0]  # where this file lies
    gc.disable()  # nothing of what is imported is garbage
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in LIBRARIES:
            # Not each version of transformers has each module; what is missing is imported by who needs it.
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
    # Such a thread is no library's of ours and holds nothing across a fork: jemalloc starts it again in the child.
    names = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    others = [name for name in names[1:] if name != "jemalloc_bg_thd"]
    assert not others, f"a library started a thread as it was imported: {others}"
    # What libraries have left for the end of this process; each child would do it, and with torch's it takes as long as
    # the fork.
    for finalizer in list(weakref.finalize._registry):  # type: ignore[attr-defined]
        finalizer.atexit = False
    gc.enable()
    gc.collect()
    gc.freeze()
    selector = selectors.DefaultSelector()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(64)
        selector.register(listener, selectors.EVENT_READ)
        selector.register(0, selectors.EVENT_READ)
        imported = sorted({name.partition(".")[0] for name in sys.modules})
        sys.stdout.write(json.dumps({"imported": imported, "path": sys.path}) + "\n")
        sys.stdout.flush()
        #: The connection and the process of each command, by each other's descriptor.
        running: dict[int, tuple[socket.socket, int, int]] = {}
        while True:
            for key, _ in selector.select():
                if key.fd == 0:
                    for _, _, pid in running.values():
                        os.kill(pid, signal.SIGKILL)
                    os._exit(0)
                if key.fileobj is listener:
                    connection, _ = listener.accept()
                    request, streams = _received(connection)
                    pid = os.fork()
                    if pid == 0:
                        for other in (listener, connection, *(entry[0] for entry in running.values())):
                            other.close()
                        for watch in {entry[1] for entry in running.values()}:
                            os.close(watch)
                        selector.close()
                        _run(request, streams)
                    for fd in streams:
                        os.close(fd)
                    watch = os.pidfd_open(pid)
                    running[connection.fileno()] = running[watch] = (connection, watch, pid)
                    selector.register(connection, selectors.EVENT_READ)
                    selector.register(watch, selectors.EVENT_READ)
                elif key.fd in running:
                    _attend(selector, running, key.fd)


def _received(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    head, streams, _, _ = socket.recv_fds(connection, 4, 3)
    length, data = int.from_bytes(head, "big"), b""
    while len(data) < length:
        data += connection.recv(length - len(data))
    return json.loads(data), streams


def _attend(selector: Any, running: dict[int, tuple[socket.socket, int, int]], fd: int) -> None:
    """Pass a signal on, or the end of a command."""
    connection, watch, pid = running[fd]
    if fd != watch:
        numbers = connection.recv(16)
        for number in numbers or (signal.SIGKILL,):
            signal.pidfd_send_signal(watch, number)
        if not numbers:
            selector.unregister(connection)
        return
    _, status = os.waitpid(pid, 0)
    with contextlib.suppress(OSError):  # its client may be gone
        connection.sendall(os.waitstatus_to_exitcode(status).to_bytes(4, "big", signed=True))
    for number in (connection.fileno(), watch):
        del running[number]
        with contextlib.suppress(KeyError):
            selector.unregister(number)
    connection.close()
    os.close(watch)


def _run(request: dict[str, Any], streams: list[int]) -> NoReturn:
    """Run as the requested interpreter, until it ends."""
    for fd, target in zip(streams, range(3), strict=True):
        os.dup2(fd, target)
        os.close(fd)
    try:
        _execute(request)
        code = 0
    except SystemExit as end:
        code = _code_of(end.code)
    # Whatever the command raises.
    except BaseException as error:  # noqa: BLE001
        trace = error.__traceback__
        # What is above the command is none of it.
        while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
            trace = trace.tb_next
        sys.excepthook(type(error), error.with_traceback(trace), trace)
        code = -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    _end(code)


def _execute(request: dict[str, Any]) -> None:
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    # What the command starts is a real interpreter, unless the test says otherwise.
    sys.executable = os.environ.get("WARM_EXECUTABLE") or request["interpreter"]
    sys.stdout.reconfigure(line_buffering=sys.stdout.isatty())  # type: ignore[union-attr]
    _, _, errors = os.environ.get("PYTHONIOENCODING", "").partition(":")
    if errors:
        for stream in (sys.stdin, sys.stdout):
            stream.reconfigure(errors=errors)  # type: ignore[union-attr]
    _read_environment_again()
    _filter_warnings(request["arguments"])
    kind, *rest = _start(request["arguments"])
    if kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        module = types.ModuleType("__main__")
        module.__dict__["__builtins__"] = __builtins__
        sys.modules["__main__"] = module
        exec(compile(rest[0], "<string>", "exec"), module.__dict__)
    elif kind == "-m":
        sys.argv = ["-m", *rest[1:]]
        if rest[0] == "pytest":
            _forget_plugins()
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [kind, *rest]
        runpy.run_path(kind, run_name="__main__")


def _forget_plugins() -> None:
    """Let pytest import its plugins itself: it warns of those that others have imported before."""
    plugins = {entry.value.partition(".")[0] for entry in metadata.entry_points(group="pytest11")}
    for name in list(sys.modules):
        if name.partition(".")[0] in plugins - {"pytest", "_pytest"}:
            del sys.modules[name]


def _code_of(value: object) -> int:
    if value is None or isinstance(value, int):
        return int(value or 0)
    sys.stderr.write(f"{value}\n")
    return 1


def _end(code: int) -> NoReturn:
    """End as an interpreter does, but for taking everything apart, which takes longer than most commands."""
    # Both are what the interpreter calls, and neither is public.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        # Its other side may be gone; the command may have closed it.
        except (OSError, ValueError) as error:
            os.write(2, f"Exception ignored in {stream!r}: {error!r}\n".encode())
            code = code or 120
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code & 0xFF)


def _start(arguments: list[str]) -> list[str]:
    """Set the path of the imports up, and return the arguments without options."""
    rest = list(arguments)
    while rest[:1] == ["-W"]:
        rest = rest[2:]
    folders = {"-c": "", "-m": str(Path.cwd())}
    first = folders[rest[0]] if rest[0] in folders else str(Path(rest[0]).resolve().parent)
    added = [folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]
    sys.path[:] = [first, *added, *(entry for entry in sys.path if entry not in added)]
    importlib.invalidate_caches()
    _enter_environment()
    return rest


def _enter_environment() -> None:
    """See what is installed beside the interpreter, if that is one of an environment of its own."""
    prefix = str(Path(sys.executable).parent.parent)
    if prefix == sys.prefix or not Path(prefix, "pyvenv.cfg").is_file():
        return
    sys.prefix = sys.exec_prefix = prefix
    library = sysconfig.get_path("stdlib")
    of_library = [entry for entry in sys.path if entry.startswith(library) and not entry.endswith("site-packages")]
    # None of what is installed beside the server, but what the environment says that it borrows.
    sys.path[:] = [*sys.path[: sys.path.index(of_library[0])], *of_library]
    site.addsitedir(f"{prefix}/lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages")


def _filter_warnings(arguments: list[str]) -> None:
    options = [arguments[i + 1] for i in range(0, len(arguments) - 1, 2) if arguments[i] == "-W"]
    if options:
        sys.warnoptions[:] = options
        # The interpreter's own reading of its options, which is nowhere public.
        warnings._processoptions(options)  # type: ignore[attr-defined]


def _read_environment_again() -> None:
    for name in READERS:
        module = sys.modules.get(name)
        if module is None:
            continue
        before = dict(vars(module))
        importlib.reload(module)
        changed = {key: value for key, value in vars(module).items() if key.isupper() and before.get(key) != value}
        for other_name, other in list(sys.modules.items()):
            if other_name.partition(".")[0] in USERS:
                space = vars(other)
                for key, value in changed.items():
                    if key in space and space[key] == before.get(key):
                        space[key] = value


if __name__ == "__main__":
    serve(sys.argv[1])
