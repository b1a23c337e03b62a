"""What the trials of a study say: answers with intervals, the table, the picture, the page.

    an answer = the mean over the seeds of a contrast, +- t(0.975, seeds - 1) * s / sqrt(seeds)

A contrast is a weighted sum over variants, of the same seed each: of the loss at the best rate
(`loss`), of the loss on general text there (`general`), or of the logarithm of the best rate
(`rate`). The best rate of a seed is the minimum of the parabola through its lowest loss and the
losses next to it.
"""

import math
import os
import platform
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from study import COMPLETE, DIVERGED, NAMES, Study, Trial, load

PAGE = """# Studies

<!-- Written by `python studies/run.py --write` from studies/*.yaml and docs/studies/*.json. -->

What is said about LoRA, measured on models and data that come as Python packages. A study is one
file in `studies/` and one command:

```bash
python studies/run.py ranks                                     # one of them
python studies/run.py all                                       # all; it goes on after a stop
python studies/run.py ranks model=org/name train.steps=500 --output runs/mine    # on your model
```

These are small models and small tasks: a claim that does not show here may well hold where its
source measured it. Every answer has the 95 % interval of Student's t over the seeds. A seed decides
the start and the order of the rows, and variants are compared seed by seed. "As claimed": all of
the interval is in the range of the claim; "not as claimed": none of it is; else the trials do not
decide. The sources give no ranges: losses count as equal within 0.02 nats here, and rates within a
factor of two. Learning rates are half a decade apart; one seed tries all of them, and the others
the best.
"""
STYLE = {
    "svg.hashsalt": "lora_jax",  # the same file from run to run
    "font.size": 9,
    "font.family": "DejaVu Sans",
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def facts() -> dict[str, Any]:
    """Return what the results depend on besides the settings: machine, date, versions."""
    machine = platform.processor() or platform.machine()
    if (file := Path("/proc/cpuinfo")).exists():
        if found := re.search(r"model name\s*: (.*)", file.read_text(encoding="utf-8")):
            machine = found[1]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = {name: version(name) for name in ("lora_jax", "jax")}
    return {"machine": machine, "cores": cores, "date": date.today().isoformat(), **versions}


def complete(study: Study, variant: str) -> dict[float, dict[int, Trial]]:
    """Return the complete trials of a variant, by rate and seed."""
    found: dict[float, dict[int, Trial]] = {}
    for one in study.trials:
        if one["variant"] == variant and one["status"] == COMPLETE:
            found.setdefault(one["rate"], {})[one["seed"]] = one
    return dict(sorted(found.items()))


def best(study: Study, variant: str) -> tuple[float, dict[int, Trial]] | None:
    """Return the rate with the lowest mean loss, of those with all seeds, and its trials."""
    whole = [
        (rate, trials)
        for rate, trials in complete(study, variant).items()
        if trials.keys() == set(study.seeds)
    ]
    means = [statistics.fmean(one["loss"] for one in trials.values()) for _, trials in whole]
    return whole[means.index(min(means))] if whole else None


def lowest(losses: Mapping[float, float]) -> float:
    """Return the log10 of the rate with the lowest loss, by a parabola through three losses.

    >>> round(10 ** lowest({1e-4: 0.3, 1e-3: 0.1, 1e-2: 0.3}), 6)
    0.001
    """
    rates = sorted(losses)
    middle = min(range(len(rates)), key=lambda i: losses[rates[i]])
    x = [math.log10(rate) for rate in rates]
    if not 0 < middle < len(rates) - 1:
        return x[middle]
    (x0, x1, x2), (y0, y1, y2) = (
        values[middle - 1 : middle + 2] for values in (x, [losses[rate] for rate in rates])
    )
    left, right = (x1 - x0) * (y1 - y2), (x1 - x2) * (y1 - y0)
    if left == right:
        return x1
    return x1 - 0.5 * ((x1 - x0) * left - (x1 - x2) * right) / (left - right)


def by_seed(study: Study, variant: str, measure: str) -> dict[int, float]:
    """Return a measure of a variant for each seed; nothing if not all are there."""
    chosen = best(study, variant)
    if chosen is None:
        return {}
    if measure != "rate":
        return {seed: one[measure] for seed, one in chosen[1].items() if measure in one}
    trials = complete(study, variant)
    return {
        seed: lowest({rate: own[seed]["loss"] for rate, own in trials.items() if seed in own})
        for seed in study.seeds
    }


def interval(values: Iterable[float]) -> tuple[float, float, float]:
    """Return the mean of some values and the ends of its interval; those of one are infinite.

    >>> [round(x, 3) for x in interval([1.0, 2.0, 3.0])]
    [2.0, -0.484, 4.484]
    """
    from scipy.stats import t

    values = list(values)
    mean, half = statistics.fmean(values), math.inf
    if len(values) > 1:
        error = statistics.stdev(values) / math.sqrt(len(values))
        half = float(t.ppf(0.975, len(values) - 1)) * error
    return mean, mean - half, mean + half


def answer(study: Study, question: Mapping[str, Any]) -> str:
    """Return the answer to a question as a line of the page."""
    measure, weights = question["measure"], question["contrast"]
    parts = {variant: by_seed(study, variant, measure) for variant in weights}
    seeds = set(study.seeds).intersection(*parts.values())
    if not seeds:
        lacking = ", ".join(variant for variant, own in parts.items() if not own)
        return f"- {question['ask']}: no answer, as trials of {lacking} diverged."
    sums = [sum(w * parts[v][seed] for v, w in weights.items()) for seed in sorted(seeds)]
    found = interval(sums)
    if measure == "rate":
        found = tuple(10**x if x < 300 else math.inf for x in found)
    mean, low, high = (_number(x, measure) for x in found)
    low_claim, high_claim = (_number(x, measure) for x in question["claim"])
    claim = f"{low_claim} to {high_claim}"
    if question["claim"][1] is None:
        claim = f"above {low_claim}"
    elif question["claim"][0] is None:
        claim = f"below {high_claim}"
    return (
        f"- {question['ask']}: {mean} [{low}, {high}]. Claimed: {claim}. "
        f"**{verdict(found, question['claim'])}**"
    )


def verdict(found: Sequence[float], claim: Sequence[float | None]) -> str:
    """Return how an interval lies to a range, whose ends may be open.

    >>> verdict((8, 6, 11), (5, 20)), verdict((2, 1, 4), (5, 20)), verdict((4, 3, 6), (5, None))
    ('As claimed', 'Not as claimed', 'Not decided')
    """
    _, low, high = found
    least = -math.inf if claim[0] is None else claim[0]
    most = math.inf if claim[1] is None else claim[1]
    if least <= low and high <= most:
        return "As claimed"
    return "Not as claimed" if high < least or low > most else "Not decided"


def _number(value: float | None, measure: str) -> str:
    if value is None or math.isinf(value):
        return "?"
    return f"{value:.2g}" if measure == "rate" else f"{value:+.3f}"


def table(study: Study) -> list[str]:
    """Return the table of the variants at their best rates."""
    general = any("general" in one for one in study.trials)
    columns = ["variant", "best rate", "loss", *["general text"] * general, "rates tried"]
    lines = ["| " + " | ".join(columns) + " |", "|---|---:|" + "---:|" * (1 + general) + "---|"]
    for variant in study.variants:
        own = [one for one in study.trials if one["variant"] == variant]
        rates = sorted({one["rate"] for one in own})
        tried = f"{rates[0]:g}" + (f" to {rates[-1]:g}" if len(rates) > 1 else "")
        if diverged := sum(one["status"] == DIVERGED for one in own):
            tried += f", {diverged} diverged"
        chosen = best(study, variant)
        cells = ["?", "?", *["?"] * general]
        if chosen is not None:
            names = ["loss", *["general"] * general]
            ends = [interval(by_seed(study, variant, name).values()) for name in names]
            cells = [f"{chosen[0]:g}", *(f"{m:.3f} [{a:.3f}, {b:.3f}]" for m, a, b in ends)]
        lines.append("| " + " | ".join([variant, *cells, tried]) + " |")
    return lines


def section(study: Study) -> list[str]:
    """Return the part of the page on a study; it may not be measured yet."""
    content, command = study.content, f"`python studies/run.py {study.name}`"
    lines = [f"## {content['title']}", "", f"Claim: {content['claim']}", ""]
    lines += [f"Source: {content['source']}.", ""]
    if not study.results.get("complete"):
        return [*lines, f"**Not measured yet.** {command} measures it.", ""]
    lines += [answer(study, question) for question in content["questions"]]
    picture = f"![Losses of the study {study.name}](images/study-{study.name}.svg)"
    lines += ["", picture, "", *table(study), ""]
    found = study.results
    minutes = max(1, round(found["seconds"] / 60))
    lines += [
        f"{content['note']} {len(study.seeds)} seeds, {len(study.trials)} trials, {minutes} min on "
        f"{found['machine']}, {found['cores']} cores, {found['date']}, lora_jax "
        f"{found['lora_jax']}, jax {found['jax']}: `{found['command']}`. Settings: "
        f"`studies/{study.name}.yaml`, trials: `docs/studies/{study.name}.json`.",
        "",
    ]
    return lines


def page(stored: Path) -> str:
    """Return docs/studies.md for the results in a directory."""
    studies = [load(name, stored) for name in NAMES]
    for study in studies:
        if study.file.exists():
            study.open({})
    lines = [PAGE, *(line for study in studies for line in section(study))]
    return "\n".join(lines).rstrip() + "\n"


def draw(study: Study, file: Path) -> None:
    """Draw the losses over the learning rates, or where each variant has one, those of the task
    against general text; next to it, what the variants reach.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.6, 0.8 + max(2.6, 0.3 * len(study.variants))))
        figure.set_layout_engine("constrained")
        left, right = figure.subplots(1, 2)
        general = any("general" in one for one in study.trials)
        for i, variant in enumerate(study.variants):
            color = f"C{i % 10}"
            _draw_curve(left, study, variant, color, general)
            if values := by_seed(study, variant, "general" if general else "loss"):
                mean, low, high = interval(values.values())
                half = high - mean if math.isfinite(high) else 0
                right.errorbar(mean, variant, xerr=half, fmt="o", color=color, capsize=3)
        right.invert_yaxis()
        right.grid(axis="x", alpha=0.25)
        right.set_xlabel("loss on general text" if general else "loss at the best rate")
        left.grid(alpha=0.25)
        if general:
            left.set(xlabel="loss of the task", ylabel="loss on general text")
        else:
            left.set(xscale="log", xlabel="learning rate", ylabel="loss (nats)")
            low, high = left.get_ylim()
            left.set_ylim(low, min(high, 3 * max(low, 0.05)))  # diverging rates are left out
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, metadata={"Date": None}, facecolor="white")


def _draw_curve(axes: Any, study: Study, variant: str, color: str, general: bool) -> None:
    """Draw the mean losses of a variant by rate, or its trials as points of two losses."""
    found = complete(study, variant)
    if general:
        trials = [one for own in found.values() for one in own.values()]
        x, y = ([one[name] for one in trials] for name in ("loss", "general"))
        axes.plot(x, y, "o", color=color, ms=4)
        return
    means = [statistics.fmean(one["loss"] for one in own.values()) for own in found.values()]
    axes.plot(list(found), means, "o-", color=color, ms=4, lw=1.2)
