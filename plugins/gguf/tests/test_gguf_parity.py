"""Components out of a GGUF file against the model that transformers makes of the same file, to the last bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from splitlearn_core import SplitCausalLM, load_split_model

pytestmark = pytest.mark.libs

IDS = torch.tensor([[5, 17, 42, 99, 3, 8], [0, 0, 11, 23, 64, 2]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
#: Model types that transformers reads from GGUF itself, and variants worth a line of their own.
READ_BY_BOTH = [
    ("gpt2", {}),
    ("gpt2", {"tie_word_embeddings": False}),
    ("qwen2", {}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("qwen3", {"head_dim": 128}),  # transformers takes no other from the file
    ("llama", {}),
    ("llama", {"num_key_value_heads": 1}),
    ("gemma2", {"sliding_window": 4}),
    ("gemma3_text", {"num_hidden_layers": 7, "sliding_window": 4}),
]


def unsplit(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype)
    model.generation_config.eos_token_id = None
    return model.eval()


def assert_equal(path: Path, reference: Any, points: tuple[int, ...] = (1, 3), **options: Any) -> None:
    """Compare weights, logits and a cached continuation."""
    parts = load_split_model(None, points, path, **options)
    expected = reference.state_dict()
    for part in parts:
        for key, tensor in part.state_dict().items():
            assert torch.equal(tensor, expected[key]), key
    split = SplitCausalLM(*parts)
    split.generation_config.eos_token_id = None
    with torch.inference_mode():
        logits = [m(input_ids=IDS, attention_mask=MASK, use_cache=False).logits for m in (reference, split)]
        continued = [
            m.generate(
                input_ids=IDS,
                attention_mask=MASK,
                max_new_tokens=4,
                do_sample=False,
                pad_token_id=0,
                output_logits=True,
                return_dict_in_generate=True,
            ).logits
            for m in (reference, split)
        ]
    assert torch.equal(*logits)
    assert len(continued[0]) == 4
    assert all(torch.equal(*step) for step in zip(*continued, strict=True))


@pytest.mark.parametrize(("model_type", "overrides"), READ_BY_BOTH, ids=str)
def test_a_file_alone_is_what_transformers_makes_of_it(
    gguf_file: Callable[..., Path], model_type: str, overrides: dict[str, Any]
) -> None:
    """Configuration, names and values all come out of the file."""
    path = gguf_file(model_type, "Q8_0", **overrides)

    assert_equal(path, unsplit(path))


LINEAR = {
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 64,
}


@pytest.mark.newest
@pytest.mark.parametrize(
    ("model_type", "overrides"),
    [
        ("qwen3_5_text", LINEAR),
        ("qwen3_5_moe_text", {**LINEAR, **EXPERTS}),
        ("lfm2", {"layer_types": ["conv", "full_attention", "conv", "conv"]}),
    ],
    ids=["qwen3_5_text", "qwen3_5_moe_text", "lfm2"],
)
def test_running_states_are_those_that_transformers_reads(
    gguf_file: Callable[..., Path], model: Callable[..., Any], model_type: str, overrides: dict[str, Any]
) -> None:
    """Of exponentials, of which the file has the negative, transformers takes logarithms in 32 bits."""
    chance = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, values in model(model_type, **overrides).named_parameters():
            if name.endswith("A_log"):
                values.copy_(torch.empty(values.shape).uniform_(0.01, 16, generator=chance).log())
    path = gguf_file(model_type, "Q8_0", **overrides)

    assert_equal(path, unsplit(path))


@pytest.mark.sample(9)
@pytest.mark.parametrize("quantization", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
@pytest.mark.parametrize("model_type", ["gpt2", "llama", "gemma2"])
def test_every_type_of_block(gguf_file: Callable[..., Path], model_type: str, quantization: str) -> None:
    """What the gguf library can quantise, in the families whose values the converter changes."""
    path = gguf_file(model_type, quantization)

    assert_equal(path, unsplit(path))


@pytest.mark.parametrize("quantization", ["Q4_K", "Q6_K"])
def test_large_blocks(gguf_file: Callable[..., Path], quantization: str) -> None:
    """The types of most files on the Hub, whose blocks have 256 values."""
    path = gguf_file("llama", quantization, hidden_size=256, intermediate_size=256, head_dim=64)

    assert_equal(path, unsplit(path))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_another_dtype(gguf_file: Callable[..., Path], dtype: str) -> None:
    """Values are dequantised and changed in float32, and converted last."""
    path = gguf_file("gemma2", "Q8_0")

    assert_equal(path, unsplit(path, getattr(torch, dtype)), dtype=dtype)


@pytest.mark.parametrize("points", [(2,), (1, 2, 3)], ids=["one cut", "three cuts"])
def test_other_numbers_of_components(gguf_file: Callable[..., Path], points: tuple[int, ...]) -> None:
    """A file is cut in one place, or in three, as well."""
    path = gguf_file("gemma2", "Q8_0")

    assert_equal(path, unsplit(path), points)
