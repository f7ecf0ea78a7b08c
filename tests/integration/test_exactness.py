"""The most telling part of benchmarks/matrix.py: interrupted runs end with the same bytes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from matrix import Chain, materials, tried

# Each variant's runs; the interruptions of one follow one another.
CASES: dict[str, tuple[Chain, ...]] = {
    "dropout": (
        ("preparation:1:SIGTERM", "evaluation_before:2:SIGTERM", "training:1:SIGTERM"),
        ("training:8:SIGTERM", "training:1:SIGKILL"),
        ("save:5:SIGKILL", "finalize:2:SIGTERM", "finalize:1:SIGKILL"),
    ),
    "workers-persistent": (("training:7:SIGTERM",),),
    "accumulation-3": (("training:4:SIGTERM", "training:4:SIGTERM"), ("training:7:SIGKILL",)),
    "group-by-length": (("training:5:SIGTERM", "training:5:SIGKILL"),),
    "stream-workers": (("training:6:SIGTERM", "training:4:SIGKILL"),),
    "best-early-stopping": (
        ("evaluation:1:SIGTERM", "evaluation:1:SIGTERM"),
        ("training:6:SIGTERM",),
    ),
    "evaluate-epochs": (("evaluation:2:SIGTERM",), ("training:8:SIGTERM",)),
    "kd-accumulation": (("training:4:SIGTERM", "training:3:SIGKILL"),),
    "regression": (("training:5:SIGTERM",),),
    "causal-packed": (("training:5:SIGTERM", "evaluation:1:SIGTERM"), ("training:7:SIGKILL",)),
    "causal-kd": (("training:5:SIGTERM",), ("finalize:1:SIGTERM",)),
    "seq2seq": (("evaluation_before:1:SIGTERM", "training:5:SIGTERM"),),
    "rl-window": (("training:6:SIGTERM",), ("training:7:SIGKILL",), ("training:9:SIGTERM",)),
    "rl-iterations": (("training:5:SIGTERM", "generation:3:SIGTERM"), ("evaluation:4:SIGTERM",)),
    "rl-everything": (("training:3:SIGTERM", "training:7:SIGTERM"),),
    "ranks-2-rl": (("training:7:SIGTERM",),),
    "images-workers": (("training:5:SIGTERM", "training:3:SIGKILL"),),
    "ranks-2-causal-kd": (("training:7:SIGTERM",),),
    "lora-dora-best": (
        ("evaluation_before:1:SIGTERM", "training:7:SIGTERM", "evaluation:1:SIGTERM"),
        ("training:8:SIGKILL", "finalize:2:SIGKILL"),
    ),
    "lora-rl": (("training:6:SIGTERM", "finalize:1:SIGKILL"),),
    "lora-causal-embeddings": (("training:5:SIGTERM", "training:4:SIGKILL"),),
    "bf16": (("training:4:SIGTERM",), ("evaluation:1:SIGTERM",)),
    "save-foreground": (("training:7:SIGKILL", "training:1:SIGTERM"),),
    "ranks-2-kd": (("training:7:SIGTERM",),),
    "ranks-3": (("training:8:SIGTERM",),),
}


@pytest.fixture(scope="session")
def process() -> Iterator[ProcessPoolExecutor]:
    """A process that has loaded everything and is forked for each run.

    Not this one: what other tests left here must not be forked.
    """
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        yield pool


@pytest.fixture(scope="session")
def place(process: ProcessPoolExecutor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the variants need."""
    folder = tmp_path_factory.mktemp("exactness")
    process.submit(materials, folder).result(timeout=120)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_an_interrupted_run_ends_with_the_same_bytes(
    name: str, process: ProcessPoolExecutor, place: Path
) -> None:
    result = process.submit(tried, name, place, CASES[name]).result(timeout=300)
    assert result.problems == []
    assert result.interruptions == sum(map(len, CASES[name]))
