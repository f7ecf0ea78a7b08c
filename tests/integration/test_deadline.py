"""What a run makes of the time that Slurm gives it. A `scontrol` of our own moves the clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from conftest import Command, only_run

from forgelm import slurm
from forgelm.deadline import Deadline, Pace, deadline
from forgelm.run.files import read_json

Controller = Callable[..., Path]


@pytest.fixture
def controller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Controller:
    """This process is in Slurm job 7; returns the file that notes each requeue."""
    folder, noted = tmp_path / "bin", tmp_path / "requeued"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    monkeypatch.setenv("SLURM_JOB_ID", "7")

    def answers(left: float = 3600, preempt: str = "REQUEUE", grace: int = 20) -> Path:
        end = (datetime.now() + timedelta(seconds=left)).isoformat(timespec="seconds")
        job = f"JobId=7 JobState=RUNNING Restarts=0 BatchFlag=1 Partition=low EndTime={end}"
        script = folder / "scontrol"
        script.write_text(
            '#!/bin/sh\ncase "$*" in\n'
            f'*requeue*) echo "$*" >> {noted};;\n'
            f"*partition*) echo 'PartitionName=low PreemptMode={preempt} GraceTime={grace}';;\n"
            f"*) echo '{job}';;\nesac\n"
        )
        script.chmod(0o755)
        return noted

    return answers


def of_this_job() -> Deadline:
    made = deadline()
    assert made is not None
    return made


def test_a_job_at_work_shortly_before_its_limit_is_requeued(controller: Controller) -> None:
    noted = controller(left=21)
    over = of_this_job().guard()
    end = time.monotonic() + 15
    while not noted.exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    over()
    assert noted.read_text() == "requeue 7\n"


@pytest.mark.parametrize("more", [True, False], ids=["given more time", "over in time"])
def test_a_job_that_needs_no_requeue_is_left_alone(controller: Controller, more: bool) -> None:
    noted = controller(left=22)
    over = of_this_job().guard()
    if more:
        controller(left=600)
    else:
        over()
    time.sleep(3)
    over()
    assert not noted.exists()


@pytest.mark.parametrize(
    ("lead", "preempt", "pace", "said"),
    [
        ("120", "OFF", Pace(30, 80), []),
        ("120", "OFF", Pace(50, 80), ["the 120 s between Slurm's signal and the time limit"]),
        ("120", "REQUEUE", Pace(5, 10), []),
        ("120", "REQUEUE", Pace(5, 20), ["the 20 s that Slurm gives a preempted job"]),
        ("10", "REQUEUE", Pace(15, 20), ["signal_delay_s=70", "the 20 s that Slurm gives"]),
        (None, "OFF", Pace(500, 500), []),
    ],
)
def test_what_does_not_fit_is_said(
    controller: Controller,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    lead: str | None,
    preempt: str,
    pace: Pace,
    said: list[str],
) -> None:
    controller(preempt=preempt)
    if lead is not None:
        monkeypatch.setenv(slurm.LEAD, lead)
    limit = of_this_job()
    limit.compare(pace)
    assert len(caplog.messages) == len(said)
    for message, text in zip(caplog.messages, said, strict=True):
        assert f"a step of {pace.step:.1f} s and a save of {pace.save:.1f} s" in message
        assert text in message
    limit.compare(pace)
    assert len(caplog.messages) == len(said)


def test_a_run_learns_what_its_steps_and_saves_take(
    controller: Controller,
    tiny: Command,
    forgelm: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    controller()
    monkeypatch.setenv(slurm.LEAD, "0")
    first = tiny("max_steps=2", "training.eval_strategy=no", "run_name=mine")
    assert first.code == 0, first.err
    run = only_run(tmp_path / "outputs")
    assert "Slurm job 7, start 1, time limit 20" in first.out
    assert "signal 0 s before, 20 s of grace when preempted" in first.out
    pace = Pace(**read_json(run / "run_metadata.json")["pace"])
    assert pace.step > 0 < pace.save
    assert "don't fit into the 0 s between Slurm's signal and the time limit" in first.out
    again = forgelm("resume", "mine", "max_steps=4")
    assert again.code == 0, again.err
    before, _, _ = again.out.partition("going on from")
    assert "don't fit into the 0 s" in before


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("node1", "node1"),
        ("node[1-3]", "node1"),
        ("gpu-[003-007,9]-ib,login1", "gpu-003-ib"),
        ("a1,b2", "a1"),
        ("r[1,5]", "r1"),
    ],
)
def test_the_first_of_several_hosts(hosts: str, first: str) -> None:
    assert slurm.first_host(hosts) == first
