"""Training whose weights, gradients and optimizer are sharded over the ranks (FSDP2).

accelerate shards the model, here before the optimizer is made, and before anything is evaluated: no
device ever holds the whole of it. Its own `prepare` would make the optimizer first and then swap
the parameters by their address, which those that a rank has nothing of share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType, FullyShardedDataParallelPlugin, ParallelismConfig
from accelerate.utils import fsdp2_prepare_model
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import register_fsdp_forward_method

from forgelm.errors import ConfigError
from forgelm.models.sharded import like
from forgelm.run.checkpoints import Listing, flushed
from forgelm.world import World

# As long as the slowest rank may need for its files.
_TIMEOUT = timedelta(hours=24)


def use_fsdp(trainer: Any) -> None:
    """Have a trainer's accelerator shard on processors too; by itself it does on GPUs alone."""
    state = trainer.accelerator.state
    if state.distributed_type is DistributedType.FSDP:
        return
    state.distributed_type = DistributedType.FSDP
    state.fsdp_plugin = FullyShardedDataParallelPlugin(**trainer.args.fsdp_plugin_args)
    if trainer.args.mixed_precision != "no":
        state.fsdp_plugin.set_mixed_precision(trainer.args.mixed_precision)
    # Without it the shards would go to a GPU that is there and not to be used.
    state.parallelism_config = ParallelismConfig(dp_shard_size=state.num_processes)
    names = tuple(state.parallelism_config.fsdp_dim_names)
    state.device_mesh = init_device_mesh("cpu", (state.num_processes,), mesh_dim_names=names)
    trainer.is_fsdp_enabled = True


def shard(trainer: Any) -> None:
    """Shard a trainer's model and make the optimizer of the shards.

    Raises:
        ConfigError: a layer's class isn't in the model, or can't be sharded by itself.
    """
    accelerator, model = trainer.accelerator, trainer.model
    plugin = accelerator.state.fsdp_plugin
    plugin.transformer_cls_names_to_wrap = _layers(model, plugin.transformer_cls_names_to_wrap)
    with _undivided(model):
        fsdp2_prepare_model(accelerator, model)
    if hasattr(model, "generate"):
        register_fsdp_forward_method(model, "generate")
    trainer.create_optimizer()

    def prepare(*parts: Any) -> tuple[Any, ...]:
        accelerator._models.append(model)
        return model, accelerator.prepare_optimizer(trainer.optimizer)

    accelerator.prepare = prepare


@contextmanager
def _undivided(model: Any) -> Iterator[None]:
    """Where others than the model's ends share the embeddings' weight, as in encoder-decoders,
    accelerate finds no ends: what has the weight stays together, in the group of all that is left.
    """
    ends = {model.get_input_embeddings(), model.get_output_embeddings()}
    weights = {id(weight) for end in ends if end is not None for weight in end.parameters()}
    owners = {
        module
        for module in model.modules()
        if any(id(weight) in weights for weight in module.parameters(recurse=False))
    }
    if owners <= ends:
        yield
        return
    names = ("get_input_embeddings", "get_output_embeddings")
    for name in names:
        setattr(model, name, lambda: None)
    try:
        yield
    finally:
        for name in names:
            delattr(model, name)


def _layers(model: Any, asked: list[str] | None) -> list[str]:
    """The classes of a model's layers, each to be sharded by itself.

    accelerate shards the embeddings and the head by themselves, so no layer may hold them.
    """
    ends = {model.get_input_embeddings(), model.get_output_embeddings()}
    within: dict[str, bool] = {}
    for layer in model.modules():
        name = type(layer).__name__
        within[name] = within.get(name, False) or any(part in ends for part in layer.modules())
    named = sorted(getattr(model, "_no_split_modules", None) or [])
    own = [name for name in named if not within.get(name, True)]
    for name in asked or ():
        if within.get(name, True):
            wrong = "holds the embeddings or the head" if name in within else "isn't in the model"
            raise ConfigError(
                f"training.fsdp_config.transformer_layer_cls_to_wrap: {name} {wrong}; null takes "
                f"those that the model names: {', '.join(own) or 'none'}"
            )
    return own if asked is None else asked


def optimizer_state(parts: dict[str, Any], optimizer: Any) -> dict[str, Any]:
    """An optimizer's state as `load_state_dict` takes it, of what this rank saved of it."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return parts | {
        "state": {
            number: {name: _placed(value, parameters[number]) for name, value in values.items()}
            for number, values in parts["state"].items()
        }
    }


def _placed(value: Any, parameter: torch.Tensor) -> Any:
    # A count of steps isn't sharded.
    if isinstance(value, torch.Tensor) and value.dim():
        return like(value, parameter)
    return value


class Crew:
    """The ranks that write a checkpoint together, each its own part, in threads of theirs.

    They meet in a process group of their own: training goes on beside in the others' one.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self._group = distributed.new_group(backend="gloo", timeout=_TIMEOUT)

    def part(self, checkpoint: Path) -> Path:
        """Where in a checkpoint this rank's part is."""
        return checkpoint / f"rank-{self.world.rank}"

    def write(self, checkpoint: Path, write_part: Callable[[Path], None]) -> Listing:
        """Write all parts, once the first rank has come here; returns the listing of all.

        Raises:
            OSError: on every rank, when one of them couldn't write.
        """
        self._gather(None)
        said: Listing | OSError
        try:
            part = self.part(checkpoint)
            part.mkdir(exist_ok=True)
            write_part(part)
            said = flushed(part, checkpoint, {})
        except OSError as error:
            said = error
        together: Listing = {}
        for answer in self._gather(said):
            if isinstance(answer, OSError):
                raise answer
            together |= answer
        return together

    def _gather(self, value: Any) -> list[Any]:
        box: list[Any] = [None] * self.world.size
        distributed.all_gather_object(box, value, group=self._group)
        return box
