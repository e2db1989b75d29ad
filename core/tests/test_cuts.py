"""What leaves the data owner: clipped, with noise that only the owner can draw, quantised, counted; or unchanged."""

from __future__ import annotations

import copy
import math
import pickle
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint as recomputed

from splitlearn_core import (
    BrokenPluginError,
    ConfigurationError,
    Cut,
    PrivacyLedger,
    Release,
    SplitCausalLM,
    load_split_model,
)
from splitlearn_core.cut_stage import GRADIENTS, STATES, Crossing
from splitlearn_core.cuts.secret_noise import SecretNoise, gaussian, gaussian_bytes
from splitlearn_core.hosts.protocol import Kind
from splitlearn_core.hosts.sessions import SessionTable
from splitlearn_core.plugins.registry import registry, reset_registry
from support.hosts import MemoryEndpoint, lost, remote

IDS = torch.arange(1, 17).reshape(2, 8)


def load(folder: Path, points: tuple[int, ...] = (2, 4)) -> Any:
    return load_split_model(None, points, folder, strategy="copied", progress=False)


@pytest.fixture
def parts(llama: Any, checkpoint: Callable[[str], Path]) -> Any:
    return load(checkpoint("single"))


class Sent:
    """What enters and leaves the trunk: the messages, as its host sees them."""

    def __init__(self, trunk: Any) -> None:
        self.states: list[torch.Tensor] = []
        self.gradients: list[torch.Tensor] = []
        self._hooks = [
            trunk.register_forward_pre_hook(self._before, with_kwargs=True),
            trunk.register_forward_hook(self._after),
        ]

    def _before(self, trunk: Any, args: Any, kwargs: Any) -> None:
        self.states.append((args[0] if args else kwargs["hidden_states"]).detach().clone())

    def _after(self, trunk: Any, args: Any, output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda gradient: self.gradients.append(gradient.clone()))


def trained(model: Any, ids: torch.Tensor = IDS) -> dict[str, torch.Tensor]:
    """Return loss and all gradients of one step."""
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}


def norms(tensor: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(tensor, dim=(1, 2))


@pytest.mark.parametrize("points", [(2,), (2, 4), (1, 3, 5)])
def test_empty_cuts_change_no_bit(llama: Any, checkpoint: Callable[[str], Path], whole: Any, points: Any) -> None:
    """Loss, every gradient, evaluation and generation are the unsplit model's."""
    unsplit = copy.deepcopy(whole)
    model = SplitCausalLM(*load(checkpoint("single"), points), cuts=[Cut()] * len(points))
    expected, actual = trained(unsplit), trained(model)
    assert expected.keys() == actual.keys()
    assert [name for name, value in expected.items() if not torch.equal(value, actual[name])] == []
    with torch.no_grad():
        assert torch.equal(model.eval()(IDS).logits, unsplit.eval()(IDS).logits)
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(IDS, **options), unsplit.generate(IDS, **options))


def test_the_base_model_sends_the_same(parts: Any) -> None:
    """What asks for ``model.model`` gets its final norm, and its messages are treated and counted."""
    model = SplitCausalLM(*parts, cuts=[Cut(clip=1.0), Cut()]).eval()
    sent = Sent(parts.trunk)
    with torch.no_grad():
        model(IDS)
        model.model(IDS)
    assert torch.equal(*sent.states)
    assert list(model.ledger.releases.values()) == [4]


def test_hidden_states_are_clipped_by_window_and_gradients_too(parts: Any) -> None:
    """All positions of a sequence together, at the cut where each leaves; shorter ones stay as they are."""
    plain = SplitCausalLM(*parts, cuts=[Cut(), Cut()])
    sent = Sent(parts.trunk)
    trained(plain)
    bounds = 1.001 * float(norms(sent.states[0]).min()), 0.5 * float(norms(sent.gradients[0]).min())
    model = SplitCausalLM(*parts, cuts=[Cut(clip=bounds[0]), Cut(clip=bounds[1])])
    trained(model)
    assert torch.allclose(norms(sent.states[1]).max(), torch.tensor(bounds[0]))
    assert torch.allclose(norms(sent.gradients[1]), torch.tensor(bounds[1]))
    assert torch.equal(sent.states[0][norms(sent.states[0]).argmin()], sent.states[1][norms(sent.states[0]).argmin()])


def test_clipping_is_differentiated(parts: Any) -> None:
    """A clipped bottom learns what the loss asks of it: its gradient is that of finite differences."""
    model = SplitCausalLM(*parts, cuts=[Cut(clip=1.0), Cut()]).double()
    weight = model.bottom.get_parameter("model.layers.0.mlp.down_proj.weight")

    def loss() -> torch.Tensor:
        return model(input_ids=IDS, use_cache=False).logits.square().sum()

    (expected,) = torch.autograd.grad(loss(), weight)
    direction, losses = expected / expected.norm(), []
    for step in (1e-3, -1e-3):
        with torch.no_grad():
            weight += step * direction
            losses.append(loss())
            weight -= step * direction
    # The norms of this family are computed in float32.
    assert torch.allclose((losses[0] - losses[1]) / 2e-3, expected.norm(), rtol=0.01)


@pytest.mark.parametrize("cuts", [[Cut(noise=0.5), Cut()], [Cut(), Cut(noise=0.5)]])
def test_noise_is_not_that_of_torchs_generators(parts: Any, cuts: list[Cut]) -> None:
    """Their state stays as it was and decides about nothing; the noise has the size that was given."""
    model, plain = SplitCausalLM(*parts, cuts=cuts), SplitCausalLM(*parts)
    sent = Sent(parts.trunk)
    trained(plain)
    for _ in range(2):
        with torch.random.fork_rng():
            torch.manual_seed(3)
            before = torch.get_rng_state()
            trained(model)
            assert torch.equal(torch.get_rng_state(), before)
    which = sent.states if cuts[0].noise else sent.gradients
    first, second = which[1] - which[0], which[2] - which[0]
    assert not torch.equal(first, second)
    assert abs(float(first.std()) - 0.5) < 0.05
    assert abs(float((first * second).mean())) < 0.05


def test_drawn_noise_is_normal() -> None:
    """Mean, variance, tails and independence of neighbours; odd numbers of values, too."""
    shape = torch.Size((1, 3, 33_333))
    values = gaussian(SecretNoise(1, "test").read(1, gaussian_bytes(shape)), shape).flatten()
    assert values.numel() == 99_999
    assert abs(float(values.mean())) < 0.02
    assert abs(float(values.std()) - 1) < 0.02
    for bound in (1, 2, 3):
        expected = math.erfc(bound / math.sqrt(2))
        assert abs(float((values.abs() > bound).double().mean()) - expected) < 0.01
    assert abs(float((values[1:] * values[:-1]).mean())) < 0.02


def test_a_seed_repeats_noise_and_none_does_not(parts: Any) -> None:
    """Draws of two models of one seed are equal; of cuts and ways of one model they are not."""
    sent = Sent(parts.trunk)
    for cut in (Cut(noise=1.0, seed=1), Cut(noise=1.0, seed=1), Cut(noise=1.0, seed=2), Cut(noise=1.0), Cut(noise=1.0)):
        trained(SplitCausalLM(*parts, cuts=[cut, cut]))
    assert torch.equal(sent.states[0], sent.states[1])
    assert torch.equal(sent.gradients[0], sent.gradients[1])
    distinct = [*sent.states[1:], *sent.gradients[1:]]
    assert len({tensor.numpy().tobytes() for tensor in distinct}) == len(distinct)
    source, other = SecretNoise(1, "states 0"), SecretNoise(1, "gradients 0")
    assert source.read(1, 64) != other.read(1, 64)
    assert source.read(1, 64) != source.read(2, 64)


def test_a_copy_of_a_model_has_noise_of_its_own(parts: Any) -> None:
    """Equal noise on other text would show the difference of both."""
    model = SplitCausalLM(*parts, cuts=[Cut(noise=1.0), Cut()])
    crossings = model._chain.crossings
    for other in (copy.deepcopy(crossings), pickle.loads(pickle.dumps(crossings))):
        keys = {id(each): each._ways[0, STATES].draws.source._key for each in (crossings, other)}
        assert len(set(keys.values())) == 2
    assert copy.deepcopy(crossings).ledger is model.ledger


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_sends_the_same_bytes(parts: Any, reentrant: bool) -> None:
    """A forward that is computed again draws nothing and is not counted; one for another step draws."""
    model = SplitCausalLM(*parts, cuts=[Cut(noise=0.1), Cut(noise=0.1)]).train()
    sent = Sent(parts.trunk)

    def loss(embedded: torch.Tensor) -> torch.Tensor:
        return model(inputs_embeds=embedded, labels=IDS, use_cache=False).loss

    for _ in range(2):
        embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()
        result = recomputed(loss, embedded, use_reentrant=reentrant)
        result.backward()
    assert len(sent.states) == 4
    assert torch.equal(sent.states[0], sent.states[1])
    assert torch.equal(sent.states[2], sent.states[3])
    assert not torch.equal(sent.states[0], sent.states[2])
    assert sorted((release.what, count) for release, count in model.ledger.releases.items()) == [
        (GRADIENTS, 4),
        (STATES, 4),
    ]


def test_the_trainers_gradient_checkpointing_draws_once(parts: Any) -> None:
    """It computes layers again, within components: nothing crosses a cut twice."""
    model = SplitCausalLM(*parts, cuts=[Cut(noise=0.1), Cut(noise=0.1)]).train()
    # transformers 5.24 has another name for it, and warns of the old one.
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    sent = Sent(parts.trunk)
    trained(model)
    assert (len(sent.states), len(sent.gradients)) == (1, 1)
    assert set(model.ledger.releases.values()) == {2}


def test_a_backward_that_is_repeated_sends_the_same_gradient(parts: Any) -> None:
    """On one graph, which is kept."""
    model = SplitCausalLM(*parts, cuts=[Cut(), Cut(noise=0.1)])
    sent = Sent(parts.trunk)
    loss = model(IDS, labels=IDS, use_cache=False).loss
    loss.backward(retain_graph=True)
    loss.backward()
    assert torch.equal(*sent.gradients)
    assert [count for release, count in model.ledger.releases.items() if release.what == GRADIENTS] == [2]


@pytest.mark.parametrize("kind", [Kind.STEP, Kind.BACKWARD])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_message_that_is_sent_again_has_the_same_bytes(parts: Any, kind: Kind, moment: str) -> None:
    """A lost request, and a lost reply."""
    endpoint = MemoryEndpoint(lambda: SessionTable(parts.trunk))
    failed = []

    def fail(number: int, frame: Any) -> None:
        if frame.kind is kind and not failed:
            failed.append(number)
            raise lost()

    setattr(endpoint, moment, fail)
    model = SplitCausalLM(parts.bottom, remote(endpoint), parts.top, cuts=[Cut(noise=0.1), Cut(noise=0.1)])
    trained(model)
    twice = [frame for frame in endpoint.frames if frame.kind is kind]
    assert len(twice) == 2
    assert [bytes(buffer) for buffer in twice[0].buffers] == [bytes(buffer) for buffer in twice[1].buffers]
    assert set(model.ledger.releases.values()) == {2}


def test_a_step_that_failed_and_is_made_again_sends_the_same_bytes(parts: Any) -> None:
    """The server may have seen the first; the call after that has new noise."""
    endpoint = MemoryEndpoint(lambda: SessionTable(parts.trunk))
    model = SplitCausalLM(parts.bottom, remote(endpoint, wait=0), parts.top, cuts=[Cut(noise=0.1), Cut()]).eval()

    def fail(number: int, frame: Any) -> None:
        if frame.kind is Kind.STEP and len(steps()) == 1:
            raise lost()

    def steps() -> list[bytes]:
        return [bytes(frame.buffers[0]) for frame in endpoint.frames if frame.kind is Kind.STEP]

    endpoint.before = fail
    with torch.no_grad():
        with pytest.raises(Exception, match="the connection broke"):
            model(IDS)
        model(IDS)
        model(IDS)
    first, second, third = steps()
    assert first == second != third
    assert list(model.ledger.releases.values()) == [4]


def test_a_remote_trunk_gets_what_a_local_one_gets(parts: Any) -> None:
    """Hidden states, gradients and the results are equal to the last bit."""
    cuts = [Cut(clip=5.0, noise=0.1, quantize="int8", seed=1), Cut(clip=0.1, noise=0.01, quantize="int4", seed=1)]
    local = SplitCausalLM(*parts, cuts=cuts)
    sent = Sent(parts.trunk)
    expected = trained(local)
    endpoint = MemoryEndpoint(lambda: SessionTable(parts.trunk))
    trunk = remote(endpoint)
    apart = Sent(trunk)
    actual = trained(SplitCausalLM(parts.bottom, trunk, parts.top, cuts=cuts))
    assert torch.equal(sent.states[0], apart.states[0])
    assert torch.equal(sent.gradients[0], apart.gradients[0])
    assert [name for name, value in actual.items() if not torch.equal(value, expected[name])] == []


def test_a_pair_is_for_hidden_states_and_gradients(llama: Any, checkpoint: Callable[[str], Path]) -> None:
    """At the only cut, and at one between two trunks, both leave; at others one of them does."""
    cut = Cut(clip=(1.0, None), noise=(None, 0.5), quantize=("int8", None))
    assert (cut.of(STATES).clip, cut.of(GRADIENTS).clip) == (1.0, None)
    ways = {
        1: {(0, STATES), (0, GRADIENTS)},
        2: {(0, STATES), (1, GRADIENTS)},
        3: {(0, STATES), (1, STATES), (1, GRADIENTS), (2, GRADIENTS)},
    }
    folder = checkpoint("single")
    for count, expected in ways.items():
        points = ((2,), (2, 4), (1, 3, 5))[count - 1]
        model = SplitCausalLM(*load(folder, points), cuts=[cut] * count)
        assert set(model._chain.crossings._ways) == expected
        trained(model)
        assert {(release.cut, release.what) for release in model.ledger.releases} == expected


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"clip": 0}, "clip=0 at a cut is not a positive number"),
        ({"noise": float("nan")}, "noise=nan"),
        ({"noise": True}, "noise=True"),
        ({"clip": "1"}, "clip='1'"),
        ({"clip": (1.0, 2.0, 3.0)}, "a pair"),
        ({"quantize": "int2"}, "quantize='int2'"),
        ({"stages": "largest"}, "not names or stages"),
        ({"stages": ("nowhere",)}, "cut stage 'nowhere' is not installed (installed: none)"),
        ({"seed": 0.5}, "not a whole number"),
    ],
)
def test_what_cannot_be_a_cut_is_refused(arguments: dict[str, Any], words: str) -> None:
    """When it is made, with what it may be."""
    with pytest.raises(ConfigurationError, match=re.escape(words)):
        Cut(**arguments)


def test_cuts_that_do_not_fit_the_model_are_refused(parts: Any) -> None:
    """One for each cut; and a ledger only with cuts."""
    for cuts in ([Cut()], [Cut()] * 3, Cut(), [None, Cut()]):
        with pytest.raises(ConfigurationError, match="a model with 2 cuts"):
            SplitCausalLM(*parts, cuts=cuts)
    with pytest.raises(ConfigurationError, match="a model with 2 cuts"):
        SplitCausalLM(*parts, ledger=PrivacyLedger())
    with pytest.raises(ConfigurationError, match="made without cuts"):
        _ = SplitCausalLM(*parts).ledger


# --- stages of plugins ---------------------------------------------------------------------------------

STAGE = """
class Signs:
    '''Sends the signs, and flips each with probability 1/256.'''

    name = "signs"

    def apply(self, values, crossing):
        import torch
        data = crossing.random_bytes(values.numel())
        flipped = torch.frombuffer(bytearray(data), dtype=torch.uint8).reshape(values.shape) == 0
        return torch.where(flipped, -values.sign(), values.sign())


signs = Signs()
"""


def install_stage(world: Any, text: str = STAGE, name: str = "signs") -> None:
    path = world.install(name, text, distribution=f"stage-{name}", group="splitlearn.cut_stages") / "entry_points.txt"
    path.write_text(f"[splitlearn.cut_stages]\n{name} = stage_{name}:signs\n")
    reset_registry()


def test_a_package_adds_a_stage(llama: Any, checkpoint: Callable[[str], Path]) -> None:
    """It is imported where a cut names it, runs after noise, and its randomness is repeated with the message."""
    install_stage(llama, llama.marking("signs") + STAGE)
    parts = load(checkpoint("single"))
    sent = Sent(parts.trunk)
    assert not llama.marker("signs").exists()
    model = SplitCausalLM(*parts, cuts=[Cut(noise=0.1, stages=("signs",), seed=1), Cut(stages=("signs",), seed=1)])
    trained(model)
    trained(model)
    for tensors in (sent.states, sent.gradients):
        assert set(tensors[0].unique().tolist()) <= {-1.0, 0.0, 1.0}
        assert not torch.equal(*tensors)
    trained(SplitCausalLM(*parts, cuts=[Cut(noise=0.1, stages=("signs",), seed=1), Cut()]))
    assert torch.equal(sent.states[2], sent.states[0])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("signs = 1\n", "is 1, which is not a CutStage"),
        (STAGE.replace("Signs()", "Signs"), "not a CutStage"),
        (STAGE.replace('name = "signs"', 'name = "other"'), "named 'signs', but the stage 'other'"),
        ("import surely_absent_package\n", "pip install|importing 'stage_signs' failed"),
        ("", "has no attribute 'signs'"),
    ],
)
def test_a_package_that_adds_no_stage_is_reported(world: Any, text: str, words: str) -> None:
    """By name, with its version."""
    install_stage(world, text)
    with pytest.raises(BrokenPluginError, match=words):
        Cut(stages=("signs",))
    (status,) = (status for status in registry().statuses(check=True) if status.entry.name == "signs")
    assert (status.status, status.entry.what) == ("broken", "cut stage 'signs'")


def test_a_blocked_stage_is_not_imported(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the variable."""
    install_stage(world, world.marking("signs") + STAGE)
    monkeypatch.setenv("SPLITLEARN_PLUGINS", "")
    with pytest.raises(ConfigurationError, match="blocked by SPLITLEARN_PLUGINS"):
        Cut(stages=("signs",))
    assert not world.marker("signs").exists()


def test_a_stage_that_changes_shape_or_dtype_is_refused(parts: Any) -> None:
    """Its name is in the error."""

    class Half:
        name = "half"

        def apply(self, values: torch.Tensor, crossing: Crossing) -> torch.Tensor:
            return values.half()

    model = SplitCausalLM(*parts, cuts=[Cut(stages=(Half(),)), Cut()])
    with pytest.raises(ConfigurationError, match="stage 'half' at cut 0 returned torch"):
        model(IDS)


# --- the ledger ----------------------------------------------------------------------------------------


def released(clip: float | None = 1.0, noise: float | None = 1.0, **others: Any) -> Release:
    values = {"purpose": "training", "cut": 0, "what": STATES, "seeded": False, "trained_ends": False, **others}
    return Release(clip=clip, noise=noise, **values)


def test_releases_are_counted_by_purpose_and_cut(parts: Any) -> None:
    """Training sends both ways; generation a prompt and then a token at a time."""
    model = SplitCausalLM(*parts, cuts=[Cut(), Cut()]).train()
    trained(model)
    model.eval()
    with torch.no_grad():
        model(IDS)
    model.generate(IDS[:1], max_new_tokens=3, do_sample=False)
    counts = {(r.purpose, r.cut, r.what): count for r, count in model.ledger.releases.items()}
    assert counts == {
        ("training", 0, STATES): 2,
        ("training", 1, GRADIENTS): 2,
        ("evaluation", 0, STATES): 2,
        ("generation", 0, STATES): 3,
    }
    assert "generation states: 3" in repr(model.ledger)


def test_a_statement_is_refused_with_its_reasons(parts: Any) -> None:
    """Every missing assumption is reported, for each kind of release."""
    model = SplitCausalLM(*parts, cuts=[Cut(clip=1.0, noise=1.0, seed=1), Cut(clip=1.0)]).train()
    trained(model)
    model.eval().generate(IDS, max_new_tokens=2, do_sample=False)
    statement = model.ledger.statement()
    assert statement.epsilon is None
    for words in (
        "gradients at cut 2 in training were sent without noise",
        "hidden states at cut 1 in training had noise of a given seed",
        "bottom or top were trained",
        "hidden states at cut 1 in generation were sent in pieces",
    ):
        assert any(words in reason for reason in statement.reasons), words
    ledger = PrivacyLedger()
    ledger.count(released(clip=None), [b"1"])
    assert "not clipped" in ledger.statement().reasons[0]


@pytest.mark.parametrize(
    ("noise", "count", "epsilon"),
    [(7.46, 1, 1.0), (1.2, 1, 8.0), (0.25, 1, 65.3), (1, 1, 10.0), (1, 2, 15.5), (1, 6, 32.2)],
)
def test_a_budget_is_that_of_the_gaussian_mechanism(noise: float, count: int, epsilon: float) -> None:
    """Reference values: sensitivity twice the clip, delta 1e-5; how often others were sent does not matter."""
    pytest.importorskip("dp_accounting", reason="dp-accounting is not installed: no budget is computed")
    ledger = PrivacyLedger()
    for _ in range(count):
        ledger.count(released(clip=2.0, noise=2 * noise), [b"first"])
        ledger.count(released(clip=2.0, noise=200.0), [b"second"])
    statement = ledger.statement(delta=1e-5)
    assert statement.epsilon == pytest.approx(epsilon, rel=0.005)
    assert statement.releases == count
    assert any("sensitivity 2C" in assumption for assumption in statement.assumptions)
    assert "one window" in statement.unit


def test_a_budget_of_a_model_counts_passes_over_a_window(parts: Any) -> None:
    """Two epochs with frozen ends, both cuts: four releases of each window, whichever batch it is in."""
    pytest.importorskip("dp_accounting", reason="dp-accounting is not installed: no budget is computed")
    model = SplitCausalLM(*parts, cuts=[Cut(clip=1.0, noise=1.0), Cut(clip=1.0, noise=1.0)]).train()
    for part in (parts.bottom, parts.top):
        part.requires_grad_(False)
    for ids in (IDS, IDS.flip(0)):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    ledger = PrivacyLedger()
    for _ in range(4):
        ledger.count(released(), [b"1"])
    statement = model.ledger.statement()
    assert statement.releases == 4
    assert statement.epsilon == pytest.approx(ledger.statement().epsilon)


def test_without_the_library_the_ledger_counts_and_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """An import that fails is a reason, and no crash."""
    monkeypatch.setitem(__import__("sys").modules, "dp_accounting", None)
    ledger = PrivacyLedger()
    ledger.count(released(), [b"1"])
    statement = ledger.statement()
    assert statement.epsilon is None
    assert "splitlearn-core[accounting]" in statement.reasons[0]


def test_a_ledger_is_kept_with_a_training(parts: Any) -> None:
    """As JSON; what another model releases of the same text is added."""
    import json

    model = SplitCausalLM(*parts, cuts=[Cut(), Cut()]).train()
    trained(model)
    ledger = PrivacyLedger.from_dict(json.loads(json.dumps(model.ledger.to_dict())))
    assert ledger.releases == model.ledger.releases
    again = SplitCausalLM(*parts, cuts=[Cut(), Cut()], ledger=ledger).train()
    trained(again)
    assert ledger.statement().releases == 4
    for values in ({}, {"key": 1, "releases": [], "windows": {}}, {"key": "", "releases": [{}], "windows": {}}):
        with pytest.raises(ConfigurationError, match="not a ledger"):
            PrivacyLedger.from_dict(values)
    with pytest.raises(ConfigurationError, match="has version, which this version does not know"):
        PrivacyLedger.from_dict({**ledger.to_dict(), "version": 9})
    for delta in (0.0, 1.0, -1.0):
        with pytest.raises(ConfigurationError, match="delta"):
            ledger.statement(delta)


def test_threads_have_draws_of_their_own(parts: Any) -> None:
    """Equal text in two threads at once: other noise, and each is counted."""
    model = SplitCausalLM(*parts, cuts=[Cut(noise=0.1), Cut()]).eval()
    sent = Sent(parts.trunk)

    def run() -> None:
        with torch.no_grad():
            model(IDS)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({tensor.numpy().tobytes() for tensor in sent.states}) == 4
    assert list(model.ledger.releases.values()) == [8]
