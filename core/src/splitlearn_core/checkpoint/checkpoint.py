"""A checkpoint: its configuration, its weight map, and the headers of the shards that are needed."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from splitlearn_core.checkpoint.config_json import (
    check_config,
    needed_reader,
    read_config,
    read_index_dtype,
    read_weight_map,
)
from splitlearn_core.checkpoint.files import (
    ADAPTER_CONFIG,
    CONFIG,
    INDEX,
    SINGLE,
    TORCH_INDEX,
    TORCH_SINGLE,
    parts_of,
)
from splitlearn_core.checkpoint.hub.fetch_plan import Span, Wanted
from splitlearn_core.checkpoint.source import Source
from splitlearn_core.checkpoint.torch_file import describe_torch_file
from splitlearn_core.errors import CheckpointError, InvalidCheckpointError, MissingFileError
from splitlearn_core.loading_strategy import PartsReader, PretrainedReader, RangedReader, WeightReader
from splitlearn_core.plan.quantised import METHODS, QuantisedTensor, quantised_tensors
from splitlearn_core.quoting import SENTENCE, listed, plain, quote
from splitlearn_core.types import PYTORCH, SAFETENSORS, ProgressCallback, TensorInfo

log = logging.getLogger(__name__)

_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
#: Name of the quantisation method of MLX, whose configuration names none.
MLX = "MLX"

#: Files that are not weights: pattern of their names, what they are, and what to do; the first match counts.
_OTHER_FILES = (
    (
        r"adapter_model\.(safetensors|bin)",
        "an adapter",
        "load the model that it was made for, and put it onto the components: load_adapter(parts, DIR)",
    ),
    (
        r"consolidated.*\.(safetensors|pth)",
        "in the layout of Meta or Mistral",
        "convert it to Hugging Face's layout: python -m transformers.models.TYPE.convert_TYPE_weights_to_hf",
    ),
    (
        r"(pytorch_)?model\.(?!safetensors|bin)[\w-]+\.(safetensors|bin)|.*\.index\.(?!json)[\w-]+\.json",
        "a variant",
        "write plain names: AutoModelForCausalLM.from_pretrained(DIR, variant=VARIANT).save_pretrained(OUT)",
    ),
    (
        r"zero_to_fp32\.py",
        "DeepSpeed's, which puts the pieces of its checkpoint together",
        "python zero_to_fp32.py DIR OUT",
    ),
    (
        r".*\.distcp|.*_rank_?\d+.*\.(pt|bin|pth)|pytorch_model_fsdp.*\.bin",
        "a piece of a distributed checkpoint",
        "join the pieces: accelerate merge-weights DIR OUT, or the tool that saved them",
    ),
    (
        r"model_optim_rng\.pt|.*\.nemo",
        "of Megatron or NeMo",
        "convert it to the layout of Hugging Face with the tools of those",
    ),
    (
        r"(tf_model\.h5|flax_model\.msgpack)(\.index\.json)?|model\.ckpt.*",
        "of TensorFlow or Flax, which transformers 5 does not read either",
        "convert it with transformers 4: AutoModelForCausalLM.from_pretrained(DIR, from_flax=True)",
    ),
)

#: Returns the readers of other formats, given the model type if ``config.json`` states it.
FindReaders = Callable[[str | None], Iterable[WeightReader]]


@dataclass(frozen=True, slots=True)
class _Layout:
    """How the weights are stored: in one file, in numbered parts, or in shards that an index names."""

    #: The one file, the first part, or the index.
    entrance: str
    format: str
    #: How the names of weight files end.
    suffix: str
    #: Describes the file if core cannot.
    reader: WeightReader | None = None

    @property
    def is_index(self) -> bool:
        return self.entrance.endswith(".index.json")

    @property
    def files(self) -> tuple[str, ...]:
        """The weight files, unless an index names them."""
        return parts_of(self.entrance) if isinstance(self.reader, PartsReader) else (self.entrance,)

    @property
    def serves_headers(self) -> bool:
        """Whether the header of a file can be fetched alone."""
        return self.format == SAFETENSORS or isinstance(self.reader, RangedReader)


#: One file takes precedence over an index, and safetensors over pickles, as in transformers.
_LAYOUTS = (
    _Layout(SINGLE, SAFETENSORS, ".safetensors"),
    _Layout(INDEX, SAFETENSORS, ".safetensors"),
    _Layout(TORCH_SINGLE, PYTORCH, ".bin"),
    _Layout(TORCH_INDEX, PYTORCH, ".bin"),
)


class Checkpoint:
    """The files of a model as values, each read on first access.

    Args:
        source: Where the files are.
        find_readers: Called only if core can read none of the weight files.
    """

    def __init__(self, source: Source, find_readers: FindReaders = lambda _: ()) -> None:
        self.source = source
        self._find_readers = find_readers
        self._headers: dict[str, dict[str, TensorInfo]] = {}

    @cached_property
    def config(self) -> dict[str, Any]:
        """``config.json``, or the configuration in a weight file. Raises InvalidCheckpointError."""
        if not self.source.has_config and self._layout is not None and self._layout.reader is not None:
            config = self._config_in_weights(self._layout.files, self._layout.reader)
        else:
            config = read_config(self.source.path(CONFIG))
        return config

    def _config_in_weights(self, files: Sequence[str], reader: WeightReader) -> dict[str, Any]:
        self.source.require(files)
        paths = [self.path_with_header(name) for name in files]
        parts = len(paths) > 1 and isinstance(reader, PartsReader)
        read = reader.config_of_parts(paths) if parts else reader.config(paths[0])  # type: ignore[attr-defined]  # it is
        return check_config(dict(read), str(paths[0]))

    @property
    def quantization(self) -> str:
        """The quantisation method that ``config.json`` states; empty if the weights are not quantised.

        Weights in the files of an added reader are not those that it speaks of.
        """
        stated = self.config.get("quantization_config")
        if not stated or (self._layout is not None and self._layout.reader is not None):
            return ""
        if not isinstance(stated, dict):
            return plain(stated)
        if stated.get("quant_method"):
            return plain(stated["quant_method"])
        if stated.get("load_in_4bit") or stated.get("load_in_8bit"):
            return "bitsandbytes"
        # MLX writes its own settings under this name too.
        return MLX if {"group_size", "bits"} <= stated.keys() else "by no method that it names"

    @cached_property
    def quantised_tensors(self) -> Mapping[str, QuantisedTensor]:
        """The quantised tensors that are dequantised one by one, by their keys in plain weights.

        Raises:
            CheckpointError: Numbers or scales are missing.
        """
        if self.quantization not in METHODS or self.format != SAFETENSORS:
            return {}
        try:
            return quantised_tensors(self.config["quantization_config"], self.weight_map)
        except ValueError as error:
            raise InvalidCheckpointError(
                f"{self.source.model} is quantised ({self.quantization}), and {error}",
                hint="fetch it again, with all of its files",
            ) from error

    @property
    def is_opaque(self) -> bool:
        """Whether the weights are quantised so that transformers alone can read them, as a whole."""
        return bool(self.quantization) and not self.quantised_tensors

    def weight_files(self) -> tuple[str, ...]:
        """Return the names of all weight files of the model."""
        if self._layout is None:
            raise self._no_weights()
        return tuple(sorted(set(self.weight_map.values()))) if self._layout.is_index else self._layout.files

    def require_weights(self) -> None:
        """Check that there are weights.

        Raises:
            CheckpointError: There are none that can be read; says which files there are, and what reads them.
        """
        if not self.has_weights:
            raise self._no_weights()

    @property
    def format(self) -> str:
        """The format of the weights: ``safetensors``, ``pytorch`` or an added reader's; empty without weights."""
        return self._layout.format if self._layout is not None else ""

    @cached_property
    def has_weights(self) -> bool:
        """Return whether there are weights, readable or not."""
        # Weights that cannot be read count: access to the weight map then reports what is missing.
        return self._layout is not None or any(name.endswith((".safetensors", *_PICKLES)) for name in self._files)

    @cached_property
    def is_describable(self) -> bool:
        """Return whether the tensors can be listed without a download of whole files: always for safetensors."""
        if self._layout is None or self._layout.serves_headers:
            return True
        return all(map(self.source.is_here, self.weight_files()))

    @cached_property
    def weight_map(self) -> dict[str, str]:
        """Tensor name -> shard, from the index or from the one file's header."""
        layout = self._layout
        if layout is None:
            raise self._no_weights()
        if layout.is_index:
            return read_weight_map(self.source.path(layout.entrance), layout.suffix)
        shards: dict[str, str] = {}
        self.source.require(layout.files)
        for shard in layout.files:
            for key in self._header(shard):
                if shards.setdefault(key, shard) != shard:
                    raise InvalidCheckpointError(
                        f"{self.source.model}: {plain(key)} is in {shards[key]} and in {shard}",
                        hint="one of the files is a part of another model: fetch them again",
                    )
        return shards

    @cached_property
    def deciding_shard(self) -> str:
        """The weight file whose tensors determine the dtype if ``config.json`` does not: the first by name.

        A folder may hold only the shards that some components need: then it is the first of those.
        """
        shards, present = self.weight_files(), self.source.files()
        shard = next((name for name in shards if name in present), shards[0])
        if shard != shards[0]:
            log.warning(
                "%s lacks %s, whose tensors determine the dtype of the model; that of %s is used",
                self.source.model,
                shards[0],
                shard,
            )
        return shard

    @cached_property
    def index_dtype(self) -> str:
        """torch's name of the dtype that the index states; empty if there is no index, or it states none."""
        layout = self._layout
        return read_index_dtype(self.source.path(layout.entrance)) if layout is not None and layout.is_index else ""

    def deciding_tensors(self) -> Iterator[TensorInfo]:
        """Yield the tensors of the deciding shard in the order in which ``from_pretrained`` reads them."""
        infos = self._header(self.deciding_shard)
        # The order of a pickle is that of its dictionary.
        yield from ((infos[key] for key in sorted(infos)) if self.format == SAFETENSORS else infos.values())

    @property
    def headers_are_served(self) -> bool:
        """Whether headers can be fetched without the tensors."""
        return self._layout is not None and self._layout.serves_headers

    @property
    def headerless_files(self) -> tuple[str, ...]:
        """The weight files if there is no index and their headers cannot be fetched on their own, else none."""
        if self._layout is None or self._layout.serves_headers or self._layout.is_index:
            return ()
        return self._layout.files

    def fetch_headerless_files(self, progress: ProgressCallback) -> None:
        """Fetch the weight files if their tensors can only be listed from complete files."""
        if self.headerless_files:
            self.fetch(self.headerless_files, progress)

    def shards(self, keys: Iterable[str]) -> tuple[str, ...]:
        """Return the shards that hold these tensors."""
        return tuple(sorted({self.weight_map[key] for key in keys}))

    def tensors(self, keys: Iterable[str]) -> dict[str, TensorInfo]:
        """Describe tensors by the headers of the shards that hold them; no other shard is opened.

        Raises:
            InvalidCheckpointError: The index names tensors that their shard does not hold.
        """
        wanted = list(keys)
        shards = self.shards(wanted)
        self.source.require(shards)
        headers = {shard: self._header(shard) for shard in shards}
        misplaced = [
            f"{plain(key)} in {self.weight_map[key]}" for key in wanted if key not in headers[self.weight_map[key]]
        ]
        if misplaced:
            index = self._layout.entrance if self._layout is not None else INDEX
            shown = listed(misplaced, "; ", limit=SENTENCE)
            raise InvalidCheckpointError(
                f"{index} of {self.source.model} names tensors that are not where it says: {shown}",
                hint="index and shards belong to different versions: fetch them again",
            )
        return {key: headers[self.weight_map[key]][key] for key in wanted}

    def fetch(self, shards: Iterable[str], progress: ProgressCallback) -> dict[str, Path]:
        """Fetch whole shards that are not on this machine; return the paths of all."""
        return self.source.fetch(dict.fromkeys(sorted(shards)), progress)

    def fetch_tensors(self, tensors: Iterable[TensorInfo], progress: ProgressCallback) -> dict[str, Path]:
        """Fetch tensors that are not on this machine; return the paths of their shards.

        A shard has its original size; one that was fetched in ranges holds its header, these tensors, and
        whatever else was fetched of it.
        """
        return self.source.fetch(self.wanted(tensors), progress)

    def wanted(self, tensors: Iterable[TensorInfo]) -> Wanted:
        """Return the byte ranges of shards that hold tensors, and the headers of these shards."""
        wanted: dict[str, list[Span] | None] = {}
        # Tensors without a shard are known from the configuration alone.
        for info in sorted((info for info in tensors if info.shard), key=lambda info: (info.shard, info.begin)):
            if not self.headers_are_served:
                wanted[info.shard] = None
                continue
            spans = wanted.setdefault(info.shard, [])
            if spans is not None:
                # The data begins where the header ends.
                spans += [] if spans else [(0, min(other.begin for other in self._header(info.shard).values()))]
                spans.append((info.begin, info.end))
        if wanted and self._layout is not None and len(self._layout.files) > 1:
            # What its reader needs to read any other.
            wanted.setdefault(self._layout.entrance, [] if self._layout.serves_headers else None)
        return wanted

    def pretrained_arguments(self) -> Mapping[str, Any] | None:
        """Return the arguments of ``from_pretrained`` other than the folder; None for files that it finds by itself."""
        layout = self._layout
        if layout is None or not isinstance(layout.reader, PretrainedReader):
            return None
        return layout.reader.pretrained_arguments(self.path_with_header(layout.entrance))

    @property
    def has_adapter(self) -> bool:
        """Whether an adapter is stored with the weights, which ``from_pretrained`` applies to them."""
        return ADAPTER_CONFIG in self._files

    @property
    def folder(self) -> Path:
        """The folder of ``config.json``, or of the weight file that holds the configuration. Raises CheckpointError."""
        if not self.source.has_config and self._layout is not None:
            return self.path_with_header(self._layout.entrance).parent
        return self.source.path(CONFIG).parent

    def optional_file(self, name: str) -> Path | None:
        """Return the path of an optional small file, or None if the checkpoint lacks it."""
        return self.source.path(name) if name in self._files else None

    @property
    def _files(self) -> Mapping[str, int]:
        return self.source.files()

    @cached_property
    def _layout(self) -> _Layout | None:
        """The layout of the weights; None if there is no reader for the files.

        Raises:
            CheckpointError: ``config.json`` names another weight file, or there are several candidates.
        """
        known = next((layout for layout in _LAYOUTS if layout.entrance in self._files), None)
        # from_pretrained reads the file that transformers_weights names.
        named = read_config(self.source.path(CONFIG)).get("transformers_weights") if self.source.has_config else None
        if named is not None and (known is None or named != known.entrance):
            raise CheckpointError(
                f"{CONFIG} of {self.source.model} names its weights: transformers_weights: {quote(named)}",
                hint=f"let the file be {SINGLE} (or its index {INDEX}), and remove that entry of {CONFIG}",
            )
        return known or self._claimed()

    def _claimed(self) -> _Layout | None:
        """Return the layout of the one file that an added reader can read.

        Raises:
            CheckpointError: There are several, and each is a separate model.
        """
        stated = read_config(self.source.path(CONFIG))["model_type"] if self.source.has_config else None
        claimed: dict[str, _Layout] = {}
        for reader in self._find_readers(stated):
            for name in sorted(self._files):
                if name.endswith(tuple(reader.suffixes)):
                    first = parts_of(name)[0] if isinstance(reader, PartsReader) else name
                    claimed.setdefault(first, _Layout(first, reader.format, Path(first).suffix, reader))
        if len(claimed) > 1:
            raise CheckpointError(
                f"{self.source.model} holds {len(claimed)} weight files, each a model of its own: {listed(claimed)}",
                hint="give the path of the one that is meant, or REPO:FILE on the Hub",
            )
        return next(iter(claimed.values()), None)

    def _header(self, shard: str) -> Mapping[str, TensorInfo]:
        if shard not in self._headers:
            self._headers[shard] = self._describe(shard)
        return self._headers[shard]

    def path_with_header(self, file: str) -> Path:
        """Return the path of a weight file of a reader's format, of which at least the header is on this machine."""
        reader = self._layout.reader if self._layout is not None else None
        if isinstance(reader, RangedReader):
            return self.source.path_with_header(file, reader.header_length)
        return self.fetch([file], lambda _: None)[file]

    def _describe(self, shard: str) -> dict[str, TensorInfo]:
        if self.format == SAFETENSORS:
            return self.source.header(shard)
        path = self.path_with_header(shard)
        reader = self._layout.reader if self._layout is not None else None
        if reader is None:
            return describe_torch_file(path)
        # In a folder of the repository, the name has the folder in it.
        return {key: replace(info, shard=shard) for key, info in reader.tensors(path, self.config).items()}

    def _no_weights(self) -> CheckpointError:
        needed = needed_reader(self._files)
        if needed is not None:
            return MissingFileError(
                f"{self.source.model} has its weights in {needed[0]}, a {needed[1]} file, and nothing here reads those",
                hint=needed[2],
            )
        for pattern, what, remedy in _OTHER_FILES:
            others = sorted(name for name in self._files if re.fullmatch(pattern, name))
            if others:
                return MissingFileError(
                    f"{self.source.model} has a {CONFIG}, and no weights that are read: {others[0]} is {what}",
                    hint=remedy,
                )
        sharded = sorted(name for name in self._files if name.endswith(".safetensors"))
        if sharded:
            return MissingFileError(
                f"{self.source.model} has {len(sharded)} safetensors files ({listed(sharded, most=3)}) "
                f"but neither {SINGLE} nor {INDEX}",
                hint="fetch the index too: it says which shard holds which tensor",
            )
        pickled = sorted(name for name in self._files if name.endswith(_PICKLES))
        if pickled:
            return CheckpointError(
                f"{self.source.model} has its weights only in pickle files of unknown layout "
                f"({listed(pickled, most=4)}); of those {TORCH_SINGLE} and {TORCH_INDEX} are read",
                hint="convert it once: AutoModelForCausalLM.from_pretrained(MODEL).save_pretrained(DIR), then load DIR",
            )
        return MissingFileError(f"{self.source.model} has a {CONFIG} but no weights", hint=self.source.hint_for_missing)
