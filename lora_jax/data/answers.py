"""Supervised and generated answers as text, in one form so that they can be compared.

    supervised    <think>\\n\\n</think>\\n\\n {"city": "Rome"} <|im_end|>
    generated     <think>\\n so: Rome \\n</think>\\n\\n {"city": "Rome"}
    compared      {"city": "Rome"}

The reference of a row is the text of its last supervised turn as the template writes it, uncut. It
is tokenised and read in the same way as a generation: it ends before its first stop token, the text
that the template writes before every answer is left out, and special tokens are skipped. With
`strip_thoughts`, the thought is left out too. An answer with tool calls is compared in the form of
`calls.canonical`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lora_jax.data.calls import canonical
from lora_jax.data.chat_templates import Template, find_template
from lora_jax.data.render import Rendering, content, with_kwargs
from lora_jax.data.rows import THOUGHTS, Row
from lora_jax.data.templates import encode_prompt
from lora_jax.data.texts import to_text

# (opening, closing) of models that write the thought as a separate message.
_MESSAGES = (
    ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant"),  # gpt-oss
    ("to=self<|message|>", "<|eom|><|start|>assistant"),  # Muse
)


@dataclass(frozen=True)
class AnswerReader:
    """Prompts, references and answers of held-out rows under one chat template."""

    rendering: Rendering
    stop_tokens: frozenset[int]
    strip_thoughts: bool = True
    # Templates in use, by (row has tools, arguments of the template).
    templates: dict[tuple[bool, str], Template | None] = field(default_factory=dict)

    @property
    def tokenizer(self) -> Any:
        return self.rendering.tokenizer

    def prompt(self, row: Row) -> np.ndarray:
        """Return the tokens before the last supervised turn, up to where its answer begins."""
        return encode_prompt(row.to_supervised(), self.rendering)

    def references(self, rows: Sequence[Row]) -> tuple[str, ...]:
        """Return the distinct references of rows that share a prompt.

        Raises:
            UserError: see `encode_all`.
        """
        found = map(self._reference, rows)
        return tuple(dict.fromkeys(map(canonical, found) if _call_tools(rows) else found))

    def read(
        self, rows: Sequence[Row], prompt: Sequence[int], tokens: Sequence[int]
    ) -> tuple[str, str]:
        """Return (thought, answer) of tokens generated after `prompt`, the prompt of all `rows`."""
        before = self.tokenizer.decode(prompt, skip_special_tokens=False)
        thought, answer = self._read(tokens, before, self._template(rows[0]))
        return thought, canonical(answer) if _call_tools(rows) else answer

    def _reference(self, row: Row) -> str:
        """Return the last supervised turn, read like a generation of the same tokens."""
        template = self._template(row)
        full = with_kwargs(row, self.rendering.chat_template_kwargs)
        found = to_text(full, self.rendering, template)
        spans = [found.text[start:end] for start, end in found.spans if start >= found.prompt_end]
        ids = self.tokenizer("".join(spans), add_special_tokens=False, verbose=False)["input_ids"]
        return self._read(ids, found.text[: found.prompt_end], template)[1]

    def _template(self, row: Row) -> Template | None:
        """Return the row's template, read once for each source and arguments."""
        arguments = with_kwargs(row, self.rendering.chat_template_kwargs).chat_template_kwargs
        key = bool(row.tools), repr(arguments)
        if key not in self.templates:
            self.templates[key] = find_template(row, self.rendering)
        return self.templates[key]

    def _read(
        self, tokens: Sequence[int], before: str, template: Template | None
    ) -> tuple[str, str]:
        """Return (thought, answer) of tokens generated after the text `before`."""
        stop = next((i for i, token in enumerate(tokens) if token in self.stop_tokens), None)
        tokens = list(tokens[:stop])
        text = self.tokenizer.decode(tokens, skip_special_tokens=False)
        thought, answer, inner = "", text, ""
        if self.strip_thoughts:
            thought, answer = split_thought(before, text)
        head = template.head.strip() if template is not None else ""
        if head and answer.lstrip().startswith(head):
            answer = answer.lstrip().removeprefix(head)
        if self.strip_thoughts:  # the content's own, after an empty one
            inner, answer = split_thought("", answer)
        if answer == text:
            return "", self.tokenizer.decode(tokens, skip_special_tokens=True)
        thought = self._without_special(f"{thought.strip()}\n{inner.strip()}")
        return thought.strip(), self._without_special(answer).strip()

    def _without_special(self, text: str) -> str:
        special = [
            token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special
        ]
        # Longest first: if one token is a prefix of another, the tokenizer takes the longer.
        special.sort(key=len, reverse=True)
        return re.sub("|".join(map(re.escape, special)), "", text) if special else text


def _call_tools(rows: Sequence[Row]) -> bool:
    """Return True if an answer calls a tool, or its content has a call as text."""
    answers = [row.to_supervised().messages[-1] for row in rows]
    return any(one.get("tool_calls") or "<tool_call>" in content(one) for one in answers)


def split_thought(before: str, text: str) -> tuple[str, str]:
    """Split text that follows `before` into its thought and what comes after it.

    The thought begins the text, or was opened by `before`. A text that never closes its thought is
    returned as the answer.

        >>> split_thought("assistant\\n", "<think>\\nhm</think> yes")
        ('\\nhm', ' yes')
        >>> split_thought("assistant\\n<think>\\n", "hm</think> yes")
        ('hm', ' yes')
        >>> split_thought("assistant\\n", "<think>\\nhm")
        ('', '<think>\\nhm')
    """
    for opening, closing in (*THOUGHTS, *_MESSAGES):
        inside = before.rstrip().endswith(opening)
        if closing in text and (inside or text.lstrip().startswith(opening)):
            thought, _, answer = text.partition(closing)
            return thought.lstrip().removeprefix(opening), answer
    return "", text
