"""A run's model for others: made whole, put on the hub."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from forgelm.card import card_of_whole
from forgelm.errors import ConfigError
from forgelm.final import complete
from forgelm.hub import explained
from forgelm.log import log, quiet_libraries
from forgelm.models import adapters
from forgelm.run.files import written_aside
from forgelm.run.lock import owned
from forgelm.run.paths import RunPaths

MERGED = "merged"


def write_merged(folder: Path, model: Any, reader: Any, card: Path) -> None:
    """A folder with the whole model, what feeds it, and its card; `model` is used up."""
    text = card_of_whole(card.read_text(encoding="utf-8"))
    whole = adapters.merged(model)
    with written_aside(folder) as beside:
        whole.save_pretrained(beside)
        reader.save_pretrained(beside)
        (beside / card.name).write_text(text, encoding="utf-8")


def merge_run(paths: RunPaths, output: Path | None) -> Path:
    """Merge a complete run's adapter into its base; returns the folder, `merged/` in the run or
    `output`.

    Raises:
        ConfigError: the run isn't complete or has no adapter, its base isn't as it was, or `output`
            is in use.
        RunInUse: another process is in the run.
    """
    config, metadata = complete(paths)
    if not (paths.root / adapters.SETTINGS).is_file():
        raise ConfigError(
            f"--merge: {paths.root} holds no adapter, its model is whole already; leave it out"
        )
    folder = paths.root / MERGED if output is None else output.expanduser().absolute()
    if output is not None and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"--output {output}: is there already; give a new or an empty folder")
    quiet_libraries()
    from forgelm.models.load import load_final

    # What 4 bits rounded off can't be merged into: the base as it is takes their place.
    model = replace(config.model, load_in_4bit=False)
    if config.model.load_in_4bit:
        log.warning("trained on a base in 4 bits, merged into the base as it is: close, not equal")
    with owned(paths) if output is None else nullcontext():
        revisions = metadata["revisions"]
        base = revisions.get("base") or revisions.get("model")
        final = load_final(paths.root, config.task.kind, model, metadata["labels"], base)
        write_merged(folder, final.model, final.reader, paths.root / "README.md")
    return folder


def check_push(hub_id: str) -> None:
    """Refuse what can't be uploaded before any work is done.

    Raises:
        ConfigError: `hub_id` isn't one, there is no token, or the hub is switched off.
    """
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(hub_id)
    except HFValidationError as error:
        raise ConfigError(
            f"--push {hub_id}: not a hub id, which looks like organisation/name"
        ) from error
    if constants.HF_HUB_OFFLINE:
        raise ConfigError(f"--push {hub_id}: HF_HUB_OFFLINE is set; unset it")
    if get_token() is None:
        raise ConfigError(
            f"--push {hub_id}: there is no token to write with; set HF_TOKEN, or log in with "
            "`hf auth login`"
        )


def push_run(paths: RunPaths, hub_id: str, private: bool) -> str:
    """Upload what a complete run leaves: model, tokenizer or processor, card; returns the commit.

    Raises:
        ConfigError: the run isn't complete.
        RunError: the hub can't be reached, or refuses.
    """
    _, metadata = complete(paths)
    if (paths.root / adapters.SETTINGS).is_file():
        found = adapters.find(str(paths.root), None)
        if found is not None and found.here:
            log.warning(
                "the adapter's base %s is a folder of this machine: others can't load it; --merge "
                "uploads the whole model",
                found.base,
            )
    if "final_files" not in metadata:
        raise ConfigError(
            f"{paths.root} was completed by an older forgelm, which didn't note its "
            "final files; upload the folder's model files yourself"
        )
    files = [paths.root / name for name in (*metadata["final_files"], "README.md", "eval.json")]
    files += files_in(paths.root / adapters.OWN_BASE)
    return push_files(paths.root, files, hub_id, private)


def files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def push_files(folder: Path, files: Sequence[Path], hub_id: str, private: bool) -> str:
    """Upload files of a folder in one commit, so that nobody ever finds a part of a model.

    A repository that isn't there is made. Returns the commit's hash.

    Raises:
        RunError: the hub can't be reached, or refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    with explained(f"--push {hub_id}"):
        made = api.create_repo(hub_id, private=private or None, exist_ok=True)
        commit = api.create_commit(
            made.repo_id,
            [CommitOperationAdd(str(file.relative_to(folder)), file) for file in files],
            commit_message="Model trained by forgelm",
        )
    return str(commit.oid)
