"""python -m minicode.ablate [TABLE]: runs over three seeds, as tables.

results   the default, and what its codes stand for and do; language: the same on stories, or --data
fsm       what we tried, on TokFSM (the default); text: how k codes are chosen and started
paper     the paper's Table 1

A row is a default with some flags, or with a few lines of it replaced. Of the codes of results and
language there are further tables: what `minicode.interpret` answers, and how they agree with those
of seed 0. Stopped, it goes on with the training, or the question, that it was at.
"""

import json
import shlex
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import torch

from minicode.codebook import Codebook
from minicode.interpret import main as interpret
from minicode.interpret import make_parser as interpreter
from minicode.runtime.arguments import check_range
from minicode.runtime.files import read_json, write
from minicode.runtime.options import Parser
from minicode.runtime.streams import outlive
from minicode.study.demonstration import controls
from minicode.study.ideas import REPLACED, TABLES
from minicode.study.over_seeds import cells, file_name, flat, questions, table, table_of, trained
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
            results[idea] = [answers(args, asked, idea, seed) for seed in range(args.seeds)]
    rows = {}
    for idea in ideas:
        flags = asked.rows[idea]
        title = f"{idea} `{flags}`" if flags else idea
        rows[title] = cells([one["training"] for one in results[idea]], asked.columns)
        if idea in asked.theirs:
            rows[f"{idea}: the paper's"] = cells([asked.theirs[idea]], asked.columns)
    print(table("idea", asked.columns, rows))
    for question in questions(results):
        print(table_of(question, results))


def check(args, asked):
    """ValueError for flags that don't go together."""
    for idea in args.only or []:
        if idea not in asked.rows:
            raise ValueError(f"there is no idea {idea!r}; there are: {', '.join(asked.rows)}")
    check_range("--seeds", args.seeds, least=1, below=1001)
    if args.data and asked.command != "train_text":
        raise ValueError("--data goes with the tables text and language alone")
    if args.interpret and not asked.interpreted:
        raise ValueError("--interpret goes with the tables results and language alone")
    for question in args.interpret or []:
        interpreter().parse_args(shlex.split(question))


def make_parser():
    parser = Parser("ablate", __doc__)
    flag = parser.add_argument
    about = "; ".join(f"{name}: {table.about}" for name, table in TABLES.items())
    flag("table", nargs="?", choices=TABLES, default="fsm", metavar="TABLE", help=about)
    flag("--only", nargs="+", metavar="IDEA", help="these rows (default: all)")
    flag("--data", metavar="FILE", help="of the tables on text: your own (default: stories)")
    text = "what is asked of each run, in quotes, as often as you like (default: '', every measure)"
    flag("--interpret", action="append", metavar="FLAGS", help=text)
    out = Path("runs/ablate")
    flag("--out", type=Path, default=out, help="folder of the runs (default: %(default)s)")
    flag("--seeds", type=int, default=3, help="seeds of each (default: 3)")
    flag("--steps", type=int, help="training steps (default: the table's)")
    return parser


def answers(args, asked, idea, seed):
    """Figures of an idea by question, "training" the first, kept with its run."""
    run = run_of(args, asked, idea, seed)
    to_ask = ["training"]
    if asked.interpreted and run.config.sites():
        to_ask += args.interpret or [""]
        if seed:
            first = run.folder.with_name(file_name(f"{idea} 0"))
            to_ask.append(f"--compare {shlex.quote(str(first))}")
    path = run.folder / "answers.json"
    known = read_json(path, dict) if path.exists() else {}
    for question in to_ask:
        if question not in known:
            known[question] = flat(answer(run, question, asked))
            write(path, json.dumps(known))
    return {question: known[question] for question in to_ask}


def run_of(args, asked, idea, seed):
    """The run of an idea, trained unless it was."""
    steps = asked.steps if args.steps is None else args.steps
    flags = f"--steps {steps} --eval-every {max(1, steps // 20)} --seed {seed} {asked.rows[idea]}"
    data = ["--data", args.data] if args.data else []
    folder = args.out / args.table / file_name(f"{idea} {seed}")
    methods = REPLACED.get(idea)
    with mock.patch.multiple(Codebook, **methods) if methods else nullcontext():
        return trained(COMMANDS[asked.command], folder, [*flags.split(), *data])


def answer(run, question, asked):
    if question != "training":
        return interpret(["--run", str(run.folder), *shlex.split(question)])
    measured = "control_mlp" in asked.columns
    return run.summary | (controls(run, torch.Generator(), seed=0) if measured else {})


if __name__ == "__main__":
    main()
