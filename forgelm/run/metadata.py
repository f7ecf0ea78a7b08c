"""`run_metadata.json`: what must be known to repeat a run, and its every start and stop."""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from forgelm import __version__
from forgelm.redact import redact

_MAX_DIFF = 1 << 20
_SHORT = {"-cp": "--config-path", "-cd": "--config-dir", "-cn": "--config-name"}
_PACKAGES = (
    "accelerate",
    "bitsandbytes",
    "datasets",
    "huggingface_hub",
    "hydra-core",
    "numpy",
    "omegaconf",
    "peft",
    "safetensors",
    "scikit-learn",
    "tokenizers",
    "torch",
    "transformers",
    "wandb",
)


def command_line() -> str:
    """The command as typed, less what looks like a token."""
    program = Path(sys.argv[0]).name
    return redact(shlex.join(["forgelm" if program == "__main__.py" else program, *sys.argv[1:]]))


def config_flags(command: str) -> list[str]:
    """Hydra's flags of a command line as recorded that say where its configs came from."""
    words = iter(shlex.split(command))
    found: list[str] = []
    for word in words:
        flag, given, value = word.partition("=")
        flag = _SHORT.get(flag, flag)
        if flag in _SHORT.values():
            found += [flag, value if given else next(words, "")]
    return found


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """The versions of Python, forgelm and what the result rests on."""
    wanted = {name.lower().replace("_", "-") for name in _PACKAGES}
    found = {
        name: item.version
        for item in distributions()
        if (name := (item.metadata["Name"] or "").lower().replace("_", "-")) in wanted
    }
    return {
        "python": platform.python_version(),
        "forgelm": __version__,
        **dict(sorted(found.items())),
    }


def git(folder: Path) -> dict[str, Any] | None:
    """Commit and uncommitted diff (redacted) of the repository around `folder`, if there is one."""
    root = _git(folder, "rev-parse", "--show-toplevel")
    if root is None:
        return None
    diff = _git(folder, "diff", "HEAD") or ""
    return {
        "root": root.strip(),
        "commit": (_git(folder, "rev-parse", "HEAD") or "").strip() or None,
        "dirty": bool((_git(folder, "status", "--porcelain") or "").strip()),
        "diff": redact(diff[:_MAX_DIFF]),
        "diff_cut": len(diff) > _MAX_DIFF,
    }


def machine() -> dict[str, Any]:
    """Host, processor, threads and devices; imports torch."""
    import torch

    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "host": platform.node(),
        "cpu": _cpu(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "devices": devices or ["cpu"],
        "driver": _driver(),
    }


def _driver() -> str | None:
    """The NVIDIA driver's version, if there is one."""
    try:
        words = Path("/proc/driver/nvidia/version").read_text().split()
    except OSError:
        return None
    return next((word for word in words if re.fullmatch(r"\d+\.\d+[\d.]*", word)), None)


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words],
            capture_output=True,
            timeout=30,
            check=True,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode(errors="replace")
