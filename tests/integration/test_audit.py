"""The audit log: what is written, what is found when it is changed, and what a crash leaves."""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Command

from forgelm.airgap import audit
from forgelm.airgap.audit import BROKEN, HEAD, LOG, AuditLog

Change = Callable[[Path], object]


@pytest.fixture(autouse=True)
def _operator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORGELM_OPERATOR", "ops@example.org")
    monkeypatch.delenv("FORGELM_AUDIT_SECRET", raising=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A log of four lines by two commands."""
    made = tmp_path / "cache"
    for name in ("org/one", "org/two"):
        log = AuditLog.open(made)
        log.write("cache.populate_models_requested", models=[name], cache_dir=made)
        log.write("cache.populate_models_completed", models=[name], total_size_bytes=7, count=1)
    return made


def lines(folder: Path) -> list[bytes]:
    return (folder / LOG).read_bytes().splitlines(keepends=True)


def entries(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in lines(folder)]


def test_lines_are_chained(folder: Path, forgelm: Command) -> None:
    first, second, third, _ = entries(folder)
    assert list(first) == [
        "timestamp", "run_id", "operator", "event", "prev_hash", "models", "cache_dir",
    ]  # fmt: skip
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:.]+\+00:00", str(first["timestamp"]))
    assert re.fullmatch(r"fg-[0-9a-f]{12}", str(first["run_id"]))
    assert first["operator"] == "ops@example.org"
    assert first["prev_hash"] == "genesis"
    assert second["prev_hash"] == hashlib.sha256(lines(folder)[0].rstrip(b"\n")).hexdigest()
    assert first["run_id"] == second["run_id"] != third["run_id"]
    head = hashlib.sha256(lines(folder)[-1].rstrip(b"\n")).hexdigest()
    for path in (folder, folder / LOG):
        done = forgelm("verify-audit", str(path), "--output-format", "json")
        assert done.code == 0
        assert json.loads(done.out) == {
            "success": True, "path": str(folder / LOG), "lines": 4, "head": head, "problems": [],
        }  # fmt: skip
    assert forgelm("verify-audit", str(folder)).out == (
        f"{folder / LOG}: 4 line(s), whole; head {head}\n"
    )


def swap(folder: Path) -> None:
    one, two, three, four = lines(folder)
    (folder / LOG).write_bytes(one + three + two + four)


def put(folder: Path, content: bytes) -> None:
    (folder / LOG).write_bytes(content)


def edit_head(folder: Path, **values: object) -> None:
    head = json.loads((folder / HEAD).read_text())
    (folder / HEAD).write_text(json.dumps({**head, **values}))


CHANGES: dict[str, tuple[Change, int | None, str]] = {
    "edited": (
        lambda f: put(f, b"".join(lines(f)).replace(b"org/one", b"org/six", 1)),
        2,
        "its prev_hash isn't the hash of line 1: that one was changed",
    ),
    "swapped": (swap, 2, "its prev_hash isn't the hash of line 1"),
    "deleted": (
        lambda f: put(f, b"".join([lines(f)[0], *lines(f)[2:]])),
        2,
        "lines were moved, put in or deleted",
    ),
    "first deleted": (
        lambda f: put(f, b"".join(lines(f)[1:])),
        1,
        "its prev_hash isn't 'genesis': lines before it were deleted",
    ),
    "tail cut": (
        lambda f: put(f, b"".join(lines(f)[:2])),
        3,
        "the head counts 4 lines: 2 at the end are gone",
    ),
    "last edited": (
        lambda f: put(f, b"".join(lines(f)[:3]) + lines(f)[3].replace(b"org/two", b"org/six")),
        4,
        "isn't the last line that the head names: it was changed",
    ),
    "added": (
        lambda f: put(f, b"".join(lines(f)) + lines(f)[3]),
        5,
        "the head counts 4 lines: 1 at the end were added",
    ),
    "half a line": (
        lambda f: put(f, b"".join(lines(f)) + lines(f)[3][:20]),
        5,
        "is cut off, and the head doesn't know it",
    ),
    "rubbish": (
        lambda f: put(f, lines(f)[0] + b"rubbish\n" + b"".join(lines(f)[2:])),
        2,
        "isn't a line of an audit log",
    ),
    "no head": (
        lambda f: (f / HEAD).unlink(),
        None,
        f"{HEAD} is missing: whether lines were cut off isn't known",
    ),
    "head damaged": (lambda f: (f / HEAD).write_text("{"), None, f"{HEAD} is damaged"),
    "log gone": (lambda f: (f / LOG).unlink(), None, f"{HEAD} is there, and {LOG} is gone"),
    "emptied": (lambda f: put(f, b""), 1, "the head counts 4 lines: 4 at the end are gone"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_found_said_and_never_forgotten(
    name: str, folder: Path, forgelm: Command, caplog: pytest.LogCaptureFixture
) -> None:
    change, line, problem = CHANGES[name]
    change(folder)
    done = forgelm("verify-audit", str(folder), "--output-format=json")
    assert done.code == 2
    found = json.loads(done.out)
    assert found["success"] is False
    assert found["problems"][0]["line"] == line
    assert problem in found["error"]
    said = forgelm("verify-audit", str(folder))
    assert said.out == ""
    assert problem in said.err
    if name == "log gone":
        return
    kept = (folder / LOG).read_bytes()
    for _ in range(2):
        log = AuditLog.open(folder)
        log.write("cache.populate_tasks_requested", tasks=["a"])
        log.write("cache.populate_tasks_failed", tasks=["a"])
    assert len(caplog.messages) == 2
    assert "its chain is broken" in caplog.messages[0]
    assert (folder / LOG).read_bytes().startswith(kept)
    after = [entry for line in lines(folder) if (entry := _parsed(line)) is not None]
    assert [entry["event"] for entry in after].count(BROKEN) == 1
    (mark,) = [entry for entry in after if entry["event"] == BROKEN]
    assert mark["problems"][0] == found["problems"][0]
    after_mark = json.loads(forgelm("verify-audit", str(folder), "--output-format=json").out)
    assert [BROKEN in item["problem"] for item in after_mark["problems"]].count(True) == 1


def _parsed(line: bytes) -> dict[str, list[object]] | None:
    try:
        found: dict[str, list[object]] = json.loads(line)
    except ValueError:
        return None
    return found


@pytest.mark.parametrize("kept", [0, 30, -1, None])
@pytest.mark.parametrize("first", [True, False])
def test_a_crash_is_told_from_a_change(
    kept: int | None, first: bool, folder: Path, tmp_path: Path, forgelm: Command
) -> None:
    """Between the head's announcement and its count, any part of the line may be there."""
    if first:
        folder = tmp_path / "new"
        AuditLog.open(folder).write("cache.populate_models_requested", models=["a"])
    *before, last = lines(folder)
    previous = hashlib.sha256(before[-1].rstrip(b"\n")).hexdigest() if before else "genesis"
    edit_head(folder, lines=len(before), head=previous, next=last.decode().rstrip("\n"))
    put(folder, b"".join(before) + last[:kept])
    done = forgelm("verify-audit", str(folder), "--output-format=json")
    assert (done.code, json.loads(done.out)["lines"]) == (0, len(before) + 1)
    AuditLog.open(folder).write("cache.populate_tasks_requested", tasks=["b"])
    assert lines(folder)[:-1] == [*before, last]
    assert forgelm("verify-audit", str(folder)).code == 0
    # What isn't the line that was announced is no crash.
    edit_head(folder, next="another line")
    put(folder, b"".join(lines(folder)[:-1]))
    assert forgelm("verify-audit", str(folder)).code == 2


WRITER = """
import sys
from pathlib import Path
from forgelm.airgap.audit import AuditLog
log = AuditLog.open(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
for number in range(8):
    log.write("cache.populate_models_requested", models=[str(number)])
"""


def test_two_writers_make_one_chain(folder: Path, forgelm: Command) -> None:
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(folder)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        writer.communicate("\n", timeout=60)
    done = forgelm("verify-audit", str(folder), "--output-format=json")
    assert (done.code, json.loads(done.out)["lines"]) == (0, 20)
    assert len({str(entry["run_id"]) for entry in entries(folder)}) == 4


def test_a_killed_writer_leaves_a_whole_chain(folder: Path, forgelm: Command) -> None:
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER.replace("range(8)", "range(10**6)"), str(folder)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert writer.stdin is not None
    writer.stdin.write("\n")
    writer.stdin.flush()
    while len(lines(folder)) < 8:
        assert writer.poll() is None
    writer.kill()
    writer.communicate()
    assert forgelm("verify-audit", str(folder)).code == 0
    AuditLog.open(folder).write("cache.populate_tasks_requested", tasks=["b"])
    assert forgelm("verify-audit", str(folder)).code == 0


def test_without_an_operator_there_is_no_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("FORGELM_OPERATOR")
    with caplog.at_level("DEBUG", "forgelm"):
        AuditLog.open(tmp_path / "cache").write("cache.populate_models_requested", models=[])
    assert not (tmp_path / "cache").exists()
    assert [record.levelname for record in caplog.records] == ["DEBUG"]
    assert "FORGELM_OPERATOR isn't set" in caplog.text


def test_what_cant_be_written_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("a file")
    log = AuditLog.open(tmp_path / "cache")
    for _ in range(3):
        log.write("cache.populate_models_requested", models=[])
    assert len(caplog.messages) == 1
    assert "can't be written (File exists): this command isn't recorded in it" in caplog.messages[0]


def test_a_full_disk_costs_a_line_and_no_chain(
    folder: Path, caplog: pytest.LogCaptureFixture, forgelm: Command
) -> None:
    """A limit on files' sizes stands for the disk."""
    size = (folder / LOG).stat().st_size
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 50, hard))
    try:
        AuditLog.open(folder).write("cache.populate_models_requested", models=["full"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert "can't be written (File too large)" in caplog.text
    assert forgelm("verify-audit", str(folder)).code == 0
    AuditLog.open(folder).write("cache.populate_models_requested", models=["room"])
    assert [entry["models"] for entry in entries(folder)][4:] == [["full"], ["room"]]
    assert forgelm("verify-audit", str(folder)).code == 0


def test_tokens_and_the_envelope_are_kept_out_of_reach(folder: Path, forgelm: Command) -> None:
    token = "hf_" + "a" * 30
    said = {"error_message": f"https://user:{token}@host: refused", "operator": "somebody"}
    AuditLog.open(folder).write("cache.populate_models_failed", run_id="x", models=[token], **said)
    last = entries(folder)[-1]
    assert token not in (folder / LOG).read_text()
    assert last["models"] == ["[redacted]"]
    assert (last["operator"], str(last["run_id"])[:3]) == ("ops@example.org", "fg-")
    assert forgelm("verify-audit", str(folder)).code == 0


def test_a_secret_finds_what_was_computed_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgelm: Command
) -> None:
    folder = tmp_path / "signed"
    monkeypatch.setenv("FORGELM_AUDIT_SECRET", "known to few")
    for number in range(3):
        AuditLog.open(folder).write("cache.populate_models_requested", models=[str(number)])
    assert forgelm("verify-audit", str(folder)).code == 0
    assert all(re.fullmatch("[0-9a-f]{64}", str(entry["_hmac"])) for entry in entries(folder))
    monkeypatch.delenv("FORGELM_AUDIT_SECRET")
    done = forgelm("verify-audit", str(folder))
    assert (done.code, "set FORGELM_AUDIT_SECRET to check that too" in done.err) == (0, True)
    (folder / LOG).unlink()
    (folder / HEAD).unlink()
    AuditLog.open(folder).write("cache.populate_models_requested", models=["forged"])
    assert forgelm("verify-audit", str(folder)).code == 0
    monkeypatch.setenv("FORGELM_AUDIT_SECRET", "known to few")
    done = forgelm("verify-audit", str(folder))
    assert done.code == 2
    assert "line 1: has no _hmac, and FORGELM_AUDIT_SECRET is set" in done.err
    monkeypatch.setenv("FORGELM_AUDIT_SECRET", "a guess")
    (folder / LOG).unlink()
    (folder / HEAD).unlink()
    AuditLog.open(folder).write("cache.populate_models_requested", models=["forged"])
    monkeypatch.setenv("FORGELM_AUDIT_SECRET", "known to few")
    assert "line 1: its _hmac is wrong" in forgelm("verify-audit", str(folder)).err


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("nowhere", "nowhere/audit_log.jsonl: no such audit log"),
        ("other.jsonl", "other.jsonl: not an audit log; give an audit_log.jsonl"),
        (".", "audit_log.jsonl: no such audit log"),
        ("nothing", "nothing: no such file or folder; give an audit_log.jsonl, or the folder"),
        ("nothing/audit_log.jsonl", "nothing/audit_log.jsonl: no such audit log"),
        ("all.tar", "not an audit log; give an audit_log.jsonl, or the folder that holds it (forg"),
        ("empty", "empty/audit_log.jsonl: holds no line"),
        ("pipe", "pipe/audit_log.jsonl: not a regular file; give an audit_log.jsonl"),
        ("full", "full/audit_log.jsonl: not a regular file; give an audit_log.jsonl"),
    ],
)
def test_no_log_is_a_wrong_request(path: str, said: str, forgelm: Command, tmp_path: Path) -> None:
    for name in ("nowhere", "empty", "pipe", "full"):
        (tmp_path / name).mkdir()
    os.mkfifo(tmp_path / "pipe" / LOG)
    (tmp_path / "full" / LOG).symlink_to("/dev/full")
    for name in ("empty/audit_log.jsonl", "other.jsonl", "all.tar"):
        (tmp_path / name).touch()
    done = forgelm("verify-audit", path)
    assert done.code == 1
    assert said in done.err
    assert len(done.err.splitlines()) == 1


@pytest.mark.parametrize("name", [LOG, HEAD])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_special_file_is_left_alone(
    name: str, kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if kind == "pipe":
        os.mkfifo(tmp_path / name)
    else:
        (tmp_path / name).symlink_to("/dev/full")
    AuditLog.open(tmp_path).write("cache.populate_models_requested", models=[])
    assert "can't be written (not a regular file): this command isn't recorded" in caplog.text


def test_the_catalogue_is_whole() -> None:
    page = (Path(__file__).parents[2] / "docs/audit.md").read_text()
    for what in ("models", "tasks"):
        for end in ("requested", "completed", "failed"):
            assert f"| `cache.populate_{what}_{end}` |" in page
    assert f"`{BROKEN}`" in page
    assert f"`{audit.LOG}`" in page
