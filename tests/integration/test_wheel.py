"""The installed wheel, away from the checkout: shipped configs, own configs, own rows and model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from glue_fixture import model_repo

from forgelm.run.files import read_json

CHECKOUT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the wheel's content and nothing of the checkout."""
    made, target = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "-w", str(made), str(CHECKOUT)]
    subprocess.run([*pip, *build], check=True)
    (wheel,) = made.glob("forgelm-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(target), str(wheel)], check=True)
    return target


def run(installed: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "forgelm", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
    )


def test_own_rows_and_a_local_model_from_a_wheel(installed: Path, tmp_path: Path) -> None:
    model = tmp_path / "my-bert"
    model.mkdir()
    for name, content in model_repo(2).items():
        (model / name).write_bytes(content)
    rows = "sentence,topic\n" + "".join(
        f"a good story {i},praise\na bad story {i},blame\n" for i in range(40)
    )
    for name in ("train.csv", "dev.csv"):
        (tmp_path / name).write_text(rows)
    own = tmp_path / "own" / "task"
    own.mkdir(parents=True)
    (own / "topics.yaml").write_text(
        "defaults: [text_classification]\nname: topics\ntrain_file: train.csv\n"
        "validation_file: dev.csv\ntext_column: sentence\nlabel_column: topic\nmax_length: 32\n"
    )
    done = run(
        installed,
        tmp_path,
        "--config-dir",
        "own",
        "task=topics",
        "model=custom",
        "model.path=my-bert",
        "max_steps=20",
        "training.learning_rate=3e-3",
        "wandb.mode=disabled",
    )
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "outputs/topics/custom/sft").iterdir()
    assert read_json(folder / "eval.json")["after"]["student"]["validation"]["accuracy"] > 0.9
    assert read_json(folder / "config.json")["id2label"] == {"0": "blame", "1": "praise"}
    where = subprocess.run(
        [sys.executable, "-c", "import forgelm; print(forgelm.__file__)"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert where.stdout.startswith(str(installed))


def test_the_wheel_has_every_shipped_config(installed: Path) -> None:
    ours = {path.relative_to(CHECKOUT) for path in (CHECKOUT / "conf").rglob("*.yaml")}
    theirs = {path.relative_to(installed / "forgelm") for path in installed.rglob("conf/**/*.yaml")}
    assert theirs == ours
