"""Rows to text, with the characters of it that are supervised.

    <|im_start|>user\\n 2+2? <|im_end|>\\n <|im_start|>assistant\\n 4 <|im_end|> \\n
    |-------------------- generation prompt ---------------------|- supervised -|

The answer of a turn begins where the generation prompt for the turns before it ends: both are
rendered, and the prompt must begin the conversation. It ends where the conversation up to it ends,
with its end-of-turn token and without the whitespace after it. What a template adds to the last
turn of any conversation (an empty thought before it, EOS after it) may be missing in the middle.

A template with `{% generation %}` blocks says itself what is generated. Its blocks win, but no text
of the generation prompt is supervised, and the special tokens that end a turn right after its block
are. So conversations are accepted whose history the template rewrites.

A row is refused where neither tells the answer from its prompt, and where an answer, its reasoning,
its tool calls, the tools or the system turn would be lost in silence. Special tokens in a content
are tokenised as such; what is supervised does not depend on them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any

from lora_jax.config import UserError
from lora_jax.data.render import (
    PLAIN,
    Template,
    content,
    conversation,
    render,
    render_marked,
    render_prompt,
)
from lora_jax.data.rows import SYSTEM_ROLES, Row, TextRow

_REASONING = ("reasoning_content", "thinking", "reasoning")  # templates read one of these keys
_OPENING = 64  # characters at the end of a prompt that an answer may begin with
_REWRITES = (
    "rewrites it when others follow; split the conversation into one row per answer, mark the "
    'turn "train": false, or use another data.chat_template'
)

Span = tuple[int, int]


@dataclass(frozen=True)
class Text:
    """A row as text; positions count its characters."""

    text: str
    spans: list[Span]  # supervised, in order
    prompt_end: int  # where the last supervised turn begins
    closing: frozenset[int]  # tokens that end an answer; EOS goes where none of them stands
    bos: bool  # BOS goes before it where the tokenizer would add it; templates write their own


@dataclass(frozen=True)
class _Chat:
    """A conversation up to its last supervised turn, as a template renders it."""

    tokenizer: Any
    template: Template
    row: Row
    messages: list[dict[str, Any]]
    shift: int  # messages before the row's own
    text: str
    marks: list[Span]  # {% generation %} blocks

    def render(self, count: int, **options: Any) -> str:
        messages = self.messages[:count]
        return render(self.tokenizer, self.template.source, self.row, messages, **options)

    def prompt(self, i: int) -> str:
        return render_prompt(self.tokenizer, self.template.source, self.row, self.messages[:i])

    def error(self, text: str) -> UserError:
        return UserError(f"{self.row.where}: the chat template {text}")

    def turn(self, i: int) -> str:
        return f"turn {i - self.shift}"


def to_text(
    row: Row | TextRow, tokenizer: Any, template: Template | None, system_prompt: str | None
) -> Text:
    """The text of a row and what of it is supervised; without a template as plain text.

    Raises:
        UserError: nothing is to be supervised; the template refuses the conversation, leaves a
            part of it out, or renders it so that an answer cannot be told from its prompt.
    """
    eos = frozenset(i for i in (tokenizer.eos_token_id,) if i is not None)
    if isinstance(row, TextRow):
        return Text(row.text, [(0, len(row.text))], 0, eos, bos=True)
    messages = conversation(row, system_prompt)
    shift = len(messages) - len(row.messages)
    trained = [
        shift + i
        for i, message in enumerate(row.messages)
        if message["role"] == "assistant" and message.get("train", True)
    ]
    if not trained:
        raise UserError(unsupervised(row.where))
    # Cut here, so that the last supervised turn is rendered as the last: as after a generation.
    messages = messages[: trained[-1] + 1]
    if template is None:
        return _plain(row, messages, eos)

    if template.marked:
        text, marks = render_marked(tokenizer, template.source, row, messages)
    else:
        text, marks = render(tokenizer, template.source, row, messages), []
    chat = _Chat(tokenizer, template, row, messages, shift, text, marks)
    _check_context(chat)
    by_turn = (_marked_spans if template.marked else _split_spans)(chat, trained)
    spans: list[Span] = []
    start = 0
    for i, turn in by_turn:
        _check_answer(chat, i, turn)
        start = turn[0][0]
        spans += turn
    return Text(text[: spans[-1][1]], spans, start, template.closing, bos=False)


def unsupervised(where: str) -> str:
    return f'{where}: no token is supervised: the answer is empty, or marked "train": false'


def _plain(row: Row, messages: list[dict[str, Any]], eos: frozenset[int]) -> Text:
    roles = [m["role"] for m in messages if m["role"] not in SYSTEM_ROLES]
    if roles not in (["user", "assistant"], ["assistant"]):
        raise UserError(
            f"{row.where}: data.chat_template={PLAIN!r} joins one prompt and one completion, "
            f"but the row has the turns {', '.join(roles)}"
        )
    if row.tools or messages[-1].get("tool_calls"):
        raise UserError(
            f"{row.where}: data.chat_template={PLAIN!r} has no place for the row's tools"
        )
    text = "".join(map(content, messages))
    start = len(text) - len(content(messages[-1]))
    return Text(text, [(start, len(text))], start, eos, bos=True)


# By the generation prompt


def _split_spans(chat: _Chat, trained: Sequence[int]) -> Iterator[tuple[int, list[Span]]]:
    for i in trained:
        prompt = chat.prompt(i)
        if not chat.text.startswith(prompt):
            raise _differs(chat, i, prompt)
        end = _turn_end(chat, i, len(prompt))
        if end is None:
            raise chat.error(f"rewrites {chat.turn(i)}" + _REWRITES.removeprefix("rewrites it"))
        yield i, [(len(prompt), _with_eos(chat, i, len(prompt), end))]


def _turn_end(chat: _Chat, i: int, start: int) -> int | None:
    """Where turn `i`, which begins at `start`, ends in the text; None if that cannot be told."""
    text, template = chat.text, chat.template
    if i == len(chat.messages) - 1:
        return max(start, len(text.rstrip()))
    turn = chat.render(i + 1).rstrip()
    if text.startswith(turn):
        return max(start, len(turn))
    if not template.ending or not turn.startswith(text[:start]):
        return None
    # Around the sample the template wrote it too, so it says nothing of this answer.
    bare = turn[start:].removeprefix(template.head).removesuffix(template.tail).lstrip()
    begin = start + len(text[start:]) - len(text[start:].lstrip())
    whole = bare.endswith(template.ending) and text.startswith(bare, begin)
    return begin + len(bare) if whole else None


def _with_eos(chat: _Chat, i: int, start: int, end: int) -> int:
    """`end`, or the end of the EOS that some templates write between turns but not after all."""
    eos, ending = chat.tokenizer.eos_token, chat.template.ending
    if not eos or i == len(chat.messages) - 1:
        return end
    if chat.text[start:end].endswith((eos, ending or eos)):
        return end
    gap = len(chat.text[end:]) - len(chat.text[end:].lstrip())
    return end + gap + len(eos) if chat.text.startswith(eos, end + gap) else end


# By {% generation %} blocks


def _marked_spans(chat: _Chat, trained: Sequence[int]) -> Iterator[tuple[int, list[Span]]]:
    turns = [i for i, message in enumerate(chat.messages) if message["role"] == "assistant"]
    prompts = {i: chat.prompt(i) for i in turns if i > 0 or i in trained}
    owned = _marks_by_turn(chat, turns, prompts)
    for i in trained:
        if not owned[i]:
            raise chat.error(
                f"has {{% generation %}} blocks, but none for {chat.turn(i)}; mark the turn "
                '"train": false, or use another data.chat_template'
            )
        before = max((end for j in turns if j < i for _, end in owned[j]), default=0)
        begin = _marked_begin(chat, i, prompts[i], owned[i][0][0], before)
        spans = [(max(start, begin), max(end, begin)) for start, end in owned[i]]
        start, end = spans[-1]
        end = max(start, len(chat.text[:end].rstrip()))
        limit = _turn_end(chat, i, begin)
        if limit is None:
            ends = chat.text.startswith(chat.template.ending, end)
            limit = end + len(chat.template.ending) if ends else end
        # A block may stop before the end-of-turn token, which would then never be learnt.
        if not chat.template.special.sub("", chat.text[end:limit]):
            end = max(end, limit)
        yield i, [*spans[:-1], (start, _with_eos(chat, i, start, end))]


def _marks_by_turn(
    chat: _Chat, turns: Sequence[int], prompts: dict[int, str]
) -> dict[int, list[Span]]:
    if all(chat.text.startswith(prompt) for prompt in prompts.values()):
        owned: dict[int, list[Span]] = {i: [] for i in turns}
        for start, end in chat.marks:
            # A block may begin in the generation prompt; that of an empty answer may be empty.
            owners = [i for i in turns if len(prompts.get(i, "")) < max(start + 1, end)]
            if owners:
                owned[owners[-1]].append((start, end))
        return owned
    # Positions tell nothing where earlier turns are rewritten. One block a turn is safe, if there
    # is one more for each further turn.
    source, row = chat.template.source, chat.row
    counts = [
        len(render_marked(chat.tokenizer, source, row, chat.messages[: i + 1])[1]) for i in turns
    ]
    if counts != list(range(1, len(turns) + 1)) or len(chat.marks) != len(turns):
        raise chat.error(
            f"rewrites earlier turns, and the {len(chat.marks)} {{% generation %}} blocks cannot "
            f"be told apart between {len(turns)} assistant turns; split the conversation into one "
            "row per answer, or use another data.chat_template"
        )
    return {i: [mark] for i, mark in zip(turns, chat.marks, strict=True)}


def _marked_begin(chat: _Chat, i: int, prompt: str, start: int, before: int) -> int:
    """Where the answer of turn `i` begins, whose block begins at `start`: after its prompt.

    `before`: where the blocks of earlier turns end.
    """
    if chat.text.startswith(prompt):
        return max(start, len(prompt))
    # What stands before the turn is rewritten; what the prompt adds to it must stand there still.
    opening = prompt[len(commonprefix([prompt, chat.render(i)])) :]
    near = chat.text.find(opening, max(before, start - len(opening)), start + len(opening))
    if near >= 0:
        return max(start, near + len(opening))
    if chat.text.find(opening, before, start) >= 0:
        return start
    raise _differs(chat, i, prompt)


def _differs(chat: _Chat, i: int, prompt: str) -> UserError:
    same = len(commonprefix([chat.text, prompt]))
    return chat.error(
        f"renders what stands before {chat.turn(i)} differently as a prompt and inside the "
        f"conversation: {prompt[same:][:40]!r} and {chat.text[same:][:40]!r}. So the answer cannot "
        "be told from its prompt; if the prompt opens a thought, begin the answer with one, or "
        "use another data.chat_template"
    )


# What must not be lost


def _check_context(chat: _Chat) -> None:
    system = chat.messages[0]
    if system["role"] in SYSTEM_ROLES and not _stands_in(content(system), chat.text):
        raise chat.error(
            f"leaves out the {system['role']} turn; put it into the user turn, or use another "
            "data.chat_template"
        )
    if chat.row.tools:
        try:
            ignored = chat.render(len(chat.messages), tools=None) == chat.text
        except UserError:  # it cannot do without them
            ignored = False
        if ignored:
            raise chat.error(
                "leaves out the tools of the row; use another data.chat_template, or rows "
                "without tools"
            )


def _check_answer(chat: _Chat, i: int, spans: list[Span]) -> None:
    message, text = chat.messages[i], chat.text
    begin = spans[0][0]
    answer = "".join(text[start:end] for start, end in spans)
    said = _after_prompt(content(message).strip(), text[max(0, begin - _OPENING) : begin].rstrip())
    parts = {"the content": said}
    reasoning = next((key for key in _REASONING if isinstance(message.get(key), str)), None)
    if reasoning:
        parts[f"the {reasoning}"] = message[reasoning]
    for call in message.get("tool_calls") or ():
        name = str((call.get("function") or call).get("name") or "")
        parts[f"the tool call {name!r}"] = name
    lost = [name for name, part in parts.items() if not _stands_in(part, answer)]
    if lost:
        later = i < len(chat.messages) - 1
        raise chat.error(
            f"leaves out {' and '.join(lost)} of {chat.turn(i)}, wholly or in part"
            + (f", or {_REWRITES}" if later else "; use another data.chat_template")
        )


def _after_prompt(answer: str, prompt: str) -> str:
    """An answer without its beginning that ends the prompt, as "<think>" may do."""
    sizes = range(min(len(answer), len(prompt)), 0, -1)
    return answer[next((n for n in sizes if prompt.endswith(answer[:n])), 0) :]


def _stands_in(part: str, text: str) -> bool:
    """Whether a text holds a part, whitespace apart: templates trim and break lines."""
    return part.strip() in text or "".join(part.split()) in "".join(text.split())
