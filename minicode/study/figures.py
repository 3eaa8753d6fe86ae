"""Charts as SVG, in plain Python: bars, lines and scatter, each of which returns a string, for a page or for a file.

Values that are None, NaN or infinite are left out. Every chart takes `title`, which screen readers read, the labels of
the axes `x` and `y`, and `cover`: numbers that the axes have to reach, whatever the data.
"""

import math
from html import escape
from itertools import product
from pathlib import Path

STYLE = Path(__file__).with_name("figures.css").read_text()
WIDTH, LETTER = 480, 7  # of a chart, and of a letter on average, in pixels


def finite(*values):
    return all(value is not None and math.isfinite(value) for value in values)


def ticks(values):
    """Round numbers, evenly spaced, that cover those of the values that are finite, but for a tenth of a step."""
    values = [v for v in values if finite(v)]
    low, high = min(values, default=0), max(values, default=0)
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # a single value: from 0 to it
        low, high = min(low, 0), max(high, 0) or float(low == 0)
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (m * step) <= 6)
    step = max(1, step) if all(isinstance(v, int) for v in values) else step
    return [i * step for i in range(math.floor(low / step + 0.1), math.ceil(high / step - 0.1) + 1)]


class Axis:
    """An axis of names, at 0, 1, 2 ..., or of numbers that it has to cover; axis(value) is in pixels."""

    def __init__(self, values, start, end):
        self.start, self.end, self.named = start, end, bool(values) and isinstance(values[0], str)
        self.ticks = (
            list(enumerate(values))
            if self.named
            else [(tick, f"{tick:,.10g}") for tick in ticks(values)]
        )
        reached = (
            [-0.5, len(values) - 0.5]
            if self.named
            else [*dict(self.ticks), *filter(finite, values)]
        )
        self.low, self.high = min(reached), max(reached)

    def __call__(self, value):
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


class Chart:
    """The frame of a chart, into which path() and text() draw. x and y: names or numbers, as for an axis."""

    def __init__(self, title, x, y, x_label, y_label, legend=(), height=300, right=20):
        self.title, self.height, self.parts = title, height, []
        left, top = 0, 14
        for i, name in enumerate(legend):
            width = 32 + LETTER * len(name)
            left, top = (0, top + 20) if left and left + width > WIDTH else (left, top)
            self.parts.append(
                f'<path class="c{i % 6}" d="M{left} {top - 10}h11v11h-11z" fill="currentColor"/>'
            )
            self.text(left + 17, top, name)
            left += width
        top, bottom = (
            (top + 18 if legend else 10) + 18 * bool(y_label),
            height - (46 if x_label else 26),
        )
        self.y = Axis(y, bottom, top)
        if self.y.named:  # from the top down
            self.y.start, self.y.end = top, bottom
        self.x = Axis(x, 12 + LETTER * max(len(text) for _, text in self.y.ticks), WIDTH - right)
        for value, text in self.x.ticks:
            self.path([] if self.x.named else [(value, self.y.low), (value, self.y.high)], "grid")
            self.text(self.x(value), bottom + 18, text, "middle")
        for value, text in self.y.ticks:
            self.path([] if self.y.named else [(self.x.low, value), (self.x.high, value)], "grid")
            self.text(self.x.start - 7, self.y(value) + 4.5, text, "end")
        self.text((self.x.start + self.x.end) / 2, height - 8, x_label, "middle")
        self.text(0, top - 12, y_label)

    def path(self, points, color="ink", width=1, fill="none", dash="none", title="", dots=False):
        """A line through the points that are finite, broken at others; or dots at them; or, filled, an area."""
        d, step = "", "M"
        for a, b in points:
            place = f"{self.x(a):.1f},{self.y(b):.1f}" + "h0" * dots if finite(a, b) else ""
            d, step = d + (step + place) * bool(place), "L" if place and not dots else "M"
        style = f'stroke-width="{width}" stroke-dasharray="{dash}" stroke-linecap="round"'
        title = title and f"<title>{escape(title)}</title>"
        self.parts += [
            f'<path class="{color}" d="{d}" fill="{fill}" stroke="currentColor" {style}>{title}</path>'
        ] * bool(d)

    def text(self, x, y, text, anchor="start", color=""):
        place = f'class="{color}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
        self.parts += [f"<text {place}>{escape(text)}</text>"] * bool(text)

    def svg(self):
        title, size = (
            escape(self.title),
            f'width="{WIDTH}" height="{self.height}" viewBox="0 0 {WIDTH} {self.height}"',
        )
        head = f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" {size} role="img" aria-label="{title}">'
        return "".join(
            (head, f"<title>{title}</title><style>{STYLE}</style>", *self.parts, "</svg>")
        )


def bars(groups, series, values, errors=None, *, title="", x="", y="", horizontal=False, cover=()):
    """Bars side by side: values[i][j] of series i in the group j; errors: half the length of their error bars."""
    n, numbers, drawn = max(1, len(series)), [0, *cover], []
    for (i, name), (j, group) in product(enumerate(series), enumerate(groups)):
        value, error = values[i][j], errors[i][j] if errors and finite(errors[i][j]) else 0
        if finite(value):
            note = f"{group}, {name}: {value:.4g}" + (f" ± {error:.2g}" if error else "")
            drawn.append((j + 0.8 * ((i + 0.5) / n - 0.5), value, error, f"c{i % 6}", note))
            numbers += [value - error, value + error]
    swap = (lambda a, b: (b, a)) if horizontal else (lambda a, b: (a, b))
    height, legend = (
        80 + len(groups) * (12 + 13 * n) if horizontal else 300,
        series if n > 1 else (),
    )
    chart = Chart(title, *swap(groups, numbers), x, y, legend, height)
    for at, value, error, color, note in drawn:
        box = [
            swap(at + side * 0.36 / n, end)
            for side, end in ((-1, 0), (-1, value), (1, value), (1, 0))
        ]
        chart.path(box, color, 0, "currentColor", title=note)
        chart.path([swap(at, value - error), swap(at, value + error)] if error else [], width=1.5)
    return chart.svg()


def lines(series, *, title="", x="", y="", reference=None, cover=()):
    """series: {name: (xs, ys)}, a line each; with dots where they are few. reference: (y, label) of a line across."""
    xs, ys = ([v for line in series.values() for v in line[axis]] for axis in (0, 1))
    at, label = reference or (None, "")
    legend, right = series if len(series) > 1 else (), 14 + LETTER * len(label) if reference else 20
    chart = Chart(title, xs, [*cover, at, *ys], x, y, legend, right=right)
    for i, (a, b) in enumerate(series.values()):
        chart.path(zip(a, b), f"c{i % 6}", 2)
        chart.path(zip(a, b) if len(a) <= 40 else (), f"c{i % 6}", 7, dots=True)
    if reference:
        chart.path([(chart.x.low, at), (chart.x.high, at)], dash="4 3")
        chart.text(chart.x.end + 6, chart.y(at) + 4.5, label)
    return chart.svg()


def scatter(
    points, colors=None, names=(), labels=None, *, title="", x="", y="", diagonal=False, cover=()
):
    """Points (x, y) in the colours 0, 1, 2 ..., which may have names; a point with a label is larger than the others."""
    colors, labels = colors or [0] * len(points), labels or [""] * len(points)
    chart = Chart(
        title, *([*cover, *(point[axis] for point in points)] for axis in (0, 1)), x, y, names, 400
    )
    if diagonal:
        chart.path(
            [(max(chart.x.low, chart.y.low),) * 2, (min(chart.x.high, chart.y.high),) * 2],
            dash="4 3",
        )
    for i in range(max(colors, default=-1) + 1):
        chosen = [
            point for point, color, label in zip(points, colors, labels) if color == i and not label
        ]
        chart.path(chosen, f"c{i % 6}", 5, dots=True)
    for point, color, label in zip(points, colors, labels):
        if label and finite(*point):
            chart.path([point], f"c{color % 6}", 12, dots=True)
            chart.text(chart.x(point[0]) + 9, chart.y(point[1]) + 4.5, label, color="label")
    return chart.svg()
