"""The divergence from the base on replay: its value and gradient, its place in a batch, in runs."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import yaml

from lora_jax import adapters as methods
from lora_jax import data
from lora_jax.cli import train_main
from lora_jax.data.examples import Example
from lora_jax.data.loader import Loader, Mixture
from lora_jax.report.journal import read_lines
from lora_jax.train.step import make_train_step

from ..train.test_step import KEEP_GRADIENT
from ..train.tiny import (
    SUMS,
    distance,
    make_config,
    random_adapters,
    tiny_model,
    write_model,
    write_rows,
)

SETTINGS = ("train.batch_size=4", "train.remat=none", "train.loss_chunk=10", "adapter.rank=4")


def text(rng, replay):
    """A text of random length; half of its tokens count where it is learned."""
    size = int(rng.integers(5, 12))
    weights = np.ones(size, np.float32) if replay else np.float32(np.arange(size) > size // 2)
    return Example(rng.integers(3, 272, size).astype(np.int32), weights, "row", replay=replay)


def make_batch(seed, kinds=(False, True, False, True)):
    """A batch with a row of two texts for each of `kinds`: True for replay."""
    rng = np.random.default_rng(seed)
    return data.stack([[text(rng, kind), text(rng, kind)] for kind in kinds], 24)


def settings(*overrides):
    replay = ("data.train=none.jsonl", "data.replay=none.jsonl", "objective.base_kl=0.7")
    return make_config(*SETTINGS, *replay, "adapter.target_modules=[q_proj, down_proj]", *overrides)


def start(config, seed):
    model = tiny_model(seed, num_hidden_layers=1, tie_word_embeddings=False)
    _, adapters = methods.init(jax.random.key(0), model.params, config.adapter)
    return model, random_adapters(adapters, seed)


def step(model, config, adapters, batch):
    """Metrics and gradients of one step."""
    own, state = (jax.tree.map(jnp.copy, adapters) for _ in range(2))
    run = make_train_step(model, config, KEEP_GRADIENT)
    _, grads, metrics = run(own, state, model.params, batch, jax.random.key(0))
    return metrics, grads


def logits_of(model, params, batch):
    arguments = {name: batch[name] for name in ("positions", "segment_ids")}
    return model.apply(params, batch["tokens"], **arguments)


def mean(values, weights):
    """Mean over the tokens that are predicted, of values at the positions before them."""
    return jnp.sum(values[:, :-1] * weights[:, 1:]) / jnp.sum(weights[:, 1:])


@pytest.mark.parametrize("seed", [0, 1])
def test_value_and_gradient(seed):
    """Against torch's divergence, and the gradient of all logits at once."""
    config = settings()
    model, adapters = start(config, seed)
    batch = make_batch(seed)

    def parts(adapters):
        ours = logits_of(model, methods.bind(model.params, adapters, config.adapter), batch)
        ours = jax.nn.log_softmax(ours)
        base = jax.nn.log_softmax(logits_of(model, model.params, batch))
        kl = mean(jnp.sum(jnp.exp(ours) * (ours - base), -1), batch["replay_weights"])
        targets = jnp.roll(batch["tokens"], -1, axis=1)
        nll = -jnp.take_along_axis(ours, targets[..., None], axis=-1)[..., 0]
        loss = mean(nll, batch["loss_weights"])
        return loss + 0.7 * kl, (loss, kl, ours, base)

    grads, (loss, kl, ours, base) = jax.grad(parts, has_aux=True)(adapters)
    torch_kl = torch.nn.functional.kl_div(
        *(torch.tensor(np.asarray(x)).double() for x in (base, ours)),
        reduction="none",
        log_target=True,
    ).sum(-1)
    expected = mean(torch_kl.numpy(), batch["replay_weights"])
    metrics, found = step(model, config, adapters, batch)
    assert float(metrics["base_kl"]) == pytest.approx(float(expected), rel=1e-5)
    assert float(metrics["base_kl"]) == pytest.approx(float(kl), rel=1e-5)
    assert float(metrics["loss"]) == pytest.approx(float(loss), rel=1e-5)
    assert float(expected) > 0.01
    assert distance(found, grads) <= 1e-5


def test_micro_batches_and_batches_of_replay_alone():
    config = settings()
    model, adapters = start(config, 2)
    for kinds in ((False, True, False, True), (True, True, True, True)):
        batch = make_batch(3, kinds)
        metrics, grads = step(model, config, adapters, batch)
        split = settings("train.micro_batch_size=2")
        others, theirs = step(model, split, adapters, batch)
        assert distance(theirs, grads) <= 1e-5
        assert all(np.isfinite(list(metrics.values())))
        assert float(metrics["base_kl"]) > 0.01
        for name in metrics:
            assert float(others[name]) == pytest.approx(float(metrics[name]), rel=1e-5)
        assert float(max(jnp.abs(x).max() for x in jax.tree.leaves(grads))) > 1e-4
    assert float(metrics["loss"]) == 0  # nothing was learned


@pytest.mark.parametrize("objective", ["dpo", "kto", "orpo", "simpo"])
def test_micro_batches_without_a_pair(objective):
    """One of the two has rows of replay alone."""
    rng = np.random.default_rng(5)
    roles = (data.CHOSEN, data.OTHER if objective == "kto" else data.REJECTED)
    rows = [[data.join(text(rng, False), text(rng, False), roles)], [text(rng, True)]]
    batch = data.stack([*rows, *rows], 24)
    if objective in ("dpo", "kto"):
        batch["reference_log_probs"] = np.float32(-3 * (batch["loss_weights"] > 0))
    found = {}
    for size in (4, 2):
        config = settings(f"train.objective={objective}", f"train.micro_batch_size={size}")
        model, adapters = start(config, 4)
        found[size] = metrics, grads = step(model, config, adapters, batch)
        assert all(np.isfinite(list(metrics.values())))
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(grads))
        assert float(metrics["base_kl"]) > 0.01
    assert distance(found[2][1], found[4][1]) <= 1e-5


def test_adapters_that_do_nothing_have_no_divergence():
    config = settings()
    model, _ = start(config, 0)
    _, adapters = methods.init(jax.random.key(0), model.params, config.adapter)
    metrics, _ = step(model, config, adapters, make_batch(0))
    assert float(metrics["base_kl"]) == 0 < float(metrics["loss"])


def test_every_batch_has_the_same_arrays():
    """A row of replay in four: batches of two rows have one now and then."""
    rng = np.random.default_rng(0)
    task, replay = ([text(rng, kind) for _ in range(9)] for kind in (False, True))
    loaders = {name: Loader(own, 2, 24) for name, own in (("task", task), ("replay", replay))}
    mixture = Mixture(loaders, {"task": 3, "replay": 1})
    batches = [mixture.batch(i) for i in range(8)]
    assert len({tuple(sorted(batch)) for batch in batches}) == 1
    rows = sum(int(batch["replay_weights"].any(axis=1).sum()) for batch in batches)
    assert rows == 4
    for batch in batches:
        assert not (batch["replay_weights"].any(axis=1) & batch["loss_weights"].any(axis=1)).any()


GENERAL = [{"text": f"the {a} of the {b} is {c}"} for a in "abcd" for b in "efg" for c in "hi"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """`run.yaml` over sums, with general text in `replay.jsonl` and `general.jsonl`."""
    directory = tmp_path_factory.mktemp("replay")
    model = write_model(directory / "model", num_hidden_layers=1)
    rows = str(write_rows(directory / "rows.jsonl", SUMS))
    write_rows(directory / "replay.jsonl", GENERAL[:16])
    measured = str(write_rows(directory / "general.jsonl", GENERAL[16:]))
    content = {
        "model": str(model),
        "data": {"train": rows, "eval": rows, "regression": measured, "max_length": 64},
        "adapter": {"rank": 4},
        "train": {"steps": 12, "batch_size": 4, "remat": "none", "learning_rate": 2e-2},
        "eval": {"batch_size": 4, "generate": False},
        "export": {"peft": False},
    }
    (directory / "run.yaml").write_text(yaml.safe_dump(content))
    return directory


def train(files, output, *overrides):
    command = ["--config", str(files / "run.yaml"), f"output_dir={output}", *overrides]
    return train_main(command)


def test_runs_learn_the_replay_or_stay_close_to_the_base(files, tmp_path):
    """Of 12 steps; general text is as new to the random base as the task."""
    weights = {"mixed": (), "free": ("objective.base_kl=1e-6",), "close": ("objective.base_kl=2",)}
    falls, last = {}, {}
    for name, overrides in weights.items():
        replay = f"data.replay={files / 'replay.jsonl'}"
        assert train(files, tmp_path / name, replay, *overrides) == 0
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        assert summary["task"]["loss_after"] < summary["task"]["loss_before"] - 1
        losses = summary["regression"]
        falls[name] = losses["loss_before"] - losses["loss_after"]
        first, *_, last[name] = read_lines(tmp_path / name / "metrics.jsonl")
        assert first.get("base_kl", 0) == 0
    assert "base_kl" not in last["mixed"] and falls["mixed"] > 5
    assert last["close"]["base_kl"] < 0.5 * last["free"]["base_kl"]
    assert abs(falls["close"]) < abs(falls["free"])


def test_pairs_stay_close_to_the_base(files, tmp_path, capsys):
    pairs = [{"prompt": r["prompt"], "chosen": r["completion"], "rejected": "no"} for r in SUMS]
    rows = write_rows(tmp_path / "pairs.jsonl", pairs)
    sources = (f"data.train={rows}", f"data.eval={rows}", f"data.replay={files / 'replay.jsonl'}")
    dpo = (*sources, "train.objective=dpo", "data.max_length=96", "train.steps=4")
    assert train(files, tmp_path / "out", *dpo, "objective.base_kl=1") == 0
    first, *_, last = read_lines(tmp_path / "out" / "metrics.jsonl")
    assert first["loss"] == float(np.log(np.float32(2))) and first["base_kl"] == 0
    assert last["base_kl"] > 0 and last["margin"] > 0
    assert train(files, tmp_path / "no", *dpo) == 2
    assert "train.objective=dpo learns nothing from general text" in capsys.readouterr().err


def test_rows_of_the_regression_are_left_out(files, tmp_path, capsys):
    both = write_rows(tmp_path / "both.jsonl", GENERAL[12:])
    assert train(files, tmp_path / "out", f"data.replay={both}", "train.steps=1") == 0
    both_sets = "data.replay: 8 rows left out, as they are in data.regression too"
    assert both_sets in capsys.readouterr().err
    same = f"data.replay={files / 'general.jsonl'}"
    assert train(files, tmp_path / "no", same) == 2
    assert "all of its 8 rows are in data.regression too" in capsys.readouterr().err


def test_epochs_count_the_task(files, tmp_path):
    """23 examples of the task take as many steps as without replay, divided by their share."""
    steps = {}
    for share in (None, 0.5):
        more = () if share is None else (f"data.replay={files / 'replay.jsonl'}",)
        more += () if share is None else (f"data.replay_share={share}",)
        output = tmp_path / str(share)
        epochs = ("train.steps=null", "train.epochs=2", "data.packing=false")
        assert train(files, output, *epochs, *more) == 0
        steps[share] = len(read_lines(output / "metrics.jsonl"))
    assert steps == {None: 12, 0.5: 23}


REFUSED = {
    "objective.base_kl=1": "objective.base_kl=1 is measured on data.replay, which is not set",
    "data.replay_share=0.5": "data.replay_share=0.5 needs data.replay, which is not set",
    "data.replay={r} data.streaming=true": "data.replay is mixed with rows that are read at once",
    "data.replay={r} objective.base_kl=1 adapter.method=full": "adapter.method=full keeps no copy",
    "data.replay={r} objective.base_kl=1 adapter.init=pissa": "subtracts its factors from it",
    "data.replay={r} data.replay_share=1.0": "data.replay_share=1.0 must be",
    "data.replay={r} objective.base_kl=-1": "objective.base_kl=-1.0 must be at least 0",
}


@pytest.mark.parametrize("given", REFUSED)
def test_what_does_not_go_together(files, tmp_path, capsys, given):
    overrides = given.format(r=files / "replay.jsonl").split()
    assert train(files, tmp_path / "out", *overrides) == 2
    assert REFUSED[given] in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
