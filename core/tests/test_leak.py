"""The attacks recover what they must, and nothing from messages of another text."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from splitlearn_core import ConfigurationError, Cut
from splitlearn_core.cli.leak import render_leak
from splitlearn_core.hosts.sessions import SessionTable
from splitlearn_core.leak.attacks import VocabularyMatching, labels_of, trained_inverter
from splitlearn_core.leak.measure import NO_DEFENCE, NO_MESSAGES, SHUFFLED, Leak, LeakSettings, measure_leak
from splitlearn_core.leak.plot import recovery_plot
from splitlearn_core.leak.texts import letters, secrets
from splitlearn_core.loading.opening import open_model
from splitlearn_core.loading.options import LoadOptions
from support.hosts import unix_host

SETTINGS = LeakSettings(windows=4, length=8, known=32, steps=20)
MATCHING, LINEAR, GRU, LABELS = "vocabulary matching", "linear inverter", "GRU inverter", "label matching"


@pytest.fixture
def folder(llama: Any, checkpoint: Callable[[str], Path]) -> Path:
    return checkpoint("single")


PLAIN = Cut()


def measured(folder: Path, cut: Cut = PLAIN, points: tuple[int, ...] = (1, 5), **others: Any) -> Leak:
    settings = replace(SETTINGS, **others.pop("settings", {}))
    return measure_leak(
        open_model(str(folder)), points, "auto", LoadOptions(), cut, settings, lambda step: None, **others
    )


def shares(result: Leak) -> dict[str, float]:
    return {each.attack: each.recovery.share for each in result.attacks}


def test_without_a_defence_everything_is_recovered(folder: Path) -> None:
    """By those who have the ends; nothing from shuffled messages, and from none, but by chance."""
    result = measured(folder)
    found = shares(result)
    assert (found[MATCHING], found[LABELS]) == (1.0, 1.0)
    for attack in result.attacks:
        assert attack.controls[SHUFFLED].share <= 0.2, attack
        assert attack.controls[NO_MESSAGES].share <= 0.2, attack
        assert attack.controls[NO_DEFENCE] == attack.recovery
    exact = {attack.attack: attack.recovery.exact_windows for attack in result.attacks}
    assert (exact[MATCHING], exact[LABELS]) == (4, 4)
    assert result.loss == result.loss_without_cuts
    assert "recovered by these attacks; others may recover more" in render_leak(result)
    json.dumps(result.to_dict())


def test_noise_lowers_recovery_and_costs_loss(folder: Path) -> None:
    """Much noise leaves nothing but chance; the table also has what was recovered without it."""
    result = measured(folder, Cut(clip=1.0, noise=5.0))
    for attack in result.attacks:
        assert attack.recovery.share <= 0.25, attack
    controls = {attack.attack: attack.controls[NO_DEFENCE].share for attack in result.attacks}
    assert (controls[MATCHING], controls[LABELS]) == (1.0, 1.0)
    assert result.loss != result.loss_without_cuts


def test_clipping_and_rounding_alone_are_no_defence(folder: Path) -> None:
    """A direction is as good as the values; eight bits are enough."""
    found = shares(measured(folder, Cut(clip=(0.5, 1e-3), quantize="int8")))
    assert found[MATCHING] == 1.0
    assert found[LABELS] >= 0.9


@pytest.mark.parametrize("points", [(2,), (1, 3, 5)])
def test_other_numbers_of_cuts_are_attacked(folder: Path, points: tuple[int, ...]) -> None:
    """With one cut there is no trunk, and no label matching."""
    found = shares(measured(folder, points=points))
    assert found[MATCHING] == 1.0
    assert found.get(LABELS, 1.0) == 1.0
    assert (LABELS in found) == (len(points) > 1)


def test_messages_to_a_server_are_those_that_are_attacked(folder: Path, tmp_path: Path) -> None:
    """A trunk that is served gives what one that runs here gives."""
    from splitlearn_core import connect, load_split_model

    expected = measured(folder, Cut(noise=0.05))
    trunk = load_split_model(None, (1, 5), folder, parts=("trunk",), progress=False).trunk
    with unix_host(SessionTable(trunk), tmp_path / "trunk.sock") as url:
        remote = connect(url)
        try:
            assert measured(folder, Cut(noise=0.05), remote={"trunk": remote}) == expected
        finally:
            remote.close()


def test_a_result_can_be_repeated(folder: Path) -> None:
    """By its seed, whatever the state of torch; another seed has another text."""
    first = measured(folder, Cut(noise=0.05))
    torch.rand(3)
    assert measured(folder, Cut(noise=0.05)) == first
    assert measured(folder, Cut(noise=0.05), settings={"seed": 1}) != first


def test_the_price_is_stated_or_not(folder: Path) -> None:
    """Bytes as they are encoded; epsilon where there is noise and a bound."""
    result = measured(folder, Cut(quantize=("int8", None)))
    assert result.statement.epsilon is None
    assert any("without noise" in reason for reason in result.statement.reasons)
    sizes = result.bytes_per_token
    assert sizes["sent, forward"] < sizes["received, forward"]
    assert sizes["sent, backward"] == sizes["sent, forward"] + sizes["received, backward"]
    pytest.importorskip("dp_accounting", reason="dp-accounting is not installed: no budget is computed")
    statement = measured(folder, Cut(clip=1.0, noise=1.0)).statement
    assert statement.epsilon == pytest.approx(15.46, abs=0.05)
    assert statement.releases == 2


def test_an_inverter_learns_a_code(folder: Path) -> None:
    """Where each token has a vector of its own, both kinds find all; of other vectors, none."""
    source = torch.Generator().manual_seed(0)
    vectors = torch.randn(20, 16, generator=source)
    known, attacked = (torch.randint(20, (count, 6), generator=source) for count in (64, 8))
    for kind in ("linear", "GRU"):
        inverter = trained_inverter(kind, vectors[known], known, steps=150, seed=0)
        assert torch.equal(inverter(vectors[attacked]), attacked)
        assert float((inverter(vectors[attacked].roll(1, 0)) == attacked).double().mean()) < 0.2


def test_a_bottom_of_no_layer_is_inverted(whole: Any) -> None:
    """An embedding alone: the nearest vector; candidates that are chosen without context include it."""

    class Embedding(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Embedding.from_pretrained(torch.randn(50, 8))

        def new_cache(self) -> Any:
            from transformers import DynamicCache

            return DynamicCache()

        def forward(self, input_ids: torch.Tensor, past_key_values: Any) -> torch.Tensor:
            return self.table(input_ids)

    bottom, text = Embedding(), torch.randint(50, (12,))
    for candidates in (5, 50):
        for scale in (1.0, 0.1):
            attack = VocabularyMatching(bottom, 50, candidates, is_scaled=scale < 1)
            with torch.no_grad():
                assert torch.equal(attack.recover(scale * bottom.table(text)), text)


def test_a_top_gives_its_labels(folder: Path) -> None:
    """The last cut is one layer before the head; what is recovered with little noise is lost with much."""
    from splitlearn_core import load_split_model

    parts = load_split_model(None, (1, 5), folder, progress=False)
    ids = torch.arange(5, 21)[None]
    with torch.no_grad():
        states = parts.trunk(hidden_states=parts.bottom(input_ids=ids))
    states = states.requires_grad_()
    (gradient,) = torch.autograd.grad(parts.top(hidden_states=states, labels=ids).loss, states)
    spread = float(gradient.std())
    for noise, least, most in ((0.0, 1.0, 1.0), (0.01, 0.9, 1.0), (30.0, 0.0, 0.4)):
        size = noise * spread
        given = gradient + size * torch.randn(gradient.shape, generator=torch.Generator().manual_seed(1))
        found = labels_of(parts.top, states, given, noise=size, is_scaled=False)
        assert least <= float((found == ids[0, 1:]).double().mean()) <= most, noise


def test_letters_are_made_from_a_seed() -> None:
    """The same ones each time, other ones for another seed; each secret has a number of its own."""
    assert letters(1, 20) == letters(1, 20) != letters(2, 20)
    made = secrets(1, 50)
    assert len({"".join(c for c in secret if c.isdigit()) for secret in made}) == 50


def test_recovery_is_drawn_against_loss(folder: Path) -> None:
    """A line for each attack, through each of the measurements and the messages without a defence."""
    from xml.etree import ElementTree as ET

    noises, splits = (0.1, 10.0), ((1, 5), (3, 5))
    results = [[measured(folder, Cut(noise=noise), points) for noise in noises] for points in splits]
    drawing = ET.fromstring(recovery_plot(results))
    lines = [element.get("points", "").split() for element in drawing.iter() if element.tag.endswith("polyline")]
    assert [len(line) for line in lines] == [3] * 8
    words = " ".join(element.text or "" for element in drawing.iter())
    assert "others may recover more" in words
    assert all(
        f"{attack.attack}, {cuts}" in words for attack in results[0][0].attacks for cuts in ("1 and 5", "3 and 5")
    )


def test_the_command_prints_a_table_and_draws(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data as JSON or as text; wrong values are wrong usage."""
    from click.testing import CliRunner

    from splitlearn_core.cli import leak
    from splitlearn_core.cli.main import cli

    # Inverters that learn for a short time; how well is measured above.
    monkeypatch.setattr(leak, "LeakSettings", functools.partial(LeakSettings, known=32, steps=20))

    def run(*arguments: str) -> Any:
        given = ["leak", str(folder), "--split", "1", "5", "--windows", "2", "--length", "4", *arguments]
        return CliRunner().invoke(cli, given)

    # How long the attackers learn is no option.
    brief = partial(LeakSettings, known=SETTINGS.known, steps=SETTINGS.steps)
    monkeypatch.setattr("splitlearn_core.cli.leak.LeakSettings", brief)
    picture = tmp_path / "leak.svg"
    drawing = ("--plot", str(picture), "--plot-split", "2", "4")
    drawn = run("--clip", "1,0.5", "--noise", "0.1,-", "--quantize", "int4", "--json", *drawing)
    assert drawn.exit_code == 0, drawn.output
    result = json.loads(drawn.stdout)
    words = "hidden states: clipped to 1, noise of 0.1, rounded to int4; gradients: clipped to 0.5, rounded to int4"
    assert result["cut"] == words
    assert picture.read_text().startswith("<svg")
    assert "label matching, 2 and 4" in picture.read_text()
    assert "others may recover more" in run().stdout
    for wrong in (["--clip", "0"], ["--clip", "1,2,3"], ["--quantize", "int2"], ["--plot", str(picture)], drawing[2:]):
        assert run(*wrong).exit_code == 2, wrong


def test_a_text_without_a_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    """The model of these tests has none, and is attacked with random tokens."""
    (tmp_path / "text.txt").write_text("a text")
    with pytest.raises(ConfigurationError, match="no tokenizer"):
        measured(folder, settings={"text": tmp_path / "text.txt"})
