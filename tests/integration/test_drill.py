"""`forgelm drill`: the proof itself, and that it sees what is wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY, Command

SMALL = [word for word in TINY if not word.startswith("task.max_")]


def drilled(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: drill forks, and what other tests left must not be forked."""
    return subprocess.run(
        [sys.executable, "-m", "forgelm", "drill", *SMALL, *words],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=400,
    )


@pytest.mark.parametrize(
    "words",
    [
        ("mode=kd", "model.tiny.dropout=0.1", "task.token_dropout=0.2"),
        ("max_steps=3", "training.eval_strategy=no"),
    ],
    ids=["kd", "short, without evaluation"],
)
def test_a_config_that_holds(words: tuple[str, ...], tmp_path: Path) -> None:
    done = drilled(tmp_path, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [" ".join(row.split()) for row in done.stdout.splitlines()]
    held = [row for row in rows if row.endswith("same same same")]
    assert len(held) == (11 if "mode=kd" in words else 10)
    assert sum("SIGKILL" in row for row in held) == 3
    assert "same bytes" in rows[-1]
    assert not list((tmp_path / "outputs/.forgelm").glob("drill-*"))


def test_what_differs_is_seen(tmp_path: Path) -> None:
    """A run whose rows are drawn anew at each start can't end with the same bytes."""
    (tmp_path / "drill.py").write_text(
        "import os, sys\n"
        "import forgelm.training.loader as loader\n"
        "loader.seed_from = lambda *parts: os.getpid()\n"
        "from forgelm.cli.main import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    done = subprocess.run(
        [sys.executable, "drill.py", "drill", *SMALL, "max_steps=9"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert "DIFFERS" in done.stdout
    assert "OTHER" in done.stdout
    assert "interruptions don't hold" in done.stderr
    assert list((tmp_path / "outputs/.forgelm").glob("drill-*"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["-m", "seed=1,2"], "drill takes one config, not a sweep of 2"),
        (["resume=x"], "drill makes runs of its own"),
        (["trainin.learning_rate=1"], "no such key; did you mean training.learning_rate?"),
    ],
)
def test_wrong_requests(words: list[str], said: str, forgelm: Command) -> None:
    refused = forgelm("drill", *words)
    assert refused.code == 1
    assert said in refused.err


def test_a_config_that_fails_by_itself(tmp_path: Path) -> None:
    done = drilled(tmp_path, "training.learning_rate=1e30", "training.max_grad_norm=0")
    assert done.returncode == 2
    assert "the config fails without being interrupted" in done.stderr
    assert "the loss is nan" in done.stderr
    assert "Traceback" not in done.stderr
