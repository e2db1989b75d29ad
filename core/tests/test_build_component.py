"""Components and the pipeline: what they refuse, because it would go wrong silently."""

from __future__ import annotations

import copy
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig, LlamaForCausalLM

from splitlearn_core import ConfigurationError, ModelFamily, SplitCausalLM, load_split_model, save_split
from splitlearn_core.build.configuration import architecture_class
from splitlearn_core.build.forward_arguments import mask_for_layers
from splitlearn_core.build.kv_cache import CACHE_FIELD, cache_argument
from splitlearn_core.types import LayerRange

CUTS = (2, 4)
NAMES = ("bottom", "trunk", "top")
IDS = torch.tensor([[5, 17, 42, 99, 3]])

pytestmark = [pytest.mark.libs, pytest.mark.usefixtures("llama")]


@pytest.fixture
def parts(single: Path) -> Any:
    return load_split_model("llama", CUTS, single)


def call(parts: Any, name: str, **options: Any) -> Any:
    first = IDS if name == "bottom" else torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return getattr(parts, name)(first, **options)


def refusal(parts: Any, name: str, **options: Any) -> ConfigurationError:
    with pytest.raises(ConfigurationError) as caught:
        call(parts, name, **options)
    assert isinstance(caught.value, ValueError)
    assert caught.value.hint
    return caught.value


@pytest.mark.parametrize("name", NAMES)
def test_a_plain_cache_is_refused(parts: Any, name: str) -> None:
    """A cache of all layers gives wrong masks and positions in a part; the hint names new_cache."""
    for cache in (DynamicCache(), DynamicCache(config=getattr(parts, name).config), [], "cache"):
        assert f"{name}.new_cache()" in refusal(parts, name, past_key_values=cache).hint


@pytest.mark.parametrize("name", NAMES)
def test_another_components_cache_is_refused(parts: Any, name: str) -> None:
    """The message names both ranges of layers."""
    for other in set(NAMES) - {name}:
        message = refusal(parts, name, past_key_values=getattr(parts, other).new_cache()).message

        assert str(getattr(parts, other).layer_range) in message
        assert str(getattr(parts, name).layer_range) in message


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(5,), (1, 1, 5), (1, 1, 1, 5, 5)], ids=str)
def test_a_mask_of_other_dimensions_is_refused(parts: Any, name: str, shape: tuple[int, ...]) -> None:
    """A padding mask has two dimensions, a whole mask four."""
    assert f"{len(shape)} dimensions" in refusal(parts, name, attention_mask=torch.ones(shape)).message


@pytest.mark.parametrize("name", NAMES)
def test_a_mask_of_another_batch_is_refused(parts: Any, name: str) -> None:
    """torch would speak of sizes of its own tensors; one row is that of each sequence."""
    error = refusal(parts, name, attention_mask=torch.ones(3, 5))
    assert "that of 3 sequences, and the batch has 1" in error.message
    call(parts, name, attention_mask=torch.ones(1, 5))


def test_an_index_error_of_something_else_comes_through(parts: Any) -> None:
    """Only tokens and positions that there are not are explained."""

    def fail(*_: Any) -> None:
        raise IndexError("of a hook")

    handle = parts.bottom.layer_modules[0].register_forward_pre_hook(fail)
    with pytest.raises(IndexError, match="of a hook"):
        call(parts, "bottom")
    handle.remove()


@pytest.mark.parametrize("name", NAMES)
def test_a_component_does_not_generate(parts: Any, name: str) -> None:
    """The hint names what does."""
    with pytest.raises(ConfigurationError, match=f"{name} alone cannot generate") as caught:
        getattr(parts, name).generate(IDS, max_new_tokens=2)

    assert "SplitCausalLM" in caught.value.hint


@pytest.mark.parametrize("name", NAMES)
def test_a_part_decodes_with_its_own_cache(parts: Any, name: str) -> None:
    """Token by token gives what the whole sequence gives, and the cache holds only the part's layers."""
    component = getattr(parts, name)
    cache = component.new_cache()
    assert len(cache.layers) == 2
    whole_input = IDS if name == "bottom" else torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))

    def states(output: Any) -> torch.Tensor:
        return output.logits if name == "top" else output

    with torch.inference_mode():
        expected = states(component(whole_input))
        steps = [states(component(whole_input[:, [i]], past_key_values=cache)) for i in range(5)]

    assert torch.allclose(torch.cat(steps, 1), expected, atol=1e-5)
    assert cache.get_seq_length() == 5


def test_outputs_have_the_promised_shapes(parts: Any) -> None:
    """Hidden states from bottom and trunk, logits from the top, as many as are wanted."""
    assert call(parts, "bottom").shape == (1, 5, 32)
    assert call(parts, "trunk").shape == (1, 5, 32)
    assert call(parts, "top").logits.shape == (1, 5, 101)
    assert call(parts, "top", logits_to_keep=2).logits.shape == (1, 2, 101)
    assert call(parts, "top").loss is None
    assert call(parts, "top", labels=IDS).loss > 0


def test_the_loss_is_the_whole_models(parts: Any, whole: Any) -> None:
    """Labels are shifted inside, as in the unsplit model."""
    with torch.inference_mode():
        expected = whole(input_ids=IDS, labels=IDS, use_cache=False).loss
        got = parts.top(parts.trunk(parts.bottom(IDS)), labels=IDS).loss

    assert torch.equal(got, expected)


def wrong(*components: Any) -> str:
    with pytest.raises(ConfigurationError) as caught:
        SplitCausalLM(*components)
    assert caught.value.hint
    return caught.value.message


def test_components_in_the_wrong_order_make_no_model(parts: Any) -> None:
    """Each place takes its own kind."""
    assert "bottom is a trunk" in wrong(parts.trunk, parts.bottom, parts.top)
    assert "top is a bottom" in wrong(parts.bottom, parts.trunk, parts.bottom)


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (None, "trunk is None: it was not loaded"),
        (torch.nn.Linear(2, 2), "trunk is a Linear"),
        ("trunk", "trunk is a str"),
    ],
    ids=["None", "a module", "a text"],
)
def test_what_is_no_component_makes_no_model(parts: Any, other: Any, named: str) -> None:
    """A component that was not requested is None, and the message says so."""
    assert named in wrong(parts.bottom, other, parts.top)


@pytest.mark.parametrize("cuts", [(1, 4), (2, 5), (3, 5)], ids=str)
def test_components_of_other_cuts_make_no_model(parts: Any, single: Path, cuts: tuple[int, int]) -> None:
    """A gap or an overlap of layers is shown."""
    other = load_split_model("llama", cuts, single)

    assert "do not follow one another" in wrong(parts.bottom, other.trunk, parts.top)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_hidden_layers": 5}, "depth"),
        ({"hidden_size": 64}, "hidden_size"),
        ({"vocab_size": 77}, "vocab_size"),
    ],
    ids=["depth", "width", "vocabulary"],
)
def test_components_of_other_models_make_no_model(
    parts: Any, tmp_path: Path, changes: dict[str, int], named: str
) -> None:
    """The difference is named."""
    from splitlearn_core.testing.worlds import tiny_model, write_checkpoint

    folder = write_checkpoint(tmp_path / "other", tiny_model("llama", **changes))
    other = load_split_model("llama", CUTS, folder)

    assert named in wrong(parts.bottom, parts.trunk, other.top)


def test_what_is_no_cache_is_refused(parts: Any) -> None:
    """The message names its type."""
    with pytest.raises(ConfigurationError, match="a str as a cache") as caught:
        SplitCausalLM(*parts)(IDS, past_key_values="cache")

    assert caught.value.hint


@pytest.mark.parametrize("with_config", [True, False], ids=["with a config", "without"])
def test_a_dynamic_cache_is_shared_by_the_three(parts: Any, whole: Any, with_config: bool) -> None:
    """The pipeline takes a whole model's cache, and fills all layers of it."""
    split = SplitCausalLM(*parts)
    cache = DynamicCache(config=split.config) if with_config else DynamicCache()

    with torch.inference_mode():
        first = split(IDS[:, :3], past_key_values=cache)
        second = split(IDS[:, 3:], past_key_values=cache)
        past = {cache_argument(whole.forward): whole(IDS[:, :3], use_cache=True)[CACHE_FIELD]}
        expected = whole(IDS[:, 3:], **past)

    assert first[CACHE_FIELD] is cache
    assert len(cache.layers) == 6
    assert cache.get_seq_length() == 5
    assert torch.equal(second.logits, expected.logits)


def test_a_tuple_on_demand(parts: Any) -> None:
    """``return_dict=False`` gives a plain tuple."""
    with torch.inference_mode():
        output = SplitCausalLM(*parts)(IDS, return_dict=False, use_cache=False)

    assert isinstance(output, tuple)
    assert output[0].shape == (1, 5, 101)


def test_components_of_other_dtypes_are_refused(parts: Any) -> None:
    """By their parameters: the configuration does not follow .to(dtype)."""
    parts.trunk.to(torch.bfloat16)

    with pytest.raises(ConfigurationError, match="dtype differs"):
        SplitCausalLM(*parts)


@pytest.mark.parametrize("name", NAMES)
def test_a_component_is_not_saved_as_a_whole_model(parts: Any, name: str, tmp_path: Path) -> None:
    """transformers would load it, and make up the other layers."""
    with pytest.raises(ConfigurationError, match="not saved") as caught:
        getattr(parts, name).save_pretrained(tmp_path / "saved")

    assert "save_split" in caught.value.hint
    assert not (tmp_path / "saved").exists()


def test_the_vocabulary_of_a_component_alone_is_not_resized(parts: Any) -> None:
    """Refused before anything changes."""
    for part in parts:
        with pytest.raises(ConfigurationError, match="resized"):
            part.resize_token_embeddings(200)

    assert SplitCausalLM(*parts)(input_ids=IDS).logits.shape == (1, 5, 101)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("wrong", ["foo", "atention_mask", "labels", "inputs_embeds"])
def test_unknown_arguments_are_refused(parts: Any, name: str, wrong: str) -> None:
    """As Python refuses them; the Hugging Face class would ignore them silently."""
    if (name, wrong) in {("top", "labels"), ("bottom", "inputs_embeds")}:
        return
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{wrong}'"):
        call(parts, name, **{wrong: None})


def test_what_transformers_passes_on_is_taken(parts: Any) -> None:
    """By tokenizers, the trainer and generate, whether the family makes use of it or not."""
    for name in NAMES:
        call(parts, name, cache_position=torch.arange(5), token_type_ids=None, output_attentions=False)
    assert call(parts, "top", labels=IDS, num_items_in_batch=4).loss > 0


def test_token_ids_are_no_hidden_states(parts: Any) -> None:
    """Nor the other way round."""
    for part in (parts.trunk, parts.top):
        with pytest.raises(ConfigurationError, match="takes no token ids"):
            part(IDS)
    with pytest.raises(ConfigurationError, match="takes no hidden_states"):
        parts.bottom(hidden_states=torch.ones(1, 5, 32))
    with pytest.raises(ConfigurationError, match="input_ids are"):
        parts.bottom(torch.ones(1, 5, 32))


@pytest.mark.parametrize("name", ["trunk", "top"])
@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (torch.zeros(1, 5, 31), "takes [batch, sequence, 32]"),
        (torch.zeros(5, 32), "[5, 32]"),
        (torch.zeros(1, 5, 32, dtype=torch.bfloat16), "torch.bfloat16"),
        ("text", "str"),
    ],
    ids=["width", "rank", "dtype", "type"],
)
def test_wrong_hidden_states_are_refused(parts: Any, name: str, wrong: Any, named: str) -> None:
    """The message says what was given, and what the component takes."""
    with pytest.raises(ConfigurationError, match=re.escape(named)) as caught:
        getattr(parts, name)(hidden_states=wrong)

    assert caught.value.hint


def test_autocast_converts_hidden_states(parts: Any) -> None:
    """Under it, other dtypes are no mistake."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert call(parts, "trunk").shape == (1, 5, 32)


@pytest.mark.parametrize("token", [101, -1])
def test_tokens_beyond_the_vocabulary_are_refused(parts: Any, token: int) -> None:
    """The token and the size of the vocabulary are named, for a component and for the whole."""
    ids = torch.tensor([[5, token]])

    for model in (parts.bottom, SplitCausalLM(*parts)):
        with pytest.raises(ConfigurationError, match=f"vocabulary of 101, such as {token}"):
            model(ids)


def test_tokens_of_another_rank_are_refused(parts: Any) -> None:
    """One row of them is no batch."""
    for model in (parts.bottom, SplitCausalLM(*parts)):
        with pytest.raises(ConfigurationError, match=r"\[5\]; a bottom takes token ids"):
            model(IDS[0])


def test_text_is_no_input_of_generate(parts: Any) -> None:
    """The hint shows how a tokenizer is used."""
    model = SplitCausalLM(*parts)

    for given in ("My fellow", ["My fellow"], {"input_ids": IDS}):
        with pytest.raises(ConfigurationError, match=type(given).__name__) as caught:
            model.generate(given)
        assert "tokenizer" in caught.value.hint


def test_drafting_with_its_own_layers_is_refused(parts: Any) -> None:
    """By an argument or by settings; other ways of drafting are named."""
    model = SplitCausalLM(*parts)

    with pytest.raises(ConfigurationError, match="assistant_early_exit"):
        model.generate(IDS, assistant_early_exit=2)
    with pytest.raises(ConfigurationError, match="assistant_early_exit"):
        model.generate(IDS, generation_config=GenerationConfig(assistant_early_exit=2))


@pytest.mark.parametrize("name", NAMES)
def test_a_component_records_its_own_layers(parts: Any, whole: Any, name: str) -> None:
    """On request, with what enters the first of them; by itself it returns one tensor, whatever config.json says."""
    part = getattr(parts, name)
    first, last = part.start_layer, part.end_layer
    states = whole(IDS, output_hidden_states=True).hidden_states
    given = IDS if name == "bottom" else states[first]
    part.config.output_hidden_states = name != "top"

    with torch.inference_mode():
        plain = part(given)
        output = part(given, output_hidden_states=True)

    assert isinstance(plain, torch.Tensor) or name == "top"
    assert len(output.hidden_states) == last - first + 1
    assert all(map(torch.equal, output.hidden_states, states[first : last + 1]))


def test_masks_by_type_of_layer_are_cut_to_the_layers(parts: Any) -> None:
    """A component asks for the types that it has, and for no others."""
    full, sliding = torch.zeros(1, 1, 5, 5), torch.ones(1, 1, 5, 5)
    types = ["sliding_attention", "sliding_attention", "full_attention"]

    cut = mask_for_layers({"full_attention": full, "sliding_attention": sliding}, types, LayerRange(0, 2, 3))

    assert cut["sliding_attention"] is sliding
    assert cut["full_attention"] is None
    assert mask_for_layers({"full_attention": full}, types, LayerRange(2, 3, 3))["full_attention"] is full
    assert mask_for_layers({"full_attention": full}, None, LayerRange(0, 2, 3)) is full
    for mask, named in (({"full_attention": full}, "none of sliding_attention"), ({}, "nothing")):
        with pytest.raises(ConfigurationError, match=named):
            mask_for_layers(mask, types, LayerRange(0, 2, 3))


def test_token_types_mean_nothing_to_layers(parts: Any) -> None:
    """Embeddings use them up: what a tokenizer gives may be handed to all components alike."""
    for name in ("trunk", "top"):
        plain, typed = call(parts, name), call(parts, name, token_type_ids=torch.ones_like(IDS))
        assert torch.equal(getattr(plain, "logits", plain), getattr(typed, "logits", typed))


def test_modules_are_shared_with_the_components(parts: Any) -> None:
    """What takes the place of a module in the model takes it in the component, and the other way round."""
    model = SplitCausalLM(*parts)
    for path in ("model.embed_tokens", "model.layers.3", "model.norm", "lm_head"):
        part = next(part for part in parts if type(part.get_submodule(path)) is type(model.get_submodule(path)))
        holder, _, leaf = path.rpartition(".")
        for changed, seen in ((model, part), (part, model)):
            other = copy.deepcopy(model.get_submodule(path))
            setattr(changed.get_submodule(holder), leaf, other)
            assert seen.get_submodule(path) is other


def test_the_backbone_ignores_what_is_for_the_head(parts: Any, whole: Any) -> None:
    """Trainers hand the same arguments to it and to the model."""
    with torch.no_grad():
        got, expected = (model.model(IDS, num_items_in_batch=3) for model in (SplitCausalLM(*parts), whole))

    assert torch.equal(got.last_hidden_state, expected.last_hidden_state)


def test_layers_are_not_replaced_as_a_whole(parts: Any) -> None:
    """A shorter list would be visible to callers, but not what runs."""
    model = SplitCausalLM(*parts)
    layers = model.model.layers

    for change in (
        lambda: setattr(model.model, "layers", layers[:2]),
        lambda: delattr(model.model, "norm"),
        lambda: layers.__delitem__(0),
    ):
        with pytest.raises(ConfigurationError, match="component") as caught:
            change()
        assert caught.value.hint
    assert len(model.model.layers) == 6


def test_a_component_is_exchanged(parts: Any, single: Path) -> None:
    """Another trunk of the same cuts is run, and seen in the tree; one that does not fit changes nothing."""
    model = SplitCausalLM(*parts)
    other = load_split_model("llama", CUTS, single, parts=("trunk",)).trunk
    narrow = load_split_model("llama", (2, 3), single, parts=("trunk",)).trunk

    with pytest.raises(ConfigurationError, match="layers"):
        model.trunk = narrow
    model.trunk = other

    assert model.trunk is other
    assert model.model.layers[2] is other.model.layers[2]


def test_a_checkpoint_of_the_whole_model_is_saved(parts: Any, whole: Any, tmp_path: Path) -> None:
    """As transformers saves the unsplit model: the same tensors by the same names."""
    SplitCausalLM(*parts).save_pretrained(tmp_path / "saved")

    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert type(again) is type(whole)
    assert all(map(torch.equal, again.state_dict().values(), whole.state_dict().values()))


def test_from_pretrained(parts: Any, whole: Any, single: Path, tmp_path: Path) -> None:
    """Saved components as they are, a checkpoint where split points are given."""
    model = SplitCausalLM(*parts)
    save_split(model, tmp_path / "parts")
    expected = whole(IDS).logits

    for loaded in (
        SplitCausalLM.from_pretrained(tmp_path / "parts"),
        SplitCausalLM.from_pretrained(single, split_points=CUTS),
    ):
        assert torch.equal(loaded(IDS).logits, expected)
    with pytest.raises(ConfigurationError, match="no cuts are given") as caught:
        SplitCausalLM.from_pretrained(single)
    assert "split_points=(a, b)" in caught.value.hint
    with pytest.raises(ConfigurationError, match="cut already"):
        SplitCausalLM.from_pretrained(tmp_path / "parts", split_points=CUTS)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("option", ["use_cache", "return_dict"])
def test_options_of_the_whole_model_are_refused(parts: Any, name: str, option: str) -> None:
    """A component returns one tensor or logits, and its cache is its argument."""
    assert option in refusal(parts, name, **{option: True}).message


#: transformers makes a stream for it, which a torch that was built for CUDA cannot without a device.
offloaded = pytest.param(
    "offloaded",
    marks=pytest.mark.skipif(
        torch.version.cuda is not None and not torch.cuda.is_available(),
        reason="this torch is built for CUDA, and there is no CUDA device: an offloaded cache was NOT tested",
    ),
)


@pytest.mark.parametrize("kind", [offloaded])
def test_caches_that_cannot_be_cut_are_refused(parts: Any, kind: str) -> None:
    """The message says what is wrong with the cache, not only its type."""
    model = SplitCausalLM(*parts)

    with pytest.raises(ConfigurationError, match=kind):
        model.generate(IDS, cache_implementation=kind, max_new_tokens=2, pad_token_id=0)


def test_gradient_checkpointing_reaches_the_components(single: Path, parts: Any) -> None:
    """Gradients are those of the unsplit model with checkpointing."""
    whole = AutoModelForCausalLM.from_pretrained(single)
    split = SplitCausalLM(*parts)
    # The name since transformers 5.23, and the one before.
    enable = next(n for n in ("activation_checkpointing_enable", "gradient_checkpointing_enable") if hasattr(whole, n))
    for model in (whole, split):
        model.train()
        getattr(model, enable)()
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()

    expected = {name: parameter.grad for name, parameter in whole.named_parameters()}
    for part in split.components:
        assert any(getattr(module, "gradient_checkpointing", False) for module in part.modules())
    for name, parameter in split.trunk.named_parameters():
        assert torch.equal(parameter.grad, expected[name]), name


def test_results_are_named_whatever_the_checkpoint_prefers(single: Path) -> None:
    """``return_dict: false`` in config.json does not turn a component's insides into tuples."""
    path = single / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "return_dict": False}))

    model = SplitCausalLM(*load_split_model("llama", CUTS, single))  # type: ignore[arg-type]

    assert model(input_ids=IDS).logits.shape == (1, 5, 101)


def test_the_cache_goes_by_both_names(parts: Any) -> None:
    """``past_key_values``, and ``cache`` as transformers calls it from 5.24 on; not both at once."""
    split = SplitCausalLM(*parts)

    with torch.inference_mode():
        old = split(IDS, past_key_values=DynamicCache(config=split.config)).logits
        new = split(IDS, cache=DynamicCache(config=split.config)).logits
        part = parts.bottom(IDS, cache=parts.bottom.new_cache())

    assert torch.equal(old, new)
    assert torch.equal(part, parts.bottom(IDS))
    with pytest.raises(ConfigurationError, match="two names"):
        split(IDS, past_key_values=DynamicCache(), cache=DynamicCache())


def test_a_class_that_is_there_costs_no_list_of_all_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of transformers that takes a fifth of a second, and each load asks several times."""

    class Endless(ModuleType):
        Llama = LlamaForCausalLM

        def __dir__(self) -> list[str]:
            pytest.fail("all names are listed")

    monkeypatch.setitem(sys.modules, "endless", Endless("endless"))

    assert architecture_class(ModelFamily(model_type="llama", architecture="endless:Llama")) is LlamaForCausalLM


@pytest.mark.parametrize("name", ["trunk", "top"])
def test_missing_hidden_states_are_named(parts: Any, name: str) -> None:
    """The message says what was given, and what the component takes; also for the last layers without the head."""
    for given, named in (({"input_ids": IDS}, "input_ids"), ({}, "nothing")):
        for run in [getattr(parts, name), *([parts.top.without_head] if name == "top" else [])]:
            with pytest.raises(ConfigurationError, match=f"{name} was given {named} but no hidden_states") as caught:
                run(**given)
            assert "[batch, sequence, 32]" in caught.value.message
            assert "go to the bottom" in caught.value.hint


def test_a_bottom_takes_one_input(parts: Any) -> None:
    """Token ids or embeddings: neither and both are refused."""
    for given, named in (({}, "neither"), ({"input_ids": IDS, "inputs_embeds": torch.ones(1, 5, 32)}, "both")):
        with pytest.raises(ConfigurationError, match=f"given {named}") as caught:
            parts.bottom(**given)
        assert "input_ids" in caught.value.hint


def test_unknown_arguments_come_with_those_that_there_are(parts: Any) -> None:
    """A slip is found in the list."""
    with pytest.raises(TypeError, match="'foo'") as caught:
        parts.trunk(torch.ones(1, 5, 32), foo=1)
    assert "takes hidden_states, attention_mask, position_ids, past_key_values" in str(caught.value)


@pytest.mark.parametrize("as_type", [tuple, list, lambda parts: parts], ids=["tuple", "list", "SplitModel"])
def test_components_in_one_argument_are_refused(parts: Any, as_type: Any) -> None:
    """The star that was forgotten is in the hint."""
    with pytest.raises(ConfigurationError, match="of 3") as caught:
        SplitCausalLM(as_type(parts))
    assert "SplitCausalLM(*parts)" in caught.value.hint


def test_missing_and_misplaced_components_are_named(parts: Any) -> None:
    """One alone lacks the other end; where all are there, the hint is their order."""
    assert "top is None: it was not loaded, or not given" in wrong(parts.bottom)
    assert "bottom is None: it was not loaded, or not given" in wrong()
    with pytest.raises(ConfigurationError, match="bottom is a trunk") as caught:
        SplitCausalLM(parts.trunk, parts.bottom, parts.top)
    assert "in this order: bottom, trunk, top" in caught.value.hint
