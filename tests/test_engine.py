"""The engine against a forward pass over the whole text."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.errors import UserError
from lora_jax.generate import Engine, Request, Sampling, for_decoding
from lora_jax.generate.decode import Given, Turn, empty_rows, make_programs
from lora_jax.generate.sampling import every_token

from .families import FAMILIES, in_turns, random_model

DECODERS = [
    name for name in FAMILIES if name not in ("bert", "roberta", "xlm-roberta", "camembert")
]
LENGTHS = (3, 41, 16, 1, 30)  # of prompts; chunks are of 16 tokens here
FORMS = {"layers": for_decoding, "stack": lambda model: model}


def tiny(family, seed=0):
    return random_model(family, seed, **FAMILIES[family].fields)


def prompts_of(seed=0, lengths=LENGTHS):
    rng = np.random.default_rng(seed)
    return [rng.integers(1, 97, n).tolist() for n in lengths]


def log_softmax(logits):
    wide = np.asarray(logits, np.float64)
    wide = wide - wide.max(axis=-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))


class Whole:
    """Forward passes over whole texts, padded to one length."""

    def __init__(self, model, length=64):
        self.length, self._params = length, model.params
        self._apply = jax.jit(model.apply)

    def log_probs(self, text):
        """Log-probabilities (t, vocab) of the token after each of a text."""
        row = np.zeros((1, self.length), np.int32)
        row[0, : len(text)] = text
        segments = (np.arange(self.length) < len(text)).astype(np.int32)[None]
        return log_softmax(self._apply(self._params, row, segment_ids=segments)[0])[: len(text)]

    def greedy(self, prompt, count):
        text = list(prompt)
        for _ in range(count):
            text.append(int(self.log_probs(text)[-1].argmax()))
        return text[len(prompt) :]


@pytest.mark.long_table(5)
@pytest.mark.parametrize(("family", "form"), in_turns(DECODERS, FORMS))
def test_answers_and_log_probabilities_are_those_of_the_whole_text(error, family, form):
    """Two rows for five prompts: each row has long and short texts after one another."""
    model = tiny(family)
    whole = Whole(model)
    engine = Engine(FORMS[form](model), rows=2, max_length=64)
    prompts = prompts_of()
    requests = [Request(p, 13, log_probs=3, prompt_log_probs=2) for p in prompts]
    for prompt, answer in zip(prompts, engine.answer(requests), strict=True):
        assert answer.tokens == whole.greedy(prompt, 13)
        assert answer.finish_reason == "length"
        text = prompt + answer.tokens
        expected = whole.log_probs(text)
        own = expected[np.arange(len(text) - 1), text[1:]]
        start = len(prompt) - 1
        assert error(answer.log_probs.own, own[start:]) < 1e-5
        largest = -np.sort(-expected[start:-1], axis=-1)[:, :3]
        assert error(answer.log_probs.top_values, largest) < 1e-5
        assert answer.log_probs.top_ids[:, 0].tolist() == answer.tokens
        assert len(answer.prompt_log_probs.own) == start
        if start:
            assert error(answer.prompt_log_probs.own, own[:start]) < 1e-5
        assert answer.prompt_log_probs.top_ids.shape == (start, 2)


def test_packed_texts_of_a_trainer_have_the_log_probabilities_of_an_engine(error):
    model = tiny("mistral")
    engine = Engine(for_decoding(model), rows=3, max_length=64)
    texts = prompts_of(1, (17, 30, 9))
    found = engine.answer([Request(text, 0, prompt_log_probs=0) for text in texts])
    packed = np.concatenate(texts)[None].astype(np.int32)
    segments = np.concatenate([np.full(len(t), i + 1) for i, t in enumerate(texts)])[None]
    positions = np.concatenate([np.arange(len(t)) for t in texts])[None]
    logits = model.apply(model.params, packed, segment_ids=segments, positions=positions)
    every, start = log_softmax(logits[0]), 0
    for text, completion in zip(texts, found, strict=True):
        own = every[start : start + len(text) - 1][np.arange(len(text) - 1), text[1:]]
        assert error(completion.prompt_log_probs.own, own) < 1e-5
        assert completion.tokens == [] and completion.finish_reason == "length"
        start += len(text)


@pytest.fixture(scope="module")
def engine():
    return Engine(for_decoding(tiny("llama")), rows=4, max_length=64)


def test_programs_are_compiled_at_warm_up_and_not_after():
    engine = Engine(for_decoding(tiny("llama")), rows=2, max_length=160)
    count = engine.warm_up()
    settings = [
        Sampling(),
        Sampling(temperature=0.9, top_k=3, top_p=0.7, min_p=0.1, seed=4),
        Sampling(repetition_penalty=1.3, presence_penalty=0.3, logit_bias={5: 2.0}),
    ]
    prompts = prompts_of(2, (1, 15, 17, 70, 130, 33))
    requests = [
        Request(prompt, 1 + 5 * i, {i}, settings[i % 3], None, i, i or None, i % 2 or None)
        for i, prompt in enumerate(prompts)
    ]
    assert len(engine.answer(requests)) == len(prompts)
    assert engine.compiled_programs == count == engine.warm_up()


def test_an_answer_does_not_depend_on_the_other_rows(engine):
    drawn = Sampling(temperature=1.5, top_p=0.9, seed=3)
    requests = [Request(p, 9, sampling=drawn, number=i) for i, p in enumerate(prompts_of())]
    together = [answer.tokens for answer in engine.answer(requests)]
    assert [engine.answer([request])[0].tokens for request in requests] == together
    assert [a.tokens for a in engine.answer(requests[::-1])] == together[::-1]
    others = [dataclasses.replace(request, number=7) for request in requests]
    assert [answer.tokens for answer in engine.answer(others)] != together
    greedy = [dataclasses.replace(request, sampling=Sampling()) for request in requests]
    assert [answer.tokens for answer in engine.answer(greedy)] != together


def test_stop_tokens_and_budgets(engine):
    (prompt,) = prompts_of(5, (12,))
    (whole,) = engine.answer([Request(prompt, 20)])
    for place in (0, 7, 19):
        stop = whole.tokens[place]
        (answer,) = engine.answer([Request(prompt, 20, {stop}, log_probs=0)])
        assert answer.tokens == whole.tokens[: whole.tokens.index(stop)]
        assert (answer.finish_reason, answer.stop_token) == ("stop", stop)
        assert len(answer.log_probs.own) == len(answer.tokens)
    (later,) = engine.answer([Request(prompt, 20, {whole.tokens[0]}, Sampling(min_new_tokens=5))])
    assert len(later.tokens) >= 5
    (short,) = engine.answer([Request(prompt, 3)])
    assert (short.tokens, short.finish_reason) == (whole.tokens[:3], "length")


def test_a_stream_of_events_is_the_answer(engine):
    prompts = prompts_of(6, (20, 5))
    wanted = [answer.tokens for answer in engine.answer([Request(p, 21) for p in prompts])]
    ids = [engine.submit(Request(prompt, 21)) for prompt in prompts]
    found = {id: [] for id in ids}
    for event in engine.run():
        assert len(event.tokens) <= 9
        found[event.id] += event.tokens
    assert list(found.values()) == wanted
    assert not engine.busy


def test_a_cancelled_request_leaves_the_others_alone(engine):
    prompts = prompts_of(7, (20, 5, 9, 30, 2, 11))
    wanted = [answer.tokens for answer in engine.answer([Request(p, 21) for p in prompts])]
    ids = [engine.submit(Request(prompt, 21)) for prompt in prompts]
    engine.cancel(ids[5])  # waits
    engine.step()
    engine.cancel(ids[1])  # runs
    engine.cancel(12345)  # is not known
    found = {id: [] for id in ids}
    for event in engine.run():
        found[event.id] += event.tokens
    assert [found[ids[i]] for i in (0, 2, 3, 4)] != [[]] * 4
    assert found[ids[4]] == wanted[4] and found[ids[5]] == []
    assert [engine.answer([Request(p, 21)])[0].tokens for p in prompts] == wanted


def test_what_needs_an_idle_engine(engine):
    id = engine.submit(Request([1, 2], 9))
    for call in (
        engine.warm_up,
        engine.release,
        lambda: engine.use(engine.model.params),
        lambda: engine.answer([Request([1], 2)]),
    ):
        with pytest.raises(UserError, match="requests are running; take their events from run()"):
            call()
    engine.cancel(id)
    assert len(engine.answer([Request([1], 2)])[0].tokens) == 2


def test_an_exception_ends_all_requests(engine):
    def fail(index, completion):
        raise RuntimeError(f"at {index}")

    with pytest.raises(RuntimeError, match="at 1"):
        engine.answer([Request([1], 30), Request([2], 3), Request([3], 30)], fail)
    assert not engine.busy
    assert len(engine.answer([Request([1], 9)])[0].tokens) == 9


@pytest.mark.parametrize(
    ("request_", "text"),
    [
        (Request([1, 97], 2), "token 97 is not one of the model's, which are 0 to 96"),
        (Request([2, -1], 2), "token -1 is not one of the model's"),
        (Request([1.0, 2.0], 2), "must be integers, not float64"),
        (Request([], 2), "is empty; begin it with a token"),
        (Request(3, 2), "must be a list of tokens, not 3"),
        (Request([[1, 2]], 2), "must be a list of tokens"),
        (Request([1], 0), "max_new_tokens=0 must be at least 1"),
        (Request([1], 2.5), "max_new_tokens=2.5 must be an integer"),
        (Request([1] * 60, 5), "60 tokens and max_new_tokens=5 are more than max_length=64"),
        (Request([1], 2, {-1}), "stop_tokens={-1} must be token ids"),
        (Request([1], 2, ["a"]), "must be token ids"),
        (Request([1], 2, log_probs=21), "log_probs=21 must be an integer from 0 to 20"),
        (Request([1], 2, prompt_log_probs=-1), "prompt_log_probs=-1 must be an integer"),
        (Request([1], 2, adapter="a"), "adapter 'a' is not published; there are: none"),
        (Request([1], 2, sampling=Sampling(logit_bias={97: 1.0})), "outside the vocabulary of 97"),
    ],
)
def test_requests_that_cannot_be_answered(engine, request_, text):
    with pytest.raises(UserError, match=text):
        engine.submit(request_)
    assert not engine.busy


def test_an_engine_that_cannot_be_made():
    model = tiny("llama")
    for name in ("rows", "max_length", "max_terms"):
        with pytest.raises(UserError, match=f"{name}=0 must be at least 1"):
            Engine(model, **{name: 0})
    assert Engine(model).answer([]) == []


def test_other_parameters_answer_without_a_new_program(engine):
    first, other = tiny("llama"), tiny("llama", seed=9)
    (prompt,) = prompts_of(8, (10,))
    before = engine.answer([Request(prompt, 9)])
    count = engine.compiled_programs
    engine.use(for_decoding(other).params)
    assert engine.answer([Request(prompt, 9)])[0].tokens == Whole(other).greedy(prompt, 9)
    engine.use(for_decoding(first).params)
    engine.release()
    assert engine.answer([Request(prompt, 9)]) == before
    assert engine.compiled_programs == count


def test_a_decode_step_copies_neither_weights_nor_cache(optimised):
    """The program's results share the memory of its arguments, and it needs little more."""
    model = for_decoding(tiny("llama"))
    programs = make_programs(model, jnp.float32, lambda x: x)
    rows, slots = 32, 1024
    shapes = jax.eval_shape(
        lambda: (model.empty_cache(rows, slots, jnp.float32), empty_rows(rows, 1, 97))
    )
    turn = Turn(every_token(rows, 97), np.int32(1), np.bool_(False))
    decode = programs.decode.lower(Given(model.params), *shapes, None, turn, view=slots)
    compiled = decode.compile()
    layer = shapes[0].keys.layers[0]
    copied = f"{layer.shape}".replace(" ", "").strip("()")
    copies = [line for line in compiled.as_text().splitlines() if " copy(" in line]
    assert not [line for line in copies if f"f32[{copied}]" in line]
    kernel = model.params["model"]["layers"]["mlp"]["up_proj"]["kernel"].layers[0]
    weight = ",".join(map(str, kernel.shape))
    assert not [line for line in copies if f"f32[{weight}]" in line]
    memory, cache = compiled.memory_analysis(), sum(x.size * 4 for x in jax.tree.leaves(shapes[0]))
    assert memory.alias_size_in_bytes >= cache
    assert memory.temp_size_in_bytes < cache / 4
