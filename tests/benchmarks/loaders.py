"""Ways to get a trunk out of a checkpoint: ours, and what one would use instead.

Every way ends in a function from hidden states to hidden states, so that all can be shown to compute
the same. The peers are written as kindly as their interfaces allow.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

Trunk = Callable[["torch.Tensor"], "torch.Tensor"]


@dataclass(frozen=True)
class Job:
    """What is to be loaded."""

    directory: str
    cut: tuple[int, int]
    dtype: str = "auto"
    strategy: str = "auto"


@dataclass(frozen=True)
class Loader:
    """One way of loading."""

    title: str
    load: Callable[[Job], Trunk]
    #: Modules that are imported before the clock starts.
    imports: tuple[str, ...] = ()
    #: The package that must be installed; empty where the product itself needs it.
    package: str = ""


def load_ours(job: Job) -> Trunk:
    from splitlearn_core import load_split_model

    trunk = load_split_model(
        None, job.cut, job.directory, parts=["trunk"], dtype=job.dtype, strategy=job.strategy, progress=False
    ).trunk
    assert trunk is not None
    return trunk


def load_whole(job: Job) -> Trunk:
    return trunk_of(from_pretrained(job).base_model, job.cut)


def load_recipe(job: Job) -> Trunk:
    """The usual recipe: load all, construct three parts, copy the state into them."""
    return _copied_parts(job, on_meta=False)


def load_recipe_kindly(job: Job) -> Trunk:
    """The same without the initialisation of weights that are overwritten anyway."""
    return _copied_parts(job, on_meta=True)


def load_accelerate(job: Job) -> Trunk:
    """A model constructed in the ordinary way, then filled."""
    return _dispatched(job, on_meta=False)


def load_accelerate_kindly(job: Job) -> Trunk:
    """As accelerate's guide has it: constructed without memory, then filled."""
    return _dispatched(job, on_meta=True)


def _dispatched(job: Job, *, on_meta: bool) -> Trunk:
    from accelerate import init_empty_weights, load_checkpoint_and_dispatch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(job.directory)
    with init_empty_weights() if on_meta else nullcontext():
        model = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    model.tie_weights()
    load_checkpoint_and_dispatch(model, job.directory, device_map={"": "cpu"}, dtype=config.dtype)
    return trunk_of(model.eval().base_model, job.cut)


def load_fastsafetensors(job: Job) -> Trunk:
    from fastsafetensors import SafeTensorsFileLoader

    wanted = wanted_keys(job)
    loader = SafeTensorsFileLoader(None, "cpu", nogds=True, set_numa=False)
    loader.set_tensor_filter(lambda key: key in wanted)
    loader.add_filenames({0: wanted_files(job, wanted)})
    buffers = loader.copy_files_to_device()
    trunk = assigned_trunk(job, {name: buffers.get_tensor(key) for key, name in wanted.items()})
    loader.close()
    return trunk


def load_runai(job: Job) -> Trunk:
    from runai_model_streamer import SafetensorsStreamer

    wanted = wanted_keys(job)
    with SafetensorsStreamer() as streamer:
        streamer.stream_files(wanted_files(job, wanted), tensor_names=wanted.keys())
        return assigned_trunk(job, {wanted[key]: tensor for key, tensor in streamer.get_tensors()})


_HF = ("torch", "transformers.generation", "transformers.modeling_utils", "transformers.models.auto.modeling_auto")
LOADERS = {
    "ours": Loader(
        "splitlearn",
        load_ours,
        ("splitlearn_core.api", "splitlearn_core.build.component", "splitlearn_core.build.assemble", *_HF),
    ),
    "whole": Loader("from_pretrained", load_whole, _HF),
    "recipe": Loader("whole model, 3 parts copied", load_recipe, _HF),
    "kindly": Loader("the same, without initialisation", load_recipe_kindly, _HF),
    "accelerate": Loader("accelerate", load_accelerate, ("accelerate", *_HF), "accelerate"),
    "empty": Loader("accelerate, empty weights", load_accelerate_kindly, ("accelerate", *_HF), "accelerate"),
    "fastsafetensors": Loader("fastsafetensors", load_fastsafetensors, ("fastsafetensors", *_HF), "fastsafetensors"),
    "runai": Loader("runai-model-streamer", load_runai, ("runai_model_streamer", *_HF), "runai_model_streamer"),
}


def from_pretrained(job: Job) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(job.directory, dtype=job.dtype, local_files_only=True)


def split_model(job: Job) -> Any:
    """Load all three components with our own code, as one model."""
    from splitlearn_core import SplitCausalLM, load_split_model

    parts: Any = load_split_model(None, job.cut, job.directory, progress=False)
    return SplitCausalLM(*parts)


def model_class(directory: str) -> Any:
    """Import the model class that ``config.json`` names."""
    import transformers

    config = json.loads((Path(directory) / "config.json").read_bytes())
    return getattr(transformers, config["architectures"][0])


def trunk_of(base: Any, cut: tuple[int, int]) -> Trunk:
    """Leave only the trunk's layers in a base model; nothing is copied."""
    from torch import nn

    if hasattr(base, "h"):
        base.h, base.ln_f, base.wpe = base.h[slice(*cut)], nn.Identity(), _zero()
    else:
        base.layers, base.norm = base.layers[slice(*cut)], nn.Identity()
    return lambda hidden: base(inputs_embeds=hidden, use_cache=False).last_hidden_state


def wanted_keys(job: Job) -> dict[str, str]:
    """Return the checkpoint's keys of the trunk, and their names in :func:`assigned_trunk`'s layers."""
    prefix = "transformer.h" if _config(job)["model_type"] == "gpt2" else "model.layers"
    numbers = range(*job.cut)
    wanted = {}
    for key in _weight_map(job):
        number, _, rest = key.removeprefix(f"{prefix}.").partition(".")
        if key.startswith(f"{prefix}.") and int(number) in numbers:
            wanted[key] = f"{int(number) - job.cut[0]}.{rest}"
    return wanted


def wanted_files(job: Job, wanted: Mapping[str, str]) -> list[str]:
    weight_map = _weight_map(job)
    return [str(Path(job.directory) / name) for name in sorted({weight_map[key] for key in wanted})]


def assigned_trunk(job: Job, tensors: Mapping[str, torch.Tensor]) -> Trunk:
    """Build the trunk's modules without memory, and put tensors in their places."""
    import torch
    from torch import nn

    config = model_class(job.directory).config_class.from_pretrained(job.directory)
    config._attn_implementation = "sdpa"
    layers, config.num_hidden_layers = config.num_hidden_layers, 0
    config.vocab_size, words = 1, config.vocab_size
    whole = model_class(job.directory)(config)
    config.num_hidden_layers, config.vocab_size = layers, words
    with torch.device("meta"):
        made = nn.ModuleList(layer_class(whole)(config, number) for number in range(len(range(*job.cut))))
    made.load_state_dict(tensors, assign=True)
    base = whole.eval().base_model
    setattr(base, "h" if hasattr(base, "h") else "layers", made.eval())
    return trunk_of(base, (0, len(made)))


def layer_class(model: Any) -> Any:
    """Find the class of a model's decoder layers in the module that defines the model."""
    import sys

    names = {"gpt2": "GPT2Block", "qwen2": "Qwen2DecoderLayer", "gemma": "GemmaDecoderLayer"}
    return getattr(sys.modules[type(model).__module__], names[model.config.model_type])


def _copied_parts(job: Job, *, on_meta: bool) -> Trunk:
    from torch import nn

    model = from_pretrained(job)
    base, config = model.base_model, model.config
    layers = base.h if hasattr(base, "h") else base.layers
    first, second = job.cut
    parts = {}
    for name, numbers in (
        ("bottom", range(first)),
        ("trunk", range(first, second)),
        ("top", range(second, len(layers))),
    ):
        ends = {"bottom": _inlets(base), "trunk": {}, "top": _outlets(model)}[name]
        with _construction(model.dtype, on_meta=on_meta):
            made = nn.ModuleList(layer_class(model)(config, number) for number in numbers)
            edges = nn.ModuleDict({key: _like(module) for key, module in ends.items()})
        _copy_state(made, nn.ModuleList(layers[number] for number in numbers), on_meta=on_meta)
        _copy_state(edges, nn.ModuleDict(ends), on_meta=on_meta)
        parts[name] = (edges, made.eval())
    del model.lm_head  # and with it the last use of what was loaded
    setattr(base, "h" if hasattr(base, "h") else "layers", parts["trunk"][1])
    del layers
    run = trunk_of(base, (0, second - first))
    return _Keeping(run, parts)


@dataclass(frozen=True)
class _Keeping:
    """Three parts stay in memory, one of them is called."""

    run: Trunk
    parts: Mapping[str, Any]

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.run(hidden)


@contextmanager
def _construction(dtype: torch.dtype, *, on_meta: bool) -> Iterator[None]:
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta" if on_meta else "cpu"):
            yield
    finally:
        torch.set_default_dtype(before)


def _copy_state(target: nn.Module, source: nn.Module, *, on_meta: bool) -> None:
    if on_meta:
        copies = {name: tensor.clone() for name, tensor in source.state_dict().items()}
        target.load_state_dict(copies, assign=True)
    else:
        target.load_state_dict(source.state_dict())


def _inlets(base: Any) -> dict[str, Any]:
    return {"wte": base.wte, "wpe": base.wpe} if hasattr(base, "wte") else {"embed_tokens": base.embed_tokens}


def _outlets(model: Any) -> dict[str, Any]:
    base = model.base_model
    return {"norm": base.ln_f if hasattr(base, "ln_f") else base.norm, "lm_head": model.lm_head}


def _like(module: Any) -> Any:
    """Construct a module of the same kind and size."""
    from torch import nn

    if isinstance(module, nn.Embedding):
        return nn.Embedding(module.num_embeddings, module.embedding_dim)
    if isinstance(module, nn.Linear):
        return nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
    return type(module)(module.weight.shape[0])


def _zero() -> Any:
    import torch
    from torch import nn

    class Zero(nn.Module):
        def forward(self, positions: torch.Tensor) -> torch.Tensor:
            return torch.zeros((), device=positions.device)

    return Zero()


def _config(job: Job) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((Path(job.directory) / "config.json").read_bytes())
    return config


def _weight_map(job: Job) -> dict[str, str]:
    index = Path(job.directory) / "model.safetensors.index.json"
    if index.is_file():
        weight_map: dict[str, str] = json.loads(index.read_bytes())["weight_map"]
        return weight_map
    from safetensors import safe_open

    single = "model.safetensors"
    with safe_open(Path(job.directory) / single, "pt") as file:
        return dict.fromkeys(file.keys(), single)
