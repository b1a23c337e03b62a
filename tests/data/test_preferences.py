"""Pairs of answers and answers with labels: forms of rows, refused rows, tokens, cuts."""

import io

import numpy as np
import pytest
from rich.console import Console
from transformers import AutoTokenizer

from lora_jax import data
from lora_jax.data import sets
from lora_jax.errors import UserError

from ..train.tiny import CHATML, make_config, write_rows, write_tokenizer

ASK = {"role": "user", "content": "What is 2+2?"}
YES, NO = ({"role": "assistant", "content": text} for text in ("4", "It is five."))
SYSTEM = {"role": "system", "content": "Be brief."}
HELLO = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
PAIR = {"prompt": ASK["content"], "chosen": "4", "rejected": "It is five."}
TEXT = f"<|im_start|>user\n{ASK['content']}<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory, CHATML)
    return AutoTokenizer.from_pretrained(directory)


def conversations(record, **options):
    """The messages of both conversations of a pair, without the flags of turns."""
    row = data.parse_pair(record, "rows.jsonl:1", **options)
    return [[{**turn, "train": None} for turn in text.messages] for text in row.texts]


def plain(*turns):
    return [{**turn, "train": None} for turn in turns]


@pytest.mark.parametrize(
    ("record", "start"),
    [
        (PAIR, [ASK]),
        (PAIR | {"system": "Be brief.", "id": 3, "score_chosen": 9.0}, [SYSTEM, ASK]),
        ({"prompt": [ASK], "chosen": [YES], "rejected": [NO]}, [ASK]),
        ({"prompt": [SYSTEM, ASK], "chosen": "4", "rejected": "It is five."}, [SYSTEM, ASK]),
        (PAIR | {"chosen": [ASK, YES], "rejected": [ASK, NO], "messages": [ASK, YES]}, [ASK]),
        ({"chosen": [ASK, YES], "rejected": [ASK, NO]}, [ASK]),
        ({"chosen": [*HELLO, ASK, YES], "rejected": [*HELLO, ASK, NO]}, [*HELLO, ASK]),
        ({"prompt": [*HELLO, ASK], "chosen": [YES], "rejected": [NO]}, [*HELLO, ASK]),
    ],
)
def test_forms_of_a_pair(record, start):
    assert conversations(record) == [plain(*start, YES), plain(*start, NO)]
    for text in data.parse_pair(record, "rows.jsonl:1").texts:
        flags = [turn.get("train", True) for turn in text.messages if turn["role"] == "assistant"]
        assert flags == [False] * (len(flags) - 1) + [True]


def test_a_prompt_made_of_columns():
    record = {"question": "2+2?", "chosen": "4", "rejected": "5", "persona": "a", "system": "x"}
    found = conversations(record, prompt="Q: {question}")
    asked = {"role": "user", "content": "Q: 2+2?"}
    start = [{"role": "system", "content": "x"}, asked]
    five = {"role": "assistant", "content": "5"}
    assert found == [plain(*start, YES), plain(*start, five)]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "a", "completion": "b"}, "no 'chosen' and no 'rejected'.*train.objective=sft"),
        ({"prompt": "a", "completion": "b", "label": True}, "train.objective=kto"),
        ({"prompt": "a", "chosen": "b"}, "no 'rejected': this objective needs pairs"),
        (PAIR | {"rejected": "4"}, "'chosen' and 'rejected' are equal"),
        (PAIR | {"rejected": " "}, "the answer of 'rejected' is empty"),
        (PAIR | {"rejected": ""}, "the answer of 'rejected' is empty"),
        ({"chosen": "a b", "rejected": "a c"}, "no 'prompt', and 'chosen' is a string"),
        (PAIR | {"chosen": 3}, "'chosen' is a number"),
        (PAIR | {"persona": "a"}, "unknown keys: 'persona'"),
        (PAIR | {"label": True}, "unknown keys: 'label'"),
        ({"chosen": [ASK, YES], "rejected": [HELLO[0], NO]}, "answers to different prompts"),
        ({"chosen": [ASK, YES], "rejected": [ASK]}, "'rejected' has no assistant turn"),
        (PAIR | {"chosen": [HELLO[0], YES], "rejected": [ASK, NO]}, "'user' turn that is not"),
        ([1], "a row must be an object"),
    ],
)
def test_a_refused_pair(record, message):
    with pytest.raises(data.BadRow, match=message):
        data.parse_pair(record, "rows.jsonl:1")


def test_answers_with_labels():
    record = {"prompt": ASK["content"], "completion": "4", "label": False}
    row = data.parse_judged(record, "rows.jsonl:1")
    assert row.row.messages == (ASK, YES) and row.desirable is False and row.answer is None
    row = data.parse_judged({"prompt": [*HELLO, ASK], "completion": [YES], "label": 1}, "w")
    assert [turn.get("train", True) for turn in row.row.messages] == [True, False, True, True]
    assert row.desirable is True and row.answer is row.row


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (PAIR, "no 'completion' and no 'label'.*these are pairs"),
        ({"prompt": "a", "completion": "b"}, "no 'label'.*train.objective=sft"),
        ({"prompt": "a", "completion": "b", "label": "yes"}, "'label' is a string"),
        ({"prompt": "a", "completion": "b", "label": 2}, "'label' is a number"),
        ({"prompt": "a", "completion": " ", "label": True}, "the answer of 'completion' is empty"),
    ],
)
def test_a_refused_answer_with_a_label(record, message):
    with pytest.raises(data.BadRow, match=message):
        data.parse_judged(record, "rows.jsonl:1")


def make_encoder(tokenizer, *overrides):
    config = make_config("train.objective=dpo", "data.cache=false", *overrides)
    return sets.Encoder(config, tokenizer, "digest", Console(file=io.StringIO(), width=500))


def test_a_pair_is_one_example_of_two_texts(tokenizer, tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", [PAIR])
    (example,) = make_encoder(tokenizer).examples(str(file), "data.train")
    texts = example.texts
    decoded = [tokenizer.decode(text.tokens) for text in texts]
    assert decoded == [f"{TEXT}4<|im_end|>", f"{TEXT}It is five.<|im_end|>"]
    answers = [tokenizer.decode(text.tokens[text.loss_weights > 0]) for text in texts]
    assert answers == ["4<|im_end|>", "It is five.<|im_end|>"]
    row = data.to_row([example, example], 256)
    first, second = len(texts[0].tokens), len(texts[1].tokens)
    lengths = [first, second, first, second]
    rest = [256 - sum(lengths)]
    for name, values in {
        "segment_ids": [1, 2, 3, 4, 0],
        "pair_ids": [1, 1, 2, 2, 0],
        "roles": [data.CHOSEN, data.REJECTED, data.CHOSEN, data.REJECTED, 0],
    }.items():
        np.testing.assert_array_equal(row[name], np.repeat(values, lengths + rest))
    np.testing.assert_array_equal(row["positions"][first : first + second], np.arange(second))


def test_a_label_is_a_role_and_the_second_text_has_the_next_answer(tokenizer, tmp_path):
    rows = [
        {"prompt": name, "completion": name * 2, "label": label}
        for name, label in (("a", True), ("b", False), ("c", True))
    ]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    encoder = make_encoder(tokenizer, "train.objective=kto")
    examples = encoder.examples(str(file), "data.train")
    assert [one.roles[0] for one in examples] == [data.CHOSEN, data.REJECTED, data.CHOSEN]
    assert {one.roles[1] for one in examples} == {data.OTHER}
    for example, own, other in zip(examples, "abc", "bca", strict=True):
        text = f"<|im_start|>user\n{own}<|im_end|>\n<|im_start|>assistant\n"
        decoded = [tokenizer.decode(one.tokens) for one in example.texts]
        assert decoded == [f"{text}{answer * 2}<|im_end|>" for answer in (own, other)]
    encoder = make_encoder(tokenizer, "train.objective=kto")
    with pytest.raises(UserError, match=r"rows.jsonl:1: the only row.*needs two"):
        encoder.examples(str(write_rows(tmp_path / "rows.jsonl", rows[:1])), "data.train")


def test_long_pairs_are_cut_alike_or_dropped(tokenizer, tmp_path):
    """The longer text is cut first, and a pair that is cut to nothing is dropped and counted."""
    start = len(TEXT) - len("<|im_start|>") * 2 - len("<|im_end|>") + 3  # a token per byte
    rows = [
        PAIR | {"rejected": "5" * 200},  # one text is cut
        PAIR | {"chosen": "4" * 100, "rejected": "5" * 100},  # both are
        PAIR | {"chosen": "4" * 100 + "!", "rejected": "4" * 100 + "?"},  # they differ behind it
        PAIR | {"prompt": "long" * 40},  # no room for an answer
    ]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    encoder = make_encoder(tokenizer, "data.max_length=120")
    first, second = encoder.examples(str(file), "data.train")
    short = start + 2  # "4" and its end
    assert [len(text.tokens) for text in first.texts] == [short, 120 - short]
    assert [len(text.tokens) for text in second.texts] == [60, 60]
    counts = encoder.counts["data.train"]
    assert (counts.truncated, counts.dropped, counts.bad) == (2, 2, 0)
    with pytest.raises(UserError, match=r"rows.jsonl:1: the two texts have \d+ tokens together"):
        make_encoder(tokenizer, "data.max_length=120", "data.too_long=error").examples(
            str(file), "data.train"
        )


def test_unusable_pairs_are_an_error_with_their_lines_or_counted(tokenizer, tmp_path):
    rows = [PAIR, PAIR | {"rejected": "4"}, PAIR | {"chosen": ""}, PAIR]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(UserError) as error:
        make_encoder(tokenizer).examples(str(file), "data.train")
    assert "rows.jsonl:2: 'chosen' and 'rejected' are equal" in str(error.value)
    assert "rows.jsonl:3: the answer of 'chosen' is empty" in str(error.value)
    encoder = make_encoder(tokenizer, "data.on_bad_row=drop")
    assert len(encoder.examples(str(file), "data.train")) == 2
    assert encoder.counts["data.train"].bad == 2


def test_answers_that_a_template_renders_alike_are_refused(tokenizer, tmp_path):
    rows = [PAIR | {"chosen": "4", "rejected": "4 "}, PAIR]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    trimmed = tmp_path / "trim.jinja"
    trimmed.write_text(CHATML.replace("m['content']", "m['content'] | trim"))
    with pytest.raises(UserError, match=r"rows.jsonl:1: 'chosen' and 'rejected' have the same"):
        make_encoder(tokenizer, f"data.chat_template={trimmed}").examples(str(file), "data.train")


def test_cached_pairs_are_the_same_and_another_form_is_another_entry(
    tokenizer, tmp_path, monkeypatch
):
    monkeypatch.setenv("LORA_JAX_CACHE", str(tmp_path / "cache"))
    file = write_rows(tmp_path / "rows.jsonl", [PAIR, PAIR | {"chosen": "four"}])
    encoder = make_encoder(tokenizer, "data.cache=true")
    built, cached = (encoder.examples(str(file), "data.train") for _ in range(2))
    assert len([*(tmp_path / "cache").rglob("*.examples")]) == 1
    for one, other in zip(built, cached, strict=True):
        assert (one.second_start, one.roles) == (other.second_start, other.roles)
        np.testing.assert_array_equal(one.tokens, other.tokens)
    with pytest.raises(UserError, match="train.objective=dpo trains on pairs"):
        make_encoder(tokenizer, "data.cache=true", "train.objective=sft").examples(
            str(file), "data.train"
        )


def test_virtual_tokens_come_before_both_texts(tokenizer, tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", [PAIR])
    (example,) = make_encoder(tokenizer).examples(str(file), "data.train")
    (longer,) = data.with_places([example], 3)
    for text, before in zip(longer.texts, example.texts, strict=True):
        np.testing.assert_array_equal(text.tokens[3:], before.tokens)
        assert not text.loss_weights[:3].any()
    assert longer.roles == example.roles
