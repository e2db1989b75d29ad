"""The loading strategy for GGUF files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from splitlearn_core import CheckpointError, InvalidCheckpointError, PlannedTensor, ReadPlan, TensorInfo, open_regular
from splitlearn_gguf.architectures import (
    JOINED_KEYS,
    Architecture,
    Change,
    Join,
    Joined,
    Order,
    architecture,
    architecture_of,
)
from splitlearn_gguf.configuration import read_config
from splitlearn_gguf.header import Header, StoredTensor, header_length, read_header, type_name

if TYPE_CHECKING:
    import torch

    from splitlearn_gguf.values import Exchange

_MAX_SHOWN = 8
#: The dtype of every dequantised tensor, as safetensors names it.
_DEQUANTISED = "F32"
_ELEMENT_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
_MATRIX = 2
#: Of a layer; a file of any size could state a tensor of many more.
_MAX_EXPERTS = 4096


@dataclass(frozen=True, slots=True)
class Placed:
    """A tensor of the model, and its places in a file: one, or those of its pieces."""

    pieces: tuple[StoredTensor, ...]
    joined: Joined | None = None

    @property
    def begin(self) -> int:
        return min(piece.begin for piece in self.pieces)

    @property
    def end(self) -> int:
        return max(piece.end for piece in self.pieces)

    def shape(self, known: Architecture) -> tuple[int, ...]:
        """Return the shape that the tensor has in the model; empty if pieces do not fit together."""
        if self.joined is not None:
            return self.joined.shape([piece.shape for piece in self.pieces])
        (stored,) = self.pieces
        change, shape = known.change(stored.name), stored.shape
        # Another number of dimensions is left for the comparison with the model.
        if change is Change.TRANSPOSE and len(shape) == _MATRIX:
            return shape[::-1]
        if change is Change.CHANNELS and len(shape) == _MATRIX:
            return (shape[0], 1, shape[1])
        return (1, *shape) if change is Change.ROW and len(shape) == 1 else shape


class GgufStrategy:
    """Reads the planned tensors out of a GGUF file and dequantises them, one after the other."""

    name = "gguf"
    format = "gguf"
    suffixes = (".gguf",)
    reads = "GGUF files, quantised or not: only the planned tensors, dequantised, in any dtype, on any device"

    def config(self, path: Path) -> Mapping[str, Any]:
        """Return the configuration that follows from the file's metadata; raises CheckpointError."""
        return read_config(read_header(path))

    def config_of_parts(self, paths: Sequence[Path]) -> Mapping[str, Any]:
        """Return the configuration of a model in several files.

        Raises:
            CheckpointError: As :meth:`config`; or not all tensors of the model are in them.
        """
        headers = [read_header(path) for path in paths]
        tensors = {name: stored for header in headers for name, stored in header.tensors.items()}
        stated = headers[0].metadata.get("split.tensors.count", len(tensors))
        if stated != len(tensors):
            raise InvalidCheckpointError(
                f"{paths[0]} and the other {len(paths) - 1} parts hold {len(tensors)} tensors of a model of {stated}",
                hint="one of them is a part of another model: fetch all parts again",
            )
        return read_config(replace(headers[0], tensors=tensors))

    def tensors(self, path: Path, config: Mapping[str, Any]) -> Mapping[str, TensorInfo]:
        """Describe the tensors by their checkpoint keys, and their places in the file.

        Raises:
            CheckpointError: The file cannot be read, is of an unknown architecture, or of another one than
                ``config``, or stores tensors in a way that cannot be dequantised.
        """
        header = read_header(path)
        model_type = str(config.get("model_type"))
        # Only the first of several parts says it.
        known = architecture(header.architecture, str(path)) if header.architecture else architecture_of(model_type)
        if known is None or model_type not in known.model_types:
            stored = f" of the architecture {header.architecture[:80]!r}" if header.architecture else ""
            raise InvalidCheckpointError(
                f"{path} holds a model{stored}, but its configuration says model_type {model_type[:80]!r}",
                hint="a file has the decoder only: give it a config.json with what this one has as text_config"
                if isinstance(config.get("text_config"), Mapping)
                else "do config.json and the file belong together?",
            )
        keyed = _keyed(header, known, config.get("num_hidden_layers"))
        _refuse_types(header.path, (piece for placed in keyed.values() for piece in placed.pieces))
        return {key: _info(key, placed, known, path) for key, placed in keyed.items()}

    def header_length(self, path: Path, present: int) -> int | None:
        """Return the number of bytes before the data; None if more than those present are needed to know it."""
        return header_length(path, present)

    def pretrained_arguments(self, path: Path) -> Mapping[str, Any]:
        """Return the arguments with which ``from_pretrained`` of transformers reads the same file."""
        return {"gguf_file": path.name}

    def refusal(self, plan: ReadPlan) -> str:
        """Return why this plan cannot be read this way; empty if it can."""
        others = sorted({tensor.info.format for tensor in plan.tensors} - {self.format})
        return f"it reads gguf files, not {', '.join(others)}" if others else ""

    def anonymous_bytes(self, plan: ReadPlan) -> int:
        """Predict the memory of the tensors, and of dequantising a piece of the largest."""
        kept = sum(tensor.elements * _ELEMENT_BYTES[tensor.kept_dtype or plan.dtype] for tensor in plan.tensors)
        return (kept if plan.device == "cpu" else 0) + self.passing_bytes(plan)

    def passing_bytes(self, plan: ReadPlan) -> int:
        """Predict how much of that is freed after the read."""
        from splitlearn_gguf.values import CHUNK_ELEMENTS, WORKING_BYTES

        largest = max((tensor.elements for tensor in plan.tensors), default=0)
        # Of a tensor that is made of several, all of them at the most.
        pieces = max(
            (
                tensor.elements * _ELEMENT_BYTES[tensor.kept_dtype or plan.dtype]
                for tensor in plan.tensors
                if tensor.info.key.endswith(JOINED_KEYS)
            ),
            default=0,
        )
        return min(largest, CHUNK_ELEMENTS) * WORKING_BYTES + (pieces if plan.device == "cpu" else 0)

    def read(self, plan: ReadPlan) -> Iterator[tuple[PlannedTensor, torch.Tensor]]:
        """Yield every planned tensor once, in the order in which the files hold them.

        Raises:
            InvalidCheckpointError: A file is no longer the one that was planned.
        """
        import torch

        from splitlearn_gguf.values import join, read_tensor

        for shard, planned in plan.by_shard().items():
            header = read_header(plan.paths[shard])
            first = header if header.architecture else _first_part(plan, shard)
            known = architecture(first.architecture, str(first.path))
            wanted = _wanted(header, known, planned)
            with open_regular(header.path, buffering=0) as file:
                for tensor, placed in wanted:
                    read = partial(
                        read_tensor,
                        file,
                        dtype=getattr(torch, tensor.kept_dtype or plan.dtype),
                        device=plan.device,
                        on_bytes=plan.on_bytes,
                    )
                    pieces = (
                        read(stored, known.change(stored.name), _exchange(first, known.order(stored.name), stored))
                        for stored in placed.pieces
                    )
                    if placed.joined is None:
                        yield tensor, next(pieces)
                    else:
                        how, shape = placed.joined.join, placed.shape(known)
                        groups = _key_heads(first, placed) if how is Join.KEY_HEADS else 1
                        yield tensor, join(pieces, len(placed.pieces), how, shape, groups)


def _first_part(plan: ReadPlan, shard: str) -> Header:
    """Return the header of the first of several parts, which holds the metadata of the model."""
    first = re.sub(r"-\d{5}(-of-\d{5}\.gguf)$", r"-00001\1", shard)
    if first not in plan.paths:
        raise InvalidCheckpointError(
            f"{shard} is a part of a model, and its first part is missing", hint="fetch all parts of the model"
        )
    return read_header(plan.paths[first])


def _keyed(header: Header, known: Architecture, layers: object = None) -> dict[str, Placed]:
    """Return the tensors that a model has by checkpoint key.

    Args:
        header: The header of the file.
        known: Its architecture.
        layers: The number of layers, if it is known: those after it, which predict several tokens, are left out.

    Raises:
        InvalidCheckpointError: A tensor has too many experts, or pieces that do not belong together.
    """
    keyed: dict[str, Placed] = {}
    pieces: dict[str, tuple[Joined, dict[str, StoredTensor]]] = {}
    for name, stored in header.tensors.items():
        number = re.match(r"blk\.(\d+)\.", name)
        if number is not None and type(layers) is int and int(number[1]) >= layers:
            continue
        count = stored.shape[0] if len(stored.shape) > _MATRIX else 0
        experts = known.expert_keys(name, min(count, _MAX_EXPERTS + 1))
        if len(experts) > _MAX_EXPERTS:
            raise InvalidCheckpointError(
                f"{header.path}: {name[:80]} holds {count} experts, and no layer has more than {_MAX_EXPERTS}",
                hint="fetch or convert the file again",
            )
        key, joined = known.key(name), known.joined_key(name)
        if experts:
            # One after the other, each of whole blocks: a component reads those that it is planned with.
            step, shape = stored.nbytes // len(experts), stored.shape[1:]
            begins = range(stored.begin, stored.end, step)
            parts = (replace(stored, shape=shape, begin=begin, end=begin + step) for begin in begins)
            keyed |= {key: Placed((part,)) for key, part in zip(experts, parts, strict=True)}
        elif joined is not None:
            pieces.setdefault(joined[0], (joined[1], {}))[1][name.partition(".")[2].partition(".")[2]] = stored
        elif key is not None:
            keyed[key] = Placed((stored,))
    for key, (way, found) in pieces.items():
        absent = [piece for piece in way.pieces if piece not in found]
        if absent:
            raise InvalidCheckpointError(
                f"{header.path} has {next(iter(found.values())).name[:80]} without {', '.join(absent)}, with which it "
                "is one tensor of the model",
                hint="if another part of the model has it, join the parts: llama-gguf-split --merge FIRST_PART FILE",
            )
        keyed[key] = Placed(tuple(found[piece] for piece in way.pieces), way)
        if not keyed[key].shape(known):
            raise InvalidCheckpointError(
                f"{header.path}: {' and '.join(piece.name[:80] for piece in keyed[key].pieces)} do not fit together: "
                f"their shapes are {' and '.join(str(list(piece.shape)) for piece in keyed[key].pieces)}",
                hint="fetch or convert the file again",
            )
    return keyed


def _info(key: str, placed: Placed, known: Architecture, path: Path) -> TensorInfo:
    return TensorInfo(key, _DEQUANTISED, placed.shape(known), path.name, placed.begin, placed.end, GgufStrategy.format)


def _refuse_types(path: Path, tensors: Iterable[StoredTensor]) -> None:
    from splitlearn_gguf.values import can_dequantise

    by_type: dict[int, list[str]] = {}
    for stored in tensors:
        by_type.setdefault(stored.type, []).append(stored.name)
    refused = [f"{type_name(kind)} ({names[0]})" for kind, names in by_type.items() if not can_dequantise(kind)]
    if refused:
        raise CheckpointError(
            f"{path} stores tensors in a way that the gguf library cannot dequantise: {', '.join(sorted(refused))}",
            hint="pip install --upgrade gguf; or convert the model to another type, such as Q8_0",
        )


def _wanted(
    header: Header, known: Architecture, planned: Sequence[PlannedTensor]
) -> list[tuple[PlannedTensor, Placed]]:
    """Find the planned tensors in the file as it is now, in its order."""
    keyed = _keyed(header, known)
    infos = {key: _info(key, placed, known, header.path) for key, placed in keyed.items()}
    # In a folder of a repository, a shard has the folder in its name.
    present = {tensor.info.key: replace(tensor.info, shard=header.path.name) for tensor in planned}
    changed = sorted(key for key, info in present.items() if infos.get(key) != info)
    if changed:
        raise InvalidCheckpointError(
            f"{header.path} is no longer the file that was planned; changed: {', '.join(changed[:_MAX_SHOWN])}",
            hint="load it again once it is written completely",
        )
    pairs = [(tensor, keyed[tensor.info.key]) for tensor in planned]
    return sorted(pairs, key=lambda pair: pair[1].begin)


def _exchange(header: Header, order: Order, stored: StoredTensor) -> Exchange | None:
    """Return how the rows or columns of a tensor go back to Hugging Face's order; None if they are in it.

    Raises:
        InvalidCheckpointError: The tensor does not have so many, or the metadata does not say of what they are.
    """
    from splitlearn_gguf.values import Exchange

    if order is Order.NONE:
        return None
    columns = order is Order.VALUE_COLUMNS
    size = stored.shape[-1 if columns else 0]
    if order in (Order.QUERIES, Order.KEYS):
        heads = _number(header, "attention.head_count")
        if order is Order.KEYS and f"{header.architecture}.attention.head_count_kv" in header.metadata:
            heads = _number(header, "attention.head_count_kv")
        # llama.cpp rotates neighbouring rows of a head, Hugging Face row ``i`` with row ``i + half``.
        if heads and size % (2 * heads) == 0:
            return Exchange((heads, 2, size // heads // 2, 1))
        whose = f"{heads} heads"
    else:
        keys, values = (_number(header, f"ssm.{key}") for key in ("group_count", "time_step_rank"))
        total = _number(header, "ssm.inner_size") if order is Order.LAST_VALUES else size
        if keys and values and values % keys == 0 and 0 < total <= size and total % values == 0:
            return Exchange((1, keys, values // keys, total // values), size - total, columns)
        whose = f"{values} heads of values and {keys} of keys, of {total} rows together"
    raise InvalidCheckpointError(
        f"{header.path}: the {size} {'columns' if columns else 'rows'} of {stored.name!r} are not those of {whose}",
        hint="fetch or convert the file again",
    )


def _key_heads(header: Header, placed: Placed) -> int:
    """Return the number of key heads of linear attention, by which the rows of both pieces are divided."""
    heads = _number(header, "ssm.group_count")
    first, gates = (piece.shape[0] for piece in placed.pieces)
    if not heads or first <= gates or (first - gates) % (2 * heads) or gates % heads:
        raise InvalidCheckpointError(
            f"{header.path}: the {first} and {gates} rows of {' and '.join(repr(one.name) for one in placed.pieces)} "
            f"are not those of {heads} heads of keys",
            hint="fetch or convert the file again",
        )
    return heads


def _number(header: Header, key: str) -> int:
    """Return a number from 1 of the metadata; 0 if there is none."""
    value = header.metadata.get(f"{header.architecture}.{key}")
    return value if type(value) is int and value > 0 else 0
