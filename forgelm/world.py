"""The processes that train one run together, and what they must agree on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

T = TypeVar("T")

# Somebody waits for the first rank while it prepares data; who died is noticed by the launcher.
_TIMEOUT = timedelta(hours=24)


@dataclass(frozen=True)
class World:
    """This process among `size`. Rank 0 is the first: it alone writes."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def agree(self, *flags: bool) -> tuple[bool, ...]:
        """Each flag, true on every rank where it is true on one."""
        if self.size == 1:
            return flags
        import torch
        from torch import distributed

        # On the CPU: it must not wait for what the accelerator still has to do.
        raised = torch.tensor([int(flag) for flag in flags])
        distributed.all_reduce(raised, op=distributed.ReduceOp.MAX)
        return tuple(bool(value) for value in raised.tolist())

    def share(self, value: T) -> T:
        """The first rank's value, on every rank."""
        if self.size == 1:
            return value
        from torch import distributed

        box = [value]
        distributed.broadcast_object_list(box)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """Every rank's value in the order of ranks, on every rank."""
        if self.size == 1:
            return [value]
        from torch import distributed

        box: list[Any] = [None] * self.size
        distributed.all_gather_object(box, value)
        return box

    @contextmanager
    def first_then_others(self) -> Iterator[None]:
        """The first rank does what follows alone; the others after it, finding it done."""
        if self.size > 1 and not self.first:
            self.share(None)
        yield
        if self.size > 1 and self.first:
            self.share(None)


ALONE = World()


def join() -> World:
    """Meet the other ranks, as the environment that torchrun's users know says who they are."""
    import torch
    from torch import distributed

    backend, here = "gloo", int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        # Training on the CPU may have more ranks than there are devices.
        if here < torch.cuda.device_count():
            torch.cuda.set_device(here)
    distributed.init_process_group(backend, timeout=_TIMEOUT)
    return World(distributed.get_rank(), distributed.get_world_size())
