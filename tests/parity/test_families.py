"""Every model family against transformers and PEFT, on tiny random models: forward, padding,
packing, cache, adapters, files. What the families share is tested on Llama in `test_llama`.
"""

import copy
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from lora_jax import formats, lora, models, sharding, tree
from lora_jax.config import MeshConfig
from lora_jax.formats import peft_tensors
from lora_jax.targets import find_trainable

from ..engines import complete
from ..families import ALIASES, FAMILIES, describe, scalars, torch_model
from ..methods import QUICK
from ..towers import TOWERS

TOLERANCE = 1e-5
SEEDS = (0, 1)
NEW = [family for family in FAMILIES if family not in ("llama", "mistral")]  # not in `test_llama`
ALL = FAMILIES | ALIASES
ROWS = {
    f"{family}, {name}": (family, ALL[family].size | fields, fields)
    for family in (*NEW, *ALIASES)
    for name, fields in ALL[family].variants.items()
}
EACH_NEW = pytest.mark.parametrize("family", NEW)
EACH = pytest.mark.parametrize("family", ALL)


def jit(function):
    return jax.jit(function, compiler_options=QUICK)


def random_tokens(shape, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 97, shape, dtype=np.int32)


def torch_logits(module, tokens) -> np.ndarray:
    with torch.no_grad():
        return module(torch.tensor(np.asarray(tokens)).long(), use_cache=False).logits.numpy()


def logits_by_steps(model, cache, tokens, positions, segment_ids, ends):
    """Logits of chunks that end at `ends`, each read with those before it in the cache."""

    @jit
    def advance(params, cache, tokens, positions, segment_ids):
        module = model.module(params)
        hidden, cache = module.hidden(
            tokens, positions=positions, segment_ids=segment_ids, cache=cache
        )
        return module.logits(hidden), cache

    found, start = [], 0
    for end in ends:
        part = np.s_[:, start:end]
        new, cache = advance(model.params, cache, tokens[part], positions[part], segment_ids[part])
        found.append(np.asarray(new))
        start = end
    return np.concatenate(found, axis=1)


def altered(family, fields, source):
    """A model of other fields with the weights of another one that have a place in it."""
    model = torch_model(family, 0, fields)
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in source.named_parameters():
            if name in own and own[name].shape == value.shape:
                own[name].copy_(value)
        for name, value in scalars(source).items():
            scalars(model)[name].copy_(value)
    return model


def read_tensors(directory) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """dtype, shape and bytes of every tensor in a model directory."""
    found = {}
    for file in directory.glob("*.safetensors"):
        with safe_open(file, framework="pt") as handle:
            for name in handle.keys():
                value = handle.get_tensor(name)
                found[name] = (str(value.dtype), value.shape, value.view(torch.uint8).numpy())
    return {name: (dtype, shape, data.tobytes()) for name, (dtype, shape, data) in found.items()}


def test_every_family_that_writes_text_has_a_row():
    assert {*ALL, *TOWERS} == {*models.FAMILIES} - {*models.CLASSIFIERS}
    ours = models.FAMILIES
    for family in ALIASES:
        assert any(ours[family].Model is ours[other].Model for other in FAMILIES), family


@pytest.mark.long_table(8)
@pytest.mark.parametrize(("family", "fields", "own"), ROWS.values(), ids=ROWS)
def test_logits(tiny_model, error, family, fields, own):
    apply = None
    for seed in SEEDS:
        directory, oracle = tiny_model(family, seed, **fields)
        model = formats.load(directory)
        apply = apply or jit(model.apply)
        tokens = random_tokens((2, 80), seed)
        expected = torch_logits(oracle, tokens)
        assert np.abs(expected).max() > 1
        assert error(apply(model.params, tokens), expected) < TOLERANCE
    for name in own:  # otherwise parity would say nothing about the field
        if name == "layer_types" and fields.get("sliding_window", 0) is None:
            continue  # transformers then divides by zero in exaone4
        if name == "layer_types" and "num_kv_shared_layers" in fields:
            continue  # transformers then finds no layer of a kind whose keys it could share
        is_window = "sliding_window" in name and fields[name]
        gone = {name, "layer_types"} if is_window else {name}
        plain = {key: value for key, value in fields.items() if key not in gone}
        without = altered(family, plain, oracle)
        assert error(torch_logits(without, tokens), expected) > 10 * TOLERANCE, name


@pytest.mark.long_table(4)
@EACH_NEW
def test_padded_and_packed_texts_equal_each_text_alone(tiny_model, error, family):
    """Three texts in a row and padding behind them; padding on the left; padding on the right."""
    segment_ids, positions = np.zeros((3, 26), np.int32), np.zeros((3, 26), np.int32)
    texts = [(0, 0, 6), (0, 6, 17), (0, 17, 22), (1, 8, 26), (2, 0, 15)]  # row, start, end
    for number, (row, start, end) in enumerate(texts, 1):
        segment_ids[row, start:end] = number
        positions[row, start:end] = np.arange(end - start)
    apply = None
    for seed in SEEDS:
        directory, oracle = tiny_model(family, seed, **FAMILIES[family].fields)
        model = formats.load(directory)
        apply = apply or jit(model.apply)
        tokens = random_tokens((3, 26), seed)
        logits = np.asarray(
            apply(model.params, tokens, positions=positions, segment_ids=segment_ids)
        )
        leaking = np.asarray(
            apply(model.params, tokens, positions=positions, segment_ids=np.ones_like(tokens))
        )
        for row, start, end in texts:
            alone = torch_logits(oracle, tokens[row : row + 1, start:end])[0]
            assert error(logits[row, start:end], alone) < TOLERANCE
            if start:
                assert error(leaking[row, start:end], alone) > 1e-3


@pytest.mark.long_table(4)
@EACH_NEW
def test_cache_step_by_step_equals_the_full_forward(tiny_model, error, family):
    """Two chunks of 9 slots, the first of them padded on the left, then a token at a time."""
    directory, oracle = tiny_model(family, **FAMILIES[family].fields)
    model = formats.load(directory)
    total, starts, tokens = 22, [0, 4, 8], random_tokens((3, 22))
    real = np.arange(total)[None] >= np.array(starts)[:, None]
    logits = logits_by_steps(
        model,
        model.empty_cache(3, total + 5, jnp.float32),
        tokens,
        np.maximum(np.cumsum(real, axis=1) - 1, 0).astype(np.int32),
        real.astype(np.int32),
        [9, *range(18, total + 1)],
    )
    for row, start in enumerate(starts):
        alone = torch_logits(oracle, tokens[row : row + 1, start:])[0]
        assert error(logits[row, start:], alone) < TOLERANCE


@pytest.mark.parametrize(
    "family", ["gemma3_text", "gemma4_text", "gpt2", "lfm2", "qwen3_next", "qwen3_5_text"]
)
def test_greedy_tokens_equal_transformers(tiny_model, family):
    directory, oracle = tiny_model(family, **FAMILIES[family].fields)
    model = formats.load(directory)
    prompts = [random_tokens(n, n).tolist() for n in (11, 4, 1)]
    expected = [
        oracle.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=12,
            do_sample=False,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
        for prompt in prompts
    ]
    answers = complete(model, prompts, 12)
    assert answers == expected
    assert len({tuple(answer) for answer in answers}) == len(prompts)


def random_peft_model(oracle, family, seed):
    """An adapter of rank 3 on the family's targets, A and B random."""
    config = peft.LoraConfig(
        r=3,
        lora_alpha=7,
        lora_dropout=0.0,
        target_modules=ALL[family].targets,
        fan_in_fan_out=family == "gpt2",
        task_type="CAUSAL_LM",
    )
    module = peft.get_peft_model(copy.deepcopy(oracle), config)
    generator = torch.Generator().manual_seed(100 + seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return module


def pack(leaves, params, config) -> dict[str, np.ndarray]:
    """A tree as that of the adapters in the names and the layout of PEFT's files."""
    return peft_tensors.pack(tree.flatten(leaves), find_trainable(params, config))


@pytest.mark.long_table(5)
@EACH
def test_adapters_of_peft_give_its_losses_and_gradients(tiny_model, tmp_path, error, family):
    """And they are the same live and merged, the latter as files for transformers."""
    directory, oracle = tiny_model(family, **ALL[family].fields)
    module = random_peft_model(oracle, family, 0)
    module.save_pretrained(tmp_path / "adapter")
    model = formats.load(directory)
    adapters, config = formats.read_adapter(tmp_path / "adapter", model.params)
    ours = pack(adapters, model.params, config)
    theirs = {
        name.replace(".default.", "."): parameter
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }
    assert {*ours} == {*theirs}
    assert find_trainable(model.params, config).parameters == sum(
        parameter.numel() for parameter in theirs.values()
    )

    tokens = random_tokens((3, 15))
    supervised = np.random.default_rng(1).random(tokens.shape) < 0.6

    @jit
    def evaluate(adapters, params):
        def mean_loss(adapters):
            logits = model.apply(lora.bind(params, adapters, config), tokens)
            nll = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])
            return jnp.mean(nll, where=supervised[:, 1:]), logits

        return jax.value_and_grad(mean_loss, has_aux=True)(adapters)

    (loss, logits), gradients = evaluate(adapters, model.params)
    labels = torch.tensor(np.where(supervised, tokens, -100)).long()
    output = module(input_ids=torch.tensor(tokens).long(), labels=labels)
    output.loss.backward()
    assert error(logits, output.logits.detach().numpy()) < TOLERANCE
    assert error(logits, torch_logits(oracle, tokens)) > 1e-2
    assert error(loss, output.loss.item()) < TOLERANCE
    for name, gradient in pack(gradients, model.params, config).items():
        assert np.abs(gradient).max() > 1e-4, name
        assert error(gradient, theirs[name].grad.numpy()) < TOLERANCE, name

    formats.write_adapter(
        tmp_path / "written", adapters, model.params, config, base_model="base", source=directory
    )
    again = peft.PeftModel.from_pretrained(copy.deepcopy(oracle), tmp_path / "written")
    assert error(torch_logits(again, tokens), logits) < TOLERANCE

    merged = lora.merge(lora.bind(model.params, adapters, config))
    formats.write_model(tmp_path / "merged", model, merged, directory)
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged",
        attn_implementation=oracle.config._attn_implementation,
        output_loading_info=True,
    )
    assert not any(info.values()), info
    assert type(loaded) is type(oracle)
    assert error(torch_logits(loaded, tokens), logits) < TOLERANCE


@pytest.mark.parametrize(
    ("family", "dtype", "size"),
    [
        *((family, "float32", "1GB") for family in ALL),
        *((family, "float32", "20KB") for family in ("gpt2", "mixtral")),
        *((family, "bfloat16", "1GB") for family in ("gemma2", "qwen3_moe")),
    ],
)
def test_the_round_trip_keeps_every_bit(tiny_model, tmp_path, family, dtype, size):
    for number, variant in enumerate(ALL[family].variants.values()):
        fields = ALL[family].size | variant
        directory, oracle = tiny_model(family, dtype=dtype, max_shard_size=size, **fields)
        assert (len(list(directory.glob("*.safetensors"))) > 2) == (size == "20KB")
        model = formats.load(directory)
        target = tmp_path / f"written{number}"
        formats.write_model(target, model, model.params, directory, max_shard_size=size)
        assert (len(list(target.glob("*.safetensors"))) > 2) == (size == "20KB")
        assert read_tensors(target) == read_tensors(directory)
        before, after = (
            json.loads((path / "config.json").read_text()) for path in (directory, target)
        )
        assert after == before
        loaded, info = type(oracle).from_pretrained(target, output_loading_info=True)
        assert not any(info.values()), info
        assert str(loaded.dtype) == f"torch.{dtype}"
        found, expected = (dict(module.named_parameters()) for module in (loaded, oracle))
        assert {*found} == {*expected}
        for name, value in expected.items():
            assert torch.equal(found[name].float(), value), name


@pytest.mark.parametrize("buffers", [False, True])
def test_files_of_the_bare_gpt2(tiny_model, tmp_path, error, buffers):
    """Their tensors have no `transformer.` in front; old ones hold the causal mask too."""
    _, oracle = tiny_model("gpt2", **FAMILIES["gpt2"].size)
    directory = tmp_path / "bare"
    oracle.transformer.save_pretrained(directory)
    file = directory / "model.safetensors"
    tensors = load_file(file)
    assert "h.0.attn.c_attn.weight" in tensors
    if buffers:
        mask = np.tril(np.ones((1, 1, 128, 128), np.float32))
        for layer in range(3):
            tensors[f"h.{layer}.attn.bias"] = mask
            tensors[f"h.{layer}.attn.masked_bias"] = np.array(-1e4, np.float32)
        save_file(tensors, file, metadata={"format": "pt"})
    model = formats.load(directory)
    tokens = random_tokens((2, 20))
    logits = jit(model.apply)(model.params, tokens)
    assert error(logits, torch_logits(oracle, tokens)) < TOLERANCE


@EACH
def test_rules_say_where_every_parameter_lies(family):
    shapes = describe(family, **ALL[family].fields)
    mesh = sharding.abstract_mesh(MeshConfig(1, 1, 1))
    specs = tree.flatten(sharding.param_specs(shapes.params, shapes.rules, mesh))
    kernels = [path for path in specs if path[-1] in ("kernel", "embedding")]
    for path in (p for p in kernels if not {"gate", "router"} & {*p}):  # a router is small
        assert any(specs[path]), path
    for path in kernels:  # no axis of layers or experts is split
        assert not any(specs[path][: len(tree.flatten(shapes.params)[path].shape) - 2]), path
