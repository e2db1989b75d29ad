"""The property tests of the machine catch mistakes of one line, one at a time."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from splitlearn_core.errors import SplitLearnError
from splitlearn_core.manager import admission, attempt, machine

#: In the order in which they import each other.
SOURCES = {"admission": admission, "attempt": attempt, "machine": machine}

#: Random lives in which each must be caught.
LIVES = 2000
#: Mistakes that few lives meet -> the first that does, where the search begins. It goes on from there, so that a seed
#: that is out of date costs time alone.
FIRST_LIFE = {
    "I3: an older generation comes back next to a newer one": 536,
    "I4: a worker that was planning and is stuck cannot come back": 13,
    "I7: a waiter that leaves takes the others along": 29,
    "I13: victims that do not suffice": 67,
    "I13: needless victims": 92,
    "I16: a model that is reloaded goes first": 44,
    "I18: use does not put expiry off": 18,
    "I20: waiting is counted from 0 in each status": 124,
    "I26: closing forgets what drains": 108,
    "I31: a generation to be reloaded serves until then, whichever load waits for it": 76,
    "I33: a model that nobody needs is started again": 28,
    "I33: every restart comes after the same time": 21,
    "I33: a host that dies during the warm-up is forgotten": 22,
    "I31: reloads of pinned models wait their turn": 16,
}

#: What goes wrong: (file, the line as it is, the line as it must not be).
MUTATIONS = {
    "I2: waiters of a failed load are forgotten": (
        "machine",
        "        self._resolve(generation, failure)\n        model = self._models[generation.model_id]\n",
        "        model = self._models[generation.model_id]\n",
    ),
    "I3: an older generation comes back next to a newer one": (
        "machine",
        "if not any(g.status in (_S.READY, _S.DRAINING, _S.UNLOADING) for g in newer):",
        "if True:",
    ),
    "I4: a worker that was planning and is stuck cannot come back": (
        "machine",
        "self._expect(key, what, *statuses, _S.CANCELLING, _S.STUCK)",
        "self._expect(key, what, *statuses, _S.CANCELLING)",
    ),
    "I6: one worker too many": ("machine", "< self.limits.max_workers\n", "<= self.limits.max_workers\n"),
    "I7: a waiter that leaves takes the others along": (
        "machine",
        "generation.waiters -= 1\n",
        "generation.waiters = 0\n",
    ),
    "I8: the worker is not requested to stop": (
        "machine",
        "            self._effects.append(m.StopWorker(generation.key, cause))\n",
        "",
    ),
    "I8: a cancelled load gives its memory back before its worker does": (
        "attempt",
        "return self.held if status in RESERVED | CHARGED else {}",
        "return self.held if status in (RESERVED | CHARGED) - {_S.CANCELLING} else {}",
    ),
    "I10: less than the peak is promised": (
        "attempt",
        "            return self.needs\n",
        "            return self.keeps or self.needs\n",
    ),
    "I10: places are not given back": ("machine", "self._held_models += sign\n", "self._held_models += max(0, sign)\n"),
    "I11: mapped weights are counted twice": ("machine", "0 if name == MAPPED else ", ""),
    "I13: a load is refused after others went for it": ("machine", "and not verdict.soon ", ""),
    "I13: what leaves already does not count": (
        "admission",
        "lacking = _without(short, going)",
        "lacking = dict(short)",
    ),
    "I13: victims that do not suffice": (
        "admission",
        "                return _needed(chosen, lacking)\n    return []\n",
        "                return _needed(chosen, lacking)\n    return chosen\n",
    ),
    "I13: needless victims": ("admission", "        if min(rest.values()) < 0:\n", "        if True:\n"),
    "I15: a model is freed under those who have it": (
        "machine",
        "if generation.leases and not force:",
        "if generation.leases > 1 and not force:",
    ),
    "I16: pinned models go": (
        "machine",
        "        if idle and not generation.request.pinned:\n",
        "        if idle:\n",
    ),
    "I16: lent models go": (
        "machine",
        "        self._set_idle(generation, idle=False)\n        generation.leases += 1\n",
        "        generation.leases += 1\n",
    ),
    "I16: a model that is reloaded goes first": (
        "machine",
        "if reload is None or (reload.status is _S.WAITING and reload.rank > gainer.rank):",
        "if True:",
    ),
    "I17: a closed manager lends": (
        "machine",
        "    def _lease_taken(self, event: m.LeaseTaken) -> None:\n        self._refuse_if_closed()\n",
        "    def _lease_taken(self, event: m.LeaseTaken) -> None:\n",
    ),
    "I18: use does not put expiry off": ("attempt", "(self.last_used_at or ready) + keep", "ready + keep"),
    "I19: ready before all bytes are there": (
        "machine",
        "replace(generation.progress, bytes_done=generation.progress.bytes_total)",
        "generation.progress",
    ),
    "I20: waiting is counted from 0 in each status": (
        "machine",
        "waited = generation.waited + self._now",
        "waited = self._now",
    ),
    "I26: closing forgets what drains": (
        "machine",
        'self._drain(generation, "the manager is closing", force=event.force)',
        'self._drain(generation, "the manager is closing")',
    ),
    "I30: later loads pass earlier ones": ("machine", "key=lambda g: g.rank) if", "key=lambda g: -g.order) if"),
    "I30: later loads take what earlier ones will need": ("machine", " - ahead.get(name, 0)", ""),
    # The rule of versions before: two reloads wait for each other's old generation.
    "I31: a generation to be reloaded serves until then, whichever load waits for it": (
        "machine",
        "if reload is None or (reload.status is _S.WAITING and reload.rank > gainer.rank):",
        "if reload is None:",
    ),
    "I33: leases of a host that has died are not broken": (
        "machine",
        "        broken, generation.leases = generation.leases, 0\n        if generation.ready_at",
        "        broken = generation.leases\n        if generation.ready_at",
    ),
    "I33: a model that nobody needs is started again": ("machine", "        elif is_wanted:\n", "        else:\n"),
    "I33: every restart comes after the same time": ("machine", " * 2.0 ** min(model.restarts, _MAX_DOUBLINGS)", ""),
    "I33: restarts have no limit": (
        "machine",
        "if model.restarts >= generation.request.restart_limit:",
        "if False:",
    ),
    "I33: a host that dies during the warm-up is forgotten": (
        "machine",
        "            generation.host_failure = event.failure\n",
        "            pass\n",
    ),
    "I32: failures are kept without bound": ("machine", "while len(failed) > self.limits.max_failed:", "while False:"),
    "I31: reloads of pinned models wait their turn": ("machine", "generation.goes_before = int(place)", "pass"),
    "I31: reloads of pinned models wait for each other": (
        "machine",
        "            if any(not self._waits_for_a_reload(g, reloads, for_good=True) for g in reloads):\n",
        "            if True:\n",
    ),
}


def properties() -> ModuleType:
    """Import the neighbouring file; the tests are not a package."""
    path = Path(__file__).with_name("test_manager_properties.py")
    spec = importlib.util.spec_from_file_location("splitlearn_manager_properties", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def mutant(monkeypatch: pytest.MonkeyPatch, file: str, old: str, new: str) -> ModuleType:
    """Compile the machine, and what it imports, with one line changed."""
    for name, module in SOURCES.items():
        source = Path(module.__file__ or "").read_text(encoding="utf-8")
        if name == file:
            assert source.count(old) == 1, f"{old!r} is {source.count(old)} times in {name}.py: fix this list"
            source = source.replace(old, new)
        for other in SOURCES:
            source = source.replace(f"splitlearn_core.manager.{other} import", f"splitlearn_mutant_{other} import")
        changed = ModuleType(f"splitlearn_mutant_{name}")
        monkeypatch.setitem(sys.modules, changed.__name__, changed)
        exec(compile(source, f"<mutant of {name}>", "exec"), changed.__dict__)
    return sys.modules["splitlearn_mutant_machine"]


@pytest.fixture(scope="module")
def lives(request: pytest.FixtureRequest) -> ModuleType:
    # Its dataclasses look their annotations up in the module.
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "splitlearn_manager_properties", ModuleType("splitlearn_manager_properties"))
        return properties()


# They test the tests: all of them after a change to the machine or to its properties.
@pytest.mark.sample(12)
@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_is_caught(name, lives, monkeypatch):
    class Mutated(lives.Lives):
        source = mutant(monkeypatch, *MUTATIONS[name])

    with pytest.raises((AssertionError, SplitLearnError, pytest.fail.Exception)):
        live(Mutated, lives.wander, FIRST_LIFE.get(name, 0))


def live(kind, wander, first):
    for number in range(LIVES):
        wander(kind, (first + number) % LIVES)


def test_the_first_lives_are_those_of_mutations():
    """A name that is written wrongly would cost time in silence."""
    assert FIRST_LIFE.keys() <= MUTATIONS.keys()
