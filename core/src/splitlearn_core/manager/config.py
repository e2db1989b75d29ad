"""What one model is to be loaded as: a value that is valid once it exists.

Everything that can be told without a file, a plugin or a device is checked here, and all of it is
reported at once. :mod:`splitlearn_core.manager.config` reads and writes the files.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from splitlearn_core.errors import ConfigurationError, UnknownModelTypeError
from splitlearn_core.manager.config_checks import (
    FIELDS_HINT,
    NOT_FAMILIES,
    SECRET_FIELDS,
    check_fields,
    complaint,
    unknown_name,
)
from splitlearn_core.manager.config_text import dump_toml, dump_yaml, near, read_table, show
from splitlearn_core.plugins.registry import registry
from splitlearn_core.user_paths import user_path


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """What to load, where to, and how long to keep it.

    Constructing one checks every field and their combination. Whether the family is installed,
    the files exist and the device is there is asked when the model is loaded.

    Lists are taken for tuples, ``pathlib`` paths and ``torch.dtype`` or ``torch.device`` objects
    for texts; the fields hold the plain values.

    Raises:
        ConfigurationError: Fields cannot be carried out; all of them are listed, each with its
            value and with what would do.
    """

    #: The model's name in the manager: at most 128 printable characters, no path.
    model_id: str
    #: An installed family's, or ``"huggingface"`` (a whole model through
    #: ``AutoModelForCausalLM``), or ``"pytorch"`` (a ``.pt`` or ``.pth`` file).
    model_type: str
    #: A directory or a Hub id; for ``"pytorch"`` the file. None for the family's default model.
    model_path: str | None = None
    #: ``bottom``, ``trunk`` or ``top``, or ``trunk1``, ``trunk2``, ... of several trunks: needed for a family,
    #: refused otherwise.
    component: str | None = None
    #: ``(a, b)`` with ``0 < a < b``, or any number of cuts: needed for a family, refused otherwise.
    split_points: tuple[int, ...] | None = None
    #: ``cpu``, ``cuda``, ``cuda:1``, ``mps``, ...
    device: str = "cpu"
    #: ``auto`` (as stored), ``float32``, ``float16``, ``bfloat16`` or ``float64``.
    dtype: str = "auto"
    #: Refuse the load if its plan needs more, in units of 2**20 bytes; None for no limit of its own.
    max_memory_mb: float | None = None
    #: Run forward passes before it is handed out.
    warmup: bool = False
    #: Seconds of idleness after which the model is unloaded: a number, or a text such as ``"30s"``,
    #: ``"5m"`` or ``"1h30m"`` (units d, h, m, s, ms). 0: as soon as it is idle. Any negative number,
    #: ``"inf"`` or ``"forever"``: never; the field is then ``math.inf``. None: what the manager says.
    keep_alive: float | None = None
    #: Never evicted, never expired.
    pinned: bool = False
    #: The manager is ready only while this model is.
    required: bool = False
    #: Load even where mapped weights exceed what memory can hold.
    allow_paging: bool = False
    #: How a component's weights are read; a plugin may add strategies.
    strategy: str = "auto"
    #: Refuse a component's checkpoint with tensors that the model has no place for; otherwise they are a warning.
    strict: bool = False
    #: ``eager``, ``sdpa``, ...; None for what transformers chooses.
    attn_implementation: str | None = None
    #: Branch, tag or commit on the Hub.
    revision: str | None = None
    #: Where the Hub's files are kept.
    cache_dir: str | None = None
    #: For the Hub; True for the one that was saved by logging in. Never shown, never written.
    token: str | bool | None = field(default=None, repr=False)
    #: Do not look on the Hub.
    local_files_only: bool = False
    #: ``"package.module:Class"`` of the module that the weights fill: needed for ``"pytorch"``
    #: unless ``allow_pickle``, refused otherwise.
    architecture: str | None = None
    #: ``"pytorch"`` only: let the file run code. For files of your own making alone.
    allow_pickle: bool = False
    #: Threads of torch for this load; None for what the manager says.
    load_threads: int | None = None

    def __post_init__(self) -> None:
        """Refuse, all at once, what cannot be carried out; keep the plain values of the rest."""
        values, problems = examine({name: getattr(self, name) for name in FIELDS})
        if problems:
            raise complaint(f"the configuration of model {show(self.model_id)}", problems)
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @property
    def is_family(self) -> bool:
        """Say whether a plugin loads it, as one component of a model."""
        return self.model_type not in NOT_FAMILIES

    @property
    def fingerprint(self) -> tuple[object, ...]:
        """All that decides what is loaded: equal for two configurations that one load serves.

        How long to keep it, whether to pin or require it, and who asks (the token) are left out.
        """
        return tuple(getattr(self, name) for name in FIELDS if name not in _NO_PART_OF_THE_LOAD)

    def check_installed(self) -> None:
        """Refuse a model type that no usable plugin provides. Imports no plugin.

        Raises:
            UnknownModelTypeError: No plugin offers the type, or a variable blocks it.
        """
        plugins = registry()
        if not self.is_family or self.model_type in plugins.model_types():
            return
        try:
            # No plugin owns the type, so this imports none before it says so.
            plugins.family(self.model_type)
        except UnknownModelTypeError as error:
            close = near(self.model_type, NOT_FAMILIES)
            if not close:
                raise
            raise UnknownModelTypeError(error.message, hint=f"{close.removeprefix('; ')} {error.hint}") from None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """Make one of a mapping, as a file holds it.

        Raises:
            ConfigurationError: As the class does; unknown and missing fields are listed too.
        """
        if not isinstance(values, Mapping):
            raise ConfigurationError(f"{show(values)} is no mapping of a model's fields", hint=FIELDS_HINT)
        plain, problems = examine(values)
        if problems:
            raise complaint(f"the configuration of model {show(values.get('model_id'))}", problems)
        return cls(**plain)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that are not at their defaults, as plain values for JSON.

        The token is never among them. For ever is -1, because JSON has no infinity.
        """
        plain: dict[str, Any] = {}
        for name, default in FIELDS.items():
            value = getattr(self, name)
            if name not in SECRET_FIELDS and value != default:
                plain[name] = -1 if value == math.inf else list(value) if isinstance(value, tuple) else value
        return plain

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> ModelConfig:
        """Read one model from a ``.yaml``, ``.yml``, ``.toml`` or ``.json`` file.

        The file holds the model's fields, or ``models`` with one entry.

        Raises:
            MissingFileError: There is no such file.
            ConfigurationError: It cannot be read as its format, or its fields cannot be carried out.
        """

        return read_model(path)

    def to_yaml(self) -> str:
        """Return :meth:`to_dict` as YAML."""

        return dump_yaml(self.to_dict())

    def to_toml(self) -> str:
        """Return :meth:`to_dict` as TOML."""

        return dump_toml(self.to_dict())


#: Field -> its default; ``dataclasses.MISSING`` for the two that have none.
FIELDS: Mapping[str, Any] = {spec.name: spec.default for spec in dataclasses.fields(ModelConfig)}


def examine(values: Mapping[Any, object]) -> tuple[dict[str, Any], list[str]]:
    """Check the fields of a model, one by one and together; see :func:`check_fields`."""
    return check_fields(values, FIELDS)


_NO_PART_OF_THE_LOAD = frozenset({"keep_alive", "pinned", "required", "token"})


_TOP_LEVEL = ("manager", "http", "models")

#: Says what is wrong with a table of settings.
Check = Callable[[Mapping[str, Any]], list[str]]


def _unchecked(settings: Mapping[str, Any]) -> list[str]:
    return []


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """What a file says."""

    models: tuple[ModelConfig, ...]
    #: The table ``manager`` as it stands there; empty where there is none. Not checked here.
    manager: Mapping[str, Any]
    #: Likewise the table ``http``.
    http: Mapping[str, Any] = field(default_factory=dict)


def read_config_file(
    path: str | os.PathLike[str], check_manager: Check = _unchecked, check_http: Check = _unchecked
) -> ConfigFile:
    """Read all models of a file, and what it says of the manager.

    Args:
        path: A file in YAML, TOML or JSON, by its suffix.
        check_manager: Says what is wrong with the table ``manager``, so that it is reported together
            with what is wrong with the models.
        check_http: Likewise for the table ``http``.

    Raises:
        MissingFileError: There is no such file.
        ConfigurationError: It cannot be read as its format (with line and column), or some of what
            it says cannot be carried out: all problems of all models are listed, as
            ``models[2].component: ...``.
    """
    return _interpret(path, read_table(user_path(path)), {"manager": check_manager, "http": check_http})


def _interpret(
    path: str | os.PathLike[str],
    table: Mapping[str, Any],
    checks: Mapping[str, Check] = MappingProxyType({"manager": _unchecked, "http": _unchecked}),
) -> ConfigFile:
    problems = []
    for name in table:
        if name not in _TOP_LEVEL:
            place = "; it belongs into an entry of models" if name in FIELDS else ""
            problems.append(unknown_name(name, _TOP_LEVEL, "key at the top level") + place)
    settings = {name: table.get(name, {}) for name in checks}
    for name, values in settings.items():
        if not isinstance(values, Mapping):
            problems.append(f"{name}: {show(values)} is no table of settings")
        else:
            problems += [f"{name}.{problem}" for problem in checks[name](values)]
    models, found = _examine_all(table)
    if problems or found:
        raise complaint(str(path), problems + found)
    tables = {name: MappingProxyType(dict(values)) for name, values in settings.items()}
    return ConfigFile(tuple(ModelConfig(**values) for values in models), **tables)


def load_configs(path: str | os.PathLike[str]) -> tuple[ModelConfig, ...]:
    """Read all models of a file; raises like :func:`read_config_file`."""
    return read_config_file(path).models


def read_model(path: str | os.PathLike[str]) -> ModelConfig:
    """Read a file of one model; see :meth:`ModelConfig.from_file`."""
    table = read_table(user_path(path))
    if "models" not in table:
        values, problems = examine(table)
        if problems:
            raise complaint(str(path), problems)
        return ModelConfig(**values)
    models = _interpret(path, table).models
    if len(models) != 1:
        raise ConfigurationError(
            f"{path} describes {len(models)} models, not one", hint="load_configs(path) reads all of them"
        )
    return models[0]


def _examine_all(table: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[str]]:
    if "models" not in table:
        return [], ["models: missing; list the models there, or give an empty list"]
    entries = table["models"]
    if not isinstance(entries, list):
        return [], [f"models: {show(entries)} is no list; each model is one entry of it"]
    models: list[dict[str, Any]] = []
    problems: list[str] = []
    seen: dict[str, int] = {}
    for number, entry in enumerate(entries):
        place = f"models[{number}]"
        if not isinstance(entry, Mapping):
            problems.append(f"{place}: {show(entry)} is no table of a model's fields")
            continue
        values, found = examine(entry)
        models.append(values)
        problems += [f"{place}.{problem}" for problem in found]
        name = values.get("model_id")
        if name is not None and seen.setdefault(name, number) != number:
            problems.append(f"{place}.model_id: {name!r} is the id of models[{seen[name]}] too; give it another")
    return models, problems
