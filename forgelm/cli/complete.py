"""Shell completion: Hydra's own, and what it doesn't know: commands and nested experiments."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

from forgelm import plugins
from forgelm.cli.main import COMMANDS
from forgelm.config.compose import conf_dir


def complete(hydra: Callable[[], object]) -> str:
    """The choices for the line in COMP_LINE; `hydra` prints Hydra's.

    A command's name is taken out of COMP_LINE, since Hydra takes each word for an override.
    """
    line = os.environ.get("COMP_LINE", "")
    words = line.partition(" ")[2].split(" ")
    if len(words) > 1 and words[0] in COMMANDS and words[0] not in _COMPOSING:
        return ""
    os.environ["COMP_LINE"] = re.sub(rf"^(\S+) +({'|'.join(_COMPOSING)})(?= |$)", r"\1", line)
    if words[-1].startswith("experiment="):
        return " ".join(name for name in _experiments(line) if name.startswith(words[-1]))
    said = io.StringIO()
    silent = contextlib.redirect_stderr(io.StringIO())
    with silent, contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        hydra()
    choices = ["experiment=" if c == "experiment/" else c for c in said.getvalue().split()]
    if len(words) == 1:
        choices += [name for name in COMMANDS if name.startswith(words[0])]
    return " ".join(sorted(choices))


def _experiments(line: str) -> list[str]:
    folders = [conf_dir(), *plugins.folders().values()]
    with contextlib.suppress(ValueError):
        given = shlex.split(line)
        folders += [Path(b) for a, b in pairwise(given) if a in _CONFIG_DIR]
    return [
        f"experiment={path.relative_to(folder / 'experiment').with_suffix('')}"
        for folder in folders
        for path in sorted((folder / "experiment").rglob("*.yaml"))
    ]


_COMPOSING = ("train", "drill")
_CONFIG_DIR = ("--config-dir", "-cd")
