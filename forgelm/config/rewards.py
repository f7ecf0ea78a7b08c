"""The rewards by name, and what a round of generation holds. Nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass

from forgelm import plugins
from forgelm.config.schema import RlConfig, RunConfig

BUILT_IN = ("exact_match", "contains", "numeric", "format", "length")


def rewards() -> list[str]:
    """Every reward that can be named, other packages' included."""
    return [*BUILT_IN, *plugins.names(plugins.REWARDS)]


def weights(mode: RlConfig) -> list[float]:
    """A weight for each of the mode's rewards."""
    return mode.reward_weights or [1.0] * len(mode.rewards)


@dataclass(frozen=True)
class Round:
    """What is generated at once, by all ranks together, and for how many micro-batches."""

    completions: int
    prompts: int
    batches: int


def round_of(config: RunConfig) -> Round:
    """The rounds of a config of mode rl."""
    mode, training = config.mode, config.training
    steps = mode.steps_per_generation or training.gradient_accumulation_steps
    completions = training.per_device_train_batch_size * config.launch.ranks * steps
    prompts = completions // mode.num_generations
    return Round(completions, prompts, steps * mode.num_iterations)
