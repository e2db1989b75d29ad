"""Measure a split: messages of a text, the attacks on them, the controls, and what the cuts cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from splitlearn_core.errors import ConfigurationError
from splitlearn_core.generation import has_tokenizer, load_tokenizer
from splitlearn_core.leak.texts import letters, secrets
from splitlearn_core.loading.load import import_builders, load_components
from splitlearn_core.loading.opening import OpenModel
from splitlearn_core.loading.options import LoadOptions, check_options
from splitlearn_core.loading.planning import plan_and_fetch
from splitlearn_core.types import Component, ProgressCallback, dtype_name
from splitlearn_core.wire_formats import RAW, encoded_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from splitlearn_core.cuts.cut import Cut
    from splitlearn_core.cuts.ledger import PrivacyStatement
    from splitlearn_core.hosts.remote import RemoteComponent

#: Sentences of the built-in text: those under attack, and those that the attacker knows.
_SENTENCES, _KNOWN_SENTENCES = 60, 900
#: Windows in one forward.
_AT_ONCE = 16
_RESAMPLES = 1_000

NO_DEFENCE, SHUFFLED, NO_MESSAGES = "no defence", "shuffled messages", "no messages"


@dataclass(frozen=True, slots=True)
class LeakSettings:
    """What is attacked, and how much of it."""

    #: The text; by default letters generated from the seed.
    text: Path | None = None
    #: Windows of the text; further windows that begin with a secret; and the tokens of a window.
    windows: int = 8
    secrets: int = 4
    length: int = 24
    #: Windows of other text, for training inverters.
    known: int = 256
    #: Training steps of the inverters.
    steps: int = 300
    #: Tokens that vocabulary matching tries in context at each position.
    candidates: int = 256
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Recovery:
    """What an attack recovered: the share of all tokens, with its 95 % interval over windows."""

    share: float
    interval: tuple[float, float]
    exact_windows: int
    secrets: int


@dataclass(frozen=True, slots=True)
class AttackResult:
    """One attack on the messages, and on those of the controls."""

    attack: str
    #: What the attacker knows.
    attacker: str
    recovery: Recovery
    controls: Mapping[str, Recovery]


@dataclass(frozen=True, slots=True)
class Leak:
    """What was recovered, and the cost of the cuts."""

    model: str
    split_points: tuple[int, ...]
    dtype: str
    text: str
    cut: str
    windows: int
    length: int
    secrets: int
    attacks: tuple[AttackResult, ...]
    #: Loss per token on the attacked text.
    loss: float
    loss_without_cuts: float
    #: Traffic of training for one token, by direction and pass.
    bytes_per_token: Mapping[str, int]
    #: The privacy of one training pass over each window, with frozen ends and secret noise.
    statement: PrivacyStatement
    note: str = field(default="recovered by these attacks; others may recover more")

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        return asdict(self)


def measure_leak(
    model: OpenModel,
    split_points: Sequence[int],
    dtype: str | Mapping[Any, str],
    options: LoadOptions,
    cut: Cut,
    settings: LeakSettings,
    progress: ProgressCallback,
    remote: Mapping[str, RemoteComponent] = {},
    report: Callable[[str], None] = lambda text: None,
) -> Leak:
    """Attack the messages of a split model on the user's checkpoint.

    Args:
        model: The checkpoint.
        split_points: Where it is cut.
        dtype, options: How to load the components.
        cut: The defence at each cut.
        settings: What to attack.
        progress: Called during loads.
        remote: Components that run elsewhere, by name.
        report: Called with a line of text before each stage.

    Raises:
        ConfigurationError: The text is too short, or cannot be read.
    """
    check_options(model, options)
    import_builders(model.family)
    from splitlearn_core.build.torch_state import own_state

    plan = plan_and_fetch(model, split_points, None, dtype, progress).split
    names = [name for name in plan.names if name not in remote]
    local = load_components(model, plan_and_fetch(model, split_points, names, dtype, progress), options, progress)
    parts = [remote.get(name) or local[name] for name in plan.names]
    with own_state(gradients=False):
        return _measure(model, parts, plan.split_points, cut, settings, report)


def _measure(
    model: OpenModel,
    parts: list[Any],
    split_points: tuple[int, ...],
    cut: Cut,
    settings: LeakSettings,
    report: Callable[[str], None],
) -> Leak:
    import torch

    from splitlearn_core.cuts.cut import Cut
    from splitlearn_core.cuts.ledger import TRAINING, PrivacyLedger
    from splitlearn_core.pipeline import SplitCausalLM

    cuts = len(split_points)
    seeded = replace(cut, seed=settings.seed)
    corpus = _corpus(model, settings)
    defended = SplitCausalLM(*parts, cuts=[seeded] * cuts).eval()
    undefended = SplitCausalLM(*parts, cuts=[Cut()] * cuts).eval()
    report(f"sending {len(corpus.attacked)} windows, and {len(corpus.known)} of other text")
    messages_by_defence = {"": _sent(defended, corpus.attacked), NO_DEFENCE: _sent(undefended, corpus.attacked)}
    known_by_defence = {
        "": _sent(defended, corpus.known, gradients=False),
        NO_DEFENCE: _sent(undefended, corpus.known, gradients=False),
    }
    judge = _Judge(corpus, settings.seed)
    results = []
    for attack in _ATTACKS:
        if attack.of_gradients and len(parts) < 3:  # noqa: PLR2004  # bottom, a trunk, top
            continue
        report(f"{attack.name}")
        recovered = {
            name: attack.run(parts, messages, known_by_defence[name], corpus, Cut() if name else cut, settings)
            for name, messages in messages_by_defence.items()
            # Without a defence, both are the same.
            if not name or cut != Cut()
        }
        recovered.setdefault(NO_DEFENCE, recovered[""])
        # Control: each message is attributed to another window's text.
        recovered[SHUFFLED] = recovered[""].roll(1, 0)
        values, counts = torch.unique(corpus.known, return_counts=True)
        recovered[NO_MESSAGES] = torch.full_like(recovered[""], int(values[counts.argmax()]))
        judged = {name: judge.recovery(tokens, of_labels=attack.of_gradients) for name, tokens in recovered.items()}
        results.append(AttackResult(attack.name, attack.attacker, judged.pop(""), judged))
    ledger = PrivacyLedger()
    for release in defended.ledger.releases:
        ledger.count(replace(release, purpose=TRAINING, seeded=False, trained_ends=False), [b"window"])
    return Leak(
        model=model.name,
        split_points=split_points,
        dtype=dtype_name(parts[0].dtype),
        text=corpus.name,
        cut=_describe(cut),
        windows=len(corpus.attacked),
        length=settings.length,
        secrets=len(corpus.secret_lengths),
        attacks=tuple(results),
        loss=messages_by_defence[""].loss,
        loss_without_cuts=messages_by_defence[NO_DEFENCE].loss,
        bytes_per_token=_bytes_per_token(parts, cut),
        statement=ledger.statement(),
    )


# --- the text ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Corpus:
    name: str
    #: Token ids ``[windows, length]``; each of the last ones begins with a secret.
    attacked: torch.Tensor
    known: torch.Tensor
    #: Tokens of each secret.
    secret_lengths: tuple[int, ...]


def _corpus(model: OpenModel, settings: LeakSettings) -> _Corpus:
    import torch

    length, count = settings.length, settings.windows
    if not has_tokenizer(model):
        if settings.text is not None:
            raise ConfigurationError(f"{model.name} has no tokenizer for the text", hint="leave --text out")
        vocabulary = int(model.family.decoder_values(model.config)["vocab_size"])
        source = torch.Generator().manual_seed(settings.seed)
        ids = torch.randint(0, vocabulary, (count + settings.known, length), generator=source)
        return _Corpus("random tokens", ids[:count], ids[count:], ())
    tokenizer = load_tokenizer(model)

    def encoded(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    if settings.text is None:
        name = f"letters of seed {settings.seed}"
        attacked = encoded(letters(2 * settings.seed, _SENTENCES))
        known = encoded(letters(2 * settings.seed + 1, _KNOWN_SENTENCES))
    else:
        name, tokens = settings.text.name, encoded(_read(settings.text))
        # The attacker knows text like the owner's: half of it.
        attacked, known = tokens[len(tokens) // 2 :], tokens[: len(tokens) // 2]
    if min(len(attacked), len(known)) < count * length:
        raise ConfigurationError(
            f"{name} has {len(attacked) + len(known)} tokens, and {2 * count * length} are needed: "
            f"{count} windows of {length}, and as many for the attacker",
            hint="give a longer text, or fewer or shorter windows",
        )
    planted = [encoded(secret)[:length] for secret in secrets(settings.seed, settings.secrets)]
    windows = [attacked[start : start + length] for start in range(0, count * length, length)]
    windows += [[*secret, *attacked][:length] for secret in planted]
    others = len(known) // length
    # Windows overlap if the text is short.
    starts = islice(cycle([*range(0, others * length, length)]), min(settings.known, others))
    return _Corpus(
        name,
        torch.tensor(windows),
        torch.tensor([known[start : start + length] for start in starts]),
        tuple(map(len, planted)),
    )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"the text cannot be read: {error}", hint="check --text; it is UTF-8") from error


# --- the messages --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Sent:
    """Messages as the server gets them, and what it returned."""

    states: torch.Tensor
    outputs: torch.Tensor
    gradients: torch.Tensor | None
    loss: float


def _sent(model: Any, ids: torch.Tensor, *, gradients: bool = True) -> _Sent:
    """Run windows through a model, and record what the server receives in the forward and in the backward pass."""
    import torch

    records: dict[str, list[torch.Tensor]] = {"states": [], "outputs": [], "gradients": []}
    losses = []
    with _watched(model, records), torch.set_grad_enabled(gradients):
        # One window at a time for gradients: their size depends on all labels of a batch.
        for rows in torch.split(ids, 1 if gradients else _AT_ONCE):
            loss = model(input_ids=rows, labels=rows, use_cache=False).loss
            losses.append(float(loss.detach()) * len(rows))
            if gradients:
                loss.backward()
                model.zero_grad()
    joined = {name: torch.cat(tensors) if tensors else None for name, tensors in records.items()}
    states, outputs = joined["states"], joined["outputs"]
    if states is None or outputs is None:
        raise ConfigurationError("no window was sent")
    return _Sent(states, outputs, joined["gradients"], sum(losses) / len(ids))


@contextmanager
def _watched(model: Any, records: dict[str, list[torch.Tensor]]) -> Iterator[None]:
    first, last = model.components[1], model.components[-2]

    def before(_: Any, args: Any, kwargs: Any) -> None:
        records["states"].append((args[0] if args else kwargs["hidden_states"]).detach().cpu())

    def after(_: Any, args: Any, output: torch.Tensor) -> None:
        records["outputs"].append(output.detach().cpu())
        if output.requires_grad:
            catch(output, records["gradients"])

    def catch(output: Any, gradients: list[torch.Tensor]) -> None:
        output.register_hook(lambda gradient: gradients.append(gradient.cpu()))

    hooks = [first.register_forward_pre_hook(before, with_kwargs=True), last.register_forward_hook(after)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


# --- the attacks ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Attack:
    name: str
    attacker: str
    run: Callable[[list[Any], _Sent, _Sent, _Corpus, Cut, LeakSettings], torch.Tensor]
    of_gradients: bool = False


def _match(
    parts: list[Any], sent: _Sent, known: _Sent, corpus: _Corpus, cut: Cut, settings: LeakSettings
) -> torch.Tensor:
    import torch

    from splitlearn_core.cut_stage import STATES
    from splitlearn_core.leak.attacks import VocabularyMatching

    is_scaled = cut.of(STATES).clip is not None
    attack = VocabularyMatching(parts[0], parts[0].decoder_config.vocab_size, settings.candidates, is_scaled=is_scaled)
    return torch.stack([attack.recover(message) for message in sent.states])


def _invert(kind: str) -> Callable[..., torch.Tensor]:
    def run(
        parts: list[Any], sent: _Sent, known: _Sent, corpus: _Corpus, cut: Cut, settings: LeakSettings
    ) -> torch.Tensor:
        from splitlearn_core.leak.attacks import trained_inverter

        states, steps, seed = known.states.float(), settings.steps, settings.seed
        return trained_inverter(kind, states, corpus.known, steps=steps, seed=seed)(sent.states.float())

    return run


def _labels(
    parts: list[Any], sent: _Sent, known: _Sent, corpus: _Corpus, cut: Cut, settings: LeakSettings
) -> torch.Tensor:
    import torch

    from splitlearn_core.cut_stage import GRADIENTS
    from splitlearn_core.leak.attacks import labels_of

    stages = cut.of(GRADIENTS)
    gradients = sent.gradients
    if gradients is None:
        raise ConfigurationError("no gradient came back to the last trunk")
    return torch.stack(
        [
            labels_of(parts[-1], output[None], gradient[None], noise=stages.noise or 0.0, is_scaled=bool(stages.clip))
            for output, gradient in zip(sent.outputs, gradients, strict=True)
        ]
    )


_ATTACKS = (
    _Attack("vocabulary matching", "has the bottom's weights", _match),
    _Attack("linear inverter", "may query the bottom", _invert("linear")),
    _Attack("GRU inverter", "may query the bottom", _invert("GRU")),
    _Attack("label matching", "has the top's weights", _labels, of_gradients=True),
)


class _Judge:
    """Compares recovered tokens with the text."""

    def __init__(self, corpus: _Corpus, seed: int) -> None:
        self._truth, self._secret_lengths, self._seed = corpus.attacked, corpus.secret_lengths, seed

    def recovery(self, tokens: torch.Tensor, *, of_labels: bool) -> Recovery:
        import torch

        offset = int(of_labels)
        correct = tokens == self._truth[:, offset:]
        shares = correct.double().mean(1)
        source = torch.Generator().manual_seed(self._seed)
        resamples = torch.randint(len(shares), (_RESAMPLES, len(shares)), generator=source)
        low, high = shares[resamples].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.double)).tolist()
        with_secret = correct[len(correct) - len(self._secret_lengths) :]
        recovered = [bool(row[: n - offset].all()) for row, n in zip(with_secret, self._secret_lengths, strict=True)]
        return Recovery(float(shares.mean()), (low, high), int(correct.all(1).sum()), sum(recovered))


# --- the cost ------------------------------------------------------------------------------------------


def _bytes_per_token(parts: list[Any], cut: Cut) -> dict[str, int]:
    from splitlearn_core.cut_stage import GRADIENTS, STATES

    width, item = int(parts[0].decoder_config.hidden_size), parts[0].dtype.itemsize
    trunks = [part for part in parts if part.kind is Component.TRUNK]

    def sized(what: str) -> int:
        return encoded_bytes(cut.of(what).quantize or RAW, (1, width), item)

    raw = encoded_bytes(RAW, (1, width), item)
    count = max(len(trunks), 1)
    return {"sent, forward": count * sized(STATES), "received, forward": count * raw} | {
        # For the backward pass, the host computes the forward again.
        "sent, backward": count * (sized(STATES) + sized(GRADIENTS)),
        "received, backward": count * raw,
    }


def _describe(cut: Cut) -> str:
    from splitlearn_core.cut_stage import GRADIENTS, STATES

    described = []
    for content in (STATES, GRADIENTS):
        stages = cut.of(content)
        steps = [
            *([f"clipped to {stages.clip:g}"] if stages.clip is not None else []),
            *([f"noise of {stages.noise:g}"] if stages.noise is not None else []),
            *(stage.name for stage in stages.others),
            *([f"rounded to {stages.quantize}"] if stages.quantize is not None else []),
        ]
        described.append(f"{content}: {', '.join(steps) or 'unchanged'}")
    return "; ".join(described)
