"""Studies: the order of their trials, what is found, and every one of them with --small."""

import doctest
import importlib
import json
import math
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from lora_jax import demo
from lora_jax.errors import UserError
from lora_jax.sweep.space import parse_space
from lora_jax.train.interrupt import Interrupted
from lora_jax.train.monitor import LossMonitor

ROOT = Path(__file__).parents[1]
STUDIES = ROOT / "studies"
NAMES = sorted(file.stem for file in STUDIES.glob("*.yaml"))
WORDS = ("cat", "dog", "horse", "mouse", "paris", "rome", "oslo", "lima")
FACTS = {"command": "x", "machine": "m", "cores": 2, "date": "d", "lora_jax": "0", "jax": "0"}


@pytest.fixture
def modules(monkeypatch):
    """run.py, study.py and findings.py."""
    monkeypatch.syspath_prepend(str(STUDIES))
    yield SimpleNamespace(**{n: importlib.import_module(n) for n in ("run", "study", "findings")})
    for name in ("run", "study", "findings"):
        sys.modules.pop(name, None)


@pytest.fixture
def trained(modules, monkeypatch):
    """Calls of the trainer, which is replaced. `trained.best` has the log10 of the best rate of a
    variant, in which losses are a parabola; rates above `trained.diverges` diverge.
    """
    found = SimpleNamespace(calls=[], best=-2.5, diverges=math.inf)

    def loss(config, point):
        rate, seed = point["train.learning_rate"], point["seed"]
        if rate > found.diverges:
            return {"status": "diverged", "loss": 9.0}
        shift = -1 if config.adapter.method == "full" else 0
        distance = math.log10(rate) - found.best - shift - 0.01 * seed
        return {"status": "complete", "loss": 0.2 + 0.1 * distance**2 + 0.001 * seed}

    def together(config, points, halving):
        assert config.adapter.method != "full"
        found.calls.append((config, points, halving))
        losses = [loss(config, one) for one in points]
        if halving:
            bound = sorted(one["loss"] for one in losses)[len(losses) // 2 - 1]
            for one in losses:
                if one["loss"] > bound and one["status"] == "complete":
                    one["status"] = "stopped"
        return losses

    def alone(config, point):
        found.calls.append((config, [point], None))
        return loss(config, point)

    monkeypatch.setattr(modules.run, "run_together", together)
    monkeypatch.setattr(modules.run, "run_alone", alone)
    return found


def read(output, name):
    return json.loads((output / f"{name}.json").read_text())


def points(content, variant):
    """Rates by seed of a variant's trials."""
    found = {}
    for one in content["trials"]:
        if one["variant"] == variant:
            found.setdefault(one["seed"], []).append(one["rate"])
    return found


def test_rates_are_found_with_one_seed_and_measured_with_three(modules, trained, tmp_path, capsys):
    assert modules.run.main(["rates", "--output", str(tmp_path)]) == 0
    found = read(tmp_path, "rates")
    grid = [3.2e-4, 1e-3, 3.2e-3, 1e-2]
    assert points(found, "LoRA") == {0: grid, 1: grid[1:], 2: grid[1:]}
    small = [rate / 10 for rate in grid]
    assert points(found, "full") == {0: pytest.approx(small), 1: pytest.approx(small[1:])} | {
        2: pytest.approx(small[1:])
    }
    # A sweep for the grid and one for the other seeds; full fine-tuning runs one by one.
    assert [len(some) for _, some, _ in trained.calls] == [4, 6, *[1] * 10]
    assert (
        found["complete"] and found["command"] == f"python studies/run.py rates --output {tmp_path}"
    )
    printed = capsys.readouterr()
    assert "- Best rate of LoRA over that of full fine-tuning: 10 [10, 10]. Claimed: 5 to 20. " in (
        printed.out
    )
    assert printed.out.count("**As claimed**") == 2
    assert "| LoRA | 0.0032 | 0.201 [0.198, 0.204] | 0.00032 to 0.01 |" in printed.out
    assert "rates: 4 trials in 0:00; about 16 more" in printed.err
    assert (tmp_path / "rates.svg").read_text().startswith("<?xml")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rates.json", "rates.svg"]


def test_the_search_goes_on_beyond_its_rates(modules, trained, tmp_path):
    """The best rate is above the grid: 1e-2 is its end, 3.2e-2 and 0.1 are tried too."""
    trained.best = -1.5
    study = modules.study.load("rates", tmp_path)
    modules.run.measure(study, FACTS)
    assert points(study.results, "LoRA")[0] == [3.2e-4, 1e-3, 3.2e-3, 1e-2, 3.2e-2, 0.1]
    assert points(study.results, "LoRA")[2] == [1e-2, 3.2e-2, 0.1]
    assert modules.findings.by_seed(study, "LoRA", "rate")[0] == pytest.approx(-1.5, abs=0.01)
    trained.best = 5  # out of reach: it ends all the same
    study = modules.study.load("rates", tmp_path / "far")
    modules.run.measure(study, FACTS)
    assert max(points(study.results, "LoRA")[0]) == 0.32


def test_trials_that_halving_stopped_are_measured_where_all_seeds_are(modules, trained, tmp_path):
    trained.best = -2.4  # 1e-3 is stopped, 1e-2 is not
    for name, around in (("ranks", 1), ("targets", 0)):
        study = modules.study.load(name, tmp_path)
        assert study.around == around
        modules.run.measure(study, FACTS)
        variant = next(iter(study.variants))
        own = [one for one in study.trials if one["variant"] == variant]
        stopped = [one["rate"] for one in own if one["status"] == "stopped"]
        assert stopped == ([3.2e-4] if around else [3.2e-4, 1e-3])
        assert not any("loss" in one for one in own if one["status"] == "stopped")
        halvings = [halving for _, _, halving in trained.calls[:2]]
        assert halvings == [{"first_step": 30}, None]
        trained.calls.clear()


def test_a_stopped_study_goes_on(modules, trained, tmp_path, monkeypatch, capsys):
    together, calls = modules.run.run_together, []

    def stops(config, some, halving):
        calls.append(config.output_dir)
        if len(calls) == 3:
            raise Interrupted(15)
        return together(config, some, halving)

    monkeypatch.setattr(modules.run, "run_together", stops)
    command = ["targets", "--output", str(tmp_path)]
    assert modules.run.main(command) == Interrupted(15).status
    assert "the same command goes on" in capsys.readouterr().err
    first = read(tmp_path, "targets")
    assert not first["complete"] and len(first["trials"]) == 6
    assert modules.run.main(command) == 0
    assert calls[3] == calls[2] and len(set(calls)) == 6  # in the directory with its checkpoint
    again = read(tmp_path, "targets")
    assert again["trials"][:6] == first["trials"] and len(again["trials"]) == 18
    assert modules.run.main(command) == 0 and len(calls) == 7


def test_diverged_trials_have_no_loss(modules, trained, tmp_path, capsys):
    trained.diverges = 5e-3
    study = modules.study.load("methods", tmp_path)
    modules.run.measure(study, FACTS)
    lost = [one for one in study.trials if one["status"] == "diverged"]
    assert lost and not any("loss" in one for one in lost)
    assert "| LoRA | 0.0032 | 0.201 [0.198, 0.204] | 0.00032 to 0.01, 1 diverged |" in (
        modules.findings.table(study)
    )
    nan = {"status": "complete", "loss": math.nan}
    trial = modules.run.as_trial("x", {"train.learning_rate": 1.0, "seed": 0}, nan)
    assert trial == {"variant": "x", "rate": 1.0, "seed": 0, "status": "diverged"}
    trained.diverges = 0
    assert modules.run.main(["ranks", "--output", str(tmp_path)]) == 2
    assert "ranks, rank 1: the loss diverged at every learning rate" in capsys.readouterr().err


def test_a_run_that_diverges_is_a_trial_and_a_mistake_is_an_error(modules, tmp_path, monkeypatch):
    from lora_jax.train import loop  # imports jax, as the trainers below do

    text = LossMonitor().problem(3, math.nan, 1.0, None)
    config = modules.study.load("rates", tmp_path).config("full", tmp_path / "run")
    settings = {"train.learning_rate": 0.1, "seed": 1}

    def run(config):
        assert config.train.learning_rate == 0.1 and config.seed == 1
        raise UserError(text)

    monkeypatch.setattr(loop, "run", run)
    assert modules.run.run_alone(config, settings) == {"status": "diverged"}
    text = "model 'x' does not exist"
    with pytest.raises(UserError, match="does not exist"):
        modules.run.run_alone(config, settings)


def test_mistakes(modules, trained, tmp_path, capsys):
    def refused(*arguments):
        assert modules.run.main([*arguments, "--output", str(tmp_path)]) == 2
        return capsys.readouterr().err

    assert "there is no study 'rnaks'; there are: rates, ranks, " in refused("rnaks")
    assert "Did you mean 'ranks'?" in refused("rnaks")
    assert "train.stesp" in refused("targets", "train.stesp=3")
    assert not trained.calls and modules.run.main(["targets", "--output", str(tmp_path)]) == 0
    message = refused("targets", "train.steps=90")
    assert "targets.json exists, with trials of other settings" in message
    assert "give another --output, or remove the file" in message
    assert "exists, with trials of other settings" in refused("targets", "--small")
    with pytest.raises(SystemExit):
        modules.run.main(["--output", str(tmp_path)])
    assert "name a study: rates, ranks" in capsys.readouterr().err


def test_results_go_into_the_page(modules, trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(modules.run, "ROOT", tmp_path)
    (tmp_path / "docs" / "images").mkdir(parents=True)
    command = ["targets", "--output", str(tmp_path / "out"), "--write"]
    assert modules.run.main(command) == 0
    text = (tmp_path / "docs" / "studies.md").read_text()
    study = modules.study.load("targets", tmp_path / "docs" / "studies")
    study.open({})
    assert "\n".join(modules.findings.section(study)) in text
    assert text.count("**Not measured yet.**") == len(NAMES) - 1
    assert "Loss of the attention minus that of all linears: +0.000 [+0.000, +0.000]" in text
    assert (tmp_path / "docs" / "images" / "study-targets.svg").exists()
    assert modules.run.main([*command[:-1], "--small"]) == 2
    assert modules.run.main(["--write", "--output", str(tmp_path / "none")]) == 0
    assert (tmp_path / "docs" / "studies.md").read_text() == text


def test_the_page_in_docs_is_that_of_the_results(modules):
    """`python studies/run.py --write` changes nothing."""
    stored = ROOT / "docs" / "studies"
    assert modules.findings.page(stored) == (ROOT / "docs" / "studies.md").read_text()
    for file in stored.glob("*.json"):
        assert read(stored, file.stem)["complete"]
        assert (ROOT / "docs" / "images" / f"study-{file.stem}.svg").exists()


def test_a_contrast_is_compared_seed_by_seed(modules, tmp_path):
    """A seed that is harder for both sides does not widen the interval."""
    study = modules.study.load("targets", tmp_path)
    study.open(FACTS)
    losses = {"attention": (0.30, 0.41, 0.52), "all linears": (0.2, 0.3, 0.4)}
    study.add(
        [
            {"variant": name, "rate": 1e-3, "seed": seed, "status": "complete", "loss": loss}
            for name, own in losses.items()
            for seed, loss in enumerate(own)
        ],
        1.0,
    )
    question = study.content["questions"][0]
    # mean 0.11, deviation 0.01, t(0.975, 2) = 4.303
    assert modules.findings.answer(study, question) == (
        "- Loss of the attention minus that of all linears: +0.110 [+0.085, +0.135]. "
        "Claimed: above +0.000. **As claimed**"
    )
    missing = modules.findings.answer(study, study.content["questions"][1])
    assert missing.endswith("no answer, as trials of MLP diverged.")


def test_examples_of_the_statistics(modules):
    found = doctest.testmod(modules.findings)
    assert found.attempted >= 3 and not found.failed


def test_studies_are_whole(modules, tmp_path, monkeypatch):
    """Each YAML file has a name in the list, and questions about variants that it has."""
    rows = tmp_path / "general.jsonl"
    rows.write_text("1\n2\n3\n")
    monkeypatch.setattr(demo, "path", lambda name: rows)
    assert sorted(modules.study.NAMES) == NAMES
    for name in NAMES:
        study = modules.study.load(name, tmp_path)
        texts = {"title", "claim", "source", "note", "questions"}
        assert study.content.keys() <= texts | set(modules.study.DECIDES)
        assert texts < study.content.keys()
        for variant in study.variants:
            assert study.config(variant, tmp_path / "x").train.divergence is None
        space = {"space": {"seed": study.seeds}, "halving": study.content.get("halving")}
        halving = parse_space(space).halving
        assert halving is None or halving.first_step < study.content["config"]["train"]["steps"]
        for question in study.content["questions"]:
            assert question["contrast"].keys() <= study.variants.keys()
            assert sum(question["contrast"].values()) == 0
    assert (tmp_path / "forgetting-general.jsonl").read_text() == "1\n3\n"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Settings that name a tiny encoder, or a tiny model that writes, and rows for it."""
    from .train.test_classify import write_encoder  # imports torch
    from .train.tiny import write_model, write_rows

    home, draw = tmp_path_factory.mktemp("studies"), random.Random(0)
    wide = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
    write_encoder(home / "encoder", max_position_embeddings=64, **wide)
    names = [" ".join(draw.choices(WORDS, k=4)) for _ in range(120)]
    rows = [{"text": name, "label": "cat" if "cat" in name else "none"} for name in names]
    write_rows(home / "names.jsonl", rows)
    sums = [{"prompt": f"{i} plus 1", "completion": str(i + 1)} for i in range(40)]
    write_rows(home / "sums.jsonl", sums)
    write_rows(home / "general.jsonl", [{"prompt": n, "completion": n[::-1]} for n in names[:12]])
    write_model(home / "decoder", hidden_size=64, intermediate_size=64)
    return home


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_study_with_small(modules, tiny, tmp_path, monkeypatch, capsys, name):
    monkeypatch.setenv("LORA_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(demo, "path", lambda name: tiny / f"{name}.jsonl")
    model, rows = ("decoder", "sums") if name == "forgetting" else ("encoder", "names")
    settings = {"model": model, "data.train": f"{rows}.jsonl", "data.eval": f"{rows}.jsonl"}
    command = [name, "--small", "--output", str(tmp_path)]
    command += [f"{key}={tiny / value}" for key, value in settings.items()]
    assert modules.run.main(command) == 0
    printed, found = capsys.readouterr().out, read(tmp_path, name)
    study = modules.study.load(name, tmp_path, command[4:], small=True)
    questions = study.content["questions"]
    assert printed.count("**") == 2 * len(questions) and "no answer" not in printed
    assert {one["variant"] for one in found["trials"]} == set(study.variants)
    assert {one["seed"] for one in found["trials"]} == {0, 1}
    assert all(0 < one["loss"] < 20 for one in found["trials"])
    assert found["complete"] and (tmp_path / f"{name}.svg").stat().st_size > 5000
    assert not (tmp_path / name).exists()
    assert modules.run.main(command) == 0 and read(tmp_path, name) == found
