"""`forgelm cache-tasks` against a hub on loopback: what is cached loads elsewhere, offline."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from child import FOREIGN, Child
from conftest import Command, Result
from hub_server import HubServer, Request, Response

from forgelm.prepared import load_prepared, prepared

DATA, OTHER = "org/sums", "org/Other_Sums"
CONFIGS = ("easy", "hard")
METRIC = """
import datasets
import evaluate


class SameText(evaluate.Metric):
    def _info(self):
        value = datasets.Value("string")
        features = datasets.Features({"predictions": value, "references": value})
        return evaluate.MetricInfo(
            description="share of equal texts", citation="", features=features
        )

    def _compute(self, predictions, references):
        equal = [one == other for one, other in zip(predictions, references)]
        return {"same_text": sum(equal) / len(equal)}
"""
COMMON = """
dataset_path: org/sums
training_split: train
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: byte_perplexity}]
"""
TASKS = {
    "sums_easy": "include: common\ntask: sums_easy\ntag: sums_tag\ndataset_name: easy\n",
    "sums_hard": "include: common\ntask: sums_hard\ntag: sums_tag\ndataset_name: hard\n",
    "sums": "group: sums\ntask: [sums_easy, {group: inner, task: [sums_hard]}]\n",
    "sums_other": "include: common\ntask: sums_other\ndataset_path: org/Other_Sums\n",
    "sums_none": "include: common\ntask: sums_none\ndataset_path: org/none\n",
    "half": "group: half\ntask: [sums_none, sums_easy]\n",
    "sums_local": (
        "include: common\ntask: sums_local\ndataset_path: json\n"
        "dataset_kwargs: {data_files: {train: ROWS, test: ROWS}}\n"
    ),
    "sums_scored": (
        "include: common\ntask: sums_scored\ndataset_name: easy\noutput_type: generate_until\n"
        "metric_list: [{metric: same_text, hf_evaluate: true, aggregation: mean, "
        "higher_is_better: true}]\n"
    ),
    "sums_files": (
        "include: common\ntask: sums_files\n"
        "dataset_kwargs: {data_files: {train: hard/train.parquet, test: easy/test.parquet}}\n"
    ),
    "sums_unscored": (
        "include: common\ntask: sums_unscored\ndataset_name: easy\noutput_type: generate_until\n"
        "metric_list: [{metric: no_such, hf_evaluate: true, aggregation: mean, "
        "higher_is_better: true}]\n"
    ),
    "sums_die": "include: common\ntask: sums_die\ncustom_dataset: !function bad.die\n",
    "sums_wait": "include: common\ntask: sums_wait\ncustom_dataset: !function bad.wait\n",
    "sums_package": "include: common\ntask: sums_package\ncustom_dataset: !function bad.lacking\n",
}
BAD = """
import os
import signal
import time
from pathlib import Path


def die(**kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def wait(**kwargs):
    Path(os.environ["WAITS"]).write_text(str(os.getpid()))
    time.sleep(300)


def lacking(**kwargs):
    import no_such_package
"""
ELSEWHERE = """
import socket, sys

def refuse(*_, **__):
    raise OSError("no network")

socket.socket.connect = socket.getaddrinfo = refuse
from lm_eval.tasks import TaskManager

folder, *names = sys.argv[1:]
manager = TaskManager(include_path=folder, include_defaults=False)
for name in names:
    for task in manager.load([name])["tasks"].values():
        print(task.task_name, len(task.dataset["test"]), *task._metric_fn_list)
"""


def rows(config: str, count: int = 8) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table({"text": [f"{config}: {n}+1={n + 1}" for n in range(count)]}), out)
    return out.getvalue()


def repository(**changed: int) -> dict[str, bytes]:
    splits = ("train", "test")
    configs = [
        {
            "config_name": config,
            "data_files": [
                {"split": split, "path": f"{config}/{split}.parquet"} for split in splits
            ],
        }
        for config in CONFIGS
    ]
    files = {"README.md": f"---\nconfigs: {json.dumps(configs)}\n---\n# Sums\n".encode()}
    for config in CONFIGS:
        for split in splits:
            files[f"{config}/{split}.parquet"] = rows(config + split, changed.get(config, 8))
    return {**files, "unused.bin": b"unused"}


@dataclass
class Hub(HubServer):
    """A hub that fails, or changes a byte on the way."""

    down: bool = False
    flip: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        super().__init__()

    def answer(self, request: Request) -> Response:
        if self.down:
            return Response(503, {"Content-Length": "0"})
        given = super().answer(request)
        if request.method == "GET" and request.path in self.flip:
            self.flip.discard(request.path)
            body = b"".join(given.body)
            given.body = [bytes([body[0] ^ 1]), body[1:]]
        return given


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with Hub() as served:
        served.add_repo("dataset", DATA, repository())
        other = {"train.parquet": rows("train"), "test.parquet": rows("test", 4)}
        served.add_repo("dataset", OTHER, other)
        served.add_repo("space", "evaluate-metric/same_text", {"same_text.py": METRIC.encode()})
        yield served


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("definitions")
    (made / "common").write_text(COMMON)
    (made / "bad.py").write_text(BAD)
    (made / "rows.jsonl").write_text('{"text": "1+1=2"}\n')
    for name, text in TASKS.items():
        (made / f"{name}.yaml").write_text(text.replace("ROWS", str(made / "rows.jsonl")))
    return made


@pytest.fixture(scope="module")
def cached(
    hub: Hub, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Result]]:
    """Call `forgelm cache-tasks --include-path FOLDER`; the caches are the same for all."""
    home = tmp_path_factory.mktemp("home")
    child = Child(home, home, hub.url, FORGELM_OPERATOR="tester", FORGELM_HUB_PATIENCE="1")

    def call(*words: str) -> Result:
        return child("cache-tasks", "--include-path", str(folder), *words)

    yield call
    child.close()


def elsewhere(place: Path, folder: Path, home: Path, *names: str) -> list[str]:
    """What lm-eval loads of a cache that was carried to `place`, with no network."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
    named = {
        "HF_HOME": str(home),
        "HF_DATASETS_CACHE": str(place),
        "HF_HUB_CACHE": str(place / "hub"),
        "HF_MODULES_CACHE": str(place / "modules"),
        "HF_EVALUATE_CACHE": str(place / "evaluate"),
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(folder), *names],
        env=kept | named,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "audit_log.jsonl").read_text().splitlines()]


def test_into_a_folder_that_is_carried_elsewhere(
    cached: Callable[..., Result], hub: Hub, folder: Path, tmp_path: Path
) -> None:
    """Tasks, a group, a tag and one with a metric module; what is shared is fetched once."""
    out = tmp_path / "out"
    hub.clear_requests()
    script = "/spaces/evaluate-metric/same_text/resolve/main/same_text.py"
    hub.flip = {script}
    names = "sums_scored, sums,sums_tag,sums_other,,sums_files,sums"
    done = cached("--tasks", names, "--output", str(out), "--audit-dir", str(tmp_path / "audit"))
    assert done.code == 0, done.err
    assert done.out.splitlines() == [
        f"Cached 5 of 5 task(s) under {out}.",
        "  - sums_scored: ok",
        "  - sums: ok",
        "  - sums_tag: ok",
        "  - sums_other: ok",
        "  - sums_files: ok",
    ]
    said = done.err.splitlines()
    assert said[0].startswith(f"warning: --output {out} isn't the cache that training and")
    exports = (
        f"export HF_DATASETS_CACHE={out} HF_HUB_CACHE={out}/hub HF_MODULES_CACHE={out}/modules "
        f"HF_EVALUATE_CACHE={out}/evaluate"
    )
    # Where -q leaves nothing but warnings, all of them are to be set too.
    assert f"{exports} where they run, or leave --output out" in said[0]
    wrong = f"warning: task sums_scored: wrong bytes came for {hub.url}{script}; fetched again"
    assert said.count(wrong) == 1
    assert sum(line.startswith("sums_easy: fetched") for line in said) == 1
    assert said[-1].endswith(exports)
    fetched = [path for method, path in hub.requests if method == "GET" and "/cdn/" in path]
    assert len(fetched) == len(set(fetched)) == 6
    asked, completed = events(tmp_path / "audit")
    assert asked["event"] == "cache.populate_tasks_requested"
    assert completed["event"] == "cache.populate_tasks_completed"
    names = ["sums_scored", "sums", "sums_tag", "sums_other", "sums_files"]
    wanted = {"tasks": names, "cache_dir": str(out)}
    assert {key: asked[key] for key in wanted} == wanted
    assert {key: completed[key] for key in (*wanted, "count")} == {**wanted, "count": 5}
    place = tmp_path / "place"
    shutil.move(out, place)
    loaded = elsewhere(
        place, folder, tmp_path / "home", *(name for name in names if name != "sums_tag")
    )
    assert loaded == [
        "sums_scored 8 same_text",
        "sums_easy 8 byte_perplexity",
        "sums_hard 8 byte_perplexity",
        "sums_other 4 byte_perplexity",
        "sums_files 8 byte_perplexity",
    ]


def commit_of(hub: Hub, repo_id: str) -> str:
    return hub._repos["dataset", repo_id].commits[-1].sha


def test_a_leaf_that_fails_stops_nothing(
    cached: Callable[..., Result], hub: Hub, tmp_path: Path
) -> None:
    """Each row says what is wrong with it; a process that dies and a lacking package too."""
    audit = tmp_path / "audit"
    names = "half,sums_die,sums_package,sums_unscored,sums_easy,sums_local"
    words = ("--tasks", names, "--audit-dir", str(audit), "--output-format", "json", "-q")
    done = cached(*words)
    assert done.code == 2
    told = json.loads(done.out)
    assert list(told) == ["success", "error", "error_class", "tasks", "cache_dir"]
    assert (told["success"], told["error_class"]) == (False, "RunError")
    rows = {row.pop("name"): row for row in told["tasks"]}
    assert list(rows) == names.split(",")
    assert rows["sums_easy"] == rows["sums_local"] == {"cached": True, "error": None}
    lacking = "sums_none: data set org/none: no such repository on the hub, or it is private"
    assert rows["half"]["error"].startswith(lacking)
    assert rows["half"]["error_class"] == "RunError"
    assert "killed by SIGKILL (no memory left, as a rule)" in rows["sums_die"]["error"]
    assert rows["sums_package"]["error_class"] == "ConfigError"
    assert rows["sums_package"]["error"] == (
        "task sums_package needs a package that isn't installed: No module named 'no_such_package'"
    )
    assert rows["sums_unscored"]["error"].startswith("task sums_unscored: FileNotFoundError: ")
    assert "'no_such' doesn't exist on the Hugging Face Hub" in rows["sums_unscored"]["error"]
    failed = events(audit)[-1]
    assert failed["event"] == "cache.populate_tasks_failed"
    assert failed["tasks_completed"] == ["sums_easy", "sums_local"]
    assert failed["error_class"] == "RunError"
    assert failed["error_message"].startswith(lacking)
    cache = Path(told["cache_dir"])
    found = prepared(DATA, "easy", commit_of(hub, DATA), cache)
    assert found is not None
    assert found.parts[-3:] == ("easy", "0.0.0", commit_of(hub, DATA))
    assert prepared(DATA, "easy", "0" * 40, cache) is None
    assert prepared(DATA, "none", commit_of(hub, DATA), cache) is None


def test_a_newer_commit_a_wrong_byte_and_a_dead_hub(
    cached: Callable[..., Result], hub: Hub, tmp_path: Path
) -> None:
    """What is cached is the commit that the hub has now, or it isn't success."""
    out = tmp_path / "out"
    words = ("--output", str(out), "--output-format", "json", "-q", "--tasks")
    old = commit_of(hub, DATA)
    assert cached(*words, "sums_easy").code == 0
    hub.add_repo("dataset", DATA, repository(easy=5))
    new = commit_of(hub, DATA)
    changed = hashlib.sha256(rows("easytest", 5)).hexdigest()
    hub.flip = {f"/cdn/{changed}"}
    assert cached(*words, "sums_easy").code == 0
    assert hub.flip == set()
    blobs = out / "hub" / "datasets--org--sums" / "blobs"
    assert hashlib.sha256((blobs / changed).read_bytes()).hexdigest() == changed
    folders = [prepared(DATA, "easy", commit, out) for commit in (old, new)]
    counts = [len(load_prepared(folder)["test"]) for folder in folders if folder]
    assert counts == [8, 5]
    assert folders[1] is not None
    # Arrow files made of what is wrong are made again.
    arrow = next(folders[1].glob("*test.arrow"))
    arrow.write_bytes(arrow.read_bytes()[:100])
    (blobs / changed).write_bytes(b"x" * (blobs / changed).stat().st_size)
    (blobs / ("0" * 40)).write_bytes(b"left by somebody")
    assert cached(*words, "sums_easy").code == 0
    assert hashlib.sha256((blobs / changed).read_bytes()).hexdigest() == changed
    assert not (blobs / ("0" * 40)).exists()
    assert arrow.stat().st_size > 100
    hub.down = True
    done = cached(*words, "sums_easy")
    hub.down = False
    assert done.code == 2
    (row,) = json.loads(done.out)["tasks"]
    assert row["cached"] is False
    assert row["error"].startswith("sums_easy: data set org/sums: the hub")


def test_ctrl_c(hub: Hub, folder: Path, tmp_path: Path) -> None:
    """The processes end, what landed stays."""
    waits = tmp_path / "waits"
    kept = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
    own = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": hub.url, "WAITS": str(waits)}
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "forgelm", "cache-tasks", "--tasks", "sums_easy,sums_wait"),
            *("--include-path", str(folder)),
        ],
        env=kept | own | {"FORGELM_OPERATOR": "tester"},
        stderr=subprocess.PIPE,
        text=True,
    )
    watchdog = threading.Timer(100, process.kill)
    watchdog.start()
    assert process.stderr is not None
    while not waits.exists() and process.poll() is None:
        line = process.stderr.readline()
        if line.startswith("sums_easy: fetched"):
            break
    while not waits.exists() and process.poll() is None:
        threading.Event().wait(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    watchdog.cancel()
    assert process.returncode == 130
    assert err.splitlines()[-1] == "forgelm: stopped by Ctrl-C"
    with pytest.raises(ProcessLookupError):
        os.kill(int(waits.read_text()), 0)
    assert prepared(DATA, "easy", commit_of(hub, DATA), tmp_path / "datasets") is not None
    last = events(tmp_path / "datasets")[-1]
    assert (last["event"], last["error_class"]) == (
        "cache.populate_tasks_failed",
        "KeyboardInterrupt",
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "the following arguments are required: --tasks; see forgelm cache-tasks --help"),
        (("--tasks", " ,, "), "--tasks ' ,, ': names no task; give some, as hellaswag,arc_easy"),
        (
            ("--tasks", "arc easy,../x"),
            "--tasks: 'arc easy' can't be a task's name, which has no spaces and no slashes; "
            "separate names by commas\n"
            "--tasks: '../x' can't be a task's name, which has no spaces and no slashes; "
            "separate names by commas",
        ),
        (
            ("--tasks", "helaswag,arc_easy,truthfullqa"),
            "--tasks: helaswag: lm-eval has no such task; did you mean hellaswag or {}\n"
            "--tasks: truthfullqa: lm-eval has no such task; did you mean truthfulqa or {}",
        ),
        (
            ("--tasks", "arc_easy", "--include-path", "none"),
            "--include-path none: no such folder",
        ),
        (("--tasks", "arc_easy", "--output", "file"), "cache {}/file: File exists; {}"),
    ],
)
def test_a_wrong_request(
    words: tuple[str, ...],
    said: str,
    forgelm: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    (tmp_path / "file").write_text("")
    done = forgelm("cache-tasks", *words)
    assert done.code == 1
    lines = [line for line in done.err.splitlines() if not line.startswith("warning: --output")]
    for line, wanted in zip(lines, said.splitlines(), strict=True):
        assert line.startswith(f"forgelm: {wanted.partition('{}')[0]}")
    assert done.out == ""
    as_json = json.loads(forgelm("cache-tasks", *words, "--output-format", "json").out)
    assert as_json["success"] is False
    assert as_json["error_class"] == "ConfigError"


def test_lm_eval_has_to_be_installed(forgelm: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    done = forgelm("cache-tasks", "--tasks", "arc_easy")
    assert done.code == 1
    assert done.err.strip() == (
        "forgelm: --tasks arc_easy needs lm-eval, which isn't installed: "
        "pip install 'forgelm[eval]'"
    )
