"""The cache and the rows of an engine on its devices, and calls of its compiled programs."""

import contextlib
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.generate.decode import Admission, Chunk, Given, Made, Turn, empty_rows, make_programs
from lora_jax.generate.log_probs import LogProbs
from lora_jax.generate.sampling import every_token
from lora_jax.models.common import Model
from lora_jax.nn.cache import Cache
from lora_jax.nn.rope import next_change
from lora_jax.nn.virtual import Virtual, first_position
from lora_jax.sharding import BATCH, constrain, gather_to_host, mesh_of
from lora_jax.weights import Layered, is_layered

CHUNKS = (16, 64, 256)  # tokens of a prompt that are read at once
_FIRST_VIEW = 128  # slots that attention reads in the smallest program
_SHORT = 512  # slots of a row up to which every chunk looks at all of them


class Device:
    """State and programs of an engine with `rows` texts of up to `slots` tokens.

    Results are futures: only `first` and `decode` wait for the device.
    """

    def __init__(self, model: Model, rows: int, slots: int, adapters: int, dtype: Any):
        self.params: Mapping = jax.tree.map(jnp.asarray, model.params)
        self.bank: Any = None
        self.prefix: Virtual | None = None
        self.slots, self._vocab = slots, model.config.vocab_size
        self._ropes = getattr(model.config, "ropes_by_length", ())
        self.batches, self.views = _batch_sizes(rows), _views(slots)
        self._mesh = mesh_of(model.params)
        self._programs = make_programs(model, dtype, _place)
        self._state: tuple[Cache, Any] | None = None
        self._decoding: set[tuple[int, int]] = set()  # compiled sizes of batches and views

        def allocate(params: Any) -> tuple[Cache, Any]:
            free = empty_rows(rows, adapters, model.config.vocab_size)
            cache = model.replace(params=params).empty_cache(rows, slots, dtype)
            return _place(cache), _place(free)

        self._allocate = jax.jit(allocate)

    @property
    def compiled(self) -> int:
        """Number of programs compiled so far."""
        return sum(self._programs.compiled.values())

    def on_mesh(self) -> contextlib.AbstractContextManager:
        """Return a context for calls: the mesh of the parameters, if there is one."""
        return contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)

    def use(self, params: Mapping, prefix: Virtual | None) -> None:
        """Compute with other parameters, stacked or in separate layers, and virtual tokens."""
        if _is_separate(params) != _is_separate(self.params):
            self.release()
        self.params, self.prefix = jax.tree.map(jnp.asarray, (params, prefix))

    def release(self) -> None:
        """Free cache and rows until the next call."""
        self._state = None

    def admit(self, row: int, own: Admission) -> None:
        """Write the settings of a row, which does not run until `first`."""
        cache, rows = self._allocated()
        self._state = cache, self._programs.admit(rows, np.int32(row), own)

    def begin(self, row: int, virtual: Virtual, count: int) -> None:
        """Write the first `count` virtual tokens to the start of a row."""
        cache, rows = self._allocated()
        own = np.array([row], np.int32)
        cache = self._programs.begin(self._given, cache, own, virtual, np.int32(count))
        self._state = cache, rows

    def prefill(self, chunk: Chunk) -> tuple[jax.Array, jax.Array]:
        """Read a chunk of a text; return its hidden states (1, t, d), and its last one (1, d)."""
        cache, rows = self._allocated()
        view = self._views_of(chunk.tokens.shape[1])[int(chunk.start[0] > 0)]
        cache, hidden, last = self._programs.prefill(self._given, cache, rows, chunk, view=view)
        self._state = cache, rows
        return hidden, last

    def score(self, chunk: Chunk, hidden: jax.Array, targets: np.ndarray) -> LogProbs:
        """Return log-probabilities (1, t, ..) of `targets` (1, t), the tokens after each."""
        return self._programs.score(self._given, self._allocated()[1], chunk, hidden, targets)

    def first(
        self, row: int, last: jax.Array, length: int, limit: int, allowed: np.ndarray | None = None
    ) -> Made:
        """Give a row its next token after a text of `length` tokens that ends in the hidden state
        `last` (1, d), and let it run up to `limit` tokens of the answer. `allowed` are the bits of
        the tokens that it may take; None: all.
        """
        cache, rows = self._allocated()
        numbers = [np.array([x], np.int32) for x in (row, length, limit)]
        bits = every_token(1, self._vocab) if allowed is None else allowed[None]
        rows, made = self._programs.first(self._given, rows, numbers[0], bits, last, *numbers[1:])
        self._state = cache, rows
        return jax.tree.map(gather_to_host, made)

    def decode(
        self,
        rows: Sequence[int],
        length: int,
        steps: int,
        hurry: bool,
        allowed: Mapping[int, np.ndarray],
    ) -> tuple[Made, dict[int, int]]:
        """Give rows up to `steps` tokens, fewer if `hurry` and one of them ends. Their texts reach
        `length` tokens at most. `allowed` are the bits of the tokens that some rows may take.
        Return also the column of each row in the result.

        The smallest program that fits is compiled only if no program fits that is compiled.
        """
        sizes = [size for size in self.batches if size >= len(rows)]
        views = [view for view in self.views if view >= min(length, self.slots)]
        fitting = [(size, view) for size in sizes for view in views]
        size, view = next((pair for pair in fitting if pair in self._decoding), fitting[0])
        every = range(self.batches[-1])
        whole = size == self.batches[-1]
        chosen = [*every] if whole else [*rows, *(row for row in every if row not in rows)][:size]
        bits = every_token(size, self._vocab)
        for column, row in enumerate(chosen):
            if row in allowed:
                bits[column] = allowed[row]
        own = None if whole else np.asarray(chosen, np.int32)
        made = self._decode(own, bits, view, steps, hurry)
        return made, {row: column for column, row in enumerate(chosen)}

    def warm_up(self, idle: Admission, virtual: Iterable[Virtual]) -> None:
        """Compile all programs; rows are idle before and after. `virtual` are virtual tokens of
        each kind.
        """
        for one in virtual:
            self.begin(0, one, 0)
        one = np.ones(1, np.int32)
        for time in CHUNKS:
            tokens = np.zeros((1, time), np.int32)
            for start in (0 * one, one)[: len(set(self._views_of(time)))]:
                chunk = Chunk(0 * one, tokens, start, one, one)
                hidden, last = self.prefill(chunk)
            self.score(chunk, hidden, tokens)
        self.first(0, last, 1, 0)
        self.admit(0, idle)
        for size in self.batches:
            chosen = None if size == self.batches[-1] else np.arange(size, dtype=np.int32)
            for view in self.views:
                self._decode(chosen, every_token(size, self._vocab), view, 0, False)

    def next_change(self, length: int) -> int | None:
        """Return the next length of a text at which its cache has other rotary frequencies."""
        shift = first_position(self.prefix)
        changes = [next_change(own, length + shift) for own in self._ropes]
        return min((change - shift for change in changes if change is not None), default=None)

    def _views_of(self, time: int) -> tuple[int, int]:
        """Return the slots that a chunk of `time` tokens looks at if it is the first, and later."""
        return (self.slots if self.slots <= _SHORT else time), self.slots

    def _decode(self, chosen: Any, allowed: np.ndarray, view: int, steps: int, hurry: bool) -> Made:
        self._decoding.add((self.batches[-1] if chosen is None else len(chosen), view))
        turn = Turn(allowed, np.int32(steps), np.bool_(hurry))
        cache, rows, made = self._programs.decode(
            self._given, *self._allocated(), chosen, turn, view=view
        )
        self._state = cache, rows
        return jax.tree.map(gather_to_host, made)

    @property
    def _given(self) -> Given:
        bank = None if self.bank is None else dataclasses.replace(self.bank, params={})
        return Given(self.params, bank, self.prefix)

    def _allocated(self) -> tuple[Cache, Any]:
        state = self._state
        if state is None:
            state = self._state = self._allocate(self.params)
        return state


def _is_separate(params: Mapping) -> bool:
    leaves = jax.tree.leaves(params, is_leaf=is_layered)
    return any(map(is_layered, leaves))


def _place(tree: Any) -> Any:
    """Constrain the sharding of a cache, rows or results on the mesh: rows of the cache over data
    and fsdp, heads over tensor; other arrays whole on each device.
    """

    def of_cache(cache: Cache) -> Cache:

        def of_layer(x: jax.Array, *stack: None) -> jax.Array:
            heads = ("tensor",) if x.ndim - len(stack) == 4 else ()
            spec = (*stack, BATCH[0], *heads)
            return constrain(x, *spec, *(None,) * (x.ndim - len(spec)))

        def of_layers(x: Any) -> Any:
            if isinstance(x, Layered):
                return Layered(tuple(map(of_layer, x.layers)))
            if isinstance(x, tuple):
                return tuple(map(of_layers, x))
            return of_layer(x, None)

        keys, values, *states = map(of_layers, (cache.keys, cache.values, *cache.states))
        return dataclasses.replace(cache, keys=keys, values=values, states=tuple(states))

    def is_cache(x: Any) -> bool:
        return isinstance(x, Cache)

    return jax.tree.map(
        lambda x: of_cache(x) if is_cache(x) else constrain(x), tree, is_leaf=is_cache
    )


def _views(longest: int) -> list[int]:
    """Return the numbers of slots that decoding may look at.

    >>> _views(1000), _views(200)
    ([128, 1000], [200])
    """
    views = [_FIRST_VIEW]
    while views[-1] < longest:
        views.append(4 * views[-1])
    return [*(view for view in views if 2 * view <= longest), longest]


def _batch_sizes(rows: int) -> list[int]:
    """Return the numbers of rows that decoding may compute.

    >>> _batch_sizes(8)
    [1, 4, 8]
    """
    sizes = [1]
    while sizes[-1] < rows:
        sizes.append(4 * sizes[-1])
    return [*(size for size in sizes if size < rows), rows]


def chunk_size(left: int) -> int:
    """Return how many tokens to read next: a size that is at least half full, or the smallest.

    >>> [chunk_size(left) for left in (3, 20, 40, 100, 130)]
    [16, 16, 64, 64, 256]
    """
    return next(size for size in reversed(CHUNKS) if 2 * left >= size or size == CHUNKS[0])
