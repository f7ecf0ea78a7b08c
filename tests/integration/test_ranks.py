"""Several processes of one run: what a person is told, and what is left when one of them dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import TINY

from forgelm.run.files import read_json
from forgelm.run.paths import RunPaths


def ranks_of(launcher: int) -> list[int]:
    """The process ids of a launcher's ranks, in their order."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            environment = (entry / "environ").read_bytes().split(b"\0")
        except (OSError, ValueError, IndexError):
            continue
        names = [item for item in environment if item.startswith(b"RANK=")]
        if parent == launcher and names:
            found[int(names[0][5:])] = int(entry.name)
    return [found[rank] for rank in sorted(found)]


@pytest.mark.parametrize(
    ("rank", "sent", "code", "said"),
    [
        (1, signal.SIGKILL, 2, ["rank 1: killed by SIGKILL", "another rank of this run ended"]),
        (1, signal.SIGTERM, 75, ["stopped safely"]),
        (None, signal.SIGKILL, -9, []),
    ],
    ids=["a rank killed", "a rank asked to stop", "the launcher killed"],
)
def test_none_goes_on_without_the_others(
    rank: int | None, sent: signal.Signals, code: int, said: list[str], tmp_path: Path
) -> None:
    words = [*TINY, "launch.ranks_per_node=2", "max_steps=100000", "run_name=mine"]
    words += ["training.eval_strategy=no", "training.save_steps=20", "debug=false"]
    launcher = subprocess.Popen(
        [sys.executable, "-m", "forgelm", "train", *words],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    run = RunPaths(tmp_path / "outputs/nli_mini/tiny/sft/mine")
    end = time.monotonic() + 120
    while not run.latest_checkpoint.exists():
        assert launcher.poll() is None, launcher.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)
    assert "bytes    the same" in run.log.read_text()
    ranks = ranks_of(launcher.pid)
    assert len(ranks) == 2
    os.kill(launcher.pid if rank is None else ranks[rank], sent)
    _out, err = launcher.communicate(timeout=60)
    assert launcher.returncode == code, err
    for text in said:
        assert text in err
    assert "Traceback" not in err
    assert "find_unused" not in err
    end = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in ranks):
        assert time.monotonic() < end
        time.sleep(0.05)
    if code == 75:
        assert read_json(run.state)["status"] == "preempted"
