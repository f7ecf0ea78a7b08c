"""The code of submitted runs, frozen: forgelm and the packages that extend it, once by content."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import forgelm
from forgelm import plugins
from forgelm.config.compose import conf_dir
from forgelm.run.files import written_aside
from forgelm.run.paths import OutputRoot

_PACKAGE = Path(forgelm.__file__).parent
_LENGTH = 16


def seal_code(output: OutputRoot) -> Path:
    """The folder that holds today's code, named by its content and made where there is none yet.

    As the first of `PYTHONPATH` it goes before what is installed.
    """
    texts = {name: path.read_bytes() for name, path in sorted(_sources().items())}
    texts |= _distributions()
    digest = hashlib.sha256()
    for name, text in sorted(texts.items()):
        digest.update(f"{name}\0{hashlib.sha256(text).hexdigest()}\n".encode())
    folder = output.code / digest.hexdigest()[:_LENGTH]
    if not folder.is_dir():
        with written_aside(folder) as beside:
            for name, text in texts.items():
                path = beside / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(text)
    return folder


def _sources() -> dict[str, Path]:
    """Every file to keep, by its place in the sealed folder."""
    found = {f"forgelm/{name}": path for name, path in _files(_PACKAGE)}
    found |= {f"forgelm/conf/{name}": path for name, path in _files(conf_dir())}
    for module in sorted({point.module.partition(".")[0] for point in plugins.points()}):
        spec = find_spec(module)
        if spec is None or module == "forgelm":
            continue
        folders = [Path(place) for place in spec.submodule_search_locations or ()]
        for folder in folders:
            found |= {f"{module}/{name}": path for name, path in _files(folder)}
        if not folders and spec.origin:
            found[Path(spec.origin).name] = Path(spec.origin)
    return found


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        if path.is_file() and not any(p == "__pycache__" or p.startswith(".") for p in name.parts):
            yield str(name), path


def _distributions() -> dict[str, bytes]:
    """What makes the entry points of the kept packages known from there too."""
    found = {}
    for point in plugins.points():
        if point.dist is None:
            continue
        folder = f"{point.dist.name.replace('-', '_')}-{point.dist.version}.dist-info"
        for name in ("METADATA", "entry_points.txt"):
            found[f"{folder}/{name}"] = (point.dist.read_text(name) or "").encode()
    return found
