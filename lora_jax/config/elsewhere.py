"""Keys that people know from PEFT, TRL, transformers and axolotl, and the settings that mean the
same here. Errors about unknown keys and the table of docs/troubleshooting.md are made from it.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Elsewhere:
    """keys: their names there; here: the settings, each with a value where that is settled;
    remark: a sentence without its full stop.
    """

    keys: tuple[str, ...]
    here: tuple[str, ...] = ()
    remark: str = ""


TABLE = (
    Elsewhere(("r", "lora_r", "lora_rank"), ("adapter.rank",)),
    Elsewhere(("lora_alpha",), ("adapter.alpha",)),
    Elsewhere(("lora_dropout",), ("adapter.dropout",)),
    Elsewhere(("lora_target_modules",), ("adapter.target_modules",)),
    Elsewhere(("lora_modules_to_save",), ("adapter.modules_to_save",)),
    Elsewhere(("lora_target_linear",), ("adapter.target_modules=all-linear",)),
    Elsewhere(("peft_use_dora",), ("adapter.use_dora",)),
    Elsewhere(("peft_use_rslora",), ("adapter.use_rslora",)),
    Elsewhere(("init_lora_weights", "peft_init_lora_weights"), ("adapter.init",)),
    Elsewhere(("loraplus_lr_ratio",), ("adapter.lora_plus_ratio",)),
    Elsewhere(("peft_type", "adapter_type"), ("adapter.method",)),
    Elsewhere(
        ("task_type", "inference_mode"), remark="the model's config.json says what it is made for"
    ),
    Elsewhere(("lora_model_dir", "adapter_name_or_path"), ("adapter.path",)),
    Elsewhere(
        ("load_in_4bit", "load_in_8bit", "quantization"), ("base_dtype=nf4", "base_dtype=int8")
    ),
    Elsewhere(
        ("bnb_4bit_quant_type", "bnb_4bit_compute_dtype", "bnb_4bit_use_double_quant"),
        ("base_dtype", "train.compute_dtype"),
    ),
    Elsewhere(("torch_dtype", "dtype"), ("base_dtype", "train.compute_dtype")),
    Elsewhere(
        ("model_name_or_path", "base_model", "base_model_name_or_path", "model_name"), ("model",)
    ),
    Elsewhere(
        ("gradient_accumulation_steps",),
        ("train.batch_size", "train.micro_batch_size"),
        "batch_size is what one step sees, over all devices and micro-batches",
    ),
    Elsewhere(
        ("per_device_train_batch_size", "micro_batch_size", "train_batch_size"),
        ("train.micro_batch_size", "train.batch_size"),
        "both count the rows of all devices",
    ),
    Elsewhere(
        ("per_device_eval_batch_size", "eval_batch_size"),
        ("eval.batch_size", "eval.generate_batch_size"),
    ),
    Elsewhere(("num_train_epochs", "num_epochs", "epoch"), ("train.epochs",)),
    Elsewhere(("max_steps", "num_steps", "total_steps", "iters"), ("train.steps",)),
    Elsewhere(("lr",), ("train.learning_rate",)),
    Elsewhere(("lr_scheduler_type", "lr_scheduler", "scheduler"), ("train.schedule",)),
    Elsewhere(("warmup_ratio",), ("train.warmup_steps",), "a number of steps"),
    Elsewhere(("warmup", "num_warmup_steps"), ("train.warmup_steps",)),
    Elsewhere(("max_grad_norm", "gradient_clipping"), ("train.grad_clip",)),
    Elsewhere(
        ("optim", "optimizer"), remark="the optimizer is AdamW; train.optimizer_memory places it"
    ),
    Elsewhere(("label_smoothing_factor",), ("train.label_smoothing",)),
    Elsewhere(("adam_beta1",), ("train.beta1",)),
    Elsewhere(("adam_beta2",), ("train.beta2",)),
    Elsewhere(("adam_epsilon", "eps"), ("train.epsilon",)),
    Elsewhere(
        ("bf16", "fp16", "tf32", "mixed_precision"),
        ("train.compute_dtype=bfloat16", "base_dtype=bfloat16"),
    ),
    Elsewhere(
        ("gradient_checkpointing", "gradient_checkpointing_kwargs"),
        ("train.remat",),
        "none, dots, full or offload",
    ),
    Elsewhere(
        ("attn_implementation", "flash_attention", "use_flash_attention_2"), ("train.attention",)
    ),
    Elsewhere(
        ("eval_steps", "eval_strategy", "evaluation_strategy", "evals_per_epoch"),
        ("train.eval_every",),
    ),
    Elsewhere(
        ("save_steps", "save_strategy", "saves_per_epoch", "checkpoint_every"),
        ("train.save_every",),
    ),
    Elsewhere(("every",), ("train.eval_every", "train.save_every", "train.log_every")),
    Elsewhere(("logging_steps", "logging_strategy", "steps_per_report"), ("train.log_every",)),
    Elsewhere(
        ("wandb_project", "use_wandb", "use_tensorboard", "run_name"),
        ("train.report_to",),
        "wandb, tensorboard or trackio",
    ),
    Elsewhere(("resume_from_checkpoint", "auto_resume_from_checkpoints"), ("resume",)),
    Elsewhere(
        ("overwrite_output_dir",),
        ("output_dir", "resume"),
        "the directory of a run is never overwritten",
    ),
    Elsewhere(("output", "save_dir", "logging_dir"), ("output_dir",)),
    Elsewhere(
        ("max_seq_length", "sequence_len", "seq_length", "model_max_length", "cutoff_len"),
        ("data.max_length",),
    ),
    Elsewhere(("sample_packing", "pad_to_sequence_len"), ("data.packing",)),
    Elsewhere(
        ("dataset_name", "datasets", "dataset", "train_file", "data_path", "dataset_path"),
        ("data.train",),
    ),
    Elsewhere(
        ("test_datasets", "eval_dataset", "validation_file"), ("data.eval",), "held-out rows"
    ),
    Elsewhere(("val_set_size", "validation_split_percentage", "val_size"), ("data.eval_size",)),
    Elsewhere(("dataset_text_field",), ("data.completion",), 'a row {"text": ..} needs no setting'),
    Elsewhere(
        ("assistant_only_loss", "completion_only_loss", "train_on_inputs", "train_on_responses"),
        remark='the loss covers the answers; "train": false leaves a message out',
    ),
    Elsewhere(
        ("remove_unused_columns",),
        ("data.ignore_columns",),
        "a column that is not known is an error",
    ),
    Elsewhere(("dataloader_num_workers", "dataset_num_proc"), remark="there is nothing to set"),
    Elsewhere(("special_tokens", "tokenizer", "tokenizer_type"), remark="as in the model's files"),
    Elsewhere(
        ("greater_is_better",),
        ("train.metric_for_best_model",),
        "each metric knows which is better",
    ),
    Elsewhere(("predict_with_generate",), ("eval.generate",)),
    Elsewhere(("random_seed", "data_seed"), ("seed",)),
    Elsewhere(("fsdp_config", "deepspeed", "tensor_parallel_size"), ("mesh.fsdp", "mesh.tensor")),
    Elsewhere(
        ("push_to_hub", "hub_model_id"),
        remark="`lora-jax export --push-to-hub ORG/NAME` uploads the result of a run",
    ),
)
_BY_KEY = {key: row for row in TABLE for key in row.keys}


def find_hint(key: str) -> str:
    """Return ` Here it is train.epochs.` for a key that is known from elsewhere, whatever section
    it was written in, or the empty string.
    """
    row = _BY_KEY.get(key)
    if row is None:
        return ""
    named = " or ".join(repr(setting) for setting in row.here)
    if not named:
        return f" Leave {key!r} out: {row.remark}."
    return f" Did you mean {named}?{f' ({row.remark})' if row.remark else ''}"


def to_markdown() -> str:
    """Return the table of the documentation."""
    lines = ["| there | here | |", "|---|---|---|"]
    for row in TABLE:
        cells = (", ".join(f"`{name}`" for name in names) for names in (row.keys, row.here))
        lines.append(f"| {' | '.join(cells)} | {row.remark} |".replace("|  |", "| |"))
    return "\n".join(lines)
