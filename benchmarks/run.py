"""Ratios that the README quotes, each from pairs of measurements taken in turn.

python benchmarks/run.py [--pairs N] [startup] [step] [first-step]

startup      CPU time of `forgelm --help` and of `forgelm train --cfg job` against `import hydra`
step         time of a training step against Hugging Face's Trainer, same model and data
first-step   from the command to the end of the first step, against the imports that path needs
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parent
FORGELM = [sys.executable, "-m", "forgelm"]
PARTS = ("startup", "step", "first-step")


def cpu_seconds(command: list[str], folder: str) -> float:
    """User and system time of a child process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def ratio(
    name: str, limit: float, pairs: int, ours: Callable[[], float], theirs: Callable[[], float]
) -> bool:
    """Print the median of `ours / theirs`; whether it keeps within the limit."""
    ours(), theirs()
    measured = sorted(ours() / theirs() for _ in range(pairs))
    middle = statistics.median(measured)
    print(
        f"{name:<52} {middle:5.2f}  (at most {limit:g}; {pairs} pairs, "
        f"{measured[0]:.2f} to {measured[-1]:.2f})",
        flush=True,
    )
    return middle <= limit


def startup(pairs: int, folder: str) -> bool:
    hydra = [sys.executable, "-c", "import hydra"]
    script = str(Path(sys.executable).with_name("forgelm"))
    commands = {
        "forgelm --help / import hydra, CPU": ([script, "--help"], 0.5),
        "forgelm train --cfg job / import hydra, CPU": ([script, "train", "--cfg", "job"], 2.0),
    }
    kept = [
        ratio(
            name,
            limit,
            max(pairs, 9),
            lambda command=command: cpu_seconds(command, folder),
            lambda: cpu_seconds(hydra, folder),
        )
        for name, (command, limit) in commands.items()
    ]
    return all(kept)


def step(pairs: int, folder: str) -> bool:
    return subprocess.run([sys.executable, str(HERE / "step.py"), str(pairs)]).returncode == 0


def first_step(pairs: int, folder: str) -> bool:
    """The end of the first step is the time of its line in metrics.jsonl."""
    count = iter(range(1000))

    def modules_file() -> str:
        return str(Path(folder) / "modules.json")

    def ours() -> float:
        name = f"n{next(count)}"
        began = time.time()
        subprocess.run(
            [
                *FORGELM,
                "train",
                "max_steps=1",
                f"run_name={name}",
                "wandb.mode=disabled",
                "eval.before_training=false",
                "training.eval_strategy=no",
                "training.save_strategy=no",
                "training.logging_steps=1",
            ],
            cwd=folder,
            check=True,
            stdout=subprocess.DEVNULL,
        )
        lines = (Path(folder) / f"outputs/nli_mini/tiny/sft/{name}/metrics.jsonl").read_text()
        return float(json.loads(lines.splitlines()[0])["time"]) - began

    def theirs() -> float:
        began = time.time()
        subprocess.run([sys.executable, str(HERE / "imports.py"), modules_file()], check=True)
        return time.time() - began

    subprocess.run(
        [sys.executable, str(HERE / "imports.py"), modules_file(), "--record"],
        cwd=folder,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return ratio("command to end of first step / imports", 1.15, pairs, ours, theirs)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("parts", nargs="*", help=f"any of {', '.join(PARTS)}; default: all")
    parser.add_argument("--pairs", type=int, default=5)
    given = parser.parse_args()
    wrong = [part for part in given.parts if part not in PARTS]
    if wrong:
        parser.error(f"{', '.join(wrong)}: no such part; one of {', '.join(PARTS)}")
    functions = {"startup": startup, "step": step, "first-step": first_step}
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_HOME"] = str(Path(folder) / "hf")
        kept = [functions[part](given.pairs, folder) for part in given.parts or PARTS]
    return 0 if all(kept) else 1


if __name__ == "__main__":
    sys.exit(main())
