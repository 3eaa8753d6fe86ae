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
import torch.nn.functional as F

from minicode.codebook import Codebook
from minicode.run import Parser, load_run, write
from minicode.train_fsm import main as train_fsm

# -- ideas that are no flags: each replaces one method of Codebook


def cut_off(self, a, q):
    """pass_on without the straight-through estimator: what lies below a codebook learns from the commitment alone."""
    return q


def rotation(self, a, q):
    """pass_on by the rotation trick (Fifty et al. 2024): the gradient of the rotation and scaling that take a to q."""
    with torch.no_grad():
        a_unit, q_unit = F.normalize(a, dim=-1), F.normalize(q, dim=-1)
        r = F.normalize(a_unit + q_unit, dim=-1)
        scale = q.norm(dim=-1, keepdim=True) / a.norm(dim=-1, keepdim=True).clamp_min(1e-6)

    def along(u):
        return (u * a).sum(-1, keepdim=True)

    out = scale * (a - 2 * r * along(r) + 2 * q_unit * along(a_unit))
    return q + (out - out.detach())


def start_at_random(self, inputs, generator=None):
    """start without k-means: codes are inputs, drawn at random."""
    chosen = torch.randperm(len(inputs), generator=generator, device=inputs.device)[: self.n_codes]
    with torch.no_grad():
        self.codes.copy_(self.activations(inputs[chosen]).transpose(0, 1) / self.k)


def start_with_four(self, inputs, generator=None, start=Codebook.start):
    """start with k = 4, for `one_less`."""
    self.k, self.batches = 4, 0
    start(self, inputs, generator=generator)


def one_less(self, x, forward=Codebook.forward):
    """forward with k = 4, and one less after each 200 batches that it is trained on."""
    if self.training and self.enabled:
        self.batches += 1
        self.k = max(1, 4 - self.batches // 200)
    return forward(self, x)


IDEAS = {  # name: flags, or what is replaced
    "the default": "",
    "similarity cosine": "--similarity cosine",
    "moving averages": "--decay 0.98",
    "no dense phase": "--dense-share 0",
    "the paper's method": "--preset paper --n-layer 2 --n-embd 64 --batch-size 16 --lr 4e-3",
    "random inputs, not k-means": {"start": start_at_random},
    "no straight-through": {"pass_on": cut_off},
    "rotation trick": {"pass_on": rotation},
    "LayerNorm in front": "--layer-norm",
    "no commitment": "--commitment 0",
    "no revival": "--revive-every 0",
    "revival from the start": "--revive-after 0",
    "full rate with codebooks": "--codebook-lr 1",
    "half the learning rate": "--lr 2e-3",
    "twice the learning rate": "--lr 8e-3",
    "k from 4 to 1": {"start": start_with_four, "forward": one_less},
}
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
            (a, b), generator = run.fsm.pairs(), torch.Generator().manual_seed(0)
            control = run.fsm.control(run.model, run.fsm.runs(a), b, run.fsm.copy_codes(run.model, mlps), generator)
            write(path, json.dumps({**run.summary, "control_mlp": control["control"]}))
    return json.loads(path.read_text())


def main(argv=None):
    parser = Parser("ablate", __doc__)
    parser.add_argument("ideas", nargs="*", metavar="IDEA", help=f"which (default: all): {', '.join(IDEAS)}")
    parser.add_argument("--out", type=Path, default=Path("runs/ablate"), help="folder of the runs (default: runs/ablate)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each (default: 3)")
    parser.add_argument("--steps", type=int, default=2000, help="training steps (default: 2000)")
    args = parser.parse_args(argv)
    if unknown := [idea for idea in args.ideas if idea not in IDEAS]:
        parser.error(f"there is no idea {unknown[0]!r}; there are: {', '.join(IDEAS)}")
    if min(args.seeds, args.steps) < 1:
        parser.error("--seeds and --steps must be at least 1")
    lines = ["| idea | loss | transition accuracy | dead codes | control, MLPs |", "|---|---|---|---|---|"]
    for idea in args.ideas or IDEAS:
        rows = [train(idea, args.out / f"{idea.replace(' ', '-')}-{seed}", args.steps, seed) for seed in range(args.seeds)]
        values = [[row[name] for row in rows] for name in COLUMNS]
        cells = (f"{np.mean(v):.3f} ({min(v):.3f} to {max(v):.3f})" for v in values)
        flags = f" `{IDEAS[idea]}`" if isinstance(IDEAS[idea], str) and IDEAS[idea] else ""
        lines.append(f"| {idea}{flags} | {' | '.join(cells)} |")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
