"""llama.cpp itself (xllamacpp) over files that we wrote: greedy answers with and without adapters.

Near ties may fall either way, so every token of an answer must be ours, or within 1e-3 of the
largest logit of our own forward pass.
"""

import contextlib
import json
import urllib.request

import jax
import numpy as np
import pytest

from lora_jax import AdapterConfig, formats, lora

from .gguf_models import KINDS, write_tiny
from .test_peft import random_adapters

xllamacpp = pytest.importorskip("xllamacpp")

TIE, LENGTH = 1e-3, 96
ENDS = ("<|im_end|>", "<|endoftext|>", "<eos>")  # tokens that llama.cpp ends an answer at
ADAPTERS = {
    "plain": dict(target_modules="all-linear", rank=4),
    "rslora, patterns": dict(
        target_modules="all-linear",
        rank=4,
        use_rslora=True,
        rank_pattern={"k_proj": 2},
        alpha_pattern={"q_proj": 3.0, "layers.1.mlp.up_proj": 40.0},
    ),
    "q and k": dict(target_modules=["q_proj", "k_proj"], rank=3, alpha=24.0),
}


class Program:
    """llama.cpp with a model and adapters, each of which a request may scale."""

    def __init__(self, model, adapters=()):
        options = xllamacpp.CommonParams()
        options.model.path = str(model)
        options.n_ctx, options.n_parallel, options.warmup, options.verbosity = 512, 1, False, -1
        # float16, the default, rounds more than our answers are apart.
        options.cache_type_k = options.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        options.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        options.cpuparams.n_threads = options.cpuparams_batch.n_threads = 2
        options.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(a), 0.0) for a in adapters]
        self.count, self.server = len(adapters), xllamacpp.Server(options)

    def post(self, path, **body):
        address = f"{self.server.listening_address}/{path}"
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(address, json.dumps(body).encode(), headers)
        with contextlib.closing(urllib.request.urlopen(request, timeout=60)) as answer:
            return json.load(answer)

    def answer(self, prompt, count, adapter=None):
        """Greedy tokens after the tokens of a prompt."""
        scales = [{"id": i, "scale": float(i == adapter)} for i in range(self.count)]
        settings = dict(temperature=0, ignore_eos=True, return_tokens=True, cache_prompt=False)
        found = self.post("completion", prompt=prompt, n_predict=count, lora=scales, **settings)
        assert len(found["tokens"]) == count
        return found["tokens"]


def checker(model):
    """A check of every token of an answer against our logits for the text before it; tokens that
    end an answer are left out, as `ignore_eos` does.
    """
    apply = jax.jit(model.apply)
    vocabulary = formats.load_tokenizer(model.directory).get_vocab()
    ends = [vocabulary[token] for token in ENDS if token in vocabulary]

    def check(params, prompt, answer):
        tokens = np.zeros((1, LENGTH), np.int32)
        tokens[0, : len(prompt) + len(answer)] = [*prompt, *answer]
        logits = np.array(apply(params, tokens)[0, len(prompt) - 1 :][: len(answer)])
        logits[:, ends] = -np.inf
        below = logits.max(-1) - logits[np.arange(len(answer)), answer]
        at = below.argmax()
        assert below.max() <= TIE, f"token {at} of {answer} is {below.max():.1e} too low"

    return check


def prompts(vocab):
    rng = np.random.default_rng(0)
    return [rng.integers(5, vocab, length).tolist() for length in (3, 9, 30)]


@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_answers_as_we_do(tmp_path, kind):
    model = write_tiny(kind, tmp_path / "m")
    vocab = len(formats.load_tokenizer(model.directory))
    formats.write_gguf_model(tmp_path / "base", model, model.params)
    weights, files = [], []
    for i, fields in enumerate(ADAPTERS.values()):
        config = AdapterConfig(**fields)
        adapters = random_adapters(model.params, config, i)
        adapters = jax.tree.map(lambda x: 2 * x, adapters)
        target = tmp_path / f"adapter{i}"
        formats.write_gguf_adapter(target, adapters, model, config, base_model="base")
        weights.append(lora.merge(lora.bind(model.params, adapters, config)))
        files.append(target / "adapter.gguf")
    check = checker(model)
    program = Program(tmp_path / "base" / "model.gguf", files)
    for prompt in prompts(vocab):
        base = program.answer(prompt, 24)
        check(model.params, prompt, base)
        for i, params in enumerate(weights):
            answer = program.answer(prompt, 24, adapter=i)
            check(params, prompt, answer)
            assert answer != base


def test_a_merged_file_answers_as_the_adapter_does_and_reads_text_as_we_do(tmp_path):
    model = write_tiny("llama", tmp_path / "m")
    config = AdapterConfig(target_modules="all-linear")
    adapters = random_adapters(model.params, config, 0)
    merged = lora.merge(lora.bind(model.params, adapters, config))
    formats.write_gguf_model(tmp_path / "g", model, merged)
    check = checker(model)
    program = Program(tmp_path / "g" / "model.gguf")
    for prompt in prompts(250):
        answer = program.answer(prompt, 24)
        check(merged, prompt, answer)
        with pytest.raises(AssertionError, match="too low"):
            check(model.params, prompt, answer)
    tokenizer = formats.load_tokenizer(model.directory)
    messages = [{"role": "user", "content": "ab über  12 abab?"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert program.post("apply-template", messages=messages)["prompt"] == text
    found = program.post("tokenize", content=text, parse_special=True, add_special=True)
    assert found["tokens"] == tokenizer.encode(text)


@pytest.mark.real
@pytest.mark.usefixtures("optimised")
def test_the_demo_model_chats_alike(tmp_path):
    model = formats.load("demo:smollm2-135m-instruct")
    config = AdapterConfig(target_modules="all-linear", rank=8, use_rslora=True)
    adapters = random_adapters(model.params, config, 0)
    adapters = jax.tree.map(lambda x: 0.3 * x, adapters)
    formats.write_gguf_model(tmp_path / "base", model, model.params)
    formats.write_gguf_adapter(tmp_path / "a", adapters, model, config, base_model="base")
    check = checker(model)
    program = Program(tmp_path / "base" / "model.gguf", [tmp_path / "a" / "adapter.gguf"])
    tokenizer = formats.load_tokenizer(model.directory)
    messages = [{"role": "user", "content": "What's the capital of France,  in 1999?\n\tName it!"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert program.post("apply-template", messages=messages)["prompt"] == text
    prompt = tokenizer.encode(text)
    assert program.post("tokenize", content=text, parse_special=True)["tokens"] == prompt
    base = program.answer(prompt, 24)
    check(model.params, prompt, base)
    answer = program.answer(prompt, 24, adapter=0)
    check(lora.merge(lora.bind(model.params, adapters, config)), prompt, answer)
    assert answer != base
