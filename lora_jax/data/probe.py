"""Detection of parts of a conversation that a chat template leaves out, repeats or moves.

    row     user "2+2?"    assistant "4", add(a=2)              tool "4"
    probe   user "zq0qz"   assistant "zq1qz", zq2qz(zq3qz=7319000004)  tool "zq5qz"

A text such as "4" occurs in nearly any prompt by accident. So a probe of the same shape is rendered
too, with a mark in place of every text, name, key and number: a mark occurs only where the template
wrote that part. Rows of one shape have equal probes, so the findings are cached by the probe. Each
row is searched too, in order, because a template may treat different texts differently.

Templates may drop the thoughts of earlier turns, as they do in generation. So a thought is required
only in supervised turns.
"""

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from lora_jax.data.rows import REASONING, THOUGHTS

_MARK = re.compile(r"zq\d+qz|7319\d{6}")
# Group 1 opens a thought, group 2 closes it.
_THOUGHT = re.compile(
    "|".join(f"({'|'.join(map(re.escape, tags))})" for tags in zip(*THOUGHTS, strict=True))
)


class Part(NamedTuple):
    """One text of a conversation, and its mark in the probe."""

    turn: int  # index of its message
    label: str  # for error messages
    value: Any
    mark: str
    thought: bool = False
    shared: bool = False  # a name or a key, which may also occur in other parts


class Finding(NamedTuple):
    """One defect of the rendered conversation."""

    kind: str  # "lost", "repeated", "moved" or "foreign"
    parts: tuple[int, ...]  # indices; empty for "moved"
    turn: int


class _Marks:
    """Builds the probe of a conversation, and its parts."""

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self.names: dict[str, str] = {}
        self.ids: dict[Any, str] = {}
        self.count = 0

    def mark(self) -> str:
        self.count += 1
        return f"zq{self.count}qz"

    def message(self, turn: int, message: Mapping[str, Any]) -> dict[str, Any]:
        probe = dict(message)
        same: dict[str, str] = {}  # one thought under two keys is one part
        for key in REASONING:
            if isinstance(value := message.get(key), str) and value.strip():
                if value not in same:
                    same[value] = self.mark()
                    self.parts.append(Part(turn, f"the {key}", value, same[value], thought=True))
                probe[key] = same[value]
        label = "the tool result" if message["role"] == "tool" else "the content"
        text = message.get("content")
        if isinstance(text, str):
            probe["content"] = self.text(turn, label, text)
        if calls := message.get("tool_calls"):
            probe["tool_calls"] = [self.call(turn, call) for call in calls]
        if "tool_call_id" in message:
            probe["tool_call_id"] = self.id(message["tool_call_id"])
        if isinstance(message.get("name"), str):
            probe["name"] = self.names.get(message["name"], "name")
        return probe

    def text(self, turn: int, label: str, text: str) -> str:
        tags = _tags(text)
        if not tags:
            if not text.strip():
                return text
            mark = self.mark()
            self.parts.append(Part(turn, label, text, mark))
            return mark
        pieces = []
        at, opened = 0, tags[0].group(2) is not None  # opened by the prompt
        for tag in [*tags, None]:
            if (said := text[at : tag.start() if tag else None]).strip():
                pieces.append(self.mark())
                thought = opened and tag is not None and tag.group(2) is not None
                named = "the thought" if thought else label
                self.parts.append(Part(turn, named, said, pieces[-1], thought))
            if tag:
                pieces.append(tag.group())
                at, opened = tag.end(), tag.group(1) is not None
        return "\n".join(pieces)

    def call(self, turn: int, call: Any) -> Any:
        if not isinstance(call, dict):
            return call
        inner = call.get("function")
        function = inner if isinstance(inner, dict) else call
        probe = dict(function)
        label = f"the tool call {str(function.get('name') or '')!r}"
        if isinstance(name := function.get("name"), str) and name:
            mark = self.names.setdefault(name, self.names.get(name) or self.mark())
            self.parts.append(Part(turn, label, name, mark, shared=True))
            probe["name"] = mark
        if "arguments" in function:
            probe["arguments"] = self.leaves(turn, label, function["arguments"])
        if inner is function:
            probe = call | {"function": probe}
        return probe | ({"id": self.id(call["id"])} if "id" in call else {})

    def leaves(self, turn: int, label: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {
                self.leaf(turn, f"the key {str(key)!r} of {label}", str(key), shared=True): (
                    self.leaves(turn, label, inner)
                )
                for key, inner in value.items()
            }
        if isinstance(value, list):
            return [self.leaves(turn, label, inner) for inner in value]
        if value is None or isinstance(value, bool) or value == "":
            return value
        return self.leaf(turn, f"an argument of {label}", value)

    def leaf(self, turn: int, label: str, value: Any, shared: bool = False) -> Any:
        mark = self.mark()
        if not isinstance(value, str):
            mark = f"7319{self.count:06d}"
        self.parts.append(Part(turn, label, value, mark, shared=shared))
        if isinstance(value, str):
            return mark
        return int(mark) if isinstance(value, int) else int(mark) + 0.5

    def id(self, value: Any) -> str:
        return self.ids.setdefault(
            value, f"call{len(self.ids):05d}"
        )  # 9 characters: some require that


def probe(messages: Iterable[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[Part]]:
    """Return the messages with marks in place of their texts, and the parts that these replace."""
    marks = _Marks()
    return [marks.message(i, message) for i, message in enumerate(messages)], marks.parts


def findings(
    text: str,
    parts: Sequence[Part],
    trained: Collection[int],
    spans: Mapping[int, Sequence[tuple[int, int]]] | None,
) -> Finding | None:
    """Return the first defect of a rendered probe, or None.

    spans: supervised spans of each trained turn; None if they cannot be found
    """
    found_at: dict[str, list[int]] = {}  # positions of each mark
    for match in _MARK.finditer(text):
        found_at.setdefault(match.group(), []).append(match.start())
    last, reached = -1, -1
    for turn, group in groupby(enumerate(parts), lambda pair: pair[1].turn):
        own = list(group)
        needed = [pair for pair in own if turn in trained or not pair[1].thought]
        if spans is not None and turn in trained:
            inside = [
                match.group()
                for start, end in spans[turn]
                for match in _MARK.finditer(text, start, end)
            ]
            if lost := tuple(i for i, part in needed if part.mark not in inside):
                return Finding("lost", lost, turn)
            again = tuple(i for i, p in own if not p.shared and inside.count(p.mark) > 1)
            if again:
                return Finding("repeated", again, turn)
            others = {*inside} - {part.mark for _, part in own}
            if foreign := tuple(i for i, part in enumerate(parts) if part.mark in others):
                return Finding("foreign", foreign, turn)
        elif lost := tuple(i for i, part in needed if part.mark not in found_at):
            return Finding("lost", lost, turn)
        firsts = [found_at[part.mark][0] for _, part in needed if not part.shared]
        if firsts and min(firsts) < reached:
            return Finding("moved", (), last)
        if firsts:
            last, reached = turn, max(firsts)
    return None


def lost_in_order(text: str, parts: Sequence[Part], trained: Collection[int]) -> Finding | None:
    """Return the first part of a row that is not in its text after the turns before it, or None."""
    squeezed, at = squeeze(text), 0
    for turn, group in groupby(enumerate(parts), lambda pair: pair[1].turn):
        reached = at
        for i, part in group:
            if part.thought and turn not in trained:
                continue
            for form in _forms(part.value):
                if (found := squeezed.find(form, 0 if part.shared else at)) >= 0:
                    reached = max(reached, 0 if part.shared else found + len(form))
                    break
            else:
                return Finding("lost", (i,), turn)
        at = reached
    return None


def holds(text: str, value: Any) -> bool:
    """Return True if a text contains a value in one of the forms that templates write."""
    squeezed = squeeze(text)
    return any(form in squeezed for form in _forms(value))


def squeeze(text: str) -> str:
    """Return `text` without whitespace, because templates trim texts and break lines."""
    return "".join(text.split())


def has_thought(text: str) -> bool:
    """Return True if a content has a tag that closes a thought."""
    return any(tag.group(2) for tag in _tags(text))


def opened_thoughts(text: str) -> int:
    """Count the tags of a text that open a thought."""
    return sum(tag.group(1) is not None for tag in _tags(text))


def opens_thought(text: str) -> bool:
    """Return True if a text ends in a tag that opens a thought."""
    return any(tag.group(1) and tag.end() == len(text) for tag in _tags(text))


def _tags(text: str) -> list[re.Match[str]]:
    """Return the tags of a text that open or close a thought."""
    if not any(word in text for word in ("think", "THINK", "channel")):  # far faster than a search
        return []
    return list(_THOUGHT.finditer(text))


def _forms(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield squeeze(value)
        yield squeeze(json.dumps(value, ensure_ascii=False)[1:-1])
        yield squeeze(json.dumps(value)[1:-1])
        yield squeeze(repr(value)[1:-1])
    else:
        yield json.dumps(value)
        yield str(value)
