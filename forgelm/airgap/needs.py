"""What a run needs from the hub, and what of it the caches lack. Imports nothing heavy."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path

from forgelm.config import lm_index
from forgelm.config.schema import RunConfig, TeacherKind
from forgelm.config.validate import uses_teacher
from forgelm.hub import is_local
from forgelm.hubcache import CachedRepo, datasets_cache, hub_cache
from forgelm.models.adapters import OWN_BASE, SETTINGS
from forgelm.prepared import has_prepared, others_prepared, prepared

_MODEL = ("config.json", SETTINGS)


@dataclass(frozen=True)
class Model:
    """A model, and who needs it.

    Attributes:
        base: where an adapter's base is, if not where it says.
        base_revision: the base's, if another than it says.
    """

    role: str
    path: str
    revision: str = "main"
    base: str | None = None
    base_revision: str | None = None


@dataclass(frozen=True)
class Data:
    """A data set's configuration."""

    path: str
    config: str | None
    revision: str


@dataclass(frozen=True)
class Tasks:
    """Tasks of lm-eval, some of them perhaps defined in a folder."""

    names: tuple[str, ...]
    include_path: str | None


@dataclass(frozen=True)
class Needs:
    """What runs need, each thing once, in the order in which it is met."""

    models: tuple[Model, ...]
    data: tuple[Data, ...]
    tasks: tuple[Tasks, ...]


Commits = Mapping[str, str | None]
"""Those that a run was begun with, as its metadata has them: of "model", "base", "dataset", ..."""


@dataclass(frozen=True)
class Lack:
    """What a cache lacks, in a line; `base`: an adapter's base at the commit that a run needs."""

    line: str
    base: str | None = None


def needs(configs: Iterable[RunConfig], begun: Iterable[Commits] | None = None) -> Needs:
    """What runs need, folders of this machine included as far as they may be adapters.

    `begun`: the commits of each, where it was begun already.
    """
    models: dict[Model, None] = {}
    data: dict[Data, None] = {}
    tasks: dict[Tasks, None] = {}
    for asked_for, commits in zip(configs, begun or repeat({}), strict=False):
        config = at_commits(asked_for, commits)
        models |= dict.fromkeys(_models(config, commits))
        task, asked = config.task, config.eval.lm_eval
        if task.dataset and not is_local(task.dataset):
            data[Data(task.dataset, task.dataset_config, task.revision)] = None
        if asked.tasks:
            tasks[Tasks(tuple(asked.tasks), asked.include_path)] = None
    return Needs(tuple(models), tuple(data), tuple(tasks))


def _models(config: RunConfig, commits: Commits) -> Iterator[Model]:
    model, teacher, task = config.model, config.teacher, config.task
    if model.path:
        yield Model("model", model.path, model.revision, model.base, commits.get("base"))
    if not uses_teacher(config):
        return
    base = commits.get("teacher_base")
    if teacher.path:
        yield Model("teacher", teacher.path, teacher.revision, base_revision=base)
    elif teacher.run:
        # A run that isn't trained yet holds no model.
        if any((Path(teacher.run) / name).is_file() for name in _MODEL):
            yield Model("teacher", teacher.run, base_revision=base)
    elif teacher.kind is TeacherKind.auto and task.teacher:
        yield Model("teacher", task.teacher, task.teacher_revision)


def at_commits(config: RunConfig, revisions: Commits) -> RunConfig:
    """A run's config with the commits that it was begun with for its revisions."""
    model, task, teacher = config.model, config.task, config.teacher
    return replace(
        config,
        model=replace(model, revision=revisions.get("model") or model.revision),
        task=replace(task, revision=revisions.get("dataset") or task.revision),
        teacher=replace(teacher, revision=revisions.get("teacher") or teacher.revision),
    )


def base_of(model: Model, folder: Path) -> Model | None:
    """The base that the adapter in a folder is for; None where there is a whole model."""
    settings = _json(folder / SETTINGS)
    if settings is None or (folder / OWN_BASE / "config.json").is_file():
        return None
    named = model.base or settings.get("base_model_name_or_path")
    if not isinstance(named, str):
        return None
    revision = model.base_revision or (None if model.base else settings.get("revision"))
    return Model(f"{model.role}'s base", named, str(revision or "main"))


def _json(file: Path) -> dict[str, object] | None:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def lacking(config: RunConfig, pinned: Commits) -> list[Lack]:
    """What a run needs and the caches lack.

    `pinned`: the commits of the run's repositories, where it was begun already.
    """
    wanted = needs([config])
    found = [lack for one in wanted.models for lack in _lacking(one, pinned)]
    lines = [line for one in wanted.data for line in _unprepared(one, pinned)]
    lines += [line for one in wanted.tasks for line in _untried(one)]
    return found + [Lack(line) for line in lines]


def _lacking(model: Model, pinned: Commits) -> Iterator[Lack]:
    thing = f"{model.role} {model.path}"
    folder = Path(model.path).expanduser()
    if not folder.is_dir():
        if model.path.startswith((".", "/", "~")) or model.path.count("/") > 1:
            # A folder that isn't there: whoever loads it says what to do.
            return
        repo = CachedRepo(hub_cache(), "model", model.path)
        begun_with = pinned.get(_PINNED.get(model.role, ""))
        commit = begun_with or cached_commit(repo, model.revision)
        needed = f"{model.path}@{begun_with}" if begun_with and model.role in _BASES else None
        if commit is None or not repo.snapshot(commit).is_dir():
            at = begun_with or ("" if model.revision == "main" else model.revision)
            yield Lack(f"{thing}{at and '@' + at}: not in the cache {repo.hub}", needed)
            return
        folder = repo.snapshot(commit)
        lacks = repo.missing(commit) or []
        if not lacks and not any((folder / name).is_file() for name in _MODEL):
            lacks = [" or ".join(_MODEL)]
        if lacks:
            yield Lack(f"{thing} at {commit[:12]}: {repo.hub} lacks {_few(lacks)}", needed)
            return
    base = base_of(model, folder)
    if base is not None:
        yield from _lacking(base, pinned)


_PINNED = {
    "model": "model",
    "model's base": "base",
    "teacher": "teacher",
    "teacher's base": "teacher_base",
}
_BASES = ("model's base", "teacher's base")


def _unprepared(data: Data, pinned: Commits) -> Iterator[str]:
    thing = f"data set {data.path}{f', {data.config}' if data.config else ''}"
    repo = CachedRepo(hub_cache(), "dataset", data.path)
    commit = pinned.get("dataset") or cached_commit(repo, data.revision)
    if commit is None:
        yield f"{thing}: not in the cache {repo.hub}"
    elif prepared(data.path, data.config, commit) is None:
        others = others_prepared(data.path, commit)
        yield f"{thing} at {commit[:12]}: not prepared in {datasets_cache()}{others}"


def _untried(tasks: Tasks) -> Iterator[str]:
    """Tasks of lm-eval whose data set was never prepared, whatever else they need."""
    found = lm_index.find(tasks.names, tasks.include_path)
    lacks: dict[str, str] = {}
    for name in tasks.names:
        for leaf in found.leaves(name) if name in found.entries else []:
            config = (leaf.entry.config if leaf.entry else {}) | leaf.config
            path, part = config.get("dataset_path"), config.get("dataset_name")
            own_files = "data_files" in (config.get("dataset_kwargs") or {})
            if not isinstance(path, str) or own_files or is_local(path):
                continue
            if not has_prepared(path, part):
                data = f"{path}{f', {part}' if part else ''}"
                lacks.setdefault(f"lm-eval task {leaf.name}: data set {data}", data)
    yield from (f"{thing}: not prepared in {datasets_cache()}" for thing in lacks)


def cached_commit(repo: CachedRepo, revision: str) -> str | None:
    """The commit that a revision stands for without a network."""
    if (repo.folder / "snapshots" / revision).is_dir():
        return revision
    return repo.record().revisions.get(revision) or repo.refs().get(revision)


def _few(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
