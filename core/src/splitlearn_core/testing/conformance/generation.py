"""Checks of generation: equal to that of transformers, token for token and score for score."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import TextIteratorStreamer

from splitlearn_core.testing.conformance.base import Checks, axes, explained
from splitlearn_core.testing.conformance.batches import PADDINGS, batch
from splitlearn_core.testing.conformance.findings import expect
from splitlearn_core.testing.conformance.numbers import compare, expect_equal
from splitlearn_core.testing.conformance.subject import Cut, Subject

NEW_TOKENS = 6
_METHODS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "top_k": 20, "temperature": 1.5},
    "beams": {"num_beams": 3, "do_sample": False},
    "sampled beams": {"num_beams": 2, "do_sample": True},
}


@explained
class Generation(Checks):
    """``SplitCausalLM.generate``."""

    def test_generate(self, subject: Subject, dtype: str, attention: str, cut: Cut) -> None:
        """Greedy, sampled, beam and streamed generation are equal, scores included."""
        whole, split = subject.whole(dtype, attention), subject.split(cut, dtype, attention)
        for name in list(_METHODS)[: 1 if self.quick else None]:
            for padding in PADDINGS:
                expected = subject.once(
                    ("generated", dtype, attention, name, padding), _generate, whole, padding, _METHODS[name]
                )
                got = _generate(split, padding, _METHODS[name])
                for number, (mine, right) in enumerate(zip(got, expected, strict=False)):
                    what = f"{name} generation: {f'scores of token {number}' if number else 'the tokens'}"
                    expect_equal(mine, right, what, subject, whole, split)
                expect(len(got) == len(expected), f"{name} generation: {len(got)} and {len(expected)} steps")
        streamed = subject.once(("streamed", dtype, attention), _streamed, whole)
        expect(_streamed(split) == streamed, "streamed generation differs")

    def test_generate_with_any_number_of_cuts(self, subjects: dict[str, Subject]) -> None:
        """With fewer and with more components, greedy, sampled and beam generation are equal, scores included."""
        subject = subjects[axes(type(self)).variants[0]]
        whole = subject.whole()
        for cut in subject.other_cuts[: 1 if self.quick else None]:
            split = subject.split(cut)
            for name, method in list(_METHODS.items())[:3]:
                expected = subject.once(("any number", name), _generate, whole, 3, method)
                got = _generate(split, 3, method)
                expect(len(got) == len(expected), f"{name} generation: {len(got)} and {len(expected)} steps")
                for mine, right in zip(got, expected, strict=True):
                    expect_equal(mine, right, f"{name} generation under cut {cut}", subject, whole, split)

    def test_chunked_prefill(self, subject: Subject) -> None:
        """Generation that reads its prompt in chunks gives the tokens of the unsplit model that does so, too."""
        whole, split = subject.whole(), subject.split(subject.middle)
        method = {"do_sample": False, "prefill_chunk_size": 3}
        try:
            expected = _generate(whole, None, method)[0]
        # Not every model of transformers keeps a cache between the chunks.
        except ValueError as error:
            pytest.skip(f"transformers: {error}")
        expect(compare(_generate(split, None, method)[0], expected), "generation with prefill_chunk_size differs")


def _generate(model: Any, padding: int | None, method: dict[str, Any]) -> list[torch.Tensor]:
    """Return the tokens, and the scores of each step."""
    torch.manual_seed(7)
    output = model.generate(
        **batch(padding),
        **method,
        max_new_tokens=NEW_TOKENS,
        pad_token_id=0,
        output_scores=True,
        return_dict_in_generate=True,
    )
    return [output.sequences, *output.scores]


class _Spelling:
    """A minimal tokenizer for streamers, which writes a token as its number."""

    def decode(self, ids: list[int] | int, **_: Any) -> str:
        # A single token, too: streamers of transformers 5.24 need the length of the last one.
        tokens = [ids] if isinstance(ids, int) else ids
        return " ".join(str(int(token)) for token in tokens) + "\n"


def _streamed(model: Any) -> list[str]:
    streamer = TextIteratorStreamer(_Spelling(), timeout=60)
    model.generate(**batch(None), do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=0, streamer=streamer)
    return list(streamer)
