"""Every setting: type, default, rule and meaning. Those of the adapter are in `adapter.py`."""

import dataclasses
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from lora_jax.config.adapter import AdapterConfig
from lora_jax.config.objective import OBJECTIVES, ObjectiveConfig
from lora_jax.config.options import LARGEST_SEED, encoding_keys, option, options_of, section
from lora_jax.errors import UserError

PRINTS = ("base", "tokenizer", "template", "data", "held_out")  # parts of a run's fingerprint
LOSSES = ("task_loss", "regression_loss")  # metrics of an evaluation that are better if lower
TRACKERS = ("tensorboard", "wandb", "trackio")
_ROWS, _MANY_STEPS, _SECONDS = 10**6, 10**9, 10**7  # more is a slip of the hand
_VIRTUAL_TOKENS = 20
_SFT = ("sft",)
_STEPS = 100


@dataclass(frozen=True)
class DataConfig:
    """The rows that a run trains on and is measured on, and how they become tokens."""

    # what is trained on: a source, or several with their weights, {source: weight, ..}. A source is
    # a file, a directory, a pattern or org/name on the hub: docs/data.md
    train: str | dict[str, float] | None = option(None, resumable=True, changes_encoding=False)
    # held-out rows of the task; loss and metrics are measured on them before and after
    eval: str | None = option(None, is_path=True, changes_encoding=False)
    # instead of `eval`: rows held out of `train`, a share below 1 or a number of them
    eval_size: float | None = option(None, above=0, changes_encoding=False)
    # general text, without the system prompt; its loss shows what the task costs the model
    regression: str | None = option(None, is_path=True, changes_encoding=False)
    # general text among the rows of training, so that the model forgets less: it is learned like
    # the task or, with objective.base_kl, keeps the model close to the base
    replay: str | None = option(None, is_path=True, changes_encoding=False)
    # share of the rows of a step that are replay
    replay_share: float = option(0.25, above=0, below=1, changes_encoding=False)
    # leave out held-out rows that are in `train` too
    drop_overlap: bool = option(False, changes_encoding=False)
    # the user turn made from columns of a row, "{question}"; null: as the row says
    prompt: str | None = option(None, changes_encoding=True)
    # the assistant turn made from columns of a row, "{answer}"; null: as the row says
    completion: str | None = option(None, changes_encoding=True)
    # to classify: the columns with the text or the pair of texts; null: found by their names
    text: list[str] | None = option(None, changes_encoding=True)
    # to classify: the column with the label
    label: str = option("label", changes_encoding=True)
    # to classify: all labels in their order; null: those of `train`
    labels: list[str] | None = option(None, changes_encoding=True)
    # columns that are not used; a column that is neither known nor listed here is an error
    ignore_columns: list[str] = option([], changes_encoding=True)
    # system turn of rows that have none of their own; give the same one at inference
    system_prompt: str | None = option(None, changes_encoding=True)
    # null: the template of the tokenizer. A Jinja file. none: prompt and completion as plain text,
    # for base models without a template
    chat_template: str | None = option(None, is_path=True, resumable=True, changes_encoding=True)
    # arguments of the chat template, such as {enable_thinking: false}
    chat_template_kwargs: dict[str, Any] = option({}, changes_encoding=True)
    # date that templates are given as today's, YYYY-MM-DD; null: the day on which the run starts
    template_date: str | None = option(None, changes_encoding=True)
    # tokens of a row of the batch, and the most that one example can have
    max_length: int = option(512, at_least=2, at_most=10**7, changes_encoding=True)
    # examples above max_length: cut them, drop and count them, or fail
    too_long: str = option("truncate", choices=("truncate", "drop", "error"), changes_encoding=True)
    # put several examples into a row, each with its own attention and positions; false gives the
    # same gradients, slower
    packing: bool = option(True, changes_encoding=False)
    # compute the start that texts of a row share once, with the same gradients. auto: the prompt of
    # two answers; true: also a system prompt or examples that many rows begin with, which puts more
    # of them into a row
    share_prompts: bool | str = option(
        "auto", choices=("auto", True, False), changes_encoding=False
    )
    # draw a new order for every epoch, from `seed`
    shuffle: bool = option(True, changes_encoding=False)
    # read `train` while it is needed, for data that do not fit into memory
    streaming: bool = option(False, changes_encoding=False)
    # streaming: rows that are shuffled and packed together
    stream_rows: int = option(4096, at_least=1, at_most=10**8, changes_encoding=False)
    # rows that cannot be used: fail at the first ones, or drop and count them
    on_bad_row: str = option("error", choices=("error", "drop"), changes_encoding=True)
    # keep tokenised examples in LORA_JAX_CACHE for the next run
    cache: bool = option(True, resumable=True, changes_encoding=False)


ENCODING_KEYS = encoding_keys(DataConfig)  # settings of `data` in the key of cached tokens


@dataclass(frozen=True)
class TrainConfig:
    """The objective, the optimizer, the length of the run, its checkpoints and its memory."""

    # what is minimised. sft: the cross-entropy of the answers. dpo, ipo, orpo, simpo: rows have a
    # chosen and a rejected answer. kto: rows have an answer and a label, true or false
    objective: str = option("sft", choices=OBJECTIVES)
    # optimizer steps; null: as many as `epochs` take, or 100
    steps: int | None = option(None, at_least=1, at_most=_MANY_STEPS)
    # instead of `steps`: passes over all rows, such as 0.5 or 3
    epochs: float | None = option(None, above=0, at_most=10**6)
    # rows of a step over all devices and micro-batches; with packing, packed rows
    batch_size: int = option(8, at_least=1, at_most=_ROWS)
    # rows of a forward pass; null: all rows. Lower it if memory runs out: gradients are the same
    micro_batch_size: int | None = option(None, at_least=1, at_most=_ROWS)
    # peak learning rate; about ten times that of full fine-tuning suits LoRA, and virtual tokens
    # want 0.003 to 0.3
    learning_rate: float = option(1e-3, above=0)
    # learning rate after the warm-up: constant, or down to final_rate in a line or half a cosine
    schedule: str = option("linear", choices=("constant", "linear", "cosine"))
    # steps in which the learning rate rises from zero; raise it if the run diverges early
    warmup_steps: int = option(0, at_least=0, at_most=_MANY_STEPS)
    # last learning rate of linear and cosine, as a fraction of learning_rate
    final_rate: float = option(0.0, at_least=0, at_most=1)
    # AdamW's weight decay, on all that trains
    weight_decay: float = option(0.0, at_least=0)
    # AdamW's decay of the mean of gradients
    beta1: float = option(0.9, at_least=0, below=1)
    # AdamW's decay of the mean of squared gradients
    beta2: float = option(0.999, at_least=0, below=1)
    # AdamW's epsilon, added to the root of that mean
    epsilon: float = option(1e-8, at_least=0)
    # share of the target that all tokens get alike, in training only; 0.1 is usual
    label_smoothing: float = option(0.0, at_least=0, below=1, objectives=_SFT)
    # weight of the squared logarithm of the softmax's denominator, which keeps logits small; 1e-4
    # is usual (arXiv 2204.02311)
    z_loss: float = option(0.0, at_least=0, objectives=_SFT)
    # largest global norm of the gradients of all trainable leaves; null: no clipping
    grad_clip: float | None = option(1.0, above=0)
    # steps between held-out losses; null: only before and after the run
    eval_every: int | None = option(None, at_least=1, at_most=_MANY_STEPS, resumable=True)
    # steps between checkpoints; null: a tenth of all steps
    save_every: int | None = option(None, at_least=1, at_most=_MANY_STEPS, resumable=True)
    # latest checkpoints that are kept, in addition to the best one; null: all
    save_total_limit: int | None = option(2, at_least=1, at_most=_MANY_STEPS, resumable=True)
    # evaluations without a better metric after which the run ends; null: it never ends early
    early_stopping_patience: int | None = option(
        None, at_least=1, at_most=_MANY_STEPS, resumable=True
    )
    # export the adapters of the best evaluation instead of those of the last step
    load_best_model_at_end: bool = option(False, resumable=True)
    # the metric of the two settings above: task_loss, regression_loss or one of eval.metrics; of
    # objectives that compare answers also task_accuracy and task_margin
    metric_for_best_model: str = option("task_loss")
    # end the run when its loss is so many times the lowest so far; null: never
    divergence: float | None = option(3.0, above=1, hint="null never stops", resumable=True)
    # memory that holds AdamW's moments between steps: host saves that of the device, and costs time
    optimizer_memory: str = option("device", choices=("device", "host"))
    # steps between lines of metrics.jsonl; each line is a mean over its steps
    log_every: int = option(1, at_least=1, at_most=_MANY_STEPS, resumable=True)
    # trackers that get the metrics too
    report_to: list[str] = option(
        [], choices=TRACKERS, hint="[] reports to none of them.", resumable=True
    )
    # dtype of activations; bfloat16 is faster on GPUs and TPUs. Adapters stay float32
    compute_dtype: str = option("float32", choices=("float32", "bfloat16"))
    # activations that are recomputed in the backward pass, from none of them to all (full).
    # offload moves what is kept to the host. Each needs less memory and more time than the last
    remat: str = option("full", choices=("none", "dots", "full", "offload"), resumable=True)
    # how attention is computed; auto takes cudnn on NVIDIA GPUs and splash on TPUs where they can
    # compute the model, and xla elsewhere: docs/devices.md
    attention: str = option("auto", choices=("auto", "xla", "cudnn", "splash"), resumable=True)
    # tokens whose logits are in memory at once; lower it for large vocabularies
    loss_chunk: int = option(1024, at_least=1, at_most=10**8, resumable=True)
    # weight of the load-balancing loss, for mixtures of experts
    router_aux_loss_coef: float = option(0.0, at_least=0)

    def __post_init__(self):
        if self.steps is None and self.epochs is None:
            object.__setattr__(self, "steps", _STEPS)

    @property
    def compares_answers(self) -> bool:
        """True if rows have two answers, or an answer with a label."""
        return self.objective != "sft"

    @property
    def metrics_without_answers(self) -> tuple[str, ...]:
        """Names of the metrics of an evaluation that need no generated answers."""
        return LOSSES + (("task_accuracy", "task_margin") if self.compares_answers else ())

    @property
    def needs_reference(self) -> bool:
        """True if the objective compares with the log-probabilities of a reference model."""
        return self.objective in options_of(ObjectiveConfig)["reference"].objectives

    @property
    def total_steps(self) -> int:
        """Steps of the run; those of `epochs` are known once the data are read and packed."""
        if self.steps is None:
            raise RuntimeError(f"train.epochs={self.epochs} is not settled: read the data first")
        return self.steps


@dataclass(frozen=True)
class EvalConfig:
    """Measurements on held-out rows, before, during and after the run."""

    # measure the base (or the adapter of adapter.path) before the first step; in lora-jax eval,
    # measure the base too
    before: bool = option(True, resumable=True)
    # keep the scores of the base in LORA_JAX_CACHE for the next run
    cache: bool = option(True, resumable=True)
    # rows of a batch of held-out losses
    batch_size: int = option(16, at_least=1, at_most=_ROWS, resumable=True)
    # examples of each held-out set whose loss is measured, spread over the set; null: all
    loss_examples: int | None = option(None, at_least=1, at_most=10**9)
    # generate answers to the prompts of data.eval, greedily, and score them by `metrics`
    generate: bool = option(True)
    # metrics of generated answers: exact_match, slot_f1, bleu, rouge_l
    metrics: list[str] = option(["exact_match"])
    # score answers without the thoughts before them
    strip_thoughts: bool = option(True)
    # rows of data.eval that are answered; null: all. Lower it if evaluation takes too long
    generate_examples: int | None = option(None, at_least=1, at_most=10**9)
    # steps between answers during training, a multiple of train.eval_every; null: only before and
    # after
    generate_every: int | None = option(None, at_least=1, at_most=_MANY_STEPS, resumable=True)
    # prompts that are answered at once
    generate_batch_size: int = option(64, at_least=1, at_most=_ROWS, resumable=True)
    # most tokens of an answer
    max_new_tokens: int = option(200, at_least=1, at_most=10**7)
    # answers that are printed at the end
    samples: int = option(3, at_least=0, at_most=10**9, resumable=True)


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh; their product is the number of devices."""

    # copies of the model; -1: all devices that the other axes leave
    data: int = option(-1, at_least=-1, at_most=_ROWS)
    # devices that share the weights and the batch; raise it if the model does not fit
    fsdp: int = option(1, at_least=-1, at_most=_ROWS)
    # devices that share heads and hidden features; needs a fast network between them
    tensor: int = option(1, at_least=-1, at_most=_ROWS)


@dataclass(frozen=True)
class HostsConfig:
    """Time limits between the hosts of a run."""

    # seconds in which all processes of a run must have met
    start_timeout: int = option(300, at_least=1, at_most=_SECONDS)
    # seconds without a message after which a host counts as lost, and all hosts end
    lost_after: int = option(30, at_least=5, at_most=_SECONDS)


@dataclass(frozen=True)
class ExportConfig:
    """Files that a run writes at its end for other tools."""

    # write OUTPUT/adapter, a PEFT adapter directory
    peft: bool = option(True)
    # write OUTPUT/merged, a Hugging Face model directory; adapter.method=full always does
    merged: bool = option(False)
    # dtype of merged weights; null: that of the base
    dtype: str | None = option(None, choices=("float32", "bfloat16", "float16"))
    # weights that int8 and nf4 runs merge into: those of the files (original), or the ones that
    # were trained with (dequantized)
    quantized_base: str | None = option(None, choices=("original", "dequantized"))
    # size of each merged safetensors file
    max_shard_size: str = option("5GB")
    # refuse a merge in which the update of any module, as rounded, has a lower cosine to the
    # trained one; try 0.99 for bfloat16
    min_merge_cosine: float | None = option(None, above=0, at_most=1)
    # refuse a merge that changes the model's predictions by more, in nats per token
    max_merge_kl: float | None = option(None, above=0)
    # held-out rows, or else training rows, for max_merge_kl; 0: it is not measured
    probe_rows: int = option(8, at_least=0, at_most=_ROWS)


@dataclass(frozen=True)
class Config:
    """All settings of a run."""

    # a Hugging Face directory, a .gguf file, org/name on the hub, or demo:NAME
    model: str = option("", is_path=True, resumable=True)
    # directory of the run; must be empty or absent, unless resume is set
    output_dir: str = option("runs/default", is_path=True, resumable=True)
    # directory of the checkpoints, or gs://bucket/path; null: in output_dir
    checkpoint_dir: str | None = option(None, is_path=True, resumable=True)
    # true: go on from the last checkpoint. auto: do so if there is one, for jobs that are restarted
    resume: bool | str = option(False, choices=(False, True, "auto"), resumable=True)
    # settings, or parts of the fingerprint (base, tokenizer, template, data, held_out), that may
    # differ from the checkpoint or from adapter.path
    allow_change: list[str] = option([], resumable=True)
    # seed of the adapter's init, of the data order and of dropout
    seed: int = option(0, at_least=0, at_most=LARGEST_SEED)
    # dtype of the base in memory: bfloat16 halves float32, int8 and nf4 quantise; null: as in files
    base_dtype: str | None = option(None, choices=("float32", "bfloat16", "int8", "nf4"))
    # fields of config.json that are not understood, and known not to matter
    ignore_config_fields: list[str] = option([])
    adapter: AdapterConfig = section(AdapterConfig)
    data: DataConfig = section(DataConfig)
    train: TrainConfig = section(TrainConfig)
    objective: ObjectiveConfig = section(ObjectiveConfig)
    eval: EvalConfig = section(EvalConfig)
    mesh: MeshConfig = section(MeshConfig, resumable=True)
    hosts: HostsConfig = section(HostsConfig, resumable=True)
    export: ExportConfig = section(ExportConfig, resumable=True)


def virtual_tokens(adapter: AdapterConfig) -> int:
    """Return the number of virtual tokens of a method that trains them.

    Raises:
        UserError: the number is that of the tokens of `prompt_text`, which is not known here.
    """
    if adapter.num_virtual_tokens is not None:
        return adapter.num_virtual_tokens
    if adapter.prompt_init == "text":
        raise UserError(
            "num_virtual_tokens is not set, and how many tokens prompt_text has is only known to a "
            "tokenizer; set it"
        )
    return _VIRTUAL_TOKENS


def all_keys(kind: type, prefix: str) -> Iterable[str]:
    """Yield the settings of a dataclass, and of sections in it, by dotted key."""
    for f in dataclasses.fields(kind):
        if dataclasses.is_dataclass(f.type):
            yield from all_keys(typing.cast(type, f.type), f"{prefix}{f.name}.")
        else:
            yield prefix + f.name
