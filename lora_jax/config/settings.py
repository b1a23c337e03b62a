"""Every setting, its default and its meaning."""

import dataclasses
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from lora_jax.config.adapter import AdapterConfig
from lora_jax.errors import UserError

# Parts of a fingerprint: what a run was made with.
PRINTS = ("base", "tokenizer", "template", "data", "held_out")
LOSSES = ("task_loss", "regression_loss")  # that an evaluation measures: less is better
_VIRTUAL_TOKENS = 20
_STEPS = 100


@dataclass(frozen=True)
class DataConfig:
    train: str | dict[str, float] | None = None  # a source, or {source: weight, ..}: docs/data.md
    eval: str | None = None  # held-out rows of the task: loss and metrics, before and after
    eval_size: float | None = None  # without `eval`: rows held out of `train`; below 1 a share
    regression: str | None = None  # general text that the task must not damage; no system prompt
    drop_overlap: bool = False  # leave held-out rows out that stand in `train` too
    prompt: str | None = None  # user turn from columns, "{question}"; null: as the row says
    completion: str | None = None  # assistant turn from columns, "{answer}"; null: as the row says
    text: list[str] | None = None  # to classify: columns of the text or pair; null: by their names
    label: str = "label"  # to classify: column of the label
    labels: list[str] | None = None  # to classify: all of them, in order; null: those of `train`
    ignore_columns: list[str] = field(default_factory=list)  # keys of rows that are not used
    system_prompt: str | None = None  # put before rows that have no system turn of their own
    chat_template: str | None = None  # null: the tokenizer's | a Jinja file | none: plain text
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)  # enable_thinking: false
    template_date: str | None = None  # YYYY-MM-DD, "today" of templates; null: when a run starts
    max_length: int = 512  # tokens per row
    too_long: str = "truncate"  # truncate | drop | error, for examples above max_length
    packing: bool = True  # several examples per row; attention and positions stay inside each
    shuffle: bool = True  # a new order every epoch, from `seed`
    streaming: bool = False  # read `train` as it is needed, never whole
    stream_rows: int = 4096  # rows that are shuffled and packed together when streaming
    on_bad_row: str = "error"  # error | drop, for rows that cannot be used; drops are counted
    cache: bool = True  # keep tokenised examples in LORA_JAX_CACHE, for the next run


@dataclass(frozen=True)
class TrainConfig:
    steps: int | None = None  # optimizer steps; null: as many as `epochs` take, or 100
    epochs: float | None = None  # instead of `steps`: times through all rows, such as 0.5 or 3
    batch_size: int = 8  # rows per step over all devices (packed rows when packing)
    micro_batch_size: int | None = None  # rows per forward; null: all. Gradients are the same
    learning_rate: float = 1e-3  # peak rate
    schedule: str = "linear"  # constant | linear | cosine, after the warm-up
    warmup_steps: int = 0  # steps of linear warm-up
    final_rate: float = 0.0  # where linear and cosine end, as a fraction of learning_rate
    weight_decay: float = 0.0  # AdamW's, on the adapters
    beta1: float = 0.9  # AdamW's
    beta2: float = 0.999  # AdamW's
    epsilon: float = 1e-8  # AdamW's
    label_smoothing: float = 0.0  # share of the target that all tokens get alike, in training only
    grad_clip: float | None = 1.0  # one global norm over all trainable leaves; null: none
    eval_every: int | None = None  # steps between held-out losses; null: only before and after
    save_every: int | None = None  # steps between checkpoints; null: a tenth of all steps
    save_total_limit: int | None = 2  # latest checkpoints kept, beside the best; null: all
    early_stopping_patience: int | None = None  # evaluations without a better metric; null: off
    load_best_model_at_end: bool = False  # export the best adapters, not those of the last step
    metric_for_best_model: str = "task_loss"  # | regression_loss | one of eval.metrics
    divergence: float | None = 3.0  # stop where the loss is so many times its best; null: never
    optimizer_memory: str = "device"  # device | host: where AdamW's moments lie between steps
    log_every: int = 1  # steps between lines of metrics.jsonl, each a mean over its steps
    report_to: list[str] = field(default_factory=list)  # tensorboard, wandb, trackio
    compute_dtype: str = "float32"  # float32 | bfloat16: activations; adapters stay float32
    remat: str = "full"  # none | dots | full | offload (to the host): less memory, more work
    attention: str = "auto"  # auto | xla | cudnn (NVIDIA GPUs) | splash (TPUs): docs/devices.md
    loss_chunk: int = 1024  # tokens whose logits stand in memory at once
    router_aux_loss_coef: float = 0.0  # weight of the loss by which experts are used alike

    def __post_init__(self):
        if self.steps is None and self.epochs is None:
            object.__setattr__(self, "steps", _STEPS)

    @property
    def total_steps(self) -> int:
        """Steps of the run. Those of `epochs` are known when the data are read and packed."""
        if self.steps is None:
            raise RuntimeError(f"train.epochs={self.epochs} is not settled: read the data first")
        return self.steps


@dataclass(frozen=True)
class EvalConfig:
    before: bool = True  # measure the base (or adapter.path) before the first step
    cache: bool = True  # keep the base's scores in LORA_JAX_CACHE, for the next run
    batch_size: int = 16  # rows per batch of held-out loss
    loss_examples: int | None = None  # of each held-out set, spread over it; null: all
    generate: bool = True  # answers to data.eval, greedy, scored by `metrics`
    metrics: list[str] = field(default_factory=lambda: ["exact_match"])  # slot_f1, bleu, rouge_l
    strip_thoughts: bool = True  # score answers without the thoughts in front of them
    generate_examples: int | None = None  # how many rows of data.eval are generated; null: all
    generate_every: int | None = None  # steps between answers, n * train.eval_every; null: none
    generate_batch_size: int = 64  # prompts generated together
    max_new_tokens: int = 200  # per generated answer
    samples: int = 3  # answers shown at the end


@dataclass(frozen=True)
class MeshConfig:
    data: int = -1  # replicas of the model; -1: the devices that are left
    fsdp: int = 1  # weights and batch split
    tensor: int = 1  # heads and hidden features split


@dataclass(frozen=True)
class HostsConfig:
    start_timeout: int = 300  # seconds until all processes of the run must have met
    lost_after: int = 30  # seconds without a sign of life after which a host is lost, and all end


@dataclass(frozen=True)
class ExportConfig:
    peft: bool = True  # OUTPUT/adapter, a PEFT adapter directory
    merged: bool = False  # OUTPUT/merged, a Hugging Face model directory; full: always
    dtype: str | None = None  # float32 | bfloat16 | float16 of merged weights; null: as the base
    quantized_base: str | None = None  # original | dequantized: what int8 and nf4 runs merge into
    max_shard_size: str = "5GB"  # of the merged safetensors files
    min_merge_cosine: float | None = None  # below it, in any module, an update does not merge
    max_merge_kl: float | None = None  # above it, in nats per token, merging fails
    probe_rows: int = 8  # held-out rows, or else training rows, for that KL; 0: it is not measured


@dataclass(frozen=True)
class Config:
    model: str = ""  # a Hugging Face directory, a .gguf file, org/name on the hub, or demo:NAME
    output_dir: str = "runs/default"  # must be empty or absent, unless resume is set
    checkpoint_dir: str | None = None  # directory or gs://bucket/path; null: in output_dir
    resume: bool | str = False  # false | true: go on from the last checkpoint | auto: if any
    allow_change: list[str] = field(default_factory=list)  # what may differ from the checkpoint
    seed: int = 0  # of the adapter's init, the data order and dropout
    base_dtype: str | None = None  # float32 | bfloat16 | int8 | nf4 of the base; null: as in files
    ignore_config_fields: list[str] = field(default_factory=list)  # harmless ones of config.json
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    hosts: HostsConfig = field(default_factory=HostsConfig)
    export: ExportConfig = field(default_factory=ExportConfig)


def virtual_tokens(adapter: AdapterConfig) -> int:
    """How many virtual tokens a method has that trains them.

    Raises:
        UserError: as many as a text has, which is not known here.
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
    for f in dataclasses.fields(kind):
        if dataclasses.is_dataclass(f.type):
            yield from all_keys(typing.cast(type, f.type), f"{prefix}{f.name}.")
        else:
            yield prefix + f.name
