"""Digests of files of tensors, and what is kept of them for the next start."""

import hashlib
import json
import os
import time

import numpy as np
import pytest
from safetensors.numpy import save_file

from lora_jax import demo
from lora_jax.errors import UserError
from lora_jax.formats import digests, fingerprint
from lora_jax.formats.tensors import list_tensors

RNG = np.random.default_rng(3)
TENSORS = {
    "a": RNG.standard_normal((300, 20)).astype(np.float32),
    "b": RNG.standard_normal(7).astype(np.float16),
    "c": np.zeros((0, 3), np.float32),
}
EXPECTED = {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in TENSORS.items()}


@pytest.fixture
def model(tmp_path):
    directory = tmp_path / "model"
    directory.mkdir()
    save_file(TENSORS, directory / "model.safetensors")
    return directory


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The directory of entries, which take a file that was written this very moment."""
    monkeypatch.setenv("LORA_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "cache_directory", demo.cache_directory)
    monkeypatch.setattr(digests, "_TICK", 0)
    monkeypatch.setattr(digests, "_COARSE_TICK", 0)
    return tmp_path / "cache" / "digests"


@pytest.fixture
def reads(monkeypatch):
    """The names of the tensors whose bytes were read."""
    found, original = [], digests._read_span

    def read(span, *others):
        found.append(span.stored)
        return original(span, *others)

    monkeypatch.setattr(digests, "_read_span", read)
    return found


def take(directory):
    return digests.of_files(list_tensors(directory))


def entry_of(cache):
    (entry,) = cache.iterdir()
    return entry


def test_bytes_are_digested_and_a_second_start_reads_none(model, cache, reads):
    assert take(model) == EXPECTED
    assert sorted(reads) == ["a", "b", "c"]
    assert take(model) == EXPECTED
    assert len(reads) == 3


def test_pieces_and_threads_change_nothing(model, cache, monkeypatch):
    for piece, threads in ((1, 1), (7, 4), (1 << 20, 16)):
        monkeypatch.setattr(digests, "_PIECE", piece)
        monkeypatch.setattr(digests, "_THREADS", threads)
        assert take(model) == EXPECTED
        entry_of(cache).unlink()


def flip(file):
    """Flip one bit in place, within another tick of the file system's clock."""
    before = file.stat()
    while file.stat().st_ctime_ns == before.st_ctime_ns:
        time.sleep(0.005)
        with file.open("r+b") as opened:
            opened.seek(-1, os.SEEK_END)
            last = opened.read(1)[0]
            opened.seek(-1, os.SEEK_END)
            opened.write(bytes([last ^ 0x40]))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_file_that_was_changed_is_read_again(model, cache, reads):
    first, file = take(model), model / "model.safetensors"
    flip(file)  # size, inode and mtime are as they were
    assert take(model) != first and len(reads) == 6
    os.utime(file)
    take(model)
    assert len(reads) == 9
    save_file(TENSORS, model / "new")
    (model / "new").replace(file)
    assert take(model) == first and len(reads) == 12
    assert take(model) == first and len(reads) == 12
    assert entry_of(cache)  # one for a file, whatever states it had


def test_a_link_has_the_entry_of_its_file(model, cache, reads, tmp_path):
    """As in the cache of the hub, whose snapshots are links to blobs."""
    snapshot = tmp_path / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    (model / "model.safetensors").rename(tmp_path / "blob")
    for directory in (model, snapshot):
        (directory / "model.safetensors").symlink_to(os.path.relpath(tmp_path / "blob", directory))
    assert take(model) == take(snapshot) == EXPECTED
    assert len(reads) == 3 and entry_of(cache)


def edited(**changes):
    def edit(content):
        return json.dumps(json.loads(content) | changes).encode()

    return edit


ENTRIES = {
    "empty": lambda content: b"",
    "cut short": lambda content: content[:-9],
    "not UTF-8": lambda content: b"\xff\xfe" + content,
    "not an object": lambda content: b"[1]",
    "deep": lambda content: b"[" * 10**6,
    "a number of many digits": lambda content: b"1" * 10**5,
    "too long": lambda content: b" " * (1 << 24) + content,
    "digests as a list": edited(digests=[1]),
    "no digests": edited(digests={}),
    "a digest changed": edited(digests=EXPECTED | {"a": "0" * 64}),
    "another state": edited(state={"size": 3}),
}


@pytest.mark.parametrize("change", ENTRIES)
def test_an_entry_that_is_damaged_is_replaced(model, cache, reads, change):
    take(model)
    entry = entry_of(cache)
    good = entry.read_bytes()
    entry.write_bytes(ENTRIES[change](good))
    assert take(model) == EXPECTED
    assert len(reads) == 6, "the entry was used"
    assert json.loads(entry.read_bytes()) == json.loads(good)
    assert entry_of(cache) == entry  # nothing is left of the writing


def test_digests_that_are_no_text_are_not_used(model, cache, reads):
    take(model)
    entry, state = entry_of(cache), digests._state(model / "model.safetensors")
    for wrong in ({**EXPECTED, "a": 5}, {"a": "0"}, [*EXPECTED]):
        text = json.dumps([state, wrong], sort_keys=True).encode()
        whole = {"state": state, "digests": wrong, "sha256": hashlib.sha256(text).hexdigest()}
        entry.write_text(json.dumps(whole))
        assert take(model) == EXPECTED
    assert len(reads) == 12


def test_an_entry_that_is_no_file_is_not_opened(model, cache, reads, tmp_path, caplog):
    take(model)
    entry = entry_of(cache)
    entry.unlink()
    os.mkfifo(entry)  # to open it would wait for ever
    assert take(model) == EXPECTED and entry.is_file()
    entry.unlink()
    mine = tmp_path / "mine"
    mine.write_text("mine")
    for target in (mine, "/dev/zero"):
        entry.unlink(missing_ok=True)
        entry.symlink_to(target)
        assert take(model) == EXPECTED and not entry.is_symlink()
    assert mine.read_text() == "mine"
    assert not caplog.text
    entry.unlink()
    entry.mkdir()
    assert take(model) == EXPECTED
    assert "digests cannot be kept in" in caplog.text
    assert [path.name for path in cache.iterdir()] == [entry.name]


def test_a_cache_that_cannot_be_written_is_said_once(model, cache, caplog):
    cache.parent.write_text("a file")
    assert take(model) == take(model) == EXPECTED
    assert caplog.text.count("digests cannot be kept in") == 1


def test_a_file_that_may_still_change_unseen_has_no_entry(model, cache, reads, monkeypatch):
    monkeypatch.setattr(digests, "_TICK", 10**12)
    monkeypatch.setattr(digests, "_COARSE_TICK", 10**12)
    assert take(model) == take(model) == EXPECTED
    assert len(reads) == 6 and not cache.exists()


def test_entries_are_few(model, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "_ENTRIES", 2)
    for i in range(4):
        directory = tmp_path / str(i)
        directory.mkdir()
        save_file(TENSORS, directory / "model.safetensors")
        take(directory)
        os.utime(digests._entry(digests._state(directory / "model.safetensors")), (i, i))
    assert len([*cache.iterdir()]) == 2
    monkeypatch.setattr(digests, "_ENTRIES_SIZE", 10)
    (cache / "mine").write_text("x" * 20)
    take(model)
    assert [path.name for path in cache.iterdir()] == ["mine"]


def test_a_file_that_changes_while_it_is_read(model, cache, monkeypatch):
    original = digests._read_span

    def read(span, *others):
        os.utime(span.file, (1, 1))
        return original(span, *others)

    monkeypatch.setattr(digests, "_read_span", read)
    with pytest.raises(UserError, match="changed while it was being read"):
        take(model)
    assert not cache.exists()


def test_what_goes_wrong_in_a_thread_is_raised(model, cache):
    tensors = list_tensors(model)
    file = model / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-30])
    with pytest.raises(UserError, match=r"model\.safetensors ends within .: it is cut short"):
        digests.of_files(tensors)
    file.unlink()
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read"):
        digests.of_files(tensors)
    with pytest.raises(UserError, match=r"has no model\.safetensors"):
        fingerprint.start(model).result()


def test_arrays_and_files_have_one_digest(model, cache):
    tensors = list_tensors(model)
    sums = digests.of_files(tensors)
    joined = digests.join((n, t.shape, t.dtype.name, sums[n]) for n, t in tensors.items())
    assert joined == digests.of_arrays(dict(reversed(TENSORS.items())))
    assert joined == digests.of_arrays(TENSORS | {"a": np.asfortranarray(TENSORS["a"])})
    assert joined.startswith("sha256:") and len(digests.shorten(joined)) == 12
    others = [TENSORS | {"a": TENSORS["a"].T}, TENSORS | {"a": TENSORS["a"].view(np.int32)}]
    others += [{"a": TENSORS["a"], "b": TENSORS["b"]}, TENSORS | {"b": -TENSORS["b"]}]
    assert joined not in map(digests.of_arrays, others)
