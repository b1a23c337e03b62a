"""One LoRA step here and in PEFT (torch), on the same model, shapes and machine; prints one JSON
line.

    python benchmarks/step_time.py --model demo:smollm2-135m-instruct --rows 4 --length 256

The two sides run in turns, each in a process of its own, on an otherwise idle machine; the result
is the ratio. Rows are full (no padding) and all tokens are supervised. Both use float32, AdamW and
clipping at 1.0.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

import numpy as np

from lora_jax.start import use_huge_pages


def batch_of(options: argparse.Namespace, vocabulary: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, vocabulary, (options.rows, options.length))


def time_steps(step, options: argparse.Namespace) -> dict:
    seconds = []
    for _ in range(options.steps + 2):
        start = time.perf_counter()
        loss = step()
        seconds.append(time.perf_counter() - start)
    # The first two steps compile, or warm allocators up.
    return {"seconds": statistics.median(seconds[2:]), "loss": loss}


def run_jax(options: argparse.Namespace) -> dict:
    import jax
    import jax.numpy as jnp

    from lora_jax import config as configs
    from lora_jax import formats, lora
    from lora_jax.train.optimizer import make_optimizer
    from lora_jax.train.step import make_train_step

    config = configs.parse(
        {
            "model": options.model,
            "adapter": {"rank": options.rank, "alpha": 2 * options.rank},
            "train": {"batch_size": options.rows, "remat": options.remat, "schedule": "constant"},
        }
    )
    model = formats.load(options.model, dtype=jnp.float32)
    tokens = batch_of(options, model.config.vocab_size).astype(np.int32)
    positions = np.tile(np.arange(options.length, dtype=np.int32), (options.rows, 1))
    ones = np.ones_like(tokens)
    batch = jax.device_put(
        {
            "tokens": tokens,
            "loss_weights": ones.astype(np.float32),
            "segment_ids": ones,
            "positions": positions,
        }
    )
    params, adapters = lora.init(jax.random.key(0), model.params, config.adapter)
    optimizer = make_optimizer(config.train)
    state = [adapters, optimizer.init(adapters)]
    train_step = make_train_step(model, config, optimizer)

    def step() -> float:
        state[0], state[1], metrics = train_step(*state, params, batch, jax.random.key(1))
        return float(metrics["loss"])

    return time_steps(step, options)


def run_peft(options: argparse.Namespace) -> dict:
    import peft
    import torch
    import transformers

    from lora_jax import formats

    directory = formats.resolve(options.model)
    base = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model = peft.get_peft_model(
        base,
        peft.LoraConfig(
            r=options.rank,
            lora_alpha=2 * options.rank,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
    )
    model.train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-3)
    tokens = torch.from_numpy(batch_of(options, base.config.vocab_size))

    def step() -> float:
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    return time_steps(step, options)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="demo:smollm2-135m-instruct")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--remat", default="dots", help="of our side; PEFT keeps all activations")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--side", choices=("jax", "peft"), help="run one side only, in this process"
    )
    options = parser.parse_args()
    if options.side:
        print(json.dumps({"jax": run_jax, "peft": run_peft}[options.side](options)))
        return
    results: dict[str, list[dict]] = {"jax": [], "peft": []}
    for _ in range(options.rounds):
        for side, found in results.items():
            command = [sys.executable, *sys.argv, "--side", side]
            out = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=os.environ).stdout
            found.append(json.loads(out.splitlines()[-1]))
    seconds = {side: min(run["seconds"] for run in found) for side, found in results.items()}
    row = {
        "rows": options.rows,
        "length": options.length,
        "remat": options.remat,
        "jax_seconds": seconds["jax"],
        "peft_seconds": seconds["peft"],
        "ratio": seconds["jax"] / seconds["peft"],
        "losses": {side: found[0]["loss"] for side, found in results.items()},
    }
    print(json.dumps(row))


if __name__ == "__main__":
    use_huge_pages()  # as train.py does; both sides get it
    main()
