"""Wrong requests: refused with exit code 1, everything wrong with them said, torch not asked for.

Two child processes make all the requests, in a folder that holds `FILES`: the price of a start is
paid twice only, and nothing that pytest imports hides an import of torch.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from forgelm.config.schema import MODES, KdConfig, RunConfig
from forgelm.config.validate import leaves

# Access tokens, put together here so that no scanner takes this file for a leak.
TOKENS = {
    "hub": "hf" + "_" + "Ab1" * 10,
    "github": "gh" + "p_" + "Ab12" * 9,
    "fine": "github" + "_pat_" + "Ab12" * 9,
    "openai": "sk" + "-" + "Ab12" * 8,
    "aws": "AK" + "IA" + "ABCD" * 4,
    "slack": "xo" + "xb-" + "12345" * 4,
    "wandb": "wandb" + "_v1_" + "Ab12" * 8,
}

FILES = {
    "rows.csv": "text,label\na,0\nb,1\n",
    "rows.xls": "text,label\n",
    "not_a_run/notes.txt": "nothing here\n",
    "own/model/mine.yaml": "name: mine\npath: null\ntiny:\n  hidden_size: 32\n",
    "own/model/misspelt.yaml": "name: misspelt\npth: org/model\ntiny:\n  hiddensize: 32\n",
    "own/experiment/wrong.yaml": (
        "# @package _global_\n"
        "defaults:\n  - override /model: distilbert\n"
        "training:\n  lr: 0.1\n  fp16: maybe\n  optim: adamm\n"
        "model:\n  pth: x\n"
        "trainer: 1\n"
    ),
    "own/experiment/out_of_range.yaml": (
        "# @package _global_\nepochs: 0\ntraining:\n  learning_rate: -1\n"
    ),
    "own/experiment/right.yaml": "# @package _global_\nepochs: 2\n",
    "own/primary.yaml": "defaults: [config, _self_]\nepochs: 2\n",
    "own/wrong_primary.yaml": (
        "defaults: [config, _self_]\ntraining:\n  lr: 0.1\n  fp16: maybe\nsed: 3\n"
    ),
}

CHILD = """
import contextlib, io, json, sys

from forgelm.cli.main import main

HEAVY = ("torch", "transformers", "datasets")
asked_for = set()


class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name in HEAVY:
            asked_for.add(name)
            raise ImportError(f"{name} was asked for")


sys.meta_path.insert(0, Refuse())
outcomes = []
for words in json.load(sys.stdin):
    asked_for.clear()
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        try:
            code = main(words)
        except BaseException as error:
            code = repr(error)
    loaded = sorted(asked_for.union(name for name in HEAVY if name in sys.modules))
    outcomes.append([code, stdout.getvalue(), stderr.getvalue(), loaded])
json.dump(outcomes, sys.stdout)
"""

BATCH = "per_device_train_batch_size"
RL = f"mode=rl task=arithmetic training.{BATCH}=32"
FSDP = "training.fsdp=true launch.ranks_per_node=2"
OWN_DATA = "task=text_classification task.train_file=rows.csv task.validation_file=rows.csv"
NOT_AN_OVERRIDE = "not an override; write key=value, as in training.learning_rate=1e-4 …"
A_FOLDER_NAME = "names a folder; use letters, digits, '.', '_', '+' and '-', beginning with …"
NOT_A_VALUE = "looks like an access token: tokens are never config values; set HF_TOKEN or WANDB_…"
A_METRIC_LIST = "must be a list, as in task.metrics=[a,b]"
SFT_HAS_NO_TEACHER = "mode=sft has no use for a teacher; use mode=kd, or leave teacher out"
NEEDS_TEACHER = (
    "distillation needs a teacher; set mode.alpha=0, or use teacher=auto, teacher=path or …"
)

# A command line, then what stderr says, a text a line, in order; `…` stands for anything.
REQUESTS: list[tuple[str, ...]] = [
    # Keys that don't exist
    ("nothing=1", "nothing=1: no such key"),
    ("trainer=1", "trainer=1: no such key; did you mean training?"),
    ("lr=1e-3", "lr=1e-3: no such key; did you mean training.learning_rate?"),
    ("batch_size=8", f"batch_size=8: no such key; did you mean training.{BATCH}?"),
    ("num_train_epochs=4", "num_train_epochs=4: no such key; did you mean epochs?"),
    ("max-steps=3", "max-steps=3: no such key; did you mean max_steps?"),
    ("Training.fp16=true", "Training.fp16=true: no such key; did you mean training.fp16?"),
    ("task.lenght=4", "task.lenght=4: no such key; did you mean task.max_length?"),
    ("model.pth=x", "model.pth=x: no such key; did you mean model.path?"),
    (
        "model.tiny.hidden=8",
        "model.tiny.hidden=8: no such key; did you mean model.tiny.hidden_size?",
    ),
    ("teacher.knd=auto", "teacher.knd=auto: no such key; did you mean teacher.kind?"),
    ("mode=kd mode.alfa=0.2", "mode.alfa=0.2: no such key; did you mean mode.alpha?"),
    ("mode.alpha=0.2", "mode.alpha=0.2: mode.alpha is a key of mode=kd"),
    (
        "training.lerning_rate=1",
        "training.lerning_rate=1: no such key; did you mean training.learning_rate?",
    ),
    ("training.max_steps=5", "training.max_steps=5: no such key; did you mean max_steps?"),
    ("training.output_dir=x", "training.output_dir=x: no such key; did you mean output_root?"),
    ("eval.before=true", "eval.before=true: no such key; did you mean eval.before_training?"),
    ("wandb.projct=a", "wandb.projct=a: no such key; did you mean wandb.project?"),
    # Choices that a group doesn't have
    ("mode=kdd", "mode=kdd: no such mode; one of …kd…sft…; did you mean mode=kd?"),
    (
        "model=distlbert",
        "model=distlbert: no such model; one of …bert_base, …tiny…; did you mean model=distilbert?",
    ),
    ("model=gpt9", "model=gpt9: no such model; one of …bert_base, …tiny_teacher…"),
    (
        "task=mnlii",
        "task=mnlii: no such task; one of arithmetic, …mnli, …; did you mean task=mnli?",
    ),
    ("task=", "task=: no such task; one of arithmetic, …mnli, …"),
    ("task=null", "task=null: no such task; one of arithmetic, …mnli, …"),
    (
        "teacher=autoo",
        "teacher=autoo: no such teacher; one of auto, none, path, run; did you mean teacher=auto?",
    ),
    (
        "experiment=mnli/distilbert/00_sftt",
        "experiment=mnli/distilbert/00_sftt: no such experiment; one of …mnli/distilbert/00_sft, …;"
        " did you mean experiment=mnli/distilbert/00_sft?",
    ),
    ("experiment=mnli", "experiment=mnli: no such experiment; one of …mnli/distilbert/00_sft, …"),
    ("model=[tiny,distilbert]", "model=[tiny,distilbert]: no such model; one of …bert_base, …"),
    # Keys added, forced and removed
    ("+nothing=1", "+nothing=1: no such key, and none can be added"),
    (
        "+training.lr=1",
        "+training.lr=1: no such key, and none can be added; did you mean training.learning_rate?",
    ),
    (
        "+training.learning_rate=1",
        "+training.learning_rate=1: training.learning_rate exists; drop the + and write "
        "training.learning_rate=1",
    ),
    (
        "+experiment=nli_mini/teacher",
        "+experiment=nli_mini/teacher: experiment exists; drop the + and write "
        "experiment=nli_mini/teacher",
    ),
    ("+mode=kd", "+mode=kd: mode exists; drop the + and write mode=kd"),
    ("++nothing.at_all=1", "++nothing.at_all=1: no such key, and none can be added…"),
    ("++wandb.projct=a", "++wandb.projct=a: no such key, …; did you mean wandb.project?"),
    ("++seed=1.5", "++seed=1.5: must be a whole number"),
    ("~training.learning_rate", "~training.learning_rate: keys can't be removed…"),
    ("~task", "~task: groups can't be removed; choose another with task=NAME"),
    # Types
    (f"training.{BATCH}=1.5", f"training.{BATCH}=1.5: must be a whole number"),
    (f"training.{BATCH}=many", f"training.{BATCH}=many: must be a whole number"),
    ("seed=null", "seed=null: must be a whole number"),
    ("seed=", "seed=: must be a whole number"),
    ("seed=[1,2]", "seed=[1,2]: must be a whole number"),
    ("max_steps=ten", "max_steps=ten: must be a whole number or null"),
    ("max_steps=1.5", "max_steps=1.5: must be a whole number or null"),
    ("training.learning_rate=fast", "training.learning_rate=fast: must be a number"),
    ("training.learning_rate=true", "training.learning_rate=true: must be a number"),
    ("training.learning_rate={a:1}", "training.learning_rate={a:1}: must be a number"),
    ("epochs=null", "epochs=null: must be a number"),
    ("epochs=inf", "epochs=inf: must be finite"),
    ("training.fp16=maybe", "training.fp16=maybe: must be true or false"),
    ("training.fp16=null", "training.fp16=null: must be true or false"),
    ("debug=yess", "debug=yess: must be true or false"),
    ("training.bf16=perhaps", "training.bf16=perhaps: must be true or false or null"),
    ("output_root=null", "output_root=null: must be text"),
    ("output_root=", "output_root is empty: give a value, or null where there is none"),
    (
        "training.optim=adamm",
        "training.optim=adamm: must be one of adamw_torch, …adafactor…",
    ),
    (
        "training.lr_scheduler_type=quadratic",
        "training.lr_scheduler_type=quadratic: must be one of linear, cosine, …",
    ),
    ("wandb.mode=on", "wandb.mode=on: must be one of online, offline, disabled"),
    ("mode=kd mode.loss=huber", "mode.loss=huber: must be one of auto, kl, reverse_kl, jsd, mse"),
    ("task.metrics=accuracy", f"task.metrics=accuracy: {A_METRIC_LIST}"),
    ("task.metrics=[acc]", "task.metrics: acc: no such metric; use accuracy, f1, …"),
    ("task.metrics=[acuracy]", "task.metrics: acuracy: no such …; did you mean accuracy?"),
    ("task.metrics=null", f"task.metrics=null: {A_METRIC_LIST}"),
    ("task.labels=3", "task.labels=3: must be a list, as in task.labels=[a,b] or null"),
    ("wandb.tags=a", "wandb.tags=a: must be a list, as in wandb.tags=[a,b]"),
    ("model.name=???", "model.name is missing: give it, as in model.name=VALUE"),
    ("model=custom", "model.path is missing: give it, as in model.path=VALUE"),
    (
        "model=custom model.path=org/x@v1",
        "model.path=org/x@v1: a revision has a key of its own: give model.path=org/x "
        "model.revision=v1",
    ),
    (
        "mode=kd teacher=path teacher.path=org/x@refs/pr/1",
        "teacher.path=org/x@refs/pr/1: … give teacher.path=org/x teacher.revision=refs/pr/1",
    ),
    (
        "task=causal_lm task.dataset=org/x@",
        "task.dataset=org/x@: … give task.dataset=org/x task.revision=REVISION",
    ),
    (
        "model=custom model.path=org/x model.base=org/y@v1",
        "model.base=org/y@v1: a base is taken at main: give model.base=org/y, or its folder",
    ),
    ("seed=${nothing}", "seed: …nothing…not found"),
    # Sections are no values
    (
        "training=1",
        "training=1: training is a section; set a key in it (training.…, training.…, ...)",
    ),
    ("training=null", "training=null: training is a section; set a key in it (…)"),
    ("model.tiny=3", "model.tiny=3: model.tiny is a section; set a key in it (…)"),
    (
        "eval=false",
        "eval=false: eval is a section; set a key in it (eval.before_training, eval.…, ...)",
    ),
    ("wandb=off", "wandb=off: wandb is a section; set a key in it (wandb.mode, …, ...)"),
    # Rules across keys and groups
    ("mode=kd teacher=none", f"teacher=none with mode.alpha=0.9: {NEEDS_TEACHER}"),
    ("mode=kd teacher=path", "teacher=path needs teacher.path: give it, as in …"),
    ("mode=kd teacher=run", "teacher=run needs teacher.run: give it, as in …"),
    ("mode=kd teacher=path teacher.path=''", "teacher.path is empty: give a value, or null…"),
    ("mode=kd teacher.path=a/b", "teacher.path=a/b is only read with teacher=path"),
    ("teacher=none teacher.run=a", "teacher.run=a is only read with teacher=run"),
    ("teacher=path teacher.path=a/b", f"teacher=path: {SFT_HAS_NO_TEACHER}"),
    ("teacher=run teacher.run=a", f"teacher=run: {SFT_HAS_NO_TEACHER}"),
    (
        f"{OWN_DATA} mode=kd",
        "teacher=auto: task text_classification names no teacher of its own; use teacher=path …",
    ),
    (
        "task=stsb mode=kd mode.loss=kl",
        "mode.loss=kl with task.problem=regression: …; use mode.loss=mse",
    ),
    (
        "task=stsb task.metrics=[accuracy]",
        "task.metrics: accuracy doesn't fit task.problem=regression; use pearson, spearmanr, mse",
    ),
    (
        "task.metrics=[accuracy,pearson]",
        "task.metrics: pearson doesn't fit task.problem=classification; use accuracy, …",
    ),
    (
        "task.metrics=[]",
        "task.metrics=[]: name at least one, as in task.metrics=[accuracy]",
    ),
    (
        "task.greater_is_better=false",
        "task.greater_is_better=false: for accuracy it is true; give task.greater_is_better=true",
    ),
    (
        "task=stsb task.metrics=[mse]",
        "task.greater_is_better=true: for mse it is false; give task.greater_is_better=false",
    ),
    ("task=stsb task.labels=[a,b]", "task.labels=…: a regression has no label names; …"),
    ("task.labels=[a,a]", "task.labels=…: give two or more different names"),
    ("task.labels=[a]", "task.labels=…: give two or more different names"),
    (
        "task.dataset=org/data",
        "task.embedded=nli_mini and task.dataset=org/data: a task has one source; keep one …",
    ),
    ("task.embedded=other", "task.embedded=other: no such embedded data; there are nli_mini, …"),
    ("task.embedded=nlimini", "task.embedded=nlimini: no such …; did you mean nli_mini?"),
    (
        "task=text_classification",
        "task has no data: give task.train_file and task.validation_file (own rows), or task.d…",
    ),
    (
        "task=text_classification task.train_file=rows.csv",
        "task.train_file=rows.csv has no task.validation_file beside it: …",
    ),
    (
        "task=text_classification task.dataset=org/data task.validation_file=rows.csv",
        "task.validation_file=rows.csv needs task.train_file beside it",
    ),
    (
        "task=text_classification task.train_file=gone.csv task.validation_file=gone.tsv",
        "task.train_file=gone.csv: no such file (looked in /…)",
        "task.validation_file=gone.tsv: no such file (looked in /…)",
    ),
    (
        f"{OWN_DATA} task.validation_file=rows.xls",
        "task.validation_file=rows.xls: must end in one of .csv, .tsv, .json, .jsonl, .parquet",
    ),
    (
        "task.validation_splits=[]",
        "task.validation_splits=[]: name at least one split to evaluate on",
    ),
    ("task.validation_splits=[a,a]", "task.validation_splits=…: names a split twice"),
    (
        "training.eval_strategy=steps",
        "training.eval_strategy=steps needs training.eval_steps: give the number of steps",
    ),
    (
        "training.eval_steps=5",
        "training.eval_steps=5 is only read with training.eval_strategy=steps",
    ),
    (
        "training.early_stopping_patience=2 training.eval_strategy=no",
        "training.early_stopping_patience=2 with training.eval_strategy=no: set …=epoch or …",
    ),
    # Rewards
    (
        "mode=rl",
        "mode=rl with task.kind=text_classification: rewards are for what a model writes; …",
    ),
    (
        f"{RL} mode.rewards=[exact,length,length] mode.reward_weights=[1] "
        "\"mode.format_pattern='('\"",
        "mode.rewards: exact: no such reward; use exact_match, contains, numeric, format, length…",
        "mode.rewards=[exact,length,length]: names a reward twice; use mode.reward_weights",
        "mode.reward_weights has 1 values for 3 rewards: give one for each of mode.rewards",
        "mode.format_pattern='(' is only read for the reward format",
        "mode.format_pattern='(': not a regular expression: …",
    ),
    (
        f"{RL} mode.rewards=[format] mode.reward_weights=[nan]",
        "mode.reward_weights=[nan]: must be finite numbers",
        "mode.rewards: format needs mode.format_pattern: …",
    ),
    (f"{RL} mode.rewards=[]", "mode.rewards=[]: name at least one, as in …[exact_match]"),
    (
        f"{RL} mode.num_generations=5 launch.ranks_per_node=2 mode.steps_per_generation=3",
        "mode.num_generations=5: must divide the 192 completions that are generated at once …",
    ),
    (
        f"{RL} task.packing=true training.train_sampling_strategy=group_by_length",
        "task.packing=true with mode=rl: prompts aren't packed; leave it out",
        "training.train_sampling_strategy=group_by_length with mode=rl: …",
    ),
    (
        f"{RL} mode.sync_ref_model=true model.lora.enabled=true",
        "mode.sync_ref_model=true with mode.beta=0: there is no reference; set mode.beta",
        "mode.sync_ref_model=true with model.lora.enabled=true: …",
    ),
    (
        f"{RL} mode.use_vllm=true training.use_cpu=true",
        "mode.use_vllm=true needs vllm, which isn't installed: pip install 'trl[vllm]', …",
        "mode.use_vllm=true needs a GPU: drop it, or drop training.use_cpu",
    ),
    (
        "task=arithmetic task.metrics=[reward]",
        "task.metrics: reward: mode=sft has no rewards; use mode=rl",
    ),
    (
        "training.save_steps=5 training.save_minutes=2",
        "training.save_steps=5 and training.save_minutes=2: give one of them",
    ),
    (
        "training.save_strategy=auto training.save_steps=5",
        "training.save_steps=5 is only read with training.save_strategy=steps, not auto",
    ),
    (
        "training.save_strategy=steps training.save_minutes=2",
        "training.save_minutes=2.0 is only read with training.save_strategy=minutes, not steps",
    ),
    (
        "training.save_strategy=minutes",
        "training.save_strategy=minutes needs training.save_minutes: …",
    ),
    (
        "launch.nodes=2",
        "launch.nodes=2: this starts no processes on other machines; …",
    ),
    (
        "task.streaming=true training.train_sampling_strategy=sequential",
        "task.streaming=true needs max_steps: …",
    ),
    (
        "task.streaming=true max_steps=3",
        "task.streaming=true with training.train_sampling_strategy=random: …",
    ),
    (
        "training.load_best_model_at_end=true training.eval_strategy=no",
        "training.load_best_model_at_end=true with training.eval_strategy=no: set …=epoch or …",
    ),
    (
        "training.fp16=true training.bf16=true",
        "training.fp16=true and training.bf16=true: choose one",
    ),
    (
        "training.fp16=true training.use_cpu=true",
        "training.fp16=true needs a GPU: drop it, or drop training.use_cpu",
    ),
    (
        "training.fsdp=true",
        "training.fsdp=true needs several ranks to shard over: give launch.ranks_per_node=2 or …",
    ),
    (
        "training.fsdp_config.reshard_after_forward=false",
        "training.fsdp_config.reshard_after_forward=false is only read with training.fsdp=true",
    ),
    (
        "training.fsdp_config.transformer_layer_cls_to_wrap=[BertLayer,Other]",
        "training.fsdp_config.transformer_layer_cls_to_wrap=[BertLayer,Other] is only read with …",
    ),
    (
        f"{FSDP} training.fsdp_config.transformer_layer_cls_to_wrap=[]",
        "training.fsdp_config.transformer_layer_cls_to_wrap=[]: name at least one class; null …",
    ),
    (
        f"{FSDP} training.optim=adafactor training.fp16=true model.lora.enabled=true "
        "model.lora.merge=true",
        "training.fsdp=true with model.lora.merge=true: … merge afterwards with forgelm export …",
        "training.fsdp=true with training.optim=adafactor: … use training.optim=adamw_torch",
        "training.fsdp=true with training.fp16=true: … use training.bf16=true",
    ),
    (
        f"{FSDP} {RL}",
        "training.fsdp=true with mode=rl: each rank generates with a whole model; leave one …",
    ),
    (
        f"{FSDP} model.load_in_4bit=true model.lora.enabled=true model.path=org/model",
        "training.fsdp=true with model.load_in_4bit=true: weights in 4 bits aren't sharded; …",
        "…bitsandbytes…",
    ),
    (
        "training.dataloader_persistent_workers=true",
        "training.dataloader_persistent_workers=true needs training.dataloader_num_workers of 1 …",
    ),
    (
        "model.tiny.num_attention_heads=3",
        "model.tiny.num_attention_heads=3: must divide model.tiny.hidden_size=64",
    ),
    ("run_name=a/b", f"run_name='a/b': {A_FOLDER_NAME}"),
    ("run_name=..", f"run_name='..': {A_FOLDER_NAME}"),
    (f"run_name={'n' * 300}", "run_name: names a folder, and has 300 characters; at most 200 do"),
    ("run_name=''", "run_name is empty: give a value, or null where there is none"),
    ("task.name=a/b", f"task.name='a/b': {A_FOLDER_NAME}"),
    ("model.name=-x", f"model.name='-x': {A_FOLDER_NAME}"),
    ("output_root=rows.csv/x", "output_root=rows.csv/x: /…/rows.csv is a file; give a folder"),
    # Going on with what isn't a run
    ("resume=nowhere", "…nowhere…: no such run…"),
    ("resume=not_a_run", "…not_a_run…: no such run…"),
    (
        "resume=not_a_run seed=2",
        "seed: not_a_run goes on with …only max_steps and epochs may …",
    ),
    # Sweeps
    ("mode=kd,sft", "mode=kd,sft: a sweep; add -m to run all of it…"),
    ("seed=range(1,3)", "seed=range(1,3): a sweep; add -m to run all of it…"),
    ("-m mode=kd,sfx seed=1,2", "mode=sfx: no such mode; one of …; did you mean mode=sft?"),
    (
        "-m mode=kd,sfx seed=1,-2 training.learning_rate=0,1e-3",
        "mode=sfx: no such mode; one of …; did you mean mode=sft?",
        "training.learning_rate=0.0: must be above 0",
        "seed=-2: must be at least 0 and at most 4294967295",
    ),
    (
        "-m seed=range(-2,2)",
        "seed=-2: must be at least 0 and at most 4294967295",
        "seed=-1: must be at least 0 and at most 4294967295",
    ),
    ("-m training.learning_rate=1e-3,abc", "training.learning_rate=abc: must be a number"),
    (
        "-m mode=sft,kd teacher=none seed=1,2",
        f"teacher=none with mode.alpha=0.9: {NEEDS_TEACHER}",
    ),
    ("-m seed=1,2 mode=kd mode.alpha=2", "mode.alpha=2.0: must be at least 0 and at most 1"),
    (
        "-m experiment=nli_mini/teacher,nli_mini/teach",
        "experiment=nli_mini/teach: no such experiment; …; did you mean experiment=nli_mini/te…",
    ),
    ("-m training.learning_rate=interval(0,1)", "sweep: …INTERVAL_SWEEP…"),
    # What can't be read as an override
    ("seed=1 word", f"'word': {NOT_AN_OVERRIDE}"),
    ("seed==1", f"'seed==1': {NOT_AN_OVERRIDE}"),
    ("training.learning_rate=[1", f"'training.learning_rate=[1': {NOT_AN_OVERRIDE}"),
    ("training..fp16=true", f"'training..fp16=true': {NOT_AN_OVERRIDE}"),
    ('"wandb.project=\'two words"', f'"wandb.project=\'two words": {NOT_AN_OVERRIDE}'),
    (
        "-m word seed=1,-1",
        f"'word': {NOT_AN_OVERRIDE}",
        "seed=-1: must be at least 0 and at most 4294967295",
    ),
    # Hydra's own keys
    (
        "hydra.run.dirr=x",
        "hydra.run.dirr=x: no such key of Hydra's; did you mean hydra.run.dir?",
    ),
    ("hydra.jub.name=a", "hydra.jub.name=a: no such key of Hydra's; did you mean hydra.job?"),
    ("hydra.job.chdir=maybe", "hydra.job.chdir…maybe…bool…"),
    # Usage
    ("word", "word: no such command; one of train, …, or an override such as mode=kd"),
    ("trainn", "trainn: no such command; one of train, …; did you mean train?"),
    ("--cfg", "argument --cfg/-c: expected one argument; `forgelm --help` shows …"),
    ("--cfg everything", "argument --cfg/-c: invalid choice: 'everything' (choose from …job…"),
    ("--cfg job --multirun", "--run, --multirun, --cfg and --info exclude each other: give one"),
    ("--resolve seed=1", "--resolve goes with --cfg or --help"),
    ("--info nothing", "argument --info/-i: invalid choice: 'nothing' (choose from …defaults…"),
    ("seed=1 --nothing", "unrecognized arguments: --nothing; `forgelm --help` shows …"),
    ("--config-dir", "argument --config-dir/-cd: expected one argument; …"),
    ("--config-dir nowhere seed=1", "--config-dir nowhere: no such folder"),
    ("--config-dir own/primary.yaml", "--config-dir own/primary.yaml: no such folder"),
    ("--config-name nowhere", "…'nowhere'…"),
    ("train mode=kdd", "mode=kdd: no such mode; …; did you mean mode=kd?"),
    ("seed=-1 --cfg job", "seed=-1: must be at least 0 and at most 4294967295"),
    # Own config files
    (
        "--config-dir own experiment=wrong",
        "In 'experiment/wrong': training.lr=0.1: no such key; did you mean training.learning_rate?",
        "In 'experiment/wrong': training.fp16=maybe: must be true or false",
        "In 'experiment/wrong': training.optim=adamm: must be one of adamw_torch, …",
        "In 'experiment/wrong': model.pth=x: no such key; did you mean model.path?",
        "In 'experiment/wrong': trainer=1: no such key; did you mean training?",
    ),
    (
        "--config-dir own experiment=wrong sed=1 seed=-1",
        *(["In 'experiment/wrong': …"] * 5),
        "sed=1: no such key; did you mean seed?",
        "seed=-1: must be at least 0 and at most 4294967295",
    ),
    (
        "--config-dir own experiment=out_of_range",
        "training.learning_rate=-1.0: must be above 0",
        "epochs=0.0: must be above 0",
    ),
    (
        "--config-dir own experiment=rigth",
        "experiment=rigth: no such experiment; one of …right…; did you mean experiment=right?",
    ),
    (
        "--config-dir own model=misspelt",
        "In 'model/misspelt': model.pth=…: no such key; did you mean model.path?",
        "In 'model/misspelt': model.tiny.hiddensize=32: …did you mean model.tiny.hidden_size?",
    ),
    ("--config-dir own model=mne", "model=mne: no such model; …mine…; did you mean model=mine?"),
    (
        "--config-dir own -cn wrong_primary seed=-1",
        "In 'wrong_primary': training.lr=0.1: no such key; did you mean training.learning_rate?",
        "In 'wrong_primary': training.fp16=maybe: must be true or false",
        "In 'wrong_primary': sed=3: no such key; did you mean seed?",
        "seed=-1: must be at least 0 and at most 4294967295",
    ),
    (
        "--config-dir own -cn primary training.lr=1",
        "training.lr=1: no such key; did you mean training.learning_rate?",
    ),
    (
        "-m --config-dir own experiment=out_of_range,right seed=1,-1",
        "training.learning_rate=-1.0: must be above 0",
        "epochs=0.0: must be above 0",
        "seed=-1: must be at least 0 and at most 4294967295",
    ),
    # Several at once
    (
        "nothing=1 training.fp16=maybe mode=kdd seed=-1 word ~task",
        f"'word': {NOT_AN_OVERRIDE}",
        "mode=kdd: no such mode; …",
        "~task: groups can't be removed; choose another with task=NAME",
        "nothing=1: no such key",
        "training.fp16=maybe: must be true or false",
        "seed=-1: must be at least 0 and at most 4294967295",
    ),
    (
        "lr=1 training.optim=adamm mode=kd mode.alpha=2 teacher=none run_name=a/b",
        "lr=1: no such key; did you mean training.learning_rate?",
        "training.optim=adamm: must be one of …",
        "mode.alpha=2.0: must be at least 0 and at most 1",
        "run_name='a/b': …",
        f"teacher=none with mode.alpha=2: {NEEDS_TEACHER}",
    ),
    (
        "max_steps=0 epochs=0 seed=-1 training.fp16=true training.bf16=true",
        "max_steps=0: must be at least 1",
        "epochs=0.0: must be above 0",
        "seed=-1: must be at least 0 and at most 4294967295",
        "training.fp16=true and training.bf16=true: choose one",
    ),
]

# A key out of its range, and what is allowed.
RANGES: list[tuple[str, str]] = [
    ("max_steps=0", "must be at least 1"),
    ("epochs=0.0", "must be above 0"),
    ("seed=-1", "must be at least 0 and at most 4294967295"),
    ("task.max_length=3", "must be at least 4"),
    ("task.max_train_samples=0", "must be at least 1"),
    ("task.max_eval_samples=0", "must be at least 1"),
    ("model.tiny.hidden_size=0", "must be at least 1"),
    ("model.tiny.num_hidden_layers=0", "must be at least 1"),
    ("model.tiny.intermediate_size=-8", "must be at least 1"),
    ("model.tiny.dropout=1.0", "must be at least 0 and below 1"),
    ("model.tiny.dropout=-0.1", "must be at least 0 and below 1"),
    ("model.tiny.initializer_range=0.0", "must be above 0"),
    ("mode.alpha=1.5", "must be at least 0 and at most 1"),
    ("mode.alpha=-0.5", "must be at least 0 and at most 1"),
    ("mode.temperature=0.0", "must be above 0"),
    (f"training.{BATCH}=0", "must be at least 1"),
    ("training.per_device_eval_batch_size=0", "must be at least 1"),
    ("training.gradient_accumulation_steps=0", "must be at least 1"),
    ("training.learning_rate=0.0", "must be above 0"),
    ("training.learning_rate=-0.1", "must be above 0"),
    ("training.warmup_steps=-1.0", "must be at least 0"),
    ("training.weight_decay=-0.1", "must be at least 0"),
    ("training.adam_beta1=1.0", "must be at least 0 and below 1"),
    ("training.adam_beta2=1.0", "must be at least 0 and below 1"),
    ("training.adam_epsilon=0.0", "must be above 0"),
    ("training.max_grad_norm=-1.0", "must be at least 0"),
    ("training.dataloader_num_workers=-1", "must be at least 0"),
    ("training.logging_steps=0", "must be at least 1"),
    ("training.save_steps=0", "must be at least 1"),
    ("training.save_minutes=0.0", "must be above 0"),
    ("training.save_overhead=0.0", "must be at most 1 and above 0"),
    ("training.save_total_limit=0", "must be at least 1"),
    ("training.early_stopping_patience=0", "must be at least 1"),
    ("training.early_stopping_threshold=-0.1", "must be at least 0"),
    ("task.token_dropout=1.0", "must be at least 0 and below 1"),
    ("launch.nodes=0", "must be at least 1"),
    ("launch.ranks_per_node=0", "must be at least 1"),
    ("launch.max_restarts=-1", "must be at least 0"),
    ("launch.max_idle_restarts=0", "must be at least 1"),
    ("training.eval_strategy=steps training.eval_steps=0", "must be at least 1"),
    ("task.max_new_tokens=0", "must be at least 1"),
    ("model.lora.r=0", "must be at least 1"),
    ("model.lora.lora_alpha=0", "must be at least 1"),
    ("model.lora.lora_dropout=1.0", "must be at least 0 and below 1"),
    ("eval.lm_eval.limit=0.0", "must be above 0"),
    ("eval.lm_eval.num_fewshot=-1", "must be at least 0"),
    ("eval.lm_eval.batch_size=0", "must be at least 1"),
    ("mode.beta=1.0", "must be above 0 and below 1"),
    ("mode.length_target=0", "must be at least 1"),
    ("mode.num_generations=1", "must be at least 2"),
    ("mode.max_completion_length=0", "must be at least 1"),
    ("mode.top_p=0.0", "must be at most 1 and above 0"),
    ("mode.top_k=-1", "must be at least 0"),
    ("mode.min_p=1.5", "must be at least 0 and at most 1"),
    ("mode.repetition_penalty=0.0", "must be above 0"),
    ("mode.num_iterations=0", "must be at least 1"),
    ("mode.steps_per_generation=0", "must be at least 1"),
    ("mode.epsilon=0.0", "must be above 0"),
    ("mode.epsilon_high=0.0", "must be above 0"),
    ("mode.delta=0.0", "must be above 0"),
    ("mode.off_policy_mask_threshold=0.0", "must be above 0"),
    ("mode.top_entropy_quantile=1.5", "must be at least 0 and at most 1"),
    ("mode.entropy_coef=-0.1", "must be at least 0"),
    ("mode.entropy_coef_min=-0.1", "must be at least 0"),
    ("mode.entropy_coef_max=-0.1", "must be at least 0"),
    ("mode.entropy_coef_delta=0.0", "must be above 0"),
    ("mode.entropy_target=-0.1", "must be at least 0"),
    ("mode.ref_model_sync_steps=0", "must be at least 1"),
    ("mode.ref_model_mixup_alpha=0.0", "must be at most 1 and above 0"),
    ("mode.vllm_server_timeout=0.0", "must be above 0"),
    ("mode.vllm_max_model_length=0", "must be at least 1"),
    ("mode.vllm_tensor_parallel_size=0", "must be at least 1"),
    ("mode.vllm_gpu_memory_utilization=0.0", "must be at most 1 and above 0"),
    ("mode.samples_per_log=-1", "must be at least 0"),
]

# Keys whose range isn't in `RANGES`: the text that is wrong with them has a request of its own.
RANGED_ELSEWHERE = {"model.tiny.num_attention_heads", "task.augmentation"}

# Values that look like tokens; for those that reach the typed config also what is said of them.
SECRETS: list[tuple[str, ...]] = [
    ("wandb.project={hub}", f"wandb.project {NOT_A_VALUE}"),
    ("wandb.entity={github}", f"wandb.entity {NOT_A_VALUE}"),
    ("wandb.group={fine}", f"wandb.group {NOT_A_VALUE}"),
    ("wandb.tags=[a,{openai}]", f"wandb.tags {NOT_A_VALUE}"),
    ("run_name={aws}", f"run_name {NOT_A_VALUE}"),
    ("model.name={slack}", f"model.name {NOT_A_VALUE}"),
    ("model.path={wandb}", f"model.path {NOT_A_VALUE}"),
    ("model.path=https://user:{hub}@host/model", f"model.path {NOT_A_VALUE}"),
    ("model.revision={hub}", f"model.revision {NOT_A_VALUE}"),
    ("output_root={hub}/outputs", f"output_root {NOT_A_VALUE}"),
    ("resume={hub}", f"resume {NOT_A_VALUE}"),
    ("task.labels=[{hub},b]", f"task.labels {NOT_A_VALUE}"),
    ("task.train_file={hub}.csv",),
    ("mode=kd teacher=path teacher.path={hub}", f"teacher.path {NOT_A_VALUE}"),
    ("-m wandb.project={hub},b", f"wandb.project {NOT_A_VALUE}"),
    ("wandb.project={hub} --cfg job", f"wandb.project {NOT_A_VALUE}"),
    ("seed={hub}", "… looks like an access token…"),
    ("training.fp16={hub}", "… looks like an access token…"),
    ("mode={hub}", "… looks like an access token…"),
    ("experiment={hub}", "… looks like an access token…"),
    ("nothing={hub}", "… looks like an access token…"),
    ("+nothing={hub}", "… looks like an access token…"),
    ("{hub}=1", "… looks like an access token…"),
    ("~{hub}", "… looks like an access token…"),
    ('"wandb.project=\'{hub}"', f"…: {NOT_AN_OVERRIDE}"),
    ("hydra.{hub}=1", "… looks like an access token…"),
    ("--config-dir {hub}", "--config-dir …: no such folder"),
    ("--config-name {hub}",),
]


@dataclass(frozen=True)
class Outcome:
    """How a request ended: an exit code, or the exception that escaped. `loaded` has those of the
    heavy packages that were asked for."""

    code: int | str
    stdout: str
    stderr: str
    loaded: list[str]

    @property
    def said(self) -> list[str]:
        """The lines on stderr, less the program's name."""
        return [line.removeprefix("forgelm: ") for line in self.stderr.splitlines()]


Outcomes = dict[str, Outcome]
RIGHT = "max_steps=1 wandb.mode=disabled"


def with_range(request: str) -> str:
    """The request of a `RANGES` row: a key of a mode's needs that mode."""
    section, _, key = request.partition("=")[0].partition(".")
    if section != "mode":
        return request
    return f"mode=kd {request}" if key in vars(KdConfig()) else f"{RL} {request}"


def with_token(request: str) -> str:
    return request.format(**TOKENS)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """What came of every request, and of one that nothing is wrong with."""
    folder = tmp_path_factory.mktemp("requests")
    for name, content in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    requests = [line for line, *_ in REQUESTS]
    requests += [with_range(line) for line, _ in RANGES]
    requests += [with_token(line) for line, *_ in SECRETS]
    requests.append(RIGHT)
    halves = requests[::2], requests[1::2]
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(lambda half: ask(half, folder), halves))
    return found[0] | found[1]


def ask(requests: list[str], folder: Path) -> Outcomes:
    """Make requests one after the other, in one process."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD],
        input=json.dumps([shlex.split(line) for line in requests]),
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = [Outcome(*fields) for fields in json.loads(done.stdout)]
    return dict(zip(requests, found, strict=True))


def matches(pattern: str, line: str) -> bool:
    """Whether a line is the pattern, in which `…` stands for anything."""
    return re.fullmatch(".*".join(map(re.escape, pattern.split("…"))), line) is not None


def assert_refused(outcome: Outcome) -> None:
    assert outcome.code == 1, outcome
    assert outcome.loaded == []
    assert outcome.stdout == ""
    assert outcome.stderr
    assert all(line.startswith("forgelm: ") for line in outcome.stderr.splitlines())
    assert "Traceback" not in outcome.stderr
    assert len(set(outcome.said)) == len(outcome.said), "a problem is said once"


@pytest.mark.parametrize(
    ("request_line", "expected"),
    [pytest.param(line, said, id=line) for line, *said in REQUESTS],
)
def test_a_wrong_request_is_refused(
    outcomes: Outcomes, request_line: str, expected: list[str]
) -> None:
    outcome = outcomes[request_line]
    assert_refused(outcome)
    assert len(outcome.said) == len(expected), outcome.stderr
    for pattern, line in zip(expected, outcome.said, strict=True):
        assert matches(pattern, line), f"{line!r} isn't {pattern!r}"


@pytest.mark.parametrize(("request_line", "allowed"), RANGES)
def test_a_value_out_of_range_is_refused(
    outcomes: Outcomes, request_line: str, allowed: str
) -> None:
    outcome = outcomes[with_range(request_line)]
    assert_refused(outcome)
    said = [line for line in outcome.said if "is only read with eval.lm_eval.tasks" not in line]
    assert said == [f"{request_line.split()[-1]}: {allowed}"]


def test_every_range_has_a_request() -> None:
    bounds = {"min", "max", "above", "below"}
    nodes = [*leaves(RunConfig())]
    nodes += [leaf for mode in MODES.values() for leaf in leaves(mode(), "mode.")]
    ranged = {key for key, _, metadata in nodes if bounds & set(metadata)}
    tried = {line.split()[-1].partition("=")[0] for line, _ in RANGES}
    assert ranged - RANGED_ELSEWHERE == tried


@pytest.mark.parametrize(
    ("request_line", "expected"),
    [pytest.param(line, said, id=line) for line, *said in SECRETS],
)
def test_a_token_is_refused_and_never_echoed(
    outcomes: Outcomes, request_line: str, expected: list[str]
) -> None:
    outcome = outcomes[with_token(request_line)]
    assert_refused(outcome)
    assert not any(token in outcome.stderr for token in TOKENS.values())
    for pattern in expected:
        assert any(matches(pattern, line) for line in outcome.said), outcome.stderr


def test_a_right_request_goes_on(outcomes: Outcomes) -> None:
    """And the imports that no wrong request reaches are really watched."""
    assert outcomes[RIGHT].loaded
