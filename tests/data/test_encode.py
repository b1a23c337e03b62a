"""Rows of all kinds encoded together: limits, counts, problems, and texts and tokens."""

import numpy as np

from lora_jax.data import (
    Counts,
    TextRow,
    TokenRow,
    encode,
    encode_all,
    has_prompt,
    prompt_key,
)

from .byte_templates import CHATML, GEMMA, build, chat, encoded, error_of, marked


def test_truncate_drop_and_error():
    tokenizer = build(None)
    rows = [
        chat("qq", "aaaa", where="f:1"),  # 7 tokens
        chat("q", "a", where="f:2"),  # 3
        chat("q" * 6, "a", where="f:3"),  # 8, its answer begins after 5
    ]
    options = {"chat_template": "none", "max_length": 5}
    examples, counts = encode_all(rows, tokenizer, too_long="truncate", **options)
    assert [marked(e, tokenizer) for e in examples] == ["qq«aaa»", "q«a</s>»"]
    assert [e.where for e in examples] == ["f:1", "f:2"]
    assert counts == Counts(
        examples=2,
        supervised_tokens=5,
        total_tokens=8,
        truncated=1,
        dropped=1,
        longest=8,
        unaligned=0,
    )
    examples, counts = encode_all(rows, tokenizer, too_long="drop", **options)
    assert [marked(e, tokenizer) for e in examples] == ["q«a</s>»"]
    assert (counts.examples, counts.truncated, counts.dropped) == (1, 0, 2)
    text = error_of(encode_all, rows, tokenizer, too_long="error", **options)
    assert text.splitlines() == [
        "f:1: 7 tokens, more than data.max_length=5",
        "f:3: 8 tokens, more than data.max_length=5",
    ]
    assert text.splitlines()[0] == error_of(encode, rows[0], tokenizer, too_long="error", **options)
    assert encode(rows[2], tokenizer, **options) is None
    assert encode(rows[0], tokenizer, too_long="drop", **options) is None
    # exactly at the limit nothing is cut
    options["max_length"] = 8
    examples, counts = encode_all(rows, tokenizer, too_long="error", **options)
    assert (counts.examples, counts.truncated, counts.dropped, counts.longest) == (3, 0, 0, 8)


def test_data_sets_without_supervision_are_errors():
    rows = [chat("q", "a"), chat("q", "a~", where="f.jsonl:2")]
    text = error_of(encode_all, rows, build(), max_length=99)
    assert text.startswith("f.jsonl:2: no token is supervised")
    assert "f.jsonl:2: no token is" in error_of(encode, rows[1], build(), max_length=99)
    nothing = chat("", "", where="f.jsonl:3")  # EOS alone, with nothing to predict it from
    options = {"chat_template": "none", "max_length": 99}
    text = error_of(encode_all, [chat("q", "a"), nothing], build(), **options)
    assert text.startswith("f.jsonl:3: no token is supervised")
    assert "f.jsonl:3: no token" in error_of(encode, nothing, build(), **options)
    text = error_of(encode_all, [chat("q" * 50, "a")] * 2, build(), max_length=9)
    assert "no example is left of 2 rows: the longest has " in text
    assert "data.max_length=9" in text
    assert "no example is left of 0 rows" in error_of(encode_all, [], build(), max_length=9)


def test_problems_of_many_rows_are_told_together():
    rows = [chat("q", "a", system="s", where=f"f.jsonl:{n}") for n in range(1, 15)]
    lines = error_of(encode_all, rows, build(GEMMA), max_length=99).splitlines()
    assert len(lines) == 11
    assert lines[9].startswith("f.jsonl:10: the chat template refuses")
    assert lines[10] == "... and 4 more problems"


def test_more_rows_than_a_batch_of_the_tokenizer_keep_their_order():
    rows = [chat(f"{n}", f"{n}", where=f"f:{n}") for n in range(1030)]
    examples, counts = encode_all(rows, build(None), chat_template="none", max_length=99)
    assert counts.examples == 1030
    for n in (0, 1023, 1024, 1029):
        assert examples[n].where == f"f:{n}"
        assert marked(examples[n], build(None)) == f"{n}«{n}</s>»"


# Texts and tokens


def test_a_text_is_supervised_from_end_to_end():
    row = TextRow("a b ", "f:1")
    assert encoded(row, build(None)) == "a« b </s>»"  # nothing stands before the first token
    assert encoded(row, build(None, adds_bos=True)) == "<s>«a b </s>»"
    assert encoded(TextRow("<s>a</s>", "f:1"), build(None, adds_bos=True)) == "<s>«a</s>»"
    # neither template nor system prompt touches it
    options = {"system_prompt": "s", "chat_template": "none"}
    assert encoded(row, build(CHATML), system_prompt="s") == "a« b </s>»"
    assert encoded(row, build(CHATML), **options) == "a« b </s>»"
    text = error_of(encode, row, build(None, eos=None), max_length=9)
    assert "'models/tiny' has no EOS token" in text
    text = error_of(encode, TextRow("", "f:1"), build(None), max_length=9)
    assert text == "f:1: no token is supervised: the text is empty"


def test_a_text_asks_nothing():
    asks = [chat("q", "a"), TokenRow((5, 3, 9), (0.0, 0.0, 1.0), "f:1")]
    says = [TextRow("ab", "f:1"), TokenRow((5, 3, 9), (0.0, 1.0, 1.0), "f:1")]
    for tokenizer in (build(), build(adds_bos=True)):
        examples = [encode(row, tokenizer, max_length=99) for row in (*asks, *says)]
        assert [has_prompt(example) for example in examples] == [True, True, False, False]
        assert prompt_key(examples[1]) == np.array([5, 3], np.int32).tobytes()


def test_tokens_are_taken_as_they_are():
    row = TokenRow((5, 3, 9), (1.0, 0.5, 2.0), "f:1")
    example = encode(row, build(None), max_length=9)
    assert (example.tokens.dtype, example.loss_weights.dtype) == (np.int32, np.float32)
    assert example.tokens.tolist() == [5, 3, 9]
    assert example.loss_weights.tolist() == [0, 0.5, 2]  # nothing stands before the first
    assert row.loss_weights == (1.0, 0.5, 2.0)
    assert encode(row, build(None), max_length=2).tokens.tolist() == [5, 3]
    for weights in ((1.0, 0.0, 0.0), (0.0, 0.0, 0.0)):
        text = error_of(encode, TokenRow((5, 3, 9), weights, "f:1"), build(None), max_length=9)
        assert text == "f:1: no token is supervised: no weight after the first is above 0"
    assert "f:1: no token" in error_of(encode, TokenRow((), (), "f:1"), build(None), max_length=9)


def test_rows_of_all_kinds_keep_their_order():
    kinds = [chat("q", "a", where="f:1"), TextRow("bb", "f:2"), TokenRow((1, 2), (0, 1), "f:3")]
    rows = [kinds[n % 3] for n in range(1500)]
    examples, counts = encode_all(rows, build(CHATML), max_length=99)
    assert [example.where for example in examples] == [row.where for row in rows]
    assert [len(e.tokens) for e in examples[:3]] == [len(e.tokens) for e in examples[1497:]]
    assert (counts.examples, counts.unaligned) == (1500, 0)
