"""Records of data to rows.

    row = parse_row({"prompt": "2+2?", "completion": "4"}, where="train.jsonl:1")

The form of a record is told by its keys. The first of these whose keys are all there, and not
null, is taken; other keys are ignored.

    columns named in data.prompt or data.completion     a user turn and its answer
    {"input_ids": [5, 7, ..]}                           tokens; see below
    {"messages": [{"role": .., "content": ..}, ..]}     every assistant turn is trained on
    {"conversations": [{"from": .., "value": ..}, ..]}  the same as sharegpt writes it; or messages
    {"prompt": "..", "completion": ".."}                a user turn and its answer
    {"prompt": [message, ..], "completion": [message, ..]}  the completion's turns are trained on
    {"instruction": "..", "output": ".."}               alpaca; "input" follows the instruction
                                                        after an empty line, and "history",
                                                        [[question, answer], ..], comes before it
    {"text": ".."}                                      a plain text, all of it trained on; refused
                                                        beside a prompt, completion, instruction or
                                                        output, for which it could be the other half

Every form that makes a conversation may have "system", a string that becomes the first turn, and
"tools", a list of JSON schemas or that list as a JSON string; null and "" are as if absent.

A message is {"role": .., "content": ..}; "train": false on an assistant turn takes it out. Content
may be a list of {"type": "text", "text": ..} parts, which are joined. Its other keys go to the chat
template; those that are null are left out, as tables have null for what is absent. "from" is human,
gpt, model, observation or a role; "role" and "content" do as well.

`input_ids` may have one of "loss_weights" (numbers, 0 or above), "labels" (-100, or the token
itself where it is supervised), "completion_mask" or "assistant_masks" (0 or 1); otherwise every
token is supervised. Where "attention_mask" is 0 there is padding, which is left out.

`prompt` and `completion` (data.prompt, data.completion) are texts with {column} in them, as
`lora_jax.data.named_columns` fills them: "{question}\\nContext: {context}". One of the two may be
left out: then it is the string 'prompt' or 'completion' of the record. A null in the completion is
refused: there is no answer.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from lora_jax.config import nearest
from lora_jax.data.named_columns import fill
from lora_jax.data.rows import (
    ROLES,
    SYSTEM_ROLES,
    AnyRow,
    BadRow,
    Row,
    TextRow,
    TokenRow,
    kind,
    listed,
    printable,
)

_SPEAKERS = {"human": "user", "gpt": "assistant", "model": "assistant", "observation": "tool"}
_SPEAKERS |= {role: role for role in ROLES}
_HALVES = ("prompt", "completion", "instruction", "output")
_WEIGHTS = ("loss_weights", "labels", "completion_mask", "assistant_masks")
_UNSUPERVISED = -100  # in `labels`
_LARGEST_TOKEN = 2**31 - 1  # tokens are int32


def parse_row(
    record: Any, where: str, prompt: str | None = None, completion: str | None = None
) -> AnyRow:
    """The row that a record stands for; `prompt` and `completion` as in the module's text.

    Raises:
        BadRow: the record is of no known form, or wrong in one.
        UserError: `prompt` or `completion` is malformed.
    """
    if not isinstance(record, dict):
        raise BadRow(f"a row must be an object, not {kind(record)}")
    given = {key: value for key, value in record.items() if value is not None}
    if prompt is not None or completion is not None:
        messages = _turns((fill(record, "prompt", prompt), fill(record, "completion", completion)))
    elif "input_ids" in given:
        return _token_row(given, where)
    elif "messages" in given:
        messages = _messages(given["messages"], "messages")
    elif "conversations" in given:
        messages = _messages(_from_sharegpt(given["conversations"]), "conversations")
    elif "prompt" in given and "completion" in given:
        messages = _prompt_completion(given["prompt"], given["completion"])
    elif "instruction" in given and "output" in given:
        messages = _alpaca(given)
    elif "text" in given:
        return _text_row(given, where)
    else:
        raise BadRow(_needed(record))
    return _conversation(messages, given, where)


def _needed(record: dict) -> str:
    keys = [f"{key!r} (null)" if value is None else repr(key) for key, value in record.items()]
    return (
        "a row needs 'messages', 'conversations', 'prompt' and 'completion', 'instruction' and "
        "'output', 'text', or 'input_ids' (or name its columns in data.prompt and "
        f"data.completion); its keys: {listed(keys)}"
    )


# Records that become conversations


def _conversation(messages: list[dict], given: dict, where: str) -> Row:
    """Messages of any form, with the record's own system turn and tools, and checked whole."""
    system = given.get("system", "")
    if not isinstance(system, str):
        raise BadRow(f"'system' is {kind(system)}, not a string")
    if system and messages[0]["role"] not in SYSTEM_ROLES:
        messages = [{"role": "system", "content": system}, *messages]
    elif system and messages[0]["content"] != system:
        raise BadRow("'system' differs from the system turn that the conversation begins with")
    tools = _tools(given.get("tools", ""))
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        raise BadRow("no assistant turn: nothing to learn from")
    if not any(message.get("train", True) for message in answers):
        raise BadRow("every assistant turn has 'train': false: nothing to learn from")
    _check_text([messages, tools])
    return Row(tuple(messages), where, tools)


def _messages(value: Any, key: str, first: bool = True) -> list[dict[str, Any]]:
    """Checked messages; `first`: they begin the conversation, where a system turn may be."""
    if not isinstance(value, list):
        raise BadRow(f"{key!r} is {kind(value)}, not a list of messages")
    if not value:
        raise BadRow(f"{key!r} is empty")
    return [
        _message(message, f"{key}[{index}]", first and index == 0)
        for index, message in enumerate(value)
    ]


def _message(message: Any, name: str, first: bool) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise BadRow(f"{name} is {kind(message)}, not an object with 'role' and 'content'")
    checked = {k: v for k, v in message.items() if v is not None or k == "content"}
    role, content, calls = (checked.get(key) for key in ("role", "content", "tool_calls"))
    if role is not None and not isinstance(role, str):
        raise BadRow(f"{name}.role is {kind(role)}, not a string")
    # An assistant that calls tools need not say anything.
    calls = role == "assistant" and isinstance(calls, list) and len(calls) > 0
    if role is None or not (calls or "content" in checked):
        missing = "role" if role is None else "content"
        raise BadRow(f"{name} has no {missing!r}; its keys: {listed([*map(repr, checked)])}")
    if role not in ROLES:
        raise BadRow(f"{name}.role is {_not_one_of(role, ROLES)}")
    if isinstance(content, list):
        checked["content"] = _joined(content, f"{name}.content")
    elif not isinstance(content, str) and not (calls and content is None):
        raise BadRow(f"{name}.content is {kind(content)}, not a string")
    if role in SYSTEM_ROLES and not first:
        raise BadRow(f"{name} is a {role!r} turn: only the first turn can be one")
    train = checked.get("train", False)
    if not isinstance(train, bool):
        raise BadRow(f"{name}.train is {kind(train)}, not true or false")
    if train and role != "assistant":
        raise BadRow(
            f"{name}.train is true on a {role!r} turn: only assistant turns are trained on"
        )
    return checked


def _joined(parts: list, name: str) -> str:
    if not parts:
        raise BadRow(f"{name} is an empty list")
    for index, part in enumerate(parts):
        found = [part.get("type"), part.get("text")] if isinstance(part, dict) else []
        if list(map(type, found)) != [str, str] or found[0] != "text":
            raise BadRow(
                f'{name}[{index}] is no {{"type": "text", "text": ".."}}: only text can be read'
            )
    return "".join(part["text"] for part in parts)


def _from_sharegpt(value: Any) -> Any:
    """The turns with "from" as messages; the others as they are, for `_messages` to judge."""
    if not isinstance(value, list):
        return value
    turns = []
    for index, turn in enumerate(value):
        if isinstance(turn, dict) and "from" in turn and turn.get("role") is None:
            name, speaker, said = f"conversations[{index}]", turn["from"], turn.get("value")
            if not isinstance(speaker, str):
                raise BadRow(f"{name}.from is {kind(speaker)}, not a string")
            if speaker not in _SPEAKERS:
                raise BadRow(f"{name}.from is {_not_one_of(speaker, _SPEAKERS)}")
            if not isinstance(said, str):
                raise BadRow(f"{name}.value is {kind(said)}, not a string")
            others = {k: v for k, v in turn.items() if k not in ("from", "value", "role")}
            turn = others | {"role": _SPEAKERS[speaker], "content": said}
        turns.append(turn)
    return turns


def _prompt_completion(prompt: Any, completion: Any) -> list[dict[str, Any]]:
    if isinstance(prompt, list) and isinstance(completion, list):
        asked = _messages(prompt, "prompt")
        answered = _messages(completion, "completion", first=False)
        if all(message["role"] != "assistant" for message in answered):
            raise BadRow("'completion' has no assistant turn: nothing to learn from")
        asked = [m | {"train": False} if m["role"] == "assistant" else m for m in asked]
        return asked + answered
    if isinstance(prompt, str) and isinstance(completion, str):
        return _turns((prompt, completion))
    if not isinstance(prompt, str | list):
        raise BadRow(f"'prompt' is {kind(prompt)}, not a string")
    wanted = "a list of messages" if isinstance(prompt, list) else "a string"
    raise BadRow(f"'completion' is {kind(completion)}, not {wanted}")


def _alpaca(given: dict) -> list[dict[str, Any]]:
    asked = {key: given.get(key, "") for key in ("instruction", "input", "output")}
    for key, value in asked.items():
        if not isinstance(value, str):
            raise BadRow(f"{key!r} is {kind(value)}, not a string")
    history = given.get("history", [])
    if not isinstance(history, list):
        raise BadRow(f"'history' is {kind(history)}, not a list of [question, answer]")
    for index, pair in enumerate(history):
        if not isinstance(pair, list) or [type(text) for text in pair] != [str, str]:
            raise BadRow(f"history[{index}] is no list of a question and an answer")
    question = "\n\n".join(filter(None, (asked["instruction"], asked["input"])))
    return _turns(*history, (question, asked["output"]))


def _turns(*pairs: Sequence[str]) -> list[dict[str, Any]]:
    """The messages of (question, answer) pairs."""
    roles = ("user", "assistant")
    return [
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(roles, pair, strict=True)
    ]


def _tools(value: Any) -> tuple[dict[str, Any], ...]:
    if isinstance(value, str):
        if not value:
            return ()
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise BadRow(f"'tools' is a string that is no JSON: {printable(str(error))}") from error
        value = [] if value is None else value
    if not isinstance(value, list):
        raise BadRow(f"'tools' is {kind(value)}, not a list of JSON schemas")
    for index, tool in enumerate(value):
        if not isinstance(tool, dict):
            raise BadRow(f"tools[{index}] is {kind(tool)}, not an object")
    return tuple(value)


# Records that are no conversations


def _text_row(given: dict, where: str) -> TextRow:
    beside = [key for key in _HALVES if key in given]
    if beside:
        raise BadRow(f"'text' beside {beside[0]!r} could mean two things; {_needed(given)}")
    text = given["text"]
    if not isinstance(text, str):
        raise BadRow(f"'text' is {kind(text)}, not a string")
    if not text.strip():
        raise BadRow("'text' is empty: nothing to learn from")
    _check_text(text)
    return TextRow(text, where)


def _token_row(given: dict, where: str) -> TokenRow:
    tokens = _numbers(given, "input_ids", {int})
    if not tokens:
        raise BadRow("'input_ids' is empty")
    if min(tokens) < 0 or max(tokens) > _LARGEST_TOKEN:
        wrong = next(i for i, token in enumerate(tokens) if not 0 <= token <= _LARGEST_TOKEN)
        raise BadRow(f"input_ids[{wrong}] is not between 0 and {_LARGEST_TOKEN}")
    weights = _loss_weights(given, tokens)
    if "attention_mask" in given:
        mask = _mask(given, "attention_mask", len(tokens))
        tokens = [token for token, there in zip(tokens, mask, strict=True) if there]
        weights = [weight for weight, there in zip(weights, mask, strict=True) if there]
    with np.errstate(over="ignore", under="ignore"):
        loss_weights = np.asarray(weights, np.float32)
    wrong = np.flatnonzero(~(np.isfinite(loss_weights) & (loss_weights >= 0)))
    if wrong.size:
        raise BadRow(f"{weights[wrong[0]]!r} in 'loss_weights' is not finite and at least 0")
    if not loss_weights[1:].any():
        raise BadRow("no token after the first is supervised: nothing to learn from")
    return TokenRow(tuple(tokens), tuple(weights), where)


def _loss_weights(given: dict, tokens: list[int]) -> list[float]:
    names = [name for name in _WEIGHTS if name in given]
    if len(names) > 1:
        raise BadRow(f"{' and '.join(map(repr, names))} both say what is supervised: keep one")
    if not names:
        return [1.0] * len(tokens)
    if names == ["loss_weights"]:
        weights = _numbers(given, "loss_weights", {int, float}, len(tokens))
        try:
            return [float(weight) for weight in weights]
        except OverflowError as error:
            raise BadRow("a number in 'loss_weights' is too large") from error
    if names == ["labels"]:
        labels = _numbers(given, "labels", {int}, len(tokens))
        for index, (label, token) in enumerate(zip(labels, tokens, strict=True)):
            if label not in (_UNSUPERVISED, token):
                raise BadRow(
                    f"labels[{index}] is neither {_UNSUPERVISED} nor input_ids[{index}]: labels "
                    "stand at their own token, not at the one before"
                )
        return [float(label != _UNSUPERVISED) for label in labels]
    return [float(bit) for bit in _mask(given, names[0], len(tokens))]


def _mask(given: dict, key: str, length: int) -> list[int]:
    mask = _numbers(given, key, {int, bool}, length)
    if not set(mask) <= {0, 1}:
        wrong = next(i for i, bit in enumerate(mask) if bit not in (0, 1))
        raise BadRow(f"{key}[{wrong}] is neither 0 nor 1")
    return mask


def _numbers(given: dict, key: str, types: set[type], length: int | None = None) -> list:
    value = given[key]
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if not isinstance(value, list):
        raise BadRow(f"{key!r} is {kind(value)}, not a list of numbers")
    if not set(map(type, value)) <= types:
        wrong = next(i for i, element in enumerate(value) if type(element) not in types)
        wanted = "a number" if float in types else "an integer"
        found = "no whole number" if type(value[wrong]) is float else kind(value[wrong])
        raise BadRow(f"{key}[{wrong}] is {found}, not {wanted}")
    if length is not None and len(value) != length:
        raise BadRow(f"{key!r} has {len(value)} elements, and 'input_ids' {length}")
    return value


def _check_text(value: Any) -> None:
    """Raise what no tokenizer or template could take: lone surrogates, values outside JSON."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:  # "\ud800" is JSON but no text
        surrogate = f"\\u{ord(error.object[error.start]):04x}"
        raise BadRow(f"a string holds the unpaired surrogate {surrogate}") from error
    except RecursionError as error:
        raise BadRow("nested too deeply") from error
    except (TypeError, ValueError) as error:
        raise BadRow(f"no JSON: {error}") from error


def _not_one_of(name: str, names: Sequence[str] | dict[str, str]) -> str:
    hint = nearest(name[:100], names)
    return f"{printable(repr(name[:100]))}, not one of: {', '.join(names)}.{hint}"
