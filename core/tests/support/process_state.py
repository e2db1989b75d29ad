"""A pytest plugin that fails each test which leaves the process changed: torch's modes, environment, directory.

What one test leaves is met by all that come after it in the process, in whatever order they run. It is put back, so
that one test fails and not hundreds. The root's ``pyproject.toml`` loads it.

It imports nothing: the state of torch and of transformers is compared where a test has imported them.

It also keeps the garbage collector away from what is there for good. Torch, transformers and some thousand tests are
many times what a test makes, and each collection of everything would take half a second; accelerate makes one for each
training.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any

import pytest

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
#: Variables that pytest and torch set for themselves.
_NOT_COMPARED = {"PYTEST_CURRENT_TEST", "TORCHINDUCTOR_CACHE_DIR"}
#: What torch has right after its import, as far as that is the same everywhere.
_INITIAL_TORCH = {
    "inference mode": False,
    "gradient mode": True,
    "default dtype": "float32",
    "default device": "cpu",
    "deterministic algorithms": 0,
    "precision of matrix products": "highest",
    "autocast": False,
}
#: Contexts that were entered to end an inference mode. Torch would end them, too, if they were freed.
_entered: list[Any] = []


def pytest_configure() -> None:
    """Take SIGINT where a shell ignores it for what is in its background: processes of tests inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests() -> None:
    """Collect no garbage while modules are imported, until all tests are collected."""
    gc.disable()


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Let later collections pass over what is there by then."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.collect()
        gc.freeze()


def read_state() -> dict[str, Any]:
    """Return what belongs to the whole process, or to its main thread, by name."""
    state: dict[str, Any] = {
        "environment": {name: value for name, value in os.environ.items() if name not in _NOT_COMPARED},
        "working directory": os.getcwd(),  # noqa: PTH109  # a path object costs more than the rest
        "sys.path": sys.path.copy(),
        "signal handlers": [signal.getsignal(number) for number in _SIGNALS],
        "garbage collection": gc.isenabled(),
    }
    if (torch := sys.modules.get("torch")) is None:
        state |= _INITIAL_TORCH
    else:
        state |= {
            "inference mode": torch.is_inference_mode_enabled(),
            "gradient mode": torch.is_grad_enabled(),
            "default dtype": str(torch.get_default_dtype()).removeprefix("torch."),
            "default device": str(torch.get_default_device()),
            "deterministic algorithms": torch.get_deterministic_debug_mode(),
            "precision of matrix products": torch.get_float32_matmul_precision(),
            "autocast": torch.is_autocast_enabled("cpu"),
            "number of threads": torch.get_num_threads(),
        }
    if (logging := sys.modules.get("transformers.utils.logging")) is not None:
        state |= {"verbosity of transformers": logging.get_verbosity(), "bars": logging.is_progress_bar_enabled()}
    return state


def changes(before: Mapping[str, Any]) -> list[str]:
    """Put back what is not as it was, and describe each change."""
    found = []
    after = read_state()
    # In this order: leaving inference mode changes the gradient mode.
    for name, put_back in _PUT_BACK.items():
        if name in before and before[name] != after[name]:
            found.append(f"{name}: {_difference(before[name], after[name])}")
            put_back(before[name])
    return found


def _difference(before: Any, after: Any) -> str:
    if isinstance(before, dict):
        names = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
        return ", ".join(f"{name} was {before.get(name)!r} and is {after.get(name)!r}" for name in names)
    return f"was {before!r} and is {after!r}"


def _torch() -> Any:
    return sys.modules["torch"]


def _set_environment(values: Mapping[str, str]) -> None:
    for name in os.environ.keys() - values.keys() - _NOT_COMPARED:
        del os.environ[name]
    os.environ.update(values)


def _set_path(value: list[str]) -> None:
    sys.path[:] = value


def _set_handlers(handlers: list[Any]) -> None:
    for number, handler in zip(_SIGNALS, handlers, strict=True):
        signal.signal(number, handler)


def _set_inference_mode(value: bool) -> None:
    context = _torch().inference_mode(value)
    context.__enter__()
    _entered.append(context)


def _set_verbosity(level: int) -> None:
    sys.modules["transformers.utils.logging"].set_verbosity(level)


def _set_bars(enabled: bool) -> None:
    logging = sys.modules["transformers.utils.logging"]
    (logging.enable_progress_bar if enabled else logging.disable_progress_bar)()


_PUT_BACK: dict[str, Callable[[Any], object]] = {
    "environment": _set_environment,
    "working directory": os.chdir,
    "sys.path": _set_path,
    "signal handlers": _set_handlers,
    "garbage collection": lambda enabled: gc.enable() if enabled else gc.disable(),
    "inference mode": _set_inference_mode,
    "gradient mode": lambda value: _torch().set_grad_enabled(value),
    "default dtype": lambda value: _torch().set_default_dtype(getattr(_torch(), value)),
    "default device": lambda value: _torch().set_default_device(None if value == "cpu" else value),
    "deterministic algorithms": lambda value: _torch().set_deterministic_debug_mode(value),
    "precision of matrix products": lambda value: _torch().set_float32_matmul_precision(value),
    "autocast": lambda value: _torch().set_autocast_enabled("cpu", value),
    "number of threads": lambda value: _torch().set_num_threads(value),
    "verbosity of transformers": _set_verbosity,
    "bars": _set_bars,
}


def _compared(culprit: str) -> Iterator[None]:
    before = read_state()
    yield
    if found := changes(before):
        pytest.fail(f"{culprit} left the process changed: {'; '.join(found)}", pytrace=False)


@pytest.fixture(autouse=True, scope="module")
def unchanged_by_module(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail where fixtures of a module or class leave the process changed; their tests may run in a state of theirs."""
    yield from _compared(f"a fixture of {request.node.nodeid}")


@pytest.fixture(autouse=True)
def unchanged_by_test(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaves the process changed; set up before its other fixtures, and so ended after them."""
    yield from _compared(request.node.nodeid)
