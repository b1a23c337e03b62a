"""Records of tokens to rows. A packed record becomes one row for each of its sequences.

    {"input_ids": [5, 6, 7, 8, 9], "seq_lengths": [3, 2]}   ->  5 6 7  and  8 9

Any of these columns defines the sequences. If there are several, they must agree:

    position_ids                               0, 1, 2, 0, 1: 0 begins a sequence
    seq_lengths, seq_lens, seqlens,            3, 2
      sequence_lengths, lengths
    cu_seqlens, cu_seq_lens (also _q, _k)      0, 3, 5: their starts, and the end
    segment_ids, sequence_ids, document_ids,   1, 1, 1, 2, 2, 0: the sequence of each token;
      doc_ids, seq_idx                         0 is padding, unless it comes first
    attention_mask with numbers above 1        the same
    attention_mask of (time, time)             block-diagonal and causal; leading axes of 1 too

A sequence without a supervised token becomes a row too; encoding leaves it out and counts it.
"""

from typing import Any

import numpy as np

from lora_jax.data.keys import UnknownKeys
from lora_jax.data.rows import BadRow, TokenRow, kind

_WEIGHTS = ("loss_weights", "labels", "completion_mask", "assistant_masks")
_LENGTHS = ("seq_lengths", "seq_lens", "seqlens", "sequence_lengths", "lengths")
_STARTS = ("cu_seqlens", "cu_seq_lens", "cu_seq_lens_q", "cu_seq_lens_k")
_NUMBERED = ("segment_ids", "sequence_ids", "document_ids", "doc_ids", "seq_idx")
_OF_TOKENIZERS = ("special_tokens_mask", "offset_mapping", "token_type_ids")
_SIZES = ("max_length_q", "max_length_k", "max_seqlen")
KEYS = (
    *("input_ids", "attention_mask", "position_ids", *_WEIGHTS, *_LENGTHS, *_STARTS, *_NUMBERED),
    *(*_OF_TOKENIZERS, *_SIZES),
)
_UNSUPERVISED = -100  # in `labels`
_LARGEST_TOKEN = 2**31 - 1  # tokens are int32


def token_rows(given: dict, where: str) -> tuple[TokenRow, ...]:
    """Return the rows of a record with `input_ids`: one, or one per sequence of a packed record.

    Raises:
        BadRow: names the problem.
    """
    tokens = _numbers(given, "input_ids", {int})
    if not tokens:
        raise BadRow("'input_ids' is empty")
    if min(tokens) < 0 or max(tokens) > _LARGEST_TOKEN:
        wrong = next(i for i, token in enumerate(tokens) if not 0 <= token <= _LARGEST_TOKEN)
        raise BadRow(f"input_ids[{wrong}] is not between 0 and {_LARGEST_TOKEN}")
    weights = _loss_weights(given, tokens)
    if "token_type_ids" in given and any(_numbers(given, "token_type_ids", {int}, len(tokens))):
        raise BadRow("'token_type_ids' is not 0 everywhere: this model reads no token types")
    _check_columns(given)
    kept_tokens, starts = _sequences(given, len(tokens))
    tokens = [token for token, kept in zip(tokens, kept_tokens, strict=True) if kept]
    weights = [weight for weight, kept in zip(weights, kept_tokens, strict=True) if kept]
    with np.errstate(over="ignore", under="ignore"):
        loss_weights = np.asarray(weights, np.float32)
    wrong = np.flatnonzero(~(np.isfinite(loss_weights) & (loss_weights >= 0)))
    if wrong.size:
        raise BadRow(f"{weights[wrong[0]]!r} in 'loss_weights' is not finite and at least 0")
    spans = list(zip(starts, [*starts[1:], len(tokens)], strict=True))
    if not any(loss_weights[start + 1 : end].any() for start, end in spans):
        raise BadRow("no token after the first is supervised: nothing to learn from")
    if len(spans) == 1:
        return (TokenRow(tuple(tokens), tuple(weights), where),)
    return tuple(
        TokenRow(tuple(tokens[a:b]), tuple(weights[a:b]), f"{where}[{number}]", number)
        for number, (a, b) in enumerate(spans)
    )


def _check_columns(given: dict) -> None:
    """Refuse lists of numbers in unknown columns: they may define sequences."""
    unknown = []
    for key in (key for key in given if key not in KEYS):
        value = given[key].tolist() if isinstance(given[key], np.ndarray) else given[key]
        if isinstance(value, list) and {*map(type, value)} & {int, float}:
            unknown.append(str(key))
    if unknown:
        raise UnknownKeys(unknown, KEYS)


def _sequences(given: dict, length: int) -> tuple[list[bool], list[int]]:
    """Return (token is not padding, starts of the sequences among those that are not)."""
    numbers: dict[str, list[int]] = {}  # the sequence of each token, 0 for padding
    if "attention_mask" in given:
        numbers["attention_mask"] = _mask_numbers(given["attention_mask"], length, given)
    for key in _NUMBERED:
        if key in given:
            found = _numbers(given, key, {int}, length)
            lowest = 1 if found[0] == 0 else 0  # a leading 0 is a sequence, not padding
            numbers[key] = _check_numbers([number + lowest for number in found], key)
    there = [all(column[i] for column in numbers.values()) for i in range(length)]
    kept = [i for i, one in enumerate(there) if one]
    starts = {
        key: _changes([column[i] for i in kept])
        for key, column in numbers.items()
        # A mask of ones and zeros marks only padding.
        if key != "attention_mask" or max(column) > 1
    }
    if "position_ids" in given:
        positions = _numbers(given, "position_ids", {int}, length)
        starts["position_ids"] = _zeros([positions[i] for i in kept])
    for key in (*_LENGTHS, *_STARTS):
        if key in given:
            starts[key] = _from_lengths(_lengths(given, key), key, length, kept)
    first, *others = starts or {"": [0]}
    for other in others:
        if starts[other] != starts[first]:
            raise BadRow(f"{first!r} and {other!r} give different sequences: keep the right one")
    found = starts[first] if starts else [0]
    for start, end in zip(found, [*found[1:], len(kept)], strict=True):
        if kept[start:end] and kept[end - 1] - kept[start] >= end - start:
            hole = next(i for i in range(kept[start], length) if not there[i])
            raise BadRow(
                f"token {hole} is padding in the middle of a sequence: padding belongs before or "
                "after one"
            )
    return there, found


def _mask_numbers(mask: Any, length: int, given: dict) -> list[int]:
    nested = isinstance(mask, np.ndarray) and mask.ndim > 1
    if nested or (isinstance(mask, list) and mask and isinstance(mask[0], list | np.ndarray)):
        return _from_square(mask, length)
    found = [int(number) for number in _numbers(given, "attention_mask", {int, bool}, length)]
    return _check_numbers(found, "attention_mask")


def _from_square(mask: Any, length: int) -> list[int]:
    """Return the sequence of each token from a mask of (.., time, time)."""
    try:
        square = np.asarray(mask)
    except ValueError:  # rows of different length
        square = np.zeros(0)
    while square.ndim > 2 and len(square) == 1:
        square = square[0]
    problem = BadRow(
        f"'attention_mask' of shape {list(square.shape)} is not a block-diagonal causal mask of "
        f"{length} x {length} zeros and ones; give position_ids or seq_lengths"
    )
    if square.shape != (length, length) or square.dtype.kind not in "biuf":
        raise problem
    if not np.isin(square, (0, 1)).all():
        raise problem
    seen, numbers, start = square.astype(bool), [], 0
    for i, row in enumerate(seen):
        if not row.any():
            numbers.append(0)
            continue
        first = int(row.argmax())
        start = first if first == i else start
        numbers.append(start + 1)
    each = np.arange(length)
    apart = np.asarray(numbers)
    wanted = (apart[:, None] == apart) & (each[:, None] >= each) & (apart[:, None] > 0)
    if (wanted != seen).any():
        raise problem
    return [int(number) for number in np.unique(apart, return_inverse=True)[1] + (apart.min() > 0)]


def _check_numbers(numbers: list[int], key: str) -> list[int]:
    if min(numbers) < 0:
        raise BadRow(f"{key}[{numbers.index(min(numbers))}] is below 0")
    there = [number for number in numbers if number]
    runs = [there[i] for i in _changes(there)] if there else []
    if len(set(runs)) < len(runs):
        again = next(number for i, number in enumerate(runs) if number in runs[:i])
        raise BadRow(f"{key!r} has the sequence {again} in several places")
    return numbers


def _zeros(positions: list[int]) -> list[int]:
    for i, position in enumerate(positions):
        if position != 0 and (i == 0 or position != positions[i - 1] + 1):
            wanted = f"0 or {positions[i - 1] + 1}" if i else "0"
            raise BadRow(
                f"'position_ids' has {position} where {wanted} comes next: positions that skip or "
                "repeat cannot be kept"
            )
    return [i for i, position in enumerate(positions) if position == 0] or [0]


def _lengths(given: dict, key: str) -> list[int]:
    found = _numbers(given, key, {int})
    if key in _STARTS:
        if found[:1] != [0]:
            raise BadRow(f"{key!r} does not begin with 0")
        found = [end - start for start, end in zip(found, found[1:], strict=False)]
    if not found or min(found) < 1:
        raise BadRow(f"{key!r} has a sequence of less than one token")
    return found


def _from_lengths(lengths: list[int], key: str, length: int, kept: list[int]) -> list[int]:
    total = sum(lengths)
    if total not in (length, len(kept)):
        raise BadRow(f"{key!r} adds up to {total} tokens, and 'input_ids' has {length}")
    numbers = np.repeat(np.arange(len(lengths)), lengths)
    return _changes((numbers[kept] if total == length else numbers).tolist())


def _changes(numbers: list[int]) -> list[int]:
    """Return the indices of numbers that differ from the one before, with 0."""
    return [i for i, number in enumerate(numbers) if i == 0 or number != numbers[i - 1]] or [0]


def _loss_weights(given: dict, tokens: list[int]) -> list[float]:
    names = [name for name in _WEIGHTS if name in given]
    if len(names) > 1:
        raise BadRow(f"{' and '.join(map(repr, names))} both define the loss weights: keep one")
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
                    "must be aligned with input_ids, not shifted by one"
                )
        return [float(label != _UNSUPERVISED) for label in labels]
    mask = _numbers(given, names[0], {int, bool}, len(tokens))
    if not set(mask) <= {0, 1}:
        wrong = next(i for i, bit in enumerate(mask) if bit not in (0, 1))
        raise BadRow(f"{names[0]}[{wrong}] is neither 0 nor 1")
    return [float(bit) for bit in mask]


def _numbers(given: dict, key: str, types: set[type], length: int | None = None) -> list:
    value = given[key]
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if not isinstance(value, list):
        raise BadRow(f"{key!r} is {kind(value)}, not a list of numbers")
    if not set(map(type, value)) <= types:
        wrong = next(i for i, element in enumerate(value) if type(element) not in types)
        wanted = "a number" if float in types else "an integer"
        found = "a float" if type(value[wrong]) is float else kind(value[wrong])
        raise BadRow(f"{key}[{wrong}] is {found}, not {wanted}")
    if length is not None and len(value) != length:
        raise BadRow(f"{key!r} has {len(value)} elements, and 'input_ids' {length}")
    return value
