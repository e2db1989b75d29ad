"""A checkpoint: its configuration, its weight map, and the headers of the shards that are needed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from splitlearn_core.checkpoint.config import read_config, read_weight_map
from splitlearn_core.checkpoint.source import CONFIG, Source
from splitlearn_core.errors import CheckpointError, InvalidCheckpointError, MissingFileError
from splitlearn_core.types import ProgressCallback, TensorInfo

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class Checkpoint:
    """The files of a model as values; nothing is read before it is asked for."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self._headers: dict[str, dict[str, TensorInfo]] = {}

    @cached_property
    def config(self) -> dict[str, Any]:
        """``config.json``. Raises InvalidCheckpointError."""
        config = read_config(self.source.path(CONFIG))
        quantization = config.get("quantization_config")
        if quantization:
            method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
            raise CheckpointError(
                f"{self.source.model} is quantised ({method}), and splitlearn reads plain weights only",
                hint="use the original, unquantised checkpoint",
            )
        return config

    @cached_property
    def has_weights(self) -> bool:
        """Say whether there are weights to be read at all."""
        # Shards without an index are weights too: asking for the weight map says what is missing.
        return any(name == INDEX or name.endswith(".safetensors") for name in self.source.files())

    @cached_property
    def weight_map(self) -> dict[str, str]:
        """Tensor name -> shard, from the index or from the one file's header."""
        files = self.source.files()
        # One file wins over an index, as in transformers.
        if SINGLE in files:
            return dict.fromkeys(self._header(SINGLE), SINGLE)
        if INDEX in files:
            return read_weight_map(self.source.path(INDEX))
        raise self._no_weights(files)

    def shards(self, keys: Iterable[str]) -> tuple[str, ...]:
        """Return the shards that hold these tensors."""
        return tuple(sorted({self.weight_map[key] for key in keys}))

    def tensors(self, keys: Iterable[str]) -> dict[str, TensorInfo]:
        """Return what the headers say of these tensors, opening only the shards that hold them.

        Raises:
            InvalidCheckpointError: The index names tensors that their shard does not hold.
        """
        wanted = list(keys)
        shards = self.shards(wanted)
        self.source.require(shards)
        headers = {shard: self._header(shard) for shard in shards}
        astray = [f"{key} in {self.weight_map[key]}" for key in wanted if key not in headers[self.weight_map[key]]]
        if astray:
            raise InvalidCheckpointError(
                f"{INDEX} of {self.source.model} names tensors that are not where it says: {'; '.join(astray[:8])}"
                + (f"; and {len(astray) - 8} more" if len(astray) > 8 else ""),  # noqa: PLR2004  # a readable line
                hint="index and shards belong to different versions: fetch them anew",
            )
        return {key: headers[self.weight_map[key]][key] for key in wanted}

    def fetch(self, shards: Iterable[str], progress: ProgressCallback) -> dict[str, Path]:
        """Make sure that shards are on this machine, and return where."""
        names = sorted(shards)
        self.source.fetch(names, progress)
        return {name: self.source.path(name) for name in names}

    def optional_file(self, name: str) -> Path | None:
        """Return the path of a small file that a checkpoint may have or not."""
        return self.source.path(name) if name in self.source.files() else None

    def _header(self, shard: str) -> dict[str, TensorInfo]:
        if shard not in self._headers:
            self._headers[shard] = self.source.header(shard)
        return self._headers[shard]

    def _no_weights(self, files: Mapping[str, int]) -> CheckpointError:
        pickled = sorted(name for name in files if name.endswith((".bin", ".pt", ".pth", ".ckpt")))
        if pickled:
            return CheckpointError(
                f"{self.source.model} has its weights only in pickle files ({', '.join(pickled[:4])}), "
                "which can run code when they are opened; splitlearn reads safetensors",
                hint="convert it once: AutoModelForCausalLM.from_pretrained(MODEL).save_pretrained(DIR), then load DIR",
            )
        sharded = sorted(name for name in files if name.endswith(".safetensors"))
        if sharded:
            return MissingFileError(
                f"{self.source.model} has {len(sharded)} safetensors files ({', '.join(sharded[:3])}) "
                f"but neither {SINGLE} nor {INDEX}",
                hint="fetch the index too: it says which shard holds which tensor",
            )
        return MissingFileError(f"{self.source.model} has a {CONFIG} but no weights", hint=self.source.hint_for_missing)
