"""Errors of ``huggingface_hub``, translated into errors of splitlearn."""

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
class HubRequest:
    """What was requested from the Hub, for messages."""

    repo: str
    revision: str | None
    #: The file; empty if the request is about the repository.
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


def guarded(action: Callable[[], _T], request: HubRequest) -> _T:
    """Run an action that needs the Hub, and translate the errors of its client, each with a hint."""
    from huggingface_hub import errors

    where, what = request.where, request.what
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
            f"{request.repo!r} has no revision {request.revision!r}", hint="name a branch, a tag or a full commit hash"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        if (refused := _refused(request)) is not None:
            raise _broken_transfer(what, refused) from refused
        if request.is_offline:
            raise MissingFileError(
                f"{what}: there is no such directory, it is not in the cache, and looking on the Hub is off",
                hint=request.hint_for_missing,
            ) from error
        raise unreachable(request) from error
    except errors.EntryNotFoundError as error:
        raise MissingFileError(
            f"{where} has no {request.name}",
            hint="is it a transformers checkpoint? A weight file of another format is named REPO:FILE",
        ) from error
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
        raise unreachable(request) from error
    except (transport().HTTPError, OSError) as error:
        raise _broken_transfer(what, error) from error


def _refused(request: HubRequest) -> PermissionError | None:
    """Return the error that denies access to the cache of a repository, which the client takes for an empty cache."""
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.file_download import repo_folder_name

    folder = Path(request.cache_dir or HF_HUB_CACHE).expanduser() / repo_folder_name(
        repo_id=request.repo, repo_type="model"
    )
    for place in (folder, folder / "refs", folder / "snapshots"):
        try:
            os.scandir(place).close()
        except PermissionError as error:
            return error
        except OSError:
            continue  # does not exist: nothing is cached
    return None


def _broken_transfer(what: str, error: Exception) -> SplitLearnError:
    """Return the error of a failed transfer: of the disk, the cache or the connection."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return InsufficientDiskError(
            f"{what}: the disk is full: {reason(error)}", hint="free some space, or choose another disk with cache_dir="
        )
    if isinstance(error, OSError) and error.filename:
        # An error with a file name is about the disk; errors of connections have none.
        other = "choose another folder with cache_dir= or HF_HOME"
        hint = f"{denied_path(error).hint}, or {other}" if isinstance(error, PermissionError) else other
        return CheckpointError(f"{what}: the cache of models cannot be used: {reason(error)}", hint=hint)
    return CheckpointError(
        f"{what}: the connection to the Hub was lost: {reason(error)}",
        hint="run it again: what was downloaded is kept; what is cached loads with local_files_only=True",
    )


def unreachable(request: HubRequest, why: str = "") -> SplitLearnError:
    """Return the error for a Hub that does not answer, or for a cache that may not be read."""
    from huggingface_hub import constants

    refused = _refused(request)
    if refused is not None:
        return _broken_transfer(request.what, refused)
    hub = f"the Hub ({constants.ENDPOINT}) cannot be reached" + (f" ({why})" if why else "")
    return MissingFileError(
        f"{request.what}: there is no such directory, {hub}, and the cache has no copy",
        hint="check the spelling, the network and HF_ENDPOINT",
    )
