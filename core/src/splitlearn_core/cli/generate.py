"""``splitlearn generate``: text through bottom, trunk and top."""

from __future__ import annotations

import sys
from typing import Any

import click

from splitlearn_core.cli.fetching import print_fetch
from splitlearn_core.cli.options import (
    dry_run_option,
    json_option,
    load_options,
    load_options_of,
    print_json,
    saved_model_options,
)


@click.command("generate", short_help="Continue a prompt, cut in three.")
@saved_model_options
@load_options
@click.option("--prompt", required=True, help="The text to continue.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--temperature", type=click.FloatRange(min=0), default=0.0, help="0: always the likeliest token.")
@click.option("--top-k", type=click.IntRange(min=0), default=50, show_default=True)
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, show_default=True)
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), help="Makes draws repeatable.")
@dry_run_option
@json_option
def command(
    model: str,
    split_points: tuple[int, int] | None,
    dtype: str | dict[str, str],
    prompt: str,
    max_new_tokens: int,
    dry_run: bool,
    as_json: bool,
    revision: str | None,
    cache_dir: str | None,
    local_files_only: bool,
    **others: Any,
) -> None:
    """Continue a prompt with MODEL, cut in three; the text streams as it comes.

    A directory of saved components needs no --split.
    """
    from splitlearn_core.loading import load_all, open_model
    from splitlearn_core.progress import reporting
    from splitlearn_core.storage.directory import holds_components, load_pipeline
    from splitlearn_core.text import generate_text, load_tokenizer

    options, sampling = load_options_of(others), others
    if split_points is None:
        if not holds_components(model):
            raise click.UsageError(f"{model} holds no saved components: say how to cut it, --split A B")
        if dry_run:
            raise click.UsageError("--dry-run goes with --split: saved components are here already")
        split, opened = load_pipeline(model, dtype, options)
        tokenizer = load_tokenizer(opened)
    else:
        opened = open_model(model, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only)
        if dry_run:
            print_fetch(opened, split_points, dtype, as_json=as_json)
            return
        with reporting(None) as report:
            tokenizer = load_tokenizer(opened, report)
            split = load_all(opened, split_points, dtype, options, report)
    show = None if as_json else write_text
    result = generate_text(split, tokenizer, prompt, max_new_tokens, on_text=show, **sampling)
    if as_json:
        print_json(result.to_dict())
        return
    click.echo()
    click.echo(
        f"{result.new_tokens} tokens in {result.seconds:.2f} s: {result.tokens_per_second:.1f} tokens/s", err=True
    )


def write_text(text: str) -> None:
    """Show a piece of text at once."""
    sys.stdout.write(text)
    sys.stdout.flush()
