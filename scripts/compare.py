#!/usr/bin/env python
"""The main job: the student by SFT and by KD from one start and budget, beside the teacher.

A small model's accuracy depends on its seed, so each is trained from several, and means compared.

python scripts/compare.py [OVERRIDES]     the teacher is trained once

Overrides go to both runs, those of `mode` and `teacher`, which SFT has not, to KD alone.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
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
SEEDS = (42, 1, 2, 3)
OF_KD = ("mode.", "teacher=", "teacher.")


def results(words: list[str]) -> dict[str, Any]:
    """`eval.json` of the run that these overrides name."""
    request = Request(tuple(words))
    (point,) = check_request(request)
    plan = resolve(point.config, words, False, teacher_run(point.config, request.compose))
    return dict(read_json(plan.paths.eval))


def main(overrides: Sequence[str]) -> int:
    measured: dict[str, list[dict[str, Any]]] = {mode: [] for mode in MODES}
    for seed in SEEDS:
        for mode in MODES:
            theirs = [word for word in overrides if mode == "kd" or not word.startswith(OF_KD)]
            words = [f"mode={mode}", f"seed={seed}", *theirs]
            sys.argv = ["forgelm", "train", *words]
            code = forgelm(sys.argv[1:])
            if code != EXIT_OK:
                return code
            measured[mode].append(results(words))
    rows, gains = comparison(measured)
    print(f"\nmean of {len(SEEDS)} seeds\n{table(rows)}")
    if min(gains) <= 0:
        print("KD didn't beat SFT on every split", file=sys.stderr)
        return EXIT_TRAINING_ERROR
    return EXIT_OK


def comparison(
    measured: dict[str, list[dict[str, Any]]],
) -> tuple[list[tuple[str, ...]], list[float]]:
    """The table's rows, the first its header, and how much better than SFT KD is on each split."""
    metric, before = measured["kd"][0]["metric"], measured["kd"][0]["before"]
    rows: list[tuple[str, ...]] = [("", "start", "SFT", "KD", "teacher", "KD - SFT")]
    gains = []
    for split in before["student"]:
        means = {
            mode: fmean(run["after"]["student"][split][metric] for run in measured[mode])
            for mode in MODES
        }
        start = fmean(run["before"]["student"][split][metric] for run in measured["kd"])
        values = (start, means["sft"], means["kd"], before["teacher"][split][metric])
        difference = means["kd"] - means["sft"]
        gains.append(difference if measured["kd"][0]["greater_is_better"] else -difference)
        cells = [f"{value:.4f}" for value in values]
        rows.append((f"{split} {metric}", *cells, f"{difference:+.4f}"))
    return rows, gains


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
