"""Completion in a real bash: the installed function is called as readline calls it."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent

# Sets what bash sets for a completion function, calls it, prints the words offered.
CALL = """
{install}
COMP_LINE={line}
COMP_POINT=${{#COMP_LINE}}
COMP_WORDS=($COMP_LINE)
case "$COMP_LINE" in *' ') COMP_WORDS+=('') ;; esac
COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
hydra_bash_completion
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


def in_bash(script: str, cwd: Path) -> str:
    environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "--norc", "-c", script],
        capture_output=True,
        text=True,
        env=environment,
        cwd=cwd,
        timeout=60,
        check=False,
    )
    assert done.stderr == ""
    return done.stdout


@pytest.fixture(scope="module")
def install(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What `eval "$(forgelm -sc install=bash)"` evaluates."""
    return in_bash("forgelm -sc install=bash", tmp_path_factory.mktemp("install"))


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("forgelm tr", {"train"}),
        ("forgelm ev", {"evaluate"}),
        ("forgelm pre", {"predict"}),
        ("forgelm mode=", {"mode=kd", "mode=sft"}),
        ("forgelm train mode=", {"mode=kd", "mode=sft"}),
        ("forgelm train -m mode=", {"mode=kd", "mode=sft"}),
        ("forgelm -m mode=k", {"mode=kd"}),
        ("forgelm train model=distilbert task=m", {"task=mnli", "task=mrpc"}),
        ("forgelm train teacher=", {f"teacher={kind}" for kind in ("auto", "none", "path", "run")}),
        ("forgelm train training.lear", {"training.learning_rate="}),
        ("forgelm wandb.", {f"wandb.{key}" for key in ("mode=", "project=", "entity=", "group=")}),
        (
            "forgelm mode=kd mode.",
            {f"mode.{key}=" for key in ("alpha", "loss", "temperature", "name")},
        ),
        (
            "forgelm train experiment=mnli/",
            {"experiment=mnli/distilbert/00_sft", "experiment=mnli/distilbert/01_kd"},
        ),
        (
            "forgelm experiment=",
            {"experiment=mnli/distilbert/00_sft", "experiment=nli_mini/teacher"},
        ),
        ("forgelm train exp", {"experiment="}),
        ("forgelm train mod", {"mode=", "mode.", "model=", "model."}),
        ("forgelm train ", {"mode=", "model=", "task=", "teacher=", "training.", "seed="}),
        ("forgelm ", {"mode=", "model=", "task=", "teacher=", "training.", "seed="}),
    ],
)
def test_bash_offers_what_fits(install: str, tmp_path: Path, line: str, offered: set[str]) -> None:
    words = in_bash(CALL.format(install=install, line=shlex.quote(line)), tmp_path).split()
    assert offered <= set(words)
    last = line.rpartition(" ")[2]
    assert all(word.startswith(last) for word in words)
    assert not [word for word in words if word.startswith("_") or "._" in word or "=_" in word]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("line", ["forgelm _", "forgelm train _", "forgelm train mode=_"])
def test_schema_nodes_are_never_offered(install: str, tmp_path: Path, line: str) -> None:
    words = in_bash(CALL.format(install=install, line=shlex.quote(line)), tmp_path).split()
    assert words == []


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("forgelm train task=mn", "task=mnli"),
        ("forgelm trai", "train training."),
        ("forgelm train experiment=nli", "experiment=nli_mini/teacher"),
    ],
)
def test_the_query_that_the_function_makes(tmp_path: Path, line: str, offered: str) -> None:
    query = f"COMP_LINE={shlex.quote(line)} COMP_POINT={len(line)} forgelm -sc query=bash"
    assert in_bash(query, tmp_path) == f"{offered}\n"


def test_the_function_is_the_one_that_bash_calls(install: str, tmp_path: Path) -> None:
    found = in_bash(f"{install}\ncomplete -p forgelm", tmp_path)
    assert "-F hydra_bash_completion forgelm" in found
