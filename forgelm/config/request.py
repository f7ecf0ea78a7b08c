"""From a command line to checked configs: every point composed, all errors at once, no torch.

Hydra stops at its first error. So each override is tried alone against the composed config, and
what each says is put in one form: the key, the value, what is allowed, the nearest right name.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.conf import HydraConf
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, EnumNode, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from forgelm.config.compose import CONFIG_NAME, compose_run, conf_dir, to_typed
from forgelm.config.schema import MODES, RunConfig, TeacherKind
from forgelm.config.validate import check, redact, uses_teacher
from forgelm.errors import ConfigError

GROUPS = ("task", "model", "teacher", "mode", "experiment")

_KNOWN_AS = {
    "lr": "training.learning_rate",
    "batch_size": "training.per_device_train_batch_size",
    "train_batch_size": "training.per_device_train_batch_size",
    "eval_batch_size": "training.per_device_eval_batch_size",
    "num_train_epochs": "epochs",
    "num_epochs": "epochs",
    "steps": "max_steps",
    "output_dir": "output_root",
    "max_seq_length": "task.max_length",
    "gradient_checkpointing": "training.activation_checkpointing",
    "warmup_ratio": "training.warmup_steps",
    "optimizer": "training.optim",
    "gamma": "mode.alpha",
}


@dataclass(frozen=True)
class Request:
    """What was typed: overrides as Hydra reads them, and where configs are looked for."""

    overrides: tuple[str, ...] = ()
    config_name: str = CONFIG_NAME
    config_path: Path | None = None
    config_dir: Path | None = None
    multirun: bool = False

    def compose(self, overrides: Sequence[str]) -> DictConfig:
        return compose_run(overrides, self.config_name, self.config_path, self.config_dir)

    def folders(self) -> list[Path]:
        """Where groups are looked up, in Hydra's order."""
        found = [self.config_path or conf_dir(), self.config_dir]
        return [folder for folder in found if folder is not None]


@dataclass
class _Findings:
    """Problems in the order found, each once; a sweep's points share most of theirs."""

    problems: list[str] = field(default_factory=list)

    def add(self, problem: str) -> None:
        line = redact(" ".join(problem.split()))
        if line not in self.problems:
            self.problems.append(line)


def check_request(request: Request) -> list[RunConfig]:
    """The checked config of every run asked for.

    Raises:
        ConfigError: with all problems of all points.
    """
    findings = _Findings()
    if request.config_dir is not None and not request.config_dir.is_dir():
        findings.add(f"--config-dir {request.config_dir}: no such folder")
        raise ConfigError(findings.problems)
    parsed = _parse(request.overrides, findings)
    kept = [item for item in parsed if _allowed(item, request, findings)]
    configs = [
        config
        for point in _points(kept, request, findings)
        if (config := _check_point(point, request, findings)) is not None
    ]
    if findings.problems:
        raise ConfigError(findings.problems)
    return configs


def teacher_run(
    config: RunConfig, compose: Callable[[list[str]], DictConfig]
) -> RunConfig | None:
    """The config of the run that `teacher=auto` stands for, where the task has no published model.

    Raises:
        ConfigError: the task's teacher_experiment isn't right.
    """
    name = config.task.teacher_experiment
    if not uses_teacher(config) or config.teacher.kind is not TeacherKind.auto or not name:
        return None
    if config.task.teacher:
        return None
    try:
        made = to_typed(compose([f"experiment={name}"]))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"task.teacher_experiment={name}: {_say(error, None)}") from error
    problems = check(made)
    if problems:
        raise ConfigError([f"task.teacher_experiment={name}: {line}" for line in problems])
    return replace(
        made, output_root=config.output_root, wandb=config.wandb, debug=config.debug, run_name=None
    )


def _parse(overrides: Iterable[str], findings: _Findings) -> list[Override]:
    parser = OverridesParser.create()
    parsed = []
    for text in overrides:
        try:
            parsed += parser.parse_overrides([text])
        except HydraException:
            findings.add(
                f"{text!r}: not an override; write key=value, as in training.learning_rate=1e-4 "
                "(quote values with spaces or special characters: \"key='a value'\")"
            )
    return parsed


def _allowed(item: Override, request: Request, findings: _Findings) -> bool:
    """Whether the override may be tried; what its prefix or group forbids is a finding."""
    key, text = item.key_or_group, item.input_line or ""
    if key.startswith(("hydra.", "hydra/")):
        return _hydra_key(item, findings)
    if item.is_delete():
        findings.add(f"{text}: keys can't be removed; set {key} to null or to another value")
        return False
    if item.is_add() or item.is_force_add():
        keys = _keys(_schema_tree())
        if key in keys or key in GROUPS:
            if item.is_force_add() and key in keys:
                return True
            findings.add(f"{text}: {key} exists; drop the + and write {text.lstrip('+')}")
        else:
            findings.add(f"{text}: no such key, and none can be added{_nearest(key, keys)}")
        return False
    if item.is_sweep_override() and not request.multirun:
        findings.add(f"{text}: a sweep; add -m to run all of it, or write {key}=[...] for a list")
        return False
    if key in GROUPS and item.package is None:
        return _known_choice(item, request, findings)
    return True


def _hydra_key(item: Override, findings: _Findings) -> bool:
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
            near = _nearest(f"{parent}.{part}", [f"{parent}.{name}" for name in node])
            findings.add(f"{item.input_line}: no such key of Hydra's{near}")
            return False
        node = node._get_node(part)
    return True


def _known_choice(item: Override, request: Request, findings: _Findings) -> bool:
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


def _points(kept: list[Override], request: Request, findings: _Findings) -> list[list[str]]:
    """The overrides of every run: one list, or a sweep's product."""
    lines = [str(item.input_line) for item in kept]
    if not request.multirun:
        return [lines]
    own_sweeper = [line for line in lines if line.startswith("hydra/sweeper=")]
    if own_sweeper:
        return [[line for item, line in zip(kept, lines, strict=True) if not item.is_sweep_override()]]
    hydra = [line for line in lines if line.startswith("hydra")]
    task = [item for item, line in zip(kept, lines, strict=True) if line not in hydra]
    try:
        batches = BasicSweeper.split_arguments(task, max_batch_size=None)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        findings.add(f"sweep: {error}")
        return []
    return [hydra + list(point) for batch in batches for point in batch]


def _check_point(overrides: list[str], request: Request, findings: _Findings) -> RunConfig | None:
    try:
        composed = request.compose(overrides)
    except (HydraException, OmegaConfBaseException) as error:
        composed_anyway = _explain(overrides, request, error, findings)
        if composed_anyway is None:
            return None
        composed = composed_anyway
    try:
        config = to_typed(composed)
    except OmegaConfBaseException as error:
        findings.add(_say(error, None))
        return None
    problems = check(config)
    if not problems:
        try:
            teacher_run(config, request.compose)
        except ConfigError as error:
            problems = error.problems
    for problem in problems:
        findings.add(problem)
    return None if problems else config


def _explain(
    overrides: list[str], request: Request, error: Exception, findings: _Findings
) -> DictConfig | None:
    """Find every wrong override; the config composed without them, or None if that fails too."""
    parsed = OverridesParser.create().parse_overrides(overrides)
    groups = [str(i.input_line) for i in parsed if i.key_or_group in GROUPS or "/" in i.key_or_group]
    values = [i for i in parsed if str(i.input_line) not in groups]
    before = len(findings.problems)
    try:
        base = request.compose(groups)
    except (HydraException, OmegaConfBaseException) as base_error:
        findings.add(_say(base_error, None))
        base = None
    if base is None:
        try:
            base = request.compose([g for g in groups if not g.startswith("experiment=")])
        except (HydraException, OmegaConfBaseException):
            return None
    for item in values:
        trial = copy.deepcopy(base)
        problem = _try(item, trial)
        if problem is None:
            base = trial
        else:
            findings.add(problem)
    if len(findings.problems) == before:
        findings.add(_say(error, None))
    return base


def _try(item: Override, config: DictConfig) -> str | None:
    """Apply one override to the typed config; what is wrong with it, if anything."""
    key, text = item.key_or_group, item.input_line or ""
    if key.startswith("hydra."):
        return None
    keys = _keys(config)
    if key not in keys:
        section, _, name = key.partition(".")
        owners = [mode for mode, node in MODES.items() if name in vars(node())]
        if section == "mode" and owners:
            return f"{text}: {key} is a key of mode={' and mode='.join(owners)}"
        return f"{text}: no such key{_nearest(key, keys)}"
    node = OmegaConf.select(config, key, throw_on_missing=False)
    if OmegaConf.is_dict(node) and not isinstance(item.value(), dict):
        inside = ", ".join(f"{key}.{name}" for name in list(node)[:4])
        return f"{text}: {key} is a section; set a key in it ({inside}, ...)"
    try:
        OmegaConf.update(config, key, item.value(), merge=True)
    except OmegaConfBaseException as error:
        return _say(error, item, config)
    return None


def _say(error: BaseException, item: Override | None, config: DictConfig | None = None) -> str:
    """One line for one of Hydra's or OmegaConf's errors."""
    root: BaseException = error
    while isinstance(root.__cause__, OmegaConfBaseException):
        root = root.__cause__
    if item is not None and config is not None:
        expected = _expected(config, item.key_or_group)
        if expected:
            return f"{item.input_line}: must be {expected}"
    lines = [line.strip() for line in str(root).splitlines() if line.strip()]
    message = lines[0] if lines else type(root).__name__
    outer = str(error).splitlines()
    where = outer[0].split(":")[0] + ": " if outer and outer[0].startswith("In '") else ""
    key = getattr(root, "full_key", None)
    if key and "not in" in message:
        tree = _schema_tree()
        message = f"{key}: no such key{_nearest(str(key), _keys(tree))}"
    elif key and "Missing mandatory value" in message:
        message = f"{key} is missing: give it, as in {key}=VALUE"
    elif key:
        message = f"{key}: {message}"
    return where + message


def _expected(config: DictConfig, key: str) -> str:
    """What a key takes, in words: `one of a, b`, `a number`, `true or false`."""
    parent_key, _, name = key.rpartition(".")
    parent = OmegaConf.select(config, parent_key) if parent_key else config
    node = parent._get_node(name) if isinstance(parent, DictConfig) else None
    if node is None:
        return ""
    words = ""
    if isinstance(node, EnumNode):
        words = "one of " + ", ".join(node.enum_type.__members__)
    elif OmegaConf.is_list(node) or "List" in str(node._metadata.ref_type):
        words = f"a list, as in {key}=[a,b]"
        element = node._metadata.element_type
        if isinstance(element, type) and hasattr(element, "__members__"):
            words += f", of {', '.join(element.__members__)}"
    else:
        kind = node._metadata.ref_type
        words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}.get(
            kind, ""
        )
    return f"{words} or null" if words and node._metadata.optional else words


def _schema_tree() -> DictConfig:
    """All keys there are, whatever the mode."""
    tree = OmegaConf.structured(RunConfig)
    tree.mode = OmegaConf.merge(*(dict(vars(node())) for node in MODES.values()))
    return tree


def _keys(config: DictConfig, prefix: str = "") -> list[str]:
    """Every dotted key of a config, sections included, Hydra's own left out."""
    keys: list[str] = []
    for name in config:
        if not prefix and name == "hydra":
            continue
        key = f"{prefix}{name}"
        keys.append(key)
        node: Any = config._get_node(name)
        if isinstance(node, DictConfig) and not node._is_none() and not node._is_missing():
            keys += _keys(node, f"{key}.")
    return keys


def _nearest(key: str, keys: Sequence[str]) -> str:
    """`; did you mean X?`, by the usual other names, the last part, then by spelling."""
    last = key.rpartition(".")[2]
    same_last = [name for name in keys if name.rpartition(".")[2] == last]
    known = _KNOWN_AS.get(last)
    if same_last:
        near = same_last[0]
    elif known in keys:
        near = known
    else:
        close = difflib.get_close_matches(key, keys, n=1, cutoff=0.6)
        if not close:
            lasts = {name.rpartition(".")[2]: name for name in reversed(keys)}
            close = [lasts[n] for n in difflib.get_close_matches(last, list(lasts), n=1, cutoff=0.7)]
        if not close:
            return ""
        near = close[0]
    return f"; did you mean {near}?"
