"""Charts of report pages, as Vega-Lite specifications.

The data of every chart has fixed field names, so that no name of a setting or a module is read as a
path or an expression. Colours are those of the page: page.js gives them to Vega as its config.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

Rows = Sequence[Mapping[str, Any]]
Spec = dict[str, Any]
_HEIGHT = 260
_FEW = 60  # points of a curve that has a mark on each


def _finish(chart: Any, height: int = _HEIGHT) -> Spec:
    """Return the specification of a chart as wide as its place in the page."""
    spec = chart.properties(width="container", height=height).to_dict(validate=True)
    spec.pop("config", None)  # that of altair's theme
    return spec


def _data(rows: Rows) -> alt.Data:
    return alt.Data(values=[dict(row) for row in rows])


def _axis(rows: Rows, name: str, title: str, log: bool = False) -> dict[str, Any]:
    """Return axis and scale of a number. A linear axis need not begin at zero."""
    scale = alt.Scale(type="log", nice=False, padding=12) if log else alt.Scale(zero=False)
    values = sorted({row[name] for row in rows})
    axis = alt.Axis(labelOverlap=True)
    if log and len(values) <= 12:
        axis = alt.Axis(labelOverlap=True, values=values)
    return {"title": title, "scale": scale, "axis": axis}


def curves(
    rows: Rows, title: str, names: Sequence[str], height: int = _HEIGHT, faint: str = ""
) -> Spec:
    """Curves over the steps. Rows have `series`, `step`, `value`, and where points stand for
    several `low` and `high`. A curve of few points has a mark on each; that named `faint` is pale.
    """
    shown = [name for name in names if any(row["series"] == name for row in rows)]
    colour = alt.Color("series:N", title=None, scale=alt.Scale(domain=shown))
    if len(shown) == 1:
        colour = alt.Color("series:N", title=None, scale=alt.Scale(domain=shown), legend=None)
    scale = alt.Scale(zero=False)
    base = alt.Chart(_data(rows)).encode(
        x=alt.X("step:Q", title="optimizer step", axis=alt.Axis(tickMinStep=1)), color=colour
    )
    value = alt.Y("value:Q", title=title, scale=scale)
    layers: list[Any] = []
    if any("low" in row for row in rows):
        band = base.mark_area(opacity=0.2).transform_filter("isValid(datum.low)")
        low = alt.Y("low:Q", title=title, scale=scale)
        layers.append(band.encode(y=low, y2=alt.Y2("high:Q")))
    pale = alt.condition(alt.datum.series == faint, alt.value(0.35), alt.value(1))
    layers.append(base.mark_line().encode(y=value, opacity=pale))
    counts = {name: sum(row["series"] == name for row in rows) for name in shown}
    few = [name for name, count in counts.items() if count <= _FEW]
    marks = base.mark_point(filled=True, size=36).encode(
        y=value,
        tooltip=[
            alt.Tooltip("series:N", title="curve"),
            alt.Tooltip("step:Q"),
            alt.Tooltip("value:Q", format=".5g"),
        ],
    )
    if few:
        layers.append(marks.transform_filter(alt.FieldOneOfPredicate("series", few)))
    return _finish(alt.layer(*layers), height)


def heat_map(rows: Rows, title: str, order: Sequence[str], format_: str = ".3g") -> Spec:
    """Map of values by `module` and `layer`; a missing value has the colour of the panel."""
    chart = (
        alt.Chart(_data(rows))
        .mark_rect()
        .encode(
            x=alt.X("layer:O", title="layer", axis=alt.Axis(labelAngle=0, labelOverlap=True)),
            y=alt.Y("module:N", title=None, sort=list(order), axis=alt.Axis(labelLimit=180)),
            color=alt.Color("value:Q", title=title, legend=alt.Legend(format=format_)),
            tooltip=[
                alt.Tooltip("module:N"),
                alt.Tooltip("layer:O"),
                alt.Tooltip("value:Q", title=title, format=".4g"),
            ],
        )
    )
    return _finish(chart, max(90, 24 * len(order)))


def by_setting(rows: Rows, x: str, y: str, group: str | None, log: bool) -> Spec:
    """Score over a setting. Rows have `x`, `y`, `group`, `trial` and `label`; `x`, `y` and `group`
    are the titles. A line goes through the means of each group.
    """
    base = alt.Chart(_data(rows)).encode(x=alt.X("x:Q", **_axis(rows, "x", x, log)))
    if group is not None:
        kind = "O" if all(isinstance(row["group"], int | float) for row in rows) else "N"
        base = base.encode(color=alt.Color(f"group:{kind}", title=group))
    line = base.mark_line(opacity=0.8).encode(
        y=alt.Y("mean(y):Q", title=y, scale=alt.Scale(zero=False))
    )
    scale = alt.Scale(zero=False)
    dots = base.mark_point(filled=True, size=60).encode(
        y=alt.Y("y:Q", title=y, scale=scale), tooltip=_trial_tips(y)
    )
    return _finish(line + dots)


def _score(title: str) -> alt.Color:
    """Return the colours of a loss: the strongest for the lowest."""
    return alt.Color("score:Q", title=title, scale=alt.Scale(reverse=True))


def _labels(base: Any, field: str) -> Any:
    """Return texts to the right of their points, on a ground of the panel's colour."""
    layers = [
        base.mark_text(align="left", dx=9, fontSize=11, style=style) for style in ("ground", "text")
    ]
    return alt.layer(*(layer.encode(text=f"{field}:N") for layer in layers))


def _trial_tips(score: str) -> list[Any]:
    return [
        alt.Tooltip("trial:N", title="trial"),
        alt.Tooltip("label:N", title="settings"),
        alt.Tooltip("y:Q", title=score, format=".5g"),
    ]


def front(rows: Rows, x: str, y: str) -> Spec:
    """Points of two losses. Rows have `x`, `y`, `trial`, `label` and `front`: True if no other
    point is better in both; these are joined by a line.
    """
    horizontal = alt.X("x:Q", title=x, scale=alt.Scale(zero=False))
    vertical = alt.Y("y:Q", title=y, scale=alt.Scale(zero=False))
    base = alt.Chart(_data(rows)).encode(x=horizontal, y=vertical)
    steps = base.mark_line(interpolate="step-after", strokeDash=[4, 3])
    steps = steps.transform_filter("datum.front").encode(order=alt.Order("x:Q"))
    dots = base.mark_point(filled=True, size=70).encode(
        color=alt.Color(
            "set:N",
            title=None,
            scale=alt.Scale(domain=["best trade-offs", "others"]),
        ),
        tooltip=[*_trial_tips(y), alt.Tooltip("x:Q", title=x, format=".5g")],
    )
    return _finish(steps + dots + _labels(base.transform_filter("datum.front"), "trial"))


def strengths(rows: Rows, x: str, y: str) -> Spec:
    """Points of two losses by adapter, joined in the order of `scale`, with the scale as text."""
    base = alt.Chart(_data(rows)).encode(
        x=alt.X("x:Q", title=x, scale=alt.Scale(zero=False)),
        y=alt.Y("y:Q", title=y, scale=alt.Scale(zero=False)),
        color=alt.Color("name:N", title=None),
    )
    line = base.mark_line().encode(order=alt.Order("scale:Q"))
    dots = base.mark_point(filled=True, size=60).encode(
        tooltip=[alt.Tooltip(f"{name}:{kind}") for name, kind in (("name", "N"), ("scale", "Q"))]
        + [alt.Tooltip("x:Q", title=x, format=".5g"), alt.Tooltip("y:Q", title=y, format=".5g")]
    )
    names = base.mark_text(dy=-11, fontSize=11).encode(text="label:N")
    return _finish(line + dots + names)


def parallel(rows: Rows, ticks: Rows, axes: Sequence[str], score: str) -> Spec:
    """Parallel coordinates: a line per trial through its place on each axis. Rows have `trial`,
    `axis`, `place` from 0 to 1, `text` and `score`; ticks have `axis`, `place` and `text`.
    """
    over = alt.selection_point(fields=["trial"], on="pointerover", clear="pointerout", name="over")
    horizontal = alt.X(
        "axis:N",
        sort=list(axes),
        title=None,
        scale=alt.Scale(type="point", padding=0.25),
        axis=alt.Axis(orient="top", labelAngle=0, grid=True, labelLimit=150, domain=False),
    )
    vertical = alt.Y("place:Q", axis=None, scale=alt.Scale(domain=[-0.05, 1.05]))
    base = alt.Chart(_data(rows)).encode(x=horizontal, y=vertical)
    line = base.mark_line(strokeWidth=2).encode(
        detail="trial:N",
        color=_score(score),
        opacity=alt.condition(over, alt.value(0.85), alt.value(0.08)),
    )
    dots = base.mark_point(filled=True, size=80, opacity=0.9).encode(
        color=_score(score),
        tooltip=[
            alt.Tooltip("trial:N", title="trial"),
            alt.Tooltip("axis:N", title="setting"),
            alt.Tooltip("text:N", title="value"),
            alt.Tooltip("score:Q", title=score, format=".5g"),
        ],
    )
    texts = _labels(alt.Chart(_data(ticks)).encode(x=horizontal, y=vertical), "text")
    return _finish(line + dots.add_params(over) + texts, 320)


def members(rows: Rows, title: str) -> Spec:
    """Curves of trials: rows have `trial`, `step`, `value`, `label` and `score`, which colours."""
    over = alt.selection_point(fields=["trial"], on="pointerover", clear="pointerout", name="over")
    base = alt.Chart(_data(rows)).encode(
        x=alt.X("step:Q", title="optimizer step", axis=alt.Axis(tickMinStep=1)),
        y=alt.Y("value:Q", title=title, scale=alt.Scale(zero=False)),
        detail="trial:N",
        color=_score("loss of the trial"),
    )
    line = base.mark_line(strokeWidth=1.5).encode(
        opacity=alt.condition(over, alt.value(0.9), alt.value(0.1))
    )
    dots = base.mark_point(filled=True, size=40, opacity=0).encode(
        tooltip=[
            alt.Tooltip("trial:N"),
            alt.Tooltip("label:N", title="settings"),
            alt.Tooltip("step:Q"),
            alt.Tooltip("value:Q", title=title, format=".5g"),
        ]
    )
    return _finish(line + dots.add_params(over), 320)


def bars(rows: Rows, title: str, limit: float | None = None, limit_name: str = "") -> Spec:
    """Bars of `name` and `value` in their order; `limit` is a vertical line."""
    base = alt.Chart(_data(rows)).encode(
        x=alt.X("value:Q", title=title),
        y=alt.Y("name:N", title=None, sort=None, axis=alt.Axis(labelLimit=220)),
    )
    layers: list[Any] = [
        base.mark_bar().encode(tooltip=[alt.Tooltip("name:N"), alt.Tooltip("value:Q", title=title)])
    ]
    if limit is not None:
        rule = alt.Chart(_data([{"limit": limit, "text": limit_name}])).encode(x="limit:Q")
        layers.append(rule.mark_rule(strokeDash=[4, 3], strokeWidth=2).encode(tooltip="text:N"))
    return _finish(alt.layer(*layers), max(80, 26 * len(rows)))
