"""Small GGUF files as llama.cpp's converter writes them, and families to load them with."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from splitlearn_core.plugins.registry import registry, reset_registry
from splitlearn_core.testing.installing import write_plugin

#: Families that the tests need, as the text of a call; those that are installed are taken instead.
FAMILIES = {
    "llama": "architecture='LlamaForCausalLM'",
    "mistral": "architecture='MistralForCausalLM'",
    "qwen2": "architecture='Qwen2ForCausalLM'",
    "qwen3": "architecture='Qwen3ForCausalLM'",
    "qwen3_moe": "architecture='Qwen3MoeForCausalLM', transformers_tables=True, uniform_layers=False",
    "mixtral": "architecture='MixtralForCausalLM', transformers_tables=True, uniform_layers=False",
    **{
        model_type: f"architecture={name!r}, transformers_tables=True, uniform_layers=False"
        for model_type, name in {
            "qwen2_moe": "Qwen2MoeForCausalLM",
            "olmoe": "OlmoeForCausalLM",
            "glm4_moe": "Glm4MoeForCausalLM",
            "ernie4_5_moe": "Ernie4_5_MoeForCausalLM",
            "deepseek_v2": "DeepseekV2ForCausalLM",
            "deepseek_v3": "DeepseekV3ForCausalLM",
            "phimoe": "PhimoeForCausalLM",
            "gpt_oss": "GptOssForCausalLM",
            "ministral3": "Ministral3ForCausalLM",
        }.items()
    },
    **{
        model_type: f"architecture={name!r}, transformers_tables=True, uniform_layers=False, measured_cache=True"
        for model_type, name in {
            "qwen3_next": "Qwen3NextForCausalLM",
            "qwen3_5_text": "Qwen3_5ForCausalLM",
            "qwen3_5_moe_text": "Qwen3_5MoeForCausalLM",
            "minimax_m2": "MiniMaxM2ForCausalLM",
            "llama4_text": "Llama4ForCausalLM",
        }.items()
    },
    "gemma4_text": "architecture='Gemma4ForCausalLM', measured_cache=True, uniform_layers=False, required_values="
    "{'hidden_size_per_layer_input': 0}, config_defaults={'tie_word_embeddings': True}",
    "lfm2": "architecture='Lfm2ForCausalLM', norm='embedding_norm', uniform_layers=False, measured_cache=True,"
    " config_defaults={'tie_word_embeddings': True}",
    "jamba": "architecture='JambaForCausalLM', norm='final_layernorm', transformers_tables=True, uniform_layers=False,"
    " measured_cache=True",
    # Its embeddings are multiplied on the way to the layers.
    "granitemoe": "architecture='GraniteMoeForCausalLM', transformers_tables=True, uniform_layers=False,"
    " enter_at_layers=True",
    "gemma": "architecture='GemmaForCausalLM'",
    "gemma2": "architecture='Gemma2ForCausalLM'",
    "gemma3_text": "architecture='Gemma3ForCausalLM'",
    "gpt2": "architecture='GPT2LMHeadModel', base='transformer', layers='h', embedding='wte', norm='ln_f',"
    " zero_outside_bottom=('wpe',), skip_outside_bottom=('drop',), config_names={'hidden_size': 'n_embd',"
    " 'num_hidden_layers': 'n_layer', 'num_attention_heads': 'n_head', 'vocab_size': 'vocab_size'},"
    " config_defaults={'tie_word_embeddings': True}",
}
PLUGIN = (
    "from splitlearn_core import ModelFamily, hookimpl\n\n\n@hookimpl\ndef splitlearn_model_families():\n"
    "    return [ModelFamily(model_type={!r}, {})]\n"
)
#: Sizes that blocks of 32 divide; four layers have three components and a layer to spare.
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "head_dim": 16}


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


#: The writer lies beside this file, which pytest does not put on the path.
writing = _load("gguf_writing")


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with plugins for the families that are not installed."""
    folder = tmp_path_factory.mktemp("site")
    reset_registry()
    for model_type in sorted(FAMILIES.keys() - set(registry().model_types())):
        distribution = f"family-for-gguf-{model_type}"
        write_plugin(folder, model_type, PLUGIN.format(model_type, FAMILIES[model_type]), distribution=distribution)
    return folder


@pytest.fixture(autouse=True)
def families(site: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Put those families on the path of this test, and of the processes that it starts."""
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH", "")))))
    reset_registry()
    yield
    reset_registry()


@pytest.fixture(scope="session", name="writing")
def _writing() -> ModuleType:
    """Return the writer."""
    return writing


@pytest.fixture(scope="session")
def model() -> Callable[..., Any]:
    """Return a function that makes a small random model, the same one each time."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from splitlearn_core.testing.worlds import TINY, random_model, tiny_model

    made: dict[str, Any] = {}

    def make(model_type: str, **overrides: Any) -> Any:
        key = f"{model_type} {sorted(overrides.items())}"
        if key not in made:
            own = {name: value for name, value in SIZES.items() if name != "head_dim" or "gpt" not in model_type}
            if model_type == "gpt2":
                # transformers takes GPT-2's positions from no metadata, but for these many.
                own["max_position_embeddings"] = 1024
            if model_type == "gemma4_text":
                # Its class refuses to say how large a head is: layers differ.
                config = AutoConfig.for_model(model_type, **{**TINY, **own, **overrides})
                made[key] = random_model(AutoModelForCausalLM.from_config, config)
            else:
                made[key] = tiny_model(model_type, **{**own, **overrides})
        return made[key]

    return make


@pytest.fixture
def gguf_file(model: Callable[..., Any], tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes the GGUF file of a small model."""

    def write(
        model_type: str,
        quantization: str = "F32",
        *,
        name: str = "model.gguf",
        metadata: Mapping[str, Any] | None = None,
        uncut: bool = False,
        fused: bool = False,
        **overrides: Any,
    ) -> Path:
        made = model(model_type, **overrides)
        return writing.write_gguf(tmp_path / name, made, quantization, uncut=uncut, fused=fused, **(metadata or {}))

    return write
