"""python -m minicode.compare: codebooks beside what else would be used, on TokFSM, as tables.

At the same sites (every head, every MLP), as wide, with the same k, trained on the same tokens.
Codebooks are trained into a network; all else reads its dense twin, and leaves that as it is:
TopK (Gao et al. 2024), AbsTopK (Zhu et al. 2025), BatchTopK (Bussmann et al. 2024), k-means (as
codebooks start), random codes (the floor), neurons, and, with labels, mean differences.

error         sum |a - q|² / sum |a - mean(a)|² (sparsify: FVU), the mean over sites
loss          cross-entropy a token with every site replaced; one: with one, the mean; zero: with
              sites that give nothing; recovered: (zero - loss) / (zero - twin's) (SAEBench)
chosen, dead  features a token; the share that never fire on held-out tokens
seconds       of training; of codebooks, of the whole network
state, trigram  precision and recall of the best feature for a state, or for a state and a digit,
              from that strength on of which F1 is highest (paper, section 4.2; codes have none); at
              95: the share with a feature of which both are 0.95 or more
control       the share of next states that follow b, as all sites get the features that they have
              in b's run (study/machine.py): at the first state, and inside a sequence
mean iou      of a feature and the best of seed 0, by where they fire; and by chance

Each row is kept, in its dense twin's folder: stopped, the command goes on with the next.
"""

import argparse
import json
from functools import cache
from pathlib import Path

import torch

from minicode.model import GPTConfig
from minicode.runtime.arguments import check_range
from minicode.runtime.files import read_json, write
from minicode.runtime.options import Parser
from minicode.runtime.streams import outlive
from minicode.study.features import Features, replaced
from minicode.study.judge import COLUMNS, held_out, judge, mean_differences, neurons
from minicode.study.methods import READ, read
from minicode.study.over_seeds import cells, draw, file_name, table, trained
from minicode.train_fsm import main as train_fsm

CODEBOOKS = {"codebooks, pursuit": "pursuit", "codebooks, nearest": "nearest"}
WITHOUT_K = {"neurons": neurons, "mean differences": mean_differences}
METHODS = (*CODEBOOKS, *READ, *WITHOUT_K)


@outlive()
def main(argv=None):
    parser = make_parser()
    args = parser.parse_args(argv)
    with parser.user_errors():
        check_range("--seeds", args.seeds, least=1, below=1001)
        for k in args.k:
            check_range("--k", k, least=1, below=GPTConfig.n_codes_head + 1)
        results = {row: [] for row in ways(args)}
        if not results:
            raise ValueError("codebooks of the nearest code, k = 1, are those by pursuit")
        for seed in range(args.seeds):
            for method, k in results:
                results[method, k].append(figures(args, method, k, seed))
    for columns in COLUMNS:
        rows = {title(*row): cells(found, columns) for row, found in results.items()}
        print(table("method, k", columns, rows))
    if args.figures:
        draw(results, args.figures)


def ways(args):
    """The rows: (method, k), where there is a k."""
    for method in args.only or METHODS:
        for k in [None] if method in WITHOUT_K else args.k:
            if (method, k) != ("codebooks, nearest", 1):  # which is pursuit
                yield method, k


def make_parser():
    parser = Parser("compare", __doc__)
    flag = parser.add_argument
    there_are = f"these, of {'; '.join(METHODS)} (default: all)"
    flag("--only", nargs="+", choices=METHODS, metavar="METHOD", help=there_are)
    flag("--k", nargs="+", type=int, default=[1, 2, 4, 8], help="of each (default: 1 2 4 8)")
    flag("--seeds", type=int, default=3, help="seeds of each (default: 3)")
    flag("--out", type=Path, default=Path("runs/compare"), help="folder (default: runs/compare)")
    flag("--figures", type=Path, metavar="FOLDER", help="write the figures there, as SVG")
    text = "the rest of the line: flags of train_fsm for all networks, but for what makes a row"
    flag("--train", nargs=argparse.REMAINDER, default=[], metavar="FLAGS", help=text)
    return parser


def figures(args, method, k, seed):
    """A row's figures: those in its file, or they are made and written there."""
    twin = dense(args, seed)  # which refuses other flags than it was trained with
    path = twin.folder / f"{name(method, k)}.json"
    if path.exists():
        return read_json(path, dict)
    if method in WITHOUT_K:
        found = WITHOUT_K[method](twin)
    else:
        model, choose, seconds = fitted(args, method, k, seed)
        other = None
        if seed:
            first, _, _ = fitted(args, method, k, 0)
            other = Features(first, held_out(twin)[0], choose)
        found = judge(model, twin, choose, other) | {"seconds": seconds}
    found = {name: float(figure) for name, figure in found.items()}
    write(path, json.dumps(found, indent=1))
    return found


def title(method, k):
    return f"{method}, {k}" if k else method


def name(method, k):
    return file_name(title(method, k))


def fitted(args, method, k, seed):
    """A model with features, what its sites pass on, and how many seconds it was trained."""
    if method in CODEBOOKS:
        flags = f"--codebooks head,mlp --k {k} --selection {CODEBOOKS[method]} --seed {seed}"
        run = network(args.out / f"{name(method, k)}-{seed}", *args.train, *flags.split())
        return run.model, replaced, run.summary["seconds"]
    twin = dense(args, seed)
    torch.manual_seed(seed)
    return read(twin, method, k, twin.folder / f"{name(method, k)}.pt")


def dense(args, seed):
    flags = f"--codebooks none --seed {seed}".split()
    return network(args.out / f"dense-{seed}", *args.train, *flags)


@cache
def network(folder, *flags):
    return trained(train_fsm, folder, flags)


if __name__ == "__main__":
    main()
