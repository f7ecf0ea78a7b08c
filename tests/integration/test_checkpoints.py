"""Checkpoints: damage is found, and whatever was lost is made again to the same bytes."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import TINY, Command, Result, only_run

from forgelm import interrupt
from forgelm.config.schema import RunConfig
from forgelm.drill import (
    forked,
    metric_lines,
    order_differences,
    record_differences,
    warm_up,
    weight_differences,
)
from forgelm.run.checkpoints import MANIFEST, damage, read_progress
from forgelm.run.files import read_json
from forgelm.run.paths import RunPaths, checkpoint_step
from forgelm.training import cadence

# 8 steps an epoch. Stopped at step 10 it has checkpoints of the steps 4, 8 and 10.
SMALL = (
    "model.tiny.num_hidden_layers=1",
    "task.max_train_samples=128",
    "max_steps=12",
    "training.logging_steps=3",
    "training.save_steps=4",
    "training.save_total_limit=3",
    "training.eval_strategy=steps",
    "training.eval_steps=6",
    "training.record_batches=true",
)
FILES = (
    "config.json",
    MANIFEST,
    "model.safetensors",
    "optimizer.pt",
    "optimizer.safetensors",
    "progress.json",
    "ranks.pt",
    "ranks.safetensors",
    "scheduler.pt",
    "trainer_state.json",
)

Whole = Callable[..., RunPaths]
Interrupted = Callable[..., Result]


def in_folder(root: Path, *words: str, case: str | None = None) -> int:
    """A small run in this process, for fixtures that outlive a test."""
    from forgelm.cli.main import main

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["forgelm"])
        if case is not None:
            patch.setattr(interrupt, "_seen", Counter())
            patch.setenv(interrupt.VARIABLE, case)
        return main(["train", *TINY, *SMALL, f"output_root={root}/outputs", *words])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """An uninterrupted run; made once for the same overrides."""
    made: dict[tuple[str, ...], RunPaths] = {}

    def run(*words: str) -> RunPaths:
        if words not in made:
            root = tmp_path_factory.mktemp("whole")
            assert in_folder(root, *words) == 0
            made[words] = RunPaths(only_run(root / "outputs"))
        return made[words]

    return run


@pytest.fixture(scope="module")
def stopped_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder with a run that was stopped at a point; made once for the same point."""
    made: dict[str, Path] = {}

    def run(case: str) -> Path:
        if case not in made:
            made[case] = tmp_path_factory.mktemp("stopped")
            assert in_folder(made[case], case=case) == 75
        return made[case]

    return run


@pytest.fixture
def stopped(stopped_once: Callable[[str], Path], tmp_path: Path) -> Callable[..., RunPaths]:
    """A copy of such a run, where `tiny` finds it."""

    def copy(case: str = "training:10:SIGTERM") -> RunPaths:
        shutil.copytree(stopped_once(case), tmp_path, dirs_exist_ok=True)
        return RunPaths(only_run(tmp_path / "outputs"))

    return copy


def differences(ours: RunPaths, theirs: RunPaths) -> list[str]:
    return [
        *weight_differences(ours, theirs),
        *record_differences(ours, theirs),
        *order_differences(ours, theirs),
    ]


def names(run: RunPaths) -> list[str]:
    return [folder.name for folder in run.checkpoints()]


def steps(run: RunPaths) -> set[int]:
    return {checkpoint_step(folder) for folder in run.checkpoints()}


# Damage


def delete(path: Path) -> None:
    path.unlink()


def cut(path: Path) -> None:
    # The manifest's last byte is a newline, which says nothing.
    path.write_bytes(path.read_bytes()[: -2 if path.name == MANIFEST else -1])


def alter(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def test_a_checkpoint_has_the_files_that_are_damaged_here(
    stopped: Callable[..., RunPaths],
) -> None:
    run = stopped()
    assert names(run) == ["checkpoint-10", "checkpoint-8", "checkpoint-4"]
    assert sorted(path.name for path in run.checkpoint(10).iterdir()) == sorted(FILES)


@pytest.mark.parametrize(
    ("name", "harm"),
    [*((name, harm) for name in FILES for harm in (delete, cut, alter)), (MANIFEST, empty)],
)
def test_a_damaged_checkpoint_is_passed_over(
    stopped: Callable[..., RunPaths],
    tiny: Command,
    whole: Whole,
    name: str,
    harm: Callable[[Path], None],
) -> None:
    run = stopped()
    harm(run.checkpoint(10) / name)
    gone_on = tiny(*SMALL)
    assert gone_on.code == 0, gone_on.err
    said = run.log.read_text()
    (line,) = [line for line in said.splitlines() if "can't be used" in line]
    assert f"checkpoint-10 can't be used: {name} " in line
    assert "going on from checkpoint-8 of 12 steps" in said
    assert differences(run, whole()) == []


def of_another_format(folder: Path, other: Path) -> None:
    manifest = read_json(folder / MANIFEST)
    (folder / MANIFEST).write_text(json.dumps(manifest | {"format": 77}))


def of_no_kind(folder: Path, other: Path) -> None:
    (folder / MANIFEST).write_text("null")


def of_fewer_files(folder: Path, other: Path) -> None:
    manifest = read_json(folder / MANIFEST)
    (folder / "optimizer.pt").unlink()
    del manifest["files"]["optimizer.pt"]
    (folder / MANIFEST).write_text(json.dumps(manifest))


def of_another_run(folder: Path, other: Path) -> None:
    shutil.rmtree(folder)
    shutil.copytree(other, folder)


@pytest.mark.parametrize(
    ("swap", "said"),
    [
        (of_another_format, f"{MANIFEST} is of format 77, and this forgelm reads 1"),
        (of_no_kind, f"{MANIFEST} can't be read"),
        (of_fewer_files, f"{MANIFEST} was altered"),
        (of_another_run, "it belongs to a run with another config"),
    ],
)
def test_a_checkpoint_that_is_none_of_this_run_is_passed_over(
    stopped: Callable[..., RunPaths],
    tiny: Command,
    whole: Whole,
    swap: Callable[[Path, Path], None],
    said: str,
) -> None:
    run = stopped()
    swap(run.checkpoint(10), whole("seed=7").checkpoint(12))
    assert tiny(*SMALL).code == 0
    assert f"checkpoint-10 can't be used: {said}" in run.log.read_text()
    assert "going on from checkpoint-8" in run.log.read_text()
    assert differences(run, whole()) == []


@pytest.mark.parametrize("gone", [True, False])
def test_a_run_without_a_whole_checkpoint_starts_over(
    stopped: Callable[..., RunPaths], tiny: Command, whole: Whole, gone: bool
) -> None:
    run = stopped()
    for folder in run.checkpoints():
        if gone:
            shutil.rmtree(folder)
        else:
            alter(folder / "optimizer.pt")
    over = tiny(*SMALL)
    assert over.code == 0, over.err
    said = run.log.read_text()
    assert "no checkpoint of this run can be used: training starts over" in said
    assert said.count("can't be used") == (0 if gone else 3)
    assert "going on from" not in said
    assert differences(run, whole()) == []


def test_a_checkpoint_without_its_best_one_is_passed_over(
    interrupted: Interrupted, tiny: Command, whole: Whole, tmp_path: Path
) -> None:
    words = (
        "training.load_best_model_at_end=true",
        "training.eval_steps=2",
        "training.learning_rate=5e-2",
        "training.save_total_limit=null",
    )
    assert interrupted("training:9:SIGTERM", *words).code == 75
    run = RunPaths(only_run(tmp_path / "outputs"))
    best = read_progress(run.checkpoint(9)).best_step
    assert best is not None
    assert best < 8
    alter(run.checkpoint(best) / "model.safetensors")
    assert tiny(*SMALL, *words).code == 0
    said = run.log.read_text()
    assert f"checkpoint-9 can't be used: the best checkpoint, checkpoint-{best}, is damaged" in said
    assert f"checkpoint-{best} can't be used: model.safetensors was altered" in said
    assert differences(run, whole(*words)) == []


# What points to a checkpoint, and what looks like one


@pytest.mark.parametrize("content", [None, "checkpoint-4\n", "checkpoint-99\n", "\n", "../x\n"])
def test_the_mark_is_corrected(
    stopped: Callable[..., RunPaths], tiny: Command, whole: Whole, content: str | None
) -> None:
    run = stopped("finalize:1:SIGTERM")
    assert run.marked() == "checkpoint-12"
    if content is None:
        run.latest_checkpoint.unlink()
    else:
        run.latest_checkpoint.write_text(content)
    done = tiny(*SMALL)
    assert done.code == 0, done.err
    assert run.marked() == "checkpoint-12"
    assert read_json(run.state)["latest_checkpoint"] == "checkpoint-12"
    assert differences(run, whole()) == []


def test_leftovers_are_removed_and_never_taken(
    stopped: Callable[..., RunPaths], tiny: Command, whole: Whole
) -> None:
    run = stopped()
    shutil.copytree(whole("seed=7").checkpoint(12), run.root / ".checkpoint-11.part")
    shutil.copytree(run.checkpoint(4), run.root / ".checkpoint-2.old")
    (run.root / ".final-x").mkdir()
    old, young = run.root / ".eval.json.old.part", run.root / ".eval.json.young.part"
    for path in (old, young):
        path.write_text("{")
    os.utime(old, (time.time() - 120,) * 2)
    assert tiny(*SMALL).code == 0
    assert "going on from checkpoint-10 of 12 steps" in run.log.read_text()
    assert run.leftovers() == [young]
    assert differences(run, whole()) == []


@pytest.mark.parametrize("background", ["true", "false"])
def test_a_kill_in_a_save_leaves_the_checkpoint_before(
    tiny: Command, whole: Whole, tmp_path: Path, background: str
) -> None:
    # A save comes to its point four times: once a file that torch writes.
    words = (*TINY, *SMALL, f"training.save_in_background={background}")
    warm_up()
    tiny_root = tmp_path / "outputs"

    def begin(_config: RunConfig) -> int:
        from forgelm.cli.main import main

        return main(["train", *words, f"output_root={tiny_root}"])

    environment = {interrupt.VARIABLE: "save:5:SIGKILL"}
    assert forked(begin, RunConfig(), tmp_path / "child.log", environment) == -signal.SIGKILL
    run = RunPaths(only_run(tiny_root))
    assert (run.root / ".checkpoint-8.part").is_dir()
    assert (names(run), run.marked()) == (["checkpoint-4"], "checkpoint-4")
    assert damage(run.checkpoint(4)) is None
    gone_on = tiny(*SMALL)
    assert gone_on.code == 0, gone_on.err
    assert "going on from checkpoint-4 of 12 steps" in run.log.read_text()
    # Young files stay for a while: they may be another process's.
    assert [path.name for path in run.leftovers() if path.is_dir()] == []
    assert differences(run, whole()) == []


# Which checkpoints there are


@pytest.mark.parametrize("limit", [1, 2])
def test_the_best_and_the_latest_are_never_deleted(
    interrupted: Interrupted, tiny: Command, whole: Whole, tmp_path: Path, limit: int
) -> None:
    words = (
        "training.load_best_model_at_end=true",
        "training.eval_steps=2",
        "training.save_steps=1",
        "training.learning_rate=5e-2",
        f"training.save_total_limit={limit}",
    )
    assert interrupted("training:9:SIGTERM", *words).code == 75
    run = RunPaths(only_run(tmp_path / "outputs"))
    best = read_progress(run.checkpoint(9)).best_step
    assert best is not None
    assert best < 8
    assert steps(run) == {best, 9}
    assert tiny(*SMALL, *words).code == 0
    best = read_progress(run.checkpoint(12)).best_step
    assert steps(run) == {best, 12}
    assert differences(run, whole(*words)) == []


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        (("training.save_strategy=steps", "training.save_steps=5"), {5, 7, 10, 12}),
        (("training.save_strategy=epoch",), {7, 8, 12}),
        (("training.save_strategy=no",), {7, 12}),
        (("training.save_strategy=auto",), {7, 12}),
        (("training.save_minutes=1e-9",), {*range(1, 13)}),
        (("training.save_minutes=60",), {7, 12}),
        (("training.save_steps=5", "training.save_in_background=false"), {5, 7, 10, 12}),
    ],
)
def test_a_strategy_saves_when_it_says_a_stop_and_the_end_besides(
    interrupted: Interrupted,
    tiny: Command,
    whole: Whole,
    tmp_path: Path,
    words: tuple[str, ...],
    kept: set[int],
) -> None:
    words = ("training.save_steps=null", "training.save_total_limit=null", *words)
    assert interrupted("training:7:SIGTERM", *words).code == 75
    run = RunPaths(only_run(tmp_path / "outputs"))
    assert steps(run) == {step for step in kept if step <= 7}
    assert tiny(*SMALL, *words).code == 0
    assert steps(run) == kept
    assert differences(run, whole()) == []


@pytest.mark.parametrize(("overhead", "few"), [("1", False), ("1e-6", True)])
def test_auto_saves_as_often_as_its_share_of_the_time_allows(
    tiny: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overhead: str, few: bool
) -> None:
    monkeypatch.setattr(cadence, "AUTO_LEAST_S", 0.0)
    words = (
        "training.save_steps=null",
        "training.save_strategy=auto",
        f"training.save_overhead={overhead}",
        "training.save_total_limit=null",
    )
    assert tiny(*SMALL, *words).code == 0
    found = steps(RunPaths(only_run(tmp_path / "outputs")))
    assert 12 in found
    # The first save is free: what one costs isn't known before it.
    assert (len(found) == 2) if few else (len(found) > 2)


# Disks that fail


def assert_one_line(done: Result, *parts: str) -> None:
    assert done.code == 2, done.err
    (line,) = done.err.strip().splitlines()
    assert "Traceback" not in line
    for part in parts:
        assert part in line


def fill(folder: Path, spare: int) -> Path:
    """A file that leaves `spare` bytes of a disk."""
    path = folder / "filler"
    with path.open("wb") as file:
        free = shutil.disk_usage(folder).free
        file.write(bytes(max(0, free - spare)))
    return path


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own, where this user may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("a disk can only be mounted by root")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)], capture_output=True
    )
    if mounted.returncode != 0:
        pytest.skip("no disk can be mounted here")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.parametrize("background", ["true", "false"])
# Enough for small files alone; for the weights and a part of the optimizer.
@pytest.mark.parametrize("spare", [12_000, 80_000])
def test_a_full_disk_ends_the_run_with_a_line_that_says_so(
    interrupted: Interrupted,
    tiny: Command,
    whole: Whole,
    small_disk: Path,
    background: str,
    spare: int,
) -> None:
    words = (f"output_root={small_disk}", f"training.save_in_background={background}")
    assert interrupted("training:6:SIGTERM", *words).code == 75
    run = RunPaths(only_run(small_disk))
    filler = fill(small_disk, spare)
    failed = tiny(*SMALL, *words)
    assert_one_line(failed, f"no space left for {run.root}")
    assert names(run) == ["checkpoint-6", "checkpoint-4"]
    assert [damage(folder) for folder in run.checkpoints()] == [None, None]
    assert run.marked() == "checkpoint-6"
    filler.unlink()
    gone_on = tiny(*SMALL, *words)
    assert gone_on.code == 0, gone_on.err
    assert "going on from checkpoint-6 of 12 steps" in gone_on.out
    assert differences(run, whole()) == []


def test_a_file_that_may_not_grow_leaves_the_checkpoint_before(
    interrupted: Interrupted, tiny: Command, whole: Whole, tmp_path: Path
) -> None:
    """A quota's failure, which any user can have: no file may be larger than the weights."""
    assert interrupted("training:6:SIGTERM").code == 75
    run = RunPaths(only_run(tmp_path / "outputs"))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = (run.checkpoint(6) / "optimizer.pt").stat().st_size - 1000
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        failed = tiny(*SMALL)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert failed.code == 2
    assert len(failed.err.strip().splitlines()) == 1
    assert names(run) == ["checkpoint-6", "checkpoint-4"]
    assert [damage(folder) for folder in run.checkpoints()] == [None, None]
    assert read_json(run.state)["status"] == "failed"
    assert tiny(*SMALL).code == 0
    assert differences(run, whole()) == []


def test_a_read_only_disk_is_said(
    interrupted: Interrupted, tiny: Command, small_disk: Path
) -> None:
    words = (f"output_root={small_disk}",)
    assert interrupted("training:6:SIGTERM", *words).code == 75
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    refused = tiny(*SMALL, *words)
    assert refused.code == 1
    assert f"{small_disk} isn't writable; give another folder" in refused.err
    assert len(refused.err.splitlines()) == 1
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    assert tiny(*SMALL, *words).code == 0


def test_a_read_only_run_directory_is_said(
    interrupted: Interrupted, tiny: Command, small_disk: Path
) -> None:
    words = (f"output_root={small_disk}",)
    assert interrupted("training:6:SIGTERM", *words).code == 75
    run = str(only_run(small_disk))
    subprocess.run(["mount", "--bind", run, run], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", run], check=True)
        assert_one_line(tiny(*SMALL, *words), run, "Read-only file system")
    finally:
        subprocess.run(["umount", "-l", run], check=True)
    assert tiny(*SMALL, *words).code == 0


# Another start than before


def test_other_ranks_than_before_are_refused(
    stopped: Callable[..., RunPaths], tiny: Command, whole: Whole
) -> None:
    run = stopped()
    child = subprocess.run(
        [sys.executable, "-m", "forgelm", "train", *TINY, *SMALL, "launch.ranks_per_node=2"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert child.returncode == 1, child.stderr
    assert "trained by 1 rank(s) so far, and this start has 2" in child.stderr
    assert "give launch.ranks_per_node=1" in child.stderr
    assert names(run)[0] == "checkpoint-10"
    assert tiny(*SMALL).code == 0
    assert differences(run, whole()) == []


def test_fewer_ranks_than_before_are_refused(tiny: Command, tmp_path: Path) -> None:
    words = [*TINY, *SMALL, "training.per_device_train_batch_size=8"]
    child = subprocess.run(
        [sys.executable, "-m", "forgelm", "train", *words, "launch.ranks_per_node=2"],
        cwd=tmp_path,
        env={**os.environ, interrupt.VARIABLE: "training:3:SIGTERM"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert child.returncode == 75, child.stderr
    refused = tiny(*SMALL, "training.per_device_train_batch_size=8")
    assert refused.code == 1
    assert "trained by 2 rank(s) so far, and this start has 1" in refused.err
    assert "give launch.ranks_per_node=2" in refused.err
    assert read_json(only_run(tmp_path / "outputs") / "training_state.json")["step"] == 3


# Early stopping: nothing is learned, so no evaluation after the first is a gain.
IDLE = (
    "training.learning_rate=1e-12",
    "training.eval_steps=2",
    "training.early_stopping_patience=2",
)


@pytest.mark.parametrize(
    "case",
    ["training:5:SIGTERM", "training:6:SIGUSR1", "evaluation:6:SIGTERM", "finalize:1:SIGTERM"],
)
def test_an_early_stop_comes_at_the_same_step(
    interrupted: Interrupted, tiny: Command, whole: Whole, tmp_path: Path, case: str
) -> None:
    uninterrupted = whole(*IDLE)
    assert read_json(uninterrupted.state)["step"] == 6
    assert interrupted(case, *IDLE).code == 75
    assert tiny(*SMALL, *IDLE).code == 0
    run = RunPaths(only_run(tmp_path / "outputs"))
    state = read_json(run.state)
    assert (state["status"], state["step"]) == ("complete", 6)
    assert differences(run, uninterrupted) == []


def test_a_run_that_stopped_early_goes_further(
    tiny: Command, forgelm: Command, tmp_path: Path
) -> None:
    assert tiny(*SMALL, *IDLE, "run_name=mine").code == 0
    run = RunPaths(only_run(tmp_path / "outputs"))
    assert "is complete" in forgelm("resume", "mine").out
    further = forgelm("resume", "mine", "max_steps=20")
    assert further.code == 0, further.err
    assert "going on from checkpoint-6 of 20 steps" in further.out
    state = read_json(run.state)
    assert (state["status"], state["step"], state["target"]) == ("complete", 8, 20)
    assert [line["step"] for line in metric_lines(run)] == [2, 3, 4, 6, 8]


@pytest.mark.parametrize("damage_to", [delete, empty, alter])
def test_lost_metrics_are_not_gone_on_from(
    forgelm: Command,
    stopped: Callable[..., RunPaths],
    whole: Whole,
    damage_to: Callable[[Path], None],
) -> None:
    run = stopped("training:8:SIGTERM")
    kept = run.metrics.read_bytes()
    damage_to(run.metrics)
    refused = forgelm("resume", str(run.root))
    assert_one_line(refused, "metrics.jsonl: isn't as checkpoint-8 knows it", "restore it")
    assert refused.code == 2
    run.metrics.write_bytes(kept)
    assert forgelm("resume", str(run.root)).code == 0
    assert differences(run, whole()) == []
