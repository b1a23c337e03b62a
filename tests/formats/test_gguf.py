"""GGUF conversion: tiny files by the gguf package, and the demo model against transformers."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from lora_jax.errors import UserError
from lora_jax.formats.gguf import convert
from lora_jax.formats.gguf.config import _gemma3_fields, llama3_divisors

D, F, HEADS, KV_HEADS, HEAD, LAYERS = 64, 96, 4, 2, 16, 2  # 32 divides D and F: a Q8_0 block
BYTES = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]
TOKENS = ["<|end|>", "<|start|>", "<think>", *BYTES, "ĠĠ", "ab"]
QUANTISED = gguf.GGMLQuantizationType.Q8_0


def hf_tensors(tied: bool) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"model.embed_tokens": (len(TOKENS), D), "model.norm": (D,)}
    for i in range(LAYERS):
        for name, shape in {
            "input_layernorm": (D,),
            "post_attention_layernorm": (D,),
            "self_attn.q_proj": (HEADS * HEAD, D),
            "self_attn.k_proj": (KV_HEADS * HEAD, D),
            "self_attn.v_proj": (KV_HEADS * HEAD, D),
            "self_attn.o_proj": (D, HEADS * HEAD),
            "mlp.gate_proj": (F, D),
            "mlp.up_proj": (F, D),
            "mlp.down_proj": (D, F),
        }.items():
            shapes[f"model.layers.{i}.{name}"] = shape
    if not tied:
        shapes["lm_head"] = (len(TOKENS), D)
    return {f"{k}.weight": rng.standard_normal(v).astype(np.float32) for k, v in shapes.items()}


def permute(array: np.ndarray, heads: int) -> np.ndarray:
    """Row 2j of a head here is its row j there, row 2j + 1 its row j + HEAD / 2, one by one."""
    result = np.empty_like(array)
    for head in range(heads):
        for j in range(HEAD // 2):
            result[head * HEAD + 2 * j] = array[head * HEAD + j]
            result[head * HEAD + 2 * j + 1] = array[head * HEAD + j + HEAD // 2]
    return result


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write(
    path: Path, *, tied=True, quantise=False, architecture="llama", pre="smollm", **extra
) -> dict:
    """A GGUF file of random weights; returns what its Hugging Face tensors must be, bit for bit."""
    expected = hf_tensors(tied)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(128)
    writer.add_embedding_length(D)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(F)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(50000.0)
    writer.add_tokenizer_model(extra.get("tokenizer_model", "gpt2"))
    if pre:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 4] + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(["Ġ Ġ", "a b"])
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_chat_template("{{ messages }}")
    for key, value in extra.get("settings", {}).items():
        writer.add_float32(key, value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    for name, array in expected.items():
        stored = array
        if "q_proj" in name or "k_proj" in name:
            stored = permute(array, HEADS if "q_proj" in name else KV_HEADS)
        key = names.get_name(name, try_suffixes=(".weight",))
        if quantise and array.ndim == 2:
            blocks = gguf.quants.quantize(stored, QUANTISED)
            writer.add_tensor(key, blocks, raw_dtype=QUANTISED)
            # Blocks lie inside a row, so quantising and reordering rows commute.
            blocks = gguf.quants.quantize(array, QUANTISED)
            expected[name] = gguf.quants.dequantize(blocks, QUANTISED)
        else:
            writer.add_tensor(key, stored)
    for key, array in extra.get("tensors", {}).items():
        writer.add_tensor(key, array)
    finish(writer)
    return expected


@pytest.mark.parametrize("quantise", [False, True], ids=["f32", "q8_0"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_tensors_and_config(tmp_path, tied, quantise):
    expected = write(tmp_path / "m.gguf", tied=tied, quantise=quantise)
    target = convert(tmp_path / "m.gguf", tmp_path / "out" / "m")
    assert target == tmp_path / "out" / "m"
    found = load_file(target / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    config = json.loads((target / "config.json").read_text())
    assert (config["model_type"], config["tie_word_embeddings"]) == ("llama", tied)
    assert (config["hidden_size"], config["intermediate_size"], config["head_dim"]) == (D, F, HEAD)
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (HEADS, KV_HEADS)
    assert (config["num_hidden_layers"], config["vocab_size"]) == (LAYERS, len(TOKENS))
    assert (config["rope_theta"], config["rope_scaling"]) == (50000.0, None)
    assert (config["rms_norm_eps"], config["max_position_embeddings"]) == (1e-5, 128)
    generation = json.loads((target / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": 0}
    assert [p.name for p in target.parent.iterdir()] == ["m"]  # nothing half-written is left


def test_finished_target_is_kept(tmp_path):
    write(tmp_path / "m.gguf")
    target = convert(tmp_path / "m.gguf", tmp_path / "m")
    (tmp_path / "m.gguf").unlink()
    assert convert(tmp_path / "m.gguf", target) == target


def test_tokenizer_splits_digits_and_keeps_marked_tokens_whole(tmp_path):
    write(tmp_path / "m.gguf")
    target = convert(tmp_path / "m.gguf", tmp_path / "m")
    tokenizer = Tokenizer.from_file(str(target / "tokenizer.json"))
    # Without the digits rule the second space would go to the number: "Ġ", "Ġ", "1".
    assert tokenizer.encode("ab  12").tokens == ["ab", "ĠĠ", "1", "2"]
    assert tokenizer.encode("<|start|>a<think><|end|>").ids == [1, TOKENS.index("a"), 2, 0]
    for text in ("a é 🙂\n\t x", " 12½"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert (
        tokenizer.decode([1, 2, 0]) == "<think>"
    )  # special tokens are skipped, user-defined ones are text
    settings = json.loads((target / "tokenizer_config.json").read_text())
    assert (settings["bos_token"], settings["eos_token"]) == ("<|start|>", "<|end|>")
    assert settings["chat_template"] == "{{ messages }}"


def test_llama3_tokenizer_and_rope(tmp_path):
    settings = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    settings["original_max_position_embeddings"] = 8192
    divisors = llama3_divisors(settings, 50000.0, HEAD).astype(np.float32)
    write(tmp_path / "m.gguf", pre="llama-bpe", tensors={"rope_freqs.weight": divisors})
    target = convert(tmp_path / "m.gguf", tmp_path / "m")
    scaling = json.loads((target / "config.json").read_text())["rope_scaling"]
    assert scaling == {"rope_type": "llama3", **settings}
    tokenizer = Tokenizer.from_file(str(target / "tokenizer.json"))
    assert tokenizer.encode("ab").tokens == ["<|start|>", "ab"]

    write(tmp_path / "other.gguf", tensors={"rope_freqs.weight": divisors * 1.1})
    with pytest.raises(UserError, match="rope_freqs"):
        convert(tmp_path / "other.gguf", tmp_path / "other")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "qwen2"}, "architecture 'qwen2'; supported: llama, gemma3"),
        ({"tokenizer_model": "llama"}, "tokenizer 'llama'; supported for llama: gpt2"),
        ({"pre": "tekken"}, "pre-tokenizer 'tekken'; supported: .*smollm"),
        ({"pre": None}, "no metadata 'tokenizer.ggml.pre'"),
        ({"settings": {"llama.attention.scale": 0.5}}, r"llama.attention.scale=0.5"),
        ({"tensors": {"blk.0.attn_q.bias": np.ones(D, np.float32)}}, "attn_q.bias is not one of"),
    ],
)
def test_unsupported_files_are_refused(tmp_path, options, message):
    write(tmp_path / "m.gguf", **options)
    with pytest.raises(UserError, match=message):
        convert(tmp_path / "m.gguf", tmp_path / "m")
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


def test_unsupported_tensor_type_is_refused(tmp_path, monkeypatch):
    write(tmp_path / "m.gguf", quantise=True)
    monkeypatch.delitem(gguf.quants._type_traits, QUANTISED)
    with pytest.raises(UserError, match="token_embd.weight has type Q8_0; supported: .*Q4_1"):
        convert(tmp_path / "m.gguf", tmp_path / "m")
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.parametrize("kept", [0, 3, 20, 300, 2000, 6000, -1, -5000])
def test_truncated_file_is_refused(tmp_path, kept):
    write(tmp_path / "m.gguf")
    content = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(content[:kept])
    with pytest.raises(UserError, match="m.gguf"):
        convert(tmp_path / "m.gguf", tmp_path / "m")
    assert not (tmp_path / "m").exists()


# Gemma 3: five layers with a window, one without, one with; no two sizes are equal.
GD, GF, GHEADS, GHEAD, GLAYERS, WINDOW = 256, 96, 2, 16, 7, 4
PIECES = ["<pad>", "<eos>", "<bos>", "<unk>", "<turn>", "\n\n", "  ", "   "]
PIECES += [f"<0x{byte:02X}>" for byte in range(256)]
PIECES += ["▁a", "ab", "▁ab", "▁abc", "bc", "▁", "a", "b", "c", "\n"]
TYPES = [3, 3, 3, 3, 3, 4, 4, 4] + [6] * 256 + [1] * 10


def gemma_tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    shapes = {"model.embed_tokens": (len(PIECES), GD), "model.norm": (GD,)}
    for i in range(GLAYERS):
        for name, shape in {
            "input_layernorm": (GD,),
            "self_attn.q_proj": (GHEADS * GHEAD, GD),
            "self_attn.k_proj": (GHEAD, GD),
            "self_attn.v_proj": (GHEAD, GD),
            "self_attn.o_proj": (GD, GHEADS * GHEAD),
            "self_attn.q_norm": (GHEAD,),
            "self_attn.k_norm": (GHEAD,),
            "post_attention_layernorm": (GD,),
            "pre_feedforward_layernorm": (GD,),
            "mlp.gate_proj": (GF, GD),
            "mlp.up_proj": (GF, GD),
            "mlp.down_proj": (GD, GF),
            "post_feedforward_layernorm": (GD,),
        }.items():
            shapes[f"model.layers.{i}.{name}"] = shape
    return {
        f"{name}.weight": (rng.standard_normal(shape) * 0.1).astype(np.float32)
        for name, shape in shapes.items()
    }


def write_gemma(path: Path, **extra) -> dict[str, np.ndarray]:
    """A GGUF file of a tiny Gemma 3; returns what its Hugging Face tensors must be."""
    expected = gemma_tensors()
    writer = gguf.GGUFWriter(path, "gemma3")
    writer.add_context_length(64)
    writer.add_embedding_length(GD)
    writer.add_block_count(GLAYERS)
    writer.add_feed_forward_length(GF)
    writer.add_head_count(GHEADS)
    writer.add_head_count_kv(1)
    writer.add_key_length(GHEAD)
    writer.add_value_length(GHEAD)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1_000_000.0)
    if extra.get("window", WINDOW):
        writer.add_sliding_window(WINDOW)
    writer.add_tokenizer_model(extra.get("tokenizer_model", "llama"))
    writer.add_tokenizer_pre("default")
    writer.add_token_list(PIECES)
    writer.add_token_scores([-1000.0] * len(PIECES))
    writer.add_token_types(TYPES)
    for name, index in (("pad", 0), ("eos", 1), ("bos", 2), ("unk", 3)):
        if name != extra.get("without"):
            getattr(writer, f"add_{name}_token_id")(index)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(extra.get("space_prefix", False))
    writer.add_chat_template("{{ messages }}")
    for key, value in extra.get("settings", {}).items():
        writer.add_string(key, value) if isinstance(value, str) else writer.add_float32(key, value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA3, GLAYERS)
    for name, array in expected.items():
        key = names.get_name(name, try_suffixes=(".weight",))
        if (raw := extra.get("raw", {}).get(name)) is not None:
            writer.add_tensor(key, raw[0], raw_dtype=raw[1])
        else:
            writer.add_tensor(key, array + 1 if "norm" in name else array)
    finish(writer)
    return expected


def k_quants(kind: gguf.GGMLQuantizationType, rows: int) -> np.ndarray:
    """Random blocks of 256 numbers, a row each, with scales of a sensible size."""
    rng = np.random.default_rng(2)
    blocks = rng.integers(0, 64, (rows, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8)
    scale = np.frombuffer(np.float16(0.001).tobytes(), np.uint8)
    places = (0, 2) if kind == gguf.GGMLQuantizationType.Q4_K else (208,)
    for place in places:
        blocks[:, place : place + 2] = scale
    return blocks


def test_gemma3_tensors_config_and_k_quants(tmp_path):
    kinds = gguf.GGMLQuantizationType
    raw = {
        "model.layers.3.mlp.up_proj.weight": (k_quants(kinds.Q4_K, GF), kinds.Q4_K),
        "model.layers.4.self_attn.q_proj.weight": (k_quants(kinds.Q6_K, 32), kinds.Q6_K),
    }
    expected = write_gemma(tmp_path / "m.gguf", raw=raw)
    for name, (blocks, kind) in raw.items():
        expected[name] = gguf.quants.dequantize(blocks, kind)
        assert 0.01 < np.abs(expected[name]).mean() < 10
    target = convert(tmp_path / "m.gguf", tmp_path / "m")
    found = load_file(target / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        tolerance = 1e-7 if "norm" in name else 0.0  # (1 + w) - 1
        np.testing.assert_allclose(found[name], array, rtol=0, atol=tolerance, err_msg=name)
    config = json.loads((target / "config.json").read_text())
    assert (config["model_type"], config["head_dim"]) == ("gemma3_text", GHEAD)
    kinds = ["sliding_attention"] * 5 + ["full_attention"]
    assert config["layer_types"] == [*kinds, kinds[0]] and config["sliding_window"] == WINDOW
    assert (config["rope_theta"], config["rope_local_base_freq"]) == (1e6, 1e4)
    assert (config["query_pre_attn_scalar"], config["rms_norm_eps"]) == (GHEAD, 1e-6)
    assert config["final_logit_softcapping"] is None and config["tie_word_embeddings"]
    settings = json.loads((target / "tokenizer_config.json").read_text())
    assert (settings["pad_token"], settings["chat_template"]) == ("<pad>", "{{ messages }}")


def test_gemma3_settings_of_larger_models(tmp_path):
    settings = {"gemma3.rope.scaling.type": "linear", "gemma3.rope.scaling.factor": 8.0}
    settings |= {"gemma3.final_logit_softcapping": 30.0}
    write_gemma(tmp_path / "m.gguf", window=None, settings=settings)
    config = json.loads((convert(tmp_path / "m.gguf", tmp_path / "m") / "config.json").read_text())
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}
    assert config["final_logit_softcapping"] == 30.0
    assert config["sliding_window"] is None
    assert config["layer_types"] == ["full_attention"] * GLAYERS
    of_27b = {"num_hidden_layers": 62, "head_dim": 128, "hidden_size": 5376}
    assert _gemma3_fields({}, of_27b | {"num_attention_heads": 32})["query_pre_attn_scalar"] == 168


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
def test_gemma3_equals_transformers_own_reading(tmp_path, error, scaled):
    import jax.numpy as jnp
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lora_jax import formats

    scaling = {"gemma3.rope.scaling.type": "linear", "gemma3.rope.scaling.factor": 8.0}
    write_gemma(tmp_path / "m.gguf", settings=scaling if scaled else {})
    target = convert(tmp_path / "m.gguf", tmp_path / "out" / "m")
    # transformers takes no scaling of positions out of a Gemma file: compare on its own files then.
    where = (target, None) if scaled else (tmp_path, "m.gguf")
    theirs = AutoModelForCausalLM.from_pretrained(
        where[0], gguf_file=where[1], dtype=torch.float32, attn_implementation="eager"
    )
    # Its GGUF reader leaves the size of the scores' scale at that of the large models.
    theirs.config.query_pre_attn_scalar = GHEAD
    for layer in theirs.model.layers:
        layer.self_attn.scaling = GHEAD**-0.5
    mine = formats.load(target)
    tokens = np.random.default_rng(0).integers(0, len(PIECES), (2, 3 * WINDOW))
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    assert error(mine.apply(mine.params, jnp.asarray(tokens)), expected) < 1e-5
    if scaled:
        return
    tokenizer = formats.load_tokenizer(target)
    reference = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    models = [json.loads(one.backend_tokenizer.to_str())["model"] for one in (tokenizer, reference)]
    assert models[0] == models[1] and ["▁", "ab"] in models[0]["merges"]
    for text in (
        *("", " ", "ab", " abc a  b", "a   bc    c", "\n\n\n", "xé🙂", "<turn>a<eos>"),
        *("<0x41>", "  ab", "a ▁b", "abababc ab"),
    ):
        ids = tokenizer.encode(text)
        assert ids == reference.encode(text), text
        assert ids[0] == 2 and tokenizer.decode(ids) == reference.decode(ids), text
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode(" abc  \n\nb")) == [
        *("<bos>", "▁abc", "▁▁", "\n\n", "b")
    ]
    assert tokenizer.decode(tokenizer.encode("é  a"), skip_special_tokens=True) == "é  a"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokenizer_model": "gpt2"}, "tokenizer 'gpt2'; supported for gemma3_text: llama"),
        ({"space_prefix": True}, "puts a space before text"),
        ({"without": "unk"}, "no metadata 'tokenizer.ggml.unknown_token_id'"),
        ({"settings": {"gemma3.attention.scale": 0.5}}, "gemma3.attention.scale=0.5"),
        ({"settings": {"gemma3.rope.scaling.type": "yarn"}}, "rope scaling 'yarn'"),
    ],
)
def test_unsupported_gemma3_files_are_refused(tmp_path, options, message):
    write_gemma(tmp_path / "m.gguf", **options)
    with pytest.raises(UserError, match=message):
        convert(tmp_path / "m.gguf", tmp_path / "m")
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, monkeypatch, value):
    tensors = hf_tensors(tied=True)
    tensors["model.layers.1.self_attn.q_proj.weight"][3, 5] = value
    monkeypatch.setattr(f"{__name__}.hf_tensors", lambda tied: tensors)
    write(tmp_path / "a.gguf")
    with pytest.raises(UserError, match=r"a\.gguf: weights are infinite .* in blk\.1\.attn_q"):
        convert(tmp_path / "a.gguf", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]


def test_missing_file_and_occupied_target(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        convert(tmp_path / "no.gguf", tmp_path / "m")
    write(tmp_path / "m.gguf")
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="not a converted model"):
        convert(tmp_path / "m.gguf", tmp_path / "m")
    assert (tmp_path / "m" / "mine.txt").read_text() == "keep"
    with pytest.raises(UserError, match="cannot write"):
        convert(tmp_path / "m.gguf", tmp_path / "m.gguf" / "below")


@pytest.mark.real
def test_demo_model_equals_transformers(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lora_jax import demo

    source = demo.path("smollm2-135m-instruct")
    target = convert(source, tmp_path / "m")
    theirs = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.float32
    )
    found = load_file(target / "model.safetensors")
    state = {k: v for k, v in theirs.state_dict().items() if k != "lm_head.weight"}  # tied
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        np.testing.assert_array_equal(found[name], tensor.numpy(), err_msg=name)

    tokenizer = AutoTokenizer.from_pretrained(target)
    reference = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    # Only texts in which transformers' missing digits rule for this file makes no difference.
    for text in ("Hello  world\n\nit's 12345", "<|im_start|>user\nhé 🙂<|im_end|>\n", "x = 3.14"):
        assert tokenizer.encode(text) == reference.encode(text), text
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("a  12")) == ["a", "ĠĠ", "1", "2"]
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    mine = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    answer = mine.generate(**inputs, max_new_tokens=12, do_sample=False)[0]
    text = tokenizer.decode(answer[inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert text == "The capital of France is Paris."
