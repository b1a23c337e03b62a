"""Resolution of what a config trains: adapted weights, fully trained weights, token rows.

Users name modules by their Hugging Face paths, which match by PEFT's rules. `find_trainable`
translates them into paths of the tree. A trainable leaf is next to the weight that it belongs to:

    model/layers/self_attn/q_proj/{lora_a, lora_b}     a low-rank update
    model/layers/self_attn/q_proj/magnitude            DoRA's norm of every column
    model/norm/full_scale, lm_head/full_kernel         the weight itself, trained
    model/embed_tokens/trainable_tokens                rows of an embedding
    prompt_embeddings                                  virtual tokens (p, d)
    prefix_{keys,values,gate}                          virtual keys and values (layers, p, k * h)

A model with tied embeddings has no `lm_head` in its tree. A config can still name it, and it then
has leaves of its own.
"""

from lora_jax.targets.checks import check_init
from lora_jax.targets.find import as_trainable, find_targets, find_trainable
from lora_jax.targets.kinds import (
    HEAD,
    FullWeight,
    Leaf,
    Target,
    Trainable,
    TrainableTokens,
)

__all__ = [
    "HEAD",
    "Leaf",
    "TrainableTokens",
    "Target",
    "Trainable",
    "FullWeight",
    "as_trainable",
    "check_init",
    "find_targets",
    "find_trainable",
]
