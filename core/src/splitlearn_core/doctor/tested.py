"""The versions that the checks of this repository run with: one table, held against its other places by a test."""

from __future__ import annotations

from dataclasses import dataclass

from packaging.version import Version


@dataclass(frozen=True, slots=True)
class Range:
    """Versions from the lowest to the newest that was tried, both included."""

    lowest: str
    #: As exact as it is written: ``2.13`` means every 2.13.
    newest: str

    def __str__(self) -> str:
        return self.lowest if self.lowest == self.newest else f"{self.lowest} to {self.newest}"

    def is_below(self, version: str) -> bool:
        return Version(version) < Version(self.lowest)

    def is_above(self, version: str) -> bool:
        newest = Version(self.newest).release
        return Version(version).release[: len(newest)] > newest


PYTHON = Range("3.11", "3.13")

#: Those of the libraries below that decide what models come out as.
DECISIVE = ("torch", "transformers", "huggingface-hub", "safetensors")

#: Distribution -> its versions. What core needs; the lowest are those of its dependencies.
LIBRARIES = {
    "torch": Range("2.13", "2.13"),
    "transformers": Range("5.4", "5.24"),
    "huggingface-hub": Range("1.5", "2.4"),
    "safetensors": Range("0.6.2", "0.8"),
    "click": Range("8.2", "8.5"),
    "importlib-metadata": Range("8.7", "10.2"),
    "packaging": Range("24.2", "26.3"),
    "pluggy": Range("1.7", "1.7"),
    "psutil": Range("6.0", "7.2"),
    "pyyaml": Range("6.0.2", "6.0.4"),
    "tqdm": Range("4.67", "4.70"),
}

#: What core can do with more: extra -> what it is good for, and the distributions it needs.
EXTRAS = {
    "peft": ("adapters", {"peft": Range("0.18", "0.21")}),
    "serve": (
        "splitlearn serve",
        {
            "prometheus-client": Range("0.21", "0.26"),
            "starlette": Range("0.45", "1.10"),
            "uvicorn": Range("0.34", "0.54"),
        },
    ),
}
