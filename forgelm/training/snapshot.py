"""Saving while training goes on: the state copied to memory at once, written by a thread."""

from __future__ import annotations

import contextlib
import os
import random
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy
import torch

from forgelm.errors import ForgeError

# Low enough to leave the processors to training, high enough to be done before the next save.
_LOWER_PRIORITY = 12


class Buffers:
    """Host memory that snapshots are copied into, kept from one to the next.

    Fresh memory costs more than the copy itself. Tensors that share memory share their copy.
    """

    def __init__(self) -> None:
        self._kept: dict[str, torch.Tensor] = {}

    def copy(self, tree: Any, name: str) -> Any:
        """The same nest of dicts, lists and values, each tensor copied to the host."""
        made = self._copied(tree, name, {})
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return made

    def _copied(self, node: Any, name: str, seen: dict[Any, torch.Tensor]) -> Any:
        if isinstance(node, torch.Tensor):
            return self._tensor(node.detach(), name, seen)
        if isinstance(node, dict):
            made = (
                (key, self._copied(value, f"{name}/{key}", seen)) for key, value in node.items()
            )
            return type(node)(made)
        if isinstance(node, list | tuple):
            return type(node)(
                self._copied(value, f"{name}/{place}", seen) for place, value in enumerate(node)
            )
        return node

    def _tensor(
        self, tensor: torch.Tensor, name: str, seen: dict[Any, torch.Tensor]
    ) -> torch.Tensor:
        identity = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.device)
        if tensor.numel() and identity in seen:
            return seen[identity]
        kept = self._kept.get(name)
        if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype:
            kept = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            self._kept[name] = kept
        kept.copy_(tensor, non_blocking=True)
        seen[identity] = kept
        return kept


@dataclass
class Cost:
    """Seconds that the last save took from training, and until it was durable."""

    stall: float = 0.0
    total: float = 0.0


class Writer:
    """Runs one job at a time: beside the training at the lowest priority, or while it waits."""

    def __init__(self) -> None:
        self.cost = Cost()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._burnt = 0.0

    def start(self, job: Callable[[], None], began: float, background: bool) -> None:
        """Do a job whose snapshot was begun at `began` (monotonic seconds), at once or beside."""
        self.wait()
        self._burnt = 0.0

        def work() -> None:
            if background:
                _step_back()
            before = time.thread_time()
            try:
                job()
            except BaseException as error:
                self._error = error
            # In the foreground it is part of the stall.
            self._burnt = time.thread_time() - before if background else 0.0
            self.cost.total = time.monotonic() - began

        if not background:
            work()
            self.cost.stall = time.monotonic() - began
            self.check()
            return
        self._thread = threading.Thread(target=work, name="forgelm-save", daemon=True)
        self._thread.start()
        self.cost.stall = time.monotonic() - began

    @property
    def price(self) -> float:
        """Seconds that a save costs training: the stall, and the processor time spent beside it."""
        return self.cost.stall + self._burnt

    @property
    def failed(self) -> bool:
        """Whether `check` would raise."""
        return self._error is not None

    def check(self) -> None:
        """Raise what a finished job failed with."""
        error, self._error = self._error, None
        if error is not None:
            if isinstance(error, ForgeError | OSError):
                raise error
            raise RuntimeError(f"saving failed: {error}") from error

    def wait(self) -> None:
        """Until the job in flight is done; raises what it failed with."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()


def _step_back() -> None:
    """Leave contended processors to the training. Linux has priorities by thread.

    Only for work that lets go of Python's lock: training would wait for a thread that holds it and
    is given no time.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWER_PRIORITY)


def randomness() -> dict[str, Any]:
    """The state of every generator that training draws from, as tensors and plain values."""
    name, keys, position, has_gauss, cached = numpy.random.get_state(legacy=True)
    state = {
        "python": random.getstate(),
        "numpy": [name, torch.as_tensor(numpy.asarray(keys, "int64")), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_randomness(state: dict[str, Any]) -> None:
    """Set the generators as `randomness` found them."""
    name, keys, position, has_gauss, cached = state["numpy"]
    random.setstate(_tuples(state["python"]))
    numpy.random.set_state((name, keys.numpy().astype("uint32"), position, has_gauss, cached))
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list | tuple) else value
