"""Text towers of vision-language models: the decoder of another family inside a wrapper.

model / language_model / embed_tokens, layers, norm    as in the family of the text
lm_head / kernel

Only the text is read; tensors of images stay in the files, and an export copies them.
"""

from collections.abc import Mapping
from typing import Any

from flax import nnx
from jax.sharding import PartitionSpec

from lora_jax.models.common import Names
from lora_jax.models.decoder import Decoder
from lora_jax.models.reader import ConfigReader

Rules = tuple[tuple[str, PartitionSpec], ...]

# Fields of config.json about images.
IMAGES = (
    *("vision_config", "image_token_id", "image_token_index", "video_token_id"),
    *("vision_start_token_id", "vision_end_token_id", "vision_token_id"),
)
# Files of transformers 4 have the text and the images side by side.
LLAVA = Names(
    carried=("vision_tower", "multi_modal_projector"),
    moved=(
        ("language_model.model.", "model.language_model."),
        ("language_model.lm_head.", "lm_head."),
    ),
)
QWEN = Names(
    carried=("visual",),
    moved=(
        ("model.language_model.", "model.language_model."),
        ("model.", "model.language_model."),
    ),
)


def tower_rules(rules: Rules, name: str = "language_model") -> Rules:
    """Return the rules of a family for the paths of its tower."""
    start = r"model\."
    return tuple(
        (pattern.replace(start, rf"{start}{name}\.", 1) if pattern.startswith(start) else pattern,
         spec)
        for pattern, spec in rules
    )  # fmt: skip


def read_text(
    reader: ConfigReader, model_type: str, ties: bool, usual: Mapping[str, Any] | None = None
) -> ConfigReader:
    """Return a reader of `text_config`.

    Args:
        reader: the fields of config.json.
        model_type: that of the text.
        ties: default of `tie_word_embeddings`, which is read outside of `text_config`.
        usual: fields of a file without `text_config`.
    """
    reader.inert(*IMAGES)
    tied = reader.boolean("tie_word_embeddings", ties)
    given = reader.content.get("text_config")
    text = reader.inside(
        "text_config", (usual or {}) if given is None else {}, {"tie_word_embeddings": tied}
    )
    text.model_type = model_type
    text.only("model_type", model_type)
    return text


def without_sections(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return fields of config.json whose rotary settings have no sections for time, height and
    width: these are the same position in a text.
    """
    found = dict(content)
    for name in ("rope_scaling", "rope_parameters"):
        if isinstance(given := content.get(name), Mapping):
            dropped = ("mrope_section", "mrope_interleaved")
            found[name] = {
                key: "default" if key in ("type", "rope_type") and value == "mrope" else value
                for key, value in given.items()
                if key not in dropped
            }
    return found


class Wrapper(nnx.Module):
    """Container that gives a decoder the module path of the wrapper."""

    def __init__(self, name: str, decoder: nnx.Module):
        setattr(self, name, decoder)


class Tower(nnx.Module):
    """Mixin that puts the decoder of a model below `model.NAME`."""

    NAME = "language_model"

    def __init__(self, config: Any, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)  # type: ignore[call-arg]
        self.model = Wrapper(self.NAME, self.model)

    @property
    def decoder(self) -> Decoder:
        return getattr(self.model, self.NAME)
