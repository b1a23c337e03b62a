"""Refusals of decoding before it begins."""

import pytest

from lora_jax import formats
from lora_jax.errors import UserError
from lora_jax.generate import Engine, Request, check_prompts


@pytest.mark.parametrize(
    ("prompts", "text"),
    [
        ([[1, 97]], "the prompt: token 97 is not one of the model's, which are 0 to 96"),
        ([[1], [2, -1]], "the prompt: token -1 is not one of the model's"),
        ([[1.0, 2.0]], "the prompt must be integers, not float64"),
        ([[]], "the prompt is empty"),
        ([3], "the prompt must be a list of tokens, not 3"),
        ([[[1, 2]]], "the prompt must be a list of tokens"),
    ],
)
def test_prompts_that_the_model_cannot_read(tiny_llama, prompts, text):
    model = formats.load(tiny_llama()[0])
    with pytest.raises(UserError, match=text):
        Engine(model, max_length=8).answer([Request(prompt, 2) for prompt in prompts])


def test_the_first_wrong_prompt_of_several_is_named(tiny_llama):
    model = formats.load(tiny_llama()[0])
    check_prompts(model, [[1], [2, 3]])
    with pytest.raises(UserError, match="prompt 1: token -1 is not one of the model's"):
        check_prompts(model, [[1], [2, -1]])


def test_what_needs_no_decoding(tiny_llama):
    model = formats.load(tiny_llama()[0])
    engine = Engine(model, max_length=8)
    assert engine.answer([]) == []
    with pytest.raises(UserError, match="max_new_tokens=0 must be at least 1"):
        engine.answer([Request([1], 0)])
    for tokens, text in (([[97]], "token 97"), ([[-1]], "token -1"), ([[0.5]], "not float32")):
        with pytest.raises(UserError, match=text):
            model.apply(model.params, tokens)
