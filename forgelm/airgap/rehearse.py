"""What a run loads before it trains, loaded by another process that may be cut off the network.

The same functions are called as for training (`pipeline.py`), part by part, so that all that is
missing shows at once. Nothing is written but what such a run keeps in the datasets cache.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from forgelm.airgap.cutoff import cut_off
from forgelm.config.compose import Request, register_schema
from forgelm.config.request import Point, check_request, teacher_run
from forgelm.config.schema import KdConfig, RunConfig, TeacherConfig, TeacherKind
from forgelm.config.validate import uses_teacher
from forgelm.errors import ConfigError, ForgeError, RunError, in_brief
from forgelm.hubcache import OFFLINE, stay_offline
from forgelm.log import log, quiet_libraries, set_up
from forgelm.redact import redact

_KEPT = ("revisions", "data_fingerprint", "lm_eval_fingerprint")


@dataclass(frozen=True)
class Part:
    """A part of a run: `problem` is None where it could be loaded.

    Attributes:
        tried: False where it needs a part that is missing.
        fetchable: whether the problem may be that something isn't in the cache.
        asked: hosts that it tried to reach though it was to stay offline.
    """

    name: str
    detail: str
    problem: str | None = None
    tried: bool = True
    fetchable: bool = False
    asked: tuple[str, ...] = ()


def rehearse(request: Request, offline: bool) -> Iterator[Part]:
    """Load what the runs of a checked request need, in another process; a part at a time.

    With `offline` that process can't reach anything, and its libraries are told so.

    Raises:
        RunError: the process ended before it was done.
    """
    told = {
        "overrides": request.overrides,
        "config_name": request.config_name,
        "config_path": request.config_path and str(request.config_path),
        "config_dir": request.config_dir and str(request.config_dir),
        "multirun": request.multirun,
        "offline": offline,
    }
    environment = {**os.environ, **(dict.fromkeys(OFFLINE, "1") if offline else {})}
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "forgelm.airgap.rehearse"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            env=environment,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(told))
            process.stdin.close()
            for line in process.stdout:
                yield Part(**json.loads(line))
            code = process.wait()
        finally:
            process.kill()
            process.stdout.close()
            process.wait()
        said.seek(0)
        text = said.read()
    log.debug(text)
    if code != 0:
        last = in_brief(text.strip().rpartition("\n")[2])
        hint = "; perhaps for want of memory" if code == -9 else ""
        raise RunError(
            f"the process that loads ended with {code}{hint}: {last or 'it said nothing'}"
        )


def main() -> None:
    """The other process: a request on stdin, a line of JSON on stdout for each part."""
    stay_offline()
    told = json.load(sys.stdin)
    # Libraries print too.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    asked: list[str] = []
    if told.pop("offline"):
        cut_off(asked.append)
    for name in ("config_path", "config_dir"):
        told[name] = Path(told[name]) if told[name] else None
    request = Request(**{**told, "overrides": tuple(told["overrides"])})
    set_up(stream=sys.stderr)
    quiet_libraries()
    register_schema()
    for part in _parts(check_request(request), request):
        out.write(json.dumps(asdict(replace(part, asked=tuple(dict.fromkeys(asked))))) + "\n")
        out.flush()
        asked.clear()


def _parts(points: list[Point], request: Request) -> Iterator[Part]:
    """The parts of each run that loads something else than those before it."""
    seen = []
    for point in points:
        config = point.config
        needs = repr((config.model, config.task, config.teacher, uses_teacher(config), config.eval))
        if needs in seen:
            continue
        seen.append(needs)
        before = "" if len(points) == 1 else f"{' '.join(point.overrides)}: "
        for part in _of_run(point, request):
            yield replace(part, name=before + part.name)


def _of_run(point: Point, request: Request) -> Iterator[Part]:
    with tempfile.TemporaryDirectory(prefix="forgelm-") as folder:
        try:
            config, metadata, teacher = _planned(point, request)
        except ForgeError as error:
            yield Part("plan", "", str(error))
            return
        if teacher is not None:
            for part in _Rehearsal(teacher, {}, Path(folder) / "teacher").parts():
                yield replace(part, name=f"teacher's run: {part.name}")
        yield from _Rehearsal(config, metadata, Path(folder) / "run").parts()


def _planned(point: Point, request: Request) -> tuple[RunConfig, dict[str, Any], RunConfig | None]:
    """The run's config, what is noted of it if it began, and its teacher's run if that is to come.

    Raises:
        ConfigError: a run that was named can't be used so.
    """
    from forgelm.resolve import resolve
    from forgelm.run.files import read_json
    from forgelm.run.lifecycle import is_complete, locate

    teacher = teacher_run(point.config, request.compose)
    plan = resolve(point.config, point.overrides, request.multirun, None)
    config, paths = plan.config, plan.paths
    if teacher is not None and config.resume is None:
        made = resolve(teacher, [], False, None)
        found = TeacherConfig(kind=TeacherKind.run, run=str(made.paths.root), run_hash=made.digest)
        config = replace(config, teacher=replace(found, dtype=config.teacher.dtype))
        paths = locate(config, request.multirun)
        if is_complete(made.paths):
            teacher = None
        else:
            # Nobody can load what isn't trained yet.
            config, teacher = _without_teacher(config), made.config
    noted = read_json(paths.metadata) if paths.metadata.is_file() else {}
    return config, {key: noted[key] for key in _KEPT if key in noted}, teacher


def _without_teacher(config: RunConfig) -> RunConfig:
    assert isinstance(config.mode, KdConfig)
    return replace(config, mode=replace(config.mode, alpha=0.0))


class _Rehearsal:
    """One run's parts, loaded in turn; what one finds serves the next."""

    def __init__(self, config: RunConfig, metadata: dict[str, Any], folder: Path) -> None:
        from forgelm.run.lifecycle import follower
        from forgelm.run.paths import RunPaths
        from forgelm.world import ALONE

        self.run = follower(config, RunPaths(folder), ALONE)
        self.noted = metadata
        self.revisions: dict[str, str | None] = {}
        self.labels: list[str] | None = None
        self.task: Any = None
        self.failed: set[str] = set()

    def parts(self) -> Iterator[Part]:
        config = self.run.config
        yield self._try("tokenizer", self._tokenizer)
        if uses_teacher(config):
            yield self._try("teacher's tokenizer", self._teacher_tokenizer)
        yield self._try("data", self._data)
        yield self._try("student", self._student)
        if uses_teacher(config):
            if self.task is None:
                yield Part("teacher", "not tried: it needs what is missing above", tried=False)
            else:
                yield self._try("teacher", self._teacher)
        if config.eval.lm_eval.tasks:
            yield self._try("lm-eval tasks", self._lm_eval)

    def _try(self, name: str, load: Callable[[], str]) -> Part:
        try:
            return Part(name, load())
        except ConfigError as error:
            problem, fetchable = "; ".join(str(error).splitlines()), False
        except ForgeError as error:
            problem, fetchable = "; ".join(str(error).splitlines()), True
        except Exception as error:
            problem, fetchable = in_brief(f"{type(error).__name__}: {error}"), True
        self.failed.add(name)
        return Part(name, "", redact(problem), fetchable=fetchable)

    def _pin(self, **instead: Any) -> None:
        """Note the commits of what is left of the config."""
        from forgelm.stages.preparation import pin_revisions

        known = {"revisions": self.noted["revisions"]} if "revisions" in self.noted else {}
        only = replace(self.run, config=replace(self.run.config, **instead), metadata=known)
        self.revisions |= pin_revisions(only)

    def _tokenizer(self) -> str:
        from forgelm.models.load import load_reader

        config = self.run.config
        no_data = replace(config.task, dataset=None)
        self._pin(task=no_data, teacher=TeacherConfig(kind=TeacherKind.none))
        model, base = self.revisions.get("model"), self.revisions.get("base")
        made = load_reader(config.model, config.task.kind, model, base)
        return f"{type(made).__name__}, {self._named(config.model.path, model)}"

    def _teacher_tokenizer(self) -> str:
        from forgelm.models.load import load_teacher_reader

        config = self.run.config
        no_data, no_model = replace(config.task, dataset=None), replace(config.model, path=None)
        self._pin(task=no_data, model=replace(no_model, base=None))
        model, base = self.revisions.get("teacher"), self.revisions.get("teacher_base")
        made = load_teacher_reader(config.teacher, config.task.kind, model, base)
        return f"{type(made).__name__}, {self._named(self._teacher_path(), model)}"

    def _data(self) -> str:
        from forgelm.stages.preparation import prepare_task
        from forgelm.tasks import metrics, rows_of

        config = self.run.config
        no_model = replace(config.model, path=None, base=None)
        self._pin(model=no_model, teacher=TeacherConfig(kind=TeacherKind.none))
        if self.failed:
            metrics.load(config.task.metrics)
            rows = rows_of(config, self.revisions.get("dataset"))
        else:
            self.run.metadata = {**self.noted, "revisions": self.revisions}
            self.task = prepare_task(self.run)
            rows = self.task.rows
        self.labels = rows.labels
        count = f"{len(rows.train)} rows" if hasattr(rows.train, "__len__") else "a stream"
        return f"{count} to train on, {sum(map(len, rows.eval.values()))} to evaluate on"

    def _student(self) -> str:
        from forgelm.models.adapters import check_cuda
        from forgelm.models.load import load_student
        from forgelm.stages.models import load_models

        config, at = self.run.config, self.revisions.get("model")
        if config.model.load_in_4bit:
            check_cuda()
        if self.task is not None:
            alone = _without_teacher(config) if uses_teacher(config) else config
            model: Any = load_models(replace(self.run, config=alone), self.task).student
        else:
            # Any labels do to see whether its files are here.
            labels, base = (
                self.labels or config.task.labels or ["0", "1"],
                self.revisions.get("base"),
            )
            model = load_student(config.model, config.task.kind, at, None, labels, base)
        return f"{_size(model)}, {self._named(config.model.path, at)}"

    def _teacher(self) -> str:
        from forgelm.models.load import check_positions, load_teacher, teacher_dtype

        gc.collect()
        config, at = self.run.config, self.revisions.get("teacher")
        dtype, base = teacher_dtype(config.teacher), self.revisions.get("teacher_base")
        model = load_teacher(
            config.teacher, config.task.kind, at, self.task.rows.labels, dtype, base
        )
        check_positions(model, config.task, "the teacher")
        return f"{_size(model)}, {self._named(self._teacher_path(), at)}"

    def _lm_eval(self) -> str:
        from forgelm.stages.preparation import prepare_harness

        prepare_harness(self.run)
        return ", ".join(self.run.config.eval.lm_eval.tasks)

    def _teacher_path(self) -> str:
        return str(self.run.config.teacher.path or self.run.config.teacher.run)

    def _named(self, path: str | None, revision: str | None) -> str:
        if path is None:
            return "made on the spot"
        return path if revision is None else f"{path} at {revision[:12]}"


def _size(model: Any) -> str:
    return f"{sum(weight.numel() for weight in model.parameters()) / 1e6:.1f} million weights"


if __name__ == "__main__":
    main()
