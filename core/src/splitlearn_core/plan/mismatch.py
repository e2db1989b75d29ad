"""Tensors that do not match the model: a short description, and the likely cause."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from splitlearn_core.family import ModelFamily
from splitlearn_core.plan.keys import number_ranges
from splitlearn_core.types import TensorInfo

#: The number of a layer in a name (``model.layers.3.mlp.weight``) or in words (``layer 3``).
_NUMBER = re.compile(r"(?<=[. ])\d+(?=\.|$)")
_MAX_NAMED = 8
#: Characters of a prefix that a hint repeats.
_MAX_PREFIX = 80
_RENAME = (
    "python -c \"from safetensors.torch import load_file, save_file; f = 'model.safetensors'; "
    "save_file({{k.removeprefix('{prefix}'): v for k, v in load_file(f).items()}}, f, {{'format': 'pt'}})\""
)


@dataclass(frozen=True, slots=True)
class _Trace:
    """What a tool leaves in the names of tensors, and how to get plain weights from it."""

    pattern: re.Pattern[str]
    cause: str
    remedy: str


def _trace(pattern: str, cause: str, remedy: str) -> _Trace:
    return _Trace(re.compile(pattern), cause, remedy)


#: In the order in which they are tried, after a wrapper that is a prefix of all names.
_TRACES = (
    _trace(
        r"_fsdp_wrapped_module|_fpw_module|flat_param",
        "FSDP saved its own modules",
        "gather it: FullStateDictConfig and FULL_STATE_DICT; accelerate merge-weights DIR OUT joins sharded files",
    ),
    _trace(
        r"(^|\.)_orig_mod\.|_checkpoint_wrapped_module\.",
        "torch.compile or checkpoint wrappers are part of the names",
        "save the wrapped module itself: model._orig_mod.save_pretrained(DIR)",
    ),
    _trace(
        r"\.(base_layer|original_module|modules_to_save)\.|\.lora_|\.(ia3|hada|lokr)_",
        "PEFT's modules are part of the names: it is the state of a model with an adapter",
        "merge the adapter in PEFT, model.merge_and_unload().save_pretrained(DIR); "
        "or save both apart and use load_adapter",
    ),
    _trace(r"(^|\.)(exp_avg|exp_avg_sq|momentum_buffer)(\.|$)", "it is the state of an optimizer", "give the weights"),
    _trace(
        r"\.(absmax|quant_map|nested_absmax|SCB)$|\.quant_state\.",
        "bitsandbytes quantised the weights, and config.json has no quantization_config",
        "use the config.json that was saved with them, or the original checkpoint",
    ),
    _trace(
        r"\.(qweight|qzeros|g_idx)$",
        "GPTQ or AWQ quantised the weights, and config.json has no quantization_config",
        "use the config.json that was saved with them, or the original checkpoint",
    ),
    _trace(
        r"\.(scales|biases)$",
        "MLX quantised the weights, which it alone can read",
        "write plain weights: mlx_lm.convert --hf-path DIR --mlx-path OUT --dequantize; or use the original checkpoint",
    ),
    _trace(
        r"\.(weight_packed|weight_shape|weight_scale|weight_scale_inv|weight_zero_point|input_scale)$",
        "the weights are quantised (compressed-tensors or float8), and config.json has no quantization_config",
        "use the config.json that was saved with them (an old compression_config is not read by transformers either), "
        "or the original checkpoint",
    ),
    _trace(
        r"(^|\.)(tok_embeddings|layers\.\d+\.(attention\.w[qkvo]|feed_forward\.w[123]))\.",
        "the names are those of Meta's and Mistral's own files",
        "use the checkpoint in the layout of Hugging Face, or convert it: python -m transformers.models.MODEL_TYPE."
        "convert_MODEL_TYPE_weights_to_hf",
    ),
    _trace(
        r"\.(linear_qkv|linear_fc1|query_key_value|dense_h_to_4h)\.|^(language_model|model)\.encoder\.",
        "the names are those of Megatron or NeMo",
        "convert it to the layout of Hugging Face with the tools of those",
    ),
    _trace(
        r"vision_tower|vision_model|multi_modal_projector|mm_projector|(^|\.)visual\.|(^|\.)language_model\.",
        "it is a multimodal model",
        "save its language model alone; in transformers: language_model and lm_head into the ...ForCausalLM class of "
        "text_config, then save_pretrained(DIR)",
    ),
)
#: Tensors that modify other weights, which are different without them.
_CHANGES_WEIGHTS = re.compile(
    r"\.(lora_(A|B|embedding_A|embedding_B|magnitude_vector)|ia3_l|hada_w\d_\w|lokr_w\d(_\w)?)(\.|$)"
)
_WRAPPERS = {
    "_orig_mod": ("torch.compile", "save what it wraps, model._orig_mod.save_pretrained(DIR)"),
    "module": ("DistributedDataParallel or DeepSpeed", "save what it wraps, model.module.save_pretrained(DIR)"),
    "base_model": ("PEFT", "save model.merge_and_unload().save_pretrained(DIR)"),
    "_forward_module": ("Lightning", "save what it wraps, with save_pretrained(DIR)"),
}


def alters_weights(key: str) -> bool:
    """Return whether a tensor modifies others, such as an adapter's in the file of the model."""
    return _CHANGES_WEIGHTS.search(key) is not None


def unexpected_keys_message(unexpected: Mapping[str, str]) -> list[str]:
    """Describe tensors without a place, and the name that each would have in the model."""
    return [f"unexpected: {key}" + (f" (as {name})" if name != key else "") for key, name in unexpected.items()]


def unread_keys_message(name: str, model_type: str, keys: Sequence[str]) -> str:
    """Describe in one line which tensors of a checkpoint are not read, because the model has no place for them."""
    alike = folded(keys)
    more = f" and {len(alike) - _MAX_NAMED} more" if len(alike) > _MAX_NAMED else ""
    return (
        f"{name} holds {len(keys)} tensors that a {model_type} model has no place for; they are not read: "
        f"{', '.join(key[:200] for key in alike[:_MAX_NAMED])}{more}"
    )


def without_others_words(where: object) -> str:
    """Describe a checkpoint that was made of components, which are the decoder of a composite model."""
    return (
        f"{where} holds the decoder alone: components have nothing of the other models of the original (for images or "
        "sound), to which transformers gives random values; for those, load the original"
    )


def folded(problems: Sequence[str]) -> list[str]:
    """Join descriptions that differ only in the number of a layer, at the place of the first."""
    alike: dict[str, list[str]] = {}
    for problem in problems:
        number = _NUMBER.search(problem)
        # The same number may come twice, in a checkpoint's name and in the module's.
        pattern = re.sub(rf"(?<=[. ]){number[0]}(?=\.|$)", "{}", problem) if number else problem
        alike.setdefault(pattern, []).append(number[0] if number else "")
    return [
        pattern.replace("{}", numbers[0] if len(numbers) == 1 else f"{{{number_ranges(sorted(map(int, numbers)))}}}")
        if numbers[0]
        else pattern
        for pattern, numbers in alike.items()
    ]


def cause_in_names(family: ModelFamily, keys: Iterable[str], tensors: Iterable[TensorInfo]) -> str:
    """Explain why the names or sizes of tensors are not those of a model, and what to do; empty if unknown.

    Args:
        family: The family whose model was expected.
        keys: The checkpoint's keys.
        tensors: The planned tensors.
    """
    keys = list(keys)
    empty = [info.key for info in tensors if 0 in info.shape]
    if empty:
        return (
            f"{len(empty)} tensors are empty ({empty[0]}): DeepSpeed ZeRO-3 saved them without gathering their pieces. "
            "python zero_to_fp32.py DIR OUT makes the whole of them; stage3_gather_16bit_weights_on_model_save "
            "in its configuration prevents it"
        )
    prefix = _common_prefix(family, keys)
    wrapper = _WRAPPERS.get(prefix.partition(".")[0])
    if wrapper is None:
        # The last is of a composite model.
        for trace in _TRACES[: -1 if family.text_config else None]:
            key = next(filter(trace.pattern.search, keys), None)
            if key is not None:
                return f"{trace.cause} ({key[:200]}): {trace.remedy}"
    if not prefix or len(prefix) > _MAX_PREFIX:
        return ""
    maker, remedy = wrapper or ("a module around the model", "save what it wraps")
    return (
        f"the names have the prefix {prefix!r}, of {maker}: {remedy}; or take it off, in the folder: "
        f"{_RENAME.format(prefix=prefix)}"
    )


def _common_prefix(family: ModelFamily, keys: Sequence[str]) -> str:
    """Return the common prefix of the names of all layers; empty if there is none, or several."""
    for layers in (f"{family.base}.{family.layers}.", f"{family.layers}."):
        pattern = re.compile(rf"(.*?\.)?{re.escape(layers)}\d+\.")
        prefixes = {match[1] or "" for match in map(pattern.match, keys) if match is not None}
        if prefixes:
            prefix = prefixes.pop() if len(prefixes) == 1 else ""
            return "" if prefix == f"{family.base}." else prefix
    return ""


def likely_cause(problems: Sequence[str], model_type: str, head: str) -> str:
    """Suggest a cause, by the kinds of the problems.

    Args:
        problems: Each begins with its kind: ``missing:``, ``unexpected:``, ``mis-shaped:``, ``mis-typed:``, ``twice:``.
        model_type: Of the family that names the modules.
        head: The family's name of the head.
    """
    if problems and all(problem.startswith(f"missing: {head}.") for problem in problems):
        return (
            'if the head is the embedding itself, config.json has to say so: "tie_word_embeddings": true; otherwise '
            "the weights are not whole, or those of a base model, which has no head"
        )
    kinds = Counter(problem.partition(":")[0] for problem in problems)
    if kinds["mis-shaped"] * 2 > len(problems):
        return "config.json has other sizes than the weights: is it the one that belongs to them?"
    if kinds["missing"] and kinds["unexpected"]:
        return (
            "the names are others than a model of the type has: config.json is of another model than the weights, "
            f"or the family names its modules wrongly (splitlearn plugins test {model_type} tells)"
        )
    if kinds["missing"] == len(problems):
        return "is the checkpoint complete, and has config.json as many layers as it (num_hidden_layers)?"
    if kinds["unexpected"] == len(problems):
        return (
            'the weights hold more than a model by config.json: is it a causal model (see its "architectures"), '
            "with as many layers as num_hidden_layers says?"
        )
    return 'do config.json and the weights belong together, and is it a causal model (see its "architectures")?'
