"""python -m minicode.train_text: trains a language model with codebooks, on stories made on the spot or on your own text."""

import sys

from minicode.language.text import Text
from minicode.runtime.command import command, table

PRESETS = {
    "default": dict(
        codebooks="head", k=8, n_codes_head=128, n_layer=2, n_embd=128, n_head=4, steps=3000, eval_every=500,
        commitment=0.5,  # at 5, as on TokFSM, layer 1's activations crowd around a few codes: 30 % dead
    ),
}  # fmt: skip
ROWS = ("loss", "perplexity", "accuracy", "bits_per_byte", "dead_code_fraction", "gain_kept")


def main(argv=None):
    return command(argv, "train_text", __doc__, Text, PRESETS, "runs/text", compare)


def compare(summary):
    """A run's figures beside those of its dense model, and of a model that knows each token's frequency alone."""
    unigram, dense = summary["loss_unigram"], summary["dense"]
    if dense:
        gain_kept = (unigram - summary["loss"]) / (
            unigram - dense["loss"]
        )  # of the dense model's gain over the unigram's
        summary = {**summary, "gain_kept": gain_kept}
    return table(summary, {"unigram": {"loss": unigram}}, ROWS)


if __name__ == "__main__":
    sys.exit(main())
