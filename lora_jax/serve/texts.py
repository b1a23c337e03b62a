"""Texts of an adapter or the base: tokenizer, chat template, and tokens that end an answer."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_jax import data, formats
from lora_jax.config import read_text
from lora_jax.data.messages import messages_of, tools_of
from lora_jax.data.render import render
from lora_jax.data.tokens import tokenize
from lora_jax.errors import UserError
from lora_jax.serve.errors import ApiError, refused


@dataclass(frozen=True)
class Texts:
    """Tokenizer and template of an adapter, or of the base."""

    tokenizer: Any
    stops: frozenset[int]  # tokens that end an answer
    of_configs: tuple[int, ...]  # those of them that the configs of the base name
    arguments: Mapping[str, Any]  # for the template

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Return the tokens of a text. The beginning-of-text token is not added to a text that
        begins with it, as rendered conversations do.
        """
        tokenizer = self.tokenizer
        ids = list(tokenizer(text, add_special_tokens=add_special_tokens).input_ids)
        bos = tokenizer.bos_token_id
        if add_special_tokens and bos is not None and ids[:2] == [bos, bos]:
            ids = ids[1:] if text.startswith(str(tokenizer.bos_token)) else ids
        return ids

    def render(self, request: Any) -> str:
        """Return the prompt of a conversation.

        Raises:
            ApiError: 400 for messages that no template takes, or that this one refuses.
        """
        messages, tools = _checked(request)
        if request.add_generation_prompt and request.continue_final_message:
            raise refused("continue_final_message", "not together with add_generation_prompt: true")
        if request.continue_final_message and messages[-1]["role"] != "assistant":
            raise refused("continue_final_message", "the last message is not the assistant's")
        arguments = {**self.arguments, **request.chat_template_kwargs}
        row = data.Row((), "messages", tools, arguments)
        try:
            template = data.resolve_template(self.tokenizer, None, tools)
        except UserError as error:
            message = "the model has no chat template; use /v1/completions"
            raise ApiError(400, message, param="messages") from error
        begins = request.add_generation_prompt is not False
        options: dict[str, Any] = {"add_generation_prompt": begins}
        if request.continue_final_message:
            options = {"continue_final_message": True}
        try:
            return render(self.tokenizer, str(template), row, messages, **options)
        except UserError as error:
            raise ApiError(400, str(error), param="messages") from error

    def encode_chat(self, request: Any) -> list[int]:
        """Return the tokens of a conversation.

        Raises:
            ApiError: as `render`.
        """
        text = self.render(request)
        if request.add_special_tokens:
            return self.encode(text, True)
        return tokenize(self.tokenizer, [text])[0][0]

    def token_text(self, token: int) -> str:
        """Return the text of a token alone."""
        return self.tokenizer.decode([token], skip_special_tokens=False)

    def token_bytes(self, token: int) -> list[int]:
        """Return the bytes of a token, of a part of a character too."""
        text = self.token_text(token)
        if "\ufffd" not in text:
            return list(text.encode())
        stored = str(self.tokenizer.convert_ids_to_tokens(token))
        if len(stored) == 6 and stored.startswith("<0x"):
            return [int(stored[3:5], 16)]
        if all(character in _BYTES for character in stored):
            return [_BYTES[character] for character in stored]
        return list(text.encode())


def read_texts(directory: Path, base: Texts) -> Texts:
    """Read the texts of an adapter's directory; what it has not is the base's.

    Raises:
        UserError: files that cannot be read.
    """
    tokenizer, template = base.tokenizer, directory / "chat_template.jinja"
    if (directory / "tokenizer_config.json").is_file():
        tokenizer = formats.load_tokenizer(directory)
    elif template.is_file():
        tokenizer = copy.copy(tokenizer)
        tokenizer.chat_template = read_text(template)
    arguments = formats.read_template_kwargs(directory)
    own = [*base.of_configs, *formats.read_stops(directory)]
    stops = data.stop_tokens(tokenizer, None, own, arguments)
    return Texts(tokenizer, stops, base.of_configs, arguments)


def base_texts(source: Path) -> Texts:
    """Read the texts of the base from its directory.

    Raises:
        UserError: files that cannot be read; a chat template that cannot be used.
    """
    tokenizer, of_configs = formats.load_tokenizer(source), formats.stop_tokens(source)
    return Texts(tokenizer, data.stop_tokens(tokenizer, None, of_configs), tuple(of_configs), {})


def _checked(request: Any) -> tuple[list[dict[str, Any]], tuple[dict[str, Any], ...]]:
    """Return messages and tools of a request in the form of rows."""
    for number, message in enumerate(request.messages):
        parts = message.get("content")
        for part in parts if isinstance(parts, list) else ():
            kind = part.get("type") if isinstance(part, dict) else None
            if kind != "text":
                raise refused(f"messages[{number}].content", f"parts of type {kind!r} are not text")
    given = [
        {key: value for key, value in message.items() if value is not None or key == "content"}
        for message in request.messages
    ]
    try:
        found = messages_of(given, "messages")
        return found, tools_of({"tools": request.tools} if request.tools else {})
    except data.BadRow as error:
        raise ApiError(400, str(error), param="messages") from error


def _byte_characters() -> dict[str, int]:
    """Return the bytes of the characters by which byte-level tokenizers write them."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(byte): byte for byte in shown}
    hidden = [byte for byte in range(256) if byte not in shown]
    return table | {chr(256 + number): byte for number, byte in enumerate(hidden)}


_BYTES = _byte_characters()
