"""Saving components: from a checkpoint, streamed without torch; or from memory."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from splitlearn_core.arguments import accept_foreign_names
from splitlearn_core.checkpoint.files import ADAPTER_CONFIG, CONFIG, INDEX
from splitlearn_core.checkpoint.manifest import MANIFEST, FileRecord, Manifest, render_manifest
from splitlearn_core.checkpoint.origin import origin_mismatches
from splitlearn_core.errors import ConfigurationError, InvalidCheckpointError
from splitlearn_core.loading.load import origins_of
from splitlearn_core.loading.opening import OpenModel, open_model
from splitlearn_core.loading.planning import plan_and_fetch, refuse_misfit
from splitlearn_core.plan.keys import companions
from splitlearn_core.plan.split_points import names_of_parts
from splitlearn_core.plan.splitplan import parse_parts
from splitlearn_core.plugins.metadata import core_version
from splitlearn_core.progress import logging_downloads, passing_through, reporting
from splitlearn_core.storage.atomic import Snapshot, replacing, snapshot
from splitlearn_core.storage.contents import (
    Part,
    Tensor,
    WeightFile,
    companion_files,
    config_text,
    index_of,
    pack,
    parse_shard_size,
)
from splitlearn_core.storage.directory import SavedComponent, SplitDirectory, as_path, is_split_directory
from splitlearn_core.storage.durable_files import (
    Buffers,
    check_room,
    copy_durably,
    link_durably,
    range_pieces,
    write_text,
    write_weights,
)
from splitlearn_core.types import (
    ALL_PARTS,
    SAFETENSORS,
    Progress,
    ProgressCallback,
    TensorInfo,
    component_names,
    dtype_name,
    kind_of,
)

if TYPE_CHECKING:
    import torch

    from splitlearn_core.build.component import ComponentModel
    from splitlearn_core.pipeline import SplitCausalLM
    from splitlearn_core.split_model import AnySplitModel


@accept_foreign_names
def save_split(
    source: str | os.PathLike[str] | AnySplitModel | SplitCausalLM | ComponentModel | Iterable[ComponentModel],
    out: str | os.PathLike[str],
    split_points: Sequence[int] | None = None,
    *,
    parts: Sequence[str] = ALL_PARTS,
    dtype: str | torch.dtype = "auto",
    max_shard_size: str | int = "5GB",
    overwrite: bool = False,
    model_type: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    progress: ProgressCallback | Literal[False] | None = None,
) -> SplitDirectory:
    """Save components: ``out/bottom``, ``out/trunk`` and ``out/top``, each with a manifest.

    If there are other components than these three, each folder has the name of its component.

    From safetensors the bytes are copied as they are, in chunks, without torch: a checkpoint may be
    larger than memory. ``out`` is replaced atomically: a killed process leaves the old one or the new one.

    Args:
        source: A directory, a Hub repository, or components in memory, whose present values are saved.
        out: The directory to create.
        split_points: ``(a, b)``, or any number of them; not for components in memory.
        parts: The components of a checkpoint to save; all by default.
        dtype: ``auto`` for as it is stored. Another one loads the components to convert them.
        max_shard_size: Weights above this size are sharded: ``5GB``, or bytes.
        overwrite: Replace a split that was saved before; its components that are not saved again stay
            if they belong to the new ones. Nothing else is ever overwritten.
        model_type: The expected model type of the checkpoint.
        cache_dir, revision, token, local_files_only: As in ``huggingface_hub``.
        progress: Called with each :class:`Progress`; it may raise to stop. None for a bar on a terminal.

    Returns:
        The saved directory.

    Raises:
        ConfigurationError: Contradicting arguments, or ``out`` exists.
        InsufficientDiskError: The components do not fit on the disk.
        CheckpointError: The source is invalid.
    """
    target, limit, dtype = as_path(out, "out"), parse_shard_size(max_shard_size), dtype_name(dtype)
    earlier = snapshot(target)
    check_target(target, overwrite=overwrite)
    with reporting(progress) as report:
        if not isinstance(source, str | os.PathLike):
            from splitlearn_core.storage.from_modules import parts_in_memory

            if split_points is not None or dtype != "auto":
                raise ConfigurationError(
                    "split_points and dtype are for checkpoints; components in memory have their own",
                    hint="leave them out, or give the checkpoint instead of the components",
                )
            saved = parts_in_memory(source)
        else:
            if split_points is None:
                raise ConfigurationError("no split points were given", hint="give split_points=(a, b)")
            hub: dict[str, Any] = {
                "cache_dir": cache_dir, "revision": revision, "token": token, "local_files_only": local_files_only,
            }  # fmt: skip
            report(Progress("resolving"))
            model = open_model(source, model_type, progress=report, **hub)
            requested = parse_parts(parts, names_of_parts(split_points))
            check_source(model, dtype)
            if dtype == "auto":
                saved = _parts_of_checkpoint(model, split_points, requested, report)
            else:
                from splitlearn_core.storage.from_modules import parts_converted

                saved = parts_converted(model, split_points, requested, dtype, report)
        kept = _kept(target, saved)
        with passing_through(report) as report_unchanged:
            _save(saved, kept, target, earlier, limit, report_unchanged)
    return SplitDirectory.open(target)


def check_target(target: Path, *, overwrite: bool) -> None:
    """Refuse to overwrite anything but an earlier split; raises ConfigurationError."""
    check_place(target)
    if not os.path.lexists(target) or (target.is_dir() and not target.is_symlink() and not any(target.iterdir())):
        return
    if not is_split_directory(target):
        raise ConfigurationError(
            f"{target} exists and is not a saved split: it is not overwritten",
            hint="choose a directory that does not exist yet",
        )
    if not overwrite:
        raise ConfigurationError(
            f"{target} holds a saved split already",
            hint="choose another directory, or overwrite it: overwrite=True, --force",
        )
    try:
        components = SplitDirectory.open(target).components.values()
    except InvalidCheckpointError as error:
        raise ConfigurationError(
            f"{target} is not overwritten, because its manifests cannot be read: {error.message}",
            hint="choose another directory, or remove this one",
        ) from error
    foreign = [
        str(entry)
        for each in components
        for entry in sorted(each.folder.iterdir())
        if entry.name not in (MANIFEST, *each.manifest.files)
    ]
    if foreign:
        raise ConfigurationError(
            f"{target} is not overwritten: {', '.join(foreign[:8])} was not saved with it and would be lost",
            hint="move that elsewhere, or choose another directory",
        )


def check_place(target: Path) -> None:
    """Refuse a path below something that is not a directory; raises ConfigurationError."""
    existing = next(parent for parent in target.absolute().parents if os.path.lexists(parent))
    if not existing.is_dir():
        raise ConfigurationError(
            f"{target} cannot be created: {existing} is not a directory", hint="choose a path below a directory"
        )


def check_source(model: OpenModel, dtype: str | torch.dtype) -> None:
    """Refuse adapters, and quantised weights that are not converted; raises ConfigurationError."""
    if model.checkpoint.has_adapter:
        raise ConfigurationError(
            f"an adapter is next to the weights of {model.name} ({ADAPTER_CONFIG}), and a saved component has none",
            hint="move its files into a folder of their own, and use load_adapter on the components; "
            "or merge it first: PeftModel.from_pretrained(base, FOLDER).merge_and_unload().save_pretrained(DIR)",
        )
    if dtype == "auto" and model.checkpoint.quantization:
        raise ConfigurationError(
            f"{model.name} is quantised ({model.checkpoint.quantization}), and components have plain weights",
            hint="give the dtype to save it in: dtype='bfloat16', --dtype bfloat16",
        )


def _kept(target: Path, parts: Sequence[Part]) -> list[SavedComponent]:
    """Return the components of an earlier split that are kept, because they are not saved again.

    Raises:
        ConfigurationError: They do not belong to those that are saved.
    """
    if not is_split_directory(target):
        return []
    names = {part.origin.component for part in parts}
    if names.issuperset(component_names(len(parts[0].origin.split_points) + 1)):
        return []  # All components are saved: any others are of another split.
    kept = [each for name, each in SplitDirectory.open(target).components.items() if name not in names]
    problems = origin_mismatches([*(part.origin for part in parts), *(each.manifest.origin for each in kept)])
    if kept and problems:
        lost = ", ".join(each.manifest.component for each in kept)
        raise ConfigurationError(
            f"{target} holds {lost} as well, which would not belong to what is saved: {'; '.join(problems)}",
            hint="save all components, or choose another directory",
        )
    return kept


def _parts_of_checkpoint(
    model: OpenModel, split_points: Sequence[int], requested: Sequence[str], report: ProgressCallback
) -> list[Part]:
    planned = plan_and_fetch(model, split_points, requested, "auto", report)
    refuse_misfit(model, planned)
    checkpoint = model.checkpoint
    # In a composite model, tensors that no component uses are those of the others.
    unused = () if model.family.text_config else checkpoint.weight_map
    together = companions(planned.table, unused)
    keys = {
        part: {t.info.key for t in planned.split.component(part).tensors} | set(together[part]) for part in requested
    }
    infos = checkpoint.tensors(sorted(set().union(*keys.values())))
    paths = checkpoint.fetch_tensors(infos.values(), logging_downloads(model.name, report))
    origins = origins_of(model, planned, paths)
    parts, buffers = [], Buffers()
    for component in requested:
        own = sorted((infos[key] for key in keys[component]), key=lambda info: (info.shard, info.begin, info.key))
        small = companion_files(model, kind_of(component), report)
        parts.append(
            Part(
                origin=origins[component],
                own_values=False,
                tensors=tuple(_stored(info, paths[info.shard], buffers) for info in own),
                copied=small if model.checkpoint.source.has_config else {k: v for k, v in small.items() if k != CONFIG},
                written={} if model.checkpoint.source.has_config else {CONFIG: config_text(model.config)},
            )
        )
    return parts


def _stored(info: TensorInfo, path: Path, buffers: Buffers) -> Tensor:
    if info.format == SAFETENSORS:
        pieces = range_pieces(path, info.begin, info.end, buffers)
    else:
        from splitlearn_core.storage.from_modules import torch_file_pieces

        pieces = torch_file_pieces(path, info)
    return Tensor(info.key, info.dtype, info.shape, info.nbytes, pieces)


def _save(
    parts: Sequence[Part],
    kept: Sequence[SavedComponent],
    target: Path,
    earlier: Snapshot,
    limit: int,
    report: ProgressCallback,
) -> None:
    """Write all components to a temporary directory, which then replaces the target."""
    files = {part.origin.component: pack(part.tensors, limit) for part in parts}
    total = sum(file.nbytes for each in files.values() for file in each)
    small = sum(path.stat().st_size for part in parts for path in part.copied.values())
    check_room(target, total + small)
    together = tuple(part.origin.component for part in parts)
    done = 0
    with replacing(target, earlier) as folder:
        for each in kept:
            (folder / each.manifest.component).mkdir()
            for name in (MANIFEST, *each.manifest.files):
                link_durably(each.folder / name, folder / each.manifest.component / name)
        for part in parts:
            component = part.origin.component
            own_folder = folder / component
            own_folder.mkdir()
            records: dict[str, FileRecord] = {}
            for file in files[component]:

                def count(nbytes: int, component: str = component, file: WeightFile = file) -> None:
                    nonlocal done
                    done += nbytes
                    report(Progress("saving", component, done, total, file.name))

                records[file.name] = write_weights(own_folder, file, count)
            texts = dict(part.written)
            if (index := index_of(files[component])) is not None:
                texts[INDEX] = index
            records |= {name: write_text(own_folder / name, text) for name, text in texts.items()}
            records |= {name: copy_durably(path, own_folder / name) for name, path in part.copied.items()}
            manifest = Manifest(part.origin, core_version(), part.own_values, together, records)
            write_text(own_folder / MANIFEST, render_manifest(manifest))
