"""The model card that a run leaves with its model."""

from __future__ import annotations

from typing import Any

import yaml

from forgelm.config.lm_tasks import LM_EVAL, lm_eval_rows
from forgelm.config.schema import KdConfig, Kind
from forgelm.config.validate import uses_teacher
from forgelm.hub import is_local
from forgelm.models.adapters import OWN_BASE, Base
from forgelm.run.lifecycle import EXTENDING, Run
from forgelm.tasks.data import TaskData

_PIPELINES = {
    Kind.text_classification: "text-classification",
    Kind.causal_lm: "text-generation",
    Kind.seq2seq: "text2text-generation",
    Kind.image_to_text: "image-to-text",
}


def model_card(run: Run, task: TaskData, results: dict[str, Any], base: Base | None) -> str:
    """A README.md with the hub's metadata header; `base` is that of an adapter."""
    config = run.config
    header: dict[str, Any] = {
        "library_name": "transformers" if base is None else "peft",
        "pipeline_tag": _PIPELINES[config.task.kind],
        "tags": ["forgelm", config.mode.name, config.task.name],
    }
    if base is not None:
        header["tags"].append("lora")
    start = config.model.path if base is None else base.path
    # The hub refuses a card whose base isn't one of its own.
    if start and not is_local(start):
        header["base_model"] = start
    if config.task.dataset:
        header["datasets"] = [config.task.dataset]
    lines = [
        f"# {config.model.name} on {config.task.name}, {config.mode.name}",
        "",
        f"Trained by forgelm, run `{run.run_id}`, seed {config.seed}.",
        "",
        f"- start: {config.model.path or 'fresh weights'}",
        *([] if base is None else [f"- adapter: LoRA on {_place(run, base)}"]),
        f"- training rows: {'a stream' if config.task.streaming else f'{len(task.train):,}'}",
        f"- steps: {run.state.step:,}",
    ]
    if isinstance(config.mode, KdConfig) and uses_teacher(config):
        teacher = config.teacher.path or f"run {config.teacher.run_hash}"
        lines.append(
            f"- teacher: {teacher}, alpha {config.mode.alpha:g}, "
            f"temperature {config.mode.temperature:g}"
        )
    lines += ["", *_table(results), "", "To repeat it:", "", "```", run.metadata["command"], "```"]
    for made in run.metadata.get("extended", []):
        further = [f"{key}={made[key][1]}" for key in EXTENDING if key in made]
        lines[-1:] = [f"forgelm train resume=RUN {' '.join(further)}", "```"]
    return f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n\n" + "\n".join(lines) + "\n"


def _place(run: Run, base: Base) -> str:
    if run.config.model.path is None:
        return f"the weights in `{OWN_BASE}/`"
    return base.path if base.revision is None else f"{base.path} at {base.revision}"


def card_of_whole(card: str) -> str:
    """An adapter's card, for the whole model that it was merged into."""
    _, header, text = card.split("---\n", 2)
    values = yaml.safe_load(header) | {"library_name": "transformers"}
    text = text.replace("- adapter: LoRA on", "- adapter: LoRA, merged into")
    return f"---\n{yaml.safe_dump(values, sort_keys=False)}---\n{text}"


def _table(results: dict[str, Any]) -> list[str]:
    after = {**results["after"]["student"]}
    measured = lm_eval_rows(after)
    after.pop(LM_EVAL, None)
    names = list(next(iter(after.values())))
    rows = [f"| split | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for split, values in after.items():
        cells = ["-" if values[name] is None else f"{values[name]:.4f}" for name in names]
        rows.append(f"| {split} | {' | '.join(cells)} |")
    if measured:
        rows += ["", "By lm-eval:", "", "| task | metric | value |", "|---|---|---|"]
    for task, metric, value in measured:
        rows.append(f"| {task} | {metric} | {'-' if value is None else f'{value:.4f}'} |")
    return rows
