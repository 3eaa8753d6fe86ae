"""python -m minicode.ablate [TABLE]: runs over three seeds, as one table.

results   the default, and what its codes stand for and do; language: the same on stories, or --data
fsm       what we tried, on TokFSM (the default); text: how k codes are chosen and started
differs   what differs from the paper, one thing at a time; paper: its Table 1

A row is a default with some flags, or with a few lines of it replaced. Stopped, it goes on with the
run it was at.
"""

import json
import re
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import torch

from minicode.codebook import Codebook
from minicode.interpret import main as interpret
from minicode.runtime.files import write
from minicode.runtime.options import Parser
from minicode.runtime.runs import load_run
from minicode.runtime.streams import outlive
from minicode.study import tables
from minicode.study.demonstration import controls
from minicode.study.ideas import REPLACED, TABLES
from minicode.train_fsm import main as train_fsm
from minicode.train_text import main as train_text

COMMANDS = {"train_fsm": train_fsm, "train_text": train_text}


@outlive()
def main(argv=None):
    parser = make_parser()
    args = parser.parse_args(argv)
    table = TABLES[args.table]
    for idea in args.only or []:
        if idea not in table.rows:
            parser.error(f"there is no idea {idea!r}; there are: {', '.join(table.rows)}")
    if not 1 <= args.seeds <= 1000:
        parser.error("--seeds must be from 1 to 1000")
    if args.data and table.command != "train_text":
        parser.error("--data goes with the tables text and language alone")
    steps = table.steps if args.steps is None else args.steps
    lines = head(table)
    of_codes = tables.head(["idea", *table.codes])
    for idea in args.only or table.rows:
        results = []
        for seed in range(args.seeds):
            name = "-".join(re.findall(r"\w+", f"{idea} {seed}"))
            folder = args.out / args.table / name
            flags = f"--steps {steps} --eval-every {max(1, steps // 20)} --seed {seed}"
            flags = f"{flags} {table.rows[idea]}".split()
            if args.data:
                flags += ["--data", args.data]
            results.append(result(table, idea, folder, flags))
        lines.append(row(table, idea, results))
        cells = [tables.cell(results, name) for name in table.codes]
        of_codes.append(tables.line([idea, *cells]))
    print("\n".join(lines + (of_codes if table.codes else [])))


def make_parser():
    parser = Parser("ablate", __doc__)
    flag = parser.add_argument
    about = "; ".join(f"{name}: {table.about}" for name, table in TABLES.items())
    flag("table", nargs="?", choices=TABLES, default="fsm", metavar="TABLE", help=about)
    flag("--only", nargs="+", metavar="IDEA", help="these rows (default: all)")
    flag("--data", metavar="FILE", help="of the table text: your own (default: stories)")
    out = Path("runs/ablate")
    flag("--out", type=Path, default=out, help="folder of the runs (default: %(default)s)")
    flag("--seeds", type=int, default=3, help="seeds of each (default: 3)")
    flag("--steps", type=int, help="training steps (default: the table's)")
    return parser


def head(table):
    """The first lines of a table."""
    theirs = ["the paper's"] if table.theirs else []
    return tables.head(["idea", *table.columns, *theirs])


def row(table, idea, results):
    """A row of the table: mean, lowest and highest of each figure."""
    flags = table.rows[idea]
    cells = [f"{idea} `{flags}`" if flags else idea]
    cells += [tables.cell(results, name) for name in table.columns]
    if table.theirs:
        cells.append(table.theirs.get(idea, "-"))
    return tables.line(cells)


def result(table, idea, folder, flags):
    """The figures of an idea, which is trained in this folder unless it was."""
    path = folder / "ablation.json"
    if path.exists():
        figures = json.loads(path.read_bytes())
        if figures["flags"] == flags:
            return figures
    methods = REPLACED.get(idea)
    with mock.patch.multiple(Codebook, **methods) if methods else nullcontext():
        status = COMMANDS[table.command](["--out", str(folder), "--overwrite", *flags])
        if status:
            raise SystemExit(status)
        run = load_run(folder)
        figures = {"flags": flags, **run.summary}
        if "control_mlp" in table.columns:
            figures |= controls(run, torch.Generator(), seed=0)
    if table.codes and "sites" in run.summary:
        interpret(["--run", str(folder)])
        figures |= flat(json.loads((folder / "interpret.json").read_bytes()))
    write(path, json.dumps(figures))
    return figures


def flat(figures, before=""):
    """Figures {"control": {"all": {"first": 1.0}}} as {"control_all_first": 1.0}."""
    found = {}
    for name, value in figures.items():
        if isinstance(value, list):
            value = dict(enumerate(value))
        if isinstance(value, dict):
            found |= flat(value, f"{before}{name}_")
        else:
            found[f"{before}{name}"] = value
    return found


if __name__ == "__main__":
    main()
