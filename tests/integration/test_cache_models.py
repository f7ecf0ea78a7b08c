"""`forgelm cache-models` against a Hub that fails in every way that a Hub fails."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from child import FOREIGN, Child
from conftest import Result
from faulty_hub import (
    EVER,
    FILE,
    INFO,
    TREE,
    Action,
    Fault,
    FaultyHub,
    around,
    cut,
    flip,
    late,
    lengthen,
    listing,
    login_page,
    reset,
    shorten,
    status,
    without_ranges,
)
from glue_fixture import model_repo

TOKEN = "hf_" + "opens" * 6
BIG = random.Random(1).randbytes(6 << 20)
FILES = {**model_repo(2, seed=1), "big.bin": BIG}
LARGE = f"/cdn/{hashlib.sha256(BIG).hexdigest()}"
SMALL = r".*/resolve/.*/config.json"
SIZE = sum(map(len, FILES.values()))
QUICK = {"FORGELM_HUB_PATIENCE": "2", "HF_HUB_DOWNLOAD_TIMEOUT": "1", "FORGELM_OPERATOR": "tests"}


@pytest.fixture(scope="module")
def hub() -> Iterator[FaultyHub]:
    with FaultyHub(token=TOKEN) as server:
        server.add_repo("model", "org/plain", FILES)
        server.add_repo("model", "org/other", model_repo(3, seed=2))
        server.add_repo("model", "org/gated", model_repo(2), gated=True)
        yield server


@pytest.fixture(autouse=True)
def _no_faults_left(hub: FaultyHub) -> Iterator[None]:
    yield
    hub.faults = []


@pytest.fixture(scope="module")
def child(hub: FaultyHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Child]:
    folder = tmp_path_factory.mktemp("online")
    made = Child(folder, folder, hub.url, **QUICK)
    yield made
    made.close()


@dataclass(frozen=True)
class Cached:
    """How a command ended, what it printed as JSON, and the cache it left."""

    result: Result
    said: dict[str, Any]
    folder: Path

    @property
    def rows(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self.said["models"]
        return rows

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """What somebody who loads this repository would read."""
        repo = self.folder / f"models--{repo_id.replace('/', '--')}"
        commit = (repo / "refs" / revision).read_text()
        snapshot = repo / "snapshots" / commit
        found = [path for path in snapshot.rglob("*") if path.is_file()]
        return {path.relative_to(snapshot).as_posix(): path.read_bytes() for path in found}

    def leftovers(self) -> list[str]:
        return [path.name for path in self.folder.rglob("*.incomplete")]

    def refs(self) -> list[Path]:
        return list(self.folder.glob("*/refs/*"))


@pytest.fixture
def cache(child: Child, tmp_path: Path) -> Any:
    def call(*names: str, folder: Path | None = None, run: Child = child) -> Cached:
        into = folder or tmp_path / "hub"
        words = [word for name in names for word in ("--model", name)]
        made = ("cache-models", *words, "--output", str(into), "--output-format", "json")
        result = run(*made)
        return Cached(result, json.loads(result.out), into)

    return call


def test_what_lands_is_what_other_tools_read(hub: FaultyHub, cache: Any) -> None:
    got = cache("org/plain", "org/other", "org/plain")
    assert (got.result.code, got.said["success"]) == (0, True)
    assert [row["name"] for row in got.rows] == ["org/plain", "org/other"]
    first = got.rows[0]
    assert first.keys() == {"name", "cached_path", "size_bytes", "size_mb", "duration_s"}
    assert (first["size_bytes"], first["size_mb"]) == (SIZE, round(SIZE / 2**20, 2))
    assert got.said["total_size_mb"] == pytest.approx(
        sum(row["size_mb"] for row in got.rows), abs=0.02
    )
    assert got.said["cache_dir"] == str(got.folder)
    assert got.files("org/plain") == FILES
    assert got.leftovers() == []
    code = (
        "import sys; from huggingface_hub import snapshot_download, scan_cache_dir\n"
        f"print(snapshot_download('org/plain', cache_dir={str(got.folder)!r}))\n"
        f"print([str(w) for w in scan_cache_dir({str(got.folder)!r}).warnings])"
    )
    kept = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=kept | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    path, warnings = done.stdout.splitlines()
    assert path == first["cached_path"]
    assert "models--" not in warnings


def test_the_second_time_nothing_is_fetched(hub: FaultyHub, cache: Any) -> None:
    cache("org/plain")
    hub.clear_requests()
    again = cache("org/plain")
    assert again.result.code == 0
    assert [path for _, path in hub.requests if "agent" not in path] == [
        "/api/models/org/plain/revision/main"
    ]


# What fails, for how many requests, and what is said of it; it lands all the same.
PASSING: dict[str, tuple[str, Action, int, str]] = {
    "reset before the answer": (INFO, reset, 1, "the connection was cut"),
    "reset of the list": (TREE, reset, 1, "the connection was cut"),
    "reset in the middle": (LARGE, cut(2 << 20), 1, "the connection was cut"),
    "reset again and again": (LARGE, cut(1 << 20), 4, "the connection was cut"),
    "closed in the middle": (LARGE, cut(2 << 20, "close"), 1, "the answer was cut short"),
    "closed in a small file": (SMALL, cut(100, "close"), 1, "the connection was cut"),
    "stalled": (LARGE, cut(2 << 20, "stall"), 1, "the connection stalled"),
    "stalled before the answer": (INFO, late, 1, "the connection stalled"),
    "stalled before the list": (TREE, late, 1, "the connection stalled"),
    "429 for the repository": (INFO, status(429, Retry_After="1"), 1, "the hub answers 429"),
    "429 for the list": (TREE, status(429, Retry_After="1"), 1, "the hub answers 429"),
    "429 for a file": (SMALL, status(429, Retry_After="1"), 1, "trying again in 1 s"),
    "429 from the CDN": (
        LARGE,
        status(429, RateLimit='"api";r=0;t=1', RateLimit_Policy='"fixed window";"api";q=5;w=9'),
        1,
        "trying again in 2 s",
    ),
    "503 for the repository": (INFO, status(503), 2, "the hub answers 503"),
    "503 for the list": (TREE, status(503), 2, "the hub answers 503"),
    "503 for a file": (FILE, status(503), 3, "the hub answers 503"),
    "500 from the CDN": (LARGE, status(500), 2, "the hub answers 500"),
    "a flipped bit": (LARGE, flip, 1, "its bytes are not those that the hub's hash promises"),
    "a flipped bit in a small file": (
        SMALL,
        flip,
        1,
        "its bytes are not those that the hub's hash promises",
    ),
    "a short body": (LARGE, shorten, 1, "the answer was cut short"),
    "a long body": (LARGE, lengthen, 1, "its bytes are not those"),
}


@pytest.mark.parametrize("case", PASSING)
def test_what_passes_is_borne(hub: FaultyHub, cache: Any, case: str) -> None:
    path, action, times, said = PASSING[case]
    fault = Fault(path, action, times)
    hub.faults = [fault]
    got = cache("org/plain")
    assert (got.result.code, got.said["success"]) == (0, True), got.result.err
    assert said in got.result.err
    assert "Traceback" not in got.result.err
    assert len(fault.seen) == times
    assert got.files("org/plain") == FILES
    assert got.leftovers() == []


def test_going_on_asks_for_the_rest_alone(hub: FaultyHub, cache: Any) -> None:
    hub.faults = [
        Fault(LARGE, cut(2 << 20, "close"), 1),
        rest := Fault(LARGE, lambda h, q, a: a, EVER),
    ]
    assert cache("org/plain").result.code == 0
    ranges = [request.headers.get("Range") for request in rest.seen]
    assert any(text and int(text[len("bytes=") : -1]) > 1 << 20 for text in ranges), ranges


def test_a_server_without_ranges(hub: FaultyHub, cache: Any) -> None:
    whole = Fault(LARGE, without_ranges, EVER)
    hub.faults = [Fault(LARGE, cut(2 << 20), 1), whole]
    got = cache("org/plain")
    assert got.result.code == 0, got.result.err
    assert any(request.headers.get("Range") is None for request in whole.seen)
    assert got.files("org/plain") == FILES


# What fails for good: the request, and what is said; nothing counts as landed.
FAILING: dict[str, tuple[str, Action, str]] = {
    "503 for the repository": (INFO, status(503), "the hub answers: .*503"),
    "503 for the list": (TREE, status(503), "the hub answers: .*503"),
    "503 for a file": (FILE, status(503), "the hub answers: .*503"),
    "503 from the CDN": (LARGE, status(503), "the hub answers: .*503"),
    "429 with a wait beyond reason": (INFO, status(429, Retry_After="9999"), "answers: .*429"),
    "reset each time": (LARGE, reset, "can't be reached"),
    "stalled each time": (LARGE, cut(0, "stall"), "can't be reached"),
    "a bit flipped each time": (LARGE, flip, "3 times other bytes came than the hub's hash"),
    "a file that is missing": (
        FILE,
        status(404, X_Error_Code="EntryNotFound"),
        "the hub has no such file",
    ),
    "redirects without end": (FILE, around, "redirects more than 5 times"),
    "a file outside": (
        TREE,
        listing(b'"big.bin"', b'"../../../../big.bin"'),
        "the hub lists a file outside of it, '../../../../big.bin'; refused",
    ),
    "a hash that is a path": (
        TREE,
        listing(hashlib.sha256(BIG).hexdigest().encode(), b"../../../escaped"),
        "the hub gives no hash of big.bin; refused",
    ),
    "a login page": (INFO, login_page, "answers what isn't JSON"),
    "a list that isn't JSON": (TREE, login_page, "answers what isn't JSON"),
}


@pytest.mark.parametrize("case", FAILING)
def test_what_stays_wrong_is_never_success(hub: FaultyHub, cache: Any, case: str) -> None:
    path, action, said = FAILING[case]
    hub.faults = [Fault(path.replace("[^/]+/[^/]+", "org/plain"), action, EVER)]
    got = cache("org/plain", "org/other")
    assert (got.result.code, got.said["success"]) == (2, False), got.result.err
    assert got.rows[0].keys() == {"name", "error", "error_class"}
    assert got.rows[0]["error_class"] == got.said["error_class"] == "RunError"
    assert re.search(said, got.rows[0]["error"]), got.rows[0]["error"]
    assert "model org/plain" in got.rows[0]["error"]
    assert "\n" not in got.rows[0]["error"]
    assert "Traceback" not in got.result.err
    assert not (got.folder / "models--org--plain" / "refs").exists()
    if path != LARGE:
        assert got.rows[1]["size_bytes"] == sum(map(len, model_repo(3, seed=2).values()))
        assert got.files("org/other") == model_repo(3, seed=2)
    hub.faults = []
    assert cache("org/plain", "org/other").files("org/plain") == FILES
    assert got.leftovers() == []


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("org/none", "no such repository on the hub, or it is private"),
        ("org/plain@v9", "model org/plain@v9: the repository has no such revision"),
        ("org/gated", "access is gated; ask for it at {url}/org/gated, then set HF_TOKEN"),
    ],
)
def test_what_the_hub_lacks_or_refuses(hub: FaultyHub, cache: Any, name: str, said: str) -> None:
    hub.clear_requests()
    got = cache("org/other", name)
    assert got.result.code == 2
    assert said.format(url=hub.url) in got.rows[1]["error"]
    assert "cached_path" in got.rows[0]
    if name == "org/gated":
        asked = [path for _, path in hub.requests]
        assert asked.index("/api/models/org/gated/auth-check") < min(
            place for place, path in enumerate(asked) if "/resolve/" in path
        )


@pytest.mark.parametrize("right", [True, False])
def test_tokens_are_named_and_never_shown(
    hub: FaultyHub, cache: Any, tmp_path: Path, right: bool
) -> None:
    token = TOKEN if right else "hf_" + "wrong" * 6
    other = Child(tmp_path, tmp_path, hub.url, HF_TOKEN=token, **QUICK)
    got = cache("org/gated", run=other)
    other.close()
    assert got.result.code == (0 if right else 2)
    if not right:
        assert "the hub doesn't accept the token of HF_TOKEN" in got.rows[0]["error"]
    everything = got.result.out + got.result.err
    everything += "".join(p.read_text() for p in tmp_path.rglob("*.json*"))
    assert token not in everything


def test_a_token_that_cannot_be_one(hub: FaultyHub, cache: Any, tmp_path: Path) -> None:
    got = cache("org/plain", run=Child(tmp_path, tmp_path, hub.url, HF_TOKEN="tökén", **QUICK))
    assert got.result.code == 1
    assert "HF_TOKEN isn't a token: it has other than ASCII" in got.rows[0]["error"]


def test_what_no_run_could_load_is_no_success(hub: FaultyHub, tmp_path: Path) -> None:
    hub.add_repo("model", "org/readme", {"README.md": b"# soon"})
    words = ("cache", "model=custom", "model.path=org/readme", "-q")
    got = Child(tmp_path, tmp_path, hub.url, **QUICK)(*words)
    assert got.code == 2
    assert "model org/readme: is cached as the hub has it, and can't be loaded: " in got.err
    assert "no model, as it has no config.json" in got.err


def test_a_new_commit_is_fetched_and_a_stale_one_never_success(
    hub: FaultyHub, cache: Any, tmp_path: Path
) -> None:
    hub.add_repo("model", "org/moving", {"config.json": b"{}", "model.bin": b"old"})
    assert cache("org/moving").files("org/moving")["model.bin"] == b"old"
    hub.add_repo("model", "org/moving", {"config.json": b"{}", "model.bin": b"new"})
    hub.faults = [Fault(INFO, status(503), EVER)]
    stale = cache("org/moving")
    assert (stale.result.code, stale.said["success"]) == (2, False)
    hub.faults = []
    assert cache("org/moving").files("org/moving")["model.bin"] == b"new"


def test_a_dead_server(cache: Any, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    dead = Child(tmp_path, tmp_path, f"http://127.0.0.1:{port}", **QUICK)
    got = cache("org/plain", run=dead)
    dead.close()
    assert got.result.code == 2
    assert f"http://127.0.0.1:{port} can't be reached" in got.rows[0]["error"]
    assert "trying again" in got.result.err


@pytest.mark.parametrize("damage", ["changed", "cut", "gone", "dangling"])
def test_what_was_damaged_in_the_cache_is_mended(hub: FaultyHub, cache: Any, damage: str) -> None:
    got = cache("org/plain")
    repo = got.folder / "models--org--plain"
    (name,) = repo.glob("snapshots/*/big.bin")
    blob = name.resolve()
    if damage == "changed":
        blob.write_bytes(BIG[:-1] + bytes([BIG[-1] ^ 1]))
    elif damage == "cut":
        os.truncate(blob, 1000)
    elif damage == "gone":
        name.unlink()
    else:
        blob.unlink()
    again = cache("org/plain")
    assert again.result.code == 0
    assert again.files("org/plain") == FILES
    assert ("the cache holds other bytes" in again.result.err) == (damage in ("changed", "cut"))


def test_bytes_that_another_tool_brought_are_checked_first(hub: FaultyHub, cache: Any) -> None:
    got = cache("org/plain")
    repo = got.folder / "models--org--plain"
    (name,) = repo.glob("snapshots/*/model.safetensors")
    changed, kept = name.resolve(), os.stat(name.resolve())
    (repo / ".forgelm.json").unlink()
    changed.write_bytes(bytes(kept.st_size))
    os.utime(changed, ns=(kept.st_atime_ns, kept.st_mtime_ns))
    hub.clear_requests()
    assert cache("org/plain").files("org/plain") == FILES
    fetched = [path for _, path in hub.requests if "/resolve/" in path]
    assert [path.rpartition("/")[2] for path in fetched] == ["model.safetensors"]


def test_killed_in_the_middle(hub: FaultyHub, cache: Any, tmp_path: Path) -> None:
    """What came by then isn't fetched again, and nothing is left over at the end."""
    slow = Fault(LARGE, _slowly, EVER)
    hub.faults = [slow]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
    words = ["cache-models", "--model", "org/plain", "--output", str(tmp_path / "hub")]
    process = subprocess.Popen(
        [sys.executable, "-m", "forgelm", *words],
        env=kept | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    blobs = tmp_path / "hub" / "models--org--plain" / "blobs"
    while time.monotonic() < deadline:
        if any(path.stat().st_size >= 2 << 20 for path in blobs.glob("*.incomplete")):
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (left,) = blobs.glob("*.incomplete")
    had = left.stat().st_size
    assert 2 << 20 <= had < len(BIG)
    # The small files are there, and must not be taken for all of it.
    bundle = [sys.executable, "-m", "forgelm", "bundle", "--cache-dir", str(tmp_path / "hub")]
    refused = subprocess.run(
        [*bundle, "--output", str(tmp_path / "half.tar")],
        env=kept | {"HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert refused.returncode != 0
    assert "model org/plain, commit " in refused.stderr
    assert "big.bin missing; forgelm cache-models --model org/plain@" in refused.stderr
    assert not (tmp_path / "half.tar").exists()
    rest = Fault(LARGE, lambda h, q, a: a, EVER)
    hub.faults = [rest]
    got = cache("org/plain")
    assert got.result.code == 0
    assert got.files("org/plain") == FILES
    assert got.leftovers() == []
    assert f"bytes={had}-" in [request.headers.get("Range") for request in rest.seen]


def _slowly(hub: FaultyHub, request: Any, response: Any) -> Any:
    content = b"".join(response.body)

    def body() -> Iterator[bytes]:
        for start in range(0, len(content), 1 << 18):
            yield content[start : start + (1 << 18)]
            time.sleep(0.1)

    response.body = body()
    return response


@pytest.mark.parametrize(("sent", "name"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")])
def test_who_is_stopped_keeps_what_came(
    hub: FaultyHub, tmp_path: Path, cache: Any, sent: signal.Signals, name: str
) -> None:
    hub.faults = [Fault(LARGE, _slowly, EVER)]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
    words = ["cache-models", "--model", "org/plain", "--output", str(tmp_path / "hub")]
    words += ["--output-format", "json"]
    process = subprocess.Popen(
        [sys.executable, "-m", "forgelm", *words],
        env=kept | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), **QUICK},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    blobs = tmp_path / "hub" / "models--org--plain" / "blobs"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if any(path.stat().st_size >= 1 << 20 for path in blobs.glob("*.incomplete")):
            break
        time.sleep(0.05)
    process.send_signal(sent)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    said = json.loads(out)
    assert (said["success"], said["error"]) == (False, f"stopped by {name}")
    assert "Traceback" not in err
    assert list(blobs.glob("*.incomplete"))
    events = [
        json.loads(line)["event"]
        for line in (tmp_path / "hub" / "audit_log.jsonl").read_text().splitlines()
    ]
    assert events == ["cache.populate_models_requested", "cache.populate_models_failed"]
    hub.faults = []
    assert cache("org/plain").files("org/plain") == FILES


def test_more_than_fits_is_refused_before_the_first_byte(
    hub: FaultyHub, cache: Any, small_disk: Path
) -> None:
    hub.clear_requests()
    got = cache("org/plain", "org/other", folder=small_disk / "hub")
    assert got.result.code == 2
    for row in got.rows:
        assert re.search(r"all together 6\.\d MiB, and .* has [0-3]\.\d MiB free", row["error"])
    assert not any("/resolve/" in path for _, path in hub.requests)


def test_a_disk_that_fills_up_meanwhile(hub: FaultyHub, cache: Any, small_disk: Path) -> None:
    filler = small_disk / "filler"

    def fill(h: Any, request: Any, response: Any) -> Any:
        with suppress(OSError), filler.open("ab", buffering=0) as file:
            while file.write(bytes(1 << 16)):
                pass
        return response

    os.system(f"mount -o remount,size=9m {small_disk}")
    hub.faults = [Fault(LARGE, fill, EVER)]
    got = cache("org/plain", folder=small_disk / "hub")
    assert got.result.code == 2
    assert "No space left on device; make room and run it again" in got.rows[0]["error"]
    filler.unlink()
    hub.faults = []
    assert cache("org/plain", folder=small_disk / "hub").files("org/plain") == FILES


def test_a_cache_that_cant_be_written_to(hub: FaultyHub, cache: Any, small_disk: Path) -> None:
    """What is whole and verified there is cached; what would have to be written is refused."""
    os.system(f"mount -o remount,size=20m {small_disk}")
    folder = small_disk / "hub"
    assert cache("org/plain", folder=folder).result.code == 0
    os.system(f"mount -o remount,ro {small_disk}")
    hub.clear_requests()
    got = cache("org/plain", folder=folder)
    assert (got.result.code, got.said["success"]) == (0, True), got.said
    assert got.rows[0]["size_bytes"] == SIZE
    both = cache("org/plain", "org/other", folder=folder)
    assert both.result.code == 1
    assert (both.rows[0]["name"], both.rows[0]["size_bytes"]) == ("org/plain", SIZE)
    said = f"model org/other: cache {folder} can't be written to, and doesn't hold all of commit"
    assert both.rows[1]["error"].startswith(said)
    assert both.said["error_class"] == "ConfigError"
    assert not any("/resolve/" in path for _, path in hub.requests)
    none = cache("org/plain", folder=small_disk / "new")
    assert none.result.code == 1
    assert none.said["error"].endswith(
        "Read-only file system; give a folder that can be written to"
    )


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("nobody but root may mount a small disk")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "cache-models needs --model HUB_ID, --safety HUB_ID, or both"),
        (["--model", "a/b/c"], "--model a/b/c: neither a folder here nor a hub id"),
        (["--model", ""], "--model : neither a folder here nor a hub id"),
        (["--model", "./none"], "--model ./none: no such folder"),
        (["--model", "org/plain@"], "--model org/plain@: name a revision after the @"),
        (["--safety", "x y"], "--safety x y: neither a folder here nor a hub id"),
        (["--models", "x"], "unrecognized arguments"),
        (["--model", "org/plain", "--output", ""], "argument --output: '' is no path"),
        (["--model", "org/plain", "--audit-dir", ""], "argument --audit-dir: '' is no path"),
        (["--model", "org/plain", "--log-level", "LOUD"], "invalid choice: 'LOUD'"),
        (["--model", "org/plain", "--output", __file__], "cache .*: (File exists|Not a directory)"),
    ],
)
def test_wrong_requests_end_with_1_and_ask_no_hub(
    hub: FaultyHub, child: Child, words: list[str], said: str
) -> None:
    hub.clear_requests()
    plain = child("cache-models", *words)
    assert plain.code == 1
    assert re.search(said, plain.err)
    as_json = child("cache-models", *words, "--output-format", "json")
    assert as_json.code == 1
    document = json.loads(as_json.out)
    assert (document["success"], document["error_class"]) == (False, "ConfigError")
    assert re.search(said, document["error"])
    assert [path for _, path in hub.requests if "models" in path] == []


def test_all_wrong_names_at_once(child: Child) -> None:
    result = child("cache-models", "--model", "a/b/c", "--model", "./none", "--safety", "x y")
    assert result.code == 1
    assert len(result.err.splitlines()) == 3


def test_folders_are_checked_and_not_copied(hub: FaultyHub, cache: Any, tmp_path: Path) -> None:
    folder, broken, empty = (tmp_path / name for name in ("mine", "cut", "empty"))
    for place in (folder, broken, empty):
        place.mkdir()
    for name, content in model_repo(2).items():
        (folder / name).write_bytes(content)
        (broken / name).write_bytes(content)
    os.truncate(broken / "model.safetensors", 5000)
    got = cache(str(folder), str(broken), "org/other", str(empty))
    assert got.result.code == 2
    mine, cut_short, other, nothing = got.rows
    assert mine["cached_path"] == str(folder.resolve())
    assert "model.safetensors: is 5000 bytes long and must be" in cut_short["error"]
    assert "cached_path" in other
    assert "no model, as it has no config.json and no adapter_config.json" in nothing["error"]


def test_an_adapter_is_named_with_its_base(hub: FaultyHub, cache: Any) -> None:
    settings = {"base_model_name_or_path": "org/plain", "peft_type": "LORA"}
    files = {"adapter_config.json": json.dumps(settings).encode(), "adapter_model.bin": b"1"}
    hub.add_repo("model", "org/adapter", files)
    alone, both = cache("org/adapter"), cache("org/adapter", "org/plain")
    assert "org/adapter is an adapter of org/plain: add --model org/plain" in alone.result.err
    assert "is an adapter" not in both.result.err


def test_text_of_the_reference(hub: FaultyHub, child: Child, tmp_path: Path) -> None:
    into = tmp_path / "hub"
    words = ("--model", "org/plain", "--safety", "org/other", "--output", str(into))
    result = child("cache-models", *words)
    assert result.code == 0
    head, first, second = result.out.splitlines()
    assert re.fullmatch(rf"Cached 2 model\(s\); 6\.\d\d MiB total under {into}\.", head)
    assert re.fullmatch(r"  - org/plain: 6\.\d\d MiB \(\d+\.\ds\)", first)
    assert re.fullmatch(r"  - org/other: 0\.\d\d MiB \(\d+\.\ds\)", second)
    assert f"export HF_HUB_CACHE={into}" in result.err
    quiet = child("cache-models", *words, "-q")
    assert (quiet.code, "fetching" in result.err, "fetching" in quiet.err) == (0, True, False)
    failed = child("cache-models", "--model", "org/none", *words)
    assert failed.code == 2
    assert failed.out.splitlines()[0].startswith("Cached 2 of 3 model(s); 6.")
    assert failed.out.splitlines()[1] == "  - org/none: failed"


def test_events(hub: FaultyHub, child: Child, tmp_path: Path) -> None:
    def events(*words: str) -> list[dict[str, Any]]:
        child("cache-models", "--output", str(tmp_path / "hub"), *words)
        lines = (tmp_path / "log" / "audit_log.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines[-2:]]

    (tmp_path / "log").mkdir()
    log = ("--audit-dir", str(tmp_path / "log"))
    requested, completed = events("--model", "org/other", "--safety", "org/plain", *log)
    envelope = {"timestamp", "run_id", "operator", "event", "prev_hash"}
    asked = {"models", "cache_dir", "safety_classifier"}
    assert requested.keys() == envelope | asked
    assert requested["event"] == "cache.populate_models_requested"
    assert requested["models"] == ["org/other", "org/plain"]
    assert requested["safety_classifier"] == "org/plain"
    assert completed.keys() == envelope | asked | {"total_size_bytes", "count"}
    assert (completed["count"], completed["operator"]) == (2, "tests")
    _, failed = events("--model", "org/other", "--model", "org/none", *log)
    assert failed.keys() == envelope | asked | {"models_completed", "error_class", "error_message"}
    assert failed["models_completed"] == ["org/other"]
    assert failed["error_class"] == "RunError"


def test_without_an_operator_it_goes_on_without_a_log(
    hub: FaultyHub, tmp_path: Path, cache: Any
) -> None:
    other = Child(tmp_path, tmp_path, hub.url, FORGELM_OPERATOR="")
    got = cache("org/other", run=other)
    other.close()
    assert got.result.code == 0
    assert not list(tmp_path.rglob("audit_log*"))
    assert "FORGELM_OPERATOR" not in got.result.err


@pytest.mark.parametrize("switch", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_it_says_so(hub: FaultyHub, tmp_path: Path, switch: str) -> None:
    other = Child(tmp_path, tmp_path, hub.url, **{"HF_HUB_OFFLINE": "", switch: "1"})
    result = other("cache-models", "--model", "org/plain")
    other.close()
    assert result.code == 1
    assert f"{switch}=1: cache-models fetches from the hub; unset it here" in result.err


@pytest.mark.parametrize(
    ("variables", "code", "said"),
    [
        ({"http_proxy": "::"}, 1, "http_proxy: its value isn't the URL of a proxy"),
        ({"ALL_PROXY": "foo://x"}, 1, "ALL_PROXY: its value isn't the URL of a proxy"),
        ({"ALL_PROXY": "socks5://x:1"}, 1, "ALL_PROXY: a SOCKS proxy needs the package socksio"),
        ({"HF_ENDPOINT": "hub.local"}, 1, "HF_ENDPOINT=hub.local: give a whole URL"),
        ({"HTTP_PROXY": "http://127.0.0.1:9"}, 2, "can't be reached through the proxy of HTTP_"),
    ],
)
def test_a_wrong_way_to_the_hub_is_named(
    tmp_path: Path, variables: dict[str, str], code: int, said: str
) -> None:
    clean = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "ALL_PROXY"), "")
    environment = {**clean, **QUICK, "NO_PROXY": "", "no_proxy": "", **variables}
    url = environment.pop("HF_ENDPOINT", "http://hub.invalid")
    child = Child(tmp_path, tmp_path, url, **environment)
    done = child("cache-models", "--model", "org/plain", "-q")
    child.close()
    assert done.code == code, done.err
    assert said in done.err
    assert done.err.count("forgelm: ") == 1
    assert "makes do" not in done.err
