"""Charts as SVG, in plain Python: bars, lines and scatter, each of which returns a string, for a page or for a file.

The colours can be told apart by the colour-blind (after Okabe and Ito), and follow the reader's light or dark theme.
A value that is None, NaN or infinite is left out. Every chart takes `title` (for screen readers), the axes' labels `x`
and `y`, `height` in pixels, and `cover`: numbers that the axis of values has to reach, whatever the data.
"""

import math
from html import escape

LIGHT = ("#0072b2", "#d55e00", "#009e73", "#b0508a", "#8a6d00", "#6f6f6f")
DARK = ("#56b4e9", "#f08a4b", "#2cc295", "#e39bc6", "#dcbf4a", "#a8a8a8")
STYLE = (
    ".chart{font:13px system-ui,-apple-system,'Segoe UI',sans-serif;color:#57606a}"
    ".chart text{fill:currentColor}.chart .grid{color:#d9dee3}%s"
    "@media(prefers-color-scheme:dark){.chart{color:#a3adb8}.chart .grid{color:#343b43}%s}"
) % tuple("".join(f".chart .c{i}{{color:{color}}}" for i, color in enumerate(colors)) for colors in (LIGHT, DARK))
WIDTH, LETTER = 480, 7  # of a chart, and of a letter on average, in pixels


def finite(value):
    return value is not None and math.isfinite(value)


def ticks(values):
    """Round numbers, evenly spaced, that cover those of the values that are finite."""
    values = [v for v in values if finite(v)]
    low, high = min(values, default=0), max(values, default=0)
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # a single value: from 0 to it
        low, high = min(low, 0), max(high, 0) or float(low == 0)
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (m * step) <= 6)
    step = max(1, step) if all(isinstance(v, int) for v in values) else step
    first, last = math.floor(round(low / step, 9)), math.ceil(round(high / step, 9))
    return [i * step for i in range(first, last + 1)]


class Chart:
    """The frame of a chart. Each axis is a list of names, at 0, 1, 2 ..., or of numbers that it has to cover.

    x(value) and y(value) are in pixels; draw() adds a path in them, and svg() is the whole.
    """

    def __init__(self, title, x, y, x_label, y_label, legend, height, reference=None):
        """reference: (value, label) of a line across, on the axis that is one of numbers."""
        self.title, self.height, self.parts = title, height, []
        across = bool(y) and isinstance(y[0], str)  # the reference is upright
        entries, left, top = [], 0, 16
        for i, name in enumerate(legend):
            width = 30 + LETTER * len(name)
            left, top = (0, top + 20) if left and left + width > WIDTH else (left, top)
            entries.append((i % len(LIGHT), name, left, top))
            left += width
        self.top = (top + 8 if legend else 8) + (20 if y_label or across and reference else 0)
        self.bottom = height - (46 if x_label else 26)
        self.y_ticks, self.y = axis(y, *((self.top, self.bottom) if across else (self.bottom, self.top)))
        self.left = 12 + LETTER * max(len(text) for _, text in self.y_ticks)
        self.right = WIDTH - (14 + LETTER * len(reference[1]) if reference and not across else 20)
        self.x_ticks, self.x = axis(x, self.left, self.right)
        for value, text in self.x_ticks:
            if not x or not isinstance(x[0], str):
                self.draw(f"M{self.x(value):.1f} {self.top}V{self.bottom}", "grid")
            self.text(self.x(value), self.bottom + 18, text, "middle")
        for value, text in self.y_ticks:
            if not across:
                self.draw(f"M{self.left} {self.y(value):.1f}H{self.right}", "grid")
            self.text(self.left - 7, self.y(value) + 4.5, text, "end")
        self.text((self.left + self.right) / 2, height - 8, x_label, "middle")
        self.text(0, self.top - 12, y_label)
        for color, name, left, top in entries:
            self.draw(f"M{left} {top - 10}h11v11h-11z", f"c{color}", fill="currentColor", stroke="none")
            self.text(left + 16, top, name)
        if reference:
            value, label = reference
            line = f"M{self.x(value):.1f} {self.top}V{self.bottom}" if across else f"M{self.left} {self.y(value):.1f}H{self.right}"
            self.draw(line, stroke_dasharray="4 3")
            self.text(*((self.x(value), self.top - 6, label, "middle") if across else (self.right + 6, self.y(value) + 4.5, label)))

    def draw(self, path, color="", title="", **style):
        style = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in {"fill": "none", "stroke": "currentColor", **style}.items())
        self.parts.append(f'<path class="{color}" d="{path}"{style}>' + (f"<title>{escape(title)}</title>" if title else "") + "</path>")

    def text(self, x, y, text, anchor="start"):
        if text:
            self.parts.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>')

    def dots(self, points, color, size):
        """A path of dots at those of the points that are finite."""
        places = "".join(f"M{self.x(x):.1f} {self.y(y):.1f}h0" for x, y in points if finite(x) and finite(y))
        self.draw(places, color, stroke_width=size, stroke_linecap="round", stroke_opacity=0.8)

    def svg(self):
        title, size = escape(self.title), f'width="{WIDTH}" height="{self.height}" viewBox="0 0 {WIDTH} {self.height}"'
        head = f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" {size} role="img" aria-label="{title}"><title>{title}</title>'
        return f"{head}<style>{STYLE}</style>{''.join(self.parts)}</svg>"


def axis(values, start, end):
    """Ticks (value, text) of an axis, and the function from its values to pixels, from start to end."""
    if values and isinstance(values[0], str):
        named, low, high = list(enumerate(values)), -0.5, len(values) - 0.5
    else:
        named = [(value, f"{value:,.10g}") for value in ticks(values)]
        low, high = named[0][0], named[-1][0]
    return named, lambda value: start + (value - low) / (high - low) * (end - start)


def bars(groups, series, values, errors=None, *, title="", x="", y="", reference=None, horizontal=False, height=None, cover=()):
    """Grouped bars: values[i][j] of series i in the group j, and half the length of their error bars, if there are any."""
    errors, numbers, n = errors or [[0] * len(groups)] * len(series), [0, *cover], max(1, len(series))
    for value, error in ((v, e if finite(e) else 0) for vs, es in zip(values, errors) for v, e in zip(vs, es) if finite(v)):
        numbers += [value - error, value + error]
    numbers += reference[:1] if reference else ()
    height, legend = height or (90 + len(groups) * (12 + 13 * n) if horizontal else 300), series if n > 1 else ()
    chart = Chart(title, *((numbers, groups) if horizontal else (groups, numbers)), x, y, legend, height, reference)
    across, along = (chart.y, chart.x) if horizontal else (chart.x, chart.y)
    move, over, on = ("M{1:.1f} {0:.1f}", "V{:.1f}", "H{:.1f}") if horizontal else ("M{0:.1f} {1:.1f}", "H{:.1f}", "V{:.1f}")
    for i, name in enumerate(series):
        for j, group in enumerate(groups):
            value, error, middle = values[i][j], errors[i][j], j + 0.8 * ((i + 0.5) / n - 0.5)
            if not finite(value):
                continue
            side, other, zero = across(middle - 0.36 / n), across(middle + 0.36 / n), along(0)
            box = move.format(side, zero) + on.format(along(value)) + over.format(other) + on.format(zero) + "z"
            note = f"{group}, {name}: {value:.4g}" + (f" ± {error:.2g}" if finite(error) and error else "")
            chart.draw(box, f"c{i % len(LIGHT)}", note, fill="currentColor", stroke="none")
            if finite(error) and error:
                ends = move.format(across(middle), along(value - error)) + on.format(along(value + error))
                chart.draw(ends, stroke_width=1.5)
    return chart.svg()


def lines(series, *, title="", x="", y="", reference=None, height=300, cover=()):
    """series: {name: (xs, ys)}, a line each, broken where a value is missing; dots where there are few."""
    numbers = [*cover, *(reference[:1] if reference else ()), *(v for _, ys in series.values() for v in ys)]
    legend = series if len(series) > 1 else ()
    chart = Chart(title, [v for xs, _ in series.values() for v in xs], numbers, x, y, legend, height, reference)
    for i, points in enumerate([list(zip(*line)) for line in series.values()]):
        path, step = "", "M"
        for a, b in points:
            whole = finite(a) and finite(b)
            path, step = (path + f"{step}{chart.x(a):.1f} {chart.y(b):.1f}", "L") if whole else (path, "M")
        chart.draw(path, f"c{i % len(LIGHT)}", stroke_width=2, stroke_linejoin="round")
        chart.dots(points if len(points) <= 40 else (), f"c{i % len(LIGHT)}", 7)
    return chart.svg()


def scatter(points, colors=None, names=(), labels=None, *, title="", x="", y="", diagonal=False, height=380, cover=()):
    """Points (x, y), of the colours 0, 1, 2 ..., which have names; a point with a label is a larger one."""
    colors, labels = colors or [0] * len(points), labels or [""] * len(points)
    chart = Chart(title, [*cover, *(a for a, _ in points)], [*cover, *(b for _, b in points)], x, y, names, height)
    if diagonal:
        low, high = (pick(a[i][0] for a in (chart.x_ticks, chart.y_ticks)) for pick, i in ((max, 0), (min, -1)))
        chart.draw(f"M{chart.x(low):.1f} {chart.y(low):.1f}L{chart.x(high):.1f} {chart.y(high):.1f}", stroke_dasharray="4 3")
    for color in sorted(set(colors)):
        chart.dots([p for p, c, label in zip(points, colors, labels) if c == color and not label], f"c{color % len(LIGHT)}", 5)
    for (a, b), color, label in zip(points, colors, labels):
        if label and finite(a) and finite(b):
            chart.dots([(a, b)], f"c{color % len(LIGHT)}", 11)
            chart.text(chart.x(a) + 9, chart.y(b) + 4.5, label)
    return chart.svg()
