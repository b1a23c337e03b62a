"""Answers kept to the tokens that a grammar allows."""

import numpy as np
import pytest

from lora_jax.errors import UserError
from lora_jax.generate import Engine, Request, Sampling
from lora_jax.generate.sampling import every_token, keep_allowed

from .families import FAMILIES, random_model

PROMPTS = ([5, 9, 2, 61, 7], [3, 3, 80])


class Cycle:
    """A grammar: token i of an answer is `i % 7` modulo 7, and the answer has `length` tokens or
    ends by a stop token after `least`.
    """

    def __init__(self, length, least=None, fails=None):
        self.length, self.least, self.fails = length, length if least is None else least, fails

    def start(self, stops):
        return Run(self, stops)


class Run:
    def __init__(self, grammar, stops):
        self.grammar, self.stops, self.tokens = grammar, stops, []

    def accept(self, token):
        assert token % 7 == len(self.tokens) % 7
        self.tokens.append(token)

    def allowed(self, vocab):
        made, own = len(self.tokens), self.grammar
        if own.fails == made:
            raise UserError("the grammar cannot go on")
        if made == own.length:
            return None
        tokens = {*range(made % 7, vocab, 7), *(self.stops if made >= own.least else ())}
        return as_bits(tokens, vocab)


def as_bits(tokens, vocab):
    bits = np.zeros(-(-vocab // 32) * 32, bool)
    bits[list(tokens)] = True
    return np.packbits(bits, bitorder="little").view(np.uint32)


@pytest.fixture(scope="module")
def model():
    return random_model("llama", **FAMILIES["llama"].fields)


@pytest.fixture(scope="module")
def engine(model):
    engine = Engine(model, rows=4, max_length=64)
    engine.programs = engine.warm_up()
    yield engine
    assert engine.compiled_programs == engine.programs and not engine.busy


def plainly(model, prompt, grammar, most):
    """Tokens of the plain forward, the largest logit of those allowed at each step."""
    guide, tokens = grammar.start(()), []
    while len(tokens) < most and (bits := guide.allowed(model.config.vocab_size)) is not None:
        logits = np.array(model.apply(model.params, np.array([[*prompt, *tokens]]))[0, -1])
        logits[np.unpackbits(bits.view(np.uint8), bitorder="little")[: len(logits)] == 0] = -np.inf
        tokens.append(int(logits.argmax()))
        guide.accept(tokens[-1])
    return tokens


def test_only_allowed_tokens_are_taken_and_other_rows_do_not_notice(model, engine, error):
    free = [Request(prompt, 12, log_probs=2) for prompt in PROMPTS]
    alone = [engine.answer([request])[0] for request in free]
    kept = [
        Request(prompt, 12, log_probs=2, grammar=Cycle(9 + i)) for i, prompt in enumerate(PROMPTS)
    ]
    answers = engine.answer([kept[0], free[0], free[1], kept[1]])
    for answer, own in zip(answers[1:3], alone, strict=True):
        assert (
            answer.tokens == own.tokens and error(answer.log_probs.own, own.log_probs.own) <= 1e-5
        )
    for answer, request in zip([answers[0], answers[3]], kept, strict=True):
        expected = plainly(model, request.prompt, request.grammar, 12)
        assert answer.tokens == expected and len(expected) >= 9
        assert (answer.finish_reason, answer.stop_token) == ("stop", None)
    # Log-probabilities are the model's own, of all tokens.
    again = engine.answer([Request([*PROMPTS[0], *answers[0].tokens], 0, prompt_log_probs=0)])[0]
    own = again.prompt_log_probs.own[len(PROMPTS[0]) - 1 :]
    assert error(answers[0].log_probs.own, own) <= 1e-5


@pytest.mark.parametrize(
    "sampling", [Sampling(temperature=1.5, seed=3), Sampling(logit_bias={1: 50})]
)
def test_draws_and_biases_stay_within(engine, sampling):
    requests = [Request(p, 10, sampling=sampling, grammar=Cycle(20)) for p in PROMPTS]
    for answer in engine.answer(requests):
        assert [token % 7 for token in answer.tokens] == [i % 7 for i in range(10)]
        assert answer.finish_reason == "length"


def test_stop_tokens_end_an_answer_where_it_may_end(engine):
    stop = 90  # no token of the third place
    free = Sampling(logit_bias={stop: 80})
    (answer,) = engine.answer([Request(PROMPTS[0], 12, [stop], free, grammar=Cycle(12, 3))])
    assert len(answer.tokens) == 3 and (answer.finish_reason, answer.stop_token) == ("stop", stop)
    late = Sampling(logit_bias={stop: 80}, min_new_tokens=5)
    (answer,) = engine.answer([Request(PROMPTS[0], 12, [stop], late, grammar=Cycle(12, 3))])
    assert len(answer.tokens) == 5 and answer.stop_token == stop


def test_an_answer_that_must_be_empty(engine):
    (answer,) = engine.answer([Request(PROMPTS[0], 5, grammar=Cycle(0), prompt_log_probs=0)])
    assert answer.tokens == [] and answer.finish_reason == "stop"
    assert len(answer.prompt_log_probs.own) == len(PROMPTS[0]) - 1


@pytest.mark.parametrize("fails", [0, 1, 3])
def test_a_grammar_that_cannot_go_on_ends_its_own_request(engine, fails):
    broken = engine.submit(Request(PROMPTS[0], 8, grammar=Cycle(8, fails=fails)))
    other = engine.submit(Request(PROMPTS[1], 8))
    events = [*engine.run()]
    last = {event.id: event for event in events if event.finish_reason is not None}
    assert last[broken].finish_reason == "error" and "cannot go on" in str(last[broken].error)
    assert sum(len(event.tokens) for event in events if event.id == broken) == fails
    assert last[other].finish_reason == "length" and last[other].error is None
    with pytest.raises(UserError, match="cannot go on"):
        engine.answer([Request(PROMPTS[0], 8, grammar=Cycle(8, fails=fails))])


def test_bits_of_each_word():
    rng = np.random.default_rng(0)
    for vocab in (31, 32, 33, 97):
        allowed = rng.random((3, vocab)) < 0.5
        bits = np.stack([as_bits(np.flatnonzero(row), vocab) for row in allowed])
        logits = rng.standard_normal((3, vocab)).astype(np.float32)
        found = np.asarray(keep_allowed(logits, bits))
        assert np.array_equal(found, np.where(allowed, logits, -np.inf))
        assert np.array_equal(keep_allowed(logits, every_token(3, vocab)), logits)
