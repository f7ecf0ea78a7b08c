"""Small stand-ins for well-known repositories, under their ids: models, and lm-eval's data sets."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hub_server import HubServer

Rows = list[dict[str, Any]]

ROW_COUNT = 4
MODELS = {
    "Qwen/Qwen2.5-7B-Instruct": False,
    "meta-llama/Llama-3.2-3B": True,
    "meta-llama/Llama-3.2-3B-Instruct": True,
    "meta-llama/Llama-Guard-3-8B": True,
}
"""Ids, and whether access is gated."""


def serve_models(hub: HubServer) -> None:
    for number, (repo_id, gated) in enumerate(MODELS.items()):
        hub.add_repo("model", repo_id, _model(repo_id, number + 1), gated=gated)


def serve_lm_eval(hub: HubServer) -> None:
    """The data of hellaswag, arc_easy, truthfulqa and mmlu: a few rows of each configuration."""
    for repo_id, configs in {
        "Rowan/hellaswag": {"default": (("train", "validation", "test"), _hellaswag())},
        "allenai/ai2_arc": {"ARC-Easy": (("train", "validation", "test"), _arc())},
        "truthfulqa/truthful_qa": {
            "generation": (("validation",), _truthful_generation()),
            "multiple_choice": (("validation",), _truthful_choice()),
        },
        "cais/mmlu": {name: (("test", "validation", "dev"), _mmlu(name)) for name in _subjects()},
    }.items():
        hub.add_repo("dataset", repo_id, _data_set(configs))


def _model(repo_id: str, number: int) -> dict[str, bytes]:
    """A model of one tensor, `number` times half a MiB."""
    weights = bytes(range(256)) * 2048 * number
    tensor = {"dtype": "F32", "shape": [len(weights) // 4], "data_offsets": [0, len(weights)]}
    header = json.dumps({"weight": tensor}).encode()
    return {
        "README.md": f"---\nlicense: other\n---\n# A stand-in for {repo_id}\n".encode(),
        "config.json": json.dumps({"model_type": "llama", "_name_or_path": repo_id}).encode(),
        "model.safetensors": len(header).to_bytes(8, "little") + header + weights,
        "tokenizer.json": b"{}",
    }


def _data_set(configs: Mapping[str, tuple[tuple[str, ...], Rows]]) -> dict[str, bytes]:
    """Parquet files, and the card that says of which of them a configuration is made."""
    files, listed = {}, []
    for config, (splits, rows) in configs.items():
        paths = {split: f"{config}/{split}-00000-of-00001.parquet" for split in splits}
        files.update(dict.fromkeys(paths.values(), _parquet(rows)))
        data_files = [{"split": split, "path": path} for split, path in paths.items()]
        listed.append({"config_name": config, "data_files": data_files})
    card = f"---\nconfigs: {json.dumps(listed)}\n---\n# A stand-in with made-up rows\n"
    return {"README.md": card.encode(), **files}


def _parquet(rows: Rows) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), out)
    return out.getvalue()


def _hellaswag() -> Rows:
    return [
        {
            "ind": number,
            "activity_label": "Adding",
            "ctx_a": f"A child adds {number} and 1.",
            "ctx_b": "the child",
            "ctx": f"A child adds {number} and 1. the child",
            "endings": [f"says {number + 1 + wrong}." for wrong in range(4)],
            "source_id": f"made~{number}",
            "split": "made",
            "split_type": "indomain",
            "label": "0",
        }
        for number in range(ROW_COUNT)
    ]


def _arc() -> Rows:
    return [
        {
            "id": str(number),
            "question": f"How much is {number} and 1?",
            "choices": {
                "text": [str(number + 1 + wrong) for wrong in range(4)],
                "label": ["A", "B", "C", "D"],
            },
            "answerKey": "A",
        }
        for number in range(ROW_COUNT)
    ]


def _truthful_generation() -> Rows:
    return [
        {
            "type": "Adversarial",
            "category": "Sums",
            "question": f"How much is {number} and 1?",
            "best_answer": f"It is {number + 1}",
            "correct_answers": [f"It is {number + 1}", str(number + 1)],
            "incorrect_answers": [f"It is {number}", "Nobody knows"],
            "source": "made up",
        }
        for number in range(ROW_COUNT)
    ]


def _truthful_choice() -> Rows:
    return [
        {
            "question": f"How much is {number} and 1?",
            "mc1_targets": {"choices": [str(number + 1), str(number)], "labels": [1, 0]},
            "mc2_targets": {
                "choices": [str(number + 1), f"It is {number + 1}", str(number)],
                "labels": [1, 1, 0],
            },
        }
        for number in range(ROW_COUNT)
    ]


def _mmlu(subject: str) -> Rows:
    return [
        {
            "question": f"How much is {number} and 1?",
            "subject": subject,
            "choices": [str(number + 1 + wrong) for wrong in range(4)],
            "answer": 0,
        }
        for number in range(ROW_COUNT)
    ]


def _subjects() -> list[str]:
    """MMLU's subjects, as lm-eval's definitions name them."""
    import lm_eval

    folder = Path(lm_eval.__path__[0]) / "tasks" / "mmlu" / "default"
    return sorted(path.stem.removeprefix("mmlu_") for path in folder.glob("mmlu_*.yaml"))
