"""Progress of a load: to a callback, or as a bar on a terminal or in a notebook."""

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
    """Yield a progress callback: the caller's, or that of a bar on a terminal or in a notebook.

    Anywhere else it writes one line while a model type is examined, which takes many seconds; if ``progress`` is False,
    nothing.
    """
    if callable(progress):
        yield progress
    elif progress is False:
        yield lambda _: None
    else:
        # In the kernel of a notebook stderr is not a terminal, but bars are shown.
        bar = _Bar(shown=sys.stderr.isatty() or "ipykernel.zmqshell" in sys.modules)
        try:
            yield bar.show
        finally:
            bar.close()


def logging_downloads(name: str, progress: ProgressCallback) -> ProgressCallback:
    """Return a callback that also logs, once, that files of a model are being downloaded."""
    logged = False

    def report(step: Progress) -> None:
        nonlocal logged
        if step.stage == "downloading" and not logged:
            logged = True
            log.info("Downloading %s of %s", human_bytes(step.bytes_total), name)
        progress(step)

    return report


@contextmanager
def passing_through(progress: ProgressCallback) -> Iterator[ProgressCallback]:
    """Pass a callback through foreign code, and raise the callback's exception unchanged.

    The code in between may wrap or swallow it, but an exception in a callback has to stop the work.
    """
    raised: list[BaseException] = []

    def relay(step: Progress) -> None:
        try:
            progress(step)
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
        # pop, because the traceback of the error refers to this frame: a reference cycle.
        raise raised.pop(0)


#: Label of the bar in each stage that counts bytes.
_LABELS = {"reading": "Loading", "saving": "Saving", "merging": "Merging", "hashing": "Hashing"}
#: Stages that are one line, with the file of the stage.
_LINES = {
    "converting": "Converting the tokenizer of {}; the result is cached",
    "examining": "Examining model type {} on a small model; the result is kept",
}


class _Bar:
    """A bar that counts bytes and appears with the first one."""

    def __init__(self, *, shown: bool) -> None:
        self._shown = shown
        self._bar: Any = None
        self._lines: set[str] = set()

    def show(self, progress: Progress) -> None:
        if progress.stage in _LINES and (self._shown or progress.stage == "examining"):
            self._show_line(_LINES[progress.stage].format(progress.file))
        # During a download huggingface_hub draws its own bars.
        if progress.stage not in _LABELS or not self._shown:
            return
        if self._bar is None:
            self._bar = _tqdm()(total=progress.bytes_total, unit="B", unit_scale=True, unit_divisor=1024)
        self._bar.set_description(" ".join(filter(None, (_LABELS[progress.stage], progress.component))), refresh=False)
        self._bar.update(progress.bytes_done - self._bar.n)

    def _show_line(self, text: str) -> None:
        if text not in self._lines:
            self._lines.add(text)
            sys.stderr.write(f"{text}\n")
            sys.stderr.flush()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _tqdm() -> Any:
    with warnings.catch_warnings():
        if "tqdm.auto" not in sys.modules:
            from tqdm import TqdmWarning

            # In a notebook without ipywidgets tqdm warns that bars are text.
            warnings.simplefilter("ignore", TqdmWarning)
        from tqdm.auto import tqdm
    return tqdm
