"""Hugging Face's Trainer, made so that it can be stopped at any step and goes on to the same bytes.

What differs from the stock trainer, and why:

- The batches come from `loader.py`, which draws nothing from the generators that training uses.
- A step's log line, evaluation, new best and save happen in this order and all at its end, at an
  epoch's end too, so a checkpoint holds all that belongs to its step.
- A checkpoint also holds the running loss, every rank's generators and, where a stop fell into a
  step's evaluation, that it is still to be done.
- The log history is left out of the state: it is `metrics.jsonl`, and would make saves ever slower.
- Frozen weights are left out of checkpoints: they are the base's, and never change.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
import time
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets.distributed import split_dataset_by_node
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import DefaultFlowCallback, PrinterCallback

from forgelm import stop
from forgelm.config.schema import Sampling, TrainingConfig
from forgelm.deadline import Pace
from forgelm.errors import RunError, Stopped
from forgelm.interrupt import point
from forgelm.models.sharded import like, own_parts
from forgelm.run.checkpoints import (
    Listing,
    Progress,
    half_written,
    read_progress,
    rotate,
    write_checkpoint,
)
from forgelm.run.files import keep_lines
from forgelm.run.paths import RunPaths
from forgelm.training.cadence import Cadence
from forgelm.training.loader import Loader, Order, Stream, loader, seed_from, unchanged_randomness
from forgelm.training.sharding import Crew, optimizer_state, shard, use_fsdp
from forgelm.training.snapshot import Buffers, Writer, randomness, restore_randomness
from forgelm.training.tensors import load_tree, save_tree, write_tensors
from forgelm.world import World

STATE = "trainer_state.json"
WEIGHTS = "model.safetensors"
OPTIMIZER = "optimizer.pt"
SCHEDULER = "scheduler.pt"
SCALER = "scaler.pt"
RANKS = "ranks.pt"

Scores = dict[str, float]

_TIMED_STEPS = 100


@dataclass(frozen=True)
class Safety:
    """What the trainer needs of the run to save into it and to evaluate for it.

    `measure` evaluates the model as it is (`{"eval_SPLIT_METRIC": value}`) and raises Stopped on
    every rank when a stop is asked for. `check_ownership` raises when the directory was taken over.
    `target` counts steps. `sealed` is told of each step whose checkpoint became durable.
    """

    paths: RunPaths
    config_hash: str
    target: int
    training: TrainingConfig
    world: World
    seed: int
    measure: Callable[[Any], Scores]
    check_ownership: Callable[[], None]
    sealed: Callable[[int], None]


class Exact(Trainer):
    """A trainer that saves, stops and goes on without changing the result.

    `stopped` is why it was asked to stop, `finished` whether training reached its end all the same.
    `metrics_written` says how many lines `metrics.jsonl` has, and their SHA-256.
    """

    control: TrainerControl

    def __init__(self, *args: Any, safety: Safety, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.safety = safety
        self._crew: Crew | None = None
        if self.args.fsdp:
            shard(self)
            self._crew = Crew(safety.world)
        self.stopped: str | None = None
        self.metrics_written: Callable[[], tuple[int, str]] = lambda: (0, "")
        self._writer = Writer()
        self._step_began = 0.0
        self._steps: deque[float] = deque(maxlen=_TIMED_STEPS)
        self._buffers = Buffers()
        self._line: dict[str, Any] = {}
        self._pending = False
        self.finished = False
        self._without_gain = 0
        self._saved_step = -1
        self._sealed_step = -1
        self._noted_step = -1
        self._cadence: Cadence | None = None
        self._resumed: Path | None = None
        self._stream: Stream | None = None
        self._taken_up: tuple[float | None, int, int] | None = None
        self.remove_callback(DefaultFlowCallback)
        self.remove_callback(PrinterCallback)
        self.add_callback(_Flow(self))

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.args.fsdp:
            use_fsdp(self)

    # Data

    def get_train_dataloader(self) -> Any:
        training, world, rows = self.safety.training, self.safety.world, self.train_dataset
        seed = self.safety.seed
        if hasattr(rows, "__len__"):
            order: Order | Stream = self._order(rows)
        else:
            rows = split_dataset_by_node(rows, world.rank, world.size)
            seed = seed_from(seed, world.rank)
            order = self._stream = Stream(rows, training.per_device_train_batch_size)
            if self._resumed is not None:
                position = read_progress(self._resumed).step * training.gradient_accumulation_steps
                order.resume(position, self._rank_state(self._resumed)["data"])
        return loader(
            rows,
            self.data_collator,
            order,
            seed,
            training.dataloader_num_workers,
            training.dataloader_persistent_workers,
            self.args.dataloader_pin_memory,
        )

    def _order(self, rows: Any) -> Order:
        training = self.safety.training
        lengths = None
        if training.train_sampling_strategy is Sampling.group_by_length:
            lengths = [len(ids) for ids in rows["input_ids"][:]]
        return Order(
            len(rows),
            training.per_device_train_batch_size,
            training.train_sampling_strategy,
            self.safety.seed,
            self.safety.world,
            lengths,
            training.gradient_accumulation_steps,
            training.dataloader_drop_last,
        )

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        self._step_began = time.monotonic()
        samples, items = super().get_batch_samples(*args, **kwargs)
        if self.safety.training.record_batches:
            self._record(samples)
        point("training")
        return samples, items

    def _record(self, samples: list[Any]) -> None:
        digest = hashlib.sha256()
        for sample in samples:
            self.digest(digest, sample)
        line = {"step": self.state.global_step + 1, "batch": digest.hexdigest()}
        with self._record_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def digest(self, digest: Any, sample: Any) -> None:
        """Add a batch, as the collator made it, to a hashlib object."""
        for name, value in sorted(sample.items()):
            digest.update(f"{name} {tuple(value.shape)}".encode())
            digest.update(value.cpu().numpy().tobytes())

    @property
    def _record_file(self) -> Path:
        return self.safety.paths.batches(self.safety.world.rank)

    # The end of a step

    def begin(self) -> None:
        """Called when the loop is set up: what of its state the checkpoint holds beside it."""
        per_epoch = None
        if self._stream is None:
            batches = len(self.callback_handler.train_dataloader)
            per_epoch = math.ceil(batches / self.args.gradient_accumulation_steps)
        self._cadence = Cadence(self.safety.training, self.state.max_steps, per_epoch)
        if self.safety.training.record_batches:
            keep_lines(self._record_file, self.state.global_step)
        if self._resumed is not None:
            taken_up = self._taken_up
            self._restore(self._resumed)
            if taken_up is not None:
                self._pending, self._line = False, {}
                self.state.best_metric, self.state.best_global_step, self._without_gain = taken_up

    def end_step(self) -> None:
        """Decide what follows the step; all ranks alike."""
        assert self._cadence is not None
        step, control = self.state.global_step, self.control
        self._steps.append(time.monotonic() - self._step_began)
        self.safety.check_ownership()
        overdue = self.safety.world.first and self._cadence.overdue(self._writer.price)
        stopping, overdue, failed = self.safety.world.agree(
            stop.requested() is not None, overdue, self._writer.failed
        )
        if failed:
            # What one rank couldn't write all know in a moment, and each says it.
            self._writer.wait()
        self.note_sealed()
        due = self._cadence.after(step)
        control.should_log = due.log
        control.should_evaluate = due.evaluate
        control.should_save = due.save or overdue
        control.should_training_stop = step >= self.state.max_steps
        self.finished = control.should_training_stop
        if stopping:
            self.stopped = stop.requested() or "another rank was asked to stop"
            self._pending = control.should_evaluate
            control.should_evaluate = False
            control.should_save = control.should_training_stop = True

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Keep values for the step's one line."""
        if self.state.epoch is not None:
            logs["epoch"] = self.state.epoch
        self.control.should_log = False
        self._line |= logs

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        control = self.control
        evaluate, save = control.should_evaluate, control.should_save
        control.should_evaluate = control.should_save = False
        if evaluate or save:
            self._check_numbers()
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if evaluate:
            try:
                save = self._evaluate_step() or save
            except Stopped as stopped:
                self.stopped, self._pending = str(stopped), True
                control.should_training_stop = save = True
        if not self._pending:
            self._say_line()
        if save:
            self._save_checkpoint(self.model, None)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def _check_numbers(self) -> None:
        """Before a step is kept or measured: all ranks look at the loss and the weights of each.

        The step's loss is that of the weights before it, so it doesn't tell of those after it.

        Raises:
            RunError: on every rank, when one of them has a number that isn't finite.
        """
        own = self._tr_loss.item(), _all_finite(self.accelerator.unwrap_model(self.model))
        losses, finite = zip(*self.safety.world.gather(own), strict=True)
        wrong = None if all(finite) else "the weights are no finite numbers"
        if not math.isfinite(sum(losses)):
            wrong = f"the loss is {sum(losses)}"
        if wrong is not None:
            raise RunError(
                f"{wrong} at step {self.state.global_step}: lower training.learning_rate, or "
                "check the data; the last checkpoint stands"
            )

    def _evaluate_step(self) -> bool:
        """Evaluate; returns whether the result is worth a checkpoint."""
        # Autocast by name: a model that was taken up outside the loop isn't wrapped in it. Shards
        # are put together in their precision already.
        sharded = self._crew is not None
        with unchanged_randomness(), nullcontext() if sharded else self.accelerator.autocast():
            scores = self.safety.measure(self.accelerator.unwrap_model(self.model))
        self.log(dict(scores))
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics=scores
        )
        before = self.state.best_metric
        best = self._determine_best_metric(scores, None)
        return self._stop_early(before, scores[self.args.metric_for_best_model], best) or (
            best and self.safety.training.load_best_model_at_end
        )

    def _stop_early(self, before: float | None, value: float, best: bool) -> bool:
        patience = self.safety.training.early_stopping_patience
        if patience is None:
            return False
        gain = math.inf if before is None else abs(value - before)
        enough = best and gain > self.safety.training.early_stopping_threshold
        self._without_gain = 0 if enough else self._without_gain + 1
        if self._without_gain >= patience:
            self.finished = self.control.should_training_stop = True
        return self.finished

    def _say_line(self) -> None:
        line, self._line = self._line, {}
        if line:
            self.control = self.callback_handler.on_log(self.args, self.state, self.control, line)

    # Saving

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        step = self.state.global_step
        if step == self._saved_step:
            return
        began = time.monotonic()
        safety = self.safety
        self.store_flos()
        ranks = safety.world.gather(self._own_state())
        self._saved_step = step
        if safety.world.first or self._crew is not None:
            self._writer.wait()
            # Nothing goes on beside the last save: it needs no copy, and all of the processor.
            background = safety.training.save_in_background and not self._ends_here()
            job = self._snapshot(ranks, self._buffers.copy if background else _uncopied)
            self._writer.start(job, began, background)
        assert self._cadence is not None
        self._cadence.saved()

    def _own_state(self) -> dict[str, Any]:
        """What differs from rank to rank."""
        data = None
        if self._stream is not None:
            position = self.state.global_step * self.args.gradient_accumulation_steps
            data = self._stream.state_after(position)
        loss = [self._tr_loss.item(), self._globalstep_last_logged, self._total_loss_scalar]
        return {"randomness": randomness(), "loss": loss, "data": data}

    def _rank_state(self, checkpoint: Path) -> dict[str, Any]:
        state: dict[str, Any] = load_tree(checkpoint / RANKS)[self.safety.world.rank]
        return state

    def _ends_here(self) -> bool:
        return self.finished or self.stopped is not None

    def _snapshot(
        self, ranks: list[dict[str, Any]], copied: Callable[[Any, str], Any]
    ) -> Callable[[], None]:
        """Take what a checkpoint holds; returns what writes it."""
        model = self.accelerator.unwrap_model(self.model)
        weights = copied(own_parts(changing(model)), "model")
        optimizer = copied(own_parts(self.optimizer.state_dict()), "optimizer")
        trees = {
            SCHEDULER: copied(self.lr_scheduler.state_dict(), "scheduler"),
            RANKS: ranks,
            **{name: copied(tree, name) for name, tree in self.more_trees().items()},
        }
        scaler = getattr(self.accelerator, "scaler", None)
        if scaler is not None:
            trees[SCALER] = copied(scaler.state_dict(), "scaler")
        state, progress = _text_of(self.state), self._progress()
        paths, limit = self.safety.paths, self.safety.training.save_total_limit

        crew = self._crew

        def write_part(folder: Path) -> None:
            write_tensors(weights, folder / WEIGHTS)
            point("save")
            save_tree(optimizer, folder / OPTIMIZER)

        def write_files(folder: Path) -> Listing:
            known: Listing = {}
            if crew is None:
                write_part(folder)
            else:
                known = crew.write(folder, write_part)
            model.config.save_pretrained(folder)
            for name, tree in trees.items():
                point("save")
                save_tree(tree, folder / name)
            (folder / STATE).write_text(state, encoding="utf-8")
            return known

        def job() -> None:
            if crew is not None and not self.safety.world.first:
                crew.write(half_written(paths, progress.step), write_part)
                return
            self.safety.check_ownership()
            write_checkpoint(paths, progress, write_files)
            self._sealed_step = progress.step
            best = () if progress.best_step is None else (progress.best_step,)
            rotate(paths, limit, {progress.step, *best})

        return job

    def more_trees(self) -> dict[str, Any]:
        """What a mode adds to a checkpoint, by file: the same on every rank."""
        return {}

    def _progress(self) -> Progress:
        lines, digest = self.metrics_written()
        return Progress(
            config_hash=self.safety.config_hash,
            step=self.state.global_step,
            target=self.state.max_steps,
            ranks=self.safety.world.size,
            metrics_lines=lines,
            metrics_sha256=digest,
            line=dict(self._line),
            pending=self._pending,
            finished=self.finished,
            evaluations_without_gain=self._without_gain,
            best_step=self.state.best_global_step,
        )

    def note_sealed(self) -> None:
        """Tell the run of a checkpoint that became durable; raise what a save failed with."""
        self._writer.check()
        if self._sealed_step != self._noted_step:
            self._noted_step = self._sealed_step
            self.safety.sealed(self._noted_step)

    @property
    def pace(self) -> Pace:
        """What the slowest of the last steps took, and the last save."""
        return Pace(max(self._steps, default=0.0), self._writer.cost.total)

    def settle(self) -> None:
        """Wait until the last save is durable."""
        self._writer.wait()
        self.note_sealed()
        if self.safety.world.first:
            shutil.rmtree(self.safety.paths.spare, ignore_errors=True)

    # Going on

    def go_on(self, checkpoint: Path | None) -> None:
        """Train, from a checkpoint if there is one, until the end or a stop.

        Raises:
            Stopped: in an evaluation that an earlier stop left undone.
        """
        self._resumed = checkpoint
        if checkpoint is not None:
            progress = read_progress(checkpoint)
            # An early stop ends training only as long as nobody asks for more.
            self.finished = progress.finished and progress.target >= self.safety.target
            if self.finished or progress.pending:
                self._take_up(checkpoint)
        if not self.finished:
            try:
                self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            finally:
                if isinstance(self.callback_handler.train_dataloader, Loader):
                    self.callback_handler.train_dataloader.close()
            self.settle()

    def _take_up(self, checkpoint: Path) -> None:
        """The model and its history as of a checkpoint, outside the loop; evaluated if due."""
        self.load_weights(checkpoint)
        self.state = TrainerState.load_from_json(str(checkpoint / STATE))
        self._restore(checkpoint)
        if self._pending:
            self._evaluate_step()
            self._pending = False
            self._say_line()
            state = self.state
            self._taken_up = state.best_metric, state.best_global_step, self._without_gain

    def load_weights(self, checkpoint: Path) -> None:
        """The model's weights as a checkpoint holds them; frozen ones stay as they are.

        Raises:
            RunError: the checkpoint is of another model.
        """
        model = self.accelerator.unwrap_model(self.model)
        state = model.state_dict()
        stored = load_file(self._part(checkpoint) / WEIGHTS)
        sharded = {name: like(part, state[name]) for name, part in stored.items() if name in state}
        result = model.load_state_dict(stored | sharded, strict=False)
        # Of tensors that share their memory the checkpoint holds one.
        there = {own_parts(state[name]).data_ptr() for name in sharded}
        lacking = [
            name
            for name, tensor in changing(model).items()
            if name in result.missing_keys and own_parts(tensor).data_ptr() not in there
        ]
        wrong = [*lacking, *result.unexpected_keys]
        if wrong:
            raise RunError(
                f"{checkpoint}: holds the weights of another model (they differ in {wrong[0]}); "
                "restore what the run was begun with, or give another run_name"
            )

    def _part(self, checkpoint: Path) -> Path:
        """Where this rank's weights and optimizer are in a checkpoint."""
        return checkpoint if self._crew is None else self._crew.part(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.load_weights(Path(resume_from_checkpoint))

    def _restore(self, checkpoint: Path) -> None:
        progress = read_progress(checkpoint)
        loss, logged, total = self._rank_state(checkpoint)["loss"]
        self._tr_loss = torch.tensor(loss, device=self.args.device)
        self._globalstep_last_logged, self._total_loss_scalar = logged, total
        self._line, self._pending = dict(progress.line), progress.pending
        self._without_gain = progress.evaluations_without_gain
        self._saved_step = self._sealed_step = self._noted_step = progress.step

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            parts = load_tree(self._part(Path(checkpoint)) / OPTIMIZER)
            self.optimizer.load_state_dict(optimizer_state(parts, self.optimizer))
            self.lr_scheduler.load_state_dict(load_tree(Path(checkpoint) / SCHEDULER))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            restore_randomness(self._rank_state(Path(checkpoint))["randomness"])


class _Flow(TrainerCallback):
    """Calls the trainer where the stock one calls its callbacks."""

    def __init__(self, trainer: Exact) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.begin()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.end_step()


def changing(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What of a model's state training can change: buffers, and parameters that aren't frozen."""
    state: dict[str, torch.Tensor] = model.state_dict()
    parameters = model.named_parameters(remove_duplicate=False)
    frozen = {name for name, parameter in parameters if not parameter.requires_grad}
    # What a quantised weight is made of has names below the weight's.
    below = tuple(f"{name}." for name in frozen)
    return {k: v for k, v in state.items() if k not in frozen and not k.startswith(below)}


def _all_finite(model: torch.nn.Module) -> bool:
    """Whether all that is trained of this rank's part of a model is finite numbers."""
    state = own_parts(changing(model))
    trained = [state[name] for name, p in model.named_parameters() if p.requires_grad]
    # Sums are the quickest way to look at all of it, and the device is waited for once.
    sums = [part.sum(dtype=torch.float32) for part in trained]
    if not sums or torch.isfinite(torch.stack(sums)).all():
        return True
    # A sum may overflow where no weight does.
    return all(bool(torch.isfinite(part).all()) for part in trained)


def _uncopied(tree: Any, name: str) -> Any:
    return tree


def _text_of(state: TrainerState) -> str:
    kept = dataclasses.asdict(state) | {"log_history": [], "stateful_callbacks": {}}
    try:
        return json.dumps(kept, indent=2, sort_keys=True) + "\n"
    except TypeError as error:
        raise RunError(f"the trainer's state can't be saved: {error}") from error
