"""Records of answers to compare, to rows.

    {"prompt": "..", "chosen": "..", "rejected": ".."}              a user turn and two answers
    {"prompt": [message, ..], "chosen": [..], "rejected": [..]}     answers as messages
    {"prompt": "..", "chosen": [..], "rejected": [..]}              with or without the prompt
    {"chosen": [message, ..], "rejected": [message, ..]}            conversations of one start
    {"prompt": .., "completion": .., "label": true}                 an answer with a label

The turns that both conversations begin with are the prompt, and are not trained on. "system",
"tools" and "chat_template_kwargs" are read as in `lora_jax.data.parse`.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from lora_jax.data.keys import check_keys
from lora_jax.data.messages import messages_of
from lora_jax.data.named_columns import columns, fill
from lora_jax.data.parse import CONTEXT, CONVERSATION, make_row
from lora_jax.data.rows import REASONING, BadRow, JudgedRow, PairRow, kind, listed

_SIDES = ("chosen", "rejected")
# Columns next to pairs in data of the hub: what the pair was made from, and its ratings.
_ORIGINS = ("messages", "text", "prompt_messages", "margin")
_RATINGS = [f"{name}_{side}" for name in ("score", "rating", "model", "reward") for side in _SIDES]
_RATINGS += [f"{side}_{name}" for name in ("score", "rating", "model", "reward") for side in _SIDES]
_PAIR_KEYS = ("prompt", *_SIDES, *CONVERSATION, *_ORIGINS, *_RATINGS)
_JUDGED_KEYS = ("prompt", "completion", "label", *CONVERSATION, *_ORIGINS)
_LABELS = {True: True, False: False}  # 1 and 0 too, which are equal to these


def parse_pair(
    record: Any, where: str, prompt: str | None = None, ignore_columns: Collection[str] = ()
) -> PairRow:
    """Return the row of a record with a chosen and a rejected answer.

    prompt: the user turn made from columns, as `data.prompt`

    Raises:
        BadRow: the record has another form, or an error in it; its answers are equal or empty.
        UserError: `prompt` is malformed.
    """
    given = _given(record, ignore_columns)
    if missing := [name for name in _SIDES if name not in given]:
        raise BadRow(_needed(given, missing, "'chosen' and 'rejected'", "pairs"))
    asked, context = _asked(record, given, prompt)
    turns = [_turns(asked, given[side], side, ignore_columns) for side in _SIDES]
    chosen, rejected = _with_common_start(*turns)
    if prompt is None:
        check_keys(given, _PAIR_KEYS)
    return PairRow(make_row(chosen, context, where), make_row(rejected, context, where), where)


def parse_judged(
    record: Any, where: str, prompt: str | None = None, ignore_columns: Collection[str] = ()
) -> JudgedRow:
    """Return the row of a record with an answer and a label. Arguments and errors as those of
    `parse_pair`.
    """
    given = _given(record, ignore_columns)
    needed = [
        name for name in ("prompt", "completion", "label") if prompt is None or name != "prompt"
    ]
    if missing := [name for name in needed if name not in given]:
        forms = "'prompt', 'completion' and 'label'"
        raise BadRow(_needed(given, missing, forms, "answers with labels"))
    label = given["label"]
    if not isinstance(label, bool | int) or label not in _LABELS:
        raise BadRow(f"'label' is {kind(label)}, not true or false")
    asked, context = _asked(record, given, prompt)
    messages = _turns(asked, given["completion"], "completion", ignore_columns)
    start = len(asked) if isinstance(asked, list) else 1
    _check_answer(messages[start:], "completion")
    messages = [*map(_untrained, messages[:start]), *messages[start:]]
    if prompt is None:
        check_keys(given, _JUDGED_KEYS)
    return JudgedRow(make_row(messages, context, where), bool(label), where)


def _given(record: Any, ignore: Collection[str]) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise BadRow(f"a row must be an object, not {kind(record)}")
    return {k: value for k, value in record.items() if k not in ignore and value is not None}


def _needed(given: Mapping[str, Any], missing: Sequence[str], form: str, what: str) -> str:
    if {*_SIDES} <= {*given}:
        hint = "these are pairs, which train.objective=dpo, ipo, orpo and simpo train on"
    elif {"prompt", "completion", "label"} <= {*given}:
        hint = "this is an answer with a label, which train.objective=kto trains on"
    else:
        hint = "train.objective=sft trains on rows with one answer"
    return (
        f"no {' and no '.join(map(repr, missing))}: this objective needs {what}, {form}; its keys: "
        f"{listed([*map(repr, given)])}; {hint}"
    )


def _asked(
    record: Mapping[str, Any], given: Mapping[str, Any], prompt: str | None
) -> tuple[Any, Mapping[str, Any]]:
    """Return the prompt of a record, if it has one, and the keys of its system turn and tools."""
    if prompt is None:
        return given.get("prompt"), given
    named = columns(prompt, "data.prompt")
    context = {key: given[key] for key in CONTEXT if key in given and key not in named}
    return fill(dict(record), "prompt", prompt), context


def _turns(asked: Any, answer: Any, key: str, ignore: Collection[str]) -> list[dict[str, Any]]:
    """Return the conversation of a prompt and an answer, each a text or messages."""
    if asked is None:
        if not isinstance(answer, list):
            raise BadRow(
                f"no 'prompt', and {key!r} is {kind(answer)}, not a conversation, which is a list "
                "of messages"
            )
        return messages_of(answer, key, True, ignore)
    if isinstance(asked, str):
        before = [{"role": "user", "content": asked}]
    else:
        before = messages_of(asked, "prompt", True, ignore)
    if isinstance(answer, str):
        return [*before, {"role": "assistant", "content": answer}]
    turns = messages_of(answer, key, True, ignore)
    shown = [turn for turn in turns if turn["role"] not in ("system", "developer")]
    if turns[: len(before)] == before:
        return turns
    if isinstance(asked, str) and shown[:1] == before:
        return turns
    if turns[0]["role"] in ("assistant", "tool"):
        return [*before, *turns]
    raise BadRow(f"{key!r} begins with a {turns[0]['role']!r} turn that is not the prompt")


def _with_common_start(
    chosen: list[dict[str, Any]], rejected: list[dict[str, Any]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Mark the turns that two conversations begin with as not trained on."""
    same = 0
    for one, other in zip(chosen, rejected, strict=False):
        if one != other:
            break
        same += 1
    if same == len(chosen) == len(rejected):
        raise BadRow("'chosen' and 'rejected' are equal: there is nothing to prefer")
    answers = chosen[same:], rejected[same:]
    for answer, side in zip(answers, _SIDES, strict=True):
        if answer and answer[0]["role"] not in ("assistant", "tool"):
            raise BadRow(
                f"'chosen' and 'rejected' are answers to different prompts: they differ first at "
                f"turn {same}, which is a {answer[0]['role']!r} turn of {side!r}"
            )
        _check_answer(answer, side)
    start = [*map(_untrained, chosen[:same])]
    return [*start, *answers[0]], [*start, *answers[1]]


def _check_answer(turns: Sequence[Mapping[str, Any]], key: str) -> None:
    said = [turn for turn in turns if turn["role"] == "assistant"]
    if not said:
        raise BadRow(f"{key!r} has no assistant turn of its own: nothing to compare")
    parts = [turn.get(name) for turn in said for name in ("content", "tool_calls", *REASONING)]
    if not any(part.strip() if isinstance(part, str) else part for part in parts):
        raise BadRow(f"the answer of {key!r} is empty")


def _untrained(turn: dict[str, Any]) -> dict[str, Any]:
    return turn | {"train": False} if turn["role"] == "assistant" else turn
