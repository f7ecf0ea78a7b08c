"""Shell completion: what Hydra's own doesn't know, the commands' names and nested experiments."""

from __future__ import annotations

import os
import re

from forgelm.cli.main import COMMANDS
from forgelm.config.compose import conf_dir


def answer() -> str | None:
    """The choices for the line in COMP_LINE, or None where Hydra's completion knows better.

    A command's name is taken out of COMP_LINE, since Hydra takes each word for an override.
    """
    line = os.environ.get("COMP_LINE", "")
    words = line.partition(" ")[2].split(" ")
    if len(words) == 1 and "=" not in words[0] and words[0]:
        names = [name for name in COMMANDS if name.startswith(words[0])]
        if names:
            return " ".join(names)
    os.environ["COMP_LINE"] = re.sub(r"^(\S+) +train(?= |$)", r"\1", line)
    if words[-1].startswith("exp"):
        folder = conf_dir() / "experiment"
        names = [
            f"experiment={path.relative_to(folder).with_suffix('')}"
            for path in sorted(folder.rglob("*.yaml"))
        ]
        return " ".join(name for name in names if name.startswith(words[-1]))
    return None
