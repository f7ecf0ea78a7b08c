"""What all tests share: caches of their own, no network, and `forgelm` called in this process."""

from __future__ import annotations

import logging
import os
import signal
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

pytest_plugins = ["slurm_fixture"]


# Read when the libraries are imported, so set before any of them is.
_HOME = tempfile.TemporaryDirectory(prefix="forgelm-tests-")
os.environ.update(
    HF_HOME=_HOME.name,
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    WANDB_SILENT="true",
    OMP_NUM_THREADS="1",
)
# A shell ignores Ctrl-C for what it starts in the background, and so would the processes of tests.
signal.signal(signal.SIGINT, signal.default_int_handler)
for _name in [name for name in os.environ if name.startswith("SLURM_")]:
    os.environ.pop(_name)
_SWITCHES = ("HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE", "TRANSFORMERS_OFFLINE")
_PLACES = ("HF_TOKEN", "HF_ENDPOINT", "WANDB_API_KEY", "HF_HUB_CACHE", "HF_DATASETS_CACHE")
for _name in _SWITCHES + _PLACES:
    os.environ.pop(_name, None)

TINY = (
    "model.tiny.hidden_size=16",
    "model.tiny.intermediate_size=32",
    "task.max_train_samples=192",
    "task.max_eval_samples=48",
    "training.per_device_train_batch_size=16",
    "training.logging_steps=1",
    "training.learning_rate=1e-3",
    "wandb.mode=disabled",
)


@pytest.fixture(autouse=True)
def _no_handlers_left() -> Iterator[None]:
    """What a test had said through its own stdout is said to nobody after it."""
    root = logging.getLogger()
    before = list(root.handlers)
    yield
    root.handlers[:] = [
        handler
        for handler in before
        if not getattr(getattr(handler, "stream", None), "closed", False)
    ]


@pytest.fixture(autouse=True)
def _switches_restored() -> None:
    """`forgelm` switches libraries offline for the rest of its process.

    Restored before each test: a fixture of a whole module may have called it since the last one.
    """
    for name in _SWITCHES:
        os.environ.pop(name, None)
    os.environ["HF_HUB_OFFLINE"] = "1"


@dataclass(frozen=True)
class Result:
    """How a command ended."""

    code: int
    out: str
    err: str


Command = Callable[..., Result]


@pytest.fixture
def forgelm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Command:
    """Call the command in an empty folder; returns its exit code, stdout and stderr."""
    from forgelm.cli.main import main

    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> Result:
        capsys.readouterr()
        monkeypatch.setattr("sys.argv", ["forgelm", *words])
        root = logging.getLogger()
        before = list(root.handlers)
        code = main(list(words))
        said = capsys.readouterr()
        # Some of Hydra's flags leave a handler behind that holds this test's stdout.
        root.handlers[:] = [h for h in root.handlers if h in before]
        return Result(code, said.out, said.err)

    return call


@pytest.fixture
def tiny(forgelm: Command) -> Command:
    """`forgelm train` of a very small run; the words given come last."""

    def call(*words: str) -> Result:
        return forgelm("train", *TINY, *words)

    return call


@contextmanager
def interruption(case: str) -> Iterator[None]:
    """Runs inside send themselves a signal, `POINT:COUNT:SIGNAL`; counting begins anew."""
    from forgelm import interrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interrupt, "_seen", Counter())
        patch.setenv(interrupt.VARIABLE, case)
        yield


@pytest.fixture
def interrupted(request: pytest.FixtureRequest, tiny: Command) -> Command:
    """A run of the module's SMALL that is interrupted: `POINT:COUNT:SIGNAL`, then overrides."""

    def call(case: str, *words: str) -> Result:
        with interruption(case):
            return tiny(*request.module.SMALL, *words)

    return call


def only_run(root: Path) -> Path:
    """The directory of the only run below an output root."""
    (found,) = root.glob("*/*/*/*/run_metadata.json")
    return found.parent
