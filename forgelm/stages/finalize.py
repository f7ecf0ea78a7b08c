"""After training: the final files, the evaluation of what they hold, and the card."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forgelm.export import MERGED, write_merged
from forgelm.interrupt import point
from forgelm.log import say
from forgelm.run.files import readable, write_json, write_text
from forgelm.run.lifecycle import Run
from forgelm.run.state import Stage
from forgelm.stages.evaluation import (
    by_harness,
    evaluations,
    keep_evaluations,
    known_evaluations,
    measured,
    refuse_nan,
)

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from forgelm.harness import Harness
    from forgelm.models.adapters import Base
    from forgelm.run.tracking import Tracker
    from forgelm.tasks.data import TaskData
    from forgelm.training.trainer import Exact


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
    from forgelm.evaluate import stop_together
    from forgelm.models.sharded import gathered

    config = run.config
    best = trainer.state.best_global_step
    if config.training.load_best_model_at_end and best:
        trainer.load_weights(run.paths.checkpoint(best))
        if run.world.first:
            say(f"the best weights are those of step {best}")
    # Off with mixed precision: what is measured is what from_pretrained gives.
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    stop_together(run.world)
    weights = gathered(model, run.world.first, frozen=base is None)
    if run.world.first:
        save_final(run, model, task, base, weights)
    del weights
    after = (known_evaluations(run)["after"] or {}).get("student", {})
    for split, rows in task.eval.items():
        if split not in after:
            scores = measured(run, model, rows, task.scorer, trainer.args.device)
            refuse_nan(scores, split, trainer.state.global_step)
            after = {**after, split: scores}
            keep_evaluations(run, after={"student": after})

    def keep(student: dict[str, Any]) -> None:
        keep_evaluations(run, after={"student": student})

    after = by_harness(run, task, model, trainer.args.device, harness, after, keep)
    stop_together(run.world)
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
