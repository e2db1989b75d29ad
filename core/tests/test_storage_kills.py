"""A save that is killed, at any step, leaves the old split or the new one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from splitlearn_core import ConfigurationError, Progress, merge_split, save_split, verify_saved
from splitlearn_core.storage import atomic as swap
from splitlearn_core.storage.atomic import recover, replacing
from support.long import cases

pytestmark = [
    pytest.mark.usefixtures("llama"),
    pytest.mark.skipif(sys.platform == "win32", reason="processes are forked and killed"),
]

#: Of what a save does to files every so manieth is interrupted: each in the long tests. A prime number,
#: so that it is not the same step of each component.
STEP = cases(1, 7)
#: Kills itself at the n-th thing that it does to files, for n in steps, until nothing is left to interrupt.
DRIVER = """
import os, signal, sys
from pathlib import Path
from splitlearn_core import save_split, verify_saved
from splitlearn_core.storage import atomic
from splitlearn_core.storage.directory import SplitDirectory

source, out, exchange, step = sys.argv[1], Path(sys.argv[2]), sys.argv[3] == "exchange", int(sys.argv[4])
OLD, NEW = (2, 4), (1, 3)
WATCHED = ("open", "os.", "shutil.", "ctypes.dlsym")
if not exchange:
    atomic._exchange = lambda source, target: False


def cut():
    split = SplitDirectory.open(out)
    points = {saved.manifest.origin.split_points for saved in split.components.values()}
    assert len(split.components) == 3 and len(points) == 1, (split, points)
    result = verify_saved(out)
    assert result.sound, result.problems
    return points.pop()


def run(stop):
    seen = 0

    def count(event=None, arguments=None):
        nonlocal seen
        if event is not None and not event.startswith(WATCHED):
            return
        # Files that are only read say nothing new; directories are opened without a mode.
        if event == "open" and arguments[1] is not None and not set("wxa") & set(arguments[1]):
            return
        seen += 1
        if seen == stop:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    save_split(source, out, NEW, overwrite=True, progress=lambda progress: count())
    os._exit(0)


save_split(source, out, OLD)
found, stop = [], 1 - step
while True:
    stop += step
    child = os.fork()
    if child == 0:
        try:
            run(stop)
        except BaseException as error:
            print("child", repr(error), flush=True)
            os._exit(9)
    status = os.waitpid(child, 0)[1]
    if status == 0:
        break
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
    if not exchange:
        atomic.recover(out)
    found.append(cut())
    # Without leftovers every run takes the same steps, so that none is skipped.
    atomic.recover(out)
    if found[-1] == NEW:
        # Back to the start, so that every step is once the one that was interrupted.
        save_split(source, out, OLD, overwrite=True)
assert cut() == NEW
save_split(source, out, OLD, overwrite=True)
left = [path.name for path in out.parent.iterdir() if path.name.startswith("." + out.name)]
assert left == [], left
print(len(found), found.count(OLD), found.count(NEW))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="two directories change places on Linux alone")
def test_a_killed_save_leaves_the_old_or_the_new(llama: Any, single: Path, tmp_path: Path) -> None:
    """Killed before each access to a file and each chunk; the directory is whole at every moment."""
    done = llama.python("-c", DRIVER, str(single), str(tmp_path / "out"), "exchange", str(STEP))

    assert done.returncode == 0, done.stdout + done.stderr
    kills, old, new = map(int, done.stdout.split())
    assert kills > 50 // STEP
    assert old > 30 // STEP
    assert new > 10 // STEP


def test_without_an_exchange_the_next_save_puts_it_back(llama: Any, single: Path, tmp_path: Path) -> None:
    """On systems where two directories cannot change places in one step, recovery comes first."""
    done = llama.python("-c", DRIVER, str(single), str(tmp_path / "out"), "two steps", str(STEP))

    assert done.returncode == 0, done.stdout + done.stderr
    kills, old, new = map(int, done.stdout.split())
    assert kills > 50 // STEP
    assert old > 30 // STEP
    assert new > 10 // STEP


def test_what_is_being_written_is_left_alone(tmp_path: Path) -> None:
    """Two saves to one place: the second is refused, and leaves the first one's files alone."""
    target = tmp_path / "out"
    with replacing(target, None) as first:
        (first / "one").write_text("1")
        assert recover(target)
        with pytest.raises(ConfigurationError, match="another process is writing"), replacing(target, None):
            pass
        assert (first / "one").exists()
    assert [path.name for path in target.iterdir()] == ["one"]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".out")] == []


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("there", ["nothing", "split", "merged"])
def test_what_appears_meanwhile_is_not_removed(
    single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool, there: str
) -> None:
    """A foreign folder, in the place of nothing or of the earlier split: the save is refused, the folder stays."""
    out = tmp_path / "out"
    if not exchange:
        monkeypatch.setattr(swap, "_rename", lambda source, target, flag: False)
    save_split(single, tmp_path / "parts", (2, 4))
    if there == "split":
        save_split(single, out, (2, 4))

    def appear(progress: Progress) -> None:
        if progress.stage in ("saving", "merging") and not (out / "thesis.txt").exists():
            if out.exists():
                out.rename(tmp_path / "aside")
            out.mkdir()
            (out / "thesis.txt").write_text("mine")

    def write() -> None:
        if there == "merged":
            merge_split(tmp_path / "parts", out=out, progress=appear)
        else:
            save_split(single, out, (1, 3), overwrite=True, progress=appear)

    with pytest.raises(ConfigurationError, match="changed by another process"):
        write()

    assert (out / "thesis.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".out")] == []


@pytest.mark.parametrize("exchange", [True, False])
def test_what_appears_in_the_last_moment_is_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    """Between the last look and the swap: what came out is looked at again."""
    out = tmp_path / "out"
    out.mkdir()
    real, looks = swap.snapshot, []

    def look(target: Path) -> Any:
        found = real(target)
        looks.append(target)
        if len(looks) == 1:
            (out / "thesis.txt").write_text("mine")
        return found

    earlier = real(out)
    monkeypatch.setattr(swap, "snapshot", look)
    if not exchange:
        monkeypatch.setattr(swap, "_exchange", lambda source, target: False)

    with pytest.raises(ConfigurationError, match="changed by another process"), replacing(out, earlier) as fresh:
        (fresh / "new").write_text("new")

    assert [path.name for path in out.iterdir()] == ["thesis.txt"]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".out")] == []


def test_a_leftover_of_another_directory_is_left_alone(single: Path, tmp_path: Path) -> None:
    """Names that merely look alike belong to others."""
    other = tmp_path / ".other.splitlearn-12"
    other.mkdir()
    mine = tmp_path / ".out.splitlearn-12"
    mine.mkdir()

    save_split(single, tmp_path / "out", (2, 4))

    assert other.is_dir()
    assert not mine.exists()
    assert verify_saved(tmp_path / "out").sound
