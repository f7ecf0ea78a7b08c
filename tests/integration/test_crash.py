"""The short form of benchmarks/crash.py: runs killed at random moments, gone on with, compared."""

from __future__ import annotations

import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from crash import crash

# One of each kind: the others cost an uninterrupted run each.
CONFIGS = ("dropout", "kd", "best", "workers")


def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    # In a process of its own: what other tests left in this one must not be forked.
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        tally = process.submit(crash, tmp_path, 12, 0, CONFIGS).result(timeout=300)
    assert tally.problems == []
    assert tally.kills == 12
    assert 0 < tally.inside <= 12
    assert tally.completed > 0
