"""The text that the bundled model is fine-tuned on: Shakespeare's sonnets, in the public domain."""

from __future__ import annotations

from importlib.resources import files

#: One of so many poems is held out.
_HELD_OUT = 8


def sonnets() -> tuple[list[str], list[str]]:
    """Return the poems to learn from, and those that are held out; lines end with a line break."""
    text = (files("splitlearn_core.fine_tuning") / "sonnets.txt").read_text(encoding="utf-8")
    poems = [f"{poem.strip()}\n" for poem in text.split("\n\n")]
    held_out = poems[_HELD_OUT - 1 :: _HELD_OUT]
    return [poem for number, poem in enumerate(poems, 1) if number % _HELD_OUT], held_out
