"""mode=rl: GRPO, Shao et al. 2024 (https://arxiv.org/abs/2402.03300), by trl's trainer made exact.

What differs from trl's, and why:

- The order of the prompts is a function of seed and epoch; trl's starts over when a run goes on.
- A checkpoint also holds what was generated and is still to be trained on, and the values that
  wait for the next log line; trl generates anew, so its runs end elsewhere.
- The reference is a copy of the student as it starts; trl loads it anew by the model's name.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import warnings
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel
from transformers.trainer_utils import align_special_tokens
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.callbacks import SyncRefModelCallback
from trl.trainer.utils import add_fused_lm_head, disable_dropout_in_model

from forgelm.config.rewards import weights
from forgelm.config.schema import RunConfig
from forgelm.errors import ConfigError, RunError
from forgelm.interrupt import point
from forgelm.log import log
from forgelm.modes.arguments import plain, training_arguments
from forgelm.run.checkpoints import Progress, read_progress
from forgelm.run.files import keep_lines
from forgelm.tasks.data import TaskData
from forgelm.tasks.prompts import Rewarded, shown
from forgelm.training.loader import Order, Rounds
from forgelm.training.tensors import load_tree
from forgelm.training.trainer import Exact

# trl asks for it by its old name at each generation.
warnings.filterwarnings("ignore", message=r"`is_gradient_checkpointing`", category=FutureWarning)

REFERENCE = "reference.pt"
# trl's name for the copy of an adapter as it starts.
_REFERENCE_ADAPTER = "ref"
_OUR_KEYS = {
    "name",
    "rewards",
    "reward_weights",
    "format_pattern",
    "length_target",
    "samples_per_log",
}


def build(
    config: RunConfig, task: TaskData, teacher: PreTrainedModel | None, parts: dict[str, Any]
) -> GrpoTrainer:
    """The mode's trainer; see `forgelm.modes.builder`.

    Raises:
        ConfigError: the model has too few positions, or trl or peft can't do what the keys say
            together.
    """
    mode, given = config.mode, parts["args"]
    check_positions(mode.max_completion_length, parts["train_dataset"], parts["model"])
    if hasattr(parts["model"].get_output_embeddings(), "base_layer"):
        raise ConfigError(
            "model.lora.target_modules: names the model's head, whose weights GRPO reads past any "
            "adapter, so it would learn nothing; leave the head out"
        )
    keys = {key: value for key, value in plain(mode).items() if key not in _OUR_KEYS}
    assert isinstance(task.scorer, Rewarded)
    try:
        args = training_arguments(
            config,
            Path(given.output_dir),
            given.metric_for_best_model,
            GRPOConfig,
            reward_weights=weights(mode),
            **keys,
        )
        return GrpoTrainer(
            model=parts["model"],
            args=args,
            train_dataset=parts["train_dataset"],
            processing_class=task.reader,
            reward_funcs=list(task.scorer.rewards),
            safety=parts["safety"],
            samples=mode.samples_per_log,
        )
    except (ImportError, NotImplementedError, ValueError) as error:
        said = " ".join(str(error).split())[:300]
        raise ConfigError(f"mode=rl can't be trained like this: {said}") from error


def check_positions(completion: int, prompts: Dataset, model: PreTrainedModel) -> None:
    """Refuse completions (tokens) that the model has no positions for after the longest prompt."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(map(len, prompts["input_ids"][:]))
    if limit is not None and longest + completion > limit:
        raise ConfigError(
            f"mode.max_completion_length={completion}: with a prompt of {longest} tokens that is "
            f"more than the {limit} that the model has positions for; lower it, or lower "
            "task.max_length"
        )


class GrpoTrainer(Exact, GRPOTrainer):
    """trl's GRPOTrainer, which can be stopped at any step and goes on to the same bytes."""

    def __init__(self, model: Any, args: GRPOConfig, samples: int, **kwargs: Any) -> None:
        adapted = hasattr(model, "peft_config")
        # With an adapter trl keeps a frozen copy of it beside; of a whole model it would load one.
        reference = copy.deepcopy(model) if args.beta and not adapted else None
        wanted = args.beta, args.sync_ref_model
        if reference is not None:
            args.beta, args.sync_ref_model = 0.0, False
        super().__init__(model=model, args=args, **kwargs)
        # The stock trainer does so when its loop begins: an evaluation may come before.
        align_special_tokens(self.model, self.processing_class)
        if reference is not None:
            args.beta, args.sync_ref_model = wanted
            self.beta = args.beta
            self._add_reference(reference)
        self._warned = False
        self.samples_per_log = samples
        self._samples: list[dict[str, Any]] = []
        self._samples_lines = 0
        self._prompt_ids: list[list[int]] = []

    def _add_reference(self, reference: Any) -> None:
        args = self.args
        reference.requires_grad_(False)
        reference.eval()
        if args.disable_dropout:
            disable_dropout_in_model(reference)
        add_fused_lm_head(reference, temperature=self.temperature)
        self.ref_model = self.accelerator.prepare_model(reference, evaluation_mode=True)
        if args.sync_ref_model:
            self.add_callback(SyncRefModelCallback(self.ref_model, self.accelerator))

    def _send_telemetry(self) -> None:
        """trl would tell its makers that a training has begun."""

    # Data

    def _order(self, rows: Any) -> Order:
        training, args = self.safety.training, self.args
        return Rounds(
            len(rows),
            training.per_device_train_batch_size * args.steps_per_generation,
            training.train_sampling_strategy,
            self.safety.seed,
            self.safety.world,
            args.num_generations,
            args.steps_per_generation * args.num_iterations,
            training.dataloader_drop_last,
        )

    def digest(self, digest: Any, sample: Any) -> None:
        digest.update(json.dumps(sample, sort_keys=True, default=str).encode())

    # Generation

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        point("generation")
        self._prompt_ids = [row["input_ids"] for row in inputs]
        try:
            made: dict[str, Any] = super()._generate_and_score_completions(inputs)
        except RuntimeError as error:
            if "probability tensor" not in str(error):
                raise
            raise RunError(
                f"the model's probabilities are not numbers at step {self.state.global_step + 1}: "
                "lower training.learning_rate; the last checkpoint stands"
            ) from error
        self._samples = self._chosen_samples()
        return made

    def _tokenize_prompts(self, prompts: list[Any]) -> Any:
        """The prompts' tokens as evaluation reads them."""
        return self._prompt_ids, None, {}

    def _calculate_rewards(
        self, inputs: list[dict[str, Any]], prompts: list[str], completions: Any, ids: Any
    ) -> torch.Tensor:
        told = [{"references": row["reference"]} for row in inputs]
        asked = [shown(prompt) for prompt in prompts]
        rewards: torch.Tensor = super()._calculate_rewards(told, asked, completions, ids)
        return rewards

    def _chosen_samples(self) -> list[dict[str, Any]]:
        """Some of what was just generated, of as many prompts as can be."""
        logs, count = self._logs, len(self._logs["prompt"])
        step = max(1, count // max(1, self.samples_per_log))
        return [
            {
                "prompt": shown(logs["prompt"][place]),
                "completion": logs["completion"][place],
                "rewards": {
                    name: _number(values[place]) for name, values in logs["rewards"].items()
                },
                "advantage": logs["advantages"][place],
            }
            for place in range(0, count, step)[: self.samples_per_log]
        ]

    # The end of a step

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Keep values for the step's one line: with the loss, trl's means since the last one."""
        if "loss" in logs:
            means = self._means()
            logs = logs | {name: sum(v) / len(v) for name, v in means.items() if v}
            if means.get("reward") == [] and not self._warned:
                self._warned = True
                log.warning(
                    "no reward applied to any completion since the last logged step, so nothing "
                    f"was learnt: {', '.join(self.reward_func_names)} gave None for all of them; "
                    "check the rewards and the training rows"
                )
            if logs.get("frac_reward_zero_std") == 1 and not self._warned:
                self._warned = True
                log.warning(
                    "no prompt's completions were worth different rewards since the last logged "
                    "step, so nothing was learnt: begin with a model that gets some right, raise "
                    "mode.temperature or mode.num_generations, or choose other rewards"
                )
            self._metrics["train"].clear()
            self._write_samples()
        super().log(logs, start_time)

    def _means(self) -> dict[str, list[float]]:
        """Values since the last log line. Those of a reward that didn't apply are left out."""
        return {
            name: [value for value in values if not math.isnan(value)]
            for name, values in self._metrics["train"].items()
            if name != "step_time"
        }

    def _write_samples(self) -> None:
        if not self.safety.world.first or not self._samples:
            return
        step = self.state.global_step
        with self.safety.paths.samples.open("a", encoding="utf-8") as file:
            for sample in self._samples:
                file.write(json.dumps({"step": step, **sample}, ensure_ascii=False) + "\n")
        self._samples_lines += len(self._samples)
        self._samples = []

    # Saving and going on

    def _progress(self) -> Progress:
        return dataclasses.replace(super()._progress(), samples_lines=self._samples_lines)

    def _own_state(self) -> dict[str, Any]:
        uses = self.args.steps_per_generation * self.num_iterations
        # At a round's end nothing of it is needed any more.
        waiting = self._buffered_inputs if self._step % uses else None
        generation = {
            "step": self._step,
            "waiting": _moved(waiting, torch.device("cpu")),
            "means": self._means(),
            "samples": self._samples if self.safety.world.first else [],
            "entropy": [self.entropy_coef, self._last_world_entropy],
        }
        return {**super()._own_state(), "generation": generation}

    def more_trees(self) -> dict[str, Any]:
        if not self.args.sync_ref_model:
            return {}
        # By parameters: weights that share memory have one name among these.
        return {REFERENCE: {name: p.data for name, p in self._plain_reference().named_parameters()}}

    def _plain_reference(self) -> Any:
        return self.accelerator.unwrap_model(self.ref_model)

    def go_on(self, checkpoint: Path | None) -> None:
        super().go_on(checkpoint)
        if self.stopped is None and _REFERENCE_ADAPTER in getattr(self.model, "peft_config", {}):
            self.model.delete_adapter(_REFERENCE_ADAPTER)

    def begin(self) -> None:
        if self.safety.world.first and (self.samples_per_log or self.safety.paths.samples.exists()):
            kept = 0 if self._resumed is None else read_progress(self._resumed).samples_lines
            self._samples_lines = keep_lines(self.safety.paths.samples, kept)
        super().begin()

    def _restore(self, checkpoint: Path) -> None:
        super()._restore(checkpoint)
        generation = self._rank_state(checkpoint)["generation"]
        self._step = generation["step"]
        self._buffered_inputs = _moved(generation["waiting"], self.args.device)
        self._metrics["train"].clear()
        self._metrics["train"].update(generation["means"])
        self._samples = generation["samples"]
        self.entropy_coef, self._last_world_entropy = generation["entropy"]
        if self.args.sync_ref_model:
            kept = load_tree(checkpoint / REFERENCE)
            self._plain_reference().load_state_dict(kept, strict=False)


def _moved(node: Any, device: torch.device) -> Any:
    if isinstance(node, torch.Tensor):
        return node.to(device)
    if isinstance(node, dict):
        return {key: _moved(value, device) for key, value in node.items()}
    return [_moved(value, device) for value in node] if isinstance(node, list) else node


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value
