"""Quantised weights of a model directory as tensors of floats, which are dequantised slice by slice
as they are read.

    stored    NAME.weight (float8), NAME.weight_scale_inv        fp8
              NAME.weight (uint8), NAME.weight.absmax, ..        bitsandbytes
              NAME_blocks, NAME_scales                           mxfp4
    plain     NAME.weight, NAME

Each module has the layout of its files, and computes in float32. The dtype of a plain tensor is
the one that config.json names.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from lora_jax import tree
from lora_jax.errors import UserError, counted
from lora_jax.formats import bitsandbytes, fp8, mxfp4
from lora_jax.formats.tensors import FLOATS, Tensor, has_weights, list_tensors
from lora_jax.models import Model
from lora_jax.models.quantization import find_quantization

_DTYPES: dict[str, np.dtype] = {dtype.name: dtype for dtype in FLOATS.values()}


def joined(tensors: Mapping[str, Tensor], model: Model) -> dict[str, Tensor]:
    """Return the tensors of a model directory, with those that make up a quantised weight as one
    tensor.

    Raises:
        UserError: parts of a weight that are missing, damaged or do not fit each other, all of
            them listed.
    """
    plain, problems, kind = dict(tensors), [], ""
    found = find_quantization(model.hf_config)
    if () in model.names.experts.values():  # stacks of experts
        kind = "MXFP4"
        plain, problems = mxfp4.joined(plain)
    if not problems and found is not None and found.method == "fp8":
        kind = "FP8"
        plain, problems = fp8.joined(plain, found, _DTYPES[found.dtype])
    if not problems and found is not None and found.method == "bitsandbytes":
        kind = "bitsandbytes"
        plain, problems = bitsandbytes.joined(plain, _DTYPES[found.dtype])
    if problems:
        directory = min(tensor.file.parent for tensor in tensors.values())
        raise UserError(
            f"{directory}: weights in {kind} are damaged:\n  " + tree.summarize(problems)
        )
    return plain


def find_notes(directory: Path, model: Model) -> list[str]:
    """Return notes about tensors of a quantised model that are left out."""
    found = find_quantization(model.hf_config)
    if found is None or found.method != "fp8" or not has_weights(directory):
        return []
    count = sum(map(fp8.is_left_out, list_tensors(directory)))
    if not count:
        return []
    return [f"{counted(count, 'scale')} of activations left out: only weights are in FP8 here"]
