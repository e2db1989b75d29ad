"""Configurations that attack: every number out of proportion, in every family, in a process of little memory and time.

Whatever a field says, a plan and a load end in words, or in a model, within the memory of the process.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from splitlearn_core.testing.worlds import tiny_model, write_checkpoint
from support.long import cases
from support.warm import WarmInterpreter

#: gemma and gemma2 have the fields of gemma3_text.
FAMILIES = ["gpt2", "qwen2", "gemma3_text"]
#: Of some six hundred for each family.
CASES = cases(10_000, 90)

#: Run in a process that is ended beyond 3 GiB of its own, or 20 seconds a load. Prints what went wrong.
ATTACK = """
import json, pathlib, random, resource, signal, sys, warnings
warnings.filterwarnings("ignore")
import torch, transformers
from splitlearn_core import SplitLearnError, load_split_model, plan_split
torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
folder = pathlib.Path(sys.argv[1])
config, generation = folder / "config.json", folder / "generation_config.json"
sound = json.loads(config.read_text())
load_split_model(None, (2, 4), folder, progress=False)  # what is imported is no part of the measure
resource.setrlimit(resource.RLIMIT_DATA, (3 << 30, 3 << 30))

class TooLong(BaseException):
    pass

def end(*_):
    raise TooLong

signal.signal(signal.SIGALRM, end)
HUGE = 2**53
VALUES = [HUGE, 2**31, 10**30, -HUGE, -1, 0, 1.5, float("nan"), float("inf"), "64", "x" * 1_000_000, True, [HUGE], [],
          {"a": HUGE}, [[]]]
MORE = {
    "num_labels": HUGE, "n_ctx": HUGE, "id2label": {str(n): "x" for n in range(300_000)},
    "layer_types": ["x"] * 1_000_000,
    "num_beams": HUGE, "pad_token_id": HUGE, "eos_token_id": [HUGE] * 500_000, "architectures": ["x" * 1_000_000],
    "per_layer_config": {"0": {"hidden_size": HUGE}}, "dtype": "x" * 1_000_000, "torch_dtype": ["x"] * 1_000_000,
    "text_config": {"num_labels": HUGE}, "quantization_config": {"quant_method": "x" * 1_000_000},
    "pruned_heads": {str(n): [0] for n in range(100_000)}, "rope_parameters": {"factor": HUGE}, "max_length": HUGE,
    "transformers_version": "9" * 1_000_000, "_name_or_path": "x" * 1_000_000, "vocab_size": 10**8 + 1,
    "num_hidden_layers": 10_000, "n_layer": 10_000, "n_positions": 2**20, "max_position_embeddings": 2**27,
}
cases = [(name, value) for name in sound for value in VALUES] + list(MORE.items())
cases = random.Random(1).sample(cases, min(int(sys.argv[2]), len(cases)))
accepted = 0
for name, value in cases:
    config.write_text(json.dumps({**sound, name: value}))
    signal.alarm(20)
    try:
        plan_split(folder, (2, 4))
        load_split_model(None, (2, 4), folder, parts=("trunk", "top"), progress=False)
        accepted += 1
    except SplitLearnError as error:
        if not error.hint or len(str(error)) > 4000 or "memory" in str(error).lower():
            print(f"{name}={str(value)[:40]}: {type(error).__name__}: {str(error)[:200]} ({len(str(error))})")
    except TooLong:
        print(f"{name}={str(value)[:40]}: over 20 seconds")
    except Exception as error:
        print(f"{name}={str(value)[:40]}: {type(error).__name__}: {str(error)[:200]}")
    finally:
        signal.alarm(0)
config.write_text(json.dumps(sound))
many = [1] * 300_000
said = [("num_beams", HUGE), ("num_return_sequences", HUGE), ("eos_token_id", many), ("bad_words_ids", [many])]
for name, value in said:
    generation.write_text(json.dumps({name: value}))
    try:
        load_split_model(None, (2, 4), folder, parts=("top",), progress=False)
        print(f"generation_config.json: {name} was taken")
    except SplitLearnError as error:
        if len(str(error)) > 4000:
            print(f"{name}: {len(str(error))} characters")
print(json.dumps({"cases": len(cases), "accepted": accepted}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("model_type", FAMILIES)
def test_no_number_of_a_configuration_takes_memory_or_time(
    tmp_path: Path, warm: WarmInterpreter, model_type: str
) -> None:
    write_checkpoint(tmp_path, tiny_model(model_type))
    done = subprocess.run(
        [warm.path, "-c", ATTACK, tmp_path, str(CASES)], capture_output=True, text=True, timeout=280, check=False
    )
    *wrong, counts = done.stdout.splitlines() or [""]
    assert done.returncode == 0, done.stderr[-2000:]
    assert not wrong, "\n".join(wrong)
    found = json.loads(counts)
    # What a family takes no notice of is taken; most is refused.
    assert 0 < found["accepted"] < found["cases"]
