"""Label smoothing against torch: values, gradients, micro-batches, classifiers, memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from lora_jax import adapters as methods
from lora_jax import config as configs
from lora_jax import models, objectives
from lora_jax.errors import UserError
from lora_jax.train.step import make_eval_step, make_train_step

from ..train.test_step import KEEP_GRADIENT
from ..train.tiny import distance, make_config, random_adapters, random_batch
from ..train.tiny import tiny_model as make_model

SMOOTHING = 0.15
OWN = {"loss", "grad_norm", "supervised_tokens"}  # metrics of every objective


def settings(*overrides):
    common = ("train.batch_size=4", "train.micro_batch_size=2", "train.remat=none")
    chunk = "train.loss_chunk=10"  # 5 of 13 tokens of a row
    return make_config(*common, chunk, f"train.label_smoothing={SMOOTHING}", *overrides)


def decoder():
    """A model with a head of its own, which trains too."""
    config = settings("adapter.rank=4", "adapter.target_modules=[q_proj, lm_head]")
    model = make_model(num_hidden_layers=1, tie_word_embeddings=False)
    batches = [random_batch(4, 13, seed=seed, weights=(0.0, 0.5, 1.0)) for seed in (0, 1)]
    return config, model, batches


def classifier():
    """An encoder with three labels; the last token of a text is its label."""
    fields = ("adapter.target_modules=[query]", "adapter.modules_to_save=[classifier]")
    config = settings("adapter.rank=4", *fields)
    model = models.describe(
        {
            "model_type": "bert",
            "architectures": ["BertForSequenceClassification"],
            "vocab_size": 97,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "max_position_embeddings": 40,
            "id2label": {"0": "a", "1": "b", "2": "c"},
            "label2id": {"a": 0, "b": 1, "c": 2},
        }
    )
    rng = np.random.default_rng(0)
    drawn = jax.tree.map(
        lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), jnp.float32), model.params
    )
    batches = []
    for seed in (0, 1):
        batch = random_batch(4, 9, 97, seed=seed)
        batch["tokens"][:, -1] = np.random.default_rng(seed).integers(0, 3, 4)
        batch["loss_weights"] = np.zeros((4, 9), np.float32)
        batch["loss_weights"][:, -1] = (1.0, 0.5, 2.0, 1.0)
        batch["token_types"] = np.zeros((4, 9), np.int32)
        batches.append(batch)
    return config, model.replace(params=drawn), batches


def torch_losses(logits, batch):
    """Smoothed and plain cross-entropy of all logits at once, and the slope of the first."""
    logits = torch.tensor(np.asarray(logits), requires_grad=True)
    weights = torch.tensor(batch["loss_weights"][:, 1:])
    targets = torch.tensor(batch["tokens"][:, 1:]).long()
    targets = torch.where(weights > 0, targets, 0)
    rows = logits[:, :-1].transpose(1, 2)

    def mean(smoothing):
        each = torch.nn.functional.cross_entropy(
            rows, targets, reduction="none", label_smoothing=smoothing
        )
        return (each * weights).sum() / weights.sum()

    smoothed, plain = mean(SMOOTHING), mean(0.0)
    (slope,) = torch.autograd.grad(smoothed, logits)
    return float(smoothed.detach()), float(plain.detach()), jnp.asarray(slope.numpy())


@pytest.mark.parametrize("make", [decoder, classifier])
def test_smoothed_loss_and_gradients_are_those_of_torch(make):
    config, model, batches = make()
    _, start = methods.init(jax.random.key(0), model.params, config.adapter)
    step = make_train_step(model, config, KEEP_GRADIENT)
    evaluate = make_eval_step(model, config)

    def all_logits(adapters, batch):
        bound = methods.bind(model.params, adapters, config.adapter)
        inputs = {n: x for n, x in batch.items() if n not in ("tokens", "loss_weights")}
        return model.apply(bound, batch["tokens"], **inputs)

    @jax.jit
    def pull(adapters, batch, slope):
        return jax.vjp(lambda adapters: all_logits(adapters, batch), adapters)[1](slope)[0]

    logits_of = jax.jit(all_logits)
    for seed, batch in enumerate(batches):
        adapters = random_adapters(start, seed)
        smoothed, plain, slope = torch_losses(logits_of(adapters, batch), batch)
        expected = pull(adapters, batch, slope)
        nll, weight = evaluate(adapters, model.params, batch)
        assert distance(nll / weight, plain) <= 1e-5  # evaluation never smooths
        own, state = (jax.tree.map(jnp.copy, adapters) for _ in range(2))
        _, found, metrics = step(own, state, model.params, batch, jax.random.key(0))
        assert distance(found, expected) <= 1e-5
        assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected)) > 1e-2
        assert distance(metrics["smoothed_loss"], smoothed) <= 1e-5
        assert distance(metrics["loss"], plain) <= 1e-5
        assert abs(smoothed - plain) > 1e-4
        assert metrics.keys() - OWN == {*objectives.metric_names(config)}


def test_z_loss_and_gradients_are_those_of_all_logits():
    """The objective adds the squared logarithm of the softmax's denominator; `loss` has none."""
    config, model, (batch, _) = decoder()
    extra = ("train.z_loss=0.05", "adapter.rank=4", "adapter.target_modules=[q_proj, lm_head]")
    config = settings(*extra)
    _, start = methods.init(jax.random.key(0), model.params, config.adapter)
    adapters = random_adapters(start)
    weights = batch["loss_weights"][:, 1:]

    def dense(adapters):
        bound = methods.bind(model.params, adapters, config.adapter)
        inputs = {name: batch[name] for name in ("positions", "segment_ids")}
        logits = model.apply(bound, batch["tokens"], **inputs)[:, :-1]
        log_z = jax.nn.logsumexp(logits, axis=-1)
        nll = log_z - jnp.take_along_axis(logits, batch["tokens"][:, 1:, None], -1)[..., 0]
        smoothed = (1 - SMOOTHING) * nll + SMOOTHING * (log_z - logits.mean(-1))
        total, plain, squares = (
            (weights * x).sum() / weights.sum() for x in (smoothed + 0.05 * log_z**2, nll, log_z**2)
        )
        return total, (plain, squares)

    (_, (plain, squares)), slopes = jax.jit(jax.value_and_grad(dense, has_aux=True))(adapters)
    step = make_train_step(model, config, KEEP_GRADIENT)
    own, state = (jax.tree.map(jnp.copy, adapters) for _ in range(2))
    _, found, metrics = step(own, state, model.params, batch, jax.random.key(0))
    assert distance(found, slopes) <= 1e-5
    assert distance(metrics["loss"], plain) <= 1e-5
    assert distance(metrics["z_loss"], squares) <= 1e-5
    assert metrics.keys() - OWN == {*objectives.metric_names(config)}


def test_smoothing_holds_no_more_logits_than_a_chunk():
    """Temporary memory grows by less than the logits of one chunk."""
    model = make_model(vocab_size=4096, num_hidden_layers=1)
    batch, temporary = random_batch(4, 64, 4096, weights=(1.0,)), []
    for smoothing in (0.0, SMOOTHING):
        config = make_config(
            *("train.batch_size=4", "train.remat=none", "train.loss_chunk=32"),
            *("adapter.target_modules=[q_proj]", f"train.label_smoothing={smoothing}"),
        )
        _, adapters = methods.init(jax.random.key(0), model.params, config.adapter)
        step = make_train_step(model, config, KEEP_GRADIENT)
        lowered = step.lower(adapters, adapters, model.params, batch, jax.random.key(0))
        temporary.append(lowered.compile().memory_analysis().temp_size_in_bytes)
    chunk, whole = (4 * 4096 * tokens for tokens in (32, 4 * 64))
    assert temporary[1] - temporary[0] < chunk and temporary[1] < whole


@pytest.mark.parametrize("value", [-0.1, 1.0, 2, float("nan")])
def test_smoothing_is_a_share_below_one(value):
    config = configs.Config(model="x", train=configs.TrainConfig(label_smoothing=value))
    message = "train.label_smoothing=.*(at least 0 and below 1|is not a finite number)"
    with pytest.raises(UserError, match=message):
        configs.check(config)


def test_the_name_in_transformers_leads_here():
    with pytest.raises(UserError, match="label_smoothing_factor.*train.label_smoothing"):
        configs.parse({"model": "x", "train": {"label_smoothing_factor": 0.1}})
