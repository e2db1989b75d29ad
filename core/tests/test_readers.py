"""Loading strategies: where the tensors' memory is, and which strategy is taken."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file
from transformers import AutoModelForCausalLM

from splitlearn_core import (
    BrokenPluginError,
    ConfigurationError,
    LoadingStrategy,
    SplitCausalLM,
    SplitLearnError,
    load_split_model,
    plan_split,
)
from splitlearn_core.checkpoint.safetensors_header import read_header
from splitlearn_core.loading_strategy import ReadPlan
from splitlearn_core.plan.splitplan import PlannedTensor
from splitlearn_core.readers.copied import CopiedStrategy
from splitlearn_core.readers.mapped import MappedStrategy
from splitlearn_core.readers.selection import BUILT_IN, choose_strategy
from splitlearn_core.readers.views import views
from splitlearn_core.testing.worlds import tiny_model, write_checkpoint
from splitlearn_core.types import TensorInfo, dtype_names

pytestmark = pytest.mark.libs

CUTS = (2, 4)
MAPS = Path("/proc/self/maps")
needs_maps = pytest.mark.skipif(not MAPS.exists(), reason="this system does not list a process's mappings")


def mappings(path: Path) -> list[tuple[int, int]]:
    """Return the address ranges of this process behind which a file stands."""
    lines = [line.split(maxsplit=5) for line in MAPS.read_text().splitlines()]
    ranges = [line[0].split("-") for line in lines if len(line) > 5 and line[5] == str(path.resolve())]
    return [(int(low, 16), int(high, 16)) for low, high in ranges]


def inside(tensor: torch.Tensor, ranges: list[tuple[int, int]]) -> bool:
    return any(low <= tensor.data_ptr() and tensor.data_ptr() + tensor.nbytes <= high for low, high in ranges)


@needs_maps
@pytest.mark.usefixtures("llama")
@pytest.mark.parametrize("strategy", ["auto", "mapped"])
def test_mapped_parameters_are_views_of_the_file(single: Path, strategy: str) -> None:
    """Every parameter lies within the file's own pages: no memory was allocated for it."""
    trunk = load_split_model("llama", CUTS, single, parts=["trunk"], strategy=strategy).trunk

    ranges = mappings(single / "model.safetensors")
    assert ranges
    for parameter in trunk.parameters():  # type: ignore[union-attr]
        assert inside(parameter, ranges)


@needs_maps
@pytest.mark.usefixtures("llama")
def test_mapped_parameters_of_shards_are_views_of_them(sharded: Path) -> None:
    """The same for a checkpoint of several files."""
    trunk = load_split_model("llama", CUTS, sharded, parts=["trunk"]).trunk

    ranges = [pair for path in sharded.glob("*.safetensors") for pair in mappings(path)]
    assert all(inside(parameter, ranges) for parameter in trunk.parameters())  # type: ignore[union-attr]


@needs_maps
@pytest.mark.usefixtures("llama")
@pytest.mark.parametrize(
    "options",
    [{"strategy": "copied"}, {"strategy": "copied", "dtype": "float16"}, {"dtype": "float16"}],
    ids=["copied", "copied and converted", "converted"],
)
def test_copied_parameters_have_memory_of_their_own(single: Path, options: dict[str, Any]) -> None:
    """Nothing of the file stays mapped, so it may be changed or deleted."""
    trunk = load_split_model("llama", CUTS, single, parts=["trunk"], **options).trunk
    assert trunk is not None

    assert mappings(single / "model.safetensors") == []
    before = {name: tensor.clone() for name, tensor in trunk.state_dict().items()}
    (single / "model.safetensors").write_bytes(b"gone")
    for name, tensor in trunk.state_dict().items():
        assert torch.equal(tensor, before[name])


def known(dtype: torch.dtype) -> bool:
    """Say whether this version of the library writes a dtype."""
    try:
        return bool(save({"x": torch.zeros(2).to(dtype)}))
    except KeyError:
        return False


@pytest.mark.parametrize("padding", range(4))
def test_views_are_what_the_library_reads(tmp_path: Path, padding: int) -> None:
    """Of every dtype and of odd shapes, wherever in a word the data begin; none shares its storage with another."""
    written = {
        **{f"of {name}": torch.arange(6).view(2, 3).to(dtype) for dtype, name in dtype_names().items() if known(dtype)},
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 3),
    }
    path = tmp_path / "all.safetensors"
    save_file(written, path)
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = content[8:start].rstrip() + b" " * padding
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[start:])

    tensors = tuple(PlannedTensor(key, info) for key, info in read_header(path).items())
    plan = ReadPlan(tensors, {path.name: path}, "cpu", "float32")
    got = {planned.module_key: view for planned, view in views(plan)}

    expected = load_file(path)
    assert got.keys() == expected.keys() == written.keys()
    assert len(got) > 10
    for key, view in got.items():
        assert (view.dtype, view.shape) == (expected[key].dtype, expected[key].shape)
        assert torch.equal(view.flatten().view(torch.uint8), expected[key].flatten().view(torch.uint8))
        assert view.untyped_storage().nbytes() == view.nbytes


@needs_maps
@pytest.mark.usefixtures("llama")
def test_the_mapping_ends_with_the_component(single: Path) -> None:
    """A component that is no longer referenced unmaps its file."""
    import gc

    parts = load_split_model("llama", CUTS, single)
    assert mappings(single / "model.safetensors")

    del parts
    gc.collect()

    assert mappings(single / "model.safetensors") == []


@needs_maps
@pytest.mark.usefixtures("llama")
def test_a_mapped_file_may_be_deleted(single: Path, whole: Any) -> None:
    """The pages live as long as the component does."""
    trunk = load_split_model("llama", CUTS, single, parts=["trunk"]).trunk

    (single / "model.safetensors").unlink()

    for name, tensor in trunk.state_dict().items():  # type: ignore[union-attr]
        assert torch.equal(tensor, whole.state_dict()[name])


def read_plan(device: str = "cpu", dtype: str = "float32", stored: str = "F32") -> ReadPlan:
    info = TensorInfo("w", stored, (4, 2), "x.safetensors", 0, 32)
    return ReadPlan((PlannedTensor("w", info),), {}, device, dtype)


class Named(CopiedStrategy):
    """A strategy under another name, which may refuse."""

    def __init__(self, name: str, refusal: str = "") -> None:
        self.name = name
        self._refusal = refusal

    def refusal(self, plan: ReadPlan) -> str:
        return self._refusal


@pytest.mark.parametrize(
    ("asked", "plan", "preferred", "chosen"),
    [
        ("auto", read_plan(), "", "mapped"),
        ("auto", read_plan(device="cuda"), "", "copied"),
        ("auto", read_plan(dtype="float16"), "", "copied"),
        ("auto", read_plan(stored="I32", dtype="float16"), "", "mapped"),
        ("auto", read_plan(), "fast", "fast"),
        ("auto", read_plan(), "slow", "mapped"),
        ("auto", read_plan(), "absent", "mapped"),
        ("auto", read_plan(), "copied", "copied"),
        ("copied", read_plan(), "fast", "copied"),
        ("fast", read_plan(), "", "fast"),
    ],
)
def test_the_cheapest_willing_strategy_is_taken(asked: str, plan: ReadPlan, preferred: str, chosen: str) -> None:
    """What the caller asks, else what the family prefers and can do, else the cheapest."""
    added = [Named("fast"), Named("slow", "too slow")]

    assert choose_strategy(asked, [plan], added, preferred).name == chosen


def test_a_strategy_that_is_not_there_lists_those_that_are() -> None:
    """Added ones too."""
    with pytest.raises(ConfigurationError, match="nonsense") as caught:
        choose_strategy("nonsense", [read_plan()], [Named("fast")])

    assert "auto, mapped, copied, incremental, whole, fast" in caught.value.hint


def test_a_requested_strategy_that_refuses_says_why() -> None:
    """It is not replaced behind the caller's back."""
    with pytest.raises(ConfigurationError, match="too slow") as caught:
        choose_strategy("slow", [read_plan()], [Named("slow", "too slow")])

    assert caught.value.hint
    with pytest.raises(ConfigurationError, match="cuda"):
        choose_strategy("mapped", [read_plan(device="cuda")])


def test_one_refused_part_is_enough() -> None:
    """All components of a load are read in one way."""
    assert choose_strategy("auto", [read_plan(), read_plan(device="cuda")]).name == "copied"


def test_the_built_in_strategies_keep_the_protocol() -> None:
    """They are the members that a plugin has to implement."""
    assert [strategy.name for strategy in BUILT_IN] == ["mapped", "copied", "incremental", "whole"]
    assert all(isinstance(strategy, LoadingStrategy) for strategy in BUILT_IN)


@pytest.mark.parametrize(
    ("plan", "mapped", "copied"),
    [
        (read_plan(), 0, 32),
        (read_plan(dtype="float16"), 16, 16),
        (read_plan(dtype="float64"), 64, 64),
        (read_plan(stored="I32"), 0, 32),
        (read_plan(stored="I32", dtype="float16"), 0, 32),
    ],
    ids=["as stored", "halves", "doubles", "integers", "integers among halves"],
)
def test_the_memory_of_a_read_is_predicted(plan: ReadPlan, mapped: int, copied: int) -> None:
    """Views take none; copies and conversions take their size in the new dtype, and a buffer for the time being."""
    assert MappedStrategy().anonymous_bytes(plan) == mapped
    strategy = CopiedStrategy()
    assert strategy.anonymous_bytes(plan) - strategy.passing_bytes(plan) == copied
    assert strategy.passing_bytes(plan) == (64 if plan.needs_conversion(plan.tensors[0]) else 0)


STRATEGY = """
from splitlearn_core.readers.copied import CopiedStrategy


class Mine(CopiedStrategy):
    name = "mine"
    seen = []

    def read(self, plan):
{body}


@hookimpl
def splitlearn_loading_strategies():
    return [Mine()]
"""


def plugin(world: Any, body: str, preferred: str = "") -> None:
    source = world.source("llama").replace('architecture="', f'preferred_strategy="{preferred}", architecture="')
    world.install("llama", source + STRATEGY.format(body=body))


@pytest.mark.parametrize(("preferred", "strategy"), [("mine", "auto"), ("", "mine")], ids=["preferred", "asked"])
def test_a_plugins_strategy_reads_what_is_planned(
    world: Any, single: Path, whole: Any, preferred: str, strategy: str
) -> None:
    """It gets the planned tensors, each once, and none of other components."""
    body = "        self.seen += [t.module_key for t in plan.tensors]\n        yield from super().read(plan)"
    plugin(world, body, preferred)

    trunk = load_split_model("llama", CUTS, single, parts=["trunk"], strategy=strategy).trunk

    import splitlearn_llama  # type: ignore[import-not-found]

    assert sorted(splitlearn_llama.Mine.seen) == sorted(trunk.state_dict())  # type: ignore[union-attr]
    for name, tensor in trunk.state_dict().items():  # type: ignore[union-attr]
        assert torch.equal(tensor, whole.state_dict()[name])


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ("        raise OSError('disk on fire')\n        yield", "disk on fire"),
        ("        return\n        yield", "model.layers.2"),
        ("        yield from list(super().read(plan))[:-1]", "model.layers"),
        ("        yield from (x for x in super().read(plan) if 'norm' not in x[0].module_key)", "norm"),
        ("        yield from ((t, v[:1]) for t, v in super().read(plan))", "model.layers"),
        ("        yield from ((t, None) for t, v in super().read(plan))", "model.layers"),
        ("        yield from ((t, v.half()) for t, v in super().read(plan))", "float16"),
        ("        return None", "mine"),
        ("        yield 1", "mine"),
    ],
    ids=[
        "raises",
        "reads nothing",
        "leaves one out",
        "leaves norms out",
        "wrong shape",
        "None",
        "wrong dtype",
        "no iterator",
        "numbers",
    ],
)
def test_a_plugins_strategy_that_breaks_its_promise_is_named(world: Any, single: Path, body: str, named: str) -> None:
    """A read that raises, or gives other tensors than planned, is the plugin's fault and says so."""
    plugin(world, body)

    with pytest.raises(SplitLearnError) as caught:
        load_split_model("llama", CUTS, single, parts=["trunk"], strategy="mine")

    assert isinstance(caught.value, BrokenPluginError)
    assert re.search(re.escape(named), str(caught.value))


@pytest.mark.usefixtures("llama")
def test_a_plan_says_what_memory_each_strategy_takes(single: Path, sharded: Path) -> None:
    """Those that can read the files; the whole model only where all of it was looked at."""
    for folder in (single, sharded):
        plan = plan_split(folder, CUTS)
        memory = {name: (needs.peak, needs.kept, needs.mapped) for name, needs in plan.memory.items()}
        size = plan.nbytes
        assert memory == {
            "mapped": (0, 0, size),
            "copied": (size, size, 0),
            "incremental": (size, size, 0),
            "whole": (2 * size, size, 0),
        }
        assert plan.to_dict()["memory"]["whole"] == {"peak": 2 * size, "kept": size, "mapped": 0}

    half = plan_split(single, CUTS, parts=["trunk"], dtype="float16").memory
    assert {name: needs.kept for name, needs in half.items()} == dict.fromkeys(
        ("mapped", "copied", "incremental"), plan_split(single, CUTS, parts=["trunk"]).nbytes // 2
    )
    assert half["copied"].peak > half["copied"].kept


def test_every_strategy_is_listed_with_what_it_reads(cli: Any) -> None:
    """Core's own, in words and as data."""
    code, out, _ = cli("plugins", "--strategies")
    assert code == 0
    for strategy in BUILT_IN:
        assert f"{strategy.name} " in out
        assert strategy.reads in out  # type: ignore[attr-defined]

    code, out, _ = cli("plugins", "list", "--strategies", "--json")
    assert code == 0
    rows = {row["name"]: row for row in json.loads(out)}
    assert rows["mapped"]["reads"] == MappedStrategy.reads
    assert rows["mapped"]["status"] == "ready"


def test_listing_strategies_imports_nothing_heavy(world: Any) -> None:
    """Neither torch nor a plugin."""
    world.install("llama", world.marking("llama") + world.source("llama"))
    done = world.python(
        "-c",
        "import sys\nfrom splitlearn_core.cli.main import cli\n"
        "cli.main(['plugins', '--strategies'], standalone_mode=False)\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'safetensors'} & set(sys.modules)), file=sys.stderr)",
    )
    assert done.stderr.strip() == "[]"
    assert "mapped" in done.stdout
    assert not world.marker("llama").exists()


@pytest.mark.usefixtures("llama")
@pytest.mark.parametrize("strategy", ["mapped", "copied", "incremental", "whole"])
def test_one_token_alone_is_equal(strategy: str, tmp_path: Path) -> None:
    """Products of one row depend on where in a cache line a matrix begins: where it does with ``from_pretrained``."""
    for hidden_size in (40, 48, 64):
        folder = write_checkpoint(tmp_path / str(hidden_size), tiny_model("llama", hidden_size=hidden_size, head_dim=8))
        whole = AutoModelForCausalLM.from_pretrained(folder).eval()
        split = SplitCausalLM(*load_split_model("llama", (2, 4), folder, strategy=strategy))
        for token in range(8):
            with torch.no_grad():
                ids = torch.tensor([[token]])
                assert torch.equal(split(ids).logits, whole(ids).logits), (hidden_size, token)
