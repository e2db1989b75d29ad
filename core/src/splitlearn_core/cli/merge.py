"""``splitlearn merge``: saved components become one Hugging Face checkpoint."""

from __future__ import annotations

import click

from splitlearn_core.cli.shared_options import check_shard_size, json_option, print_json


@click.command("merge", short_help="Make one checkpoint of saved components again.")
@click.argument("directories", metavar="DIR...", nargs=-1, required=True)
@click.option("--out", required=True, metavar="DIR", help="The directory to make.")
@click.option(
    "--max-shard-size",
    default="5GB",
    show_default=True,
    callback=check_shard_size,
    help="Weights above it are sharded.",
)
@json_option
def command(directories: tuple[str, ...], out: str, max_shard_size: str, as_json: bool) -> None:
    """Put the components in DIR (or in several) together: a checkpoint that transformers loads.

    Its tensors are those that were split, byte for byte.
    """
    from splitlearn_core.storage.merging import merge_split

    merged = merge_split(*directories, out=out, max_shard_size=max_shard_size)
    if as_json:
        files = {path.name: path.stat().st_size for path in sorted(merged.iterdir())}
        print_json({"path": str(merged), "files": files})
    else:
        click.echo(f"{merged} is a checkpoint again")
