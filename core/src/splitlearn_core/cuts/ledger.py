"""The record of what was released at the cuts, and its privacy budget where that can be stated."""

from __future__ import annotations

import hashlib
import secrets
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from splitlearn_core.cut_stage import STATES
from splitlearn_core.errors import ConfigurationError

TRAINING, EVALUATION, GENERATION = PURPOSES = ("training", "evaluation", "generation")

_UNIT = "one window: one sequence of a batch, replaced by another one of the same length"
_ASSUMPTIONS = (
    "the server sees every message, and knows everything but one window",
    "sensitivity 2C: all positions of a window are clipped together to the norm C, and one window is replaced",
    "no text is in two windows, and no computation of the model mixes the windows of a batch",
    "masks, positions, and the numbers of tokens and of labels are known to the server",
    "nothing else that depends on the windows is sent: no adapters but those computed from the server's replies alone",
    "noise of real numbers: that of floating-point numbers gives away some low bits",
)
_KEY_BYTES, _DIGEST_BYTES = 32, 12


@dataclass(frozen=True, slots=True)
class Release:
    """One kind of message that left the data owner."""

    purpose: str
    #: The number of the cut, from 0 on, and what crossed it.
    cut: int
    what: str
    clip: float | None
    noise: float | None
    #: Whether the noise is reproducible from a seed.
    seeded: bool
    #: Whether bottom or top were being trained.
    trained_ends: bool

    def refusals(self) -> list[str]:
        """Return the reasons why no budget can be stated for it."""
        what = f"{self.what} at cut {self.cut + 1} in {self.purpose}"
        reasons = [] if self.noise is not None else [f"{what} were sent without noise"]
        reasons += (
            [] if self.clip is not None else [f"{what} were not clipped, so that one window may change any amount"]
        )
        reasons += [f"{what} had noise of a given seed, which can be subtracted"] if self.seeded else []
        if self.trained_ends:
            reasons.append(f"bottom or top were trained: {what} of one window then depend on all others")
        if self.purpose == GENERATION:
            reasons.append(f"{what} were sent in pieces, and a window is clipped as a whole only")
        return reasons


@dataclass(frozen=True, slots=True)
class PrivacyStatement:
    """A statement of the ledger, or the reasons for stating nothing."""

    #: None if it is not stated.
    epsilon: float | None
    delta: float
    unit: str
    #: The number of messages of the window of which most was released.
    releases: int
    assumptions: tuple[str, ...]
    #: Why epsilon is not stated.
    reasons: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class PrivacyLedger:
    """Counts what was released at the cuts of a model: in training, evaluation and generation.

    The model keeps it (``model.ledger``); pass it to another model to go on counting.
    """

    def __init__(self) -> None:
        self._key = secrets.token_bytes(_KEY_BYTES)
        self._lock = threading.Lock()
        #: Counts of messages, each of one window: over all windows, and by window.
        self._all: Counter[Release] = Counter()
        self._by_window: dict[bytes, Counter[Release]] = {}

    def window(self, content: bytes | memoryview) -> bytes:
        """Return the name of a window: a hash keyed by this ledger."""
        return hashlib.blake2b(content, key=self._key, digest_size=_DIGEST_BYTES).digest()

    def count(self, release: Release, windows: list[bytes]) -> None:
        """Count one message of each window."""
        with self._lock:
            self._all[release] += len(windows)
            for window in windows:
                self._by_window.setdefault(window, Counter())[release] += 1

    @property
    def releases(self) -> Mapping[Release, int]:
        """The number of windows sent, by kind of message."""
        with self._lock:
            return dict(self._all)

    def statement(self, delta: float = 1e-5) -> PrivacyStatement:
        """State (epsilon, delta) for the window of which most was released, where the assumptions hold.

        Args:
            delta: The probability that the bound does not cover; choose less than one over the number of windows.
        """
        if not 0 < delta < 1:
            raise ConfigurationError(f"delta={delta} is not a probability between 0 and 1")
        with self._lock:
            reasons = tuple(dict.fromkeys(reason for release in self._all for reason in release.refusals()))
            worst = max(self._by_window.values(), key=_precision, default=Counter[Release]())
            worst = Counter(worst)
        epsilon: float | None = 0.0
        if reasons:
            epsilon = None
        elif worst:
            try:
                epsilon = _epsilon(worst, delta)
            except ImportError as error:
                epsilon, reasons = (
                    None,
                    (f"dp-accounting is not installed ({error}): pip install 'splitlearn-core[accounting]'",),
                )
        return PrivacyStatement(epsilon, delta, _UNIT, worst.total(), _ASSUMPTIONS, reasons)

    def to_dict(self) -> dict[str, Any]:
        """Return the ledger as JSON values, to be saved with a training checkpoint."""
        with self._lock:
            kinds = list(self._all)
            places = {release: number for number, release in enumerate(kinds)}
            windows = {
                window.hex(): [[places[release], count] for release, count in counts.items()]
                for window, counts in self._by_window.items()
            }
            return {
                "key": self._key.hex(),
                "releases": [{**asdict(release), "windows": self._all[release]} for release in kinds],
                "windows": windows,
            }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PrivacyLedger:
        """Restore a ledger from the result of :meth:`to_dict`.

        Raises:
            ConfigurationError: The values are not a ledger.
        """
        ledger = cls()
        unknown = sorted(map(str, values.keys() - {"key", "releases", "windows"}))
        if unknown:
            raise ConfigurationError(
                f"this ledger has {', '.join(unknown)[:200]}, which this version does not know",
                hint="was it written by a newer version of splitlearn-core?",
            )
        try:
            kinds = [
                Release(**{name: value for name, value in item.items() if name != "windows"})
                for item in values["releases"]
            ]
            ledger._key = bytes.fromhex(values["key"])
            ledger._all = Counter({kind: int(item["windows"]) for kind, item in zip(kinds, values["releases"])})
            ledger._by_window = {
                bytes.fromhex(window): Counter({kinds[place]: int(count) for place, count in counts})
                for window, counts in values["windows"].items()
            }
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise ConfigurationError(
                f"this is not a ledger: {type(error).__name__} {error}", hint="pass the result of a ledger's to_dict()"
            ) from error
        return ledger

    def __repr__(self) -> str:
        counts = Counter[str]()
        for release, count in self.releases.items():
            counts[f"{release.purpose} {'states' if release.what == STATES else 'gradients'}"] += count
        return f"PrivacyLedger({', '.join(f'{what}: {count}' for what, count in sorted(counts.items())) or 'empty'})"

    def __reduce__(self) -> Any:
        return PrivacyLedger.from_dict, (self.to_dict(),)

    def __deepcopy__(self, memo: dict[int, Any]) -> PrivacyLedger:
        # A copy of the model shares the ledger, since it releases the same text.
        return self


def _precision(counts: Counter[Release]) -> float:
    """Return the quantity that adds up over Gaussian releases: (clip / noise) squared."""
    return sum(
        number * (release.clip / release.noise) ** 2
        for release, number in counts.items()
        if release.clip is not None and release.noise is not None
    )


def _epsilon(counts: Counter[Release], delta: float) -> float:
    from dp_accounting import get_epsilon_gaussian

    # A sequence of Gaussian releases, each with sensitivity 2C, is equivalent to one release with less noise.
    return float(get_epsilon_gaussian(0.5 / _precision(counts) ** 0.5, delta))
