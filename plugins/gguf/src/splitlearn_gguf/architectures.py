"""How llama.cpp's converter changes a Hugging Face checkpoint, for each architecture, and how to undo it.

Names are of the form ``blk.3.attn_q.weight``; the experts of a layer are one tensor, of which each is a part. Values
were reordered (rows of the queries and keys of llama, for llama.cpp's rotation; heads of linear attention), transposed
(GPT-2's ``Conv1D``), increased by one (the norms of Gemma), or replaced by the negative of their exponentials (the
decay of state spaces), and tensors that Hugging Face has as one were cut into several.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType

from splitlearn_core import CheckpointError

_MATRIX = 2
#: Dimensions of a tensor of all experts, or heads.
_EXPERTS = 3


class Change(Enum):
    """The change that turns a tensor's values into Hugging Face's."""

    NONE = "none"
    TRANSPOSE = "transpose"
    SUBTRACT_ONE = "subtract one"
    #: A vector is a matrix of one row.
    ROW = "row"
    #: A matrix is a convolution with a channel for each row.
    CHANNELS = "channels"
    #: Values are the negative of the exponentials of Hugging Face's: their logarithm, as transformers computes it.
    LOGARITHM = "logarithm"
    #: The same, where transformers does not read it: a number with that very exponential.
    EXPONENT = "exponent"


class Order(Enum):
    """The rows, or columns, that go back to Hugging Face's order."""

    NONE = "none"
    #: Rows of queries, and of keys, to the order in which halves are rotated.
    QUERIES = "queries"
    KEYS = "keys"
    #: Rows of the value heads of linear attention, to those of each key head together.
    VALUES = "values"
    #: The same of the last rows, after those of queries and keys.
    LAST_VALUES = "last values"
    #: The same of columns.
    VALUE_COLUMNS = "value columns"


class Join(Enum):
    """How a tensor of Hugging Face is made of the tensors of a file."""

    #: ``[experts, rows, columns]``: the rows of one piece after those of the other.
    ROWS = "rows"
    #: The same, and then each matrix transposed.
    TURNED_ROWS = "turned rows"
    #: Row by row in turn, and then each matrix transposed; of ``[experts, rows]``, number by number.
    IN_TURN = "in turn"
    #: ``[heads, rank, rows]`` and ``[heads, rows, rank]``: of each head the transposed first, then the second.
    HEADS = "heads"
    #: Rows of all queries, keys and values of linear attention, and of its gates: head by head.
    KEY_HEADS = "key heads"


@dataclass(frozen=True, slots=True)
class Joined:
    """A tensor of Hugging Face that is several in a file, or is transposed there."""

    #: Its name within a layer.
    key: str
    #: GGUF's names within a layer, with their endings.
    pieces: tuple[str, ...]
    join: Join

    def shape(self, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        """Return the shape that pieces of these shapes have together; empty if they do not fit."""
        first, last = shapes[0], shapes[-1]
        if self.join is Join.HEADS:
            fits = len(first) == len(last) == _EXPERTS and first[0] == last[0] and first[1] == last[2]
            return (first[0] * (first[2] + last[1]), first[1]) if fits else ()
        if self.join is Join.KEY_HEADS:
            fits = len(first) == len(last) == _MATRIX and first[1] == last[1]
            return (first[0] + last[0], first[1]) if fits else ()
        if not 1 < len(first) <= _EXPERTS or any(shape != first for shape in shapes):
            return ()
        rows = first[1] * len(shapes)
        matrices = self.join in (Join.IN_TURN, Join.TURNED_ROWS) and len(first) == _EXPERTS
        return (first[0], first[2], rows) if matrices else (first[0], rows, *first[2:])


@dataclass(frozen=True, slots=True)
class Architecture:
    """How one architecture of llama.cpp is named and stored."""

    #: ``general.architecture`` in the file.
    name: str
    #: The Hugging Face model types that are stored this way; the first is used if only the file decides.
    model_types: tuple[str, ...]
    #: GGUF's name -> Hugging Face's, without ``.weight`` and ``.bias``.
    outer: Mapping[str, str]
    #: The same within a layer; a name that changes its ending is there with both.
    inner: Mapping[str, str]
    #: GGUF's name within a layer of a tensor of all experts -> Hugging Face's of one, with ``{}`` for its number.
    experts: Mapping[str, str] = field(default_factory=dict)
    #: Within a layer.
    joined: tuple[Joined, ...] = ()
    #: The Hugging Face name of a layer, up to its number.
    layers: str = "model.layers"
    #: Suffixes of GGUF's names -> the change to undo.
    changes: Mapping[str, Change] = field(default_factory=dict)
    #: The same -> what is in another order.
    orders: Mapping[str, Order] = field(default_factory=dict)
    #: Suffixes of tensors that no Hugging Face module has, because they are computed there.
    ignored: tuple[str, ...] = ()
    #: What files do not say of the configuration, so that the original one is needed; empty if they say all of it.
    unstated: str = ""

    def key(self, name: str) -> str | None:
        """Return the checkpoint key of a GGUF tensor, or None if it is ignored.

        An unknown name is its own key: the plan then reports that it has no place.
        """
        if name.endswith(self.ignored):
            return None
        whole = re.fullmatch(r"blk\.(\d+)\.(.+)", name)
        if whole is not None and whole[2] in self.inner:
            return f"{self.layers}.{whole[1]}.{self.inner[whole[2]]}"
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

    def joined_key(self, name: str) -> tuple[str, Joined] | None:
        """Return the checkpoint key that a GGUF tensor is a piece of, and how; None if it is none."""
        layer = re.fullmatch(r"blk\.(\d+)\.(.+)", name)
        found = next((one for one in self.joined if layer is not None and layer[2] in one.pieces), None)
        return None if layer is None or found is None else (f"{self.layers}.{layer[1]}.{found.key}", found)

    def change(self, name: str) -> Change:
        """Return the change to undo in a GGUF tensor."""
        return self.changes.get(_leaf(name), Change.NONE)

    def order(self, name: str) -> Order:
        """Return what goes back to Hugging Face's order in a GGUF tensor."""
        return self.orders.get(_leaf(name), Order.NONE)


def _leaf(name: str) -> str:
    # The layer's number does not matter, but `output.weight` must not be taken for `attn_output.weight`.
    return re.sub(r"^blk\.\d+\.", "", name)


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
#: The router of a layer with experts, an expert that every token takes, with and without a gate, and the numbers that
#: are added to scores where experts are chosen.
_ROUTED = {"ffn_gate_inp": "mlp.gate"}
_SHARED = {
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    **{f"ffn_{each}_shexp": f"mlp.shared_expert.{each}_proj" for each in ("gate", "up", "down")},
}
_SHARED_OF_ALL = {f"ffn_{each}_shexp": f"mlp.shared_experts.{each}_proj" for each in ("gate", "up", "down")}
_CORRECTED = {"exp_probs_b.bias": "mlp.gate.e_score_correction_bias"}
#: llama.cpp's name for the same norm, of some architectures.
_AFTER_ATTENTION = {"post_attention_norm": "post_attention_layernorm"}
_EACH = {f"ffn_{each}_exps": f"mlp.experts.{{}}.{each}_proj" for each in ("gate", "up", "down")}
_W123 = {
    f"ffn_{each}_exps": f"block_sparse_moe.experts.{{}}.{name}"
    for each, name in (("gate", "w1"), ("up", "w3"), ("down", "w2"))
}
#: Files of different ages have it as a vector, or as a matrix.
_GATE = {"ffn_gate_inp_shexp.weight": Change.ROW}
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
    **{f"attn_q.{kind}": Order.QUERIES for kind in ("weight", "bias")},
    **{f"attn_k.{kind}": Order.KEYS for kind in ("weight", "bias")},
}
#: Layers of linear attention, with one head of keys for one or several heads of values.
_LINEAR_INNER = {
    "ssm_conv1d": "linear_attn.conv1d",
    "ssm_dt.bias": "linear_attn.dt_bias",
    "ssm_a": "linear_attn.A_log",
    "ssm_norm": "linear_attn.norm",
    "ssm_out": "linear_attn.out_proj",
}
_LINEAR_CHANGES = {**_OFFSET_NORMS, "ssm_a": Change.EXPONENT, "ssm_conv1d.weight": Change.CHANNELS}
_QWEN35_CHANGES = {**_LINEAR_CHANGES, "ssm_a": Change.LOGARITHM}
#: From Qwen 3.5 on, heads of values follow one another in turn, one of each head of keys.
_QWEN35_INNER = {
    **_LINEAR_INNER,
    "attn_qkv": "linear_attn.in_proj_qkv",
    "attn_gate": "linear_attn.in_proj_z",
    "ssm_alpha": "linear_attn.in_proj_a",
    "ssm_beta": "linear_attn.in_proj_b",
}
_QWEN35_ORDERS = {
    **{f"attn_{name}.weight": order for name, order in (("qkv", Order.LAST_VALUES), ("gate", Order.VALUES))},
    **dict.fromkeys(("ssm_alpha.weight", "ssm_beta.weight", "ssm_dt.bias", "ssm_a"), Order.VALUES),
    "ssm_conv1d.weight": Order.LAST_VALUES,
    "ssm_out.weight": Order.VALUE_COLUMNS,
}
#: Files of some age have gates and inputs of all experts in one tensor, as Hugging Face's module has.
_GATE_UP = {"ffn_gate_up_exps.weight": "mlp.experts.gate_up_proj"}

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
    Architecture("qwen2moe", ("qwen2_moe",), _OUTER, {**_DENSE, **_ROUTED, **_SHARED}, experts=_EACH, changes=_GATE),
    Architecture("qwen3moe", ("qwen3_moe",), _OUTER, {**_DENSE, **_HEAD_NORMS, **_ROUTED}, experts=_EACH),
    # The text models of those that see: with text alone, their rotation in sections is the usual one.
    Architecture("qwen2vl", ("qwen2",), _OUTER, _DENSE),
    Architecture("qwen3vl", ("qwen3",), _OUTER, {**_DENSE, **_HEAD_NORMS}),
    Architecture("qwen3vlmoe", ("qwen3_moe",), _OUTER, {**_DENSE, **_HEAD_NORMS, **_ROUTED}, experts=_EACH),
    Architecture(
        "qwen3next",
        ("qwen3_next",),
        _OUTER,
        {
            **_DENSE,
            **_HEAD_NORMS,
            **_ROUTED,
            **_SHARED,
            **_AFTER_ATTENTION,
            **_GATE_UP,
            **_LINEAR_INNER,
            "ssm_ba": "linear_attn.in_proj_ba",
            # Of files from before llama.cpp cut it in two.
            "ssm_in": "linear_attn.in_proj_qkvz",
        },
        experts=_EACH,
        joined=(Joined("linear_attn.in_proj_qkvz.weight", ("attn_qkv.weight", "attn_gate.weight"), Join.KEY_HEADS),),
        changes={**_LINEAR_CHANGES, **_GATE},
    ),
    # The text models: with text alone, their rotation in sections is the usual one.
    Architecture(
        "qwen35",
        ("qwen3_5_text",),
        _OUTER,
        {**_DENSE, **_HEAD_NORMS, **_AFTER_ATTENTION, **_QWEN35_INNER},
        changes=_QWEN35_CHANGES,
        orders=_QWEN35_ORDERS,
    ),
    Architecture(
        "qwen35moe",
        ("qwen3_5_moe_text",),
        _OUTER,
        {**_DENSE, **_HEAD_NORMS, **_ROUTED, **_SHARED, **_AFTER_ATTENTION, **_GATE_UP, **_QWEN35_INNER},
        experts=_EACH,
        changes={**_QWEN35_CHANGES, **_GATE},
        orders=_QWEN35_ORDERS,
    ),
    Architecture(
        "jamba",
        ("jamba",),
        {**_OUTER, "output_norm": "model.final_layernorm"},
        {
            **{name: key.replace("mlp.", "feed_forward.") for name, key in _DENSE.items()},
            "ffn_norm": "pre_ff_layernorm",
            "ffn_gate_inp": "feed_forward.router",
            "ssm_in": "mamba.in_proj",
            "ssm_conv1d": "mamba.conv1d",
            "ssm_x": "mamba.x_proj",
            "ssm_dt": "mamba.dt_proj",
            "ssm_dt_norm": "mamba.dt_layernorm",
            "ssm_b_norm": "mamba.b_layernorm",
            "ssm_c_norm": "mamba.c_layernorm",
            "ssm_a": "mamba.A_log",
            "ssm_d": "mamba.D",
            "ssm_out": "mamba.out_proj",
        },
        experts={name: key.replace("mlp.", "feed_forward.") for name, key in _EACH.items()},
        changes={"ssm_a": Change.EXPONENT, "ssm_conv1d.weight": Change.CHANNELS},
    ),
    Architecture(
        "lfm2",
        ("lfm2",),
        {"token_embd": "model.embed_tokens", "token_embd_norm": "model.embedding_norm", "output": "lm_head"},
        {
            "attn_norm": "operator_norm",
            "attn_q": "self_attn.q_proj",
            "attn_k": "self_attn.k_proj",
            "attn_v": "self_attn.v_proj",
            "attn_output": "self_attn.out_proj",
            "attn_q_norm": "self_attn.q_layernorm",
            "attn_k_norm": "self_attn.k_layernorm",
            "shortconv.conv": "conv.conv",
            "shortconv.in_proj": "conv.in_proj",
            "shortconv.out_proj": "conv.out_proj",
            "ffn_norm": "ffn_norm",
            "ffn_gate": "feed_forward.w1",
            "ffn_up": "feed_forward.w3",
            "ffn_down": "feed_forward.w2",
        },
        changes={"shortconv.conv.weight": Change.CHANNELS},
    ),
    Architecture(
        "minimax-m2",
        ("minimax_m2",),
        _OUTER,
        {
            **_DENSE,
            **_HEAD_NORMS,
            "ffn_gate_inp": "block_sparse_moe.gate",
            "exp_probs_b.bias": "block_sparse_moe.e_score_correction_bias",
        },
        experts=_W123,
    ),
    Architecture(
        "llama4",
        ("llama4_text",),
        _OUTER,
        {
            **{name: key.replace("mlp.", "feed_forward.") for name, key in _DENSE.items()},
            "ffn_gate_inp": "feed_forward.router",
            **{f"ffn_{each}_shexp": f"feed_forward.shared_expert.{each}_proj" for each in ("gate", "up", "down")},
        },
        joined=(
            Joined("feed_forward.experts.down_proj", ("ffn_down_exps.weight",), Join.IN_TURN),
            Joined(
                "feed_forward.experts.gate_up_proj", ("ffn_gate_exps.weight", "ffn_up_exps.weight"), Join.TURNED_ROWS
            ),
        ),
        ignored=("rope_freqs.weight",),
        unstated="which layers attend to chunks, which do not rotate positions, and how those that do scale them",
    ),
    Architecture("olmoe", ("olmoe",), _OUTER, {**_DENSE, **_HEAD_NORMS, **_ROUTED}, experts=_EACH),
    Architecture(
        "glm4moe",
        ("glm4_moe",),
        _OUTER,
        {**_DENSE, **_HEAD_NORMS, **_ROUTED, **_SHARED_OF_ALL, **_CORRECTED, **_AFTER_ATTENTION},
        experts=_EACH,
    ),
    Architecture(
        "ernie4_5-moe",
        ("ernie4_5_moe",),
        _OUTER,
        {
            **_DENSE,
            **_ROUTED,
            **_SHARED_OF_ALL,
            "exp_probs_b.bias": "mlp.moe_statics.e_score_correction_bias",
        },
        experts=_EACH,
        changes={"exp_probs_b.bias": Change.ROW},
    ),
    Architecture(
        "granitemoe",
        ("granitemoe",),
        _OUTER,
        {
            **_DENSE,
            "ffn_gate_inp": "block_sparse_moe.router.layer",
            "ffn_down_exps": "block_sparse_moe.output_linear",
        },
        joined=(
            Joined("block_sparse_moe.input_linear.weight", ("ffn_gate_exps.weight", "ffn_up_exps.weight"), Join.ROWS),
        ),
        orders=_ROTATED,
    ),
    Architecture(
        "deepseek2",
        ("deepseek_v3", "deepseek_v2"),
        _OUTER,
        {
            **_DENSE,
            **_ROUTED,
            **_SHARED_OF_ALL,
            **_CORRECTED,
            "attn_q_a": "self_attn.q_a_proj",
            "attn_q_a_norm": "self_attn.q_a_layernorm",
            "attn_q_b": "self_attn.q_b_proj",
            "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
            "attn_kv_a_norm": "self_attn.kv_a_layernorm",
            # Of files from before llama.cpp cut it in two.
            "attn_kv_b": "self_attn.kv_b_proj",
        },
        experts=_EACH,
        joined=(Joined("self_attn.kv_b_proj.weight", ("attn_k_b.weight", "attn_v_b.weight"), Join.HEADS),),
        ignored=("rope_freqs.weight",),
        unstated="among which groups of experts it chooses, and how rotary positions are scaled",
    ),
    Architecture(
        "phimoe",
        ("phimoe",),
        _OUTER,
        {**_DENSE, "ffn_gate_inp": "block_sparse_moe.gate"},
        experts=_W123,
        ignored=("rope_factors_long.weight", "rope_factors_short.weight"),
        unstated="how rotary positions are scaled",
    ),
    Architecture(
        "gpt-oss",
        ("gpt_oss",),
        _OUTER,
        {
            **_DENSE,
            **_AFTER_ATTENTION,
            "ffn_gate_inp": "mlp.router",
            "attn_sinks.weight": "self_attn.sinks",
            "ffn_down_exps.bias": "mlp.experts.down_proj_bias",
        },
        joined=(
            Joined("mlp.experts.down_proj", ("ffn_down_exps.weight",), Join.IN_TURN),
            Joined("mlp.experts.gate_up_proj", ("ffn_gate_exps.weight", "ffn_up_exps.weight"), Join.IN_TURN),
            Joined("mlp.experts.gate_up_proj_bias", ("ffn_gate_exps.bias", "ffn_up_exps.bias"), Join.IN_TURN),
        ),
        unstated="how rotary positions are scaled",
    ),
    # The newer of Mistral's models; the older ones, and those that see with them, are llama's.
    Architecture(
        "mistral3",
        ("ministral3",),
        _OUTER,
        _DENSE,
        orders=_ROTATED,
        ignored=("rope_freqs.weight",),
        unstated="how rotary positions and queries are scaled",
    ),
    # llama.cpp stores Mistral's models as llama's, too, and Mixtral's as llama's with experts.
    Architecture(
        "llama",
        ("llama", "mistral", "mixtral"),
        _OUTER,
        {**_DENSE, "ffn_gate_inp": "block_sparse_moe.gate"},
        experts=_W123,
        orders=_ROTATED,
        ignored=("rope_freqs.weight", "attn_rot_embd"),
    ),
    Architecture("gemma", ("gemma",), _OUTER, _DENSE, changes=_OFFSET_NORMS),
    Architecture("gemma2", ("gemma2",), _OUTER, {**_DENSE, **_FOUR_NORMS}, changes=_OFFSET_NORMS),
    Architecture("gemma3", ("gemma3_text",), _OUTER, {**_DENSE, **_FOUR_NORMS, **_HEAD_NORMS}, changes=_OFFSET_NORMS),
    Architecture(
        "gemma4",
        ("gemma4_text",),
        {
            **_OUTER,
            "per_layer_token_embd": "model.embed_tokens_per_layer",
            "per_layer_model_proj": "model.per_layer_model_projection",
            "per_layer_proj_norm": "model.per_layer_projection_norm",
        },
        {
            **_DENSE,
            **_FOUR_NORMS,
            **_HEAD_NORMS,
            "layer_output_scale.weight": "layer_scalar",
            "ffn_gate_inp": "router.proj",
            "ffn_gate_inp.scale": "router.scale",
            "ffn_down_exps.scale": "router.per_expert_scale",
            "ffn_gate_up_exps.weight": "experts.gate_up_proj",
            "ffn_down_exps.weight": "experts.down_proj",
            "pre_ffw_norm_2": "pre_feedforward_layernorm_2",
            "post_ffw_norm_1": "post_feedforward_layernorm_1",
            "post_ffw_norm_2": "post_feedforward_layernorm_2",
            "inp_gate": "per_layer_input_gate",
            "proj": "per_layer_projection",
            "post_norm": "post_per_layer_input_norm",
        },
        # Of files from before llama.cpp left them together.
        joined=(Joined("experts.gate_up_proj", ("ffn_gate_exps.weight", "ffn_up_exps.weight"), Join.ROWS),),
        ignored=("rope_freqs.weight",),
        unstated="how much of each head is rotated, and whether keys are the values too",
    ),
)
ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType({known.name: known for known in _ALL})
#: Endings of the checkpoint keys of tensors that are made of several, of any architecture.
JOINED_KEYS = tuple(f".{one.key}" for known in _ALL for one in known.joined)


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
