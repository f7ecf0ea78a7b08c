"""Where the logits of a model that writes text stand, and which of them are supervised.

Labels are int64 [batch, length], IGNORED where nothing is to be learnt. A decoder-only model's
logits stand one place before the token that they are for; an encoder-decoder's stand at it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from forgelm.errors import ConfigError

IGNORED = -100


@dataclass(frozen=True)
class Head:
    """How a model's logits are got. `start` makes a decoder's inputs [batch, length] of labels.

    `selects`: the forward pass can be told at which positions logits are wanted.
    """

    start: Callable[[Tensor], Tensor] | None
    selects: bool


def head_of(model: Any) -> Head:
    """The head of a model that isn't wrapped for several ranks; an adapter around it is fine."""
    bare = model.get_base_model() if hasattr(model, "get_base_model") else model
    start = None
    if bare.config.is_encoder_decoder:
        start = getattr(bare, "prepare_decoder_input_ids_from_labels", None)
    names = inspect.signature(bare.forward).parameters
    return Head(start, start is None and "logits_to_keep" in names)


def supervised(
    model: Any, head: Head, inputs: dict[str, Any], labels: Tensor
) -> tuple[Tensor, Tensor]:
    """The logits [N, vocabulary] at the N supervised positions, and the tokens wanted there [N].

    Where the model lets us, its head works at columns with a supervised position alone: the logits
    of a large vocabulary are most of a step's memory.
    """
    if head.start is not None:
        made = model(**inputs, decoder_input_ids=head.start(labels), use_cache=False)
        return _chosen(made.logits, labels)
    wanted = labels[:, 1:]
    if head.selects:
        columns = (wanted != IGNORED).any(dim=0).nonzero().squeeze(-1)
        made = model(**inputs, logits_to_keep=columns, use_cache=False)
        return _chosen(made.logits, wanted[:, columns])
    return _chosen(model(**inputs, use_cache=False).logits[:, :-1], wanted)


def _chosen(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    chosen = labels != IGNORED
    return logits[chosen], labels[chosen]


def per_row(labels: Tensor, shifted: bool) -> Tensor:
    """The number of supervised positions of each row, int64 [batch]."""
    counted = labels[:, 1:] if shifted else labels
    return (counted != IGNORED).sum(dim=1)


def refuse_leak(model: Any) -> None:
    """Make sure that rows packed into one sequence don't see each other.

    Raises:
        ConfigError: they do, in this model with this attention.
    """
    first, other, second = [5, 6, 7], [8, 9, 10], [11, 12, 13]
    ids = torch.tensor([[*first, *second], [*other, *second]], device=model.device)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]] * 2, device=model.device)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, 3:]
    model.train(was_training)
    if not torch.allclose(logits[0], logits[1], rtol=1e-3, atol=1e-4):
        raise ConfigError(
            f"task.packing=true: in a {model.config.model_type} model with "
            f"{model.config._attn_implementation} attention, rows packed into one sequence see "
            "each other; set task.packing=false"
        )
