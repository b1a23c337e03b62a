"""Measure what is said about LoRA, on models and data that come as Python packages.

A variant of a study is trained

1. at the rates of a coarse grid with one seed, as members of one sweep;
2. at the neighbours of the best rate, until it has one on each side;
3. at the best rate, and perhaps those around it, with the other seeds.

Full fine-tuning is not supported in a sweep: its trials are runs, one after the other.
"""

import argparse
import hashlib
import json
import math
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import findings
from study import COMPLETE, DIVERGED, NAMES, STOPPED, Study, Trial, load, point

from lora_jax import programs
from lora_jax.config import Config
from lora_jax.errors import UserError, counted
from lora_jax.report.progress import format_seconds
from lora_jax.start import use_huge_pages
from lora_jax.sweep.space import make_trial, parse_space
from lora_jax.train.interrupt import Interrupted

ROOT = Path(__file__).parents[1]
BEYOND = 3  # rates that are tried beyond an end of the grid
EPILOG = f"""studies: {", ".join(NAMES)}

examples:
  python studies/run.py ranks                  # one of them, into runs/studies
  python studies/run.py all                    # all; after a stop the same command goes on
  python studies/run.py all --small --output runs/small    # three steps of everything, to try it
  python studies/run.py ranks model=org/name train.batch_size=8 --output runs/mine
  python studies/run.py --write                # put what is measured into docs/, with the page

A study is the YAML file of its name in this directory: claim, source, settings, variants and
questions. It writes NAME.json with every trial, and NAME.svg. docs/studies.md has what was found.
"""


def measure(study: Study, facts: Mapping[str, Any]) -> None:
    """Train all trials of a study that are not in its file yet.

    Raises:
        UserError: a mistake in the settings; a file of other settings; a variant of which no trial
            is complete.
        Interrupted: a signal came; the same command goes on.
    """
    study.open(facts)
    for variant in study.variants:
        search(study, variant)
    study.results["complete"] = True
    study.save()
    shutil.rmtree(study.output / study.name, ignore_errors=True)


def search(study: Study, variant: str) -> None:
    """Train a variant at the rates of its grid, around the best one, and with all seeds."""
    grid, (first, *others) = study.grid(variant), study.seeds
    if len(grid) == 1:
        return train(study, variant, [(0, seed) for seed in study.seeds])
    halving = study.content.get("halving") if len(grid) > 2 else None
    train(study, variant, [(place, first) for place in range(len(grid))], halving)
    # A neighbour that halving stopped has to be measured only if all seeds are measured there.
    accepted = (COMPLETE, DIVERGED) if study.around else (COMPLETE, DIVERGED, STOPPED)
    while True:
        beside = [(place, first) for place in near(study, variant, 1)]
        found = {one: study.find(variant, *one) for one in beside}
        missing = [p for p, one in found.items() if one is None or one["status"] not in accepted]
        if not missing:
            break
        train(study, variant, missing)
    best = near(study, variant, study.around)
    train(study, variant, [(place, seed) for seed in others for place in best])


def near(study: Study, variant: str, around: int) -> list[int]:
    """Return the places of the rate with the lowest loss of the first seed and of those around it.

    Raises:
        UserError: no trial of the variant is complete.
    """
    count, beyond = len(study.grid(variant)), 1 if study.small else BEYOND
    places = range(-beyond, count + beyond)
    tried = {place: study.find(variant, place, study.seeds[0]) for place in places}
    losses = {p: one["loss"] for p, one in tried.items() if one and one["status"] == COMPLETE}
    if not losses:
        raise UserError(
            f"{study.name}, {variant}: the loss diverged at every learning rate; lower `rates` in "
            f"studies/{study.name}.yaml"
        )
    best = min(losses, key=losses.__getitem__)
    return [place for place in places if abs(place - best) <= around]


def train(
    study: Study,
    variant: str,
    places: Sequence[tuple[int, int]],
    halving: Mapping[str, int] | None = None,
) -> None:
    """Train a variant at places of its rates, each with a seed, where no trial has ended yet. With
    `halving` the worse ones stop early.
    """
    ended = (COMPLETE, DIVERGED, STOPPED) if halving else (COMPLETE, DIVERGED)
    found = [(place, seed, study.find(variant, place, seed)) for place, seed in places]
    left = [
        {"train.learning_rate": study.rate(variant, place), "seed": seed}
        for place, seed, known in found
        if known is None or known["status"] not in ended
    ]
    if not left:
        return
    tried = ", ".join(f"{one['train.learning_rate']:g} (seed {one['seed']})" for one in left)
    say(f"{study.name}, {variant}: {counted(len(left), 'trial')}, at learning rate {tried}")
    digest = hashlib.sha256(json.dumps([variant, left]).encode()).hexdigest()[:8]
    config = study.config(variant, study.output / study.name / digest)
    alone = config.adapter.trains_everything
    for some in [[one] for one in left] if alone else [left]:
        began = time.monotonic()
        losses = [run_alone(config, some[0])] if alone else run_together(config, some, halving)
        trials = [as_trial(variant, *pair) for pair in zip(some, losses, strict=True)]
        study.add(trials, time.monotonic() - began)
        say_estimate(study)
    shutil.rmtree(config.output_dir, ignore_errors=True)


def run_together(
    config: Config, points: Sequence[Mapping[str, Any]], halving: Any
) -> list[dict[str, Any]]:
    """Train points as members of one sweep. Return status and losses of each."""
    import jax  # seconds of imports: after the settings are right

    from lora_jax.sweep.run import run_sweep

    jax.clear_caches()  # a program takes memory maps, of which Linux gives a process 65,530
    space = parse_space({"space": {"point": list(points)}, "halving": halving})
    return [
        {"status": one.status, "loss": one.task_loss, "general": one.regression_loss}
        for one in run_sweep(config, space).ordered
    ]


def run_alone(config: Config, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Train one point as a run. Return its status and losses."""
    import jax

    from lora_jax.train import loop

    jax.clear_caches()
    where = f"{config.output_dir}/{settings['train.learning_rate']:g}-{settings['seed']}"
    try:
        summary = loop.run(make_trial(config, 0, {**settings, "output_dir": where}).config)
    except UserError as error:
        if not str(error).startswith("the loss of step"):  # .. is not finite
            raise
        return {"status": DIVERGED}
    shutil.rmtree(where, ignore_errors=True)  # a model and its moments
    losses = {"loss": summary["task"], "general": summary["regression"]}
    found = {name: pair["loss_after"] for name, pair in losses.items() if pair}
    return {"status": COMPLETE, **found}


def as_trial(variant: str, settings: Mapping[str, Any], found: Mapping[str, Any]) -> Trial:
    """Return a trial as in the file. One whose loss is not finite has diverged."""
    losses = {name: found[name] for name in ("loss", "general") if found.get(name) is not None}
    status = found["status"]
    if status == COMPLETE and not ("loss" in losses and all(map(math.isfinite, losses.values()))):
        status = DIVERGED
    rounded = {name: round(loss, 5) for name, loss in losses.items() if status == COMPLETE}
    rate, seed = settings["train.learning_rate"], settings["seed"]
    return {"variant": variant, "rate": rate, "seed": seed, "status": status, **rounded}


def say_estimate(study: Study) -> None:
    """Print what is done, and about how long the rest takes."""
    done, seconds, left = len(study.trials), study.results["seconds"], 0
    for variant in study.variants:
        rates = len(study.grid(variant))
        all_seeds = min(rates, 1 + 2 * study.around)
        known = sum(point(one)[0] == variant for one in study.trials)
        left += max(0, rates + all_seeds * (len(study.seeds) - 1) - known)
    rest = format_seconds(left * seconds / done)
    say(f"{study.name}: {done} trials in {format_seconds(seconds)}; about {left} more, {rest}")


def say(text: str) -> None:
    print(f"== {text}", file=sys.stderr, flush=True)


def write_docs(output: Path) -> None:
    """Copy the results of complete studies into docs/, draw them, and write the page.

    Raises:
        UserError: results of other settings than those of the files.
    """
    stored = ROOT / "docs" / "studies"
    for name in NAMES:
        study = load(name, output)
        if study.file.exists():
            study.open({})
        if study.results.get("complete"):
            stored.mkdir(exist_ok=True)
            shutil.copy(study.file, stored)
            findings.draw(study, ROOT / "docs" / "images" / f"study-{name}.svg")
    page = ROOT / "docs" / "studies.md"
    page.write_text(findings.page(stored), encoding="utf-8")
    say(f"written: {page}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="studies/run.py",
        description="Measure what is said about LoRA, on small models, with intervals.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "names",
        nargs="*",
        metavar="STUDY",
        help="studies, or all; key.sub=value replaces a setting of them",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("runs/studies"),
        metavar="DIR",
        help="directory of the results, which are not measured again (default: runs/studies)",
    )
    parser.add_argument(
        "--small", action="store_true", help="three steps, two rates and two seeds, to try it"
    )
    parser.add_argument(
        "--write", action="store_true", help="put complete results into docs/, with the page"
    )
    options = parser.parse_intermixed_args(arguments)
    options.overrides = [text for text in options.names if "=" in text]
    options.names = [text for text in options.names if "=" not in text]
    if not options.names and not options.write:
        parser.error(f"name a study: {', '.join(NAMES)}, or all")
    return options


def run(options: argparse.Namespace, command: str) -> None:
    """Measure the named studies, draw and print what was found, and write the page."""
    names = NAMES if "all" in options.names else options.names
    studies = [load(name, options.output, options.overrides, options.small) for name in names]
    for study in studies:
        measure(study, {"command": command, **findings.facts()})
        findings.draw(study, study.output / f"{study.name}.svg")
        print(*findings.section(study), sep="\n", flush=True)
    if options.write:
        write_docs(options.output)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        run(parse(given), " ".join(["python studies/run.py", *given]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
    except Interrupted as stop:
        print(f"ended by {stop}; the same command goes on", file=sys.stderr)
        return stop.status
    return 0


if __name__ == "__main__":
    use_huge_pages()
    programs.keep()
    sys.exit(main())
