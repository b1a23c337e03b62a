"""Quantised model directories, made by bitsandbytes and by float8 of torch, and plain ones."""

import json

import torch
from safetensors.torch import load_file, save_file

LINEARS = ("_proj.weight", "fc1.weight", "fc2.weight", "linear_1.weight", "linear_2.weight")
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
BITS = {"quant_method": "bitsandbytes", "llm_int8_threshold": 6.0, "llm_int8_skip_modules": None}
FOUR = BITS | {"load_in_4bit": True, "_load_in_4bit": True, "bnb_4bit_compute_dtype": "bfloat16"}
KINDS = {
    "fp8 blocks": FP8 | {"weight_block_size": [16, 28], "fmt": "e4m3"},
    "fp8 tensors": FP8 | {"activation_scheme": "static", "weight_block_size": None},
    "fp8 features": {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0},
    "nf4": FOUR | {"bnb_4bit_quant_type": "nf4"},
    "nf4 nested": FOUR | {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": FOUR | {"bnb_4bit_quant_type": "fp4"},
    "int8": BITS | {"load_in_8bit": True},
}


def spread(scales, shape, block):
    """Scales of blocks as factors of all numbers; the last blocks may be partial."""
    rows = scales.float().repeat_interleave(block[0], 0)[: shape[0]]
    return rows.repeat_interleave(block[1], 1)[:, : shape[1]]


def to_float8(weight, block, scale_dtype=torch.float32):
    """Numbers, scales (ceil(out / block), ceil(in / block)) and the weights that they stand for."""
    grid = [-(-size // one) for size, one in zip(weight.shape, block, strict=True)]
    scales = torch.empty(grid)
    for i in range(grid[0]):
        for j in range(grid[1]):
            part = weight[i * block[0] :, j * block[1] :][: block[0], : block[1]]
            scales[i, j] = part.abs().max() / 448
    scales = scales.to(scale_dtype)
    factors = spread(scales, weight.shape, block)
    numbers = (weight / factors).clamp(-448, 448).to(torch.float8_e4m3fn)
    return numbers, scales, numbers.float() * factors


def to_bits(weight, **options):
    """Tensors by the ends of their names, and the weights of bitsandbytes in float32."""
    from bitsandbytes import functional

    numbers, state = functional.quantize_4bit(weight, **options)
    with torch.compiler.set_stance("force_eager"):  # it compiles what has odd sizes
        values = functional.dequantize_4bit(numbers, state)
    parts = {f"weight.{part}": value for part, value in state.as_dict(packed=True).items()}
    return {"weight": numbers, **parts}, values.float()


def quantize(kind, weight):
    """Tensors of a weight by the ends of their names, and the weights that they stand for."""
    if kind == "int8":
        from bitsandbytes import functional

        numbers, scales, _ = functional.int8_vectorwise_quant(weight.half())
        layout = torch.tensor(0, dtype=torch.uint8)
        tensors = {"weight": numbers, "SCB": scales, "weight_format": layout}
        return tensors, functional.int8_vectorwise_dequant(numbers, scales)
    if not kind.startswith("fp8"):
        scheme, _, nested = kind.partition(" ")
        return to_bits(weight, quant_type=scheme, compress_statistics=bool(nested))
    size = tuple(weight.shape)
    blocks = {"fp8 blocks": (16, 28), "fp8 tensors": size, "fp8 features": (1, size[1])}
    numbers, scales, values = to_float8(weight, blocks[kind])
    if kind == "fp8 features":
        return {"weight": numbers, "weight_scale": scales}, values
    if kind == "fp8 blocks":
        return {"weight": numbers, "weight_scale_inv": scales}, values
    one = torch.tensor(0.5)
    more = {"weight_scale_inv": scales.reshape(()), "activation_scale": one}
    return {"weight": numbers, **more}, values


def pack(plain, target, kind, shards=1, only=""):
    """Write `target`, the quantised form of a directory of one file, and the weights that it stands
    for into `plain`. `only` is in the names of the weights that are quantised.
    """
    torch.set_num_threads(1)
    tensors, new = load_file(plain / "model.safetensors"), {}
    for name in list(tensors):
        if not name.endswith(LINEARS) or only not in name:
            new[name] = tensors[name]
            continue
        parts, tensors[name] = quantize(kind, tensors[name].float())
        stem = name.removesuffix("weight")
        new |= {f"{stem}{part}": value.contiguous() for part, value in parts.items()}
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
    target.mkdir()
    for file in plain.iterdir():
        if file.name not in ("model.safetensors", "config.json"):
            (target / file.name).write_bytes(file.read_bytes())
    config = json.loads((plain / "config.json").read_text()) | {"quantization_config": KINDS[kind]}
    (target / "config.json").write_text(json.dumps(config))
    write(target, new, shards)
    return target


def write(directory, tensors, shards=1):
    """With two shards the parts of most weights are apart."""
    files = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    files = files if shards > 1 else ["model.safetensors"]
    where = {name: files[i % len(files)] for i, name in enumerate(sorted(tensors))}
    for file in files:
        own = {name: tensors[name] for name in tensors if where[name] == file}
        save_file(own, directory / file, metadata={"format": "pt"})
    if shards > 1:
        index = {"metadata": {}, "weight_map": where}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
