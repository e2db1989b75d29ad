"""Showing a load: to a callback, or as a bar on a terminal or in a notebook."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from splitlearn_core.types import Progress, ProgressCallback, human_bytes

log = logging.getLogger(__name__)


@contextmanager
def reporting(progress: ProgressCallback | Literal[False] | None) -> Iterator[ProgressCallback]:
    """Yield where progress goes: the caller's callback, a bar on a terminal or in a notebook, or nowhere."""
    if callable(progress):
        yield progress
    elif progress is False or not (sys.stderr.isatty() or _in_notebook()):
        yield lambda _: None
    else:
        _import_bars()
        bar = _Bar()
        try:
            yield bar.show
        finally:
            bar.close()


def _in_notebook() -> bool:
    """Say whether this process is the kernel of a notebook, whose stderr is no terminal, and which shows bars."""
    return "ipykernel.zmqshell" in sys.modules


def _import_bars() -> None:
    """Import the bars of terminals and notebooks, and with them those of the Hub's client and of transformers.

    In a notebook without ipywidgets tqdm warns, once, of bars that are texts.
    """
    if "tqdm.auto" in sys.modules:
        return
    from tqdm import TqdmWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TqdmWarning)
        import tqdm.auto  # noqa: F401


def logging_downloads(name: str, progress: ProgressCallback) -> ProgressCallback:
    """Return a callback that also says in the log, once, that files of a model are being downloaded."""
    said: list[Progress] = []

    def tell(progressed: Progress) -> None:
        if progressed.stage == "downloading" and not said:
            said.append(progressed)
            log.info("Downloading %s of %s", human_bytes(progressed.bytes_total), name)
        progress(progressed)

    return tell


@contextmanager
def passing_through(progress: ProgressCallback) -> Iterator[ProgressCallback]:
    """Hand a callback to foreign code, and let what it raises come out as it is.

    Code in between may take an exception of the callback for one of its own, dress it up, or
    swallow it. Whoever raises in a callback wants the work to stop with just that.
    """
    raised: list[BaseException] = []

    def relay(said: Progress) -> None:
        try:
            progress(said)
        except BaseException as error:
            raised.append(error)
            raise

    try:
        yield relay
    except Exception as error:
        if not raised or raised[0] is error:
            raised.clear()
            raise
    if raised:
        # Taken out, as above: the error knows this frame by its traceback, and must not be kept by it.
        raise raised.pop(0)


#: What the bar calls the stages that count bytes.
_WORDS = {"reading": "Loading", "saving": "Saving", "merging": "Merging", "hashing": "Hashing"}


class _Bar:
    """A byte bar that appears with the first byte."""

    def __init__(self) -> None:
        self._bar: Any = None

    def show(self, progress: Progress) -> None:
        if progress.stage == "converting":
            sys.stderr.write(f"Converting the tokenizer of {progress.file}; it is remembered\n")
            sys.stderr.flush()
        # The Hub's client draws its own bars while it downloads.
        if progress.stage not in _WORDS:
            return
        if self._bar is None:
            from tqdm.auto import tqdm

            self._bar = tqdm(total=progress.bytes_total, unit="B", unit_scale=True, unit_divisor=1024)
        self._bar.set_description(" ".join(filter(None, (_WORDS[progress.stage], progress.component))), refresh=False)
        self._bar.update(progress.bytes_done - self._bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
