"""What types alone can't say of a config: ranges, and rules across groups. All problems at once."""

from __future__ import annotations

import difflib
import math
import operator
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from forgelm import plugins
from forgelm.config import lm_tasks
from forgelm.config.extras import lacking
from forgelm.config.metrics import BUILT_IN, REWARD, answers, fitting
from forgelm.config.modes import modes
from forgelm.config.rewards import rewards, round_of
from forgelm.config.schema import (
    DistillationLoss,
    FsdpConfig,
    Interval,
    KdConfig,
    Kind,
    Optimizer,
    Problem,
    RlConfig,
    RunConfig,
    Sampling,
    SaveInterval,
    TeacherKind,
)
from forgelm.redact import has_token

DATA_SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")

EMBEDDED = {
    "nli_mini": Kind.text_classification,
    "arithmetic": Kind.causal_lm,
    "ocr_digits": Kind.image_to_text,
}
# What a folder with a model has; one with an adapter alone has the second.
_MODEL_FILES = ("config.json", "adapter_config.json")
_WANDB_KEY = re.compile(r"[0-9a-f]{40}")
_LONGEST = 200
_FOLDER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")


def token_in(key: str) -> str:
    """What is said of a key whose value looks like a token; the value isn't repeated."""
    return (
        f"{key} looks like an access token: tokens are never config values; "
        "set HF_TOKEN or WANDB_API_KEY in the environment, or log in with `hf auth login`"
    )


def check(config: RunConfig) -> list[str]:
    """Every problem of a typed config, one line each; an empty list when it can be run."""
    values = list(leaves(config))
    problems = [problem for key, value, bounds in values for problem in _value(key, value, bounds)]
    for rule in (
        _names,
        _task_source,
        _task_kind,
        _images,
        _folders,
        _task_metrics,
        _teacher,
        _mode,
        _training,
        sharding,
        _lm_eval,
        _adapters,
    ):
        problems += rule(config)
    return problems


def leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Every (dotted key, value, metadata) below a dataclass."""
    for item in fields(node):
        key, value = f"{prefix}{item.name}", getattr(node, item.name)
        if is_dataclass(value):
            yield from leaves(value, f"{key}.")
        else:
            yield key, value, dict(item.metadata)


def _value(key: str, value: Any, bounds: dict[str, Any]) -> Iterator[str]:
    if isinstance(value, str) and value == MISSING:
        yield f"{key} is missing: give it, as in {key}=VALUE"
        return
    texts = [
        text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)
    ]
    wandb_key = key.startswith("wandb.") and any(_WANDB_KEY.fullmatch(text) for text in texts)
    if wandb_key or any(has_token(text) for text in texts):
        yield token_in(key)
        return
    if "" in texts:
        yield f"{key} is empty: give a value, or null where there is none"
    if isinstance(value, float) and value != value:
        yield f"{key}=nan: must be a number"
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    tests: dict[str, tuple[Callable[[float, float], bool], str]] = {
        "min": (operator.ge, "at least"),
        "max": (operator.le, "at most"),
        "above": (operator.gt, "above"),
        "below": (operator.lt, "below"),
    }
    wanted = [f"{word} {bounds[name]:.12g}" for name, (_, word) in tests.items() if name in bounds]
    if any(name in bounds and not holds(value, bounds[name]) for name, (holds, _) in tests.items()):
        yield f"{key}={value}: must be {' and '.join(wanted)}"
    elif value in (float("inf"), float("-inf")):
        yield f"{key}={value}: must be finite"


def _names(config: RunConfig) -> Iterator[str]:
    folders = {"task.name": config.task.name, "model.name": config.model.name}
    if config.run_name is not None:
        folders["run_name"] = config.run_name
    for key, name in folders.items():
        if name not in ("", MISSING) and not _FOLDER.fullmatch(name):
            yield (
                f"{key}={name!r}: names a folder; use letters, digits, '.', '_', '+' and '-', "
                "beginning with a letter or digit"
            )
        elif len(name) > _LONGEST:
            yield f"{key}: names a folder, and has {len(name)} characters; at most {_LONGEST} do"
    root = Path(config.output_root).expanduser().absolute()
    there = next(path for path in (root, *root.parents) if path.exists())
    if not there.is_dir():
        yield f"output_root={config.output_root}: {there} is a file; give a folder"
    elif not os.access(there, os.W_OK | os.X_OK):
        yield f"output_root={config.output_root}: {there} isn't writable; give another folder"


def _task_source(config: RunConfig) -> Iterator[str]:
    task = config.task
    sources = {
        "task.embedded": task.embedded,
        "task.dataset": task.dataset,
        "task.train_file": task.train_file,
    }
    given = [f"{key}={value}" for key, value in sources.items() if value]
    if not given:
        yield (
            "task has no data: give task.train_file and task.validation_file (own rows), "
            "or task.dataset (a data-set id)"
        )
    elif len(given) > 1:
        yield f"{' and '.join(given)}: a task has one source; keep one of them"
    embedded = [*EMBEDDED, *plugins.names(plugins.TASKS)]
    if task.embedded is not None and task.embedded not in embedded:
        yield (
            f"task.embedded={task.embedded}: no such embedded data; there are "
            f"{', '.join(embedded)}{_near(task.embedded, embedded)}"
        )
    if task.train_file and not task.validation_file:
        yield (
            f"task.train_file={task.train_file} has no task.validation_file beside it: "
            "give the rows to evaluate on"
        )
    if task.validation_file and not task.train_file:
        yield f"task.validation_file={task.validation_file} needs task.train_file beside it"
    for key, name in (
        ("task.train_file", task.train_file),
        ("task.validation_file", task.validation_file),
    ):
        if not name:
            continue
        if Path(name).suffix.lower() not in DATA_SUFFIXES:
            yield f"{key}={name}: must end in one of {', '.join(DATA_SUFFIXES)}"
        elif not Path(name).is_file():
            yield f"{key}={name}: no such file (looked in {Path.cwd()})"
    if task.train_file and len(task.validation_splits) > 1:
        yield (
            f"task.validation_splits={task.validation_splits}: own files have one, "
            "task.validation_file; name one split"
        )
    if task.streaming and config.max_steps is None:
        yield "task.streaming=true needs max_steps: a stream doesn't say how long an epoch is"
    if task.streaming and config.training.train_sampling_strategy is not Sampling.sequential:
        yield (
            f"task.streaming=true with training.train_sampling_strategy="
            f"{config.training.train_sampling_strategy}: a stream is read in its own order; set it "
            "to sequential (shuffle the data beforehand)"
        )
    if task.train_split in task.validation_splits:
        yield (
            f"task.train_split={task.train_split} is among task.validation_splits too: "
            "evaluate on other rows than those trained on"
        )
    if not task.validation_splits:
        yield "task.validation_splits=[]: name at least one split to evaluate on"
    if len(set(task.validation_splits)) < len(task.validation_splits):
        yield f"task.validation_splits={task.validation_splits}: names a split twice"


def _near(name: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {near[0]}?" if near else ""


# Keys that only some kinds of task read.
_READ_BY = {
    "problem": (Kind.text_classification,),
    "labels": (Kind.text_classification,),
    "text_pair_column": (Kind.text_classification,),
    "streaming": (Kind.text_classification,),
    "token_dropout": (Kind.text_classification,),
    "prompt_column": (Kind.causal_lm, Kind.seq2seq),
    "completion_column": (Kind.causal_lm, Kind.seq2seq),
    "messages_column": (Kind.causal_lm,),
    "as_chat": (Kind.causal_lm,),
    "system_prompt": (Kind.causal_lm,),
    "packing": (Kind.causal_lm,),
    "image_column": (Kind.image_to_text,),
    "instruction": (Kind.image_to_text,),
    "augmentation": (Kind.image_to_text,),
}


def _task_kind(config: RunConfig) -> Iterator[str]:
    task, suits = config.task, config.model.suits
    known = {item.name: item.default for item in fields(task)}
    for key, kinds in _READ_BY.items():
        value = getattr(task, key)
        if task.kind not in kinds and value != known[key]:
            shown = str(value).lower() if isinstance(value, bool) else value
            yield f"task.{key}={shown} is only read with task.kind={' or '.join(kinds)}"
    if task.embedded in EMBEDDED and task.kind is not EMBEDDED[task.embedded]:
        yield f"task.kind={task.kind}: {task.embedded} is of task.kind={EMBEDDED[task.embedded]}"
    if suits is not None and task.kind not in suits:
        yield (
            f"model={config.model.name} is for {', '.join(suits)}, and task {task.name} is of "
            f"task.kind={task.kind}; choose another model"
        )
    if task.messages_column is not None and (task.prompt_column or task.completion_column):
        yield (
            f"task.messages_column={task.messages_column} with task.prompt_column or "
            "task.completion_column: rows hold messages, or a prompt and a completion; keep one"
        )
    if task.answer_pattern is not None:
        try:
            re.compile(task.answer_pattern)
        except re.error as error:
            yield f"task.answer_pattern={task.answer_pattern!r}: not a regular expression: {error}"
        if not answers(task) and not isinstance(config.mode, RlConfig):
            yield (
                f"task.answer_pattern={task.answer_pattern!r} is only read for a metric that "
                "compares answers, such as exact_match"
            )


def _images(config: RunConfig) -> Iterator[str]:
    task, sampling = config.task, config.training.train_sampling_strategy
    needed = {
        f"task.kind={task.kind}": ("PIL", task.kind is Kind.image_to_text),
        f"task.metrics=[{','.join(task.metrics)}]": ("jiwer", {"cer", "wer"} & set(task.metrics)),
    }
    for what, (module, used) in needed.items():
        if used and find_spec(module) is None:
            yield f"{what} needs the extra ocr: pip install 'forgelm[ocr]'"
    if task.kind is Kind.image_to_text and sampling is Sampling.group_by_length:
        yield (
            "training.train_sampling_strategy=group_by_length: images aren't of different lengths; "
            "use random"
        )


def _folders(config: RunConfig) -> Iterator[str]:
    """Paths that can only be folders here, not hub ids."""
    paths = {
        "model.path": config.model.path,
        "model.base": config.model.base,
        "teacher.path": config.teacher.path,
        "task.dataset": config.task.dataset,
        "task.teacher": config.task.teacher,
    }
    for key, path in paths.items():
        if path in (None, "", MISSING):
            continue
        folder = Path(str(path)).expanduser()
        if folder.is_dir():
            names = () if key == "task.dataset" else _MODEL_FILES[: 1 if key == "model.base" else 2]
            if names and not any((folder / name).is_file() for name in names):
                yield (
                    f"{key}={path}: the folder has no {' or '.join(names)}; give a saved model's "
                    "folder"
                )
        elif "@" in str(path) and not str(path).startswith((".", "/", "~")):
            yield _with_revision(key, str(path))
        elif str(path).startswith((".", "/", "~")) or str(path).count("/") > 1:
            yield f"{key}={path}: no such folder (looked in {Path.cwd()}), and not a hub id"


def _with_revision(key: str, path: str) -> str:
    """`organisation/name@revision`, as the commands that fill caches take it."""
    name, _, revision = path.partition("@")
    if key == "model.base":
        return f"{key}={path}: a base is taken at main: give {key}={name}, or its folder"
    own = f"{key}_revision" if key == "task.teacher" else f"{key.partition('.')[0]}.revision"
    return (
        f"{key}={path}: a revision has a key of its own: give {key}={name} "
        f"{own}={revision or 'REVISION'}"
    )


def _adapters(config: RunConfig) -> Iterator[str]:
    model = config.model
    if model.base is not None and model.path is None:
        yield f"model.base={model.base} is only read where model.path is an adapter"
    if model.lora.enabled:
        yield from _said(lacking("lora", "peft", "model.lora.enabled=true"))
    for key, path in (("model", model.path), ("teacher", config.teacher.path)):
        if path and path != MISSING and (Path(path).expanduser() / _MODEL_FILES[1]).is_file():
            yield from _said(lacking("lora", "peft", f"{key}.path={path} is an adapter, which"))
    if not model.load_in_4bit:
        return
    if not model.lora.enabled:
        yield (
            "model.load_in_4bit=true needs model.lora.enabled=true: weights in 4 bits can't be "
            "trained, only adapters on them"
        )
    if model.path is None:
        yield "model.load_in_4bit=true needs model.path: fresh weights aren't held in 4 bits"
    if config.training.use_cpu:
        yield "model.load_in_4bit=true needs a CUDA GPU: drop it, or drop training.use_cpu"
    if model.lora.merge:
        yield (
            "model.lora.merge=true with model.load_in_4bit=true: merging into 4 bits loses what "
            "was learnt; merge afterwards with forgelm export RUN --merge"
        )
    yield from _said(lacking("quant", "bitsandbytes", "model.load_in_4bit=true"))


def _said(problem: str | None) -> Iterator[str]:
    if problem is not None:
        yield problem


def _task_metrics(config: RunConfig) -> Iterator[str]:
    task = config.task
    if not task.metrics:
        yield "task.metrics=[]: name at least one, as in task.metrics=[accuracy]"
        return
    regression = task.problem is Problem.regression
    fit = fitting(task)
    for metric in task.metrics:
        if metric in fit:
            continue
        if metric not in BUILT_IN:
            near = _near(metric, fit)
            yield f"task.metrics: {metric}: no such metric; use {', '.join(fit)}{near}"
            continue
        owner = (
            f"task.problem={task.problem}"
            if task.kind is Kind.text_classification
            else f"task.kind={task.kind}"
        )
        yield f"task.metrics: {metric} doesn't fit {owner}; use {', '.join(fit)}"
    known = BUILT_IN.get(task.metrics[0])
    # Another package's metric may go either way.
    rises = task.greater_is_better if known is None else known.rises
    if len(set(task.metrics)) < len(task.metrics):
        yield f"task.metrics=[{','.join(task.metrics)}]: names a metric twice"
    if task.greater_is_better != rises:
        yield (
            f"task.greater_is_better={str(task.greater_is_better).lower()}: for "
            f"{task.metrics[0]} it is {str(rises).lower()}; "
            f"give task.greater_is_better={str(rises).lower()}"
        )
    if regression and task.labels is not None:
        yield f"task.labels={task.labels}: a regression has no label names; leave it null"
    if task.labels is not None and len(set(task.labels)) < max(2, len(task.labels)):
        yield f"task.labels={task.labels}: give two or more different names"


def uses_teacher(config: RunConfig) -> bool:
    """Whether the mode learns from a teacher's outputs."""
    return isinstance(config.mode, KdConfig) and config.mode.alpha > 0


def _teacher(config: RunConfig) -> Iterator[str]:
    teacher, task = config.teacher, config.task
    needed = uses_teacher(config)
    for key, kind in (("path", TeacherKind.path), ("run", TeacherKind.run)):
        value = getattr(teacher, key)
        if teacher.kind is kind and value is None:
            yield f"teacher={key} needs teacher.{key}: give it, as in teacher.{key}=..."
        if value and teacher.kind is not kind:
            yield f"teacher.{key}={value} is only read with teacher={key}"
    if not isinstance(config.mode, KdConfig) and teacher.kind in (
        TeacherKind.path,
        TeacherKind.run,
    ):
        yield (
            f"teacher={teacher.kind}: mode={config.mode.name} has no use for a teacher; "
            "use mode=kd, or leave teacher out"
        )
    if needed and teacher.kind is TeacherKind.none:
        yield (
            f"teacher=none with mode.alpha={config.mode.alpha:g}: distillation needs a teacher; "
            "set mode.alpha=0, or use teacher=auto, teacher=path or teacher=run"
        )
    if (
        needed
        and teacher.kind is TeacherKind.auto
        and not (task.teacher or task.teacher_experiment)
    ):
        yield (
            f"teacher=auto: task {task.name} names no teacher of its own; "
            "use teacher=path teacher.path=... or teacher=run teacher.run=..."
        )


def _mode(config: RunConfig) -> Iterator[str]:
    mode, problem = config.mode, config.task.problem
    if type(mode) is not modes().get(getattr(mode, "name", "")):
        yield (
            f"mode.name={getattr(mode, 'name', mode)}: the name belongs to the mode; choose one "
            f"with mode={' or mode='.join(modes())}"
        )
    if (
        isinstance(mode, KdConfig)
        and problem is Problem.regression
        and mode.loss not in (DistillationLoss.auto, DistillationLoss.mse)
    ):
        yield (
            f"mode.loss={mode.loss} with task.problem=regression: it compares probabilities; "
            "use mode.loss=mse"
        )
    if isinstance(mode, RlConfig):
        yield from _rl(config, mode)
    elif REWARD in config.task.metrics:
        yield f"task.metrics: {REWARD}: mode={mode.name} has no rewards; use mode=rl"


def _rl(config: RunConfig, mode: RlConfig) -> Iterator[str]:
    task, training = config.task, config.training
    yield from _said(lacking("rl", "trl", "mode=rl"))
    if mode.use_vllm and find_spec("vllm") is None:
        yield (
            "mode.use_vllm=true needs vllm, which isn't installed: pip install 'trl[vllm]', in "
            "the version that trl wants"
        )
    if task.kind is not Kind.causal_lm:
        yield (
            f"mode=rl with task.kind={task.kind}: rewards are for what a model writes; "
            "choose a task of task.kind=causal_lm"
        )
    if task.packing:
        yield "task.packing=true with mode=rl: prompts aren't packed; leave it out"
    if training.train_sampling_strategy is Sampling.group_by_length:
        yield (
            "training.train_sampling_strategy=group_by_length with mode=rl: prompts are taken "
            "random or sequential"
        )
    yield from _rewards(mode)
    round_ = round_of(config)
    if mode.num_generations > 0 and round_.completions % mode.num_generations:
        yield (
            f"mode.num_generations={mode.num_generations}: must divide the {round_.completions} "
            "completions that are generated at once (training.per_device_train_batch_size x "
            "ranks x mode.steps_per_generation)"
        )
    if mode.sync_ref_model and not mode.beta:
        yield "mode.sync_ref_model=true with mode.beta=0: there is no reference; set mode.beta"
    if mode.sync_ref_model and config.model.lora.enabled:
        yield (
            "mode.sync_ref_model=true with model.lora.enabled=true: the reference of an adapter "
            "stays as it starts; leave one of them out"
        )
    if mode.use_vllm and training.use_cpu:
        yield "mode.use_vllm=true needs a GPU: drop it, or drop training.use_cpu"


def _rewards(mode: RlConfig) -> Iterator[str]:
    known, chosen = rewards(), mode.rewards
    if not chosen:
        yield "mode.rewards=[]: name at least one, as in mode.rewards=[exact_match]"
    for name in chosen:
        if name and name not in known:
            yield (
                f"mode.rewards: {name}: no such reward; use {', '.join(known)}{_near(name, known)}"
            )
    if len(set(chosen)) < len(chosen):
        yield f"mode.rewards=[{','.join(chosen)}]: names a reward twice; use mode.reward_weights"
    if mode.reward_weights is not None and len(mode.reward_weights) != len(chosen):
        yield (
            f"mode.reward_weights has {len(mode.reward_weights)} values for {len(chosen)} "
            "rewards: give one for each of mode.rewards"
        )
    if not all(map(math.isfinite, mode.reward_weights or [])):
        yield f"mode.reward_weights={mode.reward_weights}: must be finite numbers"
    if mode.format_pattern is None:
        if "format" in chosen:
            yield (
                "mode.rewards: format needs mode.format_pattern: give the regular expression "
                "that a whole completion must match"
            )
        return
    if "format" not in chosen:
        yield f"mode.format_pattern={mode.format_pattern!r} is only read for the reward format"
    try:
        re.compile(mode.format_pattern)
    except re.error as error:
        yield f"mode.format_pattern={mode.format_pattern!r}: not a regular expression: {error}"


def _training(config: RunConfig) -> Iterator[str]:
    training, tiny = config.training, config.model.tiny
    if training.fp16 and training.bf16:
        yield "training.fp16=true and training.bf16=true: choose one"
    if training.fp16 and training.use_cpu:
        yield "training.fp16=true needs a GPU: drop it, or drop training.use_cpu"
    if training.eval_strategy is Interval.steps and training.eval_steps is None:
        yield "training.eval_strategy=steps needs training.eval_steps: give the number of steps"
    if training.eval_steps is not None and training.eval_strategy is not Interval.steps:
        yield (
            f"training.eval_steps={training.eval_steps} is only read with "
            "training.eval_strategy=steps"
        )
    for key, used in (
        ("load_best_model_at_end=true", training.load_best_model_at_end),
        (
            f"early_stopping_patience={training.early_stopping_patience}",
            training.early_stopping_patience is not None,
        ),
    ):
        if used and training.eval_strategy is Interval.no:
            yield (
                f"training.{key} with training.eval_strategy=no: "
                "set training.eval_strategy=epoch or steps"
            )
    if training.save_steps is not None and training.save_minutes is not None:
        yield (
            f"training.save_steps={training.save_steps} and "
            f"training.save_minutes={training.save_minutes:g}: give one of them"
        )
    for key, strategy in (
        ("save_steps", SaveInterval.steps),
        ("save_minutes", SaveInterval.minutes),
    ):
        value = getattr(training, key)
        if value is not None and training.save_strategy not in (None, strategy):
            yield (
                f"training.{key}={value} is only read with training.save_strategy={strategy}, "
                f"not {training.save_strategy}"
            )
    if training.save_strategy is SaveInterval.minutes and training.save_minutes is None:
        yield "training.save_strategy=minutes needs training.save_minutes: give the minutes"
    if training.dataloader_persistent_workers and not training.dataloader_num_workers:
        yield (
            "training.dataloader_persistent_workers=true needs training.dataloader_num_workers "
            "of 1 or more"
        )
    heads = tiny.num_attention_heads
    if config.model.path is None and heads > 0 and tiny.hidden_size % heads:
        yield (
            f"model.tiny.num_attention_heads={heads}: must divide "
            f"model.tiny.hidden_size={tiny.hidden_size}"
        )


def sharding(config: RunConfig) -> Iterator[str]:
    """What speaks against the config's `training.fsdp`, or its settings without it."""
    training, model, mode = config.training, config.model, config.mode
    if not training.fsdp:
        for item in fields(FsdpConfig):
            value = getattr(training.fsdp_config, item.name)
            if value != item.default:
                shown = str(value).lower() if isinstance(value, bool) else f"[{','.join(value)}]"
                yield (
                    f"training.fsdp_config.{item.name}={shown} is only read with training.fsdp=true"
                )
        return
    if training.fsdp_config.transformer_layer_cls_to_wrap == []:
        yield (
            "training.fsdp_config.transformer_layer_cls_to_wrap=[]: name at least one class; null "
            "takes those that the model names"
        )
    if config.launch.ranks == 1:
        yield (
            "training.fsdp=true needs several ranks to shard over: give "
            "launch.ranks_per_node=2 or more"
        )
    others = {
        "mode=rl": (
            isinstance(mode, RlConfig),
            "each rank generates with a whole model; leave one of them out",
        ),
        "model.load_in_4bit=true": (
            model.load_in_4bit,
            "weights in 4 bits aren't sharded; leave one of them out",
        ),
        "model.lora.merge=true": (
            model.lora.merge,
            "no rank has the whole base; merge afterwards with forgelm export RUN --merge",
        ),
        f"training.optim={training.optim}": (
            training.optim is Optimizer.adafactor,
            "its sums over rows and columns aren't sharded; use training.optim=adamw_torch",
        ),
        "training.fp16=true": (
            training.fp16,
            "shards compute in bfloat16 or float32; use training.bf16=true",
        ),
        f"eval.lm_eval.tasks=[{','.join(config.eval.lm_eval.tasks)}]": (
            config.eval.lm_eval.tasks,
            "lm-eval measures on one rank, and none has the whole model; leave one of them out",
        ),
    }
    for other, (chosen, reason) in others.items():
        if chosen:
            yield f"training.fsdp=true with {other}: {reason}"


def _lm_eval(config: RunConfig) -> Iterator[str]:
    yield from lm_tasks.problems(config.eval.lm_eval, config.task)
