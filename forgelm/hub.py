"""The hub, as a run meets it: pinning a revision to a commit, and saying what went wrong."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from forgelm.errors import RunError
from forgelm.run.files import write_text

_COMMIT = re.compile(r"[0-9a-f]{40}")


def is_local(path: str) -> bool:
    """Whether a model or data-set path is a folder here and not a hub id."""
    return Path(path).expanduser().is_dir()


def pin(repo_id: str, revision: str, kind: str) -> str | None:
    """The commit that `revision` of a hub repository stands for; None for a local folder.

    `kind` is "model" or "dataset". Without internet (HF_HUB_OFFLINE) the cache's own record counts.

    Raises:
        RunError: the hub can't be reached, refuses, or lacks the repository or revision.
    """
    if is_local(repo_id):
        return None
    if _COMMIT.fullmatch(revision):
        return revision
    from huggingface_hub import HfApi, constants

    folder = f"{kind}s--{repo_id.replace('/', '--')}"
    record = Path(constants.HF_HUB_CACHE) / folder / "refs" / revision
    if constants.HF_HUB_OFFLINE:
        if record.is_file():
            return record.read_text().strip()
        raise RunError(
            f"{kind} {repo_id}@{revision}: not in the cache {constants.HF_HUB_CACHE}, and "
            "HF_HUB_OFFLINE is set; fetch it on a machine with internet first"
        )
    with explained(f"{kind} {repo_id}@{revision}"):
        commit = str(HfApi().repo_info(repo_id, revision=revision, repo_type=kind).sha)
    # Loading by commit leaves no such record, and offline the name is all there is to go by.
    write_text(record, commit)
    return commit


@contextmanager
def explained(thing: str) -> Iterator[None]:
    """Turn what the hub's clients raise into one line about `thing`."""
    import httpx2
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except GatedRepoError as error:
        raise RunError(
            f"{thing}: access is gated; ask for it on its page, then set HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise RunError(f"{thing}: the repository has no such revision") from error
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
        raise RunError(
            f"{thing}: the hub can't be reached and the cache lacks it; check the network"
        ) from error
    except HfHubHTTPError as error:
        raise RunError(f"{thing}: the hub answers: {str(error).splitlines()[0]}") from error
