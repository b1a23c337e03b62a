"""Keys of records and messages that do not belong to their text.

    is_harmless("created_at", value)   an ID, a time, a source: left out
    check_keys(given, known)           any other unknown key is refused by name

A key is harmless because of its name, or because its value is a date or a time. null and "" count
as absent. Under an unknown key, an empty list or object counts as absent too.
"""

import datetime
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from lora_jax.data.rows import REASONING, BadRow, Row, printable
from lora_jax.errors import nearest

# Identity, origin, time, language, statistics, and settings of the request for an answer.
HARMLESS = (
    *("id", "ids", "idx", "index", "uuid", "uid", "guid", "hash", "sha", "md5", "number", "row"),
    *("source", "sources", "origin", "provenance", "dataset", "datasets", "data_source", "subset"),
    *("split", "fold", "file", "filename", "path", "url", "urls", "link", "links", "website"),
    *("domain", "license", "author", "authors", "user", "username", "annotator", "annotators"),
    *("annotations", "publisher", "country", "hashed_ip", "header"),
    *("lang", "language", "languages", "locale"),
    *("timestamp", "timestamps", "date", "time", "datetime", "created", "created_on", "modified"),
    *("updated", "updated_on", "added", "version", "revision"),
    *("category", "categories", "subcategory", "topic", "topics", "tag", "tags", "task", "tasks"),
    *("task_name", "task_type", "type", "kind", "level", "difficulty"),
    *("score", "scores", "quality", "rating", "ratings", "rank", "ranking", "votes", "upvotes"),
    *("likes", "toxic", "toxicity", "redacted", "moderation", "openai_moderation", "perplexity"),
    *(
        "meta",
        "metadata",
        "info",
        "note",
        "notes",
        "status",
        "turn",
        "turns",
        "num_turns",
        "turn_identifier",
        "title",
        "views",
        "dump",
        "object",
    ),
    *("length", "num_tokens", "n_tokens", "token_count", "word_count", "char_count", "usage"),
    *("cost", "latency", "duration"),
    *("model", "models", "generator", "model_name", "teacher", "provider", "temperature", "top_p"),
    *("top_k", "max_tokens", "max_completion_tokens", "seed", "stream", "logprobs", "store"),
    *("finish_reason", "stop_reason", "parallel_tool_calls", "service_tier"),
)
MESSAGE_KEYS = (
    *("role", "content", "train", "tool_calls", "tool_call_id", "name"),
    *REASONING,
)
# Arguments of `apply_chat_template` that rows and settings cannot set.
RESERVED = {
    *("conversation", "messages", "tools", "chat_template", "add_generation_prompt", "tokenize"),
    *("continue_final_message", "padding", "truncation", "max_length", "return_tensors"),
    *("return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs", "strftime_now"),
}
HARMLESS_ENDS = (
    *("_id", "_uuid", "_at", "_date", "_time", "_timestamp", "_url", "_hash", "_version"),
    *("_path", "_score", "_count"),
)
_SHOWN = 50  # keys named in one message
_TIMES = (datetime.date, datetime.time, datetime.timedelta)
_PREFERENCE = "this trains on one answer, and preference data have two or a label"
_MEDIA = "only text can be read"
_ARGUMENT = "an argument of the chat template goes into 'chat_template_kwargs'"
_WEIGHT = "a row has no weight of its own; give sources weights in data.train"
_REASONS = {
    **dict.fromkeys(("weight", "sample_weight", "loss_weight", "loss_weights"), _WEIGHT),
    **dict.fromkeys(("chosen", "rejected", "label", "kto_tag"), _PREFERENCE),
    **dict.fromkeys(("enable_thinking", "thinking", "reasoning_effort", "documents"), _ARGUMENT),
    **dict.fromkeys(("image", "images", "audio", "audios", "video", "videos"), _MEDIA),
    **dict.fromkeys(
        ("system", "system_prompt", "system_message", "tools", "functions", "chat_template_kwargs"),
        "a plain text has no turns",
    ),
}


class UnknownKeys(BadRow):
    """Unknown or unusable keys of a record.

    known: keys to suggest one from
    about: the text before the keys
    remedy: the last sentence
    """

    def __init__(
        self,
        keys: Iterable[str],
        known: Collection[str] = (),
        about: str = "keys not known",
        remedy: str = "What is not used is left out by data.ignore_columns, a list of names",
    ):
        self.keys, self.known = tuple(dict.fromkeys(keys)), known
        self.about, self.remedy = about, remedy
        shown = [printable(repr(key)) for key in self.keys[:_SHOWN]]
        more = len(self.keys) - len(shown)
        names = ", ".join([*shown, *([f"and {more} more"] if more else [])])
        hints = [nearest(key[:100], known) for key in self.keys[:3] if key not in _REASONS]
        reasons = {f" {key!r}: {_REASONS[key]}." for key in self.keys if key in _REASONS and known}
        super().__init__(
            f"{about}: {names}.{next(filter(None, hints), '')}{''.join(sorted(reasons))} {remedy}"
        )


def is_empty(value: Any) -> bool:
    """Return True if a value under an unknown key counts as absent."""
    return value is None or (isinstance(value, str | list | dict) and not value)


def is_harmless(key: str, value: Any) -> bool:
    """Return True if a key has no effect on the text of its record or message."""
    plain = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key).lower().replace("-", "_").replace(" ", "_")
    return (
        plain in HARMLESS
        or plain.startswith(("_", "unnamed:"))  # pandas names an index "Unnamed: 0"
        or plain.endswith(HARMLESS_ENDS)
        or isinstance(value, _TIMES)
    )


def check_keys(given: Mapping[str, Any], known: Collection[str]) -> None:
    """Refuse keys that are neither known nor harmless.

    Raises:
        UnknownKeys: names all of them.
    """
    unknown = [
        str(key)
        for key, value in given.items()
        if key not in known and not is_empty(value) and not is_harmless(str(key), value)
    ]
    if unknown:
        raise UnknownKeys(unknown, known)


def describe_problems(problems: Sequence[tuple[str, str | BadRow]]) -> list[str]:
    """Return one line for each problem of records, given as (where, problem) pairs.

    The same problem of several records is one line, with the first place and a count of the others.
    Unknown keys come first, one line for each kind.
    """
    alike: dict[str, list[str]] = {}
    unknown: dict[str, list[tuple[str, UnknownKeys]]] = {}
    for where, found in problems:
        if isinstance(found, UnknownKeys):
            unknown.setdefault(found.about, []).append((where, found))
        else:
            alike.setdefault(str(found), []).append(where)
    lines = [f"{_first_place(wheres)}: {text}" for text, wheres in alike.items()]
    return [*map(_in_one_line, unknown.values()), *lines]


def _in_one_line(unknown: Sequence[tuple[str, UnknownKeys]]) -> str:
    found = unknown[0][1]
    keys = [key for _, one in unknown for key in one.keys]
    every = UnknownKeys(keys, found.known, found.about, found.remedy)
    return f"{_first_place([where for where, _ in unknown])}: {every}"


def _first_place(wheres: Sequence[str]) -> str:
    more = len(wheres) - 1
    return wheres[0] + (f" and {more} more row{'s' * (more > 1)}" if more else "")


# Keys that a chat template may read


def check_read(row: Row, template: str | None) -> None:
    """Refuse keys that a conversation passes to its chat template and the template never reads.

    template: the source of the template; None reads no key

    Raises:
        UnknownKeys: names unknown keys of messages, or keys of `chat_template_kwargs`.
    """
    known = set(MESSAGE_KEYS)
    given = {
        key for message in row.messages for key, value in message.items() if not is_empty(value)
    }
    if unread := sorted(key for key in given - known if not reads(template, key)):
        raise UnknownKeys(
            unread, about="keys of messages that are not known, nor read by the chat template"
        )
    options = row.chat_template_kwargs
    if unread := sorted(k for k, value in options.items() if value and not reads(template, k)):
        raise UnknownKeys(
            unread,
            about="'chat_template_kwargs' that the chat template never reads",
            remedy="Leave them out of the rows, or the whole object with "
            "data.ignore_columns=[chat_template_kwargs]",
        )


def reads(template: str | None, name: str) -> bool:
    """Return True if a name occurs in the source of a chat template."""
    return template is not None and re.search(rf"\b{re.escape(name)}\b", template) is not None
