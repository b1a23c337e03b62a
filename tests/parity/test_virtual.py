"""Prompt and prefix tuning against PEFT, on tiny random models of every family that writes text."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import torch
from safetensors.numpy import load_file, save_file

from lora_jax import AdapterConfig, UserError, adapters, data, formats, lora, tree
from lora_jax.models import describe as describe_model
from lora_jax.targets import find_trainable

from ..engines import complete
from ..families import FAMILIES, SMOLLM2, STATEFUL, describe, random_model
from ..methods import QUICK

TOLERANCE = 1e-5
COUNT = 5
KINDS = {"prompt": peft.PromptTuningConfig, "prefix": peft.PrefixTuningConfig}
EACH_KIND = pytest.mark.parametrize("method", KINDS)
# A family for each way in which positions, windows, heads or projections differ.
SOME = ("llama", "gemma3_text", "phi3", "gpt2")
EACH = pytest.mark.parametrize("family", SOME)


def jit(function, **options):
    return jax.jit(function, compiler_options=QUICK, **options)


def random_tokens(shape, seed=0):
    return np.random.default_rng(seed).integers(1, 97, shape, dtype=np.int32)


def random_adapters(model, config, seed=0):
    """Every leaf random, a gate too."""
    rng = np.random.default_rng(seed)
    shapes = adapters.shapes(model.params, config)
    return {
        name: jnp.asarray(0.7 * rng.standard_normal(leaf.shape).astype(np.float32))
        for name, leaf in shapes.items()
    }


def settings(method, **more):
    return AdapterConfig(method=method, num_virtual_tokens=COUNT, prompt_init="random", **more)


@EACH_KIND
@pytest.mark.long_table(5)
@pytest.mark.parametrize(
    ("family", "seed"), [*((family, 0) for family in FAMILIES), ("llama", 1), ("gemma2", 1)]
)
def test_peft_gives_the_same_logits_and_gradients_both_ways(
    tiny_model, tmp_path, error, family, seed, method
):
    directory, oracle = tiny_model(family, **FAMILIES[family].fields)
    if method == "prefix" and family in (*STATEFUL, "gemma4_text"):
        with pytest.raises(UserError, match="method=prefix: layers of the model differ"):
            find_trainable(formats.load(directory).params, settings(method))
        return
    config = KINDS[method](num_virtual_tokens=COUNT, task_type="CAUSAL_LM")
    module = peft.get_peft_model(copy.deepcopy(oracle), config)
    encoder = module.prompt_encoder["default"].embedding.weight
    with torch.no_grad():
        noise = torch.randn(encoder.shape, generator=torch.Generator().manual_seed(seed))
        encoder.copy_(0.7 * noise)
    module.save_pretrained(tmp_path / "theirs")

    model = formats.load(directory)
    small, found = formats.read_adapter(tmp_path / "theirs", model.params)
    assert find_trainable(model.params, found).parameters == encoder.numel()
    tokens = random_tokens((2, 13), seed)
    supervised = np.random.default_rng(seed).random(tokens.shape) < 0.6

    @jit
    def evaluate(small, params):
        def mean_loss(small):
            logits = model.apply(params, tokens, prefix=adapters.prefix(small, found))
            nll = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])
            return jnp.mean(nll, where=supervised[:, 1:]), logits

        return jax.value_and_grad(mean_loss, has_aux=True)(small)

    (loss, logits), gradients = evaluate(small, model.params)
    # The first real token is predicted by the last virtual one in PEFT; here it has no weight.
    labels = torch.tensor(np.where(supervised, tokens, -100)).long()
    labels[:, 0] = -100
    output = module(input_ids=torch.tensor(tokens).long(), labels=labels)
    output.loss.backward()
    theirs = output.logits.detach().numpy()[:, -tokens.shape[1] :]
    assert error(logits, theirs) < TOLERANCE
    assert error(logits, jit(model.apply)(model.params, tokens)) > 1e-2
    assert error(loss, output.loss.item()) < TOLERANCE
    formats.write_adapter(tmp_path / "slopes", gradients, model.params, found, base_model="x")
    slopes = load_file(tmp_path / "slopes" / "adapter_model.safetensors")["prompt_embeddings"]
    assert np.abs(slopes).max() > 1e-4
    assert error(slopes, encoder.grad.numpy()) < TOLERANCE

    formats.write_adapter(
        tmp_path / "ours", small, model.params, found, base_model="base", source=directory
    )
    file = "adapter_model.safetensors"
    mine, other = (load_file(tmp_path / side / file) for side in ("ours", "theirs"))
    assert {*mine} == {*other}
    assert np.array_equal(mine["prompt_embeddings"], other["prompt_embeddings"])
    again = peft.PeftModel.from_pretrained(copy.deepcopy(oracle), tmp_path / "ours")
    with torch.no_grad():
        repeated = again(input_ids=torch.tensor(tokens).long()).logits.numpy()
    assert error(repeated[:, -tokens.shape[1] :], theirs) < 1e-6


@pytest.mark.long_table(3)
@EACH_KIND
@EACH
def test_packed_texts_have_virtual_tokens_of_their_own(error, family, method):
    model, config = random_model(family, **FAMILIES[family].fields), settings(method)
    prefix = adapters.prefix(random_adapters(model, config), config)
    texts = [random_tokens(length, seed) for seed, length in enumerate((7, 4, 9))]
    apply = jit(model.apply)
    alone = [apply(model.params, text[None], prefix=prefix)[0] for text in texts]
    places = COUNT if method == "prompt" else 0
    examples = [data.Example(text, np.ones(len(text), np.float32), "here") for text in texts]
    row = data.to_row(data.with_places(examples, places), 40)
    batch = {name: jnp.asarray(row[name])[None] for name in ("tokens", "positions", "segment_ids")}
    packed = apply(model.params, prefix=prefix, **batch)[0]
    start = 0
    for text, expected in zip(texts, alone, strict=True):
        start += places
        assert error(packed[start : start + len(text)], expected) < TOLERANCE
        start += len(text)
    assert not row["loss_weights"][:places].any()


@pytest.mark.long_table(4)
@EACH
@pytest.mark.parametrize(
    ("method", "more"), [*((m, {}) for m in KINDS), ("prefix", {"prefix_gate": True})]
)
def test_decoding_with_a_cache_is_the_whole_forward(error, family, method, more):
    model, config = random_model(family, **FAMILIES[family].fields), settings(method, **more)
    prefix = adapters.prefix(random_adapters(model, config), config)
    prompts = [random_tokens(n, n).tolist() for n in (3, 8)]
    answers = complete(model, prompts, 6, prefix=prefix)
    apply = jit(model.apply)
    for prompt, found in zip(prompts, answers, strict=True):
        text = np.asarray([prompt + found])
        whole = apply(model.params, text, prefix=prefix)
        best = np.argmax(whole[0], axis=-1)
        assert best[len(prompt) - 1 : -1].tolist() == found
        assert error(whole, apply(model.params, text)) > 1e-2
    found = by_steps(model, prefix, text, COUNT if method == "prompt" else 0)
    assert error(found, whole) < TOLERANCE


def by_steps(model, prefix, text, places):
    """Logits of a text that is read in three parts, each with those before it in the cache."""
    tokens = np.pad(text, ((0, 0), (places, 0)))
    positions = np.arange(tokens.shape[1])[None]
    cache, found = model.empty_cache(1, tokens.shape[1] + 3, jnp.float32), []
    module = model.module(model.params)
    for part in (np.s_[:, : places + 2], np.s_[:, places + 2 : -3], np.s_[:, -3:]):
        hidden, cache = module.hidden(
            jnp.asarray(tokens[part]),
            positions=jnp.asarray(positions[part]),
            segment_ids=jnp.ones_like(tokens[part]),
            cache=cache,
            prefix=prefix,
        )
        found.append(module.logits(hidden))
    return np.concatenate(found, axis=1)[:, places:]


@pytest.mark.long_table(3)
@EACH_KIND
@EACH
def test_virtual_tokens_of_a_text_are_that_text(error, family, method):
    model = random_model(family, **FAMILIES[family].fields)
    text, tokens = random_tokens(COUNT, 5), random_tokens((2, 9))
    config = AdapterConfig(
        method=method, num_virtual_tokens=COUNT, prompt_init="text", prompt_text="any"
    )
    calibrate = adapters.as_model_sees(model, config, text.tolist())
    params, small = adapters.init(jax.random.key(0), model.params, config, calibrate)
    assert params is model.params
    apply = jit(model.apply)
    found = apply(model.params, tokens, prefix=adapters.prefix(small, config))
    whole = np.concatenate([np.tile(text, (2, 1)), tokens], axis=1)
    expected = apply(model.params, whole)[:, COUNT:]
    assert error(found, expected) < TOLERANCE
    assert error(apply(model.params, tokens), expected) > 1e-2


def test_a_text_is_cut_or_repeated_and_a_vocabulary_drawn_from():
    model = random_model("llama", **FAMILIES["llama"].fields)
    table = np.asarray(model.params["model"]["embed_tokens"]["embedding"])

    def start(count, **more):
        config = AdapterConfig(method="prompt", num_virtual_tokens=count, **more)
        text = {"tokens": [7, 3, 9]} if "prompt_text" in more else {}
        calibrate = adapters.as_model_sees(model, config, **text)
        small = adapters.init(jax.random.key(3), model.params, config, calibrate)[1]
        return np.asarray(small["prompt_embeddings"])

    text = {"prompt_init": "text", "prompt_text": "any"}
    assert np.array_equal(start(2, **text), table[[7, 3]])
    assert np.array_equal(start(5, **text), table[[7, 3, 9, 7, 3]])
    drawn = start(6)
    rows = [np.flatnonzero((table == row).all(axis=1)).tolist() for row in drawn]
    assert all(len(row) == 1 for row in rows)
    assert len({row[0] for row in rows}) > 3


@EACH
def test_a_gate_at_zero_changes_nothing_at_all(family):
    model = random_model(family, **FAMILIES[family].fields)
    config = AdapterConfig(method="prefix", num_virtual_tokens=COUNT, prefix_gate=True)
    calibrate = adapters.as_model_sees(model, config)
    small = adapters.init(jax.random.key(0), model.params, config, calibrate)[1]
    assert small["prefix_gate"].shape == (model.config.num_hidden_layers,)
    tokens = random_tokens((2, 9))

    def logits(small):
        return model.apply(model.params, tokens, prefix=adapters.prefix(small, config))

    run = jit(logits)
    plain = np.asarray(jit(model.apply)(model.params, tokens))
    assert np.array_equal(run(small), plain)
    assert not np.array_equal(run(small | {"prefix_gate": small["prefix_gate"] + 1}), plain)
    slopes = jit(jax.grad(lambda small: jnp.square(logits(small)).sum()))(small)
    assert (np.abs(slopes["prefix_gate"]) > 1e-4).all()


def test_no_finite_prefix_without_a_gate_is_without_effect(error):
    model = random_model("llama", **FAMILIES["llama"].fields)
    config = settings("prefix")
    zeros = jax.tree.map(jnp.zeros_like, random_adapters(model, config))
    tokens = random_tokens((2, 9))
    found = jit(model.apply)(model.params, tokens, prefix=adapters.prefix(zeros, config))
    assert error(found, jit(model.apply)(model.params, tokens)) > 1e-2


GPT2 = {"model_type": "gpt2"}


@pytest.mark.parametrize(
    ("hf_config", "method", "count"),
    [
        (GPT2, "prompt", 15_360),
        (GPT2, "prefix", 368_640),
        (SMOLLM2, "prompt", 11_520),
        (SMOLLM2, "prefix", 230_400),
    ],
)
def test_parameters_of_twenty_tokens(hf_config, method, count):
    model = describe_model(hf_config)
    found = find_trainable(model.params, AdapterConfig(method=method))
    assert found.parameters == found.exported == count


@EACH_KIND
def test_files_that_do_not_fit(tmp_path, method):
    model, config = random_model("llama", **FAMILIES["llama"].fields), settings(method)
    small = random_adapters(model, config)
    formats.write_adapter(tmp_path / "a", small, model.params, config, base_model="x")
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensor = load_file(file)["prompt_embeddings"]
    for tensors, message in [
        ({"prompt_embeddings": tensor[:, :-1]}, r"prompt_embeddings has shape .* expected"),
        ({"other": tensor}, r"unexpected other; missing prompt_embeddings"),
        ({"prompt_embeddings": tensor * np.nan}, "not finite"),
    ]:
        save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, file)
        with pytest.raises(UserError, match=message):
            formats.read_adapter(tmp_path / "a", model.params)
    other = describe(
        "llama", **FAMILIES["llama"].fields | {"hidden_size": 30, "num_hidden_layers": 2}
    )
    name = "token_dim" if method == "prompt" else "num_layers"
    with pytest.raises(UserError, match=f"{name}=.*, and the model has"):
        formats.read_adapter(tmp_path / "a", other.params)


def test_a_gate_has_no_form_in_peft(tmp_path):
    model = describe("llama", **FAMILIES["llama"].fields)
    config = settings("prefix", prefix_gate=True)
    with pytest.raises(UserError, match="prefix_gate=true: PEFT's prefixes have no gate"):
        formats.write_adapter(tmp_path / "a", {}, model.params, config, base_model="x")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "prompt", "use_dora": True}, "use_dora=True is for method=lora"),
        ({"method": "prefix", "dropout": 0.1}, "dropout=0.1 is for method=lora"),
        ({"num_virtual_tokens": 3}, "num_virtual_tokens=3 is for method=prompt or prefix"),
        ({"method": "prompt", "num_virtual_tokens": 0}, "num_virtual_tokens=0 must be at least 1"),
        ({"method": "prompt", "prompt_init": "text"}, "prompt_init=text and prompt_text=None"),
        ({"method": "prompt", "prompt_text": "a"}, "prompt_init=vocab and prompt_text='a'"),
        ({"method": "prompt", "prefix_gate": True}, "prefix_gate=true is for method=prefix"),
        (
            {"method": "prompt", "prompt_init": "text", "prompt_text": "a"},
            "num_virtual_tokens is not set",
        ),
    ],
)
def test_settings_that_go_with_another_method(fields, message):
    params = describe("llama", **FAMILIES["llama"].fields).params
    with pytest.raises(UserError, match=message):
        find_trainable(params, AdapterConfig(**fields))


def test_what_starts_as_tokens_needs_the_model():
    model = random_model("llama", **FAMILIES["llama"].fields)
    with pytest.raises(UserError, match="prompt_init=vocab runs the model: give calibrate="):
        adapters.init(jax.random.key(0), model.params, AdapterConfig(method="prefix"))


@EACH_KIND
def test_a_model_without_the_parts_is_refused(method):
    params = {"dense": {"kernel": jnp.zeros((3, 4))}}
    if method == "prefix":
        params |= {"embed_tokens": {"embedding": jnp.zeros((9, 3))}}
    with pytest.raises(UserError, match=f"method={method}: the model has no"):
        find_trainable(params, AdapterConfig(method=method))


@EACH_KIND
def test_binding_leaves_the_parameters_alone(method):
    model, config = random_model("llama", **FAMILIES["llama"].fields), settings(method)
    small = random_adapters(model, config)
    bound = lora.bind(model.params, small, config)
    for path, leaf in tree.flatten(bound).items():
        assert leaf is tree.flatten(model.params)[path]
    with pytest.raises(UserError, match="these adapters do not fit the model and config"):
        lora.bind(model.params, {}, config)
