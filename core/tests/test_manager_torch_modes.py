"""Lent models and torch's modes: calls record no gradients unless they are to; a mode held over an await is noticed."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

from splitlearn_core import AsyncModelManager, ModelConfig, SplitCausalLM
from splitlearn_core.build.kv_cache import cache_argument
from splitlearn_core.manager.workers import present_mode
from support.managing import GatedLoader, closing, run, until

pytestmark = [pytest.mark.libs, pytest.mark.usefixtures("llama")]

IDS = torch.tensor([[5, 17, 42, 99, 3, 8, 64]])
NAMES = ("bottom", "trunk", "top")
MODES = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}


def part(folder: Path, name: str, **options: Any) -> ModelConfig:
    return ModelConfig(
        model_id=name, model_type="llama", component=name, split_points=(2, 4), model_path=str(folder), **options
    )


def run_apart(main: Callable[[], Any]) -> Any:
    """Run a coroutine in a loop of a thread of its own, so that a mode that it leaves behind ends with the thread."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(run(main())))
    thread.start()
    thread.join()
    (result,) = results
    return result


def graphs_of(*caches: Any) -> list[torch.Tensor]:
    """Return the tensors of caches that belong to a graph, or cannot enter one any more."""
    tensors = [t for cache in caches for layer in cache.layers for t in (layer.keys, layer.values) if t is not None]
    assert tensors
    return [t for t in tensors if t.requires_grad or t.grad_fn is not None or t.is_inference()]


@pytest.fixture
def lent(single: Path) -> Callable[..., Any]:
    """Load the three components, and run a function with leases of them."""

    def with_leases(use: Callable[..., Any], **options: Any) -> Any:
        async def main() -> Any:
            async with closing(AsyncModelManager()) as manager:
                for name in NAMES:
                    await manager.load_model(part(single, name))
                leases = [manager.lease(name, **options) for name in NAMES]
                parts = [await lease.__aenter__() for lease in leases]
                try:
                    return await use(*parts)
                finally:
                    for lease in leases:
                        await lease.__aexit__(None, None, None)

        return run_apart(main)

    return with_leases


# --- calls --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("gradients", [False, True])
def test_a_call_goes_by_the_lease_and_not_by_the_callers_mode(lent, mode: str, gradients: bool) -> None:
    async def use(bottom: Any, trunk: Any, top: Any) -> torch.Tensor:
        with MODES[mode]():
            hidden = await bottom(input_ids=IDS)
        assert bottom.gradients is gradients
        assert repr(bottom).endswith("ready, with gradients>" if gradients else "ready>")
        return hidden

    hidden = lent(use, gradients=gradients)
    assert (hidden.requires_grad, hidden.grad_fn is not None, hidden.is_inference()) == (gradients, gradients, False)


def test_decoding_with_caches_keeps_no_graph_and_says_what_the_unsplit_model_says(lent, whole: Any) -> None:
    """As in the README: a prompt and tokens, each component with its cache, one of them cropped on the way."""

    async def use(*parts: Any) -> list[torch.Tensor]:
        caches = [one.new_cache() for one in parts]
        logits = []
        for piece in pieces:
            state: Any = piece
            for one, cache in zip(parts, caches, strict=True):
                state = await one(state, past_key_values=cache)
            logits.append(state.logits)
            for cache in caches:
                cache.crop(-1)
        assert graphs_of(*caches) == []
        assert not any(t.requires_grad or t.grad_fn is not None for t in logits)
        return logits

    pieces = [IDS[:, :4], *IDS[:, 4:].split(1, dim=1)]
    cache = DynamicCache(config=whole.config)
    expected = []
    with torch.no_grad():
        for piece in pieces:
            expected.append(whole(input_ids=piece, **{cache_argument(whole.forward): cache}).logits)
            cache.crop(-1)
    for ours, theirs in zip(lent(use), expected, strict=True):
        # Mapped weights lie elsewhere in memory, and the kernels for one token add in another order.
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
@pytest.mark.parametrize("steps", [(False, True, False), (True, False, True)])
def test_a_cache_continues_whichever_way_each_call_is_made(single: Path, whole: Any, kind: Any, steps: Any) -> None:
    """With gradients and without by turns; a static cache is written to in place."""
    name = cache_argument(whole.forward)

    async def main() -> list[torch.Tensor]:
        async with closing(AsyncModelManager()) as manager:
            await manager.load_model(ModelConfig(model_id="m", model_type="huggingface", model_path=str(single)))
            cache, logits = make_cache(), []
            for gradients, piece in zip(steps, IDS[:, :6].split(2, dim=1), strict=True):
                async with manager.lease("m", gradients=gradients) as model:
                    logits.append((await model(input_ids=piece, **{name: cache})).logits)
                    assert logits[-1].requires_grad is gradients
                if kind is DynamicCache:
                    assert bool(graphs_of(cache)) is gradients
            return logits

    def make_cache() -> Any:
        return kind(config=whole.config, **({"max_cache_len": 8} if kind is StaticCache else {}))

    cache = make_cache()
    with torch.no_grad():
        expected = [whole(input_ids=piece, **{name: cache}).logits for piece in IDS[:, :6].split(2, dim=1)]
    for ours, theirs in zip(run_apart(main), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_hidden_states_of_a_leased_trunk_go_into_a_top_that_is_trained(lent, whole: Any) -> None:
    """They are leaves for the client, whose own gradients are those of the unsplit model."""

    async def use(bottom: Any, trunk: Any, top: Any) -> dict[str, torch.Tensor]:
        hidden = await trunk(hidden_states=await bottom(input_ids=IDS))
        top.model(hidden_states=hidden, labels=IDS).loss.backward()
        return {name: p.grad for name, p in top.model.named_parameters() if p.grad is not None and "lm_head" in name}

    (ours,) = lent(use).values()
    whole.zero_grad()
    whole(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    expected = whole.lm_head.weight.grad.clone()
    whole.zero_grad()
    assert torch.equal(ours, expected)


def test_leases_with_gradients_train_as_the_unsplit_model(lent, whole: Any) -> None:
    """Backward through all three, in the pool, and each parameter's gradient is the unsplit model's."""

    async def use(bottom: Any, trunk: Any, top: Any) -> dict[str, torch.Tensor]:
        loss = (await top(hidden_states=await trunk(hidden_states=await bottom(input_ids=IDS)), labels=IDS)).loss
        await top.run(lambda module: loss.backward())
        return {
            n: p.grad for one in (bottom, trunk, top) for n, p in one.model.named_parameters() if p.grad is not None
        }

    gradients = lent(use, gradients=True)
    whole.zero_grad()
    whole(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    expected = {name: p.grad.clone() for name, p in whole.named_parameters()}
    whole.zero_grad()
    layers = [name for name in expected if ".layers." in name]
    assert set(layers) <= gradients.keys()
    assert all(torch.equal(gradients[name], expected[name]) for name in layers)


def test_components_of_leases_generate_what_the_unsplit_model_does(lent, whole: Any) -> None:
    async def use(bottom: Any, trunk: Any, top: Any) -> torch.Tensor:
        model = SplitCausalLM(bottom.model, trunk.model, top.model)
        return await trunk.run(lambda _: model.generate(IDS, max_new_tokens=5, do_sample=False))

    assert torch.equal(lent(use), whole.generate(IDS, max_new_tokens=5, do_sample=False))


def test_a_handle_with_gradients_ends_with_its_model(single: Path) -> None:
    async def main() -> None:
        async with closing(AsyncModelManager()) as manager:
            model = await manager.load_model(part(single, "trunk"))
            training = model.with_gradients()
            assert (await training(torch.ones(1, 2, 32))).requires_grad
            assert not (await model(torch.ones(1, 2, 32))).requires_grad
            await manager.unload_model("trunk")
            assert training.is_gone
            assert model.is_gone

    run(main())


def test_a_warmed_up_model_can_be_trained(single: Path) -> None:
    """Warming up leaves nothing in it that cannot enter autograd."""

    async def main() -> None:
        async with closing(AsyncModelManager()) as manager:
            await manager.load_model(part(single, "trunk", warmup=True))
            async with manager.lease("trunk", gradients=True) as trunk:
                tensors = [*trunk.model.parameters(), *trunk.model.buffers()]
                assert not any(tensor.is_inference() for tensor in tensors)
                (await trunk(torch.ones(1, 2, 32))).sum().backward()

    run(main())


# --- a mode held over an await -------------------------------------------------------------------


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    with caplog.at_level(logging.WARNING, "splitlearn_core.manager"):
        yield lambda: [record.getMessage() for record in caplog.records if "event loop's thread" in record.getMessage()]


async def interleave(mode: Callable[[], Any]) -> None:
    """Let two tasks enter a mode and leave it in the same order: the thread stays in it."""
    first_left = asyncio.Event()

    async def first() -> None:
        with mode():
            await asyncio.sleep(0)
        first_left.set()

    async def second() -> None:
        with mode():
            await first_left.wait()

    await asyncio.gather(first(), second())


@pytest.mark.parametrize("mode", ["inference_mode", "no_grad"])
def test_a_mode_that_two_tasks_leave_behind_is_noticed_once(warnings, mode: str) -> None:
    """By the tick, or when the manager is closed before the next; calls go on without gradients, or with them."""

    async def main() -> None:
        loader = GatedLoader()
        async with closing(AsyncModelManager(loader=loader, resources=loader.memory)) as manager:
            model = await manager.load_model(ModelConfig(model_id="a", model_type="huggingface", model_path="/nowhere"))
            assert warnings() == []
            await interleave(getattr(torch, mode))
            assert present_mode() == f"torch.{mode}"
            await until(warnings)
            value = torch.ones(1)
            assert not (await model(value)).is_inference()
        assert present_mode() == f"torch.{mode}"

    run_apart(main)
    (message,) = warnings()
    assert message.startswith(f"torch.{mode} is in force in the event loop's thread")
    assert "lease(id, gradients=True)" in message


def test_a_mode_is_noticed_at_the_end_of_a_manager_that_never_ticked(warnings) -> None:
    async def main() -> None:
        async with closing(AsyncModelManager()):
            await interleave(torch.inference_mode)

    run_apart(main)
    assert len(warnings()) == 1


@pytest.mark.parametrize("how", ["outside of the loop", "for good"])
def test_a_thread_that_was_without_gradients_before_is_left_alone(warnings, how: str) -> None:
    """A program may turn them off for itself."""

    async def main() -> None:
        async with closing(AsyncModelManager()) as manager:
            assert present_mode()
            manager._shell._look_at_mode()

    def whole_program() -> None:
        with ExitStack() as stack:
            stack.enter_context(
                torch.inference_mode() if how == "outside of the loop" else torch.set_grad_enabled(False)
            )
            run(main())

    thread = threading.Thread(target=whole_program)
    thread.start()
    thread.join()
    assert warnings() == []


def test_a_mode_between_awaits_is_no_matter(warnings) -> None:
    async def main() -> None:
        async with closing(AsyncModelManager()) as manager:
            for _ in range(3):
                with torch.inference_mode():
                    torch.ones(1) + 1
                await asyncio.sleep(0)
                manager._shell._look_at_mode()

    run(main())
    assert warnings() == []
