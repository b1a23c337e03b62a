"""Bits per byte of held-out text."""

import math

import numpy as np
import pytest

from lora_jax.data import Example
from lora_jax.train.bits import bits_per_nat, with_bits


class Letters:
    """A tokenizer whose token i is the text of `texts[i]`; 0 is special."""

    texts = ("", "ab", "é", "c")

    def decode(self, ids, skip_special_tokens, clean_up_tokenization_spaces):
        assert skip_special_tokens and not clean_up_tokenization_spaces
        return "".join(self.texts[i] for i in ids)


def example(tokens, weights):
    return Example(np.array(tokens, np.int32), np.array(weights, np.float32), "rows.jsonl:1")


def test_the_factor_counts_supervised_tokens_and_their_bytes():
    examples = [example([3, 1, 2, 0], [0, 1, 1, 1]), example([3, 3], [0, 1])]
    # four tokens: two bytes, two bytes, none of the special one, one byte
    assert bits_per_nat(examples, Letters()) == pytest.approx(4 / (math.log(2) * 5))


def test_a_uniform_model_over_256_bytes_has_8_bits_per_byte():
    factor = bits_per_nat([example([3, 3, 3], [0, 1, 1])], Letters())
    pair = with_bits({"loss_before": math.log(256), "loss_after": 0.0, "examples": 1}, factor)
    assert pair["bits_per_byte_before"] == pytest.approx(8)
    assert list(pair) == [
        *("loss_before", "loss_after", "bits_per_byte_before", "bits_per_byte_after", "examples")
    ]


def test_without_bytes_or_a_score_there_are_no_bits():
    assert bits_per_nat([example([3, 0], [0, 1])], Letters()) is None
    assert with_bits(None, 1.0) is None
    assert with_bits({"loss_before": None, "loss_after": 1.0}, None) == {
        "loss_before": None,
        "loss_after": 1.0,
    }
    assert with_bits({"loss_before": None, "loss_after": 1.0}, 2.0) == {
        "loss_before": None,
        "loss_after": 1.0,
        "bits_per_byte_before": None,
        "bits_per_byte_after": 2.0,
    }
