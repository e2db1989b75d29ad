"""Advice on model types and commands that no installed package provides. Pure.

The tables list what ``splitlearn plugins new`` does with each model type of transformers 5.24; a test compares them
with it, so that only what works is proposed.
"""

from __future__ import annotations

import re

#: Model type -> the package of this project that provides it.
PACKAGES = {
    "gemma": "splitlearn-gemma",
    "gemma2": "splitlearn-gemma",
    "gemma3": "splitlearn-gemma",
    "gemma3_text": "splitlearn-gemma",
    "gpt2": "splitlearn-gpt2",
    "qwen2": "splitlearn-qwen2",
}
#: Host -> the package of this project that provides it.
HOSTS = {"ray": "splitlearn-ray"}
#: Commands of this project's packages: words joined by dots -> the package, and the line of ``--help``. The line is
#: here because ``--help`` imports no command, and metadata has no field for it.
COMMANDS = {
    "load": ("splitlearn-serve", "Have a running `serve` load a model."),
    "plugins.new": ("splitlearn-auto", "Write a package for a model type."),
    "ps": ("splitlearn-serve", "Show the models of a running `serve`."),
    "serve": ("splitlearn-serve", "Run trunks for others, and keep models loaded."),
    "unload": ("splitlearn-serve", "Have a running `serve` unload a model."),
}
#: Types that splitlearn-auto provides, and ``splitlearn plugins new`` writes a package for.
_WRITTEN = """
    afmoe apertus apertus1p5_text arcee aria_text axk1 axk2 bailing_hybrid bamba bart beam bert bert-generation
    big_bird biogpt bitnet blenderbot blenderbot-small bloom camembert codegen cohere cohere2 cohere2_moe
    cohere_compass_text ctrl cwm data2vec-text dbrx deepseek_v2 deepseek_v3 deepseek_v32 diffllama doge dots1
    dots3_note dots3_note_text electra emu3 ernie ernie4_5 ernie4_5_moe exaone exaone4 exaone_moe falcon falcon_h1
    falcon_mamba flex_olmo flint fuyu gemma3n_text gemma4 gemma4_text gemma4_unified gemma4_unified_text git glm
    glm4 glm4_moe glm4_moe_lite glm_moe_dsa got_ocr2 gpt-sw3 gpt_bigcode gpt_neo gpt_neox gpt_neox_japanese gpt_oss
    gptj granite granite_swa granitemoe granitemoe_swa granitemoehybrid granitemoeshared helium hunyuan_v1_dense
    hunyuan_v1_moe hy_v3 hy_v4 hyperclovax inkling_text internlm3 iquestcoder jais2 jamba jetmoe kimi_linear
    kolibri1 laguna lara_mini lfm2 lfm2_moe lfm3 llama llama4 llama4_text llava llava_onevision mamba mamba2 marian
    mbart megatron-bert mellum mimo_v2_flash minicpm3 minimax minimax_m2 minimax_m3_vl_text ministral ministral3
    mistral mistral3 mixtral modernbert-decoder moshi moss_transcribe_diarize mpt mvp nanochat nemotron nemotron_h
    olmo olmo2 olmo3 olmo_hybrid olmoe opt paligemma pegasus persimmon phi phi3 phi4_multimodal phimoe plbart
    qwen2_5_vl qwen2_moe qwen2_vl qwen3 qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next
    qwen3_vl qwen3_vl_moe rembert roberta roberta-prelayernorm roc_bert sarvam_mla sarvam_moe seed_oss smollm3
    solar_open stablelm starcoder2 trocr vaultgemma whisper xglm xlm-roberta xlm-roberta-xl xmod youtu zamba zamba2
    zaya
"""
WRITTEN = frozenset(_WRITTEN.split())
#: Types that it refuses, of those that are causal language models in transformers.
_REFUSED = """
    bigbird_pegasus blt cpmant deepseek_v4 dory gemma3n gemma4_assistant gemma4_unified_assistant hrm_text
    inkling2_loop_text inkling2_text longcat_flash mllama musicgen musicgen_melody openai-gpt prophetnet qwen4_exp
    qwen4_exp_text recurrent_gemma reformer roformer rwkv xlm xlnet xlstm
"""
REFUSED = frozenset(_REFUSED.split())
#: Types of text in, text out, that have an encoder and a decoder, and no class of the decoder alone.
_ENCODER_DECODERS = """
    encoder-decoder fsmt led longt5 m2m_100 mt5 nllb-moe pegasus_x seamless_m4t seamless_m4t_v2
    switch_transformers t5 t5gemma t5gemma2 umt5
"""
ENCODER_DECODERS = frozenset(_ENCODER_DECODERS.split())
_CANNOT = (
    "cannot be split: their layers are not a plain sequence as in a decoder, or the tensors in the file are not those "
    "of the model; the manager loads one as a whole, with model_type 'huggingface'"
)
_ENCODES = (
    "have an encoder and a decoder; only causal decoders, one stack of layers that predicts the next token, are split. "
    "transformers itself loads one: AutoModelForSeq2SeqLM, or the class that config.json names"
)
_TYPE = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}", re.IGNORECASE)
_AUTO = "pip install splitlearn-auto"
_CHECK = 'check "model_type" in config.json; if its plugin is installed, splitlearn doctor says why it is not found'


def is_type_name(model_type: object) -> bool:
    """Return whether a value, which may come from an untrusted file, looks like a model type."""
    return isinstance(model_type, str) and _TYPE.fullmatch(model_type) is not None


def is_known(model_type: str) -> bool:
    """Return whether a table lists the model type; it is then not a misspelling of another."""
    return model_type in {*PACKAGES, *WRITTEN, *REFUSED, *ENCODER_DECODERS}


def way_out(model_type: object, provided: tuple[str, ...] = (), *, encodes: bool = False, for_any: str = "") -> str:
    """Return what to do with a model of a type that no installed plugin provides.

    The type comes from an untrusted config.json: a command contains it only if a table lists it.

    Args:
        model_type: The type.
        provided: The types that installed plugins provide.
        encodes: Whether the model has an encoder according to its configuration (``is_encoder_decoder``).
        for_any: How to use the plugin for any type, if it is installed.
    """
    if not isinstance(model_type, str) or not is_type_name(model_type):
        return _CHECK
    if model_type in PACKAGES:
        return f"try: pip install {PACKAGES[model_type]}, or {_CHECK}"
    cannot = _CANNOT if model_type in REFUSED else _ENCODES if encodes or model_type in ENCODER_DECODERS else ""
    if cannot:
        return f"models of type {model_type} {cannot}"
    doubt = "" if for_any or model_type in WRITTEN else ", which finds out whether models of the type can be split"
    return f"{for_any or _AUTO}{doubt}, or {_CHECK}"
