"""The way to a machine without a network, walked from end to end: cached, packed, carried, checked,
trained and evaluated there; and what is said where something is missing."""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from child import FOREIGN, Child
from glue_fixture import glue_repo
from hub_server import HubServer
from published_fixture import published, published_teacher

from forgelm.run.files import read_json, write_json

STUDENT, TEACHER = "distilbert/distilbert-base-uncased", "FacebookAI/roberta-large-mnli"
WRITER, ADAPTER, BASE = "org/writer", "org/adapter", "org/base"
SIZES = ("task.max_train_samples=16", "task.max_eval_samples=8", "max_steps=2")
QUIET = ("training.logging_steps=1", "training.eval_strategy=no", "wandb.mode=disabled")
SMALL = (*SIZES, *QUIET)
WRITES = (
    *("task=causal_lm", "task.dataset=org/rows", "task.max_length=48", "task.max_new_tokens=4"),
    *("model=custom", f"model.path={WRITER}", "model.name=writer", *QUIET, "max_steps=1"),
)
EXPERIMENTS = {
    "distilled": """
defaults: [{override /task: mnli}, {override /mode: kd}, {override /model: distilbert}]
task: {max_length: 48}
""",
    "tuned": """
defaults: [{override /task: causal_lm}, {override /model: custom}]
task: {dataset: org/rows, max_length: 48}
model: {name: writer, path: org/writer}
eval: {lm_eval: {tasks: [sums], include_path: TASKS}}
""",
    "adapted": """
defaults: [{override /task: causal_lm}, {override /model: custom}]
task: {dataset: org/rows, max_length: 48}
model: {name: adapter, path: org/adapter, lora: {enabled: true}}
""",
}
TAUGHT = """
defaults: [{override /task: causal_lm}, {override /mode: kd}, {override /model: custom}]
task: {dataset: org/rows, max_length: 48, teacher_experiment: tuned}
model: {name: student, path: org/student}
"""
SUMS = """
task: sums
dataset_path: org/sums
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: byte_perplexity}]
"""
ELSEWHERE = """
task: others
dataset_path: org/others
dataset_name: hard
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: byte_perplexity}]
"""
# Torch would take seconds before anything is said.
WITHOUT_TORCH = """
import sys
from forgelm.cli.main import main

code = main(sys.argv[1:])
assert "torch" not in sys.modules
sys.exit(code)
"""


@dataclass(frozen=True)
class Carried:
    """What the connected machine had and said, and the one that all was carried to.

    Attributes:
        commits: those that were cached as main.
        later: those that came to the hub after them.
        said: by the command that cached.
    """

    commits: dict[str, str]
    later: dict[str, str]
    said: dict[str, Any]
    bundle: Path
    home: Path
    work: Path
    url: str
    child: Child

    @property
    def sweep(self) -> list[str]:
        return swept(self.work)

    def run(self, experiment: str) -> Path:
        """The directory of a run of the sweep."""
        at = {"distilled": "mnli/distilbert/kd", "tuned": "causal_lm/writer/sft"}
        place = at.get(experiment, "causal_lm/adapter/sft")
        (found,) = self.work.glob(f"outputs/{place}/*/run_metadata.json")
        return found.parent


def at(model: str, data: str) -> tuple[str, str]:
    return f"model.revision={model}", f"task.revision={data}"


def swept(work: Path) -> list[str]:
    words = ["--config-dir", str(work / "own"), f"experiment={','.join(EXPERIMENTS)}"]
    return ["-m", *words, *SMALL]


def table(rows: Sequence[dict[str, str]]) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows)), out)
    return out.getvalue()


def pairs(count: int) -> dict[str, bytes]:
    """A data set of sums, with so many to train on."""
    rows = [{"prompt": f"{n}+1=", "completion": str(n + 1)} for n in range(count)]
    return {"train.parquet": table(rows), "validation.parquet": table(rows[:4])}


def adapter(base: str) -> dict[str, bytes]:
    """An adapter as peft writes one, of a model on the hub."""
    import tempfile

    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for name, content in published("HuggingFaceTB/SmolLM2-135M").items():
            (place / name).write_bytes(content)
        model = AutoModelForCausalLM.from_pretrained(place)
        settings = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
        made = get_peft_model(model, settings)
        made.peft_config["default"].base_model_name_or_path = base
        made.save_pretrained(place / "made", save_embedding_layers=False)
        return {path.name: path.read_bytes() for path in (place / "made").iterdir()}


def definitions(work: Path) -> None:
    """Own experiments, and own tasks of lm-eval."""
    for name, text in {"sums": SUMS, "others": ELSEWHERE}.items():
        path = work / "tasks" / f"{name}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    written = {f"own/experiment/{name}": text for name, text in EXPERIMENTS.items()}
    written |= {"taught/experiment/taught": TAUGHT, "taught/experiment/tuned": EXPERIMENTS["tuned"]}
    for name, text in written.items():
        path = work / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# @package _global_{text}".replace("TASKS", str(work / "tasks")))


@pytest.fixture(scope="module")
def carried(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Carried]:
    """All that a sweep needs, cached on one machine and carried to another; the hub is gone."""
    there, here, work = (tmp_path_factory.mktemp(name) for name in ("there", "here", "work"))
    definitions(work)
    bundle = work / "all.tar"
    words = published("HuggingFaceTB/SmolLM2-135M")
    with HubServer(page_size=3) as server:
        commits = {
            STUDENT: server.add_repo("model", STUDENT, published(STUDENT)),
            TEACHER: server.add_repo("model", TEACHER, published_teacher("mnli")),
            "nyu-mll/glue": server.add_repo("dataset", "nyu-mll/glue", glue_repo()),
            WRITER: server.add_repo("model", WRITER, words),
            BASE: server.add_repo("model", BASE, words),
            ADAPTER: server.add_repo("model", ADAPTER, adapter(BASE)),
            "org/rows": server.add_repo("dataset", "org/rows", pairs(8)),
        }
        texts = [{"text": f"{n}+{n}={n + n}"} for n in range(4)]
        commits["org/sums"] = server.add_repo("dataset", "org/sums", {"test.parquet": table(texts)})
        server.add_repo("model", "org/lonely", adapter("org/far"))
        online = Child(work, there, server.url)
        cached = online("cache", *swept(work), "--output-format", "json", "-q")
        assert cached.code == 0, cached.err
        later = {
            WRITER: server.add_repo("model", WRITER, words, message="later"),
            "org/rows": server.add_repo("dataset", "org/rows", pairs(12)),
        }
        for command in (
            ("cache", *WRITES, *at(commits[WRITER], later["org/rows"])),
            ("cache-models", "--model", "org/lonely"),
            ("bundle", "--output", str(bundle)),
        ):
            done = online(*command, "-q")
            assert done.code == 0, done.err
        online.close()
    child = Child(work, here, server.url, offline=True, cut_off=True)
    done = child("import", str(bundle), "-q")
    assert done.code == 0, done.err
    said = json.loads(cached.out)
    yield Carried(commits, later, said, bundle, here, work, server.url, child)
    child.close()


def test_the_default_run_asks_nobody(carried: Carried) -> None:
    """W&B, which is offline by default, included."""
    done = carried.child("train", "max_steps=2", "task.max_eval_samples=32", "output_root=plain")
    assert done.code == 0, done.err
    assert list((carried.work / "plain").rglob("offline-run-*"))
    assert carried.child.asked == []


def test_a_run_that_isnt_there_needs_something_else(carried: Carried) -> None:
    refused = carried.child("cache", "resume=nosuch")
    assert refused.code == 1
    assert "nosuch" in refused.err


@pytest.fixture(scope="module")
def trained(carried: Carried) -> Carried:
    """The sweep, trained on the machine that it was carried to."""
    done = carried.child(*carried.sweep)
    assert done.code == 0, done.err
    return carried


def test_a_sweep_s_needs_are_cached_each_once(carried: Carried) -> None:
    rows = [(row["role"], row["name"], row["commit"]) for row in carried.said["needs"]]
    at = carried.commits
    assert rows == [
        ("model", STUDENT, at[STUDENT]),
        ("teacher", TEACHER, at[TEACHER]),
        ("model", WRITER, at[WRITER]),
        ("model", ADAPTER, at[ADAPTER]),
        ("model's base", BASE, at[BASE]),
        ("data set", "nyu-mll/glue, mnli", at["nyu-mll/glue"]),
        ("data set", "org/rows", at["org/rows"]),
        ("lm-eval task", "sums", None),
    ]


def test_doctor_loads_it_all_where_it_was_carried(carried: Carried) -> None:
    words = ("doctor", "--offline", *carried.sweep, "--output-format", "json", "-q")
    done = carried.child(*words)
    rows = json.loads(done.out)["checks"]
    assert done.code == 0, rows
    parts = {row["name"].split(": ")[-1]: row for row in rows if row["name"].startswith("run: ")}
    assert set(parts) >= {"tokenizer", "teacher's tokenizer", "data", "teacher", "lm-eval tasks"}
    assert {row["status"] for row in parts.values()} == {"ok"}
    assert carried.child.asked == []


def test_runs_train_from_the_commits_that_were_cached(trained: Carried) -> None:
    at, later = trained.commits, trained.later
    revisions = {
        name: read_json(trained.run(name) / "run_metadata.json")["revisions"]
        for name in EXPERIMENTS
    }
    assert revisions == {
        "distilled": {"model": at[STUDENT], "dataset": at["nyu-mll/glue"], "teacher": at[TEACHER]},
        "tuned": {"model": at[WRITER], "dataset": at["org/rows"]},
        "adapted": {"model": at[ADAPTER], "base": at[BASE], "dataset": at["org/rows"]},
    }
    assert set(at.values()).isdisjoint(later.values())
    noted = read_json(trained.run("tuned") / "run_metadata.json")["lm_eval_commits"]
    assert noted == {"sums": [trained.commits["org/sums"]]}
    found = read_json(trained.run("tuned") / "eval.json")
    measured = [found[when]["student"]["lm_eval"]["sums"] for when in ("before", "after")]
    assert measured[1]["byte_perplexity"] < measured[0]["byte_perplexity"]
    assert "teacher" in read_json(trained.run("distilled") / "eval.json")["before"]
    assert (trained.run("adapted") / "adapter_model.safetensors").is_file()
    assert trained.child.asked == []


def test_other_data_of_a_benchmark_are_told(trained: Carried, tmp_path: Path) -> None:
    """lm-eval takes what is there: no commit can be asked of it."""
    now, before = trained.commits["org/sums"], "0" * 40
    run = shutil.copytree(trained.run("tuned"), tmp_path / "outputs/causal_lm/writer/sft/copy")
    metadata = read_json(run / "run_metadata.json")
    write_json(run / "run_metadata.json", metadata | {"lm_eval_commits": {"sums": [before]}})
    done = trained.child("resume", str(run), "max_steps=3")
    assert done.code == 0, done.err
    assert (
        f"lm-eval task sums: its data are at commit {now} now, and were at {before}; what was "
        "measured before is kept"
    ) in done.out
    assert read_json(run / "run_metadata.json")["lm_eval_commits"] == {"sums": [before, now]}


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_a_run_is_evaluated_there(trained: Carried, experiment: str) -> None:
    run = trained.run(experiment)
    done = trained.child("evaluate", str(run), "--output-format", "json")
    assert done.code == 0, done.err
    said = json.loads(done.out)
    after = read_json(run / "eval.json")["after"]["student"]
    assert {**said["splits"], **{k: said[k] for k in ("lm_eval",) if k in said}} == after
    assert trained.child.asked == []


@pytest.mark.parametrize("last", ["cached as main", "later"])
def test_of_two_commits_prepared_the_pinned_one_is_taken(carried: Carried, last: str) -> None:
    """Whichever of them `datasets` would take, as it was changed last."""
    now, later = carried.commits["org/rows"], carried.later["org/rows"]
    for place, commit in enumerate((now, later) if last == "later" else (later, now)):
        (folder,) = (carried.home / "datasets").glob(f"org___rows/*/*/{commit}")
        os.utime(folder, (10**9 + place, 10**9 + place))
    for commit, asked, count in ((now, (), 8), (later, (f"task.revision={later}",), 12)):
        root = carried.work / f"{last}-{count}"
        done = carried.child(*WRITES, *asked, f"output_root={root}")
        assert done.code == 0, done.err
        (metadata,) = root.glob("*/*/*/*/run_metadata.json")
        assert read_json(metadata)["revisions"]["dataset"] == commit
        assert f"train {count}, " in done.out
    assert carried.child.asked == []


def flip(path: Path, place: int) -> None:
    """Change one byte, and no time."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(place)
        found = file.read(1)
        file.seek(place)
        file.write(bytes([found[0] ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_prepared_data_that_nobody_may_lock(carried: Carried, tmp_path: Path) -> None:
    """A cache that somebody else filled, for many."""
    place = str(carried.home / "datasets")
    bound = subprocess.run(["mount", "--bind", place, place], capture_output=True)
    if bound.returncode:
        pytest.skip("only root may mount")
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", place], check=True)
        done = carried.child(*WRITES, f"output_root={tmp_path}/out")
    finally:
        subprocess.run(["umount", place], check=True)
    assert done.code == 1, done.err
    assert done.err.strip() == (
        f"forgelm: data set org/rows: {place} can't be written to, and `datasets` locks what it "
        "reads: copy it to a place of yours, and set HF_DATASETS_CACHE to that"
    )


def test_a_flipped_byte_is_found_in_the_cache(carried: Carried) -> None:
    folder = carried.home / "hub" / "models--org--writer"
    weights = folder / "snapshots" / carried.commits[WRITER] / "model.safetensors"
    flip(weights.resolve(), weights.stat().st_size // 2)
    try:
        done = carried.child("doctor", "--offline", "--deep", "--output-format", "json", "-q")
    finally:
        flip(weights.resolve(), weights.stat().st_size // 2)
    assert done.code == 1
    (bad,) = (row for row in json.loads(done.out)["checks"] if row["status"] == "fail")
    assert bad["name"] == f"model {WRITER}"
    at = carried.commits[WRITER]
    assert bad["detail"].startswith(f"commit {at[:12]}: model.safetensors: other bytes than")
    # Not by a name, which the hub may have moved on to another.
    again = f"forgelm cache-models --model {WRITER}@{at}"
    assert bad["remedy"] == f"rm {weights.resolve()} && {again}"
    whole = carried.child("doctor", "--offline", "--deep", "-q")
    assert whole.code == 0, whole.out


def test_a_flipped_byte_is_found_in_the_bundle(carried: Carried, tmp_path: Path) -> None:
    assert carried.child("verify", str(carried.bundle), "-q").code == 0
    with tarfile.open(carried.bundle) as archive:
        weights = next(
            member
            for member in archive
            if member.isfile() and "models--org--writer/blobs" in member.name and member.size > 9999
        )
    place = weights.offset_data + weights.size // 2
    flip(carried.bundle, place)
    try:
        done = carried.child("verify", str(carried.bundle), "-q")
        refused = carried.child("import", str(carried.bundle), "--output", str(tmp_path), "-q")
    finally:
        flip(carried.bundle, place)
    for said in (done, refused):
        assert said.code == 2
        assert weights.name in said.err
    assert not list(tmp_path.glob("hub/models--*"))


def told(carried: Carried, *words: str, home: Path | None = None) -> tuple[int, list[str]]:
    """What is said without torch, in a process of its own: exit code and lines."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
    own = {"HF_HOME": str(home or carried.home), "HF_HUB_OFFLINE": "1", "HF_ENDPOINT": carried.url}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *words],
        cwd=carried.work,
        env=kept | own,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stderr.splitlines()


def test_all_that_is_missing_is_said_before_torch(carried: Carried) -> None:
    hub, datasets = carried.home / "hub", carried.home / "datasets"
    lonely = [
        *("task=causal_lm", "task.dataset=org/none", "task.dataset_config=easy"),
        *("model=custom", "model.path=org/lonely", "mode=kd"),
        *("teacher=path", "teacher.path=org/large", "teacher.revision=v2"),
        *(f"eval.lm_eval.include_path={carried.work}/tasks", "eval.lm_eval.tasks=[sums,others]"),
        "output_root=lonely",
    ]
    assert told(carried, *lonely) == (
        2,
        [
            f"forgelm: model's base org/far: not in the cache {hub}",
            f"forgelm: teacher org/large@v2: not in the cache {hub}",
            f"forgelm: data set org/none, easy: not in the cache {hub}",
            f"forgelm: lm-eval task others: data set org/others, hard: not prepared in {datasets}",
            "forgelm: HF_HUB_OFFLINE is set here; where there is a network: "
            f"forgelm cache {shlex.join(lonely)}",
        ],
    )
    assert not (carried.work / "lonely").exists()


def test_a_sweep_says_it_of_all_points_at_once(carried: Carried) -> None:
    """Each thing once, with the one command that fetches it all, own configs included."""
    later = carried.later[WRITER]
    words = ["-m", "--config-dir", "own", "experiment=tuned", f"model.revision={later}"]
    words += ["task.dataset=org/rows,org/none", "seed=1,2", "output_root=bare"]
    hub = carried.home / "hub"
    assert told(carried, *words) == (
        2,
        [
            f"forgelm: model {WRITER}@{later}: not in the cache {hub}",
            f"forgelm: data set org/none: not in the cache {hub}",
            "forgelm: HF_HUB_OFFLINE is set here; where there is a network: "
            f"forgelm cache {shlex.join(words)}",
        ],
    )
    assert not (carried.work / "bare").exists()


def test_what_a_begun_run_lacks_is_asked_for_at_its_commits(
    trained: Carried, tmp_path: Path
) -> None:
    """That of its adapter's base too, which no override says; from the configs it was made of."""
    run, at = trained.run("adapted"), trained.commits
    shutil.copytree(trained.home / "hub", tmp_path / "hub", symlinks=True)
    for name in ("models--org--base", "datasets--org--rows"):
        shutil.rmtree(tmp_path / "hub" / name)
    fetch = ["--config-dir", str(trained.work / "own"), *SMALL, "experiment=adapted"]
    code, lines = told(trained, "resume", str(run), "max_steps=3", home=tmp_path)
    assert code == 2
    assert lines[:-1] == [
        f"forgelm: model's base {BASE}@{at[BASE]}: not in the cache {tmp_path}/hub",
        f"forgelm: data set org/rows at {at['org/rows'][:12]}: not prepared in {tmp_path}/datasets",
    ]
    first, second = lines[-1].partition("network: ")[2].split(" && ")
    pins = [f"model.revision={at[ADAPTER]}", f"task.revision={at['org/rows']}"]
    assert sorted(shlex.split(first)) == sorted(["forgelm", "cache", *fetch, *pins])
    assert second == f"forgelm cache-models --model {BASE}@{at[BASE]}"


def test_sealed_runs_and_untrained_teachers_are_cached_for(
    trained: Carried, tmp_path: Path
) -> None:
    """A run at the commits that it was begun with, its teacher's run with all that it needs."""
    taught = ["--config-dir", str(trained.work / "taught"), "experiment=taught"]
    taught += ["output_root=taught", *SMALL]
    code, lines = told(trained, *taught, home=tmp_path)
    assert code == 2
    assert [line.partition(": not ")[0] for line in lines[:-1]] == [
        "forgelm: model org/student",
        "forgelm: data set org/rows",
        f"forgelm: model {WRITER}",
        "forgelm: lm-eval task sums: data set org/sums",
    ]
    assert lines[-1].endswith(f"forgelm cache {shlex.join(taught)}")
    (teacher,) = (trained.work / "taught").glob("*/writer/*/*/config.yaml")
    words = published("HuggingFaceTB/SmolLM2-135M")
    with HubServer() as server:
        for repo in (WRITER, BASE, "org/student"):
            server.add_repo("model", repo, words)
        begun = {BASE: trained.commits[BASE]}
        server.add_repo("model", BASE, {**words, "more": b""}, message="later")
        (kept,) = (trained.home / "hub" / "models--org--adapter" / "snapshots").iterdir()
        same = {path.name: path.read_bytes() for path in kept.iterdir()}
        assert server.add_repo("model", ADAPTER, same) == trained.commits[ADAPTER]
        server.add_repo("dataset", "org/rows", pairs(8))
        server.add_repo("dataset", "org/sums", {"test.parquet": table([{"text": "1+1=2"}])})
        online = Child(trained.work, tmp_path, server.url)
        again = online("cache", f"resume={trained.run('adapted')}", "--output-format", "json")
        own = [*taught, "teacher=run", f"teacher.run={teacher.parent}"]
        student = online("cache", *own, "--output-format", "json")
        online.close()
    (base,) = (row for row in json.loads(again.out)["needs"] if row["role"] == "model's base")
    assert base["commit"] == begun[BASE], again.err
    rows = [(row["role"], row["name"]) for row in json.loads(student.out)["needs"]]
    assert rows == [
        ("model", "org/student"),
        ("model", WRITER),
        ("data set", "org/rows"),
        ("lm-eval task", "sums"),
    ]
