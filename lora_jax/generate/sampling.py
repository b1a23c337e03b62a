"""Next tokens of the rows of a batch, each with its own settings.

rows   = stack_rows([row_of(sampling, number, stop_tokens, vocab), ...])    # arrays (b, ..)
logits = keep_allowed(logits, allowed)                                      # by grammars
seen   = start_row(empty_seen(b, vocab), row, prompt_mask(prompt, vocab))   # at admission
tokens = choose(logits, rows, step, seen)                                   # (b,)
seen   = count_tokens(seen, tokens, active)

All settings are arrays, so that one compiled program serves any of them. The order is that of vLLM:
bias, stop tokens masked, penalties (repetition, then frequency and presence), temperature, min_p,
top_k, top_p. transformers applies min_p last; its repetition penalty comes before the mask of stop
tokens, which gives the same.
"""

import math
import numbers
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.errors import raise_all
from lora_jax.generate.likely import keep_likely

MAX_BIASES = 300  # entries of `logit_bias`, as in vLLM's and OpenAI's interface
MAX_STOPS = 64  # stop tokens of a row
_ALL = np.iinfo(np.int32).max
_SEEDS = 2**32
_GREEDY_BELOW = 1e-5  # as vLLM: a division by less overflows
# Logits stay finite in float32 with the largest bias, penalty and 1 / temperature together.
_LARGEST_BIAS = 1e30
_LARGEST_TEMPERATURE = 1e30  # any larger one draws from all tokens alike, too
_LARGEST_PENALTY = 1000.0


@dataclass(frozen=True)
class Sampling:
    """Sampling settings, named and applied as in vLLM.

    Penalties, bias and `min_new_tokens` change greedy answers too; `top_k`, `top_p` and `min_p` do
    not.

    Raises:
        UserError: values out of range, all in one message.

    Example:
        >>> from lora_jax.generate.sampling import Sampling
        >>> Sampling(temperature=0.7, top_p=0.9, logit_bias={2: -100.0}).top_p
        0.9
    """

    temperature: float = 0.0  # 0 (or below 1e-5): greedy, the most likely token
    top_k: int | None = None  # number of most likely tokens to draw from; null, 0 and -1: all
    top_p: float = 1.0  # draw from the fewest tokens whose probabilities add up to this
    seed: int = 0
    min_p: float = 0.0  # draw from tokens at least so likely, relative to the most likely one
    presence_penalty: float = 0.0  # subtracted from the logits of generated tokens
    frequency_penalty: float = 0.0  # the same, times how often the token was generated
    repetition_penalty: float = 1.0  # divides positive logits of tokens of prompt and answer
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)  # added to logits
    min_new_tokens: int = 0  # no stop token before so many tokens

    def __post_init__(self) -> None:
        at_least = {"top_k": -1, "min_new_tokens": 0}
        problems = {
            f"temperature={self.temperature!r} must not be negative, and finite": not (
                _is_real(self.temperature) and 0 <= self.temperature < math.inf
            ),
            f"top_p={self.top_p!r} must be above 0 and at most 1": not (
                _is_real(self.top_p) and 0 < self.top_p <= 1
            ),
            f"min_p={self.min_p!r} must be from 0 to 1": not (
                _is_real(self.min_p) and 0 <= self.min_p <= 1
            ),
            f"seed={self.seed!r} must be an integer from 0 to {_SEEDS - 1}": not (
                _is_whole(self.seed) and 0 <= self.seed < _SEEDS
            ),
            f"repetition_penalty={self.repetition_penalty!r} must be from 0.001 to 1000": not (
                _is_real(self.repetition_penalty)
                and 1 / _LARGEST_PENALTY <= self.repetition_penalty <= _LARGEST_PENALTY
            ),
        }
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            wrong = not (_is_real(value) and -2 <= value <= 2)
            problems[f"{name}={value!r} must be from -2 to 2"] = wrong
        for name, least in at_least.items():
            value = getattr(self, name)
            wrong = not (_is_whole(value) and least <= value <= _ALL)
            wrong &= not (name == "top_k" and value is None)
            problems[f"{name}={value!r} must be an integer, at least {least}"] = wrong
        raise_all([text for text, holds in problems.items() if holds] + self._bias_problems())
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))

    def _bias_problems(self) -> list[str]:
        if not isinstance(self.logit_bias, Mapping):
            return [f"logit_bias={self.logit_bias!r} must map token ids to numbers"]
        problems = [
            f"logit_bias: {token!r} is no token id"
            for token in self.logit_bias
            if not (_is_whole(token) and token >= 0)
        ]
        problems += [
            f"logit_bias: {value!r} of token {token!r} must be a finite number"
            for token, value in self.logit_bias.items()
            if not (_is_real(value) and abs(value) <= _LARGEST_BIAS)
        ]
        if len(self.logit_bias) > MAX_BIASES:
            many = len(self.logit_bias)
            problems.append(f"logit_bias has {many} entries; it may have at most {MAX_BIASES}")
        return problems


def _is_real(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _is_whole(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplingRows:
    """Sampling settings of the rows of a batch, arrays of NumPy or JAX.

    The draws of a row depend on its seed, its number and the step only.
    """

    seed: Any  # (b,) uint32
    number: Any  # (b,) uint32
    temperature: Any  # (b,) float32; 0: greedy
    top_k: Any  # (b,) int32; at least the size of the vocabulary: all
    tail: Any  # (b,) float32, 1 - top_p
    min_p: Any  # (b,) float32
    presence: Any  # (b,) float32
    frequency: Any  # (b,) float32
    repetition: Any  # (b,) float32
    bias_ids: Any  # (b, MAX_BIASES) int32, padded with -1
    bias_values: Any  # (b, MAX_BIASES) float32
    stops: Any  # (b, MAX_STOPS) int32, padded with -1
    min_new: Any  # (b,) int32


def row_of(
    sampling: Sampling, number: int, stop_tokens: Collection[int], vocab: int
) -> SamplingRows:
    """Return the settings of one row, NumPy arrays without the row axis.

    Raises:
        UserError: a biased token outside the vocabulary; more than `MAX_STOPS` stop tokens; a
            number that does not fit 32 bits.

    Example:
        >>> from lora_jax.generate.sampling import Sampling, row_of
        >>> row_of(Sampling(temperature=0.5), number=0, stop_tokens={2}, vocab=100).stops[:2]
        array([ 2, -1], dtype=int32)
    """
    bias = sampling.logit_bias
    outside = sorted(token for token in bias if token >= vocab)
    problems = {
        f"logit_bias: tokens {outside[:5]} are outside the vocabulary of {vocab}": outside,
        f"{len(stop_tokens)} stop tokens are more than {MAX_STOPS}": len(stop_tokens) > MAX_STOPS,
        f"number={number!r} must be from 0 to {_SEEDS - 1}": not 0 <= number < _SEEDS,
    }
    raise_all([text for text, holds in problems.items() if holds])
    temperature = sampling.temperature if sampling.temperature >= _GREEDY_BELOW else 0.0
    return SamplingRows(
        seed=np.uint32(sampling.seed),
        number=np.uint32(number),
        temperature=np.float32(min(temperature, _LARGEST_TEMPERATURE)),
        top_k=np.int32(kept_number(sampling.top_k)),
        tail=np.float32(1 - sampling.top_p),
        min_p=np.float32(sampling.min_p),
        presence=np.float32(sampling.presence_penalty),
        frequency=np.float32(sampling.frequency_penalty),
        repetition=np.float32(sampling.repetition_penalty),
        bias_ids=_padded(list(bias), MAX_BIASES, -1, np.int32),
        bias_values=_padded(list(bias.values()), MAX_BIASES, 0, np.float32),
        stops=_padded(sorted(stop_tokens), MAX_STOPS, -1, np.int32),
        min_new=np.int32(sampling.min_new_tokens),
    )


def kept_number(top_k: int | None) -> int:
    """Return the number of tokens that `top_k` keeps; null, 0 and -1 keep all."""
    return _ALL if top_k is None or top_k < 1 else top_k


def _padded(values: Sequence[Any], length: int, padding: int, dtype: Any) -> np.ndarray:
    return np.array([*values, *[padding] * (length - len(values))], dtype)


def stack_rows(rows: Sequence[SamplingRows]) -> SamplingRows:
    """Return the settings of a batch from those of its rows, NumPy arrays with a row axis."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *rows)


def set_row(rows: SamplingRows, index: Any, row: SamplingRows) -> SamplingRows:
    """Return `rows` with the settings of one row replaced; to be compiled, `rows` donated."""
    return jax.tree.map(lambda all_, one: all_.at[index].set(one), rows, row)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Seen:
    """Tokens that penalties depend on: how often each was generated, and those of the prompt."""

    counts: jax.Array  # (b, vocab) int32
    in_prompt: jax.Array  # (b, vocab) bool


def empty_seen(rows: int, vocab: int) -> Seen:
    """Return the state of rows without a prompt."""
    return Seen(jnp.zeros((rows, vocab), jnp.int32), jnp.zeros((rows, vocab), bool))


def prompt_mask(prompt: Sequence[int], vocab: int) -> np.ndarray:
    """Return which tokens (vocab,) a prompt contains, for `start_row`."""
    mask = np.zeros(vocab, bool)
    mask[np.asarray(prompt, np.int64)] = True
    return mask


def start_row(seen: Seen, index: Any, mask: Any) -> Seen:
    """Return `seen` with one row at the end of its prompt, `mask` (vocab,) as of `prompt_mask`; to
    be compiled, `seen` donated.
    """
    return Seen(seen.counts.at[index].set(0), seen.in_prompt.at[index].set(mask))


def count_tokens(seen: Seen, tokens: jax.Array, active: jax.Array) -> Seen:
    """Return `seen` with the generated `tokens` (b,) counted in the rows that are `active` (b,)."""
    row = jnp.arange(len(tokens))
    counts = seen.counts.at[row, tokens].add(active.astype(jnp.int32))
    return Seen(counts, seen.in_prompt)


def choose(logits: jax.Array, rows: SamplingRows, step: jax.Array, seen: Seen) -> jax.Array:
    """Return the next tokens (b,) int32 for `logits` (b, vocab) float32.

    `step` (b,) is the number of tokens that a row has generated. A row with temperature 0 takes its
    most likely token (the first of equal ones), the others draw with the key
    fold_in(fold_in(key(seed), number), step). Parts that no row needs do not run; a row gets the
    same bits whether or not another row needs them.

    Example:
        >>> from lora_jax.generate import sampling
        >>> row = sampling.row_of(sampling.Sampling(), 0, (), 4)
        >>> rows, seen = sampling.stack_rows([row]), sampling.empty_seen(1, 4)
        >>> logits = jnp.array([[0.0, 3.0, 1.0, 2.0]])
        >>> print(sampling.choose(logits, rows, jnp.array([0]), seen))
        [1]
    """
    early = step < rows.min_new
    edits = early | jnp.any(jnp.asarray(rows.bias_ids) >= 0, axis=-1)
    edits |= (rows.presence != 0) | (rows.frequency != 0) | (rows.repetition != 1)

    def edit(logits: jax.Array) -> jax.Array:
        return jnp.where(edits[:, None], _edited(logits, rows, early, seen), logits)

    logits = jax.lax.cond(edits.any(), edit, lambda x: x, logits)
    drawn = jnp.asarray(rows.temperature) > 0

    def draw(logits: jax.Array) -> jax.Array:
        scaled = logits / jnp.where(drawn, rows.temperature, 1)[:, None]
        step_keys = jax.vmap(jax.random.fold_in)(_keys(rows), step)
        top_k = jnp.where(drawn, rows.top_k, _ALL)
        tail, min_p = (jnp.where(drawn, x, 0) for x in (rows.tail, rows.min_p))
        tokens = draw_tokens(step_keys, scaled, top_k, tail, min_p)
        return jnp.where(drawn, tokens, _likeliest(logits))

    return jax.lax.cond(drawn.any(), draw, _likeliest, logits)


def every_token(rows: int, vocab: int) -> np.ndarray:
    """Return the bits (b, ceil(vocab / 32)) uint32 that allow all tokens."""
    return np.full((rows, -(-vocab // 32)), 2**32 - 1, np.uint32)


def keep_allowed(logits: jax.Array, allowed: jax.Array) -> jax.Array:
    """Return logits (b, vocab) with -inf for the tokens whose bit in `allowed` is 0: token t has
    bit t % 32 of allowed[:, t // 32]. Nothing is computed if all rows allow all tokens.

    Example:
        >>> from lora_jax.generate import sampling
        >>> print(sampling.keep_allowed(jnp.zeros((1, 4)), jnp.array([[0b0101]], jnp.uint32)))
        [[  0. -inf   0. -inf]]
    """

    def mask(logits: jax.Array) -> jax.Array:
        bits = (allowed[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
        bits = bits.reshape(len(logits), -1)[:, : logits.shape[-1]]
        return jnp.where(bits == 1, logits, -jnp.inf)

    some = (allowed != np.uint32(2**32 - 1)).any()
    return jax.lax.cond(some, mask, lambda x: x, logits)


def _keys(rows: SamplingRows) -> jax.Array:
    keys = jax.vmap(jax.random.key)(jnp.asarray(rows.seed))
    return jax.vmap(jax.random.fold_in)(keys, jnp.asarray(rows.number))


def _likeliest(logits: jax.Array) -> jax.Array:
    """Return the first of the largest logits, as argmax, which takes three times as long on CPU."""
    best, vocab = logits == logits.max(axis=-1, keepdims=True), logits.shape[-1]
    return jnp.where(best, jnp.arange(vocab, dtype=jnp.int32), vocab - 1).min(axis=-1)


def _edited(logits: jax.Array, rows: SamplingRows, early: jax.Array, seen: Seen) -> jax.Array:
    """Return logits with bias, stop tokens masked in `early` rows (b,), and penalties."""
    vocab, row = logits.shape[-1], jnp.arange(len(logits))[:, None]
    bias_ids = jnp.where(rows.bias_ids < 0, vocab, rows.bias_ids)
    logits = logits.at[row, bias_ids].add(rows.bias_values, mode="drop")
    stops = jnp.where(early[:, None] & (rows.stops >= 0), rows.stops, vocab)
    logits = logits.at[row, stops].set(-jnp.inf, mode="drop")
    repetition, generated = rows.repetition[:, None], seen.counts > 0
    repeated = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = jnp.where(generated | seen.in_prompt, repeated, logits)
    logits = logits - rows.frequency[:, None] * seen.counts
    return logits - rows.presence[:, None] * generated


def draw_tokens(keys: jax.Array, logits: jax.Array, top_k: Any, tail: Any, min_p: Any) -> jax.Array:
    """Return a token per row, drawn from the tokens that `keep_likely` keeps."""
    cut = (top_k < logits.shape[-1]) | (tail > 0) | (min_p > 0)
    kept = jax.lax.cond(
        jnp.any(cut), lambda x: keep_likely(x, top_k, tail, min_p), lambda x: x, logits
    )
    # The token of `jax.random.categorical`.
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(keys)
    return _likeliest(jax.lax.optimization_barrier(noise + kept))
