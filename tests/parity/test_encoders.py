"""Encoders with their classification heads against transformers and PEFT."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers

from lora_jax import adapters as methods
from lora_jax import data, formats, models, targets, tree
from lora_jax.config import AdapterConfig, Config
from lora_jax.errors import UserError
from lora_jax.formats import peft_tensors
from lora_jax.train.step import batch_sums

from ..encoders import ENCODERS

pytestmark = pytest.mark.usefixtures("optimised")  # rounding of the other code is 1.2e-5
TOLERANCE = 1e-5
EMBEDDINGS = ("word_embeddings", "tok_embeddings")
LABELS = dict(id2label={0: "a", 1: "b", 2: "c"}, label2id={"a": 0, "b": 1, "c": 2})
ROWS = {
    f"{family}, {name}": (family, fields)
    for family, row in ENCODERS.items()
    for name, fields in row.variants.items()
}
EACH = pytest.mark.parametrize("family", ENCODERS)
# Lengths of two texts in each of three rows, packed side by side below.
LENGTHS = ((7, 5), (11, 3), (6, 8))


def torch_model(family, fields):
    row = ENCODERS[family]
    config = getattr(transformers, f"{row.classes}Config")(**row.fields | LABELS | fields)
    return model_class(family)(config)


def model_class(family):
    return getattr(transformers, f"{ENCODERS[family].classes}ForSequenceClassification")


def is_norm(name):
    return "norm" in name.lower() and name.endswith("weight")


@pytest.fixture
def tiny(tmp_path):
    """`tiny(seed, family=..., **config)`: a directory, and the torch model with its weights."""

    def make(seed=0, family="bert", **config):
        model = torch_model(family, config).eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                matrix = parameter.ndim > 1
                scale = parameter.shape[-1] ** -0.5 if matrix and "embeddings." not in name else 0.5
                parameter.copy_(noise * scale + is_norm(name))
        directory = tmp_path / f"model{len(list(tmp_path.iterdir()))}"
        model.save_pretrained(directory)
        return directory, model

    return make


def examples(seed=0, types=2):
    """Labelled texts, every other one a pair."""
    rng = np.random.default_rng(seed)
    found = []
    for i, length in enumerate(n for row in LENGTHS for n in row):
        tokens = rng.integers(5, 97, length + 1, dtype=np.int32)
        tokens[-1] = i % 3
        weights = np.zeros(length + 1, np.float32)
        weights[-1] = 1
        start = length // 2 if i % 2 and types > 1 else length
        found.append(data.Example(tokens, weights, str(i), start))
    return found


def oracle_logits(model, example):
    """(labels,) of one text."""
    text = torch.tensor(example.tokens[None, :-1].astype(np.int64))
    if not ENCODERS[model.config.model_type].typed:
        return model(text).logits[0]
    types = torch.zeros_like(text)
    types[:, example.pair_start :] = 1
    return model(text, token_type_ids=types).logits[0]


def altered(family, fields, source):
    """A model of other fields with the weights of another one that have a place in it."""
    model = torch_model(family, fields).eval()
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in source.named_parameters():
            if name in own and own[name].shape == value.shape:
                own[name].copy_(value)
    return model


def test_every_classifier_has_a_row():
    assert {*ENCODERS} == {*models.CLASSIFIERS}


@pytest.mark.parametrize(("family", "fields"), ROWS.values(), ids=ROWS)
def test_packed_texts_equal_transformers(tiny, error, family, fields):
    for seed in (0, 1):
        directory, oracle = tiny(seed, family, **fields)
        model = formats.load(directory)
        assert model.labels == ("a", "b", "c")
        texts = examples(seed)
        rows = [texts[i : i + 2] for i in range(0, len(texts), 2)]
        batch = data.stack(rows, 20)
        logits = np.asarray(
            model.apply(
                model.params,
                batch["tokens"],
                positions=batch["positions"],
                segment_ids=batch["segment_ids"],
                token_types=batch["token_types"],
            )
        )
        with torch.no_grad():
            wanted = np.array([oracle_logits(oracle, text).numpy() for text in texts])
        found = [
            logits[r, (0, len(row[0].tokens))[i]] for r, row in enumerate(rows) for i in (0, 1)
        ]
        assert np.abs(wanted).max() > 0.5 and error(found, wanted) < TOLERANCE
        last = [logits[r, len(row[0].tokens) - 2] for r, row in enumerate(rows)]
        np.testing.assert_array_equal(last, found[::2])  # the same at all tokens of a text
    for name in fields:  # otherwise parity would say nothing about the field
        plain = {key: value for key, value in fields.items() if key != name}
        with torch.no_grad():
            own = altered(family, plain, oracle)
            without = np.array([oracle_logits(own, text).numpy() for text in texts])
        assert error(without, wanted) > 10 * TOLERANCE, name


def test_types_and_texts_side_by_side_matter(tiny):
    """Otherwise the test above would say nothing about them."""
    directory, _ = tiny()
    model = formats.load(directory)
    batch = data.stack([examples()[:2]], 20)
    inputs = {name: batch[name] for name in ("positions", "segment_ids")}
    types = batch["token_types"]
    typed = model.apply(model.params, batch["tokens"], token_types=types, **inputs)
    plain = model.apply(model.params, batch["tokens"], **inputs)
    assert np.abs(typed - plain)[0, 9].max() > 1e-3
    joined = model.apply(model.params, batch["tokens"], positions=batch["positions"])
    assert np.abs(joined - plain)[0, 0].max() > 1e-3


def stirred(model, config, seed):
    _, adapters = methods.init(jax.random.key(seed), model.params, config)
    keys = iter(jax.random.split(jax.random.key(seed + 5), 99))
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), adapters)


@EACH
def test_loss_and_gradients_equal_peft(tiny, error, family):
    row = ENCODERS[family]
    config = AdapterConfig(
        rank=3, alpha=7, target_modules=[*row.targets], modules_to_save=[*row.saved]
    )
    for seed in (0, 1):
        directory, oracle = tiny(seed, family)
        model = formats.load(directory)
        adapters = stirred(model, config, seed)
        target = directory.parent / f"adapter{seed}"
        formats.write_adapter(
            target, adapters, model.params, config, base_model="x", task_type="SEQ_CLS"
        )
        content = json.loads((target / "adapter_config.json").read_text())
        assert content["task_type"] == "SEQ_CLS"
        assert content["modules_to_save"] == [*row.saved]
        tuned = peft.PeftModel.from_pretrained(oracle, str(target), is_trainable=True)
        tuned = tuned.double()  # in float32 torch's rounding alone is 0.8e-5 on some processors
        texts = examples(seed)
        losses = [
            torch.nn.functional.cross_entropy(
                oracle_logits(tuned, text)[None], torch.tensor([int(text.tokens[-1])])
            )
            for text in texts
        ]
        torch.stack(losses).sum().backward()
        batch = {n: jnp.asarray(x) for n, x in data.stack([texts[:3], texts[3:]], 40).items()}

        def loss(adapters, model=model, batch=batch):
            bound = methods.bind(model.params, adapters, config)
            return batch_sums(model, bound, batch, Config())[0]

        value, gradients = jax.value_and_grad(loss)(adapters)
        assert error(value, sum(float(x.detach()) for x in losses)) < TOLERANCE
        back, _ = formats.read_adapter(target, model.params)
        for ours, theirs in zip(jax.tree.leaves(adapters), jax.tree.leaves(back), strict=True):
            np.testing.assert_array_equal(ours, theirs)
        found = peft_tensors.pack(
            tree.flatten(gradients), targets.find_trainable(model.params, config)
        )
        expected = {
            name.replace(".default", "").replace(".modules_to_save", ""): parameter.grad.numpy()
            for name, parameter in tuned.named_parameters()
            if parameter.requires_grad
        }
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            assert np.abs(gradient).max() > 1e-3, name
            assert error(found[name], gradient) < TOLERANCE, name


@EACH
def test_adapters_of_peft_are_read(tiny, error, tmp_path, family):
    """PEFT adds the classifier itself, by its own rule for names."""
    directory, oracle = tiny(4, family)
    config = peft.LoraConfig(r=2, task_type="SEQ_CLS", target_modules=[*ENCODERS[family].targets])
    tuned = peft.get_peft_model(oracle, config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    tuned.save_pretrained(tmp_path / "adapter")
    model, text = formats.load(directory), examples()[0]
    adapters, config = formats.read_adapter(tmp_path / "adapter", model.params)
    assert {*config.modules_to_save} == {*ENCODERS[family].saved}
    bound = methods.bind(model.params, adapters, config)
    with torch.no_grad():
        wanted = oracle_logits(tuned.eval(), text).numpy()
    assert error(model.apply(bound, text.tokens[None, :-1])[0, 0], wanted) < TOLERANCE


@EACH
def test_round_trip_and_merge(tiny, error, tmp_path, family):
    directory, oracle = tiny(3, family, **[*ENCODERS[family].variants.values()][-1])
    model = formats.load(directory)
    config = AdapterConfig(
        rank=2, target_modules="all-linear", modules_to_save=[*ENCODERS[family].saved]
    )
    _, adapters = methods.init(jax.random.key(0), model.params, config)
    adapters = jax.tree.map(
        lambda x: x + 0.2 * jnp.cos(jnp.arange(x.size)).reshape(x.shape), adapters
    )
    bound = methods.bind(model.params, adapters, config)
    for name, params in (("same", model.params), ("merged", methods.merge(bound))):
        formats.write_model(tmp_path / name, model, params, directory)
        loaded, info = transformers.AutoModelForSequenceClassification.from_pretrained(
            tmp_path / name, output_loading_info=True
        )
        assert not any(info.values()), info
        assert type(loaded) is model_class(family)
        text = examples()[3]
        with torch.no_grad():
            wanted = oracle_logits(loaded.eval(), text).numpy()
        given = model.params if name == "same" else bound
        types = np.arange(len(text.tokens) - 1)[None] >= text.pair_start
        logits = model.apply(given, text.tokens[None, :-1], token_types=types.astype(np.int32))
        assert error(logits[0, 0], wanted) < TOLERANCE
    before, after = (
        oracle.state_dict(),
        dict(model_class(family).from_pretrained(tmp_path / "same").state_dict()),
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@EACH
def test_files_without_a_head(tiny, family):
    directory, oracle = tiny(0, family)
    bare = directory.parent / "bare"
    oracle.base_model.save_pretrained(bare)
    model = formats.load(bare, labels=["x", "y"])
    assert model.hf_config["architectures"] == [model_class(family).__name__]
    heads = [head for head in model.names.heads if head != "bert.pooler"]  # the files have that
    assert model.labels == ("x", "y") and formats.missing_heads(bare, model) == tuple(heads)
    whole = tree.flatten(formats.load(directory).params)
    for path, leaf in tree.flatten(model.params).items():
        if path[0] not in heads:
            np.testing.assert_array_equal(leaf, whole[path])
    again = formats.load(bare, labels=["x", "y"])
    for one, two in zip(jax.tree.leaves(model.params), jax.tree.leaves(again.params), strict=True):
        np.testing.assert_array_equal(one, two)


@EACH
def test_files_of_a_masked_language_model(tiny, tmp_path, family):
    """Their own head is not read, but where a classifier has the same modules."""
    _, oracle = tiny(0, family)
    masked = getattr(transformers, f"{ENCODERS[family].classes}ForMaskedLM")(oracle.config)
    masked.save_pretrained(tmp_path / "masked")
    model = formats.load(tmp_path / "masked", labels=["x", "y"])
    present = ("head",) if family == "modernbert" else ()
    missing = tuple(head for head in model.names.heads if head not in present)
    assert formats.missing_heads(tmp_path / "masked", model) == missing
    (path,) = [p for p in tree.flatten(model.params) if p[-2] in EMBEDDINGS]
    leaf = masked.get_input_embeddings().weight.detach().numpy()
    np.testing.assert_array_equal(tree.flatten(model.params)[path], leaf)
    if present:
        np.testing.assert_array_equal(
            model.params["head"]["dense"]["kernel"], masked.head.dense.weight.detach().numpy().T
        )


@EACH
def test_a_head_for_other_labels_keeps_what_does_not_depend_on_them(tiny, family):
    directory, _ = tiny(0, family)
    model = formats.load(directory, labels=["c", "b", "a"])
    assert formats.missing_heads(directory, model) == ("classifier",)
    old, new = (tree.flatten(one.params) for one in (formats.load(directory), model))
    changed = {path[0] for path in old if not np.array_equal(old[path], new[path])}
    assert changed == {"classifier"}


def test_a_module_that_peft_would_save_too_is_named(tiny, tmp_path):
    model = formats.load(tiny(0, "distilbert")[0])
    config = AdapterConfig(rank=2, target_modules=["q_lin"], modules_to_save=["classifier"])
    _, adapters = methods.init(jax.random.key(0), model.params, config)
    with pytest.raises(UserError, match="the end of any other, and saves pre_classifier too"):
        formats.write_adapter(tmp_path / "adapter", adapters, model.params, config, base_model="x")


def test_other_labels_mean_a_new_head(tiny):
    directory, _ = tiny()
    same = formats.load(directory, labels=["a", "b", "c"])
    other = formats.load(directory, labels=["a", "c", "b"])
    assert formats.missing_heads(directory, same) == ()
    assert formats.missing_heads(directory, other) == ("classifier",)
    kernel = lambda model: np.asarray(model.params["classifier"]["kernel"])  # noqa: E731
    assert kernel(same).shape == kernel(other).shape == (36, 3)
    assert not np.array_equal(kernel(same), kernel(other))
    assert 0.01 < kernel(other).std() < 0.03
    assert other.hf_config["id2label"] == {"0": "a", "1": "c", "2": "b"}


def test_old_names_and_buffers(tiny, tmp_path):
    from safetensors.numpy import load_file, save_file

    directory, _ = tiny()
    tensors = load_file(directory / "model.safetensors")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): value
        for name, value in tensors.items()
        if not name.startswith("classifier")
    }
    old["cls.predictions.bias"] = np.zeros(97, np.float32)
    old["bert.embeddings.position_ids"] = np.arange(40)[None]
    (tmp_path / "old").mkdir()
    (tmp_path / "old/config.json").write_text((directory / "config.json").read_text())
    save_file(old, tmp_path / "old/model.safetensors")
    model, new = formats.load(tmp_path / "old"), formats.load(directory)
    for path in (("embeddings", "LayerNorm"), ("pooler", "dense")):
        one, two = model.params["bert"], new.params["bert"]
        for key in path:
            one, two = one[key], two[key]
        for leaf in one:
            np.testing.assert_array_equal(one[leaf], two[leaf])


def test_count_of_roberta_base():
    """The LoRA paper's RoBERTa base: queries and values at rank 8."""
    content = dict(model_type="roberta", vocab_size=50265, max_position_embeddings=514)
    from lora_jax import models

    model = models.describe(content)
    config = AdapterConfig(rank=8, target_modules=["query", "value"])
    assert targets.find_trainable(model.params, config).parameters == 294_912


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(is_decoder=True), "is_decoder=True is not supported"),
        (dict(position_embedding_type="relative_key"), "position_embedding_type='relative_key'|="),
        (dict(id2label={"0": "a", "2": "b"}), "id2label=.* must number the labels"),
    ],
)
def test_configs_that_are_refused(tiny, edit_json, change, message):
    directory, _ = tiny()
    edit_json(directory / "config.json", **change)
    with pytest.raises(UserError, match=message):
        formats.describe(directory)
