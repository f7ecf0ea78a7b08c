"""The cluster of the tests behaves as a Slurm cluster does where a launcher depends on it."""

from __future__ import annotations

from pathlib import Path

from slurm_fixture import Cluster

JOB = """\
#!/bin/bash
#SBATCH --requeue --open-mode=append
trap '' TERM USR2
srun bash {step}
"""
STEP = """\
trap '{at_term}' TERM
trap 'echo USR2; exit 0' USR2
echo "start ${{SLURM_RESTART_COUNT:-0}} on $SLURMD_NODENAME, GPU ${{CUDA_VISIBLE_DEVICES:-none}}"
while sleep 0.1; do :; done
"""
REQUEUE = """
scontrol -o show job $SLURM_JOB_ID | grep -o "PreemptTime=[0-9]*"
setsid scontrol requeue $SLURM_JOB_ID
exit 75
"""


def start(cluster: Cluster, folder: Path, *words: str, at_term: str = "echo TERM") -> str:
    """A job in `low` that runs and says what it is told; its output is `folder/out`."""
    script = folder / "job.sh"
    step = folder / "step.sh"
    script.write_text(JOB.format(step=step))
    step.write_text(STEP.format(at_term=at_term))
    job = cluster.submit("--partition=low", f"--output={folder}/out", *words, script)
    cluster.wait_for(lambda: "start" in said(folder), 20, f"job {job} starts")
    return job


def said(folder: Path) -> str:
    out = folder / "out"
    return out.read_text() if out.exists() else ""


def test_a_preempted_job_is_told_and_comes_back(cluster: Cluster, tmp_path: Path) -> None:
    job = start(cluster, tmp_path, "--nodelist=node2", at_term=REQUEUE)
    preemptor = cluster.preempt(job)
    cluster.wait_for_state(preemptor, "COMPLETED")
    cluster.wait_for(lambda: "start 1" in said(tmp_path), 30, "it starts again")
    assert "PreemptTime=20" in said(tmp_path)
    assert cluster.show(job)["Restarts"] == "1"


def test_preemption_sends_the_jobs_own_signal_where_so_configured(
    cluster: Cluster, tmp_path: Path
) -> None:
    cluster.configure("--user-signal", "--grace=30")
    job = start(cluster, tmp_path, "--signal=USR2@60")
    cluster.wait_for_state(cluster.preempt(job), "COMPLETED")
    assert "USR2" in said(tmp_path)
    assert "TERM" not in said(tmp_path)


def test_a_job_of_a_killed_node_comes_back_elsewhere(cluster: Cluster, tmp_path: Path) -> None:
    job = start(cluster, tmp_path, "--gpus-per-node=1")
    node = cluster.show(job)["NodeList"]
    cluster.kill_node(node)
    cluster.wait_for_restart(job)
    assert cluster.show(job)["NodeList"] != node
    cluster.revive(node)
    assert "idle" in cluster.call("sinfo", "-h", "-p", "main", "-n", node, "-o", "%T")
    assert "TERM" not in said(tmp_path)
    assert said(tmp_path).splitlines()[0] == f"start 0 on {node}, GPU 0"
