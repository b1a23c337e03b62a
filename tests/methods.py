"""The table of methods that every test of methods goes through, and tiny models for it.

A new method, init or field is one more row of `ROWS`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import AdapterConfig, Config, lora, tree
from lora_jax.config import DATA_INITS, TrainConfig
from lora_jax.models import describe
from lora_jax.models.common import Model
from lora_jax.quantize import quantize_tree
from lora_jax.targets import Trainable, find_trainable
from lora_jax.train import calibration

# No two axes are equal: layers, vocabulary, hidden, intermediate, queries (6 x 8), keys (2 x 8),
# rank.
TINY = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 36,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
# Without the emitters that take four fifths of the time of a compilation, for programs that run in
# no time; jax 0.11 has lost the choice.
QUICK = {"xla_cpu_use_fusion_emitters": False} if jax.__version_info__ < (0, 11) else {}
TOKENS = [3, 17, 90]  # rows for trainable_token_indices; every batch holds them
PATTERNS = {
    "target_modules": ["q_proj", "up_proj"],
    "rank_pattern": {r"layers\.2\.self_attn\.q_proj": 2, "up_proj": 3},
    "alpha_pattern": {r"[01]\.mlp\.up_proj": 9.0},
}


@dataclass(frozen=True)
class Row:
    """A valid combination: fields of AdapterConfig, and the model that they stand on."""

    fields: dict[str, Any]
    tied: bool = False
    bias: bool = False  # of the attention
    scheme: str | None = None  # how the base is quantised
    # How far the first logits may be from those of the base: another program computes these, which
    # a processor may round differently.
    start: float = 1e-6

    @property
    def config(self) -> AdapterConfig:
        usual = {"rank": 4, "alpha": 6.0, "target_modules": ["q_proj", "down_proj"]}
        return AdapterConfig(**({} if "method" in self.fields else usual) | self.fields)

    @property
    def hf_config(self) -> dict[str, Any]:
        return TINY | {"tie_word_embeddings": self.tied, "attention_bias": self.bias}


SVD = 1e-5  # W - s a b + s a b
NF4 = 0.5  # what LoftQ leaves of the error of NF4
ROWS = {
    "LoRA": Row({}),
    "LoRA of everything": Row({"target_modules": "all-linear"}, tied=True),
    "rsLoRA": Row({"use_rslora": True}),
    "DoRA": Row({"use_dora": True}),
    "rsLoRA, DoRA": Row({"use_rslora": True, "use_dora": True}, tied=True),
    "LoRA+": Row({"lora_plus_ratio": 16.0}),
    "LoRA+, DoRA": Row({"lora_plus_ratio": 16.0, "use_dora": True}),
    "LoRA+, PiSSA": Row({"lora_plus_ratio": 16.0, "init": "pissa"}, start=SVD),
    "LoRA+, NF4": Row({"lora_plus_ratio": 16.0}, scheme="nf4"),
    "LoRA-FA": Row({"freeze_a": True}),
    "LoRA-FA, DoRA, LoRA+": Row({"freeze_a": True, "use_dora": True, "lora_plus_ratio": 4.0}),
    "gaussian": Row({"init": "gaussian"}),
    "orthogonal": Row({"init": "orthogonal"}),
    "zero_a": Row({"init": "zero_a"}),
    "PiSSA": Row({"init": "pissa"}, tied=True, start=SVD),
    "PiSSA, rsLoRA": Row({"init": "pissa", "use_rslora": True}, start=SVD),
    "PiSSA, LoRA-FA": Row({"init": "pissa", "freeze_a": True}, start=SVD),
    "PiSSA, patterns": Row({"init": "pissa", **PATTERNS}, start=SVD),
    "PiSSA, head": Row({"init": "pissa", "target_modules": ["lm_head", "v_proj"]}, start=SVD),
    "PiSSA, tied embedding": Row(
        {
            "init": "pissa",
            "target_modules": ["embed_tokens", "v_proj"],
            "ensure_weight_tying": True,
        },
        tied=True,
        start=SVD,
    ),
    "OLoRA": Row({"init": "olora"}, start=SVD),
    "OLoRA, DoRA": Row({"init": "olora", "use_dora": True}, start=SVD),
    "EVA": Row({"init": "eva"}, tied=True),
    "EVA, rsLoRA, DoRA, patterns, NF4": Row(
        {"init": "eva", "use_rslora": True, "use_dora": True, **PATTERNS}, scheme="nf4"
    ),
    "LoRA-GA, rsLoRA, patterns": Row(
        {"init": "lora_ga", "use_rslora": True, **PATTERNS}, bias=True, start=SVD
    ),
    "LoRA-GA, DoRA, head": Row(
        {"init": "lora_ga", "use_dora": True, "target_modules": ["lm_head", "v_proj"]}, start=SVD
    ),
    "LoftQ": Row({"init": "loftq"}, start=NF4),
    "LoftQ of three rounds, DoRA, patterns": Row(
        {"init": "loftq", "loftq_iter": 3, "use_dora": True, **PATTERNS}, start=NF4
    ),
    "bias all": Row({"bias": "all"}, bias=True),
    "bias lora_only, a layer": Row(
        {"bias": "lora_only", "layers_to_transform": [1], "use_dora": True}, bias=True
    ),
    "norm whole": Row({"modules_to_save": ["model.norm"]}, tied=True),
    "one MLP whole": Row({"target_modules": ["q_proj"], "modules_to_save": ["1.mlp"]}),
    "biased layer whole, bias all": Row(
        {
            "target_modules": ["down_proj"],
            "modules_to_save": ["layers.2.self_attn"],
            "bias": "all",
        },
        bias=True,
    ),
    "embedding whole": Row({"modules_to_save": ["embed_tokens"]}),
    "embedding whole, untied by it": Row({"modules_to_save": ["embed_tokens"]}, tied=True),
    "embedding whole, tied": Row(
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, tied=True
    ),
    "head whole": Row({"modules_to_save": ["lm_head"]}),
    "head whole, untied by it": Row(
        {"modules_to_save": ["lm_head"], "ensure_weight_tying": False}, tied=True
    ),
    "embedding and head whole, untied": Row(
        {"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": False}, tied=True
    ),
    "embedding whole, head by LoRA": Row(
        {
            "modules_to_save": ["embed_tokens"],
            "target_modules": ["lm_head"],
            "ensure_weight_tying": False,
        },
        tied=True,
    ),
    "embedding": Row({"target_modules": ["embed_tokens", "q_proj"]}),
    "embedding, untied by it": Row({"target_modules": ["embed_tokens"]}, tied=True),
    "embedding, tied": Row(
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}, tied=True
    ),
    "embedding, DoRA": Row({"target_modules": ["embed_tokens"], "use_dora": True}, tied=True),
    "embedding, DoRA, tied": Row(
        {"target_modules": ["embed_tokens"], "use_dora": True, "ensure_weight_tying": True},
        tied=True,
    ),
    "head": Row({"target_modules": ["lm_head", "v_proj"]}),
    "head, DoRA, untied by it": Row(
        {"target_modules": ["lm_head"], "use_dora": True, "ensure_weight_tying": False},
        tied=True,
    ),
    "embedding and head, DoRA, untied": Row(
        {
            "target_modules": ["embed_tokens", "lm_head"],
            "use_dora": True,
            "ensure_weight_tying": False,
        },
        tied=True,
    ),
    "tokens": Row({"trainable_token_indices": TOKENS}),
    "tokens, tied": Row({"trainable_token_indices": TOKENS}, tied=True),
    "tokens, norms whole": Row(
        {"trainable_token_indices": TOKENS, "modules_to_save": ["input_layernorm"]}, bias=True
    ),
    "patterns, DoRA": Row({"use_dora": True, **PATTERNS}),
    "patterns, layers, rsLoRA, DoRA": Row(
        {"use_dora": True, "use_rslora": True, "layers_to_transform": [0, 2], **PATTERNS},
    ),
    "NF4": Row({"target_modules": "all-linear"}, scheme="nf4"),
    "int8": Row({}, tied=True, scheme="int8"),
    "DoRA, NF4": Row({"use_dora": True}, tied=True, scheme="nf4"),
    "DoRA, int8, rsLoRA": Row({"use_dora": True, "use_rslora": True}, scheme="int8"),
    "bias all, NF4": Row({"bias": "all"}, bias=True, scheme="nf4"),
    "VeRA": Row({"method": "vera", "rank": 5, "target_modules": ["q_proj", "down_proj"]}),
    "VeRA, layers, bias all, norm whole": Row(
        {
            "method": "vera",
            "rank": 40,  # more than some sides have
            "layers_to_transform": [0, 2],
            "bias": "all",
            "modules_to_save": ["model.norm"],
            "projection_prng_key": 7,
        },
        bias=True,
    ),
    "VeRA, head, untied by it": Row(
        {
            "method": "vera",
            "rank": 6,
            "target_modules": ["lm_head", "v_proj"],
            "ensure_weight_tying": False,
        },
        tied=True,
    ),
    "VeRA, NF4": Row({"method": "vera", "rank": 6, "d_initial": 0.5}, scheme="nf4"),
    "full": Row({"method": "full"}, bias=True),
    "full, tied": Row({"method": "full"}, tied=True),
}

# Methods that leave the parameters alone, and so have nothing to merge. The prompt is written over
# the first tokens of a batch.
VIRTUAL = {
    "prompt": Row({"method": "prompt", "num_virtual_tokens": 3, "prompt_init": "random"}),
    "prefix": Row({"method": "prefix", "num_virtual_tokens": 5, "prompt_init": "random"}),
    "gated prefix, NF4": Row(
        {"method": "prefix", "num_virtual_tokens": 5, "prompt_init": "random", "prefix_gate": True},
        scheme="nf4",
    ),
}


_quantize = jax.jit(quantize_tree, static_argnums=1, compiler_options=QUICK)


def tiny_model(hf_config: dict[str, Any], seed: int = 0, scheme: str | None = None) -> Model:
    """A model with every parameter random, quantised with `scheme` if one is given."""
    model, rng = describe(hf_config), np.random.default_rng(seed)

    def draw(path: tree.Path, leaf: Any) -> Any:
        noise = rng.standard_normal(leaf.shape).astype(np.float32)
        match path[-1]:
            case "scale":
                return jnp.asarray(1 + 0.2 * noise)
            case "kernel":
                return jnp.asarray(noise * leaf.shape[-2] ** -0.5)
            case _:
                return jnp.asarray(0.3 * noise)

    leaves = tree.flatten(model.params)
    params = tree.unflatten({path: draw(path, leaf) for path, leaf in leaves.items()})
    return model.replace(params=params if scheme is None else _quantize(params, scheme))


_losses: dict[str, jax.tree_util.Partial] = {}


def calibrate_on(model: Model, row: Row, batch: Mapping[str, Any]) -> jax.tree_util.Partial:
    """The loss of a batch, as a run gives it to data-driven inits: one function for each row, so
    that what is compiled for one batch is for all.
    """
    train = TrainConfig(batch_size=len(batch["tokens"]), remat="full")
    batch = jax.tree.map(jnp.asarray, dict(batch))
    new = calibration.calibrate_on(model, Config(adapter=row.config, train=train), [batch])
    old = _losses.setdefault(repr((row, model.hf_config)), new)
    return jax.tree_util.Partial(old.func, *new.args)


def start(row: Row, model: Model, seed: int) -> tuple[Mapping, dict]:
    """The base and fresh adapters, in the order of a run: what LoftQ leaves is NF4 then."""
    needs = {}
    if row.config.init in DATA_INITS:
        needs["calibrate"] = calibrate_on(model, row, make_batch(seed))
    if row.config.init == "loftq":
        needs["scheme"] = "nf4"
    base, adapters = lora.init(jax.random.key(seed), model.params, row.config, **needs)
    return _quantize(base, "nf4") if row.config.init == "loftq" else base, adapters


def trains(adapters: Any, found: Trainable) -> dict[tree.Path, np.ndarray]:
    """Of every leaf of the trainable tree, which numbers train: no padding, no layer that is not
    chosen, no frozen half.
    """
    masks: dict[tree.Path, Any] = {}
    for target in found.targets:
        real, chosen = target.rank_mask(), np.asarray(target.ranks) > 0
        masks[(*target.path, "lora_a")] = real * (not found.config.freeze_a)
        masks[(*target.path, "lora_b")] = np.swapaxes(real, -1, -2)
        by_layer = target.per_layer(chosen)
        masks[(*target.path, "magnitude")] = by_layer[..., 0] if target.stacked else chosen
        masks |= {(*target.path, name): np.zeros(()) for name in ("init_a", "init_b")}
        for name in ("lambda_d", "lambda_b"):
            masks[(*target.path, name)] = masks[(*target.path, "magnitude")]
    masks |= {(name,): np.zeros(()) for name in found.shared}
    masks |= {whole.trained: whole.mask() for whole in found.whole}
    masks |= {rows.trained: np.ones(()) for rows in found.rows}
    masks |= {(name,): np.ones(()) for name in found.virtual}
    return {
        path: np.broadcast_to(np.asarray(masks[path], bool), leaf.shape)
        for path, leaf in tree.flatten(adapters).items()
    }


def stirred(params: Any, adapters: Any, config: AdapterConfig, seed: int, size: float = 0.1) -> Any:
    """The adapters with noise on everything that could train, `lora_a` of LoRA-FA too."""
    masks = trains(adapters, find_trainable(params, config))
    rng = np.random.default_rng(seed)
    leaves = {}
    for path, leaf in tree.flatten(adapters).items():
        mask = masks[path] | (path[-1] == "lora_a" and config.freeze_a)
        noise = size * rng.standard_normal(leaf.shape) * mask
        leaves[path] = leaf + jnp.asarray(noise, jnp.float32)
    return tree.unflatten(leaves)


def make_batch(seed: int, rows: int = 4, time: int = 13, vocab: int = 97) -> dict[str, np.ndarray]:
    """Tokens of which a part is supervised; `TOKENS` are among them."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocab, (rows, time)).astype(np.int32)
    tokens[:, 2 : 2 + len(TOKENS)] = np.minimum(TOKENS, vocab - 1)
    weights = (rng.random((rows, time)) < 0.7).astype(np.float32)
    weights[0, : time // 2] = 0
    return {
        "tokens": tokens,
        "loss_weights": weights,
        "segment_ids": np.ones_like(tokens),
        "positions": np.tile(np.arange(time, dtype=np.int32), (rows, 1)),
    }


def names_of(fields):
    return "-".join(f"{key}={value}" for key, value in fields.items())
