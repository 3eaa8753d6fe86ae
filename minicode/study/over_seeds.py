"""Runs over several seeds: trained unless they were, and their figures as tables and charts."""

from collections import defaultdict

import numpy as np

from minicode.runtime.files import write
from minicode.runtime.runs import load_run
from minicode.study.figures import lines


def trained(train, folder, flags):
    """The run in a folder, which the command `train` trains there, or trains on, unless it was."""
    again = "--resume" if (folder / "config.json").exists() else "--overwrite"
    status = train(["--out", str(folder), again, *flags])
    if status:
        raise SystemExit(status)
    return load_run(folder)


def table(corner, columns, rows):
    """Markdown: the names of columns; rows {name: cells}."""
    head = [line([corner, *columns]), "|---" * (1 + len(columns)) + "|"]
    return "\n".join(head + [line([name, *cells]) for name, cells in rows.items()])


def line(cells):
    return f"| {' | '.join(cells)} |".replace("_", " ")


def cells(results, names):
    """The figures of these names in the results of each seed: mean, lowest and highest."""
    return [cell([figures[name] for figures in results if name in figures]) for name in names]


def cell(values):
    if not values:
        return "-"
    mean = f"{np.mean(values):.3f}"
    return f"{mean} ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else mean


def draw(results, folder):
    """Charts of results {(method, k): [figures, ...]}, a line for each method that has a k."""
    errors = defaultdict(list)  # of each method: (k, error), (error, share of states)
    readable = defaultdict(list)
    for (method, k), found in results.items():
        if k and method != "random codes":  # which are off the chart
            error = np.mean([figures["error"] for figures in found])
            share = np.mean([figures["trigram_at_95"] for figures in found])
            errors[method].append((k, error))
            readable[method].append((error, share))
    folder.mkdir(parents=True, exist_ok=True)
    text = {"title": "Error by features chosen", "x": "k, features chosen at a site", "y": "error"}
    write(folder / "error.svg", lines(errors, **text))
    text = {"title": "Readable and exact", "x": "error", "y": "states and digits with a feature"}
    write(folder / "readable.svg", lines(readable, **text))
