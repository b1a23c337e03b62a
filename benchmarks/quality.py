"""PEFT (torch) on the examples that a config trains on, scored as `train.py` scores; prints one
JSON line.

    python benchmarks/quality.py --config configs/e2e.yaml
    python benchmarks/quality.py --config configs/e2e.yaml eval.generate_examples=50
    python benchmarks/quality.py --config configs/names.yaml       # a model that classifies

Compare the figures with those of `python train.py --config configs/e2e.yaml`. Both sides use the
same tokens and loss weights in the same steps: a step takes the examples that our loader packs into
its rows, here one per row and padded. LoRA, AdamW, learning rate, schedule and clipping are those
of the config; torch draws `lora_a` (and a new head) itself. Float32, greedy answers. Dropout of the
base is on in PEFT's training, as is its default.
"""

import argparse
import json
import sys
import time

import peft
import torch
import transformers
from rich.console import Console

from lora_jax import config as configs
from lora_jax import data, formats
from lora_jax.config import Config
from lora_jax.data import sets
from lora_jax.report import scores
from lora_jax.session import open_session, settle_date
from lora_jax.train.evaluate import find_questions, make_reader, to_answer
from lora_jax.train.optimizer import make_schedule


def nll(model, examples: list[data.Example]) -> torch.Tensor:
    """Return (2,): weighted negative log-likelihood (nats) and weights, summed over examples."""
    shape = len(examples), max(len(example.tokens) for example in examples)
    tokens, mask = torch.zeros((2, *shape), dtype=torch.int64)
    weights = torch.zeros(shape)
    for row, example in enumerate(examples):
        length = len(example.tokens)
        tokens[row, :length], mask[row, :length] = torch.from_numpy(example.tokens), 1
        weights[row, 1:length] = torch.from_numpy(example.loss_weights[1:])
    logits = model(input_ids=tokens, attention_mask=mask).logits[:, :-1]
    targets, weights = tokens[:, 1:], weights[:, 1:]
    taught = weights != 0
    found = torch.nn.functional.cross_entropy(logits[taught], targets[taught], reduction="none")
    return torch.stack([(found * weights[taught]).sum(), weights.sum()])


def label_logits(model, examples: list[data.Example]) -> torch.Tensor:
    """Return logits (examples, labels)."""
    shape = len(examples), max(example.length for example in examples)
    tokens, mask, types = torch.zeros((3, *shape), dtype=torch.int64)
    for row, example in enumerate(examples):
        length = example.length
        tokens[row, :length], mask[row, :length] = torch.from_numpy(example.tokens[:-1]), 1
        types[row, example.pair_start : length] = 1
    typed = {"token_type_ids": types} if model.config.type_vocab_size > 1 else {}
    return model(input_ids=tokens, attention_mask=mask, **typed).logits


def label_nll(model, examples: list[data.Example]) -> torch.Tensor:
    """Return the result of `nll` for labels."""
    logits = label_logits(model, examples)
    labels = torch.tensor([int(example.tokens[-1]) for example in examples])
    found = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    return torch.stack([found, torch.tensor(float(len(examples)))])


def label(model, task: sets.DataSet, config: Config) -> list[scores.Answer]:
    """Return the predicted labels of texts."""
    names, size = config.data.labels or [], config.eval.batch_size
    rows = {row.where: row for row in task.rows}
    examples = scores.spread(task.examples, config.eval.generate_examples)
    found = []
    for batch in (examples[i : i + size] for i in range(0, len(examples), size)):
        for example, number in zip(batch, label_logits(model, batch).argmax(-1), strict=True):
            wanted = rows[example.where].label
            found.append(scores.Answer("", (wanted,), names[int(number)]))
    return found


def train(model, config: Config, steps: list[list[data.Example]]) -> None:
    """Train with one optimizer step for each list of examples."""
    measure = label_nll if config.data.labels else nll
    settings, schedule = config.train, make_schedule(config.train)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trained,
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
        weight_decay=settings.weight_decay,
    )
    for step, examples in enumerate(steps):
        optimizer.param_groups[0]["lr"] = float(schedule(step))
        total, weight = measure(model, examples)
        (total / weight).backward()
        torch.nn.utils.clip_grad_norm_(trained, settings.grad_clip or float("inf"))
        optimizer.step()
        optimizer.zero_grad()


def answer(model, tokenizer, task: sets.DataSet, config: Config) -> list[scores.Answer]:
    """Greedy answers; rows with the same prompt are references of one."""
    described = formats.describe(formats.resolve(config.model))
    reader = make_reader(config, described, tokenizer, task)
    questions = find_questions(task.rows, reader)
    chosen = scores.spread(list(questions), config.eval.generate_examples)
    chosen.sort(key=len)  # like lengths together: less padding
    stops = sorted(reader.stop_tokens)
    found, size = [], config.eval.generate_batch_size
    for prompts in (chosen[i : i + size] for i in range(0, len(chosen), size)):
        width = max(map(len, prompts))
        padded = [[stops[0]] * (width - len(prompt)) + [*prompt] for prompt in prompts]
        mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        out = model.generate(
            input_ids=torch.tensor(padded),
            attention_mask=torch.tensor(mask),
            max_new_tokens=config.eval.max_new_tokens,
            do_sample=False,
            eos_token_id=stops,
            pad_token_id=stops[0],
        )
        for prompt, tokens in zip(prompts, out[:, width:].tolist(), strict=True):
            found.append(to_answer(reader, questions[prompt], prompt, tokens))
    return found


@torch.no_grad()
def losses(model, held_out: dict[str, sets.DataSet], config: Config) -> dict:
    """Nats per supervised token of each held-out set."""
    found, size = {}, config.eval.batch_size
    measure = label_nll if config.data.labels else nll
    for name, one in held_out.items():
        measured = scores.spread(one.examples, config.eval.loss_examples)
        examples = sorted(measured, key=lambda example: len(example.tokens))
        batches = (examples[i : i + size] for i in range(0, len(examples), size))
        total, weight = sum(measure(model, batch) for batch in batches)
        found[f"{name}_loss"] = float(total / weight)
    print(found, file=sys.stderr, flush=True)
    return found


@torch.no_grad()
def score(model, tokenizer, held_out: dict[str, sets.DataSet], config: Config) -> dict:
    """The losses, and the metrics of the task's answers."""
    found = losses(model, held_out, config)
    if "task" in held_out and config.eval.generate:
        if config.data.labels:
            answers = label(model, held_out["task"], config)
        else:
            answers = answer(model, tokenizer, held_out["task"], config)
        found |= scores.compute(config.eval.metrics, answers) | {"answers": len(answers)}
    return found


def main() -> None:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("--config", required=True)
    parser.add_argument("overrides", nargs="*", help="settings as key.sub=value")
    options = parser.parse_args()
    config = configs.load(options.config, options.overrides)
    scores.check_metrics(config.eval.metrics)
    console = Console(stderr=True)
    session = settle_date(open_session(config), console)
    config, source, tokenizer = session.config, session.source, session.tokenizer
    encoder = session.make_encoder(console)
    train_data, held_out = sets.read_sets(config, encoder)
    loader = sets.make_loader(config, train_data, encoder, None, console)
    size = config.train.batch_size
    rows = [loader.row(number) for number in range(config.train.steps * size)]
    steps = [sum(rows[i : i + size], []) for i in range(0, len(rows), size)]
    torch.manual_seed(config.seed)
    if labels := config.data.labels:
        base = transformers.AutoModelForSequenceClassification.from_pretrained(
            source, dtype=torch.float32, num_labels=len(labels)
        )
    else:
        base = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    model = peft.get_peft_model(
        base,
        peft.LoraConfig(
            r=config.adapter.rank,
            lora_alpha=config.adapter.alpha,
            lora_dropout=config.adapter.dropout,
            target_modules=config.adapter.target_modules,
            task_type="SEQ_CLS" if labels else "CAUSAL_LM",
        ),
    ).eval()
    result = {"config": options.config, "steps": len(steps), "examples": sum(map(len, steps))}
    result["before"] = losses(model, held_out, config)  # its answers are those of our base
    start = time.perf_counter()
    train(model.train(), config, steps)
    result["train_seconds"] = time.perf_counter() - start
    result["after"] = score(model.eval(), tokenizer, held_out, config)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
