"""Compiled programs are kept for the next start, and nothing wrong with them reaches a run."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from lora_jax import programs

from .train.tiny import write_model, write_rows

SCRIPT = Path(__file__).parent / "train" / "warm.py"
NAMES = (
    "jax_compilation_cache_dir",
    "jax_compilation_cache_max_size",
    "jax_persistent_cache_min_compile_time_secs",
)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The cache directory of an otherwise new process; JAX's settings are restored."""
    before = {name: jax.config.values[name] for name in NAMES}
    for name in NAMES:
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("LORA_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(programs, "kept_in", None)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    with warnings.catch_warnings():
        yield tmp_path / "cache"
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture
def counted():
    """JAX's events, as they come."""
    events = []

    def listen(name, **_):
        events.append(name)

    jax.monitoring.register_event_listener(listen)
    yield events
    jax.monitoring.unregister_event_listener(listen)


def compile_anew(number):
    """A program that JAX has forgotten, run."""
    jax.clear_caches()

    @jax.jit
    def distinct(x):
        return jnp.sin(x) * number

    return float(distinct(jnp.float32(1.0)))


def entries(directory, suffix="-cache"):
    return sorted(directory.rglob(f"jit_distinct-*{suffix}"))


@pytest.mark.slow
def test_a_second_start_of_a_config_compiles_nothing(tmp_path):
    model = write_model(tmp_path / "model")
    rows = write_rows(tmp_path / "rows.jsonl")
    settings = [f"model={model}", f"data.train={rows}", f"data.eval={rows}", "data.max_length=64"]
    settings += ["adapter.rank=4", "train.steps=2", "train.batch_size=4", "eval.batch_size=4"]
    settings += ["eval.max_new_tokens=4", "export.merged=true", "adapter.dropout=0.1"]
    file = tmp_path / "run.yaml"
    file.write_text("{}\n")
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    environment |= {"LORA_JAX_CACHE": str(tmp_path / "cache"), "JAX_PLATFORMS": "cpu"}

    def start(name, **more):
        output = f"output_dir={tmp_path / name}"
        done = subprocess.run(
            [sys.executable, SCRIPT, "--config", file, *settings, output],
            env=environment | more,
            cwd=Path(__file__).parents[1],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        for word in ("persistent", "compilation cache", "CPU", "feature", "Traceback"):
            assert word not in done.stderr, done.stderr
        exported = [tmp_path / name / part for part in ("adapter", "merged")]
        weights = [f.read_bytes() for d in exported for f in sorted(d.glob("*.safetensors"))]
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses = [{k: v for k, v in json.loads(x).items() if "loss" in k} for x in lines]
        return json.loads(done.stdout.splitlines()[-1]), (weights, losses)

    none, plain = start("plain", JAX_ENABLE_COMPILATION_CACHE="false")
    assert none["cache_hits"] == none["cache_misses"] == 0
    assert not (tmp_path / "cache" / "compiled").exists()
    cold, first = start("cold")
    assert cold["cache_misses"] > 20
    warm, second = start("warm")
    asked = warm["compile_requests_use_cache"]
    assert warm == {"compile_requests_use_cache": asked, "cache_hits": asked, "cache_misses": 0}
    assert asked == cold["cache_hits"] + cold["cache_misses"]
    assert plain == first == second


@pytest.mark.parametrize("damage", ["cut", "emptied", "flipped", "foreign"])
def test_a_damaged_entry_is_compiled_and_written_again(cache, counted, capfd, damage):
    programs.keep()
    expected = compile_anew(2)
    (entry,) = entries(cache)
    whole = entry.read_bytes()
    middle = len(whole) // 2
    entry.write_bytes(
        {
            "cut": whole[:middle],
            "emptied": b"",
            "flipped": whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :],
            "foreign": b"something else",
        }[damage]
    )
    assert compile_anew(2) == expected
    assert entries(cache) == [entry] and len(entry.read_bytes()) > middle
    counted.clear()
    assert compile_anew(2) == expected
    assert "/jax/compilation_cache/cache_hits" in counted
    assert "/jax/compilation_cache/cache_misses" not in counted
    assert capfd.readouterr().err == ""


def test_an_unfinished_entry_is_removed_at_the_next_start(cache, counted):
    programs.keep()
    compile_anew(3)
    (entry,), (time,) = entries(cache), entries(cache, "-atime")
    time.unlink()
    programs.stop()
    programs.keep()
    assert not entry.exists()
    compile_anew(3)
    assert entries(cache) == [entry] and entries(cache, "-atime") == [time]


def test_old_programs_go_when_there_are_too_many(cache, monkeypatch):
    monkeypatch.setattr(programs, "LIMIT", 20_000)
    programs.keep()
    for number in range(4, 30):
        compile_anew(number)
    kept = [file.stat().st_size for file in cache.rglob("*-cache")]
    assert len(kept) > 1 and sum(kept) <= 20_000 and len(entries(cache)) < 26


def test_the_users_own_settings_come_first(cache, monkeypatch, tmp_path):
    for name, value in (
        ("JAX_COMPILATION_CACHE_DIR", str(tmp_path)),
        ("JAX_COMPILATION_CACHE_DIR", ""),
        ("JAX_ENABLE_COMPILATION_CACHE", "false"),
    ):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            programs.keep()
        assert programs.kept_in is None and jax.config.values[NAMES[0]] is None
    monkeypatch.setenv("JAX_COMPILATION_CACHE_MAX_SIZE", "5")
    size = jax.config.values[NAMES[1]]
    programs.keep()
    assert programs.kept_in is not None and jax.config.values[NAMES[1]] == size
    programs.stop()
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
    programs.keep()
    assert programs.kept_in is None
    assert jax.config.values[NAMES[0]] == str(tmp_path / "own")


def test_before_jax_is_imported_its_variables_are_set(cache, monkeypatch):
    monkeypatch.delitem(sys.modules, "jax")
    programs.keep()
    assert os.environ[NAMES[0].upper()] == str(programs.kept_in)
    assert int(os.environ[NAMES[1].upper()]) == programs.LIMIT
    assert float(os.environ[NAMES[2].upper()]) == 0
    for name in NAMES:  # `monkeypatch` would set again what it takes away here
        os.environ.pop(name.upper())


def test_a_directory_that_cannot_be_used_costs_one_note(cache, capfd):
    cache.write_text("a file")
    programs.keep()
    assert compile_anew(31) and programs.kept_in is None
    assert capfd.readouterr().err.count("note: compiled programs are not kept in") == 1


def test_programs_that_others_could_write_are_not_run(cache, capfd):
    programs.keep()
    home = programs.kept_in
    assert home is not None and home.stat().st_mode & 0o777 == 0o700
    programs.stop()
    home.chmod(0o777)
    programs.keep()
    assert programs.kept_in is None and "other users can write to it" in capfd.readouterr().err


def test_a_directory_that_fails_later_is_given_up(cache, capfd):
    programs.keep()
    compile_anew(32)
    for file in programs.kept_in.iterdir():
        file.unlink()
    programs.kept_in.rmdir()
    programs.kept_in.write_text("a file")
    assert compile_anew(33) and compile_anew(34)
    assert capfd.readouterr().err.count("note: compiled programs are not kept in") == 1
    assert programs.kept_in is None
