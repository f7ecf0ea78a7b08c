"""What composes: every shipped config, Hydra's flags, own config files; what answers at once."""

from __future__ import annotations

import re
import subprocess
import sys
import typing
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Command
from hydra.errors import HydraException
from omegaconf import OmegaConf

from forgelm import __version__
from forgelm.config.compose import Composer, Request, conf_dir
from forgelm.config.request import check_request
from forgelm.config.schema import MODES, KdConfig, Problem, RunConfig, TeacherKind

SHIPPED = sorted(path.relative_to(conf_dir()) for path in conf_dir().rglob("*.yaml"))

OWN_ROWS = ["task.train_file={rows}", "task.validation_file={rows}"]
# What a shipped config leaves to its user; {rows} becomes a file of rows.
LEFT_TO_THE_USER = {
    "model/custom": ["model.path=org/model"],
    "task/text_classification": OWN_ROWS,
    "task/causal_lm": OWN_ROWS,
    "task/seq2seq": OWN_ROWS,
    "task/image_to_text": ["task.dataset=org/images"],
    "mode/rl": ["task=arithmetic"],
    "teacher/path": ["mode=kd", "teacher.path=org/model"],
    "teacher/run": ["mode=kd", "teacher.run=outputs/some/run"],
}

# Numbers that may have any value. A key that isn't here needs a range in the schema.
ANY_NUMBER: set[str] = set()

OWN = {
    "model/mine.yaml": "name: mine\npath: null\ntiny:\n  hidden_size: 32\n",
    "task/mine.yaml": "name: mine\nembedded: nli_mini\nmax_length: 48\n",
    "mode/mine.yaml": "defaults:\n  - kd\nalpha: 0.25\n",
    "experiment/group/mine.yaml": (
        "# @package _global_\n"
        "defaults:\n  - override /model: mine\n  - override /mode: mine\n"
        "training:\n  learning_rate: 0.002\nepochs: 7\n"
    ),
    "primary.yaml": (
        "defaults:\n  - config\n  - override model: mine\n  - _self_\n"
        "training:\n  learning_rate: 0.003\n"
    ),
    "flat.yaml": "defaults: [config, _self_]\nseed: 5\n",
}

INSTANT = ["torch", "transformers", "datasets", "hydra", "omegaconf", "numpy"]


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder of a user's own configs."""
    folder = tmp_path / "own"
    for name, content in OWN.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    return folder


def recipe_for(name: str) -> tuple[str, str]:
    """The task and the model that a recipe is for."""
    models = sorted((path.stem for path in SHIPPED if path.parts[0] == "model"), key=len)
    model = [model for model in models if name.endswith(f"_{model}")][-1]
    return name.removesuffix(f"_{model}"), model


def only(*overrides: str) -> RunConfig:
    (point,) = check_request(Request(overrides=overrides))
    return point.config


@pytest.mark.parametrize("path", SHIPPED, ids=str)
def test_every_shipped_config_composes_and_is_right(path: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("text,label\na,0\nb,1\n", encoding="utf-8")
    name = str(path.with_suffix(""))
    group, _, choice = name.rpartition("/") if name.startswith("hydra/") else name.partition("/")
    needed = LEFT_TO_THE_USER.get(f"{group}/{choice}", [])
    overrides = [f"{group}={choice}"] if choice else []
    if group == "model":
        content = yaml.safe_load((conf_dir() / path).read_text(encoding="utf-8"))
        kind = content.get("suits", ["text_classification"])[0]
        if kind != "text_classification":
            needed = [f"task={kind}", *LEFT_TO_THE_USER[f"task/{kind}"]]
    if group == "recipe":
        task, model = recipe_for(choice)
        overrides = [f"task={task}", f"model={model}"]
    config = only(*overrides, *(word.format(rows=rows) for word in needed))
    chosen = {
        "task": config.task.name,
        "model": config.model.name,
        "teacher": config.teacher.kind.name,
        "mode": config.mode.name,
    }
    assert chosen.get(group, choice) == choice


def test_the_groups_are_those_of_the_readme_and_hydras() -> None:
    groups = {path.parts[0] for path in SHIPPED if len(path.parts) > 1}
    assert groups - {"hydra", "recipe"} == {"task", "model", "teacher", "mode", "experiment"}
    assert [path for path in SHIPPED if len(path.parts) == 1] == [Path("config.yaml")]


def test_the_default_is_small_and_needs_no_network() -> None:
    config = only()
    assert (config.task.name, config.task.embedded) == ("nli_mini", "nli_mini")
    assert (config.model.name, config.model.path) == ("tiny", None)
    assert config.mode == MODES["sft"]()
    assert config.teacher.kind is TeacherKind.auto
    assert config.output_root == "outputs"
    assert (config.max_steps, config.run_name, config.resume) == (None, None, None)


@pytest.mark.parametrize(
    "task",
    [
        path.stem
        for path in SHIPPED
        if path.parts[0] == "task" and f"task/{path.stem}" not in LEFT_TO_THE_USER
    ],
)
def test_distillation_needs_no_more_than_a_task_with_a_teacher(task: str) -> None:
    config = only("mode=kd", f"task={task}")
    assert config.teacher.kind is TeacherKind.auto
    assert bool(config.task.teacher) != bool(config.task.teacher_experiment)


@pytest.mark.parametrize(
    ("task", "metrics", "splits"),
    [
        ("cola", ["matthews_correlation"], ["validation"]),
        ("mnli", ["accuracy"], ["validation_matched", "validation_mismatched"]),
        ("mrpc", ["f1", "accuracy"], ["validation"]),
        ("qnli", ["accuracy"], ["validation"]),
        ("qqp", ["f1", "accuracy"], ["validation"]),
        ("rte", ["accuracy"], ["validation"]),
        ("sst2", ["accuracy"], ["validation"]),
        ("stsb", ["pearson", "spearmanr"], ["validation"]),
        ("wnli", ["accuracy"], ["validation"]),
    ],
)
def test_glue_tasks_have_glues_metrics_and_splits(
    task: str, metrics: list[str], splits: list[str]
) -> None:
    config = only(f"task={task}").task
    assert (config.dataset, config.dataset_config) == ("nyu-mll/glue", task)
    assert config.metrics == metrics
    assert config.validation_splits == splits
    wanted = Problem.regression if task == "stsb" else Problem.classification
    assert config.problem is wanted


def test_the_shipped_experiments_have_their_values() -> None:
    sft = only("experiment=mnli/distilbert/00_sft")
    kd = only("experiment=mnli/distilbert/01_kd")
    for config in (sft, kd):
        assert (config.task.name, config.model.name) == ("mnli", "distilbert")
        assert config.training.learning_rate == 3e-5
        assert config.training.warmup_steps == 0.06
        assert config.training.weight_decay == 0.01
        assert config.epochs == 3
    assert sft.mode == MODES["sft"]()
    assert kd.mode == KdConfig(alpha=0.9, temperature=2.0)


def test_what_is_typed_wins_over_an_experiment() -> None:
    config = only("training.learning_rate=1", "model=tiny", "experiment=mnli/distilbert/00_sft")
    assert (config.training.learning_rate, config.model.name) == (1, "tiny")
    assert config.task.name == "mnli"


@pytest.mark.parametrize(
    "request_line",
    [
        "mode=kd mode.alpha=0 teacher=none",
        "mode=kd mode.alpha=1",
        "mode=kd task=stsb mode.loss=mse",
        "epochs=0.01 max_steps=1 seed=0",
        "model.tiny.dropout=0 training.max_grad_norm=0 training.adam_beta1=0",
        "task.max_length=4 task.max_train_samples=1 training.save_total_limit=null",
        "training.eval_strategy=steps training.eval_steps=1",
        "training.dataloader_num_workers=1 training.dataloader_persistent_workers=true",
        "training.bf16=true training.use_cpu=true",
        "++training.learning_rate=0.1",
        "wandb.tags=[] task.metrics=[f1,accuracy]",
        "model=distilbert model=tiny",
        "model.tiny.num_attention_heads=3 model=distilbert",
    ],
)
def test_what_is_allowed_is_accepted(request_line: str) -> None:
    only(*request_line.split())


def test_every_point_of_a_sweep_is_a_config() -> None:
    request = Request(overrides=("mode=sft,kd", "seed=range(1,4)"), multirun=True)
    points = [(point.config.mode.name, point.config.seed) for point in check_request(request)]
    assert points == [("sft", 1), ("sft", 2), ("sft", 3), ("kd", 1), ("kd", 2), ("kd", 3)]


def numbers(node: type, prefix: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every (key, metadata) of a number below a dataclass."""
    hints = typing.get_type_hints(node)
    for item in fields(node):
        kinds = {hints[item.name], *typing.get_args(hints[item.name])}
        section = next((kind for kind in kinds if is_dataclass(kind)), None)
        if section is not None:
            yield from numbers(typing.cast(type, section), f"{prefix}{item.name}.")
        elif kinds & {int, float}:
            yield f"{prefix}{item.name}", dict(item.metadata)


def test_every_number_has_a_range() -> None:
    found = dict(numbers(RunConfig))
    for name, mode in MODES.items():
        found |= {f"mode={name} {key}": metadata for key, metadata in numbers(mode)}
    assert {"seed", "training.learning_rate", "model.tiny.dropout", "mode=kd alpha"} <= set(found)
    without = {key for key, metadata in found.items() if not {"min", "above"} & set(metadata)}
    assert without == ANY_NUMBER


def test_cfg_prints_the_composed_config_and_runs_nothing(forgelm: Command, tmp_path: Path) -> None:
    done = forgelm("train", "--cfg", "job", "mode=kd", "seed=7", "output_root=${oc.env:HOME}/x")
    assert (done.code, done.err) == (0, "")
    printed = yaml.safe_load(done.out)
    assert printed["mode"] == {
        "name": "kd",
        "alpha": 0.9,
        "temperature": 1.0,
        "loss": "auto",
        "beta": 0.5,
    }
    assert (printed["seed"], printed["output_root"]) == (7, "${oc.env:HOME}/x")
    assert "hydra" not in printed
    assert list(tmp_path.iterdir()) == []


def test_cfg_with_resolve_prints_values(forgelm: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORGELM_TEST_FOLDER", "/somewhere")
    value = "output_root=${oc.env:FORGELM_TEST_FOLDER}"
    done = forgelm("train", "--cfg", "job", "--resolve", value)
    assert yaml.safe_load(done.out)["output_root"] == "/somewhere"


def test_cfg_of_a_package(forgelm: Command) -> None:
    done = forgelm("--cfg", "job", "--package", "task", "task=rte")
    assert done.code == 0
    assert done.out.startswith("# @package task\n")
    assert yaml.safe_load(done.out)["dataset_config"] == "rte"


def test_flags_may_stand_anywhere(forgelm: Command) -> None:
    between = forgelm("train", "seed=7", "--cfg", "job", "mode=kd")
    before = forgelm("train", "--cfg", "job", "seed=7", "mode=kd")
    without = forgelm("seed=7", "mode=kd", "--cfg", "job")
    assert between.code == 0
    assert between == before == without


def test_info_prints_the_defaults_list(forgelm: Command) -> None:
    done = forgelm("train", "--info", "defaults", "mode=kd")
    assert done.code == 0
    rows = [line.split("|")[1].strip() for line in done.out.splitlines() if line.startswith("| ")]
    assert {"task/nli_mini", "model/tiny", "teacher/auto", "mode/kd", "config"} <= set(rows)


def test_help_of_train_lists_groups_and_keys(forgelm: Command) -> None:
    done = forgelm("train", "--help")
    assert done.code == 0
    groups = dict(re.findall(r"^([a-z_/]+): (.*)$", done.out.partition("== Config ==")[0], re.M))
    assert set(groups["mode"].split(", ")) == set(MODES)
    assert groups["teacher"] == "auto, none, path, run"
    assert "distilbert" in groups["model"].split(", ")
    assert groups["experiment/mnli/distilbert"] == "00_sft, 01_kd"
    assert "learning_rate: " in done.out
    assert not re.search(r"\b_(run|mode)", done.out)


def test_own_configs_beside_the_shipped_ones(forgelm: Command, own: Path) -> None:
    done = forgelm("--config-dir", str(own), "experiment=group/mine", "--cfg", "job")
    assert done.code == 0, done.err
    printed = yaml.safe_load(done.out)
    assert printed["model"]["name"] == "mine"
    assert printed["model"]["tiny"]["hidden_size"] == 32
    assert printed["mode"] == {
        "name": "kd",
        "alpha": 0.25,
        "temperature": 1.0,
        "loss": "auto",
        "beta": 0.5,
    }
    assert (printed["training"]["learning_rate"], printed["epochs"]) == (0.002, 7)
    assert printed["task"]["name"] == "nli_mini"


def test_an_own_choice_of_a_group(forgelm: Command, own: Path) -> None:
    done = forgelm("--config-dir", str(own), "task=mine", "--cfg", "job", "--package", "task")
    assert done.code == 0, done.err
    assert yaml.safe_load(done.out)["max_length"] == 48


@pytest.mark.parametrize(
    ("name", "seed", "rate", "model"),
    [("flat", 5, 1.5e-3, "tiny"), ("primary", 42, 0.003, "mine")],
)
def test_an_own_primary_config(
    forgelm: Command, own: Path, name: str, seed: int, rate: float, model: str
) -> None:
    done = forgelm("train", "--config-dir", str(own), "-cn", name, "--cfg", "job")
    assert done.code == 0, done.err
    printed = yaml.safe_load(done.out)
    assert printed["seed"] == seed
    assert printed["training"]["learning_rate"] == rate
    assert printed["model"]["name"] == model
    assert printed["output_root"] == "outputs"


def loaded(*words: str) -> tuple[int, str, str, set[str]]:
    """Exit code, stdout, what forgelm said on stderr, and the packages that a process imported."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "forgelm", *words],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    lines = done.stderr.splitlines()
    imported = [line.rpartition("|")[2].strip() for line in lines if line.startswith("import ti")]
    said = "\n".join(line for line in lines if not line.startswith("import time:"))
    return done.returncode, done.stdout, said, {name.partition(".")[0] for name in imported}


@pytest.mark.parametrize("words", [(), ("-h",), ("--help",), ("help",)])
def test_help_answers_at_once(words: tuple[str, ...]) -> None:
    code, out, said, packages = loaded(*words)
    assert (code, said) == (0, "")
    for command in ("train", "evaluate", "predict"):
        assert re.search(rf"^  {command} ", out, re.M)
    assert "--cfg job" in out
    assert 'eval "$(forgelm -sc install=bash)"' in out
    assert "forgelm" in packages
    assert packages.isdisjoint(INSTANT)


def test_version_answers_at_once() -> None:
    code, out, said, packages = loaded("--version")
    assert (code, out, said) == (0, f"forgelm {__version__}\n", "")
    assert packages.isdisjoint(INSTANT)


@pytest.mark.parametrize(
    ("word", "hint"),
    [("evalute", "; did you mean evaluate?"), ("trian", "; did you mean train?"), ("zzz", "")],
)
def test_an_unknown_command_is_answered_at_once(word: str, hint: str) -> None:
    code, out, said, packages = loaded(word)
    assert (code, out) == (1, "")
    assert said.startswith(f"forgelm: {word}: no such command; one of train, resume, drill, ")
    assert said.endswith(f"or an override such as mode=kd{hint}")
    assert packages.isdisjoint(INSTANT)


@pytest.mark.parametrize("command", ["resume", "drill", "evaluate", "predict"])
def test_help_of_a_command_loads_no_torch(command: str) -> None:
    code, out, said, packages = loaded(command, "--help")
    assert (code, said) == (0, "")
    assert out.startswith(f"usage: forgelm {command} ")
    assert packages.isdisjoint(["torch", "transformers", "datasets"])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("evaluate",), "the following arguments are required: RUN; see forgelm evaluate --help"),
        (("evaluate", "x", "--nothing"), "unrecognized arguments: --nothing; see forgelm evalua"),
        (("evaluate", "x", "--output-format", "xml"), "argument --output-format: invalid choice"),
        (("evaluate", "nowhere"), "nowhere: no such run, neither a directory nor a name or id"),
        (("predict", "x"), "the following arguments are required: --data; see forgelm predict"),
        (("predict", "nowhere", "--data", "rows.csv"), "nowhere: no such run"),
        (("predict", "x", "--data", "gone.csv"), "--data gone.csv: no such file"),
        (("predict", "x", "--data", "rows.csv", "--output", "out.txt"), "--output out.txt: must e"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_usage_errors_of_other_commands_are_wrong_requests(
    forgelm: Command, tmp_path: Path, words: tuple[str, ...], says: str
) -> None:
    (tmp_path / "rows.csv").write_text("premise,hypothesis\na,b\n", encoding="utf-8")
    done = forgelm(*words)
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith(f"forgelm: {says}")
    assert len(done.err.splitlines()) == 1


POINTS = [
    [],
    ["seed=3"],
    ["seed=4", "training.learning_rate=1e-4", "task.metrics=[accuracy]"],
    ["model=distilbert", "seed=3"],
    ["seed=3", "model=distilbert", "model.lora={enabled: true, r: 4}"],
    ["mode=kd", "mode.alpha=0.3", "hydra.job.name=x", "+hydra.job.env_set.A=b"],
    ["mode=kd", "mode.alpha=0.4", "hydra.job.name=x", "+hydra.job.env_set.A=b"],
    ["experiment=mnli/distilbert/00_sft", "seed=1"],
    [
        "hydra/launcher=slurm",
        "+hydra.launcher.additional_parameters.hold=true",
        "seed=${max_steps}",
    ],
    ["seed=1", "seed=2"],
]


def test_points_composed_together_are_as_if_alone() -> None:
    composer = Composer(Request())
    for overrides in [*POINTS, *reversed(POINTS)]:
        together, alone = composer.compose(overrides), Request().compose(overrides)
        assert OmegaConf.to_yaml(together) == OmegaConf.to_yaml(alone), overrides
        assert OmegaConf.get_type(together) is OmegaConf.get_type(alone)
        assert OmegaConf.is_struct(together)


@pytest.mark.parametrize("wrong", ["sed=1", "seed=x", "mode=nope", "mode.alpha=1", "seed@x=1"])
def test_points_composed_together_fail_as_if_alone(wrong: str) -> None:
    said = []
    for compose in (Composer(Request()).compose, Request().compose):
        with pytest.raises(HydraException) as raised:
            compose(["max_steps=3", wrong])
        said.append(str(raised.value))
    assert said[0] == said[1]
