"""python -m minicode.train_text: trains a language model with codebooks, on stories made on the spot or on your own text."""

import sys

import torch

from minicode.text import Text
from minicode.train import command

PRESETS = {
    "default": dict(
        codebooks="head", k=8, n_codes_head=128, n_layer=2, n_embd=128, n_head=4, steps=3000, eval_every=500,
        commitment=0.5,  # at 5, as on TokFSM, layer 1's activations crowd around a few codes: 30 % dead
    ),
}  # fmt: skip
ROWS = ("loss", "perplexity", "accuracy", "bits_per_byte", "dead_code_fraction", "gain_kept")


def main(argv=None):
    return command(argv, "train_text", __doc__, Text, PRESETS, "runs/text", report)


def report(run):
    """The figures of a run, and a sample."""
    text, generator = run.data, torch.Generator().manual_seed(run.config.seed)
    tokens = run.model.generate(text.prompt(""), min(text.sample_length, run.config.block_size), generator=generator)
    return (
        f"{table(run.summary)}\na sample: {text.show(tokens[0].numpy())}\n"
        f"next:     python -m minicode.sample --run {run.folder}"
    )


def table(summary):
    """The run beside its dense model, and a model that knows each token's frequency alone."""
    unigram, dense = summary["loss_unigram"], summary["dense"]
    columns = {"this run": summary, "unigram": {"loss": unigram}}
    if dense:
        kept = (unigram - summary["loss"]) / (unigram - dense["loss"])  # of what the dense model gains over the unigram's
        columns = {"this run": {**summary, "gain_kept": kept}, f"dense, step {dense['step']}": dense, "unigram": {"loss": unigram}}
    lines = [" " * 20 + "".join(f"{title:>{len(title) + 3}}" for title in columns)]
    for name in ROWS:
        cells = (f"{row[name]:.4f}" if name in row else "-" for row in columns.values())
        lines.append(f"{name:20}" + "".join(f"{cell:>{len(title) + 3}}" for title, cell in zip(columns, cells)))
    return "\n".join([*lines, f"{summary['tokens'] / 1e6:.1f} M tokens in {summary['seconds']:.0f} s"])


if __name__ == "__main__":
    sys.exit(main())
