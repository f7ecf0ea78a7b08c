"""`forgelm doctor [OVERRIDES]`: is this machine able to do this, and with overrides: this run."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from forgelm.cli.arguments import Failed, WithOverrides, answer, cache_parser, listen

_COLOURS = {"ok": "32", "info": "36", "warn": "33", "fail": "31", "crash": "31"}
_BAD = ("fail", "crash")


def main(argv: Sequence[str]) -> int:
    made = cache_parser(
        "doctor",
        "Is this machine able to do this? With Hydra's overrides: this very run? docs/doctor.md.",
        WithOverrides,
    )
    made.usage = "forgelm doctor [--offline [--deep]] [OPTIONS] [OVERRIDES]"
    made.add_argument(
        "--offline",
        action="store_true",
        help="check the caches instead of the network; with overrides: load that run, cut off",
    )
    made.add_argument(
        "--deep", action="store_true", help="with --offline: hash every byte of the hub cache"
    )
    return answer(argv, made, _work, _text)


def _work(arguments: argparse.Namespace) -> dict[str, Any] | Failed:
    from forgelm.airgap.doctor import Asked, Status, examine
    from forgelm.errors import ConfigError, ForgeError, RunError

    listen(arguments)
    if arguments.deep and not arguments.offline:
        raise ConfigError("--deep goes with --offline; add it, or leave --deep out")
    asked = Asked(arguments.offline, arguments.deep)
    if arguments.words:
        asked = _of_run(arguments)
    checks = [vars(found) for found in examine(asked)]
    counts = {status.name: sum(c["status"] == status for c in checks) for status in Status}
    result = {"checks": checks, "summary": counts}
    bad = [f"{found['name']}: {found['detail']}" for found in checks if found["status"] in _BAD]
    if not bad:
        return result
    count = f"{len(bad)} of {len(checks)} checks failed, first {bad[0]}"
    problem: ForgeError = RunError(count) if counts["crash"] else ConfigError(count)
    return Failed(result, [problem])


def _of_run(arguments: argparse.Namespace) -> Any:
    """The runs that the overrides ask for; a wrong request is refused as by train."""
    from forgelm.airgap.doctor import Asked
    from forgelm.cli.train import request_from
    from forgelm.cluster.launchers import chosen
    from forgelm.config.compose import register_schema
    from forgelm.config.request import check_request

    request = request_from(arguments.words)
    register_schema()
    points = check_request(request)
    by_slurm = any(chosen(point.composed) is not None for point in points)
    return Asked(
        arguments.offline, arguments.deep, request, points, arguments.words, by_slurm=by_slurm
    )


def _text(result: dict[str, Any]) -> str:
    colours = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    width = max(len(found["name"]) for found in result["checks"])
    lines = []
    for found in result["checks"]:
        status = f"{found['status']:<5}"
        if colours:
            status = f"\x1b[{_COLOURS[found['status']]}m{status}\x1b[0m"
        lines.append(f"{status}  {found['name']:<{width}}  {found['detail']}")
        if found["remedy"] is not None and found["status"] != "ok":
            lines.append(f"{'':<{width + 9}}-> {found['remedy']}")
    counts = [f"{number} {name}" for name, number in result["summary"].items() if number]
    return "\n".join([*lines, f"{len(result['checks'])} checks: {', '.join(counts)}"])
