"""What a child process does: data sets and lm-eval's tasks, loaded with its own caches.

Not for other processes: `datasets`, `evaluate` and `lm_eval` keep the folders that they see first.
"""

from __future__ import annotations

import inspect
import os
import re
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

from forgelm.config import lm_index
from forgelm.errors import ConfigError, ForgeError, RunError
from forgelm.hub import explained
from forgelm.prepared import configurations_in, is_intact, load_prepared, no_configuration

_NOT_THE_BUILDERS = (
    *("split", "streaming", "num_proc", "keep_in_memory", "save_infos", "token"),
    *("trust_remote_code", "verification_mode", "download_mode", "cache_dir"),
)
_METRIC = re.compile(r"""evaluate\.load\(\s*["']([\w/.-]+)["']""")
_STRUCTURE = ("tag", "group", "task_list")
_SAID = 300

Options = dict[str, Any]


def plan(path: str, name: str | None, commit: str, options: Options, key: str | None) -> list[str]:
    """The files that a data set's configuration is made of, as paths in its repository.

    `key`: the key of a run's config that says which configuration; None: a task of lm-eval does.

    Raises:
        ConfigError: it has no such configuration, and `key` says it.
        RunError: the hub fails, or the task's definition is wrong.
    """
    start = f"hf://datasets/{path}@{commit}/"
    with _blamed(f"data set {path}"):
        try:
            builder = _builder(path, name, commit, options)
        except ValueError as error:
            there = configurations_in(error)
            if not there:
                raise
            if key is None:
                raise RunError(no_configuration(path, name, there, "dataset_name")) from error
            raise ConfigError(no_configuration(path, name, there, key)) from error
        given = builder.config.data_files or {}
        found = [str(file) for files in given.values() for file in files]
        return sorted({file.removeprefix(start) for file in found if file.startswith(start)})


def prepare(path: str, name: str | None, commit: str, options: Options) -> list[str]:
    """Make a configuration's Arrow files, unless those made of verified files are there.

    Returns their folder, and that under which `load_dataset` looks for them offline, if another.

    Raises:
        RunError: it can't be made.
    """
    from datasets import DownloadMode

    with _blamed(f"data set {path}"):
        builder = _builder(path, name, commit, options)
        folder = Path(builder.cache_dir)
        mode = None if is_intact(folder) else DownloadMode.REUSE_CACHE_IF_EXISTS
        checks = options.get("verification_mode")
        builder.download_and_prepare(download_mode=mode, verification_mode=checks)
        other = folder.parents[2] / _offline_name(name, options) / folder.parent.name / folder.name
        if not _of_builder(options) or other == folder:
            return [str(folder)]
        shutil.rmtree(other, ignore_errors=True)
        shutil.copytree(folder, other, copy_function=_link)
        return [str(folder), str(other)]


def _offline_name(name: str | None, options: Options) -> str:
    """The configuration's name with a hash of the options, which offline are as they were given.

    Online it is of the files that they stand for (datasets 5.2, `Cache` and `DatasetBuilder`).
    """
    from datasets import BuilderConfig

    given = _of_builder(options)
    features = given.pop("features", None)
    made = BuilderConfig(name or "default").create_config_id(given, custom_features=features)
    return str(made)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def load(folder: str, thing: str) -> None:
    """Load what was prepared of a commit.

    Raises:
        RunError: it doesn't load.
    """
    with _blamed(thing):
        for part in load_prepared(Path(folder)).values():
            part[:1]


def needs(files: list[list[str]], name: str, place: int, leaf: str) -> Options | None:
    """The data set of a name's leaf; None where it has none on the hub.

    Raises:
        ConfigError, RunError: its definition isn't right.
    """
    with _blamed(f"task {leaf}"):
        config = _leaf(_frozen(files), name, place)
        made = config.get("class")
        if made is not None:
            path, configuration = getattr(made, "DATASET_PATH", None), made.DATASET_NAME
        elif callable(config.get("custom_dataset")):
            return None
        else:
            path, configuration = config.get("dataset_path"), config.get("dataset_name")
        if not isinstance(path, str) or _is_here(path):
            return None
        options = dict(config.get("dataset_kwargs") or {})
        revision = options.pop("revision", None) or "main"
        return {
            "path": path,
            "name": configuration,
            "revision": revision,
            "options": options,
        }


def build(
    files: list[list[str]],
    name: str,
    place: int,
    leaf: str,
    commit: str | None,
    metrics: list[str] | None,
) -> dict[str, list[str]]:
    """Build a leaf as an evaluation would, and see that its data is that commit's.

    `metrics` are the modules of `evaluate` that must load besides; None: those that the task's code
    names are tried. Returns them, and what is to be said of those that failed.

    Raises:
        ConfigError: it needs a package that isn't installed.
        RunError: it can't be built, or its data comes of another commit.
    """
    from lm_eval.tasks import TaskManager

    with _blamed(f"task {leaf}"):
        config = _leaf(_frozen(files), name, place)
        built = TaskManager(include_defaults=False).load([deepcopy(config)])
        for task in built["tasks"].values():
            if commit is not None:
                _check_commit(str(task.DATASET_PATH), task.dataset, commit)
            _check_metrics(task)
        loaded, notes = [], []
        for metric in _metrics(config) if metrics is None else metrics:
            try:
                _metric(metric)
            except Exception as error:
                if metrics is not None:
                    raise
                notes.append(f"task {leaf} may need the metric {metric}: {_line(error)}")
            else:
                loaded.append(metric)
        return {"metrics": loaded, "notes": notes}


def _builder(path: str, name: str | None, commit: str, options: Options) -> Any:
    from datasets import load_dataset_builder

    builder = load_dataset_builder(path, name, revision=commit, **_of_builder(options))
    # It takes what it has for an answer when the hub fails.
    if builder.hash != commit or type(builder).__module__.endswith(".cache.cache"):
        raise RunError(f"data set {path}: the hub failed while its files were listed; try again")
    return builder


def _of_builder(options: Options) -> Options:
    return {key: value for key, value in options.items() if key not in _NOT_THE_BUILDERS}


def _check_commit(path: str, data: Any, commit: str) -> None:
    parts = data.values() if isinstance(data, dict) else [data]
    files = [file["filename"] for part in parts for file in getattr(part, "cache_files", ())]
    wrong = [file for file in files if commit not in Path(file).parts]
    if wrong:
        raise RunError(f"data set {path}: {wrong[0]} is loaded, which isn't of commit {commit}")


def _is_here(path: str) -> bool:
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

    return path in _PACKAGED_DATASETS_MODULES or Path(path).exists()


def _frozen(files: list[list[str]]) -> tuple[tuple[str, ...], ...]:
    return tuple(map(tuple, files))


def _leaf(files: tuple[tuple[str, ...], ...], name: str, place: int) -> Any:
    from lm_eval.tasks._yaml_loader import load_yaml

    leaf = _leaves(files, name)[place]
    own = load_yaml(leaf.entry.file, resolve_func=True) if leaf.entry and leaf.entry.file else {}
    config = {"task": leaf.name} | own | leaf.config
    return {key: value for key, value in config.items() if key not in _STRUCTURE}


@cache
def _entries(files: tuple[tuple[str, ...], ...]) -> dict[str, lm_index.Entry]:
    theirs, own = files
    return lm_index.index(map(Path, theirs)) | lm_index.index(map(Path, own))


@cache
def _leaves(files: tuple[tuple[str, ...], ...], name: str) -> list[lm_index.Leaf]:
    from lm_eval.tasks._yaml_loader import load_yaml

    def resolved(entry: lm_index.Entry) -> Options:
        config: Options = load_yaml(entry.file, resolve_func=True)
        return config

    return lm_index.Found(_entries(files), ([], [])).leaves(name, resolved)


def _metrics(config: Options) -> list[str]:
    """The metric modules that the code of a task's functions names."""
    files = {inspect.getsourcefile(found) for found in _functions(config)}
    texts = [Path(file).read_text(encoding="utf-8") for file in files if file]
    return sorted({name for text in texts for name in _METRIC.findall(text)})


def _check_metrics(task: Any) -> None:
    """lm-eval goes on without a metric that can't be had, until it is to be computed."""
    if getattr(task.config, "process_results", None) is None:
        for metric, function in getattr(task, "_metric_fn_list", {}).items():
            if function is None:
                _metric(metric)
                raise RunError(f"task {task.task_name}: lm-eval can't load the metric {metric}")


def _functions(value: Any) -> Iterator[Callable[..., Any]]:
    if isinstance(value, dict):
        for inner in value.values():
            yield from _functions(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _functions(inner)
    elif inspect.isfunction(value) or inspect.isclass(value):
        yield value


@cache
def _metric(name: str) -> None:
    import evaluate

    evaluate.load(name)


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:_SAID]}"


@contextmanager
def _blamed(thing: str) -> Iterator[None]:
    """One line about `thing` for whatever goes wrong."""
    try:
        with explained(thing):
            yield
    except ForgeError:
        raise
    except ImportError as error:
        said = " ".join(str(error).split())[:_SAID]
        raise ConfigError(f"{thing} needs a package that isn't installed: {said}") from error
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        raise RunError(f"{thing}: {_line(error)}") from error
