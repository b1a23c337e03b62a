"""Reading and writing of files: Hugging Face directories, GGUF, the hub, PEFT and loralib adapters.

model = load("path-or-hub-name")     # static structure + frozen params on the devices
"""

from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from lora_jax import hosts, models
from lora_jax.config import MeshConfig, expand, read_json
from lora_jax.formats.directories import new_directory_on_main as new_directory_on_main
from lora_jax.formats.gguf.adapter import gguf_adapter_problems as gguf_adapter_problems
from lora_jax.formats.gguf.adapter import write_gguf_adapter as write_gguf_adapter
from lora_jax.formats.gguf.model import gguf_model_problems as gguf_model_problems
from lora_jax.formats.gguf.model import write_gguf_model as write_gguf_model
from lora_jax.formats.gguf.model import write_gguf_model_files as write_gguf_model_files
from lora_jax.formats.gguf.modelfile import Chat as Chat
from lora_jax.formats.hub import public_name as public_name
from lora_jax.formats.hub import resolve as resolve
from lora_jax.formats.loralib import read_loralib as read_loralib
from lora_jax.formats.matrices import open_matrices as open_matrices
from lora_jax.formats.model_reader import read_params as read_params
from lora_jax.formats.model_tensors import has_own_head
from lora_jax.formats.model_tensors import missing_heads as missing_heads
from lora_jax.formats.model_writer import parse_size as parse_size
from lora_jax.formats.model_writer import write_model as write_model
from lora_jax.formats.model_writer import write_model_files as write_model_files
from lora_jax.formats.packed import find_notes as _packed_notes
from lora_jax.formats.peft import peft_problems as peft_problems
from lora_jax.formats.peft import read_adapter as read_adapter
from lora_jax.formats.peft import read_fingerprint as read_fingerprint
from lora_jax.formats.peft import read_stops as read_stops
from lora_jax.formats.peft import read_system_prompt as read_system_prompt
from lora_jax.formats.peft import read_template_kwargs as read_template_kwargs
from lora_jax.formats.peft import write_adapter as write_adapter
from lora_jax.formats.serving import file_rank as file_rank
from lora_jax.formats.serving import serving_problems as serving_problems
from lora_jax.formats.side_files import generation_stops as generation_stops
from lora_jax.formats.side_files import load_tokenizer as load_tokenizer
from lora_jax.formats.side_files import stop_tokens as stop_tokens
from lora_jax.formats.tensors import check_no_adapter
from lora_jax.models.common import Model
from lora_jax.sharding import make_mesh


def describe(
    directory: str | Path, ignore: Container[str] = (), labels: Sequence[str] | None = None
) -> Model:
    """Return the model of a Hugging Face directory with shapes in place of weights.

    If config.json ties the output head to the embedding and the files hold a different head, the
    model is untied, as in transformers, and a note is printed.

    Args:
        directory: a Hugging Face model directory.
        ignore: fields of config.json known not to affect results.
        labels: labels of a classifier; by default those of its config.

    Raises:
        UserError: a config.json that cannot be read or is not supported; an adapter in the same
            directory; files that cannot be read.

    Example:
        >>> model = formats.describe(directory)
        >>> type(model.params["model"]["norm"]["scale"]).__name__
        'ShapeDtypeStruct'
    """
    directory = expand(directory)
    content = read_json(directory / "config.json")
    check_no_adapter(directory)
    model = models.describe(content, ignore, labels)
    if has_own_head(directory, model):
        hosts.note(
            f"{directory / 'config.json'} ties the output head to the embedding, and "
            "lm_head.weight differs from it: the model is read as untied, as in transformers. "
            "PEFT's trainable_token_indices would still tie them: to train these, set "
            "tie_word_embeddings to false in that file"
        )
        content = {**content, "tie_word_embeddings": False}
        model = models.describe(content, ignore, labels)
    notes = (*model.notes, *_packed_notes(directory, model))
    return model.replace(directory=directory, notes=notes)


def load(
    spec: str | Path,
    *,
    mesh: Mesh | None = None,
    dtype: Any = None,
    ignore: Container[str] = (),
    labels: Sequence[str] | None = None,
) -> Model:
    """Load a model with its weights.

    Args:
        spec: a Hugging Face directory, a .gguf file, org/name on the hub, or demo:NAME.
        mesh: devices to shard the weights over; by default all devices, data-parallel, and plain
            arrays if there is one device.
        dtype: dtype of the weights, or "nf4" or "int8"; None keeps the dtype of the files.
        ignore: fields of config.json known not to affect results.
        labels: labels of a classifier; if they differ from those of the config, a new head starts
            at random.

    Raises:
        UserError: the model cannot be found or is not supported; its files do not match
            config.json; weights that are not finite.

    Example:
        >>> model = formats.load(directory)
        >>> logits = model.apply(model.params, np.array([[1, 2, 3]]))
        >>> logits.shape == (1, 3, model.config.vocab_size)
        True
    """
    directory = resolve(str(spec))
    model = describe(directory, ignore, labels)
    if mesh is None and len(jax.devices()) > 1:
        mesh = make_mesh(MeshConfig())
    params = read_params(directory, model, mesh, dtype)
    return model.replace(params=params)
