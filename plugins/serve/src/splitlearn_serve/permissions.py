"""What a load requested over HTTP may use: folders, the Hub, and which token.

The server has no passwords, so a request gets no more than the configuration file grants: no path outside
its folders is accessed, and no token is sent that it does not name. A refusal does not reveal whether a
path exists.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from splitlearn_core import ConfigurationError, ModelConfig
from splitlearn_core.extension import BUNDLED, HUB, PYTORCH, examine, registry, show, unknown_name

_SETTINGS = ("model_roots", "hub", "token")
#: Syntax of a repository name; the Hub client checks the rest.
_REPOSITORY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}(/[A-Za-z0-9_][A-Za-z0-9_.-]{0,95})?")
#: Branches, tags and commits. The client uses them as paths in its cache.
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*")
#: Attention implementations of torch and transformers; others may be code fetched from the Hub.
_ATTENTION = ("eager", "sdpa", "flex_attention")
_WAY_OUT = "put the model into the configuration file of `splitlearn serve`"


@dataclass(frozen=True, slots=True)
class RequestRules:
    """What requests may load in addition to the models of the configuration file."""

    #: Folders whose contents may be loaded.
    model_roots: tuple[str, ...] = ()
    #: Whether repositories on the Hub may be loaded.
    hub: bool = True
    #: The token for the Hub; True for that of the server's user, False for none.
    token: str | bool = field(default=False, repr=False)
    #: Values of the models in the file, which requests may repeat.
    paths: frozenset[str | None] = frozenset()
    architectures: frozenset[str | None] = frozenset()
    attention: frozenset[str | None] = frozenset()

    @classmethod
    def of(cls, settings: Mapping[str, Any], models: Iterable[ModelConfig] = ()) -> RequestRules:
        """Create the rules from the table ``http`` and the models of a configuration file.

        Raises:
            ConfigurationError: Unknown settings or invalid values; all are listed.
        """
        problems = request_problems(settings)
        if problems:
            raise ConfigurationError(
                "the settings of http cannot be kept:\n  " + "\n  ".join(problems),
                hint=f"there are {', '.join(_SETTINGS)}",
            )
        models = tuple(models)
        return cls(
            model_roots=tuple(settings.get("model_roots") or ()),
            hub=settings.get("hub", True),
            token=settings.get("token") or False,
            paths=frozenset(model.model_path for model in models if model.model_path is not None),
            architectures=frozenset(model.architecture for model in models),
            attention=frozenset(model.attn_implementation for model in models),
        )

    def refusals(self, fields: Mapping[str, Any]) -> list[str]:
        """Return the reasons to refuse a request, without access to files."""
        return list(self._refusals(fields))

    def permitted(self, config: ModelConfig) -> ModelConfig:
        """Return the configuration to load for a request: with the real path, and with the token.

        Accesses files, so it must not run in the event loop's thread.

        Raises:
            ConfigurationError: A request must not load this path.
        """
        token = False if config.token is False else self.token
        return dataclasses.replace(config, model_path=self._source(config), token=token)

    def _refusals(self, fields: Mapping[str, Any]) -> Iterator[str]:
        if fields.get("allow_pickle"):
            yield "allow_pickle: a pickle runs whatever its author wrote"
        if fields.get("token"):
            yield "token: it would let others read with your rights"
        if fields.get("cache_dir"):
            yield "cache_dir: downloads go to the cache folder of the server"
        if fields.get("host_options"):
            yield "host_options: they say which machines do the work; only those of the configuration file are used"
        if not _is_any_of(fields.get("architecture"), (None, *self.architectures)):
            yield "architecture: importing a module runs it; only those of the configuration file are known"
        if not _is_any_of(fields.get("attn_implementation"), (None, *_ATTENTION, *self.attention)):
            yield (
                "attn_implementation: others may be code that is fetched from the Hub; "
                f"{', '.join(_ATTENTION)} and those of the configuration file are known"
            )
        revision = fields.get("revision")
        if isinstance(revision, str) and not (_REVISION.fullmatch(revision) and ".." not in revision):
            yield "revision: this is not the name of a branch, tag or commit"

    def _source(self, config: ModelConfig) -> str | None:
        path = config.model_path
        if path is None and config.is_family:
            path = registry().packaged_family(config.model_type).default_model or None
        if path is None or path.startswith(BUNDLED) or path in self.paths:
            return path
        local = None if path.startswith(HUB) else self._inside(path)
        name = path.removeprefix(HUB)
        if config.model_type != PYTORCH and _REPOSITORY.fullmatch(name) and not (local and _exists(local)):
            if not self.hub:
                raise ConfigurationError(
                    "this is not done over HTTP:\n  model_path: repositories on the Hub (http.hub is false)",
                    hint=_WAY_OUT,
                )
            # Without the prefix, a folder of this name in the working directory would take precedence.
            return HUB + name
        if local is None:
            raise _refused_path("it lies in none of the folders that the configuration file names")
        if config.model_type != PYTORCH:
            self._refuse_links(Path(local))
        return local

    def _inside(self, path: str) -> str | None:
        """Return the real path if it is inside a root; None for any other path, which is not accessed."""
        requested = _absolute(path)
        roots = [_absolute(root) for root in self.model_roots]
        real_roots = {os.path.realpath(root) for root in roots}
        if not _lies_in(requested, {*roots, *real_roots}):
            return None
        real = os.path.realpath(requested)
        return real if _lies_in(real, real_roots) else None

    def _refuse_links(self, path: Path) -> None:
        """Refuse a checkpoint with links to outside the roots: error messages quote file contents."""
        try:
            folder = path if path.is_dir() else path.parent
            links = [entry for entry in folder.iterdir() if entry.is_symlink()] if path.exists() else []
        except OSError:
            return  # The load reports why it cannot be read.
        # Next to a weight file, only the JSON files are read.
        read = [link for link in links if folder == path or link.suffix == ".json"]
        if any(self._inside(str(link)) is None for link in read):
            raise _refused_path("one of its files is a link to outside the folders that the configuration file names")


def request_problems(settings: Mapping[str, Any]) -> list[str]:
    """Return the problems of the table ``http`` of a configuration file."""
    problems = [unknown_name(name, _SETTINGS, "setting") for name in settings if name not in _SETTINGS]
    roots = settings.get("model_roots") or []
    if not isinstance(roots, list | tuple) or not all(isinstance(root, str) and root for root in roots):
        problems.append(f"model_roots: {show(roots)} is not a list of folders")
    else:
        problems += [
            f"model_roots: there is no folder {show(root)}" for root in roots if not Path(_absolute(root)).is_dir()
        ]
    if not isinstance(settings.get("hub", True), bool):
        problems.append(f"hub: {show(settings['hub'])} is neither true nor false")
    if "token" in settings:
        _, model_problems = examine({"token": settings["token"]})
        problems += [problem for problem in model_problems if problem.startswith("token:")]
    return problems


def _refused_path(why: str) -> ConfigurationError:
    return ConfigurationError(
        f"this is not done over HTTP:\n  model_path: {why}",
        hint=f"add its folder to http.model_roots, or {_WAY_OUT}",
    )


def _absolute(path: str) -> str:
    """Return an absolute path without ``..``, computed from the text alone, without access to files."""
    if path == "~" or path.startswith("~/"):
        # Not ~user: a request must not reveal which users exist.
        path = os.path.expanduser(path)  # noqa: PTH111  # raises nothing
    return os.path.abspath(path)  # noqa: PTH100  # Path.resolve accesses files


def _exists(path: str) -> bool:
    return os.path.exists(path)  # noqa: PTH110  # raises nothing, not even for names that are too long


def _lies_in(path: str, roots: Iterable[str]) -> bool:
    return any(PurePath(path).is_relative_to(root) for root in roots)


def _is_any_of(value: object, known: Iterable[object]) -> bool:
    return any(value == each for each in known)
