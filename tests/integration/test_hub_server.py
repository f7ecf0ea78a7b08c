"""The test Hub, judged by the real clients, which run in processes of their own."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from glue_fixture import MNLI_SPLITS, TASKS, glue_repo, model_repo
from hub_server import HubServer, Request, Response

MNLI = ["entailment", "neutral", "contradiction"]
TOKEN = "hf_let_me_in"
FOREIGN = ("HF_", "HUGGING", "TRANSFORMERS_")
FILES = {"a.txt": b"whole"}

PRELUDE = """
import json, os, sys

def error(call):
    try:
        call()
    except Exception as failure:
        return type(failure).__name__
    return "no error"

def report(**results):
    print("RESULT " + json.dumps(results))
"""

LOADING = """
from datasets import load_dataset
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

def load_model(revision):
    config = AutoConfig.from_pretrained("org/tiny", revision=revision)
    tokenizer = AutoTokenizer.from_pretrained("org/tiny", revision=revision)
    model, info = AutoModelForSequenceClassification.from_pretrained(
        "org/tiny", revision=revision, output_loading_info=True
    )
    batch = tokenizer([["the cat sleeps .", "a cat"]], return_tensors="pt")
    return {
        "labels": list(config.id2label.values()),
        "strange_keys": sorted(info["missing_keys"]) + sorted(info["unexpected_keys"]),
        "tokens": tokenizer.convert_ids_to_tokens(batch["input_ids"][0]),
        "segments": batch["token_type_ids"][0].tolist(),
        "outputs": model(**batch).logits.shape[-1],
    }

def load_task(name):
    data = load_dataset("nyu-mll/glue", name)
    names = getattr(data["train"].features["label"], "names", None)
    rows = {split: part.num_rows for split, part in data.items()}
    return {
        "rows": rows,
        "names": names,
        "columns": data["train"].column_names,
        "types": {key: value.dtype for key, value in data["train"].features.items()},
        "hidden": sorted({label for split in rows if "test" in split
                          for label in data[split]["label"]}),
    }
"""

ONLINE = (
    PRELUDE
    + LOADING
    + """
old = sys.argv[1]
report(
    new=load_model("main"),
    old=load_model(old),
    tasks={name: load_task(name) for name in sys.argv[2:]},
    no_model=error(lambda: AutoConfig.from_pretrained("org/none")),
    no_data=error(lambda: load_dataset("org/none")),
)
"""
)

OFFLINE = (
    PRELUDE
    + LOADING
    + """
report(new=load_model("main"), old=load_model(sys.argv[1]), task=load_task("mnli"))
"""
)

HUB_ONLY = (
    PRELUDE
    + """
from pathlib import Path
from huggingface_hub import HfApi, HfFileSystem, hf_hub_download, snapshot_download

api = HfApi()
old, token = sys.argv[1:]
info = api.repo_info("org/tiny", files_metadata=True)
folder = Path(snapshot_download("org/tiny"))
at_old = Path(snapshot_download("org/tiny", revision=old))
tree = list(api.list_repo_tree("nyu-mll/glue", repo_type="dataset", recursive=True, expand=True))
paths = api.get_paths_info("org/tiny", ["config.json", "none"])
report(
    sha=info.sha,
    sizes={s.rfilename: [s.size, s.lfs and s.lfs.sha256] for s in info.siblings},
    expanded=api.model_info("org/tiny", expand=["sha"]).sha,
    old_sha=api.repo_info("org/tiny", revision=old).sha,
    main=api.list_repo_refs("org/tiny").branches[0].target_commit,
    files=sorted(path.name for path in folder.iterdir()),
    folder=folder.name,
    at_old=at_old.name,
    same=[(folder / name).read_bytes() == (at_old / name).read_bytes()
          for name in ("config.json", "model.safetensors")],
    verified=not api.verify_repo_checksums("org/tiny").mismatches,
    tree=[entry.path for entry in tree],
    committed={entry.last_commit.oid for entry in tree}.pop(),
    globbed=sorted(HfFileSystem().glob("datasets/nyu-mll/glue/*/train-*")),
    paths=[entry.path for entry in paths],
    no_repo=error(lambda: api.repo_info("org/none")),
    no_revision=error(lambda: api.repo_info("org/tiny", revision="none")),
    no_commit=error(lambda: snapshot_download("org/tiny", revision="0" * 40)),
    no_file=error(lambda: hf_hub_download("org/tiny", "none.txt")),
    no_folder=error(lambda: list(api.list_repo_tree("org/tiny", "none"))),
    gated=api.repo_info("org/gated").gated,
    anonymous=error(lambda: hf_hub_download("org/gated", "config.json")),
    denied=error(lambda: api.auth_check("org/gated")),
    bad_token=error(lambda: api.repo_info("org/tiny", token="hf_wrong")),
    hidden=error(lambda: api.repo_info("org/none", token=token)),
    granted=Path(hf_hub_download("org/gated", "model.safetensors", token=token)).stat().st_size,
)
"""
)


@dataclass(frozen=True)
class Hub:
    """The server with its repositories, and a way to run a client against it."""

    server: HubServer
    old: str
    new: str
    glue: str
    run: Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    home = tmp_path_factory.mktemp("hf_home")
    # A short page makes every listing of the data set walk through several.
    with HubServer(token=TOKEN, page_size=7) as server:

        def run(script: str, *arguments: str, offline: bool = False) -> dict[str, Any]:
            return _run(server.url, home, script, arguments, offline)

        old = server.add_repo("model", "org/tiny", model_repo(2, seed=1), message="first")
        new = server.add_repo("model", "org/tiny", model_repo(3, MNLI), message="second")
        glue = server.add_repo("dataset", "nyu-mll/glue", glue_repo())
        server.add_repo("model", "org/gated", model_repo(), gated=True)
        yield Hub(server, old, new, glue, run)


def _run(
    url: str, home: Path, script: str, arguments: tuple[str, ...], offline: bool
) -> dict[str, Any]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
    environment = kept | {
        "HF_ENDPOINT": url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_OFFLINE": str(int(offline)),
        "NO_PROXY": "127.0.0.1,localhost",
    }
    child = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    lines = [line for line in child.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, child.stdout + child.stderr
    results: dict[str, Any] = json.loads(lines[-1].removeprefix("RESULT "))
    return results


@pytest.fixture(scope="module")
def hub_only(hub: Hub) -> dict[str, Any]:
    return hub.run(HUB_ONLY, hub.old, TOKEN)


@pytest.fixture(scope="module")
def online(hub: Hub) -> dict[str, Any]:
    return hub.run(ONLINE, hub.old, *TASKS)


def fetch(
    server: HubServer, path: str, method: str = "GET", host: str = "127.0.0.1", **headers: str
) -> tuple[http.client.HTTPResponse, bytes]:
    """Make one request without any client's interpretation."""
    port = int(server.url.rpartition(":")[2])
    with closing(http.client.HTTPConnection(host, port, timeout=10)) as connection:
        connection.request(method, path, headers=headers)
        response = connection.getresponse()
        return response, response.read()


def test_commits_follow_from_the_content_and_the_parent() -> None:
    with HubServer() as one, HubServer() as other:
        first, again = (server.add_repo("model", "org/x", FILES) for server in (one, other))
        assert first == again
        assert len(first) == 40
        assert one.add_repo("model", "org/x", FILES) != first


def test_fixture_files_are_deterministic() -> None:
    assert glue_repo() == glue_repo()
    assert model_repo(3, MNLI) == model_repo(3, MNLI)
    assert model_repo(seed=1)["model.safetensors"] != model_repo(seed=2)["model.safetensors"]


def test_small_file_is_served_in_place(hub: Hub) -> None:
    path = "/org/tiny/resolve/main/config.json"
    head, nothing = fetch(hub.server, path, "HEAD")
    got, body = fetch(hub.server, path)
    assert (head.status, nothing, got.status) == (200, b"", 200)
    assert head.headers["X-Repo-Commit"] == hub.new
    assert head.headers["ETag"] == got.headers["ETag"]
    assert int(head.headers["Content-Length"]) == len(body)
    assert body == model_repo(3, MNLI)["config.json"]


def test_large_file_is_redirected_to_another_host(hub: Hub) -> None:
    weights = model_repo(3, MNLI)["model.safetensors"]
    head, _ = fetch(hub.server, "/org/tiny/resolve/main/model.safetensors", "HEAD")
    location = head.headers["Location"]
    assert head.status == 302
    assert location.startswith("http://localhost:")
    assert int(head.headers["X-Linked-Size"]) == len(weights)
    cdn = "/cdn/" + head.headers["X-Linked-ETag"].strip('"')
    assert location.endswith(cdn)
    assert fetch(hub.server, cdn, host="localhost")[1] == weights
    refused, _ = fetch(hub.server, cdn, host="localhost", Authorization=f"Bearer {TOKEN}")
    assert refused.status == 400


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [("bytes=2-4", slice(2, 5)), ("bytes=5-", slice(5, None)), ("bytes=-3", slice(-3, None))],
)
def test_ranges(hub: Hub, wanted: str, expected: slice) -> None:
    content = model_repo(3, MNLI)["config.json"]
    response, body = fetch(hub.server, "/org/tiny/resolve/main/config.json", Range=wanted)
    start, stop, _ = expected.indices(len(content))
    assert (response.status, body) == (206, content[expected])
    assert response.headers["Content-Range"] == f"bytes {start}-{stop - 1}/{len(content)}"


def test_range_past_the_end_is_refused(hub: Hub) -> None:
    response, _ = fetch(hub.server, "/org/tiny/resolve/main/config.json", Range="bytes=999999-")
    assert response.status == 416
    assert response.headers["Content-Range"].startswith("bytes */")


def test_files_on_disk_are_served_like_bytes(hub: Hub, tmp_path: Path) -> None:
    source = tmp_path / "weights"
    content = bytes(range(256)) * (3 << 12)
    source.write_bytes(content)
    hub.server.add_repo("model", "org/disk", {"weights.bin": source, "same.txt": source})
    digest = fetch(hub.server, "/org/disk/resolve/main/weights.bin")[0].headers["X-Linked-ETag"]
    cdn = "/cdn/" + digest.strip('"')
    assert fetch(hub.server, cdn)[1] == content
    part = fetch(hub.server, cdn, Range="bytes=1048570-1048580")[1]
    assert part == content[1048570:1048581]
    assert fetch(hub.server, "/org/disk/resolve/main/same.txt")[0].status == 302


@pytest.mark.parametrize("path", ["/api/agent-harnesses", "/api/models/org/tiny/discussions"])
def test_unknown_route_is_not_found(hub: Hub, path: str) -> None:
    assert fetch(hub.server, path)[0].status == 404


def test_names_without_a_namespace() -> None:
    with HubServer() as server:
        sha = server.add_repo("dataset", "glue", {"tree/README.md": b"x"})
        assert json.loads(fetch(server, "/api/datasets/glue")[1])["sha"] == sha
        assert json.loads(fetch(server, "/api/datasets/glue/tree/main/tree")[1])[0]["size"] == 1
        assert fetch(server, f"/datasets/glue/resolve/{sha}/tree/README.md")[1] == b"x"


def test_a_closed_server_is_silent_on_open_connections() -> None:
    with HubServer() as server:
        connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=10)
        connection.request("GET", "/")
        connection.getresponse().read()
    with closing(connection):
        connection.request("GET", "/")
        with pytest.raises(http.client.RemoteDisconnected):
            connection.getresponse()


def test_requests_are_logged(hub: Hub) -> None:
    hub.server.clear_requests()
    fetch(hub.server, "/api/models/org/tiny?blobs=true")
    assert hub.server.requests == [("GET", "/api/models/org/tiny")]


def test_every_request_passes_through_answer() -> None:
    class Unwell(HubServer):
        def answer(self, request: Request) -> Response:
            response = super().answer(request)
            response.body = [b"cut"]
            return response

    with Unwell() as server:
        server.add_repo("model", "org/x", FILES)
        with pytest.raises(http.client.IncompleteRead):
            fetch(server, "/org/x/resolve/main/a.txt")


def test_repo_info_and_snapshots(hub: Hub, hub_only: dict[str, Any]) -> None:
    files = model_repo(3, MNLI)
    assert hub_only["sha"] == hub_only["expanded"] == hub_only["main"] == hub.new
    assert hub_only["sizes"].keys() == files.keys()
    assert hub_only["sizes"]["config.json"] == [len(files["config.json"]), None]
    assert hub_only["sizes"]["model.safetensors"][1]
    assert hub_only["files"] == sorted(files)
    assert hub_only["folder"] == hub.new
    assert hub_only["old_sha"] == hub_only["at_old"] == hub.old
    assert hub_only["same"] == [False, False]
    assert hub_only["verified"]


def test_trees_are_paged(hub: Hub, hub_only: dict[str, Any]) -> None:
    assert set(hub_only["tree"]) == {*glue_repo(), *TASKS}
    assert hub_only["committed"] == hub.glue
    assert hub_only["globbed"] == sorted(
        f"datasets/nyu-mll/glue/{name}/train-00000-of-00001.parquet" for name in TASKS
    )
    assert hub_only["paths"] == ["config.json"]


@pytest.mark.parametrize(
    ("case", "name"),
    [
        ("no_repo", "RepositoryNotFoundError"),
        ("hidden", "RepositoryNotFoundError"),
        ("no_revision", "RevisionNotFoundError"),
        ("no_commit", "RevisionNotFoundError"),
        ("no_file", "RemoteEntryNotFoundError"),
        ("no_folder", "RemoteEntryNotFoundError"),
        ("anonymous", "GatedRepoError"),
        ("denied", "GatedRepoError"),
        ("bad_token", "HfHubHTTPError"),
    ],
)
def test_clients_see_the_right_errors(hub_only: dict[str, Any], case: str, name: str) -> None:
    assert hub_only[case] == name


def test_the_token_opens_the_gate(hub_only: dict[str, Any]) -> None:
    assert hub_only["gated"] == "manual"
    assert hub_only["granted"] == len(model_repo()["model.safetensors"])


def test_models_load_at_both_revisions(online: dict[str, Any]) -> None:
    assert online["new"]["labels"] == MNLI
    assert online["new"]["outputs"] == 3
    assert online["old"]["labels"] == ["LABEL_0", "LABEL_1"]
    assert online["old"]["outputs"] == 2
    assert online["new"]["strange_keys"] == online["old"]["strange_keys"] == []
    words = ["[CLS]", "the", "cat", "sleeps", ".", "[SEP]", "a", "cat", "[SEP]"]
    assert online["new"]["tokens"] == words
    assert online["new"]["segments"] == [0] * 6 + [1] * 3


@pytest.mark.parametrize("name", TASKS)
def test_tasks_load(online: dict[str, Any], name: str) -> None:
    task, loaded = TASKS[name], online["tasks"][name]
    rows = {"train": 64, "validation": 32, "test": 16}
    assert loaded["rows"] == {split: rows[split.partition("_")[0]] for split in task.splits}
    assert loaded["names"] == (list(task.labels) if task.labels else None)
    assert loaded["columns"] == [*task.columns, "label", "idx"]
    assert loaded["types"]["label"] == ("int64" if task.labels else "float32")
    assert loaded["types"]["idx"] == "int32"
    assert loaded["hidden"] == ([-1] if task.hidden_test else [0, 1])


def test_missing_repositories_fail_to_load(online: dict[str, Any]) -> None:
    assert online["no_model"] == "OSError"
    assert online["no_data"] == "DatasetNotFoundError"


def test_offline_loads_from_the_cache_alone(hub: Hub, online: dict[str, Any]) -> None:
    hub.server.clear_requests()
    offline = hub.run(OFFLINE, hub.old, offline=True)
    assert hub.server.requests == []
    assert offline["new"] == online["new"]
    assert offline["old"] == online["old"]
    assert offline["task"] == online["tasks"]["mnli"]
    assert list(offline["task"]["rows"]) == list(MNLI_SPLITS)
