"""Fatal problems of a family: detected once, reported by one check; the others are skipped."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from splitlearn_core.build.configuration import architecture_class
from splitlearn_core.build.pruning import check_names, leave_out_others
from splitlearn_core.errors import (
    BrokenPluginError,
    IncompatiblePluginError,
    PluginConflictError,
    PluginError,
    UnknownModelTypeError,
)
from splitlearn_core.family import ModelFamily
from splitlearn_core.plan.split_points import impossible_cuts
from splitlearn_core.plugins.host import fix_hint
from splitlearn_core.plugins.registry import blocked_by, registry
from splitlearn_core.testing.conformance.diagnosis import MAPPER, misnamed, misplaced, misread
from splitlearn_core.testing.conformance.findings import Suspect
from splitlearn_core.testing.conformance.isolation import claims
from splitlearn_core.testing.conformance.subject import configure
from splitlearn_core.testing.worlds import random_model

#: Fixtures that need a model of the family, and those that need its plugin.
_MODELS = frozenset({"subjects"})
_PLUGIN = frozenset({"subjects", "registered"})

#: Module names that transformers itself knows, so that a mismatch is certain.
_CERTAIN = ("base", "layers", "embedding", "head")


@dataclass(frozen=True, slots=True)
class Flaw:
    """Why every check that needs some fixtures would fail, with the same message."""

    #: The check that reports it.
    reporter: str
    message: str
    suspects: tuple[Suspect, ...]
    #: The fixtures; checks without them are run.
    spoils: frozenset[str] = _MODELS


def flaw_of(model_type: str, values: Mapping[str, Any]) -> Flaw | None:
    """Return the problem that prevents every model of a family from being created or split, or None.

    Args:
        model_type: The model type; no other plugin must be visible.
        values: The author's values of the configuration.
    """
    try:
        family = registry().family(model_type)
    except PluginError as error:
        return Flaw("test_entry_point", error.message, (_of_plugin(error, model_type),), _PLUGIN)
    return _of_class(family) or _of_model(family, values)


def _of_plugin(error: PluginError, model_type: str) -> Suspect:
    """Return the suspect for a plugin that the registry rejects."""
    if isinstance(error, UnknownModelTypeError):
        fix = f'group "splitlearn.families": {model_type} = "module"; then install again'
        return Suspect("the entry point", fix)
    if isinstance(error, PluginConflictError):
        return Suspect("distribution", "name the tested one in the test class")
    if isinstance(error, IncompatiblePluginError):
        return Suspect("the plugin's metadata", error.hint)
    entry = next(entry for entry in claims(model_type) if not blocked_by(entry))
    module = entry.module.partition(":")[0]
    spec = importlib.util.find_spec(module.partition(".")[0])
    locations = [] if spec is None else spec.submodule_search_locations or [spec.origin or ""]
    homes = [Path(location) for location in locations if location]
    if not homes:
        return Suspect("the entry point", f"there is no module {module!r}")
    where = _where(error.__cause__, homes) or str(homes[0])
    # Its author needs neither the advice to leave the plugin out nor the address for reports.
    fixes = [] if error.hint == fix_hint(entry) else [error.hint.partition("; or leave")[0]]
    return Suspect("the plugin's module", "; ".join([where, *fixes]))


def _where(cause: BaseException | None, homes: list[Path]) -> str:
    """Return the line of the plugin that raised the error, or an empty string if it is unknown."""
    if isinstance(cause, SyntaxError) and cause.filename:
        return f"{cause.filename}, line {cause.lineno}"
    frames = traceback.extract_tb(cause.__traceback__) if cause else []
    own = [frame for frame in frames if any(Path(frame.filename).is_relative_to(home) for home in homes)]
    return f"{own[-1].filename}, line {own[-1].lineno}: {own[-1].line}" if own else ""


def _of_class(family: ModelFamily) -> Flaw | None:
    """Compare ``architecture`` with transformers."""
    try:
        hf_class: Any = architecture_class(family)
    except BrokenPluginError as error:
        why = f"a class of transformers, or module:Class; {error.hint}"
        return Flaw("test_architecture", error.message, (Suspect("architecture", why),))
    stated = hf_class.config_class.model_type
    # Of several models, it may be a class of the decoder alone, or that of another type.
    if stated == family.model_type or family.text_config:
        return None
    return Flaw(
        "test_architecture",
        f"{hf_class.__name__} is made of configurations of model type {stated!r}",
        (Suspect("architecture", f"name the class of {family.model_type!r}"),),
    )


def _of_model(family: ModelFamily, values: Mapping[str, Any]) -> Flaw | None:
    """Compare the other fields that every load needs with a model in memory."""
    hf_class: Any = architecture_class(family)
    tiny = Suspect("config of the test" if values else "tiny_config", "values that are valid for a small model")
    try:
        model = random_model(hf_class, configure(family, values, {}))
    # Classes of transformers raise any exception for values that they cannot use.
    except Exception as error:  # noqa: BLE001
        words = f"a tiny {hf_class.__name__} cannot be made: {type(error).__name__}: {error}"
        return Flaw("test_architecture", words, (tiny,))
    missing = _of_missing(family, model)
    if missing:
        return missing
    if family.text_config:
        leave_out_others(model, family)
    try:
        wrong = tuple(misnamed(family, model))
    # As above: the model is run.
    except Exception as error:  # noqa: BLE001
        words = f"a tiny {hf_class.__name__} cannot be run: {type(error).__name__}: {error}"
        return Flaw("test_module_names", words, (tiny,))
    if any(suspect.field in _CERTAIN for suspect in wrong):
        return Flaw("test_module_names", "the module names of the family are not those of the model", wrong)
    return _of_depth(family, model) or _of_answers(family, model)


def _of_missing(family: ModelFamily, model: Any) -> Flaw | None:
    """Return the problem of missing modules."""
    try:
        check_names(model, family)
    except BrokenPluginError as error:
        suspects: tuple[Suspect, ...] = (Suspect("base, layers, embedding, norm, head", error.hint),)
        # The right name is determined by running the model, whose class may raise any exception.
        with contextlib.suppress(Exception):
            suspects = tuple(misnamed(family, model)) or suspects
        return Flaw("test_module_names", error.message, suspects)
    return None


def _of_depth(family: ModelFamily, model: Any) -> Flaw | None:
    """Return the problem of a wrong number of layers, with other wrongly read values."""
    suspects = tuple(misread(family, model.config, ("num_hidden_layers",)))
    if not suspects:
        return None
    others = misread(family, model.config)
    return Flaw("test_config_names", "the family reads config.json differently from transformers", (*suspects, *others))


def _of_answers(family: ModelFamily, model: Any) -> Flaw | None:
    """Return the problem of the impossible cuts, or of the keys of an ordinary checkpoint."""
    written = json.loads(model.config.to_json_string())
    try:
        impossible_cuts(family, written)
    except BrokenPluginError as error:
        why = Suspect("impossible_cuts", "it must return the impossible cuts of a config.json, each with the reason")
        return Flaw("test_impossible_cuts", error.message, (why,))
    # Each tensor once, as in a file.
    own = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    try:
        problems = misplaced(family, model, own & set(model.state_dict()))
    except BrokenPluginError as error:
        return Flaw("test_every_key_has_its_place", error.message, (MAPPER,))
    words = "\n".join(problem for problem, _ in problems)
    return Flaw("test_every_key_has_its_place", words, tuple(suspect for _, suspect in problems)) if problems else None
