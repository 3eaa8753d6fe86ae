"""python -m minicode.compare: codebooks beside what else would be used, on TokFSM, as tables.

At the same sites (every head, every MLP), with as many features and the same k; networks and
autoencoders trained on the same tokens. Codebooks are trained into a network; what is judged beside
them reads its dense twin, trained as long, and leaves it as it is.

codebooks         by pursuit, or the k nearest
TopK, AbsTopK, BatchTopK   sparse autoencoders (Gao et al. 2024; Zhu et al. 2025; Bussmann et al. 2024)
k-means           codebooks as they start, and the network not trained with them
random codes      the floor (Korznikov et al. 2026): codebooks of normal numbers
neurons           of the MLPs, and what comes to the sites
mean differences  with labels: activations along the mean of a label's less the mean of all

error           sum |a - q|² / sum |a - mean(a)|² (FVU, sparsify), the mean over sites
loss            cross-entropy a token, in nats, with every site replaced; at one site: with one
                replaced at a time, on average
recovered       (zero - loss) / (zero - dense), where zero is the loss of sites that pass on nothing
                (SAEBench); of codebooks, dense is the twin
chosen, dead    features a token; share of them that never fire on held-out tokens
precision, recall  of the best feature of each state, and of each state and digit after it: that
                and the strength at which it counts as firing, of the highest F1 (design as in the
                paper, section 4.2)
0.95            share of states with a feature of precision and recall of 0.95 or more
control         share of next states that follow b, as the sites have the features of b's run (see
                study/machine.py): at the first state, and inside a sequence
agreement       of a feature with the best of seed 0, by intersection over union of where they fire,
                the mean; and by chance
seconds         of training; of codebooks, of the whole network

Each row is written as it ends. Stopped, the command goes on with the row it was at.
"""

import copy
import json
import re
import time
from functools import cache
from pathlib import Path

import numpy as np
import torch

from minicode.runtime.files import read_tensors, write, write_tensors
from minicode.runtime.options import Parser
from minicode.runtime.runs import load_run
from minicode.runtime.streams import outlive
from minicode.study.features import Features, as_it_is, put, replaced
from minicode.study.judge import held_out, judge, mean_differences, neurons
from minicode.study.methods import READ
from minicode.train_fsm import main as train_fsm

CODEBOOKS = {"codebooks, pursuit": "pursuit", "codebooks, nearest": "nearest"}
WITHOUT_K = {"neurons": neurons, "mean differences": mean_differences}
METHODS = (*CODEBOOKS, *READ, *WITHOUT_K)
MACHINE = ""  # flags of all networks
TABLES = (
    ("error", "loss", "loss_one", "loss_zero", "recovered", "chosen", "dead", "seconds"),
    ("state_precision", "state_recall", "trigram_precision", "trigram_recall", "state_at_95"),
    ("control_first", "control_inside", "mean_iou", "chance"),
)


@outlive()
def main(argv=None):
    parser = make_parser()
    args = parser.parse_args(argv)
    with parser.user_errors():
        rows = {}
        for seed in range(args.seeds):
            for method in args.only or METHODS:
                for k in [0] if method in WITHOUT_K else args.k:
                    if (method, k) != ("codebooks, nearest", 1):  # which is pursuit
                        rows.setdefault((method, k), []).append(figures(args, method, k, seed))
    for columns in TABLES:
        print(table(columns, rows))


def make_parser():
    parser = Parser("compare", __doc__)
    flag = parser.add_argument
    flag("--only", nargs="+", choices=METHODS, metavar="METHOD", help="these (default: all)")
    flag("--k", nargs="+", type=int, default=[1, 2, 4, 8], help="features chosen at a site")
    flag("--seeds", type=int, default=3, help="seeds of each (default: 3)")
    flag("--steps", type=int, default=4000, help="training steps of the networks")
    out = Path("runs/compare")
    flag("--out", type=Path, default=out, help="folder of it all (default: %(default)s)")
    return parser


def figures(args, method, k, seed):
    """A row's figures: those in its file, or they are made and written there."""
    path = args.out / f"{name(method, k)}-{seed}.json"
    if path.exists():
        return json.loads(path.read_bytes())
    twin = network(args.out, args.steps, seed, "dense", "--codebooks none")
    if method in WITHOUT_K:
        found = WITHOUT_K[method](twin)
    else:
        model, choose, seconds = fitted(args, method, k, seed)
        other = None
        if seed:
            first, _, _ = fitted(args, method, k, 0)
            other = Features(first, held_out(twin, 0, 3)[0], choose)
        found = judge(model, twin, choose, other) | {"seconds": seconds}
    found = {name: float(figure) for name, figure in found.items()}
    write(path, json.dumps(found, indent=1))
    return found


def name(method, k):
    """Of a method's files."""
    return "-".join(re.findall(r"\w+", f"{method} {k or ''}"))


def fitted(args, method, k, seed):
    """A model with features at its sites, what its sites pass on, and how long it was trained."""
    if method in CODEBOOKS:
        flags = f"--k {k} --selection {CODEBOOKS[method]}"
        run = network(args.out, args.steps, seed, name(method, k), flags)
        return run.model, replaced, run.summary["seconds"]
    twin = network(args.out, args.steps, seed, "dense", "--codebooks none")
    model = copy.deepcopy(twin.model)
    make, learn = READ[method]
    torch.manual_seed(seed)
    modules = make(twin, k)
    path = args.out / f"{name(method, k)}-{seed}.pt"
    if path.exists():
        put(model, modules)
        saved = read_tensors(path)
        seconds = saved.pop("seconds").item()
        model.load_state_dict(saved)
    else:
        began = time.monotonic()
        learn(twin, modules)
        seconds = time.monotonic() - began
        put(model, modules)
        write_tensors(path, {"seconds": torch.tensor(seconds), **model.state_dict()})
    return model, as_it_is, seconds


@cache
def network(out, steps, seed, name, flags):
    """A run of train_fsm, which is trained unless it was."""
    folder = out / f"{name}-{seed}"
    flags = f"--out {folder} --seed {seed} --steps {steps} {MACHINE} {flags}".split()
    if (folder / "config.json").exists():
        flags.append("--resume")
    status = train_fsm(flags)
    if status:
        raise SystemExit(status)
    return load_run(folder)


def table(columns, rows):
    """Means over seeds, with the lowest and the highest: columns of rows {(method, k): figures}."""
    names = [name.replace("_", " ") for name in columns]
    lines = [f"| method, k | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
    for (method, k), seeds in rows.items():
        cells = [f"{method}, {k}" if k else method]
        for column in columns:
            values = [figures[column] for figures in seeds if column in figures]
            cells.append(cell(values))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(values):
    if not values:
        return "-"
    return f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


if __name__ == "__main__":
    main()
