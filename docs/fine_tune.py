"""Fine-tune the bundled GPT-2 on Shakespeare's sonnets, with its trunk in a server process.

    python docs/fine_tune.py

starts ``splitlearn serve`` for the trunk, and trains a LoRA adapter on all layers with PEFT and the Trainer of
transformers; then trains the unsplit model in the same way, and compares. It leaves ``adapter/`` in ``--out``, which
PEFT loads on the unsplit model, and ``loss.svg``. The exit code is 1 where a bit differs.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

try:
    from peft import LoraConfig, PeftModel, get_peft_model

    import splitlearn_serve  # noqa: F401  # started below, as a process
except ImportError as error:
    sys.exit(f'{error}\nthis needs more packages: pip install "splitlearn[serve,peft]"')

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, Trainer, TrainingArguments

from splitlearn_core import SplitCausalLM, connect, load_split_model
from splitlearn_core.fine_tuning.sonnets import sonnets
from splitlearn_core.line_plot import Axis, Line, line_plot

MODEL, CUTS = "bundled:gpt2", (1, 5)
FOLDER = str(files("splitlearn_gpt2") / "bundled")
PROMPT = "The people of the United States"


@dataclass
class Training:
    """What one training gave."""

    losses: list[float]
    held_out: tuple[float, float]
    texts: tuple[str, str]
    adapter: dict[str, torch.Tensor]
    model: Any


@contextmanager
def trunk_server() -> Iterator[str]:
    """Serve the trunk from a process of its own, which never has the other layers; yields its URL."""
    cuts = [str(cut) for cut in CUTS]
    command = [sys.executable, "-m", "splitlearn_core", "serve", MODEL, "--split", *cuts, "--dtype", "float32"]
    with subprocess.Popen([*command, "--port", "0"], stderr=subprocess.PIPE, text=True) as server:
        said = ""
        for line in server.stderr:
            said += line
            if line.startswith("trunk at "):
                break
        else:
            sys.exit(f"the server has not started:\n{said}")
        # It would wait for a reader once the pipe is full.
        threading.Thread(target=server.stderr.read, daemon=True).start()
        try:
            yield line.removeprefix("trunk at ").strip()
        finally:
            server.terminate()


def windows(tokenizer: Any, poems: list[str], length: int) -> list[dict[str, list[int]]]:
    """Return the poems one after the other, cut into windows of so many tokens."""
    ids: list[int] = []
    for poem in poems:
        ids.append(tokenizer.eos_token_id)
        for line in poem.splitlines(keepends=True):
            ids += tokenizer(line)["input_ids"]
    cut = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
    return [{"input_ids": window, "labels": window} for window in cut]


def text_of(model: Any, tokenizer: Any) -> str:
    """Return what a model writes."""
    torch.manual_seed(1)
    ids = tokenizer(PROMPT, return_tensors="pt")
    made = model.eval().generate(**ids, max_new_tokens=60, do_sample=True, temperature=0.8, top_k=40, pad_token_id=0)
    return str(tokenizer.decode(made[0], skip_special_tokens=True))


def train(model: Any, steps: int, out: Path) -> Training:
    """Train an adapter on a model: nothing in here is particular to a split one."""
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    learned, held_out = (windows(tokenizer, poems, 64) for poems in sonnets())
    lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear", fan_in_fan_out=True)
    before = text_of(model, tokenizer)
    torch.manual_seed(0)
    model = get_peft_model(model, lora)
    settings = TrainingArguments(
        output_dir=str(out),
        max_steps=steps,
        per_device_train_batch_size=8,
        learning_rate=5e-3,
        lr_scheduler_type="cosine",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=not sys.stderr.isatty(),
    )
    trainer = Trainer(model, settings, train_dataset=learned, eval_dataset=held_out[:32])
    trainer.remove_callback(PrinterCallback)
    first = trainer.evaluate()["eval_loss"]
    trainer.train()
    last = trainer.evaluate()["eval_loss"]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    adapter = {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}
    return Training(losses, (first, last), (before, text_of(model, tokenizer)), adapter, model)


def whole_model() -> Any:
    """Load the unsplit model."""
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)


def picture(split: Training, unsplit: Training) -> str:
    """Draw both losses, the unsplit one wide and the split one within it."""
    every, steps = [*split.losses, *unsplit.losses], len(split.losses)
    return line_plot(
        [
            Line("unsplit", list(enumerate(unsplit.losses, 1)), "#f0b429", 7),
            Line("trunk in a server", list(enumerate(split.losses, 1)), "#1b6ca8", 1.5, "6 3"),
        ],
        Axis("step", 1, max(steps, 2), (1, steps), ".0f"),
        Axis("loss per token", min(every), max(every), (min(every), max(every))),
        f"{MODEL} on Shakespeare's sonnets, {steps} steps of the Trainer: one line, "
        + ("equal to the last bit" if split.losses == unsplit.losses else "and it is NOT"),
    )


def main() -> int:
    """Train, compare and say what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--out", type=Path, default=Path("tuned"), help="the folder of the adapter and the picture")
    arguments = parser.parse_args()
    if arguments.steps < 1:
        parser.error("--steps: at least one")
    arguments.out.mkdir(parents=True, exist_ok=True)

    with trunk_server() as url:
        print(f"the trunk is at {url}", flush=True)
        ends = load_split_model(None, CUTS, MODEL, parts=("bottom", "top"), dtype="float32")
        trunk = connect(url)
        split = train(SplitCausalLM(ends.bottom, trunk, ends.top), arguments.steps, arguments.out)
        split.model.save_pretrained(arguments.out / "adapter")
        ids = torch.arange(32)[None]
        with torch.no_grad():
            logits = split.model(input_ids=ids, use_cache=False).logits
        crossed = trunk.host.bytes_sent + trunk.host.bytes_received
        trunk.close()

    print("the same on the unsplit model", flush=True)
    unsplit = train(whole_model(), arguments.steps, arguments.out)
    loaded = PeftModel.from_pretrained(whole_model(), arguments.out / "adapter").eval()
    with torch.no_grad():
        expected = loaded(input_ids=ids, use_cache=False).logits
    (arguments.out / "loss.svg").write_text(picture(split, unsplit), encoding="utf-8")

    checks = {
        "losses of all steps": torch.equal(torch.tensor(split.losses), torch.tensor(unsplit.losses)),
        "adapters": list(split.adapter) == list(unsplit.adapter)
        and all(torch.equal(split.adapter[name], each) for name, each in unsplit.adapter.items()),
        "losses on poems held out": split.held_out == unsplit.held_out,
        "texts": split.texts == unsplit.texts,
        "logits of the unsplit model with the saved adapter": torch.equal(expected, logits),
    }
    for name, is_equal in checks.items():
        print(f"{'equal' if is_equal else 'DIFFERS':<8}{name}")
    print(f"\nloss {split.losses[0]:.3f} in the first step, {split.losses[-1]:.3f} in the last")
    print(f"on poems held out {split.held_out[0]:.3f} before, {split.held_out[1]:.3f} after")
    print(f"crossed {crossed / 2**20:,.0f} MiB in all")
    print(f"\nbefore: {split.texts[0]}\n\nafter: {split.texts[1]}\n\nin {arguments.out}: adapter, loss.svg")
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
