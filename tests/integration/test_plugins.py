"""What another package adds: the example, installed, and packages that are broken."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

import pytest
from conftest import TINY, Command, only_run

from forgelm import plugins
from forgelm.config.compose import register_schema
from forgelm.config.modes import modes
from forgelm.run.files import read_json

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "forgelm_example"
SMALL = [*TINY, "task=roman", "mode=smooth", "training.eval_strategy=no", "max_steps=4"]

Installed = Callable[..., subprocess.CompletedProcess[str]]


def run(
    folder: Path, site: Path, *words: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """`forgelm` in a process of its own, with the packages of `site`."""
    places = os.pathsep.join([str(ROOT), str(site)])
    return subprocess.run(
        [sys.executable, "-m", "forgelm", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": places, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example, installed into a folder."""
    target = tmp_path_factory.mktemp("site")
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--target", str(target))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run([*pip, *options, str(EXAMPLE)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target


@pytest.fixture
def installed(site: Path, tmp_path: Path) -> Installed:
    """`forgelm` beside the example."""
    return lambda *words, **environment: run(tmp_path, site, *words, **environment)


def test_a_submitted_run_keeps_the_packages_of_that_time(site: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "site"
    shutil.copytree(site, theirs)
    done = run(tmp_path, theirs, "train", *SMALL, "hydra/launcher=local")
    assert done.returncode == 0, done.stderr
    shutil.rmtree(theirs)
    folder = only_run(tmp_path / "outputs")
    end = time.monotonic() + 120
    while read_json(folder / "training_state.json")["status"] in ("submitted", "running"):
        assert time.monotonic() < end
        time.sleep(0.5)
    metadata = read_json(folder / "run_metadata.json")
    assert read_json(folder / "training_state.json")["status"] == "complete", metadata["sessions"]
    (session,) = metadata["sessions"]
    assert session["code"] == metadata["submitted"]["code"]
    assert (tmp_path / "outputs/.forgelm/code" / session["code"] / "forgelm_example").is_dir()


def test_task_mode_and_metric_of_the_example(installed: Installed, tmp_path: Path) -> None:
    done = installed("train", *SMALL, "mode.smoothing=0.2", FORGELM_INTERRUPT="training:3:SIGTERM")
    assert done.returncode == 75, done.stderr
    folder = only_run(tmp_path / "outputs")
    assert folder.parts[-4:-1] == ("roman", "tiny", "smooth")
    done = installed("resume", str(folder))
    assert done.returncode == 0, done.stderr
    assert "loss     that of mode=smooth" in done.stdout
    assert "going on from checkpoint-3" in done.stdout
    assert "validation similarity" in done.stdout
    after = read_json(folder / "eval.json")["after"]["student"]["validation"]
    assert list(after) == ["loss", "similarity", "exact_match"]
    assert 0 <= after["similarity"] <= 1
    done = run(tmp_path, tmp_path / "nothing", "resume", str(folder))
    assert done.returncode == 1
    assert done.stderr.strip() == (
        f"forgelm: {folder}/config.yaml: mode=smooth is of a package that isn't installed here: "
        "install it"
    )


def test_names_of_the_example_are_listed(installed: Installed) -> None:
    wrong = ("mode=smoth", "mode.smoothing=2", "task.metrics=[similarty]", "task.embedded=ramon")
    done = installed("train", "task=roman", *wrong)
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert lines[0] == (
        "forgelm: mode=smoth: no such mode; one of kd, rl, sft, smooth; did you mean mode=smooth?"
    )
    done = installed("train", "task=roman", "mode=smooth", *wrong[1:])
    assert done.stderr.splitlines() == [
        "forgelm: mode.smoothing=2.0: must be at least 0 and below 1",
        "forgelm: task.embedded=ramon: no such embedded data; there are nli_mini, arithmetic, "
        "ocr_digits, roman; did you mean roman?",
        "forgelm: task.metrics: similarty: no such metric; use perplexity, token_accuracy, "
        "exact_match, cer, wer, reward, similarity; did you mean similarity?",
    ]
    done = installed("train", "mode.smoothing=0.1")
    assert done.stderr.strip() == (
        "forgelm: mode.smoothing=0.1: mode.smoothing is a key of mode=smooth"
    )
    said = installed("train", "--help").stdout
    assert "\nmode: kd, rl, sft, smooth\n" in said
    assert re.search(r"^task: .*\broman\b", said, re.MULTILINE)


@pytest.mark.parametrize(
    ("line", "choices"),
    [
        ("forgelm mode=s", "mode=sft mode=smooth"),
        ("forgelm train task=ro", "task=roman"),
        ("forgelm mode=smooth mode.s", "mode.smoothing="),
    ],
)
def test_completion(line: str, choices: str, installed: Installed) -> None:
    done = installed("-sc", "query=bash", COMP_LINE=line)
    assert (done.stdout.strip(), done.stderr) == (choices, "")


def test_the_drill_proves_the_mode(installed: Installed) -> None:
    small = [word for word in TINY if not word.startswith("task.max_")]
    words = ("task=roman", "mode=smooth", "training.eval_strategy=no", "max_steps=3")
    done = installed("drill", *small, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "same bytes" in done.stdout.splitlines()[-1]


def test_the_reward_is_one_of_mode_rl(installed: Installed) -> None:

    done = installed("train", "mode=rl", "task=roman", "mode.rewards=[similar,similr]")
    assert done.returncode == 1
    assert done.stderr.strip() == (
        "forgelm: mode.rewards: similr: no such reward; use exact_match, contains, numeric, "
        "format, length, similar; did you mean similar?"
    )


def test_parts_of_the_example(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from forgelm.config.schema import Problem, RunConfig, TaskConfig
    from forgelm.errors import ConfigError

    monkeypatch.syspath_prepend(str(EXAMPLE / "src"))
    roman = import_module("forgelm_example.roman")
    assert [roman.numeral(n) for n in (1, 4, 9, 1994)] == ["I", "IV", "IX", "MCMXCIV"]
    assert len(roman.rows("train")) + len(roman.rows("validation")) == 1999
    alike = import_module("forgelm_example.similarity")
    assert alike.similar(["XI\n", "V", ""], ["XI", "IV", "I"]) == [1.0, pytest.approx(2 / 3), 0.0]
    assert alike.similarity(["XI", ""], ["XI", "I"]) == 0.5
    smooth = import_module("forgelm_example.smooth_trainer")
    with pytest.raises(ConfigError, match="no labels to smooth; use mode=sft"):
        smooth.build(RunConfig(task=TaskConfig(problem=Problem.regression)), None, None, {})
    trainer = object.__new__(smooth.SmoothTrainer)
    trainer.smoothing = 0.2
    logits, targets = (
        torch.randn(5, 3, generator=torch.manual_seed(0)),
        torch.tensor([0, 1, 2, 0, 1]),
    )
    likely = logits.log_softmax(-1)
    wanted = -0.8 * likely[range(5), targets].sum() - 0.2 * likely.mean(-1).sum()
    torch.testing.assert_close(trainer.combine({}, logits, targets, torch.zeros(())), wanted)


def test_snippets_are_those_of_the_example() -> None:
    """Every block of the page stands in one of the example's files."""
    page = (ROOT / "docs" / "extending.md").read_text()
    files = [path.read_text() for path in EXAMPLE.rglob("*") if path.suffix in SUFFIXES]
    blocks = re.findall(r"^```\w*\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 9
    assert [block for block in blocks if not any(block in text for text in files)] == []


SUFFIXES = (".py", ".yaml", ".toml", ".md")


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], None]]:
    """Put a site's packages beside forgelm in this process, as if it began with them."""

    def forget() -> None:
        for cached in (plugins._points, plugins.folders, modes, register_schema):
            cached.cache_clear()
        for name in ("mine", "mine_trainer"):
            sys.modules.pop(name, None)

    def put(site: Path) -> None:
        monkeypatch.syspath_prepend(str(site))
        forget()

    yield put
    forget()


def broken(folder: Path, name: str, group: str, place: str, **files: str) -> Path:
    """A site with a package `NAME` that adds `mine` to a group."""
    (folder / f"{name}-1.dist-info").mkdir(parents=True)
    information = folder / f"{name}-1.dist-info"
    about = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n"
    information.joinpath("METADATA").write_text(about)
    information.joinpath("entry_points.txt").write_text(f"[{group}]\nmine = {place}\n")
    for module, text in files.items():
        (folder / f"{module}.py").write_text(text)
    return folder


MODE = """
from dataclasses import dataclass, field
from typing import Any, ClassVar


@dataclass
class Mine:
    trainer: ClassVar[str] = "mine_trainer:build"
    name: str = "mine"
"""


@pytest.mark.parametrize(
    ("group", "place", "files", "words", "said"),
    [
        (
            "forgelm.modes",
            "mine:Mine",
            {"mine": "import nowhere"},
            [],
            "mine, which other adds to forgelm.modes (mine:Mine), can't be loaded: "
            "ModuleNotFoundError: No module named 'nowhere'; mend or remove that package",
        ),
        (
            "forgelm.modes",
            "mine:Mine",
            {"mine": "Mine = 3"},
            [],
            "mode mine, which other adds, must be a dataclass; mend or remove it",
        ),
        (
            "forgelm.modes",
            "mine:Mine",
            {"mine": MODE.replace('= "mine"', '= "other"')},
            [],
            'mode mine, which other adds, must begin with the key name: str = "mine"; mend or '
            "remove it",
        ),
        (
            "forgelm.modes",
            "mine:Mine",
            {"mine": MODE.replace(": ClassVar[str]", ": str")},
            [],
            "mode mine, which other adds, must name what builds it: trainer: ClassVar[str] = "
            '"module:function"; mend or remove it',
        ),
        (
            "forgelm.modes",
            "mine:Mine",
            {"mine": MODE + "    rows: set = field(default_factory=set)\n"},
            [],
            "mode mine, which other adds, must have defaults and types that a config can hold: ",
        ),
        (
            "forgelm.modes",
            "mine:Mine",
            {"mine": MODE, "mine_trainer": "def built(): ..."},
            ["--config-dir", "own", "mode=mine"],
            "mine, which other adds to forgelm.modes (mine_trainer:build), can't be loaded: "
            "AttributeError: module 'mine_trainer' has no attribute 'build'; mend or remove that "
            "package",
        ),
        (
            "forgelm.tasks",
            "mine",
            {"mine": "SPLITS = ('train', 'validation')\ndef rows(split): return 1 / 0"},
            ["task.embedded=mine"],
            "task.embedded=mine, which other adds, failed: ZeroDivisionError: division by zero",
        ),
        (
            "forgelm.metrics",
            "mine:mine",
            {"mine": "raise OSError('no disk')"},
            ["task.metrics=[mine]", "eval.before_training=false"],
            "mine, which other adds to forgelm.metrics (mine:mine), can't be loaded: OSError: no "
            "disk; mend or remove that package",
        ),
        (
            "forgelm.conf",
            "mine",
            {"mine": ""},
            [],
            "mine, which other adds to forgelm.conf, isn't a folder: name a package, which may "
            "hold nothing but configs",
        ),
    ],
    ids=[
        *("mode not importable", "mode no dataclass", "mode misnamed", "mode without trainer"),
        *("mode untypable", "trainer lacking", "task failing", "metric failing", "conf no folder"),
    ],
)
def test_a_broken_package_is_named(
    group: str,
    place: str,
    files: dict[str, str],
    words: list[str],
    said: str,
    tiny: Command,
    beside: Callable[[Path], None],
    tmp_path: Path,
) -> None:
    beside(broken(tmp_path / "site", "other", group, place, **files))
    own = tmp_path / "own" / "mode"
    own.mkdir(parents=True)
    (own / "mine.yaml").write_text("defaults:\n  - /_mode_mine@_here_\n")
    done = tiny("max_steps=1", *words)
    assert done.code == (2 if group == "forgelm.tasks" else 1)
    (line,) = done.err.strip().splitlines()
    assert line.startswith(f"forgelm: {said}")


def test_two_packages_with_one_name(
    tiny: Command, beside: Callable[[Path], None], tmp_path: Path
) -> None:
    for name in ("one", "two"):
        site = broken(tmp_path / "site", name, "forgelm.metrics", f"{name}:mine")
    beside(site)
    done = tiny("task.metrics=[mine]")
    assert done.code == 1
    assert re.fullmatch(
        r"forgelm: (one and two|two and one) both add mine to forgelm.metrics: remove one of them",
        done.err.strip(),
    )
