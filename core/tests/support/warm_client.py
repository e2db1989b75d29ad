"""What stands in the place of an interpreter: it has the command run by the server of :mod:`support.warm`.

It is a process of its own, so that whoever starts it has pipes, exit codes, signals and time limits as ever. What the
server cannot do faithfully is given to the real interpreter. It imports little, for it is started hundreds of times.
"""

# pathlib takes longer to import than all of this.
# ruff: noqa: PTH109, PTH112, PTH113, PTH120

import json
import os
import signal
import socket

#: Forwarded to the command; whatever else ends this process ends the command, too.
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
#: Variables that the interpreter or a library reads once, as it starts, and that the server does not read again.
#: But for :data:`NOT_COMPARED`: torch itself sets a variable when it first looks for its cache of compiled code.
READ_ONCE = ("PYTHON", "OMP_", "MKL_", "KMP_", "OPENBLAS_", "TORCH", "PYTORCH_", "TRANSFORMERS_", "USE_", "LD_")
NOT_COMPARED = ("PYTHONPATH", "TORCHINDUCTOR_CACHE_DIR")
#: Modules whose subject is the interpreter itself, or which need nothing of what is imported.
COLD_MODULES = ("pip", "venv", "build", "mypy", "pyright", "zipfile", "site", "ensurepip")


def main(
    server: str,
    interpreter: str,
    imported: list[str],
    path: list[str],
    variables: dict[str, str],
    arguments: list[str],
) -> None:
    """Have the command run and end as it ended."""
    start = _start_of(arguments)
    if start is None or _differs(start, imported, path, variables):
        os.execv(interpreter, [interpreter, *arguments])
    request = {
        "arguments": arguments, "cwd": os.getcwd(), "env": dict(os.environ), "interpreter": interpreter,
    }  # fmt: skip
    data = json.dumps(request).encode()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(server)
        for number in FORWARDED:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, lambda number, _: connection.sendall(bytes([number])))
        socket.send_fds(connection, [len(data).to_bytes(4, "big")], [0, 1, 2])
        connection.sendall(data)
        answer = connection.recv(4)
    code = int.from_bytes(answer, "big", signed=True) if len(answer) == 4 else 70
    if code < 0:
        signal.signal(-code, signal.SIG_DFL) if -code not in (signal.SIGKILL, signal.SIGSTOP) else None
        os.kill(os.getpid(), -code)
    # Nothing is to be flushed, and finalizing takes as long as all the rest.
    os._exit(code)


def _start_of(arguments: list[str]) -> str | None:
    """Return the folder from which the command imports first, or None where the server cannot run it."""
    rest = list(arguments)
    while rest[:1] == ["-W"]:
        rest = rest[2:]
    match rest:
        case ["-c", _, *_]:
            return os.getcwd()
        case ["-m", name, *_] if name.partition(".")[0] not in COLD_MODULES:
            return os.getcwd()
        case [script, *_] if not script.startswith("-") and os.path.isfile(script):
            return os.path.dirname(os.path.realpath(script))
    return None


def read_once(environment: dict[str, str]) -> dict[str, str]:
    """Return the variables that make a command need an interpreter of its own where the server has others."""
    return {n: value for n, value in environment.items() if n.startswith(READ_ONCE) and n not in NOT_COMPARED}


def _differs(start: str, imported: list[str], path: list[str], variables: dict[str, str]) -> bool:
    """Say whether what the server has imported could be something else in the command."""
    own = read_once(dict(os.environ))
    if own.get("PYTHONIOENCODING", "").startswith("utf-8"):
        del own["PYTHONIOENCODING"]  # which the server follows
    locale = os.environ.get("LC_ALL") or os.environ.get("LC_CTYPE") or os.environ.get("LANG") or "utf-8"
    if own != variables or not locale.lower().replace("-", "").endswith("utf8"):
        return True
    known = {*imported, "sitecustomize", "usercustomize"}
    for folder in (start, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))):
        # Where the server looks, it has found what it has imported.
        if folder not in path and os.path.isdir(folder):
            with os.scandir(folder) as entries:
                importable = [e.name for e in entries if e.name.endswith((".py", ".so")) or e.is_dir()]
            # Metadata count as well: its folder begins with the library's name.
            if known & {name.partition(".")[0].partition("-")[0] for name in importable}:
                return True
    return False
