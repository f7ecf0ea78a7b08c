"""lm-eval's tasks, measured on a model in memory. Needs the extra `eval`: import it when asked."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import math
import os
from collections.abc import Callable, Iterator
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from datasets import DatasetDict
from lm_eval import evaluator
from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.models.huggingface import HFLM
from transformers import set_seed

from forgelm import stop
from forgelm.config.lm_tasks import manager
from forgelm.config.schema import Kind, LmEvalConfig
from forgelm.errors import ConfigError, ForgeError, RunError
from forgelm.hub import explained, is_commit
from forgelm.log import log
from forgelm.memory import ran_out

_BACKENDS = {Kind.causal_lm: "causal", Kind.seq2seq: "seq2seq"}
# For the metrics whose standard error has no formula; lm-eval's default takes minutes.
_RESAMPLINGS = 1000

Scores = dict[str, dict[str, float | None]]


class Harness:
    """The tasks asked for, with their data.

    Raises:
        ConfigError: a task's definition isn't right, or it runs code that the model writes.
        RunError: its data can't be fetched.
    """

    def __init__(self, asked: LmEvalConfig) -> None:
        self.asked = asked
        self._loaded = {name: self._load(name) for name in asked.tasks}

    def _load(self, name: str) -> Any:
        try:
            with explained(f"lm-eval task {name}"), _unheard():
                loaded = manager(self.asked).load([name])
        except ForgeError:
            raise
        except Exception as error:
            raise ConfigError(
                f"eval.lm_eval.tasks: {name} can't be set up: {_said(error)}"
            ) from error
        for own, task in loaded["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False):
                raise ConfigError(
                    f"eval.lm_eval.tasks: {own} runs code that the model writes, which forgelm "
                    "doesn't do; leave it out"
                )
            self._set_examples(own, task)
        return loaded

    def _set_examples(self, name: str, task: Any) -> None:
        wanted, own = self.asked.num_fewshot, task.get_config("num_fewshot")
        if wanted and own == 0:
            log.warning(f"lm-eval task {name} is defined without examples: none are shown")
        elif wanted is not None or own is None:
            task.set_config(key="num_fewshot", value=wanted or 0)

    def commits(self) -> dict[str, str]:
        """The commit of its data set, for each task whose data came from the hub."""
        found = {}
        for loaded in self._loaded.values():
            for name, task in loaded["tasks"].items():
                # Tasks that are programs may keep their data in any way.
                splits = task.dataset.values() if isinstance(task.dataset, DatasetDict) else ()
                files = [file for split in splits for file in split.cache_files]
                # What `datasets` prepares of a commit lies in a folder of that name.
                commit = Path(files[0]["filename"]).parent.name if files else ""
                if is_commit(commit):
                    found[name] = commit
        return found

    def missing(self, known: Scores) -> list[str]:
        """The tasks asked for that `known` lacks, or a part of them."""
        return [
            name
            for name, loaded in self._loaded.items()
            if not {*loaded["tasks"], *loaded["groups"]} <= known.keys()
        ]

    def measure(
        self,
        name: str,
        model: Any,
        tokenizer: Any,
        kind: Kind,
        device: torch.device,
        at_batch: Callable[[], object] = stop.check,
    ) -> Scores:
        """The metrics of a task, of all that belong to it if it is a group; None for nan.

        They are named as lm-eval names them, `acc` and `acc_stderr`; what comes from one of a
        task's filters as `METRIC,FILTER`. `at_batch` is called before each batch of requests.

        Raises:
            RunError: the task failed.
        """
        model.to(device).eval()
        loaded = self._loaded[name]
        try:
            with _unheard():
                # Both every time: what is drawn must not depend on what was measured before.
                set_seed(DEFAULT_OTHER_SEED)
                for task in loaded["tasks"].values():
                    task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
                found = evaluator.evaluate(
                    lm=_InMemory(model, tokenizer, kind, self.asked.batch_size, at_batch),
                    task_dict=loaded,
                    limit=self.asked.limit,
                    bootstrap_iters=_RESAMPLINGS,
                    log_samples=False,
                )
        except ForgeError:
            raise
        except Exception as error:
            if ran_out(error):
                raise
            raise RunError(f"lm-eval task {name} failed: {_said(error)}") from error
        return {task: _numbers(values) for task, values in found["results"].items()}


class _InMemory(HFLM):
    """A model that is loaded already."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        kind: Kind,
        batch_size: int,
        at_batch: Callable[[], object],
    ) -> None:
        # It gives the tokenizer a padding token and another side to pad on.
        own = copy.deepcopy(tokenizer)
        super().__init__(model, backend=_BACKENDS[kind], tokenizer=own, batch_size=batch_size)
        self.at_batch = at_batch

    def _model_call(self, *args: Any, **kwargs: Any) -> Any:
        self.at_batch()
        return super()._model_call(*args, **kwargs)

    def _model_generate(self, *args: Any, **kwargs: Any) -> Any:
        self.at_batch()
        return super()._model_generate(*args, **kwargs)


@contextlib.contextmanager
def _unheard() -> Iterator[None]:
    """lm-eval prints and draws bars on both streams; and forks, which signals must not meet."""
    os.environ["DISABLE_MULTIPROC"] = "1"
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def fingerprint(folder: Path) -> str:
    """Changes with any file of a folder of tasks."""
    total = hashlib.sha256()
    for file in sorted(path for path in folder.expanduser().rglob("*") if path.is_file()):
        if "__pycache__" not in file.parts:
            total.update(f"{file.relative_to(folder.expanduser())} ".encode())
            total.update(hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()


def _numbers(values: dict[str, Any]) -> dict[str, float | None]:
    numbers: dict[str, float | None] = {}
    for key, value in values.items():
        metric, _, variant = key.partition(",")
        if not variant or not isinstance(value, Real):
            continue
        name = metric if variant == "none" else key
        numbers[name] = float(value) if math.isfinite(value) else None
    return numbers


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
