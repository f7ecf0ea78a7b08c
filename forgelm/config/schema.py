"""The config of a run, as dataclasses: every key a user may type, its type, range and meaning.

`option` carries what the type can't say: the range a number must lie in, and whether the value
decides the result (what doesn't is left out of the run's identity, see `identity.py`).
Nothing here imports torch or transformers: requests are checked before those are.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from omegaconf import MISSING


class NamedEnum(StrEnum):
    """An enum that is typed by its members' names, as OmegaConf reads them."""


class Problem(NamedEnum):
    classification = "classification"
    regression = "regression"


class Kind(NamedEnum):
    """What a row is and what a model makes of it."""

    text_classification = "text_classification"
    causal_lm = "causal_lm"
    seq2seq = "seq2seq"
    image_to_text = "image_to_text"


class TeacherKind(NamedEnum):
    auto = "auto"
    none = "none"
    run = "run"
    path = "path"


class TeacherDtype(NamedEnum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Dtype(NamedEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class LoraBias(NamedEnum):
    none = "none"
    all = "all"
    lora_only = "lora_only"


class DistillationLoss(NamedEnum):
    auto = "auto"
    kl = "kl"
    reverse_kl = "reverse_kl"
    jsd = "jsd"
    mse = "mse"


class Schedule(NamedEnum):
    linear = "linear"
    cosine = "cosine"
    cosine_with_restarts = "cosine_with_restarts"
    polynomial = "polynomial"
    constant = "constant"
    constant_with_warmup = "constant_with_warmup"
    inverse_sqrt = "inverse_sqrt"


class Optimizer(NamedEnum):
    adamw_torch = "adamw_torch"
    adamw_torch_fused = "adamw_torch_fused"
    adafactor = "adafactor"
    sgd = "sgd"


class Sampling(NamedEnum):
    random = "random"
    sequential = "sequential"
    group_by_length = "group_by_length"


class Interval(NamedEnum):
    no = "no"
    steps = "steps"
    epoch = "epoch"


class SaveInterval(NamedEnum):
    no = "no"
    steps = "steps"
    epoch = "epoch"
    minutes = "minutes"
    auto = "auto"


class GrpoLoss(NamedEnum):
    grpo = "grpo"
    dr_grpo = "dr_grpo"
    dapo = "dapo"
    bnpo = "bnpo"
    cispo = "cispo"
    sapo = "sapo"
    luspo = "luspo"
    vespo = "vespo"


class RewardScale(NamedEnum):
    group = "group"
    batch = "batch"
    none = "none"


class Aggregation(NamedEnum):
    sum_then_normalize = "sum_then_normalize"
    normalize_then_sum = "normalize_then_sum"


class ImportanceLevel(NamedEnum):
    token = "token"
    sequence = "sequence"


class VllmMode(NamedEnum):
    server = "server"
    colocate = "colocate"


class WandbMode(NamedEnum):
    online = "online"
    offline = "offline"
    disabled = "disabled"


def option(
    default: Any,
    *,
    min: float | None = None,
    max: float | None = None,
    above: float | None = None,
    below: float | None = None,
    decides: bool = True,
) -> Any:
    """A config key with a range (`min`, `max` inclusive; `above`, `below` exclusive).

    `decides=False`: the value doesn't decide what the run computes.
    """
    bounds = {"min": min, "max": max, "above": above, "below": below}
    metadata: dict[str, Any] = {k: v for k, v in bounds.items() if v is not None}
    return field(default=default, metadata={**metadata, "decides": decides})


@dataclass
class TaskConfig:
    """What is learnt: rows, from exactly one of `embedded`, `dataset`, `train_file`."""

    name: str = MISSING
    """First folder below `output_root`."""
    kind: Kind = Kind.text_classification
    """Labels for texts; text that goes on (causal_lm) or answers (seq2seq); text in images."""
    embedded: str | None = None
    """Name of a task whose data forgelm makes itself."""
    dataset: str | None = None
    """A data-set id on the hub, or a local folder that `datasets.load_dataset` reads."""
    dataset_config: str | None = None
    revision: str = "main"
    """Branch, tag or commit of `dataset`; the commit is pinned when first resolved."""
    train_file: str | None = None
    """Own rows: a .csv, .tsv, .json, .jsonl or .parquet file."""
    validation_file: str | None = None
    train_split: str = "train"
    validation_splits: list[str] = field(default_factory=lambda: ["validation"])
    """Evaluated in this order; the first one decides which checkpoint is the best."""
    text_column: str = "text"
    """A text to classify, a plain text to learn, or the text in an image."""
    text_pair_column: str | None = None
    label_column: str = "label"
    prompt_column: str | None = None
    completion_column: str | None = None
    messages_column: str | None = None
    """For causal_lm, what a row holds: a prompt and its completion, or chat messages (a list of
    `{role, content}`), else a text. All null: by the columns that are there, under the names
    messages, prompt and completion, text."""
    as_chat: bool = False
    """Put prompt and completion into the model's chat template, as a user's and its answer."""
    system_prompt: str | None = None
    """First message of each chat that has no system message of its own."""
    packing: bool = False
    """Put several rows into one sequence of max_length tokens, none of which sees the others."""
    max_new_tokens: int = option(64, min=1)
    """Tokens generated at most where an evaluation needs the model's answer."""
    answer_pattern: str | None = None
    """Regular expression that finds the answer in a text, its first group if it has one; the last
    match counts. Null: all of the text."""
    image_column: str = "image"
    instruction: str = "Read the text in the image."
    """What the user's turn says beside the image, for models that chat."""
    augmentation: float = option(0.0, min=0, max=1)
    """Strength of the random distortion of training images, drawn anew in each epoch."""
    problem: Problem = Problem.classification
    labels: list[str] | None = None
    """Label names in the order of their numbers. Null: as the data set declares them, else the
    distinct values found in the training rows, sorted."""
    metrics: list[str] = field(default_factory=lambda: ["accuracy"])
    """The first is the task's own: it picks the best checkpoint and closes the gap."""
    greater_is_better: bool = True
    """Of the first metric."""
    max_length: int = option(128, min=4)
    """Tokens; what is longer is truncated, the longer text of a pair first. For image_to_text, of
    the text alone."""
    streaming: bool = False
    """Read the training rows as they are needed, in their order, instead of all beforehand. Needs
    max_steps, and the labels given or declared by the data set."""
    token_dropout: float = option(0.0, min=0, below=1)
    """Share of a training row's tokens that the mask token replaces, drawn anew in each epoch."""
    max_train_samples: int | None = option(None, min=1)
    max_eval_samples: int | None = option(None, min=1)
    """A fixed part of the rows, the same for every seed."""
    teacher: str | None = None
    """Published model that `teacher=auto` takes."""
    teacher_revision: str = "main"
    teacher_experiment: str | None = None
    """Experiment that `teacher=auto` trains once, for tasks without a published model."""


@dataclass
class TinyConfig:
    """A small model of the task's kind with fresh weights, built when `model.path` is null."""

    hidden_size: int = option(64, min=1)
    num_hidden_layers: int = option(2, min=1)
    num_attention_heads: int = option(2, min=1)
    intermediate_size: int = option(256, min=1)
    dropout: float = option(0.1, min=0, below=1)
    initializer_range: float = option(0.02, above=0)
    """Standard deviation of the fresh weights. Small models learn sooner with more than BERT's."""


@dataclass
class LoraSection:
    """Low-rank adapters: names and meanings are those of peft's LoraConfig."""

    enabled: bool = False
    r: int = option(16, min=1)
    lora_alpha: int = option(32, min=1)
    lora_dropout: float = option(0.0, min=0, below=1)
    target_modules: list[str] | None = None
    """Null: peft's choice for the architecture, else every linear layer but the head, which is
    what [all-linear] asks for too."""
    modules_to_save: list[str] | None = None
    bias: LoraBias = LoraBias.none
    use_dora: bool = False
    use_rslora: bool = False
    merge: bool = option(False, decides=False)
    """Leave the whole model too, in `merged/`."""


@dataclass
class ModelConfig:
    """The student."""

    name: str = MISSING
    """Second folder below `output_root`."""
    path: str | None = MISSING
    """Hub id, local folder or run directory, an adapter's too; null builds `tiny`."""
    revision: str = "main"
    base: str | None = None
    """For an adapter: where its base is, if not where the adapter says."""
    suits: list[Kind] | None = None
    """Kinds of task that the model can be used for; null: not known."""
    trust_remote_code: bool = False
    dtype: Dtype = Dtype.float32
    """Of the weights. What is trained should be float32; a frozen base need not."""
    load_in_4bit: bool = False
    """The frozen base in 4 bits (NF4), for adapters; needs CUDA and the extra `quant`."""
    lora: LoraSection = field(default_factory=LoraSection)
    tiny: TinyConfig = field(default_factory=TinyConfig)


@dataclass
class TeacherConfig:
    """Whom the student learns from. Without a use for one (sft, or alpha 0) none is loaded."""

    kind: TeacherKind = TeacherKind.auto
    path: str | None = None
    """For `path`: hub id or local folder."""
    revision: str = "main"
    run: str | None = option(None, decides=False)
    """For `run`: the directory of a complete run of the same task."""
    run_hash: str | None = None
    """Config hash of `run`, filled in when the request is resolved: where the teacher lies doesn't
    decide the result, which teacher it is does."""
    dtype: TeacherDtype = TeacherDtype.auto
    """auto: bfloat16 where the device has it natively, else float32."""
    trust_remote_code: bool = False


@dataclass
class SftConfig:
    """Cross-entropy (mean squared error for regression) on the labels."""

    name: str = "sft"


@dataclass
class KdConfig:
    """`(1 - alpha) * CE + alpha * T^2 * divergence(teacher, student)`, Hinton et al. 2015."""

    name: str = "kd"
    alpha: float = option(0.9, min=0, max=1)
    """Weight of the teacher; the labels get the rest, a small part as Hinton et al. advise."""
    temperature: float = option(1.0, above=0)
    loss: DistillationLoss = DistillationLoss.auto
    """auto: kl where there are probabilities, mse on the raw outputs for regression."""
    beta: float = option(0.5, above=0, below=1)
    """For jsd: the teacher's part of the mixture that both are compared with."""


@dataclass
class RlConfig:
    """GRPO on the task's prompts. Names and meanings are those of trl's GRPOConfig, but for the
    keys of rewards."""

    name: str = "rl"
    rewards: list[str] = field(default_factory=lambda: ["exact_match"])
    """By name: exact_match, contains, numeric, format, length, and those of other packages."""
    reward_weights: list[float] | None = None
    """One for each reward; null: 1 each."""
    format_pattern: str | None = None
    """For the reward `format`: what a completion must match from its start to its end."""
    length_target: int = option(64, min=1)
    """For the reward `length`: tokens of a completion that cost nothing."""
    multi_objective_aggregation: Aggregation = Aggregation.sum_then_normalize
    scale_rewards: RewardScale = RewardScale.group
    num_generations: int = option(8, min=2)
    """Completions of each prompt, which are compared with each other."""
    steps_per_generation: int | None = option(None, min=1)
    """Micro-batches that share what is generated at once; null: gradient_accumulation_steps."""
    num_iterations: int = option(1, min=1)
    """How often what was generated is trained on."""
    max_completion_length: int = option(64, min=1)
    temperature: float = option(1.0, above=0)
    top_p: float = option(1.0, above=0, max=1)
    top_k: int = option(0, min=0)
    min_p: float | None = option(None, min=0, max=1)
    repetition_penalty: float = option(1.0, above=0)
    mask_truncated_completions: bool = False
    disable_dropout: bool = False
    beta: float = option(0.0, min=0)
    """Weight of the KL to the reference, the model as it starts; 0 needs no copy of it."""
    use_bias_correction_kl: bool = True
    sync_ref_model: bool = False
    """Let the reference follow the model: every ref_model_sync_steps by ref_model_mixup_alpha."""
    ref_model_sync_steps: int = option(512, min=1)
    ref_model_mixup_alpha: float = option(0.6, above=0, max=1)
    loss_type: GrpoLoss = GrpoLoss.dapo
    importance_sampling_level: ImportanceLevel = ImportanceLevel.token
    epsilon: float = option(0.2, above=0)
    epsilon_high: float | None = option(None, above=0)
    delta: float | None = option(None, above=0)
    off_policy_mask_threshold: float | None = option(None, above=0)
    top_entropy_quantile: float = option(1.0, min=0, max=1)
    entropy_coef: float = option(0.0, min=0)
    use_adaptive_entropy: bool = False
    entropy_coef_min: float = option(0.0, min=0)
    entropy_coef_max: float = option(1.0, min=0)
    entropy_coef_delta: float = option(0.005, above=0)
    entropy_target: float = option(0.2, min=0)
    use_vllm: bool = False
    """Generate with vLLM. Its samples are its own: a resumed run isn't the same to the byte."""
    vllm_mode: VllmMode = VllmMode.colocate
    vllm_server_base_url: str | None = option(None, decides=False)
    vllm_server_timeout: float = option(240.0, above=0, decides=False)
    vllm_gpu_memory_utilization: float = option(0.3, above=0, max=1, decides=False)
    vllm_max_model_length: int | None = option(None, min=1, decides=False)
    vllm_tensor_parallel_size: int = option(1, min=1, decides=False)
    vllm_enable_sleep_mode: bool = option(False, decides=False)
    vllm_importance_sampling_correction: bool = True
    samples_per_log: int = option(4, min=0, decides=False)
    """Completions kept in `samples.jsonl` at each logged step."""


@dataclass
class FsdpConfig:
    """How weights are sharded: keys of the `fsdp_config` of Hugging Face's TrainingArguments."""

    transformer_layer_cls_to_wrap: list[str] | None = None
    """Classes of the layers that are put together one at a time; null: as the model names them."""
    reshard_after_forward: bool = True
    """Let go of a layer's weights between forward and backward pass: less memory, more traffic."""


@dataclass
class TrainingConfig:
    """Names and meanings are those of Hugging Face's TrainingArguments."""

    per_device_train_batch_size: int = option(32, min=1)
    per_device_eval_batch_size: int = option(64, min=1)
    gradient_accumulation_steps: int = option(1, min=1)
    learning_rate: float = option(5e-5, above=0)
    lr_scheduler_type: Schedule = Schedule.linear
    warmup_steps: float = option(0.0, min=0)
    """Steps; below 1 a share of all steps."""
    optim: Optimizer = Optimizer.adamw_torch
    weight_decay: float = option(0.0, min=0)
    adam_beta1: float = option(0.9, min=0, below=1)
    adam_beta2: float = option(0.999, min=0, below=1)
    adam_epsilon: float = option(1e-8, above=0)
    max_grad_norm: float = option(1.0, min=0)
    """0 turns clipping off."""
    bf16: bool | None = None
    """Null: on where the device has bfloat16 natively and fp16 is off."""
    fp16: bool = False
    use_cpu: bool = False
    full_determinism: bool = False
    activation_checkpointing: bool = False
    fsdp: bool = False
    """Shard weights, gradients and optimizer over the ranks (FSDP2), which then also write the
    checkpoints together."""
    fsdp_config: FsdpConfig = field(default_factory=FsdpConfig)
    train_sampling_strategy: Sampling = Sampling.random
    dataloader_num_workers: int = option(0, min=0, decides=False)
    dataloader_persistent_workers: bool = option(False, decides=False)
    dataloader_drop_last: bool = False
    eval_strategy: Interval = Interval.epoch
    eval_steps: int | None = option(None, min=1)
    load_best_model_at_end: bool = False
    """End with the weights of the best evaluation instead of the last step's."""
    early_stopping_patience: int | None = option(None, min=1)
    """Stop after this many evaluations in a row without a new best."""
    early_stopping_threshold: float = option(0.0, min=0)
    """By how much a new best must be better to count."""
    logging_steps: int = option(20, min=1, decides=False)
    logging_first_step: bool = option(False, decides=False)
    save_strategy: SaveInterval | None = option(None, decides=False)
    """Null: steps where save_steps is given, minutes where save_minutes is, else auto: as often as
    save_overhead allows by what saving was measured to cost. A stop and the last step always save;
    with no, nothing else does."""
    save_steps: int | None = option(None, min=1, decides=False)
    save_minutes: float | None = option(None, above=0, decides=False)
    save_overhead: float = option(0.02, above=0, max=1, decides=False)
    """Share of the time that saving may take, for auto."""
    save_in_background: bool = option(True, decides=False)
    """Copy the state to memory and write it while training goes on; needs that memory once more."""
    record_batches: bool = option(False, decides=False)
    """Write a hash of what each step was trained on to `batches-RANK.jsonl`."""
    save_total_limit: int | None = option(2, min=1, decides=False)
    """Checkpoints kept; the best and the latest always are."""


@dataclass
class LmEvalConfig:
    """Tasks of the lm-evaluation-harness, on the student before and after training."""

    tasks: list[str] = field(default_factory=list)
    include_path: str | None = None
    """Folder with own task definitions."""
    limit: float | None = option(None, above=0)
    """Examples of each task; below 1 a share of them."""
    num_fewshot: int | None = option(None, min=0)
    batch_size: int = option(8, min=1)


@dataclass
class EvalConfig:
    before_training: bool = option(True, decides=False)
    """Evaluate the student as it starts, and the teacher."""
    lm_eval: LmEvalConfig = field(default_factory=LmEvalConfig)


@dataclass
class LaunchConfig:
    """How many processes train together, each with a part of every batch, and for how long."""

    nodes: int = option(1, min=1)
    ranks_per_node: int = option(1, min=1)
    """Processes on each machine: one a GPU, or any number on CPU."""
    wait: bool = False
    """Submitted runs: wait for their end, with a view of where each stands."""
    max_restarts: int = option(1000, min=0)
    """How often one Slurm job may be requeued."""
    max_idle_restarts: int = option(5, min=1)
    """How many starts in a row of one Slurm job may end without having gained anything."""

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node


@dataclass
class WandbConfig:
    mode: WandbMode = WandbMode.offline
    project: str = "forgelm"
    entity: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)


@dataclass
class RunConfig:
    """One run. Groups: task, model, teacher, mode; sections: training, eval, launch, wandb."""

    task: TaskConfig = field(default_factory=TaskConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    mode: Any = MISSING
    """SftConfig, KdConfig, RlConfig, or another package's."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig, metadata={"decides": False})
    wandb: WandbConfig = field(default_factory=WandbConfig, metadata={"decides": False})
    max_steps: int | None = option(None, min=1)
    """Optimizer steps; when set, overrides `epochs`."""
    epochs: float = option(3.0, above=0)
    seed: int = option(42, min=0, max=2**32 - 1)
    run_name: str | None = option(None, decides=False)
    """Last folder of the run directory; null: the config's hash."""
    output_root: str = option("outputs", decides=False)
    resume: str | None = option(None, decides=False)
    """Go on with this run (a directory) from its sealed config."""
    debug: bool = option(False, decides=False)
    """Show tracebacks and debug messages."""


MODES: dict[str, type] = {"sft": SftConfig, "kd": KdConfig, "rl": RlConfig}
