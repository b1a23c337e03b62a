"""TRL's trainer and PEFT on the pairs that a config of `train.objective: dpo` trains on; writes a
PEFT adapter, and prints one JSON line.

    python train.py --config configs/usaddress-dpo.yaml
    python benchmarks/preferences.py --config configs/usaddress-dpo.yaml --output runs/usaddress-trl
    lora-jax eval --config runs/usaddress/config.yaml --adapter runs/usaddress-dpo/adapter \\
        --adapter runs/usaddress-trl

Both sides use the same tokens in the same steps: a step takes the pairs that our loader packs into
its rows, here padded. The start, beta, the weight of the chosen answers' cross-entropy, AdamW,
schedule and clipping are those of the config. Float32; TRL's reference is a copy of the adapter.
"""

import argparse
import json
import sys
import time

import datasets
import peft
import torch
import transformers
from rich.console import Console
from trl import DPOConfig, DPOTrainer

from lora_jax import config as configs
from lora_jax import data
from lora_jax.config import Config, beta_of, sft_weight_of
from lora_jax.data import sets
from lora_jax.session import open_session
from lora_jax.train.epochs import settle
from lora_jax.train.optimizer import make_schedule

COLUMNS = {data.CHOSEN: "chosen_ids", data.REJECTED: "rejected_ids"}


def columns(pair: data.Example) -> dict[str, list[int]]:
    """Return a pair as TRL's trainer has it."""
    found = {}
    for role, text in zip(pair.roles, pair.texts, strict=True):
        answer = text.loss_weights > 0
        found["prompt_ids"] = text.tokens[~answer].tolist()
        found[COLUMNS[role]] = text.tokens[answer].tolist()
    return found


class Trainer(DPOTrainer):
    """TRL's trainer over tokens, with the pairs of every step given; keeps the loss of each."""

    steps: list[list[int]]
    losses: list[float]

    def _prepare_dataset(self, dataset, *others):
        return dataset

    def get_train_dataloader(self):
        return torch.utils.data.DataLoader(
            self.train_dataset, batch_sampler=self.steps, collate_fn=self.data_collator
        )

    def compute_loss(self, *inputs, **options):
        found = super().compute_loss(*inputs, **options)
        self.losses.append(found.item())
        return found


def make_trainer(model, tokenizer, pairs, config: Config, output: str) -> Trainer:
    """Make TRL's trainer with the settings of a config."""
    settings, objective = config.train, config.objective
    schedule, sft = make_schedule(settings), sft_weight_of(objective, "dpo")
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=1.0,  # times the schedule
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
        weight_decay=settings.weight_decay,
    )
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(schedule(step)))
    arguments = DPOConfig(
        output_dir=output,
        beta=beta_of(objective, "dpo"),
        label_smoothing=objective.label_smoothing or 0.0,
        loss_type=["sigmoid", "sft"] if sft else ["sigmoid"],
        loss_weights=[1.0, sft] if sft else [1.0],
        max_grad_norm=settings.grad_clip or float("inf"),
        max_steps=settings.total_steps,
        max_length=None,
        logging_steps=10,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
    )
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=datasets.Dataset.from_list(pairs),
        processing_class=tokenizer,
        optimizers=(optimizer, rate),
    )


def open_trainer(config: Config, output: str) -> Trainer:
    """Read the pairs of a config, and make the trainer over them and over `adapter.path`."""
    console = Console(stderr=True)
    session = open_session(config)
    encoder = session.make_encoder(console)
    train, _ = sets.read_sets(session.config, encoder)
    config = settle(session.config, train, encoder)
    loader = sets.make_loader(config, train, encoder, None, console)
    size = config.train.batch_size
    steps, pairs = [], []
    for step in range(config.train.total_steps):
        own = [pair for row in range(step * size, step * size + size) for pair in loader.row(row)]
        steps.append(list(range(len(pairs), len(pairs) + len(own))))
        pairs += map(columns, own)
    base = transformers.AutoModelForCausalLM.from_pretrained(session.source, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, config.adapter.path, is_trainable=True)
    trainer = make_trainer(model, session.tokenizer, pairs, config, output)
    trainer.steps, trainer.losses = steps, []
    return trainer


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True)
    parser.add_argument("--output", required=True, help="directory for the PEFT adapter")
    parser.add_argument("overrides", nargs="*", help="settings as key.sub=value")
    options = parser.parse_args()
    config = configs.load(options.config, options.overrides)
    if config.train.objective != "dpo" or config.adapter.path is None:
        sys.exit("the config must have train.objective=dpo and an adapter.path to start from")
    trainer = open_trainer(config, options.output)
    start = time.perf_counter()
    trainer.train()
    found = {"train_seconds": time.perf_counter() - start}
    trainer.model.save_pretrained(options.output, selected_adapters=["default"])
    found |= {"steps": len(trainer.steps), "pairs": sum(map(len, trainer.steps))}
    found |= {"first_loss": trainer.losses[0], "last_loss": trainer.losses[-1]}
    print(json.dumps({"config": options.config, **found}))


if __name__ == "__main__":
    main()
