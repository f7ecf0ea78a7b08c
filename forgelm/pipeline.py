"""One run, from its config to its directory, read from top to bottom."""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import shutil
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forgelm.config.schema import KdConfig, Problem, RunConfig, TeacherKind
from forgelm.config.validate import uses_teacher
from forgelm.errors import EXIT_OK, ConfigError, ForgeError, RunError, RunInUse
from forgelm.log import log, quiet_libraries, say, set_up, to_file
from forgelm.resolve import Plan, resolve, sealed_plan, settle
from forgelm.run.files import read_json, readable, write_json, write_text
from forgelm.run.lifecycle import Run, end_session, extend, is_complete, opened, start_session
from forgelm.run.paths import RunPaths, checkpoint_step
from forgelm.run.registry import unregister
from forgelm.run.state import Stage, Status

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import PreTrainedModel, TrainingArguments

    from forgelm.modes.sft import FinetuningTrainer
    from forgelm.run.tracking import Tracker
    from forgelm.tasks.encode import Collator
    from forgelm.tasks.prepare import TaskData

_WAIT_S = 2.0


def start(
    config: RunConfig, overrides: list[str], in_sweep: bool, teacher_run: RunConfig | None
) -> int:
    """Run what was asked for, its teacher first where that is a run of its own.

    Returns EXIT_OK; everything else is raised as a ForgeError.
    """
    set_up(config.debug)
    plan = settle(resolve(config, overrides, in_sweep, teacher_run))
    if is_complete(plan.paths) and not plan.extends:
        say(f"{plan.paths.root} is complete; its results are in eval.json")
        return EXIT_OK
    if plan.config.teacher.kind is TeacherKind.run:
        _make_sure_of_teacher(RunPaths(Path(str(plan.config.teacher.run))))
    _run(plan)
    return EXIT_OK


def _make_sure_of_teacher(paths: RunPaths) -> None:
    """Train the teacher's run if nobody has; wait if somebody is at it."""
    waiting = False
    while not is_complete(paths):
        try:
            plan = sealed_plan(paths.root)
            say(f"the teacher isn't trained yet: training {paths.root} once, for all runs")
            _run(plan)
        except RunInUse as busy:
            if not waiting:
                say(f"waiting for the teacher: {busy}")
            waiting = True
            time.sleep(_WAIT_S)


def _run(plan: Plan) -> None:
    """Own the run's directory and work in it; leave the reason of every stop behind."""
    with (
        opened(plan.paths, plan.config, plan.digest, plan.overrides) as run,
        to_file(plan.paths.log),
    ):
        try:
            pipeline(run)
        except KeyboardInterrupt:
            end_session(run, Status.preempted, "Ctrl-C")
            kept = run.state.latest_checkpoint or "its start, no checkpoint being written yet"
            say(f"the same command, or resume={plan.paths.root}, goes on from {kept}")
            raise
        except ForgeError as error:
            # A complete run that can't be gone further with is as complete as before.
            status = Status.complete if run.state.pipeline_complete else Status.failed
            end_session(run, status, str(error))
            if isinstance(error, ConfigError) and run.state.stage is Stage.setup:
                unregister(run.output, run.run_id)
            _to_log_alone(run)
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                reason = f"no space left for {plan.paths.root}; the same command goes on after"
            # On a full disk even this may fail, and must not hide the reason.
            with contextlib.suppress(OSError):
                end_session(run, Status.failed, reason)
                _to_log_alone(run)
            raise RunError(f"{reason} (the traceback is in {plan.paths.log})") from error
        end_session(run, Status.complete, "complete")


def _to_log_alone(run: Run) -> None:
    """The traceback into output.log, and on the screen with debug=true."""
    if run.config.debug:
        log.error(traceback.format_exc())
        return
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.FileHandler):
            record = log.makeRecord(
                log.name, logging.ERROR, "", 0, traceback.format_exc(), (), None
            )
            handler.handle(record)


@dataclass
class Models:
    student: PreTrainedModel
    teacher: PreTrainedModel | None


def pipeline(run: Run) -> None:
    """Everything between an open run directory and a complete one."""
    began = time.monotonic()
    quiet_libraries()
    start_session(run)
    from forgelm.callbacks import duration
    from forgelm.report import closing
    from forgelm.run.tracking import start_tracking

    tracker = start_tracking(run.config.wandb, run.paths, run.run_id, read_config(run))
    code = 1
    try:
        task = prepare_task(run)
        extend(run)
        models = load_models(run, task)
        trainer = build_trainer(run, task, models)
        say(opening_screen(run, task, models, trainer.args))
        before = evaluate_before(run, task, models, trainer.args.device)
        train(run, task, trainer, tracker, before)
        results = finalize(run, task, trainer, tracker, before)
        say(closing(run.config, run.paths.root, results, duration(time.monotonic() - began)))
        code = 0
    finally:
        tracker.finish(code)


def read_config(run: Run) -> dict[str, Any]:
    """The sealed config as plain data."""
    import yaml

    config: dict[str, Any] = yaml.safe_load(run.paths.config.read_text(encoding="utf-8"))
    return config


def pin_revisions(run: Run) -> dict[str, str | None]:
    """The commit of each hub repository: pinned when the run first starts, the same ever after."""
    from forgelm.hub import pin

    known = run.metadata.get("revisions")
    if known is not None:
        return dict(known)
    config, teacher = run.config, run.config.teacher
    revisions: dict[str, str | None] = {}
    if config.model.path:
        revisions["model"] = pin(config.model.path, config.model.revision, "model")
    if config.task.dataset:
        revisions["dataset"] = pin(config.task.dataset, config.task.revision, "dataset")
    if teacher.path:
        revisions["teacher"] = pin(teacher.path, teacher.revision, "model")
    run.note(revisions=revisions)
    return revisions


def prepare_task(run: Run) -> TaskData:
    """Tokenizers and rows; refuses to go on with other data than the run began with."""
    from forgelm.models.load import load_teacher_tokenizer, load_tokenizer
    from forgelm.modes.arguments import use_bf16
    from forgelm.tasks.prepare import prepare
    from forgelm.tasks.rows import load_rows

    config, revisions = run.config, pin_revisions(run)
    rows = load_rows(config.task, revisions.get("dataset"))
    known = run.metadata.get("data_fingerprint")
    if known not in (None, rows.fingerprint):
        raise ConfigError(
            f"the data of task {config.task.name} changed since the run began (fingerprint "
            f"{known[:12]} is now {rows.fingerprint[:12]}): restore it, or give another run_name"
        )
    run.note(data_fingerprint=rows.fingerprint, labels=rows.labels)
    tokenizer = load_tokenizer(config.model, revisions.get("model"))
    theirs = None
    if uses_teacher(config):
        theirs = load_teacher_tokenizer(config.teacher, revisions.get("teacher"))
    half = config.training.fp16 or use_bf16(config.training)
    return prepare(config.task, rows, tokenizer, theirs, multiple_of=8 if half else None)


def load_models(run: Run, task: TaskData) -> Models:
    """The student, from the same start whatever the mode; the teacher if needed."""
    from transformers import set_seed

    from forgelm.models.load import load_student, load_teacher, teacher_dtype

    config, revisions = run.config, run.metadata["revisions"]
    labels = task.rows.labels
    set_seed(config.seed)
    student = load_student(config.model, revisions.get("model"), task.collator.tokenizer, labels)
    if not uses_teacher(config):
        return Models(student, None)
    dtype = teacher_dtype(config.teacher)
    return Models(student, load_teacher(config.teacher, revisions.get("teacher"), labels, dtype))


def build_trainer(run: Run, task: TaskData, models: Models) -> FinetuningTrainer:
    """The mode's trainer. Callbacks join it when training begins."""
    from transformers.trainer_callback import PrinterCallback

    from forgelm.evaluate import metrics_function
    from forgelm.modes.arguments import training_arguments
    from forgelm.modes.kd import DistillationTrainer
    from forgelm.modes.sft import FinetuningTrainer

    config = run.config
    best = f"eval_{config.task.validation_splits[0]}_{config.task.metrics[0]}"
    arguments = training_arguments(config, run.paths.root, best)
    parts: dict[str, Any] = {
        "model": models.student,
        "args": arguments,
        "train_dataset": task.train,
        "eval_dataset": task.eval,
        "data_collator": task.collator,
        "compute_metrics": metrics_function(config.task.metrics, task.regression),
        "keep_best": config.training.load_best_model_at_end,
    }
    if isinstance(config.mode, KdConfig):
        trainer: FinetuningTrainer = DistillationTrainer(
            **parts, mode=config.mode, teacher=models.teacher
        )
    else:
        trainer = FinetuningTrainer(**parts)
    trainer.remove_callback(PrinterCallback)
    return trainer


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
        total_steps(run.config, len(task.train)),
        precision,
        str(arguments.device),
    )


def evaluate_before(
    run: Run, task: TaskData, models: Models, device: torch.device
) -> dict[str, Any] | None:
    """The student as it starts, and the teacher; what an earlier start measured is kept."""
    if run.paths.eval.is_file():
        known: dict[str, Any] | None = read_json(run.paths.eval)["before"]
        return known
    if not run.config.eval.before_training:
        return None
    run.update(stage=Stage.evaluation_before)
    before = {"student": measured(run, models.student, task.eval, task.collator, device)}
    if models.teacher is not None:
        before["teacher"] = measured(
            run, models.teacher, task.teacher_eval, task.teacher_collator, device
        )
    write_json(run.paths.eval, evaluations(run.config, before, None, None))
    return before


def measured(
    run: Run,
    model: PreTrainedModel,
    splits: dict[str, Dataset],
    collator: Collator,
    device: torch.device,
) -> dict[str, dict[str, float | None]]:
    """A model on the run's evaluation splits."""
    from forgelm.evaluate import evaluate

    task, training = run.config.task, run.config.training
    return evaluate(
        model,
        splits,
        collator,
        training.per_device_eval_batch_size,
        device,
        task.metrics,
        regression=task.problem is Problem.regression,
    )


def evaluations(config: RunConfig, before: Any, after: Any, peaks: Any) -> dict[str, Any]:
    """What `eval.json` holds."""
    return {
        "metric": config.task.metrics[0].name,
        "greater_is_better": config.task.greater_is_better,
        "before": before,
        "after": after,
        "peak": peaks,
    }


def train(
    run: Run,
    task: TaskData,
    trainer: FinetuningTrainer,
    tracker: Tracker,
    before: dict[str, Any] | None,
) -> None:
    """The training loop, from the latest checkpoint if there is one."""
    from transformers import set_seed

    from forgelm.callbacks import CheckpointMarker, Progress, StepMetrics, TeacherPeak, peaks

    config = run.config
    checkpoint = latest_checkpoint(run.paths)
    step = 0 if checkpoint is None else checkpoint_step(checkpoint)
    target = total_steps(config, len(task.train))
    teacher = (before or {}).get("teacher")
    metrics = StepMetrics(run.paths.metrics, tracker, step)
    peak = TeacherPeak(config.task, peaks(run.paths.metrics, config.task), teacher)
    for callback in (metrics, CheckpointMarker(run), peak, Progress()):
        trainer.add_callback(callback)
    if checkpoint is not None:
        say(f"going on from {checkpoint.name} of {target} steps")
    # What was evaluated before must not decide what is drawn in training.
    set_seed(config.seed)
    if checkpoint is not None and step >= target:
        restore_finished(trainer, checkpoint)
    else:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    run.update(stage=Stage.finalize, step=trainer.state.global_step, target=target)


def total_steps(config: RunConfig, rows: int) -> int:
    """Optimizer steps of the whole run, as the trainer counts them."""
    if config.max_steps is not None:
        return config.max_steps
    training = config.training
    size = training.per_device_train_batch_size
    batches = rows // size if training.dataloader_drop_last else math.ceil(rows / size)
    each = max(math.ceil(batches / training.gradient_accumulation_steps), 1)
    return math.ceil(config.epochs * each)


def latest_checkpoint(paths: RunPaths) -> Path | None:
    """The checkpoint that the marker names, else the newest that the trainer finished writing."""
    marked = []
    if paths.latest_checkpoint.is_file():
        marked = [paths.root / paths.latest_checkpoint.read_text(encoding="utf-8").strip()]
    for checkpoint in [*marked, *paths.checkpoints()]:
        if (checkpoint / "trainer_state.json").is_file():
            return checkpoint
    return None


def restore_finished(trainer: FinetuningTrainer, checkpoint: Path) -> None:
    """Load the weights and state of a training that had reached its end."""
    from transformers import TrainerState

    trainer._load_from_checkpoint(str(checkpoint))
    trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))


def finalize(
    run: Run,
    task: TaskData,
    trainer: FinetuningTrainer,
    tracker: Tracker,
    before: dict[str, Any] | None,
) -> dict[str, Any]:
    """Evaluate, and leave model, tokenizer, card and results; only then is the run complete."""
    from forgelm.callbacks import peaks
    from forgelm.card import model_card

    config = run.config
    if config.training.load_best_model_at_end and trainer.state.best_model_checkpoint:
        trainer._load_best_model()
        say(f"the best weights are those of step {trainer.state.best_global_step}")
    model = trainer.model
    save_final(run, model, task)
    device = trainer.args.device
    after = {"student": measured(run, model, task.eval, task.collator, device)}
    results = evaluations(config, before, after, peaks(run.paths.metrics, config.task))
    write_json(run.paths.eval, results)
    write_text(run.paths.root / "README.md", model_card(run, task, results))
    tracker.summarize({"eval": results, "run_metadata": {**run.metadata, "sessions": None}})
    run.update(stage=Stage.done, pipeline_complete=True)
    return results


def save_final(run: Run, model: PreTrainedModel, task: TaskData) -> None:
    """Model and tokenizer at the run's root: written aside first, then moved file by file."""
    beside = Path(tempfile.mkdtemp(dir=run.paths.root, prefix=".final-"))
    try:
        model.save_pretrained(beside)
        task.collator.tokenizer.save_pretrained(beside)
        for file in sorted(beside.iterdir()):
            readable(file)
            file.replace(run.paths.root / file.name)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
