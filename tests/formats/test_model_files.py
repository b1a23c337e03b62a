"""Contents of a model directory: the files that are read, heads that a config ties, prefixes, and
names that do not fit. transformers, loading the same directory, is the oracle.
"""

import json
import shutil

import jax
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from lora_jax import adapters as methods
from lora_jax import formats
from lora_jax.config import AdapterConfig, MeshConfig
from lora_jax.errors import UserError
from lora_jax.formats import fingerprint
from lora_jax.formats.names import unwrap
from lora_jax.sharding import make_mesh
from lora_jax.targets import find_trainable

from ..families import FAMILIES

TOKENS = np.random.default_rng(5).integers(0, 97, (2, 9))
TOLERANCE = 1e-5
EMBEDDINGS = {"llama": "model.embed_tokens.weight", "gpt2": "transformer.wte.weight"}
HEAD = "lm_head.weight"


def torch_logits(module) -> np.ndarray:
    with torch.no_grad():
        return module(torch.tensor(TOKENS)).logits.numpy()


def expected_logits(directory) -> np.ndarray:
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return torch_logits(model.eval())


def logits(directory) -> np.ndarray:
    model = formats.load(directory)
    return np.asarray(model.apply(model.params, TOKENS))


def edit(file, change) -> None:
    """Rewrite a file of tensors by a function from mapping to mapping."""
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def noise(shape, seed=0) -> np.ndarray:
    return 0.2 * np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def other_head(embedding, seed=0):
    return lambda tensors: tensors | {HEAD: noise(tensors[embedding].shape, seed)}


@pytest.fixture
def tied(tiny_model):
    """`tied(family, seed=0)`: a directory whose config ties the head to the embedding."""

    def make(family="llama", seed=0, **fields):
        return tiny_model(family, seed, **FAMILIES[family].size, tie_word_embeddings=True, **fields)

    return make


@pytest.mark.parametrize("family", EMBEDDINGS)
def test_another_head_unties(tied, tmp_path, error, caplog, family):
    for seed in (0, 1):
        directory, oracle = tied(family, seed)
        edit(directory / "model.safetensors", other_head(EMBEDDINGS[family], seed))
        expected = expected_logits(directory)
        assert error(logits(directory), expected) < TOLERANCE
        assert error(torch_logits(oracle), expected) > 0.1
        assert not formats.describe(directory).config.tie_word_embeddings
    assert caplog.text.count(f"{directory / 'config.json'} ties the output head") == 1
    assert "PEFT's trainable_token_indices would still tie them" in caplog.text

    model = formats.load(directory)
    formats.write_model(tmp_path / "merged", model, model.params, directory)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert error(expected_logits(tmp_path / "merged"), expected) < TOLERANCE
    quantized = formats.load(directory, dtype="int8")
    np.testing.assert_array_equal(
        quantized.params["lm_head"]["kernel"], model.params["lm_head"]["kernel"]
    )


def test_an_adapter_of_the_head_is_one_of_the_head_alone(tied, tmp_path, error):
    directory, _ = tied()
    edit(directory / "model.safetensors", other_head(EMBEDDINGS["llama"]))
    model = formats.load(directory)
    config = AdapterConfig(rank=3, target_modules=["q_proj", "lm_head"])
    adapters = methods.shapes(model.params, config)
    adapters = {
        **{"lm_head": {name: noise(leaf.shape, 1) for name, leaf in adapters["lm_head"].items()}},
        "model": _noisy(adapters["model"]),
    }
    formats.write_adapter(tmp_path / "adapter", adapters, model.params, config, base_model="base")
    base = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with pytest.warns(UserWarning, match="ensure_weight_tying"):  # peft looks at config.json
        theirs = torch_logits(peft.PeftModel.from_pretrained(base, tmp_path / "adapter"))
    ours = model.apply(methods.bind(model.params, adapters, config), TOKENS)
    assert error(ours, theirs) < TOLERANCE
    assert error(logits(directory), theirs) > 0.1


def _noisy(shapes):
    if isinstance(shapes, dict):
        return {name: _noisy(value) for name, value in shapes.items()}
    return noise(shapes.shape, 2)


@pytest.mark.parametrize("family", EMBEDDINGS)
def test_a_copy_is_tied_and_a_head_alone_is_both(tied, error, caplog, family):
    directory, name = tied(family)[0], EMBEDDINGS[family]
    file, before = directory / "model.safetensors", logits(directory)
    original = load_file(file)
    rounded = {**original, name: original[name].astype(np.float16)}
    for tensors in (original, rounded):
        copy = {**tensors, HEAD: tensors[name].astype(np.float32)}
        save_file(copy, file, metadata={"format": "pt"})
        assert formats.describe(directory).config.tie_word_embeddings
        found = logits(directory)
        assert error(found, expected_logits(directory)) < TOLERANCE
        assert error(found, before) < (TOLERANCE if tensors is original else 1e-2)
    alone = {HEAD: original[name], **{k: v for k, v in original.items() if k != name}}
    save_file(alone, file, metadata={"format": "pt"})
    np.testing.assert_array_equal(logits(directory), before)
    assert error(before, expected_logits(directory)) < TOLERANCE
    assert "ties the output head" not in caplog.text


def test_fingerprints_see_a_head_that_differs(tied):
    directory, _ = tied()
    file, digests = directory / "model.safetensors", [fingerprint.base_digest(directory)]
    original = load_file(file)
    edit(file, lambda t: t | {HEAD: t[EMBEDDINGS["llama"]].copy()})
    assert fingerprint.base_digest(directory) == digests[0]
    for seed in (1, 2):
        save_file(other_head(EMBEDDINGS["llama"], seed)(original), file, metadata={"format": "pt"})
        digests.append(fingerprint.base_digest(directory))
    save_file({HEAD: original.pop(EMBEDDINGS["llama"]), **original}, file)
    digests.append(fingerprint.base_digest(directory))
    assert len({*digests}) == 4


def test_trained_tokens_of_a_head_that_unties_have_no_form_in_peft(tied, edit_json):
    directory, _ = tied()
    config = AdapterConfig(trainable_token_indices=[3])

    def problems(config=config):
        model = formats.describe(directory)
        return formats.peft_problems(find_trainable(model.params, config), model)

    assert not problems()
    edit(directory / "model.safetensors", other_head(EMBEDDINGS["llama"]))
    (problem,) = problems()
    assert problem.startswith(f"trainable_token_indices=[3]: {directory / 'config.json'} ties the")
    assert "set tie_word_embeddings to false in that file, or export with --format hf" in problem
    assert not problems(AdapterConfig())
    edit_json(directory / "config.json", tie_word_embeddings=False)
    assert not problems()


def test_trained_tokens_of_a_tied_head_are_others_in_peft(tied, tmp_path, error):
    """The reason for the refusal: PEFT computes another model from such files."""
    directory, _ = tied()
    edit(directory / "model.safetensors", other_head(EMBEDDINGS["llama"]))
    model = formats.load(directory)
    config = AdapterConfig(rank=2, target_modules=["q_proj"], trainable_token_indices=[3])
    adapters = _noisy(methods.shapes(model.params, config))
    formats.write_adapter(tmp_path / "adapter", adapters, model.params, config, base_model="base")
    ours = model.apply(methods.bind(model.params, adapters, config), TOKENS)
    for ties in (True, False):
        content = json.loads((directory / "config.json").read_text())
        content["tie_word_embeddings"] = ties
        (directory / "config.json").write_text(json.dumps(content))
        base = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        theirs = torch_logits(peft.PeftModel.from_pretrained(base, tmp_path / "adapter"))
        assert (error(ours, theirs) > 0.1) == ties


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_fingerprints_of_families_that_tie_unless_told_otherwise(tied, edit_json, family):
    directory, _ = tied(family)
    edit_json(directory / "config.json", drop=["tie_word_embeddings"])
    file, before = directory / "model.safetensors", fingerprint.base_digest(directory)
    embedding = next(
        name for name in load_file(file) if name.endswith(("wte.weight", "tokens.weight"))
    )
    edit(file, lambda tensors: tensors | {HEAD: tensors[embedding].copy()})
    assert fingerprint.base_digest(directory) == before
    edit(file, other_head(embedding))
    assert fingerprint.base_digest(directory) != before


def test_a_model_that_ties_is_refused_over_files_that_do_not(tied):
    directory, _ = tied()
    model = formats.describe(directory)
    edit(directory / "model.safetensors", other_head(EMBEDDINGS["llama"]))
    with pytest.raises(UserError, match="differs from the embedding, which the model ties to it"):
        formats.read_params(directory, model, make_mesh(MeshConfig()))


# Which files


@pytest.fixture
def two(tiny_llama):
    """Two models of one shape: a directory with a single file, and one with shards."""
    return tiny_llama(0)[0], tiny_llama(1, max_shard_size="20KB")[0]


def copy_into(source, target, pattern):
    for file in source.glob(pattern):
        shutil.copy(file, target / file.name)


def test_a_single_file_comes_before_an_index(two, error, caplog):
    single, shards = two
    alone = logits(single)
    copy_into(shards, single, "*.safetensors*")
    assert error(logits(single), expected_logits(single)) < TOLERANCE
    np.testing.assert_array_equal(logits(single), alone)
    assert error(logits(shards), alone) > 0.1
    assert caplog.text.count("model.safetensors is read, as transformers does") == 1
    for file in single.glob("model-*.safetensors"):
        file.unlink()
    np.testing.assert_array_equal(logits(single), alone)  # the index is stale


def test_files_that_transformers_does_not_read_change_nothing(two, error):
    single, shards = two
    alone, digest = logits(single), fingerprint.base_digest(single)
    first = sorted(shards.glob("model-*.safetensors"))[0]
    for name in ("consolidated", "model.fp16", "adapter_model", "model-00001-of-00002", "extra"):
        shutil.copy(first, single / f"{name}.safetensors")
    (single / "pytorch_model.bin").write_bytes(b"x")
    (single / "original").mkdir()
    shutil.copy(first, single / "original" / "model.safetensors")
    assert error(expected_logits(single), alone) < TOLERANCE
    np.testing.assert_array_equal(logits(single), alone)
    assert fingerprint.base_digest(single) == digest
    shutil.copy(first, shards / "model-00010-of-00010.safetensors")
    assert error(logits(shards), expected_logits(shards)) < TOLERANCE


@pytest.mark.parametrize("name", ["consolidated", "model.fp16", "weights"])
def test_no_file_of_the_usual_name_is_refused(two, name):
    file = two[0] / "model.safetensors"
    file.rename(two[0] / f"{name}.safetensors")
    with pytest.raises(UserError, match=f"no model.safetensors and no index .*{name}.safetensors"):
        formats.load(two[0])


def test_the_file_that_the_config_names_is_read(two, edit_json, error):
    single, shards = two
    copy_into(shards, single, "*.safetensors*")
    index = "model.safetensors.index.json"
    edit_json(single / "config.json", transformers_weights=index)
    assert error(logits(single), expected_logits(single)) < TOLERANCE
    assert error(logits(single), logits(shards)) == 0
    for named, text in (
        ("../model.safetensors", "which is outside of the directory"),
        ("model.bin", "is neither a .safetensors file"),
        ("other.safetensors", "other.safetensors is missing"),
    ):
        edit_json(single / "config.json", transformers_weights=named)
        with pytest.raises(UserError, match=text):
            formats.load(single)


def rename_shard(content, name):
    content["weight_map"] = dict.fromkeys(content["weight_map"], name)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda c: rename_shard(c, "../other.safetensors"), "which is outside of the directory"),
        (lambda c: rename_shard(c, "/other.safetensors"), "which is outside of the directory"),
        (lambda c: rename_shard(c, "a/../../b.safetensors"), "which is outside of the directory"),
        (lambda c: rename_shard(c, "gone.safetensors"), "gone.safetensors is missing"),
        (lambda c: rename_shard(c, 3), "its weight_map names no files"),
        (lambda c: c.update(weight_map={}), "its weight_map names no files"),
        (lambda c: c.update(weight_map=[]), "index.json is damaged"),
        (lambda c: c.clear(), "index.json is damaged"),
    ],
)
def test_an_index_that_names_no_files_of_the_directory(two, change, text):
    index = two[1] / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    change(content)
    index.write_text(json.dumps(content))
    with pytest.raises(UserError, match=text):
        formats.load(two[1])


def test_a_tensor_in_two_shards_is_refused(two):
    first, second = sorted(two[1].glob("model-*.safetensors"))[:2]
    name = sorted(load_file(first))[0]
    edit(second, lambda t: t | {name: noise(load_file(first)[name].shape)})
    with pytest.raises(UserError, match=f"{first} and {second} both have a tensor {name}"):
        formats.load(two[1])


def test_an_adapter_in_a_model_directory_is_refused(two):
    (two[0] / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    for call in (formats.load, formats.describe, fingerprint.base_digest):
        with pytest.raises(
            UserError, match=r"\(config.json\) and an adapter \(adapter_config.json"
        ):
            call(two[0])
    (two[0] / "config.json").unlink()
    with pytest.raises(
        UserError, match="is the directory of an adapter; give its base as the model"
    ):
        formats.load(two[0])


# Prefixes


def put(prefix):
    return lambda name: prefix + name


def bare(name):
    return name.removeprefix("model.").removeprefix("transformer.").removeprefix("bert.")


PREFIXES = {
    "compiled": put("_orig_mod."),
    "parallel": put("module."),
    "peft": put("base_model.model."),
    "parallel, compiled": put("module._orig_mod."),
    "bare": bare,
    "bare, parallel": lambda name: "module." + bare(name),
    "compiled inside": lambda name: name.replace("model.", "model._orig_mod.", 1),
    "of a larger model": lambda name: name.replace("model.", "model.language_model.", 1),
}


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("family", ["qwen3", "gpt2", "mixtral"])
def test_one_prefix_that_explains_all_names_is_read(tiny_model, tmp_path, error, family, is_tied):
    fields = FAMILIES[family].size | dict(tie_word_embeddings=is_tied)
    directory, oracle = tiny_model(family, **fields)
    expected = torch_logits(oracle)
    original = load_file(directory / "model.safetensors")
    model = formats.describe(directory)
    plain = formats.load(directory).params
    for name, change in PREFIXES.items():
        tensors = {change(key): value for key, value in original.items()}
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        params = formats.load(directory).params
        for found, wanted in zip(jax.tree.leaves(params), jax.tree.leaves(plain), strict=True):
            np.testing.assert_array_equal(found, wanted, err_msg=name)
    assert error(model.apply(params, TOKENS), expected) < TOLERANCE
    formats.write_model(tmp_path / "merged", model, params, directory)
    assert {*load_file(tmp_path / "merged" / "model.safetensors")} == {*original}


def test_the_bare_decoder_of_transformers(tiny_llama, error):
    """The form in which Qwen3-Embedding is saved."""
    directory, oracle = tiny_llama(family="qwen3", tie_word_embeddings=True)
    oracle.model.save_pretrained(directory)
    assert "embed_tokens.weight" in load_file(directory / "model.safetensors")
    assert error(logits(directory), expected_logits(directory)) < TOLERANCE
    directory, oracle = tiny_llama(family="qwen3", tie_word_embeddings=False)
    oracle.model.save_pretrained(directory)
    with pytest.raises(UserError, match="missing lm_head.weight .*\n.*without its output head"):
        formats.load(directory)


@pytest.mark.parametrize("where", ["every layer", "one layer", "modules in layers in a model"])
def test_wrappers_of_torch_around_layers_are_left_out(tiny_llama, where):
    directory, _ = tiny_llama()
    before = logits(directory)

    def wrapped(name):
        _, layers, rest = name.partition("model.layers.")
        number, _, inner = rest.partition(".")
        outer = ""
        match where:
            case "one layer":
                inner = "_orig_mod." * (number == "0") + inner
            case "every layer":
                inner = f"_orig_mod.{inner}"
            case _:
                inner = f"_checkpoint_wrapped_module.{inner.replace('mlp.', 'mlp._orig_mod.')}"
                outer = "module._fsdp_wrapped_module."
        return outer + (f"{layers}{number}.{inner}" if layers else name)

    edit(directory / "model.safetensors", lambda t: {wrapped(name): t[name] for name in t})
    assert any("_orig_mod" in name for name in load_file(directory / "model.safetensors"))
    np.testing.assert_array_equal(logits(directory), before)


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "module.", "module._orig_mod."])
def test_a_module_that_the_model_lacks_loses_the_wrapper_too(wrapper):
    names = ["model.layers.0.norm.weight", "model.pooler.weight"]
    params = {"model": {"layers": {"norm": {"scale": 0}}}}
    assert list(unwrap([wrapper + name for name in names], params).values()) == names


def test_several_prefixes_are_refused_the_unexpected_names_first(tiny_llama):
    directory, _ = tiny_llama()
    file = directory / "model.safetensors"
    odd = lambda tensors: {  # noqa: E731
        ("module." if i % 2 else "") + name: tensors[name] for i, name in enumerate(sorted(tensors))
    }
    edit(file, odd)
    with pytest.raises(UserError) as raised:
        formats.load(directory)
    lines = [line.split()[:2] for line in str(raised.value).splitlines()[1:]]
    kinds = [kind for kind, _ in lines if kind != "..."]
    assert kinds == sorted(kinds, reverse=True) and {*kinds} == {"unexpected", "missing"}
    assert all(
        name.startswith("module.") == (kind == "unexpected")
        for kind, name in lines
        if kind != "..."
    )


def test_one_weight_under_two_names_is_refused(tiny_llama):
    directory, _ = tiny_llama()
    name = "model.norm.weight"
    edit(directory / "model.safetensors", lambda t: t | {"norm.weight": t[name] + 1})
    with pytest.raises(UserError, match="norm.weight and .*norm.weight are the same weight"):
        formats.load(directory)


def test_matrices_that_are_not_finite_are_named(tiny_llama):
    directory, _ = tiny_llama()
    name = "model.layers.1.self_attn.q_proj.weight"
    edit(directory / "model.safetensors", lambda t: t | {name: t[name] * np.inf})
    model = formats.describe(directory)
    path = ("model", "layers", "self_attn", "q_proj", "kernel")
    with formats.open_matrices(directory, model) as read:
        read(path, (0,))
        with pytest.raises(UserError, match=f"infinite or not a number in {name}"):
            read(path, (1,))
