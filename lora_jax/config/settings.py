"""Every setting, its default and its meaning."""

import dataclasses
import difflib
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

SOFT = ("prompt", "prefix")  # methods that train virtual tokens
DATA_INITS = ("eva", "lora_ga")  # look at data
# Parts of a fingerprint: what a run was made with.
PRINTS = ("base", "tokenizer", "template", "data", "held_out")
_VIRTUAL_TOKENS = 20


class UserError(ValueError):
    """A mistake in the input (config, data, files), not in the program: what was given, what
    exists, what to do.
    """


@dataclass(frozen=True)
class AdapterConfig:
    method: str = "lora"  # lora | prompt | prefix | full: every weight, the baseline
    rank: int = 8  # r: inner size of the update a @ b (PEFT: r)
    alpha: float = 16.0  # the update is scaled by alpha / rank (PEFT: lora_alpha)
    target_modules: Any = "all-linear"  # all-linear | list of names | regex for whole module paths
    exclude_modules: Any = None  # names or regex, as target_modules; wins over it
    layers_to_transform: Any = None  # a layer index or a list of them; null adapts all layers
    rank_pattern: dict[str, int] = field(default_factory=dict)  # name or regex -> rank
    alpha_pattern: dict[str, float] = field(default_factory=dict)  # name or regex -> alpha
    dropout: float = 0.0  # on the input of lora_a, in training only (PEFT: lora_dropout)
    use_rslora: bool = False  # scale by alpha / sqrt(rank) instead (arXiv 2312.03732)
    use_dora: bool = False  # train the size of every column on its own (arXiv 2402.09353)
    init: str = "default"  # default | gaussian | orthogonal | pissa | olora | loftq | eva | lora_ga
    calibration_batches: int = 1  # batches of data.train that init=eva and lora_ga look at
    eva_rho: float = 1.0  # eva: a rank grows up to so many times; others shrink (PEFT's is 2)
    loftq_iter: int = 1  # loftq: how often quantisation and factors are fitted to each other
    freeze_a: bool = False  # train lora_b alone (LoRA-FA, arXiv 2308.03303)
    lora_plus_ratio: float = 1.0  # rate of lora_b over that of lora_a (LoRA+, arXiv 2402.12354)
    bias: str = "none"  # none | lora_only | all: biases that train, of adapted modules or of all
    modules_to_save: list[str] | None = None  # modules that train whole, named as target_modules
    trainable_token_indices: list[int] | None = None  # tokens whose embeddings train
    ensure_weight_tying: bool | None = None  # tied models: embedding and head stay one or part
    path: str | None = None  # a PEFT adapter directory to continue from; its settings hold
    num_virtual_tokens: int | None = None  # prompt, prefix; null: 20, or as many as prompt_text has
    prompt_init: str = "vocab"  # vocab | text | random: what virtual tokens start as
    prompt_text: str | None = None  # for prompt_init=text; cut or repeated to num_virtual_tokens
    prefix_gate: bool = False  # weigh the prefix of a layer, from zero on (arXiv 2303.16199)


@dataclass(frozen=True)
class DataConfig:
    train: Any = None  # file, directory, org/name[:split], demo:NAME, or {source: weight, ..}
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
    steps: int = 100  # optimizer steps
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
    grad_clip: float | None = 1.0  # one global norm over all trainable leaves; null: none
    eval_every: int | None = None  # steps between held-out losses; null: only before and after
    save_every: int | None = None  # steps between checkpoints; null: a tenth of all steps
    save_total_limit: int | None = 2  # latest checkpoints kept, beside the best; null: all
    early_stopping_patience: int | None = None  # evaluations without a better task loss; null: off
    load_best_model_at_end: bool = False  # export the best task loss, not the last step
    divergence: float | None = 3.0  # stop where the loss is so many times its best; null: never
    optimizer_memory: str = "device"  # device | host: where AdamW's moments lie between steps
    log_every: int = 1  # steps between lines of metrics.jsonl
    report_to: list[str] = field(default_factory=list)  # tensorboard, wandb, trackio
    compute_dtype: str = "float32"  # float32 | bfloat16: activations; adapters stay float32
    remat: str = "full"  # none | dots | full | offload (to the host): less memory, more work
    attention: str = "auto"  # auto | xla | cudnn (NVIDIA GPUs) | splash (TPUs): docs/devices.md
    loss_chunk: int = 1024  # tokens whose logits stand in memory at once
    router_aux_loss_coef: float = 0.0  # weight of the loss by which experts are used alike


@dataclass(frozen=True)
class EvalConfig:
    batch_size: int = 16  # rows per batch of held-out loss
    loss_examples: int | None = None  # of each held-out set, spread over it; null: all
    generate: bool = True  # answers to data.eval, greedy, scored by `metrics`
    metrics: list[str] = field(default_factory=lambda: ["exact_match"])  # slot_f1, bleu, rouge_l
    strip_thoughts: bool = True  # score answers without the thoughts in front of them
    generate_examples: int | None = None  # how many rows of data.eval are generated; null: all
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
    checkpoint_dir: str | None = None  # directory or gs://bucket/path; null: OUTPUT_DIR/checkpoints
    resume: Any = False  # false | true: go on from the last checkpoint | auto: if there is one
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


def nearest(name: str, candidates: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the candidate closest to `name`, or the empty string."""
    close = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""


def raise_all(problems: Sequence[str]) -> None:
    """Raise every problem of a kind in one `UserError`; nothing happens without any."""
    if problems:
        raise UserError("\n".join(problems))


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
