"""lm-eval's tasks on a run's model, by definitions of one's own that need no network."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, Command, interruption, only_run

from forgelm.drill import cases
from forgelm.run.files import read_json, write_json
from forgelm.run.lifecycle import load_sealed

DATA = """
from datasets import Dataset


def problems(**kwargs):
    rows = [
        {"prompt": f"{a}+{b}=", "completion": str(a + b), "wrong": str(a + b + 1)}
        for a in range(1, 5)
        for b in range(1, 5)
    ]
    return {"train": Dataset.from_list(rows[8:]), "test": Dataset.from_list(rows[:8])}


def broken(doc, results):
    raise ValueError(f"no answer in {results}")
"""
COMMON = """
custom_dataset: !function data.problems
training_split: train
test_split: test
doc_to_text: "{{prompt}}"
target_delimiter: ""
"""
TASKS = {
    "written": """
include: common
task: sums_written
tag: all_sums
output_type: generate_until
doc_to_target: "{{completion}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 4}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
    "chosen": """
include: common
task: sums_chosen
tag: all_sums
output_type: multiple_choice
doc_to_choice: ["{{completion}}", "{{wrong}}"]
doc_to_target: 0
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "read": """
include: common
task: sums_read
output_type: loglikelihood_rolling
doc_to_target: "{{prompt}}{{completion}}"
metric_list:
  - {metric: byte_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
""",
    "likely": """
include: common
task: sums_likely
output_type: loglikelihood
doc_to_target: "{{completion}}"
metric_list: [{metric: perplexity, aggregation: perplexity, higher_is_better: false}]
""",
    "group": """
group: sums
task: [sums_written, sums_read]
""",
    "broken": """
include: common
task: sums_broken
output_type: generate_until
doc_to_target: "{{completion}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 4}
process_results: !function data.broken
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
    "unsafe": """
include: common
task: sums_unsafe
output_type: multiple_choice
unsafe_code: true
doc_to_choice: ["{{completion}}", "{{wrong}}"]
doc_to_target: 0
""",
    "lacking": """
include: common
task: sums_lacking
output_type: multiple_choice
test_split: held_out
doc_to_choice: ["{{completion}}", "{{wrong}}"]
doc_to_target: 0
""",
}
SMALL = (
    *("task=arithmetic", "task.max_train_samples=64", "task.max_eval_samples=16"),
    *("task.metrics=[token_accuracy]", "training.eval_strategy=no", "max_steps=4"),
)
RANKS = "launch.ranks_per_node=2"
BOTH = ("before", "after")
Tasks = Callable[..., list[str]]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Definitions of tasks, one file each."""
    made = tmp_path_factory.mktemp("tasks")
    (made / "data.py").write_text(DATA)
    (made / "common").write_text(COMMON)
    for name, text in TASKS.items():
        (made / f"{name}.yaml").write_text(text)
    return made


@pytest.fixture
def asked(folder: Path) -> Tasks:
    """The words that ask for tasks of the folder."""

    def words(*names: str) -> list[str]:
        return [
            *SMALL,
            f"eval.lm_eval.include_path={folder}",
            f"eval.lm_eval.tasks=[{','.join(names)}]",
        ]

    return words


def measured(run: Path, when: str = "after") -> Any:
    return read_json(run / "eval.json")[when]["student"]["lm_eval"]


def test_measured_before_and_after_and_shown(
    tiny: Command, forgelm: Command, asked: Tasks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tag, a group, a task with examples; nothing asks the network; `evaluate` finds the same."""
    tried: list[Any] = []
    monkeypatch.setattr(socket.socket, "connect", lambda self, place: tried.append(place))
    words = ("eval.lm_eval.batch_size=3", "eval.lm_eval.num_fewshot=2")
    done = tiny(*asked("all_sums", "sums", "sums_likely"), *words)
    assert done.code == 0, done.err
    assert tried == []
    assert done.err == ""
    run = only_run(tmp_path / "outputs")
    for when in ("before", "after"):
        found = measured(run, when)
        names = ("written", "chosen", "read", "likely")
        assert set(found) == {"sums", *(f"sums_{name}" for name in names)}
        assert set(found["sums_chosen"]) == {"acc", "acc_stderr"}
        assert set(found["sums_written"]) == {"exact_match", "exact_match_stderr"}
    perplexities = [measured(run, when)["sums_read"]["byte_perplexity"] for when in BOTH]
    assert perplexities[1] < perplexities[0]
    table = [" ".join(line.split()) for line in done.out.splitlines()]
    before, after = perplexities
    assert f"sums_read byte_perplexity {before:.4f} {after:.4f} - -" in table
    assert not any("stderr" in line for line in table)
    card = (run / "README.md").read_text()
    assert f"| sums_read | byte_perplexity | {after:.4f} |" in card
    assert "| split | loss | token_accuracy |\n|---|---|---|\n| validation | " in card
    said = json.loads(forgelm("evaluate", str(run), "--output-format", "json").out)
    assert said["lm_eval"] == measured(run)
    assert set(said["splits"]) == {"validation"}
    shown = [" ".join(line.split()) for line in forgelm("evaluate", str(run)).out.splitlines()]
    assert f"sums_read byte_perplexity {after:.4f}" in shown


def test_training_is_the_same_without_it(tiny: Command, asked: Tasks, tmp_path: Path) -> None:
    for words in (asked("sums_chosen"), SMALL):
        root = tmp_path / f"{len(words)}"
        assert tiny(*words, f"output_root={root}").code == 0
    weights = [path.read_bytes() for path in tmp_path.glob("*/*/*/*/*/model.safetensors")]
    assert len(weights) == 2
    assert weights[0] == weights[1]


def test_a_part_of_the_examples(tiny: Command, asked: Tasks, tmp_path: Path) -> None:
    found = {}
    for limit in ("null", "2", "0.25"):
        words = (f"eval.lm_eval.limit={limit}", "eval.before_training=false")
        root = tmp_path / limit
        assert tiny(*asked("sums_likely"), *words, f"output_root={root}").code == 0
        run = only_run(root)
        assert read_json(run / "eval.json")["before"] is None
        found[limit] = measured(run)["sums_likely"]
    assert found["2"] == found["0.25"]
    assert found["2"]["perplexity"] != found["null"]["perplexity"]


def test_an_encoder_decoder_model(forgelm: Command, asked: Tasks, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(
            json.dumps({"prompt": f"{n}+1=", "completion": str(n + 1)}) + "\n" for n in range(32)
        )
    )
    words = [word for word in (*TINY, *asked("sums")) if not word.startswith("task")]
    words += ["task=seq2seq", f"task.train_file={rows}", f"task.validation_file={rows}"]
    done = forgelm("train", *words, "task.metrics=[token_accuracy]", "task.max_length=16")
    assert done.code == 0, done.err
    assert set(measured(only_run(tmp_path / "outputs"))) == {"sums_written", "sums_read", "sums"}


@pytest.mark.parametrize("when", BOTH)
def test_a_stop_between_two_batches(when: str, tiny: Command, asked: Tasks, tmp_path: Path) -> None:
    """What was measured is kept and not measured again; the rest comes out as without the stop."""
    words = [*asked("sums_chosen", "sums_read"), "run_name=stopped"]
    whole = tmp_path / "whole"
    assert tiny(*words, f"output_root={whole}").code == 0
    point = {"before": "lm_eval_before", "after": "lm_eval"}[when]
    # The answers to choose from are two batches.
    with interruption(f"{point}:3:SIGTERM"):
        done = tiny(*words)
    assert done.code == 75, done.out + done.err
    run = only_run(tmp_path / "outputs")
    known = read_json(run / "eval.json")
    assert set(known[when]["student"]["lm_eval"]) == {"sums_chosen"}
    known[when]["student"]["lm_eval"]["sums_chosen"]["acc"] = 0.123
    write_json(run / "eval.json", known)
    assert tiny(*words).code == 0
    wanted = measured(only_run(whole), when)
    assert measured(run, when) == wanted | {"sums_chosen": wanted["sums_chosen"] | {"acc": 0.123}}


def test_changed_definitions_are_refused(
    tiny: Command, asked: Tasks, folder: Path, tmp_path: Path
) -> None:
    own = shutil.copytree(folder, tmp_path / "own")
    words = [*asked("sums_read"), f"eval.lm_eval.include_path={own}", "run_name=mine"]
    with interruption("training:2:SIGTERM"):
        assert tiny(*words).code == 75
    (own / "common").write_text(COMMON.replace("test_split: test", "test_split: train"))
    done = tiny(*words)
    assert done.code == 1
    assert done.err.strip() == (
        f"forgelm: the tasks in eval.lm_eval.include_path={own} changed since the run began: "
        "restore them, or give another run_name"
    )


@pytest.mark.parametrize(
    ("task", "code", "said"),
    [
        ("sums_broken", 2, "lm-eval task sums_broken failed: ValueError: no answer in ['"),
        (
            "sums_unsafe",
            1,
            "eval.lm_eval.tasks: sums_unsafe runs code that the model writes, which forgelm "
            "doesn't do; leave it out",
        ),
        (
            "sums_lacking",
            1,
            "eval.lm_eval.tasks: sums_lacking can't be set up: KeyError: 'held_out'",
        ),
    ],
)
def test_a_task_that_fails(task: str, code: int, said: str, tiny: Command, asked: Tasks) -> None:
    done = tiny(*asked(task))
    assert done.code == code
    (line,) = done.err.strip().splitlines()
    assert line.startswith(f"forgelm: {said}")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["eval.lm_eval.tasks=[sums_read]", "eval.lm_eval.include_path={folder}/none"],
            "eval.lm_eval.include_path={folder}/none: no such folder",
        ),
        (
            ["eval.lm_eval.tasks=[a,a]", "task=nli_mini"],
            "eval.lm_eval.tasks=[a,a] with task.kind=text_classification: lm-eval measures models "
            "that write text; choose a task of task.kind=causal_lm or seq2seq",
        ),
        (
            ["eval.lm_eval.tasks=[sums,sums]", "eval.lm_eval.include_path={folder}"],
            "eval.lm_eval.tasks=[sums,sums]: names a task twice",
        ),
        (
            [
                "eval.lm_eval.tasks=[sums]",
                "eval.lm_eval.include_path={folder}",
                "eval.lm_eval.limit=2.5",
            ],
            "eval.lm_eval.limit=2.5: must be a whole number of examples, or a share below 1",
        ),
        (
            [
                "eval.lm_eval.tasks=[sums]",
                "eval.lm_eval.include_path={folder}",
                "training.fsdp=true",
                "launch.ranks_per_node=2",
            ],
            "training.fsdp=true with eval.lm_eval.tasks=[sums]: lm-eval measures on one rank, and "
            "none has the whole model; leave one of them out",
        ),
        (
            ["eval.lm_eval.num_fewshot=2"],
            "eval.lm_eval.num_fewshot=2 is only read with eval.lm_eval.tasks",
        ),
    ],
)
def test_a_wrong_request(
    words: list[str], said: str, forgelm: Command, folder: Path, tmp_path: Path
) -> None:
    done = forgelm("train", "task=arithmetic", *(word.format(folder=folder) for word in words))
    assert done.code == 1
    (line,) = done.err.strip().splitlines()
    assert line.startswith(f"forgelm: {said.format(folder=folder)}")
    assert not (tmp_path / "outputs").exists()


def test_unknown_names(forgelm: Command, tmp_path: Path) -> None:
    """Own ones, lm-eval's own, and one whose file lm-eval leaves out without a word."""
    (tmp_path / "mine.yaml").write_text("task: mine\noutput_type: [")
    (tmp_path / "sums.yaml").write_text(COMMON + TASKS["read"].replace("include: common", ""))
    words = ("eval.lm_eval.include_path=.", "eval.lm_eval.tasks=[mine,sums_red,hellaswg,hellaswag]")
    done = forgelm("train", "task=arithmetic", *words)
    assert done.code == 1
    broken, *unknown = done.err.strip().splitlines()
    assert broken.startswith("forgelm: mine.yaml: not a task of lm-eval: while parsing")
    where = "neither lm-eval nor . has such a task; the folder has sums_read"
    near = {"mine": "", "sums_red": "sums_read", "hellaswg": "hellaswag"}
    assert len(unknown) == len(near)
    for line, (name, right) in zip(unknown, near.items(), strict=True):
        hint = right and f"; did you mean {right}"
        assert line.startswith(f"forgelm: eval.lm_eval.tasks: {name}: {where}{hint}")
    assert not (tmp_path / "outputs").exists()


def test_it_has_to_be_installed(
    forgelm: Command, asked: Tasks, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # Python's own way to say that a module can't be found.
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    done = forgelm("train", *asked("sums_read"))
    assert done.code == 1
    assert done.err.strip() == (
        "forgelm: eval.lm_eval.tasks=[sums_read] needs lm-eval, which isn't installed: "
        "pip install 'forgelm[eval]'"
    )


def test_ranks_wait_for_the_first(asked: Tasks, tmp_path: Path) -> None:
    """Before training they wait to its end; after it a stop reaches them all."""
    done = subprocess.run(
        [sys.executable, "-m", "forgelm", "train", *TINY, *asked("sums_read"), RANKS],
        cwd=tmp_path,
        env={**os.environ, "FORGELM_INTERRUPT": "lm_eval:1:SIGTERM"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 75
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("forgelm: stopped safely (SIGTERM) at step 4; to go on: forgelm resume ")
    run = only_run(tmp_path / "outputs")
    assert set(measured(run, "before")) == {"sums_read"}
    assert read_json(run / "training_state.json")["stage"] == "finalize"


def test_the_drill_interrupts_it(tiny: Command, asked: Tasks, tmp_path: Path) -> None:
    assert tiny(*asked("sums_read")).code == 0
    config = load_sealed(only_run(tmp_path / "outputs"))
    points = [case.point for case in cases(config)]
    assert {"lm_eval_before", "lm_eval"} <= set(points)
