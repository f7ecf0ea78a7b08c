"""`forgelm verify-audit PATH`: whether an audit log is as it was written."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from forgelm.cli.arguments import Failed, answer, cache_parser, listen

_PACKED = re.compile(r"\.tar(\.|$)|\.manifest\.json$")


def main(argv: Sequence[str]) -> int:
    made = cache_parser("verify-audit", "Check the chain of an audit log: docs/audit.md.")
    made.add_argument("path", metavar="PATH", help="an audit_log.jsonl, or its folder")
    return answer(argv, made, _work, _text)


def _work(arguments: argparse.Namespace) -> dict[str, Any] | Failed:
    from forgelm.airgap.audit import LOG, check
    from forgelm.airgap.staging import disk_errors
    from forgelm.errors import ConfigError, RunError
    from forgelm.log import log

    listen(arguments)
    path = Path(arguments.path)
    give = f"give an {LOG}, or the folder that holds it"
    if not path.is_dir() and path.name != LOG:
        if not path.exists():
            raise ConfigError(f"{path}: no such file or folder; {give}")
        hint = " (forgelm verify checks bundles)" if _PACKED.search(path.name) else ""
        raise ConfigError(f"{path}: not an audit log; {give}{hint}")
    folder = path if path.is_dir() else path.parent
    if (folder / LOG).exists() and not (folder / LOG).is_file():
        raise ConfigError(f"{folder / LOG}: not a regular file; {give}")
    with disk_errors(folder / LOG):
        chain = check(folder)
    if chain is None:
        what = "holds no line" if (folder / LOG).exists() else "no such audit log"
        raise ConfigError(f"{folder / LOG}: {what}; {give}")
    if chain.unchecked:
        log.warning("its lines are signed: set FORGELM_AUDIT_SECRET to check that too")
    result = {
        "path": str(folder / LOG),
        "lines": chain.lines,
        "head": chain.head,
        "problems": [vars(problem) for problem in chain.problems],
    }
    if not chain.problems:
        return result
    return Failed(result, [RunError(f"{folder / LOG}: {problem}") for problem in chain.problems])


def _text(result: dict[str, Any]) -> str:
    if result["problems"]:
        return ""
    return f"{result['path']}: {result['lines']} line(s), whole; head {result['head']}"
