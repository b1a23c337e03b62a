"""Encoders with a head that classifies texts: the table that their tests go through.

A new one is one more row of `ENCODERS`.
"""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Encoder:
    """The start of the names of its classes in transformers, and tiny models of it.

    Variants change the numbers in every field. `targets` are suffixes of modules with adapters.
    """

    classes: str
    variants: dict[str, dict[str, Any]]
    targets: tuple[str, ...] = ("query", "value", "intermediate.dense")
    saved: tuple[str, ...] = ("classifier",)  # modules that train in full
    size: tuple[tuple[str, str], ...] = ()  # names of `SIZE` here and in the family
    typed: bool = False  # its tokenizer marks the second text of a pair
    fixed: dict[str, Any] = field(default_factory=dict)  # fields of all variants

    @property
    def fields(self) -> dict[str, Any]:
        """Sizes of a tiny model; no two are equal."""
        return self.named(SIZE) | self.fixed

    def named(self, fields: dict[str, Any]) -> dict[str, Any]:
        """Fields by their names in the family."""
        names = dict(self.size)
        return {names.get(name, name): value for name, value in fields.items()}


FULL, SLIDING = "full_attention", "sliding_attention"
SIZE = dict(
    vocab_size=97,
    hidden_size=36,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=6,
    max_position_embeddings=40,
)
# Ids of transformers' defaults are beyond the vocabulary.
PLAIN_TOKENS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2)
ENCODERS = {
    "bert": Encoder(
        "Bert",
        {
            "plain": {},
            "others": dict(hidden_act="relu", layer_norm_eps=0.1, type_vocab_size=3),
        },
        typed=True,
    ),
    "roberta": Encoder(
        "Roberta",
        {
            "one type": dict(type_vocab_size=1),
            "others": dict(hidden_act="relu", pad_token_id=3),
        },
    ),
    "xlm-roberta": Encoder("XLMRoberta", {"one type": dict(type_vocab_size=1)}),
    "camembert": Encoder(
        "Camembert", {"one type": dict(type_vocab_size=1, layer_norm_eps=0.1)}
    ),
    "distilbert": Encoder(
        "DistilBert",
        {"plain": {}, "others": dict(activation="relu")},
        targets=("q_lin", "v_lin", "ffn.lin1"),
        saved=("classifier", "pre_classifier"),
        size=(
            ("hidden_size", "dim"),
            ("intermediate_size", "hidden_dim"),
            ("num_hidden_layers", "n_layers"),
            ("num_attention_heads", "n_heads"),
        ),
    ),
    "electra": Encoder(
        "Electra",
        {
            "plain": dict(embedding_size=36, hidden_act="relu"),
            "others": dict(embedding_size=20, layer_norm_eps=0.1, type_vocab_size=3),
        },
        typed=True,
    ),
    "modernbert": Encoder(
        "ModernBert",
        {
            "plain": {},
            "mean, biases, two rotations": dict(
                classifier_pooling="mean",
                norm_bias=True,
                attention_bias=True,
                mlp_bias=True,
                classifier_bias=True,
                local_attention=5,
                rope_parameters={
                    FULL: dict(rope_type="linear", rope_theta=500.0, factor=4.0),
                    SLIDING: dict(rope_type="default", rope_theta=100.0),
                },
            ),
            "window everywhere, other functions": dict(
                local_attention=4,
                layer_types=[SLIDING] * 3,
                hidden_activation="relu",
                classifier_activation="silu",
                norm_eps=0.1,
            ),
        },
        targets=("Wqkv", "mlp.Wo"),
        fixed=PLAIN_TOKENS,
    ),
}  # fmt: skip
