"""Models that write: trained on every layout of rows, distilled, evaluated, asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Command, Result, only_run

from forgelm.run.files import read_json

PAIRS = [
    {"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(1, 9) for b in range(1, 9)
]
CHATS = [
    {
        "messages": [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["completion"]},
        ]
    }
    for row in PAIRS
]
TEXTS = [{"text": row["prompt"] + row["completion"]} for row in PAIRS]
LAYOUTS = {"pairs": PAIRS, "chats": CHATS, "texts": TEXTS}
ANSWERS = ("task.metrics=[exact_match,token_accuracy,perplexity]", "task.greater_is_better=true")

SMALL = (
    "model.tiny.hidden_size=16",
    "model.tiny.intermediate_size=32",
    "training.per_device_train_batch_size=8",
    "training.logging_steps=1",
    "training.learning_rate=1e-2",
    "training.eval_strategy=no",
    "task.max_length=64",
    "task.max_new_tokens=4",
    "wandb.mode=disabled",
    "max_steps=4",
)


def write(folder: Path, rows: list[dict[str, Any]], name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def request(rows: Path, task: str = "causal_lm") -> list[str]:
    """The words of a small run on rows that are trained and evaluated on."""
    files = (f"task.train_file={rows}", f"task.validation_file={rows}")
    return ["train", f"task={task}", *files, *SMALL]


@pytest.fixture
def trained(forgelm: Command, tmp_path: Path) -> Path:
    """A complete run on PAIRS."""
    done = forgelm(*request(write(tmp_path, PAIRS)), *ANSWERS, "run_name=teacher", "max_steps=8")
    assert done.code == 0, done.err
    return only_run(tmp_path / "outputs")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_rows_of_every_layout(forgelm: Command, tmp_path: Path, layout: str, packing: bool) -> None:
    words = request(write(tmp_path, LAYOUTS[layout]))
    words += () if layout == "texts" else ANSWERS
    done = forgelm(*words, f"task.packing={str(packing).lower()}")
    assert done.code == 0, done.err
    assert ("packing: 64 rows in" in done.out) is packing
    run = only_run(tmp_path / "outputs")
    results = read_json(run / "eval.json")
    after = results["after"]["student"]["validation"]
    assert after["loss"] < results["before"]["student"]["validation"]["loss"]
    assert set(after) >= {"loss", "perplexity", "token_accuracy"}
    evaluated = forgelm("evaluate", str(run), "--output-format", "json")
    assert json.loads(evaluated.out)["splits"]["validation"] == after
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]


def test_parquet(forgelm: Command, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(CHATS), tmp_path / "rows.parquet")
    done = forgelm(*request(tmp_path / "rows.parquet"), *ANSWERS)
    assert done.code == 0, done.err


def test_the_final_model_writes_what_eval_json_says(
    forgelm: Command, trained: Path, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(trained),
        AutoTokenizer.from_pretrained(trained),
    )
    said = []
    for row in PAIRS:
        asked = tokenizer(row["prompt"], return_tensors="pt")
        with torch.inference_mode():
            made = model.generate(**asked, max_new_tokens=4, do_sample=False)
        said.append(tokenizer.decode(made[0, asked["input_ids"].shape[1] :], True))
    right = sum(ours == row["completion"] for ours, row in zip(said, PAIRS, strict=True))
    scores = read_json(trained / "eval.json")["after"]["student"]["validation"]
    assert scores["exact_match"] == right / len(PAIRS)
    data = write(tmp_path, [{"prompt": row["prompt"], "note": 1} for row in PAIRS], "asked.jsonl")
    done = forgelm("predict", str(trained), "--data", str(data), "--output", "said.jsonl")
    assert done.code == 0, done.err
    written = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    assert [row["prediction"] for row in written] == said
    assert written[0] == {"prompt": "1+1=", "note": 1, "prediction": said[0]}


def test_prompts_in_the_models_chat_template(forgelm: Command, tmp_path: Path) -> None:
    words = ("task.as_chat=true", "task.system_prompt='Add.'", *ANSWERS)
    done = forgelm(*request(write(tmp_path, PAIRS)), *words)
    assert done.code == 0, done.err
    run = only_run(tmp_path / "outputs")
    asked = write(tmp_path, [{"prompt": "1+1="}], "asked.jsonl")
    assert forgelm("predict", str(run), "--data", str(asked)).code == 0
    chat = [{"messages": [{"role": "user", "content": "1+1="}]}]
    done = forgelm(*request(write(tmp_path, chat)), "task.as_chat=true")
    assert done.code == 1


@pytest.mark.parametrize("loss", ["kl", "reverse_kl", "jsd", "mse"])
def test_distillation(forgelm: Command, trained: Path, tmp_path: Path, loss: str) -> None:
    common = [*request(tmp_path / "rows.jsonl"), "mode=kd", "teacher=run", f"teacher.run={trained}"]
    done = forgelm(*common, f"mode.loss={loss}", "run_name=student", *ANSWERS)
    assert done.code == 0, done.err
    results = read_json(tmp_path / "outputs/causal_lm/tiny/kd/student/eval.json")
    theirs = read_json(trained / "eval.json")["after"]["student"]["validation"]
    assert results["before"]["teacher"]["validation"] == pytest.approx(theirs, rel=1e-5)


def weights(run: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return dict(load_file(run / "model.safetensors"))


def test_a_vocabulary_that_is_padded_makes_no_difference(
    forgelm: Command, trained: Path, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(trained)
    model.resize_token_embeddings(model.config.vocab_size + 24, mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[-24:] = 3.0
    model.save_pretrained(tmp_path / "padded")
    AutoTokenizer.from_pretrained(trained).save_pretrained(tmp_path / "padded")
    found = []
    for path in (trained, tmp_path / "padded"):
        words = ("mode=kd", "teacher=path", f"teacher.path={path}", f"run_name={path.name}")
        done = forgelm(*request(tmp_path / "rows.jsonl"), *words)
        assert done.code == 0, done.err
        found.append(weights(tmp_path / "outputs/causal_lm/tiny/kd" / path.name))
    for name, tensor in found[0].items():
        torch.testing.assert_close(tensor, found[1][name], rtol=1e-4, atol=1e-6)


def test_a_teacher_with_another_tokenizer_is_refused(
    forgelm: Command, trained: Path, tmp_path: Path
) -> None:
    text = (trained / "tokenizer.json").read_text()
    assert '"7": 27' in text or '"7":' in text
    content = json.loads(text)
    words = content["model"]["vocab"]
    words["7"], words["8"] = words["8"], words["7"]
    (trained / "tokenizer.json").write_text(json.dumps(content))
    done = forgelm(
        *request(tmp_path / "rows.jsonl"), "mode=kd", "teacher=run", f"teacher.run={trained}"
    )
    assert done.code == 1
    assert "the teacher's tokenizer isn't the student's: 2 of" in done.err
    assert "distillation compares token by token" in done.err


def test_a_teacher_of_another_kind_is_refused(forgelm: Command, tmp_path: Path) -> None:
    rows = write(tmp_path, PAIRS)
    done = forgelm(*request(rows, "seq2seq"), "run_name=teacher")
    assert done.code == 0, done.err
    run = only_run(tmp_path / "outputs")
    refused = forgelm(*request(rows), "mode=kd", "teacher=run", f"teacher.run={run}")
    assert refused.code == 1
    assert refused.err.strip() == (
        f"forgelm: teacher.run={run}: is a run of task seq2seq, of task.kind=seq2seq, and task "
        "causal_lm is of task.kind=causal_lm; choose a teacher of this kind"
    )


@pytest.mark.parametrize("mode", ["sft", "kd"])
def test_the_loss_is_a_mean_over_the_tokens_of_a_whole_step(
    forgelm: Command, trained: Path, tmp_path: Path, mode: str
) -> None:
    """However a step's rows are cut into micro-batches, though rows differ in length."""
    import torch

    rows = [{"prompt": "a", "completion": "b" * (1 + n % 7)} for n in range(32)]
    data = write(tmp_path, rows, "other.jsonl")
    words = ("mode=kd", "teacher=run", f"teacher.run={trained}") if mode == "kd" else ()
    found = []
    for size, steps in ((16, 1), (4, 4)):
        cut = (
            f"training.per_device_train_batch_size={size}",
            f"training.gradient_accumulation_steps={steps}",
            "training.train_sampling_strategy=sequential",
            "training.optim=sgd",
            f"run_name={size}",
        )
        assert forgelm(*request(data), *words, *cut).code == 0
        found.append(weights(tmp_path / "outputs/causal_lm/tiny" / mode / str(size)))
    for name, tensor in found[0].items():
        torch.testing.assert_close(tensor, found[1][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", ["sft", "kd"])
def test_sequence_to_sequence(forgelm: Command, tmp_path: Path, mode: str) -> None:
    common = [*request(write(tmp_path, PAIRS), "seq2seq"), *ANSWERS]
    done = forgelm(*common, "run_name=first")
    assert done.code == 0, done.err
    run = tmp_path / "outputs/seq2seq/tiny/sft/first"
    if mode == "kd":
        words = ("mode=kd", "teacher=run", f"teacher.run={run}", "run_name=student")
        done = forgelm(*common, *words)
        assert done.code == 0, done.err
        run = tmp_path / "outputs/seq2seq/tiny/kd/student"
    results = read_json(run / "eval.json")
    after = results["after"]["student"]["validation"]
    assert after["loss"] < results["before"]["student"]["validation"]["loss"]
    evaluated = forgelm("evaluate", str(run), "--output-format", "json")
    assert json.loads(evaluated.out)["splits"]["validation"] == after
    asked = write(tmp_path, [{"prompt": "1+1="}], "asked.jsonl")
    assert forgelm("predict", str(run), "--data", str(asked)).code == 0


LONG = {"prompt": "1" * 3000, "completion": "2"}
CUT = {"prompt": "1" * 60, "completion": "2" * 9}


def test_what_is_cut_or_left_out_is_counted_and_said(forgelm: Command, tmp_path: Path) -> None:
    done = forgelm(*request(write(tmp_path, [*PAIRS, LONG, CUT])))
    assert done.code == 0, done.err
    assert "split train: 1 of 66 rows cut at task.max_length=64 (row 66)" in done.out
    left_out = "rows left out, their prompt alone fills task.max_length=64 (row 65)"
    assert f"split train: 1 of 66 {left_out}" in done.out
    assert "Token indices" not in done.out + done.err
    again = forgelm(*request(tmp_path / "rows.jsonl"), "seed=1")
    assert f"split validation: 1 of 66 {left_out}" in again.out


def chat(*turns: tuple[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


WRONG: dict[str, tuple[list[dict[str, Any]], tuple[str, ...], str]] = {
    "empty completion": (
        [PAIRS[0], {"prompt": "a", "completion": " "}],
        (),
        "split train, row 2: completion is empty",
    ),
    "empty prompt": (
        [{"prompt": "", "completion": "a"}],
        (),
        "split train, row 1: prompt is empty",
    ),
    "no assistant turn": (
        [CHATS[0], chat(("user", "hello"))],
        (),
        "split train, row 2: messages has no assistant turn, so there is nothing to learn",
    ),
    "an empty assistant turn": (
        [chat(("user", "hello"), ("assistant", ""))],
        (),
        "split train, row 1: messages has an empty assistant turn",
    ),
    "messages that are none": (
        [{"messages": "hello"}],
        (),
        "split train, row 1: messages must be a list of messages, and is 'hello'",
    ),
    "a message without a role": (
        [{"messages": [{"content": "hello"}]}],
        (),
        "split train, row 1: messages message 1 has no role",
    ),
    "every prompt too long": (
        [LONG],
        (),
        "split train: in none of the 1 rows is anything to learn within task.max_length=64 tokens",
    ),
    "no known column": (
        [{"question": "a", "answer": "b"}],
        (),
        "split train: has neither messages, nor prompt and completion, nor text, but question, "
        "answer; name them with task.messages_column, task.prompt_column and",
    ),
    "a column that isn't there": (
        [{"question": "a", "answer": "b"}],
        ("task.prompt_column=question", "task.completion_column=anser"),
        "task.completion_column=anser: split train has no such column, but question, answer; did "
        "you mean task.completion_column=answer?",
    ),
    "answers to plain text": (
        TEXTS,
        ANSWERS,
        "task.metrics=[exact_match,token_accuracy,perplexity]: plain text has no answers",
    ),
    "a role that the template doesn't know": (
        [chat(("critic", "hello"), ("assistant", "hi"))],
        (),
        "split train, row 1: the model's chat template refuses a chat of the roles critic",
    ),
    "an answer to nothing": (
        [CHATS[0], chat(("assistant", "hello"), ("user", "hi"))],
        (),
        "split train, row 2: messages has no assistant turn but the first, which answers nothing",
    ),
    "the assistant alone": (
        [chat(("assistant", "hello"))],
        (),
        "split train, row 1: messages has the assistant's turn alone, and nothing that it answers",
    ),
    "a classifier": (
        PAIRS,
        ("model=distilbert",),
        "model=distilbert is for text_classification, and task causal_lm is of task.kind=causal_lm",
    ),
    "another kind's key": (
        PAIRS,
        ("task.labels=[a,b]",),
        "task.labels=['a', 'b'] is only read with task.kind=text_classification",
    ),
    "more than the model has positions for": (
        PAIRS,
        (*ANSWERS, "task.max_length=2040", "task.max_new_tokens=20"),
        "task.max_length=2040 and task.max_new_tokens=20: the model has positions for 2048 tokens, "
        "and these need 2060; lower task.max_length",
    ),
    "a broken pattern": (
        PAIRS,
        (*ANSWERS, "task.answer_pattern='('"),
        "task.answer_pattern='(': not a regular expression",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_rows_and_requests(forgelm: Command, tmp_path: Path, name: str) -> None:
    rows, words, said = WRONG[name]
    done: Result = forgelm(*request(write(tmp_path, rows)), *words)
    assert done.code == 1
    assert said in done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "a", "completion": ""}, "completion is empty"),
        ({"prompt": "a", "completion": None}, "completion is null, and must be text"),
        (
            chat(("critic", "hello"), ("assistant", "hi")),
            "the model's chat template refuses a chat of the roles critic, assistant: ",
        ),
    ],
    ids=["empty", "null", "role"],
)
def test_many_wrong_rows_are_named_in_part(
    forgelm: Command, tmp_path: Path, row: dict[str, Any], said: str
) -> None:
    good = CHATS[0] if "messages" in row else PAIRS[0]
    done = forgelm(*request(write(tmp_path, [good, *[row] * 9])))
    assert done.code == 1
    told = done.err.splitlines()
    for number in range(2, 7):
        assert told[number - 2].startswith(f"forgelm: split train, row {number}: {said}")
    assert told[5:] == ["forgelm: ... and 4 more rows of this kind"]


def test_turns_that_are_not_learnt_are_counted(forgelm: Command, tmp_path: Path) -> None:
    greeted = {"messages": [{"role": "assistant", "content": "Hi"}, *CHATS[0]["messages"]]}
    open_ended = {"messages": [*CHATS[0]["messages"], {"role": "user", "content": "and?"}]}
    rows = write(tmp_path, [*CHATS[:8], greeted, open_ended, {**greeted}])
    done = forgelm(*request(rows))
    assert done.code == 0, done.err
    assert (
        "split train: 2 of 11 chats begin with the assistant; that turn answers nothing and isn't "
        "learnt (row 9, 11)"
    ) in done.out
    assert (
        "split train: 1 of 11 chats go on after the assistant's last turn; what follows it is left "
        "out (row 10)"
    ) in done.out
