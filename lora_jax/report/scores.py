"""Scores of generated answers, against one or several references each.

    answers = [Answer("13 of us\\nAsked for: []", ('{"people": "13"}',), '{"people": "13 of us"}')]
    compute(["exact_match", "slot_f1"], answers)    # {"exact_match": 0.0, "slot_f1": 0.0}

accuracy, exact_match, slot_f1 and rouge_l range from 0 to 1, bleu from 0 to 100, as is usual. Every
metric takes at least one answer, each with at least one reference.
"""

import importlib.util
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_jax.errors import UserError, nearest, raise_all


@dataclass(frozen=True)
class Answer:
    """A prompt with its reference answers and the generated answer."""

    prompt: str
    references: tuple[str, ...]
    answer: str
    thought: str = ""  # reasoning before the answer, not compared
    where: str = ""  # the first row with this prompt
    probabilities: Mapping[str, float] | None = None  # of a classifier: by label


def exact_match(answers: Sequence[Answer]) -> float:
    """Return the share of answers that equal one of their references, by `same_answer`."""
    right = [any(same_answer(one.answer, wanted) for wanted in one.references) for one in answers]
    return sum(right) / len(right)


def accuracy(answers: Sequence[Answer]) -> float:
    """Return the share of texts whose label is right."""
    return sum(one.answer in one.references for one in answers) / len(answers)


def same_answer(output: str, expected: str) -> bool:
    """Compare as parsed JSON if the reference is a JSON object or list, else as stripped text.

    For a JSON reference, an output that is no JSON does not match; key order and spacing do not
    count.
    """
    try:
        wanted = json.loads(expected)
    except ValueError:
        wanted = None
    if not isinstance(wanted, dict | list):
        return output.strip() == expected.strip()
    try:
        return json.loads(output) == wanted
    except (ValueError, RecursionError):
        return False


def slot_f1(answers: Sequence[Answer]) -> float:
    """F1 over the (slot, value) pairs of JSON objects, counted over all answers together:

        2 * pairs in both / (pairs answered + pairs expected)

    A call inside of `<tool_call>` has the slots `name` and `arguments`.

    A pair is right if slot and value are; values are compared as JSON, so the order of keys inside
    them does not count. An answer that is no JSON object has no pairs. Of several references the
    one with the best F1 for the answer counts. Without a pair on either side F1 is 1.
    """
    both = total = 0
    for one in answers:
        found = _slots(one.answer) or set()
        wanted = [_slots(text) or set() for text in one.references]
        counts = [(len(found & slots), len(found) + len(slots)) for slots in wanted]
        hits, pairs = max(counts, key=lambda count: _f1(*count))
        both, total = both + hits, total + pairs
    return _f1(both, total)


def _f1(both: int, total: int) -> float:
    return 2 * both / total if total else 1.0


def _slots(text: str) -> set[tuple[str, str]] | None:
    """Return (slot, value as JSON) pairs of an object or of one tool call; None for other text."""
    try:
        content = json.loads(text.strip().removeprefix("<tool_call>").removesuffix("</tool_call>"))
        if not isinstance(content, dict):
            return None
        return {(slot, json.dumps(value, sort_keys=True)) for slot, value in content.items()}
    except (ValueError, RecursionError):
        return None


def bleu(answers: Sequence[Answer]) -> float:
    """Corpus BLEU of sacrebleu with its defaults (13a tokens, case counts), from 0 to 100."""
    from sacrebleu.metrics.bleu import BLEU

    longest = max(len(one.references) for one in answers)
    # sacrebleu takes the first reference of every answer, then the second of every answer, and so
    # on. An answer with fewer repeats its first, which changes nothing.
    streams = [
        [one.references[i if i < len(one.references) else 0] for one in answers]
        for i in range(longest)
    ]
    return BLEU().corpus_score([one.answer for one in answers], streams).score


def rouge_l(answers: Sequence[Answer]) -> float:
    """Mean ROUGE-L F-measure of rouge_score, the best over an answer's references, without
    stemming. Its words are runs of a-z and 0-9 in any case: text in other scripts scores 0.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    scores = [scorer.score_multi(list(one.references), one.answer) for one in answers]
    return sum(score["rougeL"].fmeasure for score in scores) / len(scores)


METRICS: Mapping[str, Callable[[Sequence[Answer]], float]] = {
    "accuracy": accuracy,
    "exact_match": exact_match,
    "slot_f1": slot_f1,
    "bleu": bleu,
    "rouge_l": rouge_l,
}
_PACKAGES = {"bleu": "sacrebleu", "rouge_l": "rouge_score"}


def check_metrics(names: Iterable[str], references: Iterable[str] = ()) -> None:
    """Check metrics and their references before anything slow starts.

    Raises:
        UserError: unknown names; missing packages; references without slots for slot_f1.
    """
    problems = []
    for name in dict.fromkeys(names):
        package = _PACKAGES.get(name)
        if name not in METRICS:
            hint = nearest(name, METRICS)
            problems.append(f"eval.metrics: {name!r} is not one of: {', '.join(METRICS)}.{hint}")
        elif package and importlib.util.find_spec(package) is None:
            problems.append(
                f"eval.metrics: {name} needs the package {package}: pip install 'lora_jax[metrics]'"
            )
        elif name == "slot_f1":
            wrong = [text for text in references if _slots(text) is None]
            if wrong:
                problems.append(
                    f"eval.metrics: slot_f1 compares JSON objects, and {len(wrong)} held-out "
                    f"answers are none, the first {wrong[0][:60]!r}; choose another metric"
                )
    raise_all(problems)


def compute(names: Iterable[str], answers: Sequence[Answer]) -> dict[str, float]:
    """Return the metrics of these names, in their order.

    Raises:
        UserError: as `check`; no answers.
    """
    names = list(names)
    check_metrics(names)
    if not answers:
        raise UserError("eval.metrics: there are no answers to score")
    return {name: METRICS[name](answers) for name in names}


def is_right(answer: Answer) -> bool:
    """Return True if an answer is the same as any of its references."""
    return exact_match([answer]) == 1.0


def spread(items: Sequence[Any], count: int | None) -> list[Any]:
    """Return `count` of the items, evenly spaced and in order; all if there are fewer, or for None.

    Test files are often sorted by length or topic, so their first rows are not representative.
    """
    count = len(items) if count is None else min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]
