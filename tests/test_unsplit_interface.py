"""A split model takes what its unsplit class takes, and returns the same; what transformers' own suite asks of classes.

Each test holds a split model of three components against the unsplit model of the same checkpoint, to the last bit.
``tests/transformers_suite.py`` runs the suite itself where it is to be had.
"""

from __future__ import annotations

import copy
import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, GenerationMixin, StaticCache
from transformers.utils import ModelOutput

from splitlearn_core import SplitCausalLM, load_split_model
from splitlearn_core.testing.worlds import tiny_model, write_checkpoint

pytestmark = pytest.mark.libs

TYPES = ("gpt2", "qwen2", "gemma", "gemma2", "gemma3_text")
#: Windows smaller than the prompts, so that a mask of the wrong kind changes numbers.
SPECIAL: dict[str, dict[str, Any]] = {
    "gpt2": {"n_positions": 64},
    "gemma2": {"sliding_window": 4},
    "gemma3_text": {
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    },
}
IDS = torch.tensor([[5, 17, 42, 99, 3, 8, 64], [1, 2, 3, 4, 5, 6, 7]])
LEFT_PADDED = torch.tensor([[1] * 7, [0] * 2 + [1] * 5])
NEW_TOKENS = 5
#: What transformers 5.4 does not do, or does otherwise than it does today.
newest = pytest.mark.newest


@pytest.fixture(autouse=True)
def forked_tokenizers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take back what compiling sets for the processes that it starts."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "0")


class World:
    """A checkpoint of one type, from which both models are loaded afresh."""

    def __init__(self, model_type: str, folder: Path) -> None:
        self.model_type = model_type
        self.folder = folder

    def load(self, attn_implementation: str = "eager", **config: Any) -> tuple[Any, SplitCausalLM]:
        """Return the unsplit and the split model; ``config`` are values set on the configuration of both."""
        whole = AutoModelForCausalLM.from_pretrained(self.folder, attn_implementation=attn_implementation)
        split = SplitCausalLM(
            *load_split_model(
                model_name_or_path=self.folder,
                split_points=(1, 3),
                # At the alignment that the unsplit model's weights have: products with one row depend on it.
                strategy="mapped",
                attn_implementation=attn_implementation,
                progress=False,
            )
        )
        for name, value in config.items():
            setattr(whole.config, name, value)
            setattr(split.config, name, value)
        return whole, split


@pytest.fixture(scope="module", params=TYPES)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    """A checkpoint of four layers."""
    values = {"num_hidden_layers": 4, **SPECIAL.get(request.param, {})}
    folder = tmp_path_factory.mktemp(request.param)
    return World(request.param, write_checkpoint(folder, tiny_model(request.param, **values)))


def cache_argument(model: Any) -> str:
    """Return what this transformers calls the cache that forward takes."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def assert_same(whole: Any, split: Any, where: str = "output") -> None:
    """Compare two outputs of any nesting: the same keys and lengths, and bit-equal tensors."""
    if isinstance(whole, torch.Tensor):
        assert isinstance(split, torch.Tensor), f"{where} is a {type(split).__name__}"
        assert torch.equal(whole, split), f"{where} differs by {(whole - split).abs().max()}"
    elif isinstance(whole, ModelOutput):
        assert list(whole.keys()) == list(split.keys()), where
        for name in whole:
            assert_same(whole[name], split[name], f"{where}.{name}")
    elif isinstance(whole, tuple | list):
        assert len(whole) == len(split), f"{where} has {len(split)} items, not {len(whole)}"
        for number, (one, other) in enumerate(zip(whole, split, strict=True)):
            assert_same(one, other, f"{where}[{number}]")
    elif whole is None or isinstance(whole, int | float | str):
        assert whole == split, where
    else:  # a cache
        assert type(whole) is type(split), where
        assert whole.get_seq_length() == split.get_seq_length(), where


def assert_same_generation(world: World, attn_implementation: str = "eager", **arguments: Any) -> None:
    """Generate with both, with all that generation records, and compare."""
    whole, split = world.load(attn_implementation)
    everything = {
        "max_new_tokens": NEW_TOKENS,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
        **arguments,
    }
    if "assistant_model" in arguments:
        makers = arguments["assistant_model"]
        expected = whole.generate(**{**everything, "assistant_model": makers[0]})
        assert_same(expected, split.generate(**{**everything, "assistant_model": makers[1]}))
        return
    torch.manual_seed(0)
    expected = whole.generate(**everything)
    torch.manual_seed(0)
    assert_same(expected, split.generate(**everything))


# --- what forward returns


@pytest.mark.parametrize("recorded", ["output_hidden_states", "output_attentions"])
@pytest.mark.parametrize("how", ["argument", "configuration"])
def test_states_and_attentions_of_all_layers(world: World, recorded: str, how: str) -> None:
    """Hidden states and attentions are those of the unsplit model, whether a call or the configuration wants them."""
    whole, split = world.load(**({recorded: True} if how == "configuration" else {}))
    arguments = {recorded: True} if how == "argument" else {}
    expected = whole(IDS, attention_mask=LEFT_PADDED, labels=IDS, **arguments)
    output = split(IDS, attention_mask=LEFT_PADDED, labels=IDS, **arguments)
    assert len(output[recorded.removeprefix("output_")]) in (4, 5)
    assert_same(expected, output)


def test_config_json_asks_for_recordings(world: World, tmp_path: Path) -> None:
    """What config.json says of recordings holds for a split model that is loaded from it."""
    model = AutoModelForCausalLM.from_pretrained(world.folder, attn_implementation="eager")
    model.config.output_hidden_states = True
    recording = World(world.model_type, write_checkpoint(tmp_path, model))
    whole, split = recording.load()
    assert whole(IDS).hidden_states is not None
    assert_same(whole(IDS), split(IDS))


@newest
@pytest.mark.parametrize("selection", [[0, 2], [-1], 1])
def test_chosen_hidden_states(world: World, selection: list[int] | int) -> None:
    """Where transformers takes numbers of layers, the same states are recorded."""
    whole, split = world.load()
    expected = whole(IDS, output_hidden_states=selection)
    assert_same(expected, split(IDS, output_hidden_states=selection))


def test_no_recordings_without_a_request(world: World) -> None:
    """Nothing is recorded without a request."""
    whole, split = world.load()
    assert split(IDS).hidden_states is None
    assert split(IDS).attentions is None
    assert_same(whole(IDS), split(IDS))


@pytest.mark.parametrize("arguments", [{}, {"labels": IDS}, {"use_cache": False}, {"output_hidden_states": True}])
def test_tuples(world: World, arguments: dict[str, Any]) -> None:
    """``return_dict=False`` gives the unsplit model's tuple: the same items in the same order."""
    whole, split = world.load()
    expected = whole(IDS, return_dict=False, **arguments)
    output = split(IDS, return_dict=False, **arguments)
    assert isinstance(output, tuple)
    assert_same(expected, output)
    assert_same(split(IDS, return_dict=True, **arguments).to_tuple(), output)


def test_gradients_of_hidden_states(world: World) -> None:
    """Recorded states and attentions are part of the graph: their gradients can be retained, and are the same."""
    gradients = []
    for model in world.load():
        output = model(IDS, output_hidden_states=True, output_attentions=True)
        recorded = [*output.hidden_states, *output.attentions]
        for tensor in recorded:
            tensor.retain_grad()
        output.logits.flatten()[0].backward()
        gradients.append([tensor.grad for tensor in recorded])
    assert all(gradient is not None for gradient in gradients[1][:-1])
    assert_same(*gradients)


# --- what forward takes


def test_forward_names_the_same_arguments(world: World) -> None:
    """Each argument of the unsplit class's forward is one of the split model's, the main input first."""
    whole, split = world.load()
    names = list(inspect.signature(split.forward).parameters)
    missing = set(inspect.signature(whole.forward).parameters) - set(names)
    assert not missing
    assert names[0] == split.main_input_name == whole.main_input_name


def _arguments(model_type: str) -> dict[str, dict[str, Any]]:
    torch.manual_seed(1)
    given: dict[str, dict[str, Any]] = {
        "position_ids": {"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2]]).expand(2, -1)},
        "logits_to_keep": {"logits_to_keep": 2},
        "logits_to_keep as a tensor": {"logits_to_keep": torch.tensor([1, 4])},
        "is_causal": {"is_causal": False},
        "num_items_in_batch": {"labels": IDS, "num_items_in_batch": torch.tensor(3)},
        "shift_labels": {"labels": IDS, "shift_labels": IDS.flip(1)},
        "ignored labels": {"labels": IDS.masked_fill(LEFT_PADDED == 0, -100), "attention_mask": LEFT_PADDED},
    }
    if model_type == "gpt2":
        given["token_type_ids"] = {"token_type_ids": torch.tensor([[0, 0, 1, 1, 2, 2, 3]]).expand(2, -1)}
        given["encoder_hidden_states None"] = {"encoder_hidden_states": None, "encoder_attention_mask": None}
    return given


def test_each_argument_reaches_its_layers(world: World) -> None:
    """Each argument has the effect that it has on the unsplit model, in every layer."""
    whole, split = world.load()
    for name, arguments in _arguments(world.model_type).items():
        assert_same(whole(IDS, **arguments), split(IDS, **arguments), name)
    embeds = whole.get_input_embeddings()(IDS)
    assert_same(whole(inputs_embeds=embeds), split(inputs_embeds=split.get_input_embeddings()(IDS)), "inputs_embeds")


def test_unknown_arguments_are_refused(world: World) -> None:
    """An argument that nothing takes is refused by its name, where the unsplit model would drop it silently."""
    with pytest.raises((TypeError, ValueError), match="no_such_argument"):
        world.load()[1](IDS, no_such_argument=1)


@pytest.mark.parametrize("kind", ["boolean", "additive"])
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_four_dimensional_masks(world: World, kind: str, attn_implementation: str) -> None:
    """A mask ``[batch, heads, queries, keys]`` is taken as it is, in every component."""
    if world.model_type == "gemma2" and attn_implementation == "sdpa":
        pytest.skip("gemma2 has no sdpa")
    whole, split = world.load(attn_implementation)
    allowed = torch.ones(7, 7).tril().bool()
    allowed[4, 1] = allowed[6, 3] = False
    mask = allowed[None, None].expand(2, 1, -1, -1)
    if kind == "additive" or attn_implementation == "eager":
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    expected = whole(IDS, attention_mask=mask)
    assert not torch.equal(expected.logits, whole(IDS).logits)
    assert_same(expected, split(IDS, attention_mask=mask))


def test_masks_by_layer_type(world: World) -> None:
    """A mapping of masks by kind of layer is handed to every component."""
    if world.model_type not in ("gemma2", "gemma3_text", "qwen2"):
        pytest.skip("its layers are of one kind, and its forward takes no mapping")
    whole, split = world.load()
    full = torch.full((7, 7), torch.finfo(torch.float32).min).triu(1)[None, None]
    narrow = full.masked_fill(torch.ones(7, 7).tril(-2).bool(), torch.finfo(torch.float32).min)
    masks = {"full_attention": full, "sliding_attention": narrow}
    assert_same(whole(IDS, attention_mask=masks), split(IDS, attention_mask=masks))


def test_static_caches(world: World) -> None:
    """A static cache of the whole model is filled by all components, through prefill and single tokens."""
    whole, split = world.load()
    caches = [StaticCache(config=model.config, max_cache_len=16) for model in (whole, split)]
    argument = cache_argument(whole)
    for ids in (IDS, IDS[:, :1], IDS[:, 1:2]):
        outputs = [model(ids, **{argument: cache}) for model, cache in zip((whole, split), caches, strict=True)]
        assert_same(outputs[0].logits, outputs[1].logits)
    for one, other in zip(caches[0].layers, caches[1].layers, strict=True):
        assert torch.equal(one.keys, other.keys)
        assert torch.equal(one.values, other.values)


# --- generation


GENERATION: dict[str, dict[str, Any]] = {
    "greedy": {},
    "recordings": {"output_hidden_states": True, "output_attentions": True},
    "recordings without a cache": {"output_hidden_states": True, "output_attentions": True, "use_cache": False},
    "sampling": {"do_sample": True, "num_return_sequences": 2},
    "beams": {"num_beams": 3, "num_return_sequences": 2, "output_hidden_states": True, "output_attentions": True},
    "beam sampling": {"num_beams": 2, "do_sample": True},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "all logits": {"logits_to_keep": 0},
    "prefill in chunks": {"prefill_chunk_size": 3},
}


@pytest.mark.parametrize("name", GENERATION)
def test_generation(world: World, name: str) -> None:
    """Text, scores, logits and recordings are the unsplit model's."""
    assert_same_generation(world, input_ids=IDS, attention_mask=LEFT_PADDED, **GENERATION[name])


def test_generation_from_embeddings(world: World) -> None:
    """Generation begins with embeddings, with a growing and with a static cache."""
    whole, _ = world.load()
    embeds = whole.get_input_embeddings()(IDS).detach()
    for more in ({}, {"num_beams": 2}, {"cache_implementation": "static", "disable_compile": True}):
        assert_same_generation(world, inputs_embeds=embeds, attention_mask=LEFT_PADDED, **more)


@newest
def test_generation_with_an_assistant(world: World) -> None:
    """A split model is the assistant or is assisted, with all that generation records."""
    assistants = world.load()
    ids = IDS[:1]
    recordings = {"output_hidden_states": True, "output_attentions": True}
    assert_same_generation(world, input_ids=ids, assistant_model=assistants, **recordings)
    assert_same_generation(world, input_ids=ids, prompt_lookup_num_tokens=2, **recordings)


def test_generation_with_token_types(world: World) -> None:
    """GPT-2's inputs besides token ids grow with the text."""
    if world.model_type != "gpt2":
        pytest.skip("takes no token_type_ids")
    types = torch.tensor([[0, 0, 1, 1, 2, 2, 3]]).expand(2, -1)
    assert_same_generation(world, input_ids=IDS, attention_mask=LEFT_PADDED, token_type_ids=types)


def test_generation_with_positions(world: World) -> None:
    """Positions that are given, and those that generation derives of the mask, give the same text."""
    positions = (LEFT_PADDED.cumsum(1) - 1).masked_fill(LEFT_PADDED == 0, 0)
    assert_same_generation(world, input_ids=IDS, attention_mask=LEFT_PADDED, position_ids=positions)


def test_left_padding(world: World) -> None:
    """Left padding changes the last logits no more than it does those of the unsplit model."""
    whole, split = world.load()
    padded = torch.cat((torch.zeros(2, 9, dtype=torch.long), IDS), dim=1)
    mask = torch.cat((torch.zeros(2, 9, dtype=torch.long), torch.ones_like(IDS)), dim=1)
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    expected = whole(padded, attention_mask=mask, position_ids=positions)
    assert_same(expected, split(padded, attention_mask=mask, position_ids=positions))
    torch.testing.assert_close(split(IDS).logits[:, -1], expected.logits[:, -1], rtol=1e-4, atol=1e-4)


def test_going_on_from_a_cache(world: World) -> None:
    """A cache that a generation returned continues it."""
    texts = []
    for model in world.load():
        begun = model.generate(IDS, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
        cache = {cache_argument(model): begun.past_key_values}
        texts.append(model.generate(begun.sequences, max_new_tokens=3, do_sample=False, **cache))
    assert_same(*texts)


@newest
@pytest.mark.sample(2)
def test_continuous_batching(world: World) -> None:
    """``generate_batch`` gives each request the tokens that it has from the unsplit model."""
    batching = getattr(transformers, "ContinuousBatchingConfig", None)
    if batching is None:
        pytest.skip("this transformers has no continuous batching whose memory can be bounded")
    prompts = [[5, 17, 42], [99, 3, 8, 64, 20], [7]]
    produced = []
    for model in world.load("sdpa" if world.model_type != "gemma2" else "eager"):
        model.generation_config.max_new_tokens = NEW_TOKENS
        model.generation_config.eos_token_id = -1
        results = model.generate_batch(
            prompts,
            generation_config=model.generation_config,
            continuous_batching_config=batching(num_blocks=8, max_batch_tokens=32),
            progress_bar=False,
        )
        assert [result.error for result in results.values()] == [None] * 3
        produced.append(sorted((result.prompt_ids, result.generated_tokens) for result in results.values()))
    assert [len(tokens) for _, tokens in produced[0]] == [NEW_TOKENS] * 3
    assert produced[0] == produced[1]


# --- compiling, exporting, checkpointing


# Tracing takes long, and is the same for most types.
@pytest.mark.sample(2)
def test_compiles_as_one_graph(world: World) -> None:
    """Forward is traced without a break."""
    whole, split = world.load("sdpa" if world.model_type != "gemma2" else "eager")
    torch.compiler.reset()
    compiled = torch.compile(split, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert_same(whole(IDS, use_cache=False), compiled(IDS, use_cache=False))


@newest
@pytest.mark.sample(1)
def test_compiled_decoding(world: World) -> None:
    """Generation with a static cache compiles the split model's forward, and gives the same text."""
    from transformers import CompileConfig

    texts = []
    for model in world.load("sdpa" if world.model_type != "gemma2" else "eager"):
        torch.compiler.reset()
        configuration = CompileConfig(backend="eager", mode=None, fullgraph=True)
        configuration._compile_all_devices = True
        texts.append(
            model.generate(
                IDS,
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                cache_implementation="static",
                compile_config=configuration,
            )
        )
        assert hasattr(model, "_compiled_call")
    assert_same(*texts)


def test_exports(world: World) -> None:
    """``torch.export`` traces a split model, and the program has the unsplit model's logits."""
    whole, split = world.load("sdpa" if world.model_type != "gemma2" else "eager")
    arguments = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "use_cache": False}
    with torch.no_grad():
        program = torch.export.export(split, (), arguments, strict=False)
        torch.testing.assert_close(program.module()(**arguments).logits, whole(**arguments).logits)


def test_gradient_checkpointing(world: World) -> None:
    """Checkpointing is supported, is turned on everywhere, and changes no gradient."""
    gradients = []
    for model in world.load():
        # By the name that this transformers gives it.
        kind = "activation" if hasattr(model, "is_activation_checkpointing") else "gradient"
        assert model.supports_gradient_checkpointing
        assert not getattr(model, f"is_{kind}_checkpointing")
        model.train()
        getattr(model, f"{kind}_checkpointing_enable")()
        assert getattr(model, f"is_{kind}_checkpointing")
        model.enable_input_require_grads()
        torch.manual_seed(0)
        model(IDS, labels=IDS, use_cache=False).loss.backward()
        gradients.append(model.get_input_embeddings().weight.grad)
        getattr(model, f"{kind}_checkpointing_disable")()
        assert not getattr(model, f"is_{kind}_checkpointing")
        flags = [
            module.gradient_checkpointing for module in model.modules() if hasattr(module, "gradient_checkpointing")
        ]
        assert flags
        assert not any(flags)
    assert_same(*gradients)


def test_config_json_asks_for_checkpointing(world: World, tmp_path: Path) -> None:
    """``gradient_checkpointing`` in config.json turns it on in every layer, as in the unsplit model."""
    checkpointing = World(world.model_type, shutil.copytree(world.folder, tmp_path / "copy"))
    file = checkpointing.folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "gradient_checkpointing": True}))
    flags = [
        [module.gradient_checkpointing for module in model.modules() if hasattr(module, "gradient_checkpointing")]
        for model in checkpointing.load()
    ]
    assert all(flags[0])
    assert flags[0] == flags[1]


# --- embeddings


@pytest.mark.parametrize("size", [111, 90])
@pytest.mark.parametrize("tied", [True, False])
def test_resizing_the_vocabulary(world: World, size: int, tied: bool, tmp_path: Path) -> None:
    """Both ends get the new size, the rows that the unsplit model gets, and stay tied where they were."""
    model = tiny_model(
        world.model_type, num_hidden_layers=4, tie_word_embeddings=tied, **SPECIAL.get(world.model_type, {})
    )
    resized = World(world.model_type, write_checkpoint(tmp_path, model))
    whole, split = resized.load()
    ids = IDS.clamp(max=size - 1)
    for each in (whole, split):
        torch.manual_seed(0)
        embeddings = each.resize_token_embeddings(size)
        assert embeddings is each.get_input_embeddings()
        assert each.config.vocab_size == size
    assert type(split.get_input_embeddings()) is type(whole.get_input_embeddings())
    assert all(component.config.vocab_size == size for component in split.components)
    assert (split.get_output_embeddings().weight is split.get_input_embeddings().weight) is tied
    assert_same(whole(ids, labels=ids), split(ids, labels=ids))


def test_resizing_to_multiples(world: World) -> None:
    """``pad_to_multiple_of`` is honoured, and refused where it is no integer."""
    whole, split = world.load()
    for each in (whole, split):
        torch.manual_seed(0)
        assert each.resize_token_embeddings(105, pad_to_multiple_of=64).weight.shape[0] == 128
        with pytest.raises(ValueError, match="which is not and integer"):
            each.resize_token_embeddings(105, pad_to_multiple_of=1.3)
    assert_same(whole(IDS), split(IDS))


def test_other_input_embeddings(world: World) -> None:
    """``set_input_embeddings`` replaces the bottom's embeddings."""
    torch.manual_seed(0)
    for model in world.load():
        other = nn.Embedding(101, 32)
        model.set_input_embeddings(other)
        assert model.get_input_embeddings() is other


def test_other_output_embeddings(world: World) -> None:
    """``set_output_embeddings`` replaces the top's head."""
    torch.manual_seed(0)
    head = nn.Linear(32, 101, bias=False)
    whole, split = world.load()
    for model in (whole, split):
        model.set_output_embeddings(head)
        assert model.get_output_embeddings() is head
    assert_same(whole(IDS), split(IDS))


# --- what the model says of itself


def test_says_what_its_class_says(world: World) -> None:
    """Flags that libraries decide by are the unsplit model's."""
    whole, split = world.load()
    flags = (
        "main_input_name",
        "base_model_prefix",
        "input_modalities",
        "loss_type",
        "supports_gradient_checkpointing",
        "_supports_sdpa",
        "_supports_flash_attn",
        "_supports_flex_attn",
        "_supports_attention_backend",
        "_can_compile_fullgraph",
        "_no_split_modules",
        "_skip_keys_device_placement",
        "_is_stateful",
        "_keep_in_fp32_modules",
        "_keep_in_fp32_modules_strict",
    )
    for flag in flags:
        assert getattr(split, flag, None) == getattr(whole, flag, None), flag
    assert split.can_generate()
    assert isinstance(split, GenerationMixin)
    assert split._can_set_experts_implementation() == whole._can_set_experts_implementation()
    assert split._can_set_attn_implementation() == whole._can_set_attn_implementation()


def test_backbone(world: World) -> None:
    """``base_model``, the attribute of its name and ``get_decoder`` give the backbone's hidden states."""
    whole, split = world.load()
    assert split.base_model is not split
    assert_same(whole.base_model(IDS, output_hidden_states=True), split.base_model(IDS, output_hidden_states=True))
    named = getattr(split, split.base_model_prefix)
    assert_same(whole.get_decoder()(IDS).last_hidden_state, named(IDS).last_hidden_state)
    assert_same(whole.get_decoder()(IDS).last_hidden_state, split.get_decoder()(IDS).last_hidden_state)


@pytest.mark.parametrize("call", ["tie_weights", "post_init", "init_weights"])
def test_weights_are_left_alone(world: World, call: str) -> None:
    """What transformers does to a new model changes nothing of a loaded one, nor of each component."""
    whole, split = world.load()
    for model in (split, *split.components):
        getattr(model, call)()
    assert_same(whole(IDS), split(IDS))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_is_chosen_later(world: World, implementation: str) -> None:
    """``set_attn_implementation`` reaches every component, and unknown ones are refused as by the unsplit model."""
    if world.model_type == "gemma2":
        pytest.skip("gemma2 has no sdpa")
    whole, split = world.load("sdpa" if implementation == "eager" else "eager")
    for model in (whole, split):
        model.set_attn_implementation(implementation)
        with pytest.raises(ValueError, match="no_such_attention"):
            model.set_attn_implementation("no_such_attention")
    assert {component.config._attn_implementation for component in split.components} == {implementation}
    assert split.config._attn_implementation == implementation
    assert_same(whole(IDS), split(IDS))


def test_deep_copies(world: World) -> None:
    """A deep copy is a model of its own, whose ends are tied as the original's."""
    whole, split = world.load()
    other = copy.deepcopy(split)
    with torch.no_grad():
        for parameter in split.parameters():
            parameter.zero_()
    assert_same(whole(IDS), other(IDS))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casts(world: World, dtype: torch.dtype) -> None:
    """``to(dtype)`` casts all components, and leaves as they are the buffers that the unsplit model leaves."""
    whole, split = world.load()
    assert_same(whole.to(dtype)(IDS), split.to(dtype)(IDS))
    assert split.dtype == dtype
