"""`forgelm verify-audit PATH`: whether an audit log is as it was written."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from forgelm.cli.arguments import Failed, answer, cache_parser, listen


def main(argv: Sequence[str]) -> int:
    made = cache_parser("verify-audit", "Check the chain of an audit log: docs/audit.md.")
    made.add_argument("path", metavar="PATH", help="an audit_log.jsonl, or its folder")
    return answer(argv, made, _work, _text)


def _work(arguments: argparse.Namespace) -> dict[str, Any] | Failed:
    from forgelm.airgap.audit import LOG, check
    from forgelm.errors import ConfigError, RunError
    from forgelm.log import log

    listen(arguments)
    path = Path(arguments.path)
    if not path.is_dir() and path.name != LOG:
        raise ConfigError(f"{path}: not an audit log; give an {LOG}, or the folder that holds it")
    folder = path if path.is_dir() else path.parent
    chain = check(folder)
    if chain is None:
        raise ConfigError(f"{folder / LOG}: no such audit log; give the folder that holds one")
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
