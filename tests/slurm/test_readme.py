"""The README's words about Slurm, typed as they stand there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from slurm_fixture import Cluster

ROOT = Path(__file__).parents[2]


def commands() -> list[str]:
    section = (ROOT / "README.md").read_text().partition("\n## Slurm\n")[2]
    block = re.search(r"```\n(.*?)```", section, re.DOTALL)
    assert block is not None
    return block.group(1).splitlines()


def test_the_section_does_what_it_says(cluster: Cluster, tmp_path: Path) -> None:
    path = f"{Path(sys.executable).parent}:{cluster.env['PATH']}"
    said = []
    # Nothing is to be trained here: all nodes are busy.
    cluster.submit(
        "--partition=main", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=sleep 600"
    )
    for command in commands():
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=tmp_path,
            env={**cluster.env, "PATH": path},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        said.append(done.stdout)
    one, sweep, queue, _, again = said
    (job,) = re.findall(r"submitted 1 run as Slurm job (\d+)", one)
    (array,) = re.findall(r"submitted 8 runs as Slurm job (\d+)", sweep)
    assert f"{job} PENDING forgelm" in queue
    assert f"{array}_[0-7%2] PENDING forgelm" in queue
    assert "outputs/arithmetic/tiny/sft/first" in again
    assert cluster.state(job) == "CANCELLED"
    (second,) = re.findall(r"submitted 1 run as Slurm job (\d+)", again)
    assert cluster.show(second)["TimeLimit"] == "02:00:00"


@pytest.mark.parametrize("name", ["slurm.yaml", "local.yaml"])
def test_every_launcher_is_on_the_page(name: str) -> None:
    assert (ROOT / "conf/hydra/launcher" / name).is_file()
    page = (ROOT / "docs/slurm.md").read_text()
    assert f"hydra/launcher={name.removesuffix('.yaml')}" in page
