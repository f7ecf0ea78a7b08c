"""What a complete run can be used for: evaluation on its splits, predictions for own rows."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forgelm.config import lm_tasks
from forgelm.config.schema import Kind, RunConfig
from forgelm.config.validate import DATA_SUFFIXES
from forgelm.errors import ConfigError
from forgelm.log import quiet_libraries
from forgelm.run.files import read_json, write_text
from forgelm.run.lifecycle import is_complete, load_sealed
from forgelm.run.paths import RunPaths

if TYPE_CHECKING:
    from forgelm.models.load import Loaded

PREDICTION_SUFFIXES = (".jsonl", ".csv")


def evaluate_run(paths: RunPaths) -> tuple[dict[str, Any], dict[str, Any]]:
    """A complete run's final model: loss and metrics on each evaluation split, and the metrics of
    each of lm-eval's tasks that the run asks for.

    Raises:
        ConfigError: the run isn't complete, its data isn't as it was, or lm-eval isn't installed.
    """
    config, metadata = complete(paths)
    asked = config.eval.lm_eval
    found = list(lm_tasks.problems(asked, config.task))
    if found:
        raise ConfigError(found)
    quiet_libraries()
    from forgelm.evaluate import evaluate
    from forgelm.models.load import device_for
    from forgelm.tasks import of_kind, rows_of

    kind = config.task.kind
    rows = rows_of(config, metadata["revisions"].get("dataset"))
    if rows.fingerprint != metadata["data_fingerprint"]:
        raise ConfigError(
            f"the data of task {config.task.name} changed since {paths.root} was trained; "
            "restore it, or use `forgelm predict` on the new rows"
        )
    final = _final(paths, config, metadata)
    task = of_kind(kind).prepare(config, rows, final.reader, None, multiple_of=None)
    size, device = config.training.per_device_eval_batch_size, device_for(config.training)
    splits = {
        name: evaluate(final.model, split, task.scorer, size, device)
        for name, split in task.eval.items()
    }
    if not asked.tasks:
        return splits, {}
    from forgelm.harness import Harness

    harness = Harness(asked)
    scores: dict[str, Any] = {}
    for name in asked.tasks:
        scores |= harness.measure(name, final.model, final.reader, kind, device)
    return splits, scores


def predict_file(paths: RunPaths, data: Path, output: Path) -> int:
    """Write each row of `data` with its `prediction` (and `score` by label); returns their number.

    Raises:
        ConfigError: the run isn't complete, or a row or column isn't what the task reads.
    """
    config, metadata = complete(paths)
    folder = data.is_dir() and config.task.kind is Kind.image_to_text
    if not folder and data.suffix.lower() not in DATA_SUFFIXES:
        raise ConfigError(f"--data {data}: must end in one of {', '.join(DATA_SUFFIXES)}")
    quiet_libraries()
    from forgelm.evaluate import records_of
    from forgelm.models.load import device_for
    from forgelm.tasks import of_kind

    kind, labels = of_kind(config.task.kind), metadata["labels"]
    final = _final(paths, config, metadata)
    asked = kind.asked(config, data, final.reader)
    _refuse_taken(data, list(asked.rows[0]), labels, output.suffix.lower())
    scorer = kind.scorer(config, labels, final.reader)
    size, device = config.training.per_device_eval_batch_size, device_for(config.training)
    made = scorer.answers(records_of(final.model, asked.encoded, scorer, size, device))
    write_text(output, _formatted(asked.rows, made, output.suffix.lower()))
    return len(made)


def complete(paths: RunPaths) -> tuple[RunConfig, dict[str, Any]]:
    """The config and metadata of a run, which must be complete."""
    if not is_complete(paths):
        raise ConfigError(
            f"{paths.root} isn't complete; go on with it first: forgelm train resume={paths.root}"
        )
    return load_sealed(paths.root), read_json(paths.metadata)


def _final(paths: RunPaths, config: RunConfig, metadata: dict[str, Any]) -> Loaded:
    from forgelm.models.load import load_final

    base = metadata["revisions"].get("base") or metadata["revisions"].get("model")
    return load_final(paths.root, config.task.kind, config.model, metadata["labels"], base)


def _refuse_taken(data: Path, columns: list[str], labels: list[str] | None, suffix: str) -> None:
    """Own columns are kept, so none may have the name of a new one."""
    scores = [f"score_{name}" for name in labels or []] if suffix == ".csv" else ["score"]
    taken = [name for name in ("prediction", *scores) if name in columns]
    if taken:
        raise ConfigError(f"--data {data}: has a column {taken[0]} already; rename it")


def _formatted(rows: list[dict[str, Any]], made: list[dict[str, Any]], suffix: str) -> str:
    if suffix == ".jsonl":
        pairs = zip(rows, made, strict=True)
        lines = (json.dumps({**a, **b}, ensure_ascii=False, default=str) for a, b in pairs)
        return "".join(line + "\n" for line in lines)
    flat = [
        {
            **row,
            "prediction": new["prediction"],
            **{f"score_{name}": value for name, value in new.get("score", {}).items()},
        }
        for row, new in zip(rows, made, strict=True)
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(flat[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()
