"""A checkpoint in a directory."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from splitlearn_core.checkpoint.config_json import base_of, needed_reader
from splitlearn_core.checkpoint.hub.fetch_plan import FileFetch, Wanted, here
from splitlearn_core.checkpoint.names import ADAPTER_CONFIG, CONFIG
from splitlearn_core.checkpoint.safetensors_header import read_header
from splitlearn_core.errors import MissingFileError
from splitlearn_core.quoting import listed
from splitlearn_core.types import ProgressCallback, TensorInfo


class DirectorySource:
    """A checkpoint in a local directory.

    Args:
        directory: The directory.
        only: The one weight file that is used; None for all.
    """

    commit: str | None = None
    hint_for_missing = "copy or download the missing files into the folder"

    def __init__(self, directory: Path, only: str | None = None) -> None:
        self.model = str(directory / only) if only else str(directory)
        self._directory = directory
        self._only = only
        self.has_config = (directory / CONFIG).is_file()

    def files(self) -> dict[str, int]:
        sizes = {entry.name: entry.stat().st_size for entry in self._directory.iterdir() if entry.is_file()}
        if self._only is None:
            return sizes
        # The configuration and the tokenizer's files stay; weights other than the named file do not.
        small = (".json", ".txt", ".model", ".jinja")
        return {
            name: size
            for name, size in sizes.items()
            if name == self._only or (name.endswith(small) and not name.endswith(".index.json"))
        }

    def path(self, name: str) -> Path:
        if name == CONFIG and not self.has_config:
            if (self._directory / ADAPTER_CONFIG).is_file():
                raise MissingFileError(
                    f"{self._directory} holds an adapter ({ADAPTER_CONFIG}) and no model ({CONFIG})",
                    hint=f"load the model that it was made for, {base_of(self._directory / ADAPTER_CONFIG)}, "
                    "and put the adapter onto its components: load_adapter(parts, DIR)",
                )
            needed = needed_reader(entry.name for entry in self._directory.iterdir() if entry.is_file())
            if needed is not None:
                raise MissingFileError(
                    f"{self._directory} has no {CONFIG}; {needed[0]} is a {needed[1]} file, which nothing reads here",
                    hint=needed[2],
                )
            present = ", ".join(sorted(entry.name for entry in self._directory.iterdir())[:8]) or "nothing"
            raise MissingFileError(
                f"{self._directory} has no {CONFIG} (it holds: {present})",
                hint="give the folder that save_pretrained wrote or that the Hub repository was cloned into",
            )
        return self._directory / name

    def is_here(self, name: str) -> bool:
        return (self._directory / name).is_file()

    def require(self, names: Iterable[str]) -> None:
        missing = [name for name in names if not (self._directory / name).is_file()]
        if missing:
            raise MissingFileError(
                f"{self._directory} lacks {listed(missing)}, which its index names and the requested parts need",
                hint=self.hint_for_missing,
            )

    def plan_fetch(self, wanted: Wanted) -> tuple[FileFetch, ...]:
        self.require(wanted)
        sizes = {name: self.path(name).stat().st_size for name in wanted}
        return tuple(here(name, sizes[name], spans) for name, spans in wanted.items())

    def fetch(self, wanted: Wanted, progress: ProgressCallback) -> dict[str, Path]:
        self.require(wanted)
        return {name: self.path(name) for name in wanted}

    def header(self, name: str) -> dict[str, TensorInfo]:
        return read_header(self._directory / name)
