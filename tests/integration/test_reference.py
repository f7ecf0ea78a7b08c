"""Commands as the pages have them, typed by a person: they print what docs/cache.md says, and
README's way across the air gap ends with a trained model.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from child import FOREIGN
from glue_fixture import glue_repo, model_repo
from hub_server import HubServer
from stand_ins import serve_lm_eval, serve_models

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "cache.md").read_text(encoding="utf-8")
TOKEN = "hf_" + "opens" * 6
JQ = """#!{python}
import json, sys
print(json.dumps(json.load(sys.stdin)[sys.argv[1].removeprefix(".")]))
"""

LABELS = ("contradiction", "neutral", "entailment")
EXAMPLES = [
    example
    for block in re.findall(r"^```console\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    for example in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]
]

assert len(EXAMPLES) > 5


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with HubServer(token=TOKEN) as served:
        serve_models(served)
        serve_lm_eval(served)
        served.add_repo("dataset", "nyu-mll/glue", glue_repo())
        student, teacher = (
            model_repo(head=False, positions=128),
            model_repo(3, LABELS, positions=128),
        )
        served.add_repo("model", "distilbert/distilbert-base-uncased", student)
        served.add_repo("model", "FacebookAI/roberta-large-mnli", teacher)
        yield served


class Shell:
    """A person's shell, in a home of its own."""

    def __init__(self, home: Path, url: str) -> None:
        self.home, self.url = home, url
        tools = home / "bin"
        tools.mkdir()
        if shutil.which("jq") is None:
            (tools / "jq").write_text(JQ.format(python=sys.executable))
            (tools / "jq").chmod(0o755)
        places = (str(tools), str(Path(sys.executable).parent), os.environ["PATH"])
        foreign = (*FOREIGN, "FORGELM_", "XDG_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        self.environment = kept | {
            "HOME": str(home),
            "PATH": os.pathsep.join(places),
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "HF_ENDPOINT": url,
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1,localhost",
        }

    def run(self, script: str, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-c", script],
            cwd=self.home,
            env=self.environment | more,
            capture_output=True,
            text=True,
            timeout=240,
        )

    def __call__(self, command: str) -> str:
        """What a command prints, less INFO lines: warnings, stdout, errors."""
        done = self.run(command)
        said = done.stderr.splitlines(keepends=True)
        warnings = [line for line in said if line.startswith("warning: ")]
        errors = [line for line in said if line.startswith("forgelm: ")]
        text = "".join([*warnings, done.stdout, *errors])
        return text.replace(str(self.home), "/home/me").replace(self.url, "https://huggingface.co")


@pytest.fixture(scope="module")
def shell(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Shell:
    return Shell(tmp_path_factory.mktemp("me"), hub.url)


def split(example: str) -> tuple[str, str]:
    """A command, with the lines that it goes on in, and what it prints."""
    lines = example.splitlines(keepends=True)
    last = next(number for number, line in enumerate(lines) if not line.endswith("\\\n"))
    return "".join(lines[: last + 1]), "".join(lines[last + 1 :])


def masked(text: str) -> str:
    """Without times, and without commits, which follow from the libraries that wrote the files."""
    text = re.sub(r"\(\d+\.\ds\)", "(SECONDS)", text)
    text = re.sub(r'"duration_s": \d+\.\d', '"duration_s": SECONDS', text)
    return re.sub(r"\b([0-9a-f]{40}|[0-9a-f]{12})\b", "COMMIT", text)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda text: " ".join(text.split()[:6]))
def test_an_example_prints_what_the_page_says(example: str, shell: Shell) -> None:
    command, printed = split(example)
    assert masked(shell(command)) == masked(printed)


@pytest.mark.parametrize("command", ["cache", "cache-models", "cache-tasks"])
def test_the_page_has_every_flag(command: str, shell: Shell) -> None:
    general, *sections = re.split(r"^## (?=.*\n)", PAGE, flags=re.MULTILINE)
    (own,) = [text for text in sections if text.startswith(f"forgelm {command}\n")]
    named = re.findall(r"^\| `(?:-q`, `)?(--[a-z-]+)", general + own, re.MULTILINE)
    offered = re.findall(r"^  (?:-\w, )?(--[a-z-]+)", shell(f"forgelm {command} --help"), re.M)
    assert sorted(named) == sorted(set(offered) - {"--help"})


def test_across_the_air_gap_as_the_readme_says(
    hub: HubServer, shell: Shell, tmp_path: Path
) -> None:
    """The other side has no network, and a home of its own."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme.partition("\n## Without internet\n")[2]
    block = re.search(r"```\n(.*?)```", section, re.DOTALL)
    assert block is not None
    here, arrives, there = block[1].partition("forgelm import")
    packed = shell.run(f"set -e\n{here}")
    assert packed.returncode == 0, packed.stderr
    other = Shell(tmp_path, "http://127.0.0.1:9")
    for part in shell.home.glob("all.tar*"):
        shutil.move(part, other.home)
    hub.clear_requests()
    done = other.run(f"set -e\n{arrives}{there}", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert hub.requests == []
    assert " fail " not in done.stdout
    (model,) = other.home.glob("outputs/mnli/distilbert/kd/*/model.safetensors")
    assert model.stat().st_size > 0
