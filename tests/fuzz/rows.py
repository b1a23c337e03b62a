"""Rows of every form, whole and damaged, as one line of a file each, from the file to the tokens.

What is supervised of an accepted row must be its answers.
"""

import json
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from lora_jax import data, formats
from lora_jax.data import LabelRow, Row, TextRow, TokenRow

from ..train.tiny import write_tokenizer
from . import watch
from .damage import damage_bytes, damage_json
from .templates import TEMPLATES

END = "<|im_end|>"
WORDS = (
    *(
        "one",
        "zwei",
        " ",
        "\n",
        "a b",
        "\t",
        "  x ",
        "é",
        "日本",
        "🙂",
        "<|im_end|>",
        "<|im_start|>user",
    ),
    *("\u200b", "\ufeff", "\x1b[31m", "\\", '"', "{x}", "{{ x }}", "{% if %}", "<think>t</think>"),
    *(
        "\u2028",
        "\r\n",
        "assistant",
        "null",
        "NaN",
        "0",
        "\x00",
        "\x7f",
        "e\u0301",
        "<pad>",
        "[/INST]",
    ),
)


def open_cases(sandbox: Path) -> watch.Make:
    """Tokenizers, each with one of the templates, and a maker of files of one row."""
    tokenizers = {}
    for name, template in TEMPLATES.items():
        (sandbox / name).mkdir()
        write_tokenizer(sandbox / name, template)
        tokenizers[name] = formats.load_tokenizer(sandbox / name)

    def make(random: Random, place: Path) -> watch.Case:
        name = random.choice(("rows.jsonl",) * 4 + ("rows.json", "rows.csv", "rows.tsv"))
        content = _content(random, name)
        file = place / name
        file.write_bytes(content)
        template = random.choice(("none", *tokenizers))
        chosen = tokenizers["plain" if template == "none" else template]
        settings: dict[str, Any] = {"chat_template": "none" if template == "none" else None}
        if random.random() < 0.2:
            settings["system_prompt"] = _text(random)
        named = {}
        if random.random() < 0.1:
            named = {"prompt": random.choice(("{prompt}", "{x}", "{", "a {prompt} b {text}"))}
        what = f"{template} {name} {content[:300]!r} {settings} {named}"
        return what, [name, "prompt="], lambda: _check(file, chosen, settings, named)

    return make


def _check(file: Path, tokenizer: Any, settings: dict[str, Any], named: dict[str, str]) -> None:
    rows = data.read(file, **named).rows
    examples, counts = data.encode_all(rows, tokenizer, max_length=400_000, **settings)
    assert counts.examples == len(examples)
    if len(examples) < len(rows):  # sequences of packed rows
        return
    for row, example in zip(rows, examples, strict=True):
        assert example.tokens.min() >= 0 and np.isfinite(example.loss_weights).all()
        assert example.tokens.shape == example.loss_weights.shape
        expected = _supervised(row, tokenizer, settings["chat_template"] == "none")
        if expected is not None:
            taught = example.loss_weights > 0
            if (
                isinstance(row, Row) and taught[1:2].all() and not taught[0]
            ):  # no first token can be predicted
                taught[0] = example.tokens[0] == tokenizer(expected)["input_ids"][0]
            kept = example.tokens[taught]
            found = tokenizer.decode(kept, clean_up_tokenization_spaces=False)
            assert found == expected, f"supervised is {found!r}, and not {expected!r}"


def _supervised(row: Any, tokenizer: Any, plain: bool) -> str | None:
    """The text that must be supervised; None where the template has a say in it."""
    if isinstance(row, TokenRow):
        weights = np.asarray(row.loss_weights[1:], np.float32)
        return tokenizer.decode(
            [token for token, weight in zip(row.tokens[1:], weights, strict=True) if weight > 0],
            clean_up_tokenization_spaces=False,
        )
    if isinstance(row, TextRow):
        return None
    if isinstance(row, LabelRow) or not isinstance(row, Row):
        return None
    answers = [m for m in row.messages if m["role"] == "assistant" and m.get("train", True)]
    if any({*m} - {"role", "content", "train"} for m in answers):
        return None
    texts = [m.get("content") or "" for m in answers]
    if plain:
        return None if texts[-1].endswith(END) else texts[-1] + END
    if tokenizer.chat_template == TEMPLATES["stripping"]:
        texts = [text.strip() for text in texts]
    return "".join(text + END for text in texts)


# Records


def _text(random: Random) -> str:
    return "".join(random.choice(WORDS) for _ in range(random.choice((0, 1, 1, 2, 3, 8))))


def _turn(random: Random, role: str) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": role, "content": _text(random)}
    kind = random.random()
    if role == "assistant" and kind < 0.1:
        function = {"name": "f", "arguments": random.choice(({"a": 1}, '{"a": [1]}', {}, ""))}
        turn |= {"tool_calls": [{"type": "function", "function": function}]}
    elif role == "assistant" and kind < 0.2:
        turn["train"] = random.choice((True, False, 0, 1))
    elif role == "assistant" and kind < 0.25:
        turn["reasoning_content"] = _text(random)
    elif kind < 0.3:
        turn["content"] = [{"type": "text", "text": _text(random)}]
    return turn


def _record(random: Random) -> dict[str, Any]:
    form = random.choice(
        ("pair", "pair", "messages", "messages", "sharegpt", "alpaca", "text", "ids")
    )
    if form == "pair":
        return {"prompt": _text(random), "completion": _text(random)}
    if form == "messages":
        roles = ["user", "assistant"] * random.choice((1, 1, 2, 3))
        roles = random.choice(([], ["system"], ["assistant"])) + roles
        record: dict[str, Any] = {"messages": [_turn(random, role) for role in roles]}
        if random.random() < 0.1:
            record["tools"] = [{"name": "f", "parameters": {"type": "object"}}]
        return record
    if form == "sharegpt":
        return {
            "conversations": [
                {"from": random.choice(("human", "user")), "value": _text(random)},
                {"from": "gpt", "value": _text(random)},
            ]
        }
    if form == "alpaca":
        return {key: _text(random) for key in ("instruction", "input", "output")}
    if form == "text":
        return {"text": _text(random)}
    count = random.randrange(1, 20)
    record = {"input_ids": [random.randrange(3, 259) for _ in range(count)]}
    if random.random() < 0.5:
        record["labels"] = [random.choice((-100, token)) for token in record["input_ids"]]
    if random.random() < 0.2:
        record["seq_lengths"] = [count // 2, count - count // 2]
    return record


MORE = (
    *("system", "tools", "weight", "id", "label", "chosen", "text", "prompt", "train", "images"),
    *("chat_template_kwargs", "labels", "attention_mask", "position_ids", "loss_weights", "x"),
)


def _content(random: Random, name: str) -> bytes:
    """The bytes of a file with one record."""
    record = _record(random)
    damaged = random.random() < 0.5
    if name.endswith((".csv", ".tsv")):
        flat = {key: v if isinstance(v, str) else json.dumps(v) for key, v in record.items()}
        between = "," if name.endswith(".csv") else "\t"
        lines = [
            between.join('"' + field.replace('"', '""') + '"' for field in fields)
            for fields in (flat, flat.values())
        ]
        content = ("\n".join(lines) + "\n").encode("utf-8", "surrogatepass")
        return damage_bytes(random, content)[1] if damaged else content
    text = json.dumps(record, ensure_ascii=random.random() < 0.5)
    if damaged and random.random() < 0.8:
        text = damage_json(random, text, MORE)[1]
    elif damaged:
        return damage_bytes(random, text.encode())[1]
    if name.endswith(".json"):
        text = random.choice(("[{}]", '{{"data": [{}]}}', "[{},\n1]", "{}")).format(text)
    return (text + "\n").encode("utf-8", "surrogatepass")


if __name__ == "__main__":
    watch.main(open_cases)
