"""Gemma 3 270M as it is packaged (Q4_K_M) against transformers' own reading of the same GGUF file.

Its licence wants to be agreed to: without LORA_JAX_ACCEPT_GEMMA_TERMS=1 nothing is fetched and the
tests are skipped.
"""

import os

import jax
import jax.numpy as jnp
import pytest

from lora_jax import demo, formats

from ..engines import complete

pytestmark = [
    pytest.mark.real,
    pytest.mark.usefixtures("optimised"),
    pytest.mark.skipif(
        os.environ.get("LORA_JAX_ACCEPT_GEMMA_TERMS") != "1",
        reason="Gemma is under the Gemma Terms of Use (https://ai.google.dev/gemma/terms); set "
        "LORA_JAX_ACCEPT_GEMMA_TERMS=1 if you agree to them",
    ),
]
TEXTS = (
    "The tower was built in 1889 for the World's Fair. It is 330 metres tall, and for forty years "
    "nothing made by people stood higher.",
    "def area(radius):\n    return 3.14159 * radius ** 2  # of a circle\n\n\nprint(area(2))",
    "Guten Morgen! Wie geht es Ihnen heute? 日本語もすこし、そして emoji 🙂.",
)
STRINGS = (
    *(*TEXTS, "", " ", "Hello  world\n\nit's 12345", "   indented\n\t\tcode();\n\n\n\n"),
    *(
        "<start_of_turn>user\nhé 🙂<end_of_turn>\n",
        "<b>bold</b> <unused7> a▁b",
        "ñandú \u200b\u0007",
    ),
)


@pytest.fixture(scope="module")
def model():
    return formats.load("demo:gemma3-270m")


@pytest.fixture(scope="module")
def tokenizer(model):
    return formats.load_tokenizer(model.directory)


def test_logits_equal_transformers(model, tokenizer, error):
    import torch
    import transformers

    source = demo.path("gemma3-270m")
    oracle = transformers.AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.float32
    ).eval()
    apply = jax.jit(model.apply)
    # The last is longer than the window of 512 tokens that most layers see.
    for text in (*TEXTS, " ".join(TEXTS) * 6):
        tokens = tokenizer(text, return_tensors="np").input_ids
        with torch.no_grad():
            expected = oracle(torch.tensor(tokens)).logits.numpy()
        found = error(apply(model.params, jnp.asarray(tokens)), expected)
        print(f"{tokens.shape[1]} tokens: {found:.1e}")
        assert found <= 1e-4
    assert tokens.shape[1] > model.config.sliding_window


def test_token_ids_equal_transformers(tokenizer):
    from transformers import AutoTokenizer

    source = demo.path("gemma3-270m")
    reference = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    for text in STRINGS:
        ids = tokenizer.encode(text)
        assert ids == reference.encode(text), text
        assert tokenizer.decode(ids, skip_special_tokens=True) == text.replace("▁", " ").replace(
            "<unused7>", ""
        ).replace("<start_of_turn>", "").replace("<end_of_turn>", "")


def test_greedy_continuations_are_sensible(model, tokenizer):
    """The packaged model continues text; it is not the one that was tuned to chat."""
    known = {
        "Question: What is the capital of France?\nAnswer:": "Paris",
        "The chemical symbol for gold is": "Au",
        "Monday, Tuesday, Wednesday,": "Thursday, Friday, Saturday, Sunday",
    }
    stops = set(formats.stop_tokens(model.directory))
    prompts = [tokenizer.encode(prompt) for prompt in known]
    answers = complete(model, prompts, 8, stops)
    for answer, expected in zip(answers, known.values(), strict=True):
        assert tokenizer.decode(answer).strip().startswith(expected)
