"""Advice on the settings of a run: a start for each, its reason, its source, and its check.

    advice = advise(config, console)  # reads config.json, tokenizer and data; no weights
    print(advice_text.advice_text(advice))
    advice_text.space_text(advice, ["rate", "rank"])  # a file for `lora-jax sweep --space`

The formulas are in `rules.py`, the numbers that they take in `facts.py`.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from lora_jax.audit import data as inspection
from lora_jax.audit import rules
from lora_jax.audit.facts import FORMS, OBJECTIVES, Facts, find_facts, find_form
from lora_jax.config import Config
from lora_jax.config.objective import beta_of
from lora_jax.data import sets
from lora_jax.errors import UserError
from lora_jax.session import open_session


@dataclass(frozen=True)
class Line:
    """Advice on a setting.

    name: of its check
    axis: of a space that compares values, or what there is instead
    """

    setting: str
    name: str
    yours: Any
    advice: Any
    range: str
    fits: bool  # yours is in the range
    reason: str
    sources: tuple[str, ...]
    axis: Mapping[str, Any]

    @property
    def verdict(self) -> str:
        """Comparison of the two values in a word."""
        if self.yours == self.advice:
            return "same"
        return "in range" if self.fits else "outside"


@dataclass(frozen=True)
class Advice:
    """Lines of advice, with the config and the facts that they are for.

    held: settings that go with the advice and have no line, by dotted key
    """

    config: Config
    facts: Facts
    lines: tuple[Line, ...]
    held: Mapping[str, Any]

    @property
    def checks(self) -> dict[str, Mapping[str, Any]]:
        """Axes of a space by the names of the checks; lines without one are left out."""
        return {line.name: line.axis for line in self.lines if line.axis}


def advise(config: Config, console: Console) -> Advice:
    """Return advice on a run of LoRA, from the shapes of its model and from its data.

    Raises:
        UserError: another method; as `inspect`.
    """
    sets.training_sources(config)
    if not config.adapter.trains_lora:
        raise UserError(
            f"adapter.method={config.adapter.method}: the advice is for method=lora, and "
            "docs/methods.md has the rates of other methods; add adapter.method=lora to see it"
        )
    session = open_session(config, weights=False)
    form = "one" if session.model.labels else find_form(config)
    possible = OBJECTIVES[form]
    objective = config.train.objective if config.train.objective in possible else possible[0]
    read = dataclasses.replace(config, train=dataclasses.replace(config.train, objective=objective))
    facts = find_facts(session, inspection.inspect(read, console, examples=0), form)
    lines = tuple(_lines(config, facts, objective))
    return Advice(config, facts, lines, dict(_held(config, lines, facts)))


def _lines(config: Config, facts: Facts, objective: str) -> Iterator[Line]:
    batch = rules.batch(facts.rows, facts.examples_per_row, _shards(config))
    rank = rules.rank(facts.seen, facts.per_rank, facts.largest_rank)
    is_new = config.adapter.path is None  # else the adapter has its rank, alpha and targets
    yield _rate(config, facts, math.ceil(facts.rows / batch.value), objective)
    if is_new:
        yield _rank(config, facts, rank)
        yield _alpha(config)
        yield _scale(config, facts, rank)
    yield _ratio(config)
    if is_new:
        yield _targets(config, facts, rank)
    yield _batch(config, facts, batch)
    yield _objective(config, facts, objective)


def _shards(config: Config) -> int:
    """Return the rows that a batch is a multiple of, as far as the config says."""
    devices = max(1, config.mesh.data) * max(1, config.mesh.fsdp)
    return max(devices, config.train.micro_batch_size or 1)


def _rate(config: Config, facts: Facts, steps: int, objective: str) -> Line:
    found = rules.rate(facts.model_type, facts.hidden_size, steps, objective)
    known, factor = rules.powers(facts.model_type), rules.lora_factor(steps)
    power = " or ".join(f"{one:g}" for one in known)
    full = [rules.numeral(rules.full_rate(facts.hidden_size, one)) for one in known]
    parts = [
        f"5e-5 * {factor} * (2000 / {facts.hidden_size}) ** {power}; without the factor {factor}, "
        f"{' or '.join(full)}, it is the rate of full fine-tuning"
    ]
    if len(known) > 1:
        parts.append(f"no source measured {facts.model_type}: both fits, and their mean")
    if factor != rules.LORA_FACTOR:
        parts.append(f"{steps} steps are a short run, so the factor is {factor} and not 10")
    if not rules.was_measured(facts.hidden_size):
        parts.append("the fit is of hidden sizes 2,048 to 8,192: extrapolated")
    source = [rules.REGRET, rules.RULE, rules.SWEEPS]
    if objective != "sft":
        share = rules.preference_factor(objective)
        parts.append(f"times {share:g} for {objective}, TRL's ratio; no source sweeps it by model")
        source.append(rules.TRL)
    given = config.train.learning_rate
    return Line(
        setting="train.learning_rate",
        name="rate",
        yours=given,
        advice=found.value,
        range=f"{rules.numeral(found.low)} to {rules.numeral(found.high)}",
        fits=found.holds(given),
        reason=". ".join(f"{part[:1].upper()}{part[1:]}" for part in parts),
        sources=tuple(source),
        axis={"train.learning_rate": rules.rates_to_try(found)},
    )


def _rank(config: Config, facts: Facts, found: rules.Estimate) -> Line:
    least = rules.least_rank(facts.seen, facts.per_rank)
    parts = [
        f"Rank 1 trains {facts.per_rank:,} parameters, and the run sees {facts.seen:,} supervised "
        f"tokens: rank {least:,} has as many parameters. 16 is TRL's default"
    ]
    if least > found.high:
        parts.append(
            f"More than {found.high:,} is above what is advised: expect slower progress than with "
            "method=full"
        )
    if facts.form != "one":
        parts.append("Comparisons hold less than their tokens, so less may do")
    return Line(
        setting="adapter.rank",
        name="rank",
        yours=config.adapter.rank,
        advice=found.value,
        range=f"{found.low} to {found.high}",
        fits=found.holds(config.adapter.rank),
        reason=". ".join(parts),
        sources=(rules.REGRET, rules.PRIMER, rules.TRL),
        axis={"adapter.rank": rules.ranks_to_try(found)},
    )


def _alpha(config: Config) -> Line:
    given = config.adapter.alpha
    return Line(
        setting="adapter.alpha",
        name="alpha",
        yours=given,
        advice=float(rules.ALPHA),
        range=f"{rules.ALPHA // 2} to {2 * rules.ALPHA}",
        fits=rules.ALPHA / 2 <= given <= 2 * rules.ALPHA,
        reason="The rule of the rate is for alpha 32 at every rank. Early steps depend on alpha "
        "times rate alone: half the alpha wants twice the rate",
        sources=(rules.REGRET, rules.TRL),
        axis={"adapter.alpha": [rules.ALPHA / 2, float(rules.ALPHA), 2.0 * rules.ALPHA]},
    )


def _scale(config: Config, facts: Facts, rank: rules.Estimate) -> Line:
    same = rules.rounded(rules.rslora_alpha(rules.ALPHA, rank.value))
    wide = min(rules.WIDE_RANK, facts.largest_rank)
    return Line(
        setting="adapter.use_rslora",
        name="rslora",
        yours=config.adapter.use_rslora,
        advice=False,
        range=f"true from rank {rules.WIDE_RANK}",
        fits=not config.adapter.use_rslora or config.adapter.rank >= rules.WIDE_RANK,
        reason="With alpha / rank the best rate hardly depends on the rank. alpha / sqrt(rank) has "
        f"large ranks act more: alpha {same:g} has the scale of alpha 32 at rank {rank.value}",
        sources=(rules.REGRET, rules.RSLORA),
        axis={
            "scale": [
                {"adapter.use_rslora": False, "adapter.alpha": float(rules.ALPHA)},
                {"adapter.use_rslora": True, "adapter.alpha": same},
            ],
            "adapter.rank": sorted({rank.value, wide}),
        },
    )


def _ratio(config: Config) -> Line:
    given, most = config.adapter.lora_plus_ratio, rules.LORA_PLUS_RATIO
    return Line(
        setting="adapter.lora_plus_ratio",
        name="plus",
        yours=given,
        advice=1.0,
        range=f"1 to {most}",
        fits=1 <= given <= most,
        reason=f"One rate for both factors, as in the sources of the rate. The paper takes {most}, "
        "with a lower rate of lora_a: sweep it together with the rate",
        sources=(rules.REGRET, rules.LORA_PLUS),
        axis={"adapter.lora_plus_ratio": [1.0, 4.0, float(most)]},
    )


def _targets(config: Config, facts: Facts, rank: rules.Estimate) -> Line:
    given = config.adapter.target_modules
    share = facts.groups["mlp"][0] / facts.per_rank
    return Line(
        setting="adapter.target_modules",
        name="targets",
        yours=given if isinstance(given, str) else list(given),
        advice="all-linear",
        range="all-linear",
        fits=given == "all-linear",
        reason=f"All linears, those of the MLP above all ({share:.0%} of the parameters here). "
        "Attention alone learns less, with as many parameters too, which the check compares",
        sources=(rules.REGRET, rules.PRIMER),
        axis=_compared(facts, rank.value),
    )


def _compared(facts: Facts, rank: int) -> dict[str, Any]:
    """Return the axis that compares targets with equal parameters, at a rank that all allow."""
    if not all(count for count, _ in facts.groups.values()):
        return {}
    room = [rank]
    for count, own in facts.groups.values():
        smallest = min(min(target.shape) for target in own)
        room.append(int(smallest * count / facts.per_rank))
    rank = max(1, min(room))
    entries: list[dict[str, Any]] = [{"adapter.target_modules": "all-linear", "adapter.rank": rank}]
    for name in facts.groups:
        count, own = facts.groups[name]
        entries.append(
            {
                "adapter.target_modules": _named(facts, name),
                "adapter.rank": rules.equal_rank(rank, facts.per_rank, count),
            }
        )
    return {"targets": entries}


def _named(facts: Facts, group: str) -> str | list[str]:
    """Return target_modules that select a group: names, or a regex where both groups share some."""

    def ends(name: str, pattern: str) -> list[str]:
        own = [re.sub(pattern, "", target.names[0]) for target in facts.groups[name][1]]
        return list(dict.fromkeys(own))

    names = {name: ends(name, r".*\.") for name in facts.groups}
    if not set.intersection(*map(set, names.values())):
        return names[group]
    within = "|".join(re.escape(end) for end in ends(group, r".*?\.\d+\."))
    return rf".*\.\d+\.({within})"


def _batch(config: Config, facts: Facts, found: rules.Estimate) -> Line:
    given = config.train.batch_size
    tried = [
        {"train.batch_size": rows, "train.steps": max(1, round(facts.rows / rows))}
        for rows in rules.batches_to_try(found)
    ]
    return Line(
        setting="train.batch_size",
        name="batch",
        yours=given,
        advice=found.value,
        range=f"{found.low} to {found.high}",
        fits=found.holds(given),
        reason=f"A row holds {facts.examples_per_row:.1f} examples. LoRA loses more than full "
        "fine-tuning from batches above 32 examples, whatever its rank; and runs of fewer than 100 "
        f"steps need other rates: the {facts.rows:,} rows of this run make "
        f"{math.ceil(facts.rows / found.value):,}. Compare batches at their own best rates, with "
        "--check batch --check rate",
        sources=(rules.REGRET,),
        axis={"batch": tried},
    )


def _objective(config: Config, facts: Facts, objective: str) -> Line:
    given, possible = config.train.objective, OBJECTIVES[facts.form]
    reason = FORMS[facts.form].capitalize()
    axis: dict[str, Any] = {}
    if facts.classifies:
        reason = "The model classifies"
    if facts.form != "one":
        beta = beta_of(config.objective, objective)
        reason += f". objective.beta={beta:g}: the larger, the closer to the reference. TRL has 0.1"
        axis = {"objective.beta": rules.betas_to_try(beta)}
    return Line(
        setting="train.objective",
        name="objective",
        yours=given,
        advice=objective,
        range=", ".join(possible),
        fits=given in possible,
        reason=reason,
        sources=(rules.TRL,) if axis else (),
        axis=axis,
    )


def _held(config: Config, lines: Sequence[Line], facts: Facts) -> Iterator[tuple[str, Any]]:
    """Yield the steps that an advised batch takes for the same rows, where steps are given."""
    batch = next(line for line in lines if line.name == "batch")
    if batch.verdict != "same" and config.train.epochs is None:
        yield "train.steps", math.ceil(facts.rows / batch.advice)
