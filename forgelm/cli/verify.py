"""`forgelm verify`: whether a bundle, or what was unpacked of it, is as its manifest says."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from forgelm.airgap.verify import add_options
from forgelm.cli.arguments import Failed, answer, cache_parser, listen


def main(argv: Sequence[str]) -> int:
    made = cache_parser(
        "verify", "Compare a bundle, or what was unpacked of it, with its manifest: docs/bundle.md."
    )
    add_options(made)
    return answer(argv, made, _work, _text)


def _work(arguments: argparse.Namespace) -> dict[str, Any] | Failed:
    from forgelm.airgap import verify
    from forgelm.airgap.staging import disk_errors
    from forgelm.errors import ConfigError, RunError

    listen(arguments)
    try:
        with disk_errors(arguments.file):
            report = verify.check(arguments.file, arguments.cache_dir, arguments.datasets_cache)
    except verify.NotThere as error:
        raise ConfigError(str(error)) from error
    result = verify.result_of(report)
    if report.problems:
        lines = verify.few([str(problem) for problem in report.problems])
        return Failed(result, [RunError(line) for line in lines])
    return result


def _text(result: dict[str, Any]) -> str:
    from forgelm.airgap.verify import text_of

    return "" if result["problems"] else text_of(result)
