"""What a check raised, as its finding."""

from __future__ import annotations

import traceback

from splitlearn_core.causes import cause_of, is_halted
from splitlearn_core.doctor.findings import Finding, Level
from splitlearn_core.errors import SplitLearnError
from splitlearn_core.quoting import said


def failed(name: str, error: BaseException, subject: str, mend: str, where: str = "") -> Finding:
    """Return the finding of a check that raised whatever it raised.

    Args:
        name: The check.
        error: What it raised.
        subject: What it was doing.
        mend: What to do where the error does not say it.
        where: What it looked at.
    """
    cause = cause_of(error)
    if cause is not None and is_halted(cause.library):
        # Its own check has said what is wrong with it: here it only stands in the way.
        return left_out(name, cause.library)
    if isinstance(error, SplitLearnError) and not (cause and cause.library):
        return Finding(name, Level.WRONG, error.message, where, error.hint)
    if cause is not None:
        return Finding(name, Level.WRONG, cause.message, where, cause.hint)
    last = traceback.extract_tb(error.__traceback__)[-1]
    what = f"{subject or 'the check'} failed: {said(error)}"
    return Finding(name, Level.WRONG, what, f"{last.filename}:{last.lineno}", mend or "report it")


def left_out(name: str, library: str, subject: str = "") -> Finding:
    """Return the note on what was not examined for want of a library."""
    return Finding(name, Level.NOTE, f"{subject and subject + ' '}left out: {library} cannot be imported")
