"""Checks of plans: from metadata alone they predict every tensor and every byte that is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from splitlearn_core import ComponentPlan, InvalidSplitError, SplitPlan, load_split_model, plan_split
from splitlearn_core.build.cache_sizes import sizes_after_one_token
from splitlearn_core.checkpoint.files import CONFIG
from splitlearn_core.plan.splitplan import total_cache_size
from splitlearn_core.readers.tensor_parts import source_from
from splitlearn_core.testing.conformance.base import Checks, explained
from splitlearn_core.testing.conformance.batches import no_grad
from splitlearn_core.testing.conformance.diagnosis import misread
from splitlearn_core.testing.conformance.findings import Suspect, expect
from splitlearn_core.testing.conformance.isolation import fresh_process
from splitlearn_core.testing.conformance.subject import Cut, Subject
from splitlearn_core.testing.planning import plan_as_json
from splitlearn_core.testing.worlds import write_checkpoint

_NAMES = Suspect("base, layers, embedding, norm, head", "they decide which component holds which tensor")


@explained
class Planning(Checks):
    """Plans against what is loaded, and against themselves."""

    def test_plan(self, subject: Subject, cut: Cut) -> None:
        """The plan holds, tensor for tensor and byte for byte, what is loaded."""
        _expect_plan(subject, cut)

    def test_plan_of_any_number(self, subject: Subject) -> None:
        """The plan of a model that is cut in one place, or in more than two, holds what is loaded."""
        for cut in subject.other_cuts:
            _expect_plan(subject, cut)

    def test_plan_is_deterministic(self, subject: Subject) -> None:
        """A second plan, and a plan of another process with another hash seed, is the same."""
        first, second = (plan_as_json(plan_split(subject.checkpoint, subject.middle)) for _ in range(2))
        expect(first == second, "two plans differ", Suspect("hook splitlearn_map_weight_keys", "answer alike"))
        where = (str(subject.checkpoint), *map(str, subject.middle))
        other = fresh_process("-m", "splitlearn_core.testing.planning", *where, PYTHONHASHSEED="4711")
        expect(
            json.loads(other) == first,
            "the plan of another process differs",
            Suspect("hook splitlearn_map_weight_keys", "its result must not depend on the order of a set"),
        )

    def test_plan_without_weights(self, subject: Subject, cut: Cut, tmp_path: Path) -> None:
        """config.json alone gives the same plan as the headers."""
        (tmp_path / CONFIG).write_bytes((subject.checkpoint / CONFIG).read_bytes())
        guessed, known = (_costs(plan_split(folder, cut)) for folder in (tmp_path, subject.checkpoint))
        expect(guessed["source"] == "config", "it must be planned from config.json alone")
        expect(
            guessed["costs"] == known["costs"],
            f"without weights {guessed['costs']} are planned, with them {known['costs']}",
            *misread(subject.family, subject.whole().config),
        )

    def test_cache_bytes(self, subject: Subject) -> None:
        """The plan's bytes of cache, for each token and for running states, are those that a token takes."""
        plan, split = plan_split(subject.checkpoint, subject.middle), subject.split(subject.middle)
        state: Any = torch.tensor([[3]])
        for planned, part in zip(plan.components, split.components, strict=True):
            cache = part.new_cache()
            name = "input_ids" if part is split.bottom else "hidden_states"
            state = no_grad(part, **{name: state}, past_key_values=cache)
            for what, actual, expected in zip(
                ("a token takes", "running states take"),
                total_cache_size(sizes_after_one_token(cache)),
                (planned.kv_bytes_per_token, planned.state_bytes_per_sequence),
                strict=True,
            ):
                expect(
                    actual == expected,
                    f"{what} {actual} bytes in the cache of the {planned.component}, and {expected} are planned",
                    *misread(subject.family, subject.whole().config, _CACHE_SIZES),
                    Suspect("measured_cache", "True measures what config.json does not say"),
                )

    def test_only_needed_shards(self, subject: Subject, tmp_path: Path) -> None:
        """A component loads although all shards that it does not need are missing."""
        write_checkpoint(tmp_path, subject.whole(), max_shard_size=12_000)
        for part in subject.split(subject.middle).components:
            component = str(part.component)
            folder = tmp_path.with_name(f"{tmp_path.name}-{component}")
            folder.mkdir()
            needed = plan_split(tmp_path, subject.middle, parts=(component,)).shards
            expect(
                len(needed) < len(list(tmp_path.glob("*.safetensors"))), f"the {component} needs every shard", _NAMES
            )
            for file in tmp_path.iterdir():
                if file.suffix == ".json" or file.name in needed:
                    (folder / file.name).write_bytes(file.read_bytes())
            loaded = load_split_model(None, subject.middle, folder, parts=(component,), strict=True)
            got, expected = getattr(loaded, component).state_dict(), part.state_dict()
            expect(got.keys() == expected.keys(), f"other tensors: {sorted(got.keys() ^ expected.keys())}", _NAMES)
            differ = [name for name, tensor in got.items() if not torch.equal(tensor, expected[name])]
            expect(not differ, f"other values: {', '.join(differ)}", _NAMES)

    def test_impossible_cuts(self, subject: Subject) -> None:
        """Cuts that the family declares impossible are refused, at either split point, before anything is read."""
        impossible = subject.impossible
        if not impossible:
            pytest.skip("the family declares no cut impossible in this variant")
        layers = subject.layers
        for point in impossible:
            field = Suspect("impossible_cuts", f"it returns {point!r}; points lie from 1 to {layers - 1}")
            expect(type(point) is int and 0 < point < layers, f"{point!r} is not a valid cut of {layers} layers", field)
            # With a trunk of one layer, after the point or before it.
            cut = (point, point + 1) if point + 1 < layers else (point - 1, point)
            try:
                plan_split(subject.checkpoint, cut)
            except InvalidSplitError as error:
                gives_reason = impossible[point] in error.message
                expect(gives_reason, f"the refusal of cut {cut} does not say why: {error.message}", field)
            else:
                expect(False, f"cut {cut} is declared impossible, and planned", field)


_CACHE_SIZES = ("num_key_value_heads", "head_dim", "hidden_size", "num_attention_heads")


def _expect_plan(subject: Subject, cut: Cut) -> None:
    """Compare a plan with what is loaded."""
    plan, split = plan_split(subject.checkpoint, cut), subject.split(cut)
    for planned, part in zip(plan.components, split.components, strict=True):
        _expect_planned(subject, planned, dict(part.state_dict()))
    expect(plan.num_layers == subject.layers, f"{plan.num_layers} layers are planned")
    whole = subject.whole()
    state = whole.state_dict()
    # With the buffers that a file holds.
    stored = whole.num_parameters() + sum(tensor.numel() for name, tensor in whole.named_buffers() if name in state)
    expect(plan.parameters == stored, f"{plan.parameters} parameters are planned", _NAMES)


def _expect_planned(subject: Subject, planned: ComponentPlan, loaded: dict[str, torch.Tensor]) -> None:
    """Compare a planned component with the loaded one, and the planned bytes of the files with its tensors."""
    names = planned.results.keys()
    expect(
        names == loaded.keys(),
        f"planned and loaded tensors of the {planned.component} differ in {sorted(names ^ loaded.keys())}",
        _NAMES,
    )
    for tensor in planned.tensors:
        info = tensor.info
        value = source_from(tensor, loaded) if tensor.places else loaded[tensor.module_key]
        with (subject.checkpoint / info.shard).open("rb") as file:
            file.seek(info.begin)
            stored = torch.frombuffer(bytearray(file.read(info.nbytes)), dtype=value.dtype).reshape(info.shape)
        expect(
            info.shape == tuple(value.shape) and info.nbytes == value.nbytes and torch.equal(stored, value),
            f"{tensor.module_key} is not what lies in the planned bytes of {info.key}",
            Suspect("renamed", "or the hook splitlearn_map_weight_keys: two tensors may be exchanged"),
        )


def _costs(plan: SplitPlan) -> dict[str, Any]:
    costs = [
        (str(part.component), part.parameters, part.nbytes, part.kv_bytes_per_token, part.state_bytes_per_sequence)
        for part in plan.components
    ]
    return {"source": plan.source, "costs": costs}
