#!/usr/bin/env python
"""The main job: the student by SFT and by KD from one start and budget, beside the teacher.

python scripts/compare.py [OVERRIDES]     overrides go to both runs; the teacher is trained once
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from forgelm.cli.main import main as forgelm
from forgelm.config.compose import Request
from forgelm.config.request import check_request, teacher_run
from forgelm.errors import EXIT_OK, EXIT_TRAINING_ERROR
from forgelm.report import table
from forgelm.resolve import resolve
from forgelm.run.files import read_json

MODES = ("sft", "kd")


def results(words: list[str]) -> dict[str, Any]:
    """`eval.json` of the run that these overrides name."""
    request = Request(tuple(words))
    (point,) = check_request(request)
    plan = resolve(point.config, words, False, teacher_run(point.config, request.compose))
    return dict(read_json(plan.paths.eval))


def main(overrides: Sequence[str]) -> int:
    measured = {}
    for mode in MODES:
        words = [f"mode={mode}", *overrides]
        sys.argv = ["forgelm", "train", *words]
        code = forgelm(sys.argv[1:])
        if code != EXIT_OK:
            return code
        measured[mode] = results(words)
    metric, before = measured["kd"]["metric"], measured["kd"]["before"]
    rows: list[tuple[str, ...]] = [("", "start", "SFT", "KD", "teacher", "KD - SFT")]
    gains = []
    for split in before["student"]:
        start, teacher = before["student"][split][metric], before["teacher"][split][metric]
        sft, kd = (measured[mode]["after"]["student"][split][metric] for mode in MODES)
        gains.append(kd - sft)
        cells = [f"{value:.4f}" for value in (start, sft, kd, teacher)]
        rows.append((f"{split} {metric}", *cells, f"{kd - sft:+.4f}"))
    print(f"\n{table(rows)}")
    if min(gains) <= 0:
        print("KD didn't beat SFT on every split", file=sys.stderr)
        return EXIT_TRAINING_ERROR
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
