"""What a merge keeps of the update, and how far the merged model is from the live one: against
NumPy, through the gates, and by the command line.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from lora_jax import config as configs
from lora_jax import formats, lora, tree
from lora_jax.cli import main, train_main
from lora_jax.config import MeshConfig
from lora_jax.data import Example
from lora_jax.errors import UserError
from lora_jax.quantize import Int8Weight, NF4Weight, dequantize
from lora_jax.report import merge as merge_report
from lora_jax.report.console import make_console
from lora_jax.sharding import make_mesh
from lora_jax.targets import HEAD, find_trainable
from lora_jax.train import merged, probe
from lora_jax.weights import Untied

from ..families import FAMILIES, random_model
from ..methods import ROWS, Row, stirred, tiny_model
from .test_classify import write_encoder
from .tiny import make_config, random_adapters, write_model, write_rows

DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
CASES = {
    **{
        name: ROWS[name]
        for name in (
            *("LoRA of everything", "DoRA, NF4", "int8", "PiSSA, patterns", "OLoRA, DoRA"),
            *("bias lora_only, a layer", "one MLP whole", "tokens", "embedding, DoRA, tied"),
            *("head, DoRA, untied by it", "embedding and head whole, untied", "full, tied"),
        )
    },
}


def as_numbers(leaf):
    """The float32 array of a plain or quantised leaf."""
    quantized = isinstance(leaf, NF4Weight | Int8Weight)
    return np.asarray(dequantize(leaf) if quantized else leaf, np.float32)


def expected_fits(found, original, merged, dtype):
    """By module name what `measure` should say, of dense float32 weights: only `merged` is shared
    with the code, and that has its own oracles.
    """
    fits = {}
    parts = [(t.weight, t.names, [r > 0 for r in t.ranks], t.columns) for t in found.targets]
    parts += [
        (w.path, [n + (".bias" if w.path[-1] == "bias" else "") for n in w.names], w.chosen, None)
        for w in found.whole
    ]
    parts += [(r.path, [tree.dotted(r.path[:-1])], [True], None) for r in found.rows]
    for path, names, chosen, columns in parts:
        place = found.untied if path == HEAD and found.untied else path
        after, before = merged[place], as_numbers(original[place])
        if isinstance(after, Untied):
            after = after.head if path == HEAD else after.embed
        after = np.asarray(after, np.float32)
        stacked = tree.stack_position(path) is not None
        for layer, name in enumerate(names):
            if chosen[layer]:
                old, new = (x[layer] if stacked else x for x in (before, after))
                old, new = (x[..., slice(*(columns or (None,)))] for x in (old, new))
                intended = new.astype(np.float64) - old
                written, kept = new.astype(dtype), old.astype(dtype)
                realised = written.astype(np.float64) - kept.astype(np.float64)
                norms = [np.linalg.norm(x) for x in (realised, intended)]
                cosine = (realised * intended).sum() / np.prod(norms)
                changed = np.mean(written.view(np.uint16) != kept.view(np.uint16))
                fits[name] = (new.size, changed, cosine, norms[0] / norms[1])
    return fits


def fits_of(model, config, dtype, seed, size):
    """What `measure` says, and what NumPy says."""
    original = tree.flatten(model.params)
    params, adapters = lora.init(jax.random.key(seed), model.params, config)
    adapters = stirred(model.params, adapters, config, seed, size)
    bound = lora.bind(params, adapters, config)
    found = find_trainable(model.params, config)
    exact = lora.merge(bound)
    written = jax.tree.map(lambda x: x.astype(DTYPES[dtype]), exact)
    is_full = config.method == "full"
    start = model.params if is_full else lora.initial_params(params, adapters, config)
    fits = merge_report.measure(found, bound, start, written)
    return fits, expected_fits(found, original, tree.flatten(exact), DTYPES[dtype])


def assert_alike(fits, expected):
    assert list(fits) == list(expected)
    for name, (size, changed, cosine, ratio) in expected.items():
        fit = fits[name]
        assert fit.weights == size, name
        # Weights of another last bit before they are rounded may change, or not.
        assert abs(fit.share_changed - changed) <= 2e-3, name
        assert fit.cosine == pytest.approx(cosine, abs=1e-3), name
        assert fit.norm_ratio == pytest.approx(ratio, rel=2e-3), name


@pytest.mark.parametrize("case", CASES)
def test_every_module_is_measured_as_numpy_does(case):
    row = CASES[case]
    model = tiny_model(row.hf_config, 3, row.scheme)
    for seed, size in ((0, 0.1), (1, 0.01)):
        fits, expected = fits_of(model, row.config, "bfloat16", seed, size)
        assert_alike(fits, expected)
        cosines = [fit.cosine for fit in fits.values()]
        assert max(cosines) > 0.5 and (size == 0.1 or min(cosines) < 0.9999)


@pytest.mark.parametrize(
    ("family", "target", "names", "size"),
    [
        ("gpt2", "c_attn.k", [f"transformer.h.{i}.attn.c_attn.k" for i in range(3)], 36 * 36),
        (
            "mixtral",
            "experts.down_proj",
            [f"model.layers.{i}.mlp.experts.down_proj" for i in range(3)],
            5 * 40 * 36,
        ),
    ],
)
def test_parts_of_fused_weights_and_stacks_of_experts(family, target, names, size):
    model = random_model(family, 1, **FAMILIES[family].fields)
    config = Row({"target_modules": [target]}).config
    fits, expected = fits_of(model, config, "float16", 2, 1e-4)
    assert list(fits) == names and {fit.weights for fit in fits.values()} == {size}
    assert_alike(fits, expected)
    assert 0 < min(fit.share_changed for fit in fits.values()) < 1


def test_nothing_to_change_has_no_cosine_and_nothing_changed_has_zero():
    nothing = merge_report.Fit(4, 0.0, 0.0, 0.0, 0.0)
    lost = merge_report.Fit(4, 0.0, 0.0, 0.0, 2.0)
    assert (nothing.cosine, nothing.norm_ratio, lost.cosine, lost.norm_ratio) == (None, None, 0, 0)
    report = merge_report.Report("bfloat16", {"a": nothing, "b": lost})
    assert report.worst() == [(0.0, "b")] and report.whole.weights == 8
    with pytest.raises(UserError, match=r"in 1 of 2 modules:\n  b: 0.000000, 0.0% of its"):
        merge_report.check(report, configs.ExportConfig(min_merge_cosine=0.5))
    untrained = merge_report.Report("bfloat16", {"a": nothing})
    merge_report.check(untrained, configs.ExportConfig(min_merge_cosine=0.5))
    assert merge_report.summarize(untrained)["lowest_cosine"] is None


def examples(seed, count=5, vocab=272):
    """Examples of several lengths, their weights no whole numbers."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        length = int(rng.integers(3, 12))
        weights = rng.choice(np.asarray([0, 0.5, 1], np.float32), length)
        weights[0], weights[-1] = 1, 1  # the first is never predicted
        made.append(Example(rng.integers(0, vocab, length).astype(np.int32), weights, f"row {i}"))
    return made


def logits_of(model):
    """A jitted function of (params, examples): logits of examples side by side, in float64."""
    apply = jax.jit(model.apply)

    def logits(params, rows):
        length = max(len(row.tokens) for row in rows)
        pad = lambda x: np.pad(x, (0, length - len(x)))  # noqa: E731
        tokens = np.stack([pad(row.tokens) for row in rows])
        real = np.stack([pad(np.ones_like(row.tokens)) for row in rows])
        x = np.asarray(apply(params, tokens, segment_ids=real), np.float64)
        x -= x.max(axis=-1, keepdims=True)
        return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))

    return logits


def expected_kl(p, q, rows):
    """Of logarithms of probabilities (rows, time, vocab)."""
    total = weight = 0.0
    for row, apart in zip(rows, (np.exp(p) * (p - q)).sum(axis=-1), strict=True):
        weights = row.loss_weights[1:]
        total += (apart[: len(weights)] * weights).sum()
        weight += weights.sum()
    return total / weight


def test_kl_is_that_of_all_logits_at_once(tmp_path):
    model, mesh = formats.load(write_model(tmp_path / "model")), make_mesh(MeshConfig())
    config, logits = make_config("adapter.rank=4").adapter, logits_of(model)
    _, adapters = lora.init(jax.random.key(0), model.params, config)
    for seed, (batch_size, chunk) in enumerate([(2, 7), (16, 1000)]):
        rows = examples(seed)
        live = lora.bind(model.params, random_adapters(adapters, seed), config)
        exact = lora.merge(live)
        rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), exact)
        others = {"merged": rounded, "base": model.params, "self": exact}
        found = probe.divergences(
            model, live, others, rows, mesh, batch_size=batch_size, chunk=chunk
        )
        for name in ("merged", "base"):
            expected = expected_kl(logits(exact, rows), logits(others[name], rows), rows)
            assert found[name] == pytest.approx(expected, rel=2e-3), name
        assert 0 <= found["self"] < 1e-9 < 1e-7 < found["merged"] < found["base"] / 10


def test_kl_of_labels_is_at_the_labels(tmp_path):
    model = formats.load(write_encoder(tmp_path / "encoder"), labels=("a", "b", "c"))
    config = Row({"target_modules": ["query"], "modules_to_save": ["classifier"]}).config
    _, adapters = lora.init(jax.random.key(0), model.params, config)
    live = lora.bind(model.params, stirred(model.params, adapters, config, 0), config)
    rows = [
        Example(
            np.asarray([2, *words, 3, label], np.int32),
            np.asarray([0] * (len(words) + 2) + [1], np.float32),
            "row",
            len(words) + 2,
        )
        for words, label in (([4, 5], 0), ([6, 7, 8], 2), ([9], 1))
    ]
    mesh, others = make_mesh(MeshConfig()), {"base": model.params}
    found = probe.divergences(model, live, others, rows, mesh, batch_size=2, chunk=4)
    # The labels of a text are the same at all its tokens: the first stands for them.
    texts = [Example(row.tokens[:-1], np.eye(len(row.tokens) - 1)[1], row.where) for row in rows]
    logits = logits_of(model)
    expected = expected_kl(logits(lora.merge(live), texts), logits(model.params, texts), texts)
    assert found["base"] == pytest.approx(expected, rel=1e-3) and expected > 1e-4


def test_kl_of_near_and_far_distributions():
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((6, 50)) * 4
    for size in (1e-5, 1e-2, 3.0, 200.0):
        other = logits + size * rng.standard_normal(logits.shape)
        p, q = (np.asarray(jax.nn.log_softmax(x.astype(np.float32))) for x in (logits, other))
        wide = [x.astype(np.float64) for x in (p, q)]
        wide = [x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in wide]
        expected = (np.exp(wide[0]) * (wide[0] - wide[1])).sum(-1)
        assert np.allclose(probe.kl(p, q), expected, rtol=0.05 if size < 1e-4 else 1e-4), size
        assert (np.asarray(probe.kl(p, q)) >= 0).all()
    assert not np.any(probe.kl(p, p))


def merged_files(directory):
    """Float32 numbers of a merged directory by tensor."""
    return {n: x.astype(np.float32) for n, x in load_file(directory / "model.safetensors").items()}


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A bfloat16 model, and adapters whose update is about a fifth of its weights."""
    directory = write_model(tmp_path_factory.mktemp("half") / "model")
    mesh = make_mesh(MeshConfig())
    model = formats.load(directory)
    model = model.replace(params=formats.read_params(directory, model, mesh, "bfloat16"))
    config = configs.parse(
        {"model": str(directory), "base_dtype": "bfloat16", "adapter": {"rank": 4}}
    )
    _, adapters = lora.init(jax.random.key(0), model.params, config.adapter)
    return model, config, random_adapters(adapters, 2)


def scaled(adapters, factor):
    """The update times `factor`."""
    return tree.unflatten({
        path: leaf * factor if path[-1] == "lora_b" else leaf
        for path, leaf in tree.flatten(adapters).items()
    })  # fmt: skip


def merge_into(target, half, adapters, *overrides, rows=None):
    model, config, _ = half
    own = configs.parse(
        {"model": config.model, "base_dtype": "bfloat16", "adapter": {"rank": 4}}, overrides
    )
    rows = examples(0) if rows is None else rows
    return merged.export_merged(target, own, model, adapters, make_console(), rows)


GATES = ("export.min_merge_cosine=0.99", "export.max_merge_kl=0.05")


def test_a_good_merge_passes_and_a_lost_one_is_refused(half, tmp_path, capsys):
    _, _, adapters = half
    summary = merge_into(tmp_path / "good", half, adapters, *GATES)["merge"]
    assert summary["dtype"] == "bfloat16" and summary["share_changed"] > 0.9
    assert 0.99 < summary["lowest_cosine"] <= summary["cosine"] < 1
    assert 0 < summary["kl_live_merged"] < 0.05 < summary["kl_live_base"]
    told = capsys.readouterr().err
    assert "merged into bfloat16" in told and summary["lowest_cosine_module"] in told
    report = json.loads((tmp_path / "good/merge_report.json").read_text())
    modules = report.pop("modules")
    assert report == summary and len(modules) == 14
    assert (tmp_path / "good/merge_report.png").read_bytes().startswith(b"\x89PNG")

    with pytest.raises(UserError) as refused:
        merge_into(tmp_path / "lost", half, scaled(adapters, 1e-3), *GATES)
    told = str(refused.value)
    assert "below export.min_merge_cosine=0.99 in 14 of 14 modules:\n  model.layers." in told
    assert "... and 6 more" in told and "Write export.dtype=float32, or keep the adapter" in told
    assert "max_merge_kl" not in told  # what is lost hardly moves the model
    assert [path.name for path in tmp_path.iterdir()] == ["good"]


def test_float32_over_a_bfloat16_base_rounds_once(half, tmp_path):
    model, config, adapters = half
    small = scaled(adapters, 1e-3)
    summary = merge_into(tmp_path / "out", half, small, *GATES, "export.dtype=float32")["merge"]
    assert summary["lowest_cosine"] > 0.99 and summary["kl_live_merged"] < 1e-9
    leaves, factors = tree.flatten(model.params), tree.flatten(small)
    written = merged_files(tmp_path / "out")
    path = ("model", "layers", "mlp", "up_proj")
    for layer in range(2):
        base = np.asarray(leaves[(*path, "kernel")][layer], np.float32)
        a, b = (np.asarray(factors[(*path, name)][layer]) for name in ("lora_a", "lora_b"))
        found = written[f"model.layers.{layer}.mlp.up_proj.weight"].T
        assert np.allclose(found, base + 4 * (a @ b), rtol=0, atol=1e-7)
        assert not np.array_equal(found, found.astype(ml_dtypes.bfloat16))


def test_a_merge_with_a_wrong_scale_is_refused(half, tmp_path, monkeypatch):
    model, config, adapters = half
    right = merged._merge

    def wrong(bound, params, dtype):
        """As if alpha were eight times what it was in training."""
        return right(lora.bind(model.params, scaled(adapters, 8.0), config.adapter), params, dtype)

    monkeypatch.setattr(merged, "_merge", wrong)
    with pytest.raises(UserError, match="above export.max_merge_kl=0.05") as refused:
        merge_into(tmp_path / "wrong", half, adapters, GATES[1])
    assert "the merged model is not the one that was trained" in str(refused.value)
    assert not list(tmp_path.iterdir())
    nothing = merge_report.Report("float32", {}, {"merged": float("nan"), "base": 1.0})
    with pytest.raises(UserError, match="KL.live, merged. is nan"):
        merge_report.check(nothing, configs.ExportConfig(max_merge_kl=1.0))


def test_without_examples_there_is_no_kl(half, tmp_path):
    _, _, adapters = half
    with pytest.raises(UserError, match="max_merge_kl=0.05 is measured on rows of data.eval"):
        merge_into(tmp_path / "out", half, adapters, *GATES, rows=[])
    assert not list(tmp_path.iterdir())
    summary = merge_into(tmp_path / "out", half, adapters, rows=[])["merge"]
    assert summary["probe_rows"] == 0 and "kl_live_merged" not in summary


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("min_merge_cosine=0", "min_merge_cosine=0.0 must be above 0 and at most 1"),
        ("min_merge_cosine=1.5", "min_merge_cosine=1.5 must be above 0 and at most 1"),
        ("max_merge_kl=0", "max_merge_kl=0.0 must be above 0"),
        ("probe_rows=-1", "probe_rows=-1 must be at least 0"),
    ],
)
def test_limits_that_cannot_be(setting, message):
    with pytest.raises(UserError, match=f"export.{message}"):
        make_config(f"export.{setting}")
    with pytest.raises(UserError, match="measured on export.probe_rows, which is 0"):
        make_config("export.max_merge_kl=1", "export.probe_rows=0")


def run_command(*words, status=0):
    assert (train_main if words[0] == "--config" else main)([str(w) for w in words]) == status


def report_of(directory):
    return json.loads((directory / "merge_report.json").read_text())


@pytest.mark.slow
def test_an_nf4_run_by_the_command_line(files, tmp_path, capsys):
    rows = write_rows(tmp_path / "rows.jsonl")
    run, settings = tmp_path / "run", ("base_dtype=nf4", "export.quantized_base=dequantized")
    settings += (f"data.train={rows}", "data.eval_size=1", "export.merged=true", "train.steps=3")
    run_command("--config", files / "run.yaml", f"output_dir={run}", *settings)
    summary = json.loads((run / "summary.json").read_text())["merge"]
    written = report_of(run / "merged")
    assert written.pop("modules").keys() and written == summary
    # The quantisation is no update: what is merged is exactly what was trained.
    assert summary["probe_rows"] == 1 and summary["cosine"] > 0.9999
    assert summary["kl_live_merged"] < 1e-8 < summary["kl_live_base"]

    export_to = ("export", "--run", run, "--format", "hf", "--output")
    limit, other = "export.max_merge_kl=1e-5", "export.quantized_base=original"
    run_command(*export_to, tmp_path / "same", limit)
    names = ("merge_report.json", "merge_report.png", "model.safetensors")
    for name in names:
        assert (tmp_path / "same" / name).read_bytes() == (run / "merged" / name).read_bytes()
    capsys.readouterr()
    strict = (limit, "export.min_merge_cosine=0.999", other)
    run_command(*export_to, tmp_path / "other", *strict, status=2)
    told = capsys.readouterr().err
    assert "above export.max_merge_kl=1e-05" in told and "quantized_base=dequantized" in told
    assert "min_merge_cosine" not in told  # of the update itself all is there
    rows.unlink()
    capsys.readouterr()
    run_command(*export_to, tmp_path / "moved", limit, status=2)
    assert "max_merge_kl=1e-05 needs the data of the run, and they" in capsys.readouterr().err
    assert not (tmp_path / "moved").exists() and not list(tmp_path.glob(".*"))
    run_command(*export_to, tmp_path / "moved")
    told = capsys.readouterr().err
    assert told.count("note: KL(live, merged) is left out, without data: ") == 1
    assert "kl_live_merged" not in report_of(tmp_path / "moved")


def test_a_run_whose_merge_is_refused_can_be_finished(files, tmp_path, capsys):
    run = tmp_path / "run"
    command = ("--config", files / "run.yaml", f"output_dir={run}", "train.steps=1")
    command += ("data.streaming=true", "base_dtype=bfloat16", "export.merged=true")
    tiny = ("train.learning_rate=1e-6", "export.min_merge_cosine=0.9")
    capsys.readouterr()
    run_command(*command, *tiny, status=2)
    told = capsys.readouterr().err
    assert "below export.min_merge_cosine=0.9 in " in told and "Traceback" not in told
    found = {path.name for path in run.iterdir()}
    assert found >= {"adapter", "checkpoints", "plots"} and not {"merged", "summary.json"} & found
    assert not list(run.glob(".*"))
    run_command(*command, *tiny, "resume=true", "export.dtype=float32")
    merged = json.loads((run / "summary.json").read_text())["merge"]
    assert merged["dtype"] == "float32" and merged["lowest_cosine"] > 0.9
    assert merged["probe_rows"] == 4 and merged["kl_live_merged"] < 1e-8  # the rows of the stream


def test_eight_devices_measure_what_one_does(on_eight_devices):
    found, expected = on_eight_devices(Path(__file__).with_name("sharded_merge.py"))
    assert len(expected["numbers"]) == 4 * 5  # embedding, head, three layers
    assert found["numbers"] == pytest.approx(expected["numbers"], rel=1e-3)
    assert found["kl"] == pytest.approx(expected["kl"], rel=1e-2)
    assert found["split"] and not expected["split"]
