"""lm-eval scores the base and an adapter over HTTP as the engine does."""

import itertools

import numpy as np
import pytest

from lora_jax import formats
from lora_jax.generate import Engine, Request

from .adapters import merged
from .fetched import fetch, run
from .live import BASE, live, options_of, write_files

pytestmark = pytest.mark.slow
# Apart from the tested environment: the tables of lm-eval (pytablewriter, typepy) want
# python-dateutil below 3. Its class of API models needs these packages alone.
PACKAGES = (
    "lm_eval==0.4.13",
    "aiohttp==3.14.5",
    "aiohappyeyeballs==2.7.1",
    "aiosignal==1.4.0",
    "frozenlist==1.8.0",
    "multidict==7.2.1",
    "propcache==0.5.4",
    "yarl==1.25.1",
    "tenacity==9.2.1",
)
WINDOW = 39  # tokens that lm-eval sends at most; it keeps one more for the answer
MODELS = (BASE, "a2")
SETTINGS = {
    "concurrent": {"num_concurrent": 4},
    "batches": {"batch_size": 3},
    "tokenizer of the server": {"tokenizer_backend": "remote"},
}
PAIRS = (
    *(("the capital of", " france"), ("one two", " three"), ("x", "y"), ("", "begin")),
    *(("a longer context than that", " b"), ("trailing ", "space"), ("é", "ö 日本")),
    ("a context that is too long for the window of the model", " and is cut"),
)
TEXTS = ("short", "a" * WINDOW, "the text of three windows: " + "0123456789 " * 8)


class Scores:
    """Scores of an engine with the weights of a model."""

    def __init__(self, engine, tokenizer):
        self.engine, self.tokenizer = engine, tokenizer

    def ids(self, text):
        return self.tokenizer(text).input_ids

    def of_ids(self, context, continuation):
        """The log-likelihood of a continuation, and whether it is the greedy one."""
        ids = [*context, *continuation][-WINDOW:]
        (answer,) = self.engine.answer([Request(ids, 0, prompt_log_probs=1)])
        start = len(ids) - len(continuation) - 1
        found = answer.prompt_log_probs
        greedy = found.top_ids[start:, 0] == np.array(continuation)
        return float(found.own[start:].sum()), bool(greedy.all())

    def of_pair(self, context, continuation):
        whole = self.ids(context + continuation)
        start = len(self.ids(context.rstrip(" ")))
        return self.of_ids(whole[:start] or [self.tokenizer.eos_token_id], whole[start:])

    def of_text(self, text):
        """The log-likelihood of a text, in windows of which each has all the context it can."""
        ids = [self.tokenizer.eos_token_id, *self.ids(text)]
        starts = range(1, len(ids), WINDOW - 1)
        ends = [min(start + WINDOW - 1, len(ids)) for start in starts]
        windows = zip(starts, ends, strict=True)
        return sum(self.of_ids(ids[max(0, e - WINDOW) : s], ids[s:e])[0] for s, e in windows)

    def greedy_pair(self):
        """A context that this model continues with two characters, and these."""
        for number in itertools.count():
            context = f"number {number}"
            (answer,) = self.engine.answer([Request(self.ids(context), 2)])
            text = self.tokenizer.decode(answer.tokens)
            if self.ids(text) == answer.tokens:
                return context, text


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """By run: what lm-eval found, and what the engine gives."""
    source, root = write_files(tmp_path_factory.mktemp("files"))
    model, tokenizer = formats.load(source), formats.load_tokenizer(source)
    scores = Scores(Engine(model, rows=1, max_length=WINDOW + 1), tokenizer)
    jobs, expected = {}, {}
    with live(options_of(source, root)) as served:
        shared = {"base_url": f"{served.url}/v1/completions", "max_length": WINDOW + 1}
        here = {"tokenizer": str(source), "tokenizer_backend": "huggingface"}
        for name in MODELS:
            params = model.params
            if name != BASE:
                params = merged(model, *formats.read_adapter(root / name, params)).params
            scores.engine.use(params)
            greedy = scores.greedy_pair()
            pairs = [*PAIRS, greedy, (greedy[0], greedy[1][0] + "~")]
            own = {
                "pairs": [scores.of_pair(*pair) for pair in pairs],
                "texts": [scores.of_text(text) for text in TEXTS],
                "answers": [greedy[1]],
            }
            for kind, more in SETTINGS.items():
                more = more if "tokenizer_backend" in more else {**here, **more}
                jobs[f"{name}, {kind}"] = {
                    "settings": {"model": name, **shared, **more},
                    "pairs": pairs,
                    "texts": TEXTS,
                    "contexts": [greedy[0]],
                }
                expected[f"{name}, {kind}"] = own
        found = run("lm_eval_client.py", fetch(*PACKAGES), job=jobs)
        assert f"lm_eval=={found['version']}" == PACKAGES[0]
        served.settled()
    return {name: (found["runs"][name], expected[name]) for name in jobs}


@pytest.fixture(params=[f"{name}, {kind}" for name in MODELS for kind in SETTINGS])
def both(scored, request):
    return scored[request.param]


def test_log_likelihoods(both, error):
    found, expected = ([value for value, _ in one["pairs"]] for one in both)
    assert len({*expected}) == len(PAIRS) + 2
    assert max(map(error, found, expected)) <= 1e-5


def test_greedy_flags(both):
    found, expected = ([greedy for _, greedy in one["pairs"]] for one in both)
    assert found == expected
    assert expected[-2:] == [True, False]


def test_rolling_log_likelihoods(both, error):
    found, expected = (one["texts"] for one in both)
    assert max(map(error, found, expected)) <= 1e-5


def test_greedy_answers(both):
    found, expected = (one["answers"] for one in both)
    assert found == expected


def test_the_adapter_has_scores_of_its_own(scored):
    base, adapter = (scored[f"{name}, concurrent"][1] for name in MODELS)
    pairs = zip(base["pairs"][: len(PAIRS)], adapter["pairs"], strict=False)
    assert all(abs(one[0] - other[0]) > 0.01 for one, other in pairs)
