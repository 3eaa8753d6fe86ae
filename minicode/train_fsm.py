"""python -m minicode.train_fsm: trains a transformer with codebooks on TokFSM."""

import sys

from minicode.fsm import FSM
from minicode.runtime.command import command, table

# The default is our recipe; "what differs from the paper" has what each departure gains.
PRESETS = {
    "default": {},
    "paper": {
        "n_layer": 4,
        "n_embd": 128,
        "n_head": 4,
        "block_size": 128,
        "n_codes": 1000,
        "n_codes_head": 1000,
        "similarity": "cosine",
        "selection": "nearest",
        "layer_norm": True,
        "dense_share": 0.0,
        "codebook_lr": 1.0,
        "commitment": 0.0,
        "revive_every": 50,
        "revive_after": 0.0,
        "lr": 1e-3,
        "batch_size": 64,
        "steps": 20_000,
    },
}
# The released model at its best, from its authors' run on a machine of this size.
RELEASED_MACHINE = {"n_states": 100, "n_edges": 10, "base": 10}
RELEASED = {
    "loss": 1.2691,
    "accuracy": 0.4525,
    "transition_accuracy": 0.6365,
    "first_transition_accuracy": 0.88,
    "dead_code_fraction": 0.93,
}


def main(argv=None):
    return command(argv, "train_fsm", __doc__, FSM, PRESETS, "runs/fsm", compare)


def compare(run):
    """A run's figures beside the loss floor, and the released model's on a machine as large."""
    others = {"loss floor": {"loss": run.summary["loss_floor"]}}
    if RELEASED_MACHINE.items() <= vars(run.fsm).items():
        others["released, 2.6 B tokens"] = RELEASED
    return table(run.summary, others, RELEASED)


if __name__ == "__main__":
    sys.exit(main())
