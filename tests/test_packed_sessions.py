"""Packed sessions: one forward for the steps of several, against the unsplit model on the same pack."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from splitlearn_core import ConfigurationError, SplitCausalLM, load_split_model
from splitlearn_core.build.kv_cache import cache_argument
from splitlearn_core.build.packing import PackItem, can_pack, packed
from splitlearn_core.hosts.client import Host, Patience
from splitlearn_core.hosts.packs import PendingStep
from splitlearn_core.hosts.payload import pack, unpack
from splitlearn_core.hosts.protocol import Frame, Kind
from splitlearn_core.hosts.remote import RemoteComponent
from splitlearn_core.hosts.sessions import SessionTable
from splitlearn_core.testing.worlds import tiny_model, write_checkpoint
from support.hosts import MemoryEndpoint

TYPES = ["gpt2", "qwen2", "gemma", "gemma2", "gemma3_text"]
CUTS = (1, 3)
#: The sequences and tokens of each session's steps: prompts, tokens, several tokens, a session of several sequences.
STEPS = [[(1, 5), (2, 3), (1, 1)], [(1, 1), (2, 1), (1, 12)], [(1, 3), (2, 1), (1, 1)]]


@pytest.fixture
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    values = {"layer_types": ["sliding_attention", "full_attention"] * 3, "sliding_window": 4}
    extra = values if request.param in ("gemma2", "gemma3_text") else {}
    return write_checkpoint(tmp_path, tiny_model(request.param, **extra))


def run(model: Any, config: Any, caches: list[Any], step: list[tuple[int, int]], states: Any, name: str) -> Any:
    items = [PackItem(rows, tokens, cache) for (rows, tokens), cache in zip(step, caches, strict=True)]
    with packed(config, items, next(model.parameters())) as (positions, cache):
        return model(**{name: states}, position_ids=positions, **{cache_argument(type(model).forward): cache})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("folder", "attention"),
    # Gemma 2 caps the logits of its attention, which sdpa does not.
    [(name, kernel) for name in TYPES for kernel in ("sdpa", "eager") if (name, kernel) != ("gemma2", "sdpa")],
    indirect=["folder"],
)
def test_packs_are_those_of_the_unsplit_model(folder: Path, dtype: torch.dtype, attention: str) -> None:
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention)
    parts = load_split_model(None, CUTS, folder, dtype=dtype, attn_implementation=attention, progress=False)
    components = (parts.bottom, parts.trunk, parts.top)
    caches = [[component.new_cache() for _ in STEPS[0]] for component in components]
    whole_caches = [DynamicCache(config=whole.config) for _ in STEPS[0]]
    alone = [DynamicCache(config=whole.config) for _ in STEPS[0]]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for step in STEPS:
            ids = [torch.randint(3, 90, size, generator=generator) for size in step]
            flat = torch.cat([part.reshape(1, -1) for part in ids], dim=1)
            expected = run(whole, whole.config, whole_caches, step, flat, "input_ids").logits
            states, name = flat, "input_ids"
            for component, own in zip(components, caches, strict=True):
                assert can_pack(component.family, component.decoder_config, own[0].layers)
                states, name = run(component, component.decoder_config, own, step, states, name), "hidden_states"
            assert torch.equal(states.logits if hasattr(states, "logits") else states, expected)
            solo = [
                whole(part, **{cache_argument(whole.forward): cache}).logits
                for part, cache in zip(ids, alone, strict=True)
            ]
            near = torch.cat([logits.reshape(1, -1, logits.shape[-1]) for logits in solo], dim=1)
            torch.testing.assert_close(expected, near, atol=2e-2 if dtype == torch.bfloat16 else 1e-5, rtol=2e-2)


class Sessions:
    """Packed sessions on a trunk, and the steps of each."""

    def __init__(self, trunk: Any, count: int) -> None:
        self.trunk = trunk
        self.table = SessionTable(trunk)
        meta = {"rows": 1, "tokens": 64, "mode": "packed"}
        self.opened = [self.table.handle(Frame(Kind.OPEN, meta=meta)) for _ in range(count)]
        self.done = [0] * count

    def step(self, place: int, states: torch.Tensor) -> PendingStep:
        self.done[place] += 1
        specs, buffers = pack({"hidden_states": states})
        opened = self.opened[place]
        meta = {"secret": opened.meta["secret"], "nonce": str(self.done)}
        step = self.table.pending_step(Frame(Kind.STEP, opened.session, self.done[place], meta, specs, buffers))
        assert step is not None
        return step

    def run(self, *steps: PendingStep) -> list[Frame]:
        """Run steps together until each has its reply."""
        while left := [step for step in steps if step.reply is None]:
            self.table.run_pack(left)
        return [step.reply for step in steps if step.reply is not None]


@pytest.fixture(scope="module")
def trunk(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = write_checkpoint(tmp_path_factory.mktemp("qwen2"), tiny_model("qwen2"))
    return load_split_model(None, CUTS, folder, parts=("trunk",), progress=False).trunk


def states_of(trunk: Any, *tokens: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(1, count, trunk.config.hidden_size, generator=generator) for count in tokens]


def outputs(replies: list[Frame]) -> list[torch.Tensor]:
    assert [reply.kind for reply in replies] == [Kind.RESULT] * len(replies), replies
    return [unpack(reply)["output"] for reply in replies]


def in_one_forward(trunk: Any, steps: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    """Run each list of steps as one pack, on new caches; return what the last one gives."""
    caches = [trunk.new_cache() for _ in steps[0]]
    for step in steps:
        items = [PackItem(1, states.shape[1], cache) for states, cache in zip(step, caches, strict=True)]
        with torch.no_grad(), packed(trunk.config, items, step[0]) as (positions, cache):
            result = trunk(hidden_states=torch.cat(step, dim=1), position_ids=positions, past_key_values=cache)
        for own, states in zip(caches, step, strict=True):
            own.advance(states.shape[1])
    return list(torch.split(result, [states.shape[1] for states in steps[-1]], dim=1))


def equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_replies_are_those_of_one_forward(trunk: Any) -> None:
    sessions = Sessions(trunk, 3)
    prompts, tokens = states_of(trunk, 5, 2, 7), states_of(trunk, 1, 1, 1)
    first = sessions.run(*map(sessions.step, range(3), prompts))
    assert equal(outputs(first), in_one_forward(trunk, [prompts]))
    second = sessions.run(*map(sessions.step, range(3), tokens))
    assert equal(outputs(second), in_one_forward(trunk, [prompts, tokens]))
    assert [(reply.meta["mode"], reply.meta["pack"], reply.meta["length"]) for reply in second] == [
        ("packed", 3, 6),
        ("packed", 3, 3),
        ("packed", 3, 8),
    ]


@pytest.mark.parametrize("fault", ["NaN", "width", "dtype"])
def test_a_refused_step_does_not_change_the_others(trunk: Any, fault: str) -> None:
    """One session sends what no component takes: the others get their results, and its session goes on."""
    sessions = Sessions(trunk, 3)
    prompts = states_of(trunk, 4, 4, 4)
    bad = prompts[1].clone()
    if fault == "NaN":
        bad[0, 2, 0] = torch.nan
    bad = {"NaN": bad, "width": bad[..., 1:].contiguous(), "dtype": bad.double()}[fault]
    replies = sessions.run(*map(sessions.step, range(3), [prompts[0], bad, prompts[2]]))
    good = [prompts[0], prompts[2]]
    # What is seen before the forward leaves a pack of the others; after it, each runs alone.
    expected = in_one_forward(trunk, [good]) if fault == "NaN" else [in_one_forward(trunk, [[one]])[0] for one in good]
    assert equal(outputs([replies[0], replies[2]]), expected)
    assert (replies[1].kind, replies[1].meta["code"]) == (Kind.ERROR, "bad_input")
    sessions.done[1] = 0
    assert equal(outputs(sessions.run(sessions.step(1, prompts[1]))), in_one_forward(trunk, [[prompts[1]]]))


def test_a_forward_that_fails_is_repeated_by_each_alone(trunk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sessions = Sessions(trunk, 3)
    prompts, tokens = states_of(trunk, 4, 4, 4), states_of(trunk, 1, 1, 1)
    sessions.run(*map(sessions.step, range(3), prompts))
    layer = sessions.table._packing.layer_modules[CUTS[1] - 1]
    original = layer.forward

    def forward(hidden_states: torch.Tensor, **arguments: Any) -> Any:
        result = original(hidden_states, **arguments)
        # After all caches have grown.
        if (arguments["position_ids"] == 4).sum() > 1 or marked[0]:
            marked[0] = False
            raise MemoryError
        return result

    marked = [False]
    monkeypatch.setattr(layer, "forward", forward)
    replies = sessions.run(*map(sessions.step, range(3), tokens))
    for place, output in enumerate(outputs(replies)):
        alone = Sessions(trunk, 3)
        alone.run(*map(alone.step, range(3), prompts))
        assert torch.equal(output, outputs(alone.run(alone.step(place, tokens[place])))[0])
    marked[0] = True
    (reply,) = sessions.run(sessions.step(0, tokens[0]))
    assert reply.meta["code"] == "out_of_memory"
    sessions.done[0] -= 1
    (reply,) = sessions.run(sessions.step(0, tokens[0]))
    assert reply.meta["length"] == 6


def test_what_cannot_run_is_refused_before_it_shares_a_forward(trunk: Any) -> None:
    """Another number of sequences than the cache has, or positions of other tokens: the other session runs packed."""
    sessions = Sessions(trunk, 3)
    prompts = states_of(trunk, 3, 4, 5)
    sessions.run(*map(sessions.step, range(3), prompts))
    (token,) = states_of(trunk, 1)
    specs, buffers = pack({"hidden_states": token, "position_ids": torch.arange(2)[None]})
    positions = sessions.step(1, token)
    positions.frame = positions.frame._replace(tensors=specs, buffers=buffers)
    rows, positions, good = sessions.run(sessions.step(0, token.repeat(2, 1, 1)), positions, sessions.step(2, token))
    for refusal, what in ((rows, "the cache has 1 sequences"), (positions, "position_ids are [1, 2]")):
        assert refusal.meta["code"] == "bad_input"
        assert what in refusal.meta["message"]
    assert good.meta["mode"] == "packed"
    # What was refused has left its session as it was.
    sessions.done[:2] = [1, 1]
    assert [r.meta["length"] for r in sessions.run(sessions.step(0, token), sessions.step(1, token))] == [4, 5]


def test_a_long_prompt_leaves_room_for_short_steps(trunk: Any) -> None:
    sessions = Sessions(trunk, 2)
    long, first, second = states_of(trunk, 40, 1, 1)
    prompt, token = sessions.step(0, long), sessions.step(1, first)
    sessions.table.run_pack([prompt, token])
    assert prompt.reply is None
    assert token.reply is not None
    after = sessions.step(1, second)
    sessions.table.run_pack([prompt, after])
    assert prompt.reply is None
    assert after.reply is not None
    (reply,) = sessions.run(prompt)
    (whole,) = in_one_forward(trunk, [[long]])
    torch.testing.assert_close(unpack(reply)["output"], whole, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("is_abandoned", [False, True])
def test_a_step_that_has_ended_keeps_no_cache(trunk: Any, is_abandoned: bool) -> None:
    """What it would have restored is freed at once, by the thread that computed, and not by the collector."""
    sessions = Sessions(trunk, 2)
    sessions.run(*(sessions.step(place, states) for place, states in enumerate(states_of(trunk, 20, 20))))
    (session, *_) = sessions.table._sessions.values()
    long, token = states_of(trunk, 40, 1)
    gc.disable()
    try:
        before = weakref.ref(session.cache.layers[0].keys)
        step, other = sessions.step(0, long), sessions.step(1, token)
        sessions.table.run_pack([step, other])
        half = weakref.ref(session.cache.layers[0].keys)
        assert before() is not None
        assert half() is not None
        step.is_abandoned = is_abandoned
        sessions.run(step)
        assert (before() is None) is not is_abandoned
        assert half() is None
    finally:
        gc.enable()


def test_an_abandoned_step_leaves_its_session_as_it_was(trunk: Any) -> None:
    sessions = Sessions(trunk, 2)
    long, token = states_of(trunk, 40, 1)
    prompt, other = sessions.step(0, long), sessions.step(1, token)
    sessions.table.run_pack([prompt, other])
    prompt.is_abandoned = True
    assert sessions.run(prompt)[0].kind is Kind.ERROR
    sessions.done[0] = 0
    (reply,) = sessions.run(sessions.step(0, token))
    assert reply.meta["length"] == 1
    assert torch.equal(unpack(reply)["output"], in_one_forward(trunk, [[token]])[0])


@pytest.mark.parametrize("moment", ["before its first forward", "in the middle"])
def test_a_session_that_gives_up_does_not_change_the_others(trunk: Any, moment: str) -> None:
    """The others' results are, to the last bit, those of the same forwards without what it did not get."""
    prompts, tokens, later = states_of(trunk, 4, 3), states_of(trunk, 1, 1), states_of(trunk, 1, 1)
    (long,) = states_of(trunk, 40)
    given_up, ended = Sessions(trunk, 3), Sessions(trunk, 3)
    for sessions in (given_up, ended):
        sessions.run(sessions.step(0, prompts[0]), sessions.step(1, prompts[1]))
    first, second = given_up.step(0, tokens[0]), given_up.step(1, tokens[1])
    whole = given_up.step(2, long)
    whole.is_abandoned = moment == "before its first forward"
    given_up.table.run_pack([first, second, whole])
    whole.is_abandoned = True
    others = [ended.step(0, tokens[0]), ended.step(1, tokens[1])]
    # As many tokens of a prompt share a forward; a prompt of these alone ends with it.
    share = [ended.step(2, long[:, :16].contiguous())] if moment == "in the middle" else []
    ended.table.run_pack([*others, *share])
    assert equal(outputs([first.reply, second.reply]), outputs([step.reply for step in others]))
    after = given_up.run(given_up.step(0, later[0]), given_up.step(1, later[1]), *([whole] if whole.begun else []))
    expected = ended.run(ended.step(0, later[0]), ended.step(1, later[1]))
    assert equal(outputs(after[:2]), outputs(expected))
    assert whole.reply is not None
    assert whole.reply.kind is Kind.ERROR


def test_a_session_is_rebuilt_and_copied_as_it_is(tmp_path: Path) -> None:
    """A user of one packed session: generation, beams, a restart of the host; each forward is a pack of one."""
    folder = write_checkpoint(tmp_path, tiny_model("qwen2"))
    whole = AutoModelForCausalLM.from_pretrained(folder)
    parts = load_split_model(None, CUTS, folder, progress=False)
    endpoint: Any = MemoryEndpoint(lambda: SessionTable(parts.trunk))
    used = RemoteComponent(Host(endpoint, Patience(5.0, 2**30), mode="packed"), max_tokens=64)
    model = SplitCausalLM(parts.bottom, used, parts.top)
    ids = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0

    def restart(number: int, frame: Frame) -> None:
        if number == 5:  # in the middle
            endpoint.restart()

    answer, replies = endpoint.answered, []
    endpoint.answered = lambda request: replies.append(answer(request)) or replies[-1]
    endpoint.before = restart
    for options in ({}, {"num_beams": 3}):
        settings = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 10, "pad_token_id": 0, **options}
        assert torch.equal(model.generate(ids, **settings), whole.generate(ids, **settings))
    assert {reply.meta["mode"] for reply in replies if reply.kind is Kind.RESULT} == {"packed"}


def test_modes_that_a_host_does_not_have_are_refused(trunk: Any) -> None:
    table = SessionTable(trunk)
    reply = table.handle(Frame(Kind.OPEN, meta={"rows": 1, "tokens": 8, "mode": "parallel"}))
    assert reply.meta["code"] == "bad_input"
    endpoint: Any = MemoryEndpoint(lambda: SessionTable(trunk))
    with pytest.raises(ConfigurationError, match="runs sessions solo, packed"):
        Host(endpoint, Patience(5.0, 2**30), mode="parallel")


def test_other_callers_of_the_component_are_not_disturbed(trunk: Any) -> None:
    """A pack runs on modules of its own: the attention of the component itself stays what it was meanwhile."""
    sessions = Sessions(trunk, 1)
    (states,) = states_of(trunk, 3)
    seen = []
    sessions.run(sessions.step(0, states))
    packing = sessions.table._packing
    hook = packing.register_forward_pre_hook(lambda *_: seen.append(trunk.config._attn_implementation))
    sessions.run(sessions.step(0, states))
    hook.remove()
    assert seen == ["sdpa"]
    shared = dict(trunk.named_parameters())
    assert all(own.data_ptr() == shared[name].data_ptr() for name, own in packing.named_parameters())


def test_a_step_that_is_given_up_before_it_begins_leaves_its_session(trunk: Any) -> None:
    """It neither runs nor keeps the session locked; what fails at its end leaves the session as it was."""
    sessions = Sessions(trunk, 1)
    (states,) = states_of(trunk, 3)
    step = sessions.step(0, states)
    step.is_abandoned = True
    assert sessions.run(step)[0].kind is Kind.ERROR
    sessions.done[0] = 0
    ended = sessions.step(0, states)
    sessions.table.run_pack([ended])
    sessions.done[0] = 1
    failing = sessions.step(0, states)

    def pack_no_more(*_: Any) -> Any:
        raise MemoryError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("splitlearn_core.hosts.sessions.pack", pack_no_more)
        assert sessions.run(failing)[0].kind is Kind.ERROR
    sessions.done[0] = 1
    assert sessions.run(sessions.step(0, states))[0].meta["length"] == 6


def test_layers_that_attend_in_another_way_are_noticed(trunk: Any) -> None:
    """If layers do not use transformers' attention interface, a pack returns no result."""
    sessions = Sessions(trunk, 2)
    states = states_of(trunk, 3, 2)
    first = sessions.run(sessions.step(0, states[0]))
    assert first[0].kind is Kind.RESULT
    for layer in trunk.layer_modules[slice(*CUTS)]:
        # A function is copied as it is, and calls the layer of the component.
        layer.forward = lambda *args, own=layer.forward, **kwargs: own(*args, **kwargs)
    try:
        other = Sessions(trunk, 2)
        replies = other.run(*map(other.step, range(2), states))
    finally:
        for layer in trunk.layer_modules[slice(*CUTS)]:
            del layer.forward
    assert [reply.meta["code"] for reply in replies] == ["failed", "failed"]
