"""Miniature repositories for the test Hub: GLUE's data sets and a tiny BERT classifier.

The sentences are made up. Schemas, split names and label names are those of ``nyu-mll/glue``.
With the same library versions the files are the same to the byte.
"""

from __future__ import annotations

import io
import json
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from safetensors.numpy import save
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

SPLIT_ROWS = {"train": 64, "validation": 32, "test": 16}
SPLITS = ("train", "validation", "test")
MNLI_SPLITS = (
    "train",
    "validation_matched",
    "validation_mismatched",
    "test_matched",
    "test_mismatched",
)

_PAIR = ("sentence1", "sentence2")
_ANIMALS = ["bear", "cat", "crow", "dog", "goat", "hare", "hen", "horse", "mouse", "otter", "toad"]
_PLACES = ["barn", "field", "garden", "kitchen", "meadow", "orchard", "yard"]


@dataclass(frozen=True)
class Task:
    """One GLUE task; ``templates`` holds, for each label in turn, one template per text column.

    A task without label names has scores: the index of the template, plus a fraction. The labels
    of a hidden test split are -1; in the real repository MRPC's alone are public.
    """

    columns: tuple[str, ...]
    labels: tuple[str, ...] | None
    templates: tuple[tuple[str, ...], ...]
    splits: tuple[str, ...] = SPLITS
    hidden_test: bool = True


_SLEEPS = "the {animal} sleeps in the {place} ."
_ASLEEP = "in the {place} the {animal} is asleep ."
_WHERE = "where does the {animal} of the {place} sleep ?"

TASKS: dict[str, Task] = {
    "cola": Task(
        ("sentence",),
        ("unacceptable", "acceptable"),
        (("{animal} the sleeps {place} in the .",), (_SLEEPS,)),
    ),
    "sst2": Task(
        ("sentence",),
        ("negative", "positive"),
        (
            ("a dull and weary film about a {animal} in a {place} .",),
            ("a bright and lovely film about a {animal} in a {place} .",),
        ),
    ),
    "mrpc": Task(
        _PAIR,
        ("not_equivalent", "equivalent"),
        ((_SLEEPS, "a train left the {place} at noon ."), (_SLEEPS, _ASLEEP)),
        hidden_test=False,
    ),
    "stsb": Task(
        _PAIR,
        None,
        (
            (_SLEEPS, "prices rose on monday ."),
            (_SLEEPS, "rain fell on the {place} ."),
            (_SLEEPS, "a farmer works in the {place} ."),
            (_SLEEPS, "the {animal} eats in the {place} ."),
            (_SLEEPS, "the {animal} rests near the {place} ."),
            (_SLEEPS, _ASLEEP),
        ),
    ),
    "qqp": Task(
        ("question1", "question2"),
        ("not_duplicate", "duplicate"),
        (
            (_WHERE, "how deep is the well near the {place} ?"),
            (_WHERE, "which bed does the {animal} of the {place} use ?"),
        ),
    ),
    "mnli": Task(
        ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        (
            (_SLEEPS, "surely the {animal} is at rest ."),
            (_SLEEPS, "perhaps the {animal} had a long day ."),
            (_SLEEPS, "never has the {animal} closed its eyes ."),
        ),
        MNLI_SPLITS,
    ),
    "qnli": Task(
        ("question", "sentence"),
        ("entailment", "not_entailment"),
        ((_WHERE, "it sleeps on a heap of straw ."), (_WHERE, "the weather stayed mild .")),
    ),
    "rte": Task(
        _PAIR,
        ("entailment", "not_entailment"),
        ((_SLEEPS, "the {animal} is at rest ."), (_SLEEPS, "a wolf chased the {animal} .")),
    ),
    "wnli": Task(
        _PAIR,
        ("not_entailment", "entailment"),
        (
            ("the {animal} left the {place} as it was crowded .", "the {animal} was crowded ."),
            ("the {animal} left the {place} as it was crowded .", "the {place} was crowded ."),
        ),
    ),
}


def glue_repo() -> dict[str, bytes]:
    """Return the files of a small ``nyu-mll/glue``: nine tasks as parquet, and the README."""
    files: dict[str, bytes] = {}
    infos, configs = [], []
    for name, task in TASKS.items():
        splits = []
        for split, table in _tables(task):
            path = f"{name}/{split}-00000-of-00001.parquet"
            files[path] = _parquet(table)
            splits.append(
                {"name": split, "num_bytes": table.nbytes, "num_examples": table.num_rows}
            )
        infos.append(_info(name, task, splits, _size(files, f"{name}/")))
        data_files = [{"split": split, "path": f"{name}/{split}-*"} for split in task.splits]
        configs.append({"config_name": name, "data_files": data_files})
    header = yaml.safe_dump({"dataset_info": infos, "configs": configs}, sort_keys=False)
    files["README.md"] = f"---\n{header}---\n\n# A miniature GLUE with made-up rows\n".encode()
    return files


def model_repo(
    num_labels: int = 2,
    label_names: Sequence[str] | None = None,
    *,
    head: bool = True,
    seed: int = 0,
    hidden: int = 32,
    layers: int = 2,
    positions: int = 64,
) -> dict[str, bytes]:
    """Return the files of a tiny BERT whose vocabulary covers ``glue_repo``.

    ``label_names`` become ``id2label``; without them the labels are ``LABEL_0`` and so on. With
    ``head=False`` it is a base checkpoint, to which loading for classification adds a new head.
    Another ``seed`` gives other weights.
    """
    names = list(label_names or (f"LABEL_{index}" for index in range(num_labels)))
    if len(names) != num_labels:
        raise ValueError(f"{num_labels} labels need as many names, not {len(names)}")
    vocabulary = _vocabulary()
    config: dict[str, Any] = {
        "architectures": ["BertForSequenceClassification" if head else "BertModel"],
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "max_position_embeddings": positions,
        "model_type": "bert",
        "num_attention_heads": 2,
        "num_hidden_layers": layers,
        "pad_token_id": 0,
        "type_vocab_size": 2,
        "vocab_size": len(vocabulary),
    }
    if head:
        config["id2label"] = {str(index): name for index, name in enumerate(names)}
        config["label2id"] = {name: index for index, name in enumerate(names)}
    tokenizer_config = {
        "do_lower_case": True,
        "model_max_length": config["max_position_embeddings"],
        "tokenizer_class": "BertTokenizer",
    } | {f"{name}_token": f"[{name.upper()}]" for name in ("unk", "sep", "pad", "cls", "mask")}
    weights = dict(_weights(config, num_labels if head else 0, seed))
    return {
        "config.json": json.dumps(config, indent=2).encode(),
        "model.safetensors": save(weights, metadata={"format": "pt"}),
        "tokenizer.json": _tokenizer(vocabulary).to_str(pretty=True).encode(),
        "tokenizer_config.json": json.dumps(tokenizer_config, indent=2).encode(),
    }


def _tables(task: Task) -> Iterator[tuple[str, pa.Table]]:
    offset = 0
    for split in task.splits:
        base = split.partition("_")[0]
        rows = SPLIT_ROWS[base]
        yield split, _table(task, range(offset, offset + rows), base == "test" and task.hidden_test)
        offset += rows


def _table(task: Task, numbers: range, hidden: bool) -> pa.Table:
    """Build the rows of these numbers; no two numbers below 154 give the same sentences."""
    texts: list[list[str]] = [[] for _ in task.columns]
    labels: list[float] = []
    for number in numbers:
        label = number % len(task.templates)
        words = {
            "animal": _ANIMALS[number % len(_ANIMALS)],
            "place": _PLACES[number % len(_PLACES)],
        }
        for column, template in zip(texts, task.templates[label], strict=True):
            column.append(template.format(**words))
        fraction = 0.0 if task.labels else number % 4 / 5
        labels.append(-1 if hidden else min(len(task.templates) - 1, label + fraction))
    label_type = pa.int64() if task.labels else pa.float32()
    arrays = [pa.array(column, pa.string()) for column in texts]
    arrays += [pa.array(labels).cast(label_type), pa.array(range(len(numbers)), pa.int32())]
    return pa.table(arrays, names=[*task.columns, "label", "idx"])


def _parquet(table: pa.Table) -> bytes:
    stream = io.BytesIO()
    pq.write_table(table, stream)
    return stream.getvalue()


def _size(files: dict[str, bytes], prefix: str) -> int:
    return sum(len(content) for path, content in files.items() if path.startswith(prefix))


def _info(name: str, task: Task, splits: list[dict[str, Any]], download: int) -> dict[str, Any]:
    label: Any = "float32"
    if task.labels:
        label = {"class_label": {"names": {str(i): text for i, text in enumerate(task.labels)}}}
    features = [{"name": column, "dtype": "string"} for column in task.columns]
    features += [{"name": "label", "dtype": label}, {"name": "idx", "dtype": "int32"}]
    return {
        "config_name": name,
        "features": features,
        "splits": splits,
        "download_size": download,
        "dataset_size": sum(split["num_bytes"] for split in splits),
    }


def _vocabulary() -> dict[str, int]:
    """Number the special tokens, every word of the tasks, and letters to spell other words."""
    templates = [text for task in TASKS.values() for label in task.templates for text in label]
    words = set(" ".join(templates).split()) - {"{animal}", "{place}"} | {*_ANIMALS, *_PLACES}
    letters = string.ascii_lowercase + string.digits
    spelling = {*letters, *string.punctuation, *(f"##{letter}" for letter in letters)}
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    return {token: index for index, token in enumerate(special + sorted(words | spelling))}


def _tokenizer(vocabulary: dict[str, int]) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = [(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=special
    )
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    return tokenizer


def _weights(config: dict[str, Any], labels: int, seed: int) -> Iterator[tuple[str, np.ndarray]]:
    """Yield BERT's parameters, without the ``bert.`` prefix when there is no classifier."""
    random = np.random.default_rng(seed)
    for name, shape in _shapes(config):
        yield (f"bert.{name}" if labels else name), _initial(name, shape, random)
    if labels:
        for name, shape in _linear("classifier", config["hidden_size"], labels):
            yield name, _initial(name, shape, random)


def _initial(name: str, shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
    if name.endswith("bias"):
        return np.zeros(shape, np.float32)
    if "LayerNorm" in name:
        return np.ones(shape, np.float32)
    return random.normal(0.0, 0.05, shape).astype(np.float32)


def _shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    yield "embeddings.word_embeddings.weight", (config["vocab_size"], hidden)
    yield "embeddings.position_embeddings.weight", (config["max_position_embeddings"], hidden)
    yield "embeddings.token_type_embeddings.weight", (config["type_vocab_size"], hidden)
    yield from _norm("embeddings.LayerNorm", hidden)
    for index in range(config["num_hidden_layers"]):
        layer = f"encoder.layer.{index}"
        for part in ("query", "key", "value"):
            yield from _linear(f"{layer}.attention.self.{part}", hidden, hidden)
        yield from _linear(f"{layer}.attention.output.dense", hidden, hidden)
        yield from _norm(f"{layer}.attention.output.LayerNorm", hidden)
        yield from _linear(f"{layer}.intermediate.dense", hidden, wide)
        yield from _linear(f"{layer}.output.dense", wide, hidden)
        yield from _norm(f"{layer}.output.LayerNorm", hidden)
    yield from _linear("pooler.dense", hidden, hidden)


def _linear(name: str, inputs: int, outputs: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (outputs, inputs)
    yield f"{name}.bias", (outputs,)


def _norm(name: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)
