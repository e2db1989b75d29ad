"""``splitlearn demo``: plan, load, generate and verify with the bundled model, offline."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Self

import click

from splitlearn_core.assembly import load_all
from splitlearn_core.cli.generate import write_text
from splitlearn_core.cli.plan import render_plan
from splitlearn_core.cli.shared_options import json_option, print_json
from splitlearn_core.cli.verify import render_verification
from splitlearn_core.errors import MissingFileError, PluginError
from splitlearn_core.generation import Generation, Sampling, generate_text, load_tokenizer
from splitlearn_core.loading.opening import BUNDLED, OpenModel, open_model
from splitlearn_core.loading.options import LoadOptions
from splitlearn_core.loading.planning import plan_and_fetch
from splitlearn_core.plan.split_points import count_layers
from splitlearn_core.plugins.host import BLOCK_VARIABLE
from splitlearn_core.plugins.registry import ALLOW_VARIABLE, registry
from splitlearn_core.types import Component, Progress, ProgressCallback, human_bytes
from splitlearn_core.verification import Verification, verify_split

if TYPE_CHECKING:
    from splitlearn_core.hosts.process import ProcessHandle
    from splitlearn_core.hosts.remote import RemoteComponent

log = logging.getLogger(__name__)


class Demo:
    """One bundled model, cut after its first sixth and before its last; its trunk has a process of its own.

    Leave it by ``with``, which ends that process.
    """

    def __init__(self, name: str, model: OpenModel) -> None:
        self.name = name
        self._model = model
        layers = count_layers(model.family, model.config)
        edge = max(1, layers // 6)
        self._split_points = (edge, layers - edge)
        self.plan = plan_and_fetch(model, self._split_points, None, "auto", lambda _: None).split
        self._host: ProcessHandle | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._host is not None:
            self._host.kill()

    def host(self, progress: ProgressCallback) -> ProcessHandle:
        """Start the process of the trunk, and wait until it is loaded there."""
        from splitlearn_core.hosts.process import ProcessLoad, start_process

        load = ProcessLoad(self.name, self._split_points, Component.TRUNK, self._model.family.model_type)
        self._host = start_process(load, progress=progress)
        # It waits for the load, and raises why there is none.
        _ = self._host.component
        return self._host

    def generate(self, prompt: str, max_new_tokens: int, seed: int, on_text: Callable[[str], None]) -> Generation:
        """Load bottom and top, and continue a prompt; :meth:`host` comes first."""
        split = load_all(self._model, self._split_points, "auto", LoadOptions(), lambda _: None, self._remote())
        tokenizer = load_tokenizer(self._model)
        sampling = Sampling(temperature=0.8, top_k=40, seed=seed)
        return generate_text(split, tokenizer, prompt, max_new_tokens, sampling, on_text=on_text)

    def verify(self) -> Verification:
        """Compare with the unsplit model."""
        return verify_split(self._model, self._split_points, "auto", LoadOptions(), lambda _: None, self._remote())

    def _remote(self) -> dict[str, RemoteComponent]:
        return {} if self._host is None else {Component.TRUNK: self._host.component}


def open_demo() -> Demo:
    """Open the first model that is bundled with an installed plugin.

    Raises:
        MissingFileError: No installed plugin has one.
    """
    for model_type in registry().model_types():
        try:
            family = registry().family(model_type)
        except PluginError as error:
            log.warning("%s", error)
            continue
        if family.bundled_checkpoint:
            name = f"{BUNDLED}{model_type}"
            return Demo(name, open_model(name))
    raise MissingFileError(
        "no usable plugin has a bundled model",
        hint=f"pip install splitlearn-gpt2, or allow it in {ALLOW_VARIABLE} and {BLOCK_VARIABLE}",
    )


_PROMPT = "The people of the United States"


@click.command("demo", short_help="Plan, load, generate and verify, offline.")
@click.option("--prompt", default=_PROMPT, show_default=True, help="The text to continue.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=60, show_default=True)
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=1, show_default=True)
@json_option
@click.pass_context
def command(ctx: click.Context, prompt: str, max_new_tokens: int, seed: int, as_json: bool) -> None:
    """Plan, load, run and verify the model that is bundled with splitlearn-gpt2. Needs no network."""
    echo = (lambda text: None) if as_json else click.echo
    stream = (lambda text: None) if as_json else write_text
    with open_demo() as demo:
        echo(f"1. The plan: {demo.name}\n")
        echo(render_plan(demo.plan))
        echo("\n2. Loading the trunk, in a process of its own\n")
        host = demo.host(lambda progress: _show_stage(progress, as_json))
        echo(f"   process {host.pid} has the trunk, {os.getpid()} has bottom and top")
        echo("\n3. Generating through bottom -> trunk -> top\n")
        text = demo.generate(prompt, max_new_tokens, seed, stream)
        echo(f"\n\n   {text.new_tokens} tokens, {text.tokens_per_second:.1f} tokens/s")
        echo("\n4. Against the unsplit model\n")
        result = demo.verify()
    if as_json:
        print_json({"plan": demo.plan.to_dict(), "generation": text.to_dict(), "verification": result.to_dict()})
    else:
        echo(render_verification(result))
        echo(_NEXT_STEPS.format(name=demo.name))
    ctx.exit(0 if result.equal else 1)


def _show_stage(progress: Progress, quiet: bool) -> None:
    if quiet:
        return
    name = progress.component or "all"
    if progress.stage == "reading" and progress.bytes_done == progress.bytes_total:
        click.echo(f"   reading   {human_bytes(progress.bytes_done)} of {human_bytes(progress.bytes_total)}", err=True)
    elif progress.stage in ("importing", "building", "ready"):
        click.echo(f"   {progress.stage:<9} {name if progress.stage == 'building' else ''}".rstrip(), err=True)


_NEXT_STEPS = """
Now with a model of your own (a directory, or a name on the Hub):
  splitlearn plan     MODEL --split A B
  splitlearn generate MODEL --split A B --prompt "Once upon a time"
  splitlearn verify   MODEL --split A B
with the trunk on another machine (pip install splitlearn-serve):
  splitlearn serve    MODEL --split A B
  splitlearn generate MODEL --at trunk=http://HOST:8710/trunk --prompt "Once upon a time"
or in Python:
  from splitlearn_core import load_split_model
  trunk = load_split_model(None, (A, B), "MODEL", parts=("trunk",)).trunk
The bundled model is called {name} wherever a command takes a MODEL."""
