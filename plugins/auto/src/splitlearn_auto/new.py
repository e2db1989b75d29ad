"""``splitlearn plugins new``: write a package for a model type that no plugin has yet."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from splitlearn_core.cli import json_option, print_json

if TYPE_CHECKING:
    from splitlearn_auto import NewPlugin


@click.command("new", short_help="Write a package for a model type.")
@click.argument("model_type")
@click.option("--out", metavar="DIR", help="The package's folder; new or empty.")
@click.option(
    "--from",
    "origin",
    metavar="CONFIG_OR_MODEL",
    help="A config.json, or a MODEL whose configuration is used.",
)
@click.option(
    "--license",
    "licence",
    type=click.Choice(["Apache-2.0", "MIT", "BSD-3-Clause", "none"]),
    default="Apache-2.0",
    show_default=True,
    help="The licence of the package.",
)
@click.option("--force", is_flag=True, help="Write it even if an installed plugin has the type.")
@click.option("--dry-run", is_flag=True, help="Print the family module, and write nothing; needs no --out.")
@click.option("--revision", help="Branch, tag or commit on the Hub.")
@click.option("--cache-dir", help="Where the Hub's files are kept.")
@click.option("--local-files-only", is_flag=True, help="Do not look on the Hub.")
@json_option
def command(model_type: str, out: str | None, as_json: bool, dry_run: bool, **options: Any) -> None:
    """Write an installable package for MODEL_TYPE, the "model_type" of config.json.

    Creates a small model of the type with random weights, observes it to find its parts, cuts it, and
    compares with the unsplit model. What cannot be derived is left as a question in the file.
    """
    if out is None and not dry_run:
        raise click.UsageError(f"plugins new {model_type}: give --out DIR, the folder of the package, or --dry-run")
    from splitlearn_auto import new_plugin

    made = new_plugin(model_type, out, dry_run=dry_run, **options)
    if as_json:
        print_json(made.to_dict())
    elif dry_run:
        click.echo(made.files[made.family_file], nl=False)
    else:
        click.echo(_render(made))
    for line in _remarks(made):
        click.echo(line, err=True)


def _render(made: NewPlugin) -> str:
    what = f"model type {made.names.model_type} ({made.derived.fields['architecture']})"
    return "\n".join(
        [
            f"{made.names.distribution} for {what} in {made.folder}",
            *(f"  {name}" for name in sorted(made.files)),
            "",
            f"next: pip install -e {made.folder}",
            f"      splitlearn plugins test {made.names.model_type}",
        ]
    )


def _remarks(made: NewPlugin) -> list[str]:
    questions = [
        line
        for question in made.derived.questions
        for line in (f"  {question.field}: {question.text}", *(f"    {seen}" for seen in question.seen.splitlines()))
    ]
    if questions:
        number = len(made.derived.questions)
        head = f"done, but {number} question{'s' * (number > 1)} could not be answered; see {made.family_file}:"
    else:
        ways = ", ".join([*made.derived.variants, *made.derived.attention, *made.derived.dtypes])
        head = f"verified: a small model, cut in three, equals the unsplit model to the last bit ({ways})"
    return [head, *questions, *(f"not covered: {note}" for note in made.derived.notes)]
