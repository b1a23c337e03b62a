"""Models that read images, of which the text tower is ours: the table that their tests go through.

A new one is one more row of `TOWERS`.
"""

from dataclasses import dataclass, field
from typing import Any

from .families import DELTA, FULL, GIVEN, IMPLIED, LINEAR, SCALED, SLIDING, theta


@dataclass(frozen=True)
class Tower:
    """Classes in transformers, fields of tiny towers of text and images, and names of tensors in
    files of other versions: regexes and what replaces their matches.
    """

    config_class: str
    model_class: str
    text: dict[str, dict[str, Any]]  # variants of text_config
    images: dict[str, Any]
    more: dict[str, Any] = field(default_factory=dict)
    old: tuple[tuple[str, str], ...] = ()


SMALL = dict(hidden_size=16, intermediate_size=20, num_hidden_layers=1, num_attention_heads=2)
LLAVA = (
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.", ""),
)
VISUAL = ((r"^model\.visual\.", "visual."), (r"^model\.language_model\.", "model."))
QWEN_IMAGES = dict(
    depth=1, hidden_size=16, intermediate_size=20, num_heads=2, patch_size=4, out_hidden_size=36
)
# Tokens of images would be among those of the tests in a vocabulary of 97.
GEMMA4 = GIVEN | dict(
    num_hidden_layers=5,
    layer_types=[SLIDING, FULL, SLIDING, SLIDING, FULL],
    sliding_window=9,
    global_head_dim=12,
    vocab_size_per_layer_input=97,
    pad_token_id=0,
)


def sections(*numbers: int, **more: Any) -> dict[str, Any]:
    return theta(500.0, mrope_section=list(numbers), **more)


TOWERS = {
    "gemma3": Tower(
        "Gemma3Config",
        "Gemma3ForConditionalGeneration",
        {
            "two rotations": GIVEN
            | dict(
                sliding_window=9,
                layer_types=[SLIDING, FULL, SLIDING],
                query_pre_attn_scalar=24,
                rope_parameters={
                    FULL: dict(rope_type="linear", rope_theta=500.0, factor=4.0),
                    SLIDING: theta(100.0),
                },
            ),
            "biases": GIVEN | dict(attention_bias=True, sliding_window=5),
        },
        SMALL | dict(image_size=28, patch_size=14),
        dict(mm_tokens_per_image=4, image_token_index=96),
        LLAVA,
    ),
    "gemma4": Tower(
        "Gemma4Config",
        "Gemma4ForConditionalGeneration",
        {
            "keys as values": GEMMA4
            | dict(
                hidden_size_per_layer_input=0,
                attention_k_eq_v=True,
                num_global_key_value_heads=3,
                use_bidirectional_attention="vision",
            ),
            "shared keys, inputs of layers": GEMMA4
            | dict(num_kv_shared_layers=2, hidden_size_per_layer_input=5, rms_norm_eps=0.3),
        },
        SMALL | dict(num_key_value_heads=2, head_dim=8, patch_size=4, position_embedding_size=8),
        dict(
            audio_config=dict(
                hidden_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                subsampling_conv_channels=[4, 2],
                output_proj_dims=12,
            ),
            image_token_id=96,
            video_token_id=95,
            audio_token_id=94,
        ),
    ),
    "mistral3": Tower(
        "Mistral3Config",
        "Mistral3ForConditionalGeneration",
        {
            "window": GIVEN | dict(model_type="mistral", sliding_window=5),
            "plain": GIVEN | dict(model_type="mistral", sliding_window=None),
            "ministral3": GIVEN | dict(model_type="ministral3", rope_parameters=SCALED),
        },
        SMALL | dict(image_size=28, patch_size=14, head_dim=8),
        dict(image_token_index=96, tie_word_embeddings=False),
        LLAVA,
    ),
    "smolvlm": Tower(
        "SmolVLMConfig",
        "SmolVLMForConditionalGeneration",
        {
            "biases": GIVEN | dict(model_type="llama", attention_bias=True, mlp_bias=True),
            "plain": GIVEN | dict(model_type="llama"),
        },
        SMALL | dict(image_size=28, patch_size=14),
        dict(image_token_id=96),
    ),
    "qwen2_5_vl": Tower(
        "Qwen2_5_VLConfig",
        "Qwen2_5_VLForConditionalGeneration",
        {
            "window": IMPLIED
            | dict(
                use_sliding_window=True,
                sliding_window=5,
                max_window_layers=1,
                rope_parameters=sections(1, 1, 1),
            ),
            "plain": IMPLIED | dict(rope_parameters=sections(1, 1, 1)),
        },
        QWEN_IMAGES,
        dict(image_token_id=96, video_token_id=95, vision_start_token_id=94)
        | dict(vision_end_token_id=93, tie_word_embeddings=True),
        VISUAL,
    ),
    "qwen3_vl": Tower(
        "Qwen3VLConfig",
        "Qwen3VLForConditionalGeneration",
        {
            "biases": GIVEN
            | dict(attention_bias=True, rope_parameters=sections(2, 1, 1, mrope_interleaved=True)),
            "plain": GIVEN | dict(rope_parameters=sections(2, 1, 1, mrope_interleaved=True)),
        },
        QWEN_IMAGES | dict(num_position_embeddings=16, deepstack_visual_indexes=[0]),
        dict(image_token_id=96, video_token_id=95, vision_start_token_id=94)
        | dict(vision_end_token_id=93),
    ),
    "qwen3_5": Tower(
        "Qwen3_5Config",
        "Qwen3_5ForConditionalGeneration",
        {
            "biases": DELTA
            | dict(
                layer_types=[LINEAR, FULL, LINEAR, LINEAR, FULL],
                attention_bias=True,
                rope_parameters=sections(1, 0, 0, partial_rotary_factor=0.25),
            ),
            "plain": DELTA,
        },
        QWEN_IMAGES | dict(num_position_embeddings=16),
        dict(image_token_id=96, video_token_id=95, vision_start_token_id=94)
        | dict(vision_end_token_id=93),
    ),
}


def config_of(name: str, variant: str) -> dict[str, Any]:
    """Return the fields of config.json of a tiny model."""
    row = TOWERS[name]
    return {"text_config": row.text[variant], "vision_config": row.images} | row.more
