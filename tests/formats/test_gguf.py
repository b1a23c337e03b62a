"""GGUF conversion: tiny files by the gguf package, and the demo model against transformers."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from lora_jax.config import UserError
from lora_jax.formats.gguf import _llama3_divisors, convert

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
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
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
    divisors = _llama3_divisors(settings, 50000.0, HEAD).astype(np.float32)
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
        ({"architecture": "qwen2"}, "architecture 'qwen2'; supported: llama"),
        ({"tokenizer_model": "llama"}, "tokenizer 'llama'; supported: gpt2"),
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


def test_missing_file_and_occupied_target(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        convert(tmp_path / "no.gguf", tmp_path / "m")
    write(tmp_path / "m.gguf")
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="no converted model"):
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
