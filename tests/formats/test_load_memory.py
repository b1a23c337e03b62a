"""What a model is read into is where it stays on a CPU: no leaf is in memory twice."""

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lora_jax.config import MeshConfig
from lora_jax.formats.model_reader import _part_reader, _Source
from lora_jax.sharding import make_mesh


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shape", [(3, 5), (64, 48), (2, 7, 9)])
def test_read_arrays_are_taken_over_without_a_copy(shape, dtype):
    read, addresses = _part_reader(_Source(shape, np.dtype(dtype), ())), []

    def remember(index):
        part = read(index)
        part[...] = 1
        addresses.append(part.ctypes.data)
        return part

    sharding = NamedSharding(make_mesh(MeshConfig()), PartitionSpec())
    array = jax.make_array_from_callback(shape, sharding, remember)
    assert array.unsafe_buffer_pointer() == addresses[0]
    assert array.shape == shape and array.dtype == dtype and (array == 1).all()
    # Given to a computation that may write over it, it outlives what it was read into.
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    after = add(array)
    assert (after == 2).all() and array.is_deleted()
