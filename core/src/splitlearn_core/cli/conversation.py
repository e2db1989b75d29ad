"""A conversation at a terminal, or over pipes: a line in, an answer out."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING

import click

from splitlearn_core.cli.shared_options import print_json

if TYPE_CHECKING:
    from splitlearn_core.generation import Conversation

_PROMPT = "> "


def converse(conversation: Conversation, show: Callable[[str], None] | None) -> None:
    """Answer each line of stdin until it ends.

    Args:
        conversation: What the lines and the answers are added to.
        show: Writes a piece of an answer; None to print all of it as JSON at the end.
    """
    turns = []
    for line in _lines():
        with _interruptible() as is_stopped:
            turn = conversation.answer(line, on_text=show, is_stopped=is_stopped)
        turns.append(turn)
        if show is not None:
            click.echo()
        if is_stopped():
            click.echo("(stopped)", err=True)
    if show is None:
        print_json({"messages": conversation.messages, "turns": [turn.to_dict() for turn in turns]})


def _lines() -> Iterator[str]:
    """Yield what is typed, or piped, line by line; empty lines say nothing."""
    at_terminal = sys.stdin.isatty()
    if at_terminal:
        click.echo("Ctrl-D ends, Ctrl-C stops an answer.", err=True)
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # gives input() its editing and its history
    while True:
        try:
            line = _typed() if at_terminal else _piped()
        except EOFError:
            if at_terminal:
                click.echo(err=True)
            return
        if line.strip():
            yield line


def _typed() -> str:
    # Where stdout goes elsewhere, the prompt must not go with it.
    if sys.stdout.isatty():
        return input(_PROMPT)
    click.echo(_PROMPT, nl=False, err=True)
    return _piped()


def _piped() -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.removesuffix("\n").removesuffix("\r")


@contextlib.contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Take the first interrupt as a wish to stop the answer; the second is one as ever."""
    stopped = False

    def stop(_: int, __: FrameType | None) -> None:
        nonlocal stopped
        if stopped:
            raise KeyboardInterrupt
        stopped = True

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield lambda: stopped
    finally:
        signal.signal(signal.SIGINT, before)
