"""What a config trains: weights that take an adapter, weights that train whole, rows of tokens.

Users name modules by their Hugging Face path, with the rules of PEFT; `find_trainable` is the only
place that translates. The trainable tree has its leaves beside the weights they belong to:

    model/layers/self_attn/q_proj/{lora_a, lora_b}     an update of low rank
    model/layers/self_attn/q_proj/magnitude            DoRA's size of every column
    model/norm/full_scale, lm_head/full_kernel         the weight itself, trained
    model/embed_tokens/trainable_tokens                rows of an embedding
    prompt_embeddings                                  virtual tokens (p, d)
    prefix_{keys,values,gate}                          the same in every layer (layers, p, k * h)

A model whose embedding is its output head too (tied) has no `lm_head` in its tree; it can still be
named, and then has leaves of its own.
"""

from lora_jax.targets.checks import check_init
from lora_jax.targets.find import find_targets, find_trainable
from lora_jax.targets.kinds import (
    HEAD,
    Rows,
    Target,
    Trainable,
    Whole,
)

__all__ = [
    "HEAD",
    "Rows",
    "Target",
    "Trainable",
    "Whole",
    "check_init",
    "find_targets",
    "find_trainable",
]
