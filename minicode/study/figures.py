"""Charts as SVG, in plain Python: bars and scatter, each of which returns a string.

Every chart takes `title`, which screen readers read, and the labels of its axes. An axis of
numbers always shows 0.
"""

import math
from html import escape
from itertools import zip_longest
from pathlib import Path

STYLE = Path(__file__).with_name("figures.css").read_text(encoding="utf-8")
WIDTH = 480  # of a chart, in pixels
LETTER = 7  # the width of one, on average


class Drawing:
    """A sheet of so many pixels, on which texts and shapes are put.

    A look is one of the names in figures.css, or several: colours follow the reader's light or
    dark theme.
    """

    def __init__(self, title, width, height):
        self.title = escape(title)
        self.size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
        self.parts = []

    def text(self, x, y, text, anchor="start", look=""):
        if text:
            place = f'class="{look}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
            self.parts.append(f"<text {place}>{escape(text)}</text>")

    def shape(self, d, look="ink", width=1, note=""):
        """A path in SVG's notation, drawn with a pen of that width; the mouse shows the note."""
        tip = f"<title>{escape(note)}</title>" if note else ""
        self.parts.append(f'<path class="{look}" stroke-width="{width}" d="{d}">{tip}</path>')

    def svg(self):
        about = f'class="chart" role="img" aria-label="{self.title}" {self.size}'
        head = f"<title>{self.title}</title><style>{STYLE}</style>"
        body = "".join(self.parts)
        return f'<svg xmlns="http://www.w3.org/2000/svg" {about}>{head}{body}</svg>'


def ticks(values):
    """Round numbers, evenly spaced, that cover 0 and the values, but for a tenth of a step."""
    low = min([0, *values])
    high = max([0, *values])
    if low == high:
        high = 1
    power = 10 ** math.floor(math.log10((high - low) / 4))
    step = next(m * power for m in (1, 2, 5, 10) if (high - low) / (m * power) <= 6)
    first = math.floor(low / step + 0.1)
    last = math.ceil(high / step - 0.1)
    return [i * step for i in range(first, last + 1)]


class Axis:
    """An axis that shows such numbers; axis(value) is in pixels."""

    def __init__(self, values, start, end):
        self.start = start
        self.end = end
        self.ticks = {number: f"{number:,.10g}" for number in ticks(values)}
        self.low = min(self.ticks)
        self.high = max(self.ticks)

    def __call__(self, value):
        share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)


def frame(xs, left, top, bottom, title="", x=""):
    """What all charts have: a Drawing, and the Axis below what is drawn on it."""
    chart = Drawing(title, WIDTH, bottom + 46)
    axis = Axis(xs, left, WIDTH - 20)
    for value, text in axis.ticks.items():
        chart.shape(f"M{axis(value):.1f} {top}V{bottom}", "grid")
        chart.text(axis(value), bottom + 18, text, "middle")
    chart.text((left + WIDTH) / 2, bottom + 38, x, "middle")
    return chart, axis


def bars(groups, series, errors=None, **labels):
    """Bars one below the other: series {name: a value for each group}.

    errors   {name: a number for each group}, half the lengths of the error bars
    """
    top = 20 * len(series) + 14  # below the legend
    row = 13 * len(series) + 12  # of a group
    left = 12 + LETTER * max(map(len, groups), default=0)
    chart, x = frame(sum(series.values(), []), left, top, top + row * len(groups), **labels)
    for j, group in enumerate(groups):
        chart.text(left - 7, top + row * (j + 0.5) + 4.5, group, "end")
    for i, (name, values) in enumerate(series.items()):
        look = f"c{i % 6} flat"
        chart.shape(f"M0 {20 * i + 10}h11", look, 11)
        chart.text(17, 20 * i + 14, name)
        for j, value in enumerate(values):
            y = top + row * j + 13 * i + 12.5
            note = f"{groups[j]}, {name}: {value:.4g}"
            chart.shape(f"M{x(0):.1f} {y}H{x(value):.1f}", look, 12, note)
            if errors:
                error = errors[name][j]
                line = f"M{x(value - error):.1f} {y}H{x(value + error):.1f}"
                chart.shape(line, width=1.5, note=f"± {error:.2g}")
    return chart.svg()


def plane(points, top, y="", **axes):
    """What charts of points (x, y) have: a Drawing, and the Axis across and up."""
    left, bottom = 54, top + 324
    chart, across = frame([point[0] for point in points], left, top, bottom, **axes)
    up = Axis([point[1] for point in points], bottom, top)
    for value, text in up.ticks.items():
        chart.shape(f"M{left} {up(value):.1f}H{across.end}", "grid")
        chart.text(left - 7, up(value) + 4.5, text, "end")
    chart.text(0, top - 14, y)
    return chart, across, up


def scatter(points, colors=(), labels=(), diagonal=False, **axes):
    """Points (x, y) in the colours 0, 1, 2 ...; one with a label is larger than those without.

    diagonal   draws the line on which x = y
    """
    chart, across, up = plane(points, 30, **axes)
    if diagonal:
        end = min(across.high, up.high)
        line = f"M{across(0):.1f} {up(0):.1f}L{across(end):.1f} {up(end):.1f}"
        chart.shape(line, "ink dashed")
    for point, color, label in zip_longest(points, colors, labels):
        place = f"{across(point[0]):.1f} {up(point[1]):.1f}"
        chart.shape(f"M{place}h0", f"c{(color or 0) % 6}", 12 if label else 5, label)
        chart.text(across(point[0]), up(point[1]) - 9, label, "end", "label")
    return chart.svg()


def lines(series, **axes):
    """A line through points for each of series {name: [(x, y), ...]}."""
    points = sum(series.values(), [])
    chart, across, up = plane(points, 20 * len(series) + 30, **axes)
    for i, (name, line) in enumerate(series.items()):
        look = f"c{i % 6}"
        chart.shape(f"M0 {20 * i + 10}h11", f"{look} flat", 11)
        chart.text(17, 20 * i + 14, name)
        places = [f"{across(x):.1f} {up(value):.1f}" for x, value in line]
        chart.shape("M" + "L".join(places), look, 2)
        for place, (x, value) in zip(places, line):
            chart.shape(f"M{place}h0", look, 7, f"{name}: {x:.4g}, {value:.4g}")
    return chart.svg()
