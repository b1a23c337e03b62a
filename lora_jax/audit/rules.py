"""Formulas of `lora-jax advise`: numbers in, an estimate with its range out, each with its source.

    rate   = 5e-5 * 10 * (2000 / hidden size) ** power     (15 in place of 10 below 100 steps)
    rank   : trained parameters >= supervised tokens, and at least 16
    alpha  = 32, whatever the rank, with the scale alpha / rank
    batch  : at most 32 examples, and few enough for 100 steps

The sources measured language models of 1B parameters and more with AdamW. Where a formula leaves
that ground, its range is wider. The widths of the ranges are this project's.
"""

import math
from dataclasses import dataclass
from typing import Any

REGRET, RULE, SWEEPS = "LoRA Without Regret", "Tinker's rule", "Tinker's sweeps"
PRIMER, TRL, LORA_PLUS, RSLORA = "Tinker's LoRA primer", "TRL", "LoRA+", "rsLoRA"
SOURCES = {
    REGRET: "Thinking Machines, 2025, https://thinkingmachines.ai/blog/lora",
    RULE: "get_lr of tinker-cookbook in 2025, a fit to Llama and Qwen models",
    SWEEPS: "get_lr of tinker-cookbook in 2026: best rates of 28 models, 1e-4 to 1e-3",
    PRIMER: "https://tinker-docs.thinkingmachines.ai/lora-primer",
    TRL: "defaults of TRL 1.16",
    LORA_PLUS: "arXiv 2402.12354",
    RSLORA: "arXiv 2312.03732",
}

FULL_RATE, FULL_WIDTH = 5e-5, 2000  # rate of full fine-tuning at this hidden size
LORA_FACTOR, SHORT_FACTOR, SHORT_STEPS = 10, 15, 100
_LLAMA, _QWEN = 0.781, 0.0775
POWERS = {
    "llama": (_LLAMA,),
    **dict.fromkeys(("qwen2", "qwen3", "qwen3_moe", "qwen2_5_vl", "qwen3_vl"), (_QWEN,)),
}
MEASURED_WIDTHS = (2048, 8192)  # hidden sizes of the models that the rule was fitted to
SPREAD, FAR_SPREAD, UNTESTED_SPREAD = 3, 5, 10

TRL_RATES = {"sft": 2e-5, "dpo": 1e-6, "kto": 1e-6}  # of full fine-tuning
ALPHA = 32
TRL_RANK = 16
LORA_PLUS_RATIO = 16
LARGEST_BATCH = 32  # examples
WIDE_RANK = 64  # from which rsLoRA is worth a comparison


@dataclass(frozen=True)
class Estimate:
    """A value with the range in which the sources, or their extrapolation, leave it."""

    value: Any
    low: Any
    high: Any

    def holds(self, given: Any) -> bool:
        """Return True if `given` is in the range."""
        return self.low <= given <= self.high


def powers(model_type: str) -> tuple[float, ...]:
    """Return the powers of the hidden size in the rule: one of a family that was measured, and
    those of both families for any other.
    """
    return POWERS.get(model_type, (_LLAMA, _QWEN))


def full_rate(hidden_size: int, power: float) -> float:
    """Return the rate of full fine-tuning, 5e-5 * (2000 / hidden size) ** power."""
    return FULL_RATE * (FULL_WIDTH / hidden_size) ** power


def lora_factor(steps: float) -> int:
    """Return the ratio of LoRA's rate to that of full fine-tuning: 10, or 15 in short runs."""
    return SHORT_FACTOR if steps < SHORT_STEPS else LORA_FACTOR


def preference_factor(objective: str) -> float:
    """Return the ratio of an objective's rate to that of supervised tuning in TRL's defaults, which
    are the same for DPO, IPO, ORPO and SimPO.
    """
    kind = objective if objective in TRL_RATES else "dpo"
    return TRL_RATES[kind] / TRL_RATES["sft"]


def was_measured(hidden_size: int) -> bool:
    """Return True if the rule was fitted to models of about this hidden size."""
    low, high = MEASURED_WIDTHS
    return low <= hidden_size <= high


def rate(model_type: str, hidden_size: int, steps: float, objective: str = "sft") -> Estimate:
    """Return the peak rate of LoRA with alpha 32. Between two powers, it is the geometric mean.

    >>> rate("llama", 4096, steps=1000)
    Estimate(value=0.00029, low=9.5e-05, high=0.00086)
    """
    rates = [
        full_rate(hidden_size, power) * lora_factor(steps) * preference_factor(objective)
        for power in powers(model_type)
    ]
    spread = SPREAD if was_measured(hidden_size) else FAR_SPREAD
    if objective != "sft":
        spread = UNTESTED_SPREAD
    value = math.prod(rates) ** (1 / len(rates))
    return Estimate(*map(rounded, (value, min(rates) / spread, max(rates) * spread)))


def rates_to_try(found: Estimate, count: int = 5) -> list[float]:
    """Return rates over the range, evenly by their logarithm.

    >>> rates_to_try(Estimate(3e-4, 1e-4, 9e-4))
    [0.0001, 0.00017, 0.0003, 0.00052, 0.0009]
    """
    step = math.log(found.high / found.low) / (count - 1)
    return [rounded(found.low * math.exp(step * i)) for i in range(count)]


def least_rank(tokens: int, per_rank: int) -> int:
    """Return the smallest rank with as many parameters as there are supervised tokens.

    per_rank: parameters of rank 1
    """
    return max(1, -(-tokens // per_rank))


def rank(tokens: int, per_rank: int, largest: int) -> Estimate:
    """Return a rank of at least 16 with as many parameters as there are supervised tokens, as a
    power of two; `largest` is the rank of the smallest weight.

    >>> rank(tokens=5_000_000, per_rank=305_280, largest=192)
    Estimate(value=32, low=32, high=128)
    """
    low = 2 ** math.ceil(math.log2(least_rank(tokens, per_rank)))
    value = max(low, TRL_RANK)
    return Estimate(*(min(found, largest) for found in (value, low, 4 * value)))


def equal_rank(rank: int, per_rank: int, other: int) -> int:
    """Return the rank of other weights at which they have as many parameters.

    other: parameters of the other weights at rank 1
    """
    return max(1, round(rank * per_rank / other))


def rslora_alpha(alpha: float, rank: int) -> float:
    """Return the alpha with which rsLoRA has the scale alpha / rank at this rank.

    >>> rslora_alpha(32, 16)
    8.0
    """
    return alpha / math.sqrt(rank)


def batch(rows: float, examples_per_row: float, shards: int = 1) -> Estimate:
    """Return the rows of a step: at most 32 examples, and 100 steps or more, as a power of two
    times `shards`.

    rows: of the whole run
    shards: rows that a step is a multiple of, such as the devices

    >>> batch(rows=1000, examples_per_row=1)
    Estimate(value=8, low=1, high=32)
    """
    high = _power_below(LARGEST_BATCH / examples_per_row / shards)
    value = min(high, _power_below(rows / SHORT_STEPS / shards))
    return Estimate(value * shards, shards, high * shards)


def batches_to_try(found: Estimate) -> list[int]:
    """Return rows of a step from a quarter of the value to four times the most that is advised."""
    tried = {max(found.low, found.value // 4), found.value, found.high, 4 * found.high}
    return sorted(tried)


def betas_to_try(beta: float) -> list[float]:
    """Return values of an objective's beta around a given one.

    >>> betas_to_try(0.1)
    [0.033, 0.1, 0.3]
    """
    return [rounded(beta / 3), beta, rounded(3 * beta)]


def ranks_to_try(found: Estimate) -> list[int]:
    """Return the ends of the range and the value."""
    return sorted({found.low, found.value, found.high})


def rounded(value: float) -> float:
    """Return a number with two significant digits."""
    return float(f"{value:.1e}")


def numeral(value: float) -> str:
    """Return a rate as text.

    >>> numeral(0.00013), numeral(0.001), numeral(5e-5 / 3)
    ('1.3e-4', '1e-3', '1.7e-5')
    """
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def _power_below(value: float) -> int:
    """Return the largest power of two that is not above a number, and at least 1."""
    return 2 ** max(0, math.floor(math.log2(max(value, 1))))
