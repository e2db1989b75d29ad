"""Whether a library can be imported at all: one finding of it, instead of one in each check that needs it."""

from __future__ import annotations

import importlib

from splitlearn_core.doctor.findings import Finding

#: The module of a library to import: that of transformers imports nothing by itself.
_MODULES = {"transformers": "transformers.modeling_utils"}


def check_import(library: str) -> list[Finding]:
    """Import a library; what it raises is the finding."""
    importlib.import_module(_MODULES.get(library, library))
    return []
