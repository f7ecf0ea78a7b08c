"""`forgelm cache-models`, verified, against `hf download`, unverified, and against curl.

python benchmarks/cache.py [--mib 1536] [--files 1500] [--pairs 3]

A Hub on loopback (that of the tests, in a process of its own) serves a model of one large file and
one of many small ones. Every tool starts with an empty cache, in turn; whole commands are timed.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
SERVER = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from hub_server import HubServer

with HubServer() as hub:
    hub.add_repo("model", "org/large", {"model.safetensors": Path(sys.argv[2])})
    hub.add_repo("model", "org/small", {p.name: p for p in Path(sys.argv[3]).iterdir()})
    print(hub.url, flush=True)
    sys.stdin.read()
"""


@dataclass(frozen=True)
class Taken:
    """What a command took: seconds, and the most memory of its processes (MiB)."""

    seconds: float
    memory: float


def run(command: list[str], env: dict[str, str]) -> Taken:
    """Run a command to its end; it must succeed."""
    begun = time.monotonic()
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    _, status, used = os.wait4(process.pid, 0)
    took = time.monotonic() - begun
    assert process.stderr is not None
    said = process.stderr.read().decode()
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"{' '.join(command)} failed:\n{said}")
    return Taken(took, used.ru_maxrss / 1024)


@contextmanager
def served(folder: Path, mib: int, files: int) -> Iterator[str]:
    """The Hub's address; what it serves is made of random bytes."""
    source = random.Random(0)
    large, small = folder / "large.safetensors", folder / "small"
    small.mkdir()
    with large.open("wb") as file:
        for _ in range(mib):
            file.write(source.randbytes(1 << 20))
    for number in range(files):
        (small / f"part-{number:05}.txt").write_bytes(source.randbytes(source.randint(500, 5000)))
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(ROOT / "tests"), str(large), str(small)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdout is not None
    try:
        yield server.stdout.readline().strip()
    finally:
        server.kill()
        server.wait()


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    asked.add_argument("--mib", type=int, default=1536, help="size of the large file")
    asked.add_argument("--files", type=int, default=1500, help="number of small files")
    asked.add_argument("--pairs", type=int, default=3, help="how often each tool runs")
    given = asked.parse_args()
    with tempfile.TemporaryDirectory(prefix="forgelm-bench-") as name:
        folder = Path(name)
        with served(folder, given.mib, given.files) as url:
            measure(folder, url, given.pairs)


def measure(folder: Path, url: str, pairs: int) -> None:
    """Time each tool in turn, and print the table."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    env = kept | {"HF_ENDPOINT": url, "NO_PROXY": "*", "HF_HUB_DISABLE_TELEMETRY": "1"}
    home = folder / "home"
    commit = _commit(url, env)

    def ours(repo: str) -> Taken:
        words = ["cache-models", "--model", repo, "-q"]
        return run([str(BIN / "forgelm"), *words], env | {"HF_HOME": str(home)})

    def hf(repo: str) -> Taken:
        command = [str(BIN / "hf"), "download", repo, "--quiet"]
        return run(command, env | {"HF_HOME": str(home)})

    def curl(repo: str) -> Taken:
        at = f"{url}/org/large/resolve/{commit}/model.safetensors"
        home.mkdir()
        return run(["curl", "-sL", "-o", str(home / "model"), at], env)

    def one_hash(repo: str) -> Taken:
        begun = time.monotonic()
        with (folder / "large.safetensors").open("rb") as file:
            hashlib.file_digest(file, "sha256")
        return Taken(time.monotonic() - begun, 0)

    tools: dict[str, Callable[[str], Taken]]
    tools = {"forgelm": ours, "hf download": hf, "curl": curl, "one SHA-256 pass": one_hash}
    for repo, which in (("org/large", [*tools]), ("org/small", ["forgelm", "hf download"])):
        taken: dict[str, list[Taken]] = {name: [] for name in [*which, "forgelm again"]}
        for _ in range(pairs):
            for name in which:
                shutil.rmtree(home, ignore_errors=True)
                taken[name].append(tools[name](repo))
                if name == "forgelm":
                    taken["forgelm again"].append(ours(repo))
        print(f"{repo}, {pairs} times each")
        for name, found in taken.items():
            seconds = [one.seconds for one in found]
            memory = max(one.memory for one in found)
            print(
                f"  {name:<18}{statistics.median(seconds):8.2f} s "
                f"({min(seconds):.2f} to {max(seconds):.2f}){memory:8.0f} MiB"
            )
        print(f"  forgelm / hf download: {_ratio(taken['forgelm'], taken['hf download'])}")
        if "curl" in taken:
            longer = [
                max(a, b, key=lambda one: one.seconds)
                for a, b in zip(taken["curl"], taken["one SHA-256 pass"], strict=True)
            ]
            print(f"  forgelm / the longer of curl and a pass: {_ratio(taken['forgelm'], longer)}")


def _ratio(ours: list[Taken], theirs: list[Taken]) -> str:
    ratios = [a.seconds / b.seconds for a, b in zip(ours, theirs, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def _commit(url: str, env: dict[str, str]) -> str:
    code = "from huggingface_hub import HfApi; print(HfApi().model_info('org/large').sha)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


if __name__ == "__main__":
    main()
