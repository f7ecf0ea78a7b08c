"""`forgelm bundle`: caches packed into one archive, to be carried where there is no network."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from forgelm.airgap.verify import a_path
from forgelm.cli.arguments import answer, cache_parser, check_output, listen

if TYPE_CHECKING:
    from forgelm.airgap.contents import Chosen, Contents

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


def main(argv: Sequence[str]) -> int:
    made = cache_parser(
        "bundle",
        "Pack the caches into one archive, with hashes of all that is in it: docs/bundle.md.",
    )
    made.add_argument("--output", metavar="FILE.tar", required=True, type=a_path)
    for kind in ("model", "dataset"):
        made.add_argument(
            f"--{kind}",
            metavar="HUB_ID[@REV]",
            action="append",
            default=[],
            help="pack this alone, at this revision (default: main); may be repeated",
        )
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
        "--against",
        metavar="MANIFEST",
        type=a_path,
        help="the FILE.manifest.json of an earlier bundle: what it carries is left out",
    )
    made.add_argument("--part-size", metavar="SIZE", help="split it into parts: 700M, 4G")
    return answer(argv, made, _work, _text)


def _work(arguments: argparse.Namespace) -> dict[str, Any]:
    from forgelm.airgap import bundle, contents
    from forgelm.airgap.readable import require_readable
    from forgelm.cli.places import carried
    from forgelm.cli.progress import Carried
    from forgelm.errors import ConfigError

    listen(arguments)
    output = arguments.output.expanduser().absolute()
    check_output(output)
    part_size = None if arguments.part_size is None else _bytes(arguments.part_size)
    earlier = None if arguments.against is None else bundle.read_earlier(arguments.against)
    chosen = [
        _chosen(kind, name) for kind in ("model", "dataset") for name in getattr(arguments, kind)
    ]
    for flag, folder in (
        ("--cache-dir", arguments.cache_dir),
        ("--datasets-cache", arguments.datasets_cache),
    ):
        if folder is not None and not folder.expanduser().is_dir():
            raise ConfigError(f"{flag} {folder}: no such folder")
    places = carried(arguments.cache_dir, arguments.datasets_cache)
    require_readable(places.values())
    for place in places.values():
        if output.resolve().is_relative_to(place.resolve()):
            raise ConfigError(f"--output {output}: in {place}, which is packed; give another place")
    found = contents.look(places, chosen)
    if arguments.cache_dir is not None and not found.repositories:
        raise ConfigError(
            f"--cache-dir {arguments.cache_dir}: holds no repositories; give the folder that "
            "models--ORG--NAME lies in"
        )
    shown = Carried("packing")
    shown.begin(len(found.repositories), found.size)
    packed = bundle.bundle(found, output, part_size, earlier, shown.move)
    shown.end()
    trees = {top: len(files) for top, files in found.trees.items()}
    return {
        "bundle": str(output),
        "parts": [str(path) for path in packed.files],
        "size_bytes": packed.size_bytes,
        "manifest_sha256": packed.manifest_sha256,
        "repositories": _rows(found),
        "datasets_cache_files": trees.get("datasets", 0),
        "module_files": trees.get("modules", 0) + trees.get("evaluate", 0),
        "left_out": packed.left_out,
    }


def _bytes(text: str) -> int:
    from forgelm.errors import ConfigError

    match = re.fullmatch(r"([1-9]\d*)([KMG]?)", text.upper())
    if match is None:
        raise ConfigError(f"--part-size {text}: not a size; give one such as 700M or 4G")
    return int(match[1]) * _UNITS[match[2]]


def _chosen(kind: str, name: str) -> Chosen:
    from forgelm.airgap.contents import Chosen
    from forgelm.errors import ConfigError

    repo_id, at, revision = name.partition("@")
    if not repo_id or (at and not revision):
        raise ConfigError(f"--{kind} {name}: give a hub id, or a hub id@revision")
    return Chosen(kind, repo_id, revision or None)


def _rows(found: Contents) -> list[dict[str, Any]]:
    return [
        {
            "kind": one.repo.kind,
            "id": one.repo.repo_id,
            "commit": commit,
            "licence": one.licence,
            "files": files,
            "size_bytes": size,
        }
        for one in found.repositories
        for commit, files, size in one.sizes()
    ]


def _text(result: dict[str, Any]) -> str:
    size, parts = result["size_bytes"] / 2**20, result["parts"]
    where = (
        result["bundle"] if parts == [result["bundle"]] else f"{len(parts)} parts, {parts[0]} ..."
    )
    lines = [f"Packed {size:.2f} MiB into {where}"]
    for row in result["repositories"]:
        licence = f", licence {row['licence']}" if row["licence"] else ""
        what = f"{row['files']} files, {row['size_bytes'] / 2**20:.2f} MiB{licence}"
        lines.append(f"  - {row['kind']} {row['id']} at {row['commit'][:12]}: {what}")
    for key, what in (
        ("datasets_cache_files", "files of prepared data sets"),
        ("module_files", "files of metric modules"),
        ("left_out", "of all these files are left out: an earlier bundle carries them"),
    ):
        if result[key]:
            lines.append(f"  - {result[key]} {what}")
    lines.append(f"SHA-256 of the manifest: {result['manifest_sha256']}")
    return "\n".join(lines)
