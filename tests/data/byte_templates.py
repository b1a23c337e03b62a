"""Small chat templates, and a tokenizer with one token per byte, so that a mask reads as its text.

`encoded` writes an example as its rendered text with «supervised» parts.
"""

import itertools

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lora_jax.data import (
    Row,
    encode,
)
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
