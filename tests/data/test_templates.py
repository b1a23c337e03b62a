"""Supervised text, against masks written by hand: «supervised» in the rendered conversation.

The tokenizer knows one token per byte, and the special tokens: a mask reads as its text does.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lora_jax.data import (
    Row,
    TextRow,
    encode,
    encode_all,
    prompt_tokens,
    resolve_template,
    stop_tokens,
)
from lora_jax.errors import UserError

from .byte_templates import (
    BARE,
    CHATML,
    GEMMA,
    GOLDEN,
    LLAMA2,
    LLAMA3,
    MISTRAL,
    PHI,
    QWEN3,
    REWRITES,
    ZEPHYR,
    build,
    chat,
    encoded,
    error_of,
    marked,
)


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize("trim_offsets", [False, True])
def test_masks_of_two_turns(name, trim_offsets):
    template, expected = GOLDEN[name]
    tokenizer = build(template, trim_offsets=trim_offsets)
    assert encoded(chat("q", "a b", "r", "c"), tokenizer) == expected


@pytest.mark.parametrize("name", GOLDEN)
def test_a_prompt_is_the_part_of_the_example_before_its_answer(name):
    tokenizer = build(GOLDEN[name][0])
    row = chat("q", "a b", "r", "c")
    prompt = prompt_tokens(row, tokenizer)
    assert prompt.dtype == np.int32
    expected = GOLDEN[name][1].rpartition("«")[0].replace("«", "").replace("»", "")
    assert tokenizer.decode(prompt, clean_up_tokenization_spaces=False) == expected
    tokens = encode(row, tokenizer, max_length=1000).tokens
    np.testing.assert_array_equal(tokens[: len(prompt)], prompt)


@pytest.mark.parametrize(
    ("name", "ends"),
    [
        *[("chatml", ["<|im_end|>"]), ("llama3", ["<|eot_id|>"]), ("gemma", ["<end_of_turn>"])],
        *[("phi", ["<|end|>"]), ("qwen3", ["<|im_end|>"])],
        *[(name, []) for name in ("mistral", "zephyr", "llama2", "no end-of-turn")],
    ],
)
def test_stop_tokens_are_eos_and_the_end_of_turn(name, ends):
    tokenizer = build(GOLDEN[name][0])
    ids = {tokenizer.convert_tokens_to_ids(token) for token in ["</s>", *ends]}
    assert stop_tokens(tokenizer) == ids
    assert stop_tokens(tokenizer, extra=[7, 8]) == ids | {7, 8}


def test_stop_tokens_of_plain_text_and_of_templates_that_want_a_system_turn():
    eos = build().eos_token_id
    assert stop_tokens(build(), "none") == {eos}
    assert stop_tokens(build(eos=None), "none") == frozenset()
    wants = (
        "{% if messages[0]['role'] != 'system' %}{{ raise_exception('no') }}{% endif %}" + CHATML
    )
    assert stop_tokens(build(wants)) == {eos, build().convert_tokens_to_ids("<|im_end|>")}
    assert stop_tokens(build(QWEN3)) == stop_tokens(build(wants))
    assert stop_tokens(build(None), extra=[7]) == {eos, 7}  # of plain texts, EOS
    assert stop_tokens(build(None, eos=None)) == frozenset()
    text = error_of(stop_tokens, build("{{ raise_exception('never') }}"))
    assert text == "a sample conversation: the chat template refuses this conversation: never"
    text = error_of(stop_tokens, build("{{ raise_exception('x' * 100000) }}"))
    assert "refuses this conversation: xxx" in text and len(text) < 500


def test_train_false_and_what_follows_the_last_supervised_turn():
    tokenizer = build()
    head = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    tail = "\n<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n«c<|im_end|>»"
    assert encoded(chat("q", "a~", "r", "c"), tokenizer) == head + "a<|im_end|>" + tail
    assert encoded(chat("q", "a", "r", "c~"), tokenizer) == head + "«a<|im_end|>»"
    assert encoded(chat("q", "a", "r"), tokenizer) == head + "«a<|im_end|>»"
    # and so the last supervised turn is rendered as a last one
    text = encoded(chat("q", "a", "r", "c~"), build(QWEN3))
    assert text == head + "«<think>\n\n</think>\n\na<|im_end|>»"
    # The prompt for generation is that of the last assistant turn, supervised or not.
    prompt = tokenizer.decode(prompt_tokens(chat("q", "a", "r", "c~"), tokenizer))
    assert prompt == head + "a<|im_end|>" + tail.partition("«")[0]


def test_the_template_sees_the_other_keys_of_messages_but_not_train():
    template = (
        "{% for m in messages %}{{ m.keys() | sort | join(',') }}:{{ m['content'] }};{% endfor %}"
    )
    messages = (
        {"role": "user", "content": "q", "name": "n"},
        *chat("q", "a~", "r", "c").messages[1:],
    )
    text = encoded(Row(messages, "f:1"), build(template))
    assert text == "content,name,role:q;content,role:a;content,role:r;«content,role:c;</s>»"


def test_system_prompt_goes_before_rows_without_a_system_turn():
    tokenizer = build()
    rest = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n«a<|im_end|>»"
    own = "<|im_start|>system\nown<|im_end|>\n" + rest
    given = "<|im_start|>system\ngiven<|im_end|>\n" + rest
    assert encoded(chat("q", "a"), tokenizer, system_prompt="given") == given
    assert encoded(chat("q", "a", system="own"), tokenizer, system_prompt="given") == own
    developer = Row(({"role": "developer", "content": "own"}, *chat("q", "a").messages), "f:1")
    expected = own.replace("system", "developer")
    assert encoded(developer, tokenizer, system_prompt="given") == expected
    prompt = tokenizer.decode(prompt_tokens(chat("q", "a"), tokenizer, system_prompt="given"))
    assert prompt == given.partition("«")[0]


@pytest.mark.parametrize("template", [LLAMA3, GEMMA, MISTRAL, LLAMA2])
def test_bos_is_never_doubled(template):
    tokenizer = build(template, adds_bos=True)
    tokens = encode(chat("q", "a"), tokenizer, max_length=1000).tokens
    prompt = prompt_tokens(chat("q", "a"), tokenizer)
    assert list(tokens).count(tokenizer.bos_token_id) == 1 == list(prompt).count(tokens[0])


def test_eos_is_supervised_where_pad_and_eos_are_one_token():
    for pad, eos in (("</s>", "</s>"), ("<|im_end|>", "<|im_end|>")):
        tokenizer = build(eos=eos, pad=pad)
        assert tokenizer.pad_token_id == tokenizer.eos_token_id
        assert encoded(chat("q", "a"), tokenizer).endswith("«a<|im_end|>»")
        assert encoded(chat("q", "a"), tokenizer, chat_template="none") == f"q«a{eos}»"


def test_an_answer_that_ends_in_a_special_token_of_its_own_still_gets_eos():
    assert encoded(chat("q", "f()</call>"), build(BARE)).endswith("« f()</call></s>»")
    assert encoded(chat("q", "</call>"), build()).endswith("«</call><|im_end|>»")
    assert encoded(chat("q", "a</s>"), build(BARE)).endswith("« a</s>»")  # that is EOS


@pytest.mark.parametrize("answer", ["end", "|", ">", "<|im_end|>", "m", "<|im_end|>\n<|im_end|>"])
def test_answers_that_stand_in_the_end_of_turn_get_no_other(answer):
    assert encoded(chat("q", answer), build()).endswith(f"assistant\n«{answer}<|im_end|>»")


def test_an_empty_answer_is_its_end_of_turn():
    assert encoded(chat("q", ""), build()).endswith("assistant\n«<|im_end|>»")
    # rstrip must not reach back into the prompt
    template = BARE.replace("'assistant:'", "'assistant: '")
    assert encoded(chat("q", ""), build(template)) == "user: q\nassistant: «</s>»"


def test_no_end_of_turn_and_no_eos_is_an_error():
    text = error_of(encode, chat("q", "a"), build(BARE, eos=None), max_length=99)
    assert "f.jsonl:1: no end-of-turn token ends the answer" in text
    assert "'models/tiny' has no EOS token" in text
    assert encoded(chat("q", "a"), build(eos=None)).endswith("«a<|im_end|>»")


def test_plain_text():
    plain = {"chat_template": "none"}
    row = chat("2+2=", " 4 ", system="Sum.")
    assert encoded(chat("2+2=", " 4 "), build(None), **plain) == "2+2=« 4 </s>»"
    assert encoded(chat("2+2=", "4"), build(None, adds_bos=True), **plain) == "<s>2+2=«4</s>»"
    assert encoded(chat("<s>q", "4"), build(None, adds_bos=True), **plain) == "<s>q«4</s>»"
    assert encoded(chat("q", "4</s>"), build(None), **plain) == "q«4</s>»"
    assert encoded(row, build(None), system_prompt="No.", **plain) == "Sum.2+2=« 4 </s>»"
    assert encoded(chat("q", "4"), build(None), system_prompt="P:", **plain) == "P:q«4</s>»"
    tokenizer = build(None, adds_bos=True)
    assert tokenizer.decode(prompt_tokens(row, tokenizer, **plain)) == "<s>Sum.2+2="
    text = error_of(encode, chat("q", "a", "r", "c"), build(None), max_length=99, **plain)
    assert (
        "f.jsonl:1: data.chat_template='none' joins one prompt and one completion, but the row "
        in text
    )
    assert "user, assistant, user, assistant" in text


@pytest.mark.parametrize("trim_offsets", [False, True])
def test_spaces_at_the_ends_of_plain_answers_are_supervised(trim_offsets):
    tokenizer = build(None, trim_offsets=trim_offsets)
    expected = "q « a  </s>»"
    assert encoded(chat("q ", " a  "), tokenizer, chat_template="none") == expected


def test_the_first_token_is_never_a_target():
    answer = Row(({"role": "assistant", "content": "abc"},), "f:1")
    assert encoded(answer, build(None), chat_template="none") == "a«bc</s>»"
    assert encoded(answer, build(None, adds_bos=True), chat_template="none") == "<s>«abc</s>»"


def test_a_token_that_begins_in_the_prompt_belongs_to_it_and_is_counted():
    tokenizer = build(merges=(("Ċ", "Ċ"),))
    rows = [chat("q", "\nab"), chat("q", "ab")]
    assert encoded(rows[0], tokenizer).endswith("assistant\n\n«ab<|im_end|>»")
    assert encode_all(rows, tokenizer, max_length=99)[1].unaligned == 1
    # Offsets without their spaces hide that the space is one token with the answer.
    tokenizer = build(None, merges=(("Ġ", "a"),), trim_offsets=True)
    rows = [chat("q: ", "ab"), chat("q:", "ab")]
    _, counts = encode_all(rows, tokenizer, chat_template="none", max_length=99)
    assert counts.unaligned == 1


def test_special_tokens_that_swallow_whitespace():
    tokenizer = build(PHI, strip=True)
    text = encoded(chat("q", " a", "r", "c"), tokenizer)
    assert text == (
        "<|user|>q<|end|><|assistant|>«a<|end|>»<|user|>r<|end|><|assistant|>«c<|end|></s>»"
    )


def test_one_token_for_bos_and_eos():
    one, plain = {"bos": "</s>", "eos": "</s>"}, {"chat_template": "none"}
    first = build(None, adds_bos=True, **one)
    assert encoded(chat("q", "a"), first, **plain) == "</s>q«a</s>»"
    assert encoded(chat("", "a"), first, **plain) == "</s>«a</s>»"
    assert encoded(chat("", ""), first, **plain) == "</s>«</s>»"  # the second one is EOS
    assert encoded(chat("</s>", ""), first, **plain) == "</s>«</s>»"
    assert encoded(TextRow("a", "f:1"), first) == "</s>«a</s>»"
    assert encoded(TextRow("</s>a</s>", "f:1"), first) == "</s>«a</s>»"
    assert first.decode(prompt_tokens(chat("q", "a"), first, **plain)) == "</s>q"
    assert first.decode(prompt_tokens(chat("", "a"), first, **plain)) == "</s>"
    # a tokenizer that puts it after a text has no BOS to put before one
    last = build(None, adds_eos=True, **one)
    assert encoded(chat("q", "a"), last, **plain) == "q«a</s>»"
    assert encoded(TextRow("ab", "f:1"), last) == "a«b</s>»"
    assert last.decode(prompt_tokens(chat("q", "a"), last, **plain)) == "q"
    # and neither does a template that writes none
    for tokenizer in (build(adds_bos=True, **one), build(adds_eos=True, **one)):
        text = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n«a<|im_end|>»"
        assert encoded(chat("q", "a"), tokenizer) == text
        assert tokenizer.decode(prompt_tokens(chat("q", "a"), tokenizer)) == text.partition("«")[0]
    # EOS that ends the prompt does not end an empty answer
    assert encoded(chat("q</s>", ""), build(None), **plain) == "q</s>«</s>»"


def test_empty_answers_are_counted():
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {}}]}
    called = Row((*chat("q", "a").messages[:1], call), "f.jsonl:9")
    rows = [chat("q", "a"), chat("q", ""), chat("q", " \n"), chat("q", "", "r", "a")]
    rows += [chat("q", "~", "r", "a"), chat("q", "a", "r", "~"), called]
    writes = CHATML.replace(
        "m['content'] + '", "m['content'] }}{{ m.tool_calls | tojson if m.tool_calls }}{{ '"
    )
    _, counts = encode_all(rows, build(writes), max_length=99)
    assert (counts.examples, counts.empty_answers, counts.unended_answers) == (7, 3, 0)
    null = Row((*chat("q", "a").messages[:1], {"role": "assistant", "content": None}), "f.jsonl:9")
    assert encode_all([null], build(), max_length=99)[1].empty_answers == 1
    rows = [chat("q", ""), chat("q", "a")]
    assert encode_all(rows, build(None), chat_template="none", max_length=9)[1].empty_answers == 1
    _, counts = encode_all([chat("q", "", where="f:1"), chat("q", "a")], build(), max_length=99)
    assert counts.empty_answers == 1


def test_earlier_answers_that_nothing_ends_are_counted():
    rows = [chat("q", "a"), chat("q", "a", "r", "c"), chat("q", "a~", "r", "c")]
    assert encode_all(rows, build(BARE), max_length=99)[1].unended_answers == 1
    assert encode_all(rows, build(), max_length=99)[1].unended_answers == 0
    # Where the mark of the next role is a token, that is what ends them.
    roles = BARE.replace("m['role'] + ': '", "'<|' + m['role'] + '|>'")
    roles = roles.replace("'assistant:'", "'<|assistant|>'")
    tokenizer = build(roles)
    assert encode_all(rows, tokenizer, max_length=99)[1].unended_answers == 0
    text = encoded(chat("q", "a", "r", "c"), tokenizer)
    assert text == "<|user|>q\n<|assistant|>«a\n<|user|>»r\n<|assistant|>«c</s>»"
    assert stop_tokens(tokenizer) == {
        tokenizer.convert_tokens_to_ids(token) for token in ("<|user|>", "</s>")
    }


def test_multibyte_answers():
    assert encoded(chat("é", "ñ€😀"), build()).endswith(
        "é<|im_end|>\n<|im_start|>assistant\n«ñ€😀<|im_end|>»"
    )


def test_word_level_tokenizer_without_whitespace_tokens():
    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "q": 1, "a": 2, "b": 3}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[UNK]", eos_token="<e>", bos_token="<b>"
    )
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %} {{ m['content'] }}\n{% endfor %}"
    )
    example = encode(chat("q", "a b"), tokenizer, max_length=9)
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert example.tokens.tolist() == [begin, 1, 2, 3, end]
    assert example.loss_weights.tolist() == [0, 0, 1, 1, 1]


def test_a_template_from_a_file(tmp_path):
    path = tmp_path / "t.jinja"
    path.write_text(ZEPHYR, encoding="utf-8")
    options = {"chat_template": str(path)}
    expected = "<|user|>\nq</s>\n<|assistant|>\n«a</s>»"
    assert encoded(chat("q", "a"), build(None), **options) == expected
    assert resolve_template(build(), str(path)) == ZEPHYR
    assert resolve_template(build(), None) == CHATML
    assert resolve_template(build(None), "none") is None


def test_missing_templates(tmp_path):
    text = error_of(resolve_template, build(None), None)
    assert "the tokenizer of 'models/tiny' has no chat template" in text
    assert "the path of a Jinja file, or 'none' for prompt and completion" in text
    text = error_of(resolve_template, build(), "chatml")
    assert "data.chat_template='chatml' cannot be read: No such file or directory" in text
    assert "null for the tokenizer's own" in text
    (tmp_path / "latin.jinja").write_bytes(b"\xff")
    assert "cannot be read: the text is not UTF-8" in error_of(
        resolve_template, build(), str(tmp_path / "latin.jinja")
    )
    tokenizer = build({"rag": CHATML, "tools": CHATML})
    assert "multiple chat templates" in error_of(resolve_template, tokenizer, None)
    tokenizer.chat_template = {f"t{i}": CHATML for i in range(10_000)}
    assert len(error_of(resolve_template, tokenizer, None)) < 700
    assert encoded(chat("q", "a"), build({"default": CHATML})).endswith("«a<|im_end|>»")


@pytest.mark.parametrize(
    ("template", "row", "reason"),
    [
        (GEMMA, chat("q", "a", system="s"), "System role not supported"),
        (
            GEMMA,
            Row(chat("q", "a").messages * 2 + chat("q", "a").messages[1:], "f.jsonl:1"),
            "alternate",
        ),
        ("{% for %}", chat("q", "a"), "Expected"),
        ("{{ messages[9].content.strip() }}", chat("q", "a"), "has no element 9"),
        ("{{ 'a' + 1 }}", chat("q", "a"), "str"),
    ],
)
def test_what_templates_raise_is_told_with_the_row(template, row, reason):
    text = error_of(encode, row, build(template), max_length=99)
    assert text.startswith("f.jsonl:1: the chat template refuses this conversation: ")
    assert reason in text


def test_a_turn_of_the_middle_may_be_refused_alone():
    last_only = (
        "{% if messages | length == 2 and not add_generation_prompt %}\
{{ raise_exception('short') }}{% endif %}"
        + CHATML
    )
    text = error_of(encode, chat("q", "a", "r", "c"), build(last_only), max_length=99)
    refusal = "f.jsonl:1: the chat template refuses this conversation: short; "
    assert text == refusal + 'mark turn 1 "train": false, or use another data.chat_template'


def test_templates_that_rewrite_history_are_refused():
    text = error_of(encode, chat("q", "a"), build(REWRITES), max_length=99)
    assert "f.jsonl:1: the chat template leaves out the content of turn 0" in text
    keeps = REWRITES.replace("'earlier'", "'earlier ' + m['content']")
    text = error_of(encode, chat("q", "a"), build(keeps), max_length=99)
    assert "f.jsonl:1: the chat template renders the text before turn 1 differently" in text
    thought = "<think>x</think>a"
    text = error_of(encode, chat("q", thought, "r", "c"), build(QWEN3), max_length=99)
    assert (
        "f.jsonl:1: the chat template leaves out the thought of turn 1, wholly or in part" in text
    )
    # alone, the template would write an empty thought before the answer's own
    assert '; mark turn 1 "train": false, or leave out the thoughts, or use another' in text
    text = error_of(encode, chat("q", thought), build(QWEN3), max_length=99)
    assert "f.jsonl:1: the chat template repeats the thought of turn 1; leave out the" in text
    # the same with a system prompt counts the row's own turns
    options = {"system_prompt": "s", "max_length": 99}
    assert "turn 1, wholly" in error_of(
        encode, chat("q", thought, "r", "c"), build(QWEN3), **options
    )
    assert encoded(chat("q", thought + "~", "r", "c"), build(QWEN3)).count("«") == 1


def test_a_template_without_a_place_for_answers_is_refused():
    template = "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}"
    text = error_of(encode, chat("q", "a"), build(template), max_length=99)
    assert text.startswith("f.jsonl:1: the chat template leaves out the content of turn 1")


def test_a_conversation_that_begins_with_the_assistant():
    row = Row(({"role": "assistant", "content": "hi"}, *chat("q", "a").messages), "f.jsonl:1")
    text = error_of(encode, row, build(), max_length=99)
    assert "f.jsonl:1: the conversation begins with the assistant" in text
    assert encoded(row, build(), system_prompt="s").count("«") == 2
    only = Row(row.messages[:1], "f.jsonl:2")
    assert "f.jsonl:2: the conversation begins" in error_of(prompt_tokens, only, build())


def test_a_tokenizer_without_offsets_is_an_error():
    class Slow:
        is_fast = False
        chat_template = CHATML
        name_or_path = "models/slow"
        all_special_ids = ()
        bos_token_id = eos_token_id = None

        def get_added_vocab(self):
            return {}

    text = error_of(encode, chat("q", "a"), Slow(), chat_template="none", max_length=99)
    assert "the tokenizer of 'models/slow' is a slow one without character offsets" in text


# Complaints about other trainers


def test_peers_never_learn_eos_where_pad_is_eos():
    """They mask the labels of every pad token, by its id."""
    tokenizer = build(ZEPHYR, eos="</s>", pad="</s>")
    example = encode(chat("q", "a", "r", "c"), tokenizer, max_length=99)
    of_eos = example.loss_weights[example.tokens == tokenizer.eos_token_id]
    assert of_eos.tolist() == [0, 1, 0, 1]  # after q, a, r and c


def test_peers_train_on_nothing_at_a_loss_of_zero():
    """A response template that matches nothing, or a cut before the answer, goes unnoticed."""
    text = error_of(encode_all, [chat("q", "a~")], build(), max_length=99)
    assert "f.jsonl:1: no token is supervised" in text
    text = error_of(encode_all, [chat("q" * 99, "a")], build(), max_length=50)
    assert "no example is left of 1 rows" in text
    examples, _ = encode_all([chat("q" * 99, "a"), chat("q", "a")], build(), max_length=70)
    assert [bool(example.loss_weights.any()) for example in examples] == [True]


@pytest.mark.parametrize("name", GOLDEN)
def test_peers_refuse_templates_without_generation_blocks_or_supervise_the_prompt(name):
    assert "generation" not in GOLDEN[name][0].replace("add_generation_prompt", "")
    example = encode(chat("q", "a b", "r", "c"), build(GOLDEN[name][0]), max_length=999)
    assert 0 < example.loss_weights.sum() < len(example.tokens)


def test_peers_double_bos():
    """The template writes it, and the tokenizer adds it once more."""
    tokenizer = build(LLAMA3, adds_bos=True)
    text = encoded(chat("q", "a"), tokenizer)
    assert text.startswith("<s><|start_header_id|>user")
    assert tokenizer.decode(tokenizer(text)["input_ids"][:2]) == "<s><s>"  # what they do


# Any contents


WORDS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="~"), max_size=8)
TOKENIZERS = {name: build(template) for name, (template, _) in GOLDEN.items()}


@settings(max_examples=60, deadline=None)
@given(st.lists(WORDS, min_size=2, max_size=6), st.sampled_from(sorted(GOLDEN)))
def test_whatever_the_contents_the_supervised_text_is_the_answers(contents, name):
    row = chat(*contents[: len(contents) // 2 * 2])
    try:
        example = encode(row, TOKENIZERS[name], max_length=10_000)
    except UserError as error:
        assert name in ("qwen3", "phi")
        assert str(error).startswith("f.jsonl:1: ")
        return
    runs = [part.partition("»")[0] for part in marked(example, TOKENIZERS[name]).split("«")[1:]]
    answers = [message["content"] for message in row.messages if message["role"] == "assistant"]
    if not any("«" in text or "»" in text for text in contents):
        squeezed = "".join("".join(runs).split())
        for answer in answers:
            assert "".join(answer.split()) in squeezed
        # whole and alone: nothing before the last answer, and one end of turn after it
        last = GOLDEN[name][1].rpartition("«")[2].removesuffix("»").replace("c", answers[-1])
        assert "".join(runs[-1].split()) == "".join(last.split())
