"""A component in a process of its own: it computes as one that runs here, and whatever ends leaves nothing behind."""

from __future__ import annotations

import contextlib
import gc
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from splitlearn_core import (
    HostDiedError,
    LoadCancelledError,
    MissingFileError,
    RemoteError,
    SplitCausalLM,
    SplitLearnError,
    errors,
)
from splitlearn_core.api import load_split_model
from splitlearn_core.hosts import child, process, supervisor
from splitlearn_core.hosts.process import ProcessHandle, ProcessLoad, start_process
from splitlearn_core.hosts.shared_memory import ARENA_FROM
from splitlearn_core.hosts.supervisor import Supervisor, living_supervisor, prepare_processes
from support.hosts import BEHAVING_PLUGIN
from support.warm import WarmInterpreter

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="what is left is read from /proc")

CUT = (2, 4)
#: Starts a process, says so, and waits for the test.
WITH_GRANDCHILD = """
import subprocess
process = subprocess.Popen(["sleep", "1000"])
(HERE / "arrived").write_text(str(process.pid))
(HERE / "go").read_text()
"""
#: The same without a process.
WAITING = """
(HERE / "arrived").write_text("0")
(HERE / "go").read_text()
"""
END_BY = "import os\nos.kill(os.getpid(), {number})\n"
HANGING = {
    "in Python": '(HERE / "arrived").write_text("0")\nimport threading\nthreading.Event().wait()\n',
    # With the lock of the interpreter, so that no other thread of it runs.
    "in C": '(HERE / "arrived").write_text("0")\nimport ctypes\nctypes.PyDLL(None).pause()\n',
}


@pytest.fixture(scope="module", autouse=True)
def _prepared() -> None:
    prepare_processes(["llama"])


@pytest.fixture
def folder(world: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder that holds what children do, and through which they say that they have come to it."""
    monkeypatch.setenv("TEST_PARENT", str(os.getpid()))
    world.install("llama", BEHAVING_PLUGIN)
    for name in ("arrived", "go"):
        os.mkfifo(world.folder / name)
    return Path(world.folder)


@pytest.fixture
def started(folder: Path, single: Path) -> Iterator[Any]:
    """Return a function that starts a trunk in a process; it is ended after the test."""
    handles: list[ProcessHandle] = []

    def start(**options: Any) -> ProcessHandle:
        handles.append(start_process(ProcessLoad(str(single), CUT), **options))
        return handles[-1]

    yield start
    for handle in handles:
        handle.kill(0)


def watch(pid: int) -> Any:
    """Return a function that waits for the end of a process."""
    descriptor = os.pidfd_open(pid)

    def ended() -> bool:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        try:
            return bool(poll.poll(60_000))
        finally:
            os.close(descriptor)

    return ended


def belongings() -> tuple[set[str], set[str], set[str]]:
    """Return the open files of this process, its mapped memory files, and named shared memory."""
    gc.collect()
    links = set()
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # that of the listing
            links.add(f"{path.name} {path.readlink()}")
    maps = {line for line in Path("/proc/self/maps").read_text().splitlines() if "memfd:splitlearn" in line}
    return {link for link in links if "/proc/" not in link}, maps, set(os.listdir("/dev/shm"))  # noqa: PTH208


def is_running(pid: int) -> bool:
    """Return whether a process has not ended; one whose parent has, too, is a zombie until init notices."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def states(rows: int = 1, tokens: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, tokens, 32, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_computes_what_the_unsplit_model_does(folder: Path, single: Path, dtype: str) -> None:
    """Logits and texts are equal to the last bit, padded, with beams, sampled, and with inputs in shared memory."""
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(single, dtype=dtype)
    parts = load_split_model(None, CUT, single, parts=["bottom", "top"], dtype=dtype)
    handle = start_process(ProcessLoad(str(single), CUT, dtype=dtype))
    try:
        split = SplitCausalLM(parts.bottom, handle.component, parts.top)
        ids = torch.randint(3, 100, (32, 32), generator=torch.Generator().manual_seed(0))
        assert ids.numel() * 32 * whole.dtype.itemsize >= ARENA_FROM
        with torch.no_grad():
            assert torch.equal(whole(ids).logits, split(ids).logits)
        ids, mask = ids[:3, :9], torch.ones(3, 9, dtype=torch.long)
        mask[0, :4] = 0
        for options in ({}, {"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True}):
            texts = []
            for model in (whole, split):
                torch.manual_seed(1)
                texts.append(
                    model.generate(ids, attention_mask=mask, max_new_tokens=8, **{"do_sample": False, **options})
                )
            assert torch.equal(*texts)
        assert handle.start_method == "fork"
        assert (memory := handle.memory()) is not None
        assert memory.rss >= memory.pss > memory.private > 0
    finally:
        assert handle.kill().status == 0


@pytest.mark.sample(3)
@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL])
@pytest.mark.parametrize("moment", ["load", "idle", "step"])
def test_a_child_that_dies_leaves_nothing(started: Any, folder: Path, moment: str, number: signal.Signals) -> None:
    """Its user gets an error with the signal at once; what it had started ends, and no descriptor stays."""
    started().kill()  # so that the zygote is there
    before = belongings()
    end = END_BY.format(number=int(number)) if moment == "load" else ""
    (folder / "load.py").write_text(WITH_GRANDCHILD + end)
    handle = started()
    grandchild = watch(int((folder / "arrived").read_text()))
    (folder / "go").write_text("")
    if moment == "load":
        with pytest.raises(HostDiedError, match=number.name) as error:
            _ = handle.component
    else:
        component = handle.component
        cache = component.new_cache()
        # Large enough for shared memory.
        component(hidden_states=states(64, 32), past_key_values=cache)
        if moment == "idle":
            assert handle.pid is not None
            os.kill(handle.pid, number)
            handle.ended.result()
        else:
            (folder / "step.py").write_text(WAITING + END_BY.format(number=int(number)))
            release = threading.Thread(
                target=lambda: ((folder / "arrived").read_text(), (folder / "go").write_text("")), daemon=True
            )
            release.start()
        with pytest.raises(HostDiedError, match=number.name) as error:
            component(hidden_states=states(64, 32), past_key_values=cache)
        del component, cache
    ending = handle.ended.result()
    assert (ending.signal, ending.may_be_out_of_memory) == (number.name, number == signal.SIGKILL)
    assert error.value.hint
    assert grandchild()
    assert handle.pid is not None
    assert handle.memory() is None
    assert not Path(f"/proc/{handle.pid}").exists()
    del error
    assert belongings() == before


def test_a_child_that_is_given_up_before_it_runs_leaves_no_descriptor(
    single: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A zygote that is still importing starts it later than it is killed."""

    class Slow:
        def start_child(self, child: Any, control: Any) -> None:
            pass

    monkeypatch.setattr(process, "living_supervisor", Slow)
    before = belongings()
    handle = start_process(ProcessLoad(str(single), CUT))
    ending = handle.kill(0)
    assert (ending.status, ending.was_requested) == (None, True)
    handle.on_started(os.getpid(), "fork", os.pidfd_open(os.getpid()))
    with pytest.raises(LoadCancelledError):
        _ = handle.component
    assert belongings() == before


@pytest.mark.parametrize("where", HANGING)
def test_a_load_that_hangs_is_killed(started: Any, folder: Path, where: str) -> None:
    """One that can is ended by itself, and one that cannot after its grace."""
    (folder / "load.py").write_text(HANGING[where])
    handle = started()
    (folder / "arrived").read_text()
    # One that ends by itself has all the time that this machine takes.
    ending = handle.kill(0 if where == "in C" else 60)
    assert ending.status == (-signal.SIGKILL if where == "in C" else 0)
    assert ending.was_requested
    assert not ending.may_be_out_of_memory
    with pytest.raises(LoadCancelledError):
        _ = handle.component


def test_errors_of_a_load_keep_their_type(started: Any, folder: Path, tmp_path: Path) -> None:
    """They say what they would say here; so does one of the caller's own callback."""
    handle = start_process(ProcessLoad(str(tmp_path / "missing"), CUT))
    with pytest.raises(MissingFileError) as here:
        load_split_model(None, CUT, tmp_path / "missing")
    with pytest.raises(MissingFileError) as there:
        _ = handle.component
    assert (there.value.message, there.value.hint) == (here.value.message, here.value.hint)
    assert handle.ended.done()

    def refuse(_: Any) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        _ = started(progress=refuse).component


def test_each_error_class_can_be_sent() -> None:
    """A child names the class; one that only a plugin knows comes as what it derives from."""

    class OfPluginError(errors.InvalidCheckpointError):
        pass

    classes = [cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, SplitLearnError)]
    for cls in (*classes, OfPluginError):
        error = process._error_of(ProcessLoad("x", CUT), child._described(cls("what", hint="so")))
        assert type(error) is (cls if cls in classes else errors.InvalidCheckpointError)
        assert (error.message, error.hint) == ("what", "so")
    foreign = process._error_of(ProcessLoad("x", CUT), child._described(MemoryError("too much")))
    assert type(foreign) is errors.LoadFailedError
    assert "MemoryError: too much" in foreign.message


@pytest.mark.usefixtures("folder")
def test_progress_is_reported_and_the_token_is_no_argument(single: Path) -> None:
    """The stages are those of a local load, and other users cannot read the arguments of the child."""
    stages = []
    load = ProcessLoad(str(single), CUT, token="hf_secret")
    handle = start_process(load, progress=lambda step: stages.append(step.stage))
    try:
        _ = handle.component
        assert stages[0] == "resolving"
        assert stages[-1] == "ready"
        assert {"building", "reading"} <= set(stages)
        for pid in (handle.pid, living_supervisor().pid):
            assert b"hf_secret" not in Path(f"/proc/{pid}/cmdline").read_bytes()
            assert b"hf_secret" not in Path(f"/proc/{pid}/environ").read_bytes()
        assert "hf_secret" not in repr(load)
    finally:
        handle.kill()


@pytest.mark.parametrize("wait", [0.0, 60.0])
def test_sessions_go_on_in_a_successor(started: Any, single: Path, wait: float) -> None:
    """To the last bit, whether a step waits for it or fails and is done again."""
    trunk = load_split_model(None, CUT, single, parts=["trunk"]).trunk
    expected = trunk.new_cache()
    handle = started(wait=wait)
    component = handle.component
    cache = component.new_cache()
    with torch.no_grad():
        for seed in range(3):
            inputs = states(2, 3, seed)
            assert torch.equal(
                component(hidden_states=inputs, past_key_values=cache),
                trunk(hidden_states=inputs, past_key_values=expected),
            )
        os.kill(handle.pid, signal.SIGKILL)
        handle.ended.result()
        results: list[Any] = []

        def step() -> None:
            with torch.no_grad():
                results.append(component(hidden_states=states(2, 1), past_key_values=cache))

        waiting = threading.Thread(target=step, daemon=True)
        if wait:
            waiting.start()
        else:
            with pytest.raises(HostDiedError):
                step()
        assert started(after=handle).component is component
        if wait:
            waiting.join()
        else:
            step()
        assert torch.equal(results[0], trunk(hidden_states=states(2, 1), past_key_values=expected))


def test_a_successor_that_does_not_come_is_not_waited_for(started: Any) -> None:
    """Who restarts children says when it no longer will."""
    handle = started(wait=600.0)
    component = handle.component
    handle.kill()
    handle.address.give_up()
    with pytest.raises(HostDiedError, match="ended on request"):
        component(hidden_states=states())


def test_two_children_at_once(started: Any, folder: Path) -> None:
    """Each has its own process, and the end of one is nothing to the other."""
    first, second = started(), started()
    results: dict[str, torch.Tensor] = {}

    def run(name: str, handle: ProcessHandle) -> None:
        results[name] = handle.component(hidden_states=states())

    threads = [threading.Thread(target=run, args=pair) for pair in (("first", first), ("second", second))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert first.pid != second.pid
    assert torch.equal(results["first"], results["second"])
    first.kill()
    assert torch.equal(second.component(hidden_states=states()), results["second"])
    assert second.exit is None


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_fork_of_the_owner_does_not_use_its_children(started: Any) -> None:
    """Two processes that use one connection would get each other's replies."""
    component = started().component
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            component(hidden_states=states())
        except RemoteError as error:
            os.write(writer, error.code.encode())
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    os.close(writer)
    with os.fdopen(reader) as answer:
        assert answer.read() == "forked"
    component(hidden_states=states())


@pytest.mark.slow
def test_a_zygote_ends_together_with_its_children(started: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next start makes another one."""
    own = Supervisor()
    monkeypatch.setattr(process, "living_supervisor", lambda: own)
    handle = started()
    component = handle.component
    assert handle.pid is not None
    # By a descriptor: whoever inherits the child may be late to remove its entry.
    ended = watch(handle.pid)
    os.kill(own.pid, signal.SIGKILL)
    assert handle.ended.result().status is None
    assert ended()
    with pytest.raises(HostDiedError, match="zygote"):
        component(hidden_states=states())
    own.close()
    assert own.is_over
    monkeypatch.undo()
    assert not living_supervisor().is_over


@pytest.mark.slow
def test_where_forking_is_not_safe_a_fresh_interpreter_is_started(
    started: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It computes the same, and what it starts ends with it."""
    expected = started().component(hidden_states=states())
    (folder / "starts_a_thread.py").write_text(
        "import threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()\n"
    )
    own = Supervisor()
    own.import_later(["starts_a_thread"])
    monkeypatch.setattr(process, "living_supervisor", lambda: own)
    (folder / "load.py").write_text(WITH_GRANDCHILD)
    try:
        handle = started()
        grandchild = watch(int((folder / "arrived").read_text()))
        (folder / "go").write_text("")
        assert torch.equal(handle.component(hidden_states=states()), expected)
        assert handle.start_method == "spawn"
        handle.kill()
        assert grandchild()
    finally:
        own.close()


@pytest.mark.parametrize(
    ("code", "may"),
    [
        ("pass", True),
        ("threading.Thread(target=threading.Event().wait, daemon=True).start()", False),
        ("file = open(sys.argv[1], 'w+b'); file.truncate(4096); memory = mmap.mmap(file.fileno(), 4096)", False),
    ],
    ids=["one thread", "two threads", "the driver of CUDA"],
)
def test_a_zygote_sees_whether_it_may_fork(tmp_path: Path, code: str, may: bool) -> None:
    """It forks with one thread and without the driver alone."""
    program = (
        f"import mmap, sys, threading\n{code}\nfrom splitlearn_core.hosts.zygote import _may_fork\nprint(_may_fork())"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "libcuda.so.1")], capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == str(may)


PARENT = """
import sys, threading
from splitlearn_core.hosts.process import ProcessLoad, start_process
from splitlearn_core.hosts.supervisor import living_supervisor

first = start_process(ProcessLoad(sys.argv[1], (2, 4)))
grandchild = open(sys.argv[2] + "/arrived").read()
open(sys.argv[2] + "/go", "w").close()
first.component
print(living_supervisor().pid, first.pid, grandchild, flush=True)
threading.Event().wait()
"""


def test_a_zygote_that_imports_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends at once with the process that started it, whatever its imports take."""
    os.mkfifo(tmp_path / "arrived")
    (tmp_path / "torch.py").write_text(f"HERE = __import__('pathlib').Path({str(tmp_path)!r})\n" + HANGING["in Python"])
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(supervisor, "_END_TIMEOUT", 1000)
    zygote = Supervisor()
    ended = watch(zygote.pid)
    assert (tmp_path / "arrived").read_text()
    zygote.close()
    assert ended()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_nothing_outlives_its_parent(
    folder: Path, world: Any, single: Path, warm: WarmInterpreter, number: signal.Signals
) -> None:
    """Neither the zygote, nor children, nor what they have started."""
    (folder / "load.py").write_text(WITH_GRANDCHILD)
    environment = {**world.environment(), "TEST_PARENT": "0"}
    with subprocess.Popen(
        [str(warm.path), "-c", PARENT, str(single), str(folder)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as parent:
        assert parent.stdout is not None
        watches = [watch(int(pid)) for pid in parent.stdout.readline().split()]
        assert len(watches) == 3
        parent.send_signal(number)
        parent.wait(timeout=60)
        assert [ended() for ended in watches] == [True] * 3
