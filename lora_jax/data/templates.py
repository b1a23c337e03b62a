"""Conversations to tokens and loss weights, by the tokenizer's chat template.

    example = encode(row, tokenizer, max_length=512)

    text          <|im_start|>user\\n 2+2? <|im_end|>\\n <|im_start|>assistant\\n 4 <|im_end|>
    loss_weights  0                                                            1 1

A conversation is rendered whole and tokenised once, without further special tokens: BOS is there
as often as the template writes it. Supervised is, of every assistant turn but `train: false` ones,
the text from where the generation prompt ends to the end of the turn, with its end-of-turn token
and without the template's whitespace after it. That is decided by position in the text, never by
token id: EOS is learnt where pad and EOS are the same token. A token that begins in the prompt
belongs to the prompt. What follows the last supervised turn is left out of the example.

`chat_template` is throughout: None for the tokenizer's own, the path of a Jinja file, or "none" for
prompt and completion joined as they stand, after BOS if the tokenizer would add one, and with EOS.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.config import UserError
from lora_jax.data.rows import SYSTEM_ROLES, Row
from lora_jax.data.sources import raise_first

PLAIN = "none"
_OPTIONS = (
    "data.chat_template is null for the tokenizer's own, the path of a Jinja file, "
    f"or {PLAIN!r} for prompt and completion as they stand"
)
_BATCH = 1024  # texts per call of the tokenizer


@dataclass(frozen=True, eq=False)
class Example:
    """One tokenised conversation; `loss_weights[i]` belongs to `tokens[i]` as a target."""

    tokens: np.ndarray  # (time,) int32
    loss_weights: np.ndarray  # (time,) float32, above 0 where the token is to be predicted
    where: str  # the row it came from


@dataclass(frozen=True)
class Counts:
    """What became of the rows of a data set."""

    examples: int  # rows kept
    supervised_tokens: int  # of the kept rows
    total_tokens: int  # of the kept rows
    truncated: int  # kept rows that were cut at max_length
    dropped: int  # rows left out: too long, or without a supervised token after the cut
    longest: int  # tokens of the longest row before any cut
    unaligned: int  # rows whose prompt, tokenised alone as for generation, gives other tokens


@dataclass(frozen=True)
class _Text:
    text: str
    spans: list[tuple[int, int]]  # characters that are supervised
    answer_end: int  # where the last supervised turn's own content ends


def encode(
    row: Row,
    tokenizer: Any,
    *,
    system_prompt: str | None = None,
    chat_template: str | None = None,
    max_length: int,
    too_long: str = "truncate",
) -> Example | None:
    """One row as `encode_all` encodes it, or None where that would drop it.

    Raises:
        UserError: as `encode_all`.
    """
    examples, _ = _collect([row], tokenizer, system_prompt, chat_template, max_length, too_long)
    return examples[0] if examples else None


def encode_all(
    rows: Sequence[Row],
    tokenizer: Any,
    *,
    system_prompt: str | None = None,
    chat_template: str | None = None,
    max_length: int,
    too_long: str = "truncate",
) -> tuple[list[Example], Counts]:
    """Every row as an `Example` of at most `max_length` tokens, and the counts of what happened.

    `system_prompt` goes before rows that have no system turn. `too_long`: "truncate" cuts and drops
    what has no supervised token left, "drop" drops, "error" refuses.

    Raises:
        UserError: no chat template or a bad one; conversations that it refuses or rewrites; rows
            too long under "error"; rows without a supervised token; no example left; a tokenizer
            without offsets or, where it is needed, without EOS.
    """
    options = (system_prompt, chat_template, max_length, too_long)
    examples, counts = _collect(rows, tokenizer, *options)
    if not examples:
        raise UserError(
            f"no example is left of {len(rows)} rows: the longest has {counts.longest} tokens, "
            f"data.max_length={max_length}, data.too_long={too_long!r}"
        )
    return examples, counts


def prompt_tokens(
    row: Row,
    tokenizer: Any,
    *,
    system_prompt: str | None = None,
    chat_template: str | None = None,
) -> np.ndarray:
    """(time,) int32: everything before the last assistant turn, up to where its answer begins.

    Raises:
        UserError: as `encode_all`; the row begins with its answer.
    """
    template = resolve_template(tokenizer, chat_template)
    messages = _conversation(row, system_prompt)
    messages = messages[: len(messages) - len(row.messages) + row.answer_index]
    if template is None:
        text, head = "".join(_content(message) for message in messages), _bos(tokenizer)
    else:
        text, head = _render_prompt(tokenizer, template, messages, row.where), []
    ids = _tokenize(tokenizer, [text])[0][0]
    return np.asarray(_join(head, ids), np.int32)


def stop_tokens(
    tokenizer: Any, chat_template: str | None = None, extra: Iterable[int] = ()
) -> frozenset[int]:
    """The ids that end an answer: EOS, the token the template writes after an answer, and `extra`.

    Raises:
        UserError: no chat template or a bad one.
    """
    template = resolve_template(tokenizer, chat_template)
    ending = None if template is None else _ending(tokenizer, template)[1]
    return frozenset(extra) | {i for i in (tokenizer.eos_token_id, ending) if i is not None}


def reference(row: Row) -> str:
    """The content of the last assistant turn: what a generation is compared with."""
    return _content(row.messages[row.answer_index])


def resolve_template(tokenizer: Any, chat_template: str | None) -> str | None:
    """The source of the Jinja template, or None for plain text.

    Raises:
        UserError: the file cannot be read, or the tokenizer has no template of its own.
    """
    if chat_template == PLAIN:
        return None
    if chat_template is not None:
        try:
            return Path(chat_template).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(
                f"data.chat_template={chat_template!r} cannot be read: {reason}; {_OPTIONS}"
            ) from error
    if not tokenizer.chat_template:
        raise UserError(f"the tokenizer of {_name(tokenizer)} has no chat template; {_OPTIONS}")
    try:
        return tokenizer.get_chat_template()
    except ValueError as error:  # several templates and none of them the default
        raise UserError(f"the tokenizer of {_name(tokenizer)}: {error}; {_OPTIONS}") from error


def _collect(
    rows: Sequence[Row],
    tokenizer: Any,
    system_prompt: str | None,
    chat_template: str | None,
    max_length: int,
    too_long: str,
) -> tuple[list[Example], Counts]:
    template = resolve_template(tokenizer, chat_template)
    texts, problems = [], []
    for row in rows:
        try:
            texts.append(_render_row(row, tokenizer, template, system_prompt))
        except UserError as error:
            problems.append(str(error))
    raise_first(problems)

    examples: list[Example] = []
    dropped = truncated = longest = unaligned = 0
    for example, aligned in _encode_texts(rows, texts, tokenizer, template):
        length = len(example.tokens)
        longest = max(longest, length)
        if not example.loss_weights.any():
            problems.append(_unsupervised(example.where))
        elif too_long == "error" and length > max_length:
            problems.append(
                f"{example.where}: {length} tokens, more than data.max_length={max_length}"
            )
        elif (fitted := _fit(example, max_length, too_long)) is None:
            dropped += 1
        else:
            examples.append(fitted)
            truncated += length > max_length
            unaligned += not aligned
    raise_first(problems)
    return examples, Counts(
        examples=len(examples),
        supervised_tokens=sum(int(np.count_nonzero(e.loss_weights)) for e in examples),
        total_tokens=sum(len(e.tokens) for e in examples),
        truncated=truncated,
        dropped=dropped,
        longest=longest,
        unaligned=unaligned,
    )


# Conversation -> text with supervised spans


def _conversation(row: Row, system_prompt: str | None) -> list[dict[str, Any]]:
    messages = [{k: v for k, v in m.items() if k != "train"} for m in row.messages]
    if system_prompt is not None and messages[0]["role"] not in SYSTEM_ROLES:
        messages.insert(0, {"role": "system", "content": system_prompt})
    return messages


def _render_row(row: Row, tokenizer: Any, template: str | None, system_prompt: str | None) -> _Text:
    messages = _conversation(row, system_prompt)
    shift = len(messages) - len(row.messages)
    supervised = [
        shift + i
        for i, message in enumerate(row.messages)
        if message["role"] == "assistant" and message.get("train", True)
    ]
    if not supervised:
        raise UserError(_unsupervised(row.where))
    # Cut here, so that the last supervised turn is rendered as the last: as after a generation.
    messages = messages[: supervised[-1] + 1]
    if template is None:
        return _plain(row, messages)
    text = _render(tokenizer, template, messages, row.where)
    spans = []
    for i in supervised:
        prompt = _render_prompt(tokenizer, template, messages[:i], row.where)
        if not text.startswith(prompt):
            raise UserError(
                f"{row.where}: the chat template renders what stands before turn {i - shift} "
                "differently as a prompt and inside the conversation, so the answer cannot be told "
                "from its prompt; use another data.chat_template"
            )
        end = _turn_end(tokenizer, template, text, messages, i, len(prompt), row.where)
        if end is None:
            raise UserError(
                f"{row.where}: the chat template rewrites turn {i - shift} when others follow; "
                "split the conversation into one row per answer, mark the turn "
                '"train": false, or use another data.chat_template'
            )
        if _content(messages[i]).strip() and not text[len(prompt) : end].strip():
            raise UserError(f"{row.where}: the chat template leaves out turn {i - shift}")
        spans.append((len(prompt), end))
    start, end = spans[-1]
    content = _content(messages[-1]).strip()
    # From the left: "end" stands in "<|im_end|>" too.
    found = text.find(content, start, end)
    return _Text(text[:end], spans, found + len(content) if found >= 0 else start)


def _plain(row: Row, messages: list[dict[str, Any]]) -> _Text:
    roles = [m["role"] for m in messages if m["role"] not in SYSTEM_ROLES]
    if roles not in (["user", "assistant"], ["assistant"]):
        raise UserError(
            f"{row.where}: data.chat_template={PLAIN!r} joins one prompt and one completion, "
            f"but the row has the turns {', '.join(roles)}"
        )
    text = "".join(_content(message) for message in messages)
    start = len(text) - len(_content(messages[-1]))
    return _Text(text, [(start, len(text))], len(text))


def _turn_end(
    tokenizer: Any, template: str, text: str, messages: list[dict], i: int, start: int, where: str
) -> int | None:
    """Where turn `i`, which begins at `start`, ends in `text`; None if that cannot be told."""
    if i == len(messages) - 1:
        return max(start, len(text.rstrip()))
    turn = _render(tokenizer, template, messages[: i + 1], where).rstrip()
    if text.startswith(turn):
        return max(start, len(turn))
    # Some templates dress the last turn alone (an empty thought before it, EOS after it). The
    # others are whole if content and end-of-turn token are there, one after the other.
    ending, _ = _ending(tokenizer, template)
    begin = start + len(text[start:]) - len(text[start:].lstrip())
    whole = _content(messages[i]).strip() + ending
    return begin + len(whole) if ending and text.startswith(whole, begin) else None


def _ending(tokenizer: Any, template: str) -> tuple[str, int | None]:
    """What the template writes after an answer, to the end of the first special token; its id."""
    content = "answer"
    sample = [{"role": "user", "content": "question"}, {"role": "assistant", "content": content}]
    try:
        text = _render(tokenizer, template, sample, "a sample conversation")
    except UserError:
        sample = [{"role": "system", "content": "system"}, *sample]
        text = _render(tokenizer, template, sample, "a sample conversation")
    after = text.rfind(content) + len(content)
    special = _special_ids(tokenizer)
    ids, offsets = _tokenize(tokenizer, [text.rstrip()])[0]
    for token, (start, end) in zip(ids, offsets, strict=True):
        if start >= after and token in special:
            return text[after:end], token
    return "", None


def _render(tokenizer: Any, template: str, messages: list[dict], where: str, **options) -> str:
    try:
        return tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, **options
        )
    except Exception as error:  # a template is a program: whatever it raises is the user's to mend
        reason = str(error) or type(error).__name__
        raise UserError(
            f"{where}: the chat template refuses this conversation: {reason}"
        ) from error


def _render_prompt(tokenizer: Any, template: str, messages: list[dict], where: str) -> str:
    if not messages:
        raise UserError(
            f"{where}: the conversation begins with the assistant; a chat template needs a turn "
            'to answer (mark it "train": false, or set data.system_prompt)'
        )
    return _render(tokenizer, template, messages, where, add_generation_prompt=True)


# Text -> tokens


def _encode_texts(
    rows: Sequence[Row], texts: Sequence[_Text], tokenizer: Any, template: str | None
) -> Iterable[tuple[Example, bool]]:
    """The uncut example of each text, and whether its prompt alone gives the same first tokens."""
    plain = template is None
    head = _bos(tokenizer) if plain else []
    special = _special_ids(tokenizer)
    for first in range(0, len(texts), _BATCH):
        batch = texts[first : first + _BATCH]
        whole = _tokenize(tokenizer, [t.text for t in batch])
        prompts = _tokenize(tokenizer, [t.text[: t.spans[-1][0]] for t in batch])
        for row, text, (ids, offsets), (prompt, _) in zip(
            rows[first : first + _BATCH], batch, whole, prompts, strict=True
        ):
            weights = _weights(offsets, text.spans)
            closed = bool(ids) and ids[-1] in special and offsets[-1][0] >= text.answer_end
            if not (ids[-1:] == [tokenizer.eos_token_id] if plain else closed):
                if tokenizer.eos_token_id is None:
                    raise UserError(
                        f"{row.where}: no end-of-turn token ends the answer, and the tokenizer of "
                        f"{_name(tokenizer)} has no EOS token to end it with"
                    )
                ids, weights = [*ids, tokenizer.eos_token_id], np.append(weights, np.float32(1))
            aligned = ids[: len(prompt)] == prompt
            tokens = np.asarray(_join(head, ids), np.int32)
            loss_weights = np.zeros(len(tokens), np.float32)
            loss_weights[len(tokens) - len(ids) :] = weights
            loss_weights[0] = 0  # nothing stands before it to predict it from
            yield Example(tokens, loss_weights, row.where), aligned


def _weights(offsets: Sequence[tuple[int, int]], spans: list[tuple[int, int]]) -> np.ndarray:
    starts, ends = np.asarray(offsets, np.int64).reshape(-1, 2).T
    weights = np.zeros(len(starts), np.float32)
    for start, end in spans:
        # Some tokenizers trim spaces off the offsets, so that a token of spaces is empty at its
        # end: hence both bounds on both sides.
        weights[(starts >= start) & (ends > start) & ((starts < end) | (ends <= end))] = 1
    return weights


def _fit(example: Example, max_length: int, too_long: str) -> Example | None:
    if len(example.tokens) <= max_length:
        return example
    weights = example.loss_weights[:max_length].copy()
    if too_long == "drop" or not weights.any():
        return None
    return Example(example.tokens[:max_length].copy(), weights, example.where)


def _tokenize(tokenizer: Any, texts: list[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """Ids and character offsets of each text, without special tokens beyond those in the text."""
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"the tokenizer of {_name(tokenizer)} is a slow one without character offsets, which "
            "tell answers from prompts; give the model a tokenizer.json"
        )
    out = tokenizer(
        texts,
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        padding=False,
        truncation=False,
        verbose=False,
    )
    return list(zip(out["input_ids"], out["offset_mapping"], strict=True))


def _bos(tokenizer: Any) -> list[int]:
    """BOS if the tokenizer would put it before a text, else nothing."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("")["input_ids"][:1] == [bos] else []


def _join(head: list[int], ids: list[int]) -> list[int]:
    return list(ids) if ids[: len(head)] == head else [*head, *ids]


def _special_ids(tokenizer: Any) -> frozenset[int]:
    return frozenset(tokenizer.all_special_ids) | frozenset(tokenizer.get_added_vocab().values())


def _content(message: dict[str, Any]) -> str:
    return message.get("content") or ""


def _name(tokenizer: Any) -> str:
    return repr(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)


def _unsupervised(where: str) -> str:
    return f'{where}: no token is supervised: the answer is empty, or marked "train": false'
