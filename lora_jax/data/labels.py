"""Texts and pairs of texts with a label, for classifiers.

    {"text": "Parker & Sons Ltd", "label": "company"}
    {"sentence1": "..", "sentence2": "..", "label": 1}

    tokens        [CLS] Parker & Sons Ltd [SEP]  1      the last token is the index of the label
    loss_weights    0     0    0  0    0    0    1      and the only target

So a labelled text is packed, cached, shuffled and weighted like any other example. The text is in
the columns of data.text, or in the first of FORMS whose columns a record has. The label is a
string, a whole number or a boolean in the column data.label.
"""

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import numpy as np

from lora_jax.data.examples import Counts, Example
from lora_jax.data.keys import check_keys
from lora_jax.data.rows import BadRow, LabelRow, kind, listed
from lora_jax.data.sources import raise_first
from lora_jax.errors import UserError

# Columns of a text or a pair, including those of the GLUE tasks.
FORMS = (
    ("text",),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("sentence",),
)


def parse_label_row(
    record: Any,
    where: str,
    columns: Sequence[str] | None,
    label: str,
    ignore_columns: Collection[str] = (),
) -> LabelRow:
    """Return the row of a record.

    columns: of its text or pair; None finds them in FORMS. Other columns are then refused, unless
        they are ignored or harmless (`lora_jax.data.keys`)

    Raises:
        BadRow: a column is missing or is not a text, or the label is not a string or number.
    """
    if not isinstance(record, dict):
        raise BadRow(f"a row must be an object, not {kind(record)}")
    record = {key: value for key, value in record.items() if key not in ignore_columns}
    form = columns or next((form for form in FORMS if {*form} <= {*record}), None)
    if form is None:
        raise BadRow(
            "a row to classify needs 'text', or a pair such as 'sentence1' and 'sentence2' (or "
            f"name its columns in data.text); its keys: {listed(list(record))}"
        )
    if missing := [name for name in (*form, label) if record.get(name) is None]:
        raise BadRow(f"{missing[0]!r} is missing or null; its keys: {listed(list(record))}")
    texts = tuple(record[name] for name in form)
    if wrong := [name for name, text in zip(form, texts, strict=True) if not isinstance(text, str)]:
        raise BadRow(f"{wrong[0]!r} is {kind(record[wrong[0]])}, not a string")
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise BadRow(f"a text is not valid Unicode: {error.reason}") from error
    value = record[label]
    if not isinstance(value, str | int):
        raise BadRow(f"{label!r} is {kind(value)}, not a string or a whole number")
    if columns is None:
        given = {key: value for key, value in record.items() if value is not None}
        check_keys(given, (*form, label, "label_text", "label_name"))
    return LabelRow(texts, str(value), where)


def label_names(rows: Iterable[LabelRow]) -> tuple[str, ...]:
    """Return the labels that occur: numbers in numerical order, others in alphabetical order."""
    found = {row.label for row in rows}
    numbers = all(name.lstrip("-").isdigit() for name in found)
    return tuple(sorted(found, key=int) if numbers else sorted(found))


def encode_labelled(
    rows: Sequence[LabelRow],
    tokenizer: Any,
    labels: Sequence[str],
    *,
    max_length: int,
    too_long: str = "truncate",
    on_bad_row: str = "error",
) -> tuple[list[Example], Counts]:
    """Return an `Example` of at most `max_length` tokens for every row, including its label.

    `too_long` and `on_bad_row` are those of `templates.encode_all`. The longer text of a pair that
    is too long is cut.

    Raises:
        UserError: labels that are not in `labels`; rows too long under "error".
    """
    numbers = {name: number for number, name in enumerate(labels)}
    problems = [
        f"{row.where}: label {row.label!r} is not one of {', '.join(labels)}"
        for row in rows
        if row.label not in numbers
    ]
    usable = [row for row in rows if row.label in numbers]
    examples: list[Example] = []
    dropped = truncated = longest = 0
    for row, ids, second in _tokenized(usable, tokenizer):
        length = len(ids) + 1
        longest = max(longest, length)
        if length > max_length:
            if too_long == "error":
                problems.append(
                    f"{row.where}: {length} tokens, more than data.max_length={max_length}"
                )
            if too_long != "truncate":
                dropped += too_long == "drop"
                continue
            truncated += 1
            ((_, ids, second),) = _tokenized([row], tokenizer, max_length - 1)
        tokens = np.asarray([*ids, numbers[row.label]], np.int32)
        weights = np.zeros(len(tokens), np.float32)
        weights[-1] = 1
        examples.append(Example(tokens, weights, row.where, second))
    if on_bad_row != "drop" or len(problems) == len(rows):
        raise_first(problems)
    return examples, Counts(
        examples=len(examples),
        supervised_tokens=len(examples),
        total_tokens=sum(len(example.tokens) for example in examples),
        truncated=truncated,
        dropped=dropped,
        longest=longest,
        unaligned=0,
        bad=len(problems),
    )


def _tokenized(
    rows: Sequence[LabelRow], tokenizer: Any, limit: int | None = None
) -> Iterable[tuple[LabelRow, list[int], int]]:
    """Yield (row, ids with special tokens, start of the second text or the end without one)."""
    for row in rows:
        try:
            out = tokenizer(
                *row.texts, truncation=limit is not None, max_length=limit, verbose=False
            )
        except Exception as error:  # the tokenizers library raises bare exceptions
            raise UserError(f"{row.where}: the tokenizer refuses it: {error}") from error
        ids = list(out["input_ids"])
        parts = out.sequence_ids(0) if len(row.texts) == 2 else []
        yield row, ids, parts.index(1) if 1 in parts else len(ids)
