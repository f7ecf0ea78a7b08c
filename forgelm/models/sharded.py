"""Models whose weights are sharded over the ranks (FSDP2)."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def is_sharded(model: Any) -> bool:
    """Whether each rank has a part of the model only.

    A forward pass of such a model is done by all ranks together.
    """
    return isinstance(model, FSDPModule)


def own_parts(tree: Any) -> Any:
    """The same nest of dicts, lists and values, with this rank's part of each sharded tensor."""
    if isinstance(tree, DTensor):
        return tree.to_local().detach()
    if isinstance(tree, dict):
        return {key: own_parts(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(own_parts(value) for value in tree)
    return tree


def like(part: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """A rank's part of a tensor that is sharded as `whole` is, and has its shape."""
    if not isinstance(whole, DTensor):
        return part
    # A copy: what is loaded may be read-only, and is moved to where the shards are.
    return DTensor.from_local(
        part.to(whole.to_local().device),
        whole.device_mesh,
        whole.placements,
        run_check=False,
        shape=whole.shape,
        stride=whole.stride(),
    )


def gathered(model: Any, keep: bool, frozen: bool) -> dict[str, torch.Tensor] | None:
    """The whole state of a sharded model in the host's memory, on the ranks that are to `keep` it.

    All ranks together, one tensor at a time, `frozen` parameters only where they are wanted. None
    for a model that isn't sharded. Tensors that are tied stay one tensor.
    """
    if not is_sharded(model):
        return None
    made: dict[int, torch.Tensor] = {}
    state: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not frozen and isinstance(tensor, torch.nn.Parameter) and not tensor.requires_grad:
            continue
        if id(tensor) not in made:
            whole = tensor.detach()
            whole = whole.full_tensor() if isinstance(whole, DTensor) else whole
            made[id(tensor)] = whole.cpu() if keep else torch.empty(0)
        state[name] = made[id(tensor)]
    return state if keep else {}
