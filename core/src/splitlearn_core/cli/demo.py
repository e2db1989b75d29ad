"""``splitlearn demo``: plan, load, generate and verify, or fine-tune, with the bundled model, offline."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Self

import click

from splitlearn_core.assembly import load_all
from splitlearn_core.cli.generate import write_text
from splitlearn_core.cli.plan import render_plan
from splitlearn_core.cli.shared_options import json_option, print_json
from splitlearn_core.cli.verify import render_checks, render_verification
from splitlearn_core.errors import ConfigurationError, MissingFileError, PluginError
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
    from splitlearn_core.fine_tuning.comparison import FineTuning, TuningRecipe
    from splitlearn_core.hosts.process import ProcessHandle
    from splitlearn_core.hosts.remote import RemoteComponent

log = logging.getLogger(__name__)


class Demo:
    """One bundled model, cut after its first sixth and before its last; its trunk has a process of its own.

    Leave it by ``with``, which ends that process.
    """

    def __init__(self, name: str, model: OpenModel, dtype: str = "auto") -> None:
        self.name = name
        self._model, self._dtype = model, dtype
        layers = count_layers(model.family, model.config)
        edge = max(1, layers // 6)
        self._split_points = (edge, layers - edge)
        self.plan = plan_and_fetch(model, self._split_points, None, dtype, lambda _: None).split
        self._host: ProcessHandle | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._host is not None:
            self._host.kill()

    def host(self, progress: ProgressCallback) -> ProcessHandle:
        """Start the process of the trunk, and wait until it is loaded there."""
        from splitlearn_core.hosts.process import ProcessLoad, start_process

        model_type = self._model.family.model_type
        load = ProcessLoad(self.name, self._split_points, Component.TRUNK, model_type, dtype=self._dtype)
        self._host = start_process(load, progress=progress)
        # It waits for the load, and raises why there is none.
        _ = self._host.component
        return self._host

    def generate(self, prompt: str, max_new_tokens: int, seed: int, on_text: Callable[[str], None]) -> Generation:
        """Load bottom and top, and continue a prompt; :meth:`host` comes first."""
        split = load_all(self._model, self._split_points, self._dtype, LoadOptions(), lambda _: None, self._remote())
        tokenizer = load_tokenizer(self._model)
        sampling = Sampling(temperature=0.8, top_k=40, seed=seed)
        return generate_text(split, tokenizer, prompt, max_new_tokens, sampling, on_text=on_text)

    def verify(self) -> Verification:
        """Compare with the unsplit model."""
        return verify_split(self._model, self._split_points, self._dtype, LoadOptions(), lambda _: None, self._remote())

    def fine_tune(self, recipe: TuningRecipe, on_step: Callable[[int, float, float | None], None]) -> FineTuning:
        """Learn an adapter on the unsplit model, and with the trunk in its process, and compare the two."""
        from splitlearn_core.fine_tuning.comparison import compare_fine_tuning

        return compare_fine_tuning(self._model, self._split_points, self._remote(), recipe, on_step)

    def _remote(self) -> dict[str, RemoteComponent]:
        return {} if self._host is None else {Component.TRUNK: self._host.component}


def open_demo(dtype: str = "auto") -> Demo:
    """Open the first model that is bundled with an installed plugin.

    Args:
        dtype: That of its components.

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
            return Demo(name, open_model(name), dtype)
    raise MissingFileError(
        "no usable plugin has a bundled model",
        hint=f"pip install splitlearn-gpt2, or allow it in {ALLOW_VARIABLE} and {BLOCK_VARIABLE}",
    )


_PROMPT = "The people of the United States"


@click.command("demo", short_help="Plan, load, generate and verify, offline.")
@click.option("--prompt", default=_PROMPT, show_default=True, help="The text to continue.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=60, show_default=True)
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=1, show_default=True)
@click.option(
    "--train", is_flag=True, help="Fine-tune it on Shakespeare's sonnets instead, split and unsplit. Needs peft."
)
@click.option("--steps", type=click.IntRange(min=1), help="With --train: steps of the optimizer. [default: 40]")
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    metavar="FILE",
    help="With --train: draw both losses over the steps, as SVG.",
)
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    prompt: str,
    max_new_tokens: int,
    seed: int,
    train: bool,
    steps: int | None,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Plan, load, run and verify the model that is bundled with splitlearn-gpt2. Needs no network.

    With --train it is fine-tuned: an adapter on all layers is learned with the trunk in a process of
    its own, and again on the unsplit model, and the two are compared to the last bit.
    """
    if not train and (steps is not None or plot is not None):
        raise click.UsageError("--steps and --plot go with --train")
    if not prompt:
        raise click.BadParameter("it is empty: give at least one word", param_hint="--prompt")
    if plot is not None and not plot.parent.is_dir():
        raise click.BadParameter(f"there is no folder {plot.parent}", param_hint="--plot")
    if train:
        ctx.exit(_train(prompt, max_new_tokens, seed, steps, plot, as_json))
    echo = (lambda text: None) if as_json else click.echo
    stream = (lambda text: None) if as_json else write_text
    with open_demo() as demo:
        _begin(demo, as_json)
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


def _begin(demo: Demo, as_json: bool) -> None:
    """Show the plan, and load the trunk."""
    echo = (lambda text: None) if as_json else click.echo
    echo(f"1. The plan: {demo.name}\n")
    echo(render_plan(demo.plan))
    echo("\n2. Loading the trunk, in a process of its own\n")
    shown = {""}

    def show(progress: Progress) -> None:
        line = _stage(progress)
        if line not in shown and not as_json:
            click.echo(line, err=True)
        shown.add(line)

    host = demo.host(show)
    echo(f"   process {host.pid} has the trunk, {os.getpid()} has bottom and top")


def _train(prompt: str, max_new_tokens: int, seed: int, steps: int | None, plot: Path | None, as_json: bool) -> int:
    """Fine-tune, and print what came of it; return the exit code."""
    from splitlearn_core.adapters.peft_models import import_peft

    # Before anything is loaded.
    import_peft()
    from splitlearn_core.fine_tuning.comparison import TUNING_DTYPE, TuningRecipe, loss_plot

    recipe = TuningRecipe(seed=seed, prompt=prompt, max_new_tokens=max_new_tokens)
    recipe = recipe if steps is None else replace(recipe, steps=steps)
    echo = (lambda text: None) if as_json else click.echo

    def show_step(number: int, unsplit: float, split: float | None) -> None:
        if number not in (1, recipe.steps) and number % max(1, recipe.steps // 8):
            return
        if split is None:
            click.echo(f"   unsplit, step {number} of {recipe.steps}", err=True)
        else:
            equal = "equal" if split == unsplit else "DIFFERS"
            echo(f"   {number:4d}  {unsplit:12.6f}  {split:12.6f}  {equal}")

    with open_demo(TUNING_DTYPE) as demo:
        _begin(demo, as_json)
        echo("\n3. Fine-tuning on Shakespeare's sonnets, with LoRA on all layers: unsplit, and then split\n")
        echo("   step  loss unsplit    loss split")
        result = demo.fine_tune(recipe, show_step)
    if as_json:
        print_json({"plan": demo.plan.to_dict(), "fine_tuning": result.to_dict()})
    else:
        echo(f"\n4. Against the unsplit training\n\n{render_fine_tuning(result)}")
    # Last, so that a place where it cannot be written costs no result.
    if plot is not None:
        try:
            plot.write_text(loss_plot(result), encoding="utf-8")
        except OSError as error:
            hint = "choose another file; the results are above"
            raise ConfigurationError(f"cannot write {plot}: {error.strerror}", hint=hint) from error
    return 0 if result.equal else 1


def render_fine_tuning(result: FineTuning) -> str:
    """Format a fine-tuning and its comparison with the unsplit one as text."""
    steps = len(result.losses)
    sent, received = (human_bytes(round(n)) for n in (result.bytes_sent_per_step, result.bytes_received_per_step))
    rows = [
        (
            "time of a step",
            f"{1000 * result.seconds / steps:.0f} ms, unsplit {1000 * result.unsplit_seconds / steps:.0f} ms",
        ),
        ("crossed in a step", f"{sent} to the trunk, {received} from it"),
        (
            "trained",
            f"{result.parameters:,} parameters, {result.parameters_elsewhere:,} of them of the trunk's adapters",
        ),
        ("loss on poems held out", f"{result.held_out_loss_before:.3f} before, {result.held_out_loss_after:.3f} after"),
    ]
    return "\n".join(
        (
            *render_checks(result.checks),
            "equal to the last bit" if result.equal else "NOT equal",
            "",
            *(f"{name:<24}{value}" for name, value in rows),
            f"\nbefore: {result.text_before}",
            f"\nafter: {result.text_after}",
        )
    )


def _stage(progress: Progress) -> str:
    """Say where a load stands; nothing where there is nothing new to say."""
    if progress.stage == "reading" and progress.bytes_done == progress.bytes_total:
        return f"   reading   {human_bytes(progress.bytes_done)} of {human_bytes(progress.bytes_total)}"
    if progress.stage in ("importing", "building", "ready"):
        name = progress.component or "all"
        return f"   {progress.stage:<9} {name if progress.stage == 'building' else ''}".rstrip()
    return ""


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
