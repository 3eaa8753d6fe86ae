"""What we tried, as tables: each row is a default with some flags, or with a few lines replaced."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F


def cut_off(self, a, q):
    """pass_on without the straight-through estimator.

    What lies below a codebook learns from the commitment alone.
    """
    return q


def rotation(self, a, q):
    """pass_on by the rotation trick (Fifty et al. 2024).

    The gradient is that of the rotation and scaling that take a to q.
    """
    with torch.no_grad():
        a_unit = F.normalize(a, dim=-1)
        q_unit = F.normalize(q, dim=-1)
        between = F.normalize(a_unit + q_unit, dim=-1)
        scale = q.norm(dim=-1, keepdim=True) / a.norm(dim=-1, keepdim=True).clamp_min(1e-6)

    def along(unit):
        return (unit * a).sum(-1, keepdim=True)

    out = scale * (a - 2 * between * along(between) + 2 * q_unit * along(a_unit))
    return q + (out - out.detach())


@torch.no_grad()
def start_at_random(self, inputs, generator=None):
    """start without k-means: codes are inputs, drawn at random."""
    order = torch.randperm(len(inputs), generator=generator, device=inputs.device)
    chosen = self.activations(inputs[order[: self.n_codes]])  # (C, G, d)
    self.codes.copy_(chosen.transpose(0, 1) / self.k)


def no_fit(self, a, ids):
    """_fit, not done: codes stay k-means' means, a k-th of each."""


@dataclass(frozen=True)
class Table:
    """Rows of runs of one command, which are compared."""

    about: str
    command: str
    steps: int
    rows: dict  # the flags of each
    columns: tuple = ("loss", "accuracy", "dead_code_fraction")
    theirs: dict = field(default_factory=dict)  # the paper's figures for a row
    interpreted: bool = False  # whether its codes are: further tables


def paper(loss, accuracy, transition_accuracy):
    """A row of its Table 1."""
    return {"loss": loss, "accuracy": accuracy, "transition_accuracy": transition_accuracy}


REPLACED = {  # the methods of Codebook that a row replaces
    "random inputs, not k-means": {"start": start_at_random},
    "no straight-through": {"pass_on": cut_off},
    "rotation trick": {"pass_on": rotation},
    "no least squares after k-means": {"_fit": no_fit},
}
FSM = Table(
    "ideas on TokFSM, half of the default's steps: 75 minutes on one core",
    "train_fsm",
    2000,
    {
        "the default": "",
        "similarity cosine": "--similarity cosine",
        "no dense phase": "--dense-share 0",
        "the paper's method": "--preset paper --n-layer 2 --n-embd 64 --batch-size 16 --lr 4e-3",
        "random inputs, not k-means": "",
        "no straight-through": "",
        "rotation trick": "",
        "LayerNorm in front": "--layer-norm",
        "no commitment": "--commitment 0",
        "no revival": "--revive-every 0",
        "revival from the start": "--revive-after 0",
        "full rate with codebooks": "--codebook-lr 1",
        "half the learning rate": "--lr 2e-3",
        "twice the learning rate": "--lr 8e-3",
        "512 codes an MLP": "--n-codes 512",
    },
    ("loss", "transition_accuracy", "dead_code_fraction", "control_mlp"),
)
TEXT = Table(
    "ideas for k > 1, on stories or on --data, a third of the default's steps: an hour",
    "train_text",
    1000,
    {
        "the default": "",
        "the k nearest": "--selection nearest",
        "random inputs, not k-means": "",
        "no least squares after k-means": "",
        "half of the steps with codebooks": "--dense-share 0.5",
        "the same, the k nearest": "--dense-share 0.5 --selection nearest",
        "128 codes a head": "--n-codes-head 128",
        "MLPs too, k 8": "--codebooks head,mlp",
        "MLPs too, in 16 groups": "--codebooks head,mlp --groups-mlp 16",
        "MLPs too, k 100": "--codebooks head,mlp --k-mlp 100",
    },
)
BOTH_20K = "--selection nearest --n-codes 20000 --n-codes-head 20000"
PAPER = Table(
    "the paper's Table 1 on TokFSM, by our recipe: hours, most of them for 20,000 codes",
    "train_fsm",
    4000,
    {
        "no codebooks": "--codebooks none",
        "attention only, k 1, C 2k": "--codebooks head --n-codes-head 2000",
        "both, k 1, C 10k": "--n-codes 10000 --n-codes-head 10000",
        "both, k 4, C 1,024, pursuit": "--k 4 --n-codes 1024 --n-codes-head 1024",
        "both, k 4, C 20k": f"--k 4 {BOTH_20K}",
        "both, k 16, C 20k": f"--k 16 {BOTH_20K}",
        "both, k 128, C 20k": f"--k 128 {BOTH_20K}",
    },
    ("loss", "accuracy", "transition_accuracy", "dead_code_fraction"),
    theirs={
        "no codebooks": paper(1.179, 0.4636, 0.9677),
        "attention only, k 1, C 2k": paper(1.18, 0.4633, 0.9639),
        "both, k 1, C 10k": paper(1.269, 0.4527, 0.6365),
        "both, k 4, C 20k": paper(1.192, 0.4620, 0.8069),
        "both, k 16, C 20k": paper(1.183, 0.4632, 0.9153),
        "both, k 128, C 20k": paper(1.178, 0.4638, 0.9582),
    },
)
RESULTS = Table(
    "the default on TokFSM and its dense twin, and what the codes stand for and do: half an hour",
    "train_fsm",
    4000,
    {
        "the default": "",
        "dense": "--codebooks none",
        "the paper's method, as long": "--preset paper --n-layer 2 --n-embd 64 --batch-size 16 "
        "--lr 4e-3",
    },
    ("loss", "transition_accuracy", "first_transition_accuracy", "dead_code_fraction", "seconds"),
    interpreted=True,
)
LANGUAGE = Table(
    "stories, or --data, and their dense twin, and steering by topics: two hours",
    "train_text",
    3000,
    {"the default": "", "MLPs too": "--codebooks head,mlp", "dense": "--codebooks none"},
    ("accuracy", "loss", "bits_per_byte", "dead_code_fraction"),
    interpreted=True,
)
TABLES = {
    "results": RESULTS,
    "language": LANGUAGE,
    "fsm": FSM,
    "text": TEXT,
    "paper": PAPER,
}
