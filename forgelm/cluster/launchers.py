"""The launchers that a config may name, and what they can be asked for."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from forgelm import slurm
from forgelm.config.compose import Request
from forgelm.config.extras import lacking
from forgelm.config.keys import no_launcher_key
from forgelm.config.request import check_request
from forgelm.config.schema import RunConfig
from forgelm.errors import ConfigError
from forgelm.resolve import Plan
from forgelm.run.files import read_json
from forgelm.run.paths import RunPaths

TO_SLURM = "forgelm.cluster.submit.to_slurm"
TO_THIS_MACHINE = "forgelm.cluster.submit.to_this_machine"
# Slurm looks at time limits twice a minute, and rounds early.
_EARLY_S = 60
_AT_LEAST_ONE = ("array_parallelism", "signal_delay_s", "timeout_min")
_FOLLOW = {"nodes": "launch.nodes", "tasks_per_node": "launch.ranks_per_node"}


def chosen(composed: DictConfig) -> dict[str, Any] | None:
    """The launcher that a config asks for, resolved; None: Hydra's own, which runs in place.

    Raises:
        ConfigError: it is one that forgelm's runs can't be entrusted to.
    """
    launcher: Any = OmegaConf.to_container(composed.hydra.launcher, resolve=True)
    target = launcher["_target_"]
    if target in (TO_SLURM, TO_THIS_MACHINE):
        known = list(vars(OmegaConf.get_type(composed.hydra.launcher))["__dataclass_fields__"])
        problems = [
            f"hydra.launcher.{key}={launcher[key]}: {no_launcher_key(key, known)}"
            for key in launcher
            if key not in known
        ]
        problems += [
            f"hydra.launcher.{key}={launcher[key]}: give {ours} instead"
            for key, ours in _FOLLOW.items()
            if launcher[key] != OmegaConf.select(composed, ours)
        ]
        if target == TO_SLURM:
            problems += filter(None, [lacking("slurm", "submitit", "hydra/launcher=slurm")])
        if problems:
            raise ConfigError(problems)
        return dict(launcher)
    if "submitit" in target:
        raise ConfigError(
            f"hydra/launcher={composed.hydra.runtime.choices['hydra/launcher']}: loses what a "
            "preempted run has done; take hydra/launcher=slurm, which has the same keys"
        )
    return None


def check(launcher: dict[str, Any], plans: Sequence[Plan]) -> None:
    """Refuse what can't be submitted, before anything is written."""
    shapes = {(p.config.launch.nodes, p.config.launch.ranks_per_node) for p in plans}
    if len(shapes) > 1:
        raise ConfigError(
            "launch.nodes and launch.ranks_per_node can't differ within one submission: submit "
            "one value of them at a time"
        )
    problems = [
        f"hydra.launcher.{key}={launcher[key]}: must be at least 1"
        for key in _AT_LEAST_ONE
        if launcher[key] < 1
    ]
    roots = sorted({plan.config.output_root for plan in plans})
    if len(roots) > 1:
        problems.append(f"output_root can't differ within one submission ({', '.join(roots)})")
    if launcher["_target_"] == TO_SLURM:
        problems += _slurm_problems(launcher, roots[0], len(plans))
    if problems:
        raise ConfigError(problems)


def _slurm_problems(launcher: dict[str, Any], root: str, runs: int) -> Iterator[str]:
    lead, limit = launcher["signal_delay_s"], 60 * launcher["timeout_min"]
    if limit < lead + _EARLY_S:
        yield (
            f"hydra.launcher.timeout_min={launcher['timeout_min']}: Slurm's signal comes "
            f"hydra.launcher.signal_delay_s={lead} s before the limit, or a minute earlier, so the "
            "run would be told to stop as it starts: give a longer limit"
        )
    if any(sign in root for sign in "%\\"):
        yield f"output_root={root}: Slurm reads % and \\ in a path otherwise: give another one"
    if "array" in launcher["additional_parameters"]:
        yield (
            "hydra.launcher.additional_parameters.array: arrays are made of a sweep's runs: give -m"
        )
    for program in ("sbatch", "srun"):
        if shutil.which(program) is None:
            yield (
                f"hydra/launcher=slurm: there is no {program} here: submit from a machine of the "
                "cluster, or take hydra/launcher=local, which runs on this one"
            )
            return
    most = slurm.largest_array() if runs > 1 else None
    if most is not None and runs > most:
        yield (
            f"{runs} runs: an array has at most {most} jobs on this cluster (MaxArraySize); "
            "submit the sweep in parts"
        )


def launcher_of(paths: RunPaths) -> dict[str, Any] | None:
    """What a run was last submitted with; None: it was started where it was typed."""
    submitted = read_json(paths.metadata).get("submitted") if paths.metadata.is_file() else None
    return None if submitted is None else dict(submitted["launcher"])


def changed(launcher: dict[str, Any] | None, overrides: Sequence[str]) -> dict[str, Any] | None:
    """A recorded launcher with some of its keys set anew, by `hydra.launcher.KEY=VALUE`.

    Raises:
        ConfigError: there is no such key, its value isn't right, or there is no launcher.
    """
    if launcher is None or not overrides:
        if overrides:
            raise ConfigError(
                f"{overrides[0]}: the run was never submitted; add hydra/launcher=slurm"
            )
        return launcher
    own = "slurm" if launcher["_target_"] == TO_SLURM else "local"
    # Where one that is recorded may be there or not.
    free = "hydra.launcher.additional_parameters."
    words = [f"++{w.lstrip('+')}" if w.lstrip("+").startswith(free) else w for w in overrides]
    (point,) = check_request(Request((f"hydra/launcher={own}", *words)))
    chosen(point.composed)
    made = OmegaConf.create({"hydra": {"launcher": launcher}})
    parsed = OverridesParser.create().parse_overrides(words)
    ConfigLoaderImpl._apply_overrides_to_config(parsed, made)
    return dict(OmegaConf.to_container(made.hydra.launcher))  # type: ignore[arg-type]


def for_run(launcher: dict[str, Any], config: RunConfig) -> dict[str, Any]:
    """A launcher chosen anew for a run that is sealed: with the run's own number of processes."""
    launch = config.launch
    return {**launcher, "nodes": launch.nodes, "tasks_per_node": launch.ranks_per_node}
