"""The evaluations before and after training, kept in `eval.json` split by split."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from forgelm import stop
from forgelm.config.lm_tasks import LM_EVAL
from forgelm.config.schema import RunConfig
from forgelm.errors import RunError, Stopped
from forgelm.interrupt import point
from forgelm.log import say
from forgelm.memory import Doing, explained
from forgelm.run.files import read_json, write_json
from forgelm.run.lifecycle import Run
from forgelm.run.state import Stage
from forgelm.stages.models import Models

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import PreTrainedModel

    from forgelm.harness import Harness
    from forgelm.tasks.data import Scorer, TaskData

_POINTS = {Stage.evaluation_before: "evaluation_before", Stage.finalize: "finalize"}


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


def refuse_nan(scores: dict[str, float | None], split: str, step: int) -> None:
    """End the run where a trained model's loss on a split isn't a number."""
    if "loss" in scores and scores["loss"] is None:
        raise RunError(
            f"the loss on {split} is not a number at step {step}: lower training.learning_rate, or "
            "check the data; the last checkpoint stands"
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
