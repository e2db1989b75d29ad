"""Fine-tuning of the bundled model with its trunk in another process: ``demo --train``, and the script of the page."""

from __future__ import annotations

import importlib.resources
import json
import math
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, Trainer, TrainingArguments

from splitlearn_core import load_split_model
from splitlearn_core.fine_tuning.comparison import TuningRecipe, compare_fine_tuning
from splitlearn_core.fine_tuning.sonnets import sonnets
from splitlearn_core.hosts.sessions import SessionTable
from splitlearn_core.loading.opening import open_model
from support.hosts import MemoryEndpoint, remote
from support.warm import WarmInterpreter

peft = pytest.importorskip("peft", reason="the extra peft is not installed")
pytest.importorskip("accelerate", minversion="1.3.0", reason="needs accelerate 1.3 or newer")

pytestmark = [
    # Of PEFT's and transformers' own making, on the unsplit model too.
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.timeout(600),
]

PLACE = str(importlib.resources.files("splitlearn_gpt2") / "bundled")
SCRIPT = Path(__file__).parents[1] / "docs" / "fine_tune.py"
STEPS = 4

Cli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    """Take one thread, as the processes do; put back what a Trainer leaves behind."""
    from accelerate.state import AcceleratorState

    before, threads = dict(os.environ), torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    os.environ.clear()
    os.environ.update(before)
    AcceleratorState._reset_state(reset_partial_state=True)


def unsplit() -> Any:
    return AutoModelForCausalLM.from_pretrained(PLACE, dtype=torch.float32)


def windows(poems: Sequence[str]) -> torch.Tensor:
    """Return poems as the demonstration and the script cut them, whose data this is: ``[windows, 64]``."""
    tokenizer = AutoTokenizer.from_pretrained(PLACE)
    lines = [
        ids
        for poem in poems
        for ids in (
            [tokenizer.eos_token_id],
            *(tokenizer(line)["input_ids"] for line in poem.splitlines(keepends=True)),
        )
    ]
    flat = [token for ids in lines for token in ids]
    return torch.tensor(flat[: len(flat) // 64 * 64]).view(-1, 64)


def adapted(model: Any) -> Any:
    return peft.get_peft_model(
        model,
        peft.LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear", fan_in_fan_out=True),
    )


def curves(picture: str) -> dict[str, list[str]]:
    """Return the points of each line of a picture by its name."""
    elements = list(ET.fromstring(picture).iter())
    lines = {e.get("stroke"): e.get("points", "").split() for e in elements if e.tag.endswith("polyline")}
    names = {e.get("fill"): e.text or "" for e in elements if e.tag.endswith("text")}
    return {names[colour]: points for colour, points in lines.items()}


def test_the_poems_are_divided() -> None:
    """All 154 sonnets are there, and none of them is both learned and held out."""
    learned, held_out = sonnets()
    assert (len(learned), len(held_out)) == (135, 19)
    assert not set(learned) & set(held_out)
    assert all(poem.count("\n") in (12, 14, 15) for poem in [*learned, *held_out])
    assert learned[0].startswith("From fairest creatures we desire increase,\n")


def test_demo_trains_what_the_unsplit_model_learns(cli: Cli, tmp_path: Path) -> None:
    """Losses of all steps, and on poems held out, are those of a training with transformers and PEFT alone, here."""
    picture = tmp_path / "loss.svg"
    done = cli("demo", "--train", "--steps", STEPS, "--seed", 3, "--max-new-tokens", 8, "--json", "--plot", picture)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)["fine_tuning"]

    model = unsplit()
    learned, held_out = map(windows, sonnets())
    torch.manual_seed(3)
    wrapped = adapted(model)
    trained = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-3)
    draw = torch.Generator().manual_seed(3)
    losses = []
    for _ in range(STEPS):
        ids = learned[torch.randint(len(learned), (8,), generator=draw)]
        loss = wrapped.train()(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    with torch.no_grad():
        last = wrapped.eval()(input_ids=held_out[:16], labels=held_out[:16]).loss

    assert torch.equal(torch.tensor(result["losses"]), torch.stack(losses))
    assert result["unsplit_losses"] == result["losses"]
    assert result["held_out_loss_after"] == last.item() < result["held_out_loss_before"]
    assert result["equal"] is True
    assert set(result["checks"].values()) == {True}
    assert len(result["checks"]) == 5
    assert result["parameters"] == sum(parameter.numel() for parameter in trained)
    assert 0 < result["parameters_elsewhere"] < result["parameters"]
    # Hidden states go up twice, their gradient once, and each comes back once; adapters up, and their gradients down.
    states, adapter, random = 8 * 64 * 192 * 4, 4 * result["parameters_elsewhere"], torch.get_rng_state().nbytes
    assert result["bytes_sent_per_step"] == 3 * states + adapter + 2 * random
    assert result["bytes_received_per_step"] == 2 * states + adapter + random
    assert result["text_before"] != result["text_after"]

    drawn = curves(picture.read_text(encoding="utf-8"))
    assert list(drawn) == ["unsplit", "trunk elsewhere"]
    assert drawn["unsplit"] == drawn["trunk elsewhere"]
    assert len(drawn["unsplit"]) == STEPS


def test_demo_shows_steps_for_people(cli: Cli) -> None:
    """The two losses of a step in one line; comparisons, bytes and texts after them; no warning."""
    # A picture that cannot be written costs nothing of the rest.
    done = cli("demo", "--train", "--steps", 2, "--max-new-tokens", 4, "--plot", "/proc/loss.svg")
    assert done.returncode == 1
    assert "error: cannot write /proc/loss.svg" in done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if line.endswith(" equal")]
    assert [row[0] for row in rows] == ["1", "2"]
    assert all(row[1] == row[2] for row in rows)
    for words in (
        "equal to the last bit",
        "MiB to the trunk",
        "on poems held out",
        "before: The people",
        "after: The people",
    ):
        assert words in done.stdout
    assert "Warning" not in done.stderr
    assert "DIFFERS" not in done.stdout


def test_a_difference_is_seen() -> None:
    """Where the trunk that is used has another value in one weight, each comparison fails but that with the adapter."""
    parts = load_split_model("gpt2", (1, 5), PLACE, dtype="float32")
    host = remote(MemoryEndpoint(lambda: SessionTable(parts.trunk)))
    with torch.no_grad():
        next(parts.trunk.parameters()).add_(0.1)
    recipe = TuningRecipe(steps=2, batch=2, max_new_tokens=12)

    result = compare_fine_tuning(open_model("bundled:gpt2"), (1, 5), {"trunk": host}, recipe)

    assert not result.equal
    assert not any(result.checks.values())
    assert result.losses != result.unsplit_losses


def test_without_peft(cli: Cli, tmp_path: Path) -> None:
    """It is said before anything is loaded, with the command that installs it."""
    (tmp_path / "peft.py").write_text("raise ImportError(\"No module named 'peft'\", name='peft')\n")
    done = cli("demo", "--train", PYTHONPATH=str(tmp_path))
    assert (done.returncode, done.stdout) == (1, "")
    assert 'pip install "splitlearn-core[peft]"' in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--steps", "3"], 2, "go with --train"),
        (["--plot", "x.svg"], 2, "go with --train"),
        (["--train", "--steps", "0"], 2, "--steps"),
        (["--train", "--plot", "no such folder/x.svg"], 2, "no folder"),
        (["--train", "--prompt", ""], 2, "give at least one word"),
        (["--train", "--max-new-tokens", "300"], 1, "positions of the model"),
    ],
)
def test_wrong_use_is_said(cli: Cli, arguments: list[str], code: int, words: str) -> None:
    """What cannot be is refused before the training."""
    done = cli("demo", *arguments)
    assert done.returncode == code
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert "step 1" not in done.stderr


def test_the_script_saves_what_the_unsplit_model_learns(warm: WarmInterpreter, tmp_path: Path) -> None:
    """Its adapter, learned through ``splitlearn serve``, is that of a Trainer on the unsplit model, here."""
    out = tmp_path / "tuned"
    done = subprocess.run(
        [str(warm.path), str(SCRIPT), "--steps", str(STEPS), "--out", str(out)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert sum(line.startswith("equal ") for line in done.stdout.splitlines()) == 5
    assert "DIFFERS" not in done.stdout

    data, held_out = ([{"input_ids": row, "labels": row} for row in windows(poems).tolist()] for poems in sonnets())
    torch.manual_seed(0)
    model = adapted(unsplit())
    settings = TrainingArguments(
        output_dir=str(tmp_path), max_steps=STEPS, per_device_train_batch_size=8, learning_rate=5e-3,
        lr_scheduler_type="cosine", save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, settings, train_dataset=data, eval_dataset=held_out[:32])
    trainer.remove_callback(PrinterCallback)
    # An evaluation, too, draws a number.
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    assert f"on poems held out {before:.3f} before, {after:.3f} after" in done.stdout
    saved = peft.PeftModel.from_pretrained(unsplit(), out / "adapter")
    expected, actual = (
        {name: each for name, each in one.named_parameters() if "lora_" in name} for one in (model, saved)
    )
    assert list(actual) == list(expected)
    assert all(torch.equal(actual[name], each) for name, each in expected.items())
    assert any(each.any() for name, each in actual.items() if "lora_B" in name)

    drawn = curves((out / "loss.svg").read_text(encoding="utf-8"))
    assert list(drawn) == ["unsplit", "trunk in a server"]
    assert drawn["unsplit"] == drawn["trunk in a server"]
    assert len(drawn["unsplit"]) == STEPS


def test_the_picture_of_the_page_is_one_of_the_script() -> None:
    """Both curves are in it, one line; and the loss falls."""
    text = (SCRIPT.parent / "fine-tuning.svg").read_text(encoding="utf-8")
    drawn = curves(text)
    assert list(drawn) == ["unsplit", "trunk in a server"]
    assert drawn["unsplit"] == drawn["trunk in a server"]
    heights = [float(point.partition(",")[2]) for point in drawn["unsplit"]]
    assert len(heights) >= 100
    assert math.fsum(heights[:10]) < math.fsum(heights[-10:])
    assert "equal to the last bit" in text
