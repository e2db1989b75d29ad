"""A test that leaves the process changed fails, says what it left, and spoils no other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from support.process_state import changes, read_state

#: What a test does, and what is said of it.
LEAKS = {
    "os.environ['LEFT'] = 'here'": "environment: LEFT was None and is 'here'",
    "del os.environ['KEPT']": "environment: KEPT was 'kept' and is None",
    "os.chdir('/')": "working directory: was ",
    "sys.path.append('/left')": "sys.path: was ",
    "signal.signal(signal.SIGTERM, signal.SIG_IGN)": "signal handlers: was ",
    "gc.disable()": "garbage collection: was True and is False",
    "torch.set_grad_enabled(False)": "gradient mode: was True and is False",
    "torch.set_default_dtype(torch.float64)": "default dtype: was 'float32' and is 'float64'",
    "torch.set_default_device('meta')": "default device: was 'cpu' and is 'meta'",
    "torch.use_deterministic_algorithms(True)": "deterministic algorithms: was 0 and is 2",
    "torch.set_float32_matmul_precision('high')": "precision of matrix products: was 'highest' and is 'high'",
    "torch.autocast('cpu').__enter__()": "autocast: was False and is True",
    "torch.set_num_threads(torch.get_num_threads() + 1)": "number of threads: was ",
    "transformers.utils.logging.set_verbosity_debug()": "verbosity of transformers: was ",
    "asyncio.run(two_tasks())": "inference mode: was False and is True",
}
MODULE = """
import asyncio, gc, os, pathlib, signal, sys
import pytest, torch, transformers


async def hold(turns):
    with torch.inference_mode():
        for _ in range(turns):
            await asyncio.sleep(0)


async def two_tasks():
    await asyncio.gather(hold(1), hold(2))


@pytest.fixture(scope="module")
def wide():
    torch.set_grad_enabled(False)


"""


@pytest.fixture
def pytest_run(world: Any, tmp_path: Path) -> Any:
    """Run a module of tests in a process of its own, which has imported torch already unless ``light``."""

    def run(source: str, *, light: bool = False) -> Any:
        module = tmp_path / "test_made.py"
        module.write_text(source)
        plugins = ("-p", "no:randomly", "-p", "no:xdist", "-p", "no:cacheprovider")
        state = ("-p", "support.process_state", "-o", f"pythonpath={Path(__file__).parent}")
        python = world.python if light else world.warm_python
        return python("-m", "pytest", "-q", "--rootdir", tmp_path, *plugins, *state, module, KEPT="kept")

    return run


def test_each_change_fails_the_test_that_made_it(pytest_run: Any) -> None:
    """And none but that: what comes after it meets the state from before."""
    tests = [
        f"def test_{number}():\n    {statement}\n\n\ndef test_{number}_after():\n"
        "    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()\n"
        "    assert (torch.ones(1, requires_grad=True) * 2).requires_grad\n\n\n"
        for number, statement in enumerate(LEAKS)
    ]

    done = pytest_run(MODULE + "".join(tests))

    assert done.returncode == 1, done.stdout + done.stderr
    assert f"{2 * len(LEAKS)} passed, {len(LEAKS)} errors" in done.stdout
    for number, said in enumerate(LEAKS.values()):
        assert f"::test_{number} left the process changed: {said}" in done.stdout


def test_a_fixture_of_a_module_may_change_it_for_its_tests_alone(pytest_run: Any) -> None:
    """Its tests run in the state that it makes; the module has to put it back."""
    done = pytest_run(MODULE + "def test_a(wide):\n    pass\n\n\ndef test_b(wide):\n    pass\n")

    assert "2 passed, 1 error" in done.stdout, done.stdout + done.stderr
    assert "a fixture of test_made.py left the process changed: gradient mode" in done.stdout


def test_what_a_test_puts_back_is_no_change(pytest_run: Any) -> None:
    """With pytest's own means, or with blocks."""
    test = (
        "def test_a(monkeypatch, tmp_path):\n"
        "    monkeypatch.setenv('LEFT', '1')\n"
        "    monkeypatch.chdir(tmp_path)\n"
        "    monkeypatch.syspath_prepend('/left')\n"
        "    with torch.inference_mode(), torch.device('meta'), torch.autocast('cpu'):\n"
        "        pass\n"
    )
    done = pytest_run(MODULE + test)

    assert "1 passed" in done.stdout, done.stdout + done.stderr


def test_it_imports_nothing(pytest_run: Any) -> None:
    """A test without torch costs no import of it; one that imports it starts from torch's own state."""
    light = "import sys\n\n\ndef test_a():\n    assert 'torch' not in sys.modules\n\n\n"
    done = pytest_run(light + "def test_b():\n    import torch\n    torch.set_grad_enabled(False)\n", light=True)

    assert "2 passed, 1 error" in done.stdout, done.stdout + done.stderr
    assert "gradient mode: was True and is False" in done.stdout


def test_the_suites_use_it(request: pytest.FixtureRequest) -> None:
    """This very test is compared, like all others of a checkout."""
    if request.config.inipath is None or request.config.inipath.name != "pyproject.toml":
        pytest.skip("run without the configuration of the workspace")
    assert {"unchanged_by_test", "unchanged_by_module"} <= set(request.fixturenames)


def test_nothing_changed_is_nothing_said() -> None:
    """Twice the same state."""
    assert changes(read_state()) == []
