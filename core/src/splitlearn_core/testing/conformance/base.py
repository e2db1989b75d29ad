"""What an author says about a family under test, and how the checks are spread over it."""

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
#: The variants that every family is tested in, where its model class has them.
TIES: Mapping[str, Mapping[str, Any]] = {"tied": {TIE: True}, "untied": {TIE: False}}


def explained(checks: _Class) -> _Class:
    """Let every check of a class name the field to look at, whatever it fails with.

    A check that is chosen to tell of a family that is of no use at all does that, and nothing else.
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
            # A test run may begin in any state.
            with own_state(gradients=True):
                check(self, **fixtures)
        except AssertionError:
            raise
        # Whatever the family under test makes core, transformers or torch raise.
        except Exception as error:
            subject = fixtures.get("subject")
            values = {**self.config, **(subject.overrides if isinstance(subject, Subject) else {})}
            suspects = explain(error, registry().family(self.model_type), values)
            raise ConformanceError(f"{type(error).__name__}: {error}", suspects) from error

    return explaining


@dataclass(frozen=True, slots=True)
class Axes:
    """Over what the checks of one class are spread."""

    variants: tuple[str, ...]
    #: Names of :data:`TIES` that the model class does not have -> why.
    without: Mapping[str, str]
    attention: tuple[str, ...]
    #: Attention implementations that transformers refuses for the model class -> how.
    refused: Mapping[str, str]
    cuts: tuple[Cut, ...]
    #: What makes the family of no use at all, so that one point of each axis is enough.
    flaw: Flaw | None = None


class Checks:
    """What an author may say; the checks themselves are in the classes that derive from this one."""

    #: The model type under test.
    model_type: ClassVar[str]
    #: The distribution of the plugin, where several claim the model type.
    distribution: ClassVar[str] = ""
    #: Values of the configuration, by the names of its Hugging Face class. They are added to ordinary
    #: tiny sizes; or, with a ``model_type`` among them, they are a whole ``config.json``.
    config: ClassVar[Mapping[str, Any]] = {}
    #: Further variants beside tied and untied: name -> values of the configuration that differ.
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    #: Attention implementations to compare under; what transformers refuses for this model is skipped.
    attention: ClassVar[tuple[str, ...]] = ("eager", "sdpa")
    #: dtypes to compare in.
    dtypes: ClassVar[tuple[str, ...]] = ("float32", "bfloat16")
    #: Tensors of old checkpoints that must be left out: name relative to the base -> shape.
    legacy_tensors: ClassVar[Mapping[str, tuple[int, ...]]] = {}
    #: Checks that do not hold, each with the reason: ``{"test_generate": "..."}``, or only where all
    #: words in brackets are among a test's parameters: ``{"test_generate[bfloat16, sdpa]": "..."}``.
    #: Such a check must fail; one that passes after all is a failure.
    expected_failures: ClassVar[Mapping[str, str]] = {}
    #: One dtype, one attention implementation and one cut, for a first look.
    quick: ClassVar[bool] = False
    #: What a check is to tell in place of its own subject.
    _flaw: Flaw | None = None

    @classmethod
    def all_variants(cls) -> dict[str, Mapping[str, Any]]:
        """Return the variants: tied and untied unless the author's say so themselves, then the author's."""
        said = [values[TIE] for values in cls.variants.values() if TIE in values]
        ties = {name: values for name, values in TIES.items() if values[TIE] not in said}
        return {**ties, **cls.variants}

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Spread the checks over variants, dtypes, attention implementations and cuts."""
        cls = type(self)
        found = axes(cls)
        one = slice(0, 1 if cls.quick or found.flaw else None)
        spread: dict[str, tuple[Any, ...]] = {
            "variant": found.variants[: 1 if found.flaw else None],
            "dtype": cls.dtypes[one],
            "attention": found.attention[one],
            "cut": found.cuts[one],
            "tie": tuple(TIES),
            "implementation": cls.attention,
        }
        for name, values in spread.items():
            if name in metafunc.fixturenames:
                metafunc.parametrize(name, values, ids=[*map(_spelled, values)])

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def only_this_plugin(cls) -> Iterator[None]:
        """Keep the plugins that are installed beside this one out."""
        with alone(cls.model_type, cls.distribution):
            yield

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def one_thread(cls) -> Iterator[None]:
        """Tiny tensors gain nothing from threads, which spin for each other on a busy machine."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)

    @pytest.fixture(autouse=True)
    def expected_to_fail(self, request: pytest.FixtureRequest) -> None:
        """Mark the checks of which the author says that they fail, and why."""
        name, spread = request.node.originalname, getattr(request.node, "callspec", None)
        parameters = {_spelled(value) for value in spread.params.values()} if spread else set()
        for entry, reason in self.expected_failures.items():
            check, _, words = entry.removesuffix("]").partition("[")
            if check == name and reason and parameters.issuperset(map(str.strip, filter(None, words.split(",")))):
                request.node.add_marker(pytest.mark.xfail(reason=reason, strict=True))

    @pytest.fixture(autouse=True)
    def first_things_first(self, request: pytest.FixtureRequest) -> None:
        """Of a family that is of no use at all let one check say why, and skip those that could but repeat it."""
        flaw = axes(type(self)).flaw
        teller = _teller(type(self), flaw, request.session.items) if flaw else None
        if flaw is None or teller is None:
            return
        if request.node is teller:
            self._flaw = flaw
        elif flaw.spoils.intersection(request.fixturenames):
            pytest.skip(f"{teller.originalname} says why")

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
        """Hold the models that are compared, by variant; none is made yet."""
        folder = tmp_path_factory.mktemp("subjects")
        variants = enumerate(cls.all_variants().items())
        return {
            name: Subject(cls.model_type, cls.config, values, folder / str(number))
            for number, (name, values) in variants
        }

    @pytest.fixture
    def subject(self, subjects: dict[str, Subject], variant: str) -> Subject:
        """Return the models of the variant."""
        return subjects[variant]


def _teller(cls: type[Checks], flaw: Flaw, items: Sequence[Any]) -> Any:
    """Return the test that tells of a flaw: of those that are run the one whose subject it is, or the first it spoils.

    None where there is none, or where the author says that it fails: then every check speaks for itself.
    """
    if flaw.telling in {entry.partition("[")[0] for entry in cls.expected_failures}:
        return None
    checks = cls.checks()
    own = [item for item in items if getattr(item, "cls", None) is cls]
    # An override tells of nothing.
    may = [item for item in own if checks.get(item.originalname, cls) is getattr(cls, item.originalname, None)]
    spoilt = [item for item in may if flaw.spoils.intersection(item.fixturenames)]
    return next(iter([item for item in may if item.originalname == flaw.telling] + spoilt), None)


def _spelled(value: Any) -> str:
    return "-".join(map(str, value)) if isinstance(value, tuple) else str(value)


def axes(cls: type[Checks]) -> Axes:
    """Ask the model class what it bears, once; of a family that cannot be asked, try everything."""
    if cls not in _asked:
        with alone(cls.model_type, cls.distribution), own_state(gradients=False):
            _asked[cls] = _ask(cls)
    return _asked[cls]


_asked: weakref.WeakKeyDictionary[type[Checks], Axes] = weakref.WeakKeyDictionary()


def _ask(cls: type[Checks]) -> Axes:
    variants = cls.all_variants()
    everything = Axes(tuple(variants), {}, cls.attention, {}, ((1, 5), (2, 3), (3, 5)))
    try:
        flaw = flaw_of(cls.model_type, cls.config)
        if flaw is not None:
            return replace(everything, flaw=flaw)
        family = registry().family(cls.model_type)
        without = {name: why for name in TIES if name in variants and (why := _why_not(cls, family, name))}
        refused = {name: why for name in cls.attention if (why := _refusal(cls, family, name))}
        cuts = chosen_cuts(family, configure(family, cls.config, {}))
    # Nothing may be raised while tests are collected; the checks meet the same error and explain it.
    except Exception:  # noqa: BLE001
        return everything
    there = tuple(name for name in variants if name not in without)
    return Axes(there, without, tuple(name for name in cls.attention if name not in refused), refused, cuts)


def _why_not(cls: type[Checks], family: ModelFamily, variant: str) -> str:
    """Say why a model class cannot be tied, or not be untied; nothing where it can."""
    wanted = TIES[variant][TIE]
    hf_class: Any = architecture_class(family)
    with torch.device("meta"):
        model = hf_class(configure(family, cls.config, TIES[variant]))
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or (head.weight is embedding.weight) == wanted:
        return ""
    return f"{hf_class.__name__} with {TIE}={wanted} still has head and embedding {'apart' if wanted else 'as one'}"


def _refusal(cls: type[Checks], family: ModelFamily, attention: str) -> str:
    """Say how transformers refuses an attention implementation for a model class; nothing where it does not."""
    hf_class: Any = architecture_class(family)
    config = configure(family, cls.config, {})
    config._attn_implementation = attention  # noqa: SLF001  # the name from_pretrained uses
    try:
        with torch.device("meta"):
            hf_class(config)
    except (ImportError, ValueError) as error:
        # Its first sentence; transformers goes on with advice for other cases.
        return f"transformers: {str(error).partition('. ')[0]}"
    return ""
