"""The attributes of a conformance test class, and the parametrization of its checks."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

import pytest
import torch

from splitlearn_core.build.configuration import architecture_class
from splitlearn_core.build.torch_state import own_state
from splitlearn_core.family import ModelFamily
from splitlearn_core.plugins.registry import registry
from splitlearn_core.testing.conformance.diagnosis import explain
from splitlearn_core.testing.conformance.findings import ConformanceError
from splitlearn_core.testing.conformance.flaws import Flaw, flaw_of
from splitlearn_core.testing.conformance.isolation import alone
from splitlearn_core.testing.conformance.subject import Cut, Subject, chosen_cuts, configure

_Class = TypeVar("_Class", bound=type)
TIE = "tie_word_embeddings"
#: The variants that every family is tested in, if its model class has them.
TIES: Mapping[str, Mapping[str, Any]] = {"tied": {TIE: True}, "untied": {TIE: False}}


def explained(checks: _Class) -> _Class:
    """Make every check of a class name the field to look at, for any error.

    A check that was chosen to report a fatal problem of the family reports only that.
    """
    for name, function in list(vars(checks).items()):
        if name.startswith("test_"):
            setattr(checks, name, _explained(function))
    return checks


def _explained(check: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(check)
    def explaining(self: Checks, **fixtures: Any) -> None:
        __tracebackhide__ = True
        if self._flaw is not None:
            raise ConformanceError(self._flaw.message, self._flaw.suspects)
        try:
            # The test run may have changed the state of torch.
            with own_state(gradients=True):
                check(self, **fixtures)
        except AssertionError:
            raise
        # The family under test may cause any exception of core, transformers or torch.
        except Exception as error:
            subject = fixtures.get("subject")
            values = {**self.config, **(subject.overrides if isinstance(subject, Subject) else {})}
            suspects = explain(error, registry().family(self.model_type), values)
            raise ConformanceError(f"{type(error).__name__}: {error}", suspects) from error

    return explaining


@dataclass(frozen=True, slots=True)
class Axes:
    """The parameters of the checks of one class."""

    variants: tuple[str, ...]
    #: Names of :data:`TIES` that the model class does not have -> the reason.
    without: Mapping[str, str]
    attention: tuple[str, ...]
    #: Attention implementations that transformers refuses for the model class -> its message.
    refused: Mapping[str, str]
    cuts: tuple[Cut, ...]
    #: A fatal problem of the family; one value of each parameter is enough then.
    flaw: Flaw | None = None


class Checks:
    """The attributes that a plugin's author sets; the checks are in subclasses."""

    #: The model type under test.
    model_type: ClassVar[str]
    #: The distribution of the plugin, if several claim the model type.
    distribution: ClassVar[str] = ""
    #: Values of the configuration, by the names of its Hugging Face class. They are added to ordinary
    #: tiny sizes; with a ``model_type``, they are a whole ``config.json``.
    config: ClassVar[Mapping[str, Any]] = {}
    #: Variants in addition to tied and untied: name -> values of the configuration that differ.
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    #: Attention implementations to compare with; those that transformers refuses for this model are skipped.
    attention: ClassVar[tuple[str, ...]] = ("eager", "sdpa")
    #: dtypes to compare in.
    dtypes: ClassVar[tuple[str, ...]] = ("float32", "bfloat16")
    #: Tensors of old checkpoints that must be omitted: name relative to the base -> shape.
    legacy_tensors: ClassVar[Mapping[str, tuple[int, ...]]] = {}
    #: Checks that fail, each with the reason: ``{"test_generate": "..."}``, or only with all the
    #: parameters in brackets: ``{"test_generate[bfloat16, sdpa]": "..."}``.
    #: Such a check must fail; if it passes, that is a failure.
    expected_failures: ClassVar[Mapping[str, str]] = {}
    #: One dtype, one attention implementation and one cut, for a first look.
    quick: ClassVar[bool] = False
    #: The fatal problem that a check reports instead of its own subject.
    _flaw: Flaw | None = None

    @classmethod
    def all_variants(cls) -> dict[str, Mapping[str, Any]]:
        """Return the variants: tied and untied unless the author's include them, then the author's."""
        declared = [values[TIE] for values in cls.variants.values() if TIE in values]
        ties = {name: values for name, values in TIES.items() if values[TIE] not in declared}
        return {**ties, **cls.variants}

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Parametrize the checks with variants, dtypes, attention implementations and cuts."""
        cls = type(self)
        available = axes(cls)
        limit = slice(0, 1 if cls.quick or available.flaw else None)
        parameters: dict[str, tuple[Any, ...]] = {
            "variant": available.variants[: 1 if available.flaw else None],
            "dtype": cls.dtypes[limit],
            "attention": available.attention[limit],
            "cut": available.cuts[limit],
            "tie": tuple(TIES),
            "implementation": cls.attention,
        }
        for name, values in parameters.items():
            if name in metafunc.fixturenames:
                metafunc.parametrize(name, values, ids=[*map(_spelled, values)])

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def only_this_plugin(cls) -> Iterator[None]:
        """Hide all other installed plugins."""
        with alone(cls.model_type, cls.distribution):
            yield

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def one_thread(cls) -> Iterator[None]:
        """Use one thread: tiny tensors gain nothing from more, which only spin on a busy machine."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)

    @pytest.fixture(autouse=True)
    def expected_to_fail(self, request: pytest.FixtureRequest) -> None:
        """Mark the checks that the author expects to fail, with the reason."""
        name, callspec = request.node.originalname, getattr(request.node, "callspec", None)
        parameters = {_spelled(value) for value in callspec.params.values()} if callspec else set()
        for entry, reason in self.expected_failures.items():
            check, _, words = entry.removesuffix("]").partition("[")
            if check == name and reason and parameters.issuperset(map(str.strip, filter(None, words.split(",")))):
                request.node.add_marker(pytest.mark.xfail(reason=reason, strict=True))

    @pytest.fixture(autouse=True)
    def first_things_first(self, request: pytest.FixtureRequest) -> None:
        """Let one check report a fatal problem, and skip those that would only repeat it."""
        flaw = axes(type(self)).flaw
        reporter = _reporter(type(self), flaw, request.session.items) if flaw else None
        if flaw is None or reporter is None:
            return
        if request.node is reporter:
            self._flaw = flaw
        elif flaw.spoils.intersection(request.fixturenames):
            pytest.skip(f"{reporter.originalname} says why")

    @classmethod
    def checks(cls) -> dict[str, Callable[..., Any]]:
        """Return the checks of the kit, by name."""
        kit = [base for base in cls.__mro__ if base.__module__.startswith(__package__ or "")]
        return {
            name: value
            for base in reversed(kit)
            for name, value in vars(base).items()
            if name.startswith("test_") and callable(value)
        }

    @pytest.fixture(scope="class")
    @classmethod
    def subjects(cls, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Subject]:
        """Return the models under test by variant; they are created on first use."""
        folder = tmp_path_factory.mktemp("subjects")
        variants = enumerate(cls.all_variants().items())
        return {
            name: Subject(cls.model_type, cls.config, values, folder / str(number))
            for number, (name, values) in variants
        }

    @pytest.fixture
    def subject(self, subjects: dict[str, Subject], variant: str) -> Subject:
        """Return the model of the variant."""
        return subjects[variant]


def _reporter(cls: type[Checks], flaw: Flaw, items: Sequence[Any]) -> Any:
    """Return the test that reports a flaw: its own reporter if that is run, or else the first spoilt one.

    None if there is none, or if the author expects it to fail: then every check fails on its own.
    """
    if flaw.reporter in {entry.partition("[")[0] for entry in cls.expected_failures}:
        return None
    checks = cls.checks()
    own = [item for item in items if getattr(item, "cls", None) is cls]
    # An overridden check cannot report.
    candidates = [item for item in own if checks.get(item.originalname, cls) is getattr(cls, item.originalname, None)]
    spoilt = [item for item in candidates if flaw.spoils.intersection(item.fixturenames)]
    return next(iter([item for item in candidates if item.originalname == flaw.reporter] + spoilt), None)


def _spelled(value: Any) -> str:
    return "-".join(map(str, value)) if isinstance(value, tuple) else str(value)


def axes(cls: type[Checks]) -> Axes:
    """Return the parameters that the model class allows, cached; all of them for a broken family."""
    if cls not in _axes:
        with alone(cls.model_type, cls.distribution), own_state(gradients=False):
            _axes[cls] = _find_axes(cls)
    return _axes[cls]


_axes: weakref.WeakKeyDictionary[type[Checks], Axes] = weakref.WeakKeyDictionary()


def _find_axes(cls: type[Checks]) -> Axes:
    variants = cls.all_variants()
    everything = Axes(tuple(variants), {}, cls.attention, {}, ((1, 5), (2, 3), (3, 5)))
    try:
        flaw = flaw_of(cls.model_type, cls.config)
        if flaw is not None:
            return replace(everything, flaw=flaw)
        family = registry().family(cls.model_type)
        without = {name: reason for name in TIES if name in variants and (reason := _tie_refusal(cls, family, name))}
        refused = {name: reason for name in cls.attention if (reason := _attention_refusal(cls, family, name))}
        cuts = chosen_cuts(family, configure(family, cls.config, {}))
    # Nothing may be raised while tests are collected; the checks raise the same error and explain it.
    except Exception:  # noqa: BLE001
        return everything
    available = tuple(name for name in variants if name not in without)
    return Axes(available, without, tuple(name for name in cls.attention if name not in refused), refused, cuts)


def _tie_refusal(cls: type[Checks], family: ModelFamily, variant: str) -> str:
    """Return why a model class cannot be tied, or untied; empty if it can."""
    wanted = TIES[variant][TIE]
    hf_class: Any = architecture_class(family)
    with torch.device("meta"):
        model = hf_class(configure(family, cls.config, TIES[variant]))
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or (head.weight is embedding.weight) == wanted:
        return ""
    return f"{hf_class.__name__} with {TIE}={wanted} still has head and embedding {'separate' if wanted else 'tied'}"


def _attention_refusal(cls: type[Checks], family: ModelFamily, attention: str) -> str:
    """Return how transformers refuses an attention implementation for a model class; empty if it does not."""
    hf_class: Any = architecture_class(family)
    config = configure(family, cls.config, {})
    config._attn_implementation = attention  # noqa: SLF001  # the name from_pretrained uses
    try:
        with torch.device("meta"):
            hf_class(config)
    except (ImportError, ValueError) as error:
        # The first sentence; the others are advice for other cases.
        return f"transformers: {str(error).partition('. ')[0]}"
    return ""
