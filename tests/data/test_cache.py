"""The tokenised cache gives back what was built, bit for bit, and never anything else."""

import dataclasses
import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_jax import data
from lora_jax.data import Cached, Counts, Example, cached_examples, code_version, digest_files
from lora_jax.errors import UserError

KEY = {"data": "d", "tokenizer": "t", "template": "c", "settings": "s", "code": "v"}


def counts(examples, **changes) -> Counts:
    """Counts whose fields are all different."""
    names = [field.name for field in dataclasses.fields(Counts)]
    numbered = {name: 100 + k for k, name in enumerate(names)}
    return Counts(**numbered | {"examples": len(examples)} | changes)


def some(lengths=(3, 1, 5), seed=0) -> list[Example]:
    random = np.random.RandomState(seed)
    return [
        Example(
            random.randint(-(2**31), 2**31, n).astype(np.int32),
            random.randn(n).astype(np.float32),
            f"f\u00e9.jsonl:{k}",
        )
        for k, n in enumerate(lengths)
    ]


def built(examples):
    return lambda: (examples, counts(examples))


def never():
    raise AssertionError("built although the cache has it")


def check(cached: Cached, examples: list[Example]) -> None:
    assert cached.counts == counts(examples)
    assert len(cached.examples) == len(examples)
    for found, one in zip(cached.examples, examples, strict=True):
        assert found.where == one.where
        for a, b in ((found.tokens, one.tokens), (found.loss_weights, one.loss_weights)):
            assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


def entry(directory: Path) -> Path:
    (file,) = directory.iterdir()
    return file


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(0, 9), max_size=12), seed=st.integers(0, 2**31))
def test_what_is_read_is_what_was_built(tmp_path_factory, lengths, seed):
    directory = tmp_path_factory.mktemp("cache") / "made" / "here"
    examples = some(lengths, seed)
    first = cached_examples(directory, KEY, built(examples))
    check(first, examples)
    second = cached_examples(directory, KEY, never)
    check(second, examples)
    assert (first.hit, second.hit, first.notes, second.notes) == (False, True, [], [])


def test_numbers_and_names_that_are_hard_to_write(tmp_path):
    odd = np.array([np.nan, -0.0, np.inf, 1e-45], np.float32)
    odd[:1].view(np.uint32)[0] |= 0x1234  # a payload in the NaN
    examples = [
        Example(np.array([0, -1, 2**31 - 1, -(2**31)], np.int32), odd, "\ud800\n\x00\u4e2d")
    ]
    cached_examples(tmp_path, KEY, built(examples))
    check(cached_examples(tmp_path, KEY, never), examples)


@pytest.mark.parametrize("name", KEY)
def test_another_tokenizer_template_setting_or_code_is_another_entry(tmp_path, name):
    cached_examples(tmp_path, KEY, built(some()))
    other = some(seed=1)
    missed = cached_examples(tmp_path, KEY | {name: "other"}, built(other))
    check(missed, other)
    assert not missed.hit and not missed.notes
    check(cached_examples(tmp_path, KEY, never), some())
    check(cached_examples(tmp_path, KEY | {name: "other"}, never), other)
    assert len(list(tmp_path.iterdir())) == 2
    assert cached_examples(tmp_path, dict(reversed(KEY.items())), never).hit  # as written, not how


def test_names_and_values_of_a_key_are_told_apart(tmp_path):
    for key in ({"a": "b"}, {"b": "a"}, {"a": "b", "c": ""}, {"a": 'b", "c": "'}, {"ab": ""}):
        assert not cached_examples(tmp_path, key, built(some())).hit


def tokenizer(words: list[str]):
    """Whole words, with plain completions; another list gives other tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<eos>", "<unk>", *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def test_tokenised_cache_reused_with_another_tokenizer(tmp_path):
    rows = [
        data.Row(
            ({"role": "user", "content": "red "}, {"role": "assistant", "content": "blue"}), "f:1"
        )
    ]
    found = []
    for number, words in enumerate((["red", "blue"], ["blue", "red"], ["red", "blue"])):
        tokens = tokenizer(words)
        directory = tmp_path / str(number)  # the same files in another directory are the same key
        tokens.save_pretrained(directory)
        key = KEY | {"tokenizer": digest_files(sorted(directory.iterdir()))}
        cached = cached_examples(
            tmp_path / "cache",
            key,
            lambda tokens=tokens: data.encode_all(rows, tokens, chat_template="none", max_length=9),
        )
        found.append((cached.examples[0].tokens.tolist(), cached.hit))
    assert found == [([2, 3, 0], False), ([3, 2, 0], False), ([2, 3, 0], True)]


def test_one_changed_row_of_a_file_is_another_key(tmp_path):
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    first.write_bytes(b'{"x": 1}\n{"x": 2}\n')
    second.write_bytes(b"{}\n")
    digest = digest_files([first, second])
    assert digest == digest_files([first, second])
    found = {digest, digest_files([second, first]), digest_files([first]), digest_files([])}
    first.write_bytes(b'{"x": 1}\n{"x": 3}\n')
    found.add(digest_files([first, second]))
    first.write_bytes(b'{"x": 1}\n{"x": 2}\n{')  # a byte that goes from one file to the next
    second.write_bytes(b"}\n")
    found.add(digest_files([first, second]))
    first.write_bytes(b'{"x": 1}\n{"x": 2}\n')
    second.write_bytes(b"{}\n")
    assert digest_files([first, second]) == digest
    second.rename(tmp_path / "c.jsonl")  # its name stands in `where`
    found.add(digest_files([first, tmp_path / "c.jsonl"]))
    assert len(found) == 7
    with pytest.raises(UserError, match=r"nowhere.jsonl cannot be read: No such file"):
        digest_files([tmp_path / "nowhere.jsonl"])


def test_changed_code_is_another_key(tmp_path):
    package = tmp_path / "data"
    shutil.copytree(
        Path(data.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__")
    )
    version = code_version()
    assert code_version(package) == version

    def after_changing(name):
        text = (package / name).read_text()
        (package / name).write_text(text + "# changed\n")
        changed = code_version(package)
        (package / name).write_text(text)
        return changed

    deciding = ("parse.py", "readers.py", "rows.py", "sources.py", "spans.py", "templates.py")
    arranging = ("__init__.py", "cache.py", "loader.py", "packing.py", "stream.py")
    assert len({version, *map(after_changing, deciding)}) == len(deciding) + 1
    assert {after_changing(name) for name in arranging} == {version}
    (package / "new.py").write_text("")  # what is not known not to decide, decides
    assert code_version(package) != version


def test_another_version_of_the_tokenizing_libraries_is_another_key(monkeypatch):
    version = code_version()
    for name in ("tokenizers", "transformers", "jinja2"):
        with monkeypatch.context() as patch:
            patch.setattr(
                "lora_jax.data.cache.metadata.version",
                lambda asked, name=name, real=data.cache.metadata.version: (
                    "0.0" if asked == name else real(asked)
                ),
            )
            assert code_version() != version
    assert code_version() == version


def test_every_flipped_byte_and_every_cut_is_found(tmp_path):
    examples = some()
    cached_examples(tmp_path, KEY, built(examples))
    file = entry(tmp_path)
    whole = file.read_bytes()
    damages = [
        whole[:k] + bytes([whole[k] ^ 1 << k % 8]) + whole[k + 1 :] for k in range(len(whole))
    ]
    damages += [whole[:k] for k in range(len(whole))] + [whole + b"\0"]
    for damaged in damages:
        file.write_bytes(damaged)
        cached = cached_examples(tmp_path, KEY, built(examples))
        check(cached, examples)
        assert not cached.hit
        assert cached.notes == [
            f"the tokenised cache {file} is damaged and not used: its checksum differs"
        ]
        assert file.read_bytes() == whole  # built anew
    assert cached_examples(tmp_path, KEY, never).hit
    assert entry(tmp_path) == file


def test_an_entry_of_another_key_under_this_name_is_not_used(tmp_path):
    cached_examples(tmp_path, KEY, built(some()))
    mine = entry(tmp_path)
    cached_examples(tmp_path, KEY | {"tokenizer": "other"}, built(some(seed=1)))
    (theirs,) = set(tmp_path.iterdir()) - {mine}
    mine.write_bytes(theirs.read_bytes())
    cached = cached_examples(tmp_path, KEY, built(some()))
    check(cached, some())
    assert not cached.hit and "it belongs to another key" in cached.notes[0]


def test_a_whole_entry_of_another_make_is_not_used(tmp_path):
    cached_examples(tmp_path, KEY, built(some()))
    file = entry(tmp_path)
    content = file.read_bytes()[32:]
    other_counts = content.replace(b'"truncated"', b'"truncateD"')
    other_tensor = content.replace(b'"offsets"', b'"offsetS"')
    assert content not in (other_counts, other_tensor)
    for other in (b"", b"anything", other_counts, other_tensor):
        file.write_bytes(hashlib.sha256(other).digest() + other)
        cached = cached_examples(tmp_path, KEY, built(some()))
        check(cached, some())
        assert (
            not cached.hit and "is damaged and not used: it has another format" in cached.notes[0]
        )


def test_a_directory_that_cannot_be_written_is_a_note(tmp_path):
    file = tmp_path / "file"
    file.write_text("kept")
    for directory in (file, file / "inside"):
        cached = cached_examples(directory, KEY, built(some()))
        check(cached, some())
        assert not cached.hit
        assert len(cached.notes) == 1
        assert f"the tokenised cache {directory} cannot be written: " in cached.notes[0]
    assert file.read_text() == "kept"


def test_a_full_disk_leaves_nothing_and_is_a_note(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lora_jax.cache.os.fsync", full)
    cached = cached_examples(tmp_path, KEY, built(some()))
    check(cached, some())
    assert cached.notes == [
        f"the tokenised cache {tmp_path} cannot be written: No space left on device"
    ]
    assert not list(tmp_path.iterdir())


def test_an_entry_that_cannot_be_read_or_replaced_is_two_notes(tmp_path):
    cached_examples(tmp_path, KEY, built(some()))
    file = entry(tmp_path)
    file.unlink()
    file.mkdir()
    cached = cached_examples(tmp_path, KEY, built(some()))
    check(cached, some())
    assert [note.split(": ")[0] for note in cached.notes] == [
        f"the tokenised cache {file} cannot be read",
        f"the tokenised cache {tmp_path} cannot be written",
    ]
    assert entry(tmp_path) == file


def test_a_build_that_fails_leaves_nothing(tmp_path):
    def fails():
        raise UserError("no example is left")

    with pytest.raises(UserError, match="no example is left"):
        cached_examples(tmp_path, KEY, fails)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("key", [{}, {"a": 1}, {"a": None}, {1: "a"}])
def test_a_key_that_tells_nothing_is_refused(tmp_path, key):
    with pytest.raises(ValueError, match="must map names to strings"):
        cached_examples(tmp_path, key, built(some()))


@pytest.mark.parametrize(
    ("tokens", "weights"),
    [
        (np.zeros(3, np.int64), np.zeros(3, np.float32)),
        (np.zeros(3, np.int32), np.zeros(3, np.float64)),
        (np.zeros(3, np.int32), np.zeros(2, np.float32)),
        (np.zeros((3, 1), np.int32), np.zeros((3, 1), np.float32)),
    ],
)
def test_examples_of_other_arrays_are_refused(tmp_path, tokens, weights):
    with pytest.raises(
        ValueError, match="f:1: tokens and loss_weights are .* not int32 and float32"
    ):
        cached_examples(tmp_path, KEY, built([Example(tokens, weights, "f:1")]))


BUILD = """
import sys, time
from pathlib import Path
sys.path.insert(0, {here!r})
from test_cache import KEY, built, some
from lora_jax.data import cached_examples

directory, me = Path(sys.argv[1]), sys.argv[2]
examples = some([50] * 2000)

def build():  # both are building before either writes
    (directory / f"{{me}}.ready").touch()
    while len(list(directory.glob("*.ready"))) < 2:
        time.sleep(0.01)
    return built(examples)()

cached = cached_examples(directory / "cache", KEY, build)
assert not cached.hit and not cached.notes, cached.notes
"""


def test_two_processes_that_build_at_once_leave_one_entry(tmp_path):
    script = BUILD.format(here=str(Path(__file__).parent))
    started = [
        subprocess.Popen([sys.executable, "-c", script, str(tmp_path), name]) for name in "ab"
    ]
    assert [process.wait(timeout=120) for process in started] == [0, 0]
    entry(tmp_path / "cache")  # one file, and no half of one
    cached = cached_examples(tmp_path / "cache", KEY, never)
    check(cached, some([50] * 2000))
    assert cached.hit
