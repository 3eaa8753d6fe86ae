"""python -m minicode.ablate: every idea that we tried on TokFSM, trained and measured over three seeds, as one table.

An idea is the default with some flags, or with a few lines of it replaced. Half as many steps as the default, so that
the whole takes 70 minutes on one core; stopped, it goes on with the run it was at.
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
from minicode.study.ideas import IDEAS
from minicode.study.machine import control, copy_codes, pairs
from minicode.train_fsm import main as train_fsm

# -- ideas that are no flags: each replaces one method of Codebook


COLUMNS = ("loss", "transition_accuracy", "dead_code_fraction", "control_mlp")


def train(idea, folder, steps, seed):
    """Trains an idea in a folder, unless it was; returns its figures, control by all MLPs among them."""
    change, path = IDEAS[idea], folder / "ablation.json"
    if not path.exists() or json.loads(path.read_text())["step"] != steps:
        flags = f"--steps {steps} --eval-every {max(1, steps // 20)} --seed {seed}".split()
        flags += change.split() if isinstance(change, str) else []
        again = ["--overwrite"] if (folder / "config.json").exists() else []
        with mock.patch.multiple(Codebook, **change) if isinstance(change, dict) else nullcontext():
            if status := train_fsm(["--out", str(folder), *flags, *again]):
                raise SystemExit(status)
            run = load_run(folder)
            mlps = [site for site in run.model.codebooks() if site.startswith("mlp.")]
            (a, b), generator = pairs(run.fsm), torch.Generator().manual_seed(0)
            forced = control(
                run.fsm, run.model, run.fsm.runs(a), b, copy_codes(run.model, mlps), generator
            )
            write(path, json.dumps({**run.summary, "control_mlp": forced["control"]}))
    return json.loads(path.read_text())


def main(argv=None):
    parser = Parser("ablate", __doc__)
    parser.add_argument(
        "ideas", nargs="*", metavar="IDEA", help=f"which (default: all): {', '.join(IDEAS)}"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/ablate"),
        help="folder of the runs (default: runs/ablate)",
    )
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each (default: 3)")
    parser.add_argument("--steps", type=int, default=2000, help="training steps (default: 2000)")
    args = parser.parse_args(argv)
    if unknown := [idea for idea in args.ideas if idea not in IDEAS]:
        parser.error(f"there is no idea {unknown[0]!r}; there are: {', '.join(IDEAS)}")
    if min(args.seeds, args.steps) < 1:
        parser.error("--seeds and --steps must be at least 1")
    lines = [
        "| idea | loss | transition accuracy | dead codes | control, MLPs |",
        "|---|---|---|---|---|",
    ]
    for idea in args.ideas or IDEAS:
        rows = [
            train(idea, args.out / f"{idea.replace(' ', '-')}-{seed}", args.steps, seed)
            for seed in range(args.seeds)
        ]
        values = [[row[name] for row in rows] for name in COLUMNS]
        cells = (f"{np.mean(v):.3f} ({min(v):.3f} to {max(v):.3f})" for v in values)
        flags = f" `{IDEAS[idea]}`" if isinstance(IDEAS[idea], str) and IDEAS[idea] else ""
        lines.append(f"| {idea}{flags} | {' | '.join(cells)} |")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
