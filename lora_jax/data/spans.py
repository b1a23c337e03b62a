"""Supervised characters of a rendered conversation.

    <|im_start|>user\\n 2+2? <|im_end|>\\n <|im_start|>assistant\\n 4 <|im_end|> \\n
    |-------------------- generation prompt ---------------------|- supervised -|

The answer of a turn begins where the generation prompt for the turns before it ends. Both texts are
rendered, and the prompt must be a prefix of the conversation. The answer ends where the
conversation up to it ends, with its end-of-turn token and without the whitespace after that. A
template may write text around the last turn of any conversation (an empty thought before it, EOS
after it). This text may be missing around the same turn in the middle.

A template with `{% generation %}` blocks marks itself what is generated. Its blocks take
precedence, except that text of the generation prompt is never supervised, and that the special
tokens which end a turn right after its block are. So conversations whose history the template
rewrites are accepted.

An answer in the middle without an end token ends with the special token that follows it: the mark
of the next role, at which generation stops.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any

from lora_jax.data.chat_templates import Template
from lora_jax.data.probe import Part
from lora_jax.data.render import render, render_marked, render_prompt
from lora_jax.data.rows import Row
from lora_jax.errors import UserError

Span = tuple[int, int]


class Refused(UserError):
    """A refusal of a row to which a remedy is to be added; `cause` names its kind."""

    def __init__(self, text: str, cause: str):
        super().__init__(text)
        self.cause = cause


@dataclass(frozen=True)
class Chat:
    """A conversation up to its last supervised turn, as a template renders it."""

    tokenizer: Any
    template: Template
    row: Row
    messages: list[dict[str, Any]]
    shift: int  # messages before those of the row
    text: str
    marks: list[Span]  # {% generation %} blocks
    parts: list[Part]

    def render(self, count: int, **options: Any) -> str:
        """Render the first `count` messages."""
        messages = self.messages[:count]
        return render(self.tokenizer, self.template.source, self.row, messages, **options)

    def prompt(self, i: int) -> str:
        """Render the generation prompt for message `i`."""
        return render_prompt(self.tokenizer, self.template.source, self.row, self.messages[:i])

    def error(self, text: str) -> UserError:
        """Return the error "WHERE: the chat template TEXT"."""
        return Refused(f"{self.row.where}: the chat template {text}", text.split(" ", 1)[0])

    def turn(self, i: int) -> str:
        """Return the name of message `i` in errors."""
        return f"turn {i - self.shift}" if i >= self.shift else "data.system_prompt"


def render_with_marks(
    tokenizer: Any, template: Template, row: Row, messages: list[dict[str, Any]]
) -> tuple[str, list[Span]]:
    """Return the text of a conversation, and the spans of its {% generation %} blocks, if any."""
    if template.marked:
        return render_marked(tokenizer, template.source, row, messages)
    return render(tokenizer, template.source, row, messages), []


def supervised_spans(chat: Chat, trained: Sequence[int]) -> list[tuple[int, list[Span]]]:
    """Return each trained turn with its supervised spans.

    Raises:
        UserError: an answer cannot be separated from its prompt.
    """
    return list((_marked_spans if chat.template.marked else _split_spans)(chat, trained))


def ends_answer(chat: Chat, span: Span) -> bool:
    """Return True if the supervised span of an answer ends in a token that ends answers."""
    eos = chat.tokenizer.eos_token
    ends = (*chat.template.ends, eos) if eos else chat.template.ends
    return chat.text[span[0] : span[1]].endswith(ends)


# Found from the generation prompt


def _split_spans(chat: Chat, trained: Sequence[int]) -> Iterator[tuple[int, list[Span]]]:
    for i in trained:
        prompt = chat.prompt(i)
        if not chat.text.startswith(prompt):
            raise _differs(chat, i, prompt)
        end = _turn_end(chat, i, len(prompt))
        if end is None:
            raise chat.error(f"rewrites {chat.turn(i)} when others follow")
        yield i, [(len(prompt), _with_end(chat, i, len(prompt), end))]


def _turn_end(chat: Chat, i: int, start: int) -> int | None:
    """Return the end of turn `i`, which begins at `start`, in the text; None if it is not found."""
    text, template = chat.text, chat.template
    if i == len(chat.messages) - 1:
        return max(start, len(text.rstrip()))
    turn = chat.render(i + 1).rstrip()
    if text.startswith(turn):
        return max(start, len(turn))
    if not template.ending or not turn.startswith(text[:start]):
        return None
    # The template wrote head and tail around the sample too: they are not part of this answer.
    bare = turn[start:].removeprefix(template.head).removesuffix(template.tail).lstrip()
    begin = start + len(text[start:]) - len(text[start:].lstrip())
    whole = bare.endswith(template.ending) and text.startswith(bare, begin)
    return begin + len(bare) if whole else None


def _with_end(chat: Chat, i: int, start: int, end: int) -> int:
    """Return `end`, moved behind the special token that follows an answer without an end token.

    Some templates write EOS only between turns, or only the mark of the next role.
    """
    token = chat.template.token
    if token is None or i == len(chat.messages) - 1 or ends_answer(chat, (start, end)):
        return end
    gap = len(chat.text[end:]) - len(chat.text[end:].lstrip())
    following = token.match(chat.text, end + gap)
    return following.end() if following else end


# Found from {% generation %} blocks


def _marked_spans(chat: Chat, trained: Sequence[int]) -> Iterator[tuple[int, list[Span]]]:
    turns = [i for i, message in enumerate(chat.messages) if message["role"] == "assistant"]
    prompts = {i: chat.prompt(i) for i in turns if i > 0 or i in trained}
    owned = _marks_by_turn(chat, turns, prompts)
    for i in trained:
        if not owned[i]:
            raise chat.error(f"has {{% generation %}} blocks, but none for {chat.turn(i)}")
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
        yield i, [*spans[:-1], (start, _with_end(chat, i, start, end))]


def _marks_by_turn(
    chat: Chat, turns: Sequence[int], prompts: dict[int, str]
) -> dict[int, list[Span]]:
    if all(chat.text.startswith(prompt) for prompt in prompts.values()):
        owned: dict[int, list[Span]] = {i: [] for i in turns}
        for start, end in chat.marks:
            # A block may begin in the generation prompt, and that of an empty answer may be empty.
            owners = [i for i in turns if len(prompts.get(i, "")) < max(start + 1, end)]
            if owners:
                owned[owners[-1]].append((start, end))
        return owned
    # If earlier turns are rewritten, positions do not identify turns. One block per turn is safe
    # to assign if each further turn adds exactly one block.
    source, row = chat.template.source, chat.row
    counts = [
        len(render_marked(chat.tokenizer, source, row, chat.messages[: i + 1])[1]) for i in turns
    ]
    if counts != list(range(1, len(turns) + 1)) or len(chat.marks) != len(turns):
        raise chat.error(
            f"rewrites earlier turns, and the {len(chat.marks)} {{% generation %}} blocks cannot "
            f"be assigned to the {len(turns)} assistant turns"
        )
    return {i: [mark] for i, mark in zip(turns, chat.marks, strict=True)}


def _marked_begin(chat: Chat, i: int, prompt: str, start: int, before: int) -> int:
    """Return the start of the answer of turn `i`, after its prompt.

    start: the start of its block; before: the end of the blocks of earlier turns
    """
    if chat.text.startswith(prompt):
        return max(start, len(prompt))
    # The history is rewritten. The text that the prompt adds to it must still precede the answer.
    opening = prompt[len(commonprefix([prompt, chat.render(i)])) :]
    near = chat.text.find(opening, max(before, start - len(opening)), start + len(opening))
    if near >= 0:
        return max(start, near + len(opening))
    if chat.text.find(opening, before, start) >= 0:
        return start
    raise _differs(chat, i, prompt)


def _differs(chat: Chat, i: int, prompt: str) -> UserError:
    same = len(commonprefix([chat.text, prompt]))
    return chat.error(
        f"renders the text before {chat.turn(i)} differently as a prompt and inside the "
        f"conversation: {prompt[same:][:40]!r} and {chat.text[same:][:40]!r}. So the answer cannot "
        "be separated from its prompt"
    )
