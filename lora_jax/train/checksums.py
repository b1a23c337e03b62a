"""Checksums of a checkpoint: of every leaf, wherever it is sharded, and of every file."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from lora_jax import sharding, tree

Place = Path | epath.Path  # a directory, or one in a bucket
SEAL = "sha256.json"


def digest_leaves(tree_of_arrays: Any) -> str:
    """Digest of the names, dtypes, shapes and bits of all arrays, wherever they are sharded."""
    return digest_json(leaf_digests({"leaves": by_path(tree_of_arrays)}))


def leaf_digests(items: Mapping[str, Mapping[str, Any]]) -> dict[str, dict]:
    """dtype, shape and digest of every leaf, under `item/path`."""
    flat = {
        f"{item}/{name}": leaf for item, leaves in items.items() for name, leaf in leaves.items()
    }
    # One at a time: concurrent reductions over CPU devices may deadlock.
    sums = {name: np.asarray(_digest_leaf(sharding.on_device(leaf))) for name, leaf in flat.items()}
    return {
        name: {
            "dtype": str(leaf.dtype),
            "shape": list(leaf.shape),
            "sum": "".join(f"{int(part):08x}" for part in sums[name]),
        }
        for name, leaf in flat.items()
    }


@jax.jit
def _digest_leaf(leaf: jax.Array) -> jax.Array:
    """Return (2,) uint32: the sums of two hashes of every element's bits and index, modulo 2^32.

    The sums do not depend on the sharding; each device adds up its own shard, and nothing is
    gathered. A hash is one-to-one in the bits of its element (MurmurHash3's finalizer), so a change
    of any one element changes the sum.
    """
    kinds = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
    bits = jax.lax.bitcast_convert_type(leaf, kinds[leaf.dtype.itemsize]).astype(jnp.uint32)
    place, stride = jnp.zeros(leaf.shape, jnp.uint32), 1
    for axis in reversed(range(leaf.ndim)):
        place += jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= leaf.shape[axis]

    def mixed(seed: int) -> jax.Array:
        x = bits ^ (place * jnp.uint32(0x9E3779B1) + jnp.uint32(seed))
        x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
        x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
        return jnp.sum(x ^ (x >> 16), dtype=jnp.uint32)

    return jnp.stack([mixed(0x2545F491), mixed(0x6C078965)])


def seal(place: Place) -> None:
    """Write the digests of all files of a committed step, atomically."""
    files = _file_digests(place)
    content = {"files": files, "sha256": digest_json(files)}
    temporary = place / f".{SEAL}"
    temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
    temporary.replace(place / SEAL)


def find_damage(place: Place) -> list[str]:
    """Return the files of a step that differ from its `sha256.json`. A step that was killed before
    it has none; its leaves are checked instead.
    """
    file = place / SEAL
    if not file.is_file():
        return []
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        stored = content["files"]
        intact = content["sha256"] == digest_json(stored)
    except (OSError, ValueError, KeyError, TypeError):
        intact, stored = False, {}
    if not intact:
        return [f"{place.name}/{SEAL} is damaged"]
    found = _file_digests(place)
    return [
        f"{place.name}/{name} is "
        + ("missing" if name not in found else "new" if name not in stored else "damaged")
        for name in sorted({*stored, *found})
        if stored.get(name) != found.get(name)
    ]


def _file_digests(place: Place) -> dict[str, str]:
    return {
        file.relative_to(place).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files_below(place)
        if file.name.lstrip(".") != SEAL
    }


def files_below(place: Place) -> Iterator[Any]:
    """Yield all files below a directory; paths in a bucket have no `rglob`."""
    for path in sorted(place.iterdir()):
        if path.is_dir():
            yield from files_below(path)
        elif path.is_file():
            yield path


def digest_json(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def by_path(adapters: Any) -> dict[str, Any]:
    """Return the leaves of a tree by their dotted path."""
    return {tree.dotted(path): leaf for path, leaf in tree.flatten(adapters).items()}


def by_name(opt_state: Any) -> dict[str, Any]:
    """Return the array leaves by readable name; optax's wrappers add nothing to it."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(opt_state)
    }
