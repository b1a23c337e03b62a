"""Supervised text under the chat templates of real models, as trl ships them.

Masks are written by hand, «supervised» in the rendered conversation; one that begins with … is the
end of a text. The tokenizer has one token per byte, and the special tokens that templates write.
"""

import importlib.util
import itertools
import re
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lora_jax.data import Row, encode, prompt_tokens, stop_tokens
from lora_jax.errors import UserError

ORIGIN = importlib.util.find_spec("trl").origin  # found, not imported: that would take seconds
FILES = {file.stem: file for file in (Path(ORIGIN).parent / "chat_templates").glob("*.jinja")}
TWINS = sorted(name for name in FILES if name.endswith("_training"))
SPECIAL = re.compile(
    r"<\|[\w ]+\|?>|<\w+\|>|<｜[^｜<>]+｜>|<(?:start|end)_of_turn>|\[gMASK\]|<sop>"
)
EOS = {
    "qwen": "<|im_end|>",
    "llama": "<|eot_id|>",
    "gemma": "<eos>",
    "phi": "<|endoftext|>",
    "deepseek": "<｜end▁of▁sentence｜>",
    "cohere": "<|END_OF_TURN_TOKEN|>",
    "glm": "<|endoftext|>",
    "gptoss": "<|return|>",
    "lfm": "<|im_end|>",
    "nemotron": "<|im_end|>",
    "muse": "<|eot|>",
}
CODE = {name: file.read_text(encoding="utf-8") for name, file in FILES.items()}
SPECIALS = sorted({t for code in CODE.values() for t in SPECIAL.findall(code)} | set(EOS.values()))


def build(name: str) -> PreTrainedTokenizerFast:
    vocab = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, special=True) for t in ["<bos>", *SPECIALS]])
    # The thought is no special token, but one of its own.
    backend.add_tokens([AddedToken(t, special=False) for t in ("<think>", "</think>")])
    eos = next((token for family, token in EOS.items() if name.startswith(family)), "<eos>")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token=eos, pad_token=eos
    )
    tokenizer.chat_template = CODE[name]
    return tokenizer


TOKENIZERS = {name: build(name) for name in sorted(FILES)}


def runs(example, tokenizer) -> list[tuple[bool, str]]:
    """The example's text in runs that are supervised, or not."""
    supervised = example.loss_weights > 0
    edges = [0, *(np.flatnonzero(np.diff(supervised)) + 1), len(supervised)]
    text = [tokenizer.decode(example.tokens[a:b]) for a, b in itertools.pairwise(edges)]
    return [(bool(supervised[a]), t) for a, t in zip(edges, text, strict=False)]


def mask(row: Row, name: str) -> str:
    example = encode(row, TOKENIZERS[name], max_length=1_000_000)
    parts = runs(example, TOKENIZERS[name])
    return "".join(f"«{text}»" if supervised else text for supervised, text in parts)


def error_of(row: Row, name: str) -> str:
    with pytest.raises(UserError) as caught:
        mask(row, name)
    return str(caught.value)


def user(content):
    return {"role": "user", "content": content}


def answer(content, **more):
    return {"role": "assistant", "content": content, **more}


def row(*messages, tools=()) -> Row:
    return Row(messages, "f.jsonl:1", tools)


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells it.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Where."}},
            "required": ["city"],
        },
    },
}
CALLS = [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}]
SUNNY = {"role": "tool", "content": "sunny"}
SYSTEM = {"role": "system", "content": "Be brief."}

ROWS = {
    "one": row(user("q"), answer("a b")),
    "two": row(user("q"), answer("a b"), user("r"), answer("c")),
    "first untrained": row(user("q"), answer("a b", train=False), user("r"), answer("c")),
    "last untrained": row(user("q"), answer("a b"), user("r"), answer("c", train=False)),
    "system": row(SYSTEM, user("q"), answer("a b")),
    "call": row(user("q"), answer("", tool_calls=CALLS), tools=(WEATHER,)),
    "tool": row(user("q"), answer("", tool_calls=CALLS), SUNNY, answer("a b"), tools=(WEATHER,)),
    "tool, answer alone": row(
        user("q"),
        answer("", tool_calls=CALLS, train=False),
        SUNNY,
        answer("a b"),
        tools=(WEATHER,),
    ),
    "thought": row(user("q"), answer("<think>\nhm\n</think>\n\na b")),
    "reasoning": row(user("q"), answer("a b", reasoning_content="hm")),
    "two reasonings": row(
        user("q"), answer("a b", reasoning_content="hm"), user("r"), answer("c", thinking="ho")
    ),
    "tool and reasonings": row(
        user("q"),
        answer("", reasoning_content="hm", tool_calls=CALLS),
        SUNNY,
        answer("a b", reasoning_content="ho"),
        tools=(WEATHER,),
    ),
}

L3 = "<|start_header_id|>{}<|end_header_id|>\n\n".format
C = "<|START_OF_TURN_TOKEN|><|{}_TOKEN|>".format
END = "<|END_OF_TURN_TOKEN|>"
U, A = "<|im_start|>user\n", "<|im_start|>assistant\n"
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>'
RESPONSE = f"\n{U}<tool_response>\nsunny\n</tool_response><|im_end|>\n{A}"
XML = (
    "<tool_call>\n<function=weather>\n<parameter=city>\nRome\n</parameter>\n</function>\n"
    "</tool_call><|im_end|>"
)
QWEN = (
    "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    "<|im_end|>\n"
)
LLAMA31 = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"

REWRITTEN = (
    "leaves out the reasoning_content of turn 1, wholly or in part, or rewrites it when others "
    "follow; split the conversation into one row per answer, or"
)

GOLDEN = {
    "llama3": {
        "one": f"<bos>{L3('user')}q<|eot_id|>{L3('assistant')}«a b<|eot_id|>»",
        "two": f"<bos>{L3('user')}q<|eot_id|>{L3('assistant')}«a b<|eot_id|>»"
        f"{L3('user')}r<|eot_id|>{L3('assistant')}«c<|eot_id|>»",
        "first untrained": f"<bos>{L3('user')}q<|eot_id|>{L3('assistant')}a b<|eot_id|>"
        f"{L3('user')}r<|eot_id|>{L3('assistant')}«c<|eot_id|>»",
        "last untrained": f"<bos>{L3('user')}q<|eot_id|>{L3('assistant')}«a b<|eot_id|>»",
        "system": f"<bos>{L3('system')}Be brief.<|eot_id|>{L3('user')}q<|eot_id|>"
        f"{L3('assistant')}«a b<|eot_id|>»",
        "tool": "leaves out the tools of the row",
        "reasoning": "leaves out the reasoning_content of turn 1",
    },
    "llama3_1": {
        "one": f"<bos>{L3('system')}{LLAMA31}<|eot_id|>{L3('user')}q<|eot_id|>"
        f"{L3('assistant')}«a b<|eot_id|>»",
        "two": f"…{L3('user')}q<|eot_id|>{L3('assistant')}«a b<|eot_id|>»"
        f"{L3('user')}r<|eot_id|>{L3('assistant')}«c<|eot_id|>»",
        "system": f"<bos>{L3('system')}{LLAMA31}Be brief.<|eot_id|>{L3('user')}q<|eot_id|>"
        f"{L3('assistant')}«a b<|eot_id|>»",
        "tool": f"…}}\n\nq<|eot_id|>{L3('assistant')}"
        '«{"name": "weather", "parameters": {"city": "Rome"}}<|eot_id|>»'
        f'{L3("ipython")}"sunny"<|eot_id|>{L3("assistant")}«a b<|eot_id|>»',
        "tool, answer alone": f"…}}\n\nq<|eot_id|>{L3('assistant')}"
        '{"name": "weather", "parameters": {"city": "Rome"}}<|eot_id|>'
        f'{L3("ipython")}"sunny"<|eot_id|>{L3("assistant")}«a b<|eot_id|>»',
    },
    "qwen2_5": {
        "one": f"{QWEN}{U}q<|im_end|>\n{A}«a b<|im_end|>»",
        "two": f"{QWEN}{U}q<|im_end|>\n{A}«a b<|im_end|>»\n{U}r<|im_end|>\n{A}«c<|im_end|>»",
        "first untrained": f"{QWEN}{U}q<|im_end|>\n{A}a b<|im_end|>\n"
        f"{U}r<|im_end|>\n{A}«c<|im_end|>»",
        "system": f"<|im_start|>system\nBe brief.<|im_end|>\n{U}q<|im_end|>\n{A}«a b<|im_end|>»",
        "call": f"…<|im_end|>\n{U}q<|im_end|>\n{A}«{CALL}»",
        "tool": f"…<|im_end|>\n{U}q<|im_end|>\n{A}«{CALL}»{RESPONSE}«a b<|im_end|>»",
        "tool, answer alone": f"…<|im_end|>\n{U}q<|im_end|>\n{A}{CALL}{RESPONSE}«a b<|im_end|>»",
    },
    "qwen3": {
        "one": f"{U}q<|im_end|>\n{A}«<think>\n\n</think>\n\na b<|im_end|>»",
        # The empty thought stands in the last turn alone, where it tells nothing of the answer.
        "two": f"{U}q<|im_end|>\n{A}«a b<|im_end|>»\n"
        f"{U}r<|im_end|>\n{A}«<think>\n\n</think>\n\nc<|im_end|>»",
        "last untrained": f"{U}q<|im_end|>\n{A}«<think>\n\n</think>\n\na b<|im_end|>»",
        "thought": f"{U}q<|im_end|>\n{A}«<think>\nhm\n</think>\n\na b<|im_end|>»",
        "reasoning": f"{U}q<|im_end|>\n{A}«<think>\nhm\n</think>\n\na b<|im_end|>»",
        "two reasonings": REWRITTEN,
        "tool": f"…{U}q<|im_end|>\n{A}«{CALL}»{RESPONSE}«<think>\n\n</think>\n\na b<|im_end|>»",
        "tool and reasonings": f"…{U}q<|im_end|>\n{A}«<think>\nhm\n</think>\n\n{CALL}»{RESPONSE}"
        "«<think>\nho\n</think>\n\na b<|im_end|>»",
    },
    "qwen3_training": {
        "two reasonings": f"{U}q<|im_end|>\n{A}«<think>\nhm\n</think>\n\na b<|im_end|>»\n"
        f"{U}r<|im_end|>\n{A}«<think>\nho\n</think>\n\nc<|im_end|>»",
        "first untrained": f"{U}q<|im_end|>\n{A}<think>\n\n</think>\n\na b<|im_end|>\n"
        f"{U}r<|im_end|>\n{A}«<think>\n\n</think>\n\nc<|im_end|>»",
    },
    "qwen3_instruct_2507": {
        "two": f"{U}q<|im_end|>\n{A}«a b<|im_end|>»\n{U}r<|im_end|>\n{A}«c<|im_end|>»",
        "tool": f"…{U}q<|im_end|>\n{A}«{CALL}»{RESPONSE}«a b<|im_end|>»",
        "two reasonings": "leaves out the reasoning_content of turn 1",
    },
    # The prompt opens the thought, which the model then closes.
    "qwen3_5_think": {
        "one": f"{U}q<|im_end|>\n{A}<think>\n«\n</think>\n\na b<|im_end|>»",
        "thought": f"{U}q<|im_end|>\n{A}<think>\n«hm\n</think>\n\na b<|im_end|>»",
        "two": "renders the text before turn 1 differently as a prompt",
        "first untrained": f"{U}q<|im_end|>\n{A}a b<|im_end|>\n"
        f"{U}r<|im_end|>\n{A}<think>\n«\n</think>\n\nc<|im_end|>»",
        "tool and reasonings": f"…{U}q<|im_end|>\n{A}<think>\n«hm\n</think>\n\n{XML}»{RESPONSE}"
        "<think>\n«ho\n</think>\n\na b<|im_end|>»",
    },
    "qwen3_5_think_training": {
        "two reasonings": f"{U}q<|im_end|>\n{A}<think>\n«hm\n</think>\n\na b<|im_end|>»\n"
        f"{U}r<|im_end|>\n{A}<think>\n«ho\n</think>\n\nc<|im_end|>»",
    },
    "gemma": {
        "two": "<bos><start_of_turn>user\nq<end_of_turn>\n"
        "<start_of_turn>model\n«a b<end_of_turn>»\n"
        "<start_of_turn>user\nr<end_of_turn>\n<start_of_turn>model\n«c<end_of_turn>»",
        "system": "refuses this conversation: System role not supported",
    },
    "gemma3": {
        "first untrained": "<bos><start_of_turn>user\nq<end_of_turn>\n<start_of_turn>model\n"
        "a b<end_of_turn>\n<start_of_turn>user\nr<end_of_turn>\n<start_of_turn>model\n"
        "«c<end_of_turn>»",
        "system": "<bos><start_of_turn>user\nBe brief.\n\nq<end_of_turn>\n<start_of_turn>model\n"
        "«a b<end_of_turn>»",
    },
    "phi3": {
        "two": "<|user|>\nq<|end|>\n<|assistant|>\n«a b<|end|>»\n"
        "<|user|>\nr<|end|>\n<|assistant|>\n«c<|end|>\n<|endoftext|>»",
        "system": "<|system|>\nBe brief.<|end|>\n<|user|>\nq<|end|>\n<|assistant|>\n"
        "«a b<|end|>\n<|endoftext|>»",
    },
    "phi3_5": {
        "first untrained": "<|user|>\nq<|end|>\n<|assistant|>\na b<|end|>\n"
        "<|user|>\nr<|end|>\n<|assistant|>\n«c<|end|>\n<|endoftext|>»",
    },
    "cohere": {
        "two": f"<bos>{C('USER')}q{END}{C('CHATBOT')}«a b{END}»{C('USER')}r{END}"
        f"{C('CHATBOT')}«c{END}»",
        "system": f"<bos>{C('SYSTEM')}Be brief.{END}{C('USER')}q{END}{C('CHATBOT')}«a b{END}»",
    },
    "cohere2": {
        "two": f"…{END}{C('USER')}q{END}{C('CHATBOT')}<|START_RESPONSE|>«a b<|END_RESPONSE|>{END}»"
        f"{C('USER')}r{END}{C('CHATBOT')}<|START_RESPONSE|>«c<|END_RESPONSE|>{END}»",
    },
    "deepseek_r1_distill": {
        "one": "renders the text before turn 1 differently as a prompt and inside the "
        "conversation: '<think>\\n' and 'a b<",
        "thought": "leaves out the thought of turn 1, wholly or in part; use another",
    },
    "deepseek_r1_distill_training": {
        "one": "renders the text before turn 1 differently",  # the prompt opens a thought
        "thought": "<bos><｜User｜>q<｜Assistant｜><think>\n"
        "«hm\n</think>\n\na b<｜end▁of▁sentence｜>»",
        "reasoning": "leaves out the reasoning_content of turn 1, wholly or in part; write the "
        "thoughts into the contents, as <think>..</think>, or",
    },
    # Nothing ends an answer but the next role, and EOS where there is none.
    "glm4moe": {
        "two": "[gMASK]<sop><|user|>\nq<|assistant|>«\n<think></think>\na b<|user|>»"
        "\nr<|assistant|>«\n<think></think>\nc<|endoftext|>»",
        "reasoning": "[gMASK]<sop><|user|>\nq<|assistant|>«\n<think>hm</think>\na b<|endoftext|>»",
        "tool": "…<|user|>\nq<|assistant|>«\n<think></think>\n<tool_call>weather\n"
        "<arg_key>city</arg_key>\n<arg_value>Rome</arg_value>\n</tool_call><|observation|>»"
        "\n<tool_response>\nsunny\n</tool_response><|assistant|>"
        "«\n<think></think>\na b<|endoftext|>»",
        "two reasonings": REWRITTEN,
    },
    "glm4moe_training": {
        "two": "[gMASK]<sop><|user|>\nq<|assistant|>«\n<think></think>\na b<|user|>»"
        "\nr<|assistant|>«\n<think></think>\nc<|user|>»",
        "two reasonings": "leaves out the reasoning_content of turn 1",
    },
    "gptoss": {
        "one": "…<|start|>user<|message|>q<|end|><|start|>assistant"
        "«<|channel|>final<|message|>a b<|return|>»",
        "reasoning": "…<|start|>user<|message|>q<|end|><|start|>assistant"
        "«<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>a b"
        "<|return|>»",
        "two": "rewrites turn 1 when others follow",  # it ends earlier turns in another token
        "first untrained": "…q<|end|><|start|>assistant<|channel|>final<|message|>a b<|end|>"
        "<|start|>user<|message|>r<|end|><|start|>assistant"
        "«<|channel|>final<|message|>c<|return|>»",
        "tool": "…q<|end|><|start|>assistant« to=functions.weather<|channel|>commentary json"
        '<|message|>{"city": "Rome"}<|call|>»<|start|>functions.weather to=assistant'
        '<|channel|>commentary<|message|>"sunny"<|end|><|start|>assistant'
        "«<|channel|>final<|message|>a b<|return|>»",
    },
    "gptoss_training": {
        "two": "…q<|end|><|start|>assistant«<|channel|>final<|message|>a b<|end|>»"
        "<|start|>user<|message|>r<|end|><|start|>assistant"
        "«<|channel|>final<|message|>c<|return|>»",
        "two reasonings": "leaves out the reasoning_content of turn 1",
    },
    "lfm2": {
        "two": f"<bos>{U}q<|im_end|>\n{A}«a b<|im_end|>»\n{U}r<|im_end|>\n{A}«c<|im_end|>»",
        "tool": "leaves out the tool call 'weather' of turn 1",
    },
    "lfm2_2_5": {
        "tool": f"…{U}q<|im_end|>\n{A}«<|tool_call_start|>[weather(city='Rome')]<|tool_call_end|>"
        f"<|im_end|>»\n<|im_start|>tool\nsunny<|im_end|>\n{A}«a b<|im_end|>»",
        "reasoning": f"<bos>{U}q<|im_end|>\n{A}«<think>hm</think>a b<|im_end|>»",
    },
    "smolvlm": {"one": "leaves out the content of turn 0"},  # contents must be lists of parts
}


@pytest.mark.parametrize(("name", "kind"), [(n, kind) for n in GOLDEN for kind in GOLDEN[n]])
def test_masks_written_by_hand(name, kind):
    expected = GOLDEN[name][kind]
    if "«" not in expected:
        text = error_of(ROWS[kind], name)
        assert text.startswith("f.jsonl:1: the chat template " + expected)
    elif expected.startswith("…"):
        found = mask(ROWS[kind], name)
        assert found.endswith(expected[1:])
        assert "«" not in found.removesuffix(expected[1:])
    else:
        assert mask(ROWS[kind], name) == expected


OTHERWISE = {  # rows that the two render differently
    "qwen3": {"two", "first untrained", "tool", "tool, answer alone"},  # empty thoughts everywhere
    "qwen3_5_think": {"first untrained"},
    "qwen3_5_nothink": {"first untrained"},
    "qwen3_6": {"first untrained"},
    "glm4moe": set(ROWS),  # the next role ends the last answer too
    # After a tool's response the prompt has no header of the answer: the blocks leave it out too.
    "diffusion_gemma": {"tool", "tool, answer alone", "tool and reasonings"},
}
REFUSED = {"smolvlm", "idefics3", "llava_next", "deepseekv3", "deepseek_r1_distill"}  # wholly


@pytest.mark.parametrize("twin", TWINS)
def test_generation_blocks_give_the_mask_that_the_original_template_gives(twin):
    name = twin.removesuffix("_training")
    accepted = set()
    for kind, conversation in ROWS.items():
        try:
            original = mask(conversation, name)
        except UserError:
            continue
        accepted.add(kind)
        same = mask(conversation, twin) == original  # the twin takes what the original takes
        assert same == (kind not in OTHERWISE.get(name, ())), kind
    assert accepted or name in REFUSED
    assert OTHERWISE.get(name, set()) - accepted <= {"two reasonings"}


# Properties of any conversation

BITS = ["a", "ü", "😀", " ", "\n", "{{", "{% x %}", "{#", "'", '"', "\\", "[INST]", "<b>", "</s>"]
FAKES = ["<|im_end|>", "<|im_start|>assistant\n", "<|eot_id|>", "<end_of_turn>", "<｜Assistant｜>"]
THOUGHTS = ["<think>", "</think>"]


def contents(bits):
    return st.lists(st.sampled_from(bits), max_size=6).map("".join)


@st.composite
def conversations(draw, bits):
    """User and assistant in turns, the first maybe after a system turn; every content unique."""
    count = draw(st.integers(1, 3))
    messages = []
    if draw(st.booleans()):
        messages.append({"role": "system", "content": draw(contents(bits)) + "§S§"})
    for turn in range(count):
        messages.append(user(draw(contents(bits)) + f"§U{turn}§" + draw(contents(bits))))
        said = "" if draw(st.integers(0, 9)) == 0 else f"§A{turn}§"
        said = draw(contents(bits)) + said + draw(contents(bits))
        train = draw(st.booleans()) or turn == count - 1
        messages.append(answer(said, **({} if train else {"train": False})))
    return row(*messages)


# A template takes every such conversation, unless it has no place for a system turn.
TAKES_ALL = sorted(
    name
    for name in FILES
    if name.startswith(("llama3", "qwen2_5", "qwen3_instruct", "gemma", "phi3", "cohere", "lfm2"))
)


def check(conversation, name, tokenizer):
    example = encode(conversation, tokenizer, max_length=1_000_000)
    assert example.loss_weights[0] == 0
    again = encode(conversation, tokenizer, max_length=1_000_000)
    np.testing.assert_array_equal(again.tokens, example.tokens)
    np.testing.assert_array_equal(again.loss_weights, example.loss_weights)

    trained = [
        m for m in conversation.messages if m["role"] == "assistant" and m.get("train", True)
    ]
    learnt = [text for supervised, text in runs(example, tokenizer) if supervised]
    assert len(learnt) == len(trained)
    for message, text in zip(trained, learnt, strict=True):
        # The prompt may have opened the thought, or closed it; then the answer goes on behind that.
        said = "".join(message["content"].split())
        said = said.removeprefix("<think>").removeprefix("</think>")
        assert said in "".join(text.split()) or "think>" in text
        assert [s for s in re.findall("§.*?§", text) if s not in message["content"]] == []
    last = np.flatnonzero(np.append(np.diff(example.loss_weights), -1) < 0)
    ends = {tokenizer.decode(token) for token in example.tokens[last]}
    stops = {tokenizer.decode(token) for token in stop_tokens(tokenizer)}
    if name == "gptoss_training":
        stops.add("<|end|>")  # of earlier turns
    assert ends <= stops
    if len(trained) == 1 and len(conversation.messages) <= 3:
        prompt = prompt_tokens(conversation, tokenizer)
        np.testing.assert_array_equal(prompt, example.tokens[: example.loss_weights.argmax()])


@settings(max_examples=150, deadline=None)
@given(conversations(BITS + FAKES), st.sampled_from(TAKES_ALL))
def test_any_conversation_is_learnt_where_it_should_be(conversation, name):
    if name in ("gemma", "gemma_training") and conversation.messages[0]["role"] == "system":
        conversation = row(*conversation.messages[1:])
    check(conversation, name, TOKENIZERS[name])


@settings(max_examples=250, deadline=None)
@given(conversations(BITS + FAKES + THOUGHTS), st.sampled_from(sorted(FILES)))
@hypothesis.example(row(user("§U0§"), answer("</think>§A0§")), "qwen3_5_nothink")
def test_any_conversation_is_learnt_where_it_should_be_or_refused(conversation, name):
    try:
        encode(conversation, TOKENIZERS[name], max_length=1_000_000)
    except UserError as error:
        assert str(error).startswith("f.jsonl:1: the chat template ")
        return
    check(conversation, name, TOKENIZERS[name])
