"""What a fingerprint sees and what it leaves out."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lora_jax import formats, hosts
from lora_jax.errors import UserError
from lora_jax.formats import digests, fingerprint

RNG = np.random.default_rng(0)
SMALL = "model.layers.0.input_layernorm.weight"
LARGE = "model.embed_tokens.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"
HEAD = "lm_head.weight"
TENSORS = {
    SMALL: RNG.standard_normal(8).astype(np.float32),
    QUERY: RNG.standard_normal((6, 4)).astype(np.float16),
    LARGE: RNG.standard_normal((300, 200)).astype(np.float32),
}
_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def write_tensors(file: Path, tensors: dict[str, np.ndarray]) -> None:
    """A safetensors file whose tensors lie in this very order; the library has an order of its
    own.
    """
    header, data = {}, b""
    for name, array in tensors.items():
        header[name] = {
            "dtype": _NAMES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [len(data), len(data) + array.nbytes],
        }
        data += array.tobytes()
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.fixture
def digest(tmp_path):
    """`digest(tensors, shards=1, **config)` of a directory with these tensors."""
    count = 0

    def take(tensors, shards=1, **config):
        nonlocal count
        count += 1
        directory = tmp_path / str(count)
        directory.mkdir()
        (directory / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
        if shards == 1:
            write_tensors(directory / "model.safetensors", tensors)
        else:
            names = list(tensors)
            places = {name: f"model-{i % shards}.safetensors" for i, name in enumerate(names)}
            for file in set(places.values()):
                chosen = {name: tensors[name] for name in names if places[name] == file}
                write_tensors(directory / file, chosen)
            index = directory / "model.safetensors.index.json"
            index.write_text(json.dumps({"weight_map": places}))
        return fingerprint.base_digest(directory)

    return take


def test_neither_files_nor_order_matter(digest):
    backwards = dict(reversed(TENSORS.items()))
    found = {digest(x, shards) for x in (TENSORS, backwards) for shards in (1, 2, 3)}
    assert len(found) == 1


def changed(name, change):
    copy = TENSORS[name].copy()
    return TENSORS | {name: change(copy)}


def with_value(index):
    def change(array):
        array.flat[index] = np.nextafter(array.flat[index], np.float32(9))
        return array

    return change


CHANGES = {
    "first value of a small tensor": changed(SMALL, with_value(0)),
    "any value of a small tensor": changed(SMALL, with_value(5)),
    "first value of a large tensor": changed(LARGE, with_value(0)),
    "last value of a large tensor": changed(LARGE, with_value(-1)),
    "dtype of the same bytes": changed(QUERY, lambda x: x.view(ml_dtypes.bfloat16)),
    "shape of the same bytes": changed(SMALL, lambda x: x.reshape(2, 4)),
    "shape of a large tensor": changed(LARGE, lambda x: x.reshape(200, 300)),
    "name": {("x" + name if name == SMALL else name): x for name, x in TENSORS.items()},
    "one more": TENSORS | {HEAD: TENSORS[LARGE][::-1]},
    "one less": {name: x for name, x in TENSORS.items() if name != SMALL},
}


@pytest.mark.parametrize("change", CHANGES)
def test_everything_else_does(digest, change):
    assert digest(CHANGES[change]) != digest(TENSORS)


def test_a_copy_of_the_embedding_counts_where_the_config_unties_it(digest):
    copied, untied = TENSORS | {HEAD: TENSORS[LARGE]}, {"tie_word_embeddings": False}
    assert digest(copied, **untied) != digest(TENSORS, **untied)
    assert digest(copied) != digest(TENSORS)  # llama unties by default
    gemma = {"model_type": "gemma2"}
    assert digest(copied, **gemma) == digest(TENSORS, **gemma)


def test_a_flipped_bit_anywhere_in_a_large_tensor_is_seen(digest, monkeypatch):
    """The places are those next to the ends of the pieces that are read at once, and at random."""
    monkeypatch.setattr(digests, "_PIECE", 1 << 14)
    before, size = digest(TENSORS), TENSORS[LARGE].nbytes
    places = {i * (1 << 14) + d for i in range(size >> 14) for d in (-1, 0)} - {-1}
    places |= {0, size - 1, *map(int, RNG.integers(0, size, 20))}
    for place in sorted(places):
        array = TENSORS[LARGE].copy()
        array.view(np.uint8).flat[place] ^= 1 << int(RNG.integers(8))
        assert digest(TENSORS | {LARGE: array}) != before, f"byte {place}"


def test_an_empty_tensor_is_read(digest):
    empty = np.zeros((0, 4), np.float32)
    assert digest(TENSORS | {"x": empty}) != digest(TENSORS)


def test_copies_of_what_is_there_anyway_do_not_count(digest):
    rotary = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    head = {HEAD: TENSORS[LARGE]}
    assert digest(TENSORS | rotary) == digest(TENSORS)
    tied = digest(TENSORS, tie_word_embeddings=True)
    assert tied == digest(TENSORS | head | rotary, tie_word_embeddings=True)
    assert digest(TENSORS | head, tie_word_embeddings=False) != tied


def test_a_directory_that_is_no_model(tmp_path):
    with pytest.raises(UserError, match="has no model.safetensors and no index"):
        fingerprint.base_digest(tmp_path)
    write_tensors(tmp_path / "model.safetensors", TENSORS)
    for text in (None, "no json", "[1]"):
        if text is not None:
            (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=r"config\.json cannot be read"):
            fingerprint.base_digest(tmp_path)


def make_tokenizer(merges=(("a", "b"), ("c", "d")), added=(), words=(), **options):
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ("<s>", "</s>", *letters, "ab", "cd", *words)
    vocab = {token: i for i, token in enumerate(names)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(x, special=True) for x in ("<s>", "</s>")])
    backend.add_tokens(list(added))
    special = {"bos_token": "<s>", "eos_token": "</s>"} | options
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


TOKENIZERS = {
    "one merge less": dict(merges=[("a", "b")]),
    "merges in another order": dict(merges=[("c", "d"), ("a", "b")]),
    "a word more": dict(words=["xyz"]),
    "an added token": dict(added=["<tool>"]),
    "an added token that is special": dict(added=[AddedToken("<tool>", special=True)]),
    "another eos": dict(eos_token="<s>"),
    "no bos": dict(bos_token=None),
}


@pytest.mark.parametrize("change", TOKENIZERS)
def test_a_tokenizer_that_differs(change):
    before = fingerprint.tokenizer_digest(make_tokenizer())
    assert fingerprint.tokenizer_digest(make_tokenizer()) == before
    assert fingerprint.tokenizer_digest(make_tokenizer(**TOKENIZERS[change])) != before


def test_how_a_tokenizer_was_used_does_not_count():
    tokenizer = make_tokenizer(pad_token="</s>")
    before = fingerprint.tokenizer_digest(tokenizer)
    tokenizer(["a", "abcd"], padding=True, truncation=True, max_length=3)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    assert state["padding"] and state["truncation"], "the call left no state to leave out"
    assert fingerprint.tokenizer_digest(tokenizer) == before


def test_saving_and_loading_keeps_the_digest(tmp_path):
    tokenizer = make_tokenizer(added=["<tool>"])
    found = [fingerprint.tokenizer_digest(tokenizer)]
    for name in ("one", "two"):
        tokenizer.save_pretrained(tmp_path / name)
        tokenizer = formats.load_tokenizer(tmp_path / name)
        found.append(fingerprint.tokenizer_digest(tokenizer))
    assert len(set(found)) == 1


def test_a_tokenizer_in_python_is_known_by_its_words():
    class Slow:
        bos_token_id, eos_token_id = 0, 1

        def __init__(self, **vocab):
            self.vocab = vocab

        def get_vocab(self):
            return self.vocab

    digests = [fingerprint.tokenizer_digest(Slow(**x)) for x in ({"a": 0, "b": 1}, {"a": 0})]
    assert digests[0] != digests[1]
    assert digests[0] == fingerprint.tokenizer_digest(Slow(b=1, a=0))


def test_no_template_is_not_an_empty_one(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    write_tensors(tmp_path / "model.safetensors", TENSORS)
    tokenizer = make_tokenizer()
    found = [fingerprint.take(tmp_path, tokenizer, text) for text in (None, "", "{{ x }}", "none")]
    assert len({one["template"] for one in found}) == 4
    assert len({(one["base"], one["tokenizer"]) for one in found}) == 1
    assert set(found[0]) == set(fingerprint.PARTS)
    assert found[0] == fingerprint.take(tmp_path, tokenizer, None)


STORED = {name: name[0] * 64 for name in ("base", "tokenizer", "template", "data")}


def test_equal_fingerprints_pass():
    fingerprint.check(STORED, dict(STORED), "runs/x", ())
    fingerprint.check({}, STORED, "an adapter of another tool", ())
    fingerprint.check(STORED, {"base": STORED["base"]}, "runs/x", ())


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("base", "the base model's weights are not those"),
        ("tokenizer", "the tokenizer is not the one"),
        ("template", "the chat template is not the one"),
        ("data", "the training examples are not those"),
    ],
)
def test_what_differs_is_named_and_can_be_allowed(name, told):
    found = STORED | {name: "0" * 64}
    with pytest.raises(UserError) as raised:
        fingerprint.check(STORED, found, "runs/x", ())
    assert str(raised.value) == (
        f"{name}: {told} that runs/x was made with ({STORED[name][:12]}, here {'0' * 12}); use "
        f"the same, or list {name!r} in allow_change"
        + ("" if name == "data" else f" (--allow-change {name} on the command line)")
    )
    fingerprint.check(STORED, found, "runs/x", [name])
    others = [other for other in STORED if other != name]
    with pytest.raises(UserError, match=told):
        fingerprint.check(STORED, found, "runs/x", others)


def test_a_digest_of_samples_is_not_compared_with_one_of_all_bytes(caplog):
    hosts.note.cache_clear()
    found = STORED | {"base": f"sha256:{'b' * 64}"}
    for stored, here in ((STORED, found), (found, STORED)):
        fingerprint.check(stored, here, "runs/x", ())
        with pytest.raises(UserError, match="^template: "):
            fingerprint.check(stored, here | {"template": "0" * 64}, "runs/x", ())
    text = "runs/x has a digest of its base by another version of lora_jax, which cannot be comp"
    assert caplog.text.count(text) == 1
    with pytest.raises(UserError, match=r"\(bbbbbbbbbbbb, here 000000000000\)"):
        fingerprint.check(found, found | {"base": f"sha256:{'0' * 64}"}, "runs/x", ())


def test_all_that_differ_are_told_together():
    found = dict.fromkeys(STORED, "0" * 64)
    with pytest.raises(UserError) as raised:
        fingerprint.check(STORED, found, "runs/x", ["template"])
    lines = str(raised.value).splitlines()
    assert [line.partition(":")[0] for line in lines] == ["base", "tokenizer", "data"]
