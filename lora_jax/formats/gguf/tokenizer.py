"""The tokenizer of a GGUF file, rebuilt with the `tokenizers` library.

tokenizer.ggml.model   gpt2    byte-level BPE with merges, after the split of tokenizer.ggml.pre
                       llama   SentencePiece of Gemma 3: pieces with "▁" for a space, bytes for
                               text without a piece, no merges in the file
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

from lora_jax.errors import UserError
from lora_jax.formats.gguf.metadata import metadata_value

GPT2_SPLIT = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Split of the text before merges, by tokenizer.ggml.pre. A wrong one would change token ids
# silently: the conversion of transformers does not know `smollm` and gives "  5" other tokens.
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


def read_tokenizer(
    metadata: dict[str, Any], config: dict[str, Any], source: Path
) -> tuple[Tokenizer, dict[str, Any]]:
    """Return the tokenizer (tokenizer.json) and the content of tokenizer_config.json.

    Raises:
        UserError: a tokenizer that is damaged, not supported, or does not fit the model.
    """
    kind = metadata_value(metadata, "tokenizer.ggml.model", str, source)
    expected, build = KINDS[config["model_type"]]
    if kind != expected:
        raise UserError(
            f"{source} has tokenizer {kind!r}; supported for {config['model_type']}: {expected}"
        )
    tokens, types = _read_tokens(metadata, config["vocab_size"], source)
    names = _special_names(metadata, tokens, source)
    tokenizer, always_bos = build(metadata, tokens, names, source)
    for special, mark in ((True, CONTROL), (False, USER_DEFINED)):
        added = [token for token, type_ in zip(tokens, types, strict=True) if type_ == mark]
        # Runs of spaces are marked too, as they are in text; the model has them with its own sign.
        added = [token for token in added if kind == "gpt2" or token.strip(" ")]
        tokenizer.add_tokens(
            [AddedToken(token, normalized=False, special=special) for token in added]
        )
    _add_bos_and_eos(tokenizer, metadata, tokens, names, always_bos)
    key = "tokenizer.chat_template"
    return tokenizer, {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        **names,
        **({"chat_template": metadata[key]} if key in metadata else {}),
    }


def _read_tokens(
    metadata: dict[str, Any], vocab_size: int, source: Path
) -> tuple[list[str], list[int]]:
    """Return the tokens by id, and the type of each."""
    tokens = metadata_value(metadata, "tokenizer.ggml.tokens", list, source)
    types = metadata_value(metadata, "tokenizer.ggml.token_type", list, source)
    distinct = len(set(tokens))
    if distinct != len(tokens) or len(types) != len(tokens) or len(tokens) > vocab_size:
        raise UserError(
            f"{source} has {len(tokens)} tokens ({distinct} distinct), {len(types)} types"
            f" and {vocab_size} embeddings: damaged or not supported"
        )
    return tokens, types


def _special_names(metadata: dict[str, Any], tokens: list[str], source: Path) -> dict[str, str]:
    """Return the special tokens that the file names, as {"bos_token": ..}."""
    names: dict[str, str] = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if index is not None:
            if not 0 <= index < len(tokens):
                raise UserError(
                    f"{source}: {key}_token_id={index} is outside of the {len(tokens)} tokens"
                )
            names[f"{name}_token"] = tokens[index]
    return names


def _add_bos_and_eos(
    tokenizer: Tokenizer,
    metadata: dict[str, Any],
    tokens: list[str],
    names: dict[str, str],
    always_bos: bool,
) -> None:
    """Let the tokenizer put BOS and EOS around a text where the file asks for them. `always_bos`
    is the default for BOS.
    """
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
            special_tokens=[(token, tokens.index(token)) for token in {*bos, *eos}],
        )


def _byte_level(
    metadata: dict[str, Any], tokens: list[str], names: dict[str, str], source: Path
) -> tuple[Tokenizer, bool]:
    """Return a byte-level BPE tokenizer without added tokens, and the default for adding BOS."""
    pre = metadata_value(metadata, "tokenizer.ggml.pre", str, source)
    if pre not in PRE_TOKENIZERS:
        raise UserError(
            f"{source} has pre-tokenizer {pre!r}; supported: {', '.join(PRE_TOKENIZERS)}"
        )
    found = metadata_value(metadata, "tokenizer.ggml.merges", list, source)
    merges = [tuple(merge.split(" ", 1)) for merge in found]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    try:
        # Llama 3 uses a word that is a token without merges, even if no merges lead to it.
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
    """Return the tokenizer of Gemma's pieces; results as in `_byte_level`."""
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        raise UserError(
            f"{source}: its tokenizer puts a space before text (tokenizer.ggml.add_space_prefix),"
            " which Gemma's does not: not supported"
        )
    if "unk_token" not in names:
        raise UserError(f"{source} has no metadata 'tokenizer.ggml.unknown_token_id'")
    pieces = [token if token.strip(" ") else SPACE * len(token) for token in tokens]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    # Pieces are in the order of their merges in training; the scores in the file are not.
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


# tokenizer.ggml.model and its reader, by the model_type of config.json.
KINDS = {"llama": ("gpt2", _byte_level), "gemma3_text": ("llama", _sentencepiece)}
