"""The model card that a run leaves with its model."""

from __future__ import annotations

from typing import Any

import yaml

from forgelm.config.schema import KdConfig, Kind
from forgelm.config.validate import uses_teacher
from forgelm.run.lifecycle import EXTENDING, Run
from forgelm.tasks.data import TaskData

_PIPELINES = {
    Kind.text_classification: "text-classification",
    Kind.causal_lm: "text-generation",
    Kind.seq2seq: "text2text-generation",
    Kind.image_to_text: "image-to-text",
}


def model_card(run: Run, task: TaskData, results: dict[str, Any]) -> str:
    """A README.md with the hub's metadata header."""
    config = run.config
    header: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": _PIPELINES[config.task.kind],
        "tags": ["forgelm", config.mode.name, config.task.name],
    }
    if config.model.path:
        header["base_model"] = config.model.path
    if config.task.dataset:
        header["datasets"] = [config.task.dataset]
    lines = [
        f"# {config.model.name} on {config.task.name}, {config.mode.name}",
        "",
        f"Trained by forgelm, run `{run.run_id}`, seed {config.seed}.",
        "",
        f"- start: {config.model.path or 'fresh weights'}",
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


def _table(results: dict[str, Any]) -> list[str]:
    after = results["after"]["student"]
    names = list(next(iter(after.values())))
    rows = [f"| split | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for split, values in after.items():
        cells = ["-" if values[name] is None else f"{values[name]:.4f}" for name in names]
        rows.append(f"| {split} | {' | '.join(cells)} |")
    return rows
