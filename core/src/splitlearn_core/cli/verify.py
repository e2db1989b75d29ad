"""``splitlearn verify``: compare a split model with the unsplit one, or saved components with their manifests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click
from click.core import ParameterSource

from splitlearn_core.cli.shared_options import (
    connect_all,
    dry_run_option,
    json_option,
    load_options,
    load_options_of,
    model_options,
    print_fetch,
    print_json,
    remote_options,
    split_points_of,
    table,
)
from splitlearn_core.plan.split_points import describe_cuts
from splitlearn_core.storage.directory import SavedVerification
from splitlearn_core.types import human_bytes
from splitlearn_core.verification import Verification


@click.command("verify", short_help="Compare with the unsplit model, or with manifests.")
@model_options
@load_options
@remote_options
@dry_run_option
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    /,
    model: str,
    split_points: tuple[int, ...] | None,
    dtype: str | dict[str, str],
    dry_run: bool,
    as_json: bool,
    **others: Any,
) -> None:
    """Compare MODEL, cut into components, with MODEL unsplit. Exit code 1 where a bit differs.

    With --at, the trunk at that server is compared, and its round trips and traffic are measured.

    Where MODEL is a directory of saved components, and --split is left out, their files are
    compared with their manifests (hashes, sizes, tensors, ties), and the components with each other.
    """
    from splitlearn_core.checkpoint.manifest import holds_components
    from splitlearn_core.loading.opening import open_model
    from splitlearn_core.progress import reporting
    from splitlearn_core.verification import verify_split

    if split_points is None and holds_components(model):
        if dry_run:
            raise click.UsageError("--dry-run is for models: saved components are here already")
        refused = [
            "--at" if name == "remote" else f"--{name.replace('_', '-')}"
            for name in ("dtype", *others)
            if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE
        ]
        if refused:
            raise click.UsageError(
                f"{', '.join(refused)}: for a comparison with the unsplit model; files are compared with manifests"
            )
        ctx.exit(0 if _verify_saved(model, as_json=as_json) else 1)
    options = load_options_of(others, split_points)
    elsewhere = {name: others.pop(name) for name in ("remote", "token_file", "ca_file")}
    opened = open_model(model, **others)
    remote = {} if dry_run else connect_all(elsewhere)
    split_points = split_points_of(opened, split_points, remote)
    if dry_run:
        print_fetch(opened, split_points, dtype, whole=True, as_json=as_json)
        return
    with reporting(None) as report:
        result = verify_split(opened, split_points, dtype, options, report, remote)
    if as_json:
        print_json(result.to_dict())
    else:
        click.echo(render_verification(result))
    ctx.exit(0 if result.equal else 1)


def _verify_saved(directory: str, *, as_json: bool) -> bool:
    from splitlearn_core.progress import reporting
    from splitlearn_core.storage.directory import verify_saved

    with reporting(None) as report:
        result = verify_saved(directory, progress=report)
    if as_json:
        print_json(result.to_dict())
    else:
        click.echo(render_saved(result))
    return result.sound


def render_saved(result: SavedVerification) -> str:
    """Format the verification of saved components as text."""
    names = ", ".join(result.components)
    verdict = "as it was saved" if result.sound else f"{len(result.problems)} FAULTS"
    whole = "" if result.complete else " (not a whole model)"
    faults = [f"fault   {problem}" for problem in result.problems]
    return "\n".join([f"{result.path}: {names}{whole}, {human_bytes(result.nbytes)} hashed", *faults, verdict])


#: Explains a component of 300 MB that took 0 B.
_MEMORY_NOTE = "memory taken: beyond pages of the weight files, which are mapped, and given back where memory is short"


def render_verification(result: Verification) -> str:
    """Format a comparison as text."""
    elsewhere = {link.component for link in result.links}
    rows = [
        (
            str(cost.component),
            f"[{cost.layers[0]}, {cost.layers[1]})",
            *(
                ("elsewhere", "", "")
                if cost.component in elsewhere
                else (
                    human_bytes(cost.bytes),
                    human_bytes(cost.anonymous_bytes),
                    f"{cost.load_seconds * 1000:.0f} ms",
                )
            ),
            f"{cost.forward_seconds * 1000:.1f} ms",
        )
        for cost in result.components
    ]
    unsplit = (f"{result.unsplit_load_seconds * 1000:.0f} ms", f"{result.unsplit_forward_seconds * 1000:.1f} ms")
    rows.append(("unsplit", "", "", "", *unsplit))
    links = [
        f"{link.component} at {link.url}: {link.round_trips} round trips, "
        f"{human_bytes(link.bytes_per_token)} per token, both ways"
        for link in result.links
    ]
    verdict = "equal to the last bit" if result.equal else "NOT equal"
    return "\n".join(
        [
            f"{result.model} cut at {describe_cuts(result.split_points)}, {result.dtype}, {result.input}",
            "",
            table(("component", "layers", "bytes", "memory taken", "load", "forward"), rows),
            _MEMORY_NOTE,
            "",
            *links,
            *render_checks(result.checks),
            f"{verdict}; maximum difference {result.max_difference:g}",
        ]
    )


def render_checks(checks: Mapping[str, bool]) -> list[str]:
    """Format comparisons, a line each."""
    return [f"{'equal' if equal else 'DIFFERS':<8}{name}" for name, equal in checks.items()]
