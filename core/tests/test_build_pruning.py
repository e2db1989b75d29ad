"""Modules without memory for parameters, and filling them."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import nn

from splitlearn_core import BrokenPluginError, InternalError, ModelFamily
from splitlearn_core.build.assemble import assign_tensor, finish, tensor_problems, tie_if_equal
from splitlearn_core.build.construction import build_component, component_class
from splitlearn_core.build.pruning import PassLayer, Zero
from splitlearn_core.build.torch_state import BUILD_LOCK, skeleton
from splitlearn_core.types import Component, LayerRange, TensorInfo

pytestmark = pytest.mark.libs

FAMILY = ModelFamily(model_type="llama", architecture="LlamaForCausalLM")


def device_here() -> str:
    return str(torch.empty(2).device.type)


def test_parameters_have_no_memory() -> None:
    """Layers made inside have their shapes on the meta device."""
    with skeleton(torch.float32):
        module = nn.Sequential(nn.Linear(3, 5), nn.Embedding(7, 3))

    assert module[0].weight.device.type == "meta"
    assert module[1].weight.device.type == "meta"
    assert tuple(module[0].weight.shape) == (5, 3)


def test_everything_else_is_computed() -> None:
    """Buffers that no checkpoint holds get their values."""
    with skeleton(torch.bfloat16):
        frequencies = 1.0 / (10000 ** (torch.arange(0, 8, 2, dtype=torch.int64).float() / 8))
        scale = torch.tensor(2.5)
        count = torch.tensor(3)

    assert torch.equal(frequencies, 1.0 / (10000 ** (torch.tensor([0.0, 2.0, 4.0, 6.0]) / 8)))
    assert (scale.dtype, float(scale)) == (torch.bfloat16, 2.5)
    assert count.dtype == torch.int64


@pytest.mark.parametrize("factory", [torch.empty, torch.ones, torch.zeros], ids=["empty", "ones", "zeros"])
def test_factories_follow_the_dtype(factory: Any) -> None:
    """As under ``from_pretrained``, where the default dtype is the weights'; a named dtype wins."""
    with skeleton(torch.float16):
        assert factory(2).dtype == torch.float16
        assert factory(2, dtype=torch.int32).dtype == torch.int32


def test_a_named_device_wins() -> None:
    """A module that asks for the CPU gets it."""
    with skeleton(torch.float32):
        assert torch.empty(2, device="cpu").device.type == "cpu"


def test_the_mode_ends_with_the_block() -> None:
    """After the block, and after an error in it, the process is as before."""
    with skeleton(torch.float16):
        assert device_here() == "meta"
    assert device_here() == "cpu"

    with pytest.raises(RuntimeError, match="in between"), skeleton(torch.float16):
        raise RuntimeError("in between")

    assert device_here() == "cpu"
    assert torch.ones(1).dtype == torch.float32
    assert BUILD_LOCK.acquire(blocking=False)
    BUILD_LOCK.release()


def test_other_threads_are_not_affected() -> None:
    """A tensor made by another thread meanwhile is an ordinary one."""
    seen: list[str] = []

    with skeleton(torch.float16):
        thread = threading.Thread(
            target=lambda: seen.append(f"{device_here()} {torch.ones(1).dtype} {torch.get_default_dtype()}")
        )
        thread.start()
        thread.join(30)

    assert seen == ["cpu torch.float32 torch.float32"]


def test_the_default_dtype_is_reported_to_be_that_of_the_weights() -> None:
    """As under ``from_pretrained``; and afterwards the function is torch's own again."""
    own = torch.get_default_dtype
    with skeleton(torch.float16):
        assert torch.get_default_dtype() == torch.float16

    assert torch.get_default_dtype is own
    assert torch.get_default_dtype() == torch.float32


def test_two_threads_build_one_after_the_other() -> None:
    """Building is serialised: the second waits for the first."""
    inside, done, order = threading.Event(), threading.Event(), []

    def second() -> None:
        inside.wait(30)
        with skeleton(torch.float32):
            order.append("second")
        done.set()

    thread = threading.Thread(target=second)
    thread.start()
    with skeleton(torch.float32):
        inside.set()
        order.append("first")
    assert done.wait(30)
    thread.join(30)

    assert order == ["first", "second"]


@pytest.fixture
def config(whole: Any) -> Any:
    whole.config.dtype = torch.float32
    return whole.config


@pytest.mark.parametrize(
    ("component", "owned"),
    [
        (Component.BOTTOM, LayerRange(0, 2, 6)),
        (Component.TRUNK, LayerRange(2, 4, 6)),
        (Component.TOP, LayerRange(4, 6, 6)),
    ],
)
def test_a_component_holds_its_own_modules_only(config: Any, component: Component, owned: LayerRange) -> None:
    """Layers keep their numbers, the other ends are neutral, and nothing has memory yet."""
    model = build_component(FAMILY, config, component, owned)

    numbers = [number for number, layer in enumerate(model.model.layers) if not isinstance(layer, PassLayer)]
    assert numbers == list(range(owned.start, owned.end))
    assert [model.model.layers[number].self_attn.layer_idx for number in numbers] == numbers
    assert isinstance(model.model.embed_tokens, nn.Embedding) == owned.is_first
    assert isinstance(model.lm_head, nn.Linear) == owned.is_last
    assert isinstance(model.model.norm, PassLayer) != owned.is_last
    assert (model.start_layer, model.end_layer) == (owned.start, owned.end)
    assert model.config.num_hidden_layers == 6
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    assert matrices
    assert {parameter.device.type for parameter in matrices} == {"meta"}
    assert not model.training
    assert str(owned) in repr(model)


def test_building_leaves_the_configuration_alone(config: Any) -> None:
    """Depth and dtype are what they were, although a component has fewer layers than the model."""
    before = config.to_dict()

    build_component(FAMILY, config, Component.TRUNK, LayerRange(2, 4, 6))

    assert config.to_dict() == before


def test_a_component_class_is_made_once() -> None:
    """The class of a family's component is a subclass of Hugging Face's, by its name."""
    from transformers import LlamaForCausalLM

    first, second = (component_class(FAMILY, Component.TOP) for _ in range(2))

    assert first is second
    assert issubclass(first, LlamaForCausalLM)
    assert first.__name__ == "LlamaForCausalLM"


def test_an_unfilled_module_is_refused() -> None:
    """What still has no memory is named."""
    with skeleton(torch.float32):
        module = nn.Linear(3, 5)
    assign_tensor({"": module}, "weight", torch.zeros(5, 3))

    with pytest.raises(InternalError, match="bias"):
        finish(module, "cpu")

    assign_tensor({"": module}, "bias", torch.zeros(5))
    finish(module, "cpu")


def test_assigning_keeps_the_tensor_and_makes_a_parameter() -> None:
    """No copy is made; floating tensors want gradients, whole numbers do not; buffers stay buffers."""
    module = nn.BatchNorm1d(4)
    weight, mean = torch.ones(4), torch.full((4,), 2.0)

    parameter = assign_tensor({"": module}, "weight", weight)
    assign_tensor({"": module}, "running_mean", mean)
    shared = assign_tensor({"": module}, "bias", nn.Parameter(weight))

    assert isinstance(parameter, nn.Parameter)
    assert parameter.data_ptr() == weight.data_ptr()
    assert parameter.requires_grad
    assert module.bias is shared
    assert module.running_mean is mean
    assert "running_mean" in dict(module.named_buffers())
    whole_numbers = assign_tensor({"": nn.Linear(2, 2)}, "weight", torch.ones(2, 2, dtype=torch.int8))
    assert not whole_numbers.requires_grad


def test_wrong_tensors_are_all_listed() -> None:
    """Missing, unexpected and mis-shaped ones, with their shapes; a sound list has none."""
    module = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2, bias=False))

    shapes = {"0.weight": (5, 3), "1.weight": (5, 2), "2.weight": (1,)}
    planned = {name: TensorInfo(name, "F32", shape, "", 0, 0) for name, shape in shapes.items()}

    problems = tensor_problems(module, planned)

    assert problems == [
        "missing: 0.bias [5]",
        "unexpected: 2.weight [1]",
        "mis-shaped: 1.weight is [5, 2] in the file, [2, 5] by config.json",
    ]
    sound = {"0.weight": (5, 3), "0.bias": (5,), "1.weight": (2, 5)}
    assert (
        tensor_problems(module, {name: TensorInfo(name, "F32", shape, "", 0, 0) for name, shape in sound.items()}) == []
    )


@pytest.mark.parametrize(("other", "tied"), [(0.0, True), (1.0, False)], ids=["equal", "unequal"])
def test_equal_parameters_become_one(other: float, tied: bool) -> None:
    """Only those of equal value and shape."""
    one, two = nn.Linear(2, 2), nn.Linear(2, 2)
    assign_tensor({"": two}, "weight", one.weight.detach().clone() + other)

    assert tie_if_equal(one, "weight", two, "weight") is tied
    assert (one.weight is two.weight) is tied


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_neutral_module_leaves_no_trace(dtype: torch.dtype) -> None:
    """A passed state is the same object; an added zero changes neither value nor dtype."""
    state = torch.randn(2, 3, dtype=torch.float32).to(dtype)

    assert PassLayer()(state, "anything", attention_mask=None) is state
    total = state + Zero()(torch.arange(3))
    assert total.dtype == dtype
    assert torch.equal(total, state)


def test_missing_module_names_are_errors_of_the_family(config: Any) -> None:
    """A misspelt head is the family's fault, and the modules that there are get listed."""
    family = ModelFamily(model_type="llama", architecture="LlamaForCausalLM", head="embed_out")

    with pytest.raises(BrokenPluginError, match="embed_out") as caught:
        build_component(family, config, Component.BOTTOM, LayerRange(0, 2, 6))

    assert "lm_head" in caught.value.hint
