"""Plots show what they are given: no curve is shifted, and no one value hides the others."""

import numpy as np
import pytest

from lora_jax.report import merge as merge_report
from lora_jax.report import plots


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """`drawn(plot, *arguments)`: the figure that a function would write."""
    figures = []
    monkeypatch.setattr(plots, "save", lambda figure, file: figures.append(figure))

    def draw(plot, content, file_first=True):
        file = tmp_path / "x.png"
        plot(file, content) if file_first else plot(content, file)
        figures[-1].canvas.draw()
        return figures[-1]

    return draw


def labels(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


@pytest.mark.parametrize(("count", "width"), [(1, 5), (2, 5), (9, 1), (40, 7), (40, 101)])
def test_smooth_is_centred(count, width):
    values = np.random.default_rng(0).normal(size=count)
    expected = []
    for i in range(count):
        half = min(width // 2, i, count - 1 - i)
        expected.append(values[i - half : i + half + 1].mean())
    found = plots.smooth(values, width)
    assert np.allclose(found, expected, atol=1e-12)
    assert np.allclose([found[0], found[-1]], [values[0], values[-1]])
    line = np.arange(count) * 3.0 + 1
    assert np.allclose(plots.smooth(line, width), line)  # a running mean lags behind


def test_the_curve_of_training_is_in_the_legend_raw_and_smooth(drawn):
    train = [(step, 2.4 * 0.9**step) for step in range(1, 151)]
    curves = {"train": train, "task": [(0, 2.0), (150, 0.1)], "regression": [(0, 2.2), (150, 2.4)]}
    axes = drawn(plots.plot_losses, curves).axes[0]
    held_out = ["held-out task", "held-out regression"]
    assert labels(axes) == ["training", "training, mean of 7 around", *held_out]
    raw, smooth = (line.get_ydata() for line in axes.lines[:2])
    assert np.allclose(raw, [loss for _, loss in train])
    assert smooth[0] == pytest.approx(train[0][1]) and np.abs(smooth - raw).max() < 0.1
    assert axes.get_ylim()[0] == 0 and axes.get_ylim()[1] > 2.4


@pytest.mark.parametrize("steps", [1, 2, 25])
def test_few_points_are_all_shown_and_not_smoothed(drawn, steps):
    curves = {"train": [(step, 2.0) for step in range(1, steps + 1)], "task": [(0, 5.0)]}
    axes = drawn(plots.plot_losses, curves).axes[0]
    assert labels(axes) == ["training", "held-out task"]
    assert axes.lines[0].get_marker() == "o" and axes.get_ylim()[1] > 5
    assert all(tick == int(tick) for tick in axes.get_xticks())


def test_one_high_loss_does_not_flatten_the_curve(drawn):
    train = [(step, 40.0 if step == 70 else 1.0) for step in range(1, 151)]
    axes = drawn(plots.plot_losses, {"train": train}).axes[0]
    assert labels(axes)[0] == "training (up to 40, not shown)" and axes.get_ylim()[1] < 2
    rising = [(step, float(step)) for step in range(1, 151)]
    axes = drawn(plots.plot_losses, {"train": rising}).axes[0]
    assert labels(axes)[0] == "training" and axes.get_ylim()[1] > 150


def test_nothing_is_drawn_without_a_logged_step(tmp_path):
    plots.plot_losses(tmp_path / "loss.png", {"train": [], "task": [(0, 1.0)]})
    assert not list(tmp_path.iterdir())


def test_one_large_update_does_not_flatten_the_map(drawn):
    sizes = {
        f"model.layers.{name}": {"relative": list(np.linspace(0.01, 0.03, 8))}
        for name in ("self_attn.q_proj", "mlp.up_proj", "self_attn.qkv_proj.k")
    }
    sizes["model.layers.mlp.up_proj"]["relative"][3] = 2.5
    sizes["model.layers.self_attn.q_proj"]["relative"][5] = None
    sizes["lm_head"] = {"relative": [0.02]}
    figure = drawn(plots.plot_norms, sizes)
    axes, bar = figure.axes
    image = axes.images[0]
    assert 0.03 <= image.norm.vmax < 0.1 and image.norm.vmin == 0
    assert [text.get_text() for text in axes.texts] == ["2.5"]
    assert bar.get_ylabel() == "|update| / |weight|"
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["q_proj", "up_proj", "qkv_proj.k", "lm_head"]
    shown = np.ma.filled(image.get_array(), np.nan)
    assert np.isnan(shown[0, 5]) and np.isnan(shown).sum() == 1
    assert shown[3].tolist() == [0.02] * 8
    assert list(axes.get_xticks()) == list(range(8))


@pytest.mark.parametrize("values", [[0.0, 0.0], [None, None], [0.5], [0.1] * 32])
def test_maps_of_any_size(drawn, values):
    figure = drawn(plots.plot_norms, {"model.layers.self_attn.q_proj": {"relative": values}})
    assert figure.axes[0].images[0].norm.vmax > 0 and not figure.axes[0].texts


def test_names_are_as_short_as_they_can_be():
    names = ["encoder.layers.q_proj", "decoder.layers.q_proj", "decoder.layers.o_proj", "x" * 50]
    found = plots.short_names(names)
    assert found == ["encoder.layers.q_proj", "decoder.layers.q_proj", "o_proj", "…" + "x" * 35]


def fit(cosine, share):
    return merge_report.Fit(100, 100 * share, cosine, 1.0, 1.0)


def test_a_merge_that_loses_something(drawn):
    modules = {f"model.layers.{i}.mlp.up_proj": fit(0.99 - i / 100, 0.7) for i in range(3)}
    report = merge_report.Report("bfloat16", modules | {"lm_head": fit(1.0, 1.0)})
    figure = drawn(merge_report.plot, report, file_first=False)
    upper, lower = figure.axes
    assert upper.get_yscale() == "log" and "1 - cosine" in upper.get_ylabel()
    assert np.allclose(upper.lines[0].get_ydata(), [0.01, 0.02, 0.03])
    assert np.allclose(lower.lines[0].get_ydata(), 0.3)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["up_proj", "lm_head"]
    assert list(lower.get_xticks()) == [0, 1, 2]


def test_a_merge_that_loses_nothing_is_a_sentence(drawn):
    unchanged = merge_report.Fit(4, 0.0, 0.0, 0.0, 0.0)
    modules = {"model.layers.0.mlp.up_proj": fit(1 - 1e-9, 1.0), "lm_head": unchanged}
    figure = drawn(merge_report.plot, merge_report.Report("float32", modules), file_first=False)
    assert not figure.axes and "nothing is lost" in figure.texts[0].get_text()
