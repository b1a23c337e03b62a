"""Fields of config.json with the same meaning in every family.

HARMLESS     have no effect on the forward pass, whatever their value
TRAINING     noise in training, such as dropout; there is none in evaluation, nor in training here
RESTRICTED   change the results in transformers, except with the values listed
QUANTIZED    describe quantised weights

Fields of a family are read by its `read_config`. Together they cover all fields that transformers
reads for these families.
"""

from typing import Any

HARMLESS = frozenset(
    # Origin of the files: names, classes, versions, tools. `formats` reads transformers_weights.
    """
    _commit_hash _name_or_path architectures auto_map custom_pipelines finetuning_task
    is_llama_config language model_name model_type name name_or_path transformers.js_config
    transformers_version transformers_weights unsloth_fixed unsloth_version
    """.split()
    # Form of the output.
    + """
    id2label label2id num_labels _num_labels output_attentions output_hidden_states output_past
    output_scores problem_type return_dict return_dict_in_generate summary_first_dropout
    summary_last_dropout task_specific_params
    tf_legacy_loss tie_last_hidden_states torchscript use_return_dict
    """.split()
    # Implementation and storage: other programs for the same numbers.
    + """
    _attn_implementation _attn_implementation_autoset _experts_implementation
    _flash_attn_2_enabled attn_implementation chunk_size_feed_forward distributed_config dtype
    experts_implementation flash_attention gradient_checkpointing pretraining_tp torch_dtype
    use_bfloat16 use_cache use_flash_attention use_flash_attention_2 use_flash_attn
    """.split()
    # Initial weights, and layers that predict further tokens from the same hidden states.
    + """
    init_std initializer_factor initializer_range mtp_layer_types mtp_mlp_layer_types
    mtp_per_layer_config num_mtp_layers num_nextn_predict_layers
    """.split()
    # Token ids and lengths that the tokenizer decides.
    + """
    bos_token_id cls_token_id decoder_start_token_id eos_token_id mask_token_id max_seq_length
    max_sequence_length model_max_length pad_token_id prefix sep_token_id tokenizer_class
    tokenizer_model_max_length tokenizer_padding_side unk_token_id
    """.split()
    # Generation: transformers moves them to generation_config.json.
    + """
    assistant_confidence_threshold assistant_early_exit bad_words_ids begin_suppress_tokens
    cache_config cache_implementation diversity_penalty do_sample early_stopping
    encoder_no_repeat_ngram_size encoder_repetition_penalty epsilon_cutoff eta_cutoff
    exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id guidance_scale
    length_penalty max_length max_new_tokens max_time min_length min_new_tokens min_p
    no_repeat_ngram_size num_beam_groups num_beams num_return_sequences penalty_alpha
    remove_invalid_values renormalize_logits repetition_penalty sequence_bias stop_strings
    suppress_tokens temperature token_healing top_h top_k top_p typical_p
    """.split()
    # Of encoders that are decoders too (families that have these roles refuse them), and of Qwen.
    + """
    add_cross_attention cross_attention_hidden_size is_decoder is_encoder_decoder
    max_window_layers tie_encoder_decoder
    """.split()
)

TRAINING = frozenset(
    """
    activation_dropout attention_dropout attention_probs_dropout_prob attn_pdrop
    classifier_dropout dropout embd_pdrop embedding_dropout hidden_dropout hidden_dropout_prob
    layerdrop mlp_dropout resid_pdrop residual_dropout router_jitter_noise seq_classif_dropout
    """.split()
)

# Supported values of a field, and the effect of others.
RESTRICTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "is_causal": ((True,), "transformers then lets tokens see those after them"),
    "attention_chunk_size": ((None,), "attention in chunks"),
    "sliding_window": ((None,), "transformers has no window in this family, but in its cache"),
    "kv_sharing_modes": ((None,), "layers that share keys and values"),
    "per_layer_config": ((None, {}), "layers of different shapes"),
    "first_k_dense_replace": ((None, 0), "layers of different kinds"),
    "mlp_layer_types": ((None,), "layers of different kinds"),
    "number_of_conv_states": ((None,), "layers of convolutions"),
    "pruned_heads": ((None, {}), "layers with fewer heads"),
    "fusion_config": ((None, {}), "other modules"),
    "unpadded_vocab_size": ((None,), "a vocabulary that is cut"),
    "num_heads": ((None,), "num_attention_heads is the field"),
    "embed_dim": ((None,), "hidden_size is the field"),
    # In families whose `read_config` does not read them.
    "head_dim": ((None,), "it follows from other fields in this family"),
    "num_key_value_heads": ((None,), "all heads have keys and values in this family"),
    "layer_types": ((None,), "all layers are alike in this family"),
    "partial_rotary_factor": ((None, 1), "heads are rotated in full in this family"),
    **{
        name: ((None, {}), "positions are learned in this family")
        for name in ("rope_theta", "rope_scaling", "rope_parameters")
    },
    "original_max_position_embeddings": ((None,), "positions are learned in this family"),
}

QUANTIZED = frozenset({"quantization_config", "quantization", "compression_config"})
