"""The manager's loader: plans, loads and warm-ups of all three kinds, and what each is refused for."""

from __future__ import annotations

import errno
import gc
import importlib
import logging
import os
import threading
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from splitlearn_core import (
    CheckpointError,
    ConfigurationError,
    InsufficientDiskError,
    InsufficientMemoryError,
    InvalidCheckpointError,
    MissingFileError,
    Progress,
    SplitLearnError,
    TensorMismatchError,
    UnknownModelTypeError,
    load_split_model,
    plan_split,
)
from splitlearn_core.build.torch_state import BUILD_LOCK
from splitlearn_core.errors import LoadCancelledError, translate
from splitlearn_core.manager.config import ModelConfig
from splitlearn_core.manager.loaders.loadable import LoadedModel, system_error
from splitlearn_core.manager.loaders.loader import ModelLoader
from splitlearn_core.readers import copied, views

pytestmark = pytest.mark.libs

CUTS = (2, 4)
SINGLE = "model.safetensors"
needs_maps = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="this system does not list mappings")

ARCHITECTURES = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.second = nn.Linear(8, 3)
        self.register_buffer("scale", torch.arange(3, dtype=torch.float32), persistent=False)

    def forward(self, x):
        return self.second(self.norm(self.first(x))) * self.scale


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 4)
        self.head = nn.Linear(4, 11, bias=False)
        self.head.weight = self.embedding.weight


class Holes(nn.Linear):
    def __init__(self):
        super().__init__(2, 2)
        self.register_buffer("hole", torch.empty(3), persistent=False)


class Needy(nn.Module):
    def __init__(self, size):
        super().__init__()


def no_module():
    return 3


number = 3
"""


def component(folder: Path, name: str = "trunk", **options: Any) -> ModelConfig:
    fields = {"model_id": "m", "model_type": "llama", "component": name, "split_points": CUTS, **options}
    return ModelConfig(model_path=str(folder), **fields)


def whole_model(folder: Path, **options: Any) -> ModelConfig:
    return ModelConfig(model_id="m", model_type="huggingface", model_path=str(folder), **options)


def torch_file(path: Path, architecture: str | None = "nets:Net", **options: Any) -> ModelConfig:
    return ModelConfig(model_id="m", model_type="pytorch", model_path=str(path), architecture=architecture, **options)


def load(config: ModelConfig, report: Callable[[Progress], None] = lambda _: None) -> LoadedModel:
    loader = ModelLoader()
    return loader.load(config, loader.plan(config, report), report)


def same_weights(module: nn.Module, expected: dict[str, torch.Tensor], dtype: torch.dtype | None = None) -> bool:
    """Compare what a module holds with some of a whole model's tensors."""
    state = module.state_dict()
    return bool(state) and all(
        torch.equal(tensor, expected[name].to(dtype or expected[name].dtype)) for name, tensor in state.items()
    )


@pytest.fixture
def nets(world: Any) -> Any:
    """Return a module with architectures, of the user's own."""
    (world.folder / "nets.py").write_text(ARCHITECTURES)
    importlib.invalidate_caches()
    return importlib.import_module("nets")


@pytest.fixture
def net(nets: Any) -> nn.Module:
    """Return a module with trained weights and statistics."""
    torch.manual_seed(0)
    module: nn.Module = nets.Net()
    module(torch.randn(5, 6))
    return module.eval()


class TestComponents:
    @pytest.mark.parametrize("kind", ["single", "sharded", "tied"])
    @pytest.mark.parametrize("name", ["bottom", "trunk", "top"])
    def test_a_component_is_that_of_load_split_model(
        self, llama: Any, checkpoint: Callable[[str], Path], name: str, kind: str
    ) -> None:
        """Bit-equal, in the dtype, on the device and from the folder that it says."""
        folder = checkpoint(kind)
        loaded = load(component(folder, name))

        expected = getattr(load_split_model("llama", CUTS, folder, parts=[name]), name)
        assert same_weights(loaded.module, expected.state_dict())
        assert (loaded.location, loaded.dtype, loaded.device) == (str(folder), "float32", "cpu")
        assert not loaded.module.training

    @pytest.mark.parametrize(
        ("options", "host", "mapped"),
        [
            ({}, 0, 1),
            ({"dtype": "float16"}, 0.5, 0),
            ({"dtype": "float64"}, 2, 0),
            ({"strategy": "copied"}, 1, 0),
            ({"strategy": "copied", "dtype": "bfloat16"}, 0.5, 0),
        ],
        ids=str,
    )
    def test_the_plan_says_what_it_takes(
        self, llama: Any, single: Path, options: dict[str, Any], host: float, mapped: float
    ) -> None:
        """In parts of the stored bytes: pages of the file, and memory of the process."""
        nbytes = plan_split(single, CUTS, parts=["trunk"]).nbytes

        plan = ModelLoader().plan(component(single, **options), lambda _: None)

        assert plan.keeps == {"host": host * nbytes, "mapped": mapped * nbytes}
        # What is converted goes through buffers, which are gone afterwards.
        buffers = plan.needs["host"] - plan.keeps["host"]
        assert (buffers > 0) == ("dtype" in options)
        assert plan.needs["mapped"] == plan.keeps["mapped"]
        assert plan.dtype == options.get("dtype", "float32")

    def test_a_mapping_will_do(self, llama: Any, single: Path, whole: Any) -> None:
        """The short way: one call, in this thread."""
        fields = {**component(single).to_dict(), "warmup": True}

        assert same_weights(ModelLoader.load_from_config(fields), whole.state_dict())

    def test_progress_goes_forward(self, llama: Any, sharded: Path) -> None:
        """Stage by stage, and within a stage byte by byte up to the total."""
        reports: list[Progress] = []
        ModelLoader.load_from_config(component(sharded, warmup=True), reports.append)

        stages = list(dict.fromkeys(progress.stage for progress in reports))
        assert stages == ["resolving", "planning", "importing", "building", "reading", "verifying", "warming up"]
        reading = [progress for progress in reports if progress.stage == "reading"]
        assert [p.bytes_done for p in reading] == sorted(p.bytes_done for p in reading)
        assert reading[-1].bytes_done == reading[-1].bytes_total == plan_split(sharded, CUTS, parts=["trunk"]).nbytes
        assert {p.file for p in reading} == set(plan_split(sharded, CUTS, parts=["trunk"]).shards)

    def test_errors_of_a_plan_are_those_of_a_load(self, llama: Any, single: Path, tmp_path: Path) -> None:
        """Each of its own class, before anything is held."""
        for config, kind in (
            (component(tmp_path / "nowhere"), MissingFileError),
            (component(single, split_points=(2, 6)), ConfigurationError),
            (component(single, device="cuda:77"), ConfigurationError),
            (component(single, strategy="nonsense"), ConfigurationError),
            (component(single, model_type="falcon9"), ConfigurationError),
            (
                ModelConfig(model_id="m", model_type="falcon9", component="top", split_points=CUTS),
                UnknownModelTypeError,
            ),
        ):
            with pytest.raises(kind) as caught:
                ModelLoader().plan(config, lambda _: None)
            assert caught.value.hint  # type: ignore[attr-defined]


class TestWholeModels:
    @pytest.mark.parametrize("kind", ["single", "sharded", "tied"])
    def test_it_is_the_model_that_was_saved(
        self, checkpoint: Callable[[str], Path], whole: Any, tied_whole: Any, kind: str
    ) -> None:
        """No plugin is needed; weights and logits are bit-equal."""
        expected = tied_whole if kind == "tied" else whole
        loaded = load(whole_model(checkpoint(kind)))

        assert same_weights(loaded.module, expected.state_dict())
        ids = torch.tensor([[5, 17, 3]])
        with torch.inference_mode():
            assert torch.equal(loaded.module(input_ids=ids).logits, expected(input_ids=ids).logits)
        assert (loaded.dtype, loaded.device) == ("float32", "cpu")

    @pytest.mark.parametrize(("dtype", "factor"), [("float16", 0.5), ("bfloat16", 0.5), ("float64", 2)])
    def test_converted_weights_take_memory(self, single: Path, whole: Any, dtype: str, factor: float) -> None:
        """Stored ones are pages of the file; the others are planned as the process's own."""
        nbytes = sum(tensor.nbytes for tensor in whole.state_dict().values())
        as_stored = ModelLoader().plan(whole_model(single), lambda _: None)
        plan = ModelLoader().plan(whole_model(single, dtype=dtype), lambda _: None)

        assert as_stored.needs == as_stored.keeps == {"host": 0, "mapped": nbytes}
        assert plan.needs == plan.keeps == {"host": factor * nbytes, "mapped": 0}
        loaded = load(whole_model(single, dtype=dtype))
        assert same_weights(loaded.module, whole.state_dict(), getattr(torch, dtype))

    @needs_maps
    def test_stored_weights_are_pages_of_the_file(self, single: Path) -> None:
        """As the plan says: transformers maps them and copies nothing."""
        loaded = load(whole_model(single))

        lines = Path("/proc/self/maps").read_text().splitlines()
        ranges = [line.split()[0].split("-") for line in lines if line.endswith(str(single / SINGLE))]
        for parameter in loaded.module.parameters():
            address = parameter.data_ptr()
            assert any(int(low, 16) <= address < int(high, 16) for low, high in ranges)

    def test_progress_goes_forward(self, sharded: Path) -> None:
        """The files are read in before the part that cannot be stopped."""
        reports: list[Progress] = []
        ModelLoader.load_from_config(whole_model(sharded, dtype="float16", warmup=True), reports.append)

        stages = list(dict.fromkeys(progress.stage for progress in reports))
        assert stages == [
            "resolving", "importing", "planning", "reading", "building", "verifying", "warming up",
        ]  # fmt: skip
        reading = [p for p in reports if p.stage == "reading"]
        assert [p.bytes_done for p in reading] == sorted(p.bytes_done for p in reading)
        assert reading[-1].bytes_done == reading[-1].bytes_total > 0

    def test_missing_weights_are_not_made_up(self, single: Path) -> None:
        """transformers would fill them with random numbers, and warn."""
        tensors = load_file(single / SINGLE)
        del tensors["model.layers.3.mlp.up_proj.weight"]
        save_file(tensors, single / SINGLE, {"format": "pt"})

        with pytest.raises(TensorMismatchError, match=r"layers\.3\.mlp\.up_proj") as caught:
            load(whole_model(single))
        assert caught.value.hint

    def test_misshaped_weights_are_refused(self, single: Path) -> None:
        """As an error of the checkpoint."""
        tensors = load_file(single / SINGLE)
        tensors["model.norm.weight"] = torch.ones(7)
        save_file(tensors, single / SINGLE, {"format": "pt"})

        with pytest.raises(CheckpointError, match=r"model\.norm") as caught:
            load(whole_model(single))
        assert caught.value.hint

    def test_code_of_a_checkpoint_is_not_run(self, single: Path, edit_json: Callable[..., None]) -> None:
        """A model type that only the checkpoint's own code knows."""
        (single / "evil.py").write_text("raise SystemExit('run')")
        edit_json(single / "config.json", model_type="evil", auto_map={"AutoModelForCausalLM": "evil.Evil"})

        with pytest.raises(ConfigurationError, match="not run") as caught:
            ModelLoader().plan(whole_model(single), lambda _: None)
        assert caught.value.hint

    def test_a_bin_file_is_read_as_transformers_reads_it(self, single: Path, whole: Any) -> None:
        """It holds tensors alone, and nothing in it is run."""
        (single / SINGLE).unlink()
        torch.save(whole.state_dict(), single / "pytorch_model.bin")

        loaded = load(whole_model(single)).module.state_dict()

        assert all(torch.equal(loaded[name], tensor) for name, tensor in whole.state_dict().items())

    def test_a_wrong_attention_is_the_callers(self, single: Path) -> None:
        """A ConfigurationError with what transformers says."""
        with pytest.raises(ConfigurationError, match="nonsense") as caught:
            load(whole_model(single, attn_implementation="nonsense"))
        assert caught.value.hint

    def test_a_type_without_a_causal_model_is_the_callers(self, single: Path, edit_json: Callable[..., None]) -> None:
        """Known to transformers, but no language model."""
        edit_json(single / "config.json", model_type="vit")

        with pytest.raises(SplitLearnError) as caught:
            load(whole_model(single))
        assert caught.value.hint

    def test_it_waits_for_its_turn_and_can_be_stopped_meanwhile(self, single: Path) -> None:
        """from_pretrained is not for two threads at once."""
        loader, reports = ModelLoader(), []
        config = whole_model(single)
        plan = loader.plan(config, lambda _: None)

        def stop(progress: Progress) -> None:
            reports.append(progress.stage)
            if reports.count("building") > 2:
                raise LoadCancelledError("stopped")

        held, done = threading.Event(), threading.Event()

        def hold() -> None:
            with BUILD_LOCK:
                held.set()
                done.wait(20)

        holder = threading.Thread(target=hold)
        holder.start()
        try:
            assert held.wait(20)
            with pytest.raises(LoadCancelledError):
                loader.load(config, plan, stop)
        finally:
            done.set()
            holder.join()


class TestTorchFiles:
    @pytest.mark.parametrize("wrap", [None, "state_dict", "model", "model_state_dict"])
    @pytest.mark.parametrize("legacy", [False, True])
    def test_a_state_dict_fills_the_named_class(
        self, nets: Any, net: nn.Module, tmp_path: Path, wrap: str | None, legacy: bool
    ) -> None:
        """Alone or among other things, in the new format or the old; buffers that are not saved are computed."""
        state = net.state_dict()
        saved = {wrap: state, "epoch": 3} if wrap else state
        torch.save(saved, tmp_path / "net.pt", _use_new_zipfile_serialization=not legacy)

        loaded = load(torch_file(tmp_path / "net.pt"))

        x = torch.randn(4, 6)
        assert torch.equal(loaded.module(x), net(x))
        assert not loaded.module.training
        assert (loaded.dtype, loaded.location) == ("float32", str(tmp_path / "net.pt"))

    @needs_maps
    def test_it_is_mapped_where_that_can_be(self, nets: Any, net: nn.Module, tmp_path: Path) -> None:
        """The new format is: the plan says so, and it is so."""
        torch.save(net.state_dict(), tmp_path / "net.pt")
        size = (tmp_path / "net.pt").stat().st_size
        config = torch_file(tmp_path / "net.pt")

        plan = ModelLoader().plan(config, lambda _: None)
        loaded = ModelLoader().load(config, plan, lambda _: None)

        assert plan.needs == plan.keeps == {"host": 0, "mapped": size}
        assert str(tmp_path / "net.pt") in Path("/proc/self/maps").read_text()
        del loaded

    def test_the_old_format_takes_memory(self, nets: Any, net: nn.Module, tmp_path: Path) -> None:
        """It cannot be mapped."""
        torch.save(net.state_dict(), tmp_path / "net.pt", _use_new_zipfile_serialization=False)
        size = (tmp_path / "net.pt").stat().st_size

        plan = ModelLoader().plan(torch_file(tmp_path / "net.pt"), lambda _: None)

        assert plan.needs == plan.keeps == {"host": size, "mapped": 0}

    def test_weights_are_converted(self, nets: Any, net: nn.Module, tmp_path: Path) -> None:
        """Those of the file; a count of batches stays a whole number, and a computed buffer as it was made."""
        torch.save(net.state_dict(), tmp_path / "net.pt")

        loaded = load(torch_file(tmp_path / "net.pt", dtype="float16"))

        assert same_weights(
            loaded.module,
            {k: v.half() if v.is_floating_point() else v for k, v in net.state_dict().items()},
        )
        assert loaded.module.get_buffer("norm.num_batches_tracked").dtype == torch.int64
        assert loaded.module.get_buffer("scale").dtype == torch.float32
        assert loaded.dtype == "float16"

    @pytest.mark.parametrize("dtype", ["auto", "float16"])
    def test_what_shared_memory_still_does(self, nets: Any, tmp_path: Path, dtype: str) -> None:
        """Tied weights are not doubled."""
        torch.save(nets.Tied().state_dict(), tmp_path / "tied.pt")

        module = load(torch_file(tmp_path / "tied.pt", "nets:Tied", dtype=dtype)).module

        head, embedding = module.get_parameter("head.weight"), module.get_parameter("embedding.weight")
        assert head.data_ptr() == embedding.data_ptr()

    def test_all_misfits_are_listed(self, nets: Any, net: nn.Module, tmp_path: Path) -> None:
        """Missing, unexpected and mis-shaped, at once."""
        state: dict[str, Any] = dict(net.state_dict())
        del state["first.bias"]
        state["third.weight"] = torch.ones(2)
        state["second.bias"] = torch.ones(4)
        state["norm.weight"] = 3
        torch.save(state, tmp_path / "net.pt")

        with pytest.raises(TensorMismatchError, match="4 are wrong") as caught:
            load(torch_file(tmp_path / "net.pt"))

        for named in (
            "missing: first.bias",
            "unexpected: third.weight",
            "second.bias is [4]",
            "norm.weight is no tensor",
        ):
            assert named in caught.value.message

    def test_a_pickled_module_is_refused(self, nets: Any, net: nn.Module, tmp_path: Path) -> None:
        """The error says why, and what allows it."""
        torch.save(net, tmp_path / "net.pt")

        with pytest.raises(CheckpointError, match=r"nets\.Net") as caught:
            load(torch_file(tmp_path / "net.pt"))

        assert "allow_pickle=True" in caught.value.hint

    def test_no_code_of_a_file_is_run(self, nets: Any, tmp_path: Path) -> None:
        """A pickle that would leave a trace leaves none."""

        class Trap:
            def __reduce__(self) -> Any:
                return (Path.touch, (tmp_path / "sprung",))

        torch.save({"state_dict": Trap()}, tmp_path / "trap.pt")

        with pytest.raises(CheckpointError):
            load(torch_file(tmp_path / "trap.pt"))

        assert not (tmp_path / "sprung").exists()

    @pytest.mark.parametrize("architecture", [None, "nets:Net"])
    def test_a_pickled_module_may_be_allowed(
        self, nets: Any, net: nn.Module, tmp_path: Path, caplog: pytest.LogCaptureFixture, architecture: str | None
    ) -> None:
        """With a warning, as a Python warning and in the log; converted if requested."""
        torch.save(net, tmp_path / "net.pt")

        with pytest.warns(UserWarning, match="can run any code"), caplog.at_level(logging.WARNING):
            loaded = load(torch_file(tmp_path / "net.pt", architecture, allow_pickle=True, dtype="float64"))

        x = torch.randn(4, 6, dtype=torch.float64)
        assert torch.equal(loaded.module(x), net.double()(x))
        assert "can run any code" in caplog.text
        assert loaded.dtype == "float64"

    @pytest.mark.filterwarnings("ignore:.*can run any code")
    def test_a_state_dict_needs_a_class(self, net: nn.Module, tmp_path: Path) -> None:
        """Also where a pickle would have been allowed."""
        torch.save(net.state_dict(), tmp_path / "net.pt")

        with pytest.raises(ConfigurationError, match="state dict") as caught:
            load(torch_file(tmp_path / "net.pt", None, allow_pickle=True))
        assert "architecture" in caught.value.hint

    @pytest.mark.parametrize(
        ("architecture", "named"),
        [
            ("nets:Nothing", "Nothing"),
            ("no_such_module:Net", "no_such_module"),
            ("nets:number", "not a class"),
            ("nets:Needy", "without arguments"),
            ("nets:no_module", "not a torch.nn.Module"),
            ("nets:Holes", "hole"),
        ],
    )
    def test_a_class_that_will_not_do_is_refused(
        self, nets: Any, tmp_path: Path, architecture: str, named: str
    ) -> None:
        """Named, with what would do."""
        torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "net.pt")

        with pytest.raises(SplitLearnError, match=named) as caught:
            load(torch_file(tmp_path / "net.pt", architecture))
        assert caught.value.hint

    @pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"nonsense", b"\x80\x02}q\x00."], ids=repr)
    def test_a_damaged_file_is_said_to_be(self, nets: Any, tmp_path: Path, content: bytes) -> None:
        """As an error of the checkpoint, with the path."""
        (tmp_path / "net.pt").write_bytes(content)

        with pytest.raises(CheckpointError, match=r"net\.pt") as caught:
            load(torch_file(tmp_path / "net.pt"))
        assert caught.value.hint

    @pytest.mark.parametrize("value", [[1, 2], 3, {"epoch": 3, 4: torch.ones(1)}], ids=repr)
    def test_what_is_no_state_dict_is_refused(self, nets: Any, tmp_path: Path, value: Any) -> None:
        """Before anything is filled."""
        torch.save(value, tmp_path / "net.pt")

        with pytest.raises(CheckpointError) as caught:
            load(torch_file(tmp_path / "net.pt"))
        assert caught.value.hint

    def test_the_path_is_a_file(self, nets: Any, tmp_path: Path) -> None:
        """Not a folder, nor a pipe, which would never end."""
        (tmp_path / "a.pt").touch()
        os.mkfifo(tmp_path / "pipe.pt")
        for path, kind in (
            (tmp_path, MissingFileError),
            (tmp_path / "b.pt", MissingFileError),
            (tmp_path / "pipe.pt", InvalidCheckpointError),
        ):
            with pytest.raises(kind) as caught:
                ModelLoader().plan(torch_file(path), lambda _: None)
            assert caught.value.hint

    def test_it_cannot_be_warmed_up(self, nets: Any, net: nn.Module, tmp_path: Path) -> None:
        """Said by the plan, before anything is read."""
        torch.save(net.state_dict(), tmp_path / "net.pt")

        with pytest.raises(ConfigurationError, match="warmed up") as caught:
            ModelLoader().plan(torch_file(tmp_path / "net.pt", warmup=True), lambda _: None)
        assert caught.value.hint


@pytest.fixture(params=["component", "whole", "file"])
def any_config(request: pytest.FixtureRequest, llama: Any, single: Path, nets: Any, net: nn.Module) -> ModelConfig:
    """Return a configuration of each kind, and the weight file it reads as its only one."""
    torch.save(net.state_dict(), single / "net.pt")
    return {
        "component": component(single, strategy="copied"),
        "whole": whole_model(single, dtype="float16"),
        "file": torch_file(single / "net.pt", dtype="float16"),
    }[request.param]


def weight_file(config: ModelConfig) -> Path:
    path = Path(str(config.model_path))
    return path if path.is_file() else path / SINGLE


class TestEveryKind:
    @pytest.mark.parametrize("change", ["replaced", "cut", "emptied", "written to"])
    def test_a_file_that_changes_after_the_plan_is_refused(self, any_config: ModelConfig, change: str) -> None:
        """A clear error with the path; a mapped file that is cut would end the process."""
        path = weight_file(any_config)
        loader = ModelLoader()
        plan = loader.plan(any_config, lambda _: None)
        content = path.read_bytes()
        if change == "replaced":
            (path.parent / "new").write_bytes(content)
            (path.parent / "new").replace(path)
        elif change == "written to":
            path.write_bytes(content)
            os.utime(path, ns=(1, 1))
        else:
            os.truncate(path, 0 if change == "emptied" else len(content) // 2)

        with pytest.raises(InvalidCheckpointError, match="was changed") as caught:
            loader.load(any_config, plan, lambda _: None)

        assert str(path) in caught.value.message
        assert caught.value.hint

    def test_a_file_that_goes_after_the_plan_is_missing(self, any_config: ModelConfig) -> None:
        """The same for one that is gone."""
        loader = ModelLoader()
        plan = loader.plan(any_config, lambda _: None)
        weight_file(any_config).unlink()

        with pytest.raises(MissingFileError) as caught:
            loader.load(any_config, plan, lambda _: None)
        assert caught.value.hint

    def test_a_file_that_is_replaced_meanwhile_is_noticed(self, any_config: ModelConfig) -> None:
        """At the end at the latest: a model must not mix two versions of a file."""
        path = weight_file(any_config)

        def meddle(progress: Progress) -> None:
            if progress.stage == "building":
                (path.parent / "new").write_bytes(path.read_bytes())
                (path.parent / "new").replace(path)

        with pytest.raises(InvalidCheckpointError, match="was changed"):
            load(any_config, meddle)

    def test_the_configurations_own_limit(self, any_config: ModelConfig) -> None:
        """Held against the plan, with both numbers."""
        needed = sum(ModelLoader().plan(any_config, lambda _: None).needs.values())
        fields = {**any_config.to_dict(), "max_memory_mb": needed / 2**20}
        ModelLoader().plan(ModelConfig.from_dict(fields), lambda _: None)

        with pytest.raises(InsufficientMemoryError, match="max_memory_mb") as caught:
            ModelLoader().plan(ModelConfig.from_dict({**fields, "max_memory_mb": needed / 2**21}), lambda _: None)

        assert isinstance(caught.value, RuntimeError)
        assert caught.value.hint

    def test_it_can_be_stopped_wherever_it_reports(
        self, any_config: ModelConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Each report once: the error comes out as it is, no lock, thread or state is left, and a new load works."""
        small_chunks(monkeypatch, 1024)
        reports: list[Progress] = []
        expected = load(any_config, reports.append).module.state_dict()
        threads = set(threading.enumerate())
        before = (
            torch.get_default_dtype(),
            torch.is_grad_enabled(),
            sorted(weight_file(any_config).parent.iterdir()),
        )

        for number in range(len(reports)):
            seen: list[Progress] = []

            def stop(progress: Progress, number: int = number, seen: list[Progress] = seen) -> None:
                seen.append(progress)
                if len(seen) > number:
                    raise LoadCancelledError(f"stopped at {number}")

            with pytest.raises(LoadCancelledError, match=f"stopped at {number}$"):
                load(any_config, stop)
            # Taken by another thread: this one would get it again even if it had kept it.
            assert lock_is_free()

        after = (
            torch.get_default_dtype(),
            torch.is_grad_enabled(),
            sorted(weight_file(any_config).parent.iterdir()),
        )
        assert after == before
        # Those of transformers and of reading ahead end by themselves, but not at once.
        for thread in set(threading.enumerate()) - threads:
            thread.join(10)
            assert not thread.is_alive(), thread
        assert same_weights(load(any_config).module, expected)

    @pytest.mark.parametrize("stage", ["building", "reading", "verifying"])
    def test_a_stopped_load_keeps_nothing(
        self, any_config: ModelConfig, monkeypatch: pytest.MonkeyPatch, stage: str
    ) -> None:
        """Its modules go with the error that ended it; no collection of garbage is needed."""
        small_chunks(monkeypatch, 1024)
        made: list[weakref.ref[nn.Module]] = []
        begin = nn.Module.__init__

        def note(self: nn.Module, *args: Any, **options: Any) -> None:
            made.append(weakref.ref(self))
            begin(self, *args, **options)

        def stop(progress: Progress) -> None:
            if progress.stage == stage:
                raise LoadCancelledError("stop")

        monkeypatch.setattr(nn.Module, "__init__", note)
        gc.collect()
        gc.disable()
        try:
            with pytest.raises(LoadCancelledError) as caught:
                load(any_config, stop)
            del caught
            assert [type(module()) for module in made if module() is not None] == []
        finally:
            gc.enable()


def small_chunks(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Let tiny tensors be read in several chunks."""
    monkeypatch.setattr(views, "CHUNK_BYTES", size)
    monkeypatch.setattr(copied, "CHUNK_BYTES", size)
    monkeypatch.setattr(copied, "STAGED_BYTES", size)


def lock_is_free() -> bool:
    got: list[bool] = []

    def take() -> None:
        got.append(BUILD_LOCK.acquire(blocking=False))
        if got[0]:
            BUILD_LOCK.release()

    thread = threading.Thread(target=take)
    thread.start()
    thread.join()
    return got[0]


class TestChunks:
    @pytest.mark.parametrize(
        "options",
        [
            {"strategy": "copied"},
            {"strategy": "copied", "dtype": "float16"},
            {"dtype": "bfloat16"},
            {"dtype": "float64"},
        ],
        ids=str,
    )
    @pytest.mark.parametrize("size", [64, 100, 4096])
    def test_large_tensors_are_reported_chunk_by_chunk(
        self, llama: Any, sharded: Path, whole: Any, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], size: int
    ) -> None:
        """The tensors are bit-equal, and the bytes go forward up to the total."""
        small_chunks(monkeypatch, size)
        reports: list[Progress] = []

        loaded = load(component(sharded, "bottom", **options), reports.append)

        dtype = getattr(torch, options.get("dtype", "float32"))
        assert same_weights(loaded.module, whole.state_dict(), dtype)
        assert all(p.dtype == dtype for p in loaded.module.parameters())
        done = [p.bytes_done for p in reports if p.stage == "reading"]
        assert done == sorted(done)
        assert done[-1] == plan_split(sharded, CUTS, parts=["bottom"]).nbytes
        assert max(b - a for a, b in zip([0, *done], done, strict=False)) <= size
        assert all(p.file for p in reports if p.stage == "reading")

    def test_views_of_the_file_are_not_chunked(self, llama: Any, single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Nothing is read, so there is nothing to tell in between."""
        small_chunks(monkeypatch, 64)
        reports: list[Progress] = []
        loaded = load(component(single), reports.append)

        assert len([p for p in reports if p.stage == "reading"]) == len(loaded.module.state_dict())

    @pytest.mark.parametrize(
        "error", [LoadCancelledError("stop"), KeyError("stop"), RuntimeError("out of memory, I say")]
    )
    def test_a_strategy_of_a_plugin_is_not_blamed_for_the_callback(
        self, world: Any, single: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
    ) -> None:
        """What a callback raises in the middle of a tensor comes out as it is."""
        small_chunks(monkeypatch, 64)
        world.install(
            "llama",
            world.source("llama").replace('architecture="', 'preferred_strategy="mine", architecture="')
            + "\nfrom splitlearn_core.readers.copied import CopiedStrategy\n"
            "class Mine(CopiedStrategy):\n    name = 'mine'\n"
            "@hookimpl\ndef splitlearn_loading_strategies():\n    return [Mine()]\n",
        )

        def stop(progress: Progress) -> None:
            if 0 < progress.bytes_done < 1000:
                raise error

        with pytest.raises(type(error)) as caught:
            load_split_model("llama", CUTS, single, parts=["bottom"], progress=stop)
        assert caught.value is error


class TestWarmUp:
    @pytest.mark.parametrize("name", ["bottom", "trunk", "top", None])
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_it_runs_a_prompt_and_a_token_twice(self, llama: Any, single: Path, name: str | None, dtype: str) -> None:
        """Of the shape that the component takes, with a cache, recording no gradients."""
        config = component(single, name, dtype=dtype) if name else whole_model(single, dtype=dtype)
        loaded = load(config)
        calls: list[tuple[list[int], torch.dtype, bool]] = []

        def note(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tensor = args[0] if args else kwargs["input_ids"]
            calls.append(
                (list(tensor.shape), tensor.dtype, torch.is_grad_enabled() or torch.is_inference_mode_enabled())
            )

        handle = loaded.module.register_forward_pre_hook(note, with_kwargs=True)
        reports: list[str] = []
        ModelLoader().warm_up(config, loaded, lambda progress: reports.append(progress.stage))
        handle.remove()

        tokens = name in ("bottom", None)
        tail, kind = ([], torch.int64) if tokens else ([32], getattr(torch, dtype))
        assert calls == [([1, 8, *tail], kind, False), ([1, 1, *tail], kind, False)] * 2
        assert set(reports) == {"warming up"}
        assert len(reports) >= 4
        assert all(parameter.grad is None for parameter in loaded.module.parameters())

    def test_a_short_context_is_not_exceeded(self, llama: Any, single: Path, edit_json: Callable[..., None]) -> None:
        """A model of four positions is warmed up with three and one."""
        edit_json(single / "config.json", max_position_embeddings=4)
        config = component(single, "bottom")
        loaded = load(config)
        lengths: list[int] = []
        loaded.module.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))

        ModelLoader().warm_up(config, loaded, lambda _: None)

        assert lengths == [3, 1, 3, 1]

    @pytest.mark.parametrize(
        ("error", "kind"),
        [
            (RuntimeError("no kernel for this"), ConfigurationError),
            (RuntimeError("DefaultCPUAllocator: can't allocate memory"), InsufficientMemoryError),
            (MemoryError(), InsufficientMemoryError),
            (LoadCancelledError("stop"), LoadCancelledError),
        ],
    )
    def test_its_failure_is_its_own(
        self, llama: Any, single: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[Exception]
    ) -> None:
        """The model was loaded: what is wrong shows when it runs."""
        config = component(single)
        loaded = load(config)

        def fail(*_: Any, **__: Any) -> None:
            raise error

        monkeypatch.setattr(loaded.module, "forward", fail)
        with pytest.raises(kind):
            ModelLoader().warm_up(config, loaded, lambda _: None)


@pytest.mark.parametrize(
    ("error", "kind", "named"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "/x/shard"), CheckpointError, "/x/shard"),
        (FileNotFoundError(errno.ENOENT, "No such file", "/x/shard"), MissingFileError, "/x/shard"),
        (OSError(errno.EIO, "Input/output error"), CheckpointError, "the model"),
        (OSError("odd"), CheckpointError, "odd"),
        (OSError(errno.ENOSPC, "No space left on device", "/x"), InsufficientDiskError, "/x"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), InsufficientDiskError, "full"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), InsufficientMemoryError, "the model"),
        (MemoryError(), InsufficientMemoryError, "the model"),
        (MemoryError("std::bad_alloc"), InsufficientMemoryError, "bad_alloc"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), InsufficientMemoryError, "CUDA"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
            InsufficientMemoryError,
            "tried",
        ),
    ],
    ids=repr,
)
def test_errors_of_the_system_are_translated(error: Exception, kind: type[SplitLearnError], named: str) -> None:
    """Each is an error of ours with the path, the cause and the way out."""
    with pytest.raises(kind, match=named) as caught, translate(partial(system_error, "the model")):
        raise error

    assert type(caught.value) is kind
    assert caught.value.__cause__ is error
    assert caught.value.hint


@pytest.mark.parametrize(
    "error", [RuntimeError("a bug"), KeyError("a"), LoadCancelledError("stop"), KeyboardInterrupt()]
)
def test_other_errors_pass(error: BaseException) -> None:
    """They are not errors of the system."""
    with pytest.raises(type(error)) as caught, translate(partial(system_error, "the model")):
        raise error
    assert caught.value is error


def test_the_loader_is_light(world: Any) -> None:
    """Importing it imports neither torch nor transformers."""
    done = world.python(
        "-c",
        "import sys, splitlearn_core.manager.loaders.loader, splitlearn_core.manager.workers\n"
        "print(sorted({'torch', 'transformers', 'safetensors'} & set(sys.modules)))",
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_allocation_failures_are_distinguished_from_bugs(
    llama: Any, single: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A MemoryError in the middle of reading, as the allocator raises it."""
    read = copied._Readers._read

    def scarce(self: Any, piece: Any, *target: Any) -> None:
        if piece.begin > 10_000:
            raise MemoryError
        read(self, piece, *target)

    small_chunks(monkeypatch, 1024)
    monkeypatch.setattr(copied._Readers, "_read", scarce)
    with pytest.raises(InsufficientMemoryError, match="ran out") as caught:
        load(component(single, strategy="copied"))
    assert caught.value.hint


def test_a_plan_can_be_loaded_twice(llama: Any, single: Path, whole: Any) -> None:
    """It is a value: nothing of a load sticks to it."""
    loader, config = ModelLoader(), component(single)
    plan = loader.plan(config, lambda _: None)

    for _ in range(2):
        assert same_weights(loader.load(config, plan, lambda _: None).module, whole.state_dict())
