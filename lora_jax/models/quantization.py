"""Quantised weights as `quantization_config` of config.json describes them.

fp8, fbgemm_fp8    linears in float8, with scales of blocks, of output features or of tensors
bitsandbytes       linears in NF4 or FP4 of 4 bits, or in int8
mxfp4              experts of gpt_oss

Other methods are refused. `formats.packed` reads the weights.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lora_jax.config import is_finite, quoted
from lora_jax.models.common import Names
from lora_jax.models.reader import ConfigReader

FIELD = "quantization_config"
_FLOATS = ("float32", "bfloat16", "float16")
_LARGEST_BLOCK = 2**20
_AGAIN = "base_dtype=nf4 or int8 quantises them again, which rounds"
# A rule of a field: its accepted values in words, and the function that recognises them.
Rule = tuple[str, Callable[[Any], bool]]


@dataclass(frozen=True)
class Quantization:
    """A quantised model: `fp8`, `bitsandbytes` or `mxfp4`."""

    method: str
    dtype: str  # of the weights, unless the caller asks for another one
    blocks: tuple[int, int] | None = None  # (out, in) of fp8: numbers that share a scale
    byte_scales: bool = False  # scales of fp8 may be bytes, which are exponents of two


def find_quantization(hf_config: Mapping[str, Any]) -> Quantization | None:
    """Return what `check_quantization` accepted, or None if the weights are not quantised."""
    given = hf_config.get(FIELD)
    method = _method(given)
    if not isinstance(given, Mapping) or method not in _RULES:
        return None
    name = config_dtype(hf_config)
    dtype = name if name in _FLOATS else "float32"
    if method not in ("fp8", "fbgemm_fp8"):
        return Quantization(method, dtype)
    blocks = given.get("weight_block_size")
    size = (int(blocks[0]), int(blocks[1])) if blocks is not None else None
    return Quantization("fp8", dtype, size, given.get("scale_fmt") == "ue8m0")


def config_dtype(hf_config: Mapping[str, Any]) -> str:
    """Return the dtype that a config.json names, by default float32."""
    text = hf_config.get("text_config")
    places = (hf_config, text if isinstance(text, Mapping) else {})
    named = (place.get(name) for place in places for name in ("dtype", "torch_dtype"))
    return str(next(filter(None, named), "float32")).removeprefix("torch.")


def check_quantization(reader: ConfigReader, names: Names) -> None:
    """Accept a supported `quantization_config`, with a note. `ConfigReader.finish` refuses others,
    and fields that could change the weights.
    """
    given = reader.content.get(FIELD)
    method = _method(given)
    if not isinstance(given, Mapping) or method not in _RULES:
        return
    if method == "mxfp4" and () not in names.experts.values():
        return  # only stacks of experts are read in MXFP4
    reader.inert(FIELD)
    rules, wrong = _RULES[method] | {"quant_method": ("text", _is_text)}, False
    for name, value in given.items():
        known = name in rules or FIELD in reader.ignore or f"{FIELD}.{name}" in reader.ignore
        if not known and value:
            wrong = True
            reader.refuse(
                f"{FIELD}.{name}={quoted(value)} is not understood for quant_method={method!r} and "
                f"may change the weights; if it does not, set ignore_config_fields=[{FIELD}.{name}]"
            )
        elif name in rules and value is not None and not rules[name][1](value):
            wrong = True
            reader.refuse(f"{FIELD}.{name}={quoted(value)} is not supported, only {rules[name][0]}")
    if method == "bitsandbytes" and _is_4bit(given) == _is_8bit(given):
        wrong = True
        reader.refuse(f"{FIELD}: one of load_in_4bit and load_in_8bit must be true")
    if not wrong:
        reader.notes.append(f"config.json: quant_method={method!r}: {_note(method, given)}")


def _note(method: str, given: Mapping[str, Any]) -> str:
    if method == "mxfp4":
        return (
            "the experts are read as bfloat16, which is exact and takes almost four times their "
            f"memory; {_AGAIN}"
        )
    kind = "FP8"
    if method == "bitsandbytes":
        name = str(given.get("bnb_4bit_quant_type") or "fp4").upper()
        kind = "int8" if _is_8bit(given) else f"4-bit {name}"
    return (
        f"weights are stored in {kind}; they are dequantised as they are read, to base_dtype or "
        f"else to the dtype that config.json names; {_AGAIN}"
    )


def _method(given: Any) -> str:
    """Return the method of a `quantization_config`. Early files of bitsandbytes do not name it."""
    if not isinstance(given, Mapping):
        return ""
    method = given.get("quant_method")
    if method is None and (_is_4bit(given) or _is_8bit(given)):
        return "bitsandbytes"
    return method if isinstance(method, str) else ""


def _is_4bit(given: Mapping[str, Any]) -> bool:
    return any(given.get(name) is True for name in ("load_in_4bit", "_load_in_4bit"))


def _is_8bit(given: Mapping[str, Any]) -> bool:
    return any(given.get(name) is True for name in ("load_in_8bit", "_load_in_8bit"))


# Rules of fields. Those without an effect on the weights are checked for their type alone.


def _one_of(*values: Any) -> Rule:
    known = [(type(value), value) for value in values]
    return " or ".join(map(str, values)), lambda value: (type(value), value) in known


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _is_block(value: Any) -> bool:
    whole = isinstance(value, list) and len(value) == 2 and all(type(n) is int for n in value)
    return whole and all(1 <= n <= _LARGEST_BLOCK for n in value)


_TEXT: Rule = ("text", _is_text)
_NAMES: Rule = ("a list of names", _are_names)
_FLAG: Rule = _one_of(True, False)
_NUMBER: Rule = ("a finite number", is_finite)
_ANY: Rule = ("any value", lambda value: True)
_STORAGE = ("uint8", "int8", "float16", "bfloat16", "float32")

_FP8: dict[str, Rule] = {
    "fmt": _one_of("e4m3"),
    "weight_block_size": (f"two numbers from 1 to {_LARGEST_BLOCK}", _is_block),
    "scale_fmt": _one_of("float", "ue8m0"),
    "expert_dtype": _one_of("fp8"),
    "is_checkpoint_fp8_serialized": _one_of(True),
    "dequantize": _FLAG,
    **dict.fromkeys(("modules_to_not_convert", "modules_to_convert", "ignored_layers"), _NAMES),
    # Of activations and of the cache, which are not quantised here.
    "activation_scheme": _one_of("static", "dynamic"),
    "activation_scale_ub": _NUMBER,
    **dict.fromkeys(("kv_cache_scheme", "kv_cache_quant_method"), _ANY),
}
_BITSANDBYTES: dict[str, Rule] = {
    **{f"{start}load_in_{bits}bit": _FLAG for start in ("", "_") for bits in (4, 8)},
    "bnb_4bit_quant_type": _one_of("nf4", "fp4"),
    "bnb_4bit_use_double_quant": _FLAG,
    "bnb_4bit_quant_storage": _one_of(*_STORAGE, *(f"torch.{name}" for name in _STORAGE)),
    # Of the products of bitsandbytes.
    "bnb_4bit_compute_dtype": _TEXT,
    "llm_int8_threshold": _NUMBER,
    "llm_int8_skip_modules": _NAMES,
    **dict.fromkeys(("llm_int8_enable_fp32_cpu_offload", "llm_int8_has_fp16_weight"), _FLAG),
}
_MXFP4: dict[str, Rule] = {"modules_to_not_convert": _NAMES, "dequantize": _FLAG}
_RULES = {"fp8": _FP8, "fbgemm_fp8": _FP8, "bitsandbytes": _BITSANDBYTES, "mxfp4": _MXFP4}
