"""A user's own files: read, checked, trained on, evaluated and predicted for."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import Command, Result, only_run
from glue_fixture import model_repo

from forgelm.run.files import read_json

Columns = dict[str, list[Any]]

SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
TEXTS = [
    "the cat sleeps in the barn .",
    "NA",
    "null",
    "nan",
    "",
    "1",
    "a dog , a hen",
    'the "horse" eats',
    "two\nlines",
    "none",
    "a very long rain fell on the field .",
    "Über allem",
]
NAMES = ["null", "NA", "yes"] * 4
REGRESSION = ("task.problem=regression", "task.metrics=[pearson,mse]")
GOOD = "text,label\n" + "the cat,good\nthe dog,bad\n" * 2


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A local folder with a tiny base model."""
    folder = tmp_path_factory.mktemp("models") / "base"
    folder.mkdir()
    for name, content in model_repo(head=False).items():
        (folder / name).write_bytes(content)
    return folder


def request_of(base: Path, train: str, validation: str, *words: str) -> list[str]:
    """The words of a small run on two files."""
    return [
        "train",
        "task=text_classification",
        f"task.train_file={train}",
        f"task.validation_file={validation}",
        "model=custom",
        f"model.path={base}",
        "task.max_length=32",
        "max_steps=2",
        "training.eval_strategy=no",
        "training.per_device_train_batch_size=8",
        "training.learning_rate=1e-3",
        "wandb.mode=disabled",
        *words,
    ]


def write(path: Path, columns: Columns) -> Path:
    """The columns as a file of the kind that its name says."""
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    if path.suffix == ".parquet":
        pq.write_table(pa.table(columns), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


def logits(run: Path, texts: Sequence[str], pairs: Sequence[str] | None = None) -> np.ndarray:
    """What the final model says of each row, [rows, outputs]."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(run)
    model = AutoModelForSequenceClassification.from_pretrained(run).eval()
    batch = tokenizer(
        list(texts),
        None if pairs is None else list(pairs),
        padding=True,
        truncation=True,
        max_length=32,
        return_tensors="pt",
    )
    with torch.no_grad():
        made: np.ndarray = model(**batch).logits.numpy()
    return made


def softmax(outputs: np.ndarray) -> np.ndarray:
    exponents = np.exp(outputs.astype(np.float64) - outputs.max(-1, keepdims=True))
    made: np.ndarray = exponents / exponents.sum(-1, keepdims=True)
    return made


def labels_of(run: Path) -> list[str]:
    """The final model's label names in the order of its outputs."""
    from transformers import AutoConfig

    names = AutoConfig.from_pretrained(run).id2label
    return [names[number] for number in range(len(names))]


def assert_measured(run: Path, outputs: np.ndarray, names: Sequence[str]) -> None:
    """`eval.json` holds the loss and accuracy of these outputs for rows with these labels."""
    known = labels_of(run)
    labels = np.array([known.index(name) for name in names])
    measured = read_json(run / "eval.json")["after"]["student"]["validation"]
    likely = np.log(softmax(outputs))[np.arange(len(labels)), labels]
    assert measured["loss"] == pytest.approx(-likely.mean(), rel=1e-4)
    assert measured["accuracy"] == pytest.approx((outputs.argmax(-1) == labels).mean())


def assert_refused(done: Result, *said: str) -> None:
    """Exit code 1 and one line that says all of this."""
    assert done.code == 1, done.err
    (line,) = done.err.splitlines()
    assert line.startswith("forgelm: ")
    for part in said:
        assert part in line
    assert "Traceback" not in done.out
    assert "Failed to read" not in done.out


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_text_and_labels_are_taken_as_they_stand(
    forgelm: Command, base: Path, tmp_path: Path, suffix: str
) -> None:
    write(tmp_path / f"train{suffix}", {"text": TEXTS, "label": NAMES})
    write(tmp_path / f"check{suffix}", {"text": TEXTS[::-1], "label": NAMES})
    done = forgelm(*request_of(base, f"train{suffix}", f"check{suffix}"))
    assert done.code == 0, done.err
    run = only_run(tmp_path / "outputs")
    assert "train 12, validation 12; 3 labels" in done.out
    assert labels_of(run) == ["NA", "null", "yes"]
    assert_measured(run, logits(run, TEXTS[::-1]), NAMES)


@pytest.mark.parametrize("suffix", [".tsv", ".jsonl"])
def test_pairs(forgelm: Command, base: Path, tmp_path: Path, suffix: str) -> None:
    columns = {"said": NAMES, "left": TEXTS, "right": TEXTS[::-1]}
    write(tmp_path / f"rows{suffix}", columns)
    words = ("task.text_column=left", "task.text_pair_column=right", "task.label_column=said")
    done = forgelm(*request_of(base, f"rows{suffix}", f"rows{suffix}", *words))
    assert done.code == 0, done.err
    run = only_run(tmp_path / "outputs")
    assert_measured(run, logits(run, TEXTS, TEXTS[::-1]), NAMES)


@pytest.mark.parametrize(
    ("found", "words", "labels"),
    [
        ([10, 2, 1], [], ["1", "2", "10"]),
        ([10, 2, 1], ["task.labels=[10,1,2]"], ["10", "1", "2"]),
        (["good", "bad", "odd"], ["task.labels=[odd,good,bad]"], ["odd", "good", "bad"]),
        (["good", "bad", "good"], ["task.labels=[odd,good,bad]"], ["odd", "good", "bad"]),
        ([True, False, True], [], ["False", "True"]),
    ],
    ids=["numbers", "numbers-given", "given", "unused", "booleans"],
)
def test_labels_have_the_order_of_their_numbers(
    forgelm: Command,
    base: Path,
    tmp_path: Path,
    found: list[Any],
    words: list[str],
    labels: list[str],
) -> None:
    """The files are of two kinds: a number is the same label as its digits in a text file."""
    values = found * 4
    write(tmp_path / "train.csv", {"text": TEXTS, "label": values})
    write(tmp_path / "check.parquet", {"text": TEXTS, "label": values})
    done = forgelm(*request_of(base, "train.csv", "check.parquet", *words))
    assert done.code == 0, done.err
    run = only_run(tmp_path / "outputs")
    assert labels_of(run) == labels
    assert read_json(run / "run_metadata.json")["labels"] == labels
    assert_measured(run, logits(run, TEXTS), [str(value) for value in values])


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_regression(forgelm: Command, base: Path, tmp_path: Path, suffix: str) -> None:
    scores = [0.5 * number - 1 for number in range(len(TEXTS))]
    write(tmp_path / f"rows{suffix}", {"text": TEXTS, "label": scores})
    done = forgelm(*request_of(base, f"rows{suffix}", f"rows{suffix}", *REGRESSION))
    assert done.code == 0, done.err
    run = only_run(tmp_path / "outputs")
    config = read_json(run / "config.json")
    assert config["problem_type"] == "regression"
    assert read_json(run / "run_metadata.json")["labels"] is None
    outputs = logits(run, TEXTS)
    assert outputs.shape == (len(TEXTS), 1)
    measured = read_json(run / "eval.json")["after"]["student"]["validation"]
    pearson = np.corrcoef(outputs[:, 0], scores)[0, 1]
    assert measured["pearson"] == pytest.approx(pearson, abs=1e-4)
    error = np.mean((outputs[:, 0] - scores) ** 2)
    assert measured["mse"] == pytest.approx(error, rel=1e-4)
    assert measured["loss"] == pytest.approx(error, rel=1e-4)
    assert forgelm("predict", str(run), "--data", f"rows{suffix}", "--output", "o.jsonl").code == 0
    made = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert [row["prediction"] for row in made] == pytest.approx(list(outputs[:, 0]), abs=1e-5)
    assert "score" not in made[0]


def lines(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


CAT, DOG = {"text": "the cat", "label": "good"}, {"text": "the dog", "label": "bad"}
F1 = ["task.metrics=[f1]"]
STREAM = ["task.streaming=true", "training.train_sampling_strategy=sequential"]
SCORES = "text,label\nthe cat,1.5\n"


@pytest.mark.parametrize(
    ("files", "words", "said"),
    [
        pytest.param(
            {"train.csv": GOOD.replace("text", "txet")},
            [],
            ["task.text_column=text: split train", "did you mean task.text_column=txet?"],
            id="no text column",
        ),
        pytest.param(
            {"check.csv": GOOD.replace("label", "labels")},
            [],
            ["task.label_column=label: split validation", "did you mean task.label_column=labels"],
            id="no label column",
        ),
        pytest.param(
            {},
            ["task.text_pair_column=other"],
            ["task.text_pair_column=other: split train has no such column, but text, label"],
            id="no pair column",
        ),
        pytest.param({"train.csv": ""}, [], ["train.csv: the file is empty"], id="empty"),
        pytest.param({"check.csv": "text,label\n"}, [], ["check.csv", "no rows"], id="header"),
        pytest.param({"check.jsonl": "\n"}, [], ["check.jsonl", "is empty"], id="empty jsonl"),
        pytest.param({"check.json": "[]"}, [], ["check.json", "no rows"], id="empty json"),
        pytest.param(
            {"check.csv": GOOD + "a hen,ugly\n"},
            [],
            ["split validation, row 5: label='ugly': unknown label", "bad, good"],
            id="unknown label",
        ),
        pytest.param(
            {"check.jsonl": lines(CAT, {"text": "a hen", "label": 2})},
            [],
            ["check.jsonl"],
            id="label of another kind",
        ),
        pytest.param(
            {"train.jsonl": lines(CAT, DOG)},
            ["task.labels=[good,evil]"],
            ["split train, row 2: label='bad': unknown label; the labels are good, evil"],
            id="label not given",
        ),
        pytest.param(
            {"train.csv": GOOD + "a hen,\n"},
            [],
            ["split train, row 5", "the label is missing"],
            id="missing label",
        ),
        pytest.param(
            {"check.jsonl": lines(CAT, DOG, {"text": "a hen", "label": None})},
            [],
            ["split validation, row 3", "the label is missing"],
            id="null as label",
        ),
        pytest.param(
            {"train.csv": SCORES + "a hen,high\n"},
            REGRESSION,
            ["split train, row 2: label='high' is not a finite number"],
            id="score in words",
        ),
        pytest.param(
            {"train.csv": SCORES, "check.csv": SCORES + "a hen,nan\n"},
            REGRESSION,
            ["split validation, row 2: label='nan' is not a finite number"],
            id="score is nan",
        ),
        pytest.param(
            {"train.csv": SCORES + "a hen,\n"},
            REGRESSION,
            ["split train, row 2", "label=''"],
            id="missing score",
        ),
        pytest.param(
            {"train.jsonl": lines({**CAT, "text": 5})},
            ["task.labels=[bad,good]"],
            ["split train, row 1: text=5 is not text"],
            id="number as text",
        ),
        pytest.param(
            {"check.jsonl": lines(CAT, {**DOG, "text": None})},
            [],
            ["split validation, row 2: text is null, and must be text"],
            id="null as text",
        ),
        pytest.param(
            {"train.jsonl": lines(CAT, DOG) + '\n{"text": \n'},
            [],
            ["train.jsonl, line 4: not JSON"],
            id="broken line",
        ),
        pytest.param(
            {"train.jsonl": lines(CAT, ["the dog"])},
            [],
            ["train.jsonl, row 2: must be an object"],
            id="line is no object",
        ),
        pytest.param(
            {"train.csv": GOOD.replace("text,label", "label,label")},
            [],
            ["train.csv: the header names label more than once; rename or remove columns"],
            id="column twice",
        ),
        pytest.param(
            {"train.csv": GOOD.replace("text,label", "label,label")},
            [*STREAM, "task.labels=[bad,good]"],
            ["train.csv: the header names label more than once; rename or remove columns"],
            id="column of a stream twice",
        ),
        pytest.param(
            {"train.jsonl": lines(CAT) + '\n{"text": "a", "label": "bad", "label": "good"}\n'},
            [],
            ["train.jsonl, line 3: the key 'label' stands more than once in an object"],
            id="key twice",
        ),
        pytest.param(
            {"train.json": '[{"text": "a", "label": "b"}, {"text": "a", "x": {"y": 1, "y": 2}}]'},
            [],
            ["train.json, row 2: the key 'y' stands more than once in an object"],
            id="key twice in json",
        ),
        pytest.param(
            {"check.jsonl": lines(CAT, {**DOG, "text": "a \ud800"})},
            [],
            [r"check.jsonl, row 2, column text: 'a \ud800' has half of a character"],
            id="half a character",
        ),
        pytest.param(
            {"check.jsonl": lines(CAT, {**DOG, "other": [10**30]})},
            [],
            [f"check.jsonl, row 2, column other: {10**30} needs more than 64 bits; write it as"],
            id="large number",
        ),
        pytest.param(
            {"train.json": json.dumps(CAT)},
            [],
            ["train.json: must hold a list of objects"],
            id="json is no list",
        ),
        pytest.param(
            {"train.json": lines(CAT, DOG)},
            [],
            ["train.json: not JSON", "one object a line is .jsonl"],
            id="json lines in json",
        ),
        pytest.param(
            {"train.csv": GOOD + 'a hen,"good\n'},
            [],
            ["train.csv, line", "unexpected end of data"],
            id="quote",
        ),
        pytest.param(
            {"train.csv": GOOD + "a hen, a dog,good\n"},
            [],
            ["train.csv, row 5: 3 fields, and the header has 2"],
            id="comma in text",
        ),
        pytest.param(
            {"train.parquet": GOOD}, [], ["train.parquet: not a readable"], id="not parquet"
        ),
        pytest.param(
            {"train.csv": GOOD.replace("bad", "good")},
            [],
            ["the training rows have 1 different label(s)"],
            id="one label",
        ),
        pytest.param(
            {"train.csv": GOOD + "a hen,odd\n"},
            F1,
            ["f1 is for two labels, and there are 3 (bad, good, odd); use f1_macro"],
            id="f1 of three labels",
        ),
        pytest.param(
            {"train.jsonl": lines({**CAT, "label": 0.25}, {**DOG, "label": 0.5})},
            [],
            ["holds numbers such as 0.25, not labels", "task.problem=regression"],
            id="numbers as labels",
        ),
        pytest.param({}, ["task.max_length=65"], ["task.max_length=65", "64 tokens"], id="length"),
        pytest.param(
            {}, ["task.train_file=none.csv"], ["task.train_file=none.csv: no such file"], id="none"
        ),
        pytest.param(
            {"train.txt": GOOD}, [], ["task.train_file=train.txt: must end in one"], id="suffix"
        ),
    ],
)
def test_wrong_data_is_refused_with_its_place(
    forgelm: Command,
    base: Path,
    tmp_path: Path,
    files: dict[str, str],
    words: Sequence[str],
    said: list[str],
) -> None:
    names = {"train": "train.csv", "check": "check.csv"}
    for name, content in ({"train.csv": GOOD, "check.csv": GOOD} | files).items():
        (tmp_path / name).write_text(content)
        names[name.partition(".")[0]] = name
    done = forgelm(*request_of(base, names["train"], names["check"], *words))
    assert_refused(done, *said)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "a cat", "label": "odd"}, "label='odd': unknown label; the labels are bad, good"),
        ({"text": "a cat", "label": None}, "label=None: the label is missing"),
        ({"text": None, "label": "good"}, "text is null, and must be text"),
    ],
)
def test_all_wrong_rows_are_counted(
    forgelm: Command, base: Path, tmp_path: Path, row: dict[str, Any], said: str
) -> None:
    (tmp_path / "train.jsonl").write_text(lines(CAT, DOG))
    (tmp_path / "check.jsonl").write_text(lines(CAT, *[row] * 7))
    done = forgelm(*request_of(base, "train.jsonl", "check.jsonl"))
    assert done.code == 1
    assert done.err.splitlines() == [
        *(f"forgelm: split validation, row {number}: {said}" for number in range(2, 7)),
        "forgelm: ... and 2 more rows of this kind",
    ]


def test_text_that_is_not_utf_8_is_refused(forgelm: Command, base: Path, tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_bytes(GOOD.replace("cat", "café").encode("latin-1"))
    (tmp_path / "check.csv").write_text(GOOD)
    done = forgelm(*request_of(base, "train.csv", "check.csv"))
    assert_refused(done, "train.csv: not a readable", "utf-8")


@pytest.mark.parametrize("changed", ["train.csv", "check.csv"])
def test_a_run_does_not_go_on_with_other_data(
    forgelm: Command, base: Path, tmp_path: Path, changed: str
) -> None:
    for name in ("train.csv", "check.csv"):
        (tmp_path / name).write_text(GOOD)
    words = ("max_steps=4", "run_name=mine")
    assert forgelm(*request_of(base, "train.csv", "check.csv", *words)).code == 0
    (tmp_path / changed).write_text(GOOD.replace("cat", "hen"))
    refused = forgelm("train", "resume=mine", "max_steps=8")
    assert_refused(refused, "the data of task text_classification changed", "restore it")
    (tmp_path / changed).write_text(GOOD)
    further = forgelm("train", "resume=mine", "max_steps=8")
    assert further.code == 0, further.err
    assert "going on from checkpoint-4" in further.out
    assert read_json(only_run(tmp_path / "outputs") / "training_state.json")["step"] == 8


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run that tells cats from dogs, more or less."""
    from forgelm.cli.main import main

    folder = tmp_path_factory.mktemp("trained")
    names = [animal for animal, _ in PLACES]
    write(folder / "train.csv", {"text": SENTENCES, "label": names})
    write(folder / "check.csv", {"text": SENTENCES, "label": DISPUTED})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("sys.argv", ["forgelm"])
        words = ("max_steps=16", "training.learning_rate=1e-2", "run_name=mine")
        metrics = f"task.metrics=[{','.join(METRICS)}]"
        assert main(request_of(base, "train.csv", "check.csv", *words, metrics)) == 0
    return only_run(folder / "outputs")


PLACES = [(animal, place) for animal in ("cat", "dog") for place in ("barn", "field", "yard")]
SENTENCES = [f"the {animal} sleeps in the {place} ." for animal, place in PLACES]
DISPUTED = ["dog", "dog", "cat", "dog", "dog", "cat"]
METRICS = ["accuracy", "f1", "f1_macro", "matthews_correlation"]
OWN_TEXTS = ["the dog eats .", "the cat eats .", "NA", "", "a dog ,\nin the field ."]
OWN: Columns = {
    "id": ["007", "NA", "x", "a,b", "end"],
    "text": OWN_TEXTS,
    "prediction_of": ["", "null", "z", "1.50", "é"],
}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("output", [None, "made.jsonl", "made.csv"])
def test_predictions_join_the_rows(
    forgelm: Command, trained: Path, tmp_path: Path, suffix: str, output: str | None
) -> None:
    write(tmp_path / f"own{suffix}", OWN)
    chosen = [] if output is None else ["--output", output]
    done = forgelm("predict", str(trained), "--data", f"own{suffix}", *chosen)
    assert done.code == 0, done.err
    path = tmp_path / (output or "own.predictions.jsonl")
    assert f"5 rows written to {path.name}" in done.out
    labels = ["cat", "dog"]
    rows = read_predictions(path, labels)
    for column, values in OWN.items():
        assert [row[column] for row in rows] == values
    scores = softmax(logits(trained, OWN_TEXTS))
    assert [row["prediction"] for row in rows] == [labels[best] for best in scores.argmax(-1)]
    for row, wanted in zip(rows, scores, strict=True):
        assert sum(row["score"].values()) == pytest.approx(1, abs=1e-9)
        assert [row["score"][name] for name in labels] == pytest.approx(list(wanted), abs=1e-5)


def read_predictions(path: Path, labels: list[str]) -> list[dict[str, Any]]:
    """The rows of a file of predictions, the scores by label."""
    if path.suffix == ".jsonl":
        made = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        assert all(list(row) == [*OWN, "prediction", "score"] for row in made)
        return made
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        assert reader.fieldnames == [*OWN, "prediction", *(f"score_{name}" for name in labels)]
        return [
            row | {"score": {name: float(row[f"score_{name}"]) for name in labels}}
            for row in reader
        ]


def test_numbers_in_other_columns_stay_numbers(
    forgelm: Command, trained: Path, tmp_path: Path
) -> None:
    columns: Columns = {"text": ["the cat", "the dog"], "n": [1, 2], "share": [0.5, None]}
    write(tmp_path / "own.parquet", columns)
    assert forgelm("predict", str(trained), "--data", "own.parquet").code == 0
    made = (tmp_path / "own.predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["n"] for line in made] == [1, 2]
    assert [json.loads(line)["share"] for line in made] == [0.5, None]


def test_predict_reports_as_one_json_document(
    forgelm: Command, trained: Path, tmp_path: Path
) -> None:
    write(tmp_path / "own.csv", OWN)
    done = forgelm("predict", str(trained), "--data", "own.csv", "--output-format", "json")
    assert json.loads(done.out) == {
        "success": True,
        "run": str(trained),
        "data": "own.csv",
        "output": "own.predictions.jsonl",
        "rows": 5,
    }


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--data", "own.csv", "--output", "made.txt"], ["made.txt", ".jsonl or .csv"]),
        (["--data", "own.csv", "--output", "no/made.csv"], ["no/made.csv", "folder"]),
        (["--data", "own.csv", "--output", "folder.csv"], ["folder.csv", "is a folder"]),
        (["--data", "own.csv", "--output", "own.csv"], ["would overwrite the data"]),
        (["--data", "none.csv"], ["none.csv: no such file"]),
        (["--data", "own.txt"], ["own.txt: must end in one of .csv"]),
        (["--data", "other.csv"], ["other.csv: has no column text, which the run reads"]),
        (["--data", "empty.csv"], ["empty.csv: the file has no rows"]),
        (["--data", "big.jsonl"], [f"big.jsonl, row 1, column n: -{10**30} needs more than 64"]),
        ([], ["--data"]),
    ],
)
def test_a_wrong_prediction_is_refused(
    forgelm: Command, trained: Path, tmp_path: Path, words: list[str], said: list[str]
) -> None:
    write(tmp_path / "own.csv", OWN)
    before = (tmp_path / "own.csv").read_bytes()
    (tmp_path / "own.txt").write_text("text\nthe cat\n")
    (tmp_path / "other.csv").write_text("texts\nthe cat\n")
    (tmp_path / "empty.csv").write_text("text\n")
    (tmp_path / "big.jsonl").write_text(lines({"text": "the cat", "n": -(10**30)}))
    (tmp_path / "folder.csv").mkdir()
    names = {path.name for path in tmp_path.iterdir()}
    assert_refused(forgelm("predict", str(trained), *words), *said)
    as_json = forgelm("predict", str(trained), *words, "--output-format", "json")
    assert as_json.code == 1
    answer = json.loads(as_json.out)
    assert answer["success"] is False
    assert all(part in answer["error"] for part in said)
    assert answer["error_class"] == "ConfigError"
    assert {path.name for path in tmp_path.iterdir()} == names
    assert (tmp_path / "own.csv").read_bytes() == before


def test_metrics_are_what_textbooks_say(trained: Path) -> None:
    chosen = logits(trained, SENTENCES).argmax(-1)
    labels = np.array([["cat", "dog"].index(name) for name in DISPUTED])
    tn, fn, fp, tp = (
        float(np.sum((chosen == ours) & (labels == theirs)))
        for ours, theirs in ((0, 0), (0, 1), (1, 0), (1, 1))
    )
    f1 = {"dog": 2 * tp / (2 * tp + fp + fn), "cat": 2 * tn / (2 * tn + fp + fn)}
    below = ((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)) ** 0.5
    results = read_json(trained / "eval.json")
    measured = results["after"]["student"]["validation"]
    assert results["metric"] == "accuracy"
    assert list(measured) == ["loss", *METRICS]
    assert measured["accuracy"] == pytest.approx((tp + tn) / len(labels))
    assert measured["f1"] == pytest.approx(f1["dog"])
    assert measured["f1_macro"] == pytest.approx(sum(f1.values()) / 2)
    wanted = (tp * tn - fp * fn) / below if below else 0.0
    assert measured["matthews_correlation"] == pytest.approx(wanted)


def test_evaluate_measures_what_eval_json_says(
    forgelm: Command, trained: Path, tmp_path: Path
) -> None:
    known = read_json(trained / "eval.json")["after"]["student"]
    root = trained.parents[3]
    as_text = forgelm("evaluate", "mine", "--output-root", str(root))
    assert as_text.code == 0, as_text.err
    header, row = as_text.out.splitlines()
    assert header.split() == ["split", "loss", *METRICS]
    values = known["validation"]
    assert row.split() == ["validation", *(f"{value:.4f}" for value in values.values())]
    words = ("evaluate", str(trained), "--output-format", "json", "--output", "made.json")
    as_json = json.loads(forgelm(*words).out)
    assert as_json["success"] is True
    assert as_json["run"] == str(trained)
    assert list(as_json["splits"]) == ["validation"]
    assert as_json["splits"]["validation"] == pytest.approx(values, rel=1e-6)
    assert read_json(tmp_path / "made.json")["splits"] == as_json["splits"]


def test_evaluate_refuses_changed_data_and_strange_runs(
    forgelm: Command, trained: Path, tmp_path: Path
) -> None:
    data = trained.parents[4] / "check.csv"
    kept = data.read_bytes()
    data.write_bytes(kept.replace(b"barn", b"yard"))
    try:
        changed = forgelm("evaluate", str(trained), "--output-format", "json")
    finally:
        data.write_bytes(kept)
    assert changed.code == 1
    answer = json.loads(changed.out)
    assert answer["success"] is False
    assert "the data of task text_classification changed" in answer["error"]
    assert_refused(forgelm("evaluate", "other"), "other: no such run")
