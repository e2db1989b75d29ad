"""Random checkpoints of real sizes, written tensor by tensor from one pool of random numbers."""

from __future__ import annotations

import json
import math
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

GB = 10**9
_POOL = 1 << 24
_SCALE = 0.02
_BYTES = {"F32": 4, "BF16": 2}


class Tensor(NamedTuple):
    """A tensor to be written: norm weights lie around one, everything else around zero."""

    name: str
    shape: tuple[int, ...]
    is_norm: bool = False

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Recipe:
    """What a checkpoint is made of."""

    name: str
    config: dict[str, Any]
    dtype: str
    shard_bytes: int = 100 * GB
    #: Files of the right length without contents; they take no room on most file systems.
    sparse: bool = False

    @property
    def layers(self) -> int:
        return int(self.config.get("n_layer") or self.config["num_hidden_layers"])

    @property
    def cut(self) -> tuple[int, int]:
        """The trunk is layers ``[n/6, 5n/6)``."""
        return self.layers // 6, 5 * self.layers // 6

    @property
    def nbytes(self) -> int:
        return sum(tensor.elements for tensor in self.tensors()) * _BYTES[self.dtype]

    @property
    def vocabulary(self) -> int:
        return int(self.config["vocab_size"])

    @property
    def hidden_size(self) -> int:
        return int(self.config.get("n_embd") or self.config["hidden_size"])

    def tensors(self) -> Iterator[Tensor]:
        return _gpt2_tensors(self.config) if self.config["model_type"] == "gpt2" else _llama_like_tensors(self.config)


@dataclass(frozen=True)
class Checkpoint:
    """A recipe that was carried out."""

    recipe: Recipe
    directory: Path

    @property
    def files(self) -> list[Path]:
        return sorted(self.directory.glob("*.safetensors"))


def gpt2(*, quick: bool) -> Recipe:
    """GPT-2 124M in float32, one file."""
    sizes = (64, 6, 4, 512, 512) if quick else (768, 12, 12, 50257, 1024)
    config = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "bos_token_id": sizes[3] - 1,
        "eos_token_id": sizes[3] - 1,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-5,
        "n_ctx": sizes[4],
        "n_embd": sizes[0],
        "n_head": sizes[2],
        "n_layer": sizes[1],
        "n_positions": sizes[4],
        "vocab_size": sizes[3],
    }
    return Recipe("gpt2", config, "F32")


def qwen2(*, quick: bool) -> Recipe:
    """Qwen2-0.5B in bfloat16, one file."""
    width, depth, heads, kv_heads, inner, words = (64, 6, 4, 2, 128, 512) if quick else (896, 24, 14, 2, 4864, 151936)
    return Recipe("qwen2", _qwen2_config(width, depth, heads, kv_heads, inner, words, tied=True), "BF16")


def gemma(*, quick: bool) -> Recipe:
    """Gemma-2B in bfloat16, shards of 1 GB."""
    sizes = (64, 6, 4, 16, 128, 512) if quick else (2048, 18, 8, 256, 16384, 256000)
    config = {
        "architectures": ["GemmaForCausalLM"],
        "model_type": "gemma",
        "attention_bias": False,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "head_dim": sizes[3],
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": sizes[0],
        "initializer_range": 0.02,
        "intermediate_size": sizes[4],
        "max_position_embeddings": 8192,
        "num_attention_heads": sizes[2],
        "num_hidden_layers": sizes[1],
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "torch_dtype": "bfloat16",
        "vocab_size": sizes[5],
    }
    return Recipe("gemma", config, "BF16", 100_000 if quick else GB)


def sparse(layers: int, *, quick: bool) -> Recipe:
    """Layers of Qwen2-72B, as many as asked, in sparse shards of 5 GB."""
    sizes = (64, 4, 2, 128, 512) if quick else (8192, 64, 8, 29568, 152064)
    width, heads, kv_heads, inner, words = sizes
    config = _qwen2_config(width, layers, heads, kv_heads, inner, words, tied=False)
    return Recipe(f"sparse-{layers}", config, "BF16", 200_000 if quick else 5 * GB, sparse=True)


def experts(*, quick: bool) -> Recipe:
    """A small Qwen3-MoE of 3 GB in bfloat16, shards of 1 GB: a tensor for each expert."""
    sizes = (64, 6, 4, 2, 16, 4, 32, 512) if quick else (2048, 12, 16, 4, 128, 32, 576, 32000)
    return Recipe("experts", _qwen3_moe_config(*sizes), "BF16", 200_000 if quick else GB)


def sparse_experts(layers: int, *, quick: bool) -> Recipe:
    """Layers of a Qwen3-MoE of 435 GB, as many as asked, in sparse shards of 5 GB."""
    sizes = (64, layers, 4, 2, 16, 4, 32, 512) if quick else (4096, layers, 64, 4, 128, 128, 2304, 151936)
    name, shard_bytes = f"sparse-experts-{layers}", 200_000 if quick else 5 * GB
    return Recipe(name, _qwen3_moe_config(*sizes), "BF16", shard_bytes, sparse=True)


def make(recipe: Recipe, cache_dir: Path) -> Checkpoint:
    """Write a checkpoint, unless an earlier run has left it there whole."""
    directory = cache_dir / f"{recipe.name}-{zlib.crc32(repr(recipe).encode()):08x}"
    if not directory.is_dir():
        _check_disk(recipe, cache_dir)
        partial = directory.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write(recipe, partial)
        partial.rename(directory)
    return Checkpoint(recipe, directory)


def _check_disk(recipe: Recipe, cache_dir: Path) -> None:
    free = shutil.disk_usage(cache_dir).free
    if not recipe.sparse and recipe.nbytes > free:
        raise SystemExit(f"{recipe.name} takes {recipe.nbytes / GB:.1f} GB; {free / GB:.1f} GB are free in {cache_dir}")


def _qwen2_config(
    width: int, depth: int, heads: int, kv_heads: int, inner: int, words: int, *, tied: bool
) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "attention_dropout": 0.0,
        "bos_token_id": words - 2,
        "eos_token_id": words - 1,
        "hidden_act": "silu",
        "hidden_size": width,
        "initializer_range": 0.02,
        "intermediate_size": inner,
        "max_position_embeddings": 32768,
        "max_window_layers": depth,
        "num_attention_heads": heads,
        "num_hidden_layers": depth,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": words,
    }


def _qwen3_moe_config(
    width: int, depth: int, heads: int, kv_heads: int, head_dim: int, count: int, inner: int, words: int
) -> dict[str, Any]:
    return {
        **_qwen2_config(width, depth, heads, kv_heads, 3 * width, words, tied=False),
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "head_dim": head_dim,
        "mlp_only_layers": [],
        "moe_intermediate_size": inner,
        "norm_topk_prob": True,
        "num_experts": count,
        "num_experts_per_tok": 2,
    }


def _gpt2_tensors(config: dict[str, Any]) -> Iterator[Tensor]:
    width = config["n_embd"]
    yield Tensor("transformer.wte.weight", (config["vocab_size"], width))
    yield Tensor("transformer.wpe.weight", (config["n_positions"], width))
    for layer in range(config["n_layer"]):
        block = f"transformer.h.{layer}"
        for name, shape in (
            ("attn.c_attn", (width, 3 * width)),
            ("attn.c_proj", (width, width)),
            ("mlp.c_fc", (width, 4 * width)),
            ("mlp.c_proj", (4 * width, width)),
        ):
            yield Tensor(f"{block}.{name}.weight", shape)
            yield Tensor(f"{block}.{name}.bias", shape[1:])
        for name in ("ln_1", "ln_2"):
            yield Tensor(f"{block}.{name}.weight", (width,), is_norm=True)
            yield Tensor(f"{block}.{name}.bias", (width,))
    yield Tensor("transformer.ln_f.weight", (width,), is_norm=True)
    yield Tensor("transformer.ln_f.bias", (width,))


def _llama_like_tensors(config: dict[str, Any]) -> Iterator[Tensor]:
    width, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim", width // heads)
    queries, keys = heads * head_dim, config["num_key_value_heads"] * head_dim
    has_bias = config["model_type"] == "qwen2"
    is_one = config["model_type"] != "gemma"  # Gemma's norms add the one themselves
    yield Tensor("model.embed_tokens.weight", (config["vocab_size"], width))
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}"
        for name, rows in (("q", queries), ("k", keys), ("v", keys)):
            yield Tensor(f"{block}.self_attn.{name}_proj.weight", (rows, width))
            if has_bias:
                yield Tensor(f"{block}.self_attn.{name}_proj.bias", (rows,))
        yield Tensor(f"{block}.self_attn.o_proj.weight", (width, queries))
        parts = [""]
        if "num_experts" in config:
            inner, parts = config["moe_intermediate_size"], [f"experts.{n}." for n in range(config["num_experts"])]
            yield Tensor(f"{block}.mlp.gate.weight", (config["num_experts"], width))
            yield Tensor(f"{block}.self_attn.q_norm.weight", (head_dim,), is_norm=True)
            yield Tensor(f"{block}.self_attn.k_norm.weight", (head_dim,), is_norm=True)
        for part in parts:
            yield Tensor(f"{block}.mlp.{part}gate_proj.weight", (inner, width))
            yield Tensor(f"{block}.mlp.{part}up_proj.weight", (inner, width))
            yield Tensor(f"{block}.mlp.{part}down_proj.weight", (width, inner))
        yield Tensor(f"{block}.input_layernorm.weight", (width,), is_one)
        yield Tensor(f"{block}.post_attention_layernorm.weight", (width,), is_one)
    yield Tensor("model.norm.weight", (width,), is_one)
    if not config.get("tie_word_embeddings", True):
        yield Tensor("lm_head.weight", (config["vocab_size"], width))


def _write(recipe: Recipe, directory: Path) -> None:
    (directory / "config.json").write_text(json.dumps(recipe.config, indent=2))
    tokens = {key: recipe.config[key] for key in ("bos_token_id", "eos_token_id")}
    (directory / "generation_config.json").write_text(json.dumps(tokens))
    shards = list(_shards(recipe))
    if len(shards) == 1:
        _write_shard(directory / "model.safetensors", shards[0], recipe)
        return
    weight_map = {}
    for number, tensors in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_shard(directory / name, tensors, recipe)
        weight_map.update({tensor.name: name for tensor in tensors})
    index = {"metadata": {"total_size": recipe.nbytes}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def _shards(recipe: Recipe) -> Iterator[list[Tensor]]:
    """Fill shards in order, as ``save_pretrained`` does."""
    shard: list[Tensor] = []
    size = 0
    for tensor in recipe.tensors():
        nbytes = tensor.elements * _BYTES[recipe.dtype]
        if shard and size + nbytes > recipe.shard_bytes:
            yield shard
            shard, size = [], 0
        shard.append(tensor)
        size += nbytes
    yield shard


def _write_shard(path: Path, tensors: list[Tensor], recipe: Recipe) -> None:
    header, end = _header(tensors, recipe.dtype)
    with path.open("wb") as file:
        file.write(header)
        if recipe.sparse:
            file.truncate(len(header) + end)
        else:
            for tensor in tensors:
                _write_numbers(file, tensor, recipe.dtype)
        file.flush()
        # Pages that wait to be written cannot be dropped, and the cold measurements drop them.
        os.fsync(file.fileno())


def _header(tensors: Iterable[Tensor], dtype: str) -> tuple[bytes, int]:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        begin, end = end, end + tensor.elements * _BYTES[dtype]
        entries[tensor.name] = {"dtype": dtype, "shape": tensor.shape, "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, end


def _write_numbers(file: BinaryIO, tensor: Tensor, dtype: str) -> None:
    """Write numbers from the pool, each tensor from a place of its own, so that no two are alike."""
    if tensor.is_norm:
        noise = np.random.default_rng(zlib.crc32(tensor.name.encode())).standard_normal(tensor.elements, np.float32)
        file.write(_encoded(1 + _SCALE * noise, dtype))
        return
    pool, left = _pool(dtype), tensor.elements
    start = zlib.crc32(tensor.name.encode()) % _POOL
    while left:
        piece = pool[start : start + left]
        file.write(piece)
        left, start = left - len(piece), 0


@cache
def _pool(dtype: str) -> memoryview:
    numbers = np.random.default_rng(0).standard_normal(_POOL, np.float32)
    return _encoded(_SCALE * numbers, dtype)


def _encoded(numbers: np.ndarray, dtype: str) -> memoryview:
    if dtype == "BF16":  # the upper half of a float32
        return (numbers.view(np.uint32) >> 16).astype(np.uint16).data
    return numbers.data
