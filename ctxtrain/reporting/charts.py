"""The charts of the report, drawn by Vega-Lite: Altair writes and checks the specifications, the page's script draws.

Comes in: plain rows. Goes out: Vega-Lite specifications as plain values, without data from outside. Colours are CSS
variables of `report.css`, so that charts follow a light or dark page; series differ in shape or dash as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import altair as alt
import vl_convert
from altair.utils import schemapi

Rows = Sequence[Mapping[str, Any]]
Spec = dict[str, Any]

BLUE, ORANGE, GREY = "var(--blue)", "var(--orange)", "var(--grey)"
MANY_DOTS = 50
SHAPES = {"circle": 1, "cross": 2.6, "square": 1}  # and sizes: a cross shows behind a circle in its place
FEW_ROWS = 10_000  # more are written as 12.3k
LIKELIEST = (0.3, 1.0)  # the likeliest of three classes has a probability of at least a third
TEXT, MUTED, LINE = "var(--text)", "var(--muted)", "var(--line)"
FONT = "system-ui, sans-serif"
# What all charts share, given to the script once. The page labels each chart itself, so Vega's own labels are off.
CONFIG: Spec = {
    "aria": False,
    "background": "transparent",
    "font": FONT,
    "view": {"stroke": None},
    "axis": {
        "labelColor": MUTED,
        "titleColor": MUTED,
        "labelFontSize": 12,
        "labelPadding": 6,
        "titleFontSize": 12,
        "titlePadding": 8,
        "titleFontWeight": "normal",
        "labelLimit": 150,
        "gridColor": LINE,
        "domainColor": LINE,
        "tickColor": LINE,
        "tickCount": 5,
        "labelFlush": False,
        "labelSeparation": 6,
    },
    # Ticks stand at least 0.63 times this apart, by the rounding of d3: more than a label is wide.
    "axisX": {"tickCount": {"expr": "max(2, floor(width / 80))"}},
    "legend": {
        "orient": "top",
        "title": None,
        "labelColor": TEXT,
        "labelFontSize": 12,
        "labelLimit": 220,
        "symbolSize": 90,
        "columnPadding": 14,
    },
    "text": {"color": TEXT, "font": FONT},
}


@cache  # bundling takes more than a second
def script(drawing: str) -> str:
    """`drawing` in one script with the `vegaEmbed` that it calls (Vega, Vega-Lite, Vega-Embed), without a download."""
    version = alt.SCHEMA_VERSION.removeprefix("v").rpartition(".")[0]
    bundle: str = vl_convert.javascript_bundle(drawing, vl_version=version)
    return bundle


def intervals(rows: Rows, title: str, *, domain: Sequence[float] | None = None, zero: bool = False) -> Spec:
    """A dot a row with its interval; `rows` have name, value, low, high and, as an upright tick, `target`."""
    base = _chart(rows)
    axis = alt.Axis(grid=False, ticks=False, domain=False, labelColor=TEXT, labelPadding=10)
    y = alt.Y("name:N", sort=[row["name"] for row in rows], title=None, axis=axis)
    scale = alt.Scale(domain=domain) if domain else alt.Scale(zero=False, padding=10)
    # Thinning out labels that are too near each other could take zero's.
    ticks = alt.Axis(labelOverlap=False) if zero else alt.Axis()
    tips = _tips(("name", "", ""), ("value", title, ".3f"), ("low", "interval from", ".3f"), ("high", "to", ".3f"))
    layers = [
        base.mark_rule(color=BLUE, strokeWidth=2).encode(
            y=y, x=alt.X("low:Q", title=title, scale=scale, axis=ticks), x2="high:Q", tooltip=tips
        ),
        base.mark_point(color=BLUE, filled=True, opacity=1, size=90).encode(y=y, x="value:Q", tooltip=tips),
    ]
    if any(row.get("target") is not None for row in rows):
        target = _tips(("name", "", ""), ("target", "target", ".2f"))
        mark = base.mark_tick(color=ORANGE, thickness=3, size=22).encode(y=y, x="target:Q", tooltip=target)
        layers.append(mark)
    if zero:
        layers.insert(0, _chart([{}]).mark_rule(color=MUTED).encode(x=alt.datum(0)))
    return _spec(alt.layer(*layers), height=34 * len(rows))


def lines(
    rows: Rows,
    title: str,
    colors: Mapping[str, str],
    *,
    chosen: int,
    level: float | None = None,
) -> Spec:
    """Curves over epochs; `rows` have epoch (may be a fraction), series, value and `dot`: drawn as a point too.

    The chosen epoch is a vertical line, the target `level` a dashed horizontal one.
    """
    domain = list(colors)
    rows = sorted(rows, key=lambda row: domain.index(row["series"]))  # later series are drawn over earlier ones
    base = _chart(rows)
    x = alt.X("epoch:Q", title="epoch", scale=alt.Scale(nice=False), axis=alt.Axis(tickMinStep=1, grid=False))
    scale = alt.Scale(zero=False)
    if level is not None:
        shown = [level, *(row["value"] for row in rows)]
        scale = alt.Scale(zero=False, nice=True, domainMin=max(0, min(shown) - (max(shown) - min(shown)) / 8))
    y = alt.Y("value:Q", title=title, scale=scale, axis=alt.Axis(format="~g"))
    dashes = [[1, 0], [6, 4], [2, 2]][: len(colors)]
    legend = alt.Legend(symbolType="stroke", symbolStrokeWidth=2, symbolSize=250, columns=2) if domain[1:] else None
    color = alt.Color("series:N", scale=alt.Scale(domain=domain, range=list(colors.values())), legend=legend)
    dash = alt.StrokeDash("series:N", scale=alt.Scale(domain=domain, range=dashes), legend=legend)
    tips = _tips(("series", "", ""), ("epoch", "epoch", ".2~f"), ("value", title, ".3~g"))
    dots = [row for row in rows if row["dot"]]
    width = alt.condition("datum.dot", alt.value(2.5), alt.value(1.2)) if dots else alt.value(2)
    size = 60 if len(dots) < MANY_DOTS else 15
    points = [
        _chart(own).mark_point(filled=True, shape=shape, size=size * larger, opacity=1).encode(x=x, y=y, color=color)
        for name, (shape, larger) in zip(domain, SHAPES.items(), strict=False)
        if (own := [row for row in dots if row["series"] == name])
    ]
    early = chosen < max((row["epoch"] for row in rows), default=chosen) / 2
    mark = _chart([{"epoch": chosen, "text": f"chosen: {chosen}"}]).encode(x="epoch:Q")
    layers = [
        mark.mark_rule(color=MUTED),
        mark.mark_text(
            color=TEXT, align="left" if early else "right", dx=5 if early else -5, dy=-5, baseline="bottom"
        ).encode(y=alt.value(0), text="text:N"),
        base.mark_line().encode(x=x, y=y, color=color, strokeDash=dash, strokeWidth=width),
        *reversed(points),
        base.mark_point(size=120, opacity=0, filled=True).encode(x=x, y=y, tooltip=tips),
    ]
    if level is not None:
        layers.insert(0, _chart([{}]).mark_rule(color=ORANGE, strokeDash=[14, 4, 2, 4]).encode(y=alt.datum(level)))
    return _spec(alt.layer(*layers), height=220)


def sizes(rows: Rows, title: str, colors: Mapping[str, str]) -> Spec:
    """Scores over the number of training windows, on a logarithmic axis; `rows` have windows, series and value."""
    domain, ticks = list(colors), sorted({row["windows"] for row in rows})
    axis = alt.Axis(values=ticks, format=",d", labelOverlap="greedy", grid=False)
    base = _chart(rows).encode(
        x=alt.X("windows:Q", title="training windows", scale=alt.Scale(type="log", nice=False, padding=24), axis=axis),
        y=alt.Y("value:Q", title=title, scale=alt.Scale(zero=False)),
        color=alt.Color("series:N", scale=alt.Scale(domain=domain, range=list(colors.values()))),
        tooltip=_tips(("series", "", ""), ("windows", "training windows", ","), ("value", title, ".3f")),
    )
    dash = alt.StrokeDash("series:N", scale=alt.Scale(domain=domain, range=[[1, 0], [6, 4]]))
    shape = alt.Shape("series:N", scale=alt.Scale(domain=domain, range=["circle", "square"]))
    line, points = base.mark_line(strokeWidth=2), base.mark_point(filled=True, opacity=1, size=80)
    return _spec(alt.layer(line.encode(strokeDash=dash), points.encode(shape=shape)), height=240)


def confusion(cells: Rows, labels: Sequence[str]) -> Spec:
    """A square per label and prediction; `cells` have label, called, rows, and the share of the label as shade."""
    base = _chart(cells).encode(
        x=alt.X(
            "called:N",
            sort=labels,
            title="predicted",
            axis=alt.Axis(orient="top", labelAngle=0, domain=False, ticks=False),
        ),
        y=alt.Y("label:N", sort=labels, title="label", axis=alt.Axis(domain=False, ticks=False)),
        tooltip=_tips(
            ("label", "label", ""),
            ("called", "predicted", ""),
            ("rows", "windows", ","),
            ("share", "share of label", ".1%"),
        ),
    )
    shade = alt.Opacity("share:Q", scale=alt.Scale(domain=[0, 1], range=[0.04, 0.55]), legend=None)
    return _spec(
        alt.layer(
            base.mark_rect(color=BLUE, stroke="var(--card)", strokeWidth=3, cornerRadius=4).encode(opacity=shade),
            base.mark_text(fontSize=20, fontWeight="bold", dy=-8).encode(text=alt.Text("rows:Q", format=",")),
            base.mark_text(fontSize=13, dy=14).encode(text=alt.Text("share:Q", format=".0%")),
        ),
        height=300,
    )


def reliability(rows: Rows, colors: Mapping[str, str]) -> Spec:
    """Accuracy over confidence, with the diagonal of perfect calibration.

    `rows` have series, confidence, accuracy and rows.
    Points are not joined by a line, because adjacent ones jump up and down by chance.
    """
    ends = _chart([{"confidence": end, "accuracy": end} for end in LIKELIEST])
    whole, domain = alt.Scale(domain=LIKELIEST), list(colors)
    x = alt.X("confidence:Q", title="confidence", scale=whole, axis=alt.Axis(format="%", grid=False))
    y = alt.Y("accuracy:Q", title="predicted right", scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(format="%"))
    base = _chart(rows).encode(
        x=x,
        y=y,
        color=alt.Color("series:N", scale=alt.Scale(domain=domain, range=list(colors.values()))),
        tooltip=_tips(
            ("series", "", ""),
            ("confidence", "confidence", ".1%"),
            ("accuracy", "right", ".1%"),
            ("rows", "windows", ","),
        ),
    )
    shape = alt.Shape("series:N", scale=alt.Scale(domain=domain, range=["circle", "square"]))
    return _spec(
        alt.layer(
            ends.mark_line(color=MUTED, strokeDash=[4, 4]).encode(x=x, y=y),
            base.mark_point(filled=True, opacity=1, size=70).encode(shape=shape),
        ),
        height=300,
    )


def histogram(rows: Rows, colors: Mapping[str, str]) -> Spec:
    """Stacked counts; `rows` have series, from, to and rows."""
    bars = (
        _chart(rows)
        .mark_bar(stroke="var(--card)", strokeWidth=1)
        .encode(
            x=alt.X("from:Q", bin="binned", title="confidence", axis=alt.Axis(format="%", grid=False)),
            x2="to:Q",
            y=alt.Y("rows:Q", title="windows", axis=alt.Axis(format=",d", tickMinStep=1)),
            color=alt.Color("series:N", scale=alt.Scale(domain=list(colors), range=list(colors.values()))),
            tooltip=_tips(
                ("series", "", ""), ("from", "confidence from", ".0%"), ("to", "to", ".0%"), ("rows", "windows", ",")
            ),
        )
    )
    return _spec(bars, height=240)


def risk(rows: Rows) -> Spec:
    """Errors among the predictions kept over the share kept; `rows` have coverage, risk and confidence."""
    tips = _tips(
        ("coverage", "predictions kept", ".0%"),
        ("risk", "wrong among them", ".1%"),
        ("confidence", "confidence at least", ".1%"),
    )
    curve = (
        _chart(rows)
        .mark_line(color=BLUE, strokeWidth=2, point=alt.OverlayMarkDef(color=BLUE, size=50))
        .encode(
            x=alt.X(
                "coverage:Q",
                title="predictions kept",
                scale=alt.Scale(domain=[0, 1]),
                axis=alt.Axis(format="%", grid=False),
            ),
            y=alt.Y("risk:Q", title="wrong among them", scale=alt.Scale(zero=True), axis=alt.Axis(format="%")),
            tooltip=tips,
        )
    )
    return _spec(curve, height=240)


def balance(rows: Rows, colors: Mapping[str, str]) -> Spec:
    """Bars beside each other by class; `rows` have class, series and rows."""
    domain = list(colors)
    digits = "," if max(row["rows"] for row in rows) < FEW_ROWS else ".3~s"
    axis = alt.Axis(labelAngle=0, labelColor=TEXT, ticks=False, labelExpr=r"split(datum.label, '\n')")
    bars = _chart(rows).encode(
        x=alt.X("class:N", sort=None, title=None, axis=axis),
        xOffset=alt.XOffset("series:N", sort=domain),
        y=alt.Y("rows:Q", title="windows", axis=alt.Axis(format="~s")),
        tooltip=_tips(("class", "", ""), ("series", "", ""), ("rows", "windows", ",")),
    )
    color = alt.Color("series:N", scale=alt.Scale(domain=domain, range=list(colors.values())))
    return _spec(
        alt.layer(
            bars.mark_bar(cornerRadiusEnd=3).encode(color=color),
            bars.mark_text(dy=-8).encode(text=alt.Text("rows:Q", format=digits)),
        ),
        height=220,
    )


def candles(bars: Rows, names: Sequence[str]) -> Spec:
    """Candlesticks; `bars` have bar (0 is the event, earlier ones are negative), move, open, high, low, close.

    The hover text has the values of `names`.

    A body is orange where the close is below the open, else blue; the column of the event is shaded.
    """
    places = [bar["bar"] for bar in bars]
    ticks = [place for place in places if place % 10 == 0]
    x = alt.X(
        "bar:O", sort=places, title="bars before the event", axis=alt.Axis(values=ticks, labelAngle=0, grid=False)
    )
    color = alt.Color("move:N", scale=alt.Scale(domain=["up", "down"], range=[BLUE, ORANGE]), legend=None)
    scale = alt.Scale(zero=False)
    tips = _tips(("bar", "bar", ""), *((name, name, ",~r") for name in names))
    base = _chart(bars).encode(x=x, color=color, tooltip=tips)
    event = _chart([{"bar": places[-1]}]).mark_rect(color=MUTED, opacity=0.22).encode(x=x)
    return _spec(
        alt.layer(
            event,
            base.mark_rule().encode(y=alt.Y("low:Q", title=None, scale=scale), y2="high:Q"),
            base.mark_bar(width=alt.RelativeBandSize(0.72), strokeWidth=1).encode(
                y="open:Q", y2="close:Q", stroke=color
            ),
        ),
        height=230,
    )


def _chart(rows: Rows) -> alt.Chart:
    return alt.Chart(alt.InlineData(values=[dict(row) for row in rows]))


def _tips(*fields: tuple[str, str, str]) -> list[alt.Tooltip]:
    """Hover values of (field, title, d3 format); a field without format is text."""
    return [
        alt.Tooltip(f"{name}:Q", title=title, format=form) if form else alt.Tooltip(f"{name}:N", title=title or name)
        for name, title, form in fields
    ]


def _spec(chart: alt.Chart | alt.LayerChart, height: int) -> Spec:
    """The specification, as wide as its container on the page."""
    spec: Spec = chart.properties(width="container", height=height).to_dict(validate=schemapi.DEBUG_MODE)
    return spec
