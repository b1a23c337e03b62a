"""Adapters that are damaged or hostile: each is refused by name, before anything is allocated."""

import json
import os
import pickle
import shutil
import struct

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_jax import AdapterConfig
from lora_jax.errors import UserError
from lora_jax.serve.folder import Folder, Missing, check_name
from lora_jax.serve.reader import Limits, Reader

from .adapters import DIGEST, shapes_of, tiny_model, write

FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def good(model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("good") / "a"
    write(model, directory, 0)
    return directory


def edit_config(directory, **changes):
    file = directory / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_tensors(directory, change):
    tensors = load_file(directory / FILE)
    change(tensors)
    save_file(tensors, directory / FILE)
    (directory / "lora_jax.json").unlink()


def first(tensors):
    return next(iter(tensors))


def write_header(directory, header, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(text) if length is None else length
    (directory / FILE).write_bytes(struct.pack("<Q", length) + text)


class Opened:
    """A pickle that would leave a trace."""

    def __reduce__(self):
        return os.mkdir, ("opened",)


def only_pickle(directory):
    (directory / FILE).unlink()
    (directory / "adapter_model.bin").write_bytes(pickle.dumps(Opened()))


def truncate(directory):
    content = (directory / FILE).read_bytes()
    (directory / FILE).write_bytes(content[:-10])


def link_out(directory):
    (directory / FILE).unlink()
    (directory / FILE).symlink_to("/etc/hostname")


def gigantic(directory):
    shape = [2**40, 2**20]
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, 2**62]}
    write_header(directory, {"base_model.model.x.lora_A.weight": entry})


HOSTILE = {
    "truncated": (truncate, "truncated"),
    "pickle": (only_pickle, "files of pickle are not read"),
    "gigantic header": (lambda d: write_header(d, b"{}", 2**60), "its header would have"),
    "gigantic tensor": (gigantic, "truncated or damaged"),
    "sizes beyond any number": (
        lambda d: write_header(
            d, {"x": {"dtype": "F32", "shape": [10**200, 10**200], "data_offsets": [0, 4]}}
        ),
        "truncated or damaged",
    ),
    "a large lora_jax.json": (lambda d: (d / "lora_jax.json").write_text(" " * 2**21), "larger"),
    "no header": (lambda d: (d / FILE).write_bytes(b"abc"), "damaged or no safetensors|damaged"),
    "a header that is no JSON": (lambda d: write_header(d, b"{{{{"), "header cannot be read"),
    "deep JSON": (lambda d: write_header(d, b"[" * 100_000), "header cannot be read"),
    "a list": (lambda d: write_header(d, []), "header cannot be read"),
    "negative sizes": (
        lambda d: write_header(
            d, {"x": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}}
        ),
        "header cannot be read",
    ),
    "integers": (
        lambda d: edit_tensors(d, lambda t: t.update({first(t): np.ones((2, 2), np.int32)})),
        "has dtype I32",
    ),
    "NaN": (
        lambda d: edit_tensors(d, lambda t: t[first(t)].__setitem__((0, 0), np.nan)),
        "not finite",
    ),
    "infinity": (
        lambda d: edit_tensors(d, lambda t: t[first(t)].__setitem__((0, 0), np.inf)),
        "not finite",
    ),
    "another shape": (
        lambda d: edit_tensors(d, lambda t: t.update({first(t): np.ones((2, 5), np.float32)})),
        "has shape",
    ),
    "a missing tensor": (lambda d: edit_tensors(d, lambda t: t.pop(first(t))), "missing"),
    "an unknown tensor": (
        lambda d: edit_tensors(d, lambda t: t.update(other=np.ones(3, np.float32))),
        "unexpected other",
    ),
    "changed weights": (
        lambda d: save_file(
            {key: 2 * value for key, value in load_file(d / FILE).items()}, d / FILE
        ),
        "another program|damaged",
    ),
    "another base": (
        lambda d: (d / "lora_jax.json").write_text('{"fingerprint": {"base": "sha256:other"}}'),
        "the base model's weights are not those",
    ),
    "a large rank": (lambda d: edit_config(d, r=4096), "rank 4096 is above .* --max-lora-rank 8"),
    "a large pattern": (
        lambda d: edit_config(d, rank_pattern={"q_proj": 64}),
        "rank 64 is above",
    ),
    "a config that is no JSON": (lambda d: (d / CONFIG).write_text("{"), "invalid JSON"),
    "a large config": (lambda d: (d / CONFIG).write_text(" " * 2**21), "is larger than"),
    "another method": (lambda d: edit_config(d, peft_type="IA3"), "peft_type='IA3'"),
    "a module that is not there": (
        lambda d: edit_config(d, target_modules=["nothing"]),
        "nothing",
    ),
    "no weights": (lambda d: (d / FILE).unlink(), "does not exist"),
    "a link out of the root": (link_out, "is a link to a place outside"),
}


def reader_of(model, root, **options):
    return Reader(shapes_of(model), DIGEST, Folder(root), Limits(rank=8, **options))


@pytest.mark.parametrize(("change", "message"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_files_are_refused_by_name(model, good, tmp_path, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "root"
    shutil.copytree(good, root / "x")
    reader = reader_of(model, root)
    assert reader.read("x", root / "x").rank == 2
    change(root / "x")
    with pytest.raises(UserError, match=message) as caught:
        reader.read("x", root / "x")
    assert "adapter 'x'" in str(caught.value)
    assert str(tmp_path) not in str(caught.value) and "/etc" not in str(caught.value)
    assert not (tmp_path / "opened").exists()


def test_sizes_are_limited(model, good):
    for options, message in (
        ({"file_bytes": 1000}, "the server reads 1,000 at most"),
        ({"tensors": 3}, "more than 3"),
        ({"header_bytes": 50}, "its header would have"),
    ):
        with pytest.raises(UserError, match=message):
            reader_of(model, good.parent, **options).read("a", good)


def test_another_base_may_be_allowed(model, good, tmp_path):
    shutil.copytree(good, tmp_path / "x")
    HOSTILE["another base"][0](tmp_path / "x")
    allowing = Reader(
        shapes_of(model), DIGEST, Folder(tmp_path), Limits(rank=8), allow_change=("base",)
    )
    assert allowing.read("x", tmp_path / "x").rank == 2


def test_revisions_tell_weights_configs_and_bases_apart(model, good, tmp_path):
    """A copy has the revision of the original."""
    shutil.copytree(good, tmp_path / "copy")
    write(model, tmp_path / "weights", 3)
    write(
        model, tmp_path / "config", 0, AdapterConfig(rank=2, alpha=5, target_modules="all-linear")
    )
    reader = reader_of(model, tmp_path)
    names = ("copy", "weights", "config")
    found = [reader.read(name, tmp_path / name).revision for name in names]
    same = reader_of(model, good.parent).read("a", good).revision
    other = Reader(shapes_of(model), "sha256:x", Folder(good.parent), allow_change=("base",))
    assert found[0] == same and len({*found, other.read("a", good).revision}) == 4


def test_names():
    for name in ("a", "A.b_c-1", "x" * 128):
        check_name(name)
    for name in ("", ".", "..", "a/b", "../a", "-a", ".a", "x" * 129, "a\0", "a b", "é", "a\n"):
        with pytest.raises(UserError, match="cannot be the name of an adapter"):
            check_name(name)


def test_the_folder_ends_at_its_root(good, tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    shutil.copytree(good, outside / "b")
    shutil.copytree(good, root / "plain")
    shutil.copytree(good, root / "run" / "adapter")
    shutil.copytree(good, root / "deep" / "er" / "adapter")
    (root / "out").symlink_to(outside / "b")
    (root / "same").symlink_to(root / "plain")
    (root / "loop").symlink_to(root / "loop")
    (root / "half").mkdir()
    (root / "half" / "adapter").symlink_to(outside / "b")
    folder = Folder(root)
    assert folder.names() == ["plain", "run", "same"]
    assert folder.find("run") == root / "run" / "adapter"
    assert folder.at("run/adapter") == folder.at(str(root / "run")) == root / "run" / "adapter"
    for name in ("out", "loop", "half", "deep", "absent"):
        with pytest.raises(Missing, match=f"there is no adapter '{name}'"):
            folder.find(name)
    for path in ("../outside/b", str(outside / "b"), "deep/er", "/", "", "a\0b", "x" * 5000):
        with pytest.raises(Missing, match="there is no adapter at"):
            folder.at(path)
    assert Folder(None).names() == []
    with pytest.raises(UserError, match="there is no such directory"):
        Folder(tmp_path / "absent")
