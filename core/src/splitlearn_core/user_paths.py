"""Paths given by users: ``~`` means a home directory wherever a path is accepted."""

from __future__ import annotations

import os
from pathlib import Path

from splitlearn_core.errors import ConfigurationError, translate


def user_path(given: str | os.PathLike[str]) -> Path:
    """Return a path with a leading ``~`` or ``~name`` expanded to the home directory.

    Raises:
        ConfigurationError: There is no such home directory.
    """
    with translate(
        lambda _: ConfigurationError(
            f"{os.fspath(given)!r} is in the home of an unknown user", hint="give the absolute path"
        ),
        RuntimeError,
    ):
        return Path(given).expanduser()
