"""GLUE and other data sets from a Hub on loopback, through the command in processes of their own.

One process works online and one without internet. Both take a command line at a time, so that the
libraries are imported twice and not forty times.
"""

from __future__ import annotations

import io
import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from child import Child
from conftest import Result, only_run
from glue_fixture import TASKS, glue_repo, model_repo
from hub_server import HubServer, Request, Response
from safetensors.numpy import load, save

from forgelm.run.files import read_json

BASE = "org/tiny-base"
TEACHER = "FacebookAI/roberta-large-mnli"
THEIR_LABELS = ("CONTRADICTION", "NEUTRAL", "ENTAILMENT")
NO_COMMIT = "0" * 40
SMALL = (
    "train",
    "model=custom",
    "task.max_length=64",
    "training.eval_strategy=no",
    "training.logging_steps=1",
    "wandb.mode=disabled",
)
METRICS = {
    "cola": ["matthews_correlation"],
    "sst2": ["accuracy"],
    "mrpc": ["f1", "accuracy"],
    "stsb": ["pearson", "spearmanr"],
    "qqp": ["f1", "accuracy"],
    "mnli": ["accuracy"],
    "qnli": ["accuracy"],
    "rte": ["accuracy"],
    "wnli": ["accuracy"],
}


class FlakyHub(HubServer):
    """A Hub that can be told to drop every connection unanswered."""

    down = False

    def answer(self, request: Request) -> Response:
        if self.down:
            raise ConnectionAbortedError
        return super().answer(request)


@dataclass
class Hub:
    """The server, what was committed to it, and a process that reads from it."""

    server: FlakyHub
    folder: Path
    home: Path
    forgelm: Child
    shas: dict[str, str] = field(default_factory=dict)

    def train(self, root: str, *words: str) -> tuple[Result, Path]:
        """A small run below an output root of its own, which must succeed; its directory."""
        done = self.forgelm(*SMALL, f"output_root={root}", *words)
        assert done.code == 0, done.err + done.out
        return done, only_run(self.folder / root)


@pytest.fixture(scope="module")
def teacher_files() -> dict[str, bytes]:
    """A tiny model that has learned the miniature MNLI, with names and an order of its own."""
    files = model_repo(3, THEIR_LABELS, seed=5)
    weights = load(files["model.safetensors"])
    rows = glue_rows("mnli", "train")
    inputs = pooled(files, *texts_of("mnli", rows))
    columns = np.array([THEIR_LABELS.index(name) for name in names_of("mnli", rows)])
    bare = np.hstack([inputs, np.ones((len(inputs), 1), np.float32)])
    solved = np.linalg.lstsq(bare, 4 * np.eye(3, dtype=np.float32)[columns], rcond=1e-5)[0]
    weights["classifier.weight"] = np.ascontiguousarray(solved[:-1].T.astype(np.float32))
    weights["classifier.bias"] = solved[-1].astype(np.float32)
    return files | {"model.safetensors": save(weights, metadata={"format": "pt"})}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory, teacher_files: dict[str, bytes]) -> Iterator[Hub]:
    folder, home = tmp_path_factory.mktemp("work"), tmp_path_factory.mktemp("home")
    server = FlakyHub()
    with server:
        made = Hub(server, folder, home, Child(folder, home, server.url))
        made.shas = {
            "model": server.add_repo("model", BASE, base_repo()),
            "dataset": server.add_repo("dataset", "nyu-mll/glue", glue_repo()),
            "teacher": server.add_repo("model", TEACHER, teacher_files),
        }
        server.add_repo("model", "org/student", student_repo(teacher_files))
        server.add_repo("model", "org/moving", model_repo(head=False))
        server.add_repo("model", "org/strange", model_repo(3, ["red", "green", "blue"]))
        server.add_repo("model", "org/pair", model_repo(2))
        server.add_repo("model", "org/closed", model_repo(), gated=True)
        server.add_repo("dataset", "org/own", own_repo(False))
        server.add_repo("dataset", "org/named", own_repo(True))
        yield made
        made.forgelm.close()


@pytest.fixture(scope="module")
def distilled(hub: Hub) -> Path:
    """A run of `mode=kd task=mnli` with the task's own teacher."""
    words = ("task=mnli", "mode=kd", f"model.path={BASE}", "max_steps=2")
    return hub.train("distilled", *words)[1]


def base_repo() -> dict[str, bytes]:
    """A base checkpoint with weights so large that a fresh head tells rows apart."""
    files = model_repo(head=False)
    wide = ("value.weight", "output.dense.weight", "pooler.dense.weight")
    weights = {
        name: 5 * tensor if name.endswith(wide) else tensor
        for name, tensor in load(files["model.safetensors"]).items()
    }
    return files | {"model.safetensors": save(weights, metadata={"format": "pt"})}


def student_repo(teacher: dict[str, bytes]) -> dict[str, bytes]:
    """A half-hearted teacher in the task's own order that draws no random numbers in training."""
    labels = TASKS["mnli"].labels
    files = model_repo(3, labels)
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = json.loads(files["config.json"]) | still
    weights = load(teacher["model.safetensors"])
    order = [THEIR_LABELS.index(name.upper()) for name in labels or ()]
    for name in ("classifier.weight", "classifier.bias"):
        weights[name] = np.ascontiguousarray(weights[name][order] / 2)
    return files | {
        "config.json": json.dumps(config).encode(),
        "model.safetensors": save(weights, metadata={"format": "pt"}),
    }


def own_repo(declared: bool) -> dict[str, bytes]:
    """A data set of two questions and their topics; `declared`: as ClassLabel, else as text."""
    topics = [("weather", "will it rain ?"), ("food", "what is for lunch ?")] * 8
    names = ["weather", "food"]
    labels = [names.index(topic) for topic, _ in topics] if declared else [t for t, _ in topics]
    table = pa.table({"question": [text for _, text in topics], "topic": labels})
    stream = io.BytesIO()
    pq.write_table(table, stream)
    label = "{class_label: {names: {'0': weather, '1': food}}}" if declared else "string"
    header = (
        "---\ndataset_info:\n  features:\n  - {name: question, dtype: string}\n"
        f"  - {{name: topic, dtype: {label}}}\n"
        "configs:\n- config_name: default\n  data_files:\n"
        "  - {split: train, path: rows.parquet}\n  - {split: held_out, path: rows.parquet}\n---\n"
    )
    return {"README.md": header.encode(), "rows.parquet": stream.getvalue()}


def glue_rows(name: str, split: str) -> dict[str, list[Any]]:
    content = glue_repo()[f"{name}/{split}-00000-of-00001.parquet"]
    rows: dict[str, list[Any]] = pq.read_table(io.BytesIO(content)).to_pydict()
    return rows


def texts_of(name: str, rows: dict[str, list[Any]]) -> list[list[str]]:
    return [rows[column] for column in TASKS[name].columns]


def names_of(name: str, rows: dict[str, list[Any]]) -> list[str]:
    labels = TASKS[name].labels
    assert labels is not None
    return [labels[number].upper() for number in rows["label"]]


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def pooled(files: dict[str, bytes], texts: list[str], pairs: list[str]) -> np.ndarray:
    """What the model's classifier sees of each row."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    with tempfile.TemporaryDirectory() as scratch:
        folder = write(Path(scratch), files)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        batch = tokenizer(texts, pairs, padding=True, return_tensors="pt")
        with torch.no_grad():
            made: np.ndarray = model.bert(**batch).pooler_output.numpy()
    return made


def logits(folder: Path, texts: list[list[str]]) -> np.ndarray:
    """A saved model's outputs for rows of one or two texts each."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    batch = tokenizer(*texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        made: np.ndarray = model(**batch).logits.numpy()
    return made


def score(metric: str, outputs: np.ndarray, labels: np.ndarray) -> float:
    """The metrics as textbooks define them."""
    if metric in ("pearson", "spearmanr"):
        first, second = outputs.squeeze(-1), labels
        if metric == "spearmanr":
            first, second = ranks(first), ranks(second)
        return float(np.corrcoef(first, second)[0, 1])
    chosen = outputs.argmax(-1)
    if metric == "accuracy":
        return float(np.mean(chosen == labels))
    tp, tn, fp, fn = (
        int(np.sum((chosen == a) & (labels == b))) for a, b in ((1, 1), (0, 0), (1, 0), (0, 1))
    )
    if metric == "f1":
        return 2 * tp / (2 * tp + fp + fn)
    below = float((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)) ** 0.5
    return (tp * tn - fp * fn) / below if below else 0.0


def log_softmax(outputs: np.ndarray) -> np.ndarray:
    shifted = outputs - outputs.max(-1, keepdims=True)
    made: np.ndarray = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return made


def cross_entropy(outputs: np.ndarray, labels: np.ndarray) -> float:
    return float(-np.mean(log_softmax(outputs)[np.arange(len(labels)), labels]))


def ranks(values: np.ndarray) -> np.ndarray:
    """Each value's rank; ties share their mean."""
    below = (values[:, None] > values[None, :]).sum(1)
    made: np.ndarray = below + ((values[:, None] == values[None, :]).sum(1) + 1) / 2
    return made


@pytest.mark.parametrize("name", TASKS)
def test_every_task_is_read_and_measured_as_published(hub: Hub, name: str) -> None:
    task, metrics = TASKS[name], METRICS[name]
    splits = ["validation_matched", "validation_mismatched"] if name == "mnli" else ["validation"]
    done, run = hub.train(
        f"glue-{name}",
        f"task={name}",
        f"model.path={BASE}",
        "max_steps=8",
        "training.learning_rate=3e-3",
        "training.save_strategy=no",
    )
    results = read_json(run / "eval.json")
    held_out = ", ".join(f"{split} 32" for split in splits)
    kind = f"{len(task.labels)} labels" if task.labels else "scores"
    assert f"task     {name}: train 64, {held_out}; {kind}" in done.out
    assert results["metric"] == metrics[0]
    assert list(results["after"]["student"]) == splits
    config = read_json(run / "config.json")
    if task.labels:
        assert list(config["id2label"].values()) == list(task.labels)
        assert list(read_json(run / "run_metadata.json")["labels"]) == list(task.labels)
    else:
        assert config["problem_type"] == "regression"
        assert read_json(run / "run_metadata.json")["labels"] is None
    for split, measured in results["after"]["student"].items():
        rows = glue_rows(name, split)
        outputs, labels = logits(run, texts_of(name, rows)), np.array(rows["label"])
        assert list(measured) == ["loss", *metrics]
        error = (
            cross_entropy(outputs, labels)
            if task.labels
            else float(np.mean((outputs.squeeze(-1) - labels) ** 2))
        )
        assert measured["loss"] == pytest.approx(error, rel=1e-4)
        for metric in metrics:
            assert measured[metric] == pytest.approx(score(metric, outputs, labels), abs=1e-5)


def test_the_published_teacher_is_read_by_its_own_label_names(
    hub: Hub, distilled: Path, teacher_files: dict[str, bytes], tmp_path: Path
) -> None:
    teacher = read_json(distilled / "eval.json")["before"]["teacher"]
    folder = write(tmp_path / "teacher", teacher_files)
    for split in ("validation_matched", "validation_mismatched"):
        rows = glue_rows("mnli", split)
        outputs = logits(folder, texts_of("mnli", rows))
        named = [THEIR_LABELS[best] for best in outputs.argmax(-1)]
        right = np.mean([a == b for a, b in zip(named, names_of("mnli", rows), strict=True)])
        by_number = score("accuracy", outputs, np.array(rows["label"]))
        assert right > by_number + 0.2
        assert teacher[split]["accuracy"] == pytest.approx(right)
    assert f"teacher  {TEACHER}" in (distilled / "output.log").read_text()


def test_a_student_learns_from_the_published_teacher_s_outputs(
    hub: Hub, teacher_files: dict[str, bytes], tmp_path: Path
) -> None:
    alpha, temperature = 0.75, 3.0
    words = ("task=mnli", "mode=kd", f"mode.alpha={alpha}", f"mode.temperature={temperature}")
    batch = "training.per_device_train_batch_size=64"
    _, run = hub.train("first", *words, "model.path=org/student", batch, "max_steps=1")
    rows = glue_rows("mnli", "train")
    student, teacher = (
        logits(write(tmp_path / name, files), texts_of("mnli", rows))
        for name, files in (("student", student_repo(teacher_files)), ("teacher", teacher_files))
    )
    assert TASKS["mnli"].labels is not None
    order = [THEIR_LABELS.index(name.upper()) for name in TASKS["mnli"].labels]
    theirs = log_softmax(teacher[:, order] / temperature)
    distances = np.exp(theirs) * (theirs - log_softmax(student / temperature))
    wanted = alpha * temperature**2 * distances.sum(-1).mean()
    wanted += (1 - alpha) * cross_entropy(student, np.array(rows["label"]))
    logged = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert logged["loss"] == pytest.approx(wanted, rel=1e-3)


def test_commits_are_pinned(hub: Hub, distilled: Path) -> None:
    assert read_json(distilled / "run_metadata.json")["revisions"] == hub.shas


def test_a_run_keeps_its_commits_when_the_repository_moves_on(hub: Hub) -> None:
    words = ("task=rte", "model.path=org/moving", "max_steps=2")
    _, run = hub.train("moved", *words, "run_name=mine")
    old = read_json(run / "run_metadata.json")["revisions"]["model"]
    new = hub.server.add_repo("model", "org/moving", model_repo(head=False, seed=9, hidden=16))
    assert old != new
    shutil.rmtree(hub.home / "hub" / "models--org--moving")
    hub.server.clear_requests()
    further = hub.forgelm("train", f"resume={run}", "max_steps=4")
    assert further.code == 0, further.err
    asked = [path for _, path in hub.server.requests if "/org/moving" in path]
    assert f"/org/moving/resolve/{old}/config.json" in asked
    assert not [path for path in asked if new in path or "/main" in path]
    assert read_json(run / "run_metadata.json")["revisions"]["model"] == old
    assert read_json(run / "training_state.json")["step"] == 4
    _, fresh = hub.train("moved-fresh", *words)
    assert read_json(fresh / "run_metadata.json")["revisions"]["model"] == new


def test_everything_comes_from_the_cache_without_internet(
    hub: Hub, distilled: Path, tmp_path: Path
) -> None:
    hub.server.clear_requests()
    offline = Child(hub.folder, hub.home, hub.server.url, offline=True)
    words = ("task=mnli", "mode=kd", f"model.path={BASE}", "max_steps=2")
    pinned = (
        f"model.revision={hub.shas['model']}",
        f"task.revision={hub.shas['dataset']}",
        f"task.teacher_revision={hub.shas['teacher']}",
    )
    try:
        done = offline(*SMALL, "output_root=offline", *words, *pinned)
        assert done.code == 0, done.err
        run = only_run(hub.folder / "offline")
        revisions = read_json(run / "run_metadata.json")["revisions"]
        results = read_json(run / "eval.json")
        weights = (run / "model.safetensors").read_bytes()
        further = offline("train", f"resume={run}", "max_steps=4")
        absent = offline(*SMALL, "output_root=absent", "task=mnli", "model.path=org/absent")
    finally:
        offline.close()
    (tmp_path / "home").mkdir()
    other = Child(hub.folder, tmp_path / "home", hub.server.url, offline=True)
    elsewhere = other("train", f"resume={run}", "max_steps=6")
    other.close()
    assert hub.server.requests == []
    hub.server.add_repo("model", BASE, {"config.json": b"{}"}, message="later")
    connected = Child(hub.folder, tmp_path / "home", hub.server.url)
    fetched = connected("cache", f"resume={run}", "--output-format", "json")
    connected.close()
    hub.server._repos["model", BASE].commits.pop()
    assert {row["commit"] for row in json.loads(fetched.out)["needs"]} == set(hub.shas.values())
    assert revisions == hub.shas
    assert results == read_json(distilled / "eval.json")
    assert weights == (distilled / "model.safetensors").read_bytes()
    assert further.code == 0, further.err
    # Elsewhere, where the caches are empty, it asks for the commits that it was begun with.
    assert elsewhere.code == 2
    *_, command = elsewhere.err.splitlines()
    assert "where there is a network: forgelm cache " in command
    assert set(pinned) <= set(command.split())
    assert absent.code == 2
    assert "org/absent" in absent.err
    assert "HF_HUB_OFFLINE" in absent.err


KD = ("mode=kd", "teacher=path")


@pytest.mark.parametrize(
    ("words", "named", "said"),
    [
        (["model.path=org/none"], "org/none", "no such repository"),
        (["task.dataset=org/none"], "org/none", "no such repository"),
        ([*KD, "teacher.path=org/none"], "org/none", "no such repository"),
        (["model.revision=none"], f"{BASE}@none", "no such revision"),
        (["task.revision=none"], "nyu-mll/glue@none", "no such revision"),
        ([*KD, f"teacher.path={TEACHER}", "teacher.revision=no"], f"{TEACHER}@no", "no such rev"),
        ([f"model.revision={NO_COMMIT}"], BASE, NO_COMMIT),
        (["model.path=org/closed"], "org/closed", "gated"),
        ([*KD, "teacher.path=org/closed"], "org/closed", "gated"),
    ],
)
def test_what_the_hub_lacks_or_refuses_is_named(
    hub: Hub, words: list[str], named: str, said: str
) -> None:
    failed = hub.forgelm(*SMALL, "output_root=refused", "task=rte", f"model.path={BASE}", *words)
    assert failed.code == 2
    assert_one_line(failed, named, said)


@pytest.mark.parametrize("revision", ["main", NO_COMMIT])
def test_a_hub_that_does_not_answer_is_named(hub: Hub, revision: str) -> None:
    hub.server.down = True
    try:
        words = ("task=nli_mini", "model.path=org/pair", f"model.revision={revision}")
        failed = hub.forgelm(*SMALL, "output_root=down", *words)
    finally:
        hub.server.down = False
    assert failed.code == 2
    assert_one_line(failed, "org/pair", "can't be reached")


@pytest.mark.parametrize(
    ("teacher", "said"),
    [
        ("org/strange", "its labels (red, green, blue) are not the task's (entailment, neutral"),
        ("org/pair", "has 2 output(s), and the task needs 3"),
    ],
)
def test_a_teacher_of_something_else_is_refused(hub: Hub, teacher: str, said: str) -> None:
    words = ("task=mnli", *KD, f"teacher.path={teacher}", f"model.path={BASE}")
    refused = hub.forgelm(*SMALL, "output_root=strange", *words)
    assert refused.code == 1
    assert_one_line(refused, teacher, said)


OWN = (
    "task=text_classification",
    f"model.path={BASE}",
    "task.text_column=question",
    "task.label_column=topic",
    "task.validation_splits=[held_out]",
    "max_steps=2",
)


@pytest.mark.parametrize(
    ("dataset", "labels"), [("org/own", ["food", "weather"]), ("org/named", ["weather", "food"])]
)
def test_any_data_set_can_be_a_task(hub: Hub, dataset: str, labels: list[str]) -> None:
    root = dataset.replace("/", "-")
    _, run = hub.train(root, *OWN, f"task.dataset={dataset}")
    assert list(read_json(run / "config.json")["id2label"].values()) == labels
    outputs = logits(run, [["will it rain ?", "what is for lunch ?"]])
    chosen = [labels[best] for best in outputs.argmax(-1)]
    right = np.mean([a == b for a, b in zip(chosen, ["weather", "food"], strict=True)])
    measured = read_json(run / "eval.json")["after"]["student"]["held_out"]
    assert measured["accuracy"] == pytest.approx(right)
    wanted = np.array([labels.index("weather"), labels.index("food")])
    assert measured["loss"] == pytest.approx(cross_entropy(outputs, wanted), rel=1e-4)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["task.validation_splits=[validation]"], "validation: org/own has train, held_out"),
        (["task.train_split=training"], "training: org/own has train, held_out"),
        (["task.text_column=querstion"], "did you mean task.text_column=question?"),
        (
            ["task.dataset_config=other"],
            "task.dataset_config=other: data set org/own has no such configuration, but default",
        ),
        (
            ["task.dataset=nyu-mll/glue"],
            "task.dataset_config isn't set: data set nyu-mll/glue has several configurations; "
            "give one of cola, sst2, ",
        ),
        (
            ["task.dataset=nyu-mll/glue", "task.dataset_config=mnly"],
            "data set nyu-mll/glue has no such configuration, but cola, sst2, ",
        ),
    ],
)
def test_what_a_data_set_lacks_is_refused(hub: Hub, words: list[str], said: str) -> None:
    asked = [*SMALL, "output_root=lacking", *OWN]
    asked += [] if words[0].startswith("task.dataset=") else ["task.dataset=org/own"]
    refused = hub.forgelm(*asked, *words)
    assert refused.code == 1
    assert_one_line(refused, "", said)
    if "configuration" in said:
        # By the command that fills the caches too.
        refused = hub.forgelm("cache", *asked[1:], *words, "-q")
        assert refused.code == 1
        assert_one_line(refused, "", said)


def assert_one_line(failed: Result, named: str, said: str) -> None:
    (line,) = failed.err.splitlines()
    assert line.startswith("forgelm: ")
    assert named in line
    assert said in line
    assert "Traceback" not in failed.out
