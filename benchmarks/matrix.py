"""Every kind of run interrupted at every step, and compared with its uninterrupted run.

python benchmarks/matrix.py [--only PATTERN] [--list]

By SIGTERM at each of about twelve steps, by SIGKILL at some, in evaluations, in a save, in
finalize, and two times in one run; with several ranks, whose starts take long, at a few places.
Compared are weights, optimizer, scheduler and generators, metrics.jsonl, eval.json and the batches.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path

from crash import begin, composed, differences, isolate, teacher, warm

from forgelm.config.schema import Interval, Kind, RunConfig, TinyConfig
from forgelm.drill import Case, directory, forked
from forgelm.errors import EXIT_OK
from forgelm.run.paths import RunPaths

# Twelve steps in one and a half epochs; the last batch of an epoch is short by a row.
BASE = (
    "task.max_train_samples=31",
    "task.max_eval_samples=24",
    "model.tiny.hidden_size=16",
    "model.tiny.intermediate_size=32",
    "model.tiny.dropout=0.1",
    "training.per_device_train_batch_size=4",
    "training.per_device_eval_batch_size=8",
    "training.eval_strategy=steps",
    "training.eval_steps=4",
    "training.logging_steps=2",
    "training.save_steps=3",
    "training.record_batches=true",
    "max_steps=12",
    "wandb.mode=disabled",
)
KD = ("mode=kd", "teacher=path", "teacher.path={root}/teacher")
REGRESSION = (
    "task=text_classification",
    "task.problem=regression",
    "task.metrics=[pearson,mse]",
    "task.train_file={root}/train.csv",
    "task.validation_file={root}/validation.csv",
)
CAUSAL = ("task=arithmetic", "task.max_length=16")
SEQ2SEQ = (
    "task=seq2seq",
    "task.train_file={root}/train.jsonl",
    "task.validation_file={root}/validation.jsonl",
    "task.max_length=16",
    "task.max_new_tokens=4",
)
WRITER = ("mode=kd", "teacher=path", "teacher.path={root}/causal_lm")
IMAGES = ("task=ocr_digits", "task.augmentation=0.7")
IMAGES_KD = (*IMAGES, "mode=kd", "teacher=path", "teacher.path={root}/image_to_text")
LORA = ("model.lora.enabled=true", "model.lora.r=4", "model.lora.lora_dropout=0.1")
# A round of generation is two prompts, completions of random letters are worth different sums.
RL = (
    *CAUSAL,
    "mode=rl",
    "mode.rewards=[exact_match,format,length]",
    "mode.reward_weights=[1,1,0.5]",
    r"mode.format_pattern='.*\d.*'",
    "mode.length_target=4",
    "mode.num_generations=2",
    "mode.max_completion_length=6",
    "task.max_train_samples=16",
)
# Epochs of eight optimizer steps, the last of them with fewer batches than the others.
TWICE = ("training.gradient_accumulation_steps=2", "task.max_train_samples=59")
THRICE = ("training.gradient_accumulation_steps=3", "task.max_train_samples=87")
# Two ranks, the last batch of an epoch short on one of them.
FSDP = ("training.fsdp=true", "launch.ranks_per_node=2", "task.max_train_samples=63")

VARIANTS: dict[str, tuple[str, ...]] = {
    "dropout": (),
    "no-dropout": ("model.tiny.dropout=0",),
    "workers": ("training.dataloader_num_workers=2",),
    "workers-persistent": (
        "training.dataloader_num_workers=2",
        "training.dataloader_persistent_workers=true",
    ),
    "accumulation-2": TWICE,
    "accumulation-3": THRICE,
    "group-by-length": ("training.train_sampling_strategy=group_by_length",),
    "token-dropout": ("task.token_dropout=0.2", "training.dataloader_num_workers=2"),
    "stream": ("task.streaming=true", "training.train_sampling_strategy=sequential"),
    "stream-workers": (
        "task.streaming=true",
        "training.train_sampling_strategy=sequential",
        "task.token_dropout=0.2",
        "training.dataloader_num_workers=2",
    ),
    "sequential": ("training.train_sampling_strategy=sequential",),
    "drop-last": ("training.dataloader_drop_last=true", "task.max_train_samples=35"),
    "bf16": ("training.bf16=true",),
    "best": ("training.load_best_model_at_end=true", "training.save_total_limit=1"),
    "early-stopping": (
        "training.early_stopping_patience=2",
        "training.early_stopping_threshold=1",
        "training.eval_steps=3",
    ),
    "best-early-stopping": (
        "training.load_best_model_at_end=true",
        "training.early_stopping_patience=4",
        "training.eval_steps=2",
    ),
    "evaluate-epochs": ("training.eval_strategy=epoch", "training.eval_steps=null"),
    "evaluate-never": ("training.eval_strategy=no", "training.eval_steps=null"),
    "log-1": ("training.logging_steps=1",),
    "log-5": ("training.logging_steps=5", "training.logging_first_step=true"),
    "kd": KD,
    "kd-accumulation": (*KD, *TWICE),
    "regression": REGRESSION,
    "causal": CAUSAL,
    "causal-packed": (
        *CAUSAL,
        "task.packing=true",
        "task.max_train_samples=62",
        "training.train_sampling_strategy=group_by_length",
    ),
    "causal-kd": (*CAUSAL, *WRITER, *TWICE),
    "causal-kd-packed": (
        *CAUSAL,
        *WRITER,
        "task.packing=true",
        "task.max_train_samples=62",
        "mode.loss=jsd",
    ),
    "seq2seq": SEQ2SEQ,
    "rl": RL,
    "rl-window": (*RL, "mode.steps_per_generation=4"),
    "rl-iterations": (*RL, "mode.num_iterations=2", "task.max_train_samples=8"),
    "rl-everything": (
        *RL,
        "mode.steps_per_generation=4",
        "mode.num_iterations=2",
        "training.gradient_accumulation_steps=2",
        "training.dataloader_num_workers=2",
        "mode.beta=0.1",
        "mode.sync_ref_model=true",
        "mode.ref_model_sync_steps=2",
        "mode.use_adaptive_entropy=true",
        "mode.entropy_target=4.6",
    ),
    "lora": (*LORA, "model.lora.bias=all"),
    "lora-dora-best": (
        *LORA,
        "model.lora.use_dora=true",
        "model.lora.use_rslora=true",
        "training.load_best_model_at_end=true",
    ),
    "lora-kd-accumulation": (*LORA, *KD, *TWICE),
    "lora-causal-dora": (*LORA, *CAUSAL, "model.lora.use_dora=true"),
    "lora-causal-embeddings": (*LORA, *CAUSAL, "model.lora.modules_to_save=[embed_tokens]"),
    "lora-seq2seq": (*LORA, *SEQ2SEQ),
    "lora-rl": (
        *LORA,
        *RL,
        "mode.beta=0.1",
        "mode.steps_per_generation=4",
        "training.load_best_model_at_end=true",
    ),
    "lora-activation-checkpointing": (*LORA, "training.activation_checkpointing=true"),
    "images": IMAGES,
    "images-workers": (*IMAGES, "training.dataloader_num_workers=2"),
    "images-kd": (*IMAGES_KD, *TWICE),
    "adamw-fused": ("training.optim=adamw_torch_fused",),
    "adafactor": ("training.optim=adafactor",),
    "sgd": ("training.optim=sgd", "training.learning_rate=0.1"),
    "cosine": ("training.lr_scheduler_type=cosine", "training.warmup_steps=3"),
    "save-foreground": ("training.save_in_background=false",),
    "save-epochs": ("training.save_steps=null", "training.save_strategy=epoch"),
    "activation-checkpointing": ("training.activation_checkpointing=true",),
    "full-determinism": ("training.full_determinism=true",),
    "ranks-2": ("launch.ranks_per_node=2", "task.max_train_samples=63"),
    # The last batch of an epoch has fewer rows than there are ranks.
    "ranks-3": ("launch.ranks_per_node=3", "task.max_train_samples=86"),
    "ranks-2-accumulation": (*TWICE, "launch.ranks_per_node=2", "task.max_train_samples=119"),
    "ranks-2-causal-kd": (
        *CAUSAL,
        *WRITER,
        *TWICE,
        "launch.ranks_per_node=2",
        "task.max_train_samples=119",
    ),
    "ranks-2-rl": (
        *RL,
        "mode.steps_per_generation=2",
        "mode.num_iterations=2",
        "mode.beta=0.1",
        "launch.ranks_per_node=2",
    ),
    "ranks-2-lora": (*LORA, "launch.ranks_per_node=2", "task.max_train_samples=63"),
    "ranks-2-images-kd": (
        *IMAGES_KD,
        "launch.ranks_per_node=2",
        "task.max_train_samples=63",
    ),
    "fsdp": (*FSDP, "training.load_best_model_at_end=true", "training.save_total_limit=1"),
    "fsdp-accumulation": (
        *TWICE,
        *FSDP,
        "task.max_train_samples=119",
        "training.fsdp_config.reshard_after_forward=false",
        "training.activation_checkpointing=true",
    ),
    "fsdp-bf16": (*FSDP, "training.bf16=true", "training.optim=adamw_torch_fused"),
    "fsdp-kd": (*KD, *FSDP),
    "fsdp-causal-kd": (*CAUSAL, *WRITER, *FSDP),
    "fsdp-causal-packed": (*CAUSAL, *FSDP, "task.packing=true", "task.max_train_samples=124"),
    "fsdp-seq2seq": (*SEQ2SEQ, *FSDP),
    "fsdp-images-kd": (*IMAGES_KD, *FSDP),
    "fsdp-lora-dora": (*LORA, *FSDP, "model.lora.use_dora=true", "model.lora.bias=all"),
    "ranks-2-kd": (*KD, "launch.ranks_per_node=2", "task.max_train_samples=63"),
}

Chain = tuple[str, ...]
"""Interruptions of one run, one a start, each as `POINT:COUNT:SIGNAL[:RANK]`."""

# No early stop comes before the ninth step. A save waits for the one before, so whoever is killed
# at the seventh step has the checkpoint of the third.
SOME: tuple[Chain, ...] = (
    ("preparation:1:SIGTERM",),
    ("evaluation_before:2:SIGTERM",),
    ("training:2:SIGKILL",),
    ("training:7:SIGKILL",),
    ("training:9:SIGKILL",),
    ("save:5:SIGKILL",),
    ("finalize:2:SIGKILL",),
    ("training:3:SIGTERM", "training:4:SIGTERM"),
    ("training:7:SIGKILL", "training:1:SIGTERM"),
    ("training:8:SIGTERM", "training:1:SIGKILL"),
)
IN_EVALUATION: tuple[Chain, ...] = (
    ("evaluation:2:SIGTERM",),
    ("evaluation:4:SIGKILL",),
    ("evaluation:1:SIGTERM", "evaluation:1:SIGTERM"),
    ("evaluation:1:SIGTERM", "training:1:SIGKILL"),
)
# First step, between log lines, the epoch's end, an evaluation; then two and more times.
OF_RANKS: tuple[Chain, ...] = (
    ("training:1:SIGTERM",),
    ("training:8:SIGTERM",),
    ("evaluation:2:SIGTERM",),
    ("training:7:SIGKILL", "training:2:SIGTERM"),
)
# In a save: the first rank before the seal, and another while it writes its part.
OF_SHARDS: tuple[Chain, ...] = (("save:5:SIGKILL",), ("save:2:SIGKILL:1",))


@dataclass
class Result:
    """What the interruptions of one variant did. `seconds` is the time of all starts together."""

    name: str
    interruptions: int = 0
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{self.name:<26} {self.interruptions:3} interruptions  "
            f"{len(self.problems):3} differences  {self.seconds:6.1f} s"
        )


def materials(root: Path) -> None:
    """Make what the variants need in `root`: teachers, scored rows and prompts of our own."""
    import forgelm.modes.rl  # noqa: F401
    from forgelm.tasks import arithmetic
    from forgelm.tasks.nli_mini import generate

    warm()
    teacher(root)
    writing_teacher(root, Kind.causal_lm)
    writing_teacher(root, Kind.image_to_text)
    for split in arithmetic.SPLITS:
        lines = (json.dumps(row) + "\n" for row in arithmetic.rows(split)[:31])
        (root / f"{split}.jsonl").write_text("".join(lines))
    pairs = generate("train")
    for name, rows in (("train", pairs[:31]), ("validation", pairs[31:55])):
        with (root / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(("text", "label"))
            writer.writerows((pair.premise, len(pair.premise) / 10) for pair in rows)


def writing_teacher(root: Path, kind: Kind) -> None:
    """A teacher that writes, with fresh weights: any will do. It normalises images its own way."""
    import torch

    from forgelm.models import tiny

    torch.manual_seed(1)
    reader = tiny.reader(kind)
    if kind is Kind.image_to_text:
        reader.image_processor.image_mean = [0.5] * 3
    tiny.model(kind, TinyConfig(), reader, {}).save_pretrained(root / kind.name)
    reader.save_pretrained(root / kind.name)


def tried(name: str, root: Path, chains: Sequence[Chain] | None = None) -> Result:
    """Interrupt one of VARIANTS below `root`, which has the `materials`; None: at every place.

    Runs that differ are left there.
    """
    result, began = Result(name), time.monotonic()
    config = composed((*BASE, *VARIANTS[name], f"run_name={name}"), root)
    log = root / f"{name}.log"
    code = forked(begin, config, log, {})
    if code != EXIT_OK:
        result.problems.append(f"uninterrupted: exit code {code}; see {log}")
        return result
    reference = directory(config)
    for number, chain in enumerate(everywhere(config) if chains is None else chains):
        result.interruptions += len(chain)
        found = interrupted(replace(config, run_name=f"{name}-{number}"), reference, chain)
        result.problems += [f"{' '.join(chain)}: {problem}" for problem in found]
    result.seconds = time.monotonic() - began
    return result


def everywhere(config: RunConfig) -> Iterator[Chain]:
    """All places to interrupt a config at, its uninterrupted run being there."""
    if config.launch.ranks > 1:
        yield from OF_RANKS
        if config.training.fsdp:
            yield from OF_SHARDS
        return
    steps = len(directory(config).batches(0).read_text().splitlines())
    yield from ((f"training:{step}:SIGTERM",) for step in range(1, steps + 1))
    yield from SOME
    if config.training.eval_strategy is not Interval.no:
        yield from IN_EVALUATION


def interrupted(config: RunConfig, reference: RunPaths, chain: Chain) -> list[str]:
    """Interrupt one run, complete it; returns what went wrong or differs from `reference`."""
    paths, log = directory(config), Path(config.output_root) / f"{config.run_name}.log"
    for text in chain:
        case = case_of(text)
        code, expected = (
            forked(begin, config, log, case.environment),
            case.expected(config.launch.ranks),
        )
        if code != expected:
            return [f"{text} ended with exit code {code} instead of {expected}; see {log}"]
    code = forked(begin, config, log, {})
    if code != EXIT_OK:
        return [f"going on ended with exit code {code}; see {log}"]
    found = differences(reference, paths)
    if not found:
        shutil.rmtree(paths.root)
        log.unlink()
    return found


def case_of(text: str) -> Case:
    point, count, signal, *rank = text.split(":")
    return Case(text, point, int(count), signal, int(rank[0]) if rank else None)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", default="*", metavar="PATTERN", help="variants, as in 'ranks-*'")
    parser.add_argument("--list", action="store_true", help="name the variants and end")
    given = parser.parse_args()
    names = [name for name in VARIANTS if fnmatch(name, given.only)]
    if not names:
        parser.error(f"--only {given.only}: no such variant; --list names them")
    if given.list:
        print("\n".join(names))
        return 0
    root = Path(tempfile.mkdtemp(prefix="forgelm-matrix-"))
    isolate(root)
    materials(root)
    results = []
    for name in names:
        results.append(tried(name, root))
        print(results[-1], *results[-1].problems, sep="\n  ", flush=True)
    count = sum(result.interruptions for result in results)
    wrong = sum(len(result.problems) for result in results)
    print(f"{len(results)} variants, {count} interruptions: {wrong} differences")
    if wrong:
        print(f"the runs are kept in {root}")
        return 1
    shutil.rmtree(root)
    return 0


if __name__ == "__main__":
    sys.exit(main())
