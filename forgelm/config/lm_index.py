"""lm-eval's definitions of tasks by name, without its index of all of them.

lm-eval knows a name by parsing some 14,000 YAML files. Here the lines that can define names are
read from their bytes, and only the files that define the names asked for are parsed, by the rules
of `lm_eval/tasks/_index.py` and `_factory.py` of 0.4.13. Loads neither lm-eval nor anything heavy.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

Config = dict[str, Any]

_IGNORED = ("__pycache__", ".ipynb_checkpoints")
_GROUP_KEYS = ("group", "group_alias", "task", "aggregate_metric_list", "metadata")
_KEYS = ("task", "group", "tag", "include", "class")
_LINE = re.compile(rb"""^["']?(task|group|tag|include|class)["']?[ \t]*:(.*)$""", re.MULTILINE)
_WORD = re.compile(
    rb"""[ \t]*(?:"([^"\\\n]*)"|'([^'\n]*)'|([\w./][\w./ +-]*?))[ \t\r]*(?:[ \t]#.*)?"""
)
_BASE: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class Shape(StrEnum):
    task = "task"
    group = "group"
    tag = "tag"


@dataclass
class Entry:
    """What a name stands for; `tasks` are those of a tag, `config` is as written in `file`."""

    name: str
    shape: Shape
    file: Path | None
    config: Config
    tasks: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Leaf:
    """A task that a name comes down to.

    `config` is what goes over that of its entry, or all there is where it has none.
    """

    name: str
    entry: Entry | None
    config: Config

    @property
    def key(self) -> str:
        """The same for leaves that are the same."""
        over = sorted((key, value) for key, value in self.config.items() if key != "task")
        return f"{self.name} {self.entry.name if self.entry else None} {over}"


@dataclass
class Found:
    """Names with all that belongs to them.

    Attributes:
        entries: by name; what isn't in it is no task.
        files: those that define them, of lm-eval and of the own folder.
    """

    entries: dict[str, Entry]
    files: tuple[list[Path], list[Path]]

    def leaves(self, name: str, config_of: Callable[[Entry], Config] | None = None) -> list[Leaf]:
        """The tasks that a name comes down to, in lm-eval's order; `config_of` reads an entry's."""
        entry = self.entries[name]
        return list(_build(entry, {}, self.entries, config_of or (lambda entry: entry.config)))


def find(names: Iterable[str], include_path: str | Path | None = None) -> Found:
    """What names stand for; the definitions of the folder `include_path` go before lm-eval's."""
    own_files = files_below(Path(include_path).expanduser()) if include_path else []
    own, entries = index(own_files), {}
    theirs: set[Path] = set()
    wanted, seen = list(names), set(names)
    while wanted:
        ours = {name: own[name] for name in wanted if name in own}
        missing = [name for name in wanted if name not in own]
        files = _defining(missing) if missing else []
        theirs.update(files)
        parsed = index(files)
        new = {**ours, **{name: parsed[name] for name in missing if name in parsed}}
        entries.update(new)
        members = {member for entry in new.values() for member in _members(entry)}
        wanted = sorted(members - seen)
        seen |= members
    return Found(entries, (sorted(theirs, key=Path.as_posix), own_files))


def names_of_lm_eval() -> list[str]:
    """All that its files define: tasks, groups and tags."""
    return sorted(_lm_eval()[0])


def files_below(folder: Path) -> list[Path]:
    """The definitions in a folder, in the order in which lm-eval reads them."""
    return [Path(path) for path in _walk(folder)]


def index(files: Iterable[Path]) -> dict[str, Entry]:
    """What files of one folder define; of two definitions of a name the first counts."""
    found: dict[str, Entry] = {}
    for file in files:
        try:
            _enter(load(file), file, found)
        except Exception:
            # lm-eval leaves such files out, whatever it is.
            continue
    return found


def load(path: Path, seen: set[Path] | None = None) -> Config:
    """A definition with what it includes; functions stay text.

    Raises:
        OSError, ValueError, yaml.YAMLError: it can't be read, or isn't a definition.
    """
    path, seen = path.expanduser().resolve(), set() if seen is None else seen
    if path in seen:
        raise ValueError(f"{path} is included twice")
    seen.add(path)
    config = _parsed(path.read_bytes(), path.parent)
    if not isinstance(config, dict):
        raise ValueError(f"{path} isn't a mapping")
    merged: Config = {}
    for included in _listed(config.pop("include", [])):
        merged |= load(path.parent / included, seen)
        merged.pop("task_list", None)
    return merged | config


def _parsed(content: bytes, folder: Path) -> Any:
    class Loader(_BASE):  # type: ignore[misc]
        pass

    def function(loader: Any, node: Any) -> str:
        return f"{folder}/{loader.construct_scalar(node)}"

    Loader.add_constructor("!function", function)
    return yaml.load(content, Loader=Loader)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _enter(config: Config, file: Path, found: dict[str, Entry]) -> None:
    is_group = "class" not in config and "group" in config
    name = config["group" if is_group else "task"]
    if name in found:
        return
    found[name] = Entry(name, Shape.group if is_group else Shape.task, file, config)
    if is_group or not config.get("tag"):
        return
    for tag in _listed(config["tag"]):
        found.setdefault(tag, Entry(tag, Shape.tag, None, {})).tasks.add(name)


def _members(entry: Entry) -> Iterator[str]:
    """The names that what an entry stands for is made of."""
    if entry.shape == Shape.tag:
        yield from entry.tasks
    elif entry.shape == Shape.group:
        yield from _named(entry.config.get("task"))


def _named(members: Any) -> Iterator[str]:
    for member in members if isinstance(members, list) else []:
        if isinstance(member, str):
            yield member
        elif isinstance(member, dict) and "group" in member:
            yield str(member["group"])
            yield from _named(member.get("task"))
        elif isinstance(member, dict) and "task" in member:
            yield str(member["task"])


def _build(
    entry: Entry,
    over: Config,
    entries: Mapping[str, Entry],
    config_of: Callable[[Entry], Config],
) -> Iterator[Leaf]:
    if entry.shape == Shape.tag:
        for name in sorted(entry.tasks):
            yield Leaf(over.get("task", name), entries[name], over)
    elif entry.shape == Shape.group:
        yield from _group(entry.name, config_of(entry), over, entries, config_of)
    else:
        yield Leaf(over.get("task", entry.name), entry, over)


def _group(
    name: str,
    config: Config,
    over: Config,
    entries: Mapping[str, Entry],
    config_of: Callable[[Entry], Config],
) -> Iterator[Leaf]:
    """The members of a group; what else stands beside them goes over their own configs."""
    over = {key: value for key, value in config.items() if key not in _GROUP_KEYS} | over
    members = config.get("task")
    for member in members if isinstance(members, list) else []:
        item = member if isinstance(member, dict) else {"task": member}
        if "group" in item:
            inner = str(item["group"])
            if inner in entries:
                rest = {key: value for key, value in item.items() if key != "group"}
                yield from _build(entries[inner], over | rest, entries, config_of)
            else:
                yield from _group(f"{name}::{inner}", item, over, entries, config_of)
            continue
        base = str(item["task"])
        own = over | item if isinstance(member, dict) else over
        known = entries.get(base)
        if known is None:
            inline = f"{name}::{base}"
            yield Leaf(inline, None, {**own, "task": inline})
        elif known.shape == Shape.tag:
            for task in sorted(known.tasks):
                yield from _build(entries[task], {"task": task, **own}, entries, config_of)
        elif known.shape == Shape.group:
            yield from _build(known, own, entries, config_of)
        else:
            yield from _build(known, {"task": base, **own}, entries, config_of)


def _defining(names: Sequence[str]) -> list[Path]:
    """lm-eval's files that say what names stand for, in its order.

    A definition only counts if no earlier one has its name, so those belong to them.
    """
    by_name, names_in = _lm_eval()
    files: set[str] = set()
    wanted, seen = list(names), set(names)
    while wanted:
        new = {file for name in wanted for file in by_name.get(name, ())} - files
        files |= new
        defined = {name for file in new if (name := names_in[file]) is not None}
        wanted = sorted(defined - seen)
        seen |= defined
    return [Path(file) for file in sorted(files)]


@cache
def _lm_eval() -> tuple[dict[str, list[str]], dict[str, str | None]]:
    """The files that define a name or have it for a tag; and the name that a file defines."""
    root = _lm_eval_tasks()
    texts = _Texts()
    by_name: dict[str, list[str]] = {}
    names_in: dict[str, str | None] = {}
    for file in _walk(root):
        name, tags = texts.names(file)
        names_in[file] = name
        for each in {*tags, *([name] if name else [])}:
            by_name.setdefault(each, []).append(file)
    return by_name, names_in


def _lm_eval_tasks() -> Path:
    found = find_spec("lm_eval")
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError("lm_eval")
    return Path(next(iter(found.submodule_search_locations))) / "tasks"


def _walk(folder: Path) -> list[str]:
    found = []
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in _IGNORED]
        found += [f"{place}/{name}" for name in files if name.endswith(".yaml")]
    return sorted(found)


class _Texts:
    """The keys of files that matter to names, read from their bytes where these are plain."""

    def __init__(self) -> None:
        self._known: dict[str, Config] = {}

    def names(self, file: str) -> tuple[str | None, list[str]]:
        """The name that a file defines, and the task's tags."""
        keys = self._keys(file, ())
        is_group = "class" not in keys and "group" in keys
        name = keys.get("group" if is_group else "task")
        if not isinstance(name, str):
            return None, []
        tags = [] if is_group or not keys.get("tag") else _listed(keys["tag"])
        return name, [tag for tag in tags if isinstance(tag, str)]

    def _keys(self, file: str, within: tuple[str, ...]) -> Config:
        if file not in self._known:
            own = self._own(file)
            merged: Config = {}
            for included in _listed(own.pop("include", [])):
                path = os.path.normpath(os.path.join(os.path.dirname(file), str(included)))
                if path not in within:
                    merged |= self._keys(path, (*within, file))
            self._known[file] = merged | own
        return self._known[file]

    def _own(self, file: str) -> Config:
        try:
            with open(file, "rb", buffering=0) as opened:
                content = opened.read()
            keys = _plain(content)
            if keys is None:
                parsed = _parsed(content, Path(file).parent)
                keys = {key: parsed[key] for key in _KEYS if key in parsed}
        except Exception:
            # A file that can't be read defines nothing, for lm-eval neither.
            return {}
        return keys


def _plain(content: bytes) -> Config | None:
    """The keys, where each stands once at the start of a line before one word; else None."""
    keys: Config = {}
    for match in _LINE.finditer(content):
        key = match[1].decode()
        if key in keys:
            return None
        word = _WORD.fullmatch(match[2])
        following = content[match.end() + 1 : match.end() + 2]
        if word is None or following in (b" ", b"\t"):
            if key in ("task", "class"):
                # The members of a group, as a rule; a task's name where there is no group.
                keys[key] = None
                continue
            return None
        keys[key] = next(part for part in word.groups() if part is not None).decode()
    if "task" in keys and keys["task"] is None and "group" not in keys:
        return None
    if not keys and any(word in content for word in (b"task", b"group", b"include")):
        return None
    return keys
