"""`forgelm doctor`: real caches, damaged in every way; runs loaded without a network."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from child import Child
from conftest import Command, Result
from glue_fixture import glue_repo, model_repo
from hub_server import HubServer

import forgelm as package
from forgelm.airgap.environment import OURS, troubles

TOKEN = "hf_" + "opens" * 6
LABELS = ("contradiction", "neutral", "entailment")
TEACHER = "FacebookAI/roberta-large-mnli"
RUN = ("mode=kd", "task=mnli", "model=custom", "model.path=org/tiny", "task.max_length=64")
ADAPTER = {
    "adapter_config.json": json.dumps(
        {"peft_type": "LORA", "base_model_name_or_path": "org/base"}
    ).encode(),
    "adapter_model.safetensors": b"weights",
}
TOKENIZER = {name: data for name, data in model_repo(2).items() if "token" in name}


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with HubServer(token=TOKEN) as server:
        server.add_repo("model", "org/tiny", model_repo(3, LABELS))
        server.add_repo("model", "org/tokenizer", TOKENIZER)
        server.add_repo("model", "org/adapter", ADAPTER)
        server.add_repo("model", TEACHER, model_repo(3, LABELS, seed=4))
        server.add_repo("dataset", "nyu-mll/glue", glue_repo())
        yield server


@dataclass(frozen=True)
class Home:
    """Caches filled by the commands of a process, and what that process said."""

    folder: Path
    child: Child
    said: Result


@pytest.fixture(scope="module")
def home(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    folder = tmp_path_factory.mktemp("home")
    child = Child(folder, folder, hub.url, PATH="/usr/bin:/bin")
    cached = child("cache-models", "--model", "org/tiny", "--model", TEACHER)
    assert cached.code == 0, cached.err
    yield Home(folder, child, child("doctor", *RUN, "--output-format", "json"))
    child.close()


Doctor = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def doctor(forgelm: Command, home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Doctor:
    """The rows that `doctor --offline` has for things of the given names, in copied caches."""
    for name in [name for name in os.environ if name.startswith("FORGELM_")]:
        monkeypatch.delenv(name)
    for name in ("hub", "datasets"):
        shutil.copytree(home.folder / name, tmp_path / "home" / name, symlinks=True)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", "/nowhere")

    def call(start: str, *words: str) -> list[dict[str, Any]]:
        done = forgelm("doctor", "--offline", "--output-format", "json", *words)
        said = json.loads(done.out)
        bad = {row["status"] for row in said["checks"]} & {"fail", "crash"}
        assert done.code == (2 if "crash" in bad else 1 if bad else 0)
        assert said["success"] is not bool(bad)
        return [row for row in said["checks"] if row["name"].startswith(start)]

    return call


@pytest.fixture
def repo(doctor: Doctor, tmp_path: Path) -> Path:
    return tmp_path / "home" / "hub" / "models--org--tiny"


def snapshot(repo: Path) -> Path:
    return repo / "snapshots" / (repo / "refs" / "main").read_text()


def weights(repo: Path) -> Path:
    return (snapshot(repo) / "model.safetensors").resolve()


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def flip_unseen(path: Path) -> None:
    before = path.stat()
    flip(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def unverified(repo: Path, tree: bool = True) -> None:
    (repo / ".forgelm.json").unlink()
    if not tree:
        shutil.rmtree(repo / "trees")


def without_weights(repo: Path) -> None:
    weights(repo).unlink()
    (snapshot(repo) / "model.safetensors").unlink()


def without_name(repo: Path) -> None:
    (repo / "refs" / "main").unlink()
    unverified(repo)


def a_part_lost(repo: Path) -> None:
    unverified(repo, tree=False)
    parts = {"a": "model.safetensors", "b": "model-2.safetensors"}
    index = snapshot(repo) / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": parts}))


def shared_lost(repo: Path) -> None:
    blob = weights(repo)
    blob.unlink()
    blob.symlink_to("../../blobs/ab/abcd")


CACHE_IT = "forgelm cache-models --model org/tiny@[0-9a-f]{40}"
DAMAGES: dict[str, tuple[Callable[[Path], object], str, str, str]] = {
    "dangling": (
        lambda r: weights(r).unlink(),
        "fail",
        "model.safetensors is no content: the links lead nowhere",
        CACHE_IT,
    ),
    "shared blobs lost": (shared_lost, "fail", "hub/blobs, where several repositories'", CACHE_IT),
    "missing": (
        lambda r: (snapshot(r) / "config.json").unlink(),
        "fail",
        "config.json is missing",
        CACHE_IT,
    ),
    "cut": (
        lambda r: os.truncate(weights(r), 1000),
        "fail",
        "model.safetensors (1000 bytes and not ",
        f"rm .*/blobs/[0-9a-f]{{64}} && {CACHE_IT}",
    ),
    "flipped": (
        lambda r: flip(weights(r)),
        "fail",
        "model.safetensors: other bytes than the hub's hash promises",
        f"rm .*/blobs/[0-9a-f]{{64}} && {CACHE_IT}",
    ),
    "cut off": (
        lambda r: (r / "blobs" / "0a1b.12345678.incomplete").write_bytes(b"part"),
        "warn",
        "1 download (0.0 MiB) cut off, or going on just now",
        "forgelm cache-models --model org/tiny@main, which goes on with them; or rm ",
    ),
    "unused": (
        lambda r: (r / "blobs" / ("0" * 40)).write_bytes(b"old"),
        "warn",
        "1 blob (0.0 MiB) that no snapshot has",
        "rm .*/blobs/0{40}",
    ),
    "name of nothing": (
        lambda r: (r / "refs" / "v1").write_text("0" * 40),
        "fail",
        "v1 stands for commit 000000000000, of which nothing is here",
        CACHE_IT,
    ),
    "without a name": (
        without_name,
        "warn",
        "no name stands for it",
        f"{CACHE_IT}, or remove it: rm -r ",
    ),
    "never verified": (unverified, "warn", "wasn't cached by forgelm", CACHE_IT),
    "no weights": (
        lambda r: (unverified(r), without_weights(r)),
        "fail",
        "its weights aren't here",
        CACHE_IT,
    ),
    "no weights, no list": (
        lambda r: (unverified(r, tree=False), without_weights(r)),
        "warn",
        "has no weights; fine if that wasn't wanted",
        CACHE_IT,
    ),
    "a part lost": (
        a_part_lost,
        "fail",
        "lacks model-2.safetensors, which model.safetensors.index.json names",
        CACHE_IT,
    ),
    "empty": (
        lambda r: (
            unverified(r, tree=False),
            [path.unlink() for path in snapshot(r).iterdir()],
        ),
        "fail",
        "its folder is empty",
        CACHE_IT,
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_what_is_wrong_with_a_repository(name: str, doctor: Doctor, repo: Path) -> None:
    damage, status, detail, remedy = DAMAGES[name]
    damage(repo)
    rows = doctor("model org/tiny")
    (found,) = [row for row in rows if detail in row["detail"]]
    assert found["status"] == status
    assert re.search(remedy, found["remedy"])


def test_what_changed_on_the_disk_is_found_by_hashing_all(doctor: Doctor, repo: Path) -> None:
    flip_unseen(weights(repo))
    assert [row["status"] for row in doctor("model org/tiny")] == ["ok"]
    (found,) = doctor("model org/tiny", "--deep")
    assert (found["status"], "other bytes" in found["detail"]) == ("fail", True)


def test_hashing_all_stands_for_a_record(doctor: Doctor, repo: Path) -> None:
    unverified(repo)
    (found,) = doctor("model org/tiny", "--deep")
    assert (found["status"], found["detail"]) == ("ok", "1 commit(s), main; all bytes hashed")


def test_not_everything_is_a_model_with_weights(doctor: Doctor, home: Home, repo: Path) -> None:
    names = ("org/tokenizer", "org/adapter")
    words = [word for name in names for word in ("--model", name)]
    assert home.child("cache-models", *words, "--output", str(repo.parent)).code == 0
    (found,) = doctor("model org/tokenizer")
    assert found["status"] == "ok"
    (found,) = doctor("model org/adapter")
    assert found["status"] == "warn"
    assert found["detail"] == "is an adapter, and its base org/base isn't in this cache"
    assert found["remedy"] == "forgelm cache-models --model org/base@main"


def info(folder: Path) -> Path:
    (found,) = (folder / "nyu-mll___glue" / "mnli").rglob("dataset_info.json")
    return found


def arrow(folder: Path) -> Path:
    return info(folder).parent / "glue-train.arrow"


def one_row_more(folder: Path) -> None:
    said = json.loads(info(folder).read_text())
    said["splits"]["train"]["num_examples"] += 1
    info(folder).write_text(json.dumps(said))


def encoded(folder: Path) -> Path:
    return next((folder / "forgelm").rglob("data-*.arrow"))


SETS: dict[str, tuple[Callable[[Path], object], str, str, str]] = {
    "info missing": (lambda f: info(f).unlink(), "fail", "dataset_info.json is missing", "rm -r"),
    "info cut": (lambda f: os.truncate(info(f), 20), "fail", "dataset_info.json is damaged", "rm"),
    "arrow missing": (
        lambda f: arrow(f).unlink(),
        "fail",
        "split train: 0 of its 1 files are here",
        "forgelm cache OVERRIDES",
    ),
    "arrow cut": (
        lambda f: os.truncate(arrow(f), arrow(f).stat().st_size // 2),
        "fail",
        "split train: glue-train.arrow: can't be read",
        "forgelm cache OVERRIDES",
    ),
    "rows": (one_row_more, "fail", "split train: 64 rows, and it must have 65", "rm -r"),
    "cut off": (
        lambda f: info(f).parent.rename(info(f).parent.with_suffix(".incomplete")),
        "warn",
        "its preparation was cut off, or goes on just now",
        "rm -r",
    ),
    "encoded": (
        lambda f: os.truncate(encoded(f), 100),
        "fail",
        "can't be read",
        "the next run makes it again",
    ),
}


@pytest.mark.parametrize("name", SETS)
def test_what_is_wrong_with_a_data_set(name: str, doctor: Doctor, tmp_path: Path) -> None:
    damage, status, detail, remedy = SETS[name]
    damage(tmp_path / "home" / "datasets")
    rows = doctor("encoded rows" if name == "encoded" else "data set nyu-mll/glue (mnli)")
    (found,) = [row for row in rows if detail in row["detail"]]
    assert (found["status"], remedy in found["remedy"]) == (status, True)


def test_whole_caches_are_said_to_be_so(doctor: Doctor) -> None:
    rows = {row["name"]: row for row in doctor("")}
    assert rows["model org/tiny"]["detail"] == "1 commit(s), main; verified"
    assert "train: 64 rows" in rows["data set nyu-mll/glue (mnli)"]["detail"]
    assert [name for name, row in rows.items() if row["status"] in ("fail", "crash")] == []


def test_a_check_that_crashes_stops_no_other(doctor: Doctor, repo: Path) -> None:
    (repo / "refs" / "main").write_bytes(b"\xff\xfe")
    rows = doctor("")
    (found,) = [row for row in rows if row["status"] == "crash"]
    assert found["name"] == "model org/tiny"
    assert found["detail"].startswith("UnicodeDecodeError")
    assert {"ok"} == {row["status"] for row in rows if row["name"] == f"model {TEACHER}"}


def test_nothing_cached_is_no_failure(
    forgelm: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "/nowhere")
    done = forgelm("doctor", "--offline")
    assert done.code == 0, done.out
    lines = done.out.splitlines()
    assert any(re.match(r"warn   hub cache +\S+/hub holds nothing", line) for line in lines)
    assert any(
        re.match(r" +-> forgelm cache OVERRIDES, or forgelm cache-m", line) for line in lines
    )
    assert re.fullmatch(r"\d+ checks: \d+ ok, \d+ info, \d+ warn", lines[-1])
    assert "\x1b" not in done.out


def test_the_shape_of_the_document(home: Home) -> None:
    done = home.child("doctor", "--output-format=json")
    assert done.code == 0, done.out
    said = json.loads(done.out)
    assert list(said) == ["success", "checks", "summary"]
    assert all(list(row) == ["name", "status", "detail", "remedy"] for row in said["checks"])
    assert list(said["summary"]) == ["ok", "info", "warn", "fail", "crash"]
    assert sum(said["summary"].values()) == len(said["checks"])
    names = [row["name"] for row in said["checks"]]
    for name in ("python", "packages", "extras", "torch", "devices", "hub", "token", "wandb"):
        assert name in names


def test_a_run_is_loaded_with_the_environment_as_it_is(home: Home) -> None:
    assert home.said.code == 0, home.said.out + home.said.err
    rows = {row["name"]: row for row in json.loads(home.said.out)["checks"]}
    parts = ["tokenizer", "teacher's tokenizer", "data", "student", "teacher"]
    assert [name for name in rows if name.startswith("run: ")] == [f"run: {p}" for p in parts]
    assert rows["run: data"]["detail"] == "64 rows to train on, 64 to evaluate on"
    assert f"{TEACHER} at " in rows["run: teacher"]["detail"]


def test_a_teacher_to_come_has_its_own_run_looked_at(home: Home) -> None:
    done = home.child(
        "doctor", "--offline", "--output-format=json", "-m", "mode=sft,kd", "seed=1,2"
    )
    said = json.loads(done.out)
    assert done.code == 0, done.out
    names = [row["name"] for row in said["checks"] if row["name"].startswith("run: ")]
    parts = ("tokenizer", "data", "student")
    assert names == [
        *(f"run: mode=sft seed=1: {part}" for part in parts),
        *(f"run: mode=kd seed=1: teacher's run: {part}" for part in parts),
        *(f"run: mode=kd seed=1: {part}" for part in parts),
    ]
    assert not (home.folder / "outputs").exists()


def test_a_run_that_is_all_here_is_loaded_without_a_network(home: Home, hub: HubServer) -> None:
    hub.clear_requests()
    done = home.child("doctor", "--offline", *RUN)
    assert done.code == 0, done.out + done.err
    assert [line[:4] for line in done.out.splitlines() if "run: " in line] == ["ok  "] * 5
    assert hub.requests == []


def test_all_that_a_run_lacks_is_said_at_once(home: Home, hub: HubServer, tmp_path: Path) -> None:
    shutil.copytree(home.folder / "hub", tmp_path / "hub", symlinks=True)
    weights(tmp_path / "hub" / "models--org--tiny").unlink()
    shutil.rmtree(tmp_path / "hub" / "datasets--nyu-mll--glue")
    child = Child(tmp_path, tmp_path, hub.url, PATH="/usr/bin:/bin")
    hub.clear_requests()
    done = child("doctor", *RUN, "--offline", "--output-format=json")
    child.close()
    assert (done.code, hub.requests) == (1, [])
    said = json.loads(done.out)
    assert said["success"] is False
    assert said["error_class"] == "ConfigError"
    rows = {row["name"]: row for row in said["checks"] if row["name"].startswith("run: ")}
    assert {name: row["status"] for name, row in rows.items()} == {
        "run: tokenizer": "ok",
        "run: teacher's tokenizer": "ok",
        "run: data": "fail",
        "run: student": "fail",
        "run: teacher": "info",
    }
    assert "nyu-mll/glue@main: not in the cache" in rows["run: data"]["detail"]
    remedy = f"forgelm cache {' '.join(RUN)}, on a machine with a network"
    assert rows["run: student"]["remedy"] == remedy


CONFIG = json.loads(model_repo(3, LABELS)["config.json"])
BROKEN: dict[str, tuple[dict[str, bytes | None], str]] = {
    "no tokenizer": (
        dict.fromkeys(TOKENIZER),
        "it has no tokenizer's files: fetch it again, or choose another",
    ),
    "a damaged tokenizer": ({"tokenizer.json": b"{}"}, "is of no kind that transformers "),
    "no weights": ({"model.safetensors": None}, "it has no weights that can be read (model.safe"),
    "a damaged config": ({"config.json": b"{"}, "its config.json isn't JSON any more: fetch it"),
    "an unknown kind": (
        {"config.json": json.dumps({**CONFIG, "model_type": "zzz"}).encode()},
        "is of no kind that transformers ",
    ),
    "own code": (
        {"config.json": json.dumps({"auto_map": {"AutoConfig": "a.A"}}).encode()},
        "it needs code of its own repository: look at that, and set trust_remote_code=true",
    ),
}


def broken(folder: Path) -> str:
    """Runs that begin with models in which something is wrong, as values of a sweep."""
    for name, (changes, _) in BROKEN.items():
        place = folder / name.replace(" ", "-")
        place.mkdir(parents=True)
        for file, content in {**model_repo(3, LABELS), **changes}.items():
            if content is not None:
                (place / file).write_bytes(content)
    return ",".join(str(folder / name.replace(" ", "-")) for name in BROKEN)


def test_what_transformers_cant_use_is_told_in_a_line_of_ours(
    forgelm: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    paths = broken(tmp_path / "models")
    words = ("-m", "task=nli_mini", "model=custom", f"model.path={paths}")
    done = forgelm("doctor", "--offline", *words, "--output-format=json")
    rows = [row for row in json.loads(done.out)["checks"] if row["name"].startswith("run: ")]
    said: dict[str, list[str]] = {}
    for row in rows:
        if row["status"] != "ok":
            (name,) = re.findall(r"/models/([a-z-]+)", row["name"])
            said.setdefault(name.replace("-", " "), []).append(row["detail"])
    assert list(said) == list(BROKEN)
    for name, (_, text) in BROKEN.items():
        assert any(text in line for line in said[name]), said[name]
        assert not any("\n" in line or "Error" in line for line in said[name]), said[name]


def test_a_controller_that_is_down_is_told_in_whole_words(
    forgelm: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which("scontrol") is None:
        pytest.skip("Slurm isn't installed")
    lines = ("ClusterName=none", "SlurmctldHost=localhost", "SlurmctldPort=1", "NodeName=localhost")
    auth = ("AuthType=auth/none", "CredType=cred/none")
    (tmp_path / "slurm.conf").write_text("\n".join((*lines, *auth, "")))
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    done = forgelm("doctor", "--offline", "--output-format", "json")
    (row,) = (row for row in json.loads(done.out)["checks"] if row["name"] == "slurm")
    assert row["status"] == "warn"
    said = r"the controller doesn't answer: Slurmctld\(primary\) at \S+ is DOWN"
    assert re.fullmatch(said, row["detail"])


REACHING = """
import urllib.request

def rows(**kwargs):
    import datasets
    try:
        urllib.request.urlopen("http://127.0.0.1:9/", timeout=1)
    except OSError as error:
        assert "there is no network here" in str(error), error
    return {"test": datasets.Dataset.from_list([{"text": "one"}])}
"""
TASK = """
task: reaching
custom_dataset: !function reaching.rows
output_type: generate_until
test_split: test
doc_to_text: text
doc_to_target: text
metric_list: [{metric: exact_match}]
"""


def test_sockets_are_blocked_and_who_tries_is_named(
    forgelm: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "reaching.py").write_text(REACHING)
    (tmp_path / "tasks" / "reaching.yaml").write_text(TASK)
    monkeypatch.setenv("PATH", "/nowhere")
    lm_eval = ("eval.lm_eval.tasks=[reaching]", "eval.lm_eval.include_path=tasks")
    done = forgelm("doctor", "task=arithmetic", "--offline", *lm_eval, "--output-format=json")
    rows = {row["name"]: row for row in json.loads(done.out)["checks"]}
    assert rows["run: student"]["status"] == "ok", done.out
    found = rows["run: lm-eval tasks"]
    assert found["status"] == "warn", found
    assert found["detail"] == "reaching; yet it tried to reach 127.0.0.1"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["mode=kdd"], "mode=kdd: no such mode; one of kd, rl, sft; did you mean mode=kd?"),
        (["--offline", "training.lr=1"], "training.lr=1: no such key; did you mean"),
        (["--deep"], "--deep goes with --offline"),
        (["--ofline"], "unrecognized arguments: --ofline"),
    ],
)
def test_wrong_requests_are_refused_as_by_train(
    words: list[str], said: str, forgelm: Command
) -> None:
    done = forgelm("doctor", *words)
    assert (done.code, done.out) == (1, "")
    assert said in done.err


@pytest.mark.parametrize(
    ("token", "status", "said"),
    [
        (TOKEN, "ok", "that of HF_TOKEN is accepted, as user"),
        ("hf_" + "wrong" * 6, "fail", "that of HF_TOKEN isn't accepted"),
    ],
)
def test_the_token_is_tried_and_never_shown(
    token: str, status: str, said: str, hub: HubServer, tmp_path: Path
) -> None:
    child = Child(tmp_path, tmp_path, hub.url, HF_TOKEN=token, PATH="/nowhere")
    hub.clear_requests()
    done = child("doctor", "--output-format", "json")
    child.close()
    rows = {row["name"]: row for row in json.loads(done.out)["checks"]}
    assert rows["hub"]["detail"] == f"{hub.url} answers"
    assert (rows["token"]["status"], rows["token"]["detail"]) == (status, said)
    assert done.code == (0 if status == "ok" else 1)
    assert token not in done.out + done.err
    assert len(hub.requests) == 1


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("doctor --offline", 1),
        ("bundle --output x.tar", 1),
        ("train model=custom model.path=org/tiny task=mnli", 1),
    ],
)
def test_a_cache_of_another_user_is_said_in_a_line(words: str, code: int) -> None:
    setpriv = shutil.which("setpriv")
    if os.geteuid() != 0 or setpriv is None:
        pytest.skip("nobody but root may become another user")
    as_nobody = [setpriv, "--reuid=65534", "--regid=65534", "--clear-groups"]
    with tempfile.TemporaryDirectory() as top:
        home, work = Path(top) / "home", Path(top) / "work"
        (home / "hub" / "models--org--tiny").mkdir(parents=True)
        work.mkdir()
        for folder, mode in ((Path(top), 0o755), (work, 0o777), (home, 0o700)):
            folder.chmod(mode)
        done = subprocess.run(
            [*as_nobody, sys.executable, "-m", "forgelm", *words.split()],
            capture_output=True,
            text=True,
            cwd=work,
            env={"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "HOME": top, "PATH": "/nowhere"}
            | {"PYTHONPATH": str(Path(package.__file__).parents[1])},
        )
    said = f"{home}: belongs to root, and nobody can't read it"
    assert (done.returncode, done.stdout.count("crash")) == (code, 0), done.stdout + done.stderr
    assert said in done.stdout + done.stderr
    assert f"chmod -R a+rX {home}" in done.stdout + done.stderr
    assert "PermissionError" not in done.stdout + done.stderr


def test_a_hub_that_cant_be_reached(tmp_path: Path) -> None:
    child = Child(tmp_path, tmp_path, "http://127.0.0.1:9", PATH="/nowhere")
    done = child("doctor")
    child.close()
    assert done.code == 1
    assert re.search(r"fail   hub +http://127.0.0.1:9 can't be reached: ", done.out)
    assert "-> check the network, proxies and HF_ENDPOINT" in done.out


@pytest.mark.parametrize(
    ("variables", "problem", "remedy"),
    [
        ({"TRANSFORMERS_OFFLINE": "1", "HF_HUB_OFFLINE": "0"}, "has no effect", "unset TRANS"),
        ({"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "0"}, "told to be offline", "unset HF_DA"),
        ({"HF_DATASETS_OFFLINE": "1"}, "told to be online", "unset HF_DATASETS_OFFLINE"),
        ({"TRANSFORMERS_CACHE": "/c"}, "isn't read any more", "export HF_HUB_CACHE instead"),
        ({"HUGGINGFACE_HUB_CACHE": "/c"}, "the old name of", "export HF_HUB_CACHE=/c"),
        ({"HF_HOME": "/", "HF_HUB_CACHE": "/c", "HUGGINGFACE_HUB_CACHE": "/d"}, "goes before", ""),
        ({"HF_HOME": "/usr", "HF_HUB_CACHE": "/tmp"}, "isn't below HF_HOME=/usr", "carry and set"),
        ({"HF_HOME": "cache"}, "HF_HOME=cache is relative", "export HF_HOME=/"),
        ({"HF_HUB_CACHE": "/dev/null"}, "/dev/null isn't a folder", "give a folder"),
        ({"FORGELM_CACHE_DIR": "/c"}, "is no variable of forgelm", "export HF_HUB_CACHE and HF_D"),
        ({"FORGELM_OPERATER": "me"}, "is no variable of forgelm", "FORGELM_OPERATOR was meant?"),
        ({"HF_DATASET_CACHE": "/c"}, "HF_DATASETS_CACHE is", "export HF_DATASETS_CACHE"),
    ],
)
def test_variables_that_dont_do_what_they_seem_to(
    variables: dict[str, str], problem: str, remedy: str
) -> None:
    (found,) = troubles(False, variables)
    assert problem in found.problem
    assert remedy in found.remedy


def test_switches_are_judged_as_they_were_set(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "0")
    (row,) = doctor("environment")
    assert row["status"] == "warn"
    assert row["detail"].startswith("HF_DATASETS_OFFLINE=0, and the hub's clients are told to be")


def test_a_healthy_environment_has_no_troubles(tmp_path: Path) -> None:
    hub = str(tmp_path / "hub")
    assert troubles(False, {}) == []
    assert troubles(False, {"HF_HOME": str(tmp_path), "HF_HUB_CACHE": hub}) == []
    assert troubles(True, {"HF_HOME": str(tmp_path), "TRANSFORMERS_OFFLINE": "1"}) == []
    assert troubles(False, {"FORGELM_OPERATOR": "me", "HF_ASSETS_CACHE": "/c"}) == []
    (found,) = troubles(True, {})
    assert found.remedy == "export HF_HUB_OFFLINE=1"


def test_the_variables_of_forgelm_are_known() -> None:
    files = Path(package.__file__).parent.rglob("*.py")
    named = {
        name for file in files for name in re.findall(r'"(FORGELM_[A-Z_]+)"', file.read_text())
    }
    assert named - {"FORGELM_"} == set(OURS)
