"""`forgelm export RUN`: the final model made whole, or put on the hub."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from forgelm.cli.arguments import answer, parser


def main(argv: Sequence[str]) -> int:
    made = parser("export", "Make a run's final model whole, or put it on the hub.")
    made.add_argument(
        "--merge", action="store_true", help="merge the adapter into its base: a whole model"
    )
    made.add_argument(
        "--output", metavar="DIR", help="for --merge: a new folder (default: merged/ in the run)"
    )
    made.add_argument(
        "--push", metavar="HUB_ID", help="upload the final files, with --merge the whole model"
    )
    made.add_argument(
        "--private", action="store_true", help="for --push: where the repository is made, hide it"
    )
    return answer(argv, made, _work, _text)


def _work(arguments: argparse.Namespace) -> dict[str, Any]:
    from forgelm.errors import ConfigError
    from forgelm.final import complete
    from forgelm.log import set_up
    from forgelm.run.find import find_run

    set_up(arguments.debug, sys.stderr)
    if not arguments.merge and arguments.push is None:
        raise ConfigError("export needs --merge, --push HUB_ID, or both; see forgelm export --help")
    for name, given, other in (
        ("--output", arguments.output is not None, "--merge"),
        ("--private", arguments.private, "--push"),
    ):
        if given and not getattr(arguments, other.removeprefix("--")):
            raise ConfigError(f"{name} goes with {other}; add it, or leave {name} out")
    paths = find_run(arguments.run, Path(arguments.output_root))
    complete(paths)
    from forgelm.export import check_push, files_in, merge_run, push_files, push_run

    if arguments.push is not None:
        check_push(arguments.push)
    merged = commit = None
    if arguments.merge:
        merged = merge_run(paths, Path(arguments.output) if arguments.output else None)
    if arguments.push is not None:
        if merged is not None:
            commit = push_files(merged, files_in(merged), arguments.push, arguments.private)
        else:
            commit = push_run(paths, arguments.push, arguments.private)
    return {
        "run": str(paths.root),
        "merged": None if merged is None else str(merged),
        "pushed": arguments.push,
        "commit": commit,
    }


def _text(result: dict[str, Any]) -> str:
    lines = []
    if result["merged"]:
        lines.append(f"the whole model is in {result['merged']}")
    if result["pushed"]:
        lines.append(f"uploaded to {result['pushed']}, commit {result['commit']}")
    return "\n".join(lines)
