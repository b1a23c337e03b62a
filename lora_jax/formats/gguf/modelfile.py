"""The Modelfile of Ollama, next to a GGUF file."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_jax.errors import UserError

BASE_FILE = "base.gguf"


@dataclass(frozen=True)
class Chat:
    """Stop tokens, template and system prompt, with which a program talks as in training.

    stops: ids of the tokens that end an answer
    template: chat template that replaces the tokenizer's (Jinja text)
    system_prompt: first message of every conversation
    """

    stops: Collection[int] = ()
    template: str | None = None
    system_prompt: str | None = None


PLAIN_CHAT = Chat()


def make_modelfile(chat: Chat, tokenizer: Any, weights: Collection[str]) -> str:
    """Return the text of a Modelfile that begins with the lines `weights`.

    Raises:
        UserError: a text that a Modelfile cannot hold.
    """
    lines = list(weights)
    for token in sorted(chat.stops):
        lines.append(f"PARAMETER stop {_quoted(tokenizer.convert_ids_to_tokens(token))}")
    if chat.system_prompt:
        lines.append(f"SYSTEM {_quoted(chat.system_prompt)}")
    return "\n".join(lines) + "\n"


def write_modelfile(directory: Path, text: str, chat: Chat) -> None:
    """Write a Modelfile, and a chat template of its own as chat_template.jinja."""
    (directory / "Modelfile").write_text(text, encoding="utf-8")
    if chat.template is not None:
        (directory / "chat_template.jinja").write_text(chat.template, encoding="utf-8")


def _quoted(text: str) -> str:
    if '"""' in text:
        raise UserError(f"a Modelfile cannot hold the text {text!r}, which has three quotes in it")
    return f'"""{text}"""' if '"' in text or "\n" in text else f'"{text}"'
