"""Settings of the objective, each read by some values of `train.objective` only."""

from dataclasses import dataclass

from lora_jax.config.options import option

OBJECTIVES = ("sft", "dpo", "ipo", "orpo", "simpo", "kto")
_REFERRING = ("dpo", "ipo", "kto")  # compare with a reference model
_PAIRED = ("dpo", "ipo", "orpo", "simpo")  # rows have a chosen and a rejected answer
_SMOOTHED = ("dpo", "simpo")
_BETA, _BETA_OF = 0.1, {"simpo": 2.0}
_MOST = 10**6  # no slip of the hand


@dataclass(frozen=True)
class ObjectiveConfig:
    """The options of `train.objective`. docs/objectives.md has the equations."""

    # scale of the rewards: the larger, the closer the model stays to the reference (IPO: tau, ORPO:
    # lambda); null: 0.1, with simpo 2
    beta: float | None = option(None, above=0, at_most=_MOST, objectives=(*_PAIRED, "kto"))
    # share of the pairs that are taken to be the wrong way round (conservative DPO); raise it for
    # noisy preferences
    label_smoothing: float = option(0.0, at_least=0, below=0.5, objectives=_SMOOTHED)
    # weight of the cross-entropy of the chosen answers, which keeps these likely; null: 0, with
    # orpo 1
    sft_weight: float | None = option(None, at_least=0, at_most=_MOST, objectives=_PAIRED)
    # the model that log-probabilities are compared with. start: the model before its first step,
    # the base or the adapter of adapter.path. base: the model without adapters. Or an adapter
    # directory over the same base
    reference: str = option("start", objectives=_REFERRING)
    # compare means over the tokens of an answer instead of sums, so that long answers weigh no
    # more; null: false, with ipo true
    length_normalize: bool | None = option(None, objectives=("dpo", "ipo"))
    # weight of the divergence from the base on data.replay, which keeps what the model could do
    base_kl: float = option(0.0, at_least=0, at_most=_MOST)
    # margin by which the chosen answer should win, in rewards
    gamma: float = option(0.5, at_least=0, at_most=_MOST, objectives=("simpo",))
    # weight of rows with label true; balance unequal numbers of rows with the next one
    desirable_weight: float = option(1.0, above=0, at_most=_MOST, objectives=("kto",))
    # weight of rows with label false
    undesirable_weight: float = option(1.0, above=0, at_most=_MOST, objectives=("kto",))


def beta_of(settings: ObjectiveConfig, objective: str) -> float:
    """Return `beta`, or the default of an objective."""
    return _BETA_OF.get(objective, _BETA) if settings.beta is None else settings.beta


def sft_weight_of(settings: ObjectiveConfig, objective: str) -> float:
    """Return `sft_weight`, or the default of an objective."""
    return float(objective == "orpo") if settings.sft_weight is None else settings.sft_weight


def is_normalized(settings: ObjectiveConfig, objective: str) -> bool:
    """Return `length_normalize`, or the default of an objective."""
    given = settings.length_normalize
    return objective == "ipo" if given is None else given
