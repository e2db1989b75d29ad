"""lm-eval's ``HFLM`` around a split model: the scores and texts of the unsplit one, bit for bit."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from splitlearn_core import SplitCausalLM, load_split_model
from splitlearn_core.testing.worlds import tiny_model, write_checkpoint

lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is not installed")
from datasets import Dataset  # noqa: E402  # comes with lm_eval
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

pytestmark = [
    pytest.mark.libs,
    # No environment of the checks has lm_eval; this is what it was tried with.
    pytest.mark.newest,
    # Of its, datasets' and nltk's own making, on the unsplit model too.
    pytest.mark.filterwarnings("ignore"),
]

TYPES = ("gpt2", "qwen2", "gemma2", "gemma3_text")
#: Windows smaller than the documents, so that a mask of the wrong kind changes scores.
SPECIAL: dict[str, dict[str, Any]] = {
    "gemma2": {"sliding_window": 4},
    "gemma3_text": {
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    },
}
#: In tokens, each of which is a letter.
MAX_LENGTH = 32
PAIRS = [
    # One context with continuations of one token: scored by one forward.
    ("We the people of the", " "),
    ("We the people of the", "s"),
    ("We the people", " of the states"),
    ("", "Be it so"),
    ("The union is strong, and the states that are in it are as well.", " So be it"),
    ("My fellow citizens", " of the states, in one union"),
]
TEXTS = ["So it is", "The union is strong, and the states that are in it are as well: we the people.", "?"]
GENERATIONS: list[dict[str, Any]] = [
    {"until": [], "max_gen_toks": 8, "do_sample": False},
    # In each of the families, one of these comes.
    {"until": ["2E2", "D-D", ",,", ".."], "max_gen_toks": 12, "do_sample": False},
    {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 0.7, "top_k": 20},
    {"until": [], "max_gen_toks": 6, "do_sample": False, "num_beams": 3},
]
QUESTIONS = [
    {"question": "Who are we?", "choices": ["the people", "the states", "the union"], "answer": 0},
    {"question": "What is strong?", "choices": ["a fellow", "the union", "it"], "answer": 1},
    {"question": "Be it?", "choices": ["so", "no", "not so"], "answer": 0},
    {"question": "Are they?", "choices": ["they are", "no", "so"], "answer": 2},
]

Both = Callable[..., tuple[Any, Any]]


@pytest.fixture(autouse=True)
def own_process() -> Iterator[None]:
    """Put back what evaluation leaves behind."""
    environment, verbosity = dict(os.environ), logging.get_verbosity()
    with torch.random.fork_rng(devices=[]):
        yield
    os.environ.clear()
    os.environ.update(environment)
    logging.set_verbosity(verbosity)


@pytest.fixture(scope="module", params=TYPES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of four layers, with a tokenizer that gives each printable letter of ASCII a token."""
    folder = tmp_path_factory.mktemp(request.param)
    letters = ["\u0120", *map(chr, range(ord("!"), ord("~") + 1))]  # first what stands for a space
    values = {"num_hidden_layers": 4, "vocab_size": len(letters) + 2, **SPECIAL.get(request.param, {})}
    write_checkpoint(folder, tiny_model(request.param, **values))
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>").save_pretrained(folder)
    return folder


@pytest.fixture
def both(checkpoint: Path) -> Both:
    """Make the harness's model around the unsplit and the split model; it finds the tokenizer by the model itself."""

    def both(**options: Any) -> tuple[Any, Any]:
        whole = AutoModelForCausalLM.from_pretrained(checkpoint)
        parts = load_split_model(model_name_or_path=checkpoint, split_points=(1, 3), strategy="mapped", progress=False)
        settings = {"max_length": MAX_LENGTH, "batch_size": 4, **options}
        return HFLM(pretrained=whole, **settings), HFLM(pretrained=SplitCausalLM(*parts), **settings)

    return both


def requests(kind: Any, arguments: list[tuple[Any, ...]]) -> list[Any]:
    return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 1},
        {"batch_size": 4},
        {"logits_cache": False, "softmax_dtype": "float64"},
        {"mixed_precision_dtype": "bfloat16"},
    ],
    ids=["single", "batched", "float64", "autocast"],
)
def test_loglikelihoods_are_those_of_the_unsplit_model(both: Both, options: dict[str, Any]) -> None:
    """Of continuations, and of whole documents in windows."""
    whole, split = both(**options)
    scores = whole.loglikelihood(requests("loglikelihood", PAIRS))
    assert split.loglikelihood(requests("loglikelihood", PAIRS)) == scores
    rolling = requests("loglikelihood_rolling", [(text,) for text in TEXTS])
    sums = whole.loglikelihood_rolling(rolling)
    assert split.loglikelihood_rolling(rolling) == sums
    values = [score for score, _ in scores] + sums
    # In bfloat16 some are the same.
    assert len(set(values)) > len(PAIRS)
    assert all(math.isfinite(value) and value < 0 for value in values)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_texts_are_those_of_the_unsplit_model(both: Both, batch_size: int) -> None:
    """Greedy, sampled and by beams, until a string or to the length; contexts of a batch are padded, or cut."""
    pairs = [(text, arguments) for text in TEXTS for arguments in GENERATIONS]
    texts = []
    for model in both(batch_size=batch_size):
        torch.manual_seed(0)
        texts.append(model.generate_until(requests("generate_until", pairs)))
    assert texts[1] == texts[0]
    assert len(set(texts[0])) > 2 * len(TEXTS)
    assert any(len(text) < GENERATIONS[1]["max_gen_toks"] for text in texts[0][1 :: len(GENERATIONS)])


def test_an_evaluation_gives_the_unsplit_results(both: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    """Metrics, their errors, and every sample, of tasks of three kinds, with examples before the question."""
    # It lists what is installed, by processes of pip's and others.
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda storage: None)
    common = {"custom_dataset": lambda **_: {"test": Dataset.from_list(QUESTIONS)}, "test_split": "test"}
    tasks = [
        {
            **common,
            "task": "choose",
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "answer",
            "num_fewshot": 1,
            "fewshot_split": "test",
        },
        {
            **common,
            "task": "say",
            "output_type": "generate_until",
            "doc_to_text": "{{question}}",
            "doc_to_target": "{{choices[answer]}}",
            "generation_kwargs": {"until": [], "max_gen_toks": 8, "do_sample": False},
            "metric_list": [
                {"metric": name, "aggregation": name, "higher_is_better": True} for name in ("bleu", "chrf")
            ],
        },
        {
            **common,
            "task": "read",
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{question}} {{choices[answer]}}",
        },
    ]
    # Of the thousands of tasks that come with it, none is read.
    manager = TaskManager(include_defaults=False)
    expected, results = (
        lm_eval.simple_evaluate(model, tasks=tasks, task_manager=manager, bootstrap_iters=10) for model in both()
    )
    assert results["results"] == expected["results"]
    assert results["samples"] == expected["samples"]
    for name in ("model_num_parameters", "model_dtype"):
        assert results["config"][name] == expected["config"][name]
    metrics = {task: {name.partition(",")[0] for name in values} for task, values in expected["results"].items()}
    assert metrics["choose"] >= {"acc", "acc_norm", "acc_stderr"}
    assert metrics["say"] >= {"bleu", "chrf"}
    assert metrics["read"] >= {"word_perplexity", "bits_per_byte"}
