"""Text in images: trained, stopped, distilled, evaluated, asked; from every kind of own data."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import Command, Result, interruption, only_run
from PIL import Image
from vision_fixture import TEMPLATE, save_smolvlm

from forgelm.run.files import read_json
from forgelm.tasks.ocr_digits import rows

SMALL = (
    "model.tiny.hidden_size=16",
    "model.tiny.intermediate_size=32",
    "training.per_device_train_batch_size=8",
    "training.logging_steps=1",
    "training.learning_rate=1e-2",
    "training.eval_strategy=no",
    "task.max_new_tokens=6",
    "task.max_length=16",
    "wandb.mode=disabled",
)
EMBEDDED = ("task=ocr_digits", "task.max_train_samples=48", "task.max_eval_samples=12", *SMALL)
LINES = rows("validation")[:10]
# As text this is easily made a number of, or nothing.
TEXTS = ["007", "NA", *(row["text"] for row in LINES[2:])]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An image folder, `train` and `validation` alike."""
    for split in ("train", "validation"):
        place = tmp_path / "lines" / split
        place.mkdir(parents=True)
        for number, row in enumerate(LINES):
            row["image"].save(place / f"{number}.png")
        names = [f"{number}.png" for number in range(len(LINES))]
        write_csv(place / "metadata.csv", names, TEXTS)
    return tmp_path / "lines"


def write_csv(path: Path, names: list[str], texts: list[str]) -> Path:
    with path.open("w", newline="") as file:
        made = csv.writer(file)
        made.writerow(["file_name", "text"])
        made.writerows(zip(names, texts, strict=True))
    return path


def request(data: Path, *words: str) -> list[str]:
    """The words of a short run on an image folder."""
    common = ["train", "task=image_to_text", f"task.dataset={data}", *SMALL, "max_steps=3"]
    return [*common, *words]


def run_of(forgelm: Command, root: Path, *words: str) -> Path:
    """A complete run below an output root of its own."""
    done = forgelm(*words, f"output_root={root}")
    assert done.code == 0, done.err
    return only_run(root)


def scores(run: Path, who: str = "after", name: str = "student") -> dict[str, Any]:
    found: dict[str, Any] = read_json(run / "eval.json")[who][name]["validation"]
    return found


def weights(run: Path) -> bytes:
    return (run / "model.safetensors").read_bytes()


@pytest.fixture
def small(forgelm: Command, tmp_path: Path, folder: Path) -> Path:
    return run_of(forgelm, tmp_path / "small", *request(folder))


@pytest.fixture
def smolvlm(tmp_path: Path) -> Path:
    return save_smolvlm(tmp_path / "smolvlm")


def chatting(model: Path) -> tuple[str, ...]:
    return ("model=custom", "model.name=smolvlm", f"model.path={model}")


def test_the_final_model_reads_what_eval_json_says(forgelm: Command, tmp_path: Path) -> None:
    import jiwer
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    run = run_of(forgelm, tmp_path / "outputs", "train", *EMBEDDED, "epochs=2")
    after = scores(run)
    assert set(after) == {"loss", "cer", "wer", "exact_match"}
    assert after["loss"] < scores(run, "before")["loss"]
    evaluated = forgelm("evaluate", str(run), "--output-format", "json")
    assert json.loads(evaluated.out)["splits"]["validation"] == after
    processor = AutoProcessor.from_pretrained(run)
    model = AutoModelForImageTextToText.from_pretrained(run)
    from forgelm.config.schema import TaskConfig
    from forgelm.tasks.images import load_rows, read

    task = TaskConfig(name="ocr_digits", embedded="ocr_digits", max_eval_samples=12)
    asked = load_rows(task, None).eval["validation"]
    place = tmp_path / "asked"
    place.mkdir()
    said = []
    for number, row in enumerate(asked):
        image = read(row["image"])
        image.save(place / f"{number:02}.png")
        with torch.inference_mode():
            made = model.generate(**processor(image, return_tensors="pt"), max_new_tokens=6)
        said.append(processor.batch_decode(made, skip_special_tokens=True)[0])
    assert after["cer"] == pytest.approx(jiwer.cer(asked["text"][:], said))
    assert after["wer"] == pytest.approx(jiwer.wer(asked["text"][:], said))
    done = forgelm("predict", str(run), "--data", str(place))
    assert done.code == 0, done.err
    lines = (tmp_path / "asked.predictions.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"file_name": f"{number:02}.png", "prediction": text} for number, text in enumerate(said)
    ]


@pytest.mark.parametrize("mode", ["sft", "kd"])
def test_with_distortion_an_interrupted_run_ends_with_the_same_bytes(
    forgelm: Command, tmp_path: Path, folder: Path, small: Path, mode: str
) -> None:
    words = request(folder, "task.augmentation=0.7", "training.record_batches=true")
    if mode == "kd":
        words += ["mode=kd", "teacher=path", f"teacher.path={small}"]
    whole = run_of(forgelm, tmp_path / "whole", *words)
    root = f"output_root={tmp_path / 'parts'}"
    with interruption("training:2:SIGTERM"):
        assert forgelm(*words, root).code == 75
    parts = run_of(forgelm, tmp_path / "parts", *words)
    assert weights(parts) == weights(whole)
    for name in ("batches-0.jsonl", "eval.json"):
        assert (parts / name).read_bytes() == (whole / name).read_bytes()
    plain = run_of(forgelm, tmp_path / "plain", *words, "task.augmentation=0")
    assert weights(plain) != weights(whole)


def test_an_image_folder_and_its_texts_as_they_stand(
    forgelm: Command, tmp_path: Path, folder: Path, small: Path
) -> None:
    """The same rows, however they are given: the same run."""
    (folder / "validation").rename(folder / "val")
    renamed = run_of(forgelm, tmp_path / "val", *request(folder))
    files = [
        f"task.{n}_file={folder / s / 'metadata.csv'}"
        for n, s in (("train", "train"), ("validation", "val"))
    ]
    listed = run_of(
        forgelm, tmp_path / "listed", "train", "task=image_to_text", *files, *SMALL, "max_steps=3"
    )
    parquet = run_of(
        forgelm,
        tmp_path / "parquet",
        "train",
        "task=image_to_text",
        *SMALL,
        "max_steps=3",
        "task.image_column=scan",
        "task.text_column=said",
        *as_parquet(tmp_path, folder / "train"),
    )
    for run in (renamed, listed, parquet):
        assert weights(run) == weights(small)
        assert scores(run) == scores(small)
    done = forgelm("predict", str(small), "--data", str(folder / "train" / "metadata.csv"))
    assert done.code == 0, done.err
    made = (tmp_path / "metadata.predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["text"] for line in made] == TEXTS


def as_parquet(tmp_path: Path, split: Path) -> list[str]:
    from datasets import Dataset, Features, Value
    from datasets import Image as Feature

    images = [{"bytes": (split / f"{n}.png").read_bytes(), "path": None} for n in range(10)]
    columns = {"scan": images, "said": TEXTS}
    features = Features(scan=Feature(), said=Value("string"))
    path = tmp_path / "rows.parquet"
    Dataset.from_dict(columns, features=features).to_parquet(path)
    return [f"task.train_file={path}", f"task.validation_file={path}"]


def test_changed_images_are_refused(forgelm: Command, tmp_path: Path, folder: Path) -> None:
    words = [*request(folder), "run_name=a"]
    assert forgelm(*words).code == 0
    (folder / "train" / "0.png").write_bytes((folder / "train" / "1.png").read_bytes())
    run = only_run(tmp_path / "outputs")
    done = forgelm("evaluate", str(run))
    assert done.code == 1
    assert "the data of task image_to_text changed since" in done.err


def spoil(folder: Path) -> None:
    train = folder / "train"
    for number in range(7):
        (train / f"{number}.png").write_bytes(b"no image")
    (train / "7.png").unlink()
    content = (train / "8.png").read_bytes()
    (train / "8.png").write_bytes(content[: len(content) // 2])
    Image.new("I;16", (64, 16)).save(train / "9.png")
    for number in range(2):
        (folder / "validation" / f"{number}.png").write_bytes(b"")


def test_all_broken_images_are_named_before_training(
    forgelm: Command, tmp_path: Path, folder: Path, small: Path
) -> None:
    spoil(folder)
    done = forgelm(*request(folder))
    assert done.code == 1
    for number, said in (
        (0, "not an image that Pillow can read"),
        (6, "not an image that Pillow can read"),
        (7, "no such file"),
        (8, "image file is truncated"),
        (9, "mode I;16 has more than 8 bits a channel; convert it to 8"),
    ):
        assert f"{folder}/train/{number}.png: {said}" in done.err
    assert "... and 2 more: 12 images that can't be read" in done.err
    assert "Traceback" not in done.err
    assert not list((tmp_path / "outputs").glob("*/*/*/*/checkpoint-*"))
    asked = forgelm("predict", str(small), "--data", str(folder / "validation"))
    assert asked.code == 1
    assert asked.err.count("not an image that Pillow can read") == 2


def without_text(folder: Path) -> None:
    write_csv(folder / "train" / "metadata.csv", ["0.png", "1.png", "2.png"], ["12", "", " "])


def text_that_is_none(folder: Path) -> None:
    (folder / "train" / "metadata.csv").unlink()
    line = json.dumps({"file_name": "0.png", "text": 12})
    (folder / "train" / "metadata.jsonl").write_text(line)


def without_metadata(folder: Path) -> None:
    (folder / "train" / "metadata.csv").unlink()


def another_column(folder: Path) -> None:
    path = folder / "train" / "metadata.csv"
    path.write_text(path.read_text().replace("file_name,text", "file_name,txt"))


def without_file_names(folder: Path) -> None:
    path = folder / "train" / "metadata.csv"
    path.write_text(path.read_text().replace("file_name,text", "file,text"))


def a_blank_file_name(folder: Path) -> None:
    write_csv(folder / "train" / "metadata.csv", ["0.png", "", " "], ["1", "2", "3"])


def a_folder_as_image(folder: Path) -> None:
    write_csv(folder / "train" / "metadata.csv", ["0.png", "."], ["1", "2"])


def without_validation(folder: Path) -> None:
    shutil.rmtree(folder / "validation")


WRONG: dict[str, tuple[Any, tuple[str, ...], str]] = {
    "a text is missing": (without_text, (), "/train/1.png: text is empty"),
    "a text is none": (text_that_is_none, (), "/train/0.png: text 12 isn't text"),
    "no metadata": (
        without_metadata,
        (),
        "split train: {folder} has images but no metadata.csv or metadata.jsonl or "
        "metadata.parquet beside them; write one with the columns file_name and text",
    ),
    "no such column": (
        another_column,
        (),
        "task.text_column=text: split train has no such column, but file_name, txt, image; did you "
        "mean task.text_column=txt?",
    ),
    "no file names": (
        without_file_names,
        (),
        "{folder}/train/metadata.csv: has neither file_name, the column that names images beside "
        "it, nor task.image_column=image, which holds images, but file, text; rename the column",
    ),
    "a blank file name": (
        a_blank_file_name,
        (),
        "{folder}/train/metadata.csv, row 2: file_name is empty\n"
        "forgelm: {folder}/train/metadata.csv, row 3: file_name is empty",
    ),
    "a folder as image": (a_folder_as_image, (), "/train: a folder, and not an image"),
    "no such split": (
        without_validation,
        (),
        "split validation: {folder} has train; see task.train_split and task.validation_splits",
    ),
    "no such image column": (
        EMBEDDED,
        ("task.image_column=images",),
        "task.image_column=images: split train has no such column, but image, text; did you mean",
    ),
    "a column that holds no images": (
        EMBEDDED,
        ("task.image_column=text",),
        "task.image_column=text: in split train it holds Value('string'), and not images",
    ),
    "too many tokens asked for": (
        None,
        ("task.max_new_tokens=600",),
        "task.max_new_tokens=600: the model has positions for 512 tokens, and these need 600; "
        "lower task.max_new_tokens",
    ),
    "lengths of images": (
        None,
        ("training.train_sampling_strategy=group_by_length",),
        "training.train_sampling_strategy=group_by_length: images aren't of different lengths",
    ),
    "another kind's key": (
        None,
        ("task.packing=true",),
        "task.packing=true is only read with task.kind=causal_lm",
    ),
    "a metric of labels": (
        None,
        ("task.metrics=[accuracy]", "task.greater_is_better=true"),
        "task.metrics: accuracy doesn't fit task.kind=image_to_text",
    ),
    "a model of text": (
        None,
        ("model=distilbert",),
        "model=distilbert is for text_classification, and task image_to_text is of",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_data_and_requests(forgelm: Command, folder: Path, name: str) -> None:
    change, words, said = WRONG[name]
    if callable(change):
        change(folder)
    base = ["train", *EMBEDDED] if change is EMBEDDED else request(folder)
    done: Result = forgelm(*base, *words)
    assert done.code == 1
    assert said.format(folder=folder) in done.err
    assert "Traceback" not in done.err


def test_without_the_extra_nothing_begins(
    forgelm: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("PIL", "jiwer"):
        monkeypatch.setitem(sys.modules, module, None)
    done = forgelm("train", *EMBEDDED)
    assert done.code == 1
    for what in ("task.kind=image_to_text", "task.metrics=[cer,exact_match,wer]"):
        assert f"{what} needs the extra ocr: pip install 'forgelm[ocr]'" in done.err


def larger_images(small: Path, folder: Path) -> Path:
    """The model of a run for images twice as high and wide, its patches twice as large."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(small)
    processor = AutoProcessor.from_pretrained(small)
    config = model.config
    config.encoder.image_size, config.encoder.patch_size = (32, 128), (32, 8)
    torch.manual_seed(0)
    made = type(model)(config)
    processor.image_processor.size = {"height": 32, "width": 128}
    made.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_a_teacher_sees_images_through_its_own_processor(
    forgelm: Command, tmp_path: Path, folder: Path, small: Path
) -> None:
    teacher = larger_images(small, tmp_path / "teacher")
    kd = ("mode=kd", "teacher=path", f"teacher.path={teacher}", "mode.alpha=0.5")
    run = run_of(forgelm, tmp_path / "outputs", *request(folder), *kd, "task.augmentation=0.5")
    own = run_of(
        forgelm,
        tmp_path / "own",
        *request(folder),
        "model=custom",
        "model.name=teacher",
        f"model.path={teacher}",
    )
    assert scores(run, "before", "teacher") == pytest.approx(scores(own, "before"), rel=1e-5)


def test_a_published_encoder_decoder(
    forgelm: Command, tmp_path: Path, small: Path, folder: Path
) -> None:
    """TrOCR's say of the decoder alone which tokens begin and end a text, and have no pooler."""
    from safetensors.torch import load_file, save_file

    model = shutil.copytree(small, tmp_path / "published", ignore=shutil.ignore_patterns("*.json?"))
    tensors = load_file(model / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "pooler" not in name}
    assert len(kept) == len(tensors) - 2
    save_file(kept, model / "model.safetensors", {"format": "pt"})
    (model / "generation_config.json").unlink()
    config = json.loads((model / "config.json").read_text())
    marks = ("decoder_start_token_id", "pad_token_id", "eos_token_id", "bos_token_id")
    assert config["decoder"]["decoder_start_token_id"] == 2
    (model / "config.json").write_text(
        json.dumps({key: value for key, value in config.items() if key not in marks})
    )
    words = ("model=custom", "model.name=trocr", f"model.path={model}")
    run = run_of(forgelm, tmp_path / "outputs", *request(folder), *words)
    assert scores(run, "before") == pytest.approx(scores(small), rel=1e-5)
    assert read_json(run / "config.json")["decoder_start_token_id"] == 2


@pytest.mark.parametrize("mode", ["sft", "kd"])
def test_a_model_that_chats(
    forgelm: Command, tmp_path: Path, folder: Path, smolvlm: Path, mode: str
) -> None:
    words = [*request(folder), *chatting(smolvlm), "task.augmentation=0.3"]
    if mode == "kd":
        teacher = save_smolvlm(tmp_path / "teacher", splits=False)
        words += ["mode=kd", "teacher=path", f"teacher.path={teacher}"]
    run = run_of(forgelm, tmp_path / "outputs", *words)
    assert scores(run)["loss"] < scores(run, "before")["loss"]
    evaluated = forgelm("evaluate", str(run), "--output-format", "json")
    assert json.loads(evaluated.out)["splits"]["validation"] == scores(run)
    done = forgelm("predict", str(run), "--data", str(folder / "train"))
    assert done.code == 0, done.err


def test_only_the_answer_of_a_chat_is_learnt(smolvlm: Path) -> None:
    from transformers import AutoProcessor

    from forgelm.models.tokens import IGNORED
    from forgelm.tasks.processors import reader_of

    processor = AutoProcessor.from_pretrained(smolvlm)
    reader = reader_of(processor, "Read.", "the model")
    pictures = [Image.new("RGB", size, "white") for size in ((64, 16), (16, 16))]
    answers = reader.answers(["069", "12345"])
    decode = processor.tokenizer.decode
    assert [decode(ids) for ids in answers] == ["069<end_of_utterance>", "12345<end_of_utterance>"]
    seen = reader.see(pictures)
    learnt, asked = reader.learnt(seen, answers, 8), reader.asked(seen)
    assert learnt["input_ids"].shape == learnt["labels"].shape == learnt["attention_mask"].shape
    assert learnt["labels"].shape[1] % 8 == 0
    for row, answer in enumerate(answers):
        labels = learnt["labels"][row]
        assert labels[labels != IGNORED].tolist() == answer
        read = learnt["input_ids"][row][learnt["attention_mask"][row].bool()].tolist()
        prompt = asked["input_ids"][row][asked["attention_mask"][row].bool()].tolist()
        assert read == prompt + answer
        assert decode(prompt).endswith("Read.<end_of_utterance>\nAssistant:")
    assert asked["attention_mask"][:, -1].all()
    image = processor.tokenizer.convert_tokens_to_ids("<image>")
    counts = (asked["input_ids"] == image).sum(dim=1).tolist()
    assert counts == [12, 20]


REFUSED: dict[str, tuple[dict[str, Any], tuple[str, ...], str]] = {
    "no chat template": (
        {"template": None},
        (),
        "the model: its processor has no chat template, so it can't be given an instruction",
    ),
    "a template that refuses": (
        {"template": "{{ raise_exception('no images') }}"},
        (),
        "the model's chat template refuses a chat of the roles user",
    ),
    "a template that answers otherwise": (
        {"template": TEMPLATE.replace("Assistant:", "Robot:")},
        (),
        "the model's chat template writes an answer otherwise than it asks for one",
    ),
    "a teacher with other marks": (
        {},
        ("mode=kd", "teacher=path"),
        "the teacher writes '007' as the tokens [24, 24, 31, 105] and the student as "
        "[24, 24, 31, 3]",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_do_not_fit(forgelm: Command, tmp_path: Path, folder: Path, name: str) -> None:
    changes, kd, said = REFUSED[name]
    model = save_smolvlm(tmp_path / "model", **changes)
    words = [*kd, f"teacher.path={model}"] if kd else chatting(model)
    done = forgelm(*request(folder), *words)
    assert done.code == 1
    assert said in done.err
    assert "Traceback" not in done.err


def test_a_processor_of_text_alone_is_refused(
    forgelm: Command, tmp_path: Path, folder: Path
) -> None:
    from forgelm.config.schema import Kind
    from forgelm.models import tiny

    model = tmp_path / "llama"
    tiny.reader(Kind.causal_lm).save_pretrained(model)
    (model / "config.json").write_text(json.dumps({"model_type": "llama"}))
    done = forgelm(*request(folder), *chatting(model))
    assert done.code == 1
    assert "and not one of images and text; choose a model that reads text in images" in done.err


def test_a_processor_that_needs_another_package(
    forgelm: Command, folder: Path, smolvlm: Path
) -> None:
    path = smolvlm / "processor_config.json"
    video = {"video_processor_type": "SmolVLMVideoProcessor"}
    changes = {"processor_class": "SmolVLMProcessor", "video_processor": video}
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    done = forgelm(*request(folder), *chatting(smolvlm))
    assert done.code == 1
    assert "it needs a package that isn't installed: SmolVLMVideoProcessor requires" in done.err
