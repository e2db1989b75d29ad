"""``splitlearn split`` and ``splitlearn merge``: save components of a checkpoint, and join saved ones."""

from __future__ import annotations

from typing import Any

import click

from splitlearn_core.arguments import user_path
from splitlearn_core.cli.shared_options import (
    dry_run_option,
    json_option,
    model_options,
    print_fetch,
    print_json,
    table,
    usage_errors,
)
from splitlearn_core.storage.directory import SplitDirectory
from splitlearn_core.types import ALL_PARTS, human_bytes


def _check_shard_size(_: click.Context, __: click.Parameter, value: str) -> str:
    from splitlearn_core.storage.contents import parse_shard_size

    with usage_errors():
        parse_shard_size(value)
    return value


_shard_size_option = click.option(
    "--max-shard-size",
    default="5GB",
    show_default=True,
    callback=_check_shard_size,
    help="Weights above it are sharded.",
)


@click.command("split", short_help="Save the components, each as a folder.")
@model_options
@click.option("--out", required=True, metavar="DIR", help="The directory to make.")
@click.option("--parts", metavar="NAME,...", help="The components to save, such as bottom,trunk; by default all.")
@_shard_size_option
@click.option(
    "--force",
    is_flag=True,
    help="Replace components that were saved there before; those that are not saved again stay.",
)
@dry_run_option
@json_option
def command(
    model: str,
    split_points: tuple[int, ...] | None,
    dtype: str | dict[str, str],
    out: str,
    parts: str | None,
    max_shard_size: str,
    force: bool,
    dry_run: bool,
    as_json: bool,
    **others: Any,
) -> None:
    """Save the components of MODEL into DIR/bottom, DIR/trunk and DIR/top, as they are stored.

    With one cut there is no trunk; with more than two, there are DIR/trunk1, DIR/trunk2 and so on.

    Weights are copied piece by piece, however large they are. DIR appears only when it is complete.
    """
    from splitlearn_core.loading.opening import open_model
    from splitlearn_core.plan.split_points import even_thirds, names_of_parts
    from splitlearn_core.plan.splitplan import parse_parts
    from splitlearn_core.storage.saving import check_source, check_target, save_split

    if not isinstance(dtype, str):
        raise click.BadParameter("give one dtype for all components", param_hint="--dtype")
    names = ALL_PARTS if parts is None else [part.strip() for part in parts.split(",")]
    with usage_errors():
        requested = parse_parts(names, names_of_parts(split_points))
    if split_points is None:
        opened = open_model(model, **others)
        a, b = even_thirds(opened.family, opened.config)
        raise click.UsageError(f"to save components, give --split; --split {a} {b} makes even thirds of the layers")
    if dry_run:
        check_target(user_path(out), overwrite=force)
        opened = open_model(model, **others)
        check_source(opened, dtype)
        print_fetch(opened, split_points, dtype, parts=requested, as_json=as_json)
        return
    saved = save_split(
        model, out, split_points, parts=names, dtype=dtype, max_shard_size=max_shard_size, overwrite=force, **others
    )
    if as_json:
        print_json(_to_dict(saved))
    else:
        click.echo(render_saved_split(saved))


def _to_dict(saved: SplitDirectory) -> dict[str, Any]:
    return {
        "path": str(saved.path),
        "components": [
            {
                "component": str(name),
                "folder": str(component.folder),
                "layers": list(component.manifest.origin.layers),
                "dtype": component.manifest.origin.dtype,
                "files": {file: record.size for file, record in component.manifest.files.items()},
            }
            for name, component in saved.components.items()
        ],
    }


def render_saved_split(saved: SplitDirectory) -> str:
    """Format saved components as text."""
    rows = []
    for name, component in saved.components.items():
        manifest = component.manifest
        first, last = manifest.origin.layers
        size = human_bytes(sum(manifest.files[file].size for file in manifest.weight_files))
        rows.append((str(name), f"[{first}, {last})", size, str(len(manifest.weight_files)), str(component.folder)))
    return table(("component", "layers", "weights", "files", "folder"), rows)


@click.command("merge", short_help="Join saved components into one checkpoint.")
@click.argument("directories", metavar="DIR...", nargs=-1, required=True)
@click.option("--out", required=True, metavar="DIR", help="The directory to make.")
@_shard_size_option
@json_option
def merge_command(directories: tuple[str, ...], out: str, max_shard_size: str, as_json: bool) -> None:
    """Join the components in DIR (or in several) into a checkpoint that transformers loads.

    Its tensors are equal, byte for byte, to those that were split.
    """
    from splitlearn_core.storage.merging import merge_split

    merged = merge_split(*directories, out=out, max_shard_size=max_shard_size)
    if as_json:
        files = {path.name: path.stat().st_size for path in sorted(merged.iterdir())}
        print_json({"path": str(merged), "files": files})
    else:
        click.echo(f"{merged} is a checkpoint again")
