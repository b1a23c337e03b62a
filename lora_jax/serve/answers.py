"""Answers in the form of OpenAI's interface: whole, and as chunks of a stream."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lora_jax.serve.complete import Asked, Piece, Scored
from lora_jax.serve.texts import Texts


@dataclass
class Usage:
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int = 0

    @property
    def body(self) -> dict[str, int]:
        """The JSON of the answer."""
        total = self.prompt_tokens + self.completion_tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": total,
        }


@dataclass
class Form:
    """The form of the answers to one request.

    Args:
        id: cmpl-.. or chatcmpl-..
        asked: the request.
        fingerprint: of base and adapters.
    """

    id: str
    asked: Asked
    fingerprint: str
    usage: Usage = field(init=False)
    created: int = field(init=False)
    kind: str = "text_completion"
    chunk_kind: str = "text_completion"

    def __post_init__(self) -> None:
        self.usage = Usage(sum(map(len, self.asked.prompts)))
        self.created = int(time.time())
        count = len(self.asked.prompts) * self.asked.request.n
        self._begun = [False] * count
        self._offsets = [0] * count

    def envelope(self, kind: str, choices: Sequence[Any]) -> dict[str, Any]:
        """Return the fields around choices."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.asked.request.model,
            "system_fingerprint": self.fingerprint,
            "choices": list(choices),
        }

    def chunks(self, piece: Piece) -> list[dict[str, Any]]:
        """Return the chunks of a stream for a piece; none if it adds nothing."""
        self.usage.completion_tokens += len(piece.tokens)
        return [self._chunk(choice) for choice in self._deltas(piece)]

    def last_chunks(self) -> list[dict[str, Any]]:
        """Return the chunk with the usage, if it was asked for."""
        options = self.asked.request.stream_options
        if options is None or not options.include_usage:
            return []
        return [{**self.envelope(self.chunk_kind, ()), "usage": self.usage.body}]

    def whole(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """Return the answer without a stream."""
        self.usage.completion_tokens += sum(len(piece.tokens) for piece in pieces)
        count = len(self._begun)
        choices = [
            self._choice(_joined([piece for piece in pieces if piece.index == index]))
            for index in range(count)
        ]
        return {**self.envelope(self.kind, choices), "usage": self.usage.body}

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        chunk = self.envelope(self.chunk_kind, [choice])
        options = self.asked.request.stream_options
        if options is not None and options.include_usage:
            chunk["usage"] = None
        return chunk

    def _deltas(self, piece: Piece) -> list[dict[str, Any]]:
        """Return choices of chunks."""
        first = not self._begun[piece.index]
        if first and self.asked.prompt_log_probs is not None and piece.prompt_scores is None:
            return []  # the prompt is still being read
        adds = piece.text or piece.scores or piece.prompt_scores or piece.finish_reason or first
        if not adds and not (piece.tokens and self.asked.request.return_token_ids):
            return []
        self._begun[piece.index] = True
        return [self._choice(piece, first)]

    def _choice(self, piece: Piece, first: bool = True) -> dict[str, Any]:
        """Return a choice of a completion. The first chunk has the prompt, if it is echoed."""
        asked, echo = self.asked, self._echoed(piece.index) if first else None
        choice: dict[str, Any] = {
            "index": piece.index,
            "text": (echo or "") + piece.text,
            "logprobs": self._log_probs(piece, echo is not None),
            "finish_reason": piece.finish_reason,
            "stop_reason": piece.stop_reason,
        }
        self._add_ids(choice, piece, first)
        if asked.request.prompt_logprobs is not None and piece.prompt_scores is not None:
            choice["prompt_logprobs"] = [
                None if one is None else prompt_entry(one, asked.texts)
                for one in piece.prompt_scores
            ]
        return choice

    def _add_ids(self, choice: dict[str, Any], piece: Piece, first: bool) -> None:
        if self.asked.request.return_token_ids:
            choice["token_ids"] = piece.tokens
            if first:
                choice["prompt_token_ids"] = list(self._prompt(piece.index))

    def _prompt(self, index: int) -> Sequence[int]:
        return self.asked.prompts[index // self.asked.request.n]

    def _echoed(self, index: int) -> str | None:
        texts = self.asked.prompt_texts
        return None if texts is None else texts[index // self.asked.request.n]

    def _log_probs(self, piece: Piece, echo: bool) -> dict[str, Any] | None:
        most = getattr(self.asked.request, "logprobs", None)
        if most is None:
            return None
        texts = self.asked.texts
        entries: list[tuple[int, Scored | None]] = []
        if echo and piece.prompt_scores is not None:
            entries += zip(self._prompt(piece.index), piece.prompt_scores, strict=True)
        entries += [(one.token, one) for one in piece.scores or ()]
        names = [texts.token_text(token) for token, _ in entries]
        offsets = []
        for name in names:
            offsets.append(self._offsets[piece.index])
            self._offsets[piece.index] += len(name)
        return {
            "tokens": names,
            "token_logprobs": [None if one is None else one.value for _, one in entries],
            "top_logprobs": [
                None if one is None else by_text(one, texts, most) for _, one in entries
            ],
            "text_offset": offsets,
        }


class ChatForm(Form):
    """The form of the answers to a conversation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.kind, self.chunk_kind = "chat.completion", "chat.completion.chunk"

    def _deltas(self, piece: Piece) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        base: dict[str, Any] = {"index": piece.index, "logprobs": None, "finish_reason": None}
        if first := not self._begun[piece.index]:
            self._begun[piece.index] = True
            found.append({**base, "delta": {"role": "assistant", "content": ""}})
            self._add_ids(found[0], Piece(piece.index, "", []), first)
        scores = self._log_probs(piece, False)
        shown = self.asked.request.return_token_ids and piece.tokens
        if piece.text or scores is not None and scores["content"] or shown:
            found.append({**base, "delta": {"content": piece.text}, "logprobs": scores})
            self._add_ids(found[-1], piece, False)
        if piece.finish_reason is not None:
            end = {"finish_reason": piece.finish_reason, "stop_reason": piece.stop_reason}
            found.append({**base, **end, "delta": {}})
        return found

    def _choice(self, piece: Piece, first: bool = True) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": piece.index,
            "message": {"role": "assistant", "content": piece.text},
            "logprobs": self._log_probs(piece, False),
            "finish_reason": piece.finish_reason,
            "stop_reason": piece.stop_reason,
        }
        self._add_ids(choice, piece, first)
        if self.asked.request.prompt_logprobs is not None and piece.prompt_scores is not None:
            choice["prompt_logprobs"] = [
                None if one is None else prompt_entry(one, self.asked.texts)
                for one in piece.prompt_scores
            ]
        return choice

    def _log_probs(self, piece: Piece, echo: bool) -> dict[str, Any] | None:
        if not getattr(self.asked.request, "logprobs", False):
            return None
        texts = self.asked.texts

        def entry(token: int, value: float) -> dict[str, Any]:
            text = texts.token_text(token)
            return {"token": text, "logprob": value, "bytes": texts.token_bytes(token)}

        return {
            "content": [
                {
                    **entry(one.token, one.value),
                    "top_logprobs": [entry(*pair) for pair in one.top],
                }
                for one in piece.scores or ()
            ]
        }


def by_text(one: Scored, texts: Texts, most: int) -> Mapping[str, float]:
    """Return log-probabilities of a token and of the `most` likely ones, by their text; of two
    tokens with one text the larger stays.
    """
    found: dict[str, float] = {}
    for token, value in (*one.top[:most], (one.token, one.value)):
        name = texts.token_text(token)
        found[name] = max(value, found.get(name, value))
    return found


def prompt_entry(one: Scored, texts: Texts) -> dict[str, Any]:
    """Return an entry of `prompt_logprobs`, by token id."""
    ranks = {token: rank for rank, (token, _) in enumerate(one.top, 1)}
    values = {**dict(one.top), one.token: one.value}
    decode: Callable[[int], str] = texts.token_text
    return {
        str(token): {"logprob": value, "rank": ranks.get(token), "decoded_token": decode(token)}
        for token, value in values.items()
    }


def _joined(pieces: Sequence[Piece]) -> Piece:
    """Return the pieces of a choice as one."""
    scores = [piece.scores for piece in pieces if piece.scores is not None]
    prompt = [piece.prompt_scores for piece in pieces if piece.prompt_scores is not None]
    return Piece(
        pieces[0].index,
        "".join(piece.text for piece in pieces),
        [token for piece in pieces for token in piece.tokens],
        [one for part in scores for one in part] if scores else None,
        prompt[0] if prompt else None,
        pieces[-1].finish_reason,
        pieces[-1].stop_reason,
    )
