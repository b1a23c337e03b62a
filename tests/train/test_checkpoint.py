"""What a checkpoint holds comes back to the bit, and damage never passes for it."""

import json
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lora_jax.errors import UserError
from lora_jax.train import checkpoint

ADAPTERS = {
    "model": {
        "layers": {"q_proj": {"lora_a": (2, 300, 40), "lora_b": (2, 4, 10)}},
        "head": {"lora_a": (7, 3)},
    }
}


def random_tree(seed=0):
    rng = np.random.default_rng(seed)
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    draw = lambda shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    return jax.tree.map(draw, ADAPTERS, is_leaf=is_shape)


def some_state(seed=0):
    adapters = random_tree(seed)
    optimizer = optax.adamw(1e-3)
    _, state = optimizer.update(random_tree(seed + 1), optimizer.init(adapters), adapters)
    return adapters, state


def write(directory, steps=(1, 2, 3), limit=None, best=None):
    with checkpoint.open_checkpoints(directory, limit) as kept:
        for step in steps:
            kept.save(step, *some_state(step), {"config": {"seed": 0}}, best)
    return directory


def equal(found, expected):
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return all(np.array_equal(x, y) and x.dtype == y.dtype for x, y in pairs)


@pytest.fixture
def saved(tmp_path):
    return write(tmp_path / "checkpoints")


def test_every_step_comes_back_to_the_bit(saved):
    assert checkpoint.list_steps(saved) == [1, 2, 3]
    for step in (None, 1, 2, 3):
        shapes = jax.eval_shape(lambda: some_state(0))
        adapters, state, record = checkpoint.restore(saved, *shapes, step=step)
        assert equal((adapters, state), some_state(step or 3))
        assert (record["step"], record["config"]) == (step or 3, {"seed": 0})
    leaf = record["leaves"]["adapters/model.head.lora_a"]
    assert (leaf["dtype"], leaf["shape"]) == ("float32", [7, 3])


@pytest.mark.parametrize(
    ("limit", "best", "kept"), [(None, None, [1, 2, 3, 4]), (2, None, [3, 4]), (1, 2, [2, 4])]
)
def test_the_latest_and_the_best_are_kept(tmp_path, limit, best, kept):
    write(tmp_path, (1, 2, 3, 4), limit, best)
    assert checkpoint.list_steps(tmp_path) == kept


def test_the_last_sound_step_is_kept(tmp_path):
    with checkpoint.open_checkpoints(tmp_path, 1) as kept:
        for step in (1, 2, 3, 4, 5):
            kept.save(step, *some_state(step), {}, best_step=1, sound_step=min(step, 3))
    assert checkpoint.list_steps(tmp_path) == [1, 3, 5]


def test_a_step_saved_again_has_the_new_record(tmp_path):
    with checkpoint.open_checkpoints(tmp_path) as kept:
        kept.save(1, *some_state(1), {"pending": {"loss": 2.0}})
        kept.save(1, *some_state(1), {"pending": None})
    assert checkpoint.read_record(tmp_path)["pending"] is None
    assert equal(checkpoint.restore(tmp_path, *some_state(1))[:2], some_state(1))


def test_a_flipped_byte_in_any_file_is_found_and_the_file_named(saved):
    rng = np.random.default_rng(0)
    files = [file for file in sorted((saved / "3").rglob("*")) if file.is_file()]
    assert len(files) > 15
    for file in files:
        whole = file.read_bytes()
        if not whole:
            continue
        for position in {0, len(whole) - 1, int(rng.integers(len(whole)))}:
            damaged = bytearray(whole)
            damaged[position] ^= 1 << int(rng.integers(8))
            file.write_bytes(damaged)
            with pytest.raises(UserError) as caught:
                checkpoint.restore(saved, *some_state(3))
            message = str(caught.value)
            assert f"{file.relative_to(saved)} is damaged" in message
            assert f"remove {saved / '3'} to go on from step 2" in message
        file.write_bytes(whole)
    assert checkpoint.restore(saved, *some_state(3))[2]["step"] == 3


def test_files_that_are_missing_or_new_are_named(saved):
    file = saved / "3" / "adapters" / "_METADATA"
    whole = file.read_bytes()
    file.unlink()
    (saved / "3" / "extra").write_text("?")
    with pytest.raises(UserError, match="3/adapters/_METADATA is missing\n  3/extra is new"):
        checkpoint.read_record(saved)
    file.write_bytes(whole)


def flip_values(directory):
    """Change a byte amid the largest file, where values stand and Orbax sees nothing."""
    file = max(directory.rglob("d/*"), key=lambda file: file.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_without_a_seal_the_leaves_are_still_checked(tmp_path):
    """As after a kill between the commit and the seal."""
    directory = write(tmp_path / "checkpoints", (1,))
    (directory / "1" / "sha256.json").unlink()
    assert equal(checkpoint.restore(directory, *some_state(1))[:2], some_state(1))
    flip_values(directory / "1" / "adapters")
    with pytest.raises(UserError) as caught:
        checkpoint.restore(directory, *some_state(1))
    message = str(caught.value)
    assert "adapters/model.layers.q_proj.lora_a does not hold what was saved" in message
    assert "there is no other checkpoint" in message


def test_a_record_changed_by_hand_is_found_without_a_seal(saved):
    (saved / "3" / "sha256.json").unlink()
    file = saved / "3" / "record" / "metadata"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"config": {"seed": 1}}))
    with pytest.raises(UserError, match="3/record/metadata is damaged"):
        checkpoint.read_record(saved)


def test_leaves_that_do_not_fit_are_all_named(saved):
    adapters, state = some_state()
    adapters["model"]["head"] = {"lora_a": jnp.zeros((7, 4)), "lora_b": jnp.zeros((3, 2))}
    layers = adapters["model"]["layers"]["q_proj"]
    layers["lora_b"] = layers["lora_b"].astype(jnp.bfloat16)
    with pytest.raises(UserError) as caught:
        checkpoint.restore(saved, adapters)
    message = str(caught.value)
    for wrong in (
        "adapters/model.head.lora_a: ([7, 3], 'float32') in the checkpoint, ([7, 4], 'float32')",
        "adapters/model.head.lora_b: missing in the checkpoint, ([3, 2], 'float32') here",
        "adapters/model.layers.q_proj.lora_b: ([2, 4, 10], 'float32') in the checkpoint, "
        "([2, 4, 10], 'bfloat16') here",
    ):
        assert wrong in message
    assert "q_proj.lora_a" not in message


def test_what_is_not_there(saved, tmp_path):
    with pytest.raises(UserError, match=r"has no checkpoint of step 7; it has: \[1, 2, 3\]"):
        checkpoint.read_record(saved, 7)
    with pytest.raises(UserError, match="has no checkpoint to read"):
        checkpoint.read_record(tmp_path / "nowhere")


def test_a_deleted_step_is_gone(tmp_path):
    with checkpoint.open_checkpoints(tmp_path) as kept:
        for step in (1, 2):
            kept.save(step, *some_state(step), {})
        kept.delete(2)
        assert kept.steps == [1]
    assert checkpoint.list_steps(tmp_path) == [1]


def test_a_full_disk_is_one_error_and_leaves_the_last_good_step(tmp_path):
    """A file size limit stands for the full disk: writes beyond it fail as there, with an OSError
    inside Orbax's threads.
    """
    place = tmp_path / "c"
    script = f"""
        import pathlib, resource, signal
        import jax.numpy as jnp
        from lora_jax.errors import UserError
        from lora_jax.train import checkpoint
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        state = {{"w": {{"lora_a": jnp.arange(300_000.0) ** 0.5}}}}
        try:
            with checkpoint.open_checkpoints(pathlib.Path({str(place)!r}), 1) as kept:
                kept.save(1, state, state, {{}})
                kept.wait()
                resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
                kept.save(2, state, state, {{}})
        except UserError as error:
            print("refused:", error)
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=300
    )
    assert result.stdout.startswith("refused: the checkpoint of step 2 cannot be written"), result
    assert checkpoint.list_steps(place) == [1]
    expected = {"w": {"lora_a": jnp.arange(300_000.0) ** 0.5}}
    assert equal(checkpoint.restore(place, expected)[0], expected)
