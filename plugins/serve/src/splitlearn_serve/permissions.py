"""What a load that is asked for over HTTP may use: folders, the Hub, and in whose name.

The server has no passwords, so a request gets no more than the configuration file grants: no path
outside the folders that it names is looked at, and no token is sent that it does not name. A refusal
is the same whether there is something at a path or not.
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
#: What can be a repository's name; the Hub's client checks the rest.
_REPOSITORY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}(/[A-Za-z0-9_][A-Za-z0-9_.-]{0,95})?")
#: Branches, tags and commits. The client makes paths in its cache of them.
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*")
#: Implementations of attention that are part of torch and transformers; others may be fetched from the Hub and run.
_ATTENTION = ("eager", "sdpa", "flex_attention")
_WAY_OUT = "put the model into the configuration file of `splitlearn serve`"


@dataclass(frozen=True, slots=True)
class RequestRules:
    """What requests may load besides the models of the configuration file."""

    #: Folders; what lies in them may be named.
    model_roots: tuple[str, ...] = ()
    #: Whether a repository on the Hub may be named.
    hub: bool = True
    #: Sent to the Hub; True for the one that the server's user has, False for none.
    token: str | bool = field(default=False, repr=False)
    #: Values of the file's own models, which may be named as they stand there.
    paths: frozenset[str | None] = frozenset()
    architectures: frozenset[str | None] = frozenset()
    attention: frozenset[str | None] = frozenset()

    @classmethod
    def of(cls, settings: Mapping[str, Any], models: Iterable[ModelConfig] = ()) -> RequestRules:
        """Make them of the table ``http`` and the models of a configuration file.

        Raises:
            ConfigurationError: Settings that do not exist or cannot be kept; all are listed.
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

    def refusals(self, given: Mapping[str, Any]) -> list[str]:
        """Return what is wrong with the fields of a request, as far as they alone tell."""
        return list(self._refusals(given))

    def permitted(self, config: ModelConfig) -> ModelConfig:
        """Return what is loaded where a configuration is asked for: its path as it really is, and the token.

        Looks at files, so it is not for the event loop's thread.

        Raises:
            ConfigurationError: The path is none that a request may name.
        """
        token = False if config.token is False else self.token
        return dataclasses.replace(config, model_path=self._source(config), token=token)

    def _refusals(self, given: Mapping[str, Any]) -> Iterator[str]:
        if given.get("allow_pickle"):
            yield "allow_pickle: a pickle runs whatever its author wrote"
        if given.get("token"):
            yield "token: it would let others read with your rights"
        if given.get("cache_dir"):
            yield "cache_dir: downloads go where the server was told to put them"
        if not _is_any_of(given.get("architecture"), (None, *self.architectures)):
            yield "architecture: importing a module runs it; only those of the configuration file are known"
        if not _is_any_of(given.get("attn_implementation"), (None, *_ATTENTION, *self.attention)):
            yield (
                "attn_implementation: others may be code that is fetched from the Hub; "
                f"{', '.join(_ATTENTION)} and those of the configuration file are known"
            )
        revision = given.get("revision")
        if isinstance(revision, str) and not (_REVISION.fullmatch(revision) and ".." not in revision):
            yield "revision: this is no name of a branch, tag or commit"

    def _source(self, config: ModelConfig) -> str | None:
        path = config.model_path
        if path is None and config.is_family:
            path = registry().family(config.model_type).default_model or None
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
            # Without the mark, a folder of this name in the working directory would win.
            return HUB + name
        if local is None:
            raise _refused_path("it lies in none of the folders that the configuration file names")
        if config.model_type != PYTORCH:
            self._refuse_links(Path(local))
        return local

    def _inside(self, path: str) -> str | None:
        """Return the real path of what lies in a root; None for all else, which is not looked at."""
        asked = _absolute(path)
        roots = [_absolute(root) for root in self.model_roots]
        real = {os.path.realpath(root) for root in roots}
        if not _lies_in(asked, {*roots, *real}):
            return None
        found = os.path.realpath(asked)
        return found if _lies_in(found, real) else None

    def _refuse_links(self, path: Path) -> None:
        """Refuse a checkpoint of which files are links to somewhere else: errors quote what they hold."""
        try:
            folder = path if path.is_dir() else path.parent
            links = [entry for entry in folder.iterdir() if entry.is_symlink()] if path.exists() else []
        except OSError:
            return  # the load says why it cannot be read
        # Beside a weight file that was named, the small ones are read.
        read = [link for link in links if folder == path or link.suffix == ".json"]
        if any(self._inside(str(link)) is None for link in read):
            raise _refused_path("one of its files is a link to outside the folders that the configuration file names")


def request_problems(settings: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with the table ``http`` of a configuration file."""
    problems = [unknown_name(name, _SETTINGS, "setting") for name in settings if name not in _SETTINGS]
    roots = settings.get("model_roots") or []
    if not isinstance(roots, list | tuple) or not all(isinstance(root, str) and root for root in roots):
        problems.append(f"model_roots: {show(roots)} is no list of folders")
    else:
        problems += [
            f"model_roots: there is no folder {show(root)}" for root in roots if not Path(_absolute(root)).is_dir()
        ]
    if not isinstance(settings.get("hub", True), bool):
        problems.append(f"hub: {show(settings['hub'])} is neither true nor false")
    if "token" in settings:
        _, wrong = examine({"token": settings["token"]})
        problems += [problem for problem in wrong if problem.startswith("token:")]
    return problems


def _refused_path(why: str) -> ConfigurationError:
    return ConfigurationError(
        f"this is not done over HTTP:\n  model_path: {why}",
        hint=f"add its folder to http.model_roots, or {_WAY_OUT}",
    )


def _absolute(path: str) -> str:
    """Return an absolute path without ``..``, by its text alone: what it names is not looked at."""
    if path == "~" or path.startswith("~/"):
        # Of nobody else: whether there is such a user is no request's business.
        path = os.path.expanduser(path)  # noqa: PTH111  # raises nothing
    return os.path.abspath(path)  # noqa: PTH100  # Path.resolve looks


def _exists(path: str) -> bool:
    return os.path.exists(path)  # noqa: PTH110  # raises nothing, not even of names that are too long


def _lies_in(path: str, roots: Iterable[str]) -> bool:
    return any(PurePath(path).is_relative_to(root) for root in roots)


def _is_any_of(value: object, known: Iterable[object]) -> bool:
    return any(value == each for each in known)
