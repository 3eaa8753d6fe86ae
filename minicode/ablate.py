"""python -m minicode.ablate: every idea that we tried on TokFSM, over three seeds, as one table.

An idea is the default with some flags, or with a few lines of it replaced. Half as many steps as
the default, so that the whole takes 75 minutes on one core; stopped, it goes on with the run it
was at.
"""

import json
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from minicode.codebook import Codebook
from minicode.runtime.files import write
from minicode.runtime.options import Parser
from minicode.runtime.runs import load_run
from minicode.study.demonstration import controls
from minicode.study.ideas import IDEAS, REPLACED
from minicode.train_fsm import main as train_fsm

COLUMNS = ("loss", "transition_accuracy", "dead_code_fraction", "control_mlp")
HEAD = """\
| idea | loss | transition accuracy | dead codes | control, MLPs |
|---|---|---|---|---|"""


def main(argv=None):
    parser = Parser("ablate", __doc__)
    which = f"which (default: all): {', '.join(IDEAS)}"
    where = "folder of the runs (default: %(default)s)"
    parser.add_argument("ideas", nargs="*", metavar="IDEA", help=which)
    parser.add_argument("--out", type=Path, default=Path("runs/ablate"), help=where)
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each (default: 3)")
    parser.add_argument("--steps", type=int, default=2000, help="training steps (default: 2000)")
    args = parser.parse_args(argv)
    for idea in args.ideas:
        if idea not in IDEAS:
            parser.error(f"there is no idea {idea!r}; there are: {', '.join(IDEAS)}")
    if args.seeds < 1:
        parser.error("--seeds must be at least 1")

    lines = [HEAD]
    for idea in args.ideas or IDEAS:
        results = []
        for seed in range(args.seeds):
            folder = args.out / f"{idea.replace(' ', '-')}-{seed}"
            results.append(result(idea, folder, args.steps, seed))
        lines.append(row(idea, results))
    print("\n".join(lines))


def row(idea, results):
    """A row of the table: mean, lowest and highest of each figure."""
    cells = [f"{idea} `{IDEAS[idea]}`" if IDEAS[idea] else idea]
    for name in COLUMNS:
        values = [result[name] for result in results]
        cells.append(f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})")
    return f"| {' | '.join(cells)} |"


def result(idea, folder, steps, seed):
    """The figures of an idea, which is trained in this folder unless it was."""
    path = folder / "ablation.json"
    if path.exists():
        figures = json.loads(path.read_text())
        if figures["step"] == steps:
            return figures
    flags = f"--steps {steps} --eval-every {max(1, steps // 20)} --seed {seed} {IDEAS[idea]}"
    methods = REPLACED.get(idea)
    with mock.patch.multiple(Codebook, **methods) if methods else nullcontext():
        status = train_fsm(["--out", str(folder), "--overwrite", *flags.split()])
        if status:
            raise SystemExit(status)
        run = load_run(folder)
        steered = controls(run, torch.Generator(), seed=0)
        figures = {**steered, **run.summary}
    write(path, json.dumps(figures))
    return figures


if __name__ == "__main__":
    main()
