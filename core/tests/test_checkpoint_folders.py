"""Checkpoint folders as people have them: mixed dtypes, surplus tensors, foreign names; measured by from_pretrained."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from splitlearn_core import (
    CheckpointError,
    SplitCausalLM,
    TensorMismatchError,
    load_component,
    load_split_model,
    merge_split,
    plan_split,
    save_split,
)

CUTS = (2, 4)
IDS = torch.tensor([[5, 17, 42, 9, 3, 8], [1, 2, 3, 4, 5, 6]])
WEIGHTS = "model.safetensors"
STRATEGIES = ("mapped", "copied", "incremental", "whole")

pytestmark = [pytest.mark.libs, pytest.mark.usefixtures("llama")]


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Write the tensors of every weight file of a folder again, changed."""
    for path in folder.glob("*.safetensors"):
        save_file(change(load_file(path)), path, {"format": "pt"})


def drop_dtype(folder: Path) -> None:
    path = folder / "config.json"
    config = {k: v for k, v in json.loads(path.read_text()).items() if k not in ("dtype", "torch_dtype")}
    path.write_text(json.dumps(config))


def unsplit(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def split(folder: Path, **options: Any) -> SplitCausalLM:
    return SplitCausalLM(*load_split_model(None, CUTS, folder, **options)).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits  # type: ignore[no-any-return]


@pytest.fixture(params=["single", "sharded"])
def narrow(request: pytest.FixtureRequest, tmp_path: Path, checkpoint: Callable[[str], Path]) -> Path:
    """A checkpoint in bfloat16 whose config.json states no dtype."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "narrow"
    model = AutoModelForCausalLM.from_pretrained(checkpoint("single"), dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="5GB" if request.param == "single" else "30KB")
    drop_dtype(folder)
    return folder


@pytest.mark.sample(6)
@pytest.mark.parametrize("wide", ["norm", "embed_tokens", "lm_head", "layers.3", "nothing"])
def test_a_component_alone_has_the_dtype_of_the_whole(narrow: Path, wide: str) -> None:
    """The first floating tensor of the first file decides, whichever component it belongs to."""
    rewrite(narrow, lambda tensors: {k: v.float() if wide in k else v for k, v in tensors.items()})
    expected = unsplit(narrow).dtype

    for part in ("bottom", "trunk", "top"):
        parts = load_split_model(None, CUTS, narrow, parts=(part,))
        assert getattr(parts, part).dtype == expected, part
        assert plan_split(narrow, CUTS, parts=(part,)).dtype == str(expected).removeprefix("torch.")
    assert torch.equal(logits(split(narrow)), logits(unsplit(narrow)))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_dtype_does_not_depend_on_the_strategy(narrow: Path, strategy: str) -> None:
    """One rule for all ways of reading."""
    rewrite(narrow, lambda tensors: {k: v.float() if "norm" in k else v for k, v in tensors.items()})

    parts = load_split_model(None, CUTS, narrow, parts=("trunk",), strategy=strategy)

    assert parts.trunk is not None
    assert parts.trunk.dtype == unsplit(narrow).dtype


def test_the_first_tensor_of_a_pickle_is_that_of_its_dictionary(narrow: Path) -> None:
    """Not the first by name, as in safetensors."""
    tensors = {k: v for path in sorted(narrow.glob("*.safetensors")) for k, v in load_file(path).items()}
    for path in narrow.glob("model*"):
        path.unlink()
    ordered = sorted(tensors, reverse=True)
    torch.save(
        {k: tensors[k].float() if k == ordered[0] else tensors[k] for k in ordered}, narrow / "pytorch_model.bin"
    )

    parts = load_split_model(None, CUTS, narrow, parts=("trunk",))

    assert parts.trunk is not None
    assert parts.trunk.dtype == unsplit(narrow).dtype == torch.float32


def test_the_index_may_state_the_dtype(narrow: Path) -> None:
    """What its metadata says counts before the tensors."""
    index = narrow / "model.safetensors.index.json"
    if not index.is_file():
        pytest.skip("one file has no index")
    content = json.loads(index.read_text())
    content["metadata"] = {**content.get("metadata", {}), "dtype": "float16"}
    index.write_text(json.dumps(content))

    parts = load_split_model(None, CUTS, narrow, parts=("top",))

    assert parts.top is not None
    assert parts.top.dtype == unsplit(narrow).dtype == torch.float16


def test_without_the_first_shard_the_next_decides(narrow: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A folder with only the shards of one component is loaded, and the log says why."""
    index = narrow / "model.safetensors.index.json"
    if not index.is_file():
        pytest.skip("one file has no shards")
    needed = set(plan_split(narrow, CUTS, parts=("trunk",)).shards)
    first = min(set(json.loads(index.read_text())["weight_map"].values()))
    assert first not in needed
    (narrow / first).unlink()

    parts = load_split_model(None, CUTS, narrow, parts=("trunk",))

    assert parts.trunk is not None
    assert parts.trunk.dtype == torch.bfloat16
    assert first in caplog.text


EXTRA = {
    "a score": {"score.weight": torch.zeros(2, 32)},
    "a value head": {"v_head.summary.weight": torch.zeros(1, 32), "v_head.summary.bias": torch.zeros(1)},
    "MTP layers": {"model.mtp_layers.0.norm.weight": torch.ones(32)},
    "a layer too many": {"model.layers.6.mlp.up_proj.weight": torch.ones(48, 32)},
    "a bias of the head": {"lm_head.bias": torch.ones(100)},
    "more in each layer": {f"model.layers.{n}.self_attn.q_norm.weight": torch.ones(8) for n in range(6)},
}


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name.startswith("splitlearn") and r.levelno == logging.WARNING]


@pytest.mark.sample(10)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", EXTRA)
def test_surplus_tensors_are_a_warning(
    single: Path, caplog: pytest.LogCaptureFixture, kind: str, strategy: str
) -> None:
    """As in ``from_pretrained``: the numbers are its numbers, and one warning names them."""
    rewrite(single, lambda tensors: {**tensors, **EXTRA[kind]})

    assert torch.equal(logits(split(single, strategy=strategy)), logits(unsplit(single)))

    (warning,) = warnings_of(caplog)
    assert f"{len(EXTRA[kind])} tensors" in warning
    assert next(iter(EXTRA[kind])).partition("layers.")[0] in warning


@pytest.mark.parametrize("kind", EXTRA)
def test_a_strict_load_refuses_surplus_tensors(single: Path, kind: str) -> None:
    """For those who want to know; all are listed."""
    rewrite(single, lambda tensors: {**tensors, **EXTRA[kind]})

    with pytest.raises(TensorMismatchError, match="unexpected") as caught:
        load_split_model(None, CUTS, single, strict=True)

    assert caught.value.hint


def test_surplus_tensors_are_neither_planned_nor_read(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan names them, and their bytes are not read."""
    from splitlearn_core.readers.mapped import IncrementalStrategy

    rewrite(single, lambda tensors: {**tensors, **EXTRA["a score"], **EXTRA["more in each layer"]})
    read: list[str] = []
    reader = IncrementalStrategy.read

    def noting(self: Any, plan: Any) -> Any:
        for planned, tensor in reader(self, plan):
            read.append(planned.info.key)
            yield planned, tensor

    monkeypatch.setattr(IncrementalStrategy, "read", noting)
    load_split_model(None, CUTS, single, strategy="incremental")

    assert plan_split(single, CUTS).unexpected == ("score.weight",)
    assert len(read) == len(set(read)) > 0
    assert not any("score" in key or "q_norm" in key for key in read)


def test_many_surplus_tensors_are_named_in_one_short_line(single: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A few names, and how many more there are."""
    rewrite(single, lambda tensors: {**tensors, **{f"heads.{chr(97 + n)}x.weight": torch.ones(1) for n in range(20)}})

    split(single)

    (warning,) = warnings_of(caplog)
    assert "20 tensors" in warning
    assert warning.endswith("and 12 more")
    assert len(warning) < 1000


def test_surplus_tensors_survive_split_and_merge(single: Path, tmp_path: Path) -> None:
    """Saved with the component whose names are the most like theirs, and given back by a merge."""
    rewrite(single, lambda tensors: {**tensors, **EXTRA["a value head"], **EXTRA["more in each layer"]})

    save_split(single, tmp_path / "split", CUTS)
    trunk = load_component(tmp_path / "split", "trunk")
    merged = load_file(merge_split(tmp_path / "split", out=tmp_path / "merged") / WEIGHTS)

    assert trunk(torch.zeros(1, 2, 32)).shape == (1, 2, 32)
    assert merged.keys() == load_file(single / WEIGHTS).keys()
    # From memory: what was not read is not there to be saved.
    save_split(load_split_model(None, CUTS, single), tmp_path / "memory")
    assert load_component(tmp_path / "memory", "top").component == "top"


PREFIXES = ("_orig_mod.", "module.", "base_model.model.", "module._orig_mod.", "_forward_module.", "net.")


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_prefix_of_all_names_is_explained(single: Path, prefix: str) -> None:
    """transformers makes such a model up; here the error says whose prefix it is, and takes it off by a command."""
    before = logits(unsplit(single))
    rewrite(single, lambda tensors: {prefix + k: v for k, v in tensors.items()})

    with pytest.raises(TensorMismatchError) as caught:
        load_split_model(None, CUTS, single)
    with pytest.raises(TensorMismatchError) as planned:
        plan_split(single, CUTS)

    assert repr(prefix) in caught.value.hint
    assert planned.value.hint == caught.value.hint
    command = re.search(r'python -c "(.*)"$', caught.value.hint)
    assert command is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(single)
        exec(command[1], {})  # the command of the hint does what it says
    assert torch.equal(logits(split(single)), before)


TRACES = {
    "scales": ({".q_proj.weight": ".q_proj.scales"}, "mlx_lm.convert"),
    "lora": ({".q_proj.weight": ".q_proj.base_layer.weight"}, "merge_and_unload"),
    "compiled layers": ({"layers.": "layers.", ".self_attn.": "._orig_mod.self_attn."}, "_orig_mod"),
    "fsdp": ({"model.layers": "model._fsdp_wrapped_module.layers"}, "FULL_STATE_DICT"),
    "gptq": ({".q_proj.weight": ".q_proj.qweight"}, "quantization_config"),
    "meta": ({"self_attn.q_proj": "attention.wq"}, "convert"),
    "multimodal": ({"model.": "language_model.model."}, "multimodal"),
    "optimizer": ({".q_proj.weight": ".q_proj.weight.exp_avg"}, "optimizer"),
    "fp8": ({".q_proj.weight": ".q_proj.weight_packed"}, "compression_config"),
}


@pytest.mark.parametrize("kind", TRACES)
def test_names_that_tools_leave_are_explained(single: Path, kind: str) -> None:
    """What is missing for that reason is refused, and the hint says how to get what is needed."""
    renamed, hint = TRACES[kind]

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for old, new in renamed.items():
            tensors = {k.replace(old, new): v for k, v in tensors.items()}
        return tensors

    rewrite(single, change)

    with pytest.raises(TensorMismatchError) as caught:
        load_split_model(None, CUTS, single)

    assert hint in caught.value.hint


def test_empty_matrices_are_those_of_zero_3(single: Path) -> None:
    """DeepSpeed's own command gathers them; config.json is not to blame."""
    rewrite(single, lambda tensors: {k: torch.empty(0) if v.dim() > 1 else v for k, v in tensors.items()})

    with pytest.raises(TensorMismatchError) as caught:
        load_split_model(None, CUTS, single)

    assert "zero_to_fp32.py" in caught.value.hint


def test_an_adapter_among_the_weights_is_refused(single: Path) -> None:
    """Left out, other weights than those that were saved would answer."""
    name = "model.layers.1.self_attn.q_proj.lora_A.default.weight"
    rewrite(single, lambda tensors: {**tensors, name: torch.ones(2, 32)})

    with pytest.raises(CheckpointError, match="lora_A") as caught:
        load_split_model(None, CUTS, single)

    assert "merge_and_unload" in caught.value.hint


FILES = {
    "an adapter": ("adapter_model.safetensors", "load_adapter"),
    "Mistral's layout": ("consolidated.safetensors", "convert"),
    "Meta's layout": ("consolidated.00.pth", "convert"),
    "a variant": ("model.fp16.safetensors", "variant"),
    "shards of a variant": ("model.safetensors.index.fp16.json", "variant"),
    "DeepSpeed": ("zero_to_fp32.py", "zero_to_fp32.py DIR"),
    "FSDP": ("__0_0.distcp", "merge-weights"),
    "Flax": ("flax_model.msgpack", "from_flax"),
}


@pytest.mark.parametrize("kind", FILES)
def test_other_files_in_the_place_of_weights(single: Path, kind: str) -> None:
    """The error names the files that are there and what to do, and does not ask for an index."""
    name, hint = FILES[kind]
    (single / WEIGHTS).rename(single / name)

    with pytest.raises(CheckpointError, match=re.escape(name)) as caught:
        load_split_model(None, CUTS, single)

    assert hint in caught.value.hint


def test_files_of_a_training_run_do_not_matter(single: Path) -> None:
    """A Trainer checkpoint has optimizer, scheduler and other files next to the weights."""
    for name in ("optimizer.pt", "scheduler.pt", "training_args.bin", "rng_state.pth", "consolidated.safetensors"):
        (single / name).write_bytes(b"not read")

    assert torch.equal(logits(split(single)), logits(unsplit(single)))


def test_weights_that_the_configuration_names(single: Path, edit_json: Callable[..., None]) -> None:
    """``from_pretrained`` reads the file that config.json names; another one is not read instead."""
    save_file(load_file(single / WEIGHTS), single / "other.safetensors", {"format": "pt"})
    edit_json(single / "config.json", transformers_weights=WEIGHTS)
    assert torch.equal(logits(split(single)), logits(unsplit(single)))
    edit_json(single / "config.json", transformers_weights="other.safetensors")

    with pytest.raises(CheckpointError, match="transformers_weights") as caught:
        load_split_model(None, CUTS, single)

    assert WEIGHTS in caught.value.hint


MLX = {"group_size": 64, "bits": 4}


@pytest.mark.parametrize("names", [("quantization", "quantization_config"), ("quantization",)])
def test_mlx_quantisation_is_named(single: Path, edit_json: Callable[..., None], names: tuple[str, ...]) -> None:
    """Its settings name no method, or are not where transformers looks."""

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        packed = {k: torch.zeros(32, 4, dtype=torch.uint32) if "q_proj.weight" in k else v for k, v in tensors.items()}
        scales = {k.replace("weight", "scales"): torch.zeros(32, 1) for k in tensors if "q_proj.weight" in k}
        return {**packed, **scales}

    rewrite(single, change)
    edit_json(single / "config.json", **dict.fromkeys(names, MLX))

    with pytest.raises(CheckpointError) as caught:
        load_split_model(None, CUTS, single)

    assert "None" not in str(caught.value)
    assert "MLX" in str(caught.value)
    assert "mlx_lm.convert" in caught.value.hint


@pytest.mark.parametrize("name", ["quantization", "compression_config"])
def test_settings_that_transformers_does_not_read_change_nothing(
    single: Path, edit_json: Callable[..., None], name: str
) -> None:
    """Plain weights are plain weights."""
    edit_json(single / "config.json", **{name: {**MLX, "format": "dense"}})

    assert torch.equal(logits(split(single)), logits(unsplit(single)))


def test_a_quantisation_without_a_method_is_refused(single: Path, edit_json: Callable[..., None]) -> None:
    """As by transformers, and without the word None."""
    edit_json(single / "config.json", quantization_config={"scheme": "own"})

    with pytest.raises(CheckpointError) as caught:
        load_split_model(None, CUTS, single)

    assert "None" not in caught.value.message


@pytest.mark.parametrize("with_config", [True, False])
def test_a_gguf_file_names_the_package_that_reads_it(
    single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_config: bool
) -> None:
    """Whether the file or its folder is given, and from the doctor too: no hint leads to the other one."""
    from splitlearn_core.doctor.load_checks import check_model
    from splitlearn_core.plugins.registry import reset_registry

    monkeypatch.setenv("SPLITLEARN_DISABLE_PLUGINS", "gguf")
    reset_registry()
    folder = tmp_path / "quantised"
    folder.mkdir()
    if with_config:
        (folder / "config.json").write_bytes((single / "config.json").read_bytes())
    (folder / "model.gguf").write_bytes(b"GGUF")

    for name in (folder, folder / "model.gguf"):
        with pytest.raises(CheckpointError, match="GGUF") as caught:
            load_split_model(None, CUTS, name)
        assert "pip install splitlearn-gguf" in caught.value.hint
        assert "./plugins/gguf" in caught.value.hint
        assert "splitlearn-gguf" in check_model(str(name), load=False)[-1].fix
