"""`forgelm evaluate RUN`: the final model on its task's splits."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from forgelm.cli.arguments import answer, check_output, parser
from forgelm.config.lm_tasks import LM_EVAL, lm_eval_rows


def main(argv: Sequence[str]) -> int:
    made = parser("evaluate", "Evaluate a run's final model on its task's splits.")
    made.add_argument("--output", metavar="FILE", help="write the result as JSON too")
    return answer(argv, made, _work, _text)


def _work(arguments: argparse.Namespace) -> dict[str, Any]:
    from forgelm.final import evaluate_run
    from forgelm.log import set_up
    from forgelm.run.files import write_json
    from forgelm.run.find import find_run

    set_up(arguments.debug, sys.stderr)
    if arguments.output:
        check_output(Path(arguments.output))
    paths = find_run(arguments.run, Path(arguments.output_root))
    splits, tasks = evaluate_run(paths)
    result = {"run": str(paths.root), "splits": splits, **({LM_EVAL: tasks} if tasks else {})}
    if arguments.output:
        write_json(Path(arguments.output), result)
    return result


def _text(result: dict[str, Any]) -> str:
    from forgelm.report import table

    splits: dict[str, dict[str, float | None]] = result["splits"]
    names = list(next(iter(splits.values())))
    rows = [("split", *names)]
    for split, values in splits.items():
        cells = ("-" if value is None else f"{value:.4f}" for value in values.values())
        rows.append((split, *cells))
    measured = lm_eval_rows(result)
    if not measured:
        return table(rows)
    found = ((task, metric, "-" if v is None else f"{v:.4f}") for task, metric, v in measured)
    return f"{table(rows)}\n\n{table([('lm-eval task', 'metric', 'value'), *found])}"
