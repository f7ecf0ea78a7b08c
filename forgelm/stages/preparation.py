"""What a run learns from: commits pinned, rows read and encoded, lm-eval's tasks found."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from forgelm import stop
from forgelm.config import lm_tasks
from forgelm.config.schema import RlConfig, RunConfig
from forgelm.config.validate import uses_teacher
from forgelm.errors import ConfigError
from forgelm.interrupt import point
from forgelm.log import log
from forgelm.run.lifecycle import Run

if TYPE_CHECKING:
    from forgelm.harness import Harness
    from forgelm.tasks.data import TaskData


def pin_revisions(run: Run) -> dict[str, str | None]:
    """The commit of each hub repository: pinned when the run first starts, the same ever after."""
    from forgelm.hub import pin
    from forgelm.models import adapters

    known = run.metadata.get("revisions")
    if known is not None:
        return dict(known)
    config, teacher = run.config, run.config.teacher
    revisions: dict[str, str | None] = {}
    if config.model.path:
        revisions["model"] = pin(config.model.path, config.model.revision, "model")
        found = adapters.find(config.model.path, revisions["model"], config.model.base)
        if found is not None:
            revisions["base"] = pin(found.base, found.base_revision, "model")
        elif config.model.base is not None:
            raise ConfigError(
                f"model.base={config.model.base} is only read where model.path is an adapter, and "
                f"{config.model.path} isn't one; leave it out"
            )
    if config.task.dataset:
        revisions["dataset"] = pin(config.task.dataset, config.task.revision, "dataset")
    if teacher.path:
        revisions["teacher"] = pin(teacher.path, teacher.revision, "model")
    if teacher.path or teacher.run:
        found = adapters.find(str(teacher.path or teacher.run), revisions.get("teacher"))
        if found is not None:
            revisions["teacher_base"] = pin(found.base, found.base_revision, "model")
    run.note(revisions=revisions)
    return revisions


def prepare_task(run: Run) -> TaskData:
    """Tokenizers and rows; refuses to go on with other data than the run began with."""
    config = run.config
    if run.world.first:
        pin_revisions(run)
    run.share()
    revisions = run.metadata["revisions"]
    with run.world.first_then_others():
        return _prepared(run, config, revisions)


def _prepared(run: Run, config: RunConfig, revisions: dict[str, str | None]) -> TaskData:
    from forgelm.models.load import load_reader, load_teacher_reader
    from forgelm.modes.arguments import use_bf16
    from forgelm.tasks import metrics, of_kind, rows_of

    kind = config.task.kind
    metrics.load(config.task.metrics)
    rows = rows_of(config, revisions.get("dataset"))
    point("preparation")
    stop.check()
    known = run.metadata.get("data_fingerprint")
    if known not in (None, rows.fingerprint):
        raise ConfigError(
            f"the data of task {config.task.name} changed since the run began (fingerprint "
            f"{known[:12]} is now {rows.fingerprint[:12]}): restore it, or give another run_name"
        )
    run.note(data_fingerprint=rows.fingerprint, labels=rows.labels)
    model, base = revisions.get("model"), revisions.get("base")
    reader, theirs = load_reader(config.model, kind, model, base), None
    if uses_teacher(config):
        model, base = revisions.get("teacher"), revisions.get("teacher_base")
        theirs = load_teacher_reader(config.teacher, kind, model, base)
    half = config.training.fp16 or use_bf16(config.training)
    made: TaskData = of_kind(kind).prepare(config, rows, reader, theirs, 8 if half else None)
    check_batch(config, made)
    return made


def check_batch(config: RunConfig, task: TaskData) -> None:
    """Refuse rows that fill no batch where only full ones count; mode rl counts its own way."""
    training, ranks = config.training, config.launch.ranks
    if not training.dataloader_drop_last or isinstance(config.mode, RlConfig):
        return
    size = training.per_device_train_batch_size
    if hasattr(task.train, "__len__") and len(task.train) < size * ranks:
        times = f" times {ranks} ranks" if ranks > 1 else ""
        raise ConfigError(
            f"training.dataloader_drop_last=true: {len(task.train):,} training rows don't fill one "
            f"batch of training.per_device_train_batch_size={size}{times}, so nothing would be "
            "learnt; leave it out, or lower the batch size"
        )


def prepare_harness(run: Run) -> Harness | None:
    """lm-eval's tasks with their data, for the first rank: what is wrong with them shows before
    training. Refuses to go on with other definitions than the run began with."""
    asked = run.config.eval.lm_eval
    if not asked.tasks or not run.world.first:
        return None
    found = list(lm_tasks.problems(asked, run.config.task))
    if found:
        raise ConfigError(found)
    from forgelm.harness import Harness, fingerprint

    made = Harness(asked)
    if asked.include_path is not None:
        known, now = run.metadata.get("lm_eval_fingerprint"), fingerprint(Path(asked.include_path))
        if known not in (None, now):
            raise ConfigError(
                f"the tasks in eval.lm_eval.include_path={asked.include_path} changed since the "
                "run began: restore them, or give another run_name"
            )
        run.note(lm_eval_fingerprint=now)
    _note_commits(run, made)
    return made


def _note_commits(run: Run, harness: Harness) -> None:
    """lm-eval takes the data that are there, of whatever commit: keep which, and say a change."""
    noted: dict[str, list[str]] = dict(run.metadata.get("lm_eval_commits", {}))
    for name, commit in harness.commits().items():
        before = noted.get(name, [])
        if commit in before[-1:]:
            continue
        if before:
            log.warning(
                f"lm-eval task {name}: its data are at commit {commit} now, and were at "
                f"{before[-1]}; what was measured before is kept"
            )
        noted[name] = [*before, commit]
    run.note(lm_eval_commits=noted)
