"""Text towers of models that read images against transformers and PEFT, on rows of text."""

import copy
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from lora_jax import formats, lora, models, sharding, tree
from lora_jax.config import MeshConfig
from lora_jax.errors import UserError
from lora_jax.formats import peft_tensors
from lora_jax.targets import find_trainable

from ..engines import complete
from ..families import ATTENTION, adds_one, fill_scalars, spread
from ..methods import QUICK
from ..towers import TOWERS, config_of

TOLERANCE = 1e-5
EACH = pytest.mark.parametrize("name", TOWERS)
ROWS = [(name, variant) for name, row in TOWERS.items() for variant in row.text]


def make(name, variant=None, seed=0):
    """A model of transformers with every parameter random."""
    row = TOWERS[name]
    variant = variant or next(iter(row.text))
    config = getattr(transformers, row.config_class)(**copy.deepcopy(config_of(name, variant)))
    torch.set_num_threads(1)
    model = getattr(transformers, row.model_class)(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(spread(noise, key, adds_one(name, key)))
        fill_scalars(model, generator)
    return model


def random_tokens(shape, seed=0):
    return np.random.default_rng(seed).integers(1, 90, shape, dtype=np.int32)


def torch_logits(module, tokens):
    with torch.no_grad():
        return module(input_ids=torch.tensor(tokens).long(), use_cache=False).logits.numpy()


def with_old_names(directory, name):
    """Rename the tensors of a directory to those of files of earlier versions."""
    file = directory / "model.safetensors"
    tensors, renamed = load_file(file), {}
    for key, value in tensors.items():
        new = next((re.sub(*pair, key) for pair in TOWERS[name].old if re.match(pair[0], key)), key)
        renamed[new] = value
    assert renamed.keys() != tensors.keys()
    save_file(renamed, file, metadata={"format": "pt"})


def with_names_of_modules(directory, oracle):
    """Rename the tensors of a directory to the paths of the modules."""
    state = {key: value.numpy() for key, value in oracle.state_dict().items()}
    if oracle.config.tie_word_embeddings:
        state.pop("lm_head.weight")
    save_file(
        {key: np.ascontiguousarray(value) for key, value in state.items()},
        directory / "model.safetensors",
        metadata={"format": "pt"},
    )


def is_of_text(key):
    return any(f"{tower}." in key for tower in tree.TOWERS) or "lm_head" in key or (
        key.startswith(("model.layers.", "model.embed_tokens", "model.norm"))
    )  # fmt: skip


@pytest.mark.long_table(5)
@pytest.mark.parametrize(("name", "variant"), ROWS)
def test_logits(tmp_path, error, name, variant):
    oracle = make(name, variant)
    oracle.save_pretrained(tmp_path / "model")
    model = formats.load(tmp_path / "model")
    tokens = random_tokens((2, 40))
    logits = jax.jit(model.apply, compiler_options=QUICK)(model.params, tokens)
    assert error(logits, torch_logits(oracle, tokens)) < TOLERANCE


@pytest.mark.long_table(2)
@EACH
def test_greedy_tokens_equal_transformers(tmp_path, name):
    """Answers from a cache; with Qwen, positions in three dimensions."""
    oracle = make(name)
    oracle.save_pretrained(tmp_path)
    oracle.generation_config.eos_token_id = None
    prompts = [random_tokens(n, n).tolist() for n in (11, 4)]
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
    assert complete(formats.load(tmp_path), prompts, 12) == expected


@pytest.mark.parametrize("name", [name for name, row in TOWERS.items() if row.old])
def test_names_of_earlier_files_are_read_and_kept(tmp_path, error, name):
    oracle, layouts = make(name), {}
    tokens = random_tokens((1, 12))
    for layout in ("modules", "old"):
        directory = tmp_path / layout
        oracle.save_pretrained(directory)
        with_names_of_modules(directory, oracle)
        if layout == "old":
            with_old_names(directory, name)
        model = formats.load(directory)
        logits = jax.jit(model.apply, compiler_options=QUICK)(model.params, tokens)
        assert error(logits, torch_logits(oracle, tokens)) < TOLERANCE
        target = tmp_path / f"{layout} written"
        formats.write_model(target, model, model.params, directory)
        before, after = (load_file(d / "model.safetensors") for d in (directory, target))
        assert before.keys() == after.keys()
        assert all(np.array_equal(before[key], after[key]) for key in before)
        layouts[layout] = before.keys()
    assert layouts["modules"] != layouts["old"]


def test_a_head_that_config_json_does_not_name(tmp_path, error):
    """Published files of Mistral Small have no `tie_word_embeddings`, and a head of their own."""
    oracle, directory = make("mistral3"), tmp_path / "model"
    oracle.save_pretrained(directory)
    with_names_of_modules(directory, oracle)
    with_old_names(directory, "mistral3")
    content = json.loads((directory / "config.json").read_text())
    for fields in (content, content["text_config"]):
        fields.pop("tie_word_embeddings", None)
    (directory / "config.json").write_text(json.dumps(content))
    model = formats.load(directory)
    tokens = random_tokens((1, 12))
    logits = jax.jit(model.apply, compiler_options=QUICK)(model.params, tokens)
    assert error(logits, torch_logits(oracle, tokens)) < TOLERANCE
    formats.write_model(tmp_path / "written", model, model.params, directory)
    before, after = (load_file(d / "model.safetensors") for d in (directory, tmp_path / "written"))
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[key], after[key]) for key in before)
    written = json.loads((tmp_path / "written" / "config.json").read_text())
    assert written["tie_word_embeddings"] is False


def test_an_export_in_another_dtype_has_the_images_as_they_were(tmp_path):
    """The dtype of config.json is that of the text, and files of processors are copied."""
    directory, target = tmp_path / "model", tmp_path / "written"
    make("qwen2_5_vl").save_pretrained(directory)
    for file in ("preprocessor_config.json", "video_preprocessor_config.json"):
        (directory / file).write_text("{}")
    model = formats.load(directory)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model.params)
    formats.write_model(target, model, params, directory)
    for key, value in load_file(target / "model.safetensors").items():
        assert value.dtype == (jnp.bfloat16 if is_of_text(key) else np.float32), key
    assert json.loads((target / "config.json").read_text())["dtype"] == "bfloat16"
    assert all((target / file.name).is_file() for file in directory.glob("*preprocessor*"))


def test_an_adapter_of_the_images_is_refused(tmp_path):
    oracle = make("gemma3")
    oracle.save_pretrained(tmp_path / "model")
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(oracle, settings).save_pretrained(tmp_path / "adapter")
    params = formats.describe(tmp_path / "model").params
    with pytest.raises(UserError, match="unexpected .*vision_tower.*q_proj.lora_A"):
        formats.read_adapter(tmp_path / "adapter", params)


@EACH
def test_the_images_are_named_in_a_note(name):
    content = config_of(name, next(iter(TOWERS[name].text))) | {"model_type": name}
    (note,) = [text for text in models.describe(content).notes if "images" in text]
    assert all(module in note for module in models.FAMILIES[name].NAMES.carried)


@EACH
def test_adapters_of_peft_and_the_merged_wrapper(tmp_path, error, name):
    """Losses, gradients, files both ways, and an export in which the images are unchanged."""
    oracle = make(name)
    directory = tmp_path / "model"
    oracle.save_pretrained(directory)
    tower = "text_model" if name == "smolvlm" else "language_model"
    linears = [*ATTENTION, "up_proj", "down_proj", r"in_proj_\w+"]
    settings = peft.LoraConfig(
        r=3,
        lora_alpha=7,
        lora_dropout=0.0,
        target_modules=rf".*\.{tower}\..*\.({'|'.join(linears)})",
        task_type="CAUSAL_LM",
    )
    module = peft.get_peft_model(copy.deepcopy(oracle), settings)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in module.named_parameters():
            if "lora_" in key:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    module.save_pretrained(tmp_path / "theirs")
    model = formats.load(directory)
    adapters, config = formats.read_adapter(tmp_path / "theirs", model.params)
    found = find_trainable(model.params, config)
    theirs = {
        key.replace(".default.", "."): parameter
        for key, parameter in module.named_parameters()
        if parameter.requires_grad
    }
    assert {*peft_tensors.pack(tree.flatten(adapters), found)} == {*theirs}

    tokens = random_tokens((2, 15))

    def mean_loss(adapters, params):
        logits = model.apply(lora.bind(params, adapters, config), tokens)
        nll = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])
        return nll.mean(), logits

    evaluate = jax.jit(jax.value_and_grad(mean_loss, has_aux=True), compiler_options=QUICK)
    (loss, logits), gradients = evaluate(adapters, model.params)
    labels = torch.tensor(tokens).long()
    output = module(input_ids=labels, labels=labels, use_cache=False)
    output.loss.backward()
    assert error(logits, output.logits.detach().numpy()) < TOLERANCE
    assert error(logits, torch_logits(oracle, tokens)) > 1e-2
    assert error(loss, output.loss.item()) < TOLERANCE
    for key, gradient in peft_tensors.pack(tree.flatten(gradients), found).items():
        assert error(gradient, theirs[key].grad.numpy()) < TOLERANCE, key

    formats.write_adapter(
        tmp_path / "ours", adapters, model.params, config, base_model="base", source=directory
    )
    again = peft.PeftModel.from_pretrained(copy.deepcopy(oracle), tmp_path / "ours")
    assert error(torch_logits(again, tokens), logits) < TOLERANCE

    merged = lora.merge(lora.bind(model.params, adapters, config))
    formats.write_model(tmp_path / "merged", model, merged, directory)
    before, after = (
        load_file(path / "model.safetensors") for path in (directory, tmp_path / "merged")
    )
    assert before.keys() == after.keys()
    images = [key for key in before if not is_of_text(key)]
    assert images and all(before[key].tobytes() == after[key].tobytes() for key in images)
    loaded, info = type(oracle).from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info.values()), info
    assert error(torch_logits(loaded, tokens), logits) < TOLERANCE


@EACH
def test_rules_say_where_every_parameter_lies(name):
    content = config_of(name, next(iter(TOWERS[name].text))) | {"model_type": name}
    shapes = models.describe(content)
    mesh = sharding.abstract_mesh(MeshConfig(1, 1, 1))
    specs = tree.flatten(sharding.param_specs(shapes.params, shapes.rules, mesh))
    assert all(any(spec) for path, spec in specs.items() if path[-1] in ("kernel", "embedding"))


def test_fields_of_a_flat_file():
    """Those of the text are outside of `text_config` in files of Qwen 2.5 VL."""
    fields = config_of("qwen2_5_vl", "window")
    flat = {key: value for key, value in fields.items() if key != "text_config"}
    flat |= fields["text_config"] | {"model_type": "qwen2_5_vl"}
    nested = models.describe(fields | {"model_type": "qwen2_5_vl"})
    assert models.describe(flat).config == nested.config
    flat["rope_scaling"] = {"type": "mrope", "mrope_section": [1, 1, 1]}
    flat["rope_theta"] = flat.pop("rope_parameters")["rope_theta"]
    assert models.describe(flat).config == nested.config


def test_copies_of_fields_outside_of_the_text():
    """transformers 4 wrote those of Qwen 2.5 VL twice, and reads the inner ones."""
    content = config_of("qwen2_5_vl", "plain") | {"model_type": "qwen2_5_vl"}
    expected, text = models.describe(content), content["text_config"]
    copied = models.describe(text | content)
    assert copied.config == expected.config and copied.notes == expected.notes
    apart = models.describe(text | content | {"sliding_window": 7, "hidden_size": 5})
    assert apart.config == expected.config
    (note,) = {*apart.notes} - {*expected.notes}
    assert note.endswith("with other values: hidden_size, sliding_window")


REFUSED = [
    ("mistral3", {"model_type": "qwen2"}, "text_config: model_type='qwen2' is not supported, only"),
    ("gemma3", {"final_logit_softcapping": 3.0}, "text_config: final_logit_softcapping=3.0 is not"),
    ("smolvlm", {"qk_layer_norms": True}, "text_config: qk_layer_norms=True is not supported"),
    ("qwen3_5", {"attn_output_gate": False}, "text_config: attn_output_gate=False is not support"),
    ("qwen3_vl", {"unheard_of": 2}, "text_config: unheard_of=2 is not understood"),
]


@pytest.mark.parametrize(("name", "fields", "text"), REFUSED)
def test_what_is_not_supported_is_named(name, fields, text):
    content = config_of(name, next(iter(TOWERS[name].text))) | {"model_type": name}
    models.describe(content)
    content["text_config"] = content["text_config"] | fields
    with pytest.raises(UserError) as caught:
        models.describe(content)
    assert text in str(caught.value)


def test_a_config_that_is_saved_is_read_alike(tmp_path):
    """config.json of transformers has every field of the text, and fields of the images."""
    for name, variant in ROWS:
        oracle = make(name, variant)
        oracle.config.save_pretrained(tmp_path)
        content = json.loads((tmp_path / "config.json").read_text())
        given = config_of(name, variant) | {"model_type": name}
        assert models.describe(content).config == models.describe(given).config
