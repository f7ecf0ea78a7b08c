"""`forgelm bundle`, `verify` and `import`: caches carried where there is no network."""

from __future__ import annotations

import ast
import gzip
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from caches import CARD, DATA, MODEL, NEW, OLD, PREPARED, WEIGHTS, Cache, contents, git_hash, put
from child import FOREIGN
from conftest import Command, Result
from glue_fixture import glue_repo, model_repo
from hub_server import HubServer

from forgelm import hubcache
from forgelm.airgap import verify
from forgelm.cli.main import main

MODEL_ROOT = "hub/models--org--tiny"
BLOB = hashlib.sha256(WEIGHTS).hexdigest()
WEIGHTS_PATH = f"{MODEL_ROOT}/blobs/{BLOB}"
CONFIG_PATH = f"{MODEL_ROOT}/blobs/{git_hash(MODEL['config.json'])}"
SNAPSHOT = f"{MODEL_ROOT}/snapshots/{NEW}"
ROWS_PATH = f"datasets/{PREPARED}/{DATA}/rows-train.arrow"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    """A filled cache, which the environment names."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    return Cache(tmp_path / "home").fill()


@pytest.fixture
def packed(cache: Cache, forgelm: Command, tmp_path: Path) -> Path:
    """A bundle of that cache."""
    assert forgelm("bundle", "--output", "all.tar").code == 0
    return tmp_path / "all.tar"


def document(result: Result) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(result.out)
    return found


def manifest_of(archive: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(f"{archive}.manifest.json").read_text())
    return found


def refused(result: Result, *texts: str, code: int = 2) -> None:
    assert result.code == code, result
    for text in texts:
        assert text in result.err
    assert "Traceback" not in result.err


# Packing


def test_the_same_content_gives_the_same_bytes(
    tmp_path: Path, forgelm: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it lies, however its files are linked, whatever else lies there."""
    archives = []
    for number, form in enumerate(("links", "absolute", "shared", "copies")):
        home = Cache(tmp_path / form / ("deep/" * number) / "home").fill(form)
        if form == "shared":
            home.add_junk()
        monkeypatch.setenv("HF_HOME", str(home.home))
        assert forgelm("bundle", "--output", f"{form}.tar").code == 0
        archives.append((tmp_path / f"{form}.tar").read_bytes())
    assert len(set(archives)) == 1
    with tarfile.open(fileobj=io.BytesIO(archives[0])) as opened:
        members = opened.getmembers()
    last = [member.name for member in members[-3:]]
    assert last == ["verify.py", "manifest.json", "manifest.sha256"]
    assert sum(member.name.endswith(BLOB) for member in members) == 1


def test_caches_below_that_of_the_data_sets_are_packed_once(
    packed: Path, cache: Cache, forgelm: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As cache-tasks --output leaves them."""
    below = cache.home / "datasets"
    for name in ("hub", "modules"):
        (cache.home / name).rename(below / name)
        monkeypatch.setenv(f"HF_{name.upper()}_CACHE", str(below / name))
    assert forgelm("bundle", "--output", "below.tar").code == 0
    assert (tmp_path / "below.tar").read_bytes() == packed.read_bytes()


def test_what_bundle_says(cache: Cache, forgelm: Command, tmp_path: Path) -> None:
    said = forgelm("bundle", "--output", "all.tar", "--output-format", "json", "-q")
    assert said.code == 0
    digest = hashlib.sha256((tmp_path / "all.tar.manifest.json").read_bytes()).hexdigest()
    size = sum(map(len, MODEL.values()))
    assert document(said) == {
        "success": True,
        "bundle": str(tmp_path / "all.tar"),
        "parts": [str(tmp_path / "all.tar")],
        "size_bytes": (tmp_path / "all.tar").stat().st_size,
        "manifest_sha256": digest,
        "repositories": [
            row("dataset", "org/rows", DATA, None, 1, 396),
            row("model", "org/tiny", OLD, "apache-2.0", 4, size + 1),
            row("model", "org/tiny", NEW, "apache-2.0", 4, size),
        ],
        "datasets_cache_files": 2,
        "module_files": 1,
        "left_out": 0,
    }
    assert forgelm("bundle", "--output", "all.tar").out.splitlines() == [
        f"Packed 0.07 MiB into {tmp_path}/all.tar",
        f"  - dataset org/rows at {DATA[:12]}: 1 files, 0.00 MiB",
        f"  - model org/tiny at {OLD[:12]}: 4 files, 0.01 MiB, licence apache-2.0",
        f"  - model org/tiny at {NEW[:12]}: 4 files, 0.01 MiB, licence apache-2.0",
        "  - 2 files of prepared data sets",
        "  - 1 files of metric modules",
        f"SHA-256 of the manifest: {digest}",
    ]
    names = ["all.tar", "all.tar.manifest.json", "all.tar.sha256", "all.tar.verify.py"]
    assert sorted(path.name for path in tmp_path.glob("*all*")) == names
    sums = subprocess.run(["sha256sum", "-c", "all.tar.sha256"], capture_output=True, text=True)
    assert sums.stdout.count(": OK") == 3


@pytest.mark.parametrize("closed", ["2>&-", "<&- 2>&-"])
def test_who_closed_stderr_gets_the_bundle(cache: Cache, tmp_path: Path, closed: str) -> None:
    line = f"exec {sys.executable} -m forgelm bundle --output all.tar --output-format json {closed}"
    done = subprocess.run(["sh", "-c", line], stdout=subprocess.PIPE, cwd=tmp_path)
    assert (done.returncode, json.loads(done.stdout)["success"]) == (0, True)
    assert (tmp_path / "all.tar").read_bytes().isascii() is False


def row(
    kind: str, repo_id: str, commit: str, licence: str | None, files: int, size: int
) -> dict[str, Any]:
    found = {"kind": kind, "id": repo_id, "commit": commit, "licence": licence}
    return {**found, "files": files, "size_bytes": size}


def test_the_manifest_names_every_file(packed: Path) -> None:
    found = manifest_of(packed)
    model = found["repositories"][1]
    assert (model["kind"], model["id"], model["licence"]) == ("model", "org/tiny", "apache-2.0")
    assert model["commits"] == {"main": NEW, OLD: OLD}
    files = {file["path"]: file for file in model["files"]}
    same = {"size": len(WEIGHTS), "sha256": BLOB}
    assert files[f"blobs/{BLOB}"] == {"path": f"blobs/{BLOB}", **same}
    name = f"snapshots/{NEW}/model.safetensors"
    assert files[name] == {"path": name, "link": f"../../blobs/{BLOB}", **same}
    assert files[f"snapshots/{NEW}/sub/a.txt"]["link"].startswith("../../../blobs/")
    assert found["trees"]["datasets"][1]["path"] == f"{PREPARED}/{DATA}/rows-train.arrow"


@pytest.mark.parametrize(
    ("words", "repositories", "prepared"),
    [
        (("--model", "org/tiny"), [("model", NEW)], 0),
        (("--model", f"org/tiny@{OLD}"), [("model", OLD)], 0),
        (("--model", f"org/tiny@{OLD}", "--model", "org/tiny@main"), None, 0),
        (("--dataset", "org/rows"), [("dataset", DATA)], 2),
        (("--dataset", f"org/rows@{DATA}"), [("dataset", DATA)], 2),
    ],
)
def test_a_choice_is_packed_alone(
    cache: Cache,
    forgelm: Command,
    words: tuple[str, ...],
    repositories: list[tuple[str, str]] | None,
    prepared: int,
) -> None:
    said = document(forgelm("bundle", "--output", "some.tar", *words, "--output-format", "json"))
    found = [(one["kind"], one["commit"]) for one in said["repositories"]]
    assert found == (repositories or [("model", OLD), ("model", NEW)])
    assert (said["datasets_cache_files"], said["module_files"]) == (prepared, 0)


def test_parts_make_the_archive(cache: Cache, forgelm: Command, tmp_path: Path) -> None:
    assert forgelm("bundle", "--output", "all.tar").code == 0
    whole = (tmp_path / "all.tar").read_bytes()
    said = forgelm("bundle", "--output", "all.tar", "--part-size", "16k", "--output-format=json")
    parts = [Path(path) for path in document(said)["parts"]]
    assert [path.stat().st_size for path in parts[:-1]] == [16384] * (len(whole) // 16384)
    assert b"".join(path.read_bytes() for path in parts) == whole
    assert not (tmp_path / "all.tar").exists()
    sums = subprocess.run(["sha256sum", "-c", "all.tar.sha256"], capture_output=True, text=True)
    assert sums.stdout.count(": OK") == len(parts) + 2
    for name in ("all.tar", "all.tar.part-000", "all.tar.part-002"):
        assert forgelm("verify", name).code == 0
    assert forgelm("bundle", "--output", "all.tar", "--part-size", "32K").code == 0
    assert len(list(tmp_path.glob("all.tar.part-*"))) == len(whole) // 32768 + 1


@pytest.mark.parametrize("sums", [True, False])
@pytest.mark.parametrize("lost", [1, -1])
def test_a_missing_part_is_named(
    cache: Cache, forgelm: Command, tmp_path: Path, lost: int, sums: bool
) -> None:
    assert forgelm("bundle", "--output", "all.tar", "--part-size", "16K").code == 0
    part = sorted(tmp_path.glob("all.tar.part-*"))[lost]
    part.unlink()
    if not sums:
        (tmp_path / "all.tar.sha256").unlink()
    said = f"{part.name}: missing: this part isn't here"
    if lost < 0 and not sums:
        said = "it was cut off, or parts are missing"
    refused(forgelm("verify", "all.tar.part-000"), said)
    refused(forgelm("import", "all.tar.part-000", "--output", "new"), said)
    assert not (tmp_path / "new").exists()


def test_what_is_wrong_in_the_cache_is_named(
    cache: Cache, forgelm: Command, tmp_path: Path
) -> None:
    root = cache.home / MODEL_ROOT
    flip(root / "blobs" / BLOB, 7)
    flip(root / "blobs" / git_hash(CARD), 7)
    result = forgelm("bundle", "--output", "all.tar")
    refused(
        result,
        f"forgelm: model org/tiny: model.safetensors: its bytes (hash {sha256(root, BLOB)}) "
        f"aren't those that its blob's name, {BLOB}, promises; delete {root / 'blobs' / BLOB}, "
        "then forgelm cache-models --model org/tiny@",
        "forgelm: model org/tiny: README.md: its bytes (hash ",
    )
    assert len(result.err.splitlines()) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home"]


def sha256(root: Path, blob: str) -> str:
    return hashlib.sha256((root / "blobs" / blob).read_bytes()).hexdigest()


def test_what_is_missing_from_the_cache_is_named(
    cache: Cache, forgelm: Command, tmp_path: Path
) -> None:
    snapshot = cache.home / SNAPSHOT
    (snapshot / "config.json").unlink()
    rows = cache.repo("dataset", "org/rows")
    shutil.rmtree(rows / "blobs")
    (rows / "trees" / f"{DATA}.json").unlink()
    (cache.home / "datasets" / "link").symlink_to("nowhere")
    (cache.home / "datasets" / "loop").symlink_to(".")
    result = forgelm("bundle", "--output", "all.tar")
    refused(
        result,
        f"forgelm: model org/tiny, commit {NEW}: config.json missing; "
        f"forgelm cache-models --model org/tiny@{NEW} mends it",
        "forgelm: dataset org/rows: train.parquet is a link to ../../blobs/",
        "not there; fetch it again by forgelm cache or cache-tasks, or leave it out",
        "link is a link to nowhere, not there; delete it",
        "loop is a link to a folder that it lies in; delete it",
    )
    assert len(result.err.splitlines()) == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home"]
    (snapshot / "config.json").symlink_to(f"../../blobs/{git_hash(CARD)}")
    refused(
        forgelm("bundle", "--output", "all.tar", "--model", "org/tiny"),
        f"config.json is a link to blob {git_hash(CARD)}, the hub lists {git_hash(b'{}')}",
    )


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ((), "the following arguments are required: --output"),
        (("--output", "none/all.tar"), "--output "),
        (("--output", "home"), "is a folder; give a file"),
        (("--output", "home/hub/x.tar"), "home/hub, which is packed; give another place"),
        (("--output", "x.tar", "--part-size", "4X"), "--part-size 4X: not a size"),
        (("--output", "x.tar", "--part-size", "10"), "would make more than 1000 parts"),
        (("--output", "x.tar", "--model", "org/tyni"), "did you mean org/tiny?"),
        (("--output", "x.tar", "--model", "org/tiny@v2"), f"has org/tiny@{OLD}, org/tiny@main"),
        (("--output", "x.tar", "--model", "org/tiny@"), "give a hub id, or a hub id@revision"),
        (("--output", "x.tar", "--dataset", "x/y"), "--dataset x/y: not in "),
        (("--output", "x.tar", "--cache-dir", "no"), "--cache-dir no: no such folder"),
        (("--output", "x.tar", "--datasets-cache", "no"), "--datasets-cache no: no such folder"),
        (("--output", "x.tar", "--cache-dir", "home"), "--cache-dir home: holds no repositories"),
        (("--output", "x.tar", "--against", "no"), "--against no: No such file"),
        (("--output", "x.tar", "--against", "bad.json"), "isn't a manifest"),
    ],
)
def test_wrong_requests_to_bundle(
    cache: Cache, forgelm: Command, tmp_path: Path, words: tuple[str, ...], text: str
) -> None:
    (tmp_path / "bad.json").write_text("[]")
    refused(forgelm("bundle", *words), text, code=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.json", "home"]


def test_a_cache_that_is_a_link_to_itself(
    forgelm: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "loop"))
    text = f"{tmp_path / 'loop'}: a link that leads nowhere; name the cache with HF_HOME"
    refused(forgelm("bundle", "--output", "x.tar"), text, code=1)


# Checking


def script(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """The verifier by itself: no packages, nothing from the environment."""
    command = [sys.executable, "-I", "-S", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_verifier_stands_alone(packed: Path, tmp_path: Path) -> None:
    source = Path(verify.__file__).read_text()
    tree = ast.parse(source, feature_version=(3, 9))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
    assert {str(name).partition(".")[0] for name in imported} <= sys.stdlib_module_names
    done = script("all.tar.verify.py", "all.tar")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("28 files, 0.05 MiB: all as the manifest says\nSHA-256 of")
    with tarfile.open(packed) as opened:
        opened.extractall(tmp_path / "unpacked", filter="data")
    place = ("all.tar.manifest.json", "--cache-dir", "unpacked")
    assert script("unpacked/verify.py", *place).returncode == 0
    flip(tmp_path / "unpacked" / WEIGHTS_PATH, 3)
    (tmp_path / "unpacked" / ROWS_PATH).unlink()
    put(tmp_path / "unpacked" / "hub/more", b"")
    done = script("unpacked/verify.py", *place, "--output-format", "json")
    assert done.returncode == 2
    problems = json.loads(done.stdout)["problems"]
    assert {one["path"]: one["problem"].partition(":")[0] for one in problems} == {
        f"{WEIGHTS_PATH} (model.safetensors of model org/tiny)": "differs",
        ROWS_PATH: "missing",
        "hub/more": "extra",
    }
    assert script("all.tar.verify.py", "none.tar").returncode == 1
    assert script("all.tar.verify.py").returncode == 1


def test_what_verify_says(packed: Path, forgelm: Command) -> None:
    said = document(forgelm("verify", "all.tar", "--output-format", "json"))
    digest = hashlib.sha256(Path(f"{packed}.manifest.json").read_bytes()).hexdigest()
    size = said.pop("size_bytes")
    assert size > len(WEIGHTS)
    assert said == {"success": True, "files": 28, "manifest_sha256": digest, "problems": []}
    flip(packed, offset_of(packed, WEIGHTS_PATH) + 100)
    failed = forgelm("verify", "all.tar", "--output-format", "json")
    assert failed.code == 2
    said = document(failed)
    (problem,) = said["problems"]
    assert (said["success"], said["error_class"]) == (False, "RunError")
    assert problem["path"] == f"{WEIGHTS_PATH} (model.safetensors of model org/tiny)"
    assert problem["problem"].startswith("differs: its SHA-256 is ")
    assert said["error"] == f"{problem['path']}: {problem['problem']}"


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("none.tar",), "none.tar: no such file; give the archive, its first part, or"),
        (("none.json",), "none.json: no such file"),
        (("all.tar.manifest.json", "--cache-dir", "none"), "none: no such folder"),
        (("all.tar.manifest.json", "--cache-dir", "empty"), "--cache-dir empty: an empty folder;"),
        (("all.tar", "--cache-dir", "home"), "--cache-dir home: goes with a manifest; give all.ta"),
        (("home",), "home: a folder; give the archive, its first part, or FILE.manifest.json"),
        (("empty",), "empty: an empty folder; give the archive, its first part, or FILE.man"),
        ((".",), ".: a folder; give the archive in it: all.tar"),
        (("all.tar.sha256",), "all.tar.sha256: lies beside an archive; give that: all.tar"),
        (
            ("unpacked",),
            "unpacked: a folder that a bundle was unpacked in; give unpacked/manifest.",
        ),
        (("audit_log.jsonl",), "an audit log; forgelm verify-audit audit_log.jsonl checks it"),
    ],
)
def test_wrong_requests_to_verify(
    packed: Path, forgelm: Command, words: tuple[str, ...], text: str
) -> None:
    others(packed)
    result = forgelm("verify", *words)
    refused(result, text, code=1)
    assert len(result.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("none.tar", "none.tar: no such file; give the archive, or its first part"),
        ("empty", "empty: an empty folder; give the archive, or its first part"),
        ("all.tar.manifest.json", "lies beside an archive; give that: all.tar"),
        ("unpacked", "it needs no import: export HF_HOME="),
    ],
)
def test_wrong_requests_to_import(packed: Path, forgelm: Command, name: str, text: str) -> None:
    others(packed)
    result = forgelm("import", name, "--output", "new")
    refused(result, text, code=1)
    assert len(result.err.splitlines()) == 1
    assert not packed.with_name("new").exists()


def others(archive: Path) -> None:
    """What else may lie where an archive is looked for."""
    archive.with_name("empty").mkdir()
    put(archive.with_name("unpacked") / "manifest.json", b"{}")
    put(archive.with_name("audit_log.jsonl"), b"{}")


def offset_of(archive: Path, name: str) -> int:
    with tarfile.open(archive) as opened:
        return opened.getmember(name).offset_data


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_no_flipped_bit_passes(packed: Path) -> None:
    data = packed.read_bytes()
    with tarfile.open(packed) as opened:
        members = opened.getmembers()
    spans = {m.name: range(m.offset_data, m.offset_data + m.size) for m in members}
    for place in {*range(0, len(data), 41), *range(len(data) - 4096, len(data), 7)}:
        packed.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        problems = verify.check_archive(packed).problems
        assert problems, place
        for name, span in spans.items():
            if place in span and name not in (verify.MANIFEST, verify.SEAL):
                assert [one.path.partition(" (")[0] for one in problems] == [name]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.99, 1.01])
def test_a_cut_archive_is_refused(
    packed: Path, forgelm: Command, tmp_path: Path, share: float
) -> None:
    data = packed.read_bytes()
    packed.write_bytes((data + bytes(len(data)))[: int(len(data) * share)])
    text = "all.tar: ends early, after " if share < 1 else "all.tar: something follows its end"
    refused(forgelm("verify", "all.tar"), text)
    refused(
        forgelm("import", "all.tar", "--output", "new"),
        text.removeprefix("all.tar: "),
        f"{packed.name}: refused, and nothing of it was imported",
    )
    assert not (tmp_path / "new").exists()


def test_another_file_is_no_archive(packed: Path, forgelm: Command) -> None:
    packed.write_bytes(WEIGHTS)
    refused(forgelm("verify", "all.tar"), "a damaged header at byte 0, or no archive")


def test_a_compressed_archive_is_told(packed: Path, forgelm: Command) -> None:
    packed.write_bytes(gzip.compress(packed.read_bytes()))
    refused(forgelm("verify", "all.tar"), "all.tar: was packed by gzip; unpack it by that first")


@pytest.mark.parametrize(
    "how",
    [
        ["--format=gnu", "hub", "datasets", "modules", "verify.py", "manifest.json"],
        ["--format=posix", "."],
        ["--format=ustar", "--sort=name", "--owner=0", "--group=0", "--mtime=@0", "hub"],
    ],
    ids=lambda how: how[0],
)
def test_a_repacked_archive_is_told_in_a_line(
    packed: Path, forgelm: Command, tmp_path: Path, how: list[str]
) -> None:
    folder = tmp_path / "unpacked"
    folder.mkdir()
    subprocess.run(["tar", "xf", str(packed), "-C", str(folder)], check=True)
    subprocess.run(["tar", "cf", str(packed), "-C", str(folder), *how], check=True)
    said = " headers aren't those that forgelm bundle writes (owners, times, folders); carry"
    result = forgelm("verify", "all.tar")
    refused(result, "forgelm: all.tar: looks repacked: ", said)
    assert len(result.err.splitlines()) == 1
    result = forgelm("import", "all.tar", "--output", "new")
    refused(result, "forgelm: all.tar: looks repacked: ", said, "nothing of it was imported")
    assert len(result.err.splitlines()) == 2
    assert not (tmp_path / "new").exists()
    place = ("all.tar.manifest.json", "--cache-dir", "unpacked")
    assert forgelm("verify", *place).code == 0


def test_of_many_problems_the_first_are_said(
    packed: Path, cache: Cache, forgelm: Command, tmp_path: Path
) -> None:
    """As text; a program is given all."""
    with tarfile.open(packed) as opened:
        opened.extractall(tmp_path / "unpacked", filter="data")
    shutil.rmtree(tmp_path / "unpacked" / "hub")
    place = ("all.tar.manifest.json", "--cache-dir", "unpacked")
    found = document(forgelm("verify", *place, "--output-format", "json"))["problems"]
    lines = forgelm("verify", *place).err.splitlines()
    assert lines[0] == f"forgelm: {found[0]['path']}: {found[0]['problem']}"
    assert lines[10:] == [f"forgelm: and {len(found) - 10} more"]
    assert script("all.tar.verify.py", *place).stderr.splitlines()[10:] == [
        f"verify.py: and {len(found) - 10} more"
    ]
    files = {f"datasets/{number:02d}": b"." for number in range(20)}
    bad = craft(tmp_path / "bad.tar", {}, files)
    lines = forgelm("import", bad.name, "--output", "new").err.splitlines()
    assert lines[9:] == [
        "forgelm: bad.tar: datasets/09: extra: not in the manifest",
        "forgelm: bad.tar: and 10 more",
        "forgelm: bad.tar: refused, and nothing of it was imported",
    ]


def test_a_manifest_swapped_with_all_its_hashes_differs_from_the_sidecar(
    packed: Path, cache: Cache, forgelm: Command
) -> None:
    sums = Path(f"{packed}.sha256").read_text()
    put(cache.home / ROWS_PATH, b"other")
    assert forgelm("bundle", "--output", "all.tar").code == 0
    Path(f"{packed}.sha256").write_text(sums)
    refused(forgelm("verify", "all.tar"), "differs: the file beside the archive says SHA-256 ")


@pytest.mark.parametrize(
    ("name", "size", "link"),
    [
        ("hub/models--a/blobs/x", 5, None),
        ("hub/models--a/blobs/x", 9 << 30, None),
        ("hub/models--a/blobs/" + "y" * 90, 5, None),
        ("datasets/é", 8**11, None),
        ("hub/models--a/snapshots/" + "c" * 90, 0, "../../" + "d" * 110),
    ],
)
def test_headers_are_what_tar_reads(name: str, size: int, link: str | None) -> None:
    with tarfile.open(fileobj=io.BytesIO(verify.header(name, size, link))) as opened:
        (member,) = [opened.next()]
    assert member is not None
    assert (member.name, member.size, member.linkname) == (name, size, link or "")
    assert (member.mtime, member.uid, member.gid, member.uname) == (0, 0, 0, "")


# Attacks


Change = Callable[[dict[str, Any]], None]


def craft(
    path: Path,
    files: dict[str, bytes],
    extra: dict[str, bytes] | None = None,
    change: Change | None = None,
) -> Path:
    """A bundle with a right seal, whose manifest and files are the attacker's choice."""
    listed = [
        {"path": name, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in files.items()
    ]
    manifest = {
        "format": 1,
        "files": [],
        "repositories": [],
        "trees": {"datasets": [{**one, "path": one["path"][9:]} for one in listed]},
        "latest": [],
    }
    if change is not None:
        change(manifest)
    data = json.dumps(manifest).encode()
    seal = verify.seal(hashlib.sha256(data).hexdigest())
    with path.open("wb") as out:
        for name, content in [*files.items(), *(extra or {}).items()]:
            out.write(verify.header(name, len(content)) + content + verify.padding(len(content)))
        for name, content in ((verify.MANIFEST, data), (verify.SEAL, seal)):
            out.write(verify.header(name, len(content)) + content + verify.padding(len(content)))
        out.write(verify.end())
    return path


def repo_with(**changes: Any) -> Change:
    """A manifest with a repository of one file that is somehow wrong."""
    blob = {"path": f"blobs/{BLOB}", "size": len(WEIGHTS), "sha256": BLOB}
    repo = {"kind": "model", "id": "org/tiny", "commits": {"main": NEW}, "licence": None}

    def change(manifest: dict[str, Any]) -> None:
        files = changes.get("files", [])
        manifest["repositories"] = [{**repo, "files": [blob, *files], **changes.get("repo", {})}]

    return change


def link_to(target: str, path: str = f"snapshots/{NEW}/model.safetensors") -> dict[str, Any]:
    return {"path": path, "link": target, "size": len(WEIGHTS), "sha256": BLOB}


LISTED = {"path": "refs/main", "size": 2, "sha256": hashlib.sha256(b"..").hexdigest()}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda m: m.update(format=2), "is of format 2, this is for format 1"),
        (lambda m: m.pop("trees"), "isn't a manifest (KeyError: 'trees')"),
        (lambda m: m["trees"]["datasets"].append({"path": 1}), "isn't a manifest"),
        (lambda m: m["trees"]["datasets"][0].update(path="../x"), "leaves the target"),
        (lambda m: m["trees"]["datasets"][0].update(size=-1), "size -1"),
        (lambda m: m["trees"]["datasets"].append(m["trees"]["datasets"][0]), "a file twice"),
        (lambda m: m.update(latest=["datasets/../.."]), "is no prepared data set"),
        (repo_with(repo={"id": "../../x"}), "'../../x' is no repository"),
        (repo_with(repo={"kind": "mod"}), "'mod' 'org/tiny' is no repository"),
        (repo_with(repo={"commits": {"main": ".."}}), "main stands for '..', no commit"),
        (repo_with(files=[LISTED]), "refs/main holds no commit of the manifest's"),
        (repo_with(files=[link_to("/etc/passwd")]), "a link to /etc/passwd, not to a blob of"),
        (repo_with(files=[link_to(f"../../../x/blobs/{BLOB}")]), "not to a blob of its repo"),
        (repo_with(files=[link_to(f"../blobs/{BLOB}", "blobs/y")]), "not to a blob of its repo"),
        (repo_with(files=[link_to("../../blobs/none")]), "not to a blob of its repository"),
        (repo_with(files=[{**link_to(f"../../blobs/{BLOB}"), "size": 1}]), "of another size or"),
        (repo_with(files=[{**LISTED, "path": "other"}]), "no part of a repository in the hub's"),
        (repo_with(files=[{**LISTED, "path": f"blobs/{BLOB}/x"}]), "below a file or a link"),
        (repo_with(files=[{**LISTED, "path": f"snapshots/{NEW}/x"}]), "a snapshot's file is a"),
        (repo_with(files=[{**LISTED, "path": f"blobs/{'0' * 64}"}]), "not what it is named by"),
    ],
)
def test_manifests_that_nobody_wrote_honestly(
    forgelm: Command, tmp_path: Path, change: Change, text: str
) -> None:
    path = craft(tmp_path / "bad.tar", {"datasets/a": b"a"}, {WEIGHTS_PATH: WEIGHTS}, change)
    refused(forgelm("verify", "bad.tar"), text)
    refused(forgelm("import", "bad.tar", "--output", "new"), text, "nothing of it was imported")
    assert [one.name for one in tmp_path.iterdir()] == [path.name]


def odd(kind: bytes = tarfile.REGTYPE, name: str = "datasets/x", link: str = "") -> bytes:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, link
    return member.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize(
    ("member", "text"),
    [
        (verify.header("/tmp/x", 0), "/tmp/x: unsafe: an absolute path"),
        (verify.header("datasets/../../x", 0), "datasets/../../x: unsafe: leaves the target"),
        (verify.header("../x", 0), "../x: unsafe: leaves the target"),
        (verify.header("x", 0), "x: unsafe: neither in hub/ nor in datasets/"),
        (verify.header("hub/x", 0), "hub/x: unsafe: neither in hub/ nor in datasets/"),
        (verify.header("datasets//x", 0), "datasets//x: unsafe: not a plain path"),
        (verify.header("datasets/a\nb", 0), "unsafe: not a plain path"),
        (verify.header("datasets/x", 0, "/etc"), "datasets/x: unsafe: a link to /etc, not to a"),
        (verify.header(f"{SNAPSHOT}/x", 0, "../../../.."), "unsafe: a link to ../../../.."),
        (verify.header("datasets/a", 0), "datasets/a: unsafe: twice in the archive"),
        (verify.header("datasets/a/b", 0), "datasets/a/b: extra: not in the manifest"),
        (odd(tarfile.LNKTYPE, link="datasets/a"), "datasets/x: unsafe: a hard link"),
        (odd(tarfile.CHRTYPE), "datasets/x: unsafe: a device"),
        (odd(tarfile.BLKTYPE), "datasets/x: unsafe: a device"),
        (odd(tarfile.FIFOTYPE), "datasets/x: unsafe: a pipe"),
        (odd(tarfile.DIRTYPE), "datasets/x/: unsafe: a folder"),
        (odd(tarfile.GNUTYPE_SPARSE), "datasets/x: unsafe: of type b'S'"),
        (odd(), "datasets/x: unsafe: a header other than forgelm bundle writes"),
    ],
)
def test_members_that_no_bundle_has(
    forgelm: Command, tmp_path: Path, member: bytes, text: str
) -> None:
    path = craft(tmp_path / "bad.tar", {"datasets/a": b"a"})
    data = path.read_bytes()
    # Behind the first file, so that it could stand for it.
    path.write_bytes(data[:1024] + member + data[1024:])
    refused(forgelm("verify", "bad.tar"), text)
    refused(forgelm("import", "bad.tar", "--output", "new"), text, "nothing of it was imported")
    assert [one.name for one in tmp_path.iterdir()] == [path.name]


def test_a_blob_under_a_git_hash_that_isn_t_its_own(packed: Path, forgelm: Command) -> None:
    """The manifest agrees with the bytes, only the name doesn't."""
    wrong = git_hash(b"another")
    path = craft(
        packed.with_name("bad.tar"),
        {},
        {f"{MODEL_ROOT}/blobs/{wrong}": b"mine"},
        lambda m: m["repositories"].append(
            {
                "kind": "model",
                "id": "org/tiny",
                "commits": {},
                "licence": None,
                "files": [
                    {
                        "path": f"blobs/{wrong}",
                        "size": 4,
                        "sha256": hashlib.sha256(b"mine").hexdigest(),
                    }
                ],
            }
        ),
    )
    text = f"differs: git's hash of it is {git_hash(b'mine')}, not what it is named by"
    refused(forgelm("verify", path.name), text)
    refused(forgelm("import", path.name), text)


@pytest.mark.parametrize(
    ("place", "text"),
    [
        (f"{MODEL_ROOT}/blobs", "unsafe: {}/new/{} is a link that leaves {}/new/hub"),
        (MODEL_ROOT, "unsafe: {}/new/{} is a link that leaves {}/new/hub"),
        ("datasets/org___rows", "unsafe: {}/new/{} is a link that leaves {}/new/datasets"),
    ],
)
def test_folders_that_are_links_elsewhere(
    packed: Path, forgelm: Command, tmp_path: Path, place: str, text: str
) -> None:
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "new" / place
    link.parent.mkdir(parents=True)
    link.symlink_to(tmp_path / "elsewhere")
    before = contents(tmp_path / "new")
    refused(forgelm("import", "all.tar", "--output", "new"), text.format(tmp_path, place, tmp_path))
    assert contents(tmp_path / "new") == before
    assert not any((tmp_path / "elsewhere").iterdir())


# Importing


def test_what_import_says(packed: Path, forgelm: Command, tmp_path: Path) -> None:
    words = ("import", "all.tar", "--output", "new home")
    size = sum(map(len, MODEL.values()))
    result = forgelm(*words)
    assert result.code == 0
    assert result.err == ""
    assert result.out.splitlines() == [
        f"Imported 3 snapshot(s) into {tmp_path}/new home/hub",
        f"  - dataset org/rows at {DATA[:12]}: 1 files, 1 of them new, 0.00 MiB",
        f"  - model org/tiny at {OLD[:12]}: 4 files, 4 of them new, 0.01 MiB",
        f"  - model org/tiny at {NEW[:12]}: 4 files, 4 of them new, 0.01 MiB",
        f"2 files of prepared data sets in {tmp_path}/new home/datasets",
        "1 files of metric modules",
        "set these where they are to be used:",
        f"export HF_HOME='{tmp_path}/new home'",
    ]
    again = document(forgelm(*words, "--output-format", "json"))
    model = {"kind": "model", "id": "org/tiny", "files": 4, "new_files": 0}
    assert again == {
        "success": True,
        "imported": [
            {
                **model,
                "kind": "dataset",
                "id": "org/rows",
                "commit": DATA,
                "files": 1,
                "size_bytes": 396,
            },
            {**model, "commit": OLD, "size_bytes": size + 1},
            {**model, "commit": NEW, "size_bytes": size},
        ],
        "datasets_cache_files": 2,
        "module_files": 1,
        "cache_dir": f"{tmp_path}/new home/hub",
        "datasets_cache": f"{tmp_path}/new home/datasets",
        "exports": {"HF_HOME": f"{tmp_path}/new home"},
    }


def test_a_bundle_of_what_was_imported_is_the_same(
    packed: Path, cache: Cache, forgelm: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "new"))
    result = forgelm("import", "all.tar")
    assert result.code == 0
    assert "export" not in result.out
    assert forgelm("verify", "all.tar.manifest.json").out.startswith("20 files, ")
    assert forgelm("bundle", "--output", "again.tar").code == 0
    assert (tmp_path / "again.tar").read_bytes() == packed.read_bytes()
    flip(tmp_path / "new" / WEIGHTS_PATH, 0)
    refused(forgelm("verify", "all.tar.manifest.json"), f"{WEIGHTS_PATH} (model.safetensors of")


def test_a_cache_in_use_is_merged_into(
    packed: Path, forgelm: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is right stays the very file it was, what is wrong is replaced, the rest is kept."""
    there = Cache(tmp_path / "there")
    theirs = {"config.json": b"newer", "model.safetensors": WEIGHTS}
    folder = there.add("model", "org/tiny", theirs, "e" * 40)
    record = {
        "revisions": {"main": "e" * 40, "v1": "e" * 40},
        "wanted": {"e" * 40: None, NEW: ["README.md"]},
        "verified": {"f" * 40: [1, 2]},
        "licence": "mit",
    }
    put(folder / ".forgelm.json", json.dumps(record).encode())
    put(folder / "blobs" / git_hash(CARD), b"wrong")
    prepared = there.prepare(DATA, b"wrong")
    put(prepared / "cache-1.arrow", b"mapped")
    before = (folder / "blobs" / BLOB).stat()
    monkeypatch.setenv("HF_HUB_CACHE", str(there.hub))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(there.home / "datasets"))
    monkeypatch.setenv("HF_HOME", str(there.home))
    result = forgelm("import", "all.tar", "--output-format", "json")
    assert result.err == f"warning: model org/tiny: main was {'e' * 40}, is now {NEW}\n"
    rows = {one["commit"]: one["new_files"] for one in document(result)["imported"]}
    assert rows == {DATA: 1, OLD: 4, NEW: 4}
    after = (folder / "blobs" / BLOB).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert (folder / "blobs" / git_hash(CARD)).read_bytes() == CARD
    assert (folder / "snapshots" / ("e" * 40) / "config.json").read_bytes() == b"newer"
    assert (prepared / "rows-train.arrow").read_bytes() == b"arrow" * 99
    assert (prepared / "cache-1.arrow").read_bytes() == b"mapped"
    repo = hubcache.CachedRepo(there.hub, "model", "org/tiny")
    found = repo.record()
    assert found.revisions == {"main": "e" * 40, "v1": "e" * 40}
    assert found.wanted == {"e" * 40: None, NEW: ["README.md"]}
    assert found.licence == "apache-2.0"
    assert found.verified[BLOB] == hubcache.stamp(repo.blob(BLOB))
    assert found.verified["f" * 40] == (1, 2)
    assert repo.refs() == {"main": NEW}
    assert not list(there.home.rglob(".forgelm-*"))


def test_a_verified_blob_isn_t_read_again_and_one_that_changed_is(
    packed: Path, forgelm: Command, tmp_path: Path
) -> None:
    words = ("import", "all.tar", "--output", "new", "--output-format", "json")
    assert forgelm(*words).code == 0
    blob = tmp_path / "new" / WEIGHTS_PATH
    flip(blob, 5)
    rows = document(forgelm(*words))["imported"]
    assert [one["new_files"] for one in rows] == [0, 1, 1]
    assert blob.read_bytes() == WEIGHTS


def test_cheap_copies_of_lists_stay(packed: Path, forgelm: Command, tmp_path: Path) -> None:
    """The hub's client and forgelm write the same list in other bytes."""
    there = Cache(tmp_path / "new")
    folder = there.add("model", "org/tiny", MODEL, NEW)
    tree = folder / "trees" / f"{NEW}.json"
    tree.write_text(json.dumps(json.loads(tree.read_text()), indent=3))
    before = tree.read_bytes()
    assert forgelm("import", "all.tar", "--output", "new").code == 0
    assert tree.read_bytes() == before


def test_targets_by_flags(packed: Path, forgelm: Command, tmp_path: Path) -> None:
    result = forgelm("import", "all.tar", "--cache-dir", "a/hub", "--datasets-cache", "b")
    assert result.out.splitlines()[-2:] == [
        f"export HF_HUB_CACHE={tmp_path}/a/hub",
        f"export HF_DATASETS_CACHE={tmp_path}/b",
    ]
    place = ("--cache-dir", "a/hub", "--datasets-cache", "b")
    assert forgelm("verify", "all.tar.manifest.json", *place).code == 0
    (tmp_path / "b" / ROWS_PATH.removeprefix("datasets/")).unlink()
    refused(
        forgelm("verify", "all.tar.manifest.json", *place),
        f"{ROWS_PATH}: missing: not at {tmp_path}/b/{PREPARED}/{DATA}/rows-train.arrow",
    )


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"HF_HOME": "~/x"},
        {"XDG_CACHE_HOME": "/y", "HF_HUB_CACHE": "$HOME/z"},
        {"HF_HOME": "h", "HUGGINGFACE_HUB_CACHE": "/q", "HF_DATASETS_CACHE": "d"},
    ],
)
def test_the_verifier_looks_where_forgelm_does(environment: dict[str, str]) -> None:
    places = verify.default_places(environment)
    assert places["hub"] == hubcache.hub_cache(environment)
    assert places["datasets"] == hubcache.datasets_cache(environment)


def test_of_several_preparations_the_newest_stays_the_newest(
    cache: Cache, forgelm: Command, tmp_path: Path
) -> None:
    for name, changed in (("e" * 40, 1000), (DATA, 1005), ("f" * 40, 1000)):
        os.utime(cache.prepare(name), (changed, changed))
    assert forgelm("bundle", "--output", "all.tar").code == 0
    assert forgelm("import", "all.tar", "--output", "new").code == 0
    folders = list((tmp_path / "new/datasets" / PREPARED).iterdir())
    assert max(folders, key=lambda path: path.stat().st_mtime_ns).name == DATA
    assert len(folders) == 3


def test_an_increment_carries_what_is_new(cache: Cache, forgelm: Command, tmp_path: Path) -> None:
    assert forgelm("bundle", "--output", "first.tar").code == 0
    cache.add("model", "org/tiny", {**MODEL, "config.json": b"third"}, "9" * 40)
    against = ("--against", "first.tar.manifest.json")
    said = document(forgelm("bundle", "--output", "next.tar", *against, "--output-format", "json"))
    assert said["left_out"] == 9
    with tarfile.open(tmp_path / "next.tar") as opened:
        names = opened.getnames()
    blobs = [name for name in names if "/blobs/" in name]
    assert blobs == [f"{MODEL_ROOT}/blobs/{git_hash(b'third')}"]
    marked = [
        file["path"]
        for repo in manifest_of(tmp_path / "next.tar")["repositories"]
        for file in repo["files"]
        if file.get("left_out")
    ]
    assert f"blobs/{BLOB}" in marked
    assert forgelm("verify", "next.tar").code == 0
    failed = forgelm("import", "next.tar", "--output", "new")
    refused(
        failed,
        f"{WEIGHTS_PATH} (model.safetensors of model org/tiny): left out of this bundle, and not "
        f"in {tmp_path}/new/{WEIGHTS_PATH}",
        "next.tar: import the bundle that it was made against first",
    )
    assert not (tmp_path / "new").exists()
    assert forgelm("import", "first.tar", "--output", "new").code == 0
    assert forgelm("import", "next.tar", "--output", "new").code == 0
    snapshot = tmp_path / "new" / MODEL_ROOT / "snapshots" / ("9" * 40)
    assert (snapshot / "config.json").read_bytes() == b"third"
    assert (snapshot / "model.safetensors").read_bytes() == WEIGHTS
    assert (tmp_path / "new" / MODEL_ROOT / "refs/main").read_text() == "9" * 40


def test_left_out_is_what_has_the_same_bytes(
    cache: Cache, forgelm: Command, tmp_path: Path
) -> None:
    assert forgelm("bundle", "--output", "first.tar").code == 0
    rows = cache.home / ROWS_PATH
    rows.write_bytes(rows.read_bytes()[::-1])
    against = ("--against", "first.tar.manifest.json")
    assert forgelm("bundle", "--output", "next.tar", *against).code == 0
    with tarfile.open(tmp_path / "next.tar") as opened:
        assert ROWS_PATH in opened.getnames()
    flip(cache.home / WEIGHTS_PATH, 0)
    refused(forgelm("bundle", "--output", "next.tar", *against), "model.safetensors: its bytes")


def killed(step: int, *words: str) -> int:
    """Run a command in a process that is killed at its `step`th renaming; its wait status."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    done = 0

    def counted(real: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: Any) -> None:
            nonlocal done
            done += 1
            if done == step:
                os.kill(os.getpid(), signal.SIGKILL)
            real(*arguments)

        return call

    os.replace, os.rename = counted(os.replace), counted(os.rename)  # type: ignore[assignment]
    os._exit(main(list(words)))


def test_an_import_that_was_killed_is_done_again(
    packed: Path, forgelm: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every renaming: what is there is right, the next try ends it and leaves nothing."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "new"))
    _, entries = verify.parse(Path(f"{packed}.manifest.json").read_bytes())
    step = 1
    while os.WIFSIGNALED(killed(step, "import", "all.tar", "-q")):
        for path, entry in entries.items():
            file = tmp_path / "new" / path
            if file.is_symlink() or file.exists():
                changes = path.endswith(".forgelm.json")
                assert changes or verify.wrong_on_disk(entry, file) is None, path
        for ref in (tmp_path / "new/hub").glob("*/refs/*"):
            if not ref.name.startswith("."):
                assert (ref.parent.parent / "snapshots" / ref.read_text()).is_dir()
        assert list((tmp_path / "new").rglob(".forgelm-*"))
        assert forgelm("import", "all.tar", "-q").code == 0
        assert not list((tmp_path / "new").rglob(".forgelm-*"))
        assert forgelm("verify", "all.tar.manifest.json").code == 0
        shutil.rmtree(tmp_path / "new")
        step += 1
    assert step > 20


def test_a_bundle_that_was_killed_leaves_nothing_that_stays(
    cache: Cache, forgelm: Command, tmp_path: Path
) -> None:
    assert os.WIFSIGNALED(killed(1, "bundle", "--output", "all.tar", "-q"))
    assert not (tmp_path / "all.tar").exists()
    assert len(list(tmp_path.glob(".forgelm-*"))) == 1
    assert forgelm("bundle", "--output", "all.tar").code == 0
    assert list(tmp_path.glob(".*")) == []


Disk = Callable[[str], Path]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """Disks of their own with these options, where this user may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("a disk can only be mounted by root")

    def mount(options: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
        if subprocess.run(command, capture_output=True).returncode != 0:
            pytest.skip("no disk can be mounted here")
        return place

    yield mount
    subprocess.run(["umount", "-l", str(place)], capture_output=True)


def test_room_is_looked_for_before_anything_is_written(
    cache: Cache, forgelm: Command, disk: Disk
) -> None:
    cache.add("model", "org/large", {"model.safetensors": bytes(300_000)}, NEW)
    assert forgelm("bundle", "--output", "all.tar").code == 0
    place = disk("size=256k")
    result = forgelm("bundle", "--output", f"{place}/all.tar")
    refused(result, f"no space left for {place}: 0.", "are free; make room, or choose another")
    result = forgelm("import", "all.tar", "--output", f"{place}/new")
    refused(result, f"no space left for {place}/new/", "are free; make room, or choose another")
    assert [path for path in place.rglob("*") if path.is_file()] == []


def test_a_disk_that_fills_up_meanwhile(packed: Path, forgelm: Command, disk: Disk) -> None:
    """There is room for the bytes, not for so many files."""
    place = disk("size=4m,nr_inodes=24")
    result = forgelm("import", "all.tar", "--output", f"{place}/new")
    refused(result, f"no space left for {place}/new/", "; make room, and run it again")
    assert [path for path in place.rglob("*") if path.is_file()] == []


# With the real clients


LOAD = """
import json, sys
from datasets import load_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer

model = AutoModelForSequenceClassification.from_pretrained("org/tiny")
reader = AutoTokenizer.from_pretrained("org/tiny")
rows = load_dataset("nyu-mll/glue", "rte")
inputs = reader([list(rows["train"][0].values())[:2]], return_tensors="pt")
print("RESULT " + json.dumps([model(**inputs).logits.tolist(), rows["train"][3]]))
"""


def load(home: Path, url: str, offline: bool) -> str:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
    names = {"HF_HOME": str(home), "HF_ENDPOINT": url, "HF_HUB_OFFLINE": str(int(offline))}
    quiet = {"HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1,localhost"}
    done = subprocess.run(
        [sys.executable, "-c", LOAD],
        env={**kept, **names, **quiet},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert "RESULT" in done.stdout, done.stderr
    return done.stdout.partition("RESULT ")[2]


def test_what_was_carried_loads_offline(
    forgelm: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with HubServer() as server:
        server.add_repo("model", "org/tiny", model_repo(2, seed=1))
        server.add_repo("dataset", "nyu-mll/glue", glue_repo())
        online = load(tmp_path / "home", server.url, offline=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    chosen = ("--model", "org/tiny", "--dataset", "nyu-mll/glue")
    assert forgelm("bundle", "--output", "all.tar", *chosen).code == 0
    assert forgelm("import", "all.tar", "--output", "new").code == 0
    (tmp_path / "home").rename(tmp_path / "gone")
    assert load(tmp_path / "new", "http://127.0.0.1:9", offline=True) == online
