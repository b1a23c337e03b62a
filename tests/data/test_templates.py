"""Supervised text, against masks written by hand: «supervised» in the rendered conversation.

The tokenizer knows one token per byte, and the special tokens: a mask reads as its text does.
"""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lora_jax.data import (
    Counts,
    Row,
    TextRow,
    TokenRow,
    encode,
    encode_all,
    has_prompt,
    prompt_key,
    prompt_tokens,
    resolve_template,
    stop_tokens,
)
from lora_jax.data.rows import THOUGHTS
from lora_jax.errors import UserError

CHATML = """{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + \
'<|im_end|>\n' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
LLAMA3 = """{% for m in messages %}{% set c = '<|start_header_id|>' + m['role'] + \
'<|end_header_id|>\n\n' \
+ m['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set c = bos_token + c %}{% \
endif %}\
{{ c }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif \
%}"""
GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}\
{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}\
{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% \
endif %}\
{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + m['content'] \
| trim \
+ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% \
endif %}"""
MISTRAL = """{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}\
{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}{{ ' ' + m['content'] + eos_token }}{% endif \
%}\
{% endfor %}"""
ZEPHYR = """{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' \
}}\
{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"""
LLAMA2 = """{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}\
{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}{% else %}\
{% set rest = messages %}{% set system = '' %}{% endif %}{% for m in rest %}{% if m['role'] == \
'user' %}\
{{ bos_token + '[INST] ' + (system if loop.first else '') + m['content'] | trim + ' [/INST]' }}\
{% else %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"""
PHI = """{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% \
endfor %}\
{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"""
QWEN3 = """{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == \
'assistant' %}\
{{ ('<think>\n\n</think>\n\n' + m['content']) if loop.last else \
m['content'].split('</think>')[-1] }}\
{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
BARE = """{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"""
REWRITES = """{% for m in messages %}{{ (m['content'] if loop.last else 'earlier') + '<|im_end|>' \
}}\
{% endfor %}"""

SPECIAL = [
    "<s>",
    "</s>",
    "<pad>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
    "</call>",
]


def build(
    template: str | None = CHATML,
    *,
    bos: str | None = "<s>",
    eos: str | None = "</s>",
    pad: str | None = "<pad>",
    adds_bos: bool = False,
    adds_eos: bool = False,
    merges: tuple[tuple[str, str], ...] = (),
    trim_offsets: bool = False,
    strip: bool = False,
):
    """A byte-level tokenizer; `strip`: its special tokens swallow the whitespace after them."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters += [left + right for left, right in merges]
    vocab = {letter: i for i, letter in enumerate(letters)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False, trim_offsets=trim_offsets
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, special=True, rstrip=strip) for t in SPECIAL])
    backend.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=trim_offsets)
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    if adds_eos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"$A {eos}", special_tokens=[(eos, backend.token_to_id(eos))]
        )
    names = {"bos_token": bos, "eos_token": eos, "pad_token": pad}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, **{k: v for k, v in names.items() if v is not None}
    )
    tokenizer.chat_template = template
    tokenizer.name_or_path = "models/tiny"
    return tokenizer


def chat(*contents: str, system: str | None = None, where: str = "f.jsonl:1") -> Row:
    """User and assistant in turns; a content that ends in ~ is an unsupervised turn."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    for i, content in enumerate(contents):
        message = {"role": ("user", "assistant")[i % 2], "content": content.removesuffix("~")}
        messages.append(message | ({"train": False} if content.endswith("~") else {}))
    return Row(tuple(messages), where)


def marked(example, tokenizer) -> str:
    """The example's text with «» around the runs of supervised tokens."""
    assert example.tokens.dtype == np.int32
    assert example.loss_weights.dtype == np.float32
    assert example.tokens.shape == example.loss_weights.shape
    supervised = example.loss_weights > 0
    edges = [0, *(np.flatnonzero(np.diff(supervised)) + 1), len(supervised)]
    text = ""
    for start, end in itertools.pairwise(edges):
        run = tokenizer.decode(example.tokens[start:end], clean_up_tokenization_spaces=False)
        text += f"«{run}»" if supervised[start] else run
    return text


def encoded(row, tokenizer, **options) -> str:
    example = encode(row, tokenizer, **{"max_length": 1000, **options})
    return marked(example, tokenizer)


def error_of(function, *args, **options) -> str:
    with pytest.raises(UserError) as caught:
        function(*args, **options)
    return str(caught.value)


GOLDEN = {
    "chatml": (
        CHATML,
        "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n«a b<|im_end|>»\n"
        "<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n«c<|im_end|>»",
    ),
    "llama3": (
        LLAMA3,
        "<s><|start_header_id|>user<|end_header_id|>\n\nq<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«a b<|eot_id|>»"
        "<|start_header_id|>user<|end_header_id|>\n\nr<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«c<|eot_id|>»",
    ),
    "gemma": (
        GEMMA,
        "<s><start_of_turn>user\nq<end_of_turn>\n<start_of_turn>model\n«a b<end_of_turn>»\n"
        "<start_of_turn>user\nr<end_of_turn>\n<start_of_turn>model\n«c<end_of_turn>»",
    ),
    "mistral": (MISTRAL, "<s>[INST] q [/INST]« a b</s>»[INST] r [/INST]« c</s>»"),
    "zephyr": (
        ZEPHYR,
        "<|user|>\nq</s>\n<|assistant|>\n«a b</s>»\n<|user|>\nr</s>\n<|assistant|>\n«c</s>»",
    ),
    "llama2": (LLAMA2, "<s>[INST] q [/INST]« a b </s>»<s>[INST] r [/INST]« c </s>»"),
    "phi": (
        PHI,
        "<|user|>\nq<|end|>\n<|assistant|>\n«a b<|end|>»\n"
        "<|user|>\nr<|end|>\n<|assistant|>\n«c<|end|>\n</s>»",
    ),
    "qwen3": (
        QWEN3,
        "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n«a b<|im_end|>»\n"
        "<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n«<think>\n\n</think>\n\nc<|im_end|>»",
    ),
    "no end-of-turn": (BARE, "user: q\nassistant:« a b»\nuser: r\nassistant:« c</s>»"),
}


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
    assert "f.jsonl:1: the chat template renders what stands before turn 1 differently" in text
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


# Tools


TOOLS = ({"type": "function", "function": {"name": "f", "parameters": {}}},)
WITH_TOOLS = (
    "{% if tools %}{{ 'tools: ' + tools | map(attribute='function.name') | join(' ') \
+ '\\n' }}{% endif %}"
    + CHATML
)


def test_tools_go_to_the_template():
    row = Row(chat("q", "a").messages, "f.jsonl:1", TOOLS)
    rest = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n«a<|im_end|>»"
    assert encoded(row, build(WITH_TOOLS)) == "tools: f\n" + rest
    prompt = build().decode(prompt_tokens(row, build(WITH_TOOLS)))
    assert prompt == "tools: f\n" + rest.partition("«")[0]
    assert encoded(chat("q", "a"), build(WITH_TOOLS)) == rest
    needs = "{% if not tools %}{{ raise_exception('none') }}{% endif %}" + WITH_TOOLS
    assert encoded(row, build(needs)) == "tools: f\n" + rest
    # a tokenizer may have a template for them alone
    tokenizer = build({"default": CHATML, "tool_use": WITH_TOOLS})
    examples, _ = encode_all([chat("q", "a"), row], tokenizer, max_length=99)
    assert [marked(e, tokenizer) for e in examples] == [rest, "tools: f\n" + rest]
    assert build().decode(prompt_tokens(row, tokenizer)) == prompt


def test_tools_that_the_template_leaves_out_are_refused():
    row = Row(chat("q", "a").messages, "f.jsonl:1", TOOLS)
    text = error_of(encode, row, build(CHATML), max_length=99)
    assert text.startswith("f.jsonl:1: the chat template leaves out the tools of the row")
    text = error_of(encode, row, build(CHATML), chat_template="none", max_length=99)
    assert text == "f.jsonl:1: data.chat_template='none' has no place for the row's tools"


def test_what_the_template_leaves_out_of_an_answer_is_refused():
    call = [{"function": {"name": "f", "arguments": {}}}]
    question = {"role": "user", "content": "q"}
    for more, lost in (
        ({"tool_calls": call}, "the tool call 'f'"),
        ({"tool_calls": [{"name": "g", "arguments": {}}]}, "the tool call 'g'"),
        ({"thinking": "hm"}, "the thinking"),
        ({"reasoning_content": "hm", "tool_calls": call}, "the reasoning_content and the tool"),
    ):
        row = Row((question, {"role": "assistant", "content": "a"} | more), "f.jsonl:1")
        text = error_of(encode, row, build(), max_length=99)
        assert text.startswith(f"f.jsonl:1: the chat template leaves out {lost}")
        assert " of turn 1, wholly or in part; " in text
    half = CHATML.replace("m['content']", "m['content'][:2 if m['role'] == 'assistant' else 99]")
    text = error_of(encode, chat("q", "abc", "r", "a"), build(half), max_length=99)
    assert "leaves out the content of turn 1, wholly or in part, or rewrites it when" in text
    text = error_of(encode, chat("q", "abc~", "r", "a"), build(half), max_length=99)
    assert "leaves out the content of turn 1, wholly or in part" in text  # nor is it in the prompt


def role(name: str, text: str) -> str:
    return "{% elif m['role'] == '" + name + "' %}{{ " + text + " }}"


THREE_ROLES = {  # as zephyr and olmo2 write conversations: what is of another role is passed over
    "zephyr": "{% for m in messages %}{% if false %}"
    + "".join(
        role(name, f"'<|{name}|>\n' + m['content'] + eos_token + '\n'")
        for name in ("user", "system", "assistant")
    )
    + "{% endif %}{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    "{% endfor %}",
    "olmo2": "{{ bos_token }}{% for m in messages %}{% if false %}"
    + role("system", "'<|system|>\n' + m['content'] + '\n'")
    + role("user", "'<|user|>\n' + m['content'] + '\n'")
    + role("assistant", "'<|assistant|>\n' + m['content'] + eos_token + '\n' * (not loop.last)")
    + "{% endif %}{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    "{% endfor %}",
}


@pytest.mark.parametrize("name", THREE_ROLES)
def test_turns_of_the_context_that_the_template_leaves_out_are_refused(name):
    tokenizer = build(THREE_ROLES[name])
    assert encoded(chat("q", "a", "r", "c"), tokenizer).count("«") == 2
    question, last = chat("1", "1").messages
    result = {"role": "tool", "content": "1"}  # which is found in the text by accident
    call = {"function": {"name": "f", "arguments": {"n": 1}}}
    asked = {"role": "assistant", "content": "1", "tool_calls": [call], "train": False}
    text = error_of(encode, Row((question, result, last), "f:1"), tokenizer, max_length=99)
    assert text.startswith("f:1: the chat template leaves out the tool result of turn 1, wholly")
    assert "; write tools, calls and results into the contents as text, or use" in text
    text = error_of(encode, Row((question, asked, question, last), "f:1"), tokenizer, max_length=99)
    assert text.startswith("f:1: the chat template leaves out the tool call 'f' of turn 1, wholly")
    # what follows the last supervised turn is no part of the example
    assert encoded(Row((question, last, result), "f:1"), tokenizer).count("«") == 1


def test_a_turn_that_is_left_out_for_its_text_is_refused():
    for condition in ("m['content'] != 'why?'", "'?' not in m['content']"):
        some = CHATML.replace("in messages", f"in messages if {condition}")
        assert encoded(chat("q", "a~", "s", "c"), build(some)).count("«") == 1
        text = error_of(encode, chat("Q", "A~", "why?", "C"), build(some), max_length=99)
        assert text.startswith("f.jsonl:1: the chat template leaves out the content of turn 2")


def test_turns_out_of_order_and_parts_in_other_answers_are_refused():
    swapped = CHATML.replace("in messages", "in messages[1:3] + messages[:1] + messages[3:]")
    text = error_of(encode, chat("q", "a~", "r", "c"), build(swapped), max_length=99)
    assert text == (
        "f.jsonl:1: the chat template moves parts of turn 0 behind later turns; "
        "use another data.chat_template"
    )
    echoes = CHATML.replace(
        "+ m['content']", "+ messages[0].content * (m.role == 'assistant') + m['content']"
    )
    text = error_of(encode, chat("q", "a"), build(echoes), max_length=99)
    assert text == (
        "f.jsonl:1: the chat template mixes the content of turn 0 with the answer of turn 1; "
        "use another data.chat_template"
    )


def test_a_thought_that_is_rendered_twice_is_refused():
    """The prompt opens the thought, and the content that begins with one is written behind it."""
    opens = CHATML.replace(
        "'<|im_start|>' + m['role'] + '\n' + m['content']",
        "'<|im_start|>' + m['role'] + '\n' + ('<think>\n' if m['role'] == 'assistant' else '')"
        " + m['content']",
    ).replace("assistant\n'", "assistant\n<think>\n'")
    assert encoded(chat("q", "hm</think>a"), build(opens)).endswith(
        "<think>\n«hm</think>a<|im_end|>»"
    )
    text = error_of(encode, chat("q", "<think>hm</think>a"), build(opens), max_length=99)
    assert text.startswith("f.jsonl:1: the chat template repeats the thought of turn 1; ")
    both = CHATML.replace("m['content']", "(m.thinking ~ m.reasoning if m.thinking) ~ m['content']")
    both = both.replace(" if m.thinking)", " if m.thinking else '')")
    question = {"role": "user", "content": "q"}
    twice = {"role": "assistant", "content": "a", "thinking": "hm", "reasoning": "hm"}
    text = error_of(encode, Row((question, twice), "f:1"), build(both), max_length=99)
    assert text.startswith("f:1: the chat template repeats the thinking of turn 1; ")
    for opening, closing in THOUGHTS:
        said = f"{opening}hm{closing}a"
        two = {"role": "assistant", "content": said, "reasoning_content": "hm"}
        text = error_of(encode, Row((question, two), "f:1"), build(), max_length=99)
        start = "f:1: turn 1 has a thought in its reasoning_content and another in its"
        assert text.startswith(start)
        assert "keep one; write the thoughts into the contents, as <think>..</think>, or" in text
    options = {"chat_template": "none", "max_length": 99}
    said = {"role": "assistant", "content": "a", "thinking": "hm"}
    text = error_of(encode, Row((question, said), "f:1"), build(), **options)
    assert text == (
        "f:1: data.chat_template='none' has no place for the thinking; write it into the content"
    )


def test_a_system_turn_that_the_template_leaves_out_is_refused():
    users = CHATML.replace("in messages", "in messages if m['role'] != 'system'")
    text = error_of(encode, chat("q", "a", system="Hm"), build(users), max_length=99)
    assert text.startswith(
        "f.jsonl:1: the chat template leaves out the system turn; put the system"
    )
    options = {"system_prompt": "Hm", "max_length": 99}
    assert "leaves out the system turn" in error_of(encode, chat("q", "a"), build(users), **options)


def test_eos_that_stands_between_turns_alone_is_supervised():
    between = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% if not loop.last %}"
        "{{ eos_token + '\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ eos_token + '\nassistant:' }}{% endif %}"
    )
    text = encoded(chat("q", "a", "r", "c"), build(between))
    assert text == "user: q</s>\nassistant:« a</s>»\nuser: r</s>\nassistant:« c</s>»"


# {% generation %} blocks


def blocks(before: str = "", inside: str = "", after: str = "", ends: str = "") -> str:
    """ChatML with a block around the content and `inside`; `before` and `after` it."""
    return (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
        "{% if m['role'] == 'assistant' %}" + before + "{% generation %}"
        "{{ m['content'] }}" + inside + "{% endgeneration %}" + after + "{% else %}"
        "{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}" + ends + "{% if "
        "add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )


INSIDE = blocks(inside="{{ '<|im_end|>\n' }}")
OUTSIDE = blocks(after="{{ '<|im_end|>\n' }}")


@pytest.mark.parametrize("template", [INSIDE, OUTSIDE])
@pytest.mark.parametrize("last", ["c", ""])
def test_a_block_with_and_without_the_end_of_turn(template, last):
    row = chat("q", "a b", "r", last)
    assert encoded(row, build(template)) == GOLDEN["chatml"][1].replace("«c", f"«{last}")
    row = chat("q", "a~", "r", last)
    assert encoded(row, build(template)).count("«") == 1
    assert encoded(row, build(template)).endswith(f"«{last}<|im_end|>»")


def test_a_block_that_ends_in_nothing_gets_eos():
    assert encoded(chat("q", "a"), build(blocks(after="{{ '\nend' }}"))).endswith("«a</s>»")


def test_a_block_that_begins_in_the_prompt_is_cut_and_one_that_begins_later_wins():
    early = INSIDE.replace("'<|im_start|>' + m['role'] + '\n'", "'<|im_start|>'").replace(
        "{% generation %}", "{% generation %}{{ m['role'] + '\n' }}"
    )
    early = early.replace("{{ m['content'] + '<", "{{ m['role'] + '\n' + m['content'] + '<")
    assert encoded(chat("q", "a b", "r", "c"), build(early)) == GOLDEN["chatml"][1]
    later = blocks(before="{{ '<think></think>' }}", inside="{{ '<|im_end|>\n' }}")
    expected = GOLDEN["chatml"][1].replace("«", "<think></think>«")
    assert encoded(chat("q", "a b", "r", "c"), build(later)) == expected


REWRITTEN = """{% for m in messages %}{{ '<|im_start|>' + m['role'] }}\
{% set old = m['role'] == 'user' and loop.revindex > 2 %}{% if m['role'] == 'assistant' %}\
{% generation %}{{ '\\n' + m['content'] + '<|im_end|>\\n' }}{% endgeneration %}{% else %}\
{{ '\\n' + ('old ' if old else '') + m['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


def test_blocks_of_templates_that_rewrite_history():
    row, expected = chat("q", "a b", "r", "c"), GOLDEN["chatml"][1].replace("q", "old q")
    assert encoded(row, build(REWRITTEN)) == expected  # the block begins in the prompt
    head = "{{ '\\n' }}{% generation %}{{ m['content'] + '<"
    after = REWRITTEN.replace("{% generation %}{{ '\\n' + m['content'] + '<", head)
    assert encoded(row, build(after)) == expected
    later = after.replace(
        "{{ '\\n' }}{% generation %}", "{{ '\\n<think></think>' }}{% generation %}"
    )
    text = encoded(row, build(later))
    assert text == expected.replace("«", "<think></think>«")
    text = encoded(chat("q", "a b~", "r", "c"), build(REWRITTEN))
    assert text == expected.replace("«a b<|im_end|>»", "a b<|im_end|>")
    end = " + '<|im_end|>\\n' }}{% endgeneration %}"
    stops_short = REWRITTEN.replace(end, " }}{% endgeneration %}{{ '<|im_end|>\\n' }}", 1)
    assert encoded(row, build(stops_short)) == expected
    # the same without blocks is refused
    plain = REWRITTEN.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    text = error_of(encode, row, build(plain), max_length=999)
    assert "renders what stands before turn 1 differently as a prompt and inside the conver" in text
    assert "'q<|im_end|>\\n<|im_start|>assistant\\n' and 'old q<|im_end|>" in text
    # and so is a prompt that opens a thought which the answers lack
    opens = REWRITTEN.replace("'<|im_start|>assistant\\n'", "'<|im_start|>assistant\\n<think>'")
    text = error_of(encode, row, build(opens), max_length=999)
    assert text.endswith("; begin the answers with a thought, or use another data.chat_template")
    thoughts = chat("q", "<think>a b", "r", "<think>c")
    assert encoded(thoughts, build(opens)) == expected.replace("«", "<think>«")


def test_two_blocks_in_a_turn():
    two = blocks(
        after="{{ ' tool ' }}{% generation %}{{ '!<|im_end|>\n' }}{% endgeneration %}",
    )
    text = encoded(chat("q", "a", "r", "c"), build(two))
    assert text.count(" tool ") == 2
    assert text.partition("\n<|im_start|>user\nr")[0].endswith("«a» tool «!<|im_end|>»")
    assert text.endswith("«c» tool «!<|im_end|>»")
    text = encoded(chat("q", "a~", "r", "c"), build(two))
    assert "a tool !" in text
    # where history is rewritten nobody knows whose they are
    rewritten = two.replace("{{ m['content'] + '<", "{{ loop.revindex }}{{ m['content'] + '<")
    text = error_of(encode, chat("q", "a", "r", "c"), build(rewritten), max_length=99)
    assert "rewrites earlier turns, and the 4 {% generation %} blocks cannot be told apart" in text


def test_as_many_blocks_as_turns_may_still_be_of_one_turn():
    again = "{% if m['content'] == 'a b' %}{% generation %}{% endgeneration %}{% endif %}{% else %}"
    uneven = REWRITTEN.replace("{% else %}", again, 1).replace(
        "m['role'] == 'assistant' %}",
        "m['content'] == 'c' %}{{ 'c' }}{% elif m['role'] == 'assistant' %}",
    )
    text = error_of(encode, chat("q", "a b", "r", "c"), build(uneven), max_length=999)
    assert "the 2 {% generation %} blocks cannot be told apart between 2 assistant turns" in text


def test_blocks_of_two_answers_in_a_row():
    block = "{% generation %}{{ ' ' + m['content'] + eos_token }}{% endgeneration %}"
    template = MISTRAL.replace("{{ ' ' + m['content'] + eos_token }}", block)
    row = Row((*chat("q", "a").messages, {"role": "assistant", "content": "b"}), "f:1")
    assert encoded(row, build(template)) == "<s>[INST] q [/INST]« a</s> b</s>»"
    assert encoded(row, build(template)) == encoded(row, build(MISTRAL))
    row = Row((*chat("q", "a~").messages, {"role": "assistant", "content": "b"}), "f:1")
    assert encoded(row, build(template)) == "<s>[INST] q [/INST] a</s>« b</s>»"


def test_a_turn_without_a_block_is_refused():
    only = INSIDE.replace("if m['role'] == 'assistant'", "if m['content'] == 'a'")
    assert encoded(chat("q", "a"), build(only)).endswith("«a<|im_end|>»")
    text = error_of(encode, chat("q", "a", "r", "c"), build(only), max_length=99)
    assert "has {% generation %} blocks, but none for turn 3; mark turn 3" in text
    assert encoded(chat("q", "c~", "r", "a"), build(only)).endswith("«a<|im_end|>»")


def test_blocks_that_are_no_use_are_passed_over():
    """In comments, and where transformers counts positions that are none of the text."""
    for template in (
        "{# no {% generation %} here #}" + CHATML,
        "{% macro say(m) %}{{ '<|im_start|>' + m['role'] + '\n' }}{% generation %}"
        "{{ m['content'] }}{% endgeneration %}{{ '<|im_end|>\n' }}{% endmacro %}"
        "{% for m in messages %}{{ say(m) }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        INSIDE.replace("{% for", "{% set text %}{% for", 1).replace(
            "{% if add", "{% endset %}{{ text }}{% if add"
        ),
    ):
        assert encoded(chat("q", "a b", "r", "c"), build(template)) == GOLDEN["chatml"][1]


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
