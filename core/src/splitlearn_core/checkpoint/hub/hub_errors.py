"""Errors of the Hub client, translated into ours."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from splitlearn_core.checkpoint.hub.transfer import transport
from splitlearn_core.environment_errors import denied_path
from splitlearn_core.errors import CheckpointError, InsufficientDiskError, MissingFileError, SplitLearnError
from splitlearn_core.quoting import reason

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Asked:
    """What was asked of the Hub, for messages."""

    repo: str
    revision: str | None
    #: The file; empty where it is about the repository.
    name: str
    is_offline: bool
    hint_for_missing: str
    #: The folder of the cache; None for that of the environment.
    cache_dir: str | os.PathLike[str] | None = None

    @property
    def where(self) -> str:
        return f"{self.repo!r}" + (f" at revision {self.revision!r}" if self.revision else "")

    @property
    def what(self) -> str:
        return f"{self.name} of {self.where}" if self.name else self.where


def guarded(action: Callable[[], _T], asked: Asked) -> _T:
    """Do what needs the Hub, and turn its client's errors into ours, each with its way out."""
    from huggingface_hub import errors

    where, what = asked.where, asked.what
    try:
        return action()
    except SplitLearnError:
        raise
    except errors.GatedRepoError as error:
        raise MissingFileError(
            f"{where} on the Hub is gated and this token may not read it",
            hint="accept its terms on its page, then log in (hf auth login) or pass token=",
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise MissingFileError(
            f"{where} is neither a directory here nor a repository on the Hub that this token can see",
            hint="check the spelling; a private repository needs hf auth login or token=",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise MissingFileError(
            f"{asked.repo!r} has no revision {asked.revision!r}", hint="name a branch, a tag or a full commit hash"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        if (refused := _refused(asked)) is not None:
            raise _broken_transfer(what, refused) from refused
        if asked.is_offline:
            raise MissingFileError(
                f"{what}: there is no such directory, it is not in the cache, and looking on the Hub is off",
                hint=asked.hint_for_missing,
            ) from error
        raise unreachable(asked) from error
    except errors.EntryNotFoundError as error:
        raise MissingFileError(f"{where} has no {asked.name}", hint="is it a transformers checkpoint?") from error
    except errors.HFValidationError as error:
        raise MissingFileError(
            f"{where} is neither a directory here nor a name that a repository can have",
            hint="check the path, or give owner/name",
        ) from error
    except (errors.HfHubHTTPError, errors.OfflineModeIsEnabled) as error:
        raise CheckpointError(
            f"{what}: the Hub answered with an error: {reason(error)}", hint="try again later"
        ) from error
    except RuntimeError as error:
        # huggingface_hub 1.x, when nothing answers, retries on a session that it has closed.
        raise unreachable(asked) from error
    except (transport().HTTPError, OSError) as error:
        raise _broken_transfer(what, error) from error


def _refused(asked: Asked) -> PermissionError | None:
    """Return what keeps one from the cache of a repository: to the client it is as if nothing were there."""
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.file_download import repo_folder_name

    folder = Path(asked.cache_dir or HF_HUB_CACHE).expanduser() / repo_folder_name(
        repo_id=asked.repo, repo_type="model"
    )
    for place in (folder, folder / "refs", folder / "snapshots"):
        try:
            os.scandir(place).close()
        except PermissionError as error:
            return error
        except OSError:
            continue  # not there: then nothing is
    return None


def _broken_transfer(what: str, error: Exception) -> SplitLearnError:
    """Say what a transfer failed of: the disk, the cache or the connection."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return InsufficientDiskError(
            f"{what}: the disk is full: {reason(error)}", hint="free some space, or choose another disk with cache_dir="
        )
    if isinstance(error, OSError) and error.filename:
        # What names a path is about the disk. The client takes its connections for no files.
        other = "choose another folder with cache_dir= or HF_HOME"
        hint = f"{denied_path(error).hint}, or {other}" if isinstance(error, PermissionError) else other
        return CheckpointError(f"{what}: the cache of models cannot be used: {reason(error)}", hint=hint)
    return CheckpointError(
        f"{what}: the connection to the Hub was lost: {reason(error)}",
        hint="run it again: what was downloaded is kept; what is cached loads with local_files_only=True",
    )


def unreachable(asked: Asked, why: str = "") -> SplitLearnError:
    """Say that nothing answers where the Hub should be, or that the cache may not be looked into."""
    from huggingface_hub import constants

    refused = _refused(asked)
    if refused is not None:
        return _broken_transfer(asked.what, refused)
    hub = f"the Hub ({constants.ENDPOINT}) cannot be reached" + (f" ({why})" if why else "")
    return MissingFileError(
        f"{asked.what}: there is no such directory, {hub}, and the cache has no copy",
        hint="check the spelling, the network and HF_ENDPOINT",
    )
