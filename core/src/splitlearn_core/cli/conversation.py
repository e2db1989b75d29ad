"""A conversation at a terminal or over pipes: each line of input is a message, and gets an answer."""

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
        conversation: Receives the lines and the answers.
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
    """Yield the typed or piped lines that are not empty."""
    at_terminal = sys.stdin.isatty()
    if at_terminal:
        click.echo("Ctrl-D ends, Ctrl-C stops an answer.", err=True)
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # gives input() its editing and its history
    while True:
        try:
            line = _read_line(prompt=at_terminal)
        except EOFError:
            if at_terminal:
                click.echo(err=True)
            return
        if line.strip():
            yield line


def _read_line(*, prompt: bool) -> str:
    if prompt and sys.stdout.isatty():
        return input(_PROMPT)
    if prompt:
        # On stderr, since stdout is redirected.
        click.echo(_PROMPT, nl=False, err=True)
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.removesuffix("\n").removesuffix("\r")


@contextlib.contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Let the first interrupt stop the answer; the second raises KeyboardInterrupt."""
    stopped = False

    def stop(_: int, __: FrameType | None) -> None:
        nonlocal stopped
        if stopped:
            raise KeyboardInterrupt
        stopped = True

    previous = signal.signal(signal.SIGINT, stop)
    try:
        yield lambda: stopped
    finally:
        signal.signal(signal.SIGINT, previous)
