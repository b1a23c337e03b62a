"""Kinds of rows: a conversation, a plain text, tokens with loss weights, a text with a label, and
answers to compare.

`lora_jax.data.parse` makes rows of records.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

SYSTEM_ROLES = ("system", "developer")
ROLES = (*SYSTEM_ROLES, "user", "assistant", "tool")
REASONING = ("reasoning_content", "thinking", "reasoning")  # templates read one of these keys
# (opening, closing) of a thought in a text, with the models that use them.
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
    """A conversation of checked messages, with at least one assistant turn."""

    messages: tuple[dict[str, Any], ...]  # {role, content, ...}; train: false is unsupervised
    where: str  # "file.jsonl:12", or "file.json[3]" counted from 0
    tools: tuple[dict[str, Any], ...] = ()  # JSON schemas for the chat template
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)  # more arguments for it

    @property
    def answer_index(self) -> int:
        """Index of the last assistant turn."""
        return max(i for i, message in enumerate(self.messages) if message["role"] == "assistant")

    @property
    def prompt(self) -> tuple[dict[str, Any], ...]:
        """Messages before the last assistant turn, to be answered by a generation."""
        return self.messages[: self.answer_index]

    def to_supervised(self) -> "Row":
        """Return the row without the turns after its last supervised one, if it has one."""
        trained = [
            i
            for i, message in enumerate(self.messages)
            if message["role"] == "assistant" and message.get("train", True)
        ]
        end = trained[-1] + 1 if trained else None
        return dataclasses.replace(self, messages=self.messages[:end])


@dataclass(frozen=True)
class TextRow:
    """A plain text, fully supervised and not rendered by a chat template."""

    text: str
    where: str


@dataclass(frozen=True)
class TokenRow:
    """Tokens made by another program, each with its loss weight as a target."""

    tokens: tuple[int, ...]
    loss_weights: tuple[float, ...]  # one for each token, finite and at least 0
    where: str
    sequence: int | None = None  # index in the packed row that it is from


@dataclass(frozen=True)
class LabelRow:
    """A text, or a pair of texts, with its label."""

    texts: tuple[str, ...]  # one or two
    label: str
    where: str


@dataclass(frozen=True)
class PairRow:
    """Two answers to one prompt, of which the first is preferred."""

    chosen: Row
    rejected: Row
    where: str

    @property
    def texts(self) -> tuple[Row, ...]:
        """Its conversations."""
        return self.chosen, self.rejected

    @property
    def answer(self) -> Row | None:
        """The conversation with the right answer, to compare a generated one with."""
        return self.chosen


@dataclass(frozen=True)
class JudgedRow:
    """An answer with a label: desirable or not."""

    row: Row
    desirable: bool
    where: str

    @property
    def texts(self) -> tuple[Row, ...]:
        """Its conversation."""
        return (self.row,)

    @property
    def answer(self) -> Row | None:
        """The conversation, if its answer is right."""
        return self.row if self.desirable else None


AnyRow = Row | TextRow | TokenRow | LabelRow | PairRow | JudgedRow


class BadRow(Exception):
    """A problem of one record; the message does not name the record."""


def kind(value: Any) -> str:
    """Return the JSON type of a value with its article, or the Python type if JSON has none."""
    names = {str: "a string", bool: "a boolean", list: "a list", dict: "an object"}
    names |= {int: "a number", float: "a number", type(None): "null"}
    return names.get(type(value), f"a {type(value).__name__}")


def printable(text: str) -> str:
    """Return `text` cut to 200 characters, with unpaired surrogates escaped for printing."""
    text = text[:201].encode("utf-8", "backslashreplace").decode("utf-8")
    return text if len(text) <= 200 else text[:197] + "..."


def listed(names: Sequence[str]) -> str:
    """Join names for a message."""
    return printable(", ".join(names) or "none")
