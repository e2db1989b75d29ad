"""``splitlearn generate``: text through all components of a model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from splitlearn_core.cli.conversation import converse
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
    usage_errors,
)
from splitlearn_core.errors import ConfigurationError, MissingFileError

if TYPE_CHECKING:
    from splitlearn_core.loading.opening import OpenModel
    from splitlearn_core.types import ProgressCallback


@click.command("generate", short_help="Continue a prompt, or chat, with a split model.")
@model_options
@load_options
@remote_options
@click.option("--prompt", help="The text to continue.")
@click.option(
    "--prompt-file", metavar="FILE", help="A file with the prompt; - for stdin. Its final newline is dropped."
)
@click.option("--chat", is_flag=True, help="Chat with the checkpoint's chat template: --prompt, or each line of stdin.")
@click.option("--system", metavar="TEXT", help="With --chat: the system message.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--stop", multiple=True, metavar="TEXT", help="Stop after this text. Repeatable.")
@click.option("--temperature", type=click.FloatRange(min=0), default=0.0, help="0: always take the likeliest token.")
@click.option("--top-k", type=click.IntRange(min=0), default=50, show_default=True)
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, show_default=True)
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), help="Makes sampling repeatable.")
@dry_run_option
@json_option
def command(
    *,
    model: str,
    split_points: tuple[int, ...] | None,
    dtype: str | dict[str, str],
    prompt: str | None,
    prompt_file: str | None,
    chat: bool,
    system: str | None,
    max_new_tokens: int,
    dry_run: bool,
    as_json: bool,
    revision: str | None,
    cache_dir: str | None,
    local_files_only: bool,
    **others: Any,
) -> None:
    """Continue a prompt with MODEL, cut into components; the text streams as it comes.

    With --chat and no prompt it is a conversation: each line of stdin is a message. At a terminal,
    Ctrl-C stops an answer, and Ctrl-D ends.

    A directory of saved components needs no --split. With --at, bottom and top are loaded here, and the
    trunk runs on its server.
    """
    from splitlearn_core.checkpoint.manifest import holds_components
    from splitlearn_core.generation import Conversation, Sampling, generate_text
    from splitlearn_core.loading.opening import open_model
    from splitlearn_core.progress import reporting

    _check_prompts(prompt, prompt_file, system, chat=chat, needed=not dry_run)
    options = load_options_of(others, split_points)
    with usage_errors():
        sampling = Sampling(**{name: others.pop(name) for name in ("temperature", "top_k", "top_p", "seed", "stop")})
    if split_points is None and holds_components(model):
        if dry_run:
            raise click.UsageError("--dry-run is for models: saved components are here already")
        prompt = _read_prompt(prompt_file) if prompt_file is not None else prompt
        # Imports torch, which wrong usage and a dry run must not wait for; so below.
        from splitlearn_core.assembly import load_saved

        split, opened = load_saved(model, dtype, options, connect_all(others))
        with reporting(None) as report:
            tokenizer = _tokenizer(opened, report, chat=chat)
    else:
        opened = open_model(model, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only)
        remote = {} if dry_run else connect_all(others)
        split_points = split_points_of(opened, split_points, remote)
        if dry_run:
            print_fetch(opened, split_points, dtype, as_json=as_json)
            return
        # Before the weights: loading may take long.
        prompt = _read_prompt(prompt_file) if prompt_file is not None else prompt
        with reporting(None) as report:
            tokenizer = _tokenizer(opened, report, chat=chat)
            from splitlearn_core.assembly import load_all

            split = load_all(opened, split_points, dtype, options, report, remote)
    show = None if as_json else write_text
    if chat:
        conversation = Conversation(split, tokenizer, max_new_tokens, sampling, system=system)
        if prompt is None:
            converse(conversation, show)
            return
        result = conversation.answer(prompt, on_text=show)
    else:
        result = generate_text(split, tokenizer, prompt or "", max_new_tokens, sampling, on_text=show)
    if as_json:
        print_json(result.to_dict())
        return
    click.echo()
    click.echo(
        f"{result.new_tokens} tokens in {result.seconds:.2f} s: {result.tokens_per_second:.1f} tokens/s", err=True
    )


def write_text(text: str) -> None:
    """Print a piece of text at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def _read_prompt(name: str) -> str:
    """Read a prompt from a file or stdin, without the final line end that editors add."""
    try:
        raw = sys.stdin.buffer.read() if name == "-" else Path(name).expanduser().read_bytes()
        return raw.decode().removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise ConfigurationError(
            f"the prompt in {name} is not UTF-8 text: {error}", hint="convert it: iconv -t UTF-8"
        ) from error
    except (OSError, RuntimeError, ValueError) as error:
        raise MissingFileError(f"the prompt cannot be read: {error}", hint="check --prompt-file") from error


def _check_prompts(
    prompt: str | None, prompt_file: str | None, system: str | None, *, chat: bool, needed: bool
) -> None:
    if prompt is not None and prompt_file is not None:
        raise click.UsageError("--prompt and --prompt-file are both given: give one of them")
    if system is not None and not chat:
        raise click.UsageError("--system goes with --chat")
    if needed and not chat and prompt is None and prompt_file is None:
        raise click.UsageError("give the text to continue: --prompt TEXT, --prompt-file FILE (- for stdin), or --chat")


def _tokenizer(opened: OpenModel, report: ProgressCallback, *, chat: bool) -> Any:
    from splitlearn_core.generation import check_chat_template, load_tokenizer

    tokenizer = load_tokenizer(opened, report)
    if chat:
        check_chat_template(tokenizer)
    return tokenizer
