"""Five steps of DPO, from random adapters, against PEFT's model with TRL's loss."""

import jax
import numpy as np
import torch

from lora_jax import Config, data, formats
from lora_jax.config import ObjectiveConfig, TrainConfig
from lora_jax.data.examples import Example
from lora_jax.targets import find_targets
from lora_jax.train.optimizer import make_optimizer
from lora_jax.train.step import make_train_step

from ..objectives import trl_losses
from .test_lora import TARGETING, TOLERANCE, adapter_parameters, by_name, random_peft_model

BETA, ROWS, TIME = 0.4, 4, 48


def make_pairs(seed):
    """Four pairs of texts of unequal lengths, whose first tokens are a prompt."""
    rng = np.random.default_rng(seed)

    def text():
        asked, answered = rng.integers(1, 5), rng.integers(1, 9)
        weights = np.r_[np.zeros(asked), np.ones(answered)].astype(np.float32)
        return Example(rng.integers(0, 97, asked + answered).astype(np.int32), weights, "row")

    return [(text(), text()) for _ in range(ROWS)]


def torch_log_probs(model, texts):
    """(texts, time): the log-probability of every supervised token, and the mask of these."""
    length = max(len(text.tokens) for text in texts)
    tokens, mask = torch.zeros((2, len(texts), length), dtype=torch.long)
    attended = torch.zeros((len(texts), length), dtype=torch.long)
    for i, text in enumerate(texts):
        tokens[i, : len(text.tokens)] = torch.tensor(text.tokens)
        mask[i, : len(text.tokens)] = torch.tensor(text.loss_weights).long()
        attended[i, : len(text.tokens)] = 1
    logits = model(input_ids=tokens, attention_mask=attended).logits[:, :-1]
    found = logits.log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    return torch.nn.functional.pad(found, (1, 0)) * mask, mask


def test_five_steps_of_dpo(tiny_llama, tmp_path, error):
    base, fields = TARGETING["both patterns, rsLoRA, tied"]
    train = TrainConfig(
        objective="dpo",
        steps=5,
        batch_size=ROWS,
        micro_batch_size=2,
        learning_rate=2e-3,
        schedule="constant",
        grad_clip=None,
        epsilon=1e-6,
    )
    directory, oracle = tiny_llama(0, num_hidden_layers=3, **base)
    peft_model = random_peft_model(oracle, fields, 0)
    peft_model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    model = formats.load(directory)
    adapters, config = formats.read_adapter(tmp_path / "adapter", model.params)
    targets, optimizer = find_targets(model.params, config), make_optimizer(train)
    settings = Config(adapter=config, train=train, objective=ObjectiveConfig(beta=BETA))
    step = make_train_step(model, settings, optimizer)
    opt_state, parameters = optimizer.init(adapters), adapter_parameters(peft_model)
    start = {name: value.detach().numpy().copy() for name, value in parameters.items()}
    adamw = torch.optim.AdamW(parameters.values(), lr=2e-3, eps=1e-6, weight_decay=0.0)
    losses = []
    for number in range(5):
        pairs = make_pairs(number % 2)
        rows = [[data.join(*pair, (data.CHOSEN, data.REJECTED))] for pair in pairs]
        adapters, opt_state, metrics = step(
            *(adapters, opt_state, model.params, data.stack(rows, TIME), jax.random.key(number))
        )
        texts = [pair[i] for i in (0, 1) for pair in pairs]
        with torch.no_grad(), peft_model.disable_adapter():
            reference, mask = torch_log_probs(peft_model, texts)
        adamw.zero_grad()
        log_probs, _ = torch_log_probs(peft_model, texts)
        loss = trl_losses.dpo(log_probs, reference, mask, BETA, kinds=["sigmoid"], weights=[1.0])
        loss.backward()
        adamw.step()
        assert error(metrics["loss"], loss.item()) < TOLERANCE
        losses.append(loss.item())
    assert losses[0] - losses[-1] > 0.1
    for name, value in by_name(adapters, targets).items():
        expected = parameters[name].detach().numpy()
        assert error(value, expected) < TOLERANCE, name
        assert np.abs(expected - start[name]).max() > 2e-3, name
