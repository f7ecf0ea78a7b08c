"""The hub, as a run meets it: pinning a revision to a commit, and saying what went wrong."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from forgelm import network
from forgelm.errors import ConfigError, RunError
from forgelm.hubcache import CachedRepo
from forgelm.run.files import write_text

RECORD = "forgelm"
"""Whose lock is held while forgelm's record of a repository changes."""

_COMMIT = re.compile(r"[0-9a-f]{40}")


def is_local(path: str) -> bool:
    """Whether a model or data-set path is a folder here and not a hub id."""
    return Path(path).expanduser().is_dir()


def is_commit(revision: str) -> bool:
    """Whether a revision is a commit itself, and no name of one."""
    return _COMMIT.fullmatch(revision) is not None


def token_name() -> str | None:
    """Where the token comes from that the hub is shown; None without one. Never the token."""
    from huggingface_hub import constants

    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if os.environ.get(name, "").strip():
            return name
    return "hf auth login" if Path(constants.HF_TOKEN_PATH).is_file() else None


def pin(repo_id: str, revision: str, kind: str) -> str | None:
    """The commit that `revision` of a hub repository stands for; None for a local folder.

    `kind` is "model" or "dataset". Without internet (HF_HUB_OFFLINE) it is the commit that was
    cached whole, else the one that the cache's own reference names.

    Raises:
        RunError: the hub can't be reached, refuses, or lacks the repository or revision.
    """
    if is_local(repo_id):
        return None
    if is_commit(revision):
        return revision
    from huggingface_hub import HfApi, constants

    repo = CachedRepo(Path(constants.HF_HUB_CACHE), kind, repo_id)
    if constants.HF_HUB_OFFLINE:
        cached = repo.record().revisions.get(revision) or repo.refs().get(revision)
        if cached is not None:
            return cached
        raise RunError(
            f"{kind} {repo_id}@{revision}: not in the cache {constants.HF_HUB_CACHE}, and "
            "HF_HUB_OFFLINE is set; fetch it on a machine with internet first"
        )
    with explained(f"{kind} {repo_id}@{revision}", in_run=True):
        commit = str(HfApi().repo_info(repo_id, revision=revision, repo_type=kind).sha)
    # Loading by commit leaves no such record, and offline the name is all there is to go by.
    write_text(repo.ref(revision), commit)
    return commit


def lock(repo: CachedRepo, name: str) -> Any:
    """The lock under which huggingface_hub writes the blob `name`, or of RECORD; a context."""
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

    repo.locks.mkdir(parents=True, exist_ok=True)
    return WeakFileLock(repo.locks / f"{name}.lock")


@contextmanager
def explained(thing: str, in_run: bool = False) -> Iterator[None]:
    """Turn what the hub's clients raise into one line about `thing`.

    `in_run`: it is asked for by what could make do with the cache.
    """
    import httpx2
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except GatedRepoError as error:
        raise RunError(f"{thing}: access is gated{_page(error)}, {_as_whom()}") from error
    except RevisionNotFoundError as error:
        raise RunError(f"{thing}: the repository has no such revision") from error
    except RemoteEntryNotFoundError as error:
        raise RunError(f"{thing}: the hub has no such file at this commit") from error
    except RepositoryNotFoundError as error:
        raise RunError(
            f"{thing}: no such repository on the hub, or it is private; check the name, "
            "or set HF_TOKEN"
        ) from error
    except HFValidationError as error:
        raise RunError(
            f"{thing}: neither a folder here nor a hub id, which looks like organisation/name"
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, httpx2.TransportError) as error:
        if constants.HF_HUB_OFFLINE:
            raise RunError(
                f"{thing}: the cache lacks it, and HF_HUB_OFFLINE is set; fetch it with forgelm "
                "cache where there is a network"
            ) from error
        if (mistake := network.mistake()) is not None:
            raise ConfigError(f"{thing}: {mistake}") from error
        proxy = network.proxy_for(constants.ENDPOINT)
        through = f" through the proxy of {proxy}" if proxy else ""
        cached = "; HF_HUB_OFFLINE=1 makes do with what is cached" if in_run else ""
        raise RunError(
            f"{thing}: {constants.ENDPOINT} can't be reached{through}; check the network, "
            f"{f'{proxy}, ' if proxy else ''}and HF_ENDPOINT{cached}"
        ) from error
    except HfHubHTTPError as error:
        name = token_name()
        if error.response.status_code == 401 and name is not None:
            raise RunError(
                f"{thing}: the hub doesn't accept the token of {name}; make a new one at "
                f"{constants.ENDPOINT}/settings/tokens, or go without"
            ) from error
        raise RunError(f"{thing}: the hub answers: {str(error).splitlines()[0]}") from error
    except (httpx2.InvalidURL, ImportError, ValueError) as error:
        # What making a client raises where a variable is wrong.
        if constants.HF_HUB_OFFLINE or (mistake := network.mistake()) is None:
            raise
        raise ConfigError(f"{thing}: {mistake}") from error


def _page(error: Exception) -> str:
    """Where access to a gated repository is asked for."""
    kind, name = getattr(error, "repo_type", None), getattr(error, "repo_id", None)
    if not name:
        return "; ask for it on its page"
    from huggingface_hub import constants

    folder = f"{kind}s/" if kind in ("dataset", "space") else ""
    return f"; ask for it at {constants.ENDPOINT}/{folder}{name}"


def _as_whom() -> str:
    name = token_name()
    if name is None:
        return "then set HF_TOKEN: no token was sent"
    return f"with the account that the token of {name} belongs to"
