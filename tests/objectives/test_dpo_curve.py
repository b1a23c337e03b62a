"""A run of DPO over an adapter, beside TRL's trainer over the same adapter in PEFT."""

import datasets
import peft
import pytest
import torch
import transformers
import yaml
from rich.console import Console
from torch.utils.data import SequentialSampler
from trl import DPOConfig, DPOTrainer

from lora_jax import config as configs
from lora_jax import data
from lora_jax.cli import train_main
from lora_jax.data import sets
from lora_jax.report.journal import read_lines
from lora_jax.session import open_session

from ..train.tiny import write_model, write_rows

STEPS, ROWS, BETA, RATE = 5, 3, 0.3, 1e-3
PAIRS = [
    {
        "prompt": f"what is {i} plus {i % 7}",
        "chosen": str(i + i % 7) * (12 + i % 4),
        "rejected": "no idea " * 4 + "x" * (i % 9),
    }
    for i in range(STEPS * ROWS)
]


class Recorded(DPOTrainer):
    """The trainer over tokens, in their order; keeps the loss of every step."""

    def _prepare_dataset(self, dataset, *others):
        return dataset

    def _get_train_sampler(self, dataset=None):
        return SequentialSampler(self.train_dataset)

    def compute_loss(self, *inputs, **options):
        found = super().compute_loss(*inputs, **options)
        loss = found[0] if isinstance(found, tuple) else found
        self.__dict__.setdefault("losses", []).append(loss.item())
        return found


def tokens_of(example):
    """The columns of TRL's trainer for a pair."""
    roles = {data.CHOSEN: "chosen_ids", data.REJECTED: "rejected_ids"}
    found = {}
    for role, text in zip(example.roles, example.texts, strict=True):
        answer = text.loss_weights > 0
        found["prompt_ids"] = text.tokens[~answer].tolist()
        found[roles[role]] = text.tokens[answer].tolist()
    return found


def rows_of(config):
    """The pairs of every step, in order."""
    console = Console(quiet=True)
    session = open_session(config)
    encoder = session.make_encoder(console)
    train, _ = sets.read_sets(session.config, encoder)
    loader = sets.make_loader(session.config, train, encoder, None, console)
    rows = [loader.row(number) for number in range(STEPS * ROWS)]
    assert all(len(row) == 1 for row in rows)  # a step has as many pairs as rows
    return [tokens_of(row[0]) for row in rows]


@pytest.mark.parametrize("seed", [0, 1])
def test_five_steps_of_dpo_are_those_of_trl(tmp_path, seed):
    model = write_model(tmp_path / "model", seed=seed, tie_word_embeddings=False)
    base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    torch.manual_seed(seed)
    lora = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False
    )
    peft.get_peft_model(base, lora).save_pretrained(tmp_path / "adapter")
    content = {
        "model": str(model),
        "seed": seed,
        "output_dir": str(tmp_path / "run"),
        "adapter": {"path": str(tmp_path / "adapter")},
        "data": {"train": str(write_rows(tmp_path / "pairs.jsonl", PAIRS)), "max_length": 160},
        "objective": {"beta": BETA},
        "train": {
            **{"objective": "dpo", "steps": STEPS, "batch_size": ROWS, "learning_rate": RATE},
            **{"schedule": "constant", "weight_decay": 0.01, "log_every": 1},
        },
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    assert train_main(["--config", str(tmp_path / "run.yaml")]) == 0
    ours = [line["loss"] for line in read_lines(tmp_path / "run" / "metrics.jsonl")]

    base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    start = peft.PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
    settings = DPOConfig(
        output_dir=str(tmp_path / "trl"),
        beta=BETA,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        weight_decay=0.01,
        max_steps=STEPS,
        per_device_train_batch_size=ROWS,
        max_length=None,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
    )
    trainer = Recorded(
        model=start,
        args=settings,
        train_dataset=datasets.Dataset.from_list(rows_of(configs.parse(content))),
        processing_class=transformers.AutoTokenizer.from_pretrained(model),
    )
    trainer.train()
    assert len(ours) == len(trainer.losses) == STEPS
    assert ours == pytest.approx(trainer.losses, abs=1e-5)
    assert trainer.losses[-1] < trainer.losses[0] - 0.05
