"""`forgelm import`: a bundle brought into this machine's caches."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Sequence
from typing import Any

from forgelm.airgap.verify import a_path
from forgelm.cli.arguments import answer, cache_parser, listen


def main(argv: Sequence[str]) -> int:
    made = cache_parser(
        "import",
        "Check a bundle, and merge it into this machine's caches: docs/bundle.md.",
    )
    made.add_argument("file", metavar="FILE", type=a_path, help="the archive, or its first part")
    made.add_argument(
        "--cache-dir",
        metavar="DIR",
        type=a_path,
        help="the hub's cache (default: HF_HUB_CACHE, else HF_HOME/hub)",
    )
    made.add_argument(
        "--datasets-cache",
        metavar="DIR",
        type=a_path,
        help="the cache of data sets (default: HF_DATASETS_CACHE, else HF_HOME/datasets)",
    )
    made.add_argument(
        "--output", metavar="HF_HOME", type=a_path, help="a folder for all caches, to be HF_HOME"
    )
    return answer(argv, made, _work, _text)


def _work(arguments: argparse.Namespace) -> dict[str, Any]:
    from forgelm.airgap import unpack
    from forgelm.cli.places import carried
    from forgelm.cli.progress import Carried

    listen(arguments)
    home = None if arguments.output is None else arguments.output.expanduser().absolute()
    places = carried(arguments.cache_dir, arguments.datasets_cache, home)
    shown = Carried("unpacking")
    found = unpack.unpack(arguments.file, places, shown.move, lambda total: shown.begin(0, total))
    shown.end()
    return {
        "imported": [
            {
                "kind": row.kind,
                "id": row.repo_id,
                "commit": row.commit,
                "files": row.files,
                "new_files": row.new_files,
                "size_bytes": row.size_bytes,
            }
            for row in found.landed
        ],
        "datasets_cache_files": found.trees["datasets"],
        "module_files": found.trees["modules"] + found.trees["evaluate"],
        "cache_dir": str(places["hub"]),
        "datasets_cache": str(places["datasets"]),
        "exports": unpack.exports(places, home, os.environ),
    }


def _text(result: dict[str, Any]) -> str:
    rows = result["imported"]
    lines = [f"Imported {len(rows)} snapshot(s) into {result['cache_dir']}"]
    for row in rows:
        size = row["size_bytes"] / 2**20
        what = f"{row['files']} files, {row['new_files']} of them new, {size:.2f} MiB"
        lines.append(f"  - {row['kind']} {row['id']} at {row['commit'][:12]}: {what}")
    if result["datasets_cache_files"]:
        count = result["datasets_cache_files"]
        lines.append(f"{count} files of prepared data sets in {result['datasets_cache']}")
    if result["module_files"]:
        lines.append(f"{result['module_files']} files of metric modules")
    if result["exports"]:
        lines.append("set these where they are to be used:")
    lines += [f"export {name}={shlex.quote(path)}" for name, path in result["exports"].items()]
    return "\n".join(lines)
