"""``splitlearn serve``: a manager that keeps running, with sessions, a page, an API, metrics and health."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from splitlearn_core.cli import split_option

if TYPE_CHECKING:
    from splitlearn_core.extension import ConfigFile

_Command = TypeVar("_Command", bound=Callable[..., Any])
_FILE = click.Path(path_type=Path)
#: Options of MODEL -> fields of a model's configuration.
_MODEL_OPTIONS = ("dtype", "device", "strategy", "attn_implementation", "revision", "cache_dir", "local_files_only")
#: Options of MODEL alone.
_WITH_MODEL = ("split_points", "part", *_MODEL_OPTIONS)
_DATA_OWNERS = ("bottom", "top")


def _options(*options: Callable[[_Command], _Command]) -> Callable[[_Command], _Command]:
    def add(command: _Command) -> _Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add


_model_options = _options(
    split_option("Layers of the cuts of MODEL."),
    click.option("--part", help="The trunk of MODEL to serve; by default trunk."),
    click.option("--dtype", default="auto", show_default=True, help="float32, bfloat16, float16, ... or auto."),
    click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, ..."),
    click.option("--strategy", default="auto", show_default=True, help="How the weights are read."),
    click.option("--attn-implementation", help="eager, sdpa, ...; by default what transformers chooses."),
    click.option("--revision", help="Branch, tag or commit on the Hub."),
    click.option("--cache-dir", help="Where the Hub's files are kept."),
    click.option("--local-files-only", is_flag=True, help="Do not contact the Hub."),
)
_address_options = _options(
    click.option("--host", default="127.0.0.1", show_default=True, help="The address to serve at."),
    click.option(
        "--port",
        type=click.IntRange(0, 65535),
        default=8710,
        show_default=True,
        help="0 for any free one, which is printed.",
    ),
    click.option(
        "--allow-remote",
        is_flag=True,
        help="Serve at an address that others can reach: they see the page and metrics, and with a token use, "
        "load and unload models.",
    ),
    click.option(
        "--allow-host", "names", multiple=True, metavar="NAME", help="A name under which others reach it. Repeatable."
    ),
    click.option("--token-file", type=_FILE, help="A file of accepted tokens; else SPLITLEARN_TOKEN."),
    click.option("--tls-cert", type=_FILE, help="The server's certificate, a PEM file: serve with TLS."),
    click.option("--tls-key", type=_FILE, help="The key of the certificate, a PEM file."),
)
_session_options = _options(
    click.option("--max-sessions", type=click.IntRange(1), help="Maximum number of sessions on one model (256)."),
    click.option("--max-tokens", type=click.IntRange(1), help="Maximum number of tokens of a sequence (32768)."),
    click.option("--session-timeout", metavar="TIME", help="Idle time after which a session ends: 600, 10m (10m)."),
    click.option(
        "--cache-memory",
        type=click.FloatRange(0, min_open=True),
        metavar="MB",
        help="Memory for caches of one model's sessions.",
    ),
    click.option(
        "--next",
        "next_urls",
        multiple=True,
        metavar="URL",
        help="A server with the next trunk, to which outputs may be sent on. Repeatable.",
    ),
    click.option("--next-token-file", type=_FILE, help="A file with this server's token for those of --next."),
    click.option("--next-ca-file", type=_FILE, help="Certificates to trust for them."),
    click.option("--no-training", is_flag=True, help="Refuse adapters and gradients, whatever a token allows."),
)


@click.command("serve", short_help="Run trunks for others, and keep models loaded.")
@click.argument("model", required=False)
@click.option("--config", "config_file", type=_FILE, help="The models to load: a YAML, TOML or JSON file.")
@_model_options
@_address_options
@_session_options
@click.pass_context
def command(
    ctx: click.Context,
    /,
    model: str | None,
    config_file: Path | None,
    split_points: tuple[int, ...] | None,
    part: str | None,
    **others: Any,
) -> None:
    """Serve the trunk of MODEL, or the models of a file, with a page, JSON, metrics and health.

    The owner of bottom and top uses the trunk at the URL that is printed:
    `splitlearn generate MODEL --split A B --at trunk=URL --prompt TEXT`.

    Ends with SIGINT or SIGTERM. On loopback no token is needed unless one is given; any other address
    needs --allow-remote and a token.
    """
    from splitlearn_serve.signals import exit_at_once

    if (model is None) == (config_file is None):
        raise click.UsageError("give either MODEL --split A B, or --config FILE")
    if config_file is not None:
        conflicting = [name for name in _WITH_MODEL if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE]
        if conflicting:
            names = ", ".join(
                "--split" if name == "split_points" else f"--{name.replace('_', '-')}" for name in conflicting
            )
            raise click.UsageError(f"{names}: with --config, the file says this for each model")
    elif split_points is None:
        raise click.UsageError("MODEL needs --split A B, the same as where bottom and top are")
    if part in _DATA_OWNERS:
        raise click.UsageError(
            f"a {part} is not served: it has the data owner's embeddings or head, and runs where the data is"
        )
    with exit_at_once():
        _serve(model, config_file, split_points or (), part, others)


def _serve(
    model: str | None, config_file: Path | None, split_points: tuple[int, ...], part: str | None, others: dict[str, Any]
) -> None:
    # The import takes a second, in which a signal may arrive.
    from splitlearn_serve.run import Access, Address, read_configuration, run_server

    host = others["host"]
    address = Address(host, others["port"], others["names"])
    if not others["allow_remote"] and not address.is_loopback:
        raise click.UsageError(
            f"{host} can be reached from other machines, which see the status page and, with a token, use and change "
            "models; say --allow-remote if that is meant"
        )
    _log_to_stderr()
    sessions = {
        name: others[name]
        for name in ("max_sessions", "max_tokens", "session_timeout", "cache_memory", "next_token_file", "next_ca_file")
        if others[name] is not None
    }
    if others["next_urls"]:
        sessions["next"] = list(others["next_urls"])
    if others["no_training"]:
        sessions["training"] = False
    if model is not None:
        fields = {name: others[name] for name in _MODEL_OPTIONS if others[name] not in (None, False)}
        configuration = trunk_configuration(model, split_points, part, fields)
    elif config_file is not None:
        configuration = read_configuration(config_file)
    for name in ("next_token_file", "next_ca_file"):
        if name in sessions and not (others["next_urls"] or configuration.sessions.get("next")):
            raise click.UsageError(f"--{name.replace('_', '-')}: there is no --next URL that it could be for")

    def announce(url: str) -> None:
        click.echo(f"Serving at {url}", err=True)
        if model is not None:
            (config,) = configuration.models
            click.echo(f"{config.model_id} at {url}/{config.model_id}", err=True)

    access = Access(others["token_file"], others["tls_cert"], others["tls_key"])
    run_server(configuration, address, announce, access, sessions)


def trunk_configuration(
    model: str, split_points: tuple[int, ...], part: str | None, fields: dict[str, Any]
) -> ConfigFile:
    """Return the configuration of one trunk, whose id is its name.

    Raises:
        ConfigurationError: The model has no such trunk.
        SplitLearnError: It cannot be found, read or cut so.
    """
    from splitlearn_core import ConfigurationError, ModelConfig, plan_split
    from splitlearn_core.extension import ConfigFile

    trunks = [f"trunk{number}" for number in range(1, len(split_points))]
    trunks = ["trunk"] if len(trunks) == 1 else trunks
    part = part or "trunk"
    if part not in trunks:
        cuts = " ".join(map(str, split_points))
        raise ConfigurationError(
            f"--split {cuts} gives no {part}: it gives {' and '.join(trunks) or 'a bottom and a top alone'}",
            hint=f"--part {trunks[0]}" if trunks else "give two numbers: the first layers of the trunk and of the top",
        )
    hub = {name: fields[name] for name in ("revision", "cache_dir", "local_files_only") if name in fields}
    plan = plan_split(model, split_points, parts=(part,), dtype=fields.get("dtype", "auto"), **hub)
    config = ModelConfig(
        model_id=part,
        model_type=plan.model_type,
        model_path=model,
        component=part,
        split_points=split_points,
        required=True,
        pinned=True,
        **fields,
    )
    return ConfigFile((config,), {})


def _log_to_stderr() -> None:
    """Log a line for each change of a model's status."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.WARNING)
    for package in ("splitlearn_core", "splitlearn_serve"):
        logging.getLogger(package).setLevel(logging.INFO)
