"""Every hub id that forgelm ships, through the Hub's protocol into a machine without a network."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from child import Child
from glue_fixture import glue_repo
from hub_server import HubServer
from published_fixture import (
    data_sets,
    is_gated,
    one_of_each,
    published,
    published_teacher,
    shipped,
    teachers,
)

TOKEN = "hf_" + "opens" * 6
SMALL = ("task.max_train_samples=8", "task.max_eval_samples=4", "wandb.mode=disabled")
SWEEPS = {
    "text_classification": ("task=mnli", "task.max_length=32"),
    "causal_lm": ("task=causal_lm", "task.max_length=64", "ROWS"),
    "seq2seq": ("task=seq2seq", "task.max_length=32", "ROWS"),
    "image_to_text": ("task=ocr_digits", "task.max_length=16"),
}
TEACHERS = ("mode=kd", "model=bert_tiny", "task.max_length=32", f"task={','.join(teachers())}")


@dataclass(frozen=True)
class Machines:
    """A hub, a machine that reaches it with and without a token, and one with the same caches that
    is cut off."""

    server: HubServer
    commits: dict[str, str]
    stranger: Child
    known: Child
    offline: Child
    home: Path
    rows: Path

    def words(self, kind: str, names: Sequence[str]) -> list[str]:
        """A sweep over models that suit a kind of task."""
        files = (f"task.train_file={self.rows}", f"task.validation_file={self.rows}")
        asked = [word for word in SWEEPS[kind] if word != "ROWS"]
        asked += files if "ROWS" in SWEEPS[kind] else ()
        return ["-m", *asked, *SMALL, f"model={','.join(names)}"]


def of_kind(kind: str) -> list[str]:
    return [name for name, config in shipped().items() if kind in config["suits"]]


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    home, folder = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("work")
    rows = folder / "rows.jsonl"
    pairs = [{"prompt": f"{n}+1=", "completion": str(n + 1)} for n in range(8)]
    rows.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    with HubServer(token=TOKEN, page_size=3) as server:
        commits = {}
        for config in shipped().values():
            repo_id = config["path"]
            commits[repo_id] = server.add_repo(
                "model", repo_id, published(repo_id), gated=is_gated(repo_id)
            )
        for task, repo_id in teachers().items():
            commits[repo_id] = server.add_repo("model", repo_id, published_teacher(task))
        assert data_sets() == {"nyu-mll/glue"}
        server.add_repo("dataset", "nyu-mll/glue", glue_repo())
        children = (
            Child(folder, home, server.url),
            Child(folder, home, server.url, HF_TOKEN=TOKEN),
            Child(folder, home, server.url, offline=True, cut_off=True),
        )
        yield Machines(server, commits, *children, home, rows)
        for child in children:
            child.close()


def cached(machines: Machines, *words: str) -> dict[str, Any]:
    done = machines.known("cache", *words, "--output-format", "json", "-q")
    assert done.code == 0, done.err
    found: dict[str, Any] = json.loads(done.out)
    return found


def loaded(machines: Machines, *words: str) -> list[str]:
    """The parts of runs that a machine without a network loads: all, and asking nobody."""
    machines.server.clear_requests()
    done = machines.offline("doctor", "--offline", *words, "--output-format", "json", "-q")
    rows = json.loads(done.out)["checks"]
    parts = [row for row in rows if row["name"].startswith("run: ")]
    assert [row for row in parts if row["status"] != "ok"] == []
    assert done.code == 0, [row for row in rows if row["status"] not in ("ok", "info")]
    assert machines.offline.asked == []
    assert machines.server.requests == []
    return [row["detail"] for row in parts]


def test_all_gates_are_named_at_once(machines: Machines) -> None:
    """Without a token what is open lands, and every closed page is said; nothing of it is kept."""
    done = machines.stranger(
        "cache", *machines.words("causal_lm", of_kind("causal_lm")), "--output-format", "json", "-q"
    )
    assert done.code == 2
    said = json.loads(done.out)
    models = {shipped()[name]["path"] for name in of_kind("causal_lm")}
    closed = {repo_id for repo_id in models if is_gated(repo_id)}
    assert len(closed) >= 4
    rows = {row["name"]: row for row in said["needs"]}
    assert set(rows) == models
    assert {name for name, row in rows.items() if "error" in row} == closed
    for repo_id in closed:
        line = (
            f"model {repo_id}: access is gated; ask for it at {machines.server.url}/{repo_id}, "
            "then set HF_TOKEN: no token was sent"
        )
        assert rows[repo_id]["error"] == line
        assert line in said["error"]
        assert not (machines.home / "hub" / f"models--{repo_id.replace('/', '--')}").exists()


@pytest.mark.parametrize("kind", SWEEPS)
def test_every_model_loads_and_trains_where_it_was_cached(machines: Machines, kind: str) -> None:
    words = machines.words(kind, of_kind(kind))
    ids = [shipped()[name]["path"] for name in of_kind(kind)]
    found = {row["name"]: row["commit"] for row in cached(machines, *words)["needs"]}
    assert found.items() >= {repo_id: machines.commits[repo_id] for repo_id in ids}.items()
    details = "\n".join(loaded(machines, *words))
    for repo_id in ids:
        # Its tokenizer or processor, and the model.
        assert details.count(f"{repo_id} at {machines.commits[repo_id][:12]}") == 2
    names = one_of_each(of_kind(kind))
    short = ("max_steps=1", "eval.before_training=false", f"output_root={kind}")
    done = machines.offline(*machines.words(kind, names), *short)
    assert done.code == 0, done.err
    assert len([*(machines.rows.parent / kind).glob("*/*/*/*/eval.json")]) == len(names)
    assert machines.offline.asked == []


def test_every_task_s_data_and_teacher_load_where_they_were_cached(machines: Machines) -> None:
    words = ("-m", *TEACHERS, *SMALL)
    needs = cached(machines, *words)["needs"]
    prepared = {row["name"] for row in needs if row["kind"] == "dataset"}
    assert prepared == {f"nyu-mll/glue, {task}" for task in teachers()}
    details = "\n".join(loaded(machines, *words))
    for repo_id in teachers().values():
        assert details.count(f"{repo_id} at {machines.commits[repo_id][:12]}") == 2


def test_every_shipped_model_is_covered() -> None:
    assert {kind for config in shipped().values() for kind in config["suits"]} == set(SWEEPS)
