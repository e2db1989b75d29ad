"""Checks of the interface: class, signature, arguments and Trainer behave as for the unsplit model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from transformers import GenerationMixin, PreTrainedModel

from splitlearn_core import SplitCausalLM
from splitlearn_core.build.configuration import architecture_class
from splitlearn_core.testing.conformance.base import Checks, explained
from splitlearn_core.testing.conformance.batches import batch, labels_of, no_grad, positions, token_ids
from splitlearn_core.testing.conformance.findings import Suspect, expect
from splitlearn_core.testing.conformance.numbers import compare
from splitlearn_core.testing.conformance.subject import Subject

#: Arguments of ``forward`` that are tried, in addition to those of the other checks.
_ARGUMENTS = (
    *("attention_mask", "is_causal", "labels", "logits_to_keep", "num_items_in_batch", "output_attentions"),
    *("output_hidden_states", "position_ids", "return_dict", "token_type_ids", "use_cache"),
)


@explained
class Likeness(Checks):
    """Class, signature, names, arguments, and the loss that a trainer computes."""

    def test_identity(self, subject: Subject) -> None:
        """Class, loss, signature, base model and names of modules are those of the unsplit model."""
        whole, split = subject.whole(), subject.split(subject.middle)
        for attribute in (
            "base_model_prefix",
            "loss_type",
            "main_input_name",
            "all_tied_weights_keys",
            "_tied_weights_keys",
        ):
            expect(
                getattr(split, attribute) == getattr(whole, attribute), f"{attribute} is {getattr(split, attribute)!r}"
            )
        expect(isinstance(split, type(whole)), f"it is not a {type(whole).__name__}")
        expect(type(split).__name__ == type(whole).__name__, f"its class is called {type(split).__name__}")
        signatures = [inspect.signature(model.forward) for model in (split, whole)]
        expect(signatures[0] == signatures[1], f"its forward takes {signatures[0]}")
        for listed in ("named_modules", "named_parameters", "state_dict"):
            names = [set(dict(getattr(model, listed)())) for model in (split, whole)]
            suspect = Suspect("base, layers, inlets and outlets", "a module may be taken for another component's")
            expect(names[0] == names[1], f"other {listed}: {', '.join(sorted(names[0] ^ names[1])[:5])}", suspect)

    def test_generation_overrides(self, subject: Subject) -> None:
        """The split model runs the family's own overrides of generation methods."""
        made, hf_class = type(subject.split(subject.middle)), architecture_class(subject.family)
        for name in vars(GenerationMixin):
            if name in vars(SplitCausalLM) or name.startswith("__"):
                continue
            own = inspect.getattr_static(made, name)
            expect(own is inspect.getattr_static(hf_class, name), f"{name} is not that of {hf_class.__name__}")

    @pytest.mark.parametrize("argument", _ARGUMENTS)
    def test_forward_argument(self, subject: Subject, attention: str, argument: str) -> None:
        """Each argument of the family's forward reaches the components that it concerns."""
        whole, split = subject.whole("auto", attention), subject.split(subject.middle, "auto", attention)
        inputs = _with_argument(argument, whole)
        try:
            expected = _tensors(no_grad(whole, **inputs))
        # Models raise any exception for arguments that they do not take.
        except Exception as error:  # noqa: BLE001
            pytest.skip(f"the unsplit model refuses it: {type(error).__name__}")
        got = _tensors(no_grad(split, **inputs))
        same = len(got) == len(expected) and all(map(compare, got, expected))
        suspects = [Suspect("bottom_arguments", "only the embeddings may use it, or all layers need it")]
        suspects *= argument == "token_type_ids"
        expect(same, f"with {argument}, the split model returns something else", *suspects)

    def test_trainer(self, subject: Subject, tmp_path_factory: pytest.TempPathFactory) -> None:
        """The Trainer of transformers logs the losses of the unsplit model."""
        pytest.importorskip("accelerate", "1.3", reason="the Trainer needs accelerate: pip install 'accelerate>=1.3'")
        folder = tmp_path_factory.mktemp("trainer")
        models = (subject.fresh_whole("float32"), subject.fresh_split(subject.middle, "float32"))
        expected, got = (_logged_losses(model, str(folder)) for model in models)
        expect(got == expected, f"losses {got}, not {expected}")


def _with_argument(name: str, whole: PreTrainedModel) -> dict[str, Any]:
    """Return the inputs of a batch that is padded on the left, with one more argument."""
    inputs: dict[str, Any] = batch(3)
    rows, columns = inputs["input_ids"].shape
    blocked = torch.ones(rows, 1, columns, columns, dtype=torch.bool).triu(1)
    blocked |= (inputs["attention_mask"] == 0)[:, None, None, :] & ~torch.eye(columns, dtype=torch.bool)
    mask = torch.zeros(blocked.shape, dtype=whole.dtype).masked_fill(blocked, torch.finfo(whole.dtype).min)
    labels = {"labels": labels_of(inputs)}
    values: Mapping[str, dict[str, Any]] = {
        "attention_mask": {"attention_mask": mask, "position_ids": positions(inputs["attention_mask"])},
        "labels": labels,
        "num_items_in_batch": {**labels, "num_items_in_batch": 3},
        "position_ids": {"position_ids": positions(inputs["attention_mask"]) + 1},
        "token_type_ids": {"token_type_ids": token_ids(rows, columns, seed=2)},
    }
    plain = {"is_causal": False, "logits_to_keep": 2, "return_dict": False, "use_cache": False}
    return {**inputs, **values.get(name, {name: plain.get(name, True)})}


def _tensors(output: Any) -> list[torch.Tensor]:
    """Return the tensors of an output in order; caches are compared where they are used."""
    values = output if isinstance(output, tuple) else output.to_tuple()
    flat = [item for value in values for item in (value if isinstance(value, tuple) else (value,))]
    return [item for item in flat if isinstance(item, torch.Tensor)]


def _logged_losses(model: Any, folder: str) -> list[float]:
    """Train for two steps of two batches each, and return what the Trainer logs."""
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": token_ids(1, 5 + number % 3, seed=number)[0]} for number in range(8)]

    def collate(batch: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        ids = [row["input_ids"] for row in batch]
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
        inputs = {"input_ids": padded, "attention_mask": mask}
        return {**inputs, "labels": labels_of(inputs)}

    arguments = TrainingArguments(
        folder,
        max_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(model, arguments, data_collator=collate, train_dataset=rows)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
