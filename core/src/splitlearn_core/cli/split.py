"""``splitlearn split``: save components of a checkpoint."""

from __future__ import annotations

from typing import Any

import click

from splitlearn_core.cli.dry_run import print_fetch
from splitlearn_core.cli.shared_options import (
    check_shard_size,
    dry_run_option,
    json_option,
    model_options,
    print_json,
    table,
    usage_errors,
)
from splitlearn_core.storage.directory import SplitDirectory
from splitlearn_core.types import ALL_PARTS, human_bytes
from splitlearn_core.user_paths import user_path


@click.command("split", short_help="Save the components, each as a folder.")
@model_options
@click.option("--out", required=True, metavar="DIR", help="The directory to make.")
@click.option("--parts", metavar="NAME,...", help="The components to save, bottom,trunk say; by default all.")
@click.option(
    "--max-shard-size",
    default="5GB",
    show_default=True,
    callback=check_shard_size,
    help="Weights above it are sharded.",
)
@click.option(
    "--force",
    is_flag=True,
    help="Replace a split that was saved before; parts of it that are not saved again stay.",
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
        asked = parse_parts(names, names_of_parts(split_points))
    if split_points is None:
        opened = open_model(model, **others)
        a, b = even_thirds(opened.family, opened.config)
        raise click.UsageError(f"say where to cut what is saved; --split {a} {b} makes even thirds of the layers")
    if dry_run:
        check_target(user_path(out), overwrite=force)
        opened = open_model(model, **others)
        check_source(opened, dtype)
        print_fetch(opened, split_points, dtype, parts=asked, as_json=as_json)
        return
    saved = save_split(
        model, out, split_points, parts=names, dtype=dtype, max_shard_size=max_shard_size, overwrite=force, **others
    )
    if as_json:
        print_json(to_dict(saved))
    else:
        click.echo(render(saved))


def to_dict(saved: SplitDirectory) -> dict[str, Any]:
    """Convert to JSON types."""
    return {
        "path": str(saved.path),
        "components": [
            {
                "component": str(component),
                "folder": str(each.folder),
                "layers": list(each.manifest.origin.layers),
                "dtype": each.manifest.origin.dtype,
                "files": {name: record.size for name, record in each.manifest.files.items()},
            }
            for component, each in saved.components.items()
        ],
    }


def render(saved: SplitDirectory) -> str:
    """Format saved components as text."""
    rows = []
    for component, each in saved.components.items():
        first, last = each.manifest.origin.layers
        weights = each.manifest.weight_files
        size = human_bytes(sum(each.manifest.files[name].size for name in weights))
        rows.append((str(component), f"[{first}, {last})", size, str(len(weights)), str(each.folder)))
    return table(("component", "layers", "weights", "files", "folder"), rows)
