"""Runs over several seeds: trained unless they were, and their figures as tables and charts."""

import re
import sys
from collections import defaultdict

import numpy as np

from minicode.runtime.files import write
from minicode.runtime.runs import load_run
from minicode.study.demonstration import note_unlearnt
from minicode.study.figures import lines


def trained(train, folder, flags):
    """The run in a folder, which the command `train` trains there, or trains on, unless it was."""
    if (folder.parent / "config.json").exists():
        raise ValueError(f"{folder.parent} is the folder of a run: runs over seeds want another")
    again = ["--resume"] if (folder / "config.json").exists() else []
    status = train([*flags, "--out", str(folder), *again])
    if status == 130:
        print("(or this command, as it is, goes on with it)", file=sys.stderr)
    if status:
        raise SystemExit(status)
    run = load_run(folder)
    note_unlearnt(run)
    return run


def file_name(text):
    """The words of a text, joined by hyphens."""
    return "-".join(re.findall(r"\w+", text))


def table(corner, columns, rows):
    """Markdown, a blank line behind it: the names of columns; rows {name: cells}."""
    grid = [[corner, *columns], ["---"] * (1 + len(columns))]
    grid += [[name, *cells] for name, cells in rows.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in grid).replace("_", " ") + "\n"


def cells(results, names):
    """The figures of these names in the results of each seed: mean, lowest and highest."""
    return [cell([figures[name] for figures in results if name in figures]) for name in names]


def cell(values):
    if not values:
        return "-"
    mean, lowest, highest = map(number, (np.mean(values), min(values), max(values)))
    return f"{mean} ({lowest} to {highest})" if len(values) > 1 else mean


def number(value):
    return f"{value:.3f}" if abs(value) < 1000 else f"{value:,.0f}"


def flat(figures, before=""):
    """Figures {"control": {"all": {"first": 1.0}}} as {"control all first": 1.0}.

    Without those of single codes and sites, and what is no number.
    """
    found = {}
    for name, value in figures.items():
        if name in ("codes", "best_codes", "topics", "sites", "usage"):
            continue
        if isinstance(value, list):
            value = dict(enumerate(value))
        name = f"{before}{name}"
        if isinstance(value, dict):
            found |= flat(value, f"{name} ")
        elif isinstance(value, (int, float)):
            found[name] = value
    return found


def questions(results):
    """What was asked of runs besides their training: results {idea: answers of each seed}."""
    of_seeds = [one for seeds in results.values() for one in seeds]
    every = dict.fromkeys(question for one in of_seeds for question in one)
    return [question for question in every if question != "training"]


def table_of(question, results):
    """The answers as a table: a row for each figure, a column for each idea."""
    columns = {}
    for idea, seeds in results.items():
        columns[idea] = [one[question] for one in seeds if question in one]
    names = dict.fromkeys(name for seeds in columns.values() for one in seeds for name in one)
    rows = {}
    for name in names:
        rows[name] = [cells(seeds, [name])[0] for seeds in columns.values()]
    return table(f"`interpret {question}`", columns, rows)


def draw(results, folder):
    """Charts of results {(method, k): [figures, ...]}, a line for each method that has a k."""
    errors = defaultdict(list)  # of each method: (k, error), (error, share of states)
    readable = defaultdict(list)
    for (method, k), found in results.items():
        if k and method != "random codes":  # which are off the charts
            error = np.mean([figures["error"] for figures in found])
            share = np.mean([figures["trigram_at_95"] for figures in found])
            if error < 1:  # with more, nothing at all is better
                errors[method].append((k, error))
                readable[method].append((error, share))
    folder.mkdir(parents=True, exist_ok=True)
    text = {"title": "Error by features chosen", "x": "k, features chosen at a site", "y": "error"}
    write(folder / "error.svg", lines(errors, **text))
    text = {"title": "Readable and exact", "x": "error", "y": "states and digits with a feature"}
    write(folder / "readable.svg", lines(readable, **text))
