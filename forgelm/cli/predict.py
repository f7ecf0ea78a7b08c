"""`forgelm predict RUN --data FILE`: the final model on own rows, written as a file."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from forgelm.cli.arguments import answer, check_output, parser


def main(argv: Sequence[str]) -> int:
    made = parser("predict", "Apply a run's final model to own rows.")
    made.add_argument(
        "--data",
        required=True,
        metavar="PATH",
        help=".csv, .tsv, .json, .jsonl or .parquet, with the columns that the task reads; for "
        "text in images also a folder of images, or such a file with the column file_name",
    )
    made.add_argument(
        "--output",
        metavar="FILE",
        help=".jsonl or .csv to write (default: DATA's name with .predictions.jsonl, here)",
    )
    return answer(argv, made, _work, _text)


def _work(arguments: argparse.Namespace) -> dict[str, Any]:
    from forgelm.errors import ConfigError
    from forgelm.final import PREDICTION_SUFFIXES, predict_file
    from forgelm.log import set_up
    from forgelm.run.find import find_run

    set_up(arguments.debug, sys.stderr)
    data = Path(arguments.data)
    output = Path(arguments.output or f"{data.resolve().stem}.predictions.jsonl")
    if not data.exists():
        raise ConfigError(f"--data {data}: no such file")
    if output.suffix.lower() not in PREDICTION_SUFFIXES:
        raise ConfigError(f"--output {output}: must end in {' or '.join(PREDICTION_SUFFIXES)}")
    check_output(output)
    if output.exists() and output.samefile(data):
        raise ConfigError(f"--output {output}: would overwrite the data")
    paths = find_run(arguments.run, Path(arguments.output_root))
    rows = predict_file(paths, data, output)
    return {"run": str(paths.root), "data": str(data), "output": str(output), "rows": rows}


def _text(result: dict[str, Any]) -> str:
    return f"{result['rows']:,} rows written to {result['output']}"
