"""Real runs killed at random moments: each must be gone on with, and end with the same bytes.

python benchmarks/crash.py [--kills N] [--seed S]

Half of the SIGKILLs are aimed at a save: they wait until a checkpoint is half-written. The others
come at any time of the run: preparation, evaluation, training, finalize. After each, every JSON
file must parse and every checkpoint verify. A run is killed up to four times, then completed and
compared with the uninterrupted run of its config.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from forgelm.config.compose import Request
from forgelm.config.request import check_request
from forgelm.config.schema import RunConfig
from forgelm.drill import (
    Start,
    directory,
    forked,
    order_differences,
    record_differences,
    warm_up,
    weight_differences,
)
from forgelm.errors import EXIT_OK, RunError
from forgelm.run.checkpoints import damage
from forgelm.run.files import read_json
from forgelm.run.paths import RunPaths

# Saves of a few MB every few steps, so that much of the time one is under way.
BASE = (
    "task.max_train_samples=155",
    "task.max_eval_samples=32",
    "model.tiny.hidden_size=128",
    "model.tiny.dropout=0.1",
    "training.per_device_train_batch_size=8",
    "training.eval_strategy=steps",
    "training.eval_steps=7",
    "training.logging_steps=2",
    "training.save_steps=3",
    "training.record_batches=true",
    "max_steps=30",
    "wandb.mode=disabled",
)
CONFIGS: dict[str, tuple[str, ...]] = {
    "dropout": (),
    "kd": ("mode=kd", "teacher=path", "teacher.path={root}/teacher"),
    "foreground": ("training.save_in_background=false",),
    "best": ("training.load_best_model_at_end=true", "training.save_total_limit=1"),
    "accumulation": ("training.gradient_accumulation_steps=2", "task.max_train_samples=307"),
    "workers": ("training.dataloader_num_workers=2",),
}
_MOST_KILLS = 4
_CHECKPOINT_FILES = 8
_LONGEST_DELAY_S = 0.01
_POLL_S = 0.0002
_SAY_EVERY = 20
_KILLED = 128 + signal.SIGKILL


def isolate(folder: Path) -> None:
    """No network, one thread, caches below `folder`; before any library is imported."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.update(HF_HUB_OFFLINE="1", HF_HOME=str(folder / "hf"))


def warm() -> None:
    """Load once what every forked run needs."""
    warm_up()
    import forgelm.start  # noqa: F401
    from forgelm.tasks.nli_mini import SPLITS, generate

    for split in SPLITS:
        generate(split)
    # A process that a pool spawned would spawn the loader's workers too, each importing all anew.
    multiprocessing.set_start_method("fork", force=True)
    # What is frozen isn't gone through, and copied, by each run's garbage collection.
    gc.freeze()


def composed(words: Sequence[str], root: Path) -> RunConfig:
    """The config that overrides ask for, its runs below `root`, which `{root}` stands for."""
    filled = [word.format(root=root) for word in words]
    return check_request(Request((*filled, f"output_root={root}")))[0].config


def begin(config: RunConfig) -> int:
    """Run a config, or go on with it."""
    from forgelm.start import start

    return start(config, [], in_sweep=False, teacher_run=None)


def teacher(root: Path) -> None:
    """Save an untrained classifier of nli_mini, with a tokenizer of its own, in `root/teacher`."""

    def save(config: RunConfig) -> int:
        from transformers import BertConfig, BertForSequenceClassification, set_seed

        from forgelm.models.load import load_reader
        from forgelm.tasks.nli_mini import LABELS, generate

        set_seed(config.seed)
        texts = [pair.premise for pair in generate("train")]
        tokenizer = load_reader(config.model, config.task.kind, None).train_new_from_iterator(
            texts, 200
        )
        model = BertForSequenceClassification(
            BertConfig(
                vocab_size=len(tokenizer),
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=64,
                initializer_range=0.1,
                id2label=dict(enumerate(LABELS)),
                label2id={label: number for number, label in enumerate(LABELS)},
            )
        )
        model.save_pretrained(root / "teacher")
        tokenizer.save_pretrained(root / "teacher")
        return EXIT_OK

    must(forked(save, composed(BASE, root), root / "teacher.log", {}), root / "teacher.log")


def must(code: int, log: Path) -> None:
    """Raise RunError when what a result is compared with failed itself."""
    if code != EXIT_OK:
        raise RunError(f"it fails without being interrupted (exit code {code}); see {log}")


def differences(ours: RunPaths, theirs: RunPaths) -> list[str]:
    """Everything of two complete runs that must be the same and isn't."""
    return [
        *weight_differences(ours, theirs),
        *record_differences(ours, theirs),
        *order_differences(ours, theirs),
    ]


@dataclass(frozen=True)
class Kill:
    """When a start is killed: after `seconds`, or `delay` seconds after a later save has `files`.

    `files` counts those in the half-written checkpoint; None: whatever the run does then.
    """

    seconds: float
    files: int | None = None
    delay: float = 0.0

    def due(self, paths: RunPaths, began: float) -> bool:
        """Whether it is time; `began` is when the start was, in seconds since the epoch."""
        if time.time() - began < self.seconds:
            return False
        return self.files is None or any(
            count >= self.files for count in half_written(paths, began).values()
        )


def half_written(paths: RunPaths, since: float) -> dict[str, int]:
    """Checkpoints half-written since then (seconds since the epoch), and how many files they have.

    What an earlier kill left lies there until the run is gone on with, and isn't counted.
    """
    found = {}
    for folder in paths.root.glob(".checkpoint-*.part"):
        # It may be renamed at any moment.
        with suppress(FileNotFoundError):
            if folder.stat().st_mtime > since:
                found[folder.name] = len(list(folder.iterdir()))
    return found


def killed(kill: Kill, began: float) -> Start:
    """Runs a config in a further process and kills it, unless it ends before."""

    def watch(config: RunConfig) -> int:
        pid = os.fork()
        if pid == 0:
            return begin(config)
        paths = directory(config)
        while not kill.due(paths, began):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(_POLL_S)
        time.sleep(kill.delay)
        os.kill(pid, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        return _KILLED if code == -signal.SIGKILL else code

    return watch


def unusable(paths: RunPaths) -> list[str]:
    """What no kill may leave in a run directory: torn files, checkpoints that don't verify."""
    found = []
    for path in paths.root.rglob("*.json"):
        if any(part.startswith(".") for part in path.relative_to(paths.root).parts):
            continue
        try:
            read_json(path)
        except (RunError, UnicodeDecodeError) as error:
            found.append(str(error))
    for folder in paths.checkpoints():
        wrong = damage(folder)
        if wrong is not None:
            found.append(f"{folder.name}: {wrong}")
    marked = paths.marked()
    if marked is not None and marked not in {folder.name for folder in paths.checkpoints()}:
        found.append(f"latest_checkpoint names {marked!r}, which isn't there")
    return found


@dataclass
class Tally:
    """What many kills did; `inside` counts those that left a half-written checkpoint."""

    kills: int = 0
    inside: int = 0
    completed: int = 0
    unusable: int = 0
    different: int = 0
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{self.kills} kills ({self.inside} inside a save), {self.completed} runs completed: "
            f"{self.unusable} unusable, {self.different} different"
        )


@dataclass(frozen=True)
class Reference:
    """A config, its uninterrupted run, and how many seconds that took."""

    config: RunConfig
    paths: RunPaths
    seconds: float


def uninterrupted(name: str, root: Path) -> Reference:
    """Run one of CONFIGS to its end."""
    config = composed((*BASE, *CONFIGS[name], f"run_name={name}"), root)
    began, log = time.monotonic(), root / f"{name}.log"
    must(forked(begin, config, log, {}), log)
    return Reference(config, directory(config), time.monotonic() - began)


def crash(
    root: Path,
    kills: int,
    seed: int,
    configs: Sequence[str] = tuple(CONFIGS),
    say: Callable[[str], None] = print,
) -> Tally:
    """Kill runs below `root` until there were `kills`; runs that something is wrong with stay.

    `configs` are taken in turn; `say` is given a line now and then.
    """
    warm()
    teacher(root)
    chance, tally = random.Random(seed), Tally()
    references: dict[str, Reference] = {}
    said = 0
    for number, name in enumerate(itertools.cycle(configs)):
        if tally.kills >= kills:
            return tally
        if name not in references:
            references[name] = uninterrupted(name, root)
        most = min(chance.randint(1, _MOST_KILLS), kills - tally.kills)
        killed_often(references[name], f"{name}-{number}", most, chance, tally)
        if tally.kills >= said + _SAY_EVERY:
            said = tally.kills
            say(f"  {tally}")
    return tally


def killed_often(
    reference: Reference, name: str, most: int, chance: random.Random, tally: Tally
) -> None:
    """Kill one run up to `most` times, complete it, compare it."""
    config = replace(reference.config, run_name=name)
    paths, log = directory(config), Path(config.output_root) / f"{name}.log"
    code, wrong = _KILLED, list[str]()
    while code == _KILLED and most > 0 and not wrong:
        code, most = killed_once(config, log, chosen(reference, chance, tally), tally), most - 1
        wrong = unusable(paths)
    if code == _KILLED and not wrong:
        code = forked(begin, config, log, {})
    if code != EXIT_OK and not wrong:
        wrong = [f"going on ended with exit code {code}; see {log}"]
    if wrong:
        tally.unusable += 1
        tally.problems.append(f"{paths.root}: {'; '.join(wrong)}")
        return
    tally.completed += 1
    unequal = differences(reference.paths, paths)
    if unequal:
        tally.different += 1
        tally.problems.append(f"{paths.root} isn't {reference.paths.root}: {', '.join(unequal)}")
        return
    shutil.rmtree(paths.root)
    log.unlink()


def chosen(reference: Reference, chance: random.Random, tally: Tally) -> Kill:
    """A random moment, every other one inside a save."""
    seconds = chance.uniform(0, reference.seconds)
    if tally.kills % 2:
        return Kill(seconds)
    delay = chance.uniform(0, _LONGEST_DELAY_S)
    return Kill(seconds / 2, chance.randrange(_CHECKPOINT_FILES + 1), delay)


def killed_once(config: RunConfig, log: Path, kill: Kill, tally: Tally) -> int:
    """Start a run and kill it; returns _KILLED, or the exit code of a run that ended before."""
    began = time.time()
    code = forked(killed(kill, began), config, log, {})
    if code == _KILLED:
        tally.kills += 1
        tally.inside += bool(half_written(directory(config), began))
    return code


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="forgelm-crash-"))
    isolate(root)
    tally = crash(root, given.kills, given.seed, say=lambda line: print(line, flush=True))
    for problem in tally.problems:
        print(problem)
    print(tally)
    if tally.problems:
        print(f"the runs are kept in {root}")
        return 1
    shutil.rmtree(root)
    return 0


if __name__ == "__main__":
    sys.exit(main())
