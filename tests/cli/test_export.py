"""`forgelm export`: a whole model in a folder, and models on a Hub on loopback, used from there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from child import Child
from conftest import TINY, Command, Result
from glue_fixture import model_repo
from hub_server import USER, HubServer

from forgelm.run.files import read_json

TOKEN = "hf_" + "let_me_in"
BASE = "org/tiny-base"
SMALL = ("training.eval_strategy=no", "max_steps=2")
LORA = ("model.lora.enabled=true", "model.lora.r=4", "model.lora.use_dora=true")
JSON = ("--output-format", "json")


@dataclass
class Hub:
    """The server, the folder and home that a process works in, and that process."""

    server: HubServer
    folder: Path
    home: Path
    forgelm: Child
    base: str

    def trained(self, name: str, *words: str) -> Path:
        done = self.forgelm("train", *TINY, *SMALL, f"run_name={name}", *words)
        assert done.code == 0, done.err + done.out
        (run,) = self.folder.glob(f"outputs/*/*/*/{name}")
        return run

    def pushed(self, run: Path, *words: str) -> dict[str, Any]:
        done = self.forgelm("export", str(run), *words, *JSON)
        assert done.code == 0, done.err
        result: dict[str, Any] = json.loads(done.out)
        return result

    def files(self, repo_id: str) -> dict[str, int]:
        commit = self.server._repos[("model", repo_id)].commits[-1]
        return {path: blob.size for path, blob in commit.files.items()}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    folder, home = tmp_path_factory.mktemp("work"), tmp_path_factory.mktemp("home")
    (home / "token").write_text(TOKEN)
    with HubServer(token=TOKEN) as server:
        base = server.add_repo("model", BASE, model_repo(head=False, hidden=16))
        server.add_repo("model", BASE, model_repo(head=False, hidden=16, seed=1), message="newer")
        child = Child(folder, home, server.url, HF_HUB_DISABLE_XET="1")
        yield Hub(server, folder, home, child, base)
        child.close()


@pytest.fixture(scope="module")
def adapted(hub: Hub) -> Path:
    """A run whose adapter has an older commit of a Hub repository for its base."""
    words = (f"model.path={BASE}", f"model.revision={hub.base}", *LORA, "task.max_length=64")
    return hub.trained("adapted", *words)


@pytest.fixture
def run(tiny: Command, tmp_path: Path) -> Path:
    """A complete run with an adapter on fresh weights."""
    done = tiny(*SMALL, *LORA, "run_name=it")
    assert done.code == 0, done.err
    return tmp_path / "outputs/nli_mini/tiny/sft/it"


def test_a_whole_model_in_a_folder(forgelm: Command, run: Path, tmp_path: Path) -> None:
    done = forgelm("export", str(run), "--merge", *JSON)
    assert done.code == 0, done.err
    assert json.loads(done.out) == {
        "success": True,
        "run": str(run),
        "merged": str(run / "merged"),
        "pushed": None,
        "commit": None,
    }
    again = forgelm("export", "it", "--merge")
    assert again.out.strip().splitlines()[-1] == f"the whole model is in {run / 'merged'}"
    done = forgelm("export", str(run), "--merge", "--output", "whole")
    assert done.code == 0, done.err
    ours, theirs = tmp_path / "whole", run / "merged"
    names = {path.name for path in ours.iterdir()}
    assert names == {path.name for path in theirs.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= names
    assert all((ours / name).read_bytes() == (theirs / name).read_bytes() for name in names)
    assert (run / "eval.json").stat().st_mode == (ours / "config.json").stat().st_mode
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "export needs --merge, --push HUB_ID, or both; see forgelm export --help"),
        (("--push", "me/it", "--output", "x"), "--output goes with --merge; add it, or leave"),
        (("--merge", "--private"), "--private goes with --push; add it, or leave --private out"),
        (("--merge", "--output", "outputs"), "--output outputs: is there already; give a new or"),
        (("--push", "a/b/c"), "--push a/b/c: not a hub id, which looks like organisation/name"),
        (("--push", "me/it"), "--push me/it: HF_HUB_OFFLINE is set; unset it"),
    ],
)
def test_wrong_requests(forgelm: Command, run: Path, words: tuple[str, ...], told: str) -> None:
    refused = forgelm("export", str(run), *words)
    assert (refused.code, refused.out) == (1, "")
    assert told in refused.err
    assert len(refused.err.strip().splitlines()) == 1


def test_a_run_that_isnt_complete(forgelm: Command, tiny: Command, tmp_path: Path) -> None:
    failed = tiny("max_steps=3", "training.learning_rate=1e30", "run_name=half", SMALL[0])
    assert failed.code == 2
    refused = forgelm("export", "half", "--push", "me/half", *JSON)
    assert refused.code == 1
    answer = json.loads(refused.out)
    assert (answer["success"], answer["error_class"]) == (False, "ConfigError")
    assert "isn't complete; go on with it first: forgelm train resume=" in answer["error"]


def test_a_whole_model_has_nothing_to_merge(forgelm: Command, tiny: Command) -> None:
    assert tiny(*SMALL, "run_name=plain").code == 0
    refused = forgelm("export", "plain", "--merge")
    assert refused.code == 1
    assert "holds no adapter, its model is whole already; leave it out" in refused.err


def test_an_adapter_on_the_hub_refers_to_its_base(hub: Hub, adapted: Path) -> None:
    result = hub.pushed(adapted, "--push", f"{USER}/adapted")
    settings = read_json(adapted / "adapter_config.json")
    assert (settings["base_model_name_or_path"], settings["revision"]) == (BASE, hub.base)
    assert read_json(adapted / "run_metadata.json")["revisions"] == {"model": hub.base}
    card = (adapted / "README.md").read_text()
    assert f"base_model: {BASE}\n" in card
    assert f"- adapter: LoRA on {BASE} at {hub.base}" in card
    repo = hub.server._repos[("model", f"{USER}/adapted")]
    assert result["pushed"] == f"{USER}/adapted"
    assert result["commit"] == repo.commits[-1].sha
    assert len(repo.commits) == 2
    assert set(hub.files(f"{USER}/adapted")) == {
        ".gitattributes",
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "base.json",
        "eval.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_a_pushed_adapter_is_trained_further_and_teaches(hub: Hub, adapted: Path) -> None:
    hub.pushed(adapted, "--push", f"{USER}/source")
    words = (f"model.path={USER}/source", "task.max_length=64")
    run = hub.trained("further", *words, "model.lora.enabled=true")
    log = (run / "output.log").read_text()
    told = f"model {USER}/source is an adapter of {BASE} at {hub.base[:12]}; it goes on being"
    assert told in log
    commit = hub.server._repos[("model", f"{USER}/source")].commits[-1].sha
    revisions = read_json(run / "run_metadata.json")["revisions"]
    assert revisions == {"model": commit, "base": hub.base}
    settings = read_json(run / "adapter_config.json")
    assert (settings["base_model_name_or_path"], settings["revision"]) == (BASE, hub.base)
    results = read_json(run / "eval.json")
    before = read_json(adapted / "eval.json")["after"]["student"]
    assert results["before"]["student"] == before

    words = ("mode=kd", "teacher=path", f"teacher.path={USER}/source", f"model.path={BASE}")
    taught = hub.trained("taught", *words, "task.max_length=64")
    results = read_json(taught / "eval.json")
    for split, scores in results["before"]["teacher"].items():
        assert scores["loss"] == pytest.approx(before[split]["loss"], rel=1e-5)
    revisions = read_json(taught / "run_metadata.json")["revisions"]
    assert revisions["teacher_base"] == hub.base


def test_a_copy_of_the_base_serves_and_another_commit_doesnt(hub: Hub, adapted: Path) -> None:
    newest = model_repo(head=False, hidden=16, seed=1)
    for name, files in {"copy": model_repo(head=False, hidden=16), "newer": newest}.items():
        folder = hub.folder / name
        folder.mkdir()
        for file, content in files.items():
            (folder / file).write_bytes(content)
    words = (f"model.path={adapted}", "task.max_length=64", "model.lora.enabled=true")
    run = hub.trained("on-copy", *words, f"model.base={hub.folder / 'copy'}")
    assert read_json(run / "base.json")["path"] == str(hub.folder / "copy")
    newer = hub.folder / "newer"
    refused = hub.forgelm("train", *TINY, *SMALL, *words, f"model.base={newer}")
    assert refused.code == 1
    assert f"{newer} isn't the base that it was trained on (weights " in refused.err


def test_the_whole_model_on_the_hub(hub: Hub, adapted: Path) -> None:
    result = hub.pushed(adapted, "--merge", "--push", f"{USER}/whole", "--private")
    assert result["merged"] == str(adapted / "merged")
    assert f"{USER}/whole" in hub.server.private
    assert {"config.json", "model.safetensors"} <= set(hub.files(f"{USER}/whole"))
    words = (f"model.path={USER}/whole", "task.max_length=64")
    run = hub.trained("from-whole", *words)
    before = read_json(run / "eval.json")["before"]["student"]
    for split, scores in read_json(adapted / "eval.json")["after"]["student"].items():
        assert before[split]["loss"] == pytest.approx(scores["loss"], rel=1e-5)


def test_what_is_pushed_of_a_plain_run(hub: Hub) -> None:
    run = hub.trained("plain")
    hub.pushed(run, "--push", f"{USER}/plain")
    files = hub.files(f"{USER}/plain")
    assert {"model.safetensors", "config.json", "README.md"} <= set(files)
    assert not {"run_metadata.json", "config.yaml", "output.log"} & set(files)
    again = hub.pushed(run, "--push", f"{USER}/plain")
    assert again["commit"] == hub.server._repos[("model", f"{USER}/plain")].commits[-1].sha


def test_a_base_that_nobody_else_has_is_said(hub: Hub) -> None:
    run = hub.trained("fresh", *LORA)
    done = hub.forgelm("export", str(run), "--push", f"{USER}/fresh")
    assert done.code == 0, done.err
    assert f"the adapter's base {run / 'base'} is a folder of this machine: others" in done.err
    assert "base/model.safetensors" in hub.files(f"{USER}/fresh")


@pytest.mark.parametrize(
    ("token", "to", "code", "told"),
    [
        (None, f"{USER}/x", 1, "there is no token to write with; set HF_TOKEN, or log in with"),
        (TOKEN, "others/x", 2, "--push others/x: the hub answers: "),
        ("hf_" + "another", f"{USER}/x", 2, "the hub doesn't accept the token of "),
    ],
)
def test_the_hub_refuses(
    hub: Hub, adapted: Path, token: str | None, to: str, code: int, told: str
) -> None:
    file = hub.home / "token"
    file.unlink()
    try:
        if token is not None:
            file.write_text(token)
        refused: Result = hub.forgelm("export", str(adapted), "--push", to)
    finally:
        file.write_text(TOKEN)
    assert refused.code == code
    assert told in refused.err
    assert token is None or token not in refused.err
    assert len(refused.err.strip().splitlines()) == 1
