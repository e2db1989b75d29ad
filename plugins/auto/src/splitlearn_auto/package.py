"""The files of a new package, as texts by their path; and a folder of them, which is complete or does not exist."""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from packaging.utils import canonicalize_name

from splitlearn_auto.findings import Derived
from splitlearn_auto.rendering import family_module, literal, test_module
from splitlearn_core import PLUGIN_API, ConfigurationError
from splitlearn_core.extension import reason

#: Licences a package may be given, by SPDX identifier.
LICENCES = ("Apache-2.0", "MIT", "BSD-3-Clause")
NO_LICENCE = "none"


@dataclass(frozen=True, slots=True)
class Names:
    """The names of a package for a model type."""

    model_type: str

    @property
    def distribution(self) -> str:
        return f"splitlearn-{canonicalize_name(self.model_type)}"

    @property
    def module(self) -> str:
        return re.sub(r"[^a-z0-9]+", "_", self.distribution)

    @property
    def title(self) -> str:
        """The model type as a title."""
        return self.model_type.replace("_", " ").replace("-", " ").capitalize()


def package_files(derived: Derived, core_version: str, licence: str, year: int) -> dict[str, str]:
    """Return the files of a package.

    Args:
        derived: The derived family.
        core_version: The oldest version of core that it supports.
        licence: One of :data:`LICENCES`, or :data:`NO_LICENCE`.
        year: The year of the copyright.
    """
    names = Names(derived.fields["model_type"])
    files = {
        "pyproject.toml": _pyproject(names, core_version, licence),
        f"src/{names.module}/__init__.py": family_module(derived, names.title),
        f"src/{names.module}/py.typed": "",
        f"tests/test_{names.module.removeprefix('splitlearn_')}_family.py": test_module(derived, names.title),
        "README.md": _readme(names, derived),
        "CHANGELOG.md": _changelog(names),
        ".gitignore": "__pycache__/\n*.egg-info/\n/build/\n/dist/\n/.venv/\n/.*_cache/\n",
    }
    if licence != NO_LICENCE:
        files["LICENSE"] = _licence(licence, names, year)
    return files


def _pyproject(names: Names, core_version: str, licence: str) -> str:
    stated = "" if licence == NO_LICENCE else f'license = "{licence}"\n'
    files = ["src", "tests", "README.md", "CHANGELOG.md", *(["LICENSE"] if stated else [])]
    return f"""\
[build-system]
requires = ["hatchling>=1.26"]
build-backend = "hatchling.build"

[project]
name = "{names.distribution}"
version = "0.1.0"
description = "{names.title} for splitlearn"
readme = "README.md"
requires-python = ">=3.11"
{stated}keywords = ["split learning", "splitlearn", "transformers"]
dependencies = ["splitlearn-core>={core_version}"]

[project.optional-dependencies]
test = ["pytest>=9", "pytest-timeout>=2"]

[project.entry-points."splitlearn.families"]
{names.model_type} = "{names.module}"

[project.entry-points."splitlearn.plugin_api"]
version = "{PLUGIN_API}"

[tool.hatch.build.targets.wheel]
packages = ["src/{names.module}"]

[tool.hatch.build.targets.sdist]
include = {literal(files)}
"""


def _readme(names: Names, derived: Derived) -> str:
    made_with = f"Its parts were found with transformers {derived.transformers}.\n" if derived.transformers else ""
    limits = "".join(f"- {' '.join(note.split())}\n" for note in derived.notes)
    return f"""\
# {names.distribution}

{names.title} for splitlearn: model type `{names.model_type}`.

```sh
pip install {names.distribution}     # from here: pip install -e .
splitlearn plan MODEL --split A B
```

`MODEL` is a directory or a Hub repository whose `config.json` says `"model_type": "{names.model_type}"`.

## Tests

```sh
pip install -e ".[test]"
pytest
```

They compare a small model, cut in three, with the model in one piece, to the last bit.
{made_with}""" + (f"\n## What it does not cover\n\n{limits}" if limits else "")


def _changelog(names: Names) -> str:
    return f"""\
# Changelog of {names.distribution}

## 0.1.0 (unreleased)

First version; plugin API {PLUGIN_API}.

- Model type `{names.model_type}`.
"""


def _licence(licence: str, names: Names, year: int) -> str:
    text = resources.files("splitlearn_auto").joinpath("licences", f"{licence}.txt").read_text()
    return text.replace("{year}", str(year)).replace("{holder}", f"the authors of {names.distribution}")


def check_free(folder: Path) -> None:
    """Refuse a path that is in use; an empty folder is free.

    Raises:
        ConfigurationError: The path exists, or lies below something that is not a folder.
    """
    try:
        taken = folder.exists() or folder.is_symlink()
        if taken and not (folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir())):
            raise ConfigurationError(
                f"{folder} exists, and nothing is overwritten", hint="give a folder that is new or empty"
            )
        ancestor = next((parent for parent in folder.absolute().parents if parent.exists()), None)
        if ancestor is not None and not ancestor.is_dir():
            raise ConfigurationError(f"{ancestor} is not a folder", hint="give another path with --out")
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigurationError):
            raise
        raise ConfigurationError(f"{str(folder)!r} cannot be a folder: {reason(error)}", hint="check --out") from error


def write_folder(folder: Path, files: Mapping[str, str]) -> None:
    """Write files into a temporary folder next to the target, and rename it once all are written.

    Raises:
        ConfigurationError: Another process has created the folder in the meantime.
    """
    folder.absolute().parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.absolute().parent))
    try:
        for name, text in files.items():
            path = unfinished / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8", newline="\n")
        # mkdtemp creates folders for their owner only.
        umask = os.umask(0)
        os.umask(umask)
        unfinished.chmod(0o777 & ~umask)
        # Replaces at most an empty folder.
        unfinished.replace(folder)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            check_free(folder)
        raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
