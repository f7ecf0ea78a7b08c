"""One process in a run directory: who is refused, who takes over, and who notices."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from conftest import Command, only_run

from forgelm.errors import RunError, RunInUse
from forgelm.run import lock
from forgelm.run.files import read_json, write_json
from forgelm.run.lock import Holder, owned
from forgelm.run.paths import RunPaths

# Says that it is in, stays until its stdin ends, and says whether the directory is still its own.
CHILD = """
import os, socket, sys
from pathlib import Path

from forgelm.errors import ForgeError
from forgelm.run import lock
from forgelm.run.paths import RunPaths

host = sys.argv[2]
if host:
    socket.gethostname = lambda: host
lock.HEARTBEAT_S, lock.PATIENCE_S = 0.1, float(os.environ.get("PATIENCE", "1"))
try:
    with lock.owned(RunPaths(Path(sys.argv[1]))) as ownership:
        print("in", flush=True)
        sys.stdin.read()
        ownership.check()
        print("still in", flush=True)
except ForgeError as error:
    print(error, flush=True)
"""

Enter = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    return RunPaths(tmp_path / "run")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "HEARTBEAT_S", 0.1)
    monkeypatch.setattr(lock, "PATIENCE_S", 1.0)
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def enter(paths: RunPaths) -> Iterator[Enter]:
    """Start a process that enters the run, on this host or one of another name."""
    started: list[subprocess.Popen[str]] = []

    def start(host: str = "", **environment: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(paths.root), host],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def leave_record(paths: RunPaths, **changes: str | int | None) -> Holder:
    """The lock file as a process that vanished leaves it: no kernel lock, its record inside."""
    left = replace(lock._myself(), token="left", **changes)  # type: ignore[arg-type]
    paths.root.mkdir(parents=True, exist_ok=True)
    paths.lock.write_text(json.dumps(asdict(left)))
    return left


def dead_process() -> int:
    done = subprocess.Popen(["true"])
    done.wait()
    return done.pid


def test_a_second_process_is_told_who_is_in(enter: Enter, paths: RunPaths) -> None:
    first, host = enter(), socket.gethostname()
    assert said(first) == "in"
    with pytest.raises(RunInUse, match=f"process {first.pid} on {host} is in this run"):
        owned(paths).__enter__()
    assert f"process {first.pid} on {host} is in this run" in said(enter())
    assert first.communicate("")[0].strip() == "still in"
    with owned(paths) as ownership:
        ownership.check()


def test_a_killed_holder_is_followed_at_once(enter: Enter, paths: RunPaths) -> None:
    first = enter()
    assert said(first) == "in"
    first.kill()
    first.wait()
    began = time.monotonic()
    with owned(paths):
        assert time.monotonic() - began < lock.PATIENCE_S
        assert json.loads(paths.lock.read_text())["pid"] == os.getpid()
    assert paths.lock.read_text() == ""


def test_a_process_killed_while_taking_over_bars_nobody(enter: Enter, paths: RunPaths) -> None:
    leave_record(paths, host="far", slurm_job=None)
    between = enter(PATIENCE="60")
    wait_until(lambda: paths.lock.with_name(".lock.takeover").exists())
    between.kill()
    between.wait()
    with owned(paths):
        assert json.loads(paths.lock.read_text())["pid"] == os.getpid()
    assert not paths.lock.with_name(".lock.takeover").exists()


def wait_until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_holder_that_is_only_suspended_is_not_followed(enter: Enter, paths: RunPaths) -> None:
    first = enter()
    assert said(first) == "in"
    first.send_signal(signal.SIGSTOP)
    with pytest.raises(RunInUse, match=f"process {first.pid}"):
        owned(paths).__enter__()
    first.send_signal(signal.SIGCONT)
    assert first.communicate("")[0].strip() == "still in"


@pytest.mark.parametrize(
    "changes",
    [
        {"pid": "dead"},
        {"started": "1"},
        {"boot": "another"},
        {"boot": "another", "slurm_job": "5"},
    ],
)
def test_a_record_that_nobody_stands_behind_is_replaced_at_once(
    paths: RunPaths, caplog: pytest.LogCaptureFixture, changes: dict[str, str]
) -> None:
    known = {"pid": dead_process()} if "pid" in changes else changes
    left = leave_record(paths, **known)
    began = time.monotonic()
    with owned(paths):
        assert time.monotonic() - began < lock.PATIENCE_S
    assert f"{left} left this run without a word; taking it over" in caplog.text


@pytest.mark.parametrize("content", ["", "{", "[]", '{"host": "far", "pid": 7}', "\0" * 64])
def test_a_record_that_cannot_be_read_holds_nobody_up(paths: RunPaths, content: str) -> None:
    paths.root.mkdir()
    paths.lock.write_text(content)
    with owned(paths) as ownership:
        ownership.check()


def test_a_silent_holder_elsewhere_is_followed_after_a_while(
    paths: RunPaths, caplog: pytest.LogCaptureFixture
) -> None:
    leave_record(paths, host="far")
    began = time.monotonic()
    with owned(paths):
        assert time.monotonic() - began >= lock.PATIENCE_S
    assert "on far was in this run; watching 1 s for a heartbeat" in caplog.text


def test_a_holder_elsewhere_whose_heart_beats_is_not_followed(paths: RunPaths) -> None:
    left, done = leave_record(paths, host="far"), threading.Event()

    def beat() -> None:
        while not done.wait(0.1):
            os.utime(paths.lock)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(RunInUse, match=f"process {left.pid} on far is in this run"):
            owned(paths).__enter__()
    finally:
        done.set()
        thread.join()


def test_a_real_holder_elsewhere_is_not_followed(enter: Enter, paths: RunPaths) -> None:
    first = enter("far")
    assert said(first) == "in"
    with pytest.raises(RunInUse, match=f"process {first.pid} on far is in this run"):
        owned(paths).__enter__()
    assert first.communicate("")[0].strip() == "still in"


def test_a_holder_that_was_taken_for_dead_notices(enter: Enter, paths: RunPaths) -> None:
    """Its lock is still held, as a file server may keep that of a node it can't reach."""
    first = enter("far")
    assert said(first) == "in"
    first.send_signal(signal.SIGSTOP)
    with owned(paths) as ownership:
        first.send_signal(signal.SIGCONT)
        time.sleep(0.5)
        assert "another process took this run over" in first.communicate("")[0]
        ownership.check()
        assert json.loads(paths.lock.read_text())["pid"] == os.getpid()
    assert not paths.lock.with_name(".lock.takeover").exists()


# Slurm, asked by a `squeue` of our own: a real one can't be made to answer so.


@pytest.fixture
def squeue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def answer(script: str) -> None:
        path = folder / "squeue"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    return answer


@pytest.mark.parametrize("state", ["RUNNING", "COMPLETING", "SUSPENDED"])
def test_a_job_that_slurm_runs_is_not_followed(
    paths: RunPaths, squeue: Callable[[str], None], state: str
) -> None:
    squeue(f"echo 17 {state}")
    left = leave_record(paths, host="far", slurm_job="17")
    with pytest.raises(RunInUse, match=rf"process {left.pid} on far \(Slurm job 17\) is in"):
        owned(paths).__enter__()


@pytest.mark.parametrize(
    "script",
    [
        "echo 17 COMPLETED",
        "echo 17 CANCELLED",
        "echo 17 TIMEOUT",
        "echo 17 PENDING",
        "exit 0",
        "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1",
    ],
)
def test_a_job_that_slurm_has_no_more_is_followed_at_once(
    paths: RunPaths, squeue: Callable[[str], None], script: str
) -> None:
    squeue(f'test "$5" = 17 || exit 3\n{script}')
    leave_record(paths, host="far", slurm_job="17")
    began = time.monotonic()
    with owned(paths):
        assert time.monotonic() - began < lock.PATIENCE_S


@pytest.mark.parametrize("script", ["echo 'Unable to contact slurm controller' >&2; exit 1", None])
def test_where_slurm_cannot_be_asked_the_heartbeat_decides(
    paths: RunPaths,
    squeue: Callable[[str], None],
    script: str | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if script is not None:
        squeue(script)
    leave_record(paths, host="far", slurm_job="17")
    with owned(paths):
        assert "watching 1 s for a heartbeat" in caplog.text


@pytest.mark.parametrize(
    ("job", "environment"),
    [
        ("17", {"SLURM_JOB_ID": "17"}),
        (
            "17_3",
            {"SLURM_JOB_ID": "20", "SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "3"},
        ),
    ],
)
def test_a_requeued_job_follows_itself_at_once(
    paths: RunPaths,
    squeue: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    job: str,
    environment: dict[str, str],
) -> None:
    squeue("echo 17 RUNNING")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    leave_record(paths, host="far", slurm_job=job)
    with owned(paths):
        assert json.loads(paths.lock.read_text())["slurm_job"] == job


def test_of_two_that_follow_a_dead_job_one_enters(
    enter: Enter, paths: RunPaths, squeue: Callable[[str], None], tmp_path: Path
) -> None:
    """The first one to ask is answered late, when the second has been already."""
    squeue(f"if mkdir {tmp_path}/asked 2>/dev/null; then sleep 2; fi; echo 17 COMPLETED")
    leave_record(paths, host="far", slurm_job="17")
    first = enter()
    end = time.monotonic() + 30
    while not (tmp_path / "asked").is_dir():
        assert time.monotonic() < end
        time.sleep(0.01)
    second = enter()
    heard = [said(second), said(first)]
    assert heard.count("in") == 1, heard


def test_a_run_that_lost_its_directory_leaves_it_alone(tiny: Command, tmp_path: Path) -> None:
    taken = threading.Event()

    def take_over() -> None:
        end = time.monotonic() + 60
        found: list[Path] = []
        while not found and time.monotonic() < end:
            time.sleep(0.01)
            found = [p for p in tmp_path.glob("outputs/*/*/*/*/metrics.jsonl") if p.stat().st_size]
        run = RunPaths(found[0].parent)
        theirs = replace(lock._myself(), host="far", token="theirs")
        write_json(run.lock, asdict(theirs))
        state = read_json(run.state) | {"restarts": 77}
        write_json(run.state, state)
        taken.set()

    thread = threading.Thread(target=take_over)
    thread.start()
    words = ("max_steps=2000", "training.eval_strategy=no", "training.save_strategy=no")
    lost = tiny(*words)
    thread.join()
    assert taken.is_set()
    assert lost.code == 2
    assert "another process took this run over while this one was out of reach" in lost.err
    run = RunPaths(only_run(tmp_path / "outputs"))
    assert json.loads(run.lock.read_text())["token"] == "theirs"
    state = read_json(run.state)
    assert (state["status"], state["restarts"]) == ("running", 77)
    assert read_json(run.metadata)["sessions"][-1]["stopped"] is None


def test_a_lost_lock_is_an_error_of_the_run(paths: RunPaths) -> None:
    with owned(paths) as ownership:
        theirs = replace(lock._myself(), host="far", token="theirs")
        write_json(paths.lock, asdict(theirs))
        time.sleep(10 * lock.HEARTBEAT_S)
        with pytest.raises(RunError, match="another process took this run over"):
            ownership.check()
    assert json.loads(paths.lock.read_text())["token"] == "theirs"
