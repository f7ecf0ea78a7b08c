"""Imports point one way, and light commands stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import forgelm

ROOT = Path(forgelm.__file__).parent
# From the top down: a part may import from those after it, never from those before it.
ORDER = (
    "cli",
    "start",
    "cluster",
    "airgap",
    "pipeline",
    "stages",
    "export",
    "final",
    "report",
    "card",
    "drill",
    "callbacks",
    "launch",
    "resolve",
    "harness",
    "modes",
    "training",
    "evaluate",
    "tasks",
    "models",
    "losses",
    "hub",
    "network",
    "prepared",
    "hubcache",
    "run",
    "deadline",
    "memory",
    "config",
    "plugins",
    "world",
    "interrupt",
    "slurm",
    "log",
    "stop",
    "errors",
    "redact",
)


def part(module: str) -> str:
    names = module.split(".")
    return names[1] if len(names) > 1 else names[0]


def imports(file: Path) -> set[str]:
    """The parts of forgelm that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {part(name) for name in names if name.startswith("forgelm.")}
        elif isinstance(node, ast.Import):
            found |= {part(a.name) for a in node.names if a.name.startswith("forgelm.")}
    return found - {"__version__"}


def test_imports_point_one_way() -> None:
    wrong = []
    for file in sorted(ROOT.rglob("*.py")):
        ours = file.relative_to(ROOT).with_suffix("").parts[0]
        if ours in ("__init__", "__main__"):
            continue
        for theirs in imports(file) - {ours}:
            if ORDER.index(theirs) < ORDER.index(ours):
                wrong.append(f"{file.relative_to(ROOT)} imports {theirs}")
    assert wrong == []


def test_every_part_has_its_place() -> None:
    parts = {path.name.removesuffix(".py") for path in ROOT.iterdir() if path.suffix in ("", ".py")}
    assert parts - {"__init__", "__main__", "__pycache__", "conf"} == set(ORDER)


def test_checking_a_request_loads_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from forgelm.config.compose import Request\n"
        "from forgelm.config.request import check_request\n"
        "import forgelm.cli.train, forgelm.resolve, forgelm.start\n"
        "check_request(Request(('mode=kd',)))\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy', 'pandas', 'wandb', 'accelerate'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
