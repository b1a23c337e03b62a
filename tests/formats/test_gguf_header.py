"""A GGUF file whose header asks for more than a file can hold is refused before it is read."""

import struct

import pytest

from lora_jax import UserError
from lora_jax.formats.gguf import convert

from . import test_gguf
from .test_gguf import LAYERS, write


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def header(fields: int, tensors: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, fields)


def array(kind: int, length: int) -> bytes:
    return text(b"a") + struct.pack("<IIQ", 9, kind, length)


HEADERS = {
    "array without an end": (header(1) + array(4, 2**62), "its arrays have"),
    "array longer than the file": (header(1) + array(4, 10**6), "it ends within"),
    "texts longer than the file": (header(1) + array(8, 10**6), "unpack_from requires"),
    "one long text": (header(1) + text(b"a") + struct.pack("<IQ", 8, 2**60), "it ends within"),
    "many metadata": (header(2**60), "metadata, above"),
    "many tensors": (header(0, 2**60), "tensors, above"),
    "nested arrays": (
        header(1) + text(b"a") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 50,
        "nested 4 times",
    ),
    "unknown type": (header(1) + text(b"a") + struct.pack("<I", 77), "type 77"),
    "axes": (header(0, 1) + text(b"a") + struct.pack("<I", 2**31), "axes"),
    "version": (header(0, 0, 2**24 * 3), "version"),
    "other file": (b"PK\3\4" + bytes(60), "does not begin with GGUF"),
    "empty": (b"", "cannot mmap an empty file"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_counts_are_checked(tmp_path, name):
    content, message = HEADERS[name]
    (tmp_path / "m.gguf").write_bytes(content + bytes(40) * bool(content and "long" not in name))
    with pytest.raises(UserError, match=f"m.gguf is not a GGUF file, or damaged.*{message}"):
        convert(tmp_path / "m.gguf", tmp_path / "m")


def test_blocks_are_compared_with_the_tensors(tmp_path):
    write(tmp_path / "m.gguf")
    content = (tmp_path / "m.gguf").read_bytes()
    key = b"llama.block_count" + struct.pack("<I", 4)
    assert content.count(key + struct.pack("<I", LAYERS)) == 1
    changed = content.replace(key + struct.pack("<I", LAYERS), key + struct.pack("<I", 10**9))
    (tmp_path / "m.gguf").write_bytes(changed)
    with pytest.raises(UserError, match="block_count=1000000000, and it has only"):
        convert(tmp_path / "m.gguf", tmp_path / "m")


TYPES = {
    "text for an integer": ("llama.attention.key_length", "x", "is not an integer"),
    "list for an integer": ("llama.attention.key_length", [1, 2], "is not an integer"),
    "boolean for an integer": ("llama.context_length", True, "is not an integer"),
    "text for a number": ("llama.rope.freq_base", "x", "is not a finite number"),
    "infinite number": ("llama.rope.freq_base", float("inf"), "is not a finite number"),
    "token as a text": ("tokenizer.ggml.eos_token_id", "x", "is not an integer"),
    "token as a fraction": ("tokenizer.ggml.bos_token_id", 1.5, "is not an integer"),
    "number for a text": ("tokenizer.chat_template", 5, "is not a text"),
    "numbers for merges": ("tokenizer.ggml.merges", [1, 2], "is not a list of texts"),
    "texts for types": ("tokenizer.ggml.token_type", ["a"], "is not a list of integers"),
    "no list": ("tokenizer.ggml.tokens", "x", "is not a list of texts"),
    "unknown and long": ("llama.other", list(range(9000)), r"llama.other=\[0, 1"),
}
ADD = {str: "add_string", bool: "add_bool", int: "add_int64", float: "add_float32"}


@pytest.mark.parametrize("name", TYPES)
def test_types_are_checked(tmp_path, monkeypatch, name):
    key, value, message = TYPES[name]

    def finish(writer):
        for values in writer.kv_data:
            values.pop(key, None)
        getattr(writer, ADD.get(type(value), "add_array"))(key, value)
        whole(writer)

    whole = test_gguf.finish
    monkeypatch.setattr(test_gguf, "finish", finish)
    write(tmp_path / "m.gguf")
    with pytest.raises(UserError, match=message) as caught:
        convert(tmp_path / "m.gguf", tmp_path / "m")
    assert "m.gguf" in str(caught.value) and key in str(caught.value)
    assert len(str(caught.value)) < 800
