"""Kinds of rows: a conversation, a text, tokens with weights of their own, or a text and its label.

`lora_jax.data.parse` says which records become one.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

SYSTEM_ROLES = ("system", "developer")
ROLES = (*SYSTEM_ROLES, "user", "assistant", "tool")
REASONING = ("reasoning_content", "thinking", "reasoning")  # templates read one of these keys
# What opens and closes a thought inside of a text, by the models that write it so.
THOUGHTS = (
    ("<think>", "</think>"),  # Qwen, DeepSeek, GLM, Nemotron, SmolLM3, Granite, LFM2, OLMo
    ("<thinking>", "</thinking>"),
    ("[THINK]", "[/THINK]"),  # Magistral, Ministral
    ("<seed:think>", "</seed:think>"),  # Seed-OSS
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A
    ("◁think▷", "◁/think▷"),  # Kimi
    ("<|channel>thought", "<channel|>"),  # Gemma 4
)


@dataclass(frozen=True)
class Row:
    """One conversation: checked messages, an assistant turn among them, and where it was read."""

    messages: tuple[dict[str, Any], ...]  # {role, content, ...}; train: false is unsupervised
    where: str  # "file.jsonl:12", or "file.json[3]" counted from 0
    tools: tuple[dict[str, Any], ...] = ()  # JSON schemas for the chat template
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)  # for it too

    @property
    def answer_index(self) -> int:
        """The index of the last assistant turn."""
        return max(i for i, message in enumerate(self.messages) if message["role"] == "assistant")

    @property
    def prompt(self) -> tuple[dict[str, Any], ...]:
        """Everything before the last assistant turn: what a generation answers."""
        return self.messages[: self.answer_index]

    def to_supervised(self) -> "Row":
        """Return the row without what follows its last supervised turn, if it has one."""
        trained = [
            i
            for i, message in enumerate(self.messages)
            if message["role"] == "assistant" and message.get("train", True)
        ]
        end = trained[-1] + 1 if trained else None
        return dataclasses.replace(self, messages=self.messages[:end])


@dataclass(frozen=True)
class TextRow:
    """A plain text, every token of it supervised; no chat template touches it."""

    text: str
    where: str


@dataclass(frozen=True)
class TokenRow:
    """Tokens as somebody else's tokenisation made them, with a weight for each as a target."""

    tokens: tuple[int, ...]
    loss_weights: tuple[float, ...]  # finite, not negative, as many as there are tokens
    where: str
    sequence: int | None = None  # its number, from 0, in the packed row that it came from


@dataclass(frozen=True)
class LabelRow:
    """A text, or a pair of texts, and what it is to be classified as."""

    texts: tuple[str, ...]  # one or two
    label: str
    where: str


AnyRow = Row | TextRow | TokenRow | LabelRow


class BadRow(Exception):
    """A problem with one record, without its place."""


def kind(value: Any) -> str:
    """The JSON name of a value's type, with its article; Python's name where JSON has none."""
    names = {str: "a string", bool: "a boolean", list: "a list", dict: "an object"}
    names |= {int: "a number", float: "a number", type(None): "null"}
    return names.get(type(value), f"a {type(value).__name__}")


def printable(text: str) -> str:
    """`text` cut to a line's length, without lone surrogates, which no terminal can print."""
    text = text[:201].encode("utf-8", "backslashreplace").decode("utf-8")
    return text if len(text) <= 200 else text[:197] + "..."


def listed(names: Sequence[str]) -> str:
    """Names for a message."""
    return printable(", ".join(names) or "none")
