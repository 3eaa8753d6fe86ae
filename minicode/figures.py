"""Charts as SVG, in plain Python: bars, lines and scatter, each of which returns a string, for a page or for a file.

The colours can be told apart by the colour-blind (after Okabe and Ito), and follow the reader's light or dark theme.
Values that are None, NaN or infinite are left out. Every chart takes `title`, which screen readers read, the labels of
the axes `x` and `y`, and `cover`: numbers that the axes have to reach, whatever the data.
"""

import math
from html import escape

LIGHT = ("#0072b2", "#d55e00", "#009e73", "#b0508a", "#8a6d00", "#6f6f6f")
DARK = ("#56b4e9", "#f08a4b", "#2cc295", "#e39bc6", "#dcbf4a", "#a8a8a8")
STYLE = (
    ".chart{font:13px system-ui,-apple-system,'Segoe UI',sans-serif;color:#57606a}.chart text{fill:currentColor}"
    ".chart .label{font-weight:600;stroke:#fff;stroke-width:4;paint-order:stroke}.chart .grid{color:#dfe3e8}%s"
    "@media(prefers-color-scheme:dark){.chart{color:#a3adb8}.chart .label{stroke:#15181c}.chart .grid{color:#30363d}%s}"
) % tuple("".join(f".chart .c{i}{{color:{color}}}" for i, color in enumerate(colors)) for colors in (LIGHT, DARK))
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
        if self.named:
            self.ticks, self.low, self.high = list(enumerate(values)), -0.5, len(values) - 0.5
        else:
            self.ticks = [(tick, f"{tick:,.10g}") for tick in ticks(values)]
            reached = [self.ticks[0][0], self.ticks[-1][0], *filter(finite, values)]
            self.low, self.high = min(reached), max(reached)

    def __call__(self, value):
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


class Chart:
    """The frame of a chart, into which path() and dots() draw; x and y: names or numbers, as for an axis."""

    def __init__(self, title, x, y, x_label, y_label, legend, height, reference=None):
        """reference: (value, label) of a line across, on the axis of numbers."""
        self.title, self.height, self.parts = title, height, []
        left, top = 0, 14
        for i, name in enumerate(legend):
            width = 32 + LETTER * len(name)
            left, top = (0, top + 20) if left and left + width > WIDTH else (left, top)
            self.parts.append(f'<path class="c{i % len(LIGHT)}" d="M{left} {top - 10}h11v11h-11z" fill="currentColor"/>')
            self.text(left + 17, top, name)
            left += width
        upright = Axis(y, 0, 1).named  # bars that lie, and hence a reference that stands
        top, bottom = (top + 18 if legend else 10) + 18 * bool(y_label or upright and reference), height - (46 if x_label else 26)
        self.y = Axis(y, top, bottom) if upright else Axis(y, bottom, top)
        left = 12 + LETTER * max(len(text) for _, text in self.y.ticks)
        self.x = Axis(x, left, WIDTH - (14 + LETTER * len(reference[1]) if reference and not upright else 20))
        for value, text in self.x.ticks:
            self.path([] if self.x.named else [(value, self.y.low), (value, self.y.high)], "grid")
            self.text(self.x(value), bottom + 18, text, "middle")
        for value, text in self.y.ticks:
            self.path([] if self.y.named else [(self.x.low, value), (self.x.high, value)], "grid")
            self.text(left - 7, self.y(value) + 4.5, text, "end")
        self.text((left + self.x.end) / 2, height - 8, x_label, "middle")
        self.text(0, top - 12, y_label)
        if reference and upright:
            self.path([(reference[0], self.y.low), (reference[0], self.y.high)], dash="4 3")
            self.text(self.x(reference[0]), top - 6, reference[1], "middle")
        elif reference:
            self.path([(self.x.low, reference[0]), (self.x.high, reference[0])], dash="4 3")
            self.text(self.x.end + 6, self.y(reference[0]) + 4.5, reference[1])

    def path(self, points, color="", width=1, fill="none", dash="none", title=""):
        """A line through points, broken at those that are not finite; filled, an area."""
        d = "".join(f"L{self.x(a):.1f},{self.y(b):.1f}" if finite(a, b) else " " for a, b in points)
        d = " ".join("M" + part[1:] for part in d.split())
        style = f'fill="{fill}" stroke="currentColor" stroke-width="{width}" stroke-dasharray="{dash}"'
        self.parts.append(f'<path class="{color}" d="{d}" {style}><title>{escape(title)}</title></path>')

    def dots(self, points, color, size):
        d = "".join(f"M{self.x(a):.1f} {self.y(b):.1f}h0" for a, b in points if finite(a, b))
        style = f'stroke-width="{size}" stroke="currentColor" stroke-linecap="round" stroke-opacity="0.8"'
        self.parts.append(f'<path class="{color}" d="{d}" {style}/>')

    def text(self, x, y, text, anchor="start", color=""):
        self.parts.append(f'<text class="{color}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>')

    def svg(self):
        title, size = escape(self.title), f'width="{WIDTH}" height="{self.height}" viewBox="0 0 {WIDTH} {self.height}"'
        head = f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" {size} role="img" aria-label="{title}"><title>{title}</title>'
        return f"{head}<style>{STYLE}</style>{''.join(self.parts)}</svg>"


def bars(groups, series, values, errors=None, *, title="", x="", y="", reference=None, horizontal=False, cover=()):
    """Bars side by side: values[i][j] of series i in the group j; errors: half the length of their error bars."""
    n, errors = max(1, len(series)), errors or [[0] * len(groups)] * len(series)
    swap = (lambda a, b: (b, a)) if horizontal else (lambda a, b: (a, b))
    drawn = [
        (i, j, values[i][j], errors[i][j] if finite(errors[i][j]) else 0)
        for i in range(len(series)) for j in range(len(groups)) if finite(values[i][j])
    ]  # fmt: skip
    numbers = [0, *cover, *(v + s * error for _, _, v, error in drawn for s in (-1, 1)), *(reference or ())[:1]]
    height, legend = 80 + len(groups) * (12 + 13 * n) if horizontal else 300, series if n > 1 else ()
    chart = Chart(title, *swap(groups, numbers), x, y, legend, height, reference)
    for i, j, value, error in drawn:
        middle, half = j + 0.8 * ((i + 0.5) / n - 0.5), 0.36 / n
        box = [(middle - half, 0), (middle - half, value), (middle + half, value), (middle + half, 0)]
        note = f"{groups[j]}, {series[i]}: {value:.4g}" + (f" ± {error:.2g}" if error else "")
        chart.path([swap(*corner) for corner in box], f"c{i % len(LIGHT)}", 0, "currentColor", title=note)
        if error:
            chart.path([swap(middle, value - error), swap(middle, value + error)], width=1.5)
    return chart.svg()


def lines(series, *, title="", x="", y="", reference=None, cover=()):
    """series: {name: (xs, ys)}, a line each; with dots where they are few."""
    numbers = [*cover, *(v for _, ys in series.values() for v in ys), *(reference or ())[:1]]
    legend = series if len(series) > 1 else ()
    chart = Chart(title, [v for xs, _ in series.values() for v in xs], numbers, x, y, legend, 300, reference)
    for i, points in enumerate([list(zip(*line)) for line in series.values()]):
        chart.path(points, f"c{i % len(LIGHT)}", 2)
        chart.dots(points if len(points) <= 40 else (), f"c{i % len(LIGHT)}", 7)
    return chart.svg()


def scatter(points, colors=None, names=(), labels=None, *, title="", x="", y="", diagonal=False, cover=()):
    """Points (x, y) in the colours 0, 1, 2 ..., which may have names; a point with a label is larger than the others."""
    colors, labels = colors or [0] * len(points), labels or [""] * len(points)
    chart = Chart(title, [*cover, *(a for a, _ in points)], [*cover, *(b for _, b in points)], x, y, names, 400)
    if diagonal:
        chart.path([(v, v) for v in (max(chart.x.low, chart.y.low), min(chart.x.high, chart.y.high))], dash="4 3")
    for color in sorted(set(colors)):
        chart.dots([p for p, c, label in zip(points, colors, labels) if c == color and not label], f"c{color % len(LIGHT)}", 5)
    for point, color, label in zip(points, colors, labels):
        if label and finite(*point):
            chart.dots([point], f"c{color % len(LIGHT)}", 12)
            chart.text(chart.x(point[0]) + 9, chart.y(point[1]) + 4.5, label, color="label")
    return chart.svg()
