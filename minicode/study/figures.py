"""Charts as SVG, in plain Python: bars and scatter, each of which returns a string.

Every chart takes `title`, which screen readers read, and the labels of its axes, `x` and `y`.
Values that are None, NaN or infinite are left out. An axis of numbers always shows 0.
"""

import math
from html import escape
from pathlib import Path

STYLE = Path(__file__).with_name("figures.css").read_text()
WIDTH = 480  # of a chart, in pixels
LETTER = 7  # the width of one, on average


class Drawing:
    """A sheet of so many pixels, on which texts and shapes are put.

    Colours are the names of figures.css, which follow the reader's light or dark theme.
    """

    def __init__(self, title, width, height):
        self.title = escape(title)
        self.size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
        self.parts = []

    def text(self, x, y, text, anchor="start", color=""):
        """Text that starts at a point; its middle is there, or its end, by the anchor."""
        if text:
            place = f'class="{color}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
            self.parts.append(f"<text {place}>{escape(text)}</text>")

    def shape(self, d, color="ink", width=1, fill="none", dash="none", note=""):
        """A path in SVG's notation, drawn with a pen of that width, or filled."""
        pen = f'stroke-width="{width}" stroke-dasharray="{dash}" stroke-linecap="round"'
        look = f'class="{color}" fill="{fill}" stroke="currentColor" {pen}'
        tip = f"<title>{escape(note)}</title>" if note else ""
        self.parts.append(f'<path {look} d="{d}">{tip}</path>')

    def svg(self):
        """The sheet as the text of a file, or of an element of a page."""
        about = f'class="chart" role="img" aria-label="{self.title}" {self.size}'
        head = f"<title>{self.title}</title><style>{STYLE}</style>"
        body = "".join(self.parts)
        return f'<svg xmlns="http://www.w3.org/2000/svg" {about}>{head}{body}</svg>'


def finite(*values):
    """Whether all of them are there, and numbers."""
    return all(value is not None and math.isfinite(value) for value in values)


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
    """An axis of names, at 0, 1, 2 ..., or of numbers; axis(value) is in pixels.

    ticks   {where it stands: what stands there}
    """

    def __init__(self, values, start, end):
        self.named = bool(values) and isinstance(values[0], str)
        if self.named:  # from the top down
            start, end = end, start
            self.ticks = dict(enumerate(values))
            self.low = -0.5
            self.high = len(values) - 0.5
        else:
            numbers = ticks([value for value in values if finite(value)])
            self.ticks = {number: f"{number:,.10g}" for number in numbers}
            self.low = numbers[0]
            self.high = numbers[-1]
        self.start = start
        self.scale = (end - start) / (self.high - self.low)  # pixels

    def __call__(self, value):
        return self.start + self.scale * (value - self.low)


class Chart(Drawing):
    """The frame of a chart. xs: the numbers that an axis has to show; ys: numbers, or names."""

    def __init__(self, xs, ys, legend=(), height=300, title="", x="", y=""):
        super().__init__(title, WIDTH, height)
        # from the top: the legend, a line for each name, and what the y axis shows
        top = 10
        for i, name in enumerate(legend):
            self.shape(f"M0 {top - 6}h11v11h-11z", f"c{i % 6}", 0, "currentColor")
            self.text(17, top + 4, name)
            top += 20
        self.text(0, top + 6, y)
        top += 20 if y else 4
        # the axes, with what stands left of the one and below the other
        bottom = height - 46
        self.y = Axis(ys, bottom, top)
        left = 12 + LETTER * max(map(len, self.y.ticks.values()))
        self.x = Axis(xs, left, WIDTH - 20)
        self.text((left + WIDTH) / 2, height - 8, x, "middle")
        # a line of the grid for each number, and its text
        for value, text in self.x.ticks.items():
            self.path([(value, self.y.low), (value, self.y.high)], "grid")
            self.text(self.x(value), bottom + 18, text, "middle")
        for value, text in self.y.ticks.items():
            if not self.y.named:
                self.path([(self.x.low, value), (self.x.high, value)], "grid")
            self.text(left - 7, self.y(value) + 4.5, text, "end")

    def path(self, points, color="ink", width=1, pen="L", **look):
        """A line through the points that are finite; or, with the pen "M", a dot at each."""
        places = [f"{self.x(x):.1f},{self.y(y):.1f}h0" for x, y in points if finite(x, y)]
        if places:
            self.shape("M" + pen.join(places), color, width, **look)

    def bar(self, middle, half, value, error, color, name):
        """A bar from 0 to a value, and its error bar if it has one; pointed at, it says both."""
        above = middle - half
        below = middle + half
        box = [(0, above), (value, above), (value, below), (0, below)]
        note = f"{name}: {value:.4g}"
        if finite(error):
            note += f" ± {error:.2g}"
        self.path(box, color, 0, fill="currentColor", note=note)
        if finite(error):
            self.path([(value - error, middle), (value + error, middle)], width=1.5)


def bars(groups, series, errors=None, cover=(), **labels):
    """Bars one below the other: series {name: a value for each group}.

    errors   {name: a number for each group}, half the lengths of the error bars
    cover    numbers that the axis has to reach
    """
    reached = [*cover]
    for values in series.values():
        reached += values
    n = max(1, len(series))
    height = 80 + len(groups) * (12 + 13 * n)
    chart = Chart(reached, groups, series, height, **labels)
    for i, (name, values) in enumerate(series.items()):
        half = errors[name] if errors else [None] * len(values)
        for j, (value, error) in enumerate(zip(values, half)):
            # the bars of a group share eight tenths of its place
            middle = j + 0.8 * ((i + 0.5) / n - 0.5)
            if finite(value):
                chart.bar(middle, 0.36 / n, value, error, f"c{i % 6}", f"{groups[j]}, {name}")
    return chart.svg()


def scatter(points, colors=None, labels=None, diagonal=False, cover=(), **axes):
    """Dots at points.

    points     [(x, y), ...]
    colors     of each 0, 1, 2 ...
    labels     of each a name, or ""; one with a name is larger than the others
    diagonal   draws the line on which x = y
    cover      numbers that both axes have to reach
    """
    colors = colors or [0] * len(points)
    labels = labels or [""] * len(points)
    xs = [*cover, *(point[0] for point in points)]
    ys = [*cover, *(point[1] for point in points)]
    chart = Chart(xs, ys, height=400, **axes)
    if diagonal:
        end = min(chart.x.high, chart.y.high)
        chart.path([(0, 0), (end, end)], dash="4 3")
    for color in set(colors):
        of_color = [point for point, other in zip(points, colors) if other == color]
        chart.path(of_color, f"c{color % 6}", 5, "M")
    for point, color, label in zip(points, colors, labels):
        if label and finite(*point):
            x, y = point
            chart.path([point], f"c{color % 6}", 12)
            chart.text(chart.x(x), chart.y(y) - 9, label, "end", "label")
    return chart.svg()
