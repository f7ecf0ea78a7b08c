"""All that runs need, brought into the caches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from forgelm.airgap import data, models, tasks
from forgelm.airgap.caches import Caches
from forgelm.airgap.data import DataSet, Ready
from forgelm.airgap.fetch import Landed, Progress, Wanted, fetch
from forgelm.airgap.needs import Model, Needs, base_of
from forgelm.errors import ForgeError, RunError
from forgelm.hub import is_local


@dataclass(frozen=True)
class Provided:
    """What became of a thing that runs need; `error` where it isn't there.

    Attributes:
        kind: "model", "dataset" or "task".
        role: who it is to the run.
        path: where it lies; None for a task.
    """

    kind: str
    role: str
    name: str
    commit: str | None = None
    path: Path | None = None
    error: ForgeError | None = None


def provide(wanted: Needs, caches: Caches, progress: Progress) -> Iterator[Provided]:
    """Bring models with their bases, data sets and tasks into the caches; one after the other.

    What fails doesn't stop the others.

    Raises:
        ConfigError: a cache can't be written to, or a task's name is unknown.
    """
    yield from _all_models(wanted.models, caches, progress)
    asked = [
        DataSet.of(one.path, one.config, one.revision, key="task.dataset_config")
        for one in wanted.data
    ]
    for found in data.cache(asked, caches, progress) if asked else []:
        one = found.wanted
        name = f"{one.path}{f', {one.name}' if one.name else ''}"
        if isinstance(found, Ready):
            yield Provided("dataset", "data set", name, found.commit, found.folder)
        else:
            yield Provided("dataset", "data set", name, error=found.error)
    for group in wanted.tasks:
        for row in tasks.cache(group.names, group.include_path, caches, progress):
            yield Provided("task", "lm-eval task", row.name, error=row.error)


def _all_models(asked: Sequence[Model], caches: Caches, progress: Progress) -> Iterator[Provided]:
    """Models, then the bases of those that turn out to be adapters."""
    bases: dict[Model, None] = {}
    for model, found in _models(asked, caches.hub, progress):
        yield found
        base = base_of(model, found.path) if found.path is not None else None
        if base is not None and base not in asked:
            bases[base] = None
    if bases:
        for _, found in _models(list(bases), caches.hub, progress):
            yield found


def _models(
    asked: Sequence[Model], hub: Path, progress: Progress
) -> Iterator[tuple[Model, Provided]]:
    wanted = {
        model: Wanted("model", model.path, model.revision, for_torch=True)
        for model in asked
        if not is_local(model.path)
    }
    distinct = list(dict.fromkeys(wanted.values()))
    outcomes = dict(zip(distinct, fetch(distinct, hub, progress), strict=True)) if distinct else {}
    for model in asked:
        at = "" if model.revision == "main" else f"@{model.revision}"
        name = f"{model.path}{at}"
        if model not in wanted:
            yield model, _local(model)
            continue
        outcome = outcomes[wanted[model]]
        error = _unfit(name, outcome.path) if isinstance(outcome, Landed) else outcome.error
        if isinstance(outcome, Landed) and error is None:
            yield model, Provided("model", model.role, name, outcome.commit, outcome.path)
        else:
            yield model, Provided("model", model.role, name, error=error)


def _unfit(name: str, folder: Path) -> ForgeError | None:
    """Why no run could load what the hub has under a model's name."""
    try:
        models.check_folder(folder)
    except RunError as error:
        return RunError(f"model {name}: is cached as the hub has it, and can't be loaded: {error}")
    return None


def _local(model: Model) -> Provided:
    folder = Path(model.path).expanduser().resolve()
    try:
        models.check_folder(folder)
    except RunError as error:
        return Provided("model", model.role, model.path, error=error)
    return Provided("model", model.role, model.path, path=folder)
