"""PEFT's side of `vs_peft.py` and `gpu.py`: the loop of transformers' trainer over an adapted
model; prints a JSON line. The scripts start it.

Examples are padded to the longest of their batch. Attention is sdpa; the optimizer is the fused
AdamW that the trainer takes by default, with its clipping at 1.0 and its linear schedule. bfloat16
is autocast over weights of that dtype, as with the trainer's `bf16`.
"""

import itertools
import json
import time
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from sides import Job, Watch, gflops, products, read_job, threads

IGNORED = -100  # label of a token that is not supervised


def load(job: Job) -> Any:
    """Return the adapted model."""
    dtype = getattr(torch, job.dtype)
    given: dict[str, Any] = {"dtype": dtype, "attn_implementation": "sdpa"}
    if job.device == "gpu":
        given["device_map"] = {"": 0}
    if job.method == "nf4":
        given["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    base = transformers.AutoModelForCausalLM.from_pretrained(job.model, **given)
    again = {"gradient_checkpointing_kwargs": {"use_reentrant": False}}
    if job.method == "nf4":
        base = peft.prepare_model_for_kbit_training(
            base, use_gradient_checkpointing=job.checkpointing, **again
        )
    elif job.checkpointing:
        base.gradient_checkpointing_enable(**again)
        base.enable_input_require_grads()
    config = peft.LoraConfig(
        r=job.rank,
        lora_alpha=job.alpha,
        target_modules="all-linear",
        use_dora=job.method == "dora",
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(base, config).train()


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Return rows padded to the longest of them."""
    shape = len(rows), max(len(row["input_ids"]) for row in rows)
    tokens, mask = torch.zeros((2, *shape), dtype=torch.int64)
    labels = torch.full(shape, IGNORED)
    for number, row in enumerate(rows):
        length = len(row["input_ids"])
        tokens[number, :length] = torch.tensor(row["input_ids"])
        labels[number, :length] = torch.tensor(row["labels"])
        mask[number, :length] = 1
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


def train(job: Job, watch: Watch) -> Any:
    """Take the steps of a job, and return the model."""
    lines = Path(job.rows).read_text(encoding="utf-8").splitlines()
    batches = torch.utils.data.DataLoader(
        [json.loads(line) for line in lines],  # pyright: ignore
        batch_size=job.batch,
        shuffle=job.shuffle,
        collate_fn=collate,
    )
    model = load(job)
    device = "cuda" if job.device == "gpu" else "cpu"
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=job.learning_rate, weight_decay=0.0, fused=True)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, 0, job.steps)
    mixed = torch.autocast(device, torch.bfloat16, enabled=job.dtype == "bfloat16")
    following = itertools.islice(iter(batches), job.steps)
    for _ in range(job.steps):
        begin = time.perf_counter()
        batch = {name: x.to(device) for name, x in next(following).items()}
        with mixed:
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        measured = float(loss.detach())
        seconds = time.perf_counter() - begin
        supervised = int((batch["labels"][:, 1:] != IGNORED).sum())
        watch.add(seconds, measured, supervised, len(batch["labels"]))
    return model


def measure_products(job: Job) -> float:
    """Return the rate of torch's products on the shapes of a step."""
    dtype = getattr(torch, job.dtype)

    def prepare(m: int, k: int, n: int) -> Any:
        x, y = torch.ones((m, k), dtype=dtype), torch.ones((n, k), dtype=dtype)
        return lambda: torch.nn.functional.linear(x, y)

    return gflops(products(job.model, job.product_tokens), prepare)


def main() -> None:
    job = read_job()
    if job.device == "gpu" and not torch.cuda.is_available():
        raise SystemExit("error: torch sees no GPU: its build has no CUDA")
    torch.set_num_threads(threads())
    torch.manual_seed(0)
    watch = Watch(job.began)
    model = train(job, watch)
    if job.adapter is not None:
        model.save_pretrained(job.adapter)
    found = watch.report() | {"torch": torch.__version__, "peft": peft.__version__}
    found["transformers"] = transformers.__version__
    if job.device == "gpu":
        found["device_bytes"] = torch.cuda.max_memory_allocated()
    if job.product_tokens:
        found["gflops"] = measure_products(job)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
