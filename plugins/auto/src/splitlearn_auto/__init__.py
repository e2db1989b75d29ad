"""``splitlearn plugins new``: a package for a model type that no plugin has yet."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from splitlearn_auto.findings import Derived
from splitlearn_auto.knowledge import given_config
from splitlearn_auto.package import LICENCES, NO_LICENCE, Names, check_free, package_files, write_folder
from splitlearn_core import ConfigurationError, PluginConflictError
from splitlearn_core.extension import core_version, registry, user_path


@dataclass(frozen=True, slots=True)
class NewPlugin:
    """A package that was written, or would be in a dry run."""

    names: Names
    #: Where it was written; None in a dry run.
    folder: Path | None
    #: Its files, by path.
    files: dict[str, str]
    derived: Derived

    @property
    def verified(self) -> bool:
        """Whether a tiny model, split by its family, equals the unsplit model bit by bit."""
        return not self.derived.questions

    @property
    def family_file(self) -> str:
        return f"src/{self.names.module}/__init__.py"

    def to_dict(self) -> dict[str, Any]:
        return {
            "model_type": self.names.model_type,
            "architecture": self.derived.fields["architecture"],
            "distribution": self.names.distribution,
            "module": self.names.module,
            "folder": str(self.folder) if self.folder else None,
            "files": sorted(self.files),
            "verified": self.verified,
            "variants": list(self.derived.variants),
            "attention": list(self.derived.attention),
            "dtypes": list(self.derived.dtypes),
            "questions": [question.to_dict() for question in self.derived.questions],
            "notes": self.derived.notes,
        }


def new_plugin(
    model_type: str,
    out: str | os.PathLike[str] | None,
    *,
    origin: str | None = None,
    licence: str = LICENCES[0],
    force: bool = False,
    dry_run: bool = False,
    **hub: Any,
) -> NewPlugin:
    """Write an installable package for a model type, with a family derived from a small model.

    A small model with random weights is created and observed; the derived family is verified by splitting
    the model and comparing with the unsplit one.

    Args:
        model_type: The ``model_type`` of ``config.json``.
        out: The folder to write; new or empty. A dry run does not use it.
        origin: A directory, a ``config.json``, ``bundled:MODEL_TYPE`` or a Hub repository whose configuration is
            used; by default that of the configuration class.
        licence: One of :data:`LICENCES`, or ``none``.
        force: Write it although an installed plugin has the type.
        dry_run: Write nothing.
        hub: ``cache_dir``, ``revision``, ``token`` and ``local_files_only``, for an origin on the Hub.

    Raises:
        ConfigurationError: No such model type or licence; the folder is in use; models of the type cannot
            be split, with the reason (:class:`CannotSplitError`).
        PluginConflictError: An installed plugin has the type already.
        MissingFileError: The origin does not exist.
    """
    folder = None if dry_run else _free_folder(out, model_type)
    if licence not in (*LICENCES, NO_LICENCE):
        raise ConfigurationError(f"unknown licence {licence!r}", hint=f"choose {', '.join((*LICENCES, NO_LICENCE))}")
    _check_unclaimed(model_type, force)
    stated = given_config(model_type, origin, **hub) if origin is not None else {}
    from splitlearn_auto.examining import examine

    derived = examine(model_type, stated)
    files = package_files(derived, core_version(), licence, datetime.now(UTC).year)
    if folder is not None:
        write_folder(folder, files)
    return NewPlugin(Names(model_type), folder, files, derived)


def _free_folder(out: str | os.PathLike[str] | None, model_type: str) -> Path:
    if out is None:
        raise ConfigurationError(f"the package of model type {model_type!r} has no folder", hint="give --out DIR")
    folder = user_path(out)
    check_free(folder)
    return folder


def _check_unclaimed(model_type: str, force: bool) -> None:
    """Refuse a type that an installed plugin has: with two of them, neither can be used."""
    owners = [entry for entry in registry().entries if entry.kind == "family" and entry.name == model_type]
    if owners and not force:
        raise PluginConflictError(
            f"model type {model_type!r} is provided by {', '.join(entry.label for entry in owners)} already",
            hint="use that one, or give --force to write another, of which only one can be used at a time",
        )
