"""python -m minicode.train_fsm: trains a transformer with codebooks on TokFSM, and shows how far it got."""

import sys

import torch

from minicode.fsm import FSM
from minicode.train import command

# The default is our recipe. README.md, "What differs from the paper", has what each departure gains, and the command.
PRESETS = {
    "default": {},
    "paper": dict(
        n_layer=4, n_embd=128, n_head=4, block_size=128, n_codes=1000, n_codes_head=1000, similarity="cosine", decay=None,
        dense_share=0.0, codebook_lr=1.0, commitment=0.0, revive_every=50, revive_after=0.0, lr=1e-3, batch_size=64, steps=20_000,
    ),
}  # fmt: skip
RELEASED = {  # at its best, from its authors' run
    "loss": 1.2691, "accuracy": 0.4525, "transition_accuracy": 0.6365, "first_transition_accuracy": 0.88, "dead_code_fraction": 0.93,
}  # fmt: skip


def main(argv=None):
    return command(argv, "train_fsm", __doc__, FSM, PRESETS, "runs/fsm", report)


def report(run):
    """The figures of a run, and a sample."""
    fsm, generator = run.fsm, torch.Generator().manual_seed(run.config.seed)
    tokens = run.model.generate(torch.tensor([[fsm.bos]]), min(12 * fsm.digits, run.config.block_size), generator=generator)
    return (
        f"{table(run.summary)}\na sample: {fsm.show(tokens[0].numpy())}\n"
        f"next:     python -m minicode.sample --run {run.folder} --force-code"
    )


def table(summary):
    """The run beside its dense model, the loss floor and the released model."""
    columns = {"this run": summary, "loss floor": {"loss": summary["loss_floor"]}, "released, 2.6 B tokens": RELEASED}
    if summary["dense"]:
        columns[f"dense, step {summary['dense']['step']}"] = summary["dense"]
    lines = [" " * 26 + "".join(f"{title:>{len(title) + 3}}" for title in columns)]
    for name in RELEASED:
        cells = (f"{row[name]:.4f}" if name in row else "-" for row in columns.values())
        lines.append(f"{name:26}" + "".join(f"{cell:>{len(title) + 3}}" for title, cell in zip(columns, cells)))
    return "\n".join([*lines, f"{summary['tokens'] / 1e6:.1f} M tokens in {summary['seconds']:.0f} s"])


if __name__ == "__main__":
    sys.exit(main())
