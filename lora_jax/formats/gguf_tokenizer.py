"""The tokenizer of a GGUF file, rebuilt with the `tokenizers` library.

tokenizer.ggml.model   gpt2    byte-level BPE with merges, cut first as tokenizer.ggml.pre says
                       llama   SentencePiece as Gemma 3 has it: pieces with "▁" for a space,
                               bytes for what has no piece, no merges in the file
"""

from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from lora_jax.config import shown
from lora_jax.errors import UserError

GPT2_SPLIT = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How text is cut before the merges, by tokenizer.ggml.pre. A wrong guess would change token ids in
# silence: transformers' own conversion does not know `smollm` and gives "  5" other tokens.
PRE_TOKENIZERS = {
    "gpt-2": GPT2_SPLIT,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2_SPLIT]),
    "llama-bpe": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
}
CONTROL, USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type
SPACE = "▁"


def metadata_value(metadata: dict[str, Any], key: str, kind: type, source: Path) -> Any:
    if key not in metadata:
        raise UserError(f"{source} has no metadata {key!r}, which a conversion needs")
    value = metadata[key]
    if not isinstance(value, (int, float) if kind is float else kind) or (
        kind is int and value < 1
    ):
        raise UserError(
            f"{source}: metadata {key}={shown(repr(value))} is not supported, one positive "
            f"{kind.__name__} is"
        )
    return value


def read_tokenizer(
    metadata: dict[str, Any], config: dict[str, Any], source: Path
) -> tuple[Tokenizer, dict[str, Any]]:
    """tokenizer.json and tokenizer_config.json."""
    kind = metadata_value(metadata, "tokenizer.ggml.model", str, source)
    expected, build = KINDS[config["model_type"]]
    if kind != expected:
        raise UserError(
            f"{source} has tokenizer {kind!r}; supported for {config['model_type']}: {expected}"
        )
    tokens = metadata_value(metadata, "tokenizer.ggml.tokens", list, source)
    types = metadata_value(metadata, "tokenizer.ggml.token_type", list, source)
    if (
        len(set(tokens)) != len(tokens)
        or len(types) != len(tokens)
        or len(tokens) > config["vocab_size"]
    ):
        raise UserError(
            f"{source} has {len(tokens)} tokens ({len(set(tokens))} distinct), {len(types)} types"
            f" and {config['vocab_size']} embeddings: damaged or not supported"
        )
    names: dict[str, str] = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if index is not None:
            if not 0 <= index < len(tokens):
                raise UserError(
                    f"{source}: {key}_token_id={index} is outside of the {len(tokens)} tokens"
                )
            names[f"{name}_token"] = tokens[index]
    tokenizer, always_bos = build(metadata, tokens, names, source)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    for special, mark in ((True, CONTROL), (False, USER_DEFINED)):
        added = [token for token, type_ in zip(tokens, types, strict=True) if type_ == mark]
        # Runs of spaces are marked too, as they are in text; the model has them with its own sign.
        added = [token for token in added if kind == "gpt2" or token.strip(" ")]
        tokenizer.add_tokens(
            [AddedToken(token, normalized=False, special=special) for token in added]
        )
    around = [
        names.get(f"{side}_token")
        if metadata.get(f"tokenizer.ggml.add_{side}_token", side == "bos" and always_bos)
        else None
        for side in ("bos", "eos")
    ]
    if any(around):
        bos, eos = ([token] if token else [] for token in around)
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*bos, "$A", *eos],
            special_tokens=[(token, vocabulary[token]) for token in {*bos, *eos}],
        )
    extra = (
        {"chat_template": metadata["tokenizer.chat_template"]}
        if "tokenizer.chat_template" in metadata
        else {}
    )
    return tokenizer, {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        **names,
        **extra,
    }


def _byte_level(
    metadata: dict[str, Any], tokens: list[str], names: dict[str, str], source: Path
) -> tuple[Tokenizer, bool]:
    """A byte-level BPE tokenizer without its marked tokens, and whether text begins with BOS where
    the file does not say.
    """
    pre = metadata_value(metadata, "tokenizer.ggml.pre", str, source)
    if pre not in PRE_TOKENIZERS:
        raise UserError(
            f"{source} has pre-tokenizer {pre!r}; supported: {', '.join(PRE_TOKENIZERS)}"
        )
    found = metadata_value(metadata, "tokenizer.ggml.merges", list, source)
    merges = [tuple(merge.split(" ", 1)) for merge in found]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    try:
        # Llama 3 takes a word that is a token as it stands, also where no merges lead to it.
        model = models.BPE(vocabulary, merges, ignore_merges=pre == "llama-bpe")
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{source}: its tokens and merges do not fit together: {error}") from error
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[pre]
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer, pre == "llama-bpe"


def _sentencepiece(
    metadata: dict[str, Any], tokens: list[str], names: dict[str, str], source: Path
) -> tuple[Tokenizer, bool]:
    """As `_byte_level`, for Gemma's pieces."""
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        raise UserError(
            f"{source}: its tokenizer puts a space before text (tokenizer.ggml.add_space_prefix),"
            " which Gemma's does not: not supported"
        )
    if "unk_token" not in names:
        raise UserError(f"{source} has no metadata 'tokenizer.ggml.unknown_token_id'")
    pieces = [token if token.strip(" ") else SPACE * len(token) for token in tokens]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    # Pieces are in the order in which training merged them; their scores in the file are not.
    merges = [
        (piece[:cut], piece[cut:])
        for piece in pieces
        for cut in range(len(piece) - 1, 0, -1)
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    model = models.BPE(
        vocabulary, merges, unk_token=names["unk_token"], fuse_unk=True, byte_fallback=True
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer, True


# tokenizer.ggml.model and what reads it, by the model_type of config.json.
KINDS = {"llama": ("gpt2", _byte_level), "gemma3_text": ("llama", _sentencepiece)}
