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
from hydra.core.override_parser.types import Override, ValueType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from forgelm.config.compose import Request
from forgelm.config.extras import lacking
from forgelm.config.keys import all_keys, expected, nearest, no_launcher_key, schema_tree
from forgelm.config.modes import modes
from forgelm.config.validate import token_in
from forgelm.redact import has_token, redact

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
    if has_token(text):
        findings.add(token_in(redact(key)))
        return False
    if key.startswith(("hydra.", "hydra/")):
        return _hydra_key(item, findings)
    if item.is_delete():
        findings.add(_removed(text, key))
        return False
    if key == "teacher.run_hash":
        findings.add(f"{text}: filled in by forgelm; choose the teacher with teacher.run=RUN")
        return False
    tree = schema_tree()
    if item.is_add() or item.is_force_add():
        keys = all_keys(tree)
        if item.is_force_add() and key in keys and key not in GROUPS:
            return True
        if key in keys or key in GROUPS:
            findings.add(f"{text}: {key} exists; drop the + and write {text.lstrip('+')}")
        else:
            findings.add(f"{text}: no such key, and none can be added{nearest(key, keys)}")
        return False
    if item.is_sweep_override() and not request.multirun:
        listed = expected(tree, key).startswith("a list")
        hint = f", or write {key}=[...] for a list" if listed else ""
        findings.add(f"{text}: a sweep; add -m to run all of it{hint}")
        return False
    if key in GROUPS and item.package is None:
        return _known_choice(item, request, findings)
    if not item.is_sweep_override() and type(item.value()) is int:
        wanted = expected(tree, key)
        if wanted.startswith("true or false"):
            findings.add(f"{text}: must be {wanted}")
            return False
    return True


def _removed(text: str, key: str) -> str:
    keys = all_keys(schema_tree())
    if key in GROUPS:
        return f"{text}: groups can't be removed; choose another with {key}=NAME"
    if key not in keys:
        return f"{text}: no such key{nearest(key, keys)}"
    if any(name.startswith(f"{key}.") for name in keys):
        return f"{text}: sections can't be removed; set the keys in it"
    return f"{text}: keys can't be removed; set {key} to null or to another value"


def _hydra_key(item: Override, findings: Findings) -> bool:
    """Hydra's own keys: without this a typo in one passes silently."""
    parts = item.key_or_group.split(".")
    node: Any = OmegaConf.structured(HydraConf)
    if item.is_sweep_override():
        findings.add(
            f"{item.input_line}: Hydra's own keys have one value for all runs of a sweep; give one "
            "(a comma in it is quoted: \"key='a,b'\")"
        )
        return False
    if "/" in item.key_or_group:
        return True
    for depth, part in enumerate(parts[1:], 1):
        if not isinstance(node, DictConfig) or not is_dataclass(OmegaConf.get_type(node)):
            return True
        # `in` is false for a key that has no value yet.
        if part not in list(node):
            parent = ".".join(parts[:depth])
            near = nearest(f"{parent}.{part}", [f"{parent}.{name!s}" for name in node])
            findings.add(f"{item.input_line}: no such key of Hydra's{near}")
            return False
        node = node._get_node(part)
    return True


def _known_choice(item: Override, request: Request, findings: Findings) -> bool:
    group = item.key_or_group
    own_path = any(text.startswith("hydra.searchpath=") for text in request.overrides)
    if own_path or item.value_type is ValueType.GLOB_CHOICE_SWEEP:
        return True
    choices = _choices(group, request)
    if item.is_sweep_override():
        names = [str(value).strip("'\"") for value in item.sweep_string_iterator()]
    else:
        names = [item.get_value_string().strip("'\"")]
    allowed_too = {"null"} if group == "experiment" else set()
    wrong = [name for name in names if name not in {*choices, *allowed_too}]
    for name in wrong:
        near = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
        near = near or [choice for choice in choices if choice.rpartition("/")[2] == name]
        hint = f"; did you mean {group}={near[0]}?" if near else ""
        findings.add(f"{group}={name}: no such {group}; one of {', '.join(choices)}{hint}")
    return not wrong


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
    found: list[str] = []
    base: DictConfig | None
    try:
        base = request.compose(groups)
    except (HydraException, OmegaConfBaseException) as base_error:
        found += _files_problems(groups, request, base_error)
        try:
            base = Request().compose([g for g in groups if not g.startswith("experiment=")])
        except (HydraException, OmegaConfBaseException):
            base = None
    for item in values:
        if base is None:
            break
        trial = copy.deepcopy(base)
        problems = _try(item, trial)
        base = base if problems else trial
        found += problems
    for problem in found or [said(error)]:
        findings.add(problem)
    return base


def _files_problems(groups: list[str], request: Request, error: Exception) -> list[str]:
    """What is wrong with the files that were chosen: the one that Hydra stumbled over, own primary
    files and experiments."""
    stumbled = re.match(r"In '([^']+)'", str(error))
    chosen = [group.replace("=", "/") for group in groups if group.startswith("experiment=")]
    names = dict.fromkeys([*chosen, request.config_name, *(stumbled.groups() if stumbled else ())])
    found = []
    for name in names:
        files = [folder / f"{name}.yaml" for folder in request.folders()]
        for file in [file for file in files if file.is_file()][:1]:
            found += [f"In '{name}': {problem}" for problem in _file_problems(name, file)]
    if not found or "Could not" in str(error):
        found.insert(0, said(error))
    return found


def _file_problems(name: str, file: Path) -> Iterator[str]:
    """What is wrong with the keys and values of a config file."""
    text = file.read_text(encoding="utf-8")
    content = OmegaConf.load(file)
    package = re.search(r"^#\s*@package\s+(\S+)", text, re.MULTILINE)
    group = name.rpartition("/")[0].replace("/", ".")
    prefix = {"_global_": "", None: group}.get(package and package.group(1), group)
    tree = schema_tree()
    for key, value in _file_leaves(content, f"{prefix}." if prefix else ""):
        if key.split(".")[0] == "hydra" or key.removeprefix(f"{prefix}.") == "defaults":
            continue
        shown = (
            "null"
            if value is None
            else str(value).lower()
            if value is True or value is False
            else value
        )
        problem = _try_value(f"{key}={shown}", key, value, tree)
        if problem is not None:
            unquoted = value is False and "one of no," in problem
            yield problem + ("; YAML reads a bare no as false: quote it" if unquoted else "")


def _file_leaves(node: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if not isinstance(node, DictConfig):
        return
    for name in node:
        value = node._get_node(name)
        if isinstance(value, DictConfig) and not value._is_none():
            yield from _file_leaves(value, f"{prefix}{name!s}.")
        else:
            yield f"{prefix}{name!s}", OmegaConf.to_container(node, resolve=False)[name]  # type: ignore[index]


def _try(item: Override, config: DictConfig) -> list[str]:
    """Apply one override to the typed config; what is wrong with it."""
    key, value = item.key_or_group, item.value()
    if key.startswith("hydra.launcher."):
        problem = _try_launcher(item.input_line or "", key, value, config)
        return [problem] if problem else []
    if key.startswith("hydra."):
        return []
    section = isinstance(value, dict) and OmegaConf.is_dict(OmegaConf.select(config, key))
    parts = dict(_leaves(value, f"{key}.")) if section else {key: value}  # type: ignore[arg-type]
    problems = []
    for name, part in parts.items():
        text = f"{name}={part}" if section else item.input_line or ""
        problem = _try_value(text, name, part, config)
        problems += [problem] if problem else []
    return problems


def _try_launcher(text: str, key: str, value: Any, config: DictConfig) -> str | None:
    """Set one of the launcher's own keys, which Hydra types; what is wrong with it."""
    launcher, name = config.hydra.launcher, key.removeprefix("hydra.launcher.")
    if text.startswith(("+", "~")):
        return None
    if name.startswith("additional_parameters."):
        return f"{text}: sbatch's own options are added: write +{text}"
    keys = all_keys(launcher)
    if name not in keys:
        if len(keys) == 1:
            return f"{text}: runs are started here; to submit them add hydra/launcher=slurm"
        return f"{text}: {no_launcher_key(name, keys)}"
    try:
        OmegaConf.update(launcher, name, value, merge=True)
    except OmegaConfBaseException as error:
        return f"{text}: must be {expected(launcher, name) or said(error)}"
    return None


def _leaves(value: dict[Any, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, inner in value.items():
        if isinstance(inner, dict):
            yield from _leaves(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", inner


def _try_value(text: str, key: str, value: Any, config: DictConfig) -> str | None:
    keys = all_keys(config)
    if key not in keys:
        section, _, name = key.partition(".")
        owners = [mode for mode, node in modes().items() if name in vars(node())]
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
    if "'hydra/launcher/submitit_" in lines[0]:
        module = "hydra_plugins.hydra_submitit_launcher"
        problem = lacking("slurm", module, "submitting runs, to Slurm or in the background,")
        if problem is not None:
            return problem
    found = re.search(r"Could not find '(\S+)/([^/\s]+)'", lines[0])
    if found and len(lines) > 1 and lines[1].startswith("Available options"):
        group, choice = found.groups()
        choices = [*itertools.takewhile(lambda line: not line.startswith("Config"), lines[2:])]
        close = difflib.get_close_matches(choice, choices, n=1)
        hint = f"; did you mean {group}={close[0]}?" if close else ""
        return f"{group}={choice}: no such {group}; one of {', '.join(choices)}{hint}"
    if len(lines) > 1 and lines[1].startswith("Config search path"):
        return lines[0]
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
