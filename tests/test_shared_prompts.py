"""Loss and gradients of rows whose texts share their starts, against rows of whole texts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import AdapterConfig, data, lora
from lora_jax.adapters import prefix
from lora_jax.models.common import Execution
from lora_jax.nn import kernels
from lora_jax.objectives import Bound, Compute, Forward, dpo, run_model, without_placeholders
from lora_jax.objectives.cross_entropy import plain_sums

from .data.test_shared_starts import pair, text
from .engines import random_adapters
from .families import FAMILIES, STATEFUL, random_model
from .test_engine import DECODERS
from .train.tiny import make_config

LENGTH = 160


def draw_batches(seed, places=0):
    """Batches of the same four pairs and eight texts with a preamble: whole and shared."""
    rng = np.random.default_rng(seed)
    draw = lambda n: rng.integers(1, 97, n).tolist()  # noqa: E731
    preamble = draw(15)
    pairs = [
        pair([*preamble, *draw(rng.integers(2, 9))], draw(rng.integers(1, 6)), draw(4))
        for _ in range(4)
    ]
    texts = [text([*preamble, *draw(rng.integers(4, 12))], 3) for _ in range(8)]
    batches = []
    for examples in (pairs, texts):
        examples = data.with_places(examples, places)
        rows = [examples[: len(examples) // 2], examples[len(examples) // 2 :]]
        length = LENGTH + 8 * places
        batches += [[data.stack(rows, length, share) for share in (False, True)]]
    return batches


def measure(model, config, batch, objective=None, kernel="xla"):
    """Loss of a batch, and the gradients of random adapters."""
    adapters = random_adapters(model, config, 1)
    compute = Compute(Execution(jnp.float32, kernel=kernel), chunk=64)
    batch = jax.tree.map(jnp.asarray, batch)

    @jax.jit
    def loss(adapters, params):
        bound = Bound(lora.bind(params, adapters, config), prefix(adapters, config))
        if objective is None:
            total, weight, _ = plain_sums(
                run_model(model, bound.params, batch, compute, bound.prefix)
            )
        else:
            forward = Forward(model, compute, bound, params, None, batch)
            total, weight, _ = objective(forward, batch, jax.random.key(0))
        return total / weight

    return jax.value_and_grad(loss)(adapters, model.params)


def check(error, model, config, both, **more):
    (loss, gradients), (expected, others) = (
        measure(model, config, batch, **more) for batch in reversed(both)
    )
    assert abs(float(loss - expected)) <= 1e-5 * max(1, abs(float(expected)))
    for ours, theirs in zip(*map(jax.tree.leaves, (gradients, others)), strict=True):
        assert float(jnp.abs(theirs).max()) > 1e-6  # the adapters are no no-ops
        assert error(ours, theirs) <= 1e-5


def plain(family, **more):
    return AdapterConfig(rank=3, alpha=5, target_modules=FAMILIES[family].targets, **more)


@pytest.mark.long_table(6)
@pytest.mark.parametrize(
    ("seed", "family"), [(i % 2, name) for i, name in enumerate(DECODERS) if name not in STATEFUL]
)
def test_families(error, seed, family):
    model = random_model(family, seed, **FAMILIES[family].fields)
    assert not getattr(model.config, "ropes_by_length", ())
    _, texts = draw_batches(seed)
    assert (texts[1]["segment_ids"] > 0).sum() < 0.6 * (texts[0]["segment_ids"] > 0).sum()
    check(error, model, plain(family), texts)


METHODS = {
    "prompt": dict(method="prompt", num_virtual_tokens=3, prompt_init="random"),
    "prefix": dict(method="prefix", num_virtual_tokens=3, prompt_init="random"),
    "gated": dict(method="prefix", num_virtual_tokens=3, prompt_init="random", prefix_gate=True),
    "dora": dict(rank=3, use_dora=True, target_modules="all-linear"),
}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("method", METHODS)
def test_pairs_of_other_methods(error, family, method):
    """DPO, with a reference from one more forward pass of the base."""
    fields = METHODS[method]
    if "target_modules" in fields:
        fields = fields | {"target_modules": FAMILIES[family].targets}
    model = random_model(family, **FAMILIES[family].fields)
    pairs, _ = draw_batches(3, places=3 if method == "prompt" else 0)
    objective = dpo.from_config(make_config("train.objective=dpo", "objective.beta=0.01"))
    check(error, model, AdapterConfig(**fields), pairs, objective=objective)


FUSED = [(kernel, family) for kernel in ("splash", "cudnn") for family in ("llama", "mistral")]


# gemma2 has a softcap, which cuDNN has not.
@pytest.mark.parametrize(("kernel", "family"), [*FUSED, ("splash", "gemma2")])
def test_fused_kernels(error, monkeypatch, family, kernel):
    """Splash is interpreted; cuDNN's call has JAX's own implementation, which runs here."""
    implementation = functools.partial(jax.nn.dot_product_attention, implementation="xla")
    monkeypatch.setattr(kernels, "_dot_product", implementation)
    model = random_model(family, **FAMILIES[family].fields)
    _, texts = draw_batches(5)
    ours = measure(model, plain(family), texts[1], kernel=kernel)
    theirs = measure(model, plain(family), texts[0])
    for one, other in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
        assert error(one, other) <= 1e-5


def test_placeholders_of_virtual_tokens_are_seen_by_nobody():
    pairs, _ = draw_batches(0, places=2)
    batch = without_placeholders(jax.tree.map(jnp.asarray, pairs[1]), 2)
    until, text = np.asarray(batch["seen_until"]), pairs[1]["segment_ids"] > 0
    gone = pairs[1]["positions"] < 2
    assert (text & gone).any() and not until[gone].any() and until[text & ~gone].all()
