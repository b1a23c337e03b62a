"""Metrics of answers against values by hand and the libraries themselves."""

import sys

import pytest

from lora_jax.errors import UserError
from lora_jax.report import scores
from lora_jax.report.scores import Answer, bleu, exact_match, rouge_l, same_answer, slot_f1


def answers(*pairs):
    """Answers from (answer, reference, ...) tuples."""
    return [Answer("", tuple(references), answer) for answer, *references in pairs]


@pytest.mark.parametrize(
    ("output", "expected", "same"),
    [
        ('{"b": [1], "a": "x"}', '{"a": "x", "b": [1]}', True),
        ('{"a": "x"}', '{"a": "X"}', False),
        ("[1, 2]", "[2, 1]", False),
        ('{"a": "x"} and more', '{"a": "x"}', False),
        ("[" * 100_000, "{}", False),
        (" yes\n", "yes", True),
        ("1.0", "1", False),  # text: the expected answer is no object or list
    ],
)
def test_same_answer(output, expected, same):
    assert same_answer(output, expected) is same


def test_exact_match_takes_any_reference():
    given = answers(("b", "a", "b"), ("c", "a", "b"), ('{"x":1}', "{}", '{"x": 1}'), ("a", "a"))
    assert exact_match(given) == 0.75


@pytest.mark.parametrize(
    ("given", "f1"),
    [
        ([('{"a": "1", "b": "2"}', '{"b": "2", "a": "1"}')], 1.0),
        ([('{"a": "1", "b": "3"}', '{"a": "1", "b": "2"}')], 0.5),  # 1 in both, 2 and 2
        ([('{"b": "1"}', '{"a": "1"}')], 0.0),
        ([('{"a": 1}', '{"a": "1"}')], 0.0),
        ([('{"a": "1"}', '{"a": "1", "b": "2", "c": "3"}')], 0.5),  # 1 in both, 1 and 3
        # Over all answers together, 2 in both of 2 and 4 pairs; the mean would be (1 + 0 + 1) / 3.
        ([('{"a": "1"}', '{"a": "1"}'), ("{}", '{"a": "1", "b": "2"}'), ("{}", "{}")], 0.5),
        ([('{"a": {"x": [1], "y": 2}}', '{"a": {"y": 2, "x": [1]}}')], 1.0),
        ([('{"a": [1, 2]}', '{"a": [2, 1]}')], 0.0),
        ([("no JSON", '{"a": "1"}')], 0.0),
        ([('["a"]', '{"a": "1"}'), ('{"a": "1"}', '{"a": "1"}')], 2 / 3),
        ([("[" * 100_000, '{"a": "1"}')], 0.0),
        ([("{}", "{}")], 1.0),
        ([("no JSON", "{}")], 1.0),
        ([('{"a": "1"}', "{}")], 0.0),
        ([('{"a": "1"}', '{"a": "2"}', '{"a": "1"}', "{}")], 1.0),
        ([("{}", '{"a": "2"}', "{}")], 1.0),
        # The second reference: 1 in both of 1 and 2, against 1 of 1 and 3.
        ([('{"a": "1"}', '{"a": "1", "b": "2", "c": "3"}', '{"a": "1", "b": "2"}')], 2 / 3),
    ],
)
def test_slot_f1(given, f1):
    assert slot_f1(answers(*given)) == pytest.approx(f1)


def test_bleu_by_hand():
    # Every n-gram is there: only the brevity penalty exp(1 - 9 / 8) is left.
    pairs = [("the cat sat on the mat", "the cat sat on the mat"), ("a dog", "a dog ran")]
    assert bleu(answers(*pairs)) == pytest.approx(100 * 2.718281828**-0.125)
    # A second reference of the right length takes the penalty away.
    pairs[1] = ("a dog", "a dog ran", "a dog")
    assert bleu(answers(*pairs)) == pytest.approx(100)


def test_bleu_with_as_many_references_everywhere_is_sacrebleu():
    import sacrebleu

    given = answers(
        ("There is a coffee shop in town.", "A coffee shop is in town.", "There is a coffee shop."),
        ("It has a low rating, sadly.", "It is rated low.", "It has a low rating, and is cheap."),
    )
    streams = [[one.references[i] for one in given] for i in range(2)]
    expected = sacrebleu.corpus_bleu([one.answer for one in given], streams).score
    assert 20 < expected < 90
    assert bleu(given) == pytest.approx(expected)
    # References are alternatives: their order is nothing, and a repeated one adds nothing.
    turned = [Answer("", one.references[::-1] + one.references[:1], one.answer) for one in given]
    assert bleu(turned) == pytest.approx(expected)


def test_rouge_l():
    from rouge_score.rouge_scorer import RougeScorer

    # Longest common subsequence of 3 words: precision 3/4, recall 3/6.
    given = [("The cat sat down", "on the mat the cat sat"), ("a b", "c d", "a c b")]
    first, second = (rouge_l(answers(pair)) for pair in given)
    assert first == pytest.approx(2 * 0.75 * 0.5 / 1.25)
    assert second == pytest.approx(2 * 1 * (2 / 3) / (5 / 3))  # the better of two references
    assert rouge_l(answers(*given)) == pytest.approx((first + second) / 2)
    text = ("The waiters waited, patiently.", "A waiter was waiting patiently")
    theirs = RougeScorer(["rougeL"]).score(text[1], text[0])["rougeL"].fmeasure
    assert rouge_l(answers(text)) == pytest.approx(theirs)


def test_an_empty_answer_scores_nothing():
    given = answers(("", "a restaurant in the city centre"))
    assert scores.compute(["exact_match", "slot_f1", "bleu", "rouge_l"], given) == {
        "exact_match": 0,
        "slot_f1": 1,  # no slots on either side
        "bleu": 0,
        "rouge_l": 0,
    }


def test_compute_keeps_the_order_of_names():
    given = answers(('{"a": "1"}', '{"a": "1", "b": "2"}'))
    assert list(scores.compute(["slot_f1", "exact_match"], given).items()) == [
        ("slot_f1", pytest.approx(2 / 3)),
        ("exact_match", 0.0),
    ]
    assert scores.compute([], given) == {}


def test_wrong_names_are_collected():
    with pytest.raises(UserError) as error:
        scores.check_metrics(["blue", "exact_match", "perplexity"])
    assert str(error.value) == (
        "eval.metrics: 'blue' is not one of: accuracy, exact_match, slot_f1, bleu, rouge_l. "
        "Did you mean 'bleu'?\n"
        "eval.metrics: 'perplexity' is not one of: accuracy, exact_match, slot_f1, bleu, rouge_l."
    )
    with pytest.raises(UserError, match="'blue' is not one of"):
        scores.compute(["blue"], answers(("a", "a")))


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    scores.check_metrics(["exact_match", "slot_f1"])
    with pytest.raises(UserError) as error:
        scores.check_metrics(["bleu", "rouge_l"])
    assert str(error.value) == (
        "eval.metrics: bleu needs the package sacrebleu: pip install 'lora_jax[metrics]'\n"
        "eval.metrics: rouge_l needs the package rouge_score: pip install 'lora_jax[metrics]'"
    )


def test_slots_want_objects():
    scores.check_metrics(["slot_f1"], ["{}", '{"a": 1}'])
    scores.check_metrics(["exact_match"], ["no object"])
    with pytest.raises(UserError, match="2 held-out answers are none, the first 'no object'"):
        scores.check_metrics(["slot_f1"], ["{}", "no object", "[1]"])


def test_no_answers():
    with pytest.raises(UserError, match="no answers to score"):
        scores.compute(["exact_match"], [])


def test_spread():
    assert scores.spread(range(10), 4) == [0, 2, 5, 7]
    assert scores.spread("abc", None) == scores.spread("abc", 9) == ["a", "b", "c"]
