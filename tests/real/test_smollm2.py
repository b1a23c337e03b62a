"""The packaged real model against transformers on the same converted files."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import data, formats

from ..engines import complete

pytestmark = [pytest.mark.real, pytest.mark.usefixtures("optimised")]
ROOT = Path(__file__).parents[2]

SUBJECTS = """
the capital of France; a haiku about rain; three primes above 50; why the sky is blue; 17 * 23;
a synonym of quick; the boiling point of water; a recipe for tea; the author of Hamlet;
a JSON object with two keys; how to say good morning in Spanish; the largest ocean; a palindrome;
what 2^10 is; a name for a cat; the colour of grass
"""


@pytest.fixture(scope="module")
def model():
    return formats.load("demo:smollm2-135m-instruct")


@pytest.fixture(scope="module")
def tokenizer(model):
    return formats.load_tokenizer(model.directory)


@pytest.fixture(scope="module")
def oracle(model):
    torch = pytest.importorskip("torch")
    import transformers

    found = transformers.AutoModelForCausalLM.from_pretrained(model.directory, dtype=torch.float32)
    return found.eval()


@pytest.fixture(scope="module")
def prompts(tokenizer):
    """32 prompts: 16 as chat turns, 16 as plain text of many lengths."""
    subjects = [" ".join(part.split()) for part in SUBJECTS.split(";")]
    rows = [
        data.Row(({"role": "user", "content": s}, {"role": "assistant", "content": ""}), s)
        for s in subjects
    ]
    chats = [data.prompt_tokens(row, tokenizer).tolist() for row in rows]
    texts = [tokenizer(f"{s} is" * (1 + i % 4)).input_ids for i, s in enumerate(subjects)]
    assert len(chats + texts) == 32
    return chats + texts


def test_logits_equal_transformers(model, oracle, prompts):
    import torch

    apply = jax.jit(model.apply)
    for prompt in prompts[::4]:
        with torch.no_grad():
            expected = oracle(torch.tensor([prompt])).logits.numpy()
        padded = np.pad([prompt], ((0, 0), (0, -len(prompt) % 32)))
        found = np.asarray(apply(model.params, jnp.asarray(padded)))[:, : len(prompt)]
        assert np.abs(found - expected).max() <= 2e-3


def test_greedy_continuations_equal_transformers(model, oracle, prompts):
    import torch

    found = complete(model, prompts, 24, rows=16)
    for prompt, answer in zip(prompts, found, strict=True):
        with torch.no_grad():
            expected = oracle.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=24,
                min_new_tokens=24,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )[0, len(prompt) :]
        assert answer == expected.tolist()


def test_loss_weights_cover_the_completion_and_its_end_of_turn(tokenizer):
    row = data.Row(
        (
            {"role": "user", "content": "71 S. Wacker"},
            {"role": "assistant", "content": '{"a": "71"}'},
        ),
        "row",
    )
    example = data.encode(row, tokenizer, system_prompt="Parse address as JSON.", max_length=256)
    assert tokenizer.decode(example.tokens) == (
        "<|im_start|>system\nParse address as JSON.<|im_end|>\n<|im_start|>user\n71 S. "
        "Wacker<|im_end|>\n"
        '<|im_start|>assistant\n{"a": "71"}<|im_end|>'
    )
    supervised = example.tokens[example.loss_weights > 0]
    assert tokenizer.decode(supervised) == '{"a": "71"}<|im_end|>'


def test_the_readme_code_runs_and_the_loss_falls(capsys):
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    scope: dict = {}
    exec(code.group(1), scope)
    losses = [float(line) for line in capsys.readouterr().out.split()]
    assert len(losses) == 5 and losses[-1] < 0.5 * losses[0]
    before, after = scope["model"].params, scope["merged"]
    kernel = lambda tree: tree["model"]["layers"]["mlp"]["up_proj"]["kernel"]  # noqa: E731
    assert (np.asarray(kernel(before)) != np.asarray(kernel(after))).any()


def test_packaged_regression_rows_are_general_text():
    from lora_jax import demo

    rows = [json.loads(line) for line in demo.path("general").read_text().splitlines()]
    assert len(rows) == 64 and all(len(row["completion"]) > 40 for row in rows)
