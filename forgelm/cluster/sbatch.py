"""Runs handed to Slurm by one sbatch."""

from __future__ import annotations

import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

from forgelm import slurm
from forgelm.cluster.jobs import GOALS, RUNS
from forgelm.errors import ConfigError
from forgelm.resolve import Plan

_UNANSWERED = re.compile(r"(?i)timed out|unable to contact|zero bytes|unexpected message")
# Of no use to us, or decided elsewhere.
_NOT_SBATCH = ("_target_", "submitit_folder", "max_num_timeout", "setup", "signal_delay_s")


def to_slurm(
    folder: Path, code: Path, launcher: dict[str, Any], plans: Sequence[Plan]
) -> tuple[str, list[str]]:
    """One sbatch for all; returns the job's number and the name of each run's job."""
    from submitit import SlurmExecutor
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    class Executor(SlurmExecutor):  # type: ignore[misc]
        """Runs our command where submitit would run its own."""

        @property
        def _submitit_command_str(self) -> str:
            return f'{shlex.quote(sys.executable)} -m forgelm resume --local "$run" $goal'

    launch = plans[0].config.launch
    given = {k: v for k, v in launcher.items() if k not in _NOT_SBATCH and v is not None}
    more = {"requeue": True, **given.pop("additional_parameters", {})}
    executor = Executor(folder)
    lead = int(launcher["signal_delay_s"])
    try:
        executor.update_parameters(
            **executor._convert_parameters(given),
            wckey=None,
            signal_delay_s=lead,
            additional_parameters=more,
            setup=_before(folder, code, lead, launcher.get("setup") or ()),
            teardown=_after(launch.max_restarts, launch.max_idle_restarts),
            # Ranks that wait for a dead one would wait until the time limit.
            srun_args=["--kill-on-bad-exit=1"],
        )
        # submitit repeats on stderr what it raises.
        with _outside_of_jobs(), redirect_stderr(io.StringIO()):
            jobs = executor.map_array(_in_the_job, range(len(plans)))
    except (FailedJobError, FailedSubmissionError, subprocess.CalledProcessError) as error:
        said = _said(str(error))
        # Slurm may take a job whose sender it answers too late.
        job = slurm.job_of_script(folder) if _UNANSWERED.search(said) else None
        if job is None:
            raise ConfigError(f"Slurm refuses this: {said}") from error
        return job, [f"{job}_{i}" for i in range(len(plans))] if len(plans) > 1 else [job]
    names = [str(job.job_id) for job in jobs]
    return names[0].partition("_")[0], names


def _in_the_job(index: int) -> None:
    """What submitit keeps of a job. The job's own command is another: see Executor."""


def _before(folder: Path, code: Path, lead: int, own: Sequence[str]) -> list[str]:
    """Lines of the batch script before srun."""
    place = shlex.quote(str(folder))
    return [
        *own,
        "# The code as it was when this was submitted, and nothing from the current folder.",
        f"export PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}} PYTHONSAFEPATH=1",
        f"export {slurm.LEAD}={lead}",
        '[ -z "$SLURM_CPUS_PER_TASK" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK',
        f'run=$(sed -n "$((${{SLURM_ARRAY_TASK_ID:-0}} + 1))p" {place}/{RUNS})',
        "job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}",
        "job=${job:-$SLURM_JOB_ID}",
        f'goal=$(sed -n "$((${{SLURM_ARRAY_TASK_ID:-0}} + 1))p" {place}/{GOALS})',
        f'echo "$(date) ${{SLURM_JOB_NODELIST}}" >> {place}/$job.starts',
        "# Where processes can't reach scontrol, but this script can, they ask it by this file.",
        f'handover={place}/$job.requeue; began={place}/$job.began; rm -f "$handover" "$began"',
        f"export {slurm.BEGAN}=$began",
        'if scontrol show job "$SLURM_JOB_ID" > /dev/null 2>&1; then',
        f"  export {slurm.HANDOVER}=$handover",
        "fi",
        "# Slurm's signals are for the processes; this script has to outlive them.",
        "trap : TERM USR1 USR2",
    ]


def _after(max_restarts: int, max_idle: int) -> list[str]:
    """Lines of the batch script after srun: a process that was killed can't requeue its job."""
    return [
        "code=$?",
        "# Starts that gain nothing are counted by forgelm, but for those that never came to it.",
        'if [ -e "$began" ]; then : > "$began.not"; else echo "$code" >> "$began.not"; fi',
        'if [ -e "$handover" ] || { [ "$code" -ge 128 ] && [ "$code" -ne 130 ]; }; then',
        "  restarts=${SLURM_RESTART_COUNT:-0}",
        '  idle=$(wc -l < "$began.not")',
        f'  if [ "$idle" -gt {max_idle} ]; then',
        '    echo "job $job isn\'t requeued: $idle starts in a row ended before forgelm began,"'
        f' "more than launch.max_idle_restarts={max_idle}"',
        f'  elif [ "$restarts" -lt {max_restarts} ]; then',
        "    # A controller that is busy, or restarts, answers later.",
        "    for try in 1 2 3 4 5 6; do",
        '      state=$(scontrol -o show job "$job" | sed "s/.*JobState=\\([A-Z_]*\\).*/\\1/")',
        '      [ -z "$state" ] || break',
        "      sleep 10",
        "    done",
        '    if [ "$state" = RUNNING ]; then',
        '      echo "the batch script requeues job $job: its processes ended with $code"',
        "      for try in 1 2 3; do",
        '        (trap "" TERM CONT; exec scontrol requeue "$job") && break',
        "        sleep 10",
        "      done",
        "    fi",
        "  fi",
        "fi",
        'exit "$code"',
    ]


def _said(text: str) -> str:
    """Slurm's words out of submitit's."""
    lines = re.findall(r"sbatch: (?:error: |fatal: )?(.+)", text)
    return "; ".join(dict.fromkeys(lines)) or " ".join(text.split())[:300]


@contextmanager
def _outside_of_jobs() -> Iterator[None]:
    """What Slurm says of a job that this command runs in isn't true of the one it submits."""
    theirs = {k: v for k, v in os.environ.items() if k.startswith("SLURM_") and k != "SLURM_CONF"}
    for name in theirs:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(theirs)
