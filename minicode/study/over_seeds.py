"""Tables in Markdown and charts, of figures over several seeds."""

from collections import defaultdict

import numpy as np

from minicode.runtime.files import write
from minicode.study.figures import lines

COMPARED = (  # the columns of the tables of minicode.compare
    ("error", "loss", "loss_one", "loss_zero", "recovered", "chosen", "dead", "seconds"),
    ("state_precision", "state_recall", "state_at_95"),
    ("trigram_precision", "trigram_recall", "trigram_at_95"),
    ("control_first", "control_inside", "mean_iou", "chance"),
)


def line(cells):
    return f"| {' | '.join(cells)} |"


def head(names):
    """The first two lines."""
    return [line(name.replace("_", " ") for name in names), "|---" * len(names) + "|"]


def cell(results, name):
    """Mean, lowest and highest of the figures of a name, of those results that have it."""
    values = [figures[name] for figures in results if name in figures]
    if not values:
        return "-"
    return f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def table(columns, rows):
    """Means over seeds, with the lowest and the highest: columns of rows {(method, k): figures}."""
    text = head(["method, k", *columns])
    for (method, k), results in rows.items():
        title = f"{method}, {k}" if k else method
        text.append(line([title, *(cell(results, column) for column in columns)]))
    return "\n".join(text)


def draw(rows, folder):
    """Charts of rows {(method, k): [figures, ...]}, a line for each method that has a k."""
    errors = defaultdict(list)  # of each method: (k, error), (error, share of states)
    readable = defaultdict(list)
    for (method, k), results in rows.items():
        if k and method != "random codes":  # which are off the chart
            error = np.mean([figures["error"] for figures in results])
            share = np.mean([figures["trigram_at_95"] for figures in results])
            errors[method].append((k, error))
            readable[method].append((error, share))
    folder.mkdir(parents=True, exist_ok=True)
    text = {"title": "Error by features chosen", "x": "k, features chosen at a site", "y": "error"}
    write(folder / "error.svg", lines(errors, **text))
    text = {"title": "Readable and exact", "x": "error", "y": "states and digits with a feature"}
    write(folder / "readable.svg", lines(readable, **text))
