"""Training with the trunk elsewhere: losses, gradients and parameters of the unsplit model, bit for bit."""

from __future__ import annotations

import copy
import functools
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from splitlearn_core import (
    AccessRefusedError,
    ConfigurationError,
    RemoteError,
    RemoteStepError,
    SplitCausalLM,
    connect,
    load_component,
    load_split_model,
)
from splitlearn_core.hosts import calls
from splitlearn_core.hosts.protocol import Frame, Kind
from splitlearn_core.hosts.sessions import SessionLimits, SessionTable
from splitlearn_core.testing.worlds import tiny_model, write_checkpoint
from support.hosts import MemoryEndpoint, lost, remote
from support.long import LONG, cases
from support.training import (
    Learned,
    Recipe,
    adapted,
    differences,
    host_process,
    names_of_ends,
    pairwise,
    train,
)

peft = pytest.importorskip("peft", reason="the extra peft is not installed")

pytestmark = [
    pytest.mark.libs,
    # Of PEFT's and torch's own making, on the unsplit model too.
    pytest.mark.filterwarnings("ignore"),
]

SPLIT = (2, 4)
#: What differs by a bit does so from the first or the second step on, when the optimizer has stepped.
STEPS = cases(20, 5)
CHOICES: dict[str, tuple[Any, ...]] = {
    "family": ("qwen2", "gpt2", "gemma"),
    "dropout": (0.1, 0.0),
    "accumulation": (1, 4),
    "clip": (0.0, 0.05),
    "tied": (True, False),
    "checkpointing": ("", "reentrant", "plain"),
    "batch": ("padded", "packed"),
    "ends": (False, True),
    "dtype": ("float32", "bfloat16"),
}
CASES = [Recipe(**case) for case in pairwise(CHOICES)]
if LONG:
    import itertools

    CASES = [Recipe(*values) for values in itertools.product(*CHOICES.values())]


@functools.cache
def checkpoint(recipe: Recipe) -> tempfile.TemporaryDirectory[str]:
    """Return a folder with the model of a recipe."""
    folder = tempfile.TemporaryDirectory()
    write_checkpoint(Path(folder.name), tiny_model(recipe.family, **recipe.values))
    return folder


def folder_of(recipe: Recipe) -> str:
    model = Recipe(family=recipe.family, dropout=recipe.dropout, tied=recipe.tied)
    return checkpoint(model).name


def whole(recipe: Recipe) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder_of(recipe), dtype=getattr(torch, recipe.dtype))


def loaded(recipe: Recipe, *parts: str) -> Any:
    return load_split_model(
        None, SPLIT, folder_of(recipe), parts=parts, dtype=recipe.dtype, strategy="copied", progress=False
    )


def endpoint_of(recipe: Recipe) -> MemoryEndpoint:
    trunk = loaded(recipe, "trunk").trunk
    return MemoryEndpoint(lambda: SessionTable(trunk))


def split_model(recipe: Recipe, trunk: Any) -> SplitCausalLM:
    ends = loaded(recipe, "bottom", "top")
    return SplitCausalLM(ends.bottom, trunk, ends.top)


def prepared(model: Any, recipe: Recipe, split: Any) -> Any:
    return adapted(model, recipe, names_of_ends(split) if recipe.ends else None)


# Each holds the gradients of all steps.
@functools.lru_cache(maxsize=32)
def unsplit(recipe: Recipe, steps: int = STEPS) -> Learned:
    """Train the unsplit model."""
    template = split_model(recipe, loaded(recipe, "trunk").trunk) if recipe.ends else None
    if template is not None:
        # What the components at the ends have, and the layers between them do not.
        inside = tuple(f".{number}." for number in range(*SPLIT))
        names = [name for name in names_of_ends(template) if not any(part in name for part in inside)]
        return train(adapted(whole(recipe), recipe, names), recipe, steps)
    return train(adapted(whole(recipe), recipe), recipe, steps)


def trained(recipe: Recipe, trunk: Any, steps: int = STEPS, **arguments: Any) -> Learned:
    """Train the same with its trunk elsewhere."""
    split = split_model(recipe, trunk)
    return train(prepared(split, recipe, split), recipe, steps, **arguments)


@pytest.fixture(scope="module")
def hosts(warm: Any) -> Iterator[Callable[[Recipe], str]]:
    """Give the URL of a process that serves the trunk of a recipe's model; it is started when first asked for."""
    urls: dict[Recipe, str] = {}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as processes:

        def url_of(recipe: Recipe) -> str:
            model = Recipe(family=recipe.family, dropout=recipe.dropout, tied=recipe.tied, dtype=recipe.dtype)
            if model not in urls:
                path = Path(folder) / f"{len(urls)}.sock"
                serving = host_process(warm.path, Path(folder_of(recipe)), path, recipe.dtype)
                urls[model] = processes.enter_context(serving)
            return urls[model]

        yield url_of


@pytest.mark.parametrize("recipe", CASES, ids=lambda recipe: recipe.name)
def test_training_is_equal(recipe: Recipe, hosts: Callable[[Recipe], str]) -> None:
    """The host is a process, with a generator of its own.

    Over a balanced sample of what can be combined; with ``LONG_TESTS``, over everything.
    """
    expected = unsplit(recipe)
    trunk = connect(hosts(recipe))
    try:
        assert differences(expected, trained(recipe, trunk)) == []
    finally:
        trunk.close()
    if recipe.clip:
        norms = [torch.cat([g.flatten() for g in step.values()]).norm() for step in expected.gradients]
        assert all(norm < 1.01 * recipe.clip for norm in norms)


@pytest.mark.parametrize("kind", ["IA3Config", "LoHaConfig", "LoKrConfig"])
def test_other_kinds_of_adapters_are_equal(kind: str) -> None:
    """Those that need no weights of the model."""
    recipe = Recipe(kind=kind, clip=0.05)
    assert differences(unsplit(recipe), trained(recipe, remote(endpoint_of(recipe)))) == []


def test_settings_of_modules_and_layers_are_equal() -> None:
    """Ranks and scalings by pattern, a scaling that is changed later, and adapters on the trunk alone."""
    recipe = Recipe(family="gpt2")

    def run(model: Any) -> Learned:
        settings = {
            "r": 4,
            "rank_pattern": {"c_attn": 2, r".*\.3\.mlp\.c_proj": 6},
            "alpha_pattern": {"c_attn": 5},
            "use_rslora": True,
            "layers_to_transform": [2, 3],
            "lora_dropout": 0.1,
        }
        torch.manual_seed(1)
        config = peft.LoraConfig(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, **settings)
        wrapped = peft.get_peft_model(model, config)
        for layer in wrapped.modules():
            if isinstance(layer, peft.tuners.lora.LoraLayer):
                layer.scale_layer(1.5)
        return train(wrapped.train(), recipe, 4)

    expected = run(whole(recipe))
    assert len(expected.parameters) == 12
    assert differences(expected, run(split_model(recipe, remote(endpoint_of(recipe))))) == []


def test_two_adapters_are_equal() -> None:
    """Each for itself, both at once, and neither."""
    recipe = Recipe(dropout=0.0)
    batch = {"input_ids": torch.arange(3, 13)[None]}

    def run(model: Any) -> list[torch.Tensor]:
        wrapped = adapted(model, recipe).eval()
        torch.manual_seed(2)
        wrapped.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        logits = [wrapped(**batch).logits]
        wrapped.base_model.set_adapter(["default", "other"])
        logits.append(wrapped(**batch).logits)
        wrapped.set_adapter("other")
        logits.append(wrapped(**batch).logits)
        with wrapped.disable_adapter():
            logits.append(wrapped(**batch).logits)
        return logits

    with torch.no_grad():
        expected = run(whole(recipe))
        actual = run(split_model(recipe, remote(endpoint_of(recipe))))
    assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))
    assert len({tuple(logits.flatten().tolist()) for logits in expected}) == 4


def test_autocast_is_equal() -> None:
    """It is a thread's, and goes along with each call."""
    recipe = Recipe()

    def run(model: Any) -> Learned:
        wrapped = adapted(model, recipe)
        # As accelerate does.
        wrapped.forward = torch.autocast("cpu", torch.bfloat16)(wrapped.forward)
        return train(wrapped, recipe, 4)

    assert differences(run(whole(recipe)), run(split_model(recipe, remote(endpoint_of(recipe))))) == []


@pytest.mark.parametrize("arguments", [{"do_sample": True}, {"num_beams": 2}], ids=["sampled", "beams"])
def test_generation_between_steps_is_equal(arguments: dict[str, Any]) -> None:
    """With a cache at the host, in evaluation mode, with the adapters as they are at that moment."""
    recipe = Recipe()

    def run(model: Any) -> tuple[Learned, list[Any]]:
        wrapped, texts = adapted(model, recipe), []

        def generate(step: int) -> None:
            wrapped.eval()
            ids = torch.arange(3, 9)[None]
            state = torch.get_rng_state()
            texts.append(
                wrapped.generate(input_ids=ids, max_new_tokens=8, pad_token_id=0, eos_token_id=None, **arguments)
            )
            torch.set_rng_state(state)
            wrapped.train()

        return train(wrapped, recipe, 5, after=generate), texts

    (expected, texts), (actual, others) = run(whole(recipe)), run(split_model(recipe, remote(endpoint_of(recipe))))
    assert differences(expected, actual) == []
    assert all(torch.equal(a, b) for a, b in zip(texts, others, strict=True))


# --- another process --------------------------------------------------------------------------------------


@pytest.fixture
def elsewhere(hosts: Callable[[Recipe], str]) -> tuple[Recipe, str]:
    """A recipe, and the URL of a process that serves the trunk of its model."""
    recipe = Recipe(family="gpt2", clip=0.05, accumulation=2)
    return recipe, hosts(recipe)


def test_training_goes_on_when_its_host_is_killed(warm: Any) -> None:
    """Before each kind of message, in another step each; another process takes its place, and lacks the adapters."""
    recipe = Recipe(family="gpt2")
    kills = [(1, Kind.PUT), (2, Kind.STEP), (3, Kind.BACKWARD)]
    step = 0
    with tempfile.TemporaryDirectory() as folder, ExitStack() as hosts:
        serving = warm.path, Path(folder_of(recipe)), Path(folder) / "trunk.sock"
        trunk = connect(hosts.enter_context(host_process(*serving)))
        send = trunk.host.exchange

        def exchange(frame: Frame) -> Frame:
            if kills[:1] == [(step, frame.kind)]:
                del kills[0]
                hosts.close()
                hosts.enter_context(host_process(*serving))
            return send(frame)

        def count(number: int) -> None:
            nonlocal step
            step = number + 1

        trunk.host.exchange = exchange  # type: ignore[method-assign]
        problems = differences(unsplit(recipe, 5), trained(recipe, trunk, 5, after=count))
        trunk.close()
    assert problems == []
    assert kills == []


def test_random_numbers_that_stay_here_are_noticed(
    elsewhere: tuple[Recipe, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A control of the comparison: with others at the host, training is not equal."""
    recipe, url = elsewhere
    trunk = connect(url)
    monkeypatch.setattr(
        calls, "_states_of_generators", lambda device: {calls.RANDOM_CPU: torch.Generator().manual_seed(3).get_state()}
    )
    monkeypatch.setattr(calls, "_set_generators", lambda tensors, device: None)
    try:
        problems = differences(unsplit(recipe, 3), trained(recipe, trunk, 3))
        assert problems
        assert problems[0].startswith("loss 0")
    finally:
        trunk.close()


def test_norms_that_are_added_by_part_are_noticed(elsewhere: tuple[Recipe, str]) -> None:
    """A control of the comparison: the norm of all parameters is not that of two parts' norms, in the last bit."""
    recipe, url = elsewhere
    trunk = connect(url)

    def by_part(parameters: list[Any], limit: float) -> None:
        half = len(parameters) // 2
        norms = [
            torch.nn.utils.get_total_norm([p.grad for p in part]) for part in (parameters[:half], parameters[half:])
        ]
        total = torch.stack([norm**2 for norm in norms]).sum().sqrt()
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, total)

    try:
        # The first steps may happen to agree.
        assert differences(unsplit(recipe, 20), trained(recipe, trunk, 20, clip=by_part)) != []
    finally:
        trunk.close()


# --- bad luck ---------------------------------------------------------------------------------------------

#: Name of a fault -> whether the request is carried out, whether the host is restarted, and whether the reply is lost.
FAULTS = {
    "request lost": (False, False, True),
    "reply lost": (True, False, True),
    "restarted before": (False, True, True),
    "restarted after": (True, True, True),
    "repeated": (True, False, False),
    "delayed": (False, False, False),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_training_goes_on_after_a_fault_at_any_message(fault: str) -> None:
    """Each message is lost or repeated, comes a second time after the next one, or is the last one of a host."""
    recipe = Recipe(clip=0.05)
    steps = 2
    expected = unsplit(recipe, steps)
    endpoint = endpoint_of(recipe)
    assert differences(expected, trained(recipe, remote(endpoint), steps)) == []
    messages = endpoint.count
    # A description and tensors, a forward and a backward; and the same without the description.
    assert messages == 7
    is_done, restarts, is_lost = FAULTS[fault]
    for boundary in range(1, messages + 1):
        fresh = endpoint_of(recipe)
        earlier: list[Frame] = []

        def strike(number: int, frame: Frame, fresh: Any = fresh, earlier: Any = earlier, at: int = boundary) -> None:
            if fault == "delayed" and number == at + 1 and earlier:
                fresh.answered(earlier[-1])
            earlier.append(frame)
            if number != at:
                return
            if restarts:
                fresh.restart()
            if is_lost:
                raise lost()
            fresh.answered(frame)

        if is_done:
            fresh.after = strike
        else:
            fresh.before = strike
        assert differences(expected, trained(recipe, remote(fresh), steps)) == [], boundary


def test_an_adapter_that_is_not_kept_is_sent_again() -> None:
    """A host keeps as many bytes as it has room for; two users who share that still get their own results."""
    recipe = Recipe()
    expected = unsplit(recipe, 3)
    endpoint = endpoint_of(recipe)

    def forget(number: int, frame: Frame) -> None:
        if frame.kind is Kind.STEP:
            endpoint.table._training.forget()

    endpoint.after = forget
    assert differences(expected, trained(recipe, remote(endpoint), 3)) == []
    kinds = [frame.kind for frame in endpoint.frames]
    # A description and tensors for the first call, tensors for those of the other steps, and both for each way back.
    assert kinds.count(Kind.PUT) == 2 + 1 + 1 + 3 * 2
    assert kinds.count(Kind.BACKWARD) == 3 * 2


def test_a_host_keeps_one_version_of_an_adapter() -> None:
    """Not those of earlier steps; and none of an owner who is idle."""
    now = [0.0]
    recipe = Recipe()
    trunk = loaded(recipe, "trunk").trunk
    endpoint = MemoryEndpoint(lambda: SessionTable(trunk, clock=lambda: now[0]))
    kept = []
    trained(recipe, remote(endpoint), 4, after=lambda step: kept.append(endpoint.table._training.kept_bytes))
    assert kept[0] > 0
    assert len(set(kept)) == 1
    assert not endpoint.table.is_idle
    now[0] += 1_000
    endpoint.table.expire()
    assert endpoint.table.is_idle
    assert endpoint.table._training.kept_bytes == 0


def test_owners_share_the_memory_of_adapters() -> None:
    """Where there is room for one owner's, the other one sends its own again."""
    recipe = Recipe()
    expected = unsplit(recipe, 3)
    trunk = loaded(recipe, "trunk").trunk
    alone = MemoryEndpoint(lambda: SessionTable(trunk))
    trained(recipe, remote(alone), 3)
    limit = int(1.5 * alone.table._training.kept_bytes)
    table = SessionTable(trunk, SessionLimits(all_adapter_bytes=limit))
    results: list[Learned] = []
    kept: list[int] = []

    def other(step: int) -> None:
        endpoint = MemoryEndpoint(lambda: table)
        endpoint.owner, state = "other", torch.get_rng_state()
        results.append(trained(recipe, remote(endpoint), 3))
        torch.set_rng_state(state)
        kept.append(table._training.kept_bytes)

    endpoint = MemoryEndpoint(lambda: table)
    results.append(trained(recipe, remote(endpoint), 3, after=other))
    assert [differences(expected, result) for result in results] == [[]] * 4
    assert 0 < max(kept) <= limit
    assert [frame.kind for frame in endpoint.frames].count(Kind.PUT) > [f.kind for f in alone.frames].count(Kind.PUT)


def test_owners_train_as_if_alone() -> None:
    """A whole training of another owner in the midst of one, and evaluation besides."""
    recipes = [Recipe(clip=0.05), Recipe(kind="LoHaConfig", ends=True, accumulation=2)]
    expected = [unsplit(recipe, 6) for recipe in recipes]
    first = endpoint_of(recipes[0])
    table = first.table
    results: list[Learned] = []

    def second(step: int) -> None:
        endpoint = MemoryEndpoint(lambda: table)
        endpoint.owner = "other"
        state = torch.get_rng_state()
        if step == 2:
            results.append(trained(recipes[1], remote(endpoint), 6))
        else:
            with torch.no_grad():
                split_model(recipes[1], remote(endpoint)).train()(torch.arange(3, 9)[None])
        torch.set_rng_state(state)

    assert differences(expected[0], trained(recipes[0], remote(first), 6, after=second)) == []
    assert differences(expected[1], results[0]) == []


def test_owners_take_turns_at_each_message() -> None:
    """Two on one trunk, each with its adapters, modes, settings and random numbers: one message each in turn."""
    recipes = [Recipe(clip=0.05), Recipe(kind="LoHaConfig", ends=True, accumulation=2, checkpointing="plain")]
    expected = [unsplit(recipe, 6) for recipe in recipes]
    table = endpoint_of(recipes[0]).table
    turns = [threading.Semaphore(1), threading.Semaphore(0)]
    ended: set[int] = set()
    order: list[int] = []

    def train_in_turn(me: int) -> Learned:
        def give_way(number: int, frame: Frame) -> None:
            order.append(me)
            if 1 - me not in ended:
                # The generator is the whole process's.
                state = torch.get_rng_state()
                turns[1 - me].release()
                turns[me].acquire()
                torch.set_rng_state(state)

        endpoint = MemoryEndpoint(lambda: table)
        endpoint.owner, endpoint.before = f"owner {me}", give_way
        turns[me].acquire()
        try:
            return trained(recipes[me], remote(endpoint), 6)
        finally:
            ended.add(me)
            turns[1 - me].release()

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(train_in_turn, (0, 1)))
    assert [differences(*pair) for pair in zip(expected, results, strict=True)] == [[], []]
    together = 2 * min(order.count(0), order.count(1))
    assert together > 30
    assert order[:together] == [0, 1] * (together // 2)


def test_a_split_model_is_copied_with_its_adapters() -> None:
    """The copy learns for itself, and its layers elsewhere take no memory either."""
    recipe = Recipe()
    endpoint = endpoint_of(recipe)
    split = split_model(recipe, remote(endpoint))
    wrapped = adapted(split, recipe)
    other = copy.deepcopy(wrapped)
    expected = unsplit(recipe, 2)
    assert differences(expected, train(other, recipe, 2)) == []
    assert differences(expected, train(wrapped, recipe, 2)) == []
    for name, parameter in other.named_parameters():
        if "layers.2." in name and not parameter.requires_grad:
            assert parameter.untyped_storage().nbytes() == parameter.element_size(), name


# --- trainers ---------------------------------------------------------------------------------------------


def run_trainer(model: Any, out: Path, save_steps: int, steps: int = 6, **options: Any) -> Any:
    """Train with transformers' own trainer, of whose steps four are an epoch; return it."""
    from transformers import PrinterCallback, Trainer, TrainingArguments

    settings = TrainingArguments(
        output_dir=str(out),
        per_device_train_batch_size=2, max_steps=steps, learning_rate=0.01, logging_steps=1, save_strategy="steps",
        report_to=[], disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False, seed=1,
        max_grad_norm=0.05, gradient_accumulation_steps=2, save_steps=save_steps,
    )  # fmt: skip
    draw = torch.Generator().manual_seed(0)
    data = [{"input_ids": (ids := torch.randint(3, 90, (8,), generator=draw)), "labels": ids} for _ in range(16)]
    made = Trainer(model, settings, train_dataset=data)
    made.remove_callback(PrinterCallback)
    made.train(**options)
    return made


def learned_by(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: each.detach().clone() for name, each in trainer.model.named_parameters() if each.requires_grad}


def losses_of(trainer: Any) -> list[tuple[float, float]]:
    return [(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry]


def in_the_trunk(name: str) -> bool:
    return any(f".{number}." in name for number in range(*SPLIT))


def test_a_trainer_of_thirty_steps_is_equal(tmp_path: Path) -> None:
    """With its schedule of learning rates, clipping, accumulation, and several epochs."""
    pytest.importorskip("accelerate", minversion="1.3.0", reason="needs accelerate 1.3 or newer")
    recipe = Recipe(family="gpt2")
    expected = run_trainer(adapted(whole(recipe), recipe), tmp_path / "unsplit", 30, 30)
    split = split_model(recipe, remote(endpoint_of(recipe)))
    actual = run_trainer(adapted(split, recipe), tmp_path / "split", 30, 30)
    assert len(losses_of(expected)) == 30
    assert losses_of(actual) == losses_of(expected)
    values = learned_by(expected)
    assert learned_by(actual).keys() == values.keys()
    assert all(torch.equal(value, values[name]) for name, value in learned_by(actual).items())


@pytest.mark.parametrize("kind", ["adapters", "ends"])
def test_a_trainer_goes_on_from_each_of_its_checkpoints(kind: str, tmp_path: Path) -> None:
    """Adapters by the unsplit model's names; ends that are trained in full as components."""
    pytest.importorskip("accelerate", minversion="1.3.0", reason="needs accelerate 1.3 or newer")
    recipe = Recipe(family="gpt2")

    def model(trunk: Any = None) -> Any:
        made = whole(recipe) if trunk is None else split_model(recipe, trunk)
        if kind == "adapters":
            return adapted(made, recipe)
        if trunk is None:
            for name, parameter in made.named_parameters():
                parameter.requires_grad_(not in_the_trunk(name))
        return made

    # In the middle of the first epoch, and in that of the second.
    every = 1 if LONG else {"adapters": 3, "ends": 5}[kind]
    endpoint = endpoint_of(recipe)
    expected = run_trainer(model(), tmp_path / "unsplit", every)
    trained_elsewhere = run_trainer(model(remote(endpoint)), tmp_path / "split", every)
    assert losses_of(trained_elsewhere) == losses_of(expected)
    values = learned_by(expected)
    assert all(torch.equal(value, values[name]) for name, value in learned_by(trained_elsewhere).items())
    assert learned_by(trained_elsewhere).keys() == values.keys()
    for step in range(every, 6, every):
        folder = tmp_path / "split" / f"checkpoint-{step}"
        size = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
        assert size < 4 * sum(value.nbytes for value in values.values())
        # Of the unsplit model, too: transformers 5.4 goes on with other random numbers in the middle of an epoch.
        whole_folder = str(tmp_path / "unsplit" / folder.name)
        there = run_trainer(model(), tmp_path / f"unsplit-{step}", 6, resume_from_checkpoint=whole_folder)
        again = tmp_path / f"resumed-{step}"
        resumed = run_trainer(model(remote(endpoint)), again, 6, resume_from_checkpoint=str(folder))
        assert losses_of(resumed) == losses_of(there), step
        values_there = learned_by(there)
        assert all(torch.equal(value, values_there[name]) for name, value in learned_by(resumed).items())

    last = tmp_path / "split" / "checkpoint-6"
    ids = torch.arange(3, 13)[None]
    with torch.no_grad():
        logits = expected.model.eval()(ids).logits
        if kind == "adapters":
            theirs, ours = (
                load_file(tmp_path / name / "checkpoint-6" / "adapter_model.safetensors")
                for name in ("unsplit", "split")
            )
            assert theirs.keys() == ours.keys()
            assert all(torch.equal(theirs[name], ours[name]) for name in ours)
            loaded = peft.PeftModel.from_pretrained(whole(recipe), last)
        else:
            ends = [load_component(last / "components" / name, name) for name in ("bottom", "top")]
            loaded = SplitCausalLM(ends[0], remote(endpoint), ends[1])
            # transformers would make up the layers that are missing.
            with pytest.raises((OSError, ValueError), match=r"config\.json"):
                AutoModelForCausalLM.from_pretrained(last)
        assert torch.equal(loaded.eval()(ids).logits, logits)


def test_values_are_loaded_around_what_is_elsewhere(tmp_path: Path) -> None:
    """A state dict has what is here; layers elsewhere take no memory, and keep the dtype that they have there."""
    recipe = Recipe()
    split = split_model(recipe, remote(endpoint_of(recipe)))
    state = split.state_dict()
    assert {name for name in whole(recipe).state_dict() if not in_the_trunk(name)} == state.keys()
    assert split.load_state_dict(state).missing_keys == []
    assert split.load_state_dict(whole(recipe).state_dict(), strict=False).missing_keys == []
    hole = split.get_parameter("model.layers.2.mlp.up_proj.weight")
    assert hole.untyped_storage().nbytes() == 4 < hole.nbytes
    with pytest.raises(ConfigurationError, match=r"cannot be changed to torch\.bfloat16"):
        split.to(torch.bfloat16)


# --- what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"use_dora": True}, "DoRA needs the norms of the weights"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changes"),
        ({"bias": "all"}, "biases of the model itself"),
    ],
)
def test_adapters_that_need_the_weights_are_refused(settings: dict[str, Any], words: str) -> None:
    """Before anything is trained, with the reason."""
    recipe = Recipe(dropout=0.0)
    split = split_model(recipe, remote(endpoint_of(recipe)))
    with pytest.raises(ConfigurationError, match=words):
        peft.get_peft_model(split, peft.LoraConfig(target_modules=["q_proj"], **settings))


def test_a_kind_that_is_not_known_is_refused() -> None:
    """By name."""
    recipe = Recipe(dropout=0.0)
    split = split_model(recipe, remote(endpoint_of(recipe)))
    with pytest.raises(ConfigurationError, match="VERA is not one of LORA, IA3, LOHA, LOKR"):
        peft.get_peft_model(split, peft.VeraConfig(target_modules=["q_proj"]))


def test_changes_that_the_host_would_not_know_of_are_refused() -> None:
    """Hooks, modules in the place of others, PEFT's batches of several adapters; and not what is undone."""
    recipe, ids = Recipe(dropout=0.0), torch.arange(3, 13)[None]
    split = split_model(recipe, remote(endpoint_of(recipe))).eval()
    layer = split.model.layers[2]
    hook = layer.mlp.up_proj.register_forward_hook(lambda *_: None)
    with pytest.raises(ConfigurationError, match=r"model\.layers\.2\.mlp\.up_proj has a hook"):
        split(ids)
    hook.remove()
    mlp, layer.mlp = layer.mlp, torch.nn.Identity()
    with pytest.raises(ConfigurationError, match=r"layers\.2\.mlp: Identity was put there, \d+ modules are not"):
        split(ids)
    layer.mlp = mlp
    with torch.no_grad():
        assert torch.equal(split(ids).logits, whole(recipe).eval()(ids).logits)
    model = peft.get_peft_model(split, peft.LoraConfig(target_modules=["q_proj"])).eval()
    with pytest.raises(ConfigurationError, match="adapter_names"):
        model(ids, adapter_names=["__base__"])


def test_an_adapter_that_is_no_layer_of_its_own_is_refused() -> None:
    """Its modules are around those of the model."""
    recipe = Recipe(family="gpt2", dropout=0.0)
    split = split_model(recipe, remote(endpoint_of(recipe)))
    config = peft.AdaptionPromptConfig(adapter_layers=4, adapter_len=4, task_type="CAUSAL_LM")
    model = peft.get_peft_model(split, config)
    with pytest.raises(ConfigurationError, match=r"h\.2\.attn: AdaptedAttention\w* was put there"):
        model(torch.arange(3, 13)[None])


def test_adapters_of_the_ends_alone_may_be_of_any_kind() -> None:
    """They are here, as are the weights that they need."""
    recipe = Recipe(dropout=0.0)
    config = {"target_modules": ["q_proj"], "layers_to_transform": [0, 5], "use_dora": True, "init_lora_weights": False}

    def run(model: Any) -> Learned:
        torch.manual_seed(1)
        return train(peft.get_peft_model(model, peft.LoraConfig(**config)), recipe, 3)

    assert differences(run(whole(recipe)), run(split_model(recipe, remote(endpoint_of(recipe))))) == []


def test_weights_that_are_elsewhere_are_neither_trained_nor_merged() -> None:
    """The error names the first of them."""
    recipe = Recipe(dropout=0.0)
    split = split_model(recipe, remote(endpoint_of(recipe)))
    split.requires_grad_(True)
    with pytest.raises(ConfigurationError, match=r"model\.layers\.2\.\S+ would be trained, and its values are at"):
        split(torch.arange(3, 9)[None], use_cache=False)


def test_a_host_may_allow_no_training() -> None:
    """A permission of its own, and limits: adapters, training mode and gradients are refused, and evaluation is not."""
    recipe = Recipe()
    endpoint = endpoint_of(recipe)
    endpoint.limits = SessionLimits(training=False)
    split = split_model(recipe, remote(endpoint))
    ids = torch.arange(3, 13)[None]
    with torch.no_grad():
        assert split.eval()(ids).logits.shape == (1, 10, 101)
    with pytest.raises(AccessRefusedError, match="lets nothing be trained by you"):
        split.train()(ids, use_cache=False)
    loss = split.eval()(ids, labels=ids, use_cache=False).loss
    with pytest.raises(AccessRefusedError, match="permission to train"):
        loss.backward()
    with pytest.raises(AccessRefusedError, match="takes no adapters"):
        adapted(split, recipe).eval()(ids)


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"training_steps": 2}, "train 2 steps"),
        ({"training_tokens": 60}, "train 60 tokens"),
        ({"adapter_bytes": 1000}, r"this host keeps 1000 B|this host keeps"),
    ],
)
def test_a_host_has_limits_of_training(limits: dict[str, int], words: str) -> None:
    """Of steps, tokens and bytes, for each owner."""
    recipe = Recipe()
    endpoint = endpoint_of(recipe)
    endpoint.limits = SessionLimits(**limits)
    with pytest.raises(RemoteError, match=words):
        trained(recipe, remote(endpoint), 4)
    if "adapter_bytes" not in limits:
        endpoint.owner = "another"
        assert differences(unsplit(recipe, 2), trained(recipe, remote(endpoint), 2)) == []


def test_an_adapter_of_another_model_is_refused() -> None:
    """By its shapes, before anything is computed."""
    recipe = Recipe()
    small, large = endpoint_of(recipe), tiny_model("qwen2", intermediate_size=96)
    split = split_model(recipe, remote(small))
    wrapped = adapted(split, recipe)
    for name, parameter in wrapped.named_parameters():
        if "layers.2" in name and "down_proj.lora_A" in name:
            parameter.data = torch.zeros(4, large.config.intermediate_size)
    with pytest.raises(RemoteStepError, match=r"not one of this trunk: \S*layers\.2\.mlp\.down_proj\S* is \[4, 96\]"):
        wrapped(torch.arange(3, 9)[None], use_cache=False)


def test_values_that_are_not_finite_are_named() -> None:
    """With the side that they come from, and the call; the optimizer has not stepped, and training goes on."""
    recipe = Recipe(dropout=0.0)
    endpoint = endpoint_of(recipe)
    split = split_model(recipe, remote(endpoint))
    wrapped = adapted(split, recipe)
    ids = torch.arange(3, 13)[None]
    loss = wrapped(ids, labels=ids, use_cache=False).loss
    with pytest.raises(RemoteStepError, match=r"components after the trunk, which are here, in call 1 of") as caught:
        (loss * torch.inf).backward()
    assert caught.value.code == "not_finite"
    wrapped.zero_grad()
    poisoned = dict(wrapped.named_parameters())[
        # Of what is added to hidden states: attention makes zeros of queries that are no numbers, on some processors.
        "base_model.model.model.layers.2.mlp.down_proj.lora_A.default.weight"
    ]
    before = poisoned.detach().clone()
    poisoned.data.fill_(torch.inf)
    with pytest.raises(RemoteStepError, match=r"hidden states .* came from the trunk at memory://trunk, in call 2 of"):
        wrapped(ids, labels=ids, use_cache=False)
    poisoned.data.copy_(before)
    assert differences(unsplit(recipe, 2), train(wrapped, recipe, 2)) == []


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
def test_a_host_without_memory_says_so(error: type[Exception]) -> None:
    """In backward, too; the same call succeeds when there is memory again."""
    recipe = Recipe(dropout=0.0)
    ends = loaded(recipe, "bottom", "trunk", "top")
    wrapped = adapted(
        SplitCausalLM(ends.bottom, remote(MemoryEndpoint(lambda: SessionTable(ends.trunk))), ends.top), recipe
    )
    ids = torch.arange(3, 13)[None]
    loss = wrapped(ids, labels=ids, use_cache=False).loss

    def fail(*_: Any) -> None:
        raise error

    # Copies at the host were made with the first call: what all share is the class.
    layer = type(ends.trunk.layer_modules[2].mlp)
    original = layer.forward
    layer.forward = fail
    try:
        with pytest.raises(RemoteStepError, match="no memory for this step") as caught:
            loss.backward(retain_graph=True)
    finally:
        layer.forward = original
    assert caught.value.code == "out_of_memory"
    wrapped.zero_grad()
    assert differences(unsplit(recipe, 2), train(wrapped, recipe, 2)) == []


def test_a_host_without_peft_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """A typed error, and only where adapters come."""
    recipe = Recipe()

    def absent() -> Any:
        raise ConfigurationError("adapters need the package peft", hint='pip install "splitlearn-core[peft]"')

    monkeypatch.setattr("splitlearn_core.hosts.tuning.import_peft", absent)
    split = split_model(recipe, remote(endpoint_of(recipe)))
    split.train()(torch.arange(3, 9)[None], use_cache=False)
    with pytest.raises(RemoteStepError, match="cannot apply adapters") as caught:
        adapted(split, recipe)(torch.arange(3, 9)[None], use_cache=False)
    assert caught.value.code == "no_peft"
    assert "splitlearn-core[peft]" in caught.value.hint
