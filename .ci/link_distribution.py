"""Link a distribution that is installed beside this interpreter, with all that it requires, into another environment.

    python link_distribution.py NAME ENVIRONMENT

It takes a moment, where an installation is a download of gigabytes.
"""

from __future__ import annotations

import os
import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path


def linked(name: str) -> dict[str, Distribution]:
    """Return the distribution and those that it requires, by name, as far as they are installed."""
    # Of pip, which each environment has: this one may have no other.
    from pip._vendor.packaging.requirements import Requirement

    found: dict[str, Distribution] = {}
    names = [name]
    while names:
        name = names.pop()
        if name in found:
            continue
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:
            continue
        requirements = map(Requirement, found[name].requires or ())
        names += [one.name for one in requirements if one.marker is None or one.marker.evaluate({"extra": ""})]
    return found


def main(name: str, environment: Path) -> None:
    """Link the files; those outside the folder of packages, as scripts, are left out."""
    source = Path(str(distribution(name).locate_file("")))
    target = environment / source.relative_to(sys.prefix)
    # Named as pip names their folders. What the environment has is left as it is.
    there = {path.name.partition("-")[0].lower() for path in target.glob("*.dist-info")}
    for found in linked(name).values():
        if found.name.replace("-", "_").replace(".", "_").lower() in there:
            continue
        for file in found.files or ():
            path = source / file
            if ".." in file.parts or "__pycache__" in file.parts or not path.is_file():
                continue
            place = target / file
            place.parent.mkdir(parents=True, exist_ok=True)
            if not place.exists():
                os.link(path, place)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
