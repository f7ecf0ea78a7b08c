"""What is wrong with a request, all of it: Hydra stops at its first error.

Each override is tried alone against the composed config, and what is said of it has one form: the
key, the value given, what is allowed, the nearest right name.
"""

from __future__ import annotations

import copy
import difflib
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Any

from hydra.conf import HydraConf
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from forgelm.config.compose import Request
from forgelm.config.keys import all_keys, expected, nearest, schema_tree
from forgelm.config.schema import MODES
from forgelm.config.validate import redact

GROUPS = ("task", "model", "teacher", "mode", "experiment")


@dataclass
class Findings:
    """Problems in the order found, each once; a sweep's points share most of theirs."""

    problems: list[str] = field(default_factory=list)

    def add(self, problem: str) -> None:
        line = redact(" ".join(problem.split()))
        if line not in self.problems:
            self.problems.append(line)


def allowed(item: Override, request: Request, findings: Findings) -> bool:
    """Whether the override may be tried; what its prefix or group forbids is a finding."""
    key, text = item.key_or_group, item.input_line or ""
    if key.startswith(("hydra.", "hydra/")):
        return _hydra_key(item, findings)
    if item.is_delete():
        findings.add(f"{text}: keys can't be removed; set {key} to null or to another value")
        return False
    if item.is_add() or item.is_force_add():
        keys = all_keys(schema_tree())
        if key in keys or key in GROUPS:
            if item.is_force_add() and key in keys:
                return True
            findings.add(f"{text}: {key} exists; drop the + and write {text.lstrip('+')}")
        else:
            findings.add(f"{text}: no such key, and none can be added{nearest(key, keys)}")
        return False
    if item.is_sweep_override() and not request.multirun:
        findings.add(f"{text}: a sweep; add -m to run all of it, or write {key}=[...] for a list")
        return False
    if key in GROUPS and item.package is None:
        return _known_choice(item, request, findings)
    return True


def _hydra_key(item: Override, findings: Findings) -> bool:
    """Hydra's own keys: without this a typo in one passes silently."""
    parts = item.key_or_group.split(".")
    node: Any = OmegaConf.structured(HydraConf)
    if "/" in item.key_or_group or item.is_add() or item.is_force_add():
        return True
    for depth, part in enumerate(parts[1:], 1):
        if not isinstance(node, DictConfig) or not is_dataclass(OmegaConf.get_type(node)):
            return True
        if part not in node:
            parent = ".".join(parts[:depth])
            near = nearest(f"{parent}.{part}", [f"{parent}.{name!s}" for name in node])
            findings.add(f"{item.input_line}: no such key of Hydra's{near}")
            return False
        node = node._get_node(part)
    return True


def _known_choice(item: Override, request: Request, findings: Findings) -> bool:
    group = item.key_or_group
    choices = _choices(group, request)
    wanted = [str(v) for v in item.sweep_string_iterator()] if item.is_sweep_override() else None
    values = wanted if wanted is not None else [item.value()]
    good = True
    for value in values:
        name = "" if value is None else str(value).strip("'\"")
        if name in choices or (value is None and group == "experiment") or name == "null":
            continue
        good = False
        near = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
        hint = f"; did you mean {group}={near[0]}?" if near else ""
        shown = name if isinstance(value, str) else item.get_value_string()
        findings.add(f"{group}={shown}: no such {group}; one of {', '.join(choices)}{hint}")
    return good


def _choices(group: str, request: Request) -> list[str]:
    return sorted(
        {
            str(path.relative_to(folder / group).with_suffix(""))
            for folder in request.folders()
            for path in (folder / group).rglob("*.yaml")
        }
    )


def explain(
    overrides: list[str], request: Request, error: Exception, findings: Findings
) -> DictConfig | None:
    """Find every wrong override; the config composed without them, or None if that fails too."""
    parsed = OverridesParser.create().parse_overrides(overrides)
    groups = [
        str(i.input_line) for i in parsed if i.key_or_group in GROUPS or "/" in i.key_or_group
    ]
    values = [i for i in parsed if str(i.input_line) not in groups]
    before = len(findings.problems)
    try:
        base = request.compose(groups)
    except (HydraException, OmegaConfBaseException) as base_error:
        rest = _without_files(groups, request, base_error, findings)
        if rest is None:
            return None
        base = rest
    for item in values:
        trial = copy.deepcopy(base)
        problem = _try(item, trial)
        if problem is None:
            base = trial
        else:
            findings.add(problem)
    if len(findings.problems) == before:
        findings.add(said(error))
    return base


def _without_files(
    groups: list[str], request: Request, error: Exception, findings: Findings
) -> DictConfig | None:
    """Find every wrong value of the file that Hydra stumbled over; the config composed without
    experiment and own primary file, to look at the overrides too."""
    match = re.match(r"In '([^']+)'", str(error))
    name = match.group(1) if match else ""
    files = [folder / f"{name}.yaml" for folder in request.folders()]
    before = len(findings.problems)
    for file in [file for file in files if file.is_file()][:1]:
        for problem in _file_problems(name, file):
            findings.add(f"In '{name}': {problem}")
    if len(findings.problems) == before:
        findings.add(said(error))
    try:
        return Request().compose([g for g in groups if not g.startswith("experiment=")])
    except (HydraException, OmegaConfBaseException):
        return None


def _file_problems(name: str, file: Path) -> Iterator[str]:
    """What is wrong with the keys and values of a config file."""
    text = file.read_text(encoding="utf-8")
    content = OmegaConf.load(file)
    package = re.search(r"^#\s*@package\s+(\S+)", text, re.MULTILINE)
    group = name.rpartition("/")[0].replace("/", ".")
    prefix = {"_global_": "", None: group}.get(package and package.group(1), group)
    tree = schema_tree()
    for key, value in _file_leaves(content, f"{prefix}." if prefix else ""):
        if key.split(".")[0] in ("hydra", "defaults"):
            continue
        problem = _try_value(f"{key}={value}", key, value, tree)
        if problem is not None:
            yield problem


def _file_leaves(node: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if not isinstance(node, DictConfig):
        return
    for name in node:
        value = node._get_node(name)
        if isinstance(value, DictConfig) and not value._is_none():
            yield from _file_leaves(value, f"{prefix}{name!s}.")
        else:
            yield f"{prefix}{name!s}", OmegaConf.to_container(node, resolve=False)[name]  # type: ignore[index]


def _try(item: Override, config: DictConfig) -> str | None:
    """Apply one override to the typed config; what is wrong with it, if anything."""
    key = item.key_or_group
    if key.startswith("hydra."):
        return None
    return _try_value(item.input_line or "", key, item.value(), config)


def _try_value(text: str, key: str, value: Any, config: DictConfig) -> str | None:
    keys = all_keys(config)
    if key not in keys:
        section, _, name = key.partition(".")
        owners = [mode for mode, node in MODES.items() if name in vars(node())]
        if section == "mode" and owners:
            return f"{text}: {key} is a key of mode={' and mode='.join(owners)}"
        return f"{text}: no such key{nearest(key, keys)}"
    node = OmegaConf.select(config, key, throw_on_missing=False)
    if OmegaConf.is_dict(node) and not isinstance(value, dict):
        inside = ", ".join(f"{key}.{name!s}" for name in list(node)[:4])
        return f"{text}: {key} is a section; set a key in it ({inside}, ...)"
    try:
        OmegaConf.update(config, key, value, merge=True)
    except OmegaConfBaseException as error:
        wanted = expected(config, key)
        return f"{text}: must be {wanted}" if wanted else said(error)
    return None


def said(error: BaseException) -> str:
    """One line for one of Hydra's or OmegaConf's errors.

    Hydra repeats OmegaConf's error in its own text, its key in a line of its own.
    """
    root: BaseException = error
    while isinstance(root.__cause__, OmegaConfBaseException):
        root = root.__cause__
    lines = [line.strip() for line in str(root).splitlines() if line.strip()]
    if not lines:
        return type(root).__name__
    lacking = re.search(r"Could not find '(\S+)/([^/\s]+)'", lines[0])
    if lacking and len(lines) > 1 and lines[1].startswith("Available options"):
        group, choice = lacking.groups()
        choices = itertools.takewhile(lambda line: not line.startswith("Config search"), lines[2:])
        return f"{group}={choice}: no such {group}; one of {', '.join(choices)}"
    where = re.match(r"In '[^']+'", lines[0])
    message = lines[1] if where and len(lines) > 1 else lines[0]
    stated = next((line for line in lines if line.startswith("full_key:")), "")
    key = stated.partition(":")[2].strip() or getattr(root, "full_key", None)
    if key and "missing mandatory value" in message:
        message = f"{key} is missing: give it, as in {key}=VALUE"
    elif key and " not in " in message:
        message = f"{key}: no such key{nearest(str(key), all_keys(schema_tree()))}"
    elif key:
        message = f"{key}: {message}"
    return f"{where.group()}: {message}" if where else message
