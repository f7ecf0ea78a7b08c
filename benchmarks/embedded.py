"""What the embedded tasks reach: each row of the table is a run of its own, command to end.

python benchmarks/embedded.py [--threads N]

arithmetic by SFT, GRPO from where that ended, ocr_digits by SFT. What distillation adds is
`python scripts/compare.py task=arithmetic` and `... task=ocr_digits`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from forgelm.errors import EXIT_OK
from forgelm.report import table
from forgelm.run.files import read_json

ARITHMETIC = "outputs/arithmetic/tiny/sft/sft"
RUNS = {
    "outputs/arithmetic/tiny/sft/sft": ("experiment=arithmetic/sft", "run_name=sft"),
    "outputs/arithmetic/tiny/rl/grpo": (
        "experiment=arithmetic/grpo",
        f"model.path={ARITHMETIC}",
        "run_name=grpo",
    ),
    "outputs/ocr_digits/tiny/sft/sft": ("task=ocr_digits", "run_name=sft"),
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--threads", default="2", help="OMP_NUM_THREADS (default: 2)")
    threads = parser.parse_args().threads
    rows: list[tuple[str, ...]] = [("command", "metric", "before", "after", "minutes")]
    with tempfile.TemporaryDirectory(prefix="forgelm-embedded-") as folder:
        for run, words in RUNS.items():
            began = time.monotonic()
            done = subprocess.run(
                [sys.executable, "-m", "forgelm", *words, "wandb.mode=disabled"],
                cwd=folder,
                env={
                    **os.environ,
                    "OMP_NUM_THREADS": threads,
                    "PYTHONPATH": str(Path(__file__).resolve().parents[1]),
                },
                stdout=sys.stderr,
            )
            if done.returncode != EXIT_OK:
                return done.returncode
            minutes = (time.monotonic() - began) / 60
            rows.append(_row(words, read_json(Path(folder, run, "eval.json")), minutes))
    print(table(rows))
    return EXIT_OK


def _row(words: tuple[str, ...], results: dict[str, Any], minutes: float) -> tuple[str, ...]:
    metric = results["metric"]
    values = [results[when]["student"]["validation"][metric] for when in ("before", "after")]
    return (" ".join(words[:-1]), metric, *(f"{v:.4f}" for v in values), f"{minutes:.1f}")


if __name__ == "__main__":
    sys.exit(main())
