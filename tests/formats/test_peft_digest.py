"""The digest of an adapter's tensors: whatever changed them is found when they are read."""

import json
import shutil

import jax
import numpy as np
import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from lora_jax import AdapterConfig, UserError, formats, hosts
from lora_jax import adapters as methods
from lora_jax.formats import digests

from .test_peft import QV, UNTIED, random_adapters, torch_logits

WEIGHTS, JSON = "adapter_model.safetensors", "lora_jax.json"
SOFT = dict(num_virtual_tokens=3, prompt_init="random", target_modules="all-linear")
TOKENS = np.random.default_rng(0).integers(0, 97, (2, 9))


@pytest.fixture(autouse=True)
def notes():
    """Notes are logged once in a process; here, once in a test."""
    hosts.note.cache_clear()


@pytest.fixture
def made(tiny_llama, tmp_path):
    """`made(seed=0, **fields)`: the directory of an adapter, its model, and the torch model."""
    directory, oracle = tiny_llama(**UNTIED)
    model = formats.load(directory)

    def make(seed=0, profile=None, **fields):
        config = AdapterConfig(**dict(rank=4, target_modules=QV) | fields)
        target = tmp_path / f"adapter{len([*tmp_path.glob('adapter*')])}"
        adapters = random_adapters(model.params, config, seed)
        base, extra = (
            str(directory),
            {"fingerprint": {"base": "b", "tokenizer": "t", "template": "c"}},
        )
        formats.write_adapter(
            target, adapters, model.params, config, base_model=base, extra=extra, profile=profile
        )
        return target, model, oracle

    return make


def metadata(directory):
    with safe_open(directory / WEIGHTS, framework="numpy") as handle:
        return handle.metadata()


def resave(directory, change, **more):
    """Change the tensors and keep the metadata, as nothing but damage does."""
    tensors = change(load_file(directory / WEIGHTS))
    save_file(tensors, directory / WEIGHTS, metadata=metadata(directory) | more)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        dict(use_dora=True, bias="none", init="pissa"),
        dict(rank_pattern={"q_proj": 2}, profile="vllm"),
        dict(modules_to_save=["lm_head"], trainable_token_indices=[3]),
        SOFT | dict(method="prompt"),
        SOFT | dict(method="prefix"),
    ],
)
def test_what_is_written_is_read_and_carries_its_digest(made, caplog, fields):
    directory, model, _ = made(**fields)
    formats.read_adapter(directory, model.params)
    digest = digests.of_arrays(load_file(directory / WEIGHTS))
    assert metadata(directory) == {"format": "pt", "lora_jax.digest": digest}
    assert json.loads((directory / JSON).read_text())["digest"] == digest
    assert not caplog.text


def test_peft_gives_the_same_logits(made, error):
    directory, model, oracle = made()
    loaded = peft.PeftModel.from_pretrained(oracle, directory)
    adapters, config = formats.read_adapter(directory, model.params)
    ours = model.apply(methods.bind(model.params, adapters, config), TOKENS)
    assert error(ours, torch_logits(loaded, TOKENS)) < 1e-5


def test_equal_adapters_give_equal_bytes(made):
    """The library orders the metadata anew for every file."""
    files = [(made()[0] / WEIGHTS).read_bytes() for _ in range(8)]
    assert len({*files}) == 1
    header = json.loads(files[0][8 : 8 + int.from_bytes(files[0][:8], "little")])
    assert [*header["__metadata__"]] == ["format", "lora_jax.digest"]


def exchange(tensors):
    first, second = (f"base_model.model.model.layers.{i}.self_attn.q_proj" for i in (0, 1))
    pairs = [(f"{first}.lora_{x}.weight", f"{second}.lora_{x}.weight") for x in "AB"]
    return tensors | {a: tensors[b] for a, b in pairs} | {b: tensors[a] for a, b in pairs}


def flip(tensors):
    name = sorted(tensors)[-1]
    tensors[name].view(np.uint32).flat[3] ^= 1
    return tensors


def negative(tensors):
    name = sorted(tensors)[0]
    return tensors | {name: -tensors[name]}


DAMAGE = {
    "a flipped bit": flip,
    "two layers exchanged": exchange,
    "one sign": negative,
    "another dtype": lambda tensors: {n: t.astype(np.float64) for n, t in tensors.items()},
}


@pytest.mark.parametrize("with_json", [True, False])
@pytest.mark.parametrize("change", DAMAGE)
def test_tensors_that_are_not_those_of_the_export(made, change, with_json):
    directory, model, _ = made()
    if not with_json:
        (directory / JSON).unlink()
    resave(directory, DAMAGE[change])
    with pytest.raises(UserError, match=WEIGHTS) as raised:
        formats.read_adapter(directory, model.params)
    assert "is damaged, or was changed after it was exported" in str(raised.value)
    assert "copy the directory again, or export the adapter again" in str(raised.value)


def test_every_byte_of_the_tensors_counts(made):
    directory, model, _ = made()
    file = directory / WEIGHTS
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    rng = np.random.default_rng(1)
    for place in (start, len(content) - 1, *rng.integers(start, len(content), 20)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << int(rng.integers(8))
        file.write_bytes(damaged)
        with pytest.raises(UserError, match="is damaged, or was changed"):
            formats.read_adapter(directory, model.params)


def test_the_file_of_another_adapter(made):
    (directory, model, _), (other, _, _) = made(0), made(1)
    shutil.copy(other / WEIGHTS, directory / WEIGHTS)
    with pytest.raises(UserError, match="are of two exports: the tensors have the digest"):
        formats.read_adapter(directory, model.params)
    shutil.copy(other / JSON, directory / JSON)
    formats.read_adapter(directory, model.params)
    tensors = load_file(made(2)[0] / WEIGHTS)  # of the same shapes, under this file's metadata
    resave(directory, lambda _: tensors)
    with pytest.raises(UserError, match="is damaged, or was changed after it was exported"):
        formats.read_adapter(directory, model.params)


def test_without_lora_jax_json_a_note_says_what_cannot_be_compared(made, caplog):
    directory, model, _ = made()
    (directory / JSON).unlink()
    for _ in range(2):
        formats.read_adapter(directory, model.params)
    assert caplog.text.count(f"{directory} has no lora_jax.json: base, tokenizer and chat") == 1


def test_an_adapter_of_peft_is_said_to_be_unchecked_once(made, tmp_path, caplog):
    _, model, oracle = made()
    config = peft.LoraConfig(r=2, target_modules=QV, task_type="CAUSAL_LM")
    peft.get_peft_model(oracle, config).save_pretrained(tmp_path / "theirs")
    for _ in range(2):
        formats.read_adapter(tmp_path / "theirs", model.params)
    assert caplog.text.count("has no digest, as from another program: its weights are") == 1
    assert "there is no lora_jax.json to compare base, tokenizer and chat template" in caplog.text


def test_an_adapter_that_peft_trained_on_and_saved_in_its_place(made, tmp_path, caplog):
    directory, model, oracle = made()
    loaded = peft.PeftModel.from_pretrained(oracle, directory, is_trainable=True)
    loaded.save_pretrained(directory)  # as it was: the digest in lora_jax.json still fits
    assert metadata(directory) == {"format": "pt"}
    formats.read_adapter(directory, model.params)
    assert not caplog.text
    with torch.no_grad():
        for name, parameter in loaded.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1)
    expected = torch_logits(loaded, TOKENS)
    loaded.save_pretrained(directory)
    with pytest.raises(UserError, match="another program saved it later .PEFT does") as raised:
        formats.read_adapter(directory, model.params)
    assert 'If you trained it further, remove "digest" from lora_jax.json' in str(raised.value)
    content = json.loads((directory / JSON).read_text())
    del content["digest"]
    (directory / JSON).write_text(json.dumps(content))
    adapters, config = formats.read_adapter(directory, model.params)
    ours = model.apply(methods.bind(model.params, adapters, config), TOKENS)
    assert np.abs(np.asarray(ours) - expected).max() < 1e-5
    assert caplog.text.count("has no digest") == 1 and "there is no" not in caplog.text
    assert formats.read_fingerprint(directory)["base"] == "b"


@pytest.mark.parametrize("value", [5, ["a"], True])
def test_a_digest_that_is_no_text(made, edit_json, value):
    directory, model, _ = made()
    edit_json(directory / JSON, digest=value)
    with pytest.raises(UserError, match=r"lora_jax\.json is damaged: digest=.* must be a string"):
        formats.read_adapter(directory, model.params)


@pytest.mark.parametrize("dtype", [np.int64, np.int8, np.uint8, bool])
def test_tensors_of_integers_are_refused_in_every_file(made, dtype):
    directory, model, _ = made()
    tensors = {n: t.astype(dtype) for n, t in load_file(directory / WEIGHTS).items()}
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    (directory / JSON).unlink()
    with pytest.raises(UserError, match=r"does not hold an adapter's weights.*F32, F16") as raised:
        formats.read_adapter(directory, model.params)
    assert "lora_A.weight has dtype " in str(raised.value)
    with pytest.raises(UserError, match="does not hold an adapter's weights"):
        formats.read_loralib(directory / WEIGHTS, model.params, AdapterConfig())


def test_loralib_files_are_said_to_be_unchecked(made, tmp_path, caplog):
    _, model, _ = made()
    q = model.params["model"]["layers"]["self_attn"]["q_proj"]["kernel"]
    name = "model.layers.0.self_attn.q_proj"
    tensors = {f"{name}.lora_A": np.ones((2, q.shape[1])), f"{name}.lora_B": np.ones((48, 2))}
    tensors = jax.tree.map(lambda x: x.astype(np.float32), tensors)
    save_file(tensors, tmp_path / "lora.safetensors")
    (tmp_path / JSON).write_text('{"digest": "of something else"}')
    formats.read_loralib(tmp_path / "lora.safetensors", model.params, AdapterConfig())
    assert caplog.text.count("has no digest") == 1
