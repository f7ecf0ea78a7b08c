"""What a run trains: the student, and the teacher if the mode needs one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from forgelm.config.schema import LoraSection, ModelConfig
from forgelm.config.validate import uses_teacher
from forgelm.errors import ConfigError
from forgelm.log import log
from forgelm.run.files import written_aside
from forgelm.run.lifecycle import Run

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from forgelm.models.adapters import Base
    from forgelm.tasks.data import TaskData


@dataclass
class Models:
    """`base` is what the student's adapters are for, None where all of it is trained."""

    student: PreTrainedModel
    teacher: PreTrainedModel | None
    base: Base | None = None


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
