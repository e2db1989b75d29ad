"""What memory there is: the machine's, every control group's above this process, and each device's."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from splitlearn_core import ConfigurationError
from splitlearn_core.manager.resources import MemorySample, ResourceManager, ledger_of
from splitlearn_core.system_memory import MemoryReading, anonymous_memory, available_memory, read_memory

pytestmark = pytest.mark.light

MB, GB = 2**20, 2**30
#: What kernels write where there is no limit in version 1.
UNLIMITED = 9223372036854771712


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the machine have 64 GiB, of which 32 are available."""
    reading = psutil.virtual_memory()._replace(total=64 * GB, available=32 * GB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: reading)


class Groups:
    """A root folder with control groups below it."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def own(self, *lines: str) -> None:
        path = self.root / "proc/self/cgroup"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{line}\n" for line in lines))

    def v2(self, path: str, limit: object, **stat: int) -> Path:
        folder = self.root / "sys/fs/cgroup" / path.strip("/")
        return self._write(folder, {"memory.max": limit, "memory.current": 7 * GB}, stat)

    def v1(self, path: str, limit: object, kernel: int = 0, **stat: int) -> Path:
        folder = self.root / "sys/fs/cgroup/memory" / path.strip("/")
        names = {
            "memory.limit_in_bytes": limit,
            "memory.kmem.usage_in_bytes": kernel,
            "memory.usage_in_bytes": 7 * GB,
        }
        return self._write(folder, names, stat)

    def _write(self, folder: Path, files: dict[str, object], stat: dict[str, int]) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        for name, value in files.items():
            (folder / name).write_text(f"{value}\n")
        (folder / "memory.stat").write_text("".join(f"{name} {value}\n" for name, value in stat.items()))
        return folder


@pytest.fixture
def groups(tmp_path: Path) -> Groups:
    return Groups(tmp_path)


def test_without_groups_it_is_the_machines(tmp_path: Path) -> None:
    """A system that has no control groups."""
    assert read_memory(tmp_path) == MemoryReading(64 * GB, 32 * GB, "machine")


def test_the_own_group_limits(groups: Groups) -> None:
    """File pages are given back on demand; anonymous, shared and kernel memory are not."""
    groups.own("0::/app")
    folder = groups.v2(
        "app", 8 * GB, anon=2 * GB, file=5 * GB, shmem=GB, kernel=600 * MB, slab_reclaimable=88 * MB, sock=0
    )

    assert read_memory(groups.root) == MemoryReading(8 * GB, 5 * GB - 512 * MB, str(folder))


def test_old_kernels_tell_the_parts_of_kernel_memory(groups: Groups) -> None:
    """Before 5.18 there is no sum of it."""
    groups.own("0::/app")
    groups.v2(
        "app",
        8 * GB,
        anon=GB,
        slab_unreclaimable=100 * MB,
        slab_reclaimable=GB,
        kernel_stack=20 * MB,
        pagetables=4 * MB,
    )

    assert read_memory(groups.root).free == 7 * GB - 124 * MB


@pytest.mark.parametrize("tightest", ["a", "a/b", "a/b/c", ""])
def test_every_group_above_limits_too(groups: Groups, tightest: str) -> None:
    """The lowest limit is the total, and the least that any group leaves is free."""
    groups.own("0::/a/b/c")
    for path in ("", "a", "a/b", "a/b/c"):
        groups.v2(path, 4 * GB if path == tightest else "max", anon=GB, kernel=0)

    reading = read_memory(groups.root)

    assert (reading.total, reading.free) == (4 * GB, 3 * GB)
    assert reading.limited_by == str(groups.root / "sys/fs/cgroup" / tightest)


def test_the_least_free_may_be_of_another_group_than_the_total(groups: Groups) -> None:
    """A group above that its other members have filled."""
    groups.own("0::/a/b")
    groups.v2("a", 16 * GB, anon=15 * GB, kernel=0)
    own = groups.v2("a/b", 8 * GB, anon=GB, kernel=0)

    assert read_memory(groups.root) == MemoryReading(8 * GB, GB, str(own))


def test_an_overdrawn_group_has_nothing_free(groups: Groups) -> None:
    """Never less than nothing."""
    groups.own("0::/app")
    groups.v2("app", GB, anon=2 * GB, kernel=0)

    assert read_memory(groups.root).free == 0


def test_a_limit_above_the_machine_is_none(groups: Groups) -> None:
    """The machine is what there is."""
    groups.own("0::/app")
    groups.v2("app", 100 * GB, anon=GB, kernel=0)

    assert read_memory(groups.root) == MemoryReading(64 * GB, 32 * GB, "machine")


def test_the_machine_may_have_less_than_the_group_leaves(groups: Groups) -> None:
    """Both must bear it."""
    groups.own("0::/app")
    groups.v2("app", 48 * GB, anon=GB, kernel=0)

    reading = read_memory(groups.root)

    assert (reading.total, reading.free) == (48 * GB, 32 * GB)


def test_a_container_that_sees_its_group_as_the_root(groups: Groups) -> None:
    """With or without a namespace of its own, the path of the group may not exist."""
    groups.v2("", 2 * GB, anon=GB, kernel=0)

    for path in ("/", "/docker/abc", "/../../other"):
        groups.own(f"0::{path}")
        assert read_memory(groups.root).free == GB, path


def test_version_1_counts_what_is_below(groups: Groups) -> None:
    """``total_`` covers the groups below; the huge limit of the root is none."""
    groups.own("12:cpu,cpuacct:/app", "5:memory:/app", "1:name=systemd:/app", "0::/system")
    groups.v1("", UNLIMITED, total_rss=60 * GB)
    folder = groups.v1("app", 4 * GB, kernel=MB, total_rss=GB, total_cache=3 * GB, total_shmem=MB, rss=0)

    assert read_memory(groups.root) == MemoryReading(4 * GB, 3 * GB - 2 * MB, str(folder))


@pytest.mark.parametrize("version", [1, 2])
def test_without_a_breakdown_all_that_is_used_counts(groups: Groups, version: int) -> None:
    """A group that hides its memory.stat is believed to hold no file pages."""
    groups.own("0::/app", "5:memory:/app")
    folder = (groups.v2 if version == 2 else groups.v1)("app", 8 * GB)
    (folder / "memory.stat").unlink()

    assert read_memory(groups.root).free == GB


@pytest.mark.parametrize("text", ["", "max", "-1", "lots", "\x00"])
def test_an_odd_limit_is_none(groups: Groups, text: str) -> None:
    """Nothing that a kernel writes stops a load."""
    groups.own("0::/app", "nonsense", "")
    groups.v2("app", text)

    assert read_memory(groups.root).total == 64 * GB


def test_this_process_can_be_measured() -> None:
    """The short names read the real files."""
    assert 0 <= available_memory() <= 32 * GB
    assert anonymous_memory() > 0


@pytest.fixture
def reading(monkeypatch: pytest.MonkeyPatch) -> None:
    """10 GiB in all, 6 of them free."""
    monkeypatch.setattr(
        "splitlearn_core.manager.resources.read_memory", lambda: MemoryReading(10 * GB, 6 * GB, "machine")
    )


@pytest.mark.usefixtures("reading")
def test_headroom_and_the_limit_are_taken_off() -> None:
    """Both ledgers of this machine have the same bounds; only how they are charged differs."""
    sample = ResourceManager(headroom=GB).sample()
    assert (sample.total["host"], sample.free["host"]) == (9 * GB, 5 * GB)
    assert (sample.total["mapped"], sample.free["mapped"]) == (9 * GB, 5 * GB)

    limited = ResourceManager(headroom=GB, max_memory=3 * GB).sample()
    assert (limited.total["host"], limited.free["host"]) == (3 * GB, 3 * GB)

    none = ResourceManager(headroom=20 * GB).sample()
    assert (none.total["host"], none.free["host"]) == (0, 0)


@pytest.mark.usefixtures("reading")
@pytest.mark.parametrize(
    ("requested", "fits", "reason"),
    [
        (None, True, "left"),
        (0, True, "left"),
        (5 * 1024, True, "left"),
        (5 * 1024 + 1, False, "free"),
        (9 * 1024 + 1, False, "all of host"),
    ],
)
def test_a_report_says_whether_it_fits_and_why(requested: float | None, fits: bool, reason: str) -> None:
    """With the numbers it was decided by; the report is true if it fits."""
    report = ResourceManager(headroom=GB).check_available_resources(requested)

    assert (report.fits, bool(report)) == (fits, fits)
    assert (report.free, report.limit, report.ledger) == (5 * GB, 9 * GB, "host")
    assert report.needed == (requested or 0) * MB
    assert reason in report.why


@pytest.mark.parametrize("requested", [-1, math.nan, math.inf])
def test_an_amount_that_is_none_is_refused(requested: float) -> None:
    """A ConfigurationError with a hint."""
    with pytest.raises(ConfigurationError, match="memory_mb") as caught:
        ResourceManager().check_available_resources(requested)
    assert caught.value.hint


@pytest.mark.heavy
@pytest.mark.parametrize("device", ["tpu:7", "cuda:99"])
def test_an_unknown_device_is_refused(device: str) -> None:
    """Named, with what there is."""
    with pytest.raises(ConfigurationError, match=device) as caught:
        ResourceManager().check_available_resources(1, device)
    assert caught.value.hint


class Cuda(SimpleNamespace):
    """Two devices; torch keeps 1 GiB of the second for later."""

    def __init__(self, *, begun: bool) -> None:
        super().__init__()
        self.begun, self.emptied = begun, 0

    def is_initialized(self) -> bool:
        return self.begun

    def device_count(self) -> int:
        return 2

    def current_device(self) -> int:
        return 1

    def mem_get_info(self, number: int) -> tuple[int, int]:
        return (5 + number) * GB, 8 * GB

    def memory_reserved(self, number: int) -> int:
        return 3 * GB * number

    def memory_allocated(self, number: int) -> int:
        return 2 * GB * number

    def empty_cache(self) -> None:
        self.emptied += 1


def test_cuda_devices_have_ledgers_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch keeps for later can be had by this process."""
    monkeypatch.setitem(sys.modules, "torch.cuda", Cuda(begun=True))

    sample = ResourceManager().sample()

    assert (sample.free["cuda:0"], sample.total["cuda:0"]) == (5 * GB, 8 * GB)
    assert (sample.free["cuda:1"], sample.total["cuda:1"]) == (7 * GB, 8 * GB)
    assert [ledger_of(device) for device in ("cpu", "mps", "cuda", "cuda:0", "xpu:3")] == [
        "host", "host", "cuda:1", "cuda:0", "xpu:3",
    ]  # fmt: skip


@pytest.mark.parametrize("module", [Cuda(begun=False), SimpleNamespace(), None])
def test_who_does_not_use_cuda_pays_nothing_for_it(monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
    """Reading a device creates a context there, so an idle one is not read; nor is a half-imported module used."""
    monkeypatch.setitem(sys.modules, "torch.cuda", module)

    assert set(ResourceManager().sample().total) == {"host", "mapped"}
    assert ledger_of("cuda") == "cuda:0"
    ResourceManager().release_unused()


def test_reading_imports_no_torch(world: Any) -> None:
    """A server that only lists its models never pays for it."""
    done = world.python(
        "-c",
        "import sys; from splitlearn_core.manager.resources import ResourceManager as R; R().sample(); "
        "R().release_unused(); print('torch' in sys.modules)",
    )
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_unused_memory_goes_back_to_the_system() -> None:
    """What an allocator keeps of many small pieces is given back."""
    pieces = [b"x" * size for size in range(60_000, 64_000)]
    kept = pieces[::50]
    del pieces
    before = anonymous_memory()

    ResourceManager().release_unused()

    assert before - anonymous_memory() > 100 * MB
    assert len(kept) == 80


@pytest.mark.usefixtures("reading")
def test_a_sample_is_a_value() -> None:
    """Two samples of the same state are equal."""
    assert ResourceManager().sample() == ResourceManager().sample()
    assert isinstance(ResourceManager().sample(), MemorySample)


@pytest.mark.heavy
@pytest.mark.skipif(sys.platform != "linux", reason="glibc alone keeps large blocks")
def test_large_blocks_can_be_returned_at_once(world: Any) -> None:
    """Whatever size was freed before: without the call, the second block would stay in the heap."""
    done = world.warm_python(
        "-c",
        "import threading\nimport torch\n"
        "from splitlearn_core.system_memory import anonymous_memory, return_large_blocks\n"
        "assert return_large_blocks()\n"
        "grown = []\n"
        "def work():\n"
        "    for size in (30, 20, 20):\n"
        "        before = anonymous_memory()\n"
        "        block = torch.ones(size * 2**18)\n"
        "        del block\n"
        "        grown.append(anonymous_memory() - before)\n"
        "work()\nthread = threading.Thread(target=work)\nthread.start()\nthread.join()\n"
        "assert max(grown[1:]) < 2**20, grown\n",
    )

    assert done.returncode == 0, done.stderr


def test_the_memory_of_a_process_that_has_ended() -> None:
    """Its absence is an error of the system's kind, on every system."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    with pytest.raises(ProcessLookupError, match=str(ended.pid)):
        anonymous_memory(ended.pid)
