"""Runs the model tests of transformers on split models, and each of them on the unsplit class as well.

transformers tests every model class with one suite (``tests/test_modeling_common.py``, ``tests/generation``). Here a
split model of three layers stands in for the causal class of a family. Only tests that pass on the unsplit class
count, since what fails there says nothing about the split. The suite is no part of the wheel of transformers, and its
source archive has only a part; a git checkout of the installed version has all of it::

    python tests/transformers_suite.py PATH/TO/transformers [--family qwen2 ...] [--json FILE]

pytest and parameterized have to be installed. A family takes about five minutes on two cores.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import unittest
from collections import Counter
from pathlib import Path
from typing import Any

#: The families, each with its causal class, the class without a head and the changes to the tester's values.
FAMILIES: dict[str, tuple[str, str]] = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Model"),
    "gpt2-no-token-types": ("GPT2LMHeadModel", "GPT2Model"),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Model"),
    "gemma": ("GemmaForCausalLM", "GemmaModel"),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Model"),
    "gemma3_text": ("Gemma3ForCausalLM", "Gemma3TextModel"),
}
KINDS = ("unsplit", "split")
#: What the tree must have beside the package itself.
NEEDED = (
    "tests/__init__.py",
    "tests/causal_lm_tester.py",
    "tests/test_modeling_common.py",
    "tests/test_configuration_common.py",
    "tests/test_training_mixin.py",
    "tests/generation/test_utils.py",
    "tests/models/gpt2/test_modeling_gpt2.py",
)
#: Tests of other classes of the family, and of hardware and services that are not there.
OTHERS = (
    "sequence_classification",
    "token_classification",
    "question_answering",
    "problem_types",
    "_tp_",
    "tensor_parallel",
    "fsdp",
    "pipeline_",
    "executorch",
    "flash_attn",
    "flash_attention",
    "deepspeed",
    "onnx",
    "multimodal",
    "training_overfit",
)
LAYERS = 3
WORST_FIRST = ("failed", "skipped", "passed")
#: Compiling is slow on a busy machine.
SECONDS_PER_TEST = 600
_TREE = "SPLITLEARN_SUITE_TREE"


def split_class(architecture: Any) -> Any:
    """Return a class that is used as the architecture is, and whose models are split.

    Only what makes and stores models is written here, since a split model is made of components and stored as folders.
    """
    from splitlearn_core import SplitCausalLM, load_split_model, merge_split, save_split

    def parts_of(directory: str, layers: int, **options: Any) -> Any:
        return load_split_model(
            model_name_or_path=directory, split_points=(1, layers - 1), strategy="copied", progress=False, **options
        )

    class Split(SplitCausalLM):
        config_class = architecture.config_class
        input_modalities = getattr(architecture, "input_modalities", ("text",))

        def __init__(self, config: Any, *_: Any, **__: Any) -> None:
            with tempfile.TemporaryDirectory() as directory:
                architecture(copy.deepcopy(config)).save_pretrained(directory)
                if getattr(config, "gradient_checkpointing", False):
                    # transformers drops it from the configuration of a model that it has made.
                    file = Path(directory, "config.json")
                    file.write_text(json.dumps({**json.loads(file.read_text()), "gradient_checkpointing": True}))
                parts = parts_of(directory, config.num_hidden_layers, attn_implementation=config._attn_implementation)
            super().__init__(*parts)
            self.train()

        @classmethod
        def _of(cls, parts: Any) -> Any:
            model = cls.__new__(cls)
            SplitCausalLM.__init__(model, *parts)
            return model.eval()

        @classmethod
        def _from_config(cls, config: Any, dtype: Any = None, attn_implementation: Any = None, **_: Any) -> Any:
            config = copy.deepcopy(config)
            if attn_implementation is not None:
                config._attn_implementation = attn_implementation
            model = cls(config)
            return model.to(dtype) if dtype is not None else model

        def save_pretrained(self, save_directory: Any, max_shard_size: Any = "5GB", **_: Any) -> None:
            with tempfile.TemporaryDirectory() as directory:
                save_split(self, f"{directory}/split", progress=False)
                merge_split(
                    f"{directory}/split", out=f"{directory}/merged", max_shard_size=max_shard_size, progress=False
                )
                shutil.copytree(f"{directory}/merged", save_directory, dirs_exist_ok=True)

        @classmethod
        def from_pretrained(
            cls,
            pretrained_model_name_or_path: Any = None,
            *,
            output_loading_info: bool = False,
            dtype: Any = None,
            torch_dtype: Any = None,
            attn_implementation: Any = None,
            device_map: Any = None,
            max_memory: Any = None,
            config: Any = None,
            state_dict: Any = None,
            **others: Any,
        ) -> Any:
            if pretrained_model_name_or_path is None and state_dict is not None:
                ranges = [(type(part), part.start_layer, part.end_layer) for part in cls(config).components]
                return cls._of([kind.from_pretrained_split(state_dict, config, *ends) for kind, *ends in ranges])
            ignored = {"low_cpu_mem_usage", "use_safetensors", "weights_only", "local_files_only"}
            unknown = sorted(set(others) - ignored)
            if unknown or pretrained_model_name_or_path is None:
                raise NotImplementedError(f"load_split_model has no such arguments: {unknown or 'no checkpoint'}")
            values = json.loads(Path(pretrained_model_name_or_path, "config.json").read_text())
            layers = values.get("num_hidden_layers") or values["n_layer"]
            options = {
                "dtype": dtype if dtype is not None else torch_dtype,
                "attn_implementation": attn_implementation
                or (config._attn_implementation if config is not None else None),
                "device_map": device_map,
                "max_memory": max_memory,
            }
            parts = parts_of(
                str(pretrained_model_name_or_path),
                layers,
                **{name: value for name, value in options.items() if value is not None},
            )
            model = cls._of(parts)
            # load_split_model raises where a tensor is missing or of another shape.
            found: dict[str, Any] = {
                "missing_keys": set(),
                "unexpected_keys": set(),
                "mismatched_keys": set(),
                "error_msgs": [],
            }
            return (model, found) if output_loading_info else model

    Split.__name__ = architecture.__name__
    Split.__qualname__ = architecture.__qualname__
    return Split


def _tester(family: str) -> Any:
    """Return what makes configurations and inputs of a family, as the suite's own with three layers."""
    import transformers

    base = getattr(transformers, FAMILIES[family][1])
    if family.startswith("gpt2"):
        parent = importlib.import_module("tests.models.gpt2.test_modeling_gpt2").GPT2ModelTester
    else:
        parent = importlib.import_module("tests.causal_lm_tester").CausalLMModelTester

    class Tester(parent):  # type: ignore[misc]
        base_model_class = base
        causal_lm_class = getattr(transformers, FAMILIES[family][0])

        def __init__(self, case: Any, **values: Any) -> None:
            super().__init__(case, **{"num_hidden_layers": LAYERS, **values})
            if family == "gemma3_text":
                self.attention_probs_dropout_prob = 0.0
                self.layer_types = ["full_attention", "sliding_attention", "full_attention"]

        def prepare_config_and_inputs_for_common(self) -> Any:
            config, inputs = super().prepare_config_and_inputs_for_common()
            if family == "gpt2-no-token-types":
                inputs.pop("token_type_ids", None)
            return config, inputs

    return Tester


def test_class(family: str, kind: str) -> type:
    """Return the suite's test class for the unsplit or the split class of a family."""
    import transformers

    suite = importlib.import_module("tests.causal_lm_tester").CausalLMModelTest
    architecture = getattr(transformers, FAMILIES[family][0])
    model_class = split_class(architecture) if kind == "split" else architecture
    body: dict[str, Any] = {
        "model_tester_class": _tester(family),
        "all_model_classes": (model_class,),
        "all_generative_model_classes": (model_class,),
        "pipeline_model_mapping": {},
        "_is_stateful": True,
        "model_split_percents": [0.5, 0.6, 0.7],
        **{name: None for name in dir(suite) if name.startswith("test_") and any(part in name for part in OTHERS)},
    }
    if family.startswith("gpt2"):
        body["test_missing_keys"] = False
    return type(f"{kind}_{family}".replace("-", "_"), (suite, unittest.TestCase), body)


class Recorder:
    """A pytest plugin that ends tests that take too long, and writes what came of each."""

    def __init__(self, report: Path) -> None:
        self.report = report
        self.outcomes: dict[str, dict[str, str]] = {}

    def pytest_runtest_setup(self) -> None:
        signal.signal(signal.SIGALRM, _out_of_time)
        signal.alarm(SECONDS_PER_TEST)

    def pytest_runtest_logreport(self, report: Any) -> None:
        name = report.nodeid.rpartition("::")[2]
        if report.when == "call" or report.outcome != "passed":
            text = report.longreprtext if report.failed else str(report.longrepr or "")
            # Of the traceback's last part, the lines that pytest marks as the error.
            lines = [line[1:].strip() for line in text.splitlines() if line.startswith("E  ")]
            where = [line for line in text.splitlines() if re.match(r"\S+:\d+: ", line)]
            outcome = {
                "outcome": report.outcome,
                "error": (lines[0] if lines else text.strip().rpartition("\n")[2])[:400],
                "where": (where[-1] if where else "")[:200],
            }
            # A test has a report of its own and one for each subtest: the worst counts.
            earlier = self.outcomes.get(name, outcome)
            self.outcomes[name] = min(outcome, earlier, key=lambda each: WORST_FIRST.index(each["outcome"]))
        if report.when == "teardown":
            signal.alarm(0)
            self.report.write_text(json.dumps(self.outcomes))


def _out_of_time(*_: Any) -> None:
    raise TimeoutError(f"over {SECONDS_PER_TEST} s")


def _run_inside(family: str, kind: str, report: Path, expression: str) -> int:
    """Run the tests of one class in this process."""
    import pytest

    sys.path.insert(0, os.environ[_TREE])
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory, "test_in_suite.py")
        file.write_text(
            f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
            "import transformers_suite\n"
            f"TestModel = transformers_suite.test_class({family!r}, {kind!r})\n"
        )
        arguments = [
            str(file),
            f"--rootdir={directory}",
            f"--confcutdir={directory}",
            "-c/dev/null",
            "-q",
            "--tb=short",
            "-pno:cacheprovider",
            "-pno:randomly",
            "-pno:asyncio",
            "-Wignore",
            "--import-mode=importlib",
        ]
        if expression:
            arguments += ["-k", expression]
        return int(pytest.main(arguments, plugins=[Recorder(report)]))


def run(tree: Path, family: str, kind: str, expression: str, log: Path | None) -> dict[str, dict[str, str]]:
    """Run the tests of one class in a process of its own; returns outcome and error of each."""
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory, "report.json")
        done = subprocess.run(
            [sys.executable, __file__, str(tree), "--inside", family, kind, str(report), "-k", expression],
            env={**os.environ, _TREE: str(tree), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if log is not None:
            log.write_text(done.stdout)
        if not report.exists():
            raise SystemExit(f"the {kind} tests of {family} did not start:\n{done.stdout[-3000:]}")
        return dict(json.loads(report.read_text()))


def missing(tree: Path) -> list[str]:
    """Return what a tree would need and does not have."""
    return [name for name in NEEDED if not (tree / name).is_file()]


def _table(results: dict[str, Any]) -> str:
    lines = [
        "family                unsplit pass/fail/skip   split pass/fail/skip   of the unsplit passes, split passes"
    ]
    for family, ran in results.items():
        kinds = {kind: ran.get(kind, {}) for kind in KINDS}
        counts = {kind: Counter(each["outcome"] for each in tests.values()) for kind, tests in kinds.items()}
        shown = ["/".join(str(counts[kind][word]) for word in ("passed", "failed", "skipped")) for kind in KINDS]
        passing = [name for name, each in kinds["unsplit"].items() if each["outcome"] == "passed"]
        both = [name for name in passing if kinds["split"].get(name, {}).get("outcome") == "passed"]
        lines.append(f"{family:<21} {shown[0]:<24} {shown[1]:<22} {len(both)} of {len(passing)}")
    return "\n".join(lines)


def _differences(kinds: dict[str, Any]) -> dict[str, dict[str, str]]:
    if kinds.keys() < set(KINDS):
        return {}
    absent = {"outcome": "absent", "error": "", "where": ""}
    passing = [name for name, each in kinds["unsplit"].items() if each["outcome"] == "passed"]
    after = {name: kinds["split"].get(name, absent) for name in passing}
    return {name: each for name, each in after.items() if each["outcome"] != "passed"}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("tree", type=Path, help="a source tree of transformers with its tests folder")
    parser.add_argument("--family", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("-k", dest="expression", default="", help="which tests, as pytest takes it")
    parser.add_argument("--json", type=Path, help="write every outcome to this file")
    parser.add_argument("--control", type=Path, help="take the unsplit outcomes from such a file")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="run these alone")
    parser.add_argument("--logs", type=Path, help="keep pytest's output of each run in this folder")
    parser.add_argument("--inside", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    tree: Path = options.tree.resolve()
    if options.inside:
        family, kind, report = options.inside
        return _run_inside(family, kind, Path(report), options.expression)
    lacking = missing(tree)
    if lacking:
        print(f"{tree} has no {', no '.join(lacking)}.", file=sys.stderr)
        print("Take a git checkout of the transformers version that is installed.", file=sys.stderr)
        return 2
    earlier = json.loads(options.control.read_text()) if options.control else {}
    results: dict[str, Any] = {}
    for family in options.family:
        results[family] = {}
        for kind in options.kinds:
            if kind == "unsplit" and family in earlier:
                results[family][kind] = earlier[family][kind]
                continue
            log = options.logs and options.logs / f"{family}-{kind}.txt"
            results[family][kind] = run(tree, family, kind, options.expression, log)
        if options.expression and family in earlier:
            ran = results[family].get("split", {})
            results[family]["unsplit"] = {
                name: each for name, each in earlier[family]["unsplit"].items() if name in ran
            }
        if options.json:
            options.json.write_text(json.dumps(results, indent=1))
        for name, each in _differences(results[family]).items():
            print(f"{family} {each['outcome']} {name}: {each['error']}  [{each['where']}]", flush=True)
    print(_table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
