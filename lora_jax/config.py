"""One YAML file, one dataclass: every setting, its default and its meaning stand here and nowhere
else.

    config = load("configs/quickstart.yaml", ["train.steps=10", "adapter.rank=8"])

Unknown keys, wrong types and impossible values are collected and raised together as one
`UserError`.
"""

import dataclasses
import difflib
import re
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException


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
    system_prompt: str | None = None  # put before rows that have no system turn of their own
    chat_template: str | None = None  # null: the tokenizer's | a Jinja file | none: plain text
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


class _UniqueKeys(yaml.SafeLoader):
    """A loader for which a key that stands twice is an error; PyYAML lets the last one win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                mark = key_node.start_mark
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands there twice", mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def nearest(name: str, candidates: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the candidate closest to `name`, or the empty string."""
    close = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""


def raise_all(problems: Sequence[str]) -> None:
    """Raise every problem of a kind in one `UserError`; nothing happens without any."""
    if problems:
        raise UserError("\n".join(problems))


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `key.sub=value` overrides, and check everything.

    Raises:
        UserError: the file is missing or is no YAML mapping; unknown keys; values of a wrong type
            or out of range.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"config file {path} does not exist")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    except OSError as error:
        raise UserError(f"config file {path} cannot be read: {error.strerror}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a mapping of settings, not {type(content).__name__}")
    return parse(content, overrides, source=str(path))


def parse(content: dict, overrides: Sequence[str] = (), source: str = "config") -> Config:
    """A checked `Config` from a mapping and `key.sub=value` overrides (later ones win)."""
    layers: list[tuple[str, Any]] = [(source, content)]
    replaced: dict[str, str] = {}  # by the name of the layer, the mapping that it replaces whole
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise UserError(
                f"override {override!r} is not of the form key.sub=value, as in train.steps=10"
            )
        try:
            layer = (
                _nest(key.split("."), _plain_text(text))
                if _holds_text(key, text)
                else OmegaConf.to_container(OmegaConf.from_dotlist([override]))
            )
        except (OmegaConfBaseException, yaml.YAMLError) as error:
            raise UserError(
                f"override {override!r} cannot be read: {_first_line(error)}"
            ) from error
        layers.append((f"override {override!r}", layer))
        if key in _MAPPINGS:
            replaced[f"override {override!r}"] = key
    merged = OmegaConf.structured(Config)
    _unlock(merged)
    problems = []
    for origin, layer in layers:
        unknown = list(_unknown_keys(layer, Config, ""))
        problems += [f"{origin}: {problem}" for problem in unknown]
        if not unknown:
            try:
                if origin in replaced:
                    key = replaced[origin]
                    OmegaConf.update(merged, key, None if key == "data.train" else {}, merge=False)
                merged = OmegaConf.merge(merged, _without_interpolation(layer))
            except (OmegaConfBaseException, ValueError) as error:
                problems.append(f"{origin}: {_type_problem(error)}")
    raise_all(problems)
    try:
        config = typing.cast(Config, OmegaConf.to_object(merged))
    except (OmegaConfBaseException, ValueError) as error:
        raise UserError(f"{source}: {_type_problem(error)}") from error
    check(config)
    return config


def dump(config: Config) -> str:
    """The resolved config as YAML, readable by `load`."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)


# Settings whose values are mappings: an override of one takes the place of all of it.
_MAPPINGS = ("data.train", "adapter.rank_pattern", "adapter.alpha_pattern")
_CHOICES = {
    "base_dtype": (None, "float32", "bfloat16", "int8", "nf4"),
    "adapter.method": ("lora", "prompt", "prefix", "full"),
    "adapter.init": (
        *("default", "gaussian", "orthogonal", "pissa", "olora", "loftq", "eva", "lora_ga"),
    ),
    "adapter.bias": ("none", "lora_only", "all"),
    "adapter.prompt_init": ("vocab", "text", "random"),
    "data.too_long": ("truncate", "drop", "error"),
    "data.on_bad_row": ("error", "drop"),
    "export.dtype": (None, "float32", "bfloat16", "float16"),
    "export.quantized_base": (None, "original", "dequantized"),
    "train.schedule": ("constant", "linear", "cosine"),
    "train.compute_dtype": ("float32", "bfloat16"),
    "train.optimizer_memory": ("device", "host"),
    "train.attention": ("auto", "xla", "cudnn", "splash"),
    "train.remat": ("none", "full", "dots", "offload"),
}
_AT_LEAST = {
    "data.max_length": 2,
    "data.stream_rows": 1,
    "train.steps": 1,
    "train.batch_size": 1,
    "train.micro_batch_size": 1,
    "train.warmup_steps": 0,
    "train.eval_every": 1,
    "train.save_every": 1,
    "train.save_total_limit": 1,
    "train.early_stopping_patience": 1,
    "train.log_every": 1,
    "train.loss_chunk": 1,
    "train.weight_decay": 0,
    "train.epsilon": 0,
    "eval.batch_size": 1,
    "eval.loss_examples": 1,
    "eval.generate_examples": 1,
    "eval.generate_batch_size": 1,
    "eval.max_new_tokens": 1,
    "eval.samples": 0,
    "export.probe_rows": 0,
    "hosts.start_timeout": 1,
    "hosts.lost_after": 5,
    "seed": 0,
}
_ABOVE_ZERO = ("train.learning_rate", "train.grad_clip", "data.eval_size", "export.max_merge_kl")
# Settings that go with method=lora alone; rank, alpha and the like are read by no other.
_OF_LORA = (
    *("use_rslora", "use_dora", "init", "freeze_a", "lora_plus_ratio", "bias", "dropout"),
    *("modules_to_save", "trainable_token_indices", "ensure_weight_tying", "target_modules"),
    *("exclude_modules", "layers_to_transform", "rank_pattern", "alpha_pattern"),
    *("calibration_batches", "eva_rho", "loftq_iter"),
)
_OF_VIRTUAL = ("num_virtual_tokens", "prompt_init", "prompt_text", "prefix_gate")
SOFT = ("prompt", "prefix")  # methods that train virtual tokens
_VIRTUAL_TOKENS = 20
DATA_INITS = ("eva", "lora_ga")  # look at data
# Settings of some inits alone.
_OF_INITS = {"calibration_batches": DATA_INITS, "eva_rho": ("eva",), "loftq_iter": ("loftq",)}
_SINKS = ("tensorboard", "wandb", "trackio")
# Parts of a fingerprint: what a run was made with.
PRINTS = ("base", "tokenizer", "template", "data", "held_out")


def check(config: Config) -> None:
    """Raise one `UserError` with every value that is out of range. What needs the model is checked
    with the model.
    """
    problems = []

    def value(key: str) -> Any:
        node: Any = config
        for part in key.split("."):
            node = getattr(node, part)
        return node

    for key, choices in _CHOICES.items():
        if not key.startswith("adapter.") and value(key) not in choices:
            names = ", ".join(str(choice) for choice in choices if choice is not None)
            problems.append(
                f"{key}={value(key)!r} is not one of: "
                f"{names}.{nearest(str(value(key)), filter(None, choices))}"
            )
    for key, least in _AT_LEAST.items():
        if value(key) is not None and not value(key) >= least:
            problems.append(f"{key}={value(key)} must be at least {least}")
    for key in _ABOVE_ZERO:
        if value(key) is not None and not 0 < value(key) < float("inf"):
            problems.append(f"{key}={value(key)} must be above 0")
    coefficient = config.train.router_aux_loss_coef
    if not 0 <= coefficient < float("inf"):
        problems.append(f"train.router_aux_loss_coef={coefficient} must be at least 0")
    for key in ("train.beta1", "train.beta2"):
        if not 0 <= value(key) < 1:
            problems.append(f"{key}={value(key)} must be at least 0 and below 1")
    problems += [f"adapter.{problem}" for problem in adapter_problems(config.adapter)]
    if not 0 <= config.train.final_rate <= 1:
        problems.append(f"train.final_rate={config.train.final_rate} must be between 0 and 1")
    micro = config.train.micro_batch_size
    if micro and config.train.batch_size % micro:
        problems.append(
            f"train.batch_size={config.train.batch_size} is not a multiple of "
            f"train.micro_batch_size={micro}"
        )
    axes = dataclasses.asdict(config.mesh)
    if any(size < 1 and size != -1 for size in axes.values()) or list(axes.values()).count(-1) > 1:
        problems.append(
            f"mesh={axes}: every axis is at least 1, and one of them may be -1 for the devices "
            "that are left"
        )
    problems += _data_problems(config.data)
    problems += _run_problems(config)
    if not config.model:
        problems.append(
            "model is not set: a Hugging Face directory, a .gguf file, org/name, or "
            "demo:smollm2-135m-instruct"
        )
    raise_all(problems)


def _data_problems(data: DataConfig) -> Iterable[str]:
    sources = data.train
    if isinstance(sources, dict):
        wrong = {
            name: weight
            for name, weight in sources.items()
            if isinstance(weight, bool)
            or not isinstance(weight, int | float)
            or not 0 < weight < float("inf")
        }
        if wrong or not sources:
            yield f"data.train: weights must be numbers above 0, not {wrong}"
    elif not isinstance(sources, str | None):
        yield (
            f"data.train={sources!r} is neither a source nor a mapping of sources to weights, as "
            "in {a.jsonl: 0.7, b.jsonl: 0.3}"
        )
    if data.eval_size is not None and data.eval is not None:
        yield "data.eval and data.eval_size are both set; choose one"
    if data.eval_size is not None and data.eval_size >= 1 and data.eval_size % 1:
        yield f"data.eval_size={data.eval_size} must be a share below 1 or a whole number"
    for name in ("eval_size", "drop_overlap"):
        if getattr(data, name) and sources is None:
            yield f"data.{name} needs data.train, which is not set"
    if data.streaming:
        if isinstance(sources, dict) and len(sources) != 1:
            yield "data.streaming takes one source, and data.train names several"
        if data.eval_size is not None:
            yield "data.eval_size cannot hold rows out of a stream; name them in data.eval"
        if data.drop_overlap:
            yield "data.drop_overlap needs all of data.train, which data.streaming does not read"


def _run_problems(config: Config) -> Iterable[str]:
    train = config.train
    if not (isinstance(config.resume, bool) or config.resume == "auto"):
        yield f"resume={config.resume!r} is not one of: false, true, auto."
    if "://" in config.output_dir:
        yield (
            f"output_dir={config.output_dir!r} is no directory: logs and exports go to one; "
            "checkpoint_dir may be a bucket, as in gs://bucket/path"
        )
    place = config.checkpoint_dir or ""
    if "://" in place and not place.startswith("gs://"):
        yield (
            f"checkpoint_dir={place!r}: checkpoints can be written to directories and to buckets "
            "of Google Cloud, gs://bucket/path, where they are committed at once or not at all"
        )
    for name in train.report_to:
        if name not in _SINKS:
            yield (
                f"train.report_to: {name!r} is not one of: {', '.join(_SINKS)}."
                f"{nearest(name, _SINKS)}"
            )
    keys = [*_all_keys(Config, ""), *PRINTS]
    sections = {key.partition(".")[0] for key in keys}
    for name in config.allow_change:
        if name not in keys and name not in sections:
            yield (
                f"allow_change: {name!r} is neither a setting nor one of: {', '.join(PRINTS)}."
                f"{nearest(name, keys)}"
            )
    if config.export.merged and (problem := merge_problem(config)):
        yield problem
    if config.export.merged and config.adapter.method in SOFT:
        yield (
            f"export.merged=true: adapter.method={config.adapter.method} trains virtual tokens, "
            "which cannot be merged into weights; export.peft writes them"
        )
    cosine = config.export.min_merge_cosine
    if cosine is not None and not 0 < cosine <= 1:
        yield f"export.min_merge_cosine={cosine} must be above 0 and at most 1"
    if config.export.max_merge_kl is not None and config.export.probe_rows == 0:
        yield "export.max_merge_kl is measured on export.probe_rows, which is 0; leave one out"
    if config.adapter.method == "full" and config.base_dtype in ("int8", "nf4"):
        yield (
            "adapter.method=full trains the weights themselves, and "
            f"base_dtype={config.base_dtype} keeps them in a form that cannot be trained; choose "
            "float32 or bfloat16"
        )
    for name, inits in _OF_INITS.items():
        value = getattr(config.adapter, name)
        if value != getattr(AdapterConfig(), name) and config.adapter.init not in inits:
            yield (
                f"adapter.{name}={value} is for adapter.init={' and '.join(inits)}, and it is "
                f"{config.adapter.init}"
            )
    if config.adapter.init == "loftq" and config.base_dtype not in ("int8", "nf4"):
        yield (
            f"adapter.init=loftq corrects the error of a quantised base, and base_dtype="
            f"{config.base_dtype} has none; set base_dtype to nf4 or int8"
        )
    held_out = config.data.eval is not None or config.data.eval_size is not None
    for name in ("early_stopping_patience", "load_best_model_at_end"):
        if getattr(train, name) and not (held_out and train.eval_every):
            yield f"train.{name} needs data.eval (or data.eval_size) and train.eval_every"
    if train.divergence is not None and not train.divergence > 1:
        yield f"train.divergence={train.divergence} must be above 1; null never stops"


def merge_problem(config: Config) -> str | None:
    """Why this run cannot be merged without a decision, or None."""
    chosen = config.export.quantized_base
    if config.base_dtype not in ("int8", "nf4"):
        return None
    if config.adapter.init == "loftq" and chosen != "dequantized":
        return (
            f"export.quantized_base={chosen}: adapters of init=loftq start as a correction of the "
            "quantised base, which has no place on the model's own weights; set it to dequantized"
        )
    if chosen is not None:
        return None
    return (
        f"base_dtype={config.base_dtype}: adapters train on dequantised weights, which are not "
        "those of the model; set export.quantized_base=dequantized to merge into what it was "
        "trained on, or original to merge into the model's own weights"
    )


def adapter_problems(adapter: AdapterConfig) -> list[str]:
    """The values that no model can take; also asked where an `AdapterConfig` is made in Python."""
    ranks = {"rank": adapter.rank}
    ranks |= {f"rank_pattern[{name!r}]": rank for name, rank in adapter.rank_pattern.items()}
    alphas = {"alpha": adapter.alpha}
    alphas |= {f"alpha_pattern[{name!r}]": alpha for name, alpha in adapter.alpha_pattern.items()}
    problems = [f"{name}={rank} must be at least 1" for name, rank in ranks.items() if rank < 1]
    problems += [
        f"{name}={alpha} must be above 0"
        for name, alpha in alphas.items()
        if not 0 < alpha < float("inf")
    ]
    if isinstance(adapter.modules_to_save, str):
        name = adapter.modules_to_save
        problems.append(f"modules_to_save={name!r} must be a list of names, as in [{name!r}]")
    if not 0 <= adapter.dropout < 1:
        problems.append(f"dropout={adapter.dropout} must be at least 0 and below 1")
    if not 0 < adapter.lora_plus_ratio < float("inf"):
        problems.append(f"lora_plus_ratio={adapter.lora_plus_ratio} must be above 0")
    for key, choices in _CHOICES.items():
        section, _, name = key.rpartition(".")
        if section == "adapter" and getattr(adapter, name) not in choices:
            value = getattr(adapter, name)
            hint = nearest(str(value), choices)
            problems.append(f"{name}={value!r} is not one of: {', '.join(choices)}.{hint}")
    for name, least in (("calibration_batches", 1), ("eva_rho", 1), ("loftq_iter", 1)):
        if not least <= getattr(adapter, name) < float("inf"):
            problems.append(f"{name}={getattr(adapter, name)} must be at least {least}")
    return problems + list(_method_problems(adapter))


def _method_problems(adapter: AdapterConfig) -> Iterable[str]:
    """Settings of other methods than the one that is chosen."""
    default, method = AdapterConfig(), adapter.method
    given = {
        f.name: getattr(adapter, f.name)
        for f in dataclasses.fields(AdapterConfig)
        if getattr(adapter, f.name) != getattr(default, f.name)
    }
    if method == "full":
        for name in (*_OF_LORA, "path", *_OF_VIRTUAL):
            if name in given:
                yield (
                    f"method=full trains every weight, and {name}={given[name]!r} says something "
                    "of adapters; leave one out"
                )
        return
    for name in _OF_LORA if method in SOFT else _OF_VIRTUAL if method == "lora" else ():
        if name in given:
            other = "lora" if method in SOFT else "prompt or prefix"
            yield (
                f"{name}={given[name]!r} is for method={other}, and this is method={method}; leave "
                "one out"
            )
    if method not in SOFT:
        return
    if adapter.num_virtual_tokens is not None and adapter.num_virtual_tokens < 1:
        yield f"num_virtual_tokens={adapter.num_virtual_tokens} must be at least 1"
    if (adapter.prompt_init == "text") != bool(adapter.prompt_text):
        yield (
            f"prompt_init={adapter.prompt_init} and prompt_text={adapter.prompt_text!r}: the one "
            "needs the other"
        )
    if adapter.prefix_gate and method == "prompt":
        yield (
            "prefix_gate=true is for method=prefix: virtual tokens of a prompt are tokens among "
            "others, which no weight can take out"
        )


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


def _unlock(node: DictConfig) -> None:
    """OmegaConf locks what it reads from frozen dataclasses; the merge happens before they
    exist.
    """
    OmegaConf.set_readonly(node, None)
    for key in node:
        child = node._get_node(key)
        if isinstance(child, DictConfig):
            _unlock(child)


def _holds_text(key: str, text: str) -> bool:
    """Whether the setting is a string, whose override is no YAML: `data.system_prompt=Parse: {x} #
    y`.
    """
    if key == "data.train":
        return not text.lstrip().startswith("{")  # a mapping of sources to weights is YAML
    kind: Any = Config
    for part in key.split("."):
        fields = dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ()
        kind = {f.name: f.type for f in fields}.get(part)
    return kind in (str, str | None)


def _plain_text(text: str) -> str | None:
    """The value as it stands; null or nothing is None, and quotes around the whole are taken
    off.
    """
    if text in ("", "null", "~"):
        return None
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        try:
            inner = yaml.safe_load(text)
        except yaml.YAMLError:
            return text
        return inner if isinstance(inner, str) else text
    return text


def _nest(path: Sequence[str], value: Any) -> Any:
    return {path[0]: _nest(path[1:], value)} if path else value


def _without_interpolation(value: Any) -> Any:
    """`${` is text here: escaped, OmegaConf gives it back as it was written."""
    if isinstance(value, dict):
        return {key: _without_interpolation(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_interpolation(inner) for inner in value]
    if value == "???":  # OmegaConf's mark for nothing given: the default would stand in silence
        raise ValueError("the value '???' is reserved; write what you mean")
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + r"\${", value)
    return value


def _unknown_keys(content: Any, kind: type, prefix: str) -> Iterable[str]:
    fields = {f.name: f.type for f in dataclasses.fields(kind)}
    if not isinstance(content, dict):
        return
    for key, inner in content.items():
        if key not in fields:
            everywhere = [
                *fields,
                *(path for path in _all_keys(Config, "") if path.endswith(f".{key}")),
            ]
            moved = [path for path in everywhere if path.endswith(f".{key}")]
            hint = f" Did you mean {moved[0]!r}?" if moved else nearest(str(key), fields)
            yield (
                f"unknown key {prefix + str(key)!r}; {prefix.rstrip('.') or 'the config'} has: "
                f"{', '.join(fields)}.{hint}"
            )
        elif dataclasses.is_dataclass(fields[key]) and not isinstance(inner, dict):
            yield f"{prefix}{key}={inner!r} must be a mapping of settings"
        elif dataclasses.is_dataclass(fields[key]):
            yield from _unknown_keys(inner, typing.cast(type, fields[key]), f"{prefix}{key}.")


def _all_keys(kind: type, prefix: str) -> Iterable[str]:
    for f in dataclasses.fields(kind):
        if dataclasses.is_dataclass(f.type):
            yield from _all_keys(typing.cast(type, f.type), f"{prefix}{f.name}.")
        else:
            yield prefix + f.name


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def _type_problem(error: Exception) -> str:
    """`train.steps: Value 'ten' of type 'str' could not be converted to Integer`, from OmegaConf's
    three lines.
    """
    key = getattr(error, "full_key", None)
    return f"{key}: {_first_line(error)}" if key else _first_line(error)
