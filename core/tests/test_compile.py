"""``torch.compile`` of components: one graph each, and what the unsplit model says when it is compiled.

Inductor, the default backend, needs a C++ compiler and half a minute; what it is handed is what
these backends are handed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from splitlearn_core import SplitCausalLM, load_split_model
from splitlearn_core.testing.worlds import tiny_model, write_checkpoint

pytestmark = pytest.mark.usefixtures("llama")

CUTS = (1, 2)
NAMES = ("bottom", "trunk", "top")
IDS = torch.tensor([[5, 17, 42, 99, 3, 8, 64], [1, 2, 3, 4, 5, 6, 7]])
MASK = torch.tensor([[1] * 7, [0] * 2 + [1] * 5])


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def whole() -> Any:
    """The unsplit model, of a layer for each component: each layer is traced again, and that takes longest."""
    return tiny_model("llama", num_hidden_layers=3)


@pytest.fixture
def parts(whole: Any, tmp_path: Path) -> Any:
    return load_split_model("llama", CUTS, write_checkpoint(tmp_path / "model", whole))


# The compiler itself looks at the hidden states' gradients.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_components_are_and_learn_as_the_whole(parts: Any, whole: Any) -> None:
    """Logits, loss and gradients, through three graphs."""
    bottom, trunk, top = (torch.compile(part, backend="aot_eager") for part in parts)
    output = top(trunk(bottom(IDS, attention_mask=MASK), attention_mask=MASK), attention_mask=MASK, labels=IDS)
    output.loss.backward()
    whole.zero_grad()
    expected = whole(input_ids=IDS, attention_mask=MASK, labels=IDS, use_cache=False)
    expected.loss.backward()

    assert torch.equal(output.logits, expected.logits)
    assert torch.equal(output.loss, expected.loss)
    gradients = {name: parameter.grad for name, parameter in whole.named_parameters()}
    for part in parts:
        for name, parameter in part.named_parameters():
            assert torch.allclose(parameter.grad, gradients[name], atol=1e-6), name
    whole.zero_grad()


def test_components_compiled_in_place_make_up_a_model(parts: Any, whole: Any) -> None:
    """It generates the unsplit model's tokens."""
    for part in parts:
        part.compile(backend="eager")

    options = {"max_new_tokens": 2, "pad_token_id": 0, "do_sample": False}
    assert torch.equal(SplitCausalLM(*parts).generate(IDS, **options), whole.generate(IDS, **options))


def test_a_split_model_is_one_graph(parts: Any, whole: Any) -> None:
    """All three components and the cuts between them: a break would raise."""
    compiled = torch.compile(SplitCausalLM(*parts), backend="eager", fullgraph=True)

    with torch.no_grad():
        assert torch.equal(compiled(IDS, use_cache=False).logits, whole(input_ids=IDS, use_cache=False).logits)
