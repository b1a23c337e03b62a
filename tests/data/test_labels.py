"""Texts with a label: records, tokens, packing, cache."""

import dataclasses

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lora_jax import data
from lora_jax.errors import UserError

WORDS = "a b c d e f g h".split()


@pytest.fixture(scope="module")
def tokenizer():
    """[CLS] a b [SEP], and for pairs [CLS] a b [SEP] c [SEP], as BERT's."""
    vocab = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", cls_token="[CLS]")


def row(*texts, label="x", where="f.jsonl:1"):
    return data.LabelRow(texts, label, where)


def encode(rows, tokenizer, labels=("x", "y"), max_length=20, **options):
    return data.encode_labelled(rows, tokenizer, labels, max_length=max_length, **options)


@pytest.mark.parametrize(
    ("record", "texts", "label"),
    [
        ({"text": "a b", "label": "x"}, ("a b",), "x"),
        ({"sentence": "a", "label": 1, "idx": 7}, ("a",), "1"),
        ({"sentence1": "a", "sentence2": "b", "label": 0}, ("a", "b"), "0"),
        ({"premise": "a", "hypothesis": "b", "label": 2}, ("a", "b"), "2"),
        ({"question": "a", "sentence": "b", "label": True}, ("a", "b"), "True"),
    ],
)
def test_records(record, texts, label):
    assert data.parse_label_row(record, "here", None, "label") == row(
        *texts, label=label, where="here"
    )


def test_columns_by_name():
    record = {"name": "a", "more": "b", "kind": "x", "text": "c", "label": "y"}
    found = data.parse_label_row(record, "here", ["name", "more"], "kind")
    assert (found.texts, found.label) == (("a", "b"), "x")
    record = {"text": "a", "label": "x", "context": "b"}
    assert data.parse_label_row(record, "here", None, "label", ["context"]).texts == ("a",)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([], "must be an object, not a list"),
        ({"words": "a", "label": "x"}, "data.text"),
        ({"text": "a"}, "'label' is missing or null"),
        ({"text": None, "label": "x"}, "'text' is missing or null"),
        ({"text": 3, "label": "x"}, "'text' is a number, not a string"),
        ({"text": "a", "label": 0.5}, "'label' is a number"),
        ({"text": "a\ud800", "label": "x"}, "not valid Unicode"),
        ({"text": "a", "label": "x", "context": "b"}, "unknown keys: 'context'"),
        ({"text": "a", "label": "x", "weight": 2}, "'weight': rows have no weights"),
    ],
)
def test_bad_records(record, message):
    with pytest.raises(data.BadRow, match=message):
        data.parse_label_row(record, "here", None, "label")


def test_names_of_labels_stand_in_their_order():
    assert data.label_names([row(label=x) for x in ("10", "9", "-1", "9")]) == ("-1", "9", "10")
    assert data.label_names([row(label=x) for x in ("b", "10", "a")]) == ("10", "a", "b")


def test_the_label_is_the_last_token_and_the_only_one_to_be_learnt(tokenizer):
    (one, two), counts = encode([row("a b"), row("a b", "c", label="y")], tokenizer)
    assert one.tokens.tolist() == [2, 4, 5, 3, 0] and one.pair_start == 4
    assert two.tokens.tolist() == [2, 4, 5, 3, 6, 3, 1] and two.pair_start == 4
    for example in (one, two):
        assert example.loss_weights.tolist() == [0] * (len(example.tokens) - 1) + [1]
    assert (counts.examples, counts.supervised_tokens, counts.total_tokens) == (2, 2, 12)


def test_too_long(tokenizer):
    rows = [row("a b c d"), row("a b c d", "e f", where="f.jsonl:2"), row("a", where="f.jsonl:3")]
    cut, counts = encode(rows, tokenizer, max_length=6)
    assert [example.tokens.tolist() for example in cut] == [
        [2, 4, 5, 6, 3, 0],  # special tokens and label stay
        [2, 4, 3, 8, 3, 0],
        [2, 4, 3, 0],
    ]
    assert cut[1].pair_start == 3 and (counts.truncated, counts.longest) == (2, 10)
    dropped, counts = encode(rows, tokenizer, max_length=6, too_long="drop")
    assert [example.where for example in dropped] == ["f.jsonl:3"] and counts.dropped == 2
    with pytest.raises(UserError, match=r"f.jsonl:1: 7 tokens, more than data.max_length=6"):
        encode(rows, tokenizer, max_length=6, too_long="error")


def test_labels_that_nobody_named(tokenizer):
    rows = [row("a", label="z", where="f.jsonl:9"), row("b")]
    with pytest.raises(UserError, match="f.jsonl:9: label 'z' is not one of x, y"):
        encode(rows, tokenizer)
    examples, counts = encode(rows, tokenizer, on_bad_row="drop")
    assert len(examples) == 1 and counts.bad == 1


def test_packed_texts_leave_their_labels_out(tokenizer):
    examples, _ = encode([row("a b"), row("a", "c", label="y")], tokenizer)
    packed = data.to_row(examples, 13)
    assert packed["tokens"].tolist() == [2, 4, 5, 3, 0, 2, 4, 3, 6, 3, 1, 0, 0]
    assert packed["segment_ids"].tolist() == [1, 1, 1, 1, 0, 2, 2, 2, 2, 2, 0, 0, 0]
    assert packed["positions"].tolist() == [0, 1, 2, 3, 0, 0, 1, 2, 3, 4, 0, 0, 0]
    assert packed["token_types"].tolist() == [0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0]
    assert np.flatnonzero(packed["loss_weights"]).tolist() == [4, 10]
    batch = data.stack([examples, []], 13)  # a row of padding has types too
    assert batch["token_types"].shape == (2, 13) and not batch["token_types"][1].any()


def test_the_cache_keeps_where_the_second_text_begins(tokenizer, tmp_path):
    examples, counts = encode([row("a b"), row("a", "c", label="y")], tokenizer)
    plain = dataclasses.replace(examples[0], pair_start=None)
    for _ in range(2):
        found = data.cached_examples(tmp_path, {"k": "v"}, lambda: ([*examples, plain], counts))
    assert found.hit and [one.pair_start for one in found.examples] == [4, 3, None]


def test_a_label_is_not_for_a_model_that_writes(tokenizer):
    with pytest.raises(UserError, match="a label is for classifiers"):
        data.encode_all([row("a")], tokenizer, chat_template="none", max_length=9)
