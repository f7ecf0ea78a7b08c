"""A run's life: its directory made or found again, its state, its starts and stops."""

from __future__ import annotations

import hashlib
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from forgelm import slurm, stop
from forgelm.config.compose import to_typed
from forgelm.config.identity import config_hash
from forgelm.config.modes import modes
from forgelm.config.schema import RunConfig
from forgelm.errors import ConfigError, RunError
from forgelm.run.checkpoints import sweep_leftovers
from forgelm.run.files import read_json, write_json, write_text
from forgelm.run.lock import Ownership, owned
from forgelm.run.metadata import command_line, git, machine, now, versions
from forgelm.run.paths import OutputRoot, RunPaths, sealed_name
from forgelm.run.registry import register, unregister
from forgelm.run.state import Status, TrainingState, load_state
from forgelm.world import ALONE, World

EXTENDING = ("max_steps", "epochs")


@dataclass
class Run:
    """An open run. One process may write into its directory: the first of its world."""

    config: RunConfig
    paths: RunPaths
    output: OutputRoot
    state: TrainingState
    metadata: dict[str, Any]
    ownership: Ownership | None = None
    world: World = ALONE

    @property
    def run_id(self) -> str:
        return str(self.metadata["run_id"])

    def update(self, **changes: Any) -> None:
        """Change the run's state, on disk too."""
        self.state = replace(self.state, **changes)
        if self.owned:
            self.state.save(self.paths)

    def note(self, **facts: Any) -> None:
        """Add facts to the metadata, on disk too."""
        self.metadata |= facts
        if self.owned:
            write_json(self.paths.metadata, self.metadata)

    @property
    def owned(self) -> bool:
        """Whether this process may write: it is the first rank, and nobody took the run over."""
        return self.ownership is not None and not self.ownership.lost

    def share(self) -> None:
        """Give every rank what the first one knows of the run."""
        self.state, self.metadata = self.world.share((self.state, self.metadata))

    def check_ownership(self) -> None:
        """Raise RunError when another process has taken the directory over."""
        if self.ownership is not None:
            self.ownership.check()


def locate(config: RunConfig, in_sweep: bool) -> RunPaths:
    """The run directory of a config: named by `run_name`, else by the config's hash."""
    digest = config_hash(config)
    name = config.run_name or digest
    if config.run_name and in_sweep:
        name = f"{config.run_name}-{digest}"
    root = OutputRoot(Path(config.output_root))
    return root.run(config.task.name, config.model.name, config.mode.name, name)


def load_sealed(folder: Path) -> RunConfig:
    """The resolved config that a run was started with.

    Raises:
        ConfigError: there is no run, or its config isn't one that this version understands.
    """
    path = RunPaths(folder).config
    if not path.is_file():
        raise ConfigError(f"{folder}: no run there; give a run directory (it has a config.yaml)")
    try:
        loaded = OmegaConf.load(path)
        tree = OmegaConf.structured(RunConfig)
        if loaded.mode.name not in modes():
            raise ConfigError(
                f"{path}: mode={loaded.mode.name} is of a package that isn't installed here: "
                "install it"
            )
        tree.mode = OmegaConf.structured(modes()[loaded.mode.name])
        merged = OmegaConf.merge(tree, loaded)
    except ConfigError:
        raise
    except Exception as error:
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise ConfigError(
            f"{path}: not a config of this version of forgelm: {said}; restore it"
        ) from error
    assert isinstance(merged, DictConfig)
    return to_typed(merged)


def is_complete(paths: RunPaths) -> bool:
    state = load_state(paths)
    return state is not None and state.pipeline_complete


def seal(
    paths: RunPaths,
    config: RunConfig,
    digest: str,
    overrides: list[str],
    status: Status = Status.created,
    **facts: Any,
) -> None:
    """Create the run directory with its config, metadata (`facts` among it) and state, if it isn't
    there yet."""
    paths.root.mkdir(parents=True, exist_ok=True)
    if not paths.metadata.is_file():
        run_id = f"fg-{uuid.uuid4().hex[:12]}"
        write_json(
            paths.metadata,
            {
                "run_id": run_id,
                "command": command_line(),
                "overrides": overrides,
                "config_hash": digest,
                "created": now(),
                "seed": config.seed,
                "wandb_id": run_id,
                "sessions": [],
                **facts,
            },
        )
    if not paths.config.is_file():
        write_text(paths.config, OmegaConf.to_yaml(asdict(config)))
    if not paths.state.is_file():
        TrainingState(status=status).save(paths)


def extend(run: Run) -> None:
    """Where the run was asked to go further than it is sealed for: seal the new goal over the old.

    The past is kept, and the change noted in the metadata.
    """
    sealed = load_sealed(run.paths.root)
    pairs = {key: [getattr(sealed, key), getattr(run.config, key)] for key in EXTENDING}
    change = {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}
    if not change:
        return
    run.note(extended=[*run.metadata.get("extended", []), {"at": now(), **change}])
    if not run.owned:
        return
    if run.paths.eval.is_file():
        write_json(run.paths.eval, read_json(run.paths.eval) | {"after": None, "peak": None})
    write_text(run.paths.config, OmegaConf.to_yaml(OmegaConf.structured(run.config)))
    run.update(pipeline_complete=False)


def enrol(
    paths: RunPaths,
    config: RunConfig,
    digest: str,
    overrides: list[str],
    submitted: dict[str, Any] | None = None,
) -> None:
    """Seal and register a run that will be begun later, so that it isn't forgotten.

    `submitted`: how, if a scheduler is to begin it.
    """
    state = load_state(paths)
    facts = {} if submitted is None else {"submitted": submitted}
    status = Status.created if submitted is None else Status.submitted
    seal(paths, config, digest, overrides, status, **facts)
    metadata = read_json(paths.metadata)
    register(OutputRoot(paths.root.parents[3]), metadata["run_id"], paths)
    if metadata != metadata | facts:
        write_json(paths.metadata, metadata | facts)
    if submitted is not None and state is not None:
        replace(state, status=status).save(paths)


@contextmanager
def opened(paths: RunPaths, config: RunConfig, digest: str, overrides: list[str]) -> Iterator[Run]:
    """Own the run directory, new or incomplete, while the pipeline works in it.

    Raises:
        RunInUse: another process is in it.
    """
    # Where the run lies, not where it was sealed: its output root may have been moved.
    output = OutputRoot(paths.root.parents[3])
    with owned(paths) as ownership:
        sweep_leftovers(paths)
        seal(paths, config, digest, overrides)
        metadata, state = read_json(paths.metadata), load_state(paths) or TrainingState()
        run = Run(config, paths, output, state, metadata, ownership)
        register(output, run.run_id, paths)
        if metadata["sessions"]:
            run.update(restarts=run.state.restarts + 1)
        run.update(status=Status.running)
        try:
            yield run
        finally:
            if run.state.pipeline_complete and run.owned:
                unregister(output, run.run_id)


def follower(config: RunConfig, paths: RunPaths, world: World) -> Run:
    """The run as a rank other than the first sees it, until the first shares what it knows."""
    output = OutputRoot(Path(config.output_root))
    return Run(config, paths, output, TrainingState(), {}, world=world)


def start_session(run: Run) -> None:
    """Note this start: where it runs, with which versions and code."""
    submitted, job = run.metadata.get("submitted"), slurm.current()
    last = run.metadata["sessions"][-1] if run.metadata["sessions"] else submitted
    code = sealed_name()
    session: dict[str, Any] = {
        "started": now(),
        "command": command_line(),
        "machine": machine(),
        "python": sys.executable,
        "versions": versions(),
        "code": code,
        "git": submitted["git"] if code and submitted else git(Path.cwd()),
        "slurm": None if job is None else {"job": job.name, "restart": job.restarts},
        "from_step": run.state.step,
        "reached": _reached(run),
        "stopped": None,
        "reason": None,
    }
    run.note(sessions=[*run.metadata["sessions"], session])
    if last is not None:
        _say_changes(last, session)
    if job is not None:
        _check_gain(run, job)


def end_session(run: Run, status: Status, reason: str, requeued: bool = False) -> None:
    """Note why the process leaves the run, and the status it leaves it in.

    `requeued`: its Slurm job is in the queue again.
    """
    sessions = run.metadata["sessions"]
    if sessions:
        sessions[-1] |= {"stopped": now(), "reason": reason, "to_step": run.state.step}
        sessions[-1]["requeued"] = requeued
        if stop.requested() is not None:
            sessions[-1]["seconds_to_stop"] = round(stop.since(), 2)
    run.note(sessions=sessions)
    run.update(status=status)


def _say_changes(before: dict[str, Any], after: dict[str, Any]) -> None:
    """What can't be frozen, compared: what is installed, and where it runs."""
    from forgelm.log import log

    for title in ("versions", "machine", "python"):
        old, new = before.get(title), after[title]
        if old is None:
            continue
        if not isinstance(new, dict):
            old, new = {title: old}, {title: new}
        changed = [
            f"{name} {old.get(name)} -> {new.get(name)}"
            for name in sorted({*old, *new} - {"host"})
            if old.get(name) != new.get(name)
        ]
        if changed:
            log.warning("%s changed since the last start: %s", title, ", ".join(changed))


def _reached(run: Run) -> str:
    """Changes with whatever a start gains: a checkpoint, a part of the run, an evaluation."""
    known = run.paths.eval.read_bytes() if run.paths.eval.is_file() else b""
    return f"{run.state.stage} {run.state.step} {hashlib.sha256(known).hexdigest()[:8]}"


def _check_gain(run: Run, job: slurm.Job) -> None:
    """Raise RunError where going on would go on forever."""
    launch, sessions = run.config.launch, run.metadata["sessions"]
    if job.restarts > launch.max_restarts:
        raise RunError(
            f"Slurm job {job.name} was requeued {job.restarts} times, and "
            f"launch.max_restarts={launch.max_restarts}: not gone on with by itself; "
            "forgelm resume does"
        )
    idle = 0
    for session in reversed(sessions[:-1]):
        same = (session.get("slurm") or {}).get("job") == job.name
        if not same or session["reached"] != sessions[-1]["reached"]:
            break
        idle += 1
    if idle >= launch.max_idle_restarts:
        raise RunError(
            f"{idle} starts in a row of Slurm job {job.name} gained nothing (all from step "
            f"{run.state.step}, {run.state.stage}; launch.max_idle_restarts="
            f"{launch.max_idle_restarts}): not gone on with by itself; mend the cause, then "
            "forgelm resume"
        )
