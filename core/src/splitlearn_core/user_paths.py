"""Paths as people give them: ``~`` is a home wherever one is taken."""

from __future__ import annotations

import os
from pathlib import Path

from splitlearn_core.errors import ConfigurationError


def user_path(given: str | os.PathLike[str]) -> Path:
    """Return a path with ``~`` and ``~name`` in its beginning as the home that they mean.

    Raises:
        ConfigurationError: There is no such home.
    """
    try:
        return Path(given).expanduser()
    except RuntimeError as error:
        raise ConfigurationError(
            f"{os.fspath(given)!r} is in the home of a user that is not known here", hint="give the whole path"
        ) from error
