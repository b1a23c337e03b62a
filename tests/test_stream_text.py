"""Pieces of text against the text that the tokenizer decodes from all tokens."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from lora_jax import UserError
from lora_jax.generate.text import TextStream, check_stop_strings

TEXT = "héllo, wörld 👩‍👧 e\u0301\u0302 你好。สวัสดี \ufffd it's  fine"
WORDS = (
    "hello",
    "world",
    "b",
    "c",
    ".",
    ",",
    "'",
    "n't",
    "'m",
    "s",
    "你",
    "👩‍👧",
    "e\u0301",
    "\ufffd",
)
BYTES = tuple(f"<0x{byte:02X}>" for byte in (0x20, 0x41, 0xC3, 0xA9, 0xE4, 0xBD, 0xA0, 0xF0, 0xFF))
SPECIAL = ("<s>", "<|end|>")


def fast(model, decoder, **options):
    """A tokenizer of the vocabulary of a model, with `SPECIAL`."""
    backend = Tokenizer(model)
    if decoder is not None:
        backend.decoder = decoder
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return PreTrainedTokenizerFast(tokenizer_object=backend, **options)


def words(tokens, decoder, **options):
    vocab = {token: i for i, token in enumerate(("[UNK]", *tokens))}
    return fast(models.WordPiece(vocab=vocab, unk_token="[UNK]"), decoder, **options)


def byte_level():
    """Bytes, and tokens of several that begin or end inside a character."""
    letters = pre_tokenizers.ByteLevel.alphabet()
    mapped = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    [(text, _)] = mapped.pre_tokenize_str(TEXT)
    parts = {text[i : i + n] for n in (2, 3, 5) for i in range(0, len(text) - n, 3)}
    vocab = {token: i for i, token in enumerate((*sorted(letters), *sorted(parts)))}
    tokenizer = fast(models.BPE(vocab=vocab, merges=[]), decoders.ByteLevel())
    tokenizer.backend_tokenizer.pre_tokenizer = mapped
    return tokenizer


def llama(*strip, **options):
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    pieces = ("▁", "▁▁", *(f"▁{word}" for word in WORDS), *WORDS, *BYTES)
    vocab = {token: i for i, token in enumerate(pieces)}
    return fast(models.BPE(vocab=vocab, merges=[]), decoders.Sequence(steps), **options)


def unigram(**options):
    pieces = ("<unk>", "▁", "▁▁", *(f"▁{word}" for word in WORDS), *WORDS)
    model = models.Unigram([(piece, 0.0) for piece in pieces], 0, False)
    return fast(model, decoders.Metaspace(), **options)


class Python(PreTrainedTokenizer):
    """A tokenizer in Python."""

    def __init__(self, tokens, join, **options):
        self.pieces, self.join = ["[UNK]", *tokens], join
        super().__init__(unk_token="[UNK]", eos_token="<|end|>", **options)

    @property
    def vocab_size(self):
        return len(self.pieces)

    def get_vocab(self):
        return {token: i for i, token in enumerate(self.pieces)} | self.added_tokens_encoder

    def _convert_token_to_id(self, token):
        return self.pieces.index(token) if token in self.pieces else 0

    def _convert_id_to_token(self, index):
        return self.pieces[index] if index < len(self.pieces) else None

    def convert_tokens_to_string(self, tokens):
        return self.join(filter(None, tokens))


def joined(**options):
    """ "@@" at the end of a token joins it with the next."""
    tokens = (*WORDS, *(f"{word}@@" for word in WORDS))
    return Python(tokens, lambda own: " ".join(own).replace("@@ ", "").strip(), **options)


def python_bytes():
    """Each byte that is not part of a character is one "\ufffd"."""

    def join(tokens):
        letters = b"".join(bytes.fromhex(token) if len(token) == 2 else b"" for token in tokens)
        text = letters.decode("utf-8", "surrogateescape")
        return "".join("\ufffd" if "\udc80" <= letter <= "\udcff" else letter for letter in text)

    return Python([token[3:5] for token in BYTES], join)


TOKENIZERS = {
    "byte level": byte_level(),
    "metaspace": unigram(),
    "metaspace, spaces removed": unigram(clean_up_tokenization_spaces=True),
    "byte fallback": llama(),
    "byte fallback, stripped": llama(decoders.Strip(" ", 1, 0)),
    "byte fallback, two stripped": llama(decoders.Strip(" ", 2, 0)),
    "byte fallback, setting ignored": llama(clean_up_tokenization_spaces=True),
    "word pieces": words((*WORDS, *(f"##{word}" for word in WORDS)), decoders.WordPiece()),
    "word pieces, spaces removed": words(
        (*WORDS, *(f"##{word}" for word in WORDS)),
        decoders.WordPiece(cleanup=False),
        clean_up_tokenization_spaces=True,
    ),
    "suffixes": words((*WORDS, *(f"{word}</w>" for word in WORDS)), decoders.BPEDecoder()),
    "no decoder": words(WORDS, None),
    "letters, spaces removed": fast(
        models.WordLevel({letter: i for i, letter in enumerate(" n'tmsver.?")}, unk_token="?"),
        decoders.Fuse(),
        clean_up_tokenization_spaces=True,
    ),
    "Python": joined(),
    "Python, spaces removed": joined(clean_up_tokenization_spaces=True),
    "Python, bytes": python_bytes(),
}


def decode(name, tokens):
    return TOKENIZERS[name].decode(tokens, skip_special_tokens=True)


def some(data, name, least=0):
    """Tokens, some of which are special, and some not in the vocabulary."""
    return data.draw(st.lists(st.integers(0, len(TOKENIZERS[name])), min_size=least, max_size=24))


def read(data, stream, tokens):
    """Pieces of the tokens, passed on in random groups."""
    pieces = []
    while tokens:
        count = data.draw(st.integers(1, 5))
        pieces.append(stream.add(tokens[:count]))
        tokens = tokens[count:]
    return [*pieces, stream.end()]


def cut(text, stops):
    """The text before the stop string that is complete first."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


@pytest.mark.parametrize("name", TOKENIZERS)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_pieces_are_the_decoded_text(name, data):
    tokens = some(data, name)
    stream = TextStream(TOKENIZERS[name])
    pieces = read(data, stream, tokens)
    assert "".join(pieces) == stream.text == decode(name, tokens)
    assert stream.tokens == len(tokens) and stream.stopped_by is None
    assert stream.end() == ""


@given(st.lists(st.sampled_from((" ", " '", "n't", "'s", "'ve", "'re", ".", "'", "n")), max_size=9))
@settings(max_examples=300, deadline=None)
def test_spaces_that_later_letters_remove(parts):
    letters = TOKENIZERS["letters, spaces removed"]
    tokens = [letters.convert_tokens_to_ids(letter) for letter in "".join(parts)]
    stream = TextStream(letters)
    assert "".join(stream.add([token]) for token in tokens) + stream.end() == letters.decode(tokens)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_text_after_a_prompt(name, data):
    prompt, tokens = some(data, name), some(data, name)
    before = decode(name, prompt)
    whole = decode(name, prompt + tokens)
    stream = TextStream(TOKENIZERS[name], prompt)
    read(data, stream, tokens)
    if whole.startswith(before):  # unless the answer changes the end of the prompt
        rest = whole[len(before) :]
        assert stream.text in (rest, "\ufffd" + rest)
        assert stream.text == rest or before.endswith("\ufffd")


@pytest.mark.parametrize("name", TOKENIZERS)
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_stop_strings(name, data):
    include_stop = data.draw(st.booleans())
    tokens = some(data, name, least=3)
    text = decode(name, tokens)
    stops = data.draw(st.lists(st.text("hel wo.n'你", min_size=1, max_size=3), max_size=2))
    for _ in range(2 if text else 0):
        start = data.draw(st.integers(0, len(text) - 1))
        stops.append(text[start : start + data.draw(st.integers(1, 4))])
    stream = TextStream(TOKENIZERS[name], stop=stops, include_stop=include_stop)
    pieces = read(data, stream, tokens)
    expected, found = cut(text, stops)
    assert stream.stopped_by == found
    assert "".join(pieces) == stream.text == expected + (found or "" if include_stop else "")
    assert stream.tokens <= len(tokens)
    if found is not None and stream.tokens < len(tokens):
        assert found in decode(name, tokens[: stream.tokens])


def test_each_piece_comes_as_soon_as_it_is_certain():
    letters = TOKENIZERS["byte level"]
    stream = TextStream(letters)
    tokens = letters(TEXT)["input_ids"]
    given = []
    for i, token in enumerate(tokens, 1):
        stream.add([token])
        certain = letters.decode(tokens[:i]).rstrip("\ufffd")
        assert stream.text in (certain, letters.decode(tokens[:i])), i
        given.append(len(stream.text))
    assert len(set(given)) > 20


def test_a_part_of_a_stop_string_is_held_back_and_given_out():
    letters = TOKENIZERS["byte level"]
    stream = TextStream(letters, stop=["ENDE", "DON'T", "NO"])
    pieces = [stream.add(letters(one)["input_ids"]) for one in ("a EN", "D", "O", "N", "'", "S E")]
    assert pieces == ["a ", "", "EN", "", "", "DON'S "]
    assert stream.end() == "E" and stream.stopped_by is None and stream.text == "a ENDON'S E"


def test_tokens_after_a_stop_string_are_not_read():
    letters = TOKENIZERS["byte level"]
    stream = TextStream(letters, stop="\n\n")
    assert stream.add(letters("one\ntwo\n\nthree")["input_ids"]) == "one\ntwo"
    assert stream.tokens == 9 and stream.stopped_by == "\n\n"
    assert stream.add(letters("more")["input_ids"]) == stream.end() == ""
    assert stream.tokens == 9 and stream.text == "one\ntwo"


def test_a_stop_string_inside_of_a_token_cuts_it():
    tokenizer = TOKENIZERS["metaspace"]
    ids = tokenizer.convert_tokens_to_ids(["▁hello", "▁world", "▁b"])
    stream = TextStream(tokenizer, stop=["wor", "orl"], include_stop=True)
    assert stream.add(ids) == "hello wor"
    assert stream.stopped_by == "wor" and stream.tokens == 2


def test_the_space_after_a_prompt_is_kept():
    for name in ("metaspace", "byte fallback, stripped"):
        tokenizer = TOKENIZERS[name]
        hello, world = tokenizer.convert_tokens_to_ids(["▁hello", "▁world"])
        assert TextStream(tokenizer).add([world]) == "world"
        assert TextStream(tokenizer, [hello]).add([world]) == " world"
        assert TextStream(tokenizer, [hello] * 100).add([world, hello]) == " world hello"


def test_an_answer_completes_a_character_of_the_prompt():
    letters = TOKENIZERS["byte level"]
    tokens = letters("né")["input_ids"]
    stream = TextStream(letters, tokens[:2])
    assert stream.add(tokens[2:]) == "é"


def test_special_tokens_are_kept_on_request():
    letters = TOKENIZERS["byte level"]
    ids = [*letters("ab")["input_ids"], letters.convert_tokens_to_ids("<|end|>")]
    assert TextStream(letters).add(ids) == "ab"
    assert TextStream(letters, skip_special_tokens=False).add(ids) == "ab<|end|>"
    stream = TextStream(letters, stop="<|end|>", skip_special_tokens=False)
    assert stream.add(ids) == "ab" and stream.stopped_by == "<|end|>"


@pytest.mark.parametrize("stop", ([""], ["a", ""], [3], [b"a"], [None]))
def test_stop_strings_must_be_non_empty_strings(stop):
    with pytest.raises(UserError, match="stop strings must be non-empty strings, not "):
        check_stop_strings(stop)
    with pytest.raises(UserError, match="stop strings must be non-empty"):
        TextStream(TOKENIZERS["byte level"], stop=stop)


def test_stop_strings_are_one_or_several():
    assert check_stop_strings(None) == check_stop_strings([]) == ()
    assert check_stop_strings("END") == ("END",)
    assert check_stop_strings(["a", "b"]) == ("a", "b")
    with pytest.raises(UserError, match="stop=3 must be a string or several"):
        check_stop_strings(3)
    with pytest.raises(UserError, match="stop=b'a' must be a string or several"):
        check_stop_strings(b"a")
    with pytest.raises(UserError, match="stop strings must be non-empty strings, not ''"):
        check_stop_strings("")
