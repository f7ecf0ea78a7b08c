"""`forgelm` against a Hub on loopback, in a process of its own: the clients read the endpoint once.

The process takes a command line at a time, so that the libraries are imported once.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

from conftest import Result

FOREIGN = ("HF_", "HUGGING", "TRANSFORMERS_", "WANDB_")

DRIVER = """
import contextlib, io, json, os, sys
from forgelm.cli.main import main

if asked := os.environ.get("ASKED"):
    from forgelm.airgap.cutoff import cut_off

    def note(host):
        with open(asked, "a") as file:
            print(host, file=file)

    cut_off(note)

for line in sys.stdin:
    words, out, err = json.loads(line), io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(words)
    print(json.dumps([code, out.getvalue(), err.getvalue()]), flush=True)
"""


class Child:
    """A process that runs one `forgelm` command line after another.

    With `cut_off` it can't reach any host, and `asked` tells which it tried.
    """

    def __init__(
        self,
        folder: Path,
        home: Path,
        url: str,
        *,
        offline: bool = False,
        cut_off: bool = False,
        **environment: str,
    ) -> None:
        self.notes = home / "asked"
        if cut_off:
            environment["ASKED"] = str(self.notes)
        kept = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
        self.errors = home / f"errors-{int(offline)}"
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-c", DRIVER],
                cwd=folder,
                env=kept
                | {
                    "HF_ENDPOINT": url,
                    "HF_HOME": str(home),
                    "HF_HUB_DISABLE_TELEMETRY": "1",
                    "HF_HUB_OFFLINE": str(int(offline)),
                    "NO_PROXY": "127.0.0.1,localhost",
                    **environment,
                },
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    def __call__(self, *words: str) -> Result:
        """Run one command line; a process that says nothing for long is killed."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        watchdog = threading.Timer(240, self.process.kill)
        watchdog.start()
        try:
            self.process.stdin.write(json.dumps(words) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        finally:
            watchdog.cancel()
        assert line, self.errors.read_text()
        return Result(*json.loads(line))

    @property
    def asked(self) -> list[str]:
        """The hosts that a process that was cut off tried to reach."""
        return self.notes.read_text().splitlines() if self.notes.exists() else []

    def close(self) -> None:
        self.process.communicate(timeout=60)
