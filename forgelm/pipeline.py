"""One run, from its config to its directory, read from top to bottom."""

from __future__ import annotations

import math
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forgelm import slurm, stop
from forgelm.config import lm_tasks
from forgelm.config.lm_tasks import LM_EVAL
from forgelm.config.rewards import round_of
from forgelm.config.schema import LoraSection, ModelConfig, RlConfig, RunConfig
from forgelm.config.validate import uses_teacher
from forgelm.deadline import Deadline, Pace, deadline
from forgelm.errors import ConfigError, RunError, Stopped
from forgelm.export import MERGED, write_merged
from forgelm.interrupt import point
from forgelm.log import log, quiet_libraries, say
from forgelm.memory import Doing, explained
from forgelm.run.checkpoints import newest_whole, read_progress
from forgelm.run.files import read_json, readable, write_json, write_text, written_aside
from forgelm.run.lifecycle import Run, extend, start_session
from forgelm.run.state import Stage

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import PreTrainedModel, TrainingArguments

    from forgelm.harness import Harness
    from forgelm.models.adapters import Base
    from forgelm.run.tracking import Tracker
    from forgelm.tasks.data import Scorer, TaskData
    from forgelm.training.trainer import Exact

_POINTS = {Stage.evaluation_before: "evaluation_before", Stage.finalize: "finalize"}


@dataclass
class Models:
    """`base` is what the student's adapters are for, None where all of it is trained."""

    student: PreTrainedModel
    teacher: PreTrainedModel | None
    base: Base | None = None


def pipeline(run: Run) -> None:
    """Everything between an open run directory and a complete one."""
    began = time.monotonic()
    stop_here(run)
    quiet_libraries()
    if run.world.first:
        if run.state.restarts:
            say(_how_it_ended(run))
        start_session(run)
    run.share()
    limit = deadline() if run.world.first else None
    over = heed(run, limit)
    if run.config.model.load_in_4bit:
        from forgelm.models.adapters import check_cuda

        check_cuda()
    from forgelm.callbacks import duration
    from forgelm.report import closing

    tracker = track(run)
    code = 1
    try:
        stop_here(run)
        task = prepare_task(run)
        harness = prepare_harness(run)
        extend(run)
        stop_here(run)
        with explained(run.config, Doing.loading):
            models = load_models(run, task)
            trainer = build_trainer(run, task, models, limit)
        if run.world.first:
            say(opening_screen(run, task, models, trainer.args))
        before = evaluate_before(run, task, models, trainer.args.device, harness)
        with explained(run.config, Doing.training):
            train(run, task, trainer, tracker, before)
        results = finalize(run, task, trainer, tracker, before, models.base, harness)
        if run.world.first:
            say(closing(run.config, run.paths.root, results, duration(time.monotonic() - began)))
        code = 0
    except Stopped:
        if run.world.first:
            # Before anything that may take long: Slurm's patience is short.
            slurm.hand_back()
        tracker.preempting()
        raise
    finally:
        over()
        tracker.finish(code)


def heed(run: Run, limit: Deadline | None) -> Callable[[], None]:
    """Say what time there is, and guard it; returns what ends the guard."""
    if limit is None:
        return lambda: None
    say(str(limit))
    if "pace" in run.metadata:
        limit.compare(Pace(**run.metadata["pace"]))
    return limit.guard()


def _how_it_ended(run: Run) -> str:
    """A line for each restart: what is known of the start before."""
    last = run.metadata["sessions"][-1]
    if last["stopped"] is None:
        ended = "ended without a word"
    else:
        ended = f"ended at {last['stopped']} in step {last['to_step']} ({last['reason']})"
    return f"restart {run.state.restarts} of run {run.run_id}; the start before {ended}"


def track(run: Run) -> Tracker:
    """W&B for the first rank, nothing for the others."""
    from forgelm.run.tracking import Tracker, start_tracking

    if not run.world.first:
        return Tracker(None)
    return start_tracking(run.config.wandb, run.paths, run.run_id, read_config(run))


def stop_here(run: Run) -> None:
    """Between two parts, where nothing is half-done: stop if that was asked for, all ranks."""
    from forgelm.evaluate import stop_together

    stop_together(run.world)


def read_config(run: Run) -> dict[str, Any]:
    """The sealed config as plain data."""
    import yaml

    config: dict[str, Any] = yaml.safe_load(run.paths.config.read_text(encoding="utf-8"))
    return config


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
    return made


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
    return made


def load_models(run: Run, task: TaskData) -> Models:
    """The student, from the same start whatever the mode; the teacher if needed."""
    from transformers import set_seed

    from forgelm.models.load import check_positions, load_student, load_teacher, teacher_dtype
    from forgelm.models.tokens import refuse_leak

    config, revisions = run.config, run.metadata["revisions"]
    kind, labels = config.task.kind, task.rows.labels
    chosen = with_own_base(run, task)
    if chosen.lora != LoraSection() and not chosen.lora.enabled:
        log.warning("model.lora has settings, but model.lora.enabled=false: no adapter is trained")
    set_seed(config.seed)
    at, base_at = revisions.get("model"), revisions.get("base")
    student = load_student(chosen, kind, at, task.reader, labels, base_at)
    check_positions(student, config.task, "the model")
    base = base_of(run, chosen, labels) if chosen.lora.enabled else None
    if config.task.packing:
        refuse_leak(student)
    if not uses_teacher(config):
        return Models(student, None, base)
    dtype = teacher_dtype(config.teacher)
    at, base_at = revisions.get("teacher"), revisions.get("teacher_base")
    teacher = load_teacher(config.teacher, kind, at, labels, dtype, base_at)
    check_positions(teacher, config.task, "the teacher")
    return Models(student, teacher, base)


def with_own_base(run: Run, task: TaskData) -> ModelConfig:
    """The student's config; adapters on fresh weights have those as their base, kept in the run."""
    from transformers import set_seed

    from forgelm.models.adapters import OWN_BASE
    from forgelm.models.load import load_student

    model, folder = run.config.model, run.paths.root / OWN_BASE
    if model.path is not None or not model.lora.enabled:
        return model
    with run.world.first_then_others():
        # A folder that the metadata don't know is left over from a request that was refused.
        if run.world.first and "base_weights" not in run.metadata:
            set_seed(run.config.seed)
            plain = replace(model, lora=replace(model.lora, enabled=False))
            kind, labels = run.config.task.kind, task.rows.labels
            made = load_student(plain, kind, None, task.reader, labels)
            with written_aside(folder) as beside:
                made.save_pretrained(beside)
                task.reader.save_pretrained(beside)
    return replace(model, path=str(folder))


def base_of(run: Run, model: ModelConfig, labels: list[str] | None) -> Base:
    """The base of the student's adapters; refuses to go on with another than the run began with."""
    from forgelm.models import adapters

    base = adapters.base_of(model, run.metadata["revisions"], labels)
    known = run.metadata.get("base_weights")
    if known not in (None, base.weights):
        raise ConfigError(
            f"the base {base.path} changed since the run began (weights {known[:12]} are now "
            f"{str(base.weights)[:12]}): restore it, or give another run_name"
        )
    run.note(base_weights=base.weights)
    return base


def build_trainer(run: Run, task: TaskData, models: Models, limit: Deadline | None) -> Exact:
    """The mode's trainer. Callbacks join it when training begins."""
    from forgelm.modes import builder
    from forgelm.modes.arguments import training_arguments
    from forgelm.training.trainer import Safety

    config = run.config
    best = f"eval_{config.task.validation_splits[0]}_{config.task.metrics[0]}"
    arguments = training_arguments(config, run.paths.root, best)

    def measure(model: PreTrainedModel) -> dict[str, float]:
        scores = {
            split: measured(run, model, rows, task.scorer, arguments.device)
            for split, rows in task.eval.items()
        }
        return {
            f"eval_{split}_{name}": math.nan if value is None else value
            for split, values in scores.items()
            for name, value in values.items()
        }

    def sealed(step: int) -> None:
        run.update(step=step, latest_checkpoint=run.paths.checkpoint(step).name)
        if limit is not None and made.pace.save > run.metadata.get("pace", {}).get("save", 0):
            run.note(pace=asdict(made.pace))
            limit.compare(made.pace)

    parts: dict[str, Any] = {
        "model": models.student,
        "args": arguments,
        "train_dataset": task.train,
        "data_collator": task.train_collator,
        "safety": Safety(
            paths=run.paths,
            config_hash=run.metadata["config_hash"],
            target=total_steps(config, task),
            training=config.training,
            world=run.world,
            seed=config.seed,
            measure=measure,
            check_ownership=run.check_ownership,
            sealed=sealed,
        ),
    }
    made: Exact = builder(config.mode)(config, task, models.teacher, parts)
    return made


def opening_screen(run: Run, task: TaskData, models: Models, arguments: TrainingArguments) -> str:
    """What will run, before it does."""
    from forgelm.report import opening

    precision = "bf16" if arguments.bf16 else "fp16" if arguments.fp16 else "float32"
    return opening(
        run.config,
        run.paths.root,
        task,
        models.student,
        models.teacher,
        total_steps(run.config, task),
        precision,
        "cpu" if arguments.device.type == "cpu" else str(arguments.device),
    )


def evaluate_before(
    run: Run, task: TaskData, models: Models, device: torch.device, harness: Harness | None
) -> dict[str, Any] | None:
    """The student as it starts, and the teacher; what an earlier start measured is kept."""
    before: dict[str, Any] | None = known_evaluations(run)["before"]
    if not run.config.eval.before_training:
        return before
    before = before or {}
    parts = [("student", models.student, task.eval, task.scorer)]
    if models.teacher is not None:
        parts.append(("teacher", models.teacher, task.teacher_eval, task.teacher_scorer))
    for who, model, splits, scorer in parts:
        for split, rows in splits.items():
            if split in before.get(who, {}):
                continue
            if run.state.stage is Stage.setup:
                run.update(stage=Stage.evaluation_before)
            scores = measured(run, model, rows, scorer, device)
            before = {**before, who: {**before.get(who, {}), split: scores}}
            keep_evaluations(run, before=before)

    def keep(student: dict[str, Any]) -> None:
        keep_evaluations(run, before={**before, "student": student})

    student = by_harness(run, task, models.student, device, harness, before["student"], keep)
    return {**before, "student": student}


def by_harness(
    run: Run,
    task: TaskData,
    model: PreTrainedModel,
    device: torch.device,
    harness: Harness | None,
    student: dict[str, Any],
    keep: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """The student's evaluations, with those of lm-eval's tasks that aren't among them yet.

    The first rank measures, the others wait for it.
    """
    if not run.config.eval.lm_eval.tasks:
        return student
    place = "lm_eval_before" if run.state.stage is Stage.evaluation_before else "lm_eval"

    def at_batch(done: bool = False) -> bool:
        """All ranks meet here, until the first is done."""
        stopping, done = run.world.agree(stop.requested() is not None, done)
        if stopping:
            raise Stopped(stop.requested() or "another rank was asked to stop")
        return done

    def at_own_batch() -> None:
        point(place)
        at_batch()

    if harness is None:
        while not at_batch():
            pass
    else:
        for name in harness.missing(student.get(LM_EVAL, {})):
            say(f"lm-eval: {name}")
            kind = run.config.task.kind
            with explained(run.config, Doing.lm_eval):
                scores = harness.measure(name, model, task.reader, kind, device, at_own_batch)
            student = {**student, LM_EVAL: {**student.get(LM_EVAL, {}), **scores}}
            keep(student)
        at_batch(done=True)
    return run.world.share(student)


def known_evaluations(run: Run) -> dict[str, Any]:
    """What `eval.json` holds so far, the same on every rank."""
    return run.world.share(_evaluations_on_disk(run) if run.world.first else {})


def _evaluations_on_disk(run: Run) -> dict[str, Any]:
    if run.paths.eval.is_file():
        known: dict[str, Any] = read_json(run.paths.eval)
        return known
    return evaluations(run.config, None, None, None)


def keep_evaluations(run: Run, **parts: Any) -> None:
    """Write what was measured now beside what `eval.json` holds."""
    if run.world.first:
        write_json(run.paths.eval, _evaluations_on_disk(run) | parts)


def measured(
    run: Run, model: PreTrainedModel, rows: Dataset, scorer: Scorer, device: torch.device
) -> dict[str, float | None]:
    """A model on one of the run's evaluation splits, by all ranks together."""
    from forgelm.evaluate import evaluate

    with explained(run.config, Doing.evaluation):
        return evaluate(
            model,
            rows,
            scorer,
            run.config.training.per_device_eval_batch_size,
            device,
            world=run.world,
            name=_POINTS.get(run.state.stage, "evaluation"),
        )


def evaluations(config: RunConfig, before: Any, after: Any, peaks: Any) -> dict[str, Any]:
    """What `eval.json` holds."""
    return {
        "metric": config.task.metrics[0],
        "greater_is_better": config.task.greater_is_better,
        "before": before,
        "after": after,
        "peak": peaks,
    }


def train(
    run: Run,
    task: TaskData,
    trainer: Exact,
    tracker: Tracker,
    before: dict[str, Any] | None,
) -> None:
    """The training loop, from the newest checkpoint that verifies if there is one."""
    from transformers import set_seed

    from forgelm.callbacks import Progress, StepMetrics, TeacherPeak, peaks

    config, target = run.config, trainer.safety.target
    checkpoint = run.world.share(choose_checkpoint(run) if run.world.first else None)
    step = 0
    if checkpoint is not None:
        progress = read_progress(checkpoint)
        step = progress.step
        if progress.ranks != run.world.size:
            raise ConfigError(
                f"{run.paths.root} was trained by {progress.ranks} rank(s) so far, and this start "
                f"has {run.world.size}: give launch.ranks_per_node={progress.ranks}"
            )
    if run.world.first:
        teacher = (before or {}).get("teacher")
        kept = 0 if checkpoint is None else progress.metrics_lines
        metrics = StepMetrics(run.paths.metrics, tracker, kept)
        if checkpoint is not None and metrics.written != (kept, progress.metrics_sha256):
            raise RunError(
                f"{run.paths.metrics}: isn't as {checkpoint.name} knows it ({kept} lines): restore "
                "it, or delete the checkpoints to train anew"
            )
        trainer.metrics_written = lambda: metrics.written
        peak = TeacherPeak(config.task, peaks(run.paths.metrics, config.task), teacher)
        for callback in (metrics, peak, Progress()):
            trainer.add_callback(callback)
        if checkpoint is not None:
            say(f"going on from {checkpoint.name} of {target} steps")
    run.update(stage=Stage.training, step=step, target=target)
    # What was evaluated before must not decide what is drawn in training.
    set_seed(config.seed + run.world.rank)
    trainer.go_on(checkpoint)
    if trainer.stopped is not None:
        raise Stopped(trainer.stopped)
    run.update(stage=Stage.finalize, step=trainer.state.global_step)


def choose_checkpoint(run: Run) -> Path | None:
    """The newest checkpoint that verifies; `latest_checkpoint` and the state are made to agree."""
    keeps_best = run.config.training.load_best_model_at_end
    found = newest_whole(run.paths, run.metadata["config_hash"], keeps_best)
    if found is None:
        if run.state.latest_checkpoint is not None:
            log.warning("no checkpoint of this run can be used: training starts over")
        run.paths.latest_checkpoint.unlink(missing_ok=True)
    elif run.paths.marked() != found.name:
        write_text(run.paths.latest_checkpoint, found.name + "\n")
    run.update(latest_checkpoint=None if found is None else found.name)
    return found


def total_steps(config: RunConfig, task: TaskData) -> int:
    """Optimizer steps of the whole run, as the trainer counts them."""
    if config.max_steps is not None:
        return config.max_steps
    training, rows = config.training, len(task.train)
    size, uses = training.per_device_train_batch_size * config.launch.ranks, 1
    if isinstance(config.mode, RlConfig):
        round_ = round_of(config)
        size, uses = round_.prompts, round_.batches
    batches = uses * (rows // size if training.dataloader_drop_last else math.ceil(rows / size))
    each = max(math.ceil(batches / training.gradient_accumulation_steps), 1)
    return math.ceil(config.epochs * each)


def finalize(
    run: Run,
    task: TaskData,
    trainer: Exact,
    tracker: Tracker,
    before: dict[str, Any] | None,
    base: Base | None,
    harness: Harness | None,
) -> dict[str, Any]:
    """Evaluate, and leave model, tokenizer, card and results; only then is the run complete."""
    from forgelm.callbacks import peaks
    from forgelm.card import model_card
    from forgelm.models.sharded import gathered

    config = run.config
    best = trainer.state.best_global_step
    if config.training.load_best_model_at_end and best:
        trainer.load_weights(run.paths.checkpoint(best))
        if run.world.first:
            say(f"the best weights are those of step {best}")
    # Off with mixed precision: what is measured is what from_pretrained gives.
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    stop_here(run)
    weights = gathered(model, run.world.first, frozen=base is None)
    if run.world.first:
        save_final(run, model, task, base, weights)
    del weights
    after = (known_evaluations(run)["after"] or {}).get("student", {})
    for split, rows in task.eval.items():
        if split not in after:
            scores = measured(run, model, rows, task.scorer, trainer.args.device)
            after = {**after, split: scores}
            keep_evaluations(run, after={"student": after})

    def keep(student: dict[str, Any]) -> None:
        keep_evaluations(run, after={"student": student})

    after = by_harness(run, task, model, trainer.args.device, harness, after, keep)
    stop_here(run)
    results = evaluations(config, before, {"student": after}, None)
    if run.world.first:
        results["peak"] = peaks(run.paths.metrics, config.task)
        write_json(run.paths.eval, results)
        write_text(run.paths.root / "README.md", model_card(run, task, results, base))
        if config.model.lora.merge and base is not None:
            write_merged(run.paths.root / MERGED, model, task.reader, run.paths.root / "README.md")
        tracker.summarize({"eval": results, "run_metadata": {**run.metadata, "sessions": None}})
        run.update(stage=Stage.done, pipeline_complete=True)
    return results


def save_final(
    run: Run,
    model: PreTrainedModel,
    task: TaskData,
    base: Base | None,
    weights: dict[str, torch.Tensor] | None,
) -> None:
    """Model and tokenizer at the run's root: written aside first, then moved file by file.

    `weights` are those of a model that is sharded.
    """
    from forgelm.models import adapters

    merged = run.paths.root / MERGED
    if merged.is_dir():
        shutil.rmtree(merged)
        say(
            f"{merged} was of the model before and is removed; forgelm export --merge makes it anew"
        )
    beside = Path(tempfile.mkdtemp(dir=run.paths.root, prefix=".final-"))
    try:
        if base is None:
            model.save_pretrained(beside, state_dict=weights)
        else:
            adapters.save(model, beside, base, weights)
        task.reader.save_pretrained(beside)
        files = sorted(beside.iterdir())
        run.note(final_files=[file.name for file in files])
        for file in files:
            readable(file)
            point("finalize")
            file.replace(run.paths.root / file.name)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
