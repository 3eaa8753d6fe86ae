"""python -m minicode.ablate [TABLE]: runs over three seeds, as a table.

results   the default, and what its codes stand for and do; language: the same on stories, or --data
fsm       what we tried, on TokFSM (the default); text: how k codes are chosen and started
paper     the paper's Table 1

A row is a default with some flags, or with a few lines of it replaced. Of results and language
there is a second table: what `minicode.interpret` finds in each run, and how its codes agree with
those of seed 0. Stopped, it goes on with the run it was at.
"""

import json
import re
import shlex
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import torch

from minicode.codebook import Codebook
from minicode.interpret import main as interpret
from minicode.runtime.arguments import check_range
from minicode.runtime.files import write
from minicode.runtime.options import Parser
from minicode.runtime.streams import outlive
from minicode.study.demonstration import controls
from minicode.study.ideas import REPLACED, TABLES
from minicode.study.over_seeds import cells, table, trained
from minicode.train_fsm import main as train_fsm
from minicode.train_text import main as train_text

COMMANDS = {"train_fsm": train_fsm, "train_text": train_text}


@outlive()
def main(argv=None):
    parser = make_parser()
    args = parser.parse_args(argv)
    asked = TABLES[args.table]
    with parser.user_errors():
        check(args, asked)
    ideas = args.only or list(asked.rows)
    results = {}
    for idea in ideas:
        results[idea] = [figures(args, asked, idea, seed) for seed in range(args.seeds)]
    rows = {}
    for idea in ideas:
        flags = asked.rows[idea]
        title = f"{idea} `{flags}`" if flags else idea
        rows[title] = cells(results[idea], asked.columns)
        if idea in asked.theirs:
            rows[f"{idea}: the paper's"] = cells([asked.theirs[idea]], asked.columns)
    print(table("idea", asked.columns, rows))
    if asked.codes:
        every = {name: None for idea in ideas for one in results[idea] for name in one}
        found = [name for name in every if re.fullmatch(asked.codes, name)]
        columns = [cells(results[idea], found) for idea in ideas]
        print(table("what its codes do", ideas, dict(zip(found, zip(*columns)))))


def check(args, asked):
    """ValueError for flags that don't go together."""
    for idea in args.only or []:
        if idea not in asked.rows:
            raise ValueError(f"there is no idea {idea!r}; there are: {', '.join(asked.rows)}")
    check_range("--seeds", args.seeds, least=1, below=1001)
    if args.data and asked.command != "train_text":
        raise ValueError("--data goes with the tables text and language alone")
    if args.interpret and not asked.codes:
        raise ValueError("--interpret goes with the tables results and language alone")


def make_parser():
    parser = Parser("ablate", __doc__)
    flag = parser.add_argument
    about = "; ".join(f"{name}: {table.about}" for name, table in TABLES.items())
    flag("table", nargs="?", choices=TABLES, default="fsm", metavar="TABLE", help=about)
    flag("--only", nargs="+", metavar="IDEA", help="these rows (default: all)")
    flag("--data", metavar="FILE", help="of the tables on text: your own (default: stories)")
    text = "in quotes, and as often as you like: what is asked of each run (default: every measure)"
    flag("--interpret", action="append", metavar="FLAGS", help=text)
    out = Path("runs/ablate")
    flag("--out", type=Path, default=out, help="folder of the runs (default: %(default)s)")
    flag("--seeds", type=int, default=3, help="seeds of each (default: 3)")
    flag("--steps", type=int, help="training steps (default: the table's)")
    return parser


def figures(args, asked, idea, seed):
    """The figures of an idea, which is trained in its folder unless it was."""
    folder = args.out / args.table / name(idea, seed)
    steps = asked.steps if args.steps is None else args.steps
    flags = f"--steps {steps} --eval-every {max(1, steps // 20)} --seed {seed} {asked.rows[idea]}"
    flags = flags.split() + (["--data", args.data] if args.data else [])
    questions = []
    if asked.codes:
        questions += args.interpret or [""]
        if seed:
            first = folder.with_name(name(idea, 0))
            questions.append(f"--compare {shlex.quote(str(first))}")
    path = folder / "ablation.json"
    if path.exists():
        known = json.loads(path.read_bytes())
        if known["flags"] == flags and known["questions"] == questions:
            return known
    methods = REPLACED.get(idea)
    with mock.patch.multiple(Codebook, **methods) if methods else nullcontext():
        run = trained(COMMANDS[asked.command], folder, flags)
        found = {"flags": flags, "questions": questions, **run.summary}
        if "control_mlp" in asked.columns:
            found |= controls(run, torch.Generator(), seed=0)
    for question in questions if run.config.sites() else []:
        found |= flat(interpret(["--run", str(folder), *shlex.split(question)]))
    write(path, json.dumps(found))
    return found


def name(idea, seed):
    """Of a run's folder."""
    return "-".join(re.findall(r"\w+", f"{idea} {seed}"))


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
