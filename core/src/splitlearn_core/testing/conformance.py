"""The checks that every family passes, as one pytest class.

A plugin's whole test file is::

    from splitlearn_core.testing.conformance import FamilyConformance

    class TestLlama(FamilyConformance):
        model_type = "llama"
        variants = {"plain": {}, "tied": {"tie_word_embeddings": True}}

Everything is compared with the unsplit Hugging Face model by ``torch.equal``: same machine, same
dtype, same batch, so there is no tolerance to choose.
"""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, TextIteratorStreamer

from splitlearn_core import ModelRegistry, SplitCausalLM, load_split_model, plan_split
from splitlearn_core.build.cache import CACHE_FIELD, cache_argument
from splitlearn_core.build.neutral import EnteringLayer, PassLayer, TupleLayer, entering
from splitlearn_core.plugins.registry import registry
from splitlearn_core.testing.worlds import tiny_model, write_checkpoint

LAYERS = 6
CUTS = ((1, 5), (2, 3), (3, 5))
#: A batch of one, and a batch of two whose first row is padded on the left.
PADDINGS = (None, 3)
PROMPT_TOKENS = 7
NEW_TOKENS = 6


class FamilyConformance:
    """Subclass it, name the model type and its variants, and every method is a test."""

    #: The model type under test.
    model_type: ClassVar[str]
    #: Name of the variant -> values of the configuration that differ from the tiny default.
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {"plain": {}}
    #: Attention implementations to compare under.
    attention: ClassVar[tuple[str, ...]] = ("eager", "sdpa")
    #: dtypes to compare in.
    dtypes: ClassVar[tuple[str, ...]] = ("float32", "bfloat16")
    #: Tensors of old checkpoints that must be left out: name relative to the base -> shape.
    legacy_tensors: ClassVar[Mapping[str, tuple[int, ...]]] = {}

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Spread the tests over variants, dtypes, attention implementations and cuts."""
        axes = {
            "variant": tuple(self.variants),
            "dtype": self.dtypes,
            "attention": self.attention,
            "cut": CUTS,
        }
        for name, values in axes.items():
            if name in metafunc.fixturenames:
                ids = [value if isinstance(value, str) else "-".join(map(str, value)) for value in values]
                metafunc.parametrize(name, values, ids=ids, scope="class")

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def one_thread(cls) -> Iterator[None]:
        """Tiny tensors gain nothing from threads, which spin for each other on a busy machine."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)

    @pytest.fixture(scope="class")
    @classmethod
    def checkpoint(cls, variant: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """A checkpoint of the variant, stored in float32."""
        model = tiny_model(cls.model_type, **{"num_hidden_layers": LAYERS, **cls.variants[variant]})
        return write_checkpoint(tmp_path_factory.mktemp(variant), model)

    @pytest.fixture(scope="class")
    @classmethod
    def whole(cls, checkpoint: Path, dtype: str, attention: str) -> Any:
        """The unsplit model."""
        return _whole(checkpoint, dtype=dtype, attn_implementation=attention)

    @pytest.fixture(scope="class")
    @classmethod
    def split(cls, checkpoint: Path, dtype: str, attention: str, cut: tuple[int, int]) -> SplitCausalLM:
        """The same model, cut in three."""
        parts = load_split_model(None, cut, checkpoint, dtype=dtype, attn_implementation=attention)
        return SplitCausalLM(*parts)  # type: ignore[arg-type]  # all three parts were asked for

    # -- discovery ---------------------------------------------------------------------------------

    def test_entry_point(self) -> None:
        """An entry point of the family group is named after the model type."""
        names = [point.name for point in importlib.metadata.entry_points(group="splitlearn.families")]
        assert names.count(self.model_type) == 1
        assert registry().family(self.model_type).model_type == self.model_type

    def test_import_budget(self) -> None:
        """Describing the family imports neither torch nor transformers."""
        code = (
            "import sys; from splitlearn_core.plugins.registry import registry; "
            f"registry().family({self.model_type!r}); "
            "print([name for name in ('torch', 'transformers') if name in sys.modules])"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)  # noqa: S603
        assert done.stdout.strip() == "[]"

    def test_config_defaults(self, checkpoint: Path) -> None:
        """What the family fills in for a silent config.json is what transformers fills in."""
        family = registry().family(self.model_type)
        filled = AutoConfig.for_model(self.model_type)
        for name, value in family.config_defaults.items():
            assert getattr(filled, name) == value, f"config_defaults[{name!r}] of {self.model_type}"
        written = json.loads((checkpoint / "config.json").read_text())
        for common, own in family.config_names.items():
            assert own in written, f"config_names[{common!r}] of {self.model_type} names nothing in config.json"

    # -- numbers -----------------------------------------------------------------------------------

    def test_logits(self, whole: Any, split: SplitCausalLM) -> None:
        """Logits without a cache are equal, with and without left padding and positions."""
        for padding in PADDINGS:
            batch = _batch(padding)
            for positions in ({}, {"position_ids": _positions(batch["attention_mask"])}):
                expected = _no_grad(whole, **batch, **positions, use_cache=False).logits
                assert torch.equal(_no_grad(split, **batch, **positions, use_cache=False).logits, expected)
        unmasked = {"input_ids": _batch(None)["input_ids"]}
        assert torch.equal(_no_grad(split, **unmasked).logits, _no_grad(whole, **unmasked).logits)

    def test_cache(self, whole: Any, split: SplitCausalLM) -> None:
        """Prefill, three single tokens and a chunk of four with a past are equal, each part with its own cache."""
        for padding in PADDINGS:
            for with_positions in (False, True):
                _check_cached_steps(whole, split, padding, with_positions=with_positions)

    def test_generate(self, whole: Any, split: SplitCausalLM) -> None:
        """Greedy, sampled, beam and streamed generation are equal, scores included."""
        methods: dict[str, dict[str, Any]] = {
            "greedy": {"do_sample": False},
            "sampled": {"do_sample": True, "top_k": 20, "temperature": 1.5},
            "beams": {"num_beams": 3, "do_sample": False},
            "sampled beams": {"num_beams": 2, "do_sample": True},
        }
        for padding in PADDINGS:
            for name, method in methods.items():
                outputs = [_generate(model, padding, **method) for model in (whole, split)]
                assert torch.equal(outputs[0].sequences, outputs[1].sequences), name
                assert all(map(torch.equal, outputs[0].scores, outputs[1].scores)), name
        assert _streamed(split) == _streamed(whole)

    def test_loss(self, whole: Any, split: SplitCausalLM) -> None:
        """The loss with labels is equal."""
        batch = _batch(3)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        expected = _no_grad(whole, **batch, labels=labels)
        assert torch.equal(_no_grad(split, **batch, labels=labels).loss, expected.loss)

    def test_causality(self, split: SplitCausalLM) -> None:
        """Changing the last token changes no earlier position's logits."""
        ids = _batch(None)["input_ids"]
        other = ids.clone()
        other[:, -1] = (ids[:, -1] + 1) % 100
        first, second = (_no_grad(split, input_ids=tokens).logits for tokens in (ids, other))
        assert torch.equal(first[:, :-1], second[:, :-1])
        assert not torch.equal(first[:, -1], second[:, -1])

    def test_logits_to_keep(self, whole: Any, split: SplitCausalLM) -> None:
        """The top computes logits only for the positions that are asked for."""
        batch = _batch(None)
        got = _no_grad(split, **batch, logits_to_keep=2).logits
        assert torch.equal(got, _no_grad(whole, **batch, logits_to_keep=2).logits)
        assert got.shape[1] == 2

    def test_gradients(self, checkpoint: Path, cut: tuple[int, int]) -> None:
        """Training through the cuts gives every parameter the gradient of the unsplit model."""
        whole = _whole(checkpoint, dtype="float32")
        split = SplitCausalLM(*load_split_model(None, cut, checkpoint))  # type: ignore[arg-type]
        batch = _batch(3)
        for model in (whole, split):
            model(**batch, labels=batch["input_ids"]).loss.backward()
        expected = {name: parameter.grad for name, parameter in whole.named_parameters(remove_duplicate=False)}
        compared = set()
        for part in split.components:
            for name, parameter in part.named_parameters():
                assert torch.equal(parameter.grad, expected[name]), name
                compared.add(name)
        assert compared == expected.keys()

    @pytest.mark.parametrize("component", ["trunk", "top"])
    def test_only_layers_outside_bottom(self, checkpoint: Path, component: str) -> None:
        """In training, hidden states that come in from outside meet nothing but layers and the final norm.

        An embedding dropout that is applied again, or positions that are added again, show here:
        see ``skip_outside_bottom`` and ``zero_outside_bottom``.
        """
        family = registry().family(self.model_type)
        part = getattr(load_split_model(None, (2, 4), checkpoint, parts=(component,)), component)
        base = part.get_submodule(family.base)
        layers = base.get_submodule(family.layers)
        for number, layer in enumerate(layers):
            # The first of a component that hidden states enter at its layers is neutral as it is.
            if not isinstance(layer, EnteringLayer):
                layers[number] = TupleLayer() if family.layers_return_tuple else PassLayer()
        for module in part.train().modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.5
        hidden = torch.randn(2, 5, part.config.hidden_size, generator=torch.Generator().manual_seed(0))
        expected = hidden
        for outlet in family.outlets:
            # A model that does without it has None in its place.
            module = base.get_submodule(outlet) if outlet in dict(base.named_modules()) else PassLayer()
            expected = module(expected)
        with entering(hidden):
            assert torch.equal(part.base_model(inputs_embeds=hidden).last_hidden_state, expected)

    # -- weights -----------------------------------------------------------------------------------

    def test_components_are_complete(self, checkpoint: Path, cut: tuple[int, int]) -> None:
        """Parameters and buffers are those of the unsplit model, in evaluation mode, none empty."""
        whole = _whole(checkpoint)
        expected = {**dict(whole.named_parameters(remove_duplicate=False)), **dict(whole.named_buffers())}
        for part in load_split_model(None, cut, checkpoint):
            assert part is not None
            assert not part.training
            own = {**dict(part.named_parameters(remove_duplicate=False)), **dict(part.named_buffers())}
            for name, tensor in own.items():
                assert tensor.dtype == expected[name].dtype, name
                assert tensor.requires_grad == expected[name].requires_grad, name
                assert torch.equal(tensor, expected[name]), name

    def test_plan(self, checkpoint: Path, cut: tuple[int, int]) -> None:
        """The plan holds, byte for byte, what is loaded."""
        plan = plan_split(checkpoint, cut)
        parts = load_split_model(None, cut, checkpoint)
        for planned, part in zip(plan.components, parts, strict=True):
            assert part is not None
            parameters = list(part.parameters())
            assert planned.parameters == sum(parameter.numel() for parameter in parameters)
            assert planned.nbytes == sum(parameter.nbytes for parameter in parameters)
        assert plan.parameters == _whole(checkpoint).num_parameters()

    def test_plan_without_weights(self, checkpoint: Path, cut: tuple[int, int], tmp_path: Path) -> None:
        """config.json alone gives the same plan as the headers."""
        (tmp_path / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
        guessed, known = (plan_split(folder, cut) for folder in (tmp_path, checkpoint))
        assert guessed.source == "config"
        for one, other in zip(guessed.components, known.components, strict=True):
            assert (one.parameters, one.nbytes, one.kv_bytes_per_token) == (
                other.parameters,
                other.nbytes,
                other.kv_bytes_per_token,
            )

    def test_only_needed_shards(self, checkpoint: Path, tmp_path: Path) -> None:
        """A component loads although every shard that it does not need is gone."""
        whole = _whole(checkpoint)
        write_checkpoint(tmp_path, whole, max_shard_size=12_000)
        expected = _parameters(load_split_model(None, (2, 4), checkpoint))
        for part in ("bottom", "trunk", "top"):
            folder = tmp_path.with_name(f"{tmp_path.name}-{part}")
            folder.mkdir()
            needed = plan_split(tmp_path, (2, 4), parts=(part,)).shards
            for file in tmp_path.iterdir():
                if file.suffix == ".json" or file.name in needed:
                    (folder / file.name).write_bytes(file.read_bytes())
            assert len(needed) < len(list(tmp_path.glob("*.safetensors")))
            loaded = load_split_model(None, (2, 4), folder, parts=(part,))
            got = _parameters(loaded)
            assert got
            assert all(torch.equal(tensor, expected[name]) for name, tensor in got.items())

    @pytest.mark.parametrize("spelling", ["with prefix", "without prefix", "head present", "embedding absent"])
    def test_key_variants(self, checkpoint: Path, spelling: str, tmp_path: Path) -> None:
        """Checkpoints with and without the base prefix, legacy tensors and a tied head load alike."""
        family = registry().family(self.model_type)
        config = json.loads((checkpoint / "config.json").read_text())
        head, embedding = f"{family.head}.weight", f"{family.base}.{family.embedding}.weight"
        tied = bool(family.config_value(config, "tie_word_embeddings"))
        if spelling in ("head present", "embedding absent") and not tied:
            pytest.skip("only a tied model may spell it so")
        tensors = load_file(checkpoint / "model.safetensors")
        prefix = "" if spelling == "without prefix" else f"{family.base}."
        if spelling == "without prefix":
            tensors = {key.removeprefix(f"{family.base}."): tensor for key, tensor in tensors.items()}
        elif tied and spelling == "head present":
            tensors[head] = tensors[embedding].clone()
        elif tied and spelling == "embedding absent":
            tensors[head] = tensors.pop(embedding)
        tensors |= {prefix + name: torch.ones(shape) for name, shape in self.legacy_tensors.items()}
        _rewrite(checkpoint, tmp_path, tensors)
        got, expected = (_parameters(load_split_model(None, (2, 4), folder)) for folder in (tmp_path, checkpoint))
        assert got.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in got.items())

    @pytest.mark.parametrize("component", ["bottom", "trunk", "top"])
    def test_from_state_dict(self, checkpoint: Path, component: str) -> None:
        """The classes of the registry make the same components from the state dict of the whole model."""
        whole = _whole(checkpoint)
        ends = {"bottom": {"end_layer": 2}, "trunk": {"start_layer": 2, "end_layer": 4}, "top": {"start_layer": 4}}
        model_class = ModelRegistry.get_model_class(self.model_type, component)
        made = model_class.from_pretrained_split(whole.state_dict(), whole.config, **ends[component])
        loaded = getattr(load_split_model(None, (2, 4), checkpoint), component)
        got, expected = made.state_dict(), loaded.state_dict()
        assert got.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in got.items())
        assert not made.training

    def test_ties(self, checkpoint: Path) -> None:
        """A tied head is the embedding: one parameter between a bottom and a top of one call."""
        family = registry().family(self.model_type)
        config = json.loads((checkpoint / "config.json").read_text())
        bottom, _, top = load_split_model(None, (2, 4), checkpoint)
        assert bottom is not None
        assert top is not None
        embedding = bottom.get_parameter(f"{family.base}.{family.embedding}.weight")
        head = top.get_parameter(f"{family.head}.weight")
        assert (head is embedding) == bool(family.config_value(config, "tie_word_embeddings"))


def _whole(checkpoint: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(checkpoint, **options).eval()


def _no_grad(model: Any, **arguments: Any) -> Any:
    with torch.no_grad():
        return model(**arguments)


def _ids(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 100, (rows, columns), generator=torch.Generator().manual_seed(seed))


def _batch(padding: int | None) -> dict[str, torch.Tensor]:
    ids = _ids(1 if padding is None else 2, PROMPT_TOKENS)
    mask = torch.ones_like(ids)
    if padding is not None:
        ids[0, :padding], mask[0, :padding] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def _positions(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


def _check_cached_steps(whole: Any, split: SplitCausalLM, padding: int | None, *, with_positions: bool) -> None:
    """Feed the same tokens in steps of 7, 1, 1, 1 and 4 to the unsplit model and to the components."""
    caches = [part.new_cache() for part in split.components]
    past, seen = None, 0
    mask = _batch(padding)["attention_mask"]
    for step, tokens in enumerate((PROMPT_TOKENS, 1, 1, 1, 4)):
        ids = _batch(padding)["input_ids"] if step == 0 else _ids(len(mask), tokens, seed=step)
        if step:
            mask = torch.cat([mask, torch.ones(len(mask), tokens, dtype=mask.dtype)], dim=1)
        common: dict[str, Any] = {"attention_mask": mask}
        if with_positions:
            common["position_ids"] = _positions(mask)[:, seen:]
        output = _no_grad(whole, input_ids=ids, use_cache=True, **{cache_argument(whole.forward): past}, **common)
        past, seen = output[CACHE_FIELD], seen + tokens
        hidden = _no_grad(split.bottom, input_ids=ids, past_key_values=caches[0], **common)
        hidden = _no_grad(split.trunk, hidden_states=hidden, past_key_values=caches[1], **common)
        got = _no_grad(split.top, hidden_states=hidden, past_key_values=caches[2], **common)
        assert torch.equal(got.logits, output.logits), f"step {step} of {tokens} tokens"


def _generate(model: Any, padding: int | None, **method: Any) -> Any:
    torch.manual_seed(7)
    return model.generate(
        **_batch(padding),
        **method,
        max_new_tokens=NEW_TOKENS,
        pad_token_id=0,
        output_scores=True,
        return_dict_in_generate=True,
    )


class _Spelling:
    """A tokenizer that writes a token as its number: what a streamer needs and no more."""

    def decode(self, ids: list[int] | int, **_: Any) -> str:
        # One token alone, too: streamers of transformers 5.24 ask for the length of the last one.
        tokens = [ids] if isinstance(ids, int) else ids
        return " ".join(str(int(token)) for token in tokens) + "\n"


def _streamed(model: Any) -> list[str]:
    streamer = TextIteratorStreamer(_Spelling(), timeout=60)
    model.generate(**_batch(None), do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=0, streamer=streamer)
    return list(streamer)


def _parameters(parts: Any) -> dict[str, torch.Tensor]:
    return {name: tensor for part in parts if part is not None for name, tensor in part.state_dict().items()}


def _rewrite(source: Path, target: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Copy a checkpoint with other tensors."""
    for file in source.glob("*.json"):
        (target / file.name).write_bytes(file.read_bytes())
    save_file(
        {key: tensor.contiguous() for key, tensor in tensors.items()}, target / "model.safetensors", {"format": "pt"}
    )
