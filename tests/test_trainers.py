"""The Trainer of transformers on a split model: losses, parameters and checkpoints of the unsplit one, bit for bit."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PrinterCallback, Trainer, TrainingArguments

from splitlearn_core import SplitCausalLM, connect, load_split_model
from splitlearn_core.hosts.sessions import SessionTable
from splitlearn_core.testing.worlds import tiny_model, write_checkpoint
from support.hosts import MemoryEndpoint, remote
from support.training import served_trunk
from support.warm import WarmInterpreter

# The Trainer of transformers 5.4 calls what older ones have not, whatever it asks for.
pytest.importorskip("accelerate", minversion="1.3.0", reason="needs accelerate 1.3 or newer")

pytestmark = [
    pytest.mark.libs,
    # Names that older transformers knows alone.
    pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]

CUTS = (2, 4)
SIZES = {"gpt2": {"n_embd": 32, "n_layer": 6, "n_head": 4}}
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
IDS = torch.tensor([[5, 17, 42, 99, 3, 8, 64]])
#: What is measured, and not computed.
MEASURED = ("runtime", "per_second", "flos")
LENGTHS = (5, 9, 4, 7, 8, 6, 3, 9)

Checkpoints = Callable[..., Path]


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    """Put back what accelerate leaves in the environment and in its own state of the process."""
    from accelerate.state import AcceleratorState

    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    made: dict[str, Path] = {}

    def write(model_type: str, **sizes: Any) -> Path:
        name = f"{model_type}-{sizes}"
        if name not in made:
            made[name] = tmp_path_factory.mktemp("model") / "model"
            write_checkpoint(made[name], tiny_model(model_type, **{**SIZES.get(model_type, {}), **sizes}))
        return made[name]

    return write


def unsplit(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


def split(folder: Path, **options: Any) -> Any:
    return SplitCausalLM(*load_split_model(None, CUTS, folder, **options))


def rows(*, token_types: bool = False) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(0)
    made = [{"input_ids": torch.randint(3, 100, (length,), generator=generator).tolist()} for length in LENGTHS]
    if token_types:
        for row in made:
            row["token_type_ids"] = [number % 2 for number in range(len(row["input_ids"]))]
    return made


def collate(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Pad on the right; what is padding has no label."""
    width = max(len(row["input_ids"]) for row in batch)
    padded = {name: torch.tensor([row[name] + [0] * (width - len(row[name])) for row in batch]) for name in batch[0]}
    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in batch])
    return {**padded, "attention_mask": mask, "labels": padded["input_ids"].masked_fill(mask == 0, -100)}


def trainer(model: Any, out: Path, data: Any = None, **options: Any) -> Any:
    settings = TrainingArguments(
        output_dir=str(out),
        **{
            "per_device_train_batch_size": 2, "per_device_eval_batch_size": 4, "max_steps": 2, "learning_rate": 0.01,
            "logging_steps": 1, "save_strategy": "no", "report_to": [], "disable_tqdm": True, "use_cpu": True,
            "dataloader_pin_memory": False, "seed": 1,
            **options,
        },
    )  # fmt: skip
    data = rows() if data is None else data
    made = Trainer(model, settings, train_dataset=data, eval_dataset=data[:4], data_collator=collate)
    made.remove_callback(PrinterCallback)
    return made


def history(trained: Any) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in entry.items() if not any(word in name for word in MEASURED)}
        for entry in trained.state.log_history
    ]


def parameters(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def trained_parameters(model: Any) -> dict[str, torch.Tensor]:
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name: values for name, values in parameters(model).items() if name in learning}


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return list(left) == list(right) and all(torch.equal(each, right[name]) for name, each in left.items())


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("gpt2", {}),  # with its dropouts
        ("gemma2", {"gradient_accumulation_steps": 2}),
        ("qwen2", {"label_smoothing_factor": 0.1}),
        ("qwen2", {"neftune_noise_alpha": 5.0}),
        ("qwen2", {"bf16": True}),
        ("gpt2", {"gradient_checkpointing": True}),
    ],
    ids=str,
)
def test_trainer_logs_and_learns_what_it_does_on_the_unsplit_model(
    checkpoint: Checkpoints, model_type: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """Logged losses and gradient norms, parameters, evaluation and prediction are equal."""
    results = {}
    for make in (unsplit, split):
        trained = trainer(make(checkpoint(model_type)), tmp_path, **options)
        trained.train()
        trained.evaluate()
        predicted = trained.predict(rows()[4:])
        results[make] = history(trained), parameters(trained.model), predicted

    (logged, learned, predicted), (expected_log, expected, expected_prediction) = results[split], results[unsplit]
    assert logged == expected_log
    assert any("loss" in entry for entry in logged)
    assert any("eval_loss" in entry for entry in logged)
    assert equal(learned, expected)
    assert predicted.metrics["test_loss"] == expected_prediction.metrics["test_loss"]
    assert (predicted.predictions == expected_prediction.predictions).all()


def test_trainer_keeps_the_columns_that_the_family_takes(checkpoint: Checkpoints, tmp_path: Path) -> None:
    """GPT-2's token types change what it learns."""
    logged = {}
    for make in (unsplit, split):
        for token_types in (True, False):
            trained = trainer(make(checkpoint("gpt2")), tmp_path, rows(token_types=token_types))
            trained.train()
            logged[make, token_types] = history(trained)

    assert logged[split, True] == logged[unsplit, True]
    assert logged[split, True] != logged[split, False]


@pytest.mark.parametrize("strategy", ["mapped", "copied"])
@pytest.mark.parametrize(("model_type", "ends"), [("qwen2", TIED), ("gpt2", UNTIED)], ids=["tied", "untied"])
def test_checkpoints_of_a_trainer(
    checkpoint: Checkpoints, model_type: str, ends: dict[str, bool], strategy: str, tmp_path: Path
) -> None:
    """Files, the best model, and what is learned after resuming are equal; transformers loads what was written."""
    folder = checkpoint(model_type, **ends)
    saving = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    results: dict[str, Any] = {}
    for name, make in (("unsplit", unsplit), ("split", lambda folder: split(folder, strategy=strategy))):
        best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
        trained = trainer(make(folder), tmp_path / name, **saving, **best)
        trained.train()
        resumed = trainer(make(folder), tmp_path / f"{name}-resumed", **saving)
        resumed.train(resume_from_checkpoint=str(tmp_path / name / "checkpoint-2"))
        results[name] = [*(history(each) for each in (trained, resumed)), parameters(trained.model)], resumed.model

    (logged, logged_resumed, learned), model = results["split"]
    (expected_log, expected_resumed, expected), reference = results["unsplit"]
    assert (logged, logged_resumed) == (expected_log, expected_resumed)
    assert equal(learned, expected)
    assert equal(parameters(model), parameters(reference))
    for step in ("checkpoint-2", "checkpoint-4"):
        files, expected_files = tmp_path / "split" / step, tmp_path / "unsplit" / step
        assert sorted(path.name for path in files.iterdir()) == sorted(path.name for path in expected_files.iterdir())
        assert (files / "config.json").read_text() == (expected_files / "config.json").read_text()
        weights = "model.safetensors"
        assert equal(load_file(files / weights), load_file(expected_files / weights))
    loaded = unsplit(tmp_path / "split" / "checkpoint-4")
    with torch.no_grad():
        assert torch.equal(loaded.eval()(IDS).logits, model.eval()(IDS).logits)


def test_thirty_steps_through_a_server(checkpoint: Checkpoints, warm: WarmInterpreter, tmp_path: Path) -> None:
    """With the trunk in a process of ``splitlearn serve``: logs, adapters, evaluation, and a run that was resumed."""
    peft = pytest.importorskip("peft", reason="the extra peft is not installed")
    folder = checkpoint("gpt2")
    options = {
        "max_steps": 30, "gradient_accumulation_steps": 2, "lr_scheduler_type": "cosine", "warmup_steps": 5,
        "max_grad_norm": 0.1, "eval_strategy": "steps", "eval_steps": 10, "save_strategy": "steps", "save_steps": 15,
    }  # fmt: skip

    def adapted(model: Any) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            config = peft.LoraConfig(r=4, target_modules=["c_attn", "c_proj"], lora_dropout=0.1, fan_in_fan_out=True)
            return peft.get_peft_model(model, config)

    results: dict[str, Any] = {}
    with served_trunk(warm.path, folder, *CUTS) as url, ExitStack() as stack:

        def served(folder: Path) -> Any:
            ends = load_split_model(None, CUTS, folder, parts=("bottom", "top"))
            trunk = connect(url)
            stack.callback(trunk.close)
            return SplitCausalLM(ends.bottom, trunk, ends.top)

        for name, make in (("unsplit", unsplit), ("split", served)):
            trained = trainer(adapted(make(folder)), tmp_path / name, **options)
            trained.train()
            # Of the owner's own: of layers that are elsewhere there are no values here.
            learned = {name: each for name, each in trained.model.named_parameters() if each.requires_grad}
            resumed = trainer(adapted(make(folder)), tmp_path / f"{name}-resumed", **options)
            resumed.train(resume_from_checkpoint=str(tmp_path / name / "checkpoint-15"))
            again = {name: each for name, each in resumed.model.named_parameters() if each.requires_grad}
            # Compared with the unsplit run that was resumed: older transformers goes on with other random numbers.
            results[name] = history(trained), history(resumed), learned, again

    assert results["split"][:2] == results["unsplit"][:2]
    assert equal(results["split"][2], results["unsplit"][2])
    assert equal(results["split"][3], results["unsplit"][3])
    logged = results["split"][0]
    assert [sum(name in entry for entry in logged) for name in ("loss", "eval_loss")] == [30, 3]
    saved = [
        load_file(tmp_path / name / "checkpoint-30" / "adapter_model.safetensors") for name in ("split", "unsplit")
    ]
    assert equal(*saved)


def with_trunk_elsewhere(folder: Path) -> Any:
    parts = load_split_model(None, CUTS, folder)
    return SplitCausalLM(parts.bottom, remote(MemoryEndpoint(lambda: SessionTable(parts.trunk))), parts.top)


@pytest.mark.parametrize(
    ("make_split", "adapted"),
    [(split, False), (split, True), (with_trunk_elsewhere, True)],
    ids=["full", "lora", "lora, trunk elsewhere"],
)
def test_accelerate_saves_and_restores_a_split_model(
    checkpoint: Checkpoints, make_split: Callable[[Path], Any], adapted: bool, tmp_path: Path
) -> None:
    """After load_state, a step is the step it was; saved weights are those of the unsplit model."""
    from accelerate import Accelerator

    peft = pytest.importorskip("peft", reason="the extra peft is not installed") if adapted else None
    results = {}
    for make in (unsplit, make_split):
        model = make(checkpoint("qwen2"))
        if peft is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(1)
                model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
        accelerator = Accelerator(cpu=True)
        learning = [parameter for parameter in model.train().parameters() if parameter.requires_grad]
        prepared, optimizer = accelerator.prepare(model, torch.optim.AdamW(learning, lr=0.01))

        def step(accelerator: Any = accelerator, model: Any = prepared, optimizer: Any = optimizer) -> float:
            loss = model(input_ids=IDS, labels=IDS).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            return float(loss.detach())

        losses = [step()]
        accelerator.save_state(str(tmp_path / make.__name__ / "state"))
        losses.append(step())
        learned = trained_parameters(prepared)
        accelerator.load_state(str(tmp_path / make.__name__ / "state"))
        losses.append(step())
        assert losses[1] == losses[2]
        assert equal(trained_parameters(prepared), learned)
        accelerator.save_model(prepared, str(tmp_path / make.__name__ / "model"))
        results[make] = losses, learned

    assert results[make_split][0] == results[unsplit][0]
    assert equal(results[make_split][1], results[unsplit][1])
    saved, whole = (
        load_file(tmp_path / make.__name__ / "model" / "model.safetensors") for make in (make_split, unsplit)
    )
    if make_split is with_trunk_elsewhere:
        # The weights of its layers are not here; adapters are.
        whole = {name: tensor for name, tensor in whole.items() if name in saved}
        assert any(".layers.3." in name for name in whole)
    assert equal(saved, whole)
