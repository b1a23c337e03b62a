"""Losses of preferences against TRL's own functions: values, gradients, micro-batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from lora_jax import adapters as methods
from lora_jax import data, objectives
from lora_jax.data.examples import Example
from lora_jax.objectives import Compute, run_model
from lora_jax.train.step import make_train_step

from ..train.test_step import KEEP_GRADIENT
from ..train.tiny import distance, make_config, random_adapters, tiny_model
from . import trl_losses

PAIR, GOOD, BAD = (data.CHOSEN, data.REJECTED), (data.CHOSEN, data.OTHER), (data.REJECTED, 3)
TIME = 48


@pytest.fixture(scope="module")
def model():
    return tiny_model(num_hidden_layers=1, tie_word_embeddings=False)


def make_batch(rows, seed=0):
    """A batch of rows, each a list of roles of pairs, whose texts have random lengths."""
    rng = np.random.default_rng(seed)

    def text():
        asked, answered = rng.integers(1, 4), rng.integers(1, 7)
        weights = np.r_[np.zeros(asked), np.ones(answered)].astype(np.float32)
        return Example(rng.integers(3, 272, len(weights)).astype(np.int32), weights, "row")

    examples = [[data.join(text(), text(), roles) for roles in row] for row in rows]
    batch = data.stack(examples, TIME)
    noise = rng.normal(-4, 1, batch["tokens"].shape).astype(np.float32)
    batch["reference_log_probs"] = noise * (batch["loss_weights"] > 0)
    return batch


def settings(objective, *overrides):
    common = ("train.batch_size=4", "train.remat=none", "train.loss_chunk=10", "adapter.rank=4")
    targets = "adapter.target_modules=[q_proj, lm_head]"
    return make_config(f"train.objective={objective}", *common, targets, *overrides)


def texts_of(batch, role):
    """(rows, columns) of every text with a role, in order."""
    ids, roles = np.asarray(batch["pair_ids"]), np.asarray(batch["roles"])
    for row in range(len(ids)):
        for pair in range(1, ids[row].max() + 1):
            if (here := (ids[row] == pair) & (roles[row] == role)).any():
                yield row, np.flatnonzero(here)


def as_texts(values, batch, roles):
    """Values (b, t) as a matrix with a row for each text, padded with 0: all texts of the first
    role, then all of the next.
    """
    texts = [values[row, columns] for role in roles for row, columns in texts_of(batch, role)]
    length = max(map(len, texts))
    pad = torch.nn.functional.pad
    return torch.stack([pad(text, (0, length - len(text))) for text in texts])


def trl_loss(config, log_probs, batch):
    """TRL's loss of a batch, of torch log-probabilities (b, t)."""
    tensors = {n: torch.tensor(np.asarray(x)) for n, x in batch.items()}
    reference, mask = tensors["reference_log_probs"], (tensors["loss_weights"] > 0).long()
    name, own, both = config.train.objective, config.objective, PAIR
    if name == "kto":
        both = (data.CHOSEN, data.REJECTED)
        labels = [True] * len([*texts_of(batch, both[0])])
        labels += [False] * len([*texts_of(batch, both[1])])
        found = [as_texts(x, batch, both) for x in (log_probs, reference, mask)]
        other = [as_texts(x, batch, (data.OTHER,)) for x in (log_probs, reference)]
        weights = {n: getattr(own, n) for n in ("desirable_weight", "undesirable_weight")}
        first, second, where = found
        labels = torch.tensor(labels)
        return trl_losses.kto(first, second, *other, where, labels, beta=0.1, **weights)
    ours, theirs, where = (as_texts(x, batch, both) for x in (log_probs, reference, mask))
    if name == "orpo":
        sft = -(ours * where).chunk(2)[0].sum() / where.chunk(2)[0].sum()
        return trl_losses.orpo(ours, where, beta=own.beta) + sft
    if name == "simpo":
        return trl_losses.simpo(ours, where, 2.0, own.gamma, own.label_smoothing)
    kind = {"ipo": "ipo", "dpo": "sigmoid_norm" if own.length_normalize else "sigmoid"}[name]
    sft = own.sft_weight or 0.0
    kinds, weights = [kind, "sft"], [1.0, sft]
    if not own.label_smoothing:
        return trl_losses.dpo(ours, theirs, where, 0.3, kinds=kinds, weights=weights)
    # Conservative DPO is the loss of aot over pairs that are not sorted; TRL has it as (1 - 2 e)
    # times its robust loss, plus 2 e times that of the flipped pair.
    e = own.label_smoothing
    flip = [x.roll(len(x) // 2, 0) for x in (ours, theirs, where)]
    of = lambda x: trl_losses.dpo(*x, 0.3, kinds=["sigmoid"], weights=[1.0])  # noqa: E731
    return (1 - e) * of((ours, theirs, where)) + e * of(flip)


CASES = {
    "dpo": ("dpo", "objective.beta=0.3"),
    "dpo-normalized": ("dpo", "objective.beta=0.3", "objective.length_normalize=true"),
    "dpo-sft": ("dpo", "objective.beta=0.3", "objective.sft_weight=0.7"),
    "dpo-smoothed": ("dpo", "objective.beta=0.3", "objective.label_smoothing=0.2"),
    "ipo": ("ipo", "objective.beta=0.3"),
    "orpo": ("orpo", "objective.beta=0.25"),
    "simpo": ("simpo", "objective.gamma=0.8", "objective.label_smoothing=0.1"),
    "kto": ("kto", "objective.undesirable_weight=1.5", "objective.desirable_weight=0.5"),
}


@pytest.mark.long_table(5)
@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_equal_trl(model, case):
    """The loss of a step over two micro-batches is the mean of TRL's losses of both, and gradients
    are TRL's with respect to log-probabilities, taken on to the adapters.
    """
    config = settings(*CASES[case])
    rows = [[GOOD, BAD], [BAD], [BAD, GOOD], [GOOD]]
    if case != "kto":
        rows = [[PAIR, PAIR], [PAIR], [PAIR, PAIR], [PAIR]]
    # Micro-batches of 2 take rows 0 and 2, 1 and 3.
    parts = [[0, 2], [1, 3]] if case == "kto" else [[0, 1, 2, 3]]
    if case == "kto":
        rows[1], rows[3] = [BAD, GOOD], [GOOD, GOOD]
    batch = make_batch(rows)
    config = settings(*CASES[case], "train.micro_batch_size=2")
    _, start = methods.init(jax.random.key(0), model.params, config.adapter)
    adapters = random_adapters(start)

    def log_probs(adapters):
        bound = methods.bind(model.params, adapters, config.adapter)
        return run_model(model, bound, batch, Compute()).log_probs()

    values, back = jax.jit(lambda a: jax.vjp(log_probs, a))(adapters)
    leaf = torch.tensor(np.asarray(values), requires_grad=True)
    expected = sum(
        trl_loss(config, leaf[part], {n: x[part] for n, x in batch.items()}) for part in parts
    ) / len(parts)
    expected.backward()
    (slopes,) = back(jnp.asarray(leaf.grad.numpy()))

    step = make_train_step(model, config, KEEP_GRADIENT)
    own, state = (jax.tree.map(jnp.copy, adapters) for _ in range(2))
    _, found, metrics = step(own, state, model.params, batch, jax.random.key(0))
    total = metrics["loss"]
    if case == "dpo-sft":
        total = total + 0.7 * metrics["sft_loss"]
    assert distance(total, expected.item()) <= 1e-5
    assert distance(found, slopes) <= 1e-5
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(slopes)) > 1e-4
    assert metrics.keys() - {"loss", "grad_norm", "supervised_tokens"} == {
        *objectives.metric_names(config)
    }


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_without_log_probabilities_the_reference_is_the_frozen_model(model, objective):
    """A step that gets none takes those of the parameters without adapters."""
    config = settings(objective)
    batch = make_batch(
        [[PAIR], [PAIR], [PAIR], [PAIR]] if objective == "dpo" else [[GOOD, BAD]] * 4
    )
    alone = {name: x for name, x in batch.items() if name != "reference_log_probs"}
    of_base = jax.jit(lambda params: run_model(model, params, batch, Compute()).log_probs())
    reference = of_base(model.params)
    _, start = methods.init(jax.random.key(0), model.params, config.adapter)
    step, adapters = make_train_step(model, config, KEEP_GRADIENT), random_adapters(start)
    found = []
    for given in (alone, alone | {"reference_log_probs": reference}):
        own, state = (jax.tree.map(jnp.copy, adapters) for _ in range(2))
        _, slopes, metrics = step(own, state, model.params, given, jax.random.key(0))
        found.append((slopes, metrics))
    assert distance(found[0], found[1]) <= 1e-6
    assert abs(float(found[0][1]["margin"])) > 1e-3


def test_metrics_are_those_of_the_pairs(model):
    """Means over pairs of margins, wins, log-probabilities and drifts; a divergence above 0."""
    config = settings("dpo", "objective.beta=0.3")
    batch = make_batch([[PAIR, PAIR], [PAIR], [PAIR], []])
    _, start = methods.init(jax.random.key(0), model.params, config.adapter)
    adapters = random_adapters(start)

    def log_probs(adapters):
        bound = methods.bind(model.params, adapters, config.adapter)
        return run_model(model, bound, batch, Compute()).log_probs()

    values = torch.tensor(np.asarray(jax.jit(log_probs)(adapters)))
    reference = torch.tensor(batch["reference_log_probs"])
    chosen, rejected = as_texts(values, batch, PAIR).sum(1).chunk(2)
    gains = as_texts(values - reference, batch, PAIR).sum(1).chunk(2)
    margins = 0.3 * (gains[0] - gains[1])
    step = make_train_step(model, config, KEEP_GRADIENT)
    state = jax.tree.map(jnp.copy, adapters)
    _, _, metrics = step(adapters, state, model.params, batch, jax.random.key(0))
    expected = {
        "margin": margins.mean(),
        "accuracy": (margins > 0).float().mean(),
        "chosen_log_prob": chosen.mean(),
        "rejected_log_prob": rejected.mean(),
        "chosen_drift": gains[0].mean(),
        "rejected_drift": gains[1].mean(),
    }
    for name, value in expected.items():
        assert distance(metrics[name], value) <= 1e-5, name
    assert float(metrics["kl"]) > 0
    assert float(metrics["supervised_tokens"]) == (batch["loss_weights"] > 0).sum()


@pytest.mark.parametrize("objective", ["dpo", "ipo", "orpo", "kto"])
def test_a_step_over_pairs_takes_the_flops_of_a_step_over_its_tokens(objective):
    """The logits are computed once, for the values and for their gradients."""
    model = tiny_model(vocab_size=4096, num_hidden_layers=1, tie_word_embeddings=False)
    batch, found = make_batch([[PAIR, PAIR], [PAIR]]), []
    for name in ("sft", objective):
        config = settings(name, "adapter.target_modules=[q_proj]", "train.loss_chunk=1024")
        adapters = methods.init(jax.random.key(0), model.params, config.adapter)[1]
        step = make_train_step(model, config, KEEP_GRADIENT)
        lowered = step.lower(adapters, adapters, model.params, batch, jax.random.key(0))
        found.append(lowered.compile().cost_analysis()["flops"])
    assert found[1] <= 1.03 * found[0]
