"""scripts/forge.py: its flags as overrides, its errors, YAML files laid over the default config."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from conftest import Command, only_run

from forgelm.config.compose import conf_dir
from forgelm.errors import ConfigError

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "forge.py"
EXPERIMENT = "mnli/distilbert/00_sft"

FILES = {
    "values.yaml": "epochs: 5\ntraining:\n  learning_rate: 0.001\n  weight_decay: 0.2\n",
    "child.yaml": "defaults: [values, _self_]\ntraining:\n  learning_rate: 0.002\n",
    "child_first.yaml": "defaults: [_self_, values]\ntraining:\n  learning_rate: 0.002\n",
    "chosen.yaml": (
        "defaults:\n  - override /mode: kd\n  - override /model: distilbert\n"
        "  - override /task: mnli\nmode:\n  alpha: 0.3\n"
    ),
    "on_shipped.yaml": f"defaults:\n  - /experiment/{EXPERIMENT}\n  - _self_\nepochs: 2\n",
    "whole.yaml": (
        "defaults:\n  - config\n  - override mode: kd\n  - _self_\nmode:\n  alpha: 0.3\nepochs: 4\n"
    ),
    "rl.yaml": (
        "defaults:\n  - override /task: arithmetic\nrl:\n  beta: 0.1\n  rewards: [numeric]\n"
        "epochs: 7\n"
    ),
    "rl_child.yaml": "defaults: [rl]\nrl:\n  beta: 0.2\nepochs: 8\n",
    "rl_parent_only.yaml": "defaults: [_self_, rl]\nmode:\n  epsilon: 0.3\nepochs: 8\n",
    "rl_whole.yaml": (
        "defaults:\n  - config\n  - override task: arithmetic\nrl:\n  num_iterations: 2\n"
    ),
    "two words.yaml": "epochs: 6\n",
    "empty.yaml": "",
    "wrong.yaml": "training:\n  lr: 0.1\nsed: 3\n",
    "list.yaml": "- epochs\n- seed\n",
    "broken.yaml": "training: [1\n",
}

TINY_RUN = """\
model:
  tiny: {hidden_size: 16, intermediate_size: 32}
task: {max_train_samples: 64, max_eval_samples: 16}
training: {per_device_train_batch_size: 8, eval_strategy: "no"}
eval: {before_training: false}
wandb: {mode: disabled}
"""


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("forge_script", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def files(tmp_path: Path) -> Path:
    for name, content in FILES.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    return tmp_path


def ran(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The script in a process of its own."""
    return subprocess.run(
        [sys.executable, str(SCRIPT), *words],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=180,
        check=False,
    )


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--config", EXPERIMENT], [f"experiment={EXPERIMENT}"]),
        (["--resume", "outputs/nli_mini/tiny/sft/a"], ["resume=outputs/nli_mini/tiny/sft/a"]),
        (["--resume", "a=b c"], ["resume='a=b c'"]),
        (["--config", "x", "--max_steps", "5"], ["experiment=x", "max_steps=5"]),
        (["--config", "x", "--epochs", "0.5"], ["experiment=x", "epochs=0.5"]),
        (["--config", "x", "--run_name", "first-1.2"], ["experiment=x", "run_name=first-1.2"]),
        (["--config", "x", "--run_name", r"it's \ a"], ["experiment=x", r"run_name='it\'s \\ a'"]),
        (["--config", "x", "--debug"], ["experiment=x", "debug=true"]),
        (
            ["--resume", "a", "--max_steps", "9", "--epochs", "2", "--run_name", "b", "--debug"],
            ["resume=a", "max_steps=9", "epochs=2", "run_name=b", "debug=true"],
        ),
        (
            ["--config", str(conf_dir() / "experiment" / f"{EXPERIMENT}.yaml")],
            [f"experiment={EXPERIMENT}"],
        ),
    ],
    ids=lambda value: " ".join(value).replace(str(conf_dir()), "conf"),
)
def test_flags_become_overrides(script: ModuleType, flags: list[str], words: list[str]) -> None:
    assert script.translated(script.arguments(flags)) == ["train", *words]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([], "one of the arguments --config --resume is required"),
        (["--run_name", "a"], "one of the arguments --config --resume is required"),
        (["--config", "a", "--resume", "b"], "not allowed with argument"),
        (["--config", "a", "--nothing"], "unrecognized arguments: --nothing"),
        (["--config", "a", "--max", "3"], "unrecognized arguments: --max 3"),
        (["--config"], "argument --config: expected one argument"),
        (["--config", "gone.yaml"], "gone.yaml: no such file; give an experiment's name or a YAML"),
        (["--config", "list.yaml"], "list.yaml: not a YAML mapping"),
        (["--config", "broken.yaml"], "broken.yaml: not a YAML mapping"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_wrong_flags_are_a_wrong_request(
    script: ModuleType,
    files: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    says: str,
) -> None:
    monkeypatch.chdir(files)
    with pytest.raises(ConfigError) as raised:
        script.translated(script.arguments(flags))
    assert says in str(raised.value)


@pytest.mark.parametrize(
    ("flags", "lines"),
    [
        ([], ["one of the arguments --config --resume is required; see forge.py --help"]),
        (
            ["--config", EXPERIMENT, "--max_steps", "ten"],
            ["max_steps=ten: must be a whole number or null"],
        ),
        (
            ["--config", "wrong.yaml", "--epochs", "0"],
            [
                "In 'wrong': training.lr=0.1: no such key; did you mean training.learning_rate?",
                "In 'wrong': sed=3: no such key; did you mean seed?",
                "epochs=0.0: must be above 0",
            ],
        ),
    ],
    ids=["nothing", "value", "file"],
)
def test_errors_of_the_process(files: Path, flags: list[str], lines: list[str]) -> None:
    done = ran(*flags, cwd=files)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines() == [f"forgelm: {line}" for line in lines]


def test_an_unknown_experiment_is_named(tmp_path: Path) -> None:
    done = ran("--config", f"{EXPERIMENT}t", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith(f"forgelm: experiment={EXPERIMENT}t: no such experiment; one of ")
    assert done.stderr.endswith(f"; did you mean experiment={EXPERIMENT}?\n")


def composed(script: ModuleType, forgelm: Command, *flags: str) -> dict[str, Any]:
    """The config that the flags stand for."""
    done = forgelm(*script.translated(script.arguments(flags)), "--cfg", "job")
    assert (done.code, done.err) == (0, "")
    printed = yaml.safe_load(done.out)
    assert isinstance(printed, dict)
    return printed


@pytest.mark.parametrize(
    ("name", "epochs", "rate", "decay", "task", "model", "mode"),
    [
        ("values", 5, 0.001, 0.2, "nli_mini", "tiny", "sft"),
        ("child", 5, 0.002, 0.2, "nli_mini", "tiny", "sft"),
        ("child_first", 5, 0.001, 0.2, "nli_mini", "tiny", "sft"),
        ("chosen", 3, 5e-5, 0, "mnli", "distilbert", "kd"),
        ("on_shipped", 2, 3e-5, 0.01, "mnli", "distilbert", "sft"),
        ("whole", 4, 1.5e-3, 0.01, "nli_mini", "tiny", "kd"),
        ("two words", 6, 1.5e-3, 0.01, "nli_mini", "tiny", "sft"),
        ("empty", 1.5, 1.5e-3, 0.01, "nli_mini", "tiny", "sft"),
    ],
)
def test_a_yaml_file_is_laid_over_the_default(
    script: ModuleType,
    forgelm: Command,
    files: Path,
    name: str,
    epochs: float,
    rate: float,
    decay: float,
    task: str,
    model: str,
    mode: str,
) -> None:
    config = composed(script, forgelm, "--config", str(files / f"{name}.yaml"))
    assert config["epochs"] == epochs
    assert config["training"]["learning_rate"] == rate
    assert config["training"]["weight_decay"] == decay
    assert (config["task"]["name"], config["model"]["name"]) == (task, model)
    assert config["mode"]["name"] == mode
    assert config["mode"].get("alpha") == (0.3 if mode == "kd" else None)
    assert config["output_root"] == "outputs"


@pytest.mark.parametrize(
    ("name", "epochs", "keys"),
    [
        ("rl", 7, {"beta": 0.1, "rewards": ["numeric"]}),
        ("rl_child", 8, {"beta": 0.2, "rewards": ["numeric"]}),
        ("rl_parent_only", 7, {"beta": 0.1, "epsilon": 0.3, "rewards": ["numeric"]}),
        ("rl_whole", 24, {"num_iterations": 2, "rewards": ["exact_match"]}),
    ],
)
def test_a_section_rl_is_mode_rl(
    script: ModuleType,
    forgelm: Command,
    files: Path,
    name: str,
    epochs: float,
    keys: dict[str, Any],
) -> None:
    config = composed(script, forgelm, "--config", str(files / f"{name}.yaml"))
    assert config["mode"] == config["mode"] | {"name": "rl"} | keys
    assert config["epochs"] == epochs


def test_flags_win_over_the_file(script: ModuleType, forgelm: Command, files: Path) -> None:
    flags = ["--epochs", "9", "--max_steps", "3", "--run_name", "mine", "--debug"]
    config = composed(script, forgelm, "--config", str(files / "child.yaml"), *flags)
    assert (config["epochs"], config["max_steps"]) == (9, 3)
    assert (config["run_name"], config["debug"]) == ("mine", True)
    assert config["training"]["learning_rate"] == 0.002


def test_a_shipped_experiments_file_is_the_experiment(script: ModuleType, forgelm: Command) -> None:
    path = conf_dir() / "experiment" / f"{EXPERIMENT}.yaml"
    by_path = composed(script, forgelm, "--config", str(path))
    assert by_path == composed(script, forgelm, "--config", EXPERIMENT)
    assert by_path["task"]["name"] == "mnli"


def test_a_run_of_a_file_is_made_and_gone_on_with(tmp_path: Path) -> None:
    """The script does what it translates: a run here, and the same run by --resume."""
    (tmp_path / "mine.yaml").write_text(TINY_RUN, encoding="utf-8")
    done = ran("--config", "mine.yaml", "--max_steps", "2", "--run_name", "mine", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = only_run(tmp_path / "outputs")
    assert run.relative_to(tmp_path) == Path("outputs/nli_mini/tiny/sft/mine")
    sealed = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    assert sealed["model"]["tiny"]["hidden_size"] == 16
    assert sealed["max_steps"] == 2
    again = ran("--resume", "outputs/nli_mini/tiny/sft/mine", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "is complete" in again.stdout
