"""How llama.cpp's converter changes a Hugging Face checkpoint, for each architecture, and how to undo it.

Names are of the form ``blk.3.attn_q.weight``; the experts of a layer are one tensor, of which each is a part. Three
things were done to values: the rows of the queries and keys of llama were reordered for llama.cpp's rotation, GPT-2's
``Conv1D`` weights were transposed, and one was added to the norms of Gemma.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType

from splitlearn_core import CheckpointError


class Change(Enum):
    """The change that turns a tensor's values into Hugging Face's."""

    NONE = "none"
    TRANSPOSE = "transpose"
    SUBTRACT_ONE = "subtract one"
    #: Rows of queries, and of keys, go back to the order in which halves are rotated.
    ORDER_QUERIES = "order queries"
    ORDER_KEYS = "order keys"


@dataclass(frozen=True, slots=True)
class Architecture:
    """How one architecture of llama.cpp is named and stored."""

    #: ``general.architecture`` in the file.
    name: str
    #: The Hugging Face model types that are stored this way; the first is used if only the file decides.
    model_types: tuple[str, ...]
    #: GGUF's name -> Hugging Face's, without ``.weight`` and ``.bias``.
    outer: Mapping[str, str]
    #: The same within a layer.
    inner: Mapping[str, str]
    #: GGUF's name within a layer of a tensor of all experts -> Hugging Face's of one, with ``{}`` for its number.
    experts: Mapping[str, str] = field(default_factory=dict)
    #: The Hugging Face name of a layer, up to its number.
    layers: str = "model.layers"
    #: Suffixes of GGUF's names -> the change to undo.
    changes: Mapping[str, Change] = field(default_factory=dict)
    #: Suffixes of tensors that no Hugging Face module has, because they are computed there.
    ignored: tuple[str, ...] = ()

    def key(self, name: str) -> str | None:
        """Return the checkpoint key of a GGUF tensor, or None if it is ignored.

        An unknown name is its own key: the plan then reports that it has no place.
        """
        if name.endswith(self.ignored):
            return None
        stem, dot, suffix = name.rpartition(".")
        layer = re.fullmatch(r"blk\.(\d+)\.(.+)", stem)
        if layer is not None and layer[2] in self.inner:
            return f"{self.layers}.{layer[1]}.{self.inner[layer[2]]}{dot}{suffix}"
        return f"{self.outer[stem]}{dot}{suffix}" if layer is None and stem in self.outer else name

    def expert_keys(self, name: str, count: int) -> list[str]:
        """Return the checkpoint keys of the experts that a GGUF tensor holds; empty if it holds none."""
        layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
        if layer is None or layer[2] not in self.experts:
            return []
        one = f"{self.layers}.{layer[1]}.{self.experts[layer[2]]}.weight"
        return [one.format(number) for number in range(count)]

    def change(self, name: str) -> Change:
        """Return the change to undo in a GGUF tensor."""
        # The layer's number does not matter, but `output.weight` must not be taken for `attn_output.weight`.
        leaf = re.sub(r"^blk\.\d+\.", "", name)
        return self.changes.get(leaf, Change.NONE)


_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_DENSE = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
#: From Gemma 2 on, both halves of a layer have a norm before and after them.
_FOUR_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_GPT2_OUTER = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
}
_GPT2_INNER = {
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
_CONV1D = ("attn_qkv.weight", "attn_output.weight", "ffn_up.weight", "ffn_down.weight")
_NORMS = ("output_norm", "attn_norm", "ffn_norm", "post_attention_norm", "post_ffw_norm", "attn_q_norm", "attn_k_norm")
_OFFSET_NORMS = {f"{norm}.weight": Change.SUBTRACT_ONE for norm in _NORMS}
_ROTATED = {
    **{f"attn_q.{kind}": Change.ORDER_QUERIES for kind in ("weight", "bias")},
    **{f"attn_k.{kind}": Change.ORDER_KEYS for kind in ("weight", "bias")},
}

_ALL = (
    Architecture(
        "gpt2",
        ("gpt2",),
        _GPT2_OUTER,
        _GPT2_INNER,
        layers="transformer.h",
        changes=dict.fromkeys(_CONV1D, Change.TRANSPOSE),
    ),
    Architecture("qwen2", ("qwen2",), _OUTER, _DENSE),
    Architecture("qwen3", ("qwen3",), _OUTER, {**_DENSE, **_HEAD_NORMS}),
    Architecture(
        "qwen3moe",
        ("qwen3_moe",),
        _OUTER,
        {**_DENSE, **_HEAD_NORMS, "ffn_gate_inp": "mlp.gate"},
        experts={f"ffn_{each}_exps": f"mlp.experts.{{}}.{each}_proj" for each in ("gate", "up", "down")},
    ),
    # llama.cpp stores Mistral's models as llama's, too, and Mixtral's as llama's with experts.
    Architecture(
        "llama",
        ("llama", "mistral", "mixtral"),
        _OUTER,
        {**_DENSE, "ffn_gate_inp": "block_sparse_moe.gate"},
        experts={
            f"ffn_{each}_exps": f"block_sparse_moe.experts.{{}}.{name}"
            for each, name in (("gate", "w1"), ("up", "w3"), ("down", "w2"))
        },
        changes=_ROTATED,
        ignored=("rope_freqs.weight", "attn_rot_embd"),
    ),
    Architecture("gemma", ("gemma",), _OUTER, _DENSE, changes=_OFFSET_NORMS),
    Architecture("gemma2", ("gemma2",), _OUTER, {**_DENSE, **_FOUR_NORMS}, changes=_OFFSET_NORMS),
    Architecture("gemma3", ("gemma3_text",), _OUTER, {**_DENSE, **_FOUR_NORMS, **_HEAD_NORMS}, changes=_OFFSET_NORMS),
)
ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType({known.name: known for known in _ALL})


def architecture(name: str, where: str) -> Architecture:
    """Return an architecture by name.

    Args:
        name: ``general.architecture`` of a file.
        where: The file, for the message.

    Raises:
        CheckpointError: It is unknown.
    """
    if name not in ARCHITECTURES:
        read = ", ".join(ARCHITECTURES)
        raise CheckpointError(
            f"{where} holds a model of the architecture {name[:80]!r}; splitlearn-gguf reads {read}",
            hint="use the checkpoint that the file was converted from",
        )
    return ARCHITECTURES[name]


def architecture_of(model_type: str) -> Architecture | None:
    """Return the architecture that a model type of transformers is stored as; None if none is known."""
    return next((known for known in _ALL if model_type in known.model_types), None)
